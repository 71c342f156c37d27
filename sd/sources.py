"""Every packaging of Stable Diffusion: one file (.safetensors, .ckpt), a diffusers folder, a repository."""

import json
import os
import re
from dataclasses import dataclass, fields

from cli import one_line
from sd.files import Weights
from sd.names import (
    IGNORED,
    PREFIX,
    SD1_TEXT,
    VAE_ATTENTION,
    VAE_ATTENTION_2022,
    parameters,
    text_parameters,
    unet_layers,
    vae_layers,
)
from sd.settings import BETA_SCHEDULES, Settings
from sd.shapes import EXPECTED, FAMILY, LICENCE, Named, count


@dataclass
class Source:
    """A model that is still in its files."""

    weights: Weights
    names: dict[str, dict[str, tuple[str, ...]]]  # part -> {our parameter: its parameters in the files}
    told: dict[str, dict]  # part -> what shapes do not tell
    settings: Settings
    says_prediction: bool = True
    ignored: tuple[str, ...] = IGNORED
    fresh: tuple[str, ...] = ()  # the beginnings of the UNet's names (of EXTRA) that the files do not have


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
    """Raise ValueError, saying what the file seems to be, unless it holds the three parts of a Stable Diffusion."""
    for pattern, what in FOREIGN.items():
        if any(re.match(pattern, name) for name in shapes):
            raise ValueError(f"{path} seems to be {what}; {EXPECTED}")
    parts = {"UNet": PREFIX["unet"], "VAE": PREFIX["vae"], "text tower": "cond_stage_model."}
    missing = [part for part, prefix in parts.items() if not any(name.startswith(prefix) for name in shapes)]
    if len(missing) == len(parts):
        raise ValueError(f"{path} seems to be no Stable Diffusion, it holds {list(shapes)[:3]}...; {EXPECTED}")
    if missing:
        raise ValueError(f"{path} seems to be part of a Stable Diffusion, without {', '.join(missing)}; {EXPECTED}")


def read_file(path: str, ema: bool) -> Source:
    """A single file in the original layout, ours or a published one."""
    weights = Weights(path)
    metadata = weights.add(path)
    header, shapes = json.loads(metadata.get("etc", "null")), weights.shapes
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
            raise ValueError(f"{path} holds no moving average (model_ema.*) beside the weights")
        averages = {n: ("model_ema.diffusion_model" + n.replace(".", ""),) for n in names["unet"] if n[:4] != "etc."}
        names["unet"] |= averages
        ignored += (PREFIX["unet"] + "*",)
    if header is None:
        told = metadata.get("modelspec.prediction_type")  # as kohya's scripts and others write it
        settings = Settings(prediction="v" if told in ("v", "v_prediction") else "epsilon",
                            origin={"base": {"from": os.path.basename(path), "licence": LICENCE[family]}})
        return Source(weights, names, FAMILY[family], settings, told is not None or family == "SD 1", ignored)
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
    "scheduler": {"num_train_timesteps": 1000, "trained_betas": None},
}
WEIGHTS = re.compile(  # diffusers' and transformers' names of weight files: a variant, one shard of several
    r"(?:diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(?:-\d+-of-(\d+))?(\.fp16)?\.(safetensors|bin)")
# diffusers writes "linspace" for Euler, DPM-Solver++, UniPC and LMS: it is theirs, and says nothing of the weights
SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "leading"}


def folder_weights(folder: str) -> list[str]:
    """The weight files of one network: safetensors before .bin, full precision before fp16, all shards."""
    choices = {}
    for name in sorted(os.listdir(folder)):
        if match := WEIGHTS.fullmatch(name):
            fp16, shards, fp16_too, kind = match.groups()
            choices.setdefault((kind == "bin", bool(fp16 or fp16_too), int(shards or 1)), []).append(name)
    if not choices:
        raise ValueError(f"{folder} has no weights (.safetensors or .bin) under a name that diffusers uses; {EXPECTED}")
    (_, _, shards), files = min(choices.items())
    if len(files) != shards:
        raise ValueError(f"{folder} has {len(files)} of the {shards} files of weights: {', '.join(files)}")
    return [os.path.join(folder, name) for name in files]


def folder_json(path: str, part: str, name: str = "config.json") -> Named:
    """A network's or the scheduler's config. Raises ValueError where it says what our networks do not do."""
    file = os.path.join(path, part, name)
    if not os.path.exists(file):
        raise ValueError(f"{path} is no diffusers folder of a Stable Diffusion: there is no {file}")
    with open(file) as opened:
        config = Named(json.load(opened), file)
    for key, value in FIXED[part].items():
        if config.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {config[key]!r}; a Stable Diffusion 1.x or 2.x has {value!r}")
    return config


def meaning(config: Named, key: str, default: str, known: dict):
    """What a value of a config is called here. Raises ValueError on an unknown one."""
    value = config.get(key, default)
    if value not in known:
        raise ValueError(f"{config.file}: {key} is {value!r}; understood are {', '.join(known)}")
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
        raise ValueError(f"{unet.file}: neither the number of heads, {heads}, nor their width is that of all levels")
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
        beta_schedule=meaning(scheduler, "beta_schedule", "scaled_linear", {b: b for b in BETA_SCHEDULES}),
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        zero_snr=scheduler.get("rescale_betas_zero_snr", False),
        spacing=meaning(scheduler, "timestep_spacing", "leading", SPACINGS),
        latent_scale=vae.get("scaling_factor", 0.18215),
        width=side,
        height=side,
        origin={"base": {"from": origin, "licence": LICENCE[family]}},
    )
    return Source(weights, names, told, settings)


def download(repository: str) -> str:
    """The files that load() needs of a Hugging Face repository, and no others -> the folder that they are in."""
    from huggingface_hub import errors, snapshot_download  # seconds to import, and only needed here

    wanted = ["scheduler/scheduler_config.json"]
    for part in ("unet", "vae", "text_encoder"):
        stem = f"{part}/{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}"
        wanted += [f"{part}/config.json", f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors"]
    try:
        return snapshot_download(repository, allow_patterns=wanted)
    except (OSError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ValueError(f"{repository}: there is no such file, and no such Hugging Face repository can be reached "
                        f"(a wrong name, or offline?): {one_line(error)}") from error


def is_repository(path: str) -> bool:
    """Whether a path that does not exist may be the name of a Hugging Face repository."""
    weights = path.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not weights and not os.path.isdir(path.split("/")[0])
