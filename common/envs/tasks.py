"""Small continuous control: reach a target with a point mass or an arm, move in a direction.

Axes: p environments in parallel.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.envs.base import Simulation, State, never


class PointMass(Simulation):
    """A point with friction between four walls, which two forces move to a target. 100 steps of
    0.1 s.

    Observations: position, velocity, and the vector to the target, two numbers each.
    Reward: minus the distance to the target.
    state: physics (p, 6), position, velocity, target.
    """

    obs_size = 6
    obs_scale = (1.0,) * 6
    action_size = 2
    max_steps = 100
    reset_draws = 4
    seconds = 0.1  # of a step
    force = 2.0
    friction = 1.0

    def reset_env(self, draws: Tensor) -> State:
        position, target = (2 * draws.to(self.dtype) - 1).chunk(2, -1)
        return {"physics": torch.cat([position, torch.zeros_like(position), target], -1)}

    def get_obs(self, state: State) -> Tensor:
        position, velocity, target = state["physics"].chunk(3, -1)
        return torch.cat([position, velocity, target - position], -1)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        position, velocity, target = state["physics"].chunk(3, -1)
        acceleration = self.force * action.clamp(-1, 1) - self.friction * velocity
        velocity = velocity + self.seconds * acceleration
        position = (position + self.seconds * velocity).clamp(-1, 1)
        reward = -(target - position).norm(dim=-1)
        return {"physics": torch.cat([position, velocity, target], -1)}, reward, never(reward)


class Reacher(Simulation):
    """An arm in the plane with two links of half a metre, whose tip two torques move to a target.
    The joints have friction, and neither feels the motion of the other. 100 steps of 0.05 s.

    Observations: cos and sin of both angles, angular velocities, the vector from the tip to the
    target. Reward: minus the length of that vector.
    state: physics (p, 6), angles, angular velocities, target.
    """

    obs_size = 8
    obs_scale = (1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0)
    action_size = 2
    max_steps = 100
    reset_draws = 4
    seconds = 0.05  # of a step
    torque = 8.0
    friction = 2.0
    link = 0.5  # m

    def reset_env(self, draws: Tensor) -> State:
        draws = draws.to(self.dtype)
        angles = math.pi * (2 * draws[:, :2] - 1)
        direction = 2 * math.pi * draws[:, 2]
        distance = 0.9 * draws[:, 3].sqrt()  # uniform in a disk
        target = torch.stack([distance * direction.cos(), distance * direction.sin()], -1)
        return {"physics": torch.cat([angles, torch.zeros_like(angles), target], -1)}

    def to_target(self, angles: Tensor, target: Tensor) -> Tensor:
        """The vector (p, 2) from the tip to the target."""
        first = angles[:, 0]
        second = angles.sum(-1)
        tip = torch.stack([first.cos() + second.cos(), first.sin() + second.sin()], -1)
        return target - self.link * tip

    def get_obs(self, state: State) -> Tensor:
        angles, speeds, target = state["physics"].chunk(3, -1)
        return torch.cat([angles.cos(), angles.sin(), speeds, self.to_target(angles, target)], -1)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        angles, speeds, target = state["physics"].chunk(3, -1)
        acceleration = self.torque * action.clamp(-1, 1) - self.friction * speeds
        speeds = speeds + self.seconds * acceleration
        angles = angles + self.seconds * speeds
        reward = -self.to_target(angles, target).norm(dim=-1)
        return {"physics": torch.cat([angles, speeds, target], -1)}, reward, never(reward)


class Heading(Simulation):
    """Motion in a direction that is not observed: a force changes a velocity in the plane, or with
    three `dims` in space, against a drag. No episodes.

    The drag grows with the speed in the plane and with its square in space. The size is the
    direction in degrees, in space 30 degrees above the horizon, and defines the task: heading:0 to
    heading:359, heading_3d:0 to heading_3d:359.
    Observations: the velocity. Reward: the velocity along the direction, in the long run at most 1.
    state: velocity (p, dims).
    """

    episodic = False
    min_size = 0
    drag = 0.2
    climb = math.radians(30)

    def __init__(self, *args: Any, size: int = 0, dims: int = 2):
        super().__init__(*args)
        self.dims = dims
        self.obs_size = dims
        self.obs_scale = (1.0,) * dims
        self.action_size = dims
        self.reset_draws = dims

        angle = math.radians(size)
        tensor = partial(torch.tensor, dtype=self.dtype, device=self.device)
        self.direction = tensor([math.cos(angle), math.sin(angle)])
        if dims == 3:
            level = math.cos(self.climb) * self.direction
            self.direction = torch.cat([level, tensor([math.sin(self.climb)])])

    def reset_env(self, draws: Tensor) -> State:
        return {"velocity": (2 * draws.to(self.dtype) - 1) / 10}

    def get_obs(self, state: State) -> Tensor:
        return state["velocity"]

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        velocity = state["velocity"]
        force = action / action.norm(dim=-1, keepdim=True).clamp(min=1)
        resistance = velocity
        if self.dims == 3:
            resistance = velocity * velocity.norm(dim=-1, keepdim=True)
        velocity = velocity + self.drag * (force - resistance)
        reward = velocity @ self.direction
        return {"velocity": velocity}, reward, never(reward)
