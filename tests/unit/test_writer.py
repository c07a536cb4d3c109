# SPDX-License-Identifier: Apache-2.0
"""The result on disk: files that safetensors reads back, and nothing that looks whole until it is."""

from __future__ import annotations

import errno
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modelslim.checkpoint import DTYPE_NAMES, DTYPES
from modelslim.disk import write_json
from modelslim.errors import ModelError, SaveError, UsageError
from modelslim.output_directory import OutputDirectory, check_save_path, check_space, partial_path
from modelslim.writer import JOURNAL, ShardWriter


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensors(seed: int, count: int = 40) -> dict[str, Tensor]:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(count):
        dtype = chance.choice(list(DTYPES.values()))
        shape = [chance.choice((0, 1, 2, 3, 7, 16)) for _ in range(chance.randrange(4))]
        values = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator)
        tail = chance.choice(("weight", "größe", "a b", 'quo"te'))
        tensors[f"layers.{number}.{tail}"] = values.to(dtype)
    return tensors


def write(
    writer: ShardWriter, tensors: Mapping[str, Tensor], pieces: Callable[[bytes], list[bytes]] = lambda data: [data]
) -> None:
    for name, tensor in tensors.items():
        data = raw(tensor)
        views = (memoryview(piece) for piece in pieces(data))
        writer.add(name, DTYPE_NAMES[tensor.dtype], tensor.shape, len(data), views)


def shard_writer(directory: Path, max_bytes: int = 0, header_bytes: int = 1 << 16) -> ShardWriter:
    return ShardWriter(directory, "weights", max_bytes, header_bytes, lambda name, nbytes: None)


def read_back(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  (no mapping)


def assert_same(read: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape, raw(read[name])) == (tensor.dtype, tensor.shape, raw(tensor)), name


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A disk with so many free ``bytes`` for shards, which takes at most ``piece`` bytes at a time."""
    state = {"bytes": 1 << 30, "piece": 1 << 30, "errno": errno.ENOSPC}

    class Stream(io.FileIO):
        def write(self, data: Any) -> int:
            if not state["bytes"]:
                raise OSError(state["errno"], "no room")
            count = super().write(data[: min(state["bytes"], state["piece"])])
            state["bytes"] -= count
            return count

    original = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Stream(self, "w") if mode == "wb" else original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    yield state
    monkeypatch.undo()


# Shards


@pytest.mark.parametrize("max_bytes", [1, 100, 1000, 10_000, 1 << 30])
@pytest.mark.parametrize("seed", range(4))
def test_shards_hold_what_was_written_and_the_index_finds_it(tmp_path: Path, seed: int, max_bytes: int) -> None:
    tensors = random_tensors(seed)
    writer = shard_writer(tmp_path, max_bytes)
    write(writer, tensors)
    writer.finish()
    index = json.loads((tmp_path / "weights.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"weights-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert index["metadata"]["total_size"] == sum(len(raw(tensor)) for tensor in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    read: dict[str, Tensor] = {}
    for file in files:
        held = read_back(file)
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == set(held)
        sizes = [len(raw(tensor)) for tensor in held.values()]
        assert sum(sizes) <= max_bytes or sum(size > 0 for size in sizes) == 1
        read |= held
    assert_same(read, tensors)
    assert not list(tmp_path.glob("*unfinished*"))
    assert (len(files) > 1) == (index["metadata"]["total_size"] > max_bytes)


def test_shards_are_no_smaller_than_they_must(tmp_path: Path) -> None:
    """The next tensor would not have fitted."""
    tensors = random_tensors(9)
    writer = shard_writer(tmp_path, 500)
    write(writer, tensors)
    writer.finish()
    weight_map = json.loads((tmp_path / "weights.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    filled, shard = 0, ""
    for name, file in weight_map.items():
        size = len(raw(tensors[name]))
        if file != shard:
            assert not shard or filled + size > 500
            filled, shard = 0, file
        filled += size


def test_tensors_that_fill_a_shard_to_the_last_byte_share_it(tmp_path: Path) -> None:
    writer = shard_writer(tmp_path, 120)
    write(writer, {"a": torch.ones(10), "b": torch.ones(20), "c": torch.ones(1)})
    writer.finish()
    weight_map = json.loads((tmp_path / "weights.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert weight_map["a"] == weight_map["b"] != weight_map["c"]


@pytest.mark.parametrize("seed", range(4))
def test_a_single_file_has_no_index(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(seed)
    writer = shard_writer(tmp_path)
    write(writer, tensors)
    writer.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]
    assert_same(read_back(tmp_path / "weights.safetensors"), tensors)


def test_no_tensors_make_a_file_that_holds_none(tmp_path: Path) -> None:
    writer = shard_writer(tmp_path)
    writer.finish()
    assert read_back(tmp_path / "weights.safetensors") == {}


def test_tensors_may_come_in_pieces(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    writer = shard_writer(tmp_path)
    write(writer, tensors, lambda data: [data[start : start + 5] for start in range(0, len(data), 5)])
    writer.finish()
    assert_same(read_back(tmp_path / "weights.safetensors"), tensors)


def test_a_system_that_takes_few_bytes_at_a_time_is_asked_again(tmp_path: Path, disk: dict[str, int]) -> None:
    disk["piece"] = 7
    tensors = random_tensors(2)
    writer = shard_writer(tmp_path, 600)
    write(writer, tensors)
    writer.finish()
    read: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        read |= read_back(file)
    assert_same(read, tensors)


def test_the_data_begin_at_a_multiple_of_64(tmp_path: Path) -> None:
    for header_bytes in (90, 100, 111, 200):
        writer = shard_writer(tmp_path, header_bytes=header_bytes)
        write(writer, {"a": torch.ones(2)})
        writer.finish()
        length = int.from_bytes((tmp_path / "weights.safetensors").read_bytes()[:8], "little")
        assert (8 + length) % 64 == 0


def test_a_full_header_begins_the_next_shard(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.weight": torch.full((2,), float(number)) for number in range(30)}
    writer = shard_writer(tmp_path, 1 << 30, header_bytes=300)
    write(writer, tensors)
    writer.finish()
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 5
    read: dict[str, Tensor] = {}
    for file in files:
        read |= read_back(file)
    assert_same(read, tensors)


def test_a_header_that_was_reserved_too_small_for_one_file_is_an_error(tmp_path: Path) -> None:
    writer = shard_writer(tmp_path, header_bytes=100)
    write(writer, {f"layers.{number}.weight": torch.ones(2) for number in range(9)})
    with pytest.raises(SaveError, match="reserved") as caught:
        writer.finish()
    assert "part_file_size" in caught.value.hint
    writer.abandon()


def test_no_loader_takes_an_unfinished_shard_for_a_file(tmp_path: Path) -> None:
    writer = shard_writer(tmp_path, 200)
    tensors = {f"layers.{number}.weight": torch.ones(30) for number in range(3)}
    write(writer, tensors)
    (unfinished,) = (file for file in tmp_path.iterdir() if file.read_bytes()[:8] == bytes(8))
    assert unfinished.stat().st_size > 120
    with pytest.raises(SafetensorError):
        read_back(unfinished)
    assert not list(tmp_path.glob("*.safetensors")), "closed shards have no final name either"
    writer.finish()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_progress_says_where_the_next_tensor_goes(tmp_path: Path) -> None:
    writer = shard_writer(tmp_path, 100)
    assert writer.progress == {"shard": 0, "position": 0}
    write(writer, {"a": torch.ones(10)})
    assert writer.progress == {"shard": 0, "position": 40}
    write(writer, {"b": torch.ones(20)})
    assert writer.progress == {"shard": 1, "position": 80}
    writer.abandon()


def test_every_tensor_is_told_once_it_is_written(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    writer = ShardWriter(tmp_path, "weights", 0, 1000, lambda name, nbytes: told.append((name, nbytes)))
    write(writer, {"a": torch.ones(10), "b": torch.ones(0)})
    assert told == [("a", 40), ("b", 0)]
    writer.abandon()


# Failing disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("free", [0, 10, 130])
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, disk: dict[str, int], free: int, code: int) -> None:
    disk.update(bytes=free, errno=code)
    writer = shard_writer(tmp_path, header_bytes=100)
    with pytest.raises(SaveError, match="the disk is full") as caught:
        write(writer, {"a": torch.ones(30), "b": torch.ones(30)})
        writer.finish()
    assert "free some space" in caught.value.hint
    writer.abandon()


def test_a_disk_that_fails_otherwise_is_an_error_with_its_reason(tmp_path: Path, disk: dict[str, int]) -> None:
    disk.update(bytes=0, errno=errno.EIO)
    writer = shard_writer(tmp_path)
    with pytest.raises(SaveError, match="no room") as caught:
        write(writer, {"a": torch.ones(30)})
    assert isinstance(caught.value.__cause__, OSError)
    writer.abandon()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_json_files_and_the_journal_tell_of_a_full_disk_too(tmp_path: Path) -> None:
    (tmp_path / "file.json").symlink_to("/dev/full")
    with pytest.raises(SaveError, match=r"file\.json: the disk is full"):
        write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(SaveError, match="the disk is full"), OutputDirectory(tmp_path / "out", {}) as output:
        assert output._journal is not None
        output._journal.close()
        output._journal = Path("/dev/full").open("a")  # noqa: SIM115  (the output closes it)
        output.journal({"unit": "a"})
    assert not (tmp_path / "out").exists() and not output.path.exists()


def test_a_source_that_cannot_be_read_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    def pieces() -> Iterator[memoryview]:
        yield memoryview(b"ab")
        raise ModelError("the source is damaged")

    writer = shard_writer(tmp_path)
    with pytest.raises(ModelError, match="the source is damaged"):
        writer.add("a", "U8", (4,), 4, pieces())
    writer.abandon()


# The directory


def test_the_result_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    save_path = tmp_path / "deep" / "out"
    with OutputDirectory(save_path, {"run": 1}) as output:
        assert output.path == partial_path(save_path) == tmp_path / "deep" / "out.partial"
        output.journal({"unit": "a", "name": "ü"})
        lines = [json.loads(line) for line in (output.path / JOURNAL).read_text(encoding="utf-8").splitlines()]
        assert lines == [{"run": 1}, {"unit": "a", "name": "ü"}]
        (output.path / "file").write_text("whole")
        assert not save_path.exists()
        output.commit()
    assert [file.name for file in save_path.iterdir()] == ["file"]
    assert [file.name for file in save_path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [SaveError("x"), KeyError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failed_run_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), OutputDirectory(tmp_path / "out", {}) as output:
        (output.path / "sub").mkdir()
        (output.path / "sub" / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_be_begun_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError), OutputDirectory(tmp_path / "out", {"no JSON": object()}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_rest_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    rest = tmp_path / "out.partial"
    rest.mkdir()
    (rest / JOURNAL).write_text("{}\n")
    (rest / "weights-00001.safetensors.unfinished").write_text("half")
    check_save_path(tmp_path / "out", tmp_path / "model")
    with OutputDirectory(tmp_path / "out", {}) as output:
        assert [file.name for file in output.path.iterdir()] == [JOURNAL]
        output.commit()
    assert list((tmp_path / "out").iterdir()) == []
    assert not rest.exists()


def test_a_run_killed_before_its_journal_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    check_save_path(tmp_path / "out", tmp_path / "model")
    with OutputDirectory(tmp_path / "out", {}) as output:
        output.commit()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_link_keeps_its_place_and_its_target_becomes_the_result(tmp_path: Path) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    check_save_path(tmp_path / "out", tmp_path / "model")
    with OutputDirectory(tmp_path / "out", {}) as output:
        (output.path / "file").write_text("whole")
        output.commit()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "big" / "file").read_text() == "whole"
    assert {file.name for file in tmp_path.iterdir()} == {"disk", "out"}


def test_a_result_may_take_the_place_of_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_save_path(tmp_path / "out", tmp_path / "model")
    with OutputDirectory(tmp_path / "out", {}) as output:
        (output.path / "file").write_text("whole")
        output.commit()
    assert (tmp_path / "out" / "file").read_text() == "whole"


def test_a_directory_that_filled_up_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SaveError), OutputDirectory(tmp_path / "out", {}) as output:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        output.commit()
    assert [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*"))] == ["out", "out/precious"]


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="file"), OutputDirectory(tmp_path / "file" / "out", {}):
        pass


# What is refused before a run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("inside", [".", "out", "deep/er/out", "../model/out", "../link/out"])
def test_a_result_inside_the_model_is_refused(model: Path, inside: str) -> None:
    (model.parent / "link").symlink_to(model)
    with pytest.raises(UsageError, match="lies inside --model_path"):
        check_save_path(model / inside, model)


def test_a_result_beside_the_model_is_accepted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model-w8a8", "modelx/out", "out"):
        check_save_path(model.parent / name, model)
    monkeypatch.chdir(model.parent)
    check_save_path(Path("relative"), Path("model"))


def test_a_result_onto_something_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_save_path(tmp_path / "file", model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UsageError, match="is not empty"):
        check_save_path(tmp_path / "full", model)
    with pytest.raises(UsageError, match="is not empty"):
        check_save_path(tmp_path, model)  # the model lies inside it


@pytest.mark.parametrize("file", ["out.partial", "out.partial/notes.txt"])
def test_a_partial_directory_of_somebody_else_is_refused(model: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(UsageError, match=r"out\.partial is in the way"):
        check_save_path(tmp_path / "out", model)


def test_a_partial_directory_that_is_a_link_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"out\.partial is in the way"):
        check_save_path(tmp_path / "out", model)
    (tmp_path / "elsewhere").rmdir()  # the link leads nowhere now
    with pytest.raises(UsageError, match=r"out\.partial is in the way"):
        check_save_path(tmp_path / "out", model)


def test_a_directory_that_cannot_be_renamed_over_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="is the current directory") as caught:
        check_save_path(Path(), model)
    assert "quantized" in caught.value.hint
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "empty")
    with pytest.raises(UsageError, match="is a mount point"):
        check_save_path(tmp_path / "empty", model)


def test_a_place_that_cannot_be_written_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != model.parent)  # as root, everything is writable
    with pytest.raises(UsageError, match="not writable"):
        check_save_path(model.parent / "not" / "there", model)


def test_a_result_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(SaveError, match=r"needs 1,000,000,000,000,000,000 bytes and [0-9,]+ are free"):
        check_space(tmp_path / "out", 10**18)


def test_json_files_are_readable_to_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"größe": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "größe": [\n    1\n  ]\n}\n'


def test_a_name_is_not_written_twice(tmp_path: Path) -> None:
    writer = shard_writer(tmp_path)
    write(writer, {"a": torch.ones(3)})
    with pytest.raises(SaveError, match="a would be written twice"):
        write(writer, {"a": torch.ones(3)})
    writer.abandon()


def test_a_second_run_does_not_take_the_place_of_a_living_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with OutputDirectory(tmp_path / "out", {}):
        with pytest.raises(UsageError, match="another run is writing"):
            check_save_path(tmp_path / "out", source)
        assert (tmp_path / "out.partial" / JOURNAL).is_file()
    check_save_path(tmp_path / "out", source)
