"""Reading clips on one core: 16 frames of 256x256 from 336x596 H.264, beside torchcodec and decord.

    python -m lab.bench data

The readers take turns; what they agree on is printed too.
"""

import math
import os
import statistics
import tempfile
import time

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from cli import parse
from clips.decode import frames_at, opened
from clips.pictures import View, cover, fit_frame
from lab.bench.timing import NoOptions

T, SIDE, CLIPS = 16, 256, 8

# ---------------------------------------------------------------------------------------------------------------------
# Readers: (path, times in seconds) -> uint8 (T, 3, SIDE, SIDE)


def read_ours(path: str, times) -> torch.Tensor:
    with opened(path) as video:
        return torch.stack([fit_frame(frame, video.aspect, SIDE, SIDE, View()) for frame in frames_at(video, times)])


def read_torchcodec(path: str, times) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate")
    return resized(decoder.get_frames_played_at(list(times)).data)


def read_decord(path: str, times) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    frames = reader.get_batch([int(t * reader.get_avg_fps() + 1e-6) for t in times]).asnumpy()
    return resized(torch.from_numpy(frames).permute(0, 3, 1, 2))


def resized(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (T, 3, H, W) as a torchcodec or decord user would bring it to size: antialiased, on uint8, cropped."""
    w, h = cover(frames.shape[-1], frames.shape[-2], SIDE, SIDE)
    frames = F.interpolate(frames, (h, w), mode="bicubic", antialias=True)
    top, left = (h - SIDE) // 2, (w - SIDE) // 2
    return frames[..., top : top + SIDE, left : left + SIDE]


READERS = {"ours": read_ours, "torchcodec": read_torchcodec, "decord": read_decord}

# ---------------------------------------------------------------------------------------------------------------------
# Their race


def write_scene(path: str, seed: int, seconds=20, rate=30, width=596, height=336):
    """A textured scene under a camera that pans and zooms: H.264 as x264's defaults make it, keyframes 250 apart."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).resize((2400, 1600), Image.BICUBIC)
    fine = rng.normal(0, 12, (1600, 2400, 1))
    scene = Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for n in range(seconds * rate):
            zoom = 1 + 0.3 * math.sin(n / 90)
            left, top = 700 + 600 * math.sin(n / 150), 500 + 400 * math.cos(n / 130)
            box = (left, top, left + width * zoom, top + height * zoom)
            file.mux(stream.encode(av.VideoFrame.from_image(scene.resize((width, height), Image.BILINEAR, box))))
        file.mux(stream.encode())


def race(paths: list[str], fps: int, rng) -> tuple[dict[str, float], float]:
    """Median seconds of each reader on the same times of the same files, and how far ours is from torchcodec's, in
    levels of 255."""
    spent, difference = {name: [] for name in READERS}, 0.0
    for path in paths:
        times = rng.uniform(0, 20 - (T - 1) / fps - 0.1) + np.arange(T) / fps
        clips = {}
        for name, read in READERS.items():
            began = time.perf_counter()
            clips[name] = read(path, times)
            spent[name].append(time.perf_counter() - began)
        difference = max(difference, (clips["ours"].float() - clips["torchcodec"].float()).abs().mean().item())
    return {name: statistics.median(seconds) for name, seconds in spent.items()}, difference


def print_row(name, seconds: dict[str, float], end=""):
    best = min(s for reader, s in seconds.items() if reader != "ours")
    print(f"{name:>4} " + " ".join(f"{1 / s:10.1f} clips/s" for s in seconds.values())
          + f"   {best / seconds['ours']:11.2f}{end}", flush=True)


def main(arguments):
    parse(NoOptions, __doc__, arguments)
    torch.set_num_threads(1)
    rng, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{n}.mp4") for n in range(CLIPS)]
        for n, path in enumerate(paths):
            write_scene(path, n)
        print(f"{'FPS':>4} " + " ".join(f"{name:>18}" for name in READERS) + "   ours / best   difference")
        for fps in (1, 2, 4, 8, 15, 30):
            seconds, difference = race(paths, fps, rng)
            rows.append(seconds)
            print_row(fps, seconds, f"   {difference:.2f} of 255")
    mean = {name: statistics.mean(row[name] for row in rows) for name in READERS}
    print_row("all", mean)
    print(f"eight GPUs at a batch of 6 a second each: {48 * mean['ours']:.1f} cores")
