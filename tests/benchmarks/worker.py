"""One worker process of a crew: builds contenders and steps them, as told line by line in JSON on stdin."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

import torch

from tests.benchmarks.contenders import Contender, RefusedError, Seat, build
from tests.benchmarks.sizes import Size


def _run(contender: Contender, at: float, count: int) -> dict[str, list[float]]:
    begins, ends = [], []
    time.sleep(max(0.0, at - time.monotonic()))
    for _ in range(count):
        begins.append(time.monotonic())
        contender.step()
        ends.append(time.monotonic())
    return {"begins": begins, "ends": ends}


class _Worker:
    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._own: dict[str, Contender] = {}

    def obey(self, words: dict[str, Any]) -> dict[str, Any]:
        name = words["name"]
        match words["do"]:
            case "build":
                try:
                    self._own[name] = build(words["kind"], Size(*words["size"]), self._seat, words["options"])
                except RefusedError as error:
                    return {"refused": str(error)}
            case "prepare":
                self._own[name].prepare()
            case "run":
                return _run(self._own[name], words["at"], words["count"])
            case "drop":
                contender = self._own.pop(name, None)
                if contender is not None:
                    contender.close()
        return {}

    def end(self) -> None:
        for contender in self._own.values():
            contender.close()


def main() -> None:
    # What libraries print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rank, workers, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    torch.manual_seed(rank)
    own = _Worker(Seat(rank, workers, directory))
    for line in sys.stdin:
        try:
            reply = own.obey(json.loads(line))
        except Exception:  # noqa: BLE001 - the test that asked shall hear of it, whatever it is
            reply = {"defect": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)
    own.end()
    # Some peers keep threads that do not end with the interpreter.
    replies.close()
    os._exit(0)


if __name__ == "__main__":
    main()
