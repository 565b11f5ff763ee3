"""Learning-algorithm cloning: sub-LSTMs of VSML learn to be backpropagation (thesis, section 3.3.2,
appendices B.2.1 and B.3.1).

    learner = Clone(vsml)  # of vsml.py, with --preset clone
    grad, loss, explained = gradient(args, learner, theta, [tasks], step, [{"state": states}])

How both sides are scaled, so that weights of layers of any size stay in the range of the LSTMs:

                   the network (Backprop)                     its clone (Clone)
  forward          y_b = sum_a (tanh(x_a) w + b) / sqrt(a)    mean over a, times sqrt(a)
  error below      sum_b e_b w tanh'(x_a) / sqrt(a)           mean over b, times b / sqrt(a)
  update           w -= rate e_b tanh(x_a), b -= rate e_b     the same, read from the cell
  storage          w and b                                    w / 4 and b / 4 in two entries of c; h = tanh(c)
  of a batch       mean of the new w and b                    the same, of cells clipped to [-4, 4]

So the update is gradient descent with the rate times sqrt(a) in each layer.

Axes: p networks, s examples of a batch, a inputs, b outputs.
"""

import math
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cells import exp_tanh
from common.learners import Learner, Params, pad
from common.rng import fold, normal

BUFFER = 64  # networks in the buffer (appendix B.3.1; the size is not in the thesis)


class Weights(NamedTuple):
    """The state of one layer of a network that is trained in batches."""

    wb: Tensor  # (p, s, a, b, 2) weight and bias of each synapse; s is 1 where a batch shares them
    x: Tensor  # (p, s, a) the last inputs, stored and fed back for the backward pass
    error: Tensor  # (p, s, b) the last errors at the outputs


class Backprop(Learner):
    """What is cloned: a network trained by backpropagation and gradient descent, in batches. s are
    the examples of a batch, whose new weights are averaged."""

    shapes: ClassVar = {}

    def __init__(self, args: Any):
        self.args = args  # the flags of vsml.py

    def forward(self, params: Params, wb: Tensor, x: Tensor) -> Tensor:
        """y (p, s, b) of a layer."""
        w, b = wb.unbind(-1)
        return ((x.tanh()[..., None, :] @ w).squeeze(-2) + b.sum(-2)) / math.sqrt(x.shape[-1])

    def backward(self, params: Params, wb: Tensor, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """The error below (p, s, a) and the new wb (p, s, a, b, 2) of a layer."""
        below = (wb[..., 0] @ error[..., None]).squeeze(-1) / math.sqrt(x.shape[-1])
        inputs = torch.stack([x.tanh(), torch.ones_like(x)], -1)
        change = inputs[..., :, None, :] * error[..., None, :, None]
        return below * (1 - x.tanh() ** 2), wb - self.args.clone_rate * change

    def init(self, generator: torch.Generator) -> Tensor:
        return torch.zeros(0)

    def initial_state(self, keys: Tensor, num_inputs: int, num_outputs: int) -> list[Weights]:
        """Weights 0.3 N(0, 1) and zero biases, the same for the whole batch."""
        layers = []
        for k, (a, b) in enumerate(pairwise((num_inputs, *self.args.hidden, num_outputs))):
            w = 0.3 * normal(fold(keys[:, :1], k), a * b).view(-1, 1, a, b)
            x, error = (w.new_zeros(*keys.shape[:2], size) for size in (a, b))
            layers.append(Weights(torch.stack([w, torch.zeros_like(w)], -1), x, error))
        return layers

    def predict(self, params: Params, layers: list[Weights], x: Tensor) -> tuple[list[Weights], Tensor]:
        """The layers in order 1, ..., K, with frozen states."""
        seen = []
        for layer in layers:
            seen.append(layer._replace(x=x))
            x = self.forward(params, layer.wb, x)
        return seen, x

    def learn(self, params: Params, layers: list[Weights], error: Tensor, label: Tensor) -> list[Weights]:
        """The layers in order K, ..., 1."""
        learned = []
        for layer in reversed(layers):
            below, wb = self.backward(params, layer.wb, layer.x, error)
            learned.append(layer._replace(wb=wb.mean(1, keepdim=True), error=error))
            error = below
        return learned[::-1]


class Clone(Backprop):
    """Sub-LSTMs that are backpropagation: weight and bias are two entries of their cells; all other
    entries of states and of messages are zero (appendix B.3.1). After one tick messages are sent,
    after a second one the new weight and bias are read: one tick alone cannot multiply input and
    error. What is zero adds nothing and is left out; only what is read is computed."""

    def __init__(self, vsml: Any):
        super().__init__(vsml.args)
        self.vsml = vsml
        self.shapes = vsml.shapes
        self.init = vsml.init

    def gates(self, params: Params, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """What the first entries of both messages, x and error, add to the gates."""
        weight, bias = params["lstm.weight"], params["lstm.bias"]
        from_a = x[..., None] * weight[:, None, :1] + bias[:, None, None]
        from_b = error[..., None] * weight[:, None, self.args.message_size, None]
        return from_a, from_b

    def tick(self, params: Params, wb: Tensor, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """h and c after one tick (lstm_cell in vsml.py). A gate is the sum of what comes from input,
        output and synapse. So its exponential is a product, of exponentials that many share."""
        n, m = self.args.state_size, self.args.message_size
        c = wb / 4
        h = c.tanh()[..., None]
        from_a, from_b = self.gates(params, x, error)

        def exp(factor: int, columns: slice) -> Tensor:
            """exp(factor * gate). Parts are clipped, far beyond where gates saturate, so that the
            product stays finite."""
            recurrent = params["lstm.weight"][:, None, None, None, 2 * m : 2 * m + 2, columns]
            from_h = (h * recurrent).sum(-2)
            parts = from_a[..., :, None, columns], from_b[..., None, :, columns], from_h
            of_a, of_b, of_h = ((factor * part).clamp(-29, 29).exp() for part in parts)
            return of_a * of_b * of_h

        i, o = (exp(-1, slice(k * n, k * n + n)) for k in (0, 3))
        j = exp(-2, slice(n, 2 * n))
        f = exp(-1, slice(2 * n, 2 * n + 2))
        c = (1 - j) / ((1 + i) * (1 + j)) + pad(c / (1 + f), n)  # sigmoid(i) tanh(j) + sigmoid(f) c
        e = (-2 * c).exp()
        return (1 - e) / ((1 + o) * (1 + e)), c  # sigmoid(o) tanh(c)

    def forward(self, params: Params, wb: Tensor, x: Tensor) -> Tensor:
        sums = (part[1].shape[-1] * self.forward_part(params, *part) for part in self.parts(wb, x))
        return sum(sums) / math.sqrt(x.shape[-1])

    def forward_part(self, params: Params, wb: Tensor, x: Tensor) -> Tensor:
        """The mean of the messages (p, s, b) from some of the inputs."""
        h, _ = self.tick(params, wb, x, x.new_zeros(*x.shape[:2], wb.shape[3]))
        return self.vsml.message(params, "fwd_msg", h, -3)[..., 0]

    def backward(self, params: Params, wb: Tensor, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        results = [self.backward_part(params, *part, error) for part in self.parts(wb, x)]
        below, wb = zip(*results, strict=True)
        return torch.cat(below, 2) * error.shape[-1] / math.sqrt(x.shape[-1]), torch.cat(wb, 2)

    def backward_part(self, params: Params, wb: Tensor, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the messages (p, s, a) to some of the inputs, and their new wb (p, s, a, b, 2)."""
        h, c = self.tick(params, wb, x, error)
        below = self.vsml.message(params, "bwd_msg", h, -2)[..., 0]

        first_two = {
            name: params[name].unflatten(-1, (4, -1))[..., :3, :2].flatten(-2)  # of gates i, j and f
            for name in ("lstm.weight", "lstm.bias")
        }
        from_a, from_b = self.gates(first_two, x, error)
        recurrent = first_two["lstm.weight"][:, None, None, 2 * self.args.message_size :]
        gates = recurrent.mT @ h.mT + from_a[..., None] + from_b.mT[:, :, None]  # (p, s, a, 6, b)
        i, j, f = gates.chunk(3, 3)
        c = f.sigmoid() * c[..., :2].mT + i.sigmoid() * exp_tanh(j)
        return below, 4 * c.mT.clamp(-4, 4)

    def parts(self, wb: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """wb and x of as many inputs, a power of two, as keep the sub-RNNs in a CPU's cache, with the
        strides that the rules were compiled for."""
        few = x.shape[2]
        if self.args.device == "cpu":
            few = 2 ** max(0, int(math.log2(2**13 / (x.shape[1] * wb.shape[3]))))
        pairs = zip(wb.split(few, 2), x.split(few, 2), strict=True)
        return [tuple(part.clone(memory_format=torch.contiguous_format) for part in pair) for pair in pairs]


def gradient(
    args: Any, learner: Clone, theta: Tensor, datasets: list, step: int, memory: list[dict]
) -> tuple[Tensor, Tensor, Tensor]:
    """Regress y, the error below, and the changes of w and b toward those of backpropagation on the
    same synapses. Returns the gradient (d,), the loss in units of the targets' variances, and the
    share of them that is explained."""
    wb, x, error = synapses(args, learner, theta, datasets[0], step, memory[0]["state"])
    theta = theta.detach().requires_grad_()
    answers = []
    for rules, params in ((learner, learner.params(theta[None])), (Backprop(args), {})):
        below, new = rules.backward(params, wb, x, error)
        answers.append(torch.cat([rules.forward(params, wb, x), below, (new - wb).flatten(2)], 2)[0])
    ours, targets = answers
    loss = (((ours - targets) ** 2).mean(0) / targets.var(0)).mean()
    (grad,) = torch.autograd.grad(loss, theta)
    return grad * (args.clip / grad.norm()).clamp(max=1), loss.detach(), 1 - loss.detach()


Synapses = tuple[Tensor, Tensor, Tensor]  # wb (1, count, 1, 1, 2), x and error (1, count, 1)


@torch.no_grad()
def synapses(
    args: Any, learner: Clone, theta: Tensor, tasks: Any, step: int, buffer: list[Weights]
) -> Synapses:
    """What to regress on, by a curriculum after appendix B.2.1: random synapses, those of a network
    with true errors, those of a network of sub-RNNs with their own errors.

    buffer: states of networks, one along p each. Now and then the sub-RNNs train one of them on a
    batch, and the result replaces it (appendix B.3.1 appends it).
    """
    progress = step / args.meta_steps
    made = random_synapses(theta.device)
    if progress < 0.25:
        return made

    one = torch.randint(len(buffer[0].wb), ()).item()
    ids = torch.tensor([step], device=theta.device)
    layers = [layer._replace(wb=layer.wb[one : one + 1].clone()) for layer in buffer]
    x, y = tasks.sample(ids, ids, 16)
    if progress > 0.6 or step % 20 == 0:
        own, _ = learner.observe(learner.params(theta[None]), layers, x, y)
        keys = tasks.keys(ids, 3)[None]
        fresh = learner.initial_state(keys, tasks.num_inputs, tasks.num_classes)
        for old, new in zip(buffer, fresh if step % 400 == 0 else own, strict=True):
            old.wb[one] = new.wb[0]
    if progress > 0.6:
        return pick_synapses(layers, own, step % len(layers), made)
    true, _ = Backprop(args).observe({}, layers, x, y)
    return pick_synapses(layers, true, step % len(layers), made)


def random_synapses(device: torch.device, count: int = 4096) -> Synapses:
    w, b, x, error = (std * torch.randn(1, count, 1, device=device) for std in (2.0, 0.3, 1.0, 0.3))
    return torch.stack([w, b], -1)[..., None, :], x, error


def pick_synapses(layers: list[Weights], trained: list[Weights], k: int, made: Synapses) -> Synapses:
    """Three in four of the synapses are those of layer k with its inputs and errors in training; the
    others stay random."""
    wb, x, error = made
    few = wb.shape[1] // 4
    sizes = (*trained[k].x.shape[1:], trained[k].error.shape[2])
    s, a, b = (torch.randint(size, (wb.shape[1] - few,), device=wb.device) for size in sizes)
    wb[0, few:, 0, 0] = layers[k].wb[0, 0, a, b]
    x[0, few:, 0] = trained[k].x[0, s, a]
    error[0, few:, 0] = trained[k].error[0, s, b]
    return wb, x, error


# ==================================================================================================
# Meta-test
# ==================================================================================================
def batch_curves(
    learner: Backprop, theta: Tensor, tasks: Any, train: Any, steps: list[int]
) -> dict[str, dict[int, Tensor]]:
    """Accuracy and cross-entropy (seeds,) on unseen examples, after so many batches of train examples,
    which lie along s; seeds along p."""
    size, seeds = learner.args.batch, learner.args.test_seeds
    ids = tasks.test_ids(seeds)
    keys = train.keys(tasks.test_ids(seeds * size), 3).view(seeds, size, 2)
    state = learner.initial_state(keys, train.num_inputs, train.num_classes)
    params = learner.params(theta[None].expand(seeds, -1))
    unseen = min(2000, len(tasks.dataset) or 2000) // size * size
    start = 0 if len(tasks.dataset) else 2**32  # what is made on the fly has no splits
    x_test, y_test = tasks.sample(ids, ids, max(unseen, size), start)
    curves: dict[str, dict[int, Tensor]] = {"accuracy": {}, "cross_entropy": {}}
    for last, step in pairwise([0, *steps]):
        x, y = train.sample(ids, ids, (step - last) * size, last * size)
        for x_t, y_t in zip(x.split(size, 1), y.split(size, 1), strict=True):
            state, _ = learner.observe(params, state, x_t, y_t)
        logits = torch.cat([learner.predict(params, state, part)[1] for part in x_test.split(size, 1)], 1)
        curves["accuracy"][step] = (logits.argmax(-1) == y_test).float().mean(1)
        curves["cross_entropy"][step] = F.cross_entropy(logits.mT, y_test, reduction="none").mean(1)
    return curves


def cloned_tanh(learner: Clone, theta: Tensor, n: int = 81) -> tuple[Tensor, ...]:
    """The cloned y = tanh(x) w on a grid (Figure B.1): x, w, y and what y should be, each (n, n)."""
    x, w = torch.meshgrid(torch.linspace(-3, 3, n), torch.linspace(-4, 4, n), indexing="xy")
    wb = torch.stack([w, torch.zeros_like(w)], -1).view(1, -1, 1, 1, 2).to(theta.device)
    inputs = learner.params(theta[None]), wb, x.reshape(1, -1, 1).to(theta.device)
    y, target = (rules.forward(*inputs).view(n, n).cpu() for rules in (learner, Backprop(learner.args)))
    return x, w, y, target
