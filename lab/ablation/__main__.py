"""The ablations of the paper run again in small: Table 2, Figure 7, the FPS embedding, and a gate that the paper lacks.

    python -m lab.ablation

Trains what has no line in the file of results yet, prints the tables, and draws the figure.
"""

import importlib.util
from dataclasses import dataclass

from cli import check_writable, option, parse, run
from lab.ablation.report import draw_figure, tables
from lab.ablation.runs import ablate, read_results, score


@dataclass
class Options:
    results: str = option("docs/ablation.jsonl", "one line a run, appended to", metavar="FILE")
    figure: str = option("docs/ablation.png", "the figure", metavar="FILE.png")


def main():
    o = parse(Options, __doc__)
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError('the figure needs matplotlib: pip install -e ".[dev]"')
    for path in (o.results, o.figure):  # now, not after hours
        check_writable(path)
    ablate(o.results, score)
    results = read_results(o.results)
    print("\n".join(tables(results)))
    draw_figure(results, o.figure)
    print(o.figure)


if __name__ == "__main__":
    run(main)
