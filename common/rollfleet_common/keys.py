"""Every Redis name of a run, in one place. Imports nothing of ours but errors and schema versions.

- One hash tag per partition, ``{run/p}``: every atomic step touches one partition, so a run can be
  spread over a Redis Cluster. Run-level names carry the tag ``{run}``.
- Prompts of schema 2 and later have keys that name the schema: a worker that cannot read them never
  claims them, whatever its release knows.
- A group lives in one partition, chosen by :func:`partition_of` from its name.
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from rollfleet_common import schemas
from rollfleet_common.errors import SettingsError

__all__ = ["LAST_ID", "PartitionKeys", "RunKeys", "check_name", "partition_of", "route_names"]

#: The highest id that an entry of a stream can have: after it nothing can be added.
LAST_ID = "18446744073709551615-18446744073709551615"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")


def check_name(name: str, what: str) -> str:
    """`name` itself, if it may be part of a key.

    Raises:
        SettingsError: It is empty, over 64 characters, or has characters outside ``A-Za-z0-9_.-``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SettingsError(
            f"{what} {name!r} cannot be part of a Redis key: use 1 to 64 letters, digits, '_', '.' "
            "or '-', and begin with a letter or digit"
        )
    return name


def route_names(raw: Iterable[bytes]) -> list[str]:
    """The members of a `routes` set in order; what could be no route of ours is left out."""
    names = (member.decode("utf-8", "replace") for member in raw)
    return sorted(name for name in names if _NAME.fullmatch(name))


def partition_of(group: str, partitions: int) -> int:
    """The partition in which `group` lives: crc32 of its name, so that any language can agree."""
    return zlib.crc32(group.encode()) % partitions if partitions > 1 else 0


def _of(schema: int | None) -> str:
    """What keys of prompts of a schema bear after their first word."""
    number = schemas.PROMPT if schema is None else schema
    return "" if number == 1 else f".{number}"


@dataclass(frozen=True, slots=True)
class PartitionKeys:
    """The names of one partition of a run."""

    run: str
    partition: int

    @property
    def prefix(self) -> str:
        """What every name begins with: ``rf:{run/p}:``."""
        return f"rf:{{{self.run}/{self.partition}}}:"

    def prompts(self, route: str, schema: int | None = None) -> str:
        """Stream of prompts waiting for or leased to workers that serve `route`.

        Args:
            route: Which workflow runs them.
            schema: Of the prompts; None: the one that this release writes.
        """
        return f"{self.prefix}prompts{_of(schema)}:{route}"

    def delayed(self, route: str, schema: int | None = None) -> str:
        """Sorted set of prompts that wait for their next attempt, by due time in ms."""
        return f"{self.prefix}delayed{_of(schema)}:{route}"

    def parked(self, route: str) -> str:
        """Hash of what the delayed prompts say."""
        return f"{self.prefix}parked{_of(None)}:{route}"

    def group(self, group: str) -> str:
        """Hash: where every member of a group is."""
        return f"{self.prefix}group:{group}"

    def payload(self, suffix: str) -> str:
        """String: the training sequences of one rollout."""
        return f"{self.prefix}payload:{suffix}"

    def progress(self, group: str, index: int, call: int) -> str:
        """String with a TTL: what is done of one call to generate, for the next attempt."""
        return f"{self.prefix}progress:{group}:{index}:{call}"

    @property
    def rollouts(self) -> str:
        """Stream of rollout headers for the trainer."""
        return f"{self.prefix}rollouts"

    @property
    def tombstones(self) -> str:
        """Stream of samples that will never come, for the trainer."""
        return f"{self.prefix}tombstones"

    @property
    def trained(self) -> str:
        """Set of rollout entries that were trained on and are not committed yet."""
        return f"{self.prefix}trained"

    @property
    def dead(self) -> str:
        """Stream of dead letters."""
        return f"{self.prefix}dead"

    @property
    def ledger(self) -> str:
        """Hash of counters, written by scripts only."""
        return f"{self.prefix}ledger"

    @property
    def fence(self) -> str:
        """Hash: trainer token, epoch, version and the oldest version that is still useful."""
        return f"{self.prefix}fence"

    @property
    def tap(self) -> str:
        """String with a TTL: while it stands, what is freed is recorded."""
        return f"{self.prefix}tap"

    @property
    def tapped(self) -> str:
        """Capped stream with a TTL: headers of what was freed, for who records."""
        return f"{self.prefix}tapped"

    @property
    def routes(self) -> str:
        """Set of the routes that prompts were ever submitted to."""
        return f"{self.prefix}routes"

    @property
    def marks(self) -> str:
        """Sorted set of submission ids by data set position, for idempotent feeding."""
        return f"{self.prefix}marks"


@dataclass(frozen=True, slots=True)
class RunKeys:
    """The names of a run that belong to no partition."""

    run: str

    def partition(self, partition: int) -> PartitionKeys:
        """The names of one partition."""
        return PartitionKeys(self.run, partition)

    @property
    def prefix(self) -> str:
        """What every name begins with: ``rf:{run}:``."""
        return f"rf:{{{self.run}}}:"

    @property
    def board(self) -> str:
        """Hash: version, epoch, weights, pause, trainer token and the shape of the run."""
        return f"{self.prefix}board"

    @property
    def news(self) -> str:
        """Capped stream that wakes those who follow the board."""
        return f"{self.prefix}news"

    @property
    def trainer(self) -> str:
        """String with a TTL: the token of the trainer that holds the run."""
        return f"{self.prefix}trainer"

    @property
    def workers(self) -> str:
        """Hash of worker cards by worker id."""
        return f"{self.prefix}workers"

    @property
    def servers(self) -> str:
        """Hash of inference servers by URL, as operators registered them."""
        return f"{self.prefix}servers"

    @property
    def weights(self) -> str:
        """Hash of what the trainer refitted inference servers to, by URL."""
        return f"{self.prefix}weights"

    @property
    def batches(self) -> str:
        """Hash of the batch plans that are handed out or being committed, by batch number."""
        return f"{self.prefix}batches"

    @property
    def recorder(self) -> str:
        """String with a TTL: the token of the recorder that holds the taps."""
        return f"{self.prefix}recorder"

    def rank(self, rank: int) -> str:
        """String with a TTL: a sign of life of one rank of the trainer (:mod:`rollfleet.ranks`)."""
        return f"{self.prefix}rank:{rank}"

    def ranks(self, session: str, number: int) -> str:
        """Hash with a TTL: what each rank of a session said in one round."""
        return f"{self.prefix}ranks:{session}:{number}"

    def share(self, plan: str, rank: int) -> str:
        """String with a TTL: headers of the rollouts that one rank is to fetch for a batch."""
        return f"{self.prefix}share:{plan}:{rank}"
