"""Models on disk: load() reads them, save() writes them.

Our own file is one safetensors file in the layout of the original Stable Diffusion checkpoints, with ETC's few extra
tensors beside them under `etc.*` and the settings as JSON in its header:

    model.diffusion_model.*    UNet                     cond_stage_model.model.*    text tower
    first_stage_model.*        VAE                      etc.*                       the FPS embedding's projections
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import AutoencoderKL, ModelConfig, TextConfig, TextEncoder, UNet, UNetConfig, VAEConfig

# ---------------------------------------------------------------------------------------------------------------------
# Errors are for people


class UserError(Exception):
    """A mistake that the user can mend. Command lines print it as one line and leave with status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def command_line(main):
    """Run `main`; a UserError becomes one line on stderr and status 2, a bug keeps its traceback."""
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# What a model is


@dataclass(frozen=True)
class Settings:
    """What the tensors of a model do not tell. The defaults are those of Stable Diffusion 2.1-base."""

    prediction: str = "epsilon"  # what the UNet predicts: "epsilon", or "v"
    beta_start: float = 0.00085  # noise schedule: linear in sqrt(beta), 1000 timesteps
    beta_end: float = 0.012
    zero_snr: bool = False  # rescaled so that the last timestep is pure noise (needs prediction "v")
    spacing: str = "leading"  # how the timesteps of a sampler are spread: "leading" or "trailing"
    latent_scale: float = 0.18215  # VAE latent x latent_scale has a standard deviation of about 1
    frames: int = 1  # what it was trained on, and what sampling therefore does by default
    width: int = 512
    height: int = 512
    fps: float = 30  # the default condition
    fps_trained: tuple[float, ...] = ()
    guidance: float = 7.0
    grid_trained: bool = False  # has it ever seen a grid?
    ema: bool = False  # are the weights a moving average?
    origin: dict = field(default_factory=dict)  # config, steps, commit, data, licence


@dataclass
class Model:
    unet: UNet
    vae: AutoencoderKL
    text: TextEncoder
    settings: Settings

    def parts(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "vae": self.vae, "text": self.text}

    def to(self, *args, **kwargs) -> "Model":
        for part in self.parts().values():
            part.to(*args, **kwargs)
        return self


def build(config: ModelConfig, settings: Settings) -> Model:
    """A model with fresh random weights."""
    return Model(UNet(config.unet), AutoencoderKL(config.vae), TextEncoder(config.text), settings)


# ---------------------------------------------------------------------------------------------------------------------
# Names in the file

PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.model."}
EXTRA = ("time_proj.", "fps_proj.")  # the UNet's tensors that Stable Diffusion does not have


def file_name(part: str, name: str) -> str:
    """The name in the file of a parameter `name` of `part` ("unet", "vae" or "text")."""
    if part == "unet" and name.startswith(EXTRA):
        return "etc." + name
    return PREFIX[part] + (name.removeprefix("model.") if part == "text" else name)


def model_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Every tensor of the model under its name in the file."""
    return {
        file_name(part, name): tensor
        for part, module in model.parts().items()
        for name, tensor in module.state_dict().items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Architecture, read off the tensor shapes

# What shapes do not tell; our files carry it in the header, published ones follow their family.
SHAPELESS = {
    "unet": ("head_width", "num_heads", "norm_groups", "mixed_embedding"),
    "vae": ("norm_groups",),
    "text": ("heads", "skip_last", "quick_gelu", "pad_id"),
}


def count(shapes, pattern: str) -> int:
    """How many consecutive numbers {} can take in `pattern` so that some name in shapes starts with it."""
    n = 0
    while any(name.startswith(pattern.format(n)) for name in shapes):
        n += 1
    return n


def unet_config(shapes) -> UNetConfig:
    """shapes: name -> shape, names as inside the UNet."""
    channels, latent = shapes["input_blocks.0.0.weight"][:2]
    widths, blocks, attention = [[]], 0, set()
    for i in range(1, count(shapes, "input_blocks.{}.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            widths.append([])
            continue
        widths[-1].append(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0])
        if f"input_blocks.{i}.1.norm.weight" in shapes:
            attention.add(len(widths) - 1)
        blocks = max(blocks, len(widths[-1]))
    context = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    sd1 = context == 768
    return UNetConfig(
        channels=channels,
        channel_mult=tuple(level[0] // channels for level in widths),
        num_res_blocks=blocks,
        attention_levels=tuple(sorted(attention)),
        context_dim=context,
        head_width=None if sd1 else 64,
        num_heads=8 if sd1 else None,
        linear_projection=len(shapes["middle_block.1.proj_in.weight"]) == 2,
        latent_channels=latent,
        fps_embedding="fps_proj.0.weight" in shapes,
    )


def vae_config(shapes) -> VAEConfig:
    channels = shapes["encoder.conv_in.weight"][0]
    levels = count(shapes, "encoder.down.{}.")
    return VAEConfig(
        channels=channels,
        channel_mult=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // channels for i in range(levels)),
        num_res_blocks=count(shapes, "encoder.down.0.block.{}."),
        latent_channels=shapes["post_quant_conv.weight"][0],
    )


def text_config(shapes) -> TextConfig:
    vocab, width = shapes["model.token_embedding.weight"]
    sd1 = width == 768
    layers = count(shapes, "model.transformer.resblocks.{}.")
    return TextConfig(
        width=width,
        layers=layers,
        heads=width // 64,
        skip_last=1 if layers == 24 else 0,
        quick_gelu=sd1,
        projection=shapes.get("model.text_projection", (0, 0))[1],
        pad_id=49407 if sd1 else 0,
        vocab=vocab,
        length=shapes["model.positional_embedding"][0],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Save


def save(model: Model, path: str):
    """Write the model as one file, beside `path` and then renamed into place, so that it is never half there."""
    configs = {part: module.cfg for part, module in model.parts().items()}
    header = asdict(model.settings) | {
        "text_pad_id": model.text.cfg.pad_id,
        "mixed_embedding": model.unet.cfg.mixed_embedding,
        "fps_embedding": model.unet.cfg.fps_embedding,
        "architecture": {p: {k: getattr(configs[p], k) for k in names} for p, names in SHAPELESS.items()},
    }
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model_tensors(model).items()}
    beside = f"{path}.part"
    try:
        save_file(tensors, beside, metadata={"format": "pt", "etc": json.dumps(header)})
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Load


def load(path: str, device="cpu", dtype=torch.float32) -> Model:
    """The model in one of our files, in evaluation mode. Raises UserError when the file is none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("etc", "null"))
            tensors = {name: file.get_tensor(name).to(device, dtype) for name in file.keys()}
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    if header is None:
        raise UserError(f"{path} is a safetensors file, but not one of an ETC model (no settings in its header)")

    parts = {part: part_tensors(tensors, part) for part in PREFIX}
    configs = {}
    for part, read in (("unet", unet_config), ("vae", vae_config), ("text", text_config)):
        shapes = {name: tuple(tensor.shape) for name, tensor in parts[part].items()}
        configs[part] = replace(read(shapes), **header["architecture"][part])
    known = {f.name for f in fields(Settings)}
    settings = Settings(**{k: tuple(v) if k == "fps_trained" else v for k, v in header.items() if k in known})
    with torch.device("meta"):
        model = build(ModelConfig(**configs), settings)
    for part, module in model.parts().items():
        module.load_state_dict(parts[part], assign=True)
        module.eval()
    mask = model.text.model.attn_mask  # a buffer that no file holds: it is still on the meta device
    model.text.model.attn_mask = torch.full_like(mask, -torch.inf, device=device).triu_(1)
    return model


def part_tensors(tensors, part: str):
    """The tensors of one part, under their names inside it."""
    prefix, inside = PREFIX[part], "model." if part == "text" else ""
    found = {inside + name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if part == "unet":
        found |= {name.removeprefix("etc."): t for name, t in tensors.items() if name.startswith("etc.")}
    return found
