"""Speed and memory, ours beside the peers: one command a question, every ratio from things that took turns in one run.

    python -m lab.bench tiny             # what a newcomer waits for: python sample.py "a red circle moving right"
    python -m lab.bench step             # a training step of configs/tiny.py, beside diffusers' UNet in a plain loop
    python -m lab.bench unet             # SD 2.1's UNet beside diffusers', and where its time goes
    python -m lab.bench video            # 50 guided steps of 16x256x256, each layout, ModelScope and AnimateDiff
    python -m lab.bench attention        # the paper's Table 3 and Figure 10; our attention beside the fused kernel
    python -m lab.bench scale            # what each layout costs; time and memory against frames and their size
    pip install torchcodec decord        # peers of `data`; torchcodec needs the system's ffmpeg
    python -m lab.bench data             # reading clips: 16 frames of 256x256 from 336x596 H.264
    pip install deepspeed ninja          # the peer of `optimizer`; it compiles itself at its first use
    python -m lab.bench optimizer        # AdamW on the CPU, 100 M parameters

Each has --help. The first GPU is used where there is one, else the CPU, where unet, video and
scale take many minutes.
"""

import importlib
import sys

from cli import run

BENCHMARKS = ("tiny", "step", "unet", "video", "attention", "scale", "data", "optimizer")


def main():
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
    elif name in BENCHMARKS:
        try:
            importlib.import_module(f"lab.bench.{name}").main(arguments)
        except ImportError as error:
            raise ValueError(f"{name} needs a peer that is not installed ({error}): see --help") from error
    else:
        raise ValueError(f"the benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}")


if __name__ == "__main__":
    run(main)
