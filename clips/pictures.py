"""Frames and image files -> pictures of one size: upright, in RGB, with square pixels, resized and cropped.

What a viewer shows on a page, white unless told otherwise, is what is trained on.
"""

import io
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import av
import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps

from cli import warn
from clips.decode import PIXEL_LIMIT, Bad, open_file, require_file

# what has the names of images; for some of what else Pillow knows it starts a program. The last is not in every Pillow
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF")
UNKNOWN, BT709, HD = 2, 1, 720  # color spaces as libav numbers them; lines of a picture


@dataclass(frozen=True)
class View:
    """Which part of a picture to keep, when it is wider or higher than wanted, whether to mirror it, and the color that
    shows through where it is transparent."""

    left: float = 0.5  # share of the surplus that is cut off on the left, in [0, 1)
    top: float = 0.5
    mirror: bool = False
    background: str = "white"


def read_color(text: str) -> tuple[int, int, int]:
    """The levels of a color, by its name in CSS or as #rrggbb. Raises ValueError."""
    with suppress(ValueError):
        levels = ImageColor.getrgb(text)
        if len(levels) == 3:
            return levels
    raise ValueError(f"background must be a color, like white or #ffcc00, got {text!r}")


def fit_frame(frame: av.VideoFrame, aspect: float, width: int, height: int, view: View) -> torch.Tensor:
    """A frame of a video -> uint8 (3, height, width), resized bicubic with antialiasing.

    aspect  width of a pixel divided by its height
    """
    size, turn = cover(*upright_size(frame, aspect), width, height), quarters(frame)
    w, h = size[::-1] if turn % 2 else size  # resized before it is turned
    if frame.colorspace == UNKNOWN and frame.height >= HD:  # as browsers show it; libav takes BT.601
        frame.colorspace = BT709
    if frame.format.has_palette or frame.format.components[-1].is_alpha:
        colors, alpha = np.split(frame.reformat(format="rgba").to_ndarray().astype(np.uint16), [3], axis=2)
        whole = colors * alpha + np.array(read_color(view.background), np.uint16) * (255 - alpha)
        frame = av.VideoFrame.from_ndarray(((whole + 127) // 255).astype(np.uint8))
    pixels = frame.reformat(w, h, "rgb24", interpolation="BICUBIC").to_ndarray()
    return crop(np.rot90(pixels, turn), width, height, view)


def fit_image(path: str, width: int, height: int, view: View) -> torch.Tensor:
    """An image file, or the first frame of an animation -> uint8 (3, height, width), like `fit_frame`. Raises Bad."""
    require_file(path)
    return fit_loaded(load_image(path), width, height, view)


def fit_loaded(image: Image.Image, width: int, height: int, view: View) -> torch.Tensor:
    """An image as `load_image` gives it -> uint8 (3, height, width)."""
    small = image.resize(cover(*image.size, width, height), Image.BICUBIC)  # weighed with alpha, where there is some
    return crop(np.asarray(opaque(small, image.info.get("icc_profile"), view.background)), width, height, view)


def cover(w: float, h: float, width: int, height: int) -> tuple[int, int]:
    """The size at which a picture of the shape w x h just covers width x height. Raises Bad when that is too large."""
    scale = max(width / w, height / h)
    size = max(width, round(w * scale)), max(height, round(h * scale))
    if size[0] * size[1] > PIXEL_LIMIT:
        raise Bad("absurd shape")
    return size


def crop(pixels: np.ndarray, width: int, height: int, view: View) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (3, height, width)."""
    H, W = pixels.shape[:2]
    top, left = int((H - height + 1) * view.top), int((W - width + 1) * view.left)
    part = pixels[top : top + height, left : left + width]
    return torch.tensor(np.ascontiguousarray(part[:, ::-1] if view.mirror else part)).permute(2, 0, 1)


def upright_size(frame: av.VideoFrame, aspect: float) -> tuple[float, float]:
    """Width and height of a frame once it is upright and its pixels are square."""
    size = frame.width * aspect, frame.height
    return size[::-1] if quarters(frame) % 2 else size


def quarters(frame: av.VideoFrame) -> int:
    """Counterclockwise quarter turns that put a frame upright."""
    return round(frame.rotation / 90) % 4


# ---------------------------------------------------------------------------------------------------------------------
# Image files: what they hold -> what a viewer shows


def load_image(path: str) -> Image.Image:
    """Decode an image file, upright -> L, RGB or RGBA. Raises Bad."""
    try:
        with open_file(path) as file, Image.open(file, formats=FORMATS) as image:
            _, box, _, packing = image.tile[0] if image.tile else (None,) * 4
            image.load()
        with suppress(Exception):  # a picture whose EXIF data are damaged is shown as it lies
            ImageOps.exif_transpose(image, in_place=True)
        return plain(image, box, packing if isinstance(packing, str) else packing and packing[0])
    except Bad:
        raise
    except Exception as error:  # Pillow raises anything on damaged bytes
        raise Bad("not an image that can be read") from error


def plain(image: Image.Image, box: tuple | None, packing: str | None) -> Image.Image:
    """A decoded image -> L, RGB or RGBA, all that is transparent in the alpha channel.

    box      the part of the image that the file fills: the first frame of a GIF may be small
    packing  Pillow's name for how the pixels lie in the file
    """
    key = image.info.get("transparency")  # the color, or gray, that is transparent; of a palette, its alphas
    if image.mode[0] in "IF":
        return gray_of_16_bits(image, key)
    if key is not None and packing in PNG_SCALES:
        scaled = (np.atleast_1d(key) * PNG_SCALES[packing]).clip(max=255).astype(int).tolist()
        image.info["transparency"] = scaled[0] if isinstance(key, int) else tuple(scaled)
    if image.format == "GIF" and box != (0, 0, *image.size):
        canvas = Image.new("RGBA", image.size)
        canvas.paste(image.convert("RGBA").crop(box), box)
        return canvas
    if key is not None or image.mode in ("P", "PA", "LA", "La", "RGBa"):
        return image.convert("RGBA")
    if image.mode == "CMYK":  # not to be resized as amounts of ink
        return opaque(image, image.info.pop("icc_profile", None))
    return image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")


# a PNG names its transparent color in units of the file: times this, it is in units of the pixels that Pillow makes
PNG_SCALES = {"1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
BITS, INTERPRETATION = 258, 262  # tags of TIFF; the latter is 0 where 0 is white


def gray_of_16_bits(image: Image.Image, key: int | None) -> Image.Image:
    """Gray of 16 bits -> L, or RGBA where the gray `key` is transparent. Raises Bad where the range is not known."""
    if not (image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")):
        raise Bad("gray in an unknown range")
    tags, image, values = getattr(image, "tag_v2", {}), image.convert("I"), np.arange(65536)
    top = 2 ** tags.get(BITS, (16,))[0] - 1
    levels = (values.clip(max=top) * 255 / top).round().astype(int)
    gray = image.point((255 - levels if tags.get(INTERPRETATION) == 0 else levels).tolist(), "L")
    if key is None:
        return gray
    return Image.merge("RGBA", [gray] * 3 + [image.point(np.where(values == key, 0, 255).tolist(), "L")])


def opaque(image: Image.Image, profile: bytes | None, background="white") -> Image.Image:
    """L, RGB, RGBA or CMYK, with the color profile of its file -> RGB, as shown on a background."""
    mode, to_srgb = transform(profile, image.mode) if profile else ("RGB", None)
    colors = image if image.mode == mode else image.convert(mode)
    colors = to_srgb.apply(colors) if to_srgb else colors
    if image.mode != "RGBA":
        return colors
    page = Image.new("RGB", image.size, read_color(background))
    page.paste(colors, mask=image.getchannel("A"))
    return page


@lru_cache(32)  # many files share a few profiles, and each transform takes 30 ms to make
def transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(mode, transform from there to sRGB) for images of a mode with a color profile.

    None where viewers do without: the profile is of another kind than the image, is sRGB itself, or cannot be read.
    """
    try:
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        kind = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space)
        if mode != kind and (kind != "RGB" or mode == "CMYK"):
            return "RGB", None
        to_srgb = ImageCms.buildTransform(source, srgb, kind, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        warn("a color profile that cannot be read is taken for sRGB, as browsers do")
        return "RGB", None
    probe = Image.fromarray(np.indices((6, 6, 6), np.uint8).reshape(3, 36, 6).transpose(1, 2, 0) * 51)
    same = kind == "RGB" and np.abs(np.asarray(to_srgb.apply(probe), int) - np.asarray(probe)).max() <= 2
    return ("RGB", None) if same else (kind, to_srgb)
