"""An optimiser by signs, and statistics of the steps of any optimiser (thesis, section 5.4.3, appendix D)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SignOfAverage(torch.optim.Optimizer):
    """theta <- theta - lr * sign(average of past gradients) (Figure D.12a)."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9):
        super().__init__(params, dict(lr=lr, beta=beta))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(group["lr"] * average.sign())


class Statistics:
    """Norms of gradients and updates of each tensor and of all, the cosines between those of consecutive steps, and
    the distance of the parameters from their initial values (Figures D.8 to D.10); for Adam also the norms of its averages
    of gradients and of their squares. Watches an optimiser's steps, so gradients are those after --clip."""

    def __init__(self, learner: nn.Module, optimizer: torch.optim.Optimizer):
        self.named, self.optimizer = dict(learner.named_parameters()), optimizer
        self.values: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, *_: Any) -> None:
        self.start = [parameter.detach().clone() for parameter in self.named.values()]

    def after(self, *_: Any) -> None:
        states = [self.optimizer.state[parameter] for parameter in self.named.values()]  # are saved with the optimiser
        now = [parameter.detach() for parameter in self.named.values()]
        for state, start in zip(states, self.start, strict=True):
            state.setdefault("initial", start)
        moved = (p - state["initial"] for p, state in zip(now, states, strict=True))
        self.values["distance"] = torch.cat([part.flatten() for part in moved]).norm()

        gradients = [parameter.grad for parameter in self.named.values()]
        updates = [p - start for p, start in zip(now, self.start, strict=True)]
        for kind, tensors in (("gradient", gradients), ("update", updates)):
            tensors = [tensor.flatten() for tensor in tensors]
            last = [state.get(f"last {kind}", torch.zeros_like(x)) for state, x in zip(states, tensors, strict=True)]
            pairs = zip([*tensors, torch.cat(tensors)], [*last, torch.cat(last)], strict=True)
            for name, (new, old) in zip([*self.named, "all"], pairs, strict=True):
                self.values[f"{kind} norm {name}"] = new.norm()
                self.values[f"{kind} cosine {name}"] = F.cosine_similarity(new, old, 0)
            for state, tensor in zip(states, tensors, strict=True):
                state[f"last {kind}"] = tensor.clone()
        for name, state in zip(self.named, states, strict=True):
            self.values |= {f"{kind} norm {name}": state[kind].norm() for kind in ("exp_avg", "exp_avg_sq") if kind in state}
