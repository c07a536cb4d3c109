# SPDX-License-Identifier: Apache-2.0
"""The hooks of ModelSlim, in pluggy's terms. This file is the manual of an adapter's author.

A run has one plugin manager with one adapter and the vendor plugins, nothing global. The hooks of
the model are ``firstresult``: the adapter answers, a vendor may wrap. An implementation may take
fewer arguments than the specification; it must not give them defaults, since pluggy never fills
those. A hook that an adapter leaves out is a capability that it does not have: the plan compares
what the algorithms need with what is there, before a weight is read.

    from modelslim.api import hookimpl

    class TinyAdapter:
        def __init__(self, model_type, model_path, trust_remote_code=False): ...

        @hookimpl
        def init_model(self, device): ...
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from modelslim.types import AttentionCache, DecodedTensor, ProcessRequest, Topology, WeightSource

if TYPE_CHECKING:
    from torch import nn

    from modelslim.checkpoint import StoredTensor

PROJECT = "modelslim"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def init_model(device: str) -> nn.Module:  # type: ignore[empty-body]
    """Build the model: eval mode, no cache, the small parts loaded, the units on meta.

    Args:
        device: where the small parts go (embeddings, norms outside the units, buffers). With
            ``meta`` nothing is loaded at all: the plan wants names and shapes only.

    Returns:
        The model. Parameters still on meta are filled by the engine, unit by unit.

    Example::

        @hookimpl
        def init_model(self, device):
            with torch.device("meta"):
                model = MyModel(self.config).eval()
            if device != "meta":
                model.embed_tokens.to_empty(device=device).load_state_dict(...)
            return model
    """


@hookspec(firstresult=True)
def handle_dataset(dataset: Sequence[Any], device: str) -> list[Any]:  # type: ignore[empty-body]
    """Turn calibration samples into inputs of the model.

    Args:
        dataset: the samples. Of apiversion modelslim_v1: strings, and chats as lists of
            {role, content}. Of multimodal_vlm_modelslim_v1: :class:`modelslim.api.VlmCalibSample`,
            whose image, audio and video are paths or None.
        device: where the tensors go.

    Returns:
        One input per sample, in the form that ``generate_model_forward`` takes. Padding is taken out by the
        engine where a mapping has it in its ``attention_mask`` (or the second of two tensors does).

    Raises:
        InvalidDatasetError: a sample holds what the model does not take, such as a video; says which.

    Example::

        @hookimpl
        def handle_dataset(self, dataset, device):
            return [self.tokenizer(text, return_tensors="pt").to(device) for text in dataset]
    """


@hookspec(firstresult=True)
def generate_model_visit(model: nn.Module) -> Iterable[ProcessRequest]:  # type: ignore[empty-body]
    """Yield the units in the order of the forward, without data.

    Args:
        model: what ``init_model`` gave.

    Returns:
        Requests whose args and kwargs are empty. Each unit comes once.

    Example::

        @hookimpl
        def generate_model_visit(self, model):
            for index, layer in enumerate(model.layers):
                yield ProcessRequest(f"layers.{index}", layer)
    """


@hookspec(firstresult=True)
def generate_model_forward(  # type: ignore[empty-body]
    model: nn.Module, inputs: Any
) -> Generator[ProcessRequest, Any, Any]:
    """Run the model on one input, yielding each unit instead of calling it.

    Args:
        model: what ``init_model`` gave.
        inputs: one element of what ``handle_dataset`` gave.

    Returns:
        A generator. It yields the same units as ``generate_model_visit``, in the same order, with
        the real arguments of the call, and receives the unit's output through ``send``. What it
        returns is the model's output. The engine may close it after the last unit.

    Example::

        @hookimpl
        def generate_model_forward(self, model, inputs):
            hidden = model.embed_tokens(inputs["input_ids"])
            for index, layer in enumerate(model.layers):
                hidden = yield ProcessRequest(f"layers.{index}", layer, (hidden,), {})
            return model.lm_head(model.norm(hidden))
    """


@hookspec(firstresult=True)
def make_tiny_checkpoint(model: nn.Module, path: Path) -> Sequence[Any] | None:
    """Write a tiny checkpoint of the same architecture, on which the plan proves ``generate_model_forward``.

    A run that calibrates is planned only when, on this model, the units give to the bit what they
    give in a plain call of the model. Keep every kind of layer that the model has, in the model's
    order, and make windows shorter than the inputs: a mistake that shows in no tiny model is not
    found. torch's generator is seeded, and restored afterwards.

    Args:
        model: what ``init_model("meta")`` gave for the real checkpoint.
        path: an empty directory. It gets config.json and safetensors files with random weights;
            an adapter of the same class is opened on it.

    Returns:
        One or more inputs of ``generate_model_forward`` on the CPU, of different lengths. The model
        itself is called on the same: ``model(**inputs)`` for a mapping, else ``model(inputs)``.
        Absent, or None: the generic adapter is asked to shrink config.json; where it cannot, the
        plan warns that the forward is not proven. A CapabilityError says why it cannot be made.

    Example::

        @hookimpl
        def make_tiny_checkpoint(self, path):
            model = MyModel(replace(self.config, num_layers=2, hidden_size=16))
            save_file({name: torch.randn_like(w) for name, w in model.state_dict().items()}, path / "model.safetensors")
            (path / "config.json").write_text(model.config.to_json())
            return [{"input_ids": torch.randint(256, (1, length))} for length in (9, 14)]
    """


@hookspec(firstresult=True)
def enable_kv_cache(model: nn.Module, need_kv_cache: bool) -> None:
    """Switch the model's key/value cache on or off.

    Args:
        model: what ``init_model`` gave.
        need_kv_cache: True when an algorithm observes the cache.

    Returns:
        None; absent means that the model never caches during calibration.

    Example::

        @hookimpl
        def enable_kv_cache(self, model, need_kv_cache):
            model.config.use_cache = need_kv_cache
    """


@hookspec(firstresult=True)
def get_decoded_tensors(  # type: ignore[empty-body]
    tensors: Mapping[str, StoredTensor],
) -> Mapping[str, DecodedTensor]:
    """Say which float tensors a source checkpoint holds in quantized form, such as float8 with scales per block.

    From then on the float tensors stand in place of the stored ones that make them: the model is filled
    from them, and what is not quantized anew goes into the result as float.

    Args:
        tensors: every stored tensor by name, with ``dtype`` in the words of safetensors and ``shape``.

    Returns:
        By name of the float tensor. Empty for a float checkpoint. Absent hook: tensors are what they are.

    Example::

        @hookimpl
        def get_decoded_tensors(self, tensors):
            return {
                name: DecodedTensor((name, f"{name}_scale"), "bfloat16", stored.shape, multiply)
                for name, stored in tensors.items() if f"{name}_scale" in tensors
            }
    """


@hookspec(firstresult=True)
def get_weight_sources(  # type: ignore[empty-body]
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, WeightSource]:
    """Say which stored tensors make which parameters.

    Args:
        model: the model, possibly on meta.
        shapes: of all tensors in the source checkpoint, by name; decoded ones by their float names.

    Returns:
        By parameter or buffer name. Stored tensors that no source names are copied unchanged into
        the result. Absent hook: every parameter is stored under its own name.

    Example::

        @hookimpl
        def get_weight_sources(self, model, shapes):
            return {key.removeprefix("thinker."): WeightSource((key,)) for key in shapes}
    """


@hookspec(firstresult=True)
def get_adapter_config_for_subgraph(model: nn.Module) -> Topology:  # type: ignore[empty-body]
    """Say what smoothing may rescale, and what it may not and why.

    A subgraph that forgets a reader of its source changes what the model computes, and no error tells it.
    One of type ``non-fusion`` has no source: its targets read one tensor that nothing can divide. It is used only
    where an algorithm asks for the type, and for targets that are quantized.
    Prove yours on a tiny model: divide, multiply, compare the outputs.

    Args:
        model: the model, possibly on meta.

    Returns:
        Subgraphs by the full names of their modules, each within one unit, and the reasons for what is
        left out. Absent: algorithms that need the topology are refused by the plan.

    Example::

        @hookimpl
        def get_adapter_config_for_subgraph(self, model):
            layers = [f"layers.{index}" for index in range(len(model.layers))]
            return Topology(
                tuple(Subgraph("norm-linear", f"{layer}.norm", (f"{layer}.gate", f"{layer}.up")) for layer in layers),
                {"layers.*.down": "the gate is applied to its input after a softmax over the channels"},
            )
    """


@hookspec(firstresult=True)
def get_kv_caches(model: nn.Module) -> Sequence[AttentionCache]:  # type: ignore[empty-body]
    """Name the attentions whose keys and values an engine keeps in a cache, head by head.

    Args:
        model: the model, possibly on meta.

    Returns:
        One entry per attention. When it is called with ``past_key_values``, each of them must show all its keys and
        values, in the form in which they are kept, by ``past_key_values.update``. Absent: algorithms that quantize
        caches are refused by the plan.

    Raises:
        CapabilityError: it cannot be told; says why.

    Example::

        @hookimpl
        def get_kv_caches(self, model):
            names = [f"layers.{index}.attention" for index in range(len(model.layers))]
            return [AttentionCache(name, f"{name}.k", f"{name}.v", heads=8, head_size=64) for name in names]
    """


@hookspec(firstresult=True)
def get_ln_fuse_map(model: nn.Module) -> Any:
    """Say which norms feed which linears, so that their gains can be folded before a rotation.

    Args:
        model: the model, possibly on meta.

    Returns:
        Norm name to linear names. Absent: rotations are refused by the plan.

    Example::

        @hookimpl
        def get_ln_fuse_map(self, model):
            return {"layers.0.norm": ["layers.0.q", "layers.0.k", "layers.0.v"]}
    """


@hookspec(firstresult=True)
def get_bake_names(model: nn.Module) -> Any:
    """Name the linears into which a LayerNorm's mean subtraction is folded before a rotation.

    Args:
        model: the model, possibly on meta.

    Returns:
        Linear names. Absent or None: the model has no LayerNorm whose mean must be folded.

    Example::

        @hookimpl
        def get_bake_names(self, model):
            return ["layers.0.out", "layers.0.down"]
    """


@hookspec(firstresult=True)
def get_rotate_map(model: nn.Module, block_size: int) -> Any:
    """Say which weights turn on which side when the residual stream is rotated.

    Args:
        model: the model, possibly on meta.
        block_size: size of the diagonal blocks of the rotation; -1 for one full rotation.

    Returns:
        Rotation pairs. Absent: rotations are refused by the plan.

    Example::

        @hookimpl
        def get_rotate_map(self, model, block_size):
            return [RotatePair(left=["embed", "layers.0.out"], right=["layers.0.q", "lm_head"])]
    """


@hookspec
def unit_started(name: str, index: int, total: int) -> None:
    """Observe that the engine begins with a unit.

    Args:
        name: the unit.
        index: its number, from 0.
        total: how many units there are.

    Returns:
        Nothing; all observers are called.

    Example::

        @hookimpl
        def unit_started(self, name): print(name)
    """


@hookspec
def unit_finished(name: str, index: int, total: int, record: Mapping[str, Any]) -> None:
    """Observe that a unit is calibrated, quantized and handed to the writer.

    Args:
        name: the unit.
        index: its number, from 0.
        total: how many units there are.
        record: the unit's entry of report.json: seconds by phase, linears, tokens.

    Returns:
        Nothing; all observers are called.

    Example::

        @hookimpl
        def unit_finished(self, name, record): log.info("%s %.1f s", name, record["seconds"])
    """


@hookspec
def tensor_written(name: str, nbytes: int) -> None:
    """Observe that a tensor lies in a weight file. Called from the writing thread.

    Args:
        name: the tensor's name in the result.
        nbytes: its size.

    Returns:
        Nothing; all observers are called.

    Example::

        @hookimpl
        def tensor_written(self, nbytes): self.total += nbytes
    """


@hookspec
def run_finished(report: Mapping[str, Any]) -> None:
    """Observe that the result lies under its final name.

    Args:
        report: the contents of report.json.

    Returns:
        Nothing; all observers are called.

    Example::

        @hookimpl
        def run_finished(self, report): notify(report["save_path"])
    """
