"""This process among those of its run: its rank and its device, and what it shares with the others.

torchrun starts the ranks, names one that dies, and restarts all (`--max-restarts`). The watchdog finds one that hangs.
"""

import io
import itertools
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from functools import cached_property, wraps

import torch
import torch.distributed as dist

from training.watchdog import Watchdog

POLL = 0.2  # seconds between two looks into the store


class Ranks:
    """One process, or one of torchrun's: `rank` of `world`, on `device`. As a context manager it leaves the group.

    timeout  seconds without progress after which the job ends
    """

    def __init__(self, timeout: float):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.gloo = None
        if self.world > 1:
            limit = timedelta(seconds=3 * timeout + 60)  # longer than the watchdog's, which says who is to blame
            client = store_client(serve=self.rank == 0)
            attempt = next_attempt(client, self.rank)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", rank=self.rank,
                                    store=dist.PrefixStore(f"group {attempt}", client), world_size=self.world,
                                    timeout=limit)
            self.gloo = dist.new_group(backend="gloo", timeout=limit)  # for what lies on the CPU
            client.set("formed", str(attempt))
            # a client of its own: the process group blocks the one that it waits with
            own = dist.PrefixStore(f"watchdog {attempt}", store_client())
            self.watchdog = Watchdog(own, self.rank, self.world, timeout)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.world > 1:
            self.watchdog.stop(failed=kind not in (None, SystemExit))
            if kind is None:
                dist.destroy_process_group()

    @cached_property
    def device(self) -> torch.device:
        return pick_own_device()

    def at(self, place: str):
        """Tell the watchdog that this rank makes progress, and where it is."""
        if self.world > 1:
            self.watchdog.at(place)

    def patient(self, place: str):
        """Context manager: suspend the progress check; heartbeats still count. For downloads and slow disks."""
        return self.watchdog.patient(place) if self.world > 1 else nullcontext()

    def from_rank_0(self, name: str, make):
        """Run make() on rank 0, which may take days -> its result on all ranks, sent as JSON. A name serves once."""
        if self.world == 1:
            return make()
        if self.rank == 0:
            with self.patient(name):
                value = make()
            self.watchdog.store.set(name, json.dumps(value))
            return value
        while not self.watchdog.store.check([name]):
            time.sleep(POLL)
        return json.loads(self.watchdog.store.get(name))

    def share(self, items) -> list:
        """Every world-th of some items, from this rank's first on."""
        return list(items)[self.rank :: self.world]

    def take(self, name: str, items: list):
        """Yield (n, items[n]) of what this rank takes: the next that no rank has taken, so that a slow one holds nobody
        up. A name serves once."""
        numbers = itertools.count() if self.world == 1 else iter(lambda: self.watchdog.store.add(name, 1) - 1, None)
        while (n := next(numbers)) < len(items):
            yield n, items[n]

    def on_rank_0(self, manager):
        """The context manager on rank 0; elsewhere one that does nothing."""
        return nullcontext() if self.rank else manager

    @contextmanager
    def held(self, name: str, manager):
        """Context manager: on all ranks what the manager gives on rank 0, where it ends when all are through."""
        with self.on_rank_0(manager) as value:
            yield self.from_rank_0(name, lambda: value)
            self.together()

    def together(self, name="together"):
        """Wait until every rank is here, by the store: gloo of torch 2.6 can deadlock where a collective comes just
        before the end of its group. A name serves once."""
        if self.world > 1:
            with suppress(RuntimeError):  # without torchrun the store goes with rank 0, which leaves when all are here
                self.watchdog.store.add(name, 1)
                while self.watchdog.store.add(name, 0) < self.world:
                    time.sleep(POLL)

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum a tensor on the CPU over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(numbers, group=self.gloo)
        return numbers


def shared(awaited: str, timeout=600.0):
    """Make a command of main(ranks), which runs alone or on every rank. Of several only rank 0 talks.

    awaited  a name that rank 0 gives by `from_rank_0`; the others begin then, so that what is wrong on all is told once
    timeout  seconds without a sign of life of a rank, after which the others end
    """

    def command(main):
        @wraps(main)
        def run():
            with Ranks(timeout) as ranks, ranks.patient("work"), silent() if ranks.rank else nullcontext():
                if ranks.world > 1:  # torchrun and the watchdog end the others: what they have begun is to be removed
                    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
                    ranks.watchdog.grace = 5.0
                if ranks.rank:
                    ranks.from_rank_0(awaited, None)
                main(ranks)

        return run

    return command


@contextmanager
def silent():
    """Context manager: say nothing."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def pick_own_device() -> torch.device:
    """The GPU of this process among those of its machine, else the CPU. Raises ValueError when there are too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ValueError(f"processes must not outnumber the {torch.cuda.device_count()} GPUs of this machine, got "
                         f"{local + 1}: lower torchrun's --nproc_per_node")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun allows one thread; AdamW wants this rank's share of the cores
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    return device


def store_client(serve=False) -> dist.Store:
    """Connect to the key-value store of all ranks: torchrun's, or without torchrun that of the rank that serves it."""
    serve = serve and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serve,
                         timeout=timedelta(minutes=10), wait_for_workers=False)


def next_attempt(client: dist.Store, rank: int) -> int:
    """The number of this start of the ranks, the same on all.

    torchrun keeps its store when it restarts the ranks, and they must not find the addresses of those before (with
    torch's own rendezvous they do); torchrun's own count of restarts differs from machine to machine. So rank 0 counts,
    and the others wait for a number under which no group was formed, and which no process of their rank has joined.
    """
    if rank == 0:
        return client.add("attempt", 1)
    stale = max(client.add("formed", 0), client.add(f"joined by {rank}", 0))
    while (attempt := client.add("attempt", 0)) <= stale:
        time.sleep(POLL)
    client.set(f"joined by {rank}", str(attempt))
    return attempt


class Interrupt:
    """Context manager: note SIGTERM and SIGINT on whichever rank they arrive. A second one ends the process at once.

    The loop asks after every step. Under NCCL a rank that waits for one that is gone never returns to Python to ask:
    torchrun then kills it after 30 s.
    """

    def __enter__(self):
        self.name = None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def anywhere(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop: all leave after the same step."""
        return ranks.sum(torch.tensor(float(self.name is not None))).item() > 0
