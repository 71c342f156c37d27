"""The results of the ablations as tables and as a figure."""

import importlib.util
from functools import reduce
from operator import getitem

import numpy as np

from lab import toy
from lab.ablation.runs import SEEDS, SIZES, VARIANTS, Variant
from lab.evals.toy import ANSWERS, EACH
from lab.metrics import wilson
from training.config import Config


class Row:
    """The runs of a variant. Its name says so where seeds are missing."""

    def __init__(self, variant: Variant, results: list[dict]):
        self.runs = [result for result in results if result["variant"] == variant.name]
        few = f" ({len(self.runs)} of {SEEDS} seeds)" if len(self.runs) < SEEDS else ""
        self.name, self.videos = variant.name + few, sum(result["videos"] for result in self.runs)

    def share(self, what: str) -> tuple[float, float, float]:
        """Percent of all videos of all seeds, with its Wilson interval."""
        count = sum(result[what] for result in self.runs)
        return tuple(100 * x for x in (count / self.videos, *wilson(count, self.videos)))

    def spread(self, *keys: str) -> tuple[float, float, float]:
        """Mean, least and largest value over the seeds, read under some nested keys."""
        values = [reduce(getitem, keys, result) for result in self.runs]
        return sum(values) / len(values), min(values), max(values)


def rows_of(results: list[dict]) -> dict[str, Row]:
    """Rows by variant, without those that have no runs."""
    rows = {variant.name: Row(variant, results) for variant in VARIANTS}
    return {name: row for name, row in rows.items() if row.runs}


def cell(numbers, digits: int) -> str:
    middle, low, high = (f"{x:.{digits}f}" for x in numbers)
    return f"{middle} [{low}, {high}]"


def tables(results: list[dict]):
    """Yield lines of Markdown."""
    rows, at, asked = rows_of(results), list(results[0]["loss"]), list(results[0]["px a frame"])
    shares = ("color", "shape", "direction", "background", "wrong cuts")
    yield from heading("", [*(f"{name}, %" for name in shares), "trajectories", "loss", "worth of direction, %"])
    for row in rows.values():
        cells = [cell(row.share(name), 0) for name in shares]
        cells += [cell(row.spread("trajectories"), 0), cell(row.spread("loss", at[-1], "video"), 4),
                  cell(row.spread("worth of direction"), 1)]
        yield line(row.name, cells)
    yield from ["", *heading("px a frame", [f"{fps} FPS (true {toy.SPEED / float(fps):.1f})" for fps in asked])]
    for row in pick(rows, "both", "both, no FPS embedding"):
        yield line(row.name, [cell(row.spread("px a frame", fps), 2) for fps in asked])
    for kind in ("image", "video"):
        yield from ["", *heading(f"loss of {kind}s", [f"step {step}" for step in at])]
        for row in pick(rows, "neither", "both", "both, gated"):
            yield line(row.name, [cell(row.spread("loss", step, kind), 3) for step in at])
    yield from second_level(rows.values())


def second_level(rows):
    """Yield lines of Markdown: what rows, each with a name and runs, have right on level 2 of the toy world; none where
    no run was graded on it."""
    graded = {row.name: [run["level 2"] for run in row.runs if "level 2" in run] for row in rows}
    graded = {name: seen for name, seen in graded.items() if seen}
    if graded:
        columns = (*ANSWERS, "all", "wrong cuts", "mixed up")
        yield from ["", *heading("level 2, %", columns)]
        for name, seen in graded.items():
            videos = sum(one["videos"] for one in seen)
            totals = [(sum(one[what] for one in seen), videos * (2 if what in EACH else 1)) for what in columns]
            yield line(name, [cell([100 * x for x in (count / of, *wilson(count, of))], 0) for count, of in totals])


def line(name: str, cells: list[str]) -> str:
    return " | ".join(["| " + name, *cells]) + " |"


def heading(name: str, cells: list[str]) -> list[str]:
    return [line(name, cells), "|---|" + "---|" * len(cells)]


def pick(rows: dict[str, Row], *names: str) -> list[Row]:
    return [rows[name] for name in names if name in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The figure


def require_matplotlib():
    """Raise ValueError where it is missing: now, not after hours."""
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError('the figure needs matplotlib: pip install -e ".[dev]"')


def draw_figure(results: list[dict], path: str):
    """Draw four panels: Table 2, Figure 7, speed against FPS, and what the gate does to the loss."""
    from matplotlib.figure import Figure  # of the extra `dev`

    drawing = Figure(figsize=(11, 7), layout="constrained")
    axes, rows = list(drawing.subplots(2, 2).flat), rows_of(results)
    draw_table(axes[0], rows)
    draw_sizes(axes[1], rows)
    draw_speeds(axes[2], rows, list(results[0]["px a frame"]))
    draw_losses(axes[3], rows, list(results[0]["loss"]))
    for panel in axes:
        panel.legend(fontsize=8, ncols=2)
    drawing.savefig(path, dpi=100)


def draw_table(panel, rows: dict[str, Row]):
    shown = pick(rows, "neither", "triple data", "mixed embedding", "both")
    for n, name in enumerate(("color", "shape", "direction", "wrong cuts")):
        numbers = [row.share(name) for row in shown]
        panel.bar([i + 0.2 * (n - 1.5) for i in range(len(shown))], [middle for middle, *_ in numbers], 0.18,
                  yerr=whiskers(numbers), capsize=2, label=name)
    panel.set_xticks(range(len(shown)), [row.name for row in shown], fontsize=8)
    panel.set(title="Table 2 in small", ylabel="% of videos of held-out prompts", ylim=(0, 110))  # room for the legend


def draw_sizes(panel, rows: dict[str, Row]):
    names = {f"{n} videos": n for n in SIZES} | {"mixed embedding": Config.toy_clips}
    known = {n: rows[name] for name, n in names.items() if name in rows}
    for name in ("shape", "direction"):
        curve(panel, list(known), [row.share(name) for row in known.values()], label=name)
    panel.set(title="Figure 7 in small", xscale="log", xlabel="videos", ylabel="%")


def draw_speeds(panel, rows: dict[str, Row], asked: list[str]):
    fps = [float(name) for name in asked]
    for row in pick(rows, "both", "both, no FPS embedding"):
        curve(panel, fps, [row.spread("px a frame", name) for name in asked], label=row.name)
    panel.plot(fps, [toy.SPEED / f for f in fps], "k--", label="true")
    panel.set(title="What the FPS embedding says", xticks=fps, xlabel="FPS asked for", ylabel="px a frame")


def draw_losses(panel, rows: dict[str, Row], at: list[str]):
    for n, row in enumerate(pick(rows, "neither", "both", "both, gated")):
        for kind, style in (("image", "--"), ("video", "-")):
            curve(panel, range(len(at)), [row.spread("loss", step, kind) for step in at], color=f"C{n}",
                  linestyle=style, label=f"{row.name}, {kind}s")
    panel.set_xticks(range(len(at)), at)
    panel.set(title="Adding the mixed embedding to an image model", xlabel="steps of fine-tuning", ylabel="loss")


def curve(panel, x, numbers, **style):
    panel.errorbar(x, [middle for middle, *_ in numbers], whiskers(numbers), capsize=2, marker="o", **style)


def whiskers(numbers):
    """Turn (middle, low, high) of each point into what matplotlib wants, lengths down and up (2, N)."""
    return np.array([(max(middle - low, 0), max(high - middle, 0)) for middle, low, high in numbers]).T
