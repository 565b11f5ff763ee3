"""GLA: a Transformer that learns to act in its activations, distilled from the learning of many PPO agents.

PPO agents learn, and their transitions and policies are recorded. A Transformer reads chunks of such a learning history, each
some updates later than the one before, and predicts the policies: it learns to learn, and as it skips updates, faster than the
PPO that it reads (a tuned PPO is another matter: L4 on its page).
Random projections of observations and actions make many tasks of few, so that it cannot rely on their meaning.

Kirsch, "Automating AI Research" (2025), chapter 6; Kirsch, Harrison, Freeman, Sohl-Dickstein and Schmidhuber, "Towards
General-Purpose In-Context Learning Agents" (2023). Results: .github/results/gla.md.

    Eq. 6.1                -> divergence, meta_loss
    Algorithm 10           -> collect (line 2), draw_projection (line 5), subsample (line 6), meta_train
    Algorithm 11           -> rollout, next_policy
    Section 6.2 (augment)  -> Projection
    Figures 6.3 to 6.6     -> meta_test, draw_curves (and paths in the grid world: draw_paths)

    python gla.py                                                 # nine hidden goals, two of them new: 5 minutes
    python gla.py --envs heading:0 heading:90 heading:180 heading:270 --test-envs heading:45 heading:225
    python gla.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-envs hidden_goal:8

    agent = gla.GLA.load("pretrained", num_actions=4)             # or "runs/NAME/checkpoint.pt"
    action = agent.act(obs, reward, done)                         # at each step of your environment

Validation, by which everything is chosen: the meta-training environments under projections that are not meta-trained on, and
point_mass and cart_swing_up as other domains. Test: hidden_goal:1 and :8, heading:45 and :225, heading_3d (the family of the
headings, in space), reacher and dm_cartpole_swing_up as other domains; at the thesis preset --test-envs.

Axes, everywhere: p PPO agents, e copies of an environment that an agent acts in, u updates of PPO, s sequences in a batch or
lifetimes in parallel, t time, a observations, b actions (choices, or dimensions), d all parameters of a network.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoints, envs, es, machine, rng
from common.checkpoints import CheckpointError
from common.envs import Env, EnvError
from common.envs.wrappers import Recorded
from common.figures import grid_paths, plot
from common.flags import Count, CountOrZero, FlagError, Positive, Seed, Size, check_ranges, from_dict
from common.machine import can_compile, keep_memory, lock
from common.ppo import PPO, Policy, PPOAgents, executed, log_prob_executed
from common.results import MetricsLog, result_row, table, to_json

# ======================================================================================================================
# Args
# ======================================================================================================================
Name = Literal["gla", "one-task", "no-reward", "ad", "dpt", "cloning", "teacher", "ppo", "uniform"]


@dataclass
class Args:
    """GLA (chapter 6): record PPO while it learns, distil a faster learner from that, and let it learn elsewhere."""

    preset: Literal["auto", "thesis", "laptop", "bodies"] = "auto"
    """thesis: the thesis' numbers, where it has any; laptop: minutes on 2 cores; bodies: HalfCheetah in hours on 2 cores; auto:
    thesis if there is a CUDA device, else laptop."""
    seed: Seed = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors are."""
    compile: bool = True
    """Fuse the Transformer with torch.compile on a GPU (on a CPU it takes as long as it saves)."""
    mode: Literal["train", "test"] = "train"
    """train: collect, meta-train, then meta-test; test: only meta-test a --checkpoint."""
    checkpoint: str | None = None
    """The checkpoint.pt to meta-test, or "pretrained"."""
    resume: str | None = None
    """A run folder to continue in, exactly where the run stopped."""
    run_dir: str = "runs"
    """Run folders are made in here."""
    run_name: str | None = None
    """Name of the run folder (default: script-environments-learner-seed-time)."""
    track: bool = False
    """Log to Weights & Biases too (pip install "cleanmeta[track]")."""
    checkpoint_every: Count = 500
    """Meta-steps between checkpoints."""

    learner: Name = "gla"
    """What learns at meta-test time. gla: a Transformer for each of --gaps. With the first gap, one-task: distilled from the
    first of --envs alone (Figure 6.4; where there is but one, gla itself); no-reward: with rewards masked, so that it cannot
    learn from them. ad: Algorithm Distillation (Laskin et al. 2022), with the largest gap the likelihood of the actions that
    were taken, not a distance to policies. dpt: Decision-Pretrained Transformer (Lee et al. 2023), targets of the last policy
    after chunks of any updates, in any order. cloning: the same without a history. ppo: PPO from scratch; teacher: PPO as
    --teacher, if that is another; uniform: random actions."""
    baselines: tuple[Name, ...] = ("one-task", "no-reward", "cloning", "teacher", "ppo", "uniform")
    """What else is meta-trained and meta-tested. ad and dpt are not, as each takes as long as a gap."""

    envs: tuple[str, ...] = ("ant",)
    """Environments that PPO learns in and the Transformer is meta-trained on (section 6.3: Ant-v4). Gymnasium's have their own
    names, or package.module:Name-v0."""
    test_envs: tuple[str, ...] = ("Reacher-v4", "half_cheetah", "dm_cartpole_swing_up")
    """Environments to meta-test in, beside --envs (Figure 6.5; of the cartpole's tasks that in which rewards can rise)."""

    teacher: PPO = field(default_factory=PPO)
    """Those whose learning is recorded."""
    ppo: PPO = field(default_factory=partial(PPO, agents=8))
    """The baseline, which does not have to learn slowly."""

    gaps: tuple[CountOrZero, ...] = (60, 0)
    """g, updates of PPO between one chunk of a sequence and the next (Eq. 6.1), a Transformer for each. Sequences begin at any
    update from which the largest can. 0: the limit in which all targets are those of the last policy, and sequences begin
    at the first update. one-task has the first. (Not in the thesis; 7 x 60 updates span the teacher's learning.)"""
    chunk: Size = 128
    """Steps of a chunk, at most --teacher.num-steps (not in the thesis)."""
    chunks: Size = 8
    """Chunks of a sequence, from updates k, k + g, k + 2 g, … (not in the thesis)."""
    auxiliary: Literal["none", "gap", "return", "progress"] = "none"
    """eta, an input beside the history (section 6.2): the gap (the same everywhere, as each gap has a Transformer of its own),
    the reward per step of the chunk, or the position in the sequence from 0 to 1. At meta-test time: the gap, the best reward
    per step of any update of PPO, or the position."""
    trajectories: str | None = None
    """The folder `trajectories` of an earlier run with the same PPO, to be read instead of collected."""
    projected: bool = True
    """Augment: random linear projections of observations and actions, another one for each sequence (section 6.2)."""
    obs_size: Size = 64
    """Numbers that observations are projected to (section 6.2)."""
    action_size: Size = 16
    """Numbers that actions are projected to (section 6.2)."""

    width: Size = 256
    """Width of the Transformer (not in the thesis)."""
    layers: Size = 4
    """Its layers (not in the thesis)."""
    heads: Size = 4
    """Its heads (not in the thesis; of 64 numbers, for which GPUs have their fastest attention)."""
    meta_steps: Count = 50_000
    """Steps of meta-training (not in the thesis)."""
    batch: Size = 64
    """s, sequences in a step, divided among --envs as evenly as can be (not in the thesis)."""
    lr: Positive = 3e-4
    """AdamW's learning rate (not in the thesis); falls to a tenth."""
    clip: Positive = 1.0
    """Largest norm of the gradient (not in the thesis)."""

    test_seeds: Size = 32
    """Lifetimes in each environment (Figures 6.5 and 6.6: 32)."""
    test_steps: Count | None = None
    """Steps of a lifetime (default: as long as a sequence, or as the whole episodes that fit in one)."""


GRID = PPO(agents=64, updates=64, num_steps=16, lr=2e-2, gamma=0.99, gae_lambda=0.95, normalised=False, hidden=16)
LAPTOP = dict(
    envs=tuple(f"hidden_goal:{goal}" for goal in (0, 2, 3, 4, 5, 6, 7)),
    test_envs=("hidden_goal:1", "hidden_goal:8"),  # of the three kinds of goals a side and a corner
    teacher=replace(GRID, num_envs=6, update_epochs=1, num_minibatches=1),  # slow: learns over all of seven gaps
    ppo=replace(GRID, num_envs=1, num_steps=32, update_epochs=4, num_minibatches=2, gamma=0.9),  # see the results page
    gaps=(8, 0),
    chunk=16,
    width=64,
    layers=2,
    heads=4,
    meta_steps=2_000,  # four minutes
    batch=14,  # many small steps are better than few large ones (see the results page)
    lr=1e-3,  # few steps
    obs_size=16,
    action_size=4,
    test_seeds=256,
)
BODIES = dict(  # a body on 2 CPU cores, in two and a half hours
    envs=("half_cheetah",),
    test_envs=("Reacher-v4", "ant", "dm_cartpole_swing_up"),
    teacher=PPO(agents=8, num_minibatches=8),
    ppo=PPO(agents=8, num_minibatches=8),  # the same
    width=128,
    layers=3,
    meta_steps=1_500,
    batch=14,
    lr=1e-3,
)
PRESETS = {"thesis": {}, "laptop": LAPTOP, "bodies": BODIES}


# ======================================================================================================================
# The learner
# ======================================================================================================================
class Block(nn.Module):
    """Causal attention and an MLP, both behind layer normalisation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        """x (s, t, n), all steps, or one, from step `start` on; cache (2, s, heads, context, n / heads): keys and values."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = start + x.shape[1]
            cache[:, :, :, start:end] = torch.stack([k, v])
            k, v = cache[:, :, :, :end]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GLA(nn.Module):
    """pi_theta of Eq. 6.1 (Figure 6.2). A token is the transition before (observation, action, reward, end), the observation
    that it led to, and eta. Outputs are a projected action and the logarithm of a deviation."""

    def __init__(self, args: Args):
        super().__init__()
        self.context = args.chunks * args.chunk
        self.embed = nn.Linear(2 * args.obs_size + args.action_size + 3, args.width)
        self.position = nn.Parameter(torch.zeros(self.context, args.width))
        self.blocks = nn.ModuleList(Block(args.width, args.heads) for _ in range(args.layers))
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, args.action_size + 1)
        self.register_buffer("best", torch.zeros(()))  # the highest reward per step of PPO

    @staticmethod
    def load(checkpoint: str | Path, **options: Any) -> "Agent":
        """A trained GLA to be used from Python: see load_agent for the options."""
        return load_agent(checkpoint, **options)

    def forward(self, token: Tensor, cache: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """token (s, t, n) of all steps, or (s, 1, n) of step `start`, before which the cache has been filled.
        Returns projected actions (s, t, b') and log deviations (s, t)."""
        x = self.embed(token) + self.position[start : start + token.shape[1]]
        for number, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[number], start)
        action, log_std = self.head(self.norm(x)).split([self.head.out_features - 1, 1], -1)
        return action, log_std[..., 0]

    def empty_cache(self, s: int) -> Tensor:
        """Keys and values (layers, 2, s, heads, context, n / heads) of s sequences."""
        heads = self.blocks[0].heads
        sizes = len(self.blocks), 2, s, heads, self.context, self.position.shape[1] // heads
        return torch.zeros(sizes, device=self.position.device)


class Projection(NamedTuple):
    """The projections of a task: observations (s, a, obs_size) and actions (s, b, action_size) (section 6.2).

    The Transformer reads an action a, or a choice as a one-hot vector, as a P. The rows of P are orthonormal, so its output, a
    normal distribution N(y, sigma^2 I) in the projected space, is N(y P^T, sigma^2 I) of native actions; there policies are
    compared. Of choices y P^T are the logits, and the rows are those of the identity, which are learned soonest.
    """

    obs: Tensor
    action: Tensor


UNSEEN = 2**40  # ids of projections from here on are never meta-trained on


def draw_projection(args: Args, env: Env, ids: Tensor) -> Projection:
    """Projections of tasks, a pure function of their ids (s,) and --seed. Observations: normal, of variance 1 / a; actions:
    random orthonormal rows, for choices of the identity. Without --projected observation and action come first, then zeros."""
    a, b = env.obs_size, env.num_actions or env.action_size
    if not args.projected:
        sizes = (a, args.obs_size), (b, args.action_size)
        return Projection(*(torch.eye(*size, device=ids.device).expand(len(ids), -1, -1) for size in sizes))
    task = rng.fold(rng.key(args.seed, ids.device), ids)
    obs = rng.normal(rng.fold(task, 1), a * args.obs_size, math.sqrt(a)).view(-1, a, args.obs_size)
    if env.num_actions:
        order = rng.uniform(rng.fold(task, 2), args.action_size).argsort(-1)
        return Projection(obs, F.one_hot(order[:, :b], args.action_size).float())
    rows = rng.normal(rng.fold(task, 2), b * args.action_size).view(-1, b, args.action_size).double()
    lower = torch.linalg.cholesky_ex(rows @ rows.mT)[0]  # Gram-Schmidt; with _ex a GPU need not wait
    return Projection(obs, torch.linalg.solve_triangular(lower, rows, upper=False).float())


def kl(p: Policy, q: Policy) -> Tensor:
    """KL(p || q) in nats (...)."""
    if p.log_std is None:
        log_p, log_q = p.mean.log_softmax(-1), q.mean.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    ratio = (2 * (p.log_std - q.log_std)).exp()  # of the variances
    return (q.log_std - p.log_std + (ratio + (p.mean - q.mean) ** 2 * (-2 * q.log_std).exp() - 1) / 2).sum(-1)


def divergence(p: Policy, q: Policy) -> Tensor:
    """D of Eq. 6.1: the sum of forward and reverse KL (...)."""
    return kl(p, q) + kl(q, p)


def native(action: Tensor, log_std: Tensor, projection: Projection, discrete: bool) -> Policy:
    """The policy of a Transformer's output in its environment; see Projection. action (s, t, b'), log_std (s, t)."""
    mean = action @ projection.action.mT
    return Policy(mean, None if discrete else log_std[..., None].expand_as(mean))


class Steps(NamedTuple):
    """Transitions in order (..., t, ...)."""

    obs: Tensor  # (..., t, a), before
    action: Tensor  # (..., t, b), one-hot where it was a choice
    reward: Tensor  # (..., t)
    ended: Tensor  # (..., t), whether the episode did


class Transition(NamedTuple):
    """What is known before an action (s, t, ...): the last transition, and the observation that it led to."""

    last_obs: Tensor  # (s, t, a), zeros before the first transition, as the next three
    action: Tensor  # (s, t, b), choices as one-hot vectors
    reward: Tensor  # (s, t)
    ended: Tensor  # (s, t)
    obs: Tensor  # (s, t, a)


def transitions(steps: Steps) -> Transition:
    """What is known at each of the steps (s, t, ...) of a sequence."""
    before = (F.pad(x[:, :-1], (0, 0) * (x.ndim - 2) + (1, 0)) for x in steps)
    return Transition(*before, steps.obs)


def first_transition(obs: Tensor, b: int) -> Transition:
    """What is known before any action. obs (s, a)."""
    zeros = torch.zeros(len(obs), 1, device=obs.device)
    return Transition(torch.zeros_like(obs)[:, None], zeros[..., None].expand(-1, -1, b), zeros, zeros, obs[:, None])


def tokens(projection: Projection, known: Transition, eta: Tensor, masked: str = "") -> Tensor:
    """The Transformer's inputs (s, t, n). eta (s, t); masked: what is zero to a control, "history" or "reward", and with
    that the end of an episode, which can tell of it."""
    feedback = torch.stack([known.reward, known.ended], -1)
    if masked == "reward":
        feedback = torch.zeros_like(feedback)
    history = torch.cat([known.last_obs @ projection.obs, known.action @ projection.action, feedback], -1)
    if masked == "history":
        history = torch.zeros_like(history)
    return torch.cat([history, known.obs @ projection.obs, eta[..., None]], -1)


class Student(NamedTuple):
    """A Transformer, and what it learns from."""

    args: Args
    model: GLA
    gap: int
    envs: tuple[str, ...]  # of its teachers
    masked: str = ""  # in its inputs, see tokens
    shuffled: bool = False  # chunks are of any updates, in any order
    likelihood: bool = False  # targets are the actions that were taken

    def eta(self, progress: Tensor, reward: Tensor | None = None) -> Tensor:
        """The input that sets how much better the policy should get (section 6.2). progress: from 0 to 1 in a sequence; reward:
        per step of the chunk, in meta-training."""
        if self.args.auxiliary == "progress":
            return progress
        if self.args.auxiliary == "return":
            return self.model.best.expand_as(progress) if reward is None else reward.expand_as(progress)
        return torch.full_like(progress, self.gap / 10 if self.args.auxiliary == "gap" else 0.0)


class Trajectories(NamedTuple):
    """Trajectories of PPO agents while they learn in an environment, in all copies of it, by updates."""

    steps: Steps  # (p e, u, t, ...)
    mean: Tensor  # (p e, u, t, b), of the policy at the time
    log_std: Tensor  # (p e, u, b)
    last_mean: Tensor  # (p e, u, t, b), of the last policy, in the same states
    last_log_std: Tensor  # (p e, u, b)
    curve: Tensor  # (p, u), reward per step of all copies


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
def next_policy(
    student: Student, context: "Context", projection: Projection, known: Transition, progress: Tensor, discrete: bool
) -> Policy:
    """pi_theta of Eq. 6.1 after one more transition (s, 1, ...). progress (s, 1). Distributions of native actions (s, b)."""
    token = tokens(projection, known, student.eta(progress), student.masked)
    policy = native(*context.append(token), projection, discrete)
    return policy.map(lambda x: x[:, 0])


def rollout(student: Student, env: Env, steps: int, generator: torch.Generator) -> Tensor:
    """Algorithm 11: K steps in every environment, with a history that grows by each transition, and nothing else that changes.
    Projections are new ones. Returns rewards (s, t)."""
    projection = draw_projection(student.args, env, UNSEEN + torch.arange(env.num_envs, device=env.device))
    s, discrete, b = env.num_envs, env.num_actions is not None, env.num_actions or env.action_size
    draw = partial(torch.rand, s, generator=generator, device=env.device)
    state, obs = env.reset(draw(env.lifetime_draws))
    known = first_transition(obs, b)
    context, rewards = Context(student.model), []
    for number in range(steps):
        progress = torch.full((s, 1), number / steps, device=env.device)
        policy = next_policy(student, context, projection, known, progress, discrete)
        normal = torch.randn(s, b, generator=generator, device=env.device)
        chosen = executed(policy.sample(draw(1), normal), discrete)
        state, step = env.step(state, chosen, draw(env.num_draws))
        action = F.one_hot(chosen, b).float() if discrete else chosen
        ended = (step.terminated | step.truncated).float()
        known = Transition(known.obs, *(x[:, None] for x in (action, step.reward, ended, step.obs)))
        rewards.append(step.reward)
    return torch.stack(rewards, 1)


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
def subsample(
    student: Student, trajectories: Trajectories, discrete: bool, count: int, own: Tensor
) -> tuple[Steps, Policy, Tensor]:
    """Algorithm 10, line 6: chunks from updates k, k + g, k + 2 g, … of as many trajectories, one after the other, with k drawn
    for each from those at which the largest gap can begin, and of each update --chunk steps in one copy, from a random one on;
    the policies to be predicted; and whether they are (s, t): the untrained policy is context alone. Of all this the part that
    is this process' `own`. With gap 0 updates are the first ones, and the policy is the last one in all of them."""
    args, gap, device = student.args, student.gap, trajectories.curve.device
    num_trajectories, num_updates, num_steps = trajectories.steps.reward.shape
    draw = partial(torch.randint, device=device)

    trajectory = draw(num_trajectories, (count, 1, 1))
    firsts = num_updates - max(args.gaps) * (args.chunks - 1) if gap else 1  # how many updates k is one of, for all gaps
    update = draw(firsts, (count, 1, 1)) + max(gap, 1) * torch.arange(args.chunks, device=device)[:, None]
    if student.shuffled:
        update = draw(num_updates, (count, args.chunks, 1))
    step = draw(num_steps - args.chunk + 1, (count, args.chunks, 1)) + torch.arange(args.chunk, device=device)
    trajectory, update, step = (x[own] for x in (trajectory, update, step))

    steps = Steps(*(x[trajectory, update, step].flatten(1, 2) for x in trajectories.steps))
    mean, log_std = trajectories.mean, trajectories.log_std
    if gap == 0:
        mean, log_std = trajectories.last_mean, trajectories.last_log_std
    mean = mean[trajectory, update, step]
    policy = Policy(mean, None if discrete else log_std[trajectory, update].expand_as(mean))
    predicted = ((update > 0) | (gap == 0)).expand_as(step)
    return steps, policy.map(lambda x: x.flatten(1, 2)), predicted.flatten(1)


class Task(NamedTuple):
    """Sequences of one environment."""

    projection: Projection
    steps: Steps  # (s, t, ...)
    policy: Policy  # to be predicted
    predicted: Tensor  # (s, t), whether it is


def meta_loss(student: Student, tasks: list[Task]) -> Tensor:
    """Minus J of Eq. 6.1, per step. The Transformer reads as many steps at once as it has positions, cloning one."""
    args, inputs = student.args, []
    for projection, steps, *_ in tasks:
        length = steps.reward.shape[1]
        progress = (torch.arange(length, device=steps.reward.device) / length).expand_as(steps.reward)  # as in a rollout
        reward = steps.reward.unflatten(1, (args.chunks, -1)).mean(-1).repeat_interleave(args.chunk, 1)
        inputs.append(tokens(projection, transitions(steps), student.eta(progress, reward), student.masked))

    sizes = [len(token) for token in inputs]
    sequences = torch.cat(inputs).unflatten(1, (-1, student.model.context)).flatten(0, 1)
    with torch.autocast(sequences.device.type, torch.bfloat16, enabled=sequences.is_cuda):
        outputs = student.model(sequences)
    action, log_std = (x.float().view(-1, args.chunks * args.chunk, *x.shape[2:]).split(sizes) for x in outputs)
    losses = []
    for y, deviation, (projection, steps, p, _) in zip(action, log_std, tasks, strict=True):
        q = native(y, deviation, projection, p.log_std is None)
        losses.append(-log_prob_executed(q, steps.action) if student.likelihood else divergence(p, q))
    predicted = torch.cat([task.predicted for task in tasks]).float()
    count = es.all_reduce_mean(predicted.sum()).clamp(min=1)  # the same in all processes
    return (torch.cat(losses) * predicted).sum() / count


def draw_tasks(student: Student, in_envs: dict[str, Env], trajectories: dict[str, Trajectories], step: int) -> list[Task]:
    """A meta-step's tasks, as many in each environment; of them this process' share. in_envs: environments by name."""
    args, device = student.args, next(student.model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids = args.batch * step + torch.arange(args.batch, device=device)
    tasks = []
    for name, env_ids in zip(student.envs, ids.tensor_split(len(student.envs)), strict=True):
        own = torch.arange(len(env_ids), device=device)[rank::world]
        projection = draw_projection(args, in_envs[name], env_ids[own])  # Algorithm 10, line 5
        discrete = in_envs[name].num_actions is not None
        tasks.append(Task(projection, *subsample(student, trajectories[name], discrete, len(env_ids), own)))  # line 6
    return tasks


def meta_train(
    args: Args, students: dict[str, Student], trajectories: dict[str, Trajectories], run: "Run", keep: dict[str, Any]
) -> None:
    """Algorithm 10, for students side by side. Changes their models in place. keep: these, and their optimisers."""
    adam = keep["adam"]
    in_envs = {name: make_env(name, 1, run.device) for name in trajectories}
    fuse = partial(torch.compile, dynamic=False) if run.compiles and run.device.type == "cuda" else lambda model: model
    fused = {name: student._replace(model=fuse(student.model)) for name, student in students.items()}
    for step in run.steps(args.meta_steps, keep):
        metrics = {}
        for name, student in students.items():
            if step == 0:
                student.model.best.copy_(max(trajectories[name].curve.mean(0).max() for name in student.envs))
            loss = meta_loss(fused[name], draw_tasks(student, in_envs, trajectories, step))
            adam[name].zero_grad()
            loss.backward()
            es.average_gradients(student.model.parameters())
            nn.utils.clip_grad_norm_(student.model.parameters(), args.clip)
            adam[name].param_groups[0]["lr"] = args.lr * (1 - 0.9 * step / args.meta_steps)
            adam[name].step()  # line 7
            metrics[name.replace(", g = ", "_gap_") + "_loss"] = es.all_reduce_mean(loss.detach().clone())
        run.log(step, metrics)


# ======================================================================================================================
# A history of any length
# ======================================================================================================================
class Context:
    """A history of tokens that grows, and the Transformer's outputs for the last one. Beyond its positions the Transformer
    drops the older half of its history."""

    def __init__(self, model: GLA):
        self.model = model
        self.length = 0

    def append(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """token (s, 1, n) -> projected actions (s, 1, b') and log deviations (s, 1)."""
        if not self.length:
            self.tokens = token.repeat(1, self.model.context, 1)
            self.cache = self.model.empty_cache(len(token))
        if self.length == self.model.context:
            half = self.length // 2
            newer = self.tokens[:, self.length - half :].clone()
            self.tokens[:, :half] = newer
            self.length = half
            if half:
                self.model(newer, self.cache)

        self.tokens[:, self.length] = token[:, 0]
        outputs = self.model(token, self.cache, self.length)
        self.length += 1
        return outputs


# ======================================================================================================================
# The trajectories of PPO
# ======================================================================================================================
STORE_EVERY = 300  # seconds between files of a collection


def collect(ppo: PPO, name: str, path: Path, device: torch.device, bar: Callable) -> Trajectories:
    """Algorithm 10, line 2: agents learn by PPO (common/ppo.py) in an environment.

    The trajectories are also written to `path`, every five minutes and at the end. A collection that was cut off continues from
    there; an environment of gymnasium's is reset then. Raises UserError if what is there is damaged, or a number not finite.
    """
    env = make_env(name, ppo.agents * ppo.num_envs, device)
    agents = PPOAgents(ppo, env)
    trajectories = empty_trajectories(ppo, env, "cpu")
    first = 0
    if path.exists():
        saved = read_collection(ppo, path, {"trajectories": trajectories} | agents.state())
        checkpoints.set_rng_state(saved["rng"], path)
        first = saved["updates"]

    stored = time.time()
    bar(first)
    for update in range(first, ppo.updates):
        if time.time() - stored >= STORE_EVERY:
            write_collection(path, name, trajectories, agents, update)
            stored = time.time()
        new = agents.update(update)
        action = F.one_hot(new.action, env.num_actions).float() if env.num_actions else new.action
        for kept, x in zip(trajectories.steps, (new.obs, action, new.reward, new.ended), strict=True):
            kept[:, update] = x.flatten(0, 1)
        store_policy(trajectories.mean, trajectories.log_std, update, new.policy)
        trajectories.curve[:, update] = new.reward.mean((1, 2))
        bar(1)

    if first < ppo.updates:
        for update in range(ppo.updates):
            obs = trajectories.steps.obs[:, update].unflatten(0, (ppo.agents, ppo.num_envs))
            store_policy(trajectories.last_mean, trajectories.last_log_std, update, agents.policy(obs.to(device)))
        write_collection(path, name, trajectories, agents, ppo.updates)
    env.close()
    return trajectories


def empty_trajectories(ppo: PPO, env: Env, device: torch.device | str) -> Trajectories:
    """Zeros, to be filled."""
    h, u, t, b = ppo.agents * ppo.num_envs, ppo.updates, ppo.num_steps, env.num_actions or env.action_size
    zeros = partial(torch.zeros, device=device)
    steps = Steps(zeros(h, u, t, env.obs_size), zeros(h, u, t, b), zeros(h, u, t), zeros(h, u, t))
    policies = (zeros(h, u, t, b), zeros(h, u, b), zeros(h, u, t, b), zeros(h, u, b))
    return Trajectories(steps, *policies, zeros(ppo.agents, u))


def store_policy(mean: Tensor, log_std: Tensor, update: int, policy: Policy) -> None:
    """Store a policy (p, e, t, b) in mean (p e, u, t, b) and log_std (p e, u, b)."""
    mean[:, update] = policy.mean.flatten(0, 1)
    if policy.log_std is not None:
        log_std[:, update] = policy.log_std[:, :, 0].flatten(0, 1)  # the same in all states


def write_collection(path: Path, name: str, trajectories: Trajectories, agents: PPOAgents, updates: int) -> None:
    """Write the trajectories of so many updates, and all that is needed to continue. Raises UserError at NaN."""
    state = checkpoints.state_of({"trajectories": trajectories} | agents.state())
    if part := checkpoints.first_not_finite(state):
        raise UserError(f"PPO in {name}: {part} is not finite after {updates} updates. Try a smaller --teacher.lr.")
    parts = {"flags": asdict(agents.ppo), "updates": updates, "state": state, "rng": checkpoints.rng_state()}
    checkpoints.write(path, parts)


def read_collection(ppo: PPO, path: Path, keep: dict[str, Any]) -> dict[str, Any]:
    """What write_collection wrote; restores `keep` from it. Raises UserError if it is damaged or of other flags."""
    try:
        saved = checkpoints.read(path, flags=dict, updates=int, state=dict, rng=list)
        for flag, value in asdict(ppo).items():
            kept = saved["flags"].get(flag)
            if not isinstance(kept, int | float) or kept != value:
                words = f"--teacher.{flag.replace('_', '-')} {kept}, not {value}"
                raise UserError(f"The trajectories in {path} were collected with {words}.")
        checkpoints.restore(keep, saved["state"], path)
    except CheckpointError as error:
        raise UserError(f"{error} Delete it to collect its trajectories again.") from error
    return saved


def collection_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', '-').replace('/', '-')}.pt"


def read_trajectories(args: Args, folder: Path, device: torch.device) -> dict[str, Trajectories]:
    """The trajectories in all of --envs. Raises UserError if some are missing, not complete or of other flags."""
    trajectories = {}
    for name in args.envs:
        path = collection_file(folder, name)
        if not path.is_file():
            raise UserError(f"There is no {path}; give --trajectories the folder `trajectories` of a run with these --envs.")
        trajectories[name] = empty_trajectories(args.teacher, make_env(name, 1), device)
        saved = read_collection(args.teacher, path, {"trajectories": trajectories[name]})
        if saved["updates"] != args.teacher.updates:
            raise UserError(f"The trajectories in {path} are not complete; leave out --trajectories to collect them.")
    return trajectories


def collect_all(args: Args, run: "Run") -> dict[str, Trajectories]:
    """The trajectories in all of --envs, collected into the run's folder. Processes divide the environments among them, and
    each writes its own."""
    folder = run.folder / "trajectories"
    folder.mkdir(exist_ok=True)
    names = dict.fromkeys(args.envs)
    run.info(f"Collecting trajectories of {args.teacher.agents} PPO agents in each of {len(names)} environments")
    own = list(enumerate(names, 1))[run.rank :: run.world]
    bar = tqdm(total=len(own) * args.teacher.updates, desc="collect", disable=run.rank > 0)
    for number, name in own:
        torch.manual_seed(args.seed + 7919 * number)
        collect(args.teacher, name, collection_file(folder, name), run.device, bar.update)
    if run.world > 1:
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=7)))  # one may take hours longer than another
    return read_trajectories(args, folder, run.device)


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def meta_test(
    args: Args, students: dict[str, Student], trajectories: dict[str, Trajectories], run: "Run"
) -> list[dict[str, Any]]:
    """Result rows of every learner in every environment, and figures."""
    rows = []
    tasks = dict.fromkeys([*args.envs, *args.test_envs])
    agents = {"teacher": args.teacher, "ppo": args.ppo}
    one_ppo = replace(args.teacher, agents=args.ppo.agents) == args.ppo
    others = [name for name in ("uniform", *agents) if name in (args.learner, *args.baselines)]
    learners = [*students, *(name for name in others if not (name == "teacher" and one_ppo and "ppo" in others))]
    bar = tqdm(total=len(tasks) * len(learners), desc="meta-test", disable=run.rank > 0)
    for number, task in enumerate(tasks):
        env = make_env(task, args.test_seeds, run.device)
        for learner in learners:
            if learner in agents:
                recorded = trajectories.get(task) if learner == "teacher" or one_ppo else None
                measure = partial(ppo_rows, args, task, number, learner, agents[learner], recorded, env)
            else:
                measure = partial(rollout_rows, args, task, number, learner, students.get(learner), env)
            rows += run.once(f"{task}, {learner}", measure)
            bar.update()
        env.close()

    draw_curves(run.folder / "learning.png", rows, args)
    if args.learner in students:
        draw_paths(run.folder / "paths.png", args, students[args.learner], run.device)
    return rows


@torch.no_grad()
def rollout_rows(args: Args, task: str, number: int, learner: str, student: Student | None, env: Env) -> list[dict[str, Any]]:
    """Reward per step since the last point, of rollouts with new projections; of a body its speed, too; and the mean return of
    episodes. No student: random actions. number: of the task, a part of the seed."""
    steps = lifetime_steps(args, env)
    generator = torch.Generator(env.device).manual_seed(1009 * args.seed + number)
    recorded = Recorded(env)
    rewards = rollout(student, recorded, steps, generator) if student else uniform_rollout(recorded, steps, generator)
    curves = {"reward_per_step": rewards}
    if (speeds := recorded.speeds()) is not None:
        curves["speed"] = speeds

    episodes = steps // (env.max_steps or steps)
    parts = episodes if episodes >= 8 else 32  # short episodes are averaged as a whole
    points = sorted({-(-steps * part // parts) for part in range(parts + 1)})
    row = partial(result_row, learner, task, novelty(args, task, student))
    rows = [row(name, step, x[:, before:step].mean(1)) for name, x in curves.items() for before, step in pairwise(points)]
    if env.max_steps and len(returns := recorded.returns()):
        rows.append(row("return", steps, returns))
    return rows


def lifetime_steps(args: Args, env: Env) -> int:
    """--test-steps, or a sequence's, in whole episodes: a body's start from rest once more would hide what was learned."""
    context = args.chunks * args.chunk
    return args.test_steps or context - context % min(env.max_steps or 1, context)


def ppo_rows(
    args: Args, task: str, number: int, learner: str, ppo: PPO, trajectories: Trajectories | None, env: Env
) -> list[dict[str, Any]]:
    """Reward per step at each update of PPO, over all agents; of a body its speed, too. No trajectories: they learn now."""
    torch.manual_seed(args.seed + 1_000_003 * (number + 1))
    if trajectories:
        rewards = trajectories.curve.unbind(1)
        speed = env.speed(trajectories.steps.reward, trajectories.steps.action)  # (p e, u, t)
        speeds = [] if speed is None else speed.unflatten(0, (len(trajectories.curve), -1)).mean((1, 3)).unbind(1)
    else:
        own_env = make_env(task, ppo.agents * ppo.num_envs, env.device)
        agents = PPOAgents(ppo, own_env)
        rewards, speeds = [], []
        for update in tqdm(range(ppo.updates), f"PPO in {task}"):
            new = agents.update(update)
            rewards.append(new.reward.mean((1, 2)))
            if (speed := env.speed(new.reward, new.action)) is not None:
                speeds.append(speed.mean((1, 2)))
        own_env.close()

    row = partial(result_row, learner, task, novelty(args, task))
    steps = ppo.num_steps * ppo.num_envs
    curves = {"reward_per_step": rewards, "speed": speeds}
    return [row(name, steps * number, values) for name, curve in curves.items() for number, values in enumerate(curve, 1)]


def novelty(args: Args, task: str, student: Student | None = None) -> str:
    """How new a task is. It is known to a student only from teachers in it, and without projections."""
    if task not in args.envs:
        names = (envs.base_name(envs.SAME.get(name, name)) for name in (task, *args.envs))
        family, *known = (name.removesuffix("_3d") for name in names)  # headings are one
        return "task" if family in known else "domain"
    return "task" if student and (args.projected or task not in student.envs) else "none"


def uniform_rollout(env: Env, steps: int, generator: torch.Generator) -> Tensor:
    """Rewards (s, t) of actions that are drawn uniformly."""
    draw = partial(torch.rand, env.num_envs, generator=generator, device=env.device)
    world, _ = env.reset(draw(env.lifetime_draws))
    rewards = []
    for _ in range(steps):
        action = (draw(1)[:, 0] * env.num_actions).long() if env.num_actions else 2 * draw(env.action_size) - 1
        world, step = env.step(world, action, draw(env.num_draws))
        rewards.append(step.reward)
    return torch.stack(rewards, 1)


def draw_curves(path: Path, rows: list[dict[str, Any]], args: Args) -> None:
    """Figures 6.3 to 6.6: one panel for each environment, a line for each learner."""
    known = {row["task"]: "meta-trained on" if row["task"] in args.envs else "never seen" for row in rows}
    labels = {"ppo": "PPO", "teacher": "PPO, the teacher", "uniform": "uniform-random policy", "one-task": "GLA, one task"}
    labels |= {"no-reward": "GLA, rewards masked", "cloning": "cloning, without history"}
    labels |= {"ad": "Algorithm Distillation", "dpt": "Decision-Pretrained Transformer"}
    for number, gap in enumerate(args.gaps):
        label = f"GLA, g = {gap}" if gap else "GLA, targets of the last policy"
        labels["gla" + (f", g = {gap}" if number else "")] = label
    plot(
        [row for row in rows if row["metric"] == "reward_per_step"],
        path,
        xlabel="environment steps",
        ylabel="reward per step",
        labels=labels,
        titles={task: f"{task} ({words})" for task, words in known.items()},
        styles={"ppo": "k", "teacher": "k--", "uniform": "0.6"},
        standard_error=True,
        columns=5,
        xscale="log",
    )


@torch.no_grad()
def draw_paths(path: Path, args: Args, student: Student, device: torch.device) -> None:
    """Where a student moves in one lifetime, in each grid world with a hidden goal."""
    lifetimes = {}
    for task in dict.fromkeys([*args.envs, *args.test_envs]):
        if task.partition(":")[0] == "hidden_goal":
            env = Recorded(make_env(task, 1, device))
            rollout(student, env, lifetime_steps(args, env), torch.Generator(device).manual_seed(args.seed))
            cells = torch.stack([torch.cat(move).argmax(1) for move in env.moves])
            title = f"{task}\n{'meta-trained on' if task in args.envs else 'never seen'}"
            lifetimes[title] = env.env.goal, cells.cpu().numpy()
    if lifetimes:
        grid_paths(lifetimes, 3, path)


# ======================================================================================================================
# Use it
# ======================================================================================================================
class Agent:
    """A trained GLA that acts in your environments: act(obs, reward, done) and reset().

        agent = gla.GLA.load("pretrained", num_actions=4)
        obs, _ = env.reset()
        action = agent.act(obs)
        obs, reward, terminated, truncated, _ = env.step(action)
        if done := terminated or truncated:
            obs, _ = env.reset()
        action = agent.act(obs, reward, done)

    obs are arrays or tensors of finite numbers of about one, (a,) for one environment or (s, a) for several, to be acted on:
    after an end, the first of the next episode (of gymnasium's vector environments with AutoresetMode.SAME_STEP). reward and
    done are those of the last action, () or (s,). Actions are an int or (s,), or with action_size numbers (b,) or (s, b). Each
    environment has projections of its own. It learns from its first action on, until `reset`; beyond its positions it drops
    the older half of its history. Raises ValueError for other shapes.
    """

    def __init__(self, student: Student, num_actions: int | None = None, action_size: int | None = None, seed: int = 0):
        largest = student.args.action_size
        if bool(num_actions) == bool(action_size) or not 1 <= (num_actions or action_size) <= largest:
            raise ValueError(f"Give num_actions (from 2) or action_size (from 1), at most {largest}, as the Transformer has.")
        self.student = student
        self.actions = {"num_actions": num_actions, "action_size": action_size}
        self.discrete, self.b = bool(num_actions), num_actions or action_size
        self.device = next(student.model.parameters()).device
        self.seed = 1_000_003 * seed
        self.reset()

    def reset(self) -> None:
        """Forget all transitions. The next projections are others."""
        self.context = Context(self.student.model)
        self.known: Transition | None = None
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.seed += 1

    @torch.no_grad()
    def act(self, obs: Any, reward: Any = 0.0, done: Any = False) -> Any:
        """The next action, after the reward of the last one and whether it ended an episode."""
        obs, reward, done = (torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in (obs, reward, done))
        several = obs[None] if obs.ndim == 1 else obs
        if obs.ndim not in (1, 2) or not obs.numel() or not obs.isfinite().all():
            raise ValueError("Observations have to be finite numbers of shape (a,) or (s, a).")
        if self.known and several.shape != self.known.obs[:, 0].shape:
            raise ValueError(f"Observations have to be of the shape {tuple(self.known.obs[:, 0].shape)} that they had before.")
        if not all(x.shape in ((), obs.shape[:-1]) and x.isfinite().all() for x in (reward, done)):
            raise ValueError(f"Reward and done have to be finite numbers of shape {tuple(obs.shape[:-1])}.")

        s = len(several)
        if not self.student.args.projected and several.shape[1] > (most := self.student.args.obs_size):
            raise ValueError(f"Observations have {several.shape[1]} numbers, of which there may be {most} without projections.")
        if self.known is None:
            env = SimpleNamespace(obs_size=several.shape[1], **self.actions)
            ids = UNSEEN + self.seed % 2**32 * 2**20 + torch.arange(s, device=self.device)
            self.projection = draw_projection(self.student.args, env, ids)
            self.known = first_transition(several, self.b)
        else:
            feedback = (x.expand(s)[:, None] for x in (reward, done))
            self.known = Transition(self.known.obs, self.known.action, *feedback, several[:, None])

        progress = torch.full((s, 1), self.context.length / self.student.model.context, device=self.device)
        policy = next_policy(self.student, self.context, self.projection, self.known, progress.clamp(max=1), self.discrete)
        uniform = torch.rand(s, 1, generator=self.generator, device=self.device)
        normal = torch.randn(s, self.b, generator=self.generator, device=self.device)
        chosen = executed(policy.sample(uniform, normal), self.discrete)
        self.known = self.known._replace(action=(F.one_hot(chosen, self.b).float() if self.discrete else chosen)[:, None])
        if obs.ndim == 2:
            return chosen
        return int(chosen) if self.discrete else chosen[0]


def load_agent(
    checkpoint: str | Path,
    num_actions: int | None = None,
    action_size: int | None = None,
    learner: str = "gla",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Agent:
    """checkpoint: "pretrained", which learns hidden goals, or a checkpoint.pt of this script; learner: by its name in
    results.json; seed: decides projections and actions. Raises CheckpointError or UserError for what is no checkpoint of this
    script with that learner, and ValueError as Agent."""
    saved = checkpoints.read(checkpoints.named(checkpoint, METHOD), method=str, args=dict, state=dict)
    try:
        with torch.random.fork_rng():  # the program's own random numbers stay the same
            students = make_students(from_dict(Args, saved["args"])) if saved["method"] == METHOD else {}
    except TypeError:
        students = {}
    if learner not in students:
        raise UserError(f"{checkpoint} is not a checkpoint of this {METHOD}.py with a learner {learner}.")
    checkpoints.restore({"models": {learner: students[learner].model}}, saved["state"], checkpoint)
    students[learner].model.to(device).eval()
    return Agent(students[learner], num_actions, action_size, seed)


# ======================================================================================================================
# The run
# ======================================================================================================================
METHOD = "gla"  # in checkpoints and results; a renamed copy of this file reads them too
USER_ERRORS = (CheckpointError, EnvError, FlagError)
NAMED_AFTER = ("learner",)  # the flags that name a run's folder
KEPT = ("preset", "envs", "gaps", "auxiliary", "projected", "chunk")  # the flags that a meta-test cannot change


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


def make_env(name: str, count: int, device: torch.device | str = "cpu") -> Env:
    """An environment; the observations of those that are ours are scaled to about one."""
    env = envs.make(name, count, device, scaled=True, parallel=1 < count <= 4 * (os.cpu_count() or 1))
    if not env.obs_size:
        raise UserError(f"GLA projects observations, and {name} has none; choose another environment.")
    return env


def check(args: Args, world: int) -> None:
    """Refuse what cannot work, before anything is written."""
    if not args.envs:
        raise UserError("--envs needs at least one environment.")
    if not args.gaps or len(set(args.gaps)) < len(args.gaps):
        raise UserError("--gaps needs at least one number, and each of them once.")
    if "ad" in (args.learner, *args.baselines) and max(args.gaps) == 0:
        raise UserError("--learner ad needs a gap above 0, with which sequences span the learning of PPO.")
    context, most = args.chunks * args.chunk, args.teacher.num_steps
    if context == 1:
        raise UserError("A sequence needs at least two steps; choose a larger --chunk.")
    if args.chunk > most:
        raise UserError(f"--chunk {args.chunk} is longer than --teacher.num-steps {most} between PPO's updates.")
    sizes = [args.batch * context, args.width * (context + args.obs_size + 12 * args.layers * args.width)]
    for name, ppo in {"teacher": args.teacher, "ppo": args.ppo}.items():
        steps, count = ppo.num_steps * ppo.num_envs, ppo.num_minibatches
        if (part := -(-steps // count)) < 2 or steps % part == 1:
            raise UserError(f"--{name}.num-minibatches {count} leaves one step of {steps} in one of them; choose fewer.")
        sizes += [ppo.agents * ppo.updates * steps, ppo.agents * ppo.hidden**2]
    if max(sizes) > 2**32:
        raise UserError("These flags ask for more than 4 billion steps or parameters at a time; choose smaller ones.")
    last, updates = (args.chunks - 1) * max(1, *args.gaps), args.teacher.updates
    if last >= updates:
        raise UserError(f"A sequence would reach update {last} of {updates}; take fewer --chunks or smaller --gaps.")
    if args.width % args.heads:
        raise UserError(f"--width {args.width} cannot be divided into {args.heads} heads.")
    if args.batch < len(args.envs):
        raise UserError(f"--batch {args.batch} is not a sequence for each of {len(args.envs)} environments.")
    if world > 1 and args.batch % (len(args.envs) * world):
        raise UserError(f"--batch {args.batch} cannot be divided by {len(args.envs)} environments and {world} processes.")
    transformers = {args.learner, *args.baselines} - {"teacher", "ppo", "uniform"}
    for name in dict.fromkeys([*args.envs, *args.test_envs]):
        env = make_env(name, 1)
        if transformers and (env.num_actions or env.action_size) > args.action_size:
            raise UserError(f"--action-size {args.action_size} is too small for {name}.")
        if transformers and not args.projected and env.obs_size > args.obs_size:
            raise UserError(f"--obs-size {args.obs_size} is too small for {name}, without projections.")


def make_students(args: Args) -> dict[str, Student]:
    """The Transformers that the flags ask for, equal at first."""
    differences: dict[str, dict[str, Any]] = {"gla": {}}
    differences |= {f"gla, g = {gap}": {"gap": gap} for gap in args.gaps[1:]}
    differences |= {
        "one-task": {"envs": args.envs[:1]},
        "no-reward": {"masked": "reward"},
        "ad": {"gap": max(args.gaps), "likelihood": True},
        "dpt": {"gap": 0, "shuffled": True},
        "cloning": {"gap": 0, "shuffled": True, "masked": "history"},
    }
    learners = {args.learner, *args.baselines}
    if len(set(args.envs)) == 1 and args.learner != "one-task":
        learners.discard("one-task")
    students = {}
    for name, different in differences.items():
        if name.partition(",")[0] in learners:
            torch.manual_seed(args.seed)
            model = GLA(replace(args, chunks=1, chunk=1) if name == "cloning" else args)
            students[name] = Student(args, model, **{"gap": args.gaps[0], "envs": args.envs} | different)
    return students


def main() -> None:
    args, checkpoint = parse_args()
    check(args, int(os.environ.get("WORLD_SIZE", 1)))
    run = Run(args, checkpoint)
    students = make_students(args)
    models = {name: student.model.to(run.device) for name, student in students.items()}
    if checkpoint:
        checkpoints.restore({"models": models}, checkpoint["state"], args.checkpoint or args.resume)
    trajectories = {}
    if args.mode == "train" and args.trajectories and students:
        trajectories = read_trajectories(args, Path(args.trajectories), run.device)
    run.open_folder()

    if args.mode == "train":
        adam = {name: torch.optim.AdamW(model.parameters(), args.lr, fused=True) for name, model in models.items()}
        keep = {"models": models, "adam": adam}
        if not args.resume:
            torch.manual_seed(args.seed)
            run.save(0, keep)  # a collection that is cut off can be continued
        if students:
            trajectories = trajectories or collect_all(args, run)
            torch.manual_seed(args.seed)
            meta_train(args, students, trajectories, run, keep)
    tested = time.time()
    if run.rank > 0:
        return
    rows = meta_test(args, students, trajectories, run)
    run.finish(
        rows,
        tested,
        parameters=sum(p.numel() for model in list(models.values())[:1] for p in model.parameters()),
    )


if __name__ == "__main__":
    machine.run_as_script(main, f"{METHOD}.py", (UserError, *USER_ERRORS))
