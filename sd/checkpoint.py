"""Models on disk: load() reads them, save() writes them.

load() takes Stable Diffusion 1.x and 2.x in every packaging: one file (.safetensors, .ckpt), a diffusers folder, a
Hugging Face repository. save() writes one safetensors file in the layout of the original checkpoints, with ETC's few
extra tensors beside them under `etc.*` and the settings as JSON in its header:

    model.diffusion_model.*    UNet                     cond_stage_model.*    text tower
    first_stage_model.*        VAE                      etc.*                 the FPS embedding's projections
"""

import json
import os
from dataclasses import asdict, replace
from fnmatch import fnmatchcase

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cli import beside, warn
from layers.basic import initialize, zero
from sd.files import Weights, open_weights
from sd.lora import merge_lora
from sd.motion import add_motion
from sd.names import SD1_TEXT, file_name, text_parameters
from sd.presets import ModelConfig
from sd.settings import Model, build, make_layout
from sd.shapes import EXPECTED, SHAPELESS, Shapes, text_config, unet_config, vae_config
from sd.sources import Source, download, is_repository, read_file, read_folder

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


def header(model: Model) -> dict[str, str]:
    """What a file of the model tells beside its tensors."""
    configs = {part: module.cfg for part, module in model.parts().items()}
    told = asdict(model.settings) | {
        "text_pad_id": model.text.cfg.pad_id,
        "mixed_embedding": model.unet.cfg.mixed_embedding,
        "fps_embedding": model.unet.cfg.fps_embedding,
        "architecture": {p: {k: getattr(configs[p], k) for k in names} for p, names in SHAPELESS.items()},
    }
    return {"format": "pt", "etc": json.dumps(told), "modelspec.prediction_type": model.settings.prediction,
            "modelspec.resolution": f"{model.settings.width}x{model.settings.height}"}


def save(model: Model, path: str):
    """Write the model as one file, beside `path` and then renamed into place, so that it is never half there."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model_tensors(model).items()}
    write_tensors(tensors, path, header(model))


def write_tensors(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str] | None = None):
    """Write a safetensors file, beside `path` and then renamed into place. Raises OSError."""
    with beside(path) as part:
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:  # its word for a full disk
            raise OSError(str(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Load


def load(path: str, device="cpu", dtype=torch.float32, prediction: str | None = None, ema: bool = False,
         layout: str | None = None, layout_options: dict | None = None, motion: str | None = None, lora=()) -> Model:
    """A Stable Diffusion 1.x or 2.x, or one of our own models, in evaluation mode.

    path        a file (.safetensors, .ckpt), a diffusers folder, or a Hugging Face repository "owner/name"
    prediction  what the UNet predicts, "epsilon" or "v"; None: what the files say, and "epsilon" if they do not
    ema         of a training checkpoint, take the UNet's moving average (model_ema.*) rather than its last weights
    layout      how the tokens of a clip meet, one of sd.settings.LAYOUTS; None: what the file says, and "grid" if it
                does not
    layout_options  of that layout, the others as the file says or by default
    motion      AnimateDiff's motion modules: a file, a diffusers folder or a repository. The layout is then "temporal"
    lora        (file, scale) pairs that are added to the weights

    What comes without ETC's tensors gets fresh ones, which change nothing until they are trained. On the CPU, weights
    that have the wanted dtype already stay in the file, mapped into memory. Raises ValueError when the files do not
    hold exactly one whole model.
    """
    name = path = os.fspath(path)
    if not os.path.exists(path) and is_repository(path):
        path = download(path)
    elif os.path.isdir(path):
        name = os.path.basename(os.path.abspath(path))
    source = read_folder(path, name) if os.path.isdir(path) else read_file(path, ema)
    if prediction:
        source.settings = replace(source.settings, prediction=prediction)
    elif not source.says_prediction:
        warn(f'{path} does not say what it predicts: "epsilon" is assumed; SD 2 at 768 pixels wants "v"')
    if motion and (layout not in (None, "temporal") or layout_options):
        raise ValueError("motion modules make the layout 'temporal' and bring its options: no others can be chosen")
    if layout and layout != source.settings.layout:
        if source.settings.grid_trained:
            warn(f"{path} was trained with the layout {source.settings.layout!r}, not {layout!r}")
        source.settings = replace(source.settings, layout=layout, layout_options={})
        source.fresh += () if motion else ("layout.",)
        source.ignored += ("etc.layout.*",)
    if layout_options:
        source.settings = replace(source.settings, layout_options=source.settings.layout_options | layout_options)
    lora = list(lora)
    for file, _ in lora:
        open_weights(file)  # what is none is told before the work
    model = assemble(source, device, dtype, motion)
    for file, scale in lora:
        merge_lora(model, file, scale)
    return model


def assemble(source: Source, device, dtype, motion: str | None = None) -> Model:
    """Build the networks without memory, then give them their tensors: each one in the files must find its place."""
    weights, what, pieces = source.weights, source.weights.what, source.names
    configs = {}
    for part, read in (("unet", unet_config), ("vae", vae_config), ("text", text_config)):
        shapes = {n: weights.shapes[theirs[0]] for n, theirs in pieces[part].items() if theirs[0] in weights.shapes}
        named = Shapes(shapes, what, lambda n, part=part: pieces[part].get(n, [file_name(part, n)])[0])
        configs[part] = replace(read(named), **source.told[part])
    if not configs["unet"].fps_embedding and "fps_embedding" not in source.told["unet"]:
        configs["unet"] = replace(configs["unet"], fps_embedding=True)
        source.fresh += ("time_proj.", "fps_proj.")
    if motion:
        add_motion(source, configs["unet"], motion)
    try:
        with torch.device("meta"):
            model = build(ModelConfig(**configs), source.settings)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{what}: {error}") from error

    wanted = [(part, name, tensor.shape, pieces[part].get(name, (file_name(part, name),)))
              for part, module in model.parts().items() for name, tensor in module.state_dict().items()
              if not (part == "unet" and name.startswith(source.fresh))]
    check(weights, wanted, source.ignored)
    states = {part: {} for part in pieces}
    for part, name, shape, theirs in wanted:
        tensors = [weights.read(n, device, dtype) for n in theirs]
        states[part][name] = (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).reshape(shape)
    states["unet"] |= fresh_tensors(model, source.fresh, device, dtype)
    if "layout." in source.fresh and model.unet.layout.state_dict():
        model.settings = replace(model.settings, grid_trained=False)
    for part, module in model.parts().items():
        module.load_state_dict(states[part], assign=True)
        module.eval()
    return model


def check(weights: Weights, wanted, ignored):
    """Raise ValueError unless the files hold all that is wanted, in the right shapes, and nothing unknown beside it."""
    names = [(n, tuple(shape) if len(theirs) == 1 else (shape[0] // len(theirs), *shape[1:]))
             for _, _, shape, theirs in wanted for n in theirs]
    used = {n for n, _ in names}
    missing = [n for n in used if n not in weights.shapes]
    wrong = [f"{n} is {weights.shapes[n]} and not {shape}" for n, shape in names
             if n in weights.shapes and per_pixel(weights.shapes[n]) != per_pixel(shape)]
    unknown = [n for n in weights.shapes if n not in used and not any(fnmatchcase(n, p) for p in ignored)]
    for fault, found in (("lacks", missing), ("has another shape where", wrong), ("has unknown tensors,", unknown)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(f"{weights.what} {fault} {', '.join(sorted(found)[:3])}{more}; {EXPECTED}")


def per_pixel(shape):
    """The shape, with a 1x1 convolution as the linear layer that it is: diffusers made some of the one the other."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def fresh_tensors(model: Model, parts: tuple[str, ...], device, dtype) -> dict[str, torch.Tensor]:
    """ETC's own tensors for a UNet that has none yet: the same at every load, and changing nothing.

    parts  the beginnings of their names, among EXTRA
    """
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in (part.removesuffix(".") for part in parts):
        if name == "layout":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                layers = make_layout(model.unet.cfg, model.settings)
        else:
            layers = getattr(model.unet, name).to_empty(device="cpu")
            initialize(layers, generator=generator)
            zero(layers[-1])
        tensors |= {f"{name}.{k}": tensor for k, tensor in layers.to(device, dtype).state_dict().items()}
    return tensors
