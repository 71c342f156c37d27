"""Files of weights: every tensor by name, mapped into memory."""

import os
import re
import stat
import zipfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from cli import one_line, warn
from sd.shapes import EXPECTED

# How files begin that are taken for checkpoints, and what they are.
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`, or download it",
    b"GGUF": "a GGUF file, whose weights are quantised: take the .safetensors that it was made from",
    b"\x1f\x8b": "a compressed archive: unpack it",
    b"7z\xbc\xaf": "a compressed archive: unpack it",
    b"Rar!": "a compressed archive: unpack it",
    b"\x89HDF": "an HDF5 file, of Keras perhaps",
    b"\x80": "a Python pickle that torch.save did not write",
}
ENDINGS = {".onnx": "an ONNX file", ".engine": "a TensorRT engine", ".plan": "a TensorRT engine",
           ".trt": "a TensorRT engine", ".msgpack": "a Flax checkpoint"}
LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save began files with, up to torch 1.5
NESTED = ("state_dict", "model", "module", "weights", "model_state_dict")  # where a trainer puts the tensors
PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


class Inert:
    """Stands in for all that a .ckpt pickles besides tensors (a trainer's callbacks, say): none of it is ever run."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class Opened(NamedTuple):
    get: Callable[[str], torch.Tensor]  # name -> tensor
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    mapped: bool = True  # or read into memory as a whole


def open_weights(path: str) -> Opened:
    """Open a file of tensors. Raises ValueError on one that is none, or only a part; no code in it is ever run.

    Safetensors or PyTorch is told by the first bytes, as names mislead.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)  # to open a named pipe would be to wait
        with open(path if regular else os.devnull, "rb") as file:
            start = file.read(512)
        if start[8:9] == b"{":
            file = safe_open(path, framework="pt")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return Opened(partial(stored_tensor, path, file), shapes, file.metadata() or {})
    except (SafetensorError, RuntimeError) as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if start.startswith(b"PK\3\4") or LEGACY in start[:32]:
        content, mapped = read_pickle(path, start.startswith(b"PK"))
        tensors = named_tensors(path, content)
        return Opened(tensors.__getitem__, {name: tuple(t.shape) for name, t in tensors.items()}, {}, mapped)
    raise ValueError(f"{path} is neither a safetensors file nor a PyTorch checkpoint (.ckpt): it "
                     + (what_else(path, start) if regular else "is a pipe, a device or a folder"))


def stored_tensor(path: str, file, name: str) -> torch.Tensor:
    """A tensor of an open safetensors file. Raises ValueError on numbers that torch has no type for, of 6 bits say."""
    try:
        return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: {name} cannot be read: {one_line(error)}") from error


def damaged(path: str, error: Exception) -> ValueError:
    return ValueError(f"{path} is not whole (a download that stopped?), or damaged: {one_line(error)}")


def what_else(path: str, start: bytes) -> str:
    """What a file seems to be that holds no tensors, by how it begins and ends."""
    seems = [what for begins, what in OTHERS.items() if start.startswith(begins)]
    seems += [what for ending, what in ENDINGS.items() if path.lower().endswith(ending)]
    seems += ["a tar archive, as torch.save wrote before 2017, perhaps"] * (start[257:262] == b"ustar")
    words = "".join(start.decode("utf-8", "ignore").split())
    seems += ["text, a web page instead of the download perhaps"] * (words.isprintable() and len(words) > 2)
    return (f"is {seems[0]}, and " if seems else "") + (f"begins with {start[:24]!r}" if start else "is empty")


def read_pickle(path: str, zipped: bool):
    """What torch.save wrote, and whether it is mapped: zip archives are, as since torch 1.6. Raises ValueError."""
    mapped = zipped and not path.endswith(".safetensors")  # torch goes by the name
    if zipped:
        check_archive(path)
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        with torch.serialization.safe_globals([(Inert, name) for name in others]), open(path, "rb") as file:
            return torch.load(path if mapped else file, map_location="cpu", mmap=mapped, weights_only=True), mapped
    except OSError:
        raise
    except Exception as error:  # what is damaged or hostile makes an unpickler fail in any way
        if re.search(r"GLOBAL|function|to load|create new|type", str(error)) and not isinstance(error, RuntimeError):
            raise ValueError(f"{path} is refused: besides tensors it pickles what could run as a program") from error
        raise damaged(path, error) from error


def check_archive(path: str):
    """Raise ValueError on a zip archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise damaged(path, error) from error
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise ValueError(f"{path} is a program, a TorchScript archive; {EXPECTED}")
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive of other things: unpack it, and give the checkpoint in it")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} was compressed after torch.save wrote it: unpack it, and pack it without compression")


def named_tensors(path: str, content) -> dict[str, torch.Tensor]:
    """The tensors in what was unpickled, wherever a trainer put them. Raises ValueError where there are none."""
    if isinstance(content, dict) and {"step", "module", "optimizer"} <= content.keys():
        raise ValueError(f"{path} is a run's step file, to resume from: use the model.safetensors beside it")
    if isinstance(content, dict) and {"state", "param_groups"} <= content.keys():
        raise ValueError(f"{path} is the state of an optimizer; {EXPECTED}")
    for _ in NESTED:
        if isinstance(content, dict):
            content = next((content[key] for key in NESTED if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict):
        kind = "program's object" if isinstance(content, Inert) else type(content).__name__
        raise ValueError(f"{path} holds a {kind} and not named tensors; {EXPECTED}")
    tensors = {n: t.detach() for n, t in content.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}
    for name, t in tensors.items():
        if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized or len(t.untyped_storage()) < t.nbytes:
            raise ValueError(f"{path} is refused: {name} is no plain tensor")
    return tensors


class Weights:
    """The tensors of some files: all shapes at once, each tensor when it is asked for."""

    def __init__(self, what: str):
        self.what, self.shapes, self.home = what, {}, {}  # name -> shape; name -> (path, its name there)
        self.path, self.opened, self.copied, self.eighths = None, None, 0, False

    def add(self, path: str, prefix: str = ""):
        """The tensors of one more file, under prefix + name -> the file's metadata."""
        self.path, self.opened = path, open_weights(path)
        self.shapes |= {prefix + name: shape for name, shape in self.opened.shapes.items()}
        self.home |= {prefix + name: (path, name) for name in self.opened.shapes}
        return self.opened.metadata

    def strip(self, prefix: str):
        """Take a prefix off all names that begin with it."""
        self.shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items()}
        self.home = {name.removeprefix(prefix): home for name, home in self.home.items()}

    def read(self, name: str, device, dtype) -> torch.Tensor:
        """A view into the mapped file where that is what is wanted already, else a copy. Raises ValueError.

        What was read of a mapped file counts as memory until the map is closed: so now and then close it.
        """
        path, name = self.home[name]
        if path != self.path or self.opened.mapped and self.copied > 2**26:
            self.path, self.copied = path, 0
            self.opened = open_weights(path)
        stored = self.opened.get(name)
        if stored.dtype not in PLAIN:
            raise ValueError(f"{path}: {name} holds {str(stored.dtype).removeprefix('torch.')}, not floating-point "
                             "numbers: quantised weights cannot be used")
        if stored.element_size() == 1 and not self.eighths:
            self.eighths = True
            warn(f"{path} holds 8-bit floating-point numbers: they are used as they are, with what rounding lost")
        tensor = stored.to(device, dtype)
        self.copied += stored.nbytes if tensor is not stored else 0
        return tensor
