# SPDX-License-Identifier: Apache-2.0
"""Multimodal calibration data: three layouts, and what each mistake is told, word by word."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modelslim import media
from modelslim.api import InvalidDatasetError, VlmCalibSample
from modelslim.calibration.draw_images import draw_all
from modelslim.dataset import find_dataset
from modelslim.errors import DatasetError
from modelslim.registry import Registry
from modelslim.vlm_dataset import read_vlm_samples

DEFAULT = "What is this?"


def picture(file: Path, size: tuple[int, int] = (9, 7), form: str | None = None) -> Path:
    """Noise, which compresses badly, so that damage anywhere is damage."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(file, form)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, a sound, a video, and a directory with a third image; no index."""
    folder = tmp_path / "calib"
    folder.mkdir()
    picture(folder / "a.jpg")
    picture(folder / "b.png")
    picture(folder / "sub" / "c.JPEG", form="JPEG")
    (folder / "a.wav").write_bytes(b"RIFF")
    (folder / "a.MP3").write_bytes(b"ID3")
    (folder / "a.mp4").write_bytes(b"ftyp")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with three images and nothing else."""
    for name in ("b.png", "a.jpg", "c.jpeg"):
        picture(tmp_path / "images" / name)
    return tmp_path / "images"


def write(folder: Path, name: str, records: Sequence[Any]) -> Path:
    lines = [json.dumps(record) for record in records]
    text = "".join(f"{line}\n" for line in lines) if name.endswith("l") else f"[{', '.join(lines)}]"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def refused(path: Path) -> InvalidDatasetError:
    with pytest.raises(InvalidDatasetError) as caught:
        read_vlm_samples(path, DEFAULT)
    return caught.value


def told(path: Path) -> list[tuple[str, str]]:
    """Message and hint of every diagnostic."""
    return [(problem.message, problem.hint) for problem in refused(path).diagnostics]


# The sample


def test_a_sample_is_a_frozen_value_with_only_a_text_required() -> None:
    sample = VlmCalibSample("Why?")
    assert astuple(sample) == ("Why?", None, None, None)
    assert VlmCalibSample(image="/a.jpg", text="Why?") == VlmCalibSample("Why?", "/a.jpg")
    with pytest.raises(FrozenInstanceError):
        sample.text = "How?"  # type: ignore[misc]


def test_the_reader_is_imported_without_pillow() -> None:
    program = "import sys, modelslim.vlm_dataset; assert not {'PIL', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


# Method 1: an index


@pytest.mark.parametrize("name", ["index.json", "index.jsonl"])
@pytest.mark.parametrize("by_directory", [True, False])
def test_an_index_takes_text_image_audio_and_video(folder: Path, name: str, by_directory: bool) -> None:
    index = write(
        folder,
        name,
        [
            {"image": "a.jpg", "text": " kept as it is\n"},
            {"image": "sub/c.JPEG"},
            {"audio": "a.wav", "text": "Was ist zu hören?"},
            {"audio": "a.MP3", "video": "a.mp4", "image": "b.png"},
            {"text": "text alone"},
            {"image": "./sub/../a.jpg", "text": "it stays inside"},
        ],
    )
    samples, warnings = read_vlm_samples(folder if by_directory else index, DEFAULT)
    assert samples == [
        VlmCalibSample(" kept as it is\n", f"{folder}/a.jpg"),
        VlmCalibSample(DEFAULT, f"{folder}/sub/c.JPEG"),
        VlmCalibSample("Was ist zu hören?", audio=f"{folder}/a.wav"),
        VlmCalibSample(DEFAULT, f"{folder}/b.png", f"{folder}/a.MP3", f"{folder}/a.mp4"),
        VlmCalibSample("text alone"),
        VlmCalibSample("it stays inside", f"{folder}/sub/../a.jpg"),
    ]
    assert warnings == []


def test_paths_are_absolute_wherever_the_program_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "index.jsonl", [{"image": "a.jpg"}])
    for here, path in ((folder.parent, "calib"), (folder, "."), (folder, "index.jsonl"), (folder / "sub", "..")):
        monkeypatch.chdir(here)
        [sample], _ = read_vlm_samples(Path(path), DEFAULT)
        assert sample.image is not None and Path(sample.image).is_absolute()
        assert Path(sample.image).samefile(folder / "a.jpg")


def test_what_lies_beside_an_index_does_not_matter(folder: Path) -> None:
    write(folder, "index.json", [{"text": "one"}])
    write(folder, "other.json", [{"text": "two"}])
    (folder / "broken.jpg").write_bytes(b"no image")
    assert read_vlm_samples(folder, DEFAULT) == ([VlmCalibSample("one")], [])


RECORDS: list[tuple[Any, list[tuple[str, str]]]] = [
    ("text", [("is str, not an object", 'write {"image": "a.jpg", "text": "..."}')]),
    (None, [("is NoneType, not an object", 'write {"image": "a.jpg", "text": "..."}')]),
    ([], [("is list, not an object", 'write {"image": "a.jpg", "text": "..."}')]),
    ({}, [("is empty: it has neither text nor a file", 'write {"image": "a.jpg", "text": "..."}')]),
    ({"imgae": "a.jpg"}, [("has the unknown key 'imgae'", "did you mean 'image'?")]),
    ({"text": "a", "id": 7}, [("has the unknown key 'id'", "known: audio, image, text, video")]),
    ({"text": ""}, [("text is empty", "leave text out to have default_text")]),
    ({"text": " \n"}, [("text is empty", "leave text out to have default_text")]),
    ({"text": 5}, [("text is int, not a string", "write the text in quotes")]),
    ({"text": None, "image": "a.jpg"}, [("text is NoneType, not a string", "write the text in quotes")]),
    (
        {"text": "half a \ud83d pair"},
        [("text is not valid Unicode: it holds half of a surrogate pair", "correct the escape \\uD...")],
    ),
    ({"image": ""}, [("image is empty", "write its path, or leave the key out")]),
    ({"audio": " "}, [("audio is empty", "write its path, or leave the key out")]),
    ({"video": None}, [("video is NoneType, not a string", "write its path, or leave the key out")]),
    ({"image": ["a.jpg"]}, [("image is list, not a string", "write its path, or leave the key out")]),
    (
        {"image": "a.gif"},
        [("image 'a.gif' is not .jpg, .jpeg or .png", "convert the file; renaming does not change what it holds")],
    ),
    (
        {"audio": "a.jpg"},
        [("audio 'a.jpg' is not .wav or .mp3", "convert the file; renaming does not change what it holds")],
    ),
    (
        {"video": "a.mov"},
        [("video 'a.mov' is not .mp4", "convert the file; renaming does not change what it holds")],
    ),
    ({"image": "a.png"}, [("image 'a.png' does not exist", "did you mean 'b.png'?")]),
    ({"image": "distant.png"}, [("image 'distant.png' does not exist", "it is looked for in {folder}")]),
    ({"image": "{folder}/a.jpg"}, [("image '{folder}/a.jpg' is an absolute path", "write it relative to {folder}")]),
    ({"image": "C:\\a.jpg"}, [("image 'C:\\\\a.jpg' is an absolute path", "write it relative to {folder}")]),
    ({"image": "../a.jpg"}, [("image '../a.jpg' leaves the directory", "copy the file into {folder}")]),
    ({"image": "sub/../../a.jpg"}, [("image 'sub/../../a.jpg' leaves the directory", "copy the file into {folder}")]),
    ({"image": "../calib/a.jpg"}, [("image '../calib/a.jpg' leaves the directory", "copy the file into {folder}")]),
    (
        {"image": "../../etc/passwd", "text": "", "sound": "a.wav"},
        [
            ("has the unknown key 'sound'", "known: audio, image, text, video"),
            ("text is empty", "leave text out to have default_text"),
            (
                "image '../../etc/passwd' is not .jpg, .jpeg or .png",
                "convert the file; renaming does not change what it holds",
            ),
        ],
    ),
]


@pytest.mark.parametrize(("record", "expected"), RECORDS, ids=lambda value: json.dumps(value)[:40])
def test_every_broken_record_of_an_index_is_told_with_its_place(
    folder: Path, record: Any, expected: list[tuple[str, str]]
) -> None:
    picture(folder.parent / "a.jpg")  # that a file is there does not help a path that leaves
    root = json.dumps(str(folder))[1:-1]
    record = json.loads(json.dumps(record).replace("{folder}", root))
    expected = [tuple(words.replace("{folder}", str(folder)) for words in pair) for pair in expected]
    good = {"text": "good"}
    (folder / "index.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(record)}\n{json.dumps(good)}\n")
    error = refused(folder)
    assert error.message == f"{folder}/index.jsonl: 1 broken record"
    assert error.hint == "correct or remove them"
    assert told(folder) == expected
    assert {(problem.file, problem.line, problem.path) for problem in error.diagnostics} == {
        (f"{folder}/index.jsonl", 3, "")
    }
    (folder / "index.jsonl").unlink()
    write(folder, "index.json", [good, record])
    assert told(folder) == expected
    assert {(problem.file, problem.line, problem.path) for problem in refused(folder).diagnostics} == {
        (f"{folder}/index.json", None, "[1]")
    }


def test_all_broken_records_are_told_at_once_and_counted_by_record(folder: Path) -> None:
    lines = ['{"image": "a.jpg"}', "{", '{"image": "x.jpg", "audio": "x.wav"}', '{"text": ""}', '{"text": "good"}']
    (folder / "index.jsonl").write_text("\n".join(lines))
    error = refused(folder)
    assert error.message == f"{folder}/index.jsonl: 3 broken records"
    assert [problem.line for problem in error.diagnostics] == [2, 3, 3, 4]
    assert error.diagnostics[0].message.startswith("not JSON: ")


def test_many_broken_records_are_counted_and_the_first_are_shown(folder: Path) -> None:
    write(folder, "index.jsonl", [{"text": ""}] * 50)
    error = refused(folder)
    assert error.message.endswith("50 broken records") and len(error.diagnostics) == 20
    assert error.hint == "correct or remove them; the first 20 of 50 are shown"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: "),
        (b'{"text": "a"}', "holds dict, not a list of records"),
        (b"[]", "holds no record"),
        (b"\xff[]", "not UTF-8 at byte 0"),
    ],
)
def test_an_index_that_is_no_list_of_records_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "index.json").write_bytes(content)
    assert refused(folder).message.startswith(f"{folder}/index.json: {message}")


# Method 2: images alone


def test_a_directory_of_images_gives_each_the_default_text(images: Path) -> None:
    (images / ".DS_Store").write_bytes(b"hidden")
    samples, warnings = read_vlm_samples(images, DEFAULT)
    assert samples == [VlmCalibSample(DEFAULT, f"{images}/{name}") for name in ("a.jpg", "b.png", "c.jpeg")]
    assert warnings == []


def test_everything_else_in_a_directory_of_images_is_refused_at_once(images: Path) -> None:
    (images / "a.mp4").write_bytes(b"ftyp")
    (images / "d.webp").write_bytes(b"RIFF")
    (images / "more").mkdir()
    (images / "z.png").write_bytes(b"x")
    hint = "a directory without an index holds images (.jpg, .jpeg, .png) and nothing else"
    assert told(images) == [
        ("'a.mp4' is no image", hint),
        ("'d.webp' is no image", hint),
        ("'more' is no image", hint),
        ("image 'z.png' holds neither JPEG nor PNG data", "export the image as JPEG or PNG"),
    ]
    error = refused(images)
    assert error.message == f"{images}: 4 broken files"
    assert {problem.place for problem in error.diagnostics} == {str(images)}


# Method 3: images and a file that describes them


@pytest.mark.parametrize("name", ["calib_data.jsonl", "notes.json", "INDEX.JSON"])
def test_a_file_of_another_name_gives_the_images_their_texts(images: Path, name: str) -> None:
    records = [{"image": image, "text": f"text of {image}"} for image in ("c.jpeg", "a.jpg", "b.png", "a.jpg")]
    file = images / name
    write(images, name, records) if not name.isupper() else file.write_text(json.dumps(records))
    samples, warnings = read_vlm_samples(images, DEFAULT)
    assert samples == [VlmCalibSample(record["text"], f"{images}/{record['image']}") for record in records]
    assert warnings == []


def test_files_that_the_describing_file_does_not_name_are_told_and_not_used(images: Path) -> None:
    picture(images / "sub" / "d.png")
    picture(images / "away" / "e.png")
    (images / "readme.txt").write_text("x")
    write(images, "calib.jsonl", [{"image": "./b.png", "text": "b"}, {"image": "sub/d.png", "text": "d"}])
    samples, warnings = read_vlm_samples(images, DEFAULT)
    assert len(samples) == 2
    assert warnings == [f"{images}: 4 files are not named in calib.jsonl and not used, such as 'a.jpg'"]
    write(images, "calib.jsonl", [{"image": f, "text": "x"} for f in ("b.png", "a.jpg", "sub/d.png", "away/e.png")])
    (images / "readme.txt").unlink()
    assert read_vlm_samples(images, DEFAULT)[1] == [
        f"{images}: 1 file is not named in calib.jsonl and not used, such as 'c.jpeg'"
    ]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"image": "a.jpg"},
            [
                (
                    "has no text, and default_text does not apply to calib.jsonl",
                    "write the prompt of this image, or rename the file to index.jsonl",
                )
            ],
        ),
        ({"image": "a.jpg", "text": ""}, [("text is empty", "write the prompt of this image")]),
        ({"text": "a"}, [("has no image", 'write {"image": "a.jpg", "text": "..."}')]),
        (
            {"image": "a.jpg", "text": "a", "audio": "a.wav"},
            [
                (
                    "has audio, and beside a directory of images only image is supported",
                    "rename the file to index.json or index.jsonl, which takes image, audio and video",
                )
            ],
        ),
        (
            {"image": "a.jpg", "text": "a", "video": 5},
            [
                (
                    "has video, and beside a directory of images only image is supported",
                    "rename the file to index.json or index.jsonl, which takes image, audio and video",
                )
            ],
        ),
        ({"image": "a.jpg", "txt": "a", "text": "a"}, [("has the unknown key 'txt'", "did you mean 'text'?")]),
        ("a.jpg", [("is str, not an object", 'write {"image": "a.jpg", "text": "..."}')]),
        (
            {"image": "../a.jpg", "text": 1},
            [
                ("text is int, not a string", "write the text in quotes"),
                ("image '../a.jpg' leaves the directory", "copy the file into {images}"),
            ],
        ),
        ({"image": "bb.png", "text": "a"}, [("image 'bb.png' does not exist", "did you mean 'b.png'?")]),
    ],
)
def test_every_broken_record_of_a_describing_file_is_told_with_its_line(
    images: Path, record: Any, expected: list[tuple[str, str]]
) -> None:
    write(images, "calib.jsonl", [{"image": "a.jpg", "text": "good"}, record])
    error = refused(images)
    assert error.message == f"{images}/calib.jsonl: 1 broken record"
    assert told(images) == [(message, hint.replace("{images}", str(images))) for message, hint in expected]
    assert {problem.place for problem in error.diagnostics} == {f"{images}/calib.jsonl:2"}


# Layouts that are none of the three


def test_both_indexes_in_one_directory_are_refused(folder: Path) -> None:
    write(folder, "index.json", [{"text": "a"}])
    index = write(folder, "index.jsonl", [{"text": "b"}])
    error = refused(folder)
    assert error.message == f"{folder}: holds both index.json and index.jsonl"
    assert error.hint == "remove one of them"
    assert read_vlm_samples(index, DEFAULT)[0] == [VlmCalibSample("b")]  # the file itself is no question


def test_several_describing_files_are_refused(images: Path) -> None:
    for name in ("one.json", "two.jsonl", "three.JSON"):
        (images / name).write_text("[]")
    error = refused(images)
    assert error.message == f"{images}: holds 3 .json or .jsonl files: one.json, three.JSON, two.jsonl"
    assert error.hint == "keep one, or call the one that counts index.json or index.jsonl"


@pytest.mark.parametrize("hidden", [False, True])
def test_an_empty_directory_is_refused(tmp_path: Path, hidden: bool) -> None:
    if hidden:
        (tmp_path / ".gitkeep").touch()
    error = refused(tmp_path)
    assert (error.message, error.hint) == (
        f"{tmp_path}: the directory is empty",
        "calibration needs at least one image",
    )


@pytest.mark.parametrize("name", ["calib.jsonl", "mix_calib.jsonl", "a.jpg", "index.txt", "index.yaml"])
def test_a_file_that_is_no_index_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text('{"text": "a"}\n')
    error = refused(folder / name)
    assert error.message == (
        f"{folder}/{name}: a file of multimodal calibration data is called index.json or index.jsonl"
    )
    assert error.hint == "rename it, or give the directory that holds it and the images"


# Paths


def image_told(folder: Path, value: str) -> str:
    """What an index that names one image is told about it."""
    write(folder, "index.jsonl", [{"image": value, "text": "a"}])
    [(message, hint)] = told(folder)
    assert hint
    return message


def test_links_count_by_where_they_lead(folder: Path) -> None:
    outside = picture(folder.parent / "outside" / "o.png")
    (folder / "inside.png").symlink_to("b.png")
    (folder / "out.png").symlink_to(outside)
    (folder / "door").symlink_to(outside.parent)
    (folder / "back").symlink_to(folder / "sub")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    for name in ("inside.png", "back/c.JPEG"):
        write(folder, "index.jsonl", [{"image": name}])
        assert read_vlm_samples(folder, DEFAULT)[0] == [VlmCalibSample(DEFAULT, f"{folder}/{name}")]
    for name in ("out.png", "door/o.png"):
        assert image_told(folder, name) == f"image {name!r} is a link that leads out of the directory"
    assert image_told(folder, "nowhere.png") == "image 'nowhere.png' does not exist"
    assert image_told(folder, "loop.png").startswith("image 'loop.png' ")


def test_a_link_in_a_directory_of_images_counts_by_where_it_leads(images: Path) -> None:
    (images / "d.png").symlink_to(picture(images.parent / "d.png"))
    assert told(images) == [("image 'd.png' is a link that leads out of the directory", f"copy the file into {images}")]


def test_a_set_may_be_reached_through_a_link(folder: Path) -> None:
    write(folder, "index.jsonl", [{"image": "a.jpg"}])
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert read_vlm_samples(link, DEFAULT)[0] == [VlmCalibSample(DEFAULT, f"{link}/a.jpg")]


def test_what_is_no_file_is_refused(folder: Path) -> None:
    (folder / "d.png").mkdir()
    os.mkfifo(folder / "f.png")  # opening it would wait for ever
    (folder / "e.png").touch()
    assert image_told(folder, "d.png") == "image 'd.png' is not a file"
    assert image_told(folder, "f.png") == "image 'f.png' is not a file"
    assert image_told(folder, "e.png") == "image 'e.png' is an empty file"
    assert image_told(folder, "a.jpg/x.png") == "image 'a.jpg/x.png' does not exist"


@pytest.mark.parametrize("value", ["a\0.jpg", "\ud83d.jpg", "x" * 300 + ".jpg", "x/" * 3000 + "a.jpg"])
def test_names_that_no_file_can_have_are_refused(folder: Path, value: str) -> None:
    assert image_told(folder, value).startswith(f"image {value!r} cannot be read: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(folder: Path) -> None:
    (folder / "b.png").chmod(0)
    assert image_told(folder, "b.png").startswith("image 'b.png' cannot be read: ")


def test_empty_audio_and_video_are_refused(folder: Path) -> None:
    for name in ("e.wav", "e.mp4"):
        (folder / name).touch()
    write(folder, "index.jsonl", [{"audio": "e.wav", "video": "e.mp4"}])
    assert [message for message, _ in told(folder)] == [
        "audio 'e.wav' is an empty file",
        "video 'e.mp4' is an empty file",
    ]


# Images


@pytest.mark.parametrize(
    ("name", "mode", "save"),
    [
        ("a.jpg", "L", {}),
        ("a.jpg", "CMYK", {}),
        ("a.jpg", "RGB", {"progressive": True}),
        ("a.jpg", "RGB", {"form": "MPO", "save_all": True}),
        ("a.jpg", "RGB", {"form": "PNG"}),
        ("a.png", "RGBA", {}),
        ("a.png", "P", {"transparency": b"\x01\x80"}),
        ("a.png", "I;16", {}),
        ("a.png", "1", {}),
        ("a.png", "RGB", {"form": "JPEG"}),
    ],
)
def test_every_usual_kind_of_image_is_accepted(folder: Path, name: str, mode: str, save: dict[str, Any]) -> None:
    form = save.pop("form", None)
    gray = Image.fromarray(np.arange(960).reshape(24, 40).astype(np.uint16 if mode == "I;16" else np.uint8))
    image = gray if mode == "I;16" else gray.convert(mode)
    assert image.mode == mode
    image.save(folder / name, form, **save)
    write(folder, "index.jsonl", [{"image": name}])
    assert read_vlm_samples(folder, DEFAULT)[0] == [VlmCalibSample(DEFAULT, f"{folder}/{name}")]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "BMP", "TIFF"])
def test_another_format_under_a_good_name_is_refused(folder: Path, form: str) -> None:
    picture(folder / "x.jpg", form=form)
    assert image_told(folder, "x.jpg") == "image 'x.jpg' holds neither JPEG nor PNG data"


@pytest.mark.parametrize("content", [b"x", b"\0" * 1000, b"<svg/>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(folder: Path, content: bytes) -> None:
    (folder / "x.png").write_bytes(content)
    assert image_told(folder, "x.png").startswith(("image 'x.png' holds neither", "image 'x.png' is broken: "))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_is_refused_wherever_it_is_cut_off(tmp_path: Path, form: str) -> None:
    content = picture(tmp_path / "whole", (40, 33), form=form).read_bytes()
    file = tmp_path / "cut.png"
    refusals = 0
    for length in range(1, len(content) + 1, 7 if len(content) > 2000 else 3):
        file.write_bytes(content[:length])
        try:
            Image.open(io.BytesIO(content[:length])).convert("RGB")
            decodes = True
        except OSError:
            decodes = False
        checked = media.MediaFolder(tmp_path).check("image", "cut.png")
        assert isinstance(checked, str) is decodes, length
        refusals += not decodes
    assert refusals > 100


def test_a_damaged_image_is_told_as_broken(folder: Path) -> None:
    content = bytearray((folder / "b.png").read_bytes())
    content[content.index(b"IDAT") + 12] ^= 0xFF
    (folder / "b.png").write_bytes(content)
    assert image_told(folder, "b.png").startswith("image 'b.png' is broken: ")
    whole = picture(folder / "w.jpg", (64, 64)).read_bytes()
    (folder / "w.jpg").write_bytes(whole[: len(whole) // 2])
    assert image_told(folder, "w.jpg").startswith("image 'w.jpg' is broken: image file is truncated")


@pytest.mark.parametrize("limit", [40, 20])  # pillow warns above its limit and raises above twice of it
def test_an_image_of_too_many_pixels_is_refused(folder: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert image_told(folder, "b.png") == f"image 'b.png' has more than {limit} pixels"


def test_an_image_that_many_records_name_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(media, "_damage", opened.append)
    write(folder, "index.jsonl", [{"image": name, "text": "a"} for name in ("a.jpg", "b.png", "a.jpg", "a.jpg")])
    assert len(read_vlm_samples(folder, DEFAULT)[0]) == 4
    assert [path.name for path in opened] == ["a.jpg", "b.png"]


# Finding


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.scan()


def test_the_short_name_of_the_guide_finds_the_set_that_ships(registry: Registry, tmp_path: Path) -> None:
    path = find_dataset("calibImages", registry, tmp_path, directories=True)
    assert path == find_dataset("calibImages/", registry, tmp_path, directories=True)
    samples, warnings = read_vlm_samples(path, DEFAULT)
    assert 4 <= len(samples) <= 12 and warnings == []
    assert all(sample.image and Path(sample.image).is_file() for sample in samples)
    assert 0 < sum(sample.text == DEFAULT for sample in samples) < len(samples)


def test_a_directory_of_the_same_name_goes_before_the_set_that_ships(
    registry: Registry, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = images.rename(images.parent / "calibImages")
    assert find_dataset("calibImages", registry, mine.parent, directories=True) == mine
    assert find_dataset("./calibImages", registry, mine.parent, directories=True).samefile(mine)
    monkeypatch.chdir(mine.parent)
    assert find_dataset("calibImages", registry, directories=True).samefile(mine)


def test_directories_and_indexes_are_found_by_path(
    registry: Registry, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write(folder, "index.jsonl", [{"text": "a"}])
    for path in (folder, index):
        assert find_dataset(str(path), registry, directories=True) == path
    assert find_dataset("calib/index.jsonl", registry, tmp_path, directories=True) == index
    (tmp_path / "here" / "calib").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert find_dataset("calib", registry, tmp_path, directories=True).samefile(tmp_path / "here" / "calib")


@pytest.mark.parametrize(
    ("value", "directories", "message", "hint"),
    [
        ("calibImage", True, "no such file or directory", "did you mean 'calibImages'?"),
        ("nothing/like/it", True, "no such file or directory", "known: calibImages"),
        ("mix_calib.jsonl", True, "no such file or directory", "it is a file of texts, which apiversion modelslim_v1"),
        ("calibImages", False, "no such file", "it is a directory, which apiversion multimodal_vlm_modelslim_v1 reads"),
        ("empty", False, "no such file", "it is a directory, which apiversion multimodal_vlm_modelslim_v1 reads"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    registry: Registry, tmp_path: Path, value: str, directories: bool, message: str, hint: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError) as caught:
        find_dataset(value, registry, tmp_path, directories=directories)
    assert caught.value.message == (f"dataset {value!r}: {message}, and no installed calibration set has this name")
    assert caught.value.hint.startswith(hint)


def test_a_package_ships_sets_and_two_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("acme_one", "acme_two"):
        (tmp_path / package / "acmeImages").mkdir(parents=True)
        (tmp_path / package / "__pycache__").mkdir()
        (tmp_path / package / "__init__.py").touch()
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[modelslim.calibration]\n{package} = {package}\n")
    monkeypatch.syspath_prepend(tmp_path)
    one = tmp_path / "acme_one" / "acmeImages"
    two = tmp_path / "acme_two" / "acmeImages"
    alone = Registry.scan({"MODELSLIM_PLUGINS": "acme-one"})
    assert find_dataset("acmeImages", alone, directories=True) == one
    both = Registry.scan({"MODELSLIM_PLUGINS": "acme-one,acme-two"})
    with pytest.raises(DatasetError) as caught:
        find_dataset("acmeImages", both, directories=True)
    assert caught.value.message == "dataset 'acmeImages': several packages ship a calibration set of this name"
    assert caught.value.hint == f"write the path of the one that you mean: {one}, {two}"
    with pytest.raises(DatasetError, match="no such file"):
        find_dataset("__pycache__", both, directories=True)


# The set that ships


def test_the_shipped_images_are_those_that_the_script_draws(registry: Registry, tmp_path: Path) -> None:
    shipped = find_dataset("calibImages", registry, directories=True)
    draw_all(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == sorted(file.name for file in shipped.iterdir() if file.name != "index.jsonl")
    for name in names:
        pixels = [np.asarray(Image.open(path / name).convert("RGB"), np.int16) for path in (shipped, tmp_path)]
        assert pixels[0].shape == pixels[1].shape
        assert np.abs(pixels[0] - pixels[1]).mean() < 2, name  # encoders differ between releases of pillow


def test_the_shipped_images_are_small_and_differ_in_size(registry: Registry) -> None:
    shipped = find_dataset("calibImages", registry, directories=True)
    files = [file for file in shipped.iterdir() if file.suffix != ".jsonl"]
    sizes = set()
    for file in files:
        with Image.open(file) as image:
            sizes.add(image.size)
    assert len(sizes) == len(files) >= 4
    assert {width > height for width, height in sizes} == {True, False}
    assert sum(file.stat().st_size for file in files) < 100_000
