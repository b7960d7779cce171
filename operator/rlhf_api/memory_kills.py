"""Whether the kernel killed a process for want of memory, which SIGKILL alone does not tell."""

from pathlib import Path
from typing import Final

VMSTAT: Final = Path("/proc/vmstat")


def memory_kills(vmstat: Path = VMSTAT) -> int:
    """How many processes of this machine the kernel ever killed for memory; 0 where it does not say."""
    try:
        counts = dict(line.split() for line in vmstat.read_text().splitlines())
    except (OSError, ValueError):  # not Linux, or not this format
        return 0
    return int(counts.get("oom_kill", 0))
