"""The check of a list, as a command on real files."""

import json
import os
import shutil

import numpy as np
from footage import Drawn, animation, write_clip
from runs import command


def test_check_counts_by_reason_and_names_every_case(tmp_path, run):
    write_clip(tmp_path / "good.mp4", range(0, 1200, 20))
    write_clip(tmp_path / "short.mp4", range(0, 100, 20))
    shutil.copy(tmp_path / "good.mp4", tmp_path / "copy.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    cut = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(cut[:-300])
    lines = [{"path": f"{name}.mp4", "caption": "x"} for name in ("good", "short", "copy", "text", "cut", "missing")]
    lines += [{"path": "good.mp4"}, {"caption": "x"}, {"path": "good.mp4", "caption": "another of the same clip"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("clips.check", tmp_path / "list.jsonl")
    assert done.returncode == 0, done.stderr
    found = {}
    for line in map(json.loads, (tmp_path / "list.jsonl.check.jsonl").read_text().splitlines()):
        found[line["item"]] = line["reason"]
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    assert found[1] == "too short" and found[2] == f"the same as {tmp_path}/good.mp4" and found[5] == "missing"
    assert found[6].startswith("no caption: ") and "path" in found[7]
    assert "9 items; what cannot be used is in" in done.stdout and done.stdout.endswith("\n2 of 9 usable\n")
    for reason in ("too short", "duplicated", "missing", found[6]):
        assert f"       1  {reason}\n" in done.stdout


def test_two_ranks_find_what_one_does_and_a_killed_one_goes_on(processes, tmp_path, run):
    for n in range(40):
        write_clip(tmp_path / f"{n:02d}.mp4", range(0, 40 * (1 + n % 5), 20))
        (tmp_path / f"{n:02d}.txt").write_text("x")
    whole, name = run("clips.check", tmp_path, "--frames", 4), f"{tmp_path.name}.check.jsonl"
    found = (tmp_path / name).read_text()
    assert whole.returncode == 0 and found.count("the same as") > 20
    words = ["clips.check", tmp_path, "--frames", "4"]
    assert processes.run(words, target=command, die=(0, "SIGKILL", "clips.decode.opened", 25)) == [-9]
    noted = (tmp_path / f"{tmp_path.name}.checked-0.jsonl").read_text().count("\n")
    assert 0 < noted < 40
    (tmp_path / name).unlink()
    shutil.move(tmp_path / f"{tmp_path.name}.checked-0.jsonl", tmp_path / f"{tmp_path.name}.checked-9.jsonl")
    write_clip(tmp_path / "00.mp4", range(0, 700, 20))  # another than was noted, longer than any
    assert processes.run(words, target=command) == [0]
    changed = (tmp_path / name).read_text()
    (tmp_path / name).unlink()
    assert processes.run(words, ranks=2, target=command) == [0, 0], processes.log.read_text()
    assert (tmp_path / name).read_text() == changed != found and not list(tmp_path.glob("*.checked-*"))


def test_check_of_images(world, tmp_path, run):
    shutil.copytree(os.path.join(world, "labels"), tmp_path / "labels")
    folder = sorted((tmp_path / "labels").iterdir())[3]
    (folder / "broken.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "labels" / "a label without images").mkdir()
    done = run("clips.check", tmp_path / "labels", "--source", "label")
    assert done.returncode == 0, done.stderr
    assert "1  not an image that can be read" in done.stdout and "1  no image in it" in done.stdout
    assert str(folder / "broken.jpg") in (tmp_path / "labels" / "labels.check.jsonl").read_text()


def test_check_of_stickers(tmp_path, run):
    frames = [Drawn(np.full((8, 8, 4), 30 * n, np.uint8), ms=200) for n in range(8)]
    for name, count in (("good_one.webp", 8), ("short.png", 3), ("still.gif", 1)):
        (tmp_path / name).write_bytes(animation(name.split(".")[1], 8, 8, frames[:count]))
    done = run("clips.check", tmp_path, "--frames", 4, "--captions", "from_names")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("       1  too short\n2 items; ") and done.stdout.endswith("\n1 of 2 usable\n")
    assert "warning: 1 still pictures in" in done.stderr
    done = run("clips.check", tmp_path, "--frames", 4)
    assert "       2  no caption: " in done.stdout


def test_check_counts_what_is_no_text_or_no_data(tmp_path, run):
    write_clip(tmp_path / "a.mp4", range(0, 1200, 20))
    for name, text in (("a", b"a man\x92s hat"), ("._a", b"\0\5\x16\7")):
        (tmp_path / f"{name}.txt").write_bytes(text)
    (tmp_path / "._a.mp4").write_bytes(b"\0\5\x16\7")
    rows = [b"path,caption", b"a.mp4,a dog", b'a.mp4,"a\r\nc\xe9t"', b"a.mp4,a, b", b"a.mp4\0,b"]
    (tmp_path / "list.csv").write_bytes(b"\r\n".join(rows))
    for source, says in ((tmp_path, ["\n0 of 1 usable", "1  its caption is not text in UTF-8"]),
                         (tmp_path / "list.csv", ["\n1 of 4 usable", "2  not text in UTF-8",
                                                  "1  more or fewer columns than the header"])):
        done = run("clips.check", source)
        assert done.returncode == 0 and all(text in done.stdout for text in says), done.stdout + done.stderr
    lines = map(json.loads, (tmp_path / "list.csv.check.jsonl").read_text().splitlines())
    assert [line["path"] for line in lines] == [f"{tmp_path}/list.csv, line {n}" for n in (3, 5, 6)]


def test_a_place_that_cannot_be_written_is_told(tmp_path, run):
    (tmp_path / "list.jsonl").write_text('{"path": "a.png", "caption": "one"}\n')
    (tmp_path / "list.jsonl.checked-0.jsonl").mkdir()
    done = run("clips.check", tmp_path / "list.jsonl", "--source", "caption")
    assert done.returncode == 2 and "list.jsonl.checked-0.jsonl: Is a directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1
