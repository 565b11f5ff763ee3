"""Figures: lines over steps from rows of results.json, matrices of numbers, probabilities, errors,
paths in a grid."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def pyplot() -> Any:
    """matplotlib.pyplot, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plain(text: str) -> str:
    """As it is: matplotlib would read what is between dollars as a formula."""
    return text.replace("$", r"\$")


def plot(
    rows: Sequence[dict[str, Any]],
    path: Path,
    *,
    xlabel: str = "",
    ylabel: str = "",
    labels: dict[str, str] | None = None,
    titles: dict[str, str] | None = None,
    styles: dict[str, str] | None = None,
    standard_error: bool = False,
    columns: int = 4,
    **axis: Any,
) -> None:
    """A panel for each task of the rows, in it a line for each learner: the mean over steps and a band
    around it.

    The band is one standard deviation, or with `standard_error` that of the mean. A row's optional
    "values" are drawn as thin lines, one for each seed. labels, titles: what to write for a line and
    a panel; styles: matplotlib's color and dashes for a line, such as
    "k--". Further arguments go to matplotlib's axis.set.
    """
    panels = list(dict.fromkeys(row["task"] for row in rows))
    lines = list(dict.fromkeys(row["learner"] for row in rows))
    columns = min(columns, len(panels))
    height = math.ceil(len(panels) / columns)
    size = (1 + 3.4 * columns, 0.9 + 2.7 * height)
    figure, axes = pyplot().subplots(
        height, columns, figsize=size, squeeze=False, layout="constrained"
    )

    handles = {}
    for ax, name in zip(axes.flat, panels, strict=False):
        for number, of in enumerate(lines):
            points = [row for row in rows if row["task"] == name and row["learner"] == of]
            if points:
                style = (styles or {}).get(of, f"C{number}")
                handles[plain((labels or {}).get(of, of))] = draw_line(ax, points, style, standard_error)
        ax.set(title=plain((titles or {}).get(name, name)), xlabel=xlabel, ylabel=ylabel, **axis)
        ax.title.set_fontsize("medium")
        ax.grid(alpha=0.3)
        ticks = sorted({row["step"] for row in rows if row["task"] == name})
        if ax.get_xscale() == "log" and len(ticks) <= 8:  # matplotlib's own overlap within a decade
            size = 7 if len(ticks) > 6 else None
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False, fontsize=size)
            ax.set_xticks([], minor=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)

    band = "standard error of the mean" if standard_error else "standard deviation"
    wide = max(map(len, handles)) + 8  # of a label and its line, in characters
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=max(1, 52 * columns // wide),
        title=f"band: {band}" if any(row["std"] for row in rows) else None,
        fontsize="small",
    )
    save(figure, path)


def draw_line(
    ax: Any, points: Sequence[dict[str, Any]], style: str, standard_error: bool
) -> Any:
    """Mean and band of the rows `points`, and their "values" if all have them. Returns the line."""
    xs = np.array([row["step"] for row in points])
    mean = np.array([row["mean"] for row in points])
    band = np.array([row["std"] for row in points])
    if standard_error:
        band = band / np.sqrt([row["seeds"] for row in points])

    (handle,) = ax.plot(xs, mean, style)
    if len(points) == 1:
        handle.set_marker(".")
    color = handle.get_color()
    ax.fill_between(xs, mean - band, mean + band, color=color, alpha=0.15, linewidth=0)
    if all("values" in row for row in points):
        values = [row["values"] for row in points]
        ax.plot(xs, values, color=color, alpha=0.5, linewidth=0.6)
    return handle


def matrix(
    cells: dict[str, dict[tuple[str, str], float]],
    path: Path,
    title: str = "",
    digits: int = 3,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """A heat-map for each name in `cells`, one under the other, of its numbers by (row, column).

    limits: the numbers at both ends of the colours, the same for all (default: each heat-map's
    own).
    """
    columns = list(dict.fromkeys(column for numbers in cells.values() for _, column in numbers))
    heights = [len({row for row, _ in numbers}) for numbers in cells.values()]
    size = (3.5 + 0.9 * len(columns), 1.5 + 0.45 * sum(heights) + 0.4 * len(cells))
    figure, axes = pyplot().subplots(
        len(cells),
        1,
        figsize=size,
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for ax, (name, numbers) in zip(axes.flat, cells.items(), strict=True):
        rows = list(dict.fromkeys(row for row, _ in numbers))
        grid = np.full((len(rows), len(columns)), np.nan)
        for (row, column), number in numbers.items():
            grid[rows.index(row), columns.index(column)] = number
        image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
        for (row, column), number in np.ndenumerate(grid):
            dark = image.norm(number) < 0.6
            text = "" if np.isnan(number) else f"{number:.{digits}g}"
            ax.text(column, row, text, ha="center", va="center", color="w" if dark else "k")
        ax.set_title(name)
        ax.set_yticks(range(len(rows)), rows)
        ax.set_xticks(
            range(len(columns)),
            columns if ax is axes.flat[-1] else [""] * len(columns),
            rotation=30,
            ha="right",
        )
    figure.suptitle(title)
    save(figure, path)


def heat_maps(
    rows: dict[str, list[tuple[Any, Any]]], path: Path, columns: dict[str, int]
) -> None:
    """Heat-maps of the probabilities (t, b) of classes as examples arrive, in a column each. The class y
    (t,) of an example is framed, the predicted one dotted.

    rows: by their titles, pairs of probabilities and y, side by side. columns: by their titles, the
    relative widths.
    """
    figure, axes = pyplot().subplots(
        len(rows),
        len(columns),
        figsize=(18, 2.4 * len(rows)),
        width_ratios=list(columns.values()),
        squeeze=False,
        layout="constrained",
    )
    for (title, pairs), row in zip(rows.items(), axes, strict=True):
        for ax, column, (p, y) in zip(row, columns, pairs, strict=True):
            ax.imshow(p.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            ax.plot(y, "s", mfc="none", mec="tab:red", ms=7)
            ax.plot(p.argmax(1), ".", color="black", ms=4)
            ax.set(title=f"{title}: {column}", xlabel="examples seen", ylabel="class")
            for axis in (ax.xaxis, ax.yaxis):
                axis.get_major_locator().set_params(integer=True)
    save(figure, path)


def grid_paths(
    lifetimes: dict[str, tuple[int, Any]], size: int, path: Path, steps: int = 12
) -> None:
    """Paths in grids of size by size cells: a column for each title, and in rows the first, the
    middle and the last steps of a lifetime.

    lifetimes: the goal's cell, which ends an episode, and the cells (t, 2) before and after each
    step.
    """
    figure, axes = pyplot().subplots(
        3, len(lifetimes), figsize=(0.6 + 1.3 * len(lifetimes), 4.7), squeeze=False, layout="constrained"
    )
    for (title, (goal, cells)), column in zip(lifetimes.items(), axes.T, strict=True):
        column[0].set_title(plain(title), fontsize="small")
        count = min(steps, len(cells))
        drift = np.linspace(-0.3, 0.3, count + 1)
        for ax, first in zip(column, (0, (len(cells) - count) // 2, len(cells) - count), strict=True):
            part = cells[first : first + count]
            y, x = np.stack(np.divmod(part, size)) + np.stack([drift[:-1], drift[1:]], 1)
            starts = np.r_[first == 0, part[:-1, 1] == goal]
            ax.imshow(np.arange(size**2).reshape(size, size) == goal, cmap="Greens", vmax=4)
            ax.plot(x.T, y.T, "C0-")
            ax.plot(x[starts, 0], y[starts, 0], "k.", ms=4)
            lines = np.arange(size - 1) + 0.5
            ax.set(xticks=lines, yticks=lines, xticklabels=[], yticklabels=[])
            ax.set_ylabel(f"steps {first + 1} to {first + count}" if ax in axes[:, 0] else "")
            ax.grid(alpha=0.6)
    words = ("green: goal", "dots: starts of episodes", "lines drift to the lower right with time")
    figure.supxlabel(("; " if len(lifetimes) > 3 else "\n").join(words), fontsize="small")
    save(figure, path)


def error_map(x: Any, w: Any, y: Any, target: Any, path: Path, title: str) -> None:
    """A function of x and w and its target, all on one grid (w, x): lines over x, and the error
    everywhere."""
    error = abs(y - target)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for row in range(0, len(w), 20):
        (line,) = left.plot(x[row], y[row], label=f"w = {round(w[row, 0].item())}")
        left.plot(x[row], target[row], ":", color=line.get_color())
    left.set(title=f"{title} (dotted: target)", xlabel="x", ylabel="y")
    left.legend()
    extent = (x.min(), x.max(), w.min(), w.max())
    image = right.imshow(error, origin="lower", extent=extent, aspect="auto")
    right.set(title=f"absolute error, {error.mean():.3f} on average", xlabel="x", ylabel="w")
    figure.colorbar(image)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
