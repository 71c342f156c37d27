"""timing.py: what is counted is all there is, and turns are taken."""

import time

import pytest
import torch

from lab.timing import Parts, default_dtype, flop_of, in_turn, unfilled
from model import MICRO, UNet

CPU = torch.device("cpu")
INPUTS = torch.randn(2, 4, 16, 16), torch.full((2,), 5), torch.randn(2, 7, 32)


def test_the_parts_are_the_whole():
    unet = UNet(MICRO.unet)
    with torch.no_grad():
        with Parts(unet, CPU, count=True) as counted:
            unet(*INPUTS)
        began = time.perf_counter()
        with Parts(unet, CPU) as timed:
            unet(*INPUTS)
        whole = time.perf_counter() - began
        assert sum(counted.flop.values()) == flop_of(lambda: unet(*INPUTS))
    assert 0.2 * whole < sum(timed.seconds.values()) <= whole
    assert set(timed.seconds) == set(counted.bytes) == {
        "convolutions", "linear layers", "normalisation", "activations", "the rest",
        "attention, 64 x 64", "attention, 64 x 7"}  # level 1 is of 8 x 8
    assert counted.flop["attention, 64 x 7"] == 4 * 2 * 64 * 7 * 32 * 4  # four of them: down 1, middle 1, up 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_counting_needs_no_contents(dtype):
    with default_dtype(dtype):
        unet = UNet(MICRO.unet)
    assert unet.out[2].weight.dtype == dtype and torch.get_default_dtype() == torch.float32
    inputs = INPUTS[0].to(dtype), INPUTS[1], INPUTS[2].to(dtype)
    with unfilled(unet, inputs) as (shape, fakes):
        counted = flop_of(lambda: shape(*fakes).sum().backward())
    assert counted == flop_of(lambda: unet(*inputs).sum().backward())


def test_works_take_turns_and_the_first_round_does_not_count():
    log = []
    spent = in_turn({name: lambda name=name: log.append(name) for name in "ab"}, CPU, rounds=3)
    assert log == list("abababab") and [len(spent[name]) for name in "ab"] == [3, 3]
    assert len(in_turn({"a": lambda: time.sleep(0.01)}, CPU, rounds=50, seconds=0.001)["a"]) == 2
