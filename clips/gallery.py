"""A gallery: one page that holds its clips, with the prompt, the seed and the settings of each.

    python sample.py --prompts prompts.txt --num 5 --out gallery.html

The page is a single file without scripts, which loads nothing: it can be kept, sent, and opened anywhere.
"""

import base64
import io
import os
import tempfile
from contextlib import contextmanager
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from cli import write_text
from clips.write import claim_paths, read_metadata, write_gif

KINDS = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ margin: 1rem; font: 14px/1.4 system-ui, sans-serif; color: #222; background: #fff }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 1.5rem 1rem }}
figure {{ margin: 0; overflow-wrap: anywhere }}
p {{ margin: 0; max-height: 8.4em; overflow-y: auto }}
video, img {{ width: 100%; background: #eee }}
.small {{ image-rendering: pixelated }}
summary, small {{ color: #666 }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
</html>
"""


def media_tag(data: bytes, kind: str, width: int) -> str:
    """HTML that holds a clip in itself and plays it in a loop.

    kind   ".mp4", ".gif" or ".png"
    width  of a frame, in pixels: small ones are shown as sharp squares
    """
    small = ' class="small"' if width < 180 else ""
    about = f'src="data:{KINDS[kind]};base64,{base64.b64encode(data).decode()}"{small}'
    if kind == ".mp4":  # browsers start muted clips alone
        return f"<video {about} autoplay loop muted playsinline></video>"
    return f'<img {about} alt="">'


def image_tag(image: Image.Image) -> str:
    image.save(data := io.BytesIO(), "PNG")
    return media_tag(data.getvalue(), ".png", image.width)


def clip_tag(frames: np.ndarray, fps: float) -> str:
    """HTML of frames (T, H, W, 3) as an animated picture."""
    write_gif(data := io.BytesIO(), iter(frames), fps, b"")
    return media_tag(data.getvalue(), ".gif", frames.shape[2])


def figure(path: str) -> str:
    """HTML of a clip that sample.py made, with its prompt, seed and settings. Raises ValueError as read_metadata."""
    told, kind = read_metadata(path), os.path.splitext(path)[1].lower()
    clip = media_tag(Path(path).read_bytes(), kind, told["size"][0])
    prompt = told.pop("prompt") or "; ".join(f"{n}: {text}" for n, text in told["prompts_at"].items())
    seed = told.pop("seed")
    settings = "<br>".join(escape(f"{name}: {value}") for name, value in told.items()
                           if value not in (None, "", [], {}, False))
    return (f'<figure>{clip}<figcaption><p dir="auto">{escape(prompt)}</p><small>seed {seed}</small>'
            f"<details><summary>settings</summary>{settings}</details></figcaption></figure>")


def is_gallery(out: str) -> bool:
    return out.lower().endswith(".html") and not os.path.isdir(out)


@contextmanager
def claim_outputs(out: str, videos: list[tuple[str, int]], still: bool):
    """Context manager: as clips.write.claim_paths, but `out` may be a gallery: then its clips are files of a temporary
    folder, and at the end, or at an interruption, the page is made of those that are there."""
    if not is_gallery(out):
        with claim_paths(out, videos, still) as paths:
            yield paths
        return
    with (tempfile.TemporaryDirectory() as folder, claim_paths(out, [("", 0)], still) as (page,),
          claim_paths(folder, videos, still) as paths):
        try:
            yield paths
        finally:
            made = [path for path in paths if os.path.exists(path)]
            if made:
                title = f"{len(made)} clip{'s' * (len(made) > 1)}"
                write_text(page, PAGE.format(title=title, figures="\n".join(map(figure, made))))
