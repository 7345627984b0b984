"""Ctrl-C and SIGTERM, heard between the steps of a loop."""

import signal
import sys
from typing import Any


class StopRequest:
    """Ctrl-C and SIGTERM as a request that the loop honours between steps; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step and saving; press Ctrl-C again to end at once", file=sys.stderr)
