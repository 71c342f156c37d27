"""AnimateDiff's motion modules: as published and as diffusers saves them, the same tensors; the UNet is diffusers'."""

import json
import os
from dataclasses import replace

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from PIL import Image
from references import error, inputs, reference, save_reference, shake
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sd
from grid import fold
from sd.lora import read_lora
from sd.motion import motion_names
from sd.presets import MICRO, SD15

RENAMED = {"norm1": "norms.0", "norm2": "norms.1", "norm3": "ff_norm", "attn1": "attention_blocks.0",
           "attn2": "attention_blocks.1"}
SHAPE = {"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_norm_num_groups": 4}  # the micro model's


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model with the text tower of Stable Diffusion 1."""
    path = str(tmp_path_factory.mktemp("base") / "base.safetensors")
    text = replace(MICRO.text, quick_gelu=True, pad_id=49407)
    sd.save(sd.build(replace(MICRO, text=text), sd.Settings(width=64, height=64)), path)
    return path


@pytest.fixture(scope="module")
def adapter():
    """diffusers' motion modules with random weights, as many as v2 has."""
    torch.manual_seed(3)
    return shake(MotionAdapter(**SHAPE))


@pytest.fixture(scope="module")
def folder(adapter, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("adapter"))
    adapter.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(base, folder):
    return sd.load(base, motion=folder)


def original(adapter, positions=32, middle=True):
    """{name: tensor} of diffusers' modules, as AnimateDiff wrote them."""
    tensors = {}
    for name, tensor in adapter.state_dict().items():
        place, inner = name.split(".motion_modules.")
        number, _, inner = inner.partition(".")
        if place == "mid_block" and not middle:
            continue
        tables = [inner] if "pos_embed" not in inner else [
            f"transformer_blocks.0.attention_blocks.{i}.pos_encoder.pe" for i in range(2)]
        for inner in tables:
            for theirs, first in RENAMED.items():
                inner = inner.replace(f"transformer_blocks.0.{theirs}.", f"transformer_blocks.0.{first}.")
            cut = tensor[:, :positions].clone() if inner.endswith(".pe") else tensor.clone()
            tensors[f"{place}.motion_modules.{number}.temporal_transformer.{inner}"] = cut
    return tensors


def same(model, other):
    ours, theirs = model.unet.state_dict(), other.unet.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# ---------------------------------------------------------------------------------------------------------------------
# The sums are diffusers'


class PerFrame(nn.Module):
    """A norm over (B, C, T, H, W) that takes its statistics frame by frame, as AnimateDiff's own code does."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(Stable Diffusion 1 at reduced width with random motion modules, diffusers' of the same weights)."""
    torch.manual_seed(3)
    adapter, folder = shake(MotionAdapter(block_out_channels=(64, 128, 128, 128))), tmp_path_factory.mktemp("wide")
    adapter.save_pretrained(folder / "motion")
    peer = UNetMotionModel.from_unet2d(reference("SD 1")[0], adapter).eval()
    return sd.load(save_reference("SD 1", folder), motion=str(folder / "motion")), peer


def test_one_frame_as_diffusers(wide):
    (ours, peer), (x, t, context) = wide, inputs(8, 8)
    with torch.no_grad():
        theirs = peer(x[:, :, None], t, context).sample[:, :, 0]
        assert error(ours.unet(x, t, context, None, (1, 1)), theirs) < 1e-4
        assert error(ours.unet(x, t, context), theirs) > 1e-2, "and without a grid the modules do nothing"


def test_eight_frames_as_diffusers_with_norms_of_one_frame(wide):
    ours, peer = wide
    modules = [module for module in peer.modules() if isinstance(module, AnimateDiffTransformer3D)]
    for module in modules:
        module.norm = PerFrame(module.norm)
    g = torch.Generator().manual_seed(2)
    video, (_, t, context) = torch.randn(2, 8, 4, 8, 16, generator=g), inputs(8, 8)
    with torch.no_grad():
        theirs = peer(video.transpose(1, 2), t, context.repeat_interleave(8, 0)).sample.transpose(1, 2)
        found = ours.unet(fold(video, 2, 4), t, context, None, (2, 4))
    assert len(modules) == 21 and error(found, fold(theirs, 2, 4)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Every packaging is the same


def test_what_comes_with_them(loaded, folder):
    s = loaded.settings
    assert (s.layout, s.layout_options) == ("temporal", {"positions": 32, "middle": True})
    assert (s.beta_schedule, s.beta_start, s.beta_end) == ("linear", 0.00085, 0.012)
    assert (s.frames, s.fps, s.prediction) == (16, 8, "epsilon")
    assert s.origin["motion"] == {"from": os.path.basename(folder)}


@pytest.mark.parametrize("kind, positions, ending", [
    ("v1", 24, ".ckpt"), ("v2", 32, ".ckpt"), ("v2", 32, ".safetensors"), ("v3", 32, ".ckpt")])
def test_every_version_under_the_original_names(base, adapter, loaded, tmp_path, capsys, kind, positions, ending):
    path, tensors = str(tmp_path / ("mm" + ending)), original(adapter, positions, kind == "v2")
    if ending == ".safetensors":
        save_file(tensors, path)
    else:  # as v2's and v3's are, and as a training run leaves them
        entries = {f"module.{name}": t for name, t in tensors.items()} if kind == "v2" else tensors
        torch.save({"state_dict": entries | {"animatediff_config": {"a": 1}}, "epoch": 3}, path)
    model = sd.load(base, motion=path)
    assert model.settings.layout_options == {"positions": positions, "middle": kind == "v2"}
    assert same(model, loaded) if kind == "v2" else "2" not in model.unet.layout.motion and not same(model, loaded)
    assert capsys.readouterr().err == ""
    model.check_size(64, 64, positions)
    with pytest.raises(ValueError, match=f"frames must be <= {positions}, "):
        model.check_size(64, 64, positions + 1 if positions == 24 else 36)


def test_a_folder_without_tables_says_how_many_frames(base, adapter, tmp_path):
    """As published adapters are, which were converted without them."""
    torch.manual_seed(0)
    MotionAdapter(**SHAPE, motion_max_seq_length=24, use_motion_mid_block=False).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({n: t.clone() for n, t in load_file(path).items() if not n.endswith(".pe")}, path)
    assert sd.load(base, motion=str(tmp_path)).settings.layout_options == {"positions": 24, "middle": False}
    os.remove(tmp_path / "config.json")  # of the file alone one cannot tell v1 from v3: as many as both number
    assert sd.load(base, motion=str(path)).settings.layout_options == {"positions": 24, "middle": False}


def test_saved_in_one_file(loaded, tmp_path):
    path = str(tmp_path / "both.safetensors")
    sd.save(loaded, path)
    assert "etc.layout.motion.2.transformer_blocks.0.attention_blocks.1.to_out.0.bias" in load_file(path)
    again = sd.load(path)
    assert same(again, loaded) and again.settings == loaded.settings
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({n: t for n, t in load_file(path).items() if not n.startswith("etc.layout.motion.0.")}, path, header)
    with pytest.raises(ValueError, match=r"lacks etc\.layout\.motion\.0\.norm\.bias, etc\.layout"):
        sd.load(path)


def test_others_take_their_place(loaded, folder, adapter, tmp_path):
    path, other = str(tmp_path / "both.safetensors"), str(tmp_path / "v3.ckpt")
    sd.save(loaded, path)
    torch.save({name: t + 1 for name, t in original(adapter, middle=False).items()}, other)
    model = sd.load(path, motion=other)
    assert model.settings.layout_options == {"positions": 32, "middle": False}
    name = "0.proj_in.bias"
    assert torch.equal(model.unet.layout.motion.get_parameter(name), loaded.unet.layout.motion.get_parameter(name) + 1)


def test_a_repository_by_name(base, folder, loaded, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, allow_patterns: asked.append((name, allow_patterns)) or folder)
    model = sd.load(base, motion="guoyww/animatediff-motion-adapter-v1-5-3")
    assert same(model, loaded) and asked == [
        ("guoyww/animatediff-motion-adapter-v1-5-3", ["config.json", "diffusion_pytorch_model.safetensors"])]
    assert model.settings.origin["motion"] == {"from": "animatediff-motion-adapter-v1-5-3"}


def test_names_are_as_many_as_tensors():
    names = motion_names(SD15.unet)
    assert len(names) == 21 * 26 and len({a for pair in names.values() for a in pair}) == 2 * 21 * 26


# ---------------------------------------------------------------------------------------------------------------------
# What is told and what is refused


def test_what_else_the_file_holds_is_told(base, adapter, tmp_path, capsys):
    path = str(tmp_path / "mm.ckpt")
    more = {"conv_in.weight": torch.ones(1), "time_embedding.linear_1.bias": torch.ones(1)}
    torch.save(original(adapter) | more, path)
    sd.load(base, motion=path)
    assert capsys.readouterr().err == (
        f"warning: {path} holds 2 tensors besides motion modules, which are left out: conv_in.weight, "
        "time_embedding.linear_1.bias\n")


def test_a_base_of_another_family_is_told(micro, folder, capsys):
    sd.load(micro, motion=folder)
    assert "made for Stable Diffusion 1.x" in capsys.readouterr().err


@pytest.mark.parametrize("change, says", [
    (lambda d: {n: torch.ones(3, 3) if "down_blocks.1" in n and n.endswith("to_q.weight") else t for n, t in d.items()},
     r"another shape where motion/down_blocks\.1\.motion_modules\.0\S*to_q.weight is \(3, 3\) and not \(32, 32\)"),
    (lambda d: {n: t for n, t in d.items() if "up_blocks.1" not in n}, r"lacks motion/up_blocks\.1\.motion_modules"),
    (lambda d: d | {"down_blocks.7.motion_modules.0.temporal_transformer.norm.bias": torch.ones(3)},
     r"unknown tensors, motion/down_blocks\.7\.motion"),
    (lambda d: {"conv_in.weight": torch.ones(3)}, "holds no motion modules of AnimateDiff, but conv_in.weight"),
])
def test_modules_that_do_not_fit(base, adapter, tmp_path, change, says):
    path = str(tmp_path / "mm.ckpt")
    torch.save(change(original(adapter)), path)
    with pytest.raises(ValueError, match=says) as refusal:
        sd.load(base, motion=path)
    assert path in str(refusal.value)


@pytest.mark.parametrize("key, value", [("_class_name", "UNet2DConditionModel"), ("motion_num_attention_heads", 4),
                                        ("motion_norm_num_groups", 16), ("conv_in_channels", 9)])
def test_a_folder_of_something_else(base, folder, tmp_path, key, value):
    config = json.load(open(os.path.join(folder, "config.json")))
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"{key} is {value!r}; AnimateDiff's motion modules have"):
        sd.load(base, motion=str(tmp_path))


def test_another_layout_cannot_have_them(base, folder):
    with pytest.raises(ValueError, match="motion modules make the layout 'temporal'"):
        sd.load(base, motion=folder, layout="grid")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_a_video_with_motion_modules_and_loras(run, base, folder, tmp_path):
    out, lora = tmp_path / "a.gif", str(tmp_path / "style.safetensors")
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}, lora)
    done = run("sample.py", "a boat", "--ckpt", base, "--motion", folder, f"--lora={lora}:-.5", "--lora", lora,
               "--steps=1", "--out", out)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    with Image.open(out) as video:
        assert video.n_frames == 16 and video.size == (64, 64)
        told = json.loads(video.info["comment"])
    assert told["motion"] == os.path.basename(folder)
    assert told["lora"] == ["style.safetensors:-.5", "style.safetensors"]


@pytest.mark.parametrize("options, says", [
    (["--frames=36"], "sample.py: frames must be <= 32, as many as the model numbers in time, got 36\n"),
    (["--layout=grid"], "sample.py: motion modules make the layout 'temporal' and bring its options"),
    (["--lora=none.safetensors:0.5"], "sample.py: none.safetensors cannot be read: No such file or directory\n"),
    (["--lora=none.safetensors:x"], "sample.py: none.safetensors:x cannot be read: No such file or directory\n"),
])
def test_what_cannot_be_takes_one_line(run, base, folder, options, says):
    done = run("sample.py", "a boat", "--ckpt", base, "--motion", folder, *options)
    assert done.returncode == 2 and done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.stderr


def test_only_a_number_at_the_end_is_a_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "take:2").touch()
    for text, expected in {
        "a.pt": ("a.pt", 1), "a.pt:0.5": ("a.pt", 0.5), "a.pt:-2": ("a.pt", -2), "C:\\a.pt": ("C:\\a.pt", 1),
        "C:\\a.pt:1.5": ("C:\\a.pt", 1.5), "take:2": ("take:2", 1), "take:2:.5": ("take:2", 0.5),
    }.items():
        assert read_lora(text) == expected
