"""The ablations: what is compared differs in what it says, and the tables are what the results give by hand."""

import json
from dataclasses import replace
from multiprocessing import active_children

import pytest
import torch
from PIL import Image

import sd
from lab.ablation import report, runs, ways
from lab.ablation.report import Row
from lab.ablation.runs import GatedUNet, Variant, video_unet
from lab.evals.toy import ANSWERS
from lab.metrics import wilson
from model import UNet
from sd.presets import MICRO
from training.checkpoints import run_checkpoints
from training.config import read_config

runs.STEPS = runs.STEPS_BETWEEN = 2
runs.VALIDATION_TIMESTEPS = (500,)  # probes are most of a small run; its process imports this file, so there too


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
def prepared(warm, world, micro, tmp_path_factory):
    """A folder with the configs of a small ablation, and what all its runs share."""
    folder, before = tmp_path_factory.mktemp("ablation"), micro
    base = runs.STUDIES["paper"].base
    for name in (*base, "run"):
        frames = 1 if name == base[0] else 2
        mix = {"video": 2, "label": 1, "caption": 1} if name == "run" else {"caption": 1}
        encoded = str(folder / f"encoded {frames} {len(mix)}")
        text = STAGE.format(init=before, out=str(folder / name), toy=world, encoded=encoded, frames=frames, mix=mix)
        (folder / f"{name}.py").write_text(text)
        before = str(folder / name / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CONFIGS", str(folder))
        patch.setattr(torch, "get_num_threads", lambda: 2)  # so two runs at a time, of one thread each
        runs.prepare_runs(runs.STUDIES["paper"])
        yield folder


def score(model, fps_values):
    return {"videos": 1, "weight": model.unet.out[2].weight.sum().item(), "unet": type(model.unet).__name__}


TWO = replace(runs.STUDIES["paper"], score=score, variants=(
    Variant("gated", gate=True), Variant("3 videos", triple_data=False, videos=3)))


def test_what_has_its_line_is_not_run_again(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEEDS", 1)
    results = tmp_path / "results.jsonl"
    runs.ablate(TWO, str(results))
    lines = {line["variant"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert {name: line["unet"] for name, line in lines.items()} == {"gated": "GatedUNet", "3 videos": "UNet"}
    assert lines["gated"]["weight"] != lines["3 videos"]["weight"]
    for line in lines.values():
        assert list(line["loss"]) == ["0", "3"] and line["loss"]["0"] != line["loss"]["3"]
    kept = json.dumps(lines["3 videos"]) + "\n"
    results.write_text(kept)
    cfg = read_config([str(prepared / "run.py"), "--max_steps=2"])
    path = f"{cfg.out_dir}/gated 0"
    runs.train(replace(cfg, out_dir=path), lambda unet: video_unet(Variant("gated", gate=True), unet))
    assert run_checkpoints(path)  # as an interrupted run leaves one
    runs.ablate(TWO, str(results))
    again = results.read_text().removeprefix(kept)
    assert without_timings(json.loads(again)) == without_timings(lines["gated"])


def without_timings(line):
    return line | {"train_s": 0, "score_s": 0}


def no_score(model, fps_values):
    raise ArithmeticError("cannot be graded")


def test_a_failed_run_ends_the_others(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEEDS", 6)
    with pytest.raises(ArithmeticError):
        runs.ablate(replace(TWO, score=no_score), str(tmp_path / "results.jsonl"))
    assert not (tmp_path / "results.jsonl").exists() and not active_children()
    assert "step 3/3" in (prepared / "run" / "gated 0" / "log").read_text()
    assert len(list((prepared / "run").glob("* ?"))) < 8  # of twelve: those that waited never began


def test_few_videos_are_the_first(prepared, micro, tmp_path):
    cfg = read_config([str(prepared / "run.py"), f"--init={micro}", "--max_steps=1", f"--out_dir={tmp_path}/few"])
    task = runs.train(cfg, lambda unet: unet, Variant("", triple_data=False, videos=3))
    assert {task.stream.item_at(position) for position in range(100)} == {("video", n) for n in range(3)}
    task = runs.train(replace(cfg, out_dir=str(tmp_path / "all")), lambda unet: unet)
    assert {source for source, _ in map(task.stream.item_at, range(100))} == {"video", "label", "caption"}


def test_what_is_noted_of_a_model(micro):
    noted = runs.score(sd.load(micro), (4, 8))
    assert list(noted) == ["videos", *ANSWERS, "wrong cuts", "trajectories", "px a frame"]
    assert noted["videos"] == 48 and noted["trajectories"] > 0 and list(noted["px a frame"]) == [4, 8]


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


def test_tables_and_figure_are_what_the_lines_say(tmp_path):
    results = [{"variant": name, "seed": seed, "videos": 10, "color": 9, "shape": seed, "direction": 5,
                "background": 10, "wrong cuts": 0, "trajectories": 100.0 + seed, "px a frame": {"2": 4.0, "8": 1.5},
                "worth of direction": 2.0,
                "loss": {"0": {"image": 0.5, "video": 0.75}, "40": {"image": 0.25, "video": 0.125 * seed}}}
               for name in ("neither", "both", "9 videos") for seed in range(3 if name == "both" else 2)]
    row = Row(Variant("both"), results)
    assert row.share("shape") == tuple(100 * x for x in (0.1, *wilson(3, 30)))
    assert row.spread("loss", "40", "video") == (0.125, 0, 0.25)
    text = "\n".join(report.tables(results))
    assert "| both | 90 [74, 97] | 10 [3, 26] |" in text and "| 101 [100, 102] | 0.1250 [0.0000, 0.2500] |" in text
    assert "| neither (2 of 3 seeds) |" in text and "| 2 FPS (true 5.0) | 8 FPS (true 1.2) |" in text
    assert "level 2" not in text
    seen = {"videos": 4, "color": 6, "shape": 8, "direction": 0, "background": 4, "all": 0, "wrong cuts": 1,
            "mixed up": 2}
    *_, heading, _, last = report.tables([*results[:-1], results[-1] | {"level 2": seen}])
    assert heading.startswith("| level 2, % | color | shape") and heading.endswith("| wrong cuts | mixed up |")
    six, none = ([round(100 * x) for x in wilson(n, 8)] for n in (6, 0))  # of 8 shapes, the others of 4 videos
    assert last.startswith(f"| 9 videos (2 of 3 seeds) | 75 [{six[0]}, {six[1]}] | 100 [")
    assert f"| 0 [{none[0]}, {none[1]}] | 100 [" in last and "| 25 [" in last and "| 50 [" in last
    report.draw_figure(results, str(tmp_path / "figure.png"))
    assert Image.open(tmp_path / "figure.png").size == (1100, 700)


def test_a_way_is_trained_and_graded_along_its_curve(prepared, monkeypatch):
    monkeypatch.setattr(runs, "STEPS", 1)
    way, study = Variant("temporal", triple_data=False, layout="temporal"), replace(TWO, curve=(1,), score=None)
    cfg = read_config([str(prepared / "run.py")])
    result = runs.one_run(replace(cfg, toy_level=2), study, way, 0)  # what is encoded already does not change by that
    assert result["level 2"]["videos"] == 40 and "mixed up" in result["level 2"]
    assert list(result["loss"]) == [1, 3]
    for seen in result["loss"].values():
        assert seen["videos"] == 48 and {"direction", "wrong cuts", "video"} <= seen.keys()


def test_ways_learn_as_their_lines_say(tmp_path):
    results = [{"variant": name, "seed": seed, "loss": {
        str(step): {"videos": 10, "color": 9, "shape": 8, "direction": right + seed, "wrong cuts": 0,
                    "video": 0.5 / (1 + step), "image": 0.25} for step, right in ((0, 0), (100, 4), (200, 8))}}
        for name in ("grid", "temporal") for seed in range(3 if name == "grid" else 1)]
    seconds = {"grid": 0.5, "temporal": 0.25}
    grid, temporal = ways.ways_of(results, seconds)
    assert grid.share("direction", "100") == tuple(100 * x for x in (0.5, *wilson(15, 30)))
    assert grid.half() == ("100", "50") and temporal.half() == ("200", "50")
    text = "\n".join(ways.tables(results, seconds))
    assert "| grid (3 runs) | 90 [74, 97] |" in text and "| temporal (1 run) |" in text and "| 500 |" in text
    assert "| 80, 90, 100 |" in text
    ways.draw_figure(results, str(tmp_path / "figure.png"), seconds)
    assert Image.open(tmp_path / "figure.png").size == (1100, 700)
