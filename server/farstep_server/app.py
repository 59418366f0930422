"""The server process: builds the parts, serves until told to stop, and drains."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from farstep_server.config import ServerConfig
from farstep_server.core.registry import Registry
from farstep_server.core.team import form_team
from farstep_server.hosting.directory import Directory
from farstep_server.hosting.snapshots import Snapshotter
from farstep_server.logs import log_event
from farstep_server.service.checkpoint import CheckpointService
from farstep_server.service.failures import FailureInterceptor
from farstep_server.service.inspection import InspectionService
from farstep_server.service.link import LinkService
from farstep_server.service.optimizer import OptimizerService
from farstep_server.service.steering import SteeringService
from farstep_server.store import SnapshotStore, StoreError
from farstep_wire.errors import Applied, ConfigurationError, DrainingError, StorageError
from farstep_wire.limits import MESSAGE_BYTES
from farstep_wire.v1 import checkpoint_pb2, inspection_pb2, link_pb2, optimizer_pb2, steering_pb2
from farstep_wire.v1.checkpoint_pb2_grpc import add_CheckpointServiceServicer_to_server as add_checkpoint
from farstep_wire.v1.inspection_pb2_grpc import add_InspectionServiceServicer_to_server as add_inspection
from farstep_wire.v1.steering_pb2_grpc import add_SteeringServiceServicer_to_server as add_steering

_LOGGER = logging.getLogger(__name__)
_UNARY_THREADS = 32
_STOP_SECONDS = 2.0

EXIT_SYSTEM = 3
"""The exit code of the command for what the operating system refused."""


def resolve_device(text: str) -> torch.device:
    """Return the device that the configuration names; ConfigurationError where this machine has none such."""
    if text == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda:0" if text == "cuda" else text)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f"device {text!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


class App:
    """One server. ``start`` returns once it serves; ``drain`` ends it in good order.

    OSError: the data directory cannot be used, or is in use by another server.
    """

    def __init__(self, config: ServerConfig, registry: Registry) -> None:
        self._config = config
        self._device = resolve_device(config.device)
        limit = config.memory_budget_bytes()
        self.directory = Directory(registry, self._device, config.lease.total_seconds(), limit)
        self.directory.serves_groups = config.serves_groups
        self.snapshots = self._snapshotter()
        self._health = health.HealthServicer()
        self._threads = config.max_sessions + _UNARY_THREADS
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="farstep-rpc")
        self._server = self._grpc_server()

    def _snapshotter(self) -> Snapshotter | None:
        config = self._config
        if config.data_dir is None:
            return None
        try:
            store = SnapshotStore(config.data_dir, keep=config.snapshot_keep)
            return Snapshotter(store, self.directory, config.snapshot_interval.total_seconds())
        except (StoreError, StorageError) as error:
            raise OSError(str(error)) from error

    def _grpc_server(self) -> grpc.Server:
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ]
        server = grpc.server(
            self._pool, interceptors=[FailureInterceptor()], options=options, maximum_concurrent_rpcs=self._threads
        )
        server.add_generic_rpc_handlers((OptimizerService(self.directory).handler(), LinkService().handler()))
        add_inspection(InspectionService(self.directory, self.snapshots), server)
        add_checkpoint(CheckpointService(self.snapshots), server)
        add_steering(SteeringService(self.directory), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        modules = (optimizer_pb2, inspection_pb2, checkpoint_pb2, steering_pb2, link_pb2)
        own = [service.full_name for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection([*own, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        return server

    def start(self) -> list[str]:
        """Restore what was hosted before, listen and serve; return the addresses, with the ports that were chosen."""
        if self.snapshots is not None:
            # Before anyone can connect: a client that comes back must find what it left.
            self._restore(self.snapshots)
        addresses = self.directory.listening = [self._listen(address) for address in self._config.listen]
        self._server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        if self.snapshots is not None:
            self.snapshots.start()
        for address in addresses:
            log_event(_LOGGER, logging.INFO, "serving", address=address, device=self._device, torch=torch.__version__)
        return addresses

    def _restore(self, snapshots: Snapshotter) -> None:
        try:
            snapshots.restore_all()
        except StorageError as error:
            raise OSError(str(error)) from error

    def _listen(self, address: str) -> str:
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        if address.startswith("unix:"):
            Path(address.removeprefix("unix:")).chmod(0o600)
            return address
        return f"{address.rpartition(':')[0]}:{port}"

    def drain(self, *, wait_for_workers: bool) -> bool:
        """Take no new sessions, let the step under way end, save everything, and stop; return whether all could be saved.

        ``wait_for_workers``: give attached workers the grace period to leave on their own first.
        """
        log_event(_LOGGER, logging.INFO, "draining", grace_seconds=self._config.drain_grace.total_seconds())
        self._health.enter_graceful_shutdown()
        self.directory.drain()
        if wait_for_workers:
            self.directory.wait_until_left(self._config.drain_grace.total_seconds())
        error = DrainingError("the server is shutting down; the contribution was not applied", applied=Applied.NO)
        saved = True
        if self.snapshots is None:
            self.directory.stop_all(error)
        else:
            saved = self.snapshots.suspend_all(error)
        self._server.stop(_STOP_SECONDS).wait()
        self._pool.shutdown(wait=False)
        if self.snapshots is not None:
            self.snapshots.close()
        log_event(_LOGGER, logging.INFO, "stopped")
        return saved


def build_registry(optimizers: tuple[str, ...]) -> Registry:
    """Return the registry with torch's classes, entry points of the group ``farstep.optimizers``, and the named ones."""
    registry = Registry()
    load_entry_points(registry)
    for text in optimizers:
        load_optimizer(registry, text)
    return registry


def load_entry_points(registry: Registry) -> None:
    """Register the classes that installed packages offer."""
    from importlib.metadata import entry_points

    for point in entry_points(group="farstep.optimizers"):
        registry.register(point.name, point.load())


def load_optimizer(registry: Registry, text: str) -> None:
    """Register ``[NAME=]package.module:Class``; ConfigurationError says what is wrong with it."""
    from importlib import import_module

    alias, _, path = text.rpartition("=")
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ConfigurationError(f"optimizer {text!r} is not [NAME=]package.module:Class")
    try:
        cls = getattr(import_module(module), attribute)
        registry.register(alias or attribute, cls, drives_closure=bool(getattr(cls, "farstep_drives_closure", False)))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"optimizer {text!r} cannot be registered: {error}") from error


def serve(config: ServerConfig) -> NoReturn:
    """Run a server until SIGTERM, SIGINT, or the end of stdin where so configured; then end the process.

    Its exit code is 0 where all was saved that is hosted, else EXIT_SYSTEM. OSError: it cannot serve.
    """
    settle_vector_math()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    form_team(_settle_among(torch.get_num_threads()))
    app = App(config, build_registry(config.optimizer))
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    addresses = app.start()
    if config.exit_with_parent:
        threading.Thread(target=_watch_stdin, args=(stop.set,), name="farstep-stdin", daemon=True).start()
    if config.ready_fd is not None:
        with os.fdopen(config.ready_fd, "w") as ready:
            ready.write(json.dumps({"address": addresses[0]}) + "\n")
    stop.wait()
    drained = app.drain(wait_for_workers=config.exit_with_parent)
    if config.exit_with_parent:
        _remove_own_directories(config.listen)
    logging.shutdown()
    # Not by way of the interpreter's end: sessions' threads that come back from native code then would abort the process.
    os._exit(0 if drained else EXIT_SYSTEM)


def _settle_among(threads: int) -> Callable[[int], None]:
    """Return how one of so many threads finds its place: on a processor of its own, where there is just one for each.

    A thread that is handed Python's lock is woken on the processor of the one that let go of it, and would stay there beside it
    for as long as a step takes.
    """
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def settle(number: int) -> None:
        if len(processors) == threads:
            os.sched_setaffinity(0, {processors[number]})

    return settle


def settle_vector_math() -> None:
    """Have MKL choose its kernels while nothing else runs.

    It does so at the first call of each function, and where several threads make that call together one of them may compute its
    part with a kernel of low accuracy, once: a step that is not the one of torch (github.com/pytorch/pytorch/issues/188792).
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in (torch.sqrt, torch.exp, torch.log, torch.sin, torch.cos, torch.tanh):
            function(one)


def _remove_own_directories(addresses: tuple[str, ...]) -> None:
    # An embedded server's owner made a directory for the socket, and may have died without removing it.
    for address in addresses:
        directory = Path(address.removeprefix("unix:")).parent
        if address.startswith("unix:") and directory.name.startswith("farstep-"):
            with suppress(OSError):
                directory.rmdir()


def _watch_stdin(stop: Callable[[], None]) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    stop()
