"""Captions + videos + images -> training clips.

Three sources, each a list with a fixed order (paper 4.2, "Triple-Data"):

    video     a WebVid-style CSV of clips with captions       FPS 1..60
    label     a folder of images for each label               FPS 0: T different images of one label
    caption   a JSON-lines list of images with captions       FPS 120: one image, T times

    python data.py encode OUT --ckpt F --video LIST --label DIR --caption LIST      # VAE latents, ahead of training
"""

import csv
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from checkpoint import Parser, UserError, command_line, load, parse_size

VIDEO_FPS = (1, 2, 4, 8, 15, 30, 60)  # Equation 6
LABEL_FPS, CAPTION_FPS = 0, 120
SOURCES = ("video", "label", "caption")

# ---------------------------------------------------------------------------------------------------------------------
# Lists


def read_list(source: str, path: str) -> list[tuple[str, list[str]]]:
    """The items of one source, in a fixed order: (caption, files). A video or a captioned image has one file.

    Relative paths resolve against the list's own folder. Raises UserError when the list cannot be read or is empty.
    """
    try:
        items = {"video": read_webvid, "label": read_labels, "caption": read_captions}[source](path)
    except OSError as error:
        raise UserError(f"{source} list {path} cannot be read: {error.strerror or error}") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{source} list {path} is not of the expected form: {error!r}") from error
    if not items:
        raise UserError(f"{source} list {path} is empty")
    return items


def read_webvid(path):
    """CSV with videoid, page_dir, name; the files are videos/page_dir/videoid.mp4 beside the list."""
    folder = os.path.join(os.path.dirname(path), "videos")
    with open(path, newline="", encoding="utf-8") as file:
        return [
            (row["name"], [os.path.join(folder, row["page_dir"], row["videoid"] + ".mp4")])
            for row in csv.DictReader(file)
        ]


def read_labels(path):
    """One folder a label, its name the caption, the images in it."""
    labels = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    return [(label, [entry.path for entry in sorted(os.scandir(os.path.join(path, label)), key=lambda e: e.name)])
            for label in labels]


def read_captions(path):
    """JSON lines with path and caption."""
    folder = os.path.dirname(path)
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [(line["caption"], [os.path.join(folder, line["path"])]) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# Clips (Equation 6)


def usable_fps(rate: float, duration: float, T: int, values=VIDEO_FPS) -> list[int]:
    """The FPS values that a clip of `rate` frames a second and `duration` seconds offers for T frames."""
    return [f for f in values if f <= 1.01 * rate and (T - 1) / f < duration]


def read_clip(path: str, fps: float, T: int, rng) -> np.ndarray:
    """T frames at `fps` from a random start: uint8 (T, H, W, 3).

    Frames are chosen by presentation time, not by index: the k-th is the one on screen at start + k / fps.
    """
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # many clips are read at once; one thread each is the fastest
        base = float(stream.time_base)
        duration, first = float(stream.duration * base), (stream.start_time or 0) * base
        start = first + rng.uniform(0, duration - (T - 1) / fps)
        wanted = [start + k / fps for k in range(T)]
        container.seek(int(start / base), stream=stream)  # to the keyframe at or before it
        frames, current = [], None
        for frame in container.decode(stream):
            while len(frames) < T and current is not None and frame.time > wanted[len(frames)] + 1e-6:
                frames.append(current)
            if len(frames) == T:
                break
            current = frame
        frames += [current] * (T - len(frames))  # the last frame stays on screen to the end
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def read_image(path: str) -> np.ndarray:
    """uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def fit(frames: np.ndarray, width: int, height: int) -> torch.Tensor:
    """Resize (antialiased) and crop to the middle: uint8 (T, H, W, 3) -> uint8 (T, 3, height, width)."""
    x = torch.tensor(frames).permute(0, 3, 1, 2)
    H, W = x.shape[-2:]
    if (H, W) == (height, width):
        return x
    scale = max(height / H, width / W)
    h, w = max(height, round(H * scale)), max(width, round(W * scale))
    x = F.interpolate(x.float(), (h, w), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
    top, left = (h - height) // 2, (w - width) // 2
    return x[:, :, top : top + height, left : left + width]


def generator(*key: int) -> torch.Generator:
    """Randomness that is a function of its key: (seed, step, ...)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def sample_rng(seed: int, source: str, item: int, fps: int, k: int):
    """The generator behind the k-th sample of an item: the same decoding live and encoding ahead."""
    return np.random.default_rng([seed, SOURCES.index(source), item, fps, k])


def read_sample(source, files, fps, T, size, rng) -> torch.Tensor:
    """The frames of one sample: uint8 (T, 3, H, W); one frame only for a captioned image, which is repeated later."""
    if source == "video":
        return fit(read_clip(files[0], fps, T, rng), *size)
    if source == "label":  # without repeats where there are enough images
        chosen = rng.choice(len(files), T, replace=len(files) < T)
        return torch.cat([fit(read_image(files[i])[None], *size) for i in chosen])
    return fit(read_image(files[0])[None], *size)


def clip_fps(path: str, T: int, values) -> list[int]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        return usable_fps(float(stream.average_rate), float(stream.duration * stream.time_base), T, values)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding ahead: latents on disk, so that training needs neither decoder nor VAE

SHARD = 512  # samples a file


def encode(model, lists: dict[str, str], out: str, *, frames, size, fps_values=VIDEO_FPS, starts=1, draws=1, seed=0):
    """Write VAE mean and log-variance of every sample of the lists into a folder: index.jsonl and safetensors shards.

    lists    source -> path
    starts   samples a (clip, FPS); draws: samples a label
    Written beside and renamed into place.
    """
    if os.path.exists(out):
        raise UserError(f"{out} is there already: choose another folder, or remove it")
    part = out + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    model.vae.to(memory_format=torch.channels_last)  # a third faster on the CPU
    index, shard = [], 0
    for source, path in lists.items():
        items = read_list(source, path)
        tasks = list(sample_tasks(source, items, frames, fps_values, starts if source == "video" else draws))
        bar = tqdm(total=len(tasks), desc=f"encode {source}", unit="clip", mininterval=2)
        for at in range(0, len(tasks), SHARD):
            batch, name = tasks[at : at + SHARD], f"{shard:05d}.safetensors"
            moments = []
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter; the VAE runs here
                jobs = [(source, items[item][1], fps, frames, size, sample_rng(seed, source, item, fps, k))
                        for item, fps, k in batch]
                for clip in pool.map(lambda job: read_sample(*job), jobs):
                    moments.append(encode_frames(model.vae, clip).half().cpu())
                    bar.update()
            save_file({"moments": torch.stack(moments).contiguous()}, os.path.join(part, name))
            index += [
                {"shard": name, "row": row, "source": source, "item": item, "caption": items[item][0], "fps": fps,
                 "k": k, "seed": seed}
                for row, (item, fps, k) in enumerate(batch)
            ]
            shard += 1
        bar.close()
    with open(os.path.join(part, "index.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in index)
    os.rename(part, out)


def sample_tasks(source, items, T, fps_values, repeats):
    """(item, fps, k) of every sample."""
    for i, (_, files) in enumerate(items):
        still = {"label": [LABEL_FPS], "caption": [CAPTION_FPS]}
        for fps in still.get(source) or clip_fps(files[0], T, fps_values):
            for k in range(1 if source == "caption" else repeats):
                yield i, fps, k


def encode_frames(vae, frames, chunk=16):
    """uint8 (T, 3, H, W) -> moments (T, 8, h, w): mean and log-variance, before the latent scale."""
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
    latents: torch.Tensor  # (B, T, 4, h, w), scaled
    captions: list[str]
    fps: torch.Tensor  # (B,)
    sources: list[str]


class EncodedClips:
    """A folder written by `encode`. Shards stay memory-mapped: a sample costs one small read."""

    def __init__(self, folder: str):
        try:
            with open(os.path.join(folder, "index.jsonl"), encoding="utf-8") as file:
                self.index = [json.loads(line) for line in file]
        except OSError as error:
            raise UserError(f"{folder} is not a folder of encoded clips: {error.strerror or error}") from error
        names = sorted({line["shard"] for line in self.index})
        self.shards = {name: safe_open(os.path.join(folder, name), framework="pt") for name in names}
        self.rows = {s: [i for i, line in enumerate(self.index) if line["source"] == s] for s in SOURCES}

    def moments(self, i: int) -> torch.Tensor:
        """(T, 8, h, w) of sample i; T = 1 for a captioned image."""
        line = self.index[i]
        return self.shards[line["shard"]].get_slice("moments")[line["row"]]


class Stream:
    """The endless, seeded order in which samples are met. Batch n is a function of (seed, n, rank) and nothing else,
    so resuming is asking for the next n.

    mix  source -> weight: in every sum(weights) consecutive samples each source appears `weight` times
    """

    def __init__(self, clips: EncodedClips, mix: dict[str, int], batch_size: int, frames: int, latent_scale: float,
                 seed=0, rank=0, world=1, drop_caption=0.1):
        missing = [s for s, weight in mix.items() if weight and not clips.rows.get(s)]
        if missing:
            raise UserError(f"mix asks for source {missing[0]!r}, of which there is no sample")
        self.clips, self.batch_size, self.frames, self.scale = clips, batch_size, frames, latent_scale
        self.seed, self.rank, self.world, self.drop_caption = seed, rank, world, drop_caption
        self.pattern = [s for s, weight in mix.items() for _ in range(weight)]
        self.orders = {}

    def sample_at(self, position: int) -> int:
        """Which sample stands at a position of the stream shared by all ranks."""
        turn, slot = divmod(position, len(self.pattern))
        source = self.pattern[slot]
        weight, before = self.pattern.count(source), self.pattern[:slot].count(source)
        rows = self.clips.rows[source]
        epoch, offset = divmod(turn * weight + before, len(rows))
        if self.orders.get(source, (None,))[0] != epoch:
            order = np.random.default_rng([self.seed, SOURCES.index(source), epoch]).permutation(len(rows))
            self.orders[source] = epoch, order
        return rows[self.orders[source][1][offset]]

    def batch(self, n: int) -> Batch:
        first = (n * self.world + self.rank) * self.batch_size
        chosen = [self.sample_at(first + j) for j in range(self.batch_size)]
        lines = [self.clips.index[i] for i in chosen]
        noise = generator(self.seed, n, self.rank)
        latents = [self.draw(self.clips.moments(i).float(), noise) for i in chosen]
        dropped = torch.rand(self.batch_size, generator=noise) < self.drop_caption  # classifier-free guidance
        captions = ["" if drop else line["caption"] for line, drop in zip(lines, dropped)]
        fps = torch.tensor([float(line["fps"]) for line in lines])
        return Batch(torch.stack(latents), captions, fps, [line["source"] for line in lines])

    def draw(self, moments, noise):
        """Sample the VAE's posterior; one still becomes T equal frames."""
        mean, logvar = moments.chunk(2, dim=1)
        latent = (mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=noise)) * self.scale
        return latent.expand(self.frames, -1, -1, -1)


def frame_pool(lists: dict[str, str], count: int, size, seed=0) -> torch.Tensor:
    """`count` frames drawn evenly from the sources, for training a VAE: uint8 (count, 3, H, W), in memory."""
    rng = np.random.default_rng(seed)
    pool, share = [], math.ceil(count / len(lists))
    for source, path in lists.items():
        items = read_list(source, path)
        each = math.ceil(share / len(items))
        for i in tqdm(rng.permutation(len(items))[:share], desc=f"frames of {source}", mininterval=2):
            files = items[i][1]
            if source == "video":
                pool.append(fit(read_clip(files[0], 1, min(each, 4), rng), *size))
            else:
                chosen = rng.choice(len(files), min(each, len(files)), replace=False)
                pool += [fit(read_image(files[j])[None], *size) for j in chosen]
    return torch.cat(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = Parser(description="Prepare training data.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("encode", help="store the VAE latents of every sample")
    p.add_argument("out", metavar="OUT")
    p.add_argument("--ckpt", required=True, help="the model whose VAE encodes")
    for source in SOURCES:
        p.add_argument(f"--{source}", metavar="LIST")
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--size", default="256x256", metavar="WxH")
    p.add_argument("--fps", type=int, nargs="+", default=VIDEO_FPS)
    p.add_argument("--starts", type=int, default=1, help="samples a clip and FPS")
    p.add_argument("--draws", type=int, default=1, help="samples a label")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    lists = {source: getattr(args, source) for source in SOURCES if getattr(args, source)}
    encode(load(args.ckpt, args.device), lists, args.out, frames=args.frames, size=parse_size(args.size),
           fps_values=args.fps, starts=args.starts, draws=args.draws, seed=args.seed)


if __name__ == "__main__":
    command_line(main)
