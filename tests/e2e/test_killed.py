# SPDX-License-Identifier: Apache-2.0
"""A run that is killed or interrupted, at any moment: nothing looks finished, the same command continues it.

The moments are the points at which a run changes files: an audit hook counts them and sends the
process a signal before the change is made. Random delays add what lies between them.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import SafetensorError, safe_open

Snapshot = Callable[[Path], dict[str, str]]
Program = Callable[..., subprocess.CompletedProcess[str]]

# Plans and compiles the page of reports once, which imports what every run imports and would be half of its time; then
# forks a run per line of its stdin and answers with a line.
FORKS = """
import json, os, sys, time
from contextlib import redirect_stdout
from transformers import AutoTokenizer
from modelslim.cli.main import main
from modelslim.report_page import template
import modelslim.run

template()
with redirect_stdout(sys.stderr):
    assert main(["plan", "--device", "cpu", *sys.argv[1:]]) == 0

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def run(arguments, folder, words, moment, number):
    changes = []
    def watch(event, values):
        paths = [os.fsdecode(value) for value in values if isinstance(value, (str, bytes, os.PathLike))]
        inside = event in ("os.remove", "os.rmdir") and values[-1] != -1  # relative to a directory: shutil.rmtree
        if event in CHANGES and (inside or any(path.startswith(folder) for path in paths)):
            changes.append(" ".join([event, *(path.removeprefix(folder) for path in paths)]))
            if len(changes) == moment:
                os.kill(os.getpid(), number)
    descriptor = os.open(words, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.addaudithook(watch)
    code = main(arguments)
    if moment == 0:
        os.write(report, json.dumps(changes).encode())
    os._exit(code)

for line in sys.stdin:
    order = json.loads(line)
    answer, report = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        run(order["arguments"], order["folder"], order["words"], order["moment"], order["signal"])
    os.close(report)
    if order["delay"] is not None:
        time.sleep(order["delay"])
        os.kill(child, order["signal"])
    with os.fdopen(answer) as stream:
        changes = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reply = {"code": code, "changes": json.loads(changes or "[]"), "seconds": time.monotonic() - start}
    print(json.dumps(reply), flush=True)
"""


class Run(NamedTuple):
    """How a forked run ended.

    Attributes:
        code: its exit code, negative for the signal that killed it.
        changes: the changes of files that it made, in order; of runs without a moment only.
        seconds: how long it took.
        words: what it wrote.
    """

    code: int
    changes: list[str]
    seconds: float
    words: str


Fork = Callable[..., Run]


@pytest.fixture(scope="module")
def fork(tiny_llama: Path, w8a8_static: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    """``fork(protocol, folder, "--restart", moment=3, signal=SIGKILL)``: quantize ``tiny_llama`` into ``folder/out``.

    The run gets the signal before its moment-th change of files in the folder, or after ``delay`` seconds.
    """
    words = tmp_path_factory.mktemp("fork") / "words"
    config = words.with_name("protocol.yaml")
    config.write_text(w8a8_static)
    command = [sys.executable, "-c", FORKS, "--model_path", str(tiny_llama), "--config_path", str(config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(protocol: Path, folder: Path, *more: str, **order: Any) -> Run:
            assert server.stdin is not None and server.stdout is not None
            folder.mkdir(exist_ok=True)
            arguments = ["quant", "--quiet", "--device", "cpu", "--model_path", str(tiny_llama)]
            arguments += ["--save_path", str(folder / "out"), "--config_path", str(protocol), *more]
            fixed = {"arguments": arguments, "folder": f"{folder}/", "words": str(words)}
            words.write_text("")
            server.stdin.write(json.dumps({"moment": 0, "signal": 0, "delay": None, **order, **fixed}) + "\n")
            server.stdin.flush()
            return Run(**json.loads(server.stdout.readline()), words=words.read_text())

        yield run
        server.stdin.close()


@pytest.fixture
def config(protocol: Callable[[str], Path], w8a8_dynamic: str) -> Path:
    """W8A8_DYNAMIC in several weight files."""
    return protocol(w8a8_dynamic.replace("part_file_size: 4", "part_file_size: 0.00003"))


@pytest.fixture(scope="module")
def gptq(w8a8_static: str) -> str:
    """YAML: W8A8 by GPTQ, each unit calibrated behind quantized ones, in several weight files."""
    return w8a8_static.replace("symmetric: True, method: minmax", "method: gptq").replace("_size: 4", "_size: 0.00003")


def without_report(files: dict[str, str]) -> dict[str, str]:
    """All but the file that holds the time that the run took."""
    assert "report.json" in files
    return {name: digest for name, digest in files.items() if name not in ("report.html", "report.json")}


def check_partial(partial: Path, whole: Path) -> None:
    """No weight file of an unfinished run can be loaded, unless it is a finished one."""
    finished = {file.read_bytes() for file in whole.glob("*.safetensors")}
    for file in partial.rglob("*"):
        if ".safetensors" in file.name and ".json" not in file.name and file.read_bytes() not in finished:
            assert file.name.endswith(".unfinished")
            with pytest.raises(SafetensorError), safe_open(file, "np"):
                pass


def test_a_run_killed_before_any_of_its_changes_leaves_nothing_finished_and_can_be_repeated(
    fork: Fork, config: Path, tiny_llama: Path, snapshot: Snapshot, tmp_path: Path
) -> None:
    source = snapshot(tiny_llama)
    undisturbed = fork(config, tmp_path / "0")
    assert undisturbed.code == 0
    whole = tmp_path / "0" / "out"
    expected = without_report(snapshot(whole))
    assert sum(name.endswith(".safetensors") for name in expected) > 2
    named = undisturbed.changes.index("os.rename out.partial out") + 1
    assert named > 20
    for moment in range(1, len(undisturbed.changes) + 1):
        folder = tmp_path / str(moment)
        assert fork(config, folder, moment=moment, signal=signal.SIGKILL).code == -signal.SIGKILL
        what = undisturbed.changes[moment - 1]
        assert snapshot(tiny_llama) == source, what
        if moment <= named:
            assert [path.name for path in folder.iterdir()] in ([], ["out.partial"]), what
            check_partial(folder / "out.partial", whole)
            assert fork(config, folder).code == 0, what
            assert [path.name for path in folder.iterdir()] == ["out"], what
        # What has its name is whole, its journal apart, which is the last thing to go.
        files = without_report(snapshot(folder / "out"))
        assert {name: digest for name, digest in files.items() if name != "journal.jsonl"} == expected, what
        assert "journal.jsonl" not in files or moment > named, what


def test_a_run_killed_while_it_removes_what_another_left_can_be_repeated(
    fork: Fork, config: Path, snapshot: Snapshot, tmp_path: Path
) -> None:
    undisturbed = fork(config, tmp_path / "0")
    expected = without_report(snapshot(tmp_path / "0" / "out"))
    last = undisturbed.changes.index("os.rename out.partial out") + 1

    def leave_rest(folder: Path) -> list[Path]:
        assert fork(config, folder, moment=last, signal=signal.SIGKILL).code < 0
        return list((folder / "out.partial").iterdir())

    rest = leave_rest(tmp_path / "rest")
    changes = fork(config, tmp_path / "rest", "--restart").changes
    removals = changes[: changes.index("os.mkdir out.partial")]
    assert len(removals) >= len(rest) > 10
    for moment in range(1, len(removals) + 2):
        folder = tmp_path / str(moment)
        leave_rest(folder)
        assert fork(config, folder, "--restart", moment=moment, signal=signal.SIGKILL).code < 0
        left = [path.name for path in (folder / "out.partial").glob("*")]
        assert fork(config, folder).code == 0, left
        assert without_report(snapshot(folder / "out")) == expected


def test_a_run_killed_while_it_continues_another_can_be_continued(
    fork: Fork, protocol: Callable[[str], Path], gptq: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    config = protocol(gptq)
    undisturbed = fork(config, tmp_path / "0")
    expected = without_report(snapshot(tmp_path / "0" / "out"))
    half = undisturbed.changes.index("open out.partial/state/2") + 1

    def leave_rest(folder: Path) -> None:
        assert fork(config, folder, moment=half, signal=signal.SIGKILL).code < 0
        assert (folder / "out.partial" / "journal.jsonl").read_bytes().count(b"\n") == 3  # two units

    leave_rest(tmp_path / "1")
    changes = fork(config, tmp_path / "1").changes
    named = changes.index("os.rename out.partial out") + 1
    for moment in (*range(1, named, 6), named):
        folder = tmp_path / f"killed{moment}"
        leave_rest(folder)
        assert fork(config, folder, moment=moment, signal=signal.SIGKILL).code < 0
        assert [path.name for path in folder.iterdir()] == ["out.partial"], changes[moment - 1]
        check_partial(folder / "out.partial", tmp_path / "0" / "out")
        assert fork(config, folder).code == 0, changes[moment - 1]
        assert without_report(snapshot(folder / "out")) == expected, changes[moment - 1]


def test_a_run_killed_in_or_behind_a_prior_stage_is_continued(
    fork: Fork, protocol: Callable[[str], Path], gptq: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    prior = "  prior:\n    - process: [{type: iter_smooth}]\n"
    config = protocol(gptq.replace("  process:\n", f"{prior}  process:\n"))
    undisturbed = fork(config, tmp_path / "0")
    assert undisturbed.code == 0, undisturbed.words
    expected = without_report(snapshot(tmp_path / "0" / "out"))
    assert not any(name.startswith("prior") for name in expected)
    named = undisturbed.changes.index("os.rename out.partial out") + 1
    # While the stage is written, while it is used, and from when its files go to when the result gets its name.
    inside = [number for number, change in enumerate(undisturbed.changes, start=1) if "out.partial/prior/0" in change]
    gone = next(number for number in range(inside[-1], named) if "os.remove" in undisturbed.changes[number - 1])
    moments = {*inside[::2], *range(inside[-1], gone, 8), *range(gone, named, 2), named}
    stages = 0
    for moment in sorted(moments):
        folder, what = tmp_path / str(moment), undisturbed.changes[moment - 1]
        assert fork(config, folder, moment=moment, signal=signal.SIGKILL).code == -signal.SIGKILL, what
        assert not (folder / "out").exists(), what
        journal = folder / "out.partial" / "journal.jsonl"
        stages += journal.read_bytes().count(b'"stage":0')
        assert fork(config, folder).code == 0, what
        assert without_report(snapshot(folder / "out")) == expected, what
    assert 5 < stages < len(moments) - 2


@pytest.mark.parametrize("kind", ["static", "gptq", "smoothing"])
def test_a_calibrating_run_killed_at_random_leaves_nothing_finished_and_is_continued(
    kind: str,
    fork: Fork,
    protocol: Callable[[str], Path],
    w8a8_static: str,
    gptq: str,
    tiny_llama: Path,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    smoothing = w8a8_static.replace("process:\n", "process:\n    - {type: iter_smooth}\n")
    config = protocol({"static": w8a8_static, "gptq": gptq, "smoothing": smoothing}[kind])
    source = snapshot(tiny_llama)
    undisturbed = fork(config, tmp_path / "0")
    whole = tmp_path / "0" / "out"
    expected = without_report(snapshot(whole))
    chance = random.Random(0)
    caught = 0
    for number in range(1, 21):
        folder = tmp_path / str(number)
        delay = chance.uniform(0, undisturbed.seconds)
        killed = fork(config, folder, delay=delay, signal=signal.SIGKILL)
        assert killed.code in (0, -signal.SIGKILL)
        assert snapshot(tiny_llama) == source
        if not (folder / "out").exists():
            caught += (folder / "out.partial").exists()
            check_partial(folder / "out.partial", whole)
            assert fork(config, folder).code == 0
        files = without_report(snapshot(folder / "out"))
        files.pop("journal.jsonl", None)
        assert files == expected
    assert caught > 0


def test_a_run_interrupted_before_any_of_its_changes_says_so_and_is_continued(
    fork: Fork, config: Path, snapshot: Snapshot, tmp_path: Path
) -> None:
    undisturbed = fork(config, tmp_path / "0")
    expected = without_report(snapshot(tmp_path / "0" / "out"))
    named = undisturbed.changes.index("os.rename out.partial out") + 1
    kept = 0
    for moment, what in enumerate(undisturbed.changes, start=1):
        folder = tmp_path / str(moment)
        run = fork(config, folder, moment=moment, signal=signal.SIGINT)
        assert (run.code, run.words.strip()) == (130, "error: interrupted"), what
        if moment <= named:
            # What no unit has been finished of is removed.
            partial = folder / "out.partial"
            assert list(folder.iterdir()) in ([], [partial]), what
            if partial.exists():
                assert (partial / "journal.jsonl").read_bytes().count(b"\n") > 1
                kept += 1
                assert fork(config, folder).code == 0, what
                assert without_report(snapshot(folder / "out")) == expected, what
        else:
            assert [path.name for path in folder.iterdir()] == ["out"], what
            files = without_report(snapshot(folder / "out"))
            files.pop("journal.jsonl", None)
            assert files == expected, what
    assert kept > 5


def test_the_report_of_a_repeated_run_differs_in_measurements_alone(fork: Fork, config: Path, tmp_path: Path) -> None:
    def report(folder: Path) -> Any:
        value = json.loads((folder / "out" / "report.json").read_text())
        del value["peak_memory_bytes"], value["save_path"], value["phases"]
        del value["provenance"]["finished"], value["provenance"]["command"]  # which has the path
        del value["memory"]["peak_bytes"], value["memory"]["estimated_seconds"]
        for unit in value["units"]:
            del unit["seconds"], unit["peak_memory_bytes"]
        return value

    fork(config, tmp_path / "0")
    assert fork(config, tmp_path / "1", moment=8, signal=signal.SIGKILL).code < 0
    assert fork(config, tmp_path / "1").code == 0
    assert report(tmp_path / "0") == report(tmp_path / "1")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_run_of_the_real_model_bars_another_and_survives_a_signal(
    number: signal.Signals,
    code: int,
    smollm2: Path,
    quantized_smollm2: Callable[[str], Path],
    here: Program,
    protocol: Callable[[str], Path],
    w8a8_dynamic: str,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    expected = without_report(snapshot(quantized_smollm2("W8A8_DYNAMIC")))
    source = snapshot(smollm2)
    command = ["quant", "--quiet", "--device", "cpu", "--model_path", str(smollm2)]
    command += ["--save_path", str(tmp_path / "out"), "--config_path", str(protocol(w8a8_dynamic))]
    journal = tmp_path / "out.partial" / "journal.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "modelslim.cli.main", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        second = here(*command)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, words = process.communicate()
    assert (second.returncode, second.stdout) == (2, "")
    assert f"another run is writing {tmp_path / 'out.partial'}" in second.stderr
    assert process.returncode == code
    assert words.strip() == ("error: interrupted" if number == signal.SIGINT else "")
    assert (tmp_path / "out.partial").exists()  # with the units that are finished, which the next run takes over
    assert not (tmp_path / "out").exists()
    assert snapshot(smollm2) == source
    assert here(*command).returncode == 0
    assert without_report(snapshot(tmp_path / "out")) == expected
