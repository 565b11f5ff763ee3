"""How fast the scripts are: `python tests/benchmark.py vsml`. A benchmark, not a test.

    python tests/benchmark.py vsml                     # or gpicl, fme, symla, metagenrl, gla
    python tests/benchmark.py vsml --setting thesis    # at the thesis' sizes, not a laptop's
    python tests/benchmark.py vsml --compile off       # what torch.compile gains
    python tests/benchmark.py envs                     # beside gymnasium, and envpool if installed
    python tests/benchmark.py gpu --out FOLDER         # all that is worth measuring on a GPU

A line says what was measured, its figures, and the most memory that the process needed so far.
Times are medians of several calls, after one that compiles.

`gpu` adds each line as JSON to FOLDER/gpu.jsonl, as soon as it is measured:
    1. the card: a large copy, large matrix products;
    2. every script whole at tiny sizes, on the CPU, on the GPU, and on the GPU compiled, and how
       far their results are apart;
    3. a step of each script at the thesis' sizes, compiled, and the time that this took;
    4. GPICL at the thesis' preset on --data, which trains while 2 and 3 leave the GPU to it, then
       its meta-test;
    5. SymLA's bandits and VSML at the thesis' preset (only if asked for).
Each is a process of its own with a deadline. Without a GPU it does the same at toy sizes.
"""

import argparse
import importlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import checkpoints, envs, machine
from common.datasets import Tasks, load
from common.ppo import PPOAgents
from common.rng import compile_draws

ROOT = Path(__file__).resolve().parents[1]


# ==================================================================================================
# Time
# ==================================================================================================
def once(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median(work: Callable[[], object], repetitions: int) -> float:
    """Median seconds of one call, after one that compiles."""
    once(work)
    return statistics.median(once(work) for _ in range(repetitions))


def steady(work: Callable[[], object], repetitions: int) -> float:
    """Mean seconds of a call of many, between which nothing waits for the GPU."""
    once(work)
    return once(lambda: [work() for _ in range(repetitions)]) / repetitions


def log(folder: Path | None, step: int, what: str, **figures: Any) -> None:
    """A line of what was measured, printed and, if there is a folder, added to gpu.jsonl."""
    figures = {k: float(f"{x:.5g}") if isinstance(x, float) else x for k, x in figures.items()}
    if folder:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        line = {"card": card, "torch": torch.__version__, "step": step, "what": what} | figures
        with open(folder / "gpu.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    print(f"{what:<64} " + "  ".join(f"{k}={x}" for k, x in figures.items()), flush=True)


class Bench:
    """A process that measures one script.

    setting: the sizes of things, small (a laptop's), thesis or toy. run: what the scripts ask of
    their Run. In a process of `gpu`, `ready` waits until the GPU is this process' own.
    """

    def __init__(self, options: argparse.Namespace):
        machine.keep_memory()
        torch.backends.cuda.matmul.allow_tf32 = True  # as the scripts have it
        self.options = options
        self.thesis = options.setting == "thesis"
        self.toy = TOY.get(options.script, {}) if options.setting == "toy" else {}
        self.cuda = torch.cuda.is_available()
        self.repetitions = 1 if self.toy else 2 if self.thesis and not self.cuda else 5
        self.device = torch.device("cuda" if self.cuda else "cpu")
        compiles = options.compile == "on"
        self.run = argparse.Namespace(compiles=compiles, device=self.device, rank=0, world=1)
        self.log = partial(log, options.out)

    def args(self, script: Any, **flags: Any) -> Any:
        """A script's Args at this process' sizes."""
        preset = {} if self.thesis else script.LAPTOP
        return script.Args(**preset | {"device": self.device.type} | flags | self.toy)

    def note(self, what: str, **figures: Any) -> None:
        self.log(3, what, **figures, peak_mb=machine.facts(self.device)["peak_memory_mb"])

    def ms(self, what: str, work: Callable[[], object], repetitions: int | None = None) -> None:
        self.note(what, ms=1e3 * median(work, repetitions or self.repetitions))

    def warm(self, what: str, work: Callable[[], object]) -> None:
        """The first call, which compiles."""
        self.note(f"{what}: first call", seconds=once(work))

    def ready(self) -> None:
        """All is compiled: wait until no other process uses the GPU."""
        if not self.options.signals:
            return
        name = f"{self.options.script}-{self.options.case}"
        self.note(f"{name} ready")
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        (self.options.signals / f"{name}.ready").touch()
        if not sys.stdin.readline():  # Job.go
            sys.exit("the benchmark is gone")

    def kernels(self, what: str, work: Callable[[], object]) -> None:
        """What the GPU did in one call: how many kernels, how long all of them took, and which took
        longest."""
        if not self.cuda or not self.thesis:
            return
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            wall = once(work)
        events = [x for x in profiled.key_averages() if x.self_device_time_total > 0]
        events.sort(key=lambda x: -x.self_device_time_total)
        top = [[x.key[:70], x.count, round(x.self_device_time_total / 1e3, 3)] for x in events]
        figures = {"count": sum(x[1] for x in top), "busy_ms": sum(x[2] for x in top)}
        self.note(f"{what}: kernels", **figures, wall_ms=1e3 * wall, top=top[:12])


# ==================================================================================================
# What is measured of each script, a case at a time
# ==================================================================================================
def measure_card(bench: Bench) -> None:
    """A large copy and large matrix products."""
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    driver = subprocess.getoutput(query) if bench.cuda else ""
    bench.log(1, "machine", driver=driver, cores=os.cpu_count(), python=sys.version.split()[0])
    source = torch.randn(2**30 if bench.cuda else 2**20, device=bench.device)
    target = torch.empty_like(source)
    seconds = median(lambda: target.copy_(source), 10)
    bench.log(1, "copy", TB_per_s=2 * source.nbytes / seconds / 1e12)
    for dtype in (torch.float32, torch.bfloat16):
        bench.log(1, f"{dtype} product", TFLOP_per_s=product_flops(bench, dtype) / 1e12)


def product_flops(bench: Bench, dtype: torch.dtype = torch.float32) -> float:
    """FLOPs per second of one large matrix product; of float32 on a GPU as TF32."""
    side = 8192 if bench.cuda else 1024
    square = torch.randn(side, side, device=bench.device).to(dtype)
    return 2 * side**3 / median(lambda: square @ square, 10)


def measure_vsml(bench: Bench, size: int, pairs: int, examples: int) -> None:
    """A step of ES; at the thesis' size first a chunk of it, as many pairs as are evaluated at once,
    which is all that a CPU has to do. On a GPU also by the Triton kernels."""
    import vsml

    args = bench.args(vsml, population=pairs, sequence_length=examples, meta_optimizer="es")
    tasks = [Tasks(load("random", size=size, device=bench.device))]
    what = f"{args.population} pairs x {args.sequence_length} examples, {size} x {size}"
    scores = {}
    for triton in (False, True) if bench.cuda else (False,):
        args = replace(args, triton=triton)
        learner = vsml.make_learner("vsml", args, bench.run, (size * size, 10), "train")
        theta = learner.init(torch.Generator().manual_seed(0)).to(bench.device)
        chunk = vsml.chunk_size(args, tasks)
        step = partial(vsml.es_gradient, learner=learner, theta=theta, datasets=tasks, step=0)
        one_chunk = partial(step, replace(args, population=chunk))
        name = "vsml, Triton" if triton else "vsml"

        bench.warm(f"{name}: one chunk", one_chunk)
        scores[name] = one_chunk()
        if not triton:
            bench.ready()
        if bench.thesis:
            seconds = median(one_chunk, 2)
            whole = seconds * pairs / chunk
            bench.note(f"{name}: {chunk} of {what}", seconds=seconds, extrapolated=whole)
        if bench.cuda or not bench.thesis:
            seconds = median(partial(step, args), 2 if bench.thesis else bench.repetitions)
            each = 1e6 * seconds / (2 * args.population * args.sequence_length)
            bench.note(f"{name}: an ES step, {what}", seconds=seconds, us_per_example=each)
        bench.kernels(f"{name}: one chunk", one_chunk)
    if bench.cuda:
        (grad, loss, _), (fast, fast_loss, _) = scores.values()
        likeness = F.cosine_similarity(grad, fast, dim=0).item()
        difference = (loss - fast_loss).abs().item()
        bench.note("vsml: Triton against readable", cosine=likeness, loss_difference=difference)
        args = replace(args, triton=False, meta_optimizer="backprop", sequences=128)
        learner = vsml.make_learner("vsml", args, bench.run, (size * size, 10), "train")
        step = partial(vsml.backprop_gradient, args, learner, theta, tasks, 0, [{}])
        torch.cuda.reset_peak_memory_stats()
        what = f"vsml: backpropagation, 128 x {args.sequence_length} examples, {size} x {size}"
        bench.warm(what, step)
        bench.note(what, seconds=once(step))
    if not bench.thesis:
        measure_vsml_learners(bench, replace(args, triton=False), tasks)


def measure_vsml_learners(bench: Bench, args: Any, tasks: list[Tasks]) -> None:
    """A step of backpropagation, the meta-test of every learner, and batches of the cloned network,
    in microseconds per example and rollout."""
    import vsml

    (one,) = tasks
    sizes = one.num_inputs, 10
    small = one.num_inputs == 64

    def make(name: str, args: Any, use: str = "test") -> tuple[Any, Tensor]:
        learner = vsml.make_learner(name, args, bench.run, sizes, use)
        return learner, learner.init(torch.Generator().manual_seed(0)).to(bench.device)

    def note(what: str, work: Callable[[], object], rollouts: int, examples: int) -> None:
        seconds = median(work, bench.repetitions)
        what = f"vsml: {what}, {rollouts} rollouts x {examples} examples, {sizes[0]} inputs"
        bench.note(what, seconds=seconds, us_per_example=1e6 * seconds / (rollouts * examples))

    length, sequences = (60, 16) if small else (20, 4)
    length = min(length, args.sequence_length)
    short = replace(args, sequence_length=length, sequences=sequences, meta_optimizer="backprop")
    learner, theta = make("vsml", short, "train")
    step = partial(vsml.backprop_gradient, short, learner, theta, tasks, 0, [{}])
    note("a step of backpropagation", step, sequences, length)
    readable = vsml.VSML(short)
    if bench.run.compiles:
        compiled = partial(vsml.one_example, readable)
        readable.step = torch.compile(compiled, dynamic=False)
    step = partial(vsml.backprop_gradient, short, readable, theta, tasks, 0, [{}])
    note("the same with lstm_cell", step, sequences, length)

    layers = {"vsml": args, "vsml, 32 hidden": replace(args, hidden=(32,), backward_pass=True)}
    layers["vsml, conv"] = replace(args, conv=(8,), backward_pass=True)
    layers |= dict.fromkeys(("rnn", "hebbian", "fwmemory", "sgd", "adam", "sgd2", "adam2"), args)
    steps = min(args.sequence_length, 250 if small else 100)
    for what, own in layers.items():
        name = what.split(",")[0]
        learner, theta = make(name, own)
        count = vsml.batch_size(own, one, name)
        own = replace(own, test_seeds=count, test_steps=steps)
        with torch.no_grad():
            work = partial(vsml.curve, own, learner, theta, one, count)
            note(f"meta-test of {what}", work, count, steps)

    args = replace(vsml.Args(**vsml.CLONE), device=bench.device.type)
    x, y = one.sample(*torch.zeros(2, 1, dtype=torch.int64, device=bench.device), 64)
    keys = one.keys(torch.arange(64, device=bench.device), 3)[None]
    for name in ("clone", "backprop"):
        learner, theta = make(name, args)
        state = learner.initial_state(keys, *sizes)
        params = learner.params(theta[None])
        with torch.no_grad():
            note(f"a batch, {name}", partial(vsml.one_example, learner, params, state, x, y), 1, 64)


def measure_meta_step(
    bench: Bench,
    forms: dict[str, tuple[Callable[[], list[Any]], Callable[..., Tensor]]],
    optimise: Callable[[], None],
    flops: int,
) -> None:
    """A meta-step and its parts, for each form of sampling and loss. Utilisation: FLOPs of the
    Transformer's matrix products, forward and backward, against those of one large product."""

    def forward_backward(loss: Callable[..., Tensor], batch: Any) -> None:
        loss(*batch).backward()

    def meta_step(sample: Callable[[], list[Any]], loss: Callable[..., Tensor]) -> None:
        forward_backward(loss, sample())
        optimise()

    for what, form in forms.items():
        bench.warm(f"{what}, sampling", form[0])
        bench.warm(f"{what}, learning", partial(meta_step, *form))
    bench.ready()
    count = 4 * bench.repetitions if bench.cuda or not bench.thesis else bench.repetitions
    for what, (sample, loss) in forms.items():
        step = partial(meta_step, sample, loss)
        seconds = steady(step, count)
        synchronised = 1e3 * median(step, count)
        bench.note(f"{what}: a meta-step", ms=1e3 * seconds, synchronised_ms=synchronised)
        bench.ms(f"{what}: sampling", sample, count)
        bench.ms(f"{what}: forward and backward", partial(forward_backward, loss, sample()), count)
        bench.ms(f"{what}: optimiser", optimise, count)
        share = flops / seconds / product_flops(bench)
        bench.note(f"{what}: counts", flops=float(flops), utilisation=share)
        bench.kernels(f"{what}: a meta-step", step)


def measure_gpicl(bench: Bench, size: int, channels: int) -> None:
    """A meta-step of the Transformer. The dataset is digits, scaled; time depends on its size."""
    import gpicl

    args = gpicl.with_budget(bench.args(gpicl, size=size, channels=channels))
    if bench.run.compiles:
        compile_draws()
    data = gpicl.prepare(args, "digits", "train", bench.device)
    tasks = gpicl.train_tasks(args, data, size**2 * channels)
    learner = gpicl.make_learner("transformer", args, tasks.num_inputs, 10).to(bench.device)
    optimizer = gpicl.make_optimizer(args, learner)
    number = itertools.count()

    def sample(from_tasks: Callable) -> tuple[Tensor, Tensor]:
        ids = gpicl.batch_ids(args, next(number), args.bias, bench.device)
        return from_tasks(*ids, args.sequence_length)

    def loss(loss_of: Callable, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        return loss_of(x, y)[0]

    def optimise() -> None:
        if args.clip:
            torch.nn.utils.clip_grad_norm_(learner.parameters(), args.clip)
        optimizer.step()

    named = learner.named_parameters()
    weights = sum(x.numel() for name, x in named if x.ndim == 2 and name != "position")
    attention = args.layers * args.heads * args.key_size * args.sequence_length  # half is masked
    flops = 6 * args.batch * args.sequence_length * (weights + attention)
    what = f"gpicl: {args.batch} x {args.sequence_length}, {size} x {size} x {channels}"
    forms = {}
    for how in ("", ", graphs", ", graphs and Triton") if bench.cuda else ("",):
        own = replace(args, graphs="graphs" in how, triton="Triton" in how)
        from_tasks = gpicl.sampling(own, gpicl.train_tasks(own, data, size**2 * channels))
        loss_of = gpicl.compiled(own, bench.run, learner, 10)
        forms[what + how] = partial(sample, from_tasks), partial(loss, loss_of)
    measure_meta_step(bench, forms, optimise, flops)

    results = {}
    for how, (own_sample, own_loss) in forms.items():
        number = itertools.count(7)
        x, y = own_sample()
        own_loss(x, y).backward()
        grad = torch.cat([parameter.grad.flatten() for parameter in learner.parameters()])
        first_x, first_grad = results.setdefault("first", (x, grad))
        likeness = F.cosine_similarity(grad, first_grad, dim=0).item()
        apart = (x - first_x).abs().max().item()
        bench.note(f"{how}: against the first", largest_x=apart, cosine_of_gradients=likeness)
    keys = tasks.keys(torch.arange(args.batch, device=bench.device), 1)
    bench.ms(f"{what}: projections, a part of sampling", lambda: tasks.projections(keys))


def measure_fme(bench: Bench, env: str, populations: int, solutions: int) -> None:
    """An execution of the solutions of populations, all of it, from random numbers to what is kept.
    125 solutions at a time on a CPU, whose cache holds them; all at once on a GPU."""
    import fme

    count = populations * solutions
    sizes = dict(num_parallel=solutions, executions=solutions, roots=solutions)
    sizes["chunk"] = count if bench.cuda else min(count, 125)
    args = fme.Args(device=bench.device.type, populations=populations, **sizes | bench.toy)
    args = fme.with_tuned(args, env)
    with torch.no_grad():
        population = fme.Population(args, env, "fme", bench.run)
        execute = partial(population.execute, population.roots, 0)
        what = f"fme: {args.execution_steps} steps of {env}, {populations} x {solutions} solutions"
        bench.warm(what, execute)
        bench.ready()
        works = {"": execute}
        if bench.cuda:
            fast = fme.Population(replace(args, graphs=True), env, "fme", bench.run)
            works[", graphs"] = partial(fast.execute, population.roots, 0)
        if not bench.thesis:
            works[", frozen weights"] = partial(execute, frozen=True)
        for kind, work in works.items():
            seconds = median(work, bench.repetitions)
            rate = count * args.execution_steps / seconds / 1e3
            each = 1e6 * seconds / args.execution_steps
            bench.note(what + kind, seconds=seconds, us_per_step=each, K_steps_per_s=rate)
        bench.kernels(what, execute)


def measure_symla(bench: Bench, env: str) -> None:
    """An outer step of SymLA, of the in-context RNN, and of a policy that does not learn, which
    leaves environment and sampling."""
    import symla

    args = bench.args(symla, envs=(env,), preset="thesis" if bench.thesis else "laptop")
    args = symla.settled(args)
    names = {"symla": "a step", "uniform": "environment and sampling", "rnn": "the RNN's step"}
    forms = [{}, {"graphs": True}, {"graphs": True, "triton": True}] if bench.cuda else [{}]
    steps = {}
    with torch.no_grad():
        for name, form in itertools.product(names, forms):
            if "triton" in form and name != "symla":
                continue
            own = replace(args, **form)
            parts = symla.make_agent(own, name, env, args.evaluations, bench.run, "train")
            theta = symla.LEARNERS[name](args).init(torch.Generator().manual_seed(0)).to(bench.device)
            how = ", ".join([name, *form])
            steps[how] = partial(symla.es_gradient, own, *parts, theta, 0)
            bench.warm(f"symla on {env}, {how}", steps[how])
        bench.ready()
        sizes = f"{args.population} x {args.evaluations} lifetimes of {args.lifetime_steps} steps"
        count = args.population * args.evaluations * args.lifetime_steps
        for how, step in steps.items():
            seconds = median(step, min(bench.repetitions, 3))
            rate = count / seconds / 1e3
            name, _, form = how.partition(", ")
            what = f"symla on {env}: {names[name]}, {sizes}{', ' * bool(form)}{form}"
            bench.note(what, ms=1e3 * seconds, K_agent_steps_per_s=rate)
            if name == "symla":
                bench.kernels(what, step)
                (grad, loss, _), (first, first_loss, _) = step(), steps["symla"]()
                figures = {"cosine": F.cosine_similarity(grad, first, dim=0).item()}
                bench.note(f"{what}: against the first", **figures, loss_difference=(loss - first_loss).abs().item())


def measure_metagenrl(bench: Bench, agents: int) -> None:
    """An iteration of agents in one environment, and its parts; policies and objective are updated
    every second time. Compiling takes minutes: a CPU does not, a GPU is also measured without."""
    import metagenrl

    args = bench.args(metagenrl, env_steps=10_000, random_steps=0, frozen_steps=0)
    follow = metagenrl.grad_objective
    share = torch.tensor(1.0, device=bench.device)

    def make(env: str, fuse: Callable) -> tuple[str, dict[str, Callable[[], object]]]:
        """Two iterations, and the parts of one, of agents of their own."""
        which = torch.zeros(agents, dtype=torch.int64)
        group = metagenrl.Group(args, env, which, args.env_steps, bench.device, fuse)
        alpha = group.nets.init_objective(1, torch.default_generator).to(bench.device)
        adam = torch.optim.Adam([alpha], args.objective_lr)
        own = alpha[group.which]
        clock = itertools.count()

        def environment() -> int:
            now = next(clock)
            group.step_async()
            group.step_wait(now)
            return now + 1

        def iterations() -> None:
            for _ in range(args.policy_frequency):
                now = environment()
                metagenrl.learn(args, group, follow, own, now, share)
            grad, _ = group.meta_gradient(own, group.state, group.sample(now, args.inner_steps + 1))
            alpha.grad = grad.sum(0, keepdim=True)
            adam.step()

        for _ in range(3 * args.length):
            environment()
        batch, batches = (group.sample(3 * args.length, count) for count in (1, args.inner_steps + 1))
        noise = torch.randn_like(batch.action)
        return f"{agents} agents in {env}", {
            "iterations": iterations,
            "environment": environment,
            "sampling": lambda: group.sample(3 * args.length),
            "critics": lambda: group.update_critics(group.state, batch, noise),
            "policies": lambda: group.update_policies(follow, own, group.state, batch, share),
            "objective": lambda: group.meta_gradient(own, group.state, batches),
        }

    with torch.no_grad():
        fuses = {"compiled": partial(torch.compile, dynamic=False), "eager": lambda f: f}
        if not bench.cuda or not bench.run.compiles:
            del fuses["compiled"]
        try:
            made = {how: make("half_cheetah", fuse) for how, fuse in fuses.items()}
        except ImportError:  # without MuJoCo
            made = {how: make("point_mass", fuse) for how, fuse in fuses.items()}
        what, parts = next(iter(made.values()))
        for name, work in reversed(parts.items()):
            bench.warm(f"metagenrl: {name}", work)
        bench.ready()
        for how, (what, parts) in made.items():
            iterations = parts.pop("iterations")
            seconds = steady(iterations, 2 * bench.repetitions) / args.policy_frequency
            figures = {"ms": 1e3 * seconds, "agent_updates_per_s": agents / seconds}
            bench.note(f"metagenrl, {how}: an iteration of {what}", **figures)
            for name, work in parts.items():
                bench.ms(f"metagenrl, {how}: {name}", work)
            bench.kernels(f"metagenrl, {how}: {args.policy_frequency} iterations", iterations)


def measure_gla(bench: Bench) -> None:
    """A meta-step of one student; and a step of lifetimes at the end of a context of 1,024 steps,
    with and without the cache."""
    import gla

    args = replace(bench.args(gla), gaps=(1,))
    env_name = "heading:0" if bench.thesis else "hidden_goal:8"
    few = replace(args.teacher, agents=4, num_envs=1, updates=args.chunks, update_epochs=1)
    few = replace(few, num_steps=max(few.num_steps, args.chunk), num_minibatches=1)
    with tempfile.TemporaryDirectory() as folder:
        trajectories = gla.collect(few, env_name, Path(folder, "x.pt"), bench.device, lambda _: None)
    trajectories = tree_map_only(Tensor, lambda x: x.to(bench.device), trajectories)
    env = gla.make_env(env_name, 1, bench.device)
    torch.manual_seed(0)
    model = gla.GLA(args).to(bench.device)
    compiles = bench.run.compiles and bench.cuda
    student = gla.Student(args, torch.compile(model, dynamic=False) if compiles else model, 1, (env_name,))
    adam = torch.optim.AdamW(model.parameters(), args.lr, fused=True)
    own = torch.arange(args.batch, device=bench.device)
    number = itertools.count()

    def sample() -> tuple[Any, ...]:
        projection = gla.draw_projection(args, env, args.batch * next(number) + own)
        discrete = env.num_actions is not None
        return projection, *gla.subsample(student, trajectories, discrete, args.batch, own)

    def loss(*task: Any) -> Tensor:
        adam.zero_grad()
        return gla.meta_loss(student, [gla.Task(*task)])

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        adam.step()

    length = args.chunks * args.chunk
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.position.numel()
    flops = 6 * args.batch * length * (weights + args.layers * args.width * length)
    what = f"gla: {args.batch} x {length} tokens"
    measure_meta_step(bench, {what: (sample, loss)}, optimise, flops)
    if not bench.thesis and not bench.toy:
        measure_ppo(bench, args)

    count, steps = (4, length) if bench.toy else (32, 1024)
    model = gla.GLA(replace(args, chunks=steps // args.chunk)).to(bench.device)
    inputs = torch.randn(count, steps, model.embed.in_features, device=bench.device)
    with torch.no_grad():
        cache = model.empty_cache(count)
        model(inputs[:, :-1], cache)
        cached = median(lambda: model(inputs[:, -1:], cache, steps - 1), bench.repetitions)
        whole = median(lambda: model(inputs), 3)
    rates = {"steps_per_s": count / cached, "without_cache": count / whole}
    bench.note(f"gla: the last of {steps} steps of {count} lifetimes", ms=1e3 * cached, **rates)


def measure_ppo(bench: Bench, args: Any) -> None:
    """Environment steps per second of PPO, learning included, of many agents at once and of one as
    CleanRL has it."""
    cleanrl = dict(num_envs=4, num_steps=128, updates=2, update_epochs=4, num_minibatches=4, hidden=64)
    for name, agents in itertools.product(("hidden_goal:8", "cartpole", "heading:0"), (128, 1)):
        own = replace(args.teacher, agents=agents, **cleanrl)
        env = envs.make(name, agents * own.num_envs, bench.device, scaled=True)
        seconds = median(partial(PPOAgents(own, env).update, 0), 3)
        rate = agents * own.num_envs * own.num_steps / seconds / 1e3
        bench.note(f"gla: PPO in {name}, {agents} agents", K_steps_per_s=rate)


MEASURES = {  # by what matters on a GPU, but what compiles longest comes first
    "metagenrl": measure_metagenrl,
    "gpicl": measure_gpicl,
    "vsml": measure_vsml,
    "symla": measure_symla,
    "gla": measure_gla,
    "fme": measure_fme,
}
SCRIPTS = list(MEASURES)
SYMLA_ENVS = ["independent_bandit", "independent_bandit:10", "upright_cartpole"]
SYMLA_ENVS += ["grid_world:3", "acrobot"]
CASES = {  # arguments of the functions above; toy: the first small one, with flags from below
    "small": {
        "metagenrl": [(1,), (5,), (20,)],
        "gpicl": [(8, 1)],
        "vsml": [(8, 24, 250), (28, 2, 250)],
        "symla": [(env,) for env in SYMLA_ENVS],
        "gla": [()],
        "fme": [(env, 1, count) for env in ("bandit", "cartpole") for count in (1, 64, 1024)],
    },
    "thesis": {
        "metagenrl": [(20,)],
        "gpicl": [(32, 3), (14, 1)],
        "vsml": [(28, 1024, 500)],
        "symla": [("independent_bandit",), ("cartpole",)],
        "gla": [()],
        "fme": [("bandit", 64, 1)],
    },
}
TOY = {
    "gpicl": dict(batch=4, sequence_length=12, width=16, heads=2, key_size=4, log_every=1)
    | dict(test_seeds=6, test_tasks=3),
    "fme": dict(execution_steps=20),
    "symla": dict(population=4, evaluations=2, lifetime_steps=5, test_seeds=4),
    "metagenrl": dict(hidden=8, objective_units=4, objective_filters=4, length=4, batch_size=4),
    "gla": dict(chunk=4, chunks=3, width=16, layers=1, heads=2, batch=4),
    "vsml": dict(population=2, sequence_length=4, test_seeds=2, test_steps=4),
}


def cases_of(script: str, setting: str) -> list[tuple]:
    return CASES["small"][script][:1] if setting == "toy" else CASES[setting][script]


def bench_script(options: argparse.Namespace) -> None:
    """One script, or the card."""
    bench = Bench(options)
    if options.script == "card":
        return measure_card(bench)
    cases = cases_of(options.script, options.setting)
    for case in cases if options.case is None else [cases[options.case]]:
        torch.compiler.reset()  # PyTorch keeps 8 compilations of a function
        MEASURES[options.script](bench, *case)


# ==================================================================================================
# Environments
# ==================================================================================================
ENVS = {  # ours, and gymnasium's and envpool's
    "cartpole": "CartPole-v1",
    "acrobot": "Acrobot-v1",
    "pendulum": "Pendulum-v1",
    "half_cheetah": "HalfCheetah-v4",
    "ant": "Ant-v4",
}


def bench_envs(options: argparse.Namespace) -> None:
    """A table of thousand environment steps per second, random actions included: medians of rounds,
    in each of which every implementation is measured."""
    rounds, least = (1, 0.01) if options.setting == "toy" else (5, 0.2)
    labels = ("ours", "ours, compiled", "gymnasium Sync", "gymnasium vector", "envpool")
    print(f"| environment | copies | {' | '.join(labels)} |\n{'| --- ' * 7}|")
    for (name, id), count in itertools.product(ENVS.items(), (64, 512)):
        torch.compiler.reset()
        both = zip(labels, steppers(name, id, count, options.compile == "on"), strict=True)
        steps = {label: step for label, step in both if step}
        calls = {label: calls_in(least, step) for label, step in steps.items()}
        rates = {label: [] for label in labels}
        for _, label in itertools.product(range(rounds), steps):
            rates[label].append(count / steady(steps[label], calls[label]) / 1e3)
        cells = [f"{statistics.median(x):,.1f}" if x else "" for x in rates.values()]
        print(f"| {name} | {count} | {' | '.join(cells)} |", flush=True)


def calls_in(seconds: float, step: Callable[[], object]) -> int:
    """How many calls take so long, after some that compile."""
    number = 4
    steady(step, number)
    while number * steady(step, number) < seconds:
        number *= 2
    return number


def steppers(name: str, id: str, count: int, compile: bool) -> Iterator[Callable[[], None] | None]:
    """A step with random actions of each implementation, in the order of the table's columns; None
    where there is none."""
    import gymnasium

    env = envs.make(name, count)
    yield stepper(env)
    yield stepper(envs.make(name, count, compile=True)) if compile and env.compilable else None
    for mode in (gymnasium.VectorizeMode.SYNC, gymnasium.VectorizeMode.VECTOR_ENTRY_POINT):
        own = mode.value == "sync" or gymnasium.spec(id).vector_entry_point
        yield array_stepper(gymnasium.make_vec(id, count, mode)) if own else None
    try:
        import envpool
    except ImportError:
        yield None
    else:
        yield array_stepper(envpool.make(id, env_type="gymnasium", num_envs=count))


def stepper(env: envs.Env) -> Callable[[], None]:
    """A step of one of our environments."""
    p = env.num_envs
    state, _ = env.reset(torch.rand(p, env.lifetime_draws))

    @torch.no_grad()
    def step() -> None:
        nonlocal state
        if env.num_actions is not None:
            action = torch.randint(env.num_actions, (p,))
        else:
            action = 2 * torch.rand(p, env.action_size) - 1
        state, _ = env.step(state, action, torch.rand(p, env.num_draws))

    return step


def array_stepper(env: Any) -> Callable[[], None]:
    """A step of an environment that takes NumPy arrays."""
    space = getattr(env, "single_action_space", env.action_space)
    random = np.random.default_rng(0)
    p = len(env.reset()[0])

    def step() -> None:
        if hasattr(space, "n"):
            action = random.integers(space.n, size=p)
        else:
            action = random.uniform(space.low, space.high, (p, *space.shape))
        env.step(action.astype(space.dtype))

    return step


# ==================================================================================================
# gpu
# ==================================================================================================
class Job(subprocess.Popen):
    """A process and all that it starts, and what it prints."""

    def __init__(self, name: str, command: list[Any], folder: Path, threads: int):
        self.name = name
        self.log = folder / f"{name.replace(' ', '-')}.log"
        self.started = time.time()
        self.ended = None
        self.late = False
        compilers = str(max(2, threads))
        env = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": compilers}
        env |= {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "5"}
        with open(self.log, "wb") as file:
            pipes = dict(stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT)
            own = dict(cwd=folder, env=os.environ | env, start_new_session=True)
            super().__init__([str(word) for word in command], **pipes, **own)

    def poll(self) -> int | None:
        code = super().poll()
        if code is not None and self.ended is None:
            self.ended = time.time()
        return code

    def wait(self, timeout: float | None = None) -> int:
        super().wait(timeout)
        return self.poll()

    def go(self) -> None:
        """Let it measure: it waits in Bench.ready."""
        with suppress(BrokenPipeError):
            self.stdin.write(b"go\n")
            self.stdin.flush()

    def signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.wait(10)
        self.poll()

    def text(self, size: int = 3000) -> str:
        """The end of what it printed, without what a progress bar overwrote."""
        printed = self.log.read_bytes()[-4 * size :].decode(errors="replace")
        lines = [line.rsplit("\r", 1)[-1] for line in printed.splitlines()]
        return "\n".join(lines)[-size:]


def wait(jobs: list[Job], until: float) -> None:
    """Until all have ended; those that have not are ended at that time."""

    def one(job: Job) -> None:
        try:
            job.wait(max(0, until - time.time()))
        except subprocess.TimeoutExpired:
            job.late = True
            job.end()

    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        list(pool.map(one, jobs))


class Gpu:
    """All steps within the minutes that there are."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.began = time.time()
        self.end = self.began + 60 * options.minutes - 3
        self.toy = not torch.cuda.is_available()
        self.device = ["--device", "cpu", "--no-compile"] if self.toy else ["--device", "cuda"]
        self.out = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = partial(log, self.out)
        self.work = Path(tempfile.mkdtemp(prefix="gpu-"))
        self.jobs: list[Job] = []
        self.background: list[Job] = []  # GPICL's training
        self.data = [path.name for path in options.data]
        for path in options.data:
            (self.work / path.name).symlink_to(path.resolve())  # where a resumed run finds it
        self.tests = ["--test-datasets", *self.data, "digits", "random", "sum_sign"]

    def __call__(self) -> None:
        steps = {1: self.card, 2: self.scripts, 3: self.speed, 4: self.gpicl, 5: self.more}
        try:
            for number, step in steps.items():
                if number == 2 and 4 in self.options.steps:
                    self.guarded(4, self.start_gpicl)
                if number in self.options.steps:
                    self.guarded(number, step)
        finally:
            for job in self.jobs:
                job.end()
            shutil.rmtree(self.work, ignore_errors=True)
        self.table()

    def left(self) -> float:
        """Seconds that a step may take: what is left, without what GPICL's meta-test needs."""
        reserve = self.options.test_seconds if 4 in self.options.steps else 0
        return self.end - reserve - time.time()

    def guarded(self, number: int, step: Callable[[], None]) -> None:
        """A step that breaks costs only itself."""
        if (self.end - time.time() if number == 4 else self.left()) < 1:
            return self.log(number, "no time is left")
        try:
            step()
        except Exception:
            self.log(number, "broken", error=traceback.format_exc()[-3000:])

    def table(self) -> None:
        """What is in gpu.jsonl, to be read."""
        print(f"\nAfter {time.time() - self.began:.0f} s, torch {torch.__version__}:")
        for line in map(json.loads, (self.out / "gpu.jsonl").read_text().splitlines()):
            error = line.pop("error", "").strip().splitlines()[-1:]
            hidden = ("card", "torch", "step", "what", "top")
            figures = [f"{name}={x}" for name, x in line.items() if name not in hidden]
            figures += [f"! {text[-300:]}" for text in error]
            print(f"{line['step']}  {line['what']:<64} {'  '.join(figures)}")

    def start(self, name: str, script: str, *flags: Any, threads: int = 4) -> Job:
        command = [sys.executable, ROOT / script, *flags]
        self.jobs.append(Job(name, command, self.work, 1 if self.toy else threads))
        return self.jobs[-1]

    def worker(self, script: str, name: str, *flags: Any) -> Job:
        """A process that measures."""
        sizes = ["toy", "--compile", "off"] if self.toy else ["thesis"]
        flags = [script, "--out", self.out, *flags, "--setting", *sizes]
        return self.start(name, "tests/benchmark.py", *flags)

    def report(self, step: int, job: Job, **figures: Any) -> None:
        """Note how a process ended."""
        good = job.returncode == 0 and not job.late
        how = "done" if good else "late" if job.late else f"failed with exit code {job.returncode}"
        seconds = job.ended - job.started
        with open(self.out / "logs.txt", "a") as file:
            file.write(f"\n==== {step} {job.name}: {how} after {seconds:.1f} s\n")
            file.write(job.text(2000 if good else 12_000) + "\n")
        if not good:
            figures |= {"late": job.late, "error": job.text()}
        self.log(step, job.name, exit_code=job.returncode, seconds=seconds, **figures)

    def card(self) -> None:
        job = self.worker("card", "card")
        wait([job], time.time() + min(60, self.left()))
        self.report(1, job)

    def scripts(self) -> None:
        """Every script whole: on the CPU, on the GPU, and on the GPU compiled; all at once."""
        sys.path.insert(0, str(ROOT / "tests"))
        until = time.time() + min(110, self.left())
        device = "cpu" if self.toy else "cuda"
        jobs, against = {}, {}
        for name in self.options.only:
            tiny = importlib.import_module(f"test_{name}").TINY.replace("--no-compile", "").split()
            few = FEWER_TO_COMPILE.get(name, "").split()
            cpu, eager, fewer = f"{name} cpu", f"{name} {device} eager", f"{name} {device} fewer"
            variants = {cpu: [], eager: [], **({fewer: few} if few else {})}
            against[eager] = cpu
            if not self.toy:
                variants[f"{name} cuda compiled"] = [*few, "--compile"]
                against[f"{name} cuda compiled"] = fewer if few else eager
            for title, flags in variants.items():
                flags = ["--device", title.split()[1], "--no-compile", *flags]
                flags += ["--run-dir", self.work / "tiny", "--run-name", title]
                jobs[title] = self.start(title, f"{name}.py", *tiny, *flags, threads=1)
        wait(list(jobs.values()), until)
        for title, job in jobs.items():
            self.report(2, job, **self.difference(title, against.get(title)))

    def difference(self, *titles: str | None) -> dict[str, Any]:
        """How far the rows of two runs are apart, relative to the larger of 1 and the mean."""
        means = []
        for path in (self.work / "tiny" / str(title) / "results.json" for title in titles):
            if not path.exists():
                return {}
            keys = ("learner", "task", "novelty", "metric", "step")
            rows = json.loads(path.read_text())["results"]
            means.append({tuple(row[key] for key in keys): row["mean"] for row in rows})
        pairs = [(means[0][key], means[1][key]) for key in means[0].keys() & means[1].keys()]
        apart = [1e9 * (x != y) for x, y in pairs if None in (x, y)]  # null is not a number
        apart += [abs(x - y) / max(1, abs(y)) for x, y in pairs if None not in (x, y)]
        figures = {"rows": len(apart), "differ": sum(x > 1e-3 for x in apart)}
        return {"against": titles[1], **figures, "largest": max(apart, default=0.0)}

    def speed(self) -> None:
        """All workers compile at the same time; then each has the GPU to itself, and the others
        stand still."""
        began = time.time()
        until = began + min(270, self.left())
        waiting = {}
        for script in self.options.only:
            for case in range(len(cases_of(script, "toy" if self.toy else "thesis"))):
                name = f"{script}-{case}"
                flags = ["--case", case, "--signals", self.work]
                waiting[name] = self.worker(script, name, *flags)
        while waiting and time.time() < until:
            for name in [name for name, job in waiting.items() if job.poll() is not None]:
                self.report(3, waiting.pop(name))
            ready = [name for name in waiting if (self.work / f"{name}.ready").exists()]
            late = time.time() > min(began + 75, until - 15 * len(ready))
            if ready and (late or len(ready) == len(waiting)):
                others = [job for name, job in waiting.items() if name not in ready]
                others += self.background
                try:
                    for job in others:
                        job.signal(signal.SIGSTOP)
                    time.sleep(0.3)  # the GPU does what they sent, which no other process can wait for
                    for name in ready:
                        job = waiting.pop(name)
                        job.go()
                        start = time.time()
                        wait([job], min(start + 60, max(until, start + 5)))
                        self.report(3, job, measuring=time.time() - start)
                finally:
                    for job in others:
                        job.signal(signal.SIGCONT)
            time.sleep(0.1)
        wait(list(waiting.values()), 0)
        for job in waiting.values():
            self.report(3, job)

    def train(self, name: str, *flags: Any) -> Job:
        """A script at the thesis' preset, or at toy sizes, in the background."""
        preset = "laptop" if self.toy and name == "gpicl" else "thesis"
        toy = TOY[name].items() if self.toy else ()
        flags = ["--preset", preset, *flags, *self.device, "--run-dir", self.work]
        flags += [word for k, v in toy for word in (f"--{k.replace('_', '-')}", v)]
        return self.start(f"{name} training", f"{name}.py", *flags, "--run-name", name)

    def end_training(self, step: int, name: str, job: Job, until: float) -> bool:
        """End it at a time; its checkpoint is whole whenever that is. Returns whether there is
        one."""
        checkpoint, metrics = (self.work / name / x for x in ("checkpoint.pt", "metrics.csv"))
        while job.poll() is None and time.time() < until:
            with suppress(subprocess.TimeoutExpired):
                job.wait(0.2)
            if self.toy and checkpoint.exists() and checkpoint.stat().st_mtime > job.started:
                break
        if job.poll() is None:
            job.end()
            job.returncode = 0
        figures = {}
        if metrics.exists():
            shutil.copy(metrics, self.out / f"{name}_metrics.csv")
            columns, *lines = [line.split(",") for line in metrics.read_text().splitlines()] or [[]]
            lines = [line for line in lines if len(line) == len(columns)]  # the last may be cut off
            last = zip(columns, lines[-1], strict=True) if lines else ()
            figures = {f"last_{column}": float(x) for column, x in last if x}
        self.report(step, job, **figures)
        return checkpoint.exists()

    def test(self, step: int, name: str, until: float, *flags: Any) -> None:
        """The results of the training's own meta-test, if it came to it, or of one now."""
        own, other = (self.work / x / "results.json" for x in (name, f"{name}-test"))
        if not own.exists():
            flags = ["--checkpoint", self.work / name / "checkpoint.pt", *flags, *self.device]
            flags += ["--mode", "test", "--run-dir", self.work, "--run-name", f"{name}-test"]
            job = self.start(f"{name} test", f"{name}.py", *flags)
            wait([job], until)
            self.report(step, job)
        for path in (own, other):
            if path.exists():
                shutil.copy(path, self.out / f"{name}_results.json")

    def start_gpicl(self) -> None:
        if self.options.resume:
            run = self.work / "gpicl"
            self.log(4, "gpicl: resumed", meta_steps=unpack(self.options.resume, run, self.options.fast))
            job = self.start("gpicl training", "gpicl.py", "--resume", run, *self.device)
        else:
            first = self.data[0] if self.data else "digits"
            flags = ["--dataset", first, "--checkpoint-every", 5 if self.toy else 250]
            flags += ["--triton", "--graphs"] if self.options.fast else []
            job = self.train("gpicl", *flags, *self.tests)
        self.background = [job]

    def gpicl(self) -> None:
        """GPICL learns as long as there is time, then comes the meta-test."""
        until = time.time() + self.left() / (2 if 5 in self.options.steps else 1)
        for job in self.background:
            if self.end_training(4, "gpicl", job, until):
                self.guarded(4, partial(pack, self.work / "gpicl", self.out))
                seconds = self.options.test_seconds
                self.test(4, "gpicl", min(self.end - 4, time.time() + seconds), *self.tests)
        self.background = []

    def more(self) -> None:
        """SymLA's bandits for half of what is left, and its meta-test; then VSML's ES."""
        bandits = ["--envs", "independent_bandit", "--checkpoint-every", 25]
        images = ["--dataset", self.data[0]] if self.data else []
        for name, flags, reserve in (("symla", bandits, 45), ("vsml", images, 5)):
            if name not in self.options.only:
                continue
            seconds = (self.end - time.time()) / (2 if name == "symla" else 1) - reserve
            job = self.train(name, *flags)
            if self.end_training(5, name, job, time.time() + max(5, seconds)) and name == "symla":
                self.test(5, name, min(time.time() + 60, self.end - 4))


# What is left out where a script is compiled at tiny sizes, since compiling is all that takes time.
FEWER_TO_COMPILE = {
    "fme": "--envs bandit --baselines hill_climbing",
    "metagenrl": "--envs point_mass --test-envs point_mass --population 2 --env-steps 48"
    " --test-steps 24 --evaluations 1 --baselines untrained",
}


def pack(folder: Path, out: Path) -> None:
    """A checkpoint of GPICL in two files of less than 16 MB, without what can be made again: the
    learner, and Adam's averages in bfloat16."""
    import gpicl

    saved = checkpoints.read(folder / "checkpoint.pt", state=dict)
    state = saved["state"]
    for name in gpicl.FIXED:
        state.pop(f"['models']['{name}']", None)
    adam = {part: state.pop(part) for part in list(state) if part.startswith("['optimizers']")}
    adam = tree_map_only(Tensor, lambda x: x.bfloat16() if x.ndim else x, adam)
    checkpoints.write(out / "gpicl_checkpoint.pt", saved)
    checkpoints.write(out / "gpicl_averages.pt", adam)
    sizes = {f"{path.stem}_mb": path.stat().st_size / 2**20 for path in out.glob("gpicl_*.pt")}
    log(out, 4, "gpicl: checkpoint kept", meta_steps=saved["step"], **sizes)


def unpack(kept: Path, folder: Path, fast: bool) -> int:
    """The opposite of pack, into a new run's folder. fast: the run goes on with --triton and --graphs."""
    import gpicl

    saved = checkpoints.read(kept / "gpicl_checkpoint.pt", args=dict, state=dict)
    state = saved["state"]
    adam = checkpoints.read(kept / "gpicl_averages.pt")
    state |= tree_map_only(Tensor, lambda x: x.float(), adam)
    saved["args"] |= {"triton": fast, "graphs": fast}
    args = gpicl.Args(**saved["args"])
    for name in {args.learner, *args.baselines}:
        setting = state.get(f"['settings']['{name}']")
        learner = gpicl.make_learner(name, args, *state["['sizes']"].tolist(), setting)
        state.setdefault(f"['models']['{name}']", learner.state_dict())
    folder.mkdir()
    checkpoints.write(folder / "checkpoint.pt", saved)
    if (kept / "gpicl_metrics.csv").exists():
        shutil.copy(kept / "gpicl_metrics.csv", folder / "metrics.csv")
    return saved["step"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="script", required=True)
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--compile", choices=["on", "off"], default="on")
    flags.add_argument("--setting", choices=[*CASES, "toy"], default="small")
    flags.add_argument("--case", type=int, help="only one of a script's cases")
    flags.add_argument("--out", type=Path, help="a folder for gpu.jsonl")
    flags.add_argument("--signals", type=Path, help="of a process of gpu: where it waits")
    for name in (*SCRIPTS, "card", "envs"):
        commands.add_parser(name, parents=[flags])
    gpu = commands.add_parser("gpu")
    gpu.add_argument("--minutes", type=float, default=9.0, help="all steps end within these")
    gpu.add_argument("--out", type=Path, required=True, help="folder for what is measured")
    arrays = "images, .npz files as of --dataset: meta-train on the first, meta-test on all"
    gpu.add_argument("--data", type=Path, nargs="*", default=[], help=arrays)
    gpu.add_argument("--steps", type=int, nargs="+", choices=range(1, 6), default=[1, 2, 3, 4])
    gpu.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="in 2, 3 and 5")
    gpu.add_argument("--resume", type=Path, help="an earlier --out, whose GPICL goes on learning")
    gpu.add_argument("--fast", action="store_true", help="GPICL learns with --triton and --graphs")
    kept = "kept for GPICL's meta-test"
    gpu.add_argument("--test-seconds", type=float, default=55, help=kept)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    if options.script == "gpu":
        Gpu(options)()
    else:
        compile = f"compile {options.compile}, setting {options.setting}"
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {compile}")
        (bench_envs if options.script == "envs" else bench_script)(options)
