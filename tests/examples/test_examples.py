"""The examples run as they stand and with torch alone, print the same figures, and end in good order on Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "client" / "examples"
DIGITS = EXAMPLES / "digits.py"
DEMO = EXAMPLES / "demo.py"
DIGITS_BYTES = 4 * 38_282  # of its parameters
# Runs a script as if farstep were not installed.
WITHOUT_FARSTEP = """
import runpy, sys
sys.modules["farstep"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@dataclass(frozen=True)
class Example:
    """An example, and what to expect of it."""

    name: str
    unit: str  # the option that sets the length of a run
    short: int  # long enough that the final figure is below `bound`
    very_short: int  # so short that what differs in rounding has not grown yet
    started: str  # stands in the line that says it has begun
    figure: str  # the line with the final figure, which is the one group
    bound: float

    @property
    def path(self) -> Path:
        return EXAMPLES / f"{self.name}.py"

    def arguments(self, length: int) -> list[str]:
        return [self.unit, str(length)]

    def final_figure(self, output: str) -> float:
        match = re.search(self.figure, output, re.MULTILINE)
        assert match, f"no line matches {self.figure!r} in\n{output}"
        return float(match[1])


# An untrained digits model has a loss of 2.3; uniform guesses at bytes cost 8 bits; the residual starts at some 4,000.
ALL = [
    Example("digits", "--epochs", 4, 2, "epoch  1", r"^final test accuracy \S+ %  test loss (\S+)", 1.0),
    Example("char_lm", "--steps", 6, 4, "bytes to train on", r"^final held-out (\S+) bits per byte", 7.0),
    Example("lbfgs_fit", "--steps", 10, 2, "L-BFGS", r"^final L-BFGS loss (\S+)", 0.1),
]
each_example = pytest.mark.parametrize("example", ALL, ids=lambda example: example.name)


def swap_import(source: str) -> str:
    swapped = source.replace("from farstep import optim\n", "from torch import optim\n")
    assert swapped != source
    return swapped


def torch_script(example: Path, folder: Path) -> Path:
    """Write the example with torch's optimizers in place of farstep's and return its path."""
    script = folder / f"{example.stem}_torch.py"
    script.write_text(swap_import(example.read_text()))
    return script


def environment() -> dict[str, str]:
    """A newcomer's environment: this checkout to import, no server given; one thread, so that runs compute alike."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("proto", "client", "server"))
    environ = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("FARSTEP_REMOTE", "RANK", "WORLD_SIZE"):
        environ.pop(name, None)
    return environ


def run(command: list[str], timeout: float = 100) -> str:
    """Run to the end and return the standard output."""
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def without_times(output: str) -> str:
    return re.sub(r"\d+(\.\d+)? (s|ms)\b", "TIME", output)


@each_example
def test_runs_with_torch_alone(example: Example, tmp_path: Path) -> None:
    script = torch_script(example.path, tmp_path)
    assert not re.search(r"^(import|from) farstep", script.read_text(), re.MULTILINE)
    output = run([sys.executable, "-W", "error", "-c", WITHOUT_FARSTEP, str(script), *example.arguments(example.short)])
    assert example.final_figure(output) < example.bound


@each_example
def test_farstep_prints_what_torch_prints(example: Example, tmp_path: Path) -> None:
    plain = run([sys.executable, str(torch_script(example.path, tmp_path)), *example.arguments(example.short)])
    remote = run([sys.executable, "-W", "error", str(example.path), *example.arguments(example.short)])
    assert without_times(remote) == without_times(plain)


def test_digits_ends_with_the_bits_of_torch(tmp_path: Path) -> None:
    figures = {}
    for name, script in (("torch", torch_script(DIGITS, tmp_path)), ("farstep", DIGITS)):
        file = tmp_path / f"{name}.json"
        run([sys.executable, str(script), "--epochs", "2", "--json", str(file)])
        figures[name] = json.loads(file.read_text())
        assert figures[name].pop("seconds") > 0
        assert (figures[name].pop("traffic_bytes") > 0) == (name == "farstep")
    assert figures["farstep"] == figures["torch"]


@each_example
def test_two_workers_train_on_the_same_global_batches(example: Example, tmp_path: Path) -> None:
    """The mean of two half batches is the whole batch up to rounding, so few steps end in nearly the same place."""
    plain = run([sys.executable, str(torch_script(example.path, tmp_path)), *example.arguments(example.very_short)])
    remote = run([*TORCHRUN, str(example.path), *example.arguments(example.very_short)])
    assert remote.count("final ") == plain.count("final "), "only rank 0 prints"
    assert example.final_figure(remote) == pytest.approx(example.final_figure(plain), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        ["--policy", "async", "--max-staleness", "2"],
        ["--policy", "async", "--local-sgd", "7"],  # every seventh step, and the four after the last of them
    ],
    ids=" ".join,
)
def test_digits_in_other_ways_to_train_together(options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    output = run([*TORCHRUN, str(DIGITS), *options, "--epochs", "4", "--json", str(file)])
    assert output.count("final ") == 1, "only rank 0 prints"
    figures = json.loads(file.read_text())
    assert figures["loss"] < 1.0
    assert figures["steps"] == 88
    every_step = 88 * 2 * DIGITS_BYTES
    if "--local-sgd" in options:
        assert figures["traffic_bytes"] < every_step / 5
    else:
        assert every_step < figures["traffic_bytes"] < every_step * 1.1


def test_a_bound_of_staleness_goes_with_async(tmp_path: Path) -> None:
    command = [sys.executable, str(torch_script(DIGITS, tmp_path)), "--max-staleness", "2"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (1, "--max-staleness 2 goes with --policy async\n")


def test_batches_that_cannot_be_shared_equally_are_refused(tmp_path: Path) -> None:
    script = torch_script(DIGITS, tmp_path)
    result = subprocess.run(
        [sys.executable, str(script), "--batch-size", "33"],
        env={**environment(), "RANK": "0", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "--batch-size 33 is not a multiple of the number of workers, 2\n"


def interrupt_after(needle: str, command: list[str]) -> tuple[int, str]:
    """Send SIGINT once a line with `needle` is out; return the exit status and all output. No process may be left."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    output = ""
    try:
        for line in process.stdout:
            output += line
            if needle in line:
                break
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        output += process.stdout.read()
        process.wait(timeout=60)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    _, left = psutil.wait_procs(started, timeout=20)
    assert not left, output
    return process.returncode, output


@pytest.mark.parametrize("optimizers", ["torch", "farstep"])
@each_example
def test_ctrl_c_ends_in_one_line(example: Example, optimizers: str, tmp_path: Path) -> None:
    script = torch_script(example.path, tmp_path) if optimizers == "torch" else example.path
    status, output = interrupt_after(example.started, [sys.executable, str(script), *example.arguments(100_000)])
    assert status == 130
    assert output.endswith("\ninterrupted\n")
    assert "Traceback" not in output


@pytest.mark.parametrize("needle", ["torch | epoch  1", "Sync | epoch  1"])
def test_ctrl_c_ends_the_demo_with_all_it_started(needle: str) -> None:
    status, output = interrupt_after(needle, [sys.executable, str(DEMO)])
    assert status == 130
    assert output.endswith("\ninterrupted\n")
    assert "Traceback" not in output


@pytest.mark.timeout(260)
def test_demo_prints_what_each_way_reaches_and_costs() -> None:
    output = run([sys.executable, str(DEMO)], timeout=240)
    rows = re.findall(r"^(plain \S+|farstep, \S+) +(\d) +(\d+) +\S+ +(\S+) % +(\S+) +(\S+)$", output, re.MULTILINE)
    assert [(name, workers, steps) for name, workers, steps, *_ in rows] == [
        ("plain torch.optim", "1", "440"),
        ("farstep, Sync", "2", "440"),
        ("farstep, Async", "2", "440"),
        ("farstep, LocalSGD", "2", "440"),
        ("farstep, int8", "2", "440"),
    ]
    assert all(float(accuracy) >= 97 for *_, accuracy, _, _ in rows)
    match = re.search(
        r"^LocalSGD moved ([\d,]+) bytes per worker, Sync ([\d,]+): 1/([\d.]+) of them$", output, re.MULTILINE
    )
    assert match, output
    local, sync = (int(figure.replace(",", "")) for figure in match.groups()[:2])
    # With int8 gradients the parameters still come back as they are.
    moved = [0, sync, sync, local, sync * (1 + 17 / 64) / 2]
    assert [float(megabytes) for *_, megabytes, _ in rows] == pytest.approx([count / 1e6 for count in moved], abs=1)
    assert [float(kilobytes) for *_, kilobytes in rows] == pytest.approx([count / 440e3 for count in moved], rel=0.02)
    assert 17 < sync / local < 22
    assert float(match[3]) == pytest.approx(sync / local, abs=0.1)
