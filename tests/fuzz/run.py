"""Fuzz the doors: mutated inputs, seeded, in processes that stay; a table of what came of them.

    python tests/fuzz/run.py                                            all doors, 2,000 inputs each
    python tests/fuzz/run.py --door lists --count 100 --seed 7
    python tests/fuzz/run.py --door lists --seed 7 --only 42            one input again; its folder is kept

A worker that hangs, dies or takes too much memory is ended and replaced. What went wrong is kept in --keep.
"""

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from multiprocessing.connection import wait

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), HERE]
from judge import MEMORY, SECONDS, Outcome, described, judge  # noqa: E402

import cli  # noqa: E402
from cli import option  # noqa: E402

NAMES = ("lists", "tars", "images", "clips", "animated", "gallery", "safetensors", "ckpt", "config.json", "configs",
         "command lines", "given")


def attempt(world, door: str, seed: int, n: int, folder: str) -> Outcome:
    """Make input n of a door in an empty folder, and judge it."""
    from doors import DOORS  # not above: the parent needs none of it

    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, for members that stand twice
        case = DOORS[door](random.Random(f"{door} {seed} {n}"), folder, world)
    return judge(world.watch, folder, case)


def work(pipe, scratch: str, folder: str):
    """Be a worker: receive (door, seed, n), send an Outcome."""
    sys.dont_write_bytecode = True
    import torch
    from doors import World

    torch.set_num_threads(1)
    world = World(scratch, os.path.dirname(folder))
    pipe.send(None)
    while job := pipe.recv():
        try:
            pipe.send(attempt(world, *job, folder))
        except Exception as error:
            pipe.send(Outcome("fuzzer", described(error)))


class Worker:
    """A process that judges one input after the other, watched from outside."""

    def __init__(self, scratch: str, n: int):
        self.scratch, self.folder, self.job = scratch, os.path.join(scratch, f"worker{n}", "in"), None
        self.start()

    def start(self):
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=work, args=(theirs, self.scratch, self.folder), daemon=True)
        self.process.start()
        theirs.close()
        self.ready, self.since, self.base = False, time.monotonic(), 0

    def give(self, job):
        self.job, self.since, self.base = job, time.monotonic(), self.resident()
        self.pipe.send(job)

    def resident(self) -> int:
        try:
            with open(f"/proc/{self.process.pid}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0

    def failing(self) -> str:
        """Why this worker must be ended: it hangs, or takes too much memory."""
        if self.job and time.monotonic() - self.since > 2 * SECONDS:  # what ends by itself in between is judged inside
            return "hang"
        return "memory" if self.job and self.resident() - self.base > 1.5 * MEMORY else ""

    def end(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


def fuzz(jobs: list, workers: int, scratch: str, keep: str):
    """Judge all jobs (door, seed, n), yield (job, Outcome) as they come, and keep the inputs of faults.

    What hangs is tried once more at the end: the machine may have been busy.
    """
    left, again, pool = list(reversed(jobs)), set(), [Worker(scratch, n) for n in range(min(workers, len(jobs)))]
    while busy := [w for w in pool if w.job or not w.ready or left]:
        for worker in busy:
            if worker.ready and not worker.job and left:
                worker.give(left.pop())
        ready, outcome = wait([w.pipe for w in busy], 0.2), None
        for worker in busy:
            if worker.pipe in ready:
                try:
                    outcome = worker.pipe.recv()
                    if not worker.ready:
                        worker.ready = True
                        continue
                except (EOFError, ConnectionError):
                    if not worker.job:
                        sys.exit("a worker cannot start")
                    worker.end()
                    outcome = Outcome("death", f"status {worker.process.exitcode}", time.monotonic() - worker.since)
                    worker.start()
            elif kind := worker.failing():
                seconds = time.monotonic() - worker.since
                outcome = Outcome(kind, f"ended after {seconds:.0f} s", seconds, worker.resident() - worker.base)
                worker.end()
                worker.start()
            else:
                continue
            job, worker.job = worker.job, None
            if outcome.kind == "hang" and job not in again:
                again.add(job)
                left.insert(0, job)
                continue
            if outcome.fault:
                kept = os.path.join(keep, "-".join(map(str, job)).replace(" ", "_"))
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(worker.folder, kept, symlinks=True, ignore=shutil.ignore_patterns("fifo.*"))
                with open(os.path.join(kept, "repeat"), "w") as file:
                    file.write(f"{repeat(job)}\n{outcome.kind}: {outcome.what}\n")
            yield job, outcome
    for worker in pool:
        worker.end()


def repeat(job) -> str:
    return f'python tests/fuzz/run.py --door "{job[0]}" --seed {job[1]} --only {job[2]}'


def table(found: dict) -> str:
    """Markdown: a row for each door."""
    lines = ["| door | inputs | right results | refused in one line | faults | seconds | largest growth of memory |",
             "|---|---|---|---|---|---|---|"]
    for door, outcomes in found.items():
        kinds = Counter(o.kind for o in outcomes)
        faults = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if kind not in ("right", "refused")) or "0"
        lines.append(f"| {door} | {len(outcomes):,} | {kinds['right']:,} | {kinds['refused']:,} | {faults} | "
                     f"{sum(o.seconds for o in outcomes):,.0f} | {max(o.growth for o in outcomes) / 2**20:,.0f} MiB |")
    return "\n".join(lines)


@dataclass
class Options:
    door: str = option("", "what to try; default: all", choices=("", *NAMES))
    count: int = option(2000, "inputs of each door", low=1)
    seed: int = option(0, "of the inputs")
    only: int | None = option(None, "the number of the one input to try")
    workers: int = option(1, "processes", low=1)
    keep: str = option(os.path.join(tempfile.gettempdir(), "fuzz-faults"), "where inputs that went wrong are kept")


def main():
    options = cli.parse(Options, __doc__)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    numbers = range(options.count) if options.only is None else [options.only]
    jobs = [(door, options.seed, n) for door in (options.door and [options.door] or NAMES) for n in numbers]
    os.makedirs(options.keep, exist_ok=True)
    scratch, found, faults = tempfile.mkdtemp(prefix="fuzz-"), defaultdict(list), {}
    try:
        for done, (job, outcome) in enumerate(fuzz(jobs, options.workers, scratch, options.keep), 1):
            found[job[0]].append(outcome)
            if outcome.fault:
                faults.setdefault((job[0], outcome.kind, outcome.what.split(" -> ")[0]), []).append((job, outcome))
            if options.only is not None:
                print(f"{outcome.kind}: {outcome.what} ({outcome.seconds:.1f} s, {outcome.growth >> 20} MiB)")
            elif done % 100 == 0:
                print(f"{done} of {len(jobs)}, {sum(map(len, faults.values()))} faults", file=sys.stderr, flush=True)
    finally:  # after Ctrl-C too
        shutil.rmtree(scratch, ignore_errors=True)
        print(table(found))
        for (door, kind, _), cases in faults.items():
            print(f"\n{door}, {len(cases)} x {kind}: {cases[0][1].what}\n    {repeat(cases[0][0])}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    cli.run(main)
