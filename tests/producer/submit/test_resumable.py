"""A stateful source, put back where it stood: every prompt once, in the order it would have had."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from fixtures.fleet_processes import Processes
from support import wait_until, wait_until_async
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler

import rollfleet
from rollfleet.submit.feed import AHEAD, Feeder
from rollfleet.submit.resumable import STRIDE, Epochs, Mark, Marks
from rollfleet_common.errors import RollfleetError, SettingsError

#: torchdata 0.11 calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

ROWS = 37
PASSES = 3


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Row i has the one token i."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"token_ids": [index]}


class Counting:
    """A stateful source without torch; it counts what is read of it."""

    def __init__(self, rows: int = ROWS) -> None:
        self.rows = rows
        self.read = 0
        self._next = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._next < self.rows:
            row, self._next = self._next, self._next + 1
            self.read += 1
            yield {"token_ids": [row]}
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._next = state["next"]


class ByEpoch(torch.utils.data.Sampler[int]):
    """Shuffles by the epoch it is told, as DistributedSampler does."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(self.epoch).sample(range(ROWS), ROWS))

    def __len__(self) -> int:
        return ROWS


def loader(batch_size: int | None = 3, workers: int = 0, **options: Any) -> Any:
    if "sampler" not in options:
        # Not the loader's own generator: from that it draws seeds, too, and does not restore them.
        options["sampler"] = RandomSampler(Rows(), generator=torch.Generator().manual_seed(7))
    return StatefulDataLoader(
        Rows(),
        batch_size,
        num_workers=workers,
        collate_fn=_same if batch_size is None else list,
        **options,
    )


def _same(item: Any) -> Any:
    return item


SOURCES: dict[str, Callable[[], Any]] = {
    "plain": Counting,
    "plain, epochs": lambda: Epochs(Counting(), PASSES),
    "list, epochs": lambda: Epochs([{"token_ids": [i]} for i in range(ROWS)], PASSES),
    "items, one pass": lambda: loader(None),
    "batches, one pass": lambda: loader(3),
    "items, epochs": lambda: Epochs(loader(None), PASSES),
    "batches, epochs": lambda: Epochs(loader(3), PASSES),
    "batches of one, epochs": lambda: Epochs(loader(1), PASSES),
    "large batches, epochs": lambda: Epochs(loader(20), PASSES),
    "shuffled by epoch": lambda: Epochs(loader(4, sampler=ByEpoch()), PASSES),
}


def ids(prompts: Sequence[Any]) -> list[tuple[int, int]]:
    """Position and row of each prompt."""
    return [(p.position, int(p.token_ids[0])) for p in prompts]


async def take(feeder: Feeder, count: int | None = None) -> list[Any]:
    """The next `count` prompts, or all."""
    taken: list[Any] = []
    while count is None or len(taken) < count:
        prompt = await feeder.peek()
        if prompt is None:
            break
        taken.append(prompt)
        feeder.took(1)
    return taken


async def reference(make: Callable[[], Any]) -> list[tuple[int, int]]:
    feeder = Feeder(make(), 0, 1, asyncio.get_running_loop())
    feeder.start()
    return ids(await take(feeder))


def start(source: Any, skip: int = 0, **options: Any) -> Feeder:
    feeder = Feeder(source, skip, 1, asyncio.get_running_loop(), **options)
    feeder.start()
    return feeder


# ---- a feed that is resumed ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
async def test_after_any_crash_every_prompt_comes_once_and_in_its_order(kind: str) -> None:
    make = SOURCES[kind]
    whole = await reference(make)
    passes = PASSES if isinstance(make(), Epochs) else 1
    assert Counter(row for _, row in whole) == Counter(dict.fromkeys(range(ROWS), passes))
    rng = random.Random(kind)
    for _ in range(12):
        seen: list[tuple[int, int]] = []
        stood: Mark | None = None
        while True:
            # The server has all that was taken, also what came after the last checkpoint.
            feeder = start(make(), len(seen), stood=stood)
            before = await take(feeder, rng.randrange(45))
            stood = feeder.marks.before(feeder.reached) or stood
            after = await take(feeder, rng.randrange(30))
            feeder.stop()
            if not before and not after and feeder.exhausted:
                break
            seen += ids([*before, *after])
        assert seen == whole


async def test_with_workers_of_its_own(recwarn: pytest.WarningsRecorder) -> None:
    whole = await reference(lambda: loader(3, workers=1))
    feeder = start(loader(3, workers=1))
    first = ids(await take(feeder, 20))
    stood = feeder.marks.before(20)
    assert stood is not None
    await take(feeder)  # to its end: workers that are left in the middle end only after 5 s
    assert first + ids(await take(start(loader(3, workers=1), 20, stood=stood))) == whole
    # torch says how many processors it would like.
    assert all(issubclass(w.category, UserWarning) for w in recwarn)


async def test_what_was_read_ahead_is_not_lost() -> None:
    source = Counting(4 * AHEAD)
    feeder = start(source)
    await take(feeder, 5)
    await wait_until_async(lambda: source.read == AHEAD + 6, "the feeder to have read ahead")
    stood = feeder.marks.before(5)
    assert stood is not None
    assert stood.position <= 5
    feeder.stop()
    (sixth,) = await take(start(Counting(4 * AHEAD), 5, stood=stood), 1)
    assert ids([sixth]) == [(5, 5)]


async def test_only_what_is_due_is_read_again() -> None:
    feeder = start(Counting(10_000))
    await take(feeder, 5_000)
    stood = feeder.marks.before(5_000)
    feeder.stop()
    assert stood is not None
    again = Counting(10_000)
    feeder = start(again, 5_000, stood=stood)
    assert ids(await take(feeder, 1)) == [(5_000, 5_000)]
    feeder.stop()
    assert again.read <= STRIDE + AHEAD + 3


async def test_positions_that_are_still_out_stay_within_reach() -> None:
    oldest = 7
    feeder = start(Counting(1000), oldest=lambda: oldest)
    await take(feeder, 500)
    mark = feeder.marks.before(oldest)
    assert mark is not None
    assert mark.position <= 7
    again = (7, 123)
    resumed = start(Counting(1000), 500, stood=mark, again=again)
    assert ids(await take(resumed, 3)) == [(7, 7), (123, 123), (500, 500)]
    feeder.stop()
    resumed.stop()


async def test_marks_do_not_pile_up() -> None:
    feeder = start(Counting(20_000))
    await take(feeder, 20_000)
    assert len(feeder.marks) <= AHEAD // STRIDE + 3
    feeder.stop()


async def test_a_state_is_a_copy() -> None:
    class Leaky(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.live = {"next": 0}

        def state_dict(self) -> dict[str, int]:
            self.live["next"] = self._next
            return self.live

    feeder = start(Leaky())
    await take(feeder)
    mark = feeder.marks.before(0)
    assert mark is None or mark.state == {"next": mark.position}
    last = feeder.marks.before(ROWS)
    assert last is not None
    assert last.state == {"next": last.position}


async def test_a_source_that_cannot_be_put_back_says_so() -> None:
    class Moody(Counting):
        def load_state_dict(self, state: Mapping[str, int]) -> None:
            raise KeyError("of another data set")

    feeder = start(Moody(), 3, stood=Mark(0, {"next": 0}))
    with pytest.raises(RollfleetError, match="source of prompts raised KeyError"):
        await feeder.peek()


# ---- passes --------------------------------------------------------------------------------------


def test_passes_over_a_list_end_by_count_or_when_there_is_nothing() -> None:
    assert list(Epochs([1, 2], 2)) == [1, 2, 1, 2]
    assert list(Epochs([1, 2], 0)) == []
    assert list(Epochs([])) == []
    assert list(islice(Epochs([1, 2]), 5)) == [1, 2, 1, 2, 1]
    assert list(Epochs(iter([1, 2]))) == [1, 2]
    with pytest.raises(SettingsError, match="epochs is -1"):
        Epochs([], -1)


def test_passes_shuffled_from_a_generator_differ_and_repeat() -> None:
    first = [item[0]["token_ids"][0] for item in Epochs(loader(1), 2)]
    assert first == [item[0]["token_ids"][0] for item in Epochs(loader(1), 2)]
    assert first[:ROWS] != first[ROWS:]


def test_a_saved_place_that_is_none_is_refused() -> None:
    assert Mark.of(Mark(3, {"a": 1}).as_dict()) == Mark(3, {"a": 1})
    with pytest.raises(SettingsError, match="the state's field source"):
        Mark.of({"position": "x", "state": {}})


def test_the_last_mark_that_reaches_is_taken() -> None:
    marks = Marks()
    for position in (0, 10, 20):
        marks.add(Mark(position, None), oldest=12)
    assert [m and m.position for m in map(marks.before, (9, 10, 25))] == [None, 10, 20]


# ---- through a fleet -----------------------------------------------------------------------------


def data() -> Any:
    return Epochs(loader(4), 4)


@pytest.mark.parametrize("redis", ["ahead", "lost"])
def test_a_trainer_that_crashes_between_checkpoints(
    redis_url: str, processes: Processes, redis: str
) -> None:
    shape: dict[str, Any] = {"samples_per_version": 32, "group_size": 2, "starve_s": 30.0}
    trained: dict[int, int] = {}

    def note(batch: rollfleet.Batch) -> None:
        for rollout in batch.rollouts:
            trained[rollout.header.position] = int(rollout.samples[0].token_ids[0])

    processes.worker(redis_url, "shuffled")
    with rollfleet.connect(redis_url, run="shuffled", **shape) as fleet:
        fleet.feed(data())
        for step, batch in enumerate(fleet.batches(4, commit="checkpoint")):
            note(batch)
            if step == 1:
                wait_until(lambda: fleet.books().outstanding == 96, "the feed to fill the room")
                fleet.trained(batch)
                state = fleet.state_dict()
                fleet.commit()
                saved, at_checkpoint = dict(trained), fleet.books()
        # Two more batches were trained and are forgotten by the crash.
    # What is out may have to be fed again, so the place is before all of it.
    assert 0 < state["source"]["position"] <= min(state["open"]) < state["position"] - STRIDE
    trained = saved
    fresh = redis == "lost"
    with rollfleet.connect(redis_url, run="shuffled", state=state, fresh=fresh, **shape) as fleet:
        fleet.feed(data())
        for batch in fleet.batches():
            note(batch)
        again = fleet.books()
    whole = asyncio.run(reference(data))
    assert sorted(trained.items()) == whole
    assert again.balance == 0
    assert at_checkpoint.balance == 0


@pytest.mark.leaves_keys("nobody ran the prompts", "rf:*:prompts:*", "rf:*:group:*")
def test_a_checkpoint_before_the_feed_keeps_the_place(redis_url: str) -> None:
    state = {"run": "kept", "version": 0, "source": {"position": 16, "state": {"next": 16}}}
    with rollfleet.connect(redis_url, run="kept", state=state, group_size=2) as fleet:
        assert fleet.state_dict()["source"] == state["source"]


@pytest.mark.leaves_keys("nobody ran the prompts", "rf:*:prompts:*", "rf:*:group:*")
def test_a_source_without_state_has_none_in_the_checkpoint(redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="plain", samples_per_version=8) as fleet:
        fleet.feed([{"token_ids": [1]}])
        wait_until(lambda: fleet.books().submitted == 8, "the prompt to be submitted")
        assert "source" not in fleet.state_dict()
