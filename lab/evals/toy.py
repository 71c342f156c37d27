"""x"""

import json
import math
import sys
from collections import Counter

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cli import check_writable
from lab import toy
from lab.metrics import Gaussian, frechet_distance, wilson
from sample import generate
from sd.checkpoint import load

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
        raise ValueError(f"--failures {args.failures}: the file must end in .png")
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
