# SPDX-License-Identifier: Apache-2.0
"""Calibration and evaluation text: found by name or path, read record by record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelslim.errors import DatasetError, Diagnostic, nearest

if TYPE_CHECKING:
    from modelslim.registry import Registry

TEXT_KEYS = ("inputs_pretokenized", "text", "prompt")


def find_dataset(value: str, registry: Registry, base: Path | None = None) -> Path:
    """The file that ``dataset`` means.

    Args:
        value: a path, or the name of a file that an installed calibration package ships.
        registry: the installed plugins.
        base: directory of the protocol; relative paths are also tried from there.

    Raises:
        DatasetError: there is no such file or name.
    """
    given = Path(value).expanduser()
    candidates = [given] if base is None or given.is_absolute() else [given, base / given]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = {
        file.name: file
        for name in registry.names("calibration")
        for file in sorted(registry.resource("calibration", name).iterdir())
        if file.suffix in (".json", ".jsonl")
    }
    if given.name == value and value in shipped:
        return shipped[value]
    raise DatasetError(
        f"dataset {value!r}: no such file, and no installed calibration set has this name", hint=nearest(value, shipped)
    )


def read_samples(file: Path) -> list[Any]:
    """The samples of a data file.

    Args:
        file: ``.jsonl`` with one record a line, or ``.json`` with a list of records. A record is a
            string, or an object with the text under ``inputs_pretokenized``, ``text`` or
            ``prompt``, or with a chat under ``messages``.

    Returns:
        Strings, and lists of messages ({"role", "content"}).

    Raises:
        DatasetError: lists every broken record with its line; or the file is empty or of another kind.
    """
    if file.suffix not in (".json", ".jsonl"):
        raise DatasetError(f"{file}: calibration data is .jsonl or .json, not {file.suffix or 'a file without suffix'}")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: not UTF-8 at byte {error.start}", hint="save the file as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read: {error}") from error
    samples: list[Any] = []
    problems: list[Diagnostic] = []
    for line, path, record in _records(file, text, problems):
        sample = _sample(record)
        if isinstance(sample, _Broken):
            problems.append(Diagnostic(sample.message, path, str(file), line, hint=sample.hint))
        else:
            samples.append(sample)
    if problems:
        count = len(problems)
        raise DatasetError(
            f"{file}: {count} broken record{'s' if count > 1 else ''}",
            diagnostics=problems[:20],
            hint="correct or remove them" + (f"; the first 20 of {count} are shown" if count > 20 else ""),
        )
    if not samples:
        raise DatasetError(f"{file}: holds no record", hint="calibration needs at least one text")
    return samples


@dataclass(frozen=True)
class _Broken:
    """Why a record is not a sample."""

    message: str
    hint: str


_NOT_UNICODE = _Broken("its text is not valid Unicode: it holds half of a surrogate pair", "correct the escape \\uD...")


def _records(file: Path, text: str, problems: list[Diagnostic]) -> Iterator[tuple[int | None, str, Any]]:
    """Records with their lines, or with their places in the list; broken lines go to ``problems``."""
    if file.suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{file}: not JSON: {error}") from error
        if not isinstance(value, list):
            raise DatasetError(f"{file}: holds {type(value).__name__}, not a list of records")
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
            return _Broken(f"has none of the keys {', '.join((*TEXT_KEYS, 'messages'))}", f"its keys: {sorted(record)}")
        text = record[key]
        if not isinstance(text, str):
            return _Broken(f"{key} is {type(text).__name__}, not a string", "write the text in quotes")
    else:
        return _Broken(f"is {type(record).__name__}, not a string or an object", 'write {"text": "..."}')
    if not text.strip():
        return _Broken("its text is empty", "remove the record")
    return text if _is_unicode(text) else _NOT_UNICODE


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
        return _Broken("messages is not a list of {role, content}", 'e.g. [{"role": "user", ...}]')
    return value if all(_is_unicode(message["content"]) for message in value) else _NOT_UNICODE


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
