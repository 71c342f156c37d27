"""What sampling in less time costs: forward-equivalents by hand and by hooks, PSNR by its formula, and the command."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import sd
from beyond.fast import FAST, fast_settings
from lab import toy
from lab.evals import fast
from lab.evals.toy import ANSWERS, grade_prompts
from lab.metrics import wilson
from sample import SHIPPED, NoiseSchedule, Request, generate
from training.account import FORMULAS


def asked(model, *given, **more):
    return Request("x", **fast_settings(fast.setting(*given, **more))).resolve(model)


# ---------------------------------------------------------------------------------------------------------------------
# Cost


@pytest.mark.parametrize("given, spent", [
    (("ddim", 50), 100), (("ddim", 50, [500, 999]), 75), (("ddim", 50, [0, 499]), 75), (("dpm++", 50, [0, 0]), 50),
    (("dpm++", 6, [0, 999], 3), 2 * (1 + 0.25 + 0.25 + 1 + 0.25 + 1)), (("dpm++", 6, [0, 0], 2), 4 + 0.5),
    # at 999, 899, ..., 99: guidance begins at 799, and that step is full
    (("dpm++", 10, [100, 800], 3), 1 + 0.25 + 2 * (1 + 1 + 0.25 + 0.25 + 1 + 0.25 + 0.25) + 1),
])
def test_forward_equivalents_by_hand(micro, given, spent):
    model = sd.load(micro)  # of trailing timesteps
    model.settings = replace(model.settings, guidance=3.0)
    request = asked(model, *given)
    timesteps = NoiseSchedule(model.settings).sampling_timesteps(request.steps)
    assert fast.forward_equivalents(request, timesteps, 0.25) == spent
    unguided = replace(request, guidance=1.0, reuse=1)
    assert fast.forward_equivalents(unguided, timesteps, 0.25) == request.steps


@pytest.mark.parametrize("given", [("dpm++", 7, [0, 999], 3), ("ddim", 9, [300, 800], 4), ("dpm++sde", 8, [0, 600], 2),
                                   ("ddim", 5, [500, 999], 1)])
def test_forward_equivalents_are_what_runs(micro, given):
    """By hooks on the UNet, and on its middle block, which a reused step leaves out."""
    model, seen = sd.load(micro), Counter()
    model.settings = replace(model.settings, guidance=3.0)
    model.unet.register_forward_pre_hook(lambda module, inputs: seen.update(all=len(inputs[0])))
    model.unet.middle_block.register_forward_pre_hook(lambda module, inputs: seen.update(full=len(inputs[0])))
    request = asked(model, *given)
    generate(model, request)
    expected = seen["full"] + 0.3 * (seen["all"] - seen["full"])
    timesteps = NoiseSchedule(model.settings).sampling_timesteps(request.steps)
    assert fast.forward_equivalents(request, timesteps, 0.3) == pytest.approx(expected)


@pytest.mark.parametrize("layout", ["grid", "temporal"])
def test_a_reused_step_costs_its_blocks(micro, layout):
    """By the FLOP of each block of one full forward."""
    model = sd.load(micro, layout=layout)
    request, side = Request("x").resolve(model), 2 * 32 // model.vae.cfg.downsampling
    x, t, fps = torch.zeros(1, 4, side, side), torch.full((1,), 999), torch.full((1,), 8.0)
    context, last = model.text.encode([""]), len(model.unet.output_blocks) - 1
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model.unet(x, t, context, fps, (2, 2))
    blocks = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    parts = ("time_embed", "time_proj", "fps_proj", "input_blocks.0", f"output_blocks.{last}", "out.2")
    expected = sum(blocks[f"UNet.{part}"] for part in parts) / blocks["Global"]
    assert fast.reused_share(model, request) == pytest.approx(expected) and 0 < expected < 0.9


def test_settings_are_what_fast_may_be(micro):
    model = sd.load(micro)
    assert all(one.keys() == FAST.keys() for one in fast.SETTINGS)
    assert len({fast.name_of(one) for one in fast.SETTINGS}) == len(fast.SETTINGS)
    assert {name: asked(model, "ddim", 50).__dict__[name] for name in FAST} == fast_settings(fast.SETTINGS[0])
    assert any(fast_settings(one) == FAST for one in fast.SETTINGS)
    for one in fast.SETTINGS:
        assert json.loads(json.dumps(one)) == one and Request("x", **fast_settings(one)).resolve(model)
    assert fast.name_of(fast.setting("dpm++", 20, [100, 800], 2)) == "dpm++ 20, guidance 100..800, reuse 2"


# ---------------------------------------------------------------------------------------------------------------------
# Quality

CENTERS = np.array([20.3, 12.1]) + np.arange(16)[:, None] * [0, 2.5]  # of boxes, px


def by_formula(one, two):
    return -10 * np.log10(np.mean((one.astype(float) - two) ** 2) / 255**2)


@pytest.mark.parametrize("shape", toy.SHAPES)
@pytest.mark.parametrize("size", [64, 128])
def test_psnr_of_true_renders(shape, size):
    def film(color="red", off=(0, 0)):
        return toy.draw(color, shape, "teal", (CENTERS + off) * size / 64, size)

    scene, seen = ("red", shape, "right", "teal"), toy.grade(film())
    assert fast.fitted_psnr(scene, seen.centers, film()) > 40
    # the video is where its shape was read, wherever that is
    assert fast.fitted_psnr(scene, toy.grade(film(off=(7, 3))).centers, film(off=(7, 3))) > 40
    # against a render elsewhere, and of another colour
    for shift, other in (((0, 2), film(off=(0, 2))), ((0, 0), film("blue"))):
        found = fast.fitted_psnr(scene, seen.centers + shift, film() if any(shift) else other)
        assert found == pytest.approx(by_formula(film(), other), abs=0.3) and found < 30
    jumped = film()
    jumped[5] = film(off=(6, 0))[5]
    assert fast.fitted_psnr(scene, toy.grade(jumped).centers, jumped) < 35


def test_psnr_where_nothing_was_read():
    """Against the background alone, and on the line through those frames in which a shape was read."""
    scene, video = ("red", "circle", "right", "teal"), toy.draw("red", "circle", "teal", CENTERS)
    blank = np.empty_like(video)
    blank[:] = toy.BACKGROUNDS["teal"]
    for centers in (np.full((16, 2), np.nan), np.where(np.arange(16)[:, None] == 3, CENTERS, np.nan)):
        assert fast.fitted_psnr(scene, centers, video) == pytest.approx(by_formula(video, blank))
        assert fast.fitted_psnr(scene, centers, blank) == np.inf
    centers = np.where(np.arange(16)[:, None] % 5 == 3, CENTERS, np.nan)
    assert fast.fitted_psnr(scene, centers, video) > 40


def test_psnr_of_two_shapes():
    scene = ("red", "circle", "right", "blue", "square", "right", "teal")
    centers = np.stack([CENTERS, CENTERS + [30, 0]])
    video = toy.draw_scene(scene, centers)
    assert fast.fitted_psnr(scene, centers, video) > 40
    alone = toy.draw("red", "circle", "teal", CENTERS)
    assert fast.fitted_psnr(scene, centers, alone) == pytest.approx(by_formula(alone, video), abs=0.3)
    assert fast.fitted_psnr(scene, np.stack([CENTERS, np.full((16, 2), np.nan)]), alone) > 40


def test_what_is_noted_is_what_the_grader_says(monkeypatch):
    """Two scenes of the shipped model: graded as by grade_prompts, and latents beside those made one by one."""
    scenes = toy.scenes("val")[:2]
    monkeypatch.setattr(toy, "scenes", lambda split, level=1: scenes)
    model = sd.load(SHIPPED)
    request, ended = asked(model, "dpm++", 3, [0, 0]), []
    graded = grade_prompts(model, "val", 2, request)
    for scene in scenes:
        generate(model, replace(request, prompt=toy.caption(*scene)), progress=lambda i, t, x, x0: ended.append(x0[0]))
    seen = fast.measure(model, request, "val", 2, "", [x + 0.5 for x in ended[2::3]])
    for name in (*ANSWERS, "wrong cuts"):
        count = graded.wrong_cuts if name == "wrong cuts" else graded.right[name]
        assert list(seen[name].values()) == [count / 4, *wilson(count, 4)]
    assert seen["videos"] == 4 and seen["latents"] == pytest.approx(0.5, abs=1e-3) and 10 < seen["psnr"] < 40
    assert seen["trajectories"]["model"] > 0 and seen["background"]["share"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def a_line(forwards, psnr=30.0, cuts=0, **right):
    counts = {name: right.get(name, 90) for name in ANSWERS} | {"wrong cuts": cuts}
    graded = {name: dict(zip(("share", "low", "high"), (n / 96, *wilson(n, 96)))) for name, n in counts.items()}
    return {"forwards": forwards, "psnr": psnr, **graded}


def test_the_cheapest_that_is_not_worse():
    first = a_line(100)
    assert fast.cheapest([first]) is first
    assert fast.cheapest([first, a_line(10, shape=60), a_line(9, cuts=20), a_line(8, direction=0)]) is first
    near, better, cheap = a_line(20, shape=89), a_line(15, color=96), a_line(10, background=70)
    assert fast.cheapest([first, a_line(10, shape=87)]) is first  # the intervals overlap, but it loses three points
    assert fast.cheapest([first, near, cheap]) is near
    assert fast.cheapest([first, near, better, cheap]) is better
    low = a_line(50, shape=50)
    assert fast.cheapest([low, a_line(10)]) is not low  # wholly above is not worse
    two = [first | {"mixed up": a_line(1, cuts=2)["wrong cuts"]}, near | {"mixed up": a_line(1, cuts=20)["wrong cuts"]}]
    assert fast.cheapest(two) is two[0]
    sharp = a_line(15, psnr=31)
    assert fast.cheapest([first, better, sharp]) is sharp and fast.cheapest([first, sharp, better]) is sharp


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def call(micro, tmp_path, monkeypatch, capsys):
    """call(...): the command on a half-precision copy of the micro model, on few scenes with few settings -> what it
    prints."""
    scenes = toy.scenes
    monkeypatch.setattr(toy, "scenes", lambda split, level=1: scenes(split, level)[: {"val": 3, "test": 5}[split]])
    model = sd.load(micro, dtype=torch.float16)
    model.settings = replace(model.settings, guidance=3.0)
    sd.save(model, str(tmp_path / "m.safetensors"))
    monkeypatch.setattr(fast, "EXACT", {"sampler": "ddim", "eta": 0.0, "steps": 2})
    monkeypatch.setattr(fast, "SETTINGS", [fast.setting("ddim", 2), fast.setting("dpm++", 2, [0, 0], 2),
                                           fast.setting("dpm++sde", 1)])

    def call(*options):
        files = {"ckpt": "m.safetensors", "results": "r.jsonl", "figure": "f.png"}
        words = [f"--{option}={tmp_path / name}" for option, name in files.items()]
        monkeypatch.setattr(sys, "argv", ["fast.py", *words, "--seeds=1", "--dtype=float32", *options])
        fast.main()
        return capsys.readouterr().out

    return call


def without_seconds(table):
    return re.sub(r"(\| \d+\.\d) \| \d+\.\d\d \|", r"\1 |", table)


def test_the_command_and_how_it_goes_on(call, tmp_path):
    results, ckpt = tmp_path / "r.jsonl", tmp_path / "m.safetensors"
    out = call()
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    assert [one["setting"] for one in lines[:3]] == fast.SETTINGS
    assert [one["split"] for one in lines] == ["val", "val", "val", "test"]
    assert [one["videos"] for one in lines] == [3, 3, 3, 5]
    assert [one["forwards"] for one in lines[:3]] == [4, 2, 2]  # the last step is full
    assert lines[0]["latents"] == 0 and lines[1]["latents"] > 0 and lines[2]["latents"] is None
    assert "\n| dpm++ 2, no guidance, reuse 2 | 2.0 | " in out and Image.open(tmp_path / "f.png").size == (1100, 700)
    best = fast.cheapest(lines[:3])["setting"]
    assert lines[3]["setting"] == best != fast.SETTINGS[0]

    kept = results.read_text().splitlines(keepends=True)
    before, ckpt_before = sd.load(str(ckpt)), ckpt.read_bytes()
    assert without_seconds(call()) == without_seconds(out)
    assert "".join(kept) == results.read_text() and ckpt.read_bytes() == ckpt_before
    # one line is missing, and there is one like it of other weights, and of two shapes
    other = "".join(json.dumps(lines[1] | differs) + "\n" for differs in ({"weights": "others"}, {"level": 2}))
    results.write_text(kept[0] + other + kept[2] + kept[3])
    assert f"fast is now {best}" in call("--write")
    *rest, again = results.read_text().splitlines(keepends=True)
    assert "".join(rest) == kept[0] + other + kept[2] + kept[3]
    assert json.loads(again) == lines[1]

    written = sd.load(str(ckpt))
    assert written.settings == replace(before.settings, fast=best)
    assert abs(ckpt.stat().st_size - len(ckpt_before)) < 1000  # still in half precision
    for part, module in written.parts().items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before.parts()[part].state_dict()[name])
    whole = Request("x", fast=True).resolve(written)
    assert {name: getattr(whole, name) for name in FAST} == fast_settings(best)
    assert len(results.read_text().splitlines()) == 6 and call() and len(results.read_text().splitlines()) == 6


@pytest.mark.parametrize("options, says", [
    (["--ckpt", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--seeds", "0"], "seeds must be >= 1, got 0"),
    (["--figure", "f.jpg"], "figure must end in .png, got f.jpg"),
    (["--results", "/dev/null/r.jsonl"], "/dev/null"),
    (["--write", "--ckpt", "model.ckpt"], "ckpt must end in .safetensors, got model.ckpt"),
    (["--results", "{}/wrong.jsonl"], "line 1: not the result of a run"),
    (["--ckpt", "{}/wide.safetensors"], "must make square videos, got 4 frames of (64, 32)"),
])
def test_mistakes_are_told_in_one_line(run, micro, tmp_path, options, says):
    (tmp_path / "wrong.jsonl").write_text("{")
    model = sd.load(micro)
    model.settings = replace(model.settings, width=64)
    sd.save(model, str(tmp_path / "wide.safetensors"))
    given = [f"--ckpt={micro}", "--figure={}/f.png", "--results={}/r.jsonl", *options]
    done = run("lab.evals.fast", *[option.format(tmp_path) for option in given])
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
