"""Lists in all their forms, as they are and as they should not be."""

import csv
import io
import json
import os
import pickle
import sys
import tracemalloc

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clips.decode import Bad
from clips.lists import Item, Items, Records, csv_row


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
    assume(sys.version_info >= (3, 11) or b"\0" not in line)  # which its csv module refuses
    path.write_bytes(first + line)
    items = Items("video", str(path))
    for i in range(len(items)):
        try:
            assert isinstance(items[i], Item)
        except Bad as bad:
            assert str(bad) and items.name(i)


@pytest.mark.parametrize("source, name, content, says", [
    ("video", "l.csv", "a,b\n1,2\n", "is not of a known form: it has no path"),
    ("caption", "l.jsonl", "{not json", "is not of a known form: not a line of JSON"),
    ("caption", "l.jsonl", "", "is empty"), ("video", "l.csv", "", "is empty"),
    ("video", "l.csv", "videoid,name\n", "is empty"),
    ("caption", "l.jsonl", '{"caption": "x"}\n', "is not of a known form: it has no path"),
    ("video", "l.json", "{}", "is not of a known form: ")])
def test_bad_lists_are_named(tmp_path, source, name, content, says):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{source} list {path} {says}"):
        Items(source, str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        Items(source, str(tmp_path / "nowhere"))


FIELD = st.text(st.sampled_from('ab", \n\r\'é\u2028\t\x85\ufeff'), max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(FIELD, min_size=2, max_size=2), max_size=6), st.sampled_from(["\n", "\r\n", "\r"]),
       st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]))
def test_rows_of_csv_are_those_of_the_csv_module(tmp_path_factory, rows, ending, quoting):
    text = io.StringIO(newline="")
    csv.writer(text, quoting=quoting, lineterminator=ending).writerows([["path", "caption"], *rows])
    assert_rows_of_csv(tmp_path_factory.mktemp("rows") / "list.csv", text.getvalue())


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('ab", \n\r'), max_size=20))
def test_no_row_is_lost_however_it_is_quoted(tmp_path_factory, text):
    """Not even where quotes are stray or never closed."""
    assert_rows_of_csv(tmp_path_factory.mktemp("rows") / "list.csv", text)


def assert_rows_of_csv(path, text):
    path.write_bytes(text.encode())
    records = Records(str(path), rows=True)
    with open(path, newline="", encoding="utf-8-sig") as file:
        assert [csv_row(records[i]) for i in range(len(records))] == [row for row in csv.reader(file) if row]


@pytest.mark.parametrize("text, captions", [
    ('0.mp4,a 12" pizza\n1.mp4,a dog\n2.mp4,a 5" phone\n', ['a 12" pizza', "a dog", 'a 5" phone']),
    ("0.mp4,a dog\r1.mp4,a cat\r", ["a dog", "a cat"]),
    ('0.mp4,a dog\n1.mp4,a cat, running\n2.mp4\n3.mp4,"a cat, running"\n', ["a dog", Bad, Bad, "a cat, running"])])
def test_a_row_of_csv_is_read_whole_or_bad(tmp_path, text, captions):
    (tmp_path / "list.csv").write_text("path,caption\n" + text, newline="")
    items = Items("video", str(tmp_path / "list.csv"))
    assert len(items) == len(captions)
    for i, caption in enumerate(captions):
        if caption is Bad:
            with pytest.raises(Bad, match="columns"):
                items[i]
        else:
            assert items[i].captions == (caption,)


def test_a_quote_that_is_never_closed_is_told_with_its_line(tmp_path):
    (tmp_path / "list.csv").write_text("path,caption\n0.mp4,a dog\n" + '1.mp4,"a cat\n' + "2.mp4,a bird\n" * 20000)
    with pytest.raises(ValueError, match=r"list\.csv is not of a known form: line \d+: field larger"):
        Items("video", str(tmp_path / "list.csv"))


@pytest.mark.parametrize("name, line", [
    ("list.jsonl", '{"path": "videos/000001_000050/10%06d.mp4", "caption": "a drone shot of a coast, number %d"}\n'),
    ("list.csv", '"videos/000001_000050/10%06d.mp4","a drone shot of a coast, ""number"" %d"\n')],
    ids=["JSON lines", "CSV"])
def test_of_many_lines_only_the_places_are_kept(tmp_path, name, line):
    n = 100_000
    with open(tmp_path / name, "w") as file:
        file.write("path,caption\n" if name == "list.csv" else "")
        file.writelines(line % (i, i) for i in range(n))
    tracemalloc.start()
    try:
        items = Items("video", str(tmp_path / name))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(items) == n and items[n - 1].captions[0].endswith(f"{n - 1}")
    assert held < 20 * n and peak < 80 * n
    assert len(pickle.dumps(items)) < 20 * n  # what a worker gets
