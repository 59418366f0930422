"""The engine of one hosted optimizer: the real ``torch.optim`` object on its parameters, stepped whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from farstep_server.core.changes import changed_by
from farstep_server.core.default_dtype import default_dtype
from farstep_server.core.gradients import Gradients
from farstep_server.core.means import Means
from farstep_server.core.options import GroupEdits, apply_edits, difference, edited_options, frozen_options
from farstep_server.core.parameters import ParameterStore
from farstep_server.core.registry import OptimizerEntry
from farstep_server.core.rehearsal import rehearse
from farstep_server.core.sliced import bare_step, step_in_slices
from farstep_server.core.undo import Undo
from farstep_wire.errors import Applied, ArgumentsError, FarstepError, StepFailedError
from farstep_wire.layout import Layout
from farstep_wire.settings import Settings


def to_cpu(value: Any) -> Any:
    """Return a copy of a tree of state on the CPU, independent of the original."""
    if isinstance(value, Tensor):
        copy = value.detach().cpu()
        return copy.clone() if value.device.type == "cpu" else copy
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_cpu(item) for item in value]
    if isinstance(value, tuple):
        return tuple(to_cpu(item) for item in value)
    return value


class Engine:
    """Optimizer and parameters. The owner alone calls it."""

    def __init__(
        self,
        entry: OptimizerEntry,
        arguments: Mapping[str, Any],
        layout: Layout,
        options: Sequence[Mapping[str, Any]],
        contents: Tensor,
        device: torch.device,
        scalar_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.entry = entry
        self.scalar_dtype = scalar_dtype
        self.store = ParameterStore(layout, device, contents)
        self._arguments = arguments
        self.optimizer = self._construct(options)
        self._bare_step = bare_step(self.optimizer)
        self._proven: set[frozenset[tuple[int, str]]] = set()
        self._loaded = False
        """Whether the state is one that was loaded and that no step has gone through with yet."""
        self._means: Means | None = None

    def _construct(self, options: Sequence[Mapping[str, Any]]) -> Optimizer:
        parameters = iter(self.store.tensors)
        groups = [
            {"params": [next(parameters) for _ in range(size)], **group}
            for size, group in zip(self.layout.group_sizes, options, strict=True)
        ]
        try:
            return self._build(groups)
        except Exception as error:
            raise ArgumentsError(f"{self.entry.cls.__name__} could not be built on the server: {error}") from error

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        with default_dtype(self.scalar_dtype):
            return self.entry.cls(groups, **self._arguments)

    @property
    def layout(self) -> Layout:
        """The layout as it stands."""
        return self.store.layout

    def read_state(self, indices: Sequence[int] = ()) -> list[list[Any]]:
        """Return state as [[parameter index or other key, entries], ...], copied to the CPU."""
        numbers = {id(tensor): index for index, tensor in enumerate(self.store.tensors)}
        wanted = set(indices)
        result = []
        for key, entries in self.optimizer.state.items():
            number: Any = numbers[id(key)] if isinstance(key, Tensor) else key
            if not wanted or number in wanted:
                plain = dict(entries) if isinstance(entries, dict) else entries
                result.append([number, to_cpu(plain)])
        return result

    def load_state(self, state: Sequence[tuple[Any, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Replace state and options as torch's ``load_state_dict`` does."""
        first = 0
        packed = []
        for size, options in zip(self.layout.group_sizes, groups, strict=True):
            packed.append({**options, "params": list(range(first, first + size))})
            first += size
        with self.undone_on_error(StepFailedError, "load_state_dict"):
            self.optimizer.load_state_dict({"state": dict(state), "param_groups": packed})
        self._proven.clear()
        self._loaded = True

    def restore_state(self, state: Sequence[tuple[Any, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Replace state and options by what ``read_state`` gave, bit for bit.

        ``load_state_dict`` puts each tensor on its device, but also converts most to their parameter's dtype, which need not
        be the one that the optimizer had chosen for them.
        """
        self.load_state(state, groups)
        for key, entries in state:
            owner = self.store.tensors[key] if isinstance(key, int) else key
            self.optimizer.state[owner] = _same_dtypes(self.optimizer.state[owner], entries)

    def add_group(self, group: Layout, options: Mapping[str, Any], contents: Tensor) -> None:
        """Add a param group."""
        layout = self.layout.extended(group)
        store = self.store.extended(layout, group, contents)
        try:
            self.optimizer.add_param_group({"params": store.tensors[-len(group.parameters) :], **options})
        except Exception as error:
            raise ArgumentsError(f"add_param_group failed on the server: {error}", applied=Applied.NO) from error
        self.store = store
        self._proven.clear()

    @contextmanager
    def undone_on_error(self, kind: type[FarstepError], what: str) -> Iterator[None]:
        """Undo whatever happens in the block if it raises, and raise ``kind`` from it."""
        undo = Undo(self.optimizer, self.store, self.entry)
        try:
            yield
        except Exception as error:
            undo.restore()
            raise kind(str(error), applied=Applied.NO) from error

    def undo(self) -> Undo:
        """Return the way back to the state as it is now."""
        return Undo(self.optimizer, self.store, self.entry)

    def gradient(self, number: int) -> Tensor | None:
        """Return what a parameter was stepped with last, as it lies there by now."""
        return self.store.tensors[number].grad if self._means is None else self._means.again(number)

    def set_gradients(self, gradients: Gradients) -> None:
        """Hand each parameter its gradient."""
        self._means = None
        for tensor, gradient in zip(self.store.tensors, gradients, strict=True):
            tensor.grad = gradient

    def write_parameters(self, edited: Mapping[int, Tensor]) -> None:
        """Take over parameters that a user changed on a worker."""
        if edited:
            self.store.before_write()
        with torch.no_grad():
            for index, value in edited.items():
                self.store.tensors[index].copy_(value)

    def edit_options(self, edits: GroupEdits) -> None:
        """Set and remove options without a step."""
        if not _harmless(self.optimizer, edits):
            self._proven.clear()
        apply_edits(self.optimizer, edits)

    def clip_gradients(self, settings: Settings) -> None:
        """Clip the gradients as the settings say."""
        if settings.clip_grad_norm is None and settings.clip_grad_value is None:
            return
        tensors = [tensor for tensor in self.store.tensors if tensor.grad is not None]
        if tensors and settings.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors, settings.clip_grad_norm, settings.norm_type)
        if tensors and settings.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_(tensors, settings.clip_grad_value)

    def step(
        self,
        gradients: Gradients | Means,
        edits: GroupEdits,
        edited: Mapping[int, Tensor],
        settings: Settings,
        lr_divisor: int = 1,
    ) -> GroupEdits:
        """Apply edits and clipped gradients in one step; return the options that the optimizer itself changed.

        ``gradients`` that are yet to be made cannot be clipped, and are for torch's own classes. ``lr_divisor``: what the
        learning rate of this one step is divided by.

        StepFailedError: the optimizer raised. Everything is as before, and ``applied`` says NO; for an input of a kind that
        this optimizer has stepped with before, or rehearsed, there is no undo copy, and ``applied`` says UNKNOWN.
        """
        if not _harmless(self.optimizer, edits):
            self._proven.clear()
        signature = _signature(gradients)
        undo = None if self._goes_through(signature, gradients, edits) else self.undo()
        journal = self.store.journal
        # In shared memory workers may have adopted the arena, and write to it themselves.
        writes, alone = journal.writes, self.store.shared is None
        try:
            changed = self._step(gradients, edits, edited, settings, lr_divisor)
        except Exception as error:
            if undo is None:
                raise StepFailedError(str(error), applied=Applied.UNKNOWN) from error
            undo.restore()
            raise StepFailedError(str(error), applied=Applied.NO) from error
        self._proven.add(signature)
        self._loaded = False
        if signature and self.entry.trusted and alone:
            changes = changed_by(self.optimizer, self.layout, gradients, edited)
            if changes is not None:
                journal.note(writes, changes)
        return changed

    def _goes_through(
        self, signature: frozenset[tuple[int, str]], gradients: Gradients | Means, edits: GroupEdits
    ) -> bool:
        """Whether a step with such gradients can be made without a way back."""
        if not self.entry.trusted:
            return False
        if signature in self._proven:
            return True
        options = edited_options(self.optimizer, edits)
        sizes, tensors = self.layout.group_sizes, self.store.tensors
        return not self._loaded and rehearse(self._build, sizes, options, tensors, gradients)

    def _step(
        self,
        gradients: Gradients | Means,
        edits: GroupEdits,
        edited: Mapping[int, Tensor],
        settings: Settings,
        lr_divisor: int,
    ) -> GroupEdits:
        apply_edits(self.optimizer, edits)
        self.write_parameters(edited)
        if not isinstance(gradients, Means):
            self.set_gradients(gradients)
            self.clip_gradients(settings)
        self.store.before_write()
        with _divided_lr(self.optimizer, lr_divisor):
            return self._run_in_slices(gradients) if isinstance(gradients, Means) else self._run()

    def _run_in_slices(self, means: Means) -> GroupEdits:
        if self._means is None:
            self.set_gradients([None] * len(self.store.tensors))
        self._means = means
        state_is_there = not self._loaded and _signature(means) in self._proven
        with default_dtype(self.scalar_dtype):
            step_in_slices(self.optimizer, self._bare_step, self.store.tensors, means, shared=state_is_there)
        return {}

    def _run(self) -> GroupEdits:
        with default_dtype(self.scalar_dtype):
            if self.entry.trusted:
                self._bare_step()
                return {}
            before = frozen_options(self.optimizer)
            self.optimizer.step()
        return difference(before, self.optimizer.param_groups)


@contextmanager
def _divided_lr(optimizer: Optimizer, divisor: int) -> Iterator[None]:
    if divisor == 1:
        yield
        return
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    try:
        for group, rate in rates:
            group["lr"] = rate / divisor
        yield
    finally:
        for group, rate in rates:
            group["lr"] = rate


def _signature(gradients: Gradients | Means) -> frozenset[tuple[int, str]]:
    """Return which gradients are absent or sparse."""
    if isinstance(gradients, Means):
        return frozenset((number, "absent") for number in gradients.absent_ones)
    return frozenset(
        (index, "absent" if gradient is None else "sparse")
        for index, gradient in enumerate(gradients)
        if gradient is None or gradient.layout is not torch.strided
    )


def _same_dtypes(loaded: Any, given: Any) -> Any:
    if isinstance(loaded, Tensor) and isinstance(given, Tensor):
        return loaded if loaded.dtype == given.dtype else given.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(given, dict):
        return {key: _same_dtypes(value, given.get(key)) for key, value in loaded.items()}
    if isinstance(loaded, list) and isinstance(given, list):
        return [_same_dtypes(value, other) for value, other in zip(loaded, given, strict=True)]
    if isinstance(loaded, tuple) and isinstance(given, tuple):
        return tuple(_same_dtypes(value, other) for value, other in zip(loaded, given, strict=True))
    return loaded


def _harmless(optimizer: Optimizer, edits: GroupEdits) -> bool:
    return all(
        not removed
        and all(type(value) is type(optimizer.param_groups[number].get(key)) is float for key, value in changed.items())
        for number, (changed, removed) in edits.items()
    )
