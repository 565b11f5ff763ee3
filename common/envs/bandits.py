"""Multi-armed bandits."""

from typing import Any

import torch
from torch import Tensor

from common.envs.base import Env, Simulated, State


class Bandit(Simulated):
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


class IndependentBandit(Bandit):
    """Arms that pay 1, else 0, with probabilities drawn once per lifetime from U[0, 1], each on its own (thesis, section 4.5.2
    and appendix C.1). state: chances (p, b)."""

    move_draws = 1

    def __init__(self, *args: Any, size: int = 2):
        super().__init__(*args)
        self.num_actions = self.begin_draws = size

    def begin(self, draws: Tensor) -> State:
        return {"chances": draws.to(self.dtype)}

    def observe(self, state: State) -> Tensor:
        return torch.zeros(len(state["chances"]), 0, dtype=self.dtype, device=self.device)

    def payouts(self, state: State) -> Tensor:
        return state["chances"]

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        chance = state["chances"].gather(1, action[:, None])
        reward = (draws < chance)[:, 0].to(self.dtype)
        return {"chances": state["chances"]}, reward, torch.zeros_like(action, dtype=torch.bool)


class DependentBandit(IndependentBandit):
    """Two arms that pay with probabilities p and 1 - p, p from U[0, 1] (appendix C.1)."""

    begin_draws = 1

    def __init__(self, *args: Any):
        Env.__init__(self, *args)

    def chance(self, draw: Tensor) -> Tensor:
        return draw

    def begin(self, draws: Tensor) -> State:
        chance = self.chance(draws[:, 0].to(self.dtype))
        return {"chances": torch.stack([chance, 1 - chance], -1)}


class EasyBandit(DependentBandit):
    """As above with p from {0.1, 0.9}."""

    better = 0.9

    def chance(self, draw: Tensor) -> Tensor:
        return torch.where(draw < 0.5, self.better, 1 - self.better)


class MediumBandit(EasyBandit):
    """As above with p from {0.25, 0.75}."""

    better = 0.75


class HardBandit(EasyBandit):
    """As above with p from {0.4, 0.6}."""

    better = 0.6


class ContextualBandit(Simulated):
    """As many contexts as arms. One context, drawn anew before each pull, is shown as a one-hot vector; in each of them one arm
    pays 1, another -1 and the others nothing, which stays so for a lifetime. Whoever knows them gets 1 per step.
    state: good, bad (p, b), of each context; context (p,)."""

    episodic = False
    move_draws = 1

    def __init__(self, *args: Any, size: int = 4):
        super().__init__(*args)
        self.obs_size = self.num_actions = size
        self.obs_scale, self.begin_draws = (1.0,) * size, 2 * size + 1

    def begin(self, draws: Tensor) -> State:
        b = self.num_actions
        good, apart = (b * draws[:, :b]).long(), 1 + ((b - 1) * draws[:, b:-1]).long()
        return {"good": good, "bad": (good + apart) % b, "context": (b * draws[:, -1]).long()}

    def observe(self, state: State) -> Tensor:
        return torch.nn.functional.one_hot(state["context"], self.obs_size).to(self.dtype)

    def move(self, state: State, action: Tensor, draws: Tensor) -> tuple[State, Tensor, Tensor]:
        good, bad = (state[name].gather(1, state["context"][:, None])[:, 0] for name in ("good", "bad"))
        reward = (action == good).to(self.dtype) - (action == bad).to(self.dtype)
        context = (self.num_actions * draws[:, 0]).long()
        return (
            {"good": state["good"], "bad": state["bad"], "context": context},
            reward,
            torch.zeros_like(action, dtype=torch.bool),
        )
