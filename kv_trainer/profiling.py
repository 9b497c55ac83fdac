"""What each part of a step takes: `with part("alignment"): ...` costs nothing unless a profile is being made."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def clocks() -> dict[str, float]:
    """Seconds of the wall, and of the processor a thread."""
    return {"wall": time.monotonic(), "processor": time.process_time() / torch.get_num_threads()}


class Profile:
    """Seconds of each part, those of parts within it taken off, so that all of them add up to the whole.

    device: on a GPU every change of part waits for all kernels, which makes the steps themselves somewhat slower.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0
        self._wait: Callable[[], None] | None = torch.cuda.synchronize if device and device.type == "cuda" else None

    def _turn(self) -> None:
        """Whatever ran until now belongs to the innermost open part."""
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def begin(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def end(self) -> None:
        self._turn()
        self._open.pop()


_current: Profile | None = None


def start(profile: Profile | None) -> None:
    """From here on parts are counted in this profile, or in none."""
    global _current
    _current = profile


@contextmanager
def part(name: str) -> Iterator[None]:
    profile = _current
    if profile is None:
        yield
        return
    profile.begin(name)
    try:
        yield
    finally:
        profile.end()
