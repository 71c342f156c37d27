"""What a run starts from: its model and its data."""

import importlib.util
import os
from dataclasses import asdict, fields, replace

import torch

from cli import read_json, warn
from clips.changes import described, is_stale
from clips.encode import encode
from clips.encoded import EncodedClips, fingerprint
from clips.lists import is_there
from clips.samples import CAPTION_FPS, LABEL_FPS, SOURCES, LiveClips, Spec
from lab import toy
from sample import NoiseSchedule
from sd import Model, Settings, build, load
from sd.device import precision
from sd.presets import PRESETS, ModelConfig
from sd.sources import is_repository
from training.config import Config, portable, stages
from training.low_rank import add_low_rank
from training.ranks import Ranks

# ---------------------------------------------------------------------------------------------------------------------
# The model


def make_model(cfg: Config) -> Model:
    """The model that training starts from, on the CPU in fp32. Raises ValueError on what cannot be trained."""
    if cfg.init:
        if not (cfg.mixed_embedding and cfg.fps_embedding):
            raise ValueError("mixed_embedding and fps_embedding must be True for a model that is loaded: they are "
                             f"switched off for models that start from nothing, and {cfg.init} brings its own")
        model = load(cfg.init, prediction=cfg.prediction or None, layout=cfg.layout or None,
                     layout_options=cfg.layout_options)
    else:
        model = build(architecture(cfg), Settings(
            prediction=cfg.prediction or "epsilon", zero_snr=cfg.zero_snr, spacing=cfg.spacing,
            sampling_shift=cfg.sampling_shift, layout=cfg.layout or "grid", layout_options=cfg.layout_options))
    settings = model.settings
    if cfg.vae:
        donor = load(cfg.vae)
        origin = settings.origin | {"vae": donor.settings.origin.get("vae", {"file": portable(cfg.vae)})}
        model.vae = donor.vae
        settings = replace(settings, latent_scale=donor.settings.latent_scale, origin=origin)
    model.settings = replace(
        settings, frames=cfg.frames, width=cfg.width, height=cfg.height, fps=cfg.default_fps, fps_trained=all_fps(cfg),
        guidance=cfg.guidance, eta=cfg.eta,
        grid_trained=settings.grid_trained or cfg.train == "unet" and cfg.frames > 1,
        given_trained=settings.given_trained or cfg.train == "unet" and cfg.given_share > 0)
    NoiseSchedule(model.settings)  # raises where they do not go together
    model.check_size(cfg.width, cfg.height, cfg.frames if cfg.train == "unet" else 1)
    if cfg.train == "unet" and model.unet.layout.goes_on and any(stage.cfg.frames == 1 for stage in stages(cfg)):
        raise ValueError(f"frames must be > 1 at every step with the layout {model.settings.layout!r}: a single frame "
                         "has none before it, from which its layers would learn")
    if cfg.lora_rank:
        if model.unet.layout.per_frame and not settings.grid_trained:
            raise ValueError(f"lora_rank needs layers over time that were trained: those of layout {settings.layout!r} "
                             "are fresh here, and would stay so. Train them first, without lora_rank")
        if cfg.vae:
            warn(f"the LoRA will not hold the VAE of {cfg.vae}: it wants to be sampled with a model that has it")
        add_low_rank(model.unet, cfg.lora_rank)
    return model


def architecture(cfg: Config) -> ModelConfig:
    """The architecture of a model that starts from nothing."""
    preset = PRESETS[cfg.model]
    unet = replace(preset.unet, mixed_embedding=cfg.mixed_embedding, fps_embedding=cfg.fps_embedding)
    return replace(preset, unet=unet)


def all_fps(cfg: Config) -> tuple[float, ...]:
    """Every FPS value that the run trains, in rising order."""
    values = {"video": cfg.fps_values, "label": (LABEL_FPS,), "caption": (CAPTION_FPS,)}
    return tuple(sorted({float(fps) for source in SOURCES if cfg.mix.get(source) for fps in values[source]}))


# ---------------------------------------------------------------------------------------------------------------------
# The data


def data_lists(cfg: Config, render=True) -> dict[str, str]:
    """The list of each source in the mix. A missing toy world is rendered."""
    lists = {source: getattr(cfg, source) for source in SOURCES}
    if cfg.toy:
        if render:
            render_world(cfg)
        files = {"video": "videos.csv", "label": "labels", "caption": "images.jsonl"}
        lists = {source: path or os.path.join(cfg.toy, files[source]) for source, path in lists.items()}
    return {source: path for source, path in lists.items() if path and cfg.mix.get(source)}


def check_inputs(cfg: Config):
    """Raise ValueError or OSError on files and packages that are missing: told before a model is made."""
    for path in (cfg.init, cfg.vae):
        if path and not is_repository(path):
            os.stat(path)
    if cfg.wandb_log and not importlib.util.find_spec("wandb"):
        raise ValueError("wandb_log = True needs the package wandb: pip install wandb")
    if cfg.train == "unet" and cfg.encoded and os.path.exists(cfg.encoded):
        return
    lists = data_lists(cfg, render=False)
    for source in filter(cfg.mix.get, cfg.mix):
        if source not in lists and cfg.train == "unet":
            raise ValueError(f"mix asks for {source} samples, of which there is no list: set `{source}`, or take it "
                             "out of the mix")
        if source in lists and (getattr(cfg, source) or os.path.exists(cfg.toy)) and not is_there(lists[source]):
            os.stat(lists[source])  # raises


def render_world(cfg: Config):
    """Render the toy world if it is missing. Raises ValueError when one of other options is there."""
    world = {"clips": cfg.toy_clips, "images": cfg.toy_images, "captioned": cfg.toy_captioned,
             "level": cfg.toy_level, "size": cfg.width}
    try:
        if not os.path.exists(cfg.toy):
            toy.render(cfg.toy, **world)
        found = read_json(os.path.join(cfg.toy, "world.json"))
        if not isinstance(found, dict):
            raise ValueError("world.json must be a JSON object")
        found = {"level": 1} | found
    except (OSError, ValueError) as error:
        raise ValueError(f"the toy world {cfg.toy}: {error}") from error
    for name, ours in world.items():
        if found.get(name) != ours:
            raise ValueError(f"the toy world {cfg.toy} was rendered with {name} {found.get(name)}, the config says "
                             f"{ours}: choose another folder for `toy`, or remove it")


def make_ready(cfg: Config, model: Model, ranks: Ranks) -> dict[str, str]:
    """Render and encode what is missing, on all ranks -> the lists; none where everything is encoded already."""
    ahead = cfg.encoded if cfg.train == "unet" else ""

    def missing():
        if ahead and os.path.exists(ahead):
            require_current(cfg)
            return {}
        return data_lists(cfg)

    lists = ranks.from_rank_0("lists", missing)
    if ahead and lists:
        model.vae.to(ranks.device)
        model.text.to(ranks.device)
        encode(model, lists, ahead, sample_spec(cfg), text=not cfg.train_text, ranks=ranks)
        model.vae.to("cpu")
        model.text.to("cpu")
    return lists


def require_current(cfg: Config):
    """Raise ValueError when the lists hold other data than was encoded; warn where that cannot be known.

    Who has the folder alone, without the clips, trains on it as it is.
    """
    clips = EncodedClips(cfg.encoded, text=False)
    lists = clips.lists | data_lists(cfg, render=False)  # these may be the same in another place
    lists = {source: path for source, path in lists.items() if source in clips.lists and cfg.mix.get(source)}
    away = [path for path in lists.values() if not is_there(path)]
    changes = clips.changes({source: path for source, path in lists.items() if path not in away})
    if is_stale(changes):
        moved = [f" --{source} {path}" for source, path in lists.items() if path != clips.lists[source]]
        raise ValueError(f"{cfg.encoded} was encoded from other data: {described(changes)}; run "
                         f"`python -m clips.encode {cfg.encoded} --ckpt MODEL --update{''.join(moved)}`, or remove it")
    if away or changes is None or changes["absent"]:
        why = f"{', '.join(away)} cannot be found" if away else described(changes)
        warn(f"{cfg.encoded} is used as it is, changes of its data cannot be noticed: {why}")


def sample_spec(cfg: Config) -> Spec:
    return Spec(**{f.name: getattr(cfg, f.name) for f in fields(Spec)})


def open_clips(cfg: Config, model: Model, lists: dict[str, str], device) -> LiveClips | EncodedClips:
    """The samples of a run. Raises ValueError when they were encoded with other options, or by another model."""
    if not cfg.encoded:
        model.vae.to(device, memory_format=torch.channels_last)
        return LiveClips(lists, sample_spec(cfg))
    clips = EncodedClips(cfg.encoded, text=not cfg.train_text)
    for name, ours in asdict(sample_spec(cfg)).items():
        theirs = getattr(clips.spec, name)
        if theirs != ours and name != "seed":  # runs may share a folder
            raise ValueError(f"{cfg.encoded} was encoded with {name} = {theirs}, the config says {ours}: choose "
                             "another folder for `encoded`, or remove it")
    for what, theirs, network in (("VAE", clips.vae, model.vae), ("text tower", clips.tower, model.text)):
        if theirs and theirs != fingerprint(network):
            raise ValueError(f"{cfg.encoded} was encoded by another {what} than the model's: choose another folder for "
                             "`encoded`, or remove it")
    return clips


# ---------------------------------------------------------------------------------------------------------------------
# A batch through the module


def weights_dtype(cfg: Config) -> torch.dtype:
    """The precision that trained weights are kept in, whatever autocast computes in."""
    return torch.float64 if cfg.dtype == "float64" else torch.float32


def loss_of(cfg: Config, module, batch, device) -> torch.Tensor:
    """Loss of each sample (B,), in the precision of the run."""
    whole = weights_dtype(cfg)
    batch = [x.to(device, whole if x.is_floating_point() else x.dtype, non_blocking=True) for x in batch]
    with precision(getattr(torch, cfg.dtype), device):
        return module(*batch)
