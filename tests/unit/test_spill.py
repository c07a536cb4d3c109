# SPDX-License-Identifier: Apache-2.0
"""Activations that give their memory away: they come back to the bit, and nobody can use them meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelslim.errors import SaveError
from modelslim.spill import FileStore, HostStore, Spill, Store


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["host", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = HostStore("cpu") if request.param == "host" else FileStore(tmp_path, "cpu")
    yield made
    made.close()


def spill_of(store: Store, inputs: Any = ()) -> Spill:
    return Spill(store, nn.Linear(2, 2), inputs)


def some(count: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 64, generator=generator).to(dtype) for _ in range(count)]


def weight(*tensors: Tensor) -> int:
    return sum(one.untyped_storage().nbytes() for one in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sleeping_tensors_weigh_nothing_and_come_back_to_the_bit(store: Store, dtype: torch.dtype) -> None:
    samples, spill = some(4, dtype), spill_of(store)
    before = [one.clone() for one in samples]
    for number, one in enumerate(samples):
        spill.sleep(number, ((one,), {"mask": None}))
    assert weight(*samples[:3]) == 0 and weight(samples[3]) == weight(before[3])
    for number, (one, wanted) in enumerate(zip(samples, before, strict=True)):
        spill.wake(number)
        assert torch.equal(one, wanted) and one.stride() == wanted.stride()
        spill.sleep(number, one)
    assert weight(*samples[:3]) == 0
    spill.close()


def test_what_a_frame_still_holds_sleeps_with_what_the_sample_waits_with_now(store: Store) -> None:
    spill = spill_of(store)
    (embeddings, hidden, other) = some(3)
    wanted = embeddings.clone()
    spill.sleep("a", embeddings)
    spill.sleep("b", other)
    spill.wake("a")
    spill.sleep("a", hidden)  # the forward went on, and its frame holds the embeddings
    spill.wake("b")
    spill.sleep("b", other)
    assert weight(embeddings, hidden) == 0
    spill.wake("a")
    assert torch.equal(embeddings, wanted)


def test_views_of_one_storage_stay_views_of_one_storage(store: Store) -> None:
    spill = spill_of(store)
    whole, other = some(2)
    part, wanted = whole[3:, ::2], whole.clone()
    spill.sleep("a", {"states": [part]})
    spill.sleep("b", other)
    assert weight(whole, part) == 0
    spill.wake("a")
    assert torch.equal(whole, wanted) and torch.equal(part, wanted[3:, ::2])
    part.add_(1)
    assert torch.equal(whole[3:, ::2], part)


def test_memory_that_somebody_else_looks_at_stays(store: Store) -> None:
    spill = spill_of(store)
    known, other = some(2)
    unknown = known.detach()
    spill.sleep("a", known)
    spill.sleep("b", other)
    assert weight(known) == weight(unknown) > 0


def test_what_two_samples_share_never_sleeps(store: Store) -> None:
    spill = spill_of(store)
    table, *own = some(4)
    for number, one in enumerate(own):
        spill.sleep(number, (one, table))
    assert weight(*own[:2]) == 0 and weight(table) > 0


def test_buffers_and_inputs_never_sleep(store: Store) -> None:
    model = nn.Module()
    buffer, given, other = some(3)
    model.register_buffer("table", buffer)
    spill = Spill(store, model, [{"ids": given}])
    spill.sleep("a", (buffer, given))
    spill.sleep("b", other)
    assert weight(buffer) > 0 and weight(given) > 0


def test_a_sleeping_tensor_that_another_sample_passes_on_wakes_for_good(store: Store) -> None:
    spill = spill_of(store)
    table, one, two = some(3)
    wanted = table.clone()
    spill.sleep("a", table)
    spill.sleep("b", one)
    assert weight(table) == 0
    spill.sleep("c", (two, table))
    spill.sleep("d", one)
    assert torch.equal(table, wanted)


def test_using_a_sleeping_tensor_is_an_error(store: Store) -> None:
    spill = spill_of(store)
    one, two = some(2, torch.float32)
    spill.sleep("a", one)
    spill.sleep("b", two)
    for use in (lambda: one + two, lambda: torch.cat([one, two]), lambda: two @ one, lambda: one[0]):
        with pytest.raises((RuntimeError, IndexError)):
            use()


def test_the_file_has_no_name_and_grows_no_more_than_what_sleeps_at_once(tmp_path: Path) -> None:
    store = FileStore(tmp_path, "cpu")
    spill = spill_of(store)
    samples = some(4)
    for _ in range(3):
        for number, one in enumerate(samples):
            spill.wake(number)
            spill.sleep(number, one)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(store._file.fileno()).st_size <= 4 * weight(samples[3])
    spill.close()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path, "cpu")
    spill = spill_of(store)
    one, two = some(2)

    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    spill.sleep("a", one)
    with pytest.raises(SaveError, match="the disk is full"):
        spill.sleep("b", two)
    store.close()
