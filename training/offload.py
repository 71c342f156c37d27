"""AdamW on the CPU, its state sharded over the ranks (E.2; the paper used ZeRO-2 with offload, this is ZeRO-1).

The device holds weights, gradients and activations. Each rank holds its share of master weights, both moments and the
moving average in host memory. A step:

    backward    each reduced gradient bucket leaves for the host while the rest is still computed: `receive`
    step        norm over all shards, clip, unscale; torch's fused AdamW on the shard, or Muon; moving average; weights
                back
    gather      every rank broadcasts the weights it has updated

Where the device is the CPU the masters are the parameters, gradients are read where they lie, and nothing is copied.
"""

import math
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from training.muon import muon_step

ALIGN = 16  # numbers: pieces start where the fused kernel starts a vector, so that sharding changes no rounding
CHUNK = 1 << 24  # numbers a broadcast
MOMENTS = "exp_avg", "exp_avg_sq"  # AdamW's names; Muon has the first


class Piece:
    """Numbers [first, last) of a parameter, in the order in which they lie in memory, and the rank that owns them."""

    def __init__(self, param, group: int, first: int, last: int, owner: int):
        self.param, self.group, self.first, self.last, self.owner = param, group, first, last, owner

    def __len__(self):
        return self.last - self.first

    def of(self, tensor) -> torch.Tensor:
        """The same numbers of a tensor shaped like the parameter: a view where it is laid out like it too."""
        if tensor.stride() != self.param.stride():
            tensor = torch.empty_like(self.param, dtype=tensor.dtype).copy_(tensor)
        return tensor.detach().as_strided((len(self),), (1,), tensor.storage_offset() + self.first)


def shard(groups, world: int) -> list[Piece]:
    """All numbers of all parameters, cut into `world` equal ranges; a matrix of Muon's stays whole."""
    total = sum(p.numel() for group in groups for p in group["params"])
    ends, pieces, at = [total * (r + 1) // world for r in range(world)], [], 0
    for g, group in enumerate(groups):
        for p in group["params"]:
            first, n = 0, p.numel()
            for owner, end in enumerate(ends):
                last = min(n, max(0, -(-(end - at) // ALIGN) * ALIGN))
                if last > first:
                    last = n if group.get("muon") else last
                    pieces.append(Piece(p, g, first, last, owner))
                    first = last
            at += n
    return pieces


class OffloadAdamW:
    """AdamW over parameter groups, as torch.optim.AdamW takes them; weight decay is decoupled. A group that says
    "muon": True is of matrices, and trained with that.

    ema   decay of a moving average of the weights, 0 for none; it warms up as (1 + n) / (10 + n)
    gloo  a process group for what lies on the CPU; None is the default group
    """

    def __init__(self, groups, ema=0.0, rank=0, world=1, gloo=None):
        groups = [group | {"params": [p for p in group["params"] if p.requires_grad]} for group in groups]
        self.params = [p for group in groups for p in group["params"]]
        self.rank, self.world, self.gloo, self.decay, self.steps = rank, world, gloo, ema, 0
        self.pieces = shard(groups, world)
        self.mine = [piece for piece in self.pieces if piece.owner == rank]
        self.on_host = self.params[0].device.type == "cpu"
        self.masters = [piece.of(piece.param.data) for piece in self.mine]
        if not self.on_host:
            self.masters = [home.copy_(numbers) for home, numbers in zip(self.pinned(), self.masters)]
            self.grads, self.arrived = self.pinned(), set()
            self.stream = torch.cuda.Stream(self.params[0].device)
        self.averages = [master.clone() for master in self.masters] if ema else []
        self.muon = {g for g, group in enumerate(groups) if group.get("muon")}
        others = [(master, piece) for master, piece in zip(self.masters, self.mine) if piece.group not in self.muon]
        self.inner = torch.optim.AdamW(
            [group | {"params": [master for master, piece in others if piece.group == g]}
             for g, group in enumerate(groups)], fused=True)
        self.inner.state |= {master: {"exp_avg": torch.zeros_like(master)} for master, _ in self.matrices()}
        self.last_micro_batch = True  # the loop says so: gradients leave once they are whole

    @property
    def param_groups(self):
        return self.inner.param_groups

    def matrices(self):
        """(master, piece) of all that this rank trains with Muon; AdamW leaves their state alone."""
        return [(master, piece) for master, piece in zip(self.masters, self.mine) if piece.group in self.muon]

    def pinned(self) -> list[torch.Tensor]:
        """Memory for this rank's pieces, in one block: torch rounds every block up to a power of two."""
        sizes = [len(piece) for piece in self.mine]
        return list(torch.zeros(sum(sizes), dtype=self.params[0].dtype, pin_memory=True).split(sizes))

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
                    self.arrived.add(n)
                grad.record_stream(self.stream)

    @torch.no_grad()
    def step(self, clip=0.0, scale=1.0) -> float:
        """One update with gradients that are `scale` times too large -> their global norm, unscaled.

        clip  the largest norm that goes on unscaled; 0 for no limit

        Where the norm is not finite nothing changes, on any rank. Raises RuntimeError when a gradient is missing.
        """
        for master, grad in zip(self.masters, self.whole_gradients()):
            master.grad = grad
        norms = torch._foreach_norm([master.grad for master in self.masters]) if self.masters else []
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
            for master, piece in self.matrices():
                group, momentum = self.param_groups[piece.group], self.inner.state[master]["exp_avg"]
                muon_step(master, master.grad / divisor, momentum, len(piece.param), group["lr"], group["weight_decay"],
                          piece.param.device)
            self.update_average()
            self.gather()
        return norm

    def whole_gradients(self) -> list[torch.Tensor]:
        """This rank's share of the gradients. Raises RuntimeError unless there is one for every parameter."""
        if self.on_host:
            missing = sum(piece.param.grad is None for piece in self.mine)
        else:
            self.stream.synchronize()
            missing = len(self.mine) - len(self.arrived)
            self.arrived.clear()
        if missing:
            raise RuntimeError(f"every parameter must get a gradient, {missing} of {len(self.mine)} pieces got none: "
                               "freeze what the loss does not depend on, with requires_grad_(False)")
        return [piece.of(piece.param.grad) for piece in self.mine] if self.on_host else self.grads

    def update_average(self):
        if self.averages:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))  # young averages forget fast
            torch._foreach_lerp_(self.averages, self.masters, 1 - decay)
        self.steps += 1

    def gather(self):
        """Bring the updated weights from the shards to every rank's parameters."""
        if not self.on_host:
            for piece, master in zip(self.mine, self.masters):
                piece.of(piece.param).copy_(master, non_blocking=True)
        for owner in range(self.world if self.world > 1 else 0):
            for pieces in chunks([piece for piece in self.pieces if piece.owner == owner]):
                flat = torch.cat([piece.of(piece.param) for piece in pieces])
                dist.broadcast(flat, owner)
                if owner != self.rank:
                    for piece, numbers in zip(pieces, flat.split(list(map(len, pieces)))):
                        piece.of(piece.param).copy_(numbers)

    # -----------------------------------------------------------------------------------------------------------------
    # The moving average in place of the weights

    @contextmanager
    def averaged(self, module: nn.Module):
        """Context manager: swap the EMA weights, where there are any, into the module on rank 0. All ranks must enter.

        Yields a context manager for saving: inside it the module's parameters are the host's own copy of the same
        numbers, so that a file is written from there.
        """
        held = self.averages if self.decay else self.masters if self.world == 1 else None
        full = None if held is None else self.whole(held)
        in_host_memory = nullcontext() if full is None else replaced(module, dict(zip(self.params, full)))
        if self.on_host:
            with in_host_memory:
                yield nullcontext()
            return
        if self.decay and full is not None:
            for p, average in zip(self.params, full):
                p.data.copy_(average)
        yield in_host_memory
        if self.decay:
            self.gather()  # the masters hold what was overwritten

    # -----------------------------------------------------------------------------------------------------------------
    # State, whole: it does not depend on how many ranks there are

    def whole(self, shards: list[torch.Tensor], without=()) -> list[torch.Tensor | None] | None:
        """Gather on rank 0, in host memory, what every rank holds a shard of -> one tensor a parameter, None for those
        of the groups that are `without`; elsewhere None.

        Every rank must call it. With one rank these are views.
        """
        held = {id(piece): numbers for piece, numbers in zip(self.mine, shards) if piece.group not in without}
        if self.rank:
            for numbers in held.values():
                dist.send(numbers.contiguous(), 0, group=self.gloo)
            return None
        pieces, full = [piece for piece in self.pieces if piece.group not in without], {}
        if self.world == 1:
            for piece in pieces:
                full[piece.param] = held[id(piece)].as_strided(piece.param.shape, piece.param.stride())
            return [full.get(p) for p in self.params]
        full = {piece.param: torch.empty_like(piece.param, device="cpu") for piece in pieces}
        for piece in pieces:
            place = piece.of(full[piece.param])
            if piece.owner:
                dist.recv(place, piece.owner, group=self.gloo)
            else:
                place.copy_(held[id(piece)])
        return [full.get(p) for p in self.params]

    def state_dict(self) -> dict:
        """Moments and moving average, whole on rank 0, without the tensors elsewhere. Every rank must call it.

        Muon's momentum is among AdamW's first moments; of second ones it has none.
        """
        state = [self.inner.state.get(m) or dict.fromkeys(MOMENTS, torch.zeros_like(m)) for m in self.masters]
        parts = {name: self.whole([s.get(name) for s in state], without)
                 for name, without in zip(MOMENTS, ((), self.muon))}
        if self.decay:
            parts["average"] = self.whole(self.averages)
        return parts | {"steps": self.steps}

    def load_state_dict(self, state: dict):
        """Take this rank's share of a whole state. The parameters must have been loaded before.

        Raises RuntimeError when other parameters were trained with Muon.
        """
        matrices = {piece.param for piece in self.pieces if piece.group in self.muon}
        if [moment is None for moment in state["exp_avg_sq"]] != [p in matrices for p in self.params]:
            raise RuntimeError("its matrices had another optimizer")
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
                moments = {name: share(name, piece).clone() for name in MOMENTS[: 1 if piece.group in self.muon else 2]}
                self.inner.state[master] = {"step": torch.tensor(float(self.steps))} | moments


def chunks(pieces: list[Piece]):
    """Yield runs of pieces of at most CHUNK numbers; a piece that is longer itself is a run of its own."""
    run, size = [], 0
    for piece in pieces:
        if run and size + len(piece) > CHUNK:
            yield run
            run, size = [], 0
        run.append(piece)
        size += len(piece)
    if run:
        yield run


def reduce_and_receive(optimizer: OffloadAdamW, bucket: dist.GradBucket):
    """DDP's communication hook: the mean over the ranks, and then off to the host."""
    flat = bucket.buffer().div_(optimizer.world)

    def received(future):
        # not bucket.gradients(): those are views in the order of dimensions, whatever the layout of the parameter
        optimizer.receive(bucket.parameters(), [p.grad for p in bucket.parameters()])
        return future.value()[0]

    return dist.all_reduce(flat, async_op=True).get_future().then(received)


@contextmanager
def replaced(module: nn.Module, values: dict):
    """Context manager: have a module use other tensors in place of some of its parameters, without a copy."""
    places = [(owner, name, p) for owner in module.modules() for name, p in owner.named_parameters(recurse=False)
              if p in values]
    for owner, name, p in places:  # torch's attention rounds otherwise where nothing requires a gradient
        setattr(owner, name, nn.Parameter(values[p], p.requires_grad))
    try:
        yield
    finally:
        for owner, name, p in places:
            setattr(owner, name, p)
