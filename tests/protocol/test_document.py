# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelslim.errors import ProtocolError
from modelslim.protocol.document import MAX_BYTES, Document, format_path, parse_document, read_document

HERE = Path(__file__).parent

# The tables of chapter 10.3 of the YAML 1.2.2 specification, its example 10.9, and YAML 1.1's traps.
SCALARS: list[tuple[str, Any]] = [
    ("null", None),
    ("Null", None),
    ("NULL", None),
    ("~", None),
    ("", None),
    ("nULL", "nULL"),
    ("none", "none"),
    ("true", True),
    ("True", True),
    ("TRUE", True),
    ("false", False),
    ("False", False),
    ("FALSE", False),
    ("tRUE", "tRUE"),
    *((word, word) for word in ("on", "On", "off", "OFF", "yes", "Yes", "no", "NO", "y", "n")),
    ("0", 0),
    ("-0", 0),
    ("-19", -19),
    ("+12", 12),
    ("0123", 123),
    ("0o7", 7),
    ("0o17", 15),
    ("0o8", "0o8"),
    ("0x3A", 58),
    ("0xff", 255),
    ("-0x3A", "-0x3A"),
    ("0b11", "0b11"),
    ("1_000", "1_000"),
    ("685:230", "685:230"),
    ("0.", 0.0),
    ("-0.0", -0.0),
    (".5", 0.5),
    ("+.5", 0.5),
    ("+12e03", 12000.0),
    ("-2E+05", -200000.0),
    ("1e-5", 1e-5),
    ("1E5", 1e5),
    ("6.02e23", 6.02e23),
    (".", "."),
    ("e5", "e5"),
    ("1e", "1e"),
    ("1.2.3", "1.2.3"),
    ("1e400", math.inf),
    (".inf", math.inf),
    (".Inf", math.inf),
    ("+.INF", math.inf),
    ("-.Inf", -math.inf),
    ("inf", "inf"),
    ("nan", "nan"),
    ("+.nan", "+.nan"),
    ("2001-12-14", "2001-12-14"),
    ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
    ("12:30:45", "12:30:45"),
    ("=", "="),
    ("١٢", "١٢"),  # digits of another script
    ("a b", "a b"),
    ("'null'", "null"),
    ('"true"', "true"),
    ("'12'", "12"),
    ('"0x3A"', "0x3A"),
    ('""', ""),
    ("|\n  12", "12"),
    (">-\n  true", "true"),
]


@pytest.mark.parametrize(("text", "expected"), SCALARS, ids=[text for text, _ in SCALARS])
def test_a_scalar_means_what_the_core_schema_says(text: str, expected: Any) -> None:
    value = parse_document(f"key: {text}").value["key"]
    assert type(value) is type(expected)
    assert value == expected
    if isinstance(expected, float):
        assert math.copysign(1, value) == math.copysign(1, expected)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number_is_a_float(text: str) -> None:
    assert math.isnan(parse_document(f"key: {text}").value["key"])


@pytest.mark.parametrize("path", sorted((HERE / "good").glob("*.yaml")), ids=lambda path: path.stem)
def test_documents_that_mean_the_same_in_yaml_1_1_and_1_2_are_read_as_pyyaml_reads_them(path: Path) -> None:
    assert read_document(path).value == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_a_mapping_wins_over_what_it_merges_and_the_first_merge_over_the_second() -> None:
    document = parse_document(
        "a: &a {x: 1, y: 1, z: 1}\n"
        "b: &b {x: 2, y: 2, w: 2}\n"
        "one: {x: 3, <<: *a}\n"
        "two: {<<: [*a, *b], x: 4}\n"
        "quoted: {'<<': 5}\n"
    )
    assert document.value["one"] == {"x": 3, "y": 1, "z": 1}
    assert document.value["two"] == {"x": 4, "y": 1, "z": 1, "w": 2}
    assert document.value["quoted"] == {"<<": 5}
    assert document.position(("one", "y")) == document.position(("a", "y"))
    assert document.position(("one", "x")) == (3, 10)


def random_value(generator: random.Random, depth: int, names: list[str]) -> Any:
    """A nested value in which every key and every scalar is a word of its own."""
    names.append(f"w{len(names)}w")
    kind = generator.choice(["scalar", "mapping", "list"]) if depth else "scalar"
    if kind == "scalar":
        return names[-1]
    count = generator.randint(1, 4)
    if kind == "list":
        return [random_value(generator, depth - 1, names) for _ in range(count)]
    mapping = {}
    for _ in range(count):
        names.append(f"w{len(names)}w")
        key = names[-1]
        mapping[key] = random_value(generator, depth - 1, names)
    return mapping


def check_positions(document: Document, text: str, value: Any, path: tuple[str | int, ...]) -> int:
    """Compare every scalar and key with where the text has it; how many there were."""

    def found(word: str) -> tuple[int, int]:
        index = text.index(word)
        return text[:index].count("\n") + 1, index - (text[:index].rfind("\n") + 1) + 1

    if isinstance(value, str):
        assert document.position(path) == found(value)
        return 1
    count = 0
    for step, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(step, str):
            assert document.position((*path, step), key=True) == found(step)
            count += 1
        count += check_positions(document, text, item, (*path, step))
    return count


@pytest.mark.parametrize("seed", range(40))
def test_positions_are_where_the_text_has_the_words(seed: int) -> None:
    generator = random.Random(seed)
    value = {"root": random_value(generator, 5, [])}
    flow = generator.choice([True, False, None])
    text = yaml.dump(value, default_flow_style=flow, indent=generator.randint(2, 6), width=generator.choice([20, 200]))
    text = "# é comment\n" * generator.randint(0, 3) + text
    if generator.random() < 0.5:
        text = text.replace("\n", "\r\n")
    document = parse_document(text)
    assert document.value == value
    assert check_positions(document, text, value, ()) >= 2


def test_a_value_behind_an_alias_stands_where_the_anchor_holds_it() -> None:
    text = "one: &x\n  act: {dtype: int8}\ntwo:\n  three: *x\n"
    document = parse_document(text)
    assert document.position(("two", "three", "act", "dtype")) == (2, text.split("\n")[1].index("int8") + 1)
    assert document.position(("two", "three"), key=True) == (4, 3)


def test_a_path_that_is_not_written_has_the_place_of_its_nearest_ancestor() -> None:
    document = parse_document("spec:\n  process:\n    - type: a\n")
    assert document.position(("spec", "process", 0, "include", 3)) == (3, 7)
    assert document.position(("spec", "save"), key=True) == (1, 1)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("spec", "process", 0, "qconfig", "act"), "spec.process[0].qconfig.act"),
        ((0, "a"), "[0].a"),
        (("tags", "Qwen2.5-7B", 1, ""), 'tags["Qwen2.5-7B"][1][""]'),
    ],
)
def test_paths_are_written_like_json_paths(path: tuple[str | int, ...], text: str) -> None:
    assert format_path(path) == text


def refusal(path: Path) -> str:
    with pytest.raises(ProtocolError) as caught:
        read_document(path)
    [diagnostic] = caught.value.diagnostics
    return str(diagnostic).replace(str(path), path.name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.yaml") == "a.yaml: no such file or directory"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path.name}: is a directory"


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file" / "a.yaml") == "a.yaml: not a directory"


def test_a_name_with_a_nul_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a\0.yaml") == "a\0.yaml: embedded null byte"


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n", "---\n", "\ufeff"])
def test_an_empty_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content, encoding="utf-8")
    assert "the file is empty (a protocol starts with apiversion: modelslim_v1)" in refusal(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffkey: value\n", encoding="utf-8")
    document = read_document(path)
    assert document.value == {"key": "value"}
    assert document.position(("key",)) == (1, 6)


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("a: ü\nb: é\n".encode("latin-1"), "1:4: the byte 0xfc"),
        ("ä: 1\nö: ü".encode() + b"\xff", "2:5: the byte 0xff"),
        ("a: 1\n".encode("utf-16"), "1:1: the byte 0xff"),
    ],
)
def test_bytes_that_are_not_utf_8_are_located(data: bytes, place: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    assert refusal(path) == f"a.yaml:{place} is not UTF-8 (save the file as UTF-8)"


@pytest.mark.parametrize("character", ["\0", "\x01", "\x7f", "\ufffe"])
def test_characters_that_yaml_forbids_are_located(character: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"a: 1\nb: x{character}y\n", encoding="utf-8")
    code = f"U+{ord(character):04X}"
    assert refusal(path) == f"a.yaml:2:5: the character {code} is not allowed in YAML (delete it)"


def timed_refusal(text: str, seconds: float = 10.0) -> str:
    """What is said about a text, which must not take long to find."""
    start = time.process_time()
    with pytest.raises(ProtocolError) as caught:
        parse_document(text)
    assert time.process_time() - start < seconds
    return str(caught.value.diagnostics[0])


def test_a_file_of_10_mb_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("key: [1, 2, 3]\n" * 700_000, encoding="utf-8")
    assert path.stat().st_size > 10_000_000
    start = time.process_time()
    assert refusal(path) == "a.yaml: the file is larger than 1 MiB (is it a protocol?)"
    assert time.process_time() - start < 1


def test_a_file_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1 #".ljust(MAX_BYTES, "x"), encoding="utf-8")
    assert read_document(path).value == {"a": 1}


def test_a_long_text_is_refused_like_a_large_file() -> None:
    assert "longer than" in timed_refusal("a: 1 #" + "x" * MAX_BYTES, 1)


def test_a_billion_laughs_are_refused_within_two_seconds() -> None:
    lines = ["a0: &a0 [" + ", ".join(["lol"] * 10) + "]"]
    lines += [f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 10) + "]" for level in range(1, 10)]
    assert "aliases expand the document to more than 100,000 values" in timed_refusal("\n".join(lines), 2)


def test_a_billion_merges_are_refused_within_two_seconds() -> None:
    lines = ["a0: &a0 {" + ", ".join(f"k{key}: {{}}" for key in range(10)) + "}"]
    lines += [f"a{level}: &a{level} {{<<: [" + ", ".join([f"*a{level - 1}"] * 10) + "]}" for level in range(1, 10)]
    assert "aliases expand the document to more than 100,000 values" in timed_refusal("\n".join(lines), 2)


def test_aliases_within_the_limit_are_expanded() -> None:
    lines = ["a: &a [" + ", ".join(["x"] * 100) + "]", "b: [" + ", ".join(["*a"] * 900) + "]"]
    assert parse_document("\n".join(lines)).value["b"] == [["x"] * 100] * 900


@pytest.mark.parametrize(
    "line",
    [
        "a{0}: &a{0} [[[[[[*a{1}]]]]]]",
        "a{0}: &a{0} {{<<: *a{1}}}",
        "a{0}: &a{0} {{k: *a{1}}}",
    ],
)
def test_depth_counts_what_aliases_hide(line: str) -> None:
    lines = ["a0: &a0 {k: v}", *(line.format(level, level - 1) for level in range(1, 500))]
    assert "more than 40 levels" in timed_refusal("\n".join(lines))


@pytest.mark.parametrize("opening", ["[", "{", "- ", "? ", "{a: ", "a:\n" + " " * 200])
def test_endless_nesting_is_refused(opening: str) -> None:
    text = opening * (MAX_BYTES // len(opening))
    timed_refusal(text if not opening.startswith("a") else "".join(f"{' ' * level}a:\n" for level in range(1000)))


def test_too_many_values_are_refused() -> None:
    assert "the document holds more than 100,000 values" in timed_refusal("- 1\n" * 110_000)


def test_many_lines_with_equals_signs_do_not_take_forever() -> None:
    timed_refusal("a:\n" + "  k: 1\n  x=1\n" * 2_000)


def test_every_damage_is_read_or_refused_with_a_place() -> None:
    generator = random.Random(0)
    texts = [path.read_text(encoding="utf-8") for path in sorted((HERE / "good").glob("*.yaml"))]
    refused = 0
    for _ in range(400):
        text = generator.choice(texts)
        for _ in range(generator.randint(1, 3)):
            index = generator.randrange(len(text))
            noise = generator.choice(
                ["", "\t", ":", "-", "[", "]", "{", "}", "*", "&", "!", '"', "'", "=", "\n", "|", "%"]
            )
            text = text[:index] + noise + text[index + generator.randint(0, 2) :]
        try:
            parse_document(text)
        except ProtocolError as error:
            refused += 1
            assert error.diagnostics
            for diagnostic in error.diagnostics:
                assert diagnostic.line is not None
                assert 1 <= diagnostic.line <= text.count("\n") + 1
                assert not re.search(r"unicode string|Traceback", diagnostic.message)
    assert refused > 100
