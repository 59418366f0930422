"""The examples run as they stand and with torch alone, print the same figures, and end in good order on Ctrl-C."""

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


@dataclass(frozen=True)
class Example:
    """An example, arguments that make it short and very short, and its final figure, below `bound` after the former."""

    name: str
    arguments: list[str]
    few_steps: list[str]
    figure: str
    bound: float

    def final_figure(self, output: str) -> float:
        match = re.search(self.figure, output, re.MULTILINE)
        assert match, f"no line matches {self.figure!r} in\n{output}"
        return float(match[1])


# An untrained digits model has a loss of 2.3; uniform guesses at bytes cost 8 bits; the residual starts at some 4,000.
SHORT = [
    Example("digits", ["--epochs", "4"], ["--epochs", "2"], r"^final test accuracy \d+\.\d+ %  test loss (\S+)", 1.0),
    Example("char_lm", ["--steps", "6"], ["--steps", "4"], r"^final held-out (\S+) bits per byte", 7.0),
    Example("lbfgs_fit", ["--steps", "10"], ["--steps", "2"], r"^final L-BFGS loss (\S+)", 0.1),
]
each_example = pytest.mark.parametrize("example", SHORT, ids=lambda example: example.name)


def swap_import(source: str) -> str:
    swapped = source.replace("from farstep import optim\n", "from torch import optim\n")
    assert swapped != source
    return swapped


def torch_script(example: str, folder: Path) -> Path:
    """Write the example with torch's optimizers in place of farstep's and return its path."""
    script = folder / f"{example}_torch.py"
    script.write_text(swap_import((EXAMPLES / f"{example}.py").read_text()))
    return script


def environment() -> dict[str, str]:
    """A newcomer's environment: this checkout to import, no server given; one thread, so that runs compute alike."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("proto", "client", "server"))
    environ = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("FARSTEP_REMOTE", "RANK", "WORLD_SIZE"):
        environ.pop(name, None)
    return environ


def run(command: list[str]) -> str:
    """Run to the end and return the standard output."""
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@each_example
def test_runs_with_torch_alone(example: Example, tmp_path: Path) -> None:
    script = torch_script(example.name, tmp_path)
    assert not re.search(r"^\s*(import|from) farstep", script.read_text(), re.MULTILINE)
    assert example.final_figure(run([sys.executable, "-W", "error", str(script), *example.arguments])) < example.bound


def test_batches_that_cannot_be_shared_equally_are_refused(tmp_path: Path) -> None:
    script = torch_script("digits", tmp_path)
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


@each_example
def test_ctrl_c_ends_in_one_line(example: Example, tmp_path: Path) -> None:
    script = torch_script(example.name, tmp_path)
    needle = {"digits": "epoch  1", "char_lm": "bytes to train on", "lbfgs_fit": "L-BFGS"}[example.name]
    status, output = interrupt_after(needle, [sys.executable, str(script)])
    assert status == 130
    assert output.endswith("\ninterrupted\n")
    assert "Traceback" not in output


@pytest.mark.parametrize("needle", ["torch | epoch  1"])
def test_ctrl_c_ends_the_demo_with_all_it_started(needle: str) -> None:
    status, output = interrupt_after(needle, [sys.executable, str(EXAMPLES / "demo.py")])
    assert status == 130
    assert output.endswith("\ninterrupted\n")
    assert "Traceback" not in output
