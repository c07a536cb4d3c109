# SPDX-License-Identifier: Apache-2.0
"""What a budget is worth: KL of the tuned recipe beside the same bytes spent at random and on the last layers.

All three are 4-bit weights in groups of 64 with some groups of linears in 8 bit, of at most the same number of bytes.

Run: ``python benchmarks/tune_budget.py [--model FOLDER] [--bits 4.5] [--samples 4] [--tokens 64] [--eval_tokens 2048]``
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import demo_model, write_calibration

OPTIONS = [
    {"type": "linear_quant", "qconfig": {"weight": {"dtype": "int4", "scope": "per_group", "group_size": 64}}},
    {"type": "linear_quant", "qconfig": {"weight": {"dtype": "int8", "scope": "per_group", "group_size": 64}}},
    "float",
]


def plan_of(arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    return {
        "strategy": {
            "type": "budget",
            "bits_per_weight": arguments.bits,
            "sensitivity": arguments.sensitivity,
            "samples": arguments.samples,
            "options": OPTIONS,
            "template": {
                "apiversion": "modelslim_v1",
                "spec": {"save": [{"type": "compressed_tensors_saver"}], "dataset": str(data)},
            },
        },
        "evaluation": {"type": "in_process", "max_tokens": arguments.eval_tokens},
    }


def measured(root: Path, name: str, model: Path, protocol: dict[str, Any], tokens: int) -> tuple[float, int]:
    """KL of a recipe, and the bytes of its checkpoint."""
    from importlib.resources import files

    from modelslim.evaluation import evaluate
    from modelslim.run import quantize

    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(protocol, sort_keys=False))
    report = quantize(model, root / name, file, device="cpu", check=False)
    text = files("modelslim.calibration").joinpath("eval_english.txt").read_text(encoding="utf-8")
    return evaluate(root / name, model, text, max_tokens=tokens, device="cpu").kl, report["bytes_after"]


def main() -> None:
    from modelslim.registry import Registry
    from modelslim.tune.budget import Budget
    from modelslim.tune.knapsack import Choice
    from modelslim.tune.plan import read_tune_plan
    from modelslim.tune.run import tune
    from modelslim.tune.strategy import Context

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eval_tokens", type=int, default=2048)
    parser.add_argument("--sensitivity", default="kl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelslim-tune-") as folder:
        root = Path(folder)
        model = arguments.model or demo_model(root)
        data = write_calibration(root / "calibration.jsonl", model, arguments.samples, arguments.tokens)
        (root / "plan.yaml").write_text(yaml.safe_dump(plan_of(arguments, data), sort_keys=False))
        start = time.monotonic()
        result = tune(model, root / "tuned", root / "plan.yaml", device="cpu", say=lambda text: print(text, flush=True))
        print(f"tuned in {time.monotonic() - start:.0f} s", flush=True)
        plan = read_tune_plan(root / "plan.yaml", Registry.scan())
        options = {"device": "cpu"}
        strategy = Budget(Context(plan, model, Registry.scan(), root / "tuned.tune", options, print))
        with strategy.context.open() as opened:
            groups, costs = strategy.groups_and_costs(opened)
            everything = list(opened.info.linears)
        budget = int(arguments.bits * sum(group.weights for group in groups) / 8)

        def spent(order: list[int]) -> Choice:
            """4 bit, and 8 bit for the groups in this order, as far as the bytes go."""
            chosen, cost = [0] * len(groups), sum(one[0] for one in costs)
            for index in order:
                if cost + costs[index][1] - costs[index][0] <= budget:
                    chosen[index], cost = 1, cost + costs[index][1] - costs[index][0]
            return Choice(chosen, cost, 0.0, 0.0, False)

        orders = {"last layers": list(range(len(groups)))[::-1]}
        for seed in range(2):
            order = list(range(len(groups)))
            random.Random(seed).shuffle(order)
            orders[f"at random, seed {seed}"] = order
        rows = [("mixed by tune", result["score"], result["bytes_after"])]
        plain = strategy.protocol(groups, Choice([0] * len(groups), 0, 0.0, 0.0, False), everything)
        rows.append(("4 bit alone", *measured(root, "plain", model, plain, arguments.eval_tokens)))
        for name, order in orders.items():
            protocol = strategy.protocol(groups, spent(order), everything)
            rows.append((name, *measured(root, name.replace(" ", "_"), model, protocol, arguments.eval_tokens)))
        for name, kl, size in rows:
            print(f"{name:24s} KL {kl:.5f}  {size / 1e6:.2f} MB", flush=True)
        best = min(kl for name, kl, _ in rows if name not in ("mixed by tune", "4 bit alone"))
        print(f"mixed over the best of the others: {result['score'] / best:.3f} (bound 1)")
        if result["score"] >= best:
            sys.exit(1)


if __name__ == "__main__":
    main()
