"""GPICL: a Transformer becomes a general-purpose in-context learner.

A plain Transformer reads a dataset, one example and the label of the one before per token, and predicts each label before it
sees it. Meta-trained on many random projections and label permutations of one dataset, it stops memorising them and learns
to learn: at meta-test time it learns datasets that it never saw, in its activations, without a gradient.

Kirsch, "Automating AI Research" (2025), chapter 5 and appendix D; Kirsch, Harrison, Sohl-Dickstein and Metz,
"General-Purpose In-Context Learning by Meta-Learning Transformers" (2022). Results: .github/results/gpicl.md.

    Eq. 5.1        -> InContextLearner.predict
    Eq. 5.2        -> rollout, meta_loss
    Algorithm 9    -> train_tasks (the task distribution), meta_train (the loop)
    Section 5.4.2  -> state_size
    Section 5.4.3  -> train_tasks (bias), SignOfAverage, plateau_end
    Section 5.4.4  -> embed, common/features.py (features of pre-trained networks)
    Appendix D.4   -> common/incontext.py (LSTMs, VSML without and with symmetries)
    Appendix D.5   -> common/incontext.py (online SGD and Adam, MAML), search_rates

    python gpicl.py                                          # meta-train on digits, meta-test on unseen data: 4 minutes
    python gpicl.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-datasets mnist fashion_mnist
    python tests/reproduce.py G4                             # the phases of Figure 5.4

    learner = gpicl.InContextLearner.load("pretrained", num_classes=3)
    learner.learn(x_train, y_train)                          # z-normalised arrays (t, a) and labels (t,)
    probabilities = learner.predict(x_test)

Axes, everywhere: s sequences in parallel, t time (examples), a inputs, c classes, h heads, n width or hidden state, m message.
Inputs x have shape (s, t, a), labels y (s, t), logits (s, t, c).
"""

import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoints, es, graphs, incontext, kernels, machine
from common.checkpoints import CheckpointError
from common.datasets import BUNDLED, FIRST_ID, GENERATED, MAKERS, Dataset, DatasetError, Tasks, distinct, load
from common.features import FeatureError, Network, pretrained, trained
from common.figures import plot, pyplot, save
from common.flags import Count, FlagError, Positive, PositiveOrZero, Real, Seed, Share, Side, check_ranges, from_dict
from common.learners import Classifier, Learner, Params, pad
from common.machine import can_compile, keep_memory, lock
from common.optimizers import SignOfAverage, Statistics
from common.results import MetricsLog, plotted_steps, read_metrics, result_row, table, to_json
from common.rng import compile_draws, integers, key

# ======================================================================================================================
# Args
# ======================================================================================================================
FIXED = ("sgd", "adam", "untrained", *incontext.FITTED)  # not meta-trained
Name = Literal[
    "transformer", "lstm", "outer_lstm", "vsml", "vsml_nosym", "mlp", "maml", "sgd", "adam", "untrained",
    "logistic", "neighbors", "forest",
]  # fmt: skip
Size = Annotated[int, (1, 2**12)]  # of a network or one of its parts
Length = Annotated[int, (1, 2**16)]  # of a sequence, in examples


@dataclass
class Args:
    """GPICL (chapter 5): meta-train a Transformer on many tasks, then watch it learn unseen datasets in context."""

    preset: Literal["auto", "thesis", "laptop"] = "auto"
    """thesis: the thesis' numbers; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device, else laptop."""
    seed: Seed = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors are."""
    compile: bool = True
    """Fuse the meta-step with torch.compile (needs a C++ compiler on a CPU)."""
    triton: bool = False
    """Random projections by a Triton kernel that never stores them (equal in tests; not yet timed)."""
    graphs: bool = False
    """Sampling, and forward and backward pass, as CUDA graphs (equal in tests; not yet timed)."""
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
    """Where torchvision's datasets are, or are downloaded to, and where features are kept."""
    track: bool = False
    """Log to Weights & Biases too (pip install "cleanmeta[track]")."""
    checkpoint_every: Count = 1000
    """Meta-steps between checkpoints."""
    log_every: Count = 50
    """Meta-steps between lines of metrics.csv, each with the mean loss since the last one."""
    statistics: bool = False
    """Log norms and cosines of gradients and updates for each tensor, and draw them (Figures D.8 to D.10)."""

    learner: Name = "transformer"
    """What learns at meta-test time. Meta-trained: transformer, lstm, outer_lstm (LSTM with outer-product state), vsml,
    vsml_nosym (VSML without symmetries), mlp (no memory at all), maml (an initialisation). With nothing but tuned settings:
    sgd, adam. untrained: the transformer before meta-training. As baselines, fitted by scikit-learn (not in the thesis) to
    inputs without a projection: logistic (regression), neighbors (five nearest), forest (of a hundred trees)."""
    baselines: tuple[Name, ...] = ("sgd", "adam", "untrained")
    """Learners trained and tested beside the first one, on the same budget of meta-steps."""

    dataset: tuple[str, ...] = ("mnist",)
    """Datasets to meta-train on (train splits), one after the other: names, or files, my.npz with the arrays x_train y_train
    x_test y_test (Table 5.2: mnist; digits needs no download)."""
    size: Side = 32
    """All images are scaled to this side in pixels (Appendix D.4, D.5, which have 14 for vsml_nosym)."""
    channels: Literal[1, 3] = 3
    """Channels of all images: grey ones are repeated, coloured ones averaged (Appendix D.4: 32 x 32 x 3)."""
    features: Literal["none", "resnet18", "resnet50", "clip", "untrained", "fashion_mnist"] = "none"
    """Put inputs through a network trained on ImageNet (Figure 5.9), CLIP (Figure D.5; pip install "cleanmeta[clip]"), as a
    control an untrained ResNet-18, or a small network trained on Fashion-MNIST in a minute, before projecting them. Computed
    once, kept in --data-dir."""
    num_tasks: Annotated[int, (1, 2**31)] = 2**25
    """K, how many tasks there are to meta-train on (Appendix D.4, D.5)."""
    classes: tuple[Count, ...] = ()
    """Numbers of classes in meta-training tasks, once the loss has left its plateau (the thesis, and until then: all of the
    dataset's, which larger numbers stand for too)."""
    normalise_inputs: bool = True
    """Images have mean 0 and standard deviation 1 (Appendix D.5; not in Figure 5.4)."""
    bias: Share = 0.9
    """Share of each meta-training batch whose labels are permuted by one and the same permutation (section 5.4.3). The
    thesis: .9 in Figure 5.3 (Appendix D.5), for VSML and Table 5.2's LSTM (D.4); varied in Figures 5.8 and D.9; else 0."""
    bias_end: Share | None = None
    """Once the loss has left its plateau, the bias changes linearly to this (not in the thesis; default: it stays)."""
    sequence_length: Length = 100
    """N_D, examples in a sequence (Appendix D.6)."""

    width: Size = 256
    """N_M, size of a token; hidden units of lstm and mlp (Appendix D.4)."""
    layers: Size = 4
    """Layers of the Transformer (Appendix D.4)."""
    heads: Size = 8
    """Heads of the Transformer (Appendix D.4), or of the outer-product LSTM (not in the thesis)."""
    key_size: Size = 32
    """N_K, size of keys, values and queries (Appendix D.4); side of the outer-product LSTM's matrices (not in the thesis)."""
    label_scale: Real = 1.0
    """Factor on the one-hot labels beside inputs, in the Transformer, the LSTMs and vsml_nosym (the thesis has none)."""
    grid: Size = 16
    """k, side of the grid of LSTMs of vsml_nosym (Appendix D.4: 1 to 24)."""
    state_size: Size = 16
    """Units of each LSTM of vsml (Appendix D.4; 64 for vsml_nosym)."""
    message_size: Size = 8
    """Size of vsml's self-messages (Appendix D.4)."""
    micro_ticks: Size = 2
    """Ticks of vsml's LSTMs per example (Appendix D.4)."""

    meta_optimizer: Literal["adam", "adamw", "sign"] = "adam"
    """Adam, with decoupled weight decay, or the sign of the averaged gradient (Figure D.12)."""
    meta_steps: Annotated[int, (1, 2**24)] | None = None
    """Outer iterations (default: 50,000, Figure 5.7; lstm: 100,000, Appendix D.4)."""
    batch: Annotated[int, (1, 2**16)] | None = None
    """Sequences, each of its own task, in a meta-step (default: 128; vsml: 8; Appendix D.4, D.5)."""
    chunk: Annotated[int, (1, 2**16)] | None = None
    """Sequences whose gradients are computed at once, to bound memory (default: all)."""
    lr: Positive = 2e-4
    """Learning rate (not in the thesis)."""
    eps: Positive = 1e-8
    """Adam's epsilon (Figure D.12; the usual one)."""
    weight_decay: PositiveOrZero = 0.0
    """adamw: weight decay (Figure D.13)."""
    lr_decay: bool = False
    """Once the loss has left its plateau, the learning rate falls linearly to zero (not in the thesis)."""
    clip: Positive | None = None
    """Largest norm of the meta-gradient (not in the thesis)."""
    maml_lr: Positive | None = None
    """maml: learning rate of its updates (default: the best one without meta-training)."""
    maml_outer_lr: Positive | None = None
    """maml: --lr of its own."""

    test_datasets: tuple[str, ...] = ()
    """Datasets to meta-test on (default: --dataset, then digits wine breast_cancer random sum_sign)."""
    split: Literal["test", "validation"] = "test"
    """Splits to meta-test on. validation, a tenth of each train split that meta-training never has, is for choices: of
    settings, presets, or when to stop."""
    test_steps: Length | None = None
    """Examples in a meta-test sequence (default: --sequence-length)."""
    test_seeds: Annotated[int, (1, 2**20)] = 512
    """Meta-test sequences per dataset (Appendix D.5)."""
    test_tasks: Annotated[int, (1, 2**20)] = 32
    """Tasks that the meta-test sequences are spread over (Table 5.2: 16 tasks of 16 sequences each)."""


LAPTOP = dict(
    dataset=("digits",),  # needs no download
    size=8,  # digits as they are
    channels=1,
    classes=(2, 3, 10, 10, 10, 10, 10, 10),  # so that data of few classes are learned too (see its results page)
    width=96,  # five points on digits' validation split over 64 (see its results page); 32 to 44 ms a step
    layers=2,
    heads=6,
    key_size=16,
    bias_end=0.0,  # once the plateau is left, uniform permutations teach more (see its results page)
    sequence_length=40,  # what is learned fast; a step's time grows with it
    batch=64,
    meta_optimizer="adamw",  # Adam, until there is --weight-decay
    lr=2e-3,  # a narrow network stands it, and there are few steps
    label_scale=10**0.5,  # labels as strong as inputs, whose variance is one: a fifth off the plateau (see its results page)
    lr_decay=True,  # settles what the high rate leaves noisy
    clip=1.0,  # likewise
    meta_steps=5_000,  # three to four minutes
    grid=8,
    test_seeds=2048,  # one point of standard error, in seconds
    test_tasks=128,
)
PRESETS = {"thesis": {}, "laptop": LAPTOP}
STEPS = {"lstm": 100_000}  # where --meta-steps and --batch are not given; Appendix D.4
BATCH = {"vsml": 8}


# ======================================================================================================================
# The learner
# ======================================================================================================================
# Every learner is a module with one signature, learner(x, label, state) -> logits, state:
#   x (s, t, a), the inputs of some examples; label (s, t, c), each the one-hot label of the example before, zero at the first
#   of all; state, what the learner keeps of earlier examples, None at the first; logits (s, t, c), from which the label of
#   each example is predicted.
class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int, key_size: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * heads * key_size), nn.Linear(heads * key_size, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, token: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """token (s, t, n), past (2, s, h, earlier, key_size): keys and values of the tokens before."""
        q, k, v = self.qkv(self.attention_norm(token)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        kv = torch.stack([k, v])
        if past is None:
            read = F.scaled_dot_product_attention(q, *kv, is_causal=True)
        else:
            kv = torch.cat([past, kv], 3)
            mask = torch.ones(q.shape[2], kv.shape[3], dtype=torch.bool, device=q.device).tril(past.shape[3])
            read = F.scaled_dot_product_attention(q, *kv, attn_mask=mask)
        token = token + self.out(read.transpose(1, 2).flatten(2))
        return token + self.down(F.gelu(self.up(self.mlp_norm(token)))), kv


class Transformer(nn.Module):
    """f_theta of Eq. 5.2 (Figure 5.1; Appendix D.4). A token is an input beside the label of the example before."""

    def __init__(self, args: Args, num_inputs: int, num_classes: int):
        super().__init__()
        self.label_scale = args.label_scale
        self.embed = nn.Linear(num_inputs + num_classes, args.width)
        self.position = nn.Parameter(torch.zeros(args.sequence_length, args.width))
        self.blocks = nn.ModuleList(Block(args.width, args.heads, args.key_size) for _ in range(args.layers))
        self.norm = nn.LayerNorm(args.width)
        self.head = nn.Linear(args.width, num_classes)

    def forward(self, x: Tensor, label: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """state: the key-value cache."""
        earlier = state[0].shape[3] if state else 0
        token = self.embed(torch.cat([x, self.label_scale * label], -1)) + self.position[earlier : earlier + x.shape[1]]
        kept = []
        for block, past in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            token, kv = block(token, past)
            kept.append(kv)
        return self.head(self.norm(token)), kept


def initialise(module: nn.Module, seed: int) -> None:
    """Truncated normals of std 1/sqrt(fan-in), for positions 0.02; zero biases, for an LSTM's forget gates one (not in
    the thesis)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            std = 0.02 if name == "position" else parameter.shape[1] ** -0.5
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        elif "bias" in name:
            nn.init.zeros_(parameter)
            if "bias_hh" in name:
                _, forget, _, _ = parameter.data.chunk(4)  # gates: input, forget, cell, output
                nn.init.ones_(forget)


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
def previous_labels(y: Tensor, num_classes: int) -> Tensor:
    """y (s, t) -> (s, t, c): at each example the one-hot label of the one before, at the first zeros (section 5.3.2)."""
    one_hot = y[:, :-1, None] == torch.arange(num_classes, device=y.device)
    return F.pad(one_hot.float(), (0, 0, 1, 0))


def rollout(learner: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Learn one sequence of examples: predict y_j after having seen D_{1:j-1} and x_j, for all j (Eq. 5.2).

    x (s, t, a), y (s, t) int64. Returns the cross-entropies (s, t) in nats and whether each prediction was correct (s, t).
    """
    logits, _ = learner(x, previous_labels(y, num_classes))
    return F.cross_entropy(logits.mT, y, reduction="none"), logits.argmax(-1) == y


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
def train_tasks(args: Args, dataset: Dataset, num_inputs: int, classes: tuple[int, ...] | None = None) -> Tasks:
    """p(D) of Algorithm 9: D^(k) = {A^(k) x_i, rho^(k)(y_i)} with A_ij ~ N(0, 1/N_x); rho is the same for the first
    biased_tasks (section 5.4.3), and uniform for the others. classes: how many classes tasks have, if not all; then the
    fixed permutation keeps the order of the classes that a task has."""
    return Tasks(
        dataset,
        projection="gaussian",
        projected=1.0,
        projection_size=num_inputs,
        classes=classes,
        permuted_from=biased_tasks(args),
        project=kernels.project if args.triton and dataset.num_inputs % 2 == 0 else None,
        seed=args.seed,
    )


def class_counts(args: Args, dataset: Dataset) -> tuple[int, ...] | None:
    """--classes, each at most the dataset's number of classes; None, for all, without the flag and for generated datasets."""
    if not args.classes or not len(dataset):
        return None
    return tuple(min(count, dataset.num_classes) for count in args.classes)


def biased_tasks(args: Args) -> int:
    """How many of the K tasks have the fixed permutation: the larger of --bias and --bias-end times K; half of them where one
    of the two is 1 and the other less, so that there are tasks of both kinds."""
    lowest, highest = sorted([args.bias, last_bias(args)])
    if lowest < 1 and highest == 1:
        highest = 0.5
    return math.floor(highest * args.num_tasks)


def schedule(args: Args, step: int, plateau: int) -> tuple[float, float]:
    """Bias and learning rate at a meta-step. Both stay until the step `plateau` at which the loss left its plateau (-1: not
    yet), and change linearly to their last values from there."""
    progress = (step - plateau) / (args.meta_steps - plateau) if plateau >= 0 else 0
    return args.bias + progress * (last_bias(args) - args.bias), args.lr * (1 - progress * args.lr_decay)


def last_bias(args: Args) -> float:
    return args.bias if args.bias_end is None else args.bias_end


def batch_ids(
    args: Args, step: int, bias: float, device: torch.device, rank: int = 0, world: int = 1
) -> tuple[Tensor, Tensor]:
    """The ids (s,) of a meta-step's tasks, drawn uniformly from 0, ..., K - 1, but for the exact share of those with the fixed
    permutation; and the ids of its sequences, all new."""
    number = torch.arange(args.batch, device=device)[rank::world]  # in the batch
    sequences = step * args.batch + number
    biased = biased_tasks(args)
    others = args.num_tasks - biased
    if not biased or not others:
        bias = float(biased > 0)  # all tasks are of one kind
    fixed = number < round(bias * args.batch)
    within = integers(key(args.seed, device, 1), sequences, torch.where(fixed, biased, others))
    return within + torch.where(fixed, 0, biased), sequences


def meta_loss(learner: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """J(theta) of Eq. 5.2 divided by N_D, and the accuracy of the last prediction."""
    losses, correct = rollout(learner, x, y, num_classes)
    return losses.mean(), correct[:, -1].float().mean()


def make_optimizer(args: Args, learner: nn.Module) -> torch.optim.Optimizer:
    if args.meta_optimizer == "sign":
        return SignOfAverage(learner.parameters(), args.lr)
    kind = torch.optim.AdamW if args.meta_optimizer == "adamw" else torch.optim.Adam
    return kind(learner.parameters(), args.lr, eps=args.eps, weight_decay=args.weight_decay, fused=True)


def meta_train(
    args: Args,
    learners: dict[str, nn.Module],
    datasets: list[Dataset],
    watch: dict[str, tuple[Tensor, Tensor]],
    run: "Run",
    facts: dict[str, Any],
) -> None:
    """Algorithm 9, for learners side by side on the same batches. Changes the learners in place.

    watch: sequences of other tasks, x (s, t, a) and y (s, t), whose loss is logged (Figure 5.6b) and has no influence.
    facts: what else belongs into a checkpoint, among it sizes, the numbers of inputs and classes (2,), and plateau, -1 until
    the step at which the first learner left it.
    """
    num_inputs, num_classes = facts["sizes"].tolist()
    chance = chance_loss(datasets)
    trained = {name: learner for name, learner in learners.items() if name not in FIXED}
    loss_of = {name: compiled(args, run, learner, num_classes) for name, learner in trained.items()}
    optimizers = {name: make_optimizer(args, learner) for name, learner in trained.items()}
    statistics = {name: Statistics(trained[name], optimizers[name]) for name in trained if args.statistics}
    sums = {name: torch.zeros(2, device=run.device) for name in trained}  # losses and accuracies since the last line
    first, plateau = next(iter(trained), None), facts["plateau"]

    @cache
    def sampler(number: int, classes: tuple[int, ...] | None) -> Callable:
        return sampling(args, train_tasks(args, datasets[number], num_inputs, classes))

    keep = {"models": learners, "optimizers": optimizers, "sums": sums} | facts
    for step in run.steps(args.meta_steps if trained else 0, keep):
        bias, lr = schedule(args, step, int(plateau))
        task_ids, sequence_ids = batch_ids(args, step, bias, run.device, run.rank, run.world)
        number = step % len(datasets)
        sample = sampler(number, class_counts(args, datasets[number]) if plateau >= 0 else None)
        chunk = args.chunk or len(task_ids)
        for tasks, sequences in zip(task_ids.split(chunk), sequence_ids.split(chunk), strict=True):
            x, y = sample(tasks, sequences, args.sequence_length)  # D ~ p(D)
            share = len(x) / len(task_ids)
            for name in trained:
                loss, accuracy = loss_of[name](x, y)
                (share * loss).backward()
                sums[name] += share * torch.stack([loss.detach(), accuracy])
        for name, learner in trained.items():
            es.average_gradients(learner.parameters())
            if args.clip:
                nn.utils.clip_grad_norm_(learner.parameters(), args.clip)
            scale = args.maml_outer_lr / args.lr if name == "maml" and args.maml_outer_lr else 1
            optimizers[name].param_groups[0]["lr"] = scale * lr
            optimizers[name].step()  # theta <- theta - alpha * gradient of J(theta)
            optimizers[name].zero_grad()

        if (step + 1) % args.log_every == 0:
            metrics = metrics_line(args, trained, sums, watch, statistics, num_classes)
            run.log(step, metrics)
            if plateau < 0 and left_plateau(float(metrics[f"{first}_loss"]), chance):
                plateau.fill_(step)


def left_plateau(loss: float, chance: float) -> bool:
    """Whether a mean meta-loss is more than a tenth below the loss of uniform predictions, chance. (The thesis has no
    definition. On 8 x 8 digits class priors and fixed permutations take less than a tenth off; a memorising learner leaves the
    plateau too.)"""
    return loss < 0.9 * chance


def chance_loss(datasets: list[Dataset]) -> float:
    """The loss of uniform predictions in nats: ln c, on average over datasets."""
    return sum(math.log(data.num_classes) for data in datasets) / len(datasets)


# ======================================================================================================================
# Baselines (common/incontext.py)
# ======================================================================================================================
TUNED = {"sgd": ("sgd",), "adam": ("adam", "adamw"), "maml": ("sgd",)}  # rules to choose a setting from


def search_rates(
    args: Args, tasks: Tasks, num_classes: int, rules: tuple[str, ...], hidden: tuple[int, ...] = (0, 32, 64, 128)
) -> Tensor:
    """The sweep of Appendix D.5 on tasks of a train split: learning rates from 1e-4 to 0.5, rules, and hidden units. Returns the
    setting (index of the rule, hidden units, rate) with the best mean accuracy over a sequence. Rates lie along s."""
    device, results = tasks.dataset.device, []
    rates = torch.logspace(-4, math.log10(0.5), 16, device=device)
    x, y = tasks.sample(*batch_ids(replace(args, batch=32), 0, last_bias(args), device), args.sequence_length)
    several = rates.repeat_interleave(len(x))[:, None, None]
    for rule, units in itertools.product(rules, hidden):
        learner = incontext.OnlineSGD(tasks.num_inputs, num_classes, rule, units, several)
        initialise(learner, args.seed)
        learner.to(device)
        _, correct = rollout(learner, x.repeat(len(rates), 1, 1), y.repeat(len(rates), 1), num_classes)
        scores = correct.float().view(len(rates), -1).mean(1)
        best = torch.tensor([incontext.OnlineSGD.RULES.index(rule), units, rates[scores.argmax()].item()])
        results.append((scores.max(), best))
    return max(results, key=lambda result: result[0])[1]


def with_own_settings(args: Args, learners: dict[str, nn.Module], tasks: Tasks, num_classes: int) -> dict[str, nn.Module]:
    """Learners for a test set: SGD and Adam have the settings that are best on its train split. The first dataset of
    meta-training, for which theirs were chosen, needs no other ones."""
    name, device = tasks.dataset.source["name"], tasks.dataset.device
    if os.path.realpath(name) == os.path.realpath(args.dataset[0]):
        return learners
    tasks = replace(tasks, dataset=prepare(args, name, "train", device))
    own = {}
    for rule in [rule for rule in ("sgd", "adam") if rule in learners]:
        setting = search_rates(args, tasks, num_classes, TUNED[rule])
        own[rule] = make_learner(rule, args, tasks.num_inputs, num_classes, setting).to(device)
    return learners | own


def make_learner(name: str, args: Args, num_inputs: int, num_classes: int, setting: Tensor | None = None) -> nn.Module:
    """A learner by its name with initial parameters. setting: of those in TUNED, the result of search_rates."""
    sizes, grid = (num_inputs, num_classes), (args.message_size, args.micro_ticks)
    if name in TUNED:
        rule, hidden, lr = setting.tolist()
        if name == "maml":
            lr = args.maml_lr or lr
        learner = incontext.OnlineSGD(*sizes, incontext.OnlineSGD.RULES[int(rule)], int(hidden), lr)
    elif name == "mlp":
        learner = incontext.MLP(*sizes, args.width)
    elif name == "lstm":
        learner = incontext.LSTM(*sizes, args.width, args.label_scale)
    elif name == "outer_lstm":
        learner = incontext.OuterProductLSTM(*sizes, args.heads, args.key_size, args.label_scale)
    elif name == "vsml":
        learner = incontext.VSML(*sizes, args.state_size, *grid)
    elif name == "vsml_nosym":
        learner = incontext.VSMLWithoutSymmetries(*sizes, args.grid, 4 * args.state_size, *grid, args.label_scale)
    elif name in ("transformer", "untrained"):
        learner = Transformer(args, *sizes)
    else:
        raise KeyError(name)
    initialise(learner, args.seed)
    return learner


# ======================================================================================================================
# What is logged
# ======================================================================================================================
def metrics_line(
    args: Args,
    trained: dict[str, nn.Module],
    sums: dict[str, Tensor],
    watch: dict[str, tuple[Tensor, Tensor]],
    statistics: dict[str, Statistics],
    num_classes: int,
) -> dict[str, Tensor]:
    """A line of metrics.csv: means of losses and accuracies since the last line, losses on `watch`, and statistics. The sums
    start again."""
    metrics = {}
    for name, learner in trained.items():
        loss, accuracy = es.all_reduce_mean(sums[name] / args.log_every)
        metrics |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        with torch.no_grad():
            for what, data in watch.items():
                metrics[f"{name}_loss_{what}"] = meta_loss(learner, *data, num_classes)[0]
        if statistics:
            metrics |= {f"{name} {what}": value for what, value in statistics[name].values.items()}
        sums[name].zero_()
    return metrics


def plateau_end(steps: list[int], losses: list[float], chance: float) -> int | None:
    """The length of the loss plateau: the first logged step that is past it, with the mean loss since the last line; None if
    there is none."""
    return next((step for step, loss in zip(steps, losses, strict=True) if left_plateau(loss, chance)), None)


def state_size(learner: nn.Module, args: Args, num_inputs: int, num_classes: int) -> int:
    """N_S, numbers that a sequence has to pass through on its way to a prediction (section 5.4.2): for a Transformer keys and
    values of all layers and examples, for a recurrent learner its state."""
    device = next(learner.parameters()).device
    x, label = (torch.zeros(1, args.sequence_length, size, device=device) for size in (num_inputs, num_classes))
    with torch.no_grad():
        _, state = learner(x, label)
    return sum(value.numel() for value in checkpoints.state_of(state).values())


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def prepare(args: Args, name: str, split: str, device: torch.device) -> Dataset:
    """A split of a dataset as all learners of a run see it: at one size with the same channels, or as features."""
    if args.features != "none":
        return embed(load(name, split, args.data_dir, device), args.features, args.data_dir)
    dataset = load(name, split, args.data_dir, device, args.size, args.channels)
    if not args.normalise_inputs:
        dataset = replace(dataset, mean=0.0, std=1.0)
    if name == "random":  # ten points, repeated (Appendix D.5); Gaussian where the thesis has uniform ones
        return replace(dataset, make=MAKERS[name](dataset.shape, points=10))
    return dataset


def embed(dataset: Dataset, network: str, data_dir: str) -> Dataset:
    """The dataset seen through a pre-trained network without its last layer (section 5.4.4), normalised by mean and std of
    the train split's features. Raises DatasetError where there are no images."""
    if len(dataset.shape) != 3 or dataset.x is None or dataset.x.dtype != torch.uint8:
        raise DatasetError(f"'{dataset.name}' has no stored uint8 images to compute features of; leave it out with --features.")
    x = features(dataset, network, data_dir)
    train = x if dataset.split == "train" else features(dataset.reload(split="train"), network, data_dir)
    x = ((x - train.mean()) / train.std()).to(dataset.device)
    return replace(dataset, x=x, shape=(x.shape[1],), mean=0.0, std=1.0)


def features(dataset: Dataset, network: str, data_dir: str) -> Tensor:
    """Features (examples, n) on the CPU. They are kept in data_dir/features, under a name with a digest of the images."""
    digest = hashlib.sha256(dataset.x.numpy(force=True)).hexdigest()[:16]
    path = Path(data_dir, "features", f"{network}-{dataset.name}-{dataset.split}-{digest}.pt")
    if kept := checkpoints.read_cache(path, features=Tensor):
        return kept["features"]
    x = feature_network(network, data_dir).features(dataset.x, f"{network} on {dataset.name} {dataset.split}")
    if int(os.environ.get("RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write(path, {"features": x})
    return x


@cache
def feature_network(name: str, data_dir: str) -> Network:
    """That of --features."""
    if name != "fashion_mnist":
        return pretrained(name)
    train = load(name, "train", data_dir, size=28, channels=3)
    labels = torch.arange(train.num_classes).repeat_interleave(train.counts)
    return trained(train.x, labels, train.mean, train.std)


def test_tasks(args: Args, device: torch.device, num_inputs: int) -> dict[tuple[str, str], Tasks]:
    """What is meta-tested on, all on --split, by name and novelty: tasks that were meta-trained on (none), unseen projections
    and uniform permutations of a meta-training dataset (task), and unseen datasets (domain). All have all classes of their
    dataset, with --classes too."""
    tests = {}
    others = BUNDLED + GENERATED if args.features == "none" else ()
    trained_on = set(map(os.path.realpath, args.dataset))
    for name in distinct(args.test_datasets or args.dataset + others):
        dataset = prepare(args, name, args.split, device)
        task = dataset.name
        seen = train_tasks(args, dataset, num_inputs)
        unseen = replace(seen, permuted_from=0)
        if os.path.realpath(name) in trained_on:
            tests |= {(task, "none"): seen, (task, "task"): unseen}
        else:
            tests[task, "domain"] = unseen
    return tests


def seen_ids(args: Args, steps: int, plateau: int, device: torch.device, number: int = 0) -> Tensor:
    """Ids (n,) of at most --test-tasks tasks of dataset `number` that meta-training sampled, from its last meta-steps before
    `steps`. Those with the fixed permutation come first in each batch."""
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    for step in reversed(range(max(len(args.dataset), steps))):
        if step % len(args.dataset) != number:
            continue
        bias, _ = schedule(args, step, plateau if step > plateau else -1)
        ids = torch.cat([ids, batch_ids(args, step, bias, device)[0]])
        if len(ids) >= args.test_tasks:
            break
    return ids[:: max(1, len(ids) // args.test_tasks)][: args.test_tasks]


def watched(args: Args, device: torch.device, num_inputs: int, num_classes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Sequences whose loss is logged in meta-training, x (s, t, a) and y (s, t): unseen tasks of the first dataset, and of the
    first unseen dataset. They are of validation splits, and none where one has too few examples for that."""
    watch = {}
    with suppress(DatasetError):
        for (_, novelty), tasks in test_tasks(replace(args, split="validation"), device, num_inputs).items():
            what = {"none": None, "task": "unseen", "domain": "domain"}[novelty]
            if what and what not in watch and tasks.num_classes <= num_classes:
                x, y = zip(*test_data(args, tasks, 64, args.sequence_length), strict=True)
                watch[what] = torch.cat(x), torch.cat(y)
    return watch


def test_data(
    args: Args, tasks: Tasks, sequences: int, length: int, ids: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Test sequences, a few at a time: x (s, t, a), y (s, t). ids: of their tasks (default: --test-tasks new ones)."""
    device, first = tasks.dataset.device, FIRST_ID[tasks.dataset.split]
    if ids is None:
        ids = first + torch.arange(args.test_tasks, device=device)
    ids = ids.repeat(-(-sequences // len(ids)))[:sequences]
    length = min(length, len(tasks.dataset) or length)  # once through the data at most
    size = max(1, min(512, 2 ** (24 if args.device == "cpu" else 30) // (tasks.dataset.num_inputs * tasks.num_inputs)))
    for part in torch.arange(sequences, device=device).split(size):
        yield tasks.sample(ids[part], first + part, length)


def meta_test(
    args: Args,
    learners: dict[str, nn.Module],
    tests: dict[tuple[str, str], Tasks],
    num_classes: int,
    seen: dict[str, Tensor],
    run: "Run",
) -> list[dict[str, Any]]:
    """All learners on all test sets: rows of results.json, and Figure 5.3. seen: ids of meta-training tasks, by dataset."""
    rows, curves = [], []
    for (task, novelty), tasks in tqdm(tests.items(), desc="meta-test", disable=run.rank > 0):
        if tasks.num_classes > num_classes:
            run.info(f"{task} is left out: it has {tasks.num_classes} classes, the learners were made for {num_classes}.")
            continue
        ids = seen[os.path.realpath(tasks.dataset.source["name"])] if novelty == "none" else None
        measure = partial(measured, args, learners, task, novelty, tasks, num_classes, ids)
        some, curve = run.once(f"{task}, {novelty}", measure)
        rows += some
        curves += curve
    axis = dict(xlabel="example", ylabel="accuracy", ylim=(0, 1.02), labels=LABELS, standard_error=True, columns=3)
    plot(curves, run.folder / "accuracy.png", **axis)
    return rows


@torch.no_grad()
def measured(
    args: Args, learners: dict[str, nn.Module], task: str, novelty: str, tasks: Tasks, num_classes: int, ids: Tensor | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Result rows of all learners on one test set at plotted_steps, and rows of the accuracy at all examples."""
    learners = with_own_settings(args, learners, tasks, num_classes)
    parts = {name: [] for name in learners}
    fitted = {name: [] for name in incontext.FITTED if name in args.baselines}
    wanted = args.test_seeds, args.test_steps or args.sequence_length, ids
    for x, y in test_data(args, tasks, *wanted):
        for name, learner in learners.items():
            parts[name].append(rollout(learner, x, y, num_classes))
    plain = replace(tasks, projected=0.0, projection_size=None, project=None)  # the same examples as they are
    for x, y in test_data(args, plain, *wanted) if fitted else ():
        for name in fitted:
            fitted[name].append(incontext.fitted_correct(name, x, y, plotted_steps(x.shape[1])))

    rows, curve = [], []
    for name, correct in fitted.items():
        values = torch.cat(correct).float()
        at = zip(plotted_steps(y.shape[1]), values.unbind(1), strict=True)
        rows += [result_row(name, task, novelty, "accuracy", step, one) for step, one in at]
    for name in learners:
        losses, correct = (torch.cat(kind) for kind in zip(*parts[name], strict=True))
        correct = correct.float()
        cumulative = correct.cumsum(1) / torch.arange(1, correct.shape[1] + 1, device=correct.device)
        for metric, values in (("accuracy", correct), ("cumulative_accuracy", cumulative), ("cross_entropy", losses)):
            for step in plotted_steps(values.shape[1]):
                rows.append(result_row(name, task, novelty, metric, step, values[:, step - 1]))
        panel = f"{task} ({NOVELTY[novelty]})"
        curve += [result_row(name, panel, novelty, "accuracy", i + 1, at) for i, at in enumerate(correct.unbind(1))]
    return rows, curve


LABELS = {"transformer": "GPICL (Transformer)", "lstm": "LSTM", "outer_lstm": "outer-product LSTM", "vsml": "VSML"}
LABELS |= {"vsml_nosym": "VSML without symmetries", "mlp": "MLP", "maml": "MAML", "sgd": "online SGD", "adam": "online Adam"}
LABELS |= {"untrained": "Transformer, untrained", "logistic": "logistic regression", "neighbors": "nearest neighbors"}
LABELS |= {"forest": "random forest"}
NOVELTY = {"none": "seen tasks", "task": "unseen tasks", "domain": "unseen dataset"}


def draw_meta_loss(path: Path, learners: list[str], columns: dict[str, list[tuple[int, float]]]) -> None:
    """Figures 5.6 and 5.8: meta-losses on the tasks that are trained on and on others."""
    tasks = {"": "meta-training tasks", "_unseen": "unseen tasks", "_domain": "unseen dataset"}
    rows = [
        {"task": name, "learner": label, "step": step, "mean": loss, "std": 0.0}
        for name, (what, label) in itertools.product(learners, tasks.items())
        for step, loss in columns.get(f"{name}_loss{what}", ())
    ]
    plot(rows, path, xlabel="meta-step", ylabel="cross-entropy in nats", titles=LABELS, columns=3)


def draw_statistics(path: Path, learner: str, columns: dict[str, list[tuple[int, float]]], plateau: int | None) -> None:
    """Figures D.8 to D.10, a line for each tensor. A dashed line stands where the loss left its plateau."""
    kinds = ("gradient norm", "gradient cosine", "update norm", "update cosine", "exp_avg norm", "exp_avg_sq norm")
    figure, axes = pyplot().subplots(2, 3, figsize=(18, 9), layout="constrained")
    for axis, kind in zip(axes.flat, kinds, strict=True):
        names = [name for name in columns if name.startswith(f"{learner} {kind} ")]
        for depth, name in enumerate(names):  # from the first layer to the head
            color = pyplot().get_cmap("viridis_r")(depth / len(names))
            axis.plot(*zip(*columns[name], strict=True), label=name.split()[-1], linewidth=0.8, color=color)
        if plateau is not None:
            axis.axvline(plateau, color="black", linestyle="--", linewidth=0.8)
        axis.set(title=kind, xlabel="meta-step", yscale="log" if "norm" in kind else "linear")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    save(figure, path)


# ======================================================================================================================
# Use it
# ======================================================================================================================
class Context(NamedTuple):
    """What an InContextLearner keeps of s sequences."""

    projection: Tensor  # (s, a, num_inputs)
    label: Tensor  # (s, c) of the last example
    before: Any  # the model's state after the examples that were learned
    after: Any  # and after the one that was predicted last
    examples: int


class InContextLearner(Learner):
    """A meta-trained learner in the form that common.learners.Classifier takes. Inputs of any size are projected to the size
    that it was meta-trained on, by a task of its own for each sequence (Algorithm 9)."""

    shapes: ClassVar = {}

    def __init__(self, model: nn.Module, args: Args, num_inputs: int, num_classes: int):
        self.model = model.eval()
        self.args = args
        self.num_inputs = num_inputs
        self.num_classes = num_classes

    @staticmethod
    def load(
        checkpoint: str | Path = "pretrained", num_classes: int | None = None, seed: int = 0, device: torch.device | str = "cpu"
    ) -> Classifier:
        """A trained learner to be used from Python: see Classifier. checkpoint: "pretrained", or a checkpoint.pt of this
        script. Raises CheckpointError or UserError for what is no checkpoint of this script. What it returns raises
        ValueError for more classes than were meta-trained, and for as many examples as a Transformer has positions."""
        path = checkpoints.named(checkpoint, METHOD)
        saved = checkpoints.read(path, method=str, args=dict, state=dict)
        try:
            args = from_dict(Args, saved["args"]) if saved["method"] == METHOD else None
            check_ranges(args or Args())
        except (TypeError, FlagError):
            args = None
        if args is None:
            raise UserError(f"{checkpoint} is not a checkpoint of this {METHOD}.py.")
        learners, parts = restored(args, [args.learner], saved["state"], path)
        learner = InContextLearner(learners[args.learner].to(device), args, *parts["sizes"].tolist())
        return Classifier(learner, torch.zeros(0, device=device), num_classes, seed)

    def initial_state(self, keys: Tensor, num_inputs: int, num_outputs: int) -> Context:
        if num_outputs > self.num_classes:
            raise ValueError(f"This learner has {self.num_classes} classes, not {num_outputs}.")
        data = Dataset("yours", "train", (num_inputs,), num_outputs, device=keys.device)
        projection = train_tasks(self.args, data, self.num_inputs).projections(keys[0])
        label = torch.zeros(keys.shape[1], num_outputs, device=keys.device)
        return Context(projection, label, None, None, 0)

    def predict(self, params: Params, state: Context, x: Tensor) -> tuple[Context, Tensor]:
        """Eq. 5.1. Keeps what `learn` would continue from."""
        x = x[0, :, None] @ state.projection
        logits, after = self.model(x, pad(state.label, self.num_classes)[:, None], state.before)
        return state._replace(after=after), logits[None, :, 0, : state.label.shape[1]]

    def learn(self, params: Params, state: Context, error: Tensor, label: Tensor) -> Context:
        most = self.args.sequence_length - 1  # the last position is for a prediction
        if isinstance(self.model, Transformer) and state.examples == most:
            raise ValueError(f"This Transformer learns from at most {most} examples; reset it.")
        return Context(state.projection, label[0], state.after, None, state.examples + 1)


# ======================================================================================================================
# The run
# ======================================================================================================================
METHOD = "gpicl"  # in checkpoints and results; a renamed copy of this file reads them too
USER_ERRORS = (CheckpointError, DatasetError, FeatureError, FlagError)
NAMED_AFTER = ("dataset", "learner")  # the flags that name a run's folder
KEPT = ("preset", "dataset", "seed", "num_tasks", "bias", "bias_end", "classes", "batch", "meta_steps")  # decide the seen tasks
KEPT += ("heads", "key_size", "label_scale", "micro_ticks")  # and the learner; a meta-test cannot change them


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
def with_budget(args: Args) -> Args:
    """The learner's steps and batch size where the flags name none."""
    steps, batch = STEPS.get(args.learner, 50_000), BATCH.get(args.learner, 128)
    return replace(args, meta_steps=args.meta_steps or steps, batch=args.batch or batch)


def check(args: Args) -> None:
    """Refuse what cannot work, before anything is written."""
    if not args.dataset:
        raise UserError("--dataset needs at least one dataset.")
    if args.learner in incontext.FITTED:
        raise UserError(f"--learner {args.learner} is a baseline; name it in --baselines.")
    if args.weight_decay and args.meta_optimizer != "adamw":
        raise UserError("--weight-decay is for --meta-optimizer adamw.")
    if 1 in args.classes:
        raise UserError("--classes has to be from 2 on.")
    if args.log_every % len(args.dataset):
        raise UserError(f"--log-every has to be a multiple of the {len(args.dataset)} datasets, which follow each other.")
    if "maml" not in {args.learner, *args.baselines} and (args.maml_lr or args.maml_outer_lr):
        raise UserError("--maml-lr and --maml-outer-lr are for maml; name it in --learner or --baselines.")
    if args.triton and (args.device != "cuda" or not find_spec("triton")):
        raise UserError("--triton needs a GPU and Triton.")
    if args.graphs and args.device != "cuda":
        raise UserError("--graphs needs a GPU.")
    names = {args.learner, *args.baselines}
    if args.test_steps and args.test_steps > args.sequence_length and names & {"transformer", "untrained"}:
        raise UserError(f"A Transformer has --sequence-length {args.sequence_length} positions, not {args.test_steps}.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % world:
        raise UserError(f"--batch {args.batch} cannot be shared evenly by {world} processes; choose a multiple of {world}.")


def compiled(args: Args, run: Run, learner: nn.Module, num_classes: int) -> Any:
    """meta_loss of a learner, compiled as a whole, or, for those that go step by step, each step; with --graphs
    also its backward pass, as one CUDA graph."""
    if run.compiles and isinstance(learner, incontext.Recurrent):
        learner.step = torch.compile(learner.step, dynamic=False)
    whole = run.compiles and not isinstance(learner, (incontext.Recurrent, incontext.LSTM))
    loss = partial(meta_loss, learner, num_classes=num_classes)
    loss = torch.compile(loss, dynamic=False) if whole else loss
    graph = args.graphs and not isinstance(learner, incontext.LSTM)
    return graphs.replayed_loss(loss, learner.parameters()) if graph else loss


def sampling(args: Args, tasks: Tasks) -> Any:
    """tasks.sample, with --graphs as one CUDA graph."""
    return graphs.replayed(tasks.sample) if args.graphs else tasks.sample


def restored(
    args: Args, names: list[str], state: dict[str, Any], source: Path | str
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Learners by name from the state in a checkpoint, the file `source`, their settings, and sizes (2,), the numbers of inputs
    and classes. Raises CheckpointError if they are missing, or none."""
    parts = {"settings": {name: torch.zeros(3) for name in names if name in TUNED}, "sizes": torch.zeros(2, dtype=torch.int64)}
    parts["plateau"] = torch.tensor(-1)
    checkpoints.restore(parts, state, source)
    for rule, hidden, lr in map(Tensor.tolist, [*parts["settings"].values()]):
        if not (0 <= rule < len(incontext.OnlineSGD.RULES) and 0 <= hidden <= 2**12 and lr > 0):
            raise CheckpointError(f"The settings in {source} are damaged.")
    if parts["sizes"].min() < 1 or parts["sizes"].max() > 2**31:
        raise CheckpointError(f"The numbers of inputs and classes in {source} are damaged.")
    if not -1 <= parts["plateau"] < with_budget(args).meta_steps:
        raise CheckpointError(f"The end of the plateau in {source} is damaged.")
    learners = {name: make_learner(name, args, *parts["sizes"].tolist(), parts["settings"].get(name)) for name in names}
    checkpoints.restore({"models": learners}, state, source)
    return learners, parts


def main() -> None:
    args, checkpoint = parse_args()
    args = with_budget(args)
    check(args)
    names = [name for name in dict.fromkeys([args.learner, *args.baselines]) if name not in incontext.FITTED]
    run = Run(args, checkpoint)
    if run.compiles and args.mode == "train" and args.meta_steps * args.batch > 100_000:
        compile_draws()  # fewer tasks save less time than compiling takes
    if checkpoint:
        learners, parts = restored(args, names, checkpoint["state"], args.checkpoint or args.resume)
    if args.mode == "train":
        datasets = [prepare(args, name, "train", run.device) for name in args.dataset]
    if not checkpoint:
        sizes = max(data.num_inputs for data in datasets), max(data.num_classes for data in datasets)
        parts = {"settings": {}, "sizes": torch.tensor(sizes), "plateau": torch.tensor(-1)}
    sizes = parts["sizes"].tolist()
    if args.mode == "train" and max(data.num_classes for data in datasets) > sizes[1]:
        raise UserError(f"--dataset has more classes now than the {sizes[1]} that this run was started with.")
    tests = test_tasks(args, run.device, sizes[0])
    if all(tasks.num_classes > sizes[1] for tasks in tests.values()):
        raise UserError("No learner fits any of the test datasets; choose other --test-datasets.")
    run.open_folder()

    if not checkpoint:
        first = train_tasks(args, datasets[0], sizes[0])
        with torch.no_grad():
            searched = [name for name in names if name in TUNED]
            parts["settings"] |= {name: search_rates(args, first, first.num_classes, TUNED[name]) for name in searched}
        learners = {name: make_learner(name, args, *sizes, parts["settings"].get(name)) for name in names}
    learners = {name: learner.to(run.device) for name, learner in learners.items()}
    if args.mode == "train":
        meta_train(args, learners, datasets, watched(args, run.device, *sizes), run, parts)
    tested = time.time()
    if run.rank > 0:
        return  # meta-testing takes seconds, one process does it
    meta_trained = args.meta_steps * any(name not in FIXED for name in names)
    steps = meta_trained if args.mode == "train" else checkpoint["step"]
    plateau = int(parts["plateau"])
    seen = {os.path.realpath(name): seen_ids(args, steps, plateau, run.device, k) for k, name in enumerate(args.dataset)}
    rows = meta_test(args, learners, tests, sizes[1], seen, run)
    columns = read_metrics(run.folder)
    facts = {"plateau": None, "final_loss": None}
    trained = [name for name in names if f"{name}_loss" in columns]
    for name in trained:
        lines = columns[f"{name}_loss"]
        if args.classes and name != trained[0] and parts["plateau"] >= 0:  # the losses of fewer classes are lower
            lines = [line for line in lines if line[0] <= parts["plateau"]] or lines[:1]
        steps, losses = zip(*lines, strict=True)
        left = plateau_end(steps, losses, chance_loss(datasets))
        if name == args.learner:
            facts = {"plateau": left, "final_loss": sum(losses[-10:]) / len(losses[-10:])}
        how = f"was on its plateau until meta-step {steps[-1]}" if left is None else f"left its plateau at meta-step {left}"
        run.info(f"{LABELS[name]}: the loss {how}.")
    if trained:
        draw_meta_loss(run.folder / "meta_loss.png", trained, columns)
    if trained and args.statistics:
        draw_statistics(run.folder / "statistics.png", trained[0], columns, facts["plateau"])
    parameters = sum(parameter.numel() for parameter in learners[args.learner].parameters())
    run.finish(rows, tested, parameters, state_size=state_size(learners[args.learner], args, *sizes), **facts)


if __name__ == "__main__":
    machine.run_as_script(main, f"{METHOD}.py", (UserError, *USER_ERRORS))
