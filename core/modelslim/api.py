# SPDX-License-Identifier: Apache-2.0
"""Public names for the authors of plugins: the only module of the core that a plugin imports."""

from modelslim.algorithm import Algorithm, Entry, Fallback, Pattern, Processor, Unit
from modelslim.checkpoint import Checkpoint, StoredTensor
from modelslim.context import Namespace
from modelslim.devices import one_thread
from modelslim.driver import drive
from modelslim.edits import add_bias
from modelslim.errors import (
    CapabilityError,
    DatasetError,
    InvalidDatasetError,
    ModelError,
    ModelSlimError,
    PluginError,
    ProtocolError,
    QuantizationError,
    SaveError,
    UsageError,
    nearest,
)
from modelslim.experts import WHOLE, ExpertLinear, FusedExperts
from modelslim.hookspecs import hookimpl
from modelslim.kv_cache import QuantizedCache
from modelslim.multipliers import carry_input_multiplier, multiply_inputs
from modelslim.number_formats import e2m1_nibbles, from_e2m1_nibbles, from_e8m0, to_e8m0
from modelslim.packing import pack_bits, to_signed, to_unsigned, unpack_bits
from modelslim.patterns import Selector
from modelslim.planned import (
    FUSED,
    PlannedLinear,
    check_tied_head,
    fusions,
    group_by_spec,
    listed,
    planned_linears,
    scheme_in_words,
)
from modelslim.qconfig import check_group_sizes, parse_activation, parse_qconfig, parse_weight
from modelslim.quantized import QuantizedExperts, QuantizedLinear, QuantizedTensor
from modelslim.ranks import ALONE, Ranks
from modelslim.row_sample import RowSample
from modelslim.sampling import choose_samples
from modelslim.saved_config import without_quantization
from modelslim.saver import EngineAnswer, PlannedModel, SavedCache, SavedLinear, Saver, TensorRecord
from modelslim.scales import (
    from_codes,
    largest_magnitudes,
    range_to_scale,
    rounded_inputs,
    spread,
    to_codes,
    whole_scale,
)
from modelslim.seen import no_token, not_finite, seen_gram, seen_range, static_scale
from modelslim.statistics import ChannelAbsMean, ChannelEnergy, ChannelRange, Gram, Statistic, TensorRange, TokenCount
from modelslim.types import (
    FLOAT,
    AttentionCache,
    CacheInfo,
    DecodedTensor,
    LinearInfo,
    Problem,
    ProcessRequest,
    QuantSpec,
    Subgraph,
    TensorSpec,
    Topology,
    WeightSource,
)
from modelslim.unit_statistics import UnitStatistics
from modelslim.vlm_dataset import VlmCalibSample

__all__ = [
    "ALONE",
    "FLOAT",
    "FUSED",
    "WHOLE",
    "Algorithm",
    "AttentionCache",
    "CacheInfo",
    "CapabilityError",
    "ChannelAbsMean",
    "ChannelEnergy",
    "ChannelRange",
    "Checkpoint",
    "DatasetError",
    "DecodedTensor",
    "EngineAnswer",
    "Entry",
    "ExpertLinear",
    "Fallback",
    "FusedExperts",
    "Gram",
    "InvalidDatasetError",
    "LinearInfo",
    "ModelError",
    "ModelSlimError",
    "Namespace",
    "Pattern",
    "PlannedLinear",
    "PlannedModel",
    "PluginError",
    "Problem",
    "ProcessRequest",
    "Processor",
    "ProtocolError",
    "QuantSpec",
    "QuantizationError",
    "QuantizedCache",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedTensor",
    "Ranks",
    "RowSample",
    "SaveError",
    "SavedCache",
    "SavedLinear",
    "Saver",
    "Selector",
    "Statistic",
    "StoredTensor",
    "Subgraph",
    "TensorRange",
    "TensorRecord",
    "TensorSpec",
    "TokenCount",
    "Topology",
    "Unit",
    "UnitStatistics",
    "UsageError",
    "VlmCalibSample",
    "WeightSource",
    "add_bias",
    "carry_input_multiplier",
    "check_group_sizes",
    "check_tied_head",
    "choose_samples",
    "drive",
    "e2m1_nibbles",
    "from_codes",
    "from_e2m1_nibbles",
    "from_e8m0",
    "fusions",
    "group_by_spec",
    "hookimpl",
    "largest_magnitudes",
    "listed",
    "multiply_inputs",
    "nearest",
    "no_token",
    "not_finite",
    "one_thread",
    "pack_bits",
    "parse_activation",
    "parse_qconfig",
    "parse_weight",
    "planned_linears",
    "range_to_scale",
    "rounded_inputs",
    "scheme_in_words",
    "seen_gram",
    "seen_range",
    "spread",
    "static_scale",
    "to_codes",
    "to_e8m0",
    "to_signed",
    "to_unsigned",
    "unpack_bits",
    "whole_scale",
    "without_quantization",
]
