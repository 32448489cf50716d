"""A target server of the online simulator is this process: its forwards are waits.

It reads lines: `N SECONDS` begins forward N, which takes so long, and `N` alone abandons it at
once. It writes lines: `ready` when it begins, then `N whole` or `N abandoned`. One forward is under
way at a time. It ends when nobody can write to it any more, so it is never left behind.

`python -I -S server.py` starts in about ten milliseconds; hence the standard library only.
"""

import contextlib
import os
import select
import time


def serve(incoming: int, outgoing: int) -> None:
    """Serve the pipe `incoming` and answer in the pipe `outgoing` until the first one ends."""
    os.write(outgoing, b"ready\n")
    running, end, rest = b"", 0.0, b""  # no name: no forward is under way
    while True:
        left = max(0.0, end - time.monotonic()) if running else None
        if select.select([incoming], [], [], left)[0]:
            if not (data := os.read(incoming, 4096)):
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                name, *seconds = line.split()
                if seconds:
                    running, end = name, time.monotonic() + float(seconds[0])
                elif name == running:  # else it had ended before this came
                    os.write(outgoing, name + b" abandoned\n")
                    running = b""
        else:
            os.write(outgoing, running + b" whole\n")
            running = b""


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve(0, 1)
