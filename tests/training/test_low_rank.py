"""training/low_rank.py: a change of low rank that is trained alone, and the file of it that others and we read."""

import copy
import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from references import FAMILIES, error, inputs, reference, save_reference
from runs import ROOT, assert_same_run, ci_options, few_labels, keep, train_here, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import sd
import train
from grid import fold
from sample import NoiseSchedule
from sd.lora import merge_lora
from sd.presets import MICRO, PRESETS
from training.config import read_config, stages
from training.low_rank import LowRank, add_low_rank, save_lora
from training.setup import make_model

CI, RANK = f"{ROOT}/configs/ci.py", 8


def pairs(unet):
    """{name: LowRank} of a UNet."""
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, LowRank)}


def shaken(model, rank):
    """The model with changes that are not zero."""
    add_low_rank(model.unet, rank)
    g = torch.Generator().manual_seed(4)
    for layer in pairs(model.unet).values():
        layer.up.weight.data.copy_(0.1 * torch.randn(layer.up.weight.shape, generator=g))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("layout, layers", [("grid", 32), ("pooled", 32), ("temporal", 88), ("swap", 88)])
def test_a_fresh_one_changes_no_bit_and_is_all_that_trains(layout, layers):
    """In each of four transformers eight layers, in each of seven motion modules eight more."""
    torch.manual_seed(0)
    model = sd.build(MICRO, sd.Settings(layout=layout))
    for p in model.unet.parameters():  # zeros at the end of a branch would hide it
        torch.nn.init.normal_(p, std=0.1)
    x, t, context = inputs(16, 16, 32)
    with torch.no_grad():
        before = model.unet(x, t, context, torch.tensor([8.0, 8.0]), (2, 2))
        add_low_rank(model.unet, RANK)
        assert torch.equal(model.unet(x, t, context, torch.tensor([8.0, 8.0]), (2, 2)), before)
    trained = {name for name, p in model.unet.named_parameters() if p.requires_grad}
    found = pairs(model.unet)
    assert trained == {f"{name}.{end}.weight" for name in found for end in ("down", "up")} and len(found) == layers
    assert {re.sub(r".*\.", "", name.removesuffix(".0")) for name in found} == {"to_q", "to_k", "to_v", "to_out"}


@pytest.mark.parametrize("name", ["tiny", "sd15", "sd21"])
def test_rank_32_is_a_tenth_of_the_model_at_most(name):
    with torch.device("meta"):
        model = sd.build(PRESETS[name], sd.Settings())
        whole = sum(p.numel() for part in model.parts().values() for p in part.parameters())
        add_low_rank(model.unet, 32)
    assert 4 * sum(p.numel() for p in model.unet.parameters() if p.requires_grad) < 2 * whole / 10  # of one in float16


@pytest.mark.parametrize("options, says", [
    (["--lora_rank=-1"], "lora_rank must be >= 0, got -1"),
    (["--lora_rank=33"], "lora_rank must be <= 32, the width of .*to_q, got 33"),
    (["--train=vae"], 'lora_rank and train = "vae" do not go together'),
    (["--train_text=True"], "lora_rank and train_text do not go together"),
    (["--init="], "lora_rank needs init: the model that it is a change of"),
    (["--layout=causal"], "lora_rank needs layers over time that were trained: those of layout 'causal' are fresh")])
def test_what_cannot_be_is_told_before_anything_is_encoded(micro, options, says):
    with pytest.raises(ValueError, match=says):
        make_model(read_config([CI, f"--init={micro}", "--train_text=False", "--lora_rank=4", *options]))


def test_that_another_vae_is_not_in_the_file_is_told(micro, capsys):
    make_model(read_config([CI, f"--init={micro}", f"--vae={micro}", "--train_text=False", "--lora_rank=4"]))
    assert capsys.readouterr().err == (
        f"warning: the LoRA will not hold the VAE of {micro}: it wants to be sampled with a model that has it\n")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def options(world, micro, tmp_path_factory):
    """A function of a folder: what makes a run of four steps into it; the samples are encoded once."""
    folder = tmp_path_factory.mktemp("lora")
    labels = few_labels(world, folder, 2)
    return lambda out: [*ci_options(world, folder), f"--out_dir={out}/run", f"--init={micro}", f"--label={labels}",
                        "--train_text=False", f"--lora_rank={RANK}", "--max_steps=4", "--sheet_every=4",
                        "--save_every=2", "--validation=1"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The folder of such a run that nobody stopped, with averaged weights."""
    folder = tmp_path_factory.mktemp("whole")
    done = train_here(*options(folder), "--keep=9")
    assert done.returncode == 0, done.stderr
    return folder


def test_stopped_and_resumed_it_ends_the_same(whole, options, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    keep(tmp_path, 2)
    os.remove(tmp_path / "run" / "lora.safetensors")
    done = train_here(*options(tmp_path), "--keep=9")
    assert done.returncode == 0 and "step-00000002.pt" in done.stdout, done.stderr
    assert_same_run(whole, tmp_path, 4)
    one, two = (load_file(folder / "run" / "lora.safetensors") for folder in (whole, tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_file_holds_the_averaged_changes_and_nothing_else(whole, micro):
    state, found = weights(whole, 4), load_file(whole / "run" / "lora.safetensors")
    assert sorted(path.name for path in (whole / "run").glob("*.safetensors")) == ["lora.safetensors"]
    assert (whole / "run" / "sheet-00000004.png").exists() and "val_loss_500" in (
        whole / "run" / "metrics.jsonl").read_text()
    averages = [tensor for name, tensor in found.items() if not name.endswith("alpha")]
    assert len(averages) == len(state["optimizer"]["average"]) == 64
    assert {t.double().sum().item() for t in averages} == {
        t.double().sum().item() for t in state["optimizer"]["average"]}
    assert {tensor.item() for name, tensor in found.items() if name.endswith("alpha")} == {RANK}
    before = sd.load(micro).unet.state_dict()
    for name, tensor in before.items():
        assert torch.equal(state["module"][f"unet.{name}"], tensor), f"{name} is frozen"
    assert all(tensor.any() for name, tensor in state["module"].items() if name.endswith("up.weight"))


def test_steps_are_those_of_a_loop_written_by_hand(options, micro, tmp_path):
    """W + up @ down in a UNet without our layers, autograd, and torch.optim.AdamW on the matrices."""
    arguments = [*options(tmp_path), "--dtype=float64", "--ema=0", "--clip=0", "--sheet_every=99", "--prompts=()"]
    assert train_here(*arguments).returncode == 0
    cfg = read_config([CI, *arguments])
    torch.manual_seed(cfg.seed)
    task = train.UNetTask(cfg, make_model(cfg), {}, SimpleNamespace(rank=0, world=1, device=torch.device("cpu")))
    start = {name: (layer.down.weight.detach().double(), layer.up.weight.detach().double())
             for name, layer in pairs(task.module.unet).items()}
    model = sd.load(micro, dtype=torch.float64)
    unet, schedule = model.unet, NoiseSchedule(model.settings)
    frozen = {name: p.detach() for name, p in unet.named_parameters()}
    matrices = {name: [m.requires_grad_() for m in pair] for name, pair in start.items()}
    optimizer = torch.optim.AdamW([m for pair in matrices.values() for m in pair], betas=cfg.betas,
                                  weight_decay=cfg.weight_decay)
    task.begin(stages(cfg)[0], 0)
    for step in range(cfg.max_steps):
        latents, context, fps, t, eps = (x.double() if x.is_floating_point() else x for x in task.batch()[1])
        x0 = fold(latents, 2, 2)
        changed = {f"{name}.weight": frozen[f"{name}.weight"] + up @ down for name, (down, up) in matrices.items()}
        output = functional_call(unet, frozen | changed, (schedule.add_noise(x0, eps, t), t, context, fps, (2, 2)))
        (output - schedule.target(x0, eps, t)).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(cfg, step)
        optimizer.step()
        optimizer.zero_grad()
    state = weights(tmp_path, 4)["module"]
    for name, pair in matrices.items():
        for end, matrix in zip(("down", "up"), pair):
            torch.testing.assert_close(state[f"unet.{name}.{end}.weight"], matrix.detach(), rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def peft(monkeypatch):
    """The newest transformers asks for a newer peft than there is."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0", raising=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_computes_what_we_do(family, tmp_path, peft):
    unet, vae, text, scheduler = reference(family)
    ours = shaken(sd.load(save_reference(family, tmp_path)), 32)
    save_lora(ours, str(tmp_path / "lora.safetensors"))
    again = sd.load(tmp_path, lora=[(str(tmp_path / "lora.safetensors"), 1.0)])
    pipe = StableDiffusionPipeline(vae, text, None, copy.deepcopy(unet), scheduler, None, None,
                                   requires_safety_checker=False)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora()
    x, t, context = inputs(8, 8)
    with torch.no_grad():
        found, theirs, before = ours.unet(x, t, context), pipe.unet(x, t, context).sample, unet(x, t, context).sample
        assert error(found, theirs) < 1e-4 and error(again.unet(x, t, context), found) < 1e-4
        assert error(before, theirs) > 0.05


def test_diffusers_reads_the_changes_of_motion_modules(tmp_path, peft):
    """Its UNetMotionModel gets what merging gives us, in every layer."""
    from diffusers import MotionAdapter, UNetMotionModel

    adapter = MotionAdapter(block_out_channels=(64, 128, 128, 128))
    adapter.save_pretrained(tmp_path / "motion")
    peer = UNetMotionModel.from_unet2d(reference("SD 1")[0], adapter)
    folder, path = save_reference("SD 1", tmp_path / "base"), str(tmp_path / "lora.safetensors")
    save_lora(shaken(sd.load(folder, motion=str(tmp_path / "motion")), 4), path)
    peer.load_lora_adapter(load_file(path), prefix="unet")
    peer.fuse_lora()
    merged = sd.load(folder, motion=str(tmp_path / "motion"), lora=[(path, 1.0)])
    ours = sorted(p.detach().double().norm().item() for name, p in merged.unet.named_parameters()
                  if re.search(r"\.to_(q|k|v|out\.0)\.weight", name))
    theirs = sorted(p.detach().double().norm().item() for name, p in peer.named_parameters()
                    if re.search(r"\.to_(q|k|v|out\.0)\.(base_layer\.)?weight", name))
    assert len(ours) == len(theirs) == 16 * 8 + 21 * 8
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=0)


def test_read_back_it_is_the_trained_model_with_its_settings(micro, tmp_path, capsys):
    model, path = shaken(sd.load(micro), RANK), str(tmp_path / "lora.safetensors")
    trained = {"frames": 9, "width": 16, "height": 24, "fps": 4.0, "fps_trained": (4.0,), "guidance": 2.0, "eta": 0.5}
    model.settings = replace(model.settings, **trained, layout="pooled", origin={"cat": 1})
    save_lora(model, path)
    merged = sd.load(micro, lora=[(path, 1.0)])
    assert f"{path} was trained with layout 'pooled', not 'grid'" in capsys.readouterr().err
    assert {name: getattr(merged.settings, name) for name in trained} == trained
    assert merged.settings.layout == "grid" and "cat" not in merged.settings.origin
    x, t, context = inputs(16, 16, 32)
    with torch.no_grad():
        assert error(merged.unet(x, t, context), model.unet(x, t, context)) < 1e-5


@pytest.mark.parametrize("etc, says", [("{", "are damaged"), (None, "frames must be a whole number")])
def test_settings_that_are_damaged_change_nothing(micro, tmp_path, etc, says):
    model, path = sd.load(micro), str(tmp_path / "lora.safetensors")
    save_lora(shaken(sd.load(micro), RANK), path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    header["etc"] = etc or json.dumps(json.loads(header["etc"]) | {"frames": "x"})
    save_file(load_file(path), path, header)
    with pytest.raises(ValueError, match=says) as refusal:
        merge_lora(model, path)
    assert path in str(refusal.value)
    assert all(torch.equal(a, b) for a, b in zip(model.unet.state_dict().values(),
                                                  sd.load(micro).unet.state_dict().values()))
