"""Which code this is."""

import subprocess
from importlib.metadata import version
from pathlib import Path


def code_version() -> str:
    """The package's version, with the commit (and "dirty" if files differ from it) where this is a checkout."""
    root = Path(__file__).resolve().parent.parent
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
