# SPDX-License-Identifier: Apache-2.0
"""What an adapter declares that it can do; each class stands at several import paths.

The methods are those of the existing tool. An adapter that implements one answers the hook of ModelSlim
that has the same name; those without such a hook can be implemented and are not called yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from modelslim.api import ProcessRequest
from msmodelslim.core.const import DeviceType
from msmodelslim.core.graph.adapter_types import AdapterConfig


@dataclass
class RotatePair:
    """A rotation: names of weights by the side on which they turn, each with its matrix."""

    left_rot: dict[str, Any]
    right_rot: dict[str, Any]


class IModel(ABC):
    """Knows which model it serves."""

    @property
    @abstractmethod
    def model_type(self) -> str:
        """Name of the model."""

    @property
    @abstractmethod
    def model_path(self) -> Path:
        """Directory of the checkpoint."""

    @property
    @abstractmethod
    def trust_remote_code(self) -> bool:
        """True when code of the checkpoint may run."""


class ModelInfoInterface(ABC):
    """Names the model for the choice of a practice."""

    @abstractmethod
    def get_model_pedigree(self) -> str:
        """The model's family."""

    @abstractmethod
    def get_model_type(self) -> str:
        """The model's name."""


class PipelineInterface(ABC):
    """What every run needs."""

    @abstractmethod
    def handle_dataset(self, dataset: Any, device: DeviceType = DeviceType.NPU) -> list[Any]:
        """Inputs of the model, one per sample."""

    @abstractmethod
    def init_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        """The model, its first decoder layer included."""

    @abstractmethod
    def generate_model_visit(self, model: nn.Module) -> Generator[ProcessRequest, Any, None]:
        """The units in the order of the forward, loaded as they come."""

    @abstractmethod
    def generate_model_forward(self, model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, None]:
        """The units with their arguments; receives each unit's output."""

    def enable_kv_cache(self, model: nn.Module, need_kv_cache: bool) -> None:
        """Switch the cache; as it stands, on the model's configuration."""
        model.config.use_cache = need_kv_cache  # type: ignore[union-attr]


class PipelineInterfaceV0(ABC):  # noqa: B024
    """The older pipeline, which has no successor here; an adapter that names it loses nothing else."""


class LayerWiseOffloadOptionalInterface(ABC):  # noqa: B024
    """Where released weights go; here they always leave memory."""

    def get_layer_wise_offload_device(self) -> str:
        """``meta``."""
        return "meta"


class SmoothQuantInterface(ABC):
    """Describes the subgraphs that smoothing may rescale."""

    @abstractmethod
    def get_adapter_config_for_subgraph(self) -> list[AdapterConfig]:
        """The subgraphs."""


class IterSmoothInterface(SmoothQuantInterface):
    """The same for iter_smooth."""


class FlexSmoothQuantInterface(SmoothQuantInterface):
    """The same for flex_smooth_quant."""


class AWQInterface(SmoothQuantInterface):
    """The same for awq."""


class QuaRotInterface(ABC):
    """Describes how the residual stream may be rotated."""

    RotatePair = RotatePair

    @abstractmethod
    def get_ln_fuse_map(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Linears by the norm whose gain they take in: before the run, and during it."""

    def get_bake_names(self) -> tuple[list[str], list[str]]:
        """Linears that take in a LayerNorm's mean subtraction: before the run, and during it."""
        return [], []

    @abstractmethod
    def get_rotate_map(self, block_size: int) -> tuple[list[Any], list[Any]]:
        """Rotations as :class:`RotatePair`: before the run, and during it."""


class AdaptRotationInterface(QuaRotInterface):
    """Describes a rotation that is fitted to activations."""

    @abstractmethod
    def get_hidden_dim(self) -> int:
        """Width of the residual stream."""


class LAOSOnlineRotationInterface(ABC):
    """Describes rotations that the engine applies at run time."""

    @abstractmethod
    def get_head_dim(self) -> int:
        """Width of a head."""

    @abstractmethod
    def get_num_attention_heads(self) -> int:
        """Query heads."""

    @abstractmethod
    def get_layer_wise_ov_pair(self, decoder_module: nn.Module) -> dict[Any, Any]:
        """The o and v projections of a layer."""

    @abstractmethod
    def get_layer_wise_up_down_pair(self, decoder_module: nn.Module) -> dict[Any, Any]:
        """The up and down projections of a layer."""


class OnlineQuaRotInterface(ABC):
    """Describes rotations of single modules."""

    @abstractmethod
    def get_online_rotation_configs(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Configurations by module name."""


class FlatQuantInterface(ABC):
    """Describes the subgraphs of flatquant."""

    @abstractmethod
    def get_flatquant_subgraph(self) -> list[dict[str, Any]]:
        """The subgraphs."""


class KVSmoothFusedInterface(ABC):
    """Describes what kv_smooth may rescale."""

    @abstractmethod
    def get_kvcache_smooth_fused_subgraph(self) -> list[Any]:
        """The subgraphs."""

    @abstractmethod
    def get_head_dim(self) -> int:
        """Width of a head."""

    @abstractmethod
    def get_num_key_value_groups(self) -> int:
        """Query heads of one key/value head."""

    @abstractmethod
    def get_num_key_value_heads(self) -> int:
        """Key/value heads."""


class FA3QuantAdapterInterface(ABC):
    """Puts observers into attention modules."""

    @abstractmethod
    def inject_fa3_placeholders(self, root_name: str, root_module: nn.Module, should_inject: Any) -> None:
        """Put them in."""


class AttentionAnalysisInterface(ABC):
    """Names the attention modules for the analysis."""

    @abstractmethod
    def get_attention_module_cls(self) -> Any:
        """Their class."""

    @abstractmethod
    def get_attention_output_extractor(self) -> Any:
        """Takes the attention's output out of what the module returns."""


class AscendV1SaveInterface(ABC):  # noqa: B024
    """Edits what the ascendv1 saver writes; savers of ModelSlim write source names and need no edit."""


class AscendV1GlobalModelDtypeInterface(ABC):  # noqa: B024
    """Names the model's dtype; ModelSlim reads it off the model."""


class StandingHighWithExperienceInterface(ABC):  # noqa: B024
    """Lets the tuner look at the model's structure; it reads the model itself here."""
