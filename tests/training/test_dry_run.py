"""training/dry_run.py: what `--dry_run` says, with and without data, weights and a formula for attention."""

import dataclasses
import os
import re

import pytest
import torch
from runs import ROOT, ci_options, train_here
from safetensors.torch import load_file

from clips.lists import Items
from training import account, dry_run
from training.config import read_config
from training.setup import data_lists, make_model


def lines_of(done) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in done.stdout.splitlines())


def test_it_says_what_a_run_needs(world, finished, tmp_path):
    lines = lines_of(train_here(*ci_options(world, finished[0]), "--dry_run", "--clip=0", f"--out_dir={tmp_path}/run"))
    model = make_model(read_config([f"{ROOT}/configs/ci.py"]))
    trained = sum(p.numel() for network in (model.unet, model.text) for p in network.parameters())
    assert lines["parameters"] == f"{trained:,} trained"
    assert lines["memory of the host"] == f"{12 * trained / 1e9:.2f} GB for moments, moving average, in one process"
    assert re.fullmatch(r"0\.\d\d TFLOP a step and rank", lines["computation"]) and "while saving" not in lines
    assert lines["data, video"] == "8 items, 4 steps an epoch of one process"
    assert re.fullmatch(r"\d+\.\d\d s on one cpu, without reading data: 0.0 h for 20 steps", lines["time of a step"])
    assert not os.listdir(tmp_path)


@pytest.fixture
def untimed(monkeypatch):
    """The counts of some network, and no step taken."""
    need = {"parameters": 10**6, "weights": 4 * 10**6, "frozen": 0, "moments": 8 * 10**6, "gradients": 4 * 10**6,
            "activations": 10**6, "flop": 10**9}
    monkeypatch.setattr(dry_run, "device_memory", lambda *_: need)
    monkeypatch.setattr(dry_run, "seconds_a_step", lambda *_: 1.0)
    return need


def test_it_needs_neither_data_nor_weights(run, untimed, tmp_path):
    lines = lines_of(run("train.py", "configs/ci.py", "--dry_run", f"--init={tmp_path}/no.safetensors",
                         "--toy=", f"--video={tmp_path}/clips.csv", "--mix={'video': 1}"))
    assert lines["model"] == f"micro, as {tmp_path}/no.safetensors is not on this machine"
    assert lines["data, video"] == f"{tmp_path}/clips.csv is not there yet"


def test_it_times_every_stage_of_a_run(monkeypatch):
    monkeypatch.setattr(dry_run, "seconds_a_step", lambda cfg, *_: float(cfg.batch_size))
    cfg = read_config([f"{ROOT}/configs/ci.py", "--schedule={5: {'batch_size': 16}, 15: {'batch_size': 2}}"])
    assert dry_run.timed_stages(cfg, None, None, None) == [(5, 16.0), (10, 2.0), (5, 4.0)]
    assert dry_run.timed_stages(cfg, None, None, None, done=6) == [(9, 2.0), (5, 4.0)]
    assert dry_run.timed_stages(cfg, None, None, None, done=20) == []


def test_it_refuses_what_cannot_be_counted(run):
    done = run("train.py", "configs/ci.py", "--dry_run", "--width=36")
    assert done.returncode == 2 and "width must be divisible by 8" in done.stderr
    done = run("train.py", "configs/ci.py", "--dry_run", "--dtype=float64")
    assert done.returncode == 2 and "dtype must be float32, bfloat16, float16 or auto for dry_run" in done.stderr


def test_it_says_what_encoding_will_take(world, finished, untimed, tmp_path):
    """As much as the encoded folder of the same lists, where there is one."""
    done = train_here(*ci_options(world, tmp_path), "--dry_run", "--train_text=False", "--mix={'label': 1}")
    text = lines_of(done)["data, label"]
    assert re.fullmatch(r"72 items, 18 steps an epoch of one process, up to 0\.00 GB to encode: 0\.00 GB of moments "
                        r"and 0\.00 GB of contexts", text)
    cfg = dataclasses.replace(read_config([f"{ROOT}/configs/ci.py"]), toy=str(world))
    shape = account.shape_of(cfg)
    for source, path in data_lists(cfg).items():
        items = Items(source, path)
        stored = [load_file(path)["moments"] for path in (finished[0] / "encoded").glob(f"{source}-*")]
        sizes = dry_run.encoded_size(cfg, shape, items)
        assert len(items) * sizes["moments"] == sum(tensor.nbytes for tensor in stored) and not sizes["contexts"]
        frozen = dry_run.encoded_size(dataclasses.replace(cfg, train_text=False), shape, items)
        assert frozen == sizes | {"contexts": 2 * shape.text.length * shape.text.width}


def test_it_counts_for_a_gpu_where_the_dtype_is_for_one(world, finished, untimed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = lines_of(train_here(*ci_options(world, finished[0]), "--dry_run", "--dtype=float16"))
    assert lines["memory of the host"].endswith(
        "for masters, gradients, moments, moving average, in 2 processes with a GPU each")
    assert "more on rank 0" in lines["while saving"] and "on a GPU" in lines["activations"]
    assert lines["data, video"] == "8 items, 2 steps an epoch of 2 processes"
    monkeypatch.setenv("RANK", "1")
    assert not train_here(*ci_options(world, finished[0]), "--dry_run").stdout  # rank 0 speaks


def test_a_count_that_cannot_be_made_says_so(world, finished, monkeypatch):
    def uncounted(work):
        raise account.Uncounted("no formula")

    monkeypatch.setattr(account, "count_flop", uncounted)
    lines = lines_of(train_here(*ci_options(world, finished[0]), "--dry_run"))
    assert lines["computation"] == "not counted: this torch has no FLOP formula for the attention here"
    assert lines["time of a step"] == "not measured: it would take minutes on this CPU"


def test_a_step_that_is_too_large_is_not_measured(world, finished, untimed, monkeypatch):
    untimed["activations"] = 3 * 10**9
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 10**9)
    lines = lines_of(train_here(*ci_options(world, finished[0]), "--dry_run"))
    assert lines["time of a step"] == "not measured: it needs 3.0 GB, 1.0 GB of this cpu are free"


def test_free_memory_is_that_of_this_machine():
    assert 2**26 < dry_run.free_memory(torch.device("cpu")) < 2**50
