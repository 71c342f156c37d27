"""How good is a model, or a set of videos?

    python eval.py toy --ckpt weights/tiny.safetensors       # prompts of the toy world have right answers
    python eval.py fvd REAL GEN --i3d i3d_torchscript.pt     # Fréchet video distance
    python eval.py clip VIDEOS --prompts FILE                # how well videos show what was asked for
    python eval.py vae --ckpt weights/tiny.safetensors       # what encoding the stitched grid would cost
    python eval.py ablation                                  # the paper's ablations again, in small
"""

import hashlib
import importlib.util
import itertools
import json
import math
import os
import sys
from collections import Counter

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from clips.media import Bad, View, fit_frame, frames_at, opened
from clips.prepare import INVERSE_TEMPERATURE, ClipScore, spaced_frames
from data import EncodedClips, Items, encode_frames
from grid import fold, grid_shape, unfold
from lab import ablation, toy
from lab.metrics import Gaussian, frechet_distance, psnr, ssim_map, wilson
from sample import SHIPPED, NoiseSchedule, check_frames, check_writable, decode, generate, pick_device
from sd.checkpoint import Parser, UserError, command_line, first_line, load, number_from, parse_size

# ---------------------------------------------------------------------------------------------------------------------
# The toy world

ANSWERS = ("color", "shape", "direction", "background")


def sample_all(model, jobs, batch_size=8, **options):
    """Videos of jobs, each (prompt, seed), in their order: a generator of uint8 (T, H, W, 3)."""
    bar = tqdm(total=len(jobs), unit="video", desc="sample", file=sys.stderr)
    for at in range(0, len(jobs), batch_size):
        prompts, seeds = zip(*jobs[at : at + batch_size])
        yield from generate(model, list(prompts), seeds=list(seeds), **options)
        bar.update(len(prompts))
    bar.close()


def grade_prompts(model, split: str, seeds: int, **options):
    """Every triple of a split on every background, `seeds` times each.

    Returns (names of what was graded -> how often right, number of videos, wrong cuts, failures, tracks), a failure
    being (prompt, seed, what the grader read, video).
    """
    jobs = [(toy.caption(*scene), seed) for scene in toy.scenes(split) for seed in range(seeds)]
    right, cuts, failures, tracks = Counter(), 0, [], []
    for (prompt, seed), video in zip(jobs, sample_all(model, jobs, **options)):
        seen, wanted = toy.grade(video), toy.expected(prompt)
        read = [getattr(seen, name) for name in ANSWERS]
        for name, got, want in zip(ANSWERS, read, wanted):
            right[name] += got == want  # None, "cannot tell", is wrong
        cuts += seen.wrong_cut
        tracks.append(track(seen))
        if tuple(read) != tuple(wanted) or seen.wrong_cut:
            failures.append((prompt, seed, read + ["wrong cut"] * seen.wrong_cut, video))
    return right, len(jobs), cuts, failures, torch.stack(tracks)


def track(seen: toy.Grade) -> torch.Tensor:
    """A video as a trajectory: position and speed (px), side (px) and colour (tenths of a level) of each frame, one
    after the other (8 T - 2,). A frame without a shape has one of size 0 in the middle."""
    centers = np.nan_to_num(seen.centers, nan=toy.SIZE / 2)
    parts = centers, np.diff(centers, axis=0), np.sqrt(np.nan_to_num(seen.areas)), np.nan_to_num(seen.paints) / 10
    return torch.from_numpy(np.concatenate([part.ravel() for part in parts]))


def trajectory_distances(tracks: torch.Tensor, split: str, seeds: int, fps: float) -> dict[str, float]:
    """The toy stand-in for FVD: distance of tracks to those of as many true renders, and of two sets of these."""
    frames = (tracks.shape[1] + 2) // 8
    wanted = [scene for scene in toy.scenes(split) for _ in range(seeds)]
    sets = [torch.stack([track(toy.grade(toy.true_render(scene, rng, frames, fps))) for scene in wanted])
            for rng in (np.random.default_rng(0), np.random.default_rng(1))]
    gaussians = [Gaussian(tracks.shape[1]) for _ in range(3)]
    for gaussian, features in zip(gaussians, [tracks, *sets]):
        gaussian.add(features)
    return {"model": frechet_distance(*gaussians[:2]), "true": frechet_distance(*gaussians[1:])}


def grade_fps(model, split: str, fps_values, **options):
    """FPS -> (median px a frame along the asked direction, share of the clips where a motion can be read, scatter).

    The scatter is the mean distance between the shape in two consecutive frames: large where frames are unrelated.
    """
    jobs = [(toy.caption(*triple, background), 1000)
            for triple in toy.triples(split) for background in list(toy.BACKGROUNDS)[:2]]
    table = {}
    for fps in fps_values:
        speeds, steps = [], []
        for (prompt, _), video in zip(jobs, sample_all(model, jobs, fps=fps, **options)):
            seen, wanted = toy.grade(video), toy.DIRECTIONS[toy.expected(prompt)[2]]
            times = np.flatnonzero(~np.isnan(seen.centers[:, 0]))
            if len(times) < 3:
                continue
            path = seen.centers[times]
            speeds.append(np.polyfit(times, path @ wanted, 1)[0])
            steps.append(np.linalg.norm(np.diff(path, axis=0), axis=1).mean())
        table[fps] = (float(np.median(speeds)), len(speeds) / len(jobs), float(np.median(steps))) if speeds else None
    return table


def command_toy(args):
    for option in ("json", "failures"):  # now, not after minutes
        if getattr(args, option):
            check_writable(getattr(args, option))
    if args.failures and not args.failures.lower().endswith(".png"):
        raise UserError(f"--failures {args.failures}: the file must end in .png")
    model = load(args.ckpt, args.device)
    guidance = model.settings.guidance if args.guidance is None else args.guidance
    eta = model.settings.eta if args.eta is None else args.eta
    options = {"steps": args.steps, "guidance": guidance, "eta": eta}
    right, n, cuts, failures, tracks = grade_prompts(model, args.split, args.seeds, **options)
    print(f"{args.ckpt}, {args.split} triples, {n} videos, {args.steps} steps, guidance {guidance:g}, eta {eta:g}")
    result = {"ckpt": args.ckpt, "split": args.split, "videos": n, **options}
    for name, count in [*((name, right[name]) for name in ANSWERS), ("wrong cuts", cuts)]:
        low, high = wilson(count, n)
        print(f"  {name:<11}{count:>5} / {n}   {count / n:6.1%}   [{low:.1%}, {high:.1%}]")
        result[name] = {"count": count, "low": low, "high": high}
    far = result["trajectories"] = trajectory_distances(tracks, args.split, args.seeds, model.settings.fps)
    print(f"  Fréchet distance of trajectories to true ones {far['model']:.1f}, of two true sets {far['true']:.1f}")
    if not args.no_fps:
        print("  FPS   px a frame   10/FPS   ratio   px between frames")
        for fps, row in grade_fps(model, args.split, (4, 8, 15, 30, 60, 120, 0), **options).items():
            speed, _, scatter = row or (math.nan, 0, math.nan)
            true = f"{10 / fps:8.2f} {speed * fps / 10:7.2f}" if 1 <= fps <= 60 else " " * 16
            print(f"  {fps:>3}   {speed:10.3f} {true}   {scatter:17.2f}")
            result[f"fps {fps}"] = {"px_per_frame": speed, "px_between_frames": scatter}
    if args.json:
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    if args.failures and failures:
        show_failures(args.failures, failures)


def show_failures(path: str, failures):
    """A picture with one row a failed video; what was asked and read is printed."""
    rows = [contact_sheet_row(video) for *_, video in failures[:24]]
    Image.fromarray(np.concatenate(rows)).save(path)
    print(f"  failures, row by row ({path}):")
    for prompt, seed, read, _ in failures[:24]:
        print(f"    {prompt!r} seed {seed}: read {', '.join(str(answer) for answer in read)}")


def contact_sheet_row(video):
    """(T, H, W, 3) -> (H + 2, T * (W + 2), 3)."""
    return np.pad(video, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255).transpose(1, 0, 2, 3).reshape(
        video.shape[1] + 2, -1, 3)


def command_ablation(args):
    if not importlib.util.find_spec("matplotlib"):
        raise UserError('the figure wants matplotlib: pip install -e ".[dev]"')
    for path in (args.results, args.figure):  # now, not after hours
        check_writable(path)
    ablation.ablate(args.results, score)
    results = ablation.read_results(args.results)
    print("\n".join(ablation.tables(results)))
    ablation.figure(results, args.figure)
    print(args.figure)


def score(model, fps_values) -> dict:
    """What is noted of a model of the ablations."""
    options = {"batch_size": 24, "steps": 25}
    right, n, cuts, _, tracks = grade_prompts(model, "test", seeds=1, **options)
    rows = grade_fps(model, "test", fps_values, **options)
    return {"videos": n, **{name: right[name] for name in ANSWERS}, "wrong cuts": cuts,
            "trajectories": trajectory_distances(tracks, "test", 1, model.settings.fps)["model"],
            "px a frame": {fps: row[0] if row else math.nan for fps, row in rows.items()}}


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
            raise UserError(f"{path} holds encoded clips: say with --ckpt which model's VAE decodes them")
        self.items = EncodedClips(path, text=False) if self.encoded else Items("video", path)
        if self.encoded:
            spec = self.items.spec
            if (spec.frames, spec.width, spec.height) != (frames, *size) or fps not in spec.fps_values:
                rates = ", ".join(f"{f:g}" for f in spec.fps_values)
                raise UserError(f"{path} holds {spec.frames} frames of {spec.width}x{spec.height} at {rates} FPS: ask "
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
            raise UserError(f"--i3d {path} is not a TorchScript file: {first_line(error)}") from error
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
                raise UserError(f"the network of --i3d cannot be called as I3D is: {first_line(error)}") from error
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
        raise UserError(f"{videos.path}: {bad} of {len(order)} videos cannot be used, and two at least are needed")
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


# ---------------------------------------------------------------------------------------------------------------------
# CLIP score


def command_clip(args):
    """100 x the cosine between a video's caption and its frames, mean over frames, then over videos."""
    items = Items("video", args.videos)
    prompts = None
    if args.prompts:
        with open_text(args.prompts) as file:
            prompts = [line.strip() for line in file if line.strip()]
        if len(prompts) != len(items):
            raise UserError(f"{args.prompts} has {len(prompts)} prompts for {len(items)} videos of {args.videos}")
    clip, scores = ClipScore(args.model, args.pretrained, args.device), []
    for i in tqdm(range(len(items)), unit="video", file=sys.stderr):
        try:
            path, captions = (items.name(i), (prompts[i],)) if prompts else (items[i].path, items[i].captions)
            scores.append(100 / INVERSE_TEMPERATURE * clip(spaced_frames(path, args.frames), captions))
        except Bad as error:
            print(f"skipped {items.name(i)}: {error}", file=sys.stderr)
    if not scores:
        raise UserError(f"no video of {args.videos} can be used")
    error = np.std(scores, ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    print(f"CLIP score {np.mean(scores):.2f} (standard error {error:.2f}), {len(scores)} videos, {args.model}")


def open_text(path: str):
    try:
        return open(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The VAE (appendix H): frames encoded one by one, or stitched first

BORDER = 8  # pixels from a frame's edge: one latent pixel of Stable Diffusion


def reconstructions(model, frames: torch.Tensor):
    """frames uint8 (T, 3, H, W) -> what comes back in 0..1, encoded one by one and as one stitched image."""
    rows, cols = grid_shape(len(frames))
    for images in (frames, fold(frames[None], rows, cols)):
        mean = encode_frames(model.vae, images).chunk(2, dim=1)[0]
        with torch.no_grad():
            back = torch.cat([model.vae.decode(part) for part in mean.split(16)]).float().clamp(-1, 1) / 2 + 0.5
        yield back if len(back) == len(frames) else unfold(back, rows, cols)[0]


def vae_scores(model, clips) -> dict[str, dict[str, float]]:
    """How -> PSNR and SSIM inside the frames and along their borders, the mean over clips."""
    scores = {"one by one": [], "stitched": []}
    for frames in clips:
        true = frames.float() / 255
        height, width = true.shape[-2:]
        border = torch.ones(height, width)
        border[BORDER:-BORDER, BORDER:-BORDER] = 0
        for how, back in zip(scores, reconstructions(model, frames)):
            similar, edge = ssim_map(true, back.cpu()), border[3:-3, 3:-3]
            mean = similar.mean(dim=(0, 1))
            scores[how].append([psnr(true, back.cpu(), 1 - border), psnr(true, back.cpu(), border),
                                (mean * (1 - edge)).sum() / (1 - edge).sum(), (mean * edge).sum() / edge.sum()])
    names = "PSNR inside", "PSNR border", "SSIM inside", "SSIM border"
    return {how: dict(zip(names, np.mean(rows, axis=0).tolist())) for how, rows in scores.items()}


def toy_clips(frames: int):
    """True renders without end, uint8 (T, 3, 64, 64) each."""
    rng = np.random.default_rng(0)
    for scene in itertools.cycle(toy.scenes("test")):
        clip = toy.true_render(scene, rng, frames, 4 if frames <= 16 else frames / toy.SECONDS)
        yield torch.from_numpy(clip).permute(0, 3, 1, 2)


def listed_clips(path: str, frames: int, size: tuple[int, int]):
    """The usable clips of a list."""
    videos = VideoSet(path, frames, size, None, None)
    for i in range(len(videos)):
        try:
            yield torch.from_numpy(videos.clip(i, 0)).permute(0, 3, 1, 2)
        except Bad as error:
            print(f"skipped {videos.name(i)}: {error}", file=sys.stderr)


def command_vae(args):
    model = load(args.ckpt, args.device)
    size = parse_size(args.size) if args.size else (model.settings.width, model.settings.height)
    frames = args.frames or model.settings.frames
    check_frames(frames)
    clips = listed_clips(args.video, frames, size) if args.video else toy_clips(frames)
    clips = list(itertools.islice(clips, args.clips))
    if not clips:
        raise UserError("there is no clip to encode")
    scores = vae_scores(model, clips)
    print(f"{args.ckpt}, {len(clips)} clips of {frames} frames; border: {BORDER} pixels")
    print(f"{'':<12}" + "".join(f"{name:>13}" for name in scores["stitched"]))
    for how, row in scores.items():
        print(f"{how:<12}" + "".join(f"{value:>13.{2 if name[0] == 'P' else 4}f}" for name, value in row.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = Parser(description="Score a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("toy", help="grade videos of the toy world's prompts")
    p.add_argument("--ckpt", default=SHIPPED)
    p.add_argument("--split", choices=("test", "val", "train"), default="test",
                   help="test: the held-out triples; val: those that guidance, eta and checkpoint are chosen on")
    p.add_argument("--seeds", type=number_from(1), default=4, help="videos a prompt")
    p.add_argument("--steps", type=number_from(1, NoiseSchedule.timesteps), default=50)
    p.add_argument("--guidance", type=float, help="default: the model's")
    p.add_argument("--eta", type=number_from(0, 1, float), help="default: the model's")
    p.add_argument("--no_fps", action="store_true", help="leave out the table of motion against FPS")
    p.add_argument("--json", metavar="FILE", help="append the numbers to a JSON-lines file")
    p.add_argument("--failures", metavar="FILE.png", help="a picture of the videos that were graded wrong")
    p.set_defaults(run=command_toy)

    p = commands.add_parser("fvd", help="Fréchet video distance of two sets of videos")
    p.add_argument("real", metavar="REAL", help="a folder of videos, a list, or encoded clips")
    p.add_argument("gen", metavar="GEN", help="likewise")
    p.add_argument("--i3d", required=True, metavar="FILE", help="i3d_torchscript.pt, which most papers use")
    p.add_argument("--videos", type=number_from(1), default=ENOUGH, help="at most, of each set")
    p.add_argument("--frames", type=number_from(1), default=16)
    p.add_argument("--fps", type=float, help="to sample both at (default: consecutive frames)")
    p.add_argument("--size", default="256x256", metavar="WxH", help="frames are brought to, before I3D's own 224x224")
    p.add_argument("--seeds", type=number_from(1), default=3,
                   help="choices of videos and starts; the least distance counts")
    p.add_argument("--ckpt", help="the model whose VAE decodes encoded clips")
    p.add_argument("--cache", default=os.path.expanduser("~/.cache/etc-video/features"), help="of features, by content")
    p.set_defaults(run=command_fvd)

    p = commands.add_parser("clip", help="CLIP score of videos and their captions")
    p.add_argument("videos", metavar="LIST_OR_DIR")
    p.add_argument("--prompts", metavar="FILE", help="one a line, in the order of the videos, instead of captions")
    p.add_argument("--frames", type=number_from(1), default=16, help="scored of each video")
    p.add_argument("--model", default="ViT-B-32", help="of open_clip")
    p.add_argument("--pretrained", default="openai", help="open_clip's name of the weights, or a file")
    p.set_defaults(run=command_clip)

    p = commands.add_parser("vae", help="PSNR and SSIM of frames encoded one by one and stitched")
    p.add_argument("--ckpt", default=SHIPPED)
    p.add_argument("--video", metavar="LIST", help="clips to encode (default: true renders of the toy world)")
    p.add_argument("--clips", type=number_from(1), default=48)
    p.add_argument("--frames", type=number_from(1), help="(default: the model's)")
    p.add_argument("--size", metavar="WxH", help="of frames of a list (default: the model's)")
    p.set_defaults(run=command_vae)

    for p in commands.choices.values():
        p.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")

    p = commands.add_parser("ablation", help="the paper's ablations in small: trains what has no result yet")
    p.add_argument("--results", default="docs/ablation.jsonl", metavar="FILE", help="one line a run, appended to")
    p.add_argument("--figure", default="docs/ablation.png", metavar="FILE.png")
    p.set_defaults(run=command_ablation)
    args = parser.parse_args()
    if "device" in args:
        args.device = pick_device(args.device)
    args.run(args)


if __name__ == "__main__":
    command_line(main)
