"""What clips/encode.py does with the samples of some items: decode them, and make tensors of them."""

import itertools

import torch

from cli import warn
from clips.decode import Bad
from clips.encoded import EncodedClips
from clips.jobs import Clock
from clips.lists import Items
from clips.samples import Spec, offered_fps, read_sample, video_of
from sd.device import pick_dtype, precision
from sd.vae import encode_frames

FRAMES = 16  # that the VAE sees at once, of however many samples


def all_samples(items: Items, i: int, spec: Spec) -> list:
    """(fps, k, Sample or Bad) of everything that an item offers."""
    try:
        item = items[i]
        with video_of(items.source, item) as video:
            offered = offered_fps(items.source, video, spec)
    except Bad as bad:
        return [(None, None, bad)]
    found = []
    for fps, k in itertools.product(offered, range(spec.repeats(items.source))):
        try:
            with video_of(items.source, item) as video:
                found.append((fps, k, read_sample(items.source, i, item, video, spec, fps, k)))
        except Bad as bad:
            found.append((fps, k, bad))
    return found


def old_samples(old: EncodedClips, lines: list[dict]) -> list:
    """What all_samples found of an item when it was encoded, with moments for frames."""
    found = []
    for line in lines:
        try:
            found.append((line["fps"], line["k"], old.sample_of(line)))
        except Bad as bad:
            found.append((line["fps"], line["k"], bad))
    return found


class Encoder:
    """The VAE and the text tower of a model, where they are: in half precision on a GPU.

    text   whether to encode captions too
    dtype  of what is stored
    """

    def __init__(self, model, text: bool, dtype: torch.dtype):
        self.model, self.text, self.dtype, self.clock = model, text, dtype, Clock()
        self.device = model.vae.post_quant_conv.weight.device
        self.precision = pick_dtype("auto", self.device) if self.device.type == "cuda" else torch.float32
        model.vae.to(memory_format=torch.channels_last)  # a third faster on the CPU

    def shard(self, samples):
        """(lines of the index, tensors) of (line, Sample or Bad) pairs. A Bad gets a line that says why."""
        lines, rows, captions = [], [], {}  # a row is moments, or the place of its frames among those that are new

        def new_frames():
            new = 0
            for line, sample in samples:
                if isinstance(sample, Bad):
                    lines.append(line | {"bad": str(sample)})
                    continue
                lines.append(line | {"caption": sample.caption, "row": len(rows), "skipped": sample.skipped})
                if self.text:
                    lines[-1]["context"] = captions.setdefault(sample.caption, len(captions))
                if sample.data.is_floating_point():
                    rows.append(sample.data.to(self.dtype))
                else:
                    rows.append(slice(new, new + len(sample.data)))
                    new += len(sample.data)
                    yield sample.data

        found, tensors = [self.moments(frames) for frames in batched(new_frames())], {}
        if rows:
            new = torch.cat(found) if found else None
            rows = [new[row] if isinstance(row, slice) else row for row in rows]
            tensors["moments"] = torch.stack(rows).contiguous()
        if captions:
            tensors["context"] = self.contexts(list(captions))
        return lines, tensors

    def moments(self, frames: torch.Tensor) -> torch.Tensor:
        """Moments (N, 2C, h, w) of uint8 frames (N, 3, H, W): in half precision on a GPU, where that can hold them."""
        with self.clock("the VAE"), torch.no_grad():
            with precision(self.precision, self.device):
                found = encode_frames(self.model.vae, frames.to(self.device), FRAMES)  # as bytes
            if self.precision != torch.float32 and not found.isfinite().all():
                warn(f"the VAE's numbers do not fit into {str(self.precision)[6:]}: it encodes in float32 from here on")
                self.precision = torch.float32
                return self.moments(frames)
            if not found.isfinite().all():
                raise ValueError("the VAE gives numbers that are not finite: its weights are damaged, or it diverged")
            return found.to(self.dtype).cpu()

    def contexts(self, captions: list[str]) -> torch.Tensor:
        """Contexts (N, L, D) of captions."""
        with self.clock("the text tower"), torch.no_grad(), precision(self.precision, self.device):
            return self.model.text.encode(captions).to(self.dtype).cpu()


def batched(samples):
    """Yield the frames of samples (T, 3, H, W) FRAMES at a time: what the last ones lack is black, so that a frame's
    moments do not depend on how many there are."""
    waiting = None
    for frames in samples:
        waiting = frames if waiting is None else torch.cat([waiting, frames])
        while len(waiting) >= FRAMES:
            yield waiting[:FRAMES]
            waiting = waiting[FRAMES:]
    if waiting is not None and len(waiting):
        yield torch.cat([waiting, waiting.new_zeros(FRAMES - len(waiting), *waiting.shape[1:])])
