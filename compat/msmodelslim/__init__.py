# SPDX-License-Identifier: Apache-2.0
"""Import paths of the existing tool msmodelslim, so that adapters written for it run on ModelSlim."""

from importlib import metadata


def _refuse_beside_the_existing_tool() -> None:
    try:
        version = metadata.version("msmodelslim")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"modelslim-compat cannot be used beside msmodelslim {version}, since both bring the import package "
        "'msmodelslim' and its files would mix: uninstall both, then install modelslim-compat alone"
    )


_refuse_beside_the_existing_tool()
