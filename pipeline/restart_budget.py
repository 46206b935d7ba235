"""How often something is started again within a while: a fleet's servers, and the run itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class RestartBudget:
    """most, within_s: so many restarts within so many seconds. clock: seconds."""

    def __init__(self, most: int, within_s: float, clock: Callable[[], float] = time.monotonic):
        self.most, self.within_s, self._clock = most, within_s, clock
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """Whether there is one left, which is taken."""
        now = self._clock()
        while self._times and now - self._times[0] >= self.within_s:
            self._times.popleft()
        if len(self._times) >= self.most:
            return False
        self._times.append(now)
        return True

    @property
    def taken(self) -> int:
        """Within the window, at the last `take`."""
        return len(self._times)
