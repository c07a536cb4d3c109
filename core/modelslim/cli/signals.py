# SPDX-License-Identifier: Apache-2.0
"""What ends the program from outside: an orderly end at first, an immediate one when it is asked again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from modelslim.cli.errors import INTERRUPTED

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, a job scheduler, a closed terminal


@contextmanager
def orderly_end() -> Iterator[None]:
    """Raise KeyboardInterrupt for whatever asks the process to end, while this is open.

    A second request ends it where it is: what is finished of a run lies on the disk anyway. A signal that
    the process was started to ignore, as by nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted again: ending at once\n")
            os._exit(INTERRUPTED)
        asked = True
        raise KeyboardInterrupt(signal.Signals(number).name)

    numbers = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
