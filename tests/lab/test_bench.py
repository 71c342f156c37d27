"""The benchmarks: what is counted is all there is, turns are taken, and every command starts."""

import functools
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet3DConditionModel
from torch.autograd import DeviceType

from beyond.fast import FAST
from lab.bench import scale, step, unet, video
from lab.bench.__main__ import BENCHMARKS
from lab.bench.parts import Parts, seconds_by_limit, unfilled
from lab.bench.timing import default_dtype, in_turn
from model import UNet
from sd.presets import MICRO
from sd.settings import LAYOUTS, Settings, make_layout
from training.account import count_flop

CPU = torch.device("cpu")
INPUTS = torch.randn(2, 4, 16, 16), torch.full((2,), 5), torch.randn(2, 7, 32)

# ---------------------------------------------------------------------------------------------------------------------
# Clocks and counters


def test_the_parts_are_the_whole():
    network = UNet(MICRO.unet)
    with torch.no_grad():
        with Parts(network, CPU, count=True) as counted:
            network(*INPUTS)
        began = time.perf_counter()
        with Parts(network, CPU) as timed:
            network(*INPUTS)
        whole = time.perf_counter() - began
        assert sum(counted.flop.values()) == count_flop(lambda: network(*INPUTS))
    assert 0 < sum(timed.seconds.values()) <= whole
    assert set(timed.seconds) == set(counted.bytes) == {
        "convolutions", "linear layers", "normalisation", "activations", "the rest",
        "attention, 64 x 64", "attention, 64 x 7"}  # level 1 is of 8 x 8
    assert counted.flop["attention, 64 x 7"] == 4 * 2 * 64 * 7 * 32 * 4  # four of them: down 1, middle 1, up 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_counting_needs_no_contents(dtype):
    with default_dtype(dtype):
        network = UNet(MICRO.unet)
    assert network.out[2].weight.dtype == dtype and torch.get_default_dtype() == torch.float32
    inputs = INPUTS[0].to(dtype), INPUTS[1], INPUTS[2].to(dtype)
    with unfilled(network, inputs) as (shape, fakes):
        counted = count_flop(lambda: shape(*fakes).sum().backward())
    assert counted == count_flop(lambda: network(*inputs).sum().backward())


def test_works_take_turns_and_the_first_round_does_not_count():
    log = []
    spent = in_turn({name: lambda name=name: log.append(name) for name in "ab"}, CPU, rounds=3)
    assert log == list("abababab") and [len(spent[name]) for name in "ab"] == [3, 3]
    assert len(in_turn({"a": lambda: time.sleep(0.01)}, CPU, rounds=50, seconds=0.001)["a"]) == 2


def test_a_gpus_kernels_count_once():
    """Rows as torch's profiler gives them: an operator's has the time of its kernel, which has a row of its own too."""
    def row(key, device_type, cpu, gpu):
        return SimpleNamespace(key=key, device_type=device_type, self_cpu_time_total=cpu, self_device_time_total=gpu)

    rows = [row("aten::mm", DeviceType.CPU, 5, 2e6), row("ampere_sgemm_128x64_nn", DeviceType.CUDA, 0, 2e6),
            row("aten::cudnn_convolution", DeviceType.CPU, 7, 3e6), row("implicit_convolve", DeviceType.CUDA, 0, 3e6),
            row("aten::add", DeviceType.CPU, 1, 1e6), row("elementwise_kernel", DeviceType.CUDA, 0, 1e6)]
    assert seconds_by_limit(rows, torch.device("cuda")) == {"matmul": 2, "convolution": 3, "the rest": 1}
    assert seconds_by_limit(rows, CPU) == {"matmul": 5e-6, "convolution": 7e-6, "the rest": 1e-6}


# ---------------------------------------------------------------------------------------------------------------------
# The commands, on models and files of a size for a test


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_command_has_help(run, name):
    done = run("lab.bench", name, "--help")
    assert done.returncode == 0 and f"python -m lab.bench {name}" in done.stdout, done.stderr


@pytest.fixture
def small(monkeypatch):
    """The micro model in place of SD 2.1's and the tiny one, two rounds, and ceilings that take no time to measure."""
    for module in (unet, scale, video):
        monkeypatch.setattr(module, "SD21", MICRO)
    monkeypatch.setattr(scale, "FRAMES", (4, 16))
    monkeypatch.setattr(scale, "SIDE", 64)
    monkeypatch.setattr(step, "TINY", MICRO)
    for module in (unet, scale, step, video):
        monkeypatch.setattr(module, "in_turn", lambda works, device, *rest, **more: in_turn(works, device, rounds=2))
    ceilings = {"matmul": 1e9, "convolution": 1e9, "triad": 1e9}
    monkeypatch.setattr(unet, "ceilings", lambda *place: ceilings)
    monkeypatch.setattr(step, "ceilings", lambda *place: ceilings)
    for module in (unet, scale):
        monkeypatch.setattr(module, "arithmetic", lambda *place: 1e9)


def test_unet(small, run):
    done = run("lab.bench", "unet", "--side", 64, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "forward and backward, float32, 1 x 64x64" in done.stdout and "attention, 1024 x 77" in done.stdout


def test_video(small, run, monkeypatch):
    peer = functools.partial(
        UNet3DConditionModel, sample_size=32, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32, attention_head_dim=8)
    monkeypatch.setattr(video, "PEERS", {"ModelScope": (peer, (2, 77, 32))})
    monkeypatch.setattr(video, "unet_input", lambda device, dtype, h, w, batch: unet.unet_input(
        device, dtype, h // 4, w // 4, batch))
    done = run("lab.bench", "video", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    kinds, videos = done.stdout.split("a video: ")
    assert "a step of 16 frames of 256x256, cpu, float32" in kinds and "grid, one half, reused features" in kinds
    lines = kinds[kinds.index("a step of"):].splitlines()[1:] + videos.splitlines()[1:]
    seconds = {line[2:48].rstrip(): float(line[48:].split()[0]) for line in lines}
    assert {f"{name}, 50 steps" for name in LAYOUTS} < seconds.keys()
    assert seconds["ModelScope, 20 steps"] == pytest.approx(0.02 * seconds["ModelScope, both halves"], abs=0.006)
    said = {(2, True): "both halves", (2, False): "both halves, reused features", (1, True): "one half",
            (1, False): "one half, reused features"}
    row = "grid, 20 steps, guided at 100..800, reuse 2"
    counts = video.steps_of(video.rows()[row][1])
    expected = sum(n * seconds[f"grid, {said[kind]}"] for kind, n in counts.items()) / 1000
    assert sum(counts.values()) == FAST["steps"] and seconds[row] == pytest.approx(expected, abs=0.006)


def test_step_takes_options_of_a_config(small, run):
    done = run("lab.bench", "step", "--batch_size=1", "--clip=0", "--dtype=float32")
    assert done.returncode == 0 and "batches of 1, float32" in done.stdout, done.stderr


def test_scale_compares_layouts_and_measures_what_fits_into_memory(small, run, monkeypatch):
    monkeypatch.setattr(scale, "CASES", [(4, 64, 64), (6, 64, 64), (9, 64, 64), (16, 64, 64)])
    largest = scale.peak_memory(32, 32, (4, 4))[0]
    monkeypatch.setattr(scale, "free_memory", lambda device: 2 * largest - 1)  # float32, of which half is counted
    done = run("lab.bench", "scale", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    lines, n = [line.split() for line in done.stdout.splitlines()], len(LAYOUTS)
    counted, timed, cases = lines[1 : 1 + n], lines[2 + n : 2 + 2 * n], lines[2 + 2 * n : -1]
    assert [row[0] for row in counted] == [row[0] for row in timed] == list(LAYOUTS)
    growth, exponent = ({row[0]: float(row[i].strip("xT^")) for row in counted} for i in (3, 4))
    assert all(abs(growth[name] - 4 ** exponent[name]) < 0.1 for name in LAYOUTS)  # from 4 frames to 16
    assert growth["grid"] > growth["causal"] > 4
    assert [row[9] for row in cases] == 3 * ["measured"] + ["fitted"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_share_weights_and_are_counted_whole(small, name):
    plain, inputs = UNet(MICRO.unet), scale.clip_input(4, 64, 64, CPU, torch.float32)
    network = scale.with_layouts(plain, CPU, torch.float32)[name]
    assert type(network.layout) is type(make_layout(MICRO.unet, Settings(layout=name)))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(network.out.parameters(), plain.out.parameters()))
    with torch.no_grad():
        assert network(*inputs).shape == inputs[0].shape == (1, 4, 16, 16)
        assert scale.flop_of(name, 4) == count_flop(lambda: network(*inputs))


@pytest.mark.parametrize("arguments, says", [
    (["unets"], "benchmark must be one of tiny, step, unet"),
    (["unet", "--side", 32], "side must be one of 0, 64, 128, got 32"),
    (["video", "--dtype", "float64"], "dtype must be one of auto, float32"),
    (["attention", "--device", "cuda"], "device cuda is not here"),
    (["tiny", "--seed", 1], "there is no option 'seed'"),
    (["step", "--clip=-1"], "clip must be >= 0, got -1"),
    (["optimizer"], "optimizer needs a peer that is not installed"),
])
def test_mistakes_are_told_in_one_line(run, monkeypatch, arguments, says):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    done = run("lab.bench", *arguments)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
