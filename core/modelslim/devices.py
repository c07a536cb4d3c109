# SPDX-License-Identifier: Apache-2.0
"""Devices behind torch.accelerator; no other file names a kind of device."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modelslim.errors import PluginError, UsageError, closest

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("cpu", "cuda", "npu")
EXAMPLE = "cuda:0"
_GRAMMAR = re.compile(r"(?P<kind>[a-z]+)(?::(?P<indices>\d+(?:,\d+)*))?", re.IGNORECASE)


def resolve_device(text: str | None) -> str:
    """The one torch device that ``--device`` means; see ``resolve_devices``.

    Raises:
        UsageError: as there, or several devices are listed.
    """
    devices = resolve_devices(text)
    if len(devices) > 1:
        raise UsageError(
            f"--device {text!r} lists {len(devices)} devices, and one is used here", hint=f"use --device {devices[0]}"
        )
    return devices[0]


def resolve_devices(text: str | None, workers: int | None = None) -> list[str]:
    """The torch devices that ``--device`` means, one for each rank.

    Args:
        text: ``cpu``, ``cuda``, ``npu``, the latter two with indices as in ``cuda:1`` or ``npu:0,1,2,3``; None for
            the best device that is there.
        workers: how many ranks share the CPU; None for one.

    Raises:
        UsageError: the text is not a device, the device does not exist here, or workers are wanted elsewhere.
        PluginError: the device's torch extension is installed and cannot be loaded.
    """
    kind, indices = _parse(text) if text is not None else (_best().partition(":")[0], [])
    if kind == "cpu":
        if indices not in ([], [0]):
            raise UsageError(f"--device {text!r} does not exist", hint="the CPU has no index; use --device cpu")
        return ["cpu"] * (workers or 1)
    count = _count(kind)
    for index in indices or [0]:
        if index >= count:
            there = f"this machine has {count} ({kind}:0 to {kind}:{count - 1})" if count else "this machine has none"
            raise UsageError(f"--device {text!r} does not exist: {there}", hint=f"the best here is --device {_best()}")
    devices = [f"{kind}:{index}" for index in indices or [0]]
    if workers is not None and workers != len(devices):
        raise UsageError(
            f"--workers {workers} does not go with --device {text or kind}",
            hint=f"workers share the CPU; list the devices instead, as in --device {kind}:0,1",
        )
    return devices


def _parse(text: str) -> tuple[str, list[int]]:
    """Kind and indices that ``--device`` says."""
    match = _GRAMMAR.fullmatch(text)
    if match is None or match["kind"].lower() not in KINDS:
        word = text.partition(":")[0].lower()
        if word == "gpu":
            word = "cuda"
        raise UsageError(
            f"--device {text!r} is not a device",
            hint=f"{_meant(word)}write cpu, cuda, cuda:0, npu or npu:0,1; the best here is --device {_best()}",
        )
    indices = [int(index) for index in match["indices"].split(",")] if match["indices"] else []
    if len(set(indices)) != len(indices):
        raise UsageError(f"--device {text!r} lists an index twice", hint="list every device once")
    return match["kind"].lower(), indices


def _meant(word: str) -> str:
    kind = closest(word, {one: one for one in KINDS})
    return f"did you mean {kind!r}? " if kind else ""


def _best() -> str:
    for kind in ("npu", "cuda"):
        if _count(kind):
            return f"{kind}:0"
    return "cpu"


def _count(kind: str) -> int:
    """Number of devices of a kind that torch can use here."""
    import torch

    if kind == "npu":
        _load_npu()
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def _load_npu() -> None:
    """Import the NPU's extension of torch, when it is installed."""
    from importlib.util import find_spec

    if "torch_npu" in sys.modules or find_spec("torch_npu") is None:
        return
    try:
        import torch_npu  # noqa: F401  (registers the device)
    except (ImportError, RuntimeError, OSError) as error:
        raise PluginError(
            f"torch_npu is installed and cannot be loaded: {error}",
            hint="source the CANN environment (set_env.sh), or uninstall torch_npu; with it installed and no CANN, "
            "torch itself needs TORCH_DEVICE_BACKEND_AUTOLOAD=0 to import",
        ) from error


def divide_threads(size: int) -> None:
    """Let this process take its part of the CPU's threads, of so many that compute beside each other."""
    import torch

    if size > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))


def prepare_threads() -> None:
    """Let idle compute threads sleep; spinning ones double the CPU seconds of a run. Call before importing torch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute without helper threads, where waking them costs more than they save.

    Elementwise work on blocks that fit the cache is such a case: one thread was as fast as two and
    took half the CPU seconds. Holds for the calling thread only.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def bfloat16_products(x: Tensor) -> Iterator[None]:
    """Multiply float32 copies of ``x`` on the bfloat16 units of the CPU, where ``x`` is bfloat16 and they exist.

    Exact, since the product of two bfloat16 numbers is a float32 number and sums stay float32; three
    times as fast. The setting holds for all threads, of which the others multiply no float32 matrices.
    """
    import torch

    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch before 2.9 has no such setting
    if matmul is None or not x.is_cpu or x.dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def describe_computer(device: str) -> dict[str, str]:
    """What of the hardware decides how sums are rounded: the same numbers come out where this is the same."""
    import torch

    facts = {"threads": str(torch.get_num_threads()), "instructions": torch.backends.cpu.get_cpu_capability()}
    if not device.startswith("cpu"):
        facts["accelerator"] = str(getattr(torch, device.partition(":")[0]).get_device_name(device))
    return facts


def set_device(device: str) -> None:
    """Let the calling thread use that device where none is named."""
    import torch

    if not device.startswith("cpu"):
        torch.accelerator.set_device_index(torch.device(device).index)


def communication_backend(device: str) -> str:
    """What torch.distributed is to speak between ranks on such devices; texts go between hosts as on the CPU."""
    backends = {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
    return backends.get(device.partition(":")[0], "gloo")


def work_alone(device: str) -> None:
    """Make the calling thread compute on a device and without helper threads; for threads beside the main one."""
    import torch

    torch.set_num_threads(1)
    set_device(device)


def synchronize(device: str) -> None:
    """Wait for what the calling thread computes on the device, so that a measured time is true; not for copies."""
    import torch

    if not device.startswith("cpu"):
        torch.get_device_module(device).current_stream(device).synchronize()


def is_host(device: str) -> bool:
    """True when the device computes in the computer's own memory."""
    return device.startswith("cpu")


def forget_peak(device: str) -> None:
    """Let the device's peak memory count from now on."""
    import torch

    if not device.startswith("cpu"):
        getattr(torch, device.partition(":")[0]).reset_peak_memory_stats(device)


def peak_device_memory(device: str) -> dict[str, int]:
    """Bytes of tensors that an accelerator held at most, by device; empty for the CPU, whose memory is the host's."""
    import torch

    if device.startswith("cpu"):
        return {}
    return {device: int(getattr(torch, device.partition(":")[0]).max_memory_allocated(device))}


def free_memory(device: str) -> int | None:
    """Bytes of an accelerator that nobody holds; None for the CPU."""
    import torch

    if device.startswith("cpu"):
        return None
    return int(getattr(torch, device.partition(":")[0]).mem_get_info(device)[0])


def has_integer_matmul(x: Tensor, weight: Tensor) -> bool:
    """True when the device multiplies int8 x [tokens, in] by int8 weight [out, in] and sums in 32 bits."""
    if x.is_cpu:
        return True
    # cuBLASLt wants more than 16 rows and dimensions in multiples of 8.
    return x.is_cuda and x.shape[0] > 16 and x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0
