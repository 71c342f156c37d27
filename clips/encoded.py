"""Folders of samples encoded ahead, as `python -m clips.encode` writes them.

    spec.json             what the samples are made of, and which VAE and text tower encoded them
    index.jsonl           a line for each sample, or for an item that cannot be used; those of an item follow each other
    video-000000.safetensors ...   moments (N, T, 2C, h, w), and with text contexts (N, L, D), of some items
    empty.safetensors     the context of the empty caption

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
from clips.changes import compared, from_hexes, hash_of, made_from
from clips.decode import Bad
from clips.lists import Items, Records, is_text
from clips.samples import SOURCES, Sample, Spec

LINE_START = re.compile(rb'^\{"shard": "([\w+-]+\.safetensors)", "source": "(video|label|caption)", '
                        rb'"item": (\d{1,15}), (?:"made": "([0-9a-f]{32})", )?', re.MULTILINE)
FIELDS = {"shard": str, "path": str, "caption": str, "fps": int, "k": int, "row": int, "skipped": list}  # of a sample


class EncodedClips:
    """The samples of such a folder, read one by one.

    text  whether to read their contexts too, where there are any
    """

    def __init__(self, folder: str, text=True):
        settings = read_settings(folder)
        self.records, self.folder = Records(os.path.join(folder, "index.jsonl")), folder
        self.text, self.vae, self.lists = text and settings["text"], settings["vae"], settings["lists"]
        self.tower = settings.get("tower") if self.text else None  # folders of earlier versions do not say
        self.spec = settings["spec"]
        starts = LINE_START.finditer(self.records.text)  # of millions of lines, which json would read for a minute
        owners = np.fromiter(((SOURCES.index(start[2].decode()), int(start[3])) for start in starts),
                             [("source", np.int8), ("item", np.int64)])
        self.rows = {source: np.flatnonzero(owners["source"] == n) for n, source in enumerate(SOURCES)}
        self.owners = {source: owners["item"][rows] for source, rows in self.rows.items()}  # in rising order
        steps = [np.diff(items, prepend=-1) for items in self.owners.values()]
        if len(owners) != len(self.records) or not all(((0 <= step) & (step <= 1)).all() for step in steps):
            raise self.damaged("index.jsonl")
        self.empty_context = None
        if self.text:
            self.empty_context = self.tensor("empty.safetensors", "context", 0, 2)

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
        return int(self.owners[source][-1]) + 1 if len(self.owners[source]) else 0

    def lines(self, source: str, i: int) -> list[dict]:
        """The lines of the index about an item."""
        first, last = np.searchsorted(self.owners[source], [i, i + 1])
        try:
            lines = [json.loads(self.records[n]) for n in self.rows[source][first:last]]
        except (ValueError, RecursionError) as error:
            raise self.damaged("index.jsonl", f"{source} {i}: {one_line(error)}") from error
        if not all(map(is_line, lines)):
            raise self.damaged("index.jsonl", f"{source} {i} is not what it should be")
        return lines

    def name(self, source: str, i: int) -> str:
        return self.lines(source, i)[0]["path"]

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
        context = self.tensor(line["shard"], "context", line["row"], 2) if self.text else None
        if self.text and context.shape != self.empty_context.shape:
            raise self.damaged(line["shard"], f"its contexts are {tuple(context.shape)}")
        return Sample(moments, line["caption"], line["fps"], line["k"], tuple(map(tuple, line["skipped"])), context)

    def made(self, source: str) -> np.ndarray | None:
        """What the items were made from (N, 2), see clips/changes.py; None in folders of earlier versions."""
        firsts = self.rows[source][np.diff(self.owners[source], prepend=-1) > 0]
        starts = [LINE_START.match(self.records[n][:200].encode()) for n in firsts]
        if not all(start and start[4] for start in starts):
            return None
        return from_hexes(b"".join(start[4] for start in starts).decode())

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
    return (all(type(line.get(name)) is kind for name, kind in FIELDS.items()) and line["row"] >= 0
            and is_text(line["caption"]) and re.fullmatch(r"[\w+-]+\.safetensors", line["shard"]) is not None
            and all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in line["skipped"]))


def read_settings(folder: str) -> dict:
    """The spec.json of a folder, with its spec as a Spec."""
    try:
        settings = read_json(os.path.join(folder, "spec.json"))
        spec = Spec(**settings["spec"] | {"fps_values": tuple(settings["spec"]["fps_values"])})
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


def fingerprint(network) -> str:
    """A text that tells one VAE or text tower from another."""
    return f"{sum(p.double().abs().sum().item() for p in network.parameters()):.6g}"
