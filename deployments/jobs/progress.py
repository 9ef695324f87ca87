"""What a job tells while it runs: a bar on a terminal, else a line now and then."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TextIO

LINE_SECONDS = 10.0


class Progress(ABC):
    """Is told of rows, with or without a vector, and of their tokens; knows both in all, and by second."""

    def __init__(self, rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin now, of so many rows in all."""
        self._all, self._clock = rows, clock
        self._rows = self._tokens = self._rows_before = self._tokens_before = 0
        self._begun = clock()

    def resumed(self, rows: int, tokens: int) -> None:
        """Earlier runs have done so much, which says nothing of the speed."""
        self._rows = self._rows_before = rows
        self._tokens = self._tokens_before = tokens
        self._begun = self._clock()

    def done(self, rows: int, tokens: int) -> None:
        """So much more is done."""
        self._rows += rows
        self._tokens += tokens

    @abstractmethod
    def close(self) -> None:
        """There is no more to tell."""

    @property
    def tokens_told(self) -> str:
        """The tokens, and how fast they come."""
        seconds = max(self._clock() - self._begun, 1e-9)
        return f"{(self._tokens - self._tokens_before) / seconds:,.0f} tokens/s, {self._tokens:,} tokens"

    def __str__(self) -> str:
        """Return how far it is, in one line."""
        fresh = self._rows - self._rows_before
        seconds = self._clock() - self._begun
        left = f"{(self._all - self._rows) * seconds / fresh:,.0f} s left" if fresh else "no speed yet"
        return f"{self._rows:,} of {self._all:,} rows, {self.tokens_told}, {left}"


class Bar(Progress):
    """tqdm's bar, with tokens beside it."""

    def __init__(self, rows: int) -> None:
        """Show it."""
        from tqdm import tqdm

        super().__init__(rows)
        self._bar: Any = tqdm(total=rows, unit=" rows", dynamic_ncols=True, file=sys.stderr)

    def resumed(self, rows: int, tokens: int) -> None:
        """Begin the bar there."""
        super().resumed(rows, tokens)
        self._bar.initial = self._bar.n = rows
        self._bar.refresh()

    def done(self, rows: int, tokens: int) -> None:
        """Advance it."""
        super().done(rows, tokens)
        self._bar.set_postfix_str(self.tokens_told, refresh=False)
        self._bar.update(rows)

    def close(self) -> None:
        """Leave it as it is."""
        self._bar.close()


class Lines(Progress):
    """A line every ten seconds, for logs."""

    def __init__(self, rows: int, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Tell nothing yet."""
        super().__init__(rows, clock)
        self._out, self._told = out, clock()

    def resumed(self, rows: int, tokens: int) -> None:
        """Say where the job goes on."""
        super().resumed(rows, tokens)
        if rows:
            print(f"going on after {rows:,} rows", file=self._out, flush=True)

    def done(self, rows: int, tokens: int) -> None:
        """Print a line if it is time to."""
        super().done(rows, tokens)
        if self._clock() >= self._told + LINE_SECONDS:
            self._told = self._clock()
            print(self, file=self._out, flush=True)

    def close(self) -> None:
        """Print how it ended."""
        print(self, file=self._out, flush=True)


def progress(rows: int) -> Progress:
    """Return a bar where somebody watches, else lines."""
    return Bar(rows) if sys.stderr.isatty() else Lines(rows, sys.stderr)
