"""Figure 2 in small: how soon each way to see time learns, against steps and against seconds."""

from lab.ablation.report import cell, curve, heading, line
from lab.ablation.runs import SEEDS, WAYS
from lab.metrics import wilson

GRADED = ("color", "shape", "direction", "wrong cuts")


class Way:
    """The runs of a way. Its name says so where seeds are missing."""

    def __init__(self, name: str, runs: list[dict]):
        self.runs, self.steps = runs, list(runs[0]["loss"])
        self.name = name + (f" ({len(runs)} of {SEEDS} seeds)" if len(runs) < SEEDS else "")

    def share(self, what: str, step: str) -> tuple[float, float, float]:
        """Percent of the videos of all seeds at a step, with its Wilson interval."""
        count, videos = (sum(run["loss"][step][name] for run in self.runs) for name in (what, "videos"))
        return tuple(100 * x for x in (count / videos, *wilson(count, videos)))

    def spread(self, what: str, step: str) -> tuple[float, float, float]:
        """Mean, least and largest value over the seeds at a step."""
        values = [run["loss"][step][what] for run in self.runs]
        return sum(values) / len(values), min(values), max(values)

    def half(self) -> tuple[str, str]:
        """The first step of the curve at which half of all videos move as they should, and the seconds until then."""
        for step in self.steps:
            if self.share("direction", step)[0] >= 50:
                return step, f"{self.spread('seconds', step)[0]:.0f}"
        return f"> {self.steps[-1]}", f"> {self.spread('seconds', self.steps[-1])[0]:.0f}"


def ways_of(results: list[dict]) -> list[Way]:
    """In the order of WAYS, without those that have no runs."""
    runs = {way.name: [result for result in results if result["variant"] == way.name] for way in WAYS}
    return [Way(name, mine) for name, mine in runs.items() if mine]


def tables(results: list[dict]):
    """Yield lines of Markdown."""
    columns = [*(f"{name}, %" for name in GRADED), "loss", "half move right at step", "after s", "ms a step"]
    yield from heading("", columns)
    for way in ways_of(results):
        last = way.steps[-1]
        cells = [cell(way.share(name, last), 0) for name in GRADED] + [cell(way.spread("video", last), 4), *way.half()]
        yield line(way.name, [*cells, f"{1000 * way.spread('seconds', last)[0] / int(last):.0f}"])


def draw_figure(results: list[dict], path: str):
    """Draw the curves: direction and held-out loss, against steps and against seconds."""
    from matplotlib.figure import Figure  # of the extra `dev`

    drawing = Figure(figsize=(11, 7), layout="constrained")
    panels = drawing.subplots(2, 2, sharex="col", sharey="row")
    for way in ways_of(results):
        seconds = [way.spread("seconds", step)[0] for step in way.steps]
        for column, x in enumerate((list(map(int, way.steps)), seconds)):
            curve(panels[0][column], x, [way.share("direction", step) for step in way.steps], label=way.name)
            curve(panels[1][column], x, [way.spread("video", step) for step in way.steps], label=way.name)
    panels[0][0].set(title="Figure 2 in small, by steps", ylabel="% of held-out prompts that move right", ylim=(0, 105))
    panels[0][1].set(title="by seconds of one core")
    panels[1][0].set(xlabel="steps", ylabel="loss on held-out videos", yscale="log")
    panels[1][1].set(xlabel="seconds")
    panels[0][0].legend(fontsize=8)
    drawing.savefig(path, dpi=100)
