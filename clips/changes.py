"""What has changed in a list since its items were encoded: its captions, its files, its length.

Of each item two hashes are kept, of 64 bits: one of its captions; one of where its files lie, their sizes and their
times of modification. No file is opened but texts beside clips. Samples depend on the number of their item, so that one
that has moved in its list has changed.
"""

import os
from collections import Counter
from hashlib import blake2b
from itertools import chain

import numpy as np

from clips.decode import Bad, Member
from clips.jobs import in_threads
from clips.lists import Items, images_of


def made_from(items: Items) -> np.ndarray:
    """The two hashes of every item of a list (N, 2); the second is 0 where its file is not there."""

    def some(first: int) -> list[int]:
        return [number for i in range(first, min(first + 1000, len(items))) for number in hashes(items, i)]

    with in_threads(some, range(0, len(items), 1000), threads=16) as found:  # a network drive answers many at a time
        return np.fromiter(chain.from_iterable(found), np.uint64).reshape(-1, 2)


def hashes(items: Items, i: int) -> tuple[int, int]:
    """The hash of an item's captions, and the one of its files."""
    try:
        item = items[i]
    except Bad as bad:
        return hash64(str(bad)), 0
    try:
        if items.source == "label":
            files = [(os.path.basename(path), size_and_time(path)) for path in images_of(item.path)]
        else:
            files = [("", size_and_time(item.path))]
    except Bad:
        files = [("", None)]
    place = item.path.removeprefix(os.path.join(items.folder, ""))  # list and clips may move together
    return hash64(item.captions), 0 if files == [("", None)] else hash64((place, files))


def size_and_time(path: str) -> tuple[int, int] | None:
    """Size and time of a file; of one in a tar, the tar's time."""
    if isinstance(path, Member):
        return path.size, path.time
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except (OSError, ValueError):  # ValueError: no file can have such a name
        return None


def hash64(what) -> int:
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=8).digest(), "big")


def hash_of(*arrays: np.ndarray) -> str:
    """One hash of several arrays, as text."""
    found = blake2b(digest_size=16)
    for array in arrays:
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def hexes(made: tuple[int, int]) -> str:
    """The two hashes of an item as 16 hexadecimal digits each."""
    return "{:016x}{:016x}".format(*made)


def made(items: Items, i: int) -> str:
    """The two hashes of an item as text. A line of notes keeps it, and counts only while the item has the same."""
    return hexes(hashes(items, i))


def compared(then: np.ndarray, now: np.ndarray) -> Counter:
    """How many items of a list changed, by what they were made from when they were encoded, and by what is there now.

    Those whose files are gone (`absent`) have not changed, but cannot be encoded again.
    """
    both = min(len(then), len(now))
    captions, files = (then[:both] != now[:both]).T
    there = now[:both, 1] != 0
    counts = {"items": len(now), "captions": captions.sum(), "files": (files & there).sum(),
              "changed": (captions | files & there).sum(), "absent": (files & ~there & ~captions).sum(),
              "new": len(now) - both, "gone": len(then) - both}
    return Counter({name: int(count) for name, count in counts.items()})


def is_stale(changes: Counter | None) -> bool:
    """Whether encoded clips are others than those of today; None, where nobody knows, counts as no."""
    return bool(changes and (changes["changed"] or changes["new"] or changes["gone"]))


def described(changes: Counter | None) -> str:
    """What to tell of changes; None: where nobody knows."""
    if changes is None:
        return "it does not say what it was made from"
    c, told = changes, "nothing has changed since it was encoded"
    if is_stale(c):
        told = (f"{c['changed']} of {c['items']} items changed since they were encoded ({c['captions']} captions, "
                f"{c['files']} files), {c['new']} are new, {c['gone']} are gone")
    return told + (f"; the files of {c['absent']} are not there any more" if c["absent"] else "")
