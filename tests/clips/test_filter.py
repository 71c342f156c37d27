"""prepare.py: the CLIP filter and the check of a list, as commands on real files."""

import csv
import json
import os
import shutil

import av
import numpy as np
import open_clip
import pytest
import torch
from conftest import ONE_THREAD, script
from PIL import Image
from safetensors.torch import save_file
from test_media import write_clip

CLIP = "ViT-S-32-alt"  # one of open_clip's smallest; its weights are random here


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("clip") / "clip.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in open_clip.create_model(CLIP).state_dict().items()}, path)
    return path


@pytest.fixture
def videos(world, tmp_path):
    """The toy world's list with two entries more: a file that is missing, and one that is no video."""
    shutil.copytree(world, tmp_path / "toy")
    with open(tmp_path / "toy" / "videos.csv", "a", newline="") as file:
        columns = next(csv.reader(open(tmp_path / "toy" / "videos.csv")))
        for name in ("missing", "text"):
            csv.DictWriter(file, columns).writerow({"videoid": name, "page_dir": "", "name": 'a caption, "quoted"'})
    (tmp_path / "toy" / "videos" / "text.mp4").write_text("no video")
    return tmp_path / "toy" / "videos.csv"


@pytest.fixture
def filtered(videos, clip_weights, run):
    """filtered(*options): the command on that list."""
    return lambda *options: run("clips.prepare", "filter", videos, "--model", CLIP, "--pretrained", clip_weights, *options)


def scores(videos):
    found = {}
    for path in sorted(videos.parent.glob("videos.csv.scores-*.jsonl")):
        for line in path.read_text().splitlines():
            found[json.loads(line)["item"]] = json.loads(line)
    return found


def test_filter_keeps_the_best_by_equation_5(videos, clip_weights, filtered):
    done = filtered("--keep", "0.2", "--frames", "3")
    assert done.returncode == 0, done.stderr
    found = scores(videos)
    assert sorted(found) == list(range(10)) and found[8]["bad"] == "missing" and "score" not in found[9]

    model, _, preprocess = open_clip.create_model_and_transforms(CLIP, clip_weights)
    tokenize, rows = open_clip.get_tokenizer(CLIP), list(csv.DictReader(open(videos)))
    for i in (0, 5):
        path = videos.parent / "videos" / rows[i]["page_dir"] / f"{rows[i]['videoid']}.mp4"
        with av.open(str(path)) as file:
            frames = list(file.decode(video=0))
        with torch.no_grad():
            text, cosines = model.eval().encode_text(tokenize([rows[i]["name"]])), []
            for n in range(3):  # the middles of three thirds of the clip
                image = frames[int((n + 0.5) / 3 * len(frames))].to_image()
                cosines.append(torch.cosine_similarity(model.encode_image(preprocess(image)[None]), text).item())
        assert found[i]["score"] == pytest.approx(np.mean(cosines) / 0.07, abs=1e-4)

    best = sorted(sorted(range(8), key=lambda i: -found[i]["score"])[:2])
    kept = list(csv.DictReader(open(videos.parent / "videos.filtered.csv")))
    assert kept == [rows[i] for i in best]  # 20% of ten, in the form and order of the list
    assert "2 of 10 clips kept" in done.stdout and "#" in done.stdout and "1 not scored: missing" in done.stdout
    assert Image.open(videos.parent / "videos.csv.sheet.png").size[0] == 3 * 128


def test_an_interrupted_filter_goes_on(videos, filtered):
    assert filtered().returncode == 0
    file, whole = videos.parent / "videos.csv.scores-0.jsonl", scores(videos)
    kept = (videos.parent / "videos.filtered.csv").read_text()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:7])  # killed while it wrote
    assert filtered().returncode == 0
    text = file.read_text()
    assert text.startswith("".join(lines[:4])) and text.count("\n") == 10
    assert {line["item"]: line for line in map(json.loads, text.splitlines())} == whole
    assert (videos.parent / "videos.filtered.csv").read_text() == kept


def test_scores_of_other_settings_do_not_count(videos, filtered):
    assert filtered().returncode == 0
    assert filtered("--frames", "2").returncode == 0
    lines = (videos.parent / "videos.csv.scores-0.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert {json.loads(line)["by"].split(", ")[2] for line in lines} == {"4 frames", "2 frames"}


def test_two_ranks_share_the_scoring(videos, clip_weights):
    done = script("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "clips.prepare", "filter", videos,
                  "--model", CLIP, "--pretrained", clip_weights, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    shares = [{json.loads(line)["item"] for line in path.read_text().splitlines()}
              for path in sorted(videos.parent.glob("*.scores-*.jsonl"))]
    assert shares == [{0, 2, 4, 6, 8}, {1, 3, 5, 7, 9}]
    assert len(list(csv.DictReader(open(videos.parent / "videos.filtered.csv")))) == 1


def test_filter_says_mistakes_in_one_line(videos, clip_weights, run):
    for options, says in ((["--keep", "5"], "lies in 0..1"), (["--model", "ViT-X"], "ViT-X"),
                          (["--model", CLIP, "--pretrained", "nowhere.pt"], "nowhere.pt"),
                          (["--frames", "0"], "--frames: 0 is less than 1")):
        done = run("clips.prepare", "filter", videos, *options)
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("options, says", [
    (["--frames", "7"], "--frames: "), (["--size", "60x64"], "not divisible by 8"),
    (["--fps", "0"], "--fps: 0 is not in 1..60"), (["--draws", "0"], "--draws: 0 is less than 1"),
    (["--device", "cpu:4"], "--device cpu:4 is not here"), (["--seed", "-1"], "--seed: -1 is less than 0")])
def test_encode_says_mistakes_in_one_line(world, micro, tmp_path, run, options, says):
    done = run("clips.prepare", "encode", tmp_path / "out", "--ckpt", micro, "--label", f"{world}/labels", *options)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not os.listdir(tmp_path)


def test_places_that_cannot_be_written_are_told(world, micro, tmp_path, run):
    done = run("clips.prepare", "encode", "/dev/null/out", "--ckpt", micro, "--label", f"{world}/labels", "--size", "32x32")
    assert done.returncode == 2 and done.stderr.startswith("data.py: /dev/null/out.part/index.jsonl cannot be written")
    (tmp_path / "list.jsonl").write_text('{"path": "a.png", "caption": "one"}\n')
    (tmp_path / "list.jsonl.check.jsonl.part").mkdir()
    done = run("clips.prepare", "check", tmp_path / "list.jsonl", "--source", "caption")
    assert done.returncode == 2 and "list.jsonl.check.jsonl cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_check_counts_by_reason_and_names_every_case(tmp_path, run):
    write_clip(tmp_path / "good.mp4", range(0, 1200, 20))
    write_clip(tmp_path / "short.mp4", range(0, 100, 20))
    shutil.copy(tmp_path / "good.mp4", tmp_path / "copy.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    cut = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(cut[:-300])
    lines = [{"path": f"{name}.mp4", "caption": "x"} for name in ("good", "short", "copy", "text", "cut", "missing")]
    lines += [{"path": "good.mp4"}, {"caption": "x"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("clips.prepare", "check", tmp_path / "list.jsonl")
    assert done.returncode == 0, done.stderr
    found = {}
    for line in map(json.loads, (tmp_path / "list.jsonl.check.jsonl").read_text().splitlines()):
        found[line["item"]] = line["reason"]
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    assert found[1] == "too short" and found[2] == f"the same as {tmp_path}/good.mp4" and found[5] == "missing"
    assert found[6] == "no caption" and "path" in found[7]
    assert "8 items, 1 files that can be used, 7 that cannot" in done.stdout
    for reason in ("too short", "duplicated", "missing", "no caption"):
        assert f"       1  {reason}\n" in done.stdout


def test_check_of_images(world, tmp_path, run):
    shutil.copytree(os.path.join(world, "labels"), tmp_path / "labels")
    folder = sorted((tmp_path / "labels").iterdir())[3]
    (folder / "broken.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "labels" / "a label without images").mkdir()
    done = run("clips.prepare", "check", tmp_path / "labels", "--source", "label")
    assert done.returncode == 0, done.stderr
    assert "1  not an image that can be read" in done.stdout and "1  no image in it" in done.stdout
    assert str(folder / "broken.jpg") in (tmp_path / "labels" / "labels.check.jsonl").read_text()
