# SPDX-License-Identifier: Apache-2.0
"""Which adapter serves a model, and what is said when none does."""

from __future__ import annotations

import pytest

from modelslim.adapters import choose_adapter
from modelslim.errors import ModelError, PluginError
from modelslim.registry import Entry, Registry, Status

CONFIG = {"model_type": "acme_gpt", "architectures": ["AcmeGPT"]}


def entry(kind: str, name: str, status: Status = "ok") -> Entry:
    return Entry(kind, name, "x:Y", f"modelslim-adapter-{name}", "1", status, "" if status == "ok" else "of old age")


GENERIC = entry("adapters", "transformers")
FAMILY = entry("adapters", "acme_gpt")
PUBLISHED = entry("models", "Acme-GPT-Nano")


@pytest.mark.parametrize(
    ("entries", "model_type", "chosen"),
    [
        ([GENERIC], None, ("adapters", "transformers")),
        ([GENERIC, FAMILY], None, ("adapters", "acme_gpt")),
        ([GENERIC, FAMILY], "acme_gpt", ("adapters", "acme_gpt")),
        ([FAMILY, PUBLISHED], "Acme-GPT-Nano", ("models", "Acme-GPT-Nano")),
        ([GENERIC, FAMILY], "transformers", ("adapters", "transformers")),
    ],
)
def test_the_most_particular_adapter_serves(entries: list[Entry], model_type: str | None, chosen: object) -> None:
    assert choose_adapter(CONFIG, model_type, Registry(tuple(entries))) == (*chosen, "")  # type: ignore[misc]


def test_published_name_that_nobody_offers_is_remarked_and_config_json_decides() -> None:
    registry = Registry((GENERIC, FAMILY, PUBLISHED))
    *chosen, remark = choose_adapter(CONFIG, "Acme-GPT-Nana", registry)
    assert chosen == ["adapters", "acme_gpt"]
    assert "--model_type Acme-GPT-Nana" in remark
    assert "did you mean 'Acme-GPT-Nano'?" in remark


@pytest.mark.parametrize(
    ("entries", "model_type"),
    [
        ([GENERIC, entry("adapters", "acme_gpt", "incompatible")], None),
        ([GENERIC, FAMILY, entry("models", "Acme-GPT-Nano", "broken")], "Acme-GPT-Nano"),
    ],
)
def test_adapter_that_cannot_be_used_is_not_replaced_by_the_generic_one(
    entries: list[Entry], model_type: str | None
) -> None:
    registry = Registry(tuple(entries))
    kind, name, _ = choose_adapter(CONFIG, model_type, registry)
    with pytest.raises(PluginError, match="of old age"):
        registry.load(kind, name)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (None, "no installed adapter serves the model_type 'acme_gpt' of config.json"),
        ("acme_gpt", "no installed adapter serves the model_type 'acme_gpt' of config.json"),
        ("Nano", "no installed adapter serves --model_type Nano or the model_type 'acme_gpt' of config.json"),
    ],
)
def test_no_adapter_at_all_says_what_to_install(model_type: str | None, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        choose_adapter(CONFIG, model_type, Registry(()))
    assert caught.value.message == message
    assert "pip install modelslim-adapter-<family>" in caught.value.hint
    assert "pip install modelslim-adapter-transformers" in caught.value.hint


@pytest.mark.parametrize("hidden", [FAMILY, GENERIC, PUBLISHED])
def test_adapter_that_the_variable_leaves_out_is_named(hidden: Entry) -> None:
    with pytest.raises(PluginError) as caught:
        choose_adapter(CONFIG, PUBLISHED.name, Registry((), (hidden,)))
    assert hidden.distribution in caught.value.hint
    assert "MODELSLIM_PLUGINS leaves it out" in caught.value.hint


@pytest.mark.parametrize("lacking", ["model_type", "architectures"])
def test_config_that_does_not_say_what_the_model_is_is_refused(lacking: str) -> None:
    with pytest.raises(ModelError, match=f"has no {lacking}"):
        choose_adapter({key: value for key, value in CONFIG.items() if key != lacking}, None, Registry((GENERIC,)))
