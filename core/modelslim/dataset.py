# SPDX-License-Identifier: Apache-2.0
"""Calibration data: found by name or path, read record by record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modelslim.errors import DatasetError, Diagnostic, InvalidDatasetError, nearest

if TYPE_CHECKING:
    from modelslim.registry import Registry

Sample = TypeVar("Sample")

TEXT_KEYS = ("inputs_pretokenized", "text", "prompt")


def find_dataset(value: str, registry: Registry, base: Path | None = None, *, directories: bool = False) -> Path:
    """The file or directory that ``dataset`` means.

    Args:
        value: a path, or the name of a set that an installed calibration package ships.
        registry: the installed plugins.
        base: directory of the protocol; relative paths are also tried from there.
        directories: True for data with images: a set may be a directory, and a shipped one is.

    Raises:
        DatasetError: there is no such set, or two packages ship one of this name.
    """
    given = Path(value).expanduser()
    candidates = [given] if base is None or given.is_absolute() else [given, base / given]
    for candidate in candidates:
        if candidate.is_file() or (directories and candidate.is_dir()):
            return candidate
    shipped = _shipped(registry)
    offered = [name for name, sets in shipped.items() if sets[0].is_dir() == directories]
    if str(given) not in offered:
        hint = nearest(value, offered)
        if str(given) in shipped and directories:
            hint = "it is a file of texts, which apiversion modelslim_v1 reads"
        elif str(given) in shipped or any(candidate.is_dir() for candidate in candidates):
            hint = "it is a directory, which apiversion multimodal_vlm_modelslim_v1 reads"
        wanted = "file or directory" if directories else "file"
        raise DatasetError(
            f"dataset {value!r}: no such {wanted}, and no installed calibration set has this name", hint=hint
        )
    found = shipped[str(given)]
    if len(found) > 1:
        raise DatasetError(
            f"dataset {value!r}: several packages ship a calibration set of this name",
            hint=f"write the path of the one that you mean: {', '.join(map(str, found))}",
        )
    return found[0]


def _shipped(registry: Registry) -> dict[str, list[Path]]:
    """The sets of the installed calibration packages by name: data files, and directories of data."""
    shipped: dict[str, list[Path]] = {}
    for package in registry.names("calibration"):
        for path in sorted(registry.resource("calibration", package).iterdir()):
            if path.suffix in (".json", ".jsonl") or (path.is_dir() and path.name[0] not in "._"):
                shipped.setdefault(path.name, []).append(path)
    return shipped


def read_samples(file: Path) -> list[Any]:
    """The samples of a data file.

    Args:
        file: ``.jsonl`` with one record a line, or ``.json`` with a list of records. A record is a
            string, or an object with the text under ``inputs_pretokenized``, ``text`` or
            ``prompt``, or with a chat under ``messages``.

    Returns:
        Strings, and lists of messages ({"role", "content"}).

    Raises:
        InvalidDatasetError: lists every broken record with its line; or the file is empty or of another kind.
    """
    if file.suffix not in (".json", ".jsonl"):
        raise InvalidDatasetError(
            f"{file}: calibration data is .jsonl or .json, not {file.suffix or 'a file without suffix'}"
        )

    def to_sample(record: Any) -> tuple[Any, Sequence[Broken]]:
        sample = _sample(record)
        return (None, [sample]) if isinstance(sample, Broken) else (sample, [])

    return read_records(file, to_sample)


@dataclass(frozen=True)
class Broken:
    """Something that keeps a record from being a sample.

    Attributes:
        message: what is wrong.
        hint: what to do.
    """

    message: str
    hint: str


def read_records(file: Path, to_sample: Callable[[Any], tuple[Sample, Sequence[Broken]]]) -> list[Sample]:
    """Read a data file record by record.

    Args:
        file: one JSON record a line, or a list of records when the suffix is ``.json``.
        to_sample: gives a record's sample, which counts when nothing is broken, and what is broken.

    Raises:
        InvalidDatasetError: lists every broken record with its line; or the file is empty, unreadable or no JSON.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise InvalidDatasetError(f"{file}: not UTF-8 at byte {error.start}", hint="save the file as UTF-8") from error
    except OSError as error:
        raise InvalidDatasetError(f"{file}: cannot be read: {error}") from error
    samples: list[Sample] = []
    problems: list[Diagnostic] = []
    for line, path, record in _records(file, text, problems):
        sample, broken = to_sample(record)
        problems += (Diagnostic(flaw.message, path, str(file), line, hint=flaw.hint) for flaw in broken)
        if not broken:
            samples.append(sample)
    if problems:
        raise broken_data(file, "record", len({(problem.line, problem.path) for problem in problems}), problems)
    if not samples:
        raise InvalidDatasetError(f"{file}: holds no record", hint="calibration needs at least one text")
    return samples


def broken_data(source: Path, noun: str, count: int, problems: Sequence[Diagnostic]) -> InvalidDatasetError:
    """The error that tells what is broken in ``count`` records or files of ``source``."""
    more = f"; the first 20 of {len(problems)} are shown" if len(problems) > 20 else ""
    return InvalidDatasetError(
        f"{source}: {count} broken {noun}{'s' if count > 1 else ''}",
        diagnostics=problems[:20],
        hint=f"correct or remove them{more}",
    )


_NOT_UNICODE = Broken("its text is not valid Unicode: it holds half of a surrogate pair", "correct the escape \\uD...")


def _records(file: Path, text: str, problems: list[Diagnostic]) -> Iterator[tuple[int | None, str, Any]]:
    """Records with their lines, or with their places in the list; broken lines go to ``problems``."""
    if file.suffix.lower() == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidDatasetError(f"{file}: not JSON: {error}") from error
        if not isinstance(value, list):
            raise InvalidDatasetError(f"{file}: holds {type(value).__name__}, not a list of records")
        yield from ((None, f"[{index}]", record) for index, record in enumerate(value))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, "", json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(
                Diagnostic(f"not JSON: {error}", file=str(file), line=number, hint="one JSON record a line")
            )


def _sample(record: Any) -> Any:
    if isinstance(record, str):
        text = record
    elif isinstance(record, dict):
        if "messages" in record:
            return _messages(record["messages"])
        key = next((key for key in TEXT_KEYS if key in record), None)
        if key is None:
            return Broken(f"has none of the keys {', '.join((*TEXT_KEYS, 'messages'))}", f"its keys: {sorted(record)}")
        text = record[key]
        if not isinstance(text, str):
            return Broken(f"{key} is {type(text).__name__}, not a string", "write the text in quotes")
    else:
        return Broken(f"is {type(record).__name__}, not a string or an object", 'write {"text": "..."}')
    if not text.strip():
        return Broken("its text is empty", "remove the record")
    return text if is_unicode(text) else _NOT_UNICODE


def _messages(value: Any) -> Any:
    good = (
        isinstance(value, list)
        and value
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
    if not good:
        return Broken("messages is not a list of {role, content}", 'e.g. [{"role": "user", ...}]')
    return value if all(is_unicode(message["content"]) for message in value) else _NOT_UNICODE


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
