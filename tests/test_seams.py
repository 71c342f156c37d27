"""The seams of the UNet: a timestep and a prompt for every frame, layouts, decoder and encoder apart.

Random weights in every layer, the tiny model's shape; on its deepest level the cells of some grids are no whole pixels.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from grid import fold, unfold
from model import Clip, Grid, ResBlock, SpatialTransformer, UNet
from sd.presets import MICRO, SD15, TINY

B = 2
# grid, latent sides of the folded image: whole cells at every level, and cells of 2.5 x 1.5 pixels at the deepest
CASES = pytest.mark.parametrize("grid, H, W", [((2, 2), 16, 16), ((1, 3), 8, 24), ((2, 4), 20, 24)])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def make(layout=None, config=TINY, **switches):
    torch.manual_seed(0)
    unet = UNet(replace(config.unet, **switches), layout).eval()
    for p in unet.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    return unet


def inputs(grid, H, W):
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(B, 4, H, W, generator=g), torch.randn(B, 7, TINY.unet.context_dim, generator=g)
    return x, torch.tensor([20, 900]), context, torch.tensor([4.0, 30.0]), grid


def close(a, b):
    return (a - b).abs().max() < 1e-5 * b.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# A timestep per frame


@CASES
def test_equal_timesteps_give_what_one_gives(grid, H, W):
    unet, (x, t, context, fps, grid) = make(), inputs(grid, H, W)
    T = grid[0] * grid[1]
    assert close(unet(x, t[:, None].expand(B, T), context, fps, grid), unet(x, t, context, fps, grid))


@CASES
def test_every_frame_gets_the_embedding_of_its_timestep(grid, H, W):
    """A residual block alone, pixel by pixel: what is added to a pixel is the embedding of the frame at its middle."""
    (rows, cols), T = grid, grid[0] * grid[1]
    block, emb = ResBlock(8, 16, 12, groups=4).eval(), torch.randn(B, T, 16)
    seen = []
    block.out_layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(B, 8, H // 4, W // 4)  # the deepest level
    block(x, emb, Clip(grid, None, emb, None))
    added, expected = seen[0] - block.in_layers(x), block.emb_layers(emb)  # (B, T, 12)
    for i in range(H // 4):
        for j in range(W // 4):
            frame = int((i + 0.5) * rows / (H // 4)) + int((j + 0.5) * cols / (W // 4)) * rows  # Equation 1
            torch.testing.assert_close(added[:, :, i, j], expected[:, frame], rtol=1e-4, atol=1e-5)


def test_timesteps_of_frames_differ_where_the_frames_are():
    """Without attention and with convolutions that see one pixel only, a frame depends on its own timestep alone."""
    unet, (x, t, context, fps, grid) = make(attention_levels=()), inputs((2, 2), 16, 16)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # it would mix all frames
        if isinstance(module, SpatialTransformer):
            module.forward = lambda x, *given: x
    one = t[:, None].repeat(1, 4)
    other = one.clone()
    other[:, 2] = 500
    a, b = (unfold(unet(x, times, context, fps, grid), *grid) for times in (one, other))
    assert torch.equal(a[:, [0, 1, 3]], b[:, [0, 1, 3]]) and not torch.equal(a[:, 2], b[:, 2])


# ---------------------------------------------------------------------------------------------------------------------
# A prompt per frame


@CASES
def test_one_prompt_repeated_gives_what_one_gives(grid, H, W):
    unet, (x, t, context, fps, grid) = make(), inputs(grid, H, W)
    each = context[:, None].expand(B, grid[0] * grid[1], -1, -1)
    assert close(unet(x, t, each, fps, grid), unet(x, t, context, fps, grid))


@CASES
def test_every_token_attends_to_the_prompt_of_its_frame(grid, H, W):
    """Cross-attention alone, token by token, at the deepest level."""
    (rows, cols), T = grid, grid[0] * grid[1]
    attn = make().middle_block[1].transformer_blocks[0].attn2
    h = torch.randn(B, H // 4, W // 4, attn.to_q.in_features)
    context = torch.randn(B, T, 7, TINY.unet.context_dim)
    found = Grid().cross_attention(attn, h, context, Clip(grid, None, None, None))
    for i in range(H // 4):
        for j in range(W // 4):
            frame = int((i + 0.5) * rows / (H // 4)) + int((j + 0.5) * cols / (W // 4)) * rows
            expected = attn(h[:, i, j][:, None], context[:, frame])[:, 0]
            torch.testing.assert_close(found[:, i, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape, grid, says", [
    ({"t": 3}, (2, 2), "t is given for 3 frames, and the grid (2, 2) has 4"),
    ({"t": 4}, None, "t is given for 4 frames"),
    ({"context": 3}, (2, 2), "context is given for 3 frames"),
])
def test_as_many_as_there_are_frames(shape, grid, says):
    x, t, context, fps, _ = inputs(None, 16, 16)
    if "t" in shape:
        t = t[:, None].expand(B, shape["t"])
    if "context" in shape:
        context = context[:, None].expand(B, shape["context"], -1, -1)
    with pytest.raises(ValueError) as refusal:
        make()(x, t, context, fps, grid)
    assert says in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


class Frames(Grid):
    """Frames one by one, as every layout with a time of its own has them; notes what its hooks are given."""

    per_frame = True

    def __init__(self):
        super().__init__()
        self.calls = []

    def self_attention(self, attn, h, clip):
        self.calls.append(("attn1", h.shape, clip.grid))
        return super().self_attention(attn, h, clip)

    def after(self, number, h, clip):
        self.calls.append((number, h.shape, clip.grid))
        return h


@pytest.mark.parametrize("per_frame", [False, True])
def test_a_layout_of_frames_is_stable_diffusion_frame_by_frame(per_frame):
    """To the bit: frames unfolded, taken as a batch and folded again; with timesteps and prompts of their own too."""
    layout = Frames()
    unet, plain = make(layout), make(mixed_embedding=False)
    x, t, context, fps, grid = inputs((2, 2), 16, 16)
    each_t, each_context = t.repeat_interleave(4), context.repeat_interleave(4, 0)
    if per_frame:
        each_t, each_context = torch.arange(8) * 100, torch.randn(8, 7, TINY.unet.context_dim)
        t, context = each_t.view(B, 4), each_context.view(B, 4, 7, -1)
    frames = unfold(x, *grid).flatten(0, 1)
    expected = plain(frames, each_t, each_context, fps.repeat_interleave(4))
    found = unet(x, t, context, fps, grid)
    assert torch.equal(unfold(found, *grid).flatten(0, 1), expected)
    assert torch.equal(fold(expected.unflatten(0, (B, 4)), *grid), found)
    assert all(shape[0] == 4 * B and g == grid for _, shape, g in layout.calls)


def test_without_a_grid_any_layout_is_plain_stable_diffusion():
    x, t, context, fps, _ = inputs(None, 16, 16)
    assert torch.equal(make(Frames())(x, t, context, fps), make()(x, t, context, fps))


@pytest.mark.parametrize("config, hooks", [(MICRO, 7), (TINY, 10), (SD15, 21)])
def test_the_hook_is_called_behind_every_first_residual_block(config, hooks):
    """Where AnimateDiff has its motion modules: numbered in order, in the middle once, and before the upsampling."""
    with FakeTensorMode():
        unet = UNet(config.unet, Frames())
        unet(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, 7, config.unet.context_dim), None, (2, 2))
    calls = [(number, shape[2]) for number, shape, _ in unet.layout.calls if number != "attn1"]
    numbers, sides = zip(*calls)
    middle = hooks // 2 if config is not TINY else 3
    assert numbers == tuple(range(hooks))
    assert sides[: middle + 1] == tuple(sorted(sides[: middle + 1], reverse=True))
    assert sides[middle:] == tuple(sorted(sides[middle:])) and sides[0] == sides[-1] == 16


def test_a_hook_is_called_again_in_the_backward_pass_and_gets_the_same():
    unet = make(Frames(), MICRO)
    x, t, _, fps, grid = inputs((2, 2), 8, 8)
    context = torch.randn(B, 7, MICRO.unet.context_dim)
    unet.checkpointing = True
    with torch.enable_grad():
        unet(x, t, context, fps, grid).square().mean().backward()
    hooks = max(number for number, *_ in unet.layout.calls if number != "attn1") + 1
    first = 1 + next(i for i, (number, *_) in enumerate(unet.layout.calls) if number == hooks - 1)
    again = unet.layout.calls[first:]  # without what nobody's gradient needs
    assert again and set(map(str, again)) <= set(map(str, unet.layout.calls[:first]))


def test_down_middle_and_up_are_the_whole():
    """What feature reuse stands on: the three parts may be called alone, and leave the skips as they were."""
    unet, (x, t, context, fps, grid) = make(mixed_embedding=False), inputs((2, 2), 16, 16)
    emb = unet.embedding(t, fps)
    given = emb, context, unet.layout, Clip(grid, t, emb, x)
    h, skips = unet.down(x, given)
    h = unet.run(unet.middle_block, h, given)
    first, second = (unet.out(unet.up(h, skips, given)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, unet(x, t, context, fps, grid))
