"""The judge can say no: on made-up evidence for every promise, and on real fleets with real bugs."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from chaos.case import Case
from chaos.hunt import catch
from chaos.mutants import MUTANTS
from chaos.observe import Delivery, Drain, Evidence, Kill, Look, Outage
from chaos.oracle import PROMISES, Verdict, judge
from chaos.snapshot import Snapshot, take

NOW = 1_000_000.0


def line(ev: str, **fields: Any) -> dict[str, Any]:
    return {"ev": ev, "t": NOW, "life": 1, **fields}


def row(group: int, index: int, **fields: Any) -> dict[str, Any]:
    own = {"position": float(group), "own": float(index), "born": NOW}
    made = {"group": f"p{group}", "index": index, "n": 2, "epoch": 1, "oldest": 0, "newest": 0}
    return {**made, "digest": "d", **own, **fields}


def sound() -> Case:
    """Two groups of two, trained on in one batch; nothing is wrong."""
    samples = [row(g, i) for g in (0, 1) for i in (0, 1)]
    log = [
        line("opening", version=-1),
        line("opened", epoch=1, version=0, cursor=-1),
        line("acked", upto=1, n=2),
        line("handed", batch=1, epoch=1, samples=samples),
        line("checkpoint", batches=[1], version=0),
        line("ended"),
    ]
    evidence = Evidence(
        deliveries=[Delivery(NOW, s["group"], s["index"], "w1") for s in samples],
        kills=[Kill(NOW, "w0", 3, recovered_s=2.5)],
        drains=[Drain(NOW, "w1", 5.0, took_s=0.2, code=0)],
        looks=[
            Look(NOW - 10, "w1", live=True, ready=True, reason="ok"),
            Look(NOW - 2, "w1", live=True, ready=False, reason="no-redis"),
        ],
        outages=[Outage("down", NOW - 8, NOW - 1)],
        most_outstanding=4,
    )
    ledger = {"submitted:train": 4, "settled:train": 4, "delivered": 4, "committed": 4}
    snapshot = Snapshot(ledger=ledger)
    return Case(
        log,
        {},
        snapshot,
        evidence,
        lease_s=2.0,
        max_staleness=2,
        limit=4,
        ended=True,
    )


def verdict(case: Case, promise: str) -> Verdict:
    return next(v for v in judge(case) if v.promise == promise)


def handed(case: Case) -> list[dict[str, Any]]:
    return next(x["samples"] for x in case.log if x["ev"] == "handed")


def lose_one(case: Case) -> None:
    case.log[2]["upto"] = 2


def unbalance(case: Case) -> None:
    case.snapshot.ledger["submitted:train"] += 1


def deliver_twice(case: Case) -> None:
    case.evidence.deliveries.append(Delivery(NOW + 1, "p0", 0, "w2"))


def train_again(case: Case) -> None:
    case.log.insert(5, line("handed", batch=2, epoch=1, samples=[row(0, 0), row(0, 1)]))
    case.log.insert(6, line("checkpoint", batches=[2], version=0))


def grow_stale(case: Case) -> None:
    case.log.insert(3, line("published", version=3, epoch=1))


def lie_about_version(case: Case) -> None:
    case.log.insert(3, line("publishing", version=1, epoch=1))
    case.log.insert(4, line("published", version=1, epoch=1))
    handed(case)[0].update(oldest=1, newest=1, born=NOW - 5)


def come_from_the_future(case: Case) -> None:
    handed(case)[0].update(oldest=7, newest=7)


def mistake_a_rollback(case: Case) -> None:
    """Version 3 of an epoch that was rolled back to 0 counts as -3."""
    case.log.insert(2, line("opened", epoch=2, version=0, cursor=-1))
    case.log[4]["epoch"] = 2
    handed(case)[0].update(oldest=3, newest=3)


def recover_late(case: Case) -> None:
    case.evidence.kills[0].recovered_s = 4.1


def never_recover(case: Case) -> None:
    case.evidence.kills[0].recovered_s = None


def leak(case: Case) -> None:
    case.snapshot.leftovers.append("payload:1-0:ab: no TTL")


def stay_undrained(case: Case) -> None:
    case.ended = False


def drain_badly(case: Case) -> None:
    case.evidence.drains[0].code = 1
    case.evidence.outages.clear()


def drain_slowly(case: Case) -> None:
    case.evidence.drains[0].took_s = 9.0
    case.evidence.outages.clear()


def drop_for_want_of_room(case: Case) -> None:
    case.snapshot.ledger["dropped:overflow"] = 1


def overfill(case: Case) -> None:
    case.evidence.most_outstanding = 5


def lie_ready(case: Case) -> None:
    case.evidence.looks[1].ready = True


def die_of_redis(case: Case) -> None:
    case.evidence.looks[1].live = False


def tear(case: Case) -> None:
    handed(case).pop()


def mix_up(case: Case) -> None:
    handed(case)[0]["own"] = 1.0


BREACHES = {
    lose_one: "P1", unbalance: "P1", deliver_twice: "P2", train_again: "P3", grow_stale: "P4",
    lie_about_version: "P4", come_from_the_future: "P4", mistake_a_rollback: "P4",
    recover_late: "P5", never_recover: "P5", leak: "P6", stay_undrained: "P6", drain_badly: "P7",
    drain_slowly: "P7", drop_for_want_of_room: "P8", overfill: "P8", lie_ready: "P9",
    die_of_redis: "P9", tear: "P10", mix_up: "P10",
}  # fmt: skip


def test_a_sound_run_is_judged_sound_on_every_promise() -> None:
    assert [(v.promise, v.ok) for v in judge(sound())] == [(p, True) for p in PROMISES]


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.__name__)
def test_a_breach_is_seen(breach: Any) -> None:
    case = sound()
    breach(case)
    found = verdict(case, BREACHES[breach])
    assert found.ok is False
    assert found.witnesses


def test_what_redis_may_lose_by_contract_is_counted_and_not_condemned() -> None:
    case = sound()
    lose_one(case)
    case.evidence.excused.append((NOW - 1, NOW + 1))
    found = verdict(case, "P1")
    assert found.ok
    assert found.measured["lost by fsync contract"] == 2


def test_a_superseded_trainer_cannot_write_history() -> None:
    case = sound()
    zombie = {"life": 0}
    case.log.insert(4, line("checkpoint", batches=[1], version=0) | zombie)
    assert verdict(case, "P3").ok


def test_logs_are_read_whole_and_torn_lines_skipped(tmp_path: Path) -> None:
    (tmp_path / "trainer.jsonl").write_text(json.dumps(line("ended")) + '\n{"ev": "ha')
    (tmp_path / "trainer.out").write_text(
        '{"event": "group dropped", "group": "p7", "reason": "stale"}\nnoise\n'
    )
    case = Case.read(tmp_path, Snapshot(), Evidence(), lease_s=1.0, max_staleness=1, limit=1)
    assert case.ended
    assert case.dropped == {"p7": "stale"}


def test_the_snapshot_counts_every_place_of_the_law(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        p = "rf:{snap/0}:"
        client.hset(f"{p}ledger", mapping={"submitted:train": 5, "dropped:stale": 1, "dead": 1})
        for index in range(2):
            client.xadd(f"{p}prompts:default", {"g": "p0", "i": index})
        client.xgroup_create(f"{p}prompts:default", "workers", "0")
        client.xreadgroup("workers", "w", {f"{p}prompts:default": ">"}, count=1)
        client.zadd(f"{p}delayed:default", {"p0:2": time.time()})
        client.set(f"{p}payload:1-0:ab", b"x")
        shot = take(client, "snap")
        client.flushdb()
    assert shot.counts == {"waiting": 1, "in flight": 1, "delayed": 1}
    assert shot.balance == 0
    assert shot.everywhere() == {("p0", 0), ("p0", 1), ("p0", 2)}
    assert "payload:1-0:ab: no TTL" in shot.leftovers


def test_there_is_a_mutant_for_every_promise() -> None:
    assert list(MUTANTS) == list(PROMISES)


@pytest.mark.slow
@pytest.mark.parametrize("promise", ["P4", "P6", "P9"])
def test_a_planted_bug_is_caught(promise: str) -> None:
    verdicts = {v.promise: v for v in catch(promise)}
    assert verdicts[promise].ok is False, verdicts[promise]


@pytest.mark.slow
def test_the_same_scene_without_the_bug_is_clean() -> None:
    assert [v for v in catch("P6", planted=False) if v.ok is False] == []
