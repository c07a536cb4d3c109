# SPDX-License-Identifier: Apache-2.0
"""Files that a calibration record names: inside their directory, of a known kind, readable."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

from modelslim.dataset import Broken
from modelslim.errors import nearest

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png"),
    "audio": (".wav", ".mp3"),
    "video": (".mp4",),
}
"""Suffixes that a field of a record takes, in lower case; a file may write them in capitals."""


class MediaFolder:
    """Checks the files of one directory, each once.

    Args:
        directory: where relative paths begin, and what they must not leave.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._real = Path(os.path.realpath(directory))
        self._checked: dict[tuple[str, str], str | Broken] = {}
        self._given: set[Path] = set()

    def check(self, field: str, value: Any) -> str | Broken:
        """The absolute path that a field names, or what is wrong with it.

        Args:
            field: a key of ``SUFFIXES``.
            value: what the record says.
        """
        if not isinstance(value, str):
            return Broken(f"{field} is {type(value).__name__}, not a string", "write its path, or leave the key out")
        if not value.strip():
            return Broken(f"{field} is empty", "write its path, or leave the key out")
        if (field, value) not in self._checked:
            self._checked[field, value] = self._check(field, value)
        return self._checked[field, value]

    def has_given(self, file: Path) -> bool:
        """True when a path to this file, or into this directory, was checked and found good."""
        real = Path(os.path.realpath(file))
        return real in self._given or any(real in given.parents for given in self._given)

    def _check(self, field: str, value: str) -> str | Broken:
        name = f"{field} {value!r}"
        if not value.lower().endswith(SUFFIXES[field]):
            hint = "convert the file; renaming does not change what it holds"
            return Broken(f"{name} is not {_alternatives(SUFFIXES[field])}", hint)
        if Path(value).is_absolute() or PureWindowsPath(value).drive:
            return Broken(f"{name} is an absolute path", f"write it relative to {self._directory}")
        inside = f"copy the file into {self._directory}"
        if Path(os.path.normpath(value)).parts[:1] == (os.pardir,):
            return Broken(f"{name} leaves the directory", inside)
        try:
            file = self._directory / value
            real = Path(os.path.realpath(file))
            if not real.is_relative_to(self._real):
                return Broken(f"{name} is a link that leads out of the directory", inside)
            if not real.exists():
                return Broken(f"{name} does not exist", self._nearest(value))
            if not real.is_file():
                return Broken(f"{name} is not a file", "name a file")
            if not real.stat().st_size:
                return Broken(f"{name} is an empty file", "copy it again, or leave it out")
            with real.open("rb"):
                pass
        except (OSError, ValueError) as error:  # names that no file can have, directories that may not be entered
            return Broken(f"{name} cannot be read: {error}", "correct the path, or the permissions of the file")
        if field == "image" and (damage := _damage(real)):
            return Broken(f"{name} {damage[0]}", damage[1])
        self._given.add(real)
        return str(file)

    def _nearest(self, value: str) -> str:
        hint = nearest(value, self._names)
        return hint if hint.startswith("did you mean") else f"it is looked for in {self._directory}"

    @cached_property
    def _names(self) -> list[str]:
        return [entry.name for entry in self._directory.iterdir()]


def content(sample: Any) -> Any:
    """A calibration sample as JSON values in which each file stands for what it holds, wherever it lies."""
    if not is_dataclass(sample) or isinstance(sample, type):
        return sample
    return {field: _file_digest(value) if field in SUFFIXES else value for field, value in asdict(sample).items()}


def _file_digest(file: str | None) -> str | None:
    if file is None:
        return None
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _alternatives(suffixes: Sequence[str]) -> str:
    *others, last = suffixes
    return f"{', '.join(others)} or {last}" if others else last


def _damage(file: Path) -> tuple[str, str] | None:
    """What keeps pillow from decoding an image, and what to do; None when it can."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                image.draft(None, (1, 1))  # a JPEG is read to its end and decoded at an eighth of its size
                image.load()
    except UnidentifiedImageError:
        return "holds neither JPEG nor PNG data", "export the image as JPEG or PNG"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels", "scale it down"
    except Exception as error:  # pillow's decoders raise many kinds
        return f"is broken: {error}", "replace the file, or leave it out"
    return None
