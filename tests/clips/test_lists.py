"""Lists in all their forms, as they are and as they should not be."""

import codecs
import csv
import io
import json
import os
import pickle
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from clips.decode import Bad
from clips.lists import Item, Items, images_of
from clips.records import Records, line_starts
from clips.samples import LiveClips, Spec


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
    for i, reason in ((2, "not a line of JSON"), (4, "none of videoid"), (5, "not text"), (7, "not a JSON object")):
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


@pytest.mark.parametrize("source, names", [("video", ["a.3gp", "b.MTS", "c.m2ts", "d.ogv"]),
                                           ("caption", ["a.avif", "b.JFIF"])])
def test_folders_of_phones_cameras_and_browsers(tmp_path, source, names):
    for name in names:
        (tmp_path / name).touch()
    items = Items(source, str(tmp_path))
    assert [os.path.basename(items.name(i)) for i in range(len(items))] == names


def test_label_names_with_synonyms(tmp_path):
    (tmp_path / "n01440764").mkdir()
    (tmp_path / "sea_lion").mkdir()
    assert Items("label", str(tmp_path))[1].captions == ("sea lion",)
    for name, gap in (("names.txt", " "), ("names.csv", "\t")):
        (tmp_path / name).write_text(f"n01440764{gap}tench, Tinca tinca \n\n")
        items = Items("label", str(tmp_path / name))
        assert [items[i] for i in range(len(items))] == [Item(("tench", "Tinca tinca"), str(tmp_path / "n01440764"))]


def read(folder, text, name="list.csv"):
    """The items of a list of such text, or bytes."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Items("video", str(folder / name))


def captions(items):
    """The caption of each item, or the reason why it is Bad."""
    def of(i):
        try:
            return items[i].captions[0]
        except Bad as bad:
            assert items.name(i)
            return str(bad)
    return [of(i) for i in range(len(items))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for the examples of hypothesis, to write over each other's lists."""
    return tmp_path_factory.mktemp("place")


FIRST = {"l.csv": b"path,caption\n\"x\",y\n", "l.jsonl": b'{"path": "x", "caption": "y"}\n'}
PIECES = st.sampled_from([b"a", b",", b'"', b"\n", b"\r", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b"\\ud800",
                          b"\\u0000", "é\u2028\ufffd".encode(), b'{"path": "x", "caption": "', b'"}'])


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=8).map(b"".join)), st.sampled_from(sorted(FIRST)))
def test_any_line_is_an_item_or_bad(place, line, name):
    """Whatever bytes stand in a list: an item, or a reason and a name for it; never a character that was not there."""
    assume(sys.version_info >= (3, 11) or b"\0" not in line)  # which its csv module refuses
    try:
        found = captions(read(place, FIRST[name] + line, name))
    except ValueError as error:
        assert "a quote is not closed" in str(error) and name == "l.csv"
        return
    assert found[0] == "y"
    for caption in found:
        caption.encode()
        assert "\ufffd" not in caption or "\ufffd".encode() in line
        assert "\0" not in caption


@pytest.mark.parametrize("source, name, content, says", [
    ("video", "l.csv", "a,b\n1,2\n", "is not of a known form: line 1: its columns, parted by commas, must have one of "
                                     "videoid, path, img_path, file_name, got a, b$"),
    ("video", "l.csv", "\npath;caption\n1;2\n", "is not of a known form: line 2: .*, got path;caption$"),
    ("video", "l.csv", "path,name,name\n1,2,3\n", "is not of a known form: line 1: there are two columns name$"),
    ("video", "l.csv", "path,caption\n\na,b,c\n", "is not of a known form: line 3: more or fewer columns"),
    ("video", "l.csv", "path,caption\na,caf\xe9\n", "is not of a known form: line 2: not text in UTF-8$"),
    ("video", "l.csv", "path,caf\xe9\na,b\n", "is not of a known form: line 1: not text in UTF-8$"),
    ("video", "l.csv", "path,\0\na,b\n", "is not of a known form: line 1: "),
    ("caption", "l.jsonl", "\n{not json", "is not of a known form: line 2: not a line of JSON; only a .csv "
                                   "is read as CSV$"),
    ("caption", "l.tsv", "path\tcaption\n", "is not of a known form: line 1: .*; only a .csv is read as CSV$"),
    ("caption", "l.jsonl", '[{"path": "a.mp4"}]', "is not of a known form: line 1: .*each, and not in a list$"),
    ("caption", "l.jsonl", '{"caption": "\xe9"}', "is not of a known form: line 1: not text in UTF-8$"),
    ("caption", "l.jsonl", "", "is empty$"), ("video", "l.csv", "", "is empty$"),
    ("video", "l.csv", "\r\n\n", "is empty$"), ("video", "l.csv", "videoid,name\n", "is empty$"),
    ("caption", "l.jsonl", '{"caption": "x"}\n', "is not of a known form: line 1: it has none of videoid, path"),
    ("label", "l.txt", "a b\nc \xe9\n", "is not of a known form: .*l.txt, line 2: not text in UTF-8"),
    ("video", "l.json", '{"videos":\n\xe9', "is not of a known form: .*l.json, line 2: not text in UTF-8"),
    ("video", "l.json", '{"videos":\n]', "is not of a known form: .*l.json, line 2: not JSON"),
    ("video", "l.JSON", "{}", "is not of a known form: not of the form of MSR-VTT's json; write anything "
                           'else as JSON lines, {"path": , "caption": } each, in a .jsonl file$'),
    ("video", "l.json", '[{"path": "a.mp4"}]', "is not of a known form: not of the form of MSR-VTT's json")])
def test_bad_lists_are_named(tmp_path, source, name, content, says):
    path = tmp_path / name
    path.write_bytes(content.encode("cp1252"))
    with pytest.raises(ValueError, match=f"^{source} list {path} {says}"):
        Items(source, str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        Items(source, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["l", "l.csv", "l.jsonl", "l.json"])
@pytest.mark.parametrize("source", ["video", "label", "caption"])
def test_a_fifo_is_no_list(tmp_path, source, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        Items(source, str(tmp_path / name))


FIELD = st.text(st.sampled_from('ab", \n\r\'é\u2028\t\x85\ufeff\x0c\x1c'), max_size=5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(FIELD, min_size=2, max_size=2), max_size=6), st.sampled_from(["\n", "\r\n", "\r"]),
       st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_rows_of_csv_are_those_of_the_csv_module(place, rows, ending, quoting, encoding):
    """However they were written."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=quoting, lineterminator=ending).writerows([["path", "caption"], *rows])
    rows = [row for row in csv.reader(io.StringIO(text.getvalue(), newline="")) if row]
    (place / "list.csv").write_bytes(text.getvalue().encode(encoding))
    if encoding != "utf-16":
        assert rows_read(place / "list.csv") == rows
    items = read(place, ("path,caption\nx,y\n" + text.getvalue()).encode(encoding))
    assert len(items) == len(rows) + 1
    for i, row in enumerate(rows, 1):
        if len(row) != 2:  # "\r" may stand without quotes
            assert "more or fewer" in captions(items)[i]
        else:
            assert list(items.fields(i).values()) == row
            if row[0] and row[1].strip():
                assert items[i] == Item((" ".join(row[1].split()),), str(place / row[0]))


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('ab", \n\r\x85\ufeff'), max_size=20))
def test_no_row_is_lost_however_it_is_quoted(place, text):
    """Each row as the csv module reads it, even where quotes are stray; refused where one swallows the end."""
    (place / "list.csv").write_bytes(text.encode())
    *rows, last = csv.reader(io.StringIO(text.removeprefix("\ufeff") + "\nend", newline=""))
    if last == ["end"]:
        assert rows_read(place / "list.csv") == [row for row in rows if row]
    else:
        with pytest.raises(ValueError, match="a quote is not closed"):
            rows_read(place / "list.csv")


@given(st.text(st.sampled_from("a\r\n"), max_size=12), st.integers(1, 4))
def test_lines_begin_at_the_same_bytes_however_large_the_chunks(text, chunk):
    lines = io.StringIO(text, newline="").readlines()
    starts = np.cumsum([0, *map(len, lines)])[:-1].tolist()
    assert line_starts(np.frombuffer(text.encode(), np.uint8), chunk).tolist() == starts


def rows_read(path):
    records = Records(str(path), rows=True)
    return [next(csv.reader([records[i]])) for i in range(len(records))]


MANY = ": more or fewer columns"
STRAY = ": is a quote not closed"


@pytest.mark.parametrize("text, right", [
    ('0.mp4,a 12" pizza\n1.mp4,a dog\n2.mp4,a 5" phone\n', ['a 12" pizza', "a dog", 'a 5" phone']),
    ('0.mp4,"a ""cat"""\n1.mp4,"a\r\ndog"\n\n2.mp4,"a" bird', ['a "cat"', "a dog", "a bird"]),
    ("0.mp4,a dog\r1.mp4,a cat\r", ["a dog", "a cat"]),
    ("0.mp4,a dog\r\n1.mp4,a cat\n2.mp4,a\u2028bird\x85\r", ["a dog", "a cat", "a bird"]),
    ('0.mp4,a dog\n1.mp4,a cat, running\n2.mp4\n3.mp4,"a cat, running"\n', ["a dog", MANY, MANY, "a cat, running"]),
    ('0.mp4,a dog\n1.mp4,"a cat\n2.mp4,"a bird"\n3.mp4,a fox\n', ["a dog", STRAY, "a fox"]),
    ('0.mp4,a dog\n1.mp4,"a cat\n2.mp4,a 12" pizza\n3.mp4,a fox\n', ["a dog", STRAY, "a fox"]),
    ('0.mp4,"a 5\\"" phone, \\"\n1.mp4,"a \\"big\\" cat"\n2.mp4,a dog', ['a 5\\" phone, \\', STRAY, "a dog"])])
def test_a_row_of_csv_is_read_whole_or_bad(tmp_path, text, right):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        mark = codecs.BOM_UTF16_LE if encoding == "utf-16-le" else b""
        items = read(tmp_path, mark + ("path,caption\n" + text).encode(encoding))
        for found, caption in zip(captions(items), right, strict=True):
            assert found == caption or caption.startswith(":") and caption[2:] in found


@pytest.mark.parametrize("name, lines", [
    ("l.csv", [b"path,caption", b"0.mp4,a dog", b'1.mp4,"a man\'s\nhat"', b"2.mp4,a man\x92s hat",
               "3.mp4,a café".encode(), b"4.mp4,\0"]),
    ("l.jsonl", [b"", b'{"path": "0.mp4", "caption": "a dog"}', b"", b'{"path": "1.mp4", "caption": "a man\'s hat"}',
                 b'{"path": "2.mp4", "caption": "a man\x92s hat"}', '{"path": "3.mp4", "caption": "a café"}'.encode(),
                 b'{"path": "4.mp4", "caption": "\0"}'])])
def test_a_record_that_is_no_utf8_is_told_with_its_line(tmp_path, name, lines):
    """In the cp1252 of Windows, most often."""
    for end in (b"\n", b"\r\n", b"\r"):
        items = read(tmp_path, end.join(lines), name)
        assert captions(items) == ["a dog", "a man's hat", "not text in UTF-8", "a café", "not text in UTF-8"]
        assert items.name(2) == f"{tmp_path}/{name}, line 5" and items.name(3) == f"{tmp_path}/3.mp4"


@pytest.mark.parametrize("caption", ['"\\ud800"', '"a\\u0000"', '["a", "\\udc80"]', "3", "true", "[1]", '{"a": 1}'])
def test_what_json_can_spell_but_nobody_can_write_is_no_caption(tmp_path, caption):
    items = read(tmp_path, f'{{"path": "x", "caption": "ok"}}\n{{"path": "x", "caption": {caption}}}', "l.jsonl")
    assert captions(items) == ["ok", "its caption is not text"]


def test_columns_may_be_written_large_and_with_spaces(tmp_path):
    assert captions(read(tmp_path, "ID, Path ,CAPTION\n1,a.mp4,a dog\n")) == ["a dog"]
    assert captions(read(tmp_path, "ID, Path ,CAPTION\n1,a.mp4,a dog\n", "LIST.CSV")) == ["a dog"]


@pytest.mark.parametrize("tail, line", [
    ("2.mp4,a bird\n" * 20000, 4), ("2.mp4,a bird\n" * 3, 4), ("", 4), ('"2.mp4","a bird""', 5)])
def test_a_quote_that_is_never_closed_is_told_with_its_line(tmp_path, tail, line):
    text = 'path,caption\n0.mp4,"a\ndog"\n1.mp4,"a cat' + ("\n" if line == 4 else '"\n') + tail
    for encoding in ("utf-8", "utf-16"):
        with pytest.raises(ValueError, match=rf"list\.csv is not of a known form: line {line}: .*a quote .*not closed"):
            read(tmp_path, text.encode(encoding))


NO_TEXT = "its caption is not text in UTF-8"
NO_CAPTION = ("no caption: neither in caption, prompt, text, name nor in a .txt or .json beside it; "
              "captions=from_names would take names of files")


@pytest.mark.parametrize("text, right", [
    ("a dog é".encode(), "a dog é"), ("a dog é".encode("utf-8-sig"), "a dog é"),
    ("a dog é".encode("utf-16"), "a dog é"), (codecs.BOM_UTF16_BE + "a dog é".encode("utf-16-be"), "a dog é"),
    (b"a\r\ndog\r", "a dog"), (b"", NO_CAPTION), ("a dog's".encode("utf-16-le"), NO_TEXT),
    (b"a man\x92s hat", NO_TEXT), (b"a\0dog", NO_TEXT),
    (b"dog " * 300_000, "its caption is longer than 1048576 bytes")])
def test_the_text_beside_a_clip_is_text_or_bad(tmp_path, text, right):
    for ending in (".txt", ".TXT"):
        folder = tmp_path / ending
        folder.mkdir()
        (folder / "clip.mp4").touch()
        (folder / f"clip{ending}").write_bytes(text)
        assert captions(Items("video", str(folder))) == [right]


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)))
def test_the_text_beside_a_clip_is_never_guessed(place, text):
    (place / "a.txt").write_bytes(text)
    found = captions(read(place, "path\na.mp4\n"))[0]
    if found not in (NO_TEXT, NO_CAPTION):
        marks = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
        assert found == " ".join(text.decode(marks.get(text[:2], "utf-8-sig")).split())


def test_a_fifo_beside_a_clip_is_no_text(tmp_path):
    (tmp_path / "a.mp4").touch()
    os.mkfifo(tmp_path / "a.txt")
    assert captions(Items("video", str(tmp_path))) == [NO_CAPTION]


BYSTANDERS = [".DS_Store", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "~$b.mp4", "b.mp4~",
              ".#b.mp4", ".~lock.b.png#", "b.mp4.part", "b.png.crdownload", "._b.mp4", "._b.PNG", "._label", "label~"]
HIDDEN = st.from_regex(r"(\.|~\$)[a-z.]{1,4}\.(mp4|png|gif)", fullmatch=True)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.sampled_from(BYSTANDERS) | HIDDEN), st.booleans())
def test_what_lies_beside_the_data_is_no_data(place, names, folders):
    """Hidden files and folders, thumbnails, locks, backups and halves of downloads; and stills beside videos."""
    folder = Path(tempfile.mkdtemp(dir=place))
    for name in ("b.mp4", "C.MP4"):
        (folder / name).touch()
    for name in ("b.png", "C.Png"):
        Image.new("L", (1, 1)).save(folder / name)
    (folder / "label").mkdir()
    (folder / "label" / "b.png").touch()
    for name in names:
        endings = (".part", ".crdownload")  # a folder may be called so
        for where in (folder, folder / "label"):
            if folders and not name.endswith(endings):
                (where / name).mkdir()
                (where / name / "b.png").touch()
            else:
                (where / name).write_bytes(b"\0\5\x16\7")
    for source, found in (("video", ["C.MP4", "b.mp4"]), ("caption", ["C.Png", "b.png"]), ("label", ["label"])):
        items = Items(source, str(folder))
        assert [os.path.basename(items.name(i)) for i in range(len(items))] == found
    assert images_of(str(folder / "label")) == [str(folder / "label" / "b.png")]


def test_stills_among_stickers_are_no_clips_and_it_is_told(tmp_path, capsys):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    for name in ("a.gif", "b.webp", "c.PNG", "d.apng"):
        kind = {"apng": "PNG"}.get(name[2:], name[2:].upper())
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:], duration=100)
        frames[0].save(tmp_path / f"still-{name}", kind)
    (tmp_path / "broken.webp").write_bytes(b"RIFF")
    items = Items("video", str(tmp_path))
    assert [os.path.basename(items.name(i)) for i in range(5)] == ["a.gif", "b.webp", "broken.webp", "c.PNG", "d.apng"]
    assert len(items) == 5 and capsys.readouterr().err == (
        f"warning: 4 still pictures in {tmp_path} are no clips, but can be given as `caption`: still-a.gif, "
        "still-b.webp, still-c.PNG, ...\n")
    assert len(Items("caption", str(tmp_path))) == 9 and not capsys.readouterr().err


@pytest.mark.parametrize("name, caption", [
    ("a_red-panda__waving.gif", "a red panda waving"), ("1f600.mp4", "1f600"), ("Zoë.x.mp4", "Zoë.x"),
    ("_.mp4", NO_CAPTION)])
def test_a_name_can_be_a_caption(tmp_path, name, caption):
    (tmp_path / name).write_bytes(b"GIF89a")
    assert captions(Items("video", str(tmp_path), "from_names")) == [caption]
    assert captions(Items("video", str(tmp_path))) == [NO_CAPTION]
    (tmp_path / f"{os.path.splitext(name)[0]}.txt").write_text("what is beside it goes first")
    assert captions(Items("video", str(tmp_path), "from_names")) == ["what is beside it goes first"]


def test_a_hidden_file_that_a_list_names_is_read(tmp_path):
    assert read(tmp_path, "path,caption\n.cache/._a.mp4,a dog\n")[0].path == str(tmp_path / ".cache/._a.mp4")


@pytest.mark.parametrize("source, says", [
    ("video", r"what counts is names in \.mp4, .*; there is 3 \.webp, 2 folders, 1 without an ending$"),
    ("label", "what counts is a folder of images for each label; there is nothing$"),
    ("caption", r"what counts is names in \.jpg, .*; there is 1 \.mp4$")])
def test_a_folder_in_which_nothing_counts_says_what_would(tmp_path, source, says):
    (tmp_path / ".hidden").mkdir()
    if source == "video":
        for name in ("a.webp", "b.WEBP", "c.webp"):
            Image.new("RGB", (1, 1)).save(tmp_path / name)
        for name in ("README", ".d.mp4"):
            (tmp_path / name).touch()
        for name in ("sub", "other"):
            (tmp_path / name).mkdir()
    elif source == "caption":
        (tmp_path / "clip.mp4").touch()
    with pytest.raises(ValueError, match=rf"^{source} list {tmp_path} is empty: {says}"):
        Items(source, str(tmp_path))


def test_what_a_list_names_stays_in_its_folder_unless_it_is_absolute(tmp_path):
    """An absolute path is asked for; parts of names, and names of labels, never are."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out.mp4").touch()
    (tmp_path / "7.mp4").touch()
    lines = [{"path": "a/../b.mp4"}, {"path": f"{tmp_path}/out.mp4"}, {"path": "..b.mp4"}, {"path": "../out.mp4"},
             {"path": "a/../../out.mp4"}, {"img_path": ".."}, {"videoid": "../7"}, {"videoid": 7, "page_dir": ".."},
             {"videoid": f"{tmp_path}/7"}, {"videoid": 7, "page_dir": str(tmp_path)},
             {"videoid": "/7", "page_dir": "x"}]
    items = read(tmp_path / "in", "".join(json.dumps(line | {"caption": "ok"}) + "\n" for line in lines), "l.jsonl")
    out = "its path leads out of the list's folder: move the list, or write the absolute path"
    assert captions(items) == ["ok"] * 3 + [out] * 8
    assert items[1].path == str(tmp_path / "out.mp4")
    (tmp_path / "in" / "labels.txt").write_text(f"a cat\n.. dog\n{tmp_path} bird\n../x fox\n")
    assert captions(Items("label", str(tmp_path / "in" / "labels.txt"))) == ["cat"] + [out] * 3


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/a.mp4", "file:///etc/hostname", "concat:a.mp4|b.mp4", "fifo.mp4",
                                  "/dev/zero", "pipe:0", "-", "sub"])
def test_no_address_device_or_fifo_is_opened(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.mp4")
    os.mkdir("sub")
    with open("l.jsonl", "w") as file:
        file.write(json.dumps({"path": name, "caption": "x"}))
    for source in ("video", "caption"):
        with pytest.raises(Bad, match="missing|not a regular file"):
            LiveClips({source: "l.jsonl"}, Spec(2, 32, 32)).sample(source, 0, 0, 0)


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


@pytest.mark.slow
def test_a_million_rows_open_in_one_and_a_half_times_a_pass_of_the_csv_module(tmp_path):
    with open(tmp_path / "list.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        rows.writerows([i, f"https://example.org/videos/{i}/preview/clip.mp4", "PT00H00M13S", f"{i % 1000:06d}",
                        f"a drone shot of the coast{', in fog' * (i % 2)}, number {i}"] for i in range(1_000_000))
    passes, opens = [], []
    for _ in range(3):
        began = time.process_time()
        with open(tmp_path / "list.csv", newline="", encoding="utf-8") as file:
            assert sum(1 for _ in csv.reader(file)) == 1_000_001
        passes.append(time.process_time() - began)
        began = time.process_time()
        assert len(Items("video", str(tmp_path / "list.csv"))) == 1_000_000
        opens.append(time.process_time() - began)
    print(f"csv.reader {median(passes):.2f} s, Items {median(opens):.2f} s: {median(opens) / median(passes):.2f} times")
    assert median(opens) < 1.5 * median(passes)


@pytest.mark.parametrize("name, text", [
    ("metadata.csv", "file_name,text,name\na.jpg,a fox,Fritz\nb.jpg,a hen,Berta\n"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "a fox"}\n{"file_name": "b.jpg", "text": "a hen"}\n')])
def test_folders_of_hugging_face_are_lists(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    items = Items("caption", str(tmp_path / name))
    assert [items[i] for i in range(2)] == [Item(("a fox",), str(tmp_path / "a.jpg")),
                                            Item(("a hen",), str(tmp_path / "b.jpg"))]
