"""Grid worlds."""

from typing import Any

import torch
from torch import Tensor

from common.envs.base import EnvError, Simulated, State


class GridWorld(Simulated):
    """A heart that pays +1 and a trap that pays -1 (thesis, section 4.5.4): the agent, the heart and the trap begin in
    different random cells; what is stepped on first ends the episode. Actions: up, down, left, right; walls stop the agent.
    Observations: three images of zeros and ones, where the agent, the heart and the trap are. The thesis names neither the
    size nor a time limit. state: cells (p, 3), each its row times the size plus its column."""

    num_actions = 4
    objects = 3

    def __init__(self, *args: Any, size: int = 5):
        super().__init__(*args)
        self.size, self.begin_draws = size, self.objects
        self.obs_size, self.max_steps = 3 * size**2, 5 * size
        self.obs_scale = (1.0,) * self.obs_size

    def place(self, draws: Tensor) -> Tensor:
        """As many different cells as there are draws (p, n), every arrangement equally likely: the beginning of a shuffle, in
        which the j-th cell changes places with the chosen[j]-th."""
        chosen, cells = [], []
        for j, draw in enumerate(draws.unbind(-1)):
            cell = j + (draw * (self.size**2 - j)).long()
            chosen.append(cell)
            for i in reversed(range(j)):  # what was moved there before
                cell = torch.where(cell == chosen[i], i, cell)
            cells.append(cell)
        return torch.stack(cells, -1)

    def begin(self, draws: Tensor) -> State:
        return {"cells": self.place(draws)}

    def image(self, cells: Tensor) -> Tensor:
        """(p, n) cells -> (p, size * size), one where there is any of them."""
        return (cells[..., None] == torch.arange(self.size**2, device=self.device)).any(1).to(self.dtype)

    def observe(self, state: State) -> Tensor:
        return torch.cat([self.image(cell) for cell in state["cells"].split(1, -1)], -1)

    def go(self, cell: Tensor, action: Tensor) -> Tensor:
        """The cell (p,) next to `cell`, or the same where there is a wall."""
        row, column = cell // self.size, cell % self.size
        row = (row + (action == 1).long() - (action == 0).long()).clamp(0, self.size - 1)
        column = (column + (action == 3).long() - (action == 2).long()).clamp(0, self.size - 1)
        return row * self.size + column

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        agent, heart, trap = state["cells"].unbind(-1)
        agent = self.go(agent, action)
        reward = (agent == heart).to(self.dtype) - (agent == trap).to(self.dtype)
        return {"cells": torch.stack([agent, heart, trap], -1)}, reward, reward != 0


class SwappedGridWorld(GridWorld):
    """The heart pays -1 and the trap +1."""

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        moved, reward, terminated = super().move(state, action, draws)
        return moved, -reward, terminated


class DenseGridWorld(GridWorld):
    """Reach a target (thesis, section 4.5.5): a step pays by how much nearer it comes, in cells along rows and columns, and the
    target ends the episode. Obstacles, two fewer than the grid has rows, stop the agent like walls. Observations: three images,
    the agent, the target, the obstacles. state: cells (p, 2 + obstacles)."""

    def __init__(self, *args: Any, size: int = 5):
        self.objects = size
        super().__init__(*args, size=size)

    def observe(self, state: State) -> Tensor:
        agent, target, obstacles = state["cells"].split([1, 1, self.objects - 2], -1)
        return torch.cat([self.image(cells) for cells in (agent, target, obstacles)], -1)

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        return (one // self.size - other // self.size).abs() + (one % self.size - other % self.size).abs()

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        agent, target, obstacles = state["cells"].split([1, 1, self.objects - 2], -1)
        there = self.go(agent[:, 0], action)[:, None]
        there = torch.where((there == obstacles).any(-1, keepdim=True), agent, there)
        reward = (self.distance(agent, target) - self.distance(there, target))[:, 0].to(self.dtype)
        return {"cells": torch.cat([there, target, obstacles], -1)}, reward, (there == target)[:, 0]


class HiddenGoal(GridWorld):
    """Find a cell that is not shown, in three rows and columns (thesis, section 6.3): it pays 1 and ends the episode, and the
    agent begins anew in any other cell. Actions as in GridWorld. Observations: the agent's cell, one of nine. The goal is the
    task: hidden_goal:0 to hidden_goal:8. state: cells (p, 1)."""

    objects = 1

    def __init__(self, *args: Any, size: int = 8):
        super().__init__(*args, size=3)
        if size > 8:
            raise EnvError(f"hidden_goal:{size} is not one of nine cells; choose 0 to 8.")
        self.goal, self.obs_size, self.max_steps = size, 9, None
        self.obs_scale = (1.0,) * 9

    def begin(self, draws: Tensor) -> State:
        cell = (draws * 8).long()
        return {"cells": cell + (cell >= self.goal).long()}

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        cell = self.go(state["cells"][:, 0], action)
        found = cell == self.goal
        return {"cells": cell[:, None]}, found.to(self.dtype), found
