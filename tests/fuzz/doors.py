"""The doors: for each kind of input, how a wrong one is made, what its user would start, and what a right result is.

A door is a function (rng, folder, world) that writes a mutated input into a folder -> Case.
"""

import csv
import gc
import glob
import io
import json
import os
import random
import re
import shlex
import sys
import tarfile
from contextlib import suppress
from fractions import Fraction
from html.parser import HTMLParser

import av
import numpy as np
import torch
from judge import Case, Watch, Wrong
from mutations import (
    NUMBERS,
    ODD,
    bend,
    bend_boxes,
    bend_json,
    bend_pickle,
    bend_png,
    bend_safetensors,
    bend_source,
    bend_tar,
    bend_zip,
    dumped,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import cli
import sample
import sd
import train
from clips import check as checking
from clips import encode as encoding
from clips.decode import Bad, open_file
from clips.gallery import figure
from clips.lists import Items, images_of
from clips.pictures import View, fit_image
from clips.samples import LiveClips, Spec
from clips.write import write_video
from model import UNetConfig
from sd.names import VAE_ATTENTION, parameters, text_parameters, unet_layers, vae_layers
from sd.presets import ModelConfig
from sd.text import TextConfig
from sd.vae import VAEConfig
from training.config import Config, read_config

# ---------------------------------------------------------------------------------------------------------------------
# Good inputs, as small as they can be

NANO = ModelConfig(  # a small Stable Diffusion 1, so that a file without a header is read right
    UNetConfig(channels=32, channel_mult=(1,), num_res_blocks=1, attention_levels=(), context_dim=4, head_width=None,
               num_heads=8, linear_projection=False),
    VAEConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1),
    TextConfig(width=4, layers=1, heads=1, skip_last=0, projection=0, length=16, quick_gelu=True, pad_id=49407))
CONFIGS = {  # of a diffusers folder
    "unet/config.json": {"block_out_channels": [32], "attention_head_dim": 8, "norm_num_groups": 32, "sample_size": 8,
                         "layers_per_block": 1, "cross_attention_dim": 4, "in_channels": 4, "act_fn": "silu",
                         "use_linear_projection": False, "down_block_types": ["DownBlock2D"]},
    "vae/config.json": {"block_out_channels": [32, 32], "norm_num_groups": 32, "scaling_factor": 1.0, "act_fn": "silu",
                        "latent_channels": 4},
    "text_encoder/config.json": {"num_attention_heads": 1, "hidden_act": "quick_gelu", "hidden_size": 4,
                                 "num_hidden_layers": 1, "model_type": "clip_text_model", "layer_norm_eps": 1e-5},
    "scheduler/scheduler_config.json": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                                        "prediction_type": "epsilon", "num_train_timesteps": 1000,
                                        "timestep_spacing": "leading", "trained_betas": None}}
FORMATS = {"L.png": {}, "RGBA.png": {}, "P.png": {"transparency": 3}, "I;16.png": {}, "RGB.jpg": {"exif": b"turned"},
           "CMYK.jpg": {}, "P.gif": {"save_all": True}, "RGB.webp": {}, "RGB.bmp": {}, "RGB.tif": {},
           "L.tif": {"compression": "tiff_lzw"}, "RGB.png": {}}
CODECS = {"a.mp4": ("libx264", "yuv420p"), "b.mkv": ("libx264", "yuv420p"), "c.webm": ("libvpx", "yuv420p"),
          "d.avi": ("mpeg4", "yuv420p"), "e.gif": ("gif", "rgb8"), "f.mov": ("mpeg4", "yuv420p")}
ANIMATED = "g.webp", "h.png", "i.gif"  # pictures that move: with transparency, and times of their own


def picture(n: int, mode: str, size=(24, 16)) -> Image.Image:
    pixels = np.random.default_rng(n).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image


def make_seeds(folder: str):
    """Write the good inputs, once for all workers."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    for n, (name, options) in enumerate(FORMATS.items()):
        image = picture(n, name.split(".")[0])
        more = {"append_images": [picture(n + 1, "P")]} if "save_all" in options else {}
        image.save(os.path.join(folder, name), **options | more | ({"exif": exif} if "exif" in options else {}))
    for name, (codec, pixels) in CODECS.items():
        with av.open(os.path.join(folder, name), "w") as file:
            stream = file.add_stream(codec, rate=Fraction(8))
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for n in range(12):
                pixels = np.asarray(picture(n // 4, "RGB", (32, 32)))
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            file.mux(stream.encode())
    moving = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 32, 4), np.uint8)) for n in range(6)]
    for name in ANIMATED:
        moving[0].save(os.path.join(folder, name), save_all=True, append_images=moving[1:], loop=0,
                       duration=[100, 500, 100, 300, 200, 400])
    torch.manual_seed(0)
    model = sd.build(NANO, sd.Settings(frames=4, width=16, height=16, fps=8, fps_trained=(8, 120), grid_trained=True,
                                       latent_scale=1.0, sampling_steps=1)).to(torch.float16)
    for p in model.unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    sd.save(model, os.path.join(folder, "nano.safetensors"))
    tensors = load_file(os.path.join(folder, "nano.safetensors"))
    plain = {"state_dict": {name: tensor for name, tensor in tensors.items() if not name.startswith("etc.")}, "step": 3}
    torch.save(plain, os.path.join(folder, "new.ckpt"))
    torch.save(plain, os.path.join(folder, "old.ckpt"), _use_new_zipfile_serialization=False)
    theirs = {"unet": parameters(unet_layers(1, 1), ""), "vae": parameters(vae_layers(2, 1, VAE_ATTENTION), ""),
              "text_encoder": text_parameters(1, "text_model.")}
    os.makedirs(os.path.join(folder, "diffusers", "scheduler"))
    for part, names in theirs.items():
        states = model.parts()[part.removesuffix("_encoder")].state_dict()
        found = {n: t.contiguous() for ours, tensor in states.items() if ours in names
                 for n, t in zip(names[ours], tensor.chunk(len(names[ours])))}
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        os.makedirs(os.path.join(folder, "diffusers", part))
        save_file(found, os.path.join(folder, "diffusers", part, name + ".safetensors"))


class World:
    """What the doors share: good inputs, and lures, names of what lies outside and must not be touched."""

    def __init__(self, scratch: str, home: str):
        self.seeds, outside = os.path.join(scratch, "seeds"), os.path.join(home, "outside")
        if not os.path.exists(self.seeds):
            part = f"{self.seeds}.{os.getpid()}"
            os.makedirs(part)
            make_seeds(part)
            with suppress(OSError):  # another worker was first
                os.rename(part, self.seeds)
        os.makedirs(outside, exist_ok=True)
        self.data = {}
        for name in sorted(os.listdir(self.seeds)):
            if os.path.isfile(os.path.join(self.seeds, name)):
                with open(os.path.join(self.seeds, name), "rb") as file:
                    self.data[name] = file.read()
        for name, seed in (("s.mp4", "a.mp4"), ("s.png", "RGB.png"), ("s.safetensors", "nano.safetensors")):
            write(os.path.join(outside, name), self.data[seed])
        write(os.path.join(outside, "s.txt"), b"a secret")
        self.watch = Watch(outside)
        gc.freeze()  # what is here now stays: to collect garbage after each input is then quick
        self.lures = [f"{outside}/{name}" for name in os.listdir(outside)] + [
            "../outside/s.mp4", "../outside/s.png", "../../../../../../etc/passwd", f"file://{outside}/s.mp4",
            f"http://{self.watch.address}/x.mp4", f"tcp://{self.watch.address}", "/dev/zero", "/dev/stdin", "fifo.mp4",
            "fifo.png", "concat:a.mp4|b.mp4", "|touch ran", "data:,x"]

    def fill(self, folder: str, *names):
        """Put good inputs into a folder, and a fifo and a device under names of good ones."""
        for name in names:
            write(os.path.join(folder, name), self.data[name])
        for ending in ("mp4", "png"):
            os.mkfifo(os.path.join(folder, f"fifo.{ending}"))
            os.symlink("/dev/zero", os.path.join(folder, f"zero.{ending}"))


def write(path: str, data: bytes) -> str:
    with open(path, "wb") as file:
        file.write(data)
    return path


def started(main, script: str, *argv, **more) -> Case:
    """What `python script argv` does."""

    def command():
        sys.argv = [os.path.join(cli.ROOT, script), *argv]
        main()

    return Case(command, line=shlex.join([script, *argv]), **more)


def expect(good, what: str):
    if not good:
        raise Wrong(what)


# ---------------------------------------------------------------------------------------------------------------------
# Lists

CAPTIONS = ("a red circle", "two words, and a comma", 'she said "hi"', "two\nlines", "é 猫 🐈", " spaces  ", "",
            "x" * 3000)


def lists(rng, folder, world):
    kind = rng.choice(("csv", "csv", "csv", "jsonl", "jsonl", "json", "labels", "folder"))
    source = {"json": "video", "labels": "label"}.get(kind) or rng.choice(("video", "caption"))
    good = ("a.mp4", "c.webm") if source == "video" else ("RGB.png", "L.tif")
    path = os.path.join(folder, f"list.{kind}")
    home = path if kind == "folder" else os.path.join(folder, "n01") if kind == "labels" else folder
    os.makedirs(home, exist_ok=True)
    world.fill(home, *good)
    names = (*good, *good, "missing.mp4", "zero.mp4", *world.lures)
    rows = [{"path": rng.choice(names), "caption": rng.choice(CAPTIONS)} for _ in range(rng.randrange(1, 8))]
    if kind == "csv":
        text = io.StringIO(newline="")
        out = csv.writer(text, delimiter=rng.choice(",,,,;\t"), lineterminator=rng.choice(("\r\n", "\n", "\r")),
                         quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)),
                         doublequote=rng.random() < 0.9, escapechar="\\")
        out.writerow(rng.choice((("path", "caption"), ("path", "caption", "more"), ("videoid", "name", "page_dir"))))
        out.writerows([*row.values(), *rng.choice(((), (), ("y",), ("../outside",)))] for row in rows)
        data = text.getvalue().encode(rng.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "cp1252")), "replace")
    elif kind == "json":
        rows = [{"video_id": row["path"].removesuffix(".mp4"), "caption": row["caption"]} for row in rows]
        data = dumped(bend_json({"videos": rows, "sentences": rows}, rng, world.lures), rng)
    elif kind == "jsonl":
        rows = [bend_json(row, rng, world.lures) if rng.random() < 0.5 else row for row in rows]
        data = b"".join(dumped(row, rng) + b"\n" for row in rows)
    else:
        data = "".join(f"{rng.choice(('n01', *world.lures))} {rng.choice(CAPTIONS)}\n" for _ in rows).encode()
    data = bend(data, rng, world.lures) if rng.random() < 0.7 else data
    write(os.path.join(path, "a.txt") if kind == "folder" else path, data)
    asked = kind in ("csv", "jsonl")  # whose paths a user wrote
    if rng.random() < 0.2:
        return checked(path, "--frames=4", "--source", source, asked=asked)
    return Case(lambda: read_all(source, path), lambda items: check_items(kind, data, items), asked)


def checked(path: str, *options, asked=False) -> Case:
    """What `python -m clips.check path` does."""
    found = glob.escape(path if os.path.isdir(path) else os.path.dirname(path)) + "/*.check.jsonl"
    return started(checking.main, "clips/check.py", path, *options, asked=asked,
                   check=lambda _: expect(glob.glob(found), "clips.check wrote no file"))


def read_all(source: str, path: str) -> list:
    """(captions, path) of each item of a list, or the reason why it cannot be used."""
    items, found = Items(source, path), []
    for i in range(len(items)):
        items.name(i)
        try:
            found.append((items[i].captions, items[i].path))
        except Bad as bad:
            found.append(str(bad))
    return found


def check_items(kind: str, data: bytes, found: list):
    """Compare what was read with what the csv and json modules say."""
    told = [item for item in found if isinstance(item, str)]
    expect(found and all(reason and "\n" not in reason for reason in told), "no items, or a reason of two lines")
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = data.decode("utf-16" if wide else "utf-8-sig", "replace")
    if kind == "csv":
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
        whole = len(header) == len(set(header))
        rows = [dict(zip(header, row)) if whole and len(row) == len(header) else None for row in rows]
    elif kind == "jsonl":
        rows = list(map(parsed, filter(str.strip, re.split("\r\n|\n|\r", text))))
    else:
        return
    expect(len(rows) == len(found), f"{len(found)} items, {kind} says {len(rows)}")
    for i, (row, item) in enumerate(zip(rows, found)):
        caption, path = (row.get("caption"), row.get("path")) if isinstance(row, dict) else (None, None)
        ours, theirs = isinstance(item, tuple), isinstance(caption, str) and bool(caption.strip())
        expect(not ours or isinstance(row, dict), f"item {i} is none for {kind}: {str(item)[:80]}")
        expect(not ours or not theirs or item[0] == (" ".join(caption.split()),),
               f"item {i} is {str(item[0])[:60]}, {kind} says {caption!r}"[:200])
        readable = theirs and isinstance(path, str) and path and not re.search(UNREADABLE, caption + path)
        if readable:
            expect(ours, f"item {i} was not read: {item}"[:200])


# What may be refused: what is no text, paths that lead out, and several lines in quotes, which an open quote makes
UNREADABLE = r"[\0\ufffd\ud800-\udfff\r\n]|\.\."


def parsed(line: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Tars

TEXTS = {"video": ".txt", "caption": ".json", "label": ".cls"}


def tars(rng, folder, world):
    source, members = rng.choice(tuple(TEXTS)), []
    seed = "a.mp4" if source == "video" else "RGB.png"
    for n in range(rng.randrange(1, 5)):
        stem = rng.choice((f"{n:05d}", f"{n:05d}", f"part/{n:05d}", "é" * 60 + str(n), "x" * 120 + str(n)))
        caption = rng.choice(CAPTIONS[:-2])
        text = {"video": caption, "caption": json.dumps({"caption": caption}), "label": f"n{n % 2}"}[source]
        members += [(stem + os.path.splitext(seed)[1], world.data[seed]), (stem + TEXTS[source], text.encode())]
    odd, out = rng.random() < 0.4, io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if odd:  # a member that is no plain file, or is one under a name that leads outside
            info = tarfile.TarInfo(rng.choice((*world.lures, "00000.mp4", "00001.txt")))
            info.type = rng.choice((b"0", b"1", b"2", b"3", b"6"))
            info.linkname = rng.choice(world.lures)
            tar.addfile(info)
    data = out.getvalue() if odd or rng.random() < 0.2 else bend_tar(out.getvalue(), rng, world.lures)
    path = write(os.path.join(folder, "a.tar"), data)
    whole = [] if odd or data != out.getvalue() else [world.data[seed]] * (len(members) // 2)
    if rng.random() < 0.2:  # an index that another one left there
        whole = []
        with suppress(ValueError):
            read_all(source, path)
        for index in glob.glob(glob.escape(path) + ".*.index"):
            with open(index, "rb") as file:
                bent = bend(file.read(), rng, world.lures)
            write(index, bent)
    elif rng.random() < 0.1:
        return checked(path, "--frames=4", "--source", source)
    return Case(lambda: read_tar(source, path), lambda items: check_tar(items, data, whole))


def read_tar(source: str, path: str) -> list:
    """(captions, a file's first bytes) of each file of each item, or the reason why it cannot be used."""
    items, found = Items(source, path), []
    for i in range(len(items)):
        try:
            item = items[i]
            for one in images_of(item.path) if source == "label" else [item.path]:
                with open_file(one) as file:
                    found.append((item.captions, file.read(1 << 20)))
        except (Bad, OSError) as bad:
            found.append(str(bad))
    return found


def check_tar(items: list, data: bytes, whole: list[bytes]):
    """Every file that was read stands in the tar as it is; of a tar that nobody bent all were read."""
    for item in items:
        expect(isinstance(item, tuple) or item and "\n" not in item, f"a reason of two lines, or none: {item!r}"[:200])
        expect(not isinstance(item, tuple) or item[1] in data, f"{item[0]} has bytes that the tar has not"[:200])
    read = [item[1] for item in items if isinstance(item, tuple)]
    expect(not whole or read == whole, f"{len(read)} of {len(whole)} files were read, or not as they are")


# ---------------------------------------------------------------------------------------------------------------------
# Images and clips

def images(rng, folder, world):
    name = rng.choice(tuple(FORMATS))
    data, others = world.data[name], tuple(world.data[n] for n in FORMATS)
    data = bend_png(data, rng) if name.endswith(".png") and rng.random() < 0.6 else bend(data, rng, world.lures)
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data) + 1)] + rng.choice(others)
    path = write(os.path.join(folder, rng.choice((name, name, "x.jpg", "x.png"))), data)
    if rng.random() < 0.1:
        return checked(folder, "--source=caption")
    return Case(lambda: told(lambda: fit_image(path, 16, 16, View())), lambda image: check_frames(image[None], 1))


def clips(rng, folder, world):
    return mutated_clip(rng, folder, world, rng.choice(tuple(CODECS)))


def animated(rng, folder, world):
    return mutated_clip(rng, folder, world, rng.choice(ANIMATED))


def mutated_clip(rng, folder, world, name: str) -> Case:
    data = world.data[name]
    bend_structure = {".mp4": bend_boxes, ".mov": bend_boxes, ".png": bend_png}.get(os.path.splitext(name)[1])
    structure = bend_structure and rng.random() < 0.6
    data = bend_structure(data, rng) if structure else bend(data, rng, world.lures)
    if rng.random() < 0.05:  # playlists, of which each would lead outside
        lure = rng.choice(world.lures)
        data = rng.choice((f"#EXTM3U\n#EXTINF:2,\n{lure}\n", f"ffconcat version 1.0\nfile {lure}\n",
                           f"v=0\nm=video 5 RTP/AVP 96\nc=IN IP4 {world.watch.address}\n")).encode()
    path = write(os.path.join(folder, rng.choice((name, name, name, "x.mp4", "x.mkv", "x.webp"))), data)
    if rng.random() < 0.1:
        return checked(folder, "--frames=4")
    listed = write(os.path.join(folder, "list.jsonl"), json.dumps({"path": path, "caption": "x"}).encode())
    u, v = rng.random(), rng.random()
    return Case(lambda: told(lambda: LiveClips({"video": listed}, Spec(4, 16, 16)).sample("video", 0, u, v)),
                lambda sample: check_frames(sample.data, 4))


def told(work):
    """What cannot be used is told by a reason; here that is a refusal."""
    try:
        return work()
    except Bad as bad:
        raise ValueError(str(bad)) from bad


def check_frames(frames: torch.Tensor, count: int):
    expect(frames.dtype == torch.uint8 and frames.shape == (count, 3, 16, 16), f"{frames.dtype} {tuple(frames.shape)}")


# ---------------------------------------------------------------------------------------------------------------------
# Given frames, and earlier videos

TOLD = {"prompt": "a cat", "prompts_at": {}, "blend": False, "frames": 4, "size": [16, 16], "fps": 8.0, "steps": 1,
        "sampler": "dpm++", "guidance": 2.0, "guidance_interval": [0, 999], "overlap": None, "seed": 3, "keep": [],
        "layout": "grid", "ckpt": "tiny.safetensors"}


def given(rng, folder, world):
    world.fill(folder, "a.mp4", "RGB.png", "nano.safetensors")
    for name in ("a.mp4", "RGB.png"):
        if rng.random() < 0.5:
            write(os.path.join(folder, name), bend(world.data[name], rng, world.lures))
    told = TOLD if rng.random() < 0.5 else TOLD | {"prompt": "", "prompts_at": {"0": "a cat", "2": "a dog"}}
    made = os.path.join(folder, rng.choice(("made.gif", "made.png", "made.mp4")))
    bent = bend_json(told, rng, world.lures)
    if re.search(r"\b\d{4,9}\b", json.dumps(bent)):  # what is possible, but takes its time, is no fault
        bent = told
    write_video(made, np.zeros((2, 16, 16, 3), np.uint8), 8, bent)
    if rng.random() < 0.3:
        with open(made, "rb") as file:
            data = file.read()
        write(made, bend(data, rng, world.lures))
    asked = rng.choice((
        ["a cat", "--first=RGB.png"], ["a cat", "--first=RGB.png", "--last=RGB.png"],
        ["a cat", "--extend=a.mp4", "--frames=16", "--overlap=2"], ["a cat", "--given=a.mp4", "--keep=0,3"],
        ["--prompts_at", bend(b"0: a cat; 2: a dog", rng, world.lures).decode(errors="replace").replace("\0", "")],
        [f"--like={os.path.basename(made)}"], [f"--like={os.path.basename(made)}"]))
    return started(sample.main, "sample.py", *asked, "--ckpt=nano.safetensors", "--steps=1", "--out=o.gif", asked=True)


def gallery(rng, folder, world):
    """What `--out gallery.html` writes of hostile prompts, and of settings that --like read."""
    prompt = rng.choice((*CAPTIONS[:-2], *MARKUP)) + bend(b"a cat", rng, world.lures).decode(errors="replace")
    told = TOLD | {"prompt": prompt.replace("\0", "") or "x", "negative": rng.choice(MARKUP)}
    made = os.path.join(folder, rng.choice(("made.gif", "made.png", "made.mp4")))
    write_video(made, np.zeros((2, 16, 16, 3), np.uint8), 8, told)
    return Case(lambda: figure(made), lambda text: check_figure(text, told))


MARKUP = ("<script>touch()</script>", "\"><img src=x onerror=touch()>", "</figcaption></figure></main>", "&lt;",
          "'`{x}", "<!--", "]]>", "\u202e")


def check_figure(text: str, told: dict):
    """Expect that a browser finds the tags of a figure and no others, and the prompt as its text."""
    seen, words = [], []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: seen.append(tag)
    reader.handle_data = words.append
    reader.feed(text)
    reader.close()
    right = {"figure", "figcaption", "video", "img", "p", "small", "details", "summary", "br"}
    expect(set(seen) <= right and seen.count("video") + seen.count("img") == 1, f"a figure of {sorted(set(seen))}")
    for name in ("prompt", "negative"):
        expect(told[name] in "".join(words), f"{name} {told[name]!r} is not shown")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def sampled(folder, ckpt: str):
    """Sample four frames from a checkpoint."""
    out = os.path.join(folder, "made.png")
    argv = ["--ckpt", ckpt, "--steps=1", "--frames=4", "--size=16x16", "--fps=8", f"--out={out}", "a cat"]
    return started(sample.main, "sample.py", *argv, check=lambda _: check_sheet(out))


def check_sheet(path: str):
    with Image.open(path) as image:
        pixels = np.asarray(image)
    expect(pixels.shape == (34, 34, 3), f"a sheet of {pixels.shape}")
    cells = [pixels[y : y + 16, x : x + 16] for y in (0, 18) for x in (0, 18)]
    expect(all(cell.any() for cell in cells), "a black frame, and not a word")


def safetensors(rng, folder, world):
    path = write(os.path.join(folder, rng.choice(("m.safetensors", "m.ckpt", "m"))),
                 bend_safetensors(world.data["nano.safetensors"], rng, world.lures))
    return sampled(folder, path)


class Evil:
    """What runs a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def ckpt(rng, folder, world):
    kind = rng.choice(("new", "new", "old", "other"))
    if kind == "other":
        out = io.BytesIO()
        torch.save(rng.choice(other_objects(world)), out, _use_new_zipfile_serialization=rng.random() < 0.5)
        data = out.getvalue()
    else:
        data = (bend_zip if kind == "new" else rng.choice((bend, bend_pickle)))(world.data[f"{kind}.ckpt"], rng)
    return sampled(folder, write(os.path.join(folder, rng.choice(("m.ckpt", "m.pt", "m.safetensors"))), data))


def other_objects(world):
    """What people save by torch.save, whole or not."""
    tensors = torch.load(os.path.join(world.seeds, "new.ckpt"), weights_only=True)["state_dict"]
    return (Evil(), [], None, {}, "x", torch.ones(3), np.ones(3), {3: torch.ones(2)}, {"state_dict": None},
            {"model": tensors}, tensors | {"x": Evil()}, tensors | {3: "x"},
            {"state_dict": tensors, "callbacks": random.Random(3), "when": Fraction(1)},
            {"state_dict": {n: t.float().to_sparse() if t.ndim == 2 else t for n, t in tensors.items()}},
            {n: torch.nn.Parameter(t.float()) for n, t in tensors.items()},
            {n: t.to("meta") for n, t in tensors.items()},
            {n: t.mT if t.ndim > 1 else t for n, t in tensors.items()})


def config_json(rng, folder, world):
    home = os.path.join(folder, "model")
    changed = rng.choices(tuple(CONFIGS), k=rng.choice((1, 1, 2)))
    for name, value in CONFIGS.items():
        part = os.path.dirname(name)
        os.makedirs(os.path.join(home, part))
        for file in os.listdir(os.path.join(world.seeds, "diffusers", part)):
            os.link(os.path.join(world.seeds, "diffusers", part, file), os.path.join(home, part, file))
        data = dumped(bend_json(value, rng, world.lures) if name in changed else value, rng)
        data = bend(data, rng, world.lures) if name in changed and rng.random() < 0.3 else data
        write(os.path.join(home, name), data)
    if rng.random() < 0.05:
        os.remove(os.path.join(home, rng.choice(tuple(CONFIGS))))
    return sampled(folder, home)


# ---------------------------------------------------------------------------------------------------------------------
# Config files and command lines

TRAINED = {"model": ("micro",), "init": ("", "x.ckpt"), "frames": (4, 16), "width": (32, 64), "height": (32,),
           "batch_size": (1, 2), "mix": ({"video": 1, "label": 0, "caption": 0},), "betas": ((0.9, 0.99),),
           "timesteps": ((0, 1000),), "prompts": (("a", "b"), ()), "lr": (1e-3,), "resume": (True,),
           "fps_values": ((1, 8),), "dtype": ("float32",), "seed": (3,), "video": ("list.csv",), "out_dir": ("run",)}


SMALL = ["--model=micro", "--frames=4", "--width=32", "--height=32", "--batch_size=1", "--accumulate=1",
         "--dtype=float32", "--toy_clips=1", "--toy_images=1", "--toy_captioned=1"]  # of a dry run


def configs(rng, folder, world):
    lines = [f"{name} = {rng.choice(values)!r}  # so\n" for name, values in TRAINED.items()]
    text = '"""An experiment."""\n\n' + "".join(lines)
    data = bend_source(text, rng, world.lures).encode("utf-8", "surrogatepass")
    data = bend(data, rng, world.lures) if rng.random() < 0.3 else data
    path = write(os.path.join(folder, "config.py"), data)
    if rng.random() < 0.01:
        return started(train.main, "train.py", path, "--dry_run", *SMALL)
    return Case(lambda: read_config([path]), check_config)


def check_config(cfg):
    cli.check(cfg)
    grid = cfg.frames, cfg.width, cfg.height
    right = all(type(n) is int and n > 0 for n in grid) and sum(cfg.mix.values()) > 0
    expect(right, f"a config with {grid}, {cfg.mix}")


VALUES = (*(str(n) for n in NUMBERS if not 9 < n < 2**31),  # what is possible, but takes its time, is no fault
          *map(str, ODD), "a.mp4", "list.jsonl", "é\udcff", "1,2", "(1,", "8x8", "16x16", "0x0", "1000000x1000000",
          "-1x5", "true", "1e9", "1_0", "x" * 300, ".", "..", "out.d/x", "a/b", "cpu", "x.mp4", "x.PNG", "x.gif",
          "ddpm", "v", "--", "-1", "'a b'", "\n", "%d", "~", "m.safetensors")


def command_lines(rng, folder, world):
    world.fill(folder, "a.mp4", "RGB.png", "nano.safetensors")
    write(os.path.join(folder, "list.jsonl"), b'{"path": "a.mp4", "caption": "x"}\n')
    write(os.path.join(folder, "config.py"), b"model = 'micro'\nframes = 4\nvideo = 'list.jsonl'\n")
    write(os.path.join(folder, "prompts.txt"), bend(b"a cat\na dog\n", rng) if rng.random() < 0.5 else b"a cat\n")
    sampling = ["a cat", "--ckpt=nano.safetensors", "--steps=1"]
    encode = ["enc", "--ckpt=nano.safetensors", "--video=list.jsonl", "--frames=4", "--size=16x16", "--fps=8"]
    script, main, kind, argv = rng.choices((
        ("sample.py", sample.main, sample.Options, [*sampling, "--out=out.gif"]),
        ("sample.py", sample.main, sample.Options, [*sampling, "--prompts=prompts.txt"]),
        ("train.py", train.main, Config, ["config.py", *SMALL]),
        ("clips/check.py", checking.main, checking.Options, ["list.jsonl", "--frames=4"]),
        ("clips/encode.py", encoding.main, encoding.Options, encode)), (3, 3, 1, 3, 3))[0]  # a dry run takes seconds
    for _ in range(rng.choice((1, 1, 2, 3))):
        value, option = rng.choice(VALUES).replace("\0", ""), f"--{rng.choice(sorted(kind.__dataclass_fields__))}"
        at, change = rng.randrange(len(argv) + 1), rng.randrange(8)
        words = {4: [option, value], 5: [rng.choice((option, value, option[:-1] + "=1", "-h", "--help", "-x", ""))],
                 6: [], 7: [argv[at].partition("=")[0] + "=" + value] if at < len(argv) else []}
        argv[at : at + (change > 5)] = words.get(change, [f"{option}={value}"])
    argv += ["--dry_run"] * (script == "train.py")  # no fuzzer may train
    return started(main, script, *argv, asked=True)


DOORS = {"lists": lists, "tars": tars, "images": images, "clips": clips, "animated": animated, "gallery": gallery,
         "safetensors": safetensors, "ckpt": ckpt, "config.json": config_json, "configs": configs,
         "command lines": command_lines, "given": given}
