# SPDX-License-Identifier: Apache-2.0
"""Value types that the core, the plugins and the command line exchange. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

BITS: Mapping[str, int] = {
    "int8": 8,
    "int4": 4,
    "int3": 3,
    "int2": 2,
    "fp8_e4m3": 8,
    "mxfp8": 8,
    "mxfp4": 4,
    "nvfp4": 4,
}
"""Bits of each dtype that an operand can become."""

MICROSCALING: Mapping[str, int] = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
"""Dtypes whose scales belong to so many neighbouring inputs of a row, by definition of the format."""


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
        dtype: a word of ``BITS`` such as ``int8``, or ``float`` for an operand that is left alone. ``fp8_e4m3`` is
            float8 with a scale of any size; ``mxfp8`` and ``mxfp4`` are float8 and float4 (e2m1) in blocks of 32
            with a power of two for a scale; ``nvfp4`` is float4 in blocks of 16, whose scales are float8 and share
            one float32 scale for the whole tensor.
        scope: who shares a scale: ``per_tensor`` (static activations), ``per_token`` (dynamic
            activations), ``per_channel`` (one output row of a weight), ``per_group`` (``group_size`` neighbouring
            inputs of one row), ``per_block`` (the same in ``group_rows`` rows; what the dtype defines for those of
            ``MICROSCALING``), ``pd_mix`` (activations: per token where a prompt is read, one static scale where
            tokens are generated).
        symmetric: True when the offset is zero by construction.
        group_size: inputs that share a scale; None for all of a row.
        scale_dtype: dtype in which the engine will hold the scale (``float32``, ``bfloat16``,
            ``float16``). Scales are computed in float32 and rounded to it before the codes are
            made, so that what the engine multiplies with is what the codes were made for. Dtypes of
            ``MICROSCALING`` have a type of scale of their own.
        group_rows: rows of a weight that share a scale, too.
        sparse: True for a weight whose values are few and uneven, so that another tool can compress them without
            loss: a ``float`` one with zeros, or ``int8`` codes of which all but a few outliers are within four bits.
    """

    dtype: str
    scope: str
    symmetric: bool = True
    group_size: int | None = None
    scale_dtype: str = "float32"
    group_rows: int = 1
    sparse: bool = False

    @property
    def element(self) -> str:
        """What a single code is: ``int``, ``e4m3`` (float8), ``e2m1`` (float4); ``float`` for an operand left alone."""
        if self.is_float or self.is_integer:
            return self.dtype.rstrip("0123456789")
        return "e4m3" if self.bits == 8 else "e2m1"

    @property
    def is_integer(self) -> bool:
        """True when codes are integers; False for floating codes, and for an operand that is left alone."""
        return self.dtype.startswith("int")

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
        """Smallest code, of integers."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code, of integers."""
        return (1 << (self.bits - 1)) - 1


FLOAT = TensorSpec("float", "per_tensor")


@dataclass(frozen=True)
class QuantSpec:
    """What the weight and the input of one linear become."""

    weight: TensorSpec
    activation: TensorSpec = FLOAT

    @property
    def is_dynamic(self) -> bool:
        """True when the engine computes activation scales at run time, and needs nothing from calibration for it."""
        return not self.activation.is_float and not self.is_static

    @property
    def is_static(self) -> bool:
        """True when the engine needs something from calibration for its activations."""
        activation = self.activation
        if activation.is_float:
            return False
        return activation.scope in ("per_tensor", "pd_mix") or activation.dtype == "nvfp4"

    @property
    def scheme(self) -> str:
        """The field's name: ``W8A8`` (static), ``W8A8_DYNAMIC``, ``W8A16``, ``W8A8FP8_DYNAMIC``, ``W8A8_MXFP8``, ...

        ``S`` behind the bits is for sparse weights: ``W16A16S``, ``W8A8S``.
        """
        weight, activation = self.weight, self.activation
        bits = f"W{weight.bits}A{activation.bits}{'S' if weight.sparse else ''}"
        if weight.dtype in MICROSCALING:
            # Two kinds of float in one name, float8 inputs of float4 weights, are called MXFP.
            mixed = not activation.is_float and activation.dtype != weight.dtype
            return f"{bits}_{weight.dtype.rstrip('48') if mixed else weight.dtype}".upper()
        name = bits + ("FP8" if "fp8_e4m3" in (weight.dtype, activation.dtype) else "")
        if activation.scope == "pd_mix":
            return f"{name}_MIX"
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
        has_multiplier: True when its input will be multiplied by a vector at run time, as smoothing wants it.
    """

    name: str
    stored: str
    unit: str
    out_features: int
    in_features: int
    has_bias: bool
    dtype: str
    bank: str = ""
    has_multiplier: bool = False

    @property
    def module(self) -> str:
        """Name of the module that holds its weight, under which an algorithm finds it in a unit."""
        return self.bank or self.name


@dataclass(frozen=True)
class AttentionCache:
    """An attention whose keys and values an engine keeps in a cache, head by head.

    Attributes:
        attention: full name of the attention. When it is called with ``past_key_values``, it calls
            ``past_key_values.update(keys, values, ...)`` with [batch, heads, tokens, size of a head].
        keys: full name of the linear that makes the keys, under whose name formats file their scales.
        values: full name of the linear that makes the values.
        heads: number of key/value heads.
        head_size: channels of one of them.
    """

    attention: str
    keys: str
    values: str
    heads: int
    head_size: int


@dataclass(frozen=True)
class CacheInfo:
    """A place where keys or values enter a cache.

    Attributes:
        name: dotted path of the place, such as ``model.layers.0.self_attn.k_cache``.
        attention: the attention that it belongs to.
        stored: name in the checkpoint of the linear that makes them, without ``.weight``.
        unit: name of the unit that holds it.
        heads: number of key/value heads.
        head_size: channels of one of them.
    """

    name: str
    attention: str
    stored: str
    unit: str
    heads: int
    head_size: int

    @property
    def channels(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_size


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
