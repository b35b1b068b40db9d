"""A continuous-batching generation engine: one thread owns the model, sequences join and leave it.

- Everything that touches the model or the schedule runs on the engine's thread between two forward
  passes; callers only queue commands. So a reload never falls into the middle of a pass.
- Every token records the version label in force during the pass that made it. The label changes
  with :meth:`BatchingEngine.set_version` and nothing else: like vLLM, a caller who reloads weights without
  pausing mislabels the tokens in between.
- Every token also records `weights_id`, read off the model's own buffers at that pass. It goes to
  the token log and nowhere else, so that a wrong label can be caught.
- A sequence that is in flight while weights change goes on under the new ones with its old keys
  and values, as in vLLM's pause mode "keep".
- A finished request is in the token log before its future resolves.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Literal, TypeVar

import torch

from rollfleet_demo.model import TinyPolicy, load_into
from rollfleet_demo.requests import (
    Completion,
    EngineClosedError,
    Sequence,
    Stats,
    Ticket,
    log_line,
)
from rollfleet_demo.sampling import SamplerSettings, choose
from rollfleet_demo.task import PAD_ID

__all__ = ["BatchingEngine", "PauseMode"]

PauseMode = Literal["abort", "wait", "keep"]
_T = TypeVar("_T")


class BatchingEngine:
    """The engine. Its methods may be called from any thread; futures resolve on the engine's."""

    def __init__(
        self,
        weights: Path,
        *,
        version: str = "default",
        max_num_seqs: int = 256,
        token_log: Path | None = None,
        delay_per_token_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Load the weights and start the thread.

        Args:
            weights: A file of :func:`rollfleet_demo.model.save`.
            version: Label of these weights.
            max_num_seqs: Sequences in one forward pass; more of them wait.
            token_log: Append one JSON line per finished choice here.
            delay_per_token_s: Let this long pass between two passes, to play a slow model.
            seed: Seed of the sequences that bring none.

        Raises:
            FileNotFoundError, ValueError: As :func:`rollfleet_demo.model.load_into`.
        """
        self.policy = TinyPolicy().requires_grad_(requires_grad=False)
        load_into(self.policy, weights)
        self.max_num_seqs = max_num_seqs
        self.max_tokens = self.policy.shape.max_tokens
        self._weights = weights
        self._version = version
        self._delay_s = delay_per_token_s
        self._cache = self.policy.new_cache(max_num_seqs)
        self._shared = torch.Generator().manual_seed(seed)
        self._log = token_log.open("a", encoding="utf-8") if token_log else None
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._finished: list[Ticket] = []
        #: None while generating, else how the pause treats what is in flight.
        self._pause: PauseMode | None = None
        #: Pauses of mode "wait" that have not drained yet.
        self._drained: list[Future[None]] = []
        #: What commands have to say, once the statistics show what they did.
        self._replies: list[Callable[[], None]] = []
        self._next_pass_s = 0.0
        self._prompt_tokens = self._generation_tokens = 0
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._closed = threading.Event()
        self.stats = Stats(version=version)
        self._thread = threading.Thread(target=self._run, name="demo-engine", daemon=True)
        self._thread.start()

    def submit(self, request_id: str, prompt: Iterable[int], sampling: SamplerSettings) -> Ticket:
        """Queue a request. Its ids and lengths are the caller's to check.

        Raises:
            EngineClosedError: The engine is closed.
        """
        ticket = Ticket(request_id, tuple(prompt), sampling)
        room = self.max_tokens - len(ticket.prompt)
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)

        def enqueue() -> None:
            self._prompt_tokens += len(ticket.prompt)
            for index in range(sampling.n):
                seeded = None
                if sampling.seed is not None:
                    seeded = torch.Generator().manual_seed(sampling.seed + index)
                self._waiting.append(Sequence(ticket, Completion(index), limit, seeded))

        self._queue(enqueue, ticket.result)
        return ticket

    def abort(self, request_ids: Iterable[str] | None = None) -> "Future[int]":
        """End requests with what they have, finish reason "abort"; all of them if None.

        Resolves with the number of requests that were ended.
        """
        chosen = None if request_ids is None else frozenset(request_ids)
        return self._call(
            lambda: self._end(lambda ticket: chosen is None or ticket.request_id in chosen)
        )

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for this request any more: free its slots. Harmless if it has ended."""
        with suppress(EngineClosedError):
            self._call(lambda: self._end(lambda other: other is ticket))

    def pause(self, mode: PauseMode) -> "Future[None]":
        """Stop generating; requests that come in wait. Resolves once nothing is in a pass.

        Args:
            mode: What happens to sequences in flight. "keep": they freeze, and go on after
                :meth:`resume`; "wait": they run to their end first; "abort": they end now.
        """
        future: Future[None] = Future()

        def pause() -> None:
            self._pause = mode
            if mode == "abort":
                self._end(lambda _: True)
            self._drained.append(future)

        self._queue(pause, future)
        return future

    def resume(self) -> "Future[None]":
        """Go on generating."""

        def resume() -> None:
            self._pause = None

        return self._call(resume)

    def reload(self, weights: Path | None = None) -> "Future[None]":
        """Replace the weights between two passes; the version label stays as it is.

        Args:
            weights: Where to read; None reads the file that the engine was started with, again.
                The future fails with FileNotFoundError or ValueError, and nothing has changed.
        """
        return self._call(lambda: load_into(self.policy, weights or self._weights))

    def set_version(self, version: str) -> "Future[None]":
        """Label the tokens of all further passes."""

        def label() -> None:
            self._version = version

        return self._call(label)

    def close(self) -> None:
        """Stop the thread; requests in flight fail with EngineClosedError. Idempotent."""
        self._closed.set()
        with self._wake:
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the engine can still generate."""
        return not self._closed.is_set()

    def _queue(self, command: Callable[[], None], future: "Future[_T]") -> None:
        """Have `command` run on the engine's thread; a closed engine fails `future` instead."""
        # From here on the future cannot be cancelled from outside, so resolving it cannot fail.
        future.set_running_or_notify_cancel()

        def guarded() -> None:
            if self._closed.is_set():
                future.set_exception(EngineClosedError("the engine is closed"))
                return
            try:
                command()
            except Exception as exc:  # noqa: BLE001  # the failure belongs to whoever asked
                future.set_exception(exc)

        with self._wake:
            if self._closed.is_set():
                raise EngineClosedError("the engine is closed")
            self._commands.append(guarded)
            self._wake.notify()

    def _call(self, work: "Callable[[], _T]") -> "Future[_T]":
        """Run `work` on the engine's thread and give its result to the future."""
        future: Future[_T] = Future()

        def command() -> None:
            self._replies.append(partial(future.set_result, work()))

        self._queue(command, future)
        return future

    def _run(self) -> None:
        """The thread: commands, then one pass, until closed."""
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        finally:
            with self._wake:
                self._closed.set()
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            for reply in self._replies:
                reply()
            closed = EngineClosedError("the engine closed meanwhile")
            live = {s.ticket for s in (*self._running, *self._waiting)}
            for future in [t.result for t in live.union(self._finished)]:
                future.set_exception(closed)
            for drained in self._drained:
                drained.set_exception(closed)
            if self._log:
                self._log.close()

    def _turn(self) -> bool:
        """Wait for something to do and do it once; False when closed."""
        with self._wake:
            while not (self._closed.is_set() or self._commands or self._due()):
                self._wake.wait(self._next_pass_s - monotonic() if self._can_step() else None)
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        if commands:
            self._settle()
        if self._closed.is_set():
            return False
        if self._due():
            self._next_pass_s = monotonic() + self._delay_s
            self._step()
            self._settle()
        return True

    def _due(self) -> bool:
        """Whether the next pass may start now."""
        return self._can_step() and monotonic() >= self._next_pass_s

    def _can_step(self) -> bool:
        """Whether a pass would advance any sequence."""
        if self._pause == "keep":
            return False
        return bool(self._running) or (bool(self._waiting) and self._pause is None)

    def _step(self) -> None:
        """One pass: prompts of the newcomers, one token for the others, then a token for all."""
        old = len(self._running)
        logits = []
        if old:
            newest = torch.tensor([s.out.token_ids[-1] for s in self._running])
            places = [len(s.ticket.prompt) + len(s.out.token_ids) - 1 for s in self._running]
            logits.append(self.policy.decode(newest, torch.tensor(places), self._cache))
        if self._pause is None and self._waiting and old < self.max_num_seqs:
            take = min(len(self._waiting), self.max_num_seqs - old)
            newcomers = [self._waiting.popleft() for _ in range(take)]
            logits.append(self._prefill(newcomers, first=old))
            self._running += newcomers
        chosen = choose(
            torch.cat(logits),
            [s.ticket.sampling for s in self._running],
            [s.generator for s in self._running],
            self._shared,
        )
        truth = int(self.policy.weights_id)
        for row, sequence in enumerate(self._running):
            out = sequence.out
            if not out.version_starts or out.version_starts[-1][1] != self._version:
                out.version_starts.append((len(out.token_ids), self._version))
            out.token_ids.append(chosen.token_ids[row])
            out.logprobs.append(chosen.logprobs[row])
            out.ranks.append(chosen.ranks[row])
            out.tops.append(chosen.tops[row])
            out.truth.append(truth)
        self._generation_tokens += len(self._running)
        self._retire({row for row, s in enumerate(self._running) if s.ended()})

    def _prefill(self, newcomers: list[Sequence], first: int) -> torch.Tensor:
        """First-token logits of new rows; equal prompts are computed once."""
        distinct = dict.fromkeys(s.ticket.prompt for s in newcomers)
        unique = {prompt: place for place, prompt in enumerate(distinct)}
        longest = max(map(len, unique))
        ids = torch.tensor([[*p, *[PAD_ID] * (longest - len(p))] for p in unique])
        lengths = torch.tensor([len(p) for p in unique])
        rows = torch.tensor([unique[s.ticket.prompt] for s in newcomers])
        return self.policy.prefill(ids, lengths, rows, self._cache, first)

    def _retire(self, rows: set[int]) -> None:
        """Take ended rows out, and close the gaps with rows from the end."""
        for row in sorted(rows):
            self._conclude(self._running[row])
        keep = len(self._running) - len(rows)
        holes = sorted(row for row in rows if row < keep)
        movers = [row for row in range(keep, len(self._running)) if row not in rows]
        self._cache.compact(holes, movers)
        for hole, mover in zip(holes, movers, strict=True):
            self._running[hole] = self._running[mover]
        del self._running[keep:]

    def _conclude(self, sequence: Sequence) -> None:
        """Count a sequence as finished, and its ticket with the last one."""
        ticket = sequence.ticket
        ticket.done.append(sequence.out)
        if len(ticket.done) == ticket.sampling.n:
            self._finished.append(ticket)

    def _end(self, chosen: Callable[[Ticket], bool]) -> int:
        """End the chosen tickets with what they have; their number."""
        tickets = {s.ticket for s in (*self._running, *self._waiting) if chosen(s.ticket)}
        for sequence in self._waiting:
            if sequence.ticket in tickets:
                self._conclude(sequence)
        self._waiting = deque(s for s in self._waiting if s.ticket not in tickets)
        self._retire({row for row, s in enumerate(self._running) if s.ticket in tickets})
        return len(tickets)

    def _settle(self) -> None:
        """Log and hand over what has finished, and publish the statistics."""
        for ticket in self._finished:
            ticket.done.sort(key=lambda out: out.index)
        if self._log and self._finished:
            for ticket in self._finished:
                self._log.writelines(log_line(ticket, out) for out in ticket.done)
            self._log.flush()
        held = sum(len(s.ticket.prompt) + len(s.out.token_ids) for s in self._running)
        self.stats = Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            paused=self._pause is not None,
            cache_usage=held / (self.max_num_seqs * self.max_tokens),
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            version=self._version,
        )
        finished, self._finished = self._finished, []
        for ticket in finished:
            ticket.result.set_result(ticket.done)
        replies, self._replies = self._replies, []
        for reply in replies:
            reply()
        if not self._running or self._pause != "wait":
            drained, self._drained = self._drained, []
            for future in drained:
                future.set_result(None)
