"""What a training loop of many ranks holds: :class:`RankFleet`, the same face as Fleet on each rank.

- Rank 0 holds the run and its ledger; the others hold a plain client, and fetch what is theirs.
- All ranks get the same batch, or all raise the same error, at the same step. One collective a step
  while rollouts wait for the trainer; one more for each beat, and each new cut, while it waits.
- What only rank 0 does (publish, trained, commit, pause) is called on every rank. If it fails, every
  rank learns of it at the next batch.
"""

import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from rollfleet.aio import NO_BATCH
from rollfleet.fleet import Fleet
from rollfleet.ranks.collective import Collective
from rollfleet.ranks.leader import Division, Leader
from rollfleet.ranks.loader import Loader
from rollfleet.ranks.protocol import Conclusion, RankFailure, Vote, conclude
from rollfleet.ranks.rank_batch import RankBatch
from rollfleet.ranks.share import Reader
from rollfleet.settings import TrainerSettings
from rollfleet.tensors.packing import Form
from rollfleet_common.errors import (
    CollectiveError,
    FailingError,
    RollfleetError,
    SettingsError,
)
from rollfleet_common.forks import Home

__all__ = ["RankFleet"]

T = TypeVar("T")


class RankFleet:
    """One rank of a trainer. Made by :func:`rollfleet.connect_ranks`; a context manager.

    Every rank calls the same methods in the same order. `leader` is the :class:`Fleet` on rank 0,
    for what is asked of it alone (``books()``, ``evaluate()``, ``submit()``), and None elsewhere;
    never take batches from it.
    """

    def __init__(
        self,
        collective: Collective,
        settings: TrainerSettings,
        reader: Callable[[Any], Reader],
        leader: Fleet | None,
        division: Division,
        *,
        version: int,
        collate: Mapping[str, Any],
        timeout_s: float,
    ) -> None:
        self.collective = collective
        self.settings = settings
        self.leader = leader
        self.version = version
        self.timeout_s = timeout_s
        self._collate = collate
        self._strict = collate.get("missing") == "error"
        self._form: Form = division.form
        self._lead = None if leader is None else Leader(leader.aio, division)
        self._loader = Loader(settings, reader, collective.rank)
        self._home = Home("this rank's fleet", "Call rollfleet.connect_ranks() in the child")
        self._bad: dict[str, str] = {}
        #: What only the leader did, and failed with first: told at the next batch.
        self._late: RollfleetError | None = None
        #: Whether the leader has yet to hear that a batch is asked for.
        self._asking = False
        #: Why no further round can be.
        self._broken: CollectiveError | None = None
        #: Why the feed ended without one batch, if it did.
        self._nothing = ""
        self._closed = False

    @property
    def rank(self) -> int:
        """Which of the ranks this one is; 0 leads."""
        return self.collective.rank

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.collective.size

    @property
    def redis_url(self) -> str:
        """Where workers find this run."""
        return self.settings.redis_url

    # ---- batches -----------------------------------------------------------------------------

    def next_batch(
        self, samples: int | None = None, *, timeout_s: float | None = None
    ) -> RankBatch | None:
        """This rank's share of the next batch; None on all ranks when the feed has ended.

        Args:
            samples: Of the whole batch; `batch_size` if not given. What rank 0 says counts.
            timeout_s: Longest wait; `starve_s` if not given.

        Raises:
            StarvedError: Nothing came in time.
            SupersededError: Another trainer has opened the run.
            RankError: Something else failed on a rank, which is named.
            CollectiveError: A rank has left, died or is frozen.
            RollfleetError: Whatever rank 0 failed with since the last batch.
        """
        began = time.monotonic()
        until = began + (self.settings.starve_s if timeout_s is None else timeout_s)
        want = self.settings.batch if samples is None else samples
        self._asking = True
        while True:
            conclusion = self._round(want, until)
            word = conclusion.word
            self.version = word.version
            if word.ended:
                self._nothing = word.nothing
                return None
            if conclusion.go:
                return self._take(conclusion, time.monotonic() - began)
            self._bad = conclusion.bad
            if word.plan and not word.number:
                self._loader.begin(word.plan, self.version)

    def batches(self, steps: int | None = None, *, commit: str = "step") -> Iterator[RankBatch]:
        """Shares for a loop; see :meth:`rollfleet.AsyncFleet.batches`. Same `steps` on all ranks.

        Raises:
            FailingError: On all ranks: the feed has ended, and all that was submitted died or was dropped.
        """
        if commit not in ("step", "checkpoint"):
            raise SettingsError(f'commit is {commit!r}; it must be "step" or "checkpoint"')
        settle = self.commit if commit == "step" else self.trained
        done = 0
        while steps is None or done < steps:
            batch = self.next_batch()
            if batch is None:
                if self._nothing:
                    raise FailingError(f"{NO_BATCH}: {self._nothing}")
                return
            yield batch
            settle(batch)
            done += 1

    def _round(self, want: int, until: float) -> Conclusion:
        """Say what there is to say, hear the others, and conclude as they do."""
        self._home.check()
        if self._broken is not None:
            raise self._broken
        vote, cause = self._vote(want, until)
        try:
            parts = self.collective.all_gather(vote.dumps(), self.timeout_s)
        except CollectiveError as exc:
            self._broken = exc
            raise
        try:
            conclusion = conclude([Vote.loads(part) for part in parts], strict=self._strict)
        except RollfleetError as exc:
            raise exc from cause
        self._loader.agree(conclusion.form)
        return conclusion

    def _vote(self, want: int, until: float) -> tuple[Vote, Exception | None]:
        """Our share's verdict, and on rank 0 the leader's word; or what failed."""
        try:
            late, self._late = self._late, None
            if late is not None:
                return Vote(failure=RankFailure.of(late)), late
            if self._lead is not None and self._asking:
                self._led(self._lead.begin())
                self._asking = False
            vote = self._loader.vote(self.version, until)
            if self._lead is not None:
                bad, self._bad = self._bad, {}
                word = self._led(
                    self._lead.say(self._loader.plan, want, until - time.monotonic(), bad)
                )
                vote = replace(vote, word=word)
        except Exception as exc:  # noqa: BLE001 - every rank is to raise it
            return Vote(failure=RankFailure.of(exc)), exc
        return vote, None

    def _take(self, conclusion: Conclusion, waited_s: float) -> RankBatch:
        """Every rank has agreed: this is the batch, and the one after it is begun."""
        word, loaded = conclusion.word, self._loader.take()
        whole = None
        if self._lead is not None:
            whole = self._led(self._lead.go(conclusion, waited_s))
        if word.plan:
            self._loader.begin(word.plan, self.version)
        return RankBatch.of(
            loaded,
            number=word.number,
            rank=self.rank,
            ranks=self.ranks,
            tally=conclusion.tally,
            counted={
                "rollfleet/wait_s": waited_s,
                "rollfleet/rank/header_bytes": loaded.header_bytes,
                "rollfleet/rank/payload_bytes": loaded.payload_bytes,
                "rollfleet/rank/samples": len(loaded.share.rollouts),
            },
            whole=whole,
            collate=self._collate,
            form=self._form,
        )

    # ---- what rank 0 does for all --------------------------------------------------------------

    def feed(self, source: Iterable[Any]) -> None:
        """Submit the prompts of an iterable in the background; the other ranks' is not looked at."""
        self._on_leader(lambda fleet: fleet.feed(source))

    def trained(self, batch: RankBatch) -> None:
        """The batch was trained on, on every rank; see :meth:`rollfleet.AsyncFleet.trained`."""
        if batch.whole is not None:
            whole = batch.whole
            self._on_leader(lambda fleet: fleet.trained(whole))

    def commit(self, batch: RankBatch | None = None) -> None:
        """Free a batch, or all trained ones; see :meth:`rollfleet.AsyncFleet.commit`."""
        whole = None if batch is None else batch.whole
        self._on_leader(lambda fleet: fleet.commit(whole))

    def publish(
        self,
        version: int | None = None,
        weights: str = "",
        *,
        transfer: Callable[[int, str], object] | None = None,
        load: Callable[[int, Sequence[str]], object] | None = None,
    ) -> int:
        """Announce a new version of the policy; see :meth:`rollfleet.AsyncFleet.publish`.

        Rank 0 has the servers refitted, and only there `transfer` and `load` are called. `weights`
        must be complete by then: where every rank writes a part, wait for all of them first.
        """
        self.version = self.version + 1 if version is None else version
        self._on_leader(lambda fleet: fleet.publish(version, weights, transfer=transfer, load=load))
        return self.version

    def pause(self, seconds: float) -> None:
        """Ask workers to claim nothing for a while; see :meth:`rollfleet.AsyncFleet.pause`."""
        self._on_leader(lambda fleet: fleet.pause(seconds))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: rank 0's; {} elsewhere. Any number of ranks may resume it."""
        return {} if self.leader is None else self.leader.state_dict()

    def _on_leader(self, call: Callable[[Fleet], object]) -> None:
        self._home.check()
        if self.leader is None:
            return
        try:
            call(self.leader)
        except RollfleetError as exc:
            # Raised here alone, it would leave the others waiting in a collective. What is called
            # after it is still done: a commit left out is a batch that is trained on twice.
            self._late = self._late or exc

    def _led(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self.leader is not None  # noqa: S101 - asked on rank 0 only
        return self.leader._call(coroutine)  # noqa: SLF001 - of this package

    # ---- life ----------------------------------------------------------------------------------

    def close(self, why: str = "") -> None:
        """Let go: of the run on rank 0, of Redis elsewhere. Idempotent.

        Args:
            why: Told to ranks that still wait for this one, if the collective can.

        Raises:
            RollfleetError: What rank 0 failed with since the last batch, if nobody was told.
        """
        if self._closed or self._home.left:
            return
        self._closed = True
        self._loader.close()
        self.collective.close(why)
        if self.leader is not None and self._lead is not None:
            try:
                self._led(self._lead.close())
            finally:
                self.leader.close()
        if self._late is not None and not why:
            raise self._late

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close("" if exc is None else f"{type(exc).__name__}: {exc}")
