"""symla.py: the equations of chapter 4, its symmetries, the inner and the outer loop, and the command line."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import reproduce
import torch
import tyro
from conftest import PROCESS, ROOT, TWO, killed, rows, run_script
from torch.utils._pytree import tree_map

import symla
from common import cells, checkpoints, envs

ARGS = symla.Args(
    hidden=5, message_size=3, lifetime_steps=12, meta_steps=4, evaluations=6, population=8, noise_std=0.1, lr=0.05,
    obs_gain=1.5, rnn_size=7, rnn_inputs=4, rnn_outputs=5, test_seeds=20,
)  # fmt: skip
DRAWS = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """The random numbers of a test, whichever tests ran before it."""
    DRAWS.manual_seed(0)


def random_theta(learner, p=1, dtype=torch.float32):
    """Parameters large enough for agents that do something."""
    size = sum(math.prod(shape) for shape in learner.shapes.values())
    return torch.randn(p, size, generator=DRAWS, dtype=dtype)


def random_inputs(p, e, a, b, dtype=torch.float32):
    """One observation, last action, reward and done."""
    obs = torch.randn(p, e, a, generator=DRAWS, dtype=dtype)
    action = torch.eye(b, dtype=dtype)[torch.randint(b, (p, e), generator=DRAWS)]
    reward = torch.randn(p, e, generator=DRAWS, dtype=dtype)
    return obs, action, reward, (torch.rand(p, e, generator=DRAWS) < 0.3).to(dtype)


def state_of(learner, p, e, a, b, dtype):
    return tuple(part.to(dtype) for part in learner.initial_state(p, e, a, b, "cpu"))


# ---- the learner -------------------------------------------------------------------------------------------------------
def slow_symla(params, state, obs, action, reward, done, n, m, ticks):
    """Eq. 4.7 to 4.9 for one agent, one LSTM after the other."""
    h, c, fwd_msg, bwd_msg = (part[0, 0].clone() for part in state)
    a, b = h.shape[:2]
    weight, bias = params["lstm.weight"][0], params["lstm.bias"][0]
    for _ in range(ticks):
        for i in range(a):
            for j in range(b):
                cell_inputs = [*bwd_msg[i], 1.5 * obs[i], *fwd_msg[j], action[j], reward, done, *h[i, j]]
                gates = torch.stack(cell_inputs) @ weight + bias
                enter, new, forget, out = gates[:n], gates[n : 2 * n], gates[2 * n : 3 * n], gates[3 * n :]
                c[i, j] = torch.sigmoid(forget) * c[i, j] + torch.sigmoid(enter) * torch.tanh(new)
                h[i, j] = torch.sigmoid(out) * torch.tanh(c[i, j])
    new_fwd = [sum(h[i, j] @ params["fwd.weight"][0] + params["fwd.bias"][0] for i in range(a)) / a for j in range(b)]
    new_bwd = [sum(h[i, j] @ params["bwd.weight"][0] + params["bwd.bias"][0] for j in range(b)) / b for i in range(a)]
    state = tuple(part[None, None] for part in (h, c, torch.stack(new_fwd), torch.stack(new_bwd)))
    return state, torch.stack([message[0] for message in new_fwd])


@pytest.mark.parametrize("a, b", [(1, 3), (4, 2)])
def test_symla_is_equations_4_7_to_4_9(a, b):
    learner = symla.SymLA(ARGS)
    params = learner.params(random_theta(learner, dtype=torch.float64))
    state = slow = state_of(learner, 1, 1, a, b, torch.float64)
    for _ in range(4):
        inputs = random_inputs(1, 1, a, b, torch.float64)
        state, logits = learner.act(params, state, *inputs)
        slow, slow_logits = slow_symla(params, slow, *(part[0, 0] for part in inputs), 5, 3, ARGS.micro_ticks)
        torch.testing.assert_close(logits[0, 0], slow_logits, rtol=0, atol=1e-12)
        for ours, theirs in zip(state, slow, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert logits.abs().max() > 0.1


def test_the_fused_cell_is_the_cell():
    p, e, a, b, n = 2, 3, 4, 2, 5
    parts = [(p, n, 4 * n), (p, e, a, 4 * n), (p, e, b, 4 * n), (p, e, a, b, n), (p, e, a, b, n)]
    parts = [torch.randn(shape, generator=DRAWS) for shape in parts]
    for ours, theirs in zip(cells.fused_lstm_cell(*parts, cells.rational_tanh), symla.lstm_cell(*parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4)


def test_a_meta_test_computes_the_cell_exactly(monkeypatch):
    """Also where meta-training takes a faster tanh: a checkpoint is a checkpoint, wherever it was trained."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    run = SimpleNamespace(compiles=True, device=torch.device("cpu"))
    parts = [(2, 5, 20), (2, 3, 4, 20), (2, 3, 2, 20), (2, 3, 4, 2, 5), (2, 3, 4, 2, 5)]
    parts = [torch.randn(shape, generator=DRAWS) for shape in parts]
    args = replace(ARGS, device="cpu", envs=("independent_bandit",))
    live, _ = symla.make_agent(args, "symla", "independent_bandit", 4, run, "test")
    for ours, theirs in zip(live.args[0].cell(*parts), symla.lstm_cell(*parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["symla", "rnn"])
def test_permuted_observations_and_actions_permute_symlas_policy_exactly(name):
    """Over a whole lifetime, step by step: section 4.4.4. The in-context RNN has no such symmetry."""
    learner = symla.LEARNERS[name](ARGS)
    params = learner.params(random_theta(learner, dtype=torch.float64))
    a, b = 4, 5
    of_obs, of_actions = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 4, 0, 2, 3])
    state = other = state_of(learner, 1, 3, a, b, torch.float64)
    furthest = moved = 0.0
    before = None
    for _ in range(50):
        obs, action, *rest = random_inputs(1, 3, a, b, torch.float64)
        state, logits = learner.act(params, state, obs, action, *rest)
        other, theirs = learner.act(params, other, obs[..., of_obs], action[..., of_actions], *rest)
        policy, permuted = logits.softmax(-1), theirs.softmax(-1)
        furthest = max(furthest, (policy[..., of_actions] - permuted).abs().max().item())
        moved = max(moved, 0 if before is None else (policy - before).abs().max().item())
        before = policy
    assert moved > 0.05  # a policy that changes
    assert furthest < 1e-12 if name == "symla" else furthest > 0.05


def test_symla_plays_any_size_with_the_same_parameters():
    learner = symla.SymLA(ARGS)
    params = learner.params(random_theta(learner))
    for a, b in [(1, 2), (7, 3), (2, 20)]:
        _, logits = learner.act(params, learner.initial_state(1, 2, a, b, "cpu"), *random_inputs(1, 2, a, b))
        assert logits.shape == (1, 2, b)
    # twice the observations, each shown twice: averaged messages cannot tell
    once, twice = random_inputs(1, 2, 3, 4), None
    twice = (once[0].repeat(1, 1, 2), *once[1:])
    ours, theirs = learner.initial_state(1, 2, 3, 4, "cpu"), learner.initial_state(1, 2, 6, 4, "cpu")
    for _ in range(3):
        ours, one = learner.act(params, ours, *once)
        theirs, two = learner.act(params, theirs, *twice)
    torch.testing.assert_close(one, two)


def test_members_of_a_population_are_separate():
    for name in symla.META_TRAINED:
        learner = symla.LEARNERS[name](ARGS)
        theta, inputs = random_theta(learner, 3), random_inputs(3, 4, 4, 2)
        state = learner.initial_state(3, 4, 4, 2, "cpu")
        _, together = learner.act(learner.params(theta), state, *inputs)
        for p in range(3):
            state = learner.initial_state(1, 4, 4, 2, "cpu")
            _, alone = learner.act(learner.params(theta[p : p + 1]), state, *(part[p : p + 1] for part in inputs))
            torch.testing.assert_close(together[p], alone[0])


def test_the_start_is_that_of_appendix_c_4():
    learner = symla.SymLA(replace(ARGS, hidden=16, message_size=8))
    params = learner.params(learner.init(torch.Generator().manual_seed(0))[None])
    weight, bias = params["lstm.weight"][0], params["lstm.bias"][0]
    assert weight.shape == (2 * 9 + 2 + 16, 64) and weight.abs().max() <= 2 / 6
    assert weight.std().item() == pytest.approx(0.88 / 6, rel=0.05)  # truncated at two standard deviations
    assert bias.view(4, 16).mean(1).tolist() == [0, 0, 1, 0]
    assert all(part.abs().sum() == 0 for part in learner.initial_state(1, 2, 3, 4, "cpu"))


@pytest.mark.parametrize("name", ["symla", "rnn"])
def test_normalized_rewards_have_no_scale_and_no_offset(name):
    """The policy is the same if all rewards are 7 times as large, plus 3; a learner without them tells the two apart."""
    learner = symla.LEARNERS[name](ARGS)
    params = learner.params(random_theta(learner, dtype=torch.float64))
    for agent, same in ((symla.NormalizedRewards(learner), True), (learner, False)):
        state = other = tree_map(lambda part: part.double(), agent.initial_state(1, 3, 4, 5, "cpu"))
        furthest = 0.0
        for t in range(30):
            obs, action, reward, done = random_inputs(1, 3, 4, 5, torch.float64)
            action = action * (t > 0)
            state, logits = agent.act(params, state, obs, action, reward, done)
            other, theirs = agent.act(params, other, obs, action, 7 * reward + 3, done)
            furthest = max(furthest, (logits.softmax(-1) - theirs.softmax(-1)).abs().max().item())
        assert furthest < 1e-4 if same else furthest > 0.02


def test_normalized_rewards_are_those_of_the_lifetime_so_far():
    seen = []

    class Spied(symla.UniformPolicy):
        def act(self, params, state, obs, action, reward, done):
            seen.append(reward)
            return super().act(params, state, obs, action, reward, done)

    agent = symla.NormalizedRewards(Spied(ARGS))
    state = agent.initial_state(1, 2, 1, 3, "cpu")
    rewards = torch.randn(9, 1, 2, generator=DRAWS)
    for t in range(9):
        action = torch.full((1, 2, 3), 1 / 3) * (t > 0)
        state, _ = agent.act({}, state, torch.zeros(1, 2, 1), action, rewards[t], torch.zeros(1, 2))
    assert (seen[0] == 0).all() and (seen[1] == 0).all()
    for t in range(2, 9):
        so_far = rewards[1 : t + 1]
        expected = (rewards[t] - so_far.mean(0)) / so_far.std(0, correction=0)
        torch.testing.assert_close(seen[t], expected, rtol=1e-4, atol=1e-4)


# ---- the inner loop ----------------------------------------------------------------------------------------------------
def keys_of(e, seed=0, part=symla.TEST, number=0, groups=(0,)):
    """The keys of e lifetimes for each of `groups`."""
    return symla.lifetime_keys(seed, part, number, torch.tensor(groups), e)


def lifetime_of(learner, env):
    """lifetime of a learner in an environment, eager."""
    return partial(symla.lifetime, learner, partial(symla.one_step, learner, env), env)


def live(name, env, args=ARGS, p=1, steps=30, key=(0,), theta=None, e=6):
    learner = symla.LEARNERS[name](args)
    theta = random_theta(learner, p) if theta is None else theta
    return lifetime_of(learner, envs.make(env, e))(theta, keys_of(e, *key).expand(len(theta), -1, -1), steps)


def test_lifetimes_of_a_meta_test_are_no_lifetimes_of_meta_training(monkeypatch):
    asked, keys = [], symla.lifetime_keys
    monkeypatch.setattr(symla, "lifetime_keys", lambda *inputs: asked.append(inputs[:3]) or keys(*inputs))
    run = SimpleNamespace(compiles=False, device=torch.device("cpu"))
    args = replace(ARGS, test_seeds=4, test_steps=3)
    symla.measured(args, "uniform", torch.zeros(0), "independent_bandit:2", 5, run)
    assert asked == [(args.seed, symla.TEST, 5)]


def test_the_regret_of_fixed_policies_in_closed_form():
    """Uniform on k independent arms: k/(k+1) - 1/2 a pull. Always the best: none."""
    for arms in (2, 10):
        outcome = live("uniform", f"independent_bandit:{arms}", steps=20, e=4000, theta=torch.zeros(1, 0))
        regret = (outcome.best - outcome.expected)[0].sum(-1)
        closed = 20 * (arms / (arms + 1) - 0.5)
        assert abs(regret.mean() - closed) < 5 * regret.std() / 4000**0.5
        paid = outcome.reward[0].mean(-1)
        assert abs(paid.mean() - 0.5) < 5 * paid.std() / 4000**0.5
    outcome = live("uniform", "hard_bandit", steps=5, theta=torch.zeros(1, 0))
    torch.testing.assert_close(outcome.best - outcome.expected, torch.full((1, 6, 5), 0.1))


def test_thompson_sampling_has_the_regret_that_others_report():
    """Two dependent arms, 100 pulls: 2.1 to 2.7 for uniform ones in Wang et al. (2016); far better than chance on many arms."""
    none = torch.zeros(1, 0)
    torch.manual_seed(0)
    two = live("thompson", "independent_bandit", steps=100, e=4000, theta=none)
    assert 2.2 < (two.best - two.expected)[0].sum(-1).mean() < 3.2
    ten = live("thompson", "independent_bandit:10", steps=100, e=1000, theta=none)
    assert (ten.best - ten.expected)[0].sum(-1).mean() < 0.4 * 100 * (10 / 11 - 0.5)


def test_actions_are_drawn_from_the_policy_and_fed_back_with_their_rewards():
    inputs = []

    class Fixed(symla.UniformPolicy):
        def act(self, params, state, obs, action, reward, done):
            inputs.append((obs, action, reward, done))
            return state, torch.tensor([0.5, 0.3, 0.2]).log().expand_as(action)

    learner, env = Fixed(ARGS), envs.make("independent_bandit:3", 5000)
    outcome = lifetime_of(learner, env)(torch.zeros(1, 0), keys_of(5000), 4)
    assert torch.equal(inputs[0][1], torch.zeros(1, 5000, 3)) and (inputs[0][2] == 0).all()
    assert inputs[0][0].shape == (1, 5000, 1) and (inputs[0][0] == 1).all()  # nothing to observe but a constant
    for t in range(1, 4):
        torch.testing.assert_close(inputs[t][1].mean((0, 1)), torch.tensor([0.5, 0.3, 0.2]), atol=0.03, rtol=0)
        assert torch.equal(inputs[t][2], outcome.reward[..., t - 1])


def test_a_state_survives_the_ends_of_episodes_and_not_of_lifetimes():
    states, dones = [], []

    class Spied(symla.SymLA):
        def act(self, params, state, obs, action, reward, done):
            states.append(state[0])
            dones.append(done)
            return super().act(params, state, obs, action, reward, done)

    env, spied = envs.make("grid_world:2", 6), Spied(ARGS)
    theta = random_theta(spied)
    for _ in range(2):
        lifetime_of(spied, env)(theta, keys_of(6), 40)
    assert torch.stack(dones[1:40]).sum() > 6
    for lifetime in (0, 40):
        assert states[lifetime].abs().sum() == 0
    assert all((state.abs().sum((-1, -2, -3)) > 0).all() for state in states[1:40])
    assert all(torch.equal(one, other) for one, other in zip(states[:40], states[40:], strict=True))


def test_a_reward_comes_with_the_observation_of_what_paid_it():
    """Whoever is paid observes itself on the heart or the trap."""
    paid, seen = 0, 0

    class Spied(symla.UniformPolicy):
        def act(self, params, state, obs, action, reward, done):
            nonlocal paid, seen
            agent, heart, trap = obs.unflatten(-1, (3, 9)).unbind(-2)
            objects = torch.where(reward[..., None] > 0, heart, trap)
            paid += (reward != 0).sum()
            seen += ((agent * objects).sum(-1) == 1)[reward != 0].sum()
            assert torch.equal(done[reward != 0], torch.ones(int((reward != 0).sum())))
            return super().act(params, state, obs, action, reward, done)

    learner, env = Spied(ARGS), symla.make_env(ARGS, "grid_world:3", 50)
    lifetime_of(learner, env)(torch.zeros(1, 0), keys_of(50), 60)
    assert paid > 100 and seen == paid


@pytest.mark.parametrize("common", [False, True])
def test_pairs_have_lifetimes_of_their_own_and_their_members_share_them(common):
    """Members that are all alike: the two of a pair are paid the same, and all are only with --common-lifetimes."""
    args = replace(ARGS, common_lifetimes=common, noise_std=1e-9)
    learner, env = symla.SymLA(args), symla.make_env(args, "grid_world:3", 6)
    outcomes = []
    live = lifetime_of(learner, env)
    symla.es_gradient(args, lambda *inputs: outcomes.append(live(*inputs)) or outcomes[-1], env, random_theta(learner)[0], 0)
    plus, minus = outcomes[0].reward.view(2, 4, 6, -1)
    assert torch.equal(plus, minus) and (plus != 0).any()
    assert all(torch.equal(plus[0], other) == common for other in plus[1:])


# ---- the outer loop ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fitness", ["reward", "expected"])
def test_fitness_is_what_a_member_earns_and_chunks_do_not_matter(fitness):
    args = replace(ARGS, fitness=fitness)
    learner, env = symla.SymLA(args), envs.make("independent_bandit:3", 6)
    theta = learner.init(torch.Generator().manual_seed(0))
    grad, loss, paid = symla.es_gradient(replace(args, chunk=4), lifetime_of(learner, env), env, theta, 3)
    for chunk in (1, 2, 3):
        again = symla.es_gradient(replace(args, chunk=chunk), lifetime_of(learner, env), env, theta, 3)
        for one, other in zip((grad, loss, paid), again, strict=True):
            torch.testing.assert_close(one, other)
    noise, slow = symla.es.directions(4, len(theta), args.seed, 3), torch.zeros_like(theta)
    for pair, direction in enumerate(noise):
        keys = keys_of(6, args.seed, symla.TRAIN, 3, [pair])
        for sign in (1, -1):
            outcome = lifetime_of(learner, env)((theta + sign * 0.1 * direction)[None], keys, args.lifetime_steps)
            worth = (outcome.reward if fitness == "reward" else outcome.expected).mean()
            slow += -sign * worth * direction / (2 * 0.1 * 4)
    torch.testing.assert_close(grad, slow, atol=1e-5, rtol=1e-4)


def test_a_compiled_step_is_the_eager_one():
    """With the environment and its ends inside."""
    if not symla.can_compile():
        pytest.skip("no C++ compiler")
    args = replace(ARGS, device="cpu", envs=("grid_world:2",), lifetime_steps=20, population=4)
    theta = symla.SymLA(args).init(torch.Generator().manual_seed(0))
    gradients = []
    for compiles in (False, True):
        run = SimpleNamespace(compiles=compiles, device=torch.device("cpu"))
        agent = symla.make_agent(args, "symla", "grid_world:2", args.evaluations, run, "train")
        with torch.no_grad():
            gradients.append(symla.es_gradient(args, *agent, theta, 0))
    torch.compiler.reset()
    for eager, compiled in zip(*gradients, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


def test_each_lifetime_has_random_numbers_of_its_own():
    """Whichever others are beside it; uniform ones, which no other seed, part, number, group or step repeats."""
    both = keys_of(400, groups=[3, 5])
    assert torch.equal(both[1:], keys_of(400, groups=[5])) and torch.equal(both[:, :7], keys_of(7, groups=[3, 5]))
    others = [dict(seed=1), dict(part=symla.TRAIN), dict(number=1), dict(groups=[1])]
    drawn = [symla.uniform_draws(keys_of(400, **other), 5)[1] for other in ({}, *others)]
    keys = keys_of(400)
    for _ in range(20):
        keys, draws = symla.uniform_draws(keys, 5)
        drawn.append(draws)
    drawn = torch.stack(drawn[:5] + drawn[6:])  # the sixth is the first step of the first ones again
    assert len(drawn.unique()) > 0.99 * drawn.numel()
    assert abs(drawn.mean() - 0.5) < 5 / (12 * drawn.numel()) ** 0.5
    flat = drawn.view(24, -1) - 0.5
    assert (flat[5:-1] * flat[6:]).mean().abs() < 5 / 12 / flat[6:].numel() ** 0.5  # of one step and the next


class Bar:
    """As much of a Run as meta_train needs."""

    def __init__(self, steps):
        self.lines, self.total = [], steps

    def steps(self, total, keep):
        return range(total)

    def log(self, step, values):
        self.lines.append({name: float(value) for name, value in values.items()})


def test_it_learns_to_learn_bandits_and_plays_other_numbers_of_arms():
    """Meta-trained on 5 arms for a minute at most; far below a random player's regret on 3, 5 and 8 arms that it never met."""
    args = symla.settled(symla.Args(**symla.LAPTOP | {"envs": ("independent_bandit:5",), "preset": "laptop"}))
    args = replace(args, meta_steps=70, evaluations=16, lifetime_steps=50, population=32, hidden=8)
    learner, env = symla.SymLA(args), envs.make("independent_bandit:5", 16)
    thetas = {"symla": learner.init(torch.Generator().manual_seed(0))}
    untrained = thetas["symla"].clone()
    with torch.no_grad():
        players = {"symla": [(lifetime_of(learner, env), env)]}
        symla.meta_train(args, players, thetas, Bar(args.meta_steps))
        for arms in (3, 5, 8):
            setting = dict(args=args, steps=50, e=1000, key=(9,))
            ours = live("symla", f"independent_bandit:{arms}", theta=thetas["symla"][None], **setting)
            before = live("symla", f"independent_bandit:{arms}", theta=untrained[None], **setting)
            chance = 50 * (arms / (arms + 1) - 0.5)
            regret = (ours.best - ours.expected)[0].sum(-1).mean()
            assert regret < 0.75 * chance, (arms, regret, chance)
            assert (before.best - before.expected)[0].sum(-1).mean() > 0.9 * chance


def test_the_in_context_rnn_has_a_sigma_and_a_rate_of_its_own(monkeypatch):
    """Adam's first step has the length of the rate; sigma falls by the same factor for both."""
    args = replace(ARGS, meta_steps=1, noise_std=0.1, noise_end=0.05, lr=0.05, rnn_noise_std=0.4, rnn_lr=0.003)
    sigmas, gradient = [], symla.es.gradient

    def spied(*inputs, sigma, **more):
        sigmas.append(sigma)
        return gradient(*inputs, sigma=sigma, **more)

    monkeypatch.setattr(symla.es, "gradient", spied)
    env = symla.make_env(args, "independent_bandit:3", args.evaluations)
    learners = {name: symla.LEARNERS[name](args) for name in symla.META_TRAINED}
    thetas = {name: learner.init(torch.Generator().manual_seed(0)) for name, learner in learners.items()}
    first = {name: theta.clone() for name, theta in thetas.items()}
    agents = {name: [(lifetime_of(learner, env), env)] for name, learner in learners.items()}
    with torch.no_grad():
        symla.meta_train(args, agents, thetas, Bar(1))
        for name, lr in (("symla", 0.05), ("rnn", 0.003)):
            assert (thetas[name] - first[name]).abs().max().item() == pytest.approx(lr, rel=1e-3)
        symla.es_gradient(symla.own_settings(args, "rnn"), *agents["rnn"][0], first["rnn"], args.meta_steps)
    assert sigmas == pytest.approx([0.1, 0.4, 0.2])


# ---- the thesis' preset ------------------------------------------------------------------------------------------------
BANDITS = dict(  # appendix C.2, but where a comment says so
    hidden=64, lifetime_steps=100, meta_steps=4_000, evaluations=100, noise_std=0.2, lr=0.2,
    test_seeds=4_096,  # the thesis: 100
)  # fmt: skip
OTHERS = dict(hidden=16, lifetime_steps=500, meta_steps=20_000, evaluations=10, noise_std=0.035, lr=0.01, test_seeds=100)
THESIS = dict(
    message_size=8, micro_ticks=2, population=1024,  # 512 pairs
    common_lifetimes=False, rank_shaping=False, fitness="reward", noise_end=None, lr_decay=False, init=None,
    obs_gain=1.0, action_repeat=1, sutton_barto_reward=False, normalize_rewards=False, test_steps=None,
    rnn_size=64, rnn_noise_std=None, rnn_lr=None,
)  # fmt: skip
TESTED = {  # row and environment of meta-training -> environments of the meta-test
    **{("S1", env): symla.FIVE for env in symla.FIVE},
    **{("S2", f"independent_bandit:{arms}"): [f"independent_bandit:{n}" for n in (2, 8, 10, 12)] for arms in (2, 8, 10, 12)},
    **{("S3", env): [env, f"shuffled_{env}"] for env in ("cartpole", "acrobot", "mountain_car")},
    ("S4", "grid_world"): ["grid_world", "swapped_grid_world"],
    ("S5", "projected_dense_grid_world"): ["projected_dense_grid_world", "projected_balance_cartpole"],
}

OURS = {  # a single goal would count for nothing; cart-pole does not end, and has episodes of 500 steps
    ("S3", "mountain_car"): {"sutton_barto_reward": True}, ("S5", "projected_dense_grid_world"): {"test_steps": 2000},
}  # fmt: skip


def settled_args(row, preset):
    """Args of the commands of a row, by their labels."""
    args = {}
    for label, command in reproduce.ROWS[row].commands(preset).items():
        default = symla.Args(**symla.PRESETS[preset] | {"preset": preset})
        args[label] = symla.settled(tyro.cli(symla.Args, args=command.split()[1:], default=default))
    return args


@pytest.mark.parametrize("row", ["S1", "S2", "S3", "S4", "S5"])
def test_rows_at_the_thesis_preset_have_the_thesis_numbers(row):
    runs = settled_args(row, "thesis").values()
    assert [args.envs for args in runs] == [(env,) for name, env in TESTED if name == row]
    for args in runs:
        expected = THESIS | (BANDITS if row in ("S1", "S2") else OTHERS) | OURS.get((row, *args.envs), {})
        assert {name: getattr(args, name) for name in expected} == expected
        assert sorted(args.test_envs) == sorted(TESTED[row, args.envs[0]])
        assert "uniform" in args.baselines and ("rnn" in args.baselines or row == "S2")


@pytest.mark.parametrize("row", ["S3", "S4"])
def test_learners_fit_the_parameters_that_they_start_from(row):
    """The in-context RNN's sizes are fixed. SymLA's are not."""
    runs = list(settled_args(row, "laptop").values())
    for args in (args for args in runs if args.init):
        first = runs[int(re.search(rf"{row}\.(\d)", args.init).group(1))]
        assert args.hidden == first.hidden and args.obs_gain == first.obs_gain
        if "rnn" in args.baselines and "rnn" in first.baselines:
            assert (args.rnn_inputs, args.rnn_outputs) == (first.rnn_inputs, first.rnn_outputs)


# ---- the command line --------------------------------------------------------------------------------------------------
TINY = "--preset laptop --envs independent_bandit:3 --test-envs independent_bandit:3 independent_bandit:2 --meta-steps 6"
TINY += " --population 4 --evaluations 2 --lifetime-steps 10 --hidden 4 --rnn-size 4 --test-seeds 20 --checkpoint-every 2"
TINY += " --no-compile"


def command(run_dir, flags, launcher=None, tiny=TINY):
    return run_script("symla.py", run_dir, f"{tiny} {flags}", launcher)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run as a user types it."""
    folder = tmp_path_factory.mktemp("runs")
    done = command(folder, "--run-name done", launcher=PROCESS)
    assert done.returncode == 0, done.stderr
    return folder / "done", done.stdout


def test_what_a_run_leaves_behind(finished):
    folder, output = finished
    names = {path.name for path in folder.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "results.json", "cumulative_regret.png"} <= names
    results = json.loads((folder / "results.json").read_text())
    assert results["script"] == "symla" and results["preset"] == "laptop" and results["args"]["rnn_outputs"] == 3
    actual = {(row["learner"], row["task"], row["novelty"]) for row in results["results"]}
    learners = ("symla", "rnn", "thompson", "uniform")
    tasks = (("independent_bandit:3", "none"), ("independent_bandit:2", "task"))
    assert actual == {(learner, *task) for learner in learners for task in tasks}
    for row in results["results"]:
        assert row["metric"] == "cumulative_regret" and row["seeds"] == 20 and 0 <= row["mean"] <= row["step"]
    assert {row["step"] for row in results["results"]} == set(range(1, 11))
    assert "cumulative_regret" in output and "1 -> 10" in output


def test_the_seed_decides(finished, tmp_path):
    assert command(tmp_path, "--run-name again").returncode == 0
    assert rows(tmp_path / "again") == rows(finished[0])
    assert command(tmp_path, "--run-name other --seed 1").returncode == 0
    assert rows(tmp_path / "other") != rows(finished[0])


@pytest.mark.parametrize("file, nth", [("checkpoint.pt", 2), ("meta_test.pt", 1), ("meta_test.pt", 6)])
def test_kill_and_resume_end_in_the_same_numbers(file, nth, finished, tmp_path):
    cut = command(tmp_path, "--run-name cut", launcher=killed(file, nth))
    assert cut.returncode == -signal.SIGKILL
    assert (tmp_path / "cut" / file).exists() and not (tmp_path / "cut" / "results.json").exists()
    resumed = command(tmp_path, f"--resume {tmp_path / 'cut'}", tiny="")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "cut") == rows(finished[0])
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True)["state"] for folder in (tmp_path / "cut", finished[0])]
    for name in symla.META_TRAINED:
        assert torch.equal(*(state[f"['thetas']['{name}']"] for state in saved))


def test_a_checkpoint_tested_again_gives_the_same_numbers_and_plays_elsewhere(finished, tmp_path):
    flags = f"--mode test --checkpoint {finished[0] / 'checkpoint.pt'}"
    assert command(tmp_path, f"{flags} --run-name test", tiny="").returncode == 0
    assert rows(tmp_path / "test") == rows(finished[0])
    done = command(tmp_path, f"{flags} --run-name far --test-envs grid_world:2 independent_bandit:5", tiny="")
    assert done.returncode == 0, done.stderr
    actual = {(row["learner"], row["task"], row["novelty"], row["metric"]) for row in rows(tmp_path / "far")}
    assert ("symla", "grid_world:2", "domain", "return") in actual
    assert ("symla", "independent_bandit:5", "task", "cumulative_regret") in actual
    assert not any(learner == "rnn" for learner, *_ in actual) and "too large for the in-context RNN" in done.stdout


def test_a_run_starts_from_the_parameters_of_another(finished, tmp_path):
    """Of those learners that it has, in other environments."""
    first = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    del first["state"]["['thetas']['rnn']"]
    checkpoints.write(tmp_path / "alone.pt", first)
    tiny = TINY.replace("independent_bandit:3", "contextual_bandit:2").replace("independent_bandit:2", "grid_world:2")
    flags = f"--init {tmp_path / 'alone.pt'} --meta-steps 1 --lr 1e-9 --run-name next"
    done = command(tmp_path, flags, tiny=tiny)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "next" / "checkpoint.pt", weights_only=True)["state"]
    name = "['thetas']['symla']"
    torch.testing.assert_close(state[name], first["state"][name], rtol=0, atol=1e-6)
    assert "['thetas']['rnn']" in state


def test_two_processes_equal_one(finished, tmp_path):
    done = command(tmp_path, "--run-name two", launcher=TWO)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows(tmp_path / "two"), rows(finished[0]), strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"], abs=1e-4)


def test_control_shuffled_and_projected_environments_and_their_comparison(tmp_path):
    shared = "--meta-steps 2 --test-steps 30 --test-seeds 5 --baselines rnn uniform"
    for number, name in enumerate(("upright_cartpole", "grid_world:3", "projected_dense_grid_world:3", "acrobot")):
        flags = TINY.replace(
            "--envs independent_bandit:3 --test-envs independent_bandit:3 independent_bandit:2", f"--envs {name}"
        )
        done = run_script("symla.py", tmp_path, f"{flags} {shared} --run-name {number}")
        assert done.returncode == 0, done.stderr
    tasks = [{row["task"]: row["novelty"] for row in rows(tmp_path / str(number))} for number in range(4)]
    assert tasks[0] == {"upright_cartpole": "none", "shuffled_upright_cartpole": "task"}
    assert tasks[1] == {"grid_world:3": "none", "swapped_grid_world:3": "task"}
    assert tasks[2] == {"projected_dense_grid_world:3": "none", "projected_balance_cartpole": "domain"}
    actual = rows(tmp_path / "0")
    last = {row["metric"]: row for row in actual if row["task"] == "upright_cartpole" and row["learner"] == "uniform"}
    per_step = [row["mean"] for row in actual if row["metric"] == "reward_per_step" and row["learner"] == "uniform"]
    assert last["return"]["step"] == 30 and 0 < last["return"]["mean"] < 30 and all(0 < value <= 1 for value in per_step)


def test_an_agent_from_python(finished):
    """It acts as one_step does; its environments side by side are independent; reset forgets."""
    path = finished[0] / "checkpoint.pt"
    both, one = (symla.SymLA.load(path, num_actions=3, seed=seed) for seed in (0, 0))
    obs = torch.randn(6, 2, 4, generator=DRAWS)
    actions = torch.stack([both.act(obs[t], [0.5, -0.5], [False, t == 3]) for t in range(6)])
    assert actions.shape == (6, 2) and actions.max() < 3
    assert isinstance(one.act(obs[0, 0].numpy()), int)

    state = both.learner.initial_state(1, 2, 4, 3, "cpu")
    last = torch.zeros(1, 2, 3)
    for t in range(6):
        inputs = obs[t][None], last, torch.tensor([[0.5, -0.5]]), torch.tensor([[0.0, float(t == 3)]])
        state, _ = both.learner.act(both.params, state, *inputs)
        last = torch.eye(3)[actions[t]][None]
    for ours, theirs in zip(both.state, state, strict=True):
        torch.testing.assert_close(ours, theirs)
    both.reset()
    assert both.state is None and both.act(obs[0, :, :2]).shape == (2,)

    agent = symla.SymLA.load(path, num_actions=2)
    agent.act([0.0, 1.0])
    for wrong in (torch.zeros(3), torch.zeros(1, 2), [math.nan, 0.0], torch.zeros(1, 1, 2)):
        with pytest.raises(ValueError, match="Observations have to be"):
            agent.act(wrong)
    for wrong in ((math.inf, False), ([1.0, 2.0], False), (0.0, [True, False])):
        with pytest.raises(ValueError, match="Reward and done"):
            agent.act([0.0, 1.0], *wrong)
    with pytest.raises(ValueError, match="at least two actions"):
        symla.SymLA.load(path, num_actions=1)
    with pytest.raises(checkpoints.CheckpointError, match="There is no checkpoint"):
        symla.SymLA.load(path.parent / "none.pt", num_actions=2)


def test_the_shipped_agent_learns_ten_armed_bandits():
    """Random actions have a regret of 41 after 100 steps, Thompson sampling of 13.8."""
    env, agent = envs.make("independent_bandit:10", 256), symla.SymLA.load("pretrained", num_actions=10)
    world, _ = env.reset(torch.rand(256, env.lifetime_draws, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    arms = env.expected_rewards(world)
    reward, regret = torch.zeros(256), torch.zeros(256)
    for _ in range(100):
        action = agent.act(torch.ones(256, 1), reward)  # bandits have no observation; a constant stands for it
        world, step = env.step(world, action, torch.rand(256, env.num_draws, generator=generator))
        reward = step.reward
        regret += arms.amax(-1) - arms.gather(1, action[:, None])[:, 0]
    assert regret.mean() < 12


def test_an_agent_plays_gymnasiums_cartpole():
    """As its docstring says: it acts on the last observation of an episode, too."""
    import gymnasium

    env, agent = gymnasium.make("CartPole-v1"), symla.SymLA.load("pretrained", num_actions=2)
    obs, _ = env.reset(seed=0)
    action, ends = agent.act(obs), 0
    for _ in range(200):
        obs, reward, terminated, truncated, _ = env.step(action)
        action = agent.act(obs, reward, terminated or truncated)
        if terminated or truncated:
            obs, _ = env.reset()
            action, ends = agent.act(obs), ends + 1
        assert action in (0, 1)
    assert 1 <= ends <= 25


def test_an_agent_plays_gymnasiums_vector_environments():
    """Which begin an episode with the step after, as meta-training does."""
    import gymnasium

    env, agent = gymnasium.make_vec("CartPole-v1", 3), symla.SymLA.load("pretrained", num_actions=2)
    obs, _ = env.reset(seed=0)
    reward, done = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    for _ in range(60):
        obs, reward, terminated, truncated, _ = env.step(agent.act(obs, reward, done).numpy())
        assert (reward[done] == 0).all()
        done = terminated | truncated
    assert agent.state[0].shape[:4] == (1, 3, 4, 2)


def test_environments_of_gymnasium(tmp_path):
    """CartPole-v1 pays 1 for each of the 10 steps of a lifetime."""
    tiny = TINY.replace("independent_bandit:3", "CartPole-v1").replace("independent_bandit:2", "shuffled_CartPole-v1")
    done = command(tmp_path, "--run-name gym", tiny=tiny)
    assert done.returncode == 0, done.stderr
    returns = {(row["task"], row["mean"]) for row in rows(tmp_path / "gym") if (row["metric"], row["step"]) == ("return", 10)}
    assert returns == {("CartPole-v1", 10.0), ("shuffled_CartPole-v1", 10.0)}


REFUSED = {
    "--graphs --device cpu": "--graphs needs a GPU",
    "--triton --device cpu": "--triton needs a GPU",
    "--envs pendulum": "those of pendulum are continuous",
    "--envs cartpol": "There is no environment cartpol",
    "--envs": "--envs needs at least one environment",
    "--envs independent_bandit cartpole": "--envs mixes bandits and others",
    "--envs independent_bandit:1": "has to be a number from 2 to",
    "--envs contextual_bandit:1000000000": "has to be a number from",
    "--envs shuffled_shuffled_cartpole": "twice",
    "--test-envs grid_world:400": "480000 observations",
    "--test-envs shuffled_independent_bandit": "nothing to be shuffled",
    "--learner thompson --baselines --test-envs grid_world:2": "thompson does not fit grid_world:2",
    "--population 5": "--population has to be even",
    "--hidden 0": "--hidden has to be from 1 to",
    "--lr nan": "--lr has to be from",
    "--rnn-outputs 2": "--rnn-outputs 2 are too small for independent_bandit:3",
    "--init {done}/checkpoint.pt --hidden 7": "checkpoint.pt has no 'thetas symla' of the kind and size .* use the flags of the run",
    "--init {tmp}/alone.pt --learner rnn --baselines": "parameters of none of the learners",
    "--mode test --checkpoint {done}/checkpoint.pt --hidden 7": "checkpoint.pt has no 'thetas symla' of the kind and size",
    "--mode test --checkpoint {done}/checkpoint.pt --envs hard_bandit": "keeps its flags; leave out --envs",
    "--mode test --checkpoint {done}/checkpoint.pt --obs-gain 2": "keeps its flags; leave out --obs-gain",
    "--action-repeat 2": "--action-repeat would repeat the random numbers of independent_bandit",
    "--mode test --checkpoint {tmp}/alone.pt": "alone.pt has no 'thetas rnn' .* it has thetas symla",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_mistake_gets_one_sentence_and_nothing_is_written(flags, finished, complain, tmp_path):
    checkpoint = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    name = "['thetas']['symla']"
    checkpoints.write(tmp_path / "alone.pt", checkpoint | {"state": {name: checkpoint["state"][name]}})
    tiny = "" if "--mode test --checkpoint" in flags else TINY
    message = complain("symla", f"{tiny} {flags}".format(tmp=tmp_path, done=finished[0]))
    assert re.search(REFUSED[flags], message), message
    assert {path.name for path in tmp_path.iterdir()} == {"alone.pt"}


# ---- what a release has to reach: python -m pytest -m slow -------------------------------------------------------------
@pytest.mark.slow
def test_the_laptop_preset_reaches_its_floors(tmp_path):
    """`python symla.py`: at most 1.3 times Thompson sampling's regret on the trained numbers of arms, and at least 60 % below a
    random player's on 4 and 20, which it never met."""
    start = time.time()
    line = [sys.executable, str(ROOT / "symla.py"), "--run-dir", str(tmp_path), "--run-name", "laptop", "--preset", "laptop"]
    subprocess.run(line, check=True, cwd=tmp_path)
    assert time.time() - start < 300
    regret = {(row["learner"], row["task"]): row["mean"] for row in rows(tmp_path / "laptop") if row["step"] == 100}
    for arms in (8, 10, 12):
        assert regret["symla", f"independent_bandit:{arms}"] <= 1.3 * regret["thompson", f"independent_bandit:{arms}"]
    for arms in (4, 20):
        assert regret["symla", f"independent_bandit:{arms}"] <= 0.4 * regret["uniform", f"independent_bandit:{arms}"]
