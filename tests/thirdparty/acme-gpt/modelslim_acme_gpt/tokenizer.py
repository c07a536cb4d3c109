# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of Acme's GPT: one token that begins a text, then the bytes of UTF-8."""

from __future__ import annotations

BEGIN = 0
VOCABULARY = 257


def encode(text: str) -> list[int]:
    """Token ids of a text, the beginning included."""
    return [BEGIN, *(byte + 1 for byte in text.encode("utf-8"))]
