"""Tokens and text tower are those of transformers and open_clip."""

import gzip
import os
import subprocess
import sys

import pytest
import torch
from references import error, shake
from runs import ROOT

from sd.text import TextConfig, TextEncoder

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


def test_a_model_needs_none_of_what_open_clip_brings():
    """Nor torch's compiler, which drawing weights on "meta" would bring: seconds of imports."""
    code = ("import sys, sample, sd; sd.load(sample.SHIPPED).text.encode(['a red circle']); "
            "print(*{'open_clip', 'torchvision', 'transformers', 'torch._dynamo'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "\n" and not done.returncode, done.stderr


@pytest.mark.parametrize("quick, projection", [(False, 128), (True, 0)])
def test_the_tower_is_open_clips_to_the_bit(quick, projection):
    from open_clip.transformer import QuickGELU, TextTransformer

    cfg = TextConfig(width=64, heads=2, layers=3, skip_last=0, quick_gelu=quick, projection=projection)
    theirs = shake(TextTransformer(77, 49408, 64, 2, 3, output_dim=projection or None, pool_type="none",
                                   act_layer=QuickGELU if quick else torch.nn.GELU)).eval()
    ours = TextEncoder(cfg).eval()
    ours.model.load_state_dict(theirs.state_dict())
    theirs.text_projection = None
    tokens, _ = ours.tokenize(NASTY)
    with torch.no_grad():
        assert torch.equal(ours(tokens), theirs(tokens))


def test_a_fresh_tower_is_spread_as_open_clips_but_for_its_tokens():
    from open_clip.transformer import TextTransformer

    ours = TextEncoder(TextConfig(width=128, heads=2, layers=4, projection=96)).model.state_dict()
    for name, theirs in TextTransformer(77, 49408, 128, 2, 4, output_dim=96).state_dict().items():
        expected = {"token_embedding.weight": 1, "positional_embedding": 0.1}.get(name, theirs.std())
        assert ours[name].std() == pytest.approx(float(expected), rel=4 * theirs.numel() ** -0.5), name


def test_text_tower_is_transformers(pair):
    (_, _, theirs, _), ours = pair
    tokens, _ = ours.text.tokenize(NASTY[:8])
    with torch.no_grad():
        assert error(ours.text(tokens), theirs(tokens).last_hidden_state) < 1e-4


def test_penultimate_layer_is_transformers_and_open_clip():
    """SD 2 reads the layer before the last, then the final norm: in transformers, and in open_clip's whole CLIP."""
    from open_clip.model import CLIP
    from transformers import CLIPTextConfig, CLIPTextModel

    from sd.names import text_parameters

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
