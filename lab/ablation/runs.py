"""The runs of the ablations: what is compared, how each variant is trained, and what is noted of it.

As the paper's models all start from Stable Diffusion, all runs start from one tiny text-to-image model. It has seen
single pictures alone: no grid, no motion, no embedding of ETC's. At every sheet a run is graded by its averaged
weights, under a learning rate that stays, so that any two points of its curve compare. As many run at a time as there
are cores, and each leaves a line in the file of results; what has its line there is not run again.
"""

import hashlib
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import active_children, get_context

import numpy as np
import torch
from torch import nn

import sd
from cli import ROOT
from clips.samples import CAPTION_FPS
from data import generator
from embed import mixed_embedding
from grid import fold
from lab import toy
from lab.evals.toy import grade_fps, grade_prompts, trajectory_distances
from model import UNet
from sample import Request
from sd.device import precision
from sd.settings import LAYOUTS
from sd.vae import encode
from train import VALIDATION_TIMESTEPS, Denoising, UNetTask, in_precision, run
from training.checkpoints import claimed
from training.config import Config, Stage, assignments, read_config
from training.log import commit
from training.ranks import Ranks
from training.setup import loss_of, make_model, make_ready

CONFIGS = os.path.join(ROOT, "configs", "ablation")
SEEDS = 3
HOW = Request(sampler="dpm++sde", steps=10)  # graded as 50 steps are, see docs/fast.md

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
    layout: str = "grid"
    layout_options: dict = field(default_factory=dict)


SIZES = (54, 108, 216, 432)  # any 54 in a row show every trained triple; "mixed embedding" has all 864
VARIANTS = (
    Variant("neither", mixed_embedding=False, triple_data=False),
    Variant("triple data", mixed_embedding=False),
    Variant("mixed embedding", triple_data=False),
    Variant("both"),
    Variant("both, no FPS embedding", fps_embedding=False),
    Variant("both, gated", gate=True),
    *(Variant(f"{n} videos", triple_data=False, videos=n) for n in SIZES),
)
WAYS = (
    # a frame has 4 x 4 tokens here: with more squares, `pooled` would be the grid to the bit
    *(Variant(name, triple_data=False, layout=name, layout_options={"squares": 2} if name == "pooled" else {})
      for name in LAYOUTS),
    Variant("grid, gated", triple_data=False, gate=True),
)
STUDIES = {"paper": VARIANTS, "ways": WAYS}  # each has a config of its name, see config_of


class GatedUNet(UNet):
    """A UNet with a learned gate per channel on the mixed embedding: zero at first, so it starts as the image model."""

    def __init__(self, cfg, layout=None):
        super().__init__(replace(cfg, mixed_embedding=False), layout)
        self.gate = nn.Parameter(torch.zeros(cfg.latent_channels, 1, 1))

    def forward(self, x, t, context, fps=None, grid=None):
        (rows, cols), (*_, C, H, W) = grid, x.shape
        position = mixed_embedding(rows, cols, H // rows, W // cols, C).to(x.device)
        return super().forward(x.float() + self.gate * position, t, context, fps, grid)


def video_unet(variant: Variant, image: UNet) -> UNet:
    """The image model's UNet and, freshly initialised, what a variant adds to it."""
    cfg = replace(image.cfg, mixed_embedding=variant.mixed_embedding, fps_embedding=variant.fps_embedding)
    unet = (GatedUNet if variant.gate else UNet)(cfg, image.layout)
    unet.load_state_dict(unet.state_dict() | image.state_dict())
    return unet


def image_unet(shipped: UNet) -> UNet:
    """A fresh UNet like the shipped model's, without ETC's additions."""
    return UNet(replace(shipped.cfg, mixed_embedding=False, fps_embedding=False))


# ---------------------------------------------------------------------------------------------------------------------
# Training, as train.py does


def train(cfg: Config, make_unet, variant=Variant(""), make_task=UNetTask) -> UNetTask:
    """Train a run to its end; make_unet turns the UNet of the checkpoint that it starts from into its own."""
    with Ranks(cfg.timeout) as ranks, claimed(cfg, ranks):
        cfg = in_precision(replace(cfg, layout=variant.layout, layout_options=variant.layout_options), ranks)
        torch.manual_seed(cfg.seed)
        model = make_model(cfg)
        model.unet = make_unet(model.unet)
        lists = make_ready(cfg, model, ranks)  # all of the mix, whatever the variant: runs share what is encoded
        if not variant.triple_data:
            cfg = replace(cfg, mix={"video": 1})
        task = make_task(cfg, model, lists, ranks)
        run(cfg, ranks, task)
        return task


class ProbedTask(UNetTask):
    """A UNetTask that, where others show a sheet, notes what the model is like; before the first step, too.

    videos  how many there are to train on; 0: all
    """

    def __init__(self, videos: int, cfg: Config, model: sd.Model, *given):
        self.videos, self.curve = videos, {}  # step, a string as in JSON -> what was seen
        super().__init__(cfg, model, *given)

    def begin(self, stage: Stage, step: int):
        super().begin(stage, step)
        if self.videos:
            self.stream.sizes["video"] = self.videos

    def batch(self):
        if not self.curve:
            self.curve["0"] = probe(self.cfg, self.model)
        return super().batch()

    def sheet(self, model):
        self.curve[str(model.settings.origin["unet"]["steps"])] = probe(self.cfg, model)


# ---------------------------------------------------------------------------------------------------------------------
# What is noted of a model


def probe(cfg: Config, model: sd.Model) -> dict:
    """What the held-out prompts become, graded; px a frame at each FPS; and mean losses on true renders of them, under
    noise that is always the same: of single images, which are what the model knew before, and of videos."""
    with precision(getattr(torch, cfg.dtype), next(model.unet.parameters()).device):
        report = grade_prompts(model, "test", 1, HOW)
        rows = grade_fps(model, "test", cfg.fps_values, HOW)
        second = {"level 2": shares(grade_prompts(model, "test", 1, HOW, level=2))} if cfg.toy_level == 2 else {}
    loss = true_loss(cfg, model, cfg.default_fps)
    return {**shares(report), **second, "image": true_loss(replace(cfg, frames=1), model, CAPTION_FPS), "video": loss,
            "worth of direction": worth_of_direction(cfg, model, loss),
            "trajectories": trajectory_distances(report.tracks, "test", 1, model.settings.fps)["model"],
            "px a frame": {str(fps): row[0] if row else math.nan for fps, row in rows.items()}}


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def worth_of_direction(cfg: Config, model: sd.Model, loss: float) -> float:
    """How many percent the loss on videos rises when captions say the opposite direction: a model knows of motion long
    before it draws any."""
    wrong = [(color, shape, OPPOSITE[direction], background) for color, shape, direction, background in
             toy.scenes("test")]
    return 100 * (true_loss(cfg, model, cfg.default_fps, wrong) / loss - 1)


@torch.no_grad()
def true_loss(cfg: Config, model: sd.Model, fps: float, said=None) -> float:
    """Mean loss over VALIDATION_TIMESTEPS; said: the scenes in the captions, when they are not those in the videos."""
    rng, scenes = np.random.default_rng(0), toy.scenes("test")
    device, n = next(model.unet.parameters()).device, len(scenes)
    latents = torch.stack([encode(model, toy.true_render(scene, rng, cfg.frames, cfg.default_fps)) for scene in scenes])
    said = [(*scene[:2], scene[2] if cfg.frames > 1 else None, scene[3]) for scene in said or scenes]  # no still moves
    context = model.text.encode([toy.caption(*scene) for scene in said])
    module = Denoising(model, cfg, None)
    losses = []
    for t in VALIDATION_TIMESTEPS:
        eps = torch.randn(fold(latents, *module.grid).shape, generator=generator("probe", t))
        batch = latents, context, torch.full((n,), float(fps)), torch.full((n,), t), eps
        losses.append(loss_of(cfg, module, batch, device).mean())
    return torch.stack(losses).mean().item()


def shares(report) -> dict:
    """How many videos of a report there are, are right in what (at level 2, how many shapes), and are wrong in what."""
    return {"videos": report.videos, **{name: count for name, (count, _) in report.counts().items()}}


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def config_of(study: str) -> Config:
    """What its runs start from; variant and seed come on top."""
    return read_config([os.path.join(CONFIGS, name + ".py") for name in ("run", study)])


def recipe_of(*configs: str) -> str:
    """A digest of what text-to-image model and runs come from: shipped weights, and what image.py and some other
    configs assign. Lines and models of another recipe do not count."""
    values = [assignments(os.path.join(CONFIGS, name + ".py")) for name in ("image", *configs)]
    with open(values[0]["init"], "rb") as file:
        return hashlib.sha256(repr(values).encode() + file.read()).hexdigest()[:12]


def results_of(study: str, path: str) -> list[dict]:
    """The lines of a file of results that are of the study as it is now."""
    recipe = recipe_of("run", study)
    return [result for result in read_results(path) if result.get("recipe") == recipe]


def prepare_runs(study: str) -> Config:
    """Make what all runs share and is not there yet, the text-to-image model and the encoded clips -> their config."""
    image = read_config([os.path.join(CONFIGS, "image.py")])
    image = replace(image, out_dir=f"{image.out_dir}-{recipe_of()}")
    path = os.path.join(image.out_dir, "model.safetensors")
    if not os.path.exists(path):
        train(image, image_unet)
    cfg = replace(config_of(study), init=path)
    with Ranks(cfg.timeout) as ranks:
        make_ready(cfg, make_model(cfg), ranks)
    return cfg


def ablate(study: str, results: str):
    """Run every variant of a study with every seed that has no line in the file of results yet.

    As many run at a time as there are cores, each on one: a run gains little from a second core, and one card, for
    models so small, is idle until the next of many runs asks.
    """
    done = [(result["variant"], result["seed"]) for result in results_of(study, results)]
    todo = [(variant, seed) for seed in range(SEEDS) for variant in STUDIES[study] if (variant.name, seed) not in done]
    if not todo:
        return
    cfg, recipe = prepare_runs(study), recipe_of("run", study)  # now: later the files may be others
    workers = torch.get_num_threads()
    print(f"runs: {len(todo)}, {workers} at a time; what they say goes to {cfg.out_dir}/*/log", flush=True)
    context = get_context("spawn")  # a fork of this process could neither use a GPU nor all of torch
    with (Ranks(cfg.timeout) as ranks, claimed(cfg, ranks),
          ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool):
        try:
            futures = [pool.submit(one_run, cfg, *it) for it in todo]
            for n, future in enumerate(as_completed(futures), 1):
                result = future.result() | {"recipe": recipe}
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{n} of {len(todo)}: {result['variant']}, seed {result['seed']}", flush=True)
        except BaseException:
            for process in active_children():  # asked to stop, a run would save, and its process begin the next
                process.kill()
            raise


def one_run(cfg: Config, variant: Variant, seed: int) -> dict:
    """Train and grade a variant -> its line of results."""
    cfg = replace(cfg, seed=seed, out_dir=os.path.join(cfg.out_dir, f"{variant.name} {seed}"))
    shutil.rmtree(cfg.out_dir, ignore_errors=True)  # of a run that was interrupted: its curve is not in a checkpoint
    os.makedirs(cfg.out_dir)
    began = time.time()
    path = os.path.join(cfg.out_dir, "log")
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        task = train(cfg, lambda unet: video_unet(variant, unet), variant, partial(ProbedTask, variant.videos))
    shutil.rmtree(cfg.out_dir)
    return {"variant": variant.name, "seed": seed, "dtype": task.cfg.dtype, "curve": task.curve,
            "seconds": round(time.time() - began), "commit": commit()}


def read_results(path: str) -> list[dict]:
    if not os.path.exists(path):
        return []
    results = []
    with open(path, encoding="utf-8") as file:
        for n, line in enumerate(file, 1):
            try:
                results.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {n}: not the result of a run: remove it") from error
    return results
