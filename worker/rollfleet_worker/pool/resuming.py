"""Generations that outlive the server that began them: cut off anywhere, gone on with anywhere.

- A completion is asked for in segments of at most `segment_tokens`. What a dying or hanging server
  can take with it is one segment; prefix caching makes the next one cheap where the server stays.
- What was cut off (an abort, a pause, a death) goes on from its tokens, on the original budget, on
  whichever server the engine below picks. Only attempts without a single new token are counted.
- A stop token, a stop by the server, or the end of its context ends the whole completion; the end
  of a segment does not, nor does a refusal by another server than the one that made the last segment.
- Sampling that looks back on the completion (:func:`resumable`) is asked for whole, and starts
  over when it was cut off.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from rollfleet_common.errors import (
    EngineRefusedError,
    EngineUnavailableError,
    SettingsError,
)
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import NO_VERSION
from rollfleet_engines.client import all_of
from rollfleet_engines.interface import Engine, Generation, Request
from rollfleet_engines.resume import ABORTED, join, rest, resumable

__all__ = ["Resumer", "Told"]

log = get_logger("rollfleet.inference")

#: Told what is there so far; its `finish_reason` is ABORTED while more is to come.
Told: TypeAlias = Callable[[Generation], None]

_PAUSE_S = 0.05
_PAUSE_MAX_S = 2.0


class Resumer:
    """An engine whose completions are whole, above one whose completions may be cut off.

    Args:
        engine: What makes the segments; it hands back what was cut off with ABORTED.
        segment_tokens: Tokens asked for at once at most; 0: all that are left.
        max_resumes: How often in a row a completion may go on without having got a token.
        version: The board's version now, by which a completion that goes on is pinned.
        saved: Told how many tokens a completion that was cut off went on with.

    Raises:
        SettingsError: A setting makes no sense.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        segment_tokens: int = 0,
        max_resumes: int = 16,
        version: Callable[[], int] = lambda: NO_VERSION,
        saved: Callable[[int], None] = lambda _: None,
    ) -> None:
        if segment_tokens < 0 or max_resumes < 0:
            raise SettingsError("segment_tokens and max_resumes must not be negative")
        self._engine = engine
        self._segment_tokens = segment_tokens
        self._max_resumes = max_resumes
        self._version = version
        self._saved = saved

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` whole completions; see :class:`Engine`.

        Raises:
            EngineUnavailableError: Also when a completion got no further `max_resumes` times.
        """
        return await all_of(self.go_on(request) for _ in range(n))

    async def go_on(
        self, request: Request, so_far: Generation | None = None, told: Told = lambda _: None
    ) -> Generation:
        """One whole completion of `request`.

        Args:
            request: What was asked for originally, the whole budget included.
            so_far: What is there of it already, made earlier or by another worker.
            told: Called after every segment.

        Raises:
            As :meth:`generate`.
        """
        course = _Course(request, so_far)
        while course.left > 0:
            size = course.size(self._segment_tokens)
            try:
                piece, why = await self._segment(course.rest(size), lost=not course.done)
            except EngineRefusedError as exc:
                if not course.segments:
                    raise
                if not course.mine:
                    course.segments.clear()  # what another worker made cannot be gone on with here
                    continue
                if exc.server in ("", course.segments[-1].server):
                    # Nothing but the length has changed since it was taken: the context is full.
                    return course.ended("length", told, context_full=True)
                # One that never took any of it: its context may be shorter, or it knows less.
                piece, why = None, EngineUnavailableError(str(exc))
            if piece is not None and not _goes_on(piece, size, course.left):
                return course.ended(piece.finish_reason, told, piece)
            if moved := piece is not None and course.took(piece):
                told(join(course.segments, ABORTED))
            if why is not None:
                course.idle += not moved
                await self._cut(course, why)
        return course.ended("length", told)

    async def _cut(self, course: "_Course", why: str | EngineUnavailableError) -> None:
        """Get ready to go on with what was cut off.

        Raises:
            EngineUnavailableError: It got no further too many times.
        """
        if course.idle > self._max_resumes:
            raise EngineUnavailableError(
                f"a generation got no further {course.idle} times in a row, with {course.done} of "
                f"at most {course.request.sampling.max_tokens} tokens made: {why}"
            ) from (why if isinstance(why, Exception) else None)
        self._saved(course.done)
        request = course.request
        log.debug("generation goes on", group=request.affinity, tokens=course.done, why=str(why))
        # It may go on under newer weights than it was begun with.
        course.request = replace(request, version=max(request.version, self._version()))
        if course.idle:
            await asyncio.sleep(min(_PAUSE_S * 2**course.idle, _PAUSE_MAX_S))

    async def _segment(
        self, request: Request, *, lost: bool
    ) -> tuple[Generation | None, str | EngineUnavailableError | None]:
        """One segment, and why it was cut off; nothing but an error if all servers failed.

        With nothing to lose the error is the caller's: the engine below has tried what it could.
        """
        try:
            (piece,) = await self._engine.generate(request)
        except EngineUnavailableError as exc:
            if lost:
                raise
            return None, exc
        return piece, f"{piece.server} cut it off" if piece.finish_reason == ABORTED else None

    async def ready(self) -> bool:
        """Whether the engine below is ready."""
        return await self._engine.ready()

    async def close(self) -> None:
        """Close the engine below. Idempotent."""
        await self._engine.close()


class _Course:
    """How far one completion has come."""

    __slots__ = ("idle", "mine", "request", "segments", "whole")

    def __init__(self, request: Request, so_far: Generation | None) -> None:
        self.request = request
        #: Whether it cannot be gone on with: then nothing is kept of what was cut off.
        self.whole = not resumable(request.sampling.extra)
        had = so_far is not None and not self.whole and len(so_far.token_ids)
        self.segments = [so_far] if so_far is not None and had else []
        #: Segments that were made here.
        self.mine = 0
        #: Cuts in a row that brought no token.
        self.idle = 0

    @property
    def done(self) -> int:
        """Tokens that are there."""
        return sum(len(piece.token_ids) for piece in self.segments)

    @property
    def left(self) -> int:
        """Tokens that may still be made."""
        return self.request.sampling.max_tokens - self.done

    def size(self, segment_tokens: int) -> int:
        """Tokens to ask for now."""
        return self.left if self.whole or not segment_tokens else min(self.left, segment_tokens)

    def rest(self, size: int) -> Request:
        """What to ask for now."""
        return rest(self.request, self.segments, size)

    def took(self, piece: Generation) -> bool:
        """Keep a piece that is not the last one; whether there was anything to keep."""
        if self.whole or not len(piece.token_ids):
            return False
        self.segments.append(piece)
        self.mine += 1
        self.idle = 0
        return True

    def ended(
        self, why: str, told: Told, *last: Generation, context_full: bool = False
    ) -> Generation:
        """The whole completion, which is told of where it was not known already."""
        made = join([*self.segments, *last], why)
        if context_full:
            made = replace(made, context_full=True)
        if self.mine or last:
            told(made)
        return made


def _goes_on(piece: Generation, size: int, left: int) -> bool:
    """Whether a segment is not the last one of its completion."""
    if piece.finish_reason == ABORTED:
        return True
    # Less than was asked for is the end of the server's context.
    return piece.finish_reason == "length" and len(piece.token_ids) == size < left
