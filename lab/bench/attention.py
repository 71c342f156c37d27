"""Attention over a grid: our kernel beside the fused one, the paper's Table 3 and Figure 10.

    python -m lab.bench attention
"""

import functools
import statistics

import numpy as np
import torch
import torch.nn.functional as F

from cli import parse
from lab.bench.timing import Options, ceilings, in_turn, report
from layers.cpu import AttentionByParts
from model import attention

HEADS, HEAD_WIDTH, TOKENS = 5, 64, 1 << 14  # SD 2.1's first level on the 128x128 grid


def main(arguments):
    device, dtype = parse(Options, __doc__, arguments).place()
    with torch.no_grad():
        kernels(device, dtype)
        table_3(device, dtype)
        figure_10(device, dtype)


def query_key_value(batch: int, heads: int, tokens: int, device, dtype):
    g = torch.Generator().manual_seed(0)
    shape = batch, tokens, heads, HEAD_WIDTH
    return [torch.randn(shape, generator=g).to(device, dtype).transpose(1, 2) for _ in range(3)]


def kernels(device, dtype):
    qkv = query_key_value(1, HEADS, TOKENS, device, dtype)
    attends = {"fused kernel": F.scaled_dot_product_attention, "ours": attention}
    works = {name: functools.partial(attend, *qkv) for name, attend in attends.items()}
    works["its products, no softmax"] = functools.partial(products, *qkv)
    flop, ceiling = 4 * HEADS * TOKENS**2 * HEAD_WIDTH, ceilings(device, dtype)["matmul"]
    print(f"{TOKENS} tokens, {HEADS} heads of {HEAD_WIDTH}, {str(dtype)[6:]}")
    report(in_turn(works, device, seconds=30), "fused kernel", dict.fromkeys(works, flop), ceiling)
    exact = F.scaled_dot_product_attention(*(x[:, :1].double() for x in qkv))
    for name in attends:
        error = (works[name]()[:, :1].double() - exact).norm() / exact.norm()
        print(f"  {name:30} {error:.2%} from float64 (root mean square)")
    print("forward and backward")  # five products more, one of them again
    works = {name: functools.partial(both_passes, attend, *qkv) for name, attend in attends.items()}
    report(in_turn(works, device, seconds=60), "fused kernel", dict.fromkeys(works, 3.5 * flop), ceiling)


@torch.enable_grad()
def both_passes(attend, *qkv):
    inputs = [x.detach().requires_grad_() for x in qkv]
    torch.autograd.grad(attend(*inputs), inputs, torch.ones_like(qkv[0]))


def products(q, k, v):
    """The matrix products of AttentionByParts: what is left of it if the softmax costs nothing."""
    for head, rows in AttentionByParts.parts(q, k):
        (q[head][rows] @ k[head].mT) @ v[head]


def table_3(device, dtype):
    """One attention over the whole grid, beside one inside frames and one over time. At 512 pixels a frame has four
    times the tokens of 256; the paper's table says twice."""
    print("Table 3: one head of one layer, ms")
    for name, T, inside in (("base, 16 x 256x256", 16, 1024), ("long, 32 x 256x256", 32, 1024),
                            ("large, 16 x 512x512", 16, 4096), ("both, 32 x 512x512", 32, 4096)):
        shapes = {"grid": (1, 1, T * inside), "frames": (T, 1, inside), "time": (inside, 1, T)}
        inputs = {what: query_key_value(*shape, device, dtype) for what, shape in shapes.items()}
        works = {what: functools.partial(attention, *qkv) for what, qkv in inputs.items()}
        ms = {what: statistics.median(s) * 1e3 for what, s in in_turn(works, device, 5, seconds=10).items()}
        print(f"  {name:22} grid {ms['grid']:9.2f}   frames {ms['frames']:8.2f} + time {ms['time']:7.2f}   "
              f"{ms['grid'] / (ms['frames'] + ms['time']):5.1f}x", flush=True)


def figure_10(device, dtype):
    print(f"Figure 10: {TOKENS} tokens in B groups: time and receptive field, of those of one group")
    groups = [1 << n for n in range(0, 15, 2)]
    works = {B: functools.partial(attention, *query_key_value(B, 1, TOKENS // B, device, dtype)) for B in groups}
    spent = in_turn(works, device, 10)
    for B in groups:
        print(f"  B = {B:5}  time {np.median(np.divide(spent[B], spent[1])):7.2%}  receptive field {1 / B:7.2%}")
