"""What a process must never do with files of others: run something of theirs, or write where nobody said."""

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

_STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
)
_WRITES = {
    "os.rename": 1,
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.symlink": 1,
    "os.link": 1,
    "os.truncate": 0,
    "os.chmod": 0,
}
"""Event -> which of its arguments is the path that changes."""


class Watch:
    """Writes down, from now on in this process, what is started and what is written outside some folders."""

    def __init__(self, *folders: Path) -> None:
        self.allowed = tuple(str(f) for f in (*folders, "/dev", "/proc"))
        self.temporary = tempfile.gettempdir()
        self.found: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and arguments[0].family == socket.AF_UNIX:
            return  # a loader process handing its batch to this one
        if event in _STARTS:
            self.found.append(f"{event} {arguments[0]!r}")
        elif event == "open":
            path, mode, flags = arguments
            writes = isinstance(mode, str) and set(mode) & set("wax+")
            writes = writes or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._written(event, path)
        elif event in _WRITES and isinstance(arguments[_WRITES[event]], str | bytes | os.PathLike):
            if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
                return  # of shutil.rmtree, by a name within a folder whose own removal is heard
            self._written(event, arguments[_WRITES[event]])

    def _written(self, event: str, path: Any) -> None:
        name = os.path.abspath(os.fsdecode(path))
        if "__pycache__" not in name and not name.startswith(self.allowed):
            self.found.append(f"{event} {name}")
