"""The rows that tests/reproduce.py saves, and the tables and figures made of them.

.github/results/rows/ROW-PRESET.json has for each seed and command the device, seconds, and the
facts and rows that claims use. In the README and on the results pages a table is between
`<!-- reproduce:NAME begin -->` and `<!-- reproduce:NAME end -->`.
"""

import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from claims import ENOUGH_SEEDS, KEYS, VERDICTS, Figure, Outcome, Row, Seed, UserError, weakest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / ".github" / "results"
SCRIPTS = {"M": "metagenrl", "V": "vsml", "S": "symla", "G": "gpicl", "L": "gla", "F": "fme"}

# The README's figure: entry, task, logarithmic steps; and a panel of an earlier figure, used until
# the entry has saved rows.
STRIP = {
    "MetaGenRL": ("M1", "pendulum", False, "metagenrl_unseen.png", (400, 0, 830, 345)),
    "VSML": ("V3", "fashion_mnist", True, "vsml_transfer.png", (440, 0, 876, 312)),
    "SymLA": ("S1", "independent_bandit", False, "symla_bandits.png", (0, 0, 398, 312)),
    "GPICL": ("G2", "fashion_mnist", False, "gpicl_accuracy.png", (827, 4, 1232, 314)),
    "GLA": ("L4", "hidden_goal:8", True, "gla_goals.png", (900, 265, 1200, 520)),
    "FME": ("F1", "bandit", False, "fme_self_modifications.png", (0, 0, 502, 358)),
}
NOT_IN_STRIP = ("gla, g = 1", "one-task", "ad", "dpt", "cloning", "teacher")  # where there are too many lines


# ==================================================================================================
# Saved rows
# ==================================================================================================
def saved_path(name: str, preset: str) -> Path:
    return PAGES / "rows" / f"{name}-{preset}.json"


def save(name: str, preset: str, entry: dict[str, Any]) -> None:
    """Write the saved rows of an entry: a line for each row."""
    path = saved_path(name, preset)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r'(?=\["|\{"device)', "\n", json.dumps(entry)) + "\n")


def compact(
    name: str, row: Row, preset: str, runs: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """What is saved of a seed's runs: where a claim uses a row, those of all learners; the rows of
    figures; of metrics.csv the columns that are read; for the README's figure whole curves."""
    seed, drawn = Seed(runs), Seed(runs)
    for claim in row.claims_at(preset):
        claim.check([seed])  # notes in `seed` what it reads
    for figure in row.figures(preset):
        figure.points(drawn)

    short = []
    for label, results in runs.items():
        first = label == next(iter(runs))
        strip = [task for entry, task, *_ in STRIP.values() if first and entry == name]
        rows = []
        for one in results["results"]:
            key = (label, *(one[key] for key in KEYS[:5]))
            kept = (label, *key[2:]) in seed.used or key in drawn.read
            if kept or (one["task"] in strip and in_strip(one["learner"])):
                rows.append([rounded(one[key]) for key in KEYS if key in one])

        used = {key[1:] for key in seed.used | drawn.used if key[0] == label}
        facts = {key[0]: results[key[0]] for key in used if len(key) == 1}
        columns = sorted(key[1] for key in used if len(key) == 2)
        if columns:
            facts["curves"] = {column: rounded(results["curves"][column]) for column in columns}
        seconds = round(sum(results["seconds"].values()))
        device = {"device": results["device"], "seconds": seconds}
        short.append(device | {"facts": facts, "results": rows})
    return short


def in_strip(learner: str) -> bool:
    """Whether the README's figure has a line of this learner."""
    return "%" not in learner and learner not in NOT_IN_STRIP  # %: of meta-training


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete it to run anew.") from error


def checked(
    name: str, row: Row, preset: str
) -> tuple[dict[str, Any], list[Seed], list[Outcome]] | None:
    """The saved entry, its seeds and its claims, checked on them; None where nothing was saved. A claim
    that is newer than the rows counts as not run: the steps that it reads may not be among them."""
    if not saved_path(name, preset).exists():
        return None
    saved = read_json(saved_path(name, preset))
    seeds = []
    try:
        for runs in saved["seeds"].values():
            results = [
                run["facts"] | {"results": [dict(zip(KEYS[: max(8, len(r))], r, strict=True)) for r in run["results"]]}
                for run in runs
            ]
            seeds.append(Seed(dict(zip(saved["commands"], results, strict=True))))
            [(run["device"], float(run["seconds"])) for run in runs]
        outcomes = [
            claim.check(seeds, row.enough_seeds) if claim.words in saved["claims"] else claim.not_run()
            for claim in row.claims_at(preset)
        ]
        str(saved["torch"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{saved_path(name, preset)} is of another version; delete it to run anew.") from error
    return saved, seeds, outcomes


# ==================================================================================================
# Tables
# ==================================================================================================
def status(name: str, row: Row) -> tuple[str, str]:
    """Verdict of an entry, at the thesis preset if it was run there; both sides of the claim that
    decides, and how many claims are reproduced, of those about the method if there are any."""
    for preset in ("thesis", "laptop"):
        if entry := checked(name, row, preset):
            saved, _, outcomes = entry
            break
    else:
        return (f"not run: {row.needs}" if row.needs else "earlier run"), ""

    verdict = weakest(outcomes)
    of_verdict = [outcome for outcome in outcomes if outcome.verdict == verdict]
    deciding = min(of_verdict or outcomes, key=lambda one: (one.of_baseline, margin(one)))
    counted = [one for one in outcomes if not one.of_baseline] or outcomes
    reproduced = sum(outcome.verdict == "reproduced" for outcome in counted)
    numbers = f"{text(deciding.left)} vs {text(deciding.right)} ({reproduced}/{len(counted)})"
    if is_test(saved["commands"]):
        numbers = "test passes" if deciding.left else "test fails"
    return verdict + (" (thesis preset)" if preset == "thesis" else ""), numbers


def margin(outcome: Outcome) -> float:
    """How far a claim is from failing, in standard errors; the least where it was not run."""
    if not math.isfinite(outcome.difference):
        return -math.inf
    return outcome.difference / (outcome.error or 1e-12)


def is_test(commands: dict[str, str]) -> bool:
    """Whether the claim of an entry is a test's exit code."""
    return all(command.startswith("pytest") for command in commands.values())


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def status_table(rows: dict[str, Row]) -> str:
    """README: how many entries have which verdict, and all entries."""
    lines = []
    verdicts: Counter[str] = Counter()
    for name, row in rows.items():
        verdict, numbers = status(name, row)
        verdicts[verdict if verdict in VERDICTS[:3] else "without a verdict"] += 1
        anchor = "earlier-runs" if verdict == "earlier run" else name.lower()
        link = f"[`{name}`](.github/results/{SCRIPTS[name[0]]}.md#{anchor})"
        lines.append([row.figure, link, verdict, numbers, row.claim])
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items(), key=order_of_verdicts))
    summary = f"Of {len(rows)} entries: {counts}."
    return f"{summary}\n\n" + table(["figure", "`reproduce.py`", "verdict", "here", "thesis"], lines)


def more_seeds(name: str, row: Row) -> str:
    """The flag of an entry that was run over more seeds than by default."""
    entry = checked(name, row, "laptop")
    seeds = len(entry[1]) if entry else 0
    return f" --seeds {seeds}" if seeds > ENOUGH_SEEDS else ""


def order_of_verdicts(item: tuple[str, int]) -> int:
    return VERDICTS.index(item[0]) if item[0] in VERDICTS else len(VERDICTS)


def page_text(script: str, rows: dict[str, Row]) -> str:
    """Results page: all entries of a script, then those that were run."""
    own = {name: row for name, row in rows.items() if SCRIPTS[name[0]] == script}
    lines = [
        [
            f'<a id="{name.lower()}"></a>{row.figure}',
            f"`python tests/reproduce.py {name}{more_seeds(name, row)}`",
            *status(name, row),
            row.claim,
        ]
        for name, row in own.items()
    ]
    parts = [table(["figure", "command", "verdict", "here", "thesis"], lines)]
    runs = [(name, row, preset) for name, row in own.items() for preset in ("thesis", "laptop")]
    parts += [section(*run) for run in runs if saved_path(run[0], run[2]).exists()]
    return "\n\n".join(parts)


def section(name: str, row: Row, preset: str) -> str:
    """One entry at one preset: commands, claims, and the rows that they use, as means and standard
    errors over seeds."""
    saved, seeds, outcomes = checked(name, row, preset)
    runs = [run for seed in saved["seeds"].values() for run in seed]
    head = f"### {name}, {row.figure}: {weakest(outcomes)}" + f", {preset} preset" * (not is_test(saved["commands"]))

    minutes = sum(run["seconds"] for run in runs) / len(seeds) / 60
    device = re.sub("^1 CPU threads$", "1 CPU thread", runs[0]["device"])
    word = "Seed" if len(seeds) == 1 else "Seeds"
    time = f"{minutes:.0f} minutes" if minutes >= 1.5 else "about a minute" if minutes > 0.5 else "seconds"
    numbers = ", ".join(saved["seeds"])
    conditions = f"{word} {numbers}; {device}; torch {saved['torch']}; {time} a seed."

    commands = "\n".join(
        f"    python {command}" + (f"  # {label}" if label and not in_flags(label, command) else "")
        for label, command in saved["commands"].items()
    )
    commands = commands.replace("python pytest", "python -m pytest")
    commands = re.sub(r"(runs/reproduce/\S+?-s)\d+/", r"\1SEED/", commands)
    if is_test(saved["commands"]):
        return "\n\n".join([head, f"A test, run with torch {saved['torch']}.", commands])

    claims = []
    for one in outcomes:
        difference = f"{text(one.difference)} ± {text(one.error)}"
        claims.append([one.claim, text(one.left), text(one.right), difference, one.verdict])
    claim_head = ["claim", "left", "right", "difference ± standard error", "verdict"]

    cells: dict[tuple, dict[str, list[float]]] = {}
    used = set().union(*(seed.used for seed in seeds))
    for seed in seeds:
        for label, results in seed.runs.items():
            for one in results["results"]:
                key = (label, *(one[key] for key in KEYS[1:5]))
                if key in used:
                    value = math.nan if one["mean"] is None else one["mean"]
                    cells.setdefault(key, {}).setdefault(one["learner"], []).append(value)
    learners = list(dict.fromkeys(learner for cell in cells.values() for learner in cell))
    lines = []
    for (label, task, novelty, metric, step), cell in cells.items():
        values = [over_seeds(cell.get(learner)) for learner in learners]
        lines.append([label, task, novelty, metric.replace("_", " "), str(step), *values])

    row_head = ["run", "task", "new", "metric", "after", *learners]
    parts = [head, conditions, commands, table(claim_head, claims)]
    if lines:
        parts.append(table(row_head, lines))
    for figure in row.figures(preset):
        if (PAGES / f"{figure.name}.png").exists():
            parts.append(f"![{name}]({figure.name}.png)")
    return "\n\n".join(parts)


def in_flags(label: str, command: str) -> bool:
    """Whether a run's label, such as "batch 16, num_tasks 64", only repeats flags of its command."""
    flags = (f"--{part.replace('_', '-')} " for part in label.split(", "))
    return all(flag in f"{command} " for flag in flags)


def over_seeds(values: list[float] | None) -> str:
    if not values:
        return ""
    mean = text(statistics.fmean(values))
    if len(values) == 1 or mean == "?":
        return mean
    return f"{mean} ± {text(statistics.stdev(values) / math.sqrt(len(values)))}"


def text(value: float) -> str:
    """A number with three digits."""
    if not math.isfinite(value):
        return "?"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def tables(rows: dict[str, Row]) -> dict[Path, str]:
    """README and results pages with what stands between their markers made anew."""
    blocks = {ROOT / "README.md": ("status", status_table(rows))}
    for script in SCRIPTS.values():
        blocks[PAGES / f"{script}.md"] = (script, page_text(script, rows))

    new = {}
    for path, (name, block) in blocks.items():
        begin, end = (f"<!-- reproduce:{name} {word} -->" for word in ("begin", "end"))
        old = path.read_text() if path.exists() else ""
        if begin not in old or end not in old:
            raise UserError(
                f"{path} has no markers for its table; write {begin} and {end} into it."
            )
        new[path] = f"{old.partition(begin)[0]}{begin}\n\n{block}\n\n{end}{old.partition(end)[2]}"
    return new


# ==================================================================================================
# Figures
# ==================================================================================================
def draw_figures(rows: dict[str, Row]) -> None:
    """The figures of all entries with saved rows, over their seeds; then the README's."""
    for name, row in rows.items():
        for preset in ("laptop", "thesis"):
            for figure in row.figures(preset):
                if entry := checked(name, row, preset):
                    draw(figure, [figure.points(seed) for seed in entry[1]])
    draw_strip(rows)


def draw(figure: Figure, seeds: list[list[tuple[str, str, float | str, float]]]) -> None:
    """Means over seeds and their standard errors."""
    sys.path.insert(0, str(ROOT))
    from common import figures

    values: dict[tuple, list[float]] = {}
    for panel, line, x, y in chain(*seeds):
        values.setdefault((panel, line, x), []).append(y)
    path = PAGES / f"{figure.name}.png"
    if figure.matrix:
        cells: dict[str, dict[tuple[str, str], float]] = {}
        for (panel, line, x), ys in values.items():
            cells.setdefault(panel, {})[line, str(x)] = statistics.fmean(ys)
        figures.matrix(cells, path, figure.ylabel, limits=figure.limits)
        return

    rows = []
    for (panel, line, x), ys in values.items():
        deviation = statistics.stdev(ys) if len(ys) > 1 else 0.0
        row = {"task": panel, "learner": line, "step": x, "mean": statistics.fmean(ys)}
        row |= {"std": deviation, "seeds": len(ys)} | ({"values": ys} if figure.each_seed else {})
        rows.append(row)
    lines = dict.fromkeys(row["learner"] for row in rows)
    styles = {line: f"C{i}o-" for i, line in enumerate(lines)}
    axis = {"xlabel": figure.xlabel, "ylabel": figure.ylabel}
    axis |= {"xscale": figure.xscale, "yscale": figure.yscale}
    figures.plot(rows, path, styles=styles, columns=3, standard_error=True, **axis)


def draw_strip(rows: dict[str, Row]) -> None:
    """A panel for each script: a task's first metric by learner, from saved rows; else a panel of
    an earlier figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (2.9 * len(STRIP), 2.6)
    figure, axes = plt.subplots(1, len(STRIP), figsize=size, layout="constrained")
    for axis, (script, panel) in zip(axes, STRIP.items(), strict=True):
        name, task, logarithmic, earlier, (left, top, right, bottom) = panel
        entry = checked(name, rows[name], "laptop")
        if entry is None:
            axis.imshow(plt.imread(PAGES / earlier)[top:bottom, left:right], aspect="auto")
            axis.set_title(script)
            axis.axis("off")
            continue

        drawn = []
        for seed in entry[1]:
            first = next(iter(seed.runs.values()))
            drawn += [row for row in first["results"] if row["task"] == task]
        metric = drawn[0]["metric"]
        curves: dict[str, dict[int, list[float]]] = {}
        for row in drawn:
            if row["metric"] == metric and in_strip(row["learner"]):
                curve = curves.setdefault(row["learner"], {})
                curve.setdefault(row["step"], []).append(row["mean"])

        for learner, curve in curves.items():
            means = [statistics.fmean(values) for values in curve.values()]
            axis.plot(curve.keys(), means, ".-", label=learner, markersize=3)
        scale = "log" if logarithmic else "linear"
        axis.set(title=f"{script}: {task}", ylabel=metric.replace("_", " "))
        axis.set(xlabel="step", xscale=scale)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.savefig(PAGES / "strip.png", dpi=100)
    plt.close(figure)
