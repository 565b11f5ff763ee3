"""Families of small continuous control tasks."""

import math
from typing import Any

import torch
from torch import Tensor

from common.envs.base import Simulated, State


class PointMass(Simulated):
    """A point between four walls that two forces bring to a target. Observations: position, velocity, the way to the target
    (two numbers each). Reward: minus its length. 100 steps of 0.1 s, some friction. state: physics (p, 6)."""

    obs_size, action_size, max_steps = 6, 2, 100
    begin_draws = 4
    obs_scale = (1.0,) * 6
    seconds, force, friction = 0.1, 2.0, 1.0

    def begin(self, draws: Tensor) -> State:
        place, target = (2 * draws.to(self.dtype) - 1).chunk(2, -1)
        return {"physics": torch.cat([place, torch.zeros_like(place), target], -1)}

    def observe(self, state: State) -> Tensor:
        place, velocity, target = state["physics"].chunk(3, -1)
        return torch.cat([place, velocity, target - place], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        place, velocity, target = state["physics"].chunk(3, -1)
        velocity = velocity + self.seconds * (self.force * action.clamp(-1, 1) - self.friction * velocity)
        place = (place + self.seconds * velocity).clamp(-1, 1)
        reward = -(target - place).norm(dim=-1)
        return {"physics": torch.cat([place, velocity, target], -1)}, reward, torch.zeros_like(reward, dtype=torch.bool)


class Reacher(Simulated):
    """An arm of two links of half a metre each, in the plane, whose tip two torques bring to a target. The joints have friction
    and do not feel each other's motion. Observations: cos and sin of both angles, angular velocities, the way from the tip to
    the target. Reward: minus its length. 100 steps of 0.05 s. state: physics (p, 6), angles, velocities, target."""

    obs_size, action_size, max_steps = 8, 2, 100
    begin_draws = 4
    obs_scale = (1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0)
    seconds, torque, friction, link = 0.05, 8.0, 2.0, 0.5

    def begin(self, draws: Tensor) -> State:
        draws = draws.to(self.dtype)
        angles, turn, far = math.pi * (2 * draws[:, :2] - 1), 2 * math.pi * draws[:, 2], 0.9 * draws[:, 3].sqrt()
        target = torch.stack([far * turn.cos(), far * turn.sin()], -1)
        return {"physics": torch.cat([angles, torch.zeros_like(angles), target], -1)}

    def way(self, angles: Tensor, target: Tensor) -> Tensor:
        """From the tip to the target (p, 2)."""
        one, both = angles[:, 0], angles.sum(-1)
        tip = torch.stack([one.cos() + both.cos(), one.sin() + both.sin()], -1)
        return target - self.link * tip

    def observe(self, state: State) -> Tensor:
        angles, speeds, target = state["physics"].chunk(3, -1)
        return torch.cat([angles.cos(), angles.sin(), speeds, self.way(angles, target)], -1)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        angles, speeds, target = state["physics"].chunk(3, -1)
        speeds = speeds + self.seconds * (self.torque * action.clamp(-1, 1) - self.friction * speeds)
        angles = angles + self.seconds * speeds
        reward = -self.way(angles, target).norm(dim=-1)
        return {"physics": torch.cat([angles, speeds, target], -1)}, reward, torch.zeros_like(reward, dtype=torch.bool)


class Heading(Simulated):
    """Run in a direction that is not shown: a force changes a velocity in the plane, of which there is friction; what pays is
    the velocity along the direction, 1 at most in the long run. No episodes. The direction is the task, in degrees: heading:0
    to heading:359. state: velocity (p, 2)."""

    obs_size, action_size, episodic = 2, 2, False
    begin_draws = 2
    obs_scale = (1.0, 1.0)
    friction = 0.2

    def __init__(self, *args: Any, size: int = 0):
        super().__init__(*args)
        turn = math.radians(size)
        self.direction = torch.tensor([math.cos(turn), math.sin(turn)], dtype=self.dtype, device=self.device)

    def begin(self, draws: Tensor) -> State:
        return {"velocity": (2 * draws.to(self.dtype) - 1) / 10}

    def observe(self, state: State) -> Tensor:
        return state["velocity"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        action = action / action.norm(dim=-1, keepdim=True).clamp(min=1)
        velocity = state["velocity"] + self.friction * (action - state["velocity"])
        reward = velocity @ self.direction
        return {"velocity": velocity}, reward, torch.zeros_like(reward, dtype=torch.bool)


class Flight(Heading):
    """Fly in a direction that is not shown: as Heading, with three forces in space and a drag that grows with the square of the
    speed. The direction, in degrees around the vertical and 30 above the horizon, is the task: flight:0 to flight:359.
    state: velocity (p, 3)."""

    obs_size, action_size = 3, 3
    begin_draws = 3
    obs_scale = (1.0, 1.0, 1.0)
    drag, climb = 0.2, math.radians(30)

    def __init__(self, *args: Any, size: int = 0):
        super().__init__(*args, size=size)
        upwards = torch.full((1,), math.sin(self.climb), dtype=self.dtype, device=self.device)
        self.direction = torch.cat([math.cos(self.climb) * self.direction, upwards])

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        velocity, force = state["velocity"], action / action.norm(dim=-1, keepdim=True).clamp(min=1)
        velocity = velocity + self.drag * (force - velocity * velocity.norm(dim=-1, keepdim=True))
        reward = velocity @ self.direction
        return {"velocity": velocity}, reward, torch.zeros_like(reward, dtype=torch.bool)
