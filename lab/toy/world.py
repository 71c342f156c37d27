"""The world itself: its words, its drawings, and its files."""

import csv
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

# Any two of these ten are at least 120 apart in RGB, so a colour that is off by half of that can still be named. Every
# shape also differs from every background by 30 in luma: an edge in chroma alone moves in jumps of 2 px in yuv420p.
COLORS = {"red": (255, 60, 50), "green": (40, 205, 50), "blue": (60, 100, 255),
          "yellow": (245, 225, 40), "white": (250, 250, 250), "purple": (190, 60, 230)}
BACKGROUNDS = {"black": (0, 0, 0), "gray": (170, 170, 170), "brown": (115, 50, 5), "teal": (0, 85, 100)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx)

SIZE = 64        # pixels a side; a multiple of the 8 of Stable Diffusion's VAE
CLIP_FPS = 60    # the fastest FPS the model is trained on; the slower ones are read from the same file
SECONDS = 5      # 16 frames at 4 FPS span 3.75 s, so FPS 4 still has a choice of starts
SPEED = 10       # px a second: 2.5 px a frame at 4 FPS, 0.17 at 60
EXTENT = 11.5    # px across a shape: 11.5 + 50 of travel + 2 of margin leave 0.5 px of jitter along the motion
MARGIN = 1       # px between a shape and the frame's border, at least

# ---------------------------------------------------------------------------------------------------------------------
# Words


def triples(split: str) -> list[tuple[str, str, str]]:
    """The (color, shape, direction) of "train" (54), "val" (6) or "test" (12): disjoint, and fixed for ever.

    Every (colour, shape) pair holds out one direction, its number being (colour + shape) mod 4. It is for validation
    where shape = colour + 1 (mod 3), one pair for each colour, and for the test in the other two.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split must be train, val or test, got {split!r}")
    chosen = []
    for c, color in enumerate(COLORS):
        for s, shape in enumerate(SHAPES):
            for d, direction in enumerate(DIRECTIONS):
                held_out = "val" if s == (c + 1) % 3 else "test"
                if split == (held_out if d == (c + s) % 4 else "train"):
                    chosen.append((color, shape, direction))
    return chosen


def scenes(split: str) -> list[tuple[str, str, str, str]]:
    """Every triple of a split on every background: (color, shape, direction, background)."""
    return [(*triple, background) for triple in triples(split) for background in BACKGROUNDS]


def caption(color: str, shape: str, direction=None, background=None) -> str:
    """The sentence for a clip, or for a still when there is no direction; without background it is not mentioned."""
    moving = f" moving {direction}" if direction else ""
    on = f" on a {background} background" if background else ""
    return f"a {color} {shape}{moving}{on}"


def expected(prompt: str):
    """(color, shape, direction, background) that a caption asks for, None for each one it does not mention."""
    words = re.findall(r"[a-z]+", prompt.lower())
    return tuple(next((word for word in words if word in names), None)
                 for names in (COLORS, SHAPES, DIRECTIONS, BACKGROUNDS))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def coverage(shape: str, centers, size=SIZE, extent=EXTENT):
    """How much of each pixel a shape covers: float32 (T, size, size) in 0..1, for centers (T, 2) in pixels.

    The signed distance from a pixel's middle to the outline, clipped to one pixel: antialiased, at sub-pixel
    positions. The center is that of the bounding box, extent world pixels wide and high.
    """
    half = np.float32(extent / 2 * size / SIZE)
    middles = np.arange(size, dtype=np.float32) + 0.5
    cy, cx = np.asarray(centers, dtype=np.float32).T
    y = middles[None, :, None] - cy[:, None, None]  # (T, size, 1)
    x = np.abs(middles[None, None, :] - cx[:, None, None])  # (T, 1, size); all shapes are their own mirror image
    box = np.maximum(np.abs(y), x) - half
    if shape == "circle":
        outside = np.hypot(y, x) - half
    elif shape == "square":
        outside = box
    elif shape == "triangle":  # apex (-half, 0), base corners (half, +-half); the box trims the tips of the slopes
        outside = np.maximum(box, (2 * x - y - half) / np.float32(math.sqrt(5)))
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    return np.clip(0.5 - outside, 0, 1)


def draw(color: str, shape: str, background: str, centers, size=SIZE):
    """uint8 (T, size, size, 3) frames of a shape at centers (T, 2), in pixels of the frame, over a background."""
    levels = np.arange(256)[:, None] / 255
    ramp = (1 - levels) * BACKGROUNDS[background] + levels * COLORS[color]  # (256, 3), from background to shape
    return ramp.round().astype(np.uint8)[(coverage(shape, centers, size) * 255).round().astype(np.uint8)]


def trajectory(direction: str | None, times, rng, size=SIZE):
    """Centers (T, 2) in pixels at times (T,) of 0..SECONDS; direction None stands still anywhere in the frame.

    Across the motion the position is uniform over the frame; along it, the middle of the clip is the middle of the
    frame, give or take what little the travel leaves.
    """
    velocity = SPEED * np.array(DIRECTIONS.get(direction, (0, 0)))
    room = SIZE - EXTENT - 2 * MARGIN - np.abs(velocity) * SECONDS  # (2,), px that the path as a whole may shift
    middle = SIZE / 2 + room * rng.uniform(-0.5, 0.5, 2)
    return (middle + velocity * (np.asarray(times)[:, None] - SECONDS / 2)) * size / SIZE


def true_render(scene, rng, frames: int, fps: float):
    """Draw a scene as a perfect model would, from a random start of its path: uint8 (T, SIZE, SIZE, 3)."""
    color, shape, direction, background = scene
    times = rng.uniform(0, SECONDS - (frames - 1) / fps) + np.arange(frames) / fps
    return draw(color, shape, background, trajectory(direction, times, rng))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def render(folder: str, seed=0, clips=864, images=16, captioned=720, size=SIZE, moving=False, workers=None):
    """Render a world into a folder, which must be absent or empty; the same seed makes the same files.

        videos.csv, videos/<page_dir>/<videoid>.mp4   clips of training triples, in WebVid's form
        labels/<label>/000.png                        images of each of the 72 labels; 144 if `moving`
        images.jsonl, images/00000.png                captioned images
        world.json                                    seed, counts, size

    clips and captioned are totals, images counts per label. With `moving` half of the images are of something that
    moves, and their labels and captions say so: only they can tell a model what a prompt of motion looks like at FPS 0
    and 120. Raises ValueError for arguments that make no world, OSError for a folder that cannot be written.
    """
    folder = os.path.abspath(folder)
    if size % 2 or size < 16:
        raise ValueError(f"size must be even, as H.264's yuv420p needs it, and >= 16, got {size}")
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ValueError(f"{folder} is there already: choose another folder, or remove it")
    part = folder + ".part"  # renamed when whole, so that half a world is never taken for one
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(os.path.join(part, "images"))
    try:
        world = {"seed": seed, "clips": clips, "images": images, "captioned": captioned, "size": size,
                 "moving": moving}
        write_world(part, world, workers or os.cpu_count())
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_world(root: str, world: dict, workers: int):
    """Write every file of a world. Threads do it: libav, Pillow and numpy release the interpreter while they work."""
    counts = {write_clip: world["clips"], write_labelled: label_count(world) * world["images"],
              write_captioned: world["captioned"]}
    jobs = [(write, i) for write, count in counts.items() for i in range(count)]
    with ThreadPoolExecutor(workers) as pool:
        try:
            results = pool.map(lambda job: job[0](root, job[1], world), jobs)
            made = list(tqdm(results, total=len(jobs), desc="render", unit="file", mininterval=1))
        finally:
            pool.shutdown(cancel_futures=True)  # an error, or Ctrl-C, does not wait for the files still to come
    with open(os.path.join(root, "videos.csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["videoid", "contentUrl", "duration", "page_dir", "name"], *made[:world["clips"]]])
    with open(os.path.join(root, "images.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in made[len(made) - world["captioned"]:])
    with open(os.path.join(root, "world.json"), "w", encoding="utf-8") as file:
        json.dump(world, file)


def write_clip(root: str, index: int, world: dict) -> list[str]:
    """Write a clip -> its row of videos.csv. Any 54 in a row show every triple, 216 also on every background."""
    train = triples("train")
    *subject, direction = train[index % len(train)]
    background = list(BACKGROUNDS)[(index + index // len(train)) % len(BACKGROUNDS)]
    times = np.arange(SECONDS * CLIP_FPS) / CLIP_FPS
    frames, name = content(world, 0, index, subject, direction, background, times)
    page, number = f"{index // 50 * 50 + 1:06d}_{index // 50 * 50 + 50:06d}", f"{index + 1:08d}"
    url = f"videos/{page}/{number}.mp4"
    os.makedirs(os.path.join(root, "videos", page), exist_ok=True)
    write_mp4(os.path.join(root, url), frames)
    return [number, url, f"PT00H00M{SECONDS:02d}S", page, name]


def write_labelled(root: str, index: int, world: dict):
    """Write a labelled image into the folder of its label."""
    labels = label_count(world)
    subject, direction, background = still(index % labels, world)
    frames, _ = content(world, 1, index, subject, direction, background)
    folder = os.path.join(root, "labels", caption(*subject, direction, background))
    os.makedirs(folder, exist_ok=True)
    Image.fromarray(frames[0]).save(os.path.join(folder, f"{index // labels:03d}.png"))


def write_captioned(root: str, index: int, world: dict) -> dict[str, str]:
    """Write a captioned image -> its line of images.jsonl."""
    frames, text = content(world, 2, index, *still(index, world))
    path = f"images/{index:05d}.png"
    Image.fromarray(frames[0]).save(os.path.join(root, path))
    return {"path": path, "caption": text}


def still(index: int, world: dict):
    """(subject, direction, background) of an image: any 72 in a row show every subject on every background. With
    `moving`, of every other 72 the subject moves in one of its trained directions; else the direction is None."""
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    subject, turn = pairs[index % len(pairs)], index // len(pairs)
    trained = [direction for *pair, direction in triples("train") if tuple(pair) == subject]
    direction = trained[turn % len(trained)] if world["moving"] and index // 72 % 2 else None
    return subject, direction, list(BACKGROUNDS)[(index + turn) % len(BACKGROUNDS)]


def label_count(world: dict) -> int:
    return 144 if world["moving"] else 72


def content(world: dict, kind: int, index: int, subject, direction, background, times=None):
    """(frames, caption) of a file, a function of (world, kind, index) alone, whatever thread draws it. Without times it
    is one frame, at any moment."""
    rng, size = np.random.default_rng([world["seed"], kind, index]), world["size"]
    if times is None:
        times = rng.uniform(0, SECONDS, 1) if direction else [0]
    frames = draw(*subject, background, trajectory(direction, times, rng, size), size)
    named = None if rng.random() < 0.25 else background  # so that prompts without a background work too
    return frames, caption(*subject, direction, named)


def write_mp4(path: str, frames):
    """frames: uint8 (T, H, W, 3), H and W even, written at CLIP_FPS as H.264 that colours survive (crf 12)."""
    _, height, width, _ = frames.shape
    with av.open(path, "w") as file:
        # a key frame every half second keeps seeking cheap; one thread, since as many files as cores are in the making
        stream = file.add_stream("libx264", rate=CLIP_FPS, options={"crf": "12", "preset": "veryfast", "g": "30"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = width, height, "yuv420p", 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode(None))
