"""Captions + videos + images -> training batches.

There are three sources (paper 4.2, "Triple-Data"), each of them a list:

    video     clips with captions            FPS 1..60, frames chosen by presentation time
    label     a folder of images a label     FPS 0: T different images of one label
    caption   images with captions           FPS 120: one image, T times

clips/ knows how a file becomes a sample. Here stands which sample comes when (`Stream`), what a batch of them is
(`Batch`), and what happens to samples that cannot be used: they are skipped, counted and named (`Faults`).

    python -m clips.check LIST                                 # what cannot be used, and why
    python -m clips.filter LIST --keep 0.05                    # the CLIP filter, Equation 5
    python -m clips.encode OUT --ckpt MODEL --video LIST       # VAE latents, ahead of training
"""

import functools
import os
import signal
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from cli import is_ours, warn
from clips.decode import Bad
from clips.samples import SOURCES, Sample
from sd.vae import encode_frames


@dataclass
class Batch:
    samples: list[Sample]
    captions: list[str]  # "" where dropped
    sources: list[str]
    fps: torch.Tensor  # (B,)
    seed: int  # all random numbers of a sample are a function of seed and position, on any number of ranks
    positions: list[int]  # in the stream
    context: torch.Tensor | None  # (B, L, D), when encoded ahead
    faults: list[tuple[str, str, str]]  # (source, name, reason) of what could not be used

    def latents(self, vae, scale: float, T: int, draw: bool = True) -> torch.Tensor:
        """Latents (B, T, C, h, w), scaled: drawn from the VAE's posterior, or its mean. A still is T equal frames."""
        latents = []
        for sample, position in zip(self.samples, self.positions):
            moments = sample.data if sample.data.is_floating_point() else encode_frames(vae, sample.data).cpu()
            mean, logvar = moments.float().chunk(2, dim=1)
            if draw:
                noise = torch.randn(mean.shape, generator=generator("posterior", self.seed, position))
                mean = mean + (logvar / 2).exp() * noise
            latents.append((mean * scale).expand(T, -1, -1, -1))
        return torch.stack(latents)


class Stream:
    """An endless sequence of samples in an order that depends on the seed alone.

    The sample at a position depends neither on the number of ranks and workers nor on what was read before, so that
    resuming means asking for the next batch.

    mix       source -> weight: in every sum(weights) consecutive samples each source appears `weight` times
    held_out  how many items at the end of each source are kept for validation
    start     position of the first sample
    fps_values  those of clips, when not all that there are
    """

    def __init__(self, clips, mix: dict[str, int], batch_size: int, seed=0, rank=0, world=1, drop_caption=0.1,
                 held_out=0, start=0, fps_values=()):
        self.pattern = [s for s, weight in mix.items() for _ in range(weight)]
        for source in self.pattern:
            if not clips.count(source):
                raise ValueError(f"mix asks for {source} samples, of which there are none")
            if clips.count(source) <= held_out:
                raise ValueError(f"validation = {held_out} leaves nothing to train on of {clips.count(source)} "
                                 f"{source} samples")
        self.sizes = {source: clips.count(source) - held_out for source in self.pattern}
        self.clips, self.batch_size, self.drop_caption, self.held_out = clips, batch_size, drop_caption, held_out
        self.seed, self.rank, self.world, self.start, self.fps_values = seed, rank, world, start, fps_values

    def place(self, position: int) -> tuple[str, int, int]:
        """(source, its epoch, offset in that epoch) of a position in the stream, which all ranks share."""
        turn, slot = divmod(position, len(self.pattern))
        source = self.pattern[slot]
        weight, before = self.pattern.count(source), self.pattern[:slot].count(source)
        return source, *divmod(turn * weight + before, self.sizes[source])

    def item_at(self, position: int) -> tuple[str, int]:
        """(source, item) of a position: every item once an epoch, in a new order each."""
        source, epoch, offset = self.place(position)
        return source, int(shuffled(self.sizes[source], self.seed, SOURCES.index(source), epoch)[offset])

    def sample_at(self, position: int, faults: list) -> Sample:
        """The sample at a position; when it cannot be used, a fault is noted and a random item takes its place."""
        source, item = self.item_at(position)
        for attempt in range(100):
            rng = np.random.default_rng([self.seed, position, attempt])
            if attempt:
                item = int(rng.integers(self.sizes[source]))
            try:
                sample = self.clips.sample(source, item, *rng.random(2), self.fps_values)
            except Bad as bad:
                faults.append((source, self.clips.name(source, item), str(bad)))
                continue
            faults += [(source, path, reason) for path, reason in sample.skipped]
            return sample
        raise ValueError(f"a hundred {source} samples in a row cannot be used; the last is {faults[-1][1]}: "
                         f"{faults[-1][2]}")

    def batch(self, n: int) -> Batch:
        first, faults = self.start + (n * self.world + self.rank) * self.batch_size, []
        positions = list(range(first, first + self.batch_size))
        samples = [self.sample_at(position, faults) for position in positions]
        draws = [torch.rand((), generator=generator("drop", self.seed, position)).item() for position in positions]
        dropped = [draw < self.drop_caption for draw in draws]  # for classifier-free guidance
        sources = [self.place(position)[0] for position in positions]
        return self.collate(samples, sources, self.seed, positions, faults, dropped)

    def collate(self, samples, sources, seed, positions, faults, dropped) -> Batch:
        captions = ["" if drop else sample.caption for drop, sample in zip(dropped, samples)]
        empty, context = self.clips.empty_context, None
        if empty is not None:
            context = torch.stack([empty if drop else s.context for drop, s in zip(dropped, samples)]).float()
        fps = torch.tensor([float(sample.fps) for sample in samples])
        return Batch(samples, captions, sources, fps, seed, positions, context, faults)

    def validation(self) -> Batch:
        """The held-out samples, one for each item, the same for every seed; without those that cannot be used."""
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
            raise ValueError(f"none of the {len(faults)} samples held out for validation can be used; the last is "
                             f"{faults[-1][1]}: {faults[-1][2]}")
        return self.collate(samples, sources, 0, list(range(len(samples))), faults, [False] * len(samples))

    def __getitem__(self, n: int):
        """For the loader: a mistake of the user crosses from the worker as a value, without the worker's traceback."""
        try:
            return self.batch(n)
        except ValueError as error:
            if not is_ours(error):
                raise
            return error


@functools.lru_cache(maxsize=2 * len(SOURCES))  # a batch may reach from one epoch into the next
def shuffled(n: int, *key: int) -> np.ndarray:
    """A random order of 0..n-1, a function of the key (seed, source, epoch)."""
    return np.random.default_rng(key).permutation(np.arange(n, dtype=np.uint32))


def generator(use: str, *key: int) -> torch.Generator:
    """Random numbers that are a function of their use and of a key (seed, position in the stream, ...)."""
    key = [int.from_bytes(use.encode(), "little"), *key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def batches(stream: Stream, first: int, last: int, workers: int, limit=300):
    """Yield the batches [first, last), read ahead by worker processes, or without any one by one in this process.

    Raises ValueError when there is no batch for `limit` seconds.
    """
    if not workers:
        yield from map(stream.batch, range(first, last))
        return
    # spawned, not forked from this process, where locks of libraries may stay locked in a child
    loader = DataLoader(stream, batch_size=None, sampler=range(first, last), num_workers=workers, prefetch_factor=4,
                        timeout=limit, multiprocessing_context="spawn", worker_init_fn=stand_apart)
    try:
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "timed out" in str(error):
            raise ValueError(f"no batch within {limit} s: a worker hangs, or {workers} workers are too few") from error
        if "exited unexpectedly" in str(error):
            raise ValueError(f"a worker that reads data was killed, maybe because memory ran out ({error})") from error
        raise


def stand_apart(worker: int):
    """Leave signals to the one that trains, which needs its workers to finish its step: a terminal's Ctrl-C and
    torchrun's SIGTERM go to all processes of a group."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:  # Windows, where Ctrl-C alone does so
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Faults:
    """Counts samples that could not be used, warns of each once, and raises ValueError when they are too many.

    share  how large a share of the samples may be bad, after the first hundred
    """

    def __init__(self, share: float):
        self.share, self.met, self.bad, self.named = share, 0, 0, set()

    def add(self, good: int, faults: list[tuple[str, str, str]]):
        """Count so many that are good, and others: (source, name, reason) each."""
        self.met += good + len(faults)
        self.bad += len(faults)
        for source, name, reason in faults:
            if name not in self.named:
                self.named.add(name)
                warn(f"skipped {source} {name}: {reason}")
        if self.met >= 100 and self.bad > self.share * self.met:
            raise ValueError(f"{self.bad} of {self.met} samples cannot be used, more than max_bad = {self.share}: see "
                             "the names above, or run `python -m clips.check` on the list")
