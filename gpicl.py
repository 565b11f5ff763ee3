"""GPICL: a Transformer becomes a general-purpose in-context learner.

A plain Transformer reads a dataset, one example and the label of the one before per token, and predicts each label before it
sees it. Meta-trained on many random projections and label permutations of one dataset, it stops memorising them and learns
to learn: at meta-test time it learns datasets that it never saw, in its activations, without a gradient.

Kirsch, "Automating AI Research" (2025), chapter 5 and appendix D; Kirsch, Harrison, Sohl-Dickstein and Metz,
"General-Purpose In-Context Learning by Meta-Learning Transformers" (2022).

    Eq. 5.1        -> InContextLearner.predict
    Eq. 5.2        -> lifetime, meta_loss
    Algorithm 9    -> train_tasks (the task distribution), meta_train (the loop)
    Section 5.4.2  -> state_size
    Section 5.4.3  -> train_tasks (bias), SignOfAverage, left_plateau
    Section 5.4.4  -> embed (features of pre-trained networks)
    Appendix D.4   -> OuterProductLSTM, VSML, VSMLWithoutSymmetries
    Appendix D.5   -> MLP, OnlineSGD, sweep_rates

    python gpicl.py                                          # meta-train on digits, meta-test on unseen data: 5 minutes
    python gpicl.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-datasets mnist fashion_mnist
    python gpicl.py --mode sweep --vary num_tasks=1,64,1024,16384 --bias-end 0.9 --baselines    # the phases of Figure 5.4

Axes, everywhere: s sequences in parallel, t time (examples), a inputs, c classes, h heads, n width or hidden state, m message.
Inputs x have shape (s, t, a), labels y (s, t), logits (s, t, c).
"""

import csv
import ctypes
import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from common.datasets import (
    BUNDLED,
    FIRST_ID,
    GENERATED,
    MAKERS,
    Dataset,
    DatasetError,
    Tasks,
    compile_draws,
    distinct,
    integers,
    key,
    load,
)

# ======================================================================================================================
# Args
# ======================================================================================================================
FIXED = ("sgd", "adam", "untrained")  # not meta-trained
Name = Literal["transformer", "lstm", "outer_lstm", "vsml", "vsml_nosym", "mlp", "maml", "sgd", "adam", "untrained"]


@dataclass
class Args:
    """GPICL (chapter 5): meta-train a Transformer on many tasks, then watch it learn unseen datasets in context."""

    preset: Literal["auto", "thesis", "laptop"] = "auto"
    """thesis: the thesis' numbers; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device, else laptop."""
    seed: int = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live."""
    compile: bool = True
    """Fuse the meta-step with torch.compile (needs a C++ compiler on a CPU)."""
    mode: Literal["train", "test", "sweep"] = "train"
    """train: meta-train, then meta-test; test: only meta-test a --checkpoint; sweep: a run for each combination of --vary,
    those that are finished are kept, then the figures over all of them."""
    checkpoint: Path | None = None
    """The checkpoint.pt to meta-test."""
    resume: Path | None = None
    """A run folder to go on with, exactly where it stopped."""
    run_dir: Path = Path("runs")
    """Run folders are made in here."""
    run_name: str | None = None
    """Name of the run folder (default: script-dataset-learner-seed-time), or of the folder of a sweep's runs."""
    data_dir: Path = Path("data")
    """Where torchvision's datasets are, or are downloaded to, and where features are kept."""
    track: bool = False
    """Log to Weights & Biases too (pip install "cleanmeta[track]")."""
    checkpoint_every: int = 1000
    """Meta-steps between checkpoints."""
    log_every: int = 50
    """Meta-steps between lines of metrics.csv, each with the mean loss since the last one."""
    statistics: bool = False
    """Log norms and cosines of gradients and updates for each tensor, and draw them (Figures D.8 to D.10)."""
    vary: tuple[str, ...] = ()
    """sweep: flags and their values, as in num_tasks=1,256,65536 seed=0,1."""

    learner: Name = "transformer"
    """What learns at meta-test time. Meta-trained: transformer, lstm, outer_lstm (LSTM with outer-product state), vsml,
    vsml_nosym (VSML without symmetries), mlp (no memory at all), maml (an initialisation). With nothing but tuned settings:
    sgd, adam. untrained: the transformer before meta-training."""
    baselines: tuple[Name, ...] = ("sgd", "adam", "untrained")
    """Learners trained and tested beside the first one, on the same budget of meta-steps."""

    dataset: tuple[str, ...] = ("digits",)
    """Datasets to meta-train on (train splits), one after the other: names or files of your own, my.npz with the arrays
    x_train y_train x_test y_test (thesis: mnist; digits needs no download)."""
    size: int = 32
    """All images are scaled to this side in pixels (Appendix D.4, D.5)."""
    channels: Literal[1, 3] = 3
    """Channels of all images: grey ones are repeated, coloured ones averaged (Appendix D.4: 32 x 32 x 3)."""
    features: Literal["none", "resnet18", "resnet50", "clip", "untrained"] = "none"
    """Put inputs through a network trained on ImageNet (Figure 5.9), CLIP (Figure D.5; pip install "cleanmeta[clip]"), or,
    as a control, an untrained ResNet-18, before projecting them. Computed once, kept in --data-dir."""
    num_tasks: int | Literal["inf"] = 2**25
    """K, how many tasks there are to meta-train on; inf: no task comes twice (section 5.4.2)."""
    bias: float = 0.9
    """Share of the meta-training tasks whose labels are permuted by one and the same permutation (section 5.4.3)."""
    bias_end: float | None = None
    """Once the loss has left its plateau, the bias goes linearly to this (not in the thesis; default: it stays)."""
    sequence_length: int = 100
    """N_D, examples in a sequence (Appendix D.6)."""

    width: int = 256
    """N_M, size of a token; hidden units of lstm and mlp (Appendix D.4)."""
    layers: int = 4
    """Layers of the Transformer, or of the LSTM (Appendix D.4)."""
    heads: int = 8
    """Heads of the Transformer, or of the outer-product LSTM (Appendix D.4)."""
    key_size: int = 32
    """N_K, size of keys, values and queries (Appendix D.4); side of the outer-product LSTM's matrices."""
    label_scale: float = 1.0
    """Factor on the one-hot labels beside inputs, in the Transformer, the LSTMs and vsml_nosym (the thesis has none)."""
    grid: int = 16
    """k, side of the grid of LSTMs of vsml_nosym (Appendix D.4: 1 to 24)."""
    state_size: int = 16
    """Units of each LSTM of vsml (Appendix D.4; 64 for vsml_nosym)."""
    message_size: int = 8
    """Size of vsml's self-messages (Appendix D.4)."""
    micro_ticks: int = 2
    """Ticks of vsml's LSTMs per example (Appendix D.4)."""

    meta_optimizer: Literal["adam", "adamw", "sign"] = "adam"
    """Adam, with decoupled weight decay, or the sign of the averaged gradient (Figure D.12)."""
    meta_steps: int = 50_000
    """Outer iterations (Figure 5.7)."""
    batch: int = 128
    """Sequences, each of its own task, in a meta-step (Appendix D.4)."""
    lr: float = 2e-4
    """Learning rate (not in the thesis)."""
    eps: float = 1e-8
    """Adam's epsilon (Figure D.12; the usual one)."""
    weight_decay: float = 0.0
    """adamw: weight decay (Figure D.13)."""
    lr_decay: bool = False
    """Once the loss has left its plateau, the learning rate falls linearly to zero (not in the thesis)."""
    clip: float | None = None
    """Largest norm of the meta-gradient (not in the thesis)."""

    test_datasets: tuple[str, ...] = ()
    """Datasets to meta-test on (default: --dataset, then digits wine breast_cancer random sum_sign)."""
    split: Literal["test", "validation"] = "test"
    """Splits to meta-test on. validation, a tenth of each train split that meta-training never has, is for choices: of
    settings, presets, or when to stop."""
    test_steps: int | None = None
    """Examples in a meta-test sequence (default: --sequence-length)."""
    test_seeds: int = 512
    """Meta-test sequences per dataset (Appendix D.5)."""
    test_tasks: int = 32
    """Tasks that the meta-test sequences are spread over (Table 5.2: 16 sequences each)."""


LAPTOP = dict(
    size=8,  # digits as they are
    channels=1,
    width=64,  # 25 ms a step; a learner of 120 K parameters is enough for digits
    layers=2,
    heads=4,
    key_size=16,
    bias_end=0.0,  # once the plateau is left, uniform permutations teach more (README)
    sequence_length=40,  # what is learned fast; a step's time grows with it
    batch=64,
    meta_optimizer="adamw",
    lr=2e-3,  # a narrow network stands it, and there are few steps
    label_scale=10**0.5,  # labels as strong as inputs, whose variance is one: a fifth off the plateau (README)
    lr_decay=True,  # settles what the high rate leaves noisy
    clip=1.0,  # likewise
    meta_steps=5_500,  # three minutes
    grid=8,
    test_seeds=2048,  # one point of standard error, in seconds
    test_tasks=128,
)
PRESETS = {"thesis": {}, "laptop": LAPTOP}


# ======================================================================================================================
# The learner
# ======================================================================================================================
# Every learner is a module with one signature, learner(x, label, state) -> logits, state:
#   x (s, t, a), the inputs of some examples; label (s, t, c), each the one-hot label of the example before, zero at the first
#   of all; state, what the learner keeps of earlier examples, None at the first; logits (s, t, c), from which the label of
#   each example is predicted.
class Block(nn.Module):
    """Self-attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int, key_size: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * heads * key_size), nn.Linear(heads * key_size, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, token: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """token (s, t, n), past (2, s, h, earlier, key_size): keys and values of the tokens before."""
        q, *kv = self.qkv(self.attention_norm(token)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        now = torch.stack(kv)
        kv = now if past is None else torch.cat([past, now], 3)
        mask = None if past is None else torch.ones(q.shape[2], kv.shape[3], dtype=bool, device=q.device).tril(past.shape[3])
        read = F.scaled_dot_product_attention(q, *kv, attn_mask=mask, is_causal=past is None)
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
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, num_classes)

    def forward(self, x: Tensor, label: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """state: the key-value cache."""
        earlier = state[0].shape[3] if state else 0
        token = self.embed(torch.cat([x, self.label_scale * label], -1)) + self.position[earlier : earlier + x.shape[1]]
        kept = []
        for block, past in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            token, kv = block(token, past)
            kept.append(kv)
        return self.head(self.norm(token)), kept


def state_size(learner: nn.Module, args: Args, num_inputs: int, num_classes: int) -> int:
    """N_S, numbers that a sequence has to pass through on its way to a prediction (section 5.4.2): for a Transformer keys and
    values of all layers and examples, for a recurrent learner its state."""
    device = next(learner.parameters()).device
    shapes = ((1, args.sequence_length, size) for size in (num_inputs, num_classes))
    with torch.no_grad():
        _, state = learner(*(torch.zeros(shape, device=device) for shape in shapes))
    return sum(value.numel() for _, value in leaves(take_out(state)))


def initialise(module: nn.Module, seed: int) -> None:
    """Truncated normals of std 1/sqrt(fan-in), for positions 0.02; zero biases, for an LSTM's forget gates one (the thesis
    does not tell)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            std = 0.02 if name == "position" else parameter.shape[1] ** -0.5
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        elif "bias" in name:
            nn.init.zeros_(parameter)
            if "bias_hh" in name:
                nn.init.ones_(parameter.data.chunk(4)[1])


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
def previous_labels(y: Tensor, num_classes: int) -> Tensor:
    """y (s, t) -> (s, t, c): at each example the one-hot label of the one before, at the first zeros (section 5.3.2)."""
    return F.pad(F.one_hot(y[:, :-1], num_classes).float(), (0, 0, 1, 0))


def lifetime(learner: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Learn one sequence of examples: predict y_j after having seen D_{1:j-1} and x_j, for all j (Eq. 5.2).

    x (s, t, a), y (s, t) int64. Returns the cross-entropies (s, t) in nats and whether each prediction was right (s, t).
    """
    logits, _ = learner(x, previous_labels(y, num_classes))
    return F.cross_entropy(logits.mT, y, reduction="none"), logits.argmax(-1) == y


class InContextLearner:
    """A trained learner to be used like any other one: learn(x, y) from an example, predict(x) a label, in any order.

    checkpoint: of a finished run. num_inputs: the size of your inputs, z-normalised, which a random projection takes to the
    size that the learner was meta-trained on; task: the id of that projection. Raises Mistake for a bad checkpoint, or when
    a Transformer has learned as many examples as it has positions.
    """

    def __init__(self, checkpoint: Path | str, num_inputs: int, task: int = 0):
        self.args, models, (inputs, self.num_classes) = load_models(Path(checkpoint))
        self.model = models[self.args.learner].eval()
        data = Dataset("yours", "train", (num_inputs,), self.num_classes)
        tasks = Tasks(data, projection="gaussian", projected=1.0, projection_size=inputs, seed=self.args.seed)
        self.projection = tasks.projections(tasks.keys(torch.tensor([task]), 1))[0]
        self.state, self.label, self.seen = None, torch.zeros(1, 1, self.num_classes), 0

    @torch.no_grad()
    def step(self, x: Tensor) -> tuple[Tensor, Any]:
        if self.args.learner == "transformer" and self.seen == self.args.sequence_length:
            raise Mistake(f"This Transformer has {self.args.sequence_length} positions, and all of them are used.")
        return self.model(torch.as_tensor(x, dtype=torch.float32).view(1, 1, -1) @ self.projection, self.label, self.state)

    def predict(self, x: Tensor) -> Tensor:
        """Probabilities (c,) of the classes for the input x (num_inputs,), by Eq. 5.1."""
        return self.step(x)[0][0, 0].softmax(-1)

    def learn(self, x: Tensor, y: int) -> None:
        """Take in that the input x (num_inputs,) has the label y."""
        _, self.state = self.step(x)
        self.label = F.one_hot(torch.tensor([[y]]), self.num_classes).float()
        self.seen += 1


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
UNSEEN = FIRST_ID["test"]  # ids from here on are never meta-trained on


def train_tasks(args: Args, dataset: Dataset, num_inputs: int, bias: float) -> Tasks:
    """p(D) of Algorithm 9: D^(k) = {A^(k) x_i, rho^(k)(y_i)} with A_ij ~ N(0, 1/N_x); rho is the same for a share of the
    tasks, the bias (section 5.4.3), and uniform for the others."""
    return Tasks(
        dataset,
        projection="gaussian",
        projected=1.0,
        projection_size=num_inputs,
        permuted_labels=1 - bias,
        seed=args.seed,
    )


def schedule(args: Args, step: int, left: int) -> tuple[float, float]:
    """Bias and learning rate at a meta-step. Both wait for the step `left` at which the loss left its plateau (-1: not yet),
    however long that takes, and go linearly to their last values from there."""
    way = (step - left) / (args.meta_steps - left) if left >= 0 else 0
    return args.bias + way * (last_bias(args) - args.bias), args.lr * (1 - way * args.lr_decay)


def last_bias(args: Args) -> float:
    return args.bias if args.bias_end is None else args.bias_end


def batch_ids(args: Args, step: int, device: torch.device, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """The ids (s,) of a meta-step's tasks, drawn uniformly from 0, ..., K - 1, and those of its sequences, all new."""
    sequences = step * args.batch + torch.arange(args.batch, device=device)[rank::world]
    if args.num_tasks == "inf":
        return sequences, sequences
    return integers(key(args.seed, device, 1), sequences, args.num_tasks), sequences


def meta_loss(learner: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """J(theta) of Eq. 5.2 divided by N_D, and the accuracy of the last prediction."""
    losses, right = lifetime(learner, x, y, num_classes)
    return losses.mean(), right[:, -1].float().mean()


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
    facts: what else belongs into a checkpoint, among it the sizes, numbers of inputs and classes (2,).
    """
    num_inputs, classes = facts["sizes"].tolist()
    trained = {name: learner for name, learner in learners.items() if name not in FIXED}
    loss_of = {name: compiled(run, learner, classes) for name, learner in trained.items()}
    optimizers = {name: make_optimizer(args, learner) for name, learner in trained.items()}
    watched = {name: Statistics(trained[name], optimizers[name]) for name in trained if args.statistics}
    sums = {name: torch.zeros(2, device=run.device) for name in trained}  # losses and accuracies since the last line
    left = torch.tensor(-1)  # the step at which the first learner left the plateau
    keep = {"models": learners, "optimizers": optimizers, "sums": sums, "left": left} | facts
    for step in run.steps(args.meta_steps if trained else 0, keep):
        ids = batch_ids(args, step, run.device, run.rank, run.world)
        bias, lr = schedule(args, step, int(left))
        tasks = train_tasks(args, datasets[step % len(datasets)], num_inputs, bias)
        x, y = tasks.sample(*ids, args.sequence_length)  # D ~ p(D)
        log = {}
        for name, learner in trained.items():
            loss, right = loss_of[name](x, y)
            loss.backward()
            average_gradients(learner, args.clip)
            optimizers[name].param_groups[0]["lr"] = lr
            optimizers[name].step()  # theta <- theta - alpha * gradient of J(theta)
            optimizers[name].zero_grad()
            sums[name] += torch.stack([loss.detach(), right])
            if (step + 1) % args.log_every == 0:
                loss, right = all_reduce_mean(sums[name] / args.log_every)
                log |= {f"{name}_loss": loss, f"{name}_accuracy": right}
                with torch.no_grad():
                    log |= {f"{name}_loss_{what}": meta_loss(learner, *data, classes)[0] for what, data in watch.items()}
                log |= {f"{name} {what}": value for what, value in watched[name].found.items()} if watched else {}
                sums[name].zero_()
        if log:
            run.log(step, log)
            if left < 0 and left_plateau([step], [float(next(iter(log.values())))], classes) is not None:
                left.fill_(step)


def average_gradients(learner: nn.Module, clip: float | None) -> None:
    """The mean of the gradients over all processes, then the bound on their norm."""
    gradients = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
    if dist.is_initialized():
        mean = all_reduce_mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    if clip:
        nn.utils.clip_grad_norm_(learner.parameters(), clip)


def left_plateau(steps: list[int], losses: list[float], num_classes: int) -> int | None:
    """The length of the loss plateau: the first logged step at which the mean meta-loss since the last line is more than a
    tenth below ln c, the loss of one who knows nothing; None if there is none. (The thesis has no definition. Class priors
    and fixed permutations take less than a tenth off; a memorising learner leaves the plateau too.)"""
    return next((step for step, loss in zip(steps, losses, strict=True) if loss < 0.9 * math.log(num_classes)), None)


class Statistics:
    """Norms of gradients and updates of each tensor, and the cosines between those of consecutive steps (Figures D.8 to D.10);
    for Adam also the norms of its averages of gradients and of their squares. Watches an optimiser's steps from outside, so
    gradients are those after --clip."""

    def __init__(self, learner: nn.Module, optimizer: torch.optim.Optimizer):
        self.named, self.optimizer = dict(learner.named_parameters()), optimizer
        self.last = {kind: self.named_zeros() for kind in ("gradient", "update")}
        self.found: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def named_zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(parameter) for name, parameter in self.named.items()}

    def before(self, *_: Any) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in self.named.items()}

    def after(self, *_: Any) -> None:
        for name, parameter in self.named.items():
            for kind, now in (("gradient", parameter.grad), ("update", parameter.detach() - self.start[name])):
                self.found[f"{kind} norm {name}"] = now.norm()
                self.found[f"{kind} cosine {name}"] = F.cosine_similarity(now.flatten(), self.last[kind][name].flatten(), 0)
                self.last[kind][name] = now.clone()
            state = self.optimizer.state[parameter]
            self.found |= {f"{kind} norm {name}": state[kind].norm() for kind in ("exp_avg", "exp_avg_sq") if kind in state}


# ======================================================================================================================
# Baselines
# ======================================================================================================================
class MLP(nn.Module):
    """A classifier that sees one example at a time: two hidden layers with ReLUs (Figure 5.2a; N_D = 1 in Eq. 5.2)."""

    def __init__(self, args: Args, num_inputs: int, num_classes: int):
        super().__init__()
        n = args.width
        self.layers = nn.Sequential(nn.Linear(num_inputs, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, num_classes))

    def forward(self, x: Tensor, label: Tensor, state: Any = None) -> tuple[Tensor, list]:
        return self.layers(x), []


class LSTM(nn.Module):
    """The in-context LSTM (Hochreiter et al. 2001; Table 5.2)."""

    def __init__(self, args: Args, num_inputs: int, num_classes: int):
        super().__init__()
        self.label_scale = args.label_scale
        self.lstm = nn.LSTM(num_inputs + num_classes, args.width, args.layers, batch_first=True)
        self.head = nn.Linear(args.width, num_classes)

    def forward(self, x: Tensor, label: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, state = self.lstm(torch.cat([x, self.label_scale * label], -1), state)
        return self.head(h), state


class Recurrent(nn.Module):
    """A learner that goes through a sequence by step(x (s, a), label (s, c), state) -> logits (s, c), state."""

    def forward(self, x: Tensor, label: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        state, logits = self.initial_state(len(x)) if state is None else state, []
        for x_t, label_t in zip(x.unbind(1), label.unbind(1), strict=True):
            now, state = self.step(x_t, label_t, state)
            logits.append(now)
        return torch.stack(logits, 1), state

    def zeros(self, *shape: int) -> Tensor:
        parameter = next(self.parameters())
        return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)


class OuterProductLSTM(Recurrent):
    """An LSTM whose cell is a matrix for each head, written and gated by outer products and read by a query (Appendix D.4)."""

    def __init__(self, args: Args, num_inputs: int, num_classes: int):
        super().__init__()
        self.heads, self.size, self.label_scale = args.heads, args.key_size, args.label_scale
        self.gates = nn.Linear(num_inputs + num_classes + self.heads * self.size, 8 * self.heads * self.size)
        self.key_scale = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(self.heads * self.size, num_classes)

    def initial_state(self, s: int) -> tuple[Tensor, Tensor]:
        return self.zeros(s, self.heads * self.size), self.zeros(s, self.heads, self.size, self.size)

    def step(self, x: Tensor, label: Tensor, state: Any) -> tuple[Tensor, Any]:
        """cell (s, h, i, j)."""
        hidden, cell = state
        parts = self.gates(torch.cat([x, self.label_scale * label, hidden], -1)).unflatten(
            -1, (self.heads, 8, self.size)
        )  # (s, h, 8, i)
        left, right, query, out = parts.split([3, 3, 1, 1], 2)
        i, g, f = (F.softplus(self.key_scale) * left.tanh()[..., None] * right.tanh()[..., None, :]).unbind(2)
        cell = (f + 1).sigmoid() * cell + i.sigmoid() * g
        hidden = (out.sigmoid() * (query @ cell).tanh()).flatten(1)
        return self.head(hidden), (hidden, cell)


class SubRNNs(nn.Module):
    """A grid of LSTMs with shared weights. Each hears what comes in at its row a and at its column b, and what its row and
    its column said to themselves at the tick before (Eq. 4.9; Appendix D.4). Messages are averaged."""

    def __init__(self, args: Args, row_inputs: int, column_inputs: int, n: int):
        super().__init__()
        m, self.ticks = args.message_size, args.micro_ticks
        self.from_row, self.from_column = nn.Linear(row_inputs + m, 4 * n), nn.Linear(column_inputs + m, 4 * n)
        self.recurrent = nn.Linear(n, 4 * n, bias=False)
        self.to_row, self.to_column = nn.Linear(n, m), nn.Linear(n, m)

    def forward(self, row: Tensor, column: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """row (s, a, i), column (s, b, j), h and c (s, a, b, n). Returns messages to the columns (s, b, m), h and c."""
        for _ in range(self.ticks):
            from_row = self.from_row(torch.cat([row, self.to_row(h.mean(2))], -1))
            from_column = self.from_column(torch.cat([column, self.to_column(h.mean(1))], -1))
            i, j, f, o = (from_row[:, :, None] + from_column[:, None] + self.recurrent(h)).chunk(4, -1)
            c = (f + 1).sigmoid() * c + i.sigmoid() * j.tanh()
            h = o.sigmoid() * c.tanh()
        return self.to_column(h.mean(1)), h, c


class VSML(Recurrent):
    """One layer of VSML with self-messages (Appendix D.4). Rows hear their input; columns the error of the last prediction and
    the last label. Logits are the first of the messages to the columns."""

    def __init__(self, args: Args, num_inputs: int, num_classes: int):
        super().__init__()
        self.shape = (num_inputs, num_classes, args.state_size)
        self.grid = SubRNNs(args, 1, 2, args.state_size)
        self.scale = nn.Parameter(torch.tensor(10.0))  # averages over many inputs are small

    def initial_state(self, s: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.zeros(s, *self.shape), self.zeros(s, *self.shape), self.zeros(s, self.shape[1])

    def step(self, x: Tensor, label: Tensor, state: Any) -> tuple[Tensor, Any]:
        *state, predicted = state
        said, *state = self.grid(x[..., None], torch.stack([predicted - label, label], -1), *state)
        logits = self.scale * said[..., 0]
        return logits, (*state, logits.softmax(-1))


class VSMLWithoutSymmetries(Recurrent):
    """The same grid between two learned linear projections: no symmetry between inputs, nor between classes (Appendix D.4)."""

    def __init__(self, args: Args, num_inputs: int, num_classes: int):
        super().__init__()
        self.shape, self.label_scale = (args.grid, args.grid, 4 * args.state_size), args.label_scale
        self.project = nn.Linear(num_inputs + num_classes, 2 * args.grid)
        self.grid = SubRNNs(args, 1, 1, 4 * args.state_size)
        self.head = nn.Linear(args.grid * args.message_size, num_classes)

    def initial_state(self, s: int) -> tuple[Tensor, Tensor]:
        return self.zeros(s, *self.shape), self.zeros(s, *self.shape)

    def step(self, x: Tensor, label: Tensor, state: Any) -> tuple[Tensor, Any]:
        row, column = self.project(torch.cat([x, self.label_scale * label], -1))[..., None].chunk(2, 1)
        said, *state = self.grid(row, column, *state)
        return self.head(said.flatten(1)), tuple(state)


class OnlineSGD(Recurrent):
    """A network without or with one hidden layer of ReLUs that learns by backpropagation from one example at a time: by SGD,
    Adam (Kingma and Ba 2015) or AdamW. Its state are the weights. MAML (Finn et al. 2017) is the same with SGD and initial
    weights that are meta-trained, through the updates (Appendix D.5)."""

    RULES = ("sgd", "adam", "adamw")

    def __init__(self, num_inputs: int, num_classes: int, rule: str, hidden: int, lr: float | Tensor):
        """lr may be a tensor (s, 1, 1), a rate for each sequence."""
        super().__init__()
        self.rule, self.lr = rule, lr
        sizes = (num_inputs, hidden, num_classes) if hidden else (num_inputs, num_classes)
        self.weights = nn.ParameterList(torch.empty(b, a) for a, b in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(torch.empty(b) for b in sizes[1:])

    def initial_state(self, s: int) -> dict[str, Any]:
        first = [torch.cat([w.T, b[None]]).expand(s, -1, -1) for w, b in zip(self.weights, self.biases, strict=True)]
        moments = [torch.zeros_like(weight) for weight in first for _ in range(2 if self.rule != "sgd" else 0)]
        inputs = [self.zeros(s, weight.shape[1]) for weight in first]
        return dict(weights=first, moments=moments, inputs=inputs, predicted=self.zeros(s, first[-1].shape[2]), t=self.zeros(1))

    def step(self, x: Tensor, label: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Learn from the last example, whose label has become known, then predict."""
        weights, moments, t = list(state["weights"]), list(state["moments"]), state["t"]
        error = state["predicted"] - label  # gradient of the cross-entropy with respect to the logits; zero before the first
        for k in reversed(range(len(weights))):
            heard = state["inputs"][k]
            gradient = heard[..., None] * error[:, None]
            error = (weights[k] @ error[..., None]).squeeze(-1)[:, :-1] * (heard[:, :-1] > 0)
            if self.rule != "sgd":
                one, two = torch.lerp(gradient, moments[2 * k], 0.9), torch.lerp(gradient**2, moments[2 * k + 1], 0.999)
                moments[2 * k : 2 * k + 2] = one, two
                count = t.clamp(min=1)
                gradient = one / (1 - 0.9**count) / ((two / (1 - 0.999**count)).sqrt() + 1e-8)
            if self.rule == "adamw":
                gradient = gradient + 0.01 * weights[k] * (t > 0)
            weights[k] = weights[k] - self.lr * gradient
        inputs = []
        for weight in weights:
            inputs.append(F.pad(x.relu() if inputs else x, (0, 1), value=1.0))
            x = (inputs[-1][:, None] @ weight).squeeze(1)
        return x, dict(weights=weights, moments=moments, inputs=inputs, predicted=x.softmax(-1), t=t + 1)


def sweep_rates(args: Args, tasks: Tasks, rules: tuple[str, ...], hidden: tuple[int, ...] = (0, 32, 64, 128)) -> Tensor:
    """The sweep of Appendix D.5 on meta-training tasks: learning rates from 1e-4 to 0.5, rules, and hidden units. Returns the
    setting (index of the rule, hidden units, rate) with the best mean accuracy over a sequence. Rates lie along s."""
    device, found = tasks.dataset.device, []
    rates = torch.logspace(-4, math.log10(0.5), 16, device=device)
    x, y = tasks.sample(*batch_ids(replace(args, batch=32), 0, device), args.sequence_length)
    several = rates.repeat_interleave(len(x))[:, None, None]
    for rule, units in itertools.product(rules, hidden):
        learner = OnlineSGD(tasks.num_inputs, tasks.num_classes, rule, units, several)
        initialise(learner, args.seed)
        learner.to(device)
        _, right = lifetime(learner, x.repeat(len(rates), 1, 1), y.repeat(len(rates), 1), tasks.num_classes)
        scores = right.float().view(len(rates), -1).mean(1)
        found.append((scores.max(), torch.tensor([OnlineSGD.RULES.index(rule), units, rates[scores.argmax()].item()])))
    return max(found, key=lambda one: one[0])[1]


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def prepare(args: Args, name: str, split: str, device: torch.device) -> Dataset:
    """A split of a dataset as all learners of a run see it: at one size with the same channels, or as features."""
    if args.features != "none":
        return embed(load(name, split, args.data_dir, device), args.features, args.data_dir)
    dataset = load(name, split, args.data_dir, device, args.size, args.channels)
    if name == "random":  # ten points, repeated (Appendix D.5)
        return replace(dataset, make=MAKERS[name](dataset.shape, points=10))
    return dataset


def embed(dataset: Dataset, network: str, data_dir: Path) -> Dataset:
    """The dataset seen through a pre-trained network without its last layer (section 5.4.4), normalised by mean and std of
    the train split's features. Raises DatasetError where there are no images, and Mistake where there are no weights."""
    if len(dataset.shape) != 3 or dataset.x is None or dataset.x.dtype != torch.uint8:
        raise DatasetError(f"'{dataset.name}' has no stored uint8 images to compute features of; leave it out with --features.")
    x = features(dataset, network, data_dir)
    train = x if dataset.split == "train" else features(dataset.reload(split="train"), network, data_dir)
    x = ((x - train.mean()) / train.std()).to(dataset.device)
    return replace(dataset, x=x, shape=(x.shape[1],), mean=0.0, std=1.0)


def features(dataset: Dataset, network: str, data_dir: Path) -> Tensor:
    """Features (examples, n) on the CPU. They are kept in data_dir/features, under a name that tells the images apart."""
    digest = hashlib.sha256(dataset.x.numpy(force=True)).hexdigest()[:16]
    path = data_dir / "features" / f"{network}-{dataset.name}-{dataset.split}-{digest}.pt"
    if path.exists():
        try:
            return torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise Mistake(f"The features {path} are damaged; delete the file to compute them again.") from error
    net, mean, std = pretrained(network)
    net, parts = net.to(dataset.device), []
    mean, std = (torch.tensor(v, device=dataset.device)[:, None, None] for v in (mean, std))
    with torch.no_grad():
        for images in tqdm(dataset.x.split(64), desc=f"{network} on {dataset.name} {dataset.split}"):
            images = images.float().expand(-1, 3, -1, -1) / 255
            images = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
            parts.append(net((images - mean) / std).float().cpu())
    x = torch.cat(parts)
    if int(os.environ.get("RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: torch.save(x, file))
    return x


def pretrained(network: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """A network from images (s, 3, 224, 224) to features (s, n), and the mean and std of the pixels that it expects."""
    if network == "clip":
        try:
            import open_clip
        except ImportError as error:
            raise Mistake('--features clip needs open_clip: pip install "cleanmeta[clip]".') from error
        make = lambda: open_clip.create_model("ViT-B-32", pretrained="laion2b_s34b_b79k").visual  # noqa: E731 (Appendix D.6)
        mean, std = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
    else:
        import torchvision.models

        weights = None if network == "untrained" else "IMAGENET1K_V1"
        make = lambda: getattr(torchvision.models, network if weights else "resnet18")(weights=weights)  # noqa: E731
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            net = make()
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            text = f"The weights of {network} are not at hand and could not be downloaded"
            raise Mistake(f"{text}; use --features none, or untrained as a control.") from error
    if network != "clip":
        net.fc = nn.Identity()
    return net.eval(), mean, std


def test_tasks(args: Args, device: torch.device, num_inputs: int) -> dict[tuple[str, str], Tasks]:
    """What is meta-tested on, all on --split, by name and novelty: tasks that were meta-trained on (none), unseen projections
    and uniform permutations of a known dataset (task), and unseen datasets (domain)."""
    found = {}
    others = BUNDLED + GENERATED if args.features == "none" else ()
    for name in distinct(args.test_datasets or args.dataset + others):
        dataset = prepare(args, name, args.split, device)
        task = dataset.name
        seen = train_tasks(args, dataset, num_inputs, last_bias(args))
        unseen = replace(seen, permuted_labels=1.0)
        if name in args.dataset:
            found |= {(task, "none"): seen, (task, "task"): unseen}
        else:
            found[task, "domain"] = unseen
    return found


def test_data(args: Args, tasks: Tasks, seen: bool, sequences: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Test sequences, a few at a time: x (s, t, a), y (s, t). Tasks are meta-trained ones or have the split's own ids."""
    device, first = tasks.dataset.device, FIRST_ID[tasks.dataset.split]
    ids = torch.arange(args.test_tasks, device=device)
    if not seen:
        ids = ids + first
    elif args.num_tasks != "inf":
        ids = integers(key(args.seed, device, 2), ids, args.num_tasks)
    ids = ids.repeat(-(-sequences // len(ids)))[:sequences]
    length = min(length, len(tasks.dataset) or length)  # once through the data at most
    together = max(1, min(512, 2 ** (24 if args.device == "cpu" else 30) // (tasks.dataset.num_inputs * tasks.num_inputs)))
    for part in torch.arange(sequences, device=device).split(together):
        yield tasks.sample(ids[part], first + part, length)


@torch.no_grad()
def meta_test(
    args: Args, learners: dict[str, nn.Module], tests: dict[tuple[str, str], Tasks], num_classes: int, run: "Run"
) -> list[dict[str, Any]]:
    """All learners on all test sets: rows of results.json, and Figure 5.3."""
    rows, curves = [], {}
    for (task, novelty), tasks in tqdm(tests.items(), desc="meta-test", disable=run.rank > 0):
        if tasks.num_classes > num_classes:
            run.say(f"{task} is left out: it has {tasks.num_classes} classes, the learners were made for {num_classes}.")
            continue
        found = {name: [] for name in learners}
        for x, y in test_data(args, tasks, novelty == "none", args.test_seeds, args.test_steps or args.sequence_length):
            for name, learner in learners.items():
                found[name].append(lifetime(learner, x, y, num_classes))
        for name, parts in found.items():
            losses, right = (torch.cat(kind) for kind in zip(*parts, strict=True))
            right = right.float()
            cumulative = right.cumsum(1) / torch.arange(1, right.shape[1] + 1, device=right.device)
            curves.setdefault((task, novelty), {})[name] = right.cpu()
            for metric, values in (("accuracy", right), ("cumulative_accuracy", cumulative), ("cross_entropy", losses)):
                for step in plotted_steps(values.shape[1]):
                    rows.append(result_row(name, task, novelty, metric, step, values[:, step - 1]))
    if not rows:
        raise Mistake("No learner fits any of the test datasets; choose other --test-datasets.")
    draw_accuracy(run.folder / "accuracy.png", curves)
    return rows


def plotted_steps(steps: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, 100, ..., with 400, and the last step."""
    points = {base * 10**power for base in (1, 2, 5) for power in range(8)} | {400, steps}
    return sorted(point for point in points if point <= steps)


LABELS = {"transformer": "GPICL (Transformer)", "lstm": "LSTM", "outer_lstm": "outer-product LSTM", "vsml": "VSML"}
LABELS |= {"vsml_nosym": "VSML without symmetries", "mlp": "MLP", "maml": "MAML", "sgd": "online SGD", "adam": "online Adam"}
LABELS |= {"untrained": "Transformer, untrained"}
NOVELTY = {"none": "seen tasks", "task": "unseen tasks", "domain": "unseen dataset"}


def figures() -> Any:
    """matplotlib, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def panels(count: int, width: float = 4, height: float = 3.2) -> tuple[Any, Any, Any]:
    """A figure with so many axes in rows of three."""
    plt, columns = figures(), min(3, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained")
    for index, axis in enumerate(axes.flat):
        axis.grid(alpha=0.3)
        axis.set_visible(index < count)
    return plt, figure, list(axes.flat)[:count]


def finish_figure(figure: Any, axes: Any, path: Path) -> None:
    """One legend for all panels, then the file."""
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(1 + len(axes), max(1, len(handles))))
    figure.savefig(path, dpi=110)
    figures().close(figure)


def draw_accuracy(path: Path, curves: dict[tuple[str, str], dict[str, Tensor]]) -> None:
    """Figure 5.3: accuracy at each example, mean and 95 % confidence interval over sequences (s, t)."""
    _, figure, axes = panels(len(curves))
    for axis, ((task, novelty), by_learner) in zip(axes, curves.items(), strict=False):
        for name, right in by_learner.items():
            mean, error = right.mean(0), 1.96 * right.std(0, correction=0) / math.sqrt(len(right))
            seen = range(1, right.shape[1] + 1)
            (line,) = axis.plot(seen, mean, label=LABELS[name])
            axis.fill_between(seen, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=f"{task} ({NOVELTY[novelty]})", xlabel="example", ylabel="accuracy", ylim=(0, 1.02))
    finish_figure(figure, axes, path)


def read_metrics(folder: Path) -> dict[str, list[float]]:
    """The columns of metrics.csv."""
    path = folder / "metrics.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    return {name: [float(line[name]) for line in lines] for name in (lines[0] if lines else ())}


def draw_meta_loss(folder: Path, learners: list[str], statistics: bool, plateau: int | None) -> None:
    """Figures 5.6 and 5.8: meta-losses on the tasks that are trained on and on others; and those of D.8 to D.10, in which a
    dashed line stands where the loss left its plateau."""
    columns = read_metrics(folder)
    if not learners:
        return
    _, figure, axes = panels(len(learners), 5, 3.6)
    for axis, name in zip(axes, learners, strict=False):
        for what, label in (("", "meta-training tasks"), ("_unseen", "unseen tasks"), ("_domain", "unseen dataset")):
            if f"{name}_loss{what}" in columns:
                axis.plot(columns["step"], columns[f"{name}_loss{what}"], label=label)
        axis.set(title=LABELS[name], xlabel="meta-step", ylabel="cross-entropy in nats")
    finish_figure(figure, axes, folder / "meta_loss.png")
    if statistics:
        kinds = ("gradient norm", "gradient cosine", "update norm", "update cosine", "exp_avg norm", "exp_avg_sq norm")
        plt, figure, axes = panels(len(kinds), 6, 4)
        for axis, kind in zip(axes, kinds, strict=True):
            of_tensors = {column: values for column, values in columns.items() if column.startswith(f"{learners[0]} {kind} ")}
            for depth, (column, values) in enumerate(of_tensors.items()):  # from the first layer to the head
                color = plt.get_cmap("viridis_r")(depth / len(of_tensors))
                axis.plot(columns["step"], values, label=column.split()[-1], linewidth=0.8, color=color)
            if plateau is not None:
                axis.axvline(plateau, color="black", linestyle="--", linewidth=0.8)
            axis.set(title=kind, xlabel="meta-step", yscale="log" if "norm" in kind else "linear")
        finish_figure(figure, axes, folder / "statistics.png")


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps: many runs, and the figures over all of them
# ----------------------------------------------------------------------------------------------------------------------
ARCHITECTURE = ("learner", "width", "layers", "heads", "key_size", "grid", "state_size")


def sweep(args: Args) -> None:
    """A run for each combination of --vary, one after the other; those that are finished are kept and those that were cut
    off go on. Then the figures, over all runs in the folder."""
    axes = {}
    for text in args.vary:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        if name not in {f.name for f in fields(Args)} or not values:
            raise Mistake(f"--vary {text} is not a flag of this script and its values; write it as num_tasks=1,16,256.")
        axes[name] = [read_value(args, name, value) for value in values.split(",")]
    if not axes:
        raise Mistake("--mode sweep needs --vary, as in --vary num_tasks=1,16,256 seed=0,1.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise Mistake("A sweep runs in one process; start it without torchrun.")
    folder, combinations = args.run_dir / (args.run_name or "-".join([SCRIPT, "sweep", *axes])), {}
    for values in itertools.product(*axes.values()):
        name = ",".join(f"{axis}={value}" for axis, value in zip(axes, values, strict=True))
        changes = dict(zip(axes, values, strict=True))
        combinations[name] = replace(args, mode="train", vary=(), run_dir=folder, run_name=name, **changes)
        check(combinations[name])
    for name, one in combinations.items():
        if (folder / name / "checkpoint.pt").exists():
            free = {flag: getattr(args, flag) for flag in ("device", "compile", "track", "data_dir", "run_dir")}
            saved = saved_args(folder / name / "checkpoint.pt", **free | {"run_dir": folder, "resume": None})
            other = [f.name for f in fields(Args) if getattr(saved, f.name) != getattr(one, f.name)]
            if other:
                raise Mistake(
                    f"{folder / name} was run with another --{other[0].replace('_', '-')}; choose another --run-name."
                )
            one = replace(one, resume=folder / name)
        elif (folder / name).exists():
            shutil.rmtree(folder / name)  # cut off before its first checkpoint
        if not (folder / name / "results.json").exists():
            experiment(one)
            torch.compiler.reset()
    runs = []
    for path in sorted(folder.glob("*/results.json")):
        try:
            runs.append(json.loads(path.read_text()) | {"metrics": read_metrics(path.parent)})
        except (OSError, ValueError) as error:
            raise Mistake(f"{path} is damaged; delete it, and the sweep writes it again.") from error
    x = next((name for name, values in axes.items() if name != "seed" and not isinstance(values[0], str)), "num_tasks")
    runs.sort(key=lambda run: float(run["args"][x]))
    draw_phases(folder / "phases.png", runs, x)
    draw_solutions(folder / "solutions.png", runs, x)
    numeric = [name for name, values in axes.items() if name != "seed" and not isinstance(values[0], str)]
    draw_plateaus(folder / "plateau.png", runs, x, *numeric[1:2] or [None])
    if len(numeric) > 1:
        draw_heat_maps(folder / "heat_map.png", runs, *numeric[:2])
    if set(axes) & set(ARCHITECTURE):
        draw_state_size(folder / "state_size.png", runs)
    print_sweep(runs, list(axes))
    print(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.glob('*.png')))}")


def read_value(args: Args, name: str, text: str) -> Any:
    """A value of a flag from its text, as the command line would read it."""
    flag = "--" + name.replace("_", "-")
    try:
        return getattr(tyro.cli(Args, args=[flag, text], default=args, console_outputs=False), name)
    except SystemExit as error:
        raise Mistake(f"--vary {name}={text}: {text} is not a number or a name that {flag} takes.") from error


def reached(run: dict[str, Any], novelty: str, step: int | None = None, metric: str = "accuracy") -> float:
    """The mean over test sets of one novelty of what a run's learner reached at an example, by default at the last one."""
    rows = [row for row in run["results"] if row["learner"] == run["args"]["learner"] and row["metric"] == metric]
    rows = [row for row in rows if row["novelty"] == novelty]
    last = {row["task"]: row["step"] for row in rows}  # rows are in the order of steps
    values = [row["mean"] for row in rows if row["step"] == (step or last[row["task"]])]
    return sum(values) / len(values) if values else math.nan


def mean_at_each(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """The different x, and the mean of y at each."""
    found = {at: [y for x, y in zip(xs, ys, strict=True) if x == at] for at in sorted(set(xs))}
    return list(found), [sum(values) / len(values) for values in found.values()]


def scale(axis: Any, xs: list[float]) -> None:
    """A logarithmic axis for what spans a factor of eight or more."""
    if xs and min(xs) > 0 and max(xs) >= 8 * min(xs):
        axis.set_xscale("log", base=10 if max(xs) < 1 else 2)


def draw_phases(path: Path, runs: list[dict[str, Any]], x: str) -> None:
    """Figure 5.4: how much is learned within a sequence, accuracy at the last example minus that at the first."""
    _, figure, axes = panels(2, 5, 3.6)
    xs = [float(run["args"][x]) for run in runs]
    for novelty, label in NOVELTY.items():
        last, first = ([reached(run, novelty, step) for run in runs] for step in (None, 1))
        for axis, ys in zip(axes, ([b - a for a, b in zip(first, last, strict=True)], last), strict=True):
            (line,) = axis.plot(*mean_at_each(xs, ys), label=label)
            axis.plot(xs, ys, ".", color=line.get_color(), alpha=0.5)
    for axis, what in zip(axes, ("last minus first example", "last example"), strict=True):
        axis.set(xlabel=x.replace("_", " "), ylabel=f"accuracy, {what}")
        scale(axis, xs)
    finish_figure(figure, axes, path)


def draw_solutions(path: Path, runs: list[dict[str, Any]], x: str) -> None:
    """Figures D.1 and D.4: the losses of all runs in the end, which come in clusters."""
    _, figure, axes = panels(2, 5, 3.6)
    xs = [float(run["args"][x]) for run in runs]
    axes[0].plot(xs, [run["final_loss"] for run in runs], "o", color="C2", alpha=0.6, label="meta-training tasks")
    for novelty in ("task", "domain"):
        losses = [reached(run, novelty, metric="cross_entropy") for run in runs]
        axes[1].plot(xs, losses, "o", alpha=0.6, label=NOVELTY[novelty] + ", last example")
    for axis in axes:
        axis.set(xlabel=x.replace("_", " "), ylabel="cross-entropy in nats")
        scale(axis, xs)
    finish_figure(figure, axes, path)


def power_law(x: list[float], y: list[float]) -> float | None:
    """The exponent of y ~ x^exponent by least squares of the logarithms; None for fewer than three points."""
    if len(set(x)) < 3 or min([*x, *y]) <= 0:
        return None
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def draw_plateaus(path: Path, runs: list[dict[str, Any]], x: str, y: str | None) -> None:
    """Figures 5.6 to 5.8, D.11 and D.12: meta-losses, the length of the plateau, and the tasks that were seen in it. Each value
    of y, if that was varied too, has a style of line and a power law of its own."""
    plt, figure, axes = panels(3, 5, 3.6)
    values = sorted({run["args"][x] for run in runs}, key=float)
    kinds = sorted({run["args"][y] for run in runs}, key=float) if y else [None]
    for kind, style in zip(kinds, itertools.cycle(("-", "--", "-.", ":"))):
        these = [run for run in runs if y is None or run["args"][y] == kind]
        of = f"{y.replace('_', ' ')} {kind}" if y else ""
        for run in these:
            loss = run["metrics"].get(f"{run['args']['learner']}_loss")
            if loss:
                color = plt.cm.viridis(values.index(run["args"][x]) / max(1, len(values) - 1))
                label = ", ".join(filter(None, (f"{x.replace('_', ' ')} {run['args'][x]}", of)))
                axes[0].plot(run["metrics"]["step"], loss, style, color=color, label=label, linewidth=1)
        left = [run for run in these if run["plateau"] is not None]
        xs, steps = [float(run["args"][x]) for run in left], [run["plateau"] for run in left]
        seen = [n * run["args"]["batch"] for n, run in zip(steps, left, strict=True)]
        for axis, ys in zip(axes[1:], (steps, seen), strict=True):
            exponent = power_law(xs, ys)
            law = "" if exponent is None else f"power law with exponent {exponent:.2f}"
            axis.plot(xs, ys, "o" + style, color="black", label=": ".join(filter(None, (of, law))) or None)
    for axis, what in zip(axes, ("cross-entropy in nats", "plateau in meta-steps", "tasks seen in the plateau"), strict=True):
        axis.set(xlabel=x.replace("_", " "), ylabel=what)
    axes[0].set_xlabel("meta-step")
    for axis in axes[1:]:
        axis.set_yscale("log" if any(run["plateau"] for run in runs) else "linear")
        scale(axis, [float(value) for value in values])
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    finish_figure(figure, axes[:1], path)


def draw_heat_maps(path: Path, runs: list[dict[str, Any]], x: str, y: str) -> None:
    """Figures 5.2 and 5.7a: accuracy at the last example, on seen and unseen tasks, and what kind of solution was found."""
    plt, figure, axes = panels(3, 5, 4)
    xs, ys = (sorted({run["args"][name] for run in runs}, key=float) for name in (x, y))
    for run in runs:
        seen, unseen = reached(run, "none"), reached(run, "task")
        kind = "stuck" if run["plateau"] is None else "learns" if unseen > 0.5 * seen else "memorises"
        at = xs.index(run["args"][x]), ys.index(run["args"][y])
        colors = (
            plt.cm.viridis(seen),
            plt.cm.viridis(unseen),
            {"stuck": "0.8", "learns": "tab:green", "memorises": "tab:red"}[kind],
        )
        for axis, color, text in zip(axes, colors, (f"{seen:.2f}", f"{unseen:.2f}", kind), strict=False):
            axis.add_patch(plt.Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, color=color))
            axis.text(*at, text, ha="center", va="center", fontsize=8)
    for axis, title in zip(axes, ("seen tasks", "unseen tasks", "solution"), strict=False):
        axis.set(title=title, xlim=(-0.5, len(xs) - 0.5), ylim=(-0.5, len(ys) - 0.5))
        axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
        axis.set_xticks(range(len(xs)), xs, rotation=45)
        axis.set_yticks(range(len(ys)), ys)
        axis.grid(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_state_size(path: Path, runs: list[dict[str, Any]]) -> None:
    """Figure 5.5: accuracy at the last example of unseen tasks against the size of the state, and against parameters."""
    _, figure, axes = panels(2, 5, 3.6)
    for axis, quantity in zip(axes, ("state_size", "parameters"), strict=False):
        for learner in dict.fromkeys(run["args"]["learner"] for run in runs):
            points = sorted((run[quantity], reached(run, "task")) for run in runs if run["args"]["learner"] == learner)
            axis.plot(*zip(*points, strict=True), "o-", label=LABELS[learner])
        axis.set(xscale="log", xlabel=quantity.replace("_", " "), ylabel="accuracy, last example", ylim=(0, 1.02))
    finish_figure(figure, axes, path)


def print_sweep(runs: list[dict[str, Any]], names: list[str]) -> None:
    """A line for each run."""
    head = [*names, "state size", "parameters", "plateau", "final loss", "first (unseen task)", "seen", "unseen", "dataset"]
    table = [head]
    for run in runs:
        numbers = (run["final_loss"], reached(run, "task", 1), *(reached(run, novelty) for novelty in NOVELTY))
        plain = [*(run["args"][name] for name in names), run["state_size"], run["parameters"], run["plateau"]]
        table.append([*map(str, plain), *(f"{number:.3f}" for number in numbers)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


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
        args = tyro.cli(Args, default=Args(**PRESETS[preset]))
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
        kinds = {f.name: tuple if "tuple" in str(f.type) else Path if "Path" in str(f.type) else None for f in fields(Args)}
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
    """The state of nested dicts and lists of tensors and of things with a state_dict, ready to be saved."""
    if isinstance(keep, dict):
        return {name: take_out(value) for name, value in keep.items()}
    if isinstance(keep, (list, tuple)):
        return [take_out(value) for value in keep]
    return keep.detach() if isinstance(keep, Tensor) else keep.state_dict()


def put_back(keep: Any, state: Any) -> None:
    """The opposite of take_out, in place."""
    if isinstance(keep, dict):
        for name, value in keep.items():
            put_back(value, state[name])
    elif isinstance(keep, (list, tuple)):
        for value, saved in zip(keep, state, strict=True):
            put_back(value, saved)
    elif isinstance(keep, Tensor):
        keep.data.copy_(state)
    else:
        keep.load_state_dict(state)


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nested state, with the names that lead to them."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, (dict, list)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
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
        if self.world > 1:  # the others wait for the folder, and learn its name, which may hold the time
            folder = [self.folder]
            dist.broadcast_object_list(folder)
            self.folder = folder[0]

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
        first = {row["task"]: row["metric"] for row in reversed(rows)}
        shown = [row for row in rows if row["metric"] == first[row["task"]]]
        steps = [step for step in (1, 10, 100, 400, 1000, 10_000) if any(row["step"] == step for row in shown)]
        table = [["task", "novelty", "learner", *(f"after {step}" for step in steps), "at the end"]]
        for task, novelty, learner in dict.fromkeys((row["task"], row["novelty"], row["learner"]) for row in shown):
            these = (row for row in shown if (row["task"], row["novelty"], row["learner"]) == (task, novelty, learner))
            found = {row["step"]: row for row in these}
            cells = [found.get(step) for step in steps] + [found[max(found)]]
            texts = [f"{cell['mean']:.3f} ±{cell['std']:.3f}" if cell else "" for cell in cells]
            table.append([task, novelty, learner, *texts])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        metrics = ", ".join(sorted(set(first.values())))
        self.say(f"\n{metrics}: mean ± standard deviation over {rows[0]['seeds']} runs")
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
TUNED = {"sgd": ("sgd",), "adam": ("adam", "adamw"), "maml": ("sgd",)}  # rules to choose a setting from
KINDS = {"transformer": Transformer, "untrained": Transformer, "lstm": LSTM, "outer_lstm": OuterProductLSTM, "mlp": MLP}
KINDS |= {"vsml": VSML, "vsml_nosym": VSMLWithoutSymmetries}


def check(args: Args) -> None:
    """Refuse what cannot work, before anything is written."""
    counts = "size sequence_length width layers heads key_size grid state_size message_size micro_ticks meta_steps batch"
    for name in f"{counts} test_seeds test_tasks checkpoint_every log_every".split():
        if getattr(args, name) < 1:
            raise Mistake(f"--{name.replace('_', '-')} has to be at least 1.")
    if args.num_tasks != "inf" and not 1 <= args.num_tasks < UNSEEN:
        raise Mistake("--num-tasks has to be at least 1, or inf.")
    if args.num_tasks != "inf" and args.num_tasks > 2**31:
        raise Mistake("--num-tasks is at most 2^31; beyond that say inf.")
    if not 0 <= args.bias <= 1 or not 0 <= (args.bias_end or 0) <= 1:
        raise Mistake("--bias and --bias-end are shares, from 0 to 1.")
    if not args.dataset:
        raise Mistake("--dataset needs at least one dataset.")
    names = {args.learner, *args.baselines}
    if args.test_steps is not None and args.test_steps < 1:
        raise Mistake("--test-steps has to be at least 1.")
    if args.test_steps and args.test_steps > args.sequence_length and names & {"transformer", "untrained"}:
        raise Mistake(
            f"A Transformer has positions for --sequence-length {args.sequence_length} examples, not for {args.test_steps}."
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % world:
        raise Mistake(f"--batch {args.batch} cannot be shared evenly by {world} processes; choose a multiple of {world}.")


def make_learner(name: str, args: Args, num_inputs: int, num_classes: int, setting: Tensor | None = None) -> nn.Module:
    """A learner by its name with fresh parameters. setting: of those in TUNED, found by sweep_rates."""
    if name in TUNED:
        rule, hidden, lr = setting.tolist()
        learner = OnlineSGD(num_inputs, num_classes, OnlineSGD.RULES[int(rule)], int(hidden), lr)
    else:
        learner = KINDS[name](args, num_inputs, num_classes)
    initialise(learner, args.seed)
    return learner


def compiled(run: Run, learner: nn.Module, num_classes: int) -> Any:
    """meta_loss of a learner, compiled as a whole, or, for those that go step by step, each step."""
    if run.compiles and isinstance(learner, Recurrent):
        learner.step = torch.compile(learner.step, dynamic=False)
    whole = run.compiles and not isinstance(learner, (Recurrent, LSTM))
    loss = partial(meta_loss, learner, num_classes=num_classes)
    return torch.compile(loss, dynamic=False) if whole else loss


def load_models(path: Path, changed: Args | None = None) -> tuple[Args, dict[str, nn.Module], tuple[int, int]]:
    """Args, trained learners by name, and their numbers of inputs and classes, from a checkpoint."""
    saved = read_checkpoint(path)["state"]
    args, models, (inputs, classes) = changed or saved_args(path), {}, saved["sizes"].tolist()
    for name, state in saved["models"].items():
        models[name] = make_learner(name, args, inputs, classes, saved["settings"].get(name))
        try:
            models[name].load_state_dict(state)
        except RuntimeError as error:
            raise Mistake(f"The checkpoint's {name} has other sizes than these flags ask for; leave them out.") from error
    return args, models, (inputs, classes)


def main() -> None:
    args = parse_args()
    if args.mode == "sweep":
        return sweep(args)
    experiment(args)


def experiment(args: Args) -> None:
    """One run: meta-train, then meta-test."""
    check(args)
    names = list(dict.fromkeys([args.learner, *args.baselines]))
    if args.mode == "test":
        _, learners, sizes = load_models(args.checkpoint, args)
        missing = [name for name in names if name not in learners]
        if missing:
            raise Mistake(f"{args.checkpoint} holds no learner {missing[0]}; choose from {', '.join(learners)}.")
    run = Run(args)
    if run.compiles and args.mode == "train" and args.meta_steps * args.batch > 100_000:
        compile_draws()  # fewer tasks save less time than compiling takes
    started = time.time()
    if args.mode == "test":
        learners = {name: learners[name].to(run.device) for name in names}
    else:
        datasets = [prepare(args, name, "train", run.device) for name in args.dataset]
        sizes = max(data.num_inputs for data in datasets), max(data.num_classes for data in datasets)
    tests = test_tasks(args, run.device, sizes[0])  # before meta-training, so that a missing dataset is told at once
    if args.mode == "train":
        first = train_tasks(args, datasets[0], sizes[0], last_bias(args))
        with torch.no_grad():
            settings = {name: sweep_rates(args, first, TUNED[name]) for name in names if name in TUNED}
        learners = {name: make_learner(name, args, *sizes, settings.get(name)).to(run.device) for name in names}
        watch = {}
        for (_, novelty), unseen in tests.items():
            if novelty != "none" and unseen.num_classes <= sizes[1]:
                watch.setdefault({"task": "unseen", "domain": "domain"}[novelty], unseen)
        watch = {what: next(test_data(args, unseen, False, 64, args.sequence_length)) for what, unseen in watch.items()}
        meta_train(args, learners, datasets, watch, run, {"settings": settings, "sizes": torch.tensor(sizes)})
    tested = time.time()
    if run.rank > 0:
        return  # meta-testing takes seconds, one process does it
    rows = meta_test(args, learners, tests, sizes[1], run)
    columns, facts = read_metrics(run.folder), {"plateau": None, "final_loss": None}
    for name in (name for name in [*args.baselines, args.learner] if f"{name}_loss" in columns):
        losses = columns[f"{name}_loss"]
        left = left_plateau([int(step) for step in columns["step"]], losses, sizes[1])
        facts = {"plateau": left, "final_loss": sum(losses[-10:]) / len(losses[-10:])}  # the learner's, which comes last
        how = "stayed on its plateau" if left is None else f"left its plateau at meta-step {left}"
        run.say(f"{LABELS[name]}: the loss {how}.")
    draw_meta_loss(run.folder, [name for name in learners if f"{name}_loss" in columns], args.statistics, facts["plateau"])
    run.finish(
        rows,
        seconds={"meta_train": tested - started, "meta_test": time.time() - tested},
        parameters=sum(parameter.numel() for parameter in learners[args.learner].parameters()),
        state_size=state_size(learners[args.learner], args, *sizes),
        **facts,
    )


if __name__ == "__main__":
    run_as_script(main)
