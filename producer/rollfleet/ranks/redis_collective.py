"""The ranks of a trainer that has no torch.distributed, heard through the run's own Redis.

- A session is the set of processes that met: its name is made of a nonce of each, so that what a
  rank of an earlier job left is never heard.
- A round is one hash with a TTL, written idempotently and again while it is not complete: a lost
  reply, or a Redis that restarted empty, changes nothing. Who waits in a round repeats what it said
  in the one before, too: another may not have read that yet.
- Every rank renews a sign of life; one that stopped is noticed after :data:`GONE_S`, however long
  a round may take.
"""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import RedisError

from rollfleet_common.errors import CollectiveError, SettingsError
from rollfleet_common.keys import RunKeys
from rollfleet_common.redis import connect_sync, is_transient, translate

__all__ = ["RedisCollective"]

T = TypeVar("T")

#: How long a sign of life lasts, and how often it is given.
ALIVE_S = 8.0
BEAT_S = 2.0
#: A rank that gave no sign of life for so long is gone; longer than two beats, because a Redis that
#: restarted has forgotten all of them.
GONE_S = 5.0
#: How often what we said is said again, and the others are looked for.
AGAIN_S = 1.0
#: How long the words of a round are kept.
KEPT_S = 3600
#: Looks at a round are apart a tenth of what was waited already, within these bounds.
LOOK_S = (0.001, 0.05)
#: What a word begins with: something was said, or its rank has left.
SAID, LEFT = b"+", b"-"


class RedisCollective:
    """Joins at its first round; every rank must then come within that round's timeout.

    Args:
        url: Of the Redis that all ranks reach.
        run: The name of the run.
        rank: Which one this is, from 0.
        size: How many there are.

    Raises:
        SettingsError: There is no such rank.
    """

    def __init__(self, url: str, run: str, *, rank: int, size: int) -> None:
        if not 0 <= rank < size:
            raise SettingsError(f"rank is {rank}; of {size} ranks it must be 0 to {size - 1}")
        self.rank = rank
        self.size = size
        self._client = connect_sync(url, role=f"rank-{run}-{rank}")
        self._keys = RunKeys(run)
        self._nonces: list[bytes] = []
        self._nonce = secrets.token_hex(8).encode()
        self._session = ""
        self._round = 0
        #: Where we spoke last, and what.
        self._last: tuple[str, bytes] | None = None
        self._gone_since: dict[int, float] = {}
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    # ---- rounds --------------------------------------------------------------------------------

    def all_gather(self, part: bytes, timeout_s: float) -> list[bytes]:
        """What every rank said; see :meth:`Collective.all_gather`."""
        deadline = time.monotonic() + timeout_s
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="rollfleet-rank", daemon=True)
            self._beating.start()
            self._join(deadline)
        self._round += 1
        words = self._words(self._keys.ranks(self._session, self._round), SAID + part, deadline)
        return [self._said(rank, word) for rank, word in enumerate(words)]

    def _said(self, rank: int, word: bytes) -> bytes:
        if word[:1] == LEFT:
            why = word[1:].decode("utf-8", "replace")
            raise CollectiveError(f"rank {rank} of {self.size} has left: {why}")
        return word[1:]

    def _words(self, key: str, own: bytes, deadline: float) -> list[bytes]:
        """Say `own` in a round, and wait for everyone's."""
        began, say_at = time.monotonic(), 0.0
        before, self._last = self._last, (key, own)
        while True:
            now = time.monotonic()
            if now >= say_at:
                words = [(key, own)]
                if say_at and before is not None:
                    words.append(before)
                for word in words:
                    self._try(partial(self._say, *word), deadline)
                say_at = now + AGAIN_S
                if say_at > began + 2 * AGAIN_S:
                    self._look_for_the_others(key, deadline)
            if self._try(lambda: self._client.hlen(key), deadline) == self.size:
                heard: Any = self._try(lambda: self._client.hgetall(key), deadline)
                if len(heard) == self.size:
                    return [heard[str(rank).encode()] for rank in range(self.size)]
            if now > deadline:
                here = self._try(lambda: self._client.hkeys(key), deadline)
                said = {int(rank) for rank in here}
                raise CollectiveError(
                    f"rank {self.rank} of {self.size} waited {now - began:.0f} s in vain for "
                    f"{_ranks(set(range(self.size)) - said)}"
                )
            time.sleep(min(max((now - began) / 10, LOOK_S[0]), LOOK_S[1]))

    def _say(self, key: str, word: bytes) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hset(key, str(self.rank), word)
            pipe.expire(key, KEPT_S)
            pipe.execute()

    # ---- meeting -------------------------------------------------------------------------------

    def _join(self, deadline: float) -> None:
        """Meet the others: a session is complete when all its members have seen the same nonces."""
        while True:
            nonces = self._signs(deadline)
            # A rank of an earlier job that was frozen may have written over our sign of life.
            if all(nonces) and nonces[self.rank] == self._nonce:
                self._nonces = [nonce or b"" for nonce in nonces]
                session = hashlib.sha256(b" ".join(self._nonces)).hexdigest()[:16]
                key = self._keys.ranks(session, 0)
                self._try(lambda key=key: self._say(key, SAID), deadline)  # type: ignore[misc]
                self._last = key, SAID
                if self._all_in(key, deadline):
                    self._session = session
                    return
            if time.monotonic() > deadline:
                missing = {rank for rank, nonce in enumerate(nonces) if nonce is None}
                raise CollectiveError(
                    f"rank {self.rank} of {self.size} waited in vain for {_ranks(missing)} to join "
                    f"run {self._keys.run!r}; were they started with the same run and size?"
                )
            time.sleep(LOOK_S[1])

    def _all_in(self, key: str, deadline: float) -> bool:
        """Whether all of a session have met; False as soon as one of its members was replaced.

        And after a while: Redis may have lost what we said.
        """
        until = min(deadline, time.monotonic() + AGAIN_S)
        while self._signs(deadline) == self._nonces:
            if self._try(lambda: self._client.hlen(key), deadline) == self.size:
                return True
            if time.monotonic() > until:
                return False
            time.sleep(LOOK_S[1])
        return False

    # ---- signs of life -------------------------------------------------------------------------

    def _signs(self, deadline: float) -> list[bytes | None]:
        names = [self._keys.rank(rank) for rank in range(self.size)]
        signs: Any = self._try(lambda: self._client.mget(names), deadline)
        return list(signs)

    def _look_for_the_others(self, key: str, deadline: float) -> None:
        words: Any = self._try(lambda: self._client.hgetall(key), deadline)
        for rank, word in words.items():
            self._said(int(rank), word)
        now = time.monotonic()
        for rank, sign in enumerate(self._signs(deadline)):
            if sign == self._nonces[rank] or rank == self.rank:
                self._gone_since.pop(rank, None)
            elif now - self._gone_since.setdefault(rank, now) > GONE_S:
                how = "was started anew" if sign else "gives no sign of life: it died or is frozen"
                raise CollectiveError(f"rank {rank} of {self.size} {how}")

    def _beat(self) -> None:
        key, life_ms = self._keys.rank(self.rank), int(ALIVE_S * 1000)
        while True:
            with suppress(RedisError, OSError):  # whoever reads waits out a few missing beats
                self._client.set(key, self._nonce, px=life_ms)
            if self._ended.wait(BEAT_S):
                return

    def _try(self, call: Callable[[], T], deadline: float) -> T:
        """The answer of an idempotent call, once Redis gives one.

        Raises:
            CollectiveError: It gave none in time.
            BrokerSetupError: It refuses us.
        """
        while True:
            try:
                return call()
            except (RedisError, OSError) as exc:
                if not is_transient(exc):
                    raise translate(exc) from exc
                if time.monotonic() > deadline:
                    raise CollectiveError(
                        f"rank {self.rank} of {self.size}: Redis is away: {translate(exc)}"
                    ) from exc
                time.sleep(0.2)

    def close(self, why: str = "") -> None:
        """Leave: whoever waits for us in the next round is told `why`."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
            with suppress(RedisError, OSError):
                if self._session:
                    if self._last is not None:
                        self._say(*self._last)
                    key = self._keys.ranks(self._session, self._round + 1)
                    self._say(key, LEFT + (why or "its loop has ended").encode())
                self._client.delete(self._keys.rank(self.rank))
        self._client.close()


def _ranks(ranks: set[int]) -> str:
    names = ", ".join(map(str, sorted(ranks)))
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names or 'that came and went'}"
