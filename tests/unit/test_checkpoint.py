# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint: the same bytes as safetensors itself, and a clear error for whatever is broken."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelslim import checkpoint as module
from modelslim.checkpoint import DTYPES, INDEX, Checkpoint
from modelslim.errors import ModelError
from modelslim.types import DecodedTensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for dtype in DTYPES.values():
        name = str(dtype).removeprefix("torch.")
        for label, shape in (("matrix", (5, 7)), ("scalar", ()), ("none", (0, 3)), ("cube", (2, 1, 3))):
            if dtype.is_floating_point:
                tensor = torch.randn(shape, generator=generator).to(dtype)
            else:
                tensor = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)
            tensors[f"{name}.{label}"] = tensor
    return tensors


def write_sharded(path: Path, tensors: Mapping[str, Tensor], count: int) -> None:
    names = sorted(tensors)
    weight_map = {
        name: f"model-{position % count + 1:05d}-of-{count:05d}.safetensors" for position, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, path / shard)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def craft(file: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def assert_same(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), name
        assert raw(read) == raw(tensor), name
        assert b"".join(bytes(piece) for piece in checkpoint.chunks(name)) == raw(tensor), name


def test_every_dtype_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    save_file(every_dtype(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("count", [1, 3])
def test_shards_read_as_safetensors_reads_them(tmp_path: Path, count: int) -> None:
    write_sharded(tmp_path, every_dtype(), count)
    expected = {}
    for file in tmp_path.glob("*.safetensors"):
        expected.update(load_file(file))
    with Checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, expected)


def test_what_transformers_writes_reads_as_safetensors_reads_it(tiny_llama: Path, tiny_llama_sharded: Path) -> None:
    expected = load_file(tiny_llama / "model.safetensors")
    for path in (tiny_llama, tiny_llama_sharded):
        with Checkpoint(path) as checkpoint:
            assert_same(checkpoint, expected)
    assert len({stored.file for stored in Checkpoint(tiny_llama_sharded).tensors.values()}) > 1


def test_files_of_any_name_are_found_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "first.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "second.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, {"a": torch.ones(2), "b": torch.zeros(3)})


def test_a_tensor_larger_than_a_chunk_comes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)
    tensors = {"a": torch.arange(100, dtype=torch.float32), "b": torch.arange(16, dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert [len(piece) for piece in checkpoint.chunks("a")] == [64] * 6 + [16]
        assert [len(piece) for piece in checkpoint.chunks("b")] == [64]
        assert_same(checkpoint, tensors)


def test_a_read_is_continued_where_the_system_returned_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(37)}
    save_file(tensors, tmp_path / "model.safetensors")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: preadv(file, [views[0][:5]], offset))
    with Checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, tensors)


def test_a_read_tensor_is_memory_of_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        first = checkpoint.read("a")
        first.zero_()
        assert checkpoint.read("a").tolist() == [1, 1, 1, 1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
def test_leaving_the_context_closes_every_file(tiny_llama_sharded: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (one listing, no Path per entry)
    with Checkpoint(tiny_llama_sharded) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)
        assert len(os.listdir("/proc/self/fd")) > before  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_threads_that_open_a_file_at_once_leave_none_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader and the writer of a run share a checkpoint."""
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    together = threading.Barrier(2)
    opened, closed = [], []

    def slow_open(file: Path, flags: int, *, original: Callable[..., int] = os.open) -> int:
        descriptor = original(file, flags)
        opened.append(descriptor)
        with suppress(threading.BrokenBarrierError):  # the other thread is kept out, as it should be
            together.wait(timeout=0.3)
        return descriptor

    def noted_close(descriptor: int, original: Callable[[int], None] = os.close) -> None:
        closed.append(descriptor)
        original(descriptor)

    with Checkpoint(tmp_path) as checkpoint, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(os, "open", slow_open)
        monkeypatch.setattr(os, "close", noted_close)
        assert [tensor.tolist() for tensor in pool.map(checkpoint.read, ["a", "a"])] == [[1.0] * 4] * 2
    assert opened and opened == closed


def test_a_file_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"a": torch.arange(6, dtype=torch.int16).reshape(2, 3), "b": torch.ones(3)}, good)
    data = good.read_bytes()
    folder = tmp_path / "cut"
    folder.mkdir()
    for length in range(len(data)):
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(ModelError) as caught:
            Checkpoint(folder)
        assert "model.safetensors" in caught.value.message and caught.value.hint, length


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n", b"\0" * 64, b"x" * 200):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 500, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, file)
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(ModelError, match="safetensors"):
        Checkpoint(tmp_path)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED: dict[str, Any] = {
    "not JSON": b"{this is not json",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "a list": [],
    "a number": 7,
    "nested without end": b"[" * 100_000,
    "an entry that is a list": {"a": []},
    "an entry that is null": {"a": None},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "a dtype that is a number": {"a": {**GOOD, "dtype": 5}},
    "a dtype that is a list": {"a": {**GOOD, "dtype": ["F32"]}},
    "an unknown dtype": {"a": {**GOOD, "dtype": "F23"}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "a shape of fractions": {"a": {**GOOD, "shape": [2.0]}},
    "a shape of text": {"a": {**GOOD, "shape": ["2"]}},
    "a shape that is a number": {"a": {**GOOD, "shape": 2}},
    "a negative shape": {"a": {**GOOD, "shape": [-1, -2]}},
    "a shape of another size": {"a": {**GOOD, "shape": [3]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "one offset": {"a": {**GOOD, "data_offsets": [0]}},
    "offsets of text": {"a": {**GOOD, "data_offsets": ["0", "8"]}},
    "offsets of fractions": {"a": {**GOOD, "data_offsets": [0.0, 8.0]}},
    "offsets in the wrong order": {"a": {**GOOD, "data_offsets": [8, 0]}},
    "negative offsets": {"a": {**GOOD, "data_offsets": [-8, 0]}},
    "offsets behind the end": {"a": {**GOOD, "data_offsets": [8, 16]}},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_refused(tmp_path: Path, what: str) -> None:
    craft(tmp_path / "model.safetensors", DAMAGED[what], bytes(8))
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path)
    assert "model.safetensors" in caught.value.message


def test_the_nearest_dtype_is_offered(tmp_path: Path) -> None:
    craft(tmp_path / "model.safetensors", {"a": {**GOOD, "dtype": "f32"}}, bytes(8))
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path)
    assert caught.value.hint == "did you mean 'F32'?"


def test_random_damage_is_refused_wherever_safetensors_refuses_it(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.ones(3, dtype=torch.bool)}, good)
    data = good.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    chance = random.Random(3)
    file = tmp_path / "model.safetensors"
    refused = 0
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(header)
            damaged[place] = chance.choice(data[:header]) if chance.random() < 0.7 else chance.randrange(256)
        file.write_bytes(damaged)
        try:
            expected = load_file(file)
        except (SafetensorError, ValueError):
            expected = None
        try:
            with Checkpoint(tmp_path) as checkpoint:
                if expected is None:
                    raise AssertionError(f"accepted {bytes(damaged)!r}")
                assert_same(checkpoint, expected)
        except ModelError:
            assert expected is None, f"refused {bytes(damaged)!r}"
            refused += 1
    assert 250 < refused < 500


def test_tensors_that_overlap_or_leave_holes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for second, size in (([4, 12], 12), ([0, 8], 8), ([12, 20], 20)):
        craft(file, {"a": GOOD, "b": {**GOOD, "data_offsets": second}}, bytes(size))
        with pytest.raises(SafetensorError):
            load_file(file)
        with pytest.raises(ModelError, match="b does not begin where the tensor before it ends"):
            Checkpoint(tmp_path)
    craft(file, {"a": GOOD}, bytes(9))
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(ModelError, match="too long"):
        Checkpoint(tmp_path)


def test_an_index_that_names_absent_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, {name: torch.ones(1) for name in "abcd"}, 4)
    for number in (2, 4):
        (tmp_path / f"model-0000{number}-of-00004.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path)
    assert "names 2 of 4 files that are not there" in caught.value.message
    assert "model-00002-of-00004.safetensors, model-00004-of-00004.safetensors" in caught.value.message
    assert "download is incomplete" in caught.value.hint


def test_an_index_that_names_a_tensor_which_the_shard_lacks_is_refused(tmp_path: Path) -> None:
    save_file({"layers.0.weight": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"layers.0.wieght": "one.safetensors"}}))
    with pytest.raises(ModelError, match=r"layers\.0\.wieght is in one\.safetensors, which does not hold it") as e:
        Checkpoint(tmp_path)
    assert e.value.hint == "did you mean 'layers.0.weight'?"


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ["x"]}}]
)
def test_an_index_without_a_usable_map_is_refused(tmp_path: Path, index: Any) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="weight_map"):
        Checkpoint(tmp_path)


def test_one_name_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "first.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "second.safetensors")
    with pytest.raises(ModelError, match=r"a is both in first\.safetensors and in second\.safetensors") as caught:
        Checkpoint(tmp_path)
    assert INDEX in caught.value.hint


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_not_finite_are_refused_and_counted(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    tensor = torch.randn(4, 5).to(dtype)
    tensor[1, 2] = tensor[3, 4] = tensor[0, 0] = bad
    save_file({"layers.0.weight": tensor}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        for read in (checkpoint.read, lambda name: list(checkpoint.chunks(name))):
            with pytest.raises(ModelError, match=r"model\.safetensors: layers\.0\.weight holds 3 values that are NaN"):
                read("layers.0.weight")


@pytest.mark.parametrize(("dtype", "bad"), [(torch.float8_e4m3fn, nan), (torch.float8_e5m2, inf)])
def test_eight_bit_floats_that_are_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    assert dtype in EIGHT_BIT_FLOATS
    save_file({"w": torch.tensor([1.0, bad, 2.0]).to(dtype)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError, match="w holds 1 value that is NaN or infinite"):
        checkpoint.read("w")


def test_values_that_are_not_finite_are_counted_in_all_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)
    tensor = torch.zeros(100)
    tensor[[17, 18, 60, 99]] = nan
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError, match="w holds 4 values"):
        list(checkpoint.chunks("w"))


def test_the_largest_finite_values_are_accepted(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=torch.float64).to(dtype)
        for dtype in (*FLOATS, *EIGHT_BIT_FLOATS)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, tensors)


def test_a_file_that_shrinks_during_the_run_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    with Checkpoint(tmp_path) as checkpoint:
        os.truncate(file, file.stat().st_size - 4)
        with pytest.raises(ModelError, match=r"model\.safetensors: ends inside a"):
            checkpoint.read("a")


def test_a_file_that_vanishes_during_the_run_is_an_error_of_the_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    with Checkpoint(tmp_path) as checkpoint:
        file.unlink()
        for read in (checkpoint.read, lambda name: list(checkpoint.chunks(name))):
            with pytest.raises(ModelError, match=r"model\.safetensors"):
                read("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "cannot be read as JSON"),
        (b"{'single': 1}", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "holds list, not an object"),
        (b'"llama"', "holds str, not an object"),
    ],
)
def test_a_config_that_is_missing_or_broken_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError, match=message) as caught:
        _ = checkpoint.config
    assert "config.json" in caught.value.message


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"holds pytorch_model\.bin and no safetensors file") as caught:
        Checkpoint(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_places_that_hold_no_checkpoint_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent: no such directory"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(ModelError, match="empty is empty"):
        (tmp_path / "empty").mkdir()
        Checkpoint(tmp_path / "empty")
    with pytest.raises(ModelError, match="is a file"):
        (tmp_path / "file").write_text("")
        Checkpoint(tmp_path / "file")
    with pytest.raises(ModelError, match="holds no safetensors file"):
        (tmp_path / "empty" / "config.json").write_text("{}")
        Checkpoint(tmp_path / "empty")


def test_a_directory_in_the_place_of_a_weight_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_opening_reads_no_weight(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    file = copy / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:  # NaN everywhere, which reading any weight would find
        stream.seek(header)
        stream.write(b"\xff" * (file.stat().st_size - header))
    checkpoint = Checkpoint(copy)
    assert len(checkpoint.tensors) == len(load_file(tiny_llama / "model.safetensors"))
    with checkpoint, pytest.raises(ModelError, match="NaN"):
        checkpoint.read("lm_head.weight")


def test_the_byte_order_of_this_machine_is_that_of_the_format() -> None:
    assert sys.byteorder == "little"  # the reader copies bytes as they are


def test_decoded_tensors_stand_in_place_of_those_that_make_them(tmp_path: Path) -> None:
    codes = torch.tensor([[1.5, -2.0, 0.25]]).to(torch.float8_e4m3fn)
    plain = torch.arange(3.0)
    tensors = {"a": plain, "w.codes": codes, "w.scale": torch.tensor([0.5]), "z": plain + 1}
    save_file(tensors, tmp_path / "model.safetensors")

    def decode(parts: list[Tensor]) -> Tensor:
        return (parts[0].float() * parts[1]).to(torch.bfloat16)

    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.decode({"w": DecodedTensor(("w.codes", "w.scale"), "bfloat16", (1, 3), decode)})
        assert set(checkpoint.tensors) == {"a", "w", "z"}
        assert set(checkpoint.stored) == set(tensors)
        stored = checkpoint.tensors["w"]
        assert (stored.name, stored.dtype, stored.shape, stored.nbytes) == ("w", "BF16", (1, 3), 6)
        expected = torch.tensor([[0.75, -1.0, 0.125]], dtype=torch.bfloat16)
        assert torch.equal(checkpoint.read("w"), expected)
        assert b"".join(bytes(piece) for piece in checkpoint.chunks("w")) == raw(expected)
        assert torch.equal(checkpoint.read("z"), plain + 1)


def test_decoded_tensor_may_bear_the_name_of_what_it_is_made_of_and_is_found_again(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([2.0]), "w_scale": torch.tensor([3.0])}, tmp_path / "model.safetensors")
    decoded = {"w": DecodedTensor(("w", "w_scale"), "float32", (1,), lambda parts: parts[0] * parts[1])}
    with Checkpoint(tmp_path) as checkpoint:
        for _ in range(2):  # as when two models are opened from one checkpoint
            checkpoint.decode(decoded)
            assert list(checkpoint.tensors) == ["w"]
            assert checkpoint.read("w").tolist() == [6.0]


@pytest.mark.parametrize(("codes", "scale"), [([2.0, nan], 1.0), ([2.0, 3.0], inf), ([65504.0, 2.0], 8.0)])
def test_decoded_tensor_that_is_not_finite_is_refused_by_name(codes: list[float], scale: float, tmp_path: Path) -> None:
    tensors = {"w": torch.tensor(codes, dtype=torch.float16), "w_scale": torch.tensor([scale], dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    decoded = {"w": DecodedTensor(("w", "w_scale"), "float16", (2,), lambda parts: parts[0] * parts[1])}
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.decode(decoded)
        for read in (checkpoint.read, lambda name: list(checkpoint.chunks(name))):
            with pytest.raises(ModelError, match=r"w(_scale)? holds 1 value that is NaN or infinite"):
                read("w")
