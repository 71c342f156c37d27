"""Encode samples ahead: store the VAE's latents of every sample, so that training needs neither decoder nor VAE.

    python -m clips.encode OUT --ckpt MODEL --video LIST --label FOLDER --caption LIST
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import sd
from cli import check_writable, option, parse, read_size, run, write_text
from clips.decode import VIDEO_FPS, Bad, opened
from clips.encoded import fingerprint, read_text, whole_lines
from clips.lists import Items
from clips.samples import SOURCES, Spec, offered_fps, read_sample
from sd.device import pick_device
from sd.vae import encode_frames

SHARD = 32  # items a file


def encode(model, lists: dict[str, str], out: str, spec: Spec, *, text=False, dtype=torch.float16):
    """Write VAE mean and log-variance of every sample of the lists into a folder; with `text`, its context too.

    Written beside and renamed into place; what an interrupted call has finished is not done again.
    """
    if os.path.exists(out):
        raise ValueError(f"{out} is there already: choose another folder, or remove it")
    part, sources = out + ".part", {source: Items(source, path) for source, path in lists.items()}
    origin = {"spec": asdict(spec), "lists": lists, "text": text, "dtype": str(dtype), "vae": fingerprint(model.vae)}
    origin |= {"tower": fingerprint(model.text)} if text else {}
    check_writable(os.path.join(part, "index.jsonl"))
    done = resume_encode(part, origin)
    model.vae.to(memory_format=torch.channels_last)  # a third faster on the CPU
    save_file({"context": model.text.encode([""]).to(dtype).cpu()} if text else {}, os.path.join(part, "empty.safetensors"))
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
        raise ValueError(f"{part} was left by an encoding with other settings: remove it")
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
        tensors["context"] = model.text.encode(captions).to(dtype).cpu()
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


@dataclass
class Options:
    out: str = option(None, "folder to write", positional=True)
    ckpt: str = option("", "the model whose VAE and text tower encode")
    video: str = option("", "list of clips", metavar="LIST")
    label: str = option("", "folder of a folder of images per label, or a file of their names", metavar="LIST")
    caption: str = option("", "list of captioned images", metavar="LIST")
    frames: int = option(16, "of a clip", low=1)
    size: tuple[int, int] = option((256, 256), "of a frame in pixels", metavar="WxH", read=read_size)
    fps: tuple[int, ...] = option(VIDEO_FPS, "frame rates of clips", low=1, high=60)
    starts: int = option(1, "samples per clip and FPS", low=1)
    draws: int = option(16, "samples per label", low=1)
    random_crop: bool = option(False, "instead of the middle")
    flip: bool = option(False, "mirror half of the samples whose caption cannot mention a side")
    text: bool = option(False, "store the context of the captions too, for training with a frozen text tower")
    dtype: str = option("float16", "of what is stored", choices=("float16", "float32"))
    seed: int = option(0, "of crops, starts and captions", low=0)
    device: str = option("", "cuda, mps or cpu (default: the first of them that is there)")


def main():
    o = parse(Options, __doc__)
    lists = {source: getattr(o, source) for source in SOURCES if getattr(o, source)}
    if not lists:
        raise ValueError("nothing to encode: name a list with --video, --label or --caption")
    if not o.ckpt:
        raise ValueError("ckpt must be given: the model whose VAE encodes")
    model = sd.load(o.ckpt, pick_device(o.device))
    model.check_size(*o.size, o.frames)
    spec = Spec(o.frames, *o.size, o.fps, o.starts, o.draws, o.random_crop, o.flip, o.seed)
    encode(model, lists, o.out, spec, text=o.text, dtype=getattr(torch, o.dtype))


if __name__ == "__main__":
    run(main)
