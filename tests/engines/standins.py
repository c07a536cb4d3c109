# SPDX-License-Identifier: Apache-2.0
"""What vllm-ascend's quantization needs of an NPU, on a CPU: its operators by their documented formulas.

The configuration class, the scheme classes, the loader and the model are the engine's own. Replaced are the module
``torch_npu``, and the package ``vllm_ascend.ops``, which is made of kernels. What has no formula here raises when it
is called.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

REPLACED = ("torch_npu", "vllm_ascend.ops")


def replace_modules() -> None:
    """Make ``vllm_ascend.quantization`` importable."""
    sys.meta_path.insert(0, _Finder())


def install() -> None:
    """Make ``vllm_ascend.quantization`` importable and register its quantization with vLLM."""
    replace_modules()
    torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]
    torch.library.define("vllm::quantize", "(Tensor x, Tensor scale, Tensor reciprocal, Tensor offset) -> Tensor")
    torch.library.impl("vllm::quantize", "cpu", quantize)

    import vllm_ascend.ascend_config as config
    import vllm_ascend.distributed.parallel_state as groups
    import vllm_ascend.utils as utils
    from vllm.config import get_current_vllm_config

    started = config.get_ascend_config

    def get_ascend_config() -> Any:
        if config._ASCEND_CONFIG is None:
            config.init_ascend_config(get_current_vllm_config())
        return started()

    config.get_ascend_config = utils.get_ascend_config = get_ascend_config
    groups._MC2 = SimpleNamespace()  # without a device group there is no communication between experts
    utils._WEIGHT_PREFETCH_METHOD = SimpleNamespace(
        maybe_prefetch_attn_weight_preprocess=lambda **_: None,
        maybe_prefetch_attn_weight_postprocess=lambda **_: None,
    )
    import vllm_ascend.quantization.modelslim_config  # noqa: F401 - registers itself


def quantize(x: Tensor, scale: Tensor, reciprocal: Tensor, offset: Tensor) -> Tensor:
    """``npu_quantize`` to int8: the product with the reciprocal, as the engine passes it."""
    codes = (x.float() * reciprocal.float()).add_(offset.float()).round_()
    return codes.clamp_(-128, 127).to(torch.int8)


def npu_dynamic_quant(x: Tensor, *, dst_type: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Int8 codes of the shape of x, and the float32 scale of every token."""
    assert dst_type is torch.int8, dst_type
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    codes = (x.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return codes, scale.squeeze(-1)


def npu_quant_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype,
) -> Tensor:
    """Codes int8 [tokens, in] by codes int8 [in, out]; an int32 bias is added before scaling, a float one behind.

    A scale of int64 holds the bits of a float32.
    """
    product = torch._int_mm(x, weight)
    if scale.dtype == torch.int64:
        assert output_dtype is torch.float16 and not (scale >> 32).any()
        scale = scale.to(torch.int32).view(torch.float32)
    if bias is not None and bias.dtype == torch.int32:
        product += bias
    result = product.float() * scale.float()
    if pertoken_scale is not None:
        result *= pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        result += bias
    return result.to(output_dtype)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
) -> Tensor:
    """x [tokens, in] by ``(weight + offset) * scale``, weight int8 [in, out], scale and offset [out]."""
    assert weight.dtype is torch.int8 and not antiquant_group_size
    offset = 0 if antiquant_offset is None else antiquant_offset.float()
    values = (weight.float() + offset) * antiquant_scale.float()
    return torch.nn.functional.linear(x, values.t().to(x.dtype), bias)


def npu_convert_weight_to_int4pack(weight: Tensor) -> Tensor:
    """Codes int32 -8..7 [rows, columns] -> int32 [rows, columns / 8], the first column in the lowest four bits."""
    nibbles = (weight & 0xF).view(weight.shape[0], -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
    return nibbles.sum(-1, dtype=torch.int32)


def npu_format_cast(tensor: Tensor, layout: int) -> Tensor:
    """The blocked layouts hold the same numbers."""
    return tensor


OPERATORS = (
    npu_convert_weight_to_int4pack,
    npu_dynamic_quant,
    npu_format_cast,
    npu_quant_matmul,
    npu_weight_quant_batchmatmul,
)


class _Finder(MetaPathFinder, Loader):
    """Makes the replaced modules and all below them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        replaced = any(name == one or name.startswith(f"{one}.") for one in REPLACED)
        return ModuleSpec(name, self, is_package=True) if replaced else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "torch_npu":
            for function in OPERATORS:
                setattr(module, function.__name__, function)
        if module.__name__ == "vllm_ascend.ops.linear":
            from vllm.model_executor.layers.linear import UnquantizedLinearMethod

            module.AscendUnquantizedLinearMethod = UnquantizedLinearMethod  # type: ignore[attr-defined]


class _Module(ModuleType):
    """Gives anything by name; what has no formula here cannot be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: object, **__: object) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} has no stand-in")

        return absent
