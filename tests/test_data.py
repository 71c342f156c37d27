"""data.py: lists, samples live and encoded ahead, the order in which they are met, and what cannot be used."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_media import damaged, odd_files, write_clip

import data
from clips.media import Bad
from clips.prepare import encode, frame_pool
from data import EncodedClips, Faults, Item, Items, LiveClips, Spec, Stream, batches, draw_view, shuffled
from sd.checkpoint import UserError, load

SPEC = Spec(4, 32, 32, fps_values=(4, 8), starts=2, draws=3, seed=5)
MIX = {"video": 2, "label": 1, "caption": 1}


@pytest.fixture(scope="module")
def lists(world):
    files = {"video": "videos.csv", "label": "labels", "caption": "images.jsonl"}
    return {source: os.path.join(world, name) for source, name in files.items()}


@pytest.fixture(scope="module")
def encoded(lists, micro, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("encoded") / "clips")
    encode(load(micro), lists, out, SPEC)
    return out


def stream(clips, **options):
    return Stream(clips, **{"mix": MIX, "batch_size": 4, "seed": 3} | options)


# ---------------------------------------------------------------------------------------------------------------------
# Lists


def test_lists_of_the_toy_world(lists):
    for source, n in (("video", 8), ("label", 72), ("caption", 8)):
        items = Items(source, lists[source])
        assert len(items) == n
        assert all(os.path.exists(items[i].path) for i in range(n))
    videos = Items("video", lists["video"])
    assert all(" moving " in videos[i].captions[0] for i in range(8))


def test_webvid_finds_files_under_their_page_and_flat(tmp_path):
    rows = [["videoid", "contentUrl", "duration", "page_dir", "name"],
            ["1", "https://", "PT00H00M05S", "000_050", "a cat, \"Tom\"\nby the window"],
            ["2", "https://", "PT00H00M05S", "000_050", "a dog"], ["3", "", "", "x", "  "]]
    with open(tmp_path / "list.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    (tmp_path / "000_050").mkdir()
    for name in ("000_050/1.mp4", "2.mp4"):
        (tmp_path / name).touch()
    items = Items("video", str(tmp_path / "list.csv"))
    assert [items[0], items[1]] == [Item(('a cat, "Tom" by the window',), str(tmp_path / "000_050/1.mp4")),
                                    Item(("a dog",), str(tmp_path / "2.mp4"))]
    with pytest.raises(Bad, match="no caption"):
        items[2]


def test_json_lines(tmp_path):
    lines = ['{"path": "a/1.mp4", "caption": "one"}', "", '{"path": "/b/2.mp4", "caption": ["two", "zwei"]}', "{broken",
             '{"img_path": "./c.jpg", "prompt": "a fox", "Task2": {}}', '{"caption": "no file"}',
             '{"path": "d.mp4", "caption": 3}', '{"path": "e.mp4"}', "[1]"]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (tmp_path / "e.txt").write_text("beside\n")
    items = Items("video", str(tmp_path / "list.jsonl"))
    assert len(items) == 8
    assert items[0] == Item(("one",), str(tmp_path / "a/1.mp4"))
    assert items[1] == Item(("two", "zwei"), "/b/2.mp4")
    assert items[3] == Item(("a fox",), f"{tmp_path}/./c.jpg")
    assert items[6] == Item(("beside",), str(tmp_path / "e.mp4"))
    for i, reason in ((2, "not a line of JSON"), (4, "no path"), (5, "not text"), (7, "not a JSON object")):
        with pytest.raises(Bad, match=reason):
            items[i]
        assert items.name(i)


def test_msr_vtt(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({
        "videos": [{"video_id": "video7", "split": "train"}],
        "sentences": [{"video_id": "video7", "caption": "a"}, {"video_id": "video9", "caption": "of the test split"},
                      {"video_id": "video7", "caption": "b"}]}))
    items = Items("video", str(tmp_path / "data.json"))
    assert [items[i].captions for i in range(len(items))] == [("a", "b")]
    assert os.path.basename(items[0].path) == "video7.mp4"


def test_folder_of_clips_and_texts(tmp_path):
    for name in ("b.mp4", "a.MOV", "notes.md", "c.mp4"):
        (tmp_path / name).touch()
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"clip {name}" if name != "c" else " ")
    items = Items("video", str(tmp_path))
    assert [items[i] for i in (0, 1)] == [Item(("clip a",), str(tmp_path / "a.MOV")),
                                          Item(("clip b",), str(tmp_path / "b.mp4"))]
    with pytest.raises(Bad, match="no caption"):
        items[2]


def test_label_names_with_synonyms(tmp_path):
    (tmp_path / "n01440764").mkdir()
    (tmp_path / "sea_lion").mkdir()
    assert Items("label", str(tmp_path))[1].captions == ("sea lion",)
    (tmp_path / "names.txt").write_text("n01440764 tench, Tinca tinca\n")
    items = Items("label", str(tmp_path / "names.txt"))
    assert [items[i] for i in range(len(items))] == [Item(("tench", "Tinca tinca"), str(tmp_path / "n01440764"))]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["l.csv", "l.jsonl"]))
def test_any_line_is_an_item_or_bad(tmp_path_factory, line, name):
    """Whatever bytes stand in a list: an item, or a reason and a name for it."""
    first = b"path,caption\n\"x\",y\n" if name == "l.csv" else b'{"path": "x", "caption": "y"}\n'
    path = tmp_path_factory.mktemp("lines") / name
    path.write_bytes(first + line)
    items = Items("video", str(path))
    for i in range(len(items)):
        try:
            assert isinstance(items[i], Item)
        except Bad as bad:
            assert str(bad) and items.name(i)


@pytest.mark.parametrize("source, name, content", [
    ("video", "l.csv", "a,b\n1,2\n"), ("caption", "l.jsonl", "{not json"), ("caption", "l.jsonl", ""),
    ("caption", "l.jsonl", '{"caption": "x"}\n'), ("video", "l.json", "{}"), ("video", "l.csv", "videoid,name\n")])
def test_bad_lists_are_named(tmp_path, source, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=f"{source} list {path}"):
        Items(source, str(path))
    with pytest.raises(UserError, match="cannot be read"):
        Items(source, str(tmp_path / "nowhere"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), min_size=2, max_size=2),
                min_size=1, max_size=6), st.integers(1, 50))
def test_records_of_csv_are_those_of_the_csv_module(rows, chunk):
    """Also where quotes, newlines and the borders of what is read at once fall together."""
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    text = file.getvalue().encode()
    spans = data.record_spans(np.frombuffer(text, np.uint8), quoted=True, chunk=chunk)
    parts = [io.StringIO(text[first:last].decode(), newline="") for first, last in spans]
    assert [next(csv.reader(part)) for part in parts] == rows


def test_a_million_lines_open_fast_and_small(tmp_path):
    line = '{"path": "videos/000001_000050/10%06d.mp4", "caption": "a drone shot of a coast at sunrise, number %d"}\n'
    with open(tmp_path / "list.jsonl", "w") as file:
        file.writelines(line % (i, i) for i in range(1_000_000))
    code = ("import resource, sys, time, pickle, data\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "before, began = peak(), time.perf_counter()\n"
            "items = data.Items('video', sys.argv[1])\n"
            "seconds = time.perf_counter() - began\n"
            "assert len(items) == 1_000_000 and items[999_999].captions[0].endswith('999999')\n"
            "print(seconds, peak() - before, len(pickle.dumps(items)))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "list.jsonl")], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    seconds, grown, pickled = map(float, done.stdout.split())
    assert seconds < 2 and grown < 300
    assert pickled < 20e6  # what a worker gets: the places of the lines, not the lines


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_a_caption_that_mentions_a_side_is_never_mirrored():
    rng, spec = np.random.default_rng(0), Spec(4, 32, 32, flip=True)
    sided = ["a car turns left", "Right-hand drive", "rotating counter-clockwise", "a STOP sign", "a letter"]
    assert not any(draw_view(caption, spec, rng).mirror for caption in sided * 50)
    mirrored = np.mean([draw_view("a bright car", spec, rng).mirror for _ in range(400)])
    assert abs(mirrored - 0.5) < 0.1
    assert not any(draw_view("a car", Spec(4, 32, 32), rng).mirror for _ in range(50))


def test_a_random_crop_is_the_same_for_all_frames_of_a_clip(lists, tmp_path):
    """A crop that jumped would look like motion: in a clip of a still ramp nothing moves, between clips it does."""
    clips = LiveClips({"video": lists["video"]}, Spec(4, 16, 24, fps_values=(8,), starts=50, random_crop=True))
    samples = [clips.sample("video", 0, 0.0, k / 50).data for k in range(50)]
    assert all(sample.shape == (4, 3, 24, 16) for sample in samples)
    assert len({sample.numpy().tobytes() for sample in samples}) > 40
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    write_clip(tmp_path / "still.mp4", range(0, 1200, 20), pixels=lambda n: ramp)
    (tmp_path / "still.txt").write_text("a ramp")
    places = {}
    for crop in (False, True):
        clips = LiveClips({"video": str(tmp_path)}, Spec(4, 32, 32, fps_values=(8,), starts=50, random_crop=crop))
        samples = [clips.sample("video", 0, 0.0, k / 50).data.float() for k in range(50)]
        assert all((sample - sample[:1]).abs().max() < 8 for sample in samples)
        places[crop] = [round(sample[:, :, :, 0].mean().item()) for sample in samples]
    assert max(places[False]) - min(places[False]) < 3 and max(places[True]) - min(places[True]) > 50


def test_label_images_differ_and_repeat_only_when_few(lists, tmp_path):
    folder = tmp_path / "labels" / "thing"
    folder.mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (32, 32), (40 * n, 0, 0)).save(folder / f"{n}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "notes.txt").write_text("no image")
    many = LiveClips({"label": lists["label"]}, SPEC).sample("label", 0, 0, 0)
    assert len({frame.numpy().tobytes() for frame in many.data}) == 4 and many.fps == 0
    few = LiveClips({"label": str(tmp_path / "labels")}, SPEC).sample("label", 0, 0, 0)
    assert sorted(Counter(int(frame[0, 0, 0]) for frame in few.data).values()) == [1, 1, 2]
    assert few.skipped == ((str(folder / "broken.png"), "not an image that can be read"),)


# ---------------------------------------------------------------------------------------------------------------------
# Live and encoded ahead


def test_encoded_samples_are_the_vae_of_the_live_ones(encoded, lists, micro):
    """Of every source, whatever is chosen: caption, FPS and moments."""
    ahead, live, vae = EncodedClips(encoded), LiveClips(lists, SPEC), load(micro).vae
    for source in data.SOURCES:
        assert ahead.count(source) == live.count(source)
        for u, v in ((0.0, 0.0), (0.3, 0.9), (0.99, 0.5)):
            one, two = (clips.sample(source, live.count(source) - 1, u, v) for clips in (ahead, live))
            assert (one.caption, one.fps, one.k) == (two.caption, two.fps, two.k)
            mean, logvar = vae.encode(two.data / 127.5 - 1)
            assert one.data.shape == (1 if source == "caption" else 4, 8, 4, 4)
            torch.testing.assert_close(one.data, torch.cat([mean, logvar], dim=1).half(), atol=2e-3, rtol=2e-3)
    chosen = {(s.fps, s.k) for u in (0.1, 0.6) for v in (0.1, 0.6) for s in [live.sample("video", 0, u, v)]}
    assert chosen == {(4, 0), (4, 1), (8, 0), (8, 1)}


def test_batches_are_the_same_live_and_encoded_ahead(lists, micro, tmp_path):
    model, out = load(micro), str(tmp_path / "clips")
    encode(model, lists, out, SPEC, text=True, dtype=torch.float32)
    ahead, live = (stream(clips, drop_caption=0.5) for clips in (EncodedClips(out), LiveClips(lists, SPEC)))
    for n in (0, 7):
        one, two = ahead.batch(n), live.batch(n)
        assert (one.captions, one.sources, one.fps.tolist()) == (two.captions, two.sources, two.fps.tolist())
        torch.testing.assert_close(one.latents(None, 0.5, 4), two.latents(model.vae, 0.5, 4), atol=1e-6, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(one.context, model.text(model.text.tokenize(two.captions)[0]))
        assert two.context is None and "" in one.captions + ahead.batch(1).captions


def test_encode_refuses_to_overwrite(encoded, lists, micro):
    with pytest.raises(UserError, match="is there already"):
        encode(load(micro), lists, encoded, SPEC)


def test_an_interrupted_encoding_goes_on(encoded, lists, micro, tmp_path):
    """Of a folder with a torn index and a lost shard the rest is kept; what comes out is the same."""
    out, left = tmp_path / "clips", tmp_path / "clips.part"
    shutil.copytree(encoded, left)
    lines = (left / "index.jsonl").read_text().splitlines(keepends=True)
    (left / "index.jsonl").write_text("".join(lines[:150]) + lines[150][:40])
    (left / "caption-000000.safetensors").unlink()
    kept = (left / "video-000000.safetensors").stat().st_mtime_ns
    encode(load(micro), lists, str(out), SPEC)
    assert (out / "index.jsonl").read_text().splitlines(keepends=True) == lines
    assert (out / "video-000000.safetensors").stat().st_mtime_ns == kept
    for name in os.listdir(encoded):
        with open(os.path.join(encoded, name), "rb") as one, open(out / name, "rb") as two:
            assert one.read() == two.read(), name
    shutil.copytree(out, left)
    shutil.rmtree(out)
    with pytest.raises(UserError, match="other settings"):
        encode(load(micro), lists, str(out), replace(SPEC, frames=6))


def test_encode_command(run, lists, micro, tmp_path):
    done = run("clips.prepare", "encode", tmp_path / "o", "--ckpt", micro, "--caption", lists["caption"], "--size", "32x32",
               "--frames", 4)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "o" / "index.jsonl").read_text().splitlines()) == 8
    for options, says in ((["--video", "nowhere.csv"], "nowhere.csv"), ([], "nothing to encode")):
        done = run("clips.prepare", "encode", tmp_path / "p", "--ckpt", micro, *options)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "p").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 9))
def test_shuffled_is_a_permutation(n, key):
    order = [shuffled(i, n, (key, 1)) for i in range(n)]
    assert sorted(order) == list(range(n))
    if n > 20:
        assert order != [shuffled(i, n, (key, 2)) for i in range(n)]


def test_shuffled_is_even():
    """Where an item lands, over many keys: chi-square of 16 places with 15 degrees of freedom."""
    counts = np.bincount([shuffled(5, 16, (key,)) for key in range(1600)], minlength=16)
    assert ((counts - 100) ** 2 / 100).sum() < 45  # exceeded once in 10,000 when even


def test_batches_have_the_mix_and_the_condition(encoded):
    batch = stream(EncodedClips(encoded), drop_caption=0.0).batch(0)
    latents = batch.latents(None, 0.5, 4)
    assert latents.shape == (4, 4, 4, 4, 4)
    assert batch.sources == ["video", "video", "label", "caption"]
    assert batch.fps[2:].tolist() == [0, 120] and all(f in (4, 8) for f in batch.fps[:2].tolist())
    assert (latents[3] == latents[3, :1]).all()  # one image, repeated
    assert (latents[2, 0] != latents[2, 1]).any()
    assert all(batch.captions) and batch.captions == [sample.caption for sample in batch.samples]


def test_an_epoch_meets_every_item_once(encoded):
    s = stream(EncodedClips(encoded))
    met = [s.item_at(4 * turn + slot) for turn in range(4) for slot in (0, 1)]
    assert sorted(met) == [("video", i) for i in range(8)]
    again = [s.item_at(4 * turn + slot) for turn in range(4, 8) for slot in (0, 1)]
    assert sorted(again) == sorted(met) and again != met


def test_ranks_share_the_stream(encoded):
    """Two ranks with batches of 4 meet together what one rank with a batch of 8 meets."""
    clips = EncodedClips(encoded)
    whole = stream(clips, batch_size=8, drop_caption=0.0).batch(5)
    parts = [stream(clips, rank=r, world=2, drop_caption=0.0).batch(5) for r in (0, 1)]
    assert parts[0].captions + parts[1].captions == whole.captions
    assert torch.cat([parts[0].fps, parts[1].fps]).tolist() == whole.fps.tolist()


def test_a_batch_is_a_function_of_its_number(encoded):
    def latents(batch):
        return batch.latents(None, 1.0, 4)

    clips = EncodedClips(encoded)
    s = stream(clips)
    late = s.batch(100)
    for _ in range(3):
        s.batch(7)
    fresh = stream(clips).batch(100)
    assert torch.equal(latents(late), latents(fresh)) and late.captions == fresh.captions
    assert not torch.equal(latents(late), latents(stream(clips, seed=4).batch(100)))


@pytest.mark.parametrize("kind", ["encoded", "live"])
def test_workers_change_nothing(encoded, lists, micro, kind):
    """Read ahead by processes, from the middle of an epoch: the same batches in the same order."""
    s = stream(EncodedClips(encoded) if kind == "encoded" else LiveClips(lists, SPEC))
    vae = load(micro).vae
    for one, two in zip(batches(s, 3, 9, workers=2), batches(s, 3, 9, workers=0), strict=True):
        assert (one.captions, one.sources, one.fps.tolist()) == (two.captions, two.sources, two.fps.tolist())
        assert torch.equal(one.latents(vae, 1.0, 4), two.latents(vae, 1.0, 4))


def test_captions_are_dropped_at_the_stated_rate(encoded):
    s = stream(EncodedClips(encoded), drop_caption=0.3)
    dropped = np.mean([caption == "" for n in range(150) for caption in s.batch(n).captions])
    assert abs(dropped - 0.3) < 0.06


def test_latents_are_scaled_posterior_samples():
    """Over many draws of one sample: mean x scale, and spread x scale."""
    moments = torch.zeros(1, 8, 4, 4)
    moments[:, :4], moments[:, 4:] = 3.0, 2 * np.log(0.2)
    sample = data.Sample(moments, "", 120, 0)
    draws = torch.cat([data.Batch([sample], [""], ["caption"], None, 0, [i], None, []).latents(None, 0.5, 1)
                       for i in range(400)])
    assert abs(draws.mean() - 1.5) < 0.01 and abs(draws.std() - 0.1) < 0.01


def test_a_mix_without_samples_is_refused(lists, tmp_path):
    with pytest.raises(UserError, match="label"):
        stream(LiveClips({"video": lists["video"], "caption": lists["caption"]}, SPEC))
    with pytest.raises(UserError, match="not a folder of encoded clips"):
        EncodedClips(str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be used


@pytest.fixture
def bad_lists(lists, tmp_path):
    """The toy world with one of four captioned images missing and one broken."""
    lines = [json.loads(line) for line in open(lists["caption"])]
    for line in lines:
        line["path"] = os.path.join(os.path.dirname(lists["caption"]), line["path"])
    lines[2]["path"], lines[5]["path"] = str(tmp_path / "missing.png"), str(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lists | {"caption": str(tmp_path / "images.jsonl")}


def test_a_bad_sample_gives_way_to_another(bad_lists, lists, micro, tmp_path):
    """Skipped, and everything else as if nothing had been; the same one live and encoded ahead."""
    out = str(tmp_path / "clips")
    encode(load(micro), bad_lists, out, SPEC, dtype=torch.float32)
    good, live, ahead = (stream(clips, batch_size=8) for clips in
                         (LiveClips(lists, SPEC), LiveClips(bad_lists, SPEC), EncodedClips(out)))
    faults = []
    for n in range(8):
        one, two, three = good.batch(n), live.batch(n), ahead.batch(n)
        assert two.faults == three.faults and two.captions == three.captions
        changed = [i for i in range(8) if not torch.equal(one.samples[i].data, two.samples[i].data)]
        assert all(one.sources[i] == "caption" for i in changed) and len(changed) <= len(two.faults)
        faults += two.faults
    assert set(faults) == {("caption", str(tmp_path / "missing.png"), "missing"),
                           ("caption", str(tmp_path / "broken.png"), "not an image that can be read")}


def test_a_stream_over_damaged_videos_goes_on(tmp_path):
    """Half of the files damaged in every way there is, read by workers: whole batches, and every fault has a name."""
    (tmp_path / "good").mkdir()
    for n in range(40):
        write_clip(tmp_path / "good" / f"{n}.mp4", range(0, 1200, 20))
    paths = sorted((tmp_path / "good").iterdir())
    odd = odd_files(tmp_path, paths[0])
    bad = [*odd, *damaged(tmp_path, paths[:1], 30)]
    paths += bad
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"path": str(p), "caption": "x"}) + "\n" for p in paths))
    s = stream(LiveClips({"video": str(tmp_path / "list.jsonl")}, SPEC), mix={"video": 1}, batch_size=10)
    faults = []
    for batch in batches(s, 0, 2 * len(paths) // 10, workers=2):
        assert [sample.data.shape for sample in batch.samples] == [(4, 3, 32, 32)] * 10
        faults += batch.faults
    named = {name for _, name, _ in faults}
    assert set(map(str, odd)) <= named <= {str(path) for path in bad}
    assert all(reason for *_, reason in faults)


def test_faults_are_named_once_and_end_the_run_when_they_are_many(bad_lists, capsys):
    s, faults = stream(LiveClips(bad_lists, SPEC), mix={"caption": 1}, batch_size=8), Faults(0.5)
    for n in range(20):
        faults.add(s.batch(n))
    assert sorted(line.split("/")[-1] for line in capsys.readouterr().err.splitlines()) == [
        "broken.png: not an image that can be read", "missing.png: missing"]
    assert faults.met == 160 + faults.bad and 20 < faults.bad < 80
    with pytest.raises(UserError, match="more than max_bad = 0.1"):
        for n in range(20, 40):
            faults.share = 0.1
            faults.add(s.batch(n))


def test_frames_for_a_vae_come_from_what_can_be_used(bad_lists, tmp_path, capsys):
    write_clip(tmp_path / "short.mp4", range(0, 100, 20))
    (tmp_path / "videos.jsonl").write_text('{"path": "short.mp4", "caption": "too short for four frames"}')
    pool = frame_pool({"caption": bad_lists["caption"]}, 8, (32, 32))
    assert pool.shape == (6, 3, 32, 32)
    assert capsys.readouterr().err.count("skipped caption") == 2
    with pytest.raises(UserError, match="no frame of .*videos.jsonl can be used"):
        frame_pool({"video": str(tmp_path / "videos.jsonl")}, 8, (32, 32))


def test_names_that_no_file_can_have_are_missing(tmp_path):
    lines = [{"path": "x.mp4"}, {"path": "a\0b.mp4"}, {"path": "\ud800.mp4"}, {"videoid": 7, "page_dir": 3},
             {"videoid": "a", "page_dir": "\0"}]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line | {"caption": "x"}) + "\n" for line in lines))
    for source in ("video", "caption"):
        clips = LiveClips({source: str(tmp_path / "l.jsonl")}, SPEC)
        for i in range(len(lines)):
            with pytest.raises(Bad, match="missing"):
                clips.sample(source, i, 0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_list_with_nothing_in_it_that_can_be_used_ends_in_one_line(tmp_path, workers):
    (tmp_path / "list.jsonl").write_text('{"path": "missing.png", "caption": "x"}\n')
    s = stream(LiveClips({"caption": str(tmp_path / "list.jsonl")}, SPEC), mix={"caption": 1})
    with pytest.raises(UserError, match=r"a hundred caption samples in a row cannot be used.*missing\.png.*missing"):
        list(batches(s, 0, 3, workers))


class Hanging(Stream):
    def batch(self, n):
        time.sleep(60)


def test_a_worker_that_hangs_is_an_error(lists):
    s = Hanging(LiveClips({"caption": lists["caption"]}, SPEC), {"caption": 1}, 4)
    with pytest.raises(UserError, match="no batch within 5 s"):
        list(batches(s, 0, 3, workers=1, limit=5))
