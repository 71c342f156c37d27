"""Files of weights: every tensor by name, mapped into memory."""

import pickle

import torch
from safetensors import SafetensorError, safe_open

from cli import one_line
from sd.shapes import EXPECTED


class Inert:
    """Stands in for all that a .ckpt pickles besides tensors (a trainer's callbacks, say): none of it is ever run."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def open_weights(path: str):
    """Map a file into memory -> (get: name -> tensor, {name: shape}, metadata: name -> text).

    Safetensors or PyTorch is told by the first bytes, as names mislead. Raises ValueError on neither, or only a part.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(24)
        if start[8:9] == b"{":
            file = safe_open(path, framework="pt")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return file.get_tensor, shapes, file.metadata() or {}
        if start.startswith(b"PK\3\4"):
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(Inert, name) for name in others]):
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if not isinstance(tensors, dict):
                raise ValueError(f"{path} holds a {type(tensors).__name__} and not named tensors; {EXPECTED}")
            tensors = tensors.get("state_dict", tensors)
            return tensors.__getitem__, {name: tuple(getattr(t, "shape", ())) for name, t in tensors.items()}, {}
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: besides tensors it pickles what could run as a program") from error
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is not whole (a download that stopped?), or damaged: {one_line(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    seems = f"it begins with {start!r}" if start else "it is empty"
    raise ValueError(f"{path} is neither a safetensors file nor a PyTorch checkpoint (.ckpt): {seems}")


class Weights:
    """The tensors of some files: all shapes at once, each tensor when it is asked for."""

    def __init__(self, what: str):
        self.what, self.shapes, self.home = what, {}, {}  # name -> shape; name -> (path, its name there)
        self.path, self.get, self.copied = None, None, 0

    def add(self, path: str, prefix: str = ""):
        """The tensors of one more file, under prefix + name -> the file's metadata."""
        _, shapes, metadata = open_weights(path)
        self.shapes |= {prefix + name: shape for name, shape in shapes.items()}
        self.home |= {prefix + name: (path, name) for name in shapes}
        return metadata

    def read(self, name: str, device, dtype) -> torch.Tensor:
        """A view into the mapped file where that is what is wanted already, else a copy.

        What was read of a mapped file counts as memory until the map is closed: so now and then close it.
        """
        path, name = self.home[name]
        if path != self.path or self.copied > 2**26:
            self.path, self.copied = path, 0
            self.get, _, _ = open_weights(path)
        mapped = self.get(name)
        tensor = mapped.to(device, dtype)
        self.copied += mapped.nbytes if tensor is not mapped else 0
        return tensor
