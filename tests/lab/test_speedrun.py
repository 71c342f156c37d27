"""lab/speedrun.py: a short run, stopped and gone on with; the clock; and when a goal is reached."""

import json
from pathlib import Path

import pytest
from runs import ROOT, ci_options, command, here

import sd
from lab import speedrun
from lab.ablation.runs import shares
from lab.evals.toy import grade_prompts


def test_a_run_is_graded_while_the_clock_stands_still(processes, world, tmp_path):
    """And a stopped one goes on: each grade once, the last that of the model which the run leaves."""
    options = [f"{ROOT}/configs/ci.py", *ci_options(world, tmp_path), "--max_steps=4", "--sheet_every=2",
               "--save_every=2"]
    assert processes.run(["lab.speedrun", *options], die=(0, "SIGTERM", "train.loss_of", 3), target=command) == [75]
    done = here("lab.speedrun", *options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    graded, logged = (list(map(json.loads, Path(folder, name).read_text().splitlines()))
                      for name in ("speedrun.jsonl", "metrics.jsonl"))
    assert [seen["step"] for seen in graded] == [2, 4] and [one["step"] for one in logged] == [1, 2, 3, 4]
    for seen in graded:
        spent = sum(1 / one["steps_per_s"] for one in logged[: seen["step"]])
        assert seen["minutes"] == pytest.approx(spent / 60)
    model = sd.load(str(folder / "model.safetensors"))
    last = shares(grade_prompts(model, "val", speedrun.SEEDS, speedrun.HOW))
    assert last == {name: graded[-1][name] for name in last} and last["videos"] == 48
    assert f"| {graded[-1]['minutes']:.1f} | 4 | " in done.stdout and ": not reached" in done.stdout
    assert (folder / "speedrun.png").read_bytes()[:4] == b"\x89PNG"


def test_the_goal_is_reached_where_all_of_it_is():
    seen = {"videos": 50, "color": 45, "shape": 40, "direction": 45, "background": 50, "wrong cuts": 50}
    assert speedrun.reached(seen)
    assert not any(speedrun.reached(seen | {name: seen[name] - 1}) for name in ("color", "shape", "direction"))


def test_a_run_that_was_not_graded_on_the_way_is_refused(run, tmp_path):
    (tmp_path / "step-00000004.pt").touch()
    (tmp_path / "speedrun.jsonl").write_text('{"step": 2}\n')
    done = run("lab.speedrun", "configs/ci.py", f"--out_dir={tmp_path}", "--sheet_every=1")
    assert done.returncode == 2 and "was trained for 4 steps, ungraded at step 1: choose another" in done.stderr


def test_mistakes_are_told_in_one_line(run):
    for arguments, said in ((["configs/tiny_vae.py"], "what is graded are videos"), (["--lrr=3"], "no option 'lrr'")):
        done = run("lab.speedrun", *arguments)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
