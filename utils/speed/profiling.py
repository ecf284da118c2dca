"""Where the time of one step goes: kernels, launches, and moments at which the host waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Names of the runtime's events, by what they are to the host.
GROUPS = {
    "launches": ("LaunchKernel",),
    "host_syncs": ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize"),
    "copies_to_host": ("Memcpy DtoH",),
    "numbers_read": ("aten::_local_scalar_dense",),
    "allocations": ("cudaMalloc", "cudaFree"),
}


def profile_step(step: Callable[[], Any], device: torch.device, top: int = 12) -> dict[str, Any]:
    """One profiled run of a warm ``step``.

    Returns ``device_ms`` (sum over kernels; on a CPU over operators), how often each of :data:`GROUPS` occurred, and
    the ``top`` kernels or operators as ``[name, calls, ms]``.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    events = recorded.key_averages()
    if cuda:
        busy = [(e.key, e.count, e.self_device_time_total) for e in events if e.device_type == DeviceType.CUDA]
    else:
        busy = [(e.key, e.count, e.self_cpu_time_total) for e in events]
    busy.sort(key=lambda one: -one[2])
    return {
        "device_ms": sum(one[2] for one in busy) / 1e3,
        **{group: sum(e.count for e in events if any(part in e.key for part in parts))
           for group, parts in GROUPS.items()},
        "top": [[name[:120], calls, round(micro / 1e3, 4)] for name, calls, micro in busy[:top]],
    }  # fmt: skip
