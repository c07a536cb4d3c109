# SPDX-License-Identifier: Apache-2.0
"""Quantization types as people write them: ``w8a8``, ``w4a8c8``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modelslim.errors import UsageError, nearest

KNOWN = (
    *("w4a4", "w4a4c8", "w4a4f4", "w4a4f8", "w4a8", "w4a8c8", "w4a16"),
    *("w8a8", "w8a8c8", "w8a8f8", "w8a8s", "w8a16", "w16a16s"),
)
"""The usual ones; others of the same form are read too."""

_FORM = re.compile(r"w(\d+)a(\d+)(c8)?(?:f([48])?)?(s)?")
_FORM_F = re.compile(r"w\d+a\d+(?:c8)?f")
_BITS = (1, 2, 3, 4, 5, 6, 8, 16)


@dataclass(frozen=True)
class QuantType:
    """What becomes of a model, in bits.

    Attributes:
        w_bit: bits of a weight.
        a_bit: bits of an activation; 16 for float ones.
        kv_cache: True when keys and values are int8 in their cache.
        fa_bit: bits of quantized attention; 0 for float attention.
        is_sparse: True when weights are sparse.
    """

    w_bit: int
    a_bit: int
    kv_cache: bool = False
    fa_bit: int = 0
    is_sparse: bool = False

    def __str__(self) -> str:
        cache = "c8" if self.kv_cache else ""
        attention = f"f{self.fa_bit}" if self.fa_bit else ""
        return f"w{self.w_bit}a{self.a_bit}{cache}{attention}{'s' if self.is_sparse else ''}"

    @property
    def lacking(self) -> str:
        """What no algorithm here does and this type needs; empty when there is nothing."""
        return "no algorithm here quantizes attention itself" if self.fa_bit else ""


RECOMMENDED = QuantType(8, 8)
"""What is offered where nothing of the wanted type is there."""


def _meant(word: str) -> str:
    """A hint on a word that is no type; some name the bits of the weights alone, as in ``int4`` or ``8bit``."""
    bits = re.fullmatch(r"(?:u?int|fp|w)-?([48])|([48])-?bits?", word)
    if bits is None:
        return nearest(word, KNOWN)
    weights = bits[1] or bits[2]
    return f"w{weights}a8 also quantizes what enters the linears, w{weights}a16 the weights alone"


def parse_quant_type(text: str) -> QuantType:
    """Read a type in any case.

    Args:
        text: ``w``, bits of weights, ``a``, bits of activations; then ``c8`` for an int8 key/value cache, ``f8`` or
            ``f4`` for quantized attention (``f`` means ``f8``), ``s`` for sparse weights.

    Raises:
        UsageError: it is none; offers the nearest.
    """
    word = text.strip().casefold()
    match = _FORM.fullmatch(word)
    if match is None or int(match[1]) not in _BITS or int(match[2]) not in _BITS:
        hint = _meant(word)
        raise UsageError(f"--quant_type {text!r} is no quantization type", hint=hint)
    attention = int(match[4] or 8) if _FORM_F.match(word) else 0
    return QuantType(int(match[1]), int(match[2]), bool(match[3]), attention, bool(match[5]))
