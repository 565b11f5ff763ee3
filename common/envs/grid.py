"""Grid worlds. Actions: up, down, left, right; walls stop the agent.

A cell is an integer, its row times the size plus its column. state: cells (p, n), of the objects.

Axes: p environments in parallel, n objects.
"""

from typing import Any

import torch
from torch import Tensor

from common.envs.base import EnvError, Simulation, State


class GridWorld(Simulation):
    """A heart that pays +1 and a trap that pays -1; `swapped`, the heart pays -1 and the trap +1
    (thesis, section 4.5.4). Agent, heart and trap start in different random cells, and reaching
    either ends the episode. The size is that of a side.

    The thesis names neither a size nor a time limit.
    Observations: three images of zeros and ones, with the agent, the heart and the trap.
    state: cells of agent, heart and trap.
    """

    num_actions = 4
    min_size = 2
    objects = 3

    def __init__(self, *args: Any, size: int = 5, swapped: bool = False):
        super().__init__(*args)
        self.size = size
        self.swapped = swapped
        self.obs_size = 3 * size**2
        self.obs_scale = (1.0,) * self.obs_size
        self.max_steps = 5 * size
        self.reset_draws = self.objects

    def reset_env(self, draws: Tensor) -> State:
        return {"cells": self.distinct_cells(draws)}

    def distinct_cells(self, draws: Tensor) -> Tensor:
        """As many different cells as there are draws (p, n), all arrangements equally likely: the
        first n steps of a Fisher-Yates shuffle, which swaps cell j with cell chosen[j]."""
        chosen = []
        cells = []
        for j, draw in enumerate(draws.unbind(-1)):
            cell = j + (draw * (self.size**2 - j)).long()
            chosen.append(cell)
            for i in reversed(range(j)):  # undo the swaps of before
                cell = torch.where(cell == chosen[i], i, cell)
            cells.append(cell)
        return torch.stack(cells, -1)

    def image(self, cells: Tensor) -> Tensor:
        """An image (p, size * size) that is 1 in the cells (p, n) and 0 elsewhere."""
        every_cell = torch.arange(self.size**2, device=self.device)
        return (cells[..., None] == every_cell).any(1).to(self.dtype)

    def get_obs(self, state: State) -> Tensor:
        return torch.cat([self.image(cell) for cell in state["cells"].split(1, -1)], -1)

    def neighbour(self, cell: Tensor, action: Tensor) -> Tensor:
        """The cell (p,) that an action leads to from `cell` (p,), the same one at a wall."""
        row = cell // self.size + (action == 1).long() - (action == 0).long()
        column = cell % self.size + (action == 3).long() - (action == 2).long()
        return row.clamp(0, self.size - 1) * self.size + column.clamp(0, self.size - 1)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        agent, heart, trap = state["cells"].unbind(-1)
        agent = self.neighbour(agent, action)
        reward = (agent == heart).to(self.dtype) - (agent == trap).to(self.dtype)
        if self.swapped:
            reward = -reward
        return {"cells": torch.stack([agent, heart, trap], -1)}, reward, reward != 0


class DenseGridWorld(GridWorld):
    """A target that ends the episode, and a reward for each step that comes nearer to it (thesis,
    section 4.5.5): the distance before the step minus the distance after it, along rows and
    columns. Obstacles, two fewer than the grid has rows, stop the agent like walls.

    Observations: three images, the agent, the target and the obstacles.
    state: cells of agent, target and obstacles.
    """

    min_size = 3

    def __init__(self, *args: Any, size: int = 5):
        self.objects = size
        super().__init__(*args, size=size)

    def get_obs(self, state: State) -> Tensor:
        agent, target, obstacles = state["cells"].split([1, 1, self.objects - 2], -1)
        return torch.cat([self.image(cells) for cells in (agent, target, obstacles)], -1)

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Steps between two cells without obstacles."""
        rows = (one // self.size - other // self.size).abs()
        columns = (one % self.size - other % self.size).abs()
        return rows + columns

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        agent, target, obstacles = state["cells"].split([1, 1, self.objects - 2], -1)
        moved = self.neighbour(agent[:, 0], action)[:, None]
        moved = torch.where((moved == obstacles).any(-1, keepdim=True), agent, moved)
        reward = (self.distance(agent, target) - self.distance(moved, target))[:, 0]
        cells = torch.cat([moved, target, obstacles], -1)
        return {"cells": cells}, reward.to(self.dtype), (moved == target)[:, 0]


class HiddenGoal(GridWorld):
    """A goal that is not observed, in a grid of three by three (thesis, section 6.3). Reaching it
    pays 1 and ends the episode; the next one starts in any other cell, and there is no time limit.

    The size is the goal's cell, from hidden_goal:0 to hidden_goal:8, and defines the task.
    Raises EnvError for a larger size.
    Observations: the agent's cell, one-hot. state: the agent's cell.
    """

    min_size = 0
    objects = 1

    def __init__(self, *args: Any, size: int = 8):
        super().__init__(*args, size=3)
        if size > 8:
            raise EnvError(f"hidden_goal:{size} is not one of nine cells; choose 0 to 8.")
        self.goal = size
        self.obs_size = 9
        self.obs_scale = (1.0,) * 9
        self.max_steps = None

    def reset_env(self, draws: Tensor) -> State:
        cell = (draws * 8).long()
        return {"cells": cell + (cell >= self.goal).long()}  # all cells but the goal

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        cell = self.neighbour(state["cells"][:, 0], action)
        reached = cell == self.goal
        return {"cells": cell[:, None]}, reached.to(self.dtype), reached
