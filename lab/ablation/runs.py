"""The ablations of the paper run again in small: Table 2, Figure 7, the FPS embedding, and a gate that the paper lacks.

    python eval.py ablation

As the paper's models all start from Stable Diffusion, all runs here start from one tiny text-to-image model. It knows
shapes, colours and backgrounds, draws sheets of nine equal pictures, and has seen neither motion nor an embedding of
ETC's. Each run is trained and graded in about six minutes on one core, as many at a time as there are cores, and leaves
a line in the file of results; what has its line there is not run again.
"""

import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import reduce
from multiprocessing import active_children, get_context
from operator import getitem

import numpy as np
import torch
from torch import nn

from clips.prepare import encode_text
from data import CAPTION_FPS, encode_frames, generator
from embed import mixed_embedding
from grid import fold
from lab import toy
from lab.metrics import wilson
from model import UNet

from train import commit, run
from training.config import Config, read_config
from training.ranks import Ranks
from training.task import (
    VALIDATION_TIMESTEPS,
    Denoising,
    UNetTask,
    loss_of,
    make_model,
    make_ready,
    open_clips,
    precision,
)

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "ablation")
SEEDS = 3

# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@dataclass(frozen=True)
class Variant:
    name: str
    mixed_embedding: bool = True
    fps_embedding: bool = True
    gate: bool = False  # the mixed embedding behind a learned gate
    triple_data: bool = True  # else videos alone
    videos: int = 0  # only the first so many; 0 for all


SIZES = (9, 27, 81, 243)  # and all 864, which "mixed embedding" has
VARIANTS = [
    Variant("neither", mixed_embedding=False, triple_data=False),
    Variant("triple data", mixed_embedding=False),
    Variant("mixed embedding", triple_data=False),
    Variant("both"),
    Variant("both, no FPS embedding", fps_embedding=False),
    Variant("both, gated", gate=True),
    *(Variant(f"{n} videos", triple_data=False, videos=n) for n in SIZES),
]


class GatedUNet(UNet):
    """The mixed embedding times a gate a channel that starts at zero: at first this is exactly the image model."""

    def __init__(self, cfg):
        super().__init__(replace(cfg, mixed_embedding=False))
        self.gate = nn.Parameter(torch.zeros(cfg.latent_channels, 1, 1))

    def forward(self, x, t, context, fps=None, grid=None):
        (rows, cols), (*_, C, H, W) = grid, x.shape
        position = mixed_embedding(rows, cols, H // rows, W // cols, C).to(x.device)
        return super().forward(x.float() + self.gate * position, t, context, fps, grid)


def video_unet(variant: Variant, image: UNet) -> UNet:
    """The image model's UNet with what the variant adds to it; that starts fresh."""
    cfg = replace(image.cfg, mixed_embedding=variant.mixed_embedding, fps_embedding=variant.fps_embedding)
    unet = GatedUNet(cfg) if variant.gate else UNet(cfg)
    unet.load_state_dict(unet.state_dict() | image.state_dict())
    return unet


def image_unet(shipped: UNet) -> UNet:
    """A fresh one without ETC's additions, three quarters as wide as the shipped model's."""
    return UNet(replace(shipped.cfg, channels=48, head_width=48, mixed_embedding=False, fps_embedding=False))


# ---------------------------------------------------------------------------------------------------------------------
# Training, as train.py does


def train(cfg: Config, unet, variant=Variant("")) -> "ProbedTask":
    """unet makes the run's UNet of the one in the checkpoint that it starts from."""
    with Ranks(cfg.timeout) as ranks:
        torch.manual_seed(cfg.seed)
        model = make_model(cfg)
        model.unet = unet(model.unet)
        lists = make_ready(cfg, model, ranks.device)  # all of the mix, whatever the variant: runs share what is encoded
        if not variant.triple_data:
            cfg = replace(cfg, mix={"video": 1})
        task = ProbedTask(model, cfg, open_clips(cfg, model, lists, ranks.device), ranks.rank, ranks.world)
        if variant.videos:
            task.stream.sizes["video"] = variant.videos
        run(cfg, ranks, model, task)
        return task


class ProbedTask(UNetTask):
    """Notes in `probes` how far the model is before some of the steps."""

    STEPS = (0, 50, 500)

    def __init__(self, model, *rest):
        super().__init__(model, *rest)
        self.model, self.probes = model, {}

    def begin(self, first: int, last: int):
        super().begin(first, last)
        self.step = first

    def batch(self):
        if self.step in self.STEPS:
            self.probes[self.step] = probe(self.cfg, self.model)
        self.step += 1
        return super().batch()


def probe(cfg: Config, model) -> dict[str, float]:
    """Mean loss on true renders of the held-out scenes, under noise that is always the same: of single images, which
    are what the model knew before, and of videos."""
    return {"image": true_loss(replace(cfg, frames=1), model, CAPTION_FPS),
            "video": true_loss(cfg, model, cfg.default_fps)}


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def worth_of_direction(cfg: Config, model, loss: float) -> float:
    """By how many percent the loss on videos rises when captions say the opposite direction: what a model knows of
    motion long before it draws any."""
    wrong = [(color, shape, OPPOSITE[direction], background) for color, shape, direction, background in
             toy.scenes("test")]
    return 100 * (true_loss(cfg, model, cfg.default_fps, wrong) / loss - 1)


@torch.no_grad()
def true_loss(cfg: Config, model, fps: float, said=None) -> float:
    """Over VALIDATION_TIMESTEPS; said: the scenes in the captions, when they are others than those in the videos."""
    rng, scenes = np.random.default_rng(0), toy.scenes("test")
    device, n = next(model.unet.parameters()).device, len(scenes)
    clips = [torch.from_numpy(toy.true_render(scene, rng, cfg.frames, cfg.default_fps)) for scene in scenes]
    means = [encode_frames(model.vae, clip.permute(0, 3, 1, 2)).chunk(2, dim=1)[0] for clip in clips]
    latents = torch.stack(means) * model.settings.latent_scale
    context = encode_text(model, [toy.caption(*scene) for scene in said or scenes], torch.float32)
    module = Denoising(model, cfg, None)
    losses = []
    for t in VALIDATION_TIMESTEPS:
        eps = torch.randn(fold(latents, *module.grid).shape, generator=generator("probe", t))
        batch = latents, context, torch.full((n,), float(fps)), torch.full((n,), t), eps
        losses.append(loss_of(cfg, module, batch, device).mean())
    return torch.stack(losses).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# All of it

BASE = ("image", "compare", "sheets")  # configs, each of which goes on from the one before


def prepare_runs() -> Config:
    """Make what is not there yet of what all runs share, the text-to-image model and the data encoded ahead -> their
    config."""
    for name in BASE:
        cfg = read_config(os.path.join(CONFIGS, name + ".py"), [])
        if not os.path.exists(os.path.join(cfg.out_dir, "model.safetensors")):
            train(cfg, image_unet if name == BASE[0] else lambda unet: unet)
    cfg = read_config(os.path.join(CONFIGS, "run.py"), [])
    with Ranks(cfg.timeout) as ranks:
        make_ready(cfg, make_model(cfg), ranks.device)
    return cfg


def ablate(results: str, score):
    """Every variant with every seed that has no line in the file of results yet.

    There are as many at a time as cores, each on one: a run gains little from a second core.

    score  (model, FPS values) -> dict of what to note of it; goes to other processes, so it must be a module's function
    """
    done = [(result["variant"], result["seed"]) for result in read_results(results)]
    todo = [(variant, seed) for seed in range(SEEDS) for variant in VARIANTS if (variant.name, seed) not in done]
    if not todo:
        return
    cfg = prepare_runs()
    cores = torch.get_num_threads()
    workers = 1 if torch.cuda.is_available() else cores
    print(f"runs: {len(todo)}, {workers} at a time; what they say goes to {cfg.out_dir}/*/log", flush=True)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (cores // workers,)) as pool:
        try:
            for n, future in enumerate(as_completed([pool.submit(one_run, cfg, *it, score) for it in todo]), 1):
                result = future.result()
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{n} of {len(todo)}: {result['variant']}, seed {result['seed']}", flush=True)
        except BaseException:
            for process in active_children():  # asked to stop, a run would save, and its process begin the next
                process.kill()
            raise


def one_run(cfg: Config, variant: Variant, seed: int, score) -> dict:
    cfg = replace(cfg, seed=seed, out_dir=os.path.join(cfg.out_dir, f"{variant.name} {seed}"))
    shutil.rmtree(cfg.out_dir, ignore_errors=True)  # of a run that was interrupted: its probes are not in a checkpoint
    os.makedirs(cfg.out_dir)
    began = time.time()
    path = os.path.join(cfg.out_dir, "log")
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        task = train(cfg, lambda unet: video_unet(variant, unet), variant)
        model, last = task.model, probe(cfg, task.model)
        worth = worth_of_direction(cfg, model, last["video"])
        trained = time.time()
        with precision(cfg, next(model.unet.parameters()).device):
            scores = score(model, cfg.fps_values)
    shutil.rmtree(cfg.out_dir)
    return {"variant": variant.name, "seed": seed, "steps": cfg.max_steps, **scores,
            "worth of direction": worth, "loss": task.probes | {cfg.max_steps: last},
            "train_s": round(trained - began), "score_s": round(time.time() - trained), "commit": commit()}


def read_results(path: str) -> list[dict]:
    if not os.path.exists(path):
        return []
    results = []
    with open(path, encoding="utf-8") as file:
        for n, line in enumerate(file, 1):
            try:
                results.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {n}: not the result of a run: remove it") from error
    return results


# ---------------------------------------------------------------------------------------------------------------------
# What came out


class Row:
    """The runs of a variant, under its name; a name with a note where seeds are missing."""

    def __init__(self, variant: Variant, results: list[dict]):
        self.runs = [result for result in results if result["variant"] == variant.name]
        few = f" ({len(self.runs)} of {SEEDS} seeds)" if len(self.runs) < SEEDS else ""
        self.name, self.videos = variant.name + few, sum(result["videos"] for result in self.runs)

    def share(self, what: str) -> tuple[float, float, float]:
        """Of all videos of all seeds, in percent, with its Wilson interval."""
        count = sum(result[what] for result in self.runs)
        return tuple(100 * x for x in (count / self.videos, *wilson(count, self.videos)))

    def spread(self, *keys: str) -> tuple[float, float, float]:
        """Mean, least and largest over the seeds of what stands under the keys."""
        values = [reduce(getitem, keys, result) for result in self.runs]
        return sum(values) / len(values), min(values), max(values)


def rows_of(results: list[dict]) -> dict[str, Row]:
    """By the variants' names; of those that have runs."""
    rows = {variant.name: Row(variant, results) for variant in VARIANTS}
    return {name: row for name, row in rows.items() if row.runs}


def cell(numbers, digits: int) -> str:
    middle, low, high = (f"{x:.{digits}f}" for x in numbers)
    return f"{middle} [{low}, {high}]"


def tables(results: list[dict]):
    """Lines of Markdown."""
    rows, at, asked = rows_of(results), steps(results), speeds(results)
    shares = ("color", "shape", "direction", "background", "wrong cuts")
    yield from heading("", [*(f"{name}, %" for name in shares), "trajectories", "loss", "worth of direction, %"])
    for row in rows.values():
        cells = [cell(row.share(name), 0) for name in shares]
        cells += [cell(row.spread("trajectories"), 0), cell(row.spread("loss", at[-1], "video"), 4),
                  cell(row.spread("worth of direction"), 1)]
        yield line(row.name, cells)
    yield from ["", *heading("px a frame", [f"{fps} FPS (true {toy.SPEED / float(fps):.1f})" for fps in asked])]
    for row in pick(rows, "both", "both, no FPS embedding"):
        yield line(row.name, [cell(row.spread("px a frame", fps), 2) for fps in asked])
    for kind in ("image", "video"):
        yield from ["", *heading(f"loss of {kind}s", [f"step {step}" for step in at])]
        for row in pick(rows, "neither", "both", "both, gated"):
            yield line(row.name, [cell(row.spread("loss", step, kind), 3) for step in at])


def line(name: str, cells: list[str]) -> str:
    return " | ".join(["| " + name, *cells]) + " |"


def heading(name: str, cells: list[str]) -> list[str]:
    return [line(name, cells), "|---|" + "---|" * len(cells)]


def pick(rows: dict[str, Row], *names: str) -> list[Row]:
    return [rows[name] for name in names if name in rows]


def speeds(results: list[dict]) -> list[str]:
    return list(results[0]["px a frame"])


def steps(results: list[dict]) -> list[str]:
    return list(results[0]["loss"])


def figure(results: list[dict], path: str):
    """Four panels: Table 2, Figure 7, speed against FPS, and what the gate does to the loss."""
    from matplotlib.figure import Figure  # of the extra `dev`

    drawing = Figure(figsize=(11, 7), layout="constrained")
    axes, rows = list(drawing.subplots(2, 2).flat), rows_of(results)
    draw_table(axes[0], rows)
    draw_sizes(axes[1], rows)
    draw_speeds(axes[2], rows, speeds(results))
    draw_losses(axes[3], rows, steps(results))
    for panel in axes:
        panel.legend(fontsize=8, ncols=2)
    drawing.savefig(path, dpi=100)


def draw_table(panel, rows: dict[str, Row]):
    shown = pick(rows, "neither", "triple data", "mixed embedding", "both")
    for n, name in enumerate(("color", "shape", "direction", "wrong cuts")):
        numbers = [row.share(name) for row in shown]
        panel.bar([i + 0.2 * (n - 1.5) for i in range(len(shown))], [middle for middle, *_ in numbers], 0.18,
                  yerr=whiskers(numbers), capsize=2, label=name)
    panel.set_xticks(range(len(shown)), [row.name for row in shown], fontsize=8)
    panel.set(title="Table 2 in small", ylabel="% of videos of held-out prompts", ylim=(0, 110))  # room for the legend


def draw_sizes(panel, rows: dict[str, Row]):
    names = {f"{n} videos": n for n in SIZES} | {"mixed embedding": Config.toy_clips}
    known = {n: rows[name] for name, n in names.items() if name in rows}
    for name in ("shape", "direction"):
        curve(panel, list(known), [row.share(name) for row in known.values()], label=name)
    panel.set(title="Figure 7 in small", xscale="log", xlabel="videos", ylabel="%")


def draw_speeds(panel, rows: dict[str, Row], asked: list[str]):
    fps = [float(name) for name in asked]
    for row in pick(rows, "both", "both, no FPS embedding"):
        curve(panel, fps, [row.spread("px a frame", name) for name in asked], label=row.name)
    panel.plot(fps, [toy.SPEED / f for f in fps], "k--", label="true")
    panel.set(title="What the FPS embedding says", xticks=fps, xlabel="FPS asked for", ylabel="px a frame")


def draw_losses(panel, rows: dict[str, Row], at: list[str]):
    for n, row in enumerate(pick(rows, "neither", "both", "both, gated")):
        for kind, style in (("image", "--"), ("video", "-")):
            curve(panel, range(len(at)), [row.spread("loss", step, kind) for step in at], color=f"C{n}",
                  linestyle=style, label=f"{row.name}, {kind}s")
    panel.set_xticks(range(len(at)), at)
    panel.set(title="Adding the mixed embedding to an image model", xlabel="steps of fine-tuning", ylabel="loss")


def curve(panel, x, numbers, **style):
    panel.errorbar(x, [middle for middle, *_ in numbers], whiskers(numbers), capsize=2, marker="o", **style)


def whiskers(numbers):
    """(middle, low, high) of each bar as matplotlib wants them: (2, N) lengths down and up."""
    return np.array([(max(middle - low, 0), max(high - middle, 0)) for middle, low, high in numbers]).T
