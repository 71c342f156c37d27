"""What changed in a list since it was encoded is noticed, and an update makes of the folder what a fresh one is."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import clips.encode
import sd
from clips.changes import described, is_stale
from clips.encode import encode
from clips.encoded import EncodedClips
from clips.samples import Spec

SPEC = Spec(4, 32, 32, fps_values=(8,), random_crop=True, flip=True)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(clips.encode, "SHARD", 3)


@pytest.fixture(scope="module")
def model(micro):
    return sd.load(micro)


def write_image(folder: Path, name: str, colour: int, caption: str | None = None):
    Image.new("RGB", (32, 32), (colour % 256, 3 * colour % 256, 99)).save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption)


def content(folder) -> list:
    """(line of the index without its place, moments, context) of everything in a folder of encoded clips."""
    lines = [json.loads(line) for line in Path(folder, "index.jsonl").read_text().splitlines()]
    tensors = {name: load_file(Path(folder, name)) for name in {line["shard"] for line in lines}}
    found = []
    for line in lines:
        shard, rows = tensors[line.pop("shard")], {"moments": line.pop("row", None), "context": line.get("context")}
        found.append((line, *(shard[name][row] for name, row in rows.items() if row is not None)))
    return found


def assert_same(one, two):
    one, two = content(one), content(two)
    assert [line for line, *_ in one] == [line for line, *_ in two]
    for (_, *ours), (_, *theirs) in zip(one, two):
        assert all(map(torch.equal, ours, theirs))


def what_is_there(folder: Path) -> list[tuple]:
    """(name, caption, size, time) of every image in the order of the list."""
    return [(p.name, p.with_suffix(".txt").read_text(), p.stat().st_size, p.stat().st_mtime_ns)
            for p in sorted(folder.glob("*.png"))]


EDITS = st.lists(st.tuples(st.sampled_from(["add", "remove", "recaption", "touch", "replace"]), st.integers(0, 99)),
                 min_size=1, max_size=3)


@settings(max_examples=12, deadline=None)
@given(edits=EDITS, text=st.booleans())
def test_random_edits_are_noticed_and_an_update_equals_a_fresh_encoding(model, tmp_path_factory, edits, text):
    tmp = tmp_path_factory.mktemp("edits")
    folder, out, fresh = tmp / "images", str(tmp / "encoded"), str(tmp / "fresh")
    folder.mkdir()
    for n in range(10, 17):
        write_image(folder, f"{n}", n, f"caption {n}")
    lists = {"caption": str(folder)}
    encode(model, lists, out, SPEC, text=text)
    before = what_is_there(folder)
    for edit, n in edits:
        images = sorted(folder.glob("*.png"))
        image = images[n % len(images)]
        if edit == "add":
            write_image(folder, f"{n}", n, "new")
        elif edit == "remove" and len(images) > 1:
            image.unlink()
        elif edit == "recaption":
            image.with_suffix(".txt").write_text(f"another {n}")
        elif edit == "touch":
            os.utime(image, ns=(0, image.stat().st_mtime_ns + 1 + n))
        elif edit == "replace":
            write_image(folder, image.stem, 100 + n)
    after = what_is_there(folder)
    changes = EncodedClips(out).changes(lists)
    assert is_stale(changes) == (before != after)
    assert changes["changed"] == sum(a != b for a, b in zip(before, after)) and changes["items"] == len(after)
    assert changes["captions"] == sum(a[1] != b[1] for a, b in zip(before, after))
    assert changes["new"] - changes["gone"] == len(after) - len(before) and not changes["new"] * changes["gone"]

    encode(model, lists, out, SPEC, text=text, update=True)
    encode(model, lists, fresh, SPEC, text=text)
    assert_same(out, fresh)
    assert not is_stale(EncodedClips(out).changes(lists)) and sorted(os.listdir(tmp)) == ["encoded", "fresh", "images"]


@pytest.fixture
def data(tmp_path, world):
    """Lists of every source, apart from those of other tests, and where to encode them."""
    shutil.copytree(world, tmp_path / "world")
    files = {"video": "videos.csv", "label": "labels", "caption": "images.jsonl"}
    return {source: str(tmp_path / "world" / name) for source, name in files.items()}, str(tmp_path / "encoded")


def test_a_list_that_only_moved_has_not_changed(model, data, tmp_path):
    lists, out = data
    encode(model, lists, out, SPEC)
    os.rename(tmp_path / "world", tmp_path / "moved")
    lists = {source: path.replace("/world/", "/moved/") for source, path in lists.items()}
    changes = EncodedClips(out).changes(lists)
    assert not is_stale(changes) and described(changes) == "nothing has changed since it was encoded"


def test_every_change_of_every_source_is_noticed(model, data):
    """Items are counted, whatever happened to them; an item that moved in its list has changed."""
    lists, out = data
    encode(model, lists, out, SPEC)
    videos, labels, images = map(Path, lists.values())
    rows = videos.read_text().splitlines(keepends=True)
    videos.write_text("".join([rows[0], rows[2], rows[1], *rows[3:-1]]))  # 2 moved, 1 gone
    folder = sorted(path for path in labels.iterdir() if path.is_dir())[0]
    shutil.copy(next(folder.glob("*")), folder / "zzz.png")  # 1 changed
    lines = [json.loads(line) for line in images.read_text().splitlines()]
    lines[1]["caption"] += " and more"
    images.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0], lines[0]]))  # 1 changed, 2 new
    changes = EncodedClips(out).changes(lists)
    assert described(changes).endswith("2 are new, 1 are gone")
    assert (changes["changed"], changes["captions"], changes["files"]) == (4, 3, 3)

    fresh = out + ".fresh"
    mark_moments(out, "caption", 5)  # to be known again
    encode(model, lists, out, SPEC, update=True)
    encode(model, lists, fresh, SPEC)
    assert EncodedClips(out).sample("caption", 5, 0, 0).data.eq(7).all()
    mark_moments(fresh, "caption", 5)
    assert_same(out, fresh)


def mark_moments(folder: str, source: str, i: int):
    line = EncodedClips(folder).lines(source, i)[0]
    path = os.path.join(folder, line["shard"])
    tensors = load_file(path)
    tensors["moments"][line["row"]] = 7
    save_file(tensors, path)


def stopping_after(model, shards: int):
    """Let the VAE raise after some shards of images, as Ctrl-C does -> the hook, to be removed."""
    seen = []

    def count(*_):
        seen.append(1)
        if len(seen) > shards:
            raise KeyboardInterrupt

    return model.vae.encoder.register_forward_pre_hook(count)


def test_an_interrupted_update_leaves_the_folder_whole_and_goes_on(model, tmp_path):
    """Also when the list has changed meanwhile: what was finished before it did is not taken for the new."""
    folder, out, fresh = tmp_path / "images", str(tmp_path / "encoded"), str(tmp_path / "fresh")
    folder.mkdir()
    for n in range(10, 22):
        write_image(folder, f"{n}", n, f"caption {n}")
    lists = {"caption": str(folder)}
    encode(model, lists, out, SPEC)
    shutil.copytree(out, fresh)
    for n in (10, 14, 17):  # of the first three of four shards
        (folder / f"{n}.txt").write_text("another")
    hook = stopping_after(model, 2)
    with pytest.raises(KeyboardInterrupt):
        encode(model, lists, out, SPEC, update=True)
    hook.remove()
    assert_same(out, fresh)
    finished = [path.name for path in Path(out + ".part").glob("*caption*")]
    assert "+caption-000000.safetensors" in finished and "caption-000003.safetensors" in finished
    assert "+caption-000002.safetensors" not in finished

    (folder / "12.txt").write_text("yet another")
    hook = stopping_after(model, 3)  # the first again, maybe the second, and the one that was interrupted
    encode(model, lists, out, SPEC, update=True)
    hook.remove()
    shutil.rmtree(fresh)
    encode(model, lists, fresh, SPEC)
    assert_same(out, fresh)
    assert sorted(os.listdir(tmp_path)) == ["encoded", "fresh", "images"]
    assert os.listdir(out).count("former") == 0


def test_an_interrupted_encoding_goes_on_though_its_list_has_grown(model, tmp_path):
    """Where the last of its files was not full, its items are added to it."""
    folder, labels, out = tmp_path / "images", tmp_path / "labels" / "dog", str(tmp_path / "encoded")
    folder.mkdir()
    labels.mkdir(parents=True)
    write_image(labels, "1", 1)
    for n in range(4):
        write_image(folder, f"{n}", n, f"caption {n}")
    lists = {"caption": str(folder), "label": str(tmp_path / "labels")}
    hook = stopping_after(model, 2)
    with pytest.raises(KeyboardInterrupt):
        encode(model, lists, out, SPEC)
    hook.remove()
    write_image(folder, "4", 4, "caption 4")
    encode(model, lists, out, SPEC)
    encode(model, lists, out + ".fresh", SPEC)
    assert_same(out, out + ".fresh")


def test_an_update_that_ended_between_its_two_renames_goes_on(model, tmp_path, run, micro):
    folder, out = tmp_path / "images", tmp_path / "encoded"
    folder.mkdir()
    write_image(folder, "1", 1, "one")
    encode(model, {"caption": str(folder)}, str(out), SPEC)
    (folder / "1.txt").write_text("two")
    (tmp_path / "encoded.part").mkdir()
    out.rename(tmp_path / "encoded.part" / "former")
    done = run("clips.encode", out, "--ckpt", micro, "--update")
    assert done.returncode == 0 and "1 of 1 items changed" in done.stdout, done.stderr
    assert EncodedClips(str(out)).sample("caption", 0, 0, 0).caption == "two"
    assert sorted(os.listdir(tmp_path)) == ["encoded", "images"]
    done = run("clips.encode", out, "--ckpt", micro, "--update")
    assert done.returncode == 0 and done.stdout == f"{out}: nothing has changed since it was encoded\n"


def test_whoever_reads_while_a_folder_is_updated_never_gets_another_sample(model, tmp_path):
    folder, out = tmp_path / "images", str(tmp_path / "encoded")
    folder.mkdir()
    for n in range(10, 16):
        write_image(folder, f"{n}", n, f"caption {n}")
    encode(model, {"caption": str(folder)}, out, SPEC)
    reader = EncodedClips(out)
    before = reader.sample("caption", 5, 0, 0)
    (folder / "11.txt").write_text("another")
    encode(model, {"caption": str(folder)}, out, SPEC, update=True)
    after = reader.sample("caption", 5, 0, 0)
    assert after.caption == before.caption and torch.equal(after.data, before.data)
    with pytest.raises(ValueError, match="caption-000000.safetensors is damaged: .* was encoded again since"):
        reader.sample("caption", 0, 0, 0)


@pytest.mark.parametrize("options, says", [
    ([], "1 of 1 items changed since they were encoded (1 captions, 0 files), 0 are new, 0 are gone: run this with "
         "--update, or remove it"),
    (["--frames", "6"], "was encoded with frames = 4, not 6: choose another folder, or remove it"),
    (["--update", "--frames", "6"], "was encoded with frames = 4, not 6"),
    (["--update", "--ckpt", ""], "ckpt must be given")])
def test_encoding_into_a_folder_again_is_told(model, tmp_path, run, micro, options, says):
    folder, out = tmp_path / "images", tmp_path / "encoded"
    folder.mkdir()
    write_image(folder, "1", 1, "one")
    command = ["clips.encode", out, "--ckpt", micro, "--caption", folder, "--frames", 4, "--size", "32x32"]
    assert run(*command).returncode == 0
    done = run(*command)
    assert done.returncode == 2 and "is there already, and nothing has changed since it was encoded: " in done.stderr
    (folder / "1.txt").write_text("two")
    done = run(*command, *options)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_without_any_of_the_files_nothing_is_updated(model, tmp_path):
    folder, out = tmp_path / "images", str(tmp_path / "encoded")
    folder.mkdir()
    write_image(folder, "1", 1)
    (tmp_path / "list.jsonl").write_text('{"path": "images/1.png", "caption": "x"}\n')
    lists = {"caption": str(tmp_path / "list.jsonl")}
    encode(model, lists, out, SPEC)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="none of the files of .*list.jsonl is there"):
        encode(model, lists, out, SPEC, update=True)
    assert EncodedClips(out).sample("caption", 0, 0, 0).caption == "x"
