"""Every option of a run, and how a config file and the command line set them. Nothing in a config is executed."""

import ast
import difflib
import math
import re
import typing
from dataclasses import dataclass, field

import model as models
from data import SOURCES
from grid import grid_shape
from sample import NoiseSchedule
from sd.checkpoint import UserError

PRESETS = {"micro": models.MICRO, "tiny": models.TINY, "sd15": models.SD15, "sd21": models.SD21}


@dataclass
class Config:
    """Every knob of a run. A config file assigns some of them; `--name=value` on the command line goes last."""

    # what is trained
    train: str = "unet"  # "unet": the denoiser on latents; "vae": the autoencoder on frames
    model: str = "tiny"  # architecture of a model that starts from nothing: micro, tiny, sd15 or sd21
    init: str = ""  # the checkpoint to start from; "" starts from random weights
    vae: str = ""  # the checkpoint to take the VAE and its latent scale from, when not `init`
    train_text: bool = False  # the text tower too; Stable Diffusion keeps it frozen
    mixed_embedding: bool = True  # off for ablations
    fps_embedding: bool = True  # likewise
    checkpointing: bool = False  # recompute activations in backward: a third more time, a fraction of the memory

    # data
    toy: str = ""  # folder of the toy world, rendered when missing; its lists are used where none are given
    toy_clips: int = 864  # videos
    toy_images: int = 16  # images a label
    toy_captioned: int = 720  # captioned images
    toy_moving: bool = False  # half of both are of something that moves, and say so
    video: str = ""  # list of clips; what lists may be is said in data.py
    label: str = ""  # folder of folders of images, or a file of their names
    caption: str = ""  # list of captioned images
    encoded: str = ""  # folder of their latents, encoded when missing; "" decodes and encodes live
    workers: int = 0  # processes that read ahead; decoding live wants them
    max_bad: float = 0.1  # share of the samples that may be unusable
    mix: dict = field(default_factory=lambda: {"video": 2, "label": 1, "caption": 1})  # shares of a batch
    frames: int = 16  # of a clip; they must make a grid, see grid.py
    width: int = 256  # of a frame, in pixels
    height: int = 256  # likewise
    fps_values: tuple = (1, 2, 4, 8, 15, 30, 60)  # Equation 6
    starts: int = 1  # different starts a clip and FPS
    draws: int = 16  # different sets of images a label
    random_crop: bool = False  # else the middle
    flip: bool = False  # mirror half of the samples whose caption cannot mention a side
    frame_pool: int = 8000  # frames in memory for training a VAE
    drop_caption: float = 0.1  # captions dropped, for classifier-free guidance
    validation: int = 0  # last items of each list that are never trained on, to measure the validation loss

    # diffusion
    prediction: str = ""  # "epsilon" or "v"; "" is what the checkpoint says, ε for a model that starts from nothing
    zero_snr: bool = False  # these two for a model that starts from nothing; a checkpoint brings its own
    spacing: str = "leading"  # of the sampler's timesteps; "trailing" goes with zero_snr
    timesteps: tuple = (0, 1000)  # trained are those from the first up to, not with, the last
    timestep_shift: float = 1.0  # s > 1 trains noisy timesteps more often: half of them lie above s / (1 + s) of those
    timestep_width: float = 1.0  # w < 1 trains those near that middle more often, and all of them still sometimes
    default_fps: float = 30  # what sampling asks for when the user does not
    guidance: float = 7.0  # likewise
    eta: float = 0.0  # likewise: noise that DDIM adds, 0..1

    # VAE
    kl_weight: float = 1e-6  # of the KL a latent number, beside the squared error a pixel

    # optimizer
    max_steps: int = 15_000  # in total, resumed or not
    batch_size: int = 6  # a process; times `accumulate` times processes is what one step sees
    accumulate: int = 1  # micro-batches a step
    lr: float = 1e-4  # 5.1
    warmup: int = 0  # steps of linear warm-up
    cooldown: int = 0  # last steps, linearly down to 0
    betas: tuple = (0.9, 0.9)  # E.2
    weight_decay: float = 0.03  # E.2
    clip: float = 1.0  # global gradient norm, 0 for none
    ema: float = 0.0  # decay of the weights' moving average, 0 for none; it warms up as (1 + n) / (10 + n)
    dtype: str = "float16"  # of autocast: float32, bfloat16 or float16; weights are fp32. float64: everything

    # the run
    out_dir: str = "runs/base"  # checkpoints, metrics.jsonl, sheets, model.safetensors
    seed: int = 0  # of weights, order, timesteps and noise
    log_every: int = 10  # steps
    sheet_every: int = 500  # steps: model.safetensors, validation loss, and with `prompts` a sample sheet
    save_every: int = 500  # steps: a checkpoint to resume from
    keep: int = 2  # checkpoints
    resume: bool = True  # from the newest whole checkpoint; False refuses a folder that has one
    timeout: float = 600.0  # seconds that a rank may do nothing before it ends the job
    prompts: tuple = ()  # of the sheet
    licence: str = ""  # of the data and the base weights, for the file's header
    wandb_log: bool = False  # to Weights & Biases too: the same numbers as in metrics.jsonl
    wandb_project: str = "etc"  # there
    wandb_run_name: str = ""  # there
    dry_run: bool = False  # say what the run will need, and stop


def read_config(path: str, overrides: list[str]) -> Config:
    """The config in a file of plain assignments, with `--name=value` overrides. Nothing in it is executed.

    Raises UserError on an unknown name (with the nearest one), a wrong type, or anything that is no assignment.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from error
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}"
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}: a config holds assignments of plain values, nothing else")
        try:
            check_value(values, node.targets[0].id, ast.literal_eval(node.value), where)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {node.targets[0].id} is not a plain value") from error
    for override in overrides:
        match = re.fullmatch(r"--(\w+)(?:=(.*))?", override, re.DOTALL)
        if not match:
            raise UserError(f"{override!r} is no override: write --name=value")
        name, text = match[1], match[2] if match[2] is not None else "True"
        try:
            value = ast.literal_eval(text)
        except (TypeError, ValueError, SyntaxError):
            value = text  # a bare word is a string
        check_value(values, name, value, override)
    cfg = Config(**values)
    check_config(cfg)
    return cfg


POSITIVE = ("max_steps", "batch_size", "accumulate", "log_every", "sheet_every", "save_every", "keep", "timeout",
            "timestep_shift", "timestep_width", "width", "height", "starts", "draws", "frame_pool")
RANGES = {(0, math.inf): ("seed", "workers", "validation", "lr", "warmup", "cooldown", "weight_decay", "clip",
                          "kl_weight", "toy_clips", "toy_images", "toy_captioned"),
          (0, 1): ("eta", "ema", "drop_caption", "max_bad"),
          (0, 120): ("default_fps",)}


def check_config(cfg: Config):
    """Raise UserError on values of the right type that mean nothing."""
    choices = {"train": ("unet", "vae"), "model": tuple(PRESETS),
               "dtype": ("float32", "bfloat16", "float16", "float64")}
    for name, known in choices.items():
        if getattr(cfg, name) not in known:
            raise UserError(f"{name} is one of {', '.join(known)}, not {getattr(cfg, name)!r}")
    for name in POSITIVE:
        if getattr(cfg, name) <= 0:
            raise UserError(f"{name} is more than 0, not {getattr(cfg, name)}")
    for (low, high), names in RANGES.items():
        for name in names:
            if not low <= getattr(cfg, name) <= high:
                within = f"lies in {low}..{high}" if high < math.inf else f"is at least {low}"
                raise UserError(f"{name} {within}, not {getattr(cfg, name)}")
    shares = cfg.mix.values()
    if not all(s in SOURCES for s in cfg.mix) or not all(type(n) is int and n >= 0 for n in shares) or not sum(shares):
        raise UserError(f"mix gives each of {', '.join(SOURCES)} a whole number, not all 0; it is {cfg.mix}")
    if not cfg.fps_values or not all(type(f) is int and 1 <= f <= 60 for f in cfg.fps_values):
        raise UserError(f"fps_values are whole numbers in 1..60, not {cfg.fps_values}")
    if len(cfg.betas) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in cfg.betas):
        raise UserError(f"betas are two numbers from 0 up to, not with, 1; they are {cfg.betas}")
    if not all(type(prompt) is str for prompt in cfg.prompts):
        raise UserError(f"prompts are texts, not {cfg.prompts}")
    whole = len(cfg.timesteps) == 2 and all(type(t) is int for t in cfg.timesteps)
    if not whole or not 0 <= cfg.timesteps[0] < cfg.timesteps[1] <= NoiseSchedule.timesteps:
        raise UserError(f"timesteps are two rising whole numbers in 0..{NoiseSchedule.timesteps}, not {cfg.timesteps}")
    try:
        grid_shape(cfg.frames)
    except ValueError as error:
        raise UserError(f"frames: {error}") from error


def check_value(values: dict, name: str, value, where: str):
    """Put a value under its name if both are right for a Config."""
    types = typing.get_type_hints(Config)
    if name not in types:
        near = difflib.get_close_matches(name, types, n=1)
        raise UserError(f"{where}: there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    kind = types[name]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {name} is of type {kind.__name__}, not {type(value).__name__} ({value!r})")
    values[name] = value
