"""The interface of every environment, and what all of them share: time limit and auto-reset.

`Env.reset` and `Env.step` are what a training loop calls. A `Simulation` describes one step of one
episode in `reset_env`, `get_obs` and `step_env`, named as in gymnax, from which these two are made.

Axes: p environments in parallel, a observations, b actions or action dimensions.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]  # tensors (p, ...)


class EnvError(Exception):
    """An environment cannot be made or used; the message is one sentence that says what to do."""


class Step(NamedTuple):
    """What a step of p environments returns."""

    obs: Tensor  # (p, a), to act on next: where an episode ended, the first of the next one, or
    #              with next_step_reset still the last one
    reward: Tensor  # (p,)
    terminated: Tensor  # (p,) bool, the task is over
    truncated: Tensor  # (p,) bool, the time is up
    final_obs: Tensor  # (p, a), of the state that the action led to, also where an episode ended


class Env(ABC):
    """Interface of every environment.

    `reset` starts new lifetimes and `step` takes one step, with a new episode wherever one ended.
    With `next_step_reset` the new episode begins a step later, as with gymnasium's next-step
    autoreset: that step ignores its action, pays 0 and returns the first observation.
    """

    obs_size = 0
    obs_scale: tuple[float, ...] = ()  # typical magnitude of each observation
    num_actions: int | None = None  # None: actions are continuous
    action_size = 0  # dimensions of a continuous action, each in [-1, 1]
    max_steps: int | None = None  # of an episode; None: no time limit
    episodic = True  # False: there are no episodes, and a policy is judged by its reward per step
    min_size: int | None = None  # least n of "name:n"; None: the name takes no size
    compilable = True  # False: it steps outside of PyTorch
    next_step_reset = False  # see above; `make` sets it
    resumable = True  # False: some of its state is not in `state`, so that it cannot be saved
    reset_draws = 0  # uniform numbers that reset_env takes for each environment
    step_draws = 0  # uniform numbers that step_env takes for each environment

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.dtype = dtype

    @property
    def num_draws(self) -> int:
        """Uniform numbers that `step` takes for each environment: it may also start an episode."""
        return self.reset_draws + self.step_draws

    @property
    def lifetime_draws(self) -> int:
        """Uniform numbers that `reset` takes for each environment. More than num_draws where
        something is drawn once per lifetime and outlasts its episodes."""
        return self.num_draws

    @abstractmethod
    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        """The first state and observations (p, a) of new lifetimes. draws (p, lifetime_draws)."""

    @abstractmethod
    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        """One step, and the first state of a new episode where one ended.
        action (p,) int64 or (p, b); draws (p, num_draws)."""

    def expected_rewards(self, state: State) -> Tensor | None:
        """The expected reward (p, b) of each action, for bandits; else None."""
        return None

    def speed(self, reward: Tensor, action: Tensor) -> Tensor | None:
        """For bodies the speed (...) in the rewarded direction, in steps with rewards (...) and actions
        (..., b); else None."""
        return None

    def close(self) -> None:
        """End the processes and threads of the environment, if it has any."""


class Simulation(Env):
    """Environments of which a subclass says how an episode starts and what one step of it does: time
    limits and new episodes are the same for all."""

    @abstractmethod
    def reset_env(self, draws: Tensor) -> State:
        """The first state of an episode. draws (p, reset_draws)."""

    @abstractmethod
    def get_obs(self, state: State) -> Tensor:
        """The observations (p, a) of a state."""

    @abstractmethod
    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        """The next state, the reward (p,) and whether the episode terminated (p,).
        action (p,) int64 or (p, b); draws (p, step_draws)."""

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        state = self.reset_env(draws[:, : self.reset_draws])
        state["steps"] = torch.zeros(len(draws), dtype=torch.int64, device=draws.device)
        if self.next_step_reset:
            state["ended"] = torch.zeros_like(state["steps"], dtype=torch.bool)
        return state, self.get_obs(state)

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        moved, reward, terminated = self.step_env(state, action, draws[:, self.reset_draws :])
        moved["steps"] = state["steps"] + 1

        truncated = torch.zeros_like(terminated)
        if self.max_steps is not None:
            truncated = (moved["steps"] >= self.max_steps) & ~terminated

        if self.next_step_reset:
            ended = state["ended"]
            moved = self.restarted(moved, ended, draws)
            reward = torch.where(ended, 0.0, reward)
            terminated = terminated & ~ended
            truncated = truncated & ~ended
            moved["ended"] = terminated | truncated

        obs = final_obs = self.get_obs(moved)
        if self.episodic and not self.next_step_reset:
            moved = self.restarted(moved, terminated | truncated, draws)
            obs = self.get_obs(moved)
        return moved, Step(obs, reward, terminated, truncated, final_obs)

    def restarted(self, state: State, ended: Tensor, draws: Tensor) -> State:
        """The state, and where `ended` (p,) the first one of a new episode."""
        fresh, _ = self.reset(draws)
        masks = {name: ended.view(-1, *[1] * (value.ndim - 1)) for name, value in state.items()}
        return {name: torch.where(masks[name], fresh[name], state[name]) for name in state}


def never(reward: Tensor) -> Tensor:
    """No episode terminated: (p,) False."""
    return torch.zeros_like(reward, dtype=torch.bool)


def normals(draws: Tensor) -> Tensor:
    """Standard normal numbers (p, n) from uniform ones (p, 2 n) (Box and Muller 1958)."""
    u, v = draws.chunk(2, -1)
    return (-2 * (1 - u).log()).sqrt() * (2 * math.pi * v).cos()
