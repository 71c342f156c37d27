"""config.py: what a config may hold, and what is said of one that holds something else."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from conftest import ROOT

from sd.checkpoint import UserError
from training import config

CONFIGS = sorted(Path(ROOT, "configs").rglob("*.py"))

@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_reads(path):
    config.read_config(str(path), [])


def test_overrides_go_last():
    overrides = ["--batch_size=8", "--lr=1", "--out_dir=/tmp/x", "--betas=[0.9,0.95]"]
    cfg = config.read_config(f"{ROOT}/configs/ci.py", overrides)
    assert (cfg.batch_size, cfg.lr, cfg.out_dir, cfg.betas) == (8, 1.0, "/tmp/x", (0.9, 0.95))
    assert type(cfg.lr) is float and cfg.frames == 4
    assert config.read_config(f"{ROOT}/configs/ci.py", ["--dry_run", "--resume=False"]).dry_run


BAD = {
    "batchsize = 8": "did you mean 'batch_size'",
    "batch_size = 8.5": "batch_size is of type int, not float",
    "lr = 'high'": "lr is of type float, not str",
    "train_text = 1": "train_text is of type bool, not int",
    "import os": "assignments of plain values",
    "lr = float('1')": "lr is not a plain value",
    "batch_size = = 3": "line 1",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_configs_are_refused(tmp_path, text):
    (tmp_path / "c.py").write_text(text + "\n")
    with pytest.raises(UserError, match=re.escape(BAD[text])):
        config.read_config(str(tmp_path / "c.py"), [])


@pytest.mark.parametrize("override, says", [
    ("--frames=7", "use 6 or 8"), ("--dtype=half", "dtype is one of"),
    ("--train=unett", "train is one of"), ("--model=big", "model is one of"),
    ("--batch_size=0", "batch_size is more than 0, not 0"), ("--keep=-1", "keep is more than 0"),
    ("--batch_size", "batch_size is of type int, not bool"), ("--max_step=3", "did you mean 'max_steps'"),
    ("--mix={'videos': 1}", "mix gives each of"), ("--mix={'video': 1.5}", "a whole number"),
    ("--mix={'video': 0}", "not all 0"), ("--mix={[1]: 2}", "mix is of type dict, not str"),
    ("--fps_values=('a',)", "fps_values are whole numbers in 1..60"), ("--fps_values=(0, 8)", "in 1..60"),
    ("--fps_values=(7.5,)", "whole numbers"), ("--betas=(0.9,)", "two numbers"), ("--betas=(0.9, 1)", "not with, 1"),
    ("--prompts=(3,)", "prompts are texts"), ("--ema=2", "ema lies in 0..1, not 2.0"), ("--eta=-1", "eta lies in 0..1"),
    ("--default_fps=500", "default_fps lies in 0..120"), ("--starts=0", "starts is more than 0"),
    ("--clip=-1", "clip is at least 0, not -1.0"), ("--validation=-1", "validation is at least 0"),
    ("--seed=-3", "seed is at least 0"),
    ("max_steps=3", "--name=value"), ("--max_steps=many", "of type int")])
def test_bad_overrides_are_refused(override, says):
    with pytest.raises(UserError, match=re.escape(says)):
        config.read_config(f"{ROOT}/configs/ci.py", [override])


def test_a_config_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "c.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="c.py cannot be read"):
        config.read_config(str(tmp_path / "c.py"), [])


def test_every_option_is_explained():
    """Each field of Config carries its reason on its own line."""
    source = Path(config.__file__).read_text()
    body = source[source.index("class Config:") : source.index("def read_config")]
    for field in dataclasses.fields(config.Config):
        assert re.search(rf"^    {field.name}: .*  # \S", body, re.MULTILINE), field.name


@pytest.mark.parametrize("value", ["(850,600)", "(0,1001)", "(-1,500)", "(5,)", "(500,500)", "(0,0.5)", "('a','b')"])
def test_impossible_timesteps_are_refused(value):
    with pytest.raises(UserError, match="timesteps are two rising whole numbers"):
        config.read_config(f"{ROOT}/configs/ci.py", [f"--timesteps={value}"])


def test_configs_hold_literals_only():
    for path in CONFIGS:
        assert all(isinstance(node, (ast.Assign, ast.Expr)) for node in ast.parse(path.read_text()).body)
