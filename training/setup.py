"""What a run starts from: its model and its data."""

import json
import os
import sys
from dataclasses import asdict, fields, replace

import torch

from clips.encode import encode
from clips.encoded import EncodedClips, fingerprint, read_settings
from clips.samples import SOURCES, LiveClips, Spec
from lab import toy
from sample import NoiseSchedule
from sd import Model, Settings, build, load
from sd.device import precision
from sd.presets import PRESETS, ModelConfig
from training.config import Config

# ---------------------------------------------------------------------------------------------------------------------
# Model and data of a run


def make_model(cfg: Config) -> Model:
    """The model that training starts from, on the CPU in fp32. Raises ValueError on what cannot be trained."""
    if cfg.init:
        if not (cfg.mixed_embedding and cfg.fps_embedding):
            raise ValueError("mixed_embedding and fps_embedding are switched off for models that start from nothing: "
                            f"{cfg.init} brings its own")
        model = load(cfg.init, prediction=cfg.prediction or None)
        settings = model.settings
    else:
        settings = Settings(prediction=cfg.prediction or "epsilon", zero_snr=cfg.zero_snr, spacing=cfg.spacing)
        model = build(architecture(cfg), settings)
    if cfg.vae:
        donor = load(cfg.vae)
        origin = settings.origin | {"vae": donor.settings.origin.get("vae", {"file": cfg.vae})}
        model.vae = donor.vae
        settings = replace(settings, latent_scale=donor.settings.latent_scale, origin=origin)
    fps = tuple(sorted({float(f) for f in cfg.fps_values if cfg.mix.get("video")}
                       | ({0.0} if cfg.mix.get("label") else set()) | ({120.0} if cfg.mix.get("caption") else set())))
    model.settings = replace(
        settings, frames=cfg.frames, width=cfg.width, height=cfg.height, fps=cfg.default_fps, fps_trained=fps,
        guidance=cfg.guidance, eta=cfg.eta,
        grid_trained=settings.grid_trained or cfg.train == "unet" and cfg.frames > 1)
    NoiseSchedule(model.settings)
    model.check_size(cfg.width, cfg.height, cfg.frames if cfg.train == "unet" else 1)
    return model


def architecture(cfg: Config) -> ModelConfig:
    """Of a model that starts from nothing."""
    preset = PRESETS[cfg.model]
    unet = replace(preset.unet, mixed_embedding=cfg.mixed_embedding, fps_embedding=cfg.fps_embedding)
    return replace(preset, unet=unet)


def data_lists(cfg: Config, render=True) -> dict[str, str]:
    """source -> list. A missing toy world is rendered."""
    lists = {source: getattr(cfg, source) for source in SOURCES}
    if cfg.toy:
        if render:
            render_world(cfg)
        files = {"video": "videos.csv", "label": "labels", "caption": "images.jsonl"}
        lists = {source: path or os.path.join(cfg.toy, files[source]) for source, path in lists.items()}
    return {source: path for source, path in lists.items() if path and cfg.mix.get(source)}


def render_world(cfg: Config):
    """Unless it is there. Raises ValueError when that is of other options."""
    world = {"clips": cfg.toy_clips, "images": cfg.toy_images, "captioned": cfg.toy_captioned,
             "moving": cfg.toy_moving, "size": cfg.width}
    try:
        if not os.path.exists(cfg.toy):
            toy.render(cfg.toy, **world)
        with open(os.path.join(cfg.toy, "world.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"the toy world {cfg.toy}: {error}") from error
    for name, ours in world.items():
        if found.get(name) != ours:
            raise ValueError(f"the toy world {cfg.toy} was rendered with {name} {found.get(name)}, the config says "
                            f"{ours}: choose another folder for `toy`, or remove it")


def make_ready(cfg: Config, model: Model, device) -> dict[str, str]:
    """Render and encode what is missing -> the lists; none where everything is encoded already."""
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out_dir {cfg.out_dir} cannot be made: {error.strerror}") from error
    ahead = cfg.encoded if cfg.train == "unet" else ""
    if ahead and os.path.exists(ahead):
        compare_lists(cfg)
        return {}
    lists = data_lists(cfg)
    if ahead:
        for source in cfg.mix:
            if cfg.mix[source] and source not in lists:
                raise ValueError(f"mix asks for {source} samples, of which there is no list: give `{source}` one, or "
                                "leave it out of the mix")
        model.vae.to(device)
        model.text.to(device)
        encode(model, lists, ahead, sample_spec(cfg), text=not cfg.train_text)
        model.vae.to("cpu")
        model.text.to("cpu")
    return lists


def compare_lists(cfg: Config):
    """Say where what was encoded ahead is not of the config's lists; they may be the same in another place."""
    encoded = read_settings(cfg.encoded)["lists"]
    for source, path in data_lists(cfg, render=False).items():
        if encoded.get(source, path) != path:
            print(f"{cfg.encoded}, encoded from {encoded[source]}, is used, and {path} is not read: for other data "
                  "choose another folder for `encoded`", file=sys.stderr, flush=True)


def sample_spec(cfg: Config) -> Spec:
    return Spec(**{f.name: getattr(cfg, f.name) for f in fields(Spec)})


def open_clips(cfg: Config, model: Model, lists: dict[str, str], device) -> LiveClips | EncodedClips:
    """The samples of a run. Raises ValueError when those encoded ahead are of other options than the config's, or of
    another VAE or text tower than the model's."""
    if not cfg.encoded:
        model.vae.to(device, memory_format=torch.channels_last)
        return LiveClips(lists, sample_spec(cfg))
    clips = EncodedClips(cfg.encoded, text=not cfg.train_text)
    for name, ours in asdict(sample_spec(cfg)).items():
        theirs = getattr(clips.spec, name)
        if theirs != ours and name != "seed":  # runs may share a folder
            raise ValueError(f"{cfg.encoded} was encoded with {name} = {theirs}, the config says {ours}: choose another "
                            "folder for `encoded`, or remove it")
    for what, theirs, network in (("VAE", clips.vae, model.vae), ("text tower", clips.tower, model.text)):
        if theirs and theirs != fingerprint(network):
            raise ValueError(f"{cfg.encoded} was encoded by another {what} than the model's: choose another folder for "
                            "`encoded`, or remove it")
    return clips


def loss_of(cfg: Config, module, batch, device) -> torch.Tensor:
    """Loss of each sample (B,), in the precision of the run."""
    whole = torch.float64 if cfg.dtype == "float64" else torch.float32
    batch = [x.to(device, whole if x.is_floating_point() else x.dtype, non_blocking=True) for x in batch]
    with precision(getattr(torch, cfg.dtype), device):
        return module(*batch)
