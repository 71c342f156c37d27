"""embed.py and its use in UNet: both embeddings against their formulas, and a fresh model that is still plain SD."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding

from embed import mixed_embedding, projection, timestep_embedding
from grid import fold, unfold
from model import UNet
from sd.presets import SD21, TINY

SHAPES = [  # rows, cols, h, w, channels
    (1, 1, 4, 4, 4), (2, 2, 3, 5, 4), (4, 8, 2, 3, 4), (3, 4, 5, 2, 4), (1, 3, 4, 3, 3), (2, 3, 2, 2, 5),
    (2, 2, 2, 2, 1), (3, 2, 3, 3, 8), (16, 16, 2, 2, 4), (1, 2, 40, 70, 4),
]
BASE = (4, 4, 32, 32, 4)  # 16 frames of 256 x 256


# ---------------------------------------------------------------------------------------------------------------------
# Mixed embedding


def mixed_by_hand(rows, cols, h, w, channels, theta=10_000.0):
    """Equations 2-4 and 18-25 as design.md has them, one number at a time, in float64."""
    half, values = channels // 2, torch.empty(channels, rows * h, cols * w, dtype=torch.float64)
    for c, x, y in product(range(channels), range(rows * h), range(cols * w)):
        if c < half:
            i, j, period = x % h, y % w, theta ** (c / channels)
        else:
            i = j = x // h + (y // w) * rows
            period = theta ** ((c - half) / channels)
        values[c, x, y] = math.sin(i / period) + math.cos(j / period)
    return values


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_embedding_is_the_formula(shape):
    ours = mixed_embedding(*shape)
    assert ours.shape == (shape[4], shape[0] * shape[2], shape[1] * shape[3]) and ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), mixed_by_hand(*shape), rtol=0, atol=2e-7)


def test_theta_is_a_parameter():
    ours = mixed_embedding(2, 3, 3, 2, 6, theta=50.0)
    torch.testing.assert_close(ours.double(), mixed_by_hand(2, 3, 3, 2, 6, theta=50.0), rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_upper_channels_number_the_frames_as_the_grid_does(shape):
    rows, cols, h, w, C = shape
    half, T = C // 2, rows * cols
    frames = unfold(mixed_embedding(*shape)[None], rows, cols)[0]  # (T, C, h, w)
    assert torch.equal(frames[:, :half], frames[:1, :half].expand(T, half, h, w))  # "where" is the same in each frame
    one_each = frames[:, half:, :1, :1]
    assert torch.equal(frames[:, half:], one_each.expand(T, C - half, h, w))  # and "which" the same all over a frame
    for t, k in product(range(T), range(C - half)):
        angle = t / 10_000 ** (k / C)
        assert one_each[t, k].item() == pytest.approx(math.sin(angle) + math.cos(angle), abs=2e-7)


def test_frames_that_fold_puts_somewhere_get_the_embedding_of_that_place():
    rows, cols, h, w, C = 3, 4, 2, 3, 4
    number = fold(torch.arange(12.0).reshape(1, 12, 1, 1, 1).expand(1, 12, 1, h, w), rows, cols)[0, 0]
    torch.testing.assert_close(mixed_embedding(rows, cols, h, w, C)[2], number.sin() + number.cos())


def nearest(points):
    """Smallest distance between two of the points (N, D)."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf).min()


def test_all_places_of_the_base_grid_differ():
    """All 16,384 do, but some by little: such is the formula, with four channels that each only swing in -2..2.

    (i, j) fills the lower channels alone and t the upper alone, so the nearest two places are two positions of one
    frame (0.0044 apart; neighbours 0.09 or more) or two frames at one position (0.076). The noise they are added to
    has size 1: only over many pixels can frames be told apart.
    """
    rows, cols, h, w, C = BASE
    places = mixed_embedding(*BASE).flatten(1).T.double()  # (16384, 4)
    assert len(places.unique(dim=0)) == rows * cols * h * w
    frames = unfold(mixed_embedding(*BASE)[None], rows, cols)[0].double()
    where, which = frames[0, : C // 2], frames[:, C // 2 :, 0, 0]
    assert nearest(where.flatten(1).T) > 0.004
    assert nearest(which) > 0.07
    assert (where[:, 1:] - where[:, :-1]).norm(dim=0).min() > 0.08
    assert (where[:, :, 1:] - where[:, :, :-1]).norm(dim=0).min() > 0.08
    some = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:2000]]
    assert nearest(some) > 0.004


# ---------------------------------------------------------------------------------------------------------------------
# Timestep and FPS sinusoid


@pytest.mark.parametrize("dim", [2, 3, 64, 65, 320, 321])
def test_timestep_embedding_is_stable_diffusions(dim):
    t = torch.cat([torch.arange(0, 1000, 7), torch.arange(121), torch.tensor([999])])
    ours = timestep_embedding(t, dim)
    assert ours.shape == (len(t), dim) and ours.dtype == torch.float32
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [2, 7, 64])
def test_timestep_embedding_is_the_formula(dim):
    """Cosines, then sines, then a zero when dim is odd. fp32 angles up to 999 are good to about 6e-5."""
    times, half = [0, 1, 4, 8, 15, 29.97, 30, 60, 120, 500, 999], dim // 2
    ours = timestep_embedding(torch.tensor(times), dim).double()
    for row, t in zip(ours, times):
        angles = [t * 10_000 ** (-k / half) for k in range(half)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2)
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_every_fps_has_its_own_embedding():
    assert nearest(timestep_embedding(torch.arange(121), 320).double()) > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Inside the UNet


def awake(unet, branch=True, seed=0):
    """Random weights for every layer that starts at zero, so that outputs are not zero; the FPS branch if asked for."""
    g = torch.Generator().manual_seed(seed)
    for name, p in unet.named_parameters():
        if not p.any() and (branch or not name.startswith(("time_proj", "fps_proj"))):
            torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5, generator=g)
    return unet.eval()


def unet(seed=0, **switches):
    torch.manual_seed(seed)
    return UNet(replace(TINY.unet, **switches))


def inputs(B=2, side=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 4, side, side, generator=g)
    context = torch.randn(B, 7, TINY.unet.context_dim, generator=g)
    return x, torch.tensor([3, 981])[:B], context


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_embedding_is_the_sum_of_the_projections():
    net = awake(unet())

    def linear(x, layer):
        return x @ layer.weight.double().T + layer.bias.double()

    def three(x, layers):
        return linear(F.silu(linear(F.silu(linear(x, layers[0])), layers[2])), layers[4])

    def embed(values):
        sinusoid = timestep_embedding(values, TINY.unet.channels).double()
        return linear(F.silu(linear(sinusoid, net.time_embed[0])), net.time_embed[2])

    t, fps = torch.tensor([0, 1, 500, 999]), torch.tensor([0.0, 8, 29.97, 120])
    e_t, e_f = embed(t), embed(fps)
    time, rate = three(e_t, net.time_proj), three(e_f, net.fps_proj)
    assert time.std() > 0.1 and rate.std() > 0.1
    torch.testing.assert_close(net.embedding(t, fps).double(), e_t + time + rate, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.embedding(t).double(), e_t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid, height, width", [((2, 2), 8, 8), ((2, 4), 8, 16), ((1, 3), 4, 12)])
def test_the_mixed_embedding_is_added_to_the_input(grid, height, width):
    mixed = awake(unet())
    without = awake(unet(mixed_embedding=False))
    without.load_state_dict(mixed.state_dict())
    x, t, context = inputs()
    x = x.repeat(1, 1, 2, 2)[:, :, :height, :width]
    fps = torch.tensor([4.0, 120.0])
    added = mixed_embedding(*grid, height // grid[0], width // grid[1], 4)
    output = mixed(x, t, context, fps, grid)
    assert torch.equal(output, without(x + added, t, context, fps, grid))
    assert (output - without(x, t, context, fps, grid)).abs().max() > 0.1
    assert torch.equal(mixed(x, t, context, fps), without(x, t, context, fps))  # no grid, nothing to add


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_the_mixed_embedding_is_added_in_fp32(given):
    """Before the first convolution, and before the input is rounded to the weights' dtype."""
    net, seen = unet().bfloat16(), []
    net.input_blocks[0][0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    x, t, context = inputs()
    x = x.to(given)
    net(x, t, context.bfloat16(), torch.tensor([8.0, 8.0]), (2, 2))
    assert torch.equal(seen[0], (x.float() + mixed_embedding(2, 2, 4, 4, 4)).bfloat16())


def test_fps_changes_the_output_once_the_projections_are_trained():
    x, t, context = inputs()
    values = [None, *(torch.full((2,), float(f)) for f in (0, 1, 4, 8, 30, 60, 120))]
    fresh, trained = awake(unet(), branch=False), awake(unet())
    outputs = [trained(x, t, context, fps, (2, 2)) for fps in values]
    for a, b in product(range(len(values)), repeat=2):
        assert a == b or (outputs[a] - outputs[b]).abs().max() > 1e-3
    plain = fresh(x, t, context, None, (2, 2))
    assert all(torch.equal(fresh(x, t, context, fps, (2, 2)), plain) for fps in values)


def test_each_video_has_its_own_fps():
    """The rows of a batch do not mix: each comes out as it does alone, up to the rounding of another batch size."""
    net = awake(unet())
    x, t, context = inputs()
    fps = torch.tensor([1.0, 60.0])
    both = net(x, t, context, fps, (2, 2))
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], context[i : i + 1], fps[i : i + 1], (2, 2)) for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-4)


def test_a_fresh_model_is_plain_stable_diffusion_to_the_bit():
    ours = awake(unet(mixed_embedding=False), branch=False)
    plain = awake(unet(mixed_embedding=False, fps_embedding=False), seed=1)
    extra = plain.load_state_dict(ours.state_dict(), strict=False)
    assert not extra.missing_keys and all(key.startswith(("time_proj.", "fps_proj.")) for key in extra.unexpected_keys)
    x, t, context = inputs()
    expected = plain(x, t, context)
    assert expected.std() > 0.1
    for fps in (torch.zeros(2), torch.tensor([8.0, 30.0]), torch.tensor([120.0, 1.0])):
        assert torch.equal(ours(x, t, context, fps, (2, 2)), expected)
    assert torch.equal(plain(x, t, context, torch.zeros(2), (2, 2)), expected)  # switched off, they are ignored


def test_projections_have_the_published_size():
    with torch.device("meta"):
        branch = [projection(1280), projection(1280)]
        full, plain = UNet(SD21.unet), UNet(replace(SD21.unet, fps_embedding=False))

    def count(*modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    assert count(*branch) == 78_666_240
    assert count(plain) == 865_910_724
    assert count(full) == 865_910_724 + 78_666_240
    assert [tuple(p.shape) for p in full.fps_proj.parameters() if p.ndim == 2] == [
        (5120, 1280), (5120, 5120), (1280, 5120)
    ]
