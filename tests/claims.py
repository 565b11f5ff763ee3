"""The vocabulary in which tests/reproduce.py states what the thesis claims, and the verdicts.

A claim is an inequality between two numbers of the same meta-training seed, each a result row of a
learner or made of several. Averaged over seeds its difference is *reproduced* above two standard
errors, *as far as it goes* above zero or with fewer than three seeds, else *not reproduced*.
Several claims together are worth their weakest.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

VERDICTS = ("reproduced", "as far as it goes", "not reproduced", "not run")
ENOUGH_SEEDS = 3
KEYS = (
    "learner",
    "task",
    "novelty",
    "metric",
    "step",
    "mean",
    "std",
    "seeds",
    "values",
)  # of a row
NEW = {"none": "seen task", "task": "unseen task", "domain": "unseen"}


class UserError(Exception):
    """Something a user can correct; the message is one sentence that says how."""


class Seed:
    """The runs of one meta-training seed: the contents of results.json by the label of the command.
    Notes what is used: keys of rows without the learner, and `read` with it."""

    def __init__(self, runs: dict[str, dict[str, Any]]):
        self.runs = runs
        self.used = set()
        self.read = set()

    def row(
        self,
        learner: str,
        task: str,
        step: int | None,
        run: str,
        metric: str | None,
        novelty: str | None,
    ) -> dict:
        """The row at the first step from `step` on (None: the last step) of a metric (None: the
        task's first)."""
        rows = [
            row
            for row in self.runs[run]["results"]
            if row["task"] == task and novelty in (None, row["novelty"])
        ]
        metric = metric or (rows[0]["metric"] if rows else None)
        rows = [row for row in rows if row["metric"] == metric and row["learner"] == learner]
        rows = [row for row in rows if row["step"] >= (step or 0)]
        rows.sort(key=lambda row: row["step"])
        if not rows:
            raise LookupError(f"no row of {learner} on {task}")

        row = rows[-1 if step is None else 0]
        key = [row[key] for key in KEYS[:5]]
        self.used.add((run, *key[1:]))
        self.read.add((run, *key))
        return row

    def fact(self, run: str, name: str) -> Any:
        """What results.json has beside its rows."""
        value = self.runs[run][name]
        self.used.add((run, name))
        return value

    def curve(self, run: str, column: str) -> list[float]:
        """A column of metrics.csv at up to 40 lines."""
        value = self.runs[run]["curves"][column]
        self.used.add((run, "curves", column))
        return value

    def columns(self, run: str) -> list[str]:
        return list(self.runs[run]["curves"])


@dataclass(frozen=True, eq=False)
class Number:
    """A number that each meta-training seed has, and words for it. Arithmetic makes further ones; >
    and < make claims."""

    words: str
    of: Callable[[Seed], float]

    def __add__(self, other: "Number | float") -> "Number":
        other = number(other)
        return Number(f"{self.words} + {other.words}", lambda seed: self.of(seed) + other.of(seed))

    def __sub__(self, other: "Number | float") -> "Number":
        other = number(other)
        return Number(f"{self.words} - {other.words}", lambda seed: self.of(seed) - other.of(seed))

    def __mul__(self, factor: float) -> "Number":
        return Number(f"{factor:g} ({self.words})", lambda seed: factor * self.of(seed))

    def __gt__(self, other: "Number | float") -> "Claim":
        return Claim(self, number(other), 1)

    def __lt__(self, other: "Number | float") -> "Claim":
        return Claim(self, number(other), -1)


def number(value: Number | float) -> Number:
    return value if isinstance(value, Number) else Number(f"{value:g}", lambda seed: value)


def at(
    learner: str,
    task: str,
    step: int | None = None,
    run: str = "",
    metric: str | None = None,
    novelty: str | None = None,
    field: str = "mean",
) -> Number:
    """A result row's mean (or std) at the first step from `step` on (None: the last). novelty:
    where tasks share a name."""
    when = "first" if step == 0 else step and f"after {step}"
    what = "deviation" if field == "std" else ""
    words = ", ".join(filter(None, [learner, task, NEW.get(novelty), run, metric, when, what]))

    def of(seed: Seed) -> float:
        value = seed.row(learner, task, step, run, metric, novelty)[field]
        return math.nan if value is None else value  # null in JSON is a number that is not finite

    return Number(words, of)


def mean(words: str, numbers: Iterable[Number]) -> Number:
    numbers = list(numbers)
    return Number(words, lambda seed: statistics.fmean(one.of(seed) for one in numbers))


class Outcome(NamedTuple):
    """A claim over all seeds: both sides and their signed difference on average, its standard
    error, number of seeds."""

    claim: str
    left: float
    right: float
    difference: float
    error: float
    seeds: int
    verdict: str
    of_baseline: bool = False


class Claim(NamedTuple):
    """left > right (sign 1) or left < right (sign -1). of_baseline: it is about baselines alone, for
    example that they learn."""

    left: Number
    right: Number
    sign: int
    of_baseline: bool = False

    @property
    def words(self) -> str:
        return f"{self.left.words} {'>' if self.sign > 0 else '<'} {self.right.words}"

    def not_run(self) -> Outcome:
        return Outcome(self.words, *[math.nan] * 4, 0, "not run", self.of_baseline)

    def check(self, seeds: list[Seed], enough: int = ENOUGH_SEEDS) -> Outcome:
        try:
            left, right = ([side.of(seed) for seed in seeds] for side in (self.left, self.right))
        except (LookupError, TypeError, statistics.StatisticsError):  # a row is missing
            return self.not_run()

        differences = [self.sign * (a - b) for a, b in zip(left, right, strict=True)]
        difference, error, verdict = judge(differences, enough)
        left = statistics.fmean(left)
        right = statistics.fmean(right)
        return Outcome(
            self.words, left, right, difference, error, len(seeds), verdict, self.of_baseline
        )


def higher(
    learner: str, than: Iterable[str], tasks: Iterable[str], *where: Any, **which: Any
) -> list[Claim]:
    """A learner is above others, in each task."""
    return [
        at(learner, task, *where, **which) > at(other, task, *where, **which)
        for task in tasks
        for other in than
    ]


def rises(learner: str, tasks: Iterable[str], run: str = "", **which: Any) -> list[Claim]:
    """A learner's last value is above its first, in each task."""
    return [
        at(learner, task, None, run, **which) > at(learner, task, 0, run, **which) for task in tasks
    ]


def within(left: Number, right: Number | float, margin: float) -> list[Claim]:
    """Left and right differ by less than a margin."""
    return [left > number(right) - margin, left < number(right) + margin]


def judge(differences: list[float], enough: int = ENOUGH_SEEDS) -> tuple[float, float, str]:
    """Mean difference over seeds, its standard error (of one seed: infinite), the verdict on the
    claim that it is positive."""
    count = len(differences)
    if not all(map(math.isfinite, differences)):
        return math.nan, math.nan, "not reproduced"
    difference = statistics.fmean(differences)
    error = math.inf if enough > 1 else 0.0
    if count > 1:
        error = statistics.stdev(differences) / math.sqrt(count)
    if not difference > 0:
        return difference, error, "not reproduced"
    clear = difference > 2 * error and count >= enough
    return difference, error, "reproduced" if clear else "as far as it goes"


def weakest(outcomes: list[Outcome]) -> str:
    """The verdict on claims together. Those that were not run keep the others from being
    reproduced."""
    verdicts = {outcome.verdict for outcome in outcomes} or {"not run"}
    if verdicts == {"reproduced", "not run"}:
        return "as far as it goes"
    return max(verdicts - {"not run"} or verdicts, key=VERDICTS.index)


# ==================================================================================================
# Numbers that are made of several rows, or of what results.json and metrics.csv have beside rows
# ==================================================================================================
def gain(env: str, run: str = "", learner: str = "metagenrl", untrained: str = "") -> Number:
    """MetaGenRL: return above that of the untrained objective, which is in the run `untrained`."""
    return at(learner, env, run=run) - at("untrained", env, run=untrained)


def above_random(learner: str, env: str, run: str) -> Number:
    """SymLA: return above that of uniformly drawn actions."""
    return at(learner, env, run=run) - at("uniform", env, run=run)


def improvement(learner: str, env: str, run: str) -> Number:
    """SymLA: return of a lifetime's second half minus that of its first. The first step is no start to
    compare with: it never reaches a goal and never fails."""

    def of(seed: Seed) -> float:
        whole = seed.row(learner, env, None, run, "return", None)
        half = seed.row(learner, env, -(-whole["step"] // 2), run, "return", None)
        return whole["mean"] - 2 * half["mean"]

    return Number(f"{learner}, {env}, {run}, second half minus first", of)


def reached(
    task: str, novelty: str, run: str = "", step: int | None = None, learner: str = "transformer"
) -> Number:
    """GPICL: accuracy at the last example."""
    return at(learner, task, step, run, "accuracy", novelty)


def learns(task: str, novelty: str, run: str) -> Number:
    """GPICL: accuracy at the last example minus that at the first."""
    return reached(task, novelty, run) - reached(task, novelty, run, 0)


def without_worst(env: str, run: str) -> Number:
    """MetaGenRL: deviation over a seed's agents without the worst third."""

    def of(seed: Seed) -> float:
        values = sorted(seed.row("metagenrl", env, None, run, None, None)["values"])
        return statistics.pstdev(values[len(values) // 3 :])

    return Number(f"metagenrl, {env}, {run}, deviation without the worst third", of)


def fact(run: str, *names: str) -> Number:
    def of(seed: Seed) -> float:
        value = seed.fact(run, names[0])
        for name in names[1:]:
            value = value[name]
        return value

    return Number(" ".join((*names, run)).strip(), of)


def plateau(run: str) -> Number:
    """GPICL: meta-steps until the loss left its plateau, at most all."""

    def of(seed: Seed) -> float:
        end = seed.fact(run, "plateau")
        return seed.curve(run, "step")[-1] if end is None else end

    return Number(f"plateau, {run}", of)


def logged_plateau(seed: Seed, run: str) -> int:
    """GPICL: how many of at most 40 lines of metrics.csv are of the plateau."""
    return sum(step < plateau(run).of(seed) for step in seed.curve(run, "step"))


def exponent(words: str, runs: dict[float, str], tasks: bool = False) -> Number:
    """GPICL: of the power law between batch size and the steps of the plateau, or the tasks in
    it."""

    def of(seed: Seed) -> float:
        values = [plateau(run).of(seed) * (batch if tasks else 1) for batch, run in runs.items()]
        return statistics.linear_regression(
            list(map(math.log, runs)), list(map(math.log, values))
        ).slope

    return Number(f"exponent of {words} against batch size", of)


def correlation(what: str, runs: Iterable[str], task: str) -> Number:
    """GPICL: of the last accuracy on unseen tasks with the logarithm of a size."""

    def of(seed: Seed) -> float:
        reached = [
            at(run.split()[1].rstrip(","), task, run=run, novelty="task").of(seed) for run in runs
        ]
        return statistics.correlation([math.log(seed.fact(run, what)) for run in runs], reached)

    return Number(f"correlation of accuracy with {what}", of)


def unseen_loss(words: str, part: slice, run: str) -> Number:
    """GPICL: the logged loss on unseen tasks in a part of the plateau."""

    def of(seed: Seed) -> float:
        return statistics.fmean(
            seed.curve(run, "transformer_loss_unseen")[: logged_plateau(seed, run)][part]
        )

    return Number(f"loss on unseen tasks, {words} of the plateau", of)


def logged(column: str, run: str, index: int | None = None) -> Number:
    """A column of metrics.csv at one of at most 40 lines, or its mean."""

    def of(seed: Seed) -> float:
        curve = seed.curve(run, column)
        return statistics.fmean(curve) if index is None else curve[index]

    return Number(f"{column}, {run}".removesuffix(", "), of)


def deviation(env: str, run: str, agents: int) -> Number:
    """MetaGenRL: over the agents in an environment while they are meta-trained, from an unbiased estimate
    of the variance. agents: how many there are."""

    def of(seed: Seed) -> float:
        variances = [std**2 * agents / (agents - 1) for std in seed.curve(run, f"{env}_reward_std")]
        return math.sqrt(statistics.fmean(variances))

    return Number(f"{env}, deviation over agents, {run}".removesuffix(", "), of)


def statistic(what: str, run: str, share: float, index: int | None = None) -> Number:
    """GPICL: of gradients or updates, on average over the first share of the run's lines, or at one of
    these lines."""

    def of(seed: Seed) -> float:
        curve = seed.curve(run, f"transformer {what}")
        part = curve[: math.ceil(share * len(curve))]
        return statistics.fmean(part) if index is None else part[index]

    return Number(f"{what}, {run}" + {0: ", first", -1: ", last"}.get(index, ""), of)


def curve(column: str, run: str) -> list[tuple[Number, Number]]:
    """MetaGenRL: a column of metrics.csv at up to 40 meta-steps."""
    return [(logged("step", run, index), logged(column, run, index)) for index in range(40)]


def returns(learner: str, env: str, steps: Iterable[int], run: str = "") -> list[tuple[int, Number]]:
    """MetaGenRL and GLA: the curve of a meta-test, without steps that have no row."""

    def of(step: int, seed: Seed) -> float:
        row = seed.row(learner, env, step, run, None, None)
        if row["step"] != step:
            raise LookupError(f"no row of {learner} on {env} at {step}")
        return row["mean"]

    return [(step, Number(f"{learner}, {env}, {step}", partial(of, step))) for step in steps]


def gradient_norm(words: str, run: str, choose: Callable[[dict[str, float]], float]) -> Number:
    """GPICL: a norm of gradients, averaged over the plateau."""

    def of(seed: Seed) -> float:
        columns = [
            column
            for column in seed.columns(run)
            if column.startswith("transformer gradient norm ") and not column.endswith(" all")
        ]
        norms = {column.split()[-1]: seed.curve(run, column) for column in columns}
        return statistics.fmean(
            choose({name: curve[line] for name, curve in norms.items()})
            for line in range(logged_plateau(seed, run))
        )

    return Number(f"gradient norm in the plateau, {words}", of)


def lead(
    other: str, env: str, end: str = "difference", run: str = "", what: str = "achieved"
) -> Number:
    """FME: its median over populations minus that of another learner, or an end, low or high, of
    the interval of this difference over populations."""
    ends = {"difference": "", "low": ", low end", "high": ", high end"}[end]
    words = f"fme - {other}, {env}, {run}, {what.replace('_', ' ')}{ends}".replace(" ,", "")
    return Number(words, lambda seed: seed.fact(run, "differences")[what][f"{env} {other}"][end])


# ==================================================================================================
# Entries
# ==================================================================================================
class Figure(NamedTuple):
    """A figure over the runs of an entry: in each panel lines of points (x, y), or with `matrix` a
    heat-map with a row for each line and a column for each x. y, and x where it is a Number, are
    numbers of each seed. each_seed: a thin line for each seed beside the mean. limits: the numbers at
    both ends of the colours of all heat-maps (default: each one's own)."""

    name: str
    xlabel: str
    ylabel: str
    panels: dict[str, dict[str, list[tuple[Number | float | str, Number]]]]
    xscale: str = "log"
    yscale: str = "linear"
    matrix: bool = False
    each_seed: bool = False
    limits: tuple[float | None, float | None] = (None, None)

    def points(self, seed: Seed) -> list[tuple[str, str, float | str, float]]:
        """(panel, line, x, y) of one seed, without those whose rows are missing."""
        points = []
        for panel, lines in self.panels.items():
            for line, some in lines.items():
                for x, y in some:
                    try:
                        at = x.of(seed) if isinstance(x, Number) else x
                        points.append((panel, line, at, y.of(seed)))
                    except (LookupError, TypeError):
                        continue
        return points


class Row(NamedTuple):
    """An experiment. Claims name commands by their labels, and may depend on the preset. {V3.0} in
    a command is the folder of V3's first command with the same seed; V3.0 as a command is that run
    itself. thesis: the commands at that preset, where they differ. needs: why it was never run."""

    figure: str
    claim: str
    laptop: str | dict[str, str]
    claims: list[Claim] | Callable[[str], list[Claim]]
    thesis: str | dict[str, str] | None = None
    needs: str = ""
    enough_seeds: int = ENOUGH_SEEDS
    figures: Callable[[str], list[Figure]] = lambda preset: []

    def commands(self, preset: str) -> dict[str, str]:
        commands = self.laptop if preset == "laptop" or self.thesis is None else self.thesis
        return {"": commands} if isinstance(commands, str) else commands

    def claims_at(self, preset: str) -> list[Claim]:
        return self.claims(preset) if callable(self.claims) else self.claims


def per(
    values: dict[str, Iterable[Any]], claims: Callable[[Any], list[Claim]]
) -> Callable[[str], list[Claim]]:
    """The same claims for each of a preset's values, such as its environments."""
    return lambda preset: [claim for value in values[preset] for claim in claims(value)]


def sweep(command: str, **values: Iterable[Any]) -> dict[str, str]:
    """A command for each combination of flags, with a label such as "num_tasks 64, width 16"."""
    commands = {}
    for combination in product(*values.values()):
        flags = [f"{name} {value}" for name, value in zip(values, combination, strict=True)]
        names = [name.replace("_", "-") for name in values]
        typed = (f"--{name} {value}" for name, value in zip(names, combination, strict=True))
        commands[", ".join(flags)] = " ".join([command, *typed])
    return commands
