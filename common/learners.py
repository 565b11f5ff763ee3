"""Learners of supervised sequences: what they have in common, and VSML's meta-trained baselines.

    learner = InContextRNN(num_inputs=64, num_outputs=10, size=16)
    theta = learner.init(torch.Generator().manual_seed(0))[None]  # (p, d)
    state = learner.initial_state(keys, 64, 10)
    state, logits = learner.predict(learner.params(theta), state, x)
    state = learner.learn(learner.params(theta), state, error, label)

Axes: p members of a population, each with its own theta, s sequences in parallel, a inputs, b
outputs, n hidden state.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
State = Any


class Learner:
    """What all learners have in common. Meta-training changes nothing but theta, a flat vector.

    init(generator) -> theta (d,)
    initial_state(keys (p, s, 2), num_inputs, num_outputs) -> state
    predict(params, state, x (p, s, a)) -> state, logits (p, s, b)
    learn(params, state, error (p, s, b), label (p, s, b) one-hot) -> state
    """

    shapes: dict[str, tuple[int, ...]]  # of the parameters in theta
    sizes: tuple[int, int] | None = None  # numbers of inputs and outputs, where they cannot vary
    step: Callable | None = None  # one_example of this learner, compiled
    rollout_fn: Callable | None = None  # a faster rollout of this learner

    def params(self, theta: Tensor) -> Params:
        """Views of theta (p, d) as named parameters, each (p, *shape)."""
        parts = theta.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        views = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(-1, *shape) for (name, shape), part in views}


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (p, ..., i) @ weight (p, i, j) + bias (p, j): the same everywhere, but for the members."""
    y = x.flatten(1, -2) @ weight
    return (y if bias is None else y + bias[:, None]).unflatten(1, x.shape[1:-1])


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    return affine(x, params[name + ".weight"], params[name + ".bias"])


def initial_weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A matrix (fan-in, fan-out) of truncated normals of std 1/sqrt(fan-in), or zeros (size,)."""
    if len(shape) == 1:
        return torch.zeros(shape)
    weight = torch.nn.init.trunc_normal_(torch.empty(shape), a=-2, b=2, generator=generator)
    return weight / math.sqrt(shape[0])


def bounded(logits: Tensor, bound: float) -> Tensor:
    """Squashed to +- bound."""
    return bound * torch.tanh(logits / bound)


def pad(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, size - x.shape[-1]))


class InContextRNN(Learner):
    """The in-context RNN (Hochreiter et al. 2001; thesis, appendix B.3.2): one LSTM whose inputs are
    the image, the last error and, if `feed_label`, the last label. Its sizes are fixed: fewer inputs
    and outputs are padded with zeros. size: units; ticks: per example."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        bound: float = 100.0,
        size: int = 16,
        ticks: int = 2,
        feed_label: bool = False,
    ):
        n = self.size = size
        self.bound = bound
        self.ticks = ticks
        self.feed_label = feed_label
        self.sizes = num_inputs, num_outputs
        inputs = num_inputs + (1 + feed_label) * num_outputs
        self.shapes = {"lstm.weight": (inputs + n, 4 * n), "lstm.bias": (4 * n,)}
        self.shapes |= {"out.weight": (n, num_outputs), "out.bias": (num_outputs,)}

    def init(self, generator: torch.Generator) -> Tensor:
        theta = {name: initial_weight(shape, generator) for name, shape in self.shapes.items()}
        theta["lstm.bias"][2 * self.size : 3 * self.size] += 1  # the usual forget bias
        return torch.cat([value.flatten() for value in theta.values()])

    def initial_state(self, keys: Tensor, num_inputs: int, num_outputs: int) -> State:
        """h, c, the last error, the last label."""
        sizes = (self.size, self.size, num_outputs, num_outputs)
        return tuple(torch.zeros(*keys.shape[:2], size, device=keys.device) for size in sizes)

    def predict(self, params: Params, state: State, x: Tensor) -> tuple[State, Tensor]:
        h, c, error, label, *memory = state
        num_inputs, num_outputs = self.sizes
        inputs = [pad(x, num_inputs), pad(error, num_outputs)]
        inputs += [pad(label, num_outputs)] * self.feed_label
        for _ in range(self.ticks):
            i, j, f, o = linear(params, "lstm", torch.cat([*inputs, h], -1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * j.tanh()
            h = o.sigmoid() * c.tanh()
        read, memory = self.read(params, h, *memory)
        logits = linear(params, "out", read)[..., : error.shape[-1]]
        return (h, c, error, label, *memory), bounded(logits, self.bound)

    def read(self, params: Params, h: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the logits are made of, and the memory, which this learner has none of."""
        return h, ()

    def learn(self, params: Params, state: State, error: Tensor, label: Tensor) -> State:
        return (*state[:2], error, label, *state[4:])


class FastWeightMemory(InContextRNN):
    """An LSTM of 32 units beside a matrix (16, 16^2), which it writes to by the delta rule and
    reads from, one tick per example (Schlag et al. 2021; the sizes of VSML's release).
    memory: side of that matrix."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        bound: float = 100.0,
        feed_label: bool = False,
        memory: int = 16,
    ):
        super().__init__(num_inputs, num_outputs, bound, 2 * memory, 1, feed_label)
        n, self.memory = self.size, memory
        heads = {"write.weight": (n, 3 * memory + 1), "write.bias": (3 * memory + 1,)}
        heads |= {"read.weight": (n, 2 * memory), "read.bias": (2 * memory,)}
        heads |= {"value.weight": (memory, n), "value.bias": (n,)}
        out = {name: self.shapes.pop(name) for name in ("out.weight", "out.bias")}
        self.shapes |= heads | out

    def initial_state(self, keys: Tensor, num_inputs: int, num_outputs: int) -> State:
        memory = torch.zeros(*keys.shape[:2], self.memory, self.memory**2, device=keys.device)
        return *super().initial_state(keys, num_inputs, num_outputs), memory

    def read(self, params: Params, h: Tensor, memory: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        def outer(a: Tensor, b: Tensor) -> Tensor:
            return (a[..., :, None] * b[..., None, :]).flatten(-2)

        size = self.memory
        *write, beta = linear(params, "write", h).split([size, size, size, 1], -1)
        k1, k2, v = (part.tanh() for part in write)
        k = outer(k1, k2)
        error = v - (memory @ k[..., None]).squeeze(-1)
        memory = memory + (error * beta.sigmoid())[..., None] * k[..., None, :]
        memory = memory / memory.flatten(-2).norm(dim=-1).clamp(min=1)[..., None, None]

        q = outer(*linear(params, "read", h).tanh().chunk(2, -1))
        value = F.layer_norm((memory @ q[..., None]).squeeze(-1), (size,))
        return h + linear(params, "value", value), (memory,)


class Hebbian(Learner):
    """Hebbian fast weights (Miconi et al. 2018; thesis, B.3.2): one layer of weights w + alpha *
    fast. A first pass predicts; a second one, which also has error and label as inputs, changes the
    fast weights by Oja's rule. Sizes are fixed."""

    def __init__(self, num_inputs: int, num_outputs: int, bound: float = 100.0):
        shape = (num_inputs + 2 * num_outputs, num_outputs)
        self.bound = bound
        self.sizes = num_inputs, num_outputs
        self.shapes = {"weight": shape, "bias": shape[1:], "alpha": shape, "rate": (1,)}

    def init(self, generator: torch.Generator) -> Tensor:
        shape = self.shapes["weight"]
        weight = initial_weight(shape, generator)
        alpha, rate = torch.full(shape, 0.01), torch.tensor([-4.5])  # the release
        return torch.cat([weight.flatten(), torch.zeros(shape[1]), alpha.flatten(), rate])

    def initial_state(self, keys: Tensor, num_inputs: int, num_outputs: int) -> State:
        """The fast weights, and the last input."""
        fast = torch.zeros(*keys.shape[:2], *self.shapes["weight"], device=keys.device)
        return fast, fast[..., 0]

    def layer(self, params: Params, fast: Tensor, x: Tensor) -> Tensor:
        slow = affine(x, params["weight"], params["bias"])
        return slow + (x[..., None, :] @ (params["alpha"][:, None] * fast)).squeeze(-2)

    def predict(self, params: Params, state: State, x: Tensor) -> tuple[State, Tensor]:
        x = pad(x, self.shapes["weight"][0])
        logits = self.layer(params, state[0], x)
        return (state[0], x), bounded(logits, self.bound)

    def learn(self, params: Params, state: State, error: Tensor, label: Tensor) -> State:
        num_inputs, num_outputs = self.sizes
        fast, x = state
        x = torch.cat([x[..., :num_inputs], pad(error, num_outputs), pad(label, num_outputs)], -1)
        y = self.layer(params, fast, x).softmax(-1)[..., None, :]
        rate = params["rate"][..., None, None].sigmoid()
        return fast + rate * y * (x[..., None] - y * fast), x  # Oja's rule
