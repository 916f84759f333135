import psutil
import torch

from jobs.train.machine import MachineWatch, memory_gigabytes


def test_the_machine_is_looked_at_now_and_then(monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    machine = MachineWatch(torch.device("cpu"))
    found = machine.look()
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(found)
    used = psutil.virtual_memory().used / 1e6
    assert abs(found["system/system_memory_usage_megabytes"] - used) < 2000
    now[0] += 9
    assert machine.look() == {}
    now[0] += 1
    assert machine.look().keys() == found.keys()


def test_memory_is_what_this_process_holds() -> None:
    before = memory_gigabytes(torch.device("cpu"))
    block = torch.ones(100_000_000)
    assert memory_gigabytes(torch.device("cpu")) - before > 0.35
    del block
