"""The ablations: what is compared differs in what it says, and the tables are what the results give by hand."""

import json
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import sd
from lab.ablation import report, runs, ways
from lab.ablation.report import Row
from lab.ablation.runs import GatedUNet, Variant, video_unet
from lab.evals.toy import ANSWERS
from lab.metrics import wilson
from model import UNet
from sample import Request
from sd.presets import MICRO
from training.checkpoints import run_checkpoints
from training.config import read_config

ONE_RUN, PROBE = runs.one_run, runs.probe
runs.HOW = Request(steps=2)  # probes are most of a small run; its process imports this file, so there too
runs.VALIDATION_TIMESTEPS = (500,)


@pytest.fixture
def image():
    """The UNet of an image model, with random weights in every layer."""
    torch.manual_seed(0)
    unet = UNet(replace(MICRO.unet, mixed_embedding=False, fps_embedding=False))
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return unet


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    return x, torch.tensor([3, 700]), context, torch.tensor([8.0, 120.0]), (2, 2)


@torch.no_grad()
def test_variants_start_as_the_image_model_with_what_they_add(image):
    x, t, context, fps, grid = inputs()
    plain = image(x, t, context)
    assert torch.equal(video_unet(Variant("", mixed_embedding=False), image)(x, t, context, fps, grid), plain)
    assert torch.equal(video_unet(Variant("", gate=True), image)(x, t, context, fps, grid), plain)
    both = video_unet(Variant(""), image)
    assert not torch.allclose(both(x, t, context, fps, grid), plain, atol=1e-2)
    assert not hasattr(video_unet(Variant("", fps_embedding=False), image), "fps_proj") and hasattr(both, "fps_proj")
    open_gate = video_unet(Variant("", gate=True), image)
    open_gate.gate.fill_(1)
    assert torch.equal(open_gate(x, t, context, fps, grid), both(x, t, context, fps, grid))


def test_a_closed_gate_learns(image):
    unet = video_unet(Variant("", gate=True), image)
    assert isinstance(unet, GatedUNet)
    unet(*inputs()).square().mean().backward()
    assert (unet.gate.grad != 0).all()


STAGE = """
init = {init!r}
out_dir = {out!r}
toy = {toy!r}
toy_clips = 8
toy_images = 4
toy_captioned = 8
encoded = {encoded!r}
frames = {frames}
width = 32
height = 32
fps_values = (4, 8)
draws = 1
mix = {mix!r}
max_steps = 3
batch_size = 4
dtype = "auto"
default_fps = 4
log_every = 1
"""


@pytest.fixture(scope="module")
def prepared(world, micro, tmp_path_factory):
    """A folder with the configs of a small ablation, and what all its runs share."""
    folder, before = tmp_path_factory.mktemp("ablation"), micro
    for name, frames, mix in (("image", 1, {"caption": 1}), ("run", 2, {"video": 2, "label": 1, "caption": 1})):
        text = STAGE.format(init=before, out=str(folder / name), toy=world, encoded=str(folder / f"encoded {name}"),
                            frames=frames, mix=mix)
        (folder / f"{name}.py").write_text(text)
        before = str(folder / name / "model.safetensors")
    (folder / "paper.py").write_text("")
    two = Variant("gated", gate=True), Variant("3 videos", triple_data=False, videos=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CONFIGS", str(folder))
        patch.setattr(torch, "get_num_threads", lambda: 2)  # so two runs at a time, of one thread each
        patch.setitem(runs.STUDIES, "paper", two)
        patch.setattr(runs, "one_run", small_run)
        yield runs.prepare_runs("paper")


def small_run(cfg, variant, seed):
    """In a process of its own: its line, with a number that tells its last weights from others."""
    runs.probe = lambda cfg, model: {**PROBE(cfg, model), "weight": model.unet.out[2].weight.sum().item(),
                                     "unet": type(model.unet).__name__}
    return ONE_RUN(cfg, variant, seed)


def test_what_has_its_line_is_not_run_again(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEEDS", 1)
    results = tmp_path / "results.jsonl"
    runs.ablate("paper", str(results))
    lines = {line["variant"]: line for line in map(json.loads, results.read_text().splitlines())}
    last = {name: line["curve"]["3"] for name, line in lines.items()}
    assert {name: seen["unet"] for name, seen in last.items()} == {"gated": "GatedUNet", "3 videos": "UNet"}
    assert last["gated"]["weight"] != last["3 videos"]["weight"]
    for line in lines.values():
        assert list(line["curve"]) == ["0", "3"] and line["curve"]["0"]["video"] != line["curve"]["3"]["video"]
    kept = json.dumps(lines["3 videos"]) + "\n"
    results.write_text(kept)
    cfg = replace(prepared, max_steps=2)
    path = f"{cfg.out_dir}/gated 0"
    runs.train(replace(cfg, out_dir=path), lambda unet: video_unet(Variant("gated", gate=True), unet))
    assert run_checkpoints(path)  # as an interrupted run leaves one
    runs.ablate("paper", str(results))
    again = results.read_text().removeprefix(kept)
    assert json.loads(again) | {"seconds": 0} == lines["gated"] | {"seconds": 0}


def test_lines_of_another_recipe_do_not_count(tmp_path, monkeypatch):
    """Whatever changes what the runs come from makes it another: the weights, or what a config assigns."""
    monkeypatch.setattr(runs, "CONFIGS", str(tmp_path))
    weights, path = tmp_path / "weights", tmp_path / "results.jsonl"
    texts = {"image": f"init = {str(weights)!r}\nseed = 1\n", "run": "lr = 1e-3\n", "paper": "draws = 8\n"}

    def recipe(given, **changed):
        weights.write_bytes(given)
        for name, text in (texts | changed).items():
            (tmp_path / f"{name}.py").write_text(text)
        return runs.recipe_of("run", "paper")

    first = recipe(b"1")
    path.write_text("".join(json.dumps({"variant": name, "recipe": said}) + "\n" for name, said in (
        ("both", first), ("neither", "another"))) + '{"variant": "gated"}\n')
    assert [line["variant"] for line in runs.results_of("paper", str(path))] == ["both"]
    assert recipe(b"1", run="# why\nlr = 1e-3\n") == first
    others = [recipe(b"2"), recipe(b"1", image=texts["image"] + "lr = 1e-4\n"), recipe(b"1", run="lr = 1e-4\n"),
              recipe(b"1", paper="draws = 9\n")]
    assert len({first, *others}) == 5


def failing_run(cfg, variant, seed):
    """In a process of its own: a run that ends in an error when it is graded after its last step."""
    looks = iter([{"the": "first"}])
    runs.probe = lambda cfg, model: next(looks, None) or 1 / 0
    return ONE_RUN(cfg, variant, seed)


def test_a_failed_run_ends_the_others(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEEDS", 6)
    monkeypatch.setattr(runs, "one_run", failing_run)
    with pytest.raises(ZeroDivisionError):
        runs.ablate("paper", str(tmp_path / "results.jsonl"))
    assert not (tmp_path / "results.jsonl").exists() and not active_children()
    assert len(list(Path(prepared.out_dir).glob("* ?"))) < 8  # of twelve: those that waited never began


def test_few_videos_are_the_first(prepared, micro, tmp_path):
    cfg = replace(prepared, init=micro, max_steps=1, out_dir=f"{tmp_path}/few")
    task = runs.train(cfg, lambda unet: unet, Variant("", triple_data=False), partial(runs.ProbedTask, 3))
    assert {task.stream.item_at(position) for position in range(100)} == {("video", n) for n in range(3)}
    task = runs.train(replace(cfg, out_dir=str(tmp_path / "all")), lambda unet: unet)
    assert {source for source, _ in map(task.stream.item_at, range(100))} == {"video", "label", "caption"}


def test_what_is_noted_of_a_model(micro):
    cfg = read_config([f"{ROOT}/configs/ci.py", "--toy_level=2", "--fps_values=(4, 8)"])
    noted = PROBE(cfg, sd.load(micro))
    assert {"videos", *ANSWERS, "wrong cuts", "image", "video", "worth of direction"} <= noted.keys()
    assert noted["videos"] == 48 and noted["trajectories"] > 0 and list(noted["px a frame"]) == ["4", "8"]
    assert noted["level 2"]["videos"] == 40 and "mixed up" in noted["level 2"]


@pytest.mark.parametrize("options, says", [
    (["--results", "/dev/null/r.jsonl"], "/dev/null"),
    (["--figure", "/dev/null/f.png"], "/dev/null"),
    (["--results", "{}/results.jsonl"], "results.jsonl, line 1: not the result of a run"),
])
def test_mistakes_are_told_before_any_run(run, tmp_path, options, says):
    (tmp_path / "results.jsonl").write_text('{"variant": "bo')
    given = [option.format(tmp_path) for option in options]
    done = run("lab.ablation", "paper", "--figure", tmp_path / "f.png", *given)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def seen(right, loss, **more):
    return {"videos": 10, "color": 9, "shape": 8, "direction": right, "background": 10, "wrong cuts": 0,
            "trajectories": 100.0 + right, "px a frame": {"2": 4.0, "8": 1.5}, "worth of direction": 2.0,
            "image": 0.5 * loss, "video": loss, **more}


def test_tables_and_figure_are_what_the_lines_say(tmp_path):
    results = [{"variant": name, "seed": seed, "curve": {
        "0": seen(0, 0.75), "20": seen(1, 0.5), "40": seen(seed, 0.125 * seed)}}
        for name in ("neither", "both", "54 videos") for seed in range(3 if name == "both" else 2)]
    row = Row(Variant("both"), results)
    assert row.share("direction") == tuple(100 * x for x in (0.1, *wilson(3, 30)))
    assert row.spread("video") == (0.125, 0, 0.25) and row.spread("image", step="0") == (0.375, 0.375, 0.375)
    text = "\n".join(report.tables(results))
    both = "90 [74, 97] | 80 [63, 90] | 10 [3, 26] | 100 [89, 100] | 0 [0, 11] | 0, 10, 20 | 101 [100, 102] | 0.1250"
    assert f"| both | {both} [0.0000, 0.2500] | 2.0 [2.0, 2.0] |" in text
    # as many videos as with triple data, of which half are videos: at half of the steps
    assert f"| both | 40 | {both}" in text and "| neither (2 of 3 seeds) | 20 | 90" in text
    assert "| 10, 10 | 101 [101, 101] | 0.5000 " in text
    assert "| 2 FPS (true 5.0) | 8 FPS (true 1.2) |" in text
    assert "| loss of images | step 0 | step 20 | step 40 |" in text
    assert "level 2" not in text
    pairs = {"videos": 4, "color": 6, "shape": 8, "direction": 0, "background": 4, "all": 0, "wrong cuts": 1,
             "mixed up": 2}
    graded = [{"variant": "54 videos", "seed": 0, "curve": {"0": seen(0, 1), "40": seen(1, 1, **{"level 2": pairs})}}]
    *_, heading, _, last = report.tables(graded)
    assert heading.startswith("| level 2, % | color | shape") and heading.endswith("| wrong cuts | mixed up |")
    six, none = ([round(100 * x) for x in wilson(n, 8)] for n in (6, 0))  # of 8 shapes, the others of 4 videos
    assert last.startswith(f"| 54 videos (1 of 3 seeds) | 75 [{six[0]}, {six[1]}] | 100 [")
    assert f"| 0 [{none[0]}, {none[1]}] | 100 [" in last and "| 25 [" in last and "| 50 [" in last
    report.draw_figure(results, str(tmp_path / "figure.png"))
    assert Image.open(tmp_path / "figure.png").size == (1100, 700)


def test_a_way_is_trained_and_graded_along_its_curve(prepared):
    cfg = replace(prepared, sheet_every=2, out_dir=f"{prepared.out_dir}-way")
    result = ONE_RUN(cfg, Variant("temporal", triple_data=False, layout="temporal"), 0)
    assert list(result["curve"]) == ["0", "2", "3"]
    for one in result["curve"].values():
        assert one["videos"] == 48 and {"direction", "wrong cuts", "video"} <= one.keys()


def test_ways_learn_as_their_lines_say(tmp_path):
    results = [{"variant": name, "seed": seed, "curve": {
        str(step): seen(right + seed, 0.5 / (1 + step)) for step, right in ((0, 0), (100, 4), (200, 8))}}
        for name in ("grid", "temporal") for seed in range(3 if name == "grid" else 1)]
    seconds = {"grid": 0.5, "temporal": 0.25}
    rows = report.rows_of(results, runs.WAYS)
    assert rows["grid"].share("direction", "100") == tuple(100 * x for x in (0.5, *wilson(15, 30)))
    assert ways.half(rows["grid"]) == ("", 100) and ways.half(rows["temporal"]) == ("", 200)
    text = "\n".join(ways.tables(results, seconds))
    assert "| grid | 90 [74, 97] |" in text and "| temporal (1 of 3 seeds) |" in text and "| 500 |" in text
    assert "| 80, 90, 100 |" in text and "| 100 | 50 | 500 |" in text and "| 200 | 50 | 250 |" in text
    ways.draw_figure(results, str(tmp_path / "figure.png"), seconds)
    assert Image.open(tmp_path / "figure.png").size == (1100, 700)
