"""This process among the others of its run: who it is, what it shares with them, and whether they still live.

torchrun starts the ranks, notices one that dies, names it and restarts all (`--max-restarts`). What it does not notice
is one that hangs, for which the others then wait in a collective for ever: that is the watchdog's part.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

POLL = 0.2  # seconds between two looks


class Ranks:
    """One process, or one of torchrun's: `rank` of `world`, on `device`. Use as a context: it leaves the group.

    timeout  seconds after which a rank that does nothing ends the job
    """

    def __init__(self, timeout: float):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpu, local, self.gloo = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0)), None
        if gpu and local >= torch.cuda.device_count():
            raise ValueError(f"{local + 1} processes on a machine with {torch.cuda.device_count()} GPUs: give torchrun "
                            "--nproc_per_node no more than that")
        self.device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            limit = timedelta(seconds=3 * timeout + 60)  # longer than the watchdog's, which can say for whom they wait
            client = store_client(serve=self.rank == 0)
            attempt = next_attempt(client, self.rank)
            dist.init_process_group("nccl" if gpu else "gloo", store=dist.PrefixStore(f"group {attempt}", client),
                                    rank=self.rank, world_size=self.world, timeout=limit)
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

    def at(self, place: str):
        """Tell the watchdog how far this rank has come."""
        if self.world > 1:
            self.watchdog.at(place)

    def patient(self):
        """A context in which no rank need come on, only be alive: downloads and disks are slow."""
        return self.watchdog.patient() if self.world > 1 else nullcontext()

    def from_rank_0(self, name: str, make):
        """What make() gives on rank 0, on all ranks; it may take days. JSON goes across. A name serves once."""
        if self.world == 1:
            return make()
        if self.rank == 0:
            with self.patient():
                value = make()
            self.watchdog.store.set(name, json.dumps(value))
            return value
        while not self.watchdog.store.check([name]):
            time.sleep(POLL)
        return json.loads(self.watchdog.store.get(name))

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Over all ranks, of a tensor on the CPU."""
        if self.world > 1:
            dist.all_reduce(numbers, group=self.gloo)
        return numbers


def store_client(serve=False) -> dist.Store:
    """Of the key-value store of all ranks: torchrun's, or without torchrun that of the process that serves it."""
    serve = serve and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serve,
                         timeout=timedelta(minutes=10), wait_for_workers=False)


def next_attempt(client: dist.Store, rank: int) -> int:
    """The number of this start of the ranks, the same on all. torchrun keeps its store when it restarts them, and they
    must not find the addresses of those before (with torch's own rendezvous they do); its own count of restarts differs
    from machine to machine. Rank 0 counts; the others wait for a number that no group was formed under, and that no
    process of their rank has joined."""
    if rank == 0:
        return client.add("attempt", 1)
    stale = max(client.add("formed", 0), client.add(f"joined by {rank}", 0))
    while (attempt := client.add("attempt", 0)) <= stale:
        time.sleep(POLL)
    client.set(f"joined by {rank}", str(attempt))
    return attempt


class Watchdog:
    """A thread that tells the other ranks how far this one has come, and ends the job when a rank stands still.

    A rank that hangs makes all others wait, so in the end all stand still: to blame is the one that has come least far,
    or whose own watchdog is silent too, because the process was stopped or its machine is gone.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.places, self.place, self.waiting, self.failed = 0, "start", False, False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def at(self, place: str):
        self.places, self.place = self.places + 1, place

    @contextmanager
    def patient(self):
        before, self.waiting = self.waiting, True
        yield
        self.waiting = before
        self.at("prepared")

    def stop(self, failed: bool):
        self.failed = failed
        self.ended.set()
        self.thread.join()

    def watch(self):
        names, beats, seen = [f"rank {r}" for r in range(self.world)], 0, {}
        while True:
            beats += 1
            ended = self.ended.is_set()
            mine = {"beat": beats, "places": self.places, "place": self.place, "waiting": self.waiting,
                    "ended": ended, "failed": self.failed}
            try:
                self.store.set(names[self.rank], json.dumps(mine))
                all_there = self.store.check(names)
                ranks = [json.loads(text) for text in self.store.multi_get(names)] if all_there else []
            except RuntimeError:  # the store went with the process that ran it
                self.leave("the store of rank 0's machine is gone")
            if ended:
                return
            now = time.monotonic()
            for r, state in enumerate(ranks):
                for what in ("beat", "places"):
                    if seen.get((r, what), (None,))[0] != state[what]:
                        seen[r, what] = state[what], now
            self.judge(ranks, seen, now)
            self.ended.wait(min(5.0, self.timeout / 10))

    def judge(self, ranks, seen, now):
        """End the job if a rank is silent or has failed, or none has moved."""
        for r, state in enumerate(ranks):
            if state["failed"]:  # on this machine torchrun sees to it; on others nobody does
                self.leave(f"rank {r} (last at: {state['place']}) ended with an error: the job ends")
        running = [r for r, state in enumerate(ranks) if not state["ended"]]
        if not running:
            return
        silent = [r for r in running if now - seen[r, "beat"][1] > self.timeout]
        if silent:
            self.end(silent, ranks, "gives no sign of life")
        elif all(now - seen[r, "places"][1] > self.timeout and not ranks[r]["waiting"] for r in running):
            least = min(ranks[r]["places"] for r in running)
            self.end([r for r in running if ranks[r]["places"] == least], ranks, "does not come on")

    def end(self, guilty, ranks, fault: str):
        if self.rank in guilty:  # where it hangs; gone first, so that torchrun names it too
            print(f"rank {self.rank} hangs here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            self.leave(f"rank {self.rank} {fault}: it ends after {self.timeout:g} s")
        time.sleep(1)
        places = ", ".join(f"rank {r} (last at: {ranks[r]['place']})" for r in guilty)
        self.leave(f"{places} {fault} since {self.timeout:g} s: the job ends")

    def leave(self, why: str):
        print(f"train.py: {why}", file=sys.stderr, flush=True)
        os._exit(1)


class Interrupt:
    """A context that notes SIGTERM and SIGINT, on whichever rank they arrive; the loop asks after every step. The
    second of them ends the process at once."""

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
