"""The ills that the doctor knows from cross-checking a run: how bad each is, and what to do."""

from rollfleet_console.doctor.findings import Severity

__all__ = ["DIAGNOSES"]

#: Of every ill: severity, check, what (of n), and what to do.
DIAGNOSES: dict[str, tuple[Severity, str, str, str]] = {
    "unbalanced": (
        Severity.ERROR,
        "books",
        (
            "{n} partition(s) whose books do not balance: samples submitted and nowhere to be found "
            "(+), or more found than were submitted (-)"
        ),
        (
            "Redis lost writes (power, failover, FLUSHALL), or somebody changed keys by hand: submit "
            "what is missing again; a trainer that opens the run with fresh=True begins anew"
        ),
    ),
    "fenced": (
        Severity.ERROR,
        "trainer",
        "{n} partition(s) obey another trainer than the board names",
        (
            "a trainer died while it opened the run, or two fight over it: start one, with "
            "take_over=True"
        ),
    ),
    "adrift": (
        Severity.ERROR,
        "groups",
        (
            "{n} member(s) of groups are said to be on a prompts stream, and are not: their groups "
            "will never close"
        ),
        (
            "Redis lost writes, or a prompt was deleted by hand: an open trainer submits them again "
            "within two of its leases; if none is open, start one"
        ),
    ),
    "unheld": (
        Severity.ERROR,
        "groups",
        (
            "{n} prompt(s) were delivered to a worker that holds no lease on them: nobody runs them, and "
            "their groups will not close"
        ),
        (
            "somebody deleted the worker's consumer (XGROUP DELCONSUMER): an open trainer submits them "
            "again within two of its leases; if none is open, start one"
        ),
    ),
    "unparked": (
        Severity.ERROR,
        "groups",
        "{n} member(s) of groups are said to wait for another attempt, and do not",
        "as for prompts that are gone: an open trainer submits them again",
    ),
    "undelivered": (
        Severity.ERROR,
        "groups",
        "{n} member(s) of groups are said to be delivered, but their header is gone",
        "as for prompts that are gone: an open trainer submits them again",
    ),
    "unburied": (
        Severity.ERROR,
        "groups",
        (
            "{n} member(s) of groups are closed without a rollout, and no tombstone says so: a trainer "
            "that is opened now would wait for them for ever"
        ),
        "Redis lost writes, or a tombstone was deleted by hand: submit the group again",
    ),
    "shapeless": (
        Severity.ERROR,
        "groups",
        "{n} group record(s) cannot be read",
        "they were not written by rollfleet: delete them, if nobody knows better",
    ),
    "unfreed": (
        Severity.WARNING,
        "groups",
        (
            "{n} group(s) are over, with every member closed and nothing left to settle, but their "
            "record was not freed"
        ),
        "harmless but for their memory: delete the records",
    ),
    "stray": (
        Severity.WARNING,
        "groups",
        "{n} group(s) have rollouts or tombstones, but no record: their other members will not come",
        (
            "Redis lost writes, or a record was deleted by hand: open the run with fresh=True when it "
            "has ended"
        ),
    ),
    "headless": (
        Severity.WARNING,
        "orphans",
        "{n} payload(s) that no header names and that never expire: memory that does not return",
        "delete these keys",
    ),
    "bodiless": (
        Severity.ERROR,
        "orphans",
        "{n} rollout(s) whose payload is gone: the trainer will drop their groups as `lost`",
        "find who evicts or deletes keys (maxmemory-policy must be noeviction)",
    ),
    "parked alone": (
        Severity.ERROR,
        "orphans",
        "{n} parked prompt(s) that no due time will bring back",
        "a sorted set `delayed` was changed by hand: submit these groups again",
    ),
    "due alone": (
        Severity.ERROR,
        "orphans",
        "{n} due time(s) of prompts whose content is gone",
        "a hash `parked` was changed by hand: submit these groups again",
    ),
    "trained alone": (
        Severity.WARNING,
        "orphans",
        "{n} rollout(s) count as trained, but are not on the stream",
        "the books are off by as many: SREM them from `trained`",
    ),
    "unreadable": (
        Severity.WARNING,
        "orphans",
        "{n} rollout header(s) cannot be read",
        "the trainer moves them to the dead letters when it reads them; start one",
    ),
    "plan": (
        Severity.ERROR,
        "plans",
        (
            "{n} batch(es) that were handed out and not committed lack rollouts: they cannot be served "
            "again whole"
        ),
        "Redis lost writes: resume the trainer from a checkpoint, and feed what is missing again",
    ),
    "planless": (
        Severity.ERROR,
        "plans",
        "{n} plan(s) of batches cannot be read: no trainer can open the run",
        "they are of another release, or not ours: look before you HDEL them",
    ),
}
