"""FME: networks that modify themselves, selected by fitness alone.

A self-referential network produces with every step a change of all of its own weights. Fitness monotonic execution adds the
changed network to a set of solutions, and executes better ones more often. Nothing else is optimised: no gradient, no
prescribed mutation.

Kirsch, "Automating AI Research" (2025), chapter 7 and appendix E; Kirsch and Schmidhuber, "Eliminating Meta Optimization
Through Self-Referential Meta Learning" (2022). The layer is adapted from Irie et al. (2021). Results:
.github/results/fme.md.

    Eq. 7.1 to 7.4 -> self_referential_layer
    Algorithm 12   -> fitness_monotonic_execution (the loop), Solutions (the set and its probabilities)
    Appendix E.1   -> Solutions (the buffer), initialise (truncated normals)
    Section 7.4    -> --learner hill_climbing (the baseline), common/envs (the tasks), by_depth (improving to improve)

    python fme.py                                                 # two bandits and CartPole: 5 minutes
    python fme.py --preset thesis --envs bandit --executions 40   # Algorithm 12 to the letter, 64 populations at once
    python fme.py --mode test --checkpoint runs/NAME/checkpoint.pt --test-seeds 64

    agent = fme.FME.load("pretrained")                            # one that balances CartPole-v1
    action = agent.act(obs, reward)                               # at each step of your environment

Axes, everywhere: p populations, each on its own, s solutions executed in parallel, n all variables of a network, a inputs of a
layer, b its outputs, c all columns of its weights, b + 2a + 4, d uniform numbers for a step. Where p and s stand as one axis,
it is called p.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoints, envs, graphs, machine
from common.checkpoints import CheckpointError
from common.envs import Env, EnvError
from common.envs.bandits import SwappingBandit
from common.figures import plot
from common.flags import Count, FlagError, Seed, check_ranges, from_dict
from common.machine import can_compile, keep_memory, lock
from common.results import MetricsLog, median_difference, result_row, table, to_json

# ======================================================================================================================
# Args
# ======================================================================================================================
Name = Literal["fme", "no_reward", "hill_climbing", "hill_climbing_matched", "random_search"]
CLIMBERS = ("hill_climbing", "hill_climbing_matched")  # whose weights do not change but by noise
AxisSize = Annotated[int, (1, 2**20)]
SELECT, NOISE, EXECUTE, NEW, TEST, PAIRS = 0, 1, 2, 3, 2**31, 2**31 + 1  # what random numbers are for


@dataclass
class Args:
    """FME (chapter 7): networks modify themselves in an environment, and better ones are executed more often."""

    preset: Literal["auto", "thesis", "laptop"] = "auto"
    """thesis: the thesis' numbers; laptop: minutes on 2 cores; auto: thesis if there is a CUDA device, else laptop."""
    seed: Seed = 0
    """Decides everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors are."""
    compile: bool = True
    """Fuse a step of networks and environments with torch.compile (needs a C++ compiler on a CPU)."""
    graphs: bool = False
    """An execution as one CUDA graph (equal in tests; not yet timed)."""
    mode: Literal["train", "test"] = "train"
    """train: let solutions evolve, then test the best ones; test: only test those of a --checkpoint."""
    checkpoint: str | None = None
    """The checkpoint.pt to test, or "pretrained"."""
    resume: str | None = None
    """A run folder to continue in, exactly where the run stopped."""
    run_dir: str = "runs"
    """Run folders are made in here."""
    run_name: str | None = None
    """Name of the run folder (default: script-environments-learner-seed-time)."""
    track: bool = False
    """Log to Weights & Biases too (pip install "cleanmeta[track]")."""
    checkpoint_every: Count = 500
    """Rounds (of --num-parallel executions) between checkpoints."""

    learner: Name = "fme"
    """fme; no_reward, FME without the reward among its --inputs; hill_climbing, Gaussian noise in place of self-modification;
    hill_climbing_matched, noise as long as the changes of FME, which runs before; random_search, new networks only."""
    baselines: tuple[Name, ...] = ("no_reward", "hill_climbing", "hill_climbing_matched", "random_search")
    """Learners run beside the first one, with as many executions."""

    envs: tuple[str, ...] = ("bandit", "cartpole", "swapping_bandit")
    """Environments (section 7.4), one after the other."""
    populations: Annotated[int, (1, 1000)] | None = 64
    """Independent repetitions, a batch axis (Figure 7.3 has 5; None: see TUNED)."""
    executions: AxisSize | None = None
    """Executions, each one self-modification, in a population (not in the thesis; default: see TUNED)."""
    num_parallel: AxisSize | None = 1
    """Solutions sampled and executed at the same time (Algorithm 12: one after the other; None: see TUNED)."""
    execution_steps: AxisSize = 1000
    """L, environment steps of an execution (Appendix E.1)."""
    roots: AxisSize | None = 1
    """Random networks to start from (Appendix E.1; None: as many as are executed at the same time)."""
    fitness: Literal["failures", "steps"] = "failures"
    """Where there are episodes: R/dt with a reward of -1 for a failure (1 a step is the same for all), or steps per episode."""
    lifetime: Literal["lineage", "execution"] = "lineage"
    """R/dt of a solution is over its lineage's whole lifetime (section 7.3), or over the last execution."""
    buckets: AxisSize = 100
    """m, equal intervals of fitness (Appendix E.1)."""
    bucket_size: AxisSize = 100
    """Most recently used solutions that a bucket holds (Appendix E.1)."""
    selection: Annotated[float, (0, 1e6)] = 20.0
    """A bucket is drawn with a probability proportional to e to the power selection times its index over m (Appendix E.1 has a
    base of e^20; 1e6: always the best bucket, section 7.3)."""
    sigma: Annotated[float, (1e-12, 1e6)] | None = None
    """hill_climbing: standard deviation of the noise (tuned, as in the thesis; default: see TUNED)."""

    inputs: tuple[Literal["obs", "reward", "action"], ...] = ("obs", "reward")
    """What networks are given beside a constant 1: observation, last reward (Algorithm 12 has a feedback signal in x; section
    7.4 names it for Figure 7.4 alone), and last action, which the thesis does not name: with it and the reward, networks with
    frozen weights solve the swapping bandit."""
    hidden: Annotated[int, (1, 2**12)] = 32
    """Units of a layer (Appendix E.1)."""
    layers: Annotated[int, (1, 100)] = 3
    """Self-referential layers (Appendix E.1)."""

    test_seeds: AxisSize = 25
    """Fresh executions of each of the best solutions."""
    chunk: AxisSize = 125
    """Networks executed as one batch; as many as the processor's cache holds run fastest (GPU: as many as fit)."""


LAPTOP = dict(
    baselines=("no_reward", "hill_climbing", "random_search"),  # in five minutes
    populations=None,  # as in TUNED
    num_parallel=None,  # as in TUNED: a batch is executed at 25 times the speed
    roots=None,  # from one random network, or a few, most populations stay poor (see its results page)
    lifetime="execution",  # tried once: 74 steps against 65 on CartPole, and better on the swapping bandit
    checkpoint_every=5,  # half a minute
)
PRESETS = {"thesis": {}, "laptop": LAPTOP}
TUNED = {  # where a flag is not given; sigma: the best of four on another seed, the last two's with other flags (results page)
    "bandit": dict(executions=200, sigma=3.0),
    "cartpole": dict(executions=3200, sigma=0.1),
    "swapping_bandit": dict(executions=4000, sigma=0.3),
}
TUNED_LAPTOP = {
    "bandit": dict(populations=16, executions=100, num_parallel=25),
    "cartpole": dict(populations=5, executions=800, num_parallel=200, sigma=1.0),
    "swapping_bandit": dict(populations=5, executions=800, num_parallel=200),
}
SOLVED = {"bandit": 0.95, "cartpole": 100, "swapping_bandit": 0.85}  # what counts as solved


# ======================================================================================================================
# The learner
# ======================================================================================================================
def self_referential_layer(w: Tensor, x: Tensor, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Apply a layer and let it change all of its weights, for p networks at once.

    w (p, a, b + 2a + 4), from inputs to outputs y (b), key k (a), query q (a) and learning rates beta (4), in this order;
    x (p, a). Returns y (p, b) and the new w.
    """
    a = x.shape[-1]
    parts = (num_outputs, a, a, 4)
    y, k, q, beta = apply(w, x).split(parts, -1)  # Eq. 7.1
    v_bar = apply(w, k)  # Eq. 7.2
    v = apply(w, q)  # Eq. 7.3
    rate = torch.cat([beta[:, i, None].expand(-1, n) for i, n in enumerate(parts)], -1).sigmoid()
    change = rate * (v.tanh() - v_bar.tanh())
    return y, w + k.tanh()[:, :, None] * change[:, None, :]  # Eq. 7.4


def apply(w: Tensor, x: Tensor) -> Tensor:
    """W psi(x) with psi = tanh: (p, a, c), (p, a) -> (p, c). A sum that compiles into one loop over w, where a product of
    matrices would be one call for each network."""
    return (w * x.tanh()[:, :, None]).sum(1)


def sizes(args: Args, env: Env) -> list[tuple[int, int]]:
    """Inputs and outputs of each layer. The first has a constant 1 and what --inputs names as inputs."""
    width = {"obs": env.obs_size, "reward": 1, "action": env.num_actions}
    inputs = 1 + sum(width[name] for name in args.inputs)
    return list(pairwise([inputs, *[args.hidden] * (args.layers - 1), env.num_actions]))


def unpack(phi: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """All variables of p networks, (p, n), as their layers' weights, each (p, a, b + 2a + 4)."""
    shapes = [(a, b + 2 * a + 4) for a, b in sizes]
    parts = phi.split([a * c for a, c in shapes], -1)
    return [part.unflatten(-1, shape).contiguous() for part, shape in zip(parts, shapes, strict=True)]


def pack(layers: list[Tensor]) -> Tensor:
    """The opposite of unpack."""
    return torch.cat([w.flatten(1) for w in layers], -1)


def initialise(args: Args, env: Env, count: int, generator: torch.Generator) -> Tensor:
    """Random networks (count, n): truncated normals with standard deviation 1/sqrt(N_x) (Appendix E.1)."""
    layers = [torch.empty(count, a, b + 2 * a + 4, device=env.device) for a, b in sizes(args, env)]
    for w in layers:
        std = w.shape[1] ** -0.5
        nn.init.trunc_normal_(w, std=std, a=-2 * std, b=2 * std, generator=generator)
    return pack(layers)


# ======================================================================================================================
# The inner loop
# ======================================================================================================================
class Carry(NamedTuple):
    """What one step of p executions leaves to the next."""

    layers: list[Tensor]  # weights, each (p, a, c)
    state: envs.State
    obs: Tensor  # (p, o)
    reward: Tensor  # (p,), of the last action; at first 0
    action: Tensor  # (p,), the last one; at first -1, none
    total: Tensor  # (p,), R so far
    episodes: Tensor  # (p,), ended so far
    ended: Tensor  # (p,), whether one ended with this step


def act(
    args: Args, env: Env, frozen: bool, layers: list[Tensor], obs: Tensor, reward: Tensor, action: Tensor, draw: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """phi, y <- g_phi(x): the action (p,), drawn from softmax(y), and the new weights, or where frozen the old ones.

    reward, action: the last ones (p,); draw (p, 1), uniform.
    """
    one_hot = action[:, None] == torch.arange(env.num_actions, device=action.device)
    inputs = {"obs": obs, "reward": reward[:, None], "action": one_hot.float()}
    x = torch.cat([torch.ones_like(draw), *(inputs[name] for name in args.inputs)], -1)
    changed = []
    for w, (_, num_outputs) in zip(layers, sizes(args, env), strict=True):
        x, new = self_referential_layer(w, x, num_outputs)
        changed.append(w if frozen else new)
    chances = x.softmax(-1).cumsum(-1)[:, :-1]
    return (draw > chances).sum(-1), changed


def one_step(args: Args, env: Env, frozen: bool, carry: Carry, draws: Tensor) -> Carry:
    """An action and a step of the environment. draws (p, 1 + d), uniform, for the action and for the environment."""
    action, layers = act(args, env, frozen, carry.layers, carry.obs, carry.reward, carry.action, draws[:, :1])
    state, step = env.step(carry.state, action, draws[:, 1:])
    ended = step.terminated | step.truncated
    total, episodes = carry.total + step.reward, carry.episodes + ended
    return Carry(layers, state, step.obs, step.reward, action, total, episodes, ended)


def start(args: Args, env: Env, phi: Tensor, draws: Tensor) -> Carry:
    """Before the first step of solutions phi (p, n), each in an environment of its own. draws (p, d), uniform."""
    state, obs = env.reset(draws)
    zeros = torch.zeros(len(phi), device=phi.device)
    no_action = torch.full_like(zeros, -1, dtype=torch.int64)
    return Carry(unpack(phi, sizes(args, env)), state, obs, zeros, no_action, zeros, zeros, zeros.bool())


class Outcome(NamedTuple):
    """Results of p executions."""

    phi: Tensor  # (p, n), the networks afterwards
    reward: Tensor  # (p,), R
    episodes: Tensor  # (p,), the last one counts, cut off
    after_swap: Tensor  # (p, 10), mean reward at the first, second, ... pull after a swap, where arms swap; else (p, 0)


def execute(args: Args, env: Env, step_fn: Any, phi: Tensor, draws: Tensor) -> Outcome:
    """phi, y_{1:L} <- g^L_phi(x_{1:L}) (Algorithm 12) for solutions phi (p, n). draws (1 + L, p, 1 + d), uniform; step_fn:
    one_step with its first arguments given."""
    carry = start(args, env, phi, draws[0, :, 1:])
    rewards, since = [], []
    for draw in draws[1:]:
        since.append(carry.state.get("since"))
        carry = step_fn(carry, draw)
        rewards.append(carry.reward)
    after_swap = by_pulls_since_swap(rewards, since) if "since" in carry.state else carry.reward.new_zeros(len(phi), 0)
    return Outcome(pack(carry.layers), carry.total, carry.episodes + ~carry.ended, after_swap)


# ======================================================================================================================
# The outer loop
# ======================================================================================================================
class Solutions:
    """Phi of Algorithm 12 for p populations, as the buffer of Appendix E.1: `buckets` equal intervals of the current range of
    fitness, each with its `bucket_size` most recently used solutions. A bucket is drawn with a probability that grows
    exponentially with its fitness, a solution in it uniformly. ((e^20)^i, read to the letter, would be greedy.)

    Ids grow with time and are -1 in empty slots. used: when a solution was last used, twice the id of its last child; at first
    twice its own id plus 1, since it is younger than the parent that it was made from.
    """

    def __init__(self, args: Args, roots: Tensor):
        self.args = args
        p, count, n = roots.shape
        slots = min(args.buckets * args.bucket_size, count + rounds(args) * args.num_parallel) + args.num_parallel
        self.phi = torch.zeros(p, slots, n, device=roots.device)
        self.fitness = torch.zeros(p, slots, device=roots.device)
        self.id = torch.full((p, slots), -1, device=roots.device)
        self.used = torch.zeros_like(self.id)

    def bucket(self) -> Tensor:
        """The bucket of each solution (p, slots), from 0; m for empty slots."""
        held, m = self.id >= 0, self.args.buckets
        low = torch.where(held, self.fitness, torch.inf).amin(1, keepdim=True)
        high = torch.where(held, self.fitness, -torch.inf).amax(1, keepdim=True)
        share = 1 - (high - self.fitness) / (high - low).clamp(min=1e-12)  # equal ones are all in the best bucket
        return torch.where(held, (share * m).long().clamp(0, m - 1), m)

    def sample(self, draws: Tensor, child: Tensor) -> tuple[Tensor, Tensor]:
        """phi ~ p(phi): solutions (p, s, n) and their ids (p, s), selected to have children of these ids (p, s).
        draws (p, s), uniform, float64."""
        bucket, m = self.bucket(), self.args.buckets
        count = draws.new_zeros(len(bucket), m + 1).scatter_add_(1, bucket, torch.ones_like(bucket, dtype=draws.dtype))
        weight = (self.args.selection / m * (bucket.to(draws.dtype) - (m - 1))).exp() / count.gather(1, bucket)
        total = weight.where(self.id >= 0, 0.0).cumsum(1)
        slot = torch.searchsorted(total, draws * total[:, -1:], right=True)
        self.used.scatter_reduce_(1, slot, 2 * child, "amax")
        return self.at(slot), self.id.gather(1, slot)

    def add(self, phi: Tensor, id: Tensor, fitness: Tensor) -> None:
        """Phi <- Phi + {phi}. A full bucket drops its least recently used solution, but not the best of all.
        phi (p, s, n); id, fitness (p, s); id -1: leave it out."""
        slots = torch.arange(self.id.shape[1], device=id.device)
        slot = torch.where(self.id < 0, -slots, -len(slots)).topk(id.shape[1]).indices  # the first empty ones
        self.phi.scatter_(1, slot[..., None].expand_as(phi), phi)
        for mine, new in ((self.fitness, fitness), (self.id, id), (self.used, 2 * id + 1)):
            mine.scatter_(1, slot, new)
        now = self.used.max() + 1
        age = (now - self.used).scatter(1, self.best_slot(), 0)
        bucket = self.bucket()
        order = (bucket * (now + 2) + age).argsort(1)  # by bucket, in each the most recently used first
        bucket = bucket.gather(1, order)
        nth = slots - torch.searchsorted(bucket, bucket)  # of its bucket, from 0
        self.id.scatter_(1, order, torch.where(nth < self.args.bucket_size, self.id.gather(1, order), -1))

    def best_slot(self) -> Tensor:
        """Of the solution of the highest fitness (p, 1), of equals the newest: a root has its first child's fitness."""
        fitness = torch.where(self.id >= 0, self.fitness, -torch.inf)
        return torch.where(fitness == fitness.amax(1, keepdim=True), self.id, -1).argmax(1, keepdim=True)

    def at(self, slot: Tensor) -> Tensor:
        """The solutions (p, s, n) in slots (p, s)."""
        return self.phi.gather(1, slot[..., None].expand(-1, -1, self.phi.shape[-1]))


def fitness_monotonic_execution(population: "Population", number: int) -> None:
    """A round of Algorithm 12 in p populations: s solutions side by side, or one after the other where s is 1."""
    args, solutions, id = population.args, population.solutions, population.ids(number)
    modifies = population.learner in ("fme", "no_reward")  # itself; others keep what they executed
    if population.learner == "random_search":
        phi, parent = population.new_networks(number)
    elif number == 0:
        phi, parent = population.first_round()  # whose fitness is not known yet
    else:
        draws = population.draws(id.shape[1:], number, SELECT, dtype=torch.float64)
        phi, parent = solutions.sample(draws, id)  # phi ~ p(phi)
        if not modifies:  # phi_{t+1} = phi_t + epsilon
            phi = phi + population.sigma * population.draws(phi.shape[1:], number, NOISE, draw=torch.randn)

    outcome = population.execute(phi, number, EXECUTE)  # phi, y_{1:L} <- g^L_phi(x_{1:L})
    fitness = population.record(id, parent, phi, outcome)  # R(phi) / dt
    if number == 0 and modifies:  # others have their roots as first children
        root = torch.arange(args.roots, device=id.device).expand(len(id), -1)
        solutions.add(population.roots, root, fitness.unflatten(1, (-1, args.roots)).mean(1))
    kept = outcome.phi if modifies else phi
    finite = kept.isfinite().all(-1)
    solutions.add(kept.nan_to_num(), torch.where(finite, id, -1), fitness)  # Phi <- Phi + {phi}


# ======================================================================================================================
# Populations: random numbers, batches of executions, and their history
# ======================================================================================================================
class Population:
    """p populations of one learner in one environment: their solutions, and the history of all executions by id.

    history, each (p, ids): parent, -1 for roots; of the whole lineage depth, its number of executions, reward and episodes; of
    the last execution what was achieved, and the change that a weight underwent, root mean square.
    """

    def __init__(self, args: Args, name: str, learner: str, run: "Run"):
        self.args = args = for_learner(with_tuned(args, name), learner)
        self.name, self.learner, self.run = name, learner, run
        self.env = make_env(name, args.chunk, run.device)
        self.step_fns = {frozen: partial(one_step, args, self.env, frozen) for frozen in (False, True)}
        if run.compiles:
            self.step_fns = {frozen: torch.compile(step, dynamic=False) for frozen, step in self.step_fns.items()}
        self.runs = {frozen: partial(execute, args, self.env, step) for frozen, step in self.step_fns.items()}
        if args.graphs:
            self.runs = {frozen: graphs.replayed(whole) for frozen, whole in self.runs.items()}
        self.roots = self.random_networks(args.roots)
        self.solutions = Solutions(args, self.roots)
        self.sigma: float | Tensor = args.sigma  # of hill climbing

        self.history, self.curve = empty_history(args, run.device)
        self.history["parent"][:, : args.roots] = -1

    def keep(self, slots: int) -> dict[str, Any]:
        """The state in a checkpoint of a job that is not finished, with the first slots of the solutions."""
        solutions = {name: getattr(self.solutions, name)[:, :slots] for name in ("phi", "fitness", "id", "used")}
        return {"solutions": solutions, "history": self.history, "curve": self.curve}

    def generator(self, population: int, *numbers: int) -> torch.Generator:
        """Random numbers decided by the seed, the environment, the population and these numbers alone."""
        words = np.random.SeedSequence([self.args.seed, *self.name.encode(), population, *numbers]).generate_state(2)
        return torch.Generator(self.run.device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)

    def draws(self, shape: tuple[int, ...], *numbers: int, draw: Any = torch.rand, dtype: Any = torch.float32) -> Tensor:
        """Uniform numbers (p, *shape), or with torch.randn standard normal ones."""
        each = (self.generator(p, *numbers) for p in range(self.args.populations))
        return torch.stack([draw(shape, generator=one, dtype=dtype, device=one.device) for one in each])

    def random_networks(self, count: int, *numbers: int) -> Tensor:
        """(p, count, n)."""
        each = (self.generator(p, *numbers) for p in range(self.args.populations))
        return torch.stack([initialise(self.args, self.env, count, one) for one in each])

    def first_round(self) -> tuple[Tensor, Tensor]:
        """All roots, repeated to s networks (p, s, n), and their ids (p, s)."""
        id = torch.arange(self.args.num_parallel, device=self.run.device) % self.args.roots
        return self.roots[:, id], id.expand(self.args.populations, -1)

    def new_networks(self, number: int) -> tuple[Tensor, Tensor]:
        """Random networks (p, s, n), and for parents, which they do not have, the ids of roots (p, s)."""
        _, parent = self.first_round()
        return self.random_networks(parent.shape[1], number, NEW), parent

    def ids(self, number: int) -> Tensor:
        """Of the solutions that a round makes (p, s)."""
        first = self.args.roots + number * self.args.num_parallel
        return torch.arange(first, first + self.args.num_parallel, device=self.run.device).expand(self.args.populations, -1)

    def record(self, id: Tensor, parent: Tensor, phi: Tensor, outcome: Outcome) -> Tensor:
        """Write a round's executions of phi (p, s, n) into the history. Returns R/dt of each (p, s)."""
        last = {"reward": outcome.reward, "episodes": outcome.episodes, "depth": torch.ones_like(parent)}
        lineage = {name: self.history[name].gather(1, parent) + value for name, value in last.items()}
        change = (outcome.phi - phi).square().mean(-1).sqrt().nan_to_num()
        values = lineage | {"parent": parent, "achieved": self.achieved(outcome), "change": change}
        for name, value in values.items():
            self.history[name][:, id[0]] = value
        lifetime = lineage if self.args.lifetime == "lineage" else last
        steps = lifetime["depth"] * self.args.execution_steps
        if self.env.episodic and self.args.fitness == "steps":
            return steps / lifetime["episodes"]
        return lifetime["reward"] / steps

    def execute(self, phi: Tensor, *numbers: int, frozen: bool | None = None) -> Outcome:
        """Execute solutions (p, s, n), in chunks, each process its share. All parts of the Outcome are (p, s, ...)."""
        args, (p, s, n) = self.args, phi.shape
        frozen = self.learner in CLIMBERS if frozen is None else frozen
        draws = self.draws((args.execution_steps + 1, s, 1 + self.env.num_draws), *numbers)
        draws, phi = draws.transpose(0, 1).flatten(1, 2), phi.flatten(0, 1)
        widths = (n, 1, 1, SwappingBandit.shortest * isinstance(self.env, SwappingBandit))
        outputs = torch.zeros(p * s, sum(widths), device=phi.device)
        share = torch.arange(p * s, device=phi.device).tensor_split(self.run.world)[self.run.rank]
        for own in filter(len, share.split(args.chunk)):
            parts = self.runs[frozen](phi[own], draws[:, own])
            outputs[own] = torch.cat([part.view(len(own), -1) for part in parts], -1)
        if dist.is_initialized():
            dist.all_reduce(outputs)  # each row was written by one process and is zero in the others
        phi, reward, episodes, after_swap = outputs.unflatten(0, (p, s)).split(widths, -1)
        return Outcome(phi, reward[..., 0], episodes[..., 0], after_swap)

    def achieved(self, outcome: Outcome) -> Tensor:
        """Steps per episode (p, s) where there are episodes, else reward per step."""
        steps = self.args.execution_steps
        return steps / outcome.episodes if self.env.episodic else outcome.reward / steps

    def best(self) -> Tensor:
        """The solution of the highest fitness in each population (p, 1, n)."""
        return self.solutions.at(self.solutions.best_slot())

    def pairs(self) -> Tensor:
        """Of random solutions (p, test_seeds, 3) the depth, and what they and their parents achieve in fresh executions. (Those
        that made them would not do: parents were selected by theirs.) The depth is how often a solution was modified; 0: no
        solution whose parent is held."""
        id = self.solutions.id
        parent = self.history["parent"].gather(1, id.clamp(min=0))
        candidate = (id >= 0) & (parent >= 0) & (self.learner != "random_search")
        draws = torch.where(candidate, self.draws(id.shape[1:], PAIRS, SELECT), -1.0)
        slot = draws.topk(min(self.args.test_seeds, id.shape[1])).indices

        is_parent = parent.gather(1, slot)[:, :, None] == id[:, None]  # (p, k, slots)
        known = is_parent.any(2) & candidate.gather(1, slot)
        parent_slot = is_parent.int().argmax(2)
        both = torch.cat([self.solutions.at(slot), self.solutions.at(parent_slot)], 1)
        child, parent = self.achieved(self.execute(both, PAIRS, 1)).chunk(2, 1)
        executions = self.history["depth"].gather(1, id.gather(1, slot).clamp(min=0))
        depth = (executions - int(self.learner in CLIMBERS)) * known  # their roots are executed before they are modified
        return torch.stack([depth.float(), child, parent], -1)


# ======================================================================================================================
# Meta-test
# ======================================================================================================================
def meta_test(args: Args, results: dict[str, dict[str, Any]], run: "Run") -> tuple[list[dict[str, Any]], dict, dict]:
    """Rows of results; what each population achieved, by environment and learner; rewards (p, 10) after a swap, by learner."""
    rows, achieved, after_swap = [], {}, {}
    for job, result in results.items():
        name, learner = job.split()
        tuned = with_tuned(args, name)
        steps = [(number + 1) * tuned.num_parallel for number in measured_rounds(tuned)]
        metric = "return" if make_env(name, 1).episodic else "reward_per_step"
        row = partial(result_row, task=name, novelty="none", metric=metric)
        rows += [row(learner, step=step, values=values) for step, values in zip(steps[:-1], result["curve"].T, strict=False)]
        for label, (values, pulls) in run.once(job, partial(test, args, job, result["phi"], run)).items():
            rows.append(row(label, step=steps[-1], values=values))
            achieved[f"{name} {label}"] = values.tolist()
            after_swap |= {label: pulls} if pulls.numel() else {}
        rows += by_depth(learner, name, result["pairs"])
    return rows, achieved, after_swap


def test(args: Args, job: str, phi: Tensor, run: "Run") -> dict[str, tuple[Tensor, Tensor]]:
    """What the best solutions phi (p, n) achieve (p,), and their rewards after a swap (p, 10), as they are and with frozen
    weights: a network that sees its last action and reward can adapt without changing a weight, so that only the difference to
    the frozen one is due to self-modification."""
    torch.compiler.reset()  # graphs of other jobs
    name, learner = job.split()
    population = Population(args, name, learner, run)
    tested = {}
    for frozen in (True,) if learner in CLIMBERS else (False, True):
        outcome = population.execute(phi[:, None].expand(-1, args.test_seeds, -1), TEST, frozen=frozen)
        label = learner + "_frozen" * (frozen and learner not in CLIMBERS)
        tested[label] = population.achieved(outcome).mean(1).cpu(), outcome.after_swap.mean(1).cpu()
    return tested


def by_pulls_since_swap(rewards: list[Tensor], since: list[Tensor]) -> Tensor:
    """Mean reward (p, 10) at the first, second, ... pull after the arms were swapped, or after the start. rewards, since: (p,)
    of each step."""
    reward, since = torch.stack(rewards), torch.stack(since)
    at = [since == pull for pull in range(SwappingBandit.shortest)]
    return torch.stack([(reward * pull).sum(0) / pull.sum(0).clamp(min=1) for pull in at], 1)


def differences(args: Args, values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of --learner and each other. values: of the populations, which share random numbers, by environment and learner."""
    jobs = [job for job in values if job.split()[1] != args.learner]
    return {job: median_difference(values[f"{job.split()[0]} {args.learner}"], values[job]) for job in jobs}


LABELS = {"fme": "FME", "no_reward": "FME without reward input", "hill_climbing_matched": "hill climbing, matched noise"}
STYLES = {name: f"C{index}.-" for index, name in enumerate(get_args(Name))}


def by_depth(learner: str, name: str, pairs: Tensor) -> list[dict[str, Any]]:
    """Whether self-modifications improve later ones (Figure 7.3), by a measure of ours: what a child achieves minus what its
    parent does, and how often it is better, by the child's depth: 1, 2 to 3, 4 to 7, ... pairs: those of Population.pairs."""
    rows = []
    depth, child, parent = pairs.unbind(-1)
    for least in (2**power for power in range(31)):
        chosen = (depth >= least) & (depth < 2 * least)
        some = chosen.any(1)
        metrics = {"child_minus_parent": child - parent, "child_better": (child > parent) + 0.5 * (child == parent)}
        for metric, values in metrics.items() if some.any() else ():
            means = (values * chosen).sum(1)[some] / chosen.sum(1)[some]
            rows.append(result_row(learner, name, "none", metric, least, means))
    return rows


def draw_improvement(path: Path, rows: list[dict[str, Any]]) -> None:
    """By depth, the modifications in the lineage."""
    words = {"child_minus_parent": "child minus parent", "child_better": "share of children that are better"}
    rows = [row | {"task": f"{row['task']}: {words[row['metric']]}"} for row in rows if row["metric"] in words]
    if rows:
        plot(rows, path, xlabel="depth", xscale="log", labels=LABELS, styles=STYLES, columns=2, standard_error=True)


def draw_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Figure 7.3 (and 7.4): fresh executions of the best solution so far, mean and standard deviation over populations."""
    units = {"return": "steps per episode", "reward_per_step": "reward per step"}
    rows = [row for row in rows if row["learner"] in STYLES and row["metric"] in units]
    titles = {row["task"]: f"{row['task']}, {units[row['metric']]}" for row in rows}
    plot(rows, path, xlabel="self-modifications", labels=LABELS, titles=titles, styles=STYLES, ylim=(0, None))


def draw_adaptation(path: Path, after_swap: dict[str, Tensor]) -> None:
    """Figure 7.4: rewards at the pulls after a swap, mean and standard deviation over populations."""
    rows = []
    for label, reward in after_swap.items():
        panel = "swapping_bandit" + ", then frozen" * label.endswith("_frozen")
        row = partial(result_row, label.removesuffix("_frozen"), panel, "none", "reward")
        rows += [row(pull, values) for pull, values in enumerate(reward.unbind(1), 1)]
    plot(rows, path, xlabel="pull after a swap", ylabel="reward", labels=LABELS, styles=STYLES, ylim=(0, 1.02))


# ======================================================================================================================
# Use it
# ======================================================================================================================
class FME:
    """A solution of FME that acts in your environment, and changes its own weights with each step.

        env = gymnasium.make("CartPole-v1")
        agent = fme.FME.load("pretrained")
        obs, _ = env.reset()
        action = agent.act(obs)
        obs, reward, terminated, truncated, _ = env.step(action)
        action = agent.act(obs, reward, terminated or truncated)

    checkpoint: "pretrained", which has one solution of CartPole, or a checkpoint.pt of this script. env, learner: of the run;
    where it is hill climbing, weights do not change. seed: decides the actions. The solution is that of the best population.

    obs are arrays or tensors of finite numbers, (o,) for one environment or (e, o) for several, each with its own copy of the
    network; reward those of the last action, () or (e,). The network has no input for the ends of episodes. Raises ValueError
    for other shapes, CheckpointError or UserError for what is no checkpoint of this script with that solution.

    Solutions were selected for what they do in `execution_steps` steps; changes beyond that were not, so call `reset` after as
    many. Where the reward is among the run's --inputs ("pretrained" has the observation alone), it has to be that of the run:
    for CartPole that of gymnasium.make("CartPole-v1", sutton_barto_reward=True)."""

    def __init__(self, args: Args, env: Env, phi: Tensor, learner: str = "fme", seed: int = 0):
        self.args, self.env = for_learner(args, learner), env
        self.phi = phi  # (n,)
        self.scale = getattr(env, "scale", 1.0)  # of its observations
        self.frozen = learner in CLIMBERS
        self.generator = torch.Generator(phi.device).manual_seed(seed)
        self.reset()

    @staticmethod
    def load(
        checkpoint: str | Path = "pretrained", env: str = "cartpole", learner: str = "fme", seed: int = 0, device: str = "cpu"
    ) -> "FME":
        saved = checkpoints.read(checkpoints.named(checkpoint, METHOD), method=str, args=dict, state=dict)
        try:
            args = with_tuned(from_dict(Args, saved["args"]), env)
            result = saved["state"]["['evolution']"]["results"][f"{env} {learner}"]
            phi = result["phi"][result["curve"][:, -1].argmax()].to(device)
            FME(args, make_env(env, 1, device), phi, learner).act(torch.zeros(make_env(env, 1).obs_size))  # of fitting sizes
        except (TypeError, KeyError, RuntimeError) as error:
            raise UserError(f"{checkpoint} has no solution of {learner} in {env} of this {METHOD}.py.") from error
        return FME(args, make_env(env, 1, device), phi, learner, seed)

    def reset(self) -> None:
        """Undo all changes of the weights."""
        self.layers: list[Tensor] | None = None

    @torch.no_grad()
    def act(self, obs: Any, reward: Any = 0.0, done: Any = False) -> Any:
        """The next action after the reward of the last one: an int, or (e,)."""
        obs, reward = (torch.as_tensor(x, dtype=torch.float32, device=self.phi.device) for x in (obs, reward))
        several = obs[None] if obs.ndim == 1 else obs
        if obs.ndim not in (1, 2) or obs.shape[-1] != self.env.obs_size or not obs.isfinite().all():
            raise ValueError(f"Observations have to be finite, ({self.env.obs_size},) or (e, {self.env.obs_size}).")
        if reward.shape not in ((), obs.shape[:-1]) or not reward.isfinite().all():
            raise ValueError(f"Rewards have to be finite numbers of shape {tuple(obs.shape[:-1])}.")
        if self.layers is None:
            self.layers = unpack(self.phi.expand(len(several), -1), sizes(self.args, self.env))
            self.action = torch.full((len(several),), -1, device=obs.device)  # none
        if len(self.layers[0]) != len(several):
            raise ValueError(f"There have to be observations of {len(self.layers[0])} environments.")

        draw = torch.rand(len(several), 1, generator=self.generator, device=obs.device)
        inputs = self.layers, several / self.scale, reward.expand(len(several)), self.action, draw
        self.action, self.layers = act(self.args, self.env, self.frozen, *inputs)
        return self.action if obs.ndim == 2 else int(self.action)


# ======================================================================================================================
# The run
# ======================================================================================================================
METHOD = "fme"  # in checkpoints and results; a renamed copy of this file reads them too
USER_ERRORS = (CheckpointError, EnvError, FlagError)
NAMED_AFTER = ("envs", "learner")  # the flags that name a run's folder
KEPT = ("preset", "populations", "executions", "num_parallel", "roots", "inputs", "hidden", "layers")  # in a meta-test


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


def rounds(args: Args) -> int:
    """Rounds of num_parallel executions."""
    return -(-args.executions // args.num_parallel)


def measured_rounds(args: Args) -> list[int]:
    """Rounds after which the best solutions so far are measured: for every eighth of the executions, and 1, 10, 100, ..."""
    points = [args.executions * part // 8 for part in range(1, 9)] + [1, 10, 100, 400, 1000, 10_000]
    return sorted({max(0, -(-point // args.num_parallel) - 1) for point in points if point <= args.executions})


def empty_history(args: Args, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Zeros to be filled: the history of a Population, and what its best so far achieve in fresh executions (p, points)."""
    ids = args.roots + rounds(args) * args.num_parallel
    zeros = partial(torch.zeros, args.populations, device=device)
    history = {name: zeros(ids) for name in ("reward", "episodes", "achieved", "change")}
    history |= {name: zeros(ids, dtype=torch.int64) for name in ("depth", "parent")}
    return history, zeros(len(measured_rounds(args)))


def with_tuned(args: Args, name: str) -> Args:
    """Args with the values of TUNED where flags are not given."""
    tuned = dict(populations=64, num_parallel=1) | TUNED[name] | (TUNED_LAPTOP[name] if args.preset == "laptop" else {})
    args = replace(args, **{flag: value for flag, value in tuned.items() if getattr(args, flag) is None})
    return replace(args, roots=args.roots or args.num_parallel)


def for_learner(args: Args, learner: str) -> Args:
    """Args without the reward as an input for no_reward."""
    without = tuple(name for name in args.inputs if name != "reward")
    return replace(args, inputs=without) if learner == "no_reward" else args


def make_env(name: str, count: int, device: torch.device | str = "cpu") -> Env:
    """An environment whose reward per step differs between solutions, unlike CartPole's of 1 at each step."""
    return envs.make(name, count, device, scaled=True, **(dict(sutton_barto_reward=True) if name == "cartpole" else {}))


def check(args: Args) -> None:
    """Refuse what cannot work, before anything is written."""
    if not args.envs:
        raise UserError("--envs needs at least one environment.")
    if args.graphs and args.device != "cuda":
        raise UserError("--graphs needs a GPU.")
    for name in args.envs:
        if name not in TUNED:
            reason = "cannot have the continuous actions of" if make_env(name, 1).num_actions is None else "has no setting for"
            raise UserError(f"FME {reason} {name}; choose from {', '.join(TUNED)}.")
        tuned = with_tuned(args, name)
        if tuned.num_parallel % tuned.roots:
            raise UserError(f"--num-parallel {tuned.num_parallel} has to be a multiple of --roots {tuned.roots}: all go first.")
    learners, matched = [args.learner, *args.baselines], "hill_climbing_matched"
    if matched in learners and "fme" not in learners[: learners.index(matched)]:
        raise UserError("hill_climbing_matched has noise as long as the changes of FME; name fme before it.")
    if len(set(args.inputs)) < len(args.inputs):
        raise UserError("--inputs names something twice.")
    if "no_reward" in learners and "reward" not in args.inputs:
        raise UserError("no_reward is FME without the reward among its --inputs, where it is missing; leave out no_reward.")


class Evolution:
    """All jobs of a run, an environment and a learner each, one after the other: results of the finished ones, and the current
    one. A result: of the best solutions phi (p, n) and the curve (p, points) of what they achieved, pairs, and the history."""

    def __init__(self, args: Args, run: "Run"):
        self.args, self.run, self.results, self.current = args, run, {}, None
        self.jobs = [f"{name} {one}" for name in args.envs for one in dict.fromkeys([args.learner, *args.baselines])]
        self.plan = [(job, number) for job in self.jobs for number in range(rounds(with_tuned(args, job.split()[0])))]

    def start(self, job: str) -> Population:
        torch.compiler.reset()  # graphs of other jobs
        name, learner = job.split()
        population = Population(self.args, name, learner, self.run)
        if learner == "hill_climbing_matched":
            change = self.results[f"{name} fme"]["history"]["change"][:, population.args.roots :]
            population.sigma = change.median(1).values[:, None, None]
        return population

    def evolve(self) -> None:
        """Algorithm 12 for all jobs."""
        for step in self.run.steps(len(self.plan), {"evolution": self}):
            job, number = self.plan[step]
            if number == 0:
                self.current = self.start(job)
            population, measured = self.current, measured_rounds(self.current.args)
            fitness_monotonic_execution(population, number)
            if number in measured:
                best = population.best().expand(-1, self.args.test_seeds, -1)
                fresh = population.achieved(population.execute(best, TEST, number + 1))
                population.curve[:, measured.index(number)] = fresh.mean(1)

            achieved = population.history["achieved"].gather(1, population.ids(number))
            depth = population.history["depth"].amax(1).float()
            log = {"job": self.jobs.index(job), "achieved": achieved.mean(), "round": number, "longest_lineage": depth.mean()}
            if number == measured[-1]:
                result = {"phi": population.best()[:, 0], "pairs": population.pairs()}
                self.results[job] = result | {"curve": population.curve, "history": population.history}
                self.current = None
            self.run.log(step, log)

    def state_dict(self) -> dict[str, Any]:
        """Results of the finished jobs, and the state of a job that is not finished, without slots that were never used."""
        if self.current is None:
            return {"results": self.results}
        slots = int((self.current.solutions.id >= 0).any(0).nonzero().max()) + 1
        state = checkpoints.state_of(self.current.keep(slots))
        return {"results": self.results, "at": {name: part.clone() for name, part in state.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of the jobs that the flags name; one that is not finished only where it continues. Raises CheckpointError,
        LookupError, TypeError or AttributeError where a part is missing or does not fit."""
        self.results = {job: self.result(job, state["results"][job]) for job in self.jobs if job in state["results"]}
        left = self.plan[self.run.first :] if self.args.resume else []
        if left and left[0][1] > 0:
            self.current = self.start(left[0][0])
            checkpoints.restore(self.current.keep(state["at"]["['solutions']['id']"].shape[1]), state["at"])
        if self.args.resume and not {*self.jobs} <= {*self.results, *dict(left)}:
            raise LookupError("a finished job has no result")

    def result(self, job: str, saved: dict[str, Any]) -> dict[str, Any]:
        """The result of a job as a checkpoint has it."""
        name, learner = job.split()
        args = for_learner(with_tuned(self.args, name), learner)
        n = sum(a * (b + 2 * a + 4) for a, b in sizes(args, make_env(name, 1)))
        zeros = partial(torch.zeros, args.populations, device=self.run.device)
        history, curve = empty_history(args, self.run.device)
        result = {"phi": zeros(n), "pairs": zeros(saved["pairs"].shape[1], 3), "curve": curve, "history": history}
        checkpoints.restore(result, checkpoints.state_of(saved))
        return result


@torch.no_grad()
def main() -> None:
    args, checkpoint = parse_args()
    check(args)
    run = Run(args, checkpoint)
    evolution = Evolution(args, run)
    if args.mode == "test":
        checkpoints.restore({"evolution": evolution}, checkpoint["state"], args.checkpoint)
        missing = ", ".join(job for job in evolution.jobs if job not in evolution.results)
        if missing:
            raise UserError(f"{args.checkpoint} has no solutions for {missing}; choose other --envs, --learner or --baselines.")
    run.open_folder()

    if args.mode == "train":
        evolution.evolve()
    tested = time.time()
    rows, achieved, after_swap = meta_test(args, evolution.results, run)
    if run.rank > 0:
        return
    draw_curves(run.folder / "self_modifications.png", rows)
    draw_improvement(run.folder / "improvement.png", rows)
    if after_swap:
        draw_adaptation(run.folder / "adaptation.png", after_swap)
    until_solved = {job: executions_until_solved(args, job, result["history"]) for job, result in evolution.results.items()}
    compared = {"achieved": differences(args, achieved), "until_solved": differences(args, until_solved)}
    for what, others in compared.items() if len(achieved) > 1 else ():
        run.info(f"\n{what.replace('_', ' ')}, medians over populations: {args.learner}, the other, difference, 95 % interval")
        for job, facts in others.items():
            run.info(f"{job:40}" + "".join(f"{number:10.3f}" for number in facts.values()))
    run.finish(
        rows,
        tested,
        parameters=int(next(iter(evolution.results.values()))["phi"].shape[1]),
        achieved=achieved,
        until_solved=until_solved,
        differences=compared,
        after_swap={label: reward.mean(0).tolist() for label, reward in after_swap.items()},
    )


def executions_until_solved(args: Args, job: str, history: dict[str, Tensor]) -> list[int]:
    """For each population the executions until the first that achieved what SOLVED asks for, once: fresh executions of what it
    left may achieve less. 1 more than all, if none did."""
    solved = history["achieved"][:, with_tuned(args, job.split()[0]).roots :] >= SOLVED[job.split()[0]]
    return [int(one.float().argmax()) + 1 if one.any() else len(one) + 1 for one in solved]


if __name__ == "__main__":
    machine.run_as_script(main, f"{METHOD}.py", (UserError, *USER_ERRORS))
