"""sample.py as a user meets it: what a request becomes, determinism, files, and what it says of mistakes."""

import json
import os
import subprocess
from contextlib import nullcontext
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, ROOT
from runs import LIMIT, command, torchrun
from torch._subclasses.fake_tensor import FakeTensorMode

import sd
from grid import grid_shape
from sample import Request, generate, stream
from sd.device import NotFinite, at_work, check_memory, pick_device, pick_dtype, size_of
from sd.presets import PRESETS, TINY
from sd.vae import decode
from training.account import Account

# ---------------------------------------------------------------------------------------------------------------------
# generate()


def test_generate_gives_uint8_video(micro):
    video = generate(sd.load(micro), Request(("a red circle", "a blue square"), steps=3), seeds=[1, 2])
    assert video.shape == (2, 4, 32, 32, 3) and video.dtype == np.uint8
    assert video.std() > 1


def test_same_seed_same_video_alone_or_in_a_batch(micro):
    model = sd.load(micro)
    for sampler in ("ddim", "ddpm"):
        batch = generate(model, Request(("one", "two", "three"), steps=5, sampler=sampler), seeds=[5, 6, 7])
        alone = generate(model, Request("two", steps=5, sampler=sampler, seed=6))
        assert np.abs(batch[1].astype(int) - alone[0]).max() <= 1
        other = generate(model, Request("two", steps=5, sampler=sampler, seed=7))
        assert np.abs(other[0].astype(int) - alone[0]).max() > 1


def test_prompt_fps_guidance_and_negative_all_matter(micro):
    model = sd.load(micro)
    base = Request("a red circle", steps=3, guidance=5.0, fps=8)
    reference = generate(model, base)
    for change in ({"prompt": ("a blue square",)}, {"fps": 120}, {"guidance": 1.0}, {"negative": "green"},
                   {"eta": 0.5}):
        assert np.abs(generate(model, replace(base, **change)).astype(int) - reference).max() > 0, change


def test_defaults_come_from_the_model(micro):
    model, said = sd.load(micro), dict(fps=4, guidance=3.0, eta=0.5)
    expected = generate(model, Request("a red circle", steps=3, **said))
    model.settings = replace(model.settings, sampling_steps=3, **said)
    assert np.array_equal(generate(model, Request("a red circle")), expected)


def test_a_resolved_request_leaves_nothing_open(micro):
    model = sd.load(micro)
    whole = Request("a red circle").resolve(model)
    s = model.settings
    assert whole == Request("a red circle", "", 4, (32, 32), 8.0, 50, s.guidance, "ddim", s.eta, 0,
                            shift=1.0, guidance_interval=(0, 999), guidance_rescale=0.0, reuse=1)
    assert whole.resolve(model) == whole and not model.unseen(whole)


@pytest.mark.parametrize("wrong, says", [
    ({"frames": 7}, "frames must make a grid, got 7, which is prime: use 6 or 8"),
    ({"frames": 0}, "frames must be in 1..1000000, got 0"),
    ({"frames": 10**9, "overlap": 2}, "frames must be in 1..1000000, got 1000000000"),
    ({"frames": 4.0}, "frames must be a whole number, got 4.0"),
    ({"size": (60, 64)}, "width must be divisible by 8, the VAE's factor, got 60"),
    ({"fps": 121.0}, "fps must be in 0..120, got 121"),
    ({"steps": 0}, "steps must be in 1..1000, got 0"),
    ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
    ({"sampler": "euler"}, "sampler must be one of ddim, ddpm, dpm++, dpm++sde, got 'euler'"),
    ({"eta": 1.5}, "eta must be in 0..1, got 1.5"),
    ({"seed": 2**70}, "seed must be in"),
    ({"prompt": ()}, "prompt must be given"),
    ({"prompt": ("x", " ")}, "prompt must be given and not be empty"),
])
def test_a_request_that_cannot_be_is_told_in_terms_of_its_fields(micro, wrong, says):
    with pytest.raises(ValueError) as refusal:
        replace(Request("x"), **wrong).resolve(sd.load(micro))
    assert str(refusal.value).startswith(says)


def test_one_frame_is_plain_stable_diffusion(micro):
    """No grid and no FPS reach the UNet: the FPS asked for changes nothing."""
    model = sd.load(micro)
    images = [generate(model, Request("a red circle", frames=1, steps=3, fps=fps)) for fps in (0, 120)]
    assert images[0].shape == (1, 1, 32, 32, 3) and (images[0] == images[1]).all()


def test_progress_sees_every_step(micro):
    seen = []
    generate(sd.load(micro), Request("x", steps=4), progress=lambda i, t, x, x0: seen.append((i, t, x.shape, x0.shape)))
    assert [i for i, *_ in seen] == [0, 1, 2, 3] and seen[0][1] == 999
    assert all(x == x0 == (1, 4, 8, 8) for *_, x, x0 in seen)


def test_a_shift_moves_the_steps_and_a_model_may_bring_its_own(micro):
    model, seen = sd.load(micro), []
    for asked, brought, expected in ((None, 1.0, [999, 799, 599, 399, 199]), (3.0, 1.0, [999, 922, 817, 666, 428]),
                                     (None, 3.0, [999, 922, 817, 666, 428]), (1.0, 3.0, [999, 799, 599, 399, 199])):
        model.settings = replace(model.settings, sampling_shift=brought)
        seen.clear()
        generate(model, Request("x", steps=5, shift=asked), progress=lambda i, t, *_: seen.append(t))
        assert seen == expected
    with pytest.raises(ValueError, match="steps must be fewer with a shift of 3"):
        Request("x", steps=600, shift=3.0).resolve(model)


def test_at_work_brings_a_network_and_leaves_it_at_home(micro):
    network = sd.load(micro).text
    home = [*network.parameters(), *network.buffers()]
    tokens = network.tokenize(["a red circle"])[0]
    before = network(tokens)
    with pytest.raises(KeyError), at_work(network, torch.device("meta")):
        assert network(tokens.to("meta")).is_meta
        raise KeyError
    assert [a.data_ptr() for a in home] == [b.data_ptr() for b in (*network.parameters(), *network.buffers())]
    assert torch.equal(network(tokens), before)
    with at_work(network, torch.device("meta")):
        network.double()  # as where its numbers do not fit into half precision: for good
    assert all(p.dtype == torch.float64 and not p.is_meta for p in network.parameters())
    torch.testing.assert_close(network(tokens).float(), before)


def test_networks_take_turns_where_memory_is_short(monkeypatch):
    """Counted on a GPU of pretence: while the UNet works, the other two are not there."""
    if not torch.cuda.is_available() and torch.__version__ < "2.7":
        pytest.skip("a GPU of pretence wants a driver up to torch 2.6")
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor)  # what is made here has no contents
    for name in ("sample.check_memory", "sample.require_finite", "sd.vae.require_finite"):
        monkeypatch.setattr(name, lambda *_, **options: None)
    request, card = Request("x", frames=64, size=(64, 64), steps=1), torch.device("cuda", 0)
    with FakeTensorMode(), Account() as account:
        home = sd.build(TINY, sd.Settings())
        tensors = {name: [*part.parameters(), *part.buffers()] for name, part in home.parts().items()}
        sizes = {name: size_of(held) for name, held in tensors.items()}
        apart = account.during(lambda: list(stream(home, request, device=card)))
        with card:
            there = sd.build(TINY, sd.Settings())
        together = sum(sizes.values()) + account.during(lambda: list(stream(there, request, device=card)))
    assert together - apart == sizes["text"] + sizes["vae"] > 0


@pytest.mark.parametrize("T, side", [(16, 64), (1, 256)])
def test_only_what_surely_needs_too_much_memory_is_refused(monkeypatch, T, side):
    with FakeTensorMode(), torch.no_grad(), Account() as account:
        model, (rows, cols) = sd.build(PRESETS["micro"], sd.Settings()), grid_shape(T)
        h = side // model.vae.cfg.downsampling
        inputs = torch.zeros(2, 4, rows * h, cols * h), torch.zeros(2), torch.zeros(2, 77, 32), torch.zeros(2)
        needed = max(account.during(lambda: model.unet(*inputs, (rows, cols))),
                     account.during(lambda: model.vae.decode(torch.zeros(min(T, 16), 4, h, h))))
    for free in (needed, needed // 30):
        monkeypatch.setattr("sd.device.free_memory", lambda device, free=free: free)
        refusal = pytest.raises(ValueError, match=f"{T} frames of {side}x{side} take at least")
        with refusal if free < needed else nullcontext():
            check_memory(model, T, side, side, batch=2)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def test_a_vae_beyond_float16_decodes_in_float32_and_says_so(micro, capsys):
    model = sd.load(micro)
    with torch.no_grad():  # as in SDXL's VAE: activations that float16 cannot hold, and a norm after them
        model.vae.decoder.conv_in.weight *= 6e4 / model.vae.decoder.conv_in.weight.abs().max()
    latents = torch.randn(1, 4, 4, 4, 4)
    expected = decode(model, latents)
    assert capsys.readouterr().err == ""
    model.vae.half()
    for _ in range(2):  # told once: the VAE stays float32
        assert np.abs(decode(model, latents).astype(int) - expected).max() <= 3
    told = "warning: the VAE's numbers do not fit into float16: it decodes again in float32\n"
    assert capsys.readouterr().err == told
    with torch.autocast("cpu", torch.float16):
        assert np.abs(decode(model, latents).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("part, name", [("unet", "out.2.weight"), ("vae", "decoder.conv_out.bias"),
                                        ("text", "model.ln_final.bias")])
def test_weights_that_are_not_finite_are_named(micro, part, name):
    model = sd.load(micro)
    model.parts()[part].state_dict()[name].view(-1)[0] = float("nan")
    with pytest.raises(NotFinite, match=rf"is not finite, nor are 1 tensors of the weights, like {part}.{name}: "):
        generate(model, Request("x", steps=1))


def test_a_unet_beyond_its_precision_is_told_at_its_timestep(micro):
    model = sd.load(micro)
    model.unet.out[2].weight.data.fill_(6e4)
    with pytest.raises(NotFinite, match="the UNet's output at timestep 999 is not finite: try --dtype float32 instead"):
        generate(model.to(torch.float16), Request("x", steps=2, guidance=1e6))
    model = sd.load(micro)
    model.vae.decoder.conv_in.weight.data *= 1e6  # no number of float16 any more
    with pytest.raises(NotFinite, match="the VAE's output is not finite, nor are 1 tensors .*: try --dtype float32"):
        generate(model.to(torch.float16), Request("x", steps=1))
    with pytest.raises(NotFinite, match=r"at timestep \d+ is not finite: is guidance too high\?"):
        generate(sd.load(micro), Request("x", steps=2, guidance=3e38))


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
    assert comment["prompt"] == "ein blaues Quadrat" and comment["seed"] == 8
    assert comment["ckpt"] == os.path.basename(micro), "and no path of this machine"
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
    assert "cut off: 'elephant parade'\n" in done.stderr
    done = run("sample.py", "red " * 10_000, "--ckpt", micro, "--steps", 1, "--out", tmp_path / "b.png")
    assert "cut off: 'red red red" in done.stderr and "' ...\n" in done.stderr and len(done.stderr) < 1000


def test_warns_of_what_the_model_never_saw(run, micro, tmp_path):
    done = run("sample.py", "x", "--ckpt", micro, "--steps", 1, "--frames", 6, "--fps", 33, "--out", tmp_path / "a.gif")
    assert done.returncode == 0
    assert "never saw 33 FPS" in done.stderr and "trained on 4 frames of 32x32, not 6" in done.stderr


BAD = {
    "no prompt": ([], "prompt must be given"),
    "empty prompt": ([" "], "prompt must be given and not be empty"),
    "no such checkpoint": (["x", "--ckpt", "nowhere.safetensors"], "nowhere.safetensors"),
    "foreign checkpoint": (["x", "--ckpt", "README.md"], "README.md"),
    "unwritable": (["x", "--out", "/dev/null/clip.mp4"], "/dev/null"),
    "wrong ending": (["x", "--out", "clip.avi"], "out must be a folder, or end in .mp4, .gif, .png"),
    "prime frames": (["x", "--frames", "7"], "use 6 or 8"),
    "no frames": (["x", "--frames", "0"], "frames must be in 1..1000000, got 0"),
    "size form": (["x", "--size", "64"], "WIDTHxHEIGHT"),
    "size factor": (["x", "--size", "60x64"], "divisible by 8"),
    "fps too high": (["x", "--fps", "121"], "0..120"),
    "fps negative": (["x", "--fps", "-1"], "0..120"),
    "no steps": (["x", "--steps", "0"], "1..1000"),
    "no number": (["x", "--steps", "many"], "--steps: must be a whole number"),
    "guidance that is none": (["x", "--guidance", "nan"], "--guidance: must be a number"),
    "unknown option": (["x", "--stepz", "3"], "no option 'stepz'; did you mean 'steps'?"),
    "no device": (["x", "--device", "tpu"], "device tpu is not here"),
    "no such device": (["x", "--device", "cpu:3"], "cpu:3"),
    "no number of a device": (["x", "--device", "cpu:x"], "cpu:x"),
    "prompts file": (["--prompts", "/nowhere.txt"], "prompts must be a file with a prompt a line, got '/nowhere.txt'"),
    "no text": (["a \udcff"], "prompt and negative must be text in UTF-8, got 'a \\udcff'"),
    "no text in the negative": (["x", "--negative", "\ud800"], "prompt and negative must be text"),
    "too many": (["x", "--num", "1000000000"], "num must make at most 100,000 videos of all prompts together"),
    "seeds beyond the last": (["x", "--num", "2", "--seed", "18446744073709551615"], "seed must be in"),
    "more digits than Python prints": (["x", "--num", "0x" + "f" * 9000], "num must fit into 64 bits, got a number of"),
    "more digits than a size has": (["x", "--size", "9" * 5000 + "x8"], "WIDTHxHEIGHT"),
    "a number like infinity": (["x", "--guidance", "1e400"], "guidance must be a finite number, got inf"),
    "size beyond memory": (["x", "--size", "800000x800000"], "must fit into memory: 4 frames of 800000x"),
    "frames beyond counting": (["x", "--frames", str(2**62 - 57)], "frames must be in 1..1000000"),
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


def test_two_at_once_into_one_folder(processes, micro, tmp_path):
    """The same prompt and seed with different guidance: neither video is lost."""
    out = tmp_path / "out"
    out.mkdir()
    for scale in (1, 5):  # of so many steps that the second begins before the first has ended
        processes.start(["sample.py", "x", "--ckpt", micro, "--steps", 99, "--out", out, "--guidance", scale],
                        target=command)
    assert processes.wait() == [0, 0]
    paths = [line for line in processes.log.read_text().splitlines() if line.endswith(".mp4")]
    assert sorted(map(os.path.basename, paths)) == sorted(os.listdir(out)) == ["x-seed0-2.mp4", "x-seed0.mp4"]


def test_an_interrupted_sampling_leaves_nothing(micro, tmp_path, monkeypatch, run):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("clips.write.write_mp4", interrupted)
    monkeypatch.setitem(__import__("clips.write", fromlist=["WRITERS"]).WRITERS, ".mp4", interrupted)
    done = run("sample.py", "x", "--ckpt", micro, "--steps", 1, "--out", tmp_path)
    assert done.returncode == 130 and os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# On several processes


def test_ranks_share_the_prompts_and_make_the_same_files(processes, micro, tmp_path):
    """The files have the same names, though two prompts are called alike, and the same bytes. Rank 0 alone talks."""
    (tmp_path / "p.txt").write_text("a cat!\na cat?\na dog\n")
    told = []
    for ranks in (1, 2):
        out = tmp_path / f"by{ranks}"
        assert processes.run(["sample.py", "--prompts", tmp_path / "p.txt", "--ckpt", micro, "--steps", 2, "--dtype",
                              "float32", "--out", f"{out}/"], ranks=ranks, target=command) == [0] * ranks
        told.append(processes.log.read_text().replace(str(out), "out").split("sample:")[-1])
        processes.log.unlink()
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / f"by{n}").iterdir()} for n in (1, 2))
    assert list(sorted(one)) == ["a-cat-seed0-2.mp4", "a-cat-seed0.mp4", "a-dog-seed0.mp4"] and one == two
    assert len(set(one.values())) == 3
    assert "6/6" in told[0] and "4/4" in told[1] and told[0].splitlines()[1:] == told[1].splitlines()[1:]
    assert told[0].splitlines()[1:] == [f"out/{name}.mp4" for name in ("a-cat-seed0", "a-cat-seed0-2", "a-dog-seed0")]


@pytest.mark.parametrize("torchruns", [True, False])
def test_an_error_on_one_rank_ends_all_with_one_line(micro, processes, tmp_path, torchruns):
    """The disk of rank 1 is full. What the others have finished stays, and nothing half done: also where no torchrun
    ends rank 0, but its watchdog."""
    (tmp_path / "full.py").write_text(f"""
import os, resource, runpy, sys
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
sys.path.insert(0, {ROOT!r})
sys.argv[0] = "sample.py"
runpy.run_path("sample.py", run_name="__main__")
""")
    full = [tmp_path / "full.py", *"abcdefgh", "--ckpt", micro, "--steps", "1", "--out", tmp_path / "out" / "x.gif"]
    if torchruns:
        done = subprocess.run([*torchrun(2), *full], cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True,
                              timeout=LIMIT)
        assert done.returncode == 1 and done.stdout == ""
        lines = done.stderr.splitlines()
    else:
        assert processes.run(full, ranks=2, target=command) == [1, 1]
        lines = processes.log.read_text().splitlines()
    said = [line for line in lines if line.startswith("sample.py: ")]
    told = f"sample.py: {tmp_path}/out/x-001.gif cannot be written: File too large"
    assert said.count(told) == torchruns  # without torchrun the log is a file, too, and full for rank 1
    assert all("rank 1 (last at: " in line for line in said if line != told), lines
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".gif" or "001" in path.name]


# ---------------------------------------------------------------------------------------------------------------------
# Devices and precision


def test_devices_are_named_with_their_number(monkeypatch):
    assert pick_device() == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device() == torch.device("cuda:0") and pick_device("cuda:3") == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_RANK", "2")  # torchrun's
    assert pick_device() == pick_device("cuda") == torch.device("cuda:2") and pick_device("cuda:3").index == 3


@pytest.mark.parametrize("units", [False, True])
def test_auto_is_the_precision_that_the_machine_is_made_for(monkeypatch, units):
    monkeypatch.setattr("sd.device.HAS_UNITS", units)
    assert pick_dtype("auto", torch.device("cuda", 0)) == torch.float16
    assert pick_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if units else torch.float32)
    assert pick_dtype("auto", torch.device("mps")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_the_precision_is_said(run, micro, tmp_path):
    done = run("sample.py", "x", "--ckpt", micro, "--steps", 1, "--out", tmp_path, "--dtype", "bfloat16")
    assert done.returncode == 0 and "bfloat16 on cpu" in done.stderr
