"""The UNet computes what diffusers' does; ETC's two additions and the seams change nothing where they should not.

The references are SD 1- and SD 2-shaped at reduced width, with random weights in every layer; ours get the same weights
through a diffusers folder. Errors are relative to the largest value of the reference.
"""

from dataclasses import replace

import pytest
import torch
from references import error, inputs

from embed import mixed_embedding
from model import UNet, split_heads
from sd.presets import SD15, SD21


@pytest.mark.parametrize("h, w", [(16, 16), (8, 40), (24, 56)])
def test_unet_is_diffusers(pair, h, w):
    (theirs, *_), ours = pair
    x, t, context = inputs(h, w)
    with torch.no_grad():
        expected = theirs(x, t, context).sample
        assert expected.std() > 0.1
        assert error(ours.unet(x, t, context), expected) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_unet_gradients_are_those_of_diffusers(pair, checkpointing):
    (theirs, *_), ours = pair
    x, t, context = inputs()

    def gradients(forward):
        a, b = x.clone().requires_grad_(), context.clone().requires_grad_()
        return torch.autograd.grad(forward(a, t, b).square().sum(), (a, b))

    ours.unet.checkpointing = checkpointing
    expected = gradients(lambda *args: theirs(*args).sample)
    for mine, other in zip(gradients(ours.unet), expected):
        assert error(mine, other) < 1e-4
    ours.unet.checkpointing = False


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_unet_parameter_counts():
    with torch.device("meta"):
        sd21, sd15 = UNet(SD21.unet), UNet(SD15.unet)
    extra = parameters(sd21.time_proj) + parameters(sd21.fps_proj)
    assert (parameters(sd21) - extra, extra) == (865_910_724, 78_666_240)
    assert parameters(sd15) - parameters(sd15.time_proj) - parameters(sd15.fps_proj) == 859_520_964


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_fps_branch_changes_nothing_to_the_bit(pair, dtype):
    """4.2: the last layers start at zero, so a fresh ETC model with the mixed embedding off is Stable Diffusion."""
    weights = pair[1].unet.state_dict()
    x, t, context = inputs()
    fps = torch.tensor([4.0, 30.0])
    unets = {}
    for mixed in (False, True):
        unets[mixed] = UNet(replace(pair[1].unet.cfg, mixed_embedding=mixed)).eval()
        unets[mixed].load_state_dict(weights)
        unets[mixed].to(dtype)
    with torch.no_grad():
        plain = unets[False](x, t, context.to(dtype))
        assert torch.equal(unets[False](x, t, context.to(dtype), fps, (2, 2)), plain)
        assert not torch.equal(unets[True](x, t, context.to(dtype), fps, (2, 2)), plain)
        torch.nn.init.ones_(unets[False].fps_proj[-1].bias)
        assert not torch.equal(unets[False](x, t, context.to(dtype), fps, (2, 2)), plain)


def test_the_mixed_embedding_is_that_of_the_grid_asked_for(pair):
    """It is kept from call to call: after any other grid and size it must be the right one again."""
    unet, kept = UNet(replace(pair[1].unet.cfg, mixed_embedding=True)).eval(), []
    plain = UNet(replace(unet.cfg, mixed_embedding=False)).eval()
    plain.load_state_dict(unet.state_dict())
    torch.nn.init.normal_(unet.out[2].weight, generator=torch.Generator().manual_seed(0))
    plain.out[2].weight = unet.out[2].weight
    for sides, (rows, cols) in (((16, 16), (2, 2)), ((16, 16), (1, 4)), ((16, 32), (2, 2)), ((16, 16), (2, 2))):
        x, t, context = inputs(*sides)
        position = mixed_embedding(rows, cols, sides[0] // rows, sides[1] // cols, 4)
        with torch.no_grad():
            kept.append(unet(x, t, context, None, (rows, cols)))
            assert torch.equal(kept[-1], plain(x + position, t, context))
    assert torch.equal(kept[0], kept[3]) and not torch.equal(kept[0], kept[1])


def test_latent_sides_that_cannot_be_halved_are_refused(pair):
    x, t, context = inputs(12, 16)
    with pytest.raises(ValueError, match="divisible by 8, got 12 x 16"):
        pair[1].unet(x, t, context)


# Half precision. SD 2.1 is known to overflow fp16 when q.k is scaled by 1/sqrt(d) only after the product. Here, on a
# CPU and at reduced size, queries and keys are blown up until late scaling would overflow, and it is checked that it
# would. The size of the grid, 128x128 latents, takes four minutes on a CPU: run it with -m slow.


@pytest.mark.parametrize("dtype, expected_error", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_full(pair, dtype, expected_error):
    unet = pair[1].unet
    x, t, context = inputs()
    half = UNet(unet.cfg).eval()
    half.load_state_dict(unet.state_dict())
    half.to(dtype)
    with torch.no_grad():
        exact, rounded = unet(x, t, context), half(x, t, context.to(dtype)).float()
    assert error(rounded, exact) < expected_error
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side, gradients", [
    (16, False), (16, True), pytest.param(128, False, marks=pytest.mark.slow)])
def test_no_overflow_where_late_scaling_would(pair, dtype, side, gradients):
    unet = UNet(pair[1].unet.cfg).eval()
    unet.load_state_dict(pair[1].unet.state_dict())
    largest = []

    def measure(attention, args):
        x, context = args
        q, k = (split_heads(layer(y), attention.heads) for layer, y in ((attention.to_q, x), (attention.to_k, context)))
        q = q[:, :, :: max(1, q.shape[2] // 256)]  # some of the queries will do
        largest.append((q.float() @ k.float().mT).abs().max().item())

    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.to_q.weight.data *= 80
            module.to_k.weight.data *= 80
            module.register_forward_pre_hook(measure)
    unet.to(dtype)
    x, t, context = inputs(side, side, batch=1)
    with torch.set_grad_enabled(gradients):
        out = unet(10 * x, t, context.to(dtype))
    assert max(largest) > torch.finfo(torch.float16).max, "the test does not test"
    assert out.isfinite().all()
