# SPDX-License-Identifier: Apache-2.0
"""What the engine expects of every adapter.

Give the contract a tiny checkpoint of your family, with random weights, and your adapter::

    from modelslim.testing.adapter import AdapterContract

    class TestTinyAdapter(AdapterContract):
        @pytest.fixture
        def checkpoint(self, tmp_path):
            return write_tiny_checkpoint(tmp_path)  # config.json, safetensors files, tokenizer

        @pytest.fixture
        def adapter(self, checkpoint):
            return TinyAdapter("tiny", checkpoint)

Perturb norms and biases: ones and zeros hide mistakes. Two layers of each kind are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelslim.checkpoint import Checkpoint
from modelslim.guard import Guard
from modelslim.model_info import describe
from modelslim.open_model import OpenModel, call_model, tensors_in
from modelslim.session import Session
from modelslim.testing.topology import check_topology


class AdapterContract:
    """Subclass it, supply ``checkpoint`` and ``adapter``; override the rest where your family differs."""

    @pytest.fixture
    def checkpoint(self) -> Path:
        """Directory of a tiny checkpoint."""
        raise NotImplementedError("supply the fixture `checkpoint`: the directory of a tiny checkpoint")

    @pytest.fixture
    def adapter(self, checkpoint: Path) -> object:
        """An instance of the adapter for that checkpoint."""
        raise NotImplementedError("supply the fixture `adapter`: an instance of your adapter for `checkpoint`")

    @pytest.fixture
    def samples(self) -> Sequence[Any]:
        """Two or more calibration samples that differ in length."""
        return ("Calibration text.", "A second piece of calibration text, and somewhat longer than the first.")

    @pytest.fixture
    def opened(self, adapter: object, checkpoint: Path) -> Iterator[OpenModel]:
        """The model as the engine holds it before the first unit."""
        with Checkpoint(checkpoint) as source, torch.no_grad():
            yield OpenModel.of(adapter, source)

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        """What ``generate_model_forward`` must return for ``inputs``, computed without stopping at units.

        Args:
            model: the model with every parameter loaded. A library's own loader, applied to ``checkpoint``,
                is a stronger reference.
            inputs: one element of what ``handle_dataset`` gave.
            checkpoint: its directory.
        """
        return call_model(model, inputs)

    def test_hooks_obey_their_specifications(self, adapter: object) -> None:
        """The arguments are those of the hooks, nothing is misspelt, and the four that every run needs are there."""
        needed = {"init_model", "generate_model_visit", "generate_model_forward", "handle_dataset"}
        assert not Session(adapter).missing(needed)

    def test_model_for_planning_holds_no_memory(self, adapter: object, opened: OpenModel) -> None:
        """``init_model("meta")`` gives the same model with nothing in it: the plan only wants to know its shape."""
        model = Session(adapter).init_model("meta")
        state = model.state_dict()
        assert [name for name, tensor in state.items() if not tensor.is_meta] == []
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in opened.model.state_dict().items()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == expected

    def test_weight_sources_do_not_depend_on_the_device(self, adapter: object, opened: OpenModel) -> None:
        """The run uses the sources that the plan found with a model on meta."""
        session = Session(adapter)
        sources = session.get_weight_sources(session.init_model("meta"), opened.checkpoint.shapes)
        if sources is not None:
            assert {name: source.keys for name, source in sources.items()} == {
                name: source.keys for name, source in opened.loader.sources.items()
            }

    def test_model_is_in_eval_mode(self, opened: OpenModel) -> None:
        """Dropout would make calibration random."""
        assert [name for name, module in opened.model.named_modules() if module.training] == []

    def test_visit_names_modules_of_the_model(self, opened: OpenModel) -> None:
        """Units are found by their names, come once, and do not lie inside each other."""
        for request in opened.visit:
            assert opened.model.get_submodule(request.name) is request.module
            assert (request.args, request.kwargs) == ((), {})
        describe(opened.model, opened.visit, opened.loader)  # no unit twice, none inside another

    def test_parameters_of_units_wait_on_meta(self, opened: OpenModel) -> None:
        """A model larger than memory is only possible when the engine decides what is loaded."""
        for request in opened.visit:
            filled = [name for name, parameter in request.module.named_parameters() if not parameter.is_meta]
            assert (request.name, filled) == (request.name, [])

    def test_checkpoint_fills_every_parameter_and_buffer(self, opened: OpenModel) -> None:
        """Nothing is left on meta: every parameter has a source, and the adapter computes the other buffers."""
        assert opened.loader.check() == []
        opened.fill()
        tensors = [*opened.model.named_parameters(), *opened.model.named_buffers()]
        assert [name for name, tensor in tensors if tensor.is_meta] == []

    def test_every_sample_becomes_one_input(self, adapter: object, samples: Sequence[Any]) -> None:
        """``handle_dataset`` neither drops nor packs samples."""
        assert len(Session(adapter).handle_dataset(samples, "cpu")) == len(samples) > 1

    def test_unit_by_unit_gives_what_the_whole_forward_gives(
        self, adapter: object, opened: OpenModel, samples: Sequence[Any], checkpoint: Path
    ) -> None:
        """To the bit, with one unit resident at a time and the samples interleaved."""
        inputs = opened.session.handle_dataset(samples, "cpu")
        actual = opened.run_units(inputs)
        whole = OpenModel.of(adapter, opened.checkpoint)
        whole.fill()
        for index, sample in enumerate(inputs):
            expected = tensors_in(self.whole_forward(whole.model, sample, checkpoint))
            assert expected, "whole_forward returned no tensor"
            _assert_identical(tensors_in(actual[index]), expected, f"sample {index}")

    def test_plan_proves_the_forward_on_a_tiny_model_of_the_adapter(self, adapter: object, opened: OpenModel) -> None:
        """``make_tiny_checkpoint`` makes one, and on it every unit gives to the bit what it gives in a plain call."""
        if not opened.session.has("make_tiny_checkpoint"):
            pytest.skip("the adapter has no make_tiny_checkpoint; the plan asks the generic adapter")

        def reopen(model_type: str, path: Path) -> Session:
            kind: Any = type(adapter)
            return Session(kind(model_type, path, False))

        session = Session(adapter)
        assert Guard(type(adapter).__name__, reopen).check(session, session.init_model("meta")) == []

    def test_subgraphs_keep_the_function(self, opened: OpenModel, samples: Sequence[Any]) -> None:
        """Random scales in every subgraph change no output, in float64; each subgraph lies within one unit."""
        topology = opened.session.get_adapter_config_for_subgraph(opened.session.init_model("meta"))
        if topology is None:
            pytest.skip("the adapter says nothing of subgraphs")
        inputs = opened.session.handle_dataset(samples, "cpu")
        opened.fill()
        check_topology(opened.model, [request.name for request in opened.visit], topology, inputs)


def _assert_identical(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert [(one.shape, one.dtype) for one in actual] == [(one.shape, one.dtype) for one in expected], what
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other), f"{what}: differs by up to {(one - other).abs().max().item()}"
