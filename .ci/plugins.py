# SPDX-License-Identifier: Apache-2.0
"""Run each plugin's tests where of ModelSlim only that plugin, what it declares and its group `test` are installed.

The libraries that several of them need are installed once, beside the Python that runs this, and seen from every such
place. Names of folders choose some of the plugins: `tox -e plugins -- linear-quant group`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[1]
PLUGINS = {file.parent.name: file.parent for file in sorted(ROOT.glob("plugins/*/*/pyproject.toml"))}
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
CONSTRAINTS = ("--constraint", ROOT / "constraints.txt")


def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command; what it says is kept, and shown if it had to succeed and did not."""
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}")
    return done


def declared(folder: Path) -> dict[str, Any]:
    """The pyproject.toml of a distribution."""
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def install_libraries() -> None:
    """What the core and the plugins declare that is not of ModelSlim."""
    names = {name for folder in (ROOT, *PLUGINS.values()) for name in declared(folder)["project"]["dependencies"]}
    run(*PIP, "install", *CONSTRAINTS, *sorted(name for name in names if not name.startswith("modelslim")))


def build_wheels(place: Path) -> Path:
    """Build all of ModelSlim; return a file of constraints by which pip takes these wheels and no index's."""
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, ROOT, *PLUGINS.values())
    names = {wheel: wheel.name.partition("-")[0].replace("_", "-") for wheel in sorted(place.glob("*.whl"))}
    file = place / "wheels.txt"
    file.write_text("".join(f"{name} @ {wheel.as_uri()}\n" for wheel, name in names.items()), encoding="utf-8")
    return file


def test(name: str, place: Path, wheels: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests of one plugin in an environment of its own."""
    folder, python = PLUGINS[name], place / name / "bin" / "python"
    venv.create(place / name, symlinks=True)
    inner = Path(sysconfig.get_path("purelib", vars={"base": str(place / name)}))
    (inner / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    group = ["--group", f"{folder / 'pyproject.toml'}:test"] if "dependency-groups" in declared(folder) else []
    wanted = [declared(folder)["project"]["name"], *group]
    run(*PIP, "--python", python, "install", *CONSTRAINTS, "--constraint", wheels, *wanted)
    return run(python, "-m", "pytest", folder, check=False)


def main() -> None:
    """Print what each plugin's tests say, and at the end which failed."""
    names = sys.argv[1:] or list(PLUGINS)
    if unknown := sorted(set(names) - set(PLUGINS)):
        sys.exit(f"no plugin is called {', '.join(unknown)}; there are {', '.join(PLUGINS)}")
    if ours := [item.name for item in distributions() if item.name.startswith("modelslim")]:
        sys.exit(f"{', '.join(ours)} would be seen by every plugin; uninstall it")
    install_libraries()
    failed = []
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        wheels = build_wheels(Path(place))
        for name, done in zip(names, pool.map(lambda name: test(name, Path(place), wheels), names), strict=True):
            print(f"\n{name}\n{done.stdout}", flush=True)
            if done.returncode:
                failed.append(name)
    print(f"{len(names) - len(failed)} of {len(names)} plugins passed")
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
