"""The interface of every environment, auto-reset and time limit."""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


class EnvError(Exception):
    """An environment that cannot be had or used as asked; the message is one sentence that says what to do."""


class Step(NamedTuple):
    """What a step returns, for p environments."""

    obs: Tensor  # (p, a), what to act on next
    reward: Tensor  # (p,)
    terminated: Tensor  # (p,) bool
    truncated: Tensor  # (p,) bool
    last_obs: Tensor  # (p, a), what the action led to


def normals(draws: Tensor) -> Tensor:
    """Standard normal numbers (p, n) of uniform ones (p, 2 n) (Box and Muller 1958)."""
    u, v = draws.chunk(2, -1)
    return (-2 * (1 - u).log()).sqrt() * (2 * math.pi * v).cos()


class Env(ABC):
    """The face of all."""

    obs_size = 0
    num_actions: int | None = None  # None: continuous actions
    action_size = 0  # of continuous actions, in [-1, 1]
    max_steps: int | None = None  # of an episode; None: it has no time limit
    episodic = True  # False: it never terminates, and what counts is reward per step
    stationary = True  # False: what is best changes over time
    begin_draws = 0
    move_draws = 0
    obs_scale: tuple[float, ...] = ()  # about how large each observation gets

    def __init__(self, num_envs: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.num_envs, self.device, self.dtype = num_envs, torch.device(device), dtype

    @property
    def num_draws(self) -> int:
        """How many uniform numbers a call of reset or step wants for each environment."""
        return self.begin_draws + self.move_draws

    @property
    def lifetime_draws(self) -> int:
        """How many uniform numbers `reset` wants for each environment: more than a step where a lifetime has something of its
        own that outlives its episodes."""
        return self.num_draws

    def payouts(self, state: State) -> Tensor | None:
        """The expected reward of each action (p, b), where it does not depend on what happens afterwards."""
        return None

    def close(self) -> None:  # noqa: B027 (most have none)
        """End the processes that it runs in, if it does."""

    @abstractmethod
    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        """New lifetimes everywhere. draws (p, lifetime_draws)."""

    @abstractmethod
    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        """One step everywhere, and a new episode where one ended. draws (p, num_draws)."""


class Simulated(Env):
    """What is simulated here: auto-reset and time limit around `begin`, `observe` and `move`."""

    @abstractmethod
    def begin(self, draws: Tensor) -> State:
        """The first state of an episode. draws (p, begin_draws)."""

    @abstractmethod
    def observe(self, state: State) -> Tensor:
        """(p, a)."""

    @abstractmethod
    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        """The next state, the reward (p,), and whether the episode terminated (p,). draws (p, move_draws)."""

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        state = self.begin(draws[:, : self.begin_draws]) | {"steps": torch.zeros_like(draws[:, 0], dtype=torch.int64)}
        return state, self.observe(state)

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        moved, reward, terminated = self.move(state, action, draws[:, self.begin_draws :])
        moved["steps"] = state["steps"] + 1
        out_of_time = moved["steps"] >= self.max_steps if self.max_steps else torch.zeros_like(terminated)
        truncated = out_of_time & ~terminated
        last_obs = self.observe(moved)
        if self.episodic:
            fresh, _ = self.reset(draws)
            ended = terminated | truncated
            moved = {name: torch.where(ended.view(-1, *[1] * (now.ndim - 1)), fresh[name], now) for name, now in moved.items()}
        return moved, Step(self.observe(moved), reward, terminated, truncated, last_obs)
