# SPDX-License-Identifier: Apache-2.0
"""The interfaces that an adapter may implement, and the values that their methods use."""

from modelslim.api import ProcessRequest
from msmodelslim.core.const import DeviceType
from msmodelslim.core.graph import AdapterConfig, FusionConfig, MappingConfig
from msmodelslim.interfaces import (
    AdaptRotationInterface,
    AscendV1GlobalModelDtypeInterface,
    AscendV1SaveInterface,
    AttentionAnalysisInterface,
    AWQInterface,
    FA3QuantAdapterInterface,
    FlatQuantInterface,
    FlexSmoothQuantInterface,
    IModel,
    IterSmoothInterface,
    KVSmoothFusedInterface,
    LAOSOnlineRotationInterface,
    LayerWiseOffloadOptionalInterface,
    ModelInfoInterface,
    OnlineQuaRotInterface,
    PipelineInterface,
    PipelineInterfaceV0,
    QuaRotInterface,
    RotatePair,
    SmoothQuantInterface,
    StandingHighWithExperienceInterface,
)
from msmodelslim.model.common.layer_wise_forward import (
    generated_decoder_layer_visit_func,
    transformers_generated_forward_func,
)

ModelSlimPipelineInterfaceV0 = PipelineInterfaceV0
ModelSlimPipelineInterfaceV1 = PipelineInterface

__all__ = [
    "AWQInterface",
    "AdaptRotationInterface",
    "AdapterConfig",
    "AscendV1GlobalModelDtypeInterface",
    "AscendV1SaveInterface",
    "AttentionAnalysisInterface",
    "DeviceType",
    "FA3QuantAdapterInterface",
    "FlatQuantInterface",
    "FlexSmoothQuantInterface",
    "FusionConfig",
    "IModel",
    "IterSmoothInterface",
    "KVSmoothFusedInterface",
    "LAOSOnlineRotationInterface",
    "LayerWiseOffloadOptionalInterface",
    "MappingConfig",
    "ModelInfoInterface",
    "ModelSlimPipelineInterfaceV0",
    "ModelSlimPipelineInterfaceV1",
    "OnlineQuaRotInterface",
    "PipelineInterface",
    "PipelineInterfaceV0",
    "ProcessRequest",
    "QuaRotInterface",
    "RotatePair",
    "SmoothQuantInterface",
    "StandingHighWithExperienceInterface",
    "generated_decoder_layer_visit_func",
    "transformers_generated_forward_func",
]
