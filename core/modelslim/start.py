# SPDX-License-Identifier: Apache-2.0
"""The start and the end of a process: imports make hundreds of thousands of objects, and hardly any garbage.

To look for it among them took Python a fifth of the start, and most of a second at the end. In between all is as
always: a cycle that holds activations should not wait long.
"""

from __future__ import annotations

import atexit
import gc

_SELDOM = (100_000, 50, 50)

_usual: list[tuple[int, int, int]] = []


def starting() -> None:
    """Collect garbage seldom from now on, and not at the end; for processes of our own."""
    if not _usual:
        _usual.append(gc.get_threshold())
        gc.set_threshold(*_SELDOM)
        atexit.unregister(gc.freeze)
        atexit.register(gc.freeze)


def started() -> None:
    """Collect garbage as always; nothing where the process is not ours."""
    if _usual:
        gc.set_threshold(*_usual.pop())
