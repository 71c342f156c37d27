"""Checkpoints of a run: step-00000500.pt holds all that resuming needs. And the folder that they are in."""

import os
import re
import zipfile
from copy import deepcopy
from dataclasses import asdict

import torch

from cli import beside, warn
from clips.jobs import held
from training.config import Config
from training.offload import OffloadAdamW
from training.ranks import Ranks


def claimed(cfg: Config, ranks: Ranks):
    """Context manager: make out_dir, and keep other runs out of it. Raises ValueError when one is there."""
    return ranks.on_rank_0(held(cfg.out_dir))


def save_run(cfg: Config, ranks: Ranks, step: int, module, optimizer: OffloadAdamW, scale, log, data: str | None):
    """Write a checkpoint, then remove all but the newest `keep`. Every rank must call it.

    data  a hash of what the run trains on, where there is one

    Raises OSError when it cannot be written; the checkpoints before it stay whole.
    """
    state = {"step": step, "config": asdict(cfg), "module": module.state_dict(), "optimizer": optimizer.state_dict(),
             "scale": vars(scale), "log": log.state(), "samples": samples_a_step(cfg, ranks), "data": data}
    if ranks.rank:
        return
    with beside(os.path.join(cfg.out_dir, f"step-{step:08d}.pt")) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # its word for a full disk
            raise OSError("is the disk full? The checkpoints before it are whole") from error
    for old in run_checkpoints(cfg.out_dir)[: -cfg.keep]:
        os.remove(old)


def samples_a_step(cfg: Config, ranks: Ranks) -> int:
    return cfg.batch_size * cfg.accumulate * ranks.world


def run_checkpoints(out_dir: str) -> list[str]:
    """Paths of the checkpoints in a folder, oldest first."""
    return sorted(os.path.join(out_dir, name) for name in os.listdir(out_dir) if re.fullmatch(r"step-\d+\.pt", name))


def steps_done(out_dir: str) -> int:
    """The steps of the newest checkpoint in a folder, by its name; 0 without any."""
    found = run_checkpoints(out_dir) if os.path.isdir(out_dir) else []
    return int(os.path.basename(found[-1])[len("step-") : -len(".pt")]) if found else 0


def is_whole(path: str) -> bool:
    """Whether a checkpoint is what was written: torch.save leaves checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # whatever damage makes zipfile raise
        return False


def newest_whole(cfg: Config) -> str:
    """The checkpoint to resume from, "" for none. Damaged ones are renamed, out of the way of new ones.

    Raises ValueError when there is one and the config says resume = False.
    """
    found = run_checkpoints(cfg.out_dir)
    if found and not cfg.resume:
        raise ValueError(f"resume is False, but {found[-1]} is there: choose another out_dir, or remove it")
    for path in reversed(found):
        if is_whole(path):
            return path
        os.replace(path, path + ".damaged")
        warn(f"{path} is damaged, now called {path}.damaged: trying the one before")
    return ""


def load_run(cfg: Config, ranks: Ranks, path: str, module, optimizer: OffloadAdamW, scale, data: str | None):
    """Take up what save_run wrote -> (steps done, the log's state). Raises ValueError when it is of another model, or
    of other data.

    The file is mapped: there is no second copy in memory.
    """
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if data and state.get("data", data) not in (None, data):
        raise ValueError(f"{path} was trained on other clips or captions than there are now: choose another out_dir, "
                         f"or remove {cfg.out_dir}")
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        before, logged = state["samples"], deepcopy(state["log"])  # an early version did not write them
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is of another model or optimizer than the config's: choose another out_dir "
                         f"({str(error).splitlines()[0]})") from error
    if state["config"]["dtype"] == cfg.dtype:
        vars(scale).update(state["scale"])
    now = samples_a_step(cfg, ranks)
    if before != now and not ranks.rank:
        warn(f"a step was of {before} samples before, now of {now}: from here on they are others. To keep them, keep "
             "batch_size times accumulate times processes")
    return state["step"], logged
