"""The rules: what processes, time and people do to a hosted optimizer; after each event server and model must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition

from farstep_server.core.records import Dump
from farstep_wire.policy import Async
from tests.state_machine import words
from tests.state_machine.model import Model
from tests.state_machine.pair import Pair, agree, step
from tests.state_machine.processes import Process
from tests.state_machine.system import ARGUMENTS, LAYOUT, System, clone, contents

WORKERS = ["2", "10", "b", "0", "c"]
"""More than one order: by value "2" < "10", by text not; names come last."""

NUMBERS = st.integers(0, 2**20)
RATES = st.sampled_from([None, None, None, 0.5, 0.25])
SAMPLES = st.sampled_from([None, None, None, 1.0, 3.0])


class Machine(Pair):
    """The rules."""

    @initialize(optimizer=st.sampled_from(["SGD", "SGD", "Adam"]), crew=st.integers(1, 4))
    def begin(self, optimizer: str, crew: int) -> None:
        initial = [torch.linspace(-1, 1, spec.numel).reshape(spec.shape) for spec in LAYOUT.specs]
        make: Callable[[Any], Any] = lambda tensors: getattr(torch.optim, optimizer)(tensors, **ARGUMENTS[optimizer])  # noqa: E731
        self.model = Model(self.policy, make, initial)
        self.system = System(self.policy, optimizer, contents(initial))
        for worker in WORKERS[: crew if isinstance(self.policy, Async) else max(crew, self.policy.workers)]:
            self._start(worker)

    # Processes come and go.

    def _start(self, worker: str) -> None:
        for old in [process for process in self.processes if process.worker == worker]:
            self.processes.remove(old)
            self.zombies.append(old)
        process = Process(worker, f"{worker}/{self.last_ticket}", lr=self.model.numbers.lr)
        self.processes.append(process)
        self.both(words.Join(self.ticket(), worker, process.instance), process)

    def _pick(self, number: int, *, idle: bool = False) -> Process | None:
        fit = [process for process in self.processes if process.attached and (process.answered or not idle)]
        return fit[number % len(fit)] if fit else None

    @step(worker=st.sampled_from(WORKERS))
    def new_process(self, worker: str) -> None:
        self._start(worker)

    @precondition(lambda self: self.processes)
    @step(number=NUMBERS, again=st.booleans())
    def reconnects(self, number: int, again: bool) -> None:
        process = self.processes[number % len(self.processes)]
        self._reconnect(process)
        if again:
            self._resend(process)

    def _reconnect(self, process: Process) -> None:
        self.both(words.Join(self.ticket(), process.worker, process.instance, again=True), process)

    def _come_back(self) -> None:
        """All who have lost their lease attach again, and ask again for answers that were lost."""
        for process in list(self.processes):
            if not process.attached:
                self._reconnect(process)
            lost = not process.answered and process.last is not None and process.last.epoch != process.epoch
            if process.attached and lost:
                self._resend(process)

    def _resend(self, process: Process) -> None:
        act = process.resent(self.ticket())
        if act is not None:
            process.sends(act)
            self.both(act, process)

    @step(number=NUMBERS)
    def repeats_what_was_answered(self, number: int) -> None:
        process = self._pick(number, idle=True)
        if process is not None:
            self._resend(process)

    @step(number=NUMBERS)
    def leaves(self, number: int) -> None:
        process = self._pick(number)
        if process is not None:
            self.both(words.Leave(self.ticket(), process.worker, process.epoch))
            process.attached = False

    @precondition(lambda self: self.zombies)
    @step(number=NUMBERS, what=st.sampled_from(["push", "reconnect", "zero_grad", "leave", "touch", "accumulate"]))
    def a_zombie_speaks(self, number: int, what: str) -> None:
        zombie = self.zombies[number % len(self.zombies)]
        current = self.model.workers.get(zombie.worker)
        if current is None or current.instance == zombie.instance or current.epoch == zombie.epoch:
            return  # a crash has taken the server back to before it was replaced; its connection is gone
        ticket = self.ticket()
        match what:
            case "push":
                answers = self.both(self._push(zombie, number))
            case "accumulate":
                gradients = self._gradients(number)
                answers = self.both(words.Accumulate(ticket, zombie.worker, zombie.epoch, zombie.next(), gradients))
            case "reconnect":
                answers = self.both(words.Join(ticket, zombie.worker, zombie.instance, again=True))
            case "zero_grad":
                answers = self.both(words.ZeroGrad(ticket, zombie.worker, zombie.epoch))
            case "leave":
                self.both(words.Leave(ticket, zombie.worker, zombie.epoch))
                return
            case _:
                self.both(words.Touch(zombie.worker, zombie.epoch))
                return
        assert words.Refused("FencedError", "NO") in answers.values()

    # Steps.

    def _gradients(self, number: int) -> words.Gradients:
        generator = torch.Generator().manual_seed(number)
        gradients: words.Gradients = [torch.randn(spec.shape, generator=generator) for spec in LAYOUT.specs]
        if number % 5 == 0:
            gradients[number % 2] = None
        return gradients

    def _push(self, process: Process, number: int, **changes: Any) -> words.Push:
        fields: dict[str, Any] = {
            "version": process.version,
            "incarnation": process.incarnation,
            "gradients": self._gradients(number),
            "accumulated": process.accumulated,
            **changes,
        }
        return words.Push(self.ticket(), process.worker, process.epoch, process.next(), **fields)

    def _send(self, process: Process, act: words.Act) -> None:
        process.sends(act)
        self.both(act, process)
        if process.gradients_lost:
            process.gradients_lost = False
            self._zero_grad(process)
        if process.behind:
            process.behind = False
            process.version, process.incarnation = self.model.version, self.model.incarnation

    @step(number=NUMBERS, abstain=st.booleans(), lr=RATES, samples=SAMPLES)
    def steps(self, number: int, abstain: bool, lr: float | None, samples: float | None) -> None:
        process = self._pick(number, idle=True)
        if process is not None:
            changes: dict[str, Any] = {"gradients": None} if abstain and number % 2 else {}
            self._send(process, self._push(process, number, lr=lr, samples=samples, **changes))

    @step(
        number=NUMBERS,
        order=st.randoms(use_true_random=False),
        lr=RATES,
        samples=st.booleans(),
        odd=st.sampled_from(["", "", "", "lr", "samples", "abstains", "all abstain", "late"]),
    )
    def everyone_steps(self, number: int, order: Any, lr: float | None, samples: bool, odd: str) -> None:
        self._come_back()
        crew = [process for process in self.processes if process.attached and process.answered]
        order.shuffle(crew)
        if odd == "late":
            crew = crew[1:]
        for index, process in enumerate(crew):
            changes: dict[str, Any] = {"lr": lr, "samples": float(1 + index) if samples else None}
            if index == 0 and odd in changes:
                changes[odd] = 0.125 if odd == "lr" else None
            if odd == "all abstain" or (odd == "abstains" and index == 0):
                changes["gradients"] = None
            if process.attached and process.answered:
                self._send(process, self._push(process, number + index, **changes))

    @step(number=NUMBERS, rounds=st.integers(1, 5))
    def trains(self, number: int, rounds: int) -> None:
        """Everyone steps, the usual way."""
        for index in range(rounds):
            self._come_back()
            for process in self.processes:
                if process.attached and process.answered:
                    self._send(process, self._push(process, number + index))

    @step(number=NUMBERS, wrong=st.sampled_from(["older", "newer", "incarnation", "accumulated"]))
    def steps_wrongly(self, number: int, wrong: str) -> None:
        process = self._pick(number, idle=True)
        if process is None:
            return
        changes: dict[str, Any] = {
            "older": {"version": max(0, process.version - 1 - number % 3)},
            "newer": {"version": self.model.version + 1},
            "incarnation": {"incarnation": process.incarnation + (1 if number % 2 else -1)},
            "accumulated": {"accumulated": process.accumulated + 1},
        }[wrong]
        self._send(process, self._push(process, number, **changes))

    @precondition(lambda self: isinstance(self.policy, Async))
    @step(number=NUMBERS)
    def does_not_wait_for_the_answer(self, number: int) -> None:
        process = self._pick(number)
        if process is not None and process.worker not in self.model.waiting:
            self._send(process, self._push(process, number))

    @step(number=NUMBERS)
    def accumulates(self, number: int) -> None:
        process = self._pick(number, idle=True)
        if process is not None:
            act = words.Accumulate(
                self.ticket(), process.worker, process.epoch, process.next(), self._gradients(number)
            )
            self._send(process, act)

    @step(number=NUMBERS)
    def zero_grad(self, number: int) -> None:
        process = self._pick(number)
        if process is not None:
            self._zero_grad(process)

    def _zero_grad(self, process: Process) -> None:
        taken_back = self.model.waiting.get(process.worker)
        self.both(words.ZeroGrad(self.ticket(), process.worker, process.epoch), process)
        process.accumulated = 0
        if taken_back is not None and taken_back.ticket in self.tickets:
            del self.tickets[taken_back.ticket]
            process.answered = True

    @step(number=NUMBERS)
    def pulls(self, number: int) -> None:
        self.both(words.Tick())
        process = self._pick(number, idle=True)
        if process is not None:
            model = self.model
            agree("pull", self.system.pull(self.now), (model.version, model.incarnation, model.numbers.bits()))
            process.version, process.incarnation = self.model.version, self.model.incarnation

    # Collective acts.

    def _load(self, process: Process, variant: int) -> words.Load:
        kept = self.model.numbers.optimizer.state_dict()
        factor, lr = [(1.0, 0.5), (0.5, 0.5), (1.0, 0.25)][variant]
        state = {
            index: {key: value * factor if isinstance(value, torch.Tensor) else value for key, value in entries.items()}
            for index, entries in kept["state"].items()
        }
        options = {key: clone(value) for key, value in kept["param_groups"][0].items() if key != "params"}
        return words.Load(self.ticket(), process.worker, process.epoch, process.next(), state, {**options, "lr": lr})

    @step(number=NUMBERS, variant=st.integers(0, 2))
    def loads(self, number: int, variant: int) -> None:
        process = self._pick(number, idle=True)
        if process is not None:
            self._send(process, self._load(process, variant))

    @step(variant=st.integers(0, 2), odd=st.integers(0, 7))
    def everyone_loads(self, variant: int, odd: int) -> None:
        self._come_back()
        crew = [process for process in self.processes if process.attached and process.answered]
        acts = [
            self._load(process, (variant + 1) % 3 if index == odd else variant) for index, process in enumerate(crew)
        ]
        for process, act in zip(crew, acts, strict=True):
            if process.attached and process.answered:
                self._send(process, act)

    # Time.

    @step(seconds=st.sampled_from([0.25, 1.0, 2.5, 4.0, 11.0]), tick=st.booleans())
    def time_passes(self, seconds: float, tick: bool) -> None:
        self.now += seconds
        if tick:
            self.both(words.Tick())
        else:
            self.tally.events += 1  # the next event finds what has run out

    @precondition(lambda self: self.model.next_deadline() < float("inf"))
    @step(tick=st.booleans())
    def the_next_deadline_comes(self, tick: bool) -> None:
        self.now = max(self.now, self.model.next_deadline())
        if tick:
            self.both(words.Tick())

    @step(number=NUMBERS)
    def heartbeats(self, number: int) -> None:
        for index, process in enumerate(self.processes):
            if number % 4 != index:
                self.both(words.Touch(process.worker, process.epoch))

    # People.

    @step(name=st.sampled_from(["clip_grad_norm", "clip_grad_value"]), limit=st.sampled_from([None, 0.5, 1.5]))
    def settings_change(self, name: str, limit: float | None) -> None:
        self.both(words.Configure({name: limit}))

    @step()
    def checkpoint(self) -> None:
        self.both(words.Tick())
        self._keep(self.system.dump(self.now))

    def _keep(self, dump: Dump) -> None:
        self.model.saved.append(self.model.save())
        self.dumps.append(dump)
        self.ledgers.append(list(self.ledger))

    @precondition(lambda self: self.dumps)
    @step(number=NUMBERS)
    def roll_back(self, number: int) -> None:
        saved = number % len(self.dumps)
        self.ledger = list(self.ledgers[saved])
        self.both(words.Restore(self.ticket(), saved))

    @precondition(lambda self: self.dumps)
    @step(number=NUMBERS)
    def crash(self, number: int) -> None:
        self._restart(number % len(self.dumps))

    @step()
    def drain(self) -> None:
        self._stop()
        self._restart(len(self.dumps) - 1)

    def _stop(self) -> None:
        """All that waits is told; nothing that was ever acknowledged is lost."""
        self.both(words.Stop())
        assert self.system.last_dump is not None
        self._keep(self.system.last_dump)
        waiting = [(process.worker, act) for process, act, epoch in self.tickets.values() if process.epoch == epoch]
        assert not waiting, f"nobody has answered {waiting}"

    def _restart(self, saved: int) -> None:
        self.model = self.model.restarted(self.model.saved[saved], self.now)
        self.system = System.restarted(self.dumps[saved], self.now)
        self.ledger = list(self.ledgers[saved])
        self.tickets.clear()
        self.agreeing = False
        for process in self.processes:
            process.attached = False
        self.compare()
        self.agreeing = True

    def teardown(self) -> None:
        """End of an example: nobody may be left waiting."""
        if self.agreeing:
            self._stop()
