"""CartPole and its variants."""

import math
from typing import Any

import torch
from torch import Tensor

from common.envs.base import Simulated, State


class CartPole(Simulated):
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


class UprightCartPole(CartPole):
    """CartPole that pays for being upright and centred (thesis, section 4.5.5): one minus the angle, times one minus the
    position, each as a share of what ends the episode. 1 in the middle, 0 at the end of an episode."""

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, _, terminated = super().move(state, action, draws)
        x, _, angle, _ = moved["physics"].unbind(-1)
        off = (x.abs() / self.largest_position).clamp(max=1), (angle.abs() / self.largest_angle).clamp(max=1)
        return moved, (1 - off[0]) * (1 - off[1]), terminated


class ContinuousCartPole(CartPole):
    """CartPole pushed with any force between the two: one continuous action, in units of 10 N. All else as in CartPole."""

    num_actions, action_size = None, 1

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        return super().move(state, (action[:, 0].clamp(-1, 1) + 1) / 2, draws)


class CartSwingUp(CartPole):
    """CartPole from any angle to standing: steps of 0.04 s, walls that stop the cart, 100 steps, no failure. One continuous
    action, in units of 10 N. Observations: position, velocity, cos and sin of the angle, angular velocity. Reward: 1 for a pole
    that stands, 0 for one that hangs, minus a tenth of the distance from the centre as a share of the rail."""

    obs_size, num_actions, action_size, max_steps = 5, None, 1, 100
    obs_scale = (2.4, 3.0, 1.0, 1.0, 6.0)
    seconds, largest_angle = 0.04, math.inf

    def begin(self, draws: Tensor) -> State:
        spread = torch.tensor([0.2, 0.2, 2 * math.pi, 0.2], dtype=self.dtype, device=self.device)
        return {"physics": spread * (draws.to(self.dtype) - 0.5)}

    def observe(self, state: State) -> Tensor:
        x, velocity, angle, spin = state["physics"].unbind(-1)
        return torch.stack([x, velocity, angle.cos(), angle.sin(), spin], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, _, _ = super().move(state, (action[:, 0].clamp(-1, 1) + 1) / 2, draws)
        x, velocity, angle, spin = moved["physics"].unbind(-1)
        wall = x.abs() >= self.largest_position
        x, velocity = x.clamp(-self.largest_position, self.largest_position), torch.where(wall, 0.0, velocity)
        reward = (1 + angle.cos()) / 2 - 0.1 * x.abs() / self.largest_position
        return {"physics": torch.stack([x, velocity, angle, spin], -1)}, reward, torch.zeros_like(wall)
