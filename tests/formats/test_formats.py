# SPDX-License-Identifier: Apache-2.0
"""docs/formats.md says of every scheme which formats hold it, which engines take it, and what was run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "formats.md"

HEAD = """\
# Formats and engines

What becomes of each scheme in each format, and in each engine that reads the format. A test writes this page
(`pytest tests/formats --write-formats`) from the savers' checks, the engines' [contracts](verify.md#engines) and the
list of tests that run an engine, and fails when the page is no longer true.

| word | meaning |
|---|---|
| agrees | a test loads it in the engine, and the engine computes what our forward computes |
| loads | a test lets the engine make its parameters, and they hold our tensors; its kernels do not run here |
| contract | the engine's contract has it, and nothing here runs it |
| refused | the engine's contract does not have it: refused with `--engine`, naming the rule; else the plan warns |
| - | the format has no such scheme; the plan refuses it in words |

Tests with transformers belong to every run of the checks. Those with vLLM, vLLM-Ascend and GPTQModel (which is how
transformers reads gptq and awq) are run on demand, `tox -e engines` and `tox -e gptqmodel`; vLLM-Ascend with stand-ins
for the operators of an NPU. Groups have 32 inputs. What one model may mix, shapes and tensor parallelism have rules of
their own in the contracts.
"""


def render() -> str:
    from format_cells import PLACES, SPECS, cell, readers

    from modelslim.registry import Registry

    registry = Registry.scan()
    columns = list(readers(registry))
    savers = {name: registry.load("savers", name).from_config({}) for name, _ in columns}
    parts = [HEAD]
    for place in PLACES:
        title = {"dense": "Dense linears", "experts": "Routed experts"}[place]
        heads = [f"{saver.removesuffix('_saver')}: {contract.name}" for saver, contract in columns]
        parts += [f"## {title}", "", f"| scheme | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
        for scheme in SPECS:
            found = [cell(saver, savers[saver], contract, scheme, place) for saver, contract in columns]
            parts.append(f"| {scheme} | {' | '.join(found)} |")
        parts.append("")
    return "\n".join(parts)


def test_page_says_what_formats_and_engines_take(request: pytest.FixtureRequest) -> None:
    page = render()
    if request.config.getoption("--write-formats", default=False):
        PAGE.write_text(page, encoding="utf-8")
    written = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    different = [line for line in page.splitlines() if line not in written]
    assert different[:1] == [], "rewrite it with: pytest tests/formats --write-formats"
    assert written == page.splitlines()


def test_what_a_test_runs_is_held_by_the_format_and_taken_by_the_contract() -> None:
    from format_cells import SPECS, cell
    from format_evidence import EVIDENCE

    from modelslim.engines import find_contract
    from modelslim.registry import Registry

    registry = Registry.scan()
    for (engine, name, place), proofs in EVIDENCE.items():
        saver, contract = registry.load("savers", name).from_config({}), find_contract(engine, registry)
        for proof in proofs:
            for scheme in proof.schemes:
                assert scheme in SPECS
                assert cell(name, saver, contract, scheme, place) == proof.shows, (engine, name, place, scheme)


def test_the_tests_that_the_page_leans_on_exist() -> None:
    from format_evidence import EVIDENCE

    for proofs in EVIDENCE.values():
        for proof in proofs:
            file, _, function = proof.test.partition("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, proof.test
