"""Folders of samples encoded ahead, as `python -m clips.encode` writes them.

    spec.json             what the samples are made of, and which VAE and text tower encoded them
    index.jsonl           a line for each sample, or for an item that cannot be used; those of an item follow each other
    video-000000.safetensors ...   moments (N, T, 2C, h, w), and with text contexts (N, L, D), of some items
    empty.safetensors     the context of the empty caption
"""

import json
import os
import re

import numpy as np
import torch
from safetensors import safe_open

from clips.decode import Bad
from clips.lists import Records
from clips.samples import SOURCES, Sample, Spec

LINE_START = re.compile(rb'^\{"shard": "[^"]+", "source": "(video|label|caption)", "item": (\d+), ', re.MULTILINE)


class EncodedClips:
    """The samples of such a folder, read one by one.

    text  whether to read their contexts too, where there are any
    """

    def __init__(self, folder: str, text=True):
        settings = read_settings(folder)
        self.records = Records(os.path.join(folder, "index.jsonl"))
        self.folder, self.text, self.vae = folder, text and settings["text"], settings["vae"]
        self.tower = settings.get("tower") if self.text else None  # folders of earlier versions do not say
        self.spec = Spec(**settings["spec"] | {"fps_values": tuple(settings["spec"]["fps_values"])})
        starts = LINE_START.finditer(self.records.text)  # of millions of lines, which json would read for a minute
        owners = np.fromiter(((SOURCES.index(start[1].decode()), int(start[2])) for start in starts),
                             [("source", np.int8), ("item", np.int64)])
        if len(owners) != len(self.records):
            raise ValueError(f"{folder}/index.jsonl is damaged: encode again")
        self.rows = {source: np.flatnonzero(owners["source"] == n) for n, source in enumerate(SOURCES)}
        self.owners = {source: owners["item"][rows] for source, rows in self.rows.items()}  # in rising order
        self.empty_context = self.tensor("empty.safetensors", "context", 0) if self.text else None

    def tensor(self, shard: str, name: str, row: int) -> torch.Tensor:
        with safe_open(os.path.join(self.folder, shard), framework="pt") as file:  # mapped: one small read
            return file.get_slice(name)[row]

    def count(self, source: str) -> int:
        return int(self.owners[source][-1]) + 1 if len(self.owners[source]) else 0

    def lines(self, source: str, i: int) -> list[dict]:
        """The lines of the index about an item."""
        first, last = np.searchsorted(self.owners[source], [i, i + 1])
        return [json.loads(self.records[n]) for n in self.rows[source][first:last]]

    def name(self, source: str, i: int) -> str:
        return self.lines(source, i)[0]["path"]

    def sample(self, source: str, i: int, u: float, v: float) -> Sample:
        """The same sample as that of LiveClips: an item's lines stand in the order of its FPS values, then of k."""
        lines = self.lines(source, i)
        repeats = min(len(lines), self.spec.repeats(source))  # an item that cannot be used has one line
        line = lines[int(u * (len(lines) // repeats)) * repeats + int(v * repeats)]
        if "bad" in line:
            raise Bad(line["bad"])
        context = self.tensor(line["shard"], "context", line["row"]) if self.text else None
        return Sample(self.tensor(line["shard"], "moments", line["row"]), line["caption"], line["fps"], line["k"],
                      tuple(map(tuple, line["skipped"])), context)


def read_settings(folder: str) -> dict:
    """The spec.json of a folder."""
    try:
        with open(os.path.join(folder, "spec.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a folder of encoded clips: {error}") from error


def fingerprint(network) -> str:
    """A text that tells one VAE or text tower from another."""
    return f"{sum(p.double().abs().sum().item() for p in network.parameters()):.6g}"
