"""The time of day, and whether it can be trusted: a jump shows against the monotonic clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger("scalabl")

JUMP_SECONDS = 30.0
DISTRUST_SECONDS = 3600.0


class Clock:
    """Seconds since 1970. After a jump nothing is deleted by age for an hour, so that a wrong clock can be put right."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()
        self._trusted_from = monotonic()
        self.jumps = 0

    def now(self) -> float:
        wall, monotonic = self._wall(), self._monotonic()
        jump = wall - monotonic - self._offset
        self._offset += jump
        if abs(jump) > JUMP_SECONDS:
            self.jumps += 1
            self._trusted_from = monotonic + DISTRUST_SECONDS
            logger.warning(
                "the clock jumped by %+.0f s; predictions are not deleted by age for the next %.0f s", jump, DISTRUST_SECONDS
            )
        return wall

    def trusted(self) -> bool:
        """False within an hour of a jump. Ask after `now`."""
        return self._monotonic() >= self._trusted_from
