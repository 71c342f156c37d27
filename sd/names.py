"""The names of tensors: ours, the original files', diffusers', transformers'.

Inside our networks parameters are called as in the original files, except for one part: the text tower of SD 1, which
stands in those files under transformers' names. diffusers renamed everything.
"""

PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.model."}
SD1_TEXT = "cond_stage_model.transformer.text_model."
EXTRA = ("time_proj.", "fps_proj.", "layout.")  # the UNet's tensors that Stable Diffusion does not have


def file_name(part: str, name: str) -> str:
    """The name in the original layout of a parameter `name` of `part` ("unet", "vae" or "text")."""
    if part == "unet" and name.startswith(EXTRA):
        return "etc." + name
    return PREFIX[part] + (name.removeprefix("model.") if part == "text" else name)


# Layers as (theirs, ours). Not every block has all of them: a shortcut needs a layer only when the width changes.
RES_BLOCK = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
             ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"))
TRANSFORMER = tuple((name, name) for name in ("norm", "proj_in", "proj_out")) + tuple(
    (f"transformer_blocks.0.{name}", f"transformer_blocks.0.{name}") for name in (
        "norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "norm3", "ff.net.0.proj", "ff.net.2"))
VAE_BLOCK = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"),
             ("conv_shortcut", "nin_shortcut"))
VAE_ATTENTION = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
VAE_ATTENTION_2022 = (("group_norm", "norm"), ("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out"))
TEXT_LAYER = (("layer_norm1", "ln_1"), ("self_attn.out_proj", "attn.out_proj"),
              ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))


def block(theirs: str, ours: str, layers):
    """The layers of a block that they call `theirs` and we `ours`."""
    return ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in layers)


def unet_layers(levels: int, blocks: int):
    """(diffusers, ours) for a UNet of so many levels with so many residual blocks each."""
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    yield from block("mid_block.resnets.0", "middle_block.0", RES_BLOCK)
    yield from block("mid_block.attentions.0", "middle_block.1", TRANSFORMER)
    yield from block("mid_block.resnets.1", "middle_block.2", RES_BLOCK)
    for level in range(levels):  # of the encoder from the finest, of the decoder from the coarsest
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        i, o = 1 + level * (blocks + 1), level * (blocks + 1)  # the level's first block in our count
        for j in range(blocks):
            yield from block(f"{down}.resnets.{j}", f"input_blocks.{i + j}.0", RES_BLOCK)
            yield from block(f"{down}.attentions.{j}", f"input_blocks.{i + j}.1", TRANSFORMER)
        yield f"{down}.downsamplers.0.conv", f"input_blocks.{i + blocks}.0.op"
        for j in range(blocks + 1):
            yield from block(f"{up}.resnets.{j}", f"output_blocks.{o + j}.0", RES_BLOCK)
            yield from block(f"{up}.attentions.{j}", f"output_blocks.{o + j}.1", TRANSFORMER)
        for last in (1, 2):  # after the residual block, or after the attention where there is one
            yield f"{up}.upsamplers.0.conv", f"output_blocks.{o + blocks}.{last}.conv"


def vae_layers(levels: int, blocks: int, attention):
    """(diffusers, ours) for a VAE of so many levels with so many residual blocks each (the decoder has one more)."""
    yield from (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))
    for net in ("encoder", "decoder"):
        yield from block(net, net, (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")))
        yield from block(f"{net}.mid_block.resnets.0", f"{net}.mid.block_1", VAE_BLOCK)
        yield from block(f"{net}.mid_block.attentions.0", f"{net}.mid.attn_1", attention)
        yield from block(f"{net}.mid_block.resnets.1", f"{net}.mid.block_2", VAE_BLOCK)
    for level in range(levels):  # we count both from the finest, they the decoder's from the coarsest
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for j in range(blocks):
            yield from block(f"{down}.resnets.{j}", f"encoder.down.{level}.block.{j}", VAE_BLOCK)
        for j in range(blocks + 1):
            yield from block(f"{up}.resnets.{j}", f"decoder.up.{level}.block.{j}", VAE_BLOCK)
        yield f"{down}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"
        yield f"{up}.upsamplers.0.conv", f"decoder.up.{level}.upsample.conv"


def parameters(layers, theirs: str, ours: str = "") -> dict[str, tuple[str, ...]]:
    """Layers (theirs, ours) -> {our parameter: (their parameter,)}, each name after its prefix."""
    return {f"{ours}{b}.{kind}": (f"{theirs}{a}.{kind}",) for a, b in layers for kind in ("weight", "bias")}


def text_parameters(layers: int, theirs: str) -> dict[str, tuple[str, ...]]:
    """{our parameter: transformers' parameters, after their prefix}. Their q, k and v are one tensor here."""
    names = parameters([("embeddings.token_embedding", "token_embedding"), ("final_layer_norm", "ln_final")],
                       theirs, "model.")
    names["model.positional_embedding"] = (f"{theirs}embeddings.position_embedding.weight",)
    for i in range(layers):
        them, us = f"{theirs}encoder.layers.{i}", f"model.transformer.resblocks.{i}"
        names |= parameters(block(them, us, TEXT_LAYER), "")
        for kind in ("weight", "bias"):
            names[f"{us}.attn.in_proj_{kind}"] = tuple(f"{them}.self_attn.{x}_proj.{kind}" for x in "qkv")
    return names


# What published files hold besides the weights. Any other tensor that no network asks for is an error.
IGNORED = (
    "betas", "*alphas_cumprod*", "posterior_*", "logvar", "lvlb_weights", "scale_factor",  # tables of the schedule
    "denoiser.*", "v_pred", "ztsnr",
    "model_ema.*", "first_stage_model.model_ema.*", "first_stage_model.loss.*", "global_step",  # of training
    "*embeddings.position_ids", "*attn_mask",  # 0, 1, 2...; the causal mask
    "*logit_scale", "*text_projection.weight", "cond_stage_model.transformer.text_projection",  # of CLIP's loss
    "*_model.model.visual.*", "*vision_model.*", "*visual_projection.*",  # its image tower
)
# What changes the words or the weights of a model when a tool adds it, and is left out with a warning.
ADDITIONS = ("lora_*", "bundle_emb.*", "embedding_manager.*")
