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
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fme
import gla
import gpicl
import metagenrl
import symla
import vsml
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vsml.keep_memory()
    thesis = options.setting == "thesis"
    for size, pairs in ((28, options.pairs),) if thesis else ((8, 24), (28, 2)):
        bench_vsml_at(options, device, size, pairs, examples=500 if thesis else 250, repetitions=2 if thesis else 5)


def bench_vsml_at(options: argparse.Namespace, device: str, size: int, pairs: int, examples: int, repetitions: int) -> None:
    """ES, backpropagation and meta-test at one input size. Half of the tasks are projected, as in meta-training."""
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


def bench_gpicl_at(args: gpicl.Args, run: argparse.Namespace, peak: float, repetitions: int) -> None:
    tasks = gpicl.train_tasks(args, gpicl.prepare(args, "digits", "train", run.device), args.size**2 * args.channels, args.bias)
    learner = gpicl.make_learner("transformer", args, tasks.num_inputs, 10).to(run.device)
    optimizer, loss_of = gpicl.make_optimizer(args, learner), gpicl.compiled(run, learner, 10)
    counter = iter(range(10**9))

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        return tasks.sample(*gpicl.batch_ids(args, next(counter), run.device), args.sequence_length)

    def update(x: torch.Tensor, y: torch.Tensor) -> None:
        loss_of(x, y)[0].backward()
        gpicl.average_gradients(learner, args.clip)
        optimizer.step()
        optimizer.zero_grad()

    data = sample()
    making, updating = seconds(sample, repetitions), seconds(lambda: update(*data), repetitions)
    whole = seconds(lambda: update(*sample()), repetitions)
    weights = sum(p.numel() for name, p in learner.named_parameters() if p.ndim == 2 and name != "position")
    attention = 2 * args.layers * args.heads * args.key_size * args.sequence_length  # q k and weights v, half of it masked
    flops = 6 * args.batch * args.sequence_length * (weights + attention / 2)
    print(
        f"width {args.width}, {args.layers} layers, {args.batch} x {args.sequence_length} examples, {tasks.num_inputs} inputs:"
        f" {1e3 * whole:.2f} ms a step ({1 / whole:.1f} steps/s), of it making tasks {1e3 * making:.2f} ms"
        f" ({100 * making / whole:.0f} %), learning {1e3 * updating:.2f} ms; model FLOP utilisation"
        f" {100 * flops / whole / peak:.0f} %; {peak_mb():.0f} MB",
        flush=True,
    )


def bench_fme(options: argparse.Namespace) -> None:
    """Environment steps per second of an execution, all of it, from random numbers to what is kept; medians of 5. 125 solutions
    at a time on a CPU, whose cache holds them, all at once on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpicl.keep_memory()
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", choices=["vsml", "gpicl", "fme", "symla", "metagenrl", "gla"])
    parser.add_argument("--compile", choices=["on", "off"], default="on")
    parser.add_argument("--compile-updates", action="store_true", help="MetaGenRL's on a CPU too, which takes minutes")
    parser.add_argument("--setting", choices=["small", "thesis"], default="small")
    parser.add_argument("--pairs", type=int, default=1024, help="pairs of ES in the thesis setting")
    parser.add_argument("--chunk", type=int, default=None, help="pairs of ES, or solutions of FME, at a time")
    parser.add_argument("--steps", type=int, default=None, help="environment steps of SymLA's lifetimes, at most")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, compile {options.compile}")
    {
        "vsml": bench_vsml,
        "gpicl": bench_gpicl,
        "fme": bench_fme,
        "symla": bench_symla,
        "metagenrl": bench_metagenrl,
        "gla": bench_gla,
    }[options.script](options)
