# SPDX-License-Identifier: Apache-2.0
"""Errors by the names that adapters raise; the command line shows them as ModelSlim's own."""

from __future__ import annotations

from modelslim.api import (
    CapabilityError,
    DatasetError,
    ModelError,
    ModelSlimError,
    PluginError,
    UsageError,
)


class ActionError(ModelSlimError):
    """Takes the remedy as ``action``."""

    def __init__(self, *args: object, action: str = "") -> None:
        super().__init__(" ".join(map(str, args)) or type(self).__name__, hint=action)


class ModelslimError(ActionError):
    """Base of the errors below."""


class InvalidModelError(ModelslimError, ModelError):
    """The checkpoint cannot be used."""


class InvalidDatasetError(ModelslimError, DatasetError):
    """The calibration data cannot be used."""


class SchemaValidateError(ModelslimError, UsageError):
    """A value is not allowed."""


class SecurityError(ModelslimError, UsageError):
    """A path or a file must not be used."""


class UnsupportedError(ModelslimError, CapabilityError):
    """The adapter does not offer what was asked for."""


class VersionError(ModelslimError, PluginError):
    """A package has the wrong version."""


class ToDoError(ModelslimError, CapabilityError):
    """The adapter does not implement it yet."""


class UnexpectedError(ModelslimError):
    """Something else went wrong."""
