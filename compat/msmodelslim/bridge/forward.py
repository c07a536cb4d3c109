# SPDX-License-Identifier: Apache-2.0
"""Runs an adapter's forward under transformers 5 as if transformers 4 answered it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from modelslim.api import PluginError, ProcessRequest
from msmodelslim.bridge.loading import own_modules

_MERGED = (
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen2_5OmniVisionEncoder",
    "Glm4vVisionModel",
    "Glm4vMoeVisionModel",
)
"""Vision towers that returned the merged features alone."""


def run_forward(adapter: Any, model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
    """The adapter's own forward, with answers in the form of transformers 4.

    Raises:
        PluginError: the forward yields a module that the model does not have, or takes a layer's answer for a
            tuple.
    """
    forward = adapter.generate_model_forward(model, inputs)
    answer: Any = None
    try:
        while True:
            with _masks_as_before(adapter):
                try:
                    request = forward.send(answer)
                except StopIteration as end:
                    return end.value
            _check(type(adapter).__name__, model, request, answer)
            answer = None  # not held while the unit is computed
            answer = as_before(request.module, (yield request))
    finally:
        forward.close()


def as_before(module: nn.Module, output: Any) -> Any:
    """A unit's output in the form that transformers 4 gave it.

    Vision towers returned a tuple or a tensor where they return a ``ModelOutput`` now. A decoder layer returns
    a tensor, as it did since 4.54.
    """
    kinds = {kind.__name__ for kind in type(output).__mro__}
    if "BaseModelOutputWithDeepstackFeatures" in kinds:
        return output.pooler_output, output.deepstack_features
    if "ModelOutput" in kinds and type(module).__name__ in _MERGED:
        return output.pooler_output
    return output


def mend_rope_index(model: nn.Module) -> None:
    """Let ``get_rope_index`` be called without the token types, which are what the processor derives from the ids."""
    for module in model.modules():
        method = getattr(module, "get_rope_index", None)
        if method is not None and "mm_token_type_ids" in inspect.signature(method).parameters:
            module.get_rope_index = _with_token_types(module, method)  # type: ignore[assignment]


def token_types(config: Any, input_ids: Tensor) -> Tensor:
    """1 for tokens of images, 2 for those of videos, 0 for others: what a processor of transformers 5 gives along."""
    types = torch.zeros_like(input_ids)
    for number, name in ((1, "image_token_id"), (2, "video_token_id")):
        token = getattr(config, name, None)
        if token is not None:
            types[input_ids == token] = number
    return types


def _with_token_types(module: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def get_rope_index(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else None
        if "mm_token_type_ids" in kwargs or (isinstance(given, Tensor) and given.shape == input_ids.shape):
            return method(input_ids, *args, **kwargs)
        return method(input_ids, token_types(module.config, input_ids), *args, **kwargs)

    return get_rope_index


@contextmanager
def _masks_as_before(adapter: Any) -> Iterator[None]:
    """Let the adapter's code call the mask functions with the arguments of transformers 4."""
    from transformers import masking_utils

    with ExitStack() as stack:
        for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
            real = getattr(masking_utils, name)
            for module in [masking_utils, *own_modules(adapter)]:
                if vars(module).get(name) is real:
                    stack.enter_context(patch.object(module, name, _with_old_arguments(real)))
        yield


def _with_old_arguments(real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def create(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("cache_position", None)  # positions begin at 0, since nothing is cached
        if "input_embeds" in kwargs:
            kwargs["inputs_embeds"] = kwargs.pop("input_embeds")
        return real(*args, **kwargs)

    return create


def _check(who: str, model: nn.Module, request: ProcessRequest, answer: Any) -> None:
    try:
        found = model.get_submodule(request.name)
    except AttributeError:
        found = None
    if found is not request.module:
        raise PluginError(
            f"the forward of {who} yields {request.name}, which is not that module of its model",
            hint="a layer that the model has is not built again: the engine fills it and releases it",
        )
    hidden = next((value for value in request.args if isinstance(value, Tensor)), None)
    if not isinstance(answer, Tensor) or hidden is None or hidden.dim() != answer.dim() - 1:
        return
    if hidden.data_ptr() == answer.data_ptr():
        raise PluginError(
            f"{who} takes the first element of a layer's answer, which is a tensor and no tuple in transformers 5",
            hint="write `hidden_states = yield ProcessRequest(...)`",
        )
