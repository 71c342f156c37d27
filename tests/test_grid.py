"""grid.py: every pixel is where Equation 1 puts it, both directions lose nothing, and only real grids are accepted."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grid import fold, frame_of_pixel, grid_shape, unfold

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]
quick = settings(max_examples=100, deadline=None)
side, few = st.integers(1, 7), st.integers(1, 3)


def any_bits(shape, dtype, seed):
    """A tensor of random bytes: every value that the dtype has can occur, NaN, infinity and -0.0 among them."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=g).bool()
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(256, (*shape[:-1], shape[-1] * size), generator=g, dtype=torch.uint8).view(dtype)


def same_bits(a, b):
    a, b = (x.clone(memory_format=torch.contiguous_format) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, n))


# ---------------------------------------------------------------------------------------------------------------------
# Equation 1


@pytest.mark.parametrize("rows, cols, h, w", [
    (1, 1, 3, 5), (1, 2, 3, 3), (1, 3, 2, 5), (2, 2, 3, 5), (2, 3, 5, 3), (3, 4, 1, 7), (4, 4, 2, 2), (4, 8, 3, 1),
    (3, 2, 2, 3),
])
def test_every_pixel_is_where_equation_1_puts_it(rows, cols, h, w):
    B, C, T = 2, 3, rows * cols
    video = torch.arange(B * T * C * h * w).reshape(B, T, C, h, w)  # no two values alike
    image = fold(video, rows, cols)
    assert image.shape == (B, C, rows * h, cols * w)
    back = unfold(image, rows, cols)
    assert back.shape == video.shape
    for x in range(rows * h):
        for y in range(cols * w):
            t = x // h + (y // w) * rows
            assert image[:, :, x, y].equal(video[:, t, :, x % h, y % w])
            assert back[:, t, :, x % h, y % w].equal(image[:, :, x, y])


def test_frames_fill_the_first_column_top_to_bottom():
    image = fold(torch.arange(6).reshape(1, 6, 1, 1, 1), 2, 3)
    assert image[0, 0].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert unfold(image, 2, 3).flatten().tolist() == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Inverses, to the bit


@quick
@given(few, side, side, few, side, side, st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_unfold_undoes_fold(B, rows, cols, C, h, w, dtype, seed):
    video = any_bits((B, rows * cols, C, h, w), dtype, seed)
    assert same_bits(unfold(fold(video, rows, cols), rows, cols), video)


@quick
@given(few, side, side, few, side, side, st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_fold_undoes_unfold(B, rows, cols, C, h, w, dtype, seed):
    image = any_bits((B, C, rows * h, cols * w), dtype, seed)
    assert same_bits(fold(unfold(image, rows, cols), rows, cols), image)


@quick
@given(side, side, side, side, st.integers(0, 2**32))
def test_views_with_odd_strides_fold_alike(rows, cols, h, w, seed):
    """A transposed video, and every other frame of a longer one, fold as their copies do, and stay as they were."""
    video = any_bits((2, 2 * rows * cols, 3, w, h), torch.float32, seed).mT[:, ::2]
    before = video.clone()
    assert same_bits(fold(video, rows, cols), fold(before, rows, cols))
    assert same_bits(video, before)


# ---------------------------------------------------------------------------------------------------------------------
# The shape of the grid


def test_grid_shape_is_the_factor_pair_nearest_to_a_square():
    for T in range(1, 301):
        if is_prime(T) and T > 3:
            continue
        rows, cols = grid_shape(T)
        pairs = [(r, T // r) for r in range(1, T + 1) if T % r == 0 and r <= T // r]
        assert (rows, cols) == min(pairs, key=lambda pair: pair[1] - pair[0]), T
        assert rows * cols == T and rows <= cols
        assert rows > 1 or T <= 3


@pytest.mark.parametrize("T, shape", [
    (1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (12, (3, 4)), (16, (4, 4)), (32, (4, 8)), (256, (16, 16)),
])
def test_grid_shapes_named_in_the_design(T, shape):
    assert grid_shape(T) == shape


def test_primes_are_refused_with_the_usable_numbers_on_both_sides():
    primes = [T for T in range(4, 301) if is_prime(T)]
    assert len(primes) == 60
    for T in primes:
        with pytest.raises(ValueError, match="prime") as refusal:
            grid_shape(T)
        below, above = sorted({int(n) for n in re.findall(r"\d+", str(refusal.value))} - {T})
        assert below < T < above
        for usable in (below, above):
            rows, cols = grid_shape(usable)
            assert rows * cols == usable and rows > 1


@pytest.mark.parametrize("T", [0, -1, -16])
def test_fewer_than_one_frame_is_refused(T):
    with pytest.raises(ValueError, match=f"got {T}$"):
        grid_shape(T)


# ---------------------------------------------------------------------------------------------------------------------
# Which frame a pixel belongs to


@quick
@given(few, side, side, few, side, side)
def test_whole_cells_hold_the_pixels_of_their_frame(B, rows, cols, C, h, w):
    numbers = torch.arange(rows * cols).view(1, -1, 1, 1, 1).expand(1, -1, 1, h, w)
    assert torch.equal(frame_of_pixel(rows * h, cols * w, rows, cols), fold(numbers, rows, cols)[0, 0])


@quick
@given(st.integers(1, 40), st.integers(1, 40), side, side)
def test_a_pixel_belongs_to_the_cell_that_holds_its_middle(H, W, rows, cols):
    found = frame_of_pixel(H, W, rows, cols)
    for x in range(H):
        for y in range(W):
            row, col = found[x, y].item() % rows, found[x, y].item() // rows
            assert row * H <= (x + 0.5) * rows < (row + 1) * H and col * W <= (y + 0.5) * cols < (col + 1) * W


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit is refused


@pytest.mark.parametrize("rows, cols", [(2, 4), (1, 1), (3, 3), (6, 2), (1, 5)])
def test_fold_refuses_a_grid_of_another_size(rows, cols):
    with pytest.raises(ValueError, match=f"6 frames .* {rows} x {cols}"):
        fold(torch.zeros(1, 6, 2, 3, 3), rows, cols)


@pytest.mark.parametrize("height, width", [(7, 6), (6, 8), (5, 5), (1, 3), (4, 2)])
def test_unfold_refuses_sides_that_do_not_divide(height, width):
    with pytest.raises(ValueError, match=f"{height} x {width}"):
        unfold(torch.zeros(1, 2, height, width), 2, 3)
