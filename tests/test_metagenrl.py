"""metagenrl.py: the objective and its second-order gradient, agents as a batch axis, replay, and the command line."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import tyro
from conftest import PROCESS, ROOT, TWO, killed, rows, run_script

import metagenrl
from common import networks
from common.envs import cartpole, classic, tasks

ARGS = metagenrl.Args(
    envs=("pendulum",), population=3, layers=2, hidden=9, objective_units=6, objective_filters=4, length=5, batch_size=8, num_envs=2,
    exploration_noise=(0.1, 0.3), random_steps=0, env_steps=60, test_steps=60, buffer_size=1000, anneal_steps=0,
)  # fmt: skip
DRAWS = torch.Generator().manual_seed(0)


def setting(p=3, a=4, b=2, dtype=torch.float64, args=ARGS, batches=1):
    """Networks, objectives (p, d), and a state and batches of p agents, all random; some sub-trajectories are short."""
    nets = metagenrl.make_nets(args, a, b)

    def draw(*shape):
        return torch.randn(p, batches * args.batch_size, args.length, *shape, generator=DRAWS, dtype=dtype)

    phi, target_phi = (nets.policy.init(p, DRAWS).to(dtype) for _ in range(2))
    theta, target_theta = (torch.stack([nets.critic.init(p, DRAWS).to(dtype) for _ in range(2)]) for _ in range(2))
    state = {"phi": phi, "theta": theta, "target_phi": target_phi, "target_theta": target_theta}
    state |= {f"{name}_{moment}": torch.zeros_like(state[name]) for name in ("phi", "theta") for moment in "mv"}
    state |= {f"{name}_steps": torch.zeros(p, 1, dtype=dtype) for name in ("phi", "theta")}
    state["age"] = torch.full((p,), 10**6)
    lengths = torch.randint(1, args.length + 1, (p, batches * args.batch_size, 1), generator=DRAWS)
    mask = (torch.arange(args.length) < lengths).to(dtype)
    terminated = (torch.arange(args.length) == lengths - 1).to(dtype) * (draw() > 0)
    batch = metagenrl.Batch(draw(a), draw(b).tanh(), draw(), terminated, draw().sigmoid(), draw(a), mask)
    return nets, nets.init_objective(p, DRAWS).to(dtype), state, batch


def one(state, batch, agent):
    """What belongs to one agent."""
    alone = {
        name: x[:, agent : agent + 1] if "theta" in name and x.ndim == 3 else x[agent : agent + 1] for name, x in state.items()
    }
    return alone, metagenrl.Batch(*(x[agent : agent + 1] for x in batch))


# ---- the objective -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_second_order_gradient_is_that_of_finite_differences(inner_steps, normalized):
    """Eq. 2.6 and A.2."""
    args = replace(ARGS, inner_steps=inner_steps, inner_normalized=normalized, inner_lr=0.3 if normalized else 3e-3)
    args = replace(args, value_scaled=True, objective_filters=8)  # normalising four units may be very steep
    nets, alpha, state, batch = setting(args=args, batches=inner_steps + 1)

    def loss(alpha):
        return metagenrl.meta_loss(args, nets, alpha, state, batch).sum()

    with torch.no_grad():
        g, value = networks.gradient(loss)(alpha)
        assert value == loss(alpha) and g.norm() > 1e-4
        for _ in range(3):
            direction = torch.randn(alpha.shape, generator=DRAWS, dtype=alpha.dtype)
            step = 1e-7 * direction
            slope = (loss(alpha + step) - loss(alpha - step)) / 2e-7
            assert (g * direction).sum() == pytest.approx(float(slope), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("inner_steps", [1, 2, 4])
def test_inner_steps_have_disjoint_whole_batches(inner_steps):
    """Every step of Eq. A.2 is the sum over as many sub-trajectories; the critic's estimate is on all, and others."""
    args = replace(ARGS, inner_steps=inner_steps, inner_lr=1e-3)
    nets, alpha, state, batches = setting(args=args, batches=inner_steps + 1)
    steps, last = (metagenrl.Batch(*(x[:, i : i + 8] for x in batches)) for i in range(0, 8 * inner_steps, 8)), batches
    phi = state["phi"]
    for tau in steps:
        phi = phi.detach().requires_grad_()
        seen = (x.detach() for x in metagenrl.values(nets, state, tau))
        phi = phi - 1e-3 * torch.autograd.grad(
            metagenrl.objective(args, nets, alpha, tau, nets.act(phi, tau.obs), *seen).sum(), phi
        )[0]
    gain = nets.q(state["theta"][0], last.obs, nets.act(phi, last.obs))
    gain = gain - nets.q(state["theta"][0], last.obs, nets.act(state["phi"], last.obs))
    with torch.no_grad():
        ours = metagenrl.meta_loss(args, nets, alpha, state, batches)
    torch.testing.assert_close(ours, -(gain * last.mask).sum((1, 2)) / last.mask.sum((1, 2)))


def test_an_objective_follows_the_sum_of_its_agents_gradients(monkeypatch):
    """Algorithm 6. Frozen agents add nothing, and the others' sum is not divided by anything."""
    args = replace(ARGS, env_steps=4)
    agents, sums = group(args), []
    alpha = agents.nets.init_objective(1, DRAWS)
    run = Sick([])
    run.log, kept, steps = lambda *_: None, {}, run.steps
    run.steps = lambda total, keep: (kept.update(keep), steps(total, keep))[1]
    ours = agents.meta_gradient
    monkeypatch.setattr(agents, "meta_gradient", lambda *x: (pair := ours(*x), sums.append(pair[0].sum(0)))[0])
    with torch.no_grad():
        metagenrl.meta_train(args, [agents], alpha, alpha.repeat(6, 1, 1), run)
    assert sums[0].norm() > 1e-4
    torch.testing.assert_close(kept["alpha"].grad[0], sums[0])


def test_critic_policy_and_objective_have_batches_of_their_own(monkeypatch):
    args = replace(ARGS, inner_steps=3, env_steps=8)
    agents, sizes = group(args), []
    sample = agents.sample
    monkeypatch.setattr(agents, "sample", lambda *x: (batch := sample(*x), sizes.append(batch.mask.shape[1]))[0])
    alpha = agents.nets.init_objective(1, DRAWS)
    with torch.no_grad():
        metagenrl.meta_train(args, [agents], alpha, alpha.repeat(6, 1, 1), Sick([]))
    assert sizes == [8, 8, 8, 4 * 8] * 2


def test_gradients_are_those_of_torch_func():
    """What torch.compile is given."""
    alpha = setting()[1]
    pairs = torch.func.grad_and_value(lambda x: (x**2 * torch.func.grad(lambda y: (y**3).sum())(x)).sum())(alpha)
    ours = networks.gradient(lambda x: (x**2 * networks.gradient(lambda y: (y**3).sum())(x)[0]).sum())(alpha)
    for one, other in zip(ours, pairs, strict=True):
        torch.testing.assert_close(one, other)


def test_policies_descend_the_objective_through_their_actions_alone():
    """The values are constants (section 2.3.2, footnote 3), although they are made with the policy."""
    nets, alpha, state, batch = setting()
    value, next_value = (x.detach() for x in metagenrl.values(nets, state, batch))
    phi = state["phi"].clone().requires_grad_()

    def loss(value, next_value):
        per_step = metagenrl.objective(ARGS, nets, alpha, batch, nets.act(phi, batch.obs), value, next_value)
        return metagenrl.masked_mean(per_step, batch.mask).sum()

    with torch.no_grad():
        ours = metagenrl.grad_objective(ARGS, nets, alpha, state, batch)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(value, next_value), phi)[0])
    through = metagenrl.values(nets, state | {"phi": phi}, batch)
    assert not torch.allclose(ours, torch.autograd.grad(loss(*through), phi)[0], rtol=1e-2)


def test_what_a_terminal_state_leads_to_is_worth_nothing():
    nets, _, state, batch = setting()
    assert batch.terminated.any()
    _, next_value = metagenrl.values(nets, state, batch)
    assert (next_value[batch.terminated == 1] == 0).all() and (next_value[batch.terminated == 0] != 0).all()


def test_values_are_standardised_together_and_terminal_ones_are_zero_afterwards():
    """V_{t+1} is the same number as V_t one step later, and what a critic says of terminal states changes nothing."""
    nets, alpha, state, batch = setting()
    value = 200 + 5 * torch.randn(3, ARGS.batch_size, ARGS.length + 1, generator=DRAWS, dtype=batch.reward.dtype)
    batch, inputs = batch._replace(terminated=torch.zeros_like(batch.reward), mask=torch.ones_like(batch.reward)), []
    batch.terminated[:, ::3, -1] = 1

    class Spy(networks.Network):
        def __call__(self, params, x):
            inputs.append(x)
            return super().__call__(params, x)

    nets, action = nets._replace(of_inputs=Spy(*nets.of_inputs)), nets.act(state["phi"], batch.obs)
    for after_end in (0.0, 500.0):
        next_value = torch.where(batch.terminated > 0, after_end, value[:, :, 1:])
        metagenrl.objective(ARGS, nets, alpha, batch, action, value[:, :, :-1], next_value)
    torch.testing.assert_close(inputs[0], inputs[1])
    _, v, next_v, _ = inputs[0].unbind(-1)
    torch.testing.assert_close(next_v[:, :, :-1], v[:, :, 1:])
    assert (next_v[batch.terminated > 0] == 0).all() and v.abs().max() < 5


def test_the_objective_takes_any_number_of_action_dimensions_in_any_order():
    for b in (1, 2, 5):
        nets, alpha, state, batch = setting(b=b)
        action, seen = nets.act(state["phi"], batch.obs), metagenrl.values(nets, state, batch)
        ours = metagenrl.objective(ARGS, nets, alpha, batch, action, *seen)
        order = torch.randperm(b, generator=DRAWS)
        shuffled = batch._replace(action=batch.action[..., order])
        torch.testing.assert_close(metagenrl.objective(ARGS, nets, alpha, shuffled, action[..., order], *seen), ours)
        if b > 1:
            wrong = metagenrl.objective(ARGS, nets, alpha, shuffled, action, *seen)
            assert order.tolist() == list(range(b)) or not torch.allclose(wrong, ours)


def test_the_objective_depends_on_the_future_but_not_beyond_an_end():
    nets, alpha, state, batch = setting()
    batch = batch._replace(mask=torch.ones_like(batch.mask))
    batch.mask[:, 1, 3:] = 0  # an end
    action, seen = nets.act(state["phi"], batch.obs), metagenrl.values(nets, state, batch)
    ours = metagenrl.objective(ARGS, nets, alpha, batch, action, *seen)
    time = batch.time.clone()
    time[:, 0, 2] += 1
    changed = metagenrl.objective(ARGS, nets, alpha, batch._replace(time=time), action, *seen) != ours
    assert changed[:, 0, :3].all() and not changed[:, 0, 3:].any() and not changed[:, 1:].any()
    for what in ("time", "reward"):
        x = getattr(batch, what).clone()
        x[:, 1, 3:] += 10
        assert torch.equal(metagenrl.objective(ARGS, nets, alpha, batch._replace(**{what: x}), action, *seen), ours)
    assert (ours[:, 1, 3:] == 0).all() and (ours.abs() < ARGS.bound).all()


@pytest.mark.parametrize(
    "inputs", [("reward", "value", "next_value"), ("reward", "time"), ("reward", "value", "time"), ("gain",)]
)
def test_the_objective_depends_on_its_inputs_alone(inputs):
    args = replace(ARGS, inputs=inputs)
    nets, alpha, state, batch = setting(args=args)
    action, seen = nets.act(state["phi"], batch.obs), metagenrl.values(nets, state, batch)
    ours = metagenrl.objective(args, nets, alpha, batch, action, *seen)
    other = {"reward": batch._replace(reward=batch.reward.flip(2)), "time": batch._replace(time=1 - batch.time)}
    for name, changed in other.items():
        depends = not torch.equal(metagenrl.objective(args, nets, alpha, changed, action, *seen), ours)
        assert depends == (name in inputs)
    mixed = metagenrl.objective(args, nets, alpha, batch, action, seen[0].flip(2), seen[1])
    assert torch.equal(mixed, ours) != bool({"value", "gain"} & set(inputs))


def test_the_thesis_objective_has_about_15_thousand_parameters():
    args = metagenrl.Args()
    nets = metagenrl.make_nets(args, 17, 6)
    alpha = nets.init_objective(1, DRAWS)
    assert 14_000 < alpha.shape[1] < 16_000 and sum(nets.objective_sizes) == alpha.shape[1]
    i, f, o, new = alpha[0, -4 * 32 :].chunk(4)  # the LSTM's bias
    assert f.mean() > 0.9 and all(gate.abs().max() < 0.2 for gate in (i, o, new, f - 1))


def test_the_thesis_agent_has_384_thousand_parameters():
    """Section 2.3.3: a policy and two critics, in LunarLander."""
    nets = metagenrl.make_nets(metagenrl.Args(), 8, 2)
    assert 384_000 < nets.policy.d + 2 * nets.critic.d < 386_000


def test_action_embeddings_and_the_head_are_activated_then_normalised():
    """As the authors' release has it; the last layer of the embedding too, before the mean over action dimensions."""
    nets, alpha, _, _ = setting()
    alpha = alpha[:1, sum(nets.objective_sizes[:1]) :][:, : nets.of_actions.d]
    embedding = nets.of_actions(alpha, torch.randn(1, 50, 2, generator=DRAWS, dtype=alpha.dtype))
    torch.testing.assert_close(embedding.mean(-1), torch.zeros_like(embedding[..., 0]), atol=1e-6, rtol=0)
    assert nets.of_hidden.normalized and not nets.of_inputs.normalized
    net = networks.Network((3, 2, 1), torch.square)
    weights = torch.tensor([[1.0, 2.0], [0, 0], [0, 0]])
    params = torch.cat([weights.flatten(), torch.tensor([0, 0, 1, 1, 0.5, 0.25, 1, -1, 3])])[None]
    torch.testing.assert_close(net(params, torch.ones(1, 1, 3)).item(), -1 + 0.5 - 1 - 0.25 + 3, atol=1e-4, rtol=0)


# ---- agents ------------------------------------------------------------------------------------------------------------
def slow_network(params, x, sizes):
    """A policy or a critic of one agent, layer by layer, for one input."""
    at = 0

    def take(*shape):
        nonlocal at
        count = torch.Size(shape).numel()
        at += count
        return params[at - count : at].view(shape)

    for layer, (a, b) in enumerate(pairwise(sizes)):
        weight, bias = take(a, b), take(b)
        x = x @ weight + bias
        if layer < len(sizes) - 2:
            gain, shift = take(b), take(b)
            x = torch.relu(x)
            x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5) * gain + shift
    return x


@pytest.mark.parametrize("where", ["middle", "terminal"])
def test_critics_follow_equation_2_5_with_td3s_targets(where):
    """The gradient for one agent, transition by transition; a time limit, which is not terminal, bootstraps."""
    nets, _, state, batch = setting(p=2)
    batch = batch._replace(terminated=torch.full_like(batch.terminated, float(where == "terminal")))
    noise = torch.randn(batch.action.shape, generator=DRAWS, dtype=batch.obs.dtype)
    with torch.no_grad():
        ours = metagenrl.critic_gradient(ARGS, nets, state, batch, noise)
    theta = state["theta"][:, 1].clone().requires_grad_()
    total, count = 0, 0
    for s, t in batch.mask[1].nonzero().tolist():
        obs, action, next_obs = (x[1, s, t] for x in (batch.obs, batch.action, batch.next_obs))
        smooth = (0.2 * noise[1, s, t]).clamp(-0.5, 0.5)
        next_action = (torch.tanh(slow_network(state["target_phi"][1], next_obs, nets.policy.sizes)) + smooth).clamp(-1, 1)
        pair = torch.cat([next_obs, next_action])
        target = min(slow_network(target[1], pair, nets.critic.sizes)[0] for target in state["target_theta"])
        y = batch.reward[1, s, t] + (0.99 * target if where == "middle" else 0)
        for critic in theta:
            total = total + (slow_network(critic, torch.cat([obs, action]), nets.critic.sizes)[0] - y) ** 2
        count += 1
    torch.testing.assert_close(ours[:, 1], torch.autograd.grad(total / count, theta)[0])


def test_both_critics_in_one_product_are_each_alone():
    nets, _, state, batch = setting()
    alone = torch.stack([nets.q(theta, batch.obs, batch.action) for theta in state["theta"]])
    torch.testing.assert_close(nets.q(state["theta"], batch.obs, batch.action), alone)


@pytest.mark.parametrize("name", ["objective", "critic", "reinforce"])
def test_a_batch_of_agents_is_agents_one_by_one(name):
    grad = getattr(metagenrl, f"grad_{name}")
    nets, alpha, state, batches = setting(batches=2)
    batch = metagenrl.Batch(*(x[:, : ARGS.batch_size] for x in batches))
    noise = torch.randn(batch.action.shape, generator=DRAWS, dtype=batch.obs.dtype)
    share = torch.tensor(0.3, dtype=batch.obs.dtype)
    with torch.no_grad():
        critics = metagenrl.update_critics(ARGS, nets, state, batch, noise)
        policies = metagenrl.update_policies(ARGS, nets, grad, alpha, state, batch, share)
        meta = metagenrl.meta_gradient(ARGS, nets, alpha, state, batches)[0]
        for agent in range(3):
            alone, part = one(state, batch, agent)
            parts = one(state, batches, agent)[1]
            again = metagenrl.update_critics(ARGS, nets, alone, part, noise[agent : agent + 1])
            again |= metagenrl.update_policies(ARGS, nets, grad, alpha[agent : agent + 1], alone, part, share)
            expected, _ = one(critics | policies, batch, agent)
            for name, x in again.items():
                torch.testing.assert_close(x, expected[name])
            alone = metagenrl.meta_gradient(ARGS, nets, alpha[agent : agent + 1], alone, parts)[0]
            torch.testing.assert_close(alone[0], meta[agent])


def test_adam_is_torchs_and_counts_steps_by_agent():
    state = setting()[2]
    theirs = torch.nn.Parameter(state["phi"].clone())
    adam = torch.optim.Adam([theirs], 0.01)
    where = torch.ones(3, dtype=torch.bool)
    for _ in range(5):
        theirs.grad = torch.randn(theirs.shape, generator=DRAWS, dtype=theirs.dtype)
        adam.step()
        state |= networks.adam(state, "phi", theirs.grad, 0.01, where)
        torch.testing.assert_close(state["phi"], theirs.detach())
    where[1] = False
    later = networks.adam(state, "phi", theirs.grad, 0.01, where)
    assert torch.equal(later["phi"][1], state["phi"][1]) and not torch.equal(later["phi"][0], state["phi"][0])
    assert later["phi_steps"][:, 0].tolist() == [6, 5, 6]


def test_frozen_policies_neither_learn_nor_teach():
    nets, alpha, state, batch = setting(batches=2)
    args = replace(ARGS, frozen_steps=100)
    state["age"] = torch.tensor([100, 99, 500])
    with torch.no_grad():
        new = metagenrl.update_policies(args, nets, metagenrl.grad_objective, alpha, state, batch, None)
        g, _ = metagenrl.meta_gradient(args, nets, alpha, state, batch)
    assert (new["phi"] != state["phi"]).any(-1).tolist() == [True, False, True]
    assert (g != 0).any(-1).tolist() == [True, False, True]


def group(args=ARGS, name="pendulum", p=3, steps=60):
    torch.manual_seed(0)
    return metagenrl.Group(args, name, torch.zeros(p, dtype=torch.int64), steps, torch.device("cpu"), lambda f: f)


def test_an_agent_that_is_not_finite_is_reset_and_the_others_continue():
    agents = group()
    with torch.no_grad():
        for now in range(1, 5):
            agents.step_async()
            agents.step_wait(now - 1)
            metagenrl.learn(ARGS, agents, metagenrl.grad_critic, torch.zeros(3, 0), now)
        before = agents.state["phi"].clone()
        agents.state["phi"][1, 5] = torch.nan
        alpha = agents.nets.init_objective(3, DRAWS)
        g, _ = metagenrl.meta_gradient(ARGS, agents.nets, alpha, agents.state, agents.sample(4, 2))
        assert (g != 0).any(-1).tolist() == [True, False, True] and g.isfinite().all()
        agents.reset_diverged(4, "phi", "theta")
    assert agents.state["diverged"].tolist() == [0, 1, 0] and agents.state["phi"].isfinite().all()
    assert torch.equal(agents.state["phi"][::2], before[::2]) and agents.state["age"].tolist() == [8, 0, 8]
    assert agents.state["phi_steps"][:, 0].tolist() == [2, 0, 2] and agents.state["first_step"].tolist() == [0, 4, 0]


def test_an_on_policy_agent_that_is_not_finite_is_reset_and_acts_again():
    torch.manual_seed(0)
    which = torch.zeros(2, dtype=torch.int64)
    agents = metagenrl.Group(ARGS, "pendulum", which, 60, torch.device("cpu"), lambda f: f, on_policy=True)
    args = replace(ARGS, ppo=metagenrl.PPOArgs(num_steps=10))
    with torch.no_grad():
        agents.state["phi"][1] = torch.nan
        for now in metagenrl.train_on_policy(replace(args, buffer_size=100), agents, ppo=True):
            if now in (4, 12):  # before and after an update
                agents.reset_diverged(now, "phi", "theta")
                assert all(x.isfinite().all() for x in agents.state.values())
    assert agents.state["diverged"].tolist() == [0, 1]


def test_a_quarter_of_the_agents_is_reset_in_turn(monkeypatch):
    """After every --reset-every environment steps of an agent, here two of its copies each."""
    args = replace(ARGS, reset_every=6, checkpoint_every=1000)
    agents, resets = group(args, p=8), {}
    monkeypatch.setattr(agents, "reset_agents", lambda step, which: resets.update({step: which.nonzero()[:, 0].tolist()}))
    for step in range(16):
        metagenrl.reset_some(args, [agents], step)
    assert resets == {3: [1, 5], 6: [2, 6], 9: [3, 7], 12: [0, 4], 15: [1, 5]}


def test_the_objective_takes_over_once_policies_are_trained():
    args, cpu = replace(ARGS, frozen_steps=10, anneal_steps=20), torch.device("cpu")
    shares = [metagenrl.share_of_objective(args, now, cpu) for now in (1, 5, 10, 14)]
    assert [float(share) for share in shares] == pytest.approx([0, 0, 0.5, 0.9])
    assert metagenrl.share_of_objective(args, 15, cpu) is None


def test_the_rate_of_objectives_falls_to_zero(monkeypatch):
    args = replace(ARGS, env_steps=16, num_envs=2, policy_frequency=2, objective_lr=0.08, objective_lr_decay=True)
    alpha, rates, step = metagenrl.make_nets(args, 1, 1).init_objective(1, DRAWS), [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: (rates.append(adam.param_groups[0]["lr"]), step(adam)))
    with torch.no_grad():
        metagenrl.meta_train(args, [group(args)], alpha, alpha.repeat(6, 1, 1), Sick([]))
    assert rates == pytest.approx([0.07, 0.05, 0.03, 0.01])  # a step of objectives for every second one of critics


def test_targets_follow_slowly_actions_are_explored_and_long_gradients_clipped():
    args = replace(ARGS, exploration_noise=(0.3, 0.3), tau=0.2, max_grad_norm=0.5)
    nets, alpha, state, batch = setting(args=args)
    with torch.no_grad():
        new = metagenrl.update_policies(args, nets, metagenrl.grad_objective, alpha, state, batch, None)
        for name, last in (("phi", new["phi"]), ("theta", state["theta"])):
            torch.testing.assert_close(new[f"target_{name}"], state[f"target_{name}"].lerp(last, 0.2))
        state["obs"] = batch.obs[:, :2, 0]
        noise = 1e-3 * torch.randn(3, 2, 2, generator=DRAWS, dtype=torch.float64)
        quiet, loud = (metagenrl.act(args, nets, state, x, torch.rand(3, 2, 2)) for x in (torch.zeros_like(noise), noise))
        torch.testing.assert_close(loud - quiet, noise, rtol=1e-6, atol=1e-12)
        for g in (torch.tensor([[3.0, 4.0]]), torch.tensor([[0.03, 0.04]])):
            torch.testing.assert_close(metagenrl.clipped(args, g).norm(), g.norm().clamp(max=0.5), rtol=1e-4, atol=0)


def test_the_noise_of_exploration_reaches_the_environment():
    """Of agents with the same policies, those without noise act alike."""
    actions = {}
    for noise in (0.0, 0.3):
        agents = group(replace(ARGS, exploration_noise=(noise, noise)))
        agents.state["phi"] = torch.zeros_like(agents.state["phi"])
        agents.step_async()
        actions[noise] = agents.pending[1]
    assert actions[0.0].abs().max() == 0 and 0.1 < actions[0.3].std() < 0.6


def test_a_short_training_is_not_compiled():
    run = Sick([])
    run.compiles = True
    assert metagenrl.fuser(run, 2_500)(abs) is abs
    assert metagenrl.fuser(run, 250_000).func is metagenrl.fuser(run).func is torch.compile
    run.compiles = False
    assert metagenrl.fuser(run)(abs) is abs


def test_functions_of_several_environments_are_all_compiled():
    """torch.compile counts what is compiled of all `partial`s together, and would leave others uncompiled without a word."""
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        torch.compiler.reset()
        fuse = partial(torch.compile, dynamic=False, backend="eager")
        which = torch.zeros(2, dtype=torch.int64)
        args = replace(ARGS, length=2, layers=1, env_steps=8)
        groups = [metagenrl.Group(args, name, which, 8, torch.device("cpu"), fuse) for name in ("pendulum", "point_mass")]
        alpha = groups[0].nets.init_objective(1, DRAWS)
        metagenrl.meta_train(args, groups, alpha, alpha.repeat(6, 1, 1), Sick([]))


class Sick:
    """A run in which one agent falls ill."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self, groups):
        self.groups, self.logged = groups, []

    def steps(self, total, keep):
        for step in range(total):
            if self.groups and step == 7:
                self.groups[0].state["phi"][1] = torch.nan
            yield step

    def log(self, step, values):
        self.logged.append(values)


def test_meta_training_continues_without_an_agent_that_is_not_finite():
    args = replace(ARGS, log_every=4, env_steps=32)
    groups = [group(args)]
    alpha = groups[0].nets.init_objective(1, DRAWS)
    before, run = alpha.clone(), Sick(groups)
    with torch.no_grad():
        metagenrl.meta_train(args, groups, alpha, alpha.repeat(6, 1, 1), run)
    assert groups[0].state["diverged"].tolist() == [0, 1, 0] and len(run.logged) == 4
    assert all(value.isfinite() for values in run.logged for value in values.values())
    assert all(x.isfinite().all() for x in groups[0].state.values())
    assert alpha.isfinite().all() and not torch.equal(alpha, before)


@pytest.mark.parametrize("steps", [10, 7, 300])
def test_objectives_are_kept_from_after_parts_of_meta_training(steps):
    alpha, history = torch.zeros(1, 2), torch.zeros(6, 1, 2)
    for step in range(steps):
        alpha += 1
        metagenrl.keep_history(history, alpha, step, steps)
    parts = torch.tensor(list(metagenrl.PROGRESS))
    assert history[:, 0, 0].tolist() == (parts * steps / 100).ceil().tolist()
    assert (alpha == steps).all()


def test_critics_move_policies_until_annealing_is_over_and_not_afterwards(monkeypatch):
    args, calls = replace(ARGS, anneal_steps=12, env_steps=24, policy_frequency=1, log_every=6), []
    critic = metagenrl.grad_critic
    monkeypatch.setattr(metagenrl, "grad_critic", lambda *x: calls.append(int(x[3]["age"][0])) or critic(*x))
    agents = group(args)
    alpha = agents.nets.init_objective(1, DRAWS)
    with torch.no_grad():
        metagenrl.meta_train(args, [agents], alpha, alpha.repeat(6, 1, 1), Sick([]))
    assert calls == list(range(2, 12, 2))


def test_every_line_of_metrics_has_every_column():
    """Lines without an update of the objective repeat the last meta-loss; lines of several iterations are their means."""
    logged = {}
    for every in (1, 2, 6):
        args = replace(ARGS, log_every=every, env_steps=24)
        run, agents = Sick([]), group(args)
        alpha = agents.nets.init_objective(1, torch.Generator().manual_seed(3))
        with torch.no_grad():
            metagenrl.meta_train(args, [agents], alpha, alpha.repeat(6, 1, 1), run)
        names = {frozenset(values) for values in run.logged}
        assert len(names) == 1 and len(run.logged) == 12 // every
        logged[every] = {name: torch.stack([values[name] for values in run.logged]) for name in run.logged[0]}
    loss, reward = "pendulum_meta_loss", "pendulum_reward"
    torch.testing.assert_close(logged[1][loss][1::2], logged[2][loss])
    torch.testing.assert_close(logged[1][loss][2::2], logged[2][loss][:-1])
    torch.testing.assert_close(logged[2][loss].view(2, 3).mean(1), logged[6][loss])
    torch.testing.assert_close(logged[1][reward].view(2, 6).mean(1), logged[6][reward])


def test_the_meta_test_reports_agents_that_are_not_finite(monkeypatch):
    args = replace(ARGS, test_envs=("pendulum",), test_steps=24, test_seeds=3, evaluations=2, episodes=1, learner="td3")

    def gradient(args, nets, alpha, state, batch):
        return state["phi"] * torch.tensor([1, torch.nan, 1])[:, None]

    run = Sick([])
    run.compiles = False
    with torch.no_grad():
        healthy = metagenrl.test_in_env(args, "pendulum", ["td3"], {}, None, run, metagenrl.tqdm(disable=True))
        monkeypatch.setitem(metagenrl.POLICY_GRADIENTS, "td3", gradient)
        sick = metagenrl.test_in_env(args, "pendulum", ["td3"], {}, None, run, metagenrl.tqdm(disable=True))
    assert not any("agents_reset" in row for row in healthy)
    assert [row["agents_reset"] for row in sick] == [2, 2, 2]  # at both evaluations


def test_processes_share_the_agents_of_a_meta_test(monkeypatch):
    """Each trains some of them, which are those of one process; of more processes than agents some train the same."""
    args = replace(ARGS, test_envs=("pendulum",), test_steps=24, test_seeds=3, evaluations=2, episodes=2, learner="td3")
    trained, train = [], metagenrl.train_agents
    monkeypatch.setattr(metagenrl, "train_agents", lambda args, group, *x: trained.append(group) or train(args, group, *x))
    means = []
    for rank, world in ((0, 1), (0, 2), (1, 2), (4, 5)):
        run = Sick([])
        run.rank, run.world, run.compiles = rank, world, False
        with torch.no_grad():
            tested = metagenrl.test_in_env(args, "pendulum", ["td3"], {}, None, run, metagenrl.tqdm(disable=True))
        means.append([row["mean"] * row["seeds"] for row in tested])
    whole, *parts = trained
    assert [part.own.tolist() for part in parts] == [[0, 2], [1], [1]]
    for part in parts:
        torch.testing.assert_close(part.state["phi"], whole.state["phi"][part.own], rtol=1e-3, atol=1e-4)
    assert means[0] == pytest.approx([a + b for a, b in zip(*means[1:3], strict=True)], rel=1e-3)  # sums over agents


def test_the_fitness_of_an_evolved_objective_depends_on_it(monkeypatch):
    """EPG's agents act with their policies, although --random-steps is longer than their training, as in the thesis."""
    epg = metagenrl.EPGArgs(life_steps=80, generations=1, pairs=4, sigma=0.5)
    args = replace(ARGS, random_steps=10_000, epg=epg)
    losses, estimate = [], metagenrl.es.estimate
    monkeypatch.setattr(metagenrl.es, "estimate", lambda noise, x, *rest: losses.append(x) or estimate(noise, x, *rest))
    run = Sick([])
    run.compiles = False
    alpha = metagenrl.make_nets(args, 1, 1).init_objective(1, DRAWS)
    with torch.no_grad():
        metagenrl.evolve(args, alpha, alpha.repeat(6, 1, 1), run)
    assert len(losses[0].unique()) == 8


def test_an_evolved_objective_that_breaks_its_agents_is_the_worst(monkeypatch):
    """Their actions are zeros, so that rewards stay finite."""
    args = replace(ARGS, epg=metagenrl.EPGArgs(life_steps=24, generations=1, pairs=2))
    losses, estimate, ours = [], metagenrl.es.estimate, metagenrl.grad_objective
    monkeypatch.setattr(metagenrl.es, "estimate", lambda noise, x, *rest: losses.append(x) or estimate(noise, x, *rest))
    broken = torch.tensor([torch.nan, 1, 1, 1])[:, None]
    monkeypatch.setattr(metagenrl, "grad_objective", lambda *x: ours(*x) * broken)
    run = Sick([])
    run.compiles = False
    alpha = metagenrl.make_nets(args, 1, 1).init_objective(1, DRAWS)
    with torch.no_grad():
        metagenrl.evolve(args, alpha, alpha.repeat(6, 1, 1), run)
    assert losses[0][0, 0] == 1e9 and (losses[0].flatten()[1:] < 100).all()


@pytest.mark.parametrize(("learner", "rate"), [("td3", 2e-3), ("reinforce-off", 5e-4), ("untrained", 1e-4)])
def test_every_learner_has_a_rate_of_its_own(learner, rate):
    """The first step of Adam moves parameters by the rate."""
    args = replace(ARGS, td3_lr=2e-3, reinforce_lr=5e-4, test_policy_lr=1e-4, test_envs=("pendulum",), test_seeds=2, episodes=1)
    args, moved, run = replace(args, test_steps=8, evaluations=4, baselines=(learner,)), [], Sick([])
    run.compiles = False

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        train = metagenrl.train_agents

        def train_and_note(args, group, policy_gradient, alpha):
            moved.append(group.state["phi"])
            for now in train(args, group, policy_gradient, alpha):
                moved.append(group.state["phi"])
                yield now

        patch.setattr(metagenrl, "train_agents", train_and_note)
        alpha = metagenrl.make_nets(args, 1, 1).init_objective(1, DRAWS)
        metagenrl.test_in_env(args, "pendulum", [learner], {"untrained": alpha}, None, run, metagenrl.tqdm(disable=True))
    assert (moved[2] - moved[0]).abs().max() == pytest.approx(rate, rel=0.02)


def test_advantages_of_reinforce_are_normalised():
    """Their scale and offset do not matter: the same rewards, times ten, plus one."""
    nets, _, state, batch = setting()
    batch = batch._replace(mask=torch.ones_like(batch.mask), terminated=torch.zeros_like(batch.terminated))
    zero = state | {"theta": torch.zeros_like(state["theta"])}
    args = replace(ARGS, length=1, gae_lambda=0.0)
    with torch.no_grad():
        ours = metagenrl.grad_reinforce(args, nets, None, zero, batch)
        theirs = metagenrl.grad_reinforce(args, nets, None, zero, batch._replace(reward=10 * batch.reward + 1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_ppo_has_the_networks_of_spinning_ups_benchmarks():
    """64 and 32 tanh units without layer normalisation, and a mean that is not bounded, whatever --hidden and --layers are."""
    torch.manual_seed(0)
    which = torch.zeros(2, dtype=torch.int64)
    agents = metagenrl.Group(metagenrl.Args(), "pendulum", which, 4, torch.device("cpu"), lambda f: f, on_policy=True)
    layers = [layer for a, b in ((3, 64), (64, 32), (32, 1)) for layer in (torch.nn.Linear(a, b), torch.nn.Tanh())]
    net, phi, obs = torch.nn.Sequential(*layers[:-1]), 5 * agents.state["phi"], torch.randn(2, 7, 3, generator=DRAWS)
    at = 0
    for layer in net[::2]:
        for x in (layer.weight.T, layer.bias):
            x.data.copy_(phi[1, at : at + x.numel()].view(x.shape))
            at += x.numel()
    ours = agents.nets.act(phi, obs)[1]
    assert at == phi.shape[1] and ours.abs().max() > 1
    torch.testing.assert_close(ours, net(obs[1]).detach())
    assert agents.nets.value.sizes == (3, 64, 32, 1) and {"psi", "psi_m", "log_std"} < set(agents.state)


def test_reinforce_is_the_gradient_of_equation_2_3():
    nets, _, state, batch = setting(p=2)
    args = replace(ARGS, exploration_noise=(0.5,), gae_lambda=0.9)
    value, next_value = (x.detach() for x in metagenrl.values(nets, state, batch))
    phi = state["phi"].clone().requires_grad_()
    policy = torch.distributions.Normal(nets.act(phi, batch.obs), 0.5)
    log_policy = policy.log_prob(batch.action).sum(-1)
    total = 0
    for p in range(2):
        inside = batch.mask[p].nonzero().tolist()
        advantages = []
        for s, t in inside:
            steps = [k for r, k in inside if r == s and k >= t]
            deltas = [batch.reward[p, s, k] + 0.99 * next_value[p, s, k] - value[p, s, k] for k in steps]
            advantages.append(sum((0.99 * 0.9) ** (k - t) * delta for k, delta in zip(steps, deltas, strict=True)))
        advantages = torch.stack(advantages)
        advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-5)
        total = total - sum(log_policy[p, s, t] * one for (s, t), one in zip(inside, advantages, strict=True)) / len(inside)
    with torch.no_grad():
        ours = metagenrl.grad_reinforce(args, nets, None, state, batch)
    torch.testing.assert_close(ours, torch.autograd.grad(total, phi)[0])


@pytest.mark.slow
def test_compiled_updates_are_the_same():
    """torch.compile takes every update whole, second-order gradients too. (What inductor makes of it takes minutes.)"""
    args = replace(ARGS, inner_steps=2)
    nets, alpha, state, batches = setting(args=args, batches=3)
    batch = metagenrl.Batch(*(x[:, : ARGS.batch_size] for x in batches))
    noise = torch.randn(batch.action.shape, generator=DRAWS, dtype=batch.obs.dtype)
    given = {metagenrl.update_critics: (state, batch, noise), metagenrl.meta_gradient: (alpha, state, batches)}
    given |= {metagenrl.update_policies: (metagenrl.grad_objective, alpha, state, batch, torch.tensor(0.3).double())}
    with torch.no_grad():
        for ours, inputs in given.items():
            compiled = torch.compile(ours, dynamic=False, fullgraph=True, backend="aot_eager")(args, nets, *inputs)
            torch.testing.assert_close(compiled, ours(args, nets, *inputs))


def test_an_agent_learns():
    """TD3 brings a point to its target: from a distance of about 1.2 to less than half of it, in the preset's 10,000 steps.
    (With fewer random and frozen steps, 4,800 are too few: of 48 agents half are there.)"""
    args = metagenrl.Args(**metagenrl.LAPTOP)
    torch.manual_seed(0)
    with torch.no_grad():
        which = torch.zeros(4, dtype=torch.int64)
        agents = metagenrl.Group(args, "point_mass", which, 10_000, torch.device("cpu"), lambda f: f)
        env = metagenrl.make_env("point_mass", 16)

        def act(obs):
            return agents.nets.act(agents.state["phi"], obs)

        before = metagenrl.mean_returns(env, act, 4, 0)
        for _ in metagenrl.train_agents(args, agents, metagenrl.grad_critic, torch.zeros(4, 0)):
            pass
        after = metagenrl.mean_returns(env, act, 4, 0)
    assert before.mean() < -100 and after.mean() > before.mean() / 2, (before, after)


# ---- the thesis' preset ------------------------------------------------------------------------------------------------
CHEETAH, HOPPER, LUNAR = "HalfCheetah-v4", "Hopper-v4", "LunarLanderContinuous-v3"
THESIS = dict(  # tables A.2 and A.3, sections 2.5, A.2.2 and A.2.3, but where a comment says so
    learner="metagenrl", envs=(LUNAR, CHEETAH), env_steps=600_000, test_steps=1_000_000, population=20, num_envs=1,
    hidden=350, objective_units=32, objective_filters=32, inputs=("reward", "value", "next_value", "time"), bound=1000,
    length=20, max_grad_norm=1, critic_lr=1e-3, policy_lr=1e-3, test_policy_lr=1e-3,
    td3_lr=1e-3, reinforce_lr=1e-3, inner_lr=1e-3, objective_lr=1e-3, objective_lr_decay=False,
    policy_noise=0.2, noise_clip=0.5, tau=0.005, gamma=0.99, batch_size=100, random_steps=10_000, exploration_noise=(0.1,),
    anneal_steps=10_000, policy_frequency=2, inner_steps=1, inner_normalized=False, value_scaled=False, frozen_steps=0,
    reset_every=0, objectives=1,
    layers=2,  # section 2.3.3's 384 K parameters
    ppo=metagenrl.PPOArgs(num_steps=4000, update_epochs=80, lr=3e-4, clip_coef=0.2, target_kl=0.015),  # Spinning Up's
    gae_lambda=0.97,  # likewise
)  # fmt: skip
FOUR_BODIES = dict(envs=(CHEETAH, LUNAR, "Walker2d-v4", "Ant-v4"))
THESIS_ROWS = {  # row and label of the command at the thesis preset -> what differs from THESIS
    ("M1", ""): dict(test_envs=(HOPPER,), test_seen=True, progress=True),
    ("M1", "hopper, lunar"): dict(envs=(HOPPER, LUNAR), test_envs=(CHEETAH, HOPPER, LUNAR)),
    ("M1", "lunar"): dict(envs=(LUNAR,)),
    ("M1", "cheetah, lunar, walker, ant"): FOUR_BODIES | dict(population=40, test_envs=(CHEETAH, HOPPER, LUNAR)),
    ("M2", "rl2"): dict(learner="rl2", test_seen=True, test_envs=(HOPPER,)),
    ("M2", "epg"): dict(learner="epg", test_seen=True, test_envs=(HOPPER,)),
    ("M4", "no time"): dict(inputs=("reward", "value", "next_value"), test_seen=True, test_envs=()),
    ("M4", "no next value"): dict(inputs=("reward", "value", "time")),
    ("M4", "no values"): dict(inputs=("reward", "time")),
    ("M5", "inner_steps 5"): dict(inner_steps=5, test_envs=(HOPPER, CHEETAH), test_seen=False),
    ("M6", "each"): dict(envs=(LUNAR,), test_envs=(), test_seen=True, each=True, progress=True, test_seeds=12),
    ("M7", "4 agents"): dict(population=4, test_envs=(HOPPER,)),
    ("M7", "4 environments"): FOUR_BODIES,
}


@pytest.mark.parametrize(("row", "label"), THESIS_ROWS, ids=str)
def test_rows_at_the_thesis_preset_have_the_thesis_numbers(row, label):
    import reproduce

    _, *flags = reproduce.ROWS[row].commands("thesis")[label].split()
    args = tyro.cli(metagenrl.Args, args=flags, default=metagenrl.Args(**metagenrl.PRESETS["thesis"]))
    expected = THESIS | THESIS_ROWS[row, label]
    assert {name: getattr(args, name) for name in expected} == expected


def test_rl2_and_epg_have_the_thesis_budgets():
    """Footnote 6 and section A.2.3: 100 M and 1 G environment steps; V = 64, M = 64 and 128 updates of an inner loop."""
    epg, rl2 = metagenrl.EPGArgs(), metagenrl.RL2Args()
    assert (2 * epg.pairs, epg.life_steps) == (64, 128 * 64)
    assert epg.generations * 2 * epg.pairs * epg.life_steps == pytest.approx(10**9, rel=1e-3)
    assert rl2.trial_steps == 100_000_000 and rl2.units == 64


# ---- the command line --------------------------------------------------------------------------------------------------
TINY = "--preset laptop --envs point_mass pendulum --test-envs continuous_cartpole --env-steps 96 --test-steps 40 --num-envs 4"
TINY += " --population 4 --hidden 8 --objective-units 4 --objective-filters 4 --length 4 --batch-size 4 --random-steps 20"
TINY += " --frozen-steps 20 --anneal-steps 20 --reset-every 40 --checkpoint-every 10 --log-every 4 --test-seeds 2"
TINY += " --evaluations 2 --episodes 1"


def short_episodes(patch=setattr):
    for env in (tasks.PointMass, classic.Pendulum, cartpole.ContinuousCartPole):
        patch(env, "max_steps", 20)


def command(run_dir, flags, launcher=None, tiny=TINY):
    """With short episodes, of which evaluations and trials are made."""
    launcher = launcher and launcher._replace(before=short_episodes)
    with pytest.MonkeyPatch.context() as patch:
        short_episodes(patch.setattr)
        return run_script("metagenrl.py", run_dir, f"{tiny} {flags}", launcher)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run as a user types it."""
    folder = tmp_path_factory.mktemp("runs")
    done = command(folder, "--run-name done --objectives 2 --progress --each", launcher=PROCESS)
    assert done.returncode == 0, done.stderr
    return folder / "done", done.stdout


def test_what_a_run_leaves_behind(finished):
    folder, output = finished
    names = {path.name for path in folder.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "results.json", "returns.png"} <= names
    results = json.loads((folder / "results.json").read_text())
    assert results["script"] == "metagenrl" and results["agents_reset"] == 0 and results["parameters"] > 300
    actual = {(row["learner"], row["task"], row["novelty"]) for row in results["results"]}
    learners = {"metagenrl", "untrained", "td3", "reinforce-off"} | {f"metagenrl, {part} %" for part in (40, 60, 80)}
    tasks = {("point_mass", "none"), ("pendulum", "none"), ("continuous_cartpole", "domain")}
    assert actual == {(learner, *task) for learner in learners for task in tasks}
    for row in results["results"]:
        assert row["metric"] == "return" and row["seeds"] == 4 and row["step"] in (0, 20, 40)
        assert len(row["values"]) == 4 and sum(row["values"]) / 4 == pytest.approx(row["mean"], rel=1e-5)
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 6
    columns = [f"{env}_{name}" for env in ("point_mass", "pendulum") for name in ("meta_loss", "reward", "reward_std")]
    assert lines[0].split(",")[2:] == columns
    assert saved_state(folder)["['history']"].shape[:2] == (6, 2)  # 5, 14 and 20 % are from before policies are trained
    assert all(learner in output for learner in learners)


def saved_state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]


def test_kill_and_resume_end_in_the_same_numbers(finished, tmp_path):
    """Killed between two lines of metrics.csv, and then in the meta-test."""
    folder = tmp_path / "killed"
    first = f"{TINY} --objectives 2 --progress --each --run-name killed"
    for flags, launcher in ((first, killed(nth=2)), (f"--resume {folder}", killed("meta_test.pt", 2))):
        assert command(tmp_path, flags, launcher, tiny="").returncode == -signal.SIGKILL
        assert (folder / "checkpoint.pt").exists() and not (folder / "results.json").exists()
    resumed = command(tmp_path, f"--resume {folder}", tiny="")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(folder) == rows(finished[0])
    ours, theirs = saved_state(folder), saved_state(finished[0])
    assert torch.equal(ours["['alpha']"], theirs["['alpha']"]) and torch.equal(ours["['history']"], theirs["['history']"])
    metrics = [[line.split(",") for line in (path / "metrics.csv").read_text().splitlines()] for path in (folder, finished[0])]
    without_seconds = [[[step, *values] for step, _, *values in lines] for lines in metrics]
    assert without_seconds[0] == without_seconds[1]


def test_of_a_run_that_was_stopped_only_parts_that_were_reached_are_tested(tmp_path):
    """Killed after 10 of 24 meta-steps: 40 % were reached, and the objective after 60 and 80 % does not exist."""
    assert command(tmp_path, "--run-name cut --baselines", launcher=killed(nth=2)).returncode == -signal.SIGKILL
    done = command(tmp_path, f"--mode test --checkpoint {tmp_path / 'cut'} --progress --run-name test", tiny="")
    assert done.returncode == 0, done.stderr
    assert {row["learner"] for row in rows(tmp_path / "test")} == {"metagenrl", "metagenrl, 40 %"}


def test_the_shipped_objective_trains_agents_where_it_was_not_meta_trained(tmp_path):
    """-52.9 and -80.7 when it was measured; -70 to -90 without learning."""
    flags = "--mode test --checkpoint pretrained --test-envs reacher --no-test-seen --baselines untrained --run-name shipped"
    done = command(tmp_path, f"{flags} --test-steps 5000 --test-seeds 4 --evaluations 1", tiny="")
    assert done.returncode == 0, done.stderr
    ends = {row["learner"]: row["mean"] for row in rows(tmp_path / "shipped") if row["step"] == 5000}
    assert ends["metagenrl"] > -65 and ends["metagenrl"] > ends["untrained"] + 10


def test_environments_of_gymnasium_resume_in_the_same_numbers_too(tmp_path):
    flags = "--envs MountainCarContinuous-v0 --test-envs --no-test-seen --baselines --reset-every 0 --env-steps 64"
    flags += " --test-envs pendulum --population 2"
    done = command(tmp_path, f"{flags} --run-name done")
    assert done.returncode == 0, done.stderr
    assert command(tmp_path, f"{flags} --run-name killed", launcher=killed(nth=2)).returncode == -signal.SIGKILL
    resumed = command(tmp_path, f"--resume {tmp_path / 'killed'}", tiny="")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "killed") == rows(tmp_path / "done")


def test_a_checkpoint_tested_again_gives_the_same_numbers_and_trains_agents_elsewhere(finished, tmp_path):
    flags = f"--mode test --checkpoint {finished[0] / 'checkpoint.pt'}"
    done = command(tmp_path, f"{flags} --run-name test", tiny="")
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "test") == rows(finished[0])
    small = tmp_path / "small.pt"  # a file as it would be shipped, of objectives alone
    metagenrl.checkpoints.export(finished[0] / "checkpoint.pt", small)
    assert small.stat().st_size < 30_000 and torch.equal(
        metagenrl.LearnedObjective.load(small, 1).alpha, metagenrl.LearnedObjective.load(finished[0] / "checkpoint.pt", 1).alpha
    )
    flags = f"--mode test --checkpoint {small} --no-progress --run-name far --no-test-seen --baselines"
    done = command(tmp_path, f"{flags} --test-envs Pendulum-v1 --num-envs 1 --exploration-noise 0.1", tiny="")
    assert done.returncode == 0, done.stderr
    assert {row["task"] for row in rows(tmp_path / "far")} == {"Pendulum-v1"}


def test_two_processes_equal_one(finished, tmp_path):
    done = command(tmp_path, "--run-name two --objectives 2 --progress", launcher=TWO)
    assert done.returncode == 0, done.stderr
    ours, theirs = saved_state(tmp_path / "two"), saved_state(finished[0])
    torch.testing.assert_close(ours["['alpha']"], theirs["['alpha']"], rtol=1e-3, atol=1e-4)
    for group in ("['groups'][0]", "['groups'][1]"):  # every agent, whichever process it was in
        for state in (ours[group], theirs[group]):
            state["meta_loss_sum"] = state["meta_loss_sum"].mean()  # each process holds the mean of its agents
        torch.testing.assert_close(ours[group], theirs[group], rtol=1e-2, atol=1e-3)
    for one, other in zip(rows(tmp_path / "two"), rows(finished[0]), strict=True):
        assert one["learner"] == other["learner"] and one["mean"] == pytest.approx(other["mean"], rel=1e-2, abs=1e-3)


def test_a_run_of_two_processes_goes_on_with_one(finished, tmp_path):
    """A checkpoint holds the agents of all processes."""
    flags = "--objectives 2 --progress --run-name two"
    assert command(tmp_path, flags, launcher=killed(nth=2, world=2)).returncode != 0
    folder = tmp_path / "two"
    assert (folder / "checkpoint.pt").exists() and not (folder / "results.json").exists()
    assert command(tmp_path, f"--resume {folder}", tiny="").returncode == 0
    alphas = [saved_state(path)["['alpha']"] for path in (folder, finished[0])]
    torch.testing.assert_close(*alphas, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("learner", ["epg", "rl2", "ppo"])
def test_other_learners(learner, tmp_path):
    """Meta-learned by evolution, in the activations of an LSTM, and not at all; killed, resumed, and meta-tested elsewhere."""
    flags = f"--learner {learner} --baselines reinforce-on --ppo.num-steps 16 --ppo.update-epochs 2 --checkpoint-every 2"
    flags += " --epg.generations 4 --epg.pairs 2 --epg.life-steps 40 --rl2.trial-steps 480 --rl2.trials 2 --rl2.units 5"
    flags += " --rl2.num-minibatches 2 --rl2.epochs 2"
    done = command(tmp_path, f"{flags} --run-name done")
    assert done.returncode == 0, done.stderr
    actual = {(row["learner"], row["task"], row["seeds"]) for row in rows(tmp_path / "done")}
    tasks = ("point_mass", "pendulum", "continuous_cartpole")
    assert actual == {(name, task, 2) for name in (learner, "reinforce-on") for task in tasks}
    launcher = killed("meta_test.pt" if learner == "ppo" else "checkpoint.pt", nth=2)
    assert command(tmp_path, f"{flags} --run-name killed", launcher).returncode == -signal.SIGKILL
    resumed = command(tmp_path, f"--resume {tmp_path / 'killed'}", tiny="")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "killed") == rows(tmp_path / "done")
    flags = f"--mode test --checkpoint {tmp_path / 'done' / 'checkpoint.pt'} --run-name test --baselines"
    assert command(tmp_path, flags, tiny="").returncode == 0
    again = [row for row in rows(tmp_path / "done") if row["learner"] == learner]
    assert rows(tmp_path / "test") == again


CHECKPOINT = "--mode test --checkpoint {done}/checkpoint.pt"
def test_an_objective_from_python(finished, tmp_path):
    """It is the objective of the run, for any number of action dimensions, and a policy can descend it."""
    path = finished[0] / "checkpoint.pt"
    learned = metagenrl.LearnedObjective.load(path)
    s, steps, b = 30, 6, 3
    taken, policy = torch.rand(2, s, steps, b, generator=DRAWS) * 2 - 1
    rewards, values, next_values, times = torch.randn(4, s, steps, generator=DRAWS)
    mask = (torch.rand(s, steps, generator=DRAWS) < 0.8).float()
    ended = (torch.rand(s, steps, generator=DRAWS) < 0.1).float()
    batch = metagenrl.Batch(taken[None], taken[None], rewards[None], ended[None], times[None], taken[None], mask[None])
    inputs = (policy[None], values[None], next_values[None])
    expected = metagenrl.objective(learned.args, learned.nets, learned.alpha[None], batch, *inputs)
    policy.requires_grad_()
    loss = learned(taken, policy, rewards, values, next_values, times, mask, ended)
    torch.testing.assert_close(loss.detach(), (expected.sum() / mask.sum()))
    loss.backward()
    assert policy.grad[mask > 0].abs().max() > 0 and policy.grad[mask == 0].abs().max() == 0
    with torch.no_grad():
        lower = policy - 1e-2 * policy.grad / policy.grad.norm()
        lower = learned(taken, lower, rewards, values, next_values, times, mask, ended)
    assert lower < loss

    other, value = policy.detach().requires_grad_(), values.clone().requires_grad_()
    learned(taken.double(), other, rewards, value, next_values, times, mask, ended).backward()
    assert value.grad is None and torch.equal(other.grad, policy.grad)

    with pytest.raises(ValueError, match="Actions have to be"):
        learned(taken, policy, rewards[:, :5], values, next_values, times)
    with pytest.raises(ValueError, match="Actions have to be"):
        learned(*(x[:, :0] for x in (taken, policy, rewards, values, next_values, times)))
    old, other = torch.load(path, weights_only=True), tmp_path / "old.pt"
    alpha = old["state"]["['alpha']"]
    for part in (alpha[:, :-8], alpha.double(), [1.0]):  # of other networks, of another type
        metagenrl.checkpoints.write(other, old | {"state": {"['alpha']": part}})
        with pytest.raises(metagenrl.UserError, match="not a checkpoint of this"):
            metagenrl.LearnedObjective.load(other)
    for part in ({"step": 0}, {"args": old["args"] | {"learner": "td3"}}):  # nothing was meta-learned
        metagenrl.checkpoints.write(other, old | part)
        with pytest.raises(metagenrl.UserError, match="with a meta-learned objective"):
            metagenrl.LearnedObjective.load(other)
    with pytest.raises(IndexError):
        metagenrl.LearnedObjective.load(path, index=99)
    with pytest.raises(metagenrl.CheckpointError, match="There is no checkpoint"):
        metagenrl.LearnedObjective.load(path.parent / "none.pt")


def test_the_agent_on_the_results_page_runs(monkeypatch, capsys):
    """Two episodes, in the second of which its policy follows the objective."""
    page = (ROOT / ".github" / "results" / "metagenrl.md").read_text().split("## Use it\n")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in page.splitlines() if not line or line.startswith("    "))
    shorter = {"range(50)": "range(2)", "episode >= 10": "episode >= 1"}
    for one, other in shorter.items():
        assert one in code
        code = code.replace(one, other)
    assert len(list(filter(None, code.splitlines()))) < 45
    losses, call = [], metagenrl.LearnedObjective.__call__
    monkeypatch.setattr(metagenrl.LearnedObjective, "__call__", lambda *x: losses.append(call(*x)) or losses[-1])
    names = {}
    exec(code, names)
    assert capsys.readouterr().out.count("return: -") == 2 and len(losses) == 200
    assert all(parameter.isfinite().all() for net in ("policy", "critic") for parameter in names[net].parameters())
    steps = [names["adam"].state[next(names[net].parameters())]["step"] for net in ("policy", "critic")]
    assert steps == [200, 400]


REFUSED = {
    "--envs cartpole": "cartpole has discrete actions",
    "--envs CartPole-v1": "CartPole-v1 has discrete actions",
    "--envs pendulun": "no environment pendulun",
    "--test-envs Hoper-v4": "cannot make Hoper-v4",
    "--envs": "--envs needs",
    "--test-envs --no-test-seen": "needs --test-envs",
    "--population 5": "--population 5 cannot be distributed",
    "--objective-filters 3": "--objective-filters has to be even",
    "--env-steps 3": "at least --num-envs",
    "--frozen-steps 40": "--frozen-steps, in which policies are not trained, has to be less than --test-steps",
    "--env-steps 20": "--frozen-steps, in which policies are not trained, has to be less than --env-steps",
    "--reset-every 4": "has to be less than four times --reset-every",
    "--learner epg --epg.pairs 1 --epg.life-steps 20": "has to be less than --epg.life-steps",
    "--envs pendulum pendulum": "--envs names an environment twice",
    "--exploration-noise 0.1 0.2 0.3": "--num-envs has to be a multiple",
    "--reset-every 3": "at least --num-envs",
    "--evaluations 11": "--evaluations has to be at most",
    "--baselines ppo --ppo.num-steps 44": "--ppo.num-steps has to be at most",
    "--exploration-noise": "--exploration-noise needs",
    "--exploration-noise 0": "reinforce-off",
    "--exploration-noise nan": "--exploration-noise has to be",
    "--inputs": "--inputs needs",
    "--gamma 1.01": "--gamma has to be",
    "--ppo.clip-coef 1.5": "--ppo.clip-coef has to be",
    "--baselines epg": "epg is meta-learned in a run of its own",
    "--learner epg --baselines --objectives 2": "leave out --objectives",
    "--learner rl2 --baselines --rl2.sizes 3 9": "RL.2 needs at least --rl2.sizes 6 2",
    "--learner rl2 --baselines --rl2.trials 6": "--rl2.trials has to be a multiple of 4",
    "--learner td3 --progress": "td3 has none",
    f"{CHECKPOINT} --learner epg": "keeps its --learner",
    f"{CHECKPOINT} --inputs reward": "keeps its --inputs",
    f"{CHECKPOINT} --objective-units 7": "checkpoint.pt has no 'alpha'",
    f"{CHECKPOINT} --objectives 3": "A checkpoint keeps its --objectives",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(flags, finished, complain, tmp_path):
    tiny = "" if "--mode test" in flags else TINY
    message = complain("metagenrl", f"{tiny} {flags}".format(done=finished[0]))
    assert re.search(REFUSED[flags], message), message
    assert not list(tmp_path.iterdir())


# ---- what a release has to reach: python -m pytest -m slow -------------------------------------------------------------
@pytest.mark.slow
def test_one_td3_agent_runs_like_a_cheetah(tmp_path):
    """40,000 steps with the networks of TD3 (Fujimoto et al. 2018); 3,791 when it was measured."""
    flags = "--learner td3 --baselines --preset thesis --device cpu --envs half_cheetah --test-envs --length 1 --layers 2"
    flags += " --hidden 256 --test-steps 40000 --test-seeds 1 --evaluations 8 --episodes 2 --no-compile --run-name td3"
    line = [sys.executable, str(ROOT / "metagenrl.py"), "--run-dir", str(tmp_path), *flags.split()]
    subprocess.run(line, check=True, cwd=tmp_path)
    assert max(rows(tmp_path / "td3"), key=lambda row: row["step"])["mean"] > 2500


@pytest.mark.slow
def test_the_laptop_preset_reaches_its_floors(tmp_path):
    """`python metagenrl.py`: agents trained by the learned objective end above those of the untrained one and of off-policy
    REINFORCE in both environments that it never saw, and above where they began."""
    start = time.time()
    line = [
        sys.executable,
        str(ROOT / "metagenrl.py"),
        "--run-dir",
        str(tmp_path),
        "--run-name",
        "laptop",
        "--preset",
        "laptop",
    ]
    subprocess.run(line, check=True, cwd=tmp_path)
    assert time.time() - start < 600
    actual = rows(tmp_path / "laptop")
    last = max(row["step"] for row in actual)
    ends = {(row["learner"], row["task"]): row["mean"] for row in actual if row["step"] == last}
    begins = {row["task"]: row["mean"] for row in actual if row["step"] == 0 and row["learner"] == "metagenrl"}
    for task in ("pendulum", "reacher"):
        ours = ends["metagenrl", task]
        assert ours > begins[task] and ours > ends["untrained", task] and ours > ends["reinforce-off", task]
