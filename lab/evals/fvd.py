"""Fréchet video distance of two sets of videos (E.3).

    python -m lab.evals.fvd REAL GEN --i3d i3d_torchscript.pt

REAL and GEN are folders of videos, lists, or folders of encoded clips. Published figures are of 10,000 videos and more,
the least distance of three choices of them.
"""

import hashlib
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import sd
from cli import beside, one_line, option, parse, read_size, run, warn
from clips.decode import Bad, frames_at, opened
from clips.encoded import EncodedClips
from clips.lists import Items
from clips.pictures import View, fit_frame
from lab.metrics import Gaussian, frechet_distance
from sd.device import pick_device
from sd.vae import decode

ENOUGH = 10_000  # videos: from there on the distance is stable (Figure 17)

# ---------------------------------------------------------------------------------------------------------------------
# Clips to compare: uint8 (T, H, W, 3), each from a place in its video that the seed chooses


class ListedVideos:
    """Clips of a folder of videos, or of a list; fps None takes consecutive frames."""

    def __init__(self, path: str, frames: int, size: tuple[int, int], fps: float | None):
        self.path, self.frames, self.size, self.fps, self.items = path, frames, size, fps, Items("video", path)

    def __len__(self):
        return len(self.items)

    def name(self, i: int) -> str:
        return self.items.name(i)

    def clip(self, i: int, seed: int) -> np.ndarray:
        """Raises Bad."""
        with opened(self.items.file(self.items.fields(i))) as video:
            fps = self.fps or video.rate
            room = video.duration - (self.frames - 1) / fps
            if room <= 0:
                raise Bad("too short")
            start = room * chosen_place(i, seed)
            frames = frames_at(video, [start + t / fps for t in range(self.frames)])
            return np.stack([fit_frame(f, video.aspect, *self.size, View()).permute(1, 2, 0) for f in frames])


class EncodedVideos:
    """Clips of a folder that clips.encode has written, decoded by the VAE of a model."""

    def __init__(self, path: str, frames: int, size: tuple[int, int], fps: float | None, model: sd.Model | None):
        self.path, self.fps, self.model, self.items = path, fps, model, EncodedClips(path, text=False)
        spec = self.items.spec
        if model is None:
            raise ValueError(f"ckpt must be given, {path} holds encoded clips: the model whose VAE decodes them")
        if (spec.frames, spec.width, spec.height) != (frames, *size) or fps not in spec.fps_values:
            rates = ", ".join(f"{f:g}" for f in spec.fps_values)
            raise ValueError(f"{path} holds {spec.frames} frames of {spec.width}x{spec.height} at {rates} FPS: ask for "
                             "that with --frames, --size and --fps")

    def __len__(self):
        return self.items.count("video")

    def name(self, i: int) -> str:
        return self.items.name("video", i)

    def clip(self, i: int, seed: int) -> np.ndarray:
        """Raises Bad."""
        lines = [line for line in self.items.lines("video", i) if line.get("fps") == self.fps and "bad" not in line]
        if not lines:
            raise Bad(f"not encoded at {self.fps:g} FPS")
        sample = self.items.sample_of(lines[int(chosen_place(i, seed) * len(lines))])
        mean = sample.data.float().chunk(2, dim=1)[0]
        return decode(self.model, mean[None] * self.model.settings.latent_scale)[0]


def chosen_place(i: int, seed: int) -> float:
    return np.random.default_rng([seed, i]).random()


# ---------------------------------------------------------------------------------------------------------------------
# Their features


class Detector:
    """Features of clips by the TorchScript I3D that published FVDs use; those of a clip seen before come from a cache.

    The file is called as detector(video (N, 3, T, H, W) in 0..255, rescale=True, resize=True, return_features=True).
    """

    def __init__(self, path: str, cache: str, device):
        try:
            self.net = torch.jit.load(path, map_location=device).eval()
            with open(path, "rb") as file:
                key = hashlib.sha256(file.read()).hexdigest()
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"i3d must be a TorchScript file, got {path!r}: {one_line(error)}") from error
        self.device, self.folder = device, os.path.join(cache, key[:16])
        os.makedirs(self.folder, exist_ok=True)

    def __call__(self, clips: list[np.ndarray]) -> torch.Tensor:
        """uint8 (T, H, W, 3) each -> (N, D)."""
        keys = [hashlib.sha256(str(clip.shape).encode() + clip.tobytes()).hexdigest() for clip in clips]
        paths = [os.path.join(self.folder, key + ".npy") for key in keys]
        new = {path: clip for path, clip in zip(paths, clips) if not os.path.exists(path)}
        if new:
            for path, feature in zip(new, self.features(list(new.values()))):
                self.keep(path, feature)
        return torch.from_numpy(np.stack([np.load(path) for path in paths]))

    def features(self, clips: list[np.ndarray]) -> np.ndarray:
        video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float().to(self.device)
        try:
            with torch.no_grad():
                return self.net(video, rescale=True, resize=True, return_features=True).float().cpu().numpy()
        except RuntimeError as error:
            raise ValueError(f"the network of i3d cannot be called as I3D is: {one_line(error)}") from error

    def keep(self, path: str, feature: np.ndarray):
        try:
            with beside(path) as part, open(part, "wb") as file:
                np.save(file, feature)
        except OSError:
            if not os.path.exists(path):  # another run that shares the cache was faster
                raise


def gaussian_of(videos, detector: Detector, seed: int, limit: int, batch_size=8) -> Gaussian:
    """Fit a Gaussian to the features of at most `limit` videos, drawn by the seed. What cannot be used is named."""
    gaussian, clips, bad = None, [], 0
    order = np.random.default_rng(seed).permutation(len(videos))[:limit]
    for n, i in enumerate(tqdm(order, desc=videos.path, unit="video", file=sys.stderr)):
        try:
            clips.append(videos.clip(int(i), seed))
        except Bad as error:
            bad += 1
            print(f"skipped {videos.name(int(i))}: {error}", file=sys.stderr)
        if clips and (len(clips) == batch_size or n == len(order) - 1):
            features = detector(clips)
            gaussian = gaussian or Gaussian(features.shape[1])
            gaussian.add(features)
            clips = []
    if gaussian is None or gaussian.n < 2:
        raise ValueError(f"{videos.path}: {bad} of {len(order)} videos cannot be used, and at least two are needed")
    return gaussian


# ---------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class Options:
    real: str = option(None, "a folder of videos, a list, or encoded clips", positional=True)
    gen: str = option(None, "the same, to compare with", positional=True)
    i3d: str = option("", "i3d_torchscript.pt, which most papers use", metavar="FILE")
    videos: int = option(ENOUGH, "at most, of each set", low=1)
    frames: int = option(16, "of a clip", low=1)
    fps: float | None = option(None, "to sample both at (default: consecutive frames)", above=0)
    size: tuple[int, int] = option((256, 256), "frames are brought to, before I3D's own 224x224", metavar="WxH",
                                   read=read_size)
    seeds: int = option(3, "choices of videos and starts; the least distance counts", low=1)
    ckpt: str = option("", "the model whose VAE decodes encoded clips")
    cache: str = option("~/.cache/etc-video/features", "of features, by content", metavar="FOLDER")
    device: str = option("", "cuda, mps or cpu (default: the first of them that is there)")


def main():
    o = parse(Options, __doc__)
    for path in filter(None, (o.real, o.gen, o.i3d)):
        os.stat(path)  # now, not after a model is loaded
    device = pick_device(o.device)
    model = sd.load(o.ckpt, device) if o.ckpt else None
    sets = [EncodedVideos(path, o.frames, o.size, o.fps, model) if os.path.isfile(os.path.join(path, "spec.json")) else
            ListedVideos(path, o.frames, o.size, o.fps) for path in (o.real, o.gen)]
    detector, distances = Detector(o.i3d, os.path.expanduser(o.cache), device), []
    for seed in range(o.seeds):
        one, two = (gaussian_of(videos, detector, seed, o.videos) for videos in sets)
        distances.append(frechet_distance(one, two))
    print(f"FVD {min(distances):.2f} (the least of {o.seeds} seeds; {', '.join(f'{d:.2f}' for d in distances)}), "
          f"{one.n} real and {two.n} generated videos of {o.frames} frames")
    if min(one.n, two.n) < ENOUGH:
        few = min(one.n, two.n) <= len(one.mean)
        warn(f"below {ENOUGH:,} videos the distance is too large, and not to be compared with published ones"
             + (f"; of {min(one.n, two.n)} for {len(one.mean)} features it says next to nothing" if few else ""))


if __name__ == "__main__":
    run(main)
