"""The thesis' experiments, one entry each: its commands, its claims as code, and what came out over meta-training seeds.

    python tests/reproduce.py --list                     # all entries and where they stand
    python tests/reproduce.py V3 S1 F1                   # run what is not finished, check, rewrite the tables
    python tests/reproduce.py V3 --preset thesis         # at the thesis' scale, on a GPU
    python tests/reproduce.py V3 V5 G3 --jobs 8          # eight runs side by side, each with an eighth of the CPU's cores
    python tests/reproduce.py V3 --check                 # only check the claims, from the saved rows
    python tests/reproduce.py --tables --figures         # only rewrite tables and the README's figure, from the saved rows

Runs are kept in runs/reproduce/ROW-COMMAND-sSEED: finished ones are used again, cut-off ones are resumed. The rows that claims
and tables need are kept in .github/results/rows/ (tests/report.py); the words of the claims are those of tests/claims.py.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

# isort: off
from claims import ENOUGH_SEEDS, KEYS, Claim, Figure, Number, Row, UserError, above_random, at, correlation, curve, exponent
from claims import deviation, fact, gain, gradient_norm, higher, improvement, lead, learns, logged, mean, number, per, plateau, reached
from claims import returns, rises, statistic, sweep, unseen_loss, weakest, within, without_worst
from report import ROOT, checked, compact, draw_figures, read_json, rounded, save, saved_path, status, tables, text

# isort: on

RUNS = ROOT / "runs" / "reproduce"

# ======================================================================================================================
# Entries
# ======================================================================================================================
# fmt: off
UNSEEN = {"laptop": ["pendulum", "reacher"], "thesis": ["Hopper-v4"]}
CALLED = {"laptop": "validation", "thesis": "unseen"}  # what UNSEEN are
FRESH = {"laptop": ["acrobot_swing_up", "mountain_car_climb"], "thesis": []}  # nothing was chosen in them
KNOWN = {"laptop": ["point_mass", "cart_swing_up"], "thesis": ["HalfCheetah-v4", "LunarLanderContinuous-v3"]}
UNSEEN_ONLY = "metagenrl.py --compile --baselines --no-test-seen"
FOUR = f"{UNSEEN_ONLY} --envs point_mass cart_swing_up continuous_cartpole continuous_mountain_car"
AGAIN = "metagenrl.py --mode test --checkpoint {M1.0}/checkpoint.pt --no-progress"
RL2 = "metagenrl.py --learner rl2 --baselines"
EPG = "metagenrl.py --learner epg --baselines untrained"  # without random steps, as its agents
INPUTS = f"{UNSEEN_ONLY} --inputs reward"
CHEETAH, HOPPER, LUNAR = "HalfCheetah-v4", "Hopper-v4", "LunarLanderContinuous-v3"
BODIES = {"cheetah": CHEETAH, "hopper": HOPPER, "lunar": LUNAR, "walker": "Walker2d-v4", "ant": "Ant-v4"}
UNSEEN_LUNAR = ("hopper, lunar", "hopper", "lunar")  # of Table A.1, beside "cheetah, hopper"
MORE_BODIES = ("lunar, hopper, walker, ant", "cheetah, lunar, walker, ant", "cheetah, hopper, walker, ant")
POINTS = {"laptop": range(0, 10_001, 500), "thesis": range(0, 1_000_001, 50_000)}  # environment steps of a meta-test
STAGES = ("5 %", "14 %")  # Figure 2.4: hardly any progress, and uneven progress
HALF = {"laptop": 5_000, "thesis": 500_000}  # of the steps of a meta-test
FOUR_INPUTS = {"laptop": "four inputs", "thesis": ""}  # the run with the thesis' inputs: the laptop preset has a fifth one


def regimes(flags: str, *names: str) -> dict[str, str]:
    """Table A.1: a command for each set of bodies to meta-train in; all are meta-tested in the thesis' three."""
    tests = f"--no-test-seen --test-envs {CHEETAH} {HOPPER} {LUNAR} --baselines{flags}"
    return {name: f"metagenrl.py --envs {' '.join(BODIES[body] for body in name.split(', '))} {tests}" for name in names}


def above_rules(env: str, run: str, on_policy: str) -> list[Claim]:
    """Table 2.1: above the untrained objective and the hand-made rules, which learn, with at least 0.8 of what TD3 gains.
    on_policy: the run with on-policy rules."""
    rules = ["ppo", "reinforce-on"]
    return [*higher("metagenrl", ["untrained", "reinforce-off"], [env], None, run),
            *higher("metagenrl", rules, [env], None, on_policy),
            *(claim._replace(of_baseline=True) for rule in rules for claim in rises(rule, [env], on_policy)),
            gain(env, run, untrained=run) > gain(env, run, "td3", run) * 0.8]


def as_td3(env: str) -> list[Claim]:
    """Figure 2.3a, where it was meta-trained: above the untrained objective, REINFORCE and PPO, at most slightly below TD3."""
    return [*higher("metagenrl", ["untrained", "reinforce-off"], [env]),
            *higher("metagenrl", ["ppo", "reinforce-on"], [env], None, "on-policy"), gain(env) > gain(env, learner="td3") * 0.8]


def regime_claims(preset: str) -> list[Claim]:
    """Sections 2.5.1 and A.1.1, at the thesis' preset: above REINFORCE and PPO on Hopper, Cheetah and where meta-trained (not
    on Lunar after Hopper and Lunar: 146, PPO 187), far below TD3 on Cheetah, almost at TD3 on Lunar after Lunar alone, and not
    above REINFORCE on an unseen Lunar."""
    rules = [("reinforce-off", ""), ("reinforce-on", "on-policy"), ("ppo", "on-policy")]
    higher_in = [(CHEETAH, ""), (LUNAR, ""), (LUNAR, "lunar"), *((CHEETAH, run) for run in ("cheetah, hopper", *UNSEEN_LUNAR)),
                 *((HOPPER, run) for run in ("cheetah, hopper", *UNSEEN_LUNAR, *MORE_BODIES))]
    above = [at("metagenrl", env, run=run) > at(rule, env, run=of_rule) for env, run in higher_in for rule, of_rule in rules]
    return [*above, gain(CHEETAH) < gain(CHEETAH, learner="td3") * 0.8, gain(LUNAR, "lunar") > gain(LUNAR, learner="td3") * 0.8,
            at("metagenrl", LUNAR, run="cheetah, hopper") < at("reinforce-off", LUNAR)]


def returns_figure(preset: str, name: str, envs: dict[str, str], learners: list[str]) -> Figure:
    """Figures 2.3 and 2.4. envs: what each is to the learner."""
    panels = {f"{env} ({what})": {learner: returns(learner, env, POINTS[preset]) for learner in learners}
              for env, what in envs.items()}
    return Figure(name, "environment steps of an agent", "return", panels, xscale="linear")


def meta_training_figure(preset: str, name: str, runs: dict[str, str], *columns: str) -> Figure:
    """Figures 2.5a and A.6: mean reward of agents in meta-training, and its deviation over agents. runs: labels by line."""
    words = {"reward": "reward", "reward_std": "deviation over agents"}
    several = {line: run for line, run in runs.items() if run != "2 agents"}  # of which one is in each environment
    panels = {f"{env}, {words[column]}": {line: curve(f"{env}_{column}", run) for line, run in of.items()}
              for column, of in zip(columns, (runs, several), strict=False) for env in KNOWN[preset]}
    return Figure(name, "iterations of meta-training", "", panels, xscale="linear")


METAGENRL = {
    "M1": Row("Table 2.1, A.1", "unseen Hopper: 2363, PPO 1894, TD3 2718",
        {"": "metagenrl.py --compile --progress", "on-policy": f"{AGAIN} --baselines ppo reinforce-on",
         "fresh": f"{AGAIN} --no-test-seen --test-envs {' '.join(FRESH['laptop'])} "
                  "--baselines untrained td3 reinforce-off ppo reinforce-on"},
        lambda preset: [*per(UNSEEN, lambda env: above_rules(env, "", "on-policy"))(preset),
                        *per(FRESH, lambda env: above_rules(env, "fresh", "fresh"))(preset),
                        *(per(KNOWN, as_td3)(preset) if preset == "laptop" else regime_claims(preset))],
        {"": "metagenrl.py --progress", "on-policy": f"{AGAIN} --baselines ppo reinforce-on",
         **regimes("", "cheetah, hopper", *UNSEEN_LUNAR), **regimes(" --population 40", *MORE_BODIES)},
        figures=lambda preset: [returns_figure(
            preset, "metagenrl_unseen", {KNOWN[preset][-1]: "meta-trained in"} | dict.fromkeys(UNSEEN[preset], CALLED[preset]),
            ["metagenrl", "untrained", "reinforce-off", "td3"])]),
    "M2": Row("Table 2.1", "RL² only where meta-trained; EPG fails",
        {"": "M1.0", "rl2": f"{RL2} --rl2.trial-steps 5000000", "epg": f"{EPG} --compile --epg.generations 280"},
        lambda preset: [*(claim for env in KNOWN[preset] for claim in (
                gain(env) > 0, gain(env, "rl2", "rl2") > gain(env) * 0.8, gain(env, "epg", "epg", "epg") < gain(env) * 0.2)),
            *(gain(env, other, other, untrained) < gain(env) * 0.2
              for env in UNSEEN[preset] for other, untrained in (("rl2", ""), ("epg", "epg")))],
        {"": "M1.0", "rl2": RL2, "epg": EPG}),
    "M3": Row("Fig. 2.4", "later objectives train faster and more evenly", "M1.0",
        lambda preset: [claim for env in UNSEEN[preset] for claim in (
            at("metagenrl", env) > at(f"metagenrl, {STAGES[0]}", env),
            at(f"metagenrl, {STAGES[1]}", env) > at(f"metagenrl, {STAGES[0]}", env),
            at("metagenrl", env, HALF[preset]) > at(f"metagenrl, {STAGES[1]}", env, HALF[preset]),
            at("metagenrl", env, field="std") < at(f"metagenrl, {STAGES[1]}", env, field="std"))],
        figures=lambda preset: [returns_figure(preset, "metagenrl_stages", dict.fromkeys(UNSEEN[preset], CALLED[preset]), [
            *(f"metagenrl, {part} %" for part in (5, 14, 20, 40, 60, 80)),
            "metagenrl"])]),
    "M4": Row("Fig. 2.5", "works without t or V_{t+1}, not without values",
        {"": "M1.0", "no time": f"{INPUTS} value next_value gain", "no next value": f"{INPUTS} value time",
         "no values": f"{INPUTS} time", "four inputs": f"{INPUTS} value next_value time"},
        lambda preset: [claim for env in (UNSEEN | {"thesis": [CHEETAH]})[preset] for claim in (
            gain(env) > 0, gain(env, "no time") > gain(env) * 0.8,
            *[gain(env, "four inputs") > gain(env) * 0.2] * (preset == "laptop"),
            gain(env, "no next value") > gain(env, FOUR_INPUTS[preset]) * 0.8, gain(env, "no values") < gain(env) * 0.2)] + [
            logged(f"{CHEETAH}_reward", "no time") < logged(f"{CHEETAH}_reward", "")] * (preset == "thesis"),
        {"": "M1.0", **{f"no {what}": f"metagenrl.py --baselines --test-envs --inputs reward {rest}" for what, rest in (
            ("time", "value next_value"), ("next value", "value time"), ("values", "time"))}},
        figures=lambda preset: [meta_training_figure(preset, "metagenrl_inputs", {
            "all inputs": "", **{name: name for name in ("no time", "no next value", "no values")}}, "reward")]),
    "M5": Row("Fig. 2.6", "3 inner steps vary more than 1, 5 harm",
        {"": "M1.0", **sweep(UNSEEN_ONLY, inner_steps=[3, 5])},
        per(UNSEEN | {"thesis": [HOPPER, CHEETAH]}, lambda env: [
            gain(env) > 0, at("metagenrl", env) > at("metagenrl", env, run="inner_steps 5"),
            at("metagenrl", env, field="std") < at("metagenrl", env, run="inner_steps 3", field="std")]),
        {"": "M1.0", **sweep(f"metagenrl.py --baselines --no-test-seen --test-envs {HOPPER} {CHEETAH}", inner_steps=[3, 5])}),
    "M6": Row("Fig. A.4, A.5", "few stuck agents make the variance",
        {"each": f"{AGAIN} --no-test-seen --baselines --each --test-seeds 12",
         "late": "metagenrl.py --envs point_mass --test-envs --population 8 --progress --baselines untrained --reset-every 0 "
                 "--no-objective-lr-decay"},
        per({"laptop": [("pendulum", "point_mass")], "thesis": [(LUNAR, LUNAR)]}, lambda envs: [
            without_worst(envs[0], "each") < at("metagenrl", envs[0], run="each", field="std") * 0.5,
            at("metagenrl", envs[1], run="late") < at("metagenrl, 14 %", envs[1], run="late")]),
        {"each": f"metagenrl.py --envs {LUNAR} --test-envs --progress --each --test-seeds 12 --baselines untrained",
         "late": "M6.0"}),
    "M7": Row("Fig. A.6, A.7", "fewer than 20 agents are unstable",
        {"": "M1.0", "4 environments": FOUR, "4, more agents": f"{FOUR} --population 32",
         **{f"{count} agents": f"{UNSEEN_ONLY} --population {count}" for count in (2, 4, 8)}},
        lambda preset: [
            *(logged(f"{env}_reward", fewer) < logged(f"{env}_reward", more)
              for env in KNOWN[preset] for fewer, more in pairwise(("2 agents", "4 agents", "8 agents", ""))),
            *(deviation(env, f"{count} agents", count // 2) > deviation(env, "", {"laptop": 8, "thesis": 10}[preset])
              for env in KNOWN[preset] for count in (4, 8)),
            *(gain(env, f"{count} agents") < gain(env) for env in UNSEEN[preset] for count in (2, 4)),
            *(claim for env in UNSEEN[preset] for claim in (
                *(gain(env, run) < gain(env) * 1.2 for run in ("4 environments", "4, more agents")),
                gain(env, "4, more agents") > gain(env) * 0.8))],
        {"": "M1.0", "4, more agents": "M1.7",
         **{f"{count} agents": f"metagenrl.py --population {count} --baselines --no-test-seen" for count in (2, 4, 8)},
         "4 environments": regimes("", "cheetah, lunar, walker, ant")["cheetah, lunar, walker, ant"]},
        figures=lambda preset: [meta_training_figure(preset, "metagenrl_population", {
            **{f"{count} agents": f"{count} agents" for count in (2, 4, 8)}, "all agents": ""}, "reward", "reward_std")]),
}

CLONE = "vsml.py --preset clone --dataset mnist --test-datasets mnist fashion_mnist"
CLONED = [("shallow", "mnist", 0.90), ("deep", "mnist", 0.87),
          ("shallow", "fashion_mnist", 0.80), ("deep", "fashion_mnist", 0.76)]
ROBUST = "vsml.py --dataset mnist --projected 1 --baselines sgd adam --test-datasets mnist --robustness"
REFERENCE = at("vsml", "mnist", run="reference") - at("sgd", "mnist", run="reference")
CHANGED = ["mnist", *(f"mnist {change}" for change in ("5 classes", "at 21 x 21", "at 48 x 48", "projected", "permuted"))]
DATASETS = {"laptop": ["mnist", "fashion_mnist", "digits", "random"],
            "thesis": ["mnist", "fashion_mnist", "kmnist", "emnist", "random"]}
LEFT_OUT = {"laptop": DATASETS["laptop"][:3], "thesis": DATASETS["thesis"]}
LEARNERS = "--test-steps 2000 --baselines rnn hebbian fwmemory sgd adam sgd2 adam2"
OMNIGLOT = ("vsml.py --dataset omniglot --classes 5 --test-classes 5 --shots 1 --meta-loss last --feed-label --backward-pass "
            "--projected 0 --blanked 0 --persistent 1 --test-datasets omniglot --test-seeds 400 --rnn-size 128 "
            "--baselines rnn hebbian fwmemory sgd adam")
BOTH = ["mnist", "fashion_mnist"]
DEPTH = "vsml.py --backward-pass --baselines --meta-steps 200"  # a third of the preset's: a step of three layers takes seconds
FULL_DEPTH = "vsml.py --dataset mnist --feed-label --norm-messages --baselines"


def left_out(preset: str, flags: str) -> dict[str, str]:
    """A command for each dataset that is meta-tested and not meta-trained on."""
    names = DATASETS[preset]
    tests = f"--test-datasets {' '.join(names)} sum_sign {flags}"
    return {f"without {out}": f"vsml.py --dataset {' '.join(name for name in names if name != out)} {tests}"
            for out in LEFT_OUT[preset]}


def datasets_figure(preset: str) -> Figure:
    """Figure 3.8: cumulative accuracy at the end on a dataset that was left out of meta-training, and its deviation."""
    learners = ["vsml", *LEARNERS.split()[3:]]
    panels = {panel: {learner: [(name, at(learner, name, None, f"without {name}", field=field)) for name in LEFT_OUT[preset]]
                      for learner in learners} for panel, field in (("mean", "mean"), ("deviation over rollouts", "std"))}
    return Figure("vsml_datasets", "dataset left out", "cumulative accuracy on the dataset left out", panels, matrix=True)


LEFT_OUT_1 = left_out("thesis", f"--test-seeds 32 {LEARNERS}")
ABLATED = LEFT_OUT_1["without fashion_mnist"]
VSML = {
    "V1": Row("Fig. 3.5, B.2", "cloned: MNIST 90, deep 87 %; Fashion-MNIST 80, deep 76 %",
        {"shallow": CLONE, "deep": f"{CLONE} --hidden 32"},
        [claim for run, task, accuracy in CLONED for claim in (
            at("clone", task, run=run) > accuracy - 0.02,
            at("clone", task, run=run) > at("backprop", task, run=run) - 0.02)]),
    "V2": Row("Fig. B.1", "errors of the cloned tanh(x) w are small", "V1.0", [fact("", "error") < 0.1]),
    "V3": Row("Fig. 3.6", "faster at first than SGD, Adam; RNN overfits",
        {"": "vsml.py --dataset mnist --test-datasets mnist fashion_mnist", "digits": "V9.0"},
        lambda preset: [*higher("vsml", ["sgd", "adam"], BOTH, 100), *rises("vsml", ["fashion_mnist"]),
         *higher("vsml", ["rnn"], ["fashion_mnist"]),
         at("rnn", "mnist") - at("rnn", "fashion_mnist") > at("vsml", "mnist") - at("vsml", "fashion_mnist"),
         *(claim for task in BOTH * (preset == "laptop") for claim in (
            *higher("vsml", ["sgd", "adam"], [task], 100, "digits"),
            at("vsml", task, 1000, "digits") > at("vsml", task, 400, "digits")))],
        "vsml.py --dataset mnist --test-datasets mnist fashion_mnist"),
    "V4": Row("Fig. 3.7", "unseen sizes, classes, projections: no drop",
        {"": f"{ROBUST} --sizes 7 10 --classes 3 6 --test-seeds 16", "reference": "V3.0"},
        [*(at("vsml", task) - at("sgd", task) > REFERENCE - 0.05 for task in CHANGED),
         *higher("vsml", ["sgd"], ["mnist"], 100), at("vsml", "mnist") > at("sgd", "mnist") - 0.05],
        {"": f"{ROBUST} --sizes 14 28 32 --classes 3 4 6 7 --test-seeds 32", "reference": "V3.0"}),
    "V5": Row("Fig. 3.8, B.3-B.7", "generalises; RNN, Hebbian, memory do not",
        left_out("laptop", f"--test-seeds 8 {LEARNERS}"),
        lambda preset: [claim for name in LEFT_OUT[preset] for claim in (
            *higher("vsml", ["rnn", "hebbian", "fwmemory"], [name, "sum_sign"], None, f"without {name}"),
            *higher("vsml", ["sgd", "adam", "sgd2", "adam2"], [name], 100, f"without {name}"),
            at("vsml", name, run=f"without {name}") > at("sgd", name, run=f"without {name}") - 0.05)] + [
            at("vsml", "fashion_mnist", run="without fashion_mnist") > at("vsml", "fashion_mnist", run="no projections (B.5)"),
            *higher("vsml", ["rnn", "hebbian", "fwmemory"], ["fashion_mnist"], None, "projections for all (B.6)"),
            *(at(name, "fashion_mnist", run="projections for all (B.6)")
              < at(name, "fashion_mnist", run="without fashion_mnist") + 0.1 for name in ("rnn", "hebbian", "fwmemory")),
            at("vsml", "fashion_mnist", run="half projected (B.7)") > at("vsml", "fashion_mnist", run="plain (B.7)"),
            at("rnn", "fashion_mnist", run="half projected (B.7)")
            < at("rnn", "fashion_mnist", run="plain (B.7)") + 0.1] * (preset == "thesis"),
        {label: f"{command} --projected 1" for label, command in LEFT_OUT_1.items()}
        | {"no projections (B.5)": ABLATED, "projections for all (B.6)": f"{ABLATED} --projected 1 --augment-baselines",
           "half projected (B.7)": "vsml.py --dataset mnist --projected 0.5 --augment-baselines --test-datasets mnist "
                                   "fashion_mnist", "plain (B.7)": "V3.0"},
        figures=lambda preset: [datasets_figure(preset)]),
    "V6": Row("Fig. 3.9, B.8", "repeated digits almost always correct",
        "vsml.py --mode test --checkpoint {V3.0}/checkpoint.pt --test-datasets mnist --test-steps 100 --baselines sgd adam",
        [fact("", "repeats", "vsml") > 0.8, fact("", "repeats", "vsml") > fact("", "repeats", "adam") + 0.3,
         fact("", "repeats", "vsml") > fact("", "repeats", "sgd")]),
    "V7": Row("Fig. B.9", "Omniglot: above SGD, below specialists",
        f"{OMNIGLOT} --sizes 14 --test-sizes 14 --sequences 64",
        per({"laptop": ["omniglot@14"], "thesis": ["omniglot@28"]}, lambda task: [
            at("vsml", task) > at("adam", task) + 0.1,
            at("vsml", task) < at("rnn", task), at("vsml", task) < at("fwmemory", task)]),
        f"{OMNIGLOT} --sizes 28 --test-sizes 28 --meta-steps 100000"),
    "V8": Row("Fig. B.10", "SGD overtakes within 12,000 examples",
        "vsml.py --mode test --checkpoint {V3.0}/checkpoint.pt --test-steps 12000 --repeat-examples --test-seeds 8 "
        "--baselines sgd adam",
        [*higher("vsml", ["sgd"], BOTH, 100), *higher("sgd", ["vsml"], BOTH)]),
    "V9": Row("Fig. B.11, B.12", "convolutions on par with dense",
        {"dense": "vsml.py --test-datasets digits wine breast_cancer random sum_sign mnist fashion_mnist",
         "conv": "vsml.py --conv 8 --init {V9.0}/checkpoint.pt --backward-pass --projected 0 --backprop-lr 5e-3 "
                 "--meta-steps 300 --baselines --test-datasets digits mnist fashion_mnist --test-seeds 8"},
        lambda preset: [*(at("vsml", task, 1000, "conv") > at("vsml", task, 1000, "dense") - 0.05 for task in BOTH),
         *(claim for claim in [*higher("vsml", ["sgd"], ["cifar10"], 100, "cifar10"),
                               at("vsml", "fashion_mnist", run="cifar10") > 0.3] if preset == "thesis")],
        {"dense": "V3.0", "conv": "vsml.py --dataset mnist --conv 8 --feed-label --backward-pass --norm-messages "
                                  "--baselines sgd adam --test-datasets mnist fashion_mnist",
         "cifar10": "vsml.py --dataset cifar10 --conv 8 --feed-label --backward-pass --norm-messages --baselines sgd adam "
                    "--test-datasets cifar10 fashion_mnist --test-steps 10000"}),
    "V10": Row("Theorem B.1.1", "equals one sparse shared-weight RNN",
        "pytest tests/test_vsml.py::test_theorem_b_1_1", [at("pytest", "test") > 0.5], enough_seeds=1),
    "V11": Row("Fig. D.14", "deeper VSML: longer plateaus",
        {"shallow": f"{DEPTH} --test-datasets digits",
         **{f"{depth} hidden": f"{DEPTH} --hidden {'16 ' * depth}--test-datasets digits" for depth in (1, 2, 3)}},
        per({"laptop": ["digits"], "thesis": ["mnist"]}, lambda task: [
            *(at("vsml", task, run=deeper) < at("vsml", task, run=run) * 0.9  # by more than two that guess differ
              for run, deeper in pairwise(("shallow", "1 hidden", "2 hidden", "3 hidden"))),
            at("vsml", task, run="1 hidden") > 0.2]),  # it leaves its plateau
        {"shallow": f"{FULL_DEPTH} --test-datasets mnist",
         **{f"{depth} hidden": f"{FULL_DEPTH} --hidden {'32 ' * depth}--test-datasets mnist" for depth in (1, 2, 3)}}),
}

FIVE = [f"{name}_bandit" for name in ("independent", "dependent", "easy", "medium", "hard")]
PAIRS = {who: mean(f"{who}, 25 pairs", [at(who, test, run=train) for train in FIVE for test in FIVE])
         for who in ("symla", "rnn", "uniform")}
ARMS = [f"independent_bandit:{arms}" for arms in (2, 8, 10, 12)]
UNSEEN_ARMS = {who: mean(f"{who}, unseen arms", [
    at(who, test, run=train) for train in ARMS[1:] for test in ARMS if test != train]) for who in ("symla", "uniform")}
FROM = {words: mean(f"symla from {words} on many", [at("symla", test, run=train) for train in trained for test in ARMS[1:]])
        for words, trained in (("2 arms", ARMS[:1]), ("many", ARMS[1:]))}
CONTROL = {"laptop": ["upright_cartpole", "acrobot", "mountain_car"], "thesis": ["cartpole", "acrobot", "mountain_car"]}
REPEATED = {"upright_cartpole": "", "acrobot": " --action-repeat 4 --lifetime-steps 252",  # as many time-outs in both halves
            "mountain_car": " --action-repeat 16 --lifetime-steps 252"}
DENSE = {"laptop": [f"projected_dense_grid_world:{size}" for size in (3, 4, 5)], "thesis": ["projected_dense_grid_world"]}


FIGURE_4_3 = {  # regret in the thesis, by the environment of meta-training (rows), in the order of FIVE
    "rnn": [[1.9, 1.7, 0.83, 1.3, 3.0], [3.2, 1.2, 0.59, 0.9, 2.6], [3.4, 1.2, 0.64, 0.98, 2.9], [3.3, 1.3, 0.63, 0.96, 2.4],
            [4.2, 2.0, 1.1, 1.3, 3.0]],
    "symla": [[2.5, 1.7, 0.72, 1.2, 3.0], [3.2, 1.1, 0.56, 0.96, 2.4], [3.3, 1.3, 0.51, 0.8, 2.0], [3.4, 1.3, 0.51, 0.87, 2.3],
              [3.4, 1.3, 0.56, 1.1, 2.5]]}
FIGURE_4_4 = {"symla": [[4.2, 120, 130, 140], [12, 13, 15, 17], [14, 13, 15, 17], [20, 15, 16, 17]]}


def regret_figure(name: str, envs: list[str], thesis: dict[str, list[list[float]]], most: float) -> Figure:
    """Figures 4.3 and 4.4: regret of a lifetime in each environment (columns) after meta-training in each (rows), and below it
    the thesis' numbers. most: that of the brightest colour."""
    panels = {}
    for learner, numbers in thesis.items():
        panels[learner] = {f"from {run}": [(test, at(learner, test, run=run)) for test in envs] for run in envs}
        rows = zip(envs, numbers, strict=True)
        panels[f"{learner}, the thesis"] = {f"from {run}": list(zip(envs, map(number, row), strict=True)) for run, row in rows}
    words = "expected cumulative regret, by the environment of meta-training"
    return Figure(name, "environment", words, panels, matrix=True, limits=(0, most))


def control_claims(env: str, rnn: str) -> list[Claim]:
    """Figure 4.5: SymLA keeps its return in shuffled order, and improves within a lifetime; the RNN fails. rnn: the end of
    the label of the RNN's run."""
    shuffled = f"shuffled_{env}"
    return [above_random("symla", env, env) > 0, above_random("rnn", env, env + rnn) > 0,
            above_random("symla", env, env) > above_random("rnn", env, env + rnn) * 0.8,
            above_random("symla", shuffled, env) > above_random("symla", env, env) * 0.8,
            above_random("rnn", shuffled, env + rnn) < above_random("rnn", env, env + rnn) * 0.5,
            improvement("symla", shuffled, env) > 0,
            improvement("symla", shuffled, env) > improvement("uniform", shuffled, env)]


SYMLA = {
    "S1": Row("Fig. 4.3", "mean regret of 25 pairs: 1.70, in-context RNN 1.86",
        {env: f"symla.py --envs {env}" for env in FIVE},
        [PAIRS["symla"] < PAIRS["rnn"] + 0.2, PAIRS["symla"] < 1.7 + 0.36,  # not above the RNN; a fifth above the thesis'
         (PAIRS["rnn"] < 1.86 + 0.63)._replace(of_baseline=True)],  # a third above the thesis'
        figures=lambda preset: [regret_figure("symla_five", FIVE, FIGURE_4_3, 8)]),
    "S2": Row("Fig. 4.4", "unseen numbers of arms: 12 to 20",
        {env: f"symla.py --envs {env} --test-envs {' '.join(ARMS)} --baselines thompson uniform" for env in ARMS},
        [UNSEEN_ARMS["symla"] < 17, mean("symla, the same arms", [at("symla", arms, run=arms) for arms in ARMS]) < 14,
         FROM["2 arms"] > FROM["many"]],  # the thesis has 15.4 and 12.3 of the first two
        figures=lambda preset: [regret_figure("symla_arms", ARMS, FIGURE_4_4, 40)]),
    "S3": Row("Fig. 4.5", "shuffled: SymLA keeps its return, RNN fails",
        {"start": "symla.py --envs contextual_bandit:2 contextual_bandit:3 grid_world:2 --baselines uniform --meta-steps 750",
         **{env: f"symla.py --envs {env}{flags} --baselines uniform --init {{S3.0}}/checkpoint.pt"
            for env, flags in REPEATED.items()},
         **{f"{env}, rnn": f"symla.py --learner rnn --envs {env}{flags} --baselines uniform --meta-steps 1350"
            for env, flags in REPEATED.items()}},  # as many as SymLA has with its start
        lambda preset: [claim for env in CONTROL[preset]
                        for claim in control_claims(env, ", rnn" if preset == "laptop" else "")],
        {env: f"symla.py --envs {env}" + " --sutton-barto-reward" * (env == "mountain_car") for env in CONTROL["thesis"]}),
    "S4": Row("Fig. 4.6", "rewards swapped: SymLA relearns, RNN fails",
        {"contexts": "symla.py --envs contextual_bandit:2 contextual_bandit:3 --baselines uniform --meta-steps 500",
         "2 x 2": "symla.py --envs grid_world:2 --init {S4.0}/checkpoint.pt --baselines uniform --meta-steps 400",
         "grid": "symla.py --envs grid_world:3 --init {S4.1}/checkpoint.pt --baselines uniform --meta-steps 400 "
                 "--lifetime-steps 500",
         "rnn": "symla.py --learner rnn --envs grid_world:3 --baselines uniform --meta-steps 1300 --lifetime-steps 500"},
        per({"laptop": [("grid_world:3", "rnn")], "thesis": [("grid_world", "grid")]}, lambda one: [
            *higher("symla", ["uniform"], [one[0], f"swapped_{one[0]}"], None, "grid"),
            *higher("rnn", ["uniform"], one[:1], None, one[1]),
            *(improvement("symla", task, "grid") > 0 for task in (one[0], f"swapped_{one[0]}")),
            improvement("symla", one[0], "grid") > improvement("rnn", one[0], one[1]),  # the RNN knows what pays from the start
            *higher("uniform", ["rnn"], [f"swapped_{one[0]}"], None, one[1])]),
        {"grid": "symla.py --envs grid_world --baselines rnn uniform"}),
    "S5": Row("Fig. 4.7", "grid world to CartPole: only SymLA transfers",
        f"symla.py --envs {' '.join(DENSE['laptop'])} --normalize-rewards --meta-steps 600 --obs-gain 1 "
        "--test-steps 2000",  # four episodes of the cartpole that does not end
        lambda preset: [*(claim for who in ("symla", "rnn") for claim in higher(who, ["uniform"], DENSE[preset])),
                        *higher("symla", ["uniform", "rnn"], ["projected_balance_cartpole"]),
                        above_random("rnn", "projected_balance_cartpole", "")
                        < above_random("symla", "projected_balance_cartpole", "") * 0.5],
        "symla.py --envs projected_dense_grid_world --test-steps 2000"),
}

SMALL = "gpicl.py --width 64 --heads 4 --baselines"  # where many runs are compared; half the preset's time
SHORT = f"{SMALL} --classes --bias-end 0.9 --test-datasets digits"
UNIFORM = "gpicl.py --dataset mnist --bias 0 --baselines --test-datasets mnist"
PLATEAU = "gpicl.py --dataset fashion_mnist --num-tasks 65536 --baselines --test-datasets fashion_mnist"
FREE = "gpicl.py --baselines --bias-end None --test-datasets digits"
LONG = f"{SMALL} --bias-end None --test-datasets digits --meta-steps 5000"
PLAIN = "gpicl.py --baselines --test-datasets"
STATES = {**sweep(f"{PLAIN} digits", learner=["transformer"], key_size=[4, 8, 16]),
          **sweep(f"{PLAIN} digits", learner=["lstm"], width=[16, 64, 256]),
          **sweep(f"{PLAIN} digits", learner=["outer_lstm"], key_size=[8, 16, 32]),
          **sweep(f"{PLAIN} digits", learner=["vsml_nosym"], grid=[1, 2, 4])}
FULL_STATES = {**sweep(f"{PLAIN} mnist --bias 0 --batch 512", learner=["transformer"], key_size=[4, 16, 32]),
               **sweep(f"{PLAIN} mnist --bias 0", learner=["lstm"], width=[64, 256, 1024]),
               **sweep(f"{PLAIN} mnist --bias 0", learner=["outer_lstm"], key_size=[8, 16, 32]),
               **sweep(f"{PLAIN} mnist --size 14 --channels 1", learner=["vsml_nosym"], grid=[1, 2, 4, 8, 16, 24])}
BATCHES = {"laptop": (16, 32, 64, 128), "thesis": (128, 512, 2048)}
LEAVES = {"laptop": {batch: f"batch {batch}, num_tasks 16384" for batch in (32, 64, 128)},  # 16 stays on the plateau
          "thesis": {batch: f"batch {batch}, num_tasks 65536" for batch in (128, 512, 2048)}}
THREE = "--baselines --test-datasets digits fashion_mnist random"
TABLE_DATASETS = ("mnist", "fashion_mnist", "kmnist", "random", "cifar10", "svhn")
TABLE = {"sgd": (0.7031, 0.5078, 0.3789, 1.0, 0.1484, 0.1016), "maml": (0.5371, 0.4844, 0.3633, 0.998, 0.1738, 0.1133),
         "vsml": (0.7904, 0.6849, 0.5469, 1.0, 0.2409, 0.1745), "lstm": (0.2539, 0.2812, 0.1810, 0.5872, 0.1211, 0.1107),
         "transformer": (0.7370, 0.6224, 0.5339, 1.0, 0.1940, 0.1458)}
SET = {"laptop": "digits", "thesis": "mnist"}
DECAYS = ["0.01", "0.1", "1"]
MANY = {"laptop": [1, 4, 16, 64, 256, 1024, 4096, 16384], "thesis": [2**power for power in range(0, 25, 4)]}


def width_figure(preset: str, tasks: list[int], widths: list[int]) -> Figure:
    """Figure 5.2: accuracy at the last example, by learner and width (rows) and number of tasks (columns)."""
    panels = {panel: {f"{learner}, width {width}": [
        (f"{count} tasks", reached(SET[preset], new, f"learner {learner}, num_tasks {count}, width {width}", learner=learner))
        for count in tasks] for learner in ("transformer", "mlp") for width in widths}
        for new, panel in (("none", "seen tasks"), ("task", "unseen tasks"))}
    return Figure("gpicl_width", "tasks", "accuracy at the last example", panels, matrix=True)


def transfer_figure(preset: str) -> Figure:
    """Figure 5.3: accuracy at each example of both datasets, after meta-training on either."""
    steps = [1, 2, 5, 10, 20, *([40] if preset == "laptop" else [50, 100])]
    panels = {test: {f"meta-trained on {name}": [
        (step, reached(test, "task" if test == name else "domain", f"dataset {name}", step)) for step in steps]
        for name in BOTH} for test in BOTH}
    return Figure("gpicl_transfer", "example", "accuracy on unseen tasks", panels, xscale="linear")


def table_figure(preset: str) -> Figure:
    """Table 5.2: accuracy at the last example, beside the thesis' numbers, whose SGD is the best of SGD, Adam and AdamW."""
    tasks = ("digits", "fashion_mnist", "random") if preset == "laptop" else TABLE_DATASETS
    runs = {"sgd": "", "adam": "", "maml": "maml", "vsml": "vsml", "lstm": "lstm", "transformer": ""}
    here = {learner: [(task, reached(task, "task" if task == SET[preset] else "domain", run, learner=learner))
                      for task in tasks] for learner, run in runs.items()}
    thesis = {learner: list(zip(TABLE_DATASETS, map(number, values), strict=True)) for learner, values in TABLE.items()}
    panels = {f"{preset} preset": here, "thesis": thesis}
    return Figure("gpicl_table", "dataset", "accuracy at the last example", panels, matrix=True)


def phases_figure(preset: str, tasks: list[int]) -> Figure:
    """Figure 5.4: accuracy at the first and at the last example, by number of tasks."""
    kinds = [(SET[preset], "none", "seen tasks"), (SET[preset], "task", "unseen tasks"),
             ("fashion_mnist", "domain", "fashion_mnist, unseen")]
    panels = {panel: {f"{words} example": [(count, reached(task, new, f"num_tasks {count}", step)) for count in tasks]
                      for words, step in (("first", 0), ("last", None))} for task, new, panel in kinds}
    return Figure("gpicl_phases", "number of tasks", "accuracy", panels)


def solutions_figure(preset: str, tasks: list[int]) -> Figure:
    """Figures D.1 and D.4: losses of each meta-training seed, by number of tasks."""
    ends = {"meta-training tasks, end of meta-training": lambda run: fact(run, "final_loss")}
    for task, new, words in ((SET[preset], "task", "unseen tasks"), ("fashion_mnist", "domain", "fashion_mnist, unseen")):
        ends[f"{words}, last example"] = partial(at, "transformer", task, None, metric="cross_entropy", novelty=new)
    panels = {panel: {"mean over seeds": [(count, end(run=f"num_tasks {count}")) for count in tasks]}
              for panel, end in ends.items()}
    return Figure("gpicl_solutions", "number of tasks", "cross-entropy in nats", panels, each_seed=True)


def state_figure(runs: Iterable[str], task: str) -> Figure:
    """Figure 5.5: accuracy at the last example of unseen tasks by the size of the state, and by the number of parameters."""
    learners = dict.fromkeys(run.split()[1].rstrip(",") for run in runs)
    panels = {panel: {learner: [(fact(run, size), reached(task, "task", run, learner=learner))
                                for run in runs if run.startswith(f"learner {learner},")] for learner in learners}
              for size, panel in (("state_size", "numbers in the state"), ("parameters", "parameters"))}
    return Figure("gpicl_state", "size", "accuracy at the last example", panels)


def batch_figure(preset: str) -> Figure:
    """Figures 5.7 and D.11: the length of the plateau by batch size, in meta-steps and in tasks."""
    panels = {panel: {f"{count} tasks": [
        (batch, plateau(f"batch {batch}, num_tasks {count}") * (batch if panel.startswith("tasks") else 1))
        for batch in BATCHES[preset]] for count in (1024, 16384 if preset == "laptop" else 65536)}
        for panel in ("meta-steps in the plateau", "tasks in the plateau")}
    return Figure("gpicl_plateau", "batch size", "", panels, yscale="log")


def statistics_figure() -> Figure:
    """Figure D.9: with and without a plateau, over meta-steps."""
    columns = ["loss", "distance", "gradient norm all", "update norm all", "gradient cosine all", "update cosine all"]
    panels = {column.removesuffix(" all"): {run: [
        (logged("step", run, i), logged(f"transformer{'_' if column == 'loss' else ' '}{column}", run, i)) for i in range(40)]
        for run in ("biased", "plateau")} for column in columns}
    return Figure("gpicl_statistics", "meta-step", "", panels, xscale="linear")


def unseen_entropy(task: str, run: str) -> Number:
    """Figure D.4."""
    return at("transformer", task, None, run, "cross_entropy", "task")


def in_width(one: tuple, novelty: str, learner: str, tasks: int, width: int) -> Number:
    """Figure 5.2: accuracy at the last example. one: dataset, few and many tasks, a small and a large width, other numbers of
    tasks; tasks, width: which of these."""
    return reached(one[0], novelty, f"learner {learner}, num_tasks {one[tasks]}, width {one[width]}", learner=learner)


GPICL = {
    "G1": Row("Fig. 5.2", "Transformer learns from 2^13 tasks, MLP never",
        sweep(SHORT.replace("--width 64 ", ""), learner=["transformer", "mlp"], num_tasks=[64, 1024, 16384], width=[16, 64]),
        per({"laptop": [("digits", 1024, 16384, 16, 64)], "thesis": [("mnist", 2**8, 2**24, 32, 256, 2**16)]}, lambda one: [
            *(in_width(one, "task", "transformer", between, 4) > 0.2 for between in range(5, len(one))),  # from 2^13 on
            in_width(one, "task", "transformer", 2, 4) > 0.2, in_width(one, "task", "transformer", 2, 3) < 0.2,
            in_width(one, "none", "transformer", 1, 4) > 0.2, in_width(one, "task", "transformer", 1, 4) < 0.2,
            in_width(one, "none", "mlp", 1, 4) > 0.2, in_width(one, "task", "mlp", 2, 4) < 0.2,
            in_width(one, "none", "mlp", 1, 4) > in_width(one, "none", "mlp", 1, 3),
            in_width(one, "none", "transformer", 2, 4) > in_width(one, "none", "mlp", 2, 4)]),
        sweep(UNIFORM, learner=["transformer", "mlp"], num_tasks=[2**8, 2**13, 2**16, 2**24], width=[32, 256]),
        figures=lambda preset: [width_figure(preset, *(([64, 1024, 16384], [16, 64]) if preset == "laptop" else
                                                       ([2**8, 2**13, 2**16, 2**24], [32, 256])))]),
    "G2": Row("Fig. 5.3", "rises in context on unseen datasets",
        sweep("gpicl.py --meta-steps 20000 --test-datasets mnist fashion_mnist digits", dataset=BOTH),
        [*(learns(test, "task" if test == name else "domain", f"dataset {name}") > 0.2 for name in BOTH for test in BOTH),
         reached("fashion_mnist", "domain", "dataset mnist")
         > reached("fashion_mnist", "task", "dataset fashion_mnist") - 0.03,
         reached("mnist", "task", "dataset mnist") - reached("mnist", "domain", "dataset fashion_mnist")  # the larger gap
         > reached("fashion_mnist", "task", "dataset fashion_mnist") - reached("fashion_mnist", "domain", "dataset mnist")],
        sweep("gpicl.py --test-datasets mnist fashion_mnist", dataset=BOTH),
        figures=lambda preset: [transfer_figure(preset)]),
    "G3": Row("Table 5.2", "MNIST 73.7 %, SGD 70.3, LSTM 25.4, VSML 79.0",
        {"": "gpicl.py --test-datasets digits fashion_mnist random mnist wine breast_cancer sum_sign",
         "maml": f"gpicl.py --learner maml --maml-lr 0.05 --maml-outer-lr 5e-4 {THREE}",
         "lstm": f"gpicl.py --learner lstm --width 256 --meta-steps 10000 --lr 6e-3 {THREE}",  # Appendix D.4: twice the steps
         "vsml": f"gpicl.py --learner vsml --batch 8 --meta-steps 2000 {THREE}"},
        lambda preset: [*(claim for task, new in ((SET[preset], "task"), ("fashion_mnist", "domain")) for claim in (
                *higher("transformer", ["sgd", "adam"], [task], metric="accuracy", novelty=new),
                *(reached(task, new) > reached(task, new, run, learner=run) for run in ("maml", "lstm")),
                reached(task, new, "vsml", learner="vsml") > reached(task, new),
                reached(task, new) > reached(task, new, "vsml", learner="vsml") - 0.07)),
            reached("random", "domain") > 0.99,
            *(claim for _ in range(preset == "laptop") for claim in higher(
                "transformer", ["sgd", "adam"], ["mnist"], metric="accuracy", novelty="domain")),
            *(reached(task, "domain") > reached(task, "domain", learner="adam") - 0.02
              for task in ("wine", "breast_cancer") if preset == "laptop"),
            *(reached(task, "task" if task == "mnist" else "domain") > value - 0.03
              for task, value in zip(TABLE_DATASETS, TABLE["transformer"], strict=True) if preset == "thesis"),
            *(claim for task in ("kmnist", "cifar10", "svhn") if preset == "thesis"
              for claim in higher("transformer", ["sgd", "adam"], [task], metric="accuracy", novelty="domain"))],
        {"": f"gpicl.py --test-datasets {' '.join(TABLE_DATASETS)}",
         **{name: f"gpicl.py --learner {name} --baselines --test-datasets {' '.join(TABLE_DATASETS)}"
            for name in ("maml", "lstm", "vsml")}},
        figures=lambda preset: [table_figure(preset)]),
    "G4": Row("Fig. 5.4, D.4", "memorises, then identifies, then learns",
        sweep(f"{SHORT} mnist fashion_mnist --meta-steps 6000", num_tasks=MANY["laptop"]),
        per({"laptop": [("digits", 16, 1024, 16384, 4096)], "thesis": [("mnist", 16, 4096, 2**20, 4096)]}, lambda one: [
            fact(f"num_tasks {one[3]}", "final_loss") < fact(f"num_tasks {one[4]}", "final_loss"),
            unseen_entropy(one[0], f"num_tasks {one[3]}") < unseen_entropy(one[0], f"num_tasks {one[4]}"),
            reached(one[0], "none", f"num_tasks {one[1]}", 0) > 0.5, learns(one[0], "none", f"num_tasks {one[1]}") < 0.1,
            learns(one[0], "none", f"num_tasks {one[2]}") > 0.1, learns(one[0], "task", f"num_tasks {one[2]}") < 0.1,
            learns(one[0], "task", f"num_tasks {one[3]}") > 0.1,
            learns("fashion_mnist", "domain", f"num_tasks {one[3]}") > 0.1]),
        sweep(f"{UNIFORM} fashion_mnist --no-normalise-inputs", num_tasks=MANY["thesis"]),
        figures=lambda preset: [figure(preset, MANY[preset]) for figure in (phases_figure, solutions_figure)]),
    "G5": Row("Fig. 5.5", "state size predicts, parameter count less", STATES,
        per({"laptop": [(STATES, "digits")], "thesis": [(FULL_STATES, "mnist")]}, lambda runs: [
            correlation("state_size", *runs) > 0.5, correlation("state_size", *runs) > correlation("parameters", *runs)]),
        FULL_STATES, figures=lambda preset: [state_figure(STATES if preset == "laptop" else FULL_STATES, SET[preset])]),
    "G6": Row("Fig. 5.6, 5.7, D.11", "larger batches shorten the plateau, in tasks they lengthen it",
        sweep(f"{SHORT} --meta-steps 4000", batch=list(BATCHES["laptop"]), num_tasks=[1024, 16384]),
        per({"laptop": [(LEAVES["laptop"], "batch 128, num_tasks 16384", "digits", "batch 128, num_tasks 16384")],
             "thesis": [(LEAVES["thesis"], "batch 128, num_tasks 65536", "fashion_mnist", "batch 2048, num_tasks 65536")],
             }, lambda one: [
            exponent("plateau", one[0]) < 0, exponent("tasks in the plateau", one[0], tasks=True) > 0,
            plateau(one[1]) > plateau("batch 128, num_tasks 1024"), reached(one[2], "task", one[3]) > 0.2,
            reached(one[2], "none", "batch 128, num_tasks 1024") > 0.2,
            reached(one[2], "task", "batch 128, num_tasks 1024") < 0.2,
            unseen_loss("end", slice(-5, None), one[1]) > unseen_loss("start", slice(0, 2), one[1])]),
        sweep(f"{PLATEAU.replace(' --num-tasks 65536', '')} --bias 0 --chunk 512", batch=list(BATCHES["thesis"]),
              num_tasks=[1024, 65536]),
        figures=lambda preset: [batch_figure(preset)]),
    "G7": Row("Fig. 5.8", "no plateau with a biased permutation",
        sweep(f"{SMALL} --bias-end None --test-datasets digits --meta-steps 8000", bias=["0", "0.5", "0.9"]),
        per({"laptop": ["digits"], "thesis": ["fashion_mnist"]}, lambda task: [
            plateau("bias 0.9") < plateau("bias 0") * 0.1, plateau("bias 0.9") < plateau("bias 0.5"),
            plateau("bias 0.5") < plateau("bias 0"), reached(task, "task", "bias 0.9") > 0.2,
            unseen_loss("end", slice(-5, None), "bias 0.9") > unseen_loss("start", slice(0, 2), "bias 0.9")]),
        sweep(PLATEAU, bias=["0", "0.5", "0.9"])),
    "G8": Row("Fig. D.12", "smaller epsilon halves the plateau",
        {**sweep(f"{LONG} --meta-optimizer adam", eps=["1e-4", "1e-6", "1e-8"]),
         "sign": f"{LONG} --meta-optimizer sign --lr 3e-4"},
        [plateau("eps 1e-8") < plateau("eps 1e-4") * 0.5, plateau("sign") < plateau("eps 1e-8")],
        {**sweep(f"{PLATEAU} --bias 0 --meta-steps 100000", eps=["1e-4", "1e-6", "1e-8"]),  # Figure 5.6's plateau takes 35,000
         "sign": f"{PLATEAU} --bias 0 --meta-steps 100000 --meta-optimizer sign --lr 1e-4"}),
    "G9": Row("Fig. 5.9", "ResNet features: about 45 % on CIFAR-10",
        {"features fashion_mnist": "gpicl.py --dataset mnist --meta-steps 20000 --test-datasets mnist digits "
                                   "--features fashion_mnist",
         "features none": "G2.0"},
        per({"laptop": ["features fashion_mnist"], "thesis": ["features resnet50"]}, lambda run: [
            learns("digits" if "fashion" in run else "fashion_mnist", "domain", run) > 0.2,
            *([reached("digits", "domain", run) > reached("digits", "domain", "features none")] if "fashion" in run else
              [reached("cifar10", "domain", run) > 0.42,
               reached("cifar10", "domain", run) > reached("cifar10", "domain", "features none") + 0.2])]),
        sweep("gpicl.py --bias 0 --test-datasets mnist fashion_mnist cifar10", features=["resnet50", "none"]),
        needs="ImageNet weights; on a laptop a network trained on Fashion-MNIST stands in"),
    "G10": Row("Fig. D.7", "longer sequences end at higher accuracy",
        sweep(f"{PLAIN} digits", sequence_length=[20, 40, 80]),
        per({"laptop": [("digits", 20, 40), ("digits", 40, 80)], "thesis": [("mnist", 50, 100), ("mnist", 100, 200)]},
            lambda one: [reached(one[0], "task", f"sequence_length {one[1]}") > 0.2,  # it learns
                         reached(one[0], "task", f"sequence_length {one[1]}")
                         < reached(one[0], "task", f"sequence_length {one[2]}")]),
        sweep(f"{PLAIN} mnist --bias 0", sequence_length=[50, 100, 200])),
    "G11": Row("Fig. D.9, D.10", "small gradients but the last layer's",
        {"biased": f"{FREE} --classes --no-lr-decay --statistics",
         "plateau": f"{FREE} --classes --no-lr-decay --statistics --bias 0"},
        per({"laptop": [1.0], "thesis": [0.5]}, lambda share: [  # of the run that is in the plateau
            gradient_norm("last layer", "plateau", lambda norms: norms["head.weight"]) > gradient_norm(
                "largest other", "plateau", lambda norms: max(norm for name, norm in norms.items() if "head" not in name)),
            statistic("distance", "plateau", share, -1) < statistic("distance", "biased", share, -1),
            *(statistic(f"{what} norm all", "plateau", share) < statistic(f"{what} norm all", "biased", share)
              for what in ("gradient", "update")),
            statistic("update norm all", "plateau", share, -1) < statistic("update norm all", "plateau", share, 0),
            *(claim for what, margin in (("gradient", 0.2), ("update", 0.05)) for claim in within(
                *(statistic(f"{what} cosine all", run, share) for run in ("plateau", "biased")), margin))]),
        {"biased": f"{PLATEAU} --statistics", "plateau": f"{PLATEAU} --bias 0 --statistics"},
        figures=lambda preset: [statistics_figure()]),
    "G12": Row("Fig. D.13", "no grokking",
        sweep(f"{SHORT} --no-lr-decay", num_tasks=[64, 1024], weight_decay=DECAYS),
        per({"laptop": [("digits", 64, 1024, [])], "thesis": [("mnist", 1024, 16384, [65536])]}, lambda one: [
            claim for decay in (f"weight_decay {decay}" for decay in DECAYS) for claim in (
                reached(one[0], "none", f"num_tasks {one[1]}, {decay}") > 0.8,  # memorises, and does no more
                *(reached(one[0], "task", f"num_tasks {few}, {decay}") < 0.2 for few in one[1:3]),
                *(reached(one[0], "task", f"num_tasks {enough}, {decay}") > 0.2 for enough in one[3] if "0.01" in decay))]),
        sweep(f"{UNIFORM} --meta-optimizer adamw", num_tasks=[2**10, 2**14, 2**16], weight_decay=DECAYS)),
    "G13": Row("not in the thesis", "scikit-learn's classifiers after the same examples",
        "gpicl.py --mode test --checkpoint {G3.0}/checkpoint.pt --baselines logistic neighbors forest --test-seeds 256 "
        "--test-datasets digits wine breast_cancer mnist fashion_mnist",
        per({"laptop": [("digits", "task"), ("mnist", "domain"), ("fashion_mnist", "domain"), ("wine", "domain"),
                        ("breast_cancer", "domain")],
             "thesis": [("mnist", "task"), ("fashion_mnist", "domain")]}, lambda one: [
            claim for step in (10, None) for claim in higher("transformer", ["logistic", "neighbors", "forest"], one[:1], step,
                                                             metric="accuracy", novelty=one[1])])),
}

GOALS = ["hidden_goal:1", "hidden_goal:8"]
ONE_GOAL = f"gla.py --envs {GOALS[1]} --test-envs --no-projected --gaps 8 1 2 4 0"
ONE_BODY = "--test-envs --no-projected --gaps 60 20 0"
TWO_WAYS = "--test-envs --no-projected --gaps 60 --baselines one-task no-reward cloning uniform"
EVERYTHING = "--baselines one-task no-reward ad dpt cloning teacher ppo uniform"
FROM_HEADING = ["heading:0", "heading_3d:0", "reacher", "dm_cartpole_swing_up"]  # the first one is meta-trained on
FROM_ANT = ["ant", "Reacher-v4", "half_cheetah", "dm_cartpole_swing_up"]
FROM_CHEETAH = ["half_cheetah", "Reacher-v4", "ant", "dm_cartpole_swing_up"]
FIRST = {"one goal": 0, "goals": 0, "last policy": 0, "headings": 16}  # else 128
HEADINGS_PPO = "--ppo.num-steps 16 --ppo.num-minibatches 1 --ppo.updates 128 --ppo.gamma 0.9"


def rise(learner: str, env: str, run: str) -> Number:
    """In context. What starts from rest is faster soon after with any policy, so there from the first chunk's end on."""
    return at(learner, env, None, run) - at(learner, env, FIRST.get(run, 128), run)


def improves(env: str, run: str) -> Claim:
    return at("gla", env, None, run) > at("gla", env, FIRST.get(run, 128), run)


def ordered(env: str, run: str, learners: list[str]) -> list[Claim]:
    """Each learner ends above the one before."""
    return [at(more, env, run=run) > at(less, env, run=run) for less, more in pairwise(learners)]


def on_a_body(env: str, run: str) -> list[Claim]:
    speed = at("gla", env, run=run, metric="speed")  # apart from the reward: less torque alone raises that
    return [improves(env, run), *ordered(env, run, ["gla, g = 20", "gla"]), *higher("gla", ["uniform"], [env], 0, run),
            speed > at("gla", env, 128, run, "speed"), speed > at("gla, g = 20", env, run=run, metric="speed")]


def both_ways(one: str, other: str, run: str) -> list[Claim]:
    gla, blind = (mean(f"{name}, both ways", [at(name, env, run=run) for env in (one, other)]) for name in ("gla", "no-reward"))
    forward = [at("gla", env, run=run, metric="speed") > 0 for env in (one, other) * (run != "headings")]
    return [*forward, improves(one, run), improves(other, run), gla > blind, *higher("gla", ["one-task"], [other], run=run),
            *higher("one-task", ["uniform"], [one], run=run), at("one-task", other, run=run) < at("one-task", one, run=run)]


def elsewhere(envs: list[str], run: str) -> list[Claim]:
    """It rises, and by more than without rewards, where what is left may rise too within an episode."""
    return [claim for env in envs for claim in (
        improves(env, run), rise("gla", env, run) > rise("no-reward", env, run),
        *higher("gla", ["no-reward", "uniform"], [env], run=run))]


def gaps_figure() -> Figure:
    """Figure 6.3: reward within a lifetime, by the gap: of one goal in the plain grid world, and of an unseen goal."""
    gaps = {"g = 8": "gla", **{f"g = {gap}": f"gla, g = {gap}" for gap in (4, 2, 1, 0)}, "g = 8, no rewards": "no-reward"}
    one, unseen = f"{GOALS[1]}, the only goal", f"{GOALS[1]}, one of two unseen"
    steps = range(4, 129, 4)
    panels = {one: {line: returns(learner, GOALS[1], steps, "one goal") for line, learner in gaps.items()}}
    panels[unseen] = {line: returns(gaps[line], GOALS[1], steps, "goals") for line in ("g = 8", "g = 1", "g = 8, no rewards")}
    panels[unseen]["g = 0"] = returns("gla", GOALS[1], steps, "last policy")
    panels[unseen]["g = 0, no rewards"] = returns("no-reward", GOALS[1], steps, "last policy")
    return Figure("gla_gaps", "environment steps", "reward per step", panels, xscale="linear")


GLA = {
    "L1": Row("Fig. 6.3", "rises in context, faster with larger gaps",
        {"one goal": ONE_GOAL, "goals": "gla.py --gaps 8 1 --baselines no-reward uniform",
         "last policy": "gla.py --gaps 0 --baselines no-reward uniform"},
        lambda preset: [
            improves(GOALS[1], "one goal"),
            *ordered(GOALS[1], "one goal", ["gla, g = 1", "gla, g = 2", "gla, g = 4", "gla"]),
            at("gla, g = 0", GOALS[1], 0, "one goal") > at("gla", GOALS[1], 0, "one goal"),
            *(claim for goal in GOALS * (preset == "laptop") for claim in (
                *ordered(goal, "goals", ["gla, g = 1", "gla"]), *(one for run in ("goals", "last policy") for one in (
                    improves(goal, run), *higher("gla", ["no-reward"], [goal], run=run))))),
            *(on_a_body("ant", "ant") if preset == "thesis" else [])],
        {"one goal": f"{ONE_GOAL} --preset laptop", "ant": f"gla.py --envs ant {ONE_BODY} --test-seeds 64"},
        figures=lambda preset: [gaps_figure()] * (preset == "laptop")),
    "L2": Row("Fig. 6.4", "both directions only if meta-trained on both",
        {"headings": f"gla.py --envs heading:0 heading:180 --batch 12 {TWO_WAYS.replace('--gaps 60', '--gaps 8')}"},
        per({"laptop": [("heading:0", "heading:180", "headings")], "thesis": [("ant:0", "ant:180", "ant")]},
            lambda one: both_ways(*one)),
        {"ant": f"gla.py --envs ant:0 ant:180 {TWO_WAYS} --test-seeds 64"}),
    "L3": Row("Fig. 6.5", "Ant to Reacher, HalfCheetah, Cartpole: rises",
        {"headings": f"gla.py --envs {FROM_HEADING[0]} --test-envs {' '.join(FROM_HEADING[1:])} {HEADINGS_PPO}"},
        per({"laptop": [(FROM_HEADING, "headings")], "thesis": [(FROM_ANT, "")]}, lambda one: elsewhere(*one)),
        "gla.py"),
    "L4": Row("Fig. 6.6", "sooner than PPO, lower at the end",
        f"gla.py --gaps 8 1 0 {EVERYTHING}",
        per({"laptop": [(goal, 160) for goal in GOALS],  # the policy after 128 steps; at the thesis preset an update has 2,048
             "thesis": [(env, 4096) for env in FROM_ANT]},
            lambda one: [claim for gla in ("gla", "gla, g = 0") for claim in (  # the thesis does not name the gap
                at(gla, one[0]) > at("ppo", *one), at(gla, one[0]) < at("ppo", one[0]))]), "L3.0"),
    "L5": Row("Fig. 6.3", "L1 on HalfCheetah",
        f"gla.py --preset bodies {ONE_BODY}", on_a_body("half_cheetah", ""),
        f"gla.py --envs half_cheetah {ONE_BODY} --test-seeds 64", needs="hours on 2 cores"),
    "L6": Row("Fig. 6.4", "L2 on HalfCheetah",
        f"gla.py --preset bodies --envs half_cheetah:0 half_cheetah:180 {TWO_WAYS}",
        both_ways("half_cheetah:0", "half_cheetah:180", ""),
        f"gla.py --envs half_cheetah:0 half_cheetah:180 {TWO_WAYS} --test-seeds 64", needs="hours on 2 cores"),
    "L7": Row("Fig. 6.5", "L3 from HalfCheetah",
        "gla.py --preset bodies", elsewhere(FROM_CHEETAH, ""),
        f"gla.py --envs {FROM_CHEETAH[0]} --test-envs {' '.join(FROM_CHEETAH[1:])}", needs="hours on 2 cores"),
}

CONTROLS = "--baselines no_reward hill_climbing hill_climbing_matched random_search"
ACTION = "with the last action"


def fme(env: str, flags: str = "") -> dict[str, str]:
    """With both sets of inputs."""
    command = f"fme.py --envs {env} {CONTROLS}{flags}"
    return {"": command, ACTION: f"{command} --inputs obs reward action"}


def after_swap(learner: str, pull: int) -> Number:
    """Figure 7.4: its reward at the first, second, ... pull after a swap, over populations and swaps."""
    return Number(f"{learner}, pull {pull} after a swap", lambda seed: seed.fact("", "after_swap")[learner][pull - 1])


def better_when_deep(learner: str, preset: str) -> Number:
    """Of CartPole's lineages: the share of children that are better than their parents, after some modifications minus at
    first."""
    depth = {"laptop": 2, "thesis": 8}[preset]
    deep, first = (at(learner, "cartpole", step, "cartpole", "child_better") for step in (depth, 0))
    return Number(f"{learner}, better children at depth {depth} than at 1", lambda seed: deep.of(seed) - first.of(seed))


def sooner(other: str, env: str, run: str = "") -> Claim:
    """FME's executions until a solution are fewer."""
    return lead(other, env, run=run, what="until_solved") < 0


FME = {
    "F1": Row("Fig. 7.3 left", "solved after about 40, like hill climbing",
        fme("bandit", " --populations 64 --num-parallel 1 --roots 1 --lifetime lineage --executions 200"),  # Algorithm 12
        [at("fme", "bandit", 75) > 0.95, at("fme", "bandit", 75) > at("hill_climbing", "bandit", 75) - 0.05,
         at("fme", "bandit") > 0.95],
        fme("bandit")),
    "F2": Row("Fig. 7.3 right", "100 steps, faster than hill climbing", fme("cartpole", " --populations 16"),
        [at("fme", "cartpole") > 95, sooner("hill_climbing", "cartpole"), lead("hill_climbing", "cartpole") > 0],
        fme("cartpole")),
    "F3": Row("Fig. 7.4", "adapts only with the reward as input", fme("swapping_bandit", " --populations 16"),
        [at("fme", "swapping_bandit") > 0.75,  # weights that do not change have .666 at most
         lead("fme_frozen", "swapping_bandit") > 0, after_swap("fme", 10) > after_swap("fme", 1),
         (at("no_reward", "swapping_bandit") < 0.55)._replace(of_baseline=True)],  # it cannot know which arm is the good one
        fme("swapping_bandit")),
    "F4": Row("not in the thesis", "is it self-modification? Controls of F1 to F3",
        {f"{name}{end}": f"{row}.{index}" for row, name in (("F1", "bandit"), ("F2", "cartpole"), ("F3", "swapping"))
         for index, end in enumerate(("", f" {ACTION}"))},
        lambda preset: [*(sooner("random_search", env, env) for env in ("bandit", "cartpole")),
         *(lead(other, "cartpole", run="cartpole") > 0 for other in ("fme_frozen", "hill_climbing_matched", "random_search")),
         lead("fme_frozen", "bandit", run="bandit") > 0, lead("random_search", "swapping_bandit", run="swapping") > 0,
         at("fme", "bandit", run=f"bandit {ACTION}") > 0.95, lead("hill_climbing", "cartpole", run=f"cartpole {ACTION}") > 0,
         lead("fme_frozen", "swapping_bandit", run=f"swapping {ACTION}") > 0,
         better_when_deep("fme", preset) > better_when_deep("hill_climbing", preset)], needs="F1 to F3 first"),
}
ROWS = METAGENRL | VSML | SYMLA | GPICL | GLA | FME
# fmt: on


# ======================================================================================================================
# Runs
# ======================================================================================================================
LOCKS: defaultdict[str, Lock] = defaultdict(Lock)  # by folder: of several jobs that need a run, one executes it


def finished_run(name: str, index: int, seed: int, preset: str, data_dir: Path, jobs: int = 1) -> Path:
    """The folder of a run that has its results.json: used again, resumed, or started. jobs: how many runs are side by side."""
    command = command_of(name, index, preset)
    if re.fullmatch(SAME_RUN, command):
        other, at_index = re.match(SAME_RUN, command).groups()
        return finished_run(other, int(at_index), seed, preset, data_dir, jobs)

    for other, at_index in re.findall(r"\{([A-Z]\d+)\.(\d+)\}", command):
        folder = finished_run(other, int(at_index), seed, preset, data_dir, jobs)
        command = command.replace(f"{{{other}.{at_index}}}", str(folder.relative_to(ROOT)))

    folder = RUNS / f"{name}-{index}-s{seed}{'' if preset == 'laptop' else '-' + preset}"
    with LOCKS[folder.name]:
        return finished_command(command, folder, seed, preset, data_dir, jobs, f"{name}, seed {seed}")


def finished_command(command: str, folder: Path, seed: int, preset: str, data_dir: Path, jobs: int, words: str) -> Path:
    """The folder once its command has finished."""
    note = folder.with_suffix(".txt")
    if folder.exists() and not (note.exists() and note.read_text() == command):
        raise UserError(f"{folder} was made by another command, which is in {note.name}; delete the folder to run anew.")
    if (folder / "results.json").exists():
        return folder

    RUNS.mkdir(parents=True, exist_ok=True)
    note.write_text(command)
    line = command_line(command, folder, seed, preset, data_dir)
    if (folder / "checkpoint.pt").exists():
        data = ["--data-dir", str(data_dir)] if "--data-dir" in line else []
        line = [*line[:2], "--resume", str(folder), *data]
    execute(line, folder, words, jobs)
    return folder


def command_line(command: str, folder: Path, seed: int, preset: str, data_dir: Path) -> list[str]:
    """What is executed for a command of an entry."""
    script, *flags = command.split()
    if script == "pytest":
        return [sys.executable, "-m", "pytest", "-q", *flags]
    if "--preset" not in flags and "--mode" not in flags:
        flags += ["--preset", preset]
    if script in ("vsml.py", "gpicl.py"):
        flags += ["--data-dir", str(data_dir)]
    return [sys.executable, script, *flags, "--seed", str(seed), "--run-dir", str(folder.parent), "--run-name", folder.name]


def execute(line: list[str], folder: Path, words: str, jobs: int = 1) -> None:
    """Run a command in the repository's folder. Of a test the exit code becomes a result row. Of several jobs each has its
    share of the cores, and a log beside its folder."""
    print(f"\n{words}: python {shlex.join(line[1:])}", flush=True)
    log = folder.with_suffix(".log")
    if jobs == 1:
        code = subprocess.run(line, cwd=ROOT).returncode
    else:
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
        with open(log, "w") as file:
            code = subprocess.run(line, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT).returncode
    if "pytest" in line and code in (0, 1):  # all passed, or some failed
        row = dict(zip(KEYS, ("pytest", "test", "none", "passed", 1, float(code == 0), 0.0, 1), strict=False))
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"device": "CPU", "seconds": {}, "results": [row]}))
    elif code or not (folder / "results.json").exists():
        reason = "above" if jobs == 1 else f"in {log}"
        raise UserError(f"a command ended with exit code {code}; its reason is {reason}.")


def run_side_by_side(names: list[str], preset: str, num_seeds: int, data_dir: Path, jobs: int) -> dict[str, UserError]:
    """Finish all runs of some entries, several at a time, those first that others start from, and commands before seeds: what
    one compiles, its other seeds find. Returns the errors by entry."""
    runs = [
        (name, index, seed)
        for name in names
        for seed in seeds_of(ROWS[name], num_seeds)
        for index in range(len(ROWS[name].commands(preset)))
    ]
    runs.sort(key=lambda run: "{" in command_of(run[0], run[1], preset))
    errors = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [(run[0], pool.submit(finished_run, *run, preset, data_dir, jobs)) for run in runs]
        for name, future in futures:
            if isinstance(error := future.exception(), UserError):
                errors.setdefault(name, error)
            else:
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return errors


def seeds_of(row: Row, num_seeds: int) -> range:
    """Meta-training seeds; a row that needs one only has one."""
    return range(num_seeds if row.enough_seeds > 1 else 1)


def run_entry(name: str, preset: str, num_seeds: int, data_dir: Path) -> None:
    """Run all commands of an entry with all seeds, and save what its claims and tables need."""
    row = ROWS[name]
    seeds = {}
    commands = row.commands(preset)
    plain = {label: re.sub(SAME_RUN, lambda m: command_of(*m.groups(), preset), one) for label, one in commands.items()}
    plain = {label: re.sub(r"\{(\w+)\.(\d+)\}", r"runs/reproduce/\1-\2-s0", one) for label, one in plain.items()}
    saved = read_json(path) if (path := saved_path(name, preset)).exists() else None
    if isinstance(saved, dict) and saved.get("commands") == plain and len(saved["seeds"]) > len(seeds_of(row, num_seeds)):
        raise UserError(f"{len(saved['seeds'])} seeds are saved; take as many --seeds, or delete {path}.")
    for seed in seeds_of(row, num_seeds):
        folders = [finished_run(name, index, seed, preset, data_dir) for index in range(len(commands))]
        runs = dict(zip(commands, map(read_run, folders), strict=True))
        seeds[str(seed)] = compact(name, row, preset, runs)
    torch = version("torch").partition("+")[0]
    claims = [claim.words for claim in row.claims_at(preset)]
    entry = {"row": name, "preset": preset, "commands": plain, "claims": claims, "torch": torch, "seeds": seeds}
    save(name, preset, entry)


SAME_RUN = r"^([A-Z]\d+)\.(\d+)$"


def command_of(name: str, index: int | str, preset: str) -> str:
    return list(ROWS[name].commands(preset).values())[int(index)]


def cell(text: str | None) -> float | None:
    """A number of metrics.csv; None where a line lacks the column or is damaged."""
    try:
        return rounded(float(text))
    except (TypeError, ValueError):
        return None


def read_run(folder: Path) -> dict[str, Any]:
    """results.json, and as curves the columns of metrics.csv at up to 40 steps and the last one."""
    results = read_json(folder / "results.json")
    if not isinstance(results, dict) or not {"results", "seconds", "device"} <= results.keys():
        raise UserError(f"{folder / 'results.json'} is damaged; delete it to run anew.")
    if (folder / "metrics.csv").exists():
        with open(folder / "metrics.csv", newline="", errors="replace") as file:
            lines = list(csv.DictReader(file))
        every = -(-len(lines) // 40) or 1
        lines = lines[: len(lines) - 1 : every] + lines[-1:]
        results["curves"] = {name: [cell(line[name]) for line in lines] for name in (lines[0] if lines else ()) if name}
    return results


# ======================================================================================================================
# The command line
# ======================================================================================================================
def show(name: str, preset: str) -> None:
    """Print the verdict on an entry and its claims."""
    row = ROWS[name]
    entry = checked(name, row, preset)
    if entry is None:
        raise UserError(f"there are no saved rows at the {preset} preset; leave out --check to run it.")
    print(f"\n{name} ({row.figure}), {preset} preset: {weakest(entry[2])}. The thesis: {row.claim}.")
    for outcome in entry[2]:
        sides = f"{text(outcome.left)} and {text(outcome.right)}"
        difference = f"{text(outcome.difference)} ± {text(outcome.error)} (seeds: {outcome.seeds})"
        print(f"  {outcome.claim}: {sides}, difference {difference}, {outcome.verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="entries such as V3 (--list shows all)")
    parser.add_argument("--seeds", type=int, default=ENOUGH_SEEDS, help="meta-training seeds: 0, 1, ...")
    parser.add_argument("--preset", choices=("auto", "laptop", "thesis"), default="auto", help="auto: thesis with CUDA")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where torchvision's datasets are")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the CPU's cores")
    parser.add_argument("--check", action="store_true", help="only check the claims, from saved rows")
    parser.add_argument("--tables", action="store_true", help="only rewrite the tables, from saved rows")
    parser.add_argument("--figures", action="store_true", help="only redraw the figures, from saved rows")
    parser.add_argument("--list", action="store_true", help="show all entries")
    args = parser.parse_args()
    args.data_dir = args.data_dir.absolute()  # scripts run in the repository's folder
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        raise UserError(f"there is no entry {unknown[0]}; --list shows all.")
    if min(args.seeds, args.jobs) < 1:
        raise UserError("--seeds and --jobs have to be at least 1.")
    if args.list or not (args.rows or args.tables or args.figures):
        print("\n".join(f"{name:4} {row.figure:20} {status(name, row)[0]:28} {row.claim}" for name, row in ROWS.items()))
    if args.rows and args.preset == "auto":
        import torch

        args.preset = "thesis" if torch.cuda.is_available() else "laptop"

    errors = {}
    if args.jobs > 1 and not args.check:
        errors = run_side_by_side(args.rows, args.preset, args.seeds, args.data_dir, args.jobs)
    failed = []
    for name in args.rows:
        try:
            if name in errors:
                raise errors[name]
            if not args.check:
                run_entry(name, args.preset, args.seeds, args.data_dir)
            show(name, args.preset)
        except UserError as error:
            failed.append(f"{name}: {error}")
    if args.tables or (args.rows and not args.check):
        for path, new in tables(ROWS).items():
            path.write_text(new)
    if args.figures:
        draw_figures(ROWS)
    if failed:
        raise UserError("\n".join(failed))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"reproduce.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nreproduce.py: stopped; the same command continues from here.")
