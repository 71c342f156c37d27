"""Lists of clips, of labels and of captioned images.

A list of clips or captioned images is a CSV file (WebVid's, or with the columns path and caption), JSON lines
({"path": ..., "caption": ...}), MSR-VTT's json, or a folder of `name.mp4` + `name.txt` or `name.json`. A list of labels
is a folder with a folder of images for each label, or a file of such folders and their names. Either may be tars
(clips/tars.py). A list may have millions of lines: only their places are kept in memory, and an item is parsed when it
is asked for.

Where a clip has no caption, its name can be one: `a_red-panda.gif` shows "a red panda".
"""

import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass

from cli import MARKS, decode, read_json, read_text, warn
from clips.decode import IMAGE_ENDINGS, PICTURE_ENDINGS, Bad, Member, is_still, open_file
from clips.records import Records, csv_row
from clips.tars import ENDINGS, Tars, is_data, named_tars, shortened, tars_in

# what columns may be called: here, by WebVid, by the paper's captioned images, and in Hugging Face's folders
PATHS, CAPTIONS = ("videoid", "path", "img_path", "file_name"), ("caption", "prompt", "text", "name")
TEXT_LIMIT = 1 << 20  # bytes of the text beside a clip


@dataclass(frozen=True)
class Item:
    captions: tuple[str, ...]  # one is drawn for each sample
    path: str  # a file, also a Member; or a folder, or a LabelInTars, of images


class Items:
    """The items of one source: `items[i]` is an Item, or raises Bad.

    Relative paths start at the list's own folder, and must stay in it. Raises ValueError when the list cannot be read,
    is empty, or its first item is not of a known form.

    captions  "from_names": the name of its file is the caption of what has no other; else the field of the list, or of
              the .json beside a file, that alone says them
    """

    def __init__(self, source: str, path: str, captions=""):
        self.source, self.path, self.captions = source, path, captions
        self.folder = path if os.path.isdir(path) else os.path.dirname(path)
        self.columns = CAPTIONS if captions in ("", "from_names") or source == "label" else (captions,)
        self.csv = source != "label" and path.lower().endswith(".csv") and os.path.isfile(path)
        self.first, self.header = int(self.csv), None  # item 0 comes after the header
        try:
            tars, lines = named_tars(path), None
            if not tars:
                lines = generated_lines(source, path)
                tars = tars_beside(source, path, lines)
            self.tars = Tars(source, tars) if tars else None
            if tars and source == "label" and not lines:
                lines = label_lines(sorted(self.tars.labels))
            self.records = Records(path, lines, self.csv) if lines or not tars else self.tars
            if self.csv and len(self.records):
                self.header = read_header(self.records[0])
            if len(self):
                self.file(self.fields(0))
        except OSError as error:
            raise ValueError(f"{source} list {path} cannot be read: {error.strerror or error}") from error
        except Bad as bad:
            line = self.records.line(self.first if self.header else 0)
            raise ValueError(f"{source} list {path} is not of a known form: line {line}: {bad}") from bad
        except ValueError as error:
            raise ValueError(f"{source} list {path} is not of a known form: {error}") from error
        if not len(self):
            raise ValueError(f"{source} list {path} is empty{what_lies_there(source, path, self.tars)}")

    def __len__(self):
        return max(0, len(self.records) - self.first)

    def __getitem__(self, i: int) -> Item:
        fields = self.fields(i)
        path = self.file(fields)
        captions = first_of(fields, self.columns)
        if not captions and self.columns == CAPTIONS:
            captions = text_beside(path)
        captions = captions or first_of(json_beside(path), self.columns) or ""
        if not captions and self.captions == "from_names":
            captions = text_in_name(path)
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(map(is_text, captions)):
            raise Bad("its caption is not text")
        captions = tuple(" ".join(caption.split()) for caption in captions if caption.strip())
        if not captions:
            if self.columns != CAPTIONS:
                raise Bad(f"no caption: neither it nor a .json beside it has {self.captions}")
            raise Bad(f"no caption: neither in {', '.join(CAPTIONS)} nor in a .txt or .json beside it; "
                      "captions=from_names would take names of files")
        return Item(captions, path)

    def name(self, i: int) -> str:
        """The name of an item in messages: its file, or its line where the list names no file."""
        try:
            return self.file(self.fields(i))
        except Bad:
            return f"{self.path}, line {self.records.line(self.first + i)}"

    def record(self, i: int) -> str:
        """The text of an item, as it stands in the list."""
        return self.records[self.first + i]

    def fields(self, i: int) -> dict:
        """The columns of an item's row, or its JSON object."""
        if self.records is self.tars:
            return {"path": self.tars[i]}
        try:
            row = csv_row(self.record(i)) if self.csv else json.loads(self.record(i))
        except (ValueError, RecursionError) as error:
            raise Bad("not a line of JSON; only a .csv is read as CSV") from error
        if not self.csv and not isinstance(row, dict):
            raise Bad('not a JSON object: JSON lines are {"path": , "caption": } each, and not in a list')
        if self.csv and len(row) != len(self.header):
            raise Bad("more or fewer columns than the header: is a comma not in quotes?")
        return dict(zip(self.header, row)) if self.csv else row

    def file(self, fields: dict) -> str:
        """Where the file of an item lies, or should lie when it is missing."""
        if "videoid" in fields:  # WebVid, MSR-VTT: in a folder `page_dir` or without it, in videos/ or beside the list
            name, page = f"{fields['videoid']}.mp4", str(fields.get("page_dir") or "")
            names = [os.path.join(videos, sub, name) for sub in (page, "") for videos in ("videos", "")]
            places = [os.path.join(self.folder, inside(name)) for name in names]
            return next(filter(os.path.exists, places), places[0])
        name = first_of(fields, PATHS)
        if not isinstance(name, str):
            raise Bad(f"it has none of {', '.join(PATHS)}")
        if isinstance(name, Member):
            return name
        if self.tars and name in self.tars.labels:
            return LabelInTars.of(self.folder, name, self.tars)
        if self.source != "label" and os.path.isabs(name):  # its writer means that very file
            return name
        return os.path.join(self.folder, inside(name))


class LabelInTars(str):
    """The path of a label whose images lie in tars: a text for messages."""

    @classmethod
    def of(cls, folder: str, label: str, tars: Tars) -> "LabelInTars":
        path = cls(os.path.join(folder, label))
        path.label, path.tars = label, tars
        return path


def first_of(fields: dict, names: tuple):
    """The first of some fields that is there and not empty, else None."""
    return next((fields[name] for name in names if fields.get(name)), None)


def read_header(text: str) -> list[str]:
    """The names of a CSV file's columns, in small letters. Raises Bad when none is a path, or one comes twice."""
    header = [name.strip().lower() for name in csv_row(text)]
    twice = [name for name in (*PATHS, *CAPTIONS, "page_dir") if header.count(name) > 1]
    if twice:
        raise Bad(f"there are two columns {twice[0]}")
    if not set(header) & set(PATHS):
        raise Bad(f"its columns, parted by commas, must have one of {', '.join(PATHS)}, got {', '.join(header)}"[:300])
    return header


def inside(name: str) -> str:
    """A name that does not lead out of a folder. Raises Bad on another."""
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise Bad("its path leads out of the list's folder: move the list, or write the absolute path")
    return name


def is_text(caption) -> bool:
    """Whether a caption can be written down: JSON can spell halves of characters, and zeros."""
    return isinstance(caption, str) and not re.search("[\0\ud800-\udfff]", caption)


def text_beside(path: str, ending=".txt") -> str:
    """The text in clip.txt beside clip.mp4, "" where there is none."""
    stem = os.path.splitext(path)[0]
    if isinstance(path, Member):
        places = path.beside.get(ending)
        path = places and Member.of(path.tar, f"{stem}{ending}"[len(path.tar) + 1 :], *places, path.time)
    else:
        path = next(filter(os.path.isfile, (stem + ending, stem + ending.upper())), None)
    if path is None:
        return ""
    try:
        with open_file(path) as file:
            text = file.read(TEXT_LIMIT + 1)
        if len(text) > TEXT_LIMIT:
            raise Bad(f"its caption is longer than {TEXT_LIMIT} bytes")
        if isinstance(path, Member) and len(text) < path.size:
            raise Bad("its caption is cut off by the end of its tar")
        return decode(text, path)
    except ValueError as error:
        raise Bad("its caption is not text in UTF-8") from error
    except OSError as error:
        raise Bad("its caption cannot be read") from error


def json_beside(path: str) -> dict:
    """The object in clip.json beside clip.mp4, {} where there is none."""
    try:
        found = json.loads(text_beside(path, ".json") or "{}")
    except (ValueError, RecursionError) as error:
        raise Bad("its .json is no JSON") from error
    if not isinstance(found, dict):
        raise Bad("its .json is no JSON object")
    return found


def text_in_name(path: str) -> str:
    """The name of a file as a caption: no ending, and spaces for underscores and dashes."""
    return re.sub("[_-]", " ", os.path.splitext(os.path.basename(path))[0])


def moving(folder: str, names: list[str]) -> list[str]:
    """The names without those of still pictures, of which it is told that they are left out."""
    stills = [name for name in names if name.lower().endswith(PICTURE_ENDINGS) and is_still(os.path.join(folder, name))]
    if stills:
        warn(f"{len(stills)} still pictures in {folder} are no clips, but can be given as `caption`: "
             f"{shortened(stills)}")
    return [name for name in names if name not in set(stills)]


def images_of(folder: str) -> list[str]:
    """The paths of the images of a label."""
    if isinstance(folder, LabelInTars):
        return folder.tars.images(folder.label)
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if is_data(name, IMAGE_ENDINGS)]
    except (OSError, ValueError) as error:  # ValueError: no folder can have such a name
        raise Bad("not a folder that can be read") from error


def is_there(path: str) -> bool:
    """Whether a list, or one of its tars, is where it should be."""
    return os.path.exists(path) or any(map(os.path.isfile, named_tars(path)))


def tars_beside(source: str, path: str, lines: bytes | None) -> list[str]:
    """The tars of a folder that holds nothing else that counts, or of the one in which a list of labels lies that has
    no folders for them."""
    if os.path.isdir(path):
        return [] if lines else tars_in(path)
    if source != "label" or not lines:
        return []
    folder, first = os.path.dirname(path), json.loads(lines.partition(b"\n")[0])["path"]
    return [] if os.path.isdir(os.path.join(folder, first)) else tars_in(folder)


def what_lies_there(source: str, path: str, tars: Tars | None) -> str:
    """What to say of a folder, or of tars, in which nothing counts: what would, and what lies there instead."""
    wanted = "a folder of images for each label" if source == "label" else f"names in {', '.join(ENDINGS[source])}"
    if tars is not None:
        wanted, found = "an image with a .cls for each" if source == "label" else wanted, tars.found()
    elif os.path.isdir(path):
        with os.scandir(path) as entries:
            found = Counter("folders" if e.is_dir() else os.path.splitext(e.name)[1].lower() or "without an ending"
                            for e in entries if is_data(e.name))
    else:
        return ""
    there = ", ".join(f"{n} {ending}" for ending, n in found.most_common(3)) or "nothing"
    return f": what counts is {wanted}; there is {there}"


def generated_lines(source: str, path: str) -> bytes | None:
    """JSON lines for a folder, a file of label names, or MSR-VTT's json; a list in UTF-16 as UTF-8.

    None for a file that has lines of its own.
    """
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):  # a fifo would wait for ever
        raise ValueError("neither a file nor a folder")
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            if source == "label":
                return label_lines(sorted(entry.name for entry in entries if entry.is_dir() and is_data(entry.name)))
            else:
                names = sorted(entry.name for entry in entries if is_data(entry.name, ENDINGS[source]))
                lines = [{"path": name} for name in (moving(path, names) if source == "video" else names)]
    elif source == "label":  # "n01440764 tench, Tinca tinca"
        pairs = [line.split(maxsplit=1) for line in io.StringIO(read_text(path), newline=None)]
        lines = [{"path": folder, "caption": [name.strip() for name in ",".join(names).split(",")]}
                 for folder, *names in filter(None, pairs)]
    elif path.lower().endswith(".json"):
        lines = msr_vtt(read_json(path))
    else:
        with open(path, "rb") as file:  # UTF-16
            return read_text(path).encode() if file.read(2) in MARKS else None
    return json_lines(lines)


def json_lines(lines: list[dict]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def label_lines(labels: list[str]) -> bytes:
    return json_lines([{"path": label, "caption": label.replace("_", " ")} for label in labels])


def msr_vtt(data) -> list[dict]:
    """The lines of MSR-VTT's json, {"videos": [{"video_id": }], "sentences": [{"video_id": , "caption": }]}."""
    try:
        captions = {video["video_id"]: [] for video in data["videos"]}
        for sentence in data["sentences"]:
            captions.get(sentence["video_id"], []).append(sentence["caption"])  # some belong to videos of another split
    except (KeyError, TypeError) as error:
        raise ValueError("not of the form of MSR-VTT's json; write anything else as JSON lines, "
                         '{"path": , "caption": } each, in a .jsonl file') from error
    return [{"videoid": video, "caption": texts} for video, texts in captions.items()]
