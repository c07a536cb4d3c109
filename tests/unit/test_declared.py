# SPDX-License-Identifier: Apache-2.0
"""What a plugin imports comes with what its pyproject.toml declares, also where others have installed it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(file.parent for file in ROOT.glob("plugins/*/*/pyproject.toml"))

# Engines that are asked where the user has them; the plugin itself says what is missing where one has not.
ENGINES: Mapping[str, set[str]] = {
    "ascendv1": {"vllm", "vllm_ascend"},
    "compressed-tensors": {"compressed_tensors", "loguru", "transformers"},
}


def project(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    return value


OURS = {project(folder)["project"]["name"]: project(folder)["project"] for folder in (ROOT, *PLUGINS)}
DISTRIBUTIONS = metadata.packages_distributions()


def installed_with(requirements: Iterable[str]) -> set[str]:
    """The distributions that pip installs for these: they and what they declare in turn, no extras."""
    found: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            more = OURS[name]["dependencies"] if name in OURS else metadata.requires(name) or ()
        except metadata.PackageNotFoundError:  # that of an extra, which the tests do without
            more = ()
        todo += map(Requirement, more)
    return found


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported package, and whether it is imported when a function is called, not before."""
    if isinstance(node, ast.Import):
        yield from ((alias.name.partition(".")[0], inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module.partition(".")[0], inside
    for child in ast.iter_child_nodes(node):
        yield from imports(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def missing(files: Iterable[Path], declared: Iterable[str]) -> dict[str, bool]:
    """Packages that nothing declared brings; whether they are only imported in functions."""
    present, found = installed_with(declared), dict[str, bool]()
    own = {name for folder in PLUGINS for name in packages(folder) if project(folder)["project"]["name"] in present}
    for file in files:
        for name, inside in imports(ast.parse(file.read_text(encoding="utf-8"))):
            known = name in sys.stdlib_module_names or name in own
            if not known and not present & set(map(canonicalize_name, DISTRIBUTIONS.get(name, ()))):
                found[name] = found.get(name, True) and inside
    return found


def packages(folder: Path) -> set[str]:
    return {file.parent.name for file in folder.glob("*/__init__.py")}


def test_every_plugin_is_looked_at() -> None:
    assert {"linear-quant", "transformers", "ascendv1"} <= {folder.name for folder in PLUGINS}


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_what_is_imported_is_declared(folder: Path) -> None:
    whole = project(folder)
    required = [*whole["project"]["dependencies"], whole["project"]["name"]]
    extras = [name for group in whole["project"].get("optional-dependencies", {}).values() for name in group]
    code = [file for name in packages(folder) for file in folder.glob(f"{name}/**/*.py")]
    assert code
    found = missing(code, [*required, *extras])
    assert found == dict.fromkeys(ENGINES.get(folder.name, ()), True)
    tests = folder.glob("tests/*.py")
    group = [*required, *extras, *whole.get("dependency-groups", {}).get("test", ()), "pytest"]
    assert missing(tests, group) == {}


def test_an_undeclared_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("import torch\n\ndef call():\n    import transformers.models, torch.nn\n")
    (tmp_path / "other.py").write_text("from modelslim_linear_quant import x\nfrom yaml import load\nimport json\n")
    files = sorted(tmp_path.iterdir())
    assert missing(files, ["modelslim"]) == {"transformers": True, "modelslim_linear_quant": False}
    assert missing(files, ["modelslim-algorithm-linear-quant", "transformers>=5"]) == {}
