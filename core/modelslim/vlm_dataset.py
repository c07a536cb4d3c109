# SPDX-License-Identifier: Apache-2.0
"""Calibration data with images, audio and video: three layouts, one kind of sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelslim.dataset import Broken, broken_data, is_unicode, read_records
from modelslim.errors import Diagnostic, InvalidDatasetError, nearest
from modelslim.media import SUFFIXES, MediaFolder

INDEXES = ("index.json", "index.jsonl")

_EXAMPLE = '{"image": "a.jpg", "text": "..."}'


@dataclass(frozen=True)
class VlmCalibSample:
    """One calibration sample of a vision-language or omni model.

    Attributes:
        text: the prompt, not empty.
        image: absolute path of a .jpg, .jpeg or .png file; None without an image.
        audio: absolute path of a .wav or .mp3 file; None without audio.
        video: absolute path of a .mp4 file; None without a video.
    """

    text: str
    image: str | None = None
    audio: str | None = None
    video: str | None = None


def read_vlm_samples(path: Path, default_text: str) -> tuple[list[VlmCalibSample], list[str]]:
    """The samples of a multimodal calibration set.

    Args:
        path: ``index.json`` or ``index.jsonl``; or a directory that holds one of them; or a
            directory that holds images and nothing else; or a directory that holds images and one
            ``.json`` or ``.jsonl`` file of another name, which gives each image its text.
        default_text: prompt of a record of an index, or of an image of a directory, that has none.

    Returns:
        The samples, and warnings about files that are left out.

    Raises:
        InvalidDatasetError: lists every broken record or file with its place; or the layout is none of these.
    """
    if not path.is_dir():
        if path.name not in INDEXES:
            raise InvalidDatasetError(
                f"{path}: a file of multimodal calibration data is called index.json or index.jsonl",
                hint="rename it, or give the directory that holds it and the images",
            )
        return _read_index(path, default_text), []
    entries = _entries(path)
    indexes = [entry for entry in entries if entry.name in INDEXES]
    if len(indexes) > 1:
        raise InvalidDatasetError(f"{path}: holds both index.json and index.jsonl", hint="remove one of them")
    if indexes:
        return _read_index(indexes[0], default_text), []
    described = [entry for entry in entries if entry.suffix.lower() in (".json", ".jsonl")]
    if len(described) > 1:
        names = ", ".join(entry.name for entry in described)
        raise InvalidDatasetError(
            f"{path}: holds {len(described)} .json or .jsonl files: {names}",
            hint="keep one, or call the one that counts index.json or index.jsonl",
        )
    if described:
        return _read_described(described[0], entries)
    return _read_images(path, entries, default_text), []


def _entries(directory: Path) -> list[Path]:
    """What the directory shows, sorted by name: names that begin with a dot are hidden."""
    try:
        entries = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InvalidDatasetError(f"{directory}: cannot be read: {error}") from error
    if not entries:
        raise InvalidDatasetError(f"{directory}: the directory is empty", hint="calibration needs at least one image")
    return entries


def _read_index(file: Path, default_text: str) -> list[VlmCalibSample]:
    """Method 1: records with any of text, image, audio and video."""
    folder = MediaFolder(file.parent)

    def to_sample(record: Any) -> tuple[VlmCalibSample, Sequence[Broken]]:
        broken = list(_structure(record, ("text", *SUFFIXES)))
        record = record if isinstance(record, dict) else {}
        if not broken and not record:
            broken.append(Broken("is empty: it has neither text nor a file", f"write {_EXAMPLE}"))
        if "text" in record:
            broken += _text(record["text"], "leave text out to have default_text")
        paths = _paths(record, folder, broken)
        return VlmCalibSample(record.get("text", default_text), **paths), broken

    return read_records(file, to_sample)


def _read_described(file: Path, entries: Sequence[Path]) -> tuple[list[VlmCalibSample], list[str]]:
    """Method 3: a file that gives the images beside it their texts."""
    folder = MediaFolder(file.parent)

    def to_sample(record: Any) -> tuple[VlmCalibSample, Sequence[Broken]]:
        broken = list(_structure(record, ("image", "text")))
        if not isinstance(record, dict):
            return VlmCalibSample(""), broken
        if "image" not in record:
            broken.append(Broken("has no image", f"write {_EXAMPLE}"))
        if "text" not in record:
            hint = "write the prompt of this image, or rename the file to index" + file.suffix.lower()
            broken.append(Broken(f"has no text, and default_text does not apply to {file.name}", hint))
        else:
            broken += _text(record["text"], "write the prompt of this image")
        paths = _paths({key: record[key] for key in ("image",) if key in record}, folder, broken)
        return VlmCalibSample(record.get("text", ""), **paths), broken

    samples = read_records(file, to_sample)
    left_out = [entry.name for entry in entries if entry != file and not folder.has_given(entry)]
    if not left_out:
        return samples, []
    count = f"{len(left_out)} files are" if len(left_out) > 1 else "1 file is"
    return samples, [f"{file.parent}: {count} not named in {file.name} and not used, such as {left_out[0]!r}"]


def _read_images(directory: Path, entries: Sequence[Path], text: str) -> list[VlmCalibSample]:
    """Method 2: every file is an image, with the same text."""
    folder = MediaFolder(directory)
    samples: list[VlmCalibSample] = []
    problems: list[Diagnostic] = []
    for entry in entries:
        path = folder.check("image", entry.name)
        if not entry.name.lower().endswith(SUFFIXES["image"]):
            hint = "a directory without an index holds images (.jpg, .jpeg, .png) and nothing else"
            path = Broken(f"{entry.name!r} is no image", hint)
        if isinstance(path, Broken):
            problems.append(Diagnostic(path.message, file=str(directory), hint=path.hint))
        else:
            samples.append(VlmCalibSample(text, path))
    if problems:
        raise broken_data(directory, "file", len(problems), problems)
    return samples


def _structure(record: Any, keys: Sequence[str]) -> Iterator[Broken]:
    """What is wrong about a record before its values are looked at."""
    if not isinstance(record, dict):
        yield Broken(f"is {type(record).__name__}, not an object", f"write {_EXAMPLE}")
        return
    for key in record:
        if key in keys:
            continue
        if key in SUFFIXES:
            hint = "rename the file to index.json or index.jsonl, which takes image, audio and video"
            yield Broken(f"has {key}, and beside a directory of images only image is supported", hint)
        else:
            yield Broken(f"has the unknown key {key!r}", nearest(key, keys))


def _text(value: Any, remedy: str) -> Iterator[Broken]:
    """What is wrong about a text."""
    if not isinstance(value, str):
        yield Broken(f"text is {type(value).__name__}, not a string", "write the text in quotes")
    elif not value.strip():
        yield Broken("text is empty", remedy)
    elif not is_unicode(value):
        yield Broken("text is not valid Unicode: it holds half of a surrogate pair", "correct the escape \\uD...")


def _paths(record: Mapping[str, Any], folder: MediaFolder, broken: list[Broken]) -> dict[str, str]:
    """Absolute paths by field; what is wrong goes to ``broken``."""
    paths: dict[str, str] = {}
    for field in SUFFIXES:
        if field not in record:
            continue
        path = folder.check(field, record[field])
        if isinstance(path, Broken):
            broken.append(path)
        else:
            paths[field] = path
    return paths
