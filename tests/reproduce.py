"""The thesis' experiments and claims as code: one entry each, checked over at least three meta-training seeds.

    python tests/reproduce.py --list                     # all entries and where they stand
    python tests/reproduce.py V3 S1 F1                   # run what is not finished, check, rewrite the tables
    python tests/reproduce.py V3 --preset thesis         # at the thesis' scale, on a GPU
    python tests/reproduce.py V3 --check                 # only check the claims, from the saved rows
    python tests/reproduce.py --tables                   # only rewrite the tables, from the saved rows

An entry has commands and claims. A claim is an inequality between numbers of the same meta-training seed, left > right. Its
difference, averaged over seeds, is *reproduced* above two standard errors, *as far as it goes* above zero or with fewer than
three seeds, else *not reproduced*. An entry stands where its weakest claim stands.

Runs are kept in runs/reproduce/ROW-COMMAND-sSEED: finished ones are used again, cut-off ones are resumed. The rows that claims
and tables need are kept in .github/results/rows/, from which the tables of the results pages and of the README are made.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "reproduce"
PAGES = ROOT / ".github" / "results"
SCRIPTS = {"M": "metagenrl", "V": "vsml", "S": "symla", "G": "gpicl", "L": "gla", "F": "fme"}
VERDICTS = ("reproduced", "as far as it goes", "not reproduced", "not run")
ENOUGH_SEEDS = 3


class UserError(Exception):
    """Something a user can correct; the message is one sentence that says how."""


# ======================================================================================================================
# Claims
# ======================================================================================================================
class Seed:
    """The finished runs of one meta-training seed: results by the label of the command. Notes which rows were used."""

    def __init__(self, runs: dict[str, dict[str, Any]]):
        self.runs, self.used = runs, set()

    def row(self, learner: str, task: str, step: int | None, run: str, metric: str | None, novelty: str | None) -> dict:
        """The row at the first step from `step` on (None: the last step) of a metric (None: the task's first)."""
        rows = [row for row in self.runs[run]["results"] if row["task"] == task and novelty in (None, row["novelty"])]
        rows = [row for row in rows if row["metric"] == (metric or rows[0]["metric"]) and row["learner"] == learner]
        rows = sorted((row for row in rows if row["step"] >= (step or 0)), key=lambda row: row["step"])
        if not rows:
            raise LookupError(f"no row of {learner} on {task}")
        row = rows[-1 if step is None else 0]
        self.used.add((run, *(row[key] for key in ("task", "novelty", "metric", "step"))))
        return row

    def fact(self, run: str, name: str) -> Any:
        """What results.json holds beside its rows."""
        self.used.add((run, name))
        return self.runs[run][name]


@dataclass(frozen=True, eq=False)
class Number:
    """A number that each meta-training seed has, and words for it. Arithmetic makes further ones, > and < make claims."""

    words: str
    of: Callable[[Seed], float]

    def combine(self, sign: str, other: "Number | float", operate: Callable[[float, float], float]) -> "Number":
        other = constant(other)
        return Number(f"{self.words} {sign} {other.words}", lambda seed: operate(self.of(seed), other.of(seed)))

    def __add__(self, other: "Number | float") -> "Number":
        return self.combine("+", other, lambda a, b: a + b)

    def __sub__(self, other: "Number | float") -> "Number":
        return self.combine("-", other, lambda a, b: a - b)

    def __mul__(self, other: "Number | float") -> "Number":
        return self.combine("x", other, lambda a, b: a * b)

    def __gt__(self, other: "Number | float") -> "Claim":
        return Claim(self, constant(other), 1)

    def __lt__(self, other: "Number | float") -> "Claim":
        return Claim(self, constant(other), -1)


def constant(value: Number | float) -> Number:
    return value if isinstance(value, Number) else Number(f"{value:g}", lambda seed: value)


def at(
    learner: str,
    task: str,
    step: int | None = None,
    run: str = "",
    metric: str | None = None,
    novelty: str | None = None,
) -> Number:
    """The mean of a result row."""
    words = [learner, task, run, novelty and f"{novelty} new", step is not None and f"after {step}"]
    arguments = (learner, task, step, run, metric, novelty)
    return Number(", ".join(filter(None, words)), lambda seed: seed.row(*arguments)["mean"])


def mean(words: str, numbers: Iterable[Number]) -> Number:
    numbers = list(numbers)
    return Number(words, lambda seed: statistics.fmean(number.of(seed) for number in numbers))


def within(left: Number, right: Number | float, margin: float) -> list["Claim"]:
    """Left and right differ by less than a margin."""
    return [left > constant(right) - margin, left < constant(right) + margin]


class Outcome(NamedTuple):
    """A claim over all seeds: both sides and their signed difference on average, its standard error, number of seeds."""

    claim: str
    left: float
    right: float
    difference: float
    error: float
    seeds: int
    verdict: str


class Claim(NamedTuple):
    """left > right (sign 1) or left < right (sign -1)."""

    left: Number
    right: Number
    sign: int

    def check(self, seeds: list[Seed], enough: int = ENOUGH_SEEDS) -> Outcome:
        words = f"{self.left.words} {'>' if self.sign > 0 else '<'} {self.right.words}"
        try:
            left, right = ([side.of(seed) for seed in seeds] for side in (self.left, self.right))
        except (LookupError, TypeError):  # a learner or a data set that was not at hand
            return Outcome(words, math.nan, math.nan, math.nan, math.nan, 0, "not run")
        differences = [self.sign * (a - b) for a, b in zip(left, right, strict=True)]
        difference, error, verdict = judge(differences, enough)
        return Outcome(words, statistics.fmean(left), statistics.fmean(right), difference, error, len(seeds), verdict)


def judge(differences: list[float], enough: int = ENOUGH_SEEDS) -> tuple[float, float, str]:
    """Mean difference over seeds, its standard error (of one seed: infinite), and the verdict on a claim that it is positive."""
    count = len(differences)
    difference = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.inf if enough > 1 else 0.0
    if not difference > 0:
        return difference, error, "not reproduced"
    return difference, error, "reproduced" if difference > 2 * error and count >= enough else "as far as it goes"


def weakest(outcomes: list[Outcome]) -> str:
    """The verdict on an entry. Claims that were not run keep it from being reproduced."""
    verdicts = {outcome.verdict for outcome in outcomes} or {"not run"}
    if verdicts == {"reproduced", "not run"}:
        return "as far as it goes"
    return max(verdicts - {"not run"} or verdicts, key=VERDICTS.index)


# ======================================================================================================================
# Entries
# ======================================================================================================================
class Row(NamedTuple):
    """An experiment. Commands have labels, which claims name; {V3.0} stands for the folder of command 0 of V3 with the same
    seed, and a command V3.0 for that run itself."""

    figure: str
    thesis: str
    laptop: str | dict[str, str]
    full: str | dict[str, str]
    claims: list[Claim]
    needs: str = ""
    enough: int = ENOUGH_SEEDS

    def commands(self, preset: str) -> dict[str, str]:
        commands = self.laptop if preset == "laptop" else self.full
        return {"": commands} if isinstance(commands, str) else commands


def until_solved(learner: str, env: str) -> Number:
    """Executions until a population's first good one, on average; of a population that has none, all it had."""

    def of(seed: Seed) -> float:
        most = max(row["step"] for row in seed.runs[""]["results"] if row["task"] == env)
        return statistics.fmean(most if n is None else n for n in seed.fact("", "solved_after")[f"{env} {learner}"])

    return Number(f"{learner}, {env}, executions until solved", of)


FIVE = [f"{name}_bandit" for name in ("independent", "dependent", "easy", "medium", "hard")]
PAIRS = {name: mean(f"{name}, 25 pairs", [at(name, b, run=a) for a in FIVE for b in FIVE]) for name in ("symla", "rnn", "uniform")}
V3 = "vsml.py --dataset mnist --test-datasets mnist fashion_mnist"
S1 = {env: f"symla.py --envs {env}" for env in FIVE}

ROWS = {
    "V3": Row(
        "Fig. 3.6",
        "faster at first than online SGD and Adam, also on unseen Fashion-MNIST; in-context RNN overfits",
        V3,
        V3,
        [
            at("vsml", "mnist", 100) > at("sgd", "mnist", 100),
            at("vsml", "mnist", 100) > at("adam", "mnist", 100),
            at("vsml", "fashion_mnist", 100) > at("sgd", "fashion_mnist", 100),
            at("vsml", "fashion_mnist", 100) > at("adam", "fashion_mnist", 100),
            at("vsml", "fashion_mnist") > at("vsml", "fashion_mnist", 10),
            at("vsml", "fashion_mnist") > at("rnn", "fashion_mnist"),
            at("rnn", "mnist") - at("rnn", "fashion_mnist") > at("vsml", "mnist") - at("vsml", "fashion_mnist"),
        ],
    ),
    "S1": Row(
        "Fig. 4.3",
        "regret comparable to the in-context RNN (mean of 25 pairs 1.70 and 1.86, largest lag .63)",
        S1,
        S1,
        [
            PAIRS["symla"] < PAIRS["rnn"] + 0.63,
            PAIRS["symla"] < constant(1.86) + 0.63,
            PAIRS["symla"] < PAIRS["uniform"],
        ],
    ),
    "F1": Row(
        "Fig. 7.3 left",
        "always the better arm after about 40 self-modifications, as effective as hill climbing",
        "fme.py --envs bandit --baselines hill_climbing",
        "fme.py --envs bandit --baselines hill_climbing",
        [
            until_solved("fme", "bandit") < 80,
            at("fme", "bandit") > 0.95,
            *within(at("fme", "bandit"), at("hill_climbing", "bandit"), 0.05),
        ],
    ),
}


# ======================================================================================================================
# Runs
# ======================================================================================================================
def run_folder(name: str, number: int, seed: int, preset: str) -> Path:
    return RUNS / f"{name}-{number}-s{seed}{'' if preset == 'laptop' else '-' + preset}"


def finished_run(name: str, number: int, seed: int, preset: str, data_dir: Path) -> Path:
    """The folder of a run, with its results.json: used again, resumed, or started."""
    command = list(ROWS[name].commands(preset).values())[number]
    if re.fullmatch(r"[A-Z]\d+\.\d+", command):
        other, index = command.split(".")
        return finished_run(other, int(index), seed, preset, data_dir)
    for other, index in re.findall(r"\{([A-Z]\d+)\.(\d+)\}", command):
        folder = finished_run(other, int(index), seed, preset, data_dir)
        command = command.replace(f"{{{other}.{index}}}", str(folder.relative_to(ROOT)))
    folder = run_folder(name, number, seed, preset)
    line = command_line(command, folder, seed, preset, data_dir)
    note = folder.with_suffix(".txt")
    if folder.exists() and note.exists() and note.read_text() != command:
        raise UserError(f"{folder.relative_to(ROOT)} was made by another command ({note.name}); delete it to run anew.")
    if (folder / "results.json").exists():
        return folder
    if (folder / "checkpoint.pt").exists():
        line = [*line[:2], "--resume", str(folder.relative_to(ROOT))]
    elif folder.exists():
        shutil.rmtree(folder)  # cut off before its first checkpoint
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(command)
    print(f"\n{name}, seed {seed}: python {shlex.join(line[1:])}", flush=True)
    code = subprocess.run(line, cwd=ROOT).returncode
    if line[1:3] == ["-m", "pytest"]:
        folder.mkdir(exist_ok=True)
        row = dict(learner="test", task="passed", novelty="none", metric="passed", step=1, mean=float(code == 0), std=0.0, seeds=1)
        results = {"device": "cpu", "seconds": {}, "results": [row]}
        (folder / "results.json").write_text(json.dumps(results))
    elif code or not (folder / "results.json").exists():
        raise UserError(f"a command of {name} ended with exit code {code}; its reason stands above.")
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
    where = ["--run-dir", str(folder.parent.relative_to(ROOT)), "--run-name", folder.name]
    return [sys.executable, script, *flags, "--seed", str(seed), *where]


def run_entry(name: str, preset: str, num_seeds: int, data_dir: Path) -> None:
    """Run all commands of an entry with all seeds, and save the rows that its claims and tables need."""
    row = ROWS[name]
    commands = row.commands(preset)
    if not commands:
        raise UserError(f"{name} has no command at the {preset} preset: {row.needs}.")
    seeds = {}
    for seed in range(num_seeds if row.enough > 1 else 1):
        folders = [finished_run(name, number, seed, preset, data_dir) for number in range(len(commands))]
        seeds[seed] = dict(zip(commands, (read_json(folder / "results.json") for folder in folders), strict=True))
    saved = {
        "row": name,
        "preset": preset,
        "commands": commands,
        "torch": version("torch").partition("+")[0],
        "seeds": {str(seed): compact(runs, row.claims) for seed, runs in seeds.items()},
    }
    path = saved_path(name, preset)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved).replace('"results": [', '"results": [\n').replace("], [", "],\n[") + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete its folder to run anew.") from error


# ======================================================================================================================
# Saved rows
# ======================================================================================================================
KEYS = ("learner", "task", "novelty", "metric", "step", "mean", "std", "seeds")


def saved_path(name: str, preset: str) -> Path:
    return PAGES / "rows" / f"{name}-{preset}.json"


def compact(runs: dict[str, dict[str, Any]], claims: list[Claim]) -> list[dict[str, Any]]:
    """Of each run device, seconds, the facts that claims use, and all learners' rows where claims use one."""
    seed = Seed(runs)
    for claim in claims:
        claim.check([seed])
    short = []
    for label, results in runs.items():
        used = {key[1:] for key in seed.used if key[0] == label}
        rows = [row for row in results["results"] if tuple(row[key] for key in KEYS[1:5]) in used]
        rows = [[*(row[key] for key in KEYS[:5]), *(rounded(row[key]) for key in KEYS[5:7]), row["seeds"]] for row in rows]
        facts = {key[0]: results[key[0]] for key in used if len(key) == 1}
        seconds = round(sum(results["seconds"].values()))
        short.append({"device": results["device"], "seconds": seconds, "facts": facts, "results": rows})
    return short


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def read_seeds(saved: dict[str, Any]) -> list[Seed]:
    """The seeds of saved rows, as claims read them."""
    seeds = []
    for runs in saved["seeds"].values():
        plain = [{**run["facts"], "results": [dict(zip(KEYS, row, strict=True)) for row in run["results"]]} for run in runs]
        seeds.append(Seed(dict(zip(saved["commands"], plain, strict=True))))
    return seeds


def outcomes_of(name: str, preset: str) -> list[Outcome]:
    """The claims of an entry, checked on its saved rows; none where there are none."""
    path = saved_path(name, preset)
    seeds = read_seeds(read_json(path)) if path.exists() else []
    return [claim.check(seeds, ROWS[name].enough) for claim in ROWS[name].claims] if seeds else []


# ======================================================================================================================
# The command line
# ======================================================================================================================
def show(name: str, preset: str) -> None:
    outcomes = outcomes_of(name, preset)
    print(f"\n{name} ({ROWS[name].figure}), preset {preset}: {weakest(outcomes)}. The thesis: {ROWS[name].thesis}.")
    for o in outcomes:
        print(f"  {o.claim}: {text(o.left)} and {text(o.right)}, by {text(o.difference)} ± {text(o.error)} ({o.seeds} seeds), {o.verdict}")


def text(value: float) -> str:
    """A number with three digits."""
    if not math.isfinite(value):
        return "?"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="entries such as V3 (--list shows all)")
    parser.add_argument("--seeds", type=int, default=ENOUGH_SEEDS, help="meta-training seeds: 0, 1, ...")
    parser.add_argument("--preset", choices=("auto", "laptop", "thesis"), default="auto", help="auto: thesis with CUDA")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where torchvision's datasets are")
    parser.add_argument("--check", action="store_true", help="only check the claims, from saved rows")
    parser.add_argument("--list", action="store_true", help="show all entries")
    args = parser.parse_args()
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown or args.seeds < 1:
        raise UserError(f"There is no entry {unknown[0]}; --list shows all." if unknown else "--seeds has to be at least 1.")
    if args.list or not args.rows:
        for name, row in ROWS.items():
            print(f"{name:4} {row.figure:22} {row.thesis}")
        return
    if args.preset == "auto":
        import torch

        args.preset = "thesis" if torch.cuda.is_available() else "laptop"
    failed = []
    for name in args.rows:
        try:
            if not args.check:
                run_entry(name, args.preset, args.seeds, args.data_dir)
            show(name, args.preset)
        except UserError as error:
            failed.append(f"{name}: {error}")
    if failed:
        raise UserError("\n".join(failed))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"reproduce.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nreproduce.py: stopped; the same command goes on from here.")
