"""The machine a run ran on, and how much memory a stretch of it took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch


def describe() -> dict[str, Any]:
    """CPU, cores, memory, device and versions, as the report's last lines show them."""
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def free_bytes() -> int:
    """Memory where models lie that nobody uses."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass
class Measured:
    """Seconds and peak bytes of one stretch; the peak is the device's where there is one, else the process's."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextlib.contextmanager
def measured() -> Iterator[Measured]:
    """Measure a block: wall-clock seconds and peak memory."""
    result = Measured()
    started = time.perf_counter()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    _give_back()
    resettable = _reset_high_water()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - started
        if cuda:
            result.peak_bytes = torch.cuda.max_memory_allocated()
        else:
            # ru_maxrss is in kB on Linux, and the peak of the whole process where Linux's counter cannot be reset
            status = _high_water() if resettable else 0
            result.peak_bytes = status or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _give_back() -> None:
    """Return freed memory to the system, so that a peak is of this stretch and not of what went before."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0
