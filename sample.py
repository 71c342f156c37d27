"""From a prompt to a video: the noise schedule, the samplers, generate(), and the command line.

    python sample.py "a red circle moving right"
"""

import os
import re
import sys
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from tqdm import tqdm

import cli
import sd
from beyond.fast import DPM, FAST, Reuse, StochasticDPM, check_sampling, fast_settings, pooling_pays, rescaled
from beyond.frames import Known, check_keys, check_known, contexts_at, read_keys, window_length, windows
from cli import option
from clips.gallery import claim_outputs, is_gallery
from clips.given import Given, load_model, read_prompts, settings_like, settings_of
from clips.write import Kept, playback_fps, write_video
from grid import fold, grid_shape, unfold
from sd.device import at_work, check_memory, require_finite
from sd.vae import decode, encode
from training.ranks import Ranks, shared

# ---------------------------------------------------------------------------------------------------------------------
# Noise schedule


class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, 1 - ᾱ_t), with Stable Diffusion's betas: linear in sqrt(beta).

    `zero_snr` shifts and scales sqrt(ᾱ) so that the last timestep is pure noise (Lin et al. 2023, Algorithm 1): only
    then does a sampler, which starts from pure noise, start from what the model was trained on. Raises ValueError on
    settings that are unknown, or do not go together.
    """

    timesteps = 1000

    def __init__(self, settings: sd.Settings):
        settings.check()
        self.alphas_cumprod = settings.alphas_cumprod  # (1000,)
        self.prediction, self.spacing = settings.prediction, settings.spacing
        self.sampling_timesteps(settings.sampling_steps, settings.sampling_shift)  # raises

    def signal_and_noise(self, t, like):
        """sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), for t (B,) or a map of timesteps (B, 1, H, W), shaped to multiply `like`."""
        a = self.alphas_cumprod.to(like.device)[t]
        a = a.view(*a.shape, *[1] * (like.ndim - a.ndim))
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0, eps, t):
        """x_t for clean x0, noise eps and timesteps t."""
        signal, noise = self.signal_and_noise(t, x0)
        return signal * x0 + noise * eps

    def target(self, x0, eps, t):
        """What the UNet is trained to predict: ε, or v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0."""
        if self.prediction == "epsilon":
            return eps
        signal, noise = self.signal_and_noise(t, x0)
        return signal * eps - noise * x0

    def x0_and_eps(self, x, output, t):
        """Solve for (x_0, ε), given x_t and the UNet's output there."""
        signal, noise = self.signal_and_noise(t, x)
        if self.prediction == "epsilon":
            return (x - noise * output) / signal, output
        return signal * x - noise * output, signal * output + noise * x

    def sampling_timesteps(self, steps: int, shift=1.0) -> list[int]:
        """The timesteps of a sampler with `steps` steps, noisiest first.

        "leading" with offset 1 is what published Stable Diffusion pipelines do; it never visits the last timestep.
        "trailing" starts at the last one, as a zero-SNR schedule needs. A shift s > 1 moves them to more noise, as
        timestep_shift does in training: the odds u / (1 - u) of u = (t + 1) / 1000 are multiplied by s. Raises
        ValueError outside 1..1000 steps, and where a shift makes several of them one.
        """
        N = self.timesteps
        if not 1 <= steps <= N:
            raise ValueError(f"steps must be in 1..{N}, got {steps}")
        even = [min((i - 1) * (N // steps) + 2, N) if self.spacing == "leading" else N * i / steps
                for i in range(steps, 0, -1)]  # t + 1
        timesteps = [round(shift * n / (1 + (shift - 1) * n / N)) - 1 for n in even]
        if len(set(timesteps)) < len(set(even)):
            raise ValueError(f"steps must be fewer with a shift of {shift:g}, got {steps}: some fall on one timestep")
        return timesteps


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: one step from x_t to the x of the next, less noisy timestep. A new one is a class and a line in SAMPLERS.


class DDIM:
    """DDIM (Song et al. 2021, Equation 12). It ends at ᾱ_0, as published pipelines do.

    steps  how many are usual
    eta    how much of the ancestral noise it adds, 0..1: 0 is deterministic, 1 is ancestral
    noise  () -> fresh noise like x
    """

    steps = 50

    def __init__(self, schedule: NoiseSchedule, timesteps: list[int], eta: float, noise):
        self.alphas = schedule.alphas_cumprod[[*timesteps, 0]]  # ᾱ of every step, and after the last
        self.eta, self.noise = eta, noise

    def step(self, i: int, x, x0, eps):
        """x_t of step i, and the x_0 and ε predicted there -> x of step i + 1."""
        a, a_next = self.alphas[i], self.alphas[i + 1]
        sigma = self.eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next - sigma**2).clamp(min=0).sqrt() * eps
        return x + sigma * self.noise() if self.eta > 0 else x


class DDPM:
    """Ancestral DDPM on the respaced schedule (Ho et al. 2020, Equations 6-7), the smaller variance. Ends at ᾱ = 1."""

    steps = 50

    def __init__(self, schedule: NoiseSchedule, timesteps: list[int], eta: float, noise):
        self.alphas, self.noise = torch.cat([schedule.alphas_cumprod[timesteps], torch.ones(1)]), noise

    def step(self, i: int, x, x0, eps):
        a, a_next = self.alphas[i], self.alphas[i + 1]
        alpha = a / a_next
        mean = (a_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_next) * x) / (1 - a)
        variance = (1 - a_next) / (1 - a) * (1 - alpha)
        return mean + variance.sqrt() * self.noise() if variance > 0 else mean


SAMPLERS = {"ddim": DDIM, "ddpm": DDPM, "dpm++": DPM, "dpm++sde": StochasticDPM}


def denoise(unet, schedule, x, context, negative, fps=None, grid=None, *, steps=50, shift=1.0, guidance=7.0,
            rescale=0.0, sampler="ddim", eta=0.0, noise=None, known=None):
    """Sample: a generator that yields (i, t, x_t, predicted x_0) after every step; the last x_t is the sample.

        for i, t in enumerate(timesteps):                                     # noisiest first
            without, with_prompt = unet(x, t, negative), unet(x, t, context)
            x0, eps = schedule.x0_and_eps(x, without + guidance * (with_prompt - without), t)
            x = sampler.step(i, x, x0, eps)

    unet      called as unet(x, t, context, fps, grid)
    x         (B, 4, H, W) pure noise, frames folded into a grid image
    context   (B, L, D) of the prompts, or one a frame (B, T, L, D); `negative` of what to stay away from ("" usually)
    fps       (B,) or None; both halves of guidance get it
    shift     moves the timesteps, see NoiseSchedule.sampling_timesteps
    guidance  ε = ε(negative) + guidance * (ε(prompt) - ε(negative)); a number, or a function of the timestep that
              gives one. Where it is 1 there is no guidance, and a step costs half
    rescale   share of guidance rescale, 0..1, see beyond.fast.rescaled
    eta       how much of the ancestral noise DDIM adds, 0..1
    noise     () -> fresh noise like x, for samplers that add some
    known     the frames that are given, a beyond.frames.Known: put back after every step; None where there are none
    """
    timesteps = schedule.sampling_timesteps(steps, shift)
    sampler = SAMPLERS[sampler](schedule, timesteps, eta, noise or (lambda: torch.randn_like(x)))
    both, both_fps = torch.cat([negative, context]), None if fps is None else torch.cat([fps, fps])
    put = known.put if known else lambda x, t: x
    x = put(x, timesteps[0])
    for i, (t, following) in enumerate(zip(timesteps, [*timesteps[1:], None])):
        with torch.no_grad():
            now, scale = torch.full((len(x),), t, device=x.device), guidance(t) if callable(guidance) else guidance
            told = known.timesteps(now) if known else now
            if scale == 1:
                output = unet(x, told, context, fps, grid).to(x.dtype)
            else:
                output = unet(torch.cat([x, x]), torch.cat([told, told]), both, both_fps, grid).to(x.dtype)
                without, with_prompt = output.chunk(2)
                output = without + scale * (with_prompt - without)
                if rescale:
                    output = rescaled(output, with_prompt, rescale, ~known.cells if known else None)
            x0, eps = schedule.x0_and_eps(x, output, now)
            x = put(sampler.step(i, x, x0, eps), following)
        yield i, t, x, put(x0, None)


# ---------------------------------------------------------------------------------------------------------------------
# generate(): a request -> videos


@dataclass
class Request:
    """What a user asks for. What is None comes from the model's settings, see `resolve`."""

    prompt: tuple[str, ...] = option((), "what to show; several prompts make several videos", positional=True)
    negative: str = option("", "what to stay away from", metavar="TEXT")
    frames: int | None = option(None, "number of frames, 1 is an image (default: as trained)", low=1, high=10**6)
    size: tuple[int, int] | None = option(None, "width and height in pixels (default: as trained)", metavar="WxH",
                                          low=1, read=cli.read_size)
    fps: float | None = option(None, "frame rate to show, 1..60; 0: unrelated frames, 120: a still (default: the "
                               "model's)", low=0, high=120)
    steps: int | None = option(None, "sampling steps (default: the model's)", low=1, high=NoiseSchedule.timesteps)
    guidance: float | None = option(None, "guidance scale; 1 is none (default: the model's)")
    sampler: str | None = option(None, "how to step (default: the model's)", choices=tuple(SAMPLERS))
    eta: float | None = option(None, "noise that DDIM adds (default: the model's)", low=0, high=1)
    seed: int = option(0, "of the noise; the same seed gives the same video", low=-(2**63), high=2**64 - 1)
    prompts_at: dict = option({}, 'a prompt from each of some frames on, like "0: a red circle; 8: a blue circle"',
                              metavar="KEYS", read=read_keys)
    blend: bool = option(False, "between the frames of prompts_at, go from one prompt to the next in equal steps")
    overlap: int | None = option(None, "make a longer video in windows, which share so many frames", low=1)
    shift: float | None = option(None, "more than 1: more steps in more noise (default: the model's)", low=1, high=1000)
    guidance_interval: tuple[int, int] | None = option(None, "first and last timestep with guidance (default: the "
                                                       "model's)", metavar="LOW,HIGH", low=0, high=999)
    guidance_rescale: float | None = option(None, "0..1, against colors too strong (default: 0)", low=0, high=1)
    reuse: int | None = option(None, "steps that share the deep features of one (default: 1)", low=1)
    fast: bool = option(False, "sampler, steps and all else that the model is fast with, see docs/fast.md")
    known: dict = field(default_factory=dict)  # the frames that are given: number -> uint8 (H, W, 3)

    def __post_init__(self):
        if isinstance(self.prompt, str):
            self.prompt = (self.prompt,)

    @property
    def texts(self) -> list[str]:
        """All of them: of the videos, or of the frames of the one video."""
        return list(self.prompts_at.values()) if self.prompts_at else list(self.prompt)

    def check(self):
        """Raise ValueError on what no model can do: known before one is loaded."""
        cli.check(self)
        check_keys(self.prompts_at, self.prompt, self.blend, self.frames)
        if not self.texts or not all(prompt.strip() for prompt in self.texts):
            raise ValueError('prompt must be given and not be empty, like "a red circle moving right"')
        for text in filter(re.compile("[\ud800-\udfff]").search, (*self.texts, self.negative)):
            raise ValueError(f"prompt and negative must be text in UTF-8, got {text!r}")  # how Python keeps bytes

    def resolve(self, model: sd.Model) -> "Request":
        """The same with nothing left open. Raises ValueError on what the model cannot do, or memory cannot hold."""
        self.check()
        s, chosen = model.settings, fast_settings(model.settings.fast) if self.fast else {}
        sampler = self.sampler or chosen.get("sampler", s.sampler)
        steps = s.sampling_steps if sampler == s.sampler else SAMPLERS.get(sampler, DDIM).steps
        defaults = {"frames": s.frames, "size": (s.width, s.height), "fps": float(s.fps), "steps": steps, "reuse": 1,
                    "sampler": sampler, "shift": s.sampling_shift, "guidance": s.guidance, "guidance_rescale": 0.0,
                    "guidance_interval": s.guidance_interval, "eta": s.eta if sampler == "ddim" else 0.0} | chosen
        whole = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        whole.check()
        check_sampling(whole.sampler, whole.eta, whole.guidance_interval)
        whole.timesteps(model)  # raises where steps and shift do not go together
        length = whole.window(model)
        model.check_size(*whole.size, length)
        check_known(whole.known, whole.frames, whole.size, only_first=model.unet.layout.goes_on)
        check_memory(model, length, *whole.size, batch=1 if whole.guidance == 1 else 2)
        return whole

    def window(self, model: sd.Model) -> int:
        """How many frames of a resolved request are sampled at once, see beyond.frames.window_length."""
        return window_length(self.frames, self.overlap, model.settings.frames, model.unet.layout.goes_on)

    def timesteps(self, model: sd.Model) -> list[int]:
        """The timesteps of a resolved request, noisiest first."""
        return NoiseSchedule(model.settings).sampling_timesteps(self.steps, self.shift)

    def guidance_at(self, t: int) -> float:
        """Guidance scale of a resolved request at a timestep."""
        return self.guidance if self.guidance_interval[0] <= t <= self.guidance_interval[1] else 1.0

    def windows(self, model: sd.Model) -> list[range]:
        """The frames that are sampled together, of a resolved request."""
        length = self.window(model)
        return windows(self.frames, length, self.overlap if length > 1 and self.overlap else 0, self.known)


def generate(model: sd.Model, request: Request, **how) -> np.ndarray:
    """Videos of a request, one a prompt -> uint8 (B, T, H, W, 3). See `stream` for what else it takes and raises."""
    return np.concatenate(list(stream(model, request, **how)), axis=1)


def stream(model: sd.Model, request: Request, *, seeds=None, progress=None, device=None):
    """Yield the videos of a request in parts uint8 (B, n, H, W, 3), each as soon as its frames are finished.

    seeds     one for each prompt (default: the request's for all); a video depends on its own and on no other
    progress  called as progress(i, t, x_t, x_0) after each step
    device    where to work (default: where the UNet is); a network that is elsewhere is there only while it works

    One frame is an image: plain Stable Diffusion, no grid and no FPS. Raises ValueError on what the model cannot
    do, NotFinite where NaN or infinity comes of it.
    """
    request, unet, factor, s = request.resolve(model), model.unet, model.vae.cfg.downsampling, model.settings
    device, count = device or unet.out[2].weight.device, len(request.prompt) or 1
    length, schedule = request.window(model), NoiseSchedule(s)
    rows, cols = grid = grid_shape(length)
    shape = length, unet.cfg.latent_channels, request.size[1] // factor, request.size[0] // factor
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [request.seed] * count]

    def noise():
        # drawn on the CPU, one generator a video: the same on every device and in every batch
        video = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return fold(video, rows, cols).to(device)

    with at_work(model.text, device):
        contexts = model.text.encode([*request.texts, request.negative])
    contexts, negative, clip, shown = contexts[:-1], contexts[-1], {}, 0  # clip: latents (B, C, h, w) by frame
    if request.known:
        with at_work(model.vae, device):
            latents = encode(model, np.stack(list(request.known.values())))
        clip = {n: latent.expand(count, *shape[1:]).to(device) for n, latent in zip(request.known, latents)}
    fps, laid = (torch.full((count,), request.fps, device=device), grid) if request.frames > 1 else (None, None)

    def context_of(frames: range):
        """(B, L, D), or one a frame (B, T, L, D)."""
        keys = list(request.prompts_at)
        each = contexts_at(frames, keys, contexts, request.blend) if keys else contexts
        return each[None] if keys and length > 1 else each

    def note(n: int):
        """Tell `past` a finished frame, for both halves of guidance as `denoise` has them."""
        context = context_of(range(n, n + 1))
        past.add(torch.cat([clip[n]] * 2), torch.cat([negative.expand_as(context), context]), torch.cat([fps] * 2))

    def finished(end: int):
        """Pixels of the frames [shown, end). Latents are kept as long as another window may begin with them."""
        frames = torch.stack([clip[n] for n in range(shown, end)], 1)
        for n in filter(lambda n: n < end - length, list(clip)):
            del clip[n]
        with at_work(model.vae, device):
            return decode(model, frames)

    how = dict(steps=request.steps, shift=request.shift, guidance=request.guidance_at, rescale=request.guidance_rescale,
               sampler=request.sampler, eta=request.eta, noise=noise)
    past = unet.layout.past(unet) if length < request.frames and unet.layout.goes_on else None
    denoiser = Reuse(unet, request.timesteps(model), request.reuse, past) if request.reuse > 1 else past or unet
    for window in request.windows(model):
        with at_work(unet, device):
            for n in range(shown, window.start) if past else ():
                note(n)
            x, context, known = noise(), context_of(window), None
            if any(n in clip for n in window):
                replaced = () if s.given_trained else (schedule, noise())
                known = Known([clip.get(n) for n in window], grid, *replaced)
            run = denoise(denoiser, schedule, x, context, negative.expand_as(context), fps, laid, known=known, **how)
            for i, t, x, x0 in run:
                require_finite(x, f"the UNet's output at timestep {t}", model)
                if progress:
                    progress(i, t, x, x0)
            clip |= zip(window, unfold(x, rows, cols).unbind(1))
            if past:
                note(window.start)
        yield finished(window.stop)
        shown = window.stop
    if shown < request.frames:  # the last frames were all given
        yield finished(request.frames)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

SHIPPED = os.path.join(cli.ROOT, "weights", "tiny.safetensors")


@dataclass
class Options(Given, Request):
    """A request, and what else the command line takes."""


def prepare(options: Options, model: sd.Model, device) -> Request:
    """What options and their files ask of a model, resolved. A fast one may change its layout. Raises ValueError."""
    asked = {f.name: getattr(options, f.name) for f in fields(Request)} | options.read_files(model.settings)
    request = Request(**asked).resolve(model)
    if request.fast and pooling_pays(model, request.size, device):
        model.use_layout("pooled")
    return request


@shared(awaited="paths")
def main(ranks: Ranks):
    options = cli.parse(Options, __doc__)
    if options.like:
        options = cli.parse(Options, __doc__, **settings_like(options, SHIPPED))
    options.prompt += read_prompts(options.prompts) if options.prompts else ()
    replace(options, seed=options.seed + options.num - 1).check()
    options.check_files()
    names = [(prompt, options.seed + n) for prompt in options.prompt or options.texts[:1] for n in range(options.num)]
    with ranks.on_rank_0(claim_outputs(options.out, names, options.frames == 1)):  # now, not after a model is loaded
        pass
    model, device, dtype = load_model(options, SHIPPED)
    request = prepare(options, model, device)
    if request.fast:
        chosen = (f"{name} {getattr(request, name)}," for name in FAST)
        print("fast:", *chosen, "layout", model.settings.layout, file=sys.stderr)
    for text in model.unseen(request) + model.cut_off(request):
        cli.warn(text)
    print(f"{str(dtype).removeprefix('torch.')} on {device}", file=sys.stderr)
    told = settings_of(request, options, model.settings.layout, SHIPPED)
    steps = len(ranks.share(names)) * request.steps * len(request.windows(model))
    with (ranks.held("paths", claim_outputs(options.out, names, request.frames == 1)) as paths,
          tqdm(total=steps, unit="step", desc="sample", file=sys.stderr) as bar):
        for (prompt, seed), path in ranks.share(zip(names, paths)):
            one = replace(request, prompt=(prompt,) if request.prompt else (), seed=seed)
            made = Kept(stream(model, one, progress=lambda *_: bar.update(), device=device))
            write_video(path, made, playback_fps(request.fps), told | {"prompt": "".join(one.prompt), "seed": seed})
            made.tell(path)
    print(*[options.out] if is_gallery(options.out) else paths, sep="\n")


if __name__ == "__main__":
    cli.run(main)
