"""Figure 2 in small: how soon each way to see time learns, against steps and against seconds."""

import statistics
from dataclasses import replace

import torch

from lab.ablation.report import Row, cell, curve, heading, line, rows_of, second_level
from lab.ablation.runs import WAYS, config_of
from lab.bench.step import our_step
from lab.bench.timing import in_turn
from sd.presets import TINY

GRADED = ("color", "shape", "direction", "wrong cuts")


def step_seconds() -> dict[str, float]:
    """Seconds of a step by one core, by the names of ways, which take turns: runs share a machine, so their own clocks
    say little."""
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    cfg = config_of("ways")

    def work(way):
        mine = replace(cfg, layout=way.layout, layout_options=way.layout_options)
        parts = our_step(mine, cpu, TINY).values()
        return lambda: [part() for part in parts]

    spent = in_turn({way.name: work(way) for way in WAYS}, cpu, rounds=10, seconds=60)
    torch.set_num_threads(threads)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def half(row: Row) -> tuple[str, int]:
    """The first step at which half of all videos move as they should, or "> " and the last where they never do."""
    there = (int(step) for step in row.steps if row.share("direction", step)[0] >= 50)
    return next((("", step) for step in there), ("> ", int(row.steps[-1])))


def tables(results: list[dict], seconds: dict[str, float]):
    """Yield lines of Markdown; seconds: of a step, by name."""
    columns = [*(f"{name}, %" for name in GRADED), "direction by run, %", "loss", "worth of direction, %",
               "half move right at step", "after s", "ms a step"]
    rows = rows_of(results, WAYS)
    yield from heading("", columns)
    for name, row in rows.items():
        later, step = half(row)
        yield line(row.name, [
            *(cell(row.share(what), 0) for what in GRADED), row.each("direction"), cell(row.spread("video"), 4),
            cell(row.spread("worth of direction"), 1), f"{later}{step}", f"{later}{step * seconds[name]:.0f}",
            f"{1000 * seconds[name]:.0f}"])
    yield from second_level(rows.values())


def draw_figure(results: list[dict], path: str, seconds: dict[str, float]):
    """Draw the curves: direction and held-out loss, against steps and against seconds."""
    from matplotlib.figure import Figure  # of the extra `dev`

    drawing = Figure(figsize=(11, 7), layout="constrained")
    panels = drawing.subplots(2, 2, sharex="col", sharey="row")
    for name, row in rows_of(results, WAYS).items():
        steps = [int(step) for step in row.steps]
        for column, x in enumerate((steps, [step * seconds[name] for step in steps])):
            curve(panels[0][column], x, [row.share("direction", step) for step in row.steps], label=row.name)
            curve(panels[1][column], x, [row.spread("video", step=step) for step in row.steps], label=row.name)
    panels[0][0].set(title="Figure 2 in small, by steps", ylabel="% of held-out prompts that move right", ylim=(0, 105))
    panels[0][1].set(title="by seconds of one core")
    panels[1][0].set(xlabel="steps", ylabel="loss on held-out videos", yscale="log")
    panels[1][1].set(xlabel="seconds")
    panels[0][0].legend(fontsize=8)
    drawing.savefig(path, dpi=100)
