"""Encode samples ahead: VAE latents of all samples into a folder, so that training needs neither videos nor the VAE.

    python -m clips.encode OUT --ckpt MODEL --video LIST --label FOLDER --caption LIST
    python -m clips.encode OUT --ckpt MODEL --video LIST --text          # and train with a frozen text tower
    python -m clips.encode OUT --ckpt MODEL --update                     # again what has changed since
    torchrun --nproc_per_node=8 -m clips.encode OUT --ckpt MODEL --video LIST

Frames, size, FPS values and the rest must be what the training config says. Interrupted, the same command goes on, with
as many processes as then or others.
"""

import itertools
import json
import os
import platform
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import sd
from cli import beside, option, parse, read_json, read_size, read_text, run, warn, write_text
from clips.changes import described, hashes, hexes, is_stale
from clips.decode import VIDEO_FPS
from clips.encoded import EncodedClips, as_spec, fingerprint, index_of, lines_of, read_settings
from clips.encoder import Encoder, all_samples, old_samples
from clips.jobs import LOCK, PATIENCE, Clock, held, in_threads, own_threads, require_held, sign
from clips.lists import Items, is_there
from clips.samples import SOURCES, Spec
from sd.checkpoint import write_tensors
from sd.device import pick_device
from training.ranks import Ranks, shared

SHARD = 32  # items whose samples share a file
SHARD_NAME = re.compile(r"\+*(video|label|caption)-(\d{6,})\.safetensors")
# in OUT.part: the shards that were left when the work began, as JSON; and where a folder lies between two renames
LEFT, FORMER = "left.json", "former"


def encode(model, lists: dict[str, str], out: str, spec: Spec, *, text=False, dtype=torch.float16, update=False,
           ranks: Ranks | None = None):
    """Write the VAE's mean and log-variance of every sample of some lists into a folder; with `text` its context too.

    Every rank takes the next shard that is left. A shard is there when it is whole, so what an interrupted call has
    finished stays finished. The work is done in OUT.part, which is renamed at its end.

    update  replace the folder by one as if encoded anew; moments of items that have not changed are taken from it
    """
    ranks = ranks or Ranks(timeout=600)
    make = partial(Job, model, lists, out, spec, text, dtype, update)
    job = None if ranks.rank else make()
    with ranks.on_rank_0(held(out + ".part")) as lock:
        begun = ranks.from_rank_0("begun", lambda: job.begin(lock))
        job = job or make()  # on the others now: rank 0 has told what is wrong, and indexed what must be
        job.join_in(*begun)
        job.work(ranks)
        ranks.together("encoded")
        ranks.from_rank_0("joined", lambda: job.finish(lock))


class Job:
    """The work of an encoding, as every rank sees it."""

    def __init__(self, model, lists, out, spec, text, dtype, update):
        self.out, self.part, self.spec, self.update = out, out + ".part", spec, update
        if not update:
            require_absent(out)
        self.sources = {source: Items(source, path, spec.captions) for source, path in lists.items()}
        self.origin = {"spec": asdict(spec), "lists": lists, "text": text, "dtype": str(dtype)}
        self.origin |= {"vae": fingerprint(model.vae)} | ({"tower": fingerprint(model.text)} if text else {})
        self.old = EncodedClips(out, text=False) if update else None
        self.then = {source: self.old.made(source) for source in self.sources} if update else {}
        self.encoder = Encoder(model, text, dtype)

    def all_shards(self):
        """(source, number) of all shards, in the order of the index."""
        return ((source, n) for source, items in self.sources.items() for n in range(-(-len(items) // SHARD)))

    def numbers(self, source: str, n: int) -> range:
        """The items of a shard."""
        return range(n * SHARD, min(len(self.sources[source]), (n + 1) * SHARD))

    # -----------------------------------------------------------------------------------------------------------------
    # What rank 0 does first

    def begin(self, lock):
        """Take up what an interrupted call left, and write down (source, number, name) of the shards that are left:
        there may be too many for the store of the ranks. -> what every rank needs to `join_in`."""
        if not self.update:
            require_absent(self.out)  # another process may have finished it just now
        settings, origin = os.path.join(self.part, "spec.json"), json.dumps(self.origin)
        files = os.listdir(self.part)
        if "index.jsonl" in files and "index.npy" not in files:
            raise ValueError(f"{self.part} was left by an earlier version: remove it")
        if any(map(SHARD_NAME.fullmatch, files)) and read_text(settings) != origin:
            raise ValueError(f"{self.part} was left by an encoding with other settings: remove it")
        sights = {source: (i, made) for source in self.sources for i, made in self.first_there(source)}
        self.check_old(sights)
        write_text(settings, origin)
        self.done = self.current(self.part)
        for name in files:
            if name.endswith(".part") or SHARD_NAME.fullmatch(name) and name not in self.done.values():
                os.remove(os.path.join(self.part, name))  # torn by the end of its writer, or its items have changed
        taken = set()
        if self.update:
            taken = set(os.listdir(self.out))
            for shard, name in self.current(self.out).items():
                if self.done.setdefault(shard, name) == name:
                    link(os.path.join(self.out, name), os.path.join(self.part, name))
        empty = {"context": self.encoder.contexts([""])} if self.encoder.text else {}
        write_tensors(empty, os.path.join(self.part, "empty.safetensors"))
        left = []
        for source, n in self.all_shards():
            name = f"{source}-{n:06d}.safetensors"
            while name in taken:
                name = f"+{name}"  # another name than before: whoever is reading there must not take it for the old
            if (source, n) not in self.done:
                self.done[source, n] = name
                left.append((source, n, name))
        write_text(os.path.join(self.part, LEFT), json.dumps(left))
        return sign(lock), sights

    def first_there(self, source: str) -> list[tuple[int, str]]:
        """The first item of a list whose files are there, if there is one, and what it was made from."""
        found = ((i, hashes(self.sources[source], i)) for i in range(len(self.sources[source])))
        return list(itertools.islice(((i, hexes(made)) for i, made in found if made[1]), 1))

    def check_old(self, sights):
        """Raise ValueError unless a folder that is to be updated was encoded in the same way from what is there."""
        if not self.update:
            return
        theirs = read_settings(self.out)
        for name, ours in self.origin.items():
            if name != "lists" and (asdict(theirs[name]) if name == "spec" else theirs.get(name)) != ours:
                raise ValueError(f"{self.out} was encoded with another {name}: choose another folder, or remove it")
        for source, items in self.sources.items():
            then = self.then[source]
            if then is None:
                raise ValueError(f"{self.out} does not say what it was made from: remove it, and encode again")
            if then[:, 1].any() and source not in sights:
                raise ValueError(f"none of the files of {items.path} is there: nothing is updated")

    def current(self, folder: str) -> dict[tuple[str, int], str]:
        """(source, number) -> name of the shards in a folder that are whole and made from what is there now."""

        def is_current(match) -> bool:
            source, numbers = match[1], self.numbers(match[1], int(match[2]))
            try:
                found = index_of(lines_of(os.path.join(folder, match[0])))[:-1]
            except ValueError:
                return False
            now = [(SOURCES.index(source), i, hashes(self.sources[source], i)) for i in numbers]
            return [(s, i, tuple(made)) for s, i, _, made in found.tolist()] == now

        named = filter(None, map(SHARD_NAME.fullmatch, sorted(os.listdir(folder))))
        named = [match for match in named if match[1] in self.sources]
        with in_threads(is_current, named, threads=16) as whole:  # a network drive answers many at a time
            return {(match[1], int(match[2])): match[0] for match, is_whole in zip(named, whole) if is_whole}

    # -----------------------------------------------------------------------------------------------------------------
    # What every rank does

    def join_in(self, word: str, sights: dict):
        """Raise ValueError unless this machine sees the folder, the lists and the files of rank 0."""
        self.word = word
        require_held(self.part, word, PATIENCE)
        for source, (i, made) in sights.items():
            if hexes(hashes(self.sources[source], i)) != made:
                raise ValueError(f"{platform.node()} does not see {self.sources[source].name(i)} as rank 0 does: all "
                                 "machines must share the lists and what they name")

    def work(self, ranks: Ranks):
        """Encode shards until none is left. Threads decode ahead of the VAE, which works here; another one writes."""
        left, threads = read_json(os.path.join(self.part, LEFT)), own_threads()
        items, clock = [len(self.numbers(source, n)) for source, n, _ in left], Clock()
        behind, self.encoder.clock = list(itertools.accumulate(items, initial=0)), clock
        bar = tqdm(total=behind[-1], desc="encode", unit="item", mininterval=2, disable=ranks.rank > 0)

        def taken():
            for at, (source, n, name) in ranks.take("shards", left):
                for i in self.numbers(source, n):
                    yield source, i, name, behind[at] + i - n * SHARD

        with (bar, in_threads(self.read, taken(), threads, ahead=2 * threads) as found,
              in_threads(self.write, self.shards(found, bar), 1, ahead=1) as written):
            samples = sum(written)
        if samples and ranks.rank == 0:
            parts = {"decoding": threads, "the VAE": 1, "the text tower": 1, "writing": 1}
            busy = ", ".join(f"{part} {clock.busy(part, n):.0%}" for part, n in parts.items())
            print(f"rank 0 encoded {samples:,} samples in {clock.elapsed():.1f} s; busy: {busy}", flush=True)

    def read(self, place):
        """Decode an item -> (place, what it was made from, what all_samples found of it). Threads do it."""
        source, i = place[:2]
        with self.encoder.clock("decoding"):
            made = hashes(self.sources[source], i)
            if self.update and [made] == list(map(tuple, self.then[source][i : i + 1].tolist())):
                return place, made, old_samples(self.old, self.old.lines(source, i))
            return place, made, all_samples(self.sources[source], i, self.spec)

    def shards(self, found, bar):
        """Yield (name, lines of the index, tensors) of the shards of items that were read."""
        for name, group in itertools.groupby(found, lambda read: read[0][2]):
            yield name, *self.encoder.shard(self.lines(name, group, bar))

    def lines(self, name: str, group, bar):
        """Yield (what its line of the index says, sample) of all samples of a shard."""
        for (source, i, _, at), made, samples in group:
            items = self.sources[source]
            path = items.name(i).removeprefix(os.path.join(items.folder, ""))  # list and clips may move together
            for fps, k, sample in samples:
                yield {"shard": name, "source": source, "item": i, "made": hexes(made), "path": path, "fps": fps,
                       "k": k}, sample
            bar.update(at + 1 - bar.n)

    def write(self, shard) -> int:
        """Write a shard, in a thread of its own -> how many samples it has."""
        name, lines, tensors = shard
        with self.encoder.clock("writing"):
            require_held(self.part, self.word)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            tensors["lines"] = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)
            write_tensors(tensors, os.path.join(self.part, name))
        return sum("row" in line for line in lines)

    # -----------------------------------------------------------------------------------------------------------------
    # What rank 0 does in the end

    def finish(self, lock):
        """Join the lines of all shards to an index, and put the folder where it belongs."""
        paths = [os.path.join(self.part, self.done[shard]) for shard in self.all_shards()]
        indices, reasons, at = [], Counter(), 0
        with (beside(os.path.join(self.part, "index.jsonl")) as text, open(text, "wb") as file,
              in_threads(lines_of, paths, threads=16) as found):
            for lines in found:
                indices.append(index_of(lines))
                indices[-1]["start"] += at
                at += file.write(lines)
                reasons.update(json.loads(line)["bad"] for line in lines.splitlines() if b'"bad": ' in line)
            index = np.concatenate([*(part[:-1] for part in indices), indices[-1][-1:]])
            with beside(os.path.join(self.part, "index.npy")) as array, open(array, "wb") as other:
                np.save(other, index)
        if os.name == "nt":  # no folder can be renamed there while a file in it is open
            self.old = self.then = None
            lock.close()
        for name in (LEFT, LOCK):
            os.remove(os.path.join(self.part, name))
        if self.update:
            os.rename(self.out, os.path.join(self.part, FORMER))
        os.rename(self.part, self.out)
        shutil.rmtree(os.path.join(self.out, FORMER), ignore_errors=True)
        if reasons:
            why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
            warn(f"{reasons.total()} samples cannot be used ({why}): clips.check names their files")


def require_absent(out: str):
    if os.path.exists(out):
        raise ValueError(f"{out} is there already: choose another folder, or remove it")


def link(old: str, new: str):
    """Let a file have one more name, or copy it where the file system cannot do that."""
    if os.path.lexists(new):
        os.remove(new)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


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
    captions: str = option("", "from_names: without any, the name of the file; else the field that says them")
    text: bool = option(False, "store the contexts of captions too, for training with a frozen text tower")
    dtype: str = option("float16", "precision of what is stored", choices=("float16", "float32"))
    seed: int = option(0, "seed of crops, starts and captions", low=0)
    device: str = option("", "cuda, mps or cpu; default: the first of them that is there")
    update: bool = option(False, "encode again what has changed in the lists of a folder, with the options of then")


@shared(awaited="begun")
def main(ranks: Ranks):
    o = parse(Options, __doc__)
    plan = ranks.from_rank_0("plan", lambda: planned(o))
    if not plan:
        ranks.from_rank_0("begun", lambda: None)
        return
    spec = as_spec(plan["spec"])
    model = sd.load(o.ckpt, pick_device(o.device))
    model.check_size(spec.width, spec.height, spec.frames)
    encode(model, plan["lists"], plan["out"], spec, text=plan["text"], dtype=getattr(torch, plan["dtype"]),
           update=o.update, ranks=ranks)


def planned(o: Options) -> dict | None:
    """Read from the options what to encode, and how; None where that is done. Raises ValueError or OSError where it
    cannot be."""
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
            return None
    for path in filter(lambda path: not is_there(path), lists.values()):
        os.stat(path)  # now, not after a model is loaded
    spec = Spec(o.frames, *o.size, o.fps, o.starts, o.draws, o.random_crop, o.flip, o.background, o.captions, o.seed)
    return {"lists": lists, "out": out, "spec": asdict(spec), "text": o.text, "dtype": o.dtype}


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
