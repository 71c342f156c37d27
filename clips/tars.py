"""WebDataset tars as video2dataset and img2dataset write them: indexed once, then read at random, never unpacked.

    shards/{00000..00999}.tar      or one .tar, or a folder that holds some

A tar is read as the folder that unpacking it would make: 000031.mp4 or 000031.jpg, with 000031.txt or 000031.json, or
for labels 000031.cls, beside it. Its index lies beside it: in the first line what it knows of the tar, then a line for
each file that counts, all of the same length. An index is made by whoever comes first, and is used while size and time
of the tar stay what they were.
"""

import bisect
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

from tqdm import tqdm

from cli import ROOT, warn
from clips.decode import IMAGE_ENDINGS, VIDEO_ENDINGS, Bad, Member
from clips.jobs import in_threads, own_threads

ENDINGS = {"video": VIDEO_ENDINGS, "caption": IMAGE_ENDINGS, "label": IMAGE_ENDINGS}
# names of hidden files, of locks and of backups, and of what Macs, Windows and network drives keep beside pictures
BYSTANDER = re.compile(r"\..*|~\$.*|.*~|__MACOSX|__pycache__|@eaDir|#recycle|\$RECYCLE\.BIN|lost\+found|Thumbs\.db|"
                       r"desktop\.ini|System Volume Information", re.IGNORECASE | re.DOTALL)
PATTERN = re.compile(r"([^{}]*)\{(\d{1,7})\.\.(\d{1,7})\}([^{}/]*\.tar)", re.DOTALL)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
TAR = re.compile(r".*\.(tar(\.(gz|bz2|xz|zst))?|tgz)", re.IGNORECASE | re.DOTALL)
NAME_LIMIT, HEADER_LIMIT, LABEL_LIMIT = 1000, 1 << 20, 1000  # characters of a name; bytes of a header and of a label
HEAVY, AT_ONCE = 1 << 28, 100  # bytes of tars that are indexed on all cores, and how many of them by one process
SHARD = 1 << 30  # bytes after which a new tar is begun
CACHE = "~/.cache/etc-video/tars"


def is_data(name: str, endings=("",)) -> bool:
    """Whether a file or folder is one of a user's own, by its name."""
    return name.lower().endswith(endings) and not BYSTANDER.fullmatch(name)


def named_tars(path: str) -> list[str]:
    """The tars that a path names, as the one or by a pattern, be they there or not; none where it is anything else."""
    match = None if os.path.exists(path) else PATTERN.fullmatch(path)
    if not match:
        return [path] if TAR.fullmatch(path) and not os.path.isdir(path) else []
    before, first, last, behind = match.groups()
    return [f"{before}{n:0{len(first)}d}{behind}" for n in range(int(first), int(last) + 1)]


def tars_in(folder: str) -> list[str]:
    """The tars that lie in a folder."""
    with os.scandir(folder or ".") as entries:
        names = sorted(entry.name for entry in entries if TAR.fullmatch(entry.name) and is_data(entry.name))
    return [os.path.join(folder, name) for name in names]


def shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Many tars as one list


class Tars:
    """What counts in some tars, for a source: `tars[i]` is a Member, the file of item i.

    Of each tar there is in memory what the first line of its index says; the rest stays on disk.
    """

    def __init__(self, source: str, tars: list[str]):
        missing = [tar for tar in tars if not os.path.isfile(tar)]
        if len(missing) == len(tars):
            raise OSError(f"{shortened(missing)}: not there, or no file")
        if missing:
            warn(f"{len(missing)} of {len(tars)} tars are missing: {shortened(missing)}")
            tars = [tar for tar in tars if tar not in set(missing)]
        with in_threads(functools.partial(read_head, source), tars, threads=16) as found:  # as a network drive wants it
            heads = list(found)
        left = [tar for tar, head in zip(tars, heads) if head is None]
        if sum(map(os.path.getsize, left)) > HEAVY:
            index_beside(source, left)
        self.heads = [head or read_head(source, tar) or index_tar(source, tar) for tar, head in zip(tars, heads)]
        self.ends = list(accumulate(head.items for head in self.heads))
        self.faults = [tuple(fault) for head in self.heads for fault in head.faults]  # (name, reason)
        self.labels = {}  # label -> [(number of a tar, its first image in that tar, how many)]
        for n, head in enumerate(self.heads):
            for label, rows in head.labels.items():
                self.labels.setdefault(label, []).append((n, *rows))
        away = sorted({os.path.dirname(head.tar) for head in self.heads if not head.index.startswith(head.tar)})
        if away:
            warn(f"{shortened(away)} cannot be written: the index of its tars is in {CACHE}")
        if self.faults:
            warn(f"{len(self.faults)} members of tars cannot be used, clips.check names them: "
                 + shortened([f"{name}: {reason}" for name, reason in self.faults]))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i: int) -> Member:
        return self.read(*self.place(i), 1)[0][0]

    def place(self, i: int) -> tuple[int, int]:
        """(number of a tar, number in that tar) of an item."""
        n = bisect.bisect_right(self.ends, i)
        return n, i - (self.ends[n - 1] if n else 0)

    def line(self, i: int) -> int:
        """The line of an index in which an item stands, from 1 on."""
        return self.place(i)[1] + 2

    def read(self, n: int, first: int, count: int) -> list[tuple[Member, list]]:
        """(file, places of its members) of consecutive items of a tar. Raises Bad."""
        head = self.heads[n]
        try:
            with open(head.index, "rb", buffering=0) as file:
                file.seek(head.start + first * head.width)
                lines = [json.loads(line) for line in file.read(count * head.width).split(b"\n")[:count]]
            return [(Member.of(head.tar, name, at, size, head.time, beside), places)
                    for name, at, size, beside, places in lines]
        except (OSError, ValueError, TypeError) as error:
            raise Bad("the index of its tar cannot be read: start again") from error

    def images(self, label: str) -> list[Member]:
        """The images of a label, by their names in whichever tar."""
        found = (image for rows in self.labels[label] for image, _ in self.read(*rows))
        return sorted(found, key=lambda image: image[len(image.tar) :])

    def found(self) -> Counter:
        """Endings of all that lies in the tars."""
        return sum((Counter(head.endings) for head in self.heads), Counter())


# ---------------------------------------------------------------------------------------------------------------------
# The index of a tar


@dataclass(frozen=True)
class Head:
    """The first line of an index, and where that lies."""

    tar: str
    index: str
    start: int  # byte of the second line
    size: int  # bytes of the tar
    time: int  # of its last modification, in nanoseconds
    items: int
    width: int  # bytes of a line
    labels: dict  # label -> (number of its first image, how many)
    endings: dict  # ending -> how many
    faults: list  # [name, reason]


def index_places(source: str, tar: str) -> list[str]:
    """Where the index of a tar may lie: beside it, or where that cannot be written in a folder of the user's."""
    name = hashlib.sha256(os.path.abspath(tar).encode(errors="surrogateescape")).hexdigest()[:32]
    return [f"{tar}.{source}.index", os.path.join(os.path.expanduser(CACHE), f"{name}.{source}.index")]


def read_head(source: str, tar: str) -> Head | None:
    """What an index says of a tar. None where there is none, or the tar has changed since."""
    now = os.stat(tar)
    for index in index_places(source, tar):
        with suppress(OSError, ValueError, TypeError), open(index, "rb") as file:
            head = Head(tar, index, start=len(line := file.readline()), **json.loads(line))
            whole = os.fstat(file.fileno()).st_size == head.start + head.items * head.width
            if whole and (head.size, head.time) == (now.st_size, now.st_mtime_ns):
                return head
    return None


def index_beside(source: str, tars: list[str]):
    """Make the indexes of many tars by processes: threads would take turns. What fails here is left to be done."""
    cores = own_threads()
    size = min(AT_ONCE, -(-len(tars) // cores))
    parts = [list(map(os.path.abspath, tars[at : at + size])) for at in range(0, len(tars), size)]

    def work(part):
        words = [sys.executable, "-m", "clips.tars", source, *part]
        return subprocess.run(words, cwd=ROOT, stderr=subprocess.DEVNULL)

    with tqdm(total=len(tars), desc="index", unit="tar") as bar, in_threads(work, parts, cores) as done:
        for part, _ in zip(parts, done):
            bar.update(len(part))


def index_tar(source: str, tar: str) -> Head:
    """Make the index of a tar. Raises ValueError when it is compressed, and OSError."""
    now = os.stat(tar)
    items, endings, faults = members(source, tar)
    items.sort(key=lambda item: item[:2])
    labels = {}
    for n, (label, *_) in enumerate(items):
        if source == "label":
            labels[label] = (labels.get(label, (n, 0))[0], labels.get(label, (n, 0))[1] + 1)
    lines = [json.dumps(item[1:], separators=(",", ":")) for item in items]
    width = max(map(len, lines), default=0) + 1
    head = {"size": now.st_size, "time": now.st_mtime_ns, "items": len(lines), "width": width, "labels": labels,
            "endings": endings, "faults": faults}
    data = json.dumps(head) + "\n" + "".join(line.ljust(width - 1) + "\n" for line in lines)
    for index in index_places(source, tar):
        part = f"{index}.{uuid.uuid4().hex[:8]}.part"  # several processes may be at it
        try:
            os.makedirs(os.path.dirname(index) or ".", exist_ok=True)
            with open(part, "w", encoding="ascii", newline="") as file:
                file.write(data)
            os.replace(part, index)
            break
        except OSError as error:
            failed = error
        finally:
            with suppress(OSError):
                os.remove(part)
    else:
        raise OSError(f"{tar}: its index cannot be written: {failed.strerror}") from failed
    return Head(tar, index, data.index("\n") + 1, **head)


def members(source: str, tar: str) -> tuple[list, Counter, list]:
    """(items, endings, faults) of a tar. An item is [label, name, first byte, size, ending -> (first byte, size) of
    those beside it, [first byte, byte behind] of all of them with their headers]."""
    groups, items, endings, faults = {}, [], Counter(), []
    size = os.path.getsize(tar)
    for info, first, behind in headers(tar):
        if info is None:
            faults.append((f"{tar}, bytes {first} to {behind}", "a damaged header"))
            continue
        name = info.name.removeprefix("./")
        stem, ending = os.path.splitext(name)
        if info.isdir() or not all(is_data(part) for part in name.split("/")):
            continue
        endings[ending.lower()] += 1
        group = groups.setdefault(stem, {})
        why = unfit(info, name)
        if why or ending in group:
            faults.append((f"{tar}/{name}".encode(errors="replace").decode(),
                           why or "stands twice in its tar: the last one counts"))
        if not why:
            group[ending] = (info.offset_data, info.size, first, behind)
    with open(tar, "rb") as file:
        for stem, group in groups.items():
            beside = {ending.lower(): place[:2] for ending, place in group.items()}
            for ending in filter(lambda ending: ending.lower().endswith(ENDINGS[source]), group):
                try:
                    label = read_label(file, *beside.get(".cls", (0, 0))) if source == "label" else ""
                except Bad as bad:
                    faults.append((f"{tar}/{stem}{ending}", str(bad)))
                    continue
                texts = {name: place for name, place in beside.items() if name in (".txt", ".json")}
                items.append((label, stem + ending, *group[ending][:2], texts, joined(group.values(), size)))
    return items, endings, faults


def unfit(info: tarfile.TarInfo, name: str) -> str:
    """Why a member is no file that can be read where it lies; "" where it is."""
    if not info.isreg():
        return "a link or a device, no file"
    if info.issparse():
        return "stored with holes"
    if len(name) > NAME_LIMIT or re.search("[\ud800-\udfff]", name):
        return "its name is too long, or not text in UTF-8"
    return ""


def read_label(file, at: int, size: int) -> str:
    """The text of a .cls: a number, or a name. Raises Bad."""
    file.seek(at)
    try:
        text = " ".join(file.read(size).decode().split()) if 0 <= size <= LABEL_LIMIT else ""
    except ValueError as error:
        raise Bad("its label is not text in UTF-8") from error
    if not text or "\0" in text:
        raise Bad("no label in a .cls beside it")
    return text


def joined(places, size: int) -> list:
    """[first byte, byte behind] of members with their headers, neighbours as one; without any that the tar cuts off."""
    ranges = []
    for at, length, first, behind in sorted(places, key=lambda place: place[2]):
        if at + length <= size:
            ranges += [] if ranges and ranges[-1][1] == first else [[first, behind]]
            ranges[-1][1] = behind
    return ranges


class Headers(io.BufferedReader):
    """A tar to read headers from: a damaged one may say that it is a gigabyte long."""

    def read(self, size=-1):
        if not 0 <= size <= HEADER_LIMIT:
            raise tarfile.ReadError("absurd size")
        return super().read(size)


def headers(tar: str):
    """Yield (TarInfo, first byte of its headers, byte behind its data) of all members, and (None, first, behind) of a
    part in which there should be a header, and is none up to the next or the end. Raises ValueError, and OSError."""
    size, at, lost = os.path.getsize(tar), 0, None
    with Headers(io.FileIO(tar)) as file:
        start = file.peek(8)[:8]
        kind = next((name for mark, name in COMPRESSED.items() if start.startswith(mark)), None)
        if kind:
            raise ValueError(f"{tar} is compressed with {kind}, and cannot be read at random: decompress it")
        reader = tarfile.TarFile(fileobj=io.BytesIO(), mode="w")  # what is asked of it is only how headers are read
        reader.fileobj = file
        while at < size:
            file.seek(at)
            try:
                info = tarfile.TarInfo.fromtarfile(reader)
                if reader.offset <= at:
                    raise tarfile.ReadError("negative size")
            except OSError:
                raise
            except Exception as error:  # tarfile raises anything on damaged bytes
                if lost is None and not isinstance(error, tarfile.EOFHeaderError):  # which is a block of zeros
                    lost = at
                at += tarfile.BLOCKSIZE
                continue
            if lost is not None:
                yield None, lost, at
            yield info, at, reader.offset
            at, lost = reader.offset, None
    if lost is not None or not size:
        yield None, lost or 0, size


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_tars(out: str, tars: Tars, chosen: list[int]):
    """Write some items into tars out/00000.tar, 00001.tar, ... of about 1 GiB each: all members of the same name but
    for the ending, as they stand, one item after the other. A folder that is there is replaced when all are written.
    Raises ValueError where a tar is not what it was when it was opened.
    """
    part, old, written, file = f"{out}.part", f"{out}.old", set(), None
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    for i in chosen:
        n, row = tars.place(i)
        places, head = tars.read(n, row, 1)[0][1], tars.heads[n]
        if (n, places[0][0]) in written:  # two clips of one name
            continue
        written.add((n, places[0][0]))
        if file is None or file.tell() > SHARD:
            file = finished(file) or open(os.path.join(part, f"{len(os.listdir(part)):05d}.tar"), "wb")
        with open(head.tar, "rb") as whole:
            now = os.fstat(whole.fileno())
            if (now.st_size, now.st_mtime_ns) != (head.size, head.time):
                raise ValueError(f"{head.tar} has changed since it was looked through: start again")
            for first, behind in places:
                whole.seek(first)
                file.write(whole.read(behind - first).ljust(behind - first, b"\0"))
    finished(file)
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(out):
        os.rename(out, old)
    os.rename(part, out)
    shutil.rmtree(old, ignore_errors=True)


def finished(file):
    """End a tar, and close it."""
    if file:
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.close()


if __name__ == "__main__":  # what index_beside starts
    for name in sys.argv[2:]:
        read_head(sys.argv[1], name) or index_tar(sys.argv[1], name)
