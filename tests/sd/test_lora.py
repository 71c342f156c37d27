"""A LoRA merged at load is the one that diffusers merges, whatever its names; what cannot be merged is refused."""

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import example, given, settings, strategies
from references import FAMILIES, error, inputs, reference, save_reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd
from sd.lora import merge_lora
from sd.presets import MICRO

ATTENTION = [f"{place}.attentions.0.transformer_blocks.0.{attn}.{layer}"
             for place in ("down_blocks.0", "mid_block", "up_blocks.2") for attn in ("attn1", "attn2")
             for layer in ("to_q", "to_k", "to_v", "to_out.0")]
OTHERS = ["conv_in", "time_embedding.linear_1", "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0.conv1",
          "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.1.resnets.1.time_emb_proj",
          "up_blocks.0.upsamplers.0.conv", "up_blocks.3.attentions.2.proj_in", "mid_block.attentions.0.proj_out",
          "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
          "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2"]
TEXT = [f"encoder.layers.{i}.self_attn.{layer}_proj" for i in (0, 2) for layer in ("q", "k", "v", "out")]
TEXT_TOO = ["encoder.layers.1.mlp.fc1", "encoder.layers.1.mlp.fc2"]
OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def low_rank(layer, weight, rank):
    """(down, up) for a weight, as convolutions where it is one."""
    g = torch.Generator().manual_seed(sum(map(ord, layer)))
    kernel = weight.shape[2:]
    down = torch.randn(rank, *weight.shape[1:], generator=g) / weight[0].numel() ** 0.5
    return down, torch.randn(len(weight), rank, *[1] * len(kernel), generator=g) * 0.1


def spelled(naming, part, layer, down, up, alpha):
    """The tensors of one layer of a LoRA, as files of a kind name them."""
    if naming == "kohya":
        name = ("lora_unet_" if part == "unet" else "lora_te_text_model_") + layer.replace(".", "_")
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    home = {"unet": "unet.", "text": "text_encoder."}[part]
    if naming == "peft":
        return {f"{home}{layer}.lora_A.weight": down, f"{home}{layer}.lora_B.weight": up}
    if naming == "diffusers":
        name = f"{home}text_model.{layer}.lora_linear_layer" if part == "text" else f"{home}{layer}.lora"
    else:  # of 2023
        block, _, last = layer.removesuffix(".0").rpartition(".")
        unet, text = f"unet.{block}.processor.{last}_lora", f"text_encoder.text_model.{block}.{OLD.get(last)}_lora"
        name = unet if part == "unet" else text
    return {f"{name}.down.weight": down, f"{name}.up.weight": up}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each family, and how it loads."""
    folders = {family: save_reference(family, tmp_path_factory.mktemp("base")) for family in FAMILIES}
    return {family: (folder, sd.load(folder)) for family, folder in folders.items()}


@pytest.mark.parametrize("naming, family", [
    ("kohya", "SD 1"), ("kohya", "SD 2"), ("peft", "SD 2"), ("diffusers", "SD 1"), ("diffusers of 2023", "SD 1")])
def test_merged_as_diffusers_merges(naming, family, bases, tmp_path, monkeypatch):
    # the newest transformers asks for a newer peft than there is
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0", raising=False)
    (unet, vae, text, scheduler), ours = reference(family), copy.deepcopy(bases[family][1])
    unet, text, every = copy.deepcopy(unet), copy.deepcopy(text), naming in ("kohya", "peft")
    layers = [("unet", unet, name) for name in ATTENTION + OTHERS * every]
    layers += [("text", text, name) for name in TEXT + TEXT_TOO * every]
    tensors, ranks, told = {}, {"unet": {}, "text": {}}, {}
    for i, (part, network, layer) in enumerate(layers):
        ranks[part][layer] = 1 + i % 3 if naming == "peft" else 4  # diffusers keeps an alpha only if it is that of most
        pair = low_rank(layer, network.get_submodule(layer).weight, ranks[part][layer])
        tensors |= spelled(naming, part, layer, *pair, {"unet": 3.0, "text": 5.0}[part])
    if naming == "peft":
        for part, whole in (("unet", "unet"), ("text", "text_encoder")):
            told |= {f"{whole}.lora_alpha": 3, f"{whole}.r": 2, f"{whole}.rank_pattern": ranks[part],
                     f"{whole}.target_modules": list(ranks[part]), f"{whole}.use_rslora": part == "unet",
                     f"{whole}.alpha_pattern": {layer: 7 for layer in list(ranks[part])[::4]}}
    path = str(tmp_path / "lora.safetensors")
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(told)} if told else None)

    pipe = StableDiffusionPipeline(vae, text, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    merge_lora(ours, path, 0.7)
    x, t, context = inputs(8, 8)
    tokens = torch.arange(77)[None] * 600
    with torch.no_grad():
        theirs, before = pipe.unet(x, t, context).sample, bases[family][1].unet(x, t, context)
        assert error(ours.unet(x, t, context), theirs) < 1e-5 < 1e-2 < error(before, theirs)
        theirs, before = pipe.text_encoder(tokens).last_hidden_state, bases[family][1].text(tokens)
        assert error(ours.text(tokens), theirs) < 1e-5 < 1e-2 < error(before, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Against the dense formula

IN_PROJ = "model.transformer.resblocks.0.attn.in_proj_weight"
LAYERS = {  # a name in a file: part, parameter, which third of it
    "unet.down_blocks.0.resnets.0.conv1": ("unet", "input_blocks.1.0.in_layers.2.weight", None),
    "lora_unet_input_blocks_1_0_in_layers_2": ("unet", "input_blocks.1.0.in_layers.2.weight", None),
    "lora_unet_down_blocks_0_downsamplers_0_conv": ("unet", "input_blocks.2.0.op.weight", None),
    "lora_unet_input_blocks_2_0_op": ("unet", "input_blocks.2.0.op.weight", None),
    "lora_unet_output_blocks_1_2_conv": ("unet", "output_blocks.1.2.conv.weight", None),
    "lora_unet_up_blocks_1_resnets_1_conv_shortcut": ("unet", "output_blocks.3.0.skip_connection.weight", None),
    "lora_unet_out_2": ("unet", "out.2.weight", None),
    "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0":
        ("unet", "middle_block.1.transformer_blocks.0.attn2.to_out.0.weight", None),
    "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora":
        ("unet", "middle_block.1.transformer_blocks.0.attn2.to_k.weight", None),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": ("text", IN_PROJ, 0),
    "text_encoder.encoder.layers.0.self_attn.v_proj": ("text", IN_PROJ, 2),
    "lora_te_text_model_encoder_layers_0_mlp_fc2": ("text", "model.transformer.resblocks.0.mlp.c_proj.weight", None),
    # Motion LoRA, as AnimateDiff names it and as diffusers does
    "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.processor.to_out_lora":
        ("unet", "layout.motion.0.transformer_blocks.0.attention_blocks.1.to_out.0.weight", None),
    "unet.up_blocks.1.motion_modules.1.transformer_blocks.0.attn1.to_q":
        ("unet", "layout.motion.6.transformer_blocks.0.attention_blocks.0.to_q.weight", None),
}


@functools.cache
def small():
    """A model with every kind of layer that there is, random weights in each."""
    torch.manual_seed(0)
    config = replace(MICRO, unet=replace(MICRO.unet, linear_projection=False))
    model = sd.build(config, sd.Settings(layout="temporal"))
    for part in model.parts().values():
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return model


RANK_ALPHA_LINEAR = strategies.tuples(
    strategies.integers(1, 5), strategies.none() | strategies.floats(-8, 8, width=32), strategies.booleans())


@given(chosen=strategies.dictionaries(strategies.sampled_from(sorted(LAYERS)), RANK_ALPHA_LINEAR, min_size=1),
       scale=strategies.floats(-2, 2, width=32))
@example(chosen={name: (2, 3.0, False) for name in LAYERS if not name.startswith("lora_unet_input")}, scale=0.5)
@settings(max_examples=20, deadline=None)
def test_any_lora_adds_scale_alpha_over_rank_up_down(chosen, scale, tmp_path_factory):
    large = [small().vae, small().text.model.token_embedding]  # the rest is copied
    model = copy.deepcopy(small(), {id(module): module for module in large})
    path, parts = str(tmp_path_factory.getbasetemp() / "any.safetensors"), {"unet": model.unet, "text": model.text}
    expected = {part: {name: p.detach().double() for name, p in network.named_parameters() if len(p) < 10_000}
                for part, network in parts.items()}
    tensors = {}
    for name, (rank, alpha, as_linear) in chosen.items():
        part, parameter, third = LAYERS[name]
        weight = expected[part][parameter]
        weight = weight if third is None else weight.chunk(3)[third]
        down, up = low_rank(name, weight, rank)
        change = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double()).view_as(weight)
        weight += scale * (1 if alpha is None else alpha / rank) * change
        if as_linear:
            down, up = down.flatten(1), up.flatten(1)
        kohya, old = name.startswith("lora_"), name.endswith("_lora")
        ends = ("lora_down", "lora_up") if kohya else ("down", "up") if old else ("lora_A", "lora_B")
        tensors |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        if alpha is not None:
            tensors[f"{name.removesuffix('_lora')}.alpha"] = torch.tensor(alpha)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    if len({LAYERS[name] for name in chosen}) < len(chosen):  # a layer under two names
        with pytest.raises(ValueError, match="twice"):
            merge_lora(model, path, scale)
        return
    merge_lora(model, path, scale)
    for part, network in parts.items():
        found = torch.cat([network.get_parameter(name).detach().flatten() for name in expected[part]])
        wanted = torch.cat([tensor.flatten() for tensor in expected[part].values()])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert model.settings.origin["lora"] == [{"from": "any.safetensors", "scale": scale}]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

GOOD = "lora_unet_down_blocks_0_downsamplers_0_conv"


@pytest.mark.parametrize("tensors, says", [
    ({f"{GOOD}.lora_down.weight": (4, 16, 3, 3), f"{GOOD}.dora_scale": (16, 1)},
     "is a DoRA, and only LoRA can be merged"),
    ({f"{GOOD}.hada_w1_a": (16, 4)}, "is a LoHa"),
    ({f"{GOOD}.lokr_w1": (4, 4)}, "is a LoKr"),
    ({f"{GOOD}.lora_down.weight": (4, 16, 3, 3)}, "stands alone"),
    ({f"{GOOD}.lora_down.weight": (4, 32, 3, 3), f"{GOOD}.lora_up.weight": (16, 4, 1, 1)}, "another Stable Diffusion"),
    ({f"{GOOD}.lora_down.weight": (0, 16, 3, 3), f"{GOOD}.lora_up.weight": (16, 0, 1, 1)}, "another Stable Diffusion"),
    ({f"{GOOD}.lora_down.weight": (4, 16, 3, 3), f"{GOOD}.lora_up.weight": (16, 4), f"{GOOD}.alpha": (0,)},
     "alpha must be a finite number, got nan"),
    ({f"{GOOD}.lora_down.weight": (), f"{GOOD}.lora_up.weight": (16,)}, "another Stable Diffusion"),
    ({"lora_unet_down_blocks_9_conv.lora_down.weight": (4, 16), "lora_te2_text.lora_down.weight": (1, 1)},
     "changes what the model does not have: lora_te2_text.lora_down.weight, lora_unet_down_blocks_9_conv.lora_down"),
    ({f"down_blocks.{i}.motion_modules.9.to_q_lora.down.weight": (4, 16) for i in range(5)},
     "and 2 more; a Motion LoRA needs motion modules"),
    ({f"{GOOD}.lora_down.weight": (4, 16, 3, 3), f"{GOOD}.lora_up.weight": (16, 4, 1, 1), f"{GOOD}.alpha": (1, 1)},
     "lora_up.weight holds NaN or infinity"),
    ({"cat.weight": (1,)}, "changes what the model does not have: cat.weight"),
])
def test_what_is_no_lora_of_this_model_is_named(tensors, says, tmp_path):
    path = str(tmp_path / "lora.safetensors")
    save_file({name: torch.full(shape, torch.nan if "NaN" in says and "up" in name else 1.0)
               for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError) as refusal:
        merge_lora(copy.deepcopy(small()), path)
    assert says in str(refusal.value) and path in str(refusal.value)


@pytest.mark.parametrize("alpha, says", [
    ("NaN", "lora_alpha in its header must be a finite number, got nan"),
    ("9" * 400, "its header (lora_adapter_metadata) is damaged: int too large to convert to float"),
])
def test_an_alpha_of_the_header_that_is_no_number_is_told(alpha, says, tmp_path):
    path = str(tmp_path / "lora.safetensors")
    save_file({f"{GOOD}.lora_down.weight": torch.ones(4, 16, 3, 3), f"{GOOD}.lora_up.weight": torch.ones(16, 4, 1, 1)},
              path, {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'})
    with pytest.raises(ValueError) as refusal:
        merge_lora(copy.deepcopy(small()), path)
    assert says in str(refusal.value) and path in str(refusal.value)


def test_a_lora_that_does_not_fit_in_one_layer_changes_none(tmp_path):
    path, model = str(tmp_path / "lora.safetensors"), copy.deepcopy(small())
    names = [f"lora_unet_{layer}" for layer in ("conv_in", "conv_out", "down_blocks_0_downsamplers_0_conv")]
    for bad in range(len(names)):
        tensors = {}
        for i, (name, shape) in enumerate(zip(names, ((16, 4, 3, 3), (4, 16, 3, 3), (16, 16, 3, 3)))):
            tensors |= {f"{name}.lora_up.weight": torch.ones(shape[0], 2),
                        f"{name}.lora_down.weight": torch.ones(2, shape[1] + (i == bad), 3, 3)}
        save_file(tensors, path)
        with pytest.raises(ValueError, match="another Stable Diffusion"):
            merge_lora(model, path)
        for (name, now), before in zip(model.unet.state_dict().items(), small().unet.state_dict().values()):
            assert torch.equal(now, before), name


def test_loaded_with_a_lora_and_saved_it_stays(tmp_path):
    base, lora, out = (str(tmp_path / name) for name in ("base.safetensors", "lora.safetensors", "out.safetensors"))
    sd.save(small(), base)
    weight = small().unet.input_blocks[2][0].op.weight
    down, up = low_rank("a", weight, 4)
    save_file({f"{GOOD}.lora_down.weight": down, f"{GOOD}.lora_up.weight": up}, lora)
    model, before = sd.load(base, dtype=torch.float16, lora=[(lora, 0.5), (lora, 0.25)]), load_file(base)
    sd.save(model, out)
    assert all(torch.equal(t, before[name]) for name, t in load_file(base).items()), "the file is left alone"
    again = sd.load(out, dtype=torch.float16)
    expected = weight + 0.75 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    torch.testing.assert_close(again.unet.input_blocks[2][0].op.weight, expected.half(), rtol=2e-3, atol=1e-4)
    assert [entry["scale"] for entry in again.settings.origin["lora"]] == [0.5, 0.25]


def test_a_lora_that_is_not_there_is_told_before_the_model_is_made(tmp_path):
    base, missing = str(tmp_path / "base.safetensors"), str(tmp_path / "missing.safetensors")
    sd.save(small(), base)
    tensors = load_file(base)
    tensors.popitem()
    with safe_open(base, "pt") as file:
        save_file(tensors, base, file.metadata())
    with pytest.raises(ValueError, match="missing.safetensors cannot be read"):
        sd.load(base, lora=[(missing, 1.0)])
    with pytest.raises(ValueError, match="lacks"):
        sd.load(base)
