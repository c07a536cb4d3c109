# SPDX-License-Identifier: Apache-2.0
"""``python -m modelslim``: the program, for launchers that start modules, such as torchrun."""

from __future__ import annotations

import sys

from modelslim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
