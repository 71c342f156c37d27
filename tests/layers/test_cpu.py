"""Attention on a CPU is softmax(Q K^T / sqrt(d)) V, by whatever kernel."""

import pytest
import torch

from layers import cpu
from model import split_heads


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_long_attention_in_bfloat16_is_softmax(gradients, biased, monkeypatch):
    """By parts, the last of them short, on the strides that split heads have; beside float64."""
    monkeypatch.setattr(cpu, "HAS_UNITS", True)
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = (split_heads(torch.randn(2, 1100, 3 * 32, generator=g).bfloat16(), 3) for _ in range(4))

    def results(attention, *inputs):
        """What it gives, and the gradients of a weighted sum of that."""
        inputs = [x.detach().requires_grad_(gradients) for x in inputs]
        out = attention(*inputs)
        return [out, *(torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs) if gradients else [])]

    inputs = [q, k, v] + [torch.randn(2, 3, 1, 1100, generator=g).bfloat16()] * biased
    ours = results(cpu.attention, *inputs)
    assert torch.equal(ours[0], cpu.AttentionByParts.apply(*inputs)) and ours[0].stride() == q.stride()
    fused = results(torch.nn.functional.scaled_dot_product_attention, *inputs)
    exact = results(lambda q, k, v, bias=0: (q @ k.mT / 32**0.5 + bias).softmax(-1) @ v, *(x.double() for x in inputs))
    for a, b, e in zip(ours, fused, exact, strict=True):
        rounding = 2 if biased else 1  # logits are larger
        assert (a - e).norm() / e.norm() < 0.007 * rounding
        assert (a - e).norm() < 3 * rounding * (b - e).norm()


def test_without_units_for_bfloat16_the_fused_kernel_works(monkeypatch):
    """By parts would take many times as long there."""
    monkeypatch.setattr(cpu, "HAS_UNITS", False)
    q, k, v = torch.randn(3, 1, 2, 1100, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(cpu.attention(q, k, v), fused) and not torch.equal(cpu.AttentionByParts.apply(q, k, v), fused)
