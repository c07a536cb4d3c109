# SPDX-License-Identifier: Apache-2.0
"""``python -m modelslim.worker``: a rank that another process has started.

Its first line on stdin is its task. It ends when stdin does, so that it never outlives that process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from modelslim.start import starting


def main() -> int:
    """Do the task.

    Returns:
        The exit code; what went wrong is the last line of stdout, as JSON.
    """
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    starting()
    from modelslim.devices import prepare_threads

    prepare_threads()
    from modelslim.cli.errors import describe, exit_code
    from modelslim.launch import Crew
    from modelslim.run import quantize_as

    try:
        quantize_as(Crew(task["rank"], task["devices"], Path(task["meeting"])), task["job"])
    except BaseException as error:
        said = describe(error)
        print(json.dumps({"message": said.message, "hint": said.hint}), flush=True)
        return exit_code(error)
    return 0


def _end_with_stdin() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    code = main()
    # Threads of a broken connection must not keep it alive.
    sys.stdout.flush()
    os._exit(code)
