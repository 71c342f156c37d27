"""Checkpoints of a run: step-00000500.pt holds all that a resume needs."""

import os
import re
import sys
import zipfile
from contextlib import suppress
from dataclasses import asdict

import torch

from training.config import Config
from training.offload import OffloadAdamW
from training.ranks import Ranks

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run: step-00000500.pt holds all that a resume needs


def save_run(cfg: Config, ranks: Ranks, step: int, module, optimizer: OffloadAdamW, scale, log):
    """Write beside, rename into place, then drop all but the newest `keep`. Every rank must call it.

    Raises ValueError when it cannot be written; the checkpoints before it stay whole.
    """
    state = {"step": step, "config": asdict(cfg), "module": module.state_dict(), "optimizer": optimizer.state_dict(),
             "scale": vars(scale), "log": log.state(), "samples": samples_a_step(cfg, ranks)}
    if ranks.rank:
        return
    path = os.path.join(cfg.out_dir, f"step-{step:08d}.pt")
    try:
        torch.save(state, path + ".part")
    except (OSError, RuntimeError) as error:  # of a full disk torch says RuntimeError
        with suppress(FileNotFoundError):
            os.remove(path + ".part")
        raise ValueError(f"{path} cannot be written, is the disk full? Those before it are whole ({error})") from error
    os.replace(path + ".part", path)
    for old in run_checkpoints(cfg.out_dir)[: -cfg.keep]:
        os.remove(old)


def samples_a_step(cfg: Config, ranks: Ranks) -> int:
    return cfg.batch_size * cfg.accumulate * ranks.world


def run_checkpoints(out_dir: str) -> list[str]:
    """Oldest first."""
    return sorted(os.path.join(out_dir, name) for name in os.listdir(out_dir) if re.fullmatch(r"step-\d+\.pt", name))


def is_whole(path: str) -> bool:
    """Whether what a checkpoint holds is what was written: torch.save leaves checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def newest_whole(cfg: Config) -> str:
    """The checkpoint to go on from, "" for none; damaged ones are named, and renamed out of the way of new ones."""
    found = run_checkpoints(cfg.out_dir)
    if found and not cfg.resume:
        raise ValueError(f"{found[-1]} is in the way of a run with resume = False: choose another out_dir, or remove it")
    for path in reversed(found):
        if is_whole(path):
            return path
        os.replace(path, path + ".damaged")
        print(f"{path} is damaged, it is {path}.damaged now: trying the one before", file=sys.stderr, flush=True)
    return ""


def load_run(cfg: Config, ranks: Ranks, path: str, module, optimizer: OffloadAdamW, scale):
    """Take up what save_run wrote -> (the step to go on with, the log's state). The file is mapped: no second copy in
    memory.

    Raises ValueError when it is of another model.
    """
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        before, logged = state["samples"], state["log"]  # of an earlier version there are none
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is of another model or optimizer than the config's: choose another out_dir "
                        f"({str(error).splitlines()[0]})") from error
    if state["config"]["dtype"] == cfg.dtype:
        vars(scale).update(state["scale"])
    now = samples_a_step(cfg, ranks)
    if before != now and not ranks.rank:
        print(f"a step saw {before} samples before, now {now}: it goes on with others than it would have. batch_size "
              "times accumulate times processes keeps them", file=sys.stderr, flush=True)
    return state["step"], logged
