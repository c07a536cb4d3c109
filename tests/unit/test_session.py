# SPDX-License-Identifier: Apache-2.0
"""A session calls what the participants implement, and refuses what pluggy would silently ignore."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from modelslim import hookspecs
from modelslim.errors import CapabilityError, PluginError
from modelslim.hookspecs import hookimpl
from modelslim.session import Session
from modelslim.types import ProcessRequest, WeightSource

HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "modelslim_spec")]
REQUIRED = ["init_model", "handle_dataset", "generate_model_visit", "generate_model_forward"]


class Nothing:
    """An adapter that can do nothing."""


class Doubling:
    """An adapter of a model of one layer."""

    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2, device=device))

    @hookimpl
    def handle_dataset(self, dataset: list[int]) -> tuple[int, ...]:  # takes fewer arguments than the hook has
        return tuple(2 * sample for sample in dataset)

    @hookimpl
    def generate_model_visit(self, model: nn.Sequential) -> Iterator[ProcessRequest]:
        yield ProcessRequest("0", model[0])

    @hookimpl
    def generate_model_forward(self, model: nn.Sequential, inputs: int) -> Any:
        answer = yield ProcessRequest("0", model[0], (inputs,))
        return answer + 1

    @hookimpl
    def get_weight_sources(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, WeightSource]:
        return {key.upper(): WeightSource((key,)) for key in shapes}

    @hookimpl
    def get_rotate_map(self, model: nn.Module, block_size: int) -> list[int]:
        return [block_size]


class Loading(Doubling):
    @hookimpl
    def init_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2))


class ForgetsABuffer(Doubling):
    @hookimpl
    def init_model(self, device: str) -> nn.Module:
        model = super().init_model(device)
        model[0].register_buffer("table", torch.empty(2, device="meta"), persistent=False)
        return model


def test_model_for_the_plan_must_hold_nothing() -> None:
    message = r"init_model\(\"meta\"\) of adapter Loading gives a model that holds 0\.weight"
    with pytest.raises(PluginError, match=message) as caught:
        Session(Loading()).init_model("meta")
    assert "torch.device" in caught.value.hint
    assert Session(Loading()).init_model("cpu")[0].out_features == 2  # type: ignore[index]


def test_buffer_that_no_checkpoint_holds_must_be_computed() -> None:
    session = Session(ForgetsABuffer())
    assert session.init_model("meta")[0].table.is_meta  # type: ignore[index]
    with pytest.raises(PluginError, match=r"init_model of adapter ForgetsABuffer leaves the buffer 0\.table on meta"):
        session.init_model("cpu")


def test_the_adapter_answers_through_typed_methods() -> None:
    session = Session(Doubling())
    model = session.init_model("cpu")
    assert session.handle_dataset([1, 2], device="cpu") == [2, 4]
    assert [request.name for request in session.generate_model_visit(model)] == ["0"]
    forward = session.generate_model_forward(model, 5)
    assert next(forward).args == (5,)
    with pytest.raises(StopIteration) as stop:
        forward.send(41)
    assert stop.value.value == 42
    assert session.get_weight_sources(model, {"a": (1,)}) == {"A": WeightSource(("a",))}
    assert session.get_rotate_map(model, block_size=-1) == [-1]


class Bridged:
    """Keeps a hook's name for a method that another one calls in its place."""

    def init_model(self, device: str = "npu", layers: int = 1) -> nn.Module:
        return nn.Sequential(*(nn.Linear(2, 2, device=device) for _ in range(layers)))

    @hookimpl(specname="init_model")
    def answer(self, device: str) -> nn.Module:
        return self.init_model(device, layers=2)


def test_a_hook_may_be_answered_by_a_function_of_another_name() -> None:
    model = Session(Bridged()).init_model("meta")
    assert len(list(model.children())) == 2


def test_hooks_that_nobody_answers_are_missing_capabilities() -> None:
    session = Session(Doubling())
    assert session.has("get_rotate_map")
    assert not session.has("get_ln_fuse_map")
    assert session.missing(["get_bake_names", "init_model", "get_ln_fuse_map"]) == ["get_bake_names", "get_ln_fuse_map"]
    model = nn.Module()
    assert session.get_ln_fuse_map(model) is None
    assert session.get_bake_names(model) is None
    assert session.get_adapter_config_for_subgraph(model) is None
    session.enable_kv_cache(model, need_kv_cache=False)
    assert Session(Nothing()).get_weight_sources(model, {}) is None


@pytest.mark.parametrize("hook", REQUIRED)
def test_a_required_hook_that_is_absent_names_the_adapter_and_the_signature(hook: str) -> None:
    method = getattr(Session(Nothing()), hook)
    arguments = list(inspect.signature(method).parameters)
    with pytest.raises(CapabilityError, match=f"adapter Nothing does not implement {hook}") as caught:
        method(*arguments)
    assert f"def {hook}(self, {', '.join(arguments)})" in caught.value.hint


def test_a_hook_of_the_model_that_returns_nothing_is_an_error() -> None:
    class Forgetful:
        @hookimpl
        def init_model(self, device: str) -> None: ...

    with pytest.raises(PluginError, match="init_model of adapter Forgetful returned None"):
        Session(Forgetful()).init_model("cpu")


def test_a_forward_without_a_yield_is_an_error() -> None:
    class Eager:
        @hookimpl
        def generate_model_forward(self, model: nn.Module, inputs: int) -> int:
            return inputs

    with pytest.raises(PluginError, match="generate_model_forward of adapter Eager returned int, not a generator"):
        Session(Eager()).generate_model_forward(nn.Module(), 1)


def test_asking_for_a_hook_that_does_not_exist_offers_the_nearest() -> None:
    with pytest.raises(PluginError, match="no hook 'get_rotation_map'") as caught:
        Session(Nothing()).has("get_rotation_map")
    assert "get_rotate_map" in caught.value.hint


class MisspeltHook:
    @hookimpl
    def init_modle(self, device: str) -> None: ...


class MisspeltSpecname:
    @hookimpl(specname="init_modle")
    def anything(self, device: str) -> None: ...


class MisspeltArgument:
    @hookimpl
    def init_model(self, devise: str) -> None: ...


class Default:
    @hookimpl
    def init_model(self, device: str = "npu") -> None: ...


class Keywords:
    @hookimpl
    def init_model(self, **arguments: str) -> None: ...


class KeywordOnly:
    @hookimpl
    def init_model(self, *, device: str) -> None: ...


class Unmarked:
    def init_model(self, device: str) -> None: ...


class UnmarkedOverride(Doubling):
    def init_model(self, device: str) -> nn.Module:
        return nn.Identity()


class WrapperWithoutYield:
    @hookimpl(wrapper=True)
    def init_model(self, device: str) -> None: ...


@pytest.mark.parametrize(
    ("adapter", "message", "hint"),
    [
        (MisspeltHook(), "adapter MisspeltHook implements the unknown hook 'init_modle'", "did you mean 'init_model'?"),
        (MisspeltSpecname(), "implements the unknown hook 'init_modle'", "did you mean 'init_model'?"),
        (MisspeltArgument(), "argument 'devise' of init_model is unknown", "did you mean 'device'?"),
        (Default(), "argument 'device' of init_model has a default, and pluggy never fills", "without a default"),
        (Keywords(), "argument 'arguments' of init_model is never filled", "plain arguments"),
        (KeywordOnly(), "argument 'device' of init_model is never filled", "plain arguments"),
        (Unmarked(), "init_model is not marked as a hook", "@hookimpl"),
        (UnmarkedOverride(), "init_model is not marked as a hook", "an override needs it again"),
        (WrapperWithoutYield(), "implements a hook wrongly", "modelslim.hookspecs"),
        (Doubling, "adapter type is the class Doubling", "instance"),
    ],
)
def test_a_hook_that_pluggy_would_ignore_is_refused(adapter: object, message: str, hint: str) -> None:
    with pytest.raises(PluginError, match=message) as caught:
        Session(adapter)
    assert hint in caught.value.hint


def test_the_same_slips_of_a_vendor_name_the_vendor() -> None:
    with pytest.raises(PluginError, match="plugin 'acme' implements the unknown hook 'init_modle'"):
        Session(Doubling(), [("acme", MisspeltHook())])

    class Observer:
        @hookimpl
        def unit_started(self, name: str, index: int = 0) -> None: ...

    with pytest.raises(PluginError, match="plugin 'acme': argument 'index' of unit_started has a default"):
        Session(Doubling(), [("acme", Observer())])


def test_a_hook_of_a_newer_core_may_be_marked_optional() -> None:
    class Early:
        @hookimpl(optionalhook=True)
        def hook_of_the_future(self, anything: int = 3) -> None: ...

    assert Session(Early()).missing(["init_model"]) == ["init_model"]


def test_a_vendor_wraps_the_adapter_and_does_not_replace_it() -> None:
    class Logging:
        def __init__(self) -> None:
            self.seen: list[object] = []

        @hookimpl(wrapper=True)
        def handle_dataset(self, dataset: list[int]) -> Any:
            answer = yield
            self.seen.append(answer)
            return [*answer, 99]

        @hookimpl(wrapper=True)
        def get_ln_fuse_map(self) -> Any:
            return (yield)

    vendor = Logging()
    session = Session(Doubling(), [("acme", vendor)])
    assert session.handle_dataset([1], "cpu") == [2, 99]
    assert vendor.seen == [(2,)]
    assert not session.has("get_ln_fuse_map")
    with pytest.raises(PluginError, match="plugin 'usurper' answers generate_model_forward, which only"):
        Session(Doubling(), [("usurper", Doubling())])


def test_all_observers_hear_of_the_run_modules_and_later_ones_too() -> None:
    heard: list[tuple[object, ...]] = []
    module = ModuleType("acme_observer")

    @hookimpl
    def unit_started(name: str, index: int, total: int) -> None:
        heard.append(("module", name, index, total))

    module.unit_started = unit_started  # type: ignore[attr-defined]

    class Bar:
        @hookimpl
        def unit_started(self, index: int) -> None:
            heard.append(("bar", index))

        @hookimpl
        def unit_finished(self, name: str, index: int, total: int, record: dict[str, int]) -> None:
            heard.append((name, index, total, record))

        @hookimpl
        def tensor_written(self, nbytes: int, name: str) -> None:
            heard.append((name, nbytes))

        @hookimpl
        def run_finished(self, report: dict[str, int]) -> None:
            heard.append((report,))

    session = Session(Nothing(), [("acme", module)])
    assert not session.has("run_finished")
    session.observe("progress", Bar())
    session.unit_started("layers.0", 0, 2)
    session.unit_finished("layers.0", 0, 2, {"tokens": 7})
    session.tensor_written("a.weight", 16)
    session.run_finished({"ok": 1})
    assert sorted(heard[:2]) == [("bar", 0), ("module", "layers.0", 0, 2)]
    assert heard[2:] == [("layers.0", 0, 2, {"tokens": 7}), ("a.weight", 16), ({"ok": 1},)]


def test_a_participant_joins_once_and_under_a_name_of_its_own() -> None:
    class Silent: ...

    silent = Silent()
    with pytest.raises(PluginError, match="two participants of the run are called 'acme'"):
        Session(Nothing(), [("acme", Silent()), ("acme", Silent())])
    with pytest.raises(PluginError, match="two participants of the run are called 'adapter'"):
        Session(Nothing(), [("adapter", Silent())])
    with pytest.raises(PluginError, match="plugin 'b' takes part already, as 'a'"):
        Session(Nothing(), [("a", silent), ("b", silent)])


def test_sessions_share_nothing() -> None:
    first, second = Session(Doubling()), Session(Nothing())
    assert first.has("init_model")
    assert not second.has("init_model")


def test_no_property_of_an_adapter_runs_when_it_joins() -> None:
    class Expensive(Doubling):
        @property
        def tokenizer(self) -> object:
            raise AssertionError("the tokenizer was loaded")

    assert Session(Expensive()).has("init_model")


def test_importing_the_session_imports_no_torch() -> None:
    script = "import sys, modelslim.session; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_method_with_its_arguments(hook: str) -> None:
    spec = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert list(inspect.signature(getattr(Session, hook)).parameters) == ["self", *spec]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_documents_each_argument_its_return_and_an_example(hook: str) -> None:
    spec = getattr(hookspecs, hook)
    text = inspect.getdoc(spec) or ""
    sections = dict(re.findall(r"^(Args|Returns|Example):{1,2}\n((?:\n|    .*\n?)+)", text, re.MULTILINE))
    assert set(sections) == {"Args", "Returns", "Example"}
    assert re.findall(r"^    (\w+): ", sections["Args"], re.MULTILINE) == list(inspect.signature(spec).parameters)
    assert f"def {hook}(self" in sections["Example"]


def test_the_required_hooks_are_among_those_that_were_checked() -> None:
    assert set(REQUIRED) < set(HOOKS)
