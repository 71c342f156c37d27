# ruff: noqa: E501
"""Compare what two checkouts compute, to the bit: python tests/same_bits.py OLD NEW, with OLD a worktree of 963bc53.

Compared are sampled videos of the shipped weights, the toy world's files, encoded moments and contexts, UNets of the
shapes of SD 1 and 2 in narrow, and the losses of configs/ci.py: 50 steps on one and on two ranks, 5 with a frozen text
tower, 10 of the VAE. The old order of the stream is patched into NEW (data.shuffled).
"""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

SAMPLE = {
    "old": """
import sys, numpy as np, torch
torch.set_num_threads(1)
from checkpoint import load
from sample import SHIPPED, generate
model = load(SHIPPED)
make = lambda **o: generate(model, ["a red circle moving right", "a blue square moving up on a gray background"], seeds=[0, 7], **o)
""",
    "new": """
import sys, numpy as np, torch
torch.set_num_threads(1)
import sd
from sample import SHIPPED, Request, generate
model = sd.load(SHIPPED)
make = lambda **o: generate(model, Request(("a red circle moving right", "a blue square moving up on a gray background"), **o), seeds=[0, 7])
"""}
VIDEOS = """
np.savez(sys.argv[1], a=make(steps=10), b=make(steps=6, sampler="ddpm", guidance=5.0, fps=8), c=make(steps=4, eta=0.0, guidance=1.0),
         d=make(steps=4, frames=1), e=make(steps=3, frames=4, negative="a green square"))
"""
UNET = {"old": "from model import UNet, UNetConfig\n", "new": "from model import UNet, UNetConfig\n"}
FORWARD = """
import sys, numpy as np, torch
torch.set_num_threads(1)
out = {}
for name, cfg in {"sd1": UNetConfig(channels=32, norm_groups=8, context_dim=48, head_width=None, num_heads=8, linear_projection=False),
                  "sd2": UNetConfig(channels=32, norm_groups=8, context_dim=48, head_width=16)}.items():
    torch.manual_seed(0)
    unet = UNet(cfg)
    for p in unet.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.05)
    x, context = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 48)
    t, fps = torch.tensor([10, 900]), torch.tensor([8., 30.])
    y = unet(x, t, context, fps, (4, 4))
    y.square().mean().backward()
    out[name] = y.detach().numpy()
    out[name + " gradient"] = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None]).numpy()
    with torch.no_grad(): out[name + " image"] = unet(x, t, context).numpy()
np.savez(sys.argv[1], **out)
"""
TRAIN = {"old": """
import sys
from checkpoint import command_line
from train import main
command_line(main)
""", "new": """
import sys
import data
import numpy as np

def old_order(i, n, key):
    keys = np.random.SeedSequence(key).generate_state(4, np.uint64).tolist()
    bits = max(1, (n - 1).bit_length() + 1) // 2
    while True:
        left, right = i >> bits, i & (1 << bits) - 1
        for k in keys:
            mixed = (right + k) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
            left, right = right, left ^ mixed >> 64 - bits
        i = left << bits | right
        if i < n:
            return i

data.shuffled = lambda n, *key: [old_order(i, n, key) for i in range(n)]
from cli import run
from train import main
run(main)
"""}


def python(root, code, *arguments, ranks=1):
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(code)
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *start, file.name, *arguments], cwd=root, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
    os.remove(file.name)
    if done.returncode:
        sys.exit(done.stderr)


def losses(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return np.array([[line["loss"], line["grad_norm"]] for line in map(json.loads, file)])


def compare(what, old, new):
    same = old.keys() == new.keys() and all(np.array_equal(old[k], new[k]) for k in old)
    print(f"{'same' if same else 'DIFFERENT':10} {what}", flush=True)
    if not same:
        for k in old:
            if k in new and not np.array_equal(old[k], new[k]):
                print("    ", k, old[k].shape, new[k].shape, np.abs(old[k].astype(float) - new[k].astype(float)).max() if old[k].shape == new[k].shape else "")
    return same


def main():
    roots = dict(zip(("old", "new"), map(os.path.abspath, sys.argv[1:3])))
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, root in roots.items():
            f = found[name] = {}
            path = os.path.join(folder, name)
            os.makedirs(path)
            python(root, SAMPLE[name] + VIDEOS, path + "/video.npz")
            python(root, UNET[name] + FORWARD, path + "/unet.npz")
            f["sampled videos"] = dict(np.load(path + "/video.npz"))
            f["UNets, forward and backward"] = dict(np.load(path + "/unet.npz"))
            options = ["configs/ci.py", "--prompts=()", "--max_steps=50", f"--toy={path}/toy", "--resume=False"]
            python(root, TRAIN[name], *options, f"--encoded={path}/encoded", f"--out_dir={path}/one")
            python(root, TRAIN[name], *options, f"--encoded={path}/encoded", f"--out_dir={path}/two", "--batch_size=2", ranks=2)
            python(root, TRAIN[name], *options, "--train_text=False", f"--encoded={path}/encoded_text", f"--out_dir={path}/text", "--max_steps=5")
            python(root, TRAIN[name], *options, "--train=vae", f"--out_dir={path}/vae", "--max_steps=10")
            f["losses, one rank"], f["losses, two ranks"] = {"": losses(path + "/one")}, {"": losses(path + "/two")}
            f["losses, frozen tower"], f["losses, VAE"] = {"": losses(path + "/text")}, {"": losses(path + "/vae")}
            for what in ("encoded", "encoded_text"):
                f[what] = {}
                for shard in sorted(os.listdir(f"{path}/{what}")):
                    if shard.endswith(".safetensors"):
                        f[what] |= {f"{shard} {k}": v for k, v in load_file(f"{path}/{what}/{shard}").items()}
            f["toy world"] = {}
            for where, _, names in os.walk(path + "/toy"):
                for n in names:
                    whole = os.path.join(where, n)
                    with open(whole, "rb") as file:  # of a PNG the pixels: its encoder has changed
                        found_here = np.asarray(Image.open(file)) if n.endswith(".png") else np.frombuffer(file.read(), np.uint8)
                    f["toy world"][os.path.relpath(whole, path)] = found_here
        results = [compare(what, found["old"][what], found["new"][what]) for what in found["old"]]
        sys.exit(not all(results))


if __name__ == "__main__":
    main()
