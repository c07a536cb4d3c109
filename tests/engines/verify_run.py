# SPDX-License-Identifier: Apache-2.0
"""``modelslim verify --engine vllm-ascend`` in the Python that holds the engine.

Run by the tests in a process of its own: ``python verify_run.py JOB``, where JOB is a JSON file: ``bare``, True to
leave the modules of an NPU absent; ``models``, directory by name; ``result``, a file for what was found, by name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_PLUGINS"] = ""


def main(file: Path) -> None:
    """Do what the file says."""
    job = json.loads(file.read_text(encoding="utf-8"))
    if not job["bare"]:
        import standins

        standins.replace_modules()
    from modelslim.verify import verify

    found = {name: verify(Path(path), engine="vllm-ascend").as_data() for name, path in job["models"].items()}
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
