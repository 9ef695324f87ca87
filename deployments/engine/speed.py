"""How fast an engine is, measured while it serves."""

import statistics
from collections import deque

# Calls that end within this time were in one step.
TOGETHER_SECONDS = 0.001
# The speed at steps of one size is the median of the last ones.
RECENT_STEPS = 15
MIN_SECONDS = 1e-6


class EngineSpeed:
    """Tokens per second of the steps that the engine is best at.

    A small step has many seconds for each token, and says nothing about a large one. So steps are kept apart
    by size, and it doesn't matter what was asked for lately: lone texts, or the slices of bulk work.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._since = self._ended = self._step_end = float("-inf")
        self._tokens = 0  # of the step that ended last
        self._recent: dict[int, deque[float]] = {}  # by binary digits of the step's tokens
        self._speeds: dict[int, float] = {}

    @property
    def best(self) -> float:
        """Tokens per second; 0 until two steps have ended."""
        return max(self._speeds.values(), default=0.0)

    def record(self, tokens: int, begun: float, ended: float) -> None:
        """Count a call by when it was given to the engine and when its vectors were there, in seconds.

        What it waited for calls before it isn't the engine's time for it.
        """
        if ended > self._step_end + TOGETHER_SECONDS:
            self._close()
            self._since = max(begun, self._ended)
            self._step_end = ended
        self._ended = ended
        self._tokens += tokens

    def _close(self) -> None:
        """No more calls come to the last step."""
        if self._tokens:
            size = self._tokens.bit_length()
            recent = self._recent.setdefault(size, deque(maxlen=RECENT_STEPS))
            recent.append(self._tokens / max(self._step_end - self._since, MIN_SECONDS))
            self._speeds[size] = statistics.median(recent)
        self._tokens = 0
