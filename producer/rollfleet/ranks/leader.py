"""What rank 0 does beyond the others: it reads headers, decides, and writes the plan.

- The plan's record in Redis is written before any rank is told to go: it is the commit point. A
  round that did not end in "go" on every rank is undone; nothing of it was trained on.
- What is to be trained on is judged at the version of the moment at which it is handed over, by the
  same sweep as on one rank.
- The batch after the one at hand is planned ahead, if it is there, so that every rank fetches it
  while it computes. Planned groups stay ready, in the books and in the ledger.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollfleet.aio import AsyncFleet
from rollfleet.batch import Batch
from rollfleet.ranks.protocol import SHARE, Conclusion, Revised, Word
from rollfleet.ranks.share import Share
from rollfleet.records import Group
from rollfleet.tensors.balance import Cost
from rollfleet.tensors.packing import Form, plan_headers
from rollfleet_common.errors import RollfleetError, StarvedError
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Prompt, Rollout
from rollfleet_common.tasks import cancel_all

__all__ = ["Division", "Leader"]

log = get_logger("rollfleet.trainer")

#: How long the leader keeps the others waiting for a plan without a word.
BEAT_S = 5.0
#: How long a share that nobody reads is kept.
SHARE_S = 3600


@dataclass(frozen=True, slots=True)
class Division:
    """How a batch is divided over ranks and micro-batches; see :func:`rollfleet.tensors.packing.plan_micro`."""

    ranks: int
    #: Whether the members of a group stay together on one rank.
    whole_groups: bool = True
    #: Tokens of a micro-batch; None: a rank's share is one.
    budget_tokens: int | None = None
    #: What its budget is spent on; see :data:`rollfleet.tensors.packing.Form`.
    form: Form = "packed"
    pad_multiple: int = 1
    #: What ranks are balanced by.
    cost: Cost = Cost()  # noqa: RUF009 - frozen

    def shares(self, groups: Sequence[Group]) -> list[Share]:
        """The share of every rank: all rollouts of `groups`, each once."""
        rows = [
            (group.partition, member.header)
            for group in groups
            for _, member in sorted(group.members.items())
        ]
        headers = [header for _, header in rows]
        laid: dict[str, Any] = {"budget_tokens": sum(header.tokens for header in headers)}
        if self.budget_tokens is not None:
            laid = {
                "budget_tokens": self.budget_tokens,
                "form": self.form,
                "pad_multiple": self.pad_multiple,
            }
        plan = plan_headers(
            headers, ranks=self.ranks, whole_groups=self.whole_groups, cost=self.cost, **laid
        )
        shares: list[Share] = []
        for rank in range(self.ranks):
            mine = plan.share(rank)
            place = {unit: at for at, unit in enumerate(mine)}
            micro = tuple(tuple(place[unit] for unit in units) for units in plan.ranks[rank])
            shares.append(Share(tuple(rows[unit] for unit in mine), micro))
        return shares


@dataclass(frozen=True, slots=True)
class _Proposal:
    """A plan that the ranks know by name."""

    plan: str
    groups: list[Group]
    #: How many samples were asked for.
    want: int


@dataclass(slots=True)
class _Written:
    """A proposal whose record is written, and which not all ranks have agreed to yet."""

    number: int
    version: int
    #: How often Redis had lost the run by then.
    life: int
    #: Prompts of its groups: a group that is not trained on may have to be sent again.
    prompts: dict[str, Prompt]


class Leader:
    """Plans for all ranks. Its coroutines run in the fleet's event loop."""

    def __init__(self, fleet: AsyncFleet, division: Division) -> None:
        self.fleet = fleet
        self.division = division
        self._name = secrets.token_hex(4)
        self._plans = 0
        #: The plan at hand, and the one after it.
        self._plan: _Proposal | None = None
        self._ahead: _Proposal | None = None
        self._written: _Written | None = None
        self._picking: asyncio.Task[list[Group]] | None = None

    async def begin(self) -> None:
        """The trainer asks for a batch: it wants no more of the version that it has."""
        await self._stop_picking()
        self.fleet.pacer.release()
        self.fleet.submitter.credit.set()

    async def say(self, at_hand: str, want: int, limit_s: float, bad: Mapping[str, str]) -> Word:
        """What the leader says in the next round.

        Args:
            at_hand: The plan that the ranks have; not ours if a round failed on its way to them.
            want: Samples of the batch that is asked for.
            limit_s: How long may be waited for them yet.
            bad: Reason by group, of what the last round found to be no use.

        Raises:
            StarvedError: They did not come in time.
            SupersededError: Another trainer has opened the run.
            RollfleetError: Whatever a part of the fleet failed with in the background.
        """
        await self._undo(bad)
        fleet = self.fleet
        if (plan := self._plan) is not None and plan.want == want:
            if plan.plan != at_hand:
                return Word(fleet.version, plan=plan.plan)
            written = await self._write(plan.groups)
            if written is not None:
                self._ahead = await self._plan_ahead(want)
                if fleet.version != written.version:
                    return Word(fleet.version)  # undone, and judged again, in the next round
                ahead = "" if self._ahead is None else self._ahead.plan
                return Word(written.version, written.number, ahead)
        self._plan = None
        groups = await self._pick(want, limit_s)
        if groups is None:
            return Word(fleet.version)
        if not groups:
            return Word(fleet.version, ended=True, nothing=await fleet.why_no_batch())
        self._plan = await self._propose(groups, want)
        return Word(fleet.version, plan=self._plan.plan)

    async def go(self, conclusion: Conclusion, waited_s: float) -> Batch:
        """Every rank has agreed to the plan at hand: the whole batch, without samples."""
        written, plan = self._written, self._plan
        if written is None or plan is None:
            raise RollfleetError("the ranks agreed to a plan that the leader does not have")
        self._written, self._plan, self._ahead = None, self._ahead, None
        await self.fleet.gather.payloads.fix(conclusion.form)
        return self.fleet.commits.opened(
            written.number,
            plan.groups,
            _headers(plan.groups, conclusion.revised),
            written.version,
            waited_s,
        )

    async def close(self) -> None:
        """Wait for nothing more. What was written and not agreed to is served to the next trainer."""
        await self._stop_picking()

    # ---- plans -------------------------------------------------------------------------------

    async def _pick(self, want: int, limit_s: float) -> list[Group] | None:
        """Groups of a batch, [] if the feed has ended; None if it takes longer than a beat."""
        if self._picking is None:
            self._picking = asyncio.create_task(
                self.fleet.gather.pick(want, max(round(limit_s, 1), 0.0))
            )
        await asyncio.wait({self._picking}, timeout=BEAT_S)
        if not self._picking.done():
            return None
        picking, self._picking = self._picking, None
        return picking.result()

    async def _stop_picking(self) -> None:
        picking, self._picking = self._picking, None
        if picking is not None:
            # What else it failed with, the next pick meets itself.
            await cancel_all([picking])

    async def _plan_ahead(self, want: int) -> _Proposal | None:
        """The batch after the one that is being handed over, if all of it is here."""
        here = self.fleet.consumer.choose(want)
        if sum(len(group.members) for group in here) < want:
            return None
        try:
            groups = await self.fleet.gather.pick(want, 0.05)
        except StarvedError:
            return None  # the policy waits, or some of it has become stale
        return await self._propose(groups, want) if groups else None

    async def _propose(self, groups: list[Group], want: int) -> _Proposal:
        """Put the share of every rank where it finds it."""
        self._plans += 1
        plan = f"{self._name}-{self._plans}"
        shares = [share.dumps() for share in self.division.shares(groups)]
        keys, client = self.fleet.keys, self.fleet.board.client

        async def put() -> None:
            pipe = client.pipeline(transaction=False)
            for rank, packed in enumerate(shares):
                pipe.set(keys.share(plan, rank), packed, ex=SHARE_S)
            await pipe.execute()

        await self.fleet.line(put, f"write the shares of plan {plan}")
        return _Proposal(plan, groups, want)

    # ---- the commit point --------------------------------------------------------------------

    async def _write(self, groups: Sequence[Group]) -> _Written | None:
        """Judge `groups` now, and write the record of their batch; None: they must be cut anew."""
        fleet = self.fleet
        fresh = await fleet.gather.recheck(groups)
        version = fleet.version
        if len(fresh) < len(groups) or fleet.gather.must_wait(groups):
            return None
        number = await fleet.commits.write(groups, version)
        if not number:
            return None
        out = fleet.consumer.out
        prompts = {group.name: out[group.name] for group in groups if group.name in out}
        self._written = _Written(number, version, fleet.consumer.life, prompts)
        fleet.consumer.hand(groups)
        return self._written

    async def _undo(self, bad: Mapping[str, str]) -> None:
        """Take back what was written and not agreed to, and drop what the ranks could not use."""
        written, plan, consumer = self._written, self._plan, self.fleet.consumer
        if written is not None and plan is not None:
            self._ahead = None
            await self.fleet.commits.withdraw(written.number)
            self._written = None
            for group in plan.groups:
                consumer.handed.pop(group.name, None)
            consumer.out.update(written.prompts)
            if written.life == consumer.life:
                consumer.ready.update({group.name: group for group in plan.groups})
            else:
                self.fleet.line.suspect = True  # so that they are looked for, and sent again
        groups = [g for g in (plan.groups if plan else ()) if g.name in bad]
        if "lost" in bad.values():
            await self.fleet.line.revive()
        for group in groups:
            if consumer.ready.get(group.name) is group:
                await consumer.drop([group], bad[group.name])
        if SHARE in bad:
            self._plan = None


def _headers(groups: Sequence[Group], revised: Sequence[Revised]) -> dict[str, list[Rollout]]:
    """Rollouts by group, by index, without samples, with headers as the policy left them."""
    changes = {(each.group, each.index): each for each in revised}
    found: dict[str, list[Rollout]] = {}
    for group in groups:
        rows = found[group.name] = []
        for index, member in sorted(group.members.items()):
            header = member.header
            if (change := changes.get((group.name, index))) is not None:
                header = replace(
                    header,
                    min_version=change.min_version,
                    trained_tokens=change.trained_tokens,
                )
            rows.append(Rollout(header, ()))
    return found
