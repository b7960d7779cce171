"""What an exception means for the run: its failure class, and one message that says what to do."""

import errno
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from rlhf_api.errors import FailureClass, RLHFError

# Of libraries that need not be installed: compared by name.
_NETWORK = {
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "httpx.TransportError",
    "urllib3.exceptions.HTTPError",
}
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NEARLY_FULL = 16 << 20  # bytes free, below which a failed write of an opaque library is put down to the disk


def classify(error: BaseException, work: Path) -> tuple[FailureClass, str]:
    """Failure class and message of an exception, its causes included. `work` is the stage's working folder."""
    chain = list(_causes(error))
    for each in chain:
        if isinstance(each, RLHFError):
            return each.failure, str(each)
    for each in chain:
        if _is_out_of_memory(each):
            return "outOfMemory", f"out of memory: {_first_line(each)}"
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT):
            return "infrastructure", f"disk full while writing {each.filename or work}: free space there and run again"
        if "No space left on device" in str(each):
            return "infrastructure", f"disk full below {work}: free space there and run again"
        if _is_network(each):
            return "infrastructure", f"connection failed: {type(each).__name__}: {_first_line(each)}"
    last = traceback.format_exception_only(error)[-1].strip()
    if work.is_dir() and (free := shutil.disk_usage(work).free) < _NEARLY_FULL:
        return "infrastructure", f"disk full below {work} ({free >> 20} MiB left): free space and run again ({last})"
    return "bug", last


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def _is_network(error: BaseException) -> bool:
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}
    names |= {f"{cls.__module__.split('.')[0]}.{cls.__qualname__}" for cls in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & _NETWORK)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
