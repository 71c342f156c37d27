"""Train with the clock on: how many minutes from random numbers to videos that do what they are told.

    python -m lab.speedrun                                      # configs/tiny.py
    python -m lab.speedrun configs/tiny.py --lr=1e-3            # any config and option, as train.py takes them

At every `sheet_every`-th step it grades the averaged weights on the validation prompts; the clock stands still
meanwhile. In out_dir it leaves speedrun.jsonl and speedrun.png; it prints the table, and when the goal was reached.
Interrupted, the same command goes on.
"""

import json
import os
import sys

import torch

from cli import ROOT, beside, run
from lab.ablation.report import cell, curve, heading, line, require_matplotlib
from lab.ablation.runs import HOW, read_results, shares
from lab.evals.toy import ANSWERS, grade_prompts
from lab.metrics import wilson
from sd.device import precision
from train import TASKS, UNetTask, train
from training.checkpoints import steps_done
from training.config import in_parts, read_config
from training.log import commit, forget_after

GOAL = {"color": 90, "shape": 80, "direction": 90, "background": 90}  # percent of the validation videos
SEEDS = 2  # videos of a prompt


class GradedTask(UNetTask):
    """A UNetTask that, where others show a sheet, grades what the model draws and notes it."""

    def sheet(self, model):
        step, folder = model.settings.origin["unet"]["steps"], self.cfg.out_dir
        with precision(getattr(torch, self.cfg.dtype), self.ranks.device), self.ranks.patient("grades"):
            seen = shares(grade_prompts(model, "val", SEEDS, HOW))
        path = os.path.join(folder, "speedrun.jsonl")
        forget_after(path, step - 1)
        with open(path, "a", encoding="utf-8") as file:
            noted = {"step": step, "minutes": minutes(folder, step), **seen, "commit": commit()}
            file.write(json.dumps(noted) + "\n")


def minutes(out_dir: str, last: int) -> float:
    """What a run's steps took up to one of them, without grades and checkpoints, by the speeds that it has logged."""
    seconds, before = 0.0, 0
    for logged in read_results(os.path.join(out_dir, "metrics.jsonl")):
        if "steps_per_s" in logged and logged["step"] <= last:
            seconds, before = seconds + (logged["step"] - before) / logged["steps_per_s"], logged["step"]
    return seconds / 60


def percent(seen: dict, what: str) -> tuple[float, float, float]:
    """Percent of the videos, with its Wilson interval."""
    return tuple(100 * x for x in (seen[what] / seen["videos"], *wilson(seen[what], seen["videos"])))


def reached(seen: dict) -> bool:
    return all(percent(seen, what)[0] >= least for what, least in GOAL.items())


def table(lines: list[dict]):
    """Yield lines of Markdown."""
    graded = (*ANSWERS, "wrong cuts")
    yield from heading("minutes", ["step", *(f"{what}, %" for what in graded)])
    for seen in lines:
        yield line(f"{seen['minutes']:.1f}", [f"{seen['step']:,}", *(cell(percent(seen, what), 0) for what in graded)])


def draw_figure(lines: list[dict], path: str):
    """Draw the graded shares against minutes."""
    from matplotlib.figure import Figure  # of the extra `dev`

    drawing = Figure(figsize=(9, 4.5), layout="constrained")
    panel = drawing.subplots()
    for what in (*ANSWERS, "wrong cuts"):
        curve(panel, [seen["minutes"] for seen in lines], [percent(seen, what) for seen in lines], label=what)
    panel.set(xlabel="minutes", ylabel="% of the videos of validation prompts", ylim=(0, 105))
    panel.legend(fontsize=8)
    with beside(path) as part:
        drawing.savefig(part, format="png", dpi=100)


def main():
    require_matplotlib()
    arguments = sys.argv[1:]
    if not any(word.endswith(".py") and not word.startswith("-") for word in arguments):
        arguments = [os.path.join(ROOT, "configs", "tiny.py"), *arguments]
    *before, cfg = in_parts(read_config(arguments, __doc__))
    if cfg.train != "unet":
        raise ValueError('the config must be of train = "unet": what is graded are videos')
    path, figure = (os.path.join(cfg.out_dir, "speedrun" + kind) for kind in (".jsonl", ".png"))
    done, graded = steps_done(cfg.out_dir), [seen["step"] for seen in read_results(path)]
    for step in range(cfg.sheet_every, done + 1, cfg.sheet_every):
        if step not in graded:
            raise ValueError(f"{cfg.out_dir} was trained for {done} steps, ungraded at step {step}: choose another "
                             "out_dir, or remove it")
    for part in before:
        train(part)
        print(f"the VAE: {minutes(part.out_dir, part.max_steps):.1f} minutes")
    train(cfg, TASKS | {"unet": GradedTask})
    lines = read_results(path)
    print("", *table(lines), "", sep="\n")
    soonest = next((f"after {seen['minutes']:.1f} minutes" for seen in lines if reached(seen)), "not reached")
    print(f"{', '.join(f'{what} {least}%' for what, least in GOAL.items())}: {soonest}")
    draw_figure(lines, figure)
    print(figure)


if __name__ == "__main__":
    run(main)
