"""CLIP score of videos: 100 x the cosine between a caption and each frame, mean over frames, then over videos.

    python -m lab.evals.clip VIDEOS --prompts prompts.txt
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from cli import option, parse, run
from clips.decode import Bad
from clips.filter import INVERSE_TEMPERATURE, ClipScore, spaced_frames
from clips.given import read_prompts
from clips.lists import Items
from sd.device import pick_device


@dataclass
class Options:
    videos: str = option(None, "a list, or a folder of videos", positional=True)
    prompts: str = option("", "one a line, in the order of the videos, instead of captions", metavar="FILE")
    frames: int = option(16, "scored of each video", low=1)
    model: str = option("ViT-B-32", "of open_clip")
    pretrained: str = option("openai", "open_clip's name of the weights, or a file")
    device: str = option("", "cuda, mps or cpu (default: the first of them that is there)")


def main():
    o = parse(Options, __doc__)
    items, prompts = Items("video", o.videos), None
    if o.prompts:
        prompts = read_prompts(o.prompts)
        if len(prompts) != len(items):
            raise ValueError(f"{o.prompts} must have a prompt for each of the {len(items)} videos of {o.videos}, got "
                             f"{len(prompts)}")
    clip, scores = ClipScore(o.model, o.pretrained, pick_device(o.device)), []
    for i in tqdm(range(len(items)), unit="video", file=sys.stderr):
        try:
            path, captions = (items.name(i), (prompts[i],)) if prompts else (items[i].path, items[i].captions)
            scores.append(100 / INVERSE_TEMPERATURE * clip(spaced_frames(path, o.frames), captions))
        except Bad as error:
            print(f"skipped {items.name(i)}: {error}", file=sys.stderr)
    if not scores:
        raise ValueError(f"no video of {o.videos} can be used")
    error = np.std(scores, ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    print(f"CLIP score {np.mean(scores):.2f} (standard error {error:.2f}), {len(scores)} videos, {o.model}")


if __name__ == "__main__":
    run(main)
