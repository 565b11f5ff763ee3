"""Classic control with the dynamics of gymnasium: pendulum, acrobot and mountain cars.

Axes: p environments in parallel.
"""

import math
from typing import Any

import torch
from torch import Tensor

from common.envs.base import Simulation, State, never


class Pendulum(Simulation):
    """gymnasium's Pendulum-v1: swing up and balance. One continuous action, the torque in units of
    2 N m.

    Observations: cos and sin of the angle from upright, angular velocity in rad/s. Reward: minus
    the squares of angle, velocity (a tenth) and torque (a thousandth).
    state: angle and speed (p,).
    """

    obs_size = 3
    obs_scale = (1.0, 1.0, 8.0)
    action_size = 1
    max_steps = 200
    reset_draws = 2
    gravity = 10.0  # m/s^2
    mass = 1.0  # kg
    length = 1.0  # m
    seconds = 0.05  # of a step
    max_torque = 2.0  # N m
    max_speed = 8.0  # rad/s

    def reset_env(self, draws: Tensor) -> State:
        angle, speed = (2 * draws.to(self.dtype) - 1).unbind(-1)
        return {"angle": math.pi * angle, "speed": speed}

    def get_obs(self, state: State) -> Tensor:
        angle = state["angle"]
        return torch.stack([angle.cos(), angle.sin(), state["speed"]], -1)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        angle = state["angle"]
        speed = state["speed"]
        torque = self.max_torque * action[:, 0].clamp(-1, 1)

        from_upright = (angle + math.pi) % (2 * math.pi) - math.pi
        reward = -(from_upright**2 + 0.1 * speed**2 + 0.001 * torque**2)

        fall = 3 * self.gravity / (2 * self.length) * angle.sin()
        push = 3 / (self.mass * self.length**2) * torque
        speed = speed + self.seconds * (fall + push)
        speed = speed.clamp(-self.max_speed, self.max_speed)
        angle = angle + self.seconds * speed
        return {"angle": angle, "speed": speed}, reward, never(reward)


class Acrobot(Simulation):
    """gymnasium's Acrobot-v1 (Sutton 1996, with the dynamics of the book): two links, of which the
    tip has to swing above a height.

    Actions: a torque of -1, 0 or 1 N m between the links. Observations: cos and sin of both angles,
    angular velocities in rad/s. Reward: -1 for every step, 0 for the one that reaches the height.
    state: physics (p, 4), both angles and both angular velocities.
    """

    obs_size = 6
    obs_scale = (1.0, 1.0, 1.0, 1.0, 4 * math.pi, 9 * math.pi)
    num_actions = 3
    max_steps = 500
    reset_draws = 4
    seconds = 0.2  # of a step
    gravity = 9.8  # m/s^2
    centre = 0.5  # m, to the centre of mass of a link of 1 m and 1 kg
    moment = 1.0  # kg m^2, of inertia of a link

    def __init__(self, *args: Any):
        super().__init__(*args)
        fastest = torch.tensor([4.0, 9.0], dtype=self.dtype, device=self.device)
        self.max_speed = math.pi * fastest

    def reset_env(self, draws: Tensor) -> State:
        return {"physics": draws.to(self.dtype) / 5 - 0.1}

    def get_obs(self, state: State) -> Tensor:
        theta1, theta2, speed1, speed2 = state["physics"].unbind(-1)
        angles = [theta1.cos(), theta1.sin(), theta2.cos(), theta2.sin()]
        return torch.stack([*angles, speed1, speed2], -1)

    def derivative(self, physics: Tensor, torque: Tensor) -> Tensor:
        """The time derivative (p, 4) of both angles and both angular velocities."""
        theta1, theta2, speed1, speed2 = physics.unbind(-1)
        c, i, g = self.centre, self.moment, self.gravity
        d1 = c**2 + (1 + c**2 + 2 * c * theta2.cos()) + 2 * i
        d2 = c**2 + c * theta2.cos() + i
        swing = c * theta2.sin()

        phi2 = c * g * (theta1 + theta2 - math.pi / 2).cos()
        phi1 = -swing * speed2**2 - 2 * swing * speed2 * speed1
        phi1 = phi1 + (c + 1) * g * (theta1 - math.pi / 2).cos() + phi2

        acc2 = torque + d2 / d1 * phi1 - swing * speed1**2 - phi2
        acc2 = acc2 / (c**2 + i - d2**2 / d1)
        acc1 = -(d2 * acc2 + phi1) / d1
        return torch.stack([speed1, speed2, acc1, acc2], -1)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        y = state["physics"]
        torque = (action - 1).to(self.dtype)
        dt = self.seconds

        k1 = self.derivative(y, torque)  # Runge-Kutta of fourth order
        k2 = self.derivative(y + dt / 2 * k1, torque)
        k3 = self.derivative(y + dt / 2 * k2, torque)
        k4 = self.derivative(y + dt * k3, torque)
        angles, speeds = (y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)).split(2, -1)
        angles = (angles + math.pi) % (2 * math.pi) - math.pi
        speeds = speeds.clamp(-self.max_speed, self.max_speed)

        theta1, theta2 = angles.unbind(-1)
        terminated = -theta1.cos() - (theta1 + theta2).cos() > 1
        reward = terminated.to(self.dtype) - 1
        return {"physics": torch.cat([angles, speeds], -1)}, reward, terminated


class AcrobotSwingUp(Acrobot):
    """Acrobot with one continuous action, the torque in units of 2 N m, and a reward for height at each
    of 100 steps, which nothing ends early.

    Observations as in Acrobot. Reward: the height of the tip, 0 for hanging links, 1 for upright ones.
    """

    num_actions = None
    action_size = 1
    max_steps = 100

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, _, _ = super().step_env(state, 2 * action[:, 0].clamp(-1, 1) + 1, draws)
        theta1, theta2, _, _ = moved["physics"].unbind(-1)
        reward = (2 - theta1.cos() - (theta1 + theta2).cos()) / 4
        return moved, reward, never(reward)


class MountainCar(Simulation):
    """gymnasium's MountainCar-v0 (Moore 1990): a car that has to swing up out of a valley.

    Actions: accelerate to the left, not at all, to the right. Observations: position, velocity.
    Reward: -1 for every step. With `free_goal` the step that reaches the goal costs nothing: then
    lifetimes of one length differ. state: physics (p, 2), position and velocity.
    """

    obs_size = 2
    obs_scale = (1.2, 0.07)
    num_actions = 3
    max_steps = 200
    reset_draws = 1
    power = 0.001
    gravity = 0.0025
    goal = 0.5
    max_speed = 0.07

    def __init__(self, *args: Any, free_goal: bool = False):
        super().__init__(*args)
        self.free_goal = free_goal

    def reset_env(self, draws: Tensor) -> State:
        x = draws[:, 0].to(self.dtype) * 0.2 - 0.6
        return {"physics": torch.stack([x, torch.zeros_like(x)], -1)}

    def get_obs(self, state: State) -> Tensor:
        return state["physics"]

    def drive(self, state: State, force: Tensor) -> tuple[State, Tensor]:
        """The next state, and whether the car reached the goal (p,). force (p,) from -1 to 1."""
        x, velocity = state["physics"].unbind(-1)
        velocity = velocity + force * self.power - self.gravity * (3 * x).cos()
        velocity = velocity.clamp(-self.max_speed, self.max_speed)
        x = (x + velocity).clamp(-1.2, 0.6)
        velocity = torch.where((x <= -1.2) & (velocity < 0), 0.0, velocity)  # a wall
        return {"physics": torch.stack([x, velocity], -1)}, (x >= self.goal) & (velocity >= 0)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, terminated = self.drive(state, (action - 1).to(self.dtype))
        reward = -torch.ones_like(terminated, dtype=self.dtype)
        if self.free_goal:
            reward = reward + terminated.to(self.dtype)
        return moved, reward, terminated


class ContinuousMountainCar(MountainCar):
    """gymnasium's MountainCarContinuous-v0: one continuous action, the force. Reward: 100 at the
    goal, minus a tenth of the squared action at every step."""

    num_actions = None
    action_size = 1
    max_steps = 999
    power = 0.0015
    goal = 0.45

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, terminated = self.drive(state, action[:, 0].clamp(-1, 1))
        reward = 100 * terminated.to(self.dtype) - 0.1 * action[:, 0] ** 2
        return moved, reward, terminated


class MountainCarClimb(ContinuousMountainCar):
    """Continuous mountain car with a reward for height at each of 200 steps, which nothing ends early.

    Observations and actions as there. Reward: the height, 0 in the valley, 1 on top of the hill.
    """

    max_steps = 200

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, _ = self.drive(state, action[:, 0].clamp(-1, 1))
        reward = (1 + (3 * moved["physics"][:, 0]).sin()) / 2
        return moved, reward, never(reward)
