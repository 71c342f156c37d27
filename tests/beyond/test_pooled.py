"""Pooled attention beside a softmax written out, token by token."""

import math

import pytest
import torch
from conftest import ROOT

import sd
from beyond.pooled import Pooled, pooled_attention
from grid import fold, grid_shape, unfold
from model import Attention, Clip, Grid, UNetConfig
from sd.presets import MICRO, TINY
from training.account import count_flop

C, HEADS = 8, 2


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def attn():
    torch.manual_seed(0)
    return Attention(C, C, HEADS)


def close(a, b):
    return (a - b).abs().max() < 1e-5 * b.abs().max()


def written_out(attn, h, grid, side_at):
    """The same as `pooled_attention`, by a loop over frames, heads and squares, in float64."""
    q, k, v = (unfold(layer(h).double().permute(0, 3, 1, 2), *grid) for layer in (attn.to_q, attn.to_k, attn.to_v))
    out, (B, T, _, height, width) = torch.zeros_like(q), q.shape
    for b, t, head in ((b, t, head) for b in range(B) for t in range(T) for head in range(HEADS)):
        mine = slice(head * C // HEADS, (head + 1) * C // HEADS)
        keys, values, counts = [], [], []
        for other in range(T):
            side = 1 if other == t else side_at(abs(other - t))
            for i in range(0, height, side):
                for j in range(0, width, side):
                    square = (b, other, mine, slice(i, i + side), slice(j, j + side))
                    keys.append(k[square].mean((1, 2)))
                    values.append(v[square].mean((1, 2)))
                    counts.append(k[square][0].numel())
        logits = q[b, t, mine].flatten(1).T @ torch.stack(keys).T / math.sqrt(C / HEADS)
        weights = torch.tensor(counts) * logits.exp()
        weights = weights / weights.sum(1, keepdim=True)
        out[b, t, mine] = (weights @ torch.stack(values)).T.unflatten(1, (height, width))
    return attn.to_out(fold(out, *grid).permute(0, 2, 3, 1).float())


# whole squares, ragged ones, frames higher than wide, squares larger than a frame
SHAPES = [(4, 4, 4), (4, 3, 5), (12, 4, 2), (16, 3, 5), (16, 1, 2)]


@pytest.mark.parametrize("T, height, width", SHAPES)
@pytest.mark.parametrize("side", [2, 4])
def test_it_is_the_softmax_over_own_tokens_and_means_of_others(attn, T, height, width, side):
    rows, cols = grid_shape(T)
    h = 2 * torch.randn(2, rows * height, cols * width, C)
    same = attn, h, (rows, cols), lambda distance: side
    assert close(pooled_attention(*same), written_out(*same))


def test_squares_grow_with_the_distance_in_time(attn):
    layout, h = Pooled(TINY.unet, squares=4, reach=2), torch.randn(1, 8, 16, C)
    sides = [layout.side(4, d) for d in (1, 2, 7, 8, 31, 32)]
    assert sides == [1, 2, 2, 4, 4, 8]
    found = layout.self_attention(attn, h, Clip((2, 4), None, None, torch.zeros(1, 4, 8, 16)))
    assert close(found, written_out(attn, h, (2, 4), lambda distance: layout.side(4, distance)))
    assert not close(found, Grid().self_attention(attn, h, None))


@pytest.mark.parametrize("T, height, width", SHAPES)
def test_squares_of_one_token_are_the_grid(attn, T, height, width):
    rows, cols = grid_shape(T)
    h = torch.randn(2, rows * height, cols * width, C)
    assert close(pooled_attention(attn, h, (rows, cols), lambda _: 1), Grid().self_attention(attn, h, None))


@pytest.mark.parametrize("T, side, pools", [
    (16, 16, [True, False, False]),  # of 16 frames the largest level with attention alone
    (18, 16, [True, True, True]),  # of more all; there, frames that are 16 apart see 2 x 2 tokens as one
    (18, 8, [True, True, False]),  # cells of 2 x 2 tokens have nothing to pool
    (16, 4, [False] * 3),  # nor have the shipped model's
    (1, 16, [False] * 3),
])
def test_where_it_pools(T, side, pools):
    """Levels 0, 1 and 2 of a UNet with attention on all."""
    rows, cols = grid_shape(T)
    layout, x = Pooled(UNetConfig(attention_levels=(0, 1, 2)), squares=4), torch.zeros(1, 4, rows * side, cols * side)
    attn, clip = Attention(C, C, HEADS), Clip((rows, cols), None, None, x)
    for level, pooled in enumerate(pools):
        h = torch.randn(1, rows * side // 2**level, cols * side // 2**level, C)
        assert close(layout.self_attention(attn, h, clip), Grid().self_attention(attn, h, clip)) != pooled, level


def test_cells_that_are_no_whole_tokens_have_full_attention(attn):
    h, clip = torch.randn(1, 5, 6, C), Clip((2, 4), None, None, torch.zeros(1, 4, 20, 24))
    assert torch.equal(Pooled(TINY.unet).self_attention(attn, h, clip), Grid().self_attention(attn, h, clip))


def test_the_shipped_model_takes_it_as_it_stands():
    """No tensor is missing; at its own size nothing is pooled, and at twice the size the output is near the grid's."""
    unet = sd.load(f"{ROOT}/weights/tiny.safetensors", layout="pooled").unet
    layouts = Grid(), unet.layout, Pooled(unet.cfg, squares=4)
    for side, same in ((8, [True, True, True]), (16, [True, True, False])):
        x, context, out = torch.randn(1, 4, 4 * side, 4 * side), torch.randn(1, 16, 64), []
        for unet.layout in layouts:
            out.append(unet(x, torch.tensor([600]), context, torch.tensor([4.0]), (4, 4)))
        assert [torch.equal(out[0], other) for other in out] == same
        assert all((other - out[0]).norm() < 0.4 * out[0].norm() for other in out)


@pytest.mark.parametrize("options", [{"squares": 0}, {"reach": 2.5}])
def test_options_out_of_range_are_told(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a whole number >= 1, got"):
        Pooled(MICRO.unet, **options)


def test_long_clips_cost_nearly_in_proportion_to_their_frames():
    """Attention's FLOPs on the first level, where four times the frames cost the grid sixteen times as much."""

    def flops(T, layout):
        rows, cols = grid_shape(T)
        with torch.device("meta"):
            attn, h = Attention(64, 64, 1), torch.zeros(1, rows * 16, cols * 16, 64)
            clip = Clip((rows, cols), None, None, torch.zeros(1, 4, rows * 16, cols * 16))
            linear = count_flop(lambda: [attn.to_q(h) for _ in range(4)])
            return count_flop(lambda: layout.self_attention(attn, h, clip)) - linear

    assert flops(16, Grid()) == 16 * flops(4, Grid())
    assert flops(16, Pooled(UNetConfig(), reach=1)) < 5 * flops(4, Pooled(UNetConfig(), reach=1))
