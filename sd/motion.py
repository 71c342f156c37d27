"""AnimateDiff's motion modules: read a published file into the `temporal` layout.

v1 and v3 have no module in the middle, v2 has one; v1 numbers 24 frames, v2 and v3 32. diffusers renamed everything.
"""

import os
import re
from dataclasses import replace

import torch

from beyond.temporal import HEADS, Temporal
from cli import read_json, warn
from model import UNetConfig
from sd.files import Weights
from sd.sources import Source, folder_weights, from_hub, is_repository

# A block of the `temporal` layout, in AnimateDiff's words and in diffusers'.
RENAMED = (("attention_blocks.0", "attn1"), ("attention_blocks.1", "attn2"), ("norms.0", "norm1"), ("norms.1", "norm2"),
           ("ff_norm", "norm3"))
TRAINED = {"beta_schedule": "linear", "grid_trained": True, "frames": 16, "fps": 8.0, "fps_trained": ()}  # as they were


def motion_names(cfg: UNetConfig) -> dict[str, tuple[str, str]]:
    """{a UNet's parameter in its motion modules: its name in AnimateDiff's files, its name in diffusers'}."""
    levels, blocks, names = range(len(cfg.channel_mult)), cfg.num_res_blocks, {}
    places = [f"down_blocks.{i}.motion_modules.{j}" for i in levels for j in range(blocks)]
    places += ["mid_block.motion_modules.0"]
    places += [f"up_blocks.{i}.motion_modules.{j}" for i in levels for j in range(blocks + 1)]
    with torch.device("meta"):
        parameters = Temporal(cfg).state_dict()
    for name in parameters:
        _, number, inner = name.split(".", 2)
        theirs = inner
        for original, renamed in RENAMED:
            theirs = theirs.replace(original, renamed)
        place = places[int(number)]
        names[f"layout.{name}"] = (f"{place}.temporal_transformer.{inner}", f"{place}.{theirs}")
    return names


def add_motion(source: Source, cfg: UNetConfig, path: str):
    """Let a model that is still in its files take its motion modules from another file, and the settings they want.

    path  a file (.ckpt, .safetensors), a diffusers folder of a MotionAdapter, or a Hugging Face repository of one

    Raises ValueError on what has no motion modules, or has others than AnimateDiff's.
    """
    if not source.told["text"]["quick_gelu"]:
        warn(f"AnimateDiff's motion modules are made for Stable Diffusion 1.x, and {source.weights.what} is none")
    added, positions = open_motion(path, source.told["unet"].get("norm_groups", cfg.norm_groups))
    theirs = {re.sub(r"^.*?(?=(down_blocks|mid_block|up_blocks)\.)", "", name): name  # without "module." or "unet."
              for name in added.shapes if "motion_modules." in name}
    others = sorted(added.shapes.keys() - theirs.values())
    if not theirs:
        raise ValueError(f"{path} holds no motion modules of AnimateDiff, but {', '.join(others[:3]) or 'nothing'}")
    if others:
        warn(f"{path} holds {len(others)} tensors besides motion modules, which are left out: {', '.join(others[:3])}")
    for name, full in theirs.items():
        source.weights.shapes[f"motion/{name}"] = added.shapes[full]
        source.weights.home[f"motion/{name}"] = added.home[full]
    for ours, spellings in motion_names(cfg).items():
        source.names["unet"][ours] = ("motion/" + next((name for name in spellings if name in theirs), spellings[0]),)
    source.weights.what += f" with the motion modules of {path}"
    source.ignored += ("motion/*.pe", "etc.layout.*")  # frames are numbered here; modules that it had give way
    middle = any(name.startswith("mid_block.") for name in theirs)
    tables = [(*added.shapes[full], 0, 0)[1] for name, full in theirs.items() if name.endswith(".pe")]
    positions = min(tables, default=positions or (32 if middle else 24))
    source.settings = replace(
        source.settings, layout="temporal", layout_options={"positions": positions, "middle": middle}, **TRAINED,
        origin=source.settings.origin | {"motion": {"from": os.path.basename(os.path.normpath(path))}})


def open_motion(path: str, groups: int) -> tuple[Weights, int | None]:
    """The tensors behind the name of motion modules, and how many frames a config says that they number.

    groups  of the UNet's norms, which are the modules' too, else ValueError
    """
    weights, config = Weights(path), {}
    if not os.path.exists(path) and is_repository(path):
        path = download_motion(path)
    if os.path.isdir(path):
        config = read_json(os.path.join(path, "config.json"))
        if not isinstance(config, dict):
            raise ValueError(f"{path}: config.json must be a JSON object of settings, got {str(config)[:40]}")
        for key, value in (("_class_name", "MotionAdapter"), ("motion_num_attention_heads", HEADS),
                           ("motion_norm_num_groups", groups), ("conv_in_channels", None)):
            if config.get(key, value) not in (value, [value] * 4):
                raise ValueError(f"{path}: {key} is {config[key]!r}; AnimateDiff's motion modules have {value!r}")
    for file in folder_weights(path) if config else [path]:
        weights.add(file)
    return weights, config.get("motion_max_seq_length")


def download_motion(repository: str) -> str:
    """The files of a MotionAdapter's Hugging Face repository that are needed -> the folder that they are in."""
    with from_hub(repository) as hub:
        return hub.snapshot_download(repository, allow_patterns=["config.json", "diffusion_pytorch_model.safetensors"])
