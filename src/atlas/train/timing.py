"""How long the start of a run takes, in parts."""

import time


class Parts:
    """Wall-clock seconds of each part, in order. One ends where the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """The part `name` ends now."""
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 2), now

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s to the end of the first step ({parts})"
