"""Exit codes, and the line that a user sees of an error."""

import errno
import os

from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError

USER_ERROR, STOPPED, INTERRUPTED = 2, 3, 130  # exit codes
DISK_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "database or disk is full",
    "PytorchStreamWriter failed",
    "unexpected pos",
)


def user_message(error: BaseException) -> str | None:
    """The line to show for an error the user can mend, None for a bug. Looks through what Ray wraps around it."""
    while (cause := getattr(error, "cause", None)) is not None and isinstance(cause, BaseException):
        error = cause
    if isinstance(error, UserError):
        return hide_credentials(str(error))
    if any(sign in str(error) for sign in DISK_FULL):  # safetensors, SQLite and torch have errors of their own for it
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"no space left on the device{where}: free some, or set work_dir to a larger disk; then run again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return f"{error.filename}: {os.strerror(error.errno)}: check permissions, or set another work_dir"
    return None
