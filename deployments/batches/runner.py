"""The one that works all batches off: looks what waits, runs some at a time, ends those out of time."""

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections import Counter

from deployments.api.batches.schema import WINDOW_SECONDS, BatchError
from deployments.batches.records import (
    BATCH,
    FILE,
    Clock,
    FileRecord,
    Order,
    Progress,
    Record,
    is_id,
    made_at,
)
from deployments.batches.run import BatchRun, Embed, Place
from deployments.batches.store import NOBODY, Files, batch_folder, file_folder, load, waiting_path
from deployments.errors import InvalidKeyError
from deployments.keys.ring import KeyRing

logger = logging.getLogger("ray.serve")

# How often the storage is looked at, where nobody says that there is something new.
LOOK_SECONDS = 2.0
# Batches that are run at once, but for one of each owner and model, which always is: batches may stand for
# hours, as while their key's rate is used up or their model has no replica, and keep nobody else waiting.
MAX_RUNNING = 4
# A batch that met a failing storage is run again after that time.
AGAIN_SECONDS = 10.0
# A runner that hasn't said for so long that it lives has ended.
LEASE_SECONDS, RENEW_SECONDS = 30.0, 5.0
SWEEP_SECONDS = 3600.0
# What was begun and never finished is removed after that time.
ORPHAN_SECONDS = 24 * 3600.0
REVOKED = BatchError(code=InvalidKeyError.code, message="the key of this batch isn't valid any more")
RUNNER = "runner.json"
# In place of the model of a batch whose plan hasn't been seen: nothing that batches of several models share.
UNPLANNED = ""


class LostError(Exception):
    """Another runner has the storage."""


class Lease(Record):
    """Who runs the batches, and when it last said so."""

    runner: str
    at: float


class Runner:
    """Runs all batches of a storage; of several runners the one that came last, until it is silent.

    Two at once, as while a node is cut off, would do work twice, and harm nothing: each writes lines into
    objects of its own, and the progress names those that it counts. One that isn't the runner any more writes
    no progress; where it learns that too late, what it wrote is whole all the same.
    """

    def __init__(
        self, files: Files, embed: Embed, keys: KeyRing | None, keep_seconds: int, clock: Clock = time.time
    ) -> None:
        """Do nothing yet; `keep_seconds` is how long a batch is kept after its end."""
        self._files = files
        self._storage = files.storage
        self._embed = embed
        self._keys = keys
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._name = secrets.token_hex(8)
        self._woken = asyncio.Event()
        self._running: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._models: dict[str, str | None] = {}  # of batches whose plan has been seen
        self._not_before: dict[str, float] = {}
        self._has_come = self._is_idle = False
        self._swept = 0.0
        self._sweeping: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Look at once."""
        self._woken.set()

    async def serve(self) -> None:
        """Run for ever."""
        try:
            while True:
                woken = self._woken.is_set()
                self._woken.clear()
                try:
                    await self.turn(woken)
                except Exception as error:  # the storage may be back the next time
                    logger.warning("batches wait: %s", type(error).__name__, exc_info=True)
                # Not `wait_for`: before Python 3.12 it forgets a cancellation that comes as it is woken.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._woken.wait()
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Leave everything as it is."""
        tasks = [task for _, task in self._running.values()]
        tasks += [self._sweeping] if self._sweeping is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def turn(self, woken: bool = True) -> None:
        """Look once: at what runs, what waits, what is too old; `woken`, also for what is to be cancelled."""
        if not await self._is_ours():
            await self.stop()
            return
        for job, _ in list(self._running.values()):
            await self._look(job)
        await self._start(woken)
        if self._clock() - self._swept > SWEEP_SECONDS:
            self._swept = self._clock()
            self._sweeping = asyncio.create_task(self._sweep())

    async def _is_ours(self) -> bool:
        """Whether this is the runner. It is where it comes, and where the other one is silent."""
        now = self._clock()
        lease = await load(self._storage, RUNNER, Lease)
        taken = lease is not None and lease.runner != self._name and now - lease.at < LEASE_SECONDS
        if taken and self._has_come:
            if not self._is_idle:
                logger.warning("another runner has this storage now; each cluster needs its own")
            self._is_idle = True
            return False
        if lease is None or lease.runner != self._name or now - lease.at >= RENEW_SECONDS:
            await self._storage.write(RUNNER, Lease(runner=self._name, at=now).text())
        self._has_come, self._is_idle = True, False
        return True

    async def _check(self) -> None:
        """Raise LostError where another runner has come."""
        lease = await load(self._storage, RUNNER, Lease)
        if lease is not None and lease.runner != self._name:
            raise LostError

    async def _look(self, job: BatchRun) -> None:
        """End a batch that shall not go on."""
        if job.is_over:
            job.end("expired")
        if not self._give_key(job):
            job.end("failed", REVOKED)
        if await self._storage.read(f"{batch_folder(job.owner, job.name)}/cancellation.json") is not None:
            job.end("cancelled")

    def _give_key(self, job: BatchRun) -> bool:
        """Give a batch its key as it is now; return whether it may go on."""
        if self._keys is None:
            return True
        job.key = self._keys.named(job.owner) if job.owner != NOBODY else None
        return job.key is not None

    # --- what waits ----------------------------------------------------------------------------------

    async def _start(self, woken: bool) -> None:
        """Start what waits, the oldest of the owner and model that have the fewest running."""
        now = self._clock()
        waiting = []
        for name in await self._storage.names("waiting"):
            owner, _, batch = name.rpartition("+")
            if is_id(batch, BATCH) and name not in self._running and self._not_before.get(name, 0.0) <= now:
                waiting.append((owner, batch))
        for owner, batch in await self._over(waiting, woken):
            waiting.remove((owner, batch))
            await self._begin(owner, batch)  # it needs no place to end
        while waiting:
            having = Counter(job.owner for job, _ in self._running.values())
            moving = self._groups()
            owner, batch = min(
                waiting, key=lambda each: (moving[self._group(*each)], having[each[0]], each[1])
            )
            if len(self._running) >= MAX_RUNNING and moving[self._group(owner, batch)]:
                return
            waiting.remove((owner, batch))
            await self._begin(owner, batch)

    async def _begin(self, owner: str, batch: str) -> None:
        if await load(self._storage, f"{batch_folder(owner, batch)}/order.json", Order) is None:
            if self._clock() - made_at(batch) > ORPHAN_SECONDS:
                await self._storage.remove(waiting_path(owner, batch))
            return
        name = f"{owner}+{batch}"
        place = Place(secrets.token_hex(8), functools.partial(self._may_work, name), self._check)
        job = BatchRun(owner, batch, self._files, self._embed, self._clock, place)
        await self._look(job)
        self._running[name] = job, asyncio.create_task(self._run(name, job))

    async def _over(self, waiting: list[tuple[str, str]], woken: bool) -> list[tuple[str, str]]:
        """Return those whose time has run out, and those that were cancelled if somebody said so."""
        over = [each for each in waiting if made_at(each[1]) + WINDOW_SECONDS <= self._clock()]
        if woken:
            paths = {f"{batch_folder(*each)}/cancellation.json": each for each in waiting if each not in over}
            over += [paths[path] for path in await self._storage.read_all(paths)]
        return over

    def _group(self, owner: str, batch: str) -> tuple[str, str | None]:
        """Return whose batch it is and its model: None where there are several."""
        return owner, self._models.get(f"{owner}+{batch}", UNPLANNED)

    def _groups(self) -> Counter[tuple[str, str | None]]:
        return Counter(self._group(job.owner, job.name) for job, _ in self._running.values())

    def _may_work(self, name: str, model: str | None) -> bool:
        """Whether a batch has a place among those that run, now that its model is known."""
        self._models[name] = model
        job, _ = self._running[name]
        return len(self._running) <= MAX_RUNNING or self._groups()[self._group(job.owner, job.name)] == 1

    async def _run(self, name: str, job: BatchRun) -> None:
        try:
            await job.run()
            self._not_before.pop(name, None)
            if job.has_ended:
                self._models.pop(name, None)
        except Exception as error:  # whatever it is, the other batches go on
            logger.warning("batch %s waits: %s", job.name, type(error).__name__, exc_info=True)
            self._not_before[name] = self._clock() + AGAIN_SECONDS
        finally:
            del self._running[name]
            self.wake()

    # --- what is too old -------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        try:
            await self._remove_old()
        except Exception as error:  # the next time is soon enough
            logger.warning("old batches stay: %s", type(error).__name__, exc_info=True)

    async def _remove_old(self) -> None:
        """Remove files whose time is over, batches that ended long ago, and what was never finished."""
        now = self._clock()
        for owner in await self._storage.names("files"):
            for name in await self._storage.names(f"files/{owner}"):
                if not is_id(name, FILE):
                    continue
                record = await load(self._storage, f"{file_folder(owner, name)}/record.json", FileRecord)
                orphan = record is None and now - made_at(name) > ORPHAN_SECONDS
                if orphan or (record is not None and record.is_over(now)):
                    await self._files.forget(owner, name, record)
        for owner in await self._storage.names("batches"):
            for name in await self._storage.names(f"batches/{owner}"):
                await self._sweep_batch(owner, name, now)

    async def _sweep_batch(self, owner: str, name: str, now: float) -> None:
        folder = batch_folder(owner, name)
        order = await load(self._storage, f"{folder}/order.json", Order)
        progress = await load(self._storage, f"{folder}/progress.json", Progress)
        if order is None:
            return
        if progress is None or not progress.is_final:
            # One of two runners may have written the end, and the other one after it that there is none.
            await self._storage.write(waiting_path(owner, name), b"")
            return
        # Its output and error files lie in it.
        keep = max(self._keep_seconds, order.output_seconds or 0)
        if now >= order.created_at + WINDOW_SECONDS + keep + ORPHAN_SECONDS:
            await self._storage.remove(folder)
