"""Every rank hears every other in the same round, or learns in bounded time that it cannot."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fixtures.fleet_processes import Processes
from fixtures.servers import MakeServer
from support import wait_until

from rollfleet.ranks import RedisCollective, Solo, redis_collective
from rollfleet.ranks.collective import collective_named
from rollfleet_common.errors import CollectiveError, SettingsError
from rollfleet_common.redis import connect_sync


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("ALIVE_S", 0.5), ("BEAT_S", 0.1), ("GONE_S", 0.3), ("AGAIN_S", 0.1)):
        monkeypatch.setattr(redis_collective, name, seconds)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returned or raised, all made at once."""
    answers: list[Any] = [None] * len(calls)

    def call(at: int) -> None:
        try:
            answers[at] = calls[at]()
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            answers[at] = exc

    threads = [threading.Thread(target=call, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return answers


def members(url: str, size: int) -> list[RedisCollective]:
    return [RedisCollective(url, "c", rank=rank, size=size) for rank in range(size)]


def gather(ranks: list[RedisCollective], *parts: bytes, timeout_s: float = 10.0) -> list[Any]:
    return together(
        *(lambda r=r, p=p: r.all_gather(p, timeout_s) for r, p in zip(ranks, parts, strict=True))
    )


def test_alone() -> None:
    assert Solo().all_gather(b"x", 1) == [b"x"]


def test_a_name_is_a_collective(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(collective_named("auto", redis_url, "c", 1), Solo)
    with pytest.raises(SettingsError, match="RANK and WORLD_SIZE"):
        collective_named("redis", redis_url, "c", 1)
    with pytest.raises(SettingsError, match="must be auto, torch"):
        collective_named("carrier pigeon", redis_url, "c", 1)  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = collective_named("redis", redis_url, "c", 1)
    assert (made.rank, made.size) == (1, 2)
    made.close()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SettingsError, match="of 2 ranks it must be 0 to 1"):
        collective_named("redis", redis_url, "c", 1)


def test_every_rank_hears_all_in_order(redis_url: str) -> None:
    ranks = members(redis_url, 3)
    for number in range(20):
        parts = [bytes([number, rank]) * rank for rank in range(3)]
        assert gather(ranks, *parts) == [parts] * 3
    for rank in ranks:
        rank.close()
    with connect_sync(redis_url, role="test") as client:
        assert all(client.ttl(key) > 0 for key in client.scan_iter("*"))


def test_what_an_earlier_job_left_is_not_heard(redis_url: str) -> None:
    old = members(redis_url, 2)
    assert gather(old, b"old 0", b"old 1") == [[b"old 0", b"old 1"]] * 2
    for rank in old:
        rank._ended.set()  # killed: nothing is taken back
        assert rank._beating is not None
        rank._beating.join()
    new = members(redis_url, 2)
    # Rank 1 comes late: rank 0 must not take the old one's sign of life for its.
    late = threading.Event()

    def second() -> Any:
        late.wait(10)
        return new[1].all_gather(b"new 1", 10)

    def first() -> Any:
        threading.Timer(0.2, late.set).start()
        return new[0].all_gather(b"new 0", 10)

    assert together(first, second) == [[b"new 0", b"new 1"]] * 2
    for rank in new:
        rank.close()


def test_a_rank_of_an_earlier_job_that_thaws_is_not_taken_for_its_successor(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = members(redis_url, 2)
    gather(old, b"old 0", b"old 1")
    for rank in old:
        rank._ended.set()
        assert rank._beating is not None
        rank._beating.join()
    new = members(redis_url, 2)
    beat, looked = RedisCollective._beat, threading.Event()

    def overwritten(self: RedisCollective) -> None:
        if self.rank == 0:
            with connect_sync(redis_url, role="test") as client:
                for rank in old:
                    client.set(self._keys.rank(rank.rank), rank._nonce, px=10_000)
            looked.wait(0.3)  # while the new rank 0 looks at who is there
        beat(self)

    monkeypatch.setattr(RedisCollective, "_beat", overwritten)
    first: list[Any] = []
    leader = threading.Thread(target=lambda: first.append(new[0].all_gather(b"new 0", 10)))
    leader.start()
    wait_until(lambda: new[0]._beating is not None, "rank 0 has begun to join")
    looked.wait(0.2)
    assert new[1].all_gather(b"new 1", 10) == [b"new 0", b"new 1"]
    leader.join(10)
    assert first == [[b"new 0", b"new 1"]]
    for rank in new:
        rank.close()


def test_a_rank_that_died_is_named_long_before_the_timeout(redis_url: str) -> None:
    ranks = members(redis_url, 3)
    gather(ranks, b"", b"", b"")
    ranks[2]._ended.set()  # its process is gone, and with it its beat
    began = time.monotonic()
    answers = gather(ranks[:2], b"", b"", timeout_s=60)
    assert time.monotonic() - began < 30
    for answer in answers:
        assert isinstance(answer, CollectiveError)
        assert "rank 2 of 3 gives no sign of life" in str(answer)
    ranks[0].close()
    ranks[1].close()


def test_a_rank_that_leaves_says_why(redis_url: str) -> None:
    ranks = members(redis_url, 2)
    gather(ranks, b"", b"")
    answers = together(lambda: ranks[0].all_gather(b"", 60), lambda: ranks[1].close("no memory"))
    assert "rank 1 of 2 has left: no memory" in str(answers[0])
    ranks[0].close()


def test_a_slow_rank_is_waited_for_and_named_in_the_end(redis_url: str) -> None:
    ranks = members(redis_url, 2)
    gather(ranks, b"", b"")
    with pytest.raises(CollectiveError, match=r"rank 0 of 2 waited \d s in vain for rank 1"):
        ranks[0].all_gather(b"", 1.0)
    for rank in ranks:
        rank.close()


def test_a_rank_that_never_joins_is_named(redis_url: str) -> None:
    (first, _) = members(redis_url, 2)
    with pytest.raises(CollectiveError, match="in vain for rank 1 to join run 'c'"):
        first.all_gather(b"", 0.5)
    first.close()


def test_a_redis_that_comes_back_empty_changes_nothing(make_server: MakeServer) -> None:
    server = make_server(appendonly="no")
    ranks = members(server.url, 2)
    gather(ranks, b"a", b"b")

    def second() -> Any:
        key = ranks[0]._keys.ranks(ranks[0]._session, 2)
        with connect_sync(server.url, role="test") as client:
            wait_until(lambda: client.hlen(key) == 1, "rank 0 has spoken")
        server.kill()
        server.restart()
        return ranks[1].all_gather(b"d", 20)

    assert together(lambda: ranks[0].all_gather(b"c", 20), second) == [[b"c", b"d"]] * 2
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("number", [0, 2])
def test_a_redis_that_loses_a_round_that_one_rank_has_read_hangs_nobody(
    make_server: MakeServer, number: int
) -> None:
    """Rank 0 is a round ahead: rank 1 still needs what it said before. Round 0 is where they meet."""
    server = make_server(appendonly="no")
    ranks = members(server.url, 2)
    if number:
        gather(ranks, b"a", b"b")
    lost = threading.Event()
    hlen = ranks[1]._client.hlen

    def late(key: Any) -> Any:
        """Rank 1 looks at the round only once it was lost."""
        if not lost.is_set() and key.endswith(f":{number}"):
            wait_until(lambda: hlen(key) == 2, "both have spoken")
            wait_until(lambda: ranks[0]._round == number + 1, "rank 0 has gone on")
            with connect_sync(server.url, role="test") as client:
                client.flushall()
            lost.set()
        return hlen(key)

    ranks[1]._client.hlen = late  # type: ignore[method-assign]

    def first() -> Any:
        if number:
            assert ranks[0].all_gather(b"c", 20) == [b"c", b"d"]
        return ranks[0].all_gather(b"e", 20)

    def second() -> Any:
        if number:
            assert ranks[1].all_gather(b"d", 20) == [b"c", b"d"]
        return ranks[1].all_gather(b"f", 20)

    assert together(first, second) == [[b"e", b"f"]] * 2
    assert lost.is_set()
    for rank in ranks:
        rank.close()


def torchrun(processes: Processes, *argv: str) -> Any:
    flags = ["--standalone", "--nproc-per-node=2", "-m", "fixtures.torch_ranks"]
    env = {"OMP_NUM_THREADS": "1"}
    return processes.start("-m", "torch.distributed.run", *flags, *argv, name="torch", env=env)


def test_torch_ranks_hear_each_other(processes: Processes) -> None:
    """And the one that is left learns at once that the other was killed."""
    job = torchrun(processes, "die")
    for rank in (0, 1):
        heard = job.event("heard", rank=rank)["heard"]
        assert heard == [[0, 1], [0, 1000], [0, 0]]
        assert job.event("words", rank=rank)["words"] == ["rank 0", "rank 1"]
    gone = job.event("gone", rank=0)
    assert gone["after_s"] < 25
    assert "rank 0 of 2 did not hear the others" in gone["message"]
    assert job.wait() != 0
