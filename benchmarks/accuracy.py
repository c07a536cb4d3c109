# SPDX-License-Identifier: Apache-2.0
"""Mean KL to the float model, and CPU seconds, of our recipes on the demo's model, and of other tools beside them.

All are calibrated on the same data, the set that ships unless --samples says otherwise, and measured on the same text
in the same windows, all floating arithmetic in float32, from the saved tensors. Static scales are only as good as the
calibration data are varied: on 16 samples of one kind of text (--topics) the result is four times as far away.

Another tool is measured where --peer gives its interpreter, since each wants an environment of its own; then all
read the same samples of 512 tokens, cut from the set that ships. CPU seconds are those of ``quantize()`` as a whole,
with reading and writing, and of the other tool's call alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ENVIRONMENT, demo_model, shipped_text, write_calibration
from recipes import PEERS, RECIPES, Recipe

from modelslim.types import TensorSpec

TOKENS = 512  # of a calibration sample, and of a window of the text


@dataclass(frozen=True)
class Row:
    """A measured row."""

    tool: str
    scheme: str
    kl: float
    cpu: float


@dataclass
class Bench:
    """What all rows share.

    Attributes:
        root: directory for everything written.
        model: the float model.
        data: the calibration set, as protocols name it.
        text: what KL is measured on.
        tokens: how many of it.
        peers: interpreters by name of the tool.
        failures: bounds that were missed.
    """

    root: Path
    model: Path
    data: str
    text: Path
    tokens: int
    peers: dict[str, str]
    failures: list[str]

    def ours(self, recipe: Recipe, *, bound: bool) -> Row:
        """Measure a recipe and, where another tool should find the same integers, compare them."""
        from modelslim.evaluation import evaluate
        from modelslim.run import quantize

        path = Path(tempfile.mkdtemp(dir=self.root)) / "quantized"
        protocol = path.with_name("protocol.yaml")
        entries = "".join(f"    - {entry}\n" for entry in recipe.process)
        protocol.write_text(
            f"apiversion: modelslim_v1\nspec:\n  process:\n{entries}  save:\n    - type: ascendv1_saver\n"
            f"  dataset: {self.data}\n"
        )
        start = time.process_time()
        report = quantize(self.model, path, protocol, device="cpu")
        seconds = time.process_time() - start
        result = evaluate(path, self.model, self.text.read_text(), window=TOKENS, max_tokens=self.tokens)
        fallen = sum(len(unit.get("fell_back", {})) for unit in report["units"])
        verdict = ""
        if bound and recipe.below is not None:
            good = result.kl < recipe.below and (recipe.fallen is None or fallen <= recipe.fallen)
            verdict = f"  {'ok' if good else 'FAIL'}: below {recipe.below}"
            if recipe.fallen is not None:
                verdict += f", at most {recipe.fallen} fall back"
            if not good:
                self.failures.append(recipe.name)
        fell = f"  {fallen} fell back" if fallen else ""
        print(f"ModelSlim      {recipe.name:43s} KL {result.kl:8.5f} {seconds:7.1f} CPU s  perplexity "
              f"{result.float_perplexity:.2f} -> {result.quantized_perplexity:.2f}  "
              f"{report['bytes_after'] / 1e6:.0f} MB{fell}{verdict}", flush=True)  # fmt: skip
        if recipe.integers is not None and "llmcompressor" in self.peers:
            self._compare_codes(recipe, recipe.integers)
        return Row("ModelSlim", recipe.scheme, result.kl, seconds)

    def theirs(self, tool: str, scheme: str, method: str) -> Row | None:
        """Measure what another tool offers."""
        found = self._script(
            tool, f"{scheme} {method}", "--text", str(self.text), "--tokens", str(self.tokens),
            "--window", str(TOKENS), "--data", self.data,
        )  # fmt: skip
        if found is None:
            return None
        print(f"{tool:14s} {f'{scheme}, {method}':43s} KL {found['kl']:8.5f} {found['cpu']:7.1f} CPU s  "
              f"version {found['version']}", flush=True)  # fmt: skip
        return Row(tool, scheme, found["kl"], found["cpu"])

    def _compare_codes(self, recipe: Recipe, spec: TensorSpec) -> None:
        """Our integers beside those of LLM Compressor's own functions, in float32 and for ranges that mean the same."""
        from safetensors.torch import load_file, save_file

        from modelslim_linear_quant.minmax import WeightRounder

        rounder, tensors = WeightRounder(), {}
        for name, weight in load_file(self.model / "model.safetensors").items():
            if ".layers." in name and weight.dim() == 2:
                ours = rounder.quantize(weight, spec)
                parts = {"codes": ours.codes, "scale": ours.scale, "offset": ours.offset}
                tensors |= {f"{name}.{key}": part for key, part in parts.items() if part is not None}
        save_file(tensors, self.root / "codes.safetensors")
        found = self._script("llmcompressor", f"{recipe.scheme} rtn", "--codes", str(self.root / "codes.safetensors"))
        if found is not None:
            shares = [f"{key} {found['alike'][key]} of {found['values'][key]}" for key in found["values"]]
            print(f"{'':14s} the same as LLM Compressor's: {', '.join(shares)}", flush=True)
            if found["alike"] != found["values"]:
                self.failures.append(f"{recipe.name}: integers differ")

    def _script(self, tool: str, method: str, *arguments: str) -> dict[str, Any] | None:
        """Run a tool's script and read what it printed; a failure is shown and counted."""
        file = Path(__file__).parent / "peers" / f"by_{tool.replace('-', '_')}.py"
        env = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}  # it may lead to our libraries
        done = subprocess.run(
            [self.peers[tool], str(file), method, str(self.model), *arguments],
            env=env, capture_output=True, text=True, cwd=self.root,
        )  # fmt: skip
        line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith('{"method"')), None)
        if done.returncode or line is None:
            print(f"{tool}, {method}, failed:\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}", flush=True)
            self.failures.append(f"{tool}, {method}")
            return None
        found: dict[str, Any] = json.loads(line)
        return found


def compare(rows: list[Row]) -> list[str]:
    """Print each scheme's best of ours beside the best of the others; returns where ours is not the best."""
    worse = []
    for scheme in dict.fromkeys(row.scheme for row in rows):
        here = [row for row in rows if row.scheme == scheme]
        ours, theirs = ([row for row in here if (row.tool == "ModelSlim") == mine] for mine in (True, False))
        if not ours or not theirs:
            continue
        mine, best = (min(part, key=lambda row: row.kl) for part in (ours, theirs))
        good = mine.kl <= 1.02 * best.kl
        # A recipe that is at least as good and costs less need not be the most accurate one.
        cheap = any(row.kl <= 1.02 * best.kl and row.cpu < best.cpu for row in ours)
        print(f"{scheme:24s} best KL {mine.kl:.5f}, others {best.kl:.5f} ({best.tool}): {'ok' if good else 'FAIL'}; "
              f"{'one as good costs less' if cheap else 'none as good costs less'}")  # fmt: skip
        if not good:
            worse.append(f"{scheme}: {best.tool} has {best.kl:.5f}")
    return worse


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="measure the recipes whose names contain this")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON",
        help=f"interpreter that has another tool: {', '.join(PEERS)}; may be repeated",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, help="text to read; default: the one that eval reads")
    parser.add_argument("--tokens", type=int, default=4096, help="so many tokens of it")
    parser.add_argument("--samples", type=int, help=f"calibrate on so many samples of {TOKENS} tokens; 32 with --peer")
    parser.add_argument("--topics", action="store_true", help="cut them from Python's documentation")
    options = parser.parse_args()
    peers = dict(value.split("=", 1) for value in options.peer)
    if unknown := sorted(set(peers) - set(PEERS)):
        parser.error(f"--peer {unknown[0]}: none of {', '.join(PEERS)}")
    samples = options.samples or (32 if peers or options.topics else None)
    os.environ.update(ENVIRONMENT)  # before torch is imported: ours runs in this process
    import modelslim.calibration

    text = options.text or Path(modelslim.calibration.__file__).parent / "eval_english.txt"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = demo_model(root)
        data = "mix_calib.jsonl"
        if samples:
            source = None if options.topics else shipped_text()
            data = str(write_calibration(root / "data.jsonl", model, samples, TOKENS, source))
        bench = Bench(root, model, data, text, options.tokens, peers, [])
        rows = []
        for scheme in dict.fromkeys(recipe.scheme for recipe in RECIPES):
            chosen = [one for one in RECIPES if one.scheme == scheme and options.only in one.name]
            rows += [bench.ours(recipe, bound=not samples) for recipe in chosen]
            for tool in peers:
                offered = [method for where, method in PEERS[tool] if where == scheme]
                measured = [bench.theirs(tool, scheme, one) for one in offered if options.only in f"{scheme}, {one}"]
                rows += [row for row in measured if row]
        bench.failures += compare(rows)
        print(json.dumps({"text": text.name, "tokens": options.tokens, "samples": samples, "topics": options.topics}))
    if bench.failures:
        sys.exit("\n".join(["FAIL", *bench.failures]))


if __name__ == "__main__":
    main()
