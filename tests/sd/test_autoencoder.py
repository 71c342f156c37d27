"""The autoencoder computes what diffusers' does."""

import pytest
import torch
from references import error


@pytest.mark.parametrize("h, w", [(32, 32), (24, 52)])
def test_vae_is_diffusers(pair, h, w):
    (_, theirs, *_), ours = pair
    g = torch.Generator().manual_seed(2)
    images, latents = torch.randn(2, 3, h, w, generator=g), torch.randn(2, 4, h // 4, w // 4, generator=g)
    with torch.no_grad():
        mean, logvar = ours.vae.encode(images)
        expected = theirs.encode(images).latent_dist
        assert error(mean, expected.mean) < 1e-4 and error(logvar, expected.logvar) < 1e-4
        assert expected.mean.std() > 0.1 and expected.logvar.std() > 0.1
        assert error(ours.vae.decode(latents), theirs.decode(latents).sample) < 1e-4
