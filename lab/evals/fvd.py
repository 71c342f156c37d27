"""x"""

import hashlib
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

from cli import one_line
from clips.decode import Bad, frames_at, opened
from clips.encoded import EncodedClips
from clips.lists import Items
from clips.pictures import View, fit_frame
from lab.metrics import Gaussian, frechet_distance
from sample import decode
from sd.checkpoint import load, parse_size

# ---------------------------------------------------------------------------------------------------------------------
# Fréchet video distance (E.3)


ENOUGH = 10_000  # videos: from there on the distance is stable (Figure 17)


class VideoSet:
    """Clips to compare: uint8 (T, H, W, 3), each from a place in its video that the seed chooses.

    path  a folder of videos, a list, or a folder of encoded clips, for which a model must be given
    fps   to sample at; None takes consecutive frames
    """

    def __init__(self, path: str, frames: int, size: tuple[int, int], fps: float | None, model):
        self.path, self.frames, self.size, self.fps, self.model = path, frames, size, fps, model
        self.encoded = os.path.isfile(os.path.join(path, "spec.json"))
        if self.encoded and model is None:
            raise ValueError(f"{path} holds encoded clips: say with --ckpt which model's VAE decodes them")
        self.items = EncodedClips(path, text=False) if self.encoded else Items("video", path)
        if self.encoded:
            spec = self.items.spec
            if (spec.frames, spec.width, spec.height) != (frames, *size) or fps not in spec.fps_values:
                rates = ", ".join(f"{f:g}" for f in spec.fps_values)
                raise ValueError(f"{path} holds {spec.frames} frames of {spec.width}x{spec.height} at {rates} FPS: ask "
                                "for that with --frames, --size and --fps")

    def __len__(self):
        return self.items.count("video") if self.encoded else len(self.items)

    def name(self, i: int) -> str:
        return self.items.name("video", i) if self.encoded else self.items.name(i)

    def clip(self, i: int, seed: int):
        """Raises Bad."""
        u = np.random.default_rng([seed, i]).random()
        if self.encoded:
            lines = [line for line in self.items.lines("video", i) if line.get("fps") == self.fps and "bad" not in line]
            if not lines:
                raise Bad(f"not encoded at {self.fps:g} FPS")
            line = lines[int(u * len(lines))]
            mean = self.items.tensor(line["shard"], "moments", line["row"]).float().chunk(2, dim=1)[0]
            return decode(self.model, mean[None] * self.model.settings.latent_scale)[0]
        with opened(self.items.file(self.items.fields(i))) as video:
            fps = self.fps or video.rate
            room = video.duration - (self.frames - 1) / fps
            if room <= 0:
                raise Bad("too short")
            chosen = frames_at(video, [u * room + t / fps for t in range(self.frames)])
            return torch.stack([fit_frame(f, video.aspect, *self.size, View()) for f in chosen]).permute(
                0, 2, 3, 1).numpy()


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
            raise ValueError(f"--i3d {path} is not a TorchScript file: {one_line(error)}") from error
        self.device, self.folder = device, os.path.join(cache, key[:16])
        os.makedirs(self.folder, exist_ok=True)

    def __call__(self, clips: list) -> torch.Tensor:
        """uint8 (T, H, W, 3) each -> (N, D)."""
        keys = [hashlib.sha256(str(clip.shape).encode() + clip.tobytes()).hexdigest() for clip in clips]
        paths = [os.path.join(self.folder, key + ".npy") for key in keys]
        new = [n for n, path in enumerate(paths) if not os.path.exists(path)]
        if new:
            video = torch.from_numpy(np.stack([clips[n] for n in new])).permute(0, 4, 1, 2, 3).float().to(self.device)
            try:
                with torch.no_grad():
                    features = self.net(video, rescale=True, resize=True, return_features=True).float().cpu().numpy()
            except RuntimeError as error:
                raise ValueError(f"the network of --i3d cannot be called as I3D is: {one_line(error)}") from error
            for n, feature in zip(new, features):
                with open(paths[n] + ".part", "wb") as file:
                    np.save(file, feature)
                os.replace(paths[n] + ".part", paths[n])
        return torch.from_numpy(np.stack([np.load(path) for path in paths]))


def gaussian_of(videos: VideoSet, detector: Detector, seed: int, limit: int, batch_size=8) -> Gaussian:
    """Of at most `limit` videos, drawn by the seed. What cannot be used is named and left out."""
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
        raise ValueError(f"{videos.path}: {bad} of {len(order)} videos cannot be used, and two at least are needed")
    return gaussian


def command_fvd(args):
    model = load(args.ckpt, args.device) if args.ckpt else None
    sets = [VideoSet(path, args.frames, parse_size(args.size), args.fps, model) for path in (args.real, args.gen)]
    detector, distances = Detector(args.i3d, args.cache, args.device), []
    for seed in range(args.seeds):
        one, two = (gaussian_of(videos, detector, seed, args.videos) for videos in sets)
        distances.append(frechet_distance(one, two))
    print(f"FVD {min(distances):.2f} (the least of {args.seeds} seeds; {', '.join(f'{d:.2f}' for d in distances)}), "
          f"{one.n} real and {two.n} generated videos of {args.frames} frames")
    if min(one.n, two.n) < ENOUGH:
        print(f"warning: below {ENOUGH:,} videos the distance is too large and not to be compared with published ones"
              + (f"; with {min(one.n, two.n)} for {len(one.mean)} features it says next to nothing"
                 if min(one.n, two.n) <= len(one.mean) else ""), file=sys.stderr)
