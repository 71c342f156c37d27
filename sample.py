"""From a prompt to a video: the noise schedule, the samplers, generate(), and the command line.

    python sample.py "a red circle moving right"
"""

import argparse
import itertools
import os
import re
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from clips.media import WRITERS, playback_fps, write_video
from grid import fold, grid_shape, unfold
from model import split_heads
from sd.checkpoint import Model, Parser, Settings, UserError, command_line, load, number_from, parse_size

# ---------------------------------------------------------------------------------------------------------------------
# Noise schedule


class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, 1 - ᾱ_t), with Stable Diffusion's betas: linear in sqrt(beta).

    `zero_snr` shifts and scales sqrt(ᾱ) so that the last timestep is pure noise (Lin et al. 2023, Algorithm 1): only
    then does a sampler, which starts from pure noise, start from what the model was trained on.
    """

    timesteps = 1000

    def __init__(self, settings: Settings):
        if settings.zero_snr and settings.prediction != "v":
            raise UserError('zero_snr needs prediction "v": at pure noise, ε says nothing of x_0')
        if settings.prediction not in ("epsilon", "v") or settings.spacing not in ("leading", "trailing"):
            raise UserError(f'prediction is "epsilon" or "v", spacing "leading" or "trailing", not {settings}')
        first, last = settings.beta_start**0.5, settings.beta_end**0.5
        betas = torch.linspace(first, last, self.timesteps, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0).sqrt()  # sqrt(ᾱ)
        if settings.zero_snr:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        self.alphas_cumprod = (signal**2).float()  # (1000,)
        self.prediction, self.spacing = settings.prediction, settings.spacing

    def signal_and_noise(self, t, like):
        """sqrt(ᾱ_t) and sqrt(1 - ᾱ_t) for t (B,), shaped to multiply `like` (B, ...)."""
        a = self.alphas_cumprod.to(like.device)[t].view(-1, *[1] * (like.ndim - 1))
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0, eps, t):
        """x_t for clean x0, noise eps and timesteps t (B,)."""
        signal, noise = self.signal_and_noise(t, x0)
        return signal * x0 + noise * eps

    def target(self, x0, eps, t):
        """What the UNet is trained to predict: ε, or v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0."""
        if self.prediction == "epsilon":
            return eps
        signal, noise = self.signal_and_noise(t, x0)
        return signal * eps - noise * x0

    def x0_and_eps(self, x, output, t):
        """Turn the UNet's output at x_t around: the (x_0, ε) that it stands for."""
        signal, noise = self.signal_and_noise(t, x)
        if self.prediction == "epsilon":
            return (x - noise * output) / signal, output
        return signal * x - noise * output, signal * output + noise * x

    def sampling_timesteps(self, steps: int) -> list[int]:
        """The timesteps of a sampler with `steps` steps, noisiest first.

        "leading" with offset 1 is what published Stable Diffusion pipelines do; it never visits the last timestep.
        "trailing" starts at the last one, as a zero-SNR schedule needs. Raises UserError outside 1..1000 steps.
        """
        if not 1 <= steps <= self.timesteps:
            raise UserError(f"--steps must be in 1..{self.timesteps}, not {steps}")
        if self.spacing == "leading":
            return [min(i * (self.timesteps // steps) + 1, self.timesteps - 1) for i in reversed(range(steps))]
        return [round(self.timesteps * (i + 1) / steps) - 1 for i in reversed(range(steps))]


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: one step from x_t to the x of the next, less noisy timestep


def ddim_step(x, x0, eps, a, a_next, eta: float, noise):
    """DDIM (Song et al. 2021, Equation 12). a, a_next: ᾱ now and next; eta 0 is deterministic, 1 is ancestral."""
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
    x = a_next.sqrt() * x0 + (1 - a_next - sigma**2).clamp(min=0).sqrt() * eps
    return x + sigma * noise() if eta > 0 else x


def ddpm_step(x, x0, eps, a, a_next, eta: float, noise):
    """Ancestral DDPM on the respaced schedule (Ho et al. 2020, Equations 6-7), variance `fixed_small`."""
    alpha = a / a_next
    mean = (a_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_next) * x) / (1 - a)
    variance = (1 - a_next) / (1 - a) * (1 - alpha)
    return mean + variance.sqrt() * noise() if variance > 0 else mean


SAMPLERS = {"ddim": ddim_step, "ddpm": ddpm_step}


def denoise(unet, schedule, x, context, negative, fps=None, grid=None, *, steps=50, guidance=7.0,
            sampler="ddim", eta=0.0, noise=None):
    """Sample: a generator that yields (i, t, x_t, predicted x_0) after every step; the last x_t is the sample.

    unet      called as unet(x, t, context, fps, grid)
    x         (B, 4, H, W) pure noise, frames folded into a grid image
    context   (B, L, D) of the prompts, `negative` of what to stay away from ("" usually)
    fps       (B,) or None; both halves of guidance get it
    guidance  ε = ε(negative) + guidance * (ε(prompt) - ε(negative)); 1 is no guidance, and costs half
    eta       how much of ancestral noise DDIM adds, 0..1; else UserError
    noise     () -> fresh noise like x, for samplers that add some
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta lies in 0..1, not {eta:g}")
    step = SAMPLERS[sampler]
    noise = noise or (lambda: torch.randn_like(x))
    timesteps = schedule.sampling_timesteps(steps)
    guided = guidance != 1
    with torch.no_grad():
        context = unet.encode_context(torch.cat([negative, context]) if guided else context)
    if guided and fps is not None:
        fps = torch.cat([fps, fps])
    last = schedule.alphas_cumprod[0] if sampler == "ddim" else torch.ones(())  # as published pipelines end
    for i, t in enumerate(timesteps):
        with torch.no_grad():
            now = torch.full((len(x),), t, device=x.device)
            double = torch.cat([x, x]) if guided else x
            output = unet(double, now.repeat(2) if guided else now, context, fps, grid).to(x.dtype)
            if guided:
                without, with_prompt = output.chunk(2)
                output = without + guidance * (with_prompt - without)
            x0, eps = schedule.x0_and_eps(x, output, now)
            a = schedule.alphas_cumprod[t]
            a_next = schedule.alphas_cumprod[timesteps[i + 1]] if i + 1 < len(timesteps) else last
            x = step(x, x0, eps, a, a_next, eta, noise)
        yield i, t, x, x0


# ---------------------------------------------------------------------------------------------------------------------
# generate(): prompts -> videos


def generate(model: Model, prompts, *, frames=None, size=None, fps=None, steps=50, guidance=None, sampler="ddim",
             eta=None, seeds=None, negative="", progress=None, device=None):
    """Videos of the prompts -> uint8 (B, T, H, W, 3). What is None comes from the model's settings.

    size   (width, height) in pixels
    seeds  one for each prompt (default: all 0); the video of a prompt depends on its seed and on no other in the batch
    progress  called as progress(i, t, x_t, x_0) after each step
    device  where to work (default: where the UNet is); a network that is elsewhere is there only while it works

    One frame is an image: plain Stable Diffusion, no grid and no FPS.
    """
    settings, unet = model.settings, model.unet
    frames = frames or settings.frames
    width, height = size or (settings.width, settings.height)
    device, dtype = device or unet.out[2].weight.device, torch.float32
    rows, cols = grid_shape(frames)
    h, w = height // model.vae.cfg.downsampling, width // model.vae.cfg.downsampling
    generators = [torch.Generator().manual_seed(s) for s in (seeds or [0] * len(prompts))]

    def noise():
        # drawn on the CPU, one generator a video: the same on every device and in every batch
        video = torch.stack([torch.randn(frames, unet.cfg.latent_channels, h, w, generator=g) for g in generators])
        return fold(video, rows, cols).to(device, dtype)

    with torch.no_grad(), at_work(model.text, device):
        context = model.text(model.text.tokenize([*prompts, negative])[0].to(device))
        context, without = context[:-1], context[-1:].expand(len(prompts), -1, -1)
    video = frames > 1
    condition = torch.full((len(prompts),), float(settings.fps if fps is None else fps), device=device)
    run = denoise(unet, NoiseSchedule(settings), noise(), context, without, condition if video else None,
                  (rows, cols) if video else None, steps=steps, sampler=sampler, noise=noise,
                  guidance=settings.guidance if guidance is None else guidance,
                  eta=settings.eta if eta is None else eta)
    with at_work(unet, device):
        for i, t, x, x0 in run:
            if progress:
                progress(i, t, x, x0)
    with at_work(model.vae, device):
        return decode(model, unfold(x, rows, cols))


@contextmanager
def at_work(network, device):
    """The network on the device meanwhile. What was elsewhere stays there too, so nothing has to be copied back."""
    home = [(tensors, name, tensor) for module in network.modules() for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items() if tensor is not None and tensor.device != torch.device(device)]
    for tensors, name, tensor in home:
        tensors[name] = tensor.detach().to(device)
    try:
        yield
    finally:
        for tensors, name, tensor in home:
            tensors[name] = tensor


def decode(model: Model, latents, chunk=16):
    """Scaled latents (B, T, 4, h, w) -> uint8 (B, T, H, W, 3), a few frames at a time to be light on memory."""
    B, T = latents.shape[:2]
    weight = model.vae.post_quant_conv.weight
    flat = (latents.flatten(0, 1) / model.settings.latent_scale).to(weight.device, weight.dtype)
    with torch.no_grad():
        images = torch.cat([to_uint8(model.vae.decode(part)) for part in flat.split(chunk)])
    return images.unflatten(0, (B, T)).cpu().numpy()


def to_uint8(images):
    """(N, 3, H, W) in -1..1 -> uint8 (N, H, W, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Who looks at whom (Figure 11)


class AttentionMaps:
    """Meanwhile `maps` gets, at each step, how the middle block of a UNet spreads its attention over the frames:
    (heads, T, T), from frame i to frame j in reading order of Equation 1; rows add up to 1. Of the last video of a
    batch, with its prompt."""

    def __init__(self, unet, frames: int):
        self.unet, self.rows, self.cols, self.maps = unet, *grid_shape(frames), []

    def __enter__(self):
        attention = self.unet.middle_block[1].transformer_blocks[0].attn1
        self.hooks = [self.unet.middle_block.register_forward_pre_hook(self.enter_block),
                      attention.register_forward_pre_hook(self.enter_attention)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def enter_block(self, block, inputs):
        """Which frame each token belongs to, by its middle: tokens may straddle frames."""
        H, W = inputs[0].shape[-2:]
        row = ((torch.arange(H) + 0.5) * self.rows / H).long()
        col = ((torch.arange(W) + 0.5) * self.cols / W).long()
        frame = (row[:, None] + col * self.rows).flatten()
        self.member = F.one_hot(frame, self.rows * self.cols).float().to(inputs[0].device)  # (L, T)

    def enter_attention(self, attention, inputs):
        x, (k, v) = inputs
        q, k = split_heads(attention.to_q(x[-1:]), attention.heads)[0].float(), k[-1].float()  # (heads, L, d)
        scores = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        tokens = self.member.sum(0)[:, None].clamp(min=1)  # a small frame may have none
        self.maps.append((self.member.T @ scores @ self.member / tokens).cpu())

    def write(self, path: str, timesteps: list[int], shown=7, gap=12):
        """A picture: `shown` of the steps from top to bottom, heads from left to right; the brighter, the more."""
        chosen = np.linspace(0, len(self.maps) - 1, min(shown, len(self.maps))).round().astype(int)
        heads, T, _ = self.maps[0].shape
        cell = max(1, 96 // T)  # pixels
        side, left = T * cell, 60
        picture = Image.new("RGB", (left + heads * (side + gap), gap + len(chosen) * (side + gap)), "white")
        draw = ImageDraw.Draw(picture)
        for head in range(heads):
            draw.text((left + head * (side + gap), 0), f"head {head}", fill="black")
        for n, i in enumerate(chosen):
            top = gap + n * (side + gap)
            draw.text((2, top), f"t = {timesteps[i]}", fill="black")
            for head, values in enumerate(self.maps[i] / self.maps[i].amax(dim=(1, 2), keepdim=True)):
                levels = (values * 255).round().byte().numpy().repeat(cell, 0).repeat(cell, 1)
                picture.paste(Image.fromarray(levels), (left + head * (side + gap), top))
        picture.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "tiny.safetensors")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Make videos of prompts.")
    parser.add_argument("prompt", nargs="*", help="what to show; several prompts make several videos")
    parser.add_argument("--prompts", metavar="FILE", help="more prompts, one a line")
    parser.add_argument("--num", type=number_from(1), default=1,
                        help="videos a prompt, with seeds S, S+1, ... (default 1)")
    parser.add_argument("--ckpt", default=SHIPPED, help="model file (default: the tiny model that ships)")
    parser.add_argument("--prediction", choices=("epsilon", "v"), help="what the UNet predicts, if the file is silent")
    parser.add_argument("--frames", type=int, metavar="T", help="frames; 1 is an image (default: as trained)")
    parser.add_argument("--size", metavar="WxH", help="width x height in pixels (default: as trained)")
    parser.add_argument("--fps", type=number_from(0, 120, float), help="frame rate to show, 1..60; 0: unrelated "
                        "frames, 120: a still (default: the model's)")
    parser.add_argument("--steps", type=number_from(1, NoiseSchedule.timesteps), default=50,
                        help="sampling steps (default 50)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the model's)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    parser.add_argument("--eta", type=number_from(0, 1, float),
                        help="noise that DDIM adds, 0..1 (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to stay away from")
    parser.add_argument("--out", metavar="PATH", help="a .mp4, .gif or .png (contact sheet) file, numbered when there "
                        "are several videos, or a folder (default: out/)")
    parser.add_argument("--attention_map", metavar="F.png", help="a picture of how frames attend to each other in the "
                        "middle block, by head and step (of one video)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on cuda, else float32")
    return parser.parse_args()


def read_prompts(args) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts:
        try:
            with open(args.prompts, encoding="utf-8") as file:
                prompts += [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {args.prompts} cannot be read: {error}") from error
    if not prompts:
        raise UserError('a prompt is needed, like: python sample.py "a red circle moving right"')
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty")
    return prompts


def pick_device(name: str | None) -> torch.device:
    """Of its name, like "cuda:1"; None takes the first of cuda, mps, cpu that is there. Raises UserError."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    name = name or next(device for device, count in there.items() if count)
    kind, _, number = name.partition(":")
    if not re.fullmatch(r"\d*", number) or int(number or 0) >= there.get(kind, 0):
        raise UserError(f"--device {name} is not here: choose one of {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def has_room(device, model: Model) -> bool:
    """Whether all networks can be there at once and leave half of what is free on a GPU to the work itself."""
    weights = sum(p.numel() * p.element_size() for part in model.parts().values() for p in part.parameters())
    return device.type != "cuda" or weights < torch.cuda.mem_get_info(device)[0] / 2


def check_request(args, model: Model):
    """Refuse what cannot be sampled, warn of what the model was never trained on."""
    settings, frames = model.settings, args.frames
    check_frames(frames)
    check_size(args.size, frames, model)
    if frames == 1:
        if settings.grid_trained:
            warn("one frame is made without grid and FPS, as by the model that this one was trained from")
        return
    trained = ", ".join(f"{fps:g}" for fps in settings.fps_trained)
    if not settings.grid_trained:
        warn("this model never saw a grid of frames: expect a collage, not a video (train it with train.py first)")
    elif args.fps not in settings.fps_trained:
        warn(f"this model never saw {args.fps:g} FPS; it was trained at {trained}")
    if settings.grid_trained and (frames, *args.size) != (settings.frames, settings.width, settings.height):
        warn(f"this model was trained on {settings.frames} frames of {settings.width}x{settings.height}, "
             f"not {frames} of {args.size[0]}x{args.size[1]}")


def check_frames(frames: int):
    """Raise UserError when they make no grid."""
    try:
        grid_shape(frames)
    except ValueError as error:
        raise UserError(f"--frames: {error}") from error


def check_size(size, frames: int, model: Model):
    """Sides of a frame must be whole latent pixels, sides of the grid must halve as often as the UNet does."""
    factor, halvings = model.vae.cfg.downsampling, model.unet.cfg.downsampling
    for side, cells, name in zip(size, reversed(grid_shape(frames)), ("width", "height")):
        if side < factor or side % factor:
            raise UserError(f"--size: the {name} {side} is not divisible by {factor}, the VAE's factor: "
                            f"use {max(factor, side // factor * factor)} or {(side // factor + 1) * factor}")
        if side // factor * cells % halvings:
            raise UserError(f"--size: {cells} frames of {name} {side} side by side are {side // factor * cells} latent "
                            f"pixels, which the UNet needs divisible by {halvings}: use a multiple of "
                            f"{factor * halvings}")


def warn(text: str):
    print(f"warning: {text}", file=sys.stderr)


def output_paths(args, prompts) -> list[str]:
    """A path for each video; none of them exists yet, and all of them can be written."""
    videos = [(prompt, args.seed + n) for prompt in prompts for n in range(args.num)]
    stem, kind = os.path.splitext(args.out or "out/")
    if kind:
        if kind.lower() not in WRITERS:
            raise UserError(f"--out {args.out}: the file must end in {', '.join(WRITERS)}")
        digits = max(3, len(str(len(videos) - 1)))  # sorted by name they are in the order of the prompts
        paths = [args.out] if len(videos) == 1 else [f"{stem}-{i:0{digits}d}{kind}" for i in range(len(videos))]
        for path in paths:
            if os.path.lexists(path):
                raise UserError(f"{path} is there already: choose another --out, or remove it")
    else:
        kind = ".png" if args.frames == 1 else ".mp4"
        paths = []
        for prompt, seed in videos:
            name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "video"
            stem = os.path.join(args.out or "out", f"{name}-seed{seed}")
            tries = itertools.chain([f"{stem}{kind}"], (f"{stem}-{n}{kind}" for n in itertools.count(2)))
            paths.append(next(path for path in tries if path not in paths and not os.path.lexists(path)))
    for path in paths:
        check_writable(path)
    return paths


def check_map(args, paths: list[str]):
    """Raise UserError on what --attention_map cannot show, or where it cannot be written."""
    if len(paths) > 1 or args.frames == 1:
        raise UserError(f"--attention_map shows the frames of one video, not of {len(paths)} with {args.frames}")
    if not args.attention_map.lower().endswith(".png"):
        raise UserError(f"--attention_map {args.attention_map}: the file must end in .png")
    if os.path.lexists(args.attention_map) or args.attention_map in paths:
        raise UserError(f"{args.attention_map} is there already: choose another --attention_map, or remove it")
    check_writable(args.attention_map)


def check_writable(path: str):
    """Better now than after the sampling."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".part", "wb"):
            pass
        os.remove(path + ".part")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def main():
    args = parse_arguments()
    prompts = read_prompts(args)
    size = parse_size(args.size) if args.size else None
    device = pick_device(args.device)
    dtype = DTYPES[args.dtype or ("float16" if device.type == "cuda" else "float32")]
    model = load(args.ckpt, "cpu", dtype, args.prediction)
    if has_room(device, model):
        model.to(device)
    settings = model.settings
    args.frames = settings.frames if args.frames is None else args.frames
    args.fps = settings.fps if args.fps is None else args.fps
    args.guidance = settings.guidance if args.guidance is None else args.guidance
    args.eta = settings.eta if args.eta is None else args.eta
    args.size = size or (settings.width, settings.height)
    check_request(args, model)
    paths = output_paths(args, prompts)
    watch = nullcontext()
    if args.attention_map:
        check_map(args, paths)
        watch = AttentionMaps(model.unet, args.frames)
    for cut in model.text.tokenize(prompts)[1]:
        if cut:
            warn(f"the prompt is longer than the text tower reads; cut off: {cut!r}")

    wanted = [(prompt, args.seed + n) for prompt in prompts for n in range(args.num)]
    shared = {name: getattr(args, name) for name in
              ("negative", "frames", "size", "fps", "steps", "guidance", "sampler", "eta", "ckpt")}
    with watch, tqdm(total=len(wanted) * args.steps, unit="step", desc="sample", file=sys.stderr) as bar:
        for (prompt, seed), path in zip(wanted, paths):
            video = generate(model, [prompt], seeds=[seed], progress=lambda *_: bar.update(),
                             device=device, **{name: value for name, value in shared.items() if name != "ckpt"})[0]
            write_video(path, video, playback_fps(args.fps), {"prompt": prompt, "seed": seed, **shared})
    if args.attention_map:
        watch.write(args.attention_map, NoiseSchedule(settings).sampling_timesteps(args.steps))
        paths.append(args.attention_map)
    for path in paths:
        print(path)


if __name__ == "__main__":
    command_line(main)
