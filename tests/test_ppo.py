"""PPO for many agents at once: distributions, moments, advantages, and agents that learn side by side."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from common import checkpoints, envs
from common.ppo import PPO, ActorCritic, Moments, Policy, PPOAgents, advantages, executed, log_prob_executed, ppo_step

SMALL = PPO(agents=3, num_envs=2, updates=6, num_steps=5, update_epochs=2, num_minibatches=2, hidden=6)
DRAWS = torch.Generator().manual_seed(0)


def make_agents(ppo, name, seed=0):
    torch.manual_seed(seed)
    return PPOAgents(ppo, envs.make(name, ppo.agents * ppo.num_envs, scaled=True))


# ---- distributions, moments, advantages ---------------------------------------------------------------------------------
def test_policies_are_those_of_torch():
    choices, action = Policy(torch.randn(5, 4), None), torch.arange(5) % 4
    theirs = torch.distributions.Categorical(logits=choices.mean)
    torch.testing.assert_close(choices.entropy(), theirs.entropy())
    torch.testing.assert_close(choices.log_prob(action), theirs.log_prob(action))
    wide, action = Policy(torch.randn(5, 3), torch.randn(5, 3)), torch.randn(5, 3)
    theirs = torch.distributions.Independent(torch.distributions.Normal(wide.mean, wide.log_std.exp()), 1)
    torch.testing.assert_close(wide.entropy(), theirs.entropy())
    torch.testing.assert_close(wide.log_prob(action), theirs.log_prob(action))
    assert [x.shape for x in wide.map(lambda x: x[:2])] == [(2, 3), (2, 3)] and choices.map(lambda x: x[:2]).log_std is None


def test_actions_are_drawn_from_the_policy():
    logits = torch.tensor([0.0, 1.0, -1.0]).expand(100_000, 3)
    action = Policy(logits, None).sample(torch.rand(100_000, 1, generator=DRAWS), torch.zeros(100_000, 3))
    torch.testing.assert_close(action.bincount() / 100_000, logits[0].softmax(-1), atol=0.01, rtol=0)
    most = Policy(logits[:1], None).sample(torch.ones(1, 1), torch.zeros(1, 3))
    assert most.tolist() == [2] and torch.equal(executed(most, True), most)
    normal = torch.randn(100_000, 1, generator=DRAWS)
    action = Policy(torch.full_like(normal, 0.5), torch.full_like(normal, -1.0)).sample(torch.zeros(100_000, 1), normal)
    assert action.mean().item() == pytest.approx(0.5, abs=0.01) and action.std().log().item() == pytest.approx(-1, abs=0.01)
    assert executed(action, False).max() == 1 < action.max()


def test_executed_actions_have_a_probability_of_one_in_all():
    """At the bounds a probability, between them a density; also where nearly all is beyond a bound."""
    inside = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None]
    bounds = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for mean, log_std in ((0.3, -0.7), (1.4, 0.2), (-2.0, -0.5)):
        policy = Policy(torch.full((1, 1), mean).double(), torch.full((1, 1), log_std).double())
        density, atoms = (log_prob_executed(policy, action).exp() for action in (inside, bounds))
        total = torch.trapezoid(density, inside[:, 0]) + atoms.sum()
        assert total.item() == pytest.approx(1, abs=1e-3) and (atoms > 0.01).any()
    log_std = torch.tensor([[-9.0]], requires_grad=True)
    far = log_prob_executed(Policy(torch.tensor([[1.5]]), log_std), torch.ones(1, 1))  # bounded, unlike a density
    far.backward()
    assert far.item() == pytest.approx(0, abs=1e-6) and log_std.grad.isfinite().all()


def test_moments_are_those_of_everything_seen():
    seen = 3 + 2 * torch.randn(2, 40, 5, generator=DRAWS)
    moments = Moments.init(2, 5, torch.device("cpu"))
    for part in seen.split([1, 7, 32], 1):
        moments.update(part)
    torch.testing.assert_close(moments.mean, seen.mean(1, keepdim=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.var, seen.var(1, keepdim=True, correction=0), rtol=1e-4, atol=1e-4)
    z = moments.standardise(seen)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(2, 5), rtol=1e-3, atol=1e-3)
    assert moments.standardise(1e6 * seen.abs(), centred=False).unique().tolist() == [10]


def test_advantages_end_with_an_episode_and_bootstrap_at_a_time_limit():
    """With lambda 1 they are discounted returns, minus values. The second step ends the episode."""
    ppo = replace(SMALL, gamma=0.5, gae_lambda=1.0)
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 2, 4)
    next_value = torch.tensor([2.0, 8.0, 4.0, 6.0]).expand(1, 2, 4)
    ended = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(1, 2, 4)
    terminated = ended * torch.tensor([[[1.0], [0.0]]])  # of the first copy; in the other one the time is up
    both = advantages(ppo, value, next_value, torch.full((1, 2, 4), 10.0), terminated, ended)
    assert both[0, 0].tolist() == [10 + 5 - 1, 10 - 2, 10 + 5 + 1.5 - 3, 10 + 3 - 4]
    assert both[0, 1].tolist() == [10 + 5 + 2 - 1, 10 + 4 - 2, 10 + 5 + 1.5 - 3, 10 + 3 - 4]
    short = advantages(replace(ppo, gae_lambda=0.0), value, next_value, torch.zeros(1, 2, 4), terminated, ended)
    assert short[0, 1].tolist() == [1 - 1, 4 - 2, 2 - 3, 3 - 4]


# ---- agents -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["hidden_goal:3", "heading:30"])
def test_agents_learn_side_by_side_as_they_would_alone(name):
    """A step of PPO for three agents is one for each of them, clipped and all."""
    env = envs.make(name, 6)
    three = ActorCritic(SMALL, env)
    obs = torch.randn(3, 8, env.obs_size, generator=DRAWS)
    policy = three.policy(obs)
    draws = torch.rand(3, 8, 1, generator=DRAWS), torch.randn(3, 8, three.b, generator=DRAWS)
    action = policy.sample(*draws).detach()
    advantage, value, target = torch.randn(3, 3, 8, generator=DRAWS)
    data = [obs, action, policy.log_prob(action).detach() + 0.3 * advantage, advantage, value, 30 * target]
    alone = []
    for agent in range(3):
        one = ActorCritic(replace(SMALL, agents=1), env)
        one.params = {key: x[agent : agent + 1].detach().clone().requires_grad_() for key, x in three.params.items()}
        ppo_step(SMALL, one, torch.optim.SGD(one.params.values(), 0.1), *(x[agent : agent + 1] for x in data))
        alone.append(one.params)
    before = {key: x.detach().clone() for key, x in three.params.items()}
    ppo_step(SMALL, three, torch.optim.SGD(three.params.values(), 0.1), *data)
    for key, x in three.params.items():
        torch.testing.assert_close(x.detach(), torch.cat([params[key] for params in alone]).detach())
    step = sum(((three.params[key] - x) ** 2).flatten(1).sum(1) for key, x in before.items()).sqrt()
    torch.testing.assert_close(step.detach(), torch.full((3,), 0.1 * SMALL.max_grad_norm), rtol=1e-3, atol=0)  # clipped


@pytest.mark.parametrize("name", ["hidden_goal:3", "heading:30"])
def test_a_step_descends_ppos_loss(name):
    """That of Schulman et al. (2017) with CleanRL's clipped values, by torch.distributions, where ratios are clipped."""
    ppo = replace(SMALL, agents=1, ent_coef=0.1, max_grad_norm=1e9)
    env = envs.make(name, 2)
    torch.manual_seed(0)
    nets = ActorCritic(ppo, env)
    obs = torch.randn(1, 8, env.obs_size)
    policy = nets.policy(obs)
    action = policy.sample(torch.rand(1, 8, 1), torch.randn(1, 8, nets.b)).detach()
    advantage, value, target = torch.randn(3, 1, 8)
    before = (policy.log_prob(action) + 0.5 * torch.randn(1, 8)).detach()
    if nets.discrete:
        theirs = torch.distributions.Categorical(logits=policy.mean)
    else:
        theirs = torch.distributions.Independent(torch.distributions.Normal(policy.mean, policy.log_std.exp()), 1)
    ratio = (theirs.log_prob(action) - before).exp()
    assert ((ratio - 1).abs() > 0.2).sum() > 2
    normalized = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    of_policy = torch.max(-normalized * ratio, -normalized * ratio.clamp(0.8, 1.2)).mean()
    new = nets.value(obs)
    near = value + (new - value).clamp(-0.2, 0.2)
    of_value = 0.5 * torch.max((new - target) ** 2, (near - target) ** 2).mean()
    loss = of_policy - 0.1 * theirs.entropy().mean() + 0.5 * of_value
    grads = torch.autograd.grad(loss, list(nets.params.values()), allow_unused=True)
    expected = [x.detach() - (0 if g is None else g) for x, g in zip(nets.params.values(), grads, strict=True)]
    data = obs, action, before, advantage, value, target
    ppo_step(ppo, nets, torch.optim.SGD(nets.params.values(), 1.0), *data)
    for x, y in zip(nets.params.values(), expected, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["hidden_goal:3", "heading:30"])
def test_rollouts_are_what_the_environment_had(name):
    """In its own units, with the policies that acted; the last update has a rate near zero."""
    agents = make_agents(replace(SMALL, ent_coef=0.01), name)
    rollout = agents.update(0)
    b = agents.env.num_actions or agents.env.action_size
    assert rollout.obs.shape == (3, 2, 5, agents.env.obs_size) and rollout.policy.mean.shape == (3, 2, 5, b)
    assert rollout.reward.shape == rollout.ended.shape == (3, 2, 5)
    assert rollout.action.shape == ((3, 2, 5) if agents.env.num_actions else (3, 2, 5, b))
    assert (rollout.policy.log_std is None) == bool(agents.env.num_actions)
    assert not any(x.requires_grad for x in (*rollout[:4], rollout.policy.mean))
    assert agents.policy(rollout.obs).mean.shape == rollout.policy.mean.shape
    before = agents.obs.view(3, 2, -1)
    assert torch.equal(agents.update(1).obs[:, :, 0], before)
    assert agents.adam.param_groups[0]["lr"] == pytest.approx(SMALL.lr * 5 / 6)


@pytest.mark.parametrize("name", ["hidden_goal:3", "heading:30"])
def test_agents_continue_where_they_stopped(name):
    first = make_agents(SMALL, name)
    for update in range(3):
        first.update(update)
    saved = deepcopy(checkpoints.state_of(first.state()))
    state = torch.get_rng_state()
    expected = [first.update(update).reward for update in range(3, 6)]
    second = make_agents(SMALL, name, seed=1)
    checkpoints.restore(second.state(), saved)
    torch.set_rng_state(state)
    for update, rewards in enumerate(expected, 3):
        assert torch.equal(second.update(update).reward, rewards)


# ---- what a release has to reach: python -m pytest -m slow --------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_ppo_solves(name):
    """CartPole: the pole is up for whole episodes of 500 steps. Pendulum: -200 in an episode of 200 steps, exploring."""
    ppo = PPO(agents=2, num_steps=128, updates=150, num_minibatches=8, gamma=0.99 if name == "cartpole" else 0.95)
    agents = make_agents(ppo, name)
    rollouts = [agents.update(update) for update in range(ppo.updates)]
    if name == "cartpole":
        assert torch.stack([rollout.ended for rollout in rollouts[-20:]]).mean() < 1 / 450
    else:
        assert torch.stack([rollout.reward for rollout in rollouts[-25:]]).mean() > -1
