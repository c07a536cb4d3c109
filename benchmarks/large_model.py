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
import time
from dataclasses import dataclass
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
    start, spent = time.monotonic(), time.process_time()
    for one in inputs:
        model(one, use_cache=False)
    print(time.monotonic() - start, time.process_time() - spent)
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


@dataclass(frozen=True)
class Watched:
    """A child process: its seconds, those of the processor, the largest resident set seen of it, what it printed."""

    wall: float
    cpu: float
    peak: int
    output: str


def watch(*command: str) -> Watched:
    """Run Python with these arguments to its end."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, *command], env=ENVIRONMENT, stdout=output, text=True)
        largest, usage = 0, None
        while usage is None:
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            largest = max(largest, int(found[1]) * 1024 if found else 0)
            time.sleep(0.02)
            pid, status, spent = os.wait4(process.pid, os.WNOHANG)
            usage = spent if pid else None
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:3])} failed with {process.returncode}")
        output.seek(0)
        return Watched(time.monotonic() - start, usage.ru_utime + usage.ru_stime, largest, output.read())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
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
        words = ["-m", "modelslim.cli.main"]
        planned = watch(*words, "plan", *paths, "--max_memory", options.budget)
        estimate = json.loads(planned.output)["costs"]
        forget(model)
        quant = watch(*words, "quant", *paths, "--save_path", str(result), "--max_memory", options.budget)
        report = json.loads(quant.output)
        written = sum(file.stat().st_size for file in result.glob("*.safetensors"))
        shutil.rmtree(result)
        imports = watch("-c", "import torch, safetensors")
        forget(model)
        read = watch("-c", READ, str(model))
        forward = watch("-c", FORWARD, str(model), str(data))
        write = watch("-c", WRITE, str(root / "written"), str(written))
        wall, cpu = map(float, forward.output.split())
        memory = report["memory"]
        rows = {
            "quant": (quant.wall, quant.cpu),
            "plan": (planned.wall, planned.cpu),
            "read": (read.wall - imports.wall, read.cpu - imports.cpu),
            "forward": (wall, cpu),
            "write": (write.wall, write.cpu),
        }
        for name, (took, spent) in rows.items():
            print(f"{name:10s} {took:8.1f} s {spent:8.1f} CPU s")
        for column, unit in enumerate(("seconds", "CPU seconds")):
            took = {name: row[column] for name, row in rows.items()}
            apart = took["read"] + took["forward"] + took["write"]
            print(f"quant / (read + forward + write) in {unit}: {took['quant'] / apart:.2f} (bound 1.5), "
                  f"without what plan takes {(took['quant'] - took['plan']) / apart:.2f}")  # fmt: skip
        print(f"result {written / 1e9:.2f} GB; estimated {estimate['seconds']:.1f} s")
        print(f"peak {memory['peak_bytes']['host'] / 2**30:.2f} GiB above the program (bound {options.budget}), "
              f"estimated {memory['estimated_bytes']['host'] / 2**30:.2f} GiB")  # fmt: skip
        print(f"resident {quant.peak / 2**30:.2f} GiB with all imports, plan alone {planned.peak / 2**30:.2f} GiB")
        print(f"activations: {memory['activations']}, units read ahead: {memory['reads_ahead']}")
        phases: dict[str, float] = {}
        for unit in report["units"]:
            for phase, seconds in unit["seconds"].items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        print("seconds of the units:", ", ".join(f"{name} {took:.1f}" for name, took in phases.items()))


if __name__ == "__main__":
    main()
