"""Lists of clips, of labels and of captioned images.

A list of clips or captioned images is a CSV file (WebVid's, or with the columns path and caption), JSON lines
({"path": ..., "caption": ...}), MSR-VTT's json, or a folder of `name.mp4` + `name.txt`. A list of labels is a folder
with a folder of images for each label, or a file of such folders and their names. A list may have millions of lines:
only their places are kept in memory, and an item is parsed when it is asked for.
"""

import csv
import json
import os
from array import array
from dataclasses import dataclass

import numpy as np

from clips.decode import VIDEO_ENDINGS, Bad
from clips.pictures import IMAGE_ENDINGS


@dataclass(frozen=True)
class Item:
    captions: tuple[str, ...]  # one is drawn for each sample
    path: str  # a file, or the folder of a label


class Items:
    """The items of one source: `items[i]` is an Item, or raises Bad.

    Relative paths start at the list's own folder. Raises ValueError when the list cannot be read, is empty, or its
    first item is not of a known form.
    """

    def __init__(self, source: str, path: str):
        self.source, self.path = source, path
        self.folder = path if os.path.isdir(path) else os.path.dirname(path)
        self.csv = path.endswith(".csv") and os.path.isfile(path)
        try:
            self.records = Records(path, generated_lines(source, path), self.csv)
            self.first = 1 if self.csv else 0  # item 0 comes after the header
            if len(self):
                self.header = csv_row(self.records[0]) if self.csv else None
                self.file(self.fields(0))
        except OSError as error:
            raise ValueError(f"{source} list {path} cannot be read: {error.strerror or error}") from error
        except (Bad, csv.Error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source} list {path} is not of a known form: {error}") from error
        if not len(self):
            raise ValueError(f"{source} list {path} is empty")

    def __len__(self):
        return max(0, len(self.records) - self.first)

    def __getitem__(self, i: int) -> Item:
        fields = self.fields(i)
        path = self.file(fields)
        captions = next((fields[name] for name in ("caption", "prompt", "name") if fields.get(name)), None)
        captions = captions or text_beside(path)
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise Bad("its caption is not text")
        captions = tuple(" ".join(caption.split()) for caption in captions if caption.strip())
        if not captions:
            raise Bad("no caption")
        return Item(captions, path)

    def name(self, i: int) -> str:
        """The name of an item in messages: its file, or its number where the list names no file."""
        try:
            return self.file(self.fields(i))
        except Bad:
            return f"{self.path}, item {i}"

    def record(self, i: int) -> str:
        """The text of an item, as it stands in the list."""
        return self.records[self.first + i]

    def fields(self, i: int) -> dict:
        """The columns of an item's row, or its JSON object."""
        try:
            row = csv_row(self.record(i)) if self.csv else json.loads(self.record(i))
        except (ValueError, RecursionError, csv.Error) as error:
            raise Bad("not a line of " + ("CSV" if self.csv else "JSON")) from error
        if not self.csv and not isinstance(row, dict):
            raise Bad("not a JSON object")
        if self.csv and len(row) != len(self.header):
            raise Bad("more or fewer columns than the header: is a comma not in quotes?")
        return dict(zip(self.header, row)) if self.csv else row

    def file(self, fields: dict) -> str:
        """Where the file of an item lies, or should lie when it is missing."""
        if "videoid" in fields:  # WebVid, MSR-VTT: in a folder `page_dir` or without it, in videos/ or beside the list
            name, page = f"{fields['videoid']}.mp4", str(fields.get("page_dir") or "")
            places = [os.path.join(self.folder, videos, sub, name) for sub in (page, "") for videos in ("videos", "")]
            return next(filter(os.path.exists, places), places[0])
        name = fields.get("path") or fields.get("img_path")
        if not isinstance(name, str):
            raise Bad("it has no path, img_path or videoid")
        return os.path.join(self.folder, name)


def text_beside(path: str) -> str:
    """The text in clip.txt beside clip.mp4, "" where there is none."""
    path = os.path.splitext(path)[0] + ".txt"
    if not os.path.isfile(path):
        return ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise Bad("its caption cannot be read") from error


def image_names(folder: str) -> list[str]:
    """The images of a label."""
    try:
        return sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS))
    except (OSError, ValueError) as error:  # ValueError: no folder can have such a name
        raise Bad("not a folder that can be read") from error


def generated_lines(source: str, path: str) -> bytes | None:
    """JSON lines for a folder, a file of label names, or MSR-VTT's json; None for a file that has lines of its own."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            if source == "label":
                names = sorted(entry.name for entry in entries if entry.is_dir())
                lines = [{"path": name, "caption": name.replace("_", " ")} for name in names]
            else:
                endings = VIDEO_ENDINGS if source == "video" else IMAGE_ENDINGS
                names = sorted(entry.name for entry in entries if entry.name.lower().endswith(endings))
                lines = [{"path": name} for name in names]
    elif source == "label":  # "n01440764 tench, Tinca tinca"
        with open(path, encoding="utf-8") as file:
            pairs = [line.strip().partition(" ") for line in file if line.strip()]
        lines = [{"path": folder, "caption": [name.strip() for name in names.split(",")]} for folder, _, names in pairs]
    elif path.endswith(".json"):  # MSR-VTT
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        captions = {video["video_id"]: [] for video in data["videos"]}
        for sentence in data["sentences"]:
            captions.get(sentence["video_id"], []).append(sentence["caption"])  # some belong to videos of another split
        lines = [{"videoid": video, "caption": texts} for video, texts in captions.items()]
    else:
        return None
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Records of a large text


class Records:
    """The lines of a text, or the rows of a CSV file, without blank ones: `records[i]` is the text of one.

    A record is read when it is asked for; of each is kept where it begins and ends, in 16 bytes.

    path  the file: mapped and never copied, not even into worker processes; or
    text  the text itself
    rows  whether it is CSV, where a row may have several lines
    """

    def __init__(self, path: str, text: bytes | None = None, rows=False):
        self.path = path
        if text is None and os.path.getsize(path):
            self.text = np.memmap(path, np.uint8, "r")
        else:
            self.text = np.frombuffer(text or b"", np.uint8)
        bounds = np.insert(row_ends(path) if rows else line_ends(self.text), 0, 0)
        self.spans = np.stack([bounds[:-1], bounds[1:]], axis=1)
        short = np.flatnonzero(np.diff(bounds) <= 2)  # a blank line is "\n" or "\r\n"
        self.spans = np.delete(self.spans, [i for i in short if not self[i].strip("\r\n")], axis=0)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i: int) -> str:
        first, last = self.spans[i]
        encoding = "utf-8" if first else "utf-8-sig"  # a byte order mark at the beginning is no text
        return self.text[first:last].tobytes().decode(encoding, errors="replace")

    def __getstate__(self):
        return self.__dict__ | ({"text": None} if isinstance(self.text, np.memmap) else {})

    def __setstate__(self, state):
        self.__dict__ |= state
        if self.text is None:
            self.text = np.memmap(self.path, np.uint8, "r")


def line_ends(text: np.ndarray, chunk=1 << 20) -> np.ndarray:
    """The byte behind each line."""
    ends = [np.flatnonzero(text[at : at + chunk] == ord("\n")) + at + 1 for at in range(0, len(text), chunk)]
    return np.concatenate([*ends, [len(text)]])


def row_ends(path: str) -> np.ndarray:
    """The byte behind each row of a CSV file, where Python's csv module says that it ends."""
    at, ends = 0, array("q")

    def lines():
        nonlocal at
        for line in file:
            at += len(line)
            yield line

    with open(path, encoding="latin-1", newline="") as file:  # which has one character for each byte
        rows = csv.reader(lines())
        try:
            for _ in rows:
                ends.append(at)
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num}: {error}") from error
    return np.array(ends)


def csv_row(text: str) -> list[str]:
    return next(csv.reader([text]))
