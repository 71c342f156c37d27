"""The CLIP filter, as a command on real files."""

import csv
import io
import json
import os
import shutil
from contextlib import redirect_stdout, suppress

import av
import numpy as np
import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import command
from safetensors.torch import save_file

from clips.decode import Bad
from clips.filter import clip_filter, write_list, write_sheet
from clips.lists import Items

CLIP = "ViT-S-32-alt"  # one of open_clip's smallest; its weights are random here


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("clip") / "clip.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in open_clip.create_model(CLIP).state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def once(world, clip_weights, tmp_path_factory):
    """(folder, stdout) of filtering the toy world's list and two more items: a missing file, and no video."""
    folder = tmp_path_factory.mktemp("filter") / "toy"
    shutil.copytree(world, folder)
    with open(folder / "videos.csv", "a", newline="") as file:
        columns = next(csv.reader(open(folder / "videos.csv")))
        for name in ("missing", "text"):
            csv.DictWriter(file, columns).writerow({"videoid": name, "page_dir": "", "name": 'a caption, "quoted"'})
    (folder / "videos" / "text.mp4").write_text("no video")
    with redirect_stdout(io.StringIO()) as out:
        clip_filter(str(folder / "videos.csv"), 0.2, CLIP, clip_weights, 3)
    return folder, out.getvalue()


@pytest.fixture
def videos(once, tmp_path):
    """A copy of that list, filtered."""
    shutil.copytree(once[0], tmp_path / "toy")
    return tmp_path / "toy" / "videos.csv"


@pytest.fixture
def filtered(videos, clip_weights, run):
    """filtered(*options): the command on that list, again."""
    return lambda *options: run("clips.filter", videos, "--model", CLIP, "--pretrained", clip_weights, *options)


def scores(videos):
    found = {}
    for path in sorted(videos.parent.glob("videos.csv.scores-*.jsonl")):
        for line in path.read_text().splitlines():
            found[json.loads(line)["item"]] = json.loads(line)
    return found


def test_filter_keeps_the_best_by_equation_5(videos, clip_weights, once):
    found, said = scores(videos), once[1]
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
    assert "2 of 10 clips kept" in said and "#" in said and "1 not scored: missing" in said
    assert said.count("kept from here on") == 1
    assert Image.open(videos.parent / "videos.csv.sheet.png").size[0] == 3 * 128


ROWS = st.lists(st.sampled_from([b"a.mp4,a dog", b'a.mp4,"a\r\ndog, ""x""\n"', b'a.mp4,5" pizza', b"a.mp4,b,c",
                                 b"a.mp4,\x92", "a.mp4,猫 é\u2028".encode()]), min_size=1, max_size=6)
ENDS, MARKS = st.sampled_from([b"\n", b"\r\n", b"\r"]), st.sampled_from([b"", b"\xef\xbb\xbf"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, ENDS, st.booleans(), MARKS, st.data())
def test_a_filtered_list_holds_the_very_records(tmp_path, rows, end, ended, mark, data):
    """Whatever their quotes and line ends."""
    rows = [b"a.mp4,first", *rows]
    (tmp_path / "list.csv").write_bytes(mark + end.join([b"path,caption", *rows]) + end * ended)
    items, good = Items("video", str(tmp_path / "list.csv")), {}
    for i in range(len(items)):
        with suppress(Bad):
            good[i] = items[i].captions
    kept = sorted(data.draw(st.sets(st.sampled_from(sorted(good)), min_size=1)))
    write_list(str(tmp_path / "list.filtered.csv"), items, kept)
    written = (tmp_path / "list.filtered.csv").read_bytes()
    assert written.rstrip(b"\r\n") == end.join([b"path,caption", *(rows[i] for i in kept)])
    again = Items("video", str(tmp_path / "list.filtered.csv"))
    assert [again[n].captions for n in range(len(again))] == [good[i] for i in kept]


def test_an_interrupted_filter_goes_on(videos, filtered):
    file, whole = videos.parent / "videos.csv.scores-0.jsonl", scores(videos)
    kept = (videos.parent / "videos.filtered.csv").read_text()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:7])  # killed while it wrote
    done = filtered("--keep", "0.2", "--frames", "3")
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert text.startswith("".join(lines[:4])) and text.count("\n") == 10
    again = {line["item"]: line for line in map(json.loads, text.splitlines())}
    assert again.keys() == whole.keys()  # in other batches scores are the same but for their last digits
    assert all(again[i] == pytest.approx(whole[i]) for i in whole)
    assert (videos.parent / "videos.filtered.csv").read_text() == kept


def test_scores_of_other_settings_do_not_count(videos, filtered):
    assert filtered("--frames", "2").returncode == 0
    lines = (videos.parent / "videos.csv.scores-0.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert {json.loads(line)["by"].split(", ")[2] for line in lines} == {"3 frames", "2 frames"}


def test_a_clip_or_caption_that_changed_is_scored_again(videos, filtered):
    file, before = videos.parent / "videos.csv.scores-0.jsonl", scores(videos)
    rows = videos.read_text().splitlines(keepends=True)
    rows[1] = rows[1].replace(Items("video", str(videos))[0].captions[0], "another caption")
    videos.write_text("".join(rows))
    os.utime(Items("video", str(videos))[1].path, (1, 1))
    assert filtered("--keep", "0.2", "--frames", "3").returncode == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 12 and {line["item"] for line in lines[10:]} == {0, 1}
    assert lines[11 if lines[11]["item"] == 0 else 10]["score"] != before[0]["score"]


def test_a_clip_that_vanished_after_it_was_scored_is_named_in_the_sheet(videos, filtered):
    assert filtered("--keep", "0.5", "--frames", "3").returncode == 0
    items = Items("video", str(videos))
    scored = json.loads((videos.parent / "videos.csv.scores-0.jsonl").read_text().splitlines()[0])
    os.remove(items[scored["item"]].path)
    write_sheet(str(videos.parent / "again.png"), items, [scored["item"]], {scored["item"]: scored}, 3)
    with Image.open(videos.parent / "again.png") as sheet:
        assert sheet.size == (3 * 128, 128 + 16)


def test_what_is_scored_is_not_scored_again(videos, filtered, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model_and_transforms", None)
    done = filtered("--keep", "0.5", "--frames", "3")
    assert done.returncode == 0 and "5 of 10 clips kept" in done.stdout, done.stderr


def test_two_ranks_share_the_scoring(processes, videos, clip_weights):
    """Whichever is free takes the next ones."""
    os.remove(videos.parent / "videos.csv.scores-0.jsonl")
    header, *rows = videos.read_bytes().splitlines(keepends=True)
    videos.write_bytes(header + b"".join(rows[:8] * 4))
    words = ["clips.filter", videos, "--model", CLIP, "--pretrained", clip_weights, "--frames", "1"]
    assert processes.run(words, ranks=2, target=command) == [0, 0], processes.log.read_text()
    noted = [json.loads(line)["item"] for path in videos.parent.glob("*.scores-*.jsonl")
             for line in path.read_text().splitlines()]
    assert sorted(noted) == list(range(32))
    assert len(list(csv.DictReader(open(videos.parent / "videos.filtered.csv")))) == 2


def test_filter_says_mistakes_in_one_line(videos, clip_weights, run):
    for options, says in ((["--keep", "5"], "keep must be <= 1, got 5"), (["--model", "ViT-X"], "ViT-X"),
                          (["--model", CLIP, "--pretrained", "nowhere.pt"], "nowhere.pt"),
                          (["--frames", "0"], "frames must be >= 1, got 0")):
        done = run("clips.filter", videos, *options)
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
