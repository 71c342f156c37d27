"""Every packaging of Stable Diffusion: one file (.safetensors, .ckpt), a diffusers folder, a repository."""

import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

from cli import one_line, read_json, warn
from sd.files import Weights
from sd.names import (
    ADDITIONS,
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
from sd.shapes import EXPECTED, FAMILY, LICENCE, SHAPELESS, Named, count


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


# What a file says of its prediction, where kohya's scripts and others write it, and where ComfyUI does.
TOLD = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTIONS = {"eps": "epsilon", "v_prediction": "v", "v-prediction": "v"}  # what is called otherwise here
AVERAGE = "model_ema.diffusion_model"  # how the UNet's moving average is called, its names without their dots
FOREIGN = {  # how a name in another kind of file begins, and what that file is
    r"control_model\.|controlnet_|input_hint_block": "a ControlNet",
    r".*\.(scale_weight|weight_scale|absmax|quant_map|SCB)$|scaled_fp8": "a quantised model, whose weights need scales",
    r".*lora|.*\.hada_|.*\.lokr_": "a LoRA, which changes a model but is none: give it with --lora, beside a model",
    r"conditioner\.embedders\.0\.model\.": "the refiner of Stable Diffusion XL",
    r"conditioner\.": "Stable Diffusion XL",
    r"(model\.diffusion_model\.)?joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r".*motion_modules\.": "the motion modules of AnimateDiff: give them with --motion, beside a model",
    r"emb_params|string_to_param": "a textual inversion",
    r"(encoder|decoder|quant_conv|post_quant_conv)\.(?!layers)": "a VAE alone",
    r"(down_blocks|up_blocks|input_blocks|output_blocks)\.": "a UNet alone",
    r"(text_model|embeddings|encoder\.layers|transformer|token_embedding)\b": "a text encoder alone",
}


def refuse_foreign(path: str, shapes):
    """Raise ValueError, saying what the file seems to be, unless it holds the three parts of a Stable Diffusion."""
    parts = {"UNet": (PREFIX["unet"], AVERAGE), "VAE": PREFIX["vae"], "text tower": "cond_stage_model."}
    missing = [part for part, prefix in parts.items() if not any(name.startswith(prefix) for name in shapes)]
    for pattern, what in list(FOREIGN.items())[: None if missing else 2]:  # these two stand in whole models too
        if any(re.match(pattern, name) for name in shapes):
            raise ValueError(f"{path} seems to be {what}; {EXPECTED}")
    if len(missing) == len(parts):
        raise ValueError(f"{path} seems to be no Stable Diffusion, it holds {list(shapes)[:3]}...; {EXPECTED}")
    if missing:
        raise ValueError(f"{path} seems to be part of a Stable Diffusion, without {', '.join(missing)}; {EXPECTED}")


def read_file(path: str, ema: bool) -> Source:
    """A single file in the original layout, ours or a published one."""
    weights = Weights(path)
    metadata = weights.add(path)
    before = {name.partition(PREFIX["unet"])[0] for name in weights.shapes if PREFIX["unet"] in name}
    weights.strip(min(before, key=len, default=""))  # "module.", as trainers call a model that they wrap
    shapes = weights.shapes
    refuse_foreign(path, shapes)
    homes = {part: (prefix,) for part, prefix in PREFIX.items()} | {"unet": (PREFIX["unet"], "etc.")}
    names = {part: {("model." if part == "text" else "") + name.removeprefix(home): (name,)
                    for home in homes[part] for name in shapes if name.startswith(home)} for part in PREFIX}
    family = "SD 2" if any(name.startswith(PREFIX["text"] + "transformer.") for name in shapes) else "SD 1"
    if family == "SD 1":  # some tools leave out "text_model."
        home = SD1_TEXT if any(n.startswith(SD1_TEXT + "encoder.") for n in shapes) else SD1_TEXT[: -len("text_model.")]
        names["text"] = text_parameters(count(shapes, home + "encoder.layers."), home)
    source = Source(weights, names, FAMILY[family], Settings())
    take_average(source, ema)
    added = [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in ADDITIONS)]
    if added:
        warn(f"{path} holds additions to the model, which are left out: {', '.join(added[:3])}")
        source.ignored += ADDITIONS
    if "etc" in metadata:
        source.settings, source.told = own_settings(path, metadata["etc"])
    else:
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", metadata.get("modelspec.resolution", "")) or (0, 512, 512)
        source.settings = Settings(
            zero_snr="ztsnr" in shapes, spacing="trailing" if "ztsnr" in shapes else "leading",
            width=int(size[1]), height=int(size[2]),
            origin={"base": {"from": os.path.basename(path), "licence": LICENCE[family]}})
    said = {"its header": source.settings.prediction} if "etc" in metadata else {}
    said |= {f"the tensor {name}": "v" for name in ("v_pred", "ztsnr") if name in shapes}
    said |= {name: PREDICTIONS.get(metadata[name].lower(), metadata[name]) for name in TOLD if name in metadata}
    if len(set(said.values())) > 1:
        warn(f"{path} contradicts itself, and the first is believed: "
             + ", ".join(f"{who} says {what}" for who, what in said.items()))
    source.settings = replace(source.settings, prediction=next(iter(said.values()), "epsilon"))
    source.says_prediction = bool(said) or family == "SD 1"
    return source


def take_average(source: Source, ema: bool):
    """Read the UNet from its moving average, where that is asked for or all there is. Raises ValueError."""
    shapes, names, what = source.weights.shapes, source.names["unet"], source.weights.what
    ours = [name for name, (theirs,) in names.items() if not theirs.startswith("etc.")]
    averaged = any(name.startswith(AVERAGE) for name in shapes)
    if ema and not averaged:
        raise ValueError(f"{what} holds no moving average (model_ema.*) beside the weights")
    if averaged and not ours:
        warn(f"{what} holds no weights of the UNet but their moving average: that is used")
        every = [parameters(unet_layers(levels, blocks), "") for levels in range(1, 6) for blocks in range(1, 4)]
        ours = [name for names in every for name in names if AVERAGE + name.replace(".", "") in shapes]
    elif not ema:
        return
    names |= {name: (AVERAGE + name.replace(".", ""),) for name in ours}
    source.ignored += (PREFIX["unet"] + "*",)


def own_settings(path: str, text: str) -> tuple[Settings, dict[str, dict]]:
    """The settings in the header of a file of ours, and what it tells of each network. Raises ValueError."""
    known = {f.name for f in fields(Settings)}
    try:
        header = json.loads(text)
        told = {part: {**header["architecture"][part]} for part in SHAPELESS}
        told["unet"]["fps_embedding"] = header["fps_embedding"]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in header.items() if k in known}
    except KeyError as error:
        raise ValueError(f"{path}: its settings (the header's `etc`) are damaged: they lack {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: its settings (the header's `etc`) are damaged: {one_line(error)}") from error
    strange = header.keys() - known - {"architecture", "text_pad_id", "mixed_embedding", "fps_embedding"}
    if strange:
        warn(f"{path}: its header says {', '.join(sorted(strange))}, not known here: is it of a newer version?")
    for part, values_of_part in told.items():
        for name in values_of_part.keys() - {*SHAPELESS[part], "fps_embedding"}:
            raise ValueError(f"{path}: its {part} says {name!r}, which is not known here: is it of a newer version?")
    return Settings(**values), told


FIXED = {  # what a folder's config.json may say of things that our networks do in one way, and that no shape betrays
    "unet": {"_class_name": ("UNet2DConditionModel",), "act_fn": ("silu", "swish"), "norm_eps": (1e-5,),
             "flip_sin_to_cos": (True,), "freq_shift": (0,), "downsample_padding": (1,), "class_embed_type": (None,),
             "center_input_sample": (False,), "mid_block_scale_factor": (1,), "addition_embed_type": (None,),
             "time_cond_proj_dim": (None,), "only_cross_attention": (False, *([False] * n for n in range(1, 6)))},
    "vae": {"_class_name": ("AutoencoderKL",), "act_fn": ("silu", "swish"), "shift_factor": (None,)},
    "text_encoder": {"model_type": ("clip_text_model",), "layer_norm_eps": (1e-5,)},
    "scheduler": {"num_train_timesteps": (1000,), "trained_betas": (None, [])},
}
PARTS = ("unet", "vae", "text_encoder")
# diffusers' and transformers' names of weight files, of one shard of several too
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(\.\w+)?(?:-\d+-of-(\d+))?(\.\w+)?"
                     r"\.(safetensors|bin)")
# their kinds and variants, the best first
KINDS = [(kind, variant) for variants in (("", ".fp32", ".fp16", ".bf16"), (".non_ema",))
         for kind in ("safetensors", "bin") for variant in variants]
SINGLE = (".safetensors", ".ckpt")
# diffusers writes "linspace" for Euler, DPM-Solver++, UniPC and LMS: it is theirs, and says nothing of the weights
SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "leading"}


def folder_weights(folder: str) -> list[str]:
    """The weight files of one network, all shards of the best kind. Raises ValueError on none, or not all."""
    choices, names = {}, sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for match in filter(None, map(WEIGHTS.fullmatch, names)):
        early, shards, late, kind = match.groups("")
        if (kind, early or late) in KINDS:
            choices.setdefault((KINDS.index((kind, early or late)), int(shards or 1)), []).append(match[0])
    if not choices:
        there = ", ".join(name for name in names if name != "config.json")[:200]
        raise ValueError(f"{folder} has no weights (.safetensors or .bin) under a name that diffusers uses, only "
                         f"{there or 'nothing'}; {EXPECTED}")
    (kind, shards), files = min(choices.items())
    if len(files) != shards:
        raise ValueError(f"{folder} has {len(files)} of the {shards} files of weights: {', '.join(files)}")
    if KINDS[kind][1] == ".non_ema":
        warn(f"{folder} has but the weights that were not averaged (non_ema): they are used")
    return [os.path.join(folder, name) for name in files]


def folder_json(path: str, part: str, name: str = "config.json") -> Named:
    """A network's or the scheduler's config. Raises ValueError where it says what our networks do not do."""
    file = os.path.join(path, part, name)
    if not os.path.exists(file):
        raise ValueError(f"{path} is no diffusers folder of a Stable Diffusion: there is no {file}{is_rather(path)}")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must be a JSON object of settings, got {str(config)[:40]}")
    for key, values in FIXED[part].items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{file}: {key} is {config[key]!r}; a Stable Diffusion 1.x or 2.x has {values[0]!r}"
                             + is_rather(path))
    return Named(config, file)


def is_rather(path: str) -> str:
    """What a folder says that it is, or which single files lie in it, to be added to an error."""
    for name in ("model_index.json", "config.json"):
        if os.path.isfile(os.path.join(path, name)):
            index = read_json(os.path.join(path, name))
            return f"; it says that it is a {index.get('_class_name')}" if isinstance(index, dict) else ""
    files = [n for n in sorted(os.listdir(path)) if n.endswith(SINGLE)] if os.path.isdir(path) else []
    return f"; give one of the files in it: {', '.join(files[:5])}" if files else ""


def meaning(config: Named, key: str, default: str, known: dict):
    """What a value of a config is called here. Raises ValueError on an unknown one."""
    value = config.get(key, default)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{config.file}: {key} is {value!r}; understood are {', '.join(known)}")
    return known[value]


def numbers(config: Named, key: str, default: int, count: int) -> list[int]:
    """A whole number of a config, or a list with one for each of `count` things. Raises ValueError."""
    value = default if config.get(key) is None else config[key]
    several = value if isinstance(value, list) else [value] * count
    if len(several) != count or not all(type(number) is int and number > 0 for number in several):
        raise ValueError(f"{config.file}: {key} must be a whole number > 0, or {count} of them, got {value!r}")
    return several


def read_folder(path: str, origin: str) -> Source:
    """A diffusers folder: unet/, vae/, text_encoder/ and scheduler/."""
    unet, vae, text = (folder_json(path, part) for part in PARTS)
    weights = Weights(path)
    for part in PARTS:
        for file in folder_weights(os.path.join(path, part)):
            weights.add(file, f"{part}/")
    shapes = weights.shapes
    old = "vae/encoder.mid_block.attentions.0.query.weight" in shapes
    inside = any(name.startswith("text_encoder/text_model.encoder.") for name in shapes)  # before transformers 5
    home = "text_encoder/text_model." if inside else "text_encoder/"
    levels, levels_of_vae = count(shapes, "unet/down_blocks."), count(shapes, "vae/encoder.down_blocks.")
    names = {
        "unet": parameters(unet_layers(levels, count(shapes, "unet/down_blocks.0.resnets.")), "unet/"),
        "vae": parameters(vae_layers(levels_of_vae, count(shapes, "vae/encoder.down_blocks.0.resnets."),
                                     VAE_ATTENTION_2022 if old else VAE_ATTENTION), "vae/"),
        "text": text_parameters(count(shapes, home + "encoder.layers."), home),
    }
    # the number of heads, in spite of its name, of all levels or of each
    key = "num_attention_heads" if unet.get("num_attention_heads") else "attention_head_dim"
    heads, number, head_width = numbers(unet, key, 8, levels), None, None
    if len(set(heads)) == 1:
        number = heads[0]
    else:
        widths = numbers(unet, "block_out_channels", 0, levels)
        head_width = widths[0] // heads[0]
        if any(h * head_width != w for h, w in zip(heads, widths)):
            raise ValueError(f"{unet.file}: neither the number of heads, {heads}, nor their width is the same in all "
                             "levels")
    quick_gelu = meaning(text, "hidden_act", "quick_gelu", {"quick_gelu": True, "gelu": False})
    family = "SD 1" if quick_gelu else "SD 2"
    told = {
        "unet": {"num_heads": number, "head_width": head_width, "norm_groups": unet.get("norm_num_groups", 32)},
        "vae": {"norm_groups": vae.get("norm_num_groups", 32)},
        "text": FAMILY[family]["text"] | {"heads": text["num_attention_heads"], "skip_last": 0},
    }
    height, width = (n * 2 ** max(0, levels_of_vae - 1) for n in numbers(unet, "sample_size", 64, 2))  # in pixels
    settings = Settings(latent_scale=vae.get("scaling_factor", 0.18215), width=width, height=height,
                        origin={"base": {"from": origin, "licence": LICENCE[family]}})
    if not os.path.exists(os.path.join(path, "scheduler")):
        warn(f"{path} has no scheduler/, which says the noise schedule: Stable Diffusion's is assumed")
        return Source(weights, names, told, settings, family == "SD 1")
    scheduler = folder_json(path, "scheduler", "scheduler_config.json")
    return Source(weights, names, told, replace(
        settings,
        prediction=meaning(scheduler, "prediction_type", "epsilon", {"epsilon": "epsilon", "v_prediction": "v"}),
        beta_schedule=meaning(scheduler, "beta_schedule", "scaled_linear", {b: b for b in BETA_SCHEDULES}),
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        zero_snr=scheduler.get("rescale_betas_zero_snr") or False,
        spacing=meaning(scheduler, "timestep_spacing", "leading", SPACINGS)))


@contextmanager
def from_hub(repository: str):
    """Context manager: the package huggingface_hub, whose errors become a ValueError that names the repository."""
    import huggingface_hub as hub  # seconds to import, only needed here
    from huggingface_hub import errors

    try:
        yield hub
    except (OSError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ValueError(f"{repository}: there is no such file, and no such Hugging Face repository can be reached "
                         f"(a wrong name, or offline?): {one_line(error)}") from error


def download(repository: str) -> str:
    """The files that load() needs of a Hugging Face repository, and no others -> their folder, or the one file."""
    wanted = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS)]
    lacking = PARTS
    with from_hub(repository) as hub:
        for kind in KINDS:
            folder = hub.snapshot_download(repository, allow_patterns=wanted + weights_of(lacking, *kind))
            there = [os.path.join(folder, part) for part in PARTS if os.path.isdir(os.path.join(folder, part))]
            lacking = [os.path.basename(part) for part in there if not any(map(WEIGHTS.fullmatch, os.listdir(part)))]
            wanted = []
            if not lacking:
                break
        if there and not lacking:
            return folder
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if not any(name.endswith(SINGLE) for name in names):
            names = hub.HfApi().list_repo_files(repository)
        files = [name for name in names if name.endswith(SINGLE)]
        if len(files) == 1:
            return hub.hf_hub_download(repository, files[0])
    heavy = [name for name in names if not name.endswith((".json", ".md", ".txt", ".gitattributes"))]
    raise ValueError(f"{repository} is no diffusers folder of a Stable Diffusion with weights that can be used, it has "
                     f"{', '.join((heavy or names)[:8])}" + (
        f"; download one of its files (hf download {repository} {files[0]}) and give its path" if files else ""))


def weights_of(parts, kind: str, variant: str) -> list[str]:
    """Patterns of the names of weight files, see WEIGHTS and KINDS."""
    stems = {"text_encoder": "model" if kind == "safetensors" else "pytorch_model"}
    return [f"{part}/{stems.get(part, 'diffusion_pytorch_model')}{end}.{kind}" for part in parts
            for end in (variant, f"{variant}-?????-of-?????", f"-?????-of-?????{variant}")]


def is_repository(path: str) -> bool:
    """Whether a path that does not exist may be the name of a Hugging Face repository."""
    weights = path.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not weights and not os.path.isdir(path.split("/")[0])
