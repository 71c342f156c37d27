"""CLIP's text tower, under open_clip's names, and open_clip's tokenizer.

The tower is written here because importing open_clip's takes longer than all that a short video needs: it brings
torchvision and transformers along.
"""

import functools
import os
from collections import OrderedDict
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location

import torch
from torch import nn


@dataclass(frozen=True)
class TextConfig:
    width: int = 1024
    layers: int = 24
    heads: int = 16
    skip_last: int = 1  # layers at the end that are there but not used: SD 2 reads the penultimate one
    quick_gelu: bool = False  # SD 1
    projection: int = 1024  # width of `text_projection`, in SD 2's files though SD never uses it; 0: none
    pad_id: int = 0  # SD 1: 49407
    vocab: int = 49408
    length: int = 77  # tokens, first and last included; what a prompt has beyond is cut


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which CLIP was first trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A transformer's layer, normed before: (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, heads: int, activation):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=activation(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """The layers alone; TextEncoder says which of them count."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        width, activation = cfg.width, QuickGELU if cfg.quick_gelu else nn.GELU
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(cfg.vocab, width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(cfg.length, width))
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(Block(width, cfg.heads, activation) for _ in range(cfg.layers))})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, cfg.projection)) if cfg.projection else None
        if not self.positional_embedding.is_meta:  # where torch, to draw nothing, imports for a second
            self.draw(width, (2 * width * cfg.layers) ** -0.5)

    def draw(self, width: int, end: float):
        """Draw weights as open_clip does, but for tokens and positions.

        It starts tokens at 0.02, far below what a block adds: a tower that learns from a denoiser then forgets the
        words of motion before the denoiser has a use for them, and never gets them back.
        """
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.positional_embedding, std=0.1)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=end)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=end)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)


@functools.cache
def tokenizer():
    """open_clip's byte-pair encoder, without the rest of open_clip."""
    path = os.path.join(find_spec("open_clip").submodule_search_locations[0], "tokenizer.py")
    spec = spec_from_file_location("open_clip_tokenizer", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


class TextEncoder(nn.Module):
    """Prompts -> context. `model` carries open_clip's names, which SD 2's files have under cond_stage_model.model."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg, self.model = cfg, Tower(cfg)

    def unused(self) -> list[nn.Module | nn.Parameter]:
        """What the context does not depend on, and training must leave alone."""
        last = self.cfg.layers - self.cfg.skip_last
        projection = self.model.text_projection
        return [*self.model.transformer.resblocks[last:], *([] if projection is None else [projection])]

    def tokenize(self, prompts: list[str]):
        """Token ids (B, length), and for each prompt the text that did not fit ("" when all did)."""
        bpe, cut = tokenizer(), []
        ids = torch.full((len(prompts), self.cfg.length), self.cfg.pad_id, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            words, room = bpe.encode(prompt), self.cfg.length - 2
            tokens = [bpe.sot_token_id, *words[:room], bpe.eot_token_id]
            row[: len(tokens)] = torch.tensor(tokens)
            cut.append(bpe.decode(words[room:]).strip())
        return ids, cut

    def forward(self, tokens):
        """tokens (B, length) -> context (B, length, width): the chosen layer, then the final norm."""
        m = self.model
        x = m.token_embedding(tokens) + m.positional_embedding
        length = self.cfg.length
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)  # no later token
        for block in m.transformer.resblocks[: self.cfg.layers - self.cfg.skip_last]:
            x = block(x, mask)
        return m.ln_final(x)

    @torch.no_grad()
    def encode(self, prompts: list[str]):
        """Prompts -> context (B, length, width), where the tower is."""
        return self(self.tokenize(prompts)[0].to(self.model.positional_embedding.device))
