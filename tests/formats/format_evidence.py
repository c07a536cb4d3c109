# SPDX-License-Identifier: Apache-2.0
"""Which tests run which scheme in which engine; of others the contract of the engine alone tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

AGREES, LOADS = "agrees", "loads"


class Evidence(NamedTuple):
    """What a test shows.

    Attributes:
        shows: ``agrees``: the engine loads it and computes what our forward computes; ``loads``: its parameters hold
            our tensors.
        test: file and function.
        schemes: names of ``SPECS``.
    """

    shows: str
    test: str
    schemes: tuple[str, ...]


Key = tuple[str, str, str]
"""Engine, saver, and ``dense`` or ``experts``."""

_CT = "plugins/savers/compressed-tensors/tests/test_transformers.py::"
_ENGINES = "tests/engines/"

EVIDENCE: Mapping[Key, tuple[Evidence, ...]] = {
    ("transformers-5.23.0", "compressed_tensors_saver", "dense"): (
        Evidence(
            AGREES,
            f"{_CT}test_logits_are_those_of_our_forward",
            (
                *("W8A8", "W8A8 asymmetric input", "W8A8_DYNAMIC", "W8A16", "W8A16 grouped", "W4A16", "W4A16 grouped"),
                *("W3A16", "W2A16 grouped", "W4A8_DYNAMIC", "W4A8_DYNAMIC grouped"),
                *("W8A8FP8", "W8A8FP8_DYNAMIC", "W8A8FP8_DYNAMIC blocks", "W8A16FP8"),
            ),
        ),
        Evidence(
            AGREES,
            f"{_CT}test_floats_with_scales_of_a_type_of_their_own",
            ("W8A8_MXFP8", "W8A16_MXFP8", "W4A4_MXFP4", "W4A16_MXFP4", "W4A4_NVFP4", "W4A16_NVFP4"),
        ),
    ),
    ("transformers-5.23.0", "compressed_tensors_saver", "experts"): (
        Evidence(AGREES, f"{_CT}test_fused_experts_with_quantized_weights", ("W8A16", "W4A16 grouped", "W3A16")),
    ),
    ("transformers-5.23.0", "gptq_saver", "dense"): (
        Evidence(
            AGREES,
            f"{_ENGINES}test_gptqmodel.py::test_every_linear_has_the_weight_that_we_simulate",
            ("W4A16 grouped", "W4A16 grouped asymmetric", "W8A16"),
        ),
    ),
    ("transformers-5.23.0", "awq_saver", "dense"): (
        Evidence(
            AGREES,
            f"{_ENGINES}test_gptqmodel.py::test_every_linear_has_the_weight_that_we_simulate",
            ("W4A16 grouped", "W4A16 grouped asymmetric", "W4A16 asymmetric"),
        ),
    ),
    ("vllm-0.32.0", "compressed_tensors_saver", "dense"): (
        Evidence(
            AGREES,
            f"{_ENGINES}test_vllm.py::test_the_engine_loads_the_scheme_and_computes_what_we_simulate",
            ("W8A8", "W8A8 asymmetric input", "W8A8_DYNAMIC", "W4A16 grouped", "W4A16 grouped asymmetric"),
        ),
        Evidence(AGREES, f"{_ENGINES}test_vllm.py::test_the_engine_computes_float8_as_we_do", ("W8A8FP8_DYNAMIC",)),
    ),
    ("vllm-ascend-0.23.0", "ascendv1_saver", "dense"): (
        Evidence(
            AGREES,
            f"{_ENGINES}test_vllm_ascend.py::test_the_engine_loads_the_scheme_and_computes_what_we_simulate",
            ("W8A8 asymmetric input", "W8A8_DYNAMIC", "W8A16", "W8A16 asymmetric"),
        ),
        Evidence(
            LOADS,
            f"{_ENGINES}test_vllm_ascend_types.py::test_the_parameters_of_linears_hold_what_we_wrote",
            ("W8A8_MIX", "W4A4_DYNAMIC", "W8A8FP8_DYNAMIC", "W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"),
        ),
    ),
    ("vllm-ascend-0.23.0", "ascendv1_saver", "experts"): (
        Evidence(
            LOADS,
            f"{_ENGINES}test_vllm_ascend_experts.py::test_the_experts_in_the_engine_are_those_that_we_wrote",
            ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A16 grouped", "W4A16 grouped asymmetric"),
        ),
        Evidence(
            LOADS,
            f"{_ENGINES}test_vllm_ascend_types.py::test_the_parameters_of_experts_hold_what_we_wrote",
            ("W8A8FP8_DYNAMIC", "W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4", "W4A16_MXFP4"),
        ),
    ),
}
