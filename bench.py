"""Speed and memory, ours beside the peers: one command a question, every ratio from two things in one run.

    python bench.py tiny                 # what the newcomer waits for: python sample.py "a red circle moving right"
    python bench.py step                 # a training step of configs/tiny.py, beside diffusers' UNet in a plain loop
    pip install torchcodec decord        # peers of `data`; torchcodec needs the system's ffmpeg
    python bench.py data                 # reading clips: 16 frames of 256x256 from 336x596 H.264
    pip install deepspeed ninja          # the peer of `optimizer`; it compiles itself at its first use
    python bench.py optimizer            # AdamW on the CPU, 100 M parameters
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from account import setting
from checkpoint import Parser, command_line
from config import Config, read_config
from grid import fold
from media import View, cover, fit_frame, frames_at, opened
from model import TINY, UNetConfig
from offload import OffloadAdamW
from sample import pick_device
from task import loss_of, precision

HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------------------------------------------------------------
# Clocks


def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(works: dict, device, rounds=20) -> dict[str, list[float]]:
    """Seconds of each work, by name. They take turns, since a shared machine is now fast, now slow; a first round does
    not count."""
    spent = {name: [] for name in works}
    for n in range(rounds + 1):
        for name, work in works.items():
            start = clock(device)
            work()
            if n:
                spent[name].append(clock(device) - start)
    return spent


# ---------------------------------------------------------------------------------------------------------------------
# A training step of the tiny model, and the newcomer's first command


def diffusers_unet(cfg: UNetConfig):
    """diffusers' UNet2DConditionModel of our shape, without what ETC adds."""
    from diffusers import UNet2DConditionModel

    levels = range(len(cfg.channel_mult))
    kinds = [("CrossAttn" if level in cfg.attention_levels else "") for level in levels]
    widths = tuple(cfg.channels * m for m in cfg.channel_mult)
    return UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=cfg.num_res_blocks, cross_attention_dim=cfg.context_dim,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)), norm_num_groups=cfg.norm_groups,
        attention_head_dim=tuple(cfg.heads(width) for width in widths),  # the name is theirs, the number is of heads
        use_linear_projection=cfg.linear_projection)


def our_step(cfg: Config, device):
    """(name, what it does) of each part of a step of train.py."""
    with device:
        module, batch, _ = setting(cfg, TINY)
    if device.type == "cpu":
        module.to(memory_format=torch.channels_last)
    optimizer, losses = OffloadAdamW([{"params": list(module.parameters()), "lr": cfg.lr}], cfg.ema), []
    optimizer.attach(module)

    def update():
        optimizer.step(cfg.clip)
        module.zero_grad(set_to_none=True)

    return {"forward": lambda: losses.append(loss_of(cfg, module, batch, device).mean()),
            "backward": lambda: losses.pop().backward(), "update": update}


def plain_step(cfg: Config, device):
    """The same with diffusers' UNet and moving average, and torch's clipping and AdamW with their defaults."""
    from diffusers.training_utils import EMAModel

    with device:
        ours, (latents, tokens, _, t, eps), _ = setting(cfg, TINY)
        unet, losses = diffusers_unet(TINY.unet), []
    x0, text, schedule = fold(latents, *ours.grid), ours.text, ours.schedule
    params = [*unet.parameters(), *(p for p in text.parameters() if p.requires_grad)]
    optimizer, average = torch.optim.AdamW(params, cfg.lr), EMAModel(params)

    def forward():
        with precision(cfg, device):
            output = unet(schedule.add_noise(x0, eps, t), t, text(tokens)).sample
        losses.append(F.mse_loss(output.float(), schedule.target(x0, eps, t)))

    def update():
        torch.nn.utils.clip_grad_norm_(params, cfg.clip)
        optimizer.step()
        average.step(params)
        optimizer.zero_grad()

    return {"forward": forward, "backward": lambda: losses.pop().backward(), "update": update}


def command_step(args):
    device, cfg = pick_device(None), read_config(os.path.join(HERE, "configs", "tiny.py"), [])
    parts = {"diffusers": plain_step(cfg, device), "ours": our_step(cfg, device)}
    spent = in_turn({(name, part): work for name, step in parts.items() for part, work in step.items()}, device)
    whole = {name: np.sum([spent[name, part] for part in parts[name]], axis=0) for name in parts}
    for name, seconds in whole.items():
        middle = {part: statistics.median(spent[name, part]) * 1e3 for part in parts[name]}
        print(f"  {name:10} {statistics.median(seconds) * 1e3:7.1f} ms a step  "
              f"{np.median(whole['diffusers'] / seconds):5.2f}x   "
              + "  ".join(f"{part} {ms:.0f}" for part, ms in middle.items()))


NEWCOMER = """
import json, time
began = time.perf_counter()
import sample
clock = [time.perf_counter()]
model = sample.load(sample.SHIPPED)
clock.append(time.perf_counter())
def step(i, *rest):
    if i in (0, 49): clock.append(time.perf_counter())
video = sample.generate(model, ["a red circle moving right"], progress=step)
clock.append(time.perf_counter())
sample.write_video("video.mp4", video[0], 4, {})
clock.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip([began, *clock], clock)]))
"""


def command_tiny(args):
    """The whole command, and where the time goes: one run that does not count, then medians of five."""
    names = ("import", "load", "text and first step", "49 steps", "decode", "write")
    wholes, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for n in range(6):
            began = time.perf_counter()
            subprocess.run([sys.executable, os.path.join(HERE, "sample.py"), "a red circle moving right", "--out",
                            os.path.join(folder, f"{n}.mp4")], check=True, capture_output=True)
            wholes.append(time.perf_counter() - began)
            done = subprocess.run([sys.executable, "-c", NEWCOMER], check=True, capture_output=True, cwd=folder,
                                  env=os.environ | {"PYTHONPATH": HERE}, text=True)
            parts.append(json.loads(done.stdout))
    print(f"python sample.py: {statistics.median(wholes[1:]):.1f} s; inside, "
          + ", ".join(f"{name} {statistics.median(s):.1f}" for name, s in zip(names, zip(*parts[1:]))))


# ---------------------------------------------------------------------------------------------------------------------
# Reading clips

T, SIDE, CLIPS = 16, 256, 8


def write_scene(path: str, seed: int, seconds=20, rate=30, width=596, height=336):
    """A textured scene under a camera that pans and zooms: H.264 as x264's defaults make it, keyframes 250 apart."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).resize((2400, 1600), Image.BICUBIC)
    fine = rng.normal(0, 12, (1600, 2400, 1))
    scene = Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for n in range(seconds * rate):
            zoom = 1 + 0.3 * math.sin(n / 90)
            left, top = 700 + 600 * math.sin(n / 150), 500 + 400 * math.cos(n / 130)
            box = (left, top, left + width * zoom, top + height * zoom)
            file.mux(stream.encode(av.VideoFrame.from_image(scene.resize((width, height), Image.BILINEAR, box))))
        file.mux(stream.encode())


def read_ours(path: str, times) -> torch.Tensor:
    with opened(path) as video:
        return torch.stack([fit_frame(frame, video.aspect, SIDE, SIDE, View()) for frame in frames_at(video, times)])


def resized(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (T, 3, H, W) as a torchcodec or decord user would bring it to size: antialiased, on uint8, cropped."""
    w, h = cover(frames.shape[-1], frames.shape[-2], SIDE, SIDE)
    frames = F.interpolate(frames, (h, w), mode="bicubic", antialias=True)
    top, left = (h - SIDE) // 2, (w - SIDE) // 2
    return frames[..., top : top + SIDE, left : left + SIDE]


def read_torchcodec(path: str, times) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate")
    return resized(decoder.get_frames_played_at(list(times)).data)


def read_decord(path: str, times) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    frames = reader.get_batch([int(t * reader.get_avg_fps() + 1e-6) for t in times]).asnumpy()
    return resized(torch.from_numpy(frames).permute(0, 3, 1, 2))


def command_data(args):
    """Clips a second on one core, alternating between the readers; what they agree on is printed too."""
    torch.set_num_threads(1)
    readers = {"ours": read_ours, "torchcodec": read_torchcodec, "decord": read_decord}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{n}.mp4") for n in range(CLIPS)]
        for n, path in enumerate(paths):
            write_scene(path, n)
        print(f"{'FPS':>4} " + " ".join(f"{name:>18}" for name in readers) + "   ours / best   difference")
        totals = {name: 0.0 for name in readers}
        for fps in (1, 2, 4, 8, 15, 30):
            spent, difference = {name: [] for name in readers}, 0.0
            for path in paths:
                times = rng.uniform(0, 20 - (T - 1) / fps - 0.1) + np.arange(T) / fps
                clips = {}
                for name, read in readers.items():
                    began = time.perf_counter()
                    clips[name] = read(path, times)
                    spent[name].append(time.perf_counter() - began)
                difference = max(difference, (clips["ours"].float() - clips["torchcodec"].float()).abs().mean().item())
            rates = {name: 1 / statistics.median(seconds) for name, seconds in spent.items()}
            for name, seconds in spent.items():
                totals[name] += statistics.median(seconds)
            best = max(rate for name, rate in rates.items() if name != "ours")
            print(f"{fps:4d} " + " ".join(f"{rate:10.1f} clips/s" for rate in rates.values())
                  + f"   {rates['ours'] / best:11.2f}   {difference:.2f} of 255", flush=True)
        mean = {name: 6 / total for name, total in totals.items()}
        best = max(rate for name, rate in mean.items() if name != "ours")
        print(f"{'all':>4} " + " ".join(f"{rate:10.1f} clips/s" for rate in mean.values())
              + f"   {mean['ours'] / best:11.2f}")
        print(f"eight GPUs at a batch of 6 a second each: {48 / mean['ours']:.1f} cores")


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer

LAYERS, WIDTH, REPEATS = 25, 2000, 40  # 100 M numbers
OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.03}


def fresh_parameters() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=g)) for _ in range(LAYERS)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)
    return params


def whole_step(params, update, clip=1.0, scale=1024.0):
    """Unscale, global norm, clip, update, as a loop around a plain optimizer does it."""
    grads = [p.grad for p in params]
    torch._foreach_mul_(grads, 1 / scale)
    torch.nn.utils.clip_grad_norm_(params, clip, foreach=True)
    update()


def four_in_three_out(p, m, v, g):
    """The traffic of AdamW and none of its arithmetic."""
    p.add_(g)
    m.add_(g)
    v.add_(g)


def command_optimizer(args):
    """Seconds a step. The lines take turns, and a ratio is the median over the rounds: the memory of a shared machine
    is now fast, now slow."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    sets = {name: fresh_parameters() for name in ("ours", "deepspeed", "foreach")}
    ours = OffloadAdamW([{"params": sets["ours"], **OPTIONS}])
    deepspeed = DeepSpeedCPUAdam(sets["deepspeed"], adamw_mode=True, **OPTIONS)
    foreach = torch.optim.AdamW(sets["foreach"], foreach=True, **OPTIONS)
    ceiling, arrays = torch.compile(four_in_three_out), [torch.ones(LAYERS * WIDTH * WIDTH) for _ in range(4)]
    grads = [p.grad.clone() for p in sets["ours"]]
    ours.step()  # makes the state
    steps = {
        "four arrays in, three out": lambda: ceiling(*arrays),
        "update: ours (torch's fused)": ours.inner.step,
        "update: DeepSpeedCPUAdam": deepspeed.step,
        "update: torch's foreach": foreach.step,
        "whole: ours": lambda: ours.step(clip=1.0, scale=1024.0),
        "whole: DeepSpeedCPUAdam": lambda: whole_step(sets["deepspeed"], deepspeed.step),
        "whole: torch's foreach": lambda: whole_step(sets["foreach"], foreach.step),
    }
    spent = {name: [] for name in steps}
    for n in range(REPEATS + 2):
        for name, step in steps.items():
            for p, grad in zip([p for params in sets.values() for p in params], grads * len(sets)):
                p.grad.copy_(grad)  # a step leaves it scaled
            ours.inner.grad_scale = ours.inner.found_inf = None  # of the whole step before
            began = time.perf_counter()
            step()
            if n >= 2:
                spent[name].append(time.perf_counter() - began)
    for name, seconds in spent.items():
        peer = spent.get(name.split(":")[0] + ": DeepSpeedCPUAdam")
        ratio = f"{np.median(np.divide(peer, seconds)):5.2f}x DeepSpeed" if peer else " " * 15
        low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)) * 1e3
        share = np.median(np.divide(spent["four arrays in, three out"], seconds))
        print(f"{name:30} {middle:6.1f} ms (quartiles {low:.1f} to {high:.1f})   {ratio}   {share:4.0%} of the ceiling")


def main():
    parser = Parser(description="Speed and memory, ours beside the peers.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, what in (("tiny", command_tiny, "what the newcomer waits for"),
                            ("step", command_step, "a training step of configs/tiny.py, beside diffusers' UNet"),
                            ("data", command_data, "reading clips, beside torchcodec and decord"),
                            ("optimizer", command_optimizer, "AdamW on the CPU, beside DeepSpeed")):
        commands.add_parser(name, help=what).set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    command_line(main)
