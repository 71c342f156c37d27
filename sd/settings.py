"""What a model is: three networks, and the settings that their tensors do not tell."""

import inspect
from dataclasses import dataclass, field, replace

import torch

from grid import grid_shape
from model import Grid, UNet, UNetConfig
from sd.presets import ModelConfig
from sd.text import TextEncoder
from sd.vae import AutoencoderKL

# Ways to see time, by name: what makes the layout object, a function of the UNet's config and of the layout's options,
# each with a default. New ones are registered here.
LAYOUTS = {"grid": lambda cfg: Grid()}
BETA_SCHEDULES = ("scaled_linear", "linear")  # linear in sqrt(beta), as Stable Diffusion's; linear in beta


@dataclass(frozen=True)
class Settings:
    """What the tensors of a model do not tell. The defaults are those of Stable Diffusion 2.1-base."""

    prediction: str = "epsilon"  # what the UNet predicts: "epsilon" or "v"
    beta_schedule: str = BETA_SCHEDULES[0]
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = False  # rescaled so that the last timestep is pure noise; needs prediction "v"
    spacing: str = "leading"  # of the sampler's timesteps: "leading" or "trailing"
    latent_scale: float = 0.18215  # VAE latent x latent_scale has a standard deviation of about 1
    layout: str = "grid"  # how the tokens of a clip meet, one of LAYOUTS
    layout_options: dict = field(default_factory=dict)  # of that layout; a model has all of them
    frames: int = 1  # from here on: what the model was trained on, and what sampling therefore does by default
    width: int = 512
    height: int = 512
    fps: float = 30  # the default condition
    fps_trained: tuple[float, ...] = ()
    sampling_steps: int = 50
    guidance: float = 7.0
    eta: float = 0.0  # noise that DDIM adds, 0..1
    grid_trained: bool = False  # whether it has ever seen a grid
    ema: bool = False  # whether the weights are a moving average
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

    def bad_tensors(self) -> list[str]:
        """Names of the tensors that hold NaN or infinity, as "unet.out.2.weight"."""
        return [f"{part}.{name}" for part, module in self.parts().items() for name, tensor in module.state_dict().items()
                if not tensor.isfinite().all()]

    def check_size(self, width: int, height: int, frames: int):
        """Raise ValueError unless frames of this size, in pixels, are whole latent pixels and make a grid."""
        factor, halvings = self.vae.cfg.downsampling, self.unet.cfg.downsampling
        rows, cols = grid_shape(frames)
        for side, cells, name in ((width, cols, "width"), (height, rows, "height")):
            if side < factor or side % factor:
                raise ValueError(f"{name} must be divisible by {factor}, the VAE's factor, got {side}: use "
                                 f"{max(factor, side // factor * factor)} or {(side // factor + 1) * factor}")
            if side // factor * cells % halvings:
                raise ValueError(f"{name} must make a grid that the UNet can halve, got {side}: {cells} frames side by "
                                 f"side are {side // factor * cells} latent pixels, which {halvings} does not divide; "
                                 f"use a multiple of {factor * halvings}")


def build(config: ModelConfig, settings: Settings) -> Model:
    """A model with fresh random weights. Raises ValueError on a layout that is not known, or its options."""
    settings = replace(settings, layout_options=layout_options(settings))
    unet = UNet(config.unet, make_layout(config.unet, settings))
    return Model(unet, AutoencoderKL(config.vae), TextEncoder(config.text), settings)


def make_layout(cfg: UNetConfig, settings: Settings) -> Grid:
    """A fresh layout object of the settings for a UNet. Raises ValueError as `build` does."""
    return LAYOUTS[settings.layout](cfg, **layout_options(settings))


def layout_options(settings: Settings) -> dict:
    """All options of the layout, as the settings say or by default. Raises ValueError on unknown names."""
    if settings.layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {settings.layout!r}")
    _, *known = inspect.signature(LAYOUTS[settings.layout]).parameters.values()  # the first is the UNet's config
    options = {option.name: option.default for option in known} | settings.layout_options
    for name in options.keys() - {option.name for option in known}:
        raise ValueError(f"layout_options of {settings.layout!r} must be among "
                         f"{', '.join(option.name for option in known) or 'none'}, got {name!r}")
    return options
