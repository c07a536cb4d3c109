# SPDX-License-Identifier: Apache-2.0
"""Calibration data: what is accepted, and what every broken record is told, with its line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelslim.dataset import find_dataset, read_samples
from modelslim.errors import DatasetError
from modelslim.registry import Registry

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
RECORDS: list[tuple[Any, Any]] = [
    ("plain text", "plain text"),
    ({"inputs_pretokenized": "one"}, "one"),
    ({"text": "two", "id": 7}, "two"),
    ({"prompt": "three"}, "three"),
    ({"messages": CHAT}, CHAT),
    ({"text": "  kept as it is\n"}, "  kept as it is\n"),
]
BROKEN: list[tuple[Any, str]] = [
    (5, "is int, not a string or an object"),
    (None, "is NoneType, not a string or an object"),
    (True, "is bool, not a string or an object"),
    (["a"], "is list, not a string or an object"),
    ({}, "has none of the keys inputs_pretokenized, text, prompt, messages"),
    ({"txet": "a"}, "has none of the keys"),
    ({"text": 5}, "text is int, not a string"),
    ({"text": None}, "text is NoneType, not a string"),
    ({"prompt": ["a"]}, "prompt is list, not a string"),
    ("", "its text is empty"),
    ({"text": " \n\t"}, "its text is empty"),
    ({"messages": []}, "messages is not a list of {role, content}"),
    ({"messages": "hello"}, "messages is not a list of {role, content}"),
    ({"messages": [{"role": "user"}]}, "messages is not a list of {role, content}"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages is not a list of {role, content}"),
    ({"messages": [{"role": 1, "content": "a"}]}, "messages is not a list of {role, content}"),
    ({"messages": ["a"]}, "messages is not a list of {role, content}"),
    ({"text": "half a \ud83d pair"}, "its text is not valid Unicode"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "its text is not valid Unicode"),
]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.scan()


def jsonl(path: Path, *lines: str) -> Path:
    file = path / "data.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_kind_of_record_is_read(tmp_path: Path, ascii_only: bool) -> None:
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record, _ in RECORDS]
    expected = [sample for _, sample in RECORDS]
    assert read_samples(jsonl(tmp_path, *lines)) == expected
    whole = tmp_path / "data.json"
    whole.write_text(f"[{', '.join(lines)}]", encoding="utf-8")
    assert read_samples(whole) == expected


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_every_kind_of_broken_record_is_named_with_its_line(tmp_path: Path, record: Any, message: str) -> None:
    file = jsonl(tmp_path, '"good"', "", json.dumps(record))
    with pytest.raises(DatasetError) as caught:
        read_samples(file)
    assert caught.value.message == f"{file}: 1 broken record"
    (problem,) = caught.value.diagnostics
    assert message in problem.message
    assert (problem.file, problem.line) == (str(file), 3)
    assert problem.hint
    whole = tmp_path / "data.json"
    whole.write_text(json.dumps(["good", record]))
    with pytest.raises(DatasetError) as caught:
        read_samples(whole)
    (problem,) = caught.value.diagnostics
    assert message in problem.message
    assert (problem.file, problem.path, problem.line) == (str(whole), "[1]", None)


@pytest.mark.parametrize(
    "line", ["{", "{'text': 'a'}", '{"text": "a"} {"text": "b"}', "text", '{"text": "a\tb"}', "[" * 9999]
)
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_samples(jsonl(tmp_path, '"good"', line, '"good"'))
    (problem,) = caught.value.diagnostics
    assert problem.line == 2 and problem.message.startswith("not JSON")


def test_all_broken_records_are_told_at_once(tmp_path: Path) -> None:
    lines = ['"good"', "{", '{"text": 5}', '"good"', '""', "5"]
    with pytest.raises(DatasetError, match="4 broken records") as caught:
        read_samples(jsonl(tmp_path, *lines))
    assert [problem.line for problem in caught.value.diagnostics] == [2, 3, 5, 6]


def test_many_broken_records_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="50 broken records") as caught:
        read_samples(jsonl(tmp_path, *["5"] * 50))
    assert [problem.line for problem in caught.value.diagnostics] == list(range(1, 21))
    assert "the first 20 of 50 are shown" in caught.value.hint


def test_line_ends_of_windows_are_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'"one"\r\n\r\n{"text": "two\\r\\nlines"}\r\n5\r\n')
    with pytest.raises(DatasetError) as caught:
        read_samples(file)
    assert [problem.line for problem in caught.value.diagnostics] == [4]
    file.write_bytes(b'"one"\r\n{"text": "two\\r\\nlines"}')
    assert read_samples(file) == ["one", "two\r\nlines"]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    for name, content in (("data.jsonl", '"one"\n"two"\n'), ("data.json", '["one", "two"]')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_samples(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_separators_of_unicode_inside_a_string_end_no_line(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}still one"
    literal = f'"{text}"' if ord(separator) > 31 else json.dumps(text)
    assert read_samples(jsonl(tmp_path, literal, '"two"')) == [text, "two"]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]")])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match="holds no record"):
        read_samples(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 9999, "not JSON"),
        ('{"text": "a"}', "holds dict, not a list"),
        ('"a"', "holds str"),
    ],
)
def test_a_json_file_that_is_no_list_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_samples(tmp_path / "a.json")


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    start = b'"' + b"x" * 100_000
    file.write_bytes(start + "größe".encode("latin-1") + b'"\n')
    with pytest.raises(DatasetError, match=f"not UTF-8 at byte {len(start) + 2}"):
        read_samples(file)


@pytest.mark.parametrize("name", ["data.txt", "data", "data.jsonl.gz", "data.JSONL"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('"a"\n')
    with pytest.raises(DatasetError, match=r"calibration data is \.jsonl or \.json, not"):
        read_samples(tmp_path / name)


def test_a_file_that_cannot_be_opened_is_an_error_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        read_samples(tmp_path / "a.jsonl")


# Finding


def test_a_short_name_finds_the_set_that_ships(registry: Registry) -> None:
    file = find_dataset("mix_calib.jsonl", registry)
    assert file.name == "mix_calib.jsonl" and len(read_samples(file)) > 20


def test_the_set_that_ships_is_a_mixture(registry: Registry) -> None:
    texts = read_samples(find_dataset("mix_calib.jsonl", registry))
    assert len(texts) >= 64 and len(set(texts)) == len(texts)
    kinds = {
        "Chinese": r"[\u4e00-\u9fff]{8}",
        "English": r"(?i)\bthe [a-z]+ (was|is|of)\b",
        "code": r"(?m)^(import|def|#include|fn|func|class|use|public) ",
        "mathematics": r"\$[^$]*\\\w+|\\frac|\bmod\b",
        "chat": r"<\|im_start\|>user",
    }
    for kind, pattern in kinds.items():
        assert sum(bool(re.search(pattern, text)) for text in texts) >= 6, kind
    # Any quarter of it is a mixture too, since limits take a part.
    assert all(any(re.search(pattern, text) for text in texts[:18]) for pattern in kinds.values())


def test_a_file_of_the_same_name_goes_before_the_set_that_ships(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mix_calib.jsonl").write_text('"mine"\n')
    assert read_samples(find_dataset("mix_calib.jsonl", registry, tmp_path)) == ["mine"]
    monkeypatch.chdir(tmp_path)
    assert read_samples(find_dataset("mix_calib.jsonl", registry)) == ["mine"]


def test_relative_paths_are_tried_from_here_and_from_the_protocol(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, protocol = tmp_path / "here", tmp_path / "protocol"
    for folder, text in ((here, "here"), (protocol, "protocol")):
        (folder / "sets").mkdir(parents=True)
        (folder / "sets" / "a.jsonl").write_text(f'"{text}"\n')
    monkeypatch.chdir(here)
    assert read_samples(find_dataset("sets/a.jsonl", registry, protocol)) == ["here"]
    shutil.rmtree(here / "sets")
    assert read_samples(find_dataset("sets/a.jsonl", registry, protocol)) == ["protocol"]
    assert read_samples(find_dataset("../protocol/sets/a.jsonl", registry)) == ["protocol"]
    assert find_dataset(str(protocol / "sets" / "a.jsonl"), registry) == protocol / "sets" / "a.jsonl"


def test_the_home_directory_may_be_written_as_a_tilde(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('"a"\n')
    assert find_dataset("~/a.jsonl", registry, tmp_path / "elsewhere") == tmp_path / "a.jsonl"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("mix_calb.jsonl", "did you mean 'mix_calib.jsonl'?"),
        ("nothing/like/it.jsonl", "known: "),
        ("sub/mix_calib.jsonl", "did you mean 'mix_calib.jsonl'?"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(registry: Registry, tmp_path: Path, value: str, hint: str) -> None:
    with pytest.raises(DatasetError, match="no such file, and no installed calibration set has this name") as caught:
        find_dataset(value, registry, tmp_path)
    assert caught.value.hint.startswith(hint)
    with pytest.raises(DatasetError):  # a directory is no file
        find_dataset(str(tmp_path), registry)
