# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of data-free W8A8_DYNAMIC over reading and writing the same bytes with safetensors.

Both run in one process, after all imports, and alternate. Reading means that the bytes arrive in
memory (``load_file`` alone only maps them); writing means ``save_file`` of the result's tensors.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from common import DYNAMIC, demo_model, write_protocol
from memory_layers import random_model
from safetensors.torch import load_file, save_file

from modelslim.run import quantize


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--large", action="store_true", help="a random model of 0.9 GB instead of the demo's 0.27 GB")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours: list[float] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = demo_model(root)
        if options.large:
            model = random_model(root / "large", model, layers=24)
        protocol = write_protocol(root / "dynamic.yaml", DYNAMIC)
        result = root / "result"
        for round_ in range(options.rounds + 1):
            shutil.rmtree(result, ignore_errors=True)
            start = time.process_time()
            quantize(model, result, protocol, device="cpu")
            middle = time.process_time()
            written: dict[str, torch.Tensor] = {}
            for file in result.glob("*.safetensors"):
                written.update({name: tensor.clone() for name, tensor in load_file(file).items()})
            before = time.process_time()
            held = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
            save_file(written, root / "copy.safetensors")
            del held
            if round_:  # the first round pays for imports and the first touch of everything
                ours.append(middle - start)
                plain.append(time.process_time() - before)
    print(f"quantize          {median(ours):.3f} CPU s")
    print(f"read and write    {median(plain):.3f} CPU s")
    print(f"ratio of medians  {median(ours) / median(plain):.2f}  (bound 1.5)")


if __name__ == "__main__":
    main()
