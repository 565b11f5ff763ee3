"""VSML: tiny LSTMs with shared weights replace the weights of a neural network and learn without backpropagation.

Every weight (a, b) of a network becomes an LSTM of 16 units. All of them share the same 2,384 parameters theta; their states
are what learns. They hear x_a from below and the output error e_b from above, and answer with messages. Meta-learning
finds theta; after that, running the LSTMs forward IS the learning algorithm, on any dataset, of any size.

Kirsch, "Automating AI Research" (2025), chapter 3 and appendix B; Kirsch and Schmidhuber, "Meta Learning Backpropagation And
Improving It" (NeurIPS 2021). Results: .github/results/vsml.md.

    Eq. 3.1, 3.2   -> lstm_cell (with LSTMs in place of vanilla RNNs, as section 3.3 proposes)
    Eq. 3.3, 3.4   -> tests/test_vsml.py (the vanilla VSML RNN)
    Eq. 3.5, 3.6   -> tests/test_vsml.py (Theorem B.1.1: the same as one sparse RNN with shared weights)
    Eq. 3.7, B.9   -> vsml_tick, Dense, Conv
    Algorithm 8    -> meta_train, around lifetime and one_example
    Algorithm 13   -> lifetime
    Section 3.3.2  -> backprop, cloned_backprop, clone_gradient (learning-algorithm cloning)

    python vsml.py                                           # meta-train on digits, meta-test on unseen data: 5 minutes
    python vsml.py --dataset mnist                           # meta-train on another dataset
    python vsml.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-datasets mnist fashion_mnist
    python vsml.py --preset clone --dataset mnist            # the LSTMs learn to be backpropagation

Axes, everywhere: p population (each its own theta), s sequences in parallel, t time, a inputs, b outputs, n hidden state,
m message, k layer, q position of a kernel. A state has shape (p, s, a, b, n), a forward message (p, s, a, m), a backward
message (p, s, b, m).
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from common import checkpoints, es, machine
from common.checkpoints import CheckpointError
from common.datasets import BUNDLED, FIRST_ID, GENERATED, Dataset, DatasetError, Tasks, distinct, fold, load, normal
from common.figures import matrix, plot, pyplot, save
from common.flags import Count, CountOrZero, FlagError, Positive, Real, Seed, Share, Side, check_ranges
from common.machine import can_compile, end_other_ranks, keep_memory, lock, release
from common.results import MetricsLog, result_row, table, to_json

# ======================================================================================================================
# Args
# ======================================================================================================================
Name = Literal["vsml", "rnn", "hebbian", "fwmemory", "sgd", "adam", "sgd2", "adam2", "clone", "backprop"]


@dataclass
class Args:
    """VSML (chapter 3): meta-learn a learning algorithm from scratch, then watch it learn unseen datasets."""

    preset: Literal["auto", "thesis", "laptop", "clone"] = "auto"
    """thesis: the thesis' numbers; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device, else laptop; clone:
    learning-algorithm cloning (section 3.3.2)."""
    seed: Seed = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live."""
    compile: bool = True
    """Fuse the inner step with torch.compile (needs a C++ compiler on a CPU)."""
    mode: Literal["train", "test", "compare"] = "train"
    """train: meta-train, then meta-test; test: only meta-test a --checkpoint; compare: draw --runs side by side."""
    checkpoint: str | None = None
    """The checkpoint.pt to meta-test."""
    resume: str | None = None
    """A run folder to go on with, exactly where it stopped."""
    run_dir: str = "runs"
    """Run folders are made in here."""
    run_name: str | None = None
    """Name of the run folder (default: script-dataset-learner-seed-time)."""
    data_dir: str = "data"
    """Where torchvision's datasets are, or are downloaded to."""
    track: bool = False
    """Log to Weights & Biases too (pip install "cleanmeta[track]")."""
    checkpoint_every: Count = 100
    """Meta-steps between checkpoints."""
    runs: tuple[str, ...] = ()
    """compare: finished run folders, whose learners are the rows of the heat-map (Figure 3.8)."""

    learner: Name = "vsml"
    """What learns at meta-test time. Meta-trained: vsml, rnn (in-context RNN), hebbian (fast weights), fwmemory (fast-weight
    memory). With nothing but a tuned rate: sgd and adam (one layer), sgd2 and adam2 (two layers). For --preset clone: clone
    and the backprop that it imitates."""
    baselines: tuple[Name, ...] = ("rnn", "sgd", "adam")
    """Learners trained and tested beside the first one, on the same budget of meta-steps (Figures 3.6 and 3.8)."""

    dataset: tuple[str, ...] = ("digits",)
    """Datasets to meta-train on (train splits), one after the other: names or files of your own, my.npz with the arrays
    x_train y_train x_test y_test (thesis: mnist; digits needs no download)."""
    init: str | None = None
    """Start meta-training from this checkpoint's parameters, of a network of any shape (the release, for deep networks)."""
    leave_out: str | None = None
    """Meta-train on all of --dataset but this one (Figure B.3: meta-test on what was left out)."""
    sizes: tuple[Side, ...] = ()
    """Sides of the meta-training images in pixels, in turn (default: as they are; section 3.4.3: 14 28 32)."""
    classes: tuple[Count, ...] = ()
    """Numbers of classes in meta-training tasks, in turn (default: all; section 3.4.3: 3 4 6 7)."""
    shots: CountOrZero = 0
    """Few-shot episodes: this many examples of each class, then one more (Figure B.9: 1); 0: no episodes."""
    projected: Share = 0.5
    """Share of VSML's meta-training tasks with randomly projected inputs (section 3.4.3; one half: the release)."""
    permuted_labels: Share = 0.0
    """Share of VSML's meta-training tasks with permuted labels (VSML treats all labels alike; see LAPTOP)."""
    blanked: Share = 0.0
    """VSML's meta-training tasks replace up to this share of their inputs by a constant (not in the thesis; see LAPTOP)."""
    augment_baselines: bool = False
    """The in-context RNN sees VSML's augmented tasks, not the plain datasets (Figure B.6; the thesis: it does not help)."""
    sequence_length: Count = 500
    """Examples in a meta-training lifetime (section 3.4.2)."""
    persistent: Count = 1
    """backprop: lifetimes go on from their last states for this many meta-steps (1: never; appendix B.2.2, future work)."""
    meta_loss: Literal["mean", "last"] = "mean"
    """Mean cross-entropy of a lifetime, or that of its last example (appendix B.3.2; Figure B.9: last)."""

    hidden: tuple[Count, ...] = ()
    """Widths of hidden layers; none: one layer from inputs to outputs (section 3.4.2)."""
    conv: tuple[Count, ...] = ()
    """Channels of convolutional layers, kernel 3 and stride 2, below the dense ones (Figure B.11: 8)."""
    state_size: Count = 16
    """N, units of each sub-LSTM (appendix B.3.2; 64 for cloning)."""
    message_size: Count = 8
    """N' = N'', size of forward and backward messages (appendix B.3.2)."""
    micro_ticks: Count = 2
    """RNN ticks of a layer per example (appendix B.3.2)."""
    logit_bound: Positive = 100.0
    """Logits are squashed to +- this by a tanh (appendix B.3.2)."""
    logit_scale: Real = 1.0
    """Factor on the averaged message that is read as a logit (not in the thesis, which has none)."""
    feed_label: bool = False
    """Feed the one-hot label beside the error (not in the thesis; the release does for deep networks)."""
    backward_pass: bool = False
    """Let the layers tick in reverse order right after the error is known (not in the thesis; the release, deep networks)."""
    norm_messages: bool = False
    """Layer norm on the messages between layers (not in the thesis; the release, deep networks)."""
    state_init: Literal["normal", "half"] = "normal"
    """normal: all states standard normal (appendix B.3.2); half: half of c is N(0, 1/a), all else zero (the release)."""
    forget_bias: Real = 5.0
    """Added to the LSTM's forget gate (not in the thesis; the release)."""
    input_bias: Real = -5.0
    """Added to the LSTM's input gate (not in the thesis; the release)."""
    rnn_size: Count = 16
    """Units of the in-context RNN (appendix B.3.2)."""
    memory_size: Count = 16
    """The fast-weight memory is a matrix of this size by its square, beside an LSTM of twice its size (the release: 16, 32)."""
    sgd_hidden: Count = 160
    """Hidden units of sgd2 and adam2 (appendix B.3.2)."""
    clone_rate: Positive = 0.5
    """clone: learning rate of the backpropagation that is imitated (not in the thesis)."""
    clone_buffer: Count = 64
    """clone: states of whole networks that are kept for diversity (appendix B.3.1; the size is not in the thesis)."""

    meta_optimizer: Literal["es", "backprop"] = "es"
    """Evolution strategies, or backpropagation through the lifetime (Algorithm 8)."""
    meta_steps: Count = 10_000
    """Outer iterations (appendix B.3.2)."""
    population: Count = 1024
    """es: antithetic pairs in a generation (appendix B.3.2)."""
    chunk: Count | None = None
    """es: pairs evaluated at a time, to bound memory (default: chosen for the device)."""
    noise_std: Positive = 0.05
    """es: standard deviation of the perturbations (appendix B.3.2)."""
    rank_shaping: bool = False
    """es: use the ranks of the losses instead of the losses (Salimans et al. 2017; the thesis does not)."""
    sequences: Count = 128
    """backprop: sequences in a batch (not in the thesis; the release)."""
    es_lr: Positive = 0.025
    """es: Adam's learning rate (appendix B.3.2)."""
    backprop_lr: Positive = 1e-3
    """backprop: Adam's learning rate (not in the thesis; the release)."""
    lr_decay: bool = False
    """Let the learning rate fall linearly to zero (not in the thesis)."""
    clip: Positive = 25.0
    """backprop: largest norm of the meta-gradient (not in the thesis; the release)."""

    test_datasets: tuple[str, ...] = ()
    """Datasets to meta-test on (default: --dataset, then digits wine breast_cancer random sum_sign)."""
    split: Literal["test", "validation"] = "test"
    """Splits to meta-test on. validation, a tenth of each train split that meta-training never has, is for choices: of
    settings, presets, or when to stop."""
    test_sizes: tuple[Side, ...] = ()
    """Sides of the meta-test images in pixels (default: as they are)."""
    test_classes: Count | None = None
    """Meta-test on this many classes of each dataset that has more."""
    test_steps: Count = 2000
    """Examples, or batches, in a meta-test lifetime; not more than once through a dataset (Figure 3.8)."""
    repeat_examples: bool = False
    """Let longer lifetimes go through a dataset again (Figure B.10: 12,000 examples)."""
    test_batch: Count = 1
    """Examples learned from at once, from train splits, and accuracy on unseen ones; VSML averages half of its states
    (appendix B.3.2, the release)."""
    test_examples: Count = 2000
    """Examples of the test split to measure accuracy on with --test-batch."""
    test_seeds: Count = 128
    """Meta-test lifetimes per dataset (Figure 3.6)."""
    robustness: bool = False
    """Meta-test on the six unseen configurations of Figure 3.7."""


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
    logit_scale=30.0,  # what helped most (see its results page)
    feed_label=True,  # as the release does for deep networks
    state_init="half",  # better than the thesis' normals (see its results page)
    permuted_labels=0.5,  # nothing to VSML, a fair chance to the in-context RNN with --augment-baselines
    blanked=0.6,  # carries over to larger images, which have empty borders (see its results page)
    population=64,  # for --meta-optimizer es: 0.2 s a step
    rank_shaping=True,  # es: raw losses leave 64 pairs on the plateau (numbers: .github/results/vsml.md)
    noise_std=0.1,  # es: likewise
    es_lr=0.03,  # es: likewise
    test_steps=1000,  # seconds
    test_seeds=32,  # likewise
)
CLONE = dict(  # section 3.3.2; what appendix B.3.1 does not tell is ours, and worked at the first try (see its results page)
    learner="clone",
    baselines=("backprop",),
    state_size=64,  # appendix B.3
    meta_optimizer="backprop",
    input_bias=0.0,
    forget_bias=8.0,  # a weight is kept for thousands of examples
    meta_steps=2000,
    backprop_lr=1e-2,
    lr_decay=True,
    test_batch=64,  # appendix B.3.1
    test_steps=700,
    test_seeds=1,
)
PRESETS = {"thesis": {}, "laptop": LAPTOP, "clone": CLONE}


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
    sizes: tuple[int, int] | None = None  # the numbers of inputs and outputs, where they cannot vary

    def params(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta (p, d) as named parameters, each (p, *shape)."""
        parts = theta.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (p, ..., i) @ weight (p, i, j) + bias (p, j): the same everywhere, but for the population."""
    y = x.flatten(1, -2) @ weight
    return (y if bias is None else y + bias[:, None]).unflatten(1, x.shape[1:-1])


def lstm_cell(weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One tick of a x b LSTMs with shared weights and own states: Eq. 3.2 for an LSTM. Gates: input, cell, forget, output.

    weight (p, n, 4n); from_a (p, s, a, 4n) and from_b (p, s, b, 4n): what rows and columns feed to the gates.
    """
    i, j, f, o = (from_a[..., :, None, :] + from_b[..., None, :, :] + affine(h, weight)).chunk(4, dim=-1)
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

    weight = weight.view(len(weight), *(1,) * (h.ndim - 2), *weight.shape[1:])
    gates = zip(from_a.chunk(4, -1), from_b.chunk(4, -1), weight.chunk(4, -1), strict=True)
    i, j, f, o = (a[..., :, None, :] + b[..., None, :, :] + (h[..., None] * w).sum(-2) for a, b, w in gates)
    c = sigmoid(f) * c + sigmoid(i) * tanh(j)
    return sigmoid(o) * tanh(c), c


def vsml_tick(cell: Callable, params: dict[str, Tensor], layer: Layer, micro_ticks: int) -> Layer:
    """s_ab <- f_RNN(s_ab, fwd_msg_a, bwd_msg_b) for all a, b of one layer (Eq. 3.7, B.9), some ticks on the same messages."""
    m = layer.fwd_msg.shape[-1]
    hear_fwd, hear_bwd, recurrent = params["lstm.weight"].split([m, m, params["lstm.weight"].shape[1] - 2 * m], dim=1)
    from_a = affine(layer.fwd_msg, hear_fwd, params["lstm.bias"])
    from_b = affine(layer.bwd_msg, hear_bwd)
    h, c = layer.h, layer.c
    for _ in range(micro_ticks):
        h, c = cell(recurrent, from_a, from_b, h, c)
    return Layer(h, c, layer.fwd_msg, layer.bwd_msg)  # _replace, compiled, makes broken tuples in torch 2.11


def message(params: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    """What sub-RNNs say, f_fwd or f_bwd of their mean hidden state (p, ..., n) -> (p, ..., m). Averaged, not summed (appendix
    B.3); as f is linear, the mean may come first."""
    return affine(h, params[name + ".weight"], params[name + ".bias"])


class Dense(NamedTuple):
    """One sub-RNN for each weight of a dense layer."""

    a: int
    b: int
    positions: int = 1

    def tick(self, cell: Callable, params: dict[str, Tensor], layer: Layer, micro_ticks: int) -> tuple[Layer, Tensor]:
        """The layer after some ticks, and the hidden states that its messages are made of."""
        layer = vsml_tick(cell, params, layer, micro_ticks)
        return layer, layer.h

    def forward_message(self, params: dict[str, Tensor], h: Tensor) -> Tensor:
        """fwd_msg_b := mean over a of f_fwd(s_ab), (p, s, b, m)."""
        return message(params, "fwd_msg", h.mean(-3))

    def backward_message(self, params: dict[str, Tensor], h: Tensor) -> Tensor:
        """bwd_msg_a := mean over b of f_bwd(s_ab), (p, s, a, m)."""
        return message(params, "bwd_msg", h.mean(-2))


class Conv(NamedTuple):
    """One sub-RNN for each weight of a kernel (appendix B.2.2). It visits all positions q of the image, hears another patch
    at each, and keeps the mean of the states that it comes out with. Messages lie as (channels, rows, columns), flattened."""

    a: int  # inputs of a patch
    b: int  # channels out
    side: int  # of the image in pixels
    kernel: int = 3
    stride: int = 2

    @property
    def positions(self) -> int:
        return ((self.side - 1) // self.stride + 1) ** 2

    def patches(self, msg: Tensor) -> Tensor:
        """Messages of pixels (p, s, channels * side * side, m) -> those of patches (p, s, q, a, m)."""
        p, s, _, m = msg.shape
        image = msg.movedim(-1, 2).reshape(p * s * m, -1, self.side, self.side)
        patches = F.unfold(image, self.kernel, padding=self.kernel // 2, stride=self.stride)
        return patches.view(p, s, m, self.a, self.positions).permute(0, 1, 4, 3, 2)

    def tick(self, cell: Callable, params: dict[str, Tensor], layer: Layer, micro_ticks: int) -> tuple[Layer, Tensor]:
        fwd_msg = self.patches(layer.fwd_msg)
        bwd_msg = layer.bwd_msg.unflatten(2, (self.b, self.positions)).transpose(2, 3)
        for _ in range(micro_ticks):
            at_q = vsml_tick(cell, params, Layer(layer.h[:, :, None], layer.c[:, :, None], fwd_msg, bwd_msg), 1)
            layer = Layer(at_q.h.mean(2), at_q.c.mean(2), layer.fwd_msg, layer.bwd_msg)
        return layer, at_q.h

    def forward_message(self, params: dict[str, Tensor], h: Tensor) -> Tensor:
        return message(params, "fwd_msg", h.mean(-3)).transpose(2, 3).flatten(2, 3)

    def backward_message(self, params: dict[str, Tensor], h: Tensor) -> Tensor:
        """The mean also runs over the patches that a pixel lies in."""
        h = h.mean(-2).permute(0, 1, 4, 3, 2)  # (p, s, n, a, q)
        fold = partial(F.fold, output_size=2 * (self.side,), kernel_size=self.kernel, padding=self.kernel // 2)
        pixels, counts = (fold(x.flatten(0, 2).flatten(1, -2), stride=self.stride) for x in (h, torch.ones_like(h[:1, :1, :1])))
        return message(params, "bwd_msg", (pixels / counts).view(*h.shape[:3], -1).transpose(2, 3))


def wiring(args: Args, num_inputs: int, num_outputs: int) -> list[Dense | Conv]:
    """The layers 1, ..., K. Convolutions take inputs for a square image of one or three channels."""
    layers, channels = [], 1 if math.isqrt(num_inputs) ** 2 == num_inputs else 3
    for out in args.conv:
        side = math.isqrt(num_inputs // channels)
        layers.append(Conv(9 * channels, out, side))
        channels, num_inputs = out, out * layers[-1].positions
    return layers + [Dense(a, b) for a, b in pairwise((num_inputs, *args.hidden, num_outputs))]


def vsml(args: Args, cell: Callable = lstm_cell) -> Learner:
    """The VSML learner: layers of sub-LSTMs, for any number of inputs and outputs."""
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
        layers = []
        for k, w in enumerate(wiring(args, num_inputs, num_outputs)):
            h, c = normal(fold(keys, k), 2 * w.a * w.b * n).view(*keys.shape[:2], 2, w.a, w.b, n).unbind(2)
            if args.state_init == "half":
                h, c = (
                    torch.zeros_like(h),
                    torch.cat([c[..., : n // 2] / math.sqrt(w.a), torch.zeros_like(c[..., n // 2 :])], -1),
                )
            below = w.a if isinstance(w, Dense) else w.a // 9 * w.side**2
            layers.append(Layer(h, c, *(h.new_zeros(*keys.shape[:2], size, m) for size in (below, w.b * w.positions))))
        return layers

    def from_above(layer: Layer, bwd_msg: Tensor) -> Layer:
        return Layer(layer.h, layer.c, layer.fwd_msg, bwd_msg)

    def between(msg: Tensor) -> Tensor:
        return F.layer_norm(msg, (m,)) if args.norm_messages else msg

    def predict(params: dict[str, Tensor], layers: list[Layer], x: Tensor) -> tuple[list[Layer], Tensor]:
        """The layers 1, ..., K in sequence (the blue box of Algorithm 8)."""
        layers = list(layers)
        fwd_msg = F.pad(x[..., None], (0, m - 1))  # m_a1^(1) := x_a, padded with zeros
        for k, w in enumerate(wiring(args, x.shape[-1], layers[-1].bwd_msg.shape[2])):
            heard = between(fwd_msg) if k > 0 else fwd_msg
            layer = Layer(layers[k].h, layers[k].c, heard, layers[k].bwd_msg)
            layers[k], h = w.tick(cell, params, layer, args.micro_ticks)
            fwd_msg = w.forward_message(params, h)
            if k > 0:
                layers[k - 1] = from_above(layers[k - 1], between(w.backward_message(params, h)))
        logits = args.logit_scale * fwd_msg[..., 0]  # y_b := m_b1^(K+1)
        return layers, args.logit_bound * torch.tanh(logits / args.logit_bound)

    def learn(params: dict[str, Tensor], layers: list[Layer], error: Tensor, label: Tensor) -> list[Layer]:
        """The error is the message from above, m_b1^(K) := e_b. It is heard at the next tick: with the next example, or
        in a backward pass of its own."""
        heard = torch.stack([error, label], -1) if args.feed_label else error[..., None]
        layers = [*layers[:-1], from_above(layers[-1], F.pad(heard, (0, m - heard.shape[-1])))]
        if args.backward_pass:
            wires = wiring(args, layers[0].fwd_msg.shape[2], error.shape[-1])
            for k in reversed(range(len(layers))):
                layers[k], h = wires[k].tick(cell, params, layers[k], args.micro_ticks)
                if k > 0:
                    layers[k - 1] = from_above(layers[k - 1], between(wires[k].backward_message(params, h)))
            layers[-1] = from_above(layers[-1], torch.zeros_like(layers[-1].bwd_msg))
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
def over_lifetime(args: Args, values: Tensor) -> Tensor:
    """What counts of a lifetime's losses (..., t): their mean, or the last one (appendix B.3.2)."""
    return values[..., -1] if args.meta_loss == "last" else values.mean(-1)


def es_gradient(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-gradient by evolution strategies: each antithetic pair lives one lifetime, both sides through the same one.

    theta (d,). Returns the gradient (d,), the mean loss and the mean accuracy.
    """
    right = []

    def evaluate(population: Tensor, pairs: Tensor) -> Tensor:
        ids = step * args.population + pairs[: len(pairs) // 2]
        x, y = tasks.sample(ids, ids, tasks.episode or args.sequence_length)
        state = learner.initial_state(tasks.keys(ids, 3).repeat(2, 1)[:, None], tasks.num_inputs, tasks.num_classes)
        x, y = x.repeat(2, 1, 1)[:, None], y.repeat(2, 1)[:, None]  # (p, s = 1, t, a) and (p, s = 1, t)
        _, losses, correct = lifetime(learner, population, state, x, y)
        right.append(over_lifetime(args, correct.float()).mean())
        return over_lifetime(args, losses).mean(1)

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
    return grad, losses.mean(), es.all_reduce_mean(torch.stack(right).mean())


def backprop_gradient(
    args: Args, learner: Learner, theta: Tensor, tasks: Tasks, step: int, turn: int = 1, carried: dict | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-gradient by backpropagation through a batch of whole lifetimes; returns what es_gradient returns.

    carried: the states at which lifetimes stopped when this dataset was last up, `turn` steps ago. They go on from there
    for --persistent such visits in all and start anew one after the other, so that old and young ones are mixed.
    """
    theta = theta.detach().requires_grad_()
    slots = torch.tensor(es.share(args.sequences), device=theta.device)
    age = ((step // turn + slots) % args.persistent).clamp(max=step // turn)
    ids, length = (step - age * turn) * args.sequences + slots, tasks.episode or args.sequence_length
    x, y = tasks.sample(ids, ids, length, start=age[:, None] * length)
    state = learner.initial_state(tasks.keys(ids, 3)[None], tasks.num_inputs, tasks.num_classes)
    if carried:
        state = each(
            lambda new, old: torch.where((age == 0).view(1, -1, *(1,) * (new.ndim - 2)), new, old), state, carried["state"]
        )
    state, losses, correct = lifetime(learner, theta[None], state, x[None], y[None])
    if carried:
        carried["state"] = each(Tensor.detach, state)
    loss, right = over_lifetime(args, losses).mean(), over_lifetime(args, correct.float()).mean()
    (grad,) = torch.autograd.grad(loss, theta)
    grad, loss, accuracy = (es.all_reduce_mean(value) for value in (grad, loss.detach(), right))
    return grad * (args.clip / grad.norm()).clamp(max=1), loss, accuracy


def each(f: Callable, *states: Any) -> Any:
    """f of the tensors that have the same place in nested lists and tuples."""
    if isinstance(states[0], Tensor):
        return f(*states)
    parts = [each(f, *part) for part in zip(*states, strict=True)]
    return states[0]._make(parts) if hasattr(states[0], "_make") else parts


def meta_train(
    args: Args, learners: dict[str, Learner], thetas: dict[str, Tensor], tasks: dict[str, list[Tasks]], run: "Run", facts: dict
) -> None:
    """Algorithm 8, for learners side by side on the same budget. Changes thetas in place."""
    lr = args.es_lr if args.meta_optimizer == "es" else args.backprop_lr
    adam = {name: torch.optim.Adam([thetas[name]], lr, betas=(0.9, 0.999)) for name in learners}
    memory = {name: [first_memory(args, learner, now) for now in tasks[name]] for name, learner in learners.items()}
    for step in run.steps(args.meta_steps if learners else 0, {"thetas": thetas, "adam": adam, "memory": memory} | facts):
        log = {}
        for name, learner in learners.items():
            turn = len(tasks[name])  # datasets in turn; in parallel in the thesis
            now, kept = tasks[name][step % turn], memory[name][step % turn]
            if name == "clone":
                found = clone_gradient(args, learner, thetas[name], now, step, kept)
            elif args.meta_optimizer == "es":
                found = es_gradient(args, learner, thetas[name], now, step)
            else:
                found = backprop_gradient(args, learner, thetas[name], now, step, turn, kept)
            thetas[name].grad, log[f"{name}_loss"], log[f"{name}_accuracy"] = found
            adam[name].param_groups[0]["lr"] = lr * (1 - step / args.meta_steps) if args.lr_decay else lr
            adam[name].step()  # theta <- theta - alpha * the gradient of the loss over the lifetime
        run.log(step, log)


def first_memory(args: Args, learner: Learner, tasks: Tasks) -> dict[str, Any]:
    """What a meta-optimiser takes from one step to the next: states of lifetimes (--persistent) or of networks (cloning)."""
    count = args.clone_buffer if args.learner == "clone" else args.sequences if args.persistent > 1 else 0
    if not count:
        return {}
    keys = tasks.keys(torch.arange(count, device=tasks.dataset.device), 3)
    keys = keys[:, None] if args.learner == "clone" else keys[None]
    return {"state": each(Tensor.clone, learner.initial_state(keys, tasks.num_inputs, tasks.num_classes))}


# ======================================================================================================================
# Baselines
# ======================================================================================================================
def in_context_rnn(args: Args, num_inputs: int, num_outputs: int, memory: int = 0) -> Learner:
    """The in-context RNN (Hochreiter et al. 2001; appendix B.3.2): one LSTM that hears image, error and previous label.

    memory: also give it a fast-weight memory (Schlag et al. 2021), a matrix (memory, memory^2) that it writes to by the delta
    rule and reads from, one tick per example. Its sizes are fixed: smaller inputs and outputs are padded with zeros.
    """
    n = 2 * memory or args.rnn_size
    shapes = {"lstm.weight": (num_inputs + 2 * num_outputs + n, 4 * n), "lstm.bias": (4 * n,)}
    if memory:
        shapes |= {"write.weight": (n, 3 * memory + 1), "write.bias": (3 * memory + 1,)}
        shapes |= {"read.weight": (n, 2 * memory), "read.bias": (2 * memory,), "found.weight": (memory, n), "found.bias": (n,)}
    shapes |= {"out.weight": (n, num_outputs), "out.bias": (num_outputs,)}

    def init(generator: torch.Generator) -> Tensor:
        theta = {name: initial_weight(shape, generator) for name, shape in shapes.items()}
        theta["lstm.bias"][2 * n : 3 * n] += 1  # the usual forget bias
        return torch.cat([value.flatten() for value in theta.values()])

    def initial_state(keys: Tensor, _: int, outputs: int) -> tuple[Tensor, ...]:
        shapes = ((n,), (n,), (outputs,), (outputs,), (memory, memory**2))  # h, c, the last error, the last label, memory
        return tuple(torch.zeros(*keys.shape[:2], *shape, device=keys.device) for shape in shapes)

    def predict(params: dict[str, Tensor], state: tuple[Tensor, ...], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        def layer(name: str, x: Tensor) -> Tensor:
            return affine(x, params[name + ".weight"], params[name + ".bias"])

        h, c, error, label, fast = state
        heard = [pad(v, size) for v, size in ((x, num_inputs), (error, num_outputs), (label, num_outputs))]
        for _ in range(1 if memory else args.micro_ticks):
            i, j, f, o = layer("lstm", torch.cat([*heard, h], -1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * j.tanh()
            h = o.sigmoid() * c.tanh()
        said = h
        if memory:
            *write, beta = layer("write", h).split([memory, memory, memory, 1], -1)
            k1, k2, v = (part.tanh() for part in write)
            k = (k1[..., :, None] * k2[..., None, :]).flatten(-2)
            fast = fast + ((v - (fast @ k[..., None]).squeeze(-1)) * beta.sigmoid())[..., None] * k[..., None, :]
            fast = fast / fast.flatten(-2).norm(dim=-1).clamp(min=1)[..., None, None]
            q1, q2 = layer("read", h).tanh().chunk(2, -1)
            q = (q1[..., :, None] * q2[..., None, :]).flatten(-2)
            said = h + layer("found", F.layer_norm((fast @ q[..., None]).squeeze(-1), (memory,)))
        logits = layer("out", said)[..., : error.shape[-1]]
        return (h, c, error, label, fast), args.logit_bound * torch.tanh(logits / args.logit_bound)

    def learn(params: dict[str, Tensor], state: tuple[Tensor, ...], error: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (*state[:2], error, label, state[4])

    return Learner(shapes, init, initial_state, predict, learn, sizes=(num_inputs, num_outputs))


def pad(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, size - x.shape[-1]))


def hebbian(args: Args, num_inputs: int, num_outputs: int) -> Learner:
    """Hebbian fast weights (Miconi et al. 2018; appendix B.3.2): one layer of weights w + alpha * fast, fast by Oja's rule.

    A first pass predicts; a second one, which also hears error and label, changes the fast weights. Sizes are fixed.
    """
    shape = (num_inputs + 2 * num_outputs, num_outputs)
    shapes = {"weight": shape, "bias": shape[1:], "alpha": shape, "rate": (1,)}

    def init(generator: torch.Generator) -> Tensor:
        alpha, rate = torch.full(shape, 0.01), torch.tensor([-4.5])  # the release
        return torch.cat([initial_weight(shape, generator).flatten(), torch.zeros(num_outputs), alpha.flatten(), rate])

    def initial_state(keys: Tensor, _: int, outputs: int) -> tuple[Tensor, Tensor]:
        fast = torch.zeros(*keys.shape[:2], *shape, device=keys.device)
        return fast, fast[..., 0]  # and the last input

    def layer(params: dict[str, Tensor], fast: Tensor, x: Tensor) -> Tensor:
        fixed = affine(x, params["weight"], params["bias"])
        return fixed + (x[..., None, :] @ (params["alpha"][:, None] * fast)).squeeze(-2)

    def predict(params: dict[str, Tensor], state: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = pad(x, shape[0])
        return (state[0], x), args.logit_bound * torch.tanh(layer(params, state[0], x) / args.logit_bound)

    def learn(params: dict[str, Tensor], state: tuple[Tensor, Tensor], error: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        fast, x = state
        x = torch.cat([x[..., :num_inputs], pad(error, num_outputs), pad(label, num_outputs)], -1)
        y = layer(params, fast, x).softmax(-1)[..., None, :]
        return fast + params["rate"][..., None, None].sigmoid() * y * (x[..., None] - y * fast), x  # Oja's rule

    return Learner(shapes, init, initial_state, predict, learn, sizes=(num_inputs, num_outputs))


def descend(weight: Tensor, x: Tensor, error: Tensor, lr: Tensor, t: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
    """One step of gradient descent on weight (p, s, a, b), which hears x (p, s, a) and whose outputs have the error (p, s, b);
    with two moments, by Adam (Kingma and Ba 2015, Algorithm 1). Returns the new weight and moments."""
    step = grad = x[..., :, None] * error[..., None, :]
    if moments:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        moments = torch.lerp(grad, moments[0], beta1), torch.lerp(grad**2, moments[1], beta2)
        step = moments[0] / (1 - beta1**t) / ((moments[1] / (1 - beta2**t)).sqrt() + eps)
    return weight - lr * step, *moments


def online_sgd(args: Args, adam: bool, hidden: tuple[int, ...] = (), descend: Callable = descend) -> Learner:
    """Dense tanh layers trained online by gradient descent, or Adam. The only meta-parameter is log10 of the rate."""
    shapes = {"log_lr": (1,)}

    def init(generator: torch.Generator) -> Tensor:
        return torch.tensor([-3.0 if adam else -2.0])  # appendix B.3.2

    def initial_state(keys: Tensor, num_inputs: int, num_outputs: int) -> tuple[Any, ...]:
        layers, inputs = [], []
        for k, (a, b) in enumerate(pairwise((num_inputs, *hidden, num_outputs))):
            weight = normal(fold(keys, k) if k else keys, a * b).view(*keys.shape[:2], a, b) / math.sqrt(a)
            weight = F.pad(weight, (0, 0, 0, 1))  # the last row is the bias
            layers.append((weight, *(torch.zeros_like(weight) for _ in range(2 if adam else 0))))
            inputs.append(weight.new_zeros(*keys.shape[:2], a + 1))
        return layers, inputs, keys.new_zeros((), dtype=torch.float32)

    def predict(params: dict[str, Tensor], state: tuple[Any, ...], x: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        layers, inputs, t = state
        inputs = []
        for weight, *_ in layers:
            inputs.append(F.pad(x.tanh() if inputs else x, (0, 1), value=1.0))
            x = (inputs[-1][..., None, :] @ weight).squeeze(-2)
        return (layers, inputs, t), x

    def learn(params: dict[str, Tensor], state: tuple[Any, ...], error: Tensor, label: Tensor) -> tuple[Any, ...]:
        layers, inputs, t = state
        layers, lr = list(layers), 10 ** params["log_lr"][..., None, None]
        for k in reversed(range(len(layers))):
            weight, x = layers[k][0], inputs[k]
            below = (weight @ error[..., None]).squeeze(-1) * (1 - x**2) if k else None  # backpropagation through tanh
            layers[k] = descend(weight, x, error, lr, t + 1, *layers[k][1:])
            error = below[..., :-1] if k else None
        return layers, inputs, t + 1

    return Learner(shapes, init, initial_state, predict, learn)


def search_rate(args: Args, learner: Learner, tasks: Tasks) -> Tensor:
    """Grid search (appendix B.3.2): the rate, of four in each factor of ten, with the best accuracy over (at most) 500 examples
    of the meta-training data. The grid is a population."""
    grid = torch.linspace(-4, 0, 17, device=tasks.dataset.device)[:, None]
    length = tasks.episode or min(500, args.test_steps)
    ids = torch.arange(16 if length > 100 else 128, device=tasks.dataset.device)
    found = []
    for part in ids.split(4):
        x, y = tasks.sample(part, part, length)
        state = learner.initial_state(tasks.keys(part, 3).expand(len(grid), -1, -1), tasks.num_inputs, tasks.num_classes)
        _, _, correct = lifetime(learner, grid, state, x.expand(len(grid), -1, -1, -1), y.expand(len(grid), -1, -1))
        found.append(over_lifetime(args, correct.float()))
    return grid[torch.cat(found, 1).mean(1).argmax()]


# ======================================================================================================================
# Learning-algorithm cloning (section 3.3.2)
# ======================================================================================================================
class Weights(NamedTuple):
    """The state of one layer of a network that is trained in batches by backpropagation, real or cloned."""

    wb: Tensor  # (p, s, a, b, 2) weight and bias of each synapse; s is 1 where a batch shares them
    x: Tensor  # (p, s, a) the last inputs, stored and fed back for the backward pass
    error: Tensor  # (p, s, b) the last errors at the outputs


def backprop(args: Args) -> tuple[Callable, Callable]:
    """What is cloned: y_b = sum over a of (tanh(x_a) w_ab + b_ab) / sqrt(a), and gradient descent by backpropagation.

    forward(params, wb, x) -> y (p, s, b);  backward(params, wb, x, error) -> error below (p, s, a), new wb (p, s, a, b, 2).
    The factor 1/sqrt(a) keeps weights of all layers in the range of [-4, 4] (not in the thesis).
    """

    def forward(_, wb: Tensor, x: Tensor) -> Tensor:
        w, b = wb.unbind(-1)
        return ((x.tanh()[..., None, :] @ w).squeeze(-2) + b.sum(-2)) / math.sqrt(x.shape[-1])

    def backward(_, wb: Tensor, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        below = (1 - x.tanh() ** 2) * (wb[..., 0] @ error[..., None]).squeeze(-1) / math.sqrt(x.shape[-1])
        pre = torch.stack([x.tanh(), torch.ones_like(x)], -1)
        return below, wb - args.clone_rate * pre[..., :, None, :] * error[..., None, :, None]

    return forward, backward


def cloned_backprop(args: Args) -> tuple[Callable, Callable]:
    """The same by sub-LSTMs, which hold weight and bias, divided by 4, in two dimensions of their cells; all other dimensions
    of states and of messages are zero (appendix B.3.1). After one tick messages are sent, after a second one the new weight
    and bias are read; one tick alone cannot multiply input and error. Only what is read is computed."""
    n, m = args.state_size, args.message_size

    def tick(params: dict[str, Tensor], wb: Tensor, x: Tensor, error: Tensor) -> Layer:
        c, fwd_msg, bwd_msg = F.pad(wb / 4, (0, n - 2)), F.pad(x[..., None], (0, m - 1)), F.pad(error[..., None], (0, m - 1))
        return vsml_tick(lstm_cell, params, Layer(c.tanh(), c, fwd_msg, bwd_msg), 1)

    def forward(params: dict[str, Tensor], wb: Tensor, x: Tensor) -> Tensor:
        h = tick(params, wb, x, x.new_zeros(*x.shape[:2], wb.shape[3])).h
        return message(params, "fwd_msg", h.mean(-3))[..., 0] * math.sqrt(x.shape[-1])

    def backward(params: dict[str, Tensor], wb: Tensor, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        layer = tick(params, wb, x, error)
        below = message(params, "bwd_msg", layer.h.mean(-2))[..., 0] * error.shape[-1] / math.sqrt(x.shape[-1])
        two = {name: params[name].unflatten(-1, (4, n))[..., :2].flatten(-2) for name in ("lstm.weight", "lstm.bias")}
        return below, 4 * vsml_tick(lstm_cell, two, layer._replace(c=layer.c[..., :2]), 1).c.clamp(-4, 4)

    return forward, backward


def batch_learner(args: Args, rnn: Learner | None, rules: tuple[Callable, Callable]) -> Learner:
    """A feed-forward network that learns from batches: s are the examples of a batch, whose new weights are averaged."""
    forward, backward = rules

    def initial_state(keys: Tensor, num_inputs: int, num_outputs: int) -> list[Weights]:
        """Weights 0.3 N(0, 1) and zero biases, the same for the whole batch."""
        layers = []
        for k, (a, b) in enumerate(pairwise((num_inputs, *args.hidden, num_outputs))):
            w = 0.3 * normal(fold(keys[:, :1], k), a * b).view(-1, 1, a, b)
            below, above = (w.new_zeros(*keys.shape[:2], size) for size in (a, b))
            layers.append(Weights(torch.stack([w, torch.zeros_like(w)], -1), below, above))
        return layers

    def parts(layer: Weights, x: Tensor) -> list[Tensor]:
        """As many examples at a time as keep the sub-RNNs in the cache, a power of two; always with the same strides, for
        which rules are compiled."""
        few = 2 ** max(0, int(math.log2(2**17 / layer.wb[:, 0, ..., 0].numel()))) if rnn and args.device == "cpu" else 4096
        return [part.clone(memory_format=torch.contiguous_format) for part in x.split(few, 1)]

    def predict(params: dict[str, Tensor], layers: list[Weights], x: Tensor) -> tuple[list[Weights], Tensor]:
        """The layers in order 1, ..., K, with frozen states."""
        heard = []
        for layer in layers:
            heard.append(layer._replace(x=x))
            x = torch.cat([forward(params, layer.wb, part) for part in parts(layer, x)], 1)
        return heard, x

    def learn(params: dict[str, Tensor], layers: list[Weights], error: Tensor, label: Tensor) -> list[Weights]:
        """The layers in order K, ..., 1."""
        learned = []
        for layer in reversed(layers):
            pairs = zip(parts(layer, layer.x), parts(layer, error), strict=True)
            below, wb = zip(*(backward(params, layer.wb, *pair) for pair in pairs), strict=True)
            wb = sum(part.sum(1, keepdim=True) for part in wb) / error.shape[1]
            learned.append(layer._replace(wb=wb, error=error))
            error = torch.cat(below, 1)
        return learned[::-1]

    if rnn:
        return rnn._replace(initial_state=initial_state, predict=predict, learn=learn)
    return Learner({}, lambda generator: torch.zeros(0), initial_state, predict, learn)


def clone_gradient(
    args: Args, learner: Learner, theta: Tensor, tasks: Tasks, step: int, memory: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """Regress y, the error below, and the changes of w and b toward what backpropagation makes of the same synapses.
    Returns the gradient (d,), the loss in units of the targets' variances, and the share of them that is explained."""
    wb, x, error = synapses(args, learner, theta, tasks, step, memory["state"])
    theta = theta.detach().requires_grad_()
    answers = []
    for params, (forward, backward) in ((learner.params(theta[None]), cloned_backprop(args)), ({}, backprop(args))):
        below, new = backward(params, wb, x, error)
        answers.append(torch.cat([forward(params, wb, x), below, (new - wb).flatten(2)], 2)[0])
    found, target = answers
    loss = (((found - target) ** 2).mean(0) / target.var(0)).mean()
    (grad,) = torch.autograd.grad(loss, theta)
    return grad * (1 / grad.norm()).clamp(max=1), loss.detach(), 1 - loss.detach()


@torch.no_grad()
def synapses(
    args: Args, learner: Learner, theta: Tensor, tasks: Tasks, step: int, buffer: list[Weights], count: int = 4096
) -> tuple[Tensor, Tensor, Tensor]:
    """wb (1, count, 1, 1, 2), x and error (1, count, 1) of many synapses, by the curriculum of appendix B.2.1: random ones;
    then three in four from true networks in training; then from networks of sub-RNNs with their own inputs and errors.

    buffer: states of networks, one along p each. Now and then the sub-RNNs train one of them on a batch, and what comes out
    takes its place (appendix B.3.1).
    """
    device, progress = theta.device, step / args.meta_steps
    w, b, x, error = (std * torch.randn(1, count, 1, device=device) for std in (2.0, 0.3, 1.0, 0.3))
    wb = torch.stack([w, b], -1)[..., None, :]
    if progress < 0.25:
        return wb, x, error
    one, ids = torch.randint(len(buffer[0].wb), ()).item(), torch.tensor([step], device=device)
    layers = [layer._replace(wb=layer.wb[one : one + 1].clone()) for layer in buffer]
    live = partial(one_example, **dict(zip("xy", tasks.sample(ids, ids, 16), strict=True)))
    if progress > 0.6 or step % 20 == 0:
        after = live(learner, learner.params(theta[None]), layers)[0]
        fresh = learner.initial_state(tasks.keys(ids, 3)[None], tasks.num_inputs, tasks.num_classes)
        for old, new in zip(buffer, fresh if step % 400 == 0 else after, strict=True):
            old.wb[one] = new.wb[0]
    if progress <= 0.6:
        after = live(batch_learner(args, None, backprop(args)), {}, layers)[0]
    k, some = step % len(layers), count // 4
    sizes = (*after[k].x.shape[1:], after[k].error.shape[2])
    s, a, b = (torch.randint(size, (count - some,), device=device) for size in sizes)
    wb[0, some:, 0, 0] = layers[k].wb[0, 0, a, b]
    x[0, some:, 0], error[0, some:, 0] = after[k].x[0, s, a], after[k].error[0, s, b]
    return wb, x, error


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def test_ids(tasks: Tasks, count: int) -> Tensor:
    """Ids (s,) of tasks and sequences of the dataset's split, which meta-training and other splits never have."""
    return FIRST_ID[tasks.dataset.split] + torch.arange(count, device=tasks.dataset.device)


def curve(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, together: int) -> tuple[Tensor, Tensor]:
    """Lifetimes on unseen examples, each from its own random state: whether each prediction was right (seeds, t), and its
    cross-entropy. One pass through the data at most, so that no example comes twice (`random` is there to be repeated), or
    more with --repeat-examples. In blocks of examples: memory does not grow with time but for what is returned.
    together: how many lifetimes run at once."""
    steps = tasks.episode or args.test_steps
    if len(tasks.dataset) and not args.repeat_examples:
        steps = min(steps, len(tasks.dataset))
    parts = []
    for part in test_ids(tasks, args.test_seeds).split(together):
        state, blocks = learner.initial_state(tasks.keys(part, 3)[None], tasks.num_inputs, tasks.num_classes), []
        for start in range(0, steps, 1000):
            x, y = tasks.sample(part, part, min(1000, steps - start), start)
            state, *block = lifetime(learner, theta[None], state, x[None], y[None])
            blocks.append(block)
        parts.append([torch.cat(kind, -1)[0] for kind in zip(*blocks, strict=True)])
    losses, correct = (torch.cat(kind) for kind in zip(*parts, strict=True))
    return correct.float(), losses


Metrics = dict[str, dict[int, Tensor]]  # name -> step -> values (seeds,)


def online_metrics(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, together: int) -> Metrics:
    """What `curve` finds, after each example. Few-shot episodes have no cumulative accuracy: their shots are no predictions."""
    correct, losses = curve(args, learner, theta, tasks, together)
    cumulative = correct.cumsum(1) / torch.arange(1, correct.shape[1] + 1, device=correct.device)
    found = {} if tasks.episode else {"cumulative_accuracy": cumulative}
    found |= {"accuracy": correct, "cross_entropy": losses}
    return {name: dict(enumerate(values.unbind(1), 1)) for name, values in found.items()}


def batch_metrics(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, train: Tasks) -> Metrics:
    """Learning from batches of train examples: accuracy on unseen ones after so many batches. Batches lie along s, seeds
    along p."""
    size, ids = args.test_batch, test_ids(tasks, args.test_seeds)
    keys = train.keys(test_ids(tasks, args.test_seeds * size), 3).view(args.test_seeds, size, 2)
    state, params = learner.initial_state(keys, train.num_inputs, train.num_classes), learner.params(theta[None])
    unseen = min(args.test_examples, len(tasks.dataset) or args.test_examples) // size * size
    apart = 0 if len(tasks.dataset) else 2**32  # what is made on the fly has no splits, but endless sequences
    x_test, y_test = tasks.sample(ids, ids, max(unseen, size), start=apart)
    found = {"accuracy": {}, "cross_entropy": {}}
    for last, step in pairwise([0, *plotted_steps(args.test_steps)]):
        x, y = (v.unflatten(1, (-1, size)).transpose(1, 2) for v in train.sample(ids, ids, (step - last) * size, last * size))
        state = lifetime(learner, theta[None].expand(len(ids), -1), state, x, y)[0]
        logits = torch.cat([learner.predict(params, state, part)[1] for part in x_test.split(size, 1)], 1)
        found["accuracy"][step] = (logits.argmax(-1) == y_test).float().mean(1)
        found["cross_entropy"][step] = F.cross_entropy(logits.mT, y_test, reduction="none").mean(1)
    return found


def batched(learner: Learner) -> Learner:
    """VSML that learns from a batch (appendix B.3.2): the first half of each state is averaged over the examples s. They
    start from one state."""

    def mix(v: Tensor) -> Tensor:
        half = v.shape[-1] // 2
        return torch.cat([v[..., :half].mean(1, keepdim=True).expand_as(v[..., half:]), v[..., half:]], -1)

    def initial_state(keys: Tensor, num_inputs: int, num_outputs: int) -> list[Layer]:
        return learner.initial_state(keys[:, :1].expand_as(keys), num_inputs, num_outputs)

    def learn(params: dict[str, Tensor], state: list[Layer], error: Tensor, label: Tensor) -> list[Layer]:
        return [layer._replace(h=mix(layer.h), c=mix(layer.c)) for layer in learner.learn(params, state, error, label)]

    return learner._replace(initial_state=initial_state, learn=learn)


def meta_test(
    args: Args, learners: dict[str, Learner], thetas: dict[str, Tensor], tests: dict[str, Tasks], run: "Run"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All learners on --split of all test datasets: result rows, further facts, and figures."""
    rows, curves, facts = [], [], {}
    in_batches = args.test_batch > 1 or args.learner == "clone"
    pairs = list(product(tests.items(), learners.items()))
    for (task, tasks), (label, learner) in tqdm(pairs, desc="meta-test", disable=run.rank > 0):
        try:
            fitting = replace(tasks, dataset=fit(args, learner, tasks))
        except DatasetError as error:
            run.info(f"{label} is left out on {task}: {error}")
            continue
        measure = partial(measured, args, learner, thetas[label], fitting, tasks, label, task, in_batches)
        some, curve = run.once(f"{task}, {label}", measure)
        rows += some
        curves += curve
    if not rows:
        raise UserError("No learner fits any of the test datasets; choose other --test-datasets.")

    metric = rows[0]["metric"]
    axes = {"xlabel": "batches seen" if in_batches else "examples seen", "ylabel": metric.replace("_", " "), "ylim": (0, 1.02)}
    plot(curves, run.folder / f"{metric}.png", labels=LABELS, columns=3, **axes)
    if args.learner == "clone":
        facts["error"] = draw_error_map(run.folder / "error_map.png", args, learners["clone"], thetas["clone"])
    elif not in_batches and not args.shots:
        facts["overtaken"] = {task: overtaken(args.learner, [row for row in curves if row["task"] == task]) for task in tests}
        for task, steps in facts["overtaken"].items():
            for label, step in steps.items():
                run.info(f"{task}: {LABELS[label]} overtakes {LABELS[args.learner]} after {step} examples.")
        shown = {label: learners[label] for label in (args.learner, "sgd", "adam") if label in learners}
        draw_introspection(run.folder / "introspection.png", shown, thetas, next(iter(tests.values())))
    return rows, facts


def measured(
    args: Args, learner: Learner, theta: Tensor, fitting: Tasks, tasks: Tasks, label: str, task: str, in_batches: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Result rows of one learner on one dataset at plotted_steps, and rows of the first metric at all steps."""
    if in_batches:
        train = tasks.dataset.reload(split="train")
        metrics = batch_metrics(args, learner, theta, fitting, replace(fitting, dataset=train))
    else:
        metrics = online_metrics(args, learner, theta, fitting, at_a_time(args, tasks, label))
    novelty = "task" if tasks.dataset.source["name"] in trained_on(args) else "domain"

    rows, curves = [], []
    for metric, points in metrics.items():
        steps = sorted(points.keys() & plotted_steps(max(points)))
        rows += [result_row(label, task, novelty, metric, step, points[step]) for step in steps]
        curves.append([result_row(label, task, novelty, metric, step, points[step]) for step in points if not curves])
    return rows, curves[0]


def overtaken(ours: str, curves: list[dict[str, Any]]) -> dict[str, int]:
    """The short horizon (Figure B.10): for learners that ours was ahead of once, the step from which on they stay ahead."""
    means: dict[str, dict[int, float]] = {}
    for row in curves:
        means.setdefault(row["learner"], {})[row["step"]] = row["mean"]

    overtaken = {}
    for label, points in means.items():
        ahead = [step for step in points if ours in means and means[ours][step] >= points[step]]
        if label != ours and ahead and ahead[-1] < max(points):
            overtaken[label] = min(step for step in points if step > ahead[-1])
    return overtaken


def trained_on(args: Args) -> tuple[str, ...]:
    return tuple(name for name in args.dataset if name != args.leave_out)


def test_tasks(args: Args, device: torch.device) -> dict[str, Tasks]:
    """--split of all test datasets at all sizes, by the name that results give them; with --robustness, those of
    images in the configurations of Figure 3.7."""
    tests = {}
    for name in distinct(args.test_datasets or args.dataset + BUNDLED + GENERATED):
        for size in args.test_sizes or (None,):
            dataset = load(name, args.split, args.data_dir, device, size)
            task = f"{dataset.name}@{size}" if size and len(dataset.shape) == 3 else dataset.name
            tests[task] = plain = Tasks(dataset, classes=args.test_classes, shots=args.shots, seed=args.seed)
            if args.robustness and len(dataset.shape) == 3 and len(dataset):
                tests[f"{task} 5 classes"] = replace(plain, classes=min(5, dataset.num_classes))
                tests |= {f"{task} at {size} x {size}": replace(plain, dataset=dataset.resize(size)) for size in (21, 48)}
                tests[f"{task} projected"] = replace(plain, projected=1.0)
                tests[f"{task} permuted"] = replace(plain, permuted_inputs=1.0)
    return tests


def fit(args: Args, learner: Learner, tasks: Tasks) -> Dataset:
    """The dataset at a size that the learner was made for. Raises DatasetError if there is none."""
    dataset = tasks.dataset
    if learner.sizes is None:
        if args.conv and "lstm.weight" in learner.shapes and not square(dataset):
            raise DatasetError("convolutions need square images.")
        return dataset
    inputs, outputs = learner.sizes
    if tasks.num_classes > outputs:
        raise DatasetError(f"it was made for {outputs} classes, and '{dataset.name}' has {tasks.num_classes}.")
    if dataset.num_inputs <= inputs:
        return dataset
    return dataset.resize(math.isqrt(inputs // dataset.shape[0]))


def square(dataset: Dataset) -> bool:
    """Whether its inputs are square images."""
    return len(dataset.shape) == 3 and dataset.shape[1] == dataset.shape[2]


def plotted_steps(steps: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, 100, ..., with 400, and the last step."""
    points = {base * 10**power for base in (1, 2, 5) for power in range(8)} | {400, steps}
    return sorted(point for point in points if point <= steps)


LABELS = {"vsml": "VSML", "rnn": "in-context RNN", "hebbian": "Hebbian fast weights", "fwmemory": "fast-weight memory"}
LABELS |= {"sgd": "online SGD", "adam": "online SGD with Adam", "sgd2": "SGD, 2 layers", "adam2": "Adam, 2 layers"}
LABELS |= {"clone": "VSML, cloned backpropagation", "backprop": "SGD in batches"}


def draw_introspection(path: Path, learners: dict[str, Learner], thetas: dict[str, Tensor], tasks: Tasks) -> None:
    """Figures 3.9 and B.8: the probability of each class (rows) as examples come in (columns); the true class is framed, the
    predicted one dotted. Left two unseen examples of each class, one after the other; right a hundred random ones."""
    data = tasks.dataset
    ids = test_ids(tasks, 1)
    x, y = tasks.sample(ids, ids, min(100, len(data) or 100))
    order = torch.cat([(y[0] == label).nonzero()[:2, 0] for label in y[0].unique()])
    figure, axes = pyplot().subplots(
        len(learners), 2, figsize=(18, 2.4 * len(learners)), width_ratios=(1, 4), squeeze=False, layout="constrained"
    )
    for (label, learner), lines in zip(learners.items(), axes, strict=True):
        for axis, index in zip(lines, (order, torch.arange(y.shape[1], device=data.device)), strict=True):
            state = learner.initial_state(tasks.keys(ids, 3)[None], tasks.num_inputs, tasks.num_classes)
            params, columns = learner.params(thetas[label][None]), []
            for t in index:
                state, logits = learner.predict(params, state, x[None, :, t])
                columns.append(logits[0, 0].softmax(-1))
                answer = F.one_hot(y[None, :, t], tasks.num_classes).float()
                state = learner.learn(params, state, logits.softmax(-1) - answer, answer)
            axis.imshow(torch.stack(columns, 1).numpy(force=True), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            seen = range(len(index))
            axis.plot(seen, y[0, index].numpy(force=True), "s", mfc="none", mec="tab:red", ms=7)
            axis.plot(seen, torch.stack(columns, 1).argmax(0).numpy(force=True), ".", color="black", ms=4)
            axis.set(title=LABELS[label], xlabel="examples seen", ylabel="class")
    save(figure, path)


def draw_error_map(path: Path, args: Args, learner: Learner, theta: Tensor) -> float:
    """Figure B.1: the cloned y = tanh(x) w, and its error everywhere. Returns the mean absolute error on the grid."""
    n = 81
    x, w = torch.meshgrid(torch.linspace(-3, 3, n), torch.linspace(-4, 4, n), indexing="xy")
    wb = torch.stack([w, torch.zeros_like(w)], -1).view(1, -1, 1, 1, 2).to(theta.device)
    params, x_in = learner.params(theta[None]), x.reshape(1, -1, 1).to(theta.device)
    y, target = (rule[0](params, wb, x_in).view(n, n).cpu() for rule in (cloned_backprop(args), backprop(args)))
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for row in range(0, n, 20):
        (line,) = left.plot(x[row], y[row], label=f"w = {w[row, 0]:.0f}")
        left.plot(x[row], target[row], ":", color=line.get_color())
    left.set(title="y = tanh(x) w (dotted: target)", xlabel="x", ylabel="y")
    left.legend()
    error = (y - target).abs()
    image = right.imshow(error, origin="lower", extent=(-3, 3, -4, 4), aspect="auto")
    right.set(title=f"absolute error, {error.mean():.3f} on average", xlabel="x", ylabel="w")
    figure.colorbar(image)
    save(figure, path)
    return error.mean().item()


def compare(args: Args) -> None:
    """Figures 3.8 and B.4: what each learner of finished runs (rows) reached on each task (columns), as a heat-map after 100
    examples and one after --test-steps. Learners with nothing but a tuned rate have one row, from the last run."""
    if not args.runs:
        raise UserError("--mode compare needs --runs FOLDER FOLDER ...")
    cells: dict[str, dict[tuple[str, str], float]] = {}
    for folder in args.runs:
        try:
            results = json.loads(Path(folder, "results.json").read_text())
            trained = [name for name in results["args"]["dataset"] if name != results["args"]["leave_out"]]
            source = f" on {', '.join(trained)}" + (", persistent" if results["args"]["persistent"] > 1 else "")
            for row, step in product(results["results"], (100, args.test_steps)):
                if row["metric"] == "cumulative_accuracy" and row["step"] <= step:  # the last such row counts
                    name = LABELS[row["learner"]] + (source if row["learner"] in META_TRAINED else "")
                    cells.setdefault(f"after {step} examples", {})[name, row["task"]] = 100 * row["mean"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no finished run of {METHOD}.py.") from error
    path = Path(args.run_dir, "compare.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    matrix(cells, path, "cumulative accuracy in %")
    print(f"Written to {path}")


# ======================================================================================================================
# The run
# ======================================================================================================================
METHOD = "vsml"  # in checkpoints and results; a renamed copy of this file reads them too
USER_ERRORS = (CheckpointError, DatasetError, FlagError)
NAMED_AFTER = ("dataset", "learner")  # the flags that name a run's folder


# ---- the same text in all six scripts: begin -----------------------------------------------------------------------
class UserError(Exception):
    """A user's mistake; the message is one sentence that says what to do."""


def parse_args() -> tuple[Args, dict[str, Any]]:
    """The flags over a preset's values, or over those of the checkpoint that they name; and that checkpoint."""
    typed = tyro.cli(Args)
    if bool(typed.checkpoint) != (typed.mode == "test") or (typed.checkpoint and typed.resume):
        raise UserError("--mode test and --checkpoint FILE need each other, and exclude --resume FOLDER.")
    cuda = torch.cuda.is_available()
    if typed.device == "cuda" and not cuda:
        raise UserError("There is no CUDA device; leave out --device cuda.")
    device = ("cuda" if cuda else "cpu") if typed.device == "auto" else typed.device
    preset = ("thesis" if device == "cuda" else "laptop") if typed.preset == "auto" else typed.preset

    checkpoint = {}
    base = PRESETS[preset] | {"preset": preset}
    if path := typed.checkpoint or typed.resume:
        path = Path(path, "checkpoint.pt") if typed.resume else Path(path)
        checkpoint = checkpoints.read(path, method=str, args=dict, step=int, state=dict, rng=list)
        base = checkpoint["args"] | {"mode": typed.mode, "resume": typed.resume}
        base |= {} if typed.resume else {"run_name": None, "run_dir": typed.run_dir}
        if checkpoint["method"] != METHOD or checkpoint["step"] < 0:
            raise UserError(f"{path} is a checkpoint of {checkpoint['method']}.py, not of {METHOD}.py.")
    try:
        base = Args(**base | {"device": device})
    except TypeError as error:
        raise UserError(f"{path} was written by another version of {METHOD}.py.") from error
    args = replace(tyro.cli(Args, default=base), device=device, preset=base.preset)

    free = ("data_dir", "compile", "track", "run_dir")
    changed = [flag for flag in vars(args) if flag not in free and getattr(args, flag) != getattr(base, flag)]
    if args.resume and changed:
        raise UserError(f"A resumed run keeps its flags; leave out --{changed[0].replace('_', '-')}.")
    check_ranges(args)
    if args.track and not find_spec("wandb"):
        raise UserError('--track needs Weights & Biases: pip install "cleanmeta[track]".')
    return args, checkpoint


class Run:
    """Device, processes, folder, log and checkpoints of a run. Under torchrun, rank 0 alone writes."""

    def __init__(self, args: Args, checkpoint: dict[str, Any]):
        self.args = args
        self.checkpoint = checkpoint  # of the run that is resumed or meta-tested
        self.first = checkpoint["step"] if args.resume else 0
        self.lines: list[tuple[int, dict[str, Tensor]]] = []  # of metrics.csv, not yet written
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(args.device)
        if args.device == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True

        if self.world > 1:
            dist.init_process_group()
        keep_memory()
        torch.manual_seed(args.seed)

        self.compiles = args.compile and (args.device == "cuda" or can_compile())
        if args.compile and not self.compiles:
            self.info("No working C++ compiler: running without torch.compile, which is slower.")

    def info(self, text: str) -> None:
        """Print a line, above the progress bar."""
        if self.rank == 0:
            tqdm.write(text)

    def open_folder(self) -> None:
        """Make the run's folder, or continue in that of a resumed run. Before this nothing is written."""
        args = self.args
        flags = [getattr(args, name) for name in NAMED_AFTER] + ["test"] * (args.mode == "test")
        words = [METHOD, *(flag if isinstance(flag, str) else "-".join(flag) for flag in flags), f"s{args.seed}"]
        name = args.run_name or "-".join([*words, time.strftime("%Y%m%d-%H%M%S")]).replace("/", "-")
        if name != Path(name).name or name == "..":
            raise UserError(f"--run-name {name} is not a name; the folder that runs are in is --run-dir.")
        folder = [Path(args.resume or Path(args.run_dir, name))]
        if self.rank == 0:
            lock(folder[0])
            self.write_first(folder[0])
        if self.world > 1:  # the others wait for the folder, and for its name, which may hold the time
            dist.broadcast_object_list(folder)
        self.folder = folder[0]
        path = self.folder / "meta_test.pt"
        key = f"{asdict(replace(args, resume=None))} {args.checkpoint and os.path.getmtime(args.checkpoint)}"
        cache = checkpoints.read_cache(path, of=str)
        self.cache = cache if cache.get("of") == key else {"of": key}

    def write_first(self, folder: Path) -> None:
        """args.json and empty logs of a new run, or the logs of a resumed one up to its checkpoint."""
        files = {path.name for path in folder.iterdir()}
        new = not self.args.resume
        if "results.json" in files or (new and ("checkpoint.pt" in files or (files and "args.json" not in files))):
            raise UserError(f"{folder} holds a run: --resume it, test it with --mode test, or choose another --run-name.")
        if new:
            checkpoints.write(folder / "args.json", to_json(asdict(self.args)))
        self.metrics = MetricsLog(folder, self.first, asdict(self.args) if self.args.track else None)
        self.info(f"{METHOD}: preset {self.args.preset}, device {self.args.device}, run folder {folder}")

    def steps(self, total: int, keep: dict[str, Any]) -> Iterator[int]:
        """The meta-steps to do. Restores `keep`, tensors and what has a state_dict, and saves it at intervals."""
        if self.first > total:
            raise UserError(f"The checkpoint has {self.first} meta-steps, more than the {total} of this run.")
        if self.args.resume:
            checkpoints.restore(keep, self.checkpoint["state"])
            checkpoints.set_rng_state(self.checkpoint["rng"])
        else:
            self.save(0, keep)
        steps = range(self.first, total)
        self.bar = tqdm(steps, "meta-train", initial=self.first, total=total, disable=self.rank > 0)
        for step in self.bar:
            yield step
            if (step + 1) % self.args.checkpoint_every == 0 or step + 1 == total:
                self.save(step + 1, keep)

    def save(self, step: int, keep: dict[str, Any]) -> None:
        """Write checkpoint.pt: everything that the run needs to continue after `step` meta-steps."""
        self.write_lines()
        state = checkpoints.state_of(keep)
        self.refuse(checkpoints.first_not_finite(state), step)
        if self.rank == 0:
            parts = {"method": METHOD, "args": asdict(self.args), "step": step, "state": state}
            checkpoints.write(self.folder / "checkpoint.pt", parts | {"rng": checkpoints.rng_state()})

    def refuse(self, name: str | None, step: int) -> None:
        """Stop at a number that is not finite, before it is saved."""
        if name:
            last = self.folder / "checkpoint.pt"
            raise UserError(f"{name} is not finite at meta-step {step}; {last} was saved before. Try a smaller learning rate.")

    def log(self, step: int, values: dict[str, Tensor]) -> None:
        """A line of metrics.csv and TensorBoard, on a GPU not before there are 20, so that it need not wait."""
        self.lines.append((step, values))
        if self.args.device == "cpu" or len(self.lines) == 20:
            self.write_lines()

    def write_lines(self) -> None:
        """Raises UserError at a number that is not finite."""
        lines, self.lines = self.lines, []
        for step, values in lines:
            values = {name: float(value) for name, value in values.items()}
            self.refuse(next((name for name, value in values.items() if not math.isfinite(value)), None), step)
            if self.rank == 0:
                self.metrics.write(step, values)
                self.bar.set_postfix({name: f"{values[name]:.3f}" for name in list(values)[:2]}, refresh=False)

    def once(self, part: str, measure: Callable[[], Any]) -> Any:
        """measure(), or what it returned before this meta-test was cut off. Both leave the same random state."""
        if part not in self.cache:
            self.cache[part] = measure(), checkpoints.rng_state()
            if self.rank == 0:
                checkpoints.write(self.folder / "meta_test.pt", self.cache)
        value, rng = self.cache[part]
        checkpoints.set_rng_state(rng)
        return value

    def finish(self, rows: list[dict[str, Any]], seconds: dict[str, float], parameters: int, **more: Any) -> None:
        """Write results.json, and print its first and last rows. For rank 0."""
        facts = {"script": METHOD, "preset": self.args.preset, "args": asdict(self.args), "seconds": seconds}
        facts |= machine.facts(self.device) | {"parameters": parameters} | more
        checkpoints.write(self.folder / "results.json", to_json(facts | {"results": rows}))
        (self.folder / "meta_test.pt").unlink(missing_ok=True)
        self.metrics.board.close()
        self.info("\n".join(["", *table(rows), ""]))
        self.info(f"Written to {self.folder}: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def run_as_script(main: Callable[[], None]) -> None:
    """main(), with one sentence and exit code 1 for a user's mistake, a full disk, Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except (UserError, *USER_ERRORS) as error:
        sys.exit(f"{METHOD}.py: {error}".replace("\n", " "))
    except (OSError, MemoryError, RuntimeError) as error:
        if not (sentence := machine.sentence(error)):
            raise
        sys.exit(f"{METHOD}.py: {sentence}")
    except KeyboardInterrupt:
        sys.exit(f"\n{METHOD}.py: stopped; continue with --resume and the run's folder.")
    finally:
        release()
    end_other_ranks()


# ---- the same text in all six scripts: end -------------------------------------------------------------------------
META_TRAINED = ("vsml", "rnn", "hebbian", "fwmemory", "clone")  # the others have nothing but a learning rate


def check(args: Args, world: int) -> None:
    """Refuse what cannot work, before anything is written."""
    if not args.dataset:
        raise UserError("--dataset needs at least one dataset.")
    if args.leave_out and (args.leave_out not in args.dataset or not trained_on(args)):
        raise UserError(
            f"--leave-out {args.leave_out} leaves out one of several --dataset; these are {', '.join(args.dataset)}."
        )
    names = {args.learner, *args.baselines}
    if (args.preset == "clone") != (args.learner == "clone") or "clone" in args.baselines:
        raise UserError("Cloning has settings of its own: use --preset clone, with --hidden 32 for a deep network.")
    if (args.test_batch > 1 or args.learner == "clone") and names - {"vsml", "clone", "backprop"}:
        raise UserError("Only vsml, clone and backprop learn from batches; add --baselines backprop to --test-batch.")
    if args.test_batch == 1 and "backprop" in names and args.learner != "clone":
        raise UserError("backprop learns from batches; use --test-batch 64.")
    if args.persistent > 1 and (args.meta_optimizer == "es" or world > 1):
        raise UserError("--persistent is for --meta-optimizer backprop in one process.")
    if args.learner == "clone" and world > 1:
        raise UserError("Cloning runs in one process; start it without torchrun.")
    members, flag = (args.population, "population") if args.meta_optimizer == "es" else (args.sequences, "sequences")
    if members % world:
        raise UserError(f"--{flag} {members} cannot be shared evenly by {world} processes; choose a multiple of {world}.")


def at_a_time(args: Args, tasks: Tasks, name: str = "vsml") -> int:
    """How many lifetimes to run at once: their states should stay in a CPU's cache, or use a GPU's memory well."""
    a, b = tasks.num_inputs, tasks.num_classes
    if name == "vsml":
        numbers = args.state_size * sum(w.a * w.b * w.positions for w in wiring(args, a, b))
    else:
        numbers = {"fwmemory": args.memory_size**3, "sgd2": args.sgd_hidden * (a + b), "adam2": args.sgd_hidden * (a + b)}.get(
            name, a * b
        )
    return max(1, (2**18 if args.device == "cpu" else 2**26) // numbers)


def even_chunk(args: Args, tasks: Tasks) -> int:
    """How many pairs of ES to run at once: at_a_time at most, and always the same number, so that one compilation does."""
    pairs = len(es.share(args.population))
    return max(c for c in range(1, pairs + 1) if pairs % c == 0 and (c == 1 or 2 * c <= at_a_time(args, tasks)))


def train_tasks(args: Args, run: Run, augment: bool) -> list[Tasks]:
    """What is meta-trained on: the train splits of the datasets, at all sizes, with all numbers of classes."""
    settings = dict(shots=args.shots, seed=args.seed)
    if augment:
        settings |= dict(projected=args.projected, permuted_labels=args.permuted_labels, blanked=args.blanked)
    found = []
    for name, size in product(trained_on(args), args.sizes or (None,)):
        dataset = load(name, "train", args.data_dir, run.device, size)
        if args.conv and not square(dataset):
            raise DatasetError(f"Convolutions need square images, and '{name}' has none.")
        found += [Tasks(dataset, classes=classes, **settings) for classes in args.classes or (None,)]
    return found


def make_learner(name: str, args: Args, run: Run, sizes: tuple[int, int], use: str) -> Learner:
    """A learner by its name, compiled for its use: "backprop" or "es" to meta-train it, or "test". sizes: the numbers of
    inputs and outputs for those that need to know."""
    fixed = {"rnn": in_context_rnn, "hebbian": hebbian, "fwmemory": partial(in_context_rnn, memory=args.memory_size)}
    if name in ("clone", "backprop"):
        rules = (cloned_backprop if name == "clone" else backprop)(args)
        if run.compiles and name == "clone":
            rules = [torch.compile(rule, dynamic=False) for rule in rules]
        return batch_learner(args, vsml(args) if name == "clone" else None, rules)
    if name not in META_TRAINED:
        deep = name.endswith("2")
        step = torch.compile(descend, dynamic=True) if deep and run.compiles else descend
        return online_sgd(args, "adam" in name, (args.sgd_hidden,) if deep else (), step)
    learner = vsml(args) if name == "vsml" else fixed[name](args, *sizes)
    if run.compiles and use == "backprop":
        few = len(args.dataset) * len(args.sizes or (0,)) * len(args.classes or (0,)) <= 4  # one compilation each
        learner = learner._replace(compiled=torch.compile(partial(one_example, learner), dynamic=False if few else None))
    elif run.compiles and use == "es" and name == "vsml":
        learner = vsml(args, fused_lstm_cell)
        learner = learner._replace(compiled=torch.compile(partial(one_example, learner), dynamic=False, options=fuse(args)))
    elif run.compiles and name == "vsml":
        learner = vsml(args, torch.compile(fused_lstm_cell, options=fuse(args)))  # one compilation fits all sizes
    return batched(learner) if name == "vsml" and use == "test" and args.test_batch > 1 else learner


def fuse(args: Args) -> dict[str, Any]:
    """What makes inductor write fused_lstm_cell's sums of n products out, with fused multiply-adds."""
    return {"unroll_reductions_threshold": args.state_size + 1, "cpp.enable_floating_point_contract_flag": "fast"}


def main() -> None:
    args, checkpoint = parse_args()
    if args.mode == "compare":
        return compare(args)
    check(args, int(os.environ.get("WORLD_SIZE", 1)))
    names = list(dict.fromkeys([args.learner, *args.baselines]))
    run = Run(args, checkpoint)
    tests = test_tasks(args, run.device)
    sizes = torch.zeros(2, dtype=torch.int64)  # numbers of inputs and outputs, for learners that cannot vary them
    if args.mode == "test":
        checkpoints.restore({"rnn_sizes": sizes}, checkpoint["state"])
    else:
        plain, augmented = train_tasks(args, run, augment=False), train_tasks(args, run, augment=True)
        sizes[0] = max(tasks.num_inputs for tasks in plain)
        sizes[1] = max(tasks.num_classes for tasks in plain)
    learners = {name: make_learner(name, args, run, sizes.tolist(), "test") for name in names}
    thetas = {name: learner.init(torch.Generator().manual_seed(args.seed)).to(run.device) for name, learner in learners.items()}
    trained = [name for name in names if name in META_TRAINED]
    if args.mode == "test":
        checkpoints.restore({"thetas": {name: thetas[name] for name in names if name != "backprop"}}, checkpoint["state"])
    elif args.init and not args.resume:
        first = checkpoints.read(Path(args.init), state=dict)["state"]
        checkpoints.restore({"thetas": {name: thetas[name] for name in trained}}, first)
    run.open_folder()

    started = time.time()
    if args.mode == "train":
        with torch.no_grad():
            for name in {"sgd", "adam", "sgd2", "adam2"} & set(names) if not args.resume else ():
                thetas[name] = search_rate(args, learners[name], plain[0])
        tasks = {name: augmented if name == "vsml" or args.augment_baselines else plain for name in trained}
        outer = {name: make_learner(name, args, run, sizes.tolist(), args.meta_optimizer) for name in trained}
        meta_train(args, outer, thetas, tasks, run, {"rnn_sizes": sizes})
    tested = time.time()
    if run.rank > 0:
        return  # meta-testing takes seconds, one process does it
    with torch.no_grad():
        rows, facts = meta_test(args, learners, thetas, tests, run)
    rates = {name: 10 ** theta.item() for name, theta in thetas.items() if learners[name].shapes.keys() == {"log_lr"}}
    seconds = {"meta_train": tested - started, "meta_test": time.time() - tested}
    run.finish(rows, seconds, thetas[args.learner].numel(), learning_rates=rates, **facts)


if __name__ == "__main__":
    run_as_script(main)
