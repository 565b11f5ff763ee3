"""PPO (Schulman et al. 2017) for many agents at once, each with networks of its own.

    ppo = PPO(agents=16, num_envs=4, updates=100)
    env = envs.make("cartpole", 16 * 4)
    agents = PPOAgents(ppo, env)
    for update in range(ppo.updates):
        rollout = agents.update(update)  # rollout.reward (p, e, t)
    policy = agents.policy(obs)  # obs (p, ..., a)

All agents learn in one batch, each as it would alone, in far less time than one after the other. The
environments are one object with the interface of common.envs.base. To continue where a program
stopped, keep what `PPOAgents.state` returns, restore it in place, and torch's random state with it.

Details are CleanRL's: orthogonal weights, a linear schedule of the rate, observations and rewards by
running moments, normalised advantages, clipped values. One differs: a time limit does not end a
return, the value of the state that was reached continues it.

Axes: p agents, e copies of the environment that an agent acts in, t time, m steps of a minibatch,
a observations, b actions (choices, or dimensions).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from common.flags import Count, Positive, PositiveOrZero, Share, Size


@dataclass
class PPO:
    """PPO (Schulman et al. 2017), many agents at once. Nothing here is in the thesis. Defaults are CleanRL's for continuous
    actions, but for rate, discount and lambda, with which HalfCheetah has 2,381 ± 495 after 1 M steps (two agents; with
    CleanRL's 1,765 ± 45, three agents)."""

    agents: Size = 16
    """p, agents in each environment."""
    num_envs: Size = 8
    """e, copies of its environment that an agent acts in (CleanRL: 1, as many steps in all)."""
    updates: Size = 488
    """u, updates of each agent (CleanRL: as many, 1 M steps)."""
    num_steps: Size = 256
    """Steps of every copy between updates (CleanRL: 2,048)."""
    update_epochs: Size = 10
    """Passes through a rollout."""
    num_minibatches: Count = 32
    """Parts of a rollout, each for a step of Adam."""
    lr: Positive = 1e-3
    """Adam's learning rate (CleanRL: 3e-4); falls linearly to zero."""
    gamma: Share = 0.98
    """Discount (CleanRL: 0.99)."""
    gae_lambda: Share = 0.92
    """lambda of the generalised advantage estimate (CleanRL: 0.95)."""
    clip_coef: Positive = 0.2
    """How far probabilities may move."""
    ent_coef: PositiveOrZero = 0.0
    """Weight of the entropy."""
    vf_coef: PositiveOrZero = 0.5
    """Weight of the value's error."""
    max_grad_norm: Positive = 0.5
    """Largest norm of the gradient."""
    normalised: bool = True
    """Observations and rewards are divided by their deviations so far."""
    hidden: Size = 64
    """Units of both hidden layers of policy and value."""


class Policy(NamedTuple):
    """Distributions of actions: logits (..., b) of choices, or means (..., b) and log deviations (..., b)."""

    mean: Tensor
    log_std: Tensor | None  # None: choices

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Actions (...) int64 with uniform (..., 1), or (..., b) with normal (..., b)."""
        if self.log_std is None:
            chances = self.mean.softmax(-1).cumsum(-1)
            return (chances < uniform).sum(-1).clamp(max=self.mean.shape[-1] - 1)
        return self.mean + self.log_std.exp() * normal

    def log_prob(self, action: Tensor) -> Tensor:
        if self.log_std is None:
            return self.mean.log_softmax(-1).gather(-1, action[..., None])[..., 0]
        return -((action - self.mean) ** 2 * (-2 * self.log_std).exp() / 2 + self.log_std + math.log(2 * math.pi) / 2).sum(-1)

    def map(self, f: Callable[[Tensor], Tensor]) -> "Policy":
        """f of both tensors: an index, or another shape (..., b)."""
        return Policy(f(self.mean), None if self.log_std is None else f(self.log_std))

    def entropy(self) -> Tensor:
        if self.log_std is None:
            return -(self.mean.softmax(-1) * self.mean.log_softmax(-1)).sum(-1)
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def executed(action: Tensor, discrete: bool) -> Tensor:
    """An action as environments execute it: a choice, or numbers between their bounds."""
    return action if discrete else action.clamp(-1, 1)


def log_prob_executed(policy: Policy, action: Tensor) -> Tensor:
    """The log probability (...) of executed actions (..., b): choices as one-hot vectors, or numbers, of which those at a bound
    have the probability of all that is executed as the bound."""
    if policy.log_std is None:
        return (action * policy.mean.log_softmax(-1)).sum(-1)
    z = (action - policy.mean) / policy.log_std.exp()
    inside = -(z**2) / 2 - policy.log_std - math.log(2 * math.pi) / 2
    return torch.where(action.abs() == 1, torch.special.log_ndtr(-action * z), inside).sum(-1)


class Rollout(NamedTuple):
    """Steps between two updates (p, e, t, ...), as they are in the environment."""

    obs: Tensor  # (p, e, t, a), before
    action: Tensor  # (p, e, t) int64, or (p, e, t, b) as executed
    reward: Tensor  # (p, e, t)
    ended: Tensor  # (p, e, t), whether the episode did, 0 or 1
    policy: Policy  # (p, e, t, b), that acted


@dataclass
class Moments:
    """Means and variances of everything that each agent has observed."""

    mean: Tensor  # (p, 1, n)
    var: Tensor  # (p, 1, n)
    count: Tensor  # ()

    @staticmethod
    def init(p: int, size: int, device: torch.device) -> "Moments":
        """Before any data."""
        mean = torch.zeros(p, 1, size, device=device)
        return Moments(mean, torch.ones_like(mean), torch.full((), 1e-4, device=device))

    def update(self, x: Tensor) -> None:
        """Add x (p, e, n), in place (Chan et al. 1979)."""
        var, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
        self.count += x.shape[1]
        weight = x.shape[1] / self.count  # of x
        self.var.lerp_(var + (1 - weight) * (mean - self.mean) ** 2, weight)
        self.mean.lerp_(mean, weight)

    def standardise(self, x: Tensor, centred: bool = True) -> Tensor:
        """x (p, ..., n) by the deviation so far, at most ten of them."""
        mean, var = (value.view(-1, *[1] * (x.ndim - 2), x.shape[-1]) for value in (self.mean, self.var))
        return ((x - mean if centred else x) / (var + 1e-8).sqrt()).clamp(-10, 10)


class ActorCritic:
    """Networks of p agents, every parameter with p as its first axis: two hidden layers of tanh for the policy, two for the
    value, and log deviations that do not depend on the observation."""

    def __init__(self, ppo: PPO, env: Any):
        self.discrete, self.b = env.num_actions is not None, env.num_actions or env.action_size
        n, p = ppo.hidden, ppo.agents
        sizes = {"policy": ((env.obs_size, n, n, self.b), 0.01), "value": ((env.obs_size, n, n, 1), 1.0)}
        self.params = {}
        for name, (widths, last) in sizes.items():
            for i, (a, b) in enumerate(pairwise(widths)):
                weight = torch.linalg.qr(torch.randn(p, max(a, b), min(a, b)))[0]
                weight = weight if a >= b else weight.mT
                gain = last if i == len(widths) - 2 else math.sqrt(2)
                self.params[f"{name} weight {i}"] = (gain * weight).to(env.device)
                self.params[f"{name} bias {i}"] = torch.zeros(p, 1, b, device=env.device)
        self.params["log_std"] = torch.zeros(p, 1, self.b, device=env.device)
        for value in self.params.values():
            value.requires_grad_()

    def net(self, name: str, obs: Tensor) -> Tensor:
        """obs (p, ..., a) -> (p, ..., b)."""
        x = obs.flatten(1, -2)
        for i in range(3):
            x = torch.baddbmm(self.params[f"{name} bias {i}"], x, self.params[f"{name} weight {i}"])
            x = x.tanh() if i < 2 else x
        return x.unflatten(1, obs.shape[1:-1])

    def policy(self, obs: Tensor) -> Policy:
        """obs (p, ..., a)."""
        mean = self.net("policy", obs)
        log_std = self.params["log_std"].view(-1, *[1] * (mean.ndim - 2), self.b)
        return Policy(mean, None if self.discrete else log_std.expand_as(mean))

    def value(self, obs: Tensor) -> Tensor:
        """obs (p, ..., a) -> expected returns (p, ...)."""
        return self.net("value", obs)[..., 0]


class PPOAgents:
    """p agents that learn in an environment, each in e copies of it."""

    def __init__(self, ppo: PPO, env: Any):
        """env: p e environments with the interface of common.envs.base. All that is random is drawn from torch's generators."""
        self.ppo, self.env = ppo, env
        self.nets = ActorCritic(ppo, env)
        self.adam = torch.optim.Adam(self.nets.params.values(), ppo.lr, eps=1e-5, fused=True)
        self.world, self.obs = env.reset(torch.rand(env.num_envs, env.lifetime_draws, device=env.device))
        self.obs_moments, self.return_moments = (Moments.init(ppo.agents, size, env.device) for size in (env.obs_size, 1))
        self.returns = torch.zeros(ppo.agents, ppo.num_envs, 1, device=env.device)  # discounted, to normalise rewards

    def state(self) -> dict[str, Any]:
        """All that changes, tensors and Adam; without the environments where their state cannot be saved."""
        moments = [vars(self.obs_moments), vars(self.return_moments)]
        state = {"nets": self.nets.params, "adam": self.adam, "moments": moments, "returns": self.returns}
        return state | ({"world": self.world, "obs": self.obs} if self.env.resumable else {})

    @torch.no_grad()
    def policy(self, obs: Tensor) -> Policy:
        """The present policies, for observations (p, ..., a) as the environment has them."""
        return self.nets.policy(self.normalise(obs))

    def normalise(self, obs: Tensor) -> Tensor:
        """Observations (p, ..., a) as the networks read them."""
        return self.obs_moments.standardise(obs) if self.ppo.normalised else obs

    def update(self, number: int) -> Rollout:
        """Act for num_steps steps, then learn from them. number: of the update, from 0 on, for the schedule of the rate.
        Returns the steps."""
        ppo, nets = self.ppo, self.nets
        rollout, data = self.rollout()
        with torch.no_grad():
            value, next_value = nets.value(data["obs"]), nets.value(data["final_obs"])
        advantage = advantages(ppo, value, next_value, data["reward"], data["terminated"], rollout.ended)
        log_before = rollout.policy.log_prob(data["action"])

        self.adam.param_groups[0]["lr"] = ppo.lr * (1 - number / ppo.updates)
        batch = [data["obs"], data["action"], log_before, advantage, value, value + advantage]
        batch = [x.flatten(1, 2) for x in batch]
        for _ in range(ppo.update_epochs):
            for part in torch.randperm(batch[0].shape[1], device=self.env.device).chunk(ppo.num_minibatches):
                ppo_step(ppo, nets, self.adam, *(x[:, part] for x in batch))
        return rollout

    @torch.no_grad()
    def rollout(self) -> tuple[Rollout, dict[str, Tensor]]:
        """Steps of every agent in all its environments. Returns them, and what PPO learns from (p, e, t, ...): observations and
        rewards are normalised there, and actions as they were sampled."""
        ppo, env = self.ppo, self.env
        rollout, data = [], []
        for _ in range(ppo.num_steps):
            native = self.obs.unflatten(0, (ppo.agents, ppo.num_envs))
            if ppo.normalised:
                self.obs_moments.update(native)
            obs = self.normalise(native)
            policy, shape = self.nets.policy(obs), obs.shape[:2]
            uniform, normal = torch.rand(*shape, 1, device=env.device), torch.randn(*shape, self.nets.b, device=env.device)
            sampled = policy.sample(uniform, normal)
            action = executed(sampled, self.nets.discrete)

            draws = torch.rand(env.num_envs, env.num_draws, device=env.device)
            self.world, step = env.step(self.world, action.flatten(0, 1), draws)
            self.obs = step.obs
            reward, terminated, truncated, final_obs = (x.unflatten(0, shape).float() for x in step[1:])
            ended = terminated + truncated
            rollout.append(Rollout(native, action, reward, ended, policy))
            if ppo.normalised:
                self.returns.copy_(ppo.gamma * self.returns + reward[..., None])
                self.return_moments.update(self.returns)
                reward = self.return_moments.standardise(reward[..., None], centred=False)[..., 0]
                self.returns *= 1 - ended[..., None]
            data.append({"obs": obs, "action": sampled, "reward": reward, "terminated": terminated})
            data[-1]["final_obs"] = self.normalise(final_obs)
        return stacked(rollout), stacked(data)


def stacked(steps: list[Any]) -> Any:
    """Tensors (p, e, ...) of each step, in containers, as (p, e, t, ...)."""
    return tree_map(lambda *x: None if x[0] is None else torch.stack(x, 2), *steps)


def advantages(
    ppo: PPO, value: Tensor, next_value: Tensor, reward: Tensor, terminated: Tensor, ended: Tensor
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), all (p, e, t). next_value: of the state that a step led to. Where
    a time limit ended the episode, ended but not terminated, it continues the return."""
    delta = reward + ppo.gamma * (1 - terminated) * next_value - value
    advantage, after = torch.zeros_like(value), 0
    for t in reversed(range(value.shape[2])):
        after = delta[:, :, t] + ppo.gamma * ppo.gae_lambda * (1 - ended[:, :, t]) * after
        advantage[:, :, t] = after
    return advantage


def ppo_step(
    ppo: PPO, nets: ActorCritic, adam: torch.optim.Optimizer, obs: Tensor, action: Tensor, log_before: Tensor,
    advantage: Tensor, value: Tensor, target: Tensor,
) -> None:  # fmt: skip
    """A step of PPO on a minibatch (p, m, ...) of each agent, in place."""
    policy, new_value = nets.policy(obs), nets.value(obs)
    ratio = (policy.log_prob(action) - log_before).exp()
    advantage = (advantage - advantage.mean(1, keepdim=True)) / (advantage.std(1, keepdim=True) + 1e-8)
    near = ratio.clamp(1 - ppo.clip_coef, 1 + ppo.clip_coef)
    near_value = value + (new_value - value).clamp(-ppo.clip_coef, ppo.clip_coef)
    error = torch.maximum((new_value - target) ** 2, (near_value - target) ** 2) / 2
    loss = -torch.minimum(ratio * advantage, near * advantage) + ppo.vf_coef * error - ppo.ent_coef * policy.entropy()

    adam.zero_grad()
    loss.mean(1).sum().backward()
    grads = [x.grad for x in nets.params.values() if x.grad is not None]
    norm = sum((g**2).flatten(1).sum(1) for g in grads).sqrt()  # of each agent
    scale = (ppo.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    for g in grads:
        g *= scale[:, None, None]
    adam.step()
