"""x"""

import math
import sys

import numpy as np
from tqdm import tqdm

from clips.decode import Bad
from clips.filter import INVERSE_TEMPERATURE, ClipScore, spaced_frames
from clips.lists import Items

# ---------------------------------------------------------------------------------------------------------------------
# CLIP score


def command_clip(args):
    """100 x the cosine between a video's caption and its frames, mean over frames, then over videos."""
    items = Items("video", args.videos)
    prompts = None
    if args.prompts:
        with open_text(args.prompts) as file:
            prompts = [line.strip() for line in file if line.strip()]
        if len(prompts) != len(items):
            raise ValueError(f"{args.prompts} has {len(prompts)} prompts for {len(items)} videos of {args.videos}")
    clip, scores = ClipScore(args.model, args.pretrained, args.device), []
    for i in tqdm(range(len(items)), unit="video", file=sys.stderr):
        try:
            path, captions = (items.name(i), (prompts[i],)) if prompts else (items[i].path, items[i].captions)
            scores.append(100 / INVERSE_TEMPERATURE * clip(spaced_frames(path, args.frames), captions))
        except Bad as error:
            print(f"skipped {items.name(i)}: {error}", file=sys.stderr)
    if not scores:
        raise ValueError(f"no video of {args.videos} can be used")
    error = np.std(scores, ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    print(f"CLIP score {np.mean(scores):.2f} (standard error {error:.2f}), {len(scores)} videos, {args.model}")


def open_text(path: str):
    try:
        return open(path, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
