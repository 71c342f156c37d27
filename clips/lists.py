"""Lists of clips, labels and captioned images: CSV, JSON lines, MSR-VTT's json, folders."""

import csv
import io
import json
import os
from dataclasses import dataclass

import numpy as np

from clips.decode import VIDEO_ENDINGS, Bad
from clips.pictures import IMAGE_ENDINGS

# ---------------------------------------------------------------------------------------------------------------------
# Lists


@dataclass(frozen=True)
class Item:
    captions: tuple[str, ...]  # one is drawn
    path: str  # a file, or the folder of a label


class Records:
    """The records of a text, found once and read when asked for: of a million only the places are kept, 16 MB.

    path    the file, mapped and never copied, not even into worker processes; or
    text    the text itself, as bytes
    quoted  CSV: a newline inside quotes ends no record
    """

    def __init__(self, path: str, text: bytes | None = None, quoted=False):
        self.path, self.text = path, text
        if text is None:
            self.text = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else b""
        self.spans = record_spans(np.frombuffer(self.text, np.uint8), quoted)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i: int) -> str:
        first, last = self.spans[i]
        return bytes(self.text[first:last]).decode("utf-8-sig", errors="replace")

    def __getstate__(self):
        return self.__dict__ | ({"text": None} if isinstance(self.text, np.memmap) else {})

    def __setstate__(self, state):
        self.__dict__ |= state
        if self.text is None:
            self.text = np.memmap(self.path, np.uint8, "r")


def record_spans(text, quoted: bool, chunk=1 << 24) -> np.ndarray:
    """First byte and end of every record of a text (N, 2): its lines, without the blank ones.

    quoted  a newline inside quotes ends no record (CSV)
    """
    ends, inside = [np.zeros(1, np.int64)], 0
    for at in range(0, len(text), chunk):
        part = text[at : at + chunk]
        ending = part == ord("\n")
        if quoted:
            quotes = np.cumsum(part == ord('"'), dtype=np.uint8) + np.uint8(inside)  # wraps around, stays even or odd
            ending &= quotes % 2 == 0
            inside = quotes[-1] % 2
        ends.append(np.flatnonzero(ending) + at + 1)
    ends = np.concatenate([*ends, [len(text)]])
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    return spans[spans[:, 1] - spans[:, 0] > 2]  # "\r\n" is blank


class Items:
    """The items of one source, each parsed when it is asked for: `items[i]` -> Item, or Bad.

    Relative paths resolve against the list's own folder. Raises ValueError when the list cannot be read, is empty, or
    its first item is not of a known form.
    """

    def __init__(self, source: str, path: str):
        self.source, self.path = source, path
        self.folder = path if os.path.isdir(path) else os.path.dirname(path)
        self.csv = path.endswith(".csv") and os.path.isfile(path)
        try:
            self.records = Records(path, generated_lines(source, path), quoted=self.csv)
            self.first = 1 if self.csv else 0  # the header
            self.header = next(csv.reader([self.records[0]])) if self.csv and len(self.records) else None
            if not len(self):
                raise ValueError(f"{source} list {path} is empty")
            self.file(self.fields(0))
        except OSError as error:
            raise ValueError(f"{source} list {path} cannot be read: {error.strerror or error}") from error
        except (Bad, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source} list {path} is not of a known form: {error}") from error

    def __len__(self):
        return max(0, len(self.records) - self.first)

    def record(self, i: int) -> str:
        """The text of an item, as it stands in the list."""
        return self.records[self.first + i]

    def fields(self, i: int) -> dict:
        text = self.record(i)
        try:
            if self.csv:
                return dict(zip(self.header, next(csv.reader(io.StringIO(text, newline="")))))
            fields = json.loads(text)
        except (ValueError, csv.Error) as error:
            raise Bad("not a line of " + ("CSV" if self.csv else "JSON")) from error
        if not isinstance(fields, dict):
            raise Bad("not a JSON object")
        return fields

    def file(self, fields: dict) -> str:
        """Where the file of an item lies; where it should, when it is missing."""
        name, page = fields.get("path") or fields.get("img_path"), ""
        if "videoid" in fields:  # WebVid: under its page or flat, beside the list or in videos/
            name, page = f"{fields['videoid']}.mp4", str(fields.get("page_dir") or "")
        if not isinstance(name, str):
            raise Bad("it has no path, img_path or videoid")
        places = [os.path.join(self.folder, name)]
        if "videoid" in fields:
            places = [os.path.join(self.folder, videos, sub, name) for sub in (page, "") for videos in ("videos", "")]
        return next(filter(os.path.exists, places), places[0])

    def __getitem__(self, i: int) -> Item:
        fields = self.fields(i)
        path = self.file(fields)
        captions = next((fields[name] for name in ("caption", "prompt", "name") if fields.get(name)), [])
        captions = [captions] if isinstance(captions, str) else captions
        beside = os.path.splitext(path)[0] + ".txt"
        if not captions and os.path.isfile(beside):
            with open(beside, encoding="utf-8", errors="replace") as file:
                captions = [file.read()]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise Bad("its caption is not text")
        captions = tuple(" ".join(caption.split()) for caption in captions if caption.strip())
        if not captions:
            raise Bad("no caption")
        return Item(captions, path)

    def name(self, i: int) -> str:
        """What to call an item in a message: its file, where it has one."""
        try:
            return self.file(self.fields(i))
        except Bad:
            return f"{self.path}, item {i}"


def generated_lines(source: str, path: str) -> bytes | None:
    """The JSON lines that a folder, a file of label names or MSR-VTT's json stands for; None: it has lines itself."""
    if os.path.isdir(path):
        endings = None if source == "label" else VIDEO_ENDINGS if source == "video" else IMAGE_ENDINGS
        with os.scandir(path) as entries:
            names = sorted(e.name for e in entries if
                           (e.is_dir() if endings is None else e.name.lower().endswith(endings)))
        lines = [{"path": name} | ({"caption": name.replace("_", " ")} if source == "label" else {}) for name in names]
    elif source == "label":  # "n01440764 tench, Tinca tinca"
        with open(path, encoding="utf-8") as file:
            pairs = [line.strip().partition(" ") for line in file if line.strip()]
        lines = [{"path": folder, "caption": [name.strip() for name in names.split(",")]} for folder, _, names in pairs]
    elif path.endswith(".json"):  # MSR-VTT
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        captions = {video["video_id"]: [] for video in data["videos"]}
        for sentence in data["sentences"]:
            captions.get(sentence["video_id"], []).append(sentence["caption"])  # of another split: not listed
        lines = [{"videoid": video, "caption": texts} for video, texts in captions.items()]
    else:
        return None
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def image_names(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS))
    except (OSError, ValueError) as error:  # ValueError: no folder can have such a name
        raise Bad("not a folder that can be read") from error
