"""Encode samples ahead: VAE latents of all samples into a folder, so that training needs neither videos nor the VAE.

    python -m clips.encode OUT --ckpt MODEL --video LIST --label FOLDER --caption LIST
    python -m clips.encode OUT --ckpt MODEL --video LIST --text          # and train with a frozen text tower
    python -m clips.encode OUT --ckpt MODEL --update                     # again what has changed since

Frames, size, FPS values and the rest must be what the training config says. Interrupted, the same command goes on.
"""

import itertools
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

import sd
from cli import option, parse, read_size, read_text, run, warn, write_text
from clips.changes import described, hexes, is_stale, made_from
from clips.decode import VIDEO_FPS, Bad
from clips.encoded import LINE_START, EncodedClips, fingerprint, read_settings
from clips.jobs import appending, in_threads
from clips.lists import Items
from clips.samples import SOURCES, Spec, offered_fps, read_sample, video_of
from sd.checkpoint import write_tensors
from sd.device import pick_device
from sd.vae import encode_frames

SHARD = 32  # items whose samples share a file
FORMER = "former"  # where a folder lies, in the one that replaces it, between two renames


def encode(model, lists: dict[str, str], out: str, spec: Spec, *, text=False, dtype=torch.float16, update=False):
    """Write the VAE's mean and log-variance of every sample of some lists into a folder; with `text` its context too.

    The work is done in OUT.part, which is renamed at its end; what an interrupted call has finished stays finished.

    update  replace the folder by one as if encoded anew; moments of items that have not changed are taken from it
    """
    if not update:
        require_absent(out)
    sources, part, reasons = [Items(*named, spec.captions) for named in lists.items()], out + ".part", Counter()
    made = {items.source: made_from(items) for items in sources}
    origin = {"spec": asdict(spec), "lists": lists, "text": text, "dtype": str(dtype), "vae": fingerprint(model.vae)}
    origin |= {"tower": fingerprint(model.text)} if text else {}
    os.makedirs(part, exist_ok=True)
    with appending(os.path.join(part, "index.jsonl")) as index:
        if not update:
            require_absent(out)  # another process may have finished it just now
        old, same = former(out, origin, made) if update else (None, {s: np.zeros(len(made[s]), bool) for s in made})
        done = resume(part, index, origin, made)
        model.vae.to(memory_format=torch.channels_last)  # a third faster on the CPU
        empty = {"context": model.text.encode([""]).to(dtype).cpu()} if text else {}
        write_tensors(empty, os.path.join(part, "empty.safetensors"))
        for items in sources:
            hashes = made[items.source]
            for name, lines, tensors in shards(model, items, done, spec, text, dtype, hashes, old, same[items.source]):
                if tensors is None:
                    link(os.path.join(out, name), os.path.join(part, name))
                else:
                    write_tensors(tensors, os.path.join(part, name))
                reasons.update(line["bad"] for line in lines if "bad" in line)
                index.writelines(json.dumps(line).encode() + b"\n" for line in lines)
                index.flush()
        if os.name == "nt":  # no folder can be renamed there while a file in it is open
            del old
            index.close()
        if update:
            os.rename(out, os.path.join(part, FORMER))
        os.rename(part, out)
    shutil.rmtree(os.path.join(out, FORMER), ignore_errors=True)
    if reasons:
        why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
        warn(f"{reasons.total()} samples cannot be used ({why}): clips.check names their files")


def shards(model, items: Items, done, spec: Spec, text: bool, dtype, made, old: EncodedClips | None, same):
    """Yield (name, lines of the index, tensors) of the shards of a list, without those that are done.

    Threads decode ahead of the VAE, which works here. Items that are the `same` as in an `old` folder are taken from
    there; of a shard of nothing else the tensors are None: its file can stay as it is.
    """
    left = [i for i in range(len(items)) if (items.source, i // SHARD) not in done]

    def read(i: int):
        return old.lines(items.source, i) if same[i] else all_samples(items, i, spec)

    bar = tqdm(left, f"encode {items.source}", len(items), initial=len(items) - len(left), unit="item", mininterval=2)
    with in_threads(read, left, ahead=SHARD) as found:
        for n, chosen in itertools.groupby(zip(bar, found), lambda pair: pair[0] // SHARD):
            if same[n * SHARD : (n + 1) * SHARD].all():
                lines = [line | {"path": items.name(i)} for i, lines in chosen for line in lines]
                yield lines[0]["shard"], lines, None
                continue
            name = f"{items.source}-{n:06d}.safetensors"
            while old and os.path.exists(os.path.join(old.folder, name)):
                name = f"+{name}"  # another name than before: whoever is reading there must not take it for the old
            chosen = ((i, old_samples(old, found) if same[i] else found) for i, found in chosen)
            yield name, *encode_shard(model, items, chosen, name, text, dtype, made)


def require_absent(out: str):
    if os.path.exists(out):
        raise ValueError(f"{out} is there already: choose another folder, or remove it")


def resume(part: str, index, origin: dict, made) -> set[tuple[str, int]]:
    """Take up what an interrupted call left, or note what a new one is made from -> the shards that are finished.

    They are (source, number), from the first on, up to one whose items have changed meanwhile.
    """
    begins, at, last, settings = {}, 0, 0, os.path.join(part, "spec.json")
    for line in index:
        start = LINE_START.match(line)
        if not start:
            raise ValueError(f"{part}/index.jsonl is damaged: remove {part}")
        source, item = start[2].decode(), int(start[3])
        shard = source, item // SHARD
        if begins and shard not in begins:
            others, n = next(reversed(begins))
            if last + 1 < min((n + 1) * SHARD, len(made[others])):
                break  # the list has grown
        begins.setdefault(shard, at)
        if item >= len(made[source]) or start[4] != hexes(made[source][item]).encode():
            break
        at, last = at + len(line), item
    if not begins:
        write_text(settings, json.dumps(origin))
        return set()
    if read_text(settings) != json.dumps(origin):
        raise ValueError(f"{part} was left by an encoding with other settings: remove it")
    index.truncate(begins.popitem()[1])  # of the last shard lines may be missing: it is encoded again
    return set(begins)


def former(out: str, origin: dict, made) -> tuple[EncodedClips, dict[str, np.ndarray]]:
    """A folder that is to be updated, and which items (N,) of each source can be taken from it."""
    old, theirs, same = EncodedClips(out), read_settings(out), {}
    for name, ours in origin.items():
        if name != "lists" and (asdict(theirs[name]) if name == "spec" else theirs.get(name)) != ours:
            raise ValueError(f"{out} was encoded with another {name}: choose another folder, or remove it")
    for source, now in made.items():
        then = old.made(source)
        if then is None:
            raise ValueError(f"{out} does not say what it was made from: remove it, and encode again")
        if then[:, 1].any() and not now[:, 1].any():
            raise ValueError(f"none of the files of {origin['lists'][source]} is there: nothing is updated")
        both = min(len(then), len(now))
        same[source] = np.zeros(len(now), bool)
        same[source][:both] = (then[:both] == now[:both]).all(axis=1)
    return old, same


def old_samples(old: EncodedClips, lines: list[dict]) -> list:
    """What all_samples found of an item when it was encoded, with moments for frames."""
    found = []
    for line in lines:
        try:
            found.append((line["fps"], line["k"], old.sample_of(line)))
        except Bad as bad:
            found.append((line["fps"], line["k"], bad))
    return found


def link(old: str, new: str):
    """Let a file have one more name, or copy it where the file system cannot do that."""
    if os.path.lexists(new):
        os.remove(new)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


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


def encode_shard(model, items: Items, chosen, name: str, text: bool, dtype, made):
    """(lines of the index, tensors) of some items, (i, what all_samples found). A Bad gets a line that says why."""
    lines, moments, captions = [], [], []
    for i, samples in chosen:
        for fps, k, sample in samples:
            line = {"shard": name, "source": items.source, "item": i, "made": hexes(made[i]), "path": items.name(i),
                    "fps": fps, "k": k}
            if isinstance(sample, Bad):
                lines.append(line | {"bad": str(sample)})
                continue
            lines.append(line | {"caption": sample.caption, "row": len(moments), "skipped": sample.skipped})
            data = sample.data if sample.data.is_floating_point() else encode_frames(model.vae, sample.data)
            moments.append(data.to(dtype).cpu())
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
    starts: int = option(1, "samples of a clip at each FPS", low=1, high=1000)
    draws: int = option(16, "samples of a label", low=1, high=1000)
    random_crop: bool = option(False, "crop frames at random instead of in the middle")
    flip: bool = option(False, "mirror half of the samples, but none whose caption may mention a side")
    background: str = option("white", "color that shows through what is transparent, like white or #ffcc00")
    captions: str = option("", "from_names: without any, the name of the file", choices=("", "from_names"))
    text: bool = option(False, "store the contexts of captions too, for training with a frozen text tower")
    dtype: str = option("float16", "precision of what is stored", choices=("float16", "float32"))
    seed: int = option(0, "seed of crops, starts and captions", low=0)
    device: str = option("", "cuda, mps or cpu; default: the first of them that is there")
    update: bool = option(False, "encode again what has changed in the lists of a folder, with the options of then")


def main():
    o = parse(Options, __doc__)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("encoding is the work of one process: start it with python, not with torchrun")
    lists = {source: getattr(o, source) for source in SOURCES if getattr(o, source)}
    out = os.path.realpath(o.out)  # a link may lead to a larger disk
    between = os.path.join(out + ".part", FORMER)
    if not os.path.exists(out) and os.path.exists(between):
        os.rename(between, out)  # an update was interrupted between its two renames
    if o.update or os.path.exists(o.out):
        o, lists = options_of_then(o, lists)
    if not lists:
        raise ValueError("nothing to encode: give a list with --video, --label or --caption")
    if not o.ckpt:
        raise ValueError("ckpt must be given: the model whose VAE encodes")
    if os.path.exists(o.out):
        changes = EncodedClips(o.out, text=False).changes(lists)
        if not o.update or changes is None:
            what = "run this with --update" if is_stale(changes) else "choose another folder"
            raise ValueError(f"{o.out} is there already, and {described(changes)}: {what}, or remove it")
        print(f"{o.out}: {described(changes)}")
        if not is_stale(changes) and not changes["absent"]:
            return
    for path in lists.values():
        os.stat(path)  # now, not after a model is loaded
    spec = Spec(o.frames, *o.size, o.fps, o.starts, o.draws, o.random_crop, o.flip, o.background, o.captions, o.seed)
    model = sd.load(o.ckpt, pick_device(o.device))
    model.check_size(*o.size, o.frames)
    encode(model, lists, out, spec, text=o.text, dtype=getattr(torch, o.dtype), update=o.update)


def options_of_then(o: Options, lists: dict[str, str]) -> tuple[Options, dict[str, str]]:
    """The options and lists that a folder was encoded with; lists that are given now go before those."""
    then = read_settings(o.out)
    spec = asdict(then["spec"])
    known = {"size": (spec.pop("width"), spec.pop("height")), "fps": spec.pop("fps_values"), **spec,
             "text": then["text"], "dtype": then["dtype"].removeprefix("torch.")}
    for name, value in known.items():
        allowed = (value, getattr(Options, name)) if o.update else (value,)
        if getattr(o, name) not in allowed:
            raise ValueError(f"{o.out} was encoded with {name} = {value}, not {getattr(o, name)}: choose another "
                             "folder, or remove it")
    return replace(o, **known), then["lists"] | lists


if __name__ == "__main__":
    run(main)
