"""training/offload.py: against torch.optim.AdamW, the same to the bit however many ranks share the state, and off the
host as on it."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from runs import assert_equal_states, assert_same_run, ci_options, train_here
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sd
import train
from training import offload
from training.account import Account, host_memory
from training.config import Config
from training.muon import parameter_groups
from training.offload import ALIGN, OffloadAdamW, replaced, shard
from training.ranks import Ranks

SHAPES = [(37, 5), (64,), (), (8, 3, 3, 3), (1001,), (16, 16, 1, 1)]
MATRICES = [(24, 40), (32, 4, 3, 3), (48, 16)]
GROUPS = [{"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
          {"lr": 3e-3, "betas": (0.8, 0.9), "weight_decay": 0.0}]


def parameters(dtype=torch.float32):
    """Parameters, the same at every call; one of them laid out as convolutions are on the CPU."""
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g, dtype=dtype)) for shape in SHAPES]
    params[3].data = params[3].data.to(memory_format=torch.channels_last)
    return params


def matrices():
    """Parameters for Muon, one of them laid out as convolutions are on the CPU."""
    g = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in MATRICES]
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    return params


def groups(params, matrices=()):
    last = [{"params": matrices, "lr": 0.02, "weight_decay": 0.1, "muon": True}] if matrices else []
    return [*(options | {"params": params[g::2]} for g, options in enumerate(GROUPS)), *last]


def gradients(params, step):
    """Set the gradients of a step: a function of its number; one vanishes now and then, one is laid out otherwise."""
    g = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype) * (0.0 if (step + i) % 5 == 0 else 10 ** (i - 3))


def test_equals_torch_over_200_steps():
    ours, theirs = parameters(), parameters()
    optimizer, reference = OffloadAdamW(groups(ours), ema=0.97), torch.optim.AdamW(groups(theirs), foreach=False)
    averages = [p.detach().clone().double() for p in theirs]
    for step in range(200):
        gradients(ours, step), gradients(theirs, step)
        for optimizer_ in (optimizer, reference):
            for group, options in zip(optimizer_.param_groups, GROUPS):
                group["lr"] = options["lr"] * (1 + step % 7)
        expected_norm = torch.nn.utils.get_total_norm([p.grad for p in theirs]).item()
        assert optimizer.step() == pytest.approx(expected_norm, rel=1e-5)
        reference.step()
        decay = min(0.97, (1 + step) / (10 + step))
        averages = [decay * a + (1 - decay) * p.detach().double() for a, p in zip(averages, theirs)]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    for a, b in zip(optimizer.whole(optimizer.averages), averages[::2] + averages[1::2]):  # in the order of the groups
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clip, scale", [(0.5, 1.0), (1e9, 1024.0), (0.5, 1024.0)])
def test_clipping_and_unscaling_are_torchs(clip, scale):
    ours, theirs = parameters(), parameters()
    optimizer, reference = OffloadAdamW(groups(ours)), torch.optim.AdamW(groups(theirs), foreach=False)
    for step in range(20):
        gradients(ours, step), gradients(theirs, step)
        for p in ours:
            p.grad *= scale
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip)
        assert optimizer.step(clip, scale) == pytest.approx(norm.item(), rel=1e-5)
        reference.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    params = parameters()
    optimizer = OffloadAdamW(groups(params), ema=0.9)
    gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    gradients(params, 1)
    params[1].grad[3] = bad
    assert not math.isfinite(optimizer.step())
    after = [p.detach() for p in params], optimizer.state_dict()
    assert all(map(torch.equal, before[0], after[0]))
    assert all(torch.equal(a, b) for name in ("exp_avg", "exp_avg_sq", "average")
               for a, b in zip(before[1][name], after[1][name])) and before[1]["steps"] == after[1]["steps"] == 1


@pytest.mark.parametrize("shapes", [[], MATRICES])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_number_has_one_owner_and_shares_are_even(world, shapes):
    whole = matrices() if shapes else []
    pieces = shard(groups(parameters(), whole), world)
    total = sum(math.prod(shape) for shape in SHAPES + shapes)
    seen = {}
    for piece in pieces:
        assert piece.first % ALIGN == 0
        assert len(piece) == piece.param.numel() or not any(piece.param is matrix for matrix in whole)
        seen.setdefault(id(piece.param), []).append((piece.first, piece.last))
    for ranges in seen.values():
        ranges.sort()
        assert ranges[0][0] == 0 and all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
    assert sum(piece.last - piece.first for piece in pieces) == total
    for owner in range(world):
        assert abs(sum(p.last - p.first for p in pieces if p.owner == owner) - total / world) <= max(
            [ALIGN, *map(math.prod, shapes)])


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


def steps(folder, first, last, resume):
    """Do steps [first, last) on all ranks; rank 0 leaves weights and state, every rank the bytes that it held."""
    with Ranks(timeout=60) as ranks:
        first, last, plain, muons = int(first), int(last), parameters(), matrices()
        params = plain + muons
        saved = torch.load(f"{folder}/{resume}", weights_only=True) if resume else None
        if resume:
            for p, value in zip(params, saved["params"]):
                p.data.copy_(value)
        optimizer = OffloadAdamW(groups(plain, muons), 0.97, ranks.rank, ranks.world, ranks.gloo)
        if resume:
            optimizer.load_state_dict(saved["state"])
        for step in range(first, last):
            gradients(params, step)
            optimizer.step()
        held = sum(t.numel() * t.element_size() for state in optimizer.inner.state.values()
                   for t in state.values() if t.dim()) + sum(t.numel() * t.element_size() for t in optimizer.averages)
        torch.save(held, f"{folder}/held-{ranks.world}-{ranks.rank}")
        state = optimizer.state_dict()
        if ranks.rank == 0:
            torch.save({"params": [p.data for p in params], "state": state}, f"{folder}/{ranks.world}-{last}")


def result(folder, world, last):
    saved = torch.load(f"{folder}/{world}-{last}", weights_only=True)
    seconds = [torch.zeros(()) if moment is None else moment for moment in saved["state"]["exp_avg_sq"]]
    return [*saved["params"], *saved["state"]["exp_avg"], *seconds, *saved["state"]["average"]]


def test_ranks_change_no_bit_and_hold_their_share(processes, tmp_path):
    """1, 2 and 4 ranks; then 1, 2 and 4 that go on where 1, 4 and 2 stopped."""
    for world in (1, 2, 4):
        assert processes.run([tmp_path, 0, 10, ""], world, steps) == [0] * world, processes.log.read_text()
    reference = result(tmp_path, 1, 10)
    assert len(reference) == 4 * len(SHAPES + MATRICES)
    for world in (2, 4):
        assert all(map(torch.equal, reference, result(tmp_path, world, 10)))
    plain, muons = (sum(map(math.prod, shapes)) for shapes in (SHAPES, MATRICES))
    total = 12 * plain + 8 * muons  # both moments, or one, and the average, fp32
    for world in (1, 2, 4):
        held = [torch.load(f"{tmp_path}/held-{world}-{rank}") for rank in range(world)]
        assert sum(held) == total and max(held) <= total / world + 12 * 1152  # a matrix is whole

    for world, before in ((1, 1), (2, 4), (4, 2)):
        assert processes.run([tmp_path, 10, 16, f"{before}-10"], world, steps) == [0] * world
    for world in (2, 4):
        assert all(map(torch.equal, result(tmp_path, 1, 16), result(tmp_path, world, 16)))


# ---------------------------------------------------------------------------------------------------------------------
# Off the host: what runs on GPUs, forced on a CPU. Streams, pinned memory and NCCL are what this leaves out


class Forced(OffloadAdamW):
    """OffloadAdamW that takes the CPU for a GPU."""

    on_host = property(lambda self: False, lambda self, value: None)

    def pinned(self):
        with pytest.MonkeyPatch.context() as patch:
            zeros = torch.zeros
            patch.setattr(torch, "zeros", lambda *size, pin_memory, **options: zeros(*size, **options))
            return super().pinned()


@pytest.fixture
def no_streams():
    """Stand-ins for CUDA's streams."""
    with pytest.MonkeyPatch.context() as patch:
        without_streams(patch)
        yield


def without_streams(patch):
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    patch.setattr(torch.cuda, "Stream", lambda device: stream)
    patch.setattr(torch.cuda, "current_stream", lambda: stream)
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


class Net(nn.Module):
    """A loss with convolutions, a number, and a part that does not train."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 24, 3), nn.SiLU(), nn.Conv2d(24, 4, 1))
        self.scale, self.frozen = nn.Parameter(torch.ones(())), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.conv(x).mean(dim=(2, 3)) * self.scale).square().mean(dim=1)


def trained(kind, ranks, layout, accumulate, dtype, optimizer):
    """Everything that four steps of train.py's own loop leave, the moving average swapped in and out on the way."""
    torch.manual_seed(0)
    net = Net().to(torch.float64 if dtype == "float64" else torch.float32).to(memory_format=layout)
    ddp = net
    if ranks.world > 1:
        ddp = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.001)  # several buckets
    cfg = Config(accumulate=accumulate, dtype=dtype, lr=0.01, betas=(0.9, 0.999), optimizer=optimizer)
    optimizer = kind(parameter_groups(net, cfg), 0.9, ranks.rank, ranks.world, ranks.gloo)
    optimizer.attach(ddp)
    scale = train.LossScale(dtype == "float16")
    g = torch.Generator().manual_seed(ranks.rank)
    task = SimpleNamespace(batch=lambda: (["video"] * 2, (torch.randn(2, 3, 8, 8, generator=g),)))
    norms, averaged = [], []
    for step in range(4):
        train.backward(cfg, ranks, task, ddp, optimizer, scale)
        norms.append(optimizer.step(0.05, scale.value))
        net.zero_grad(set_to_none=ranks.world == 1)
        before = [p.detach().clone() for p in net.parameters()]
        with optimizer.averaged(net) as in_host_memory:
            averaged += [p.detach().clone() for p in net.parameters()]
            with in_host_memory:
                averaged += [p.detach().clone() for p in net.parameters()]
        assert all(map(torch.equal, before, net.parameters()))
        if step == 1:  # a run that goes on
            state = [copy.deepcopy(optimizer.state_dict())]
            if ranks.world > 1:
                dist.broadcast_object_list(state)
            optimizer.load_state_dict(state[0])
    assert norms[0] > 0.05 and math.isfinite(norms[-1])  # clipped
    return {"norms": norms, "averaged": averaged, "weights": net.state_dict(), "state": optimizer.state_dict()}


CASES = [(layout, *case) for layout in (torch.contiguous_format, torch.channels_last)
         for case in ((1, "float64", "adamw"), (2, "float64", "muon"), (2, "float16", "adamw"), (1, "float32", "muon"))]


def both_branches():
    """On every rank: the same numbers from the host branch and from the other."""
    with pytest.MonkeyPatch.context() as patch, Ranks(timeout=60) as ranks:
        without_streams(patch)
        for case in CASES:
            assert_equal_states(*(trained(kind, ranks, *case) for kind in (OffloadAdamW, Forced)))


def test_the_branch_for_gpus_changes_no_bit():
    both_branches()


def test_the_branch_for_gpus_changes_no_bit_on_two_ranks(processes):
    """A gradient in DDP's bucket has the layout of its parameter, not that of bucket.gradients()."""
    assert processes.run([], ranks=2, target=both_branches) == [0, 0], processes.log.read_text()


def test_a_run_by_the_branch_for_gpus_is_the_same(finished, world, tmp_path, no_streams, monkeypatch):
    """The whole of train.py: checkpoint, log and the model that is written from the host's copy."""
    monkeypatch.setattr(offload, "OffloadAdamW", Forced)
    done = train_here(*ci_options(world, tmp_path), f"--encoded={finished[0]}/encoded", "--max_steps=5", "--prompts=()")
    assert done.returncode == 0, done.stderr
    assert_same_run(finished[0], tmp_path, 5)
    model = sd.load(str(tmp_path / "run" / "model.safetensors"))
    average = torch.load(tmp_path / "run" / "step-00000005.pt", weights_only=True)["optimizer"]["average"]
    assert all(map(torch.equal, model.unet.parameters(), average))


@pytest.mark.parametrize("kind", [OffloadAdamW, Forced])
def test_a_parameter_without_a_gradient_is_an_error(kind, no_streams):
    """Never the numbers of the step before."""
    net = Net()
    optimizer = kind([{"params": list(net.parameters())}])
    optimizer.attach(net)
    net(torch.randn(2, 3, 8, 8)).mean().backward()
    optimizer.step()
    net.zero_grad()
    net.conv(torch.randn(2, 3, 8, 8)).mean().backward()
    with pytest.raises(RuntimeError, match="every parameter must get a gradient, 1 of 7 pieces got none"):
        optimizer.step()


def test_no_limit_is_no_limit():
    ours, theirs = parameters(), parameters()
    for params, clip in ((ours, 0), (theirs, math.inf)):
        gradients(params, 0)
        OffloadAdamW(groups(params)).step(clip)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_account_has_all_that_is_allocated_on_the_host(ema, no_streams):
    """By one rank: masters and gradients in a block each, and nothing more for the average to be seen and saved."""
    with Account() as account:
        params = [nn.Parameter(torch.randn(256, 256)) for _ in range(3)]
        net = nn.ParameterList(params)
        optimizer = Forced([{"params": params}], ema)
        optimizer.attach(net)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.receive(params, [p.grad for p in params])
        optimizer.step()
        exact = sum(p.nbytes for p in params)
        kept = account.now - 2 * exact  # weights and gradients are on the device
        said = host_memory(Config(ema=ema), exact, 2 * exact, gpu=True, world=1)
        assert kept == pytest.approx(2 * exact + said["moments"] + said["moving average"], abs=1000)
        assert said["masters"] == said["gradients"] == 2**20 > exact  # rounded up to a power of two
        with optimizer.averaged(net) as in_host_memory, in_host_memory:
            assert account.during(lambda: [p.detach().contiguous().cpu() for p in net]) == said["showing"] == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in optimizer.masters}) == 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in optimizer.grads}) == 1


def test_replaced_parameters_come_back():
    net, wanted = Net(), torch.zeros(24, 16, 3, 3)
    before = dict(net.named_parameters())
    with pytest.raises(KeyError), replaced(net, {net.conv[2].weight: wanted}):
        assert net.conv[2].weight.data_ptr() == wanted.data_ptr() and net.conv[2].weight.requires_grad
        assert [*dict(net.named_parameters())] == [*before]
        raise KeyError
    assert all(a is b for a, b in zip(before.values(), net.parameters()))
