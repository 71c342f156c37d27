"""Folders of samples encoded ahead."""

import json
import os

import numpy as np
import torch
from safetensors import safe_open

from clips.decode import Bad
from clips.lists import Records
from clips.samples import SOURCES, Sample, Spec

# ---------------------------------------------------------------------------------------------------------------------
# Samples encoded ahead


def read_settings(folder: str) -> dict:
    """What `encode` noted of a folder."""
    try:
        with open(os.path.join(folder, "spec.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a folder of encoded clips: {error}") from error


class EncodedClips:
    """A folder written by `encode`, read sample by sample.

    text  whether to give the context too, where it was encoded
    """

    def __init__(self, folder: str, text=True):
        settings = read_settings(folder)
        self.records = Records(os.path.join(folder, "index.jsonl"))
        self.folder, self.text, self.vae = folder, text and settings["text"], settings["vae"]
        self.tower = settings.get("tower") if self.text else None  # folders of earlier versions do not say
        self.spec = Spec(**settings["spec"] | {"fps_values": tuple(settings["spec"]["fps_values"])})
        owners = [(SOURCES.index(line["source"]), line["item"]) for line in map(json.loads, self.records)]
        owners = np.array(owners).reshape(-1, 2)
        self.rows = {source: np.flatnonzero(owners[:, 0] == s) for s, source in enumerate(SOURCES)}
        self.owners = {source: owners[rows, 1] for source, rows in self.rows.items()}  # rising
        self.empty_context = self.tensor("empty.safetensors", "context", 0) if self.text else None

    def tensor(self, shard: str, name: str, row: int) -> torch.Tensor:
        with safe_open(os.path.join(self.folder, shard), framework="pt") as file:  # mapped: one small read
            return file.get_slice(name)[row]

    def count(self, source: str) -> int:
        return int(self.owners[source][-1]) + 1 if len(self.owners[source]) else 0

    def lines(self, source: str, i: int) -> list[dict]:
        """What the index has of an item."""
        first, last = np.searchsorted(self.owners[source], [i, i + 1])
        return [json.loads(self.records[n]) for n in self.rows[source][first:last]]

    def name(self, source: str, i: int) -> str:
        return self.lines(source, i)[0]["path"]

    def sample(self, source: str, i: int, u: float, v: float) -> Sample:
        """As LiveClips.sample: FPS values and k of an item stand in the order in which they are offered live."""
        lines = self.lines(source, i)
        repeats = min(len(lines), self.spec.repeats(source))  # of an item that offers nothing there is one line
        line = lines[int(u * (len(lines) // repeats)) * repeats + int(v * repeats)]
        if "bad" in line:
            raise Bad(line["bad"])
        context = self.tensor(line["shard"], "context", line["row"]) if self.text else None
        return Sample(self.tensor(line["shard"], "moments", line["row"]), line["caption"], line["fps"], line["k"],
                      tuple(map(tuple, line["skipped"])), context)


def fingerprint(network) -> str:
    """Of an autoencoder or a text tower, to tell one from another."""
    return f"{sum(p.double().abs().sum().item() for p in network.parameters()):.6g}"


def read_text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def whole_lines(path: str) -> list[str]:
    """Of a file of JSON lines that an interruption may have torn, or that is not there yet."""
    lines = read_text(path).splitlines(keepends=True) if os.path.exists(path) else []
    return [line for line in lines if line.endswith("\n")]
