"""Where the time of a UNet goes, each part beside the ceiling that is its own."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lab.bench.timing import clock, default_dtype
from model import Attention, UNet
from sd.device import size_of
from training.account import FORMULAS, count_flop

# ---------------------------------------------------------------------------------------------------------------------
# A forward, by kind of work

KINDS = {"conv2d": "convolutions", "linear": "linear layers", "group_norm": "normalisation",
         "layer_norm": "normalisation", "silu": "activations", "gelu": "activations"}


class Parts(TorchFunctionMode):
    """Seconds, FLOP and bytes (read and written) of what a UNet does inside, by kind of work."""

    def __init__(self, unet, device, count=False):
        super().__init__()
        self.device, self.count, self.attending, self.handles = device, count, None, []
        self.seconds, self.flop, self.bytes = Counter(), Counter(), Counter()
        for module in unet.modules():
            if isinstance(module, Attention):
                self.handles += [module.register_forward_pre_hook(self.enter), module.register_forward_hook(self.leave)]

    def enter(self, module, inputs):
        x, context = inputs
        self.attending = f"attention, {x.shape[1]} x {context.shape[1]}"

    def leave(self, *_):
        self.attending = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kind, result = KINDS.get(getattr(func, "__name__", "")) or self.attending or "the rest", None

        def work():
            nonlocal result
            result = func(*args, **(kwargs or {}))

        if self.count:
            self.flop[kind] += count_flop(work)
            self.bytes[kind] += size_of(x for x in (*args, result) if isinstance(x, torch.Tensor))
        else:
            began = clock(self.device)
            work()
            self.seconds[kind] += clock(self.device) - began
        return result

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)


def parts_table(unet, inputs, ceiling: dict[str, float]):
    """Print where the time of a forward goes, each kind of work beside the ceiling that is its own."""
    with torch.no_grad(), Parts(unet, inputs[0].device) as timed:
        unet(*inputs)
    with unfilled(unet, inputs) as (shape, fakes), torch.no_grad():
        with Parts(shape, inputs[0].device, count=True) as counted:
            shape(*fakes)
    whole = sum(timed.seconds.values())
    for kind, seconds in timed.seconds.most_common():
        limit = "convolution" if kind == "convolutions" else "matmul" if counted.flop[kind] else "triad"
        speed, unit = (counted.flop[kind] or counted.bytes[kind]) / seconds, "GB/s" if limit == "triad" else "GFLOP/s"
        print(f"    {kind:28} {seconds * 1e3:9.1f} ms {seconds / whole:5.0%}  {speed / 1e9:8.1f} {unit:7} "
              f"{speed / ceiling[limit]:4.0%} of the {limit}")


@contextmanager
def unfilled(unet, inputs):
    """Context manager: a UNet of the same shape and its inputs, of tensors that have no contents, to count with."""
    with FakeTensorMode() as fake:
        with default_dtype(inputs[0].dtype):
            shape = UNet(unet.cfg)
        yield shape, [fake.from_tensor(x.cpu()) for x in inputs]


# ---------------------------------------------------------------------------------------------------------------------
# Any work, by torch's operators


def operators_table(work, device, ceiling: dict[str, float]):
    """Print where the time of work(), backward passes included, goes by torch's own operators: one call, profiled."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    flop = Counter()
    for operator, n in counter.get_flop_counts()["Global"].items():
        flop[limit_of(str(operator))] += n
    with torch.profiler.profile() as profiler:
        work()
    seconds = seconds_by_limit(profiler.key_averages(), device)
    whole = sum(seconds.values())
    for limit, s in seconds.most_common():
        share = f"{flop[limit] / s / ceiling[limit]:4.0%} of its ceiling" if limit in ceiling else ""
        print(f"    {limit:20} {s * 1e3:8.1f} ms {s / whole:5.0%}  {flop[limit] / s / 1e9:7.0f} GFLOP/s  {share}")


def seconds_by_limit(events, device) -> Counter:
    """Seconds that the device spent under each limit. On a GPU an operator's row has the time of its kernels, which
    have rows of their own as well: those are skipped."""
    seconds = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            seconds[limit_of(event.key)] += spent / 1e6
    return seconds


def limit_of(operator: str) -> str:
    """Which ceiling limits an operator, by its name."""
    return "convolution" if "conv" in operator else "matmul" if operator.endswith("mm") else "the rest"
