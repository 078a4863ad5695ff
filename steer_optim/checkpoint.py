"""Optimizer state in one safetensors file, without pickle.

Tensors are stored as tensors; all the rest (structure, hyperparameters, counters) as JSON in the metadata, which keeps
every type. The file is written completely or not at all. Before :func:`load` changes anything, it verifies the file,
and that it fits the optimizer.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import uuid
from collections import Counter, OrderedDict
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from steer_optim.capture import is_dtensor

_FORMAT = "steer_optim.checkpoint"
_VERSION = "1"


def save(path: str | os.PathLike[str], optimizer: Optimizer, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write the state of an optimizer, and ``extra``, to one file.

    If a save fails, an old file stays unchanged and no new one is left; a killed process may also leave a hidden
    temporary file, which nothing reads. If several processes hold the same state, call this in one of them.

    Args:
        path: of the file, by convention ``*.safetensors``. An existing file is replaced and keeps its mode; a symbolic
            link is followed.
        optimizer: any torch optimizer; a ``SteeredOptimizer`` saves the memory of its rule, too.
        extra: anything else that training needs to resume, of the same step: the model, the step, random states, a
            ``Monitor.state_dict()``. Tensors, None, bool, int, float, str, and lists, tuples, dicts
            and OrderedDicts of them.

    Raises:
        OSError: the file could not be written: there is no such directory, no write permission, no space.
        TypeError: a value of another type, a tensor that safetensors cannot hold, or a DTensor, which
            ``torch.distributed.checkpoint`` saves; the message says where it is.

    Example:
        >>> import tempfile, torch
        >>> from steer_optim import checkpoint
        >>> path = tempfile.mkdtemp() + "/optimizer.safetensors"
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> checkpoint.save(path, optimizer, extra={"model": model.state_dict(), "rng": torch.get_rng_state()})
        >>> extra = checkpoint.load(path, optimizer)
        >>> model.load_state_dict(extra["model"])
        <All keys matched successfully>
        >>> torch.set_rng_state(extra["rng"])
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch optimizer; got {type(optimizer).__name__}. The state_dict() of a Steering, and "
            "of further optimizers, goes into extra"
        )
    tensors: dict[str, Tensor] = {}
    content = {
        "class": _class(optimizer),
        "parameters": _parameters(optimizer),
        "optimizer": optimizer.state_dict(),
        "extra": extra if isinstance(extra, OrderedDict) else dict(extra or {}),
    }
    try:
        structure = json.dumps({key: _encode(value, key, tensors) for key, value in content.items()})
    except RecursionError as error:
        raise TypeError("extra is nested too deeply, or contains itself") from error
    metadata = {"format": _FORMAT, "version": _VERSION, "structure": structure, "sha256": _digest(structure, tensors)}
    path = _in_utf8(Path(os.path.realpath(path)))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to save {path.name} in: create it first")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file: choose another path")
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()  # with the mode that the umask leaves
        mode = (path if path.exists() else temporary).stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode & 0o7777)
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError | SafetensorError):
            found = re.search(r"(?:os error |code: )(\d+)", str(error))
            number = getattr(error, "errno", None) or (int(found[1]) if found else None)
            reason = os.strerror(number) if number else str(error)
            raise OSError(number, f"could not save, and changed nothing: {reason}", str(path)) from error
        raise
    with contextlib.suppress(OSError):  # the file exists by now; some systems cannot open a directory
        _flush(path.parent, os.O_RDONLY)


def load(path: str | os.PathLike[str], optimizer: Optimizer) -> dict[str, Any]:
    """Load a file of :func:`save` into an optimizer; training then continues bit for bit.

    Args:
        path: of the file.
        optimizer: of the same class and over parameters of the same shapes and dtypes, in the same order; its
            ``load_state_dict`` moves the state to their devices.

    Returns:
        ``extra`` as it was saved, tensors on the CPU.

    The checksum detects damage, not tampering: whoever can write the file can also change the checksum.

    Raises:
        OSError: there is no such file, or no read permission.
        ValueError: the file is truncated, damaged, of another kind or of a newer version, or does not fit the
            optimizer. The optimizer is then unchanged.

    Example: see :func:`save`.
    """
    path = _in_utf8(Path(path))
    content = _read(path)
    if content["class"] != _class(optimizer):
        raise ValueError(f"{path} holds the state of {content['class']}; the optimizer is {_class(optimizer)}")
    try:
        _check_parameters(path, content["parameters"], _parameters(optimizer))
        optimizer.load_state_dict(content["optimizer"])
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} was altered: {error!r}; take an older checkpoint") from error
    extra: dict[str, Any] = content["extra"]
    return extra


def _read(path: Path) -> dict[str, Any]:
    """Return the verified content; read again if another process replaced the file between safetensors' two opens."""
    while True:
        with path.open("rb") as file:  # tells a missing file from one without read permission
            before = os.fstat(file.fileno())
        try:
            return _read_once(path)
        except ValueError:
            now = path.stat()
            if (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns):
                raise


def _read_once(path: Path) -> dict[str, Any]:
    try:
        with torch.device("cpu"), safe_open(path, framework="pt") as file:  # whatever the default device
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not a checkpoint of steer_optim")
            version = metadata.get("version", "")
            if version != _VERSION:
                raise ValueError(
                    f"{path} has version {version!r} of the format, and this steer_optim reads version {_VERSION}: "
                    "it was written by a newer one; upgrade steer_optim"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: the file shrank below the size of its memory map
        with path.open("rb") as raw:
            head = raw.read(9)  # the length of the header in 8 bytes, and its first character
        if len(head) < 9 or head[8:] == b"{":
            raise ValueError(f"{path} is truncated or damaged ({error}); take an older checkpoint") from error
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    structure = metadata.get("structure", "")
    if _digest(structure, tensors) != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged or was altered: its checksum is wrong; take an older checkpoint")
    try:
        content = json.loads(structure)
        content = {key: _decode(content[key], tensors) for key in ("class", "parameters", "optimizer", "extra")}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} was altered: {error!r}; take an older checkpoint") from error
    if not isinstance(content["extra"], dict):
        raise ValueError(f"{path} was altered: extra is a {type(content['extra']).__name__}; take an older checkpoint")
    return content


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> object:
    """Return JSON for ``value``, its tensors moved to ``tensors``. Types must match exactly, so that none is lost."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (Tensor, torch.nn.Parameter):
        return {"tensor": _store(value, where, tensors)}
    if kind is list:
        return [_encode(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
    if kind is tuple:
        return {"tuple": _encode(list(value), where, tensors)}
    if kind in (dict, Counter):  # the milestones of a scheduler are a Counter
        keys = [_encode(key, f"a key of {where}", tensors) for key in value]
        values = [_encode(item, f"{where}.{key}", tensors) for key, item in value.items()]
        return {kind.__name__: list(zip(keys, values, strict=True))}
    if kind is OrderedDict:  # a module's state dict, whose attribute _metadata has the versions of its layers
        return {
            "OrderedDict": [_encode(dict(value), where, tensors), _encode(vars(value), f"{where}.__dict__", tensors)]
        }
    if is_dtensor(value):
        raise TypeError(
            f"{where} is a DTensor, of which this process may hold a part only, and a checkpoint is one file: save "
            "sharded training with torch.distributed.checkpoint, or pass full_tensor() of it"
        )
    raise TypeError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: convert it to a tensor, "
        "None, bool, int, float, str, list, tuple or dict"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decode(content, tensors))
    if kind in ("dict", "Counter"):
        decoded = {_decode(key, tensors): _decode(item, tensors) for key, item in content}
        return decoded if kind == "dict" else Counter(decoded)
    if kind == "OrderedDict":
        ordered = OrderedDict(_decode(content[0], tensors))
        vars(ordered).update(_decode(content[1], tensors))
        return ordered
    if kind != "tensor":
        raise ValueError(f"{kind!r} is not a known type")
    name, stride = content
    tensor = tensors[name]  # may be a map of the file
    steps = sorted((step, size) for step, size in zip(stride, tensor.shape, strict=True) if size != 1)
    if any(step != math.prod(size for _, size in steps[:i]) for i, (step, _) in enumerate(steps)) and tensor.numel():
        raise ValueError(f"strides {stride} of {name} do not fit its shape {tuple(tensor.shape)}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _store(value: Tensor, where: str, tensors: dict[str, Tensor]) -> tuple[str, tuple[int, ...]]:
    """Put a contiguous CPU copy into ``tensors``; return its name there, and the strides to restore."""
    if value.layout is not torch.strided or value.is_meta or not _storable(value.dtype):
        raise TypeError(
            f"safetensors cannot hold {where}, a {value.layout} tensor of {value.dtype} on {value.device}: convert it"
        )
    name = where.encode(errors="backslashreplace").decode()  # a name that os.fsdecode gave may be no text
    while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
        name += "'"
    like = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
    tensors[name] = like.copy_(value.detach())
    # Fused optimizers walk parameter and state in memory order, so a channels_last state must stay so.
    return name, torch.empty_like(value, device="meta").stride()


@functools.cache
def _storable(dtype: torch.dtype) -> bool:
    """Return whether the installed safetensors supports a dtype; it has no list of them, and its errors vary."""
    try:
        serialize({"probe": torch.empty(0, dtype=dtype, device="cpu")})
    except Exception:
        return False
    return True


def _digest(structure: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _class(optimizer: Optimizer) -> str:
    """Return the class name of the inner optimizer: a plain and a steered AdamW load each other's state."""
    return type(getattr(optimizer, "inner", optimizer)).__name__


def _parameters(optimizer: Optimizer) -> list[list[list[Any]]]:
    """Return name (None if it has none), dtype and shape of each parameter of each group."""
    return [
        [[n, str(p.dtype), list(p.shape)] for n, p in zip_longest(group.get("param_names") or (), group["params"])]
        for group in optimizer.param_groups
    ]


def _check_parameters(path: Path, saved: list[list[list[Any]]], found: list[list[list[Any]]]) -> None:
    sizes, found_sizes = [len(group) for group in saved], [len(group) for group in found]
    if sizes != found_sizes:
        raise ValueError(f"{path} holds parameter groups of sizes {sizes}; the optimizer has {found_sizes}")
    for g, (saved_group, group) in enumerate(zip(saved, found, strict=True)):
        for i, (a, b) in enumerate(zip(saved_group, group, strict=True)):
            # The wrappers of DDP and torch.compile change the names.
            names = [name and re.sub(r"^((module|_orig_mod)\.)+|\b_orig_mod\.", "", name) for name in (a[0], b[0])]
            if a[1:] != b[1:] or (names[0] != names[1] and None not in names):
                raise ValueError(
                    f"parameter {i} of group {g} is {_describe(a)} in {path}, and {_describe(b)} in the optimizer"
                )


def _describe(parameter: list[Any]) -> str:
    name, dtype, shape = parameter
    return f"{name or 'a'} {dtype} {tuple(shape)}"


def _in_utf8(path: Path) -> Path:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise OSError(errno.EILSEQ, "safetensors opens only paths that are valid UTF-8", str(path)) from error
    return path


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
