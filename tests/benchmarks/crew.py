"""Worker processes that benchmarks measure in, and contests between what runs in them.

Every process holds any number of contenders. A contest gives each of them a turn, round after round: all others are idle
meanwhile, and what disturbs the machine disturbs all alike. Every worker of a turn begins at the same moment of the machine's
monotonic clock; the turn has taken as long as the last of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.benchmarks.sizes import Size
from tests.support.servers import clean_environment

_LEAD_SECONDS = 0.002
"""From the word to begin until the beginning: long enough for the word to reach every worker."""


class Crew:
    """So many worker processes, ranks 0 to ``workers`` - 1.

    ``restless``: its processes stand still while it is not their turn (SIGSTOP), as do those ``held``: for peers that
    poll without a pause, and would take the processor from the others.
    """

    def __init__(self, workers: int, *, restless: bool) -> None:
        self.workers = workers
        self.held: list[int] = []
        """Other processes that stand still with these."""
        self._restless = restless
        self.directory = tempfile.TemporaryDirectory(prefix="farstep-bench-")
        environment = clean_environment() | {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.worker"]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(workers), self.directory.name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
            )
            for rank in range(workers)
        ]  # fmt: skip

    def _signal(self, number: signal.Signals) -> None:
        if self._restless:
            for pid in (*self.held, *(process.pid for process in self._processes)):
                os.kill(pid, number)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Have the processes run; they stand still afterwards if they are restless."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _all(self, **words: Any) -> list[dict[str, Any]]:
        for process in self._processes:
            assert process.stdin is not None
            print(json.dumps(words), file=process.stdin, flush=True)
        return [self._reply(process) for process in self._processes]

    def _reply(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a benchmark's worker ended with {process.wait(30)}; it says why above")
        reply: dict[str, Any] = json.loads(line)
        if "defect" in reply:
            raise RuntimeError(f"in a benchmark's worker:\n{reply['defect']}")
        return reply

    def build(self, name: str, kind: str, size: Size, **options: Any) -> str:
        """Make a contender in every worker; return why it cannot be had, or nothing."""
        with self.awake():
            replies = self._all(do="build", name=name, kind=kind, size=[size.tensors, size.elements], options=options)
        refused = sorted({reply["refused"] for reply in replies if "refused" in reply})
        if refused:
            self.drop(name)
        return "; ".join(refused)

    def turn(self, name: str, count: int = 1) -> list[float]:
        """Have all workers prepare, and then step ``count`` times; return the seconds.

        One worker: of each step. Several: one figure, from the first to begin to the last to end, per step.
        """
        with self.awake():
            self._all(do="prepare", name=name)
            replies = self._all(do="run", name=name, count=count, at=time.monotonic() + _LEAD_SECONDS)
        if self.workers == 1:
            return [end - begin for begin, end in zip(replies[0]["begins"], replies[0]["ends"], strict=True)]
        begun, ended = min(reply["begins"][0] for reply in replies), max(reply["ends"][-1] for reply in replies)
        return [(ended - begun) / count]

    def drop(self, name: str) -> None:
        """Have all workers let go of a contender, where they have it."""
        with self.awake():
            self._all(do="drop", name=name)

    def end(self) -> None:
        """End the processes; what stood still with them has its own owner."""
        self.held.clear()
        self._signal(signal.SIGCONT)
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self.directory.cleanup()


@contextmanager
def crew(workers: int, *, restless: bool = False) -> Iterator[Crew]:
    """Run worker processes."""
    own = Crew(workers, restless=restless)
    try:
        yield own
    finally:
        own.end()


class Contest:
    """Contenders of one size that take turns."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.seconds: dict[str, list[float]] = {}
        self.refused: dict[str, str] = {}
        self._entered: dict[str, Crew] = {}

    def enter(self, crew: Crew, name: str, kind: str, **options: Any) -> None:
        """Build a contender in a crew; one that cannot be had is noted with the reason."""
        reason = crew.build(name, kind, self.size, **options)
        if reason:
            self.refused[name] = reason
        else:
            self._entered[name] = crew
            self.seconds[name] = []

    def hold(self, rounds: int, warm: int, count: int = 1) -> None:
        """Give each of them its turns, of which the ``warm`` first ones do not count. Another begins each round."""
        names = list(self._entered)
        for number in range(rounds + warm):
            shift = number % max(1, len(names))
            for name in names[shift:] + names[:shift]:
                taken = self._entered[name].turn(name, count)
                if number >= warm:
                    self.seconds[name] += taken

    def drop(self) -> None:
        """Let go of all contenders; their times stay."""
        for name, own in self._entered.items():
            own.drop(name)
        self._entered.clear()
