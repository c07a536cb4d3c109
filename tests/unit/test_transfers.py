# SPDX-License-Identifier: Apache-2.0
"""Copies beside the computation: nobody looks at one before its event, on a double that makes each as late as it may.

The double's device is the CPU. A copy from or to pinned memory leaves garbage in its target and is made when somebody
waits for an event behind it, so that a wait that is missing, or too early, gives other bytes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelslim import streams, transfers
from modelslim.loader import Loader
from modelslim.plan import make_plan
from modelslim.run import quantize
from modelslim.runners import engine
from modelslim.spill import HostStore, Spill
from modelslim.streams import Streams, streams_of
from modelslim.transfers import Arrival, Departure, Uploads, departure

GARBAGE = 0x7F
PIECE = 3 << 10
LOCK = threading.RLock()


class LateStream:
    """A stream whose copies wait in a queue."""

    def __init__(self, name: str, double: Double) -> None:
        self.name = name
        self.double = double
        self.waiting: deque[Callable[[], object]] = deque()
        self.begun = self.made = 0

    def begin(self, work: Callable[[], object]) -> None:
        with LOCK:
            self.waiting.append(work)
            self.begun += 1

    def make(self, count: int) -> None:
        with LOCK:
            while self.made < count:
                self.waiting.popleft()()
                self.made += 1

    def record_event(self) -> LateEvent:
        return LateEvent(self, self.begun)

    def wait_event(self, event: LateEvent) -> None:
        if self is self.double.main:  # computes at once
            event.pass_by()
        else:
            self.begin(event.pass_by)


class LateEvent:
    def __init__(self, stream: LateStream, count: int) -> None:
        self.stream = stream
        self.count = count

    def pass_by(self) -> None:
        self.stream.make(self.count)

    def synchronize(self) -> None:
        self.stream.double.waits.append(threading.current_thread().name)
        self.pass_by()


class Double(Streams):
    """See above.

    Attributes:
        waits: names of the threads that waited for an event.
        kept: addresses of device memory, and the stream for which it was kept.
        left: addresses of device memory that was copied to the host.
        held: bytes of device memory that were taken here and not freed; highest: the most of it.
    """

    def __init__(self, pins: bool = True) -> None:
        self.main, self.up, self.down = (LateStream(name, self) for name in ("main", "up", "down"))
        self.waits: list[str] = []
        self.kept: list[tuple[int, str]] = []
        self.left: list[int] = []
        self.taken: list[int] = []
        self.held = self.highest = 0
        self._can_pin = pins
        self._pinned: set[int] = set()
        self._stream = threading.local()

    def current(self) -> LateStream:
        found: LateStream = getattr(self._stream, "now", self.main)
        return found

    @contextmanager
    def on(self, stream: LateStream) -> Iterator[None]:
        before, self._stream.now = self.current(), stream
        yield
        self._stream.now = before

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() not in self._pinned

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = self._memory(shape, dtype, self._free)
        with LOCK:
            self.held += tensor.nbytes
            self.highest = max(self.highest, self.held)
        return tensor

    def _free(self, _address: int, nbytes: int) -> None:
        with LOCK:
            self.held -= nbytes

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        if not self._can_pin:
            return None
        tensor = self._memory(shape, dtype, lambda address, nbytes: self._pinned.discard(address))
        self._pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def copy(self, target: Tensor, source: Tensor) -> None:
        stream = self.current()
        if self.holds(target) and self.holds(source):  # the host's memory is not pinned
            stream.make(stream.begun)
            target.copy_(source)
            return
        if self.holds(source):
            self.left.append(source.untyped_storage().data_ptr())
        target.reshape(-1).view(torch.uint8).fill_(GARBAGE)
        there, here = target.detach(), source.detach()  # a copy begun knows addresses, whatever the objects become
        stream.begin(lambda: there.copy_(here))

    def keep(self, tensor: Tensor, stream: LateStream) -> None:
        self.kept.append((tensor.untyped_storage().data_ptr(), stream.name))

    @staticmethod
    def _memory(shape: Sequence[int], dtype: torch.dtype, free: Callable[[int, int], object]) -> Tensor:
        memory = np.full(prod(shape) * dtype.itemsize, GARBAGE, np.uint8)
        tensor = torch.from_numpy(memory) if len(memory) else torch.empty(0, dtype=torch.uint8)
        weakref.finalize(memory, free, tensor.data_ptr(), tensor.nbytes)  # when the last tensor on it is gone
        return tensor.view(dtype).view(tuple(shape))


@pytest.fixture(params=[True, False], ids=["pinned", "pageable"])
def double(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Double:
    return use(Double(request.param), monkeypatch)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Double:
    return use(Double(), monkeypatch)


def use(made: Double, monkeypatch: pytest.MonkeyPatch) -> Double:
    monkeypatch.setattr(transfers, "streams_of", lambda device: made)
    monkeypatch.setattr(transfers, "PIECE", PIECE)
    return made


def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# Parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_tensors_of_any_size_arrive_whole(double: Double, dtype: torch.dtype) -> None:
    wanted = {"large": some(97, 83, dtype=dtype), "one": some(5, dtype=dtype), "none": some(0, dtype=dtype)}
    wanted["scalar"] = wanted["one"].sum().to(dtype)
    uploads = Uploads("device")
    for _ in range(2):  # the buffers are used again
        arrival = uploads.begin(lambda bring: {name: bring(tensor) for name, tensor in wanted.items()})
        taken = arrival.take()
        assert all(torch.equal(taken[name], tensor) for name, tensor in wanted.items())
        assert all(taken[name].shape == tensor.shape for name, tensor in wanted.items())


def test_what_has_arrived_is_kept_for_the_stream_that_takes_it(late: Double) -> None:
    arrival = Uploads("device").begin(lambda bring: {"a": bring(some(64)), "b": bring(some(65))})
    assert late.kept == []
    assert late.kept == [(one.data_ptr(), "main") for one in arrival.take().values()]


def test_the_thread_that_computes_does_not_wait_for_copies(late: Double) -> None:
    uploads, arrivals = Uploads("device"), []
    reader = threading.Thread(
        target=lambda: arrivals.append(uploads.begin(lambda bring: {"a": bring(some(9, PIECE))})), name="reader"
    )
    reader.start()
    reader.join()
    taken = arrivals[0].take()
    with departure("device") as leaving:
        host = leaving.bring(taken["a"])
    assert set(late.waits) == {"reader"}
    assert not torch.equal(host, taken["a"]), "it is not there yet"
    leaving.wait()
    assert torch.equal(host, taken["a"])


def test_a_departure_is_behind_what_was_computed_and_keeps_what_leaves(late: Double) -> None:
    module = nn.Linear(33, 17).requires_grad_(False)
    weight = module.weight.detach().clone()
    with departure("device") as leaving:
        moved = leaving.bring_module(module)
    assert late.left and {(address, "down") for address in late.left} <= set(late.kept)
    leaving.wait()
    assert torch.equal(moved.weight, weight)


def test_what_comes_back_is_behind_what_left(late: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    def there_and_back() -> bool:
        tensor = some(64)
        with departure("device") as leaving:
            host = leaving.bring(tensor)
        return torch.equal(transfers.bring_back("a", host, leaving, "device").take()["a"], tensor)

    assert there_and_back()
    monkeypatch.setattr(LateStream, "wait_event", lambda self, event: self is late.main and event.pass_by())
    assert not there_and_back()


def test_on_the_cpu_nothing_is_copied() -> None:
    assert streams_of("cpu") is None
    tensor, module = some(7), nn.Linear(3, 3)
    address = module.weight.data_ptr()
    assert Uploads("cpu").begin(lambda bring: {"a": bring(tensor)}).take()["a"] is tensor
    with departure("cpu") as leaving:
        assert leaving.bring(tensor) is tensor
        assert leaving.bring_module(module).weight.data_ptr() == address
    assert leaving.done is None


def test_no_pinned_memory_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made: list[str] = []
    module = SimpleNamespace(Stream=lambda device: made.append(device))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)

    def refuse(*_: Any, **wanted: Any) -> Tensor:
        assert wanted["pin_memory"]
        raise RuntimeError("host allocation failed")

    monkeypatch.setattr(streams.torch, "empty", refuse)
    found = Streams("device:1")
    with caplog.at_level(logging.WARNING, "modelslim"):
        assert found.pinned((3,), torch.int8) is None and found.pinned((3,), torch.int8) is None
    assert made == ["device:1"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "no pinned memory (host allocation failed): copies from and to device:1 wait for each other"
    ]


# Activations that wait on the host


def store(ahead: bool = True) -> HostStore:
    made = HostStore("cpu")
    made.ahead = ahead  # as it is for an accelerator
    return made


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 0, 1, 2, 3, 3, 4), (4, 2, 0, 1, 3)])
def test_samples_come_back_to_the_bit(double: Double, order: Sequence[int]) -> None:
    with torch.no_grad(), closing(Spill(store(), nn.Linear(2, 2), ())) as spill:
        samples = [some(64, 64) + number for number in range(5)]
        wanted = [one.clone() for one in samples]
        for number, one in enumerate(samples):
            spill.sleep(number, one)
        for turn in (order, order, tuple(reversed(order)), order):
            for number in turn:
                spill.wake(number)
                assert torch.equal(samples[number], wanted[number])
                samples[number].add_(1)
                wanted[number].add_(1)
                spill.sleep(number, samples[number])
        assert {(address, "down") for address in double.left} <= set(double.kept)


def test_the_next_sample_is_fetched_while_one_is_at_work_and_no_more(
    late: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad(), closing(Spill(store(), nn.Linear(2, 2), ())) as spill:
        samples = [some(64, 64) + number for number in range(6)]
        size = samples[0].nbytes
        for _ in range(2):
            for number, one in enumerate(samples):
                spill.wake(number)
                spill.sleep(number, one)
        late.highest = late.held
        begun, fetch = [], HostStore.fetch

        def counted(self: HostStore, place: Any) -> Arrival:
            begun.append(place)
            return fetch(self, place)

        monkeypatch.setattr(HostStore, "fetch", counted)
        for number, one in enumerate(samples):
            spill.wake(number)
            assert len(begun) == number + 1, "this one was fetched before, and now the next is"
            spill.sleep(number, one)
        assert late.highest == 4 * size, "the one at work, the one before, the one that leaves and the one that comes"


def test_a_sample_that_is_not_the_one_expected_takes_its_place(late: Double) -> None:
    with torch.no_grad(), closing(Spill(store(), nn.Linear(2, 2), ())) as spill:
        samples = [some(64, 64) + number for number in range(6)]
        wanted = [one.clone() for one in samples]
        late.highest = 0
        for turn in ((0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4), (2, 1, 5, 4, 3, 0)):
            for number in turn:
                spill.wake(number)
                assert torch.equal(samples[number], wanted[number])
                spill.sleep(number, samples[number])
        assert late.highest <= 4 * samples[0].nbytes


# Runs

STATIC = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
PROTOCOLS = {
    "dynamic": ["{type: linear_quant, qconfig: {act: {scope: per_token}, weight: {dtype: int8}}}"],
    "static": [STATIC],
    "smooth": ["{type: iter_smooth}", STATIC],
    "smooth, float": ["{type: iter_smooth}", STATIC.replace("}}}", "}}, include: ['*self_attn*']}")],
    "gptq": [STATIC.replace("int8}}}", "int8, method: gptq}}}")],
}


def config_of(kind: str, data: Path, protocol: Callable[[str], Path]) -> Path:
    process = "".join(f"    - {entry}\n" for entry in PROTOCOLS[kind])
    return protocol(
        f"apiversion: modelslim_v1\nspec:\n  process:\n{process}  save: [{{type: ascendv1_saver}}]\n"
        f"  dataset: {data}\n  propagation: quantized\n"
    )


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith("report"))
    # What --debug keeps of a unit beside its tensors has seconds in it.
    found = (file for file in files if file.parent == folder or file.suffix == ".safetensors")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def spilling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelslim.spill._LEAST", 64)
    monkeypatch.setattr(
        engine, "make_spill", lambda layout, folder, model, inputs, device: Spill(store(), model, inputs)
    )


@pytest.mark.parametrize("kind", PROTOCOLS)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_moe"])
def test_a_run_gives_the_same_bytes(
    kind: str,
    model: str,
    calibration_file: Path,
    protocol: Callable[[str], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, config = request.getfixturevalue(model), config_of(kind, calibration_file, protocol)
    quantize(path, tmp_path / "plain", config, device="cpu", debug=kind == "static")
    late = use(Double(), monkeypatch)
    spilling(monkeypatch)
    quantize(path, tmp_path / "late", config, device="cpu", debug=kind == "static")
    assert late.up.made and late.down.made
    assert digests(tmp_path / "late") == digests(tmp_path / "plain")
    assert {(address, "down") for address in late.left} <= set(late.kept)


def no_wait(*_: Any) -> None:
    return None


class Forgetful:
    """A buffer that knows no event."""

    done = property(no_wait, no_wait)

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "a unit is used before it is there": (Arrival, "take", lambda self: self.tensors),
    "a result is written before it is there": (Departure, "wait", no_wait),
    "a buffer is filled before it is empty": (transfers, "_Buffer", Forgetful),
    "an event is recorded before the copies": (LateStream, "record_event", lambda self: LateEvent(self, 0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_double_notices_what_is_missing(
    fault: str,
    tiny_llama: Path,
    calibration_file: Path,
    protocol: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of("static", calibration_file, protocol)
    quantize(tiny_llama, tmp_path / "plain", config, device="cpu", check=False)
    use(Double(), monkeypatch)
    monkeypatch.setattr(*FAULTS[fault])
    try:
        quantize(tiny_llama, tmp_path / "late", config, device="cpu", check=False)
    except Exception:  # garbage may be no number, or of no use
        return
    assert digests(tmp_path / "late") != digests(tmp_path / "plain")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_at_most_two_units_are_on_the_device(
    kind: str,
    llama_factory: Callable[..., Path],
    calibration_file: Path,
    protocol: Callable[[str], Path],
    tmp_path: Path,
    late: Double,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = llama_factory(num_hidden_layers=6)
    config = config_of(kind, calibration_file, protocol)
    plan = make_plan(path, config, device="cpu")
    unit = plan.costs.job.units[0].held_bytes
    done = [threading.Event() for _ in range(6)]
    read, write = Loader.read_ahead, engine.Engine._write
    order = iter(done)

    def read_ahead(loader: Loader, names: Sequence[str]) -> Arrival:
        made = read(loader, names)
        next(order).set()
        return made

    def write_late(self: Any, unit: str, index: int, *others: Any) -> None:
        assert done[min(index + 1, 5)].wait(60), "the next unit is read beside this one"
        write(self, unit, index, *others)

    monkeypatch.setattr(Loader, "read_ahead", read_ahead)
    monkeypatch.setattr(engine.Engine, "_write", write_late)
    quantize(path, tmp_path / "late", config, device="cpu")
    assert late.highest == 2 * unit
    assert late.held == 0
    # KL per layer is read at the end, when the last unit has left the device.
    others = [name.split("_")[0] for name in late.waits if name != "MainThread"]
    assert set(others) == {"reader", "writer"} and len(late.waits) - len(others) <= 1
