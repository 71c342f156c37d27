"""offload.py: against torch.optim.AdamW, and the same to the bit however many ranks share the state."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from training.offload import ALIGN, OffloadAdamW, shard

SHAPES = [(37, 5), (64,), (), (8, 3, 3, 3), (1001,), (16, 16, 1, 1)]
GROUPS = [{"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
          {"lr": 3e-3, "betas": (0.8, 0.9), "weight_decay": 0.0}]


def parameters(dtype=torch.float32):
    """The same at every call; one of them laid out as convolutions are on the CPU."""
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g, dtype=dtype)) for shape in SHAPES]
    params[3].data = params[3].data.to(memory_format=torch.channels_last)
    return params


def groups(params):
    return [options | {"params": params[g::2]} for g, options in enumerate(GROUPS)]


def gradients(params, step):
    """Of a step: a function of its number; one that vanishes now and then, one laid out unlike its parameter."""
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


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_number_has_one_owner_and_shares_are_even(world):
    pieces = shard(groups(parameters()), world)
    total = sum(math.prod(shape) for shape in SHAPES)
    seen = {}
    for piece in pieces:
        assert piece.first % ALIGN == 0
        seen.setdefault(id(piece.param), []).append((piece.first, piece.last))
    for ranges in seen.values():
        ranges.sort()
        assert ranges[0][0] == 0 and all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
    assert sum(piece.last - piece.first for piece in pieces) == total
    for owner in range(world):
        assert abs(sum(p.last - p.first for p in pieces if p.owner == owner) - total / world) <= ALIGN


def run(rank, world, folder, first, last, resume):
    """Steps first..last-1 on `world` ranks; rank 0 leaves weights and state, every rank the bytes that it held."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-{world}-{first}", rank=rank, world_size=world)
    params = parameters()
    if resume:
        saved = torch.load(f"{folder}/{resume}", weights_only=True)
        for p, value in zip(params, saved["params"]):
            p.data.copy_(value)
    optimizer = OffloadAdamW(groups(params), ema=0.97, rank=rank, world=world)
    if resume:
        optimizer.load_state_dict(saved["state"])
    for step in range(first, last):
        gradients(params, step)
        optimizer.step()
    held = sum(t.numel() * t.element_size() for state in optimizer.inner.state.values()
               for t in state.values() if t.dim()) + sum(t.numel() * t.element_size() for t in optimizer.averages)
    torch.save(held, f"{folder}/held-{world}-{rank}")
    state = optimizer.state_dict()
    if rank == 0:
        torch.save({"params": [p.data for p in params], "state": state}, f"{folder}/{world}-{last}")
    dist.destroy_process_group()


def result(folder, world, last):
    saved = torch.load(f"{folder}/{world}-{last}", weights_only=True)
    return [*saved["params"], *saved["state"]["exp_avg"], *saved["state"]["exp_avg_sq"], *saved["state"]["average"]]


def test_ranks_change_no_bit_and_hold_their_share(tmp_path):
    """1, 2 and 4 ranks; then 2 and 1 that go on where 4 and 2 stopped."""
    for world in (1, 2, 4):
        mp.spawn(run, (world, str(tmp_path), 0, 30, ""), world)
    reference = result(tmp_path, 1, 30)
    assert len(reference) == 4 * len(SHAPES)
    for world in (2, 4):
        assert all(map(torch.equal, reference, result(tmp_path, world, 30)))
    total = 12 * sum(math.prod(shape) for shape in SHAPES)  # both moments and the average, fp32
    for world in (1, 2, 4):
        held = [torch.load(f"{tmp_path}/held-{world}-{rank}") for rank in range(world)]
        assert sum(held) == total and max(held) <= total / world + 12 * ALIGN

    mp.spawn(run, (1, str(tmp_path), 30, 50, "1-30"), 1)
    mp.spawn(run, (2, str(tmp_path), 30, 50, "4-30"), 2)
    mp.spawn(run, (4, str(tmp_path), 30, 50, "2-30"), 4)
    for world in (2, 4):
        assert all(map(torch.equal, result(tmp_path, 1, 50), result(tmp_path, world, 50)))
    assert not torch.equal(reference[0], result(tmp_path, 1, 50)[0])
