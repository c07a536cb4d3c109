# SPDX-License-Identifier: Apache-2.0
"""What --device means; and that no other file of the product knows a kind of device."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modelslim import devices
from modelslim.devices import has_integer_matmul, resolve_device, resolve_devices, synchronize
from modelslim.errors import PluginError, UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine with so many devices of each kind, whatever this one has."""
    counts = {"cuda": 0, "npu": 0}
    monkeypatch.setattr(devices, "_count", lambda kind: counts[kind])
    return counts


@pytest.mark.parametrize(("cuda", "npu", "best"), [(0, 0, "cpu"), (2, 0, "cuda:0"), (0, 8, "npu:0"), (1, 1, "npu:0")])
def test_the_best_device_is_an_accelerator_where_there_is_one(
    machine: dict[str, int], cuda: int, npu: int, best: str
) -> None:
    machine.update(cuda=cuda, npu=npu)
    assert resolve_device(None) == best


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", "cpu"),
        ("CPU", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:0", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("Cuda:1", "cuda:1"),
        ("npu", "npu:0"),
        ("npu:7", "npu:7"),
    ],
)
def test_devices_that_are_there_are_accepted(machine: dict[str, int], text: str, device: str) -> None:
    machine.update(cuda=2, npu=8)
    assert resolve_device(text) == device


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "gpu",
        "cud",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda: 0",
        "cuda:0,",
        "0",
        ":0",
        "cuda0",
        "cpu cuda",
        "mps",
        "meta",
        "cuda:0\n",
    ],
)
def test_what_is_no_device_is_refused_with_the_grammar(machine: dict[str, int], text: str) -> None:
    machine.update(cuda=2)
    with pytest.raises(UsageError, match="is not a device") as caught:
        resolve_device(text)
    assert "write cpu, cuda, cuda:0, npu or npu:0,1" in caught.value.hint


def test_the_nearest_kind_is_offered(machine: dict[str, int]) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_device("cdua:0")
    assert caught.value.hint.startswith("did you mean 'cuda'?")


@pytest.mark.parametrize("text", ["cuda:2", "cuda:10", "npu", "npu:0", "cpu:1"])
def test_devices_that_are_not_there_are_refused(machine: dict[str, int], text: str) -> None:
    machine.update(cuda=2)
    with pytest.raises(UsageError, match="does not exist") as caught:
        resolve_device(text)
    assert "--device c" in caught.value.hint  # what would work


def test_the_message_says_what_this_machine_has(machine: dict[str, int]) -> None:
    machine.update(cuda=2)
    with pytest.raises(UsageError, match=r"this machine has 2 \(cuda:0 to cuda:1\)"):
        resolve_device("cuda:2")
    with pytest.raises(UsageError, match="this machine has none"):
        resolve_device("npu:0")


def test_a_list_of_devices_is_one_for_each_rank(machine: dict[str, int]) -> None:
    machine.update(npu=8)
    assert resolve_devices("npu:2,3") == ["npu:2", "npu:3"]
    assert resolve_devices("npu") == ["npu:0"]
    assert resolve_devices("cpu") == ["cpu"] and resolve_devices("cpu", 3) == ["cpu"] * 3
    assert resolve_devices("npu:4,5", 2) == ["npu:4", "npu:5"]
    with pytest.raises(UsageError, match="does not exist: this machine has 8"):
        resolve_devices("npu:7,8")


def test_workers_share_the_cpu_only(machine: dict[str, int]) -> None:
    machine.update(cuda=2)
    with pytest.raises(UsageError, match="--workers 2 does not go with --device cuda:0") as caught:
        resolve_devices("cuda:0", 2)
    assert "--device cuda:0,1" in caught.value.hint


def test_several_devices_are_refused_where_one_is_used(machine: dict[str, int]) -> None:
    machine.update(npu=8)
    with pytest.raises(UsageError, match="lists 2 devices, and one is used here") as caught:
        resolve_device("npu:2,3")
    assert caught.value.hint == "use --device npu:2"
    with pytest.raises(UsageError, match="lists an index twice"):
        resolve_device("npu:2,3,2")


def test_this_machine_answers_as_torch_does() -> None:
    assert devices._count("cuda") == torch.cuda.device_count()
    assert resolve_device("cpu") == "cpu"
    synchronize("cpu")


@pytest.fixture
def torch_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of an installed torch_npu."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "torch_npu.py"
    sys.modules.pop("torch_npu", None)


@pytest.mark.parametrize(
    "error", ["ImportError('libhccl.so: cannot open')", "RuntimeError('no CANN')", "OSError('no')"]
)
def test_an_npu_extension_that_cannot_be_loaded_is_an_error_with_the_way_out(torch_npu: Path, error: str) -> None:
    torch_npu.write_text(f"raise {error}\n")
    for device in (None, "npu"):
        with pytest.raises(PluginError, match="torch_npu is installed and cannot be loaded") as caught:
            resolve_device(device)
        assert "set_env.sh" in caught.value.hint
    assert resolve_device("cpu") == "cpu", "the CPU needs no extension"


def test_an_npu_extension_brings_its_devices(torch_npu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "npu", None, raising=False)  # taken away again behind the test
    torch_npu.write_text(
        "import torch\n"
        "class npu:\n"
        "    is_available = staticmethod(lambda: True)\n"
        "    device_count = staticmethod(lambda: 3)\n"
        "torch.npu = npu\n"
    )
    assert resolve_device("npu:2") == "npu:2"
    assert resolve_device(None) == "npu:0"


def test_the_cpu_multiplies_integers() -> None:
    assert has_integer_matmul(torch.ones(1, 3, dtype=torch.int8), torch.ones(5, 3, dtype=torch.int8))


def test_preparing_threads_leaves_a_choice_of_the_user_alone() -> None:
    script = "import os; from modelslim.devices import prepare_threads as p; p(); print(os.environ['OMP_WAIT_POLICY'])"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for chosen, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run([sys.executable, "-c", script], env=clean | chosen, capture_output=True, check=True)
        assert done.stdout.decode().strip() == expected


# No other file names a kind of device

SOURCES = sorted(
    file
    for pattern in ("core/modelslim/**/*.py", "plugins/*/*/modelslim_*/**/*.py")
    for file in ROOT.glob(pattern)
    if file != ROOT / "core/modelslim/devices.py"
)
KIND = re.compile(r"(?<![a-z])(cuda|npu)(?![a-z])", re.IGNORECASE)


def kinds_named(source: str) -> list[str]:
    """Where code speaks of a kind of device; docstrings and help texts may."""
    tree = ast.parse(source)
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a docstring, or one behind an attribute
            allowed |= {part.value for part in body if isinstance(part, ast.Expr)}
        if isinstance(node, ast.keyword) and node.arg == "help":
            allowed.add(node.value)
    found = []
    for node in ast.walk(tree):
        words = [
            value
            for field in ("id", "attr", "arg", "name", "module")
            if isinstance(value := getattr(node, field, None), str)
        ]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in allowed:
            words.append(node.value)
        found += [f"line {getattr(node, 'lineno', '?')}: {word}" for word in words if KIND.search(word)]
    return found


def test_the_search_for_kinds_finds_them() -> None:
    for source in ("x.cuda()", "device = 'npu:0'", "import torch_npu", "f(cuda=1)", "f'{x} cuda'", "torch.cuda.sync()"):
        assert kinds_named(source), source
    for source in (
        '"""On cuda."""',
        "def f():\n    '''npu'''",
        "o(help='cuda')",
        "x = 'inputs'",
        "# cuda",
        "barracuda",
    ):
        assert not kinds_named(source), source
    assert kinds_named(Path(devices.__file__).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_names_a_kind_of_device(file: Path) -> None:
    assert kinds_named(file.read_text(encoding="utf-8")) == []
