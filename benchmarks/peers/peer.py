# SPDX-License-Identifier: Apache-2.0
"""What the scripts of the other tools share: the same inputs, the same measure, one line of JSON.

They run in the other tool's interpreter, so nothing of ModelSlim is imported here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Job:
    """What a script is asked to do.

    Attributes:
        methods: what the script offers; the first argument chooses one.
        options: the parsed command line.
    """

    methods: Sequence[str]
    options: argparse.Namespace = field(init=False)

    def __post_init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("method", choices=self.methods)
        parser.add_argument("model", type=Path)
        parser.add_argument("--text", type=Path, help="what KL is measured on")
        parser.add_argument("--tokens", type=int, default=4096)
        parser.add_argument("--window", type=int, default=512)
        parser.add_argument("--data", type=Path, help="calibration: a record a line, samples of equal length")
        parser.add_argument("--codes", type=Path, help="our integers, to be compared with those of this tool")
        self.options = parser.parse_args()

    @property
    def method(self) -> str:
        """The chosen method."""
        return str(self.options.method)

    def load(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """The float model, whole."""
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=dtype)
        return model.eval()

    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return AutoTokenizer.from_pretrained(self.options.model)

    def samples(self) -> Tensor:
        """The calibration set, int64 [samples, tokens]."""
        tokenizer = self.tokenizer()
        lines = self.options.data.read_text().splitlines()
        return torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"] for line in lines])

    def report(self, version: str, model: nn.Module, cpu: float, reference: nn.Module | None = None) -> None:
        """Print KL of a model, whose quantized linears compute from their integers, to the float one."""
        options = self.options
        ids = self.tokenizer()(options.text.read_text(), return_tensors="pt")["input_ids"][:, : options.tokens]
        kl = mean_kl(reference or self.load(torch.float32), model.float().eval(), ids, options.window)
        print(json.dumps({"method": self.method, "version": version, "kl": kl, "cpu": cpu}))


def mean_kl(reference: nn.Module, model: nn.Module, ids: Tensor, window: int) -> float:
    """Mean over tokens of KL(reference || model) in nats.

    Args:
        reference, model: in float32.
        ids: int64 [1, tokens].
        window: tokens that are read together.
    """
    total = 0.0
    with torch.no_grad():
        for part in ids.split(window, dim=1):
            p, q = (one(part).logits[0].float().log_softmax(-1) for one in (reference, model))
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total / ids.shape[1]


def cpu_seconds(work: Callable[[], object]) -> float:
    """User and system seconds of this process for a call."""
    start = time.process_time()
    work()
    return time.process_time() - start
