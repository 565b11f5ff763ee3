"""Batched environments on tensors, as pure functions that torch.compile can take.

    env = make("cartpole", num_envs=64)
    state, obs = env.reset(draws)                       # obs (p, a)
    state, step = env.step(state, action, draws)        # action (p,) int64, or (p, b) where actions are continuous

An environment keeps nothing: its state is a dict of tensors (p, ...) that goes in and comes out. It has no random numbers of
its own either: every call takes `draws`, fresh uniform numbers (p, env.num_draws) in [0, 1), so that whoever runs it decides
what is random, what repeats, and what members of a population share.

Environments reset themselves. A step that ends an episode, because it terminated (the task is over) or was truncated (time is
up), returns that step's reward, the state the action led to as `last_obs`, and as `obs` the first observation of the next
episode, so that a loop over steps needs no branch. Bootstrap from `last_obs`, act on `obs`; between ends the two are equal.

Axes: p environments in parallel, a observations, b action dimensions.
"""

import math
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


class Env:
    """Base of all: auto-reset and time limit. A subclass has `begin`, `observe` and `move`."""

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

    def begin(self, draws: Tensor) -> State:
        """The first state of an episode. draws (p, begin_draws)."""
        raise NotImplementedError

    def observe(self, state: State) -> Tensor:
        """(p, a)."""
        raise NotImplementedError

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        """The next state, the reward (p,), and whether the episode terminated (p,). draws (p, move_draws)."""
        raise NotImplementedError

    def reset(self, draws: Tensor) -> tuple[State, Tensor]:
        """New episodes everywhere. draws (p, num_draws)."""
        state = self.begin(draws[:, : self.begin_draws]) | {"steps": torch.zeros_like(draws[:, 0], dtype=torch.int64)}
        return state, self.observe(state)

    def step(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Step]:
        """One step everywhere, and a new episode where one ended. draws (p, num_draws)."""
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


class Bandit(Env):
    """Two arms, one pays 1, the other 0 (thesis, section 7.4). Whoever knows them gets 1 per step. Nothing is observed, and
    there are no episodes. state: good (p,), the arm that pays."""

    num_actions = 2
    episodic = False
    begin_draws = 1  # not used; reset reads the number of environments from its shape

    def begin(self, draws: Tensor) -> State:
        return {"good": torch.zeros_like(draws[:, 0], dtype=torch.int64)}

    def observe(self, state: State) -> Tensor:
        return torch.zeros(len(state["good"]), 0, dtype=self.dtype, device=self.device)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        reward = (action == state["good"]).to(self.dtype)
        return {"good": state["good"]}, reward, torch.zeros_like(action, dtype=torch.bool)


class SwappingBandit(Bandit):
    """The two arms swap again and again, each time after a uniformly drawn number of pulls, from `shortest` to `longest` (the
    thesis has "random intervals", section 7.4). Whoever repeats an arm that paid and leaves one that did not loses one pull in
    twenty, 0.95 per step. state: good (p,); since (p,), pulls since the last swap; left (p,), pulls until the next."""

    stationary = False
    shortest, longest = 10, 30
    move_draws = 1

    def begin(self, draws: Tensor) -> State:
        good = (draws[:, 0] < 0.5).long()
        return {"good": good, "since": torch.zeros_like(good), "left": self.interval(draws[:, 0] * 2 % 1)}

    def interval(self, draw: Tensor) -> Tensor:
        return self.shortest + (draw * (self.longest - self.shortest + 1)).long()

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        _, reward, terminated = super().move(state, action, draws)
        swap = state["left"] == 1
        good = torch.where(swap, 1 - state["good"], state["good"])
        left = torch.where(swap, self.interval(draws[:, 0]), state["left"] - 1)
        return {"good": good, "since": torch.where(swap, 0, state["since"] + 1), "left": left}, reward, terminated


class CartPole(Env):
    """gymnasium's CartPole-v1 (Barto, Sutton and Anderson 1983). Actions: push left, push right. Observations: position in m,
    velocity in m/s, angle in rad, angular velocity in rad/s. Reward: 1 for every step, also the one that ends an episode; with
    `sutton_barto_reward`, as in gymnasium, -1 for a failure and 0 for all other steps, which tells more per step."""

    obs_size, num_actions, max_steps = 4, 2, 500
    begin_draws = 4
    obs_scale = (2.4, 2.0, 0.21, 2.0)
    gravity, cart_mass, pole_mass, half_length, force, seconds = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    largest_position, largest_angle = 2.4, 12 * 2 * math.pi / 360

    def __init__(self, *args: Any, sutton_barto_reward: bool = False):
        super().__init__(*args)
        self.sutton_barto_reward = sutton_barto_reward

    def begin(self, draws: Tensor) -> State:
        return {"physics": (draws.to(self.dtype) - 0.5) / 10}

    def observe(self, state: State) -> Tensor:
        return state["physics"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        x, velocity, angle, spin = state["physics"].unbind(-1)
        mass, moment = self.cart_mass + self.pole_mass, self.pole_mass * self.half_length
        push = self.force * (2 * action - 1).to(self.dtype)
        cos, sin = angle.cos(), angle.sin()
        pull = (push + moment * spin**2 * sin) / mass
        turn = (self.gravity * sin - cos * pull) / (self.half_length * (4 / 3 - self.pole_mass * cos**2 / mass))
        thrust = pull - moment * turn * cos / mass
        dt = self.seconds
        x, velocity, angle, spin = x + dt * velocity, velocity + dt * thrust, angle + dt * spin, spin + dt * turn
        terminated = (x.abs() > self.largest_position) | (angle.abs() > self.largest_angle)
        reward = -terminated.to(self.dtype) if self.sutton_barto_reward else torch.ones_like(x)
        return {"physics": torch.stack([x, velocity, angle, spin], -1)}, reward, terminated


class Pendulum(Env):
    """gymnasium's Pendulum-v1: swing up and hold. One action, the torque in units of 2 N m. Observations: cos, sin of the
    angle, angular velocity in rad/s."""

    obs_size, action_size, max_steps = 3, 1, 200
    begin_draws = 2
    obs_scale = (1.0, 1.0, 8.0)
    gravity, mass, length, seconds, largest_torque, largest_speed = 10.0, 1.0, 1.0, 0.05, 2.0, 8.0

    def begin(self, draws: Tensor) -> State:
        angle, speed = (2 * draws.to(self.dtype) - 1).unbind(-1)
        return {"angle": math.pi * angle, "speed": speed}

    def observe(self, state: State) -> Tensor:
        return torch.stack([state["angle"].cos(), state["angle"].sin(), state["speed"]], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        angle, speed = state["angle"], state["speed"]
        torque = self.largest_torque * action[:, 0].clamp(-1, 1)
        off = (angle + math.pi) % (2 * math.pi) - math.pi  # from upright
        reward = -(off**2 + 0.1 * speed**2 + 0.001 * torque**2)
        pull = 3 * self.gravity / (2 * self.length) * angle.sin() + 3 / (self.mass * self.length**2) * torque
        speed = (speed + self.seconds * pull).clamp(-self.largest_speed, self.largest_speed)
        return {"angle": angle + self.seconds * speed, "speed": speed}, reward, torch.zeros_like(speed, dtype=torch.bool)


ENVS: dict[str, type[Env]] = {
    "bandit": Bandit,
    "swapping_bandit": SwappingBandit,
    "cartpole": CartPole,
    "pendulum": Pendulum,
}


def make(
    name: str, num_envs: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> Env:
    """An environment by its name; options are its own. Raises EnvError for a name that there is not."""
    if name not in ENVS:
        raise EnvError(f"There is no environment {name}; there are {', '.join(ENVS)}.")
    return ENVS[name](num_envs, device, dtype, **options)
