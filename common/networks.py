"""Networks of many agents: every network of every agent is one row of a matrix, and all take a step at
once.

    net = Network((3, 32, 32, 1))
    params = net.init(5, torch.Generator().manual_seed(0))  # (p, d): five agents
    y = net(params, x)  # (p, ..., 3) -> (p, ..., 1)

Axes: p agents, d all parameters of a network.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Network(NamedTuple):
    """A feed-forward network whose parameters are one row of a matrix for each agent: layers of the sizes given, layer
    normalisation behind each activation if asked for (A.2.1)."""

    sizes: tuple[int, ...]
    activation: Callable[[Tensor], Tensor] = torch.relu
    normalized: bool = True
    linear_output: bool = True  # the last layer has no activation and no normalisation

    @property
    def hidden_layers(self) -> int:
        return len(self.sizes) - 1 - self.linear_output

    @property
    def shapes(self) -> list[tuple[int, str, tuple[int, int]]]:
        """(layer, name, shape) of weight and bias of each layer, and gain and shift of each normalisation."""
        shapes = []
        for i, (a, b) in enumerate(pairwise(self.sizes)):
            shapes += [(i, "weight", (a, b)), (i, "bias", (1, b))]
            if self.normalized and i < self.hidden_layers:
                shapes += [(i, "gain", (1, b)), (i, "shift", (1, b))]
        return shapes

    @property
    def d(self) -> int:
        return sum(math.prod(shape) for *_, shape in self.shapes)

    def init(self, p: int, generator: torch.Generator) -> Tensor:
        """(p, d): weights and biases uniform within 1 / sqrt(inputs), gains 1, shifts 0."""
        parts = []
        for i, (a, b) in enumerate(pairwise(self.sizes)):
            parts.append((2 * torch.rand(p, (a + 1) * b, generator=generator) - 1) / math.sqrt(a))
            if self.normalized and i < self.hidden_layers:
                parts += [torch.ones(p, b), torch.zeros(p, b)]
        return torch.cat(parts, -1)

    def __call__(self, params: Tensor, x: Tensor) -> Tensor:
        """params (p, d), x (p, ..., sizes[0]) -> (p, ..., sizes[-1])."""
        y = x.flatten(1, -2)
        for i, layer in enumerate(self.layers(params)):
            y = torch.baddbmm(layer["bias"], y, layer["weight"])
            if i < self.hidden_layers:
                y = self.activation(y)
            if "gain" in layer:
                y = F.layer_norm(y, y.shape[-1:]) * layer["gain"] + layer["shift"]
        return y.unflatten(1, x.shape[1:-1])

    def layers(self, params: Tensor) -> list[dict[str, Tensor]]:
        """Parameters (p, d) of each layer by their names."""
        layers: list[dict[str, Tensor]] = [{} for _ in self.sizes[1:]]
        parts = params.split([math.prod(shape) for *_, shape in self.shapes], -1)
        for (i, name, shape), part in zip(self.shapes, parts, strict=True):
            layers[i][name] = part.unflatten(-1, shape)
        return layers


def half_squares(x: Tensor) -> Tensor:
    """ReLU for one half of the units, squares for the other (A.2.1)."""
    one, other = x.chunk(2, -1)
    return torch.cat([one.relu(), other.square()], -1)


def gradient(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The function that returns the gradient and the value of a scalar function of one tensor, itself differentiable inside
    another `gradient`. torch.func has it, and torch.compile takes it; autograd does the same in little more than half the time
    where nothing is compiled."""
    if torch.compiler.is_compiling():
        return torch.func.grad_and_value(f)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if inside and x.requires_grad else x.detach().requires_grad_()
            y = f(x)
            (g,) = torch.autograd.grad(y, x, create_graph=inside)
        return g, y if inside else y.detach()

    return both


def init_adam(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moments and steps of `adam` before the first one. params: (..., p, d)."""
    moments = {f"{name}_{moment}": torch.zeros_like(x) for name, x in params.items() for moment in "mv"}
    return moments | {f"{name}_steps": torch.zeros(x.shape[-2], 1) for name, x in params.items()}


def adam(state: dict[str, Tensor], name: str, g: Tensor, lr: float, where: Tensor) -> dict[str, Tensor]:
    """A step of Adam (Kingma and Ba 2014) for the agents in `where` (p,), each counting its own steps. g (..., p, d)."""
    where = where[:, None]
    steps = state[f"{name}_steps"] + where.to(g.dtype)
    m, v = state[f"{name}_m"].lerp(g, 0.1), state[f"{name}_v"].lerp(g * g, 0.001)
    safe = steps.clamp(min=1)
    moved = state[name] - lr * (m / (1 - 0.9**safe)) / ((v / (1 - 0.999**safe)).sqrt() + 1e-8)
    new = {name: moved, f"{name}_m": m, f"{name}_v": v}
    return {key: torch.where(where, value, state[key]) for key, value in new.items()} | {f"{name}_steps": steps}
