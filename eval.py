"""How good is a model? Prompts of the toy world have right answers, so its videos can be graded.

    python eval.py toy --ckpt weights/tiny.safetensors
"""

import json
import math
import sys
from collections import Counter

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import toy
from checkpoint import Parser, command_line, load
from sample import SHIPPED, generate

# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def wilson(right: int, n: int, z=1.96) -> tuple[float, float]:
    """95% Wilson interval of a share of `right` in n: it stays inside 0..1, and is honest at 0 and 1."""
    p, zz = right / n, z * z
    middle, spread = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return (middle - spread) / (1 + zz / n), (middle + spread) / (1 + zz / n)


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

    Returns (names of what was graded -> how often right, number of videos, wrong cuts, failures), a failure being
    (prompt, seed, what the grader read, video).
    """
    jobs = [(toy.caption(*triple, background), seed)
            for triple in toy.triples(split) for background in toy.BACKGROUNDS for seed in range(seeds)]
    right, cuts, failures = Counter(), 0, []
    for (prompt, seed), video in zip(jobs, sample_all(model, jobs, **options)):
        seen, wanted = toy.grade(video), toy.expected(prompt)
        read = [getattr(seen, name) for name in ANSWERS]
        for name, got, want in zip(ANSWERS, read, wanted):
            right[name] += got == want  # None, "cannot tell", is wrong
        cuts += seen.wrong_cut
        if tuple(read) != tuple(wanted) or seen.wrong_cut:
            failures.append((prompt, seed, read + ["wrong cut"] * seen.wrong_cut, video))
    return right, len(jobs), cuts, failures


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
    model = load(args.ckpt, args.device)
    options = {"steps": args.steps, "guidance": args.guidance}
    guidance = model.settings.guidance if args.guidance is None else args.guidance
    with torch.no_grad():
        right, n, cuts, failures = grade_prompts(model, args.split, args.seeds, **options)
    print(f"{args.ckpt}, {args.split} triples, {n} videos, {args.steps} steps, guidance {guidance:g}")
    result = {"ckpt": args.ckpt, "split": args.split, "videos": n, "steps": args.steps, "guidance": guidance}
    for name, count in [*((name, right[name]) for name in ANSWERS), ("wrong cuts", cuts)]:
        low, high = wilson(count, n)
        print(f"  {name:<11}{count:>5} / {n}   {count / n:6.1%}   [{low:.1%}, {high:.1%}]")
        result[name] = {"count": count, "low": low, "high": high}
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
    """A picture with one row a failed video, and beside the file a text with what was asked and read."""
    rows = [contact_sheet_row(video) for *_, video in failures[:24]]
    Image.fromarray(np.concatenate(rows)).save(path)
    print(f"  failures, row by row ({path}):")
    for prompt, seed, read, _ in failures[:24]:
        print(f"    {prompt!r} seed {seed}: read {', '.join(str(answer) for answer in read)}")


def contact_sheet_row(video):
    """(T, H, W, 3) -> (H + 2, T * (W + 2), 3)."""
    return np.pad(video, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255).transpose(1, 0, 2, 3).reshape(
        video.shape[1] + 2, -1, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = Parser(description="Score a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("toy", help="grade videos of the toy world's prompts")
    p.add_argument("--ckpt", default=SHIPPED)
    p.add_argument("--split", choices=("test", "val", "train"), default="test",
                   help="test: the held-out triples; val: those that guidance and checkpoint are chosen on")
    p.add_argument("--seeds", type=int, default=4, help="videos a prompt")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--guidance", type=float, help="default: the model's")
    p.add_argument("--no_fps", action="store_true", help="leave out the table of motion against FPS")
    p.add_argument("--json", metavar="FILE", help="append the numbers to a JSON-lines file")
    p.add_argument("--failures", metavar="FILE.png", help="a picture of the videos that were graded wrong")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    {"toy": command_toy}[args.command](args)


if __name__ == "__main__":
    command_line(main)
