"""training/setup.py: what a run starts from, and what is refused before it costs anything."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import ROOT, ci_options, few_labels, train_here

import sd
from training.config import read_config
from training.ranks import Ranks
from training.setup import check_inputs, data_lists, make_model, make_ready, open_clips

CI, CPU = f"{ROOT}/configs/ci.py", torch.device("cpu")


@pytest.mark.parametrize("options, says", [
    (["--width=100"], "width must be divisible by 8, .*got 100"),
    (["--width=40", "--frames=6"], "must make a grid that the UNet can halve"),
    (["--prediction=x"], "prediction must be"), (["--prediction=epsilon"], "zero_snr needs prediction"),
    (["--init=INIT", "--fps_embedding=False"], "must be True for a model that is loaded"),
    (["--layout=causal", "--frames=1"], "frames must be > 1 at every step with the layout 'causal'")])
def test_what_cannot_be_trained_is_refused_before_anything_is_encoded(micro, options, says):
    with pytest.raises(ValueError, match=says):
        make_model(read_config([CI, *(option.replace("INIT", micro) for option in options)]))


def test_the_settings_say_what_is_trained():
    settings = make_model(read_config([CI])).settings
    assert settings.fps_trained == (0, 4, 8, 120) and settings.grid_trained and settings.fps == 8
    settings = make_model(read_config([CI, "--mix={'video': 1}", "--frames=1"])).settings
    assert settings.fps_trained == (4, 8) and not settings.grid_trained


def test_latents_of_another_vae_are_refused(finished):
    cfg = read_config([CI, f"--encoded={finished[0]}/encoded"])
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="was encoded by another VAE than the model's"):
        open_clips(cfg, make_model(cfg), {}, CPU)


def test_a_folder_encoded_with_other_options_is_refused(finished, world, tmp_path):
    done = train_here(*ci_options(world, finished[0]), f"--out_dir={tmp_path}/run", "--fps_values=(8,)")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "was encoded with fps_values = (4, 8), the config says (8,)" in done.stderr


@pytest.mark.parametrize("n", [8, 80])
def test_validation_that_leaves_nothing_is_refused(finished, world, n, tmp_path):
    done = train_here(*ci_options(world, finished[0]), f"--out_dir={tmp_path}/run", f"--validation={n}")
    assert done.returncode == 2 and re.search(r"train.py: .*validation.* 8 .*video", done.stderr), done.stderr


@pytest.fixture
def encoding(world, micro, tmp_path):
    """A config that encodes with the text tower, two labels alone, and its model."""
    cfg = read_config([CI, f"--init={micro}", f"--toy={world}", f"--encoded={tmp_path}/encoded",
                       f"--out_dir={tmp_path}/run", f"--label={few_labels(world, tmp_path, 2)}", "--train_text=False"])
    return cfg, make_model(cfg)


def test_contexts_of_another_tower_are_refused(encoding):
    cfg, model = encoding
    lists = make_ready(cfg, model, Ranks(600))
    open_clips(cfg, model, lists, CPU)
    torch.nn.init.normal_(next(model.text.parameters()))
    with pytest.raises(ValueError, match="was encoded by another text tower than the model's"):
        open_clips(cfg, model, lists, CPU)


def test_latents_of_other_lists_are_refused(encoding, world, tmp_path, capsys):
    """The same lists in another place are not others; where they cannot be found, that is told."""
    cfg, model = encoding
    make_ready(cfg, model, Ranks(600))
    capsys.readouterr()
    shutil.copytree(world, tmp_path / "copy")
    assert make_ready(cfg, model, Ranks(600)) == {} and not capsys.readouterr().err
    cfg = dataclasses.replace(cfg, video=f"{tmp_path}/copy/videos.csv")
    assert make_ready(cfg, model, Ranks(600)) == {} and not capsys.readouterr().err
    assert make_ready(dataclasses.replace(cfg, caption="mine.jsonl"), model, Ranks(600)) == {}
    assert capsys.readouterr().err == (f"warning: {cfg.encoded} is used as it is, changes of its data cannot be "
                                       "noticed: mine.jsonl cannot be found\n")
    (tmp_path / "mine.jsonl").write_text('{"path": "x.png", "caption": "x"}\n')
    with pytest.raises(ValueError, match=f"1 of 11 items changed .* 7 are gone; .* --caption {tmp_path}/mine.jsonl`"):
        make_ready(dataclasses.replace(cfg, caption=f"{tmp_path}/mine.jsonl"), model, Ranks(600))


@pytest.fixture
def own_clips(tmp_path, world, micro):
    """Two clips with captions in a folder, encoded, and a config that trains on them."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for n, clip in enumerate(sorted(Path(world).rglob("*.mp4"))[:2]):
        shutil.copy2(clip, folder / f"{n}.mp4")
        (folder / f"{n}.txt").write_text("a red box")
    cfg = read_config([CI, f"--init={micro}", "--toy=", f"--video={folder}", f"--encoded={tmp_path}/encoded",
                       "--mix={'video': 1}"])
    model = make_model(cfg)
    make_ready(cfg, model, Ranks(600))
    return cfg, model, folder


def test_data_that_changed_since_they_were_encoded_are_refused(own_clips):
    """Bug 10: the old latents and captions were trained on without a word."""
    cfg, model, folder = own_clips
    (folder / "0.txt").write_text("a blue box")
    shutil.copy(folder / "0.mp4", folder / "1.mp4")
    shutil.copy2(folder / "0.mp4", folder / "2.mp4")
    with pytest.raises(ValueError) as told:
        make_ready(cfg, model, Ranks(600))
    assert str(told.value) == (
        f"{cfg.encoded} was encoded from other data: 2 of 3 items changed since they were encoded (1 captions, 1 "
        f"files), 1 are new, 0 are gone; run `python -m clips.encode {cfg.encoded} --ckpt MODEL --update`, or remove "
        "it")


def test_a_folder_without_its_clips_is_used_as_it_is(own_clips, capsys):
    cfg, model, folder = own_clips
    capsys.readouterr()
    for clip in folder.glob("*.mp4"):
        clip.rename(folder.parent / clip.name)
    os.symlink("elsewhere", folder / "0.mp4")
    os.symlink("elsewhere", folder / "1.mp4")
    make_ready(cfg, model, Ranks(600))
    assert "nothing has changed since it was encoded; the files of 2 are not there any more" in capsys.readouterr().err
    shutil.rmtree(folder)
    make_ready(cfg, model, Ranks(600))
    assert f"cannot be noticed: {folder} cannot be found" in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_is_used_and_told(own_clips, capsys):
    cfg, model, _ = own_clips
    index = Path(cfg.encoded, "index.jsonl")
    index.write_text(re.sub('"made": "[0-9a-f]*", ', "", index.read_text()))
    index.with_name("index.npy").unlink()
    capsys.readouterr()
    make_ready(cfg, model, Ranks(600))
    assert "cannot be noticed: it does not say what it was made from" in capsys.readouterr().err
    assert open_clips(cfg, model, {}, CPU).sample("video", 0, 0, 0).caption == "a red box"


def test_a_source_without_a_list_is_refused(encoding, world):
    cfg, _ = encoding
    cfg = dataclasses.replace(cfg, toy="", video=f"{world}/videos.csv")
    with pytest.raises(ValueError, match="mix asks for caption samples, of which there is no list"):
        check_inputs(cfg)


def test_what_is_missing_is_told_before_a_model_is_made(world, tmp_path):
    cfg = read_config([f"{ROOT}/configs/ci.py", f"--toy={world}", f"--encoded={tmp_path}/new"])
    check_inputs(cfg)
    check_inputs(dataclasses.replace(cfg, init="owner/name", toy=f"{tmp_path}/not rendered yet"))
    missing = f"{tmp_path}/missing"
    for change in ({"init": missing}, {"vae": missing}, {"video": missing}, {"label": missing, "toy": missing}):
        with pytest.raises(FileNotFoundError, match=missing):
            check_inputs(dataclasses.replace(cfg, **change))
    check_inputs(dataclasses.replace(cfg, video=missing, encoded=str(tmp_path)))  # which is what is read


def test_a_world_of_other_options_is_refused(encoding, tmp_path):
    cfg, _ = encoding
    with pytest.raises(ValueError, match="was rendered with clips 8, the config says 54: choose another folder"):
        data_lists(dataclasses.replace(cfg, toy_clips=54))
    with pytest.raises(ValueError, match="was rendered with level 1, the config says 2: choose another folder"):
        data_lists(dataclasses.replace(cfg, toy_level=2))
    for place in ("/dev/null/toy", str(tmp_path)):  # not to be made; no world
        with pytest.raises(ValueError, match=f"the toy world {place}: "):
            data_lists(dataclasses.replace(cfg, toy=place))


def test_a_vae_from_elsewhere_leaves_the_origin_of_the_rest(encoding, micro, tmp_path):
    """And is named without a path of this machine."""
    cfg, model = encoding
    model.settings = dataclasses.replace(model.settings, origin={"licence": "OpenRAIL++-M", "vae": {"steps": 1}})
    sd.save(model, str(tmp_path / "base.safetensors"))
    cfg = dataclasses.replace(cfg, init=str(tmp_path / "base.safetensors"), vae=micro)
    assert make_model(cfg).settings.origin == {"licence": "OpenRAIL++-M", "vae": {"file": "micro.safetensors"}}


def test_too_many_bad_samples_end_the_run_in_one_line(world, tmp_path):
    lines = [json.loads(line) for line in Path(world, "images.jsonl").read_text().splitlines()]
    for n, line in enumerate(lines):
        line["path"] = os.path.join(world, line["path"]) if n < 4 else "missing.png"
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = train_here(*ci_options(world, tmp_path), f"--caption={tmp_path}/list.jsonl", "--encoded=", "--max_bad=0.01",
                      "--mix={'caption': 1}", "--max_steps=100", "--prompts=()")
    assert done.returncode == 2
    named, last = done.stderr.splitlines()
    assert named == f"warning: skipped caption {tmp_path}/missing.png: missing"
    assert last.startswith("train.py: ") and "more than max_bad = 0.01" in last
