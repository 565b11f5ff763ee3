"""Other classic control tasks: pendulum, acrobot, mountain cars."""

import math
from typing import Any

import torch
from torch import Tensor

from common.envs.base import Simulated, State


class Pendulum(Simulated):
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


class Acrobot(Simulated):
    """gymnasium's Acrobot-v1 (Sutton 1996, with the dynamics of the book). Actions: a torque of -1, 0 or 1 N m between the
    links. Observations: cos and sin of both angles, angular velocities in rad/s. Reward: -1 for every step, 0 for the one that
    reaches the height."""

    obs_size, num_actions, max_steps = 6, 3, 500
    begin_draws = 4
    obs_scale = (1.0, 1.0, 1.0, 1.0, 4 * math.pi, 9 * math.pi)
    seconds, gravity, centre, moment = 0.2, 9.8, 0.5, 1.0  # links of 1 m and 1 kg

    def begin(self, draws: Tensor) -> State:
        return {"physics": draws.to(self.dtype) / 5 - 0.1}

    def observe(self, state: State) -> Tensor:
        one, two, *speeds = state["physics"].unbind(-1)
        return torch.stack([one.cos(), one.sin(), two.cos(), two.sin(), *speeds], -1)

    def change(self, physics: Tensor, torque: Tensor) -> Tensor:
        """The time derivative of both angles and both speeds."""
        one, two, speed1, speed2 = physics.unbind(-1)
        c, i, g = self.centre, self.moment, self.gravity
        d1 = c**2 + (1 + c**2 + 2 * c * two.cos()) + 2 * i
        d2 = c**2 + c * two.cos() + i
        pull2 = c * g * (one + two - math.pi / 2).cos()
        swing = c * two.sin()
        pull1 = -swing * speed2**2 - 2 * swing * speed2 * speed1 + (c + 1) * g * (one - math.pi / 2).cos() + pull2
        turn2 = (torque + d2 / d1 * pull1 - swing * speed1**2 - pull2) / (c**2 + i - d2**2 / d1)
        return torch.stack([speed1, speed2, -(d2 * turn2 + pull1) / d1, turn2], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        y, torque, dt = state["physics"], (action - 1).to(self.dtype), self.seconds
        k1 = self.change(y, torque)  # Runge-Kutta of fourth order
        k2 = self.change(y + dt / 2 * k1, torque)
        k3 = self.change(y + dt / 2 * k2, torque)
        k4 = self.change(y + dt * k3, torque)
        angles, speeds = (y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)).split(2, -1)
        angles = (angles + math.pi) % (2 * math.pi) - math.pi
        fastest = math.pi * torch.tensor([4.0, 9.0], dtype=self.dtype, device=self.device)
        speeds = torch.minimum(torch.maximum(speeds, -fastest), fastest)
        one, two = angles.unbind(-1)
        terminated = -one.cos() - (one + two).cos() > 1
        return {"physics": torch.cat([angles, speeds], -1)}, terminated.to(self.dtype) - 1, terminated


class MountainCar(Simulated):
    """gymnasium's MountainCar-v0 (Moore 1990). Actions: left, none, right. Observations: position, velocity. Reward: -1 for
    every step; with `free_goal` 0 for the one that reaches the goal, or else lifetimes of many episodes would all pay alike."""

    obs_size, num_actions, max_steps = 2, 3, 200
    begin_draws = 1
    obs_scale = (1.2, 0.07)
    force, gravity, goal, fastest = 0.001, 0.0025, 0.5, 0.07

    def __init__(self, *args: Any, free_goal: bool = False):
        super().__init__(*args)
        self.free_goal = free_goal

    def begin(self, draws: Tensor) -> State:
        x = draws[:, 0].to(self.dtype) * 0.2 - 0.6
        return {"physics": torch.stack([x, torch.zeros_like(x)], -1)}

    def observe(self, state: State) -> Tensor:
        return state["physics"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        x, velocity = state["physics"].unbind(-1)
        velocity = velocity + (action - 1).to(self.dtype) * self.force - self.gravity * (3 * x).cos()
        velocity = velocity.clamp(-self.fastest, self.fastest)
        x = (x + velocity).clamp(-1.2, 0.6)
        velocity = torch.where((x <= -1.2) & (velocity < 0), 0.0, velocity)
        terminated = x >= self.goal
        reward = -torch.ones_like(x) + (terminated.to(self.dtype) if self.free_goal else 0)
        return {"physics": torch.stack([x, velocity], -1)}, reward, terminated


class ContinuousMountainCar(Simulated):
    """gymnasium's MountainCarContinuous-v0: one continuous action, the force. Reward: 100 at the goal, minus a tenth of the
    squared force at every step."""

    obs_size, action_size, max_steps = 2, 1, 999
    begin_draws = 1
    obs_scale = (1.2, 0.07)
    power, gravity, goal, fastest = 0.0015, 0.0025, 0.45, 0.07

    def begin(self, draws: Tensor) -> State:
        x = draws[:, 0].to(self.dtype) * 0.2 - 0.6
        return {"physics": torch.stack([x, torch.zeros_like(x)], -1)}

    def observe(self, state: State) -> Tensor:
        return state["physics"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        x, velocity = state["physics"].unbind(-1)
        velocity = velocity + self.power * action[:, 0].clamp(-1, 1) - self.gravity * (3 * x).cos()
        velocity = velocity.clamp(-self.fastest, self.fastest)
        x = (x + velocity).clamp(-1.2, 0.6)
        velocity = torch.where((x <= -1.2) & (velocity < 0), 0.0, velocity)
        terminated = (x >= self.goal) & (velocity >= 0)
        reward = 100 * terminated.to(self.dtype) - 0.1 * action[:, 0] ** 2
        return {"physics": torch.stack([x, velocity], -1)}, reward, terminated
