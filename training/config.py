"""Every option of a run, and how config files and the command line set them. Nothing in a config is executed."""

import ast
import os
import typing
from dataclasses import dataclass, fields, replace

import cli
from cli import option
from clips.pictures import read_color
from clips.samples import SOURCES
from grid import grid_shape
from sample import NoiseSchedule
from sd.presets import PRESETS
from sd.settings import LAYOUTS


@dataclass
class Config:
    """The knobs of a run. Config files assign some of them, in order; `--name=value` on the command line goes last."""

    # what is trained
    train: str = option("unet", "the denoiser on latents, or the autoencoder on frames", choices=("unet", "vae"))
    model: str = option("tiny", "architecture of a model that starts from nothing", choices=tuple(PRESETS))
    init: str = option("", "the checkpoint to start from; without, random weights")
    vae: str = option("", "the checkpoint to take the VAE and its latent scale from, when not `init`; or a config of "
                      "train = \"vae\", whose run makes it first")
    layout: str = option("", "how the tokens of a clip meet; without, what the checkpoint says, or grid",
                         choices=("", *LAYOUTS))
    layout_options: dict = option({}, "of the layout, where it is chosen here, like {'positions': 256}")
    lora_rank: int = option(0, "train changes of this rank to the weights of the UNet's attention, which stay as they "
                            "are with all else; 0 trains all", low=0)
    train_text: bool = option(False, "train the text tower too; Stable Diffusion keeps it frozen")
    mixed_embedding: bool = option(True, "off for ablations")
    fps_embedding: bool = option(True, "off for ablations")
    checkpointing: bool = option(False, "recompute activations in backward: a third more time, a fraction of the "
                                "memory")

    # data
    toy: str = option("", "folder of the toy world, rendered when missing; its lists are used where none are given")
    toy_clips: int = option(864, "videos of the toy world", low=0, high=10**7)
    toy_images: int = option(16, "images per label of the toy world", low=0, high=10**7)
    toy_captioned: int = option(720, "captioned images of the toy world", low=0, high=10**7)
    toy_level: int = option(1, "2: every other clip and captioned image of the toy world is of two shapes", low=1,
                            high=2)
    video: str = option("", "list of clips: CSV, JSON lines, MSR-VTT's json, or a folder (see docs/data.md)")
    label: str = option("", "folder of a folder of images per label, or a file of their names")
    caption: str = option("", "list of captioned images")
    encoded: str = option("", "folder of encoded clips, made when missing; without, clips are decoded while training")
    workers: int = option(0, "processes that read ahead; decoding while training wants them", low=0, high=256)
    max_bad: float = option(0.1, "share of the samples that may be unusable", low=0, high=1)
    mix: dict = option({"video": 2, "label": 1, "caption": 1}, "shares of the sources in a batch")
    frames: int = option(16, "of a clip; they must make a grid", low=1)
    width: int = option(256, "of a frame, in pixels", low=1)
    height: int = option(256, "of a frame, in pixels", low=1)
    fps_values: tuple[int, ...] = option((1, 2, 4, 8, 15, 30, 60), "frame rates of clips (Equation 6)", low=1, high=60)
    starts: int = option(1, "different starts per clip and FPS", low=1, high=1000)
    draws: int = option(16, "different sets of images per label", low=1, high=1000)
    random_crop: bool = option(False, "instead of the middle")
    flip: bool = option(False, "mirror half of the samples whose caption cannot mention a side")
    frame_pool: int = option(8000, "frames in memory for training a VAE", low=1, high=10**7)
    background: str = option("white", "color that shows through what is transparent, like white or #ffcc00")
    captions: str = option("", "from_names: without any, the name of the file; else the field that says them")
    drop_caption: float = option(0.1, "share of captions dropped, for classifier-free guidance", low=0, high=1)
    validation: int = option(0, "last items of each list that are held out, to measure the validation loss", low=0)

    # diffusion
    prediction: str = option("", "epsilon or v; without, what the checkpoint says, or epsilon",
                             choices=("", "epsilon", "v"))
    zero_snr: bool = option(False, "end the noise schedule in pure noise; a checkpoint brings its own")
    spacing: str = option("leading", "of the sampler's timesteps; a checkpoint brings its own",
                          choices=("leading", "trailing"))
    sampling_shift: float = option(1.0, "more than 1: more of the sampler's steps where there is more noise; a "
                                   "checkpoint brings its own", low=1, high=1000)
    timesteps: tuple[int, int] = option((0, NoiseSchedule.timesteps), "training range, half-open: [first, last)", low=0,
                                        high=NoiseSchedule.timesteps)
    timestep_shift: float = option(1.0, "s > 1 trains noisy timesteps more often: half of them lie above s / (1 + s) "
                                   "of the range", above=0, high=1000)
    timestep_width: float = option(1.0, "w < 1 trains timesteps near that middle more often", above=0, high=10)
    draw_latents: bool = option(True, "from the VAE's posterior; False trains on its mean, where a high kl_weight has "
                                "made noise of what a picture can do without")
    given_share: float = option(0.0, "share of the samples in which some frames are given, see beyond/frames.py", low=0,
                                high=1)
    default_fps: float = option(30, "of samples, when nothing else is asked for", low=0, high=120)
    guidance: float = option(7.0, "guidance scale of samples, when nothing else is asked for")
    eta: float = option(0.0, "noise that DDIM adds to samples, when nothing else is asked for", low=0, high=1)

    schedule: dict = option({}, "other values until some steps, like {1000: {'frames': 1, 'mix': {'caption': 1}}}")

    # VAE
    kl_weight: float = option(1e-6, "of the KL per latent number, beside the squared error per pixel", low=0)

    # optimizer
    max_steps: int = option(15_000, "in total, resumed or not", low=1, high=10**9)
    batch_size: int = option(6, "per process; times accumulate times processes is what one step sees", low=1)
    accumulate: int = option(1, "micro-batches per step", low=1, high=10**5)
    optimizer: str = option("adamw", "adamw for all, or muon for the weights of layers, see training/muon.py",
                            choices=("adamw", "muon"))
    lr: float = option(1e-4, "learning rate (5.1)", low=0)
    warmup: int = option(0, "steps of linear warm-up", low=0)
    cooldown: int = option(0, "last steps, linearly down to 0", low=0)
    betas: tuple[float, float] = option((0.9, 0.9), "of AdamW (E.2)", low=0, high=1)
    weight_decay: float = option(0.03, "of AdamW (E.2)", low=0)
    clip: float = option(1.0, "largest global norm of the gradient; 0 for no limit", low=0)
    ema: float = option(0.0, "decay of the weights' moving average, 0 for none; it warms up as (1 + n) / (10 + n)",
                        low=0, high=1)
    dtype: str = option("float16", "of autocast, weights are float32; auto is float16 on CUDA, bfloat16 on a CPU with "
                        "units for it, else float32; float64 is for everything",
                        choices=("auto", "float32", "bfloat16", "float16", "float64"))

    # the run
    out_dir: str = option("runs/base", "checkpoints, metrics.jsonl, sheets, model.safetensors")
    seed: int = option(0, "of weights, order, timesteps and noise", low=0)
    log_every: int = option(10, "steps", low=1)
    sheet_every: int = option(500, "steps: model.safetensors, validation loss, and with `prompts` a sheet of samples",
                              low=1)
    save_every: int = option(500, "steps: a checkpoint to resume from", low=1)
    keep: int = option(2, "checkpoints", low=1)
    resume: bool = option(True, "from the newest whole checkpoint; False refuses a folder that has one")
    timeout: float = option(600.0, "seconds without progress after which a rank ends the job", above=0,
                            high=1e6)
    prompts: tuple[str, ...] = option((), "of the sheet")
    sheet_clips: int = option(0, "clips of the sheet: what the VAE keeps of them, above what is made of their captions",
                              low=0, high=100)
    licence: str = option("", "of the data and the base weights, for the file's header")
    wandb_log: bool = option(False, "to Weights & Biases too: the same numbers as in metrics.jsonl")
    wandb_project: str = option("etc", "there")
    wandb_run_name: str = option("", "there")
    dry_run: bool = option(False, "say what the run will need, and stop")


@dataclass
class CommandLine(Config):
    configs: tuple[str, ...] = option((), "config files, applied in order", positional=True)


def read_config(arguments: list[str], description="") -> Config:
    """The config of a command line: config files, applied in order, then `--name=value` or `--name value`.

    Raises ValueError or OSError on an unknown name (with the nearest one), a wrong type or range, or a file that holds
    anything but assignments of plain values.
    """
    files, values = cli.parse(CommandLine, description, arguments).configs, {}
    if not files:
        raise ValueError("a config is needed, like: python train.py configs/tiny.py (see --help)")
    for path in files:
        values |= assignments(path)
    given = vars(cli.parse(CommandLine, description, arguments, **values))
    cfg = Config(**{f.name: given[f.name] for f in fields(Config)})
    check_config(cfg)
    return cfg


SCHEDULED = ("frames", "fps_values", "mix", "drop_caption", "timesteps", "timestep_shift", "timestep_width",
             "given_share", "batch_size", "lr", "clip")


@dataclass(frozen=True)
class Stage:
    """Some steps of a run, [first, last), and the config that holds there.

    position  of their first sample in the stream, on all ranks together
    """

    first: int
    last: int
    cfg: Config
    position: int


def stages(cfg: Config, ranks=1) -> list[Stage]:
    """The stages of a run: one for each entry of `schedule`, and the rest with the config's own values."""
    found, first, position = [], 0, 0
    for last, values in [*cfg.schedule.items(), (cfg.max_steps, {})]:
        now = changed(cfg, values)
        size = now.batch_size * now.accumulate * ranks
        position = -(-position // size) * size  # its steps are multiples of their size
        found.append(Stage(first, last, now, position))
        first, position = last, position + (last - first) * size
    return found


def changed(cfg: Config, values: dict) -> Config:
    """A config with other values, as a file would assign them."""
    kinds = typing.get_type_hints(Config)
    return replace(cfg, **{name: cli.shaped(value, kinds[name]) for name, value in values.items()})


# what a run has in common with the one that makes its VAE
SHARED = ("init", "toy", "toy_clips", "toy_images", "toy_captioned", "toy_level", "video", "label", "caption", "mix",
          "frames", "width", "height", "fps_values", "random_crop", "flip", "background", "captions", "dtype", "resume",
          "timeout", "dry_run")


def in_parts(cfg: Config) -> list[Config]:
    """The runs that a config asks for, in their order: where `vae` is a config, the one that makes the VAE, in a folder
    of the other's; then its own. Raises ValueError or OSError where that is no config of a VAE."""
    if not cfg.vae.endswith(".py"):
        return [cfg]
    first = read_config([cfg.vae])
    if cfg.train != "unet" or first.train != "vae" or first.vae:
        raise ValueError(f"vae must be a checkpoint, or a config of train = \"vae\" for one of \"unet\", got {cfg.vae}")
    first = replace(first, out_dir=os.path.join(cfg.out_dir, "vae"), **{name: getattr(cfg, name) for name in SHARED})
    return [first, replace(cfg, vae=os.path.join(first.out_dir, "model.safetensors"))]


def portable(value):
    """A value of a config for a file that travels: an absolute path keeps its last part only."""
    is_path = isinstance(value, str) and os.path.isabs(value)
    return os.path.basename(os.path.normpath(value)) if is_path else value


def assignments(path: str) -> dict:
    """What a config file assigns: name -> plain value. Raises ValueError, naming the line, on anything else."""
    try:
        tree = ast.parse(cli.read_text(path), path)
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"{path}: brackets stand too deep in one another") from error
    kinds = typing.get_type_hints(Config)
    values, docstring = {}, ast.get_docstring(tree) is not None
    for node in tree.body[docstring:]:
        where = f"{path}, line {node.lineno}"
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ValueError(f"{where}: a config holds assignments of plain values, nothing else")
        name = node.targets[0].id
        try:
            values[name] = cli.shaped(ast.literal_eval(node.value), kinds.get(name))
        except (TypeError, ValueError, MemoryError, RecursionError):
            raise ValueError(f"{where}: {name} must be a plain value, like 8, 0.5, True or \"text\"") from None
        if name not in kinds:
            raise ValueError(f"{where}: {cli.unknown_option(name, Config)}")
        try:
            cli.check(Config(**{name: values[name]}))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return values


def check_schedule(cfg: Config):
    """Raise ValueError on a schedule that cannot be kept."""
    before = 0
    for step, values in cfg.schedule.items():
        if type(step) is not int or not before < step < cfg.max_steps or not isinstance(values, dict):
            raise ValueError("schedule must give other values until some steps, in rising order and before max_steps, "
                             f"like {{1000: {{'lr': 1e-3}}}}, got {step!r}: {values!r}")
        for name in values:
            if name not in SCHEDULED:
                raise ValueError(f"schedule must change {', '.join(SCHEDULED)}, got {name!r}")
        before, now = step, changed(replace(cfg, schedule={}), values)
        try:
            cli.check(now)
            check_config(now)
        except ValueError as error:
            raise ValueError(f"schedule, until step {step}: {error}") from error
        unknown = [source for source in now.mix if now.mix[source] and not cfg.mix.get(source)]
        if unknown:
            raise ValueError(f"schedule, until step {step}: mix must be of the sources in the config's own, not "
                             f"{', '.join(unknown)}")
        if not set(now.fps_values) <= set(cfg.fps_values):
            raise ValueError(f"schedule, until step {step}: fps_values must be some of the config's own, got "
                             f"{now.fps_values}")
        if now.frames != cfg.frames and [source for source in now.mix if now.mix[source]] != ["caption"]:
            raise ValueError(f"schedule, until step {step}: {now.frames} frames, not {cfg.frames}, go with captioned "
                             "images alone, mix = {'caption': 1}: clips are of one length in all of a run")


def check_config(cfg: Config):
    """Raise ValueError on values that are each possible, but mean nothing together."""
    shares = cfg.mix.values()
    whole = all(type(n) is int and 0 <= n <= 1000 for n in shares)
    if not all(s in SOURCES for s in cfg.mix) or not whole or not sum(shares):
        raise ValueError(f"mix must give each of {', '.join(SOURCES)} a whole number in 0..1000, not all 0, got "
                         f"{cfg.mix}")
    if not cfg.fps_values:
        raise ValueError("fps_values must hold at least one frame rate")
    if max(cfg.betas) == 1:
        raise ValueError(f"betas must be < 1, got {cfg.betas}")
    if not cfg.timesteps[0] < cfg.timesteps[1]:
        raise ValueError(f"timesteps must be a range [first, last) with first < last, got {cfg.timesteps}")
    if cfg.lora_rank and (cfg.train_text or cfg.train == "vae"):
        other = "train_text" if cfg.train_text else 'train = "vae"'
        raise ValueError(f"lora_rank and {other} do not go together: it is of the UNet, and all else stays as it is")
    if cfg.lora_rank and not cfg.init:
        raise ValueError("lora_rank needs init: the model that it is a change of")
    read_color(cfg.background)
    grid_shape(cfg.frames)
    check_schedule(cfg)
    if cfg.given_share and cfg.frames == 1:
        raise ValueError("given_share needs frames > 1: of one frame nothing can be given")
