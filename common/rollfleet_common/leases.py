"""What a worker does with its leases besides delivering: renew, take over, fail, hand back.

- The pending-entries list is the truth of what is in flight; nothing here keeps a counter of it.
- Every step that gives a prompt away checks that the lease is still ours, in the same script.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollfleet_common.clock import Clock
from rollfleet_common.errors import FailureKind
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.messages import Claim
from rollfleet_common.scripts import worker as scripts
from rollfleet_common.scripts.worker import HandedBack
from rollfleet_common.streams import Garbage, Streams
from rollfleet_common.text import decoded, printable

__all__ = ["AttemptFailure", "Leases"]

#: More deliveries than any prompt gets.
NEVER = 1 << 30
_KINDS = (b"train", b"eval")
#: Characters of an error message that a dead letter keeps.
DETAIL = 500


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """Why an attempt ended without a rollout."""

    kind: FailureKind
    detail: str
    worker: str

    def record(self, attempt: int, at_ms: int) -> str:
        """One line of JSON for the dead letter's history; `at_ms` is Unix time by Redis's clock."""
        return json.dumps(
            {
                "attempt": attempt,
                "kind": self.kind.value,
                "detail": printable(self.detail, DETAIL, lines=True),
                "worker": self.worker,
                "at_ms": at_ms,
            }
        )


class Leases:
    """The leases of one worker in one partition."""

    def __init__(
        self, client: Any, keys: PartitionKeys, worker: str, clock: Clock | None = None
    ) -> None:
        self.client = client
        self.keys = keys
        self.worker = worker
        self.clock = clock or Clock()
        #: Suspects that the last :meth:`reclaim` passed over: they wait for others to end.
        self.passed_over = 0

    async def renew(self, route: str, entries: Sequence[str]) -> list[str]:
        """Renew all leases of a route; returns the entries that are no longer ours."""
        return await scripts.renew(
            self.client, self.keys, route=route, consumer=self.worker, entries=entries
        )

    async def reclaim(
        self,
        streams: Streams,
        route: str,
        lease_ms: int,
        count: int,
        *,
        poison: int = NEVER,
        suspects: int = 0,
    ) -> list[tuple[Claim | Garbage, int, str]]:
        """Take over up to `count` leases that were not renewed for `lease_ms`.

        Args:
            streams: Of the same partition.
            route: Of the prompts.
            lease_ms: Silence that ends a lease.
            count: At most so many.
            poison: Deliveries that a prompt gets; the last of them is a suspect's.
            suspects: At most so many suspects among them.

        Returns:
            (claim, deliveries so far, worker that held it) of each.
        """
        self.passed_over, rows = await scripts.reclaim(
            self.client,
            self.keys,
            route=route,
            consumer=self.worker,
            lease_ms=lease_ms,
            at_most=count,
            suspect_from=poison - 1,
            suspect_until=poison,
            suspects=suspects,
        )
        return [
            (streams.read_claim(route, row.entry, row.fields), row.deliveries, decoded(row.owner))
            for row in rows
        ]

    async def fail(self, claim: Claim, failure: AttemptFailure, delay_ms: int | None) -> bool:
        """End a lease in failure: park the prompt for `delay_ms`, or bury it if that is None.

        Returns:
            Whether the lease was still ours.
        """
        return await self._end(claim, failure, -1 if delay_ms is None else delay_ms)

    async def _end(self, claim: Claim, failure: AttemptFailure, delay_ms: int) -> bool:
        p = claim.prompt
        ended = await scripts.fail(
            self.client,
            self.keys,
            route=p.route,
            group=p.group,
            consumer=self.worker,
            entry=claim.entry,
            delay_ms=delay_ms,
            record=failure.record(claim.attempt, int(self.clock.now_ms())),
            task=p.task,
            position=p.position,
            kind=failure.kind.value,
        )
        return ended > 0

    async def give_up(self, claim: Claim, why: str) -> bool:
        """End a lease whose rollout could not be trained on any more: too stale, no dead letter.

        Returns:
            Whether the lease was still ours.
        """
        failure = AttemptFailure(FailureKind.CANCELLED, why, self.worker)
        return await self._end(claim, failure, -2)

    async def quarantine(self, garbage: Garbage) -> None:
        """Move an unreadable entry to the dead letters.

        One that submit wrote (its group's record names it) is buried like any failed prompt, so
        that its group closes; anything else is quarantined.
        """
        k, f, route = self.keys, garbage.fields, garbage.route
        group = decoded(f.get(b"g", b""))
        place = await self.client.hget(k.group(group), f.get(b"i", b"")) if group else None
        # `fail` needs these fields; an entry that lacks one was not written by a script of ours.
        whole_entry = all(name in f for name in (b"a", b"n", b"d")) and f.get(b"k") in _KINDS
        if place != f"p{garbage.entry}".encode() or not whole_entry:
            await quarantine(self.client, k, k.prompts(route), "workers", garbage)
            return
        failure = AttemptFailure(
            FailureKind.DATA, f"undecodable prompt: {garbage.why}", self.worker
        )
        await scripts.fail(
            self.client,
            k,
            route=route,
            group=group,
            consumer=self.worker,
            entry=garbage.entry,
            delay_ms=-1,
            record=failure.record(1, int(self.clock.now_ms())),
            task="?",
            position=-1,
            kind=failure.kind.value,
        )

    async def promote(self, route: str, count: int = 100) -> tuple[int, int]:
        """Put due prompts back on the stream; returns (how many, ms until the next; -1: none).

        Which are due is read first, because the script that moves them must be told the records of
        their groups. Workers that promote at once share what is due.
        """
        members, wait_ms = await scripts.due(self.client, self.keys, route=route, at_most=count)
        if not members:
            return 0, wait_ms
        return await scripts.promote(self.client, self.keys, route=route, members=members)

    async def hand_back(self, route: str, leases: Sequence[tuple[str, str]]) -> int:
        """Give leases, (entry, group) each, back untouched, claimable at once.

        Returns:
            How many were still ours.
        """
        states = await scripts.handback(
            self.client, self.keys, route=route, consumer=self.worker, leases=leases
        )
        return sum(state is HandedBack.YES for state in states)

    async def reap(self, route: str, idle_ms: int) -> int:
        """Forget consumers of a route that hold nothing and were idle for `idle_ms`."""
        return await scripts.reap(self.client, self.keys, route=route, idle_ms=idle_ms)


async def quarantine(
    client: Any, keys: PartitionKeys, stream: str, group: str, garbage: Garbage
) -> None:
    """Move a malformed entry from `stream` to the dead letters, with its bytes."""
    await scripts.quarantine(
        client, keys, stream=stream, group=group, entry=garbage.entry, why=garbage.why
    )
