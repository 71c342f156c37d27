"""What is done to data once, before training: check it, filter it, encode it ahead. The commands of data.py."""

import glob
import hashlib
import json
import logging
import math
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file
from tqdm import tqdm

from clips.media import VIDEO_FPS, Bad, View, fit_frame, fit_image, frames_at, opened, upright_size
from data import SOURCES, Items, Spec, encode_frames, fingerprint, image_names, offered_fps, read_sample
from sample import check_frames, check_size, check_writable, pick_device
from sd.checkpoint import Parser, UserError, command_line, first_line, load, number_from, parse_size


def read_text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def whole_lines(path: str) -> list[str]:
    """Of a file of JSON lines that an interruption may have torn, or that is not there yet."""
    lines = read_text(path).splitlines(keepends=True) if os.path.exists(path) else []
    return [line for line in lines if line.endswith("\n")]


def write_text(path: str, text: str):
    """Beside, and renamed into place."""
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".part", path)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding ahead: latents on disk, so that training needs neither decoder nor VAE (nor text tower, when that is frozen)

SHARD = 32  # items a file


def encode(model, lists: dict[str, str], out: str, spec: Spec, *, text=False, dtype=torch.float16):
    """Write VAE mean and log-variance of every sample of the lists into a folder; with `text`, its context too.

    Written beside and renamed into place; what an interrupted call has finished is not done again.
    """
    if os.path.exists(out):
        raise UserError(f"{out} is there already: choose another folder, or remove it")
    part, sources = out + ".part", {source: Items(source, path) for source, path in lists.items()}
    origin = {"spec": asdict(spec), "lists": lists, "text": text, "dtype": str(dtype), "vae": fingerprint(model.vae)}
    origin |= {"tower": fingerprint(model.text)} if text else {}
    check_writable(os.path.join(part, "index.jsonl"))
    done = resume_encode(part, origin)
    model.vae.to(memory_format=torch.channels_last)  # a third faster on the CPU
    save_file({"context": encode_text(model, [""], dtype)} if text else {}, os.path.join(part, "empty.safetensors"))
    with open(os.path.join(part, "index.jsonl"), "a", encoding="utf-8") as index:
        for source, items in sources.items():
            bar = tqdm(total=len(items), desc=f"encode {source}", unit="item", mininterval=2)
            for first in range(0, len(items), SHARD):
                chosen = range(first, min(first + SHARD, len(items)))
                name = f"{source}-{first // SHARD:06d}.safetensors"
                if name not in done:
                    lines, tensors = encode_shard(model, items, chosen, spec, text, dtype)
                    save_file(tensors, os.path.join(part, name))
                    index.writelines(json.dumps({"shard": name} | line) + "\n" for line in lines)
                    index.flush()
                bar.update(len(chosen))
            bar.close()
    os.rename(part, out)


def resume_encode(part: str, origin: dict) -> set[str]:
    """Make the folder, or take up one that was left -> its finished shards."""
    settings, index, text = os.path.join(part, "spec.json"), os.path.join(part, "index.jsonl"), json.dumps(origin)
    if not os.path.exists(index):
        write_text(settings, text)
        write_text(index, "")
    if read_text(settings) != text:
        raise UserError(f"{part} was left by an encoding with other settings: remove it")
    lines = whole_lines(index)
    last = lines[-1].partition(",")[0] if lines else ""  # of this shard lines may be missing: it is done again
    whole = [line for line in lines if not line.startswith(last)]
    write_text(index, "".join(whole))
    return {json.loads(line)["shard"] for line in whole}


def encode_shard(model, items: Items, chosen, spec: Spec, text: bool, dtype):
    """(lines of the index, tensors) of some items. What cannot be used is a line that says why."""
    lines, moments, captions = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter; the VAE runs here
        for i, samples in zip(chosen, pool.map(lambda i: list(all_samples(items, i, spec)), chosen)):
            for fps, k, sample in samples:
                line = {"source": items.source, "item": i, "path": items.name(i), "fps": fps, "k": k}
                if isinstance(sample, Bad):
                    lines.append(line | {"bad": str(sample)})
                    continue
                lines.append(line | {"caption": sample.caption, "row": len(moments), "skipped": sample.skipped})
                moments.append(encode_frames(model.vae, sample.data).to(dtype).cpu())
                captions.append(sample.caption)
    tensors = {"moments": torch.stack(moments).contiguous()} if moments else {}
    if text and captions:
        tensors["context"] = encode_text(model, captions, dtype)
    return lines, tensors


def all_samples(items: Items, i: int, spec: Spec):
    """(fps, k, Sample or Bad) of everything that an item offers."""
    try:
        item = items[i]
        with opened(item.path) if items.source == "video" else nullcontext() as video:
            offered = offered_fps(items.source, video, spec)
    except Bad as bad:
        yield None, None, bad
        return
    for fps in offered:
        for k in range(spec.repeats(items.source)):
            try:
                yield fps, k, read_sample(items.source, i, item, spec, lambda _, fps=fps, k=k: (fps, k))
            except Bad as bad:
                yield fps, k, bad


def encode_text(model, captions: list[str], dtype) -> torch.Tensor:
    """Context (B, L, D) of captions, on the CPU."""
    device = next(model.text.parameters()).device
    with torch.no_grad():
        return model.text(model.text.tokenize(captions)[0].to(device)).to(dtype).cpu()


def frame_pool(lists: dict[str, str], count: int, size, seed=0, which=slice(None)) -> torch.Tensor:
    """`count` frames drawn evenly from the sources, for training a VAE: uint8 (count, 3, H, W), in memory.

    which  of each list's items
    """
    rng, pool = np.random.default_rng(seed), []
    for source, path in lists.items():
        items = Items(source, path)
        chosen = np.arange(len(items))[which]
        if not len(chosen):
            raise UserError(f"validation leaves nothing to train on of {len(items)} {source} samples")
        each = math.ceil(count / len(lists) / len(chosen))
        spec = Spec(min(each, 4) if source == "video" else each, *size, fps_values=(1,), seed=seed)
        for i in tqdm(rng.permutation(chosen)[: math.ceil(count / len(lists))], desc=f"frames of {source}"):
            try:
                pool.append(read_sample(source, i, items[i], spec, lambda offered: (offered[0], 0)).data)
            except Bad as bad:
                print(f"skipped {source} {items.name(i)}: {bad}", file=sys.stderr, flush=True)
    if not pool:
        raise UserError(f"no frame of {', '.join(lists.values())} can be used: the reasons are above")
    return torch.cat(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Check a list


def check(source: str, path: str, spec: Spec):
    """Print what of a list cannot be used, counted by reason; name every case in a file beside the list."""
    items, reasons, seen = Items(source, path), Counter(), {}
    out = os.path.join(items.folder, os.path.basename(path.rstrip("/")) + ".check.jsonl")
    check_writable(out)
    with open(out + ".part", "w", encoding="utf-8") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(items), 1024):  # map() takes all there is at once
            chosen = range(first, min(first + 1024, len(items)))
            bar = tqdm(pool.map(lambda i: check_item(items, i, spec), chosen), total=len(chosen), desc="check")
            for i, found in zip(chosen, bar):
                for name, reason, digest in found:
                    kind = reason
                    if reason is None and digest in seen:
                        kind, reason = "duplicated", f"the same as {seen[digest]}"
                    elif reason is None:
                        seen[digest] = name
                        continue
                    reasons[kind] += 1
                    file.write(json.dumps({"item": i, "path": name, "reason": reason}) + "\n")
    os.replace(out + ".part", out)
    print(f"{len(items)} items, {len(seen)} files that can be used, {reasons.total()} that cannot:")
    for reason, n in reasons.most_common():
        print(f"{n:8d}  {reason}")
    print(f"each of them: {out}")


def check_item(items: Items, i: int, spec: Spec) -> list[tuple[str, str | None, bytes | None]]:
    """(name, reason or None, what its bytes hash to) of the files of an item."""
    name = items.name(i)
    try:
        path, names = items[i].path, None
        if items.source == "label":
            names = [os.path.join(path, name) for name in image_names(path)]
            if not names:
                raise Bad("no image in it")
    except Bad as bad:
        return [(name, str(bad), None)]
    return [check_file(items.source, path, spec) for path in names or [path]]


def check_file(source: str, path: str, spec: Spec):
    try:
        if source == "video":
            with opened(path) as video:
                offered_fps(source, video, spec)
                frames_at(video, [0])
                frames_at(video, [video.duration - 1 / video.rate])
        else:
            fit_image(path, spec.width, spec.height, View())
    except Bad as bad:
        return path, str(bad), None
    return path, None, digest(path)


def digest(path: str, part=1 << 16) -> bytes:
    """Of the length of a file and its beginning, middle and end: enough to find one that was saved twice."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        found = hashlib.blake2b(str(size).encode(), digest_size=16)
        for at in (0, max(0, size // 2), max(0, size - part)):
            file.seek(at)
            found.update(file.read(part))
    return found.digest()


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
            raise UserError(f"CLIP model {name} ({pretrained}) cannot be loaded: {first_line(error)}") from error
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
        raise UserError(f"no clip of {items.path} could be scored; the reasons are in {stem}.scores-*.jsonl")
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


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments():
    parser = Parser(description="Prepare training data.")
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("check", help="report what of a list cannot be used, and why")
    p.add_argument("list", metavar="LIST")
    p.add_argument("--source", choices=SOURCES, default="video")
    p.add_argument("--frames", type=number_from(1), default=16, help="of a clip: shorter videos are too short")

    p = commands.add_parser("filter", help="keep the clips whose frames fit their caption best (Equation 5)")
    p.add_argument("list", metavar="LIST")
    p.add_argument("--keep", type=float, default=0.05, help="the share that is kept")
    p.add_argument("--model", default="ViT-H-14", help="of open_clip")
    p.add_argument("--pretrained", default="laion2b_s32b_b79k", help="open_clip's name of the weights, or a file")
    p.add_argument("--frames", type=number_from(1), default=4, help="scored of each clip")

    p = commands.add_parser("encode", help="store the VAE latents of every sample")
    p.add_argument("out", metavar="OUT")
    p.add_argument("--ckpt", required=True, help="the model whose VAE and text tower encode")
    for source in SOURCES:
        p.add_argument(f"--{source}", metavar="LIST")
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--size", default="256x256", metavar="WxH")
    p.add_argument("--fps", type=number_from(1, 60), nargs="+", default=VIDEO_FPS)
    p.add_argument("--starts", type=number_from(1), default=1, help="samples a clip and FPS")
    p.add_argument("--draws", type=number_from(1), default=16, help="samples a label")
    p.add_argument("--random_crop", action="store_true", help="instead of the middle")
    p.add_argument("--flip", action="store_true", help="half of the samples whose caption cannot mention a side")
    p.add_argument("--text", action="store_true", help="store the context of the captions too: no text tower to train")
    p.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of what is stored")
    p.add_argument("--seed", type=number_from(0), default=0)
    p.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    if args.command == "check":
        check(args.source, args.list, Spec(args.frames, 64, 64))
    elif args.command == "filter":
        if not 0 < args.keep <= 1:
            raise UserError(f"--keep {args.keep} is no share: it lies in 0..1")
        clip_filter(args.list, args.keep, args.model, args.pretrained, args.frames)
    else:
        lists = {source: getattr(args, source) for source in SOURCES if getattr(args, source)}
        if not lists:
            raise UserError("nothing to encode: name a list with --video, --label or --caption")
        spec = Spec(args.frames, *parse_size(args.size), tuple(args.fps), args.starts, args.draws, args.random_crop,
                    args.flip, args.seed)
        model = load(args.ckpt, pick_device(args.device))
        check_frames(args.frames)
        check_size((spec.width, spec.height), spec.frames, model)
        encode(model, lists, args.out, spec, text=args.text, dtype=getattr(torch, args.dtype))


if __name__ == "__main__":
    command_line(main)
