"""Grade a model on the toy world, whose prompts have right answers: colour, shape, direction, background, wrong cuts.

    python -m lab.evals.toy --ckpt runs/tiny/model.safetensors --no_fps
    python -m lab.evals.toy --level 2               # two shapes, each with its own direction, and for mixing them up
    python -m lab.evals.toy --task first            # with given frames, or a prompt for every frame: lab/evals/given.py

Prints how many videos are right, with 95% Wilson intervals, and how far things move at each frame rate; of a task, how
many are right, beside what the same weights do by replacement, as if they had never been trained with given frames.
"""

import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import sd
from cli import beside, check_writable, option, parse, run
from clips.write import contact_sheet
from lab import toy
from lab.bench import timing
from lab.evals import given
from lab.metrics import Gaussian, frechet_distance, wilson
from sample import SAMPLERS, SHIPPED, NoiseSchedule, Request, generate

EACH = ("color", "shape", "direction")  # of each shape
ANSWERS = (*EACH, "background")

# ---------------------------------------------------------------------------------------------------------------------
# Prompts with right answers


@dataclass
class Report:
    """What the grader says of a model's videos."""

    videos: int
    right: Counter  # of ANSWERS, or of those of a task: in how many videos
    wrong_cuts: int
    failures: list  # (prompt, seed, what was read or is wrong, video)
    tracks: torch.Tensor | None = None  # (N, level (8 T - 2)), see `track`
    level: int = 1  # of two shapes, EACH counts twice a video
    mixed_up: int = 0  # at level 2, in how many videos, see `Judgement`

    def counts(self) -> dict[str, tuple[int, int]]:
        """What was counted -> (how many, of how many)."""
        of = {name: self.videos * (self.level if name in EACH else 1) for name in self.right}
        wrong = {"wrong cuts": self.wrong_cuts} | ({"mixed up": self.mixed_up} if self.level == 2 else {})
        return {name: (count, of.get(name, self.videos)) for name, count in [*self.right.items(), *wrong.items()]}


@dataclass
class Judgement:
    """What a video shows of a scene of any level."""

    seen: tuple[toy.Grade, ...]  # in the order of the scene's shapes
    right: dict[str, int]  # of ANSWERS, how many are right; "all": whether everything is, and nothing is cut wrongly
    mixed_up: bool  # a shape has the colour, shape or direction of the other instead of its own
    said: str  # what was read, and is wrong


def judge(scene, video) -> Judgement:
    """Grade a video, uint8 (T, H, W, 3), by the scene that it should show. Which of two shapes is the first is what
    makes most answers right, and where that is a tie, most colours."""
    wanted = toy.things(scene)

    def agreement(seen):
        same = matches(seen, wanted)
        return same.sum(), same[:, 0].sum()

    seen = max(permutations(toy.grade_pair(video)), key=agreement) if len(wanted) == 2 else (toy.grade(video),)
    same, background, cut = matches(seen, wanted), seen[0].background, seen[0].wrong_cut
    right = dict(zip(ANSWERS, map(int, [*same.sum(0), background == scene[-1]])))
    right["all"] = int(same.all() and background == scene[-1] and not cut)
    mixed_up = bool((matches(seen, wanted[::-1]) & ~same).any())
    read = [getattr(one, name) for one in seen for name in EACH] + [background]
    said = ["read " + ", ".join(map(str, read))] + ["wrong cut"] * cut + ["mixed up"] * mixed_up
    return Judgement(seen, right, mixed_up, ", ".join(said))


def matches(seen, wanted) -> np.ndarray:
    """Whether (shapes, EACH) grades are as wanted; None, "cannot tell", never is."""
    return np.array([[getattr(one, name) == word for name, word in zip(EACH, thing)]
                     for one, thing in zip(seen, wanted)])


def sample_all(model: sd.Model, jobs, request: Request, batch_size: int):
    """Yield a video, uint8 (T, H, W, 3), for each of the jobs, (prompt, seed), in their order."""
    with tqdm(total=len(jobs), unit="video", desc="sample", file=sys.stderr) as bar:
        for at in range(0, len(jobs), batch_size):
            prompts, seeds = zip(*jobs[at : at + batch_size])
            videos = generate(model, replace(request, prompt=prompts), seeds=seeds)
            bar.update(len(videos))
            yield from videos


def grade_prompts(model: sd.Model, split: str, seeds: int, request: Request, batch_size=8, level=1) -> Report:
    """Sample and grade every triple, or pair of level 2, of a split on every background, `seeds` times each.

    request  how to sample; its prompts are not used
    """
    scenes = [scene for scene in toy.scenes(split, level) for _ in range(seeds)]
    jobs = [(toy.describe(scene), n % seeds) for n, scene in enumerate(scenes)]
    graded = (*ANSWERS, "all") if level == 2 else ANSWERS
    report, tracks = Report(len(jobs), Counter(dict.fromkeys(graded, 0)), 0, [], level=level), []
    for scene, (prompt, seed), video in zip(scenes, jobs, sample_all(model, jobs, request, batch_size)):
        found = judge(scene, video)
        report.right.update({name: found.right[name] for name in graded})
        report.wrong_cuts += found.seen[0].wrong_cut
        report.mixed_up += found.mixed_up
        tracks.append(track(found.seen))
        if not found.right["all"]:
            report.failures.append((prompt, seed, found.said, video))
    report.tracks = torch.stack(tracks)
    return report


def track(seen) -> torch.Tensor:
    """A video as a trajectory: of each of its grades position and speed (px), side (px) and colour (tenths of a level)
    of each frame, one after the other (shapes (8 T - 2),). A frame without a shape has one of size 0 in the middle."""
    parts = []
    for one in seen:
        centers = np.nan_to_num(one.centers, nan=toy.SIZE / 2)
        parts += centers, np.diff(centers, axis=0), np.sqrt(np.nan_to_num(one.areas)), np.nan_to_num(one.paints) / 10
    return torch.from_numpy(np.concatenate([part.ravel() for part in parts]))


def trajectory_distances(tracks: torch.Tensor, split: str, seeds: int, fps: float, level=1) -> dict[str, float]:
    """The toy stand-in for FVD: distance of tracks to those of as many true renders, and of two sets of these."""
    frames = (tracks.shape[1] // level + 2) // 8
    wanted = [scene for scene in toy.scenes(split, level) for _ in range(seeds)]
    sets = [torch.stack([track(judge(scene, toy.true_render(scene, rng, frames, fps)).seen) for scene in wanted])
            for rng in (np.random.default_rng(0), np.random.default_rng(1))]
    gaussians = [Gaussian(tracks.shape[1]) for _ in range(3)]
    for gaussian, features in zip(gaussians, [tracks, *sets]):
        gaussian.add(features)
    return {"model": frechet_distance(*gaussians[:2]), "true": frechet_distance(*gaussians[1:])}


# ---------------------------------------------------------------------------------------------------------------------
# Motion against the frame rate asked for


def grade_fps(model: sd.Model, split: str, fps_values, request: Request, batch_size=8):
    """Sample at several FPS values and measure motion: FPS -> (speed, share, scatter), None where no shape is found.

    The speed is the median of px a frame along the asked direction, the share that of the clips where it can be read.
    The scatter is the mean distance between the shape in two consecutive frames: large where frames are unrelated.
    """
    scenes = [(*triple, background) for triple in toy.triples(split) for background in list(toy.BACKGROUNDS)[:2]]
    jobs, table = [(toy.caption(*scene), 1000) for scene in scenes], {}
    for fps in fps_values:
        speeds, steps = [], []
        for scene, video in zip(scenes, sample_all(model, jobs, replace(request, fps=fps), batch_size)):
            seen, wanted = toy.grade(video), toy.DIRECTIONS[scene[2]]
            times = np.flatnonzero(~np.isnan(seen.centers[:, 0]))
            if len(times) < 3:
                continue
            path = seen.centers[times]
            speeds.append(np.polyfit(times, path @ wanted, 1)[0])
            steps.append(np.linalg.norm(np.diff(path, axis=0), axis=1).mean())
        table[fps] = (float(np.median(speeds)), len(speeds) / len(jobs), float(np.median(steps))) if speeds else None
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: given frames, a prompt for every frame


def grade_task(model: sd.Model, jobs: list[given.Job]) -> Report:
    """Sample and grade the jobs of a task; "all" counts the videos in which nothing is wrong."""
    right, cuts, failures = Counter(), 0, []
    with tqdm(total=sum(len(job.seeds) for job in jobs), unit="video", desc="sample", file=sys.stderr) as bar:
        for job in jobs:
            for seed, video in zip(job.seeds, generate(model, job.request, seeds=job.seeds)):
                answers, cut = given.grade(job, video), any(toy.grade(video[part]).wrong_cut for part in job.parts)
                wrong = [name for name, good in answers.items() if not good] + ["wrong cut"] * cut
                for name, good in (answers | {"all": not wrong}).items():
                    right[name] += good
                cuts += cut
                if wrong:
                    asked = ", then ".join(dict.fromkeys(job.request.texts))
                    failures.append((asked, seed, "wrong: " + ", ".join(wrong), video))
                bar.update()
    return Report(bar.n, right, cuts, failures)


def ways(model: sd.Model, request: Request) -> dict[str, sd.Model]:
    """The models to compare on a request: "model", and "replacement", the same weights as if they had never been
    trained with given frames, alone where they never were. Without anything to replace it is "model" alone.
    """
    if not request.known or request.window(model) == 1:  # frames made one after the other read given ones from a cache
        return {"model": model}
    replacement = {"replacement": replace(model, settings=replace(model.settings, given_trained=False))}
    return ({"model": model} if model.settings.given_trained else {}) | replacement


# ---------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class Options(timing.Options):
    ckpt: str = option("", "the model (default: the tiny one that ships)")
    task: str = option("", "a task with given frames, or a prompt for every frame (default: a prompt alone)",
                       choices=("", *given.TASKS))
    split: str = option("test", "test: held-out triples; val: those that guidance, eta and checkpoint are chosen on",
                        choices=("test", "val", "train"))
    level: int = option(1, "2: prompts of two shapes, see docs/evaluation.md", low=1, high=2)
    seeds: int = option(4, "videos a prompt", low=1)
    sampler: str | None = option(None, "how to step (default: the model's)", choices=tuple(SAMPLERS))
    steps: int | None = option(None, "sampling steps (default: the model's, or the sampler's)", low=1,
                               high=NoiseSchedule.timesteps)
    shift: float | None = option(None, "of the timesteps (default: the model's)", low=1, high=1000)
    guidance: float | None = option(None, "guidance scale (default: the model's)")
    eta: float | None = option(None, "noise that DDIM adds (default: the model's)", low=0, high=1)
    fps: float | None = option(None, "frame rate of the task (default: 4; of extend 15)", low=1, high=60)
    no_fps: bool = option(False, "leave out the table of motion against FPS, of level 1 alone")
    json: str = option("", "append the numbers to a JSON-lines file", metavar="FILE")
    failures: str = option("", "a picture of the videos that were graded wrong", metavar="FILE.png")


def main():
    o = parse(Options, __doc__)
    if o.failures and not o.failures.lower().endswith(".png"):
        raise ValueError(f"failures must end in .png, got {o.failures}")
    for path in filter(None, (o.json, o.failures)):  # now, not after minutes
        check_writable(path)
    if o.fps and not o.task:
        raise ValueError(f"fps must come with a task, got {o.fps:g} alone")
    if o.task and o.level == 2:
        raise ValueError("level must be 1 with a task: given frames are of clips of one shape")
    device, dtype = o.place()
    model = sd.load(o.ckpt or SHIPPED, device, dtype)
    request = Request("any", fps=o.fps or given.FPS.get(o.task), sampler=o.sampler, steps=o.steps, shift=o.shift,
                      guidance=o.guidance, eta=o.eta).resolve(model)
    result = {"ckpt": os.path.basename(o.ckpt or SHIPPED), "split": o.split, "level": o.level,
              "videos": len(toy.scenes(o.split, o.level)) * o.seeds,
              **{name: getattr(request, name) for name in ("sampler", "steps", "shift", "guidance", "eta")},
              "dtype": str(dtype).removeprefix("torch.")}
    print("{ckpt}, {split} {what}, {videos} videos, {steps} steps of {sampler}, shift {shift:g}, "
          "guidance {guidance:g}, eta {eta:g}, {dtype}".format(**result, what="pairs" if o.level == 2 else "triples"))
    numbers, failures = (measure_task if o.task else measure_prompts)(model, request, o)
    if o.json:
        with open(o.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(result | numbers) + "\n")
    if o.failures and failures:
        show_failures(o.failures, failures[:24])


def measure_prompts(model: sd.Model, request: Request, o: Options) -> tuple[dict, list]:
    """Grade prompts alone, and print what comes of it -> (the numbers, the failures)."""
    report = grade_prompts(model, o.split, o.seeds, request, level=o.level)
    numbers = print_shares(report)
    far = numbers["trajectories"] = trajectory_distances(report.tracks, o.split, o.seeds, request.fps, o.level)
    print(f"  Fréchet distance of trajectories to true ones {far['model']:.1f}, of two true sets {far['true']:.1f}")
    if not o.no_fps and o.level == 1:
        numbers |= print_fps(grade_fps(model, o.split, (4, 8, 15, 30, 60, 120, 0), request))
    return numbers, report.failures


def measure_task(model: sd.Model, request: Request, o: Options) -> tuple[dict, list]:
    """Grade a task in all `ways`, and print what comes of it -> (the numbers, the failures of the first way)."""
    jobs = given.jobs(o.task, o.split, o.seeds, request)
    numbers, reports = {"task": o.task, "fps": request.fps}, []
    for way, one in ways(model, jobs[0].request).items():
        reports.append(grade_task(one, jobs))
        print(f"{o.task}, {jobs[0].request.frames} frames at {request.fps:g} FPS, {way}")
        numbers[way] = print_shares(reports[-1])
    return numbers, reports[0].failures


def print_shares(report: Report) -> dict:
    """Print how often each answer is right, and what is wrong -> the same numbers."""
    numbers = {}
    for name, (count, of) in report.counts().items():
        low, high = wilson(count, of)
        print(f"  {name:<11}{count:>5} / {of}   {count / of:6.1%}   [{low:.1%}, {high:.1%}]")
        numbers[name] = {"count": count, "of": of, "low": low, "high": high}
    return numbers


def print_fps(table) -> dict:
    """Print the table of `grade_fps` -> the same numbers."""
    numbers = {}
    print("  FPS   px a frame   10/FPS   ratio   px between frames   clips read")
    for fps, row in table.items():
        speed, share, scatter = row or (math.nan, 0, math.nan)
        true = f"{10 / fps:8.2f} {speed * fps / 10:7.2f}" if 1 <= fps <= 60 else " " * 16
        print(f"  {fps:>3}   {speed:10.3f} {true}   {scatter:17.2f}   {share:10.0%}")
        numbers[f"fps {fps}"] = {"px_per_frame": speed, "px_between_frames": scatter, "read": share}
    return numbers


def show_failures(path: str, failures):
    """Write a picture with a row for each failed video, and print what was asked, and read or wrong."""
    frames = np.concatenate([video for *_, video in failures])
    with beside(path) as part:
        Image.fromarray(contact_sheet(frames, cols=len(frames) // len(failures))).save(part, "PNG")
    print(f"  failures, row by row ({path}):")
    for prompt, seed, said, _ in failures:
        print(f"    {prompt!r} seed {seed}: {said}")


if __name__ == "__main__":
    run(main)
