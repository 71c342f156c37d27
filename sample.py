"""From a prompt to a video: the noise schedule, the samplers, generate(), and the command line.

    python sample.py "a red circle moving right"
"""

import io
import os
import re
import sys
from dataclasses import dataclass, fields, replace

import torch
from tqdm import tqdm

import cli
import sd
from cli import option
from clips.write import claim_paths, playback_fps, write_video
from grid import fold, grid_shape, unfold
from sd.device import DTYPES, at_work, check_memory, has_room, pick_device, pick_dtype, require_finite
from sd.settings import LAYOUTS
from sd.vae import decode

# ---------------------------------------------------------------------------------------------------------------------
# Noise schedule


class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, 1 - ᾱ_t), with Stable Diffusion's betas: linear in sqrt(beta).

    `zero_snr` shifts and scales sqrt(ᾱ) so that the last timestep is pure noise (Lin et al. 2023, Algorithm 1): only
    then does a sampler, which starts from pure noise, start from what the model was trained on.

    Raises ValueError on settings that are unknown, or do not go together.
    """

    timesteps = 1000

    def __init__(self, settings: sd.Settings):
        settings.check()
        self.alphas_cumprod = settings.alphas_cumprod  # (1000,)
        self.prediction, self.spacing = settings.prediction, settings.spacing

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

    def sampling_timesteps(self, steps: int) -> list[int]:
        """The timesteps of a sampler with `steps` steps, noisiest first.

        "leading" with offset 1 is what published Stable Diffusion pipelines do; it never visits the last timestep.
        "trailing" starts at the last one, as a zero-SNR schedule needs. Raises ValueError outside 1..1000 steps.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must be in 1..{self.timesteps}, got {steps}")
        if self.spacing == "leading":
            return [min(i * (self.timesteps // steps) + 1, self.timesteps - 1) for i in reversed(range(steps))]
        return [round(self.timesteps * (i + 1) / steps) - 1 for i in reversed(range(steps))]


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: one step from x_t to the x of the next, less noisy timestep. A new one is a class and a line in SAMPLERS.


class DDIM:
    """DDIM (Song et al. 2021, Equation 12). It ends at ᾱ_0, as published pipelines do.

    eta    how much of the ancestral noise it adds, 0..1: 0 is deterministic, 1 is ancestral
    noise  () -> fresh noise like x
    """

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

    def __init__(self, schedule: NoiseSchedule, timesteps: list[int], eta: float, noise):
        self.alphas, self.noise = torch.cat([schedule.alphas_cumprod[timesteps], torch.ones(1)]), noise

    def step(self, i: int, x, x0, eps):
        a, a_next = self.alphas[i], self.alphas[i + 1]
        alpha = a / a_next
        mean = (a_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_next) * x) / (1 - a)
        variance = (1 - a_next) / (1 - a) * (1 - alpha)
        return mean + variance.sqrt() * self.noise() if variance > 0 else mean


SAMPLERS = {"ddim": DDIM, "ddpm": DDPM}


def denoise(unet, schedule, x, context, negative, fps=None, grid=None, *, steps=50, guidance=7.0,
            sampler="ddim", eta=0.0, noise=None):
    """Sample: a generator that yields (i, t, x_t, predicted x_0) after every step; the last x_t is the sample.

        for i, t in enumerate(timesteps):                                     # noisiest first
            without, with_prompt = unet(x, t, negative), unet(x, t, context)
            x0, eps = schedule.x0_and_eps(x, without + guidance * (with_prompt - without), t)
            x = sampler.step(i, x, x0, eps)

    unet      called as unet(x, t, context, fps, grid)
    x         (B, 4, H, W) pure noise, frames folded into a grid image
    context   (B, L, D) of the prompts, `negative` of what to stay away from ("" usually)
    fps       (B,) or None; both halves of guidance get it
    guidance  ε = ε(negative) + guidance * (ε(prompt) - ε(negative)); a number, or a function of the timestep that
              gives one. Where it is 1 there is no guidance, and a step costs half
    eta       how much of the ancestral noise DDIM adds, 0..1; else ValueError
    noise     () -> fresh noise like x, for samplers that add some
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in 0..1, got {eta:g}")
    timesteps = schedule.sampling_timesteps(steps)
    sampler = SAMPLERS[sampler](schedule, timesteps, eta, noise or (lambda: torch.randn_like(x)))
    both, both_fps = torch.cat([negative, context]), None if fps is None else torch.cat([fps, fps])
    for i, t in enumerate(timesteps):
        with torch.no_grad():
            now, scale = torch.full((len(x),), t, device=x.device), guidance(t) if callable(guidance) else guidance
            if scale == 1:
                output = unet(x, now, context, fps, grid).to(x.dtype)
            else:
                output = unet(torch.cat([x, x]), now.repeat(2), both, both_fps, grid).to(x.dtype)
                without, with_prompt = output.chunk(2)
                output = without + scale * (with_prompt - without)
            x0, eps = schedule.x0_and_eps(x, output, now)
            x = sampler.step(i, x, x0, eps)
        yield i, t, x, x0


# ---------------------------------------------------------------------------------------------------------------------
# generate(): a request -> videos


@dataclass
class Request:
    """What a user asks for. What is None comes from the model's settings, see `resolve`."""

    prompt: tuple[str, ...] = option((), "what to show; several prompts make several videos", positional=True)
    negative: str = option("", "what to stay away from", metavar="TEXT")
    frames: int | None = option(None, "number of frames, 1 is an image (default: as trained)", low=1)
    size: tuple[int, int] | None = option(None, "width and height in pixels (default: as trained)", metavar="WxH",
                                          read=cli.read_size)
    fps: float | None = option(None, "frame rate to show, 1..60; 0: unrelated frames, 120: a still (default: the "
                               "model's)", low=0, high=120)
    steps: int | None = option(None, "sampling steps (default: the model's)", low=1, high=NoiseSchedule.timesteps)
    guidance: float | None = option(None, "guidance scale; 1 is none (default: the model's)")
    sampler: str = option("ddim", "how to step", choices=tuple(SAMPLERS))
    eta: float | None = option(None, "noise that DDIM adds (default: the model's)", low=0, high=1)
    seed: int = option(0, "of the noise; the same seed gives the same video", low=-(2**63), high=2**64 - 1)

    def __post_init__(self):
        if isinstance(self.prompt, str):
            self.prompt = (self.prompt,)

    def check(self):
        """Raise ValueError, in terms of the fields, on what no model can do: known before one is loaded."""
        cli.check(self)
        if not self.prompt or not all(prompt.strip() for prompt in self.prompt):
            raise ValueError('prompt must be given and not be empty, like "a red circle moving right"')
        for text in (*self.prompt, self.negative):
            if re.search("[\ud800-\udfff]", text):  # how Python keeps bytes of a command line that are no text
                raise ValueError(f"prompt and negative must be text in UTF-8, got {text!r}")
        grid_shape(self.frames or 1)

    def resolve(self, model: sd.Model) -> "Request":
        """The same with nothing left open.

        Raises ValueError, in terms of the fields, on what the model cannot do, or this machine's memory cannot hold.
        """
        s = model.settings
        defaults = {"frames": s.frames, "size": (s.width, s.height), "fps": float(s.fps), "steps": s.sampling_steps,
                    "guidance": s.guidance, "eta": s.eta}
        whole = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        whole.check()
        model.check_size(*whole.size, whole.frames)
        check_memory(model, whole.at_once(model), *whole.size, batch=1 if whole.guidance == 1 else 2)
        return whole

    def at_once(self, model: sd.Model) -> int:
        """How many frames of a resolved request are sampled at once: all, or one after the other where the layout can
        go on from those before, and the model was trained on fewer."""
        return 1 if model.unet.layout.goes_on and self.frames > model.settings.frames else self.frames

    def unseen(self, model: sd.Model) -> list[str]:
        """What the model was never trained on, in a sentence each, of a resolved request."""
        s, trained = model.settings, ", ".join(f"{fps:g}" for fps in model.settings.fps_trained)
        if self.frames == 1:
            return ["one frame is made without grid and FPS, as by the model that this one was trained from"
                    ] * s.grid_trained
        if not s.grid_trained:
            motion = ", or give it motion modules with --motion" * (s.layout == "temporal")
            return ["this model's layers over time were never trained: expect unrelated pictures, not a video (train "
                    f"it with train.py{motion})" if model.unet.layout.per_frame else
                    "this model never saw a grid of frames: expect a collage, not a video (train it with train.py)"]
        told = []
        if not s.fps_trained:  # motion modules that others trained, with no frame rate told and on any base
            return told
        if self.fps not in s.fps_trained:
            told.append(f"this model never saw {self.fps:g} FPS; it was trained at {trained}")
        if (self.frames, *self.size) != (s.frames, s.width, s.height):
            told.append(f"this model was trained on {s.frames} frames of {s.width}x{s.height}, "
                        f"not {self.frames} of {self.size[0]}x{self.size[1]}")
        return told


def generate(model: sd.Model, request: Request, *, seeds=None, progress=None, device=None):
    """Videos of a request, one a prompt -> uint8 (B, T, H, W, 3).

    seeds     one for each prompt (default: the request's for all); a video depends on its own and on no other
    progress  called as progress(i, t, x_t, x_0) after each step
    device    where to work (default: where the UNet is); a network that is elsewhere is there only while it works

    One frame is an image: plain Stable Diffusion, no grid and no FPS. Raises ValueError on what the model cannot
    do, NotFinite where NaN or infinity comes of it.
    """
    request, unet, factor = request.resolve(model), model.unet, model.vae.cfg.downsampling
    device, count = device or unet.out[2].weight.device, len(request.prompt)
    together = request.at_once(model)
    rows, cols = grid = grid_shape(together)
    shape = together, unet.cfg.latent_channels, request.size[1] // factor, request.size[0] // factor
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [request.seed] * count]

    def noise():
        # drawn on the CPU, one generator a video: the same on every device and in every batch
        video = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return fold(video, rows, cols).to(device)

    with at_work(model.text, device):
        context = model.text.encode([*request.prompt, request.negative])
    context, negative = context[:-1], context[-1:].expand(count, -1, -1)
    video = request.frames > 1
    fps = torch.full((count,), request.fps, device=device) if video else None
    how = dict(steps=request.steps, guidance=request.guidance, sampler=request.sampler, eta=request.eta, noise=noise)
    past = unet.layout.past(unet) if together < request.frames else None
    schedule, latents = NoiseSchedule(model.settings), []
    with at_work(unet, device):
        while len(latents) * together < request.frames:
            run = denoise(past or unet, schedule, noise(), context, negative, fps, grid if video else None, **how)
            for i, t, x, x0 in run:
                require_finite(x, f"the UNet's output at timestep {t}", model)
                if progress:
                    progress(i, t, x, x0)
            latents.append(unfold(x, rows, cols))
            if past:  # both halves of guidance, as `denoise` takes them
                past.add(*(torch.cat(halves) for halves in ((x, x), (negative, context), (fps, fps))))
    with at_work(model.vae, device):
        return decode(model, torch.cat(latents, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Command line

SHIPPED = os.path.join(cli.ROOT, "weights", "tiny.safetensors")
MOST = 100_000  # videos of a call: their names are all claimed before the first


@dataclass
class Options(Request):
    prompts: str = option("", "more prompts, one a line", metavar="FILE")
    num: int = option(1, "videos a prompt, with seeds S, S+1, ...", low=1)
    ckpt: str = option("", "model: a file, a diffusers folder or a repository (default: the tiny one that ships)")
    prediction: str = option("", "what the UNet predicts, if the file is silent", choices=("", "epsilon", "v"))
    layout: str = option("", "how the tokens of a clip meet (default: as in the file)", choices=("", *LAYOUTS))
    motion: str = option("", "AnimateDiff's motion modules for a Stable Diffusion 1.x: a file, a diffusers folder or a "
                         "repository", metavar="FILE")
    lora: tuple[str, ...] = option((), "a LoRA to add to the weights, and how much of it; may be given several times",
                                   repeat=True, metavar="FILE[:SCALE]")
    out: str = option("out/", "a .mp4, .gif or .png (contact sheet) file, numbered when there are several videos, or a "
                      "folder", metavar="PATH")
    device: str = option("", "cuda, mps or cpu (default: the first of them that is there)")
    dtype: str = option("auto", "precision; auto is float16 on cuda, bfloat16 on a CPU with units for it, else float32",
                        choices=DTYPES)


def read_prompts(path: str) -> tuple[str, ...]:
    """The prompts of a file, one a line. Raises OSError or ValueError when it cannot be read, or holds none."""
    if not os.path.exists(path):
        raise ValueError(f"prompts must be a file with a prompt a line, got {path!r}, which is not there; a prompt "
                         "itself stands without --prompts")
    found = tuple(line.strip() for line in io.StringIO(cli.read_text(path), None) if line.strip())
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def read_lora(text: str) -> tuple[str, float]:
    """ "FILE" or "FILE:SCALE" -> (file, scale); 1 where there is none."""
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", text)
    return (match[1], float(match[2])) if match and not os.path.exists(text) else (text, 1.0)


def main():
    options = cli.parse(Options, __doc__)
    if options.prompts:
        options.prompt += read_prompts(options.prompts)
    if len(options.prompt) * options.num > MOST:
        raise ValueError(f"num must make at most {MOST:,} videos of all prompts together, got {options.num:,} of "
                         f"{len(options.prompt):,}")
    replace(options, seed=options.seed + options.num - 1).check()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    videos = [(prompt, options.seed + n) for prompt in options.prompt for n in range(options.num)]
    with claim_paths(options.out, videos, options.frames == 1):  # now, not after a model is loaded
        pass
    model = sd.load(options.ckpt or SHIPPED, "cpu", dtype, options.prediction or None,
                    layout=options.layout or None, motion=options.motion or None, lora=map(read_lora, options.lora))
    if has_room(device, model.parts().values()):
        model.to(device)
    options = options.resolve(model)
    for text in options.unseen(model):
        cli.warn(text)
    for cut in filter(None, model.text.tokenize([*options.prompt, options.negative])[1]):
        cli.warn(f"the prompt is longer than the text tower reads; cut off: {cut[:200]!r}{' ...' * (len(cut) > 200)}")
    print(f"{str(dtype).removeprefix('torch.')} on {device}", file=sys.stderr)
    name = os.path.basename(options.ckpt or SHIPPED) if os.path.exists(options.ckpt or SHIPPED) else options.ckpt
    told = {f.name: getattr(options, f.name) for f in fields(Request)} | {"ckpt": name}  # and no path of this machine
    told |= {key: model.settings.origin[key] for key in ("motion", "lora") if key in model.settings.origin}
    steps = len(videos) * options.steps * (options.frames // options.at_once(model))
    with (claim_paths(options.out, videos, options.frames == 1) as paths,
          tqdm(total=steps, unit="step", desc="sample", file=sys.stderr) as bar):
        for (prompt, seed), path in zip(videos, paths):
            request = replace(options, prompt=(prompt,), seed=seed)
            video = generate(model, request, progress=lambda *_: bar.update(), device=device)[0]
            write_video(path, video, playback_fps(options.fps), told | {"prompt": prompt, "seed": seed})
    print(*paths, sep="\n")


if __name__ == "__main__":
    cli.run(main)
