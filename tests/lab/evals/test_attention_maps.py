"""Figure 11: the maps are the sums of the formula, and sampling does not notice that they are drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from lab.evals.attention import AttentionMaps
from sample import Request, generate


def test_a_map_is_the_sum_over_pairs_of_frames(micro):
    """By the formula, token by token: sum over x in frame i and y in frame j of attn(x, y), over tokens."""
    model, seen, request = sd.load(micro), [], Request("a red circle", steps=2, guidance=3.0)
    attention = model.unet.middle_block[1].transformer_blocks[0].attn1
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with AttentionMaps(model.unet, 4) as watch:
        watched = generate(model, request)
    hook.remove()
    assert len(watch.maps) == len(seen) == 2
    for found, (x, _) in zip(watch.maps, seen):
        q, k = attention.to_q(x[-1]).detach(), attention.to_k(x[-1]).detach()  # (L, C), of the half with the prompt
        side, width = int(len(q) ** 0.5), q.shape[1] // attention.heads
        frame = [y // (side // 2) + x // (side // 2) * 2 for y in range(side) for x in range(side)]  # Equation 1
        for head in range(attention.heads):
            part = slice(head * width, (head + 1) * width)
            scores = (q[:, part] @ k[:, part].T / width**0.5).softmax(-1)
            expected = torch.zeros(4, 4)
            for a, i in enumerate(frame):
                for b, j in enumerate(frame):
                    expected[i, j] += scores[a, b] / frame.count(i)
            torch.testing.assert_close(found[head], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[head].sum(1), torch.ones(4))
    assert np.array_equal(watched, generate(model, request)) and len(watch.maps) == 2


def test_the_command(run, micro, tmp_path):
    done = run("lab.evals.attention", "a red circle", "--ckpt", micro, "--steps", 9, "--out", tmp_path / "map.png")
    assert done.returncode == 0 and done.stdout.split() == [str(tmp_path / "map.png")], done.stderr
    heads = sd.load(micro).unet.cfg.heads(32)
    assert Image.open(tmp_path / "map.png").size == (60 + heads * (96 + 12) - 12, 12 + 7 * (96 + 12) - 12)


@pytest.mark.parametrize("options, says", [
    (["another"], "attention can be shown of one grid only"),
    (["--frames", 1], "attention can be shown of one grid only"),
    (["--frames", 8, "--overlap", 2], "attention can be shown of one grid only"),
    (["--reuse", 2], "attention cannot be shown where deep features are reused"),
    (["--out", "{}/old.png"], "old.png is there already"),
    (["--out", "{}/map.gif"], "out must end in .png"),
    (["--out", "/dev/null/map.png"], "/dev/null"),
    (["--steps", 0], "steps must be in 1..1000, got 0"),
])
def test_mistakes_are_told_in_one_line(run, micro, tmp_path, options, says):
    (tmp_path / "old.png").touch()
    given = [str(option).format(tmp_path) for option in options]
    done = run("lab.evals.attention", "a red circle", "--ckpt", micro, "--out", tmp_path / "map.png", *given)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
