"""eval.py: its statistics, and the toy table as a command."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import eval as evaluate
import toy


@pytest.mark.parametrize("right, n", [(0, 10), (3, 10), (10, 10), (183, 192), (192, 192)])
def test_wilson_interval_solves_its_equation(right, n):
    """Each end p is where the observed share is 1.96 standard deviations of p away, found here by bisection."""
    share = right / n
    for end, outside in zip(evaluate.wilson(right, n), (0.0, 1.0)):
        inside = share
        if inside != outside:
            for _ in range(200):
                p = (inside + outside) / 2
                far = abs(share - p) > 1.96 * math.sqrt(p * (1 - p) / n)
                inside, outside = (inside, p) if far else (p, outside)
        assert end == pytest.approx(inside, abs=1e-9)


def test_true_renders_get_full_marks(monkeypatch):
    """With a renderer in place of a model the table is full, and the speeds are those of the world."""

    def render(model, jobs, fps=8, **options):
        for prompt, seed in jobs:
            color, shape, direction, background = toy.expected(prompt)
            times = np.random.default_rng(seed).uniform(0, 1) + np.arange(16) / fps
            yield toy.draw(color, shape, background, toy.trajectory(direction, times, np.random.default_rng(seed)))

    monkeypatch.setattr(evaluate, "sample_all", render)
    right, n, cuts, failures = evaluate.grade_prompts(None, "test", 2)
    assert n == 12 * 4 * 2 and cuts == 0 and not failures and set(right.values()) == {n}
    for fps, (speed, seen, _) in evaluate.grade_fps(None, "val", (4, 8, 15, 30)).items():
        assert speed == pytest.approx(10 / fps, rel=0.02) and seen == 1


def test_toy_command(run, micro, tmp_path):
    done = run("eval.py", "toy", "--ckpt", micro, "--split", "val", "--seeds", 1, "--steps", 1, "--no_fps",
               "--json", tmp_path / "r.jsonl", "--failures", tmp_path / "f.png")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.jsonl").read_text())
    assert result["videos"] == 24 and result["shape"]["count"] <= 24 and "wrong cuts" in done.stdout
    assert Image.open(tmp_path / "f.png").size == (4 * 34, 24 * 34)
    assert run("eval.py", "toy", "--ckpt", "nowhere.safetensors").returncode == 2
