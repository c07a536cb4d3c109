# SPDX-License-Identifier: Apache-2.0
"""On an accelerator: the bytes of the CPU, copies that are waited for, and at most two units on it.

``pytest tests/accelerator`` on a machine that has one; skipped elsewhere.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from modelslim.devices import forget_peak, is_host, peak_device_memory, resolve_device
from modelslim.plan import Plan, make_plan
from modelslim.run import quantize, run_plan
from modelslim.spill import HostStore, Spill
from modelslim.streams import streams_of
from modelslim.transfers import PIECE, Uploads, departure

Protocol = Callable[[str], Path]


@pytest.fixture(scope="module")
def device() -> Iterator[str]:
    """The best accelerator here."""
    found = resolve_device(None)
    if is_host(found):
        pytest.skip("no accelerator here that this torch can use")
    yield found


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("report"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_moe"])
def test_rounding_to_nearest_gives_the_bytes_of_the_cpu(
    model: str,
    device: str,
    w8a8_dynamic: str,
    protocol: Protocol,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    path, config = request.getfixturevalue(model), protocol(w8a8_dynamic)
    for place in ("cpu", device):
        quantize(path, tmp_path / place.replace(":", ""), config, device=place)
    assert digests(tmp_path / device.replace(":", "")) == digests(tmp_path / "cpu")


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("activations", ["device", "host", "file"])
def test_where_activations_wait_changes_no_byte(
    activations: str,
    ahead: bool,
    device: str,
    tiny_llama: Path,
    w8a8_static: str,
    protocol: Protocol,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three runs each: a copy that is not waited for shows only now and then."""
    monkeypatch.setattr("modelslim.spill._LEAST", 64)
    config = protocol(w8a8_static)
    run_plan(laid_out(make_plan(tiny_llama, config, device=device), "device", False), tmp_path / "wanted")
    for number in range(3):
        plan = laid_out(make_plan(tiny_llama, config, device=device), activations, ahead)
        run_plan(plan, tmp_path / str(number))
        assert digests(tmp_path / str(number)) == digests(tmp_path / "wanted")


def laid_out(plan: Plan, activations: str, ahead: bool) -> Plan:
    """The plan with its activations there, whatever its budget."""
    layout = replace(plan.costs.layout, activations=activations, ahead=ahead)  # type: ignore[arg-type]
    plan.__dict__["costs"] = replace(plan.costs, layout=layout)  # the place of a cached property
    return plan


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_at_most_two_units_are_on_the_device(
    kind: str,
    device: str,
    llama_factory: Callable[..., Path],
    w8a8_dynamic: str,
    w8a8_static: str,
    protocol: Protocol,
    tmp_path: Path,
) -> None:
    """Beside them: their codes, statistics, the activations, and rounding in pieces, as the formula has it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = protocol(w8a8_dynamic if kind == "dynamic" else w8a8_static)
    peaks = {}
    for layers in (3, 9):
        plan = make_plan(llama_factory(num_hidden_layers=layers, **sizes), config, device=device)
        run_plan(plan, tmp_path / f"{kind}{layers}")  # also takes the libraries' own buffers
        forget_peak(device)
        before = sum(peak_device_memory(device).values())
        run_plan(make_plan(plan.checkpoint.path, config, device=device), tmp_path / f"{kind}{layers}again")
        peaks[layers] = sum(peak_device_memory(device).values()) - before
        (phase,) = (one for one in plan.costs.phases if one.name == "units")
        held = {name: nbytes for name, nbytes in phase.device.items() if name != "fixed"}
        # Codes of the unit before may still be leaving; torch rounds every tensor up, and float32 copies come and go.
        slack = held["codes"] + 3 * 4 * max(unit.largest for unit in plan.costs.job.units) + (8 << 20)
        assert peaks[layers] <= sum(held.values()) + slack, (peaks, held, slack)
    assert peaks[9] <= 1.05 * peaks[3]


def test_copies_arrive_whole_beside_a_busy_device(device: str) -> None:
    """The device computes all the while, so that a copy that nobody waits for would be late."""
    busy = torch.randn(2048, 2048, device=device)
    generator = torch.Generator().manual_seed(0)
    wanted = {
        str(size): torch.randint(-128, 127, (size,), generator=generator, dtype=torch.int8)
        for size in (1, 3 * PIECE + 5, PIECE, 1 << 20)
    }
    uploads, found = Uploads(device), []
    for _ in range(5):

        def read() -> None:
            found.append(uploads.begin(lambda bring: {name: bring(one) for name, one in wanted.items()}))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        reader.join()
        added = {name: one + 1 for name, one in found.pop().take().items()}
        with departure(device) as leaving:
            held = {name: leaving.bring(one) for name, one in added.items()}
        del added
        torch.full((1 << 24,), 7, dtype=torch.int8, device=device)  # takes memory that is free too early
        leaving.wait()
        assert all(torch.equal(held[name], one + 1) for name, one in wanted.items())


def test_waiting_samples_come_back_to_the_bit(device: str) -> None:
    with torch.no_grad(), closing(Spill(HostStore(device), nn.Linear(2, 2), ())) as spill:
        samples = [torch.full((512, 1024), float(number), device=device) for number in range(8)]
        for number, one in enumerate(samples):
            spill.sleep(number, one)
        for turn in range(6):
            for number, one in enumerate(samples):
                spill.wake(number)
                one.add_(1)
                spill.sleep(number, one)
            for number, one in enumerate(samples):
                spill.wake(number)
                assert bool((one == number + turn + 1).all())
                spill.sleep(number, one)


def test_memory_of_the_host_is_pinned(device: str) -> None:
    streams = streams_of(device)
    assert streams is not None
    memory = streams.pinned((5,), torch.int8)
    assert memory is not None and memory.is_pinned()
