# SPDX-License-Identifier: Apache-2.0
"""The existing tool's YAML of a conversion: what it asks for, and what of it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from modelslim.convert_protocol import read_conversion
from modelslim.errors import ProtocolError

Protocol = Callable[[str], Path]

HEAD = "apiversion: modelslim_convert\nspec:\n"


@pytest.mark.parametrize(
    ("save", "to", "size"),
    [
        ("huggingface, part_file_size: 4", "float", 4),
        ("hf", "float", None),
        ("compressed_tensors", "compressed_tensors_saver", None),
        ("ascend_v1", "ascendv1_saver", None),
        ("ascendv1_saver, part_file_size: 0.5", "ascendv1_saver", 0.5),
    ],
)
def test_a_format(save: str, to: str, size: float | None, protocol: Protocol) -> None:
    found = read_conversion(protocol(f"{HEAD}  save: [{{type: {save}}}]\n"))
    assert found is not None
    assert (found.to, found.part_file_size, found.protocol, list(found.warnings)) == (to, size, None, [])


def test_all_linears_to_float(protocol: Protocol) -> None:
    text = f"""{HEAD}  linears: [{{match: ["*"], target: FLOAT, route: [FP8_BLOCK, FLOAT]}}]
  parallel: {{workers: 8}}
  save: [{{type: huggingface}}]
"""
    found = read_conversion(protocol(text))
    assert found is not None and (found.to, found.protocol) == ("float", None)
    assert [warning.partition("yaml")[2] for warning in found.warnings] == [
        ":4:13: spec.parallel: has no effect: linears are converted one after another",
        ":3:50: spec.linears[0].route: has no effect: there is one way to each target",
    ]


def test_mxfp8_is_quantized(protocol: Protocol) -> None:
    text = f"""{HEAD}  linears:
    - {{match: "*mlp*", target: W8A8_MXFP8}}
    - {{match: ["*down_proj", "*experts*"], target: FLOAT}}
  save: [{{type: ascend_v1, part_file_size: 2}}]
"""
    found = read_conversion(protocol(text))
    assert found is not None
    with found.protocol_file() as file:
        value = yaml.safe_load(file.read_text())
    mxfp8 = {"dtype": "mxfp8", "scope": "per_block"}
    (entry,) = value["spec"]["process"]
    assert entry == {
        "type": "linear_quant",
        "qconfig": {"act": mxfp8, "weight": mxfp8},
        "include": ["*mlp*"],
        "exclude": ["*down_proj", "*experts*"],
    }
    assert value["spec"]["save"] == [{"type": "ascendv1_saver", "part_file_size": 2}]
    assert value["apiversion"] == "modelslim_v1"


def test_another_protocol_is_none(protocol: Protocol, w8a16: str) -> None:
    assert read_conversion(protocol(w8a16)) is None


def test_every_mistake_with_its_place(protocol: Protocol) -> None:
    text = f"""{HEAD}  preprocess: [{{type: rename, patterns: [{{from: a, to: b}}]}}]
  linear: []
  linears:
    - {{match: ["*mlp*"], target: FLOAT}}
    - {{match: ["*"], target: INT4_PACKED}}
    - {{match: 3, target: FLOAT}}
  save: [{{type: ascend_v2, part_file_size: -1}}]
"""
    with pytest.raises(ProtocolError) as caught:
        read_conversion(protocol(text))
    told = {(one.line, one.path): one.message for one in caught.value.diagnostics}
    assert told == {
        (4, "spec.linear"): "unknown key 'linear'",
        (3, "spec.preprocess"): "stored names are known to the model's adapter and stay",
        (9, "spec.save[0].part_file_size"): "must be a number of GiB, 0 for one file",
        (9, "spec.save[0].type"): "no format is called 'ascend_v2'",
        (7, "spec.linears[1]"): "target must be FLOAT or W8A8_MXFP8, not 'INT4_PACKED'",
        (8, "spec.linears[2]"): "match must be a pattern of names, or a list of such",
        (6, "spec.linears"): "a conversion to FLOAT is one of all linears",
    }
    hints = [one.hint for one in caught.value.diagnostics]
    assert "did you mean 'linears'?" in hints and "did you mean 'ascendv1_saver'?" in hints
