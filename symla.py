"""SymLA: the symmetries of backpropagation in a black-box agent that learns by reinforcement.

Every weight of a one-layer policy is a tiny LSTM; all share their parameters. Their inputs are the observation, the last action
and the reward. Running them is learning: no gradient, no fixed rule. No LSTM depends on which observation or action it belongs
to; the agent infers that within its lifetime, so what it has learned carries over to other sizes, orders and meanings.

Kirsch, "Automating AI Research" (2025), chapter 4 and appendix C; Kirsch, Flennerhag, van Hasselt, Friesen, Oh and Chen,
"Introducing Symmetries to Black Box Meta Reinforcement Learning" (2022). Results: .github/results/symla.md.

    Eq. 4.4            -> InContextRNN (the comparison, RL^2)
    Eq. 4.6 to 4.9     -> SymLA
    Eq. 4.10           -> es_gradient, common/es.py
    Algorithm 14       -> lifetime (the inner loop), meta_train (the outer loop)
    Section 4.5, C.1   -> common/envs (the tasks), meta_test (regret, lifetimes)
    Figures 4.3 to 4.7 -> draw_lifetimes, tests/reproduce.py

    python symla.py                                               # bandits with many arms: 4 minutes
    python symla.py --envs upright_cartpole --obs-gain 1          # then with observations and actions shuffled
    python symla.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-envs independent_bandit:30

    agent = symla.SymLA.load("pretrained", num_actions=2)         # learns bandits, whose observation is [1.0]
    action = agent.act(obs, reward, done)                         # at each step of an environment; 0 and False at first

The laptop preset was chosen on two-armed bandits, and elsewhere on upright_cartpole, shuffled too, and on grid_world:2: these
are validation environments. There the in-context RNN has SymLA's sigma and rate, which were not searched for it.

Axes, everywhere: p population, e environments in parallel, a observations, b actions, n hidden state, m message, t time, d all
parameters. For an environment, p and e are one axis.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from common import cells, checkpoints, envs, es, graphs, kernels, machine, rng
from common.checkpoints import CheckpointError
from common.envs import Env, EnvError
from common.figures import plot
from common.flags import Count, FlagError, Positive, Seed, check_ranges, from_dict
from common.learners import Learner, Params, initial_weight
from common.machine import can_compile, keep_memory, lock
from common.results import MetricsLog, result_row, table, to_json

# ======================================================================================================================
# Args
# ======================================================================================================================
Name = Literal["symla", "rnn", "thompson", "uniform"]
Width = Annotated[int, (1, 2**12)]  # of a layer
Size = Annotated[int, (1, 2**20)]  # of an axis of a tensor


@dataclass
class Args:
    """SymLA (chapter 4): meta-learn how to learn by reinforcement, then watch it learn in environments that are new."""

    preset: Literal["auto", "thesis", "laptop"] = "auto"
    """thesis: the thesis' numbers; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device, else laptop."""
    seed: Seed = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors are."""
    compile: bool = True
    """Fuse a step of agents and environments with torch.compile (needs a C++ compiler on a CPU)."""
    triton: bool = False
    """SymLA's LSTMs by a Triton kernel (equal in tests; not yet timed)."""
    graphs: bool = False
    """A lifetime as one CUDA graph (equal in tests; not yet timed)."""
    mode: Literal["train", "test"] = "train"
    """train: meta-train, then meta-test; test: only meta-test a --checkpoint."""
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
    checkpoint_every: Count = 100
    """Meta-steps between checkpoints."""

    learner: Name = "symla"
    """What learns at meta-test time. Meta-trained: symla, rnn (in-context RNN, RL^2). For bandits: thompson (sampling).
    uniform: random actions."""
    baselines: tuple[Name, ...] = ("rnn", "thompson", "uniform")
    """Learners trained and tested beside the first one, on the same budget of meta-steps."""

    envs: tuple[str, ...] = ("independent_bandit",)
    """Environments to meta-train in, one after the other (section 4.5). A number after a colon is a size, independent_bandit:8.
    shuffled_X permutes observations and actions of X, projected_X maps observations through a random matrix (C.2.3)."""
    test_envs: tuple[str, ...] = ()
    """Environments to meta-test in (default: --envs and those `beside` them: section 4.5's, and 4 and 20 arms)."""
    lifetime_steps: Count | None = None
    """L, actions of a lifetime, over as many episodes as fit (C.2.2: 500, bandits 100)."""
    action_repeat: Annotated[int, (1, 1000)] = 1
    """Environment steps that each action is taken for; its reward is the sum of theirs divided by this (not in the thesis)."""
    sutton_barto_reward: bool = False
    """CartPole's reward is -1 for a failure instead of 1 per step, and that of MountainCar's goal 0 (not in the thesis).
    Without it lifetimes of a fixed length differ only in how often an episode begins, a step that pays 0."""

    hidden: Width | None = None
    """N, units of each sub-LSTM (C.2.1: 16, bandits 64)."""
    message_size: Width = 8
    """M, size of forward and backward messages (C.2.1)."""
    micro_ticks: Count = 2
    """LSTM ticks of the layer per environment step (C.2.1)."""
    obs_gain: Positive | None = None
    """Factor on SymLA's observations (not in the thesis: 1)."""
    normalize_rewards: bool = False
    """Agents observe rewards minus their mean, over their standard deviation, both of the lifetime so far: then environments
    with rewards of other scales look alike (not in the thesis)."""
    rnn_size: Width = 64
    """Units of the in-context RNN (not in the thesis; SymLA's N for bandits is 64 "to match Wang et al.", who have 48)."""
    rnn_inputs: Size | None = None
    """Size of the in-context RNN's observations (default: as --envs and --test-envs need); smaller ones are padded."""
    rnn_outputs: Size | None = None
    """Number of its actions, likewise."""
    rnn_noise_std: Positive | None = None
    """Sigma of the in-context RNN (default: --noise-std); where sigma falls, it falls by the same factor."""
    rnn_lr: Positive | None = None
    """Adam's learning rate for the in-context RNN (default: --lr)."""

    init: str | None = None
    """Start meta-training from this checkpoint's parameters, for the learners that it has: a curriculum (not in the thesis)."""
    meta_steps: Count | None = None
    """Outer steps (C.2.2: 20,000, bandits 4,000)."""
    population: Annotated[int, (2, 2**20)] = 1024
    """Members of a population, half of them the mirror images of the others (C.2.2: a population size of 512, which in C.4
    counts antithetic pairs)."""
    evaluations: Size | None = None
    """Lifetimes of each member (C.2.2: 10 "evaluations per population sample", bandits 100)."""
    common_lifetimes: bool = False
    """All pairs have the same lifetimes. Otherwise each has initial states and random numbers of its own, which its two
    members share (C.4)."""
    chunk: Count | None = None
    """Pairs of members evaluated at a time, to bound memory (default: chosen for the device)."""
    noise_std: Positive | None = None
    """Sigma, standard deviation of the perturbations (C.2.2: 0.035, bandits 0.2)."""
    noise_end: Positive | None = None
    """Sigma falls linearly to this (not in the thesis; default: it does not)."""
    lr: Positive | None = None
    """Adam's learning rate (C.2.2: 0.01, bandits 0.2)."""
    lr_decay: bool = False
    """Let the learning rate fall linearly to zero (not in the thesis)."""
    rank_shaping: bool = False
    """Use the ranks of fitness instead of fitness (Salimans et al. 2017; not in the thesis)."""
    fitness: Literal["reward", "expected"] = "reward"
    """Fitness of a lifetime: its rewards (Eq. 4.10), or for bandits the expected rewards of the policy at each step."""

    test_seeds: Size | None = None
    """Meta-test lifetimes per environment (Figures 4.3 to 4.7: 100; bandits 4,096, because 100 leave the regret uncertain)."""
    test_steps: Count | None = None
    """Actions in a meta-test lifetime (default: as in meta-training)."""


# Values of each preset that depend on the environments, for bandits and for others (C.2.2), where a flag is not given.
THESIS_BANDITS = dict(
    hidden=64, lifetime_steps=100, meta_steps=4_000, evaluations=100, noise_std=0.2, lr=0.2, test_seeds=4_096, obs_gain=1.0
)
THESIS_OTHERS = dict(
    hidden=16, lifetime_steps=500, meta_steps=20_000, evaluations=10, noise_std=0.035, lr=0.01, test_seeds=100, obs_gain=1.0
)
LAPTOP_BANDITS = dict(
    hidden=16,  # a sixteenth of the time of 64
    lifetime_steps=100,
    meta_steps=400,  # four minutes
    evaluations=32,  # the whole population in a third of a second
    noise_std=0.1,  # what fits fewer parameters and fewer members
    lr=0.05,  # few steps
    rnn_noise_std=0.2,  # the best of nine settings on validation; .8 was tried later (see the results page)
    rnn_lr=0.1,  # likewise
    obs_gain=1.0,
    test_seeds=4_096,
)
LAPTOP_OTHERS = dict(
    hidden=16,
    lifetime_steps=200,  # time
    meta_steps=600,  # five minutes on CartPole with the in-context RNN
    evaluations=16,  # with 4 the fitness is too noisy for CartPole
    noise_std=0.1,
    lr=0.05,
    obs_gain=6.0,  # small inputs hardly move a gate: without it contexts are not distinguished (see the results page)
    test_seeds=128,
)
LAPTOP = dict(
    envs=tuple(f"independent_bandit:{arms}" for arms in (8, 10, 12)),  # it acts with any number
    population=64,  # 0.3 s a step
    common_lifetimes=True,  # as in the runs that its other values were chosen by
    sutton_barto_reward=True,  # likewise
    rank_shaping=True,  # the best and the worst of a small population outweigh all others
    noise_end=0.03,  # the parameters themselves are tested, not their neighbourhood
    lr_decay=True,  # settles what the high rate leaves noisy
    fitness="expected",  # less noise
    rnn_size=32,  # 64 members estimate a gradient of many parameters badly
)
SETTINGS = {
    "thesis": {"bandits": THESIS_BANDITS, "others": THESIS_OTHERS},
    "laptop": {"bandits": LAPTOP_BANDITS, "others": LAPTOP_OTHERS},
}
PRESETS = {"thesis": {}, "laptop": LAPTOP}


# ======================================================================================================================
# The learner
# ======================================================================================================================
State = Any  # of a learner: a pytree of tensors
Output = tuple[State, Tensor]  # of a learner's step: the next state, and logits (p, e, b)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (p, ..., i) @ weight (p, i, j) + bias (p, j): the same everywhere, but for the population."""
    flat = x.flatten(1, -2)
    return (flat @ weight if bias is None else torch.baddbmm(bias[:, None], flat, weight)).unflatten(1, x.shape[1:-1])


class SymLA(Learner):
    """The symmetric learning agent: one recurrent layer (K = 1) of a x b LSTMs in place of weights, for any a and b."""

    def __init__(self, args: Args):
        n, m = args.hidden, args.message_size
        self.args = args
        self.cell = lstm_cell
        inputs = 2 * (m + 1) + 2  # beside each message one number of the environment's; reward and done
        self.shapes = {"lstm.weight": (inputs + n, 4 * n), "lstm.bias": (4 * n,)}
        self.shapes |= {"fwd.weight": (n, m), "fwd.bias": (m,), "bwd.weight": (n, m), "bwd.bias": (m,)}

    def init(self, generator: torch.Generator) -> Tensor:
        return initial_theta(self.shapes, self.args.hidden, generator)

    def initial_state(self, p: int, e: int, a: int, b: int, device: torch.device) -> State:
        """h and c (p, e, a, b, n); fwd_msg (p, e, b, m) and bwd_msg (p, e, a, m), the layer's own messages of the step before.
        All start at zero, as in appendix C.4."""
        n, m = self.args.hidden, self.args.message_size
        return tuple(torch.zeros(p, e, *shape, device=device) for shape in ((a, b, n), (a, b, n), (b, m), (a, m)))

    def act(self, params: Params, state: State, obs: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> Output:
        """One step: obs (p, e, a), the last action (p, e, b) one-hot, its reward and whether it ended an episode (p, e).
        Returns logits (p, e, b)."""
        n, m = self.args.hidden, self.args.message_size
        h, c, fwd_msg, bwd_msg = state
        weight_a, weight_b, recurrent = params["lstm.weight"].split([m + 1, m + 3, n], dim=1)
        to_all = torch.stack([reward, done], -1)[..., None, :].expand(-1, -1, action.shape[-1], -1)
        from_a = affine(torch.cat([bwd_msg, self.args.obs_gain * obs[..., None]], -1), weight_a)
        from_b = affine(torch.cat([fwd_msg, action[..., None], to_all], -1), weight_b, params["lstm.bias"])
        for _ in range(self.args.micro_ticks):  # h_ab <- f_RNN(h_ab, o_a, a_b, r, fwd_msg_b, bwd_msg_a), Eq. 4.9
            h, c = self.cell(recurrent, from_a, from_b, h, c)

        fwd_msg = affine(h.mean(2), params["fwd.weight"], params["fwd.bias"])  # Eq. 4.7, a mean as in appendix C.4
        bwd_msg = affine(h.mean(3), params["bwd.weight"], params["bwd.bias"])  # Eq. 4.8
        return (h, c, fwd_msg, bwd_msg), fwd_msg[..., 0]  # y := the first number of each forward message

    @staticmethod
    def load(checkpoint: str | Path, num_actions: int, **options: Any) -> "Agent":
        """A trained SymLA to be used from Python: see load_agent."""
        return load_agent(checkpoint, num_actions, **options)


def lstm_cell(weight: Tensor, from_a: Tensor, from_b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One tick of a x b LSTMs with shared weights and own states: f_RNN of Eq. 4.6. Gates: input, cell, forget, output.
    common/cells.py has a faster form.

    weight (p, n, 4n); from_a (p, e, a, 4n) and from_b (p, e, b, 4n): the inputs of the gates that all LSTMs of a row or of a
    column share.
    """
    i, j, f, o = (from_a[..., :, None, :] + from_b[..., None, :, :] + affine(h, weight)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * j.tanh()
    return o.sigmoid() * c.tanh(), c


def initial_theta(shapes: dict[str, tuple[int, ...]], n: int, generator: torch.Generator) -> Tensor:
    """Truncated normals of std 1/sqrt(fan-in), zero biases, and 1 for the n forget gates: the defaults of appendix C.4's
    library."""
    theta = {name: initial_weight(shape, generator) for name, shape in shapes.items()}
    theta["lstm.bias"][2 * n : 3 * n] = 1
    return torch.cat([value.flatten() for value in theta.values()])


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
class Carry(NamedTuple):
    """What one step of a lifetime leaves to the next."""

    state: State  # the learner's
    env: dict[str, Tensor]  # the environments', (p * e, ...)
    keys: Tensor  # (p, e, 2) of the next step's random numbers
    obs: Tensor  # (p, e, a) of the state that reward and done belong to, also where an episode ended
    action: Tensor  # (p, e, b) the last one, one-hot; zeros before the first
    reward: Tensor  # (p, e) for it
    done: Tensor  # (p, e) whether it ended an episode; the next one begins a step later, and the agent is not reset


class Outcome(NamedTuple):
    """Rewards (p, e) of a step. Where an environment has the expected reward of each action: those of the policy and of the
    best action; else the reward itself."""

    reward: Tensor
    expected: Tensor
    best: Tensor


def observed(obs: Tensor, p: int) -> Tensor:
    """Observations (p * e, a) as (p, e, a), and where there are none, a constant 1."""
    obs = obs if obs.shape[-1] else F.pad(obs, (0, 1), value=1.0)
    return obs.unflatten(0, (p, -1))


def one_step(learner: Learner, env: Env, params: Params, carry: Carry) -> tuple[Carry, Outcome]:
    """The body of the inner loop of Algorithm 14."""
    p, e, b = carry.action.shape
    keys, draws = uniform_draws(carry.keys, 1 + env.num_draws)
    state, logits = learner.act(params, carry.state, carry.obs, carry.action, carry.reward, carry.done)
    policy = logits.softmax(-1)
    chosen = (policy.cumsum(-1) < draws[..., :1]).sum(-1).clamp(max=b - 1)  # a_t ~ p(a_t; y)

    expected_rewards = env.expected_rewards(carry.env)
    world, step = env.step(carry.env, chosen.flatten(), draws[..., 1:].flatten(0, 1))
    reward, done = (x.unflatten(0, (p, e)).to(policy.dtype) for x in (step.reward, step.terminated | step.truncated))
    action = (chosen[..., None] == torch.arange(b, device=chosen.device)).to(policy.dtype)

    if expected_rewards is None:
        outcome = Outcome(reward, expected=reward, best=reward)
    else:
        expected_rewards = expected_rewards.unflatten(0, (p, e))
        outcome = Outcome(reward, (policy * expected_rewards).sum(-1), expected_rewards.amax(-1))
    return Carry(state, world, keys, observed(step.obs, p), action, reward, done), outcome


def lifetime(learner: Learner, step_fn: Callable, env: Env, theta: Tensor, keys: Tensor, steps: int) -> Outcome:
    """One lifetime of L steps over as many episodes as fit, for all members in all environments (Algorithm 14, inner loop).

    theta (p, d); keys (p, e, 2) of all that is random in each. step_fn: one_step of this learner and this environment, or a
    compiled one. Returns an Outcome of (p, e, t).
    """
    (p, e), b = keys.shape[:2], env.num_actions
    keys, draws = uniform_draws(keys, env.lifetime_draws)
    world, obs = env.reset(draws.flatten(0, 1))
    obs = observed(obs, p)
    zeros = torch.zeros(2, p, e, device=theta.device)
    state = learner.initial_state(p, e, obs.shape[-1], b, theta.device)
    carry = Carry(state, world, keys, obs, torch.zeros(p, e, b, device=theta.device), zeros[0], zeros[1])

    params = learner.params(theta)
    outcomes = zeros.new_empty(3, p, e, steps)
    for t in range(steps):
        carry, outcome = step_fn(params, carry)
        outcomes[..., t] = torch.stack(outcome)
    return Outcome(*outcomes)


def uniform_draws(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The keys (p, e, 2) of the next step, and uniform numbers (p, e, size)."""
    return rng.fold(keys, 1), rng.uniform(rng.fold(keys, 0), size)


def lifetime_keys(seed: int, part: int, number: int, groups: Tensor, count: int) -> Tensor:
    """The keys (p, count, 2) of lifetimes: different ones for each part, number, and entry of groups (p,)."""
    key = rng.key(seed, groups.device)
    for branch in (part, number, groups):
        key = rng.fold(key, branch)
    return rng.fold(key[:, None], torch.arange(count, device=groups.device))


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
TRAIN, TEST = 0, 1  # parts of the keys of lifetimes


def es_gradient(args: Args, lifetime_fn: Callable, env: Env, theta: Tensor, step: int) -> tuple[Tensor, ...]:
    """Eq. 4.10, as a loss: both members of a pair act in the same --evaluations lifetimes. theta (d,). lifetime_fn: `lifetime`
    of a learner in this environment.

    Returns the gradient (d,) of minus the reward per step, the mean loss, and the mean reward per step.
    """
    rewards = []

    def evaluate(population: Tensor, pairs: Tensor) -> Tensor:
        groups = torch.zeros_like(pairs) if args.common_lifetimes else pairs
        keys = lifetime_keys(args.seed, TRAIN, step, groups, args.evaluations)
        outcome = lifetime_fn(population, keys, args.lifetime_steps)
        rewards.append(outcome.reward.mean((1, 2)))
        return -(outcome.expected if args.fitness == "expected" else outcome.reward).mean((1, 2))

    sigma, pairs = args.noise_std, args.population // 2
    if args.noise_end is not None:
        sigma += (args.noise_end - sigma) * step / args.meta_steps
    settings = dict(pairs=pairs, sigma=sigma, seed=args.seed, generation=step, rank_shaping=args.rank_shaping)
    grad, losses = es.gradient(theta, evaluate, chunk=args.chunk or even_chunk(args, env), **settings)
    return grad, losses.mean(), es.all_reduce_mean(torch.cat(rewards).mean())


def meta_train(
    args: Args, agents: dict[str, list[tuple[Callable, Env]]], thetas: dict[str, Tensor], run: "Run"
) -> None:
    """Algorithm 14, for learners side by side on the same budget. Changes thetas in place. agents: lifetime and environment of
    each learner, for each environment."""
    own = {name: own_settings(args, name) for name in agents}
    adam = {name: torch.optim.Adam([thetas[name]], own[name].lr, betas=(0.9, 0.999)) for name in agents}
    for step in run.steps(args.meta_steps if agents else 0, {"thetas": thetas, "adam": adam}):
        metrics = {}
        for name, in_envs in agents.items():
            lifetime_fn, env = in_envs[step % len(in_envs)]  # e ~ p(e): one environment after the other
            grad, loss, reward = es_gradient(own[name], lifetime_fn, env, thetas[name], step)
            thetas[name].grad = grad
            adam[name].param_groups[0]["lr"] = own[name].lr * (1 - step / args.meta_steps if args.lr_decay else 1)
            adam[name].step()  # theta <- theta + alpha * the gradient of the lifetime's reward
            metrics |= {f"{name}_loss": loss, f"{name}_reward": reward}
        run.log(step, metrics)


# ======================================================================================================================
# Rewards of any scale
# ======================================================================================================================
class NormalizedRewards(Learner):
    """A learner that observes standardised rewards: minus their mean, over their standard deviation, both of the lifetime so
    far (Welford 1962). state: the learner's; count, mean and sum of squared deviations (3, p, e)."""

    def __init__(self, learner: Learner):
        self.learner = learner
        self.shapes = learner.shapes

    def initial_state(self, p: int, e: int, a: int, b: int, device: torch.device) -> State:
        return self.learner.initial_state(p, e, a, b, device), torch.zeros(3, p, e, device=device)

    def act(self, params: Params, state: State, obs: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> Output:
        state, (count, mean, squares) = state
        acted = action.sum(-1)  # before the first action there is no reward
        count = count + acted
        change = acted * (reward - mean)
        mean = mean + change / count.clamp(min=1)
        squares = squares + change * (reward - mean)
        std = (squares / count.clamp(min=1)).sqrt()
        reward = acted * (reward - mean) / (std + 1e-6)
        state, logits = self.learner.act(params, state, obs, action, reward, done)
        return (state, torch.stack([count, mean, squares])), logits


# ======================================================================================================================
# Baselines
# ======================================================================================================================
class InContextRNN(Learner):
    """The in-context RNN (RL^2; Eq. 4.4): one LSTM whose inputs are observation, last action, reward and done. Its sizes are
    fixed: fewer observations and actions are padded with zeros."""

    def __init__(self, args: Args):
        n, a, b = self.sizes = args.rnn_size, args.rnn_inputs, args.rnn_outputs
        self.shapes = {"lstm.weight": (a + b + 2 + n, 4 * n), "lstm.bias": (4 * n,), "out.weight": (n, b), "out.bias": (b,)}

    def init(self, generator: torch.Generator) -> Tensor:
        return initial_theta(self.shapes, self.sizes[0], generator)

    def initial_state(self, p: int, e: int, _: int, __: int, device: torch.device) -> State:
        return tuple(torch.zeros(p, e, self.sizes[0], device=device) for _ in range(2))

    def act(self, params: Params, state: State, obs: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> Output:
        _, a, b = self.sizes
        h, c = state
        obs, last = F.pad(obs, (0, a - obs.shape[-1])), F.pad(action, (0, b - action.shape[-1]))
        inputs = torch.cat([obs, last, reward[..., None], done[..., None], h], -1)
        i, j, f, o = affine(inputs, params["lstm.weight"], params["lstm.bias"]).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * j.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c), affine(h, params["out.weight"], params["out.bias"])[..., : action.shape[-1]]


def own_settings(args: Args, learner: str) -> Args:
    """Args with the sigma and the learning rate of a learner."""
    if learner != "rnn":
        return args
    sigma = args.rnn_noise_std or args.noise_std
    end = None if args.noise_end is None else args.noise_end * sigma / args.noise_std
    return replace(args, noise_std=sigma, noise_end=end, lr=args.rnn_lr or args.lr)


class ThompsonSampling(Learner):
    """Thompson (1933): choose the arm that is best in one draw from the posterior, whose prior is uniform for each arm. For the
    independent bandits this is the true prior. Draws from PyTorch's own generator. state: wins and losses (p, e, b), plus 1."""

    shapes: ClassVar = {}

    def __init__(self, args: Args):
        pass

    def init(self, generator: torch.Generator) -> Tensor:
        return torch.zeros(0)

    def initial_state(self, p: int, e: int, _: int, b: int, device: torch.device) -> State:
        return torch.ones(p, e, b, device=device), torch.ones(p, e, b, device=device)

    def act(self, params: Params, state: State, obs: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> Output:
        wins, losses = state[0] + action * reward[..., None], state[1] + action * (1 - reward[..., None])
        best = torch.distributions.Beta(wins, losses).sample().argmax(-1, keepdim=True)
        return (wins, losses), torch.full_like(wins, -math.inf).scatter(-1, best, 0.0)


class UniformPolicy(ThompsonSampling):
    """Random actions."""

    def act(self, params: Params, state: State, obs: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> Output:
        return state, torch.zeros_like(action)


LEARNERS = {"symla": SymLA, "rnn": InContextRNN, "thompson": ThompsonSampling, "uniform": UniformPolicy}
META_TRAINED = ("symla", "rnn")


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def meta_test(args: Args, thetas: dict[str, Tensor], run: "Run") -> list[dict[str, Any]]:
    """Result rows of all learners in all test environments, reward_per_step last."""
    rows = []
    for number, name in enumerate(args.test_envs):
        if "rnn" in thetas and not fits(args, "rnn", name):
            sizes = f"{args.rnn_inputs} observations and {args.rnn_outputs} actions"
            run.info(f"{name} is too large for the in-context RNN, which has inputs and outputs for {sizes}.")
        for learner in learners_of(args, name):
            measure = partial(measured, args, learner, thetas[learner], name, number, run)
            rows += run.once(f"{name}, {learner}", measure)
    return sorted(rows, key=lambda row: row["metric"] == "reward_per_step")


def measured(args: Args, learner_name: str, theta: Tensor, name: str, number: int, run: "Run") -> list[dict[str, Any]]:
    """Result rows of one learner over --test-seeds lifetimes in the test environment `number`, the same for all learners.

    For bandits, the expected regret of the policy so far: the expected reward of the best arm minus that of the policy.
    Else the return so far, and the reward per step since the last plotted step.
    """
    lifetime_fn, env = make_agent(args, learner_name, name, args.test_seeds, run, "test")
    keys = lifetime_keys(args.seed, TEST, number, torch.zeros(1, dtype=torch.int64, device=env.device), args.test_seeds)
    batches = keys.split(batch_size(args, env), dim=1)
    steps = args.test_steps or args.lifetime_steps
    outcomes = [lifetime_fn(theta[None], batch, steps) for batch in batches]
    reward, expected, best = (torch.cat(parts, 1)[0].cpu().double() for parts in zip(*outcomes, strict=True))

    rows = []
    row = partial(result_row, learner_name, name, novelty(args, name))
    bandit = is_bandit(name)
    before = 0
    for step in plotted_steps(reward.shape[-1]):
        if bandit:
            rows.append(row("cumulative_regret", step, (best - expected)[:, :step].sum(1)))
        else:
            rows.append(row("return", step, reward[:, :step].sum(1)))
            rows.append(row("reward_per_step", step, reward[:, before:step].mean(1)))
        before = step
    return rows


def plotted_steps(steps: int) -> list[int]:
    """Steps at which curves have points: 1, 10, 100, ... and every twentieth part."""
    points = [1, 10, 100, 400, 1000, 10_000, *(-(-steps * part // 20) for part in range(1, 21))]
    return sorted({point for point in points if point <= steps})


def base(name: str) -> str:
    """An environment without its size and wrappers."""
    return envs.base_name(name).removeprefix("swapped_")


def novelty(args: Args, name: str) -> str:
    """none: meta-trained in this very environment; task: in one of another size, order or meaning, or in another bandit of
    Figure 4.3; domain: in others."""
    related = base(name) in map(base, args.envs) or {name, *args.envs} <= set(FIVE)
    return "none" if name in args.envs else "task" if related else "domain"


def is_bandit(name: str) -> bool:
    env = envs.make(name, 1)
    return env.expected_rewards(env.reset(torch.zeros(1, env.lifetime_draws))[0]) is not None


def beside(name: str) -> list[str]:
    """The environments that section 4.5 meta-tests in beside the one of meta-training (4 and 20 arms are ours)."""
    if name in FIVE:
        return FIVE
    if name.startswith("independent_bandit"):
        return [f"independent_bandit:{arms}" for arms in (2, 4, 20)]
    if name.startswith("grid_world"):
        return [f"swapped_{name}"]
    if name.startswith("projected_dense_grid_world"):
        return ["projected_balance_cartpole"]
    return [f"shuffled_{name}"] if name in ("cartpole", "upright_cartpole", "acrobot", "mountain_car") else []


FIVE = ["independent_bandit", "dependent_bandit", "easy_bandit", "medium_bandit", "hard_bandit"]  # Figure 4.3
LABELS = {"symla": "SymLA", "rnn": "in-context RNN", "thompson": "Thompson sampling", "uniform": "uniform-random policy"}
COLOURS = {"symla": "C0", "rnn": "C1", "thompson": "k", "uniform": "0.6"}
NOVELTY = {"none": "seen", "task": "unseen task", "domain": "unseen environment"}
UNITS = {
    "cumulative_regret": "expected cumulative regret",
    "return": "return of the lifetime so far",
    "reward_per_step": "reward per step",
}


def draw_lifetimes(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Figures 4.5 to 4.7, and regret for bandits: a panel for each environment, a line for each learner."""
    titles = {row["task"]: f"{row['task']} ({NOVELTY[row['novelty']]})" for row in rows}
    for metric in dict.fromkeys(row["metric"] for row in rows if row["metric"] != "return"):
        drawn = [row for row in rows if row["metric"] == metric]
        settings = dict(labels=LABELS, titles=titles, styles=COLOURS)
        plot(drawn, folder / f"{metric}.png", xlabel="environment steps", ylabel=UNITS[metric], **settings)


# ======================================================================================================================
# Use it
# ======================================================================================================================
class Agent:
    """A trained SymLA that acts in your environments: act(obs, reward, done) and reset().

        agent = symla.SymLA.load("runs/NAME/checkpoint.pt", num_actions=2)    # "pretrained" learns bandits alone
        obs, _ = env.reset()
        action = agent.act(obs)
        obs, reward, terminated, truncated, _ = env.step(action)
        action = agent.act(obs, reward, terminated or truncated)

    At the end of an episode it acts too, on the last observation; ignore that action, reset the environment, and go on with
    act(obs) on the first one. Gymnasium's vector environments do so by themselves.

    obs are arrays or tensors of finite numbers of about one, (a,) for one environment or (e, a) for several; reward and done
    are those of the last action, () or (e,). Actions are integers, an int or (e,). The agent learns from its first action on,
    over as many episodes as you play, until `reset`. Raises ValueError for other shapes.
    """

    def __init__(self, learner: Learner, theta: Tensor, num_actions: int, seed: int = 0):
        self.learner = learner
        self.params = learner.params(theta[None])
        self.num_actions = num_actions
        self.generator = torch.Generator(theta.device).manual_seed(seed)
        self.device = theta.device
        self.reset()

    def reset(self) -> None:
        """Forget all that was learned."""
        self.state: State | None = None
        self.shape: torch.Size | None = None
        self.action: Tensor | None = None

    @torch.no_grad()
    def act(self, obs: Any, reward: Any = 0.0, done: Any = False) -> Any:
        """The next action, after the reward of the last one and whether it ended an episode."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        if obs.ndim not in (1, 2) or not obs.numel() or not obs.isfinite().all() or obs.shape != (self.shape or obs.shape):
            raise ValueError("Observations have to be finite numbers of shape (a,) or (e, a), the same at each step.")
        several = obs.view(1, -1, obs.shape[-1])
        e, b = several.shape[1], self.num_actions
        reward, done = (torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in (reward, done))
        if not all(x.shape in ((), obs.shape[:-1]) and x.isfinite().all() for x in (reward, done)):
            raise ValueError(f"Reward and done have to be finite numbers of shape {tuple(obs.shape[:-1])}.")
        if self.state is None:
            self.state = self.learner.initial_state(1, e, obs.shape[-1], b, self.device)
            self.action = torch.zeros(1, e, b, device=self.device)
            self.shape = obs.shape

        inputs = several, self.action, reward.expand(1, e), done.expand(1, e)
        self.state, logits = self.learner.act(self.params, self.state, *inputs)
        chosen = torch.multinomial(logits[0].softmax(-1), 1, generator=self.generator)[:, 0]
        self.action = F.one_hot(chosen, b).float()[None]
        return chosen if obs.ndim == 2 else int(chosen)


def load_agent(checkpoint: str | Path, num_actions: int, seed: int = 0, device: torch.device | str = "cpu") -> Agent:
    """checkpoint: "pretrained", which was meta-trained on bandits, or a checkpoint.pt of this script; seed: decides its
    actions. Raises CheckpointError or UserError for what is no checkpoint of a SymLA, and ValueError for fewer than two
    actions."""
    if num_actions < 2:
        raise ValueError(f"There have to be at least two actions, not {num_actions}.")
    saved = checkpoints.read(checkpoints.named(checkpoint, METHOD), method=str, args=dict, state=dict)
    try:
        learner = SymLA(from_dict(Args, saved["args"])) if saved["method"] == METHOD else None
    except TypeError:
        learner = None
    if learner is None:
        raise UserError(f"{checkpoint} is not a checkpoint of this {METHOD}.py.")
    theta = learner.init(torch.Generator())
    checkpoints.restore({"thetas": {"symla": theta}}, saved["state"], checkpoint)
    learner = NormalizedRewards(learner) if learner.args.normalize_rewards else learner
    return Agent(learner, theta.to(device), num_actions, seed)


# ======================================================================================================================
# The run
# ======================================================================================================================
METHOD = "symla"  # in checkpoints and results; a renamed copy of this file reads them too
USER_ERRORS = (CheckpointError, EnvError, FlagError)
NAMED_AFTER = ("envs", "learner")  # the flags that name a run's folder
KEPT = ("preset", "envs", "obs_gain", "micro_ticks", "normalize_rewards")  # the flags that a meta-test cannot change


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


def settled(args: Args) -> Args:
    """Args with the values of SETTINGS for the environments, where a flag is not given."""
    if not args.envs:
        raise UserError("--envs needs at least one environment.")
    for name in (*args.envs, *args.test_envs):
        refuse_env(args, name)
    kinds = {is_bandit(name) for name in args.envs}
    if len(kinds) > 1:
        raise UserError("--envs mixes bandits and others, which have other hyperparameters; choose either.")
    setting = SETTINGS[args.preset]["bandits" if kinds.pop() else "others"]
    args = replace(args, **{flag: value for flag, value in setting.items() if getattr(args, flag) is None})
    tests = args.test_envs or (*args.envs, *(test for name in args.envs for test in beside(name)))
    args = replace(args, test_envs=tuple(dict.fromkeys(tests)))

    tried = [make_env(args, name, 1) for name in (*args.envs, *args.test_envs)]
    sizes = dict(rnn_inputs=max(max(env.obs_size, 1) for env in tried), rnn_outputs=max(env.num_actions for env in tried))
    return replace(args, **{flag: size for flag, size in sizes.items() if getattr(args, flag) is None})


def refuse_env(args: Args, name: str) -> None:
    """Raises UserError or EnvError for an environment that the learners cannot act in."""
    if max(map(name.count, ("shuffled_", "projected_", "scaled_"))) > 1:
        raise UserError(f"{name} has a wrapper twice; leave one out.")
    env = make_env(args, name, 1)
    if env.num_actions is None:
        raise UserError(f"SymLA chooses among actions, and those of {name} are continuous; choose another environment.")
    if args.action_repeat > 1 and is_bandit(name):
        raise UserError(f"--action-repeat would repeat the random numbers of {name} too; leave it out.")
    if env.obs_size * env.num_actions > 2**20:
        raise UserError(f"{name} has {env.obs_size} observations, which are too many; choose a smaller size.")


def check(args: Args, world: int) -> None:
    """Refuse what cannot work, before anything is written."""
    if args.population % 2:
        raise UserError("--population has to be even: half of it are the mirror images of the other half.")
    if args.triton and (args.device != "cuda" or args.hidden not in (16, 32, 64, 128) or not find_spec("triton")):
        raise UserError("--triton needs a GPU, Triton and --hidden 16, 32, 64 or 128.")
    if args.graphs and args.device != "cuda":
        raise UserError("--graphs needs a GPU.")
    if args.population // 2 % world:
        raise UserError(f"{args.population // 2} pairs of --population cannot be shared evenly by {world} processes.")
    for name in (*args.envs, *args.test_envs):
        if not learners_of(args, name):
            raise UserError(f"{args.learner} does not fit {name}; choose another --learner, or other environments.")
    for name in args.envs:
        if "rnn" in (args.learner, *args.baselines) and not fits(args, "rnn", name):
            raise UserError(f"--rnn-inputs {args.rnn_inputs} and --rnn-outputs {args.rnn_outputs} are too small for {name}.")


def fits(args: Args, learner: str, name: str) -> bool:
    """Whether a learner can act in an environment."""
    env = make_env(args, name, 1)
    if learner == "rnn":
        return env.obs_size <= args.rnn_inputs and env.num_actions <= args.rnn_outputs
    return learner != "thompson" or is_bandit(name)


def learners_of(args: Args, name: str) -> list[str]:
    """The learners that can act in an environment."""
    return [learner for learner in dict.fromkeys([args.learner, *args.baselines]) if fits(args, learner, name)]


def make_env(args: Args, name: str, count: int, device: torch.device | str = "cpu") -> Env:
    """An environment with observations of about one: all LSTMs share their weights, so none can scale its own. As in
    appendix C.4 a new episode begins with the step after the end: so the agent observes what its last action led to."""
    option = {"cartpole": "sutton_barto_reward", "mountain_car": "free_goal"}.get(base(name))
    options = {option: True} if option and args.sutton_barto_reward else {}
    options |= {"repeat": args.action_repeat} if args.action_repeat > 1 else {}
    return envs.make(name, count, device, scaled=True, next_step_reset=True, **options)


def batch_size(args: Args, env: Env) -> int:
    """How many lifetimes to run at once: their states should stay in a CPU's cache, or use a GPU's memory well."""
    return max(1, (2**19 if args.device == "cpu" else 2**28) // (args.hidden * max(env.obs_size, 1) * env.num_actions))


def even_chunk(args: Args, env: Env) -> int:
    """How many pairs of ES to run at once: as many as batch_size allows, and always the same number, for one compilation."""
    pairs, most = len(es.share(args.population // 2)), batch_size(args, env) // args.evaluations
    return max(c for c in range(1, pairs + 1) if pairs % c == 0 and (c == 1 or 2 * c <= most))


def make_agent(args: Args, name: str, env_name: str, count: int, run: Run, use: str) -> tuple[Callable, Env]:
    """`lifetime` of a learner in an environment, theta (p, d), keys (p, e, 2) and a number of steps -> Outcome; and `count`
    copies of that environment.

    Meta-training compiles the whole step, once for each environment; meta-testing only SymLA's cell on a CPU, once for all. On
    a CPU the cell of small states is written out, with a faster tanh in meta-training and an exact one in meta-tests.
    With --graphs a lifetime is one CUDA graph.
    """
    env = make_env(args, env_name, count, run.device)
    learner, options = LEARNERS[name](args), {}
    training = use == "train" and len(args.envs) <= 8
    whole = run.compiles and training and env.compilable and name != "thompson"
    if name == "symla" and run.compiles and args.device == "cpu":
        if args.hidden <= 32:
            options = dict(options=cells.options(args.hidden))
            tanh = cells.rational_tanh if use == "train" else cells.exp_tanh
            learner.cell = partial(cells.fused_lstm_cell, tanh=tanh)
        if not whole:
            learner.cell = torch.compile(learner.cell, dynamic=not training, **options)
    if name == "symla" and args.triton:
        learner.cell = kernels.lstm_cell
    if args.normalize_rewards and name in META_TRAINED:
        learner = NormalizedRewards(learner)
    step_fn = partial(one_step, learner, env)
    lifetime_fn = partial(lifetime, learner, torch.compile(step_fn, dynamic=False, **options) if whole else step_fn, env)
    return graphs.replayed(lifetime_fn) if args.graphs and env.compilable and name != "thompson" else lifetime_fn, env


@torch.no_grad()
def main() -> None:
    args, checkpoint = parse_args()
    args = settled(args)
    check(args, int(os.environ.get("WORLD_SIZE", 1)))
    run = Run(args, checkpoint)
    names = list(dict.fromkeys([args.learner, *args.baselines]))
    trained = [name for name in names if name in META_TRAINED]
    thetas = {name: LEARNERS[name](args).init(torch.Generator().manual_seed(args.seed)).to(run.device) for name in names}
    if args.mode == "test":
        checkpoints.restore({"thetas": {name: thetas[name] for name in trained}}, checkpoint["state"], args.checkpoint)
    elif args.init and not args.resume:
        first = checkpoints.read(checkpoints.named(args.init, METHOD), state=dict)["state"]
        shared = {name: thetas[name] for name in trained if f"['thetas']['{name}']" in first}
        if not shared:
            raise UserError(f"{args.init} has parameters of none of the learners that the flags name.")
        checkpoints.restore({"thetas": shared}, first, args.init)
    run.open_folder()

    if args.mode == "train":
        agents = {name: [make_agent(args, name, env, args.evaluations, run, "train") for env in args.envs] for name in trained}
        meta_train(args, agents, thetas, run)
        torch.compiler.reset()
    tested = time.time()
    if run.rank > 0:
        return  # meta-testing takes seconds, one process does it
    rows = meta_test(args, thetas, run)
    draw_lifetimes(run.folder, rows)
    run.finish(rows, tested, parameters=thetas[args.learner].numel())


if __name__ == "__main__":
    machine.run_as_script(main, f"{METHOD}.py", (UserError, *USER_ERRORS))
