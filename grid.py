"""Frames <-> grid image: how a video becomes something an image model can look at (paper 4.1.1).

Frames fill the first *column* of the grid top to bottom, then the next column:

    T = 6, rows = 2, cols = 3          0 2 4
                                       1 3 5
"""

import math

import torch

# ---------------------------------------------------------------------------------------------------------------------
# The shape of the grid: the factor pair of T nearest to a square


def grid_shape(T: int) -> tuple[int, int]:
    """(rows, cols) of the grid for T frames: rows * cols == T, rows <= cols, as square as T allows.

    T = 16 is (4, 4), 32 is (4, 8), 12 is (3, 4); T = 1, an image, is (1, 1).
    Raises ValueError when T < 1 or T > 10^9, and when T is a prime above 3 (its only grid is one long row of frames).
    """
    if T < 1:
        raise ValueError(f"frames must be >= 1, got {T}")
    if T > 10**9:
        raise ValueError(f"frames must be <= 1,000,000,000, got {T:,}")
    rows = largest_factor(T)
    if rows == 1 and T > 3:
        # T - 1 and T + 1 are even and at least 4, so both make a grid of two rows or more
        raise ValueError(f"frames must make a grid, got {T}, which is prime: use {T - 1} or {T + 1}")
    return rows, T // rows


def largest_factor(n: int) -> int:
    """The largest factor of n that is not above its square root: 16 -> 4, 32 -> 4, 7 -> 1."""
    return max(f for f in range(1, math.isqrt(n) + 1) if n % f == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Temporal-to-spatial transfer (Equation 1):  I[x, y] = V[t][x mod h, y mod w],  t = x // h + (y // w) * rows


def fold(video, rows: int, cols: int):
    """Lay the frames of each video out as one grid image: (B, T, C, h, w) -> (B, C, rows*h, cols*w).

    One permute and one copy, no arithmetic, so `unfold` gives back every bit. Raises ValueError when rows*cols != T.
    """
    B, T, C, h, w = video.shape
    if T != rows * cols:
        raise ValueError(f"{T} frames do not fill a grid of {rows} x {cols}")
    image = video.reshape(B, cols, rows, C, h, w).permute(0, 3, 2, 4, 1, 5)  # (B, C, rows, h, cols, w)
    return image.reshape(B, C, rows * h, cols * w)


def unfold(image, rows: int, cols: int):
    """Cut a grid image back into its frames, the inverse of `fold`: (B, C, rows*h, cols*w) -> (B, T, C, h, w).

    Raises ValueError when the image's sides are not divisible by rows and cols.
    """
    B, C, H, W = image.shape
    if H % rows or W % cols:
        raise ValueError(f"an image of {H} x {W} (height x width) does not cut into {rows} rows and {cols} columns")
    h, w = H // rows, W // cols
    video = image.reshape(B, C, rows, h, cols, w).permute(0, 4, 2, 1, 3, 5)  # (B, cols, rows, C, h, w)
    return video.reshape(B, rows * cols, C, h, w)


def frame_of_pixel(H: int, W: int, rows: int, cols: int, device=None):
    """The number of the frame whose cell holds the middle of each pixel of a grid image -> (H, W) whole numbers.

    Deep in the UNet a cell need not be a whole number of pixels; where it is, this is the t of Equation 1.
    """
    row = ((torch.arange(H, device=device) + 0.5) * rows / H).long()
    col = ((torch.arange(W, device=device) + 0.5) * cols / W).long()
    return row[:, None] + col * rows
