"""Check a list: count what cannot be used by reason, and name each file in LIST.check.jsonl; of tars, each member.

    python -m clips.check LIST
    python -m clips.check FOLDER --source label
    python -m clips.check "shards/{00000..00999}.tar" --source caption
    torchrun --nproc_per_node=8 -m clips.check LIST          # each process takes the next items

Interrupted, the same command goes on, by what stands in LIST.checked-*.jsonl.
"""

import glob
import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain

from tqdm import tqdm

from cli import beside, check_writable, option, parse, run
from clips.changes import made
from clips.decode import Bad, Member, frames_at, open_file, opened
from clips.jobs import appending, in_threads, read_notes, taken
from clips.lists import Items, images_of
from clips.pictures import View, fit_image
from clips.samples import SOURCES, Spec, offered_fps
from training.ranks import Ranks, shared


def check(source: str, path: str, spec: Spec, ranks=None):
    """Print how many files of a list cannot be used and why, and write a line about each of them beside the list.

    ranks  every one of them takes the next items that are left; what an interrupted call has found is not sought again
    """
    ranks, items = ranks or Ranks(timeout=600), Items(source, path, spec.captions)
    out = os.path.join(items.folder, os.path.basename(os.path.abspath(path)) + ".check.jsonl")
    notes, by = out.replace(".check.jsonl", ".checked"), f"{source}, {asdict(spec)}"
    mine = f"{notes}-{ranks.rank}.jsonl"
    for name in (mine,) if ranks.rank else (out, mine):
        check_writable(name)

    def counts(line: dict) -> bool:
        i = line["item"]
        return line["by"] == by and i < len(items) and line["made"] == made(items, i)

    known = read_notes(notes, counts)
    ranks.from_rank_0("begun", lambda: None)

    def look(i: int) -> dict:
        return {"item": i, "by": by, "made": made(items, i), "found": check_item(items, i, spec)}

    left = taken(ranks, "items", len(items), known)
    with appending(mine) as file, in_threads(look, left) as lines:
        for line in tqdm(lines, "check", len(items) - len(known), unit="item", disable=ranks.rank > 0):
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
    ranks.together("checked")
    if ranks.rank == 0:
        known = read_notes(notes, counts)  # without any that has changed meanwhile
        report(items, out, [(known.get(i) or look(i))["found"] for i in range(len(items))])
        for name in glob.glob(glob.escape(notes) + "-*.jsonl"):
            os.remove(name)


def report(items: Items, out: str, found: list):
    """Write and print what check_item said of all items, and which files there are twice."""
    reasons, seen, usable = Counter(), {}, 0
    faults = [(None, [(*fault, None)]) for fault in (items.tars.faults if items.tars else ())]  # of no item
    with beside(out) as part, open(part, "w", encoding="utf-8") as file:
        for i, files in chain(faults, enumerate(found)):
            for name, reason, digest in files:
                kind = reason
                if reason is None and seen.setdefault(digest, name) == name:  # one file may have several captions
                    usable += 1
                    continue
                if reason is None:
                    kind, reason = "duplicated", f"the same as {seen[digest]}"
                reasons[kind] += 1
                file.write(json.dumps({"item": i, "path": name, "reason": reason}) + "\n")
    for reason, n in reasons.most_common():
        print(f"{n:8d}  {reason}")
    print(f"{len(items)} items; what cannot be used is in {out}")
    print(f"{usable} of {usable + reasons.total()} usable")


def check_item(items: Items, i: int, spec: Spec) -> list[tuple[str, str | None, str | None]]:
    """(name, reason why it cannot be used, digest where it can be) of each file of an item."""
    try:
        path = items[i].path
        if items.source != "label":
            return [check_file(items.source, path, spec)]
        paths = images_of(path)
        if not paths:
            raise Bad("no image in it")
    except Bad as bad:
        return [(items.name(i), str(bad), None)]
    return [check_file("label", path, spec) for path in paths]


def check_file(source: str, path: str, spec: Spec) -> tuple[str, str | None, str | None]:
    try:
        if source == "video":
            with opened(path) as video:
                offered_fps(source, video, spec)
                frames_at(video, [0])
                frames_at(video, [video.duration - 1 / video.rate])
        else:
            fit_image(path, spec.width, spec.height, View())
        return path, None, digest(path)
    except Bad as bad:
        return path, str(bad), None


def digest(path: str, part=1 << 16) -> str:
    """A hash of a file's length, beginning, middle and end: enough to find one that was saved twice."""
    size = path.size if isinstance(path, Member) else os.path.getsize(path)
    with open_file(path) as file:
        found = hashlib.blake2b(str(size).encode(), digest_size=16)
        for at in (0, max(0, size // 2), max(0, size - part)):
            file.seek(at)
            found.update(file.read(part))
    return found.hexdigest()


@dataclass
class Options:
    list: str = option(None, "the list, or folder, that training will read", positional=True)
    source: str = option("video", "what is in it", choices=SOURCES)
    frames: int = option(16, "frames of a clip: a video that has fewer is too short", low=1)
    captions: str = option("", "from_names: without any, the name of the file; else the field that says them")


@shared(awaited="begun")
def main(ranks: Ranks):
    options = parse(Options, __doc__)
    check(options.source, options.list, Spec(options.frames, 64, 64, captions=options.captions), ranks)


if __name__ == "__main__":
    run(main)
