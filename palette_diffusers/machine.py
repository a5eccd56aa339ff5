"""What this machine computes fastest with."""

import ctypes
import os
import threading
from contextlib import suppress
from pathlib import Path

import torch

PRIMITIVES = 128  # about three shapes of a network


def best_device() -> str:
    """ "cuda", "mps" or "cpu", the first that is there."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies in it natively; emulated, it is slower than float32."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        try:
            return torch.bfloat16 if "bf16" in Path("/proc/cpuinfo").read_text() else torch.float32
        except OSError:
            pass
    return torch.float32


def best_layout(device: str) -> torch.memory_format:
    """Of a network's weights. On a CPU oneDNN convolves channels-last tensors without reordering them: the starter's
    evaluations take 0.85 of their time (bfloat16 and AMX; 0.9 in float32)."""
    return torch.channels_last if device == "cpu" else torch.preserve_format


def bound_caches() -> None:
    """oneDNN keeps what it prepared for each layer and shape, 1024 times: photographs of ever new sizes fill memory.
    Fewer here, unless `ONEDNN_PRIMITIVE_CACHE_CAPACITY` is set; before the first convolution, and for its process."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))


def bound_arenas() -> None:
    """glibc gives threads heaps of their own, in which a server's many short ones leave holes that add up: one heap for
    those that start from now on. Other systems' allocators are left as they are."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def without_team() -> None:
    """From now on the calling thread computes alone. GNU OpenMP keeps a team of threads for each thread that ever
    computed; where they are more than the cores they sleep whenever they wait, and a small network's evaluations take
    1.2 to 1.6 times as long. Does nothing in the main thread, nor where torch computes by something else."""
    if threading.current_thread() is threading.main_thread():
        return
    torch.get_num_threads()  # or this thread's first computation would set it anew
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).omp_set_num_threads(1)


def memory_full(error: BaseException) -> bool:
    """Whether it says that memory, of this machine or of its accelerator, does not hold what was asked.

    >>> memory_full(RuntimeError("CUDA error: out of memory"))
    True
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("out of memory", "can't allocate", "DefaultCPUAllocator", "ALLOC_FAILED")
    return any(words in str(error) for words in said)


def accelerator_lost(error: BaseException) -> bool:
    """Whether the accelerator failed or is gone, which this process can't mend: every later call to it raises, too.
    Memory that is full is no such thing.

    >>> accelerator_lost(RuntimeError("CUDA error: device-side assert triggered"))
    True
    """
    failed = type(error).__name__ == "AcceleratorError" or str(error).startswith(("CUDA error", "HIP error"))
    return failed and not memory_full(error)


def chosen_device(name: str) -> str:
    """The device of this name; "auto" is the fastest one that is there.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return best_device()
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, index = name.partition(":")
    if not there.get(kind) or (index and not (index.isdecimal() and int(index) < torch.cuda.device_count())):
        raise ValueError(f"device is {name!r}, expected auto or {', '.join(k for k, here in there.items() if here)}")
    return name


def give_memory_back() -> None:
    """What was freed, and what the C library keeps for later, to the system; only glibc can. It keeps a tenth of what a
    large photograph takes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
