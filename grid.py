"""Frames <-> grid image: how a video becomes something an image model can look at (paper 4.1.1).

Frames fill the first *column* of the grid top to bottom, then the next column:

    T = 6, rows = 2, cols = 3          0 2 4
                                       1 3 5
"""

# ---------------------------------------------------------------------------------------------------------------------
# The shape of the grid: the factor pair of T nearest to a square


def grid_shape(T: int) -> tuple[int, int]:
    """(rows, cols) of the grid for T frames: rows * cols == T, rows <= cols, as square as T allows.

    T = 16 is (4, 4), 32 is (4, 8), 12 is (3, 4); T = 1, an image, is (1, 1).
    Raises ValueError when T < 1, and when T is a prime above 3 (its only grid is one long row of frames).
    """
    if T < 1:
        raise ValueError(f"a video has at least 1 frame, not {T}")
    rows = _largest_factor_up_to_root(T)
    if rows == 1 and T > 3:
        # T - 1 and T + 1 are even and at least 4, so both make a grid of two rows or more
        raise ValueError(f"{T} frames make no grid, because {T} is prime: use {T - 1} or {T + 1}")
    return rows, T // rows


def _largest_factor_up_to_root(T: int) -> int:
    return max(f for f in range(1, int(T**0.5) + 1) if T % f == 0)


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
