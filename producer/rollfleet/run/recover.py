"""What a trainer finds when it opens a run that had one before: batches half-way to commitment.

- The plan of a batch at run level is the commit point; partitions are rolled forward from it, by
  this trainer or the next, any number of times.
- A batch that was handed out or trained but not committed is owed again, in its old order: whoever
  commits only at checkpoints gets back exactly what was trained since the last one.
"""

from collections.abc import Collection, MutableMapping, Sequence
from typing import Any

from rollfleet.records import Plan
from rollfleet_common.board import Board
from rollfleet_common.streams import Streams

__all__ = ["recover"]


async def recover(
    board: Board,
    token: str,
    streams: Sequence[Streams],
    last_trained: int,
    replay: MutableMapping[str, int],
    beyond: Collection[int] = (),
) -> None:
    """Finish or undo every plan that stands; may be repeated if it fails half-way.

    Args:
        board: Of the run.
        token: The trainer's.
        streams: Of every partition, in order.
        last_trained: Number of the last batch in the trainer's checkpoint: it and all before it
            are committed. 0: the trainer has no checkpoint, or committed all it holds.
        replay: Takes the batch by group name, of the groups that are owed again. A repeat adds to
            it: what an earlier try forgot in Redis is nowhere else.
        beyond: Numbers of later batches that are in the checkpoint as well.
    """
    for number, packed in (await board.plans()).items():
        plan = Plan.loads(number, packed)
        committed = plan.state == "committed" or number <= last_trained or number in beyond
        if committed:
            await plan.settle("commit", token, streams)
        else:
            for partition, here in enumerate(streams):
                owed: list[Any] = [(e, k) for p, e, k, _ in plan.rollouts if p == partition]
                await here.untrain(token, owed)
            replay.update({name: number for _, name in plan.groups})
        await board.plan(token, number, None, committed=committed)
