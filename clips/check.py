"""Report what of a list cannot be used, and why.

    python -m clips.check LIST
"""

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from cli import check_writable, option, parse, run
from clips.decode import Bad, frames_at, opened
from clips.lists import Items, image_names
from clips.pictures import View, fit_image
from clips.samples import SOURCES, Spec, offered_fps

# ---------------------------------------------------------------------------------------------------------------------
# Check a list


def check(source: str, path: str, spec: Spec):
    """Print what of a list cannot be used, counted by reason; name every case in a file beside the list."""
    items, reasons, seen = Items(source, path), Counter(), {}
    out = os.path.join(items.folder, os.path.basename(path.rstrip("/")) + ".check.jsonl")
    check_writable(out)
    with open(out + ".part", "w", encoding="utf-8") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(items), 1024):  # map() takes all there is at once
            chosen = range(first, min(first + 1024, len(items)))
            bar = tqdm(pool.map(lambda i: check_item(items, i, spec), chosen), total=len(chosen), desc="check")
            for i, found in zip(chosen, bar):
                for name, reason, digest in found:
                    kind = reason
                    if reason is None and digest in seen:
                        kind, reason = "duplicated", f"the same as {seen[digest]}"
                    elif reason is None:
                        seen[digest] = name
                        continue
                    reasons[kind] += 1
                    file.write(json.dumps({"item": i, "path": name, "reason": reason}) + "\n")
    os.replace(out + ".part", out)
    print(f"{len(items)} items, {len(seen)} files that can be used, {reasons.total()} that cannot:")
    for reason, n in reasons.most_common():
        print(f"{n:8d}  {reason}")
    print(f"each of them: {out}")


def check_item(items: Items, i: int, spec: Spec) -> list[tuple[str, str | None, bytes | None]]:
    """(name, reason or None, what its bytes hash to) of the files of an item."""
    name = items.name(i)
    try:
        path, names = items[i].path, None
        if items.source == "label":
            names = [os.path.join(path, name) for name in image_names(path)]
            if not names:
                raise Bad("no image in it")
    except Bad as bad:
        return [(name, str(bad), None)]
    return [check_file(items.source, path, spec) for path in names or [path]]


def check_file(source: str, path: str, spec: Spec):
    try:
        if source == "video":
            with opened(path) as video:
                offered_fps(source, video, spec)
                frames_at(video, [0])
                frames_at(video, [video.duration - 1 / video.rate])
        else:
            fit_image(path, spec.width, spec.height, View())
    except Bad as bad:
        return path, str(bad), None
    return path, None, digest(path)


def digest(path: str, part=1 << 16) -> bytes:
    """Of the length of a file and its beginning, middle and end: enough to find one that was saved twice."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        found = hashlib.blake2b(str(size).encode(), digest_size=16)
        for at in (0, max(0, size // 2), max(0, size - part)):
            file.seek(at)
            found.update(file.read(part))
    return found.digest()


@dataclass
class Options:
    list: str = option(None, "what training will read", positional=True)
    source: str = option("video", "what it lists", choices=SOURCES)
    frames: int = option(16, "of a clip: shorter videos are too short", low=1)


def main():
    options = parse(Options, __doc__)
    check(options.source, options.list, Spec(options.frames, 64, 64))


if __name__ == "__main__":
    run(main)
