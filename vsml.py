"""VSML: tiny LSTMs with shared weights replace the weights of a neural network and learn without
backpropagation.

Each weight (a, b) of a network becomes an LSTM of 16 units. All of them share the same 2,384
parameters theta; their states are what learns. Their inputs are x_a from below and the output error
e_b from above, and they answer with messages. Meta-learning finds theta. After that, running the
LSTMs forward is the learning algorithm, on any dataset of any size.

Kirsch, "Automating AI Research" (2025), chapter 3 and appendix B; Kirsch and Schmidhuber, "Meta
Learning Backpropagation And Improving It" (NeurIPS 2021). Results: .github/results/vsml.md.

    Eq. 3.1, 3.2   -> lstm_cell (LSTMs in place of vanilla RNNs, as section 3.3 proposes)
    Eq. 3.3 to 3.6 -> tests/test_vsml.py (the vanilla VSML RNN, Theorem B.1.1)
    Eq. 3.7, B.9   -> VSML.tick
    Algorithm 8    -> meta_train, around rollout and one_example
    Algorithm 13   -> rollout
    Section 3.3.2  -> common/cloning.py (learning-algorithm cloning)
    Appendix B.3.2 -> common/learners.py (baselines), rollouts.search_rate (the rate of gradient descent)

    python vsml.py                                     # meta-train, then learn unseen data
    python vsml.py --mode test --checkpoint pretrained --test-datasets mnist fashion_mnist
    python vsml.py --preset clone --dataset mnist      # the LSTMs learn to be backpropagation

    learner = vsml.VSML.load("pretrained", num_classes=3)
    learner.learn(x_train, y_train)                    # z-normalised arrays (t, a) and labels (t,)
    probabilities = learner.predict(x_test)

Axes: p members of a population, each with its own theta, s sequences in parallel, t time, a inputs,
b outputs, n hidden state, m message, k layer, q position of a kernel. A state has the shape
(p, s, a, b, n), a forward message (p, s, a, m), a backward message (p, s, b, m).
"""

import math
import os
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
from torch.utils._pytree import tree_map
from tqdm import tqdm

from common import cells, checkpoints, cloning, convolutions, es, kernels, machine, rollouts
from common.checkpoints import CheckpointError
from common.cloning import Backprop, Clone
from common.datasets import BUNDLED, GENERATED, DatasetError, Tasks, distinct, load
from common.figures import error_map, heat_maps, plot
from common.flags import Count, CountOrZero, FlagError, Positive, Real, Seed, Share, Side, Size, check_ranges, from_dict
from common.learners import (
    Classifier,
    FastWeightMemory,
    Hebbian,
    InContextRNN,
    Learner,
    OnlineSGD,
    Params,
    State,
    affine,
    bounded,
    descend,
    initial_weight,
    linear,
    pad,
)
from common.machine import can_compile, keep_memory, lock
from common.results import MetricsLog, overtaken, plotted_steps, result_row, table, to_json
from common.rng import fold, normal

# ======================================================================================================================
# Args
# ======================================================================================================================
Name = Literal[
    "vsml", "rnn", "hebbian", "fwmemory", "sgd", "adam", "sgd_1e-2", "adam_1e-3", "sgd2", "adam2", "clone", "backprop"
]


@dataclass
class Args:
    """VSML (chapter 3): meta-learn a learning algorithm, then watch it learn unseen datasets."""

    preset: Literal["auto", "thesis", "release", "laptop", "clone"] = "auto"
    """thesis: the thesis' numbers; release: the authors' where they differ; laptop: minutes on 2 cores; auto:
    thesis if there is a CUDA device, else laptop; clone: learning-algorithm cloning (section 3.3.2)."""
    seed: Seed = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors are."""
    compile: bool = True
    """Fuse the inner step with torch.compile (needs a C++ compiler on a CPU)."""
    triton: bool = False
    """es, one dense layer: rollouts by two Triton kernels in a CUDA graph (equal in tests; not yet timed)."""
    mode: Literal["train", "test"] = "train"
    """train: meta-train, then meta-test; test: only meta-test a --checkpoint."""
    checkpoint: str | None = None
    """The checkpoint.pt to meta-test, or "pretrained"."""
    resume: str | None = None
    """A run folder to continue in, exactly where the run stopped."""
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

    learner: Name = "vsml"
    """What learns at meta-test time. Meta-trained: vsml, rnn (in-context), hebbian (fast weights), fwmemory
    (fast-weight memory). sgd and adam (one layer), sgd2 and adam2 (two): at the best rate on the train split of
    each test dataset; sgd_1e-2, adam_1e-3: at the thesis' rates. For --preset clone: clone, and backprop."""
    baselines: tuple[Name, ...] = ("rnn", "sgd", "adam", "sgd_1e-2", "adam_1e-3")
    """Learners trained and tested beside the first one, on the same number of meta-steps."""

    dataset: tuple[str, ...] = ("mnist",)
    """Datasets to meta-train on: names, or files, my.npz with x_train y_train x_test y_test (section 3.4.2: mnist)."""
    init: str | None = None
    """Start meta-training from this checkpoint's parameters, of a network of any shape."""
    sizes: tuple[Side, ...] = ()
    """Sides of the meta-training images in pixels (default: as they are; section 3.4.3: 14 28 32)."""
    classes: tuple[Count, ...] = ()
    """Numbers of classes in meta-training tasks (default: all; section 3.4.3: 3 4 6 7)."""
    generated_size: Side = 28
    """Side of the images of random and sum_sign (the release)."""
    shots: CountOrZero = 0
    """Few-shot episodes: this many examples of each class, then one more (Figure B.9: 1); 0: none."""
    projected: Share = 0.0
    """Share of VSML's meta-training tasks with randomly projected inputs (section 3.4.2: none; 3.4.3, 3.4.4: all;
    the release, where it projects: half)."""
    permuted_labels: Share = 0.0
    """The same for permuted labels (for --augment-baselines: VSML treats all labels alike)."""
    blanked: Share = 0.0
    """VSML's meta-training tasks replace up to this share of their inputs by a constant (not in the thesis)."""
    augment_baselines: bool = False
    """The other learners see VSML's augmented tasks too (Figure B.6; no help, the thesis finds)."""
    sequence_length: Count = 500
    """Examples in a meta-training rollout (section 3.4.2)."""
    persistent: Count = 1
    """backprop: rollouts continue for this many meta-steps (1: never; appendix B.2.2, future work)."""
    persistent_share: Share = 1.0
    """backprop: share of the sequences that --persistent is for; the others start each meta-step."""
    meta_loss: Literal["mean", "last"] = "mean"
    """Mean cross-entropy of a rollout, or that of its last example (Figure B.9: last)."""

    hidden: tuple[Count, ...] = ()
    """Widths of hidden layers; none: one layer from inputs to outputs (section 3.4.2)."""
    conv: tuple[Count, ...] = ()
    """Channels of convolutional layers, kernel 3 and stride 2, below the others (Figure B.11: 8)."""
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
    logit_slot: CountOrZero = 0
    """The entry of the message that is read as a logit (section 3.3: the first; the release: 1)."""
    feed_label: bool = False
    """Feed the one-hot label beside the error, to VSML and the RNN (appendix B.2.2: Omniglot; the release: deep networks)."""
    backward_pass: bool = False
    """Let the layers tick in reverse order once the error is known (not the thesis; the release: convolutions,
    Omniglot)."""
    norm_messages: bool = False
    """Layer norm on the messages of each sub-RNN (not the thesis; the release, deep networks and backprop)."""
    state_init: Literal["normal", "half"] = "normal"
    """normal: all states standard normal (appendix B.3.2); half: half of c N(0, 1/a), all else zero (release: truncated)."""
    forget_bias: Real = 5.0
    """Added to the LSTM's forget gate (not in the thesis; the release)."""
    input_bias: Real = -5.0
    """Added to the LSTM's input gate (not in the thesis; the release)."""
    rnn_size: Count = 16
    """Units of the in-context RNN (appendix B.3.2; the release: 128)."""
    clone_rate: Positive = 0.5
    """clone: learning rate of the backpropagation that is imitated (not in the thesis)."""
    batch: Count = 64
    """clone: examples in a meta-test batch (appendix B.3.1)."""

    meta_optimizer: Literal["es", "backprop"] = "es"
    """Evolution strategies, or backpropagation through the rollout (Algorithm 8)."""
    meta_steps: Count = 10_000
    """Outer iterations (appendix B.3.2)."""
    population: Size = 1024
    """es: antithetic pairs in a generation (appendix B.3.2 has 1,024 members, the release 1,024 pairs)."""
    chunk: Count | None = None
    """es: pairs evaluated at a time, to bound memory (default: chosen for the device)."""
    noise_std: Positive = 0.05
    """es: standard deviation of the perturbations (appendix B.3.2)."""
    rank_shaping: bool = False
    """es: use the ranks of the losses instead of the losses (Salimans et al. 2017; not the thesis)."""
    es_lr: Positive = 0.025
    """es: Adam's learning rate (appendix B.3.2)."""
    sequences: Count = 128
    """backprop: sequences in a batch, as many of each dataset (not in the thesis; the release)."""
    block: Count = 25
    """backprop: examples between the states that are kept; the others are computed again, to bound memory."""
    backprop_lr: Positive = 1e-3
    """backprop: Adam's learning rate (not in the thesis; the release)."""
    rnn_lr: Positive | None = None
    """Adam's learning rate for the in-context RNN (default: VSML's)."""
    hebbian_lr: Positive | None = None
    """The same for Hebbian fast weights."""
    fwmemory_lr: Positive | None = None
    """The same for the fast-weight memory."""
    lr_decay: bool = False
    """Let the learning rates fall linearly to zero (not in the thesis)."""
    clip: Positive = 25.0
    """backprop: largest norm of the meta-gradient (not in the thesis; the release)."""

    test_datasets: tuple[str, ...] = ()
    """Datasets to meta-test on (default: --dataset, then digits wine breast_cancer random sum_sign)."""
    split: Literal["test", "validation"] = "test"
    """Splits to meta-test on. validation, a tenth of each train split, is for choices: meta-training never has it."""
    test_sizes: tuple[Side, ...] = ()
    """Sides of the meta-test images in pixels (default: as they are)."""
    test_classes: Count | None = None
    """Meta-test on this many classes of each dataset."""
    test_steps: Count = 2000
    """Examples in a meta-test rollout, at most once through a dataset (Figure 3.8); cloning: batches."""
    repeat_examples: bool = False
    """Let longer rollouts go through a dataset again (Figure B.10: 12,000 examples)."""
    test_seeds: Count = 128
    """Meta-test rollouts per dataset (Figure 3.6)."""
    robustness: bool = False
    """Meta-test on the six unseen configurations of Figure 3.7."""


LAPTOP = dict(
    dataset=("digits",),  # needs no download
    meta_optimizer="backprop",  # a gradient is worth more than the population that 2 cores can afford
    meta_steps=600,  # three minutes
    sequences=16,  # as many sub-RNNs as stay in the cache
    sequence_length=60,  # memory and time; the learner keeps learning for thousands of examples
    block=60,  # memory suffices
    persistent=20,  # 1,200 examples in pieces of 60: without, accuracy falls after some hundreds at 28 x 28
    persistent_share=0.5,  # the others keep the first examples fast (see the results page)
    sizes=(8,),  # VSML learns at any size afterwards, and a 28 x 28 image costs twelve times as much
    generated_size=8,  # likewise
    projected=0.5,  # the release, where it projects
    backprop_lr=2e-2,  # few steps
    rnn_lr=3e-2,  # the best on validation of six settings of rate and steps (see the results page)
    hebbian_lr=3e-2,  # of five
    fwmemory_lr=1e-2,  # of four
    lr_decay=True,  # settles what the high rates leave noisy
    clip=1.0,  # bounds what one batch can do
    forget_bias=3.0,  # +-5 are made for rollouts of 500 examples
    input_bias=-2.0,  # likewise
    logit_scale=30.0,  # four points after 100 digits (see the results page)
    feed_label=True,  # as the release does for deep networks
    state_init="half",  # the release; normal ones are within the spread of seeds (see the results page)
    permuted_labels=0.5,  # nothing to VSML, a fair chance to the RNN with --augment-baselines
    blanked=0.8,  # for images with an empty border (see the results page)
    population=64,  # for --meta-optimizer es: 0.2 s a step
    rank_shaping=True,  # es: raw losses leave 64 pairs on the plateau
    noise_std=0.1,  # es: likewise
    es_lr=0.03,  # es: likewise
    test_steps=1000,  # seconds
    test_seeds=32,  # likewise
)
# Further, deep networks: --feed-label --norm-messages --projected 0; convolutions: --backward-pass too; Omniglot:
# --feed-label --backward-pass --projected 0. The release's RNN has the label always, here with --feed-label.
RELEASE = dict(
    logit_slot=1,
    state_init="half",
    rnn_size=128,
    projected=0.5,  # its configuration rand_proj, for Figures 3.6 to 3.8
)
CLONE = dict(  # section 3.3.2; values without a source are ours, for appendix B.3.1 gives none
    learner="clone",
    baselines=("backprop",),
    dataset=("digits",),  # needs no download
    state_size=64,  # appendix B.3
    meta_optimizer="backprop",
    input_bias=0.0,
    forget_bias=8.0,  # a weight is kept for thousands of examples
    meta_steps=2000,
    backprop_lr=1e-2,
    lr_decay=True,
    clip=1.0,
    test_steps=700,  # as many as settle the curves
    test_seeds=1,  # 1,984 test examples each time
)
PRESETS = {"thesis": {}, "release": RELEASE, "laptop": LAPTOP, "clone": CLONE}


# ======================================================================================================================
# The learner
# ======================================================================================================================
class Layer(NamedTuple):
    """The state V_L of one layer of sub-RNNs, and its incoming messages."""

    h: Tensor  # (p, s, a, b, n) hidden states of the sub-LSTMs
    c: Tensor  # (p, s, a, b, n) their cells
    fwd_msg: Tensor  # (p, s, a, m) from the layer below
    bwd_msg: Tensor  # (p, s, b, m) from the layer above


class VSML(Learner):
    """Layers of sub-LSTMs that share theta, for any number of inputs and outputs."""

    def __init__(self, args: Args, cell: Callable | None = None):
        n, m = args.state_size, args.message_size
        self.args = args
        self.cell = cell or lstm_cell
        self.shapes = {"lstm.weight": (m + m + n, 4 * n), "lstm.bias": (4 * n,)}
        for name in ("fwd_msg", "bwd_msg"):
            self.shapes |= {name + ".weight": (n, m), name + ".bias": (m,)}

    def tick(
        self, params: Params, h: Tensor, c: Tensor, fwd_msg: Tensor, bwd_msg: Tensor, ticks: int
    ) -> tuple[Tensor, Tensor]:
        """s_ab <- f_RNN(s_ab, fwd_msg_a, bwd_msg_b) for all a, b of a layer (Eq. 3.7, B.9), some
        ticks on the same messages."""
        n, m = self.args.state_size, self.args.message_size
        fwd_weight, bwd_weight, recurrent = params["lstm.weight"].split([m, m, n], dim=1)
        from_a = affine(fwd_msg, fwd_weight, params["lstm.bias"])
        from_b = affine(bwd_msg, bwd_weight)
        for _ in range(ticks):
            h, c = self.cell(recurrent, from_a, from_b, h, c)
        return h, c

    def message(self, params: Params, name: str, h: Tensor, axis: int) -> Tensor:
        """The messages f_fwd or f_bwd of hidden states h (p, ..., n), averaged over an axis, not
        summed (appendix B.3). As f is linear, the mean may come first."""
        return linear(params, name, h.mean(axis))

    def update(self, params: Params, k: int, layer: Layer) -> tuple[Layer, Tensor, Tensor]:
        """Layer k after an example's ticks, and its messages to the layers above and below."""
        h, c = self.tick(params, *layer, self.args.micro_ticks)
        to_above = self.message(params, "fwd_msg", h, axis=-3)  # (p, s, b, m), the mean over a
        to_below = self.message(params, "bwd_msg", h, axis=-2)  # (p, s, a, m), the mean over b
        return Layer(h, c, layer.fwd_msg, layer.bwd_msg), to_above, to_below

    def predict(self, params: Params, layers: list[Layer], x: Tensor) -> tuple[list[Layer], Tensor]:
        """The layers 1, ..., K in sequence (the loop over layers of Algorithm 8)."""
        layers = list(layers)
        fwd_msg = pad(x[..., None], self.args.message_size)  # m_a1^(1) := x_a
        for k, (h, c, _, bwd_msg) in enumerate(layers):
            layers[k], fwd_msg, to_below = self.update(params, k, Layer(h, c, fwd_msg, bwd_msg))
            if k > 0:
                layers[k - 1] = with_bwd_msg(layers[k - 1], to_below)

        logits = self.args.logit_scale * fwd_msg[..., self.args.logit_slot]  # y_b := m_b1^(K+1)
        return layers, bounded(logits, self.args.logit_bound)

    def learn(self, params: Params, layers: list[Layer], error: Tensor, label: Tensor) -> list[Layer]:
        """The error is the message from above, m_b1^(K) := e_b. It arrives with the next tick."""
        top = torch.stack([error, label], -1) if self.args.feed_label else error[..., None]
        return [*layers[:-1], with_bwd_msg(layers[-1], pad(top, self.args.message_size))]

    def init(self, generator: torch.Generator) -> Tensor:
        """Truncated normals of std 1/sqrt(fan-in), zero biases, and the LSTM's long memory: slow to
        write and to forget."""
        theta = {name: initial_weight(shape, generator) for name, shape in self.shapes.items()}
        i, _, f, _ = theta["lstm.bias"].chunk(4)
        i += self.args.input_bias
        f += self.args.forget_bias
        return torch.cat([value.flatten() for value in theta.values()])

    def sizes_of_layers(self, num_inputs: int, num_outputs: int) -> list[tuple[int, int, int, int]]:
        """a, b, and the numbers of messages from below and from above, of the layers 1, ..., K."""
        sizes = pairwise((num_inputs, *self.args.hidden, num_outputs))
        return [(a, b, a, b) for a, b in sizes]

    def initial_state(self, keys: Tensor, num_inputs: int, num_outputs: int) -> list[Layer]:
        """Random states V_L. Their randomness lets sub-RNNs with the same inputs differ."""
        n, m = self.args.state_size, self.args.message_size
        layers = []
        for k, (a, b, from_below, from_above) in enumerate(self.sizes_of_layers(num_inputs, num_outputs)):
            shape = (*keys.shape[:2], 2, a, b, n)
            h, c = normal(fold(keys, k), math.prod(shape[2:])).view(shape).unbind(2)
            if self.args.state_init == "half":
                h = torch.zeros_like(h)
                c = pad(c[..., : n // 2] / math.sqrt(a), n)
            fwd_msg = h.new_zeros(*keys.shape[:2], from_below, m)
            bwd_msg = h.new_zeros(*keys.shape[:2], from_above, m)
            layers.append(Layer(h.contiguous(), c.contiguous(), fwd_msg, bwd_msg))
        return layers

    @staticmethod
    def load(checkpoint: str | Path = "pretrained", **options: Any) -> Classifier:
        """A trained VSML to be used from Python: see load_classifier for the options."""
        return load_classifier(checkpoint, **options)


def with_bwd_msg(layer: Layer, bwd_msg: Tensor) -> Layer:
    return Layer(layer.h, layer.c, layer.fwd_msg, bwd_msg)  # torch 2.11 cannot compile _replace


def lstm_cell(weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One tick of a x b LSTMs with shared weights and own states: Eq. 3.2 for an LSTM. Gates:
    input, cell, forget, output. common/cells.py has faster forms.

    weight (p, n, 4n); from_a (p, s, a, 4n) and from_b (p, s, b, 4n): the inputs of the gates that
    all LSTMs of a row or of a column share.
    """
    gates = from_a[..., :, None, :] + from_b[..., None, :, :] + affine(h, weight)
    i, j, f, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * j.tanh()
    return o.sigmoid() * c.tanh(), c


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
Metrics = tuple[Tensor, Tensor]  # of predictions: cross-entropies in nats, and whether they were correct


def one_example(learner: Learner, params: Params, state: State, x: Tensor, y: Tensor) -> tuple[State, *Metrics]:
    """Predict, then see the label and learn: the body of the inner loop of Algorithm 8. x (p, s, a),
    y (p, s) int64. Metrics are (p, s)."""
    state, logits = learner.predict(params, state, x)
    label = (y[..., None] == torch.arange(logits.shape[-1], device=y.device)).to(logits.dtype)
    error = logits.softmax(-1) - label  # e := gradient of the cross-entropy at the logits
    state = learner.learn(params, state, error, label)
    return state, -(logits.log_softmax(-1) * label).sum(-1), logits.argmax(-1) == y


def rollout(learner: Learner, theta: Tensor, state: State, x: Tensor, y: Tensor) -> tuple[State, *Metrics]:
    """Learn online, one example after the other (the inner loop of Algorithm 8, Algorithm 13).

    theta (p, d), x (p, s, t, a), y (p, s, t) int64. Returns the last state, and metrics (p, s, t) of
    the predictions, each made before its label was seen.
    """
    if learner.rollout_fn:
        return learner.rollout_fn(theta, state, x, y)
    step = learner.step or partial(one_example, learner)
    params = learner.params(theta)
    metrics = []
    for x_t, y_t in zip(x.unbind(2), y.unbind(2), strict=True):
        state, *metrics_t = step(params, state, x_t, y_t)
        metrics.append(metrics_t)
    return state, *(torch.stack(values, 2) for values in zip(*metrics, strict=True))


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
Gradient = tuple[Tensor, Tensor, Tensor]  # the meta-gradient (d,), mean loss, mean accuracy


def over_time(args: Args, values: Tensor) -> Tensor:
    """The mean of a rollout's values (..., t), or the last one (appendix B.3.2). Of losses, that is the
    meta-loss (Algorithm 8 has their sum, which is the same to Adam)."""
    return values[..., -1] if args.meta_loss == "last" else values.mean(-1)


def es_gradient(
    args: Args, learner: Learner, theta: Tensor, datasets: list[Tasks], step: int, memory: Any = None
) -> Gradient:
    """The meta-gradient by evolution strategies. Both members of an antithetic pair learn from the
    same initial states and examples."""
    chunk = chunk_size(args, datasets)
    kinds = iter(es.kinds_of_chunks(args.population, len(datasets), step, chunk))
    accuracy = []

    def evaluate(population: Tensor, pairs: Tensor) -> Tensor:
        tasks = datasets[next(kinds)]
        ids = step * args.population + pairs[: len(pairs) // 2]
        x, y = tasks.sample(ids, ids, tasks.episode or args.sequence_length)
        keys = tasks.keys(ids, 3).repeat(2, 1)[:, None]
        state = learner.initial_state(keys, tasks.num_inputs, tasks.num_classes)
        x, y = x.repeat(2, 1, 1)[:, None], y.repeat(2, 1)[:, None]  # p, s = 1, t
        _, losses, correct = rollout(learner, population, state, x, y)
        accuracy.append(over_time(args, correct.float()).mean())
        return over_time(args, losses).mean(1)

    settings = dict(pairs=args.population, sigma=args.noise_std, rank_shaping=args.rank_shaping)
    grad, losses = es.gradient(theta, evaluate, seed=args.seed, generation=step, chunk=chunk, **settings)
    return grad, losses.mean(), es.all_reduce_mean(torch.stack(accuracy).mean())


def backprop_gradient(
    args: Args, learner: Learner, theta: Tensor, datasets: list[Tasks], step: int, memory: list[dict]
) -> Gradient:
    """The meta-gradient by backpropagation through a batch of rollouts, of equal numbers from each
    dataset. memory: what each keeps from one meta-step to the next."""
    theta = theta.detach().requires_grad_()
    results = []
    sequences = args.sequences // len(datasets)
    for k, (tasks, kept) in enumerate(zip(datasets, memory, strict=True)):
        state, x, y = next_batch(args, learner, tasks, step, k * sequences, sequences, kept)
        learn = partial(rollout, learner, theta[None])
        state, losses, correct = rollouts.in_blocks(learn, state, x[None], y[None], args.block)
        if kept:
            kept["state"] = tree_map(lambda v: es.all_gather(v.detach(), axis=1), state)
        loss = over_time(args, losses).mean()
        (grad,) = torch.autograd.grad(loss, theta)
        accuracy = over_time(args, correct.float()).mean()
        results.append((grad, loss.detach(), accuracy))

    grad, loss, accuracy = (es.all_reduce_mean(torch.stack(values).mean(0)) for values in zip(*results, strict=True))
    return grad * (args.clip / grad.norm()).clamp(max=1), loss, accuracy


def meta_train(
    args: Args,
    learners: dict[str, Learner],
    thetas: dict[str, Tensor],
    datasets: dict[str, list[Tasks]],
    run: "Run",
    keep: dict[str, Any],
) -> None:
    """Algorithm 8, for learners side by side on the same budget. Changes thetas in place. keep:
    what else a checkpoint holds."""
    gradient = es_gradient if args.meta_optimizer == "es" else backprop_gradient
    rate = args.es_lr if args.meta_optimizer == "es" else args.backprop_lr
    own_rates = {"rnn": args.rnn_lr, "hebbian": args.hebbian_lr, "fwmemory": args.fwmemory_lr}
    rates = {name: own_rates.get(name) or rate for name in learners}
    adam = {name: torch.optim.Adam([thetas[name]], rates[name]) for name in learners}  # 0.9, 0.999
    memory = {name: new_memory(args, learners[name], datasets[name]) for name in learners}

    keep = {"thetas": thetas, "adam": adam, "memory": memory} | keep
    for step in run.steps(args.meta_steps if learners else 0, keep):
        decay = 1 - step / args.meta_steps if args.lr_decay else 1
        metrics = {}
        for name, learner in learners.items():
            estimate = cloning.gradient if name == "clone" else gradient
            grad, loss, accuracy = estimate(args, learner, thetas[name], datasets[name], step, memory[name])
            thetas[name].grad = grad
            adam[name].param_groups[0]["lr"] = rates[name] * decay
            adam[name].step()  # theta <- theta - alpha * the gradient of the rollout's loss
            metric = "explained" if name == "clone" else "accuracy"
            metrics |= {f"{name}_loss": loss, f"{name}_{metric}": accuracy}
        run.log(step, metrics)


# ======================================================================================================================
# Faster forms (tests compare them with the readable ones)
# ======================================================================================================================
def compile_step(args: Args, learner: Learner) -> None:
    """Compile one_example of a learner that is meta-trained, once for each shape, or once for all."""
    shapes = len(args.dataset) * len(args.sizes or (0,)) * len(args.classes or (0,))
    each = args.device == "cuda" or args.meta_optimizer == "es" or shapes <= 4
    fused = isinstance(learner, VSML) and args.device == "cpu"
    options = cells.options(args.state_size) if fused else None
    learner.step = torch.compile(partial(one_example, learner), dynamic=False if each else None, options=options)


def triton_rollout(learner: VSML, theta: Tensor, state: list[Layer], x: Tensor, y: Tensor) -> tuple[State, *Metrics]:
    """rollout of one dense layer for antithetic pairs, whose two members share x and y. The last state has
    the messages of the first one."""
    args, pairs, layer = learner.args, len(theta) // 2, state[0]
    options = {name: getattr(args, name) for name in ("micro_ticks", "logit_bound", "logit_scale", "logit_slot", "feed_label")}
    inputs = layer.h[:, 0], layer.c[:, 0], x[:pairs, 0], y[:pairs, 0]
    h, c, losses, correct = kernels.triton_rollout(learner.params(theta), *inputs, **options)
    return [Layer(h[:, None], c[:, None], *layer[2:])], losses[:, None], correct[:, None]


# ======================================================================================================================
# Which rollouts: datasets side by side, persistent states (appendix B.2.2, future work)
# ======================================================================================================================
def new_memory(args: Args, learner: Learner, datasets: list[Tasks]) -> list[dict[str, Any]]:
    """What is kept of each dataset from one meta-step to the next, before the first: states of rollouts
    (--persistent) or of networks (cloning)."""
    clone = isinstance(learner, Clone)
    persistent = args.persistent > 1 and args.meta_optimizer == "backprop"
    size = cloning.BUFFER if clone else args.sequences // len(datasets) * persistent
    memory = []
    for tasks in datasets if size else ():
        keys = tasks.keys(torch.arange(size, device=tasks.dataset.device), 3)
        keys = keys[:, None] if clone else keys[None]
        state = learner.initial_state(keys, tasks.num_inputs, tasks.num_classes)
        memory.append({"state": tree_map(Tensor.clone, state)})
    return memory or [{} for _ in datasets]


def chunk_size(args: Args, datasets: list[Tasks]) -> int:
    """How many pairs of evolution strategies to run at once."""
    limit = args.chunk or min(batch_size(args, tasks) for tasks in datasets) // 2
    return es.even_chunk(args.population, len(datasets), limit)


def next_batch(
    args: Args, learner: Learner, tasks: Tasks, step: int, first: int, sequences: int, memory: dict[str, Any]
) -> tuple[State, Tensor, Tensor]:
    """States, x (s, t, a) and y (s, t). A share of the sequences continues for --persistent meta-steps;
    they start again one after the other, so that early and late examples mix. first: of the sequences of
    all datasets, the index of this one's first."""
    ranks = es.share(sequences)
    slots = torch.arange(ranks.start, ranks.stop, device=tasks.dataset.device)
    persistent = torch.where(slots < args.persistent_share * sequences, args.persistent, 1)
    age = ((step + slots) % persistent).clamp(max=step)  # in meta-steps
    ids = (step - age) * args.sequences + first + slots
    length = tasks.episode or args.sequence_length
    x, y = tasks.sample(ids, ids, length, start=age[:, None] * length)

    def initial_where_new(new: Tensor, old: Tensor) -> Tensor:
        return torch.where((age == 0).view(1, -1, *(1,) * (new.ndim - 2)), new, old[:, slots])

    state = rollouts.initial_states(learner, tasks, ids)
    if memory:
        state = tree_map(initial_where_new, state, memory["state"])
    return tree_map(Tensor.requires_grad_, state), x, y  # always, so that one compilation does


# ======================================================================================================================
# Deep networks: what the release adds, and convolutions (appendix B.2.2)
# ======================================================================================================================
class DeepVSML(VSML):
    """VSML with a layer norm on messages, a backward pass and convolutional layers below the dense ones,
    each where its flag is on. common/convolutions.py has the geometry."""

    def __init__(self, args: Args, cell: Callable | None = None):
        super().__init__(args, cell)
        for name in ("fwd_msg", "bwd_msg") if args.norm_messages else ():
            self.shapes |= {name + ".scale": (args.message_size,), name + ".offset": (args.message_size,)}

    def message(self, params: Params, name: str, h: Tensor, axis: int) -> Tensor:
        """The norm is that of each sub-RNN's message; its scale starts at 1."""
        if not self.args.norm_messages:
            return super().message(params, name, h, axis)
        msg = linear(params, name, h)
        shape = (len(h), *(1,) * (h.ndim - 2), -1)
        scale, offset = (params[name + part].view(shape) for part in (".scale", ".offset"))
        return ((1 + scale) * F.layer_norm(msg, msg.shape[-1:]) + offset).mean(axis)

    def learn(self, params: Params, layers: list[Layer], error: Tensor, label: Tensor) -> list[Layer]:
        """With a backward pass, the layers K, ..., 1 tick, so that the error reaches them before the next
        example."""
        layers = super().learn(params, layers, error, label)
        if not self.args.backward_pass:
            return layers
        for k in reversed(range(len(layers))):
            layer, _, to_below = self.update(params, k, layers[k])
            layers[k] = layer
            if k > 0:
                layers[k - 1] = with_bwd_msg(layers[k - 1], to_below)
        layers[-1] = with_bwd_msg(layers[-1], torch.zeros_like(layers[-1].bwd_msg))
        return layers

    def fit(self, tasks: Tasks) -> Tasks:
        if self.args.conv and not tasks.dataset.square:
            raise DatasetError(f"convolutions need square images, and '{tasks.dataset.name}' has none.")
        return tasks

    def sizes_of_layers(self, num_inputs: int, num_outputs: int) -> list[tuple[int, int, int, int]]:
        """Convolutions need square images of one or three channels. Raises ValueError for others."""
        convs = convolutions.layers(num_inputs, self.args.conv)
        sizes = [(conv.a, conv.b, conv.num_inputs, conv.num_outputs) for conv in convs]
        below = convs[-1].num_outputs if convs else num_inputs
        return sizes + super().sizes_of_layers(below, num_outputs)

    def update(self, params: Params, k: int, layer: Layer) -> tuple[Layer, Tensor, Tensor]:
        """A convolutional layer ticks at all positions q of the image, on another patch at each, and keeps
        the mean of the states (the release's choice)."""
        if k >= len(self.args.conv):
            return super().update(params, k, layer)
        h, c, fwd_msg, bwd_msg = layer
        a, b = h.shape[2:4]
        conv = convolutions.Conv(a, b, math.isqrt(fwd_msg.shape[2] // (a // 9)))
        patches = conv.patches(fwd_msg)
        above = bwd_msg.unflatten(2, (b, conv.positions)).transpose(2, 3)
        for _ in range(self.args.micro_ticks):
            at_q, c_at_q = self.tick(params, h[:, :, None], c[:, :, None], patches, above, ticks=1)
            h, c = at_q.mean(2), c_at_q.mean(2)
        to_above = self.message(params, "fwd_msg", at_q, axis=-3).transpose(2, 3).flatten(2, 3)
        to_below = conv.pixels(self.message(params, "bwd_msg", at_q, axis=-2))
        return Layer(h, c, fwd_msg, bwd_msg), to_above, to_below


def make_vsml(args: Args, cell: Callable | None = None) -> VSML:
    deep = args.conv or args.backward_pass or args.norm_messages
    return (DeepVSML if deep else VSML)(args, cell)


# ======================================================================================================================
# Meta-test and figures
# ======================================================================================================================
LABELS = {"vsml": "VSML", "rnn": "in-context RNN", "hebbian": "Hebbian fast weights"}
LABELS |= {"fwmemory": "fast-weight memory", "sgd": "online SGD", "adam": "online Adam"}
LABELS |= {"sgd_1e-2": "online SGD, rate 1e-2", "adam_1e-3": "online Adam, rate 1e-3"}
LABELS |= {"sgd2": "SGD, 2 layers", "adam2": "Adam, 2 layers"}
LABELS |= {"clone": "VSML, cloned backpropagation", "backprop": "SGD in batches"}


def curve(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, size: int) -> tuple[Tensor, Tensor]:
    """Whether each prediction on unseen examples was correct (seeds, t), and its cross-entropy. Each
    seed starts from its own random state. At most one pass through the data, or more with
    --repeat-examples. size: the rollouts in parallel."""
    steps = tasks.episode or args.test_steps
    if not args.repeat_examples:
        steps = min(steps, tasks.one_pass)
    parts = []
    for ids in tasks.test_ids(args.test_seeds).split(size):
        state = rollouts.initial_states(learner, tasks, ids)
        blocks = []
        for start in range(0, steps, 1000):  # memory does not grow with the examples
            x, y = tasks.sample(ids, ids, min(1000, steps - start), start)
            state, *block = rollout(learner, theta[None], state, x[None], y[None])
            blocks.append(block)
        parts.append([torch.cat(kind, -1)[0] for kind in zip(*blocks, strict=True)])
    losses, correct = (torch.cat(kind) for kind in zip(*parts, strict=True))
    return correct.float(), losses


Curves = dict[str, dict[int, Tensor]]  # name of a metric -> step -> values (seeds,)
Rows = list[dict[str, Any]]  # of results.json


def online_curves(args: Args, learner: Learner, theta: Tensor, tasks: Tasks, size: int) -> Curves:
    """After each example. Few-shot episodes have no cumulative accuracy: their shots are no predictions."""
    correct, losses = curve(args, learner, theta, tasks, size)
    cumulative = correct.cumsum(1) / torch.arange(1, correct.shape[1] + 1, device=correct.device)
    curves = {} if tasks.episode else {"cumulative_accuracy": cumulative}
    curves |= {"accuracy": correct, "cross_entropy": losses}
    return {name: dict(enumerate(values.unbind(1), 1)) for name, values in curves.items()}


def meta_test(
    args: Args, learners: dict[str, Learner], thetas: dict[str, Tensor], tests: dict[str, dict[str, Tasks]], run: "Run"
) -> tuple[Rows, dict[str, Any]]:
    """All learners on all datasets that fit them: result rows, further facts, and figures."""
    rows, curves, facts = [], [], {"learning_rates": {}}
    pairs = [(task, name) for task, fitted in tests.items() for name in fitted]
    for task, name in tqdm(pairs, desc="meta-test", disable=run.rank > 0):
        measure = partial(measured, args, name, learners[name], thetas[name], tests[task][name], task)
        some, points, rate = run.once(f"{task}, {name}", measure)
        rows += some
        curves += points
        if rate is not None:
            facts["learning_rates"].setdefault(task, {})[name] = 10**rate

    metric, xlabel = rows[0]["metric"], "batches seen" if args.learner == "clone" else "examples seen"
    axes = {"xlabel": xlabel, "ylabel": metric.replace("_", " "), "ylim": (0, 1.02)}
    plot(curves, run.folder / f"{metric}.png", labels=LABELS, columns=3, **axes)
    if args.learner == "clone":
        x, w, y, target = cloning.cloned_tanh(Clone(VSML(args)), thetas["clone"])
        error_map(x, w, y, target, run.folder / "error_map.png", title="y = tanh(x) w")
        facts["error"] = (y - target).abs().mean().item()
    elif args.learner != "backprop" and not args.shots:
        facts["overtaken"] = {task: overtaken(args.learner, [row for row in curves if row["task"] == task]) for task in tests}
        for task, steps in facts["overtaken"].items():
            for name, step in steps.items():
                run.info(f"{task}: {LABELS[name]} overtakes {LABELS[args.learner]} after {step} examples.")
        shown = [name for name in (args.learner, "sgd", "adam") if name in learners]
        complete = (of for of in tests.values() if all(name in of for name in shown) and has_pairs(of[args.learner]))
        if first := next(complete, None):
            path = run.folder / "introspection.png"
            facts["repeats"] = introspect(path, args, {name: learners[name] for name in shown}, thetas, first)
    return rows, facts


def measured(
    args: Args, name: str, learner: Learner, theta: Tensor, tasks: Tasks, task: str
) -> tuple[Rows, Rows, float | None]:
    """Result rows of one learner on one dataset at plotted_steps, rows of the first metric at all steps,
    and log10 of the learning rate of a learner that has one."""
    rate = None
    if isinstance(learner, Backprop):
        train = tasks.reload(split="train")
        curves = cloning.batch_curves(learner, theta, tasks, train, plotted_steps(args.test_steps))
    else:
        if isinstance(learner, OnlineSGD):
            if name not in FIXED_RATE:
                train = tasks.reload(split="train")
                theta = rollouts.search_rate(learner, train, args.test_steps, last=args.meta_loss == "last")
            rate = theta.item()
        curves = online_curves(args, learner, theta, tasks, batch_size(args, tasks, name))
    trained_on = map(os.path.normpath, args.dataset)
    novelty = "task" if os.path.normpath(tasks.dataset.source["name"]) in trained_on else "domain"

    row = partial(result_row, name, task, novelty)
    rows = []
    for metric, points in curves.items():
        rows += [row(metric, step, points[step]) for step in plotted_steps(max(points)) if step in points]
    first = next(iter(curves))
    return rows, [row(first, step, values) for step, values in curves[first].items()], rate


def test_tasks(args: Args, device: torch.device) -> dict[str, Tasks]:
    """--split of all test datasets at all sizes, by the name that results give them; with --robustness,
    those of images in the configurations of Figure 3.7."""
    tests = {}
    names = distinct(args.test_datasets or args.dataset + BUNDLED + GENERATED)
    for name, size in product(names, args.test_sizes or (None,)):
        side = size or (args.generated_size if name in GENERATED else None)
        dataset = load(name, args.split, args.data_dir, device, side)
        images = len(dataset.shape) == 3
        task = f"{dataset.name}@{size}" if size and images else dataset.name
        tests[task] = plain = Tasks(dataset, classes=args.test_classes, shots=args.shots, seed=args.seed)
        if args.shots and not {args.learner, *args.baselines} <= {*META_TRAINED, *FIXED_RATE}:
            plain.reload(split="train")  # refuses one that is too small for the search of rates
        if args.robustness and images and len(dataset):
            tests[f"{task} 5 classes"] = replace(plain, classes=min(5, dataset.num_classes))
            tests |= {f"{task} at {size} x {size}": replace(plain, dataset=dataset.resize(size)) for size in (21, 48)}
            tests[f"{task} projected"] = replace(plain, projected=1.0)
            tests[f"{task} permuted"] = replace(plain, permuted_inputs=1.0)
    return tests


def fitting_tests(learners: dict[str, Learner], tests: dict[str, Tasks], run: "Run") -> dict[str, dict[str, Tasks]]:
    """The tests of each dataset by the learners that they fit."""
    fitted = {task: {} for task in tests}
    for task, name in product(tests, learners):
        try:
            fitted[task][name] = learners[name].fit(tests[task])
        except DatasetError as error:
            run.info(f"{name} is left out on {task}: {error}")
    if not any(fitted.values()):
        raise UserError("No learner fits any of the test datasets; choose other --test-datasets.")
    return fitted


def has_pairs(tasks: Tasks) -> bool:
    """Whether there are two stored examples of each class, also in the train split, where a rate is searched."""
    splits = (tasks.dataset, tasks.dataset.reload(split="train"))
    return all(len(data) > 0 and bool(data.counts.min() >= 2) for data in splits)


def introspect(
    path: Path, args: Args, learners: dict[str, Learner], thetas: dict[str, Tensor], tests: dict[str, Tasks]
) -> dict[str, float]:
    """Figures 3.9 and B.8: two unseen examples of each class, one after the other, then a hundred random
    ones. Returns the share of second examples that are predicted correctly, over at most --test-seeds
    rollouts. Gradient descent has the rate that is best at that on the train split."""
    repeats, panels = {}, {}
    for name, learner in learners.items():
        theta = thetas[name]
        if isinstance(learner, OnlineSGD):
            theta = rollouts.best_at_repeats(learner, tests[name].reload(split="train"), args.test_seeds)
        repeats[name] = rollouts.second_correct(learner, tests[name], args.test_seeds, theta[None]).item()
        panels[LABELS[name]] = rollouts.twice_and_many(learner, tests[name], theta)
    heat_maps(panels, path, {"each class twice": 1, "random examples": 4})
    return repeats


# ======================================================================================================================
# Use it
# ======================================================================================================================
def load_classifier(
    checkpoint: str | Path = "pretrained", num_classes: int | None = None, seed: int = 0, device: torch.device | str = "cpu"
) -> Classifier:
    """See common.learners.Classifier. checkpoint: "pretrained", or a checkpoint.pt of this script. Raises
    CheckpointError or UserError for what is no checkpoint of a VSML learner."""
    saved = checkpoints.read(checkpoints.named(checkpoint, METHOD), method=str, args=dict, state=dict)
    try:
        learner = make_vsml(from_dict(Args, saved["args"])) if saved["method"] == METHOD else None
    except TypeError:
        learner = None
    if learner is None:
        raise UserError(f"{checkpoint} is not a checkpoint of this {METHOD}.py.")
    theta = learner.init(torch.Generator())
    checkpoints.restore({"thetas": {"vsml": theta}}, saved["state"], checkpoint)
    return Classifier(learner, theta.to(device), num_classes, seed)


# ======================================================================================================================
# The run
# ======================================================================================================================
METHOD = "vsml"  # in checkpoints and results; a renamed copy of this file reads them too
USER_ERRORS = (CheckpointError, DatasetError, FlagError)
NAMED_AFTER = ("dataset", "learner")  # the flags that name a run's folder
KEPT = ("preset", "dataset")  # the flags that a meta-test cannot change


# ---- the same text in all six scripts: begin -----------------------------------------------------------------------
class UserError(Exception):
    """A user's mistake; the message is one sentence with what to do."""


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
        path = Path(path, "checkpoint.pt") if typed.resume else checkpoints.named(path, METHOD)
        checkpoint = checkpoints.read(path, method=str, args=dict, step=int, state=dict, rng=list)
        base = checkpoint["args"] | {"mode": typed.mode, "resume": typed.resume}
        base |= {} if typed.resume else {"run_name": None, "run_dir": typed.run_dir}
        if checkpoint["method"] != METHOD:
            raise UserError(f"{path} is a checkpoint of {checkpoint['method']}.py, not of {METHOD}.py.")
    try:
        base = from_dict(Args, base | {"device": device})
    except TypeError as error:
        raise UserError(f"{path} was written by another version of {METHOD}.py.") from error
    args = replace(tyro.cli(Args, default=base), device=device, preset=(base if typed.preset == "auto" else typed).preset)

    free = {"data_dir", "compile", "track", "run_dir", "triton", "graphs", "chunk"} - {*KEPT}
    changed = [flag for flag in vars(args) if flag not in free and getattr(args, flag) != getattr(base, flag)]
    if kept := [flag for flag in changed if args.resume or (args.mode == "test" and flag in KEPT)]:
        raise UserError(f"A resumed or tested run keeps its flags; leave out --{kept[0].replace('_', '-')}.")
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
        if self.compiles:
            torch._dynamo.config.recompile_limit = 64  # of one function: for each dataset, environment or size once
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
        tested = args.checkpoint and os.path.getmtime(checkpoints.named(args.checkpoint, METHOD))
        key = f"{asdict(replace(args, resume=None))} {tested}"
        cache = checkpoints.read_cache(path, of=str)
        self.cache = cache if cache.get("of") == key else {"of": key}

    def write_first(self, folder: Path) -> None:
        """args.json and empty logs of a new run, or the logs of a resumed one up to its checkpoint."""
        files = {path.name for path in folder.iterdir() if path.suffix != ".partial"}
        if "results.json" in files:
            raise UserError(f"{folder} holds a finished run, which cannot be made longer; test it, or choose another --run-name.")
        if not self.args.resume and ("checkpoint.pt" in files or (files and "args.json" not in files)):
            raise UserError(f"{folder} holds a run that was stopped; --resume it, or choose another --run-name.")
        if not self.args.resume:
            checkpoints.write(folder / "args.json", to_json(asdict(self.args)))
        self.metrics = MetricsLog(folder, self.first, asdict(self.args) if self.args.track else None)
        self.info(f"{METHOD}: preset {self.args.preset}, device {self.args.device}, run folder {folder}")

    def steps(self, total: int, keep: dict[str, Any]) -> Iterator[int]:
        """The meta-steps to do. Restores `keep`, tensors and what has a state_dict, and saves it at intervals."""
        if self.first > total:
            raise UserError(f"The checkpoint has {self.first} meta-steps, more than the {total} of this run.")
        if self.args.resume:
            checkpoints.restore(keep, self.checkpoint["state"], self.folder / "checkpoint.pt")
            checkpoints.set_rng_state(self.checkpoint["rng"], self.folder / "checkpoint.pt")
        else:
            self.save(0, keep)
        self.bar = tqdm(range(self.first, total), "meta-train", initial=self.first, total=total, disable=self.rank > 0)
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
        kept = self.cache.get(part)
        if not (isinstance(kept, tuple) and len(kept) == 2 and isinstance(kept[1], list)):
            self.cache[part] = measure(), checkpoints.rng_state()
            if self.rank == 0:
                checkpoints.write(self.folder / "meta_test.pt", self.cache)
        value, rng = self.cache[part]
        checkpoints.set_rng_state(rng, self.folder / "meta_test.pt")
        return value

    def finish(self, rows: list[dict[str, Any]], tested: float, parameters: int, **more: Any) -> None:
        """Write results.json, and print its first and last rows. For rank 0. tested: when the meta-test began."""
        seconds = {"meta_train": tested - self.metrics.started, "meta_test": time.time() - tested}
        facts = {"script": METHOD, "preset": self.args.preset, "args": asdict(self.args), "seconds": seconds}
        facts |= machine.facts(self.device) | {"parameters": parameters} | more
        checkpoints.write(self.folder / "results.json", to_json(facts | {"results": rows}))
        (self.folder / "meta_test.pt").unlink(missing_ok=True)
        self.metrics.board.close()
        self.info("\n".join(["", *table(rows), ""]))
        self.info(f"Written to {self.folder}: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


# ---- the same text in all six scripts: end -------------------------------------------------------------------------
HIDDEN = 160  # units of sgd2 and adam2 (appendix B.3.2)
META_TRAINED = ("vsml", "rnn", "hebbian", "fwmemory", "clone")  # the others have at most a rate
FIXED_RATE = ("sgd_1e-2", "adam_1e-3")


def check(args: Args, world: int) -> None:
    """Refuse what cannot work, before anything is written."""
    names = {args.learner, *args.baselines}
    if not args.dataset:
        raise UserError("--dataset needs at least one dataset.")
    if (args.preset == "clone") != (args.learner == "clone") or "clone" in args.baselines:
        raise UserError("Cloning has settings of its own: use --preset clone, with --hidden 32 for a deep network.")
    if names - {"clone", "backprop"} and names & {"clone", "backprop"}:
        raise UserError("clone and backprop learn from batches, the others do not; test them apart.")
    if args.learner == "clone" and (args.state_size < 2 or args.meta_optimizer == "es"):
        raise UserError("Cloning needs --state-size 2 or more and --meta-optimizer backprop.")
    if args.learner == "clone" and (args.conv or args.norm_messages or args.backward_pass or args.feed_label):
        raise UserError("Cloning has no --conv, --norm-messages, --backward-pass and --feed-label.")
    if args.learner == "clone" and (world > 1 or len(args.dataset) * max(1, len(args.sizes)) * max(1, len(args.classes)) > 1):
        raise UserError("Cloning runs in one process, without torchrun, and on one dataset.")
    plain = args.meta_optimizer == "es" and not (args.hidden or args.conv or args.backward_pass or args.norm_messages)
    if args.triton and (args.device != "cuda" or not plain or not find_spec("triton")):
        raise UserError("--triton needs a GPU, Triton and --meta-optimizer es, for one dense layer as in section 3.4.2.")
    if args.message_size <= max(args.logit_slot, args.feed_label):
        raise UserError(f"--message-size {args.message_size} is too small for --logit-slot and the label.")
    members, of, flag = args.population, world, "population"
    if args.meta_optimizer == "backprop":
        datasets = len(args.dataset) * max(1, len(args.sizes)) * max(1, len(args.classes))
        members, of, flag = args.sequences // datasets, world * datasets, "sequences"
    if not members or members % world:
        raise UserError(f"--{flag} cannot be shared by {world} processes and all datasets; choose a multiple of {of}.")


def batch_size(args: Args, tasks: Tasks, name: str = "vsml") -> int:
    """How many rollouts to run at once: their states should stay in a CPU's cache, or use a GPU's
    memory well."""
    a, b = tasks.num_inputs, tasks.num_classes
    numbers = {"fwmemory": 16**3, "sgd2": HIDDEN * (a + b), "adam2": HIDDEN * (a + b)}.get(name, a * b)
    if name == "vsml":
        sizes = make_vsml(args).sizes_of_layers(a, b)
        numbers = args.state_size * sum(inputs * outputs for inputs, _, _, outputs in sizes)
    return max(1, (2**18 if args.device == "cpu" else 2**26) // numbers)


def train_tasks(args: Args, run: Run) -> list[Tasks]:
    """What is meta-trained on: the train splits of the datasets, at all sizes, with all numbers of
    classes."""
    tasks = []
    for name, size in product(args.dataset, args.sizes or (None,)):
        size = size or (args.generated_size if name in GENERATED else None)
        plain = Tasks(load(name, "train", args.data_dir, run.device, size), shots=args.shots, seed=args.seed)
        tasks += [replace(plain, classes=classes) for classes in args.classes or (None,)]
    return tasks


def make_learner(name: str, args: Args, run: Run, sizes: tuple[int, int], use: str) -> Learner:
    """A learner by its name, compiled for its use, "train" or "test". sizes: numbers of inputs and
    outputs, for those that cannot vary them."""
    if name == "rnn":
        learner = InContextRNN(*sizes, args.logit_bound, args.rnn_size, args.micro_ticks, args.feed_label)
    elif name == "hebbian":
        learner = Hebbian(*sizes, args.logit_bound)
    elif name == "fwmemory":
        learner = FastWeightMemory(*sizes, args.logit_bound, feed_label=True)  # as in the release
    elif name in ("clone", "backprop"):
        learner = Clone(VSML(args)) if name == "clone" else Backprop(args)
        if name == "clone" and run.compiles:
            learner.forward_part = torch.compile(learner.forward_part, dynamic=False)
            learner.backward_part = torch.compile(learner.backward_part, dynamic=False)
    elif name == "vsml":
        form = args.device, args.meta_optimizer if use == "train" else "test", args.state_size, bool(args.conv)
        learner = make_vsml(args, cells.fastest(*form) if run.compiles else None)
    else:
        deep = name in ("sgd2", "adam2")
        step = torch.compile(descend, dynamic=True) if deep and run.compiles else descend
        learner = OnlineSGD("adam" in name, (HIDDEN,) if deep else (), step)
    if args.triton and use == "train" and name == "vsml":
        learner.rollout_fn = partial(triton_rollout, learner)
    elif run.compiles and use == "train" and (name == "vsml" or args.device == "cuda"):
        compile_step(args, learner)  # compiling the others takes a CPU longer than it gains
    return learner


def main() -> None:
    args, checkpoint = parse_args()
    check(args, int(os.environ.get("WORLD_SIZE", 1)))
    names = list(dict.fromkeys([args.learner, *args.baselines]))
    trained = [name for name in names if name in META_TRAINED]
    run = Run(args, checkpoint)
    tests = test_tasks(args, run.device)
    datasets = train_tasks(args, run) if args.mode == "train" else []
    sizes = torch.zeros(2, dtype=torch.int64)  # numbers of inputs and outputs, where they are fixed
    if args.mode == "test":
        checkpoints.restore({"rnn_sizes": sizes}, checkpoint["state"], args.checkpoint)
    else:
        sizes[0] = max(tasks.num_inputs for tasks in datasets)
        sizes[1] = max(tasks.num_classes for tasks in [*datasets, *tests.values()])

    make = partial(make_learner, args=args, run=run, sizes=sizes.clamp(min=1).tolist())
    learners = {name: make(name, use="test") for name in names}
    thetas = {
        name: learner.init(torch.Generator().manual_seed(args.seed)).to(run.device)
        for name, learner in learners.items()
    }
    to_train = {"thetas": {name: thetas[name] for name in trained}}
    if args.mode == "test":
        checkpoints.restore(to_train, checkpoint["state"], args.checkpoint)
    elif args.init and not args.resume:
        checkpoints.restore(to_train, checkpoints.read(checkpoints.named(args.init, METHOD), state=dict)["state"], args.init)
    train = {name: [learners[name].fit(tasks) for tasks in datasets] for name in trained}
    tests = fitting_tests(learners, tests, run)
    run.open_folder()

    if args.mode == "train":
        augment = dict(projected=args.projected, permuted_labels=args.permuted_labels, blanked=args.blanked)
        for name in trained:
            if name == "vsml" or args.augment_baselines:
                train[name] = [replace(tasks, **augment) for tasks in train[name]]
        outer = {name: make(name, use="train") for name in trained}
        meta_train(args, outer, to_train["thetas"], train, run, {"rnn_sizes": sizes})
    tested = time.time()
    if run.rank > 0:
        return  # one process does the meta-test
    with torch.no_grad():
        rows, facts = meta_test(args, learners, thetas, tests, run)
    run.finish(rows, tested, thetas[args.learner].numel(), **facts)


if __name__ == "__main__":
    machine.run_as_script(main, f"{METHOD}.py", (UserError, *USER_ERRORS))
