"""Swapped attention: its windows, who asks whom, and that a fresh one adds nothing."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beyond.swap import Swap, SwappedAttention, frames, side, windows
from grid import fold, unfold
from model import SpatialTransformer, UNet
from sd.presets import SD15, TINY


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_a_fresh_one_is_stable_diffusion_frame_by_frame():
    torch.manual_seed(0)
    plain = UNet(replace(TINY.unet, mixed_embedding=False))
    nn.init.normal_(plain.out[2].weight)
    unet, grid, T = UNet(TINY.unet, Swap(TINY.unet)), (2, 3), 6
    unet.load_state_dict(plain.state_dict(), strict=False)
    x, t, fps = torch.randn(2, 4, 16, 24), torch.tensor([999, 20]), torch.tensor([4.0, 30.0])
    context = torch.randn(2, 7, TINY.unet.context_dim)
    each = (v.repeat_interleave(T, 0) for v in (t, context, fps))
    expected = plain(unfold(x, *grid).flatten(0, 1), *each)
    assert torch.equal(unet(x, t, context, fps, grid), fold(expected.unflatten(0, (-1, T)), *grid))
    assert not torch.equal(unet(x, t, context, fps, grid), plain(x, t, context, fps, grid))


@pytest.mark.parametrize("length, largest", [(32, 8), (20, 5), (10, 5), (4, 4), (11, 1), (1, 1)])
def test_sides_of_windows_divide_those_of_frames(length, largest):
    assert side(length) == largest


@pytest.mark.parametrize("T, H, W", [(2, 16, 5), (3, 5, 8), (1, 2, 2)])
@pytest.mark.parametrize("even", [True, False])
def test_it_is_the_formula_written_out(T, H, W, even):
    """Token by token, with the keys that stand in the same window of any frame, in float64."""
    B, C, heads = 2, 8, 2
    torch.manual_seed(0)
    module = SwappedAttention(C, replace(TINY.unet, norm_groups=2, head_width=4), even).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    spatial, mixed = torch.randn(2, B * T, C, H, W, dtype=torch.float64)
    found = module(spatial, mixed, T)

    def stream(frames, norm, proj):
        return proj(F.group_norm(frames, 2, norm.weight, norm.bias, 1e-6).permute(0, 2, 3, 1)).unflatten(0, (B, T))

    first, second = (spatial, mixed) if even else (mixed, spatial)
    x, y = stream(first, module.norm_x, module.proj_x), stream(second, module.norm_y, module.proj_y)
    expected, attn, (height, width) = torch.empty_like(x), module.attn, (side(H), side(W))
    for b, i, j in ((b, i, j) for b in range(B) for i in range(H) for j in range(W)):
        seen = [(n, k, m) for n in range(T) for k in range(H) for m in range(W)
                if k // height == i // height and m // width == j // width]
        around = module.norms[1](torch.stack([y[b, n, k, m] for n, k, m in seen]))
        for t in range(T):
            q = attn.to_q(module.norms[0](x[b, t, i, j])).view(heads, 1, -1)
            k, v = (layer(around).view(-1, heads, C // heads).transpose(0, 1) for layer in (attn.to_k, attn.to_v))
            a = x[b, t, i, j] + attn.to_out(((q @ k.mT / math.sqrt(C / heads)).softmax(-1) @ v).flatten())
            expected[b, t, i, j] = module.proj_out(a + module.ff(module.norms[2](a)))
    torch.testing.assert_close(found, mixed + expected.flatten(0, 1).permute(0, 3, 1, 2))


def test_windows_are_put_back():
    h = torch.randn(6, 2, 10, 24)
    assert torch.equal(frames(windows(h, 3), 3, 10, 24), h)


def test_roles_alternate_from_transformer_to_transformer():
    with torch.device("meta"):
        unet = UNet(SD15.unet, Swap(SD15.unet))
    transformers = [m for block in unet.blocks() for m in block.modules() if isinstance(m, SpatialTransformer)]
    swapped = [unet.layout.swap[str(m.transformer_blocks[0].attn1.number)] for m in transformers]
    assert len(swapped) == len(unet.layout.swap) == 16 and len(unet.layout.motion) == 21
    assert [module.even for module in swapped] == [True, False] * 8
    assert [len(m.norm_x.weight) for m in swapped] == [len(m.norm.weight) for m in transformers]
