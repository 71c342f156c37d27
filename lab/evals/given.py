"""Tasks with given frames, and with a prompt for every frame, on the toy world: what is asked, and what is right.

    python -m lab.evals.toy --task first|ends|extend|prompts

Given frames are those of a true clip, so what follows from them is known:

    first    frame 0 is given: the others begin there, and do what the prompt says
    ends     the first and the last frame are given: the others lie on the straight line between, at constant speed
    extend   a clip is given, and three times as much follows, in windows that share frames: nothing changes
    prompts  nothing is given; from the middle on, the prompt says another colour: that changes, and nothing else
"""

from dataclasses import dataclass, replace

import numpy as np

from lab import toy
from lab.toy.grader import motion_of
from sample import Request

FPS = {"first": 4, "ends": 4, "extend": 15, "prompts": 4}  # at 15, 64 frames travel 42 of the 50 px that there are
TASKS = tuple(FPS)
CLOSE = 1.5      # px between two places that count as one
JUMP = 1         # px by which the step into a window may differ from the median step
SPEED_OFF = 0.1  # share by which a speed may differ from the true one
LATE = 1         # frames by which a change may be early or late


@dataclass
class Job:
    """Videos to make in one batch, of one prompt, and what they should show."""

    task: str
    scene: tuple[str, str, str, str]  # color, shape, direction, background
    request: Request
    seeds: list[int]
    clip: np.ndarray  # uint8 (frames, H, W, 3), a right answer; the given frames are from it
    parts: list[slice]  # of the frames that the model makes; in each of them all is alike


def jobs(task: str, split: str, seeds: int, request: Request) -> list[Job]:
    """The jobs of a task: every triple of a split on every background, `seeds` times each.

    request  how to sample, resolved: its size, its fps, and its number of frames T are kept. `extend` asks for 4 T

    Raises ValueError where T is below 4, or no true clip at this frame rate is long enough.
    """
    T, size = request.frames, request.size[0]
    frames, middle = 4 * T if task == "extend" else T, T // 2
    if T < 4:
        raise ValueError(f"the model must make >= 4 frames for a task, got {T}")
    if request.fps < (frames - 1) / toy.SECONDS:
        raise ValueError(f"fps must be >= {(frames - 1) / toy.SECONDS:g}, so that {frames} frames are in the "
                         f"{toy.SECONDS} s of a true clip, got {request.fps:g}")
    known = {"first": [0], "ends": [0, T - 1], "extend": range(T), "prompts": []}[task]
    parts = {"first": [slice(1, T)], "ends": [slice(1, T - 1)], "extend": [slice(n, n + T) for n in (T, 2 * T, 3 * T)],
             "prompts": [slice(0, middle - LATE), slice(middle + LATE, T)]}[task]
    found = []
    for number, scene in enumerate(toy.scenes(split)):
        color, shape, direction, background = scene
        rng = np.random.default_rng(number)
        times = rng.uniform(0, toy.SECONDS - (frames - 1) / request.fps) + np.arange(frames) / request.fps
        centers = toy.trajectory(direction, times, rng, size)
        clip = toy.draw(color, shape, background, centers, size)
        batches = [list(range(seeds))]
        asked = replace(request, prompt=(toy.caption(*scene),) * seeds, known={n: clip[n] for n in known},
                        frames=frames, overlap=T // 4 if task == "extend" else None)
        if task == "prompts":
            other = second_color(color)
            clip[middle:] = toy.draw(other, shape, background, centers[middle:], size)
            batches = [[seed] for seed in range(seeds)]  # prompts of frames make one video at a time
            asked = replace(asked, prompt=(), prompts_at={0: toy.caption(*scene),
                                                          middle: toy.caption(other, shape, direction, background)})
        found += [Job(task, scene, asked, batch, clip, parts) for batch in batches]
    return found


def second_color(color: str) -> str:
    """The colour that one changes to."""
    names = list(toy.COLORS)
    return names[(names.index(color) + 1) % len(names)]


def grade(job: Job, video) -> dict[str, bool]:
    """Judge a video of a job, uint8 (frames, H, W, 3): name of an answer -> whether it is right.

    Only frames that the model made count. What cannot be told, and a frame without a shape, is wrong.
    """
    color, shape, direction, background = job.scene
    made = slice(job.parts[0].start, job.parts[-1].stop)
    (centers, paints), ((begin, end), _) = by_frame(video), by_frame(job.clip[[0, -1]])
    parts = [toy.grade(video[part]) for part in job.parts]
    answers = {}
    if job.task == "first":
        answers["start"] = np.linalg.norm(at(0, centers, made) - begin) <= CLOSE
    if job.task == "ends":
        off = centers[made] - np.linspace(begin, end, len(video))[made]
        answers["path"] = np.sqrt((off**2).sum(1).mean()) <= CLOSE
    if job.task == "extend":
        speed = motion(centers[made])[1] * job.request.fps / toy.SPEED
        answers["speed"] = abs(speed - 1) <= SPEED_OFF
        T = made.start
        steps = np.diff(centers[T - 1 :], axis=0)  # the first one starts at the last given frame
        seams = np.linalg.norm(steps - np.median(steps, axis=0), axis=1)[:: T - job.request.overlap]
        answers["no jumps"] = (seams <= JUMP).all() and not np.isnan(steps).any()
    if job.task == "prompts":
        middle = len(video) // 2 - 0.5
        here, there = (at(middle, centers, part) for part in job.parts)
        answers["goes on"] = np.linalg.norm(there - here) <= CLOSE
        names, colors = [nearest(paint) for paint in paints], (color, second_color(color))
        answers["change"] = all(set(names[part]) == {name} for part, name in zip(job.parts, colors))
    else:
        answers["color"] = all(part.color == color for part in parts)
    answers["shape"] = all(part.shape == shape for part in parts)
    answers["direction"] = all(motion(centers[part])[0] == direction for part in job.parts)
    answers["background"] = all(part.background == background for part in parts)
    return {name: bool(right) for name, right in answers.items()}


def by_frame(video):
    """Centers (N, 2) and colours (N, 3) of a shape in each frame, NaN where there is none. Each is graded by itself: in
    frames that are graded together, the shape has to have one colour."""
    looks = [toy.grade(frame[None]) for frame in video]
    return np.concatenate([look.centers for look in looks]), np.concatenate([look.paints for look in looks])


def motion(centers):
    """(direction, px a frame) of centers (N, 2), as the grader of the toy world reads them: (None, NaN) if neither."""
    seen = np.flatnonzero(~np.isnan(centers[:, 0]))
    return motion_of(seen, centers[seen])


def at(frame: float, centers, part: slice):
    """Where a frame is on the line through the centers (N, 2) of a part: NaN if that has less than two."""
    seen = [n for n in range(part.start, part.stop) if not np.isnan(centers[n, 0])]
    slope, start = np.polyfit(seen, centers[seen], 1) if len(seen) > 1 else np.full((2, 2), np.nan)
    return start + frame * slope


def nearest(paint) -> str | None:
    """The name of the nearest colour, None for NaN."""
    distances = np.linalg.norm(np.array(list(toy.COLORS.values())) - paint, axis=1)
    return None if np.isnan(distances).any() else list(toy.COLORS)[distances.argmin()]
