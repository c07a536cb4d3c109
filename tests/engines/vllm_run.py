# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints with vLLM as a user would, reads prompts, and writes what the engine computed.

Run by the tests in a process of its own: ``python vllm_run.py JOBS``, where JOBS is a JSON file, a list of ``Job``.
Imports nothing of the project. A job that fails does not keep the next from running; its error is the result.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypedDict
from unittest.mock import patch

# One process: the tests look into the model while it runs.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_PLUGINS"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # 4-bit weights with 16-bit activations, as the checkpoint says


class Job(TypedDict):
    """What to do with a checkpoint.

    Attributes:
        model: its directory.
        dtype: of all floating computation.
        prompts: each a list of token numbers; none to load only.
        new_tokens: how many tokens to generate behind each, greedily.
        stored: True to leave parameters as the loader filled them; such a model cannot compute.
        ascend: True to quantize with vllm-ascend's classes, its operators replaced by those of ``standins``.
        portable: True to multiply with the kernels for processors without matrix tiles, which know float32 and static
            scales.
        tracked: True to have the loader refuse a checkpoint that leaves a parameter unset.
        watched: linears whose inputs and outputs are recorded while a prompt is read.
        kept: modules whose parameters are written, as the engine holds them after loading.
        result: where to write JSON: ``tokens`` of every prompt, ``kernels`` (class by linear), ``parameters``
            (dtype and shape by name); or ``error``.
        tensors: where to write, as safetensors, the logits float32 [tokens, vocabulary] of every prompt as
            ``0.logits``, ..., what was watched as ``0.<linear>.in`` and ``0.<linear>.out``, and what was kept.
    """

    model: str
    dtype: str
    prompts: list[list[int]]
    new_tokens: int
    stored: bool
    ascend: bool
    portable: bool
    tracked: bool
    watched: list[str]
    kept: list[str]
    result: str
    tensors: str


def run(job: Job) -> dict[str, Any]:
    """Load, read and generate."""
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.model_loader import base_loader

    tiles = patch.object(cpu, "check_cpu_sgl_kernel", return_value=False) if job["portable"] else nullcontext()
    untouched = patch.object(base_loader, "process_weights_after_loading") if job["stored"] else nullcontext()
    with tiles, untouched:
        engine = LLM(
            model=job["model"],
            dtype=job["dtype"],
            quantization="ascend" if job["ascend"] else None,
            max_model_len=max(map(len, job["prompts"]), default=0) + job["new_tokens"] + 1,
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=64 * 2**20,
            model_loader_extra_config={"enable_weights_track": True} if job["tracked"] else {},
            disable_log_stats=True,
        )
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    result = {"tokens": [], "kernels": kernels(model), "parameters": parameters(model)}
    sampling = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True)
    tensors: dict[str, Any] = {}
    for module in job["kept"]:
        held = model.get_submodule(module).named_parameters()
        tensors.update({f"{module}.{name}": one.data for name, one in held})
    for index, prompt in enumerate(job["prompts"]):
        with first_pass(model, job["watched"]) as seen:
            outputs = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        result["tokens"].append(list(outputs[0].outputs[0].token_ids))
        seen["logits"] = model.compute_logits(seen.pop("model")).float()
        tensors.update({f"{index}.{name}": one[: len(prompt)] for name, one in seen.items()})
    save_file({name: one.contiguous() for name, one in tensors.items()}, job["tensors"])
    return result


@contextmanager
def first_pass(model: Any, watched: list[str]) -> Iterator[dict[str, Any]]:
    """Records the output of the first forward as ``model``, and inputs and outputs of linears in it."""
    seen: dict[str, Any] = {}
    forward = model.forward

    def recorded(*arguments: Any, **options: Any) -> Any:
        hidden = forward(*arguments, **options)
        seen.setdefault("model", hidden)
        return hidden

    def watch(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        seen.setdefault(f"{name}.in", inputs[0].clone())
        seen.setdefault(f"{name}.out", (output[0] if isinstance(output, tuple) else output).clone())

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, i, o, name=name: watch(name, i, o))
        for name in watched
    ]
    model.forward = recorded
    yield seen
    del model.forward
    for hook in hooks:
        hook.remove()


def kernels(model: Any) -> Mapping[str, str]:
    """The class that computes each linear."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            scheme = getattr(module, "scheme", None) or getattr(method, "quant_method", None) or method
            kernel = getattr(scheme, "kernel", None)
            found[name] = type(scheme).__name__ + (f", {type(kernel).__name__}" if kernel else "")
    return found


def parameters(model: Any) -> Mapping[str, tuple[str, list[int]]]:
    """Dtype and shape of every parameter, as the engine holds it after loading."""
    return {
        name: (str(one.dtype).removeprefix("torch."), list(one.shape))
        for name, one in model.named_parameters(remove_duplicate=False)
    }


def main(jobs: list[Job]) -> None:
    """Do the jobs one after the other."""
    if any(job["ascend"] for job in jobs):
        import standins

        standins.install()
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in jobs:
        try:
            result = run(job)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
