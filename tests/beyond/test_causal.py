"""Multi-scale causal attention: the formula, causality, and frame by frame as all at once."""

import gc
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sd
from beyond.causal import SIDES, Causal, Past, frame_numbers
from beyond.temporal import attended_widths, hooked_widths
from embed import timestep_embedding
from grid import fold, unfold
from lab import toy
from model import Attention, Clip, SpatialTransformer, UNet
from sample import SHIPPED, NoiseSchedule, Request, denoise, generate
from sd.presets import MICRO, SD15, TINY
from sd.vae import encode_frames

ALPHAS = sd.Settings(prediction="v", zero_snr=True).alphas_cumprod


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def make(config=TINY, **options):
    """A UNet with random numbers wherever something starts at zero."""
    torch.manual_seed(0)
    unet = UNet(config.unet, Causal(config.unet, alphas_cumprod=ALPHAS, **options)).eval()
    for p in unet.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    return unet


def inputs(grid, config=TINY, B=2, side=8):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, 4, grid[0] * side, grid[1] * side, generator=g)
    context = torch.randn(B, 7, config.unet.context_dim, generator=g)
    return x, torch.tensor([999, 300])[:B], context, torch.tensor([4.0, 30.0])[:B], grid


def close(a, b):
    return (a - b).abs().max() < 1e-5 * b.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# The formula


def test_what_means_keep_is_that_of_the_shipped_latents():
    """ρ of squares of 2 x 2 and 8 x 8, of latents of frames of one shape."""
    model, rng = sd.load(SHIPPED), np.random.default_rng(0)
    frames = np.concatenate([toy.true_render(scene, rng, 4, fps=4) for scene in toy.scenes("train")[::7]])
    z = encode_frames(model.vae, torch.from_numpy(frames).permute(0, 3, 1, 2)).chunk(2, dim=1)[0]
    z -= z.mean()
    kept = [(F.avg_pool2d(z, side).square().mean() / z.square().mean()).item() for side in SIDES]
    assert np.allclose(kept, Causal(model.unet.cfg, alphas_cumprod=ALPHAS).kept, atol=0.01)


@pytest.mark.parametrize("height, width", [(3, 5), (9, 2), (1, 1)])
def test_it_is_the_formula_written_out(height, width):
    """By a loop over frames, heads and squares, in float64: B 2, T 4, a window of 2, two heads of 4."""
    B, T, C, heads, window, kept = 2, 4, 8, 2, 2, (0.7, 0.4)
    config = replace(TINY.unet, channels=C, channel_mult=(1,), attention_levels=(), head_width=4)
    torch.manual_seed(0)
    layout, attn = Causal(config, window, *kept, alphas_cumprod=ALPHAS), Attention(C, C, heads)
    for p in layout.parameters():
        nn.init.normal_(p)
    attn.number, block = 1, layout.blocks["1"]
    t, h, emb = torch.tensor([0, 10, 500, 999] * B), torch.randn(B * T, height, width, C), torch.randn(B * T, 4 * C)
    found = layout.self_attention(attn, h, Clip((2, 2), t, emb, torch.zeros(B * T, 4, height, width)))

    h = h + block.alpha * timestep_embedding(torch.arange(T).repeat(B), C)[:, None, None]
    q, k, v = (layer(h).double() for layer in (attn.to_q, attn.to_k, attn.to_v))
    gate, expected = block.gate(emb), torch.empty_like(q)
    for n, head in ((n, head) for n in range(B * T) for head in range(heads)):
        mine = slice(head * C // heads, (head + 1) * C // heads)
        queries = q[n, ..., mine].flatten(0, 1)

        def attend(keys, values, bias, queries=queries):
            return (queries @ keys.T / math.sqrt(C / heads) + bias).softmax(1) @ values

        own = attend(k[n, ..., mine].flatten(0, 1), v[n, ..., mine].flatten(0, 1), 0)
        keys, values, bias = [], [], []
        for past in range(max(n // T * T, n - window), n):
            alpha = ALPHAS[t[past]].item()
            for scale, side in enumerate(SIDES):
                for i in range(0, height, side):
                    for j in range(0, width, side):
                        square = past, slice(i, i + side), slice(j, j + side), mine
                        count = k[square][..., 0].numel()
                        signal = count * kept[scale] * alpha
                        keys.append(k[square].mean((0, 1)))
                        values.append(v[square].mean((0, 1)))
                        bias.append(math.log(count) + math.log(max(signal / (signal + 1 - alpha), 1e-4))
                                    + block.learned[head, scale].item())
        if keys:
            far = attend(torch.stack(keys), torch.stack(values), torch.tensor(bias))
            own = own + gate[n, head] * (far - own)
        expected[n, ..., mine] = own.unflatten(0, (height, width))
    assert close(found, attn.to_out(expected.float()))


@pytest.mark.parametrize("config", [MICRO, TINY, SD15])
def test_every_self_attention_has_its_block(config):
    with torch.device("meta"):
        unet = UNet(config.unet, Causal(config.unet, alphas_cumprod=ALPHAS))
    widths = {m.transformer_blocks[0].attn1.number: m.transformer_blocks[0].attn1.to_q.in_features
              for m in unet.modules() if isinstance(m, SpatialTransformer)}
    assert widths == attended_widths(config.unet)
    assert widths.items() <= dict(enumerate(hooked_widths(config.unet))).items()
    assert {int(number): len(block.alpha) for number, block in unet.layout.blocks.items()} == widths


@pytest.mark.parametrize("options, says", [
    ({"window": 0}, "window must be a whole number >= 1, got 0"), ({"kept_small": 0}, "kept_small must be > 0"),
    ({"kept_large": 1.5}, "kept_large must be > 0 and <= 1, got 1.5"),
])
def test_options_out_of_range_are_told(options, says):
    with pytest.raises(ValueError, match=says):
        Causal(MICRO.unet, alphas_cumprod=ALPHAS, **options)


# ---------------------------------------------------------------------------------------------------------------------
# What must hold


@pytest.mark.parametrize("grid", [(2, 2), (1, 1)])
def test_a_fresh_one_is_stable_diffusion_frame_by_frame(grid):
    torch.manual_seed(0)
    plain, config = UNet(replace(TINY.unet, mixed_embedding=False)), TINY.unet
    nn.init.normal_(plain.out[2].weight)
    unet = UNet(config, Causal(config, alphas_cumprod=ALPHAS))
    unet.load_state_dict(plain.state_dict(), strict=False)
    x, t, context, fps, grid = inputs(grid)
    T = grid[0] * grid[1]
    frames = unfold(x, *grid).flatten(0, 1)
    expected = plain(frames, *(v.repeat_interleave(T, 0) for v in (t, context, fps)))
    assert torch.equal(unet(x, t, context, fps, grid), fold(expected.unflatten(0, (-1, T)), *grid))


def test_no_frame_sees_a_later_one():
    unet, (x, t, context, fps, grid) = make(window=3), inputs((2, 4))
    video = unfold(x, *grid)
    before = unfold(unet(x, t, context, fps, grid), *grid)
    for changed in (1, 4, 7):
        other = video.clone()
        other[:, changed] += 1
        after = unfold(unet(fold(other, *grid), t, context, fps, grid), *grid)
        same = [torch.equal(before[:, n], after[:, n]) for n in range(8)]
        assert same == [n < changed for n in range(8)]


def test_what_noise_does_to_the_past_matters():
    unet, (x, t, context, fps, grid) = make(), inputs((2, 2))
    each = t[:, None].repeat(1, 4)
    before = unfold(unet(x, each, context, fps, grid), *grid)
    each[:, 1] = 700
    after = unfold(unet(x, each, context, fps, grid), *grid)
    assert [torch.equal(before[:, n], after[:, n]) for n in range(4)] == [True, False, False, False]


def test_a_frame_sees_no_farther_than_the_window_in_one_attention():
    layout = Causal(replace(TINY.unet, channel_mult=(1,), attention_levels=()), 2, alphas_cumprod=ALPHAS)
    C, T = TINY.unet.channels, 8
    attn = Attention(C, C, 1)
    attn.number = 1
    nn.init.ones_(layout.blocks["1"].gate.bias)
    h, t, emb = torch.randn(T, 2, 2, C), torch.full((T,), 300), torch.randn(T, 4 * C)
    clip = Clip((2, 4), t, emb, torch.zeros(T, 4, 2, 2))
    before = layout.self_attention(attn, h, clip)
    h[3] += 1
    after = layout.self_attention(attn, h, clip)
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [n not in (3, 4, 5) for n in range(T)]


@pytest.mark.parametrize("frames", [1, 4])
def test_pure_noise_one_frame_and_first_frames_are_finite(frames):
    grid = (1, 1) if frames == 1 else (2, 2)
    x, _, context, fps, grid = inputs(grid)
    assert make()(x, torch.tensor([999, 999]), context, fps, grid).isfinite().all()


def test_training_begins_at_any_number_and_again_in_the_backward_pass():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, 2, 2, generator=g)
    clip = Clip((2, 2), None, None, x)
    assert frame_numbers(clip, 4).tolist() == [0, 1, 2, 3] * 1000
    with torch.enable_grad():
        numbers = frame_numbers(clip, 4).view(-1, 4)
    assert (numbers == numbers[:, :1] + torch.arange(4)).all()
    first = numbers[:, 0]
    assert first.min() == 0 < first.max() < 256 and len(first.unique()) > 230 and abs(first.float().mean() - 127.5) < 10

    unet, (x, t, context, fps, grid) = make(MICRO), inputs((2, 2), MICRO, side=4)
    gradients = []
    for unet.checkpointing in (False, True):
        with torch.enable_grad():
            unet(x, t, context, fps, grid).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.layout.parameters()])
        unet.zero_grad()
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients))


# ---------------------------------------------------------------------------------------------------------------------
# Frame by frame


def test_frame_by_frame_is_all_at_once():
    """Six frames and a window of 2: five finished ones at timestep 0, and one at work."""
    unet, (x, t, context, fps, grid) = make(window=2), inputs((2, 3))
    video, past = unfold(x, *grid), Past(unet)
    for n in range(6):
        each = torch.zeros(2, 6, dtype=torch.long)
        each[:, n] = t
        expected = unfold(unet(x, each, context, fps, grid), *grid)[:, n]
        assert close(past(video[:, n], t, context, fps), expected)
        assert close(past(video[1:, n], t[1:], context[1:], fps[1:]), expected[1:])  # without the first half
        past.add(video[:, n], context, fps)


def test_memory_does_not_grow_with_the_frames():
    small = replace(MICRO, unet=replace(MICRO.unet, channel_mult=(1,), attention_levels=()))
    unet, (x, _, context, fps, _) = make(small, window=4), inputs((1, 1), small, 1, side=2)

    def numbers_alive():
        gc.collect()
        return sum(obj.numel() for obj in gc.get_objects() if type(obj) in (torch.Tensor, nn.Parameter))

    past, alive = Past(unet), {}
    for n in range(1, 257):
        past.add(x, context, fps)
        if n in (64, 256):
            alive[n] = numbers_alive()
    assert past.number == 256 and alive[256] < 1.02 * alive[64]


def test_a_long_video_is_sampled_frame_by_frame(micro):
    """As many steps for each as for the whole of a short one; the first frames do not depend on how many follow."""
    model = sd.load(micro, layout="causal")
    for block in model.unet.layout.blocks.values():
        nn.init.ones_(block.gate.bias)
    steps, request = [], Request("a red circle", steps=2, frames=9, guidance=3.0)
    nine = generate(model, request, progress=lambda *given: steps.append(given[2].shape))
    assert nine.shape == (1, 9, 32, 32, 3) and steps == [(1, 4, 4, 4)] * 18
    assert np.array_equal(generate(model, replace(request, frames=6)), nine[:, :6])
    assert np.array_equal(generate(model, replace(request, frames=7)), nine[:, :7])  # which make no grid
    for guidance in (1.0, lambda t: 1.0 if t < 500 else 3.0):  # one half of guidance, and first both
        past, x = model.unet.layout.past(model.unet), torch.randn(1, 4, 4, 4)
        context, negative, fps = torch.randn(1, 77, 32), torch.randn(1, 77, 32), torch.tensor([8.0])
        past.add(torch.cat([x, x]), torch.cat([negative, context]), torch.cat([fps, fps]))
        *_, (_, _, last, _) = denoise(past, NoiseSchedule(model.settings), x, context, negative, fps, steps=2,
                                      guidance=guidance)
        assert last.isfinite().all()
    four = generate(model, replace(request, frames=4), progress=lambda *given: steps.append(given[2].shape))
    assert four.shape == (1, 4, 32, 32, 3) and steps[18:] == [(1, 4, 8, 8)] * 2  # as trained: all at once


def test_sample_takes_the_layout(micro, run, tmp_path):
    done = run("sample.py", "a red circle", "--ckpt", micro, "--layout", "causal", "--frames", 6, "--steps", 1, "--out",
               tmp_path / "long.gif")
    assert done.returncode == 0, done.stderr
    assert "12/12" not in done.stderr and "6/6" in done.stderr
