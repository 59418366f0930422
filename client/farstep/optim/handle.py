"""``opt.remote``: everything about a hosted optimizer that torch's own surface has no place for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from farstep import inspection
from farstep.inspection import Description, Round, SnapshotInfo
from farstep.session.overlap import BUCKET_BYTES, OverlapOptions, check_modules
from farstep.session.session import Session
from farstep.transports.base import Traffic
from farstep_wire.settings import Settings
from farstep_wire.wire_format import Wire

if TYPE_CHECKING:
    from farstep.optim.proxy import RemoteOptimizer


class RemoteHandle:
    """A view of the hosted optimizer behind a proxy, which it keeps alive. Cheap to make; holds no state of its own.

    What asks the server attaches again where ``close`` has left it.
    """

    def __init__(self, optimizer: RemoteOptimizer) -> None:
        self._optimizer = optimizer

    def __repr__(self) -> str:
        own = self._optimizer._farstep
        standing = f"version {own.link.standing.version}" if own.attached else "not attached"
        return f"<{self.name!r} at {self.address}, {standing}, worker {self.worker}>"

    @property
    def _session(self) -> Session:
        return self._optimizer._farstep_session()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @property
    def name(self) -> str:
        """The hosted optimizer's name on its server."""
        return self._optimizer._farstep.name

    @property
    def address(self) -> str:
        """The server's address."""
        return str(self._optimizer._farstep.address)

    @property
    def worker(self) -> str:
        """This worker's id."""
        return self._optimizer._farstep.worker

    @property
    def version(self) -> int:
        """The version of the parameters that this worker holds: the number of steps committed when it received them."""
        return self._session.link.standing.version

    @property
    def lineage(self) -> str:
        """The hosted optimizer's identity, kept across restarts of its server."""
        return self._session.link.standing.lineage

    @property
    def incarnation(self) -> int:
        """Which life of the hosted optimizer; a rollback starts a new one."""
        return self._session.link.standing.incarnation

    @property
    def device(self) -> str:
        """The device on the server that holds the parameters, such as ``cuda:0``."""
        return self._session.link.standing.device

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received for this optimizer since it was built, reconnects included; asks nobody."""
        return self._optimizer._farstep.traffic

    @property
    def step_traffic(self) -> Traffic:
        """Bytes sent and received in the last ``step``, closure evaluations and reconnects in it included; asks nobody.

        Of sparse gradients only the rows are sent, and only rows come back, where the step has changed no others.
        With ``overlap`` what left before it and what came in after it is not among them; ``traffic`` has that too.
        """
        return self._optimizer._farstep.step_traffic

    @property
    def wire(self) -> Wire:
        """How gradients and parameters are made smaller for the way: what ``Remote(wire_dtype=...)`` means."""
        return self._optimizer._farstep.remote.wire

    @property
    def transport(self) -> str:
        """How tensors travel at the moment: ``"grpc"``, ``"pipe"``, ``"shm"`` or ``"pg"``; see ``Remote``.

        State, averages and sparse gradients travel in messages where shared memory is used.
        """
        return self._session.link.transport

    def pull(self, average: str | None = None) -> int:
        """Overwrite the local parameters with the server's; return their version.

        Args:
            average: ``"ema"`` takes their exponential moving average instead, to evaluate it, say. Training goes on after a
                plain ``pull()``; until then ``step`` refuses. NotFoundError: none is kept (``Settings(ema_decay=...)``).
        """
        return self._session.pull(average)

    def overlap(self, *modules: nn.Module, late_parameters: bool = True, bucket_bytes: int = BUCKET_BYTES) -> None:
        """From now on overlap transfers with computation: the bits stay those without.

        Gradients leave in buckets as ``backward`` finishes them; ``step`` sends those again that were changed since, as by
        clipping. ``step`` returns as soon as it is known what became of it; a module's forward waits for the parameters that
        the module owns. Parameters that are read without a call of their module are found out in the first iteration, and
        ``step`` waits for them. What else reads or changes parameters between ``step`` and the next forward (weight clipping,
        an average of your own, a copy of the model) calls ``opt.remote.wait()`` first; ``state_dict`` of a module need not.

        In shared memory gradients move during ``backward`` anyway, and there is little to win. With a ``wire_dtype`` for
        gradients nothing overlaps.

        Args:
            modules: the model; without any, all modules that own parameters of this optimizer are looked for.
            late_parameters: False has ``step`` wait for all parameters.
            bucket_bytes: how much is sent at once, at least.

        TypeError: what is no module. ValueError: the size is not positive. ConfigurationError: the optimizer drives a closure.
        """
        if bucket_bytes <= 0:
            raise ValueError(f"bucket_bytes must be positive, not {bucket_bytes!r}")
        self._session.overlap(OverlapOptions(check_modules(modules), bucket_bytes, late_parameters))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """With overlap: send no gradients while the context lasts, as for all but the last backward of an accumulation."""
        overlapping = self._session.overlapping
        with nullcontext() if overlapping is None else overlapping.no_sync():
            yield

    def wait(self) -> None:
        """With overlap: wait until all parameters have come in. Returns at once where nothing is on its way."""
        overlapping = self._session.overlapping
        if overlapping is not None:
            overlapping.await_all()

    def accumulate(self) -> None:
        """Move the gradients as they stand to the server, where they wait for this worker's next ``step``.

        Many backward passes so make one step, and the memory of their sum is the server's. What is accumulated is added in
        the order in which it came, as ``backward`` itself adds; the local gradients become None. ``zero_grad`` drops it.
        With a GradScaler, ``unscale_`` before. GradientsLostError, at the next ``step``: the server has lost them.
        """
        session = self._session
        session.accumulate(self._groups)
        for group in self._groups:
            for parameter in group["params"]:
                parameter.grad = None

    @property
    def staleness(self) -> int:
        """How stale the last gradients were: versions committed between the one they were taken at and their own step."""
        return self._session.staleness

    @property
    def settings(self) -> Settings:
        """What the server does around each step, as it stands there."""
        return self.describe().settings

    def set(self, **changes: Any) -> Settings:
        """Change settings of the hosted optimizer, from its next step on; return all as they stand.

        The names are those of ``farstep.Settings``. InvalidRequestError names one that there is not, or a bad value.
        """
        return self._session.ask_server(lambda server: server.configure(self.name, changes))

    def history(self, after: int = 0) -> list[Round]:
        """Return the rounds after that number, oldest first, as far as the server remembers them.

        Each says who took part, how stale the gradients were, how many evaluations there were and how it ended.
        """
        return self._session.ask_server(lambda server: server.history(self.name, after))

    def skip(self) -> bool:
        """Tell the server that this worker has no gradients for this round; take over what the others made of it.

        Returns whether a step was applied: False where all workers of the round skipped it.
        """
        session = self._session
        session.follow(self._groups)
        return session.step(self._groups, abstain=True).applied

    def state(self, parameter: Tensor) -> dict[str, Any]:
        """Return the optimizer state of one parameter, fetched from the server, tensors on the CPU.

        LookupError: the parameter is in no param group.
        """
        parameters = [p for group in self._groups for p in group["params"]]
        index = next((number for number, own in enumerate(parameters) if own is parameter), None)
        if index is None:
            raise LookupError(
                f"a parameter of shape {tuple(parameter.shape)} that is in no param group has no state here"
            )
        session = self._session
        session.follow(self._groups)
        for key, entries in session.get_state([index])[0]:
            if key == index:
                return dict(entries)
        return {}

    def describe(self, *, parameters: bool = False) -> Description:
        """Return version, policy, workers and options as the server has them.

        ``parameters``: also the table of parameters with norms, which makes the server read every tensor once.
        """
        session = self._session
        with inspection.connect(session.address, session.remote.timeouts.seconds("step")) as server:
            return server.describe(self.name, parameters=parameters)

    def checkpoint(self, tag: str | None = None) -> SnapshotInfo:
        """Have the server write a snapshot of the committed state; return once it is durable.

        StorageError: the server was started without ``--data-dir``, or the snapshot could not be written.
        """
        session = self._session
        with inspection.connect(session.address, session.remote.timeouts.seconds("step")) as server:
            return server.save(self.name, tag)

    def close(self) -> None:
        """Leave the hosted optimizer, where attached to it. The next use of the optimizer attaches again."""
        self._optimizer._farstep.close()
