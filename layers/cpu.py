"""Attention on a CPU, where torch's fused kernel is not the fastest for every shape. The sums are the same.

Measured by `python -m lab.bench attention`.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# for products in bfloat16; without them these are far slower than the fused kernel
HAS_UNITS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def attention(q, k, v, bias=None):
    """softmax(Q K^T / sqrt(d) + bias) V by the kernel that is fastest here: q (B, heads, L, d), k and v (B, heads, S,
    d), bias (B, heads, 1, S) or None."""
    if torch.is_grad_enabled() and q.shape[-2] * k.shape[-2] <= 2**17:
        # the backward pass of the fused kernel is 2 to 10 times slower than this on a few hundred tokens
        logits = q * q.shape[-1] ** -0.5 @ k.mT
        return (logits if bias is None else logits + bias).softmax(-1) @ v
    if q.dtype == torch.bfloat16 and k.shape[-2] >= 1024 and HAS_UNITS:
        return AttentionByParts.apply(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, bias)


class AttentionByParts(torch.autograd.Function):
    """Attention over a few queries of one head at a time: their logits stay in the cache, backward makes them again.

    In bfloat16 only. Logits are rounded to bfloat16 too, so result and gradients are 0.4% to 0.6% from float64, where
    those of the fused kernel are 0.2% to 0.4%.
    """

    @staticmethod
    def parts(q, k):
        """Yield ((batch, head), slice of queries): 256 of them, fewer where there are more than 16,384 keys."""
        part = min(256, 2**22 // k.shape[2])
        rows = [slice(i, i + part) for i in range(0, q.shape[2], part)]
        return product(product(range(q.shape[0]), range(q.shape[1])), rows)

    @staticmethod
    def forward(ctx, q, k, v, bias=None):
        q = q * q.shape[-1] ** -0.5
        out = torch.empty_like(q)
        for head, rows in AttentionByParts.parts(q, k):
            out[head][rows] = AttentionByParts.weights(q, k, bias, head, rows) @ v[head]
        ctx.save_for_backward(q, k, v, out, bias)
        return out

    @staticmethod
    def weights(q, k, bias, head, rows):
        """What the values are weighed with, (queries, S)."""
        if bias is None:
            return (q[head][rows] @ k[head].mT).softmax(-1)
        return torch.addmm(bias[head], q[head][rows], k[head].mT).softmax(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """With P = softmax(Q K^T) and O = P V: dV = P^T dO, dS = P (dO V^T - sum(dO O)), dQ = dS K, dK = dS^T Q;
        the bias gets the sum of dS over all queries."""
        q, k, v, out, bias = ctx.saved_tensors
        grad_q, common = torch.empty_like(q), (grad * out).sum(-1, keepdim=True)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # they are sums over all parts
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for head, rows in AttentionByParts.parts(q, k):
            weights = AttentionByParts.weights(q, k, bias, head, rows)
            grad_v[head] += weights.mT @ grad[head][rows]
            grad_logits = (grad[head][rows] @ v[head].mT).sub_(common[head][rows]).mul_(weights)
            grad_q[head][rows] = grad_logits @ k[head]
            grad_k[head] += grad_logits.mT @ q[head][rows]
            if bias is not None:
                grad_bias[head] += grad_logits.sum(0, keepdim=True, dtype=torch.float32)
        return (grad_q * q.shape[-1] ** -0.5, grad_k.to(k.dtype), grad_v.to(v.dtype),
                None if bias is None else grad_bias.to(bias.dtype))
