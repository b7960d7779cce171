"""Where a stage's result goes: a file that appears whole, or the termination message of its pod."""

import errno
from pathlib import Path

from rlhf_api.stage import StageResult

# A bind mount is busy; the folder around it is another's, or read-only.
_NOT_REPLACEABLE = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS}


def write_result(path: Path, result: StageResult) -> None:
    """Write a result of at most 4 KiB: replacing the file in one step, or in place where it cannot be replaced.

    In place is how /dev/termination-log is written, which is mounted over; the kubelet reads it when the process
    has ended. Raises OSError if neither can be done.
    """
    data = result.to_bytes()
    if path.exists() and not path.is_file():  # a device or pipe, which a file must not take the place of
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _NOT_REPLACEABLE:
            raise
        path.write_bytes(data)
        _remove(temporary)


def _remove(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError as error:  # it could not be made there either
        if error.errno not in _NOT_REPLACEABLE:
            raise
