"""Models on disk: load() reads them, save() writes them.

load() takes Stable Diffusion 1.x and 2.x in every packaging: one file (.safetensors, .ckpt), a diffusers folder, a
Hugging Face repository. save() writes one safetensors file in the layout of the original checkpoints, with ETC's few
extra tensors beside them under `etc.*` and the settings as JSON in its header:

    model.diffusion_model.*    UNet                     cond_stage_model.*    text tower
    first_stage_model.*        VAE                      etc.*                 the FPS embedding's projections
"""

import argparse
import json
import math
import os
import pickle
import re
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import AutoencoderKL, ModelConfig, TextConfig, TextEncoder, UNet, UNetConfig, VAEConfig, initialize, zero

# ---------------------------------------------------------------------------------------------------------------------
# Errors are for people


class UserError(Exception):
    """A mistake that the user can mend. Command lines print it as one line and leave with status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse_size(text: str) -> tuple[int, int]:
    """ "512x320" -> (512, 320): width, height."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UserError(f"--size {text!r} is not of the form WIDTHxHEIGHT, like 256x256")
    return int(match[1]), int(match[2])


def number_from(low: int, high: float = math.inf, kind=int):
    """A type for argparse: numbers in low..high."""

    def number(text: str):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}" if high < math.inf else
                                             f"{text} is less than {low}")
        return kind(text)

    return number


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
    eta: float = 0.0  # noise that DDIM adds, 0..1
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
# Names. Inside our networks parameters are called as in the original files, except for one part: the text tower of
# SD 1, which stands in those files under transformers' names. diffusers renamed everything.

PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.model."}
SD1_TEXT = "cond_stage_model.transformer.text_model."
EXTRA = ("time_proj.", "fps_proj.")  # the UNet's tensors that Stable Diffusion does not have


def file_name(part: str, name: str) -> str:
    """The name in the original layout of a parameter `name` of `part` ("unet", "vae" or "text")."""
    if part == "unet" and name.startswith(EXTRA):
        return "etc." + name
    return PREFIX[part] + (name.removeprefix("model.") if part == "text" else name)


# Layers as (theirs, ours). Not every block has all of them: a shortcut needs a layer only when the width changes.
RES_BLOCK = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
             ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"))
TRANSFORMER = tuple((name, name) for name in ("norm", "proj_in", "proj_out")) + tuple(
    (f"transformer_blocks.0.{name}", f"transformer_blocks.0.{name}") for name in (
        "norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "norm3", "ff.net.0.proj", "ff.net.2"))
VAE_BLOCK = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"),
             ("conv_shortcut", "nin_shortcut"))
VAE_ATTENTION = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
VAE_ATTENTION_2022 = (("group_norm", "norm"), ("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out"))
TEXT_LAYER = (("layer_norm1", "ln_1"), ("self_attn.out_proj", "attn.out_proj"),
              ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))


def block(theirs: str, ours: str, layers):
    """The layers of a block that they call `theirs` and we `ours`."""
    return ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in layers)


def unet_layers(levels: int, blocks: int):
    """(diffusers, ours) for a UNet of so many levels with so many residual blocks each."""
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    yield from block("mid_block.resnets.0", "middle_block.0", RES_BLOCK)
    yield from block("mid_block.attentions.0", "middle_block.1", TRANSFORMER)
    yield from block("mid_block.resnets.1", "middle_block.2", RES_BLOCK)
    for level in range(levels):  # of the encoder from the finest, of the decoder from the coarsest
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        i, o = 1 + level * (blocks + 1), level * (blocks + 1)  # the level's first block in our count
        for j in range(blocks):
            yield from block(f"{down}.resnets.{j}", f"input_blocks.{i + j}.0", RES_BLOCK)
            yield from block(f"{down}.attentions.{j}", f"input_blocks.{i + j}.1", TRANSFORMER)
        yield f"{down}.downsamplers.0.conv", f"input_blocks.{i + blocks}.0.op"
        for j in range(blocks + 1):
            yield from block(f"{up}.resnets.{j}", f"output_blocks.{o + j}.0", RES_BLOCK)
            yield from block(f"{up}.attentions.{j}", f"output_blocks.{o + j}.1", TRANSFORMER)
        for last in (1, 2):  # after the residual block, or after the attention where there is one
            yield f"{up}.upsamplers.0.conv", f"output_blocks.{o + blocks}.{last}.conv"


def vae_layers(levels: int, blocks: int, attention):
    """(diffusers, ours) for a VAE of so many levels with so many residual blocks each (the decoder has one more)."""
    yield from (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))
    for net in ("encoder", "decoder"):
        yield from block(net, net, (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")))
        yield from block(f"{net}.mid_block.resnets.0", f"{net}.mid.block_1", VAE_BLOCK)
        yield from block(f"{net}.mid_block.attentions.0", f"{net}.mid.attn_1", attention)
        yield from block(f"{net}.mid_block.resnets.1", f"{net}.mid.block_2", VAE_BLOCK)
    for level in range(levels):  # we count both from the finest, they the decoder's from the coarsest
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for j in range(blocks):
            yield from block(f"{down}.resnets.{j}", f"encoder.down.{level}.block.{j}", VAE_BLOCK)
        for j in range(blocks + 1):
            yield from block(f"{up}.resnets.{j}", f"decoder.up.{level}.block.{j}", VAE_BLOCK)
        yield f"{down}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"
        yield f"{up}.upsamplers.0.conv", f"decoder.up.{level}.upsample.conv"


def parameters(layers, theirs: str, ours: str = "") -> dict[str, tuple[str, ...]]:
    """Layers (theirs, ours) -> {our parameter: (their parameter,)}, each name after its prefix."""
    return {f"{ours}{b}.{kind}": (f"{theirs}{a}.{kind}",) for a, b in layers for kind in ("weight", "bias")}


def text_parameters(layers: int, theirs: str) -> dict[str, tuple[str, ...]]:
    """{our parameter: transformers' parameters, after their prefix}. Their q, k and v are one tensor here."""
    names = parameters([("embeddings.token_embedding", "token_embedding"), ("final_layer_norm", "ln_final")],
                       theirs, "model.")
    names["model.positional_embedding"] = (f"{theirs}embeddings.position_embedding.weight",)
    for i in range(layers):
        them, us = f"{theirs}encoder.layers.{i}", f"model.transformer.resblocks.{i}"
        names |= parameters(block(them, us, TEXT_LAYER), "")
        for kind in ("weight", "bias"):
            names[f"{us}.attn.in_proj_{kind}"] = tuple(f"{them}.self_attn.{x}_proj.{kind}" for x in "qkv")
    return names


# What published files hold besides the weights. Any other tensor that no network asks for is an error.
IGNORED = (
    "betas", "*alphas_cumprod*", "posterior_*", "logvar", "lvlb_weights", "scale_factor",  # tables of the schedule
    "model_ema.*", "first_stage_model.model_ema.*", "first_stage_model.loss.*", "global_step",  # of training
    "*embeddings.position_ids", "*attn_mask", "*logit_scale",  # 0, 1, 2...; the causal mask; of CLIP's loss
)

# ---------------------------------------------------------------------------------------------------------------------
# Architecture, read off the tensor shapes

# What shapes do not tell. Our files carry it in the header, diffusers folders in config.json; else the family knows.
SHAPELESS = {
    "unet": ("head_width", "num_heads", "norm_groups", "mixed_embedding"),
    "vae": ("norm_groups",),
    "text": ("heads", "skip_last", "quick_gelu", "pad_id"),
}
FAMILY = {
    "SD 1": {"unet": {"head_width": None, "num_heads": 8}, "vae": {}, "text": {"quick_gelu": True, "pad_id": 49407}},
    "SD 2": {"unet": {"head_width": 64, "num_heads": None}, "vae": {}, "text": {"quick_gelu": False, "pad_id": 0}},
}
LICENCE = {"SD 1": "CreativeML Open RAIL-M", "SD 2": "CreativeML Open RAIL++-M"}


class Named(dict):
    """A dict out of a file, where a missing key is a fault of the file."""

    def __init__(self, items, file: str):
        super().__init__(items)
        self.file = file

    def __missing__(self, key):
        raise UserError(f"{self.file} has no {key}; {EXPECTED}")


def count(shapes, pattern: str) -> int:
    """How many consecutive numbers {} can take in `pattern` so that some name in shapes starts with it."""
    n = 0
    while any(name.startswith(pattern.format(n)) for name in shapes):
        n += 1
    return n


def unet_config(shapes) -> UNetConfig:
    """shapes: name -> shape, names as inside the UNet."""
    channels, latent = shapes["input_blocks.0.0.weight"][0], shapes["out.2.weight"][0]
    widths, blocks, attention = [[]], 0, set()
    for i in range(1, count(shapes, "input_blocks.{}.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            widths.append([])
            continue
        widths[-1].append(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0])
        if f"input_blocks.{i}.1.norm.weight" in shapes:
            attention.add(len(widths) - 1)
        blocks = max(blocks, len(widths[-1]))
    return UNetConfig(
        channels=channels,
        channel_mult=tuple(level[0] // channels for level in widths),
        num_res_blocks=blocks,
        attention_levels=tuple(sorted(attention)),
        context_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
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
    layers = count(shapes, "model.transformer.resblocks.{}.")
    return TextConfig(
        width=width,
        layers=layers,
        heads=max(1, width // 64),
        skip_last=1 if layers == 24 else 0,  # diffusers folders of SD 2 hold 23: without the one that is not used
        projection=shapes.get("model.text_projection", (0, 0))[1],
        vocab=vocab,
        length=shapes["model.positional_embedding"][0],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Save


def model_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Every tensor of the model under its name in the original layout."""
    sd1_text = text_parameters(model.text.cfg.layers, SD1_TEXT) if model.text.cfg.quick_gelu else {}
    tensors = {}
    for part, module in model.parts().items():
        for name, tensor in module.state_dict().items():
            names = sd1_text[name] if part == "text" and sd1_text else (file_name(part, name),)
            tensors |= zip(names, tensor.chunk(len(names)))  # in three where q, k, v are one tensor
    return tensors


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
# Files of weights


class Inert:
    """Stands in for all that a .ckpt pickles besides tensors (a trainer's callbacks, say): none of it is ever run."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def open_weights(path: str):
    """Map a file into memory -> (get: name -> tensor, {name: shape}, our header or None).

    Safetensors or PyTorch is told by the first bytes, as names mislead. Raises UserError on neither, or only a part.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(24)
        if start[8:9] == b"{":
            file = safe_open(path, framework="pt")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return file.get_tensor, shapes, json.loads((file.metadata() or {}).get("etc", "null"))
        if start.startswith(b"PK\3\4"):
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(Inert, name) for name in others]):
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if not isinstance(tensors, dict):
                raise UserError(f"{path} holds a {type(tensors).__name__} and not named tensors; {EXPECTED}")
            tensors = tensors.get("state_dict", tensors)
            return tensors.__getitem__, {name: tuple(getattr(t, "shape", ())) for name, t in tensors.items()}, None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: besides tensors it pickles what could run as a program") from error
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} is not whole (a download that stopped?), or damaged: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    seems = f"it begins with {start!r}" if start else "it is empty"
    raise UserError(f"{path} is neither a safetensors file nor a PyTorch checkpoint (.ckpt): {seems}")


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class Weights:
    """The tensors of some files: all shapes at once, each tensor when it is asked for."""

    def __init__(self, what: str):
        self.what, self.shapes, self.home = what, {}, {}  # name -> shape; name -> (path, its name there)
        self.path, self.get, self.copied = None, None, 0

    def add(self, path: str, prefix: str = ""):
        """The tensors of one more file, under prefix + name -> the file's header."""
        _, shapes, header = open_weights(path)
        self.shapes |= {prefix + name: shape for name, shape in shapes.items()}
        self.home |= {prefix + name: (path, name) for name in shapes}
        return header

    def read(self, name: str, device, dtype) -> torch.Tensor:
        """A view into the mapped file where that is what is wanted already, else a copy.

        What was read of a mapped file counts as memory until the map is closed: so now and then close it.
        """
        path, name = self.home[name]
        if path != self.path or self.copied > 2**26:
            self.path, self.copied = path, 0
            self.get, _, _ = open_weights(path)
        mapped = self.get(name)
        tensor = mapped.to(device, dtype)
        self.copied += mapped.nbytes if tensor is not mapped else 0
        return tensor


# ---------------------------------------------------------------------------------------------------------------------
# What is in the files


@dataclass
class Source:
    """A model that is still in its files."""

    weights: Weights
    names: dict[str, dict[str, tuple[str, ...]]]  # part -> {our parameter: its parameters in the files}
    told: dict[str, dict]  # part -> what shapes do not tell
    settings: Settings
    says_prediction: bool = True
    ignored: tuple[str, ...] = IGNORED


EXPECTED = "expected is a whole Stable Diffusion 1.x or 2.x: UNet, VAE and text tower"
FOREIGN = {  # how a name in another kind of file begins, and what that file is
    r".*lora|.*\.hada_|.*\.lokr_": "a LoRA, which changes a model but is none",
    r"conditioner\.": "Stable Diffusion XL",
    r"(model\.diffusion_model\.)?joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r"control_model\.|controlnet_|input_hint_block": "a ControlNet",
    r".*motion_modules\.": "the motion modules of AnimateDiff",
    r"emb_params|string_to_param": "a textual inversion",
    r"(encoder|decoder|quant_conv|post_quant_conv)\.(?!layers)": "a VAE alone",
    r"(down_blocks|up_blocks|input_blocks|output_blocks)\.": "a UNet alone",
    r"(text_model|embeddings|encoder\.layers|transformer|token_embedding)\b": "a text encoder alone",
}


def refuse_foreign(path: str, shapes):
    """Raise UserError, saying what the file seems to be, unless it holds the three parts of a Stable Diffusion."""
    for pattern, what in FOREIGN.items():
        if any(re.match(pattern, name) for name in shapes):
            raise UserError(f"{path} seems to be {what}; {EXPECTED}")
    parts = {"UNet": PREFIX["unet"], "VAE": PREFIX["vae"], "text tower": "cond_stage_model."}
    missing = [part for part, prefix in parts.items() if not any(name.startswith(prefix) for name in shapes)]
    if len(missing) == len(parts):
        raise UserError(f"{path} seems to be no Stable Diffusion, it holds {list(shapes)[:3]}...; {EXPECTED}")
    if missing:
        raise UserError(f"{path} seems to be part of a Stable Diffusion, without {', '.join(missing)}; {EXPECTED}")


def read_file(path: str, ema: bool) -> Source:
    """A single file in the original layout, ours or a published one."""
    weights = Weights(path)
    header = weights.add(path)
    shapes = weights.shapes
    refuse_foreign(path, shapes)
    homes = {part: (prefix,) for part, prefix in PREFIX.items()} | {"unet": (PREFIX["unet"], "etc.")}
    names = {part: {("model." if part == "text" else "") + name.removeprefix(home): (name,)
                    for home in homes[part] for name in shapes if name.startswith(home)} for part in PREFIX}
    family = "SD 2" if any(name.startswith(PREFIX["text"] + "transformer.") for name in shapes) else "SD 1"
    if family == "SD 1":  # some tools leave out "text_model."
        home = SD1_TEXT if any(n.startswith(SD1_TEXT) for n in shapes) else SD1_TEXT.removesuffix("text_model.")
        names["text"] = text_parameters(count(shapes, home + "encoder.layers.{}."), home)
    ignored = IGNORED
    if ema:
        if "model_ema.decay" not in shapes:
            raise UserError(f"{path} holds no moving average (model_ema.*) beside the weights")
        averages = {n: ("model_ema.diffusion_model" + n.replace(".", ""),) for n in names["unet"] if n[:4] != "etc."}
        names["unet"] |= averages
        ignored += (PREFIX["unet"] + "*",)
    if header is None:
        settings = Settings(origin={"base": {"from": path, "licence": LICENCE[family]}})
        return Source(weights, names, FAMILY[family], settings, family == "SD 1", ignored)
    known = {f.name for f in fields(Settings)}
    settings = Settings(**{k: tuple(v) if k == "fps_trained" else v for k, v in header.items() if k in known})
    header["architecture"]["unet"]["fps_embedding"] = header["fps_embedding"]
    return Source(weights, names, header["architecture"], settings, ignored=ignored)


FIXED = {  # what a folder's config.json may say of things that our networks do in one way, and that no shape betrays
    "unet": {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
             "center_input_sample": False, "mid_block_scale_factor": 1, "class_embed_type": None,
             "addition_embed_type": None},
    "vae": {"act_fn": "silu", "shift_factor": None},
    "text_encoder": {"model_type": "clip_text_model", "layer_norm_eps": 1e-5},
    "scheduler": {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "trained_betas": None},
}
WEIGHTS = re.compile(  # diffusers' and transformers' names of weight files: a variant, one shard of several
    r"(?:diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(?:-\d+-of-(\d+))?(\.fp16)?\.(safetensors|bin)")


def folder_weights(folder: str) -> list[str]:
    """The weight files of one network: safetensors before .bin, full precision before fp16, all shards."""
    choices = {}
    for name in sorted(os.listdir(folder)):
        if match := WEIGHTS.fullmatch(name):
            fp16, shards, fp16_too, kind = match.groups()
            choices.setdefault((kind == "bin", bool(fp16 or fp16_too), int(shards or 1)), []).append(name)
    if not choices:
        raise UserError(f"{folder} has no weights (.safetensors or .bin) under a name that diffusers uses; {EXPECTED}")
    (_, _, shards), files = min(choices.items())
    if len(files) != shards:
        raise UserError(f"{folder} has {len(files)} of the {shards} files of weights: {', '.join(files)}")
    return [os.path.join(folder, name) for name in files]


def folder_json(path: str, part: str, name: str = "config.json") -> Named:
    file = os.path.join(path, part, name)
    if not os.path.exists(file):
        raise UserError(f"{path} is no diffusers folder of a Stable Diffusion: there is no {file}")
    with open(file) as opened:
        config = Named(json.load(opened), file)
    for key, value in FIXED[part].items():
        if config.get(key, value) != value:
            raise UserError(f"{file}: {key} is {config[key]!r}; a Stable Diffusion 1.x or 2.x has {value!r}")
    return config


def meaning(config: Named, key: str, default: str, known: dict):
    value = config.get(key, default)
    if value not in known:
        raise UserError(f"{config.file}: {key} is {value!r}; understood are {', '.join(known)}")
    return known[value]


def read_folder(path: str, origin: str) -> Source:
    """A diffusers folder: unet/, vae/, text_encoder/ and scheduler/."""
    unet, vae, text = (folder_json(path, part) for part in ("unet", "vae", "text_encoder"))
    scheduler = folder_json(path, "scheduler", "scheduler_config.json")
    weights = Weights(path)
    for part in ("unet", "vae", "text_encoder"):
        for file in folder_weights(os.path.join(path, part)):
            weights.add(file, f"{part}/")
    shapes = weights.shapes
    old = "vae/encoder.mid_block.attentions.0.query.weight" in shapes
    home = "text_encoder/" + ("text_model." if any(n.startswith("text_encoder/text_model.") for n in shapes) else "")
    names = {
        "unet": parameters(unet_layers(count(shapes, "unet/down_blocks.{}."),
                                       count(shapes, "unet/down_blocks.0.resnets.{}.")), "unet/"),
        "vae": parameters(vae_layers(count(shapes, "vae/encoder.down_blocks.{}."),
                                     count(shapes, "vae/encoder.down_blocks.0.resnets.{}."),
                                     VAE_ATTENTION_2022 if old else VAE_ATTENTION), "vae/"),
        "text": text_parameters(count(shapes, home + "encoder.layers.{}."), home),
    }
    # the number of heads, in spite of its name, of all levels or of each
    heads, widths = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8), unet["block_out_channels"]
    number = heads if isinstance(heads, int) else heads[0] if len(set(heads)) == 1 else None
    head_width = None if number else widths[0] // heads[0]
    if number is None and any(h * head_width != w for h, w in zip(heads, widths)):
        raise UserError(f"{unet.file}: neither the number of heads, {heads}, nor their width is that of all levels")
    quick_gelu = meaning(text, "hidden_act", "quick_gelu", {"quick_gelu": True, "gelu": False})
    family = "SD 1" if quick_gelu else "SD 2"
    told = {
        "unet": {"num_heads": number, "head_width": head_width, "norm_groups": unet.get("norm_num_groups", 32)},
        "vae": {"norm_groups": vae.get("norm_num_groups", 32)},
        "text": FAMILY[family]["text"] | {"heads": text["num_attention_heads"], "skip_last": 0},
    }
    side = (unet.get("sample_size") or 64) * 2 ** (len(vae["block_out_channels"]) - 1)  # of a picture, in pixels
    settings = Settings(
        prediction=meaning(scheduler, "prediction_type", "epsilon", {"epsilon": "epsilon", "v_prediction": "v"}),
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        zero_snr=scheduler.get("rescale_betas_zero_snr", False),
        spacing=meaning(scheduler, "timestep_spacing", "leading", {"leading": "leading", "trailing": "trailing"}),
        latent_scale=vae.get("scaling_factor", 0.18215),
        width=side,
        height=side,
        origin={"base": {"from": origin, "licence": LICENCE[family]}},
    )
    return Source(weights, names, told, settings)


def download(repository: str) -> str:
    """The files that load() needs of a Hugging Face repository, and no others -> the folder that they are in."""
    from huggingface_hub import errors, snapshot_download  # comes with open_clip_torch

    wanted = ["scheduler/scheduler_config.json"]
    for part in ("unet", "vae", "text_encoder"):
        stem = f"{part}/{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}"
        wanted += [f"{part}/config.json", f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors"]
    try:
        return snapshot_download(repository, allow_patterns=wanted)
    except (OSError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise UserError(f"{repository}: there is no such file, and no such Hugging Face repository can be reached "
                        f"(a wrong name, or offline?): {first_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Load


def load(path: str, device="cpu", dtype=torch.float32, prediction: str | None = None, ema: bool = False) -> Model:
    """A Stable Diffusion 1.x or 2.x, or one of our own models, in evaluation mode.

    path        a file (.safetensors, .ckpt), a diffusers folder, or a Hugging Face repository "owner/name"
    prediction  what the UNet predicts, "epsilon" or "v"; None: what the files say, and "epsilon" if they do not
    ema         of a training checkpoint, take the UNet's moving average (model_ema.*) rather than its last weights

    What comes without ETC's tensors gets fresh ones, which change nothing until they are trained. On the CPU, weights
    that have the wanted dtype already stay in the file, mapped into memory. Raises UserError when the files do not hold
    exactly one whole model.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        source = read_folder(path, path)
    elif os.path.exists(path) or not is_repository(path):
        source = read_file(path, ema)
    else:
        source = read_folder(download(path), path)
    if prediction:
        source.settings = replace(source.settings, prediction=prediction)
    elif not source.says_prediction:
        warnings.warn(f'{path} does not say what it predicts. Taken is "epsilon"; SD 2 at 768 pixels wants "v"',
                      stacklevel=2)
    return assemble(source, device, dtype)


def is_repository(path: str) -> bool:
    weights = path.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not weights and not os.path.isdir(path.split("/")[0])


def assemble(source: Source, device, dtype) -> Model:
    """Build the networks without memory, then give them their tensors: each one in the files must find its place."""
    weights, what, pieces = source.weights, source.weights.what, source.names
    configs = {}
    for part, read in (("unet", unet_config), ("vae", vae_config), ("text", text_config)):
        shapes = {n: weights.shapes[theirs[0]] for n, theirs in pieces[part].items() if theirs[0] in weights.shapes}
        configs[part] = replace(read(Named(shapes, f"{what} ({part})")), **source.told[part])
    plain = not configs["unet"].fps_embedding and "fps_embedding" not in source.told["unet"]
    if plain:
        configs["unet"] = replace(configs["unet"], fps_embedding=True)
    if configs["text"].width != configs["unet"].context_dim:
        raise UserError(f"{what}: the text tower gives {configs['text'].width} channels, "
                        f"the UNet takes {configs['unet'].context_dim}; {EXPECTED}")
    with torch.device("meta"):
        model = build(ModelConfig(**configs), source.settings)

    wanted = [(part, name, tensor.shape, pieces[part].get(name, (file_name(part, name),)))
              for part, module in model.parts().items() for name, tensor in module.state_dict().items()
              if not (plain and part == "unet" and name.startswith(EXTRA))]
    check(weights, wanted, source.ignored)
    states = {part: {} for part in pieces}
    for part, name, shape, theirs in wanted:
        tensors = [weights.read(n, device, dtype) for n in theirs]
        states[part][name] = (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).reshape(shape)
    if plain:
        states["unet"] |= fresh_projections(model.unet, device, dtype)
    for part, module in model.parts().items():
        module.load_state_dict(states[part], assign=True)
        module.eval()
    model.text.model.attn_mask = model.text.model.build_causal_mask().to(device)  # the one tensor that no file holds
    return model


def check(weights: Weights, wanted, ignored):
    """Raise UserError unless the files hold all that is wanted, in the right shapes, and nothing unknown beside it."""
    names = [(n, (shape[0] // len(theirs), *shape[1:])) for _, _, shape, theirs in wanted for n in theirs]
    used = {n for n, _ in names}
    missing = [n for n in used if n not in weights.shapes]
    wrong = [f"{n} is {weights.shapes[n]} and not {shape}" for n, shape in names
             if n in weights.shapes and per_pixel(weights.shapes[n]) != per_pixel(shape)]
    unknown = [n for n in weights.shapes if n not in used and not any(fnmatchcase(n, p) for p in ignored)]
    for fault, found in (("lacks", missing), ("has another shape where", wrong), ("has unknown tensors,", unknown)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(f"{weights.what} {fault} {', '.join(sorted(found)[:3])}{more}; {EXPECTED}")


def per_pixel(shape):
    """The shape, with a 1x1 convolution as the linear layer that it is: diffusers made some of the one the other."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def fresh_projections(unet: UNet, device, dtype) -> dict[str, torch.Tensor]:
    """ETC's own tensors for a UNet that has none yet: the same at every load, and adding zero."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("time_proj", "fps_proj"):
        layers = getattr(unet, name).to_empty(device="cpu")
        initialize(layers, generator=generator)
        zero(layers[-1])
        tensors |= {f"{name}.{k}": tensor for k, tensor in layers.to(device, dtype).state_dict().items()}
    return tensors
