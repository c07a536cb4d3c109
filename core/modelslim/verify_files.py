# SPDX-License-Identifier: Apache-2.0
"""Whether the weight files of a directory are whole, and whether its index files tell the truth about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelslim.checkpoint import StoredTensor, read_header, read_json
from modelslim.engines import Contract, FormatRules
from modelslim.errors import ModelError, nearest
from modelslim.types import Problem

INDEX = "*.safetensors.index.json"
_AGAIN = "quantize again, or copy the directory again"


@dataclass(frozen=True)
class WeightFiles:
    """What lies in the weight files of a directory.

    Attributes:
        tensors: every tensor, by name.
        problems: what is wrong with the files.
        complete: False when a file cannot be read or is missing, so that tensors are not known.
    """

    tensors: Mapping[str, StoredTensor]
    problems: tuple[Problem, ...]
    complete: bool


def read_files(path: Path) -> WeightFiles:
    """Read the headers of all weight files and compare them with every index file."""
    problems: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    shards: dict[str, dict[str, StoredTensor]] = {}
    complete = True
    for file in sorted(path.glob("*.safetensors")):
        try:
            shards[file.name] = read_header(file)
        except ModelError as error:
            problems.append(Problem(error.message, _AGAIN))
            complete = False
            continue
        for name, stored in shards[file.name].items():
            if name in tensors:
                problems.append(Problem(f"{name} is both in {tensors[name].file.name} and in {file.name}", _AGAIN))
            tensors[name] = stored
    if not any(path.glob("*.safetensors")):
        problems.append(Problem(f"{path} holds no safetensors file", _AGAIN))
        complete = False
    problems += [
        Problem(f"{file}: a weight file that was never finished", "the run was killed; run it again")
        for file in sorted(path.glob("*.unfinished"))
    ]
    for index in sorted(path.glob(INDEX)):
        found = list(_check_index(index, shards, tensors, complete))
        problems += found
        complete = complete and not any(problem.path == ("shards",) for problem in found)
    return WeightFiles(tensors, tuple(problems), complete)


def _check_index(
    index: Path, shards: Mapping[str, Mapping[str, StoredTensor]], tensors: Mapping[str, StoredTensor], complete: bool
) -> Iterator[Problem]:
    try:
        content = read_json(index)
    except ModelError as error:
        yield Problem(error.message, _AGAIN)
        return
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        yield Problem(f"{index}: has no weight_map from tensors to files", _AGAIN)
        return
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        by_shard.setdefault(shard, []).append(name)
    lost = {shard: names for shard, names in by_shard.items() if not (index.parent / shard).is_file()}
    if lost:
        # An index none of whose files is there belongs to another model.
        stale = len(lost) == len(by_shard) and bool(shards)
        first = next(iter(lost))
        more = f" (and {len(lost) - 1} more files)" if len(lost) > 1 else ""
        yield Problem(
            f"{index}: names {first}{more}, which is not there, for {sum(map(len, lost.values()))} tensors such as "
            f"{lost[first][0]}",
            "it is the index of another model, and engines would go by it: remove it" if stale else _AGAIN,
            () if stale else ("shards",),
        )
    for shard, names in by_shard.items():
        absent = [name for name in names if shard in shards and name not in shards[shard]]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            where = f"; it is in {tensors[absent[0]].file.name}" if absent[0] in tensors else ""
            yield Problem(f"{index}: says that {absent[0]}{more} is in {shard}, which does not hold it{where}", _AGAIN)
    unnamed = [name for name in tensors if name not in weight_map]
    if unnamed and any(shard in shards for shard in by_shard):
        more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
        yield Problem(
            f"{index}: does not name {unnamed[0]}{more}, which engines that go by an index would not load", _AGAIN
        )
    yield from _check_size(index, content, tensors, complete)


def _check_size(
    index: Path, content: Mapping[str, Any], tensors: Mapping[str, StoredTensor], complete: bool
) -> Iterator[Problem]:
    metadata = content.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(stored.nbytes for stored in tensors.values())
    if complete and stated is not None and stated != total and content["weight_map"].keys() == tensors.keys():
        yield Problem(f"{index}: total_size is {stated}, and the tensors have {total} bytes", _AGAIN)


def check_engine_files(
    path: Path, config: Mapping[str, Any], rules: FormatRules, contract: Contract
) -> Iterator[Problem]:
    """What an engine asks of the files beside the weights.

    Args:
        path: the directory.
        config: its config.json.
        rules: how the engine reads the format.
        contract: the engine, for the messages.
    """

    def problem(message: str, rule: str, hint: str) -> Problem:
        return Problem(f"{message} [{contract.name}: {rule}]", hint)

    for name in rules.files:
        if not (path / name).is_file():
            near = nearest(name, [file.name for file in path.iterdir()])
            yield problem(f"{path / name} is not there, and {contract.title} looks for it", "files", near)
    text = config.get("text_config")
    for key in rules.config_with:
        if key not in config:
            yield problem(
                f"config.json has no {key}, by which {contract.title} knows the format", "config_with", _AGAIN
            )
    for key in rules.config_without:
        if key in config or (isinstance(text, dict) and key in text):
            yield problem(
                f"config.json has {key}, which {contract.title} takes for another format", "config_without", "remove it"
            )
    wanted = {file.name for file in path.glob("*.safetensors")}
    if rules.index and (path / rules.index).is_file():
        weight_map = read_json(path / rules.index).get("weight_map")
        named = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if named != wanted:
            yield problem(
                f"{path / rules.index} names other files than are there, and {contract.title} goes by it",
                "index",
                "remove it: without it every weight file is loaded",
            )
