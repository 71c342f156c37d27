"""Checkpoints as other tools write them, on a Stable Diffusion that is as small as can be."""

import functools
import http.server
import json
import os
import pathlib
import shutil
import stat
import struct
import threading
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references import shake
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd import Settings, build, load, save
from sd.checkpoint import model_tensors
from sd.presets import MICRO

SCHEDULER = "scheduler/scheduler_config.json"
NEEDED = "model.diffusion_model.input_blocks.0.0.weight"


@functools.cache
def networks():
    """A narrow Stable Diffusion 1 of diffusers and transformers: {name of its folder: network}."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=4, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = AutoencoderKL(block_out_channels=(32, 32), layers_per_block=1, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=4, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=1, hidden_act="quick_gelu"))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    return {"unet": shake(unet), "vae": shake(vae), "text_encoder": shake(text), "scheduler": scheduler}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A diffusers folder."""
    folder = tmp_path_factory.mktemp("published")
    for name, part in networks().items():
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(published, tmp_path / "folder")


@pytest.fixture(scope="module")
def tensors(published):
    """{name: tensor} of the same as one file."""
    return Tensors(plain(load(published)))


class Tensors(dict):
    def __repr__(self):  # hypothesis prints the arguments of a test that fails
        return f"{len(self)} tensors"


def plain(model):
    return {name: t.clone() for name, t in model_tensors(model).items() if not name.startswith("etc.")}


def same(model, tensors):
    found = plain(model)
    equal = (torch.equal(found[name], t.to(found[name].dtype)) for name, t in tensors.items())
    return found.keys() == tensors.keys() and all(equal)


def edit(path, **changes):
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}), encoding="utf-8")


def refused(path, message, **options):
    """That load() refuses a path in one line that matches, and names it."""
    with pytest.raises(ValueError, match=message) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value) and os.fspath(path) in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Leftovers, packagings, precisions: the same model

LEFTOVERS = {
    "betas": 3, "alphas_cumprod": 3, "posterior_mean_coef1": 3, "model_ema.decay": (), "model_ema.num_updates": (),
    "first_stage_model.loss.logvar": (), "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "cond_stage_model.logit_scale": (), "cond_stage_model.model.visual.conv1.weight": (2, 3, 2, 2),
    "cond_stage_model.transformer.text_projection.weight": (4, 4), "cond_stage_model.model.logit_scale": (),
    "cond_stage_model.transformer.vision_model.post_layernorm.weight": 4, "denoiser.sigmas": 3, "global_step": (),
    "embedding_manager.initial_embeddings.weight": 4, "lora_unet_mid_block_proj_in.alpha": (),
    "bundle_emb.style.string_to_param.*": (1, 4)}
LEFTOVERS_OF_TEXT = {"text_model.embeddings.position_ids": (1, 77), "text_projection.weight": (4, 4), "logit_scale": (),
                     "vision_model.post_layernorm.weight": 4}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def write(weights, path, kind, prefix=""):
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    if kind == "safetensors":
        return save_file(weights, path)
    inside, _, old = kind.partition(", ")
    content = {"flat": weights, "nested": {"model": {"module": weights}, "optimizer": {"state": {}}},
               "lightning": {"state_dict": weights, "epoch": 3, "hyper_parameters": {"lr": 1e-4}}}[inside]
    torch.save(content, path, _use_new_zipfile_serialization=not old)


KINDS = ["safetensors", *(f"{inside}{old}" for inside in ("flat", "nested", "lightning") for old in ("", ", legacy"))]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), leftovers=st.sets(st.sampled_from(sorted(LEFTOVERS))), data=st.data(),
       prefix=st.sampled_from(["", "", "module.", "model.", "_orig_mod."]), old_text=st.booleans())
def test_leftovers_packagings_and_precisions_change_nothing(tensors, tmp_path, kind, leftovers, data, prefix, old_text):
    path, random = tmp_path / "model", data.draw(st.randoms(use_true_random=False))
    mixed = {name: t.to(random.choice(DTYPES)) for name, t in tensors.items()}
    named = {name.replace("text_model.", "") if old_text else name: t for name, t in mixed.items()}
    extra = {name: torch.ones(LEFTOVERS[name], dtype=random.choice([*DTYPES, torch.int64])) for name in leftovers}
    write(named | extra, path, kind, prefix)
    assert same(load(path), mixed)
    needed = random.choice(sorted(named))
    write({n: t for n, t in named.items() if n != needed} | extra, path, kind, prefix)
    refused(path, rf"lacks {needed}\b")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(leftovers=st.sets(st.sampled_from(sorted(LEFTOVERS_OF_TEXT))),
       kind=st.sampled_from(["safetensors", "bin", "legacy bin"]), shards=st.sampled_from([1, 1, 2, 3]),
       variant=st.sampled_from(["", ".fp16", ".bf16", ".fp32", ".non_ema"]), late=st.booleans())
def test_names_of_weights_in_a_folder_change_nothing(published, tensors, tmp_path, leftovers, kind, shards, variant,
                                                     late):
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for other in ("safety_checker", "feature_extractor", "tokenizer"):
        (folder / other).mkdir()
    for source in published.glob("*/*.safetensors"):
        part = source.parent.name
        stem = "diffusion_pytorch_model"
        if part == "text_encoder":
            stem = "model" if kind == "safetensors" else "pytorch_model"
        weights = load_file(source)
        if part == "text_encoder":
            weights |= {n: torch.ones(LEFTOVERS_OF_TEXT[n]) for n in leftovers}
        names = sorted(weights)
        for i in range(shards):
            number = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
            name = stem + (number + variant if late else variant + number) + "." + kind.split()[-1]
            some = {n: weights[n].clone() for n in names[i::shards]}
            write(some, folder / part / name, {"bin": "flat", "legacy bin": "flat, legacy"}.get(kind, kind))
    assert same(load(folder), tensors)


def test_the_average_is_taken_before_what_was_averaged(folder, tensors, capsys):
    unet = folder / "unet"
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, unet / "diffusion_pytorch_model.non_ema.safetensors")
    os.remove(unet / "diffusion_pytorch_model.safetensors")
    torch.save(weights, unet / "diffusion_pytorch_model.bin")
    assert same(load(folder), tensors) and not capsys.readouterr().err
    os.remove(unet / "diffusion_pytorch_model.bin")
    load(folder)
    assert "not averaged (non_ema): they are used" in capsys.readouterr().err


def test_the_average_alone_is_used(tensors, tmp_path, capsys):
    average = {"model_ema." + n.removeprefix("model.").replace(".", "") if n.startswith("model.") else n: t
               for n, t in tensors.items()}
    save_file(average, tmp_path / "ema")
    assert same(load(tmp_path / "ema"), tensors) and "moving average: that is used" in capsys.readouterr().err
    del average["model_ema.diffusion_modelout2bias"]
    save_file(average, tmp_path / "ema")
    refused(tmp_path / "ema", r"lacks model.diffusion_model.out.2.bias")


def test_additions_are_left_out_with_a_word(tensors, tmp_path, capsys):
    save_file(tensors | {"lora_unet_mid_block.alpha": torch.ones(1)}, tmp_path / "a")
    assert same(load(tmp_path / "a"), tensors)
    assert "additions to the model, which are left out: lora_unet_mid_block.alpha" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What a file says of itself


@pytest.mark.parametrize("markers, noted, told, warned", [
    (["v_pred"], {}, ("v", False, "leading"), False),
    (["v_pred", "ztsnr"], {}, ("v", True, "trailing"), False),
    (["ztsnr"], {}, ("v", True, "trailing"), False),
    ([], {"modelspec.predict_key": "v"}, ("v", False, "leading"), False),
    (["v_pred"], {"modelspec.prediction_type": "v"}, ("v", False, "leading"), False),
    (["v_pred"], {"modelspec.prediction_type": "epsilon"}, ("v", False, "leading"), True),
    ([], {"modelspec.prediction_type": "V_Prediction"}, ("v", False, "leading"), False),
    ([], {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"}, ("v", False, "leading"), True),
])
def test_markers_and_notes_are_believed(tensors, tmp_path, capsys, markers, noted, told, warned):
    save_file(tensors | {name: torch.tensor([]) for name in markers}, tmp_path / "a", metadata=noted)
    model = load(tmp_path / "a")
    assert (model.settings.prediction, model.settings.zero_snr, model.settings.spacing) == told
    assert same(model, tensors)
    assert ("contradicts itself" in capsys.readouterr().err) == warned
    if "ztsnr" not in markers:
        assert load(tmp_path / "a", prediction="epsilon").settings.prediction == "epsilon"
    else:
        refused(tmp_path / "a", 'zero_snr needs prediction "v"', prediction="epsilon")


def test_the_resolution_is_noted_and_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "a", metadata={"modelspec.resolution": "768x640"})
    model = load(tmp_path / "a")
    assert (model.settings.width, model.settings.height) == (768, 640)
    save(model, tmp_path / "b")
    with safe_open(tmp_path / "b", "pt") as file:
        noted = {k: v for k, v in file.metadata().items() if k.startswith("modelspec.")}
    assert noted == {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "768x640"}


def test_a_prediction_that_is_unknown_is_told(tensors, tmp_path):
    save_file(tensors, tmp_path / "a", metadata={"modelspec.prediction_type": "sample"})
    refused(tmp_path / "a", "prediction must be one of epsilon, v, got 'sample'")
    assert load(tmp_path / "a", prediction="v").settings.prediction == "v"


@pytest.mark.parametrize("file, changes", [
    (SCHEDULER, {"trained_betas": [], "clip_sample": True, "_class_name": "UniPCMultistepScheduler",
                 "timestep_spacing": "linspace", "rescale_betas_zero_snr": None}),
    (SCHEDULER, {"trained_betas": "gone", "timestep_spacing": "gone", "prediction_type": "gone",
                 "num_train_timesteps": "gone", "beta_schedule": "gone", "_class_name": "gone"}),
    ("unet/config.json", {"sample_size": [8, 8], "attention_head_dim": [8, 8], "block_out_channels": "gone",
                          "act_fn": "swish", "only_cross_attention": [False, False], "norm_num_groups": "gone"}),
    ("unet/config.json", {"attention_head_dim": "gone", "num_attention_heads": 8, "_name_or_path": "C:\\Jürgen\\模型"}),
    ("vae/config.json", {"sample_size": [64, 64], "scaling_factor": "gone", "latents_mean": None, "act_fn": "gone",
                         "block_out_channels": "gone"}),
    ("text_encoder/config.json", {"architectures": "gone", "hidden_act": "gone", "model_type": "gone"}),
])
def test_configs_of_other_years_and_samplers(folder, tensors, file, changes):
    edit(folder / file, **changes)
    model = load(folder)
    assert same(model, tensors)
    assert (model.settings.width, model.settings.spacing, model.settings.latent_scale) == (16, "leading", 0.18215)


def test_a_config_is_read_as_utf8_with_a_mark_too(folder, tensors):
    config = folder / "unet/config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert same(load(folder), tensors)
    config.write_bytes(b'{"a":\n\xff}')
    refused(folder, "config.json, line 2: not text in UTF-8")
    config.write_bytes(b"[" * 100_000)
    refused(folder, "config.json: not JSON")
    config.write_bytes(b"[1]")
    refused(folder, "must be a JSON object")


def test_a_size_that_is_no_square(folder):
    edit(folder / "unet/config.json", sample_size=[8, 16])
    model = load(folder)
    assert (model.settings.height, model.settings.width) == (16, 32)


def test_a_folder_without_scheduler(folder, tensors, capsys):
    shutil.rmtree(folder / "scheduler")
    assert same(load(folder), tensors)
    assert "has no scheduler/" in capsys.readouterr().err


@pytest.mark.parametrize("file, changes, message", [
    ("unet/config.json", {"attention_head_dim": "8"}, "attention_head_dim must be a whole number > 0, or 2"),
    ("unet/config.json", {"attention_head_dim": []}, "attention_head_dim must be"),
    ("unet/config.json", {"sample_size": {"a": 1}}, "sample_size must be"),
    ("unet/config.json", {"norm_num_groups": 7}, "UNet: norm_groups must divide the width 32, got 7"),
    ("unet/config.json", {"norm_num_groups": None}, "UNet: norm_groups must be a whole number"),
    ("unet/config.json", {"attention_head_dim": 7}, "must divide the width 32, got 7"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
    ("unet/config.json", {"_class_name": "UNetMotionModel"}, "_class_name is 'UNetMotionModel'"),
    ("vae/config.json", {"scaling_factor": 0}, "latent_scale must be > 0, got 0"),
    ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'"),
    ("text_encoder/config.json", {"num_attention_heads": 3}, "heads must divide the width 4, got 3"),
    ("text_encoder/config.json", {"hidden_act": ["gelu"]}, "understood are quick_gelu"),
    (SCHEDULER, {"beta_end": "0.012"}, "beta_end must be a number, got '0.012'"),
    (SCHEDULER, {"beta_start": 0.5}, "beta_end must be > beta_start"),
    (SCHEDULER, {"trained_betas": [0.1]}, r"trained_betas is \[0.1\]"),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, 'zero_snr needs prediction "v"'),
])
def test_configs_that_cannot_be(folder, file, changes, message):
    edit(folder / file, **changes)
    refused(folder, message)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot serve, by its name


@pytest.mark.parametrize("change, message", [
    ({NEEDED: torch.zeros(32, 9, 3, 3)}, "an inpainting model: it takes 9 channels"),
    ({NEEDED: torch.zeros(32, 8, 3, 3)}, "an InstructPix2Pix model"),
    ({NEEDED: torch.zeros(32, 5, 3, 3)}, "a depth-to-image model"),
    ({NEEDED: torch.zeros(0, 4, 3, 3)}, f"lacks {NEEDED}"),
    ({NEEDED: torch.zeros(())}, "seems to be another model"),
    ({NEEDED: torch.zeros(32, 4, 3, 3, dtype=torch.uint8)}, "holds uint8, not floating-point numbers: quantised"),
    ({NEEDED + ".absmax": torch.zeros(1)}, "a quantised model"),
    ({"scaled_fp8": torch.zeros(1)}, "a quantised model"),
    ({"control_model.input_blocks.0.0.weight": torch.zeros(1)}, "a ControlNet"),
    ({"edm_mean_sigma": torch.zeros(1)}, "unknown tensors, edm_mean_sigma"),
])
def test_models_of_other_kinds(tensors, tmp_path, change, message):
    save_file(tensors | change, tmp_path / "a")
    refused(tmp_path / "a", message)
    torch.save(tensors | change, tmp_path / "a")
    refused(tmp_path / "a", message)


def test_eight_bits_are_used_as_they_are(tensors, tmp_path, capsys):
    rounded = {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}
    save_file(rounded, tmp_path / "a")
    assert same(load(tmp_path / "a", dtype=torch.float16), {n: t.half() for n, t in rounded.items()})
    assert capsys.readouterr().err.count("8-bit") == 1


@pytest.mark.parametrize("kind, bits", [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8)])
def test_types_that_are_no_weights(tensors, tmp_path, kind, bits):
    """Bytes under a header that takes them for numbers of other widths; which of them torch can read depends on it."""
    save_file(tensors | {NEEDED: torch.zeros(32 * 36 * bits // 8, dtype=torch.uint8)}, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header[NEEDED] |= {"dtype": kind, "shape": [32, 4, 3, 3]}
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    refused(tmp_path / "a", f"{NEEDED} cannot be read|quantised")


class Callback:
    pass


def zip_of(path, names, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name in names:
            file.writestr(name, b"x" * 1000)


@pytest.mark.parametrize("make, message", [
    (lambda p: torch.save({"step": 1, "module": {}, "optimizer": {}}, p), "a run's step file"),
    (lambda p: torch.save({"state": {}, "param_groups": []}, p), "the state of an optimizer"),
    (lambda p: torch.save(Callback(), p), "holds a program's object"),
    (lambda p: torch.save(torch.ones(1), p, _use_new_zipfile_serialization=False), "holds a Tensor and not named"),
    (lambda p: torch.save({"a": Callback()}, p, _use_new_zipfile_serialization=False), "is refused: besides tensors"),
    (lambda p: torch.save({"a": torch.ones(1).expand(10**12)}, p), "a is no plain tensor"),
    (lambda p: torch.save({"a": torch.eye(2).to_sparse()}, p), "a is no plain tensor"),
    (lambda p: torch.jit.save(torch.jit.script(torch.nn.ReLU()), p), "a TorchScript archive"),
    (lambda p: zip_of(p, ["a.txt"]), "a zip archive of other things: unpack it"),
    (lambda p: zip_of(p, ["a/data.pkl", "a/version"], zipfile.ZIP_DEFLATED), "was compressed after"),
    (lambda p: zip_of(p, ["a/data.pkl", "a/version", "a/byteorder"]), "not whole|refused"),
    (lambda p: p.write_bytes(b"<!DOCTYPE html>\n<html>"), "text, a web page"),
    (lambda p: p.write_bytes(b"GGUF\3\0\0\0"), "a GGUF file"),
    (lambda p: p.write_bytes(b"\x08\x07\x12\x07pytorch"), "it begins with|an ONNX file"),
    (lambda p: p.write_bytes(b"\x80\x04K\x01."), "a Python pickle that torch.save did not write"),
    (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(20)), "a compressed archive: unpack it"),
    (lambda p: p.write_bytes(b"x" + bytes(256) + b"ustar" + bytes(300)), "a tar archive"),
    (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{"), "not whole"),
    (lambda p: p.write_bytes(struct.pack("<Q", 2**27) + b"{" + b" " * 2**20), "not whole"),
    (lambda p: lie(p, a=([4], 0, 16), b=([4], 8, 24)), "not whole"),
    (lambda p: lie(p, a=([2**40], 0, 16)), "not whole"),
    (lambda p: lie(p, a=([2**63, 2], 0, 0)), "not whole"), (lambda p: lie(p, a=([4], 16, 0)), "not whole"),
    (lambda p: os.mkfifo(p), "a pipe, a device or a folder"),
    (lambda p: p.symlink_to("/dev/zero"), "a pipe, a device or a folder"),
    (lambda p: p.mkdir(), "no diffusers folder of a Stable Diffusion"),
])
def test_files_of_other_kinds(tmp_path, make, message):
    for name in ("model.safetensors", "model.ckpt"):
        make(tmp_path / name)
        refused(tmp_path / name, message)


def lie(path, **entries):
    """Write a safetensors file of 24 bytes whose header says other things: {name: (shape, start, end)}."""
    header = {n: {"dtype": "F32", "shape": shape, "data_offsets": ends} for n, (shape, *ends) in entries.items()}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))


@pytest.mark.parametrize("files, message", [
    ({"model_index.json": {"_class_name": "FluxPipeline"}}, "no .*unet.config.json; it says that it is a FluxPipeline"),
    ({"config.json": {"_class_name": "ControlNetModel"}}, "it says that it is a ControlNetModel"),
    ({"v1-5-pruned-emaonly.safetensors": {}, "b.ckpt": {}}, "give one of the files in it: b.ckpt, v1-5-pruned-emaonly"),
    ({"unet/config.json": {"addition_embed_type": "text_time"}, "vae/config.json": {}, "text_encoder/config.json": {},
      "model_index.json": {"_class_name": "StableDiffusionXLPipeline"}}, "says that it is a StableDiffusionXLPipeline"),
    ({"unet/config.json": {}, "vae/config.json": {}, "text_encoder/config.json": {},
      "unet/diffusion_flax_model.msgpack": {}}, "unet has no weights .*, only diffusion_flax_model.msgpack"),
])
def test_folders_of_other_kinds(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    refused(tmp_path, message)


# ---------------------------------------------------------------------------------------------------------------------
# Files of our own whose header is damaged


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    save(build(MICRO, Settings(frames=4, fps_trained=(8, 120))), path)
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["etc"])


def within(*path, value):
    """A change of a header: one entry, by its path."""
    def change(header):
        inner = header
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return json.dumps(header)
    return change


@pytest.mark.parametrize("change, message", [
    (lambda h: "not json", "settings .* are damaged"), (lambda h: "[" * 100_000, "settings .* are damaged"),
    (lambda h: "[]", "settings .* are damaged"), (lambda h: "3", "settings .* are damaged"),
    (lambda h: json.dumps({k: v for k, v in h.items() if k != "architecture"}), "they lack 'architecture'"),
    (lambda h: json.dumps({k: v for k, v in h.items() if k != "fps_embedding"}), "they lack 'fps_embedding'"),
    (within("architecture", value=None), "are damaged"), (within("architecture", "vae", value=[1]), "are damaged"),
    (within("architecture", "unet", "norm_groups", value=7), "UNet: norm_groups must divide the width 16, got 7"),
    (within("architecture", "unet", "norm_groups", value="4"), "UNet: norm_groups must be a whole number, got '4'"),
    (within("architecture", "unet", "head_width", value=0), "must divide the width 32, got 0"),
    (within("architecture", "unet", "head_width", value=None), "must divide the width 32, got 0"),
    (within("architecture", "unet", "swirl", value=1), "its unet says 'swirl', which is not known here"),
    (within("architecture", "vae", "norm_groups", value=-1), "VAE: norm_groups must divide"),
    (within("architecture", "text", "heads", value=3), "text tower: heads must divide the width 32, got 3"),
    (within("architecture", "text", "skip_last", value=5), r"skip_last must be in 0\.\.0, got 5"),
    (within("architecture", "text", "pad_id", value=10**6), "pad_id must be in"),
    (within("fps_embedding", value="yes"), "fps_embedding must be True or False"),
    (within("layout", value="spiral"), "layout must be one of"), (within("layout", value=[1]), "layout must be text"),
    (within("latent_scale", value=0), "latent_scale must be > 0"),
    (within("latent_scale", value=float("nan")), "latent_scale must be a finite number"),
    (within("latent_scale", value=-1), "latent_scale must be > 0"),
    (within("beta_start", value=0.5), "beta_end must be > beta_start"),
    (within("beta_end", value=1.5), "beta_end must be <= 0.999"),
    (within("beta_start", value=0), "beta_start must be > 0"),
    (within("beta_schedule", value="cosine"), "beta_schedule must be one of"),
    (within("prediction", value="x0"), "prediction must be one of epsilon, v, got 'x0'"),
    (within("zero_snr", value=1), "zero_snr must be True or False"), (within("zero_snr", value=True), "zero_snr needs"),
    (within("frames", value=0), "frames must be in"), (within("frames", value=7), "frames must make a grid"),
    (within("frames", value=10**400), "own.safetensors"), (within("frames", value=10**18), "frames must be in"),
    (within("frames", value=2.5), "frames must be a whole number"),
    (within("width", value="512"), "width must be a whole"),
    (within("fps_trained", value=["8"]), "fps_trained must be"),
    (within("fps_trained", value=8), "fps_trained must be"),
    (within("fps_trained", value=[-1]), r"fps_trained must be in 0\.\.120"), (within("eta", value=2), "eta must be in"),
    (within("sampling_steps", value=0), "sampling_steps must be in"), (within("origin", value=[]), "origin must be"),
    (within("layout_options", value={"speed": 1}), "layout_options of 'grid' must be among"),
])
def test_a_damaged_header_is_told_in_one_line(own, tmp_path, change, message):
    tensors, told = own
    path = tmp_path / "own.safetensors"
    save_file(tensors, path, metadata={"etc": change(json.loads(json.dumps(told)))})
    refused(path, message)


def test_a_model_without_memory_of_what_it_is_cannot_be_built():
    with pytest.raises(ValueError, match="latent_scale must be > 0"):
        build(MICRO, Settings(latent_scale=0.0))


# ---------------------------------------------------------------------------------------------------------------------
# What is saved


def test_a_saved_file_is_readable_as_the_umask_says_and_holds_no_path(own, tmp_path):
    import cli

    (tmp_path / "secret").mkdir()
    path = tmp_path / "secret" / "model.safetensors"
    save_file(own[0], path, metadata={"etc": json.dumps(own[1])})
    save(load(path), path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666 & ~cli.UMASK
    with safe_open(path, "pt") as file:
        assert "secret" not in json.dumps(file.metadata())


def test_bad_tensors_are_named():
    model = build(MICRO, Settings())
    assert model.bad_tensors() == []
    model.unet.out[2].weight.data[0, 0] = float("nan")
    model.vae.post_quant_conv.bias.data[1] = float("inf")
    assert model.bad_tensors() == ["unet.out.2.weight", "vae.post_quant_conv.bias"]


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face, by a server that speaks as much of it as is asked for


class Hub(http.server.BaseHTTPRequestHandler):
    home: pathlib.Path  # owner/name/files

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        api, _, path = self.path.partition("?")[0].removeprefix("/").partition("models/")
        parts = (path if api == "api/" else self.path.removeprefix("/")).split("/")
        repository = self.home.joinpath(*parts[:2])
        files = sorted(p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file())
        if not files:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "tree" in parts[2:3]:
            return self.answer(200, json.dumps([{"type": "file", "path": n, "size": 1, "oid": "0"} for n in files]))
        if api == "api/":
            about = {"id": "/".join(parts[:2]), "sha": "0" * 40, "siblings": [{"rfilename": n} for n in files]}
            return self.answer(200, json.dumps(about))
        name = "/".join(parts[4:])
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.asked.append(name)
        self.answer(200, (repository / name).read_bytes(), {"ETag": f'"{name.replace("/", "-")}"'})

    def answer(self, status, body, headers=()):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for key, value in {"X-Repo-Commit": "0" * 40, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    Hub.home, Hub.asked = tmp_path / "hub", []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in (("ENDPOINT", f"http://127.0.0.1:{server.server_port}"), ("HF_HUB_OFFLINE", False),
                            ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            huggingface_hub.constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}")
        yield Hub.home
        server.shutdown()


@pytest.mark.parametrize("ending", [".fp16.safetensors", ".bin", ".non_ema.safetensors", ".safetensors"])
def test_a_repository_with_weights_of_another_kind(published, tensors, hub, ending):
    home = shutil.copytree(published, hub / "somebody" / "sd")
    for path in home.glob("*/*.safetensors"):
        stem = path.name.removesuffix(".safetensors")
        if ending == ".bin":
            stem = "pytorch_model" if stem == "model" else stem
            torch.save(load_file(path), path.with_name(stem + ending))
            os.remove(path)
        else:
            path.rename(path.with_name(stem + ending))
            shutil.copy(path.with_name(stem + ending), path.with_name(stem + ".other.bin"))
    assert same(load("somebody/sd"), tensors)
    assert not any("other" in name for name in Hub.asked)


def test_a_repository_of_single_files(tensors, hub):
    home = hub / "somebody" / "sd"
    home.mkdir(parents=True)
    (home / "README.md").write_text("hello")
    refused("somebody/sd", "somebody/sd is no diffusers folder of a Stable Diffusion .* it has README.md")
    for part in ("unet", "vae", "text_encoder"):
        (home / part).mkdir()
        (home / part / "config.json").write_text("{}")
        (home / part / "flax_model.msgpack").write_text("")
    refused("somebody/sd", r"it has text_encoder/flax_model.msgpack, unet/flax_model.msgpack")
    save_file(tensors, home / "v1-5-pruned-emaonly.safetensors")
    assert same(load("somebody/sd"), tensors)
    shutil.rmtree(hub.parent / "cache")
    save_file(tensors, home / "v1-5-pruned.safetensors")
    refused("somebody/sd", r"download one of its files \(hf download somebody/sd v1-5-pruned")
    refused("nobody/nothing", "there is no such file, and no such Hugging Face repository")
