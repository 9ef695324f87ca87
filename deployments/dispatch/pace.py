"""How many tokens a call should hold and how long it may take, learned from the calls that were answered."""

from collections import deque

from deployments.dispatch.work import MAX_CALL_INPUTS, Part

# A part is as many tokens as a replica embeds in this time: short enough to let others in between,
# long enough that the hop there and back doesn't count.
PART_SECONDS = 0.1
FIRST_PART_TOKENS = 4096
MIN_PART_TOKENS = 512
MAX_PART_TOKENS = 16_384
# A call that takes this many times as long as the slowest of the last ones has met a replica that hangs.
CUT_FACTOR = 10.0
MIN_CUT_SECONDS = 2.0
RECENT_CALLS = 128
UNKNOWN_CUT_SECONDS = 15.0


class Pace:
    """What one worker's replicas are known to do."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_CALLS)  # seconds, tokens
        self._speeds: deque[float] = deque(maxlen=RECENT_CALLS)  # of the replicas that answered
        self.part_tokens = FIRST_PART_TOKENS

    def learn(self, seconds: float, tokens: int, speed: float) -> None:
        """A call has been answered; `speed` is in tokens per second, as its replica knows it, or 0."""
        self._recent.append((seconds, tokens))
        if not speed:
            return
        self._speeds.append(speed)
        # Not the drain rate: that takes large calls to be known, and includes the way there and back.
        part_tokens = int(self.speed * PART_SECONDS)
        self.part_tokens = min(max(part_tokens, MIN_PART_TOKENS), MAX_PART_TOKENS)

    @property
    def speed(self) -> float:
        """Tokens per second of one replica where it has enough to do; 0 until one has told."""
        return max(self._speeds, default=0.0)

    def is_large(self, part: Part) -> bool:
        """Whether a call is at least half of what one may hold."""
        return 2 * part.tokens >= self.part_tokens or 2 * len(part.inputs) >= MAX_CALL_INPUTS

    def cut_after(self, tokens: int) -> float:
        """Seconds after which a call is taken to hang: many times what the slowest of the last ones took."""
        if not self._recent:
            return UNKNOWN_CUT_SECONDS
        slowest = max(seconds for seconds, _ in self._recent)
        largest = max(tokens for _, tokens in self._recent)
        return max(MIN_CUT_SECONDS, CUT_FACTOR * slowest * max(1.0, tokens / largest))
