"""clips/encoder.py: a constant number of frames a forward, and numbers that half precision cannot hold."""

import os

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import sd
from clips.encoder import FRAMES, Encoder, batched
from clips.samples import LiveClips, Spec
from sd.vae import encode_frames


@given(T=st.integers(1, 40), count=st.integers(0, 40))
def test_every_forward_has_the_same_number_of_frames(T, count):
    frames = torch.randint(0, 256, (T * count, 3, 2, 2), dtype=torch.uint8)
    parts = list(batched(frames.split(T) if count else ()))
    assert all(len(part) == FRAMES for part in parts) and len(parts) == -(-len(frames) // FRAMES)
    together = torch.cat([frames[:0], *parts])
    assert torch.equal(together[: len(frames)], frames) and not together[len(frames) :].any()


def test_what_half_precision_cannot_hold_is_encoded_in_float32(micro, capsys):
    model, frames = sd.load(micro), torch.randint(0, 256, (FRAMES, 3, 32, 32), dtype=torch.uint8)
    encoder = Encoder(model, False, torch.float32)
    encoder.precision = torch.float16  # as on a GPU
    near = encode_frames(model.vae, frames)
    torch.testing.assert_close(encoder.moments(frames), near, atol=0.05, rtol=0.05)
    assert not torch.equal(encoder.moments(frames), near) and not capsys.readouterr().err
    with torch.no_grad():
        model.vae.encoder.conv_out.weight *= 1e7
    assert torch.equal(encoder.moments(frames), encode_frames(model.vae, frames))
    assert "the VAE's numbers do not fit into float16: it encodes in float32" in capsys.readouterr().err
    with torch.no_grad():
        model.vae.encoder.conv_out.weight[0] = torch.nan
    with pytest.raises(ValueError, match="numbers that are not finite: its weights are damaged"):
        encoder.moments(frames)


def test_the_deviation_of_the_posterior_is_not_negligible(lists):
    """Which is why it is stored beside the mean: if it were, a folder could be half as large."""
    vae = sd.load(os.path.join(ROOT, "weights", "tiny.safetensors")).vae
    live = LiveClips(lists, Spec(4, 64, 64, fps_values=(8,)))
    frames = torch.cat([live.sample("video", i, 0, 0).data for i in range(8)])
    mean, logvar = encode_frames(vae, frames).chunk(2, dim=1)
    share = logvar.exp().mean(dim=(0, 2, 3)).sqrt() / mean.std(dim=(0, 2, 3))
    whole = (logvar.exp().mean().sqrt() / mean.std()).item()
    print(f"deviation over spread of the means: {whole:.1%}; by channel", *(f"{x:.1%}" for x in share))
    assert whole > 0.01
