"""Multi-armed bandits: no episodes, and but for the contextual ones nothing to observe.

Axes: p environments in parallel, b arms.
"""

from typing import Any

import torch
from torch import Tensor

from common.envs.base import Simulation, State, never


class Bandit(Simulation):
    """Two arms, of which the first pays 1 and the other 0 (thesis, section 7.4).

    The best policy gets 1 per step. state: good (p,), the arm that pays.
    """

    num_actions = 2
    episodic = False
    reset_draws = 1  # not used, but what a seed of FME means depends on it

    def reset_env(self, draws: Tensor) -> State:
        return {"good": torch.zeros(len(draws), dtype=torch.int64, device=draws.device)}

    def get_obs(self, state: State) -> Tensor:
        return torch.zeros(len(state["steps"]), 0, dtype=self.dtype, device=self.device)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        reward = (action == state["good"]).to(self.dtype)
        return {"good": state["good"]}, reward, never(reward)


class SwappingBandit(Bandit):
    """The two arms swap after a number of pulls that is drawn anew each time, uniformly from
    `shortest` to `longest` (the thesis has "random intervals", section 7.4).

    Repeating an arm that paid and leaving one that did not misses one pull in twenty on average,
    and gets 0.95 per step.
    state: good (p,), the arm that pays; since (p,), pulls since the last swap; left (p,), pulls
    until the next one.
    """

    shortest = 10
    longest = 30
    step_draws = 1

    def reset_env(self, draws: Tensor) -> State:
        good = (draws[:, 0] < 0.5).long()
        return {
            "good": good,
            "since": torch.zeros_like(good),
            "left": self.interval(draws[:, 0] * 2 % 1),
        }

    def interval(self, draw: Tensor) -> Tensor:
        """Pulls until the next swap (p,), from uniform numbers (p,)."""
        return self.shortest + (draw * (self.longest - self.shortest + 1)).long()

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        _, reward, terminated = super().step_env(state, action, draws)
        swap = state["left"] == 1
        moved = {
            "good": torch.where(swap, 1 - state["good"], state["good"]),
            "since": torch.where(swap, 0, state["since"] + 1),
            "left": torch.where(swap, self.interval(draws[:, 0]), state["left"] - 1),
        }
        return moved, reward, terminated


class IndependentBandit(Bandit):
    """Arms that pay 1 or 0, each with a probability that is drawn from U[0, 1] once per lifetime
    (thesis, section 4.5.2 and appendix C.1).

    The size is the number of arms. state: chances (p, b), the probabilities.
    """

    min_size = 2
    step_draws = 1

    def __init__(self, *args: Any, size: int = 2):
        super().__init__(*args)
        self.num_actions = size
        self.reset_draws = size

    def reset_env(self, draws: Tensor) -> State:
        return {"chances": draws.to(self.dtype)}

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        chance = state["chances"].gather(1, action[:, None])
        reward = (draws < chance)[:, 0].to(self.dtype)
        return {"chances": state["chances"]}, reward, never(reward)

    def expected_rewards(self, state: State) -> Tensor:
        return state["chances"]


class DependentBandit(IndependentBandit):
    """Two arms that pay 1 with probabilities q and 1 - q, else 0 (thesis, appendix C.1).

    q is drawn once per lifetime, from U[0, 1] or, with `better`, from {better, 1 - better}.
    """

    min_size = None

    def __init__(self, *args: Any, better: float | None = None):
        super().__init__(*args)
        self.better = better
        self.reset_draws = 1

    def reset_env(self, draws: Tensor) -> State:
        chance = draws[:, 0].to(self.dtype)
        if self.better is not None:
            chance = torch.where(chance < 0.5, self.better, 1 - self.better)
        return {"chances": torch.stack([chance, 1 - chance], -1)}


class ContextualBandit(Simulation):
    """As many contexts as arms. Each pull has a context that is drawn anew and observed as a
    one-hot vector.

    In each context one arm pays 1, another one -1, and the others 0, for the whole lifetime. The
    best policy gets 1 per step. The size is the number of arms.
    state: good and bad (p, contexts), an arm each; context (p,).
    """

    episodic = False
    min_size = 2
    step_draws = 1

    def __init__(self, *args: Any, size: int = 4):
        super().__init__(*args)
        self.obs_size = size
        self.obs_scale = (1.0,) * size
        self.num_actions = size
        self.reset_draws = 2 * size + 1

    def reset_env(self, draws: Tensor) -> State:
        b = self.num_actions
        good = (b * draws[:, :b]).long()
        offset = 1 + ((b - 1) * draws[:, b:-1]).long()  # another arm than the good one
        context = (b * draws[:, -1]).long()
        return {"good": good, "bad": (good + offset) % b, "context": context}

    def get_obs(self, state: State) -> Tensor:
        return torch.nn.functional.one_hot(state["context"], self.obs_size).to(self.dtype)

    def step_env(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        context = state["context"][:, None]
        good = state["good"].gather(1, context)[:, 0]
        bad = state["bad"].gather(1, context)[:, 0]
        reward = (action == good).to(self.dtype) - (action == bad).to(self.dtype)
        moved = {
            "good": state["good"],
            "bad": state["bad"],
            "context": (self.num_actions * draws[:, 0]).long(),
        }
        return moved, reward, never(reward)
