"""Learners of supervised sequences: what they have in common, the class that a Python program uses,
and VSML's baselines.

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
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.rng import fold, key, normal

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

    def fit(self, tasks: Any) -> Any:
        """common.datasets.Tasks in a form for this learner. Raises DatasetError if there is none."""
        return tasks.fit(*self.sizes) if self.sizes else tasks

    def observe(self, params: Params, state: State, x: Tensor, y: Tensor) -> tuple[State, Tensor]:
        """Predict, then learn from the label: x (p, s, a), y (p, s) int64. Returns the logits, too."""
        state, logits = self.predict(params, state, x)
        label = (y[..., None] == torch.arange(logits.shape[-1], device=y.device)).to(logits.dtype)
        error = logits.softmax(-1) - label  # the gradient of the cross-entropy at the logits
        return self.learn(params, state, error, label), logits


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (p, ..., i) @ weight (p, i, j) + bias (p, j): one matrix for each member."""
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


def as_tensor(value: Any, device: torch.device) -> Tensor:
    """Raises ValueError for what is no array of numbers."""
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"torch.as_tensor takes other numbers only: {error}") from error


def finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise ValueError("Inputs are too large; z-normalise them.")
    return logits


class Classifier:
    """A meta-trained learner that learns your data: predict(x), learn(x, y) and reset(), in any order.

        classifier = vsml.VSML.load("pretrained")
        classifier.learn(x_train, y_train)
        probabilities = classifier.predict(x_test)

    theta: (d,). num_classes: how many there are (default: one more than the largest of the first
    labels). seed: decides the initial states.

    Inputs are arrays or tensors of finite numbers, z-normalised, (a,) for one example, (t, a) for
    several, one after the other and best in random order, or (s, t, a) for s independent learners
    side by side; images are flattened. The first `learn` decides a and s. Raises ValueError for
    other shapes, and for labels outside the classes.
    """

    def __init__(
        self, learner: Learner, theta: Tensor, num_classes: int | None = None, seed: int = 0
    ):
        whole = isinstance(num_classes, Integral) and not isinstance(num_classes, bool)
        if num_classes is not None and (not whole or num_classes < 2):
            raise ValueError(f"num_classes has to be a whole number from 2 on, not {num_classes}.")
        self.learner = learner
        self.params = learner.params(theta[None])
        self.device = theta.device
        self.given_classes = None if num_classes is None else int(num_classes)
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget all examples, the number of inputs and the number of learners."""
        self.state: State | None = None
        self.sizes: tuple[int, int] | None = None  # s, a
        self.num_classes = self.given_classes

    @torch.no_grad()
    def learn(self, x: Any, y: Any) -> None:
        """Learn from the examples x, in their order, with labels y (), (t,) or (s, t)."""
        x = self.examples(x)
        y = as_tensor(y, self.device)
        if y.is_floating_point() or y.is_complex():
            raise ValueError(f"Labels have to be whole numbers, not {y.dtype}.")
        y = y.long().view((1,) * (2 - y.ndim) + y.shape)
        if y.shape != x.shape[:2] or y.min() < 0:
            s, t = x.shape[:2]
            raise ValueError(
                f"There has to be a label from 0 on for each of {s} x {t} examples; flatten images."
            )
        num_classes = self.num_classes or max(2, int(y.max()) + 1)
        if y.max() >= num_classes:
            raise ValueError(f"A label is {y.max()}; give num_classes to load, now {num_classes}.")

        state = self.start(x, num_classes)
        for x_t, y_t in zip(x.unbind(1), y.unbind(1), strict=True):
            state, logits = self.learner.observe(self.params, state, x_t[None], y_t[None])
            finite(logits)
        self.state, self.sizes, self.num_classes = state, (len(x), x.shape[2]), num_classes

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Probabilities of the classes, (c,), (t, c) or (s, t, c). Nothing is learned."""
        inputs = self.examples(x)
        state = self.start(inputs, self.num_classes)
        logits = [self.learner.predict(self.params, state, x_t[None])[1] for x_t in inputs.unbind(1)]
        logits = finite(torch.stack(logits, 2)[0])
        return logits.softmax(-1).view(*as_tensor(x, self.device).shape[:-1], -1)

    def examples(self, x: Any) -> Tensor:
        """x as (s, t, a)."""
        x = as_tensor(x, self.device)
        x = x if x.is_complex() else x.float()
        if x.is_complex() or not 1 <= x.ndim <= 3 or x.numel() == 0 or not x.isfinite().all():
            raise ValueError("Inputs have to be finite numbers of shape (a,), (t, a) or (s, t, a).")
        return x.view((1,) * (3 - x.ndim) + x.shape)

    def start(self, x: Tensor, num_classes: int | None) -> State:
        """The state to continue from: the last one, or an initial one for inputs like x (s, t, a)."""
        if num_classes is None:
            raise ValueError("The number of classes is not known; give num_classes to load, or learn.")
        if self.state is None:
            keys = fold(key(self.seed, self.device), torch.arange(len(x), device=self.device))
            return self.learner.initial_state(keys[None], x.shape[2], num_classes)
        if self.sizes != (len(x), x.shape[2]):
            s, a = self.sizes
            raise ValueError(f"Inputs have to be those of {s} learners with {a} inputs each.")
        return self.state


# ==================================================================================================
# Baselines that are meta-trained
# ==================================================================================================
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
    fast weights by Oja's rule, whose y is the softmax of its outputs, as in the release. Sizes are
    fixed."""

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
        """The fast weights, the last input, and zeros for the outputs that there are."""
        fast = torch.zeros(*keys.shape[:2], *self.shapes["weight"], device=keys.device)
        return fast, fast[..., 0], fast[..., 0, :num_outputs]

    def layer(self, params: Params, fast: Tensor, x: Tensor) -> Tensor:
        slow = affine(x, params["weight"], params["bias"])
        return slow + (x[..., None, :] @ (params["alpha"][:, None] * fast)).squeeze(-2)

    def predict(self, params: Params, state: State, x: Tensor) -> tuple[State, Tensor]:
        fast, _, outputs = state
        x = pad(x, self.shapes["weight"][0])
        logits = self.layer(params, fast, x)[..., : outputs.shape[-1]]
        return (fast, x, outputs), bounded(logits, self.bound)

    def learn(self, params: Params, state: State, error: Tensor, label: Tensor) -> State:
        num_inputs, num_outputs = self.sizes
        fast, x, outputs = state
        x = torch.cat([x[..., :num_inputs], pad(error, num_outputs), pad(label, num_outputs)], -1)
        y = self.layer(params, fast, x).softmax(-1)[..., None, :]
        rate = params["rate"][..., None, None].sigmoid()
        return fast + rate * y * (x[..., None] - y * fast), x, outputs  # Oja's rule


# ==================================================================================================
# Baselines by gradient descent
# ==================================================================================================
def descend(
    weight: Tensor, x: Tensor, error: Tensor, lr: Tensor, t: Tensor, *moments: Tensor, decay: Tensor | None = None
) -> tuple[Tensor, ...]:
    """One step of gradient descent on weight (p, s, a, b) with inputs x (p, s, a) and the gradient
    error (p, s, b) at its outputs; with two moments, by Adam (Kingma and Ba 2015, Algorithm 1), with
    weight decay as well by AdamW. Returns the new weight and moments."""
    step = grad = x[..., :, None] * error[..., None, :]
    if moments:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        moments = torch.lerp(grad, moments[0], beta1), torch.lerp(grad**2, moments[1], beta2)
        step = moments[0] / (1 - beta1**t) / ((moments[1] / (1 - beta2**t)).sqrt() + eps)
    if decay is not None:
        step = step + decay * weight
    return weight - lr * step, *moments


class OnlineSGD(Learner):
    """Dense tanh layers trained online by gradient descent, or Adam. theta is log10 of the rate."""

    shapes: ClassVar = {"log_lr": (1,)}

    def __init__(self, adam: bool, hidden: tuple[int, ...] = (), descend: Callable = descend):
        self.adam = adam
        self.hidden = hidden
        self.descend = descend

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor([-3.0 if self.adam else -2.0])  # appendix B.3.2

    def initial_state(self, keys: Tensor, num_inputs: int, num_outputs: int) -> State:
        """Weights and moments of all layers, their inputs, the number of examples seen."""
        layers, inputs = [], []
        for k, (a, b) in enumerate(pairwise((num_inputs, *self.hidden, num_outputs))):
            weight = normal(fold(keys, k) if k else keys, a * b, math.sqrt(a))
            weight = F.pad(weight.view(*keys.shape[:2], a, b), (0, 0, 0, 1))  # the bias, last
            layers.append((weight, *(torch.zeros_like(weight) for _ in range(2 * self.adam))))
            inputs.append(weight.new_zeros(*keys.shape[:2], a + 1))
        return layers, inputs, keys.new_zeros((), dtype=torch.float32)

    def predict(self, params: Params, state: State, x: Tensor) -> tuple[State, Tensor]:
        layers, inputs, t = state
        inputs = []
        for weight, *_ in layers:
            inputs.append(F.pad(x.tanh() if inputs else x, (0, 1), value=1.0))
            x = (inputs[-1][..., None, :] @ weight).squeeze(-2)
        return (layers, inputs, t), x

    def learn(self, params: Params, state: State, error: Tensor, label: Tensor) -> State:
        layers, inputs, t = state
        layers, lr = list(layers), 10 ** params["log_lr"][..., None, None]
        for k in reversed(range(len(layers))):
            weight, x = layers[k][0], inputs[k]
            layers[k] = self.descend(weight, x, error, lr, t + 1, *layers[k][1:])
            if k > 0:  # backpropagation through tanh
                error = ((weight @ error[..., None]).squeeze(-1) * (1 - x**2))[..., :-1]
        return layers, inputs, t + 1
