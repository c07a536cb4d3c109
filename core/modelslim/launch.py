# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a run on this machine, watches them, and leaves none behind; or takes those of torchrun."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from modelslim.devices import divide_threads, resolve_devices
from modelslim.errors import RankError, UsageError
from modelslim.run_devices import devices_of

if TYPE_CHECKING:
    from modelslim.ranks import Ranks

_GRACE = 10.0  # seconds in which a process may end by itself
_LOCAL = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


class Crew:
    """The ranks of a run, as this process sees them before they meet.

    Attributes:
        rank: number of this process.
        device: where it computes.
        size: how many ranks there are.

    Args:
        rank: see there.
        devices: of all ranks.
        meeting: file through which ranks of one machine find each other; None for torchrun's way.
    """

    def __init__(self, rank: int, devices: Sequence[str], meeting: Path | None = None) -> None:
        self.rank = rank
        self.size = len(devices)
        self.device = devices[rank]
        self._meeting = meeting

    @contextmanager
    def meet(self) -> Iterator[Ranks]:
        """Wait for the others, and be one of them while this is open."""
        from modelslim.ranks import joined

        if self._meeting is not None:  # else torchrun has seen to it
            divide_threads(self.size)
        with joined(self.rank, self.size, self.device, self._meeting) as ranks:
            yield ranks


@contextmanager
def crew(device: str | None, workers: int | None, job: Mapping[str, Any]) -> Iterator[Crew]:
    """Have as many ranks as there are devices.

    Under torchrun every process is a rank already. Else this process is the first, and the others are started
    here; they end with it, however it ends.

    Args:
        device: what ``--device`` says.
        workers: how many ranks share the CPU; None for one.
        job: arguments of ``quantize`` for the other ranks, as JSON values.

    Raises:
        UsageError: see ``devices_of``; or the devices are not as many as torchrun's processes.
        RankError: a rank has ended; says what it said.
    """
    devices = devices_of(device, workers, Path(job["planned"]["config_path"]))
    if _size() > 1:
        yield _of_torchrun(device, workers, devices)
        return
    if len(devices) == 1:
        yield Crew(0, devices)
        return
    with tempfile.TemporaryDirectory(prefix="modelslim-") as folder:
        meeting = Path(folder) / "meeting"
        os.environ.update({key: value for key, value in _LOCAL.items() if key not in os.environ})
        others = [_Worker(rank, devices, meeting, job) for rank in range(1, len(devices))]
        watch = _Watch(others)
        try:
            yield Crew(0, devices, meeting)
        except BaseException as error:
            fallen = watch.fallen(isinstance(error, RankError))
            if fallen is not None and (watch.has_interrupted or isinstance(error, RankError)):
                raise fallen from error
            raise
        else:
            watch.expect_end()
        finally:
            watch.close()


def is_first_process() -> bool:
    """False in the processes that torchrun has started beside the first one; they say and write nothing."""
    return _size() == 1 or os.environ["RANK"] == "0"


def _size() -> int:
    """How many processes torchrun, or a launcher like it, has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _of_torchrun(device: str | None, workers: int | None, devices: list[str]) -> Crew:
    rank, size = int(os.environ["RANK"]), _size()
    local, here = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if workers is not None:
        raise UsageError("--workers does not go with torchrun", hint="say --nproc-per-node to torchrun instead")
    kind = devices[0].partition(":")[0]
    if kind != "cpu" and len(devices) == 1:
        devices = resolve_devices(f"{kind}:{','.join(map(str, range(here)))}")
    if kind != "cpu" and len(devices) != here:
        raise UsageError(
            f"--device {device!r} lists {len(devices)} devices, and torchrun has started {here} processes here",
            hint=f"say --device {kind}",
        )
    own = "cpu" if kind == "cpu" else devices[local]
    return Crew(rank, [own] * size)


class _Worker:
    """Another rank on this machine."""

    def __init__(self, rank: int, devices: Sequence[str], meeting: Path, job: Mapping[str, Any]) -> None:
        self.rank = rank
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        task = {"rank": rank, "devices": list(devices), "meeting": str(meeting), "job": dict(job)}
        # Its own session: Ctrl-C reaches the first rank alone. It ends when the pipe does, whatever ends us.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelslim.worker"],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self._pipe = self.process.stdin
        with suppress(BrokenPipeError):  # when it has ended, as the watch will tell
            self._pipe.write(json.dumps(task).encode() + b"\n")
            self._pipe.flush()

    def error(self) -> RankError:
        """Why it has ended."""
        self._said.seek(0)
        text = self._said.read().decode(errors="replace").strip()
        code = self.process.returncode
        last = text.splitlines()[-1] if text else ""
        try:
            said = json.loads(last)
            return RankError(f"rank {self.rank}: {said['message']}", hint=said["hint"])
        except (ValueError, TypeError, KeyError):
            pass
        if code < 0:
            why = "; the system does so when memory runs out" if code == -9 else ""
            message = f"rank {self.rank} was killed by signal {-code}{why}"
        else:
            message = f"rank {self.rank} ended with exit code {code}: {last}".removesuffix(": ")
        return RankError(message, hint="the same command continues after the last finished unit")

    def close(self) -> None:
        """End it, gently first."""
        with suppress(BrokenPipeError):
            self._pipe.close()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._said.close()


class _Watch:
    """Sees to it that this process does not wait for a rank that has died."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self._done = threading.Event()
        self.has_interrupted = False
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            if any(worker.process.poll() not in (None, 0) for worker in self._workers):
                # Mostly the broken connection ends the first rank, which tells more.
                if not self._done.wait(_GRACE):
                    self.has_interrupted = True
                    _thread.interrupt_main()
                return

    def fallen(self, wait: bool) -> RankError | None:
        """What is known of a rank that has failed.

        Args:
            wait: True when one is known to end.
        """
        deadline = time.monotonic() + (_GRACE if wait else 0.0)
        while True:
            failed = [worker for worker in self._workers if worker.process.poll() not in (None, 0)]
            if failed or time.monotonic() >= deadline:
                return failed[0].error() if failed else None
            time.sleep(0.05)

    def expect_end(self) -> None:
        """Wait for the others, which have nothing left to do.

        Raises:
            RankError: one of them has failed.
        """
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(worker.process.poll() is None for worker in self._workers):
            time.sleep(0.02)
        fallen = self.fallen(wait=False)
        if fallen is not None:
            raise fallen

    def close(self) -> None:
        """Leave no process behind."""
        self._done.set()
        for worker in self._workers:
            worker.close()
