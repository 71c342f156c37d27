"""The CLIP filter (Equation 5): keep the clips of a list whose frames fit their caption best.

    python -m clips.filter LIST --keep 0.05
    torchrun --nproc_per_node=8 -m clips.filter LIST          # each process takes the next clips, with a GPU of its own

Writes the filtered list beside LIST, in the same form, which of tars is a folder of tars; also LIST.sheet.png with
examples, and LIST.scores-*.jsonl, with which an interrupted call goes on, and which another --keep reads instead of
scoring again.
"""

import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from cli import beside, check_writable, one_line, option, parse, run
from clips.changes import made
from clips.decode import Bad, frames_at, opened
from clips.jobs import appending, in_threads, read_notes, taken
from clips.lists import Items
from clips.pictures import View, fit_frame, upright_size
from clips.tars import write_tars
from training.ranks import Ranks, shared

INVERSE_TEMPERATURE = 1 / 0.07  # the paper's ε
BATCH = 16  # clips scored together


def clip_filter(path: str, keep: float, model: str, pretrained: str, count: int, captions="", ranks=None):
    """Score the clips of a list by `count` frames each, and write a list of the best: `keep` is their share of all.

    ranks  every one of them takes the next clips that are left; rank 0 writes the list
    """
    ranks, items, stem = ranks or Ranks(timeout=600), Items("video", path, captions), os.path.abspath(path)
    by = f"{model}, {pretrained}, {count} frames"
    out, clip = f"{stem}.scores-{ranks.rank}.jsonl", None

    def counts(line: dict) -> bool:
        i = line["item"]
        return line["by"] == by and i < len(items) and line.get("made") == made(items, i)

    def known_scores():
        return read_notes(f"{stem}.scores", counts)

    known = known_scores()
    if len(known) < len(items):
        check_writable(out)
        clip = ClipScore(model, pretrained, ranks.device)
    ranks.from_rank_0("begun", lambda: None)
    if clip:
        left = taken(ranks, "clips", len(items), known)
        shown = tqdm(left, "score", len(items) - len(known), unit="clip", disable=ranks.rank > 0)
        score_items(items, shown, clip, count, by, out)
    ranks.together("scored")
    if ranks.rank == 0:
        write_filtered(items, stem, known_scores(), keep, count)


class ClipScore:
    """Score of a clip: the mean over its frames, and over its captions, of ε cos(image, caption)."""

    def __init__(self, name: str, pretrained: str | None, device):
        import open_clip  # seconds to import, and only needed here

        logging.disable(logging.ERROR)  # it logs what it raises
        self.device, half = torch.device(device), torch.device(device).type == "cuda"
        self.dtype, precision = (torch.float16, "fp16") if half else (torch.float32, "fp32")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained, device=self.device, precision=precision)
            self.tokenize = open_clip.get_tokenizer(name)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"CLIP model {name} ({pretrained}) cannot be loaded: {one_line(error)[:200]}") from error
        self.model.eval().requires_grad_(False)

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """Images as the model wants them (N, 3, H, W)."""
        return torch.stack([self.preprocess(image) for image in images])

    def scores(self, clips: list[tuple[torch.Tensor, tuple[str, ...]]]) -> list[float]:
        """Scores of several clips at once, (pixels, captions) each."""
        pixels = torch.cat([pixels for pixels, _ in clips]).to(self.device, self.dtype)
        tokens = self.tokenize([caption for _, captions in clips for caption in captions]).to(self.device)
        images = torch.cat([self.model.encode_image(part, normalize=True) for part in pixels.split(64)]).float().cpu()
        texts = self.model.encode_text(tokens, normalize=True).float().cpu()
        images = images.split([len(pixels) for pixels, _ in clips])
        texts = texts.split([len(captions) for _, captions in clips])
        return [INVERSE_TEMPERATURE * (image @ text.T).mean().item() for image, text in zip(images, texts)]

    def __call__(self, images: list[Image.Image], captions: tuple[str, ...]) -> float:
        """Score of one clip."""
        return self.scores([(self.pixels(images), captions)])[0]


def spaced_frames(path: str, count: int) -> list[Image.Image]:
    """`count` upright pictures of a video, from the middles of as many equal parts of it. Raises Bad."""
    with opened(path) as video:
        pictures = []
        for frame in frames_at(video, [(n + 0.5) / count * video.duration for n in range(count)]):
            size = map(round, upright_size(frame, video.aspect))
            pictures.append(Image.fromarray(fit_frame(frame, video.aspect, *size, View()).permute(1, 2, 0).numpy()))
        return pictures


def score_items(items: Items, chosen, clip: ClipScore, count: int, by: str, out: str):
    """Append a line to a file for each chosen item: its score, or why it has none."""

    def load(i):
        of = made(items, i)
        try:
            item = items[i]
            return i, of, clip.pixels(spaced_frames(item.path, count)), item.captions
        except Bad as bad:
            return i, of, bad, None

    with appending(out) as file, in_threads(load, chosen, ahead=BATCH) as loaded:
        while part := list(itertools.islice(loaded, BATCH)):
            good = [(pixels, captions) for *_, pixels, captions in part if captions]
            scores = iter(clip.scores(good) if good else ())
            for i, of, pixels, captions in part:
                result = {"score": next(scores)} if captions else {"bad": str(pixels)}
                file.write(json.dumps({"item": i, "by": by, "made": of} | result).encode() + b"\n")
            file.flush()


def write_filtered(items: Items, stem: str, scores: dict[int, dict], keep: float, count: int):
    """Write the filtered list and a sheet of what was kept and what was not; print a histogram of the scores."""
    ranked = sorted((i for i in scores if "score" in scores[i]), key=lambda i: (-scores[i]["score"], i))
    if not ranked:
        raise ValueError(f"no clip of {items.path} could be scored: the reasons are in {stem}.scores-*.jsonl")
    kept = ranked[: max(1, round(keep * len(items)))]
    threshold = scores[kept[-1]]["score"]

    name = os.path.splitext(os.path.basename(stem))[0] + ".filtered"
    if items.tars:
        out = os.path.join(items.folder, re.sub(r"[{}]", "", name))
        write_tars(out, items.tars, sorted(kept))
    else:
        out = os.path.join(items.folder, name + (".csv" if items.csv else ".jsonl"))  # where paths resolve as before
        write_list(out, items, sorted(kept))

    counts, edges = np.histogram([scores[i]["score"] for i in ranked], 20)
    marked = np.searchsorted(edges[1:-1], threshold, side="right")  # the bin of the threshold
    for n, count_in_bin in enumerate(counts):
        bar = "#" * math.ceil(50 * count_in_bin / len(ranked))
        print(f"{edges[n]:8.3f} {count_in_bin:8d}  {bar}{'  <- kept from here on' if n == marked else ''}")
    edge = len(kept)
    shown = [*ranked[:4], *ranked[max(4, edge - 2) : edge + 2], *ranked[max(4, edge + 2, len(ranked) - 4) :]]
    write_sheet(stem + ".sheet.png", items, shown, scores, count)
    print(f"{len(kept)} of {len(items)} clips kept, scores from {threshold:.3f} on: {out}")
    print(f"the best, those at the threshold, and the worst: {stem}.sheet.png")
    for reason, n in Counter(line["bad"] for line in scores.values() if "bad" in line).most_common():
        print(f"{n:8d} not scored: {reason}")


def write_list(path: str, items: Items, kept: list[int]):
    """Write a list of some items of another, each as it stands there, with its line end."""
    lines = [items.records[0]] if items.csv else []
    lines += [items.record(i) for i in kept]
    with beside(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        file.writelines(line if line.endswith(("\r", "\n")) else line + "\n" for line in lines)


def write_sheet(path: str, items: Items, chosen: list[int], scores: dict[int, dict], count: int, side=128):
    """An image with a row for each clip: its frames, and below them its score and caption."""
    sheet = Image.new("RGB", (count * side, len(chosen) * (side + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, i in enumerate(chosen):
        top, said = row * (side + 16), items.name(i)
        try:
            said = items[i].captions[0]
            for n, picture in enumerate(spaced_frames(items[i].path, count)):
                sheet.paste(ImageOps.pad(picture, (side, side)), (n * side, top))
        except Bad as bad:  # since it was scored
            said += f": {bad}"
        draw.text((2, top + side + 2), f"{scores[i]['score']:.2f}  {said}"[:200], fill="black")
    with beside(path) as part:
        sheet.save(part, "PNG")


@dataclass
class Options:
    list: str = option(None, "list of clips with captions", positional=True)
    keep: float = option(0.05, "share of the clips to keep", above=0, high=1)
    model: str = option("ViT-H-14", "CLIP model, by its name in open_clip")
    pretrained: str = option("laion2b_s32b_b79k", "its weights, by their name in open_clip, or a file")
    frames: int = option(4, "frames of a clip that are scored", low=1)
    captions: str = option("", "from_names: without any, the name of the file; else the field that says them")


@shared(awaited="begun")
def main(ranks: Ranks):
    o = parse(Options, __doc__)
    clip_filter(o.list, o.keep, o.model, o.pretrained, o.frames, o.captions, ranks)


if __name__ == "__main__":
    run(main)
