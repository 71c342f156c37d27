"""Encode samples ahead: VAE latents of all samples into a folder, so that training needs neither videos nor the VAE.

    python -m clips.encode OUT --ckpt MODEL --video LIST --label FOLDER --caption LIST
    python -m clips.encode OUT --ckpt MODEL --video LIST --text          # and train with a frozen text tower

Frames, size, FPS values and the rest must be what the training config says. Interrupted, the same command goes on.
"""

import itertools
import json
import os
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import sd
from cli import option, parse, read_size, run, write_text
from clips.decode import VIDEO_FPS, Bad
from clips.encoded import fingerprint
from clips.jobs import appending, in_threads
from clips.lists import Items
from clips.samples import SOURCES, Spec, offered_fps, read_sample, video_of
from sd.device import pick_device
from sd.vae import encode_frames

SHARD = 32  # items whose samples share a file


def encode(model, lists: dict[str, str], out: str, spec: Spec, *, text=False, dtype=torch.float16):
    """Write the VAE's mean and log-variance of every sample of some lists into a folder; with `text` its context too.

    The work is done in OUT.part, which is renamed at its end; what an interrupted call has finished stays finished.
    """
    require_absent(out)
    sources, part = [Items(source, path) for source, path in lists.items()], out + ".part"
    origin = {"spec": asdict(spec), "lists": lists, "text": text, "dtype": str(dtype), "vae": fingerprint(model.vae)}
    origin |= {"tower": fingerprint(model.text)} if text else {}
    os.makedirs(part, exist_ok=True)
    with appending(os.path.join(part, "index.jsonl")) as index:
        require_absent(out)  # another process may have finished it just now
        done = resume(part, index, origin)
        model.vae.to(memory_format=torch.channels_last)  # a third faster on the CPU
        empty = {"context": model.text.encode([""]).to(dtype).cpu()} if text else {}
        save_file(empty, os.path.join(part, "empty.safetensors"))
        for items in sources:
            encode_source(model, items, part, index, done, spec, text, dtype)
        os.rename(part, out)


def encode_source(model, items: Items, part: str, index, done: set[str], spec: Spec, text: bool, dtype):
    """Encode a list shard by shard, without those that are done; threads decode ahead of the VAE, which works here."""
    left = [i for i in range(len(items)) if shard_name(items, i) not in done]
    bar = tqdm(left, f"encode {items.source}", len(items), initial=len(items) - len(left), unit="item", mininterval=2)
    with in_threads(lambda i: all_samples(items, i, spec), left, ahead=SHARD) as found:
        for name, chosen in itertools.groupby(zip(bar, found), lambda pair: shard_name(items, pair[0])):
            lines, tensors = encode_shard(model, items, chosen, text, dtype)
            save_file(tensors, os.path.join(part, name))
            index.writelines(json.dumps({"shard": name} | line).encode() + b"\n" for line in lines)
            index.flush()


def require_absent(out: str):
    if os.path.exists(out):
        raise ValueError(f"{out} is there already: choose another folder, or remove it")


def shard_name(items: Items, i: int) -> str:
    return f"{items.source}-{i // SHARD:06d}.safetensors"


def resume(part: str, index, origin: dict) -> set[str]:
    """Take up what an interrupted call left, or note what a new one is made from -> the shards that are finished."""
    begins, at, settings = {}, 0, os.path.join(part, "spec.json")
    for line in index:
        begins.setdefault(json.loads(line)["shard"], at)
        at += len(line)
    if not begins:
        write_text(settings, json.dumps(origin))
        return set()
    with open(settings, encoding="utf-8") as file:
        if file.read() != json.dumps(origin):
            raise ValueError(f"{part} was left by an encoding with other settings: remove it")
    index.truncate(begins.popitem()[1])  # of the last shard lines may be missing: it is encoded again
    return set(begins)


def all_samples(items: Items, i: int, spec: Spec) -> list:
    """(fps, k, Sample or Bad) of everything that an item offers."""
    try:
        item = items[i]
        with video_of(items.source, item) as video:
            offered = offered_fps(items.source, video, spec)
    except Bad as bad:
        return [(None, None, bad)]
    found = []
    for fps, k in itertools.product(offered, range(spec.repeats(items.source))):
        try:
            with video_of(items.source, item) as video:
                found.append((fps, k, read_sample(items.source, i, item, video, spec, fps, k)))
        except Bad as bad:
            found.append((fps, k, bad))
    return found


def encode_shard(model, items: Items, chosen, text: bool, dtype):
    """(lines of the index, tensors) of some items, (i, what all_samples found). A Bad gets a line that says why."""
    lines, moments, captions = [], [], []
    for i, samples in chosen:
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
        tensors["context"] = model.text.encode(captions).to(dtype).cpu()
    return lines, tensors


@dataclass
class Options:
    out: str = option(None, "folder to write", positional=True)
    ckpt: str = option("", "the model whose VAE and text tower encode", metavar="MODEL")
    video: str = option("", "list of clips", metavar="LIST")
    label: str = option("", "folder with a folder of images for each label, or a file of their names", metavar="FOLDER")
    caption: str = option("", "list of captioned images", metavar="LIST")
    frames: int = option(16, "frames of a clip", low=1)
    size: tuple[int, int] = option((256, 256), "size of a frame in pixels", metavar="WxH", read=read_size)
    fps: tuple[int, ...] = option(VIDEO_FPS, "FPS values of clips, like 8,15,30", low=1, high=60)
    starts: int = option(1, "samples of a clip at each FPS", low=1)
    draws: int = option(16, "samples of a label", low=1)
    random_crop: bool = option(False, "crop frames at random instead of in the middle")
    flip: bool = option(False, "mirror half of the samples, but none whose caption may mention a side")
    text: bool = option(False, "store the contexts of captions too, for training with a frozen text tower")
    dtype: str = option("float16", "precision of what is stored", choices=("float16", "float32"))
    seed: int = option(0, "seed of crops, starts and captions", low=0)
    device: str = option("", "cuda, mps or cpu; default: the first of them that is there")


def main():
    o = parse(Options, __doc__)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("encoding is the work of one process: start it with python, not with torchrun")
    lists = {source: getattr(o, source) for source in SOURCES if getattr(o, source)}
    if not lists:
        raise ValueError("nothing to encode: give a list with --video, --label or --caption")
    if not o.ckpt:
        raise ValueError("ckpt must be given: the model whose VAE encodes")
    require_absent(o.out)
    model = sd.load(o.ckpt, pick_device(o.device))
    model.check_size(*o.size, o.frames)
    spec = Spec(o.frames, *o.size, o.fps, o.starts, o.draws, o.random_crop, o.flip, o.seed)
    encode(model, lists, o.out, spec, text=o.text, dtype=getattr(torch, o.dtype))


if __name__ == "__main__":
    run(main)
