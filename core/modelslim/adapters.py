# SPDX-License-Identifier: Apache-2.0
"""Chooses the adapter of a model and opens the run's session with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelslim.errors import ModelError, PluginError, nearest
from modelslim.registry import RESTRICT, Registry
from modelslim.session import Session

GENERIC = "transformers"
"""Name of the adapter that serves what no other adapter claims."""


def choose_adapter(config: Mapping[str, Any], model_type: str | None, registry: Registry) -> tuple[str, str, str]:
    """Which adapter serves a model.

    Args:
        config: config.json of the model.
        model_type: what the user says: a published model name or a ``model_type``; None to go by
            config.json.
        registry: the installed plugins.

    Returns:
        The registry's kind and name of the adapter, and a remark for the user, mostly empty.

    Raises:
        ModelError: config.json does not say what the model is.
        PluginError: no adapter is installed that could serve the model.
    """
    stated = config.get("model_type")
    if not isinstance(stated, str) or not config.get("architectures"):
        lacking = "architectures" if isinstance(stated, str) else "model_type"
        raise ModelError(
            f"config.json has no {lacking}, so it does not say what the model is",
            hint="take config.json from the model's publisher",
        )
    # A claim that cannot be used counts: loading it says why, and the generic adapter is no replacement.
    for kind in ("models", "adapters"):
        if model_type is not None and registry.claims(kind, model_type):
            return kind, model_type, ""
    name = stated if registry.claims("adapters", stated) else GENERIC
    if not registry.claims("adapters", name):
        asked = f"--model_type {model_type} or " if model_type not in (None, stated) else ""
        raise PluginError(
            f"no installed adapter serves {asked}the model_type {stated!r} of config.json",
            hint=_remedy(model_type, stated, registry),
        )
    remark = ""
    if model_type is not None and model_type != stated:
        known = nearest(model_type, [*registry.names("models"), *registry.names("adapters")])
        remark = (
            f"no adapter is registered for --model_type {model_type}; config.json says {stated}, "
            f"which the adapter {name!r} serves" + (f" ({known})" if known.startswith("did") else "")
        )
    return "adapters", name, remark


def _remedy(model_type: str | None, stated: str, registry: Registry) -> str:
    for entry in registry.hidden:
        if entry.kind in ("adapters", "models") and entry.name in (model_type, stated, GENERIC):
            return f"{entry.distribution} offers {entry.name!r} and {RESTRICT} leaves it out: add it there"
    return (
        "install the adapter of the model's family, `pip install modelslim-adapter-<family>`; of a model that "
        "transformers knows, `pip install modelslim-adapter-transformers`"
    )


def open_session(
    kind: str,
    name: str,
    model_type: str,
    model_path: Path,
    trust_remote_code: bool,
    registry: Registry,
    observers: Sequence[tuple[str, object]] = (),
) -> Session:
    """A session of one adapter, the installed vendor plugins and the given observers.

    Raises:
        PluginError: a plugin cannot be loaded or does not keep to the hook specifications.
    """
    adapter = registry.load(kind, name)(model_type, model_path, trust_remote_code)
    vendors = [(vendor, load_vendor(vendor, registry)) for vendor in registry.names("plugins")]
    return Session(adapter, [*vendors, *observers])


def load_vendor(name: str, registry: Registry) -> object:
    """A vendor's plugin; of a class, an instance of its own for this run."""
    plugin = registry.load("plugins", name)
    return plugin() if isinstance(plugin, type) else plugin
