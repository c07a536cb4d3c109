# SPDX-License-Identifier: Apache-2.0
"""A source checkpoint: what is stored where, read tensor by tensor, nothing held.

Reading is by ``preadv`` into buffers of our own and not by memory mapping: mapped pages would stay
resident, and memory would grow with the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from modelslim.errors import ModelError, nearest
from modelslim.types import DecodedTensor

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # the format's own limit
_CHUNK = 8 << 20
_GGUF = "GGUF holds weights that are quantized already: give the folder of the float model, with config.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: its name in the checkpoint.
        dtype: its type in the words of safetensors, such as ``BF16``.
        shape: its shape.
        file: the file that holds it.
        offset: first byte in that file.
        nbytes: number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its type in torch."""
        return DTYPES[self.dtype]


class Checkpoint:
    """A directory in Hugging Face's layout, opened without reading a weight.

    Args:
        path: directory with safetensors files, found by ``model.safetensors.index.json``, else
            ``model.safetensors``, else every ``*.safetensors``.
        stored: its tensors, where somebody has found them already.

    Attributes:
        stored: every tensor as it lies on the disk, by name.
        tensors: the same after :meth:`decode`, which is what a run works on.

    Raises:
        ModelError: something is missing, truncated or contradicts itself; says which file.
    """

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor] | None = None) -> None:
        self.path = path
        if not path.exists():
            raise ModelError(f"{path}: no such directory", hint="--model_path is the directory that holds config.json")
        if not path.is_dir():
            raise ModelError(f"{path} is a file", hint="--model_path is the directory that holds config.json")
        self.stored: Mapping[str, StoredTensor] = _find_tensors(path) if stored is None else stored
        self.tensors: Mapping[str, StoredTensor] = self.stored
        self._decoded: Mapping[str, DecodedTensor] = {}
        self._files: dict[Path, int] = {}
        self._opening = Lock()  # a run reads in one thread and copies in another

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.path / "config.json")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def decode(self, decoded: Mapping[str, DecodedTensor]) -> None:
        """Show float tensors in place of the quantized ones that make them.

        ``tensors``, ``read`` and ``chunks`` then know the float tensors alone, each where the first of
        the stored ones was.

        Args:
            decoded: by name of the float tensor, as the adapter's ``get_decoded_tensors`` answers.
        """
        first = {tensor.keys[0]: name for name, tensor in decoded.items()}
        hidden = {key for tensor in decoded.values() for key in tensor.keys}
        tensors: dict[str, StoredTensor] = {}
        for key, stored in self.stored.items():
            if key in first:
                tensors[first[key]] = _as_float(stored, first[key], decoded[first[key]])
            elif key not in hidden:
                tensors[key] = stored
        self.tensors = tensors
        self._decoded = decoded

    def stored_bytes(self, name: str) -> int:
        """Bytes on the disk of one of ``tensors``, with all that makes it."""
        keys = self._decoded[name].keys if name in self._decoded else (name,)
        return sum(self.stored[key].nbytes for key in keys)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            ModelError: it holds NaN or infinity, or the file cannot be read or shrank meanwhile.
        """
        if name not in self._decoded:
            return self._read(self.stored[name])
        decoded = self._decoded[name]
        tensor = decoded.decode([self._read(self.stored[key]) for key in decoded.keys])
        if not _is_finite(tensor):
            raise _not_finite(self.tensors[name], tensor)
        return tensor

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces; each piece is valid until the next is asked for.

        Raises:
            ModelError: as for :meth:`read`.
        """
        if name in self._decoded:
            yield byte_view(self.read(name))
            return
        stored = self.tensors[name]
        buffer = torch.empty(min(_CHUNK, stored.nbytes), dtype=torch.uint8)
        view = byte_view(buffer)
        for start in range(0, stored.nbytes, _CHUNK):
            size = min(_CHUNK, stored.nbytes - start)
            self._fill(stored, start, view[:size])
            if not _is_finite(buffer[:size].view(stored.torch_dtype)):
                raise _not_finite(stored, self._load(stored))
            yield view[:size]

    def _read(self, stored: StoredTensor) -> Tensor:
        tensor = self._load(stored)
        if not _is_finite(tensor):
            raise _not_finite(stored, tensor)
        return tensor

    def _load(self, stored: StoredTensor) -> Tensor:
        tensor = torch.empty(stored.shape, dtype=stored.torch_dtype)
        if stored.nbytes:
            self._fill(stored, 0, byte_view(tensor))
        return tensor

    def _fill(self, stored: StoredTensor, start: int, view: memoryview) -> None:
        done = 0
        with _explained(stored.file):
            descriptor = self._descriptor(stored.file)
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], stored.offset + start + done)
                if not count:
                    raise ModelError(
                        f"{stored.file}: ends inside {stored.name}", hint="the file changed during the run"
                    )
                done += count

    def _descriptor(self, file: Path) -> int:
        with self._opening:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]


def _as_float(first: StoredTensor, name: str, decoded: DecodedTensor) -> StoredTensor:
    """A decoded tensor as the checkpoint shows it; ``first`` is the first of those that make it."""
    dtype: torch.dtype = getattr(torch, decoded.dtype)
    nbytes = prod(decoded.shape) * dtype.itemsize
    return replace(first, name=name, dtype=DTYPE_NAMES[dtype], shape=decoded.shape, nbytes=nbytes)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(_comparable(tensor))  # one pass; NaN and infinity both reach an extremum
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _not_finite(stored: StoredTensor, tensor: Tensor) -> ModelError:
    bad = int((~torch.isfinite(_comparable(tensor))).sum())
    return ModelError(
        f"{stored.file}: {stored.name} holds {bad} value{'s' if bad > 1 else ''} that "
        f"{'are' if bad > 1 else 'is'} NaN or infinite",
        hint="the source is damaged or was saved from a diverged run; download or export it again",
    )


def _comparable(tensor: Tensor) -> Tensor:
    """Torch compares no floats of eight bits."""
    return tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        ModelError: missing, not JSON, not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file", hint=_about_folder(file.parent)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}", hint="download or export it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds {type(value).__name__}, not an object")
    return value


def _about_folder(path: Path) -> str:
    """What to do about a folder that is no checkpoint, by what lies in it."""
    general = "--model_path must hold config.json, the weights and the tokenizer"
    if (path / "adapter_config.json").is_file():
        return "this is an adapter (LoRA): merge it into its base model, save that, and quantize the result"
    if any(path.glob("*.gguf")):
        return _GGUF
    below = [*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")]
    return f"did you mean '{min(below).parent}'? {general}" if below else general


def _find_tensors(path: Path) -> dict[str, StoredTensor]:
    index = path / INDEX
    if index.exists():
        return _read_indexed(index)
    single = path / "model.safetensors"
    files = [single] if single.exists() else sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern))
        if others:
            convert = "load it with transformers and save it with save_pretrained, which writes safetensors"
            raise ModelError(
                f"{path} holds {others[0]} and no safetensors file",
                hint=_GGUF if others[0].endswith(".gguf") else convert,
            )
        what = "is empty" if not any(path.iterdir()) else "holds no safetensors file"
        raise ModelError(f"{path} {what}", hint="--model_path must hold config.json, the weights and the tokenizer")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in tensors:
                raise ModelError(f"{name} is both in {tensors[name].file.name} and in {file.name}", hint=f"add {INDEX}")
            tensors[name] = stored
    return tensors


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(f"{index}: weight_map does not give every tensor the name of a file")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise ModelError(
            f"{index}: names {len(absent)} of {len(shards)} files that are not there: {', '.join(absent[:5])}",
            hint="the download is incomplete; fetch the missing files",
        )
    headers = {shard: read_header(index.parent / shard) for shard in shards}
    # A shard may hold what the index forgot; loaders that read whole files take it, and so it counts.
    tensors = {name: stored for header in headers.values() for name, stored in header.items()}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ModelError(
                f"{index}: says that {name} is in {shard}, which does not hold it",
                hint=nearest(name, headers[shard]) or "index and weight files belong to different models",
            )
        tensors[name] = headers[shard][name]
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by its header alone.

    Raises:
        ModelError: not a safetensors file, truncated, or a header that contradicts itself.
    """
    with _explained(file):
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ModelError(
                    f"{file}: not a whole safetensors file: {size} bytes, of which the header claims {length}",
                    hint="the file is truncated or of another kind; download it again",
                )
            raw = stream.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"))
        tensors = {
            name: _stored(file, name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: the safetensors header is damaged: {error!r}", hint="download it again") from error
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.offset, stored.nbytes)):
        if stored.offset != end:
            raise ModelError(
                f"{file}: the safetensors header is damaged: {stored.name} does not begin where the tensor before it "
                "ends",
                hint="download it again",
            )
        end += stored.nbytes
    if end != size:
        raise ModelError(
            f"{file}: {'truncated' if end > size else 'too long'}: {size} bytes, and the header describes {end}",
            hint="the download was interrupted or went wrong; fetch the file again",
        )
    return tensors


def _stored(file: Path, name: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    """An entry of a header.

    Args:
        start: where the data begin in the file.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
        ModelError: this version does not know its type, or its shape needs another number of bytes.
    """
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise TypeError(f"{name}: dtype is {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"{name}: shape is {shape!r}, data_offsets are {[first, last]!r}")
    if dtype not in DTYPES:
        raise ModelError(f"{file}: {name} has the type {dtype}", hint=nearest(dtype, DTYPES))
    stored = StoredTensor(name, dtype, tuple(shape), file, start + first, last - first)
    if prod(stored.shape) * stored.torch_dtype.itemsize != stored.nbytes:
        raise ModelError(f"{file}: {name} has {stored.nbytes} bytes, its shape {stored.shape} says otherwise")
    return stored


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn an OSError into a ModelError that names the file."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{file}: cannot be read: {error.strerror}", hint="check the file, its permissions and the disk"
        ) from error
