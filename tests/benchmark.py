"""How fast the scripts are: `python tests/benchmark.py vsml`. A benchmark, not a test.

Prints the median over several repetitions, and the largest memory that the process has needed so far.

    python tests/benchmark.py vsml                            # 8x8 and 28x28 inputs, a few pairs of ES, a few sequences
    python tests/benchmark.py vsml --compile off              # what torch.compile gains
    python tests/benchmark.py vsml --setting thesis           # the thesis' ES step: 1,024 pairs, 500 examples, 28x28
    python tests/benchmark.py gpicl                           # a meta-step at the laptop's shape, and its parts
    python tests/benchmark.py gpicl --setting thesis          # at the thesis' shape, at 14x14 and 32x32x3
    python tests/benchmark.py fme                             # environment steps per second with 1, 64 and 1,024 solutions
    python tests/benchmark.py symla                           # an outer step at the laptop's setting, learner and environment
    python tests/benchmark.py symla --setting thesis          # at the thesis': 512 members with 100 (bandits) or 10 lifetimes
    python tests/benchmark.py metagenrl                       # updates of 1, 5 and 20 agents at the laptop's setting
    python tests/benchmark.py metagenrl --setting thesis      # at the thesis': 3 x 350 units, 100 sub-trajectories of 20 steps
    python tests/benchmark.py gla                             # PPO's steps, the Transformer's tokens, and its cache
    python tests/benchmark.py gpu --minutes 9 --out FOLDER    # everything worth knowing of a GPU, within so many minutes

`gpu` writes a line of JSON to FOLDER/gpu.jsonl for each thing that it measures, as soon as it is measured:
    1. the card: a large copy, large matrix products;
    2. every script whole at tiny sizes, on the CPU, on the GPU, and on the GPU compiled, and how far their results are apart;
    3. a step of each script at the thesis' sizes, compiled, and the time that this took;
    4. GPICL at the thesis' preset on MNIST, which trains while 2 and 3 leave the GPU to it, then its meta-test;
    5. SymLA's bandits and VSML at the thesis' preset (only if asked for).
Each is a process of its own with a deadline. Without a GPU it does the same at toy sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.datasets import Tasks, compile_draws, load


def seconds(work: Callable[[], object], repetitions: int) -> float:
    """Median seconds of one call, after one that warms up and compiles."""
    taken = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def product_flops(device: torch.device) -> float:
    """FLOPs per second of one large matrix product."""
    side = 1024 if device.type == "cpu" else 8192
    square = torch.randn(side, side, device=device)
    peak = 2 * side**3 / seconds(lambda: square @ square, 10)
    print(f"{peak / 1e12:.2f} TFLOP/s in a product of {side} x {side} matrices")
    return peak


def line(what: str, size: int, taken: float, rollouts: int, examples: int) -> None:
    each = taken / (rollouts * examples) * 1e6
    print(
        f"{what:<28} {size}x{size}".ljust(38),
        f"{rollouts:>5} rollouts x {examples:>3} examples  {taken:8.3f} s  {each:8.1f} us per example and rollout"
        f"  {peak_mb():7.0f} MB",
        flush=True,
    )


def bench_vsml(options: argparse.Namespace) -> None:
    import vsml

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vsml.keep_memory()
    thesis = options.setting == "thesis"
    for size, pairs in ((28, options.pairs),) if thesis else ((8, 24), (28, 2)):
        bench_vsml_at(options, device, size, pairs, examples=500 if thesis else 250, repetitions=2 if thesis else 5)


def bench_vsml_at(options: argparse.Namespace, device: str, size: int, pairs: int, examples: int, repetitions: int) -> None:
    """ES, backpropagation and meta-test at one input size. Half of the tasks are projected, as in meta-training."""
    import vsml

    tasks = Tasks(load("random", size=size, device=device), projected=0.5)
    args = vsml.Args(**vsml.LAPTOP | dict(device=device, population=pairs, sequence_length=examples, chunk=options.chunk))
    run = argparse.Namespace(compiles=options.compile == "on")

    def learner(name: str, use: str) -> tuple[vsml.Learner, torch.Tensor]:
        made = vsml.make_learner(name, args, run, (size * size, 10), use)
        return made, made.init(torch.Generator().manual_seed(0)).to(device)

    vsml_es = learner("vsml", "es")
    line("one step of ES", size, seconds(lambda: vsml.es_gradient(args, *vsml_es, tasks, 0), repetitions), 2 * pairs, examples)
    if options.setting == "thesis":
        return
    short = replace(args, sequence_length=60 if size == 8 else 20, sequences=16 if size == 8 else 4)
    vsml_backprop = learner("vsml", "backprop")
    taken = seconds(lambda: vsml.backprop_gradient(short, *vsml_backprop, tasks, 0), repetitions)
    line("one step of backpropagation", size, taken, short.sequences, short.sequence_length)
    layers = {"vsml": args, "vsml, 32 hidden": replace(args, hidden=(32,), backward_pass=True)}
    layers |= {"vsml, conv": replace(args, conv=(8,), backward_pass=True)}
    layers |= dict.fromkeys(("rnn", "hebbian", "fwmemory", "sgd", "adam", "sgd2", "adam2"), args)
    for what, args in layers.items():
        name = what.split(",")[0]
        tested = vsml.make_learner(name, args, run, (size * size, 10), "test")
        theta = tested.init(torch.Generator().manual_seed(0)).to(device)
        together = vsml.at_a_time(args, tasks, name)
        seeds = replace(args, test_seeds=together, test_steps=min(examples, 250 if size == 8 else 100))
        with torch.no_grad():
            taken = seconds(lambda: vsml.curve(seeds, tested, theta, tasks, together), repetitions)  # noqa: B023
        line(f"meta-test of {what}", size, taken, together, seeds.test_steps)
    args = replace(vsml.Args(**vsml.CLONE), device=device)
    x, y = tasks.sample(*torch.zeros(2, 1, dtype=torch.int64, device=device), 64)
    for name in ("clone", "backprop"):
        tested = vsml.make_learner(name, args, run, (), "test")
        params = tested.params(tested.init(torch.Generator().manual_seed(0)).to(device)[None])
        state = tested.initial_state(tasks.keys(torch.arange(64, device=device), 3)[None], size * size, 10)
        with torch.no_grad():
            taken = seconds(lambda: vsml.one_example(tested, params, state, x, y), repetitions)  # noqa: B023
        line(f"a batch of 64, {name}", size, taken, 1, 64)


def bench_gpicl(options: argparse.Namespace) -> None:
    """A meta-step of the Transformer in milliseconds, tasks made anew, and model FLOP utilisation: FLOPs of the matrix products
    of the Transformer, forward and backward, against those of one large product in the same precision."""
    import gpicl

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpicl.keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = True
    run = argparse.Namespace(compiles=options.compile == "on", device=device)
    if run.compiles:
        compile_draws()
    peak = product_flops(device)
    thesis = options.setting == "thesis"
    for size, channels in ((14, 1), (32, 3)) if thesis else ((8, 1),):
        args = gpicl.Args(**({} if thesis else gpicl.LAPTOP) | dict(device=device.type, size=size, channels=channels))
        bench_gpicl_at(args, run, peak, repetitions=50 if size == 8 or device.type == "cuda" else 2)


class GPICLStep:
    """A meta-step of GPICL's Transformer, whole and in parts. The dataset is digits, scaled; time depends on its size only."""

    def __init__(self, args: gpicl.Args, run: argparse.Namespace):
        import gpicl

        self.args, self.gpicl, self.device = args, gpicl, run.device
        data = gpicl.prepare(args, "digits", "train", run.device)
        self.tasks = gpicl.train_tasks(args, data, args.size**2 * args.channels, args.bias)
        self.learner = gpicl.make_learner("transformer", args, self.tasks.num_inputs, 10).to(run.device)
        self.optimizer, self.loss_of = gpicl.make_optimizer(args, self.learner), gpicl.compiled(run, self.learner, 10)
        self.counter = iter(range(10**9))
        weights = sum(p.numel() for name, p in self.learner.named_parameters() if p.ndim == 2 and name != "position")
        attention = 2 * args.layers * args.heads * args.key_size * args.sequence_length  # q k and weights v, half of it masked
        self.flops = 6 * args.batch * args.sequence_length * (weights + attention / 2)

    def ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gpicl.batch_ids(self.args, next(self.counter), self.device)

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tasks.sample(*self.ids(), self.args.sequence_length)

    def projections(self) -> torch.Tensor:
        return self.tasks.projections(self.tasks.keys(self.ids()[0], 1))

    def forward_backward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.loss_of(x, y)[0].backward()

    def optimise(self) -> None:
        self.gpicl.average_gradients(self.learner, self.args.clip)
        self.optimizer.step()

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.forward_backward(x, y)
        self.optimise()
        self.optimizer.zero_grad()

    def whole(self) -> None:
        self.update(*self.sample())


def bench_gpicl_at(args: gpicl.Args, run: argparse.Namespace, peak: float, repetitions: int) -> None:
    step = GPICLStep(args, run)
    data = step.sample()
    making, updating = seconds(step.sample, repetitions), seconds(lambda: step.update(*data), repetitions)
    whole = seconds(step.whole, repetitions)
    print(
        f"width {args.width}, {args.layers} layers, {args.batch} x {args.sequence_length} examples,"
        f" {step.tasks.num_inputs} inputs:"
        f" {1e3 * whole:.2f} ms a step ({1 / whole:.1f} steps/s), of it making tasks {1e3 * making:.2f} ms"
        f" ({100 * making / whole:.0f} %), learning {1e3 * updating:.2f} ms; model FLOP utilisation"
        f" {100 * step.flops / whole / peak:.0f} %; {peak_mb():.0f} MB",
        flush=True,
    )


def bench_fme(options: argparse.Namespace) -> None:
    """Environment steps per second of an execution, all of it, from random numbers to what is kept; medians of 5. 125 solutions
    at a time on a CPU, whose cache holds them, all at once on a GPU."""
    import fme

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fme.keep_memory()
    run = argparse.Namespace(compiles=options.compile == "on", device=device, rank=0, world=1)
    for name in ("bandit", "cartpole"):
        for count in (1, 64, 1024):
            torch.compiler.reset()
            chunk = options.chunk or (125 if device.type == "cpu" else count)
            args = fme.Args(populations=1, num_parallel=count, executions=count, roots=count, chunk=chunk)
            args = fme.with_tuned(args, name)
            with torch.no_grad():
                population = fme.Population(args, name, "fme", run)
                taken = seconds(partial(population.execute, population.roots, 0), 5)
                frozen = seconds(partial(population.execute, population.roots, 0, frozen=True), 5)
            steps = count * args.execution_steps / 1e3
            print(
                f"{name:<10} {count:>5} solutions  {1e6 * taken / args.execution_steps:8.1f} us a step"
                f"  {steps / taken:8.1f} K steps/s  (frozen weights {steps / frozen:8.1f})  {peak_mb():6.0f} MB",
                flush=True,
            )


def bench_symla(options: argparse.Namespace) -> None:
    """An outer step of SymLA, of the in-context RNN, and of a player that does not learn, which leaves environment and
    sampling; medians of 3. --pairs and --steps shorten the thesis' step; agent steps per second stay what they are."""
    import symla

    device = "cuda" if torch.cuda.is_available() else "cpu"
    symla.keep_memory()
    run = argparse.Namespace(compiles=options.compile == "on", device=torch.device(device))
    thesis = options.setting == "thesis"
    names = ["independent_bandit", "independent_bandit:10", "upright_cartpole", "grid_world:3", "acrobot"]
    for name in names[:1] + names[2:] if thesis else names:
        torch.compiler.reset()
        preset = "thesis" if thesis else "laptop"
        args = symla.Args(**symla.PRESETS[preset] | {"envs": (name,), "preset": preset, "device": device})
        args = symla.settled(args)
        args = replace(args, lifetime_steps=min(args.lifetime_steps, options.steps or args.lifetime_steps), chunk=options.chunk)
        if thesis:
            args = replace(args, population=min(args.population, 2 * options.pairs))
        steps = args.population * args.evaluations * args.lifetime_steps
        taken = {}
        with torch.no_grad():
            for learner in ("symla", "rnn", "uniform"):
                made, live, env = symla.player(args, learner, name, args.evaluations, run, "train")
                theta = made.init(torch.Generator().manual_seed(0)).to(device)
                taken[learner] = seconds(partial(symla.es_gradient, args, made, live, env, theta, 0), 3)
        print(
            f"{name:<22} {args.population} x {args.evaluations} lifetimes of {args.lifetime_steps} steps  "
            f"SymLA {taken['symla']:7.3f} s, {steps / taken['symla'] / 1e3:7.1f} K agent steps/s  RNN {taken['rnn']:7.3f} s  "
            f"environment and sampling {taken['uniform']:7.3f} s, {100 * taken['uniform'] / taken['symla']:3.0f} % of SymLA's"
            f"  {peak_mb():6.0f} MB",
            flush=True,
        )


def bench_metagenrl(options: argparse.Namespace) -> None:
    """Updates of critics, policies and objective, apart and as they come in meta-training (policies and objective every second
    time), of 1, 5 and 20 agents in environments as large as HalfCheetah; and environment steps of the laptop's environments."""
    import metagenrl

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metagenrl.keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = True
    thesis, one = options.setting == "thesis", None
    args = metagenrl.Args(**({} if thesis else metagenrl.LAPTOP) | dict(device=device.type))
    args = replace(args, frozen_steps=0, random_steps=0)
    compiles = options.compile == "on" and (device.type == "cuda" or options.compile_updates)
    fuse = metagenrl.fuser(argparse.Namespace(compiles=compiles))
    nets = metagenrl.make_nets(args, 17, 6)
    for agents in (1, 5, 20):
        torch.manual_seed(0)
        state = {name: x.to(device) for name, x in metagenrl.beginners(nets, agents).items()}
        state["age"] = torch.full((agents,), 10**6, device=device)
        shape = (agents, args.batch, args.length)
        obs, action, reward, noise, next_obs = (torch.randn(*shape, n, device=device) for n in (17, 6, 1, 6, 17))
        mask = torch.ones(shape, device=device)
        batch = metagenrl.Batch(obs, action.tanh(), reward[..., 0], 0 * mask, mask / 2, next_obs, mask)
        alpha = nets.init_objective(agents, torch.default_generator).to(device)
        share = torch.tensor(1.0, device=device)
        update = [fuse(partial(f, args, nets)) for f in (metagenrl.update_critics, metagenrl.update_policies)]
        meta = fuse(partial(metagenrl.objective_gradient, args, nets))
        repetitions = 2 if thesis and device.type == "cpu" else 10
        with torch.no_grad():
            critics = seconds(partial(update[0], state, batch, noise), repetitions)
            policies = seconds(partial(update[1], metagenrl.follow_objective, alpha, state, batch, share), repetitions)
            objective = seconds(partial(meta, alpha, state, batch), repetitions)
        whole = critics + (policies + objective) / args.delay
        one = one or whole
        print(
            f"{agents:>3} agents  update {1e3 * whole:7.1f} ms, {agents / whole:7.1f} agent updates/s, {whole / one:5.1f} x one"
            f" agent: critics {1e3 * critics:7.1f} ms, policies {1e3 * policies:7.1f} ms, objective {1e3 * objective:7.1f} ms"
            f"  {peak_mb():6.0f} MB",
            flush=True,
        )
    for name in ("point_mass", "cart_swing_up", "pendulum", "LunarLanderContinuous", "HalfCheetah-v4"):
        with torch.no_grad():
            group = metagenrl.Group(args, name, torch.arange(8), 1000, device, lambda f: f)
            taken = seconds(lambda: (group.send(), group.receive(0)), 50)  # noqa: B023
        print(f"{name:<24} {8 * args.copies:>3} copies  {8 * args.copies / taken / 1e3:8.1f} K environment steps/s", flush=True)


def bench_gla(options: argparse.Namespace) -> None:
    """Environment steps per second of PPO, learning included, of many agents at once and of one as CleanRL has it (4 copies of
    128 steps, 4 epochs of 4 minibatches); tokens per second of a meta-step and FLOPs of its matrix products against those of
    one large product; and steps per second of lifetimes with and without the cache, at the end of a context of 1,024."""
    import gla

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gla.keep_memory()
    args = gla.Args(**gla.LAPTOP)
    for name in ("hidden_goal:8", "cartpole", "heading:0"):
        many = replace(args, agents=128, copies=4, rollout=128, updates=2, epochs=4, minibatches=4, ppo_hidden=64)
        taken = {}
        for agents in (128, 1):
            some = replace(many, agents=agents)
            taken[agents] = (
                agents * 4 * 128 * 2 / seconds(partial(gla.collect, some, name, device, lambda updates: None), 3) / 1e3
            )
        print(
            f"{name:<14} PPO: {taken[128]:8.1f} K environment steps/s of 128 agents, {taken[1]:6.1f} K of one,"
            f" {taken[128] / taken[1]:5.1f} x",
            flush=True,
        )
    model = gla.GLA(args).to(device)
    read_by = torch.compile(model, dynamic=False) if options.compile == "on" and device.type == "cuda" else model
    lives = gla.collect(replace(args, agents=8), "hidden_goal:8", device, lambda updates: None).to(device)
    env, own = gla.make_env("hidden_goal:8", 1, device), torch.arange(args.batch, device=device)

    def meta_step() -> None:
        projection = gla.draw_projection(args, env, own)
        told = gla.subsample(args, 8, lives, True, args.batch, own)
        gla.meta_loss(args, 8, read_by, [(projection, *told)]).mean().backward()

    taken, count = seconds(meta_step, 10), args.batch * args.chunks * args.chunk
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.position.numel()
    share = 6 * weights * count / taken / product_flops(device)
    print(f"meta-step: {count / taken / 1e3:8.1f} K tokens/s; model FLOP utilisation {100 * share:.0f} %", flush=True)
    long = gla.GLA(replace(args, chunks=1024 // args.chunk)).to(device)
    read = torch.randn(32, 1024, long.embed.in_features, device=device)
    with torch.no_grad():
        _, _, cache = long(read[:, :-1])
        cached, whole = seconds(lambda: long(read[:, -1:], cache), 10), seconds(lambda: long(read), 3)
    print(
        f"a step of 32 lifetimes with 1,024 steps to look back at: {32 / cached:8.0f} steps/s with the cache,"
        f" {32 / whole:6.0f} without, {whole / cached:5.1f} x"
    )


# ======================================================================================================================
# gpu, the workers: each a process of its own, which writes down what it measures at once
# ======================================================================================================================
class Log:
    """Lines of gpu.jsonl: the card, torch's version, the step, what was measured, and figures."""

    def __init__(self, folder: Path, card: str):
        self.path, self.card = folder / "gpu.jsonl", card

    def __call__(self, step: int, what: str, **figures: Any) -> None:
        figures = {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in figures.items()}
        line = {"card": self.card, "torch": torch.__version__, "step": step, "what": what, **figures}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{step} {what}: " + ", ".join(f"{name} {x}" for name, x in figures.items()), flush=True)


class Worker:
    """What a worker needs: its device, its sizes, its log, and a way to wait for its turn."""

    def __init__(self, options: argparse.Namespace):
        self.began, self.parent, self.options = time.perf_counter(), os.getppid(), options
        self.device = torch.device("cpu" if options.toy else "cuda")
        card = "CPU" if options.toy else torch.cuda.get_device_name()
        self.log = Log(options.out, card)
        self.toy = options.toy
        self.run = argparse.Namespace(compiles=not options.toy, device=self.device, rank=0, world=1)
        self.few = 2 if options.toy else 20
        torch.backends.cuda.matmul.allow_tf32 = True  # as the scripts have it

    def note(self, what: str, **figures: Any) -> None:
        self.log(3, what, **figures, peak_mb=peak_mb())

    def warm(self, what: str, work: Callable[[], object]) -> None:
        """The first call, which compiles."""
        self.note(f"{what}: first call", seconds=once(work))

    def hold(self) -> None:
        """All is compiled: wait until no other process uses the GPU."""
        name = self.options.name
        self.log(3, f"{name} ready", seconds=time.perf_counter() - self.began, peak_mb=peak_mb())
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        (self.options.signals / f"{name}.ready").touch()
        while not (self.options.signals / f"{name}.go").exists():
            time.sleep(0.02)
            if os.getppid() != self.parent:
                sys.exit("the benchmark is gone")

    def kernels(self, what: str, work: Callable[[], object]) -> None:
        """What the GPU did in one call: how many kernels, how long they took all together, and which took longest."""
        if not torch.cuda.is_available():
            return
        from torch.profiler import ProfilerActivity, profile

        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                wall = once(work)
            done = [event for event in profiled.key_averages() if event.self_device_time_total > 0]
            done.sort(key=lambda event: -event.self_device_time_total)
            busy, count = sum(event.self_device_time_total for event in done), sum(event.count for event in done)
            top = [[event.key[:70], event.count, round(event.self_device_time_total / 1e3, 3)] for event in done[:12]]
            self.note(f"{what}: kernels", count=count, busy_ms=busy / 1e3, wall_ms=1e3 * wall, top=top)
        except Exception as error:  # a profiler that fails costs nothing else
            self.note(f"{what}: no profile", error=repr(error)[-500:])


def once(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def steady(work: Callable[[], object], repetitions: int) -> float:
    """Seconds of one call of many, between which nothing waits for the GPU."""
    once(work)

    def several() -> None:
        for _ in range(repetitions):
            work()

    return once(several) / repetitions


def ms(work: Callable[[], object], repetitions: int) -> float:
    return 1e3 * seconds(work, repetitions)


def time_card(worker: Worker) -> None:
    device, toy = worker.device, worker.toy
    worker.log(1, "start", seconds=time.perf_counter() - worker.began, cores=os.cpu_count(), python=sys.version.split()[0])
    source = torch.randn(2**20 if toy else 2**30, device=device)
    target = torch.empty_like(source)
    taken = seconds(lambda: target.copy_(source), 10)
    worker.log(1, "copy", TB_per_s=2 * source.nbytes / taken / 1e12, seconds=taken, peak_mb=peak_mb())
    del source, target
    side = 1024 if toy else 8192
    square = torch.randn(side, side, device=device)
    half = square.bfloat16()
    for what, x in (("TF32", square), ("bf16", half)):
        taken = seconds(lambda: x @ x, 3 if toy else 20)  # noqa: B023 (called at once)
        worker.log(1, f"{what} product of {side}", TFLOP_per_s=2 * side**3 / taken / 1e12, seconds=taken, peak_mb=peak_mb())


def time_vsml(worker: Worker) -> None:
    """A step of ES at the thesis' setting: first one chunk of it, as many pairs as are evaluated at once."""
    import vsml
    from common import es

    size = 8 if worker.toy else 28
    args = vsml.Args(device=worker.device.type)
    if worker.toy:
        args = replace(args, population=2, sequence_length=5)
    tasks = Tasks(load("random", size=size, device=worker.device), projected=args.projected)
    learner = vsml.make_learner("vsml", args, worker.run, (size * size, 10), "es")
    theta = learner.init(torch.Generator().manual_seed(0)).to(worker.device)
    args = replace(args, chunk=vsml.even_chunk(args, tasks))
    part, ids = replace(args, population=args.chunk), torch.arange(args.chunk, device=worker.device)
    work = partial(vsml.es_gradient, part, learner, theta, tasks, 0)
    worker.warm("vsml: one chunk", work)
    worker.hold()
    for _ in range(2):
        taken = once(work)
        extrapolated = taken * args.population / args.chunk
        what = f"vsml: {args.chunk} of {args.population} pairs x {args.sequence_length} examples, {size} x {size}"
        worker.note(what, seconds=taken, extrapolated=extrapolated)
    draws = ms(lambda: es.directions(args.population, theta.numel(), 0, 0, worker.device), 3)
    sampling = ms(lambda: tasks.sample(ids, ids, args.sequence_length), 3)
    worker.note("vsml: parts", directions_ms=draws, tasks_of_a_chunk_ms=sampling)
    for step in range(1 if worker.toy else 2):
        taken = once(lambda: vsml.es_gradient(args, learner, theta, tasks, step))  # noqa: B023 (called at once)
        what = f"vsml: an ES step, {args.population} pairs x {args.sequence_length} examples, {size} x {size}"
        worker.note(what, seconds=taken, aim=1.0)
    worker.kernels("vsml: one chunk", work)


def time_gpicl(worker: Worker, size: int, channels: int) -> None:
    """A meta-step at the thesis' shape and its parts."""
    import gpicl

    args = gpicl.Args(device=worker.device.type, size=size, channels=channels)
    if worker.toy:
        args = gpicl.Args(**gpicl.LAPTOP | dict(device="cpu", batch=4, sequence_length=12))
    if worker.run.compiles:
        compile_draws()
    what = f"gpicl: {args.batch} x {args.sequence_length}, {args.size} x {args.size} x {args.channels}"
    step = GPICLStep(args, worker.run)
    worker.warm(f"{what}, sampling", step.sample)
    worker.warm(f"{what}, learning", step.whole)
    worker.hold()
    free, synchronised = 1e3 * steady(step.whole, worker.few), ms(step.whole, worker.few)
    worker.note(f"{what}: a meta-step", ms=free, synchronised_ms=synchronised, aim_ms=10)
    data = step.sample()
    parts = {
        "sampling_ms": step.sample,
        "of_it_projections_ms": step.projections,
        "forward_backward_ms": lambda: step.forward_backward(*data),
        "optimiser_ms": step.optimise,
    }
    for name, work in parts.items():
        worker.note(f"{what}: {name[:-3]}", **{name: ms(work, worker.few)})
    bytes_of_projections = 4 * args.batch * step.tasks.num_inputs**2
    worker.note(f"{what}: counts", flops=float(step.flops), projections_gb=bytes_of_projections / 1e9)
    worker.kernels(f"{what}: a meta-step", step.whole)


def time_symla(worker: Worker, name: str) -> None:
    """An outer step, then the same without a learner (environment and sampling), and the in-context RNN's."""
    import symla
    from common import es

    args = symla.Args(**symla.PRESETS["thesis"] | {"envs": (name,), "preset": "thesis", "device": worker.device.type})
    args = symla.settled(args)
    if worker.toy:
        args = replace(args, population=4, evaluations=2, lifetime_steps=5)
    made, theta = {}, {}
    for learner in ("symla", "uniform", "rnn"):
        made[learner] = symla.player(args, learner, name, args.evaluations, worker.run, "train")
        theta[learner] = made[learner][0].init(torch.Generator().manual_seed(0)).to(worker.device)
        short = replace(args, lifetime_steps=3)
        worker.warm(f"symla on {name}, {learner}", partial(symla.es_gradient, short, *made[learner], theta[learner], 0))
    worker.hold()
    sizes = f"{args.population} x {args.evaluations} lifetimes of {args.lifetime_steps} steps"
    steps = args.population * args.evaluations * args.lifetime_steps
    for learner in made:
        taken = seconds(partial(symla.es_gradient, args, *made[learner], theta[learner], 0), 1 if worker.toy else 3)
        what = {"symla": "a step", "uniform": "environment and sampling", "rnn": "the in-context RNN's step"}[learner]
        worker.note(f"symla on {name}: {what}, {sizes}", ms=1e3 * taken, K_agent_steps_per_s=steps / taken / 1e3)
    draws = ms(lambda: es.directions(args.population // 2, theta["symla"].numel(), 0, 0, worker.device), 3)
    worker.note(f"symla on {name}: directions", ms=draws)
    if not worker.toy:
        worker.kernels(f"symla on {name}: a step", partial(symla.es_gradient, args, *made["symla"], theta["symla"], 0))


def time_metagenrl(worker: Worker) -> None:
    """An iteration of 20 agents in one environment, and its parts: eagerly first, since compiling takes long."""
    import metagenrl

    args = replace(metagenrl.Args(device=worker.device.type), env_steps=10_000, random_steps=0)
    if worker.toy:
        small = dict(population=2, hidden=8, objective_units=4, objective_filters=4, length=4, batch=4, env_steps=100)
        args = replace(args, **small)
    names, agents = ("point_mass",) if worker.toy else ("HalfCheetah-v4", "half_cheetah", "point_mass"), args.population
    for name in names:
        try:
            which = torch.zeros(agents, dtype=torch.int64)
            group = metagenrl.Group(args, name, which, args.env_steps, worker.device, lambda f: f)
            break
        except Exception as error:
            worker.note(f"metagenrl: no {name}", error=repr(error)[-500:])
    alpha = group.nets.init_objective(1, torch.default_generator).to(worker.device)
    adam, share = torch.optim.Adam([alpha], args.objective_lr), torch.tensor(1.0, device=worker.device)
    clock = iter(range(10**9))
    functions = ("act", "update_critics", "update_policies", "objective_gradient", "sample_from")

    def environment() -> int:
        now = next(clock)
        group.send()
        group.receive(now)
        return now + 1

    def learn(now: int) -> None:
        batch, own = group.sample(now), alpha[group.which]
        metagenrl.learn(args, group, metagenrl.follow_objective, own, batch, now, share)
        if now % args.delay == 0:
            g, _, _ = group.objective_gradient(own, group.state, batch)
            alpha.grad = g.mean(0, keepdim=True)
            adam.step()

    def both() -> None:
        """Two iterations, since policies and objective are updated every second time."""
        for _ in range(2):
            learn(environment())

    def parts(how: str) -> None:
        count = 4 if worker.toy else 20
        taken = steady(both, count) / 2
        worker.note(f"metagenrl: an iteration of {agents} agents in {name}, {how}", ms=1e3 * taken, aim_ms=8)
        worker.note(f"metagenrl: environment, {how}", ms=ms(environment, count))
        batch, own = group.sample(100), alpha[group.which]
        noise = torch.randn(agents, args.batch, args.length, group.env.action_size, device=worker.device)
        follow = metagenrl.follow_objective
        each = {
            "sampling": lambda: group.sample(100),
            "critics": lambda: group.update_critics(group.state, batch, noise),
            "policies": lambda: group.update_policies(follow, own, group.state, batch, share),
            "objective": lambda: group.objective_gradient(own, group.state, batch),
        }
        for what, work in each.items():
            worker.note(f"metagenrl: {what}, {how}", ms=ms(work, count))
        if not worker.toy:
            worker.kernels(f"metagenrl: two iterations, {how}", both)

    with torch.no_grad():
        for _ in range(3 * args.length):
            environment()
        worker.note(f"metagenrl: an iteration of {agents} agents, eager, beside others", ms=1e3 * steady(both, 3) / 2)
        eager = {f: getattr(group, f) for f in functions}
        batch, own = group.sample(100), alpha[group.which]
        noise = torch.randn(agents, args.batch, args.length, group.env.action_size, device=worker.device)
        if worker.run.compiles:
            for f in functions:
                setattr(group, f, torch.compile(eager[f], dynamic=False))
            worker.warm("metagenrl: critics", lambda: group.update_critics(group.state, batch, noise))
            worker.warm(
                "metagenrl: policies",
                lambda: group.update_policies(metagenrl.follow_objective, own, group.state, batch, share),
            )
            worker.warm("metagenrl: objective", lambda: group.objective_gradient(own, group.state, batch))
            worker.warm("metagenrl: two iterations", both)
        worker.hold()
        parts("compiled" if worker.run.compiles else "eager")
        if worker.run.compiles:
            for f in functions:
                setattr(group, f, eager[f])
            parts("eager")
    group.env.close()


def time_gla(worker: Worker) -> None:
    """A meta-step of one student and its parts, and steps of lifetimes with and without the cache."""
    import gla

    args = gla.Args(device=worker.device.type)
    if worker.toy:
        args = replace(args, chunk=4, chunks=3, width=16, layers=1, heads=2, batch=4, rollout=8)
    few = replace(args, agents=4, copies=1, updates=args.chunks, epochs=1, minibatches=1)
    for name in ("ant", "hidden_goal:8"):
        try:
            start = time.perf_counter()
            lives = gla.collect(few, name, worker.device, lambda updates: None).to(worker.device)
            env = gla.make_env(name, 1, worker.device)
            worker.note(f"gla: {few.updates} updates of {few.agents} agents in {name}", seconds=time.perf_counter() - start)
            break
        except Exception as error:
            worker.note(f"gla: no {name}", error=repr(error)[-500:])
    torch.manual_seed(0)
    model, own, number = gla.GLA(args).to(worker.device), torch.arange(args.batch, device=worker.device), iter(range(10**9))
    read = torch.compile(model, dynamic=False) if worker.run.compiles else model
    adam, discrete = torch.optim.AdamW(model.parameters(), args.lr), env.num_actions is not None

    def data() -> list:
        projection = gla.draw_projection(args, env, args.batch * next(number) + own)
        return [(projection, *gla.subsample(args, 1, lives, discrete, args.batch, own))]

    def forward_backward(tasks: list) -> None:
        gla.meta_loss(args, 1, read, tasks).mean().backward()

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        adam.step()

    def meta_step() -> None:
        adam.zero_grad()
        forward_backward(data())
        optimise()

    worker.warm("gla: a meta-step", meta_step)
    worker.hold()
    tokens = args.batch * args.chunks * args.chunk
    taken = steady(meta_step, worker.few)
    what = f"gla: a meta-step, {args.batch} x {tokens // args.batch} tokens"
    worker.note(what, ms=1e3 * taken, tokens_per_s=tokens / taken, aim_ms=8)
    tasks = data()
    each = {
        "projections": lambda: gla.draw_projection(args, env, args.batch * next(number) + own),
        "subsampling": lambda: gla.subsample(args, 1, lives, discrete, args.batch, own),
        "forward and backward": lambda: forward_backward(tasks),
        "optimiser": optimise,
    }
    for what, work in each.items():
        worker.note(f"gla: {what}", ms=ms(work, worker.few))
    worker.kernels("gla: a meta-step", meta_step)
    count, steps = 4 if worker.toy else 32, args.chunks * args.chunk
    inputs = torch.randn(count, steps, model.embed.in_features, device=worker.device)
    with torch.no_grad():
        _, _, cache = model(inputs[:, :-1])
        cached, whole = ms(lambda: model(inputs[:, -1:], cache), worker.few), ms(lambda: model(inputs), 3)
    what = f"gla: the last of {steps} steps of {count} lifetimes"
    worker.note(what, with_cache_ms=cached, without_ms=whole, steps_per_s=1e3 * count / cached)


def time_fme(worker: Worker) -> None:
    """An execution of 64 populations on the bandit, one network each."""
    import fme

    count = 4 if worker.toy else 64
    args = fme.Args(device=worker.device.type, populations=count, num_parallel=1, executions=1, roots=1, chunk=count)
    args = fme.with_tuned(args, "bandit")
    if worker.toy:
        args = replace(args, execution_steps=20)
    with torch.no_grad():
        population = fme.Population(args, "bandit", "fme", worker.run)
        work = partial(population.execute, population.roots, 0)
        worker.warm("fme: an execution", work)
        worker.hold()
        taken = seconds(work, 1 if worker.toy else 3)
        what = f"fme: an execution of {args.execution_steps} steps, {count} populations on the bandit"
        steps = count * args.execution_steps / taken / 1e3
        worker.note(what, seconds=taken, us_per_step=1e6 * taken / args.execution_steps, K_steps_per_s=steps)
        draws = population.draws((args.execution_steps + 1, 1, 1 + population.env.num_draws), 0).shape
        worker.note("fme: draws", ms=ms(lambda: population.draws(draws[1:], 0), 3))
        if not worker.toy:
            worker.kernels("fme: an execution", work)


def pack(worker: Worker) -> None:
    """A checkpoint of GPICL in two files of less than 16 MB, without what can be made again: the learner, and Adam's averages
    in bfloat16."""
    folder, out = worker.options.folder, worker.options.out
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    models, averages = saved["state"]["models"], {}
    saved["state"]["models"] = {name: x for name, x in models.items() if name not in ("sgd", "adam", "untrained")}
    for name, optimizer in saved["state"]["optimizers"].items():
        for number, state in optimizer["state"].items():
            for kind in ("exp_avg", "exp_avg_sq"):
                averages[f"{name} {number} {kind}"] = state.pop(kind).bfloat16()
    torch.save(saved, out / "gpicl_checkpoint.pt")
    torch.save(averages, out / "gpicl_averages.pt")
    sizes = {name: (out / f"gpicl_{name}.pt").stat().st_size / 2**20 for name in ("checkpoint", "averages")}
    worker.log(4, "checkpoint kept", meta_steps=saved["step"], **{f"{name}_mb": size for name, size in sizes.items()})


def unpack(worker: Worker) -> None:
    """The opposite of pack, into a run's folder."""
    import gpicl

    folder, kept = worker.options.folder, worker.options.resume
    saved = torch.load(kept / "gpicl_checkpoint.pt", map_location="cpu", weights_only=True)
    for name, value in torch.load(kept / "gpicl_averages.pt", map_location="cpu", weights_only=True).items():
        learner, number, kind = name.split()
        saved["state"]["optimizers"][learner]["state"][int(number)][kind] = value.float()
    free = dict(resume=None, checkpoint=None)
    args, state = gpicl.saved_args(kept / "gpicl_checkpoint.pt", **free), saved["state"]
    inputs, classes = state["sizes"].tolist()
    for name in [args.learner, *args.baselines]:
        if name not in state["models"]:
            learner = gpicl.make_learner(name, args, inputs, classes, state["settings"].get(name))
            state["models"][name] = learner.state_dict()
    folder.mkdir(parents=True)
    torch.save(saved, folder / "checkpoint.pt")
    if (kept / "gpicl_metrics.csv").exists():
        shutil.copy(kept / "gpicl_metrics.csv", folder / "metrics.csv")
    worker.log(4, "goes on", meta_steps=saved["step"])


SPEED = {  # in the order of what matters, but what compiles longest comes first
    "metagenrl": time_metagenrl,
    "gpicl-32": partial(time_gpicl, size=32, channels=3),
    "vsml": time_vsml,
    "symla-bandit": partial(time_symla, name="independent_bandit"),
    "gla": time_gla,
    "symla-cartpole": partial(time_symla, name="cartpole"),
    "fme": time_fme,
    "gpicl-14": partial(time_gpicl, size=14, channels=1),
}
WORKERS = {"card": time_card, "pack": pack, "unpack": unpack, **SPEED}


# ======================================================================================================================
# gpu, the processes
# ======================================================================================================================
class Job:
    """A process, its group, and what it prints."""

    def __init__(self, name: str, command: list[Any], folder: Path, **env: str):
        self.name, self.started, self.ended, self.late = name, time.time(), None, False
        self.log = folder / f"{name.replace(' ', '-')}.log"
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "5"} | env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def over(self) -> bool:
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.time()
        return self.ended is not None

    def seconds(self) -> float:
        return (self.ended or time.time()) - self.started

    def signal(self, number: int) -> None:
        if not self.over():
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                pass

    def kill(self) -> None:
        """End the process and all that it has started."""
        self.signal(signal.SIGKILL)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            pass

    def wait(self, until: float) -> None:
        """Until it ends, or is ended at that time."""
        wait([self], until)

    def text(self, size: int = 3000) -> str:
        """The end of what it printed."""
        printed = self.log.read_bytes()[-4 * size :].decode(errors="replace")
        lines = [line.rsplit("\r", 1)[-1] for line in printed.splitlines()]
        return "\n".join(lines)[-size:]


def wait(jobs: list[Job], until: float) -> None:
    """Until all have ended; those that have not are ended at that time."""
    while sum(job.over() for job in jobs) < len(jobs) and time.time() < until:
        time.sleep(0.05)
    for job in jobs:
        if not job.over():
            job.late = True
            job.kill()
            job.over()


class Gpu:
    """All steps within the minutes that there are."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.began = options, time.time()
        self.end = self.began + 60 * options.minutes - 3
        self.steps, self.toy = options.steps, not torch.cuda.is_available()
        self.out = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="gpu-"))
        self.signals = self.work / "signals"
        self.signals.mkdir()
        self.log = Log(self.out, self.card())
        self.jobs, self.background = [], []

    def card(self) -> str:
        if self.toy:
            return "CPU"
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            name, driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].split(", ")
            return f"{name}, driver {driver}"
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return "a GPU"

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.began:6.1f} s] {text}", flush=True)

    def left(self) -> float:
        """Seconds that a step may take: what is left, without what GPICL's meta-test needs."""
        reserve = self.options.test_seconds if 4 in self.steps else 0
        return self.end - reserve - time.time()

    def start(self, name: str, command: list[Any], **env: str) -> Job:
        job = Job(name, command, self.work, **env)
        self.jobs.append(job)
        return job

    def worker(self, name: str, *flags: Any, **env: str) -> Job:
        words = [sys.executable, Path(__file__).resolve(), "worker", name, "--out", self.out, "--signals", self.signals]
        return self.start(name, [*words, *["--toy"] * self.toy, *flags], **env)

    def report(self, step: int, job: Job, quiet: bool = False, **figures: Any) -> bool:
        """Note how a process ended. Returns whether it did what it should."""
        code, taken = job.process.returncode, job.seconds()
        good = code == 0 and not job.late
        with open(self.out / "logs.txt", "a") as file:
            file.write(f"\n==== {step} {job.name}: exit code {code}, {taken:.1f} s{', ended at its deadline' * job.late}\n")
            file.write(job.text(2000 if good else 12_000) + "\n")
        if not good:
            figures |= {"error": job.text()}
        if not good or not quiet:
            late = {"late": True} if job.late else {}
            self.log(step, job.name, exit_code=code, seconds=taken, **late, **figures)
        self.say(f"{step} {job.name}: " + ("done" if good else "late" if job.late else "FAILED") + f" after {taken:.1f} s")
        return good

    @contextmanager
    def pause(self, jobs: list[Job]) -> Iterator[None]:
        """Others stand still."""
        for job in jobs:
            job.signal(signal.SIGSTOP)
        time.sleep(0.3)  # until the GPU has done what they sent
        try:
            yield
        finally:
            for job in jobs:
                job.signal(signal.SIGCONT)

    def __call__(self) -> None:
        self.say(f"{self.log.card}, torch {torch.__version__}, {self.options.minutes} minutes, steps {self.steps}")
        steps = {1: self.ceilings, 2: self.scripts, 3: self.speed, 4: self.meta_train, 5: self.more}
        try:
            for number, step in steps.items():
                if number == 2 and 4 in self.steps:
                    self.guarded(4, self.start_training)
                if number in self.steps:
                    self.guarded(number, step)
        finally:
            for job in self.jobs:
                job.kill()
            shutil.rmtree(self.work, ignore_errors=True)
        self.table()

    def guarded(self, number: int, step: Callable[[], None]) -> None:
        """A step that breaks costs only itself."""
        if (self.end - time.time() if number == 4 else self.left()) < 1:
            self.say(f"{number}: no time is left")
            return
        self.say(f"{number} begins, {self.left():.0f} s are left")
        try:
            step()
        except Exception:
            self.log(number, "broken", error=traceback.format_exc()[-3000:])

    # ------------------------------------------------------------------------------------------------------------------
    def ceilings(self) -> None:
        job = self.worker("card")
        job.wait(time.time() + min(60, self.left()))
        self.report(1, job, quiet=True)

    def scripts(self) -> None:
        """Every script whole: on the CPU, on the GPU, and on the GPU compiled; all at the same time."""
        sys.path.insert(0, str(ROOT / "tests"))
        until, jobs = time.time() + min(110, self.left()), {}
        threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        device = "cpu" if self.toy else "cuda"
        for name in self.options.only:
            try:
                tiny = importlib.import_module(f"test_{name}").TINY.replace("--no-compile", "").split()
            except Exception:
                self.log(2, f"{name}: its tests cannot be read", error=traceback.format_exc()[-3000:])
                continue
            fewer = FEWER_TO_COMPILE.get(name, "").split()
            variants = {"cpu": ["--device", "cpu", "--no-compile"], device + " eager": ["--device", device, "--no-compile"]}
            if not self.toy:
                variants["cuda compiled"] = [*fewer, "--device", "cuda", "--compile"]
                if fewer:
                    variants["cuda eager, fewer"] = [*fewer, "--device", "cuda", "--no-compile"]
            for variant, flags in variants.items():
                title = f"{name} {variant}".replace(",", "")
                command = [sys.executable, ROOT / f"{name}.py", *tiny, *flags, "--run-dir", self.work / "tiny"]
                jobs[name, variant] = self.start(title, [*command, "--run-name", title.replace(" ", "-")], **threads)
        wait(list(jobs.values()), until)
        for (name, variant), job in jobs.items():
            compared = {"cpu": None, f"{device} eager": "cpu", "cuda eager, fewer": None}
            compared["cuda compiled"] = f"{device} eager" + ", fewer" * (name in FEWER_TO_COMPILE)
            other = jobs.get((name, compared[variant]))
            self.report(2, job, **(self.difference(job, other) if other else {}))

    def difference(self, job: Job, other: Job) -> dict[str, Any]:
        """How far the rows of two runs are apart, relative to the larger of 1 and the mean."""
        try:
            ours, theirs = (self.rows(self.work / "tiny" / x.name.replace(" ", "-")) for x in (job, other))
        except (OSError, ValueError):
            return {}
        shared = [row for row in ours if row in theirs]
        apart = [abs(ours[row] - theirs[row]) / max(1, abs(theirs[row])) for row in shared]
        apart = [x if x == x else 1e9 for x in apart]  # not a number
        differ = sum(x > 1e-3 for x in apart)
        return {"against": other.name, "rows": len(apart), "differ": differ, "largest": max(apart, default=0.0)}

    def rows(self, folder: Path) -> dict[tuple, float]:
        rows = json.loads((folder / "results.json").read_text())["results"]
        return {tuple(str(row[x]) for x in ("learner", "task", "novelty", "metric", "step")): row["mean"] for row in rows}

    def speed(self) -> None:
        """All workers compile at the same time; then each has the GPU to itself, and the others stand still."""
        began = time.time()
        until = began + min(200, self.left())
        names = [name for name in SPEED if name.split("-")[0] in self.options.only]
        threads = {"OMP_NUM_THREADS": "4", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        waiting = {name: self.worker(name, **threads) for name in names}
        while waiting and time.time() < until:
            ready = [name for name in waiting if (self.signals / f"{name}.ready").exists()]
            for name in [name for name, job in waiting.items() if job.over()]:
                self.report(3, waiting.pop(name))
                ready = [x for x in ready if x != name]
            if ready and (len(ready) == len(waiting) or time.time() > min(began + 75, until - 15 * len(ready))):
                others = [job for name, job in waiting.items() if name not in ready]
                with self.pause(others + self.background):
                    for name in ready:
                        job = waiting.pop(name)
                        (self.signals / f"{name}.go").touch()
                        start = time.time()
                        job.wait(min(start + 40, max(until, start + 5)))
                        self.report(3, job, measuring=time.time() - start)
            time.sleep(0.1)
        for job in waiting.values():
            job.wait(0)
            self.report(3, job)

    # ------------------------------------------------------------------------------------------------------------------
    def images(self) -> tuple[Path, list[str]]:
        """torchvision's files from those that travelled, and which datasets there are."""
        import numpy as np

        folder, there = self.work / "data", []
        for name, within in (("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")):
            path = self.options.data / f"{name}.npz" if self.options.data else None
            if path is None or not path.exists():
                continue
            raw = folder / within / "raw"
            raw.mkdir(parents=True)
            with np.load(path) as arrays:
                for split, prefix in (("train", "train"), ("test", "t10k")):
                    for kind, ending in (("x", "images-idx3-ubyte"), ("y", "labels-idx1-ubyte")):
                        array = arrays[f"{kind}_{split}"].astype(np.uint8)
                        head = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
                        (raw / f"{prefix}-{ending}").write_bytes(head + array.tobytes())
            there.append(name)
        return folder, there

    def start_training(self) -> None:
        """GPICL in the background, which is ended when time is; its checkpoints are whole whenever that is."""
        data, there = self.images()
        self.run_folder = self.work / "runs" / "gpicl"
        self.data = ["--data-dir", data] if there else []
        self.tests = [*there, "digits", "random", "sum_sign"]
        command = [sys.executable, ROOT / "gpicl.py"]
        if self.options.resume:
            job = self.worker("unpack", "--folder", self.run_folder, "--resume", self.options.resume.resolve())
            job.wait(time.time() + min(60, self.left()))
            if not self.report(4, job, quiet=True):
                return
            flags = ["--resume", self.run_folder]
        else:
            flags = ["--preset", "laptop" if self.toy else "thesis", "--dataset", there[0] if there else "digits"]
            flags += ["--test-datasets", *self.tests, "--run-dir", self.run_folder.parent, "--run-name", "gpicl"]
            flags += ["--checkpoint-every", 5 if self.toy else 250]
            flags += TOY_GPICL.split() if self.toy else []
        flags += ["--device", "cpu" if self.toy else "cuda", *self.data, *["--no-compile"] * self.toy]
        job = self.start("gpicl training", [*command, *flags], OMP_NUM_THREADS="1" if self.toy else "4")
        self.background.append(job)

    def meta_train(self) -> None:
        """As long as there is time, then the meta-test of what was learned."""
        if not self.background:
            return
        job = self.background.pop()
        checkpoint, metrics = (self.run_folder / name for name in ("checkpoint.pt", "metrics.csv"))
        until = time.time() + (self.left() / 2 if 5 in self.steps else self.left())
        while not job.over() and time.time() < until and not (self.toy and checkpoint.exists()):
            time.sleep(0.2)
        ended = not job.over()
        job.kill()
        if not ended:
            self.report(4, job)
        self.say(f"4 gpicl training: {'ended' if ended else 'over'}, {job.text(300).strip().splitlines()[-1:]}")
        with open(self.out / "logs.txt", "a") as file:
            file.write(f"\n==== 4 {job.name}\n{job.text(4000)}\n")
        if metrics.exists():
            shutil.copy(metrics, self.out / "gpicl_metrics.csv")
            lines = [line.split(",") for line in metrics.read_text().splitlines()]
            last = {name: float(value) for name, value in zip(lines[0], lines[-1], strict=True)}
            self.log(4, "gpicl training", seconds=job.seconds(), **{f"last_{name}": x for name, x in last.items()})
        if not checkpoint.exists():
            self.log(4, "gpicl training: no checkpoint", error=job.text())
            return
        packing = self.worker("pack", "--folder", self.run_folder)
        results = self.run_folder / "results.json"
        if not results.exists():
            flags = ["--mode", "test", "--checkpoint", checkpoint, "--run-dir", self.run_folder.parent, "--run-name", "test"]
            flags += ["--device", "cpu" if self.toy else "cuda", *self.data, "--test-datasets", *self.tests]
            testing = self.start("gpicl test", [sys.executable, ROOT / "gpicl.py", *flags, *["--no-compile"] * self.toy])
            testing.wait(self.end - 4 if 5 not in self.steps else min(self.end - 4, time.time() + 60))
            self.report(4, testing)
            results = self.run_folder.parent / "test" / "results.json"
        packing.wait(max(self.end - 2, time.time() + 1))
        self.report(4, packing, quiet=True)
        if results.exists():
            shutil.copy(results, self.out / "gpicl_results.json")
            self.accuracies(json.loads(results.read_text())["results"])

    def accuracies(self, rows: list[dict[str, Any]]) -> None:
        """A line for each test set and learner: accuracy after some examples."""
        found = {}
        for row in rows:
            if row["metric"] in ("accuracy", "cumulative_accuracy") and row["step"] in (1, 10, 20, 50, 100):
                short = {"accuracy": "after", "cumulative_accuracy": "mean_of"}[row["metric"]]
                if short == "after" or row["step"] == 100:
                    key = f"gpicl on {row['task']} ({row['novelty']}), {row['learner']}"
                    found.setdefault(key, {})[f"{short}_{row['step']}"] = row["mean"]
        for what, figures in found.items():
            self.log(4, what, **figures)

    def more(self) -> None:
        """SymLA's bandits at the thesis' preset, then VSML's ES, each for half of what is left."""
        for name, env, last in (("symla", ["--envs", "independent_bandit", "--checkpoint-every", 25], 45), ("vsml", [], 5)):
            if name not in self.options.only:
                continue
            until = time.time() + max(5, (self.end - time.time()) / (2 if name == "symla" else 1) - last)
            folder = self.work / "runs" / name
            flags = ["--preset", "thesis", *env, "--run-dir", folder.parent, "--run-name", name]
            flags += ["--checkpoint-every", 2] if name == "vsml" else []
            flags += {"symla": TOY_SYMLA, "vsml": TOY_VSML}[name].split() if self.toy else ["--device", "cuda"]
            job = self.start(f"{name} training", [sys.executable, ROOT / f"{name}.py", *flags])
            while not job.over() and time.time() < until and not (self.toy and (folder / "checkpoint.pt").exists()):
                time.sleep(0.2)
            if job.over():
                self.report(5, job)
            job.kill()
            if (folder / "metrics.csv").exists():
                shutil.copy(folder / "metrics.csv", self.out / f"{name}_metrics.csv")
                lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
                self.log(5, f"{name} training", **{f"last_{k}": float(v) for k, v in zip(lines[0], lines[-1], strict=True)})
            if name == "symla" and (folder / "checkpoint.pt").exists():
                flags = ["--mode", "test", "--checkpoint", folder / "checkpoint.pt"]
                flags += ["--run-dir", folder.parent, "--run-name", "tested"]
                flags += ["--device", "cpu", "--no-compile"] if self.toy else ["--device", "cuda"]
                testing = self.start("symla test", [sys.executable, ROOT / "symla.py", *flags])
                testing.wait(min(time.time() + 60, self.end - 4))
                if self.report(5, testing):
                    shutil.copy(folder.parent / "tested" / "results.json", self.out / "symla_results.json")

    # ------------------------------------------------------------------------------------------------------------------
    def table(self) -> None:
        """What is in gpu.jsonl, to be read."""
        print(f"\n{self.log.card}, torch {torch.__version__}, {time.time() - self.began:.0f} s")
        for line in self.log.path.read_text().splitlines():
            line = json.loads(line)
            figures = {name: x for name, x in line.items() if name not in ("card", "torch", "step", "what", "top", "error")}
            text = "  ".join(f"{name}={x}" for name, x in figures.items())
            error = line.get("error", "").strip().splitlines()[-1:]
            print(f"{line['step']}  {line['what']:<60} {text}" + "".join(f"  ! {x[-300:]}" for x in error), flush=True)


# What is left out where a script is compiled at tiny sizes, since compiling is all that takes time there.
FEWER_TO_COMPILE = {
    "fme": "--envs bandit --baselines hill_climbing",
    "metagenrl": "--envs point_mass --test-envs point_mass --population 2 --env-steps 48 --test-steps 20 --evaluations 1"
    " --baselines untrained",
}
TOY_GPICL = "--batch 4 --sequence-length 12 --width 16 --heads 2 --key-size 4 --test-seeds 6 --test-tasks 3 --log-every 1"
TOY_SYMLA = "--device cpu --no-compile --population 4 --evaluations 2 --lifetime-steps 5 --hidden 4 --rnn-size 4 --test-seeds 4"
TOY_VSML = "--device cpu --no-compile --population 2 --sequence-length 4"


def bench_gpu(options: argparse.Namespace) -> None:
    Gpu(options)()


def work(options: argparse.Namespace) -> None:
    WORKERS[options.name](Worker(options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    scripts = parser.add_subparsers(dest="script", required=True)
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--compile", choices=["on", "off"], default="on")
    flags.add_argument("--compile-updates", action="store_true", help="MetaGenRL's on a CPU too, which takes minutes")
    flags.add_argument("--setting", choices=["small", "thesis"], default="small")
    flags.add_argument("--pairs", type=int, default=1024, help="pairs of ES in the thesis setting")
    flags.add_argument("--chunk", type=int, default=None, help="pairs of ES, or solutions of FME, at a time")
    flags.add_argument("--steps", type=int, default=None, help="environment steps of SymLA's lifetimes, at most")
    for name in SCRIPTS:
        scripts.add_parser(name, parents=[flags])
    gpu = scripts.add_parser("gpu")
    gpu.add_argument("--minutes", type=float, default=9.0, help="all steps end within these")
    gpu.add_argument("--out", type=Path, required=True, help="folder for what is measured")
    gpu.add_argument("--data", type=Path, help="folder with mnist.npz and fashion_mnist.npz (x_train y_train x_test y_test)")
    gpu.add_argument("--steps", type=int, nargs="+", choices=range(1, 6), default=[1, 2, 3, 4])
    gpu.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="scripts of steps 2, 3 and 5")
    gpu.add_argument("--resume", type=Path, help="an earlier --out, whose GPICL goes on learning")
    gpu.add_argument("--test-seconds", type=float, default=55, help="kept for GPICL's meta-test")
    worker = scripts.add_parser("worker", help="one process of gpu")
    worker.add_argument("name", choices=WORKERS)
    for flag in ("--out", "--signals", "--folder", "--resume"):
        worker.add_argument(flag, type=Path)
    worker.add_argument("--toy", action="store_true")
    return parser.parse_args()


SCRIPTS = {
    "vsml": bench_vsml,
    "gpicl": bench_gpicl,
    "fme": bench_fme,
    "symla": bench_symla,
    "metagenrl": bench_metagenrl,
    "gla": bench_gla,
}

if __name__ == "__main__":
    options = parse()
    if options.script in SCRIPTS:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, compile {options.compile}")
    (SCRIPTS | {"gpu": bench_gpu, "worker": work})[options.script](options)
