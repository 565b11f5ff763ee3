"""Files that survive a power cut, and notice it when they did not.

    keep = {"model": model, "adam": adam, "theta": theta}
    state = state_of(keep)  # one flat dict, like a state_dict
    write(path, {"state": state, "rng": rng_state()})
    restore(keep, read(path)["state"])

A file is written under a temporary name, synced to the disk and renamed, so that it is there whole
or not at all. It is what torch.save writes, a zip file, with a checksum of all its bytes as the zip
file's comment: torch.load reads it too, but does not notice a flipped bit, which `read` does.
"""

import io
import os
import re
import zlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves


class CheckpointError(Exception):
    """A file that is missing, damaged or of other flags; the message is one sentence."""


def write(path: Path, value: Any) -> None:
    """Write text, or what torch.save makes of any other value. Raises OSError, and leaves what was
    there before."""
    if isinstance(value, str):
        parts = [value.encode()]
    else:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = buffer.getbuffer()  # no copy: it can be larger than what else is in memory
        data[-2:] = b"\x08\x00"  # the last two bytes of a zip file are the length of its comment
        parts = [data, checksum(data)]

    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # it may be what fills the disk
        error.filename = error.filename or str(path)
        raise


def read(path: Path, **parts: type) -> Any:
    """What `write` made of a value: of a dict, with parts of these types, ints that are counts, finite
    in all its numbers.

    Nothing in the file is executed. Raises CheckpointError if it is missing, damaged, or has other
    parts, and OSError if it cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    data = path.read_bytes()
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        intact = data[-8:] == checksum(memoryview(data)[:-8]) and all(x.isfinite().all() for x in tensors)
        intact = intact and all(isinstance(value[name], kind) for name, kind in parts.items())
        intact = intact and all(0 <= value[name] <= 2**31 for name, kind in parts.items() if kind is int)
    except Exception as error:  # damaged bytes can lead the reader anywhere
        raise CheckpointError(f"{path} is damaged or not a checkpoint.") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged.")
    return value


def read_cache(path: Path, **parts: type) -> dict[str, Any]:
    """As `read`, of a dict that can be computed again: an empty one if the file is missing, damaged
    or has other parts."""
    try:
        return read(path, **parts)
    except CheckpointError:
        return {}


def named(name: str | Path, method: str) -> Path:
    """The file of a checkpoint. "pretrained" is the one that is shipped for a method; in a run's
    folder it is checkpoint.pt."""
    if str(name) == "pretrained":
        return Path(__file__).parent / "pretrained" / f"{method}.pt"
    return Path(name, "checkpoint.pt") if Path(name).is_dir() else Path(name)


def export(source: Path, target: Path, **flags: Any) -> None:
    """Write a checkpoint without what only a resumed run needs, such as Adam's averages, and without
    untrained learners. flags: replace those of the run, such as data_dir."""
    saved = read(source, args=dict, state=dict)
    parts = ("thetas", "rnn_sizes", "models", "settings", "sizes", "plateau", "evolution", "alpha")
    names = tuple(f"['{part}']" for part in parts)
    state = {k: v for k, v in saved["state"].items() if k.startswith(names) and "untrained" not in k}
    write(target, saved | {"args": saved["args"] | flags, "state": state})


def checksum(data: bytes | memoryview) -> bytes:
    """Eight hexadecimal digits, different for any two files that differ in 32 neighbouring bits or
    fewer."""
    return b"%08x" % zlib.crc32(data)


def state_of(keep: Any) -> dict[str, Any]:
    """The tensors in nested containers, and the state_dict of all else in them, by their paths."""
    leaves = tree_flatten_with_path(keep)[0]
    state = {}
    for path, leaf in leaves:
        state[keystr(path)] = leaf.detach() if isinstance(leaf, Tensor) else leaf.state_dict()
    return state


def restore(keep: Any, state: dict[str, Any], source: Path | str = "The checkpoint") -> None:
    """The opposite of state_of, in place; `state` may hold more. source: the file that it is of. Raises
    CheckpointError if a part is missing or does not fit."""
    for path, leaf in tree_flatten_with_path(keep)[0]:
        part = keystr(path)
        try:
            if isinstance(leaf, Tensor):
                leaf.data.copy_(_of_type(leaf, state[part]).view(leaf.shape))
            elif isinstance(leaf, torch.optim.Optimizer):
                leaf.load_state_dict(state[part])
                _of_types(leaf.state_dict()["state"], state[part]["state"])
                _try_step(leaf)
            else:
                if isinstance(leaf, torch.nn.Module):
                    _of_types(leaf.state_dict(), dict(state[part]))
                leaf.load_state_dict(state[part])
        except Exception as error:  # other flags, another version or another program wrote it
            names = ", ".join(map(_words, state)) or "nothing"
            raise CheckpointError(
                f"{source} has no '{_words(part)}' of the kind and size that these flags ask for; it has "
                f"{names}; use the flags of the run that wrote it, or another file."
            ) from error


def _of_type(own: Tensor, saved: Any) -> Tensor:
    """saved. Raises TypeError if it is no tensor of the type that `own` has."""
    if not isinstance(saved, Tensor) or (saved.dtype, saved.layout) != (own.dtype, own.layout):
        raise TypeError(f"{own.dtype} is needed")
    return saved


def _of_types(own: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Raises TypeError or KeyError if the tensors in nested dicts are not of the types of those in `own`."""
    for name, value in own.items():
        if isinstance(value, dict):
            _of_types(value, saved[name])
        elif isinstance(value, Tensor):
            _of_type(value, saved[name])


def _try_step(optimizer: torch.optim.Optimizer) -> None:
    """A step of a copy. Raises whatever averages or settings lead to that are not this optimiser's. Their
    sizes are checked before, since fused steps do not."""
    trial = deepcopy(optimizer)
    for parameter in [p for group in trial.param_groups for p in group["params"]]:
        parameter.grad = torch.zeros_like(parameter)
        sizes = (parameter.shape, (parameter.numel(),))
        for name, x in trial.state.get(parameter, {}).items():
            if isinstance(x, Tensor) and x.shape not in (((),) if name == "step" else sizes):
                raise ValueError(f"{name} has the size {tuple(x.shape)}")
    trial.step()


def _words(part: Any) -> str:
    """['thetas']['vsml'] as a person would write it."""
    return re.sub(r"\W+", " ", str(part)).strip()


def first_not_finite(state: dict[str, Any]) -> str | None:
    """The name of the first tensor in nested dicts and lists that holds NaN or infinity."""
    for path, leaf in tree_flatten_with_path(state)[0]:
        if isinstance(leaf, Tensor) and not leaf.isfinite().all():
            return _words(keystr(path))
    return None


def rng_state() -> list[Tensor]:
    """The state of torch's random numbers, on the CPU and, if it is used, on this process' GPU. All
    processes have drawn the same ones."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpu]


def set_rng_state(state: list[Tensor], source: Path | str = "the checkpoint") -> None:
    """Restore what `rng_state` returned. A GPU that was not there at that time keeps its state.
    source: the file that it is of. Raises CheckpointError if it is no such state."""
    try:
        torch.set_rng_state(state[0])
        if torch.cuda.is_initialized() and len(state) > 1:
            torch.cuda.set_rng_state(state[1])
    except (LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"The random state in {source} is damaged.") from error
