# SPDX-License-Identifier: Apache-2.0
"""Small things on the disk: files that are written, synced and locked, and what an OSError there means."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from modelslim.errors import SaveError

try:
    import fcntl
except ModuleNotFoundError:  # Windows locks in another way; runs there do not see each other
    fcntl = None  # type: ignore[assignment]


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file, two spaces deep."""
    with explained(file):
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lock(stream: IO[str]) -> bool:
    """Lock an open file until it is closed, or its process dies; False when another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync(path: Path) -> None:
    """Have a file's data, or a directory's entries, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn an OSError into a SaveError that says what to do."""
    try:
        yield
    except OSError as error:
        raise save_error(place, error) from error


def save_error(place: Path, error: OSError) -> SaveError:
    """What an OSError at a place of the result means, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return SaveError(
        f"{place}: {'the disk is full' if full else error}",
        hint="free some space and run again" if full else "check the path and its permissions",
    )
