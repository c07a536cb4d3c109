# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the demo's model, a calibration file, and measured child processes."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

_WRAPPER = """
import atexit, re, runpy, sys
peak_file, kind, what, *rest = sys.argv[1:]
def write_peak():
    with open("/proc/self/status") as status, open(peak_file, "w") as file:
        file.write(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])
atexit.register(write_peak)
sys.argv = [what if kind == "-m" else "-c", *rest]
if kind == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
else:
    exec(compile(what, "<benchmark>", "exec"), {"__name__": "__main__"})
"""

PROTOCOL = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {{{act}}}
        weight: {{{weight}}}
  save:
    - type: ascendv1_saver
  dataset: {dataset}
"""
STATIC = "scope: per_tensor, dtype: int8, symmetric: false, method: minmax"
DYNAMIC = "scope: per_token, dtype: int8, symmetric: true, method: minmax"
FLOAT = "dtype: float"
INT8 = "scope: per_channel, dtype: int8, symmetric: true, method: minmax"


@dataclass(frozen=True)
class Cost:
    """What a child process took."""

    cpu: float
    wall: float
    peak_mb: float


def demo_model(root: Path) -> Path:
    """SmolLM2-135M-Instruct as a bf16 checkpoint."""
    from modelslim.demo_model import write_demo_model

    write_demo_model(root / "float")
    return root / "float"


def write_protocol(file: Path, act: str, weight: str = INT8, dataset: str = "mix_calib.jsonl") -> Path:
    """A protocol with one linear_quant over everything."""
    file.write_text(PROTOCOL.format(act=act, weight=weight, dataset=dataset))
    return file


def write_calibration(file: Path, model: Path, samples: int, tokens: int, text: str | None = None) -> Path:
    """Samples of so many tokens, from places spread evenly over a text.

    Each is cut where its tokens are those that the tokenizer finds in the sample alone, so whoever reads the file
    calibrates on the same tokens.

    Args:
        file: where to write, a record a line.
        model: whose tokenizer counts.
        samples: how many.
        tokens: in each.
        text: None for technical English that every CPython carries.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text or "\n".join(pydoc_data.topics.topics.values())[: samples * tokens * 6])["input_ids"]
    if len(ids) < samples * (tokens + tokens // 8):  # some room for finding the cuts
        raise SystemExit(f"the text has {len(ids)} tokens, too few for {samples} samples of {tokens}")
    texts = []
    for start in range(0, len(ids) // samples * samples, len(ids) // samples):
        cuts = (ids[place : place + tokens] for place in range(start, len(ids) - tokens))
        part = next(cut for cut in cuts if tokenizer(tokenizer.decode(cut))["input_ids"] == cut)
        texts.append(tokenizer.decode(part))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def shipped_text() -> str:
    """The calibration set that ships, as one text."""
    import modelslim.calibration
    from modelslim.dataset import read_samples

    file = Path(modelslim.calibration.__file__).parent / "mix_calib.jsonl"
    return "\n\n".join(sample for sample in read_samples(file) if isinstance(sample, str))


def run(*command: str) -> Cost:
    """Run Python with these arguments (``-c CODE ...`` or ``-m MODULE ...``) to its end and measure it.

    The peak is read inside the child: what wait4 tells begins with the memory of the parent.
    """
    with tempfile.NamedTemporaryFile() as peak:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", _WRAPPER, peak.name, *command], env=ENVIRONMENT, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
        kilobytes = int(Path(peak.name).read_text())
        return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - start, kilobytes / 1024)


def show(name: str, costs: list[Cost]) -> Cost:
    """Print the medians of a series and return them."""
    middle = Cost(
        median(cost.cpu for cost in costs), median(cost.wall for cost in costs), median(cost.peak_mb for cost in costs)
    )
    print(f"{name:44s} {middle.cpu:8.2f} CPU s {middle.wall:8.2f} s {middle.peak_mb:8.0f} MB peak", flush=True)
    return middle
