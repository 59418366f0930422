"""Process groups of two ranks, by torch.distributed, for the bytes of tensors beside a session's stream.

The process's default group is the user's own (DistributedDataParallel, torchrun) and is left alone: a backend is built
directly, over a store whose entries travel on the session's stream. So no store listens anywhere, and each end hands the
backend only what the other end of that very session has written. The backend itself (gloo) checks nobody: whoever reaches
its port while a group is made may take the other end's place. Each end therefore shows a token that the other has told it on
the stream before a group is used.

Bytes go in blocks, whose sizes their sender announces on the stream. A block is at most BLOCK_BYTES long and begins at the
next multiple of the alignment. Every wait has a deadline. A group that has failed in any way is closed: another one is made,
with other ports and other tokens, so that bytes of the one are never taken for those of the other.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from farstep_wire.layout import align

BLOCK_BYTES = 8 * 1024 * 1024
DIRECT_BYTES = 128 * 1024
"""A tensor of this size or more has blocks of its own, and its sender copies nothing; smaller ones go together."""
GATHERED_BYTES = 2 * 1024 * 1024
"""Size of a block of several tensors at most."""
TOKEN_BYTES = 16
STEP_SECONDS = 2.0
"""For one wait of the backend while a group is made. Its own attempts to connect end after some five times that."""

_ENTRIES = 64
_KEY_BYTES = 256
_VALUE_BYTES = 64 * 1024
_CLOSING_TAG = 2**30
_ERROR_CHARACTERS = 200


class GroupError(Exception):
    """A process group cannot be made, or is of no more use; the text says why."""


class Unsupported(GroupError):  # noqa: N818 - said of this torch or machine, whatever is tried again
    """There can be no group here."""


def blocks(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges of the blocks in which tensors travel that lie one after another, each aligned.

    ``spans``: where each of them begins and ends; ascending, without overlap.
    """
    result: list[tuple[int, int]] = []
    run: tuple[int, int] | None = None
    for start, stop in spans:
        if stop - start < DIRECT_BYTES and run is not None and stop - run[0] <= GATHERED_BYTES:
            run = run[0], stop
            continue
        if run is not None:
            result.append(run)
            run = None
        if stop - start < DIRECT_BYTES:
            run = start, stop
        else:
            result.extend((at, min(at + BLOCK_BYTES, stop)) for at in range(start, stop, BLOCK_BYTES))
    return result if run is None else [*result, run]


def places(sizes: Sequence[int], total: int) -> list[tuple[int, int]]:
    """Return the ranges of blocks of which the sizes were announced; ValueError where they do not make up the total."""
    found: list[tuple[int, int]] = []
    end = 0
    for size in sizes:
        start = align(end)
        end = start + size
        if not 0 < size <= BLOCK_BYTES or end > total:
            raise ValueError(f"a block of {size} bytes at {start} of {total}; at most {BLOCK_BYTES} are possible")
        found.append((start, end))
    if align(end) < total:
        raise ValueError(f"blocks of {end} bytes in all are announced where {total} are due")
    return found


def _gloo() -> Any:
    import torch.distributed as dist

    kind = getattr(getattr(torch._C, "_distributed_c10d", None), "ProcessGroupGloo", None)
    if not dist.is_available() or kind is None:
        raise Unsupported(f"torch {torch.__version__} here was built without gloo")
    return kind


def _backend(store: Any, rank: int, host: str) -> Any:
    """Return a new gloo backend of two ranks, connected; it listens at the host's address, or as GLOO_SOCKET_IFNAME says."""
    kind = _gloo()
    options = kind._Options()
    options._timeout = timedelta(seconds=STEP_SECONDS)
    options._threads = 1
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    try:
        device = kind.create_device(interface=interface) if interface else kind.create_device(hostname=host)
    except RuntimeError as error:
        place = f"the interface {interface}, which GLOO_SOCKET_IFNAME names" if interface else host
        raise Unsupported(
            f"gloo cannot listen at {place} ({_short(error)}): a proxy, a tunnel or address translation stands in between, "
            f"through which a process group does not reach"
        ) from None
    options._devices = [device]
    return kind(store, rank, 2, options)


def _short(error: Exception) -> str:
    """Return what an error of torch's says, without the place in its source and its advice."""
    text = str(error).partition("\n")[0].partition(". This is typically")[0]
    return (text.rpartition("] ")[2] or text)[:_ERROR_CHARACTERS].rstrip(". ")


def _rendezvous(deadline: float) -> Any:
    """Return one end's part of a store that both ends have in common, for a backend to be built over.

    What the backend writes comes out by ``take``, for the other end's ``put``.
    """
    from torch._C._distributed_c10d import Store

    class Rendezvous(Store):
        def __init__(self) -> None:
            super().__init__()
            self.changed = threading.Condition()
            self._entries: dict[str, bytes] = {}
            self._fresh: dict[str, bytes] = {}
            self._closed = False

        # Called by the backend.

        def set(self, key: str, value: Any) -> None:
            with self.changed:
                self._entries[key] = self._fresh[key] = bytes(value)
                self.changed.notify_all()

        def get(self, key: str) -> bytes:
            self.wait([key])
            return self._entries[key]

        def check(self, keys: list[str]) -> bool:
            return all(key in self._entries for key in keys)

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            with self.changed:
                seconds = max(0.0, deadline - time.monotonic())
                self.changed.wait_for(lambda: self._closed or self.check(keys), seconds)
                if self._closed or not self.check(keys):
                    raise TimeoutError("the other end has not answered in time")

        # Called by its owner.

        def take(self) -> dict[str, bytes]:
            with self.changed:
                fresh, self._fresh = self._fresh, {}
                return fresh

        @property
        def has_news(self) -> bool:
            return bool(self._fresh)

        def put(self, entries: Mapping[str, bytes]) -> None:
            with self.changed:
                if len(self._entries) + len(entries) > _ENTRIES or any(
                    len(key) > _KEY_BYTES or len(value) > _VALUE_BYTES for key, value in entries.items()
                ):
                    raise ValueError(f"{len(entries)} entries of a process group's store are too many or too long")
                self._entries.update(entries)
                self.changed.notify_all()

        def close(self) -> None:
            with self.changed:
                self._closed = True
                self.changed.notify_all()

    return Rendezvous()


class Posted(NamedTuple):
    """A block that is under way, and the backend's word of it."""

    work: Any
    tensor: Tensor


class Group:
    """One end of a group of two. One thread may send, another receive, and any thread close it."""

    def __init__(self, backend: Any, rank: int) -> None:
        self._backend: Any = backend
        self._peer = 1 - rank
        self._process = os.getpid()
        # From 1: the tokens go before.
        self._sent = 1
        self._received = 1
        _live.add(self)

    def post(self, tensor: Tensor) -> Posted:
        """Begin to send a block, uint8 on the CPU, which is to be left alone until ``wait`` has returned."""
        posted = Posted(self._post("send", tensor, self._sent), tensor)
        self._sent += 1
        return posted

    def wait(self, posted: Posted, seconds: float) -> None:
        """Wait until a block has gone through; GroupError, and the group closed, where it does not in that time."""
        self._wait(posted.work, seconds)

    def send(self, tensors: Iterable[Tensor], stall_seconds: float) -> None:
        """Send blocks; GroupError where one does not go through within so many seconds of the last.

        All are under way at once. Afterwards, and after a failure, they are free.
        """
        pending: deque[Posted] = deque()
        try:
            pending.extend(map(self.post, tensors))
            while pending:
                self.wait(pending[0], stall_seconds)
                pending.popleft()
        finally:
            self._end(pending)

    def receive(self, tensors: Iterable[Tensor], stall_seconds: float) -> Iterator[Tensor]:
        """Receive blocks into tensors, uint8 on the CPU, and yield each when its bytes are there; see ``send``."""
        pending: deque[Posted] = deque()
        try:
            for tensor in tensors:
                pending.append(Posted(self._post("recv", tensor, self._received), tensor))
                self._received += 1
            while pending:
                self.wait(pending[0], stall_seconds)
                yield pending.popleft().tensor
        finally:
            self._end(pending)

    def prove(self, own: bytes, other: bytes, seconds: float) -> None:
        """Show the other end its token, and see one's own; GroupError where that takes longer, or somebody else has come."""
        seen = torch.zeros(TOKEN_BYTES, dtype=torch.uint8)
        shown = self._post("send", torch.frombuffer(bytearray(other), dtype=torch.uint8), 0)
        self._wait(self._post("recv", seen, 0), seconds)
        self._wait(shown, seconds)
        if bytes(seen.tolist()) != own:
            self.close()
            raise GroupError("somebody else has taken the other end's place in the process group")

    def _end(self, pending: deque[Posted]) -> None:
        if pending:
            # Closed first: no byte may be read or written any more once the tensors are let go of.
            self.close()
            pending.clear()

    def _post(self, name: str, tensor: Tensor, number: int) -> Any:
        backend = self._backend
        if backend is None:
            raise GroupError("the process group is closed")
        try:
            # By their numbers as tags blocks that are out of step find no counterpart.
            return getattr(backend, name)([tensor], self._peer, number % _CLOSING_TAG)
        except RuntimeError as error:
            self.close()
            raise GroupError(f"the process group broke: {_short(error)}") from None

    def _wait(self, work: Any, seconds: float) -> None:
        try:
            work.wait(timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError as error:
            self.close()
            raise GroupError(f"the process group broke: {_short(error)}") from None

    def close(self) -> None:
        """Give it up; whoever waits is woken. May be called more than once."""
        backend, self._backend = self._backend, None
        if backend is None or self._process != os.getpid():
            return
        # torch's own abort of gloo wakes nobody. An operation whose time is up closes the connection, which does.
        with suppress(RuntimeError):
            backend.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _CLOSING_TAG).wait(timedelta(milliseconds=1))


class Making:
    """A group that is being made, by a thread of its own.

    ``own``: the token that the other end must show; ``other``: the one to show to it. ``error`` says why it has come to
    nothing, ``hopeless`` whether it would again.
    """

    def __init__(self, rank: int, host: str, own: bytes, other: bytes, seconds: float) -> None:
        _gloo()
        self._store = _rendezvous(time.monotonic() + seconds)
        self._rank, self._host = rank, host
        self._own, self._other = own, other
        self._given_up = False
        self.group: Group | None = None
        self.error = ""
        self.hopeless = False
        threading.Thread(target=self._run, name="farstep-group", daemon=True).start()

    @property
    def over(self) -> bool:
        """Whether there is a group, or an error."""
        return self.group is not None or bool(self.error)

    def put(self, entries: Mapping[str, bytes]) -> None:
        """Take what the other end has written; ValueError where that is no such thing."""
        self._store.put(entries)

    def take(self, seconds: float) -> dict[str, bytes]:
        """Return what is new for the other end; wait for it, or for the end, no longer than that."""
        store = self._store
        with store.changed:
            store.changed.wait_for(lambda: store.has_news or self.over, seconds)
        entries: dict[str, bytes] = store.take()
        return entries

    def give_up(self) -> None:
        """Have the thread end in a while, and the group with it."""
        with self._store.changed:
            self._given_up = True
            group, self.group = self.group, None
        self._store.close()
        if group is not None:
            group.close()

    def _run(self) -> None:
        group: Group | None = None
        try:
            group = Group(_backend(self._store, self._rank, self._host), self._rank)
            group.prove(self._own, self._other, 5 * STEP_SECONDS)
            self._finish(group, "")
        except Exception as error:  # noqa: BLE001 - told by whoever waits; the backend raises what it likes
            if group is not None:
                group.close()
            self.hopeless = isinstance(error, Unsupported)
            self._finish(None, str(error) if isinstance(error, GroupError) else _short(error) or repr(error))

    def _finish(self, group: Group | None, error: str) -> None:
        with self._store.changed:
            if not self._given_up:
                self.group, group = group, None
            self.error = error
            self._store.changed.notify_all()
        if group is not None:
            group.close()


def local_address(host: str, port: int) -> str:
    """Return the address of this machine from which packets to another one leave; OSError where none do."""
    import socket

    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


_live: WeakSet[Group] = WeakSet()


def _keep_in_child() -> None:
    # A forked child has none of the backends' threads, and would wait for them for ever when it lets go of one.
    for group in _live:
        if group._backend is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group._backend))


os.register_at_fork(after_in_child=_keep_in_child)
