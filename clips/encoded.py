"""Folders of samples encoded ahead, as `python -m clips.encode` writes them.

    spec.json           what the samples are made of, and which VAE and text tower encoded them
    video-000000.safetensors ...  moments (N, T, 2C, h, w) of some items, with text contexts (captions, L, D), each
                        caption once, and as `lines` what the index says of them; may be a link to another disk
    index.jsonl         a line for each sample, or for an item that cannot be used; those of an item follow each other
    index.npy           where the lines of each item begin, and what it was made from: INDEX
    empty.safetensors   the context of the empty caption

What is read here may be damaged, or not be what it seems: each error is a ValueError that names the file.
"""

import json
import os
import re
from collections import Counter

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cli import check, one_line, read_json
from clips.changes import compared, hash_of, made_from
from clips.decode import Bad
from clips.lists import Items, is_text
from clips.samples import SOURCES, Sample, Spec

LINE = re.compile(rb'\{"shard": "[\w+-]+\.safetensors", "source": "(video|label|caption)", "item": (\d{1,15}), '
                  rb'(?:"made": "([0-9a-f]{16})([0-9a-f]{16})", )?[^\n]*\n')
# what is known of an item without its lines; a last one, of no source, says where they end
INDEX = np.dtype([("source", np.int8), ("item", np.int64), ("start", np.int64), ("made", np.uint64, 2)])
FIELDS = {"shard": str, "path": str, "caption": str, "fps": int, "k": int, "row": int, "skipped": list}  # of a sample


def index_of(lines) -> np.ndarray:
    """The index of some lines, of bytes or mapped from a file. Raises ValueError where they are none.

    Folders of earlier versions do not say what their items were made from: 0.
    """

    def items():
        end, last = 0, None
        for line in LINE.finditer(lines):
            if line.start() != end:
                break
            if line.group(1, 2) != last:
                last, made = line.group(1, 2), (int(line[3] or b"0", 16), int(line[4] or b"0", 16))
                yield SOURCES.index(line[1].decode()), int(line[2]), end, made
            end = line.end()
        if end != len(lines):
            raise ValueError(f"byte {end} begins no line of an index")
        yield -1, -1, end, (0, 0)

    return np.fromiter(items(), INDEX)


def lines_of(shard: str) -> bytes:
    """The lines of the index that a shard holds. Raises ValueError where it is not there, or not whole."""
    try:
        with safe_open(shard, framework="np") as file:
            return file.get_tensor("lines").tobytes()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{shard} is damaged: {one_line(error)}; the same command encodes it again") from error


class EncodedClips:
    """The samples of such a folder, read one by one. Of a million items nothing is in memory but what is asked for.

    text  whether to read their contexts too, where there are any
    """

    def __init__(self, folder: str, text=True):
        settings = read_settings(folder)
        self.folder, self.text, self.vae = folder, text and settings["text"], settings["vae"]
        self.spec, self.lists = settings["spec"], settings["lists"]
        self.tower = settings.get("tower") if self.text else None  # folders of earlier versions do not say
        self.index_lines, self.index = self.read_index()
        owners, self.rows = self.index["source"], {}
        for n, source in enumerate(SOURCES):
            first, count = int(np.argmax(owners == n)), int(np.count_nonzero(owners == n))
            self.rows[source] = range(first, first + count)
            if not np.array_equal(self.index["item"][first : first + count], np.arange(count)):
                raise self.damaged("index.jsonl")
        self.empty_context = None
        if self.text:
            self.empty_context = self.tensor("empty.safetensors", "context", 0, 2)

    def __reduce__(self):
        return EncodedClips, (self.folder, self.text)  # a worker opens it for itself

    def read_index(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of index.jsonl and what lies in index.npy, both mapped."""
        lines, index = (os.path.join(self.folder, name) for name in ("index.jsonl", "index.npy"))
        try:
            lines = np.memmap(lines, np.uint8, "r")
            index = np.lib.format.open_memmap(index, mode="r") if os.path.exists(index) else index_of(lines)
        except (OSError, ValueError, EOFError, OverflowError) as error:
            raise self.damaged("index.jsonl", one_line(error)) from error
        if index.dtype == INDEX and index.ndim == 1 and len(index):
            starts = index["start"]
            if starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] == len(lines):
                return lines, index
        raise self.damaged("index.jsonl", "index.npy is not about it")

    def damaged(self, name: str, why="it does not hold what it should") -> ValueError:
        return ValueError(f"{os.path.join(self.folder, name)} is damaged: {why}; remove the folder and encode again")

    def tensor(self, shard: str, name: str, row: int, dims: int) -> torch.Tensor:
        """A row of a tensor, itself of some dimensions."""
        path = os.path.join(self.folder, shard)
        if not os.path.isfile(path):
            raise self.damaged(shard, "it is not there, or was encoded again since this run began")
        try:
            with safe_open(path, framework="pt") as file:  # mapped: one small read
                rows = file.get_slice(name)
                shape = rows.get_shape()
                if rows.get_dtype() in ("F16", "F32") and len(shape) == dims + 1 and row < shape[0]:
                    return rows[row]
        except (OSError, SafetensorError) as error:
            raise self.damaged(shard, one_line(error)) from error
        raise self.damaged(shard)

    def count(self, source: str) -> int:
        return len(self.rows[source])

    def lines(self, source: str, i: int) -> list[dict]:
        """The lines of the index about an item."""
        first, last = self.index["start"][self.rows[source][i] :][:2]
        try:
            lines = [json.loads(line) for line in self.index_lines[first:last].tobytes().splitlines()]
        except (ValueError, RecursionError) as error:
            raise self.damaged("index.jsonl", f"{source} {i}: {one_line(error)}") from error
        if not all(is_line(line) and (line["source"], line.get("item")) == (source, i) for line in lines):
            raise self.damaged("index.jsonl", f"{source} {i} is not what it should be")
        return lines

    def name(self, source: str, i: int) -> str:
        """The name of an item in messages, where its list lies now."""
        folder = self.lists[source]
        folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
        return os.path.join(folder, self.lines(source, i)[0]["path"])

    def sample(self, source: str, i: int, u: float, v: float, fps_values=()) -> Sample:
        """The same sample as that of LiveClips: an item's lines stand in the order of its FPS values, then of k."""
        lines = self.lines(source, i)
        if source == "video" and fps_values:
            lines = [line for line in lines if line["fps"] in (None, *fps_values)] or [{"bad": "too short"}]
        repeats = min(len(lines), self.spec.repeats(source))  # an item that cannot be used has one line
        return self.sample_of(lines[int(u * (len(lines) // repeats)) * repeats + int(v * repeats)])

    def sample_of(self, line: dict) -> Sample:
        """The sample of a line of the index. Raises Bad where it says that there is none."""
        if "bad" in line:
            raise Bad(line["bad"])
        moments = self.tensor(line["shard"], "moments", line["row"], 4)
        (T, channels, h, w), spec = moments.shape, self.spec
        wanted = 1 if line["source"] == "caption" else spec.frames
        if T != wanted or channels % 2 or h * spec.width != w * spec.height:
            raise self.damaged(line["shard"], f"its moments are {tuple(moments.shape)}")
        row = line.get("context", line["row"])  # earlier versions stored a caption's context with each sample
        context = self.tensor(line["shard"], "context", row, 2) if self.text else None
        if self.text and context.shape != self.empty_context.shape:
            raise self.damaged(line["shard"], f"its contexts are {tuple(context.shape)}")
        return Sample(moments, line["caption"], line["fps"], line["k"], tuple(map(tuple, line["skipped"])), context)

    def made(self, source: str) -> np.ndarray | None:
        """What the items were made from (N, 2), see clips/changes.py; None in folders of earlier versions."""
        made = self.index["made"][self.rows[source].start : self.rows[source].stop]
        return made if made[:, 0].all() else None

    @property
    def data(self) -> str | None:
        """A hash of what all items were made from; None in folders of earlier versions."""
        made = [self.made(source) for source in SOURCES if self.count(source)]
        return None if any(part is None for part in made) else hash_of(*made)

    def changes(self, lists: dict[str, str]) -> Counter | None:
        """How many items of lists, source -> list, changed since they were encoded, see clips/changes.py."""
        counts = Counter()
        for source, path in lists.items():
            then = self.made(source)
            if then is None:
                return None
            counts.update(compared(then, made_from(Items(source, path, self.spec.captions))))
        return counts


def is_line(line) -> bool:
    """Whether a line of the index has what it needs, and names no file elsewhere."""
    if not isinstance(line, dict) or line.get("source") not in SOURCES or not isinstance(line.get("path"), str):
        return False
    if "bad" in line:
        return isinstance(line["bad"], str)
    rows = line.get("row"), line.get("context", 0)
    return (all(type(line.get(name)) is kind for name, kind in FIELDS.items())
            and all(type(row) is int and row >= 0 for row in rows)
            and is_text(line["caption"]) and re.fullmatch(r"[\w+-]+\.safetensors", line["shard"]) is not None
            and all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in line["skipped"]))


def read_settings(folder: str) -> dict:
    """The spec.json of a folder, with its spec as a Spec."""
    try:
        settings = read_json(os.path.join(folder, "spec.json"))
        spec = as_spec(settings["spec"])
        check(spec)
        kinds = {"text": bool, "vae": str, "lists": dict, "dtype": str}
        if not (all(type(settings.get(name)) is kind for name, kind in kinds.items())
                and set(settings["lists"]) <= set(SOURCES) and set(map(type, settings["lists"].values())) <= {str}
                and set(map(type, spec.fps_values)) == {int} and settings["dtype"] in ("torch.float16", "torch.float32")
                and min(spec.frames, spec.width, spec.height, spec.starts, spec.draws, *spec.fps_values) > 0):
            raise ValueError("spec.json is damaged")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a folder of encoded clips: {one_line(error)}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not a folder of encoded clips: spec.json is damaged") from error
    return settings | {"spec": spec}


def as_spec(fields: dict) -> Spec:
    """A Spec from what JSON made of its fields."""
    return Spec(**fields | {"fps_values": tuple(fields["fps_values"])})


def fingerprint(network) -> str:
    """A text that tells one VAE or text tower from another."""
    return f"{sum(p.detach().cpu().double().abs().sum().item() for p in network.parameters()):.6g}"
