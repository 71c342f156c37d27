"""Captions + videos + images -> training batches.

Three sources (paper 4.2, "Triple-Data"), each a list with a fixed order:

    video     clips with captions            FPS 1..60, frames picked by presentation time
    label     a folder of images a label     FPS 0: T different images of one label
    caption   images with captions           FPS 120: one image, T times

A list is WebVid's CSV, JSON lines, MSR-VTT's json, or a folder of `name.mp4` + `name.txt`; of labels, a folder of
folders or a file of their names. A sample that cannot be used is skipped, counted and named.

    python -m clips.prepare check LIST                                                        # what cannot be used, and why
    python -m clips.prepare filter LIST --keep 0.05                                           # the CLIP filter, Equation 5
    python -m clips.prepare encode OUT --ckpt F --video LIST --label DIR --caption LIST       # VAE latents, ahead of training
"""

import csv
import io
import json
import os
import re
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from clips.media import (
    IMAGE_ENDINGS,
    VIDEO_ENDINGS,
    VIDEO_FPS,
    Bad,
    Video,
    View,
    fit_frame,
    fit_image,
    frames_at,
    opened,
    usable_fps,
)
from sd.checkpoint import UserError

LABEL_FPS, CAPTION_FPS = 0, 120
SOURCES = ("video", "label", "caption")

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

    Relative paths resolve against the list's own folder. Raises UserError when the list cannot be read, is empty, or
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
                raise UserError(f"{source} list {path} is empty")
            self.file(self.fields(0))
        except OSError as error:
            raise UserError(f"{source} list {path} cannot be read: {error.strerror or error}") from error
        except (Bad, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source} list {path} is not of a known form: {error}") from error

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


# ---------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True)
class Spec:
    """What a sample is made of, beside its item. With (source, item, fps, k) it says every pixel of it."""

    frames: int
    width: int
    height: int
    fps_values: tuple = VIDEO_FPS
    starts: int = 1  # different starts a clip and FPS
    draws: int = 1  # different sets of images a label
    random_crop: bool = False  # else from the middle
    flip: bool = False  # left and right, half of the time, where the caption cannot mention a side
    seed: int = 0

    def repeats(self, source: str) -> int:
        return {"video": self.starts, "label": self.draws, "caption": 1}[source]


SIDES = re.compile(r"\b(left|right|east|west|(counter-?|anti-?)?clockwise|text|letter|word|sign)", re.IGNORECASE)


def draw_view(caption: str, spec: Spec, rng) -> View:
    left, top, mirror = rng.random(3)
    mirror = spec.flip and mirror < 0.5 and not SIDES.search(caption)
    return View(left, top, mirror) if spec.random_crop else View(mirror=mirror)


@dataclass
class Sample:
    data: torch.Tensor  # frames uint8 (T, 3, H, W), or their moments (T, 2C, h, w); T = 1 for a captioned image
    caption: str
    fps: int
    k: int
    skipped: tuple = ()  # (path, reason) of images of a label that could not be read
    context: torch.Tensor | None = None  # (L, D), encoded ahead


def read_sample(source: str, i: int, item: Item, spec: Spec, choose) -> Sample:
    """One sample of an item; choose(FPS values that the item offers) -> (fps, k). Raises Bad.

    Caption, view and start are a function of (seed, source, item, fps, k): the same live and encoded ahead.
    """
    with opened(item.path) if source == "video" else nullcontext() as video:
        fps, k = choose(offered_fps(source, video, spec))
        rng = np.random.default_rng([spec.seed, SOURCES.index(source), i, fps, k])
        caption, skipped = item.captions[rng.integers(len(item.captions))], ()
        if source == "label":
            frames, skipped = label_images(item.path, caption, spec, rng)
        elif source == "caption":
            frames = fit_image(item.path, spec.width, spec.height, draw_view(caption, spec, rng))[None]
        else:
            frames = clip_frames(video, fps, caption, spec, rng)
    return Sample(frames, caption, fps, k, skipped)


def offered_fps(source: str, video: Video | None, spec: Spec) -> list[int]:
    if source != "video":
        return [LABEL_FPS if source == "label" else CAPTION_FPS]
    offered = usable_fps(video.rate, video.duration, spec.frames, spec.fps_values)
    if not offered:
        raise Bad("too short")
    return offered


def clip_frames(video: Video, fps: int, caption: str, spec: Spec, rng) -> torch.Tensor:
    """T frames from a random start (T, 3, H, W), all of one view."""
    view = draw_view(caption, spec, rng)
    start = rng.uniform(0, video.duration - (spec.frames - 1) / fps)
    frames = frames_at(video, [start + t / fps for t in range(spec.frames)])
    fitted = {id(f): fit_frame(f, video.aspect, spec.width, spec.height, view) for f in frames}  # some stay longer
    return torch.stack([fitted[id(f)] for f in frames])


def label_images(folder: str, caption: str, spec: Spec, rng):
    """T different images of a folder (T, 3, H, W), with repeats only where there are too few; and those passed over."""
    names, images, skipped = image_names(folder), [], []
    for j in rng.permutation(len(names)):
        path = os.path.join(folder, names[j])
        try:
            images.append(fit_image(path, spec.width, spec.height, draw_view(caption, spec, rng)))
        except Bad as bad:
            skipped.append((path, str(bad)))
        if len(images) == spec.frames:
            break
    if not images:
        raise Bad("no image in it that can be read")
    return torch.stack([images[t % len(images)] for t in range(spec.frames)]), tuple(skipped)


def image_names(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS))
    except (OSError, ValueError) as error:  # ValueError: no folder can have such a name
        raise Bad("not a folder that can be read") from error


class LiveClips:
    """Samples decoded when they are asked for; the VAE makes latents of them in the training process."""

    def __init__(self, lists: dict[str, str], spec: Spec):
        self.items = {source: Items(source, path) for source, path in lists.items()}
        self.spec, self.empty_context = spec, None

    def count(self, source: str) -> int:
        return len(self.items.get(source, ()))

    def name(self, source: str, i: int) -> str:
        return self.items[source].name(i)

    def sample(self, source: str, i: int, u: float, v: float) -> Sample:
        """The sample of item i that the numbers u and v in 0..1 choose: its FPS and its k."""

        def choose(offered):
            return offered[int(u * len(offered))], int(v * self.spec.repeats(source))

        return read_sample(source, i, self.items[source][i], self.spec, choose)


# ---------------------------------------------------------------------------------------------------------------------
# Samples encoded ahead


def read_settings(folder: str) -> dict:
    """What `encode` noted of a folder."""
    try:
        with open(os.path.join(folder, "spec.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a folder of encoded clips: {error}") from error


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


def encode_frames(vae, frames, chunk=16):
    """uint8 (T, 3, H, W) -> moments (T, 2C, h, w): mean and log-variance, before the latent scale."""
    weight = vae.post_quant_conv.weight
    with torch.no_grad():
        return torch.cat([
            torch.cat(vae.encode(part.to(weight.device, weight.dtype) / 127.5 - 1), dim=1)
            for part in frames.split(chunk)
        ])


# ---------------------------------------------------------------------------------------------------------------------
# Training batches


@dataclass
class Batch:
    samples: list[Sample]
    captions: list[str]  # "" where dropped
    sources: list[str]
    fps: torch.Tensor  # (B,)
    seed: int  # with the position it is the key of all randomness of a sample, on however many ranks
    positions: list[int]  # in the stream
    context: torch.Tensor | None  # (B, L, D), when encoded ahead
    faults: list[tuple[str, str, str]]  # (source, name, reason) of what was met and could not be used

    def latents(self, vae, scale: float, T: int) -> torch.Tensor:
        """Draw from the VAE's posterior (B, T, C, h, w), scaled. One still becomes T equal frames."""
        latents = []
        for sample, position in zip(self.samples, self.positions):
            moments = sample.data if sample.data.is_floating_point() else encode_frames(vae, sample.data).cpu()
            mean, logvar = moments.float().chunk(2, dim=1)
            noise = torch.randn(mean.shape, generator=generator("posterior", self.seed, position))
            latents.append(((mean + (logvar / 2).exp() * noise) * scale).expand(T, -1, -1, -1))
        return torch.stack(latents)


class Stream:
    """The endless, seeded order in which samples are met. What stands at a position of it is a function of the seed and
    nothing else, neither of the number of ranks and worker processes nor of what came before: resuming is asking for
    the next batch.

    mix       source -> weight: in every sum(weights) consecutive samples each source appears `weight` times
    held_out  items at the end of each source that never appear
    """

    def __init__(self, clips, mix: dict[str, int], batch_size: int, seed=0, rank=0, world=1, drop_caption=0.1,
                 held_out=0):
        self.pattern = [s for s, weight in mix.items() for _ in range(weight)]
        for source in self.pattern:
            if not clips.count(source):
                raise UserError(f"mix asks for source {source!r}, of which there is no sample")
            if clips.count(source) <= held_out:
                raise UserError(f"validation = {held_out} leaves nothing to train on of {clips.count(source)} "
                                f"{source} samples")
        self.sizes = {source: clips.count(source) - held_out for source in self.pattern}
        self.clips, self.batch_size, self.drop_caption, self.held_out = clips, batch_size, drop_caption, held_out
        self.seed, self.rank, self.world = seed, rank, world

    def place(self, position: int) -> tuple[str, int, int]:
        """(source, epoch, offset in it) at a position of the stream that all ranks share."""
        turn, slot = divmod(position, len(self.pattern))
        source = self.pattern[slot]
        weight, before = self.pattern.count(source), self.pattern[:slot].count(source)
        return source, *divmod(turn * weight + before, self.sizes[source])

    def item_at(self, position: int) -> tuple[str, int]:
        """Every item once an epoch, in a new order each."""
        source, epoch, offset = self.place(position)
        return source, shuffled(offset, self.sizes[source], (self.seed, SOURCES.index(source), epoch))

    def sample_at(self, position: int, faults: list) -> Sample:
        """The sample at a position. One that cannot be used is noted, and gives way to one of a random item."""
        source, item = self.item_at(position)
        for attempt in range(100):
            rng = np.random.default_rng([self.seed, position, attempt])
            if attempt:
                item = int(rng.integers(self.sizes[source]))
            try:
                sample = self.clips.sample(source, item, *rng.random(2))
            except Bad as bad:
                faults.append((source, self.clips.name(source, item), str(bad)))
                continue
            faults += [(source, path, reason) for path, reason in sample.skipped]
            return sample
        raise UserError(f"a hundred {source} samples in a row cannot be used, the last, {faults[-1][1]}, because: "
                        f"{faults[-1][2]}")

    def batch(self, n: int) -> Batch:
        first, faults = (n * self.world + self.rank) * self.batch_size, []
        positions = list(range(first, first + self.batch_size))
        samples = [self.sample_at(position, faults) for position in positions]
        draws = [torch.rand((), generator=generator("drop", self.seed, position)).item() for position in positions]
        dropped = [draw < self.drop_caption for draw in draws]  # for classifier-free guidance
        sources = [self.place(position)[0] for position in positions]
        return self.collated(samples, sources, self.seed, positions, faults, dropped)

    def collated(self, samples, sources, seed, positions, faults, dropped) -> Batch:
        captions = ["" if drop else sample.caption for drop, sample in zip(dropped, samples)]
        empty, context = self.clips.empty_context, None
        if empty is not None:
            context = torch.stack([empty if drop else s.context for drop, s in zip(dropped, samples)]).float()
        fps = torch.tensor([float(sample.fps) for sample in samples])
        return Batch(samples, captions, sources, fps, seed, positions, context, faults)

    def validation(self) -> Batch:
        """What is held out, one sample an item, whatever the seed; what cannot be used is left out and noted."""
        samples, sources, faults = [], [], []
        for source, size in self.sizes.items():
            for item in range(size, size + self.held_out):
                try:
                    sample = self.clips.sample(source, item, *np.random.default_rng(item).random(2))
                except Bad as bad:
                    faults.append((source, self.clips.name(source, item), str(bad)))
                    continue
                samples.append(sample)
                sources.append(source)
        if not samples:
            raise UserError(f"none of the {len(faults)} samples held out for validation can be used, the last because: "
                            f"{faults[-1][2]}")
        return self.collated(samples, sources, 0, list(range(len(samples))), faults, [False] * len(samples))

    def __getitem__(self, n: int):
        """For the loader: an error of the user crosses from the worker as a value, without the worker's traceback."""
        try:
            return self.batch(n)
        except UserError as error:
            return error


def shuffled(i: int, n: int, key) -> int:
    """The i-th of a random order of 0..n-1, with no order kept: a Feistel network, walked until it lands inside."""
    keys = np.random.SeedSequence(key).generate_state(4, np.uint64).tolist()
    bits = max(1, (n - 1).bit_length() + 1) // 2
    while True:
        left, right = i >> bits, i & (1 << bits) - 1
        for k in keys:
            mixed = (right + k) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
            left, right = right, left ^ mixed >> 64 - bits
        i = left << bits | right
        if i < n:
            return i


def generator(use: str, *key: int) -> torch.Generator:
    """Randomness that is a function of what it is for and of its key: (seed, position in the stream, ...)."""
    key = [int.from_bytes(use.encode(), "little"), *key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


LOADER_LIMIT = 300  # seconds without a batch


def batches(stream: Stream, first: int, last: int, workers: int, limit=LOADER_LIMIT):
    """Batches first..last-1, read ahead by worker processes; none of those: here, one by one.

    Raises UserError when a worker hangs.
    """
    if not workers:
        yield from map(stream.batch, range(first, last))
        return
    # a fork server: forked from a process that decodes, or has a GPU, libav's locks may stay locked for ever
    loader = DataLoader(stream, batch_size=None, sampler=range(first, last), num_workers=workers, prefetch_factor=4,
                        timeout=limit, multiprocessing_context="forkserver", worker_init_fn=ignore_interrupts)
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "timed out" in str(error):
            raise UserError(f"no batch within {limit} s: a worker hangs, or {workers} workers are too few") from error
        if "exited unexpectedly" in str(error):
            raise UserError(f"a worker that reads data was killed, maybe for want of memory ({error})") from error
        raise


def ignore_interrupts(worker: int):
    """Ctrl-C goes to all processes of a terminal; the one that trains finishes its step, for which it needs workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Faults:
    """Counts what could not be used and names each once, on stderr; raises UserError when it becomes too much.

    share  of the samples that may be bad, once there were a hundred
    """

    def __init__(self, share: float):
        self.share, self.met, self.bad, self.named = share, 0, 0, set()

    def add(self, batch: Batch):
        self.met += len(batch.samples) + len(batch.faults)
        self.bad += len(batch.faults)
        for source, name, reason in batch.faults:
            if name not in self.named:
                self.named.add(name)
                print(f"skipped {source} {name}: {reason}", file=sys.stderr, flush=True)
        if self.met >= 100 and self.bad > self.share * self.met:
            raise UserError(f"{self.bad} of {self.met} samples cannot be used, more than max_bad = {self.share}: see "
                            "the names above, or run `python -m clips.prepare check` on the list")

