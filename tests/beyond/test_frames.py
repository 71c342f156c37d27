"""Frames that are given and prompts that change: masks, windows and what a sampler does with them, against loops."""

import gc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sd
from beyond.frames import KINDS, UNKNOWN, Known, contexts_at, draw_given, known_frames, read_keys, windows
from data import generator
from grid import fold, grid_shape, unfold
from sample import NoiseSchedule, Request, denoise, generate, stream
from sd.settings import LAYOUTS
from sd.vae import decode, encode

# ---------------------------------------------------------------------------------------------------------------------
# Which frames of a training sample


@pytest.mark.parametrize("T", [1, 2, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_something_is_left_to_predict(kind, T):
    for seed in range(50):
        known = known_frames(kind, T, torch.Generator().manual_seed(seed))
        assert known.shape == (T,) and not known.all()
        if T == 16:
            frames = known.nonzero().flatten().tolist()
            assert {"first": frames == [0], "head": frames == list(range(max(1, len(frames)))),
                    "ends": frames == [0, 15], "some": True}[kind]


def test_the_draw_has_the_shares_that_it_says():
    draws = torch.stack([draw_given(16, 0.5, generator("given", 0, n)) for n in range(4000)])
    known = draws != UNKNOWN
    used = known.any(1)
    assert abs(used.float().mean() - 0.5 * (1 - 0.25 * 0.8**16)) < 0.03
    levels = draws.max(1).values[used]
    assert all(set(row[row != UNKNOWN].tolist()) == {level} for row, level in zip(draws[used], levels.tolist()))
    assert abs((levels == 0).float().mean() - 0.5) < 0.03 and levels.max() == 99 and levels[levels > 0].min() == 1
    ends = (known[used].sum(1) == 2) & known[used][:, 0] & known[used][:, 15]
    assert abs(ends.float().mean() - 0.25) < 0.03
    counts = Counter(known[used & ~known[:, 15]].sum(1).tolist())
    assert all(abs(counts[k] / used.sum() - 0.25 / 15) < 0.02 for k in range(9, 16))  # the first k, equally often
    assert not (draw_given(16, 0.0, generator("given", 0, 1)) != UNKNOWN).any()


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 19), st.data())
@settings(max_examples=300, deadline=None)
def test_windows_make_every_frame_once(frames, length, overlap, data):
    length = min(length, frames)
    overlap = min(overlap, length - 1)
    known = data.draw(st.sets(st.integers(0, frames - 1)))
    ready = set(known)
    for part in windows(frames, length, overlap, known):
        assert len(part) == length and part.start >= 0 and part.stop <= frames
        first = min(set(range(frames)) - ready)
        assert first in part and set(range(part.start, first)) <= ready
        assert part.start == first - overlap or part.start == 0 or part.stop == frames
        ready |= set(part)
    assert ready == set(range(frames))


def test_sixteen_frames_become_sixty_four():
    assert windows(64, 16, 4, range(16)) == [range(12, 28), range(24, 40), range(36, 52), range(48, 64)]
    assert windows(30, 16, 4, ()) == [range(0, 16), range(12, 28), range(14, 30)]
    assert windows(16, 16, 0, {3}) == [range(16)] and windows(4, 4, 0, range(4)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Known cells in a sampler


class Recorder:
    """A UNet that notes what it gets, and answers something that depends on all of it."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, t, context, fps=None, grid=None):
        self.seen.append((x, t))
        return 0.3 * x + x.mean() + 0.01 * context.mean()


def setting(T=6, **kinds):
    g = torch.Generator().manual_seed(0)
    settings_ = sd.Settings(**kinds)
    x, frames = torch.randn(2, 4, 4 * grid_shape(T)[0], 4 * grid_shape(T)[1], generator=g), [None] * T
    for n in (0, 4):
        frames[n] = torch.randn(2, 4, 4, 4, generator=g)
    return NoiseSchedule(settings_), x, frames, torch.randn(2, 5, 8, generator=g), torch.randn(2, 5, 8, generator=g)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("kinds", [{}, {"prediction": "v", "zero_snr": True, "spacing": "trailing"}])
def test_known_frames_enter_clean_and_are_told_so(sampler, kinds):
    schedule, x, frames, context, negative = setting(**kinds)
    unet, grid = Recorder(), (2, 3)
    run = denoise(unet, schedule, x, context, negative, grid=grid, steps=4, guidance=3.0, sampler=sampler, eta=1.0,
                  known=Known(frames, grid))
    steps = [(t, last, x0) for _, t, last, x0 in run]
    for (x, told), (t, *_) in zip(unet.seen, steps):
        assert x.shape[0] == 4 and told.tolist() == [[0, t, t, t, 0, t]] * 4  # both halves of guidance
        for half in unfold(x, *grid).chunk(2):
            assert torch.equal(half[:, 0], frames[0]) and torch.equal(half[:, 4], frames[4])
    for at in steps[-1][1:]:
        assert torch.equal(unfold(at, *grid)[:, 0], frames[0]) and torch.equal(unfold(at, *grid)[:, 4], frames[4])
    assert not torch.equal(unfold(steps[-1][1], *grid)[:, 1], unfold(x, *grid)[:2, 1])


@pytest.mark.parametrize("kinds", [{}, {"prediction": "v", "zero_snr": True, "spacing": "trailing"}])
def test_replaced_frames_have_the_noise_of_the_timestep_that_is_told(kinds):
    schedule, x, frames, context, negative = setting(**kinds)
    unet, grid, eps = Recorder(), (2, 3), torch.randn(x.shape)
    *_, (_, _, last, _) = denoise(unet, schedule, x, context, negative, grid=grid, steps=4, guidance=1,
                                  known=Known(frames, grid, schedule, eps))
    for x, told in unet.seen:
        assert told.shape == (2,)
        a = schedule.alphas_cumprod[told[0]]
        for n in (0, 4):
            expected = a.sqrt() * frames[n] + (1 - a).sqrt() * unfold(eps, *grid)[:, n]
            torch.testing.assert_close(unfold(x, *grid)[:, n], expected)
    assert torch.equal(unfold(last, *grid)[:, 4], frames[4])


def test_all_steps_of_ddim_by_hand():
    """The whole of it in one loop over steps and frames."""
    schedule, x, frames, context, negative = setting()
    grid, unet, a = (2, 3), Recorder(), schedule.alphas_cumprod
    *_, (_, _, found, _) = denoise(unet, schedule, x, context, negative, grid=grid, steps=5, guidance=2.0,
                                   known=Known(frames, grid))
    times = schedule.sampling_timesteps(5)
    for t, t_next in zip(times, [*times[1:], 0]):
        video = unfold(x, *grid).clone()
        for n in (0, 4):
            video[:, n] = frames[n]
        x = fold(video, *grid)
        both = unet(torch.cat([x, x]), None, torch.cat([negative, context]))
        eps = both[:2] + 2.0 * (both[2:] - both[:2])
        x0 = (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt()
        x = a[t_next].sqrt() * x0 + (1 - a[t_next]).sqrt() * eps
    video = unfold(x, *grid)
    for n in (1, 2, 3, 5):
        torch.testing.assert_close(unfold(found, *grid)[:, n], video[:, n], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Videos


@pytest.fixture
def model(micro):
    model = sd.load(micro)
    model.settings = replace(model.settings, given_trained=True)
    return model


def picture(seed, side=32):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def through_vae(model, frame):
    return decode(model, encode(model, frame[None])[None])[0, 0].astype(int)


@pytest.mark.parametrize("layout, trained", [("grid", False), *((layout, True) for layout in LAYOUTS)])
def test_given_frames_come_back_where_they_belong(micro, layout, trained):
    model = sd.load(micro, layout=layout)
    model.settings = replace(model.settings, given_trained=trained)
    for known, frames in (({0: picture(0)}, 4), ({0: picture(0), 1: picture(1)}, 9)):
        if layout != "causal":
            known[frames - 1] = picture(2)
        request = Request(("one", "two"), steps=2, frames=frames, overlap=2, known=known, guidance=3.0)
        videos = generate(model, request)
        assert videos.shape == (2, frames, 32, 32, 3)
        for video in videos:
            for n, frame in known.items():
                assert np.abs(video[n] - through_vae(model, frame)).max() <= 1
        assert np.abs(videos[0, 2].astype(int) - videos[1, 2]).max() > 1  # the prompts matter still


def test_what_is_given_changes_the_others(model):
    request = Request("x", steps=2)
    one, other = (generate(model, replace(request, known={0: picture(seed)})) for seed in (0, 1))
    assert np.abs(one[0, 3].astype(int) - other[0, 3]).max() > 1


def test_a_window_begins_with_the_frames_of_the_one_before(model):
    seen = []
    request = Request("x", steps=3, frames=8, overlap=2, known={0: picture(0), 7: picture(1)})
    generate(model, request, progress=lambda i, t, x, x0: seen.append((i, unfold(x, 2, 2)[0], unfold(x0, 2, 2)[0])))
    first, second, third = seen[:3], seen[3:6], seen[6:]
    assert torch.equal(first[-1][1][2:], second[0][1][:2]) and torch.equal(second[-1][1][2:], third[0][1][:2])
    last = encode(model, np.stack([picture(0), picture(1)]))[1]
    assert all(torch.equal(x[3], last) and torch.equal(x0[3], last) for _, x, x0 in third)


def test_memory_does_not_grow_with_the_length(model):
    request, alive, parts = Request("x", steps=1, frames=16, overlap=2), [], []
    for part in stream(model, request):
        parts.append(part.shape[1])
        gc.collect()
        alive.append(sum(obj.numel() for obj in gc.get_objects() if type(obj) is torch.Tensor))
    assert parts == [4, *[2] * 6] and alive[-1] <= alive[2]


def test_a_long_clip_is_gone_on_with_frame_by_frame(micro):
    """Causal: as by hand, with the past of the clip."""
    model = sd.load(micro, layout="causal")
    for block in model.unet.layout.blocks.values():
        torch.nn.init.ones_(block.gate.bias)
    clip = [picture(n) for n in range(5)]
    found, request = [], Request("x", steps=2, frames=8, known=dict(enumerate(clip)), guidance=3.0)
    generate(model, request, progress=lambda i, t, x, x0: found.append(x))
    past, fps = model.unet.layout.past(model.unet), torch.tensor([8.0])
    context, negative = (model.text.encode([text]) for text in ("x", ""))
    halves = [torch.cat([negative, context]), torch.cat([fps, fps])]
    for frame in clip:
        past.add(encode(model, frame[None]).repeat(2, 1, 1, 1), *halves)
    g = torch.Generator().manual_seed(0)
    for n in range(3):
        noise = torch.randn(1, 4, 4, 4, generator=g)
        *_, (_, _, x, _) = denoise(past, NoiseSchedule(model.settings), noise, context, negative, fps, (1, 1), steps=2,
                                   guidance=3.0, eta=model.settings.eta)
        torch.testing.assert_close(found[2 * n + 1], x, rtol=1e-4, atol=1e-4)
        past.add(torch.cat([x, x]), *halves)


@pytest.mark.parametrize("change, says", [
    ({"known": {4: picture(0)}}, r"known must name frames in 0..3, got 4"),
    ({"known": {0: picture(0, 64)}}, "known must hold uint8 frames of 32 x 32 x 3, got uint8 of 64 x 64 x 3 for frame"),
    ({"known": {0: picture(0) / 255}}, "got float64 of 32 x 32 x 3 for frame 0"),
    ({"known": {n: picture(n) for n in range(4)}}, "frames must be > 4: as many are given, and nothing is left"),
    ({"overlap": 4, "frames": 9}, "overlap must be < 4, the frames that the model was trained on, got 4"),
    ({"prompts_at": {0: "a"}}, "prompt and prompts_at cannot both be given"),
    ({"prompt": (), "prompts_at": {1: "a"}}, "prompts_at must begin at frame 0 and rise, got 1"),
    ({"prompt": (), "prompts_at": {0: "a", 3: "b", 2: "c"}}, "prompts_at must begin at frame 0 and rise, got 0, 3, 2"),
    ({"prompt": (), "prompts_at": {0: "a", 4: "b"}}, r"prompts_at must name frames in 0..3, got 4"),
    ({"prompt": (), "prompts_at": {0: "a", 2: " "}}, "prompt must be given and not be empty"),
    ({"prompt": (), "prompts_at": {"0": "a"}}, "prompts_at must have a text for whole numbers"),
    ({"blend": True}, "blend needs prompts_at with two prompts or more"),
])
def test_what_cannot_be_is_told_in_terms_of_the_fields(model, change, says):
    with pytest.raises(ValueError, match=says):
        replace(Request("x", frames=4), **change).resolve(model)


def test_a_causal_layout_takes_the_first_frames_alone(micro):
    with pytest.raises(ValueError, match="only the first frames can be given .* got frame 3"):
        Request("x", known={0: picture(0), 3: picture(1)}).resolve(sd.load(micro, layout="causal"))


# ---------------------------------------------------------------------------------------------------------------------
# A prompt for every frame


@pytest.mark.parametrize("blend", [False, True])
def test_contexts_between_keys(blend):
    keys, contexts = [0, 3, 7], torch.randn(3, 5, 8)
    for part in (range(10), range(4, 6)):
        found = contexts_at(part, keys, contexts, blend)
        for frame, context in zip(part, found):
            n = 2 if frame >= 7 else 1 if frame >= 3 else 0
            expected = contexts[n]
            if blend and n < 2:
                w = (frame - keys[n]) / (keys[n + 1] - keys[n])
                expected = (1 - w) * contexts[n] + w * contexts[n + 1]
            torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("layout, frames", [("grid", 8), ("causal", 8), *((layout, 4) for layout in LAYOUTS)])
def test_one_prompt_said_again_is_that_prompt(micro, layout, frames):
    model, ends = sd.load(micro, layout=layout), []
    request = Request("a red circle", steps=2, frames=frames, overlap=2, guidance=3.0)
    for asked in (request, replace(request, prompt=(), prompts_at={0: "a red circle", 3: "a red circle"})):
        generate(model, asked, progress=lambda i, t, x, x0: ends.append(x))
    one, again = torch.cat(ends).chunk(2)
    assert (one - again).abs().max() < 1e-5 * one.abs().max()


def test_a_prompt_that_changes_is_seen_from_its_frame_on(micro):
    """Frame by frame without attention between them, to the bit."""
    model = sd.load(micro, layout="temporal")
    request = Request((), steps=2, prompts_at={0: "red", 2: "blue"})
    keyed, red, blue = (generate(model, asked)[0] for asked in (
        request, replace(request, prompts_at={0: "red"}), replace(request, prompts_at={0: "blue"})))
    assert np.abs(keyed[:2].astype(int) - red[:2]).max() <= 1 and np.abs(keyed[2:].astype(int) - blue[2:]).max() <= 1
    assert np.abs(red.astype(int) - blue).max() > 1
    long = generate(model, replace(request, frames=8, overlap=2, prompts_at={0: "red", 5: "blue"}))[0]
    other = generate(model, replace(request, frames=8, overlap=2, prompts_at={0: "red"}))[0]
    assert np.array_equal(long[:4], other[:4]) and not np.array_equal(long[5:], other[5:])


@pytest.mark.parametrize("text, expected", [
    ("0: a red circle; 8: a blue one", {0: "a red circle", 8: "a blue one"}),
    ("0:a; b: c ;\n12 : d;", {0: "a; b: c", 12: "d"}),
    ("0: ratio 16:9", {0: "ratio 16:9"}),
])
def test_keys_are_read(text, expected):
    assert read_keys(text) == expected


@pytest.mark.parametrize("text, says", [
    ("a red circle", "must be FRAME: PROMPT"), ("-1: a", "must be FRAME: PROMPT"), ("", "must be FRAME: PROMPT"),
    ("0: a; 8: b; 8: c", "must name each frame once, got 8 twice"),
])
def test_keys_that_are_none(text, says):
    with pytest.raises(ValueError, match=says):
        read_keys(text)
