"""Which code this is, and which job it runs in."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

JOB = "FOT_JOB"  # the environment variable that names the job of a cluster to what it runs
JOB_TAG = "fot.job"  # by which its runs name it


def made_by() -> dict[str, str]:
    """Tags of a run."""
    job = os.environ.get(JOB)
    return {"fot.code": code_version(), **({JOB_TAG: job} if job else {})}


def add_jobs(known: str, new: str) -> str:
    """The jobs that two tags name, each once, the first first."""
    return " ".join(dict.fromkeys(f"{known} {new}".split()))


def code_version() -> str:
    """The package's version, with the commit (and "dirty" if files differ from it) where this is a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return version("fot")
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("fot")
    return f"{version('fot')}+{commit}"
