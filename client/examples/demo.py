"""Train digits.py and compare: plain ``torch.optim`` in one process, then two workers against a farstep server, four ways.

    python demo.py          (or, from a checkout: make demo)

The first run is digits.py with its one import line swapped for torch's. The others are digits.py as it stands, in two
worker processes under torchrun, against the embedded server that farstep starts on rank 0; there is nothing to set up.

- Sync: every step is one of both workers, on the mean of their gradients. It sees the same global batches from the same
  weights as the first run, so both end at about the same test accuracy (99.72 % each on two cores with torch 2.13). They are
  not equal to the last bit, because two half batches round differently from one whole batch.
- Async: no worker waits for the other; each gradient is a step of its own.
- LocalSGD: each worker trains by itself, and every 20 steps they take the mean of their parameters, so that about one
  twentieth of the bytes travel.
- int8: as Sync, with gradients that take 27 % of the bytes and feed back what they have lost.

Exit status: 0 if each of them reaches 97 % test accuracy, 1 if not or if a run fails, 130 on Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

DIGITS = Path(__file__).with_name("digits.py")
FARSTEP_IMPORT = "from farstep import optim"
TORCH_IMPORT = "from torch import optim"
WORKERS = 2
LOCAL_STEPS = 20
REQUIRED_ACCURACY = 97.0
VARIANTS = {
    "Sync": [],
    "Async": ["--policy", "async"],
    "LocalSGD": ["--local-sgd", str(LOCAL_STEPS)],
    "int8": ["--wire-dtype", "int8"],
}
# Longer than torchrun itself gives its workers (30 s) before it kills them.
STOP_TIMEOUT_SECONDS = 40.0


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="farstep-demo-") as name:
        folder = Path(name)
        print("1. plain torch.optim, one process", flush=True)
        swapped = folder / "digits_torch.py"
        swapped.write_text(swap_import(DIGITS.read_text()))
        plain = train([sys.executable, str(swapped)], folder / "torch.json", label="torch")

        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
        remote = {}
        for number, (name, options) in enumerate(VARIANTS.items(), start=2):
            print(f"\n{number}. farstep, {name}: {WORKERS} workers under torchrun, embedded server", flush=True)
            remote[name] = train([*torchrun, str(DIGITS), *options], folder / f"{name}.json", label=name)
    return report(plain, remote)


def swap_import(source: str) -> str:
    """Return the training script with torch's optimizers in place of farstep's: the only line that differs."""
    if source.count(FARSTEP_IMPORT + "\n") != 1:
        raise ValueError(f"{DIGITS.name} should have exactly one line {FARSTEP_IMPORT!r}")
    return source.replace(FARSTEP_IMPORT + "\n", TORCH_IMPORT + "\n")


def train(command: list[str], result: Path, *, label: str) -> dict[str, float]:
    """Run a training command, passing its output on line by line, and return the figures that it wrote to `result`."""
    # One thread per process, as torchrun has it, so that both runs compute alike; no server but the embedded one.
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environ.pop("FARSTEP_REMOTE", None)
    # A session of its own keeps a Ctrl-C in the terminal from reaching it beside us; stop() ends it in good order.
    process = subprocess.Popen(
        [*command, "--json", str(result)],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(f"   {label:>8} | {line}", end="", flush=True)
        process.wait()
    finally:
        stop(process)
    if process.returncode != 0:
        sys.exit(f"the {label} run failed with exit status {process.returncode}")
    figures: dict[str, float] = json.loads(result.read_text())
    return figures


def stop(process: subprocess.Popen[str]) -> None:
    """End a run that has not ended by itself, with everything that it started, and wait until it is gone."""
    if process.poll() is not None:
        return
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    # torchrun passes it on to its workers, each in a session that only torchrun knows of, and waits for them; and a
    # worker that is interrupted, not terminated, takes its embedded server along.
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def report(plain: dict[str, float], remote: dict[str, dict[str, float]]) -> int:
    """Print the results side by side and return the exit status."""
    print(
        f"\n{'':20}{'workers':>8}{'steps':>8}{'seconds':>9}{'test accuracy':>15}{'MB per worker':>15}{'KB per step':>13}"
    )
    for name, figures in {
        "plain torch.optim": plain,
        **{f"farstep, {name}": run for name, run in remote.items()},
    }.items():
        print(
            f"{name:20}{figures['workers']:8d}{figures['steps']:8d}{figures['seconds']:9.1f}"
            f"{figures['accuracy']:13.2f} %{figures['traffic_bytes'] / 1e6:15.1f}"
            f"{figures['traffic_bytes'] / figures['steps'] / 1e3:13.1f}"
        )
    sync, local = (remote[name]["traffic_bytes"] for name in ("Sync", "LocalSGD"))
    print(f"\nLocalSGD moved {local:,} bytes per worker, Sync {sync:,}: 1/{sync / local:.1f} of them")
    below = [name for name, run in remote.items() if run["accuracy"] < REQUIRED_ACCURACY]
    if below:
        print(f"farstep ended below {REQUIRED_ACCURACY:g} % under {', '.join(below)}", file=sys.stderr)
        return 1
    return 0


def terminate(signum: int, _frame: FrameType | None) -> NoReturn:
    """Leave through the clean-up of `train`, with the status that a shell gives to a signal."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
