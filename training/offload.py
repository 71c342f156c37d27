"""AdamW on the CPU, its state sharded over the ranks (E.2; the paper used ZeRO-2 with offload, this is ZeRO-1).

The device holds weights, gradients and activations; of master weights, both moments and the moving average each rank
holds its share, in host memory. A step:

    backward    each reduced gradient bucket leaves for the host while the rest is still computed: `receive`
    step        norm over all shards, clip, unscale; torch's fused AdamW on the shard; moving average; weights back
    gather      every rank broadcasts the weights it has updated

Where the device is the CPU the masters are the parameters, gradients are read where they lie, and nothing is copied.
"""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist

ALIGN = 16  # numbers: pieces start where the fused kernel starts a vector, so that sharding changes no rounding
CHUNK = 1 << 24  # numbers a broadcast


class Piece:
    """Numbers first..last-1 of a parameter, in the order in which they lie in memory, and whose they are."""

    def __init__(self, param, group: int, first: int, last: int, owner: int):
        self.param, self.group, self.first, self.last, self.owner = param, group, first, last, owner

    def of(self, tensor) -> torch.Tensor:
        """The same numbers of a tensor shaped and laid out like the parameter: a view."""
        if tensor.stride() != self.param.stride():
            tensor = torch.empty_like(self.param, dtype=tensor.dtype).copy_(tensor)
        return tensor.detach().as_strided((self.last - self.first,), (1,), tensor.storage_offset() + self.first)


def shard(groups, world: int) -> list[Piece]:
    """All numbers of all parameters, cut into `world` equal ranges."""
    total = sum(p.numel() for group in groups for p in group["params"])
    ends, pieces, at = [total * (r + 1) // world for r in range(world)], [], 0
    for g, group in enumerate(groups):
        for p in group["params"]:
            first, n = 0, p.numel()
            for owner, end in enumerate(ends):
                last = min(n, max(0, -(-(end - at) // ALIGN) * ALIGN))
                if last > first:
                    pieces.append(Piece(p, g, first, last, owner))
                    first = last
            at += n
    return pieces


class OffloadAdamW:
    """AdamW over parameter groups, as torch.optim.AdamW takes them; weight decay is decoupled.

    ema   decay of a moving average of the weights, 0 for none; it warms up as (1 + n) / (10 + n)
    gloo  a process group for what lies on the CPU; None is the default group
    """

    def __init__(self, groups, ema=0.0, rank=0, world=1, gloo=None):
        groups = [{"params": [p for p in group["params"] if p.requires_grad]} | {k: v for k, v in group.items()
                                                                                 if k != "params"} for group in groups]
        self.params = [p for group in groups for p in group["params"]]
        self.pieces, self.rank, self.world, self.decay, self.steps = shard(groups, world), rank, world, ema, 0
        self.mine = [piece for piece in self.pieces if piece.owner == rank]
        self.on_host = self.params[0].device.type == "cpu"
        self.masters = [self.home(piece) for piece in self.mine]
        self.averages = [master.clone() for master in self.masters] if ema else []
        self.inner = torch.optim.AdamW(
            [group | {"params": [m for m, piece in zip(self.masters, self.mine) if piece.group == g]}
             for g, group in enumerate(groups)], fused=True)
        self.gloo = gloo
        if not self.on_host:
            self.grads = [torch.empty_like(master, pin_memory=True) for master in self.masters]
            self.stream = torch.cuda.Stream()
        self.last_micro_batch = True  # the loop says so: gradients leave once they are whole

    @property
    def param_groups(self):
        return self.inner.param_groups

    def home(self, piece: Piece) -> torch.Tensor:
        """Where the master of a piece lives: in the parameter itself, or in pinned memory."""
        numbers = piece.of(piece.param.data)
        return numbers if self.on_host else torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers)

    def attach(self, ddp):
        """Have gradients leave during backward: DDP's once they are reduced, else once they are accumulated."""
        if self.on_host:
            return
        self.places = {}
        for n, piece in enumerate(self.mine):
            self.places.setdefault(piece.param, []).append((n, piece))
        if self.world > 1:
            ddp.register_comm_hook(self, reduce_and_receive)
        else:
            for p in self.params:
                p.register_post_accumulate_grad_hook(lambda p: self.receive([p], [p.grad]))

    def receive(self, params, grads):
        """Copy this rank's share of some reduced gradients to the host, beside the computation."""
        if not self.last_micro_batch:
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for p, grad in zip(params, grads):
                for n, piece in self.places.get(p, ()):
                    self.grads[n].copy_(piece.of(grad), non_blocking=True)
                grad.record_stream(self.stream)

    @torch.no_grad()
    def step(self, clip=0.0, scale=1.0) -> float:
        """One update with gradients that are `scale` times too large -> their global norm, unscaled.

        clip  the largest norm that goes on unscaled; 0 for no limit

        Where that is not finite nothing changes, on any rank.
        """
        if not self.on_host:
            self.stream.synchronize()
        for n, (master, piece) in enumerate(zip(self.masters, self.mine)):
            master.grad = piece.of(piece.param.grad) if self.on_host else self.grads[n]
        norms = torch._foreach_norm([master.grad for master in self.masters])
        square = torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(square, group=self.gloo)
        norm = square.sqrt().item() / scale
        if math.isfinite(norm):
            # the kernel divides by it as it reads: unscaling and clipping cost no pass over the gradients, only that
            # they are written back too
            divisor = scale * max(1.0, norm / (clip or math.inf))
            self.inner.grad_scale = torch.tensor(divisor) if divisor != 1 else None
            self.inner.found_inf = torch.zeros(()) if divisor != 1 else None
            self.inner.step()
            self.average()
            self.gather()
        return norm

    def average(self):
        if self.averages:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))  # young averages forget fast
            torch._foreach_lerp_(self.averages, self.masters, 1 - decay)
        self.steps += 1

    def gather(self):
        """The updated weights, from the shards to every rank's parameters."""
        if not self.on_host:
            for piece, master in zip(self.mine, self.masters):
                piece.of(piece.param).copy_(master, non_blocking=True)
        for owner in range(self.world if self.world > 1 else 0):
            for pieces in chunks([piece for piece in self.pieces if piece.owner == owner]):
                flat = torch.cat([piece.of(piece.param) for piece in pieces])
                dist.broadcast(flat, owner)
                if owner != self.rank:
                    for piece, numbers in zip(pieces, flat.split([piece.last - piece.first for piece in pieces])):
                        piece.of(piece.param).copy_(numbers)

    # -----------------------------------------------------------------------------------------------------------------
    # State, whole: it does not depend on how many ranks there are

    def whole(self, shards: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """On rank 0 the full tensors, one a parameter, of what every rank holds a shard of; views if it holds all."""
        if self.rank:
            for numbers in shards:
                dist.send(numbers.contiguous(), 0, group=self.gloo)
            return None
        if self.world == 1:
            return [numbers.as_strided(p.shape, p.stride()) for p, numbers in zip(self.params, shards)]
        full = {p: torch.empty_like(p, device="cpu") for p in self.params}
        held = dict(zip(map(id, self.mine), shards))
        for piece in self.pieces:
            place = piece.of(full[piece.param])
            if piece.owner:
                dist.recv(place, piece.owner, group=self.gloo)
            else:
                place.copy_(held[id(piece)])
        return [full[p] for p in self.params]

    @contextmanager
    def averaged(self):
        """Meanwhile the parameters of rank 0 are the moving average, where there is one; every rank must enter."""
        full = self.whole(self.averages) if self.averages else None
        if full is None:
            yield
            return
        current = [p.detach().cpu() if not self.on_host else p.detach().clone() for p in self.params]
        self.put(full)
        yield
        self.put(current)

    def put(self, values):
        for p, value in zip(self.params, values):
            p.data.copy_(value)

    def state_dict(self) -> dict:
        """Whole on rank 0; on the others, which must call it too, without the tensors."""
        state = [self.inner.state.get(master, {}) for master in self.masters]
        parts = {name: self.whole([s[name] if s else torch.zeros_like(m) for s, m in zip(state, self.masters)])
                 for name in ("exp_avg", "exp_avg_sq")}
        if self.decay:
            parts["average"] = self.whole(self.averages)
        return parts | {"steps": self.steps}

    def load_state_dict(self, state: dict):
        """Take this rank's share of a whole state. The parameters must have been loaded before."""
        self.steps = state["steps"]
        where = {p: i for i, p in enumerate(self.params)}

        def share(name, piece):
            return piece.of(torch.empty_like(piece.param, device="cpu").copy_(state[name][where[piece.param]]))

        for n, (master, piece) in enumerate(zip(self.masters, self.mine)):
            if not self.on_host:
                master.copy_(piece.of(piece.param.data))
            if self.decay:
                self.averages[n].copy_(share("average", piece))
            if self.steps:
                moments = {name: share(name, piece).clone() for name in ("exp_avg", "exp_avg_sq")}
                self.inner.state[master] = {"step": torch.tensor(float(self.steps))} | moments


def chunks(pieces: list[Piece]):
    """Runs of pieces of at most CHUNK numbers, where a piece is not longer itself."""
    run, size = [], 0
    for piece in pieces:
        if run and size + piece.last - piece.first > CHUNK:
            yield run
            run, size = [], 0
        run.append(piece)
        size += piece.last - piece.first
    if run:
        yield run


def reduce_and_receive(optimizer: OffloadAdamW, bucket: dist.GradBucket):
    """DDP's communication hook: the mean over the ranks, and then off to the host."""
    flat = bucket.buffer().div_(optimizer.world)

    def received(future):
        optimizer.receive(bucket.parameters(), bucket.gradients())
        return future.value()[0]

    return dist.all_reduce(flat, async_op=True).get_future().then(received)
