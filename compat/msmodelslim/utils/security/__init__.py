# SPDX-License-Identifier: Apache-2.0
"""Checked reading of files, by the names that adapters use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msmodelslim.utils.exception import SecurityError

MAX_READ_FILE_SIZE_4G = 4 << 30
MAX_READ_FILE_SIZE_32G = 32 << 30
MAX_READ_FILE_SIZE_512G = 512 << 30


def get_valid_read_path(
    path: str | Path,
    extensions: str | list[str] | tuple[str, ...] | None = None,
    size_max: int = MAX_READ_FILE_SIZE_4G,
    check_user_stat: bool = False,
    is_dir: bool = False,
) -> str:
    """The path without symbolic links, after a look at what lies there.

    Args:
        path: a file or directory that must exist.
        extensions: suffixes that are allowed; None for any.
        size_max: bytes that a file may have.
        check_user_stat: taken and not used, as ownership says nothing in a container.
        is_dir: True when a directory is wanted.

    Raises:
        SecurityError: it is not there, of the other kind, of another suffix, or too large.
    """
    real = Path(path).resolve()
    if is_dir != real.is_dir() or not real.exists():
        raise SecurityError(f"{path} is not {'a directory' if is_dir else 'a file'}")
    allowed = (extensions,) if isinstance(extensions, str) else tuple(extensions or ())
    if allowed and not real.name.endswith(allowed):
        raise SecurityError(f"{path} does not end with {' or '.join(allowed)}")
    if not is_dir and real.stat().st_size > size_max:
        raise SecurityError(f"{path} has more than {size_max} bytes")
    return str(real)


def json_safe_load(
    path: str | Path,
    extensions: str | list[str] | tuple[str, ...] = "json",
    size_max: int = MAX_READ_FILE_SIZE_4G,
    key_max_len: int = 512,
    check_user_stat: bool = False,
) -> Any:
    """The JSON document in a file.

    Raises:
        SecurityError: as for :func:`get_valid_read_path`, or a key is longer than ``key_max_len``.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, _ in pairs:
            if len(key) > key_max_len:
                raise SecurityError(f"{path}: a key has more than {key_max_len} characters")
        return dict(pairs)

    file = Path(get_valid_read_path(path, extensions, size_max, check_user_stat))
    return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=checked)
