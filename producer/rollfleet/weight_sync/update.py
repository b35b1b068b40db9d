"""One server is refitted: pause, load, tag, verify, resume; bounded, and never left paused.

- The new version is verified while the server stands still: what made a token is never in doubt.
- A server that failed half-way may hold anything: what it was generating is ended with the tokens
  it had, before it goes on.
- Whatever happens, it is resumed: also after a time-out, and when the trainer is interrupted. A
  trainer that is killed cannot; then workers resume it, when the row that it wrote has run out.
- But a trainer that was superseded, after it was frozen for example, stops where it is: another may
  be at the same server. What it may have loaded is tagged so that the other one heals it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from rollfleet_common.errors import RefitError, RollfleetError, SupersededError
from rollfleet_engines.control import PauseMode, RefitDriver
from rollfleet_engines.control_http import CONTROL_S, UnreachableError

__all__ = ["GRACE_S", "Announce", "Load", "Meeting", "Once", "Refit", "UpdateOutcome"]

#: Moves weights to paused servers: called with the version and their URLs.
Load = Callable[[int, Sequence[str]], Awaitable[None]]
#: Puts a version on the board.
Announce = Callable[[], Awaitable[None]]

#: Before the second try to end requests or to resume, and the third.
AGAIN_S = (0.2, 1.0)
#: A server waits so long for the board before it generates with new weights, and for the run's
#: token before it is resumed.
BOARD_S = 2.0
#: What a refit takes beside its limit, at the longest: finding out the engine, the board, the token,
#: and two calls to end what was generated and resume the server, or give it up.
GRACE_S = 2 * CONTROL_S + 2 * BOARD_S + 2 * (sum(AGAIN_S) + (len(AGAIN_S) + 1) * CONTROL_S)
#: The tag of weights that a superseded trainer may have loaded.
SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class UpdateOutcome:
    """How the refit of one server ended."""

    url: str
    #: Why it does not serve the new version; "" if it does.
    why: str = ""
    #: Whether its old weights may be gone.
    touched: bool = True


class Meeting:
    """Where paused servers wait for one transfer that reaches all of them.

    Args:
        load: Called once, when each of `urls` is paused or has dropped out.
        version: What the weights are.
        urls: Who is expected.
    """

    def __init__(self, load: Load, version: int, urls: Sequence[str]) -> None:
        self._load = load
        self._version = version
        self._expected = set(urls)
        self._here: list[str] = []
        self._complete = asyncio.Event()
        self._transfer: asyncio.Task[None] | None = None

    async def come(self, url: str) -> None:
        """`url` is paused: wait for the others, and for the transfer.

        Raises:
            RefitError: The transfer failed.
        """
        self._here.append(url)
        self._missing(url)
        await self._complete.wait()
        assert self._transfer is not None  # noqa: S101 - somebody is here
        try:
            await asyncio.shield(self._transfer)
        except Exception as exc:
            raise RefitError(f"load() raised {type(exc).__name__}: {exc}") from exc

    def leave(self, url: str) -> None:
        """Nobody need wait for `url` any more, here or not. May be repeated."""
        if url in self._here and not self._complete.is_set():
            self._here.remove(url)  # it gave up waiting, and is resumed
        self._missing(url)

    def _missing(self, url: str) -> None:
        self._expected.discard(url)
        if not self._expected and not self._complete.is_set():
            if self._here:
                load = self._load(self._version, sorted(self._here))
                self._transfer = asyncio.ensure_future(load)
            self._complete.set()

    def close(self) -> None:
        """Nobody waits any more: end a transfer that still runs."""
        if self._transfer is not None:
            self._transfer.cancel()


class Once:
    """An announcement that many wait for and one makes."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether it is made, or being made."""
        return self._task is not None

    async def soon(self) -> None:
        """Make it, but wait for no more than :data:`BOARD_S`: a server stands still meanwhile."""
        self._begin()
        assert self._task is not None  # noqa: S101
        await asyncio.wait({self._task}, timeout=BOARD_S)

    async def end(self) -> None:
        """Make it, and wait until it is made."""
        self._begin()
        assert self._task is not None  # noqa: S101
        await self._task

    def close(self) -> None:
        """Nobody waits any more."""
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        if self._task is None:
            self._task = asyncio.ensure_future(self._announce())


class Refit:
    """How servers are refitted to one version.

    Args:
        version: What they serve afterwards.
        mode: What becomes of requests in flight.
        limit_s: For all of it but resuming.
        check: Raises SupersededError if another trainer has opened the run.
        load: Makes the paused server of a driver hold the weights, and tag them.
        ready: Awaited when a server holds them, before it generates again; must be bounded.
        leave: Told the URL of a server whose turn to load is over, however it went.
    """

    def __init__(
        self,
        version: int,
        mode: PauseMode,
        limit_s: float,
        check: Callable[[], Awaitable[None]],
        load: Callable[[RefitDriver], Awaitable[None]],
        ready: Callable[[], Awaitable[None]],
        leave: Callable[[str], None],
    ) -> None:
        self.version = version
        self.mode = mode
        self.limit_s = limit_s
        self._check = check
        self._load = load
        self._ready = ready
        self._leave = leave

    async def run(
        self, driver: RefitDriver, resuming: dict[str, asyncio.Task[str]]
    ) -> UpdateOutcome:
        """Refit the server of `driver`; its failure is an outcome, not an error.

        `resuming` holds the tasks that resume servers, by URL: the caller's to await before it ends,
        or refits the same server again.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        sent = touched = False
        why = "the trainer was interrupted"
        try:
            by = asyncio.get_running_loop().time() + self.limit_s
            async with asyncio.timeout_at(by):
                await self._check()
                sent = True
                await driver.pause(self.mode)
                await self._check()
            touched = True
            # Anew: a time-out that meets an answer of Redis may be lost (rollfleet_common.tasks).
            async with asyncio.timeout_at(by):
                await self._load(driver)
                await self._verify(driver)
            why = ""
            await self._ready()
        except UnreachableError as exc:
            why, sent = str(exc), touched
        except TimeoutError:
            why = f"it was not done within {self.limit_s:g} s (refit_s)"
        except RefitError as exc:
            why = str(exc)
        finally:
            self._leave(driver.url)
            if sent:
                resume = self._resume(driver, touched=touched, broken=touched and bool(why))
                task = resuming[driver.url] = asyncio.ensure_future(resume)
                task.add_done_callback(lambda _: resuming.pop(driver.url, None))
                paused = await asyncio.shield(task)
                why = "; ".join(filter(None, (why, paused)))
        return UpdateOutcome(driver.url, why, touched)

    async def _verify(self, driver: RefitDriver) -> None:
        said = await driver.says()
        if said is not None and said != str(self.version):
            raise RefitError(f"it reports version {said!r} after it was given {self.version}")

    async def _resume(self, driver: RefitDriver, *, touched: bool, broken: bool) -> str:
        """Let a server go on; returns why it may still be paused, or ""."""
        try:
            async with asyncio.timeout(BOARD_S):
                await self._check()
        except SupersededError as exc:
            if touched:
                await _insist(lambda: driver.tag(SUPERSEDED))
            return str(exc)
        except (RollfleetError, TimeoutError):
            pass  # whoever holds the run: it must not stand still
        if broken:
            # Also where the engine knows no such route, it must go on.
            await _insist(driver.abort)
        why = await _insist(driver.resume)
        return f"it could not be resumed and may be paused: {why}" if why else ""


async def _insist(call: Callable[[], Awaitable[None]]) -> str:
    """Make a call that may be repeated, up to three times; returns why it failed, or ""."""
    why = ""
    for wait_s in (0.0, *AGAIN_S):
        await asyncio.sleep(wait_s)
        try:
            await call()
        except RefitError as exc:
            why = str(exc)
        else:
            return ""
    return why
