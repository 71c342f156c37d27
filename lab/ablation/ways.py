"""Figure 2 in small: how soon each way to see time learns, against steps and against seconds."""

import os
import statistics
from dataclasses import replace

import torch

from lab.ablation.report import cell, curve, heading, line, second_level
from lab.ablation.runs import CONFIGS, NARROW, STUDIES, WAYS
from lab.bench.step import our_step
from lab.bench.timing import in_turn
from lab.metrics import wilson
from sd.presets import TINY
from training.config import read_config

GRADED = ("color", "shape", "direction", "wrong cuts")


class Way:
    """The runs of a way.

    step_seconds  what a step takes
    """

    def __init__(self, name: str, runs: list[dict], step_seconds: float):
        self.runs, self.steps, self.step_seconds = runs, list(runs[0]["loss"]), step_seconds
        self.name = f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})"

    def share(self, what: str, step: str) -> tuple[float, float, float]:
        """Percent of the videos of all runs at a step, with its Wilson interval."""
        count, videos = (sum(run["loss"][step][name] for run in self.runs) for name in (what, "videos"))
        return tuple(100 * x for x in (count / videos, *wilson(count, videos)))

    def spread(self, what: str, step: str) -> tuple[float, float, float]:
        """Mean, least and largest value over the runs at a step."""
        values = [run["loss"][step][what] for run in self.runs]
        return sum(values) / len(values), min(values), max(values)

    def each(self, what: str, step: str) -> str:
        """Percent of the videos of each run: runs differ by more than an interval over all videos says."""
        shares = (100 * run["loss"][step][what] / run["loss"][step]["videos"] for run in self.runs)
        return ", ".join(f"{share:.0f}" for share in sorted(shares))

    def half(self) -> tuple[str, str]:
        """The first step of the curve at which half of all videos move as they should, and the seconds until then."""
        for step in self.steps:
            if self.share("direction", step)[0] >= 50:
                return step, f"{int(step) * self.step_seconds:.0f}"
        return f"> {self.steps[-1]}", f"> {int(self.steps[-1]) * self.step_seconds:.0f}"


def step_seconds() -> dict[str, float]:
    """Seconds of a step by one core, by the names of ways, which take turns: runs share a machine, so their own clocks
    say little."""
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    cfg = read_config([os.path.join(CONFIGS, STUDIES["ways"].run + ".py")])
    shape = replace(TINY, unet=replace(TINY.unet, **NARROW))

    def work(way):
        mine = replace(cfg, layout=way.layout, layout_options=way.layout_options)
        parts = our_step(mine, cpu, shape).values()
        return lambda: [part() for part in parts]

    spent = in_turn({way.name: work(way) for way in WAYS}, cpu, rounds=10, seconds=60)
    torch.set_num_threads(threads)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def ways_of(results: list[dict], seconds: dict[str, float]) -> list[Way]:
    """In the order of WAYS, without those that have no runs; seconds: of a step, by name."""
    runs = {way.name: [result for result in results if result["variant"] == way.name] for way in WAYS}
    return [Way(name, mine, seconds[name]) for name, mine in runs.items() if mine]


def tables(results: list[dict], seconds: dict[str, float]):
    """Yield lines of Markdown."""
    columns = [*(f"{name}, %" for name in GRADED), "direction by run, %", "loss", "half move right at step", "after s",
               "ms a step"]
    shown = ways_of(results, seconds)
    yield from heading("", columns)
    for way in shown:
        last = way.steps[-1]
        cells = [cell(way.share(name, last), 0) for name in GRADED] + [way.each("direction", last)]
        cells += [cell(way.spread("video", last), 4), *way.half(), f"{1000 * way.step_seconds:.0f}"]
        yield line(way.name, cells)
    yield from second_level(shown)


def draw_figure(results: list[dict], path: str, seconds: dict[str, float]):
    """Draw the curves: direction and held-out loss, against steps and against seconds."""
    from matplotlib.figure import Figure  # of the extra `dev`

    drawing = Figure(figsize=(11, 7), layout="constrained")
    panels = drawing.subplots(2, 2, sharex="col", sharey="row")
    for way in ways_of(results, seconds):
        steps = [int(step) for step in way.steps]
        for column, x in enumerate((steps, [step * way.step_seconds for step in steps])):
            curve(panels[0][column], x, [way.share("direction", step) for step in way.steps], label=way.name)
            curve(panels[1][column], x, [way.spread("video", step) for step in way.steps], label=way.name)
    panels[0][0].set(title="Figure 2 in small, by steps", ylabel="% of held-out prompts that move right", ylim=(0, 105))
    panels[0][1].set(title="by seconds of one core")
    panels[1][0].set(xlabel="steps", ylabel="loss on held-out videos", yscale="log")
    panels[1][1].set(xlabel="seconds")
    panels[0][0].legend(fontsize=8)
    drawing.savefig(path, dpi=100)
