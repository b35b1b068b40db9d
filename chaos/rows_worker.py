"""Rows of the fault matrix: what can happen to a worker."""

import time

from chaos.harness import Stage
from chaos.processes import until
from chaos.rows import Row, back_s

__all__ = ["ROWS"]

#: Episodes so long that a worker is sure to hold leases.
LONG = {"CHAOS_MEAN_S": "0.8"}


def _kill_idle(stage: Stage) -> float | None:
    spare = stage.add_worker()
    until(lambda: spare.up, 10.0, stage.tend, "a third worker")
    stage.redis().hset("rf:{chaos}:board", "paused_until_ms", int(time.time() * 1000) + 3000)
    time.sleep(2.0)  # all finish what they run, and claim nothing
    stage.kill_worker(spare)
    stage.kill_worker(stage.fleet[0])
    return back_s(stage)


def _kill_busy(stage: Stage) -> float | None:
    for _ in range(3):
        until(lambda: bool(stage.fleet), 10.0, stage.tend, "workers")
        stage.kill_worker(stage.fleet[0])
        stage.add_worker()
        time.sleep(stage.o.lease_s + 1.0)
    back_s(stage)
    return None


def _kill_before_reply(stage: Stage) -> float | None:
    stage.disturb()
    stage.worker_proxy.drop_replies(b"EVALSHA", cut=False)
    until(lambda: stage.worker_proxy.replies_lost > 2, 5.0, stage.tend, "replies to be lost")
    stage.kill_worker(stage.fleet[0])
    stage.worker_proxy.resume()
    stage.worker_proxy.cut()
    stage.add_worker()
    time.sleep(stage.o.lease_s + 1.0)
    back_s(stage)
    return None


def _zombie(stage: Stage) -> float | None:
    for _ in range(2):
        worker = stage.fleet[0]
        stage.freeze_worker(worker)
        time.sleep(stage.o.lease_s + 2.0)
        stage.thaw_worker(worker)
        time.sleep(1.0)
    return back_s(stage)


def _hog(stage: Stage) -> float | None:
    time.sleep(stage.o.lease_s + 4.0)
    return back_s(stage)


def _term(stage: Stage) -> float | None:
    leaving = stage.fleet[0]
    stage.add_worker()
    stage.term_worker(leaving)
    until(lambda: leaving not in stage.workers, 15.0, stage.tend, "the drain")
    return leaving.drain.took_s if leaving.drain else None


def _term_twice(stage: Stage) -> float | None:
    leaving = stage.fleet[0]
    stage.add_worker()
    stage.term_worker(leaving)
    time.sleep(0.5)
    leaving.process.terminate()
    until(lambda: leaving not in stage.workers, 5.0, stage.tend, "the second signal to be heeded")
    return leaving.drain.took_s if leaving.drain else None


def _kill_after_grace(stage: Stage) -> float | None:
    leaving = stage.fleet[0]
    stage.add_worker()
    leaving.doomed = True
    leaving.process.terminate()
    time.sleep(0.3)
    stage.kill_worker(leaving)
    time.sleep(stage.o.lease_s + 1.0)
    back_s(stage)
    return None


def _poison(stage: Stage) -> float | None:
    def dead() -> bool:
        rows = stage.redis().xrange("rf:{chaos/0}:dead")
        return any(fields.get(b"why") == b"poison" for _, fields in rows)

    began = time.time()
    until(dead, 45.0, stage.tend, "the poison to be buried")
    return back_s(stage, began)


def _scale(stage: Stage) -> float | None:
    for _ in range(4):
        stage.add_worker()
    until(lambda: len(stage.fleet) >= 6, 20.0, stage.tend, "six workers")
    time.sleep(2.0)
    for worker in stage.fleet[1:]:
        stage.term_worker(worker)
    until(lambda: len(stage.workers) == 1, 20.0, stage.tend, "five drains")
    return back_s(stage)


def _clock(stage: Stage) -> float | None:
    time.sleep(8.0)
    return back_s(stage)


ROWS = [
    Row("worker killed, idle", "kill -9 of workers that hold nothing", _kill_idle),
    Row(
        "worker killed, mid-rollout",
        "kill -9 of busy workers, three times",
        _kill_busy,
        {"env": LONG},
    ),
    Row(
        "worker killed between deliver and its reply",
        "replies to scripts are withheld, then kill -9",
        _kill_before_reply,
        {"env": LONG, "proxied": True},
    ),
    Row(
        "worker frozen past its lease, then continued",
        "SIGSTOP for the lease + 2 s, SIGCONT: the zombie's results must be refused",
        _zombie,
        {"env": LONG, "workers": 3},
    ),
    Row(
        "event loop blocked past the lease",
        "a workflow blocks its worker's loop for the lease + 2 s",
        _hog,
        {"workflow": "chaos.workflows:Hog", "env": {**LONG, "CHAOS_HOG_S": "4"}},
        {"P9": "a blocked loop cannot answer /livez: that is what /livez is for"},
    ),
    Row("SIGTERM while busy", "one SIGTERM", _term, {"env": LONG}),
    Row(
        "SIGTERM twice",
        "a second SIGTERM after 0.5 s hands everything back at once",
        _term_twice,
        {"env": {"CHAOS_MEAN_S": "1.5"}, "drain_s": 20.0},
    ),
    Row(
        "SIGKILL after the grace period",
        "SIGTERM, and kill -9 while it drains",
        _kill_after_grace,
        {"env": LONG},
    ),
    Row(
        "poison prompt",
        "one sample kills its worker every time; 3 deliveries allowed",
        _poison,
        {
            "workflow": "chaos.workflows:Poison",
            "env": {"CHAOS_POISON_POSITION": "60"},
            "worker_flags": ("--attempts-poison", "3"),
            "lease_s": 1.0,
            "workers": 3,
        },
    ),
    Row("scale 1 to N to 1", "two workers to six to one, under load", _scale),
    Row(
        "clock jumps on worker hosts",
        "the workers' wall clocks jump by an hour, to and fro, every 2 s",
        _clock,
        {"env": {"CHAOS_CLOCK_S": "3600"}},
        note="leases and delays go by Redis TIME; a jump of Redis's own clock is not played",
    ),
]
