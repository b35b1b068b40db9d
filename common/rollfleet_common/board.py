"""The board of a run: which version the policy is at, and which trainer holds the run.

- Versions come in by one door: :meth:`Board.publish`. Workers follow by a blocking read with a
  poll behind it, never by pub/sub alone, which forgets whoever was away.
- One trainer at a time: its lease is a key with a TTL, its token is checked by every step that
  steers. A trainer that was frozen past its lease learns that it was superseded, and can do no harm.
- A pause always expires.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollfleet_common.keys import RunKeys
from rollfleet_common.messages import NO_VERSION, PolicyVersion
from rollfleet_common.schemas import Schemas, spoken
from rollfleet_common.scripts import run as scripts
from rollfleet_common.scripts.run import Claimed, Seized
from rollfleet_common.text import I31, broken, decoded, parse_json, printable, state_int, whole

__all__ = ["Board", "Claimed", "Seized", "Shape"]

#: Partitions that a run may have; settings allow fewer.
MAX_PARTITIONS = 65_536


@dataclass(frozen=True, slots=True)
class Shape:
    """What a trainer decided when it opened the run, and workers and status need to know."""

    partitions: int
    samples_per_version: int
    max_staleness: int
    pipeline_depth: int

    def dumps(self) -> str:
        """As it stands on the board."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def loads(cls, text: str | bytes) -> "Shape":
        """The inverse of :meth:`dumps`; unknown fields of a newer release are ignored.

        Raises:
            ValueError: It is no shape of a run; the message says why.
        """
        raw = parse_json(text)
        if not isinstance(raw, dict):
            raise ValueError(f"a JSON {type(raw).__name__} is not a shape")  # noqa: TRY004
        for name in cls.__slots__:
            number = raw.get(name)
            least, most = (1, MAX_PARTITIONS) if name == "partitions" else (0, I31)
            if type(number) is not int or not least <= number <= most:
                said = printable(repr(number), 60)
                raise ValueError(f"{name!r} is {said}, not a whole number from {least} to {most}")
        return cls(**{name: raw[name] for name in cls.__slots__})


class Board:
    """The board of one run."""

    def __init__(self, client: Any, keys: RunKeys) -> None:
        self.client = client
        self.keys = keys

    # ---- the trainer -------------------------------------------------------------------------

    async def claim(self, token: str, lease_ms: int, who: str, *, take_over: bool) -> Claimed:
        """Ask for the lease on the run, and shut its last trainer out; :meth:`seize` comes after.

        From here on nobody else commits a batch, and nothing that workers follow has changed.
        """
        return await scripts.claim(
            self.client, self.keys, token=token, lease_ms=lease_ms, who=who, take_over=take_over
        )

    async def seize(
        self,
        token: str,
        lease_ms: int,
        who: str,
        shape: Shape,
        *,
        version: int,
        take_over: bool,
        above: int = 0,
    ) -> Seized:
        """Ask for the run, in a new epoch, at `version` (NO_VERSION: wherever the board is).

        The epoch is `above` what the trainer had, even if Redis forgot that one.
        """
        return await scripts.seize(
            self.client,
            self.keys,
            token=token,
            lease_ms=lease_ms,
            who=who,
            take_over=take_over,
            version=version,
            shape=shape.dumps(),
            above=above,
            schemas=spoken().dumps(),
        )

    async def hold(self, token: str, lease_ms: int) -> None:
        """Renew the trainer's lease.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        await scripts.hold(self.client, self.keys, token=token, lease_ms=lease_ms)

    async def release(self, token: str) -> None:
        """Let go of the run at once."""
        await scripts.release(self.client, self.keys, token=token)

    async def publish(self, token: str, fields: Mapping[str, int | str]) -> None:
        """Write `fields` (version, weights, paused_until_ms) and wake the followers.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        await scripts.publish(self.client, self.keys, token=token, fields=fields)

    async def plan(
        self, token: str, batch: int, plan: bytes | None, *, committed: bool = False
    ) -> None:
        """Write the plan of a batch (the commit point), or forget it.

        Args:
            token: The trainer's.
            batch: Its number.
            plan: What is to stand there; None: nothing.
            committed: Whether this commits the batch: the board keeps the last such number.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        await scripts.plan(
            self.client,
            self.keys,
            token=token,
            batch=batch,
            plan=plan or b"",
            committed=committed,
        )

    async def plans(self) -> dict[int, bytes]:
        """The plans that stand, by batch number, in order.

        Raises:
            CodecError: A field is no number of a batch.
        """
        raw = await self.client.hgetall(self.keys.batches)
        plans: dict[int, bytes] = {}
        for batch, plan in raw.items():
            try:
                plans[whole(batch, 0, I31)] = plan
            except ValueError as exc:
                name = printable(decoded(batch), 60)
                raise broken(self.keys.batches, name, f"as the number of a batch: {exc}") from None
        return dict(sorted(plans.items()))

    # ---- everyone ----------------------------------------------------------------------------

    async def read(self) -> tuple[PolicyVersion, Shape] | None:
        """The policy and the shape of the run; None before any trainer opened it.

        Raises:
            CodecError: A field is not what a trainer writes; the message names it.
        """
        key = self.keys.board
        names = ["version", "epoch", "weights", "paused_until_ms", "min_useful", "refits", "shape"]
        values = await self.client.hmget(self.keys.board, names)
        version, epoch, weights, paused, useful, refits, shape = values
        if shape is None:
            return None
        policy = PolicyVersion(
            version=state_int(key, "version", version, NO_VERSION, I31),
            epoch=state_int(key, "epoch", epoch, 0, I31),
            weights=_utf8(key, "weights", weights or b""),
            paused_until_ms=state_int(key, "paused_until_ms", paused or b"0"),
            min_useful=state_int(key, "min_useful", useful or b"-1"),
            refits=refits == b"1",
        )
        try:
            return policy, Shape.loads(shape)
        except ValueError as exc:
            raise broken(key, "shape", str(exc)) from None

    async def schemas(self) -> Schemas:
        """What the trainer that opened the run last speaks.

        A trainer of release 0.1.0 does not say, but raises the epoch: what an earlier one said does
        not hold for it.
        """
        names = ["schemas", "schemas_epoch", "epoch"]
        said, of, epoch = await self.client.hmget(self.keys.board, names)
        return Schemas.loads(said if of == epoch else None)

    async def trainer(self) -> tuple[str, int]:
        """Who last held the run, and when it last said so: Unix ms by Redis's clock, 0 if unknown."""
        who, seen = await self.client.hmget(self.keys.board, ["who", "seen_ms"])
        # A name that anybody may have written goes into a log line.
        return ascii((who or b"?").decode("utf-8", "replace"))[1:-1][:80], int(seen or 0)

    async def warnings(self) -> list[str]:
        """What the trainer finds wrong with the flow, a sentence each."""
        try:
            said = parse_json(await self.client.hget(self.keys.board, "warnings") or b"[]")
        except ValueError:
            return []
        return [str(sentence) for sentence in said] if isinstance(said, list) else []

    async def last_batch(self) -> int:
        """The number of the youngest batch that was ever planned; 0 if none was.

        Raises:
            CodecError: The field is no number.
        """
        raw = await self.client.hget(self.keys.board, "last_batch") or b"0"
        return state_int(self.keys.board, "last_batch", raw, 0, I31)

    async def rollbacks(self) -> list[tuple[int, int]]:
        """(epoch, version it began at) of every epoch, oldest first.

        Raises:
            CodecError: The field is no such list.
        """
        raw = await self.client.hget(self.keys.board, "rollbacks") or b""
        pairs = (part.partition(b":") for part in raw.split())
        try:
            return [(whole(e, 0, I31), whole(v, NO_VERSION, I31)) for e, _, v in pairs]
        except ValueError as exc:
            raise broken(self.keys.board, "rollbacks", str(exc)) from None

    async def form(self) -> str:
        """The form of the run's named arrays, as its trainer wrote it; "" if none did."""
        raw: bytes | None = await self.client.hget(self.keys.board, "form")
        return (raw or b"").decode("utf-8", "replace")

    async def wait(self, reader: Any, last: str, block_ms: int) -> str:
        """Wait for news after entry `last` ("$": from now on); returns the last entry seen."""
        reply = await reader.xread({self.keys.news: last}, block=block_ms)
        pairs: Sequence[Any] = list(reply.items() if isinstance(reply, dict) else reply or ())
        for _, entries in pairs:
            rows = entries[0] if entries and isinstance(entries[0], list) else entries
            if rows:
                last = rows[-1][0].decode()
        return last


def _utf8(key: str, name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise broken(key, name, str(exc)) from None
