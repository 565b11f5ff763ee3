"""CartPole and its relatives. state: physics (p, 4), position, velocity, angle, angular velocity.

Axes: p environments in parallel.
"""

import math
from typing import Any

import torch
from torch import Tensor

from common.envs.base import Simulation, State, never


class CartPole(Simulation):
    """gymnasium's CartPole-v1 (Barto, Sutton and Anderson 1983). Actions: push left, push right.

    Observations: position in m, velocity in m/s, angle in rad, angular velocity in rad/s. Reward: 1
    for every step, also for the one that ends an episode. With `sutton_barto_reward`, as in
    gymnasium, -1 for a failure and 0 for all other steps: then lifetimes of one length differ.
    """

    obs_size = 4
    obs_scale = (2.4, 2.0, 0.21, 2.0)
    num_actions = 2
    max_steps = 500
    reset_draws = 4
    gravity = 9.8  # m/s^2
    cart_mass = 1.0  # kg
    pole_mass = 0.1  # kg
    half_length = 0.5  # m, of the pole
    force = 10.0  # N
    seconds = 0.02  # of a step
    max_position = 2.4  # m
    max_angle = 12 * 2 * math.pi / 360  # rad

    def __init__(self, *args: Any, sutton_barto_reward: bool = False):
        super().__init__(*args)
        self.sutton_barto_reward = sutton_barto_reward

    def reset_env(self, draws: Tensor) -> State:
        return {"physics": (draws.to(self.dtype) - 0.5) / 10}

    def get_obs(self, state: State) -> Tensor:
        return state["physics"]

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        """action (p,): from 0, the full force to the left, to 1, the full force to the right."""
        x, x_dot, theta, theta_dot = state["physics"].unbind(-1)
        force = self.force * (2 * action - 1).to(self.dtype)
        cos = theta.cos()
        sin = theta.sin()

        mass = self.cart_mass + self.pole_mass
        moment = self.pole_mass * self.half_length
        push = (force + moment * theta_dot**2 * sin) / mass
        length = self.half_length * (4 / 3 - self.pole_mass * cos**2 / mass)
        theta_acc = (self.gravity * sin - cos * push) / length
        x_acc = push - moment * theta_acc * cos / mass

        x = x + self.seconds * x_dot
        x_dot = x_dot + self.seconds * x_acc
        theta = theta + self.seconds * theta_dot
        theta_dot = theta_dot + self.seconds * theta_acc

        terminated = (x.abs() > self.max_position) | (theta.abs() > self.max_angle)
        reward = -terminated.to(self.dtype) if self.sutton_barto_reward else torch.ones_like(x)
        return {"physics": torch.stack([x, x_dot, theta, theta_dot], -1)}, reward, terminated


class UprightCartPole(CartPole):
    """CartPole with a reward for being upright and centred (thesis, section 4.5.5): one minus the
    angle, times one minus the position, each relative to what ends an episode. It is 1 in the
    middle and 0 where an episode ends."""

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, _, terminated = super().step_env(state, action, draws)
        x, _, theta, _ = moved["physics"].unbind(-1)
        centred = 1 - (x.abs() / self.max_position).clamp(max=1)
        upright = 1 - (theta.abs() / self.max_angle).clamp(max=1)
        return moved, centred * upright, terminated


class ContinuousCartPole(CartPole):
    """CartPole with one continuous action, the force in units of 10 N. All else as in CartPole."""

    num_actions = None
    action_size = 1

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        return super().step_env(state, (action[:, 0].clamp(-1, 1) + 1) / 2, draws)


class CartSwingUp(ContinuousCartPole):
    """A pole that starts at any angle and has to be brought upright, in 100 steps of 0.04 s. Walls
    stop the cart, and nothing ends an episode early. One continuous action, the force in units of
    10 N.

    Observations: position, velocity, cos and sin of the angle, angular velocity. Reward: 1 for an
    upright pole, 0 for a hanging one, minus a tenth of the distance from the centre relative to the
    rail.
    """

    obs_size = 5
    obs_scale = (2.4, 3.0, 1.0, 1.0, 6.0)
    max_steps = 100
    seconds = 0.04
    max_angle = math.inf

    def __init__(self, *args: Any):
        super().__init__(*args)
        spread = [0.2, 0.2, 2 * math.pi, 0.2]
        self.spread = torch.tensor(spread, dtype=self.dtype, device=self.device)

    def reset_env(self, draws: Tensor) -> State:
        return {"physics": self.spread * (draws.to(self.dtype) - 0.5)}

    def get_obs(self, state: State) -> Tensor:
        x, x_dot, theta, theta_dot = state["physics"].unbind(-1)
        return torch.stack([x, x_dot, theta.cos(), theta.sin(), theta_dot], -1)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, _, _ = super().step_env(state, action, draws)
        x, x_dot, theta, theta_dot = moved["physics"].unbind(-1)
        x_dot = torch.where(x.abs() >= self.max_position, 0.0, x_dot)
        x = x.clamp(-self.max_position, self.max_position)
        reward = (1 + theta.cos()) / 2 - 0.1 * x.abs() / self.max_position
        return {"physics": torch.stack([x, x_dot, theta, theta_dot], -1)}, reward, never(reward)


class BalanceCartPole(CartSwingUp):
    """A pole that starts upright, in 500 steps of 0.02 s that nothing ends early: it may fall, and
    walls stop the cart (as in DeepMind Control's task "balance", Tunyasuvunakool et al. 2020, to
    which section 4.5.5 of the thesis points). Actions: push left, push right.

    Observations as in CartSwingUp. Reward: one for an upright pole in the centre; half of it for a
    horizontal pole or for a cart at the wall, none for a hanging pole.
    """

    num_actions = 2
    action_size = 0
    max_steps = 500
    seconds = 0.02

    def reset_env(self, draws: Tensor) -> State:
        return CartPole.reset_env(self, draws)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        push = (2 * action - 1).to(self.dtype)[:, None]
        moved, _, terminated = super().step_env(state, push, draws)
        x, _, theta, _ = moved["physics"].unbind(-1)
        reward = (1 + theta.cos()) / 2 * (1 - x.abs() / self.max_position / 2)
        return moved, reward, terminated
