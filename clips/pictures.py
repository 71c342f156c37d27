"""Frames and image files -> pictures of one size: upright, in RGB, with square pixels, resized and cropped."""

from dataclasses import dataclass

import av
import numpy as np
import torch
from PIL import Image, ImageOps

from clips.decode import Bad, require_file

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class View:
    """Which part of a picture to keep, when it is wider or higher than wanted, and whether to mirror it."""

    left: float = 0.5  # share of the surplus that is cut off on the left, in [0, 1)
    top: float = 0.5
    mirror: bool = False


def fit_frame(frame: av.VideoFrame, aspect: float, width: int, height: int, view: View) -> torch.Tensor:
    """A frame of a video -> uint8 (3, height, width), resized bicubic with antialiasing.

    aspect  width of a pixel divided by its height
    """
    size = cover(*upright_size(frame, aspect), width, height)
    w, h = size[::-1] if quarters(frame) % 2 else size  # resized before it is turned
    pixels = frame.reformat(w, h, "rgb24", interpolation="BICUBIC").to_ndarray()
    return crop(np.rot90(pixels, quarters(frame)), width, height, view)


def fit_image(path: str, width: int, height: int, view: View) -> torch.Tensor:
    """An image file -> uint8 (3, height, width), resized bicubic with antialiasing. Raises Bad."""
    require_file(path)
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return crop(np.asarray(image.resize(cover(*image.size, width, height), Image.BICUBIC)), width, height, view)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # whichever Pillow raises
        raise Bad("not an image that can be read") from error


def cover(w: float, h: float, width: int, height: int) -> tuple[int, int]:
    """The size at which a picture of the shape w x h just covers width x height."""
    scale = max(width / w, height / h)
    return max(width, round(w * scale)), max(height, round(h * scale))


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
