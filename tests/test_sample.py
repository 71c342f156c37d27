"""sample.py as a user meets it: files, determinism, and what it says of mistakes."""

import json
import os
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from model import TINY
from sample import AttentionMaps, at_work, generate
from sd.checkpoint import Settings, build, load
from training.account import Account, size_of

# ---------------------------------------------------------------------------------------------------------------------
# generate()


def test_generate_gives_uint8_video(micro):
    video = generate(load(micro), ["a red circle", "a blue square"], seeds=[1, 2], steps=3)
    assert video.shape == (2, 4, 32, 32, 3) and video.dtype == np.uint8
    assert video.std() > 1


def test_same_seed_same_video_alone_or_in_a_batch(micro):
    model = load(micro)
    for sampler in ("ddim", "ddpm"):
        batch = generate(model, ["one", "two", "three"], seeds=[5, 6, 7], steps=5, sampler=sampler)
        alone = generate(model, ["two"], seeds=[6], steps=5, sampler=sampler)
        assert np.abs(batch[1].astype(int) - alone[0]).max() <= 1
        other = generate(model, ["two"], seeds=[7], steps=5, sampler=sampler)
        assert np.abs(other[0].astype(int) - alone[0]).max() > 1


def test_prompt_fps_guidance_and_negative_all_matter(micro):
    model = load(micro)
    base = dict(prompts=["a red circle"], steps=3, guidance=5.0, fps=8)
    reference = generate(model, **base)
    for change in ({"prompts": ["a blue square"]}, {"fps": 120}, {"guidance": 1.0}, {"negative": "green"},
                   {"eta": 0.5}):
        assert np.abs(generate(model, **(base | change)).astype(int) - reference).max() > 0, change


def test_defaults_come_from_the_model(micro):
    model, said = load(micro), dict(fps=4, guidance=3.0, eta=0.5)
    expected = generate(model, ["a red circle"], steps=3, **said)
    model.settings = replace(model.settings, **said)
    assert np.array_equal(generate(model, ["a red circle"], steps=3), expected)


def test_one_frame_is_plain_stable_diffusion(micro):
    """No grid and no FPS reach the UNet: the FPS asked for changes nothing."""
    model = load(micro)
    images = [generate(model, ["a red circle"], frames=1, steps=3, fps=fps) for fps in (0, 120)]
    assert images[0].shape == (1, 1, 32, 32, 3) and (images[0] == images[1]).all()


def test_progress_sees_every_step(micro):
    seen = []
    generate(load(micro), ["x"], steps=4, progress=lambda i, t, x, x0: seen.append((i, t, x.shape, x0.shape)))
    assert [i for i, *_ in seen] == [0, 1, 2, 3] and seen[0][1] == 999
    assert all(x == x0 == (1, 4, 8, 8) for *_, x, x0 in seen)


def test_at_work_brings_a_network_and_leaves_it_at_home(micro):
    network = load(micro).text
    home = [*network.parameters(), *network.buffers()]
    tokens = network.tokenize(["a red circle"])[0]
    before = network(tokens)
    with pytest.raises(KeyError), at_work(network, "meta"):
        assert network(tokens.to("meta")).is_meta
        raise KeyError
    assert all(a is b for a, b in zip(home, [*network.parameters(), *network.buffers()]))
    assert torch.equal(network(tokens), before)


def test_networks_take_turns_where_memory_is_short(monkeypatch):
    """Counted on a GPU of pretence: while the UNet works, the other two are not there."""
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor)  # what is made here has no contents
    options = dict(prompts=["x"], frames=64, size=(64, 64), steps=1, device="cuda")
    with FakeTensorMode(), Account() as account:
        home = build(TINY, Settings())
        tensors = {name: [*part.parameters(), *part.buffers()] for name, part in home.parts().items()}
        sizes = {name: size_of(held) for name, held in tensors.items()}
        apart = account.during(lambda: generate(home, **options))
        with torch.device("cuda"):
            there = build(TINY, Settings())
        together = sum(sizes.values()) + account.during(lambda: generate(there, **options))
    assert together - apart == sizes["text"] + sizes["vae"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_command_writes_and_prints_paths(run, micro, tmp_path):
    done = run("sample.py", "a red circle", "ein blaues Quadrat", "--ckpt", micro, "--steps", 2, "--num", 2,
               "--out", tmp_path / "new" / "clip.mp4", "--seed", 7)
    assert done.returncode == 0, done.stderr
    paths = [str(tmp_path / "new" / f"clip-{i:03d}.mp4") for i in range(4)]
    assert done.stdout.split() == paths and sorted(os.listdir(tmp_path / "new")) == sorted(map(os.path.basename, paths))
    with av.open(paths[3]) as file:
        comment = json.loads(file.metadata["comment"])
    assert comment["prompt"] == "ein blaues Quadrat" and comment["seed"] == 8 and comment["ckpt"] == micro
    assert comment["steps"] == 2 and comment["guidance"] == 7.0 and comment["fps"] == 8


def test_command_names_files_by_prompt_and_keeps_old_ones(run, micro, tmp_path):
    for _ in range(2):
        done = run("sample.py", "A red/blue circle!", "--ckpt", micro, "--steps", 1, "--out", tmp_path)
        assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a-red-blue-circle-seed0-2.mp4", "a-red-blue-circle-seed0.mp4"]


def test_prompts_file_and_image(run, micro, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    done = run("sample.py", "--prompts", tmp_path / "p.txt", "--ckpt", micro, "--steps", 1, "--frames", 1,
               "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "o")) == ["one-seed0.png", "two-seed0.png"]
    assert done.stderr.startswith("warning: one frame is made without grid and FPS")


def test_long_prompt_runs_and_says_what_was_cut(run, micro, tmp_path):
    done = run("sample.py", "red " * 75 + "elephant parade", "--ckpt", micro, "--steps", 1, "--out", tmp_path / "a.png")
    assert done.returncode == 0
    assert "cut off: 'elephant parade'" in done.stderr


def test_warns_of_what_the_model_never_saw(run, micro, tmp_path):
    done = run("sample.py", "x", "--ckpt", micro, "--steps", 1, "--frames", 6, "--fps", 33, "--out", tmp_path / "a.gif")
    assert done.returncode == 0
    assert "never saw 33 FPS" in done.stderr and "trained on 4 frames of 32x32, not 6" in done.stderr


BAD = {
    "no prompt": ([], "a prompt is needed"),
    "empty prompt": ([" "], "a prompt is empty"),
    "no such checkpoint": (["x", "--ckpt", "nowhere.safetensors"], "nowhere.safetensors"),
    "foreign checkpoint": (["x", "--ckpt", "README.md"], "README.md"),
    "unwritable": (["x", "--out", "/dev/null/clip.mp4"], "/dev/null/clip.mp4 cannot be written"),
    "wrong ending": (["x", "--out", "clip.avi"], ".mp4, .gif, .png"),
    "prime frames": (["x", "--frames", "7"], "use 6 or 8"),
    "no frames": (["x", "--frames", "0"], "at least 1 frame"),
    "size form": (["x", "--size", "64"], "WIDTHxHEIGHT"),
    "size factor": (["x", "--size", "60x64"], "divisible by 8"),
    "fps too high": (["x", "--fps", "121"], "0..120"),
    "fps negative": (["x", "--fps", "-1"], "0..120"),
    "no steps": (["x", "--steps", "0"], "1..1000"),
    "no number": (["x", "--steps", "many"], "--steps"),
    "unknown option": (["x", "--stepz", "3"], "--stepz"),
    "no device": (["x", "--device", "tpu"], "tpu"),
    "no such device": (["x", "--device", "cpu:3"], "cpu:3"),
    "no number of a device": (["x", "--device", "cpu:x"], "cpu:x"),
    "prompts file": (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line_and_status_2(run, micro, name):
    arguments, says = BAD[name]
    if "--ckpt" not in arguments:
        arguments = [*arguments, "--ckpt", micro]
    done = run("sample.py", *arguments, "--steps=1" if "--steps" not in arguments else "--seed=0")
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""


def test_never_overwrites(run, micro, tmp_path):
    (tmp_path / "a.mp4").write_text("precious")
    done = run("sample.py", "x", "--ckpt", micro, "--steps", 1, "--out", tmp_path / "a.mp4")
    assert done.returncode == 2 and "is there already" in done.stderr
    assert (tmp_path / "a.mp4").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# Attention maps


def test_attention_map_is_the_sum_over_pairs_of_frames(micro):
    """Figure 11 by its formula, token by token: sum over x in frame i and y in frame j of attn(x, y), over tokens."""
    model, seen = load(micro), []
    attention = model.unet.middle_block[1].transformer_blocks[0].attn1
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with AttentionMaps(model.unet, 4) as watch:
        watched = generate(model, ["a red circle"], steps=2, guidance=3.0)
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
    assert np.array_equal(watched, generate(model, ["a red circle"], steps=2, guidance=3.0)) and len(watch.maps) == 2


def test_attention_map_is_written(run, micro, tmp_path):
    options = ["a red circle", "--ckpt", micro, "--steps", 9, "--out", tmp_path / "v.gif"]
    done = run("sample.py", *options, "--attention_map", tmp_path / "map.png")
    assert done.returncode == 0 and done.stdout.split() == [str(tmp_path / "v.gif"), str(tmp_path / "map.png")]
    assert Image.open(tmp_path / "map.png").height == 12 + 7 * (96 + 12)
    options[-1] = tmp_path / "w.gif"
    for more, says in ((["--num", 2], "one video, not of 2"), (["--frames", 1], "not of 1 with 1"), ([], "is there")):
        done = run("sample.py", *options, "--attention_map", tmp_path / "map.png", *more)
        assert done.returncode == 2 and says in done.stderr.splitlines()[-1]
