"""common/agents.py: replay buffers and what is sampled from them, agents in several processes, metrics, returns."""

from itertools import product

import pytest
import torch

from common import agents, envs
from common.agents import Agents, sub_trajectories

DRAWS = torch.Generator().manual_seed(0)


def initial(n):
    """Two kinds of parameters, one of which has another axis before the agents'."""
    return {"phi": torch.randn(n, 5), "theta": torch.randn(2, n, 4), "phi_steps": torch.zeros(n, 1)}


def some(name="pendulum", p=3, copies=2, capacity=1000, own=None, **options):
    torch.manual_seed(0)
    own = torch.arange(p) if own is None else torch.tensor(own)
    return Agents(envs.make(name, len(own) * copies, scaled=True), initial, p, own, capacity, **options)


def step(some_agents, now):
    """A random action everywhere."""
    action = 2 * some_agents.draws(torch.rand, some_agents.copies, some_agents.env.action_size) - 1
    some_agents.step_async(action)
    some_agents.step_wait(now)


# ---- sub-trajectories --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capacity", [30, 1000])
def test_sub_trajectories_stay_within_an_episode_and_the_buffer(capacity):
    """continuous_cartpole ends early; a small buffer is overwritten; an agent is reset."""
    ours = some("continuous_cartpole", capacity=capacity)
    episode = torch.zeros(3, 2, dtype=torch.int64)
    note = []  # of every copy and step: the episode, the step in it, the observation
    for now in range(100):
        before, steps = ours.state["obs"].clone(), ours.state["env_steps"].view(3, 2).clone()
        step(ours, now)
        note.append((episode.clone(), steps, before))
        episode += ours.state["env_steps"].view(3, 2) == 0
        if now == 79:
            ours.reset_agents(80, torch.tensor([False, True, False]))
    assert (episode > 2).all()
    known = {}
    for now, (episodes, steps, obs) in enumerate(note):
        for agent, copy in product(range(3), range(2)):
            key = (agent, *obs[agent, copy].tolist())
            known[key] = (now, copy, int(episodes[agent, copy]), int(steps[agent, copy]))
    batch = sub_trajectories(ours.env, ours.state, torch.tensor(100), ours.draws(torch.rand, 200, 2), 5)
    lengths = set()
    for agent, s in product(range(3), range(200)):
        inside = batch.mask[agent, s].bool()
        length = int(inside.sum())
        lengths.add(length)
        assert inside[:length].all() and length >= 1
        entries = [known[agent, *x.tolist()] for x in batch.obs[agent, s, :length]]
        assert len({(copy, which) for _, copy, which, _ in entries}) == 1
        steps = [at for _, _, _, at in entries]
        assert steps == list(range(steps[0], steps[0] + length))
        oldest = max(100 - min(capacity, 100), 80 if agent == 1 else 0)
        assert entries[0][0] >= oldest
        torch.testing.assert_close(batch.time[agent, s, :length], torch.tensor(steps) / 499.0)
        torch.testing.assert_close(batch.next_obs[agent, s, : length - 1], batch.obs[agent, s, 1:length])
    assert lengths == set(range(1, 6))


def test_sampling_is_one_graph():
    """Which torch.compile needs."""
    ours = some()
    for now in range(8):
        step(ours, now)
    draws = ours.draws(torch.rand, 7, 2)
    compiled = torch.compile(sub_trajectories, dynamic=False, fullgraph=True, backend="eager")
    inputs = ours.env, ours.state, torch.tensor(8), draws, 4
    for x, y in zip(compiled(*inputs), sub_trajectories(*inputs), strict=True):
        assert torch.equal(x, y)


def test_episodes_of_one_step_are_at_time_zero():
    ours = some()
    ours.env.max_steps = ours.env.env.max_steps = 1
    for now in range(4):
        step(ours, now)
    batch, ended = ours.latest(4, 4)
    assert ended.all() and (batch.time == 0).all()


def test_the_latest_steps_are_in_order():
    ours, rewards = some(capacity=5), []
    for now in range(12):
        step(ours, now)
        rewards.append(ours.rewards)
    batch, _ = ours.latest(12, 4)
    torch.testing.assert_close(batch.reward.mean(1), torch.stack(rewards[-4:], 1))
    torch.testing.assert_close(batch.next_obs[:, :, :-1], batch.obs[:, :, 1:])
    assert torch.equal(batch.next_obs[:, :, -1], ours.state["obs"]) and batch.mask.all()


def test_statistics_leave_out_what_is_behind_an_end():
    x = torch.randn(2, 4, 3, generator=DRAWS)
    mask = (torch.rand(2, 4, 3, generator=DRAWS) < 0.6).float()
    for agent in range(2):
        inside = x[agent][mask[agent] > 0]
        torch.testing.assert_close(agents.masked_mean(x, mask)[agent], inside.mean())
        torch.testing.assert_close(agents.masked_std(x, mask)[agent], inside.std(correction=0))
        scaled = agents.standardized(x, mask)[agent][mask[agent] > 0]
        torch.testing.assert_close(scaled, (inside - inside.mean()) / inside.std(correction=0), atol=1e-4, rtol=1e-4)
    assert agents.masked_mean(x, 0 * mask).tolist() == [0, 0]


# ---- resets ------------------------------------------------------------------------------------------------------------
def test_agents_that_are_not_finite_are_reset_and_counted():
    ours = some(p=4)
    for now in range(3):
        step(ours, now)
    ours.state["phi_steps"] += 7
    ours.state["phi"][1, 2] = torch.nan
    ours.state["theta"][1, 3, 0] = torch.inf
    before = {name: x.clone() for name, x in ours.state.items()}
    ours.reset_diverged(3, "phi", "theta")
    assert ours.state["diverged"].tolist() == [0, 1, 0, 1] and ours.state["phi_steps"][:, 0].tolist() == [7, 0, 7, 0]
    assert ours.state["age"].tolist() == [6, 0, 6, 0] and ours.state["first_step"].tolist() == [0, 3, 0, 3]
    assert ours.state["phi"].isfinite().all() and ours.state["theta"].isfinite().all()
    assert torch.equal(ours.state["phi"][::2], before["phi"][::2])
    assert torch.equal(ours.state["theta"][:, ::2], before["theta"][:, ::2])
    generator = torch.get_rng_state()
    ours.reset_diverged(4, "phi", "theta")
    assert torch.equal(torch.get_rng_state(), generator)  # nothing is drawn where all are finite


# ---- processes ---------------------------------------------------------------------------------------------------------
def test_agents_of_several_processes_are_those_of_one():
    """Each has the numbers that it would have beside all others."""
    whole, *parts = some(p=5), some(p=5, own=[0, 2, 4]), some(p=5, own=[1, 3])
    for ours in (whole, *parts):
        torch.manual_seed(1)
        for now in range(4):
            step(ours, now)
    for part in parts:
        for name in ("phi", "buffer", "obs", "age"):
            assert torch.equal(part.state[name], whole.state[name][part.own]), name
        assert torch.equal(part.state["theta"], whole.state["theta"][:, part.own])


def test_numbers_of_all_agents(monkeypatch):
    """Also where two processes have the same agent."""
    parts = [some(p=3, own=own) for own in ([0, 2], [1], [1])]
    total = torch.zeros(2, 3)
    for part in parts:
        total[:, part.own] += torch.stack([10.0 * part.own, torch.ones(len(part.own))])

    def all_reduce(sums):
        assert sums[0].sum() == 20  # of agents 0 and 2
        sums.copy_(total)

    monkeypatch.setattr(agents.dist, "all_reduce", all_reduce)
    assert torch.equal(parts[0].of_all(10 * parts[0].own), 10 * parts[0].own)  # there is one process
    parts[0].sharded = True
    assert parts[0].of_all(10 * parts[0].own).tolist() == [0, 10, 20]


def test_a_state_is_that_of_all_agents_and_goes_to_any_number_of_processes(monkeypatch):
    whole, *parts = some(p=4, metrics=("loss",)), *(some(p=4, own=own, metrics=("loss",)) for own in ([0, 2], [1, 3]))
    for ours in (whole, *parts):
        torch.manual_seed(1)
        step(ours, 0)
        ours.note("loss", ours.rewards)
    monkeypatch.setattr(agents.dist, "get_world_size", lambda: 2)
    for first, second in (parts, parts[::-1]):
        names = iter(first.state)

        def gather(into, x):
            """What torch.distributed does, with the other process' agents from here."""
            name = next(names)  # noqa: B023 (called at once)
            other = second.state[name].view(x.shape)  # noqa: B023
            for target, value in zip(into, (x, other) if first is parts[0] else (other, x), strict=True):  # noqa: B023
                target.copy_(value)

        monkeypatch.setattr(agents.dist, "all_gather", gather)
        first.sharded = True
        gathered = first.state_dict()
        first.sharded = False
        for name, x in whole.state_dict().items():
            assert torch.equal(gathered[name], x), name
    blank = some(p=4, own=[1, 2, 3], metrics=("loss",))
    blank.load_state_dict(gathered)
    for name, x in blank.state.items():
        axis = 1 if name == "theta" else 0
        expected = whole.state_dict()[name].index_select(axis, blank.own)
        assert torch.equal(x, expected.view(x.shape)), name
    with pytest.raises(KeyError):
        blank.load_state_dict({name: x for name, x in gathered.items() if name != "phi"})
    with pytest.raises(TypeError, match="phi has to be of torch.float32"):
        blank.load_state_dict(gathered | {"phi": gathered["phi"].double()})


# ---- metrics and returns -----------------------------------------------------------------------------------------------
def test_means_are_over_what_was_noted_and_stay_without_anything_new():
    ours = some(metrics=("loss", "reward"), deviations=("reward",))
    assert ours.means() == {"loss": 0, "reward": 0, "reward_std": 0}
    ours.note("loss", torch.tensor(3.0))
    for reward in (1.0, 2.0, 6.0):
        ours.note("reward", torch.tensor([0.0, reward, 2 * reward]))
    over_agents = torch.tensor([0.0, 3.0, 6.0]).std(correction=0)
    assert ours.means() == {"loss": 3, "reward": 3, "reward_std": pytest.approx(float(over_agents))}
    ours.note("reward", torch.tensor([4.0, 4.0, 4.0]))
    assert ours.means() == {"loss": 3, "reward": 4, "reward_std": 0}


def test_mean_returns_are_of_first_episodes_from_the_same_starts():
    """A pole that is balanced pays 1 for each step until it falls."""
    env = envs.make("continuous_cartpole", 6)
    seen = []

    def act(obs):
        seen.append(obs)
        return torch.ones(3, 2, 1)

    first = agents.mean_returns(env, act, 3, seed=5)
    fewer, own = envs.make("continuous_cartpole", 4), torch.tensor([2, 0])
    assert torch.equal(agents.mean_returns(fewer, lambda obs: torch.ones(2, 2, 1), 3, 5, own), first[[2, 0]])
    starts = seen[0]
    seen.clear()
    assert torch.equal(agents.mean_returns(env, act, 3, seed=5), first) and torch.equal(seen[0], starts)
    assert first.shape == (3,) and ((5 < first) & (first < 15)).all()
    agents.mean_returns(env, act, 3, seed=6)
    assert len(starts.unique(dim=0)) == 3
