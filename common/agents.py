"""Many agents in copies of one environment: their parameters, replay buffers, and sub-trajectories
from these.

    env = envs.make("pendulum", num_envs=20)  # five agents, four copies each
    agents = Agents(env, init, total=5, own=torch.arange(5), capacity=1000)
    for now in range(100):
        agents.step_async(policy(agents.state["phi"], agents.state["obs"]))  # actions (p, e, b)
        agents.step_wait(now)
    draws = agents.draws(torch.rand, 32, 2)
    batch = sub_trajectories(env, agents.state, torch.tensor(100), draws, length=20)  # 32 of each

Everything that belongs to the agents is in `agents.state`, a dict of tensors with an axis of agents.
So an update is a function from one state to the next, which torch.compile can take, and `state_dict`
is all that a checkpoint needs if the environment is resumable.

Under torch.distributed each process has some of the agents. All processes draw the random numbers
of all agents, so the agents of N processes are those of one.

Axes: p agents, e copies of the environment that an agent acts in, s sub-trajectories in a batch, t
time, a observations, b action dimensions.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Batch(NamedTuple):
    """Sub-trajectories of p agents. Where an episode ended early, mask is 0."""

    obs: Tensor  # (p, s, t, a)
    action: Tensor  # (p, s, t, b), taken
    reward: Tensor  # (p, s, t)
    terminated: Tensor  # (p, s, t)
    time: Tensor  # (p, s, t), from 0 at the beginning of an episode to 1 at its time limit
    next_obs: Tensor  # (p, s, t, a)
    mask: Tensor  # (p, s, t)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean (p,) of x (p, s, t) where mask is 1."""
    return (x * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation (p,) of x (p, s, t) where mask is 1."""
    return masked_mean((x - masked_mean(x, mask)[:, None, None]) ** 2, mask).sqrt()


def standardized(x: Tensor, mask: Tensor) -> Tensor:
    """x (p, s, t) with mean zero and deviation one over an agent's batch."""
    return (x - masked_mean(x, mask)[:, None, None]) / (masked_std(x, mask)[:, None, None] + 1e-5)


class Agents:
    """Agents in copies of one environment; under torch.distributed those of this process.

    env: an environment of common/envs, e copies for each agent of this process.
    init(n): initial parameters of n agents on the CPU, by name, each (..., n, d).
    total, own (p,): the number of agents in all processes, and which of them this process has.
        Agents of the same number have the same initial parameters and random numbers.
    capacity: steps of each copy that a replay buffer holds.
    metrics: names for `note`. deviations: those of them that `means` also gives the deviation of.

    state: the parameters; age (p,) in environment steps; first_step (p,), the step of its copies at
    which an agent was reset; diverged (p,), how often since it was not finite; buffer (p, e, capacity,
    ...); obs (p, e, a), to act on next; sums and counts of metrics; and the environment's state.
    rewards (p,): of the last step, means over copies.
    external: the environment has a state of its own, as gymnasium's, and steps in a thread.
    """

    def __init__(
        self,
        env: Any,
        init: Callable[[int], State],
        total: int,
        own: Tensor,
        capacity: int,
        metrics: tuple[str, ...] = (),
        deviations: tuple[str, ...] = (),
    ):
        self.env = env
        self.init = init
        self.total = total
        self.own = own.to(env.device)
        self.device = env.device
        self.copies = env.num_envs // len(own)
        self.sharded = dist.is_initialized() and len(own) < total
        self.external = not env.resumable
        self.pool = ThreadPoolExecutor(1) if self.external else None
        self.capacity = capacity
        self.metrics = metrics
        self.deviations = deviations
        self.begin()

    def begin(self) -> None:
        """Initial parameters, empty buffers and new episodes for all agents."""
        p, device = len(self.own), self.device
        initial = self.initial()
        self.parameters = tuple(initial)
        width = 2 * self.env.obs_size + self.env.action_size + 4
        self.state = {"buffer": torch.zeros(p, self.copies, self.capacity, width, device=device)}
        for name in ("age", "first_step", "diverged"):
            self.state[name] = torch.zeros(p, dtype=torch.int64, device=device)
        for name in self.metrics:
            self.state[f"{name}_sum"] = torch.zeros(p, device=device)
            self.state[f"{name}_count"] = torch.zeros_like(self.state["age"])
        self.state |= initial
        self.reset_envs(0)

    def draws(self, draw: Callable, *shape: int) -> Tensor:
        """Random numbers (p, *shape) by torch.rand or torch.randn."""
        return draw(self.total, *shape, device=self.device)[self.own]

    def initial(self) -> State:
        """Initial parameters of this process' agents."""
        params = self.init(self.total)
        return {name: x.to(self.device).index_select(-2, self.own) for name, x in params.items()}

    # ---- resets ----------------------------------------------------------------------------------
    def reset_envs(self, now: int) -> None:
        """New episodes everywhere; now: steps of each copy so far."""
        buffer, ended = self.state["buffer"], self.env.obs_size + self.env.action_size + 3
        buffer[:, :, (now - 1) % buffer.shape[2], ended] = 1
        draws = self.draws(torch.rand, self.copies, self.env.lifetime_draws)
        world, obs = self.env.reset(draws.flatten(0, 1))
        self.keep(world, obs)

    def reset_agents(self, now: int, where: Tensor) -> None:
        """Initial parameters and empty buffers for the agents in `where` (p,)."""
        for name, initial in self.initial().items():
            self.state[name] = torch.where(where[:, None], initial, self.state[name])
        self.state["age"] = torch.where(where, 0, self.state["age"])
        self.state["first_step"] = torch.where(where, now, self.state["first_step"])

    def reset_diverged(self, now: int, *names: str) -> None:
        """Reset, and count, the agents of which one of these parameters is not finite."""
        finite = [self.state[name].isfinite().all(-1).view(-1, len(self.own)).all(0) for name in names]
        diverged = ~torch.stack(finite).all(0)
        anywhere = diverged.any().float()
        if self.sharded:
            dist.all_reduce(anywhere)
        if anywhere:  # all processes draw initial parameters, or none
            self.reset_agents(now, diverged)
            self.state["diverged"] = self.state["diverged"] + diverged

    # ---- steps -----------------------------------------------------------------------------------
    def step_async(self, action: Tensor) -> None:
        """Take the actions (p, e, b). An external environment steps in a thread until `step_wait`."""
        before = {name[4:]: x for name, x in self.state.items() if name.startswith("env_")}
        draws = self.draws(torch.rand, self.copies, self.env.num_draws).flatten(0, 1)
        step = partial(self.env.step, before, action.flatten(0, 1), draws)
        self.pending = before, action, self.pool.submit(step).result if self.external else step

    def step_wait(self, now: int) -> None:
        """Add the transitions to the buffers. now: steps of each copy before this one."""
        before, action, step = self.pending
        world, step = step()
        time = before["steps"] / max(1, (self.env.max_steps or 1000) - 1)
        ended = step.terminated | step.truncated
        rest = torch.stack([step.reward, step.terminated, time, ended], -1)
        obs, buffer = self.state["obs"], self.state["buffer"]
        transition = torch.cat([obs.flatten(0, 1), action.flatten(0, 1), rest, step.final_obs], -1)
        buffer[:, :, now % buffer.shape[2]] = transition.unflatten(0, (-1, self.copies))
        self.keep(world, step.obs)
        self.state["age"] = self.state["age"] + self.copies
        self.rewards = step.reward.unflatten(0, (-1, self.copies)).mean(1)

    def keep(self, world: State, obs: Tensor) -> None:
        """Put the environment's state, and the observations to act on next, into the agents' state."""
        self.state |= {f"env_{name}": x for name, x in world.items()}
        self.state["obs"] = obs.unflatten(0, (-1, self.copies))

    def latest(self, now: int, steps: int) -> tuple[Batch, Tensor]:
        """The last steps of every copy (p, e, t) in order, and where episodes ended."""
        buffer = self.state["buffer"]
        return unpacked(self.env, buffer[:, :, torch.arange(now - steps, now) % buffer.shape[2]])

    def of_all(self, value: Tensor) -> Tensor:
        """Numbers (total,) of the agents of all processes, from those (p,) of this one's. Several may
        have the same agent."""
        if not self.sharded:
            return value
        sums = torch.zeros(2, self.total, device=self.device)
        sums[:, self.own] = torch.stack([value.float(), torch.ones_like(self.own).float()])
        dist.all_reduce(sums)
        return sums[0] / sums[1]

    # ---- metrics ---------------------------------------------------------------------------------
    def note(self, name: str, value: Tensor) -> None:
        """Add a value, () or (p,), to a metric."""
        total, count = self.state[f"{name}_sum"], self.state[f"{name}_count"]
        self.state |= {f"{name}_sum": value + total * (count > 0), f"{name}_count": count + 1}

    def means(self) -> dict[str, Tensor]:
        """The mean of each metric over all agents of all processes since the last call; without a value
        since then, the last mean again. As NAME_std its standard deviation over agents."""
        means = {}
        for name in self.metrics:
            total, count = self.state[f"{name}_sum"], self.state[f"{name}_count"].clamp(min=1)
            self.state |= {f"{name}_sum": total / count, f"{name}_count": torch.zeros_like(count)}
            means[name] = self.mean_over_processes(total.mean() / count[0])
            if name in self.deviations:
                squares = (total / count - means[name]) ** 2
                means[f"{name}_std"] = self.mean_over_processes(squares.mean()).sqrt()
        return means

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """Of numbers (), each the mean over the agents of a process."""
        if self.sharded:
            dist.all_reduce(value)
            value = value / dist.get_world_size()
        return value

    # ---- checkpoints -----------------------------------------------------------------------------
    def state_dict(self) -> State:
        """The state of all agents of all processes."""
        whole = {}
        for name, x in self.state.items():
            x = x.unflatten(0, (-1, self.copies)) if name.startswith("env_") else x
            parts = [x]
            if self.sharded:
                parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, x.contiguous())
            axis = self.axis(name)
            whole[name] = torch.stack(parts, axis + 1).flatten(axis, axis + 1)
        return whole

    def load_state_dict(self, whole: State) -> None:
        """The opposite, on any number of processes. Raises KeyError, TypeError or RuntimeError where a
        part is missing or does not fit."""
        for name, own in self.state.items():
            if whole[name].dtype != own.dtype:
                raise TypeError(f"{name} has to be of {own.dtype}")
            x = whole[name].to(self.device).index_select(self.axis(name), self.own)
            self.state[name] = x.view(own.shape)

    def axis(self, name: str) -> int:
        """Which axis of a part of the state is the agents'."""
        return self.state[name].ndim - 2 if name in self.parameters else 0


def sub_trajectories(env: Any, state: State, now: Tensor, draws: Tensor, length: int) -> Batch:
    """Sub-trajectories of `length` steps, each within an episode, from every agent's buffer: copy and
    first step are uniform. now (): steps of each copy so far; draws (p, s, 2) uniform."""
    buffer = state["buffer"]
    p, e, capacity, _ = buffer.shape
    size = (now - state["first_step"]).clamp(max=capacity)[:, None, None]
    high = torch.stack([torch.full_like(size, e), size], -1)[:, 0]
    copy, first = (draws * high).long().unbind(-1)
    t = first[..., None] + torch.arange(length, device=draws.device)
    agent = torch.arange(p, device=draws.device)[:, None, None]
    batch, ended = unpacked(env, buffer[agent, copy[..., None], (now - size + t) % capacity])
    after_end = F.pad(ended.cumsum(-1)[..., :-1], (1, 0)) > 0
    return Batch(*batch[:-1], ((t < size) & ~after_end).to(ended.dtype))


def unpacked(env: Any, steps: Tensor) -> tuple[Batch, Tensor]:
    """Entries of a buffer as a batch without a mask, and where episodes ended."""
    a, b = env.obs_size, env.action_size
    obs, action, *scalars, next_obs = steps.split([a, b, 1, 1, 1, 1, a], -1)
    reward, terminated, time, ended = (x[..., 0] for x in scalars)
    return Batch(obs, action, reward, terminated, time, next_obs, torch.ones_like(reward)), ended


def mean_returns(
    env: Any,
    act: Callable[[Tensor], Tensor],
    total: int,
    seed: int,
    own: Tensor | None = None,
) -> Tensor:
    """Mean return (p,) of an episode in each copy of an environment, always in the starting states
    that `seed` decides. act: observations (p, e, a) -> actions (p, e, b). own (p,): the agents of
    this process among all `total` (default: all), each with the starting states that it has there."""
    own = torch.arange(total, device=env.device) if own is None else own
    p, e = len(own), env.num_envs // len(own)
    generator = torch.Generator(env.device).manual_seed(seed)

    def draw(size: int) -> Tensor:
        return torch.rand(total, e, size, generator=generator, device=env.device)[own].flatten(0, 1)

    world, obs = env.reset(draw(env.lifetime_draws))
    returns, alive = torch.zeros(2, env.num_envs, device=env.device)
    alive += 1
    for _ in range(env.max_steps or 1000):
        action = act(obs.unflatten(0, (p, -1))).flatten(0, 1)
        world, step = env.step(world, action, draw(env.num_draws))
        returns += alive * step.reward
        alive *= 1 - (step.terminated | step.truncated).to(alive.dtype)
        obs = step.obs
        if (alive.device.type == "cpu" or not env.resumable) and not alive.any():  # a GPU would wait
            break
    return returns.unflatten(0, (p, -1)).mean(-1)
