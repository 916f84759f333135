"""What a training takes of its machine, as MLflow's system metrics name it."""

import time

import psutil
import torch
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

EVERY = 10.0  # seconds


class MachineWatch:
    """MLflow's monitors of this node, looked at every few seconds."""

    def __init__(self, device: torch.device) -> None:
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        if device.type == "cuda":
            self._monitors.append(GPUMonitor())
        self._last = -EVERY

    def look(self) -> dict[str, float]:
        """{"system/cpu_utilization_percentage": ...}; nothing where it was looked at just before."""
        if time.monotonic() - self._last < EVERY:
            return {}
        self._last = time.monotonic()
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found


def memory_gigabytes(device: torch.device) -> float:
    """The most this process has had on its GPU; without one, what it holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
