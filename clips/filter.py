"""The CLIP filter (Equation 5).

    python -m clips.filter LIST --keep 0.05
"""

import glob
import json
import logging
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from cli import check_writable, one_line, option, parse, run, write_text
from clips.decode import Bad, frames_at, opened
from clips.encoded import whole_lines
from clips.lists import Items
from clips.pictures import View, fit_frame, upright_size

# ---------------------------------------------------------------------------------------------------------------------
# The CLIP filter (Equation 5)


INVERSE_TEMPERATURE = 1 / 0.07  # the paper's ε


class ClipScore:
    """Score of a clip: the mean over frames of ε cos(image, caption); of several captions, their mean."""

    def __init__(self, name: str, pretrained: str | None, device):
        import open_clip  # seconds to import, and only needed here

        logging.disable(logging.ERROR)  # it logs what it raises
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(name, pretrained, device=device)
            self.tokenize = open_clip.get_tokenizer(name)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"CLIP model {name} ({pretrained}) cannot be loaded: {one_line(error)}") from error
        self.model.eval().requires_grad_(False)
        self.device = device

    def __call__(self, images: list[Image.Image], captions: tuple[str, ...]) -> float:
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        image = self.model.encode_image(pixels, normalize=True)
        text = self.model.encode_text(self.tokenize(list(captions)).to(self.device), normalize=True)
        return INVERSE_TEMPERATURE * (image @ text.T).mean().item()


def spaced_frames(path: str, count: int) -> list[Image.Image]:
    """`count` upright pictures from the middles of as many equal parts of a video."""
    with opened(path) as video:
        frames = frames_at(video, [(n + 0.5) / count * video.duration for n in range(count)])
        pictures = []
        for frame in frames:
            size = map(round, upright_size(frame, video.aspect))
            pictures.append(Image.fromarray(fit_frame(frame, video.aspect, *size, View()).permute(1, 2, 0).numpy()))
        return pictures


def clip_filter(path: str, keep: float, model: str, pretrained: str | None, count: int):
    """Score every clip of a list, and write the best share of it beside the list, in the list's own form.

    Scores are kept as they come: an interrupted call goes on. Under torchrun every rank scores its share.
    """
    items, stem = Items("video", path), path.rstrip("/")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may wait long for the others
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    by = f"{model}, {pretrained}, {count} frames, list of {len(items)}"  # scores by anything else do not count
    scores = read_scores(stem, by)
    left = [i for i in range(rank, len(items), world) if i not in scores]
    if left:
        check_writable(f"{stem}.scores-{rank}.jsonl")
        clip = ClipScore(model, pretrained, device)
        score_items(items, left, clip, count, by, f"{stem}.scores-{rank}.jsonl", rank == 0)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        write_filtered(items, stem, read_scores(stem, by), keep, count)


def score_items(items: Items, chosen: list[int], clip: ClipScore, count: int, by: str, out: str, show: bool):
    """Append a line for each item: its score, or why there is none."""

    def load_item(i):
        try:
            item = items[i]
            return item.captions, spaced_frames(item.path, count)
        except Bad as bad:
            return bad

    write_text(out, "".join(whole_lines(out)))
    bar = tqdm(total=len(chosen), desc="score", unit="clip", disable=not show)
    with ThreadPoolExecutor(os.cpu_count()) as pool, open(out, "a", encoding="utf-8") as file:
        for at in range(0, len(chosen), 64):
            part = chosen[at : at + 64]
            for i, loaded in zip(part, pool.map(load_item, part)):
                found = {"bad": str(loaded)} if isinstance(loaded, Bad) else {"score": clip(loaded[1], loaded[0])}
                file.write(json.dumps({"item": i, "by": by} | found) + "\n")
                bar.update()
            file.flush()


def read_scores(stem: str, by: str) -> dict[int, dict]:
    """item -> its line, of every rank's file."""
    found = {}
    for path in sorted(glob.glob(glob.escape(stem) + ".scores-*.jsonl")):
        found |= {line["item"]: line for line in map(json.loads, whole_lines(path)) if line["by"] == by}
    return found


def write_filtered(items: Items, stem: str, scores: dict, keep: float, count: int):
    """The filtered list, the histogram of the scores, and a sheet of what was kept and what was thrown away."""
    ranked = sorted((i for i in scores if "score" in scores[i]), key=lambda i: (-scores[i]["score"], i))
    if not ranked:
        raise ValueError(f"no clip of {items.path} could be scored; the reasons are in {stem}.scores-*.jsonl")
    kept = ranked[: max(1, round(keep * len(items)))]
    header = [items.records[0]] if items.csv else []
    name = os.path.splitext(os.path.basename(stem))[0] + ".filtered" + (".csv" if items.csv else ".jsonl")
    out = os.path.join(items.folder, name)  # where relative paths resolve as before
    write_text(out, "".join(text.rstrip("\r\n") + "\n" for text in header + [items.record(i) for i in sorted(kept)]))
    values = np.array([scores[i]["score"] for i in ranked])
    for low, n in zip(np.histogram(values, 20)[1], np.histogram(values, 20)[0]):
        mark = "  <- kept from here on" if low <= values[len(kept) - 1] < low + np.ptp(values) / 20 else ""
        print(f"{low:8.3f} {n:8d}  {'#' * math.ceil(50 * n / len(values))}{mark}")
    edge = len(kept)
    rows = [*ranked[:4], *ranked[max(4, edge - 2) : edge + 2], *ranked[max(4, edge + 2, len(ranked) - 4) :]]
    write_sheet(stem + ".sheet.png", items, rows, scores, count)
    bad = Counter(line["bad"] for line in scores.values() if "bad" in line)
    print(f"{len(kept)} of {len(items)} clips kept, scores from {values[edge - 1]:.3f} on: {out}")
    print(f"the best, those at the threshold, and the worst: {stem}.sheet.png")
    for reason, n in bad.most_common():
        print(f"{n:8d} not scored: {reason}")


def write_sheet(path: str, items: Items, chosen: list[int], scores: dict, count: int, side=128):
    """A row a clip: its frames, and under them score and caption."""
    sheet = Image.new("RGB", (count * side, len(chosen) * (side + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, i in enumerate(chosen):
        item, top = items[i], row * (side + 16)
        for n, picture in enumerate(spaced_frames(item.path, count)):
            sheet.paste(ImageOps.pad(picture, (side, side)), (n * side, top))
        draw.text((2, top + side + 2), f"{scores[i]['score']:.2f}  {item.captions[0]}"[:200], fill="black")
    sheet.save(path)


@dataclass
class Options:
    list: str = option(None, "clips with captions", positional=True)
    keep: float = option(0.05, "share that is kept", above=0, high=1)
    model: str = option("ViT-H-14", "of open_clip")
    pretrained: str = option("laion2b_s32b_b79k", "open_clip's name of the weights, or a file")
    frames: int = option(4, "scored per clip", low=1)


def main():
    o = parse(Options, __doc__)
    clip_filter(o.list, o.keep, o.model, o.pretrained, o.frames)


if __name__ == "__main__":
    run(main)
