"""A training step's forward and backward pass, or a forward pass alone, as one CUDA graph: recorded once, replayed for
every batch. The processor then starts one thing instead of thousands, which takes it longer than a GPU takes to do them
in a small network."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM_UP = 3  # steps before recording, in which kernels are chosen and compiled


def record(compute: Callable[[], torch.Tensor], clear: Callable[[], None]) -> tuple[Callable[[], None], torch.Tensor]:
    """`compute`, on what it reads now, as a CUDA graph: what replays it, and the tensor that each replay writes its
    result to. `clear` takes away the gradients, which are written, not added to, at each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            clear()
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    clear()
    graph = torch.cuda.CUDAGraph()
    # other threads, which fetch batches, may go on meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute()
    return graph.replay, result


class Replay:
    """Calls of `step` (a batch => a tensor; it leaves gradients in the parameters) by replaying its first.

    The result, and the gradients, are valid until the next call.

    Args:
        step: reads nothing but its batch and tensors that stay where they are, and waits for nothing.
        parameters: those that get gradients.
        record: as `record`; for tests without a GPU.
    """

    def __init__(
        self,
        step: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        parameters: Sequence[torch.nn.Parameter],
        record: Callable[..., Any] = record,
    ):
        self._step, self._parameters, self._record = step, list(parameters), record
        self._batch: dict[str, torch.Tensor] = {}

    def _clear(self) -> None:
        for p in self._parameters:
            p.grad = None

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Raises:
        ValueError: a batch of other names or shapes than the first.
        """
        if not self._batch:
            self._batch = {name: value.clone() for name, value in batch.items()}
            self._replay, self._result = self._record(lambda: self._step(self._batch), self._clear)
            self._gradients = [p.grad for p in self._parameters]
        if batch.keys() != self._batch.keys():
            names, first_names = (", ".join(sorted(given)) for given in (batch, self._batch))
            raise ValueError(f"the batch has {names}, expected {first_names} as in the first batch")
        for name, value in batch.items():
            if value.shape != self._batch[name].shape:
                first = tuple(self._batch[name].shape)
                raise ValueError(f"{name} is {tuple(value.shape)}, expected {first} as in the first batch")
            self._batch[name].copy_(value, non_blocking=True)
        self._replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        return self._result


class ReplayedForward:
    """Calls of `predict` (tensors of a batch of B each, or one number for all => a tensor of B) by replaying. Batches
    are filled up to a multiple of `rows`, and what has the same shapes then is recorded once, on the device of the
    first tensor.

    Args:
        predict: treats every row alike, leaves no gradients and waits for nothing.
        record: as `record`; for tests without a GPU.
    """

    def __init__(self, predict: Callable[..., torch.Tensor], rows: int = 16, record: Callable[..., Any] = record):
        self._predict, self._rows, self._record = predict, rows, record
        self._recorded: dict[tuple, tuple[list[torch.Tensor], Callable[[], None], torch.Tensor]] = {}

    def __call__(self, *given: torch.Tensor) -> torch.Tensor:
        """Raises:
        ValueError: tensors of batches that differ in size.
        """
        count, device = len(given[0]), given[0].device
        size = -(-count // self._rows) * self._rows
        given = tuple(t if t.dim() else t.expand(count) for t in given)
        if any(len(t) != count for t in given):
            shapes = ", ".join(str(tuple(t.shape)) for t in given)
            raise ValueError(f"the tensors are {shapes}, expected batches of the same size, or one number for all")
        key = size, *((t.shape[1:], t.dtype) for t in given)
        if key not in self._recorded:
            kept = [t[:1].to(device).repeat_interleave(size, 0) for t in given]
            self._recorded[key] = kept, *self._record(lambda: self._predict(*kept), lambda: None)
        kept, replay, result = self._recorded[key]
        for mine, t in zip(kept, given, strict=True):
            mine[:count].copy_(t, non_blocking=True)
        replay()
        return result[:count].clone()
