"""SymLA: the symmetries of backpropagation in a black-box agent that learns by reinforcement.

Every weight of a one-layer policy is a tiny LSTM; all share their parameters, and hear the observation, the last action and the
reward. Running them is learning: no gradient, no fixed rule. As no LSTM knows which observation or action it belongs to, the
agent has to find out, and so what it has learned to do carries over to environments of other sizes, orders and meanings.

Kirsch, "Automating AI Research" (2025), chapter 4 and appendix C; Kirsch, Flennerhag, van Hasselt, Friesen, Oh and Chen,
"Introducing Symmetries to Black Box Meta Reinforcement Learning" (2022).

    Eq. 4.4            -> in_context_rnn (the comparison, RL^2)
    Eq. 4.6 to 4.9     -> symla
    Eq. 4.10           -> es_gradient, common/es.py
    Algorithm 14       -> lifetime (the inner loop), meta_train (the outer loop)
    Section 4.5, C.1   -> common/envs (the tasks), meta_test (regret, lifetimes)
    Figures 4.3 to 4.7 -> draw_lifetimes, compare

    python symla.py                                               # bandits with many arms: 5 minutes
    python symla.py --envs upright_cartpole                       # then with observations and actions shuffled
    python symla.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-envs independent_bandit:30

Axes, everywhere: p population, e environments in parallel, a observations, b actions, n hidden state, m message, t time, d all
parameters. To an environment, p and e are one axis.
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
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from common import envs, es
from common.envs import Env, EnvError

# ======================================================================================================================
# Args
# ======================================================================================================================
Name = Literal["symla", "rnn", "thompson", "uniform"]


@dataclass
class Args:
    """SymLA (chapter 4): meta-learn how to learn by reinforcement, then watch it learn in environments that are new."""

    preset: Literal["auto", "thesis", "laptop"] = "auto"
    """thesis: the thesis' numbers; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device, else laptop."""
    seed: int = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live."""
    compile: bool = True
    """Fuse a step of agents and environments with torch.compile (needs a C++ compiler on a CPU)."""
    mode: Literal["train", "test", "compare"] = "train"
    """train: meta-train, then meta-test; test: only meta-test a --checkpoint; compare: draw --runs side by side."""
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
    checkpoint_every: int = 100
    """Meta-steps between checkpoints."""
    runs: tuple[Path, ...] = ()
    """compare: finished run folders, averaged where they differ in nothing but the seed (Figures 4.3 to 4.7)."""

    learner: Name = "symla"
    """What learns at meta-test time. Meta-trained: symla, rnn (in-context RNN, RL^2). For bandits: thompson (sampling).
    uniform: a player that does not learn."""
    baselines: tuple[Name, ...] = ("rnn", "thompson", "uniform")
    """Learners trained and tested beside the first one, on the same budget of meta-steps."""

    envs: tuple[str, ...] = ("independent_bandit",)
    """Environments to meta-train in, in turn (section 4.5). A number after a colon is a size: independent_bandit:8 has 8 arms.
    shuffled_X permutes observations and actions of X, projected_X maps observations through a random matrix (C.2.3)."""
    test_envs: tuple[str, ...] = ()
    """Environments to meta-test in (default: --envs, and what section 4.5 puts beside them; see beside)."""
    lifetime_steps: int | None = None
    """L, environment steps of a lifetime, over as many episodes as fit (C.2.2: 500, bandits 100)."""
    sutton_barto_reward: bool = True
    """CartPole pays -1 for a failure instead of 1 per step, and reaching the goal on MountainCar 0 (not in the thesis: else
    lifetimes of a fixed length all pay alike)."""

    hidden: int | None = None
    """N, units of each sub-LSTM (C.2.1: 16, bandits 64)."""
    message_size: int = 8
    """M, size of forward and backward messages (C.2.1)."""
    micro_ticks: int = 2
    """LSTM ticks of the layer per environment step (C.2.1)."""
    obs_gain: float | None = None
    """Factor on what SymLA observes (not in the thesis: 1)."""
    rnn_size: int = 64
    """Units of the in-context RNN (not in the thesis, which says N = 64 for bandits; Wang et al. have 48)."""
    rnn_inputs: int | None = None
    """Observations that the in-context RNN has room for (default: as --envs and --test-envs need); fewer are padded."""
    rnn_outputs: int | None = None
    """Actions that it has room for, likewise."""

    init: Path | None = None
    """A checkpoint.pt whose parameters meta-training begins with, for the learners that it has, instead of new ones: a
    curriculum (not in the thesis)."""
    meta_steps: int | None = None
    """Outer steps (C.2.2: 20,000, bandits 4,000)."""
    population: int = 512
    """es: members of a population, half of them the mirror images of the others (C.2.2)."""
    evaluations: int | None = None
    """es: lifetimes of each member, in environments that all members share (C.2.2: 10, bandits 100)."""
    chunk: int | None = None
    """es: pairs of members evaluated at a time, to bound memory (default: chosen for the device)."""
    noise_std: float | None = None
    """es: sigma, standard deviation of the perturbations (C.2.2: 0.035, bandits 0.2)."""
    noise_end: float | None = None
    """es: sigma falls linearly to this (not in the thesis; default: it does not)."""
    lr: float | None = None
    """Adam's learning rate (C.2.2: 0.01, bandits 0.2)."""
    lr_decay: bool = False
    """Let the learning rate fall linearly to zero (not in the thesis)."""
    rank_shaping: bool = False
    """es: use the ranks of fitness instead of fitness (Salimans et al. 2017; not in the thesis)."""
    fitness: Literal["reward", "expected"] = "reward"
    """What a lifetime is worth: its rewards (Eq. 4.10), or for bandits those to be expected of the policy at each step."""

    test_seeds: int | None = None
    """Meta-test lifetimes per environment (Figures 4.3 to 4.7: 100; bandits 4,096, because 100 leave the regret vague)."""
    test_steps: int | None = None
    """Environment steps in a meta-test lifetime (default: as in meta-training)."""


# What depends on the environments: what each preset takes where a flag is left open, for bandits and for the rest (C.2.2).
THESIS_BANDITS = dict(
    hidden=64, lifetime_steps=100, meta_steps=4_000, evaluations=100, noise_std=0.2, lr=0.2, test_seeds=4_096, obs_gain=1.0
)
THESIS_OTHERS = dict(
    hidden=16, lifetime_steps=500, meta_steps=20_000, evaluations=10, noise_std=0.035, lr=0.01, test_seeds=100, obs_gain=1.0
)
LAPTOP_BANDITS = dict(
    hidden=16,  # a sixteenth of the time of 64
    lifetime_steps=100,
    meta_steps=400,  # three minutes
    evaluations=32,  # the whole population in a third of a second
    noise_std=0.1,  # what fits fewer parameters and fewer members
    lr=0.05,  # few steps
    obs_gain=1.0,
    test_seeds=4_096,
)
LAPTOP_OTHERS = dict(
    hidden=16,
    lifetime_steps=200,  # time
    meta_steps=600,  # five minutes on CartPole with the in-context RNN
    evaluations=16,  # 4 leave the fitness so noisy that nothing was found on CartPole
    noise_std=0.1,
    lr=0.05,
    obs_gain=6.0,  # small inputs hardly move a gate: without it contexts are not told apart (README)
    test_seeds=128,
)
LAPTOP = dict(
    envs=(
        "independent_bandit:8",
        "independent_bandit:10",
        "independent_bandit:12",
    ),  # it plays any number
    population=64,  # 0.3 s a step
    rank_shaping=True,  # the best and the worst of a small population outshout all others
    noise_end=0.03,  # the parameters themselves are tested, not their neighbourhood
    lr_decay=True,  # settles what the high rate leaves noisy
    fitness="expected",  # less noise: two and a half times less regret after two minutes
    rnn_size=32,  # a population of 64 says little about many parameters
)
SETTINGS = {
    "thesis": {"bandits": THESIS_BANDITS, "others": THESIS_OTHERS},
    "laptop": {"bandits": LAPTOP_BANDITS, "others": LAPTOP_OTHERS},
}
PRESETS = {"thesis": {}, "laptop": LAPTOP}


# ======================================================================================================================
# The learner
# ======================================================================================================================
class Learner(NamedTuple):
    """What all learners look like. A flat theta (p, d), taken apart by `shapes`, is all that meta-training changes.

    init(generator) -> theta (d,)
    initial_state(p, e, num_observations, num_actions, device) -> state
    act(params, state, obs (p, e, a), action (p, e, b) the last one, one-hot, reward (p, e), done (p, e)) -> state,
        logits (p, e, b)
    """

    shapes: dict[str, tuple[int, ...]]
    init: Callable
    initial_state: Callable
    act: Callable

    def params(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta (p, d) as named parameters, each (p, *shape)."""
        parts = theta.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (p, ..., i) @ weight (p, i, j) + bias (p, j): the same everywhere, but for the population."""
    flat = x.flatten(1, -2)
    return (flat @ weight if bias is None else torch.baddbmm(bias[:, None], flat, weight)).unflatten(1, x.shape[1:-1])


def lstm_cell(weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One tick of a x b LSTMs with shared weights and own states: f_RNN of Eq. 4.6. Gates: input, cell, forget, output.

    weight (p, n, 4n); from_a (p, e, a, 4n) and from_b (p, e, b, 4n): what rows and columns feed to the gates.
    """
    i, j, f, o = (from_a[..., :, None, :] + from_b[..., None, :, :] + affine(h, weight)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * j.tanh()
    return o.sigmoid() * c.tanh(), c


def fused_lstm_cell(weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """lstm_cell in sums and products only, which torch.compile turns into tight loops over the states. tanh is Lambert's
    continued fraction, exact to 1e-4."""

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


def symla(args: Args, cell: Callable = lstm_cell) -> Learner:
    """The symmetric learning agent: one recurrent layer (K = 1) of a x b LSTMs in place of weights, for any a and b.

    state: h and c (p, e, a, b, n); fwd_msg (p, e, b, m) and bwd_msg (p, e, a, m), the layer's own messages of the step before.
    All start at zero, as in appendix C.4.
    """
    n, m = args.hidden, args.message_size
    heard = 2 * (m + 1) + 2  # with each message one number of the environment's; reward and done
    shapes = {"lstm.weight": (heard + n, 4 * n), "lstm.bias": (4 * n,)}
    shapes |= {"fwd.weight": (n, m), "fwd.bias": (m,), "bwd.weight": (n, m), "bwd.bias": (m,)}

    def initial_state(p: int, e: int, a: int, b: int, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(p, e, *shape, device=device) for shape in ((a, b, n), (a, b, n), (b, m), (a, m)))

    def act(
        params: dict[str, Tensor], state: tuple[Tensor, ...], obs: Tensor, action: Tensor, reward: Tensor, done: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        h, c, fwd_msg, bwd_msg = state
        hear_a, hear_b, recurrent = params["lstm.weight"].split([m + 1, m + 3, n], dim=1)
        aux = torch.stack([reward, done], -1)[..., None, :].expand(-1, -1, action.shape[-1], -1)  # to every LSTM
        from_a = affine(torch.cat([bwd_msg, args.obs_gain * obs[..., None]], -1), hear_a)
        from_b = affine(torch.cat([fwd_msg, action[..., None], aux], -1), hear_b, params["lstm.bias"])
        for _ in range(args.micro_ticks):  # h_ab <- f_RNN(h_ab, o_a, a_b, r, fwd_msg_b, bwd_msg_a), Eq. 4.9
            h, c = cell(recurrent, from_a, from_b, h, c)
        fwd_msg = affine(h.mean(2), params["fwd.weight"], params["fwd.bias"])  # Eq. 4.7, a mean as in appendix C.4
        bwd_msg = affine(h.mean(3), params["bwd.weight"], params["bwd.bias"])  # Eq. 4.8
        return (h, c, fwd_msg, bwd_msg), fwd_msg[..., 0]  # y := the first number of each forward message

    return Learner(shapes, partial(initial_theta, shapes, n), initial_state, act)


def initial_theta(shapes: dict[str, tuple[int, ...]], n: int, generator: torch.Generator) -> Tensor:
    """Matrices (fan-in, fan-out) of truncated normals with std 1/sqrt(fan-in), zero biases, and 1 for the n forget gates: what
    appendix C.4's library does unless told otherwise."""
    theta = {}
    for name, shape in shapes.items():
        theta[name] = torch.zeros(shape)
        if len(shape) == 2:
            torch.nn.init.trunc_normal_(theta[name], a=-2, b=2, generator=generator)
            theta[name] /= math.sqrt(shape[0])
    theta["lstm.bias"][2 * n : 3 * n] = 1
    return torch.cat([value.flatten() for value in theta.values()])


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
class Life(NamedTuple):
    """Where a lifetime stands, before the agent acts."""

    state: Any  # the learner's
    env: dict[str, Tensor]  # the environments', (p * e, ...)
    obs: Tensor  # (p, e, a)
    action: Tensor  # (p, e, b) the last one, one-hot; zeros before the first
    reward: Tensor  # (p, e) for it
    done: Tensor  # (p, e) whether it ended an episode; the agent is not reset


class Outcome(NamedTuple):
    """What a step brings: rewards (p, e). Where an environment knows how much each action pays, the reward to be expected of
    the policy and of the best action, else the reward itself."""

    reward: Tensor
    expected: Tensor
    best: Tensor


def seen(obs: Tensor, p: int) -> Tensor:
    """What the agent sees of an observation (p * e, a): (p, e, a), and where there is nothing to see, a constant 1."""
    obs = obs if obs.shape[-1] else F.pad(obs, (0, 1), value=1.0)
    return obs.unflatten(0, (p, -1))


def one_step(learner: Learner, env: Env, params: dict[str, Tensor], life: Life, draws: Tensor) -> tuple[Life, Outcome]:
    """The body of the inner loop of Algorithm 14. draws (e, 1 + env.num_draws) uniform numbers: all members of a population
    live in the same environments with the same luck."""
    p, e, b = life.action.shape
    state, logits = learner.act(params, life.state, life.obs, life.action, life.reward, life.done)
    policy = logits.softmax(-1)
    chosen = (policy.cumsum(-1) < draws[:, :1]).sum(-1).clamp(max=b - 1)  # a_t ~ p(a_t; y)
    arms = env.expected_rewards(life.env)
    world, step = env.step(life.env, chosen.flatten(), draws[None, :, 1:].expand(p, -1, -1).flatten(0, 1))
    reward, done = (x.unflatten(0, (p, e)).to(policy.dtype) for x in (step.reward, step.terminated | step.truncated))
    action = (chosen[..., None] == torch.arange(b, device=chosen.device)).to(policy.dtype)
    expected = best = reward
    if arms is not None:
        arms = arms.unflatten(0, (p, e))
        expected, best = (policy * arms).sum(-1), arms.amax(-1)
    return Life(state, world, seen(step.obs, p), action, reward, done), Outcome(reward, expected, best)


def lifetime(learner: Learner, live: Callable, env: Env, theta: Tensor, draws: tuple[Tensor, Tensor]) -> Outcome:
    """One lifetime of L steps over as many episodes as fit, for all members in all environments (Algorithm 14, inner loop).

    theta (p, d); draws: (e, env.lifetime_draws) for the beginning and (t, e, 1 + env.num_draws). live: one_step of this learner
    and this environment, or a compiled one. Returns an Outcome of (p, e, t).
    """
    first, later = draws
    p, e, b = len(theta), len(first), env.num_actions
    world, obs = env.reset(first.expand(p, -1, -1).flatten(0, 1))
    obs = seen(obs, p)
    nothing = torch.zeros(2, p, e, device=theta.device)
    state = learner.initial_state(p, e, obs.shape[-1], b, theta.device)
    life = Life(state, world, obs, torch.zeros(p, e, b, device=theta.device), nothing[0], nothing[1])
    params, outcomes = learner.params(theta), []
    for draw in later.unbind(0):
        life, outcome = live(params, life, draw)
        outcomes.append(outcome)
    return Outcome(*(torch.stack(parts, -1) for parts in zip(*outcomes, strict=True)))


def luck(env: Env, count: int, steps: int, *key: int) -> tuple[Tensor, Tensor]:
    """The uniform numbers of `count` lifetimes, a pure function of key: on a GPU they are drawn on the CPU too."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(seed)
    shapes = (count, env.lifetime_draws), (steps, count, 1 + env.num_draws)
    return tuple(torch.rand(shape, generator=generator).to(env.device) for shape in shapes)


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
TRAIN, TEST = 0, 1  # which luck


def es_gradient(args: Args, learner: Learner, live: Callable, env: Env, theta: Tensor, step: int) -> tuple[Tensor, ...]:
    """Eq. 4.10, as a loss: every member lives in the same --evaluations environments. theta (d,).

    Returns the gradient (d,) of minus the reward per step, the mean loss, and the mean reward per step that was paid.
    """
    draws, paid = luck(env, args.evaluations, args.lifetime_steps, args.seed, TRAIN, step), []

    def evaluate(population: Tensor, pairs: Tensor) -> Tensor:
        outcome = lifetime(learner, live, env, population, draws)
        paid.append(outcome.reward.mean())
        return -(outcome.expected if args.fitness == "expected" else outcome.reward).mean((1, 2))

    sigma, pairs = args.noise_std, args.population // 2
    if args.noise_end is not None:
        sigma += (args.noise_end - sigma) * step / args.meta_steps
    settings = dict(pairs=pairs, sigma=sigma, seed=args.seed, generation=step, rank_shaping=args.rank_shaping)
    grad, losses = es.gradient(theta, evaluate, chunk=args.chunk or even_chunk(args, env), **settings)
    return grad, losses.mean(), all_reduce_mean(torch.stack(paid).mean())


def meta_train(
    args: Args, players: dict[str, list[tuple[Learner, Callable, Env]]], thetas: dict[str, Tensor], run: "Run"
) -> None:
    """Algorithm 14, for learners side by side on the same budget. Changes thetas in place. players: of each learner what it
    needs to live in each environment."""
    adam = {name: torch.optim.Adam([thetas[name]], args.lr, betas=(0.9, 0.999)) for name in players}
    for step in run.steps(args.meta_steps if players else 0, {"thetas": thetas, "adam": adam}):
        log = {}
        for name, turns in players.items():
            learner, live, env = turns[step % len(turns)]  # e ~ p(e): the environments in turn
            found = es_gradient(args, learner, live, env, thetas[name], step)
            thetas[name].grad, log[f"{name}_loss"], log[f"{name}_reward"] = found
            adam[name].param_groups[0]["lr"] = args.lr * (1 - step / args.meta_steps) if args.lr_decay else args.lr
            adam[name].step()  # theta <- theta + alpha * the gradient of the lifetime's reward
        run.log(step, log)


# ======================================================================================================================
# Baselines
# ======================================================================================================================
def in_context_rnn(args: Args) -> Learner:
    """The in-context RNN (RL^2; Eq. 4.4): one LSTM that sees observation, last action, reward and done. It has room for so many
    observations and actions; fewer are padded with zeros."""
    n, a, b = args.rnn_size, args.rnn_inputs, args.rnn_outputs
    shapes = {"lstm.weight": (a + b + 2 + n, 4 * n), "lstm.bias": (4 * n,), "out.weight": (n, b), "out.bias": (b,)}

    def initial_state(p: int, e: int, _: int, __: int, device: torch.device) -> tuple[Tensor, ...]:
        return torch.zeros(p, e, n, device=device), torch.zeros(p, e, n, device=device)

    def act(
        params: dict[str, Tensor], state: tuple[Tensor, ...], obs: Tensor, action: Tensor, reward: Tensor, done: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        h, c = state
        obs, last = F.pad(obs, (0, a - obs.shape[-1])), F.pad(action, (0, b - action.shape[-1]))
        heard = torch.cat([obs, last, reward[..., None], done[..., None], h], -1)
        i, j, f, o = affine(heard, params["lstm.weight"], params["lstm.bias"]).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * j.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c), affine(h, params["out.weight"], params["out.bias"])[..., : action.shape[-1]]

    return Learner(shapes, partial(initial_theta, shapes, n), initial_state, act)


def thompson_sampling(args: Args) -> Learner:
    """Thompson (1933): play the arm that is best in one draw from the posterior, which begins uniform for each arm. For the
    independent bandits this is the true prior. Draws from PyTorch's own generator. state: wins and losses (p, e, b), plus 1."""

    def initial_state(p: int, e: int, _: int, b: int, device: torch.device) -> tuple[Tensor, ...]:
        return torch.ones(p, e, b, device=device), torch.ones(p, e, b, device=device)

    def act(
        params: dict[str, Tensor], state: tuple[Tensor, ...], obs: Tensor, action: Tensor, reward: Tensor, done: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        wins, losses = state[0] + action * reward[..., None], state[1] + action * (1 - reward[..., None])
        best = torch.distributions.Beta(wins, losses).sample().argmax(-1, keepdim=True)
        return (wins, losses), torch.full_like(wins, -math.inf).scatter(-1, best, 0.0)

    return Learner({}, lambda generator: torch.zeros(0), initial_state, act)


def uniform_player(args: Args) -> Learner:
    """Does not learn."""

    def act(params: dict, state: tuple, obs: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> tuple[tuple, Tensor]:
        return (), torch.zeros_like(action)

    return Learner({}, lambda generator: torch.zeros(0), lambda *_: (), act)


LEARNERS = {"symla": symla, "rnn": in_context_rnn, "thompson": thompson_sampling, "uniform": uniform_player}
META_TRAINED = ("symla", "rnn")


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def meta_test(args: Args, thetas: dict[str, Tensor], run: "Run") -> list[dict[str, Any]]:
    """--test-seeds lifetimes of every learner in every test environment, the same for all learners. For bandits, the regret so
    far that is to be expected of the policy: what the best arm would have paid, minus what the policy's arms pay on average.
    Else the return so far, and the reward per step since the last plotted step."""
    rows = []
    for number, name in enumerate(args.test_envs):
        env = make_env(args, name, args.test_seeds, run.device)
        draws = luck(env, args.test_seeds, args.test_steps or args.lifetime_steps, args.seed, TEST, number)
        for learner_name in learners_of(args, name):
            learner, live, env = player(args, learner_name, name, args.test_seeds, run, "test")
            theta, together = thetas[learner_name][None], at_a_time(args, env)
            parts = zip(draws[0].split(together), draws[1].split(together, dim=1), strict=True)
            outcomes = [lifetime(learner, live, env, theta, part) for part in parts]
            reward, expected, best = (torch.cat(parts, 1)[0].cpu().double() for parts in zip(*outcomes, strict=True))
            row, before = partial(result_row, learner_name, name, novelty(args, name)), 0
            for step in plotted_steps(reward.shape[-1]):
                if is_bandit(name):
                    rows.append(row("cumulative_regret", step, (best - expected)[:, :step].sum(1)))
                else:
                    rows.append(row("return", step, reward[:, :step].sum(1)))
                    rows.append(row("reward_per_step", step, reward[:, before:step].mean(1)))
                before = step
    return sorted(rows, key=lambda row: row["metric"] == "reward_per_step")


def plotted_steps(steps: int) -> list[int]:
    """Where curves have points: 1, 10, 100, ... and every twentieth part."""
    points = [1, 10, 100, 400, 1000, 10_000, *(-(-steps * part // 20) for part in range(1, 21))]
    return sorted({point for point in points if point <= steps})


def base(name: str) -> str:
    """An environment without its size and what was done to it."""
    return envs.base_name(name).removeprefix("swapped_")


def novelty(args: Args, name: str) -> str:
    """none: meta-trained in this very environment; task: in one of another size, order or meaning; domain: in others."""
    return "none" if name in args.envs else "task" if base(name) in map(base, args.envs) else "domain"


def is_bandit(name: str) -> bool:
    env = envs.make(name, 1)
    return env.expected_rewards(env.reset(torch.zeros(1, env.lifetime_draws))[0]) is not None


def beside(name: str) -> list[str]:
    """What section 4.5 meta-tests in beside the environment of meta-training."""
    if name in FIVE:
        return FIVE
    if name.startswith("independent_bandit"):
        return [f"independent_bandit:{arms}" for arms in (2, 4, 20)]
    if name.startswith("grid_world"):
        return [f"swapped_{name}"]
    if name.startswith("projected_dense_grid_world"):
        return ["projected_upright_cartpole"]
    return [f"shuffled_{name}"] if name in ("cartpole", "upright_cartpole", "acrobot", "mountain_car") else []


FIVE = ["independent_bandit", "dependent_bandit", "easy_bandit", "medium_bandit", "hard_bandit"]  # Figure 4.3
LABELS = {"symla": "SymLA", "rnn": "in-context RNN", "thompson": "Thompson sampling", "uniform": "uniform-random player"}
COLOURS = {"symla": "C0", "rnn": "C1", "thompson": "k", "uniform": "0.6"}
NOVELTY = {"none": "seen", "task": "unseen task", "domain": "unseen environment"}
UNITS = {
    "cumulative_regret": "expected cumulative regret",
    "return": "return of the lifetime so far",
    "reward_per_step": "reward per step",
}


def figures() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
    return plt


def draw_lifetimes(path: Path, rows: list[dict[str, Any]], spread: str) -> None:
    """Figures 4.5 to 4.7, and regret for bandits: one panel for each environment, a line for each learner. `source` of a row,
    if it has one, says where its learner was meta-trained. Shaded: standard deviation."""
    plt = figures()
    rows = [row for row in rows if row["metric"] != "return"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(len(tasks), 4)
    lines = -(-len(tasks) // columns)
    size = (1 + 3.4 * columns, 0.8 + 2.7 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    sources = list(dict.fromkeys(row.get("source", "") for row in rows if row["learner"] in META_TRAINED)) or [""]
    for axis, task in zip(axes.flat, tasks, strict=False):
        these = [row for row in rows if row["task"] == task]
        for learner, source in dict.fromkeys((row["learner"], row.get("source", "")) for row in these):
            line = [row for row in these if (row["learner"], row.get("source", "")) == (learner, source)]
            x, mean, std = (np.array([row[key] for row in line]) for key in ("step", "mean", "std"))
            label = LABELS[learner] + (f", {source}" if len(sources) > 1 and learner in META_TRAINED else "")
            dashes = ("-", "--", ":", "-.")[sources.index(source) % 4 if source in sources else 0]
            axis.plot(x, mean, color=COLOURS[learner], ls=dashes, label=label)
            if len(sources) == 1:
                axis.fill_between(x, mean - std, mean + std, color=COLOURS[learner], alpha=0.12, lw=0)
        new = f" ({NOVELTY[these[0]['novelty']]})" if len(sources) == 1 else ""
        axis.set(title=task + new, xlabel="environment steps", ylabel=UNITS[these[0]["metric"]])
        axis.title.set_fontsize("small")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    title = f"shaded: {spread}" if len(sources) == 1 else None
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, title=title, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(args: Args) -> None:
    """Figures 4.3 and 4.4 over finished runs: what each learner, by the environments it was meta-trained in (rows), reached at
    the end of a lifetime in each environment (columns); and Figures 4.5 to 4.7. Runs of different seeds are averaged."""
    if not args.runs:
        raise Mistake("--mode compare needs --runs FOLDER FOLDER ...")
    found: dict[tuple, list[dict[str, Any]]] = {}
    for folder in args.runs:
        try:
            results = json.loads((folder / "results.json").read_text())
            source = ", ".join(results["args"]["envs"])
            for row in results["results"]:
                key = row["learner"], source if row["learner"] in META_TRAINED else "", row["task"], row["metric"], row["step"]
                found.setdefault(key, []).append(row | {"source": source})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Mistake(f"{folder} holds no finished run of {SCRIPT}.py.") from error
    rows = []
    for same in found.values():  # over meta-training and meta-test seeds
        mean, std = (np.array([row[what] for row in same]) for what in ("mean", "std"))
        rows.append(same[0] | {"mean": mean.mean(), "std": math.sqrt((std**2).mean() + mean.var())})
    args.run_dir.mkdir(parents=True, exist_ok=True)
    draw_lifetimes(args.run_dir / "lifetimes.png", rows, "standard deviation over meta-training and meta-test runs")
    draw_matrix(args.run_dir / "matrix.png", [row for row in rows if row["metric"] != "reward_per_step"])
    print(f"Written to {args.run_dir}: lifetimes.png, matrix.png")


def in_order(name: str) -> tuple[int, str, int]:
    """Where an environment stands in a figure: the five bandits as in Figure 4.3, others by name and size."""
    size = name.rpartition(":")[2]
    return FIVE.index(name) if name in FIVE else len(FIVE), base(name), int(size) if size.isdecimal() else 0


def draw_matrix(path: Path, rows: list[dict[str, Any]]) -> None:
    """Heat-maps of the last step: one for each meta-trained learner, one of their difference, one of the others."""
    last: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = row["learner"], row["source"] if row["learner"] in META_TRAINED else LABELS[row["learner"]], row["task"]
        last[key] = max(last.get(key, row), row, key=lambda row: row["step"])
    tasks = sorted({task for _, _, task in last}, key=in_order)
    sources = sorted({source for learner, source, _ in last if learner in META_TRAINED}, key=in_order)
    maps = {
        LABELS[name]: {(source, task): row["mean"] for (learner, source, task), row in last.items() if learner == name}
        for name in META_TRAINED
    }
    ours, theirs = maps.values()
    maps["SymLA minus in-context RNN"] = {key: ours[key] - theirs[key] for key in ours if key in theirs}
    fixed = {(source, task): row["mean"] for (learner, source, task), row in last.items() if learner not in META_TRAINED}
    maps["not meta-trained"] = fixed
    maps = {title: cells for title, cells in maps.items() if cells}
    height = max(row["mean"] for (learner, _, _), row in last.items() if learner in META_TRAINED)
    plt = figures()
    figure, axes = plt.subplots(
        len(maps),
        1,
        figsize=(3.5 + 0.9 * len(tasks), 1 + 0.45 * (len(sources) + 1) * len(maps)),
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, cells) in zip(axes.flat, maps.items(), strict=True):
        lines = [source for source in [*sources, *LABELS.values()] if source in {source for source, _ in cells}]
        for (source, task), value in cells.items():
            x, y = tasks.index(task), lines.index(source)
            colour = plt.cm.viridis(min(value / height, 1.0) if height > 0 else 0) if "minus" not in title else "0.9"
            axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour))
            dark = "minus" not in title and value < 0.6 * height
            axis.text(x, y, f"{value:.3g}", ha="center", va="center", color="w" if dark else "k")
        axis.set(xlim=(-0.5, len(tasks) - 0.5), ylim=(len(lines) - 0.5, -0.5), title=title)
        axis.set_yticks(range(len(lines)), lines)
        axis.set_xticks(range(len(tasks)), tasks if axis is axes.flat[-1] else [""] * len(tasks), rotation=30, ha="right")
        axis.grid(False)
    metrics = " / ".join(dict.fromkeys(UNITS[row["metric"]] for row in rows))
    figure.suptitle(
        f"{metrics}, after {max(row['step'] for row in rows)} steps; rows: meta-trained in, columns: meta-tested in"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ======================================================================================================================
# The run
# ======================================================================================================================
SCRIPT = Path(__file__).stem
USER_ERRORS = (EnvError,)
NAMED_AFTER = ("envs", "learner")  # the flags that name a run's folder


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


def settled(args: Args) -> Args:
    """Args with what depends on the environments filled in, where no flag said otherwise."""
    if not args.envs:
        raise Mistake("--envs needs at least one environment.")
    kinds = {is_bandit(name) for name in args.envs}
    if len(kinds) > 1:
        raise Mistake("--envs mixes bandits and others, which have other hyperparameters; choose either.")
    setting = SETTINGS[args.preset]["bandits" if kinds.pop() else "others"]
    args = replace(args, **{flag: value for flag, value in setting.items() if getattr(args, flag) is None})
    if not args.test_envs:
        args = replace(args, test_envs=tuple(dict.fromkeys([*args.envs, *(env for name in args.envs for env in beside(name))])))
    places = [make_env(args, name, 1) for name in (*args.envs, *args.test_envs)]
    sizes = dict(
        rnn_inputs=max(max(env.obs_size, 1) for env in places), rnn_outputs=max(env.num_actions or 0 for env in places)
    )
    return replace(args, **{flag: size for flag, size in sizes.items() if getattr(args, flag) is None})


def check(args: Args, world: int) -> None:
    """Refuse what cannot work, before anything is written."""
    counts = "lifetime_steps hidden message_size micro_ticks rnn_size rnn_inputs rnn_outputs meta_steps evaluations chunk"
    counts += " test_seeds test_steps checkpoint_every"
    for name in counts.split():
        if (number := getattr(args, name)) is not None and number < 1:
            raise Mistake(f"--{name.replace('_', '-')} has to be at least 1.")
    for name in ("noise_std", "noise_end", "lr", "obs_gain"):
        if (number := getattr(args, name)) is not None and not 0 < number < math.inf:
            raise Mistake(f"--{name.replace('_', '-')} has to be above 0.")
    if args.population < 2 or args.population % 2:
        raise Mistake("--population has to be even: half of it are the mirror images of the other half.")
    if args.population // 2 % world:
        raise Mistake(f"{args.population // 2} pairs of --population cannot be shared evenly by {world} processes.")
    for name in (*args.envs, *args.test_envs):
        if make_env(args, name, 1).num_actions is None:
            raise Mistake(f"SymLA chooses among actions, and those of {name} are continuous; choose another environment.")
    for name in (*args.envs, *args.test_envs):
        if not learners_of(args, name):
            raise Mistake(f"{args.learner} cannot play {name}; choose another --learner, or other environments.")
    for name in args.envs:
        if "rnn" in (args.learner, *args.baselines) and not fits(args, "rnn", name):
            raise Mistake(f"--rnn-inputs {args.rnn_inputs} and --rnn-outputs {args.rnn_outputs} are too small for {name}.")


def fits(args: Args, learner: str, name: str) -> bool:
    """Whether a learner can live in an environment."""
    env = make_env(args, name, 1)
    if learner == "rnn":
        return env.obs_size <= args.rnn_inputs and env.num_actions <= args.rnn_outputs
    return learner != "thompson" or is_bandit(name)


def learners_of(args: Args, name: str) -> list[str]:
    """The learners that can live in an environment."""
    return [learner for learner in dict.fromkeys([args.learner, *args.baselines]) if fits(args, learner, name)]


def make_env(args: Args, name: str, count: int, device: torch.device | str = "cpu", compile: bool = False) -> Env:
    """An environment with observations of about one, in which lifetimes of a fixed length do not all pay alike."""
    option = {"cartpole": "sutton_barto_reward", "mountain_car": "free_goal"}.get(base(name))
    options = {option: True} if option and args.sutton_barto_reward else {}
    return envs.make(name, count, device, scaled=True, compile=compile, **options)


def at_a_time(args: Args, env: Env) -> int:
    """How many lifetimes to run at once: their states should stay in a CPU's cache, or use a GPU's memory well."""
    return max(1, (2**19 if args.device == "cpu" else 2**28) // (args.hidden * max(env.obs_size, 1) * env.num_actions))


def even_chunk(args: Args, env: Env) -> int:
    """How many pairs of ES to run at once: as many as at_a_time allows, and always the same number, for one compilation."""
    pairs, most = len(es.share(args.population // 2)), at_a_time(args, env) // args.evaluations
    return max(c for c in range(1, pairs + 1) if pairs % c == 0 and (c == 1 or 2 * c <= most))


def player(args: Args, learner: str, name: str, count: int, run: Run, use: str) -> tuple[Learner, Callable, Env]:
    """What a learner needs to live in `count` copies of an environment: itself, a step of both, and the environment.

    Meta-training compiles anew for each environment, meta-testing once for all. Of SymLA on a CPU the cell is all that is worth
    it, written out for small states; a GPU wants the whole step, and products as products.
    """
    anew = use == "train" and len(args.envs) <= 8
    compiled = run.compiles and anew and args.device == "cpu" and learner != "rnn"
    env = make_env(args, name, count, run.device, compile=compiled)
    if learner == "symla" and run.compiles and args.device == "cpu":
        small = args.hidden <= 32
        options = dict(options=fuse(args)) if small else {}
        made = symla(args, torch.compile(fused_lstm_cell if small else lstm_cell, dynamic=not anew, **options))
        return made, partial(one_step, made, env), env
    made = LEARNERS[learner](args)
    step = partial(one_step, made, env)
    compiled = run.compiles and anew and learner in META_TRAINED and env.compilable
    return made, torch.compile(step, dynamic=False) if compiled else step, env


def fuse(args: Args) -> dict[str, Any]:
    """What makes inductor write fused_lstm_cell's sums of n products out, with fused multiply-adds."""
    return {"unroll_reductions_threshold": args.hidden + 1, "cpp.enable_floating_point_contract_flag": "fast"}


def load_thetas(args: Args, thetas: dict[str, Tensor], path: Path) -> None:
    """The parameters of a checkpoint, of the learners that the flags name."""
    saved = read_checkpoint(path)["state"]["thetas"]
    for name, theta in thetas.items():
        if name not in saved:
            raise Mistake(f"{path} holds no {name}; it has {', '.join(saved)}.")
        if saved[name].shape != theta.shape:
            raise Mistake(f"{path} holds a {name} of another size than these flags ask for; leave them out.")
        theta.copy_(saved[name])


def main() -> None:
    args = parse_args()
    if args.mode == "compare":
        return compare(args)
    args = settled(args)
    check(args, int(os.environ.get("WORLD_SIZE", 1)))
    names = list(dict.fromkeys([args.learner, *args.baselines]))
    thetas = {name: LEARNERS[name](args).init(torch.Generator().manual_seed(args.seed)) for name in names}
    trained = [name for name in names if name in META_TRAINED]
    if args.mode == "test":
        load_thetas(args, {name: thetas[name] for name in trained}, args.checkpoint)
    elif args.init and not args.resume:
        begun = read_checkpoint(args.init)["state"]["thetas"]
        if not set(trained) & set(begun):
            raise Mistake(f"{args.init} holds none of the learners that the flags name; it has {', '.join(begun)}.")
        load_thetas(args, {name: thetas[name] for name in trained if name in begun}, args.init)
    run = Run(args)
    thetas = {name: theta.to(run.device) for name, theta in thetas.items()}
    started = time.time()
    with torch.no_grad():
        if args.mode == "train":
            players = {name: [player(args, name, env, args.evaluations, run, "train") for env in args.envs] for name in trained}
            meta_train(args, players, {name: thetas[name] for name in trained}, run)
            torch.compiler.reset()
        tested = time.time()
        rows = meta_test(args, thetas, run)
    if run.rank > 0:
        return
    for name in args.test_envs:
        if "rnn" in names and not fits(args, "rnn", name):
            room = f"{args.rnn_inputs} observations and {args.rnn_outputs} actions"
            run.say(f"{name} is too large for the in-context RNN, which was made for at most {room}.")
    draw_lifetimes(run.folder / "lifetimes.png", rows, f"standard deviation over {args.test_seeds} lifetimes")
    seconds = {"meta_train": tested - started, "meta_test": time.time() - tested}
    run.finish(rows, seconds=seconds, parameters=thetas[args.learner].numel())


if __name__ == "__main__":
    run_as_script(main)
