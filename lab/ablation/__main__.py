"""Small models that differ in one thing each, trained from one text-to-image model, and compared.

    python -m lab.ablation paper      # Table 2, Figure 7, the FPS embedding, and a gate that the paper lacks
    python -m lab.ablation ways       # Figure 2: which way to see time learns soonest

Trains what has no line in the file of results yet, prints the tables, and draws the figure.
"""

from dataclasses import dataclass

from cli import check_writable, option, parse, run
from lab.ablation import report, ways
from lab.ablation.runs import STUDIES, ablate, results_of

FILES = {"paper": "docs/ablation", "ways": "docs/ways"}


@dataclass
class Options:
    study: str = option("paper", "what is compared", choices=tuple(STUDIES), positional=True)
    results: str = option("", "one line a run, appended to (default: in docs/)", metavar="FILE")
    figure: str = option("", "the figure (default: in docs/)", metavar="FILE.png")


def main():
    o = parse(Options, __doc__)
    report.require_matplotlib()
    results, figure = o.results or FILES[o.study] + ".jsonl", o.figure or FILES[o.study] + ".png"
    for path in (results, figure):  # now, not after hours
        check_writable(path)
    ablate(o.study, results)
    lines = results_of(o.study, results)
    shown, measured = (ways, [ways.step_seconds()]) if o.study == "ways" else (report, [])
    print("\n".join(shown.tables(lines, *measured)))
    shown.draw_figure(lines, figure, *measured)
    print(figure)


if __name__ == "__main__":
    run(main)
