"""How much memory this process holds."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def peak_memory() -> float:
    """Return the most resident memory that this process ever held, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:  # ru_maxrss would carry over what the parent had before exec
        return int(found[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts in bytes
