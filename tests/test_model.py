"""The networks compute what the reference implementations compute: diffusers, transformers, open_clip.

The references are SD 1- and SD 2-shaped at reduced width, with random weights in every layer; ours get the same weights
through a diffusers folder. Errors are relative to the largest value of the reference.
"""

import functools
import gzip
import os
from dataclasses import replace

import pytest
import torch

from embed import mixed_embedding
from model import SD15, SD21, AttentionByParts, TextConfig, TextEncoder, UNet, attention, split_heads
from sd.checkpoint import load

FAMILIES = ("SD 1", "SD 2")


@functools.cache
def reference(family: str):
    """(UNet, VAE, text tower, scheduler) of diffusers and transformers."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sd1 = family == "SD 1"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128, 128, 128), cross_attention_dim=64, sample_size=96,
        attention_head_dim=8 if sd1 else [1, 2, 2, 2], use_linear_projection=not sd1)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, scaling_factor=0.2)
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1, projection_dim=64,
        hidden_act="quick_gelu" if sd1 else "gelu"))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type="epsilon" if sd1 else "v_prediction")
    for network in (unet, vae, text):
        shake(network)
    return unet, vae, text, scheduler


def shake(network):
    """Random biases and norms too, and nothing left at zero that could hide a mistake."""
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return network.eval()


def save_reference(family: str, folder, **options) -> str:
    for name, part in zip(("unet", "vae", "text_encoder", "scheduler"), reference(family)):
        part.save_pretrained(os.path.join(folder, name), **options)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(the references, our model with the same weights)."""
    folder = save_reference(request.param, tmp_path_factory.mktemp("reference"))
    return reference(request.param), load(folder)


def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def inputs(h=16, w=16, context=64, batch=2):
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(batch, 4, h, w, generator=g), torch.randn(batch, 77, context, generator=g)
    return x, torch.tensor([999, 7])[:batch], text


# ---------------------------------------------------------------------------------------------------------------------
# UNet


@pytest.mark.parametrize("h, w", [(16, 16), (8, 40), (24, 56)])
def test_unet_is_diffusers(pair, h, w):
    (theirs, *_), ours = pair
    x, t, context = inputs(h, w)
    with torch.no_grad():
        expected = theirs(x, t, context).sample
        assert expected.std() > 0.1
        assert error(ours.unet(x, t, context), expected) < 1e-4
        assert error(ours.unet(x, t, ours.unet.encode_context(context)), expected) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_unet_gradients_are_those_of_diffusers(pair, checkpointing):
    (theirs, *_), ours = pair
    x, t, context = inputs()

    def gradients(forward):
        a, b = x.clone().requires_grad_(), context.clone().requires_grad_()
        return torch.autograd.grad(forward(a, t, b).square().sum(), (a, b))

    ours.unet.checkpointing = checkpointing
    expected = gradients(lambda *args: theirs(*args).sample)
    for mine, other in zip(gradients(ours.unet), expected):
        assert error(mine, other) < 1e-4
    ours.unet.checkpointing = False


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_unet_parameter_counts():
    with torch.device("meta"):
        sd21, sd15 = UNet(SD21.unet), UNet(SD15.unet)
    extra = parameters(sd21.time_proj) + parameters(sd21.fps_proj)
    assert (parameters(sd21) - extra, extra) == (865_910_724, 78_666_240)
    assert parameters(sd15) - parameters(sd15.time_proj) - parameters(sd15.fps_proj) == 859_520_964


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_fps_branch_changes_nothing_to_the_bit(pair, dtype):
    """4.2: the last layers start at zero, so a fresh ETC model with the mixed embedding off is Stable Diffusion."""
    weights = pair[1].unet.state_dict()
    x, t, context = inputs()
    fps = torch.tensor([4.0, 30.0])
    unets = {}
    for mixed in (False, True):
        unets[mixed] = UNet(replace(pair[1].unet.cfg, mixed_embedding=mixed)).eval()
        unets[mixed].load_state_dict(weights)
        unets[mixed].to(dtype)
    with torch.no_grad():
        plain = unets[False](x, t, context.to(dtype))
        assert torch.equal(unets[False](x, t, context.to(dtype), fps, (2, 2)), plain)
        assert not torch.equal(unets[True](x, t, context.to(dtype), fps, (2, 2)), plain)
        torch.nn.init.ones_(unets[False].fps_proj[-1].bias)
        assert not torch.equal(unets[False](x, t, context.to(dtype), fps, (2, 2)), plain)


def test_the_mixed_embedding_is_that_of_the_grid_asked_for(pair):
    """It is kept from call to call: after any other grid and size it must be the right one again."""
    unet, kept = UNet(replace(pair[1].unet.cfg, mixed_embedding=True)).eval(), []
    plain = UNet(replace(unet.cfg, mixed_embedding=False)).eval()
    plain.load_state_dict(unet.state_dict())
    torch.nn.init.normal_(unet.out[2].weight, generator=torch.Generator().manual_seed(0))
    plain.out[2].weight = unet.out[2].weight
    for sides, (rows, cols) in (((16, 16), (2, 2)), ((16, 16), (1, 4)), ((16, 32), (2, 2)), ((16, 16), (2, 2))):
        x, t, context = inputs(*sides)
        position = mixed_embedding(rows, cols, sides[0] // rows, sides[1] // cols, 4)
        with torch.no_grad():
            kept.append(unet(x, t, context, None, (rows, cols)))
            assert torch.equal(kept[-1], plain(x + position, t, context))
    assert torch.equal(kept[0], kept[3]) and not torch.equal(kept[0], kept[1])


def test_latent_sides_that_cannot_be_halved_are_refused(pair):
    x, t, context = inputs(12, 16)
    with pytest.raises(ValueError, match="divisible by 8, not 12 x 16"):
        pair[1].unet(x, t, context)


# Half precision. SD 2.1 is known to overflow fp16 when q.k is scaled by 1/sqrt(d) only after the product. Here, on a
# CPU and at reduced size, queries and keys are blown up until late scaling would overflow, and it is checked that it
# would. The size of the grid, 128x128 latents, takes four minutes on a CPU: run it with -m slow.


@pytest.mark.parametrize("dtype, expected_error", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_full(pair, dtype, expected_error):
    unet = pair[1].unet
    x, t, context = inputs()
    half = UNet(unet.cfg).eval()
    half.load_state_dict(unet.state_dict())
    half.to(dtype)
    with torch.no_grad():
        exact, rounded = unet(x, t, context), half(x, t, context.to(dtype)).float()
    assert error(rounded, exact) < expected_error
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)


@pytest.mark.parametrize("gradients", [False, True])
def test_long_attention_in_bfloat16_is_softmax(gradients):
    """By parts, the last of them short, on the strides that split heads have; beside float64."""
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = (split_heads(torch.randn(2, 1100, 3 * 32, generator=g).bfloat16(), 3) for _ in range(4))

    def results(attention, *inputs):
        """What it gives, and the gradients of a weighted sum of that."""
        inputs = [x.detach().requires_grad_(gradients) for x in inputs]
        out = attention(*inputs)
        return [out, *(torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs) if gradients else [])]

    ours = results(attention, q, k, v)
    assert torch.equal(ours[0], AttentionByParts.apply(q, k, v)) and ours[0].stride() == q.stride()
    fused = results(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    exact = results(lambda q, k, v: (q @ k.mT / 32**0.5).softmax(-1) @ v, q.double(), k.double(), v.double())
    for a, b, e in zip(ours, fused, exact, strict=True):
        assert (a - e).norm() / e.norm() < 0.007
        assert (a - e).norm() < 3 * (b - e).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side, gradients", [
    (16, False), (16, True), pytest.param(128, False, marks=pytest.mark.slow)])
def test_no_overflow_where_late_scaling_would(pair, dtype, side, gradients):
    unet = UNet(pair[1].unet.cfg).eval()
    unet.load_state_dict(pair[1].unet.state_dict())
    largest = []

    def measure(attention, args):
        x, (k, _) = args
        q = attention.to_q(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        q = q[:, :, :: max(1, q.shape[2] // 256)]  # some of the queries will do
        largest.append((q.float() @ k.float().mT).abs().max().item())

    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.to_q.weight.data *= 80
            module.to_k.weight.data *= 80
            module.register_forward_pre_hook(measure)
    unet.to(dtype)
    x, t, context = inputs(side, side, batch=1)
    with torch.set_grad_enabled(gradients):
        out = unet(10 * x, t, context.to(dtype))
    assert max(largest) > torch.finfo(torch.float16).max, "the test does not test"
    assert out.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# VAE


@pytest.mark.parametrize("h, w", [(32, 32), (24, 52)])
def test_vae_is_diffusers(pair, h, w):
    (_, theirs, *_), ours = pair
    g = torch.Generator().manual_seed(2)
    images, latents = torch.randn(2, 3, h, w, generator=g), torch.randn(2, 4, h // 4, w // 4, generator=g)
    with torch.no_grad():
        mean, logvar = ours.vae.encode(images)
        expected = theirs.encode(images).latent_dist
        assert error(mean, expected.mean) < 1e-4 and error(logvar, expected.logvar) < 1e-4
        assert expected.mean.std() > 0.1 and expected.logvar.std() > 0.1
        assert error(ours.vae.decode(latents), theirs.decode(latents).sample) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Text

NASTY = [
    "", " ", "a red circle moving right", "A  Red\tCIRCLE\n moving right ", "café naïve Ångström", "cafe\u0301",
    "😀👨\u200d👩\u200d👧 🇩🇪", "猫が走る عربي привет", "ｆｕｌｌ ＷＩＤＴＨ", "tom &amp; jerry &lt;3 &amp;amp; co",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2026 \u2014", "don't we'll it's I'D", "3.14159 x 2,000 = 10%",
    "!!!???...,,,;;;", "_under_score_ #hash @at $100 €5", "supercalifragilisticexpialidocious" * 3,
    "word " * 200, "a, b; " * 60, "\u0130stanbul ß \ufb01 \u2126",
]


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    """pad token -> transformers' tokenizer with CLIP's vocabulary, built of open_clip's file: no download."""
    import open_clip
    from transformers import CLIPTokenizer

    path = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]
    vocab = [chr(c) for c in letters] + [chr(c) + "</w>" for c in letters] + ["".join(m) for m in merges]
    vocab = {token: i for i, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    return lambda pad: CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad)


@pytest.mark.parametrize("pad_id, pad", [(49407, "<|endoftext|>"), (0, "!")])
def test_tokens_are_those_of_transformers(clip_tokenizer, pad_id, pad):
    from open_clip.tokenizer import get_clean_fn

    clean = [get_clean_fn("lower")(text) for text in NASTY]  # transformers cleans less
    expected = clip_tokenizer(pad)(clean, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.device("meta"):
        text = TextEncoder(TextConfig(width=64, layers=1, heads=1, pad_id=pad_id))
    ids, cut = text.tokenize(NASTY)
    for prompt, ours, theirs in zip(NASTY, ids.tolist(), expected.input_ids.tolist()):
        # padding with "!" makes every "!" of a prompt a special token too, in transformers: not in the original SD 2
        assert pad in prompt or ours == theirs, prompt
    assert [bool(c) for c in cut] == [len(text) > 150 for text in NASTY]


def test_text_tower_is_transformers(pair):
    (_, _, theirs, _), ours = pair
    tokens, _ = ours.text.tokenize(NASTY[:8])
    with torch.no_grad():
        assert error(ours.text(tokens), theirs(tokens).last_hidden_state) < 1e-4


def test_penultimate_layer_is_transformers_and_open_clip():
    """SD 2 reads the layer before the last, then the final norm: in transformers, and in open_clip's whole CLIP."""
    from open_clip.model import CLIP
    from transformers import CLIPTextConfig, CLIPTextModel

    from sd.checkpoint import text_parameters

    torch.manual_seed(0)
    clip = shake(CLIP(128, {"layers": 1, "width": 64, "head_width": 64, "image_size": 32, "patch_size": 16},
                      {"width": 128, "heads": 2, "layers": 4}))
    ours = TextEncoder(TextConfig(width=128, heads=2, layers=4, projection=128)).eval()
    weights = {k: v for k, v in clip.state_dict().items() if not k.startswith(("visual.", "logit_"))}
    ours.model.load_state_dict(weights)
    theirs = CLIPTextModel(CLIPTextConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                                          num_attention_heads=2, projection_dim=128, hidden_act="gelu")).eval()
    state = ours.state_dict()
    theirs.load_state_dict({name: piece for our, names in text_parameters(4, "").items() if our in state
                            for name, piece in zip(names, state[our].chunk(len(names)))})
    seen = {}
    clip.transformer.resblocks[-2].register_forward_hook(lambda m, args, out: seen.update(x=out))
    tokens, _ = ours.tokenize(NASTY[:8])
    with torch.no_grad():
        context = ours(tokens)
        clip.encode_text(tokens)
        assert error(context, clip.ln_final(seen["x"])) < 1e-4
        hidden = theirs(tokens, output_hidden_states=True)
        assert error(context, theirs.final_layer_norm(hidden.hidden_states[-2])) < 1e-4
        assert error(context, hidden.last_hidden_state) > 1e-2, "the last layer must make a difference"
