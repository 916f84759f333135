"""What a benchmark ran on."""

import datetime
import os
import platform

import torch

from jobs.common.version import code_version


def heading(device: torch.device) -> str:
    """One line: date, code version, hardware, threads, torch version."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{datetime.date.today()}, {code_version()}, {hardware}, {threads}, torch {torch.__version__}"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
