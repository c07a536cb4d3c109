# SPDX-License-Identifier: Apache-2.0
"""What an unquoted scalar means: the YAML 1.2 core schema.

PyYAML's own rules are YAML 1.1, where ``on`` is true, ``12:30:00`` a number and ``1e-5`` a string.
"""

from __future__ import annotations

import math
import re

_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = frozenset((".nan", ".NaN", ".NAN"))

MAX_NUMBER_LENGTH = 64
"""Characters of a number; Python refuses to convert integers of a few thousand digits anyway."""


def resolve(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar.

    Raises:
        ValueError: it is a number longer than ``MAX_NUMBER_LENGTH`` characters.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for pattern, base in ((_INT, 10), (_OCTAL, 8), (_HEX, 16)):
        if pattern.fullmatch(text):
            return int(_short(text), base) if base == 10 else int(_short(text)[2:], base)
    if _FLOAT.fullmatch(text):
        return float(_short(text))
    if match := _INF.fullmatch(text):
        return -math.inf if match[1] == "-" else math.inf
    return math.nan if text in _NAN else text


def _short(number: str) -> str:
    if len(number) > MAX_NUMBER_LENGTH:
        raise ValueError(f"the number has {len(number)} characters, at most {MAX_NUMBER_LENGTH} are read")
    return number
