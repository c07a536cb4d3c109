# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of encoding and writing quantized linears over copying the files that this gives.

The linears are in memory; both sides end in the file cache, and alternate. Beside it stands by how much memory grows
while a saver's tensors are written, in sizes of the largest tensor.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch

from modelslim.quantized import QuantizedLinear, QuantizedTensor
from modelslim.registry import Registry
from modelslim.saver import Saver
from modelslim.types import FLOAT, QuantSpec, TensorSpec
from modelslim.writer import ShardWriter

SIZE = 4096
SCHEMES: Mapping[str, tuple[str, QuantSpec]] = {
    "ascendv1 W8A8_DYNAMIC": (
        "ascendv1_saver",
        QuantSpec(TensorSpec("int8", "per_channel", scale_dtype="bfloat16"), TensorSpec("int8", "per_token")),
    ),
    "ascendv1 W4A8_DYNAMIC": (
        "ascendv1_saver",
        QuantSpec(TensorSpec("int4", "per_channel"), TensorSpec("int8", "per_token")),
    ),
    "compressed-tensors W8A8_DYNAMIC": (
        "compressed_tensors_saver",
        QuantSpec(TensorSpec("int8", "per_channel", scale_dtype="bfloat16"), TensorSpec("int8", "per_token")),
    ),
    "compressed-tensors W4A16 g128": (
        "compressed_tensors_saver",
        QuantSpec(TensorSpec("int4", "per_group", True, 128, "bfloat16"), FLOAT),
    ),
}


def random_linear(spec: QuantSpec) -> QuantizedLinear:
    """Random codes, and scales that bfloat16 holds."""
    codes = torch.randint(spec.weight.qmin, spec.weight.qmax + 1, (SIZE, SIZE), dtype=torch.int8)
    groups = SIZE // spec.weight.group_size if spec.weight.group_size else 1
    scale = (torch.rand(SIZE, groups) * 0.01 + 0.001).to(torch.bfloat16).float()
    return QuantizedLinear(QuantizedTensor(codes, scale, None, spec.weight), spec)


def write(saver: Saver, linear: QuantizedLinear, count: int, folder: Path) -> int:
    """Write the linear under so many names; returns the bytes of the largest tensor."""
    largest = 0
    writer = ShardWriter(folder, "weights", 0, 1 << 20, lambda _name, _size: None)
    for number in range(count):
        for name, tensor in saver.encode(f"model.layers.{number}.mlp.up_proj", linear, "bfloat16"):
            largest = max(largest, writer.add_tensor(name, tensor).record.nbytes)
    writer.finish()
    return largest


def peak() -> int:
    """Largest resident size since the last ``forget_peak``, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> int:
    """Begin anew, and return the size that is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--linears", type=int, default=48, help="of 4096 x 4096")
    options = parser.parse_args()
    registry = Registry.scan()
    torch.set_num_threads(1)  # as in the thread that writes during a run
    for title, (name, spec) in SCHEMES.items():
        saver, linear = registry.load("savers", name).from_config({}), random_linear(spec)
        ours: list[float] = []
        plain: list[float] = []
        growth = 0.0
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for round_ in range(options.rounds + 1):
                resident = forget_peak()
                start = time.process_time()
                largest = write(saver, linear, options.linears, folder)
                middle = time.process_time()
                growth = max(growth, (peak() - resident) / largest)
                (file,) = folder.glob("weights*.safetensors")
                before = time.process_time()
                with file.open("rb") as source, (folder / "copy").open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)  # as files are copied across devices
                after = time.process_time()
                if round_:
                    ours.append(middle - start)
                    plain.append(after - before)
                file.unlink()
        ratio = median(ours) / median(plain)
        print(f"{title:32s} write {median(ours):.2f} s, copy {median(plain):.2f} s, ratio {ratio:.2f}  (bound 1.2)  "
              f"memory grows by {growth:.1f} tensors", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
