"""Frames that are given: image to video, in-between, continuation, completion; and a prompt for every frame.

To a grid all of these are one thing: some of its cells are known. A timestep for every frame says which, as in
Open-Sora 1.1 and Diffusion Forcing: known frames enter clean, at timestep 0, and the others share the sampler's.

    for i, t in enumerate(timesteps):
        x = where(known, x0_known, x)
        x = sampler.step(... unet(x, where(known, 0, t), context) ...)

A model learns it by `draw_given`: a share of its training samples has known frames, and the loss counts the others. One
that never did is helped by replacement: known cells are noised to the sampler's timestep, so that all cells look alike.
"""

import re
from itertools import pairwise

import numpy as np
import torch

from grid import fold, frame_of_pixel

# ---------------------------------------------------------------------------------------------------------------------
# Training: which frames of a sample are known

KINDS = ("first", "head", "ends", "some")  # equally often
KEPT = 0.2  # the probability of each frame of "some"
NOISED = 100  # known frames are clean half of the time, else noised below this timestep, and the model is told
UNKNOWN = -1


def known_frames(kind: str, T: int, g: torch.Generator) -> torch.Tensor:
    """Which frames of a sample are known (T,): the first, the first k, first and last, or any; never all of them."""
    known = torch.zeros(T, dtype=torch.bool)
    if kind == "first":
        known[0] = True
    elif kind == "head":
        known[: torch.randint(1, max(T, 2), (), generator=g)] = True
    elif kind == "ends":
        known[[0, -1]] = True
    else:
        known = torch.rand(T, generator=g) < KEPT
    if known.all():  # there must be something to predict
        known[-1] = False
    return known


def draw_given(T: int, share: float, g: torch.Generator) -> torch.Tensor:
    """The timesteps at which the frames of a training sample are given (T,), UNKNOWN where they are not; a `share` of
    the samples has known frames."""
    use, noised = torch.rand(2, generator=g).tolist()
    kind, t = KINDS[torch.randint(len(KINDS), (), generator=g)], torch.randint(1, NOISED, (), generator=g)
    known = known_frames(kind, T, g) & (use < share)
    return torch.where(known, t if noised < 0.5 else 0, UNKNOWN)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class Known:
    """The known frames of a grid image, for `sample.denoise`.

    frames  T latents (B, C, h, w), None where a frame is not known
    noise   (B, C, H, W), for a model that was never trained with given frames: what `schedule` noises them with
    """

    def __init__(self, frames: list, grid, schedule=None, noise=None):
        some = next(frame for frame in frames if frame is not None)
        empty = torch.zeros_like(some)
        self.x0 = fold(torch.stack([empty if frame is None else frame for frame in frames], 1), *grid)
        self.known = torch.tensor([frame is not None for frame in frames], device=some.device)  # (T,)
        self.cells = self.known[frame_of_pixel(*self.x0.shape[2:], *grid, device=some.device)]  # (H, W)
        self.schedule, self.noise = schedule, noise

    def timesteps(self, t):
        """What the UNet is told for the sampler's timesteps t (B,): (B, T), or (B,) where all cells are alike."""
        return t if self.noise is not None else torch.where(self.known, 0, t[:, None])

    def put(self, x, t: int | None):
        """x with the known cells as they should be at the sampler's timestep t; None: finished, they are clean."""
        x0 = self.x0
        if self.noise is not None and t is not None:
            x0 = self.schedule.add_noise(x0, self.noise, torch.tensor(t, device=x.device))
        return torch.where(self.cells, x0, x)


def check_known(known: dict, frames: int, size: tuple[int, int], only_first: bool):
    """Raise ValueError unless given frames, number -> uint8 (H, W, 3), are of the video and its size (width, height).

    only_first  no frame sees a later one, so that they must be the first
    """
    for n, frame in known.items():
        if not 0 <= n < frames:
            raise ValueError(f"known must name frames in 0..{frames - 1}, got {n}")
        if frame.shape != (*size[::-1], 3) or frame.dtype != np.uint8:
            raise ValueError(f"known must hold uint8 frames of {size[1]} x {size[0]} x 3, got {frame.dtype} of "
                             f"{' x '.join(map(str, frame.shape))} for frame {n}")
    if len(known) == frames:
        raise ValueError(f"frames must be > {frames}: as many are given, and nothing is left to make")
    later = set(known) - set(range(len(known)))
    if later and only_first:
        raise ValueError("only the first frames can be given to a layout in which no frame sees a later one, got frame "
                         f"{min(later)}")


def window_length(frames: int, overlap: int | None, trained: int, goes_on: bool) -> int:
    """How many frames of a clip are sampled at once: all, unless they are more than the model was trained on. Then one
    after the other where the layout `goes_on`, and with an `overlap` as many as were trained.

    Raises ValueError where nothing of a window would be new.
    """
    if overlap and overlap >= trained:
        raise ValueError(f"overlap must be < {trained}, the frames that the model was trained on, got {overlap}")
    if frames <= trained:
        return frames
    return 1 if goes_on else trained if overlap else frames


def windows(frames: int, length: int, overlap: int, known) -> list[range]:
    """The parts in which a clip is made, each of `length` frames: a part begins `overlap` frames before the first frame
    that is not there yet, and those are known to it. The last one ends with the clip, and may overlap more.

    known  the numbers of the frames that are given
    """
    ready, parts, at = set(known), [], 0
    while True:
        while at in ready:
            at += 1
        if at >= frames:
            return parts
        start = max(0, min(at - overlap, frames - length))
        parts.append(range(start, start + length))
        ready.update(parts[-1])


# ---------------------------------------------------------------------------------------------------------------------
# A prompt for every frame


def read_keys(text: str) -> dict[int, str]:
    """ "0: a red circle; 8: a blue one" -> {0: "a red circle", 8: "a blue one"}. Raises ValueError."""
    keys = {}
    for part in re.split(r";(?=\s*\d+\s*:)", text):
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(.*?)\s*;?\s*", part, re.DOTALL)
        if not match:
            raise ValueError(f'must be FRAME: PROMPT; ..., like "0: a red circle; 8: a blue one", got {text!r}')
        if int(match[1]) in keys:
            raise ValueError(f"must name each frame once, got {match[1]} twice")
        keys[int(match[1])] = match[2]
    return keys


def check_keys(prompts_at: dict, prompt, blend: bool, frames: int | None):
    """Raise ValueError unless prompts_at has prompts for frames that rise from 0, and are there where that is known.

    prompt  of all frames: only without prompts_at
    """
    keys = list(prompts_at)
    if not all(type(n) is int and isinstance(text, str) for n, text in prompts_at.items()):
        raise ValueError(f"prompts_at must have a text for whole numbers, got {prompts_at!r}")
    if keys and (keys[0] != 0 or keys != sorted(keys)):
        raise ValueError(f"prompts_at must begin at frame 0 and rise, got {', '.join(map(str, keys))}")
    if keys and frames and keys[-1] >= frames:
        raise ValueError(f"prompts_at must name frames in 0..{frames - 1}, got {keys[-1]}")
    if prompts_at and prompt:
        raise ValueError("prompt and prompts_at cannot both be given: prompts_at says what every frame shows")
    if blend and len(keys) < 2:
        raise ValueError("blend needs prompts_at with two prompts or more")


def contexts_at(frames, keys: list[int], contexts, blend: bool):
    """The contexts of some frames (len(frames), L, D).

    keys      frames from which on a prompt holds, rising, the first is 0
    contexts  (len(keys), L, D) of those prompts
    blend     between two keys, go from one context to the other in equal steps
    """
    spans = [*pairwise(keys), (keys[-1], None)]
    found = []
    for frame in frames:
        n = sum(key <= frame for key in keys) - 1
        first, end = spans[n]
        share = (frame - first) / (end - first) if blend and end else 0.0
        found.append(contexts[n].lerp(contexts[n + 1], share) if share else contexts[n])
    return torch.stack(found)
