"""train.py: configs, schedules, and real runs of the smallest model, alone and under torchrun."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ONE_THREAD,
    ROOT,
    assert_equal_states,
    ci_options,
    command,
    kill_all,
    launch,
    script,
    wait_for,
    weights,
    worker,
)
from safetensors.torch import load_file, save_file

import train
from sd.checkpoint import load
from training.config import read_config
from training.task import Denoising, make_model


def test_command_says_mistakes_in_one_line():
    for arguments in (["nowhere.py"], ["configs/ci.py", "--lrr=3"]):
        done = script("train.py", *arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("train.py: ")


def test_learning_rate():
    cfg = train.Config(lr=1.0, warmup=4, cooldown=5, max_steps=20)
    rates = [train.learning_rate(cfg, step) for step in range(20)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(rates[14:], [1, 1, 0.8, 0.6, 0.4, 0.2])


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_run_writes_what_it_should(finished):
    folder, done = finished
    assert "step 20/20" in done.stdout and "left" in done.stdout and "loss_video" in done.stdout
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] < lines[0]["loss"]
    names = set(os.listdir(folder / "run"))
    assert names == {"metrics.jsonl", "model.safetensors", "sheet-00000010.png", "sheet-00000020.png",
                     "step-00000015.pt", "step-00000020.pt"}  # the last two checkpoints are kept


def test_saved_model_is_the_average_and_says_where_it_comes_from(finished):
    folder, _ = finished
    state, model = weights(folder), load(str(folder / "run" / "model.safetensors"))
    assert model.settings.ema and model.settings.grid_trained
    origin = model.settings.origin["unet"]
    assert origin["steps"] == 20 and origin["config"]["out_dir"] == f"{folder}/run" and "commit" in origin
    names = [name for name in state["module"] if name.startswith("unet.")]
    parameters = dict(model.unet.named_parameters())
    for i, name in enumerate(names):
        ours = parameters[name.removeprefix("unet.")]
        assert torch.equal(ours, state["optimizer"]["average"][i])
        assert not torch.equal(ours, state["module"][name])


def test_an_interrupted_run_ends_with_the_same_weights(finished, world, tmp_path):
    reference, _ = finished
    first = launch([*ci_options(world, tmp_path), "--max_steps=20", "--save_every=7", "--keep=9"])
    assert first.returncode == 0, first.stderr
    os.remove(tmp_path / "run" / "step-00000020.pt")
    os.remove(tmp_path / "run" / "step-00000014.pt")  # as if it had been killed between 7 and 14
    second = launch(ci_options(world, tmp_path))
    assert "resume from" in second.stdout and "step-00000007.pt" in second.stdout
    a, b = weights(reference), weights(tmp_path)
    a.pop("config"), b.pop("config")
    assert_equal_states(a, b)


TWENTY = tuple(range(3, 63, 3))


@pytest.mark.parametrize("ranks, name, moments, steps", [
    (1, "SIGKILL", (4, 9, 14), 20), (2, "SIGKILL", (9,), 20), (1, "SIGTERM", (9,), 20),
    pytest.param(2, "SIGTERM", (4, 9, 14), 20, marks=pytest.mark.slow),
    pytest.param(1, "SIGKILL", TWENTY, 66, marks=pytest.mark.slow),
    pytest.param(2, "SIGKILL", TWENTY, 66, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_weights(start, world, finished, by_two, tmp_path, ranks, name, moments,
                                                 steps):
    """Killed soon after some steps, in the middle of a save too, and started again: to the bit the unkilled run."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    options = [*ci_options(world, tmp_path), "--save_every=1", "--prompts=()", f"--batch_size={4 // ranks}", "--keep=9",
               f"--max_steps={steps}"]
    reference = {1: finished[0], 2: by_two}[ranks]
    if steps != 20:
        reference = tmp_path / "whole"
        assert launch([*options, f"--out_dir={reference}/run"], ranks).returncode == 0
    rng, log, statuses = np.random.default_rng(ranks), tmp_path / "log", []
    for at in moments:
        begun = len(log.read_text()) if log.exists() else 0
        process = start(options, ranks, log)
        wait_for(log, at, process, begun)
        time.sleep(rng.uniform(0, 0.1))
        if name == "SIGKILL":
            kill_all(process)
        else:
            process.send_signal(signal.SIGTERM)
        statuses.append(process.wait(60))
    if name == "SIGTERM":
        assert ranks > 1 or statuses == [75] * len(moments)  # torchrun returns 1, whatever its workers do
        assert log.read_text().count("stopped by SIGTERM after step") == len(moments) * ranks
    assert log.read_text().count("resume from") >= (len(moments) - 1) * ranks
    last = launch(options, ranks)
    assert last.returncode == 0 and "resume from" in last.stdout, last.stderr
    a, b = weights(reference, steps), weights(tmp_path, steps)
    a.pop("config"), b.pop("config")
    assert_equal_states(a, b)
    assert metrics(tmp_path, "loss") == metrics(reference, "loss")  # no step is logged twice, none is missing
    print(f"{len(moments)} x {name}, {ranks} ranks: the same weights and the same {steps} losses to the bit")


def test_average_under_two_ranks_is_that_of_the_weights(by_two):
    """Counted out over the weights after each of twenty steps; the exported model has it too."""
    cfg = read_config(f"{ROOT}/configs/ci.py", [])
    torch.manual_seed(cfg.seed)
    fresh = make_model(cfg)
    parameters = dict(Denoising(fresh, cfg, fresh.text).named_parameters())
    average = {name: p.detach().double() for name, p in parameters.items()}
    for n in range(20):
        decay, now = min(0.9, (1 + n) / (10 + n)), weights(by_two, n + 1)["module"]
        average = {name: decay * a + (1 - decay) * now[name].double() for name, a in average.items()}
    last, model = weights(by_two), load(str(by_two / "run" / "model.safetensors"))
    exported = dict(model.unet.named_parameters(prefix="unet")) | dict(model.text.named_parameters(prefix="text"))
    for (name, expected), kept in zip(average.items(), last["optimizer"]["average"]):
        torch.testing.assert_close(kept.double(), expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(exported[name], kept) and not torch.equal(kept, last["module"][name])


def test_a_rank_that_dies_comes_back(start, world, finished, by_two, tmp_path):
    """torchrun --max-restarts: the others are started again with it, go on by themselves, and end as if unhurt."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    log = tmp_path / "log"
    options = [*ci_options(world, tmp_path), "--save_every=1", "--prompts=()", "--batch_size=2", "--keep=9"]
    process = start(options, 2, log, "--max-restarts=1")
    wait_for(log, 9, process)
    os.kill(worker(tmp_path, rank=1), signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()
    assert log.read_text().count("resume from") == 2
    a, b = weights(by_two), weights(tmp_path)
    a.pop("config"), b.pop("config")
    assert_equal_states(a, b)


def test_two_ranks_equal_one_in_double_precision(world, finished, tmp_path):
    """The same global batch, whole runs: weights, moments and losses within 1e-8."""
    for ranks in (1, 2):
        shutil.copytree(finished[0] / "encoded", tmp_path / str(ranks) / "encoded")
        done = launch([*ci_options(world, tmp_path / str(ranks)), "--dtype=float64", "--prompts=()", "--validation=1",
                       f"--batch_size={4 // ranks}"], ranks)
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(x.dtype == torch.float64 for x in one["module"].values() if x.is_floating_point())
    for name, tensor in one["module"].items():
        torch.testing.assert_close(tensor, two["module"][name], atol=1e-8, rtol=0)
    for name in ("loss", "loss_video", "val_loss_500"):
        np.testing.assert_allclose(metrics(tmp_path / "1", name), metrics(tmp_path / "2", name), atol=1e-8)
    assert len(metrics(tmp_path / "1", "val_loss_500")) == 2


def metrics(folder, name):
    """All values of a name, in the order of the steps."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_a_damaged_checkpoint_is_passed_over(finished, world, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "run" / "step-00000020.pt"
    data, name = bytearray(newest.read_bytes()), "unet.time_embed.0.weight"
    data[data.index(weights(tmp_path)["module"][name].numpy().tobytes()) + 7] ^= 1  # one bit
    newest.write_bytes(data)
    done = launch([*ci_options(world, tmp_path), "--keep=1"])
    assert done.returncode == 0 and "step-00000020.pt is damaged" in done.stderr
    assert "resume from" in done.stdout and "step-00000015.pt" in done.stdout
    assert newest.with_name(newest.name + ".damaged").read_bytes() == data  # no longer one of those to keep
    assert [name for name in os.listdir(tmp_path / "run") if name.endswith(".pt")] == [newest.name]
    a, b = weights(finished[0]), weights(tmp_path)
    a.pop("config"), b.pop("config")
    assert_equal_states(a, b)


def test_a_line_of_the_log_goes_on_where_it_was_interrupted(finished, world, tmp_path):
    """Lines are means of four steps, and the run stops in the midst of one."""
    options = [*ci_options(world, tmp_path), f"--encoded={finished[0]}/encoded", "--log_every=4", "--prompts=()"]
    assert launch([*options, "--save_every=6", "--keep=9"]).returncode == 0
    whole = metrics(tmp_path, "loss")
    for step in (12, 18, 20):
        os.remove(tmp_path / "run" / f"step-{step:08d}.pt")
    assert "step-00000006.pt" in launch(options).stdout
    assert metrics(tmp_path, "loss") == whole and len(whole) == 5


def test_a_step_of_other_size_is_told(finished, world, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    done = launch([*ci_options(world, tmp_path), "--batch_size=2", "--max_steps=21", "--prompts=()"])
    assert done.returncode == 0 and "a step saw 4 samples before, now 2" in done.stderr
    same = launch([*ci_options(world, tmp_path), "--batch_size=1", "--accumulate=2", "--max_steps=22", "--prompts=()"])
    assert same.returncode == 0 and "a step saw" not in same.stderr


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(world, finished, tmp_path):
    """On a file system of 3 MB, where the first checkpoint fits and the second does not."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    size = (finished[0] / "run" / "step-00000020.pt").stat().st_size
    (tmp_path / "run").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", tmp_path / "run"])
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = launch([*ci_options(world, tmp_path), "--save_every=5"])
        assert done.returncode == 2 and "step-00000010.pt cannot be written, is the disk full?" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert sorted(name for name in os.listdir(tmp_path / "run") if "step" in name) == ["step-00000005.pt"]
        assert train.is_whole(str(tmp_path / "run" / "step-00000005.pt"))
    finally:
        subprocess.run(["umount", tmp_path / "run"], check=True)


def spoil(folder, rows):
    """Make some rows of the encoded captioned images NaN."""
    path = folder / "encoded" / "caption-000000.safetensors"
    tensors = load_file(path)
    tensors["moments"][rows] = float("nan")
    save_file(tensors, path)


def test_a_gradient_that_is_not_finite_costs_its_step(finished, world, tmp_path):
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    spoil(tmp_path, [3])
    done = launch([*ci_options(world, tmp_path), "--prompts=()"])
    assert done.returncode == 0, done.stderr
    skipped = re.findall(r"step (\d+) skipped: the gradient is not finite", done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 1 <= len(skipped) <= 4 and lines[-1]["skipped"] == len(skipped)
    assert all(math.isnan(line["grad_norm"]) == (str(line["step"]) in skipped) for line in lines)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path)["module"].values())


def test_ten_in_a_row_end_the_run(finished, world, tmp_path):
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    spoil(tmp_path, slice(None))
    done = launch([*ci_options(world, tmp_path), "--prompts=()", "--mix={'caption': 1}"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "step 10: 10 gradients in a row are not finite; look at" in done.stderr


def test_resuming_needs_no_more_memory_than_starting(world, finished, tmp_path):
    """Of the process alone: pages of the mapped checkpoint belong to the system, which takes them when it wants."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    options = [*ci_options(world, tmp_path), "--model=tiny", f"--vae={finished[0]}/run/model.safetensors",
               "--prompts=()", "--max_steps=4", "--save_every=2"]
    peaks = []
    for _ in range(2):
        process = subprocess.Popen(command(options, 1), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
        peaks.append(0)
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peaks[-1] = max(peaks[-1], int(found[1]) / 1e6 if found else 0)
            time.sleep(0.002)
        assert process.returncode == 0 and ("resume from" in process.stdout.read()) == (len(peaks) == 2)
        (tmp_path / "run" / "step-00000004.pt").unlink()
    started, resumed = peaks
    assert 0.3 < resumed <= 1.1 * started, peaks


def test_two_ranks_prepare_what_one_prepares(finished, world, tmp_path):
    """Rank 0 encodes while the other waits."""
    done = launch([*ci_options(world, tmp_path), "--batch_size=2", "--max_steps=3", "--sheet_every=3"], ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = ((folder / "encoded" / "index.jsonl").read_text() for folder in (finished[0], tmp_path))
    assert one == two


def test_a_run_in_the_way_is_not_overwritten(finished, world):
    done = launch([*ci_options(world, finished[0]), "--resume=False"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "step-00000020.pt is in the way of a run with resume = False" in done.stderr


@pytest.mark.parametrize("wrong", ["model", "average"])
def test_a_checkpoint_of_another_model_is_refused(finished, world, tmp_path, wrong):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    state = weights(tmp_path)
    del state["optimizer"]["average"]  # as a run without a moving average leaves it
    if wrong == "average":
        torch.save(state, tmp_path / "run" / "step-00000020.pt")
    tiny = ["--model=tiny", f"--vae={finished[0]}/run/model.safetensors"]
    done = launch([*ci_options(world, tmp_path), *(tiny if wrong == "model" else [])])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "step-00000020.pt is of another model or optimizer than the config's" in done.stderr


def test_wandb_gets_what_the_log_gets(world, finished, tmp_path):
    """Offline; the package is not a dependency."""
    pytest.importorskip("wandb")
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    done = launch([*ci_options(world, tmp_path), "--prompts=()", "--max_steps=2", "--wandb_log", "--validation=1"])
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert all(name in record.read_bytes() for name in (b"loss_video", b"grad_norm", b"val_loss_900", b"batch_size"))


GOLDEN = Path(__file__).parent / "golden.json"


def test_three_hundred_losses_of_two_ranks_are_the_committed_ones(world, finished, tmp_path):
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    done = launch([*ci_options(world, tmp_path), "--prompts=()", "--batch_size=2", "--max_steps=300",
                   "--sheet_every=300", "--save_every=300"], ranks=2)
    assert done.returncode == 0, done.stderr
    found, golden = np.array(metrics(tmp_path, "loss")), np.array(json.loads(GOLDEN.read_text()))
    assert found.shape == golden.shape == (300,)
    np.testing.assert_allclose(found, golden, rtol=1e-4)  # the same to the bit here, 3e-6 without AVX-512


def test_vae_trains(world, tmp_path):
    done = launch([*ci_options(world, tmp_path), "--train=vae", "--max_steps=60", "--frame_pool=64", "--lr=5e-3"])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([line["loss"] for line in lines[-10:]]) < 0.3 * lines[0]["loss"]
    model = load(str(tmp_path / "run" / "model.safetensors"))
    frames = torch.randint(0, 255, (8, 3, 32, 32)) / 127.5 - 1
    with torch.no_grad():
        assert torch.isfinite(model.vae.encode(frames)[0]).all()
    assert model.settings.latent_scale != 0.18215


def test_a_folder_encoded_with_other_options_is_refused(finished, world):
    folder, _ = finished
    done = launch([*ci_options(world, folder), "--fps_values=(8,)"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "was encoded with fps_values = (4, 8), the config says (8,)" in done.stderr


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float16", 1e-3)])
def test_fifty_losses_are_the_same_live_and_encoded_ahead(world, micro, tmp_path, dtype, bound):
    """With VAE, text tower and decoder, and with none of them; the live ones read ahead by workers."""
    options = [f"--init={micro}", f"--vae={micro}", "--train_text=False", "--max_steps=50", "--sheet_every=50",
               "--starts=3"]
    lists = [f"--video={world}/videos.csv", f"--label={world}/labels", f"--caption={world}/images.jsonl"]
    made = subprocess.run([sys.executable, "-m", "clips.prepare", "encode", tmp_path / "encoded", "--ckpt", micro, "--dtype", dtype,
                           *" ".join(lists).replace("=", " ").split(), "--frames", "4", "--size", "32x32", "--fps", "4",
                           "8", "--starts", "3", "--draws", "2", "--text"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    ahead = launch([*ci_options(world, tmp_path), *options])
    options += ["--encoded=", "--workers=1", f"--out_dir={tmp_path}/live/run"]
    live = launch([*ci_options(world, tmp_path), *options])
    assert ahead.returncode == live.returncode == 0, ahead.stderr + live.stderr
    one, two = metrics(tmp_path, "loss"), metrics(tmp_path / "live", "loss")
    assert len(one) == len(two) == 50 and one[0] != one[1]
    np.testing.assert_allclose(one, two, atol=bound, rtol=0)


def test_too_many_bad_samples_end_the_run_in_one_line(world, tmp_path):
    lines = [json.loads(line) for line in Path(world, "images.jsonl").read_text().splitlines()]
    for n, line in enumerate(lines):
        line["path"] = os.path.join(world, line["path"]) if n < 4 else "missing.png"
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = launch([*ci_options(world, tmp_path), f"--caption={tmp_path}/list.jsonl", "--encoded=", "--max_bad=0.01",
                   "--mix={'caption': 1}", "--max_steps=100", "--prompts=()"])
    assert done.returncode == 2
    named, last = done.stderr.splitlines()
    assert named == f"skipped caption {tmp_path}/missing.png: missing"
    assert last.startswith("train.py: ") and "more than max_bad = 0.01" in last
