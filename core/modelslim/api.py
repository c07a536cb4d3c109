# SPDX-License-Identifier: Apache-2.0
"""Public names for the authors of plugins: the only module of the core that a plugin imports."""

from modelslim.algorithm import Algorithm, Entry, Fallback, Pattern, Processor, Unit
from modelslim.checkpoint import Checkpoint, StoredTensor
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
from modelslim.patterns import Selector
from modelslim.quantized import QuantizedExperts, QuantizedLinear, QuantizedTensor, range_to_scale
from modelslim.saver import PlannedModel, SavedLinear, Saver, TensorRecord
from modelslim.statistics import (
    ChannelAbsMean,
    ChannelRange,
    Gram,
    RowSample,
    Statistic,
    TensorRange,
    TokenCount,
    UnitStatistics,
)
from modelslim.types import (
    FLOAT,
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
from modelslim.vlm_dataset import VlmCalibSample

__all__ = [
    "FLOAT",
    "WHOLE",
    "Algorithm",
    "CapabilityError",
    "ChannelAbsMean",
    "ChannelRange",
    "Checkpoint",
    "DatasetError",
    "DecodedTensor",
    "Entry",
    "ExpertLinear",
    "Fallback",
    "FusedExperts",
    "Gram",
    "InvalidDatasetError",
    "LinearInfo",
    "ModelError",
    "ModelSlimError",
    "Pattern",
    "PlannedModel",
    "PluginError",
    "Problem",
    "ProcessRequest",
    "Processor",
    "ProtocolError",
    "QuantSpec",
    "QuantizationError",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedTensor",
    "RowSample",
    "SaveError",
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
    "drive",
    "hookimpl",
    "nearest",
    "one_thread",
    "range_to_scale",
]
