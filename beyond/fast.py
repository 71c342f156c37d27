"""Sampling in less time: a better solver, guidance where it matters, and deep features that serve several steps.

    DPM-Solver++(2M)      Lu et al. 2022, Algorithm 2; D looks back at one step, r = (λ - λ_prev) / h
        D = x0 + (x0 - x0_prev) / (2 r)                                                   first and last step: D = x0
        ODE:  x' = (σ'/σ) x + α' (1 - e^-h) D                                             λ = log(α/σ), h = λ' - λ
        SDE:  x' = (σ'/σ) e^-h x + α' (1 - e^-2h) D + σ' sqrt(1 - e^-2h) z
    guidance interval     Kynkäänniemi et al. 2024: both halves of guidance only for LOW <= t <= HIGH
    guidance rescale      Lin et al. 2023, Equations 15-16
    feature reuse         DeepCache (Ma et al. 2024): what enters the last block of the decoder is kept for n steps
"""

import torch

from beyond.pooled import Pooled
from model import UNet

# what a request is `fast` with, where the model's settings do not say: fields of sample.Request. No reuse: where it can
# be graded, fewer steps do better at the same cost (docs/fast.md)
FAST = {"sampler": "dpm++", "steps": 20, "guidance_interval": (100, 800), "guidance_rescale": 0.0, "reuse": 1}


def fast_settings(chosen: dict) -> dict:
    """FAST with what the settings of a model choose otherwise. Raises ValueError on other names."""
    for name in chosen.keys() - FAST.keys():
        raise ValueError(f"the model's setting `fast` must be about {', '.join(FAST)}, got {name!r}")
    return FAST | {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}


def check_sampling(sampler: str, eta: float, guidance_interval: tuple[int, int]):
    """Raise ValueError where these mean nothing together."""
    if eta and sampler != "ddim":
        raise ValueError(f"eta belongs to the sampler ddim, got {eta:g} for {sampler}")
    low, high = guidance_interval
    if low > high:
        raise ValueError(f"guidance_interval must be LOW,HIGH with LOW <= HIGH, got {low},{high}")


def pooling_pays(model, size: tuple[int, int], device) -> bool:
    """Whether a sd.Model with the layout `grid` is faster with `pooled`, for frames of a size in pixels: where that
    leaves something out, on a CPU. GPUs attend so fast that frames taken one by one cost more (docs/benchmarks.md)."""
    pooled, shorter = Pooled(model.unet.cfg), min(size) // model.vae.cfg.downsampling
    small = pooled.side(shorter >> pooled.largest, 1) == 1
    return model.settings.layout == "grid" and not small and torch.device(device).type == "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Samplers, as in sample.py


class DPM:
    """DPM-Solver++(2M), the ODE form. It ends at α = 1, where x = x_0.

    Where α = 0 (zero-SNR) the first step is DDIM's, and the second does not look back: h and r are infinite there. Nor
    does one look back at a step of the same timestep, as 1000 leading ones begin.
    """

    steps = 20
    stochastic = False

    def __init__(self, schedule, timesteps: list[int], eta: float, noise):
        alphas = torch.cat([schedule.alphas_cumprod[timesteps].double(), torch.ones(1, dtype=torch.double)])
        self.alpha, self.sigma, self.noise, self.previous = alphas.sqrt(), (1 - alphas).sqrt(), noise, None
        self.log_snr = (self.alpha / self.sigma).log()  # λ of every step, and after the last

    def step(self, i: int, x, x0, eps):
        """x_t of step i, and the x_0 and ε predicted there -> x of step i + 1."""
        h, direction, last = self.log_snr[i + 1] - self.log_snr[i], x0, i == len(self.alpha) - 2
        if self.previous is not None and not last and self.log_snr[i] > self.log_snr[i - 1]:
            r = (self.log_snr[i] - self.log_snr[i - 1]) / h
            direction = x0 + (x0 - self.previous) / (2 * r).item()
        self.previous = x0
        shrink, kept = self.sigma[i + 1] / self.sigma[i], (-h).exp()
        if self.stochastic and not last:
            fresh = self.sigma[i + 1] * (1 - kept**2).sqrt()
            return ((shrink * kept).item() * x + (self.alpha[i + 1] * (1 - kept**2)).item() * direction
                    + fresh.item() * self.noise())
        return shrink.item() * x + (self.alpha[i + 1] * (1 - kept)).item() * direction


class StochasticDPM(DPM):
    """DPM-Solver++(2M), the SDE form: every step but the last adds fresh noise."""

    stochastic = True


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


def rescaled(output, with_prompt, share: float, counted=None):
    """Guidance rescale: bring the standard deviation of each sample (B, C, H, W) back to that of the half with the
    prompt, and mix: o' = φ o std(with_prompt) / std(o) + (1 - φ) o.

    counted  (H, W) which cells count; None: all
    """
    def std(x):
        return (x.flatten(2) if counted is None else x[:, :, counted]).std(dim=(1, 2)).view(-1, 1, 1, 1)

    return output * (share * std(with_prompt) / std(output) + 1 - share)


# ---------------------------------------------------------------------------------------------------------------------
# Feature reuse


class Reuse:
    """A UNet of which most steps run the outermost blocks alone, called as the UNet is.

    A full step keeps what enters the last block of the decoder, for itself and the `every` - 1 steps after it. The
    first and the last step are full, and one in which guidance begins; where guidance ends, the half with the prompt
    is kept.

    past  a layout's past, which is then called in place of the UNet
    """

    def __init__(self, unet: UNet, timesteps: list[int], every: int, past=None):
        self.unet, self.called, self.deep = unet, past or unet, None
        self.full = {*timesteps[::every], timesteps[-1]}

    def __call__(self, x, t, context, fps=None, grid=None):
        return self.called(x, t, context, fps, grid, self.network)

    def network(self, x, context, clip):
        unet, given = self.unet, (clip.emb, context, self.unet.layout, clip)
        x = x.to(unet.out[2].weight.dtype)
        if self.deep is None or len(self.deep) < len(x) or clip.t.max().item() in self.full:
            h, (outer, *skips) = unet.down(x, given)
            self.deep = unet.up(unet.run(unet.middle_block, h, given), skips, given)
        else:
            outer = unet.run(unet.input_blocks[0], x, given)
        return unet.out(unet.run(unet.output_blocks[-1], torch.cat([self.deep[-len(x) :], outer], dim=1), given))
