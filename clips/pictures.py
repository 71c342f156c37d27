"""Frames and image files -> pictures of one size, upright, in RGB, with square pixels."""

from dataclasses import dataclass

import av
import numpy as np
import torch
from PIL import Image, ImageOps

from clips.decode import Bad, require_file

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of one size


@dataclass(frozen=True)
class View:
    """Which part of a picture is taken: left and top of what is cut off, as a share of it; mirrored or not."""

    left: float = 0.5  # in 0..1, without 1
    top: float = 0.5
    mirror: bool = False


def cover(w: float, h: float, width: int, height: int) -> tuple[int, int]:
    """The size at which a picture of shape w x h just covers width x height."""
    scale = max(width / w, height / h)
    return max(width, round(w * scale)), max(height, round(h * scale))


def crop(pixels: np.ndarray, width: int, height: int, view: View) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (3, height, width)."""
    H, W = pixels.shape[:2]
    top, left = int((H - height + 1) * view.top), int((W - width + 1) * view.left)
    part = pixels[top : top + height, left : left + width]
    return torch.tensor(np.ascontiguousarray(part[:, ::-1] if view.mirror else part)).permute(2, 0, 1)


def quarters(frame: av.VideoFrame) -> int:
    """Quarter turns, counterclockwise, that put a frame upright."""
    return round(frame.rotation / 90) % 4


def upright_size(frame: av.VideoFrame, aspect: float) -> tuple[float, float]:
    """Width and height of a frame upright, in square pixels."""
    size = frame.width * aspect, frame.height
    return size[::-1] if quarters(frame) % 2 else size


def fit_frame(frame: av.VideoFrame, aspect: float, width: int, height: int, view: View) -> torch.Tensor:
    """Upright, in RGB, with square pixels, resized (bicubic, antialiased) and cropped: uint8 (3, height, width)."""
    size = cover(*upright_size(frame, aspect), width, height)
    w, h = size[::-1] if quarters(frame) % 2 else size  # resized before it is turned
    pixels = frame.reformat(w, h, "rgb24", interpolation="BICUBIC").to_ndarray()
    return crop(np.rot90(pixels, quarters(frame)), width, height, view)


def fit_image(path: str, width: int, height: int, view: View) -> torch.Tensor:
    """Likewise of an image file."""
    require_file(path)
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return crop(np.asarray(image.resize(cover(*image.size, width, height), Image.BICUBIC)), width, height, view)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's verdict
        raise Bad("not an image that can be read") from error
