"""What a model is: three networks, and the settings that their tensors do not tell."""

import inspect
from dataclasses import dataclass, replace

import torch
from torch import nn

import cli
from beyond.causal import Causal
from beyond.pooled import Pooled
from beyond.swap import Swap
from beyond.temporal import Temporal
from cli import option
from grid import grid_shape
from layers.basic import initialize
from model import Grid, UNet, UNetConfig
from sd.presets import ModelConfig
from sd.text import TextConfig, TextEncoder
from sd.vae import AutoencoderKL

# Ways to see time, by name: what makes the layout object, a function of the UNet's config and of the layout's options,
# each with a default; what else it needs of the settings are keyword-only arguments. New ones are registered here.
LAYOUTS = {"grid": lambda cfg: Grid(), "temporal": Temporal, "pooled": Pooled, "causal": Causal, "swap": Swap}
BETA_SCHEDULES = ("scaled_linear", "linear")  # linear in sqrt(beta), as Stable Diffusion's; linear in beta


@dataclass(frozen=True)
class Settings:
    """What the tensors of a model do not tell. The defaults are those of Stable Diffusion 2.1-base."""

    prediction: str = option("epsilon", "what the UNet predicts", choices=("epsilon", "v"))
    beta_schedule: str = option(BETA_SCHEDULES[0], "how the betas rise", choices=BETA_SCHEDULES)
    beta_start: float = option(0.00085, above=0)
    beta_end: float = option(0.012, high=0.999)
    zero_snr: bool = option(False, "rescaled so that the last timestep is pure noise; needs prediction v")
    spacing: str = option("leading", "of the sampler's timesteps", choices=("leading", "trailing"))
    latent_scale: float = option(0.18215, "VAE latent x latent_scale has a standard deviation of about 1", above=0)
    layout: str = option("grid", "how the tokens of a clip meet, one of LAYOUTS")
    layout_options: dict = option({}, "of that layout; a model has all of them")
    # from here on: what the model was trained on, and what sampling therefore does by default
    frames: int = option(1, low=1, high=2**16)
    width: int = option(512, low=1, high=2**16)
    height: int = option(512, low=1, high=2**16)
    fps: float = option(30, "the default condition", low=0, high=120)
    fps_trained: tuple[float, ...] = option((), low=0, high=120)
    sampler: str = option("ddim", "one of sample.SAMPLERS")
    sampling_steps: int = option(50, "of that sampler", low=1, high=1000)
    sampling_shift: float = option(1.0, "more than 1: more of the steps where there is more noise", low=1, high=1000)
    guidance_interval: tuple[int, int] = option((0, 999), "timesteps at which there is guidance, ends included", low=0,
                                                high=999)
    fast: dict = option({}, "what --fast means for this model, where that is not beyond.fast.FAST")
    guidance: float = option(7.0)
    eta: float = option(0.0, "noise that DDIM adds", low=0, high=1)
    grid_trained: bool = option(False, "whether it has ever seen a grid")
    given_trained: bool = option(False, "whether it has ever been given some of the frames")
    ema: bool = option(False, "whether the weights are a moving average")
    origin: dict = option({}, "config, steps, commit, data, licence")

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ of the 1000 timesteps of the noise schedule (1000,)."""
        root = 0.5 if self.beta_schedule == "scaled_linear" else 1
        betas = torch.linspace(self.beta_start**root, self.beta_end**root, 1000, dtype=torch.float64,
                               device="cpu") ** (1 / root)  # other devices may lack this precision
        signal = (1 - betas).cumprod(0).sqrt()  # sqrt(ᾱ)
        if self.zero_snr:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        return (signal**2).float()

    def check(self):
        """Raise ValueError where a setting is no such thing, or two do not go together."""
        cli.check(self)
        if self.beta_start >= self.beta_end:
            raise ValueError(f"beta_end must be > beta_start, got {self.beta_end:g} and {self.beta_start:g}")
        if self.zero_snr and self.prediction != "v":
            raise ValueError('zero_snr needs prediction "v": at pure noise, ε says nothing of x_0')
        grid_shape(self.frames)


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

    def use_layout(self, name: str):
        """Put another layout, with its default options, in the place of the model's own."""
        self.settings = replace(self.settings, layout=name, layout_options={})
        self.settings = replace(self.settings, layout_options=layout_options(self.settings))
        weight = self.unet.out[2].weight
        self.unet.layout = make_layout(self.unet.cfg, self.settings).to(weight.device, weight.dtype)

    def bad_tensors(self) -> list[str]:
        """Names of the tensors that hold NaN or infinity, as "unet.out.2.weight"."""
        return [f"{part}.{name}" for part, module in self.parts().items()
                for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]

    def check_size(self, width: int, height: int, frames: int):
        """Raise ValueError unless frames of this size, in pixels, are whole latent pixels and make a grid."""
        factor, halvings = self.vae.cfg.downsampling, self.unet.cfg.downsampling
        rows, cols = grid_shape(frames)
        if self.unet.layout.positions and frames > self.unet.layout.positions:
            raise ValueError(f"frames must be <= {self.unet.layout.positions}, as many as the model numbers in time, "
                             f"got {frames}")
        if self.unet.layout.per_frame:
            rows = cols = 1
        for side, cells, name in ((width, cols, "width"), (height, rows, "height")):
            if side < factor or side % factor:
                raise ValueError(f"{name} must be divisible by {factor}, the VAE's factor, got {side}: use "
                                 f"{max(factor, side // factor * factor)} or {(side // factor + 1) * factor}")
            if side // factor * cells % halvings:
                raise ValueError(f"{name} must make a grid that the UNet can halve, got {side}: {cells} frames side by "
                                 f"side are {side // factor * cells} latent pixels, which {halvings} does not divide; "
                                 f"use a multiple of {factor * halvings}")

    def unseen(self, request) -> list[str]:
        """What the model was never trained on, in a sentence each, of a resolved sample.Request."""
        s, trained = self.settings, ", ".join(f"{fps:g}" for fps in self.settings.fps_trained)
        if request.frames == 1:
            return ["one frame is made without grid and FPS, as by the model that this one was trained from"
                    ] * s.grid_trained
        if not s.grid_trained:
            motion = ", or give it motion modules with --motion" * (s.layout == "temporal")
            return ["this model's layers over time were never trained: expect unrelated pictures, not a video (train "
                    f"it with train.py{motion})" if self.unet.layout.per_frame else
                    "this model never saw a grid of frames: expect a collage, not a video (train it with train.py)"]
        told, frames = [], request.frames if self.unet.layout.goes_on else request.window(self)
        if request.known and not s.given_trained and request.window(self) > 1:
            told.append("this model was never trained with given frames: they are put back at every step, which guides "
                        "the others less")
        if not s.fps_trained:  # motion modules that others trained, with no frame rate told and on any base
            return told
        if request.fps not in s.fps_trained:
            told.append(f"this model never saw {request.fps:g} FPS; it was trained at {trained}")
        if (frames, *request.size) != (s.frames, s.width, s.height):
            told.append(f"this model was trained on {s.frames} frames of {s.width}x{s.height}, "
                        f"not {frames} of {request.size[0]}x{request.size[1]}")
        return told

    def cut_off(self, request) -> list[str]:
        """What the text tower does not read of the prompts of a request, in a sentence each."""
        return [f"the prompt is longer than the text tower reads; cut off: {cut[:200]!r}{' ...' * (len(cut) > 200)}"
                for cut in self.text.tokenize([*request.texts, request.negative])[1] if cut]


def build(config: ModelConfig, settings: Settings) -> Model:
    """A model with fresh random weights. Raises ValueError on settings or widths that cannot be, or do not fit."""
    settings.check()
    check_widths(config)
    settings = replace(settings, layout_options=layout_options(settings))
    model = Model(UNet(config.unet), AutoencoderKL(config.vae), TextEncoder(config.text), settings)
    model.unet.layout = make_layout(config.unet, settings)  # last: with any layout, all else is drawn alike
    return model


def make_layout(cfg: UNetConfig, settings: Settings) -> Grid:
    """A fresh layout object of the settings for a UNet. Raises ValueError as `build` does."""
    options, parameters = layout_options(settings), inspect.signature(LAYOUTS[settings.layout]).parameters.values()
    layout = LAYOUTS[settings.layout](cfg, **options, **{
        parameter.name: getattr(settings, parameter.name) for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY})
    initialize(layout, nn.Linear)
    return layout


def layout_options(settings: Settings) -> dict:
    """All options of the layout, as the settings say or by default. Raises ValueError on unknown names."""
    if settings.layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {settings.layout!r}")
    _, *known = inspect.signature(LAYOUTS[settings.layout]).parameters.values()  # the first is the UNet's config
    defaults = {parameter.name: parameter.default for parameter in known
                if parameter.kind is not parameter.KEYWORD_ONLY}
    for name in settings.layout_options.keys() - defaults.keys():
        raise ValueError(f"layout_options of {settings.layout!r} must be among {', '.join(defaults) or 'none'}, "
                         f"got {name!r}")
    return defaults | settings.layout_options


def check_widths(config: ModelConfig):
    """Raise ValueError where a config says what is no size, or networks that cannot be built or do not fit together."""
    for part, cfg in (("UNet", config.unet), ("VAE", config.vae), ("text tower", config.text)):
        try:
            cli.check(cfg)
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from error
    unet, vae, text = config.unet, config.vae, config.text
    widths = [unet.channels * m for m in unet.channel_mult]
    attended = [*(widths[i] for i in unet.attention_levels if i < len(widths)), *widths[-1:]]
    for part, name, number, wides in (
            ("UNet", "norm_groups", unet.norm_groups, [unet.channels, *widths]),
            ("UNet", "head_width", unet.num_heads or unet.head_width or 0, attended),
            ("VAE", "norm_groups", vae.norm_groups, [vae.channels * m for m in vae.channel_mult]),
            ("text tower", "heads", text.heads, [text.width])):
        for wide in wides or [0]:
            if number < 1 or wide < 1 or wide % number:
                raise ValueError(f"{part}: {name} must divide the width {wide}, got {number}")
    for name, number, low, high in (("skip_last", text.skip_last, 0, text.layers - 1), ("length", text.length, 3, 1024),
                                    ("pad_id", text.pad_id, 0, text.vocab - 1)):
        if not low <= number <= high:
            raise ValueError(f"text tower: {name} must be in {low}..{high}, got {number}")
    if text.vocab < TextConfig.vocab:
        raise ValueError(f"text tower: vocab must be that of CLIP, {TextConfig.vocab} or more, got {text.vocab}")
    for what, theirs, ours in (("text tower gives {} channels", text.width, unet.context_dim),
                               ("VAE has latents of {} channels", vae.latent_channels, unet.latent_channels)):
        if theirs != ours:
            raise ValueError(f"the {what.format(theirs)}, the UNet takes {ours}")
