"""common/policy_gradients.py: REINFORCE and PPO for many agents, and RL^2."""

import math

import pytest
import torch

from common import envs, policy_gradients
from common.agents import Batch
from common.networks import Network, init_adam
from common.policy_gradients import RL2, discounted, surrogate, update_agents

DRAWS = torch.Generator().manual_seed(0)
SETTINGS = dict(policy_lr=1e-2, target_kl=0.5, value_epochs=3, value_lr=1e-2, gamma=0.9, gae_lambda=0.8)


def test_discounted_sums():
    x, keep = torch.randn(2, 4, generator=DRAWS), torch.rand(2, 4, generator=DRAWS)
    sums = [sum(x[:, k] * keep[:, t:k].prod(-1) for k in range(t, 4)) for t in range(4)]
    torch.testing.assert_close(discounted(x, keep), torch.stack(sums, -1))


def test_the_surrogate_is_bounded_where_it_would_pay_to_move_on():
    ratio = torch.tensor([0.5, 1.0, 1.5])
    assert surrogate(ratio, torch.ones(3), 0.2).tolist() == pytest.approx([0.5, 1.0, 1.2])
    assert surrogate(ratio, -torch.ones(3), 0.2).tolist() == pytest.approx([-0.8, -1.0, -1.5])
    assert torch.equal(surrogate(ratio, torch.ones(3), math.inf), ratio)


# ---- many agents -------------------------------------------------------------------------------------------------------
def some_agents(p=3, e=2, t=6, a=4, b=2):
    """Networks, the state of agents, a rollout (p, e, t, ...) and where its episodes ended."""
    policy, value = (Network((a, 8, size), torch.tanh, normalized=False) for size in (b, 1))
    params = {"phi": policy.init(p, DRAWS), "psi": value.init(p, DRAWS), "log_std": torch.randn(p, b, generator=DRAWS) / 3}

    def draw(*shape):
        return torch.randn(p, e, t, *shape, generator=DRAWS)

    terminated = (draw() > 1).float()
    ended = torch.maximum(terminated, (draw() > 1).float())
    rollout = Batch(draw(a), draw(b), draw(), terminated, draw(), draw(a), torch.ones(p, e, t))
    return policy, value, params | init_adam(params), rollout, ended


def test_a_step_of_reinforce_follows_equation_2_3():
    """The first step of Adam moves every parameter by the rate, against its gradient. A time limit bootstraps, and nothing
    that comes after the end of an episode matters."""
    policy, value, state, rollout, ended = some_agents()
    before = {name: x.clone() for name, x in state.items()}
    phi, log_std = (before[name].clone().requires_grad_() for name in ("phi", "log_std"))
    now, after = (value(state["psi"], obs)[..., 0] for obs in (rollout.obs, rollout.next_obs))
    delta = rollout.reward + 0.9 * (1 - rollout.terminated) * after - now
    advantage = torch.zeros_like(delta)
    for t in range(6):
        weight = 1.0
        for k in range(t, 6):
            advantage[:, :, t] += weight * delta[:, :, k]
            weight = weight * 0.9 * 0.8 * (1 - ended[:, :, k])
    flat = advantage.flatten(1)
    scaled = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)).view_as(advantage)
    normal = torch.distributions.Normal(policy(phi, rollout.obs), log_std.exp()[:, None, None])
    loss = -(normal.log_prob(rollout.action).sum(-1) * scaled).mean((1, 2)).sum()
    grads = torch.autograd.grad(loss, (phi, log_std))
    with torch.no_grad():
        update_agents(state, policy, value, rollout, ended, clip_coef=math.inf, policy_epochs=1, **SETTINGS)
    for name, g in zip(("phi", "log_std"), grads, strict=True):
        large = g.abs() > 1e-4
        torch.testing.assert_close(state[name][large], (before[name] - 1e-2 * g.sign())[large], rtol=0, atol=1e-4)
    error = [((value(psi, rollout.obs)[..., 0] - now - advantage) ** 2).mean() for psi in (before["psi"], state["psi"])]
    assert error[1] < error[0] and state["psi_steps"].tolist() == [[3]] * 3


def test_a_batch_of_agents_is_agents_one_by_one():
    policy, value, state, rollout, ended = some_agents()
    alone = [{name: x[i : i + 1].clone() for name, x in state.items()} for i in range(3)]
    with torch.no_grad():
        update_agents(state, policy, value, rollout, ended, clip_coef=0.2, policy_epochs=5, **SETTINGS)
        for i, ours in enumerate(alone):
            part = Batch(*(x[i : i + 1] for x in rollout))
            update_agents(ours, policy, value, part, ended[i : i + 1], clip_coef=0.2, policy_epochs=5, **SETTINGS)
            for name, x in ours.items():
                torch.testing.assert_close(x[0], state[name][i], rtol=1e-3, atol=1e-4)


def test_an_agents_policy_stays_where_it_has_moved_far_enough():
    policy, value, state, rollout, ended = some_agents()
    settings = SETTINGS | {"target_kl": 1e-6}
    with torch.no_grad():
        update_agents(state, policy, value, rollout, ended, clip_coef=0.2, policy_epochs=50, **settings)
    assert (state["phi_steps"] < 50).all() and (state["phi_steps"] >= 1).all()
    assert torch.equal(state["phi_steps"], state["log_std_steps"])


# ---- RL^2 --------------------------------------------------------------------------------------------------------------
def test_rl2_observes_what_happened_and_its_trials_are_two_episodes():
    torch.manual_seed(0)
    net, env = RL2(5, 2, 4), envs.make("continuous_cartpole", 3, scaled=True)
    with torch.no_grad():
        inputs, action, reward, mask = net.trial(env, DRAWS)
        hidden, _ = net.lstm(inputs)
    t, ended = len(inputs), inputs[:, :, 8]
    assert inputs.shape == (t, 3, 9) and (inputs[:, :, [4, 6]] == 0).all()  # padding
    assert t - 20 < mask.sum(0).max() <= t and t < 500  # it stops soon after the last second episode
    torch.testing.assert_close(inputs[1:, :, 5], action[:-1, :, 0])
    assert (inputs[0, :, 5:] == 0).all() and (inputs[1:, :, 7] == 1).all()
    for copy in range(3):
        ends = ended[:, copy].nonzero()[:, 0].tolist()  # one step later
        assert mask[:, copy].tolist() == [float(step < ends[1]) for step in range(t)]
        assert reward[:, copy].sum() == ends[1]
    far = torch.distributions.Normal(net.action(hidden)[..., :1], net.log_std[:1].exp()).log_prob(action)[..., 0]
    ours = net.log_policy(hidden, action)
    torch.testing.assert_close(ours - ours[0], far - far[0])


class Recorded(RL2):
    """RL2 that notes its trials."""

    def trial(self, *inputs, **options):
        self.trials.append(super().trial(*inputs, **options))
        return self.trials[-1]


def trained(rank, world, trial_steps, kind=Recorded, epochs=1, num_minibatches=1):
    """An agent with the trials that it was trained on, and what was logged."""
    torch.manual_seed(0)
    net, logged = kind(4, 1, 4), []
    net.trials = []
    settings = dict(epochs=epochs, num_minibatches=num_minibatches, lr=1e-3, gamma=0.99, gae_lambda=0.97)
    settings |= dict(clip_coef=0.2, max_grad_norm=1.0, seed=0)
    settings |= {"trial_steps": trial_steps, "rank": rank, "world": world}
    env = envs.make("continuous_cartpole", 2 // world, scaled=True)
    env.max_steps = 150  # as many as an update has of at least; a fresh policy's episodes have about 30
    all_envs = [("cartpole", env)]
    with torch.no_grad():
        policy_gradients.meta_train(
            net, all_envs, lambda n, keep: range(n), lambda step, values: logged.append(values), **settings
        )
    return net, logged


def test_rl2_is_trained_on_as_many_steps_as_are_counted():
    """A fresh policy's episodes are 30 of 150 possible steps long, and what comes after a trial is not experience."""
    net, logged = trained(0, 1, 1800)
    steps = sum(float(mask.sum()) for *_, mask in net.trials)
    assert 1800 <= steps < 1800 + 2 * max(float(mask.sum()) for *_, mask in net.trials) and len(net.trials) > 10
    assert len(logged) == 3 and all(values["cartpole_return"] > 0 for values in logged)


def test_processes_of_rl2_make_trials_of_their_own():
    """Those of two processes are the trials of one."""
    whole, *parts = (trained(rank, world, 600)[0].trials[0] for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert not torch.equal(parts[0][0], parts[1][0])
    for part, x in zip(parts, whole[0].unbind(1), strict=True):
        steps = min(len(part[0]), len(x))
        torch.testing.assert_close(part[0][:steps, 0], x[:steps])


def test_rl2_learns_from_its_trials():
    """Ten steps of PPO on the same trials lower its loss on them."""
    torch.manual_seed(0)
    net, env = RL2(4, 1, 8), envs.make("continuous_cartpole", 4, scaled=True)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    with torch.no_grad():
        trials = policy_gradients.experience(net, *net.trial(env, DRAWS), gamma=0.99, gae_lambda=0.97)
    inside = trials.advantage[trials.mask > 0]
    assert inside.mean().abs() < 1e-5 and inside.std() == pytest.approx(1, abs=1e-2)
    losses = []
    for _ in range(10):
        losses.append(policy_gradients.ppo_loss(net, trials, 0.2))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01


def test_minibatches_of_rl2_are_whole_trials_and_each_trial_is_in_one():
    """The mean of their losses is the loss on all trials."""
    torch.manual_seed(0)
    net, env = RL2(4, 1, 4), envs.make("continuous_cartpole", 6, scaled=True)
    with torch.no_grad():
        trials = policy_gradients.experience(net, *net.trial(env, DRAWS), gamma=0.99, gae_lambda=0.97)
        parts = [trials.part(index, 3) for index in range(3)]
        losses = [policy_gradients.ppo_loss(net, part, 0.2) for part in parts]
        torch.testing.assert_close(sum(losses) / 3, policy_gradients.ppo_loss(net, trials, 0.2))
    assert all(part.action.shape == (len(trials.action), 2, 1) for part in parts)
    assert len({float(x) for part in parts for x in part.action[0, :, 0]}) == 6


def test_the_rate_of_rl2_falls_linearly_and_every_minibatch_is_a_step(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    trained(0, 1, 1800, epochs=3, num_minibatches=2)
    assert rates == pytest.approx([1e-3] * 6 + [2e-3 / 3] * 6 + [1e-3 / 3] * 6)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_how_much_an_environment_pays_does_not_change_what_rl2_learns(factor):
    """Here the agent does not observe rewards, which are as the environment pays them."""

    class Paid(Recorded):
        factor = 1.0

        def trial(self, *inputs, **options):
            obs, action, reward, mask = super().trial(*inputs, **options)
            obs[..., -2] = 0
            return obs, action, self.factor * reward, mask

    class PaidOtherwise(Paid):
        pass

    PaidOtherwise.factor = factor
    ours, others = (trained(0, 1, 1200, kind)[0] for kind in (Paid, PaidOtherwise))
    for one, other in zip(ours.parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
