"""training/log.py: the log goes on where it was interrupted, tells what was skipped, and no model tells a path."""

import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from runs import ci_options, keep, metrics, train_here, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd
from training.config import read_config
from training.log import forget_after, stamped


def test_a_line_of_the_log_goes_on_where_it_was_interrupted(finished, world, tmp_path):
    """Lines are means of four steps, and the run stops in the midst of one."""
    options = [*ci_options(world, tmp_path), f"--encoded={finished[0]}/encoded", "--log_every=4", "--prompts=()",
               "--max_steps=8"]
    assert train_here(*options, "--save_every=6", "--keep=9").returncode == 0
    whole = metrics(tmp_path, "loss")
    keep(tmp_path, 6)
    assert "step-00000006.pt" in train_here(*options).stdout
    assert metrics(tmp_path, "loss") == whole and len(whole) == 2
    assert whole[0] == pytest.approx(sum(metrics(finished[0], "loss")[:4]) / 4)


def test_lines_of_steps_that_are_done_again_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    forget_after(str(path), 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    forget_after(str(tmp_path / "missing.jsonl"), 2)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_model_says_where_it_comes_from_and_no_path(finished, tmp_path):
    path = str(finished[0] / "run" / "model.safetensors")
    origin = sd.load(path).settings.origin["unet"]
    assert origin["steps"] == 20 and origin["from"] is None and re.fullmatch("[0-9a-f]{40}|", origin["commit"])
    assert (origin["config"]["out_dir"], origin["config"]["encoded"]) == ("run", "encoded")
    assert origin["config"]["toy"] == "world" and origin["config"]["dtype"] == "float32"
    with safe_open(path, "pt") as file:
        assert str(finished[0].parent) not in json.dumps(file.metadata())


def test_a_model_names_the_run_before(micro):
    model, cfg = sd.load(micro), read_config(["configs/ci.py", "--licence=MIT", "--ema=0"])
    twice = stamped(stamped(model, cfg, 3), cfg, 4)
    origin = twice.settings.origin["unet"]
    assert (origin["steps"], origin["from"]["steps"], origin["licence"]) == (4, 3, "MIT") and not twice.settings.ema
    assert twice.unet is model.unet and not model.settings.origin


def spoil(folder, rows):
    """Make some rows of the encoded captioned images NaN."""
    path = folder / "encoded" / "caption-000000.safetensors"
    tensors = load_file(path)
    tensors["moments"][rows] = float("nan")
    save_file(tensors, path)


def test_a_gradient_that_is_not_finite_costs_its_step(finished, world, tmp_path):
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    spoil(tmp_path, [3])
    done = train_here(*ci_options(world, tmp_path), "--prompts=()", "--max_steps=9")
    assert done.returncode == 0, done.stderr
    skipped = [int(step) for step in re.findall(r"step (\d+) skipped: the gradient is not finite", done.stdout)]
    assert 1 <= len(skipped) <= 2 and metrics(tmp_path, "skipped")[-1] == len(skipped)
    assert [n for n, norm in enumerate(metrics(tmp_path, "grad_norm"), 1) if math.isnan(norm)] == skipped
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, 9)["module"].values())


def test_ten_in_a_row_end_the_run(finished, world, tmp_path):
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    spoil(tmp_path, slice(None))
    done = train_here(*ci_options(world, tmp_path), "--prompts=()", "--mix={'caption': 1}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "step 10: 10 gradients in a row are not finite; look at" in done.stderr


def test_wandb_gets_what_the_log_gets(world, finished, tmp_path, monkeypatch):
    """Offline; the package is not a dependency."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    done = train_here(*ci_options(world, tmp_path), "--prompts=()", "--max_steps=2", "--wandb_log", "--validation=1")
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert all(name in record.read_bytes() for name in (b"loss_video", b"grad_norm", b"val_loss_900", b"batch_size"))


def test_wandb_that_is_not_installed_is_told(world, finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = train_here(*ci_options(world, tmp_path), f"--encoded={finished[0]}/encoded", "--wandb_log")
    assert done.returncode == 2 and done.stderr.endswith("needs the package wandb: pip install wandb\n")
