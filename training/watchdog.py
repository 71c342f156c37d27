"""End a run in which a rank hangs: torchrun notices one that dies, but not one that waits for ever.

A thread of every rank writes a heartbeat and the rank's progress into the key-value store of the run, and reads those
of the others. A rank that hangs makes the others wait for it in a collective, so in the end none makes progress. To
blame is the one with the least progress, or the one whose heartbeat has stopped too: its process is stopped, or its
machine is gone.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from _thread import interrupt_main
from contextlib import contextmanager

import torch.distributed as dist

from cli import program


class Watchdog:
    """Heartbeat and progress of this rank, and the thread that judges those of all.

    timeout  seconds without heartbeat, or without progress of any rank, after which the job ends
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.progress, self.place = 0, "start"
        self.is_patient, self.failed = False, False
        self.grace = 0.0  # seconds that the main thread has to clean up when the job ends: it sees a SIGTERM
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def at(self, place: str):
        """Note progress, and what comes next."""
        self.progress, self.place = self.progress + 1, place

    @contextmanager
    def patient(self, place: str):
        """Context manager: suspend the progress check; heartbeats still count. Its end is progress."""
        self.at(place)
        before, self.is_patient = self.is_patient, True
        yield
        self.at(f"{place}: done")  # before the check is on again
        self.is_patient = before

    def stop(self, failed: bool):
        """End the thread, and tell the others how this rank ended."""
        self.failed = failed
        self.ended.set()
        self.thread.join()

    # -----------------------------------------------------------------------------------------------------------------
    # The thread

    def watch(self):
        """Publish this rank's state and judge all, several times per timeout, until `stop`."""
        names, heartbeat, seen = [f"rank {r}" for r in range(self.world)], 0, {}
        while True:
            heartbeat, ended = heartbeat + 1, self.ended.is_set()
            mine = {"heartbeat": heartbeat, "progress": self.progress, "place": self.place,
                    "patient": self.is_patient, "ended": ended, "failed": self.failed}
            try:
                self.store.set(names[self.rank], json.dumps(mine))
                all_there = self.store.check(names)
                states = [json.loads(text) for text in self.store.multi_get(names)] if all_there else []
            except RuntimeError:  # the store went with the process that ran it
                if not ended:  # at the end rank 0 may be the first to go
                    self.leave("the store of rank 0's machine is gone")
            if ended:
                return
            now = time.monotonic()
            for r, state in enumerate(states):
                for what in ("heartbeat", "progress"):
                    if seen.get((r, what), (None,))[0] != state[what]:
                        seen[r, what] = state[what], now
            self.judge(states, {key: now - since for key, (_, since) in seen.items()})
            self.ended.wait(min(5.0, self.timeout / 10))

    def judge(self, states: list[dict], age: dict):
        """End the job if a rank has failed or sends no heartbeat, or if no rank makes progress.

        age  (rank, "heartbeat" or "progress") -> seconds since it last changed
        """
        for r, state in enumerate(states):
            if state["failed"]:  # on this machine torchrun sees to it; on others nobody does
                self.leave(f"rank {r} (last at: {state['place']}) ended with an error: the job ends")
        running = [r for r, state in enumerate(states) if not state["ended"]]
        silent = [r for r in running if age[r, "heartbeat"] > self.timeout]
        if silent:
            self.end(silent, states, "sent no heartbeat")
        elif running and all(age[r, "progress"] > self.timeout and not states[r]["patient"] for r in running):
            least = min(states[r]["progress"] for r in running)
            self.end([r for r in running if states[r]["progress"] == least], states, "made no progress")

    def end(self, guilty: list[int], states: list[dict], fault: str):
        """Leave, a guilty rank first and with its stack: torchrun then names it as the cause."""
        fault += f" for {self.timeout:g} s"
        if self.rank in guilty:
            print(f"rank {self.rank} hangs here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            self.leave(f"rank {self.rank} {fault}: it ends")
        time.sleep(5)
        names = ", ".join(f"rank {r} (last at: {states[r]['place']})" for r in guilty)
        self.leave(f"{names} {fault}: the job ends")

    def leave(self, why: str):
        """End this process, whatever its main thread waits for, after its grace."""
        print(f"{program()}: {why}", file=sys.stderr, flush=True)
        if self.grace:
            interrupt_main(signal.SIGTERM)
            self.ended.wait(self.grace)  # until `stop`
        os._exit(1)
