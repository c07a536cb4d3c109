# SPDX-License-Identifier: Apache-2.0
"""W8A8 static of a checkpoint of 8 GB within 4 GiB above the imports, over one forward plus reading and writing.

Makes the checkpoint: random bfloat16 weights in the shapes of an 8B Llama, with as many layers as are needed, written
layer by layer. Then, in processes of their own, each with the source out of the page cache:
    read     every tensor into memory, one at a time
    forward  the same samples through as many layers of these shapes, without the vocabulary projection
    write    as many bytes as the result has, and wait for the disk
    quant    the command, with --max_memory; its peak is what the parent sees of it, less what the plan had before
Needs disk for the checkpoint and the result, 14 GB by default.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import ENVIRONMENT, STATIC, demo_model, write_calibration, write_protocol

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip

READ = """
import sys
from glob import glob
from safetensors import safe_open
for file in sorted(glob(sys.argv[1] + "/*.safetensors")):
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            opened.get_tensor(name).clone()
"""
WRITE = """
import os, sys
block = os.urandom(1 << 26)
with open(sys.argv[1], "wb", buffering=0) as file:
    left = int(sys.argv[2])
    while left > 0:
        left -= file.write(block[:left])
    os.fsync(file.fileno())
"""
# One layer stands for all: their weights are as large, and too large for any cache.
FORWARD = """
import json, sys, time, torch
from transformers import AutoConfig, AutoTokenizer, LlamaModel
config = AutoConfig.from_pretrained(sys.argv[1])
layers, config.num_hidden_layers = config.num_hidden_layers, 1
with torch.no_grad():
    model = LlamaModel(config).to(torch.bfloat16).eval()
    for _ in range(layers - 1):
        model.layers.append(model.layers[0])
    model.config.num_hidden_layers = layers
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    inputs = [torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]]) for line in open(sys.argv[2])]
    start = time.monotonic()
    for one in inputs:
        model(one, use_cache=False)
    print(time.monotonic() - start)
"""


def make_checkpoint(target: Path, tokenizer: Path, gigabytes: float) -> int:
    """Write the model, a shard for each layer; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
               "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
               "mlp.down_proj": (hidden, inner)}  # fmt: skip
    table = CONFIG["vocab_size"] * hidden
    layer_bytes = 2 * sum(rows * columns for rows, columns in linears.values())
    layers = -(-int(gigabytes * 1e9 - 4 * table) // layer_bytes)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        weight = torch.empty(shape, dtype=torch.bfloat16)
        for rows in weight.split(max(1, (1 << 24) // shape[-1])):
            rows.copy_(torch.randn(rows.shape, generator=generator).mul_(0.02))
        return weight

    def norm() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    target.mkdir()
    weight_map: dict[str, str] = {}

    def write(shard: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, target / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))

    write("embedding.safetensors", {"model.embed_tokens.weight": random(CONFIG["vocab_size"], hidden)})
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": random(*shape) for name, shape in linears.items()}
        tensors |= {f"{prefix}.{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
        write(f"layer{layer:03d}.safetensors", tensors)
    write("head.safetensors", {"lm_head.weight": random(CONFIG["vocab_size"], hidden), "model.norm.weight": norm()})
    total = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(target)
    return total


def forget(folder: Path) -> None:
    """Have the files on the disk and out of the page cache."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(*command: str) -> tuple[float, str]:
    """Seconds of a child process, and what it printed."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *command], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return time.monotonic() - start, done.stdout


def watched(command: list[str]) -> tuple[float, int, str]:
    """Seconds of a child process, the largest resident set that the parent saw of it, and what it printed."""
    largest = 0
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    done = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.02):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:  # it has ended
                return
            found = re.search(r"VmRSS:\s+(\d+)", status)
            largest = max(largest, int(found[1]) * 1024 if found else 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"quant failed with {process.returncode}")
    return time.monotonic() - start, largest, output


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--budget", default="4GiB")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; 14 GB must be free")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        demo = demo_model(root)
        model, result = root / "model", root / "result"
        size = make_checkpoint(model, demo, options.gigabytes)
        data = write_calibration(root / "data.jsonl", demo, options.samples, options.tokens)
        protocol = write_protocol(root / "static.yaml", STATIC, dataset=str(data))
        print(f"checkpoint of {size / 1e9:.2f} GB, {options.samples} samples of {options.tokens} tokens", flush=True)
        paths = ["--model_path", str(model), "--config_path", str(protocol), "--device", "cpu", "--json"]
        command = ["-m", "modelslim.cli.main"]
        imports, planned_peak, planned = watched([*command, "plan", *paths, "--max_memory", options.budget])
        plan = json.loads(planned)["costs"]
        forget(model)
        seconds, peak, printed = watched(
            [*command, "quant", *paths, "--save_path", str(result), "--max_memory", options.budget]
        )
        report = json.loads(printed)
        written = sum(file.stat().st_size for file in result.glob("*.safetensors"))
        shutil.rmtree(result)
        forget(model)
        read, _ = timed("-c", READ, str(model))
        forward = float(timed("-c", FORWARD, str(model), str(data))[1])
        write, _ = timed("-c", WRITE, str(root / "written"), str(written))
        memory = report["memory"]
        print(
            f"quant          {seconds:8.1f} s, of which plan and imports {imports:.1f} s; estimate {plan['seconds']:.1f} s"
        )
        print(f"read           {read:8.1f} s\nforward        {forward:8.1f} s\nwrite          {write:8.1f} s  "
              f"({written / 1e9:.2f} GB)")  # fmt: skip
        print(f"ratio          {seconds / (read + forward + write):8.2f}  (bound 1.5); without plan and imports "
              f"{(seconds - imports) / (read + forward + write):.2f}")  # fmt: skip
        print(f"peak           {memory['peak_bytes']['host'] / 2**30:8.2f} GiB above the program (bound {options.budget}), "
              f"estimate {memory['estimated_bytes']['host'] / 2**30:.2f} GiB")  # fmt: skip
        print(
            f"seen from outside {peak / 2**30:.2f} GiB with all imports, {planned_peak / 2**30:.2f} GiB for the plan alone"
        )
        print(f"activations in {memory['activations']}, units read ahead: {memory['reads_ahead']}", flush=True)
        phases: dict[str, float] = {}
        for unit in report["units"]:
            for phase, took in unit["seconds"].items():
                phases[phase] = phases.get(phase, 0.0) + took
        print("seconds of the units:", ", ".join(f"{name} {took:.1f}" for name, took in phases.items()))


if __name__ == "__main__":
    main()
