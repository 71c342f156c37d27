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
LABELS = len(COLORS) * len(SHAPES) * len(BACKGROUNDS)
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx)

SIZE = 64        # pixels a side; a multiple of the 8 of Stable Diffusion's VAE
CLIP_FPS = 60    # the fastest FPS the model is trained on; the slower ones are read from the same file
SECONDS = 5      # 16 frames at 4 FPS span 3.75 s, so FPS 4 still has a choice of starts
SPEED = 10       # px a second: 2.5 px a frame at 4 FPS, 0.17 at 60
EXTENT = 11.5    # px across a shape: 11.5 + 50 of travel + 2 of margin leave 0.5 px of jitter along the motion
MARGIN = 1       # px between a shape and the frame's border, at least
GAP = 4          # px between the boxes of two shapes, at least, so that blur and H.264 leave two

# One pair of shapes for every pair of colours is held out of level 2, in whatever directions, and asked for in these.
# Its triples are trained ones of level 1 and in 9 or more other pairs: new is that they are together. They differ in
# colour, shape and direction, so that it shows when these are mixed up; all words are about equally frequent.
HELD_OUT_PAIRS = {
    "val": ("red triangle left, blue square up", "red square down, purple circle left",
            "green circle up, yellow triangle down", "green triangle right, white square left",
            "yellow square right, white circle down"),
    "test": ("red triangle left, green square down", "red square up, yellow circle right",
             "red circle down, white triangle left", "green triangle up, blue circle left",
             "green square right, purple circle up", "blue triangle right, yellow square down",
             "blue square left, white circle right", "blue circle down, purple triangle up",
             "yellow circle up, purple square left", "white triangle down, purple square right"),
}

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


def pairs(split: str) -> list[tuple[str, ...]]:
    """The pairs of triples of level 2, (color, shape, direction) twice in a row, of two colours, the first one's before
    the other's in COLORS: "train" (1080), "val" (5) or "test" (10), fixed for ever. Two shapes that are together in
    one of them, see HELD_OUT_PAIRS, are so in no other one.
    """
    held_out = {name: [tuple(re.findall("[a-z]+", pair)) for pair in texts] for name, texts in HELD_OUT_PAIRS.items()}
    if split in held_out:
        return held_out[split]
    apart = {pair[:2] + pair[3:5] for pair in held_out["val"] + held_out["test"]}
    colors, trained = list(COLORS), triples(split)
    return [one + two for one in trained for two in trained
            if colors.index(one[0]) < colors.index(two[0]) and one[:2] + two[:2] not in apart]


def scenes(split: str, level=1) -> list[tuple[str, ...]]:
    """Every triple, or pair of level 2, of a split on every background: (color, shape, direction, background), or the
    words of two shapes and the background, on every other background the second shape first."""
    if level == 1:
        return [(*triple, background) for triple in triples(split) for background in BACKGROUNDS]
    return [(*(pair, swapped(pair))[turn % 2], background)
            for pair in pairs(split) for turn, background in enumerate(BACKGROUNDS)]


def swapped(pair):
    """A pair with its second shape first."""
    return pair[3:] + pair[:3]


def things(scene) -> list[tuple[str, str, str]]:
    """The (color, shape, direction) of each shape in a scene of any level."""
    return [tuple(scene[n : n + 3]) for n in range(0, len(scene) - 1, 3)]


def describe(scene) -> str:
    """The caption of a scene of any level, in which directions and background may be None."""
    *shown, last = things(scene)
    return "".join(f"{caption(*thing)} and " for thing in shown) + caption(*last, scene[-1])


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


def draw_scene(scene, paths, size=SIZE):
    """uint8 (T, size, size, 3) frames of a scene of any level, its shapes at centers (shapes, T, 2), in pixels, that do
    not touch."""
    first, *others = (draw(color, shape, scene[-1], path, size)
                      for (color, shape, _), path in zip(things(scene), paths))
    for frames in others:
        first = np.where((frames == BACKGROUNDS[scene[-1]]).all(-1, keepdims=True), first, frames)
    return first


def trajectories(scene, times, rng, size=SIZE):
    """Centers (shapes, T, 2) in pixels, of each as `trajectory`; two keep GAP apart from 0 to SECONDS."""
    clip = np.arange(SECONDS * CLIP_FPS + 1) / CLIP_FPS
    while True:  # at the least one draw of 7 will do: where one shape moves across and the other up or down
        paths = np.stack([trajectory(direction, [*times, *clip], rng, size) for _, _, direction in things(scene)])
        if len(paths) == 1 or np.abs(paths[0] - paths[1]).max(-1).min() >= (EXTENT + GAP) * size / SIZE:
            return paths[:, : len(times)]


def true_render(scene, rng, frames: int, fps: float):
    """Draw a scene of any level as a perfect model would, from a random start: uint8 (T, SIZE, SIZE, 3)."""
    times = rng.uniform(0, SECONDS - (frames - 1) / fps) + np.arange(frames) / fps
    return draw_scene(scene, trajectories(scene, times, rng))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def render(folder: str, seed=0, clips=864, images=16, captioned=720, size=SIZE, level=1, workers=None):
    """Render a world into a folder, which must be absent or empty; the same seed makes the same files.

        videos.csv, videos/<page_dir>/<videoid>.mp4   clips of training triples, in WebVid's form
        labels/<label>/000.png                        images of each of the 72 labels
        images.jsonl, images/00000.png                captioned images
        world.json                                    seed, counts, size

    clips and captioned are totals, images counts per label. At level 2 every other clip and captioned image is of two
    shapes, and the ones between are the first half of those of level 1; labels name one shape at every level.

    Raises ValueError for arguments that make no world, OSError for a folder that cannot be written.
    """
    folder = os.path.abspath(folder)
    if size % 2 or size < 16:
        raise ValueError(f"size must be even, as H.264's yuv420p needs it, and >= 16, got {size}")
    if level not in (1, 2):
        raise ValueError(f"level must be 1 or 2, got {level}")
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ValueError(f"{folder} is there already: choose another folder, or remove it")
    part = folder + ".part"  # renamed when whole, so that half a world is never taken for one
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(os.path.join(part, "images"))
    try:
        world = {"seed": seed, "clips": clips, "images": images, "captioned": captioned, "size": size,
                 "level": level}
        write_world(part, world, workers or os.cpu_count())
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_world(root: str, world: dict, workers: int):
    """Write every file of a world. Threads do it: libav, Pillow and numpy release the interpreter while they work."""
    counts = {write_clip: world["clips"], write_labelled: LABELS * world["images"],
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
        json.dump({name: value for name, value in world.items() if (name, value) != ("level", 1)}, file)


def write_clip(root: str, index: int, world: dict) -> list[str]:
    """Write a clip -> its row of videos.csv. Of one shape, any 54 in a row show every triple, 216 also on every
    background."""
    number, rng, two = place(0, index, world)
    train = triples("train")
    triple, background = train[number % len(train)], list(BACKGROUNDS)[(number + number // len(train)) % 4]
    scene = any_pair(rng) if two else (*triple, background)
    frames, name = content(world, rng, scene, np.arange(SECONDS * CLIP_FPS) / CLIP_FPS)
    page, name_of_file = f"{index // 50 * 50 + 1:06d}_{index // 50 * 50 + 50:06d}", f"{index + 1:08d}"
    url = f"videos/{page}/{name_of_file}.mp4"
    os.makedirs(os.path.join(root, "videos", page), exist_ok=True)
    write_mp4(os.path.join(root, url), frames)
    return [name_of_file, url, f"PT00H00M{SECONDS:02d}S", page, name]


def write_labelled(root: str, index: int, world: dict):
    """Write a labelled image into the folder of its label."""
    scene = still(index % LABELS)
    frames, _ = content(world, np.random.default_rng([world["seed"], 1, index]), scene)
    folder = os.path.join(root, "labels", describe(scene))
    os.makedirs(folder, exist_ok=True)
    Image.fromarray(frames[0]).save(os.path.join(folder, f"{index // LABELS:03d}.png"))


def write_captioned(root: str, index: int, world: dict) -> dict[str, str]:
    """Write a captioned image -> its line of images.jsonl."""
    number, rng, two = place(2, index, world)
    frames, text = content(world, rng, any_pair(rng, moving=False) if two else still(number))
    path = f"images/{index:05d}.png"
    Image.fromarray(frames[0]).save(os.path.join(root, path))
    return {"path": path, "caption": text}


def place(kind: int, index: int, world: dict):
    """(number, generator, whether of two shapes) of a file: its number among those like it, and a generator that is
    one of (world, kind, index) alone, whatever thread draws it."""
    number, two = divmod(index, world["level"])
    return number, np.random.default_rng([world["seed"], kind + 3 * two, number]), two


def any_pair(rng, moving=True):
    """A random scene of two trained triples, in any order, without directions when not moving."""
    train = pairs("train")
    pair = train[rng.integers(len(train))]
    pair = swapped(pair) if rng.random() < 0.5 else pair
    if not moving:
        pair = (*pair[:2], None, *pair[3:5], None)
    return *pair, list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]


def still(index: int):
    """The scene of an image of one shape, without a direction: any LABELS in a row show every subject on every
    background."""
    subjects = [(color, shape) for color in COLORS for shape in SHAPES]
    turn = index // len(subjects)
    return *subjects[index % len(subjects)], None, list(BACKGROUNDS)[(index + turn) % len(BACKGROUNDS)]


def content(world: dict, rng, scene, times=(0,)):
    """(frames, caption) of a file."""
    frames = draw_scene(scene, trajectories(scene, times, rng, world["size"]), world["size"])
    named = None if rng.random() < 0.25 else scene[-1]  # so that prompts without a background work too
    return frames, describe((*scene[:-1], named))


def write_mp4(path: str, frames):
    """frames: uint8 (T, H, W, 3), H and W even, written at CLIP_FPS as H.264 that colours survive (crf 12)."""
    _, height, width, _ = frames.shape
    with av.open(path, "w") as file:
        # a key frame every half second keeps seeking cheap; one thread, since as many files as cores are in the making
        stream = file.add_stream("libx264", rate=CLIP_FPS, options={"crf": "12", "preset": "veryfast", "g": "30"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = width, height, "yuv420p", 1
        for frame in frames:
            # converted here, each with a scaler of its own: with one for all, `encode`'s or ours, x264 wrote other
            # bytes for one file in some hundreds
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame).reformat(format="yuv420p")))
        file.mux(stream.encode(None))
