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
    """The runs of a variant. Its name says so where seeds are missing.

    steps  at which they were looked at; methods take the last one unless they are told another
    """

    def __init__(self, variant: Variant, results: list[dict]):
        self.runs = [result["curve"] for result in results if result["variant"] == variant.name]
        few = f" ({len(self.runs)} of {SEEDS} seeds)" if len(self.runs) < SEEDS else ""
        self.name, self.variant, self.steps = variant.name + few, variant, list(self.runs[0]) if self.runs else []

    def values(self, *keys: str, step="") -> list:
        """What each run says under some nested keys."""
        return [reduce(getitem, keys, run[step or self.steps[-1]]) for run in self.runs]

    def share(self, what: str, step="") -> tuple[float, float, float]:
        """Percent of the videos of all runs, with its Wilson interval."""
        count, videos = (sum(self.values(name, step=step)) for name in (what, "videos"))
        return tuple(100 * x for x in (count / videos, *wilson(count, videos)))

    def each(self, what: str, step="") -> str:
        """Percent of the videos of each run: runs differ by more than an interval over all videos says."""
        counts, videos = (self.values(name, step=step) for name in (what, "videos"))
        shares = (100 * count / of for count, of in zip(counts, videos))
        return ", ".join(f"{share:.0f}" for share in sorted(shares))

    def spread(self, *keys: str, step="") -> tuple[float, float, float]:
        """Mean, least and largest value over the runs, under some nested keys."""
        values = self.values(*keys, step=step)
        return sum(values) / len(values), min(values), max(values)


def rows_of(results: list[dict], variants=VARIANTS) -> dict[str, Row]:
    """Rows by variant, without those that have no runs."""
    rows = {variant.name: Row(variant, results) for variant in variants}
    return {name: row for name, row in rows.items() if row.runs}


def cell(numbers, digits: int) -> str:
    middle, low, high = (f"{x:.{digits}f}" for x in numbers)
    return f"{middle} [{low}, {high}]"


SHARES = "color", "shape", "direction", "background", "wrong cuts"
TABLE_2 = "neither", "triple data", "mixed embedding", "both"


def tables(results: list[dict]):
    """Yield lines of Markdown."""
    rows = rows_of(results)
    steps, fps_values = next((row.steps, row.values("px a frame")[0]) for row in rows.values())
    columns = [*(f"{name}, %" for name in SHARES), "direction by run, %", "trajectories", "loss",
               "worth of direction, %"]
    yield from heading("", columns)
    yield from (line(row.name, cells(row)) for row in rows.values())
    yield from ["", *heading("as many videos", ["step", *columns])]
    for row in pick(rows, *TABLE_2):  # half of the samples of triple data are videos
        step = steps[-1] if row.variant.triple_data else steps[len(steps) // 2]
        yield line(row.name, [step, *cells(row, step)])
    yield from ["", *heading("px a frame", [f"{fps} FPS (true {toy.SPEED / float(fps):.1f})" for fps in fps_values])]
    for row in pick(rows, "both", "both, no FPS embedding"):
        yield line(row.name, [cell(row.spread("px a frame", fps), 2) for fps in fps_values])
    for kind in ("image", "video"):
        yield from ["", *heading(f"loss of {kind}s", [f"step {step}" for step in steps])]
        for row in pick(rows, "neither", "both", "both, gated"):
            yield line(row.name, [cell(row.spread(kind, step=step), 3) for step in steps])
    yield from second_level(rows.values())


def cells(row: Row, step="") -> list[str]:
    return [*(cell(row.share(name, step), 0) for name in SHARES), row.each("direction", step),
            cell(row.spread("trajectories", step=step), 0), cell(row.spread("video", step=step), 4),
            cell(row.spread("worth of direction", step=step), 1)]


def second_level(rows):
    """Yield lines of Markdown: what rows, each with a name and runs, have right on level 2 of the toy world; none where
    no run was graded on it."""
    graded = {row.name: row.values("level 2") for row in rows if "level 2" in row.runs[0][row.steps[-1]]}
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
    draw_speeds(axes[2], rows)
    draw_losses(axes[3], rows)
    for panel in axes:
        panel.legend(fontsize=8, ncols=2)
    drawing.savefig(path, dpi=100)


def draw_table(panel, rows: dict[str, Row]):
    shown = pick(rows, *TABLE_2)
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


def draw_speeds(panel, rows: dict[str, Row]):
    for row in pick(rows, "both", "both, no FPS embedding"):
        asked = list(row.values("px a frame")[0])
        fps = [float(name) for name in asked]
        curve(panel, fps, [row.spread("px a frame", name) for name in asked], label=row.name)
        panel.plot(fps, [toy.SPEED / f for f in fps], "k--")
    panel.set(title="What the FPS embedding says (dashed: true)", xlabel="FPS asked for", ylabel="px a frame")


def draw_losses(panel, rows: dict[str, Row]):
    for n, row in enumerate(pick(rows, "neither", "both", "both, gated")):
        for kind, style in (("image", "--"), ("video", "-")):
            curve(panel, [int(step) for step in row.steps], [row.spread(kind, step=step) for step in row.steps],
                  color=f"C{n}", linestyle=style, label=f"{row.name}, {kind}s")
    panel.set(title="Adding the mixed embedding to an image model", xlabel="steps of fine-tuning", ylabel="loss")


def curve(panel, x, numbers, **style):
    panel.errorbar(x, [middle for middle, *_ in numbers], whiskers(numbers), capsize=2, marker="o", **style)


def whiskers(numbers):
    """Turn (middle, low, high) of each point into what matplotlib wants, lengths down and up (2, N)."""
    return np.array([(max(middle - low, 0), max(high - middle, 0)) for middle, low, high in numbers]).T
