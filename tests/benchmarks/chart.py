"""The chart of step time by model size and number of workers; as a program it draws what is on stdin, in JSON.

A process of its own: matplotlib keeps its fonts open as long as it lives.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.servers import clean_environment

# {workers: {contender: {model's bytes: seconds}}}
Times = Mapping[int, Mapping[str, Mapping[int, float]]]


def draw(times: Times, path: Path) -> str:
    """Write a PNG with a panel for each number of workers; return why it could not be, or nothing."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.chart", str(path)]
    done = subprocess.run(
        command, input=json.dumps(times), capture_output=True, text=True, check=False, env=clean_environment()
    )
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _draw(times: Mapping[str, Mapping[str, Mapping[str, float]]], path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for own in times.values() for name in own))
    colours = dict(zip(names, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    figure, panels = plt.subplots(1, len(times), figsize=(4 * len(times), 4), sharey=True, squeeze=False)
    for axes, (workers, own) in zip(panels[0], times.items(), strict=True):
        for name, seconds in own.items():
            sizes = sorted(seconds, key=int)
            megabytes, values = [int(size) / 1e6 for size in sizes], [seconds[size] * 1e3 for size in sizes]
            axes.loglog(megabytes, values, marker="o", markersize=3, label=name, color=colours[name])
        axes.set_title(f"{workers} worker{'s' * (workers != '1')}")
        axes.set_xlabel("parameters, MB")
        axes.grid(visible=True, which="major", alpha=0.3)
    panels[0][0].set_ylabel("step, ms")
    handles = {
        label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    _draw(json.load(sys.stdin), sys.argv[1])
