"""The queue of one worker: two lanes, in each of them the callers take turns."""

from collections import OrderedDict, deque

from deployments.dispatch.work import MAX_CALL_INPUTS, Lane, Part


class Lanes:
    """Parts that wait, by lane and caller. A caller with a thousand parts waits behind one with one."""

    def __init__(self) -> None:
        """Start empty."""
        self._lanes: dict[Lane, OrderedDict[str, deque[Part]]] = {lane: OrderedDict() for lane in Lane}

    def put(self, part: Part, first: bool = False) -> None:
        """Queue a part behind its caller's others, or `first` when it has been tried before."""
        waiting = self._lanes[part.lane].setdefault(part.caller, deque())
        if first:
            waiting.appendleft(part)
        else:
            waiting.append(part)

    @property
    def tokens(self) -> int:
        """Tokens of all that waits."""
        lines = (line for callers in self._lanes.values() for line in callers.values())
        return sum(part.tokens for line in lines for part in line)

    def take(self, lane: Lane, part_tokens: int) -> Part | None:
        """Take the next part of a lane, joined with what else waits there, up to `part_tokens`."""
        joined: Part | None = None
        tokens = 0
        while (caller := next(iter(self._lanes[lane]), None)) is not None:
            waiting = self._lanes[lane][caller]
            part = waiting[0]
            part.drop_unwanted()
            if joined is not None and part.inputs:
                if tokens + part.tokens > part_tokens:
                    return joined
                if (part.attempts, part.version) != (joined.attempts, joined.version):
                    return joined
                if len(joined.inputs) + len(part.inputs) > MAX_CALL_INPUTS:
                    return joined
            self._advance(lane, caller)
            if not part.inputs:
                continue
            tokens += part.tokens
            if joined is None:
                joined = part
            else:
                joined.inputs += part.inputs
                joined.joined += part.joined
        return joined

    def _advance(self, lane: Lane, caller: str) -> None:
        """Take a caller's first part off, and send the caller to the end of the line."""
        callers = self._lanes[lane]
        waiting = callers[caller]
        waiting.popleft()
        if waiting:
            callers.move_to_end(caller)
        else:
            del callers[caller]
