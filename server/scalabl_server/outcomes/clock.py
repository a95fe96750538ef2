"""The time of day, and whether it can be trusted. Jumps are detected by comparison with the monotonic clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger("scalabl")

JUMP_SECONDS = 30.0
DISTRUST_SECONDS = 3600.0


class Clock:
    """The time in seconds since 1970.

    For an hour after a jump the time is not trusted. Predictions are then not deleted because of their age, so that a wrong
    clock can be corrected before it does harm.
    """

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()
        self._trusted_from = monotonic()
        self.jumps = 0

    def now(self) -> float:
        """The time in seconds since 1970; logs a warning if the clock jumped since the last call."""
        wall, monotonic = self._wall(), self._monotonic()
        jump = wall - monotonic - self._offset
        self._offset += jump
        if abs(jump) > JUMP_SECONDS:
            self.jumps += 1
            self._trusted_from = monotonic + DISTRUST_SECONDS
            logger.warning(
                "the clock jumped by %+.0f s; predictions are not deleted because of their age for the next %.0f s",
                jump,
                DISTRUST_SECONDS,
            )
        return wall

    def trusted(self) -> bool:
        """False within an hour after a jump. Call `now` first, since it detects jumps."""
        return self._monotonic() >= self._trusted_from
