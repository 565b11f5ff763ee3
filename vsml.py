"""VSML: tiny LSTMs with shared weights replace the weights of a neural network and learn without backpropagation.

Every weight (a, b) of a network becomes an LSTM of 16 units. All of them share the same 2,384 parameters theta; their states
are what learns. They hear x_a from below and the output error e_b from above, and answer with messages. Meta-learning
finds theta; after that, running the LSTMs forward IS the learning algorithm, on any dataset, of any size.

Kirsch, "Automating AI Research" (2025), chapter 3 and appendix B; Kirsch and Schmidhuber, "Meta Learning Backpropagation
And Improving It" (NeurIPS 2021).

    Eq. 3.1, 3.2   -> lstm_cell (with LSTMs in place of vanilla RNNs, as section 3.3 proposes)
    Eq. 3.3, 3.4   -> tests/test_vsml.py (the vanilla VSML RNN)
    Eq. 3.5, 3.6   -> tests/test_vsml.py (Theorem B.1.1: the same as one sparse RNN with shared weights)
    Eq. 3.7, B.9   -> vsml_tick, forward_message, backward_message
    Algorithm 8    -> meta_train, around lifetime and one_example
    Algorithm 13   -> lifetime

    python vsml.py                                           # meta-train on digits, meta-test on unseen data: 5 minutes
    python vsml.py --dataset mnist                           # meta-train on another dataset
    python vsml.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-datasets mnist fashion_mnist

Axes, everywhere: p population (each its own theta), s sequences in parallel, t time, a inputs, b outputs, n hidden state,
m message, k layer. A state has shape (p, s, a, b, n), a forward message (p, s, a, m), a backward message (p, s, b, m).
"""

import ctypes
import json
import math
import os
import pickle
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from common import es
from common.datasets import BUNDLED, GENERATED, Dataset, DatasetError, Tasks, fold, load, normal


# ======================================================================================================================
# Args
# ======================================================================================================================
@dataclass
class Args:
    """VSML (chapter 3): meta-learn a learning algorithm from scratch, then watch it learn unseen datasets."""

    preset: Literal["auto", "thesis", "laptop"] = "auto"
    """thesis: the thesis' numbers; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device, else laptop."""
    seed: int = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live."""
    compile: bool = True
    """Fuse the inner step with torch.compile (needs a C++ compiler on a CPU)."""
    mode: Literal["train", "test"] = "train"
    """train: meta-train, then meta-test; test: only meta-test a --checkpoint."""
    checkpoint: Path | None = None
    """The checkpoint.pt to meta-test."""
    resume: Path | None = None
    """A run folder to go on with, exactly where it stopped."""
    run_dir: Path = Path("runs")
    """Run folders are made in here."""
    run_name: str | None = None
    """Name of the run folder (default: script-dataset-learner-seed-time)."""
    data_dir: Path = Path("data")
    """Where torchvision's datasets are, or are downloaded to."""
    track: bool = False
    """Log to Weights & Biases too (pip install "cleanmeta[track]")."""
    checkpoint_every: int = 100
    """Meta-steps between checkpoints."""

    learner: Literal["vsml", "rnn", "sgd", "adam"] = "vsml"
    """What learns at meta-test time; rnn is the in-context RNN, sgd and adam have nothing to meta-train but their rate."""
    baselines: tuple[Literal["rnn", "sgd", "adam"], ...] = ("rnn", "sgd", "adam")
    """Learners trained and tested beside the first one, on the same budget of meta-steps (Figure 3.6)."""

    dataset: tuple[str, ...] = ("digits",)
    """Datasets to meta-train on (train splits), in turn (thesis: mnist; digits needs no download)."""
    sizes: tuple[int, ...] = ()
    """Sides of the meta-training images in pixels, in turn (default: as they are; section 3.4.3: 14 28 32)."""
    projected: float = 0.5
    """Share of VSML's meta-training tasks with randomly projected inputs (section 3.4.3; one half: the release)."""
    permuted_labels: float = 0.0
    """Share of VSML's meta-training tasks with permuted labels (VSML treats all labels alike; see LAPTOP)."""
    blanked: float = 0.0
    """VSML's meta-training tasks replace up to this share of their inputs by a constant (not in the thesis; see LAPTOP)."""
    augment_baselines: bool = False
    """The in-context RNN sees VSML's augmented tasks, not the plain datasets (Figure B.6; the thesis: it does not help)."""
    sequence_length: int = 500
    """Examples in a meta-training lifetime (section 3.4.2)."""

    hidden: tuple[int, ...] = ()
    """Widths of hidden layers; none: one layer from inputs to outputs (section 3.4.2)."""
    state_size: int = 16
    """N, units of each sub-LSTM (appendix B.3.2)."""
    message_size: int = 8
    """N' = N'', size of forward and backward messages (appendix B.3.2)."""
    micro_ticks: int = 2
    """RNN ticks of a layer per example (appendix B.3.2)."""
    logit_bound: float = 100.0
    """Logits are squashed to +- this by a tanh (appendix B.3.2)."""
    logit_scale: float = 1.0
    """Factor on the averaged message that is read as a logit (not in the thesis, which has none)."""
    feed_label: bool = False
    """Feed the one-hot label beside the error (not in the thesis; the release does for deep networks)."""
    backward_pass: bool = False
    """Let the layers tick in reverse order right after the error is known (not in the thesis; the release, deep networks)."""
    state_init: Literal["normal", "half"] = "normal"
    """normal: all states standard normal (appendix B.3.2); half: half of c is N(0, 1/a), all else zero (the release)."""
    forget_bias: float = 5.0
    """Added to the LSTM's forget gate (not in the thesis; the release)."""
    input_bias: float = -5.0
    """Added to the LSTM's input gate (not in the thesis; the release)."""
    rnn_size: int = 16
    """Units of the in-context RNN (appendix B.3.2)."""

    meta_optimizer: Literal["es", "backprop"] = "es"
    """Evolution strategies, or backpropagation through the lifetime (Algorithm 8)."""
    meta_steps: int = 10_000
    """Outer iterations (appendix B.3.2)."""
    population: int = 1024
    """es: antithetic pairs in a generation (appendix B.3.2)."""
    chunk: int | None = None
    """es: pairs evaluated at a time, to bound memory (default: chosen for the device)."""
    noise_std: float = 0.05
    """es: standard deviation of the perturbations (appendix B.3.2)."""
    rank_shaping: bool = False
    """es: use the ranks of the losses instead of the losses (Salimans et al. 2017; the thesis does not)."""
    sequences: int = 128
    """backprop: sequences in a batch (not in the thesis; the release)."""
    es_lr: float = 0.025
    """es: Adam's learning rate (appendix B.3.2)."""
    backprop_lr: float = 1e-3
    """backprop: Adam's learning rate (not in the thesis; the release)."""
    lr_decay: bool = False
    """Let the learning rate fall linearly to zero (not in the thesis)."""
    clip: float = 25.0
    """backprop: largest norm of the meta-gradient (not in the thesis; the release)."""

    test_datasets: tuple[str, ...] = ()
    """Datasets to meta-test on, test splits (default: --dataset, then digits wine breast_cancer random sum_sign)."""
    test_sizes: tuple[int, ...] = ()
    """Sides of the meta-test images in pixels (default: as they are)."""
    test_classes: int | None = None
    """Meta-test on this many classes of each dataset that has more."""
    test_steps: int = 2000
    """Examples in a meta-test lifetime; never more than once through a dataset (Figure 3.8)."""
    test_seeds: int = 128
    """Meta-test lifetimes per dataset (Figure 3.6)."""


LAPTOP = dict(
    meta_optimizer="backprop",  # with 2,384 parameters a gradient tells more than the population that 2 cores can afford
    meta_steps=600,  # three minutes
    sequences=16,  # as many sub-RNNs as stay in the cache
    sequence_length=60,  # memory and time; what is learned goes on learning for thousands of examples
    sizes=(8,),  # VSML learns at any size afterwards, and a 28 x 28 image costs twelve times an 8 x 8 one
    backprop_lr=2e-2,  # few steps
    lr_decay=True,  # settles what the high rate leaves noisy
    clip=1.0,  # bounds what one batch can do
    forget_bias=3.0,  # +-5 are made for lifetimes of 500 examples, these are 60
    input_bias=-2.0,  # likewise
    logit_scale=30.0,  # what helped most (README)
    feed_label=True,  # as the release does for deep networks
    state_init="half",  # better than the thesis' normals (README)
    permuted_labels=0.5,  # nothing to VSML, a fair chance to the in-context RNN with --augment-baselines
    blanked=0.6,  # carries over to larger images, which have empty borders (README)
    population=64,  # for --meta-optimizer es: 0.2 s a step
    rank_shaping=True,  # es: raw losses leave 64 pairs on the plateau (README has numbers and the command)
    noise_std=0.1,  # es: likewise
    es_lr=0.03,  # es: likewise
    test_steps=1000,  # seconds
    test_seeds=32,  # likewise
)


# ======================================================================================================================
# The learner
# ======================================================================================================================
class Layer(NamedTuple):
    """The state of one layer of sub-RNNs, V_L, and the messages they hear."""

    h: Tensor  # (p, s, a, b, n) hidden state of the sub-LSTMs
    c: Tensor  # (p, s, a, b, n) their cells
    fwd_msg: Tensor  # (p, s, a, m) from the layer below
    bwd_msg: Tensor  # (p, s, b, m) from the layer above


class Learner(NamedTuple):
    """What all learners look like. A flat theta (p, d), taken apart by `shapes`, is all that meta-training changes.

    init(generator) -> theta (d,)
    initial_state(keys (p, s, 2), num_inputs, num_outputs) -> state
    predict(params, state, x (p, s, a)) -> state, logits (p, s, b)
    learn(params, state, error (p, s, b), label (p, s, b) one-hot) -> state
    """

    shapes: dict[str, tuple[int, ...]]
    init: Callable
    initial_state: Callable
    predict: Callable
    learn: Callable
    compiled: Callable | None = None  # one_example of this learner, compiled

    def params(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta (p, d) as named parameters, each (p, *shape)."""
        parts = theta.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def lstm_cell(weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One tick of a x b LSTMs with shared weights and own states: Eq. 3.2 for an LSTM. Gates: input, cell, forget, output.

    weight (p, n, 4n); from_a (p, s, a, 4n) and from_b (p, s, b, 4n): what rows and columns feed to the gates.
    """
    recurrent = (h.flatten(1, 3) @ weight).view(*h.shape[:-1], -1)
    i, j, f, o = (from_a[..., :, None, :] + from_b[..., None, :, :] + recurrent).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * j.tanh()
    return o.sigmoid() * c.tanh(), c


def fused_lstm_cell(weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """lstm_cell in sums and products only, which torch.compile turns into tight loops over the states (for ES and
    meta-testing, where no gradient is needed). tanh is Lambert's continued fraction, exact to 1e-4."""

    def tanh(x):
        x = 4.97 - (9.94 - (x + 4.97).relu()).relu()  # clamp(x, -4.97, 4.97); clamp itself also looks for NaNs
        q = x * x
        return x * (((q + 378) * q + 17325) * q + 135135) / (((28 * q + 3150) * q + 62370) * q + 135135)

    def sigmoid(x):
        return 0.5 + 0.5 * tanh(0.5 * x)

    gates = zip(from_a.chunk(4, -1), from_b.chunk(4, -1), weight[:, None, None, None].chunk(4, -1), strict=True)
    i, j, f, o = (a[..., :, None, :] + b[..., None, :, :] + (h[..., None] * w).sum(-2) for a, b, w in gates)
    c = sigmoid(f) * c + sigmoid(i) * tanh(j)
    return sigmoid(o) * tanh(c), c


def vsml_tick(cell: Callable, params: dict[str, Tensor], layer: Layer, micro_ticks: int) -> Layer:
    """s_ab <- f_RNN(s_ab, fwd_msg_a, bwd_msg_b) for all a, b of one layer (Eq. 3.7, B.9), some ticks on the same messages."""
    m = layer.fwd_msg.shape[-1]
    hear_fwd, hear_bwd, recurrent = params["lstm.weight"].split([m, m, params["lstm.weight"].shape[1] - 2 * m], dim=1)
    from_a = layer.fwd_msg @ hear_fwd[:, None] + params["lstm.bias"][:, None, None]
    from_b = layer.bwd_msg @ hear_bwd[:, None]
    h, c = layer.h, layer.c
    for _ in range(micro_ticks):
        h, c = cell(recurrent, from_a, from_b, h, c)
    return layer._replace(h=h, c=c)


def forward_message(params: dict[str, Tensor], layer: Layer) -> Tensor:
    """fwd_msg_b := mean over a of f_fwd(s_ab), (p, s, b, m). Averaged, not summed (appendix B.3); f_fwd is linear."""
    return layer.h.mean(2) @ params["fwd_msg.weight"][:, None] + params["fwd_msg.bias"][:, None, None]


def backward_message(params: dict[str, Tensor], layer: Layer) -> Tensor:
    """bwd_msg_a := mean over b of f_bwd(s_ab), (p, s, a, m)."""
    return layer.h.mean(3) @ params["bwd_msg.weight"][:, None] + params["bwd_msg.bias"][:, None, None]


def vsml(args: Args, cell: Callable = lstm_cell) -> Learner:
    """The VSML learner: dense layers of sub-LSTMs, any number of inputs, outputs and hidden layers."""
    n, m = args.state_size, args.message_size
    shapes = {
        "lstm.weight": (m + m + n, 4 * n),
        "lstm.bias": (4 * n,),
        "fwd_msg.weight": (n, m),
        "fwd_msg.bias": (m,),
        "bwd_msg.weight": (n, m),
        "bwd_msg.bias": (m,),
    }

    def init(generator: torch.Generator) -> Tensor:
        """Truncated normals of std 1/sqrt(fan-in), zero biases, and the LSTM's long memory: slow to write and to forget."""
        theta = {name: initial_weight(shape, generator) for name, shape in shapes.items()}
        theta["lstm.bias"][:n] += args.input_bias
        theta["lstm.bias"][2 * n : 3 * n] += args.forget_bias
        return torch.cat([value.flatten() for value in theta.values()])

    def initial_state(keys: Tensor, num_inputs: int, num_outputs: int) -> list[Layer]:
        """Random states V_L; the randomness is what tells sub-RNNs with the same inputs apart."""
        widths, layers = (num_inputs, *args.hidden, num_outputs), []
        for k, (a, b) in enumerate(pairwise(widths)):
            h, c = normal(fold(keys, k), 2 * a * b * n).view(*keys.shape[:2], 2, a, b, n).unbind(2)
            if args.state_init == "half":
                h, c = torch.zeros_like(h), torch.cat([c[..., : n // 2] / math.sqrt(a), torch.zeros_like(c[..., n // 2 :])], -1)
            layers.append(Layer(h, c, *(h.new_zeros(*keys.shape[:2], width, m) for width in (a, b))))
        return layers

    def predict(params: dict[str, Tensor], layers: list[Layer], x: Tensor) -> tuple[list[Layer], Tensor]:
        """The layers 1, ..., K in sequence (the blue box of Algorithm 8)."""
        layers = list(layers)
        fwd_msg = F.pad(x[..., None], (0, m - 1))  # m_a1^(1) := x_a, padded with zeros
        for k in range(len(layers)):
            layers[k] = vsml_tick(cell, params, layers[k]._replace(fwd_msg=fwd_msg), args.micro_ticks)
            fwd_msg = forward_message(params, layers[k])
            if k > 0:
                layers[k - 1] = layers[k - 1]._replace(bwd_msg=backward_message(params, layers[k]))
        logits = args.logit_scale * fwd_msg[..., 0]  # y_b := m_b1^(K+1)
        return layers, args.logit_bound * torch.tanh(logits / args.logit_bound)

    def learn(params: dict[str, Tensor], layers: list[Layer], error: Tensor, label: Tensor) -> list[Layer]:
        """The error is the message from above, m_b1^(K) := e_b. It is heard at the next tick: with the next example, or
        in a backward pass of its own."""
        heard = torch.stack([error, label], -1) if args.feed_label else error[..., None]
        layers = [*layers[:-1], layers[-1]._replace(bwd_msg=F.pad(heard, (0, m - heard.shape[-1])))]
        if args.backward_pass:
            for k in reversed(range(len(layers))):
                layers[k] = vsml_tick(cell, params, layers[k], args.micro_ticks)
                if k > 0:
                    layers[k - 1] = layers[k - 1]._replace(bwd_msg=backward_message(params, layers[k]))
            layers[-1] = layers[-1]._replace(bwd_msg=torch.zeros_like(layers[-1].bwd_msg))
        return layers

    return Learner(shapes, init, initial_state, predict, learn)


def initial_weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A matrix (fan-in, fan-out) of truncated normals with std 1/sqrt(fan-in), or a vector of zeros."""
    if len(shape) == 1:
        return torch.zeros(shape)
    weight = torch.nn.init.trunc_normal_(torch.empty(shape), a=-2, b=2, generator=generator)
    return weight / math.sqrt(shape[0])


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
def one_example(learner: Learner, params: dict[str, Tensor], state: Any, x: Tensor, y: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Predict, then see the label and learn: the body of the inner loop of Algorithm 8. x (p, s, a), y (p, s) int64."""
    state, logits = learner.predict(params, state, x)
    label = (y[..., None] == torch.arange(logits.shape[-1], device=y.device)).to(logits.dtype)
    error = logits.softmax(-1) - label  # e := gradient of the cross-entropy with respect to the logits
    state = learner.learn(params, state, error, label)
    return state, -(logits.log_softmax(-1) * label).sum(-1), logits.argmax(-1) == y


def lifetime(learner: Learner, theta: Tensor, state: Any, x: Tensor, y: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Learn online, one example after the other (the inner loop of Algorithm 8, and Algorithm 13).

    theta (p, d), x (p, s, t, a), y (p, s, t) int64. Returns the last state, and for each prediction, which was made before
    its label was seen, the cross-entropy (p, s, t) in nats and whether it was right (p, s, t).
    """
    live = learner.compiled or partial(one_example, learner)
    params, losses, correct = learner.params(theta), [], []
    for x_t, y_t in zip(x.unbind(2), y.unbind(2), strict=True):
        state, loss, right = live(params, state, x_t, y_t)
        losses.append(loss)
        correct.append(right)
    return state, torch.stack(losses, -1), torch.stack(correct, -1)


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
def es_gradient(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-gradient by evolution strategies: each antithetic pair lives one lifetime, both sides through the same one.

    theta (d,). Returns the gradient (d,), the mean loss and the mean accuracy.
    """
    right = []

    def evaluate(population: Tensor, pairs: Tensor) -> Tensor:
        ids = step * args.population + pairs[: len(pairs) // 2]
        x, y = tasks.sample(ids, ids, args.sequence_length)
        state = learner.initial_state(tasks.keys(ids, 3).repeat(2, 1)[:, None], tasks.num_inputs, tasks.num_classes)
        x, y = x.repeat(2, 1, 1)[:, None], y.repeat(2, 1)[:, None]  # (p, s = 1, t, a) and (p, s = 1, t)
        _, losses, correct = lifetime(learner, population, state, x, y)
        right.append(correct.float().mean())
        return losses.mean((1, 2))

    grad, losses = es.gradient(
        theta,
        evaluate,
        pairs=args.population,
        sigma=args.noise_std,
        seed=args.seed,
        generation=step,
        chunk=args.chunk or even_chunk(args, tasks),
        rank_shaping=args.rank_shaping,
    )
    return grad, losses.mean(), all_reduce_mean(torch.stack(right).mean())


def backprop_gradient(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-gradient by backpropagation through a batch of whole lifetimes; returns what es_gradient returns."""
    theta = theta.detach().requires_grad_()
    ids = step * args.sequences + torch.tensor(es.share(args.sequences), device=theta.device)
    x, y = tasks.sample(ids, ids, args.sequence_length)
    state = learner.initial_state(tasks.keys(ids, 3)[None], tasks.num_inputs, tasks.num_classes)
    _, losses, correct = lifetime(learner, theta[None], state, x[None], y[None])
    (grad,) = torch.autograd.grad(losses.mean(), theta)
    grad, loss, accuracy = (all_reduce_mean(value) for value in (grad, losses.detach().mean(), correct.float().mean()))
    return grad * (args.clip / grad.norm()).clamp(max=1), loss, accuracy


def meta_train(
    args: Args, learners: dict[str, Learner], thetas: dict[str, Tensor], tasks: dict[str, list[Tasks]], run: "Run", facts: dict
) -> None:
    """Algorithm 8, for learners side by side on the same budget. Changes thetas in place."""
    gradient, lr = {"es": (es_gradient, args.es_lr), "backprop": (backprop_gradient, args.backprop_lr)}[args.meta_optimizer]
    adam = {name: torch.optim.Adam([thetas[name]], lr, betas=(0.9, 0.999)) for name in learners}
    for step in run.steps(args.meta_steps if learners else 0, keep={"thetas": thetas, "adam": adam} | facts):
        log = {}
        for name, learner in learners.items():
            now = tasks[name][step % len(tasks[name])]  # in parallel over datasets in the thesis, in turn here
            thetas[name].grad, log[f"{name}_loss"], log[f"{name}_accuracy"] = gradient(args, learner, thetas[name], now, step)
            adam[name].param_groups[0]["lr"] = lr * (1 - step / args.meta_steps) if args.lr_decay else lr
            adam[name].step()  # theta <- theta - alpha * the gradient of the loss over the lifetime
        run.log(step, log)


# ======================================================================================================================
# Baselines
# ======================================================================================================================
def in_context_rnn(args: Args, num_inputs: int, num_outputs: int) -> Learner:
    """The in-context RNN (Hochreiter et al. 2001; appendix B.3.2): one LSTM that hears image, error and previous label.

    Its sizes are fixed: smaller inputs and outputs are padded with zeros.
    """
    n = args.rnn_size
    shapes = {
        "lstm.weight": (num_inputs + 2 * num_outputs + n, 4 * n),
        "lstm.bias": (4 * n,),
        "out.weight": (n, num_outputs),
        "out.bias": (num_outputs,),
    }

    def init(generator: torch.Generator) -> Tensor:
        theta = {name: initial_weight(shape, generator) for name, shape in shapes.items()}
        theta["lstm.bias"][2 * n : 3 * n] += 1  # the usual forget bias
        return torch.cat([value.flatten() for value in theta.values()])

    def initial_state(keys: Tensor, _: int, outputs: int) -> tuple[Tensor, ...]:
        sizes = (n, n, outputs, outputs)  # h, c, the last error, the last label
        return tuple(torch.zeros(*keys.shape[:2], size, device=keys.device) for size in sizes)

    def predict(params: dict[str, Tensor], state: tuple[Tensor, ...], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        h, c, error, label = state
        heard = [F.pad(v, (0, size - v.shape[-1])) for v, size in ((x, num_inputs), (error, num_outputs), (label, num_outputs))]
        for _ in range(args.micro_ticks):
            gates = torch.cat([*heard, h], -1) @ params["lstm.weight"] + params["lstm.bias"][:, None]
            i, j, f, o = gates.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * j.tanh()
            h = o.sigmoid() * c.tanh()
        logits = (h @ params["out.weight"] + params["out.bias"][:, None])[..., : error.shape[-1]]
        return (h, c, error, label), args.logit_bound * torch.tanh(logits / args.logit_bound)

    def learn(params: dict[str, Tensor], state: tuple[Tensor, ...], error: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (*state[:2], error, label)

    return Learner(shapes, init, initial_state, predict, learn)


def online_sgd(args: Args, adam: bool, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Learner:
    """One dense layer trained by online gradient descent, plain or with Adam. Its only meta-parameter is log10 of the rate."""
    shapes = {"log_lr": (1,)}

    def init(generator: torch.Generator) -> Tensor:
        return torch.tensor([-3.0 if adam else -2.0])  # appendix B.3.2

    def initial_state(keys: Tensor, a: int, b: int) -> tuple[Tensor, ...]:
        weight = normal(keys, a * b).view(*keys.shape[:2], a, b) / math.sqrt(a)
        weight = F.pad(weight, (0, 0, 0, 1))  # the last row is the bias
        moments = (torch.zeros_like(weight), torch.zeros_like(weight)) if adam else ()
        return (weight, torch.zeros(*keys.shape[:2], a + 1, device=keys.device), weight.new_zeros(()), *moments)

    def predict(params: dict[str, Tensor], state: tuple[Tensor, ...], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        weight, _, *rest = state
        x = F.pad(x, (0, 1), value=1.0)
        return (weight, x, *rest), (x[..., None, :] @ weight).squeeze(-2)

    def learn(params: dict[str, Tensor], state: tuple[Tensor, ...], error: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        weight, x, t, *moments = state
        step = grad = x[..., :, None] * error[..., None, :]  # gradient of the cross-entropy with respect to the weights
        t = t + 1
        if adam:  # Kingma and Ba (2015), Algorithm 1
            moments = [torch.lerp(grad, moments[0], beta1), torch.lerp(grad**2, moments[1], beta2)]
            step = moments[0] / (1 - beta1**t) / ((moments[1] / (1 - beta2**t)).sqrt() + eps)
        return (weight - 10 ** params["log_lr"][..., None, None] * step, x, t, *moments)

    return Learner(shapes, init, initial_state, predict, learn)


def search_rate(args: Args, learner: Learner, tasks: Tasks) -> Tensor:
    """Grid search (appendix B.3.2): the rate, of four in each factor of ten, with the best cumulative accuracy over 500
    examples of the meta-training data. The grid is a population."""
    grid = torch.linspace(-4, 0, 17, device=tasks.dataset.device)[:, None]
    ids = torch.arange(16, device=tasks.dataset.device)
    x, y = tasks.sample(ids, ids, min(500, args.test_steps))
    state = learner.initial_state(tasks.keys(ids, 3).expand(len(grid), -1, -1), tasks.num_inputs, tasks.num_classes)
    x, y = x.expand(len(grid), -1, -1, -1), y.expand(len(grid), -1, -1)
    _, _, correct = lifetime(learner, grid, state, x, y)
    return grid[correct.float().mean((1, 2)).argmax()]


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def curve(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, together: int) -> tuple[Tensor, Tensor]:
    """Lifetimes on unseen examples, each from its own random state: whether each prediction was right (seeds, t), and its
    cross-entropy. One pass through the data at most, so that no example comes twice (`random` is there to be repeated).
    together: how many lifetimes run at once."""
    ids = torch.arange(args.test_seeds, device=theta.device)
    steps = min(args.test_steps, len(tasks.dataset) or args.test_steps)
    parts = []
    for part in ids.split(together):
        x, y = tasks.sample(part, part, steps)
        state = learner.initial_state(tasks.keys(part, 3)[None], tasks.num_inputs, tasks.num_classes)
        parts.append(lifetime(learner, theta[None], state, x[None], y[None])[1:])
    losses, correct = (torch.cat([part[i][0] for part in parts]) for i in (0, 1))
    return correct.float(), losses


def meta_test(
    args: Args, learners: dict[str, Learner], thetas: dict[str, Tensor], tests: dict[str, Tasks], run: "Run"
) -> list[dict[str, Any]]:
    """All learners on the test splits of all test datasets: result rows, and a figure like Figure 3.6."""
    rows, curves = [], {}
    for task, tasks in tqdm(tests.items(), desc="meta-test", disable=run.rank > 0):
        novelty = "task" if tasks.dataset.name in args.dataset else "domain"
        for label, learner in learners.items():
            try:
                fitting = replace(tasks, dataset=fit(learner, tasks.dataset)) if label == "rnn" else tasks
            except DatasetError as error:
                run.say(f"{label} is left out on {task}: {error}")
                continue
            together = at_a_time(args, tasks) * (1 if label == "vsml" else args.state_size)  # others keep a number a weight
            correct, losses = curve(args, learner, thetas[label], fitting, together)
            seen = torch.arange(1, correct.shape[1] + 1, device=correct.device)
            curves.setdefault(task, {})[label] = cumulative = correct.cumsum(1) / seen
            for metric, values in {"cumulative_accuracy": cumulative, "accuracy": correct, "cross_entropy": losses}.items():
                for step in plotted_steps(values.shape[1]):
                    rows.append(result_row(label, task, novelty, metric, step, values[:, step - 1]))
    if run.rank == 0:
        draw_curves(run.folder / "cumulative_accuracy.png", curves)
    return rows


def test_tasks(args: Args, device: torch.device) -> dict[str, Tasks]:
    """The test splits of all test datasets at all sizes, by the name that results give them."""
    tests = {}
    for name in dict.fromkeys(args.test_datasets or args.dataset + BUNDLED + GENERATED):
        for size in args.test_sizes or (None,):
            dataset = load(name, "test", args.data_dir, device, size)
            task = f"{name}@{size}" if size and len(dataset.shape) == 3 else name
            tests[task] = Tasks(dataset, classes=args.test_classes, seed=args.seed)
    return tests


def fit(learner: Learner, dataset: Dataset) -> Dataset:
    """The dataset at a size that the in-context RNN was made for. Raises DatasetError if there is none."""
    outputs = learner.shapes["out.bias"][0]
    inputs = learner.shapes["lstm.weight"][0] - 2 * outputs - learner.shapes["lstm.weight"][1] // 4
    if dataset.num_classes > outputs:
        raise DatasetError(f"it was made for {outputs} classes, and '{dataset.name}' has {dataset.num_classes}.")
    if dataset.num_inputs <= inputs:
        return dataset
    return dataset.resize(math.isqrt(inputs // dataset.shape[0]))


def plotted_steps(steps: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, 100, ..., with 400, and the last step."""
    points = {base * 10**power for base in (1, 2, 5) for power in range(8)} | {400, steps}
    return sorted(point for point in points if point <= steps)


def draw_curves(path: Path, curves: dict[str, dict[str, Tensor]]) -> None:
    """Figure 3.6: cumulative accuracy against examples seen, mean and standard deviation over seeds; a panel per dataset."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False, layout="constrained")
    for axis, (task, by_learner) in zip(axes.flat, curves.items(), strict=False):
        for label, values in by_learner.items():
            mean, std, seen = values.mean(0).cpu(), values.std(0).cpu(), range(1, values.shape[1] + 1)
            (line,) = axis.plot(seen, mean, label=LABELS[label])
            axis.fill_between(seen, mean - std, mean + std, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=task, xlabel="examples seen", ylabel="cumulative accuracy", ylim=(0, 1.02), xlim=(0, values.shape[1]))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=110)
    plt.close(figure)


LABELS = {"vsml": "VSML", "rnn": "in-context RNN", "sgd": "online SGD", "adam": "online SGD with Adam"}


# ======================================================================================================================
# The run
# ======================================================================================================================
SCRIPT = Path(__file__).stem
USER_ERRORS = (DatasetError,)
NAMED_AFTER = ("dataset", "learner")  # the flags that name a run's folder


# ---- the same text in all six scripts: begin ---------------------------------------------------------------------------
class Mistake(Exception):
    """Something a user can mend; the message is one sentence that says how."""


def parse_args() -> Args:
    """The command line over the preset's values, or over those of the run or the checkpoint that it names."""
    args = tyro.cli(Args)
    if args.resume:
        if args.mode == "test" or args.checkpoint:
            raise Mistake("--resume goes on with meta-training; to meta-test use --mode test --checkpoint FILE alone.")
        base = saved_args(args.resume / "checkpoint.pt", resume=args.resume, device=args.device)
        args = tyro.cli(Args, default=base)
        free = ("resume", "device", "compile", "track", "data_dir", "run_dir", "run_name")
        changed = [f.name for f in fields(Args) if f.name not in free and getattr(args, f.name) != getattr(base, f.name)]
        if changed:
            raise Mistake(f"A resumed run keeps its flags; leave out --{changed[0].replace('_', '-')}.")
    elif args.mode == "test":
        if not args.checkpoint:
            raise Mistake("--mode test needs --checkpoint, the checkpoint.pt of a run.")
        args = tyro.cli(Args, default=saved_args(args.checkpoint, mode="test", device=args.device, run_name=None))
    elif args.checkpoint:
        raise Mistake("--checkpoint is for --mode test; to go on with a run use --resume FOLDER.")
    else:
        if args.preset == "auto":
            args.preset = "thesis" if args.device != "cpu" and torch.cuda.is_available() else "laptop"
        preset = args.preset
        args = tyro.cli(Args, default=Args(**(LAPTOP if preset == "laptop" else {})))
        args.preset = preset
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Mistake("There is no CUDA device; leave out --device cuda.")
    return args


def saved_args(path: Path, **changes: Any) -> Args:
    """The Args of a checkpoint, with changes."""
    saved = read_checkpoint(path)["args"]
    try:
        kinds = {f.name: Path if "Path" in str(f.type) else tuple if "tuple" in str(f.type) else None for f in fields(Args)}
        return Args(**{k: kinds[k](v) if kinds[k] and v is not None else v for k, v in saved.items()} | changes)
    except (KeyError, TypeError) as error:
        raise Mistake(f"{path} was written by another version of {SCRIPT}.py.") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this script. Raises Mistake if it is missing, damaged or of another script."""
    if not path.is_file():
        raise Mistake(f"There is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise Mistake(f"{path} is damaged or not a checkpoint.") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("script") != SCRIPT:
        raise Mistake(f"{path} is not a checkpoint of {SCRIPT}.py.")
    return checkpoint


def write_whole(path: Path, write: Any) -> None:
    """Write a file whole or not at all: to a temporary name, synced, renamed."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def take_out(keep: Any) -> Any:
    """The state of nested dicts of tensors and of things with a state_dict, ready to be saved."""
    if isinstance(keep, dict):
        return {name: take_out(value) for name, value in keep.items()}
    return keep.detach() if isinstance(keep, Tensor) else keep.state_dict()


def put_back(keep: Any, state: Any) -> None:
    """The opposite of take_out, in place."""
    if isinstance(keep, dict):
        for name, value in keep.items():
            put_back(value, state[name])
    elif isinstance(keep, Tensor):
        keep.data.copy_(state)
    else:
        keep.load_state_dict(state)


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nested state, with the names that lead to them."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{name} {key}".strip())


def keep_memory() -> None:
    """Ask glibc not to hand freed tensors back to the kernel, which costs page faults: a third of a meta-step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def result_row(learner: str, task: str, novelty: str, metric: str, step: int, values: Tensor) -> dict[str, Any]:
    """A row of results.json from the values (seeds,) of independent meta-test runs."""
    row = {"learner": learner, "task": task, "novelty": novelty, "metric": metric, "step": step}
    return row | {"mean": values.mean().item(), "std": values.std(correction=0).item(), "seeds": len(values)}


class Run:
    """Folder, log, checkpoints and processes of a run. Under torchrun, rank 0 alone writes."""

    def __init__(self, args: Args):
        self.args, self.started, self.file, self.lines = args, time.time(), None, []
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(args.device)
        if args.device == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        torch.manual_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.resumed = read_checkpoint(args.resume / "checkpoint.pt") if args.resume else None
        self.saved = bool(self.resumed)
        if self.resumed and (args.resume / "results.json").exists():
            raise Mistake(f"The run {args.resume} is finished; to meta-test it use --mode test --checkpoint.")
        words = [getattr(args, name) for name in NAMED_AFTER] + ["test"] * (args.mode == "test")
        words = [word if isinstance(word, str) else "-".join(word) for word in words]
        name = "-".join([SCRIPT, *words, f"s{args.seed}", time.strftime("%Y%m%d-%H%M%S")])
        self.folder = args.resume or args.run_dir / (args.run_name or name)
        self.compiles = args.compile and self.can_compile()
        keep_memory()
        if self.rank == 0:
            self.open_folder()

    def open_folder(self) -> None:
        if not self.resumed and self.folder.exists():
            raise Mistake(f"The folder {self.folder} exists; choose another --run-name, or go on with --resume {self.folder}.")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            text = json.dumps(self.plain_args(), indent=2) + "\n"
            write_whole(self.folder / "args.json", lambda file: file.write(text.encode()))
        else:  # drop what was logged after the checkpoint
            path = self.folder / "metrics.csv"
            lines = path.read_text().splitlines() if path.exists() else []
            kept = lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) < self.resumed["step"]]
            write_whole(path, lambda file: file.write("".join(line + "\n" for line in kept).encode()))
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.folder), purge_step=self.resumed["step"] if self.resumed else None)
        self.wandb = None
        if self.args.track:
            try:
                import wandb
            except ImportError as error:
                raise Mistake('--track needs Weights & Biases: pip install "cleanmeta[track]".') from error
            self.wandb = wandb.init(project="cleanmeta", name=self.folder.name, config=self.plain_args())
        self.say(f"{SCRIPT}: preset {self.args.preset}, device {self.args.device}, run folder {self.folder}")

    def can_compile(self) -> bool:
        """torch.compile on a CPU needs a C++ compiler and Python's headers."""
        headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
        if self.args.device == "cuda" or (headers and any(map(shutil.which, ("g++", "clang++", "c++")))):
            return True
        self.say("No C++ compiler or no Python headers: running without torch.compile, which is slower.")
        return False

    def plain_args(self) -> dict[str, Any]:
        """The Args as JSON has them."""
        return json.loads(json.dumps(asdict(self.args), default=str))

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def steps(self, total: int, keep: dict[str, Any]) -> Iterator[int]:
        """The meta-steps still to do, with a progress bar. Restores `keep` (nested dicts of tensors and of things with a
        state_dict) from a resumed run's checkpoint, and writes it to checkpoint.pt now and then, and at the end."""
        first = 0
        if self.resumed:
            first = self.resumed["step"]
            put_back(keep, self.resumed["state"])
            torch.set_rng_state(self.resumed["rng"]["cpu"])
            if self.args.device == "cuda" and self.resumed["rng"]["cuda"]:
                torch.cuda.set_rng_state_all(self.resumed["rng"]["cuda"])
        self.bar = tqdm(range(first, total), initial=first, total=total, desc="meta-train", disable=self.rank > 0)
        for step in self.bar:
            yield step
            if (step + 1) % self.args.checkpoint_every == 0:
                self.save(step + 1, keep)
        self.save(max(first, total), keep)

    def log(self, step: int, values: dict[str, Tensor]) -> None:
        """A line of metrics.csv, and TensorBoard. On a GPU lines wait for each other, so that it need not wait for them."""
        self.lines.append((step, values))
        if self.args.device == "cpu" or len(self.lines) == 20:
            self.write_lines()

    def write_lines(self) -> None:
        """Raises Mistake at a value that is not finite."""
        for step, values in self.lines:
            values = {name: float(value) for name, value in values.items()}
            self.refuse_nan(step, [name for name, value in values.items() if not math.isfinite(value)])
            if self.rank > 0:
                continue
            if self.file is None:
                self.file = open(self.folder / "metrics.csv", "a", buffering=1)  # noqa: SIM115 (open as long as the process)
                if self.file.tell() == 0:
                    self.file.write(",".join(["step", "seconds", *values]) + "\n")
            self.file.write(",".join(map(repr, [step, round(time.time() - self.started, 3), *values.values()])) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            if self.wandb:
                self.wandb.log(values, step=step)
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in list(values.items())[:2]}, refresh=False)
        self.lines = []

    def refuse_nan(self, step: int, names: list[str]) -> None:
        if names:
            good = f"{self.folder / 'checkpoint.pt'} is the last good checkpoint" if self.saved else "no checkpoint was written"
            raise Mistake(f"{names[0]} is not finite at meta-step {step}; {good}. Try a smaller learning rate.")

    def save(self, step: int, keep: dict[str, Any]) -> None:
        """Write checkpoint.pt: everything that the run needs to go on after `step` meta-steps."""
        self.write_lines()
        state = take_out(keep)
        self.refuse_nan(step, [name for name, value in leaves(state) if not value.isfinite().all()])
        if self.rank == 0:
            rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if self.args.device == "cuda" else []}
            checkpoint = {"script": SCRIPT, "args": self.plain_args(), "step": step, "state": state, "rng": rng}
            write_whole(self.folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self.saved = True

    def finish(self, rows: list[dict[str, Any]], seconds: dict[str, float], parameters: int, **more: Any) -> None:
        """Write results.json and print the first metric of each task and learner at some steps as a table."""
        if self.rank > 0:
            return
        if self.args.device == "cuda":
            device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**20
        else:
            import resource  # not on Windows

            device, peak = f"{torch.get_num_threads()} CPU threads", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results = {"script": SCRIPT, "preset": self.args.preset, "args": self.plain_args(), "device": device}
        results |= {"seconds": seconds, "peak_memory_mb": peak, "parameters": parameters, **more, "results": rows}
        text = json.dumps(results, indent=1) + "\n"
        write_whole(self.folder / "results.json", lambda file: file.write(text.encode()))
        self.board.close()
        shown = [row for row in rows if row["metric"] == rows[0]["metric"]]
        steps = [step for step in (1, 10, 100, 400, 1000, 10_000) if any(row["step"] == step for row in shown)]
        table = [["task", "novelty", "learner", *(f"after {step}" for step in steps), "at the end"]]
        for task, novelty, learner in dict.fromkeys((row["task"], row["novelty"], row["learner"]) for row in shown):
            found = {row["step"]: row for row in shown if (row["task"], row["learner"]) == (task, learner)}
            cells = [found.get(step) for step in steps] + [found[max(found)]]
            texts = [f"{cell['mean']:.3f} ±{cell['std']:.3f}" if cell else "" for cell in cells]
            table.append([task, novelty, learner, *texts])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        self.say(f"\n{rows[0]['metric']}, mean ± standard deviation over {rows[0]['seeds']} runs")
        for line in table:
            self.say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        self.say(f"\nWritten to {self.folder}: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def run_as_script(main: Any) -> None:
    """main(), with a user's mistakes said in one sentence and exit code 1."""
    try:
        main()
    except (Mistake, *USER_ERRORS) as error:
        sys.exit(f"{SCRIPT}.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{SCRIPT}.py: stopped; a run that has a checkpoint goes on with --resume FOLDER.")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- the same text in all six scripts: end -----------------------------------------------------------------------------
def check(args: Args, world: int) -> None:
    """Refuse what cannot work, before anything is written."""
    counts = "sequence_length meta_steps population sequences test_steps test_seeds micro_ticks rnn_size checkpoint_every"
    for name in counts.split():
        if getattr(args, name) < 1:
            raise Mistake(f"--{name.replace('_', '-')} has to be at least 1.")
    if not args.dataset:
        raise Mistake("--dataset needs at least one dataset.")
    members, flag = (args.population, "population") if args.meta_optimizer == "es" else (args.sequences, "sequences")
    if members % world:
        raise Mistake(f"--{flag} {members} cannot be shared evenly by {world} processes; choose a multiple of {world}.")


def at_a_time(args: Args, tasks: Tasks) -> int:
    """How many lifetimes to run at once: their states should stay in a CPU's cache, or use a GPU's memory well."""
    widths = (tasks.num_inputs, *args.hidden, tasks.num_classes)
    sub_rnns = sum(a * b for a, b in pairwise(widths))
    return max(1, (2**14 if args.device == "cpu" else 2**22) // sub_rnns)


def even_chunk(args: Args, tasks: Tasks) -> int:
    """How many pairs of ES to run at once: at_a_time at most, and always the same number, so that one compilation does."""
    pairs = len(es.share(args.population))
    return max(c for c in range(1, pairs + 1) if pairs % c == 0 and (c == 1 or 2 * c <= at_a_time(args, tasks)))


def train_tasks(args: Args, run: Run, augment: bool) -> list[Tasks]:
    """What is meta-trained on: the train splits of the datasets at all sizes."""
    shares = dict(projected=args.projected, permuted_labels=args.permuted_labels, blanked=args.blanked) if augment else {}
    settings = [(name, size) for name in args.dataset for size in args.sizes or (None,)]
    datasets = [load(name, "train", args.data_dir, run.device, size) for name, size in settings]
    return [Tasks(dataset, seed=args.seed, **shares) for dataset in datasets]


def make_learner(name: str, args: Args, run: Run, rnn_sizes: tuple[int, int], use: str) -> Learner:
    """A learner by its name, compiled for its use: "backprop" or "es" to meta-train it, or "test"."""
    if name == "rnn":
        learner = in_context_rnn(args, *rnn_sizes)
    elif name == "vsml":
        learner = vsml(args)
    else:
        return online_sgd(args, adam=name == "adam")
    if not run.compiles:
        return learner
    if use == "backprop":
        return learner._replace(compiled=torch.compile(partial(one_example, learner), dynamic=False))
    if name == "rnn":
        return learner
    if use == "es":
        learner = vsml(args, fused_lstm_cell)
        return learner._replace(compiled=torch.compile(partial(one_example, learner), dynamic=False, options=fuse(args)))
    return vsml(args, torch.compile(fused_lstm_cell, options=fuse(args)))  # one compilation fits all sizes


def fuse(args: Args) -> dict[str, Any]:
    """What makes inductor write fused_lstm_cell's sums of n products out, with fused multiply-adds."""
    return {"unroll_reductions_threshold": args.state_size + 1, "cpp.enable_floating_point_contract_flag": "fast"}


def main() -> None:
    args = parse_args()
    check(args, int(os.environ.get("WORLD_SIZE", 1)))
    names = list(dict.fromkeys([args.learner, *args.baselines]))
    run = Run(args)
    started = time.time()
    tests = test_tasks(args, run.device)  # before meta-training, so that a missing dataset is told at once

    if args.mode == "test":
        state = read_checkpoint(args.checkpoint)["state"]
        rnn_sizes, saved = state["rnn_sizes"], state["thetas"]
        missing = [name for name in names if name not in saved]
        if missing:
            raise Mistake(f"{args.checkpoint} holds no learner {missing[0]}; choose from {', '.join(saved)}.")
    else:
        plain, augmented = train_tasks(args, run, augment=False), train_tasks(args, run, augment=True)
        rnn_sizes = torch.tensor([max(tasks.num_inputs for tasks in plain), max(tasks.num_classes for tasks in plain)])
    learners = {name: make_learner(name, args, run, rnn_sizes.tolist(), "test") for name in names}
    thetas = {name: learner.init(torch.Generator().manual_seed(args.seed)).to(run.device) for name, learner in learners.items()}

    if args.mode == "test":
        for name, theta in thetas.items():
            if theta.shape != saved[name].shape:
                sizes = f"{saved[name].numel()} parameters, these flags ask for {theta.numel()}"
                raise Mistake(f"The checkpoint's learner {name} has {sizes}; leave out the flags that set its size.")
            theta.copy_(saved[name])
    else:
        with torch.no_grad():
            for name in {"sgd", "adam"} & set(names):
                thetas[name] = search_rate(args, learners[name], plain[0])
        use = args.meta_optimizer
        trained = {name: make_learner(name, args, run, rnn_sizes.tolist(), use) for name in names if name in ("vsml", "rnn")}
        tasks = {"vsml": augmented, "rnn": augmented if args.augment_baselines else plain}
        meta_train(args, trained, thetas, tasks, run, {"rnn_sizes": rnn_sizes})
    tested = time.time()
    if run.rank > 0:
        return  # meta-testing takes seconds, one process does it
    with torch.no_grad():
        rows = meta_test(args, learners, thetas, tests, run)
    rates = {name: 10 ** thetas[name].item() for name in ("sgd", "adam") if name in thetas}
    run.finish(
        rows,
        seconds={"meta_train": tested - started, "meta_test": time.time() - tested},
        parameters=thetas[args.learner].numel(),
        learning_rates=rates,
    )


if __name__ == "__main__":
    run_as_script(main)
