"""Text tower: open_clip's own, without the image tower."""

from dataclasses import dataclass

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


class TextEncoder(nn.Module):
    """Prompts -> context. `model` carries open_clip's names, which SD 2's files have under cond_stage_model.model."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        with torch.device("cpu"):  # what it imports computes, up to torch 2.8, and must not do so on "meta"
            from open_clip.transformer import QuickGELU, TextTransformer  # seconds to import, and only needed here

        self.cfg = cfg
        self.model = TextTransformer(
            cfg.length, cfg.vocab, cfg.width, cfg.heads, cfg.layers, output_dim=cfg.projection or None,
            act_layer=QuickGELU if cfg.quick_gelu else nn.GELU)
        # open_clip starts tokens at 0.02, far below what a block adds: a tower that learns from a denoiser then forgets
        # the words of motion before the denoiser has a use for them, and never gets them back
        nn.init.normal_(self.model.token_embedding.weight)
        nn.init.normal_(self.model.positional_embedding, std=0.1)

    def unused(self) -> list[nn.Module | nn.Parameter]:
        """What the context does not depend on, and training must leave alone."""
        last = self.cfg.layers - self.cfg.skip_last
        projection = self.model.text_projection
        return [*self.model.transformer.resblocks[last:], *([] if projection is None else [projection])]

    def tokenize(self, prompts: list[str]):
        """Token ids (B, length), and for each prompt the text that did not fit ("" when all did)."""
        from open_clip.tokenizer import _tokenizer as bpe

        ids = torch.full((len(prompts), self.cfg.length), self.cfg.pad_id, dtype=torch.long)
        cut = []
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
        mask = m.attn_mask.to(x)
        for block in m.transformer.resblocks[: self.cfg.layers - self.cfg.skip_last]:
            x = block(x, attn_mask=mask)
        return m.ln_final(x)

    @torch.no_grad()
    def encode(self, prompts: list[str]):
        """Prompts -> context (B, length, width), where the tower is."""
        return self(self.tokenize(prompts)[0].to(self.model.positional_embedding.device))
