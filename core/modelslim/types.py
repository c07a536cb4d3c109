# SPDX-License-Identifier: Apache-2.0
"""Value types that the core, the plugins and the command line exchange. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

BITS: Mapping[str, int] = {"int8": 8, "int4": 4}


@dataclass
class ProcessRequest:
    """How an adapter hands a unit to the engine.

    Attributes:
        name: dotted path of the unit in the model, as ``model.get_submodule`` takes it.
        module: the unit itself.
        args: the positional arguments of this call; empty when visiting without data.
        kwargs: the keyword arguments of this call; empty when visiting without data.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorSpec:
    """How one operand of a linear is quantized.

    Attributes:
        dtype: ``int8``, ``int4``, or ``float`` for an operand that is left alone.
        scope: who shares a scale: ``per_tensor`` (static activations), ``per_token`` (dynamic
            activations), ``per_channel`` (one output row of a weight), ``per_group``
            (``group_size`` neighbouring inputs of one row).
        symmetric: True when the offset is zero by construction.
        group_size: inputs per group; None unless the scope is ``per_group``.
        scale_dtype: dtype in which the engine will hold the scale (``float32``, ``bfloat16``,
            ``float16``). Scales are computed in float32 and rounded to it before the codes are
            made, so that what the engine multiplies with is what the codes were made for.
    """

    dtype: str
    scope: str
    symmetric: bool = True
    group_size: int | None = None
    scale_dtype: str = "float32"

    @property
    def is_float(self) -> bool:
        """True when the operand is left in floating point."""
        return self.dtype == "float"

    @property
    def bits(self) -> int:
        """Bits per value; 16 for an operand that is left alone."""
        return BITS.get(self.dtype, 16)

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1


FLOAT = TensorSpec("float", "per_tensor")


@dataclass(frozen=True)
class QuantSpec:
    """What the weight and the input of one linear become."""

    weight: TensorSpec
    activation: TensorSpec = FLOAT

    @property
    def is_dynamic(self) -> bool:
        """True when activation scales are computed by the engine at run time."""
        return self.activation.scope == "per_token" and not self.activation.is_float

    @property
    def is_static(self) -> bool:
        """True when activation scales come from calibration."""
        return self.activation.scope == "per_tensor" and not self.activation.is_float

    @property
    def scheme(self) -> str:
        """The field's name: ``W8A8`` (static), ``W8A8_DYNAMIC``, ``W8A16``, ``W4A8_DYNAMIC``, ..."""
        name = f"W{self.weight.bits}A{self.activation.bits}"
        return f"{name}_DYNAMIC" if self.is_dynamic else name


@dataclass(frozen=True)
class LinearInfo:
    """A linear that can be quantized, known before any weight is read.

    Attributes:
        name: dotted path in the model.
        stored: its name in the source checkpoint and in the result, without ``.weight``.
        unit: name of the unit that holds it; empty for a linear outside all units (``lm_head``).
        out_features: rows of the weight.
        in_features: columns of the weight.
        has_bias: True when it has a bias.
        dtype: dtype of the weight in the model, such as ``bfloat16``.
        bank: name of the module that holds it together with those of the other experts of its
            layer; empty for a linear that is a module of its own.
    """

    name: str
    stored: str
    unit: str
    out_features: int
    in_features: int
    has_bias: bool
    dtype: str
    bank: str = ""

    @property
    def module(self) -> str:
        """Name of the module that holds its weight, under which an algorithm finds it in a unit."""
        return self.bank or self.name


@dataclass(frozen=True)
class Problem:
    """Something that an algorithm or a saver refuses at plan time.

    Attributes:
        message: what is wrong.
        hint: what to do.
        path: place relative to the plugin's own configuration, such as ``("include", 0)``.
        linear: name of a linear; the plan then points at the entry of ``process`` that chose its
            scheme instead of at the plugin's own configuration.
        fatal: False for a warning that the plan prints and that does not stop the run.
    """

    message: str
    hint: str = ""
    path: tuple[str | int, ...] = ()
    linear: str | None = None
    fatal: bool = True


@dataclass(frozen=True)
class WeightSource:
    """Which stored tensors make one parameter or buffer of the model.

    Attributes:
        keys: names in the checkpoint. The result is written under the first.
        convert: makes the parameter from the stored tensors, in the order of ``keys``; None when
            the single stored tensor is the parameter.
        experts: for the weight of an ``ExpertLinear``, the names under which the linears of each
            expert are written, without ``.weight``: one tuple per expert, in the order of its
            ``parts``. Empty: ``<experts>.<number>.<part>``.
        name: for the weight of a linear that is cut out of a larger stored tensor, the name under
            which it is written, without ``.weight``. Empty: that of the first key.
    """

    keys: tuple[str, ...]
    convert: Callable[[list[Tensor]], Tensor] | None = None
    experts: tuple[tuple[str, ...], ...] = ()
    name: str = ""


@dataclass(frozen=True)
class DecodedTensor:
    """A float tensor that a checkpoint holds in quantized form, such as float8 codes and scales per block.

    Attributes:
        keys: names of the stored tensors that make it.
        dtype: its dtype, such as ``bfloat16``.
        shape: its shape.
        decode: makes it, contiguous, from the stored tensors in the order of ``keys``.
    """

    keys: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    decode: Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Subgraph:
    """A tensor inside a unit that may be divided by a scale, one positive number per channel, and keep the function.

    What makes the tensor is divided by the scale, and every weight that reads it is multiplied along its inputs.
    The function stays the same only because ``targets`` names all readers: the module that makes the tensor is
    linear in it (or a norm), and what lies between keeps channels apart and is linear in each.

    Attributes:
        type: ``norm-linear`` (a norm and the linears behind it), ``ov`` (values and the output projection of an
            attention), ``up-down`` (up and down projection of an MLP), ``linear-linear`` (two linears with
            nothing but channelwise linear steps between) or ``non-fusion`` (no source: the scale is applied to
            the input of the targets when the model runs).
        source: full name of the module whose output is divided: weight rows and bias; empty for ``non-fusion``.
        targets: full names of all modules that read the tensor; each has a weight [..., out, in]: linears,
            ``ExpertLinear`` banks, routers.
        heads: attention heads and key/value heads, for ``ov``. Channels of the source are [key/value heads,
            size of a head], inputs of the target [attention heads, size of a head]; consecutive attention heads
            share one key/value head, and so must their scales.
        rows: rows of the source's weight that make the channels, in the order of the channels; for an
            ``ExpertLinear`` bank the rows within each expert. None: all rows in order.
        unit_offset: True for a norm that multiplies by (1 + weight).
    """

    type: str
    source: str
    targets: tuple[str, ...]
    heads: tuple[int, int] | None = None
    rows: tuple[int, ...] | None = None
    unit_offset: bool = False


@dataclass(frozen=True)
class Topology:
    """Where smoothing may act in a model.

    Attributes:
        subgraphs: every subgraph; each lies within one unit.
        left_out: why a place has no subgraph, by the name of the module or by a pattern of names.
    """

    subgraphs: tuple[Subgraph, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
