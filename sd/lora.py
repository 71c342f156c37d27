"""LoRA: add low-rank changes to the weights of a model, W + scale * (alpha / rank) * up @ down.

Read are kohya's names (layers as diffusers calls them or as the original UNet does, with "_" for dots), diffusers' and
peft's of all years, and AnimateDiff's Motion LoRA. Once every dot is a "_", a layer has few names.
"""

import json
import math
import os
import re
from dataclasses import replace

import torch

from cli import one_line, warn
from model import UNet
from sd.files import Opened, open_weights
from sd.motion import motion_names
from sd.names import parameters, text_parameters, unet_layers
from sd.settings import Model, Settings
from sd.sources import own_settings

ENDS = {  # how the name of a tensor ends, behind that of its layer
    "down": r"([._]lora(_linear_layer)?[._]down|\.lora_A(\.default)?)\.weight",
    "up": r"([._]lora(_linear_layer)?[._]up|\.lora_B(\.default)?)\.weight",
    "alpha": r"\.alpha",
}
OTHERS = {  # changes of other kinds
    r"dora_scale|lora_magnitude_vector": "a DoRA", r"\.hada_": "a LoHa", r"\.lokr_": "a LoKr",
    r"\.lora_mid\.": "a LoCon in Tucker's form", r"\.oft_": "an OFT", r"\.on_input$": "an IA3",
    r"\.diff(_b)?$|\.lora_[AB]\.bias$": "a LoRA with whole weights or biases beside it",
}
TRAINED = ("frames", "width", "height", "fps", "fps_trained", "guidance", "eta", "grid_trained", "given_trained")
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out_0": "out_proj"}


def merge_lora(model: Model, path: str, scale: float = 1.0):
    """Add a LoRA to the weights of a model, in place.

    scale  1 is as it was trained, 0 nothing

    Raises ValueError on tensors that have no place in the model, or another shape there, and on what is no LoRA.
    """
    if not math.isfinite(scale):
        raise ValueError(f"the scale of {path} must be a finite number, got {scale}")
    file, places, pairs = open_weights(path), targets(model), []
    alpha_of, settings = told_alphas(path, file, places), trained_as(path, file, model.settings)
    for (part, parameter, i, n), names in by_layer(path, file, places).items():  # nothing is added before all fits
        weight = model.parts()[part].get_parameter(parameter).data.chunk(n)[i]
        down, up = (file.shapes[names[end]] for end in ("down", "up"))
        (out, rank, *_), (rank_too, *_) = (*up, 0, 0), (*down, 0)
        good = out == len(weight) and rank == rank_too > 0
        if not good or math.prod(up) != out * rank or math.prod(down) != rank * weight[0].numel():
            raise ValueError(f"{path}: {names['up']} is {tuple(up)} and {names['down']} {tuple(down)}; the "
                             f"layer's weight is {tuple(weight.shape)}: is it for another Stable Diffusion?")
        alpha = file.get(names["alpha"]).float().mean().item() if "alpha" in names else None
        alpha = alpha_of(part, parameter, i, rank) if alpha is None else alpha
        if not math.isfinite(alpha):
            what = names.get("alpha", "lora_alpha in its header")
            raise ValueError(f"{path}: {what} must be a finite number, got {alpha}")
        pairs.append((weight, names, scale * alpha / rank))
    for weight, names, factor in pairs:
        down, up = (file.get(names[end]).float().flatten(1) for end in ("down", "up"))
        change = factor * (up @ down).view(weight.shape)
        if not change.isfinite().all():
            raise ValueError(f"{path}: {names['down']} or {names['up']} holds NaN or infinity: the file is damaged")
        weight.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)) + change.to(weight.device))
    origin = settings.origin
    merged = [*origin.get("lora", ()), {"from": os.path.basename(path), "scale": scale}]
    model.settings = replace(settings, origin=origin | {"lora": merged})


def by_layer(path: str, file: Opened, places) -> dict[tuple, dict[str, str]]:
    """{place in the model: {"down", "up" and perhaps "alpha": name of the tensor}}. Raises ValueError on any other."""
    for pattern, what in OTHERS.items():
        if found := [name for name in file.shapes if re.search(pattern, name)]:
            raise ValueError(f"{path} is {what}, and only LoRA can be merged: {found[0]}")
    layers, unknown = {}, []
    for name in file.shapes:
        end = next((end for end, pattern in ENDS.items() if re.search(pattern + "$", name)), None)
        place = places.get(flat(re.sub(ENDS[end] + "$", "", name))) if end else None
        if not place:
            unknown.append(name)
        elif layers.setdefault(place, {}).setdefault(end, name) != name:
            raise ValueError(f"{path} changes a layer twice: {name}, {layers[place][end]}")
    if unknown or not layers:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        more += "; a Motion LoRA needs motion modules" * any("motion_modules" in name for name in unknown)
        raise ValueError(f"{path} changes what the model does not have: {', '.join(unknown[:3]) or 'nothing'}{more}")
    for names in layers.values():
        if not {"down", "up"} <= names.keys():
            raise ValueError(f"{path}: {next(iter(names.values()))} stands alone; a LoRA has a pair for every layer")
    return layers


def targets(model: Model) -> dict[str, tuple[str, str, int, int]]:
    """{layer, see `flat`: (part, parameter, i, n)}: its weight is the i-th of the n pieces of that parameter."""
    places = {}
    for parameter, spellings in unet_names(model.unet).items():
        places |= {flat("unet." + name.removesuffix(".weight")): ("unet", parameter, 0, 1) for name in spellings}
    for parameter, pieces in text_parameters(model.text.cfg.layers, "text_encoder.").items():
        for i, name in enumerate(pieces):
            places[flat(name.removesuffix(".weight"))] = "text", parameter, i, len(pieces)
    return places


def unet_names(unet: UNet) -> dict[str, tuple[str, ...]]:
    """{a UNet's parameter: its names in files, diffusers' first}."""
    cfg, ours = unet.cfg, unet.state_dict()
    layers = parameters(unet_layers(len(cfg.channel_mult), cfg.num_res_blocks), "")
    names = {parameter: (*theirs, parameter) for parameter, theirs in layers.items()}
    names |= {parameter: spellings[::-1] for parameter, spellings in motion_names(cfg).items()}
    return {parameter: spellings for parameter, spellings in names.items() if parameter in ours}


def flat(layer: str) -> str:
    """A name for a layer that is the same in all spellings: without dots and prefixes, as "unet up_blocks_1_..."."""
    layer = re.sub(r"to_out$", "to_out_0", layer.replace(".processor.", ".").replace(".", "_"))
    text = re.match(r"(lora_te1?|text_encoder)_(text_model_)?", layer)
    if text:
        return "text " + re.sub(r"(?<=self_attn_)to_\w+$", lambda m: OLD_TEXT.get(m[0], m[0]), layer[text.end() :])
    return "unet " + re.sub(r"^(lora_unet|unet|module)_", "", layer)


def told_alphas(path: str, file: Opened, places):
    """A function (part, parameter, i, rank) -> alpha, as diffusers writes it into the header; else it is the rank."""
    try:
        told = json.loads(file.metadata.get("lora_adapter_metadata") or "{}")
        whole, rooted, exact = {}, [], {}
        for part, home in (("unet", "unet."), ("text", "text_encoder.")):
            if told.get(f"{home}lora_alpha") is not None:
                whole[part] = float(told[f"{home}lora_alpha"])
            rooted += [part] * bool(told.get(f"{home}use_rslora"))
            for layer, alpha in (told.get(f"{home}alpha_pattern") or {}).items():
                exact[places.get(flat(home + layer), (None,))[:3]] = float(alpha)
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its header (lora_adapter_metadata) is damaged: {one_line(error)}") from error

    def alpha(part, parameter, i, rank):
        value = exact.get((part, parameter, i), whole.get(part))
        return rank if value is None else value * (math.sqrt(rank) if part in rooted else 1)

    return alpha


def trained_as(path: str, file: Opened, settings: Settings) -> Settings:
    """The settings with what a LoRA of ours was trained on; those of others do not tell. Raises ValueError."""
    if "etc" not in file.metadata:
        return settings
    told, _ = own_settings(path, file.metadata["etc"])
    try:
        told.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name in ("prediction", "layout"):
        if getattr(told, name) != getattr(settings, name):
            warn(f"{path} was trained with {name} {getattr(told, name)!r}, not {getattr(settings, name)!r}")
    return replace(settings, **{name: getattr(told, name) for name in TRAINED})


def read_lora(text: str) -> tuple[str, float]:
    """ "FILE" or "FILE:SCALE" -> (file, scale); 1 where there is none."""
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", text)
    return (match[1], float(match[2])) if match and not os.path.exists(text) else (text, 1.0)
