# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: what the run is, and what of it lies on the disk.

Its first line is a header that says all that shapes the result. Every further line stands for a prior stage that
is done, or for a unit whose tensors have been written. The line that a killed process was writing is cut in half,
and counts for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelslim.errors import Diagnostic, UsageError
from modelslim.saver import TensorRecord
from modelslim.types import QuantSpec, TensorSpec

JOURNAL = "journal.jsonl"
VERSION = 4
"""Of its form."""
FAULTY = {"faulty": True}
"""A line that says: do not go on from here, the result is wrong."""

_WORDS = {
    "journal": "the version of the journal",
    "source": "the source model",
    "protocol": "the protocol",
    "dataset": "the calibration data",
    "calib_length": "the length of calibration texts",
    "adapter": "the adapter",
    "device": "the device",
    "computer": "the computer",
    "versions": "versions",
}


@dataclass(frozen=True)
class Written:
    """A tensor in a weight file.

    Attributes:
        record: its record.
        dtype: its type in the words of safetensors, such as ``BF16``.
        shape: its shape.
    """

    record: TensorRecord
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FinishedUnit:
    """A line of the journal: a unit that has been written.

    Attributes:
        unit: its name; empty for what lies outside the units.
        shard: number of the weight file in which it ends, from 0.
        position: byte behind that file's header at which it ends.
        tensors: what was written.
        modules: the spec of each module that took a linear's place, by name.
        caches: names of the places whose key/value caches are quantized.
        edited: names of the parameters that were changed and stay float.
        state: digest of what stood in the unit while samples passed it; empty when float weights did.
        report: the unit's record in the report; None when it has none.
    """

    unit: str
    shard: int
    position: int
    tensors: Sequence[Written]
    modules: Mapping[str, QuantSpec]
    caches: Sequence[str]
    edited: Sequence[str]
    state: str
    report: Mapping[str, Any] | None

    def as_data(self) -> dict[str, Any]:
        """As JSON values; specs are written once each."""
        specs: dict[QuantSpec | TensorSpec | None, int] = {}

        def number(spec: QuantSpec | TensorSpec | None) -> int:
            return specs.setdefault(spec, len(specs))

        tensors = [
            [
                one.record.name,
                one.dtype,
                one.shape,
                one.record.nbytes,
                number(one.record.spec),
                number(one.record.cache),
            ]
            for one in self.tensors
        ]
        modules = {name: number(spec) for name, spec in self.modules.items()}
        return {
            "unit": self.unit,
            "shard": self.shard,
            "position": self.position,
            "specs": [None if spec is None else asdict(spec) for spec in specs],
            "tensors": tensors,
            "modules": modules,
            "caches": list(self.caches),
            "edited": list(self.edited),
            "state": self.state,
            "report": self.report,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> FinishedUnit:
        """The reverse of ``as_data``."""
        specs: list[Any] = [_spec(value) for value in data["specs"]]
        tensors = [
            Written(TensorRecord(name, specs[spec], nbytes, specs[cache]), dtype, tuple(shape))
            for name, dtype, shape, nbytes, spec, cache in data["tensors"]
        ]
        modules = {name: specs[number] for name, number in data["modules"].items()}
        rest = {key: data[key] for key in ("unit", "shard", "position", "caches", "edited", "state", "report")}
        return cls(tensors=tensors, modules=modules, **rest)


@dataclass(frozen=True)
class StageUnit:
    """What a prior stage left of a unit, by the names of the tensors that it keeps in files of its own.

    Attributes:
        modules: the spec of each module that took a linear's place, by name.
        caches: the spec of each quantized key/value cache, by the name of its place.
        edited: names of the parameters that were changed or added and stay float.
        multipliers: name of the tensor by which the input of a float linear is multiplied, by the linear's name;
            linears of one tensor share the product. All of the unit, those of earlier stages too.
    """

    modules: Mapping[str, QuantSpec] = field(default_factory=dict)
    caches: Mapping[str, TensorSpec] = field(default_factory=dict)
    edited: Sequence[str] = ()
    multipliers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishedStage:
    """A line of the journal: a prior stage that is done.

    Attributes:
        stage: its number, from 0.
        units: what it left, by unit; empty for what lies outside the units.
        records: its units' records in the report.
    """

    stage: int
    units: Mapping[str, StageUnit]
    records: Sequence[Mapping[str, Any]]

    def as_data(self) -> dict[str, Any]:
        """As JSON values; specs are written once each."""
        specs: dict[QuantSpec | TensorSpec, int] = {}

        def numbers(named: Mapping[str, QuantSpec] | Mapping[str, TensorSpec]) -> dict[str, int]:
            return {name: specs.setdefault(spec, len(specs)) for name, spec in named.items()}

        units = {
            name: [numbers(unit.modules), numbers(unit.caches), list(unit.edited), dict(unit.multipliers)]
            for name, unit in self.units.items()
        }
        records = [dict(record) for record in self.records]
        return {"stage": self.stage, "specs": [asdict(spec) for spec in specs], "units": units, "records": records}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> FinishedStage:
        """The reverse of ``as_data``."""
        specs: list[Any] = [_spec(value) for value in data["specs"]]

        def named(numbers: Mapping[str, int]) -> dict[str, Any]:
            return {name: specs[number] for name, number in numbers.items()}

        units = {
            name: StageUnit(named(modules), named(caches), edited, multipliers)
            for name, (modules, caches, edited, multipliers) in data["units"].items()
        }
        return cls(data["stage"], units, data["records"])


@dataclass(frozen=True)
class Rest:
    """What a run left behind.

    Attributes:
        header: what the run was.
        units: what it finished, in order.
        nbytes: length of the journal up to the last whole line.
        stages: the prior stages that it finished before, in order.
    """

    header: Mapping[str, Any]
    units: Sequence[FinishedUnit]
    nbytes: int
    stages: Sequence[FinishedStage] = ()


def is_whole(units: Sequence[FinishedUnit]) -> bool:
    """True when all tensors are written: the last line, of what no unit has, says nothing for the report."""
    return bool(units) and units[-1].report is None


def read_rest(file: Path) -> Rest | None:
    """What a journal says; None when there is none, or nothing in it to go on from."""
    if not file.is_file():
        return None
    whole = file.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    try:
        header, *lines = [json.loads(line) for line in whole.splitlines()] or [{}]
    except ValueError:  # no journal of ours
        return None
    if not lines or any("unit" not in line and "stage" not in line for line in lines):
        return None
    if header.get("journal") != VERSION:  # what its lines mean is not known; the headers are compared first
        return Rest(header, (), len(whole))
    stages = [FinishedStage.from_data(line) for line in lines if "stage" in line]
    return Rest(header, [FinishedUnit.from_data(line) for line in lines if "unit" in line], len(whole), stages)


def refuse_changes(partial: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that would be another one.

    Args:
        partial: where its rest lies, for the message.
        before: header of the rest's journal.
        now: header of this run's.

    Raises:
        UsageError: names everything that differs.
    """
    changes = [Diagnostic(change) for change in differences(before, json.loads(json.dumps(now)))]
    if changes:
        raise UsageError(
            f"{partial} is the rest of a run that was not the same",
            diagnostics=changes,
            hint="--restart begins anew; or go back to what it was, to continue it",
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two headers, in words."""
    for key in dict.fromkeys((*before, *now)):
        was, is_now = before.get(key), now.get(key)
        if was == is_now:
            continue
        words = _WORDS.get(key, key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            for name in sorted(was.keys() | is_now.keys()):
                if was.get(name) != is_now.get(name):
                    yield f"{words}: {name} was {was.get(name, 'not there')} and is {is_now.get(name, 'not there')}"
        elif key in ("source", "protocol", "dataset"):  # digests say nothing to people
            yield f"{words} has changed" if key != "dataset" else f"{words} have changed"
        else:
            yield f"{words} was {was} and is {is_now}"


def _spec(value: Mapping[str, Any] | None) -> QuantSpec | TensorSpec | None:
    if value is None:
        return None
    if "weight" in value:
        return QuantSpec(TensorSpec(**value["weight"]), TensorSpec(**value["activation"]))
    return TensorSpec(**value)
