"""training/config.py: what a config may hold, and what is said of one that holds something else."""

import ast
import dataclasses
import os
import re
from pathlib import Path

import pytest
from runs import ROOT, here

from training.config import Config, Stage, in_parts, portable, read_config, stages

CI = f"{ROOT}/configs/ci.py"
CONFIGS = sorted(Path(ROOT, "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(f"{ROOT}/configs")))
def test_every_config_reads(path):
    read_config([str(path)])
    assert all(isinstance(node, (ast.Assign, ast.Expr)) for node in ast.parse(path.read_text()).body)


def test_overrides_go_last():
    cfg = read_config([CI, "--batch_size=8", "--lr=1", "--out_dir=/tmp/x", "--betas=[0.9,0.95]"])
    assert (cfg.batch_size, cfg.lr, cfg.out_dir, cfg.betas) == (8, 1.0, "/tmp/x", (0.9, 0.95))
    assert type(cfg.lr) is float and cfg.frames == 4
    cfg = read_config(["--dry_run", CI, "--resume=false", "--video", "mine.csv", "--frames", "9"])
    assert (cfg.dry_run, cfg.resume, cfg.video, cfg.frames) == (True, False, "mine.csv", 9)
    assert type(cfg) is Config


def test_a_config_of_a_vae_is_a_run_of_its_own():
    """It has the clips of the run that asks for it, not its steps."""
    cfg = read_config([f"{ROOT}/configs/mine.py", "--video=cats", "--background=red", "--max_steps=7", "--out_dir=x"])
    first, last = in_parts(dataclasses.replace(cfg, vae=f"{ROOT}/configs/mine_vae.py"))
    assert (first.video, first.background, first.out_dir, first.train) == ("cats", "red", "x/vae", "vae")
    assert first.max_steps == read_config([f"{ROOT}/configs/mine_vae.py"]).max_steps
    assert dataclasses.replace(last, vae=cfg.vae) == cfg and last.vae == "x/vae/model.safetensors"
    assert in_parts(read_config([CI])) == [read_config([CI])]
    with pytest.raises(ValueError, match='vae must be a checkpoint, or a config of train = "vae"'):
        in_parts(read_config([CI, f"--vae={CI}"]))


def test_a_run_has_stages():
    """Values hold until their step; positions in the stream are never used twice, and begin where a step does."""
    cfg = read_config([CI, "--max_steps=20", "--batch_size=4",
                       "--schedule={3: {'batch_size': 7, 'lr': 1}, 10: {'batch_size': 5, 'timesteps': [600, 850]}}"])
    for ranks in (1, 3):
        parts = stages(cfg, ranks)
        assert [(part.first, part.last, part.cfg.batch_size) for part in parts] == [(0, 3, 7), (3, 10, 5), (10, 20, 4)]
        assert [part.cfg.timesteps for part in parts] == [cfg.timesteps, (600, 850), cfg.timesteps]
        assert [part.cfg.lr for part in parts] == [1.0, cfg.lr, cfg.lr] and type(parts[0].cfg.lr) is float
        sizes = [part.cfg.batch_size * ranks for part in parts]
        used = [part.position + n for part, size in zip(parts, sizes) for n in range((part.last - part.first) * size)]
        assert used == sorted(set(used)) and used[-1] < len(used) + sum(sizes)
        assert not any(part.position % size for part, size in zip(parts, sizes))
    plain = read_config([CI])
    assert stages(plain) == [Stage(0, plain.max_steps, plain, 0)]


def test_configs_apply_in_order(tmp_path):
    (tmp_path / "delta.py").write_text('"""Slower."""\nlr = 3\n')
    cfg = read_config([CI, str(tmp_path / "delta.py"), "--batch_size=2"])
    assert (cfg.lr, cfg.batch_size, cfg.frames) == (3.0, 2, 4)
    assert read_config([str(tmp_path / "delta.py"), CI]).lr == 1e-3


FILES = {
    b"batchsize = 8": "line 1: there is no option 'batchsize'; did you mean 'batch_size'?",
    b"\nbatch_size = 8.5": "line 2: batch_size must be a whole number, got 8.5",
    b"lr = 'high'": "lr must be a number, got 'high'",
    b"train_text = 1": "train_text must be True or False, got 1",
    b"lr == 2e-5": "line 1: a config holds assignments of plain values, nothing else",
    b"import os": "line 1: a config holds assignments of plain values, nothing else",
    b"lr = float('1')": "lr must be a plain value",
    b"batch_size = = 3": "line 1: invalid syntax",
    b"resume = false": "line 1: resume must be a plain value, like 8, 0.5, True or",
    b"lr = " + b"-" * 50_000 + b"1": "c.py",
    b"lr = " + b"(" * 300 + b"1" + b")" * 300: "c.py",
    b"seed = " + b"9" * 5000: "c.py, line 1: ",
    b"seed = 0x" + b"f" * 5000: "line 1: seed must fit into 64 bits, got a number of 20000 bits",
    b"video = 'a\\0b'": "line 1: video must be text without zero bytes",
    b"\xff\xfe\x00": "line 1: not text in UTF-8",
}


@pytest.mark.parametrize("text", FILES)
def test_bad_files_are_refused(tmp_path, text):
    (tmp_path / "c.py").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(FILES[text])) as error:
        read_config([str(tmp_path / "c.py")])
    assert str(error.value).startswith(f"{tmp_path}/c.py") and "\n" not in str(error.value)


OVERRIDES = {
    "--frames=7": "use 6 or 8",
    "--dtype=half": "dtype must be one of auto, float32, bfloat16, float16, float64, got 'half'",
    "--train=unett": "train must be one of unet, vae, got 'unett'",
    "--batch_size=0": "batch_size must be >= 1, got 0",
    "--batch_size=True": "batch_size: must be a whole number, got 'True'",
    "--max_steps=many": "max_steps: must be a whole number, got 'many'",
    "--max_step=3": "there is no option 'max_step'; did you mean 'max_steps'?",
    "--mix={'videos': 1}": "mix must give each of video, label, caption a whole number in 0..1000, not all 0, got {'",
    "--mix={'video': 1.5}": "in 0..1000, not all 0, got {'video': 1.5}",
    "--mix={'video': 0}": "not all 0, got {'video': 0}",
    "--mix={[1]: 2}": "mix: must be dict, got '{[1]: 2}'",
    "--fps_values=('a',)": "fps_values: must be a tuple of whole numbers",
    "--fps_values=(0, 8)": "fps_values must be in 1..60, got 0",
    "--fps_values=()": "fps_values must hold at least one frame rate",
    "--betas=(0.9,)": "betas: must be 2 numbers, got '(0.9,)'",
    "--betas=(0.9, 1)": "betas must be < 1, got (0.9, 1",
    "--prompts=(3,)": "prompts: must be a tuple of text",
    "--ema=2": "ema must be in 0..1, got 2",
    "--clip=-1": "clip must be >= 0, got -1",
    "--lr=nan": "lr: must be a number, got 'nan'",
    "--timeout=0": "timeout must be > 0, got 0",
    "--timeout=1e300": "timeout must be <= 1e+06, got 1e+300",
    "--lr=" + "9" * 400: "lr must fit into 64 bits, got a number of 1329 bits",
    "--warmup=" + "9" * 400: "warmup must fit into 64 bits, got a number of 1329 bits",
    "--dry_run=1": "dry_run: must be True or False, got '1'",
    "--video=a\0b": "video must be text without zero bytes",
    "--timesteps=(850,600)": "timesteps must be a range [first, last) with first < last, got (850, 600)",
    "--timesteps=(500,500)": "first < last",
    "--timesteps=(0,1001)": "timesteps must be in 0..1000, got 1001",
    "--timesteps=(5,)": "timesteps: must be 2 whole numbers",
    "--timesteps=(0,0.5)": "timesteps: must be 2 whole numbers",
    "--schedule={50: {'lr': 1}}": "schedule must give other values until some steps, in rising order and before max_st",
    "--schedule={9: {'lr': 1}, 8: {}}": "in rising order and before max_steps",
    "--schedule={9: 1}": "like {1000: {'lr': 1e-3}}, got 9: 1",
    "--schedule={9: {'width': 64}}": "schedule must change frames, fps_values, mix, ",
    "--schedule={9: {'lr': 'high'}}": "schedule, until step 9: lr must be a number, got 'high'",
    "--schedule={9: {'timesteps': (8, 8)}}": "schedule, until step 9: timesteps must be a range",
    "--schedule={9: {'mix': {'label': 0}}}": "schedule, until step 9: mix must give each of",
    "--schedule={9: {'fps_values': (4, 5)}}": "schedule, until step 9: fps_values must be some of the config's own",
    "--schedule={9: {'frames': 1}}": "schedule, until step 9: 1 frames, not 4, go with captioned images alone",
    "--schedule={9: {'mix': {'label': 1}}}|--mix={'video': 1}": "schedule, until step 9: mix must be of the sources in",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_bad_overrides_are_refused(override):
    with pytest.raises(ValueError, match=re.escape(OVERRIDES[override])):
        read_config([CI, *override.split("|")])


def test_the_command_says_mistakes_in_one_line():
    for arguments in (["nowhere.py"], ["configs/ci.py", "--lrr=3"], ["--lr=3"], [], ["configs"]):
        done = here("train.py", *arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("train.py: ")
    assert "--save_every" in here("train.py", "--help").stdout


def test_a_config_is_a_plain_file(tmp_path):
    (tmp_path / "marked.py").write_bytes("licence = 'é'".encode("utf-8-sig"))
    assert read_config([str(tmp_path / "marked.py")]).licence == "é"
    os.mkfifo(tmp_path / "fifo.py")  # which nobody writes to
    for path in (tmp_path / "fifo.py", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path} must be a file, got a folder or a device"):
            read_config([str(path)])


def test_paths_of_this_machine_stay_here():
    values = "/home/me/clips/a.csv", "/home/me/clips/", "data/toy", "owner/name", "", 3, ("/x",)
    assert [portable(value) for value in values] == ["a.csv", "clips", *values[2:]]
