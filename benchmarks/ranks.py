# SPDX-License-Identifier: Apache-2.0
"""How much faster two ranks on two cores are than one rank on one core; the results must have the same bytes.

Start and plan, 4 to 5 s that no rank saves, are part of it. Runs alternate. Beside the time on the clock stands the
CPU time of the busiest process, which says the same on a machine that does other things, too.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import ENVIRONMENT, demo_model, write_calibration

STATIC = "{type: linear_quant, qconfig: {act: {scope: per_tensor, symmetric: false}, weight: {dtype: int8}}}"
PROTOCOLS = {
    "W8A8 static": [STATIC],
    "iter_smooth": ["{type: iter_smooth}", STATIC],
    "gptq": [
        "{type: linear_quant, qconfig: {act: {dtype: float}, "
        "weight: {dtype: int4, scope: per_group, method: gptq, ext: {group_size: 64}}}}"
    ],
}
TIMED = """
import json, resource, sys
from modelslim.cli.main import main
code = main(sys.argv[2:])
def cpu(who):
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime
json.dump([cpu(resource.RUSAGE_SELF), cpu(resource.RUSAGE_CHILDREN)], open(sys.argv[1], "w"))
sys.exit(code)
"""


def quantize(model: Path, config: Path, out: Path, ranks: int) -> tuple[float, float]:
    """Run the command on as many cores as ranks.

    Returns:
        Seconds on the clock, and CPU seconds of the busiest process.
    """
    shutil.rmtree(out, ignore_errors=True)
    used = out.with_suffix(".json")
    arguments = ["quant", "--quiet", "--device", "cpu", "--model_path", model, "--save_path", out]
    arguments += ["--config_path", config, "--no-verify", "--workers", ranks]
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", TIMED, str(used), *map(str, arguments)],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=True,
    )
    wall = time.perf_counter() - start
    own, others = json.loads(used.read_text())
    return wall, max(own, others / max(ranks - 1, 1))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=768, help="the text has 113,000 in all")
    parser.add_argument("--only", choices=PROTOCOLS, action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = demo_model(root)
        data = write_calibration(root / "data.jsonl", model, options.samples, options.tokens)
        for name in options.only or PROTOCOLS:
            entries = "".join(f"    - {entry}\n" for entry in PROTOCOLS[name])
            config = root / "protocol.yaml"
            config.write_text(
                f"apiversion: modelslim_v1\nspec:\n  process:\n{entries}"
                f"  save: [{{type: ascendv1_saver}}]\n  dataset: {data}\n"
            )
            times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
            for _ in range(options.rounds):
                for ranks, series in times.items():
                    series.append(quantize(model, config, root / f"ranks{ranks}", ranks))
            names = [
                file.name
                for file in (root / "ranks1").iterdir()
                if file.suffix != ".html" and file.name != "report.json"
            ]
            _, different, missing = filecmp.cmpfiles(root / "ranks1", root / "ranks2", names, shallow=False)
            wall, cpu = ([median(run[index] for run in times[ranks]) for ranks in (1, 2)] for index in (0, 1))
            print(
                f"{name}: {wall[0]:.1f} s and {wall[1]:.1f} s on the clock, {wall[0] / wall[1]:.2f} times faster; "
                f"busiest process {cpu[0]:.1f} and {cpu[1]:.1f} CPU s, {cpu[0] / cpu[1]:.2f} times (bound 1.7); "
                f"{'other bytes in ' + ', '.join(different + missing) if different or missing else 'same bytes'}"
            )


if __name__ == "__main__":
    main()
