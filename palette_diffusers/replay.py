"""A training step's forward and backward pass as one CUDA graph: recorded once, replayed for every batch. The processor
then starts one thing instead of thousands, which takes it longer than a GPU takes to do them in a small network."""

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
        ValueError: a batch of other shapes than the first.
        """
        if not self._batch:
            self._batch = {name: value.clone() for name, value in batch.items()}
            self._replay, self._result = self._record(lambda: self._step(self._batch), self._clear)
            self._gradients = [p.grad for p in self._parameters]
        for name, value in batch.items():
            if value.shape != self._batch[name].shape:
                first = tuple(self._batch[name].shape)
                raise ValueError(f"{name} is {tuple(value.shape)}, expected {first} as in the first batch")
            self._batch[name].copy_(value, non_blocking=True)
        self._replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        return self._result
