"""Measure what sampling in less time costs in quality, on the toy world.

    python -m lab.evals.fast                # grade SETTINGS on the validation prompts, and draw the frontier
    python -m lab.evals.fast --write        # then put the cheapest good one into the model's file, for --fast

Each setting leaves a line in the file of results, and what has its line there is not run again; lines of other weights
do not count. A *forward-equivalent* is the FLOP of one full forward without guidance: 50 guided steps are 100. The
cheapest setting that is good, see `cheapest`, is graded on the held-out prompts, too.
"""

import hashlib
import json
import os
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

import sd
from beyond.fast import Reuse, fast_settings
from cli import check_writable, option, parse, run
from grid import grid_shape
from lab import toy
from lab.ablation.report import cell, curve, heading, line, require_matplotlib
from lab.ablation.runs import read_results
from lab.bench import timing
from lab.bench.video import steps_of
from lab.evals.toy import ANSWERS, EACH, judge, track, trajectory_distances
from lab.metrics import psnr, wilson
from lab.toy.grader import centroids
from sample import SHIPPED, Request, generate
from sd.files import open_weights
from training.account import count_flop

GRADED = (*ANSWERS, "wrong cuts")
DPM = "dpm++", "dpm++sde"
SOLVERS = "ddim", *DPM
LOSS = 0.02  # of the videos: what a cheaper setting may lose
ALWAYS, EARLY, MIDDLE, NEVER = [0, 999], [600, 999], [100, 800], [0, 0]  # guidance; no sampler here visits timestep 0
EXACT = {"sampler": "ddim", "eta": 0.0, "steps": 200, "guidance_interval": (0, 999)}  # the ODE, latents' reference


def setting(sampler: str, steps: int, guidance_interval=ALWAYS, reuse=1) -> dict:
    """What the setting `fast` of a model may hold."""
    return {"sampler": sampler, "steps": steps, "guidance_interval": guidance_interval, "guidance_rescale": 0.0,
            "reuse": reuse}


SETTINGS = [
    setting("ddim", 50),  # the reference of all that is graded
    setting("ddim", 10),
    *(setting(sampler, steps, interval)
      for sampler in DPM for steps in (5, 8, 10) for interval in (ALWAYS, EARLY, NEVER)),
    *(setting("dpm++", steps, NEVER) for steps in (4, 6)),
    *(setting(sampler, 20) for sampler in DPM),
    setting("dpm++", 20, MIDDLE),  # FAST
    setting("dpm++", 20, reuse=2), setting("dpm++", 10, NEVER, 2),
]

# ---------------------------------------------------------------------------------------------------------------------
# Cost


@torch.no_grad()
def reused_share(model: sd.Model, request: Request) -> float:
    """FLOP of a step that reuses deep features over those of a full one, for the frames of a resolved request."""
    (rows, cols), factor = grid_shape(request.frames), model.vae.cfg.downsampling
    with model.unet.out[2].weight.device:
        x = torch.zeros(1, model.unet.cfg.latent_channels, rows * request.size[1] // factor,
                        cols * request.size[0] // factor)
        given = model.text.encode([""]), torch.full((1,), request.fps), (rows, cols)
        unet = Reuse(model.unet, [999, 500, 1], 3)  # the step in the middle is the one that reuses
        full, reused = (count_flop(lambda t=t: unet(x, torch.full((1,), t), *given)) for t in (999, 500))
    return reused / full


def forward_equivalents(request: Request, timesteps: list[int], reused: float) -> float:
    """What a resolved request spends, in full forwards without guidance; reused: see `reused_share`."""
    return sum(n * halves * (1 if whole else reused) for (halves, whole), n in steps_of(request, timesteps).items())


# ---------------------------------------------------------------------------------------------------------------------
# Quality


def sampled(model: sd.Model, request: Request, split: str, seeds: int, said: str, level=1, batch_size=8):
    """Yield (scene, video uint8 (T, H, W, 3), the last x_0 that was predicted) for every scene of a split, all of them
    with one seed before the next."""
    jobs = [(scene, seed) for seed in range(seeds) for scene in toy.scenes(split, level)]
    for at in tqdm(range(0, len(jobs), batch_size), desc=said, unit="batch", file=sys.stderr):
        (scenes, numbers), last = zip(*jobs[at : at + batch_size]), {}
        asked = replace(request, prompt=tuple(map(toy.describe, scenes)))
        videos = generate(model, asked, seeds=numbers, progress=lambda *step, to=last: to.update(x0=step[3]))
        yield from zip(scenes, videos, last["x0"].cpu())


def fitted_psnr(scene, centers, video) -> float:
    """PSNR, dB, of a square video against the true render that fits it best: the scene that was asked for on the
    straight lines through the centers (T, 2), of two shapes (2, T, 2), in world pixels, that the grader read. A shape
    for which it read fewer than two is left out."""
    size, paths = video.shape[1], []
    for (_, shape, _), read in zip(toy.things(scene), centers.reshape(-1, *centers.shape[-2:])):
        seen, path = np.flatnonzero(~np.isnan(read[:, 0])), np.full_like(read, -toy.SIZE)
        if len(seen) > 1:
            middle = np.full((1, 2), toy.SIZE / 2)
            off = centroids(toy.coverage(shape, middle)) - middle  # drawn around its box, and read by its mass
            speed, start = np.polyfit(seen, read[seen], 1)
            path = start - off + speed * np.arange(len(read))[:, None]
        paths.append(path * size / toy.SIZE)
    true = toy.draw_scene(scene, paths, size)
    return psnr(*(torch.from_numpy(clip).double() / 255 for clip in (video, true)))


def measure(model: sd.Model, request: Request, split: str, seeds: int, said: str, exact=(), level=1) -> dict:
    """Sample and grade every scene of a split, `seeds` times each -> what is noted of it.

    exact  what the last x_0 of the first videos should be
    """
    right, tracks, decibels, apart = Counter(), [], [], []
    for n, (scene, video, x0) in enumerate(sampled(model, request, split, seeds, said, level)):
        found = judge(scene, video)
        right.update(found.right, **{"wrong cuts": found.seen[0].wrong_cut, "mixed up": found.mixed_up})
        tracks.append(track(found.seen))
        decibels.append(fitted_psnr(scene, np.stack([one.centers for one in found.seen]), video))
        apart += [(x0 - exact[n]).square().mean().item()] if n < len(exact) else []
    videos, shares = len(tracks), {}
    for name in graded(level):
        of = videos * (level if name in EACH else 1)
        shares[name] = dict(zip(("share", "low", "high"), (right[name] / of, *wilson(right[name], of))))
    return {"videos": videos, **shares, "psnr": np.mean(decibels),
            "trajectories": trajectory_distances(torch.stack(tracks), split, seeds, request.fps, level),
            "latents": np.sqrt(np.mean(apart)) if apart else None}


def graded(level: int) -> tuple[str, ...]:
    """The columns of shares, in which more is better, but for the last ones, of what is wrong."""
    return GRADED if level == 1 else (*GRADED, "mixed up")


def cheapest(lines: list[dict]) -> dict:
    """The line of fewest forward-equivalents that is not worse than the first in any graded column: the intervals
    overlap, or its own is the better one, and no answer is right more than LOSS less often. Of several as cheap it is
    that of the highest PSNR."""
    first = lines[0]
    wrong = [name for name in ("wrong cuts", "mixed up") if name in first]
    good = [one for one in lines if all(one[name]["low"] <= first[name]["high"] for name in wrong)
            and all(one[name]["high"] >= first[name]["low"] and one[name]["share"] >= first[name]["share"] - LOSS
                    for name in ANSWERS)]
    return min(good, key=lambda one: (one["forwards"], -one["psnr"]))


def name_of(chosen: dict) -> str:
    (low, high), n = chosen["guidance_interval"], chosen["reuse"]
    guided = {tuple(ALWAYS): "", tuple(NEVER): ", no guidance"}.get((low, high), f", guidance {low}..{high}")
    return f"{chosen['sampler']} {chosen['steps']}{guided}" + f", reuse {n}" * (n > 1)


def percent(one: dict, name: str) -> tuple[float, float, float]:
    """A graded column, with its Wilson interval."""
    return tuple(100 * x for x in one[name].values())


def seconds_a_video(model: sd.Model, settings: list[dict], device) -> dict[str, float]:
    """Seconds of a video with each setting, by its name, medians; they take turns."""
    asked = {name_of(each): Request(toy.caption(*toy.scenes("val")[0]), **fast_settings(each)) for each in settings}
    works = {name: lambda request=request: generate(model, request) for name, request in asked.items()}
    spent = timing.in_turn(works, device, rounds=10, seconds=60)
    return {name: statistics.median(each) for name, each in spent.items()}


def table(lines: list[dict], seconds: dict[str, float]) -> str:
    """Markdown; seconds: of a video, by the setting's name."""
    shares = graded(lines[0].get("level", 1))
    columns = ["forward-equivalents", "s a video", *(f"{name}, %" for name in shares), "PSNR, dB",
               "trajectories (true)", "latents"]
    rows = []
    for one in lines:
        name, off = name_of(one["setting"]), one["latents"]
        rows.append(line(name, [
            f"{one['forwards']:.1f}", f"{seconds[name]:.2f}", *(cell(percent(one, what), 1) for what in shares),
            f"{one['psnr']:.2f}", "{model:.1f} ({true:.1f})".format(**one["trajectories"]),
            "-" if off is None else f"{off:.4f}"]))
    return "\n".join([*heading("", columns), *rows])


# name, sign (1: more is better), line -> (middle, low, high)
PANELS = (("worst of the four answers, %", 1, lambda one: min(percent(one, name) for name in ANSWERS)),
          ("PSNR to the true render that fits best, dB", 1, lambda one: (one["psnr"],) * 3),
          ("Fréchet distance of trajectories", -1, lambda one: (one["trajectories"]["model"],) * 3),
          ("latents off the ODE's, root mean square", -1, lambda one: (one["latents"] or np.nan,) * 3))


def draw_figure(lines: list[dict], chosen: dict, path: str):
    """Draw quality against forward-equivalents: the frontier is a line, and the chosen setting has a ring."""
    from matplotlib.figure import Figure  # of the extra `dev`

    drawing = Figure(figsize=(11, 7), layout="constrained")
    for panel, (title, sign, value) in zip(drawing.subplots(2, 2, sharex=True).flat, PANELS):
        for sampler in SOLVERS:
            mine = [one for one in lines if one["setting"]["sampler"] == sampler]
            curve(panel, [one["forwards"] for one in mine], list(map(value, mine)), linestyle="none", label=sampler)
        cost, quality = np.array(sorted((one["forwards"], sign * value(one)[0]) for one in lines)).T
        panel.plot(cost, sign * np.fmax.accumulate(quality), "k-", linewidth=1, drawstyle="steps-post")
        panel.plot(chosen["forwards"], value(chosen)[0], "ko", markersize=14, fillstyle="none")
        panel.set(title=title, xscale="log", yscale="linear" if sign > 0 else "log", xlabel="forward-equivalents")
    drawing.axes[0].legend(fontsize=8)
    drawing.savefig(path, dpi=100)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class Options(timing.Options):
    ckpt: str = option("", "the model (default: the tiny one that ships)")
    level: int = option(1, "2: prompts of two shapes", low=1, high=2)
    seeds: int = option(4, "videos a prompt", low=1)
    results: str = option("docs/fast.jsonl", "one line a setting, appended to", metavar="FILE")
    figure: str = option("docs/fast.png", "the figure", metavar="FILE.png")
    write: bool = option(False, "put the cheapest good setting into the model's file")


def fingerprint(model: sd.Model) -> str:
    """A short digest of all weights, in the precision that they are loaded in."""
    digest = hashlib.sha256()
    for tensor in (t for part in model.parts().values() for t in part.state_dict().values()):
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def write_fast(path: str, chosen: dict):
    """Put a setting into a model's file as `fast`. The weights keep their precision, the highest where it is mixed."""
    file = open_weights(path)
    dtypes = {file.get(name).dtype for name in file.shapes}
    model = sd.load(path, dtype=max(filter(lambda dtype: dtype.is_floating_point, dtypes), key=lambda d: d.itemsize))
    model.settings = replace(model.settings, fast=chosen)
    sd.save(model, path)


def main():
    o = parse(Options, __doc__)
    require_matplotlib()
    ckpt = o.ckpt or SHIPPED
    for name, path, end in (("figure", o.figure, ".png"), *[("ckpt", ckpt, ".safetensors")] * o.write):
        if not path.endswith(end):
            raise ValueError(f"{name} must end in {end}, got {path}")
    for path in (o.results, o.figure):  # now, not after hours
        check_writable(path)
    device, dtype = o.place()
    model = sd.load(ckpt, device, dtype)
    plain = Request("any").resolve(model)
    if plain.frames == 1 or plain.size[0] != plain.size[1]:
        raise ValueError(f"the model must make square videos, got {plain.frames} frames of {plain.size}")
    about = {"ckpt": os.path.basename(ckpt), "weights": fingerprint(model), "guidance": plain.guidance,
             "eta": model.settings.eta, "shift": plain.shift, "seeds": o.seeds,
             "dtype": str(dtype).removeprefix("torch.")}
    about |= {"level": 2} if o.level == 2 else {}
    known = [one for one in read_results(o.results)
             if about.items() <= ({"shift": 1.0} | one).items() and one.get("level", 1) == o.level]
    done = {(name_of(one["setting"]), one["split"]): one for one in known}
    reused, exact = reused_share(model, plain), ()

    def line_of(chosen: dict, split: str) -> dict:
        """The line of a setting: the one that is there, or a new one."""
        name = name_of(chosen)
        if (name, split) not in done:
            request = Request("any", **fast_settings(chosen)).resolve(model)
            spent = forward_equivalents(request, request.timesteps(model), reused)
            same_noise = split == "val" and request.eta == 0 and request.sampler in ("ddim", "dpm++")
            seen = measure(model, request, split, o.seeds, name, exact if same_noise else (), o.level)
            done[name, split] = {"setting": chosen, "split": split, **about, "forwards": round(spent, 2), **seen}
            with open(o.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[name, split]) + "\n")
        return done[name, split]

    if any((name_of(chosen), "val") not in done for chosen in SETTINGS):
        exact = [x0 for *_, x0 in sampled(model, Request("any", **EXACT), "val", 1, "reference", o.level)]
    lines = [line_of(chosen, "val") for chosen in SETTINGS]
    best, seconds = cheapest(lines), seconds_a_video(model, SETTINGS, device)
    print(f"{about}\n\n{table(lines, seconds)}\n\ncheapest that is as good as {name_of(SETTINGS[0])}, on "
          f"held-out prompts:\n\n{table([line_of(best['setting'], 'test')], seconds)}")
    draw_figure(lines, best, o.figure)
    print(o.figure)
    if o.write:
        write_fast(ckpt, best["setting"])
        print(f"{ckpt}: fast is now {best['setting']}")


if __name__ == "__main__":
    run(main)
