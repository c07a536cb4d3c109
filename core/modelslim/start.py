# SPDX-License-Identifier: Apache-2.0
"""The start of a process: imports make hundreds of thousands of objects, and hardly any garbage.

To look for it among them took Python a fifth of the start. Behind the start all is as before: a cycle that holds
activations should not wait long.
"""

from __future__ import annotations

import gc

_SELDOM = (100_000, 50, 50)

_usual: list[tuple[int, int, int]] = []


def starting() -> None:
    """Collect garbage seldom from now on; for processes of our own."""
    if not _usual:
        _usual.append(gc.get_threshold())
        gc.set_threshold(*_SELDOM)


def started() -> None:
    """Collect garbage as before; nothing where the process is not ours."""
    if _usual:
        gc.set_threshold(*_usual.pop())
