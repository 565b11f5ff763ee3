"""What a run measures: metrics.csv and TensorBoard in training, rows of results.json in tests."""

import json
import math
import threading
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class MetricsLog:
    """metrics.csv and TensorBoard events in a run's folder, and Weights & Biases with `track`, the
    flags to show there.

    first: the meta-step that the run starts or continues with. Lines from there on, which a run
    wrote that was cut off after its last checkpoint, are dropped, and so is what is no line.
    started: when the run began, without the time between being cut off and being resumed.
    """

    def __init__(self, folder: Path, first: int, track: dict[str, Any] | None = None):
        if track:
            import wandb

            wandb.init(project="cleanmeta", name=folder.name, config=track, sync_tensorboard=True)
        self.path = folder / "metrics.csv"
        text = self.path.read_text(errors="replace") if self.path.exists() else None
        lines = (text or "").split("\n")[:-1]  # a last line without an end is not whole
        steps = [line.partition(",")[0] for line in lines]
        kept = [
            line
            for line, step in zip(lines, steps, strict=True)
            if step == "step" or (step.isdecimal() and int(step) < first)
        ]
        if kept and not kept[0].startswith("step,"):  # a damaged header
            kept = []

        self.kept = "".join(line + "\n" for line in kept)
        self.first = first
        self.columns = kept[0].split(",")[2:] if kept else []
        self.started = time.time() - seconds_of(kept[-1] if kept else "")
        self.path.touch()

    @cached_property
    def board(self) -> Any:
        """TensorBoard's events. Lines are dropped with the first use, after the checkpoint was
        restored: a run that cannot continue loses none."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        partial = self.path.with_name("metrics.csv.partial")
        partial.write_text(self.kept)
        partial.replace(self.path)
        threading.excepthook = _report_thread
        return SummaryWriter(str(self.path.parent), purge_step=self.first)

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line. The first one names the columns; later ones leave empty what they lack."""
        board = self.board
        if not self.columns:
            self.columns = list(values)
            self.append(["step", "seconds", *self.columns])
        seconds = round(time.time() - self.started, 3)
        self.append([step, seconds, *(values.get(name, "") for name in self.columns)])
        for name, value in values.items():
            board.add_scalar(name, value, step)

    def append(self, cells: list[Any]) -> None:
        with open(self.path, "a") as file:
            file.write(",".join(map(str, cells)) + "\n")


def seconds_of(line: str) -> float:
    """The time in a line of metrics.csv; 0 where there is none."""
    try:
        return float(line.split(",")[1])
    except (IndexError, ValueError):
        return 0.0


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each column of metrics.csv, without cells that are no finite number."""
    lines = (folder / "metrics.csv").read_text(errors="replace").splitlines()
    columns, *lines = [line.split(",") for line in lines] or [[]]
    points: dict[str, list[tuple[int, float]]] = {}
    for cells in lines:
        for name, cell in zip(columns[2:], cells[2:], strict=False):
            try:
                point = int(cells[0]), float(cell)
            except ValueError:
                continue
            if math.isfinite(point[1]):
                points.setdefault(name, []).append(point)
    return points


def _report_thread(error: Any) -> None:
    """Nothing for a disk that TensorBoard's thread finds full: the next `write` raises it too."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def result_row(
    learner: str, task: str, novelty: str, metric: str, step: int, values: Tensor
) -> dict[str, Any]:
    """A row of results.json from the values (seeds,) of independent meta-test runs. std is that of
    the values."""
    row = {"learner": learner, "task": task, "novelty": novelty, "metric": metric, "step": step}
    mean = values.mean().item()
    std = values.std(correction=0).item()
    return row | {"mean": mean, "std": std, "seeds": len(values)}


def plotted_steps(steps: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, 100, ..., with 400, and the last step."""
    points = {base * 10**power for base in (1, 2, 5) for power in range(8)} | {400, steps}
    return sorted(point for point in points if point <= steps)


def overtaken(ours: str, rows: list[dict[str, Any]]) -> dict[str, int]:
    """By learner, of the rows of one task and metric: the step from which on it stays ahead of ours,
    which was ahead before."""
    means: dict[str, dict[int, float]] = {}
    for row in rows:
        means.setdefault(row["learner"], {})[row["step"]] = row["mean"]
    overtaken = {}
    for name, points in means.items():
        ahead = [step for step in points if ours in means and means[ours][step] > points[step]]
        if name != ours and ahead and ahead[-1] < max(points):
            overtaken[name] = min(step for step in points if step > ahead[-1])
    return overtaken


def median_difference(values: list[float], others: list[float]) -> dict[str, float]:
    """The medians of two learners, their difference, and its 95 % bootstrap interval (Efron 1979).
    values and others are of independent repetitions, and drawn in pairs: those at the same place
    have seeds in common."""
    both = torch.tensor([values, others], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (10_000, len(values)), generator=generator)
    median, other = both.quantile(0.5, 1).tolist()
    drawn = both[:, index].quantile(0.5, 2)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (drawn[0] - drawn[1]).quantile(ends).tolist()
    facts = {"median": median, "other": other, "difference": median - other}
    return facts | {"low": low, "high": high}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of text: of the first metric of each task, the first and the last row of each
    learner."""
    metric = {row["task"]: row["metric"] for row in reversed(rows)}
    ends: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["metric"] == metric[row["task"]]:
            key = (row["task"], row["novelty"], row["learner"], row["metric"])
            ends.setdefault(key, []).append(row)

    values = "mean ± standard deviation over rollouts"
    cells = [("task", "novelty", "learner", "metric", "steps", values)]
    for key, of in ends.items():
        first = of[0]
        last = of[-1]
        steps = f"{first['step']} -> {last['step']}"
        values = " -> ".join("{mean:.3f} ± {std:.3f}".format(**row) for row in (first, last))
        cells.append((*key, steps, values))

    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        yield "  ".join(padded).rstrip()


def to_json(value: Any) -> str:
    """Valid JSON, which has null for numbers that are not finite."""
    finite = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1) + "\n"
