"""Policy gradients: REINFORCE and PPO (Schulman et al. 2017) for many agents at once, and RL^2, an LSTM
that PPO meta-trains.

    advantage = discounted(delta, gamma * gae_lambda * (1 - ended))  # Schulman et al. 2015
    update_agents(state, policy, value, rollout, ended, clip_coef=0.2, policy_epochs=80, ...)

    net = RL2(obs_size=3, action_size=1, units=64)
    meta_train(net, [("pendulum", env)], steps, log, trial_steps=10**6, ...)
    inputs, actions, rewards, mask = net.trial(env, torch.Generator().manual_seed(0), noise=0.0)

Axes: p agents, e copies of an environment, t time, a observations, b action dimensions, d all
parameters of a network.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common import es
from common.networks import Network, adam, gradient


def discounted(x: Tensor, keep: Tensor) -> Tensor:
    """y_t = x_t + keep_t y_{t+1} over the last axis."""
    y = [torch.zeros_like(x[..., 0])]
    for t in reversed(range(x.shape[-1])):
        y.append(x[..., t] + keep[..., t] * y[-1])
    return torch.stack(y[:0:-1], -1)


def log_normal(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of actions (..., b) under a diagonal Gaussian, but for a constant."""
    z = (action - mean) / log_std.exp()
    return -(z**2 / 2 + log_std).sum(-1)


def surrogate(ratio: Tensor, advantage: Tensor, clip_coef: float) -> Tensor:
    """PPO's objective at each step; with clip_coef = inf its gradient at ratio 1 is that of REINFORCE."""
    near = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.minimum(ratio * advantage, near * advantage)


def update_agents(
    state: dict[str, Tensor],
    policy: Network,
    value: Network,
    rollout: Any,
    ended: Tensor,
    *,
    clip_coef: float,
    policy_epochs: int,
    policy_lr: float,
    target_kl: float,
    value_epochs: int,
    value_lr: float,
    gamma: float,
    gae_lambda: float,
) -> None:
    """An update of many agents, each on its own last steps, with generalised advantages of mean zero and
    deviation one: steps of Adam on whole rollouts, for policies and then for values. REINFORCE is
    clip_coef = inf and policy_epochs = 1. Changes `state`.

    state: parameters phi (p, d) and log_std (p, b) of the policies and psi (p, d) of the values, and
        moments and steps of Adam for each (common/networks.py).
    rollout: obs, action, reward, terminated and next_obs (p, e, t, ...). ended (p, e, t): where
        episodes ended; time limits bootstrap.
    target_kl: an agent's policy stays as it is once it has moved this far.
    """
    estimate, next_estimate = (value(state["psi"], obs)[..., 0] for obs in (rollout.obs, rollout.next_obs))
    delta = rollout.reward + gamma * (1 - rollout.terminated) * next_estimate - estimate
    advantage = discounted(delta, gamma * gae_lambda * (1 - ended))
    target = estimate + advantage
    advantage = advantage - advantage.mean((1, 2), keepdim=True)
    advantage = advantage / ((advantage**2).mean((1, 2), keepdim=True).sqrt() + 1e-5)
    sizes = [policy.d, rollout.action.shape[-1]]

    def log_policy(params: Tensor) -> Tensor:
        phi, log_std = params.split(sizes, -1)
        return log_normal(rollout.action, policy(phi, rollout.obs), log_std[:, None, None])

    def policy_loss(params: Tensor) -> Tensor:
        ratio = (log_policy(params) - log_before).exp()
        return -surrogate(ratio, advantage, clip_coef).mean((1, 2)).sum()

    def value_loss(psi: Tensor) -> Tensor:
        return ((value(psi, rollout.obs)[..., 0] - target) ** 2).mean((1, 2)).sum()

    log_before = log_policy(torch.cat([state["phi"], state["log_std"]], -1))
    for _ in range(policy_epochs):
        params = torch.cat([state["phi"], state["log_std"]], -1)
        close = (log_before - log_policy(params)).mean((1, 2)) < target_kl
        grads = gradient(policy_loss)(params)[0].split(sizes, -1)
        for name, g in zip(("phi", "log_std"), grads, strict=True):
            state |= adam(state, name, g, policy_lr, close)
    for _ in range(value_epochs):
        state |= adam(state, "psi", gradient(value_loss)(state["psi"])[0], value_lr, torch.ones_like(close))


class RL2(nn.Module):
    """RL^2 (Duan et al. 2016; Wang et al. 2016): one LSTM is the agent and the learning. Its inputs are
    the observation, the last action, the reward and whether an episode ended; it is not reset for two
    episodes. Fewer observations and actions than its sizes are padded with zeros."""

    def __init__(self, obs_size: int, action_size: int, units: int):
        super().__init__()
        self.a, self.b = obs_size, action_size
        self.lstm = nn.LSTM(self.a + self.b + 2, units)
        self.action = nn.Linear(units, self.b)
        self.value = nn.Linear(units, 1)
        self.log_std = nn.Parameter(torch.full((self.b,), -0.5))

    def log_policy(self, hidden: Tensor, action: Tensor) -> Tensor:
        """Of actions (..., b), as far as the environment has dimensions."""
        b = action.shape[-1]
        return log_normal(action, self.action(hidden)[..., :b], self.log_std[:b])

    def trial(
        self, env: Any, generator: torch.Generator, noise: float = 1.0, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two episodes in every copy of an environment, until all have ended: inputs (t, e, ...), actions
        (t, e, b), rewards (t, e) and the mask (t, e) of steps before the end of the second one.

        rank, world: this process and how many there are; each draws the random numbers of all."""
        e, device = env.num_envs, self.log_std.device

        def draw(by: Callable, size: int) -> Tensor:
            return by(e * world, size, generator=generator, device=device)[rank * e :][:e]

        world_state, obs = env.reset(draw(torch.rand, env.lifetime_draws))
        action = torch.zeros(e, env.action_size, device=device)
        reward = ended = episodes = torch.zeros(e, device=device)
        state, transitions = None, []
        for t in range(2 * (env.max_steps or 1000)):
            if t % 20 == 0 and (episodes >= 2).all():
                break
            inputs = [F.pad(obs, (0, self.a - obs.shape[-1])), F.pad(action, (0, self.b - action.shape[-1]))]
            inputs = torch.cat([*inputs, reward[:, None], ended[:, None]], -1)
            hidden, state = self.lstm(inputs[None], state)
            std = noise * self.log_std[: env.action_size].exp()
            action = self.action(hidden[0])[:, : env.action_size] + std * draw(torch.randn, env.action_size)
            mask = (episodes < 2).float()
            world_state, step = env.step(world_state, action, draw(torch.rand, env.num_draws))
            obs, reward, ended = step.obs, step.reward, (step.terminated | step.truncated).float()
            transitions.append((inputs, action, reward * mask, mask))
            episodes = episodes + ended
        return tuple(torch.stack(parts) for parts in zip(*transitions, strict=True))


class Experience(NamedTuple):
    """Trials in one environment, and what PPO trains on."""

    inputs: Tensor  # (t, e, ...)
    action: Tensor  # (t, e, b)
    mask: Tensor  # (t, e)
    log_before: Tensor  # (t, e), of the policy that acted
    advantage: Tensor  # (t, e), of mean zero and deviation one
    target: Tensor  # (t, e), of the value
    variance: Tensor  # (), of targets
    steps: Tensor  # (), in one process

    def part(self, index: int, parts: int) -> "Experience":
        """Every `parts`-th trial. Trials are independent, so their order does not matter."""
        own = (x[:, index::parts] for x in self[:-2])
        return Experience(*own, self.variance, self.steps / parts)


def meta_train(
    net: RL2,
    all_envs: list[tuple[str, Any]],
    steps: Callable[[int, dict], Iterator[int]],
    log: Callable[[int, dict[str, Tensor]], None],
    *,
    trial_steps: int,
    epochs: int,
    num_minibatches: int,
    lr: float,
    gamma: float,
    gae_lambda: float,
    clip_coef: float,
    max_grad_norm: float,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> None:
    """PPO on trials in all environments; within a trial, returns do not end with the first episode. An
    update has as many steps of every environment, however short its episodes are. Rewards are divided
    by the root mean square of all returns in their environment so far, since values have one head; the
    agent observes them as they are. Changes net.

    all_envs: names and environments with this process' copies, a trial in each.
    steps(n, keep): the updates to do of n, while the tensors and modules in `keep` are in checkpoints.
    log(update, metrics): called after each update.
    trial_steps: environment steps of meta-training, of all environments, without those after a trial.
    num_minibatches: parts of an update's trials, with a step of Adam for each part in each epoch.
    lr: of the first update; it falls linearly to zero.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr)
    quota = [2 * env.num_envs * world * (env.max_steps or 1000) for _, env in all_envs]  # steps in an update
    missing = torch.zeros(len(all_envs))  # of them, the steps that are not collected yet
    count = torch.zeros((), dtype=torch.int64)  # of batches of trials
    sums = torch.zeros(len(all_envs), 2, device=net.log_std.device)  # of squared returns, of steps
    keep = {"net": net, "adam": optimizer, "missing": missing, "count": count, "sums": sums}
    total = max(1, trial_steps // sum(quota))
    for update in steps(total, keep):
        optimizer.param_groups[0]["lr"] = lr * (1 - update / total)
        data, metrics = [], {}
        for i, (name, env) in enumerate(all_envs):
            missing[i] += quota[i]
            batches = []
            while missing[i] > 0:
                generator = torch.Generator(net.log_std.device).manual_seed((seed + 1) * 2**31 + int(count))
                batches.append(net.trial(env, generator, rank=rank, world=world))
                missing[i] -= float(es.all_reduce_mean(batches[-1][-1].sum()) * world)
                count += 1
            inputs, action, reward, mask = (pad_sequence(x).flatten(1, 2) for x in zip(*batches, strict=True))
            returns = discounted(reward.T, torch.full_like(reward.T, gamma))
            sums[i] += es.all_reduce_mean(torch.stack([(returns**2).sum(), mask.sum()]))
            scale = (sums[i, 0] / sums[i, 1]).sqrt() + 1e-8
            data.append(experience(net, inputs, action, reward / scale, mask, gamma, gae_lambda))
            metrics[f"{name}_return"] = es.all_reduce_mean(reward.sum(0).mean() / 2)
        for _, index in product(range(epochs), range(num_minibatches)):
            with torch.enable_grad():
                minibatches = (trials.part(index, num_minibatches) for trials in data)
                loss = sum(ppo_loss(net, trials, clip_coef) for trials in minibatches)
                optimizer.zero_grad()
                loss.backward()
            es.average_gradients(net.parameters())
            nn.utils.clip_grad_norm_(net.parameters(), max_grad_norm)
            optimizer.step()
        log(update, metrics)


def experience(
    net: RL2, inputs: Tensor, action: Tensor, reward: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> Experience:
    """Generalised advantages and targets of trials (t, e, ...)."""
    hidden, _ = net.lstm(inputs)
    value = net.value(hidden)[..., 0] * mask
    delta = reward + gamma * F.pad(value[1:], (0, 0, 0, 1)) - value
    advantage = discounted(delta.T, torch.full_like(delta.T, gamma * gae_lambda)).T
    target = value + advantage
    mean, variance, _ = moments(advantage, mask)
    advantage = mask * (advantage - mean) / (variance.sqrt() + 1e-5)
    log_before = net.log_policy(hidden, action)
    return Experience(inputs, action, mask, log_before, advantage, target, *moments(target, mask)[1:])


def ppo_loss(net: RL2, trials: Experience, clip_coef: float) -> Tensor:
    """Mean over steps. Errors of the value are in deviations of its targets, as environments pay
    differently."""
    hidden, _ = net.lstm(trials.inputs)
    ratio = (net.log_policy(hidden, trials.action) - trials.log_before).exp()
    error = trials.mask * (net.value(hidden)[..., 0] - trials.target) ** 2 / (trials.variance + 1e-3)
    return (error - surrogate(ratio, trials.advantage, clip_coef)).sum() / trials.steps


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of x where mask is 1, over all processes, and how many there are in one."""
    count = es.all_reduce_mean(mask.sum())
    mean = es.all_reduce_mean((x * mask).sum()) / count
    return mean, es.all_reduce_mean((mask * (x - mean) ** 2).sum()) / count, count
