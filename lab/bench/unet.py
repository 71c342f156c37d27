"""Speed and memory, ours beside the peers: one command a question, every ratio from things that took turns in one run.

    python bench.py tiny                 # what the newcomer waits for: python sample.py "a red circle moving right"
    python bench.py step                 # a training step of configs/tiny.py, beside diffusers' UNet in a plain loop
    python bench.py unet                 # SD 2.1's UNet beside diffusers', and where its time goes
    python bench.py video                # 50 guided steps of 16x256x256, beside ModelScope and AnimateDiff
    python bench.py attention            # the paper's Table 3 and Figure 10; our attention beside the fused kernel
    python bench.py scale                # time and memory against the number of frames and their size
    pip install torchcodec decord        # peers of `data`; torchcodec needs the system's ffmpeg
    python bench.py data                 # reading clips: 16 frames of 256x256 from 336x596 H.264
    pip install deepspeed ninja          # the peer of `optimizer`; it compiles itself at its first use
    python bench.py optimizer            # AdamW on the CPU, 100 M parameters

The first GPU is used where there is one, else the CPU, on which unet, video and scale take many minutes.
"""

import functools
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
from torch._subclasses.fake_tensor import FakeTensorMode

from grid import fold, grid_shape
from lab import peers
from lab.timing import (
    arithmetic,
    ceilings,
    default_dtype,
    flop_of,
    in_turn,
    operators_table,
    parts_table,
    report,
    unfilled,
)
from model import SD21, TINY, AttentionByParts, UNet, attention
from sample import DTYPES, NoiseSchedule, denoise, pick_device
from sd.checkpoint import Parser, Settings, build, command_line
from training.account import Account, setting, size_of
from training.config import Config, read_config
from training.offload import OffloadAdamW
from training.task import loss_of, precision

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# ---------------------------------------------------------------------------------------------------------------------
# The UNet of Stable Diffusion 2.1


def unet_input(device, dtype, h, w, batch=1):
    """x, t and context of a UNet."""
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(batch, 4, h, w, generator=g), torch.randn(batch, 77, 1024, generator=g)
    return x.to(device, dtype), torch.full((batch,), 500, device=device), context.to(device, dtype)


def forward_of(unet, inputs):
    def work():
        with torch.no_grad():
            unet(*inputs)
    return work


def backward_of(unet, inputs):
    def work():
        output = unet(*inputs)
        getattr(output, "sample", output).square().mean().backward()
        unet.zero_grad()
    return work


def command_unet(args):
    device = pick_device(None)
    usual = ["float32", "bfloat16"] if device.type == "cpu" else ["float16", "bfloat16"]
    for dtype in (DTYPES[name] for name in ([args.dtype] if args.dtype else usual)):
        with device, default_dtype(dtype):
            theirs = peers.diffusers_unet(SD21.unet)
        unets = {"diffusers": theirs, "ours": peers.ours_with_weights_of(theirs, peers.plain(SD21.unet))}
        if args.compile:
            unets |= {f"{name}, compiled": torch.compile(unet) for name, unet in unets.items()}
        for side in [args.side] if args.side else (64, 128):
            inputs = unet_input(device, dtype, side, side, args.batch)
            for what, kind in (("forward", forward_of), ("forward and backward", backward_of)):
                with unfilled(unets["ours"], inputs) as fakes:
                    flop = flop_of(kind(*fakes))
                ceiling = arithmetic(device, dtype)
                print(f"{what}, {str(dtype)[6:]}, {args.batch} x {side}x{side}: {flop / 1e12:.2f} TFLOP", flush=True)
                report(in_turn({name: kind(unet, inputs) for name, unet in unets.items()}, device, seconds=60),
                       "diffusers", dict.fromkeys(unets, flop), ceiling)
            parts_table(unets["ours"], inputs, ceilings(device, dtype))
            print("  with its backward pass, by operator")
            operators_table(backward_of(unets["ours"], inputs), device, ceilings(device, dtype))


# ---------------------------------------------------------------------------------------------------------------------
# A video

# (UNet, shape of the context of both halves of guidance): AnimateDiff wants it once a frame
VIDEO_UNETS = {"ModelScope (3-D UNet)": (peers.modelscope_unet, (2, 77, 1024)),
               "AnimateDiff (motion modules)": (peers.animatediff_unet, (32, 77, 768))}


def command_video(args):
    """A step is one forward of both halves of guidance and DDIM's update."""
    device = pick_device(None)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    steps = 50 if device.type == "cuda" else 2  # on a CPU the other 48 are extrapolated
    with device, default_dtype(dtype):
        model = build(SD21, Settings())
        works = {name: peers.pipeline(make(), text, steps, device, dtype) for name, (make, text) in VIDEO_UNETS.items()}
    works["ours (grid)"] = our_video(model, steps, device, dtype)
    flop = {name: steps * flop_of_step(make, (2, 4, 16, 32, 32), text) for name, (make, text) in VIDEO_UNETS.items()}
    flop["ours (grid)"] = steps * flop_of_step(lambda: UNet(SD21.unet), (2, 4, 128, 128), (2, 77, 1024))
    ceiling = arithmetic(device, dtype)
    spent = in_turn(works, device, seconds=60, rounds=5)
    latents = torch.randn(16, 4, 32, 32).to(device, dtype)
    decoding = statistics.median(in_turn({"": forward_of(model.vae.decode, (latents,))}, device, 2)[""])
    print(f"{steps} guided steps of 16 frames of 256x256, {str(dtype)[6:]}; the VAE takes {decoding:.1f} s for all")
    report(spent, "ModelScope (3-D UNet)", flop, ceiling)
    how = "measured" if steps == 50 else f"extrapolated from {steps} steps"
    for name, seconds in spent.items():
        print(f"  {name:30} {16 / (statistics.median(seconds) * 50 / steps + decoding):7.4f} frames/s, 50 steps, {how}")


def our_video(model, steps, device, dtype):
    noise, _, context = unet_input(device, dtype, 128, 128, 2)
    condition, schedule = torch.full((1,), 8.0, device=device), NoiseSchedule(model.settings)

    def work():
        run = denoise(model.unet, schedule, noise[:1].float(), *context.split(1), condition, (4, 4))
        for _ in range(steps):
            next(run)
    return work


def flop_of_step(make, latents, text) -> int:
    with FakeTensorMode(), torch.no_grad():
        unet, inputs = make(), (torch.zeros(latents), torch.zeros(2), torch.zeros(text))
        return flop_of(lambda: unet(*inputs))


# ---------------------------------------------------------------------------------------------------------------------
# Attention

HEADS, HEAD_WIDTH, TOKENS = 5, 64, 1 << 14  # SD 2.1's first level on the 128x128 grid


def query_key_value(batch, heads, tokens, device, dtype):
    g = torch.Generator().manual_seed(0)
    shape = batch, tokens, heads, HEAD_WIDTH
    return [torch.randn(shape, generator=g).to(device, dtype).transpose(1, 2) for _ in range(3)]


def command_attention(args):
    device = pick_device(None)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    with torch.no_grad():
        kernels(device, dtype)
        table_3(device, dtype)
        figure_10(device, dtype)


def kernels(device, dtype):
    qkv = query_key_value(1, HEADS, TOKENS, device, dtype)
    attends = {"fused kernel": F.scaled_dot_product_attention, "ours": attention}
    works = {name: functools.partial(attend, *qkv) for name, attend in attends.items()}
    works["its products, no softmax"] = functools.partial(products, *qkv)
    flop, ceiling = 4 * HEADS * TOKENS**2 * HEAD_WIDTH, ceilings(device, dtype)["matmul"]
    print(f"{TOKENS} tokens, {HEADS} heads of {HEAD_WIDTH}, {str(dtype)[6:]}")
    report(in_turn(works, device, seconds=30), "fused kernel", dict.fromkeys(works, flop), ceiling)
    exact = F.scaled_dot_product_attention(*(x[:, :1].double() for x in qkv))
    for name in attends:
        error = (works[name]()[:, :1].double() - exact).norm() / exact.norm()
        print(f"  {name:30} {error:.2%} from float64 (root mean square)")
    print("forward and backward")  # five products more, one of them again
    works = {name: functools.partial(both_passes, attend, *qkv) for name, attend in attends.items()}
    report(in_turn(works, device, seconds=60), "fused kernel", dict.fromkeys(works, 3.5 * flop), ceiling)


@torch.enable_grad()
def both_passes(attend, *qkv):
    inputs = [x.detach().requires_grad_() for x in qkv]
    torch.autograd.grad(attend(*inputs), inputs, torch.ones_like(qkv[0]))


def products(q, k, v):
    """The matrix products of AttentionByParts: what is left of it if the softmax costs nothing."""
    for head, rows in AttentionByParts.parts(q, k):
        (q[head][rows] @ k[head].mT) @ v[head]


def table_3(device, dtype):
    """One attention over the whole grid, beside one inside frames and one over time. At 512 pixels a frame has four
    times the tokens of 256; the paper's table says twice."""
    print("Table 3: one head of one layer, ms")
    for name, T, inside in (("base, 16 x 256x256", 16, 1024), ("long, 32 x 256x256", 32, 1024),
                            ("large, 16 x 512x512", 16, 4096), ("both, 32 x 512x512", 32, 4096)):
        shapes = {"grid": (1, 1, T * inside), "frames": (T, 1, inside), "time": (inside, 1, T)}
        inputs = {what: query_key_value(*shape, device, dtype) for what, shape in shapes.items()}
        works = {what: functools.partial(attention, *qkv) for what, qkv in inputs.items()}
        ms = {what: statistics.median(s) * 1e3 for what, s in in_turn(works, device, 5, seconds=10).items()}
        print(f"  {name:22} grid {ms['grid']:9.2f}   frames {ms['frames']:8.2f} + time {ms['time']:7.2f}   "
              f"{ms['grid'] / (ms['frames'] + ms['time']):5.1f}x", flush=True)


def figure_10(device, dtype):
    print(f"Figure 10: {TOKENS} tokens in B groups: time and receptive field, of those of one group")
    groups = [1 << n for n in range(0, 15, 2)]
    works = {B: functools.partial(attention, *query_key_value(B, 1, TOKENS // B, device, dtype)) for B in groups}
    spent = in_turn(works, device, 10)
    for B in groups:
        print(f"  B = {B:5}  time {np.median(np.divide(spent[B], spent[1])):7.2%}  receptive field {1 / B:7.2%}")


# ---------------------------------------------------------------------------------------------------------------------
# Frames and their size

LONGEST = 60  # seconds of a forward up to which it is measured


def command_scale(args):
    """A forward of one half of guidance. Seconds are fitted as a n + b n², n being the latent pixels of the grid:
    convolutions and linear layers, and attention."""
    device = pick_device(None)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    with device, default_dtype(dtype):
        unet = UNet(SD21.unet)
    points = []
    cases = [(T, width, height) for width, height in ((128, 128), (256, 160), (256, 256), (512, 512))
             for T in (4, 16, 32, 64, 256)]
    for T, width, height in sorted(cases, key=math.prod):
        grid = grid_shape(T)
        h, w = grid[0] * height // 8, grid[1] * width // 8
        (peak, least), seconds, how = peak_memory(h, w, grid), fitted(points, h * w), "fitted"
        if len(points) < 3 or seconds < LONGEST:
            inputs = *unet_input(device, dtype, h, w), torch.full((1,), 8.0, device=device), grid
            seconds, how = min(in_turn({"": forward_of(unet, inputs)}, device, 5, seconds=10)[""]), "measured"
            points.append((h * w, seconds))
        print(f"  {T:4} frames of {width}x{height}  {h * w:8} latent pixels  {seconds:9.2f} s {how:9} "
              f"{peak / 1e9:6.1f} GB, {least / 1e9:.1f} one network at a time", flush=True)
    a, b = coefficients(points)
    off = [fitted(points, n) / seconds - 1 for n, seconds in points]
    print(f"seconds = {a * 1e3:.3f} n / 1000 + {b * 1e6:.5f} (n / 1000)^2: half of them quadratic at n = {a / b:.0f}, "
          f"where they grow as n^1.5; the fit is off by {np.sqrt(np.mean(np.square(off))):.0%} (root mean square)")


def peak_memory(h, w, grid) -> tuple[int, int]:
    """Bytes at the peak of sampling with guidance in fp16, counted without allocating them: with all networks there,
    and with each only while it works (sample.at_work). The UNet takes both halves of guidance, the VAE 16 frames."""
    with FakeTensorMode(), torch.no_grad(), Account() as account:
        with default_dtype(torch.float16):
            model = build(SD21, Settings())
            inputs = torch.zeros(2, 4, h, w), torch.zeros(2), torch.zeros(2, 77, 1024), torch.zeros(2)
            frames = torch.zeros(min(16, math.prod(grid)), 4, h // grid[0], w // grid[1])
        weights = {name: size_of(part.parameters()) for name, part in model.parts().items()}
        work = {"unet": account.during(lambda: model.unet(*inputs, grid)),
                "vae": account.during(lambda: model.vae.decode(frames))}
    return sum(weights.values()) + max(work.values()), max(weights[name] + work[name] for name in work)


def coefficients(points):
    """a and b of seconds = a n + b n², by least squares of the relative error."""
    n, seconds = np.array(points, dtype=float).T
    return np.linalg.lstsq(np.stack([n / seconds, n**2 / seconds], 1), np.ones(len(n)), rcond=None)[0]


def fitted(points, n) -> float:
    a, b = coefficients(points) if len(points) > 1 else (0, 0)
    return a * n + b * n**2


# ---------------------------------------------------------------------------------------------------------------------
# A training step of the tiny model, and the newcomer's first command


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
        unet, losses = peers.diffusers_unet(TINY.unet), []
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
    ceiling = ceilings(device, getattr(torch, cfg.dtype))
    operators_table(lambda: [work() for work in parts["ours"].values()], device, ceiling)


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


def command_data(args):
    """Clips a second on one core, alternating between the readers; what they agree on is printed too."""
    torch.set_num_threads(1)
    readers = {"ours": peers.read_ours, "torchcodec": peers.read_torchcodec, "decord": peers.read_decord}
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
                    clips[name] = read(path, times, SIDE)
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
        "whole: DeepSpeedCPUAdam": lambda: peers.whole_step(sets["deepspeed"], deepspeed.step),
        "whole: torch's foreach": lambda: peers.whole_step(sets["foreach"], foreach.step),
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
                            ("unet", command_unet, "SD 2.1's UNet, beside diffusers'"),
                            ("video", command_video, "16x256x256, beside ModelScope and AnimateDiff"),
                            ("attention", command_attention, "the paper's Table 3 and Figure 10"),
                            ("scale", command_scale, "time and memory against the number of frames and their size"),
                            ("data", command_data, "reading clips, beside torchcodec and decord"),
                            ("optimizer", command_optimizer, "AdamW on the CPU, beside DeepSpeed")):
        commands.add_parser(name, help=what).set_defaults(run=run)
    unet = commands.choices["unet"]
    unet.add_argument("--dtype", choices=DTYPES, help="only this one")
    unet.add_argument("--side", type=int, choices=(64, 128), help="of the latent grid, only this one")
    unet.add_argument("--batch", type=int, default=1, help="default: 1")
    unet.add_argument("--compile", action="store_true", help="both also through torch.compile")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    command_line(main)
