"""GLA: a Transformer that learns to act in its activations, distilled from the learning of many PPO agents.

PPO agents learn, and everything that they do and would do is written down. A Transformer reads pieces of such a life, each
from a policy some updates older than the one before, and predicts the next actions: it learns to learn, and as it skips
updates, faster than PPO. Random projections of observations and actions make many tasks of few, so that it cannot rely on
what they mean.

Kirsch, "Automating AI Research" (2025), chapter 6; Kirsch, Harrison, Freeman, Sohl-Dickstein and Schmidhuber, "Towards
General-Purpose In-Context Learning Agents" (2023).

    Eq. 6.1                -> divergence, meta_loss
    Algorithm 10           -> collect (line 2), draw_projection (line 5), subsample (line 6), meta_train
    Algorithm 11           -> live
    Section 6.2 (augment)  -> Projection
    Figures 6.3 to 6.6     -> meta_test, draw_curves

    python gla.py                                                 # nine hidden goals, two of them never seen: 5 minutes
    python gla.py --envs heading:0 heading:90 heading:180 heading:270 --test-envs heading:45 heading:225
    python gla.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-envs hidden_goal:8

Axes, everywhere: p PPO agents, e copies of an environment that an agent acts in, u updates of PPO, s sequences in a batch or
lifetimes in parallel, t time, a observations, b actions (choices, or dimensions), d all parameters of a network.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from common import envs
from common.envs import Env, EnvError

# ======================================================================================================================
# Args
# ======================================================================================================================
Name = Literal["gla", "one-task", "ppo", "uniform"]


@dataclass
class Args:
    """GLA (chapter 6): collect what PPO does while it learns, distil a faster learner from it, and let it learn elsewhere."""

    preset: Literal["auto", "thesis", "laptop"] = "auto"
    """thesis: the thesis' numbers, as far as it has any; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device."""
    seed: int = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live."""
    compile: bool = True
    """Fuse the Transformer with torch.compile on a GPU (on a CPU it takes as long as it saves)."""
    mode: Literal["train", "test"] = "train"
    """train: collect, meta-train, then meta-test; test: only meta-test a --checkpoint."""
    checkpoint: Path | None = None
    """The checkpoint.pt to meta-test."""
    resume: Path | None = None
    """A run folder to go on with, exactly where it stopped."""
    run_dir: Path = Path("runs")
    """Run folders are made in here."""
    run_name: str | None = None
    """Name of the run folder (default: script-environments-learner-seed-time)."""
    track: bool = False
    """Log to Weights & Biases too (pip install "cleanmeta[track]")."""
    checkpoint_every: int = 500
    """Meta-steps between checkpoints."""

    learner: Name = "gla"
    """What learns at meta-test time. gla: a Transformer for each of --gaps; one-task: one that was distilled from the first of
    --envs alone, as it is (Figure 6.4); ppo: fresh teachers; uniform: a player that does not learn."""
    baselines: tuple[Name, ...] = ("one-task", "ppo", "uniform")
    """What else is meta-trained and meta-tested."""

    envs: tuple[str, ...] = ("ant",)
    """Environments that PPO learns in and the Transformer is meta-trained on (section 6.3: Ant-v4). Names with a capital are
    gymnasium's, any of them; our ant is its Ant-v4, batched."""
    test_envs: tuple[str, ...] = ("Reacher-v4", "half_cheetah", "dm_cartpole")
    """Environments to meta-test in, beside --envs (Figure 6.5)."""

    agents: int = 16
    """p, PPO agents in each environment (not in the thesis)."""
    copies: int = 16
    """e, copies of its environment that an agent acts in (not in the thesis)."""
    updates: int = 500
    """u, updates of each agent (not in the thesis)."""
    rollout: int = 128
    """Steps of every copy between updates (CleanRL: 128)."""
    epochs: int = 4
    """PPO: passes through a rollout (CleanRL: 4)."""
    minibatches: int = 4
    """PPO: parts of a rollout for a step each (CleanRL: 4)."""
    ppo_lr: float = 2.5e-4
    """PPO: Adam's learning rate (CleanRL); falls linearly to zero."""
    discount: float = 0.99
    """PPO: gamma (CleanRL)."""
    gae: float = 0.95
    """PPO: lambda of the generalised advantage estimate (CleanRL)."""
    clip_ratio: float = 0.2
    """PPO: how far probabilities may move (CleanRL)."""
    entropy: float = 0.01
    """PPO: weight of the entropy (CleanRL: 0.01 for choices)."""
    value_weight: float = 0.5
    """PPO: weight of the value's error (CleanRL)."""
    ppo_clip: float = 0.5
    """PPO: largest norm of the gradient (CleanRL)."""
    normalised: bool = True
    """PPO: observations and rewards are divided by their deviations so far (CleanRL, for continuous actions)."""
    ppo_hidden: int = 64
    """PPO: units of both hidden layers of policy and value (CleanRL)."""

    gaps: tuple[int, ...] = (8, 1)
    """g, updates of PPO between one chunk of a sequence and the next (Eq. 6.1), a Transformer for each; 0: the limit in which
    all targets are those of the last policy. one-task has the first."""
    chunk: int = 128
    """Steps of a chunk, at most --rollout (not in the thesis)."""
    chunks: int = 8
    """Chunks of a sequence, from updates 0, g, 2 g, … (not in the thesis)."""
    auxiliary: Literal["none", "gap", "return", "place"] = "none"
    """eta: what the Transformer is told beside its history: the gap, the reward per step of the chunk, or where in its life it
    is (section 6.2). At meta-test time: the gap, the best reward per step of any update of PPO, or where it is."""
    lives: Path | None = None
    """A folder `lives` of an earlier run with the same PPO, to take what was collected from, instead of collecting anew."""
    projected: bool = True
    """Augment: random linear projections of observations and actions, another one for each sequence (section 6.2)."""
    obs_size: int = 64
    """Numbers that observations are projected to (section 6.2)."""
    action_size: int = 16
    """Numbers that actions are projected to (section 6.2)."""

    width: int = 256
    """Width of the Transformer (not in the thesis)."""
    layers: int = 4
    """Its layers (not in the thesis)."""
    heads: int = 8
    """Its heads (not in the thesis)."""
    meta_steps: int = 50_000
    """Steps of meta-training (not in the thesis)."""
    batch: int = 64
    """s, sequences in a step, divided among --envs as evenly as can be (not in the thesis)."""
    lr: float = 3e-4
    """AdamW's learning rate (not in the thesis); falls to a tenth."""
    clip: float = 1.0
    """Largest norm of the gradient (not in the thesis)."""

    test_seeds: int = 32
    """Lifetimes in each environment (Figures 6.5 and 6.6: 32)."""
    test_steps: int | None = None
    """Steps of a lifetime (default: as long as a sequence)."""


LAPTOP = dict(
    envs=tuple(f"hidden_goal:{goal}" for goal in (0, 2, 3, 4, 5, 6, 7)),
    test_envs=("hidden_goal:1", "hidden_goal:8"),  # a side and a corner
    agents=128,
    copies=6,  # learns in eight gaps what a student can tell apart (README)
    updates=64,
    rollout=16,
    epochs=1,  # learns over all of eight gaps
    minibatches=1,
    ppo_lr=2e-2,  # small networks
    entropy=0.0,
    normalised=False,  # goals are one-hot, rewards 0 or 1
    ppo_hidden=16,
    gaps=(0, 8, 1),
    chunk=16,
    width=64,
    layers=2,
    heads=4,
    meta_steps=2_200,  # four minutes
    batch=14,  # many small steps teach more than few large ones (README)
    lr=1e-3,  # few steps
    obs_size=16,
    action_size=4,
    test_seeds=256,
)
PRESETS = {"thesis": {}, "laptop": LAPTOP}


# ======================================================================================================================
# The learner
# ======================================================================================================================
class Block(nn.Module):
    """Attention to what came before and an MLP, both behind layer normalisation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (s, t, n); past: keys and values (2, s, heads, t', n / heads) of earlier steps. Returns also those to keep."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        kv = torch.stack([k, v])
        if past is not None:
            kv = torch.cat([past, kv], 3)
        mixed = F.scaled_dot_product_attention(q, *kv, is_causal=past is None and x.shape[1] > 1)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x)), kv


class GLA(nn.Module):
    """pi_theta of Eq. 6.1 (Figure 6.2). A token is the transition before (observation, action, reward, end), the observation
    that it led to, and eta. It answers with a projected action and the logarithm of a deviation."""

    def __init__(self, args: Args):
        super().__init__()
        self.context = args.chunks * args.chunk
        self.embed = nn.Linear(2 * args.obs_size + args.action_size + 3, args.width)
        self.position = nn.Parameter(torch.zeros(self.context, args.width))
        self.blocks = nn.ModuleList(Block(args.width, args.heads) for _ in range(args.layers))
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, args.action_size + 1)
        self.register_buffer("best", torch.zeros(()))  # reward per step that PPO came to

    def forward(self, token: Tensor, cache: list[Tensor] | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """token (s, t, n). Returns projected actions (s, t, b'), log deviations (s, t), and keys and values to keep."""
        earlier = cache[0].shape[3] if cache else 0
        x = self.embed(token) + self.position[earlier : earlier + token.shape[1]]
        kept = []
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x, kv = block(x, past)
            kept.append(kv)
        action, log_std = self.head(self.norm(x)).split([self.head.out_features - 1, 1], -1)
        return action, log_std[..., 0], kept


class Projection(NamedTuple):
    """How a task looks: observations (s, a, obs_size) and actions (s, b, action_size) (section 6.2).

    An action a, or a choice as a one-hot vector, is seen as a P, with P of orthonormal rows; the Transformer answers with y in
    the projected space. A policy there, a normal distribution N(y, sigma^2 I), is one of native actions too: as P P^T = I, the
    part of it that lies in the rows of P is N(y P^T, sigma^2 I), whatever happens elsewhere, where actions have no effect. So
    recorded and predicted policies are compared in the native space, as normal distributions of mean y P^T. For choices, y P^T
    are the logits: each choice has a direction, and its logit is how far y points there. Rows are drawn anew for each sequence,
    so what a direction does can only be found out; those of choices are rows of the identity, which are learned soonest.
    """

    obs: Tensor
    action: Tensor


def draw_projection(args: Args, env: Env, ids: Tensor) -> Projection:
    """Projections of tasks, a pure function of their ids (s,) and --seed. Observations: normal, of variance 1 / a; actions:
    random orthonormal rows, for choices of the identity. Without --projected observation and action come first, then zeros."""
    a, b = env.obs_size, env.num_actions or env.action_size
    if not args.projected:
        obs, action = torch.eye(a, args.obs_size), torch.eye(b, args.action_size)
        return Projection(*(x.expand(len(ids), -1, -1).to(ids.device) for x in (obs, action)))
    obs, action = [], []
    for number in ids.tolist():
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + number)
        obs.append(torch.randn(a, args.obs_size, generator=generator) / math.sqrt(a))
        if env.num_actions:
            action.append(torch.eye(args.action_size)[torch.randperm(args.action_size, generator=generator)[:b]])
        else:
            action.append(torch.randn(args.action_size, b, generator=generator))
    action = torch.stack(action) if env.num_actions else torch.linalg.qr(torch.stack(action))[0].mT
    return Projection(torch.stack(obs).to(ids.device), action.to(ids.device))


class Policy(NamedTuple):
    """Distributions of native actions: logits (..., b) of choices, or means (..., b) and log deviations (..., b)."""

    mean: Tensor
    log_std: Tensor | None  # None: choices

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Actions (...) int64 with uniform (..., 1), or (..., b) with normal (..., b)."""
        if self.log_std is None:
            chances = self.mean.softmax(-1).cumsum(-1)
            return (chances < uniform).sum(-1).clamp(max=self.mean.shape[-1] - 1)
        return self.mean + self.log_std.exp() * normal

    def log_prob(self, action: Tensor) -> Tensor:
        if self.log_std is None:
            return self.mean.log_softmax(-1).gather(-1, action[..., None])[..., 0]
        return -((action - self.mean) ** 2 * (-2 * self.log_std).exp() / 2 + self.log_std + math.log(2 * math.pi) / 2).sum(-1)

    def entropy(self) -> Tensor:
        if self.log_std is None:
            return -(self.mean.softmax(-1) * self.mean.log_softmax(-1)).sum(-1)
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def kl(p: Policy, q: Policy) -> Tensor:
    """KL(p || q) in nats (...)."""
    if p.log_std is None:
        log_p, log_q = p.mean.log_softmax(-1), q.mean.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    spread = (2 * (p.log_std - q.log_std)).exp()
    return (q.log_std - p.log_std + (spread + (p.mean - q.mean) ** 2 * (-2 * q.log_std).exp() - 1) / 2).sum(-1)


def divergence(p: Policy, q: Policy) -> Tensor:
    """D of Eq. 6.1: the sum of forward and reverse KL (...)."""
    return kl(p, q) + kl(q, p)


def native(action: Tensor, log_std: Tensor, projection: Projection, discrete: bool) -> Policy:
    """The policy that a Transformer's answer is in its environment; see Projection. action (s, t, b'), log_std (s, t)."""
    mean = action @ projection.action.mT
    return Policy(mean, None if discrete else log_std[..., None].expand_as(mean))


def tokens(args: Args, projection: Projection, steps: "Steps", eta: Tensor) -> Tensor:
    """What the Transformer reads at each step (s, t, n). steps (s, t, ...): the last action and its reward are not read."""
    obs = steps.obs @ projection.obs
    action = steps.action @ projection.action  # as one-hot where it was a choice
    before = torch.cat([obs, action, steps.reward[..., None], steps.ended[..., None]], -1)
    return torch.cat([F.pad(before[:, :-1], (0, 0, 1, 0)), obs, eta[..., None]], -1)


# ======================================================================================================================
# The teacher
# ======================================================================================================================
class Steps(NamedTuple):
    """Steps that somebody took, in order (..., t, ...)."""

    obs: Tensor  # (..., t, a), before
    action: Tensor  # (..., t, b), one-hot where it was a choice
    reward: Tensor  # (..., t)
    ended: Tensor  # (..., t), whether the episode did


class Lives(NamedTuple):
    """What PPO agents did while they learned in one environment: the first copy of each, by the age of its policy."""

    steps: Steps  # (p, u, t, ...)
    mean: Tensor  # (p, u, t, b), of the policy at the time
    log_std: Tensor  # (p, u, t, b)
    last_mean: Tensor  # (p, u, t, b), of the last policy, in the same states
    last_log_std: Tensor  # (p, u, t, b)
    curve: Tensor  # (p, u), reward per step of all copies

    def policy(self, last: bool, discrete: bool, index: tuple[Tensor, ...]) -> Policy:
        mean, log_std = (self.last_mean, self.last_log_std) if last else (self.mean, self.log_std)
        return Policy(mean[index], None if discrete else log_std[index])

    def to(self, device: torch.device) -> "Lives":
        """In a GPU's memory; on a CPU they stay on the disk."""
        return Lives(Steps(*(x.to(device) for x in self.steps)), *(x.to(device) for x in self[1:]))


class Teacher:
    """Networks of p PPO agents, every parameter with p as its first axis: two hidden layers of tanh for the policy, two for the
    value (CleanRL)."""

    def __init__(self, args: Args, env: Env, generator: torch.Generator):
        self.discrete, self.b = env.num_actions is not None, env.num_actions or env.action_size
        n, p = args.ppo_hidden, args.agents
        self.obs_moments, self.return_moments = (no_moments(p, size, env.device) for size in (env.obs_size, 1))
        sizes = {"policy": ((env.obs_size, n, n, self.b), 0.01), "value": ((env.obs_size, n, n, 1), 1.0)}
        self.params = {}
        for name, (widths, last) in sizes.items():
            for i, (a, b) in enumerate(pairwise(widths)):
                weight = torch.randn(p, max(a, b), min(a, b), generator=generator)
                weight = torch.linalg.qr(weight)[0] if a >= b else torch.linalg.qr(weight)[0].mT
                gain = last if i == len(widths) - 2 else math.sqrt(2)
                self.params[f"{name} weight {i}"] = (gain * weight).to(env.device)
                self.params[f"{name} bias {i}"] = torch.zeros(p, 1, b, device=env.device)
        self.params["log_std"] = torch.zeros(p, 1, self.b, device=env.device)
        for value in self.params.values():
            value.requires_grad_()

    def net(self, name: str, obs: Tensor) -> Tensor:
        """obs (p, ..., a) -> (p, ..., b)."""
        x = obs.flatten(1, -2)
        for i in range(3):
            x = torch.baddbmm(self.params[f"{name} bias {i}"], x, self.params[f"{name} weight {i}"])
            x = x.tanh() if i < 2 else x
        return x.unflatten(1, obs.shape[1:-1])

    def policy(self, obs: Tensor) -> Policy:
        mean = self.net("policy", obs)
        log_std = self.params["log_std"].view(-1, *[1] * (mean.ndim - 2), self.b)
        return Policy(mean, None if self.discrete else log_std.expand_as(mean))


def no_moments(p: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """Mean, variance and count of nothing, for each agent."""
    mean = torch.zeros(p, 1, size, device=device)
    return {"mean": mean, "var": torch.ones_like(mean), "count": torch.full((), 1e-4, device=device)}


def update_moments(moments: dict[str, Tensor], x: Tensor) -> None:
    """Take in x (p, e, n), in place (Chan et al. 1979)."""
    e, off = x.shape[1], x.mean(1, keepdim=True) - moments["mean"]
    total = moments["count"] + e
    squares = moments["var"] * moments["count"] + x.var(1, unbiased=False, keepdim=True) * e
    moments["var"].copy_((squares + off**2 * moments["count"] * e / total) / total)
    moments["mean"] += off * e / total
    moments["count"] += e


def standardise(moments: dict[str, Tensor], x: Tensor, centred: bool) -> Tensor:
    """x (p, ..., n) by the deviation so far, at most ten of them (CleanRL)."""
    mean, var = (moments[name].view(-1, *[1] * (x.ndim - 2), x.shape[-1]) for name in ("mean", "var"))
    return ((x - mean if centred else x) / (var + 1e-8).sqrt()).clamp(-10, 10)


def collect(args: Args, name: str, device: torch.device, bar: Callable, path: Path | None = None) -> Lives:
    """Algorithm 10, line 2: p agents at once learn by PPO (Schulman et al. 2017) in an environment, with CleanRL's details, and
    everything that the first copy of each does is written down, into a file at `path` where there is one. A collection that
    was cut off goes on; an environment of gymnasium's begins a new episode then."""
    p, e, t = args.agents, args.copies, args.rollout
    env = make_env(name, p * e, device)
    teacher = Teacher(args, env, torch.default_generator)
    adam = torch.optim.Adam(teacher.params.values(), args.ppo_lr, eps=1e-5)
    world, obs = env.reset(torch.rand(p * e, env.lifetime_draws, device=device))
    returns = torch.zeros(p, e, 1, device=device)
    keep = {
        "teacher": teacher.params,
        "adam": adam,
        "moments": [teacher.obs_moments, teacher.return_moments],
        "returns": returns,
    }
    if env.resumable:
        keep |= {"world": world, "obs": obs}
    first = restore(args, env, path, keep)
    lives = room(args, env, path)
    bar(first)
    for update in range(first, args.updates):
        adam.param_groups[0]["lr"] = args.ppo_lr * (1 - update / args.updates)
        world, obs, told, before, earned = roll_out(args, teacher, env, world, obs, returns)
        advantage, value = advantages(args, teacher, told)
        log_before = before.log_prob(told["action"])
        data = [told["seen"], told["action"], log_before, advantage, value, value + advantage]
        for _ in range(args.epochs):
            for part in torch.randperm(e * t, device=device).chunk(args.minibatches):
                teach(args, teacher, adam, *(x.flatten(1, 2)[:, part] for x in data))
        action = F.one_hot(told["action"], teacher.b).float() if teacher.discrete else told["action"]
        keep_first(lives.steps, update, (earned["obs"], action, earned["reward"], told["ended"]))
        keep_first((lives.mean, lives.log_std), update, before)
        lives.curve[:, update] = earned["reward"].mean((1, 2))
        bar(1)
        if path and (update + 1) % max(1, args.updates // 20) == 0 and update + 1 < args.updates:
            store(path, keep | ({"world": world, "obs": obs} if "obs" in keep else {}), update + 1)
    for update in range(args.updates if first < args.updates else 0):
        with torch.no_grad():
            last = teacher.policy(see(args, teacher, lives.steps.obs[:, update, None].to(device)))
        keep_first((lives.last_mean, lives.last_log_std), update, last)
    if path and first < args.updates:
        store(path, keep, args.updates)
    env.close()
    return lives


@torch.no_grad()
def roll_out(
    args: Args, teacher: Teacher, env: Env, world: envs.State, obs: Tensor, returns: Tensor
) -> tuple[envs.State, Tensor, dict[str, Tensor], Policy, dict[str, Tensor]]:
    """Steps of every agent in all its copies until the next update. Returns where they are then, what PPO is told (p, e, t,
    ...), the policies that acted, and observations and rewards as they were. Changes moments and returns (p, e, 1) in place."""
    told, policies, earned = [], [], []
    for _ in range(args.rollout):
        native_obs = obs.unflatten(0, (args.agents, args.copies))
        if args.normalised:
            update_moments(teacher.obs_moments, native_obs)
        seen = see(args, teacher, native_obs)
        policy, shape = teacher.policy(seen), seen.shape[:2]
        action = policy.sample(torch.rand(*shape, 1, device=obs.device), torch.randn(*shape, teacher.b, device=obs.device))
        world, step = env.step(world, action.flatten(0, 1), torch.rand(env.num_envs, env.num_draws, device=obs.device))
        reward, terminated, truncated = (x.unflatten(0, shape).float() for x in step[1:4])
        last_obs, ended, obs = see(args, teacher, step.final_obs.unflatten(0, shape)), terminated + truncated, step.obs
        earned.append({"obs": native_obs, "reward": reward})
        if args.normalised:
            returns.copy_(args.discount * returns + reward[..., None])
            update_moments(teacher.return_moments, returns)
            reward = standardise(teacher.return_moments, reward[..., None], centred=False)[..., 0]
            returns *= 1 - ended[..., None]
        what = {"seen": seen, "action": action, "reward": reward, "terminated": terminated, "ended": ended}
        told.append(what | {"last_seen": last_obs})
        policies.append(policy)
    told, earned = ({name: torch.stack([x[name] for x in steps], 2) for name in steps[0]} for steps in (told, earned))
    acted = Policy(*(torch.stack(x, 2) if x[0] is not None else None for x in zip(*policies, strict=True)))
    return world, obs, told, acted, earned


@torch.no_grad()
def advantages(args: Args, teacher: Teacher, told: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2016) and values (p, e, t). Time limits bootstrap."""
    value, next_value = teacher.net("value", told["seen"])[..., 0], teacher.net("value", told["last_seen"])[..., 0]
    delta = told["reward"] + args.discount * (1 - told["terminated"]) * next_value - value
    advantage, after = torch.zeros_like(value), 0
    for k in reversed(range(args.rollout)):
        after = delta[:, :, k] + args.discount * args.gae * (1 - told["ended"][:, :, k]) * after
        advantage[:, :, k] = after
    return advantage, value


@torch.no_grad()
def keep_first(lives: Iterable[Tensor], update: int, told: Iterable[Tensor | None]) -> None:
    """Of what is told (p, e, t, ...), where it is, write down the first copy's (p, u, t, ...)."""
    for kept, x in zip(lives, told, strict=True):
        if x is not None:
            kept[:, update] = x[:, 0]


def see(args: Args, teacher: Teacher, obs: Tensor) -> Tensor:
    """Observations (p, ..., a) as PPO is shown them."""
    return standardise(teacher.obs_moments, obs, centred=True) if args.normalised else obs


def teach(
    args: Args, teacher: Teacher, adam: torch.optim.Optimizer, obs: Tensor, action: Tensor, log_before: Tensor,
    advantage: Tensor, value: Tensor, target: Tensor,
) -> None:  # fmt: skip
    """A step of PPO on a minibatch (p, m, ...) of each agent."""
    policy, new_value = teacher.policy(obs), teacher.net("value", obs)[..., 0]
    ratio = (policy.log_prob(action) - log_before).exp()
    advantage = (advantage - advantage.mean(1, keepdim=True)) / (advantage.std(1, keepdim=True) + 1e-8)
    near = ratio.clamp(1 - args.clip_ratio, 1 + args.clip_ratio)
    near_value = value + (new_value - value).clamp(-args.clip_ratio, args.clip_ratio)
    error = torch.maximum((new_value - target) ** 2, (near_value - target) ** 2) / 2
    loss = -torch.minimum(ratio * advantage, near * advantage) + args.value_weight * error - args.entropy * policy.entropy()
    adam.zero_grad()
    loss.mean(1).sum().backward()
    grads = [x.grad for x in teacher.params.values() if x.grad is not None]
    norm = sum((g**2).flatten(1).sum(1) for g in grads).sqrt()  # of each agent
    scale = (args.ppo_clip / (norm + 1e-6)).clamp(max=1)
    for g in grads:
        g *= scale[:, None, None]
    adam.step()


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
def live(args: Args, gap: int, model: GLA, env: Env, projection: Projection, steps: int, generator: torch.Generator) -> Tensor:
    """Algorithm 11: K steps in every environment, with a history that grows by each transition, and nothing else that changes.
    Returns rewards (s, t). Beyond its positions the Transformer forgets the older half of what it has read."""
    s, discrete, b = env.num_envs, env.num_actions is not None, env.num_actions or env.action_size
    draw = partial(torch.rand, s, generator=generator, device=env.device)
    world, obs = env.reset(draw(env.lifetime_draws))
    action, reward, ended = torch.zeros(s, b, device=env.device), *torch.zeros(2, s, device=env.device)
    last_obs, cache, history, rewards = torch.zeros_like(obs), None, [], []
    for step in range(steps):
        before = torch.cat([(last_obs[:, None] @ projection.obs)[:, 0], (action[:, None] @ projection.action)[:, 0]], -1)
        eta = auxiliary(args, gap, model, torch.full((s, 1), step / steps, device=env.device))
        token = torch.cat([before, reward[:, None], ended[:, None], (obs[:, None] @ projection.obs)[:, 0], eta], -1)
        history.append(token)
        if len(history) > model.context:
            history, cache = history[-(model.context // 2) :], None
        read = torch.stack(history, 1) if cache is None else token[:, None]
        answer, log_std, cache = model(read, cache)
        policy = native(answer[:, -1:], log_std[:, -1:], projection, discrete)
        policy = Policy(*(x[:, 0] if x is not None else None for x in policy))
        normal = torch.randn(s, b, generator=generator, device=env.device)
        chosen = policy.sample(draw(1), normal)
        world, what = env.step(world, chosen, draw(env.num_draws))
        last_obs, obs = obs, what.obs
        action = F.one_hot(chosen, b).float() if discrete else chosen
        reward, ended = what.reward, (what.terminated | what.truncated).float()
        rewards.append(reward)
    return torch.stack(rewards, 1)


def auxiliary(args: Args, gap: int, model: "GLA", place: Tensor, reward: Tensor | None = None) -> Tensor:
    """eta (section 6.2), what the Transformer is told of how much better it should get. place: from 0 to 1 in a life; reward:
    per step, of the chunk, in meta-training."""
    if args.auxiliary == "place":
        return place
    if args.auxiliary == "return":
        return model.best.expand_as(place) if reward is None else reward.expand_as(place)
    return torch.full_like(place, gap / 10 if args.auxiliary == "gap" else 0.0)


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
def subsample(args: Args, gap: int, lives: Lives, discrete: bool, count: int, own: Tensor) -> tuple[Steps, Policy]:
    """Algorithm 10, line 6: chunks from updates 0, g, 2 g, … of as many agents' lives, one after the other, and the policies to
    be predicted; of them those that are this process' `own`. With gap 0 the updates are consecutive, and the policy is the
    last one in all of them."""
    p, u, t = lives.steps.reward.shape
    agent = torch.randint(p, (count, 1, 1), device=lives.curve.device)[own]
    start = torch.randint(t - args.chunk + 1, (count, args.chunks, 1), device=agent.device)[own]
    update = (max(gap, 1) * torch.arange(args.chunks, device=agent.device)).clamp(max=u - 1)[None, :, None]
    index = agent, update, start + torch.arange(args.chunk, device=agent.device)
    policy = lives.policy(gap == 0, discrete, index)
    steps = Steps(*(x[index].flatten(1, 2) for x in lives.steps))
    return steps, Policy(*(x.flatten(1, 2) if x is not None else None for x in policy))


def meta_loss(args: Args, gap: int, model: GLA, tasks: list[tuple[Projection, Steps, Policy]]) -> Tensor:
    """Minus J of Eq. 6.1, per step (t,): all chunks are predicted from what came before. tasks: of each environment sequences
    (s, t, ...), how they are to look, and the policies to be predicted."""
    read = []
    for projection, steps, _ in tasks:
        place = torch.linspace(0, 1, steps.reward.shape[1], device=steps.reward.device).expand_as(steps.reward)
        reward = steps.reward.unflatten(1, (args.chunks, -1)).mean(-1).repeat_interleave(args.chunk, 1)
        read.append(tokens(args, projection, steps, auxiliary(args, gap, model, place, reward)))
    sizes = [len(token) for token in read]
    answers = zip(*(x.split(sizes) for x in model(torch.cat(read))[:2]), tasks, strict=True)
    losses = [divergence(p, native(y, log_std, look, p.log_std is None)) for y, log_std, (look, _, p) in answers]
    return torch.cat(losses).mean(0)


class Student(NamedTuple):
    """A Transformer, the gap that it learns to bridge, the environments whose teachers it learns from, and flags of its own."""

    model: GLA
    gap: int
    envs: tuple[str, ...]
    args: Args


def meta_train(args: Args, students: dict[str, Student], lives: dict[str, Lives], run: "Run", keep: dict[str, Any]) -> None:
    """Algorithm 10, for students side by side. Changes their models in place. keep: these, and their optimisers."""
    adam, places = keep["adam"], {name: make_env(name, 1, run.device) for name in lives}
    fuse = partial(torch.compile, dynamic=False) if run.compiles and run.device.type == "cuda" else lambda model: model
    fused = {name: fuse(student.model) for name, student in students.items()}
    for step in run.steps(args.meta_steps, keep):
        log = {}
        for name, (model, gap, names, own_args) in students.items():
            if step == 0:
                model.best.copy_(max(lives[name].curve.mean(0).max() for name in names))
            tasks, ids = [], args.batch * step + torch.arange(args.batch, device=run.device)
            for place, these in zip(names, ids.tensor_split(len(names)), strict=True):
                own = share(len(these)).to(run.device)
                projection = draw_projection(own_args, places[place], these[own])  # line 5
                discrete = places[place].num_actions is not None
                tasks.append((projection, *subsample(args, gap, lives[place], discrete, len(these), own)))  # line 6
            loss = meta_loss(args, gap, fused[name], tasks).mean()
            adam[name].zero_grad()
            loss.backward()
            average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            adam[name].param_groups[0]["lr"] = args.lr * (1 - 0.9 * step / args.meta_steps)
            adam[name].step()  # line 7
            log[name.replace(", g = ", "_gap_") + "_divergence"] = all_reduce_mean(loss.detach().clone())
        run.log(step, log)


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def meta_test(args: Args, students: dict[str, Student], lives: dict[str, Lives], run: "Run") -> list[dict[str, Any]]:
    """Lifetimes of every learner in every environment, with projections that were never seen: reward per step since the last
    point. PPO's points are its updates, from --agents agents, as far as it learns."""
    rows = []
    steps = args.test_steps or args.chunks * args.chunk
    names = dict.fromkeys([args.learner, *args.baselines])
    places = dict.fromkeys([*args.envs, *args.test_envs])
    ids = UNSEEN + torch.arange(args.test_seeds, device=run.device)
    bar = tqdm(total=len(places) * (len(students) + len(names)), desc="meta-test", disable=run.rank > 0)
    for number, name in enumerate(places):
        novelty = "none" if name in args.envs else "task" if base(name) in map(base, args.envs) else "domain"
        env = make_env(name, args.test_seeds, run.device)
        earned = {}
        for learner, student in students.items():
            generator = torch.Generator(run.device).manual_seed(1009 * args.seed + number)
            with torch.no_grad():
                projection = draw_projection(student.args, env, ids)
                earned[learner] = live(args, student.gap, student.model, env, projection, steps, generator)
            bar.update()
        if "uniform" in names:
            earned["uniform"] = uniform_player(args, env, steps, torch.Generator(run.device).manual_seed(number))
        env.close()
        for learner, reward in earned.items():
            student = students.get(learner)
            known = student and name in student.envs
            new = novelty
            if student and novelty == "none" and (student.args.projected or not known):
                new = "task"  # another projection, or the teachers of others
            before = 0
            for step in sorted({-(-steps * part // 32) for part in range(1, 33)}):
                rows.append(result_row(learner, name, new, "reward_per_step", step, reward[:, before:step].mean(1)))
                before = step
        if "ppo" in names:
            torch.manual_seed(args.seed + 1_000_003 * (number + 1))
            if name not in lives:
                with tqdm(total=args.updates, desc=f"PPO in {name}", disable=run.rank > 0) as own_bar:
                    lives = lives | {name: collect(args, name, run.device, own_bar.update)}
            curve = lives[name].curve
            for update in range(args.updates):
                step = (update + 1) * args.rollout * args.copies
                rows.append(result_row("ppo", name, novelty, "reward_per_step", step, curve[:, update]))
        bar.update(len(names))
    return rows


UNSEEN = 2**40  # ids of projections that meta-training never comes to


def uniform_player(args: Args, env: Env, steps: int, generator: torch.Generator) -> Tensor:
    """Rewards (s, t) of actions that are drawn uniformly."""
    draw = partial(torch.rand, env.num_envs, generator=generator, device=env.device)
    world, _ = env.reset(draw(env.lifetime_draws))
    rewards = []
    for _ in range(steps):
        action = (draw(1)[:, 0] * env.num_actions).long() if env.num_actions else 2 * draw(env.action_size) - 1
        world, step = env.step(world, action, draw(env.num_draws))
        rewards.append(step.reward)
    return torch.stack(rewards, 1)


def base(name: str) -> str:
    """An environment without its task."""
    return envs.base_name(name)


def draw_curves(path: Path, rows: list[dict[str, Any]], known: tuple[str, ...], gap: int) -> None:
    """Figures 6.3 to 6.6: one panel for each environment, a line for each learner. Shaded: 95 % confidence interval. gap: that
    of the first Transformer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    labels = LABELS | {"gla": f"GLA, g = {gap}"}
    columns = min(len(tasks), 5)
    lines = -(-len(tasks) // columns)
    size = (1 + 2.8 * columns, 1 + 2.5 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        these = [row for row in rows if row["task"] == task]
        for number, learner in enumerate(dict.fromkeys(row["learner"] for row in these)):
            line = [row for row in these if row["learner"] == learner]
            x, mean = [row["step"] for row in line], torch.tensor([row["mean"] for row in line])
            error = 1.96 * torch.tensor([row["std"] for row in line]) / math.sqrt(line[0]["seeds"])
            colour = {"ppo": "k", "uniform": "0.6", "one-task": "C1"}.get(learner, f"C{(0, 2, 4, 5)[number % 4]}")
            label = labels.get(learner, learner.replace("gla", "GLA")).replace("g = 0", "targets of the last policy")
            axis.plot(x, mean, color=colour, label=label)
            axis.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
        title = f"{task} ({'meta-trained on' if task in known else 'never seen'})"
        axis.set(title=title, xlabel="environment steps", ylabel="reward per step")
        axis.set_xscale("log", base=2)
        axis.title.set_fontsize("small")
    title = "shaded: 95 % confidence interval"
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, title=title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


LABELS = {"ppo": "PPO", "uniform": "uniform-random player", "one-task": "GLA, one task"}


# ======================================================================================================================
# The run
# ======================================================================================================================
SCRIPT = Path(__file__).stem
USER_ERRORS = (EnvError,)
NAMED_AFTER = ("learner",)  # the flags that name a run's folder


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


def make_env(name: str, count: int, device: torch.device | str = "cpu") -> Env:
    """An environment; the observations of those that are ours are scaled to about one."""
    env = envs.make(name, count, device, scaled=True, parallel=1 < count <= 4 * (os.cpu_count() or 1))
    if not env.obs_size:
        raise Mistake(f"GLA projects observations, and {name} has none; choose another environment.")
    return env


def check(args: Args, world: int) -> None:
    """Refuse what cannot work, before anything is written."""
    counts = "agents copies updates rollout epochs minibatches ppo_hidden chunk chunks obs_size action_size width layers heads"
    counts += " meta_steps batch test_seeds test_steps checkpoint_every"
    for name in counts.split():
        if (number := getattr(args, name)) is not None and number < 1:
            raise Mistake(f"--{name.replace('_', '-')} has to be at least 1.")
    for name in ("ppo_lr", "lr", "clip", "ppo_clip", "clip_ratio"):
        if not 0 < getattr(args, name) < math.inf:
            raise Mistake(f"--{name.replace('_', '-')} has to be above 0.")
    if not args.envs:
        raise Mistake("--envs needs at least one environment.")
    if not args.gaps or min(args.gaps) < 0:
        raise Mistake("--gaps needs at least one number, none of them below 0.")
    if args.chunk > args.rollout:
        raise Mistake(f"--chunk {args.chunk} is longer than --rollout {args.rollout}, what PPO does between updates.")
    if args.minibatches > args.rollout * args.copies:
        raise Mistake("--minibatches are more than the steps of a rollout.")
    if (args.chunks - 1) * max(args.gaps) >= args.updates:
        last = (args.chunks - 1) * max(args.gaps)
        raise Mistake(
            f"A sequence would reach update {last}, and there are {args.updates}; take fewer --chunks or smaller --gaps."
        )
    if args.width % args.heads:
        raise Mistake(f"--width {args.width} cannot be divided into {args.heads} heads.")
    if args.batch < len(args.envs):
        raise Mistake(f"--batch {args.batch} is not a sequence for each of {len(args.envs)} environments.")
    if world > 1 and args.batch % (len(args.envs) * world):
        raise Mistake(f"--batch {args.batch} cannot be shared equally by {len(args.envs)} environments and {world} processes.")
    for name in {*args.envs, *args.test_envs}:
        env = make_env(name, 1)
        if not {"gla", "one-task"} & {args.learner, *args.baselines}:
            continue
        if (env.num_actions or env.action_size) > args.action_size:
            raise Mistake(f"--action-size {args.action_size} is too small for {name}.")
        if not (args.projected and "one-task" not in (args.learner, *args.baselines)) and env.obs_size > args.obs_size:
            raise Mistake(f"--obs-size {args.obs_size} is too small for {name}, without projections.")


def share(count: int) -> Tensor:
    """Which of as many sequences this process has."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return torch.arange(count)[rank::world]


def average_gradients(model: nn.Module) -> None:
    """The mean of all processes' gradients, in place."""
    if dist.is_initialized():
        grads = [p.grad for p in model.parameters()]
        mean = all_reduce_mean(torch.cat([g.flatten() for g in grads]))
        for g, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


COLLECTED = ("agents", "copies", "updates", "rollout", "epochs", "minibatches", "ppo_lr", "discount", "gae")
COLLECTED += (
    "clip_ratio",
    "entropy",
    "value_weight",
    "ppo_clip",
    "ppo_hidden",
    "normalised",
)  # flags that decide what lives are


def life_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', '-').replace('/', '-')}.bin"


def life_bytes(args: Args, env: Env) -> int:
    return 4 * sum(map(math.prod, shapes(args, env)))


def read_progress(args: Args, env: Env, path: Path) -> dict[str, Any]:
    """How far a collection is, and what it needs to go on. Raises Mistake where it is damaged."""
    try:
        saved = torch.load(path.with_suffix(".pt"), map_location="cpu", weights_only=True)
        if path.stat().st_size != life_bytes(args, env) or not 0 < saved["updates"] <= args.updates:
            raise ValueError
        return saved
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise Mistake(f"{path} is damaged; delete it and {path.with_suffix('.pt').name} to collect anew.") from error


def room(args: Args, env: Env, path: Path | None, new: bool = True) -> Lives:
    """Room for lives: a file of their full size, mapped into memory, or without a path memory. Where they are not `new`, what
    is in the file."""
    sizes = [math.prod(shape) for shape in shapes(args, env)]
    flat = torch.from_file(str(path), shared=new, size=sum(sizes)) if path else torch.zeros(sum(sizes))
    parts = [x.view(shape) for x, shape in zip(flat.split(sizes), shapes(args, env), strict=True)]
    return Lives(Steps(*parts[:4]), *parts[4:])


def store(path: Path, keep: dict[str, Any], updates: int) -> None:
    """Write down how far a collection is, and what it needs to go on, once the lives themselves are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    rng = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    state = {"updates": updates, "state": take_out(keep), "rng": rng}
    write_whole(path.with_suffix(".pt"), lambda file: torch.save(state, file))


def restore(args: Args, env: Env, path: Path | None, keep: dict[str, Any]) -> int:
    """Go back to where a collection was cut off, and return its number of updates, 0 where there is none."""
    if path is None or not path.with_suffix(".pt").exists():
        return 0
    saved = read_progress(args, env, path)
    try:
        put_back(keep, saved["state"])
        torch.set_rng_state(saved["rng"][0])
        if len(saved["rng"]) > 1 and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["rng"][1:])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise Mistake(f"{path} is of other flags; delete it and {path.with_suffix('.pt').name} to collect anew.") from error
    return saved["updates"]


def match_lives(args: Args) -> None:
    """Refuse --lives that are not there, not whole, or of other flags."""
    try:
        found = dict(json.loads((args.lives / "lives.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise Mistake(f"There are no lives in {args.lives}; give the folder `lives` of a run.") from error
    for name in COLLECTED:
        if found.get(name) != getattr(args, name):
            flag, value = name.replace("_", "-"), getattr(args, name)
            raise Mistake(f"The lives in {args.lives} were collected with --{flag} {found.get(name)}, not {value}.")
    for name in args.envs:
        path, env = life_file(args.lives, name), make_env(name, 1)
        there = path.is_file() and path.with_suffix(".pt").is_file()
        if not there or read_progress(args, env, path)["updates"] < args.updates:
            raise Mistake(f"The lives of {name} in {args.lives} are not there or not whole; leave out --lives to collect them.")


def gather(args: Args, run: "Run") -> dict[str, Lives]:
    """The teachers' lives: those in the folder --lives, or collected into the run's own, environment by environment."""
    folder, made = args.lives or run.folder / "lives", {name: make_env(name, 1) for name in args.envs}
    if not args.lives:
        flags = {name: getattr(args, name) for name in COLLECTED}
        size = sum(life_bytes(args, env) for env in made.values()) / 2**20
        run.say(f"Lives of {args.agents} PPO agents in each of {len(made)} environments: {size:.0f} MB")
        folder.mkdir(exist_ok=True)
        if run.rank == 0:
            write_whole(folder / "lives.json", lambda file: file.write(json.dumps(flags).encode()))
        bar = tqdm(total=len(args.envs[run.rank :: run.world]) * args.updates, desc="collect", disable=run.rank > 0)
        for number, name in enumerate(args.envs):
            if number % run.world == run.rank:
                torch.manual_seed(args.seed + 7919 * (number + 1))
                collect(args, name, run.device, bar.update, life_file(folder, name))
        if run.world > 1:
            dist.barrier()
    torch.manual_seed(args.seed)
    return {name: room(args, env, life_file(folder, name), new=False).to(run.device) for name, env in made.items()}


def shapes(args: Args, env: Env) -> list[tuple[int, ...]]:
    """Of what is kept of the lives in an environment, in the order of Lives."""
    told = args.agents, args.updates, args.rollout
    action = (*told, env.num_actions or env.action_size)
    return [(*told, env.obs_size), action, told, told, action, action, action, action, told[:2]]


def make_students(args: Args) -> dict[str, Student]:
    """The Transformers that the flags ask for."""
    asked, students = (args.learner, *args.baselines), {}
    if "gla" in asked:
        for number, gap in enumerate(args.gaps):
            students["gla" + (f", g = {gap}" if number else "")] = (gap, args.envs)
    if "one-task" in asked:
        students["one-task"] = (args.gaps[0], args.envs[:1])
    made = {}
    for name, (gap, names) in students.items():
        torch.manual_seed(args.seed)
        made[name] = Student(GLA(args), gap, names, replace(args, projected=args.projected and name != "one-task"))
    return made


def load(students: dict[str, Student], path: Path) -> None:
    """The Transformers of a checkpoint."""
    saved = read_checkpoint(path)["state"]["models"]
    for name, student in students.items():
        if name not in saved:
            raise Mistake(f"{path} holds no {name}; it has {', '.join(saved)}.")
        try:
            student.model.load_state_dict(saved[name])
        except RuntimeError as error:
            raise Mistake(f"{path} holds Transformers of another size than these flags ask for; leave them out.") from error


def main() -> None:
    args = parse_args()
    check(args, int(os.environ.get("WORLD_SIZE", 1)))
    students = make_students(args)
    if args.mode == "test":
        load(students, args.checkpoint)
    elif args.lives:
        match_lives(args)
    run = Run(args)
    started, lives = time.time(), {}
    for student in students.values():
        student.model.to(run.device)
    if args.mode == "train" and students:
        adam = {name: torch.optim.AdamW(student.model.parameters(), args.lr) for name, student in students.items()}
        keep = {"models": {name: student.model for name, student in students.items()}, "adam": adam}
        if not args.resume:
            torch.manual_seed(args.seed)
            run.save(0, keep)  # a collection that is cut off can be gone on with
        lives = gather(args, run)
        meta_train(args, students, lives, run, keep)
    tested = time.time()
    rows = meta_test(args, students, lives, run)
    if run.rank > 0:
        return
    draw_curves(run.folder / "learning.png", rows, args.envs, args.gaps[0])
    seconds = {"meta_train": tested - started, "meta_test": time.time() - tested}
    parameters = sum(p.numel() for student in list(students.values())[:1] for p in student.model.parameters())
    run.finish(rows, seconds=seconds, parameters=parameters)


if __name__ == "__main__":
    run_as_script(main)
