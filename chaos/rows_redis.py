"""Rows of the fault matrix: what can happen to Redis and the way to it."""

import shutil
import time
from collections.abc import Callable

from chaos.failover import failover
from chaos.harness import Stage
from chaos.processes import until
from chaos.rows import Row, back_s

__all__ = ["ROWS"]

BY_CONTRACT = "Redis lost acknowledged writes: within its fsync contract"
#: How long after an acknowledgement the trainer's program may have logged it.
LOG_S = 0.3


def _restart(down_s: float) -> Callable[[Stage], float | None]:
    def scene(stage: Stage) -> float | None:
        stage.kill_redis()
        deadline = time.monotonic() + down_s
        while time.monotonic() < deadline:
            stage.tend()
            time.sleep(0.1)
        stage.restart_redis()
        return back_s(stage)

    return scene


def _frozen(stage: Stage) -> float | None:
    stage.freeze_redis()
    time.sleep(20.0)
    stage.thaw_redis()
    return back_s(stage)


def _flush(stage: Stage) -> float | None:
    stage.seen.excused.append((0.0, time.time() + LOG_S))
    stage.disturb()
    with stage.redis() as client:
        client.flushall()
    return back_s(stage)


def _empty(stage: Stage) -> float | None:
    stage.kill_redis()
    stage.seen.excused.append((0.0, time.time() + LOG_S))
    shutil.rmtree(stage.dir / "redis" / "appendonlydir")
    stage.restart_redis()
    return back_s(stage)


def _cut_aof(stage: Stage) -> float | None:
    """What a power loss does with everysec: the last second never reached the disk."""
    files = [p for p in (stage.dir / "redis" / "appendonlydir").iterdir() if ".incr." in p.name]
    sizes = {path: path.stat().st_size for path in files}
    began = time.time()
    time.sleep(1.0)
    stage.kill_redis()
    stage.seen.excused.append((began - 0.1, time.time() + LOG_S))
    for path, size in sizes.items():
        with path.open("r+b") as file:
            file.truncate(size)
    stage.restart_redis()
    return back_s(stage)


def _cut_aof_after_commit(stage: Stage) -> float | None:
    committed = _committed(stage)
    until(lambda: _committed(stage) > committed, 20.0, stage.tend, "a commit")
    return _cut_aof(stage)


def _committed(stage: Stage) -> int:
    return (stage.dir / "trainer.jsonl").read_text().count('"committed"')


def _replies(stage: Stage) -> float | None:
    for word in (b"EVALSHA", b"XREADGROUP", b"SET", b"HMGET", b"MGET", b"HSET", b"XREAD\r"):
        for proxy in (stage.worker_proxy, stage.trainer_proxy):
            stage.disturb()
            proxy.drop_replies(word)
            time.sleep(0.5)
            proxy.resume()
            stage.tend()
        stage.warm(16)
    return back_s(stage)


def _swallowed(stage: Stage) -> float | None:
    for proxy in (stage.worker_proxy, stage.trainer_proxy):
        stage.disturb()
        proxy.pause()
        time.sleep(7.0)
        proxy.resume()
    return back_s(stage)


def _full(stage: Stage) -> float | None:
    with stage.redis() as client:
        client.config_set("maxmemory", 1)  # what is stored already is over it: no write may grow
        time.sleep(4.0)
        client.config_set("maxmemory", 0)
    return back_s(stage)


def _repeat(*words: str) -> Callable[[Stage], float | None]:
    def scene(stage: Stage) -> float | None:
        with stage.redis() as client:
            for _ in range(10):
                stage.disturb()
                client.execute_command(*words)
                time.sleep(0.3)
                stage.tend()
        return back_s(stage)

    return scene


def _noauth(stage: Stage) -> float | None:
    with stage.redis() as client:
        stage.disturb()
        client.config_set("requirepass", "changed")
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        deadline = time.monotonic() + 4.0
        while time.monotonic() < deadline:
            stage.tend()
            time.sleep(0.5)
        client.config_set("requirepass", "")
    return back_s(stage)


def _noperm(stage: Stage) -> float | None:
    with stage.redis() as client:
        stage.disturb()
        client.execute_command("ACL", "SETUSER", "default", "-evalsha", "-xreadgroup")
        deadline = time.monotonic() + 4.0
        while time.monotonic() < deadline:
            stage.tend()
            time.sleep(0.5)
        client.execute_command("ACL", "SETUSER", "default", "+@all")
    return back_s(stage)


def _garbage(stage: Stage) -> float | None:
    prefix = "rf:{chaos/0}:"
    newer = b"\x9b\x02\xa2g1" + b"\x00" * 20
    with stage.redis() as client:
        for body in (b"", b"\xff" * 100, newer, b"\x00" * (2 << 20)):
            prompt = {"g": "x", "i": "0", "a": "1", "k": "train", "n": "1", "d": body}
            client.xadd(f"{prefix}prompts:default", prompt)  # type: ignore[arg-type]
            client.xadd(f"{prefix}rollouts", {"h": body})
            client.xadd(f"{prefix}tombstones", {"g": body})
        client.xadd(f"{prefix}prompts:default", {"nothing": "known"})
        until(
            lambda: int(client.hget(f"{prefix}ledger", "garbage") or 0) == 13,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            20.0,
            stage.tend,
            "13 entries in quarantine",
        )
    return back_s(stage)


ROWS = [
    Row("Redis killed, 3 s, AOF always", "kill -9, restart after 3 s", _restart(3.0)),
    Row(
        "Redis killed, 3 s, AOF everysec",
        "kill -9, restart after 3 s",
        _restart(3.0),
        {"aof": "everysec"},
    ),
    Row("Redis killed, 60 s, AOF always", "kill -9, restart after 60 s", _restart(60.0)),
    Row(
        "Redis killed, 60 s, AOF everysec",
        "kill -9, restart after 60 s",
        _restart(60.0),
        {"aof": "everysec"},
    ),
    Row("Redis frozen past the socket timeout", "SIGSTOP for 20 s", _frozen),
    Row(
        "FLUSHALL",
        "everything in Redis is deleted under a running fleet",
        _flush,
        {},
        {"P2": BY_CONTRACT, "P8": "what was outstanding is gone"},
    ),
    Row(
        "Redis comes back empty",
        "kill -9, the append-only file is deleted, restart",
        _empty,
        {},
        {"P2": BY_CONTRACT, "P8": "what was outstanding is gone"},
    ),
    Row(
        "AOF cut by its last second",
        "kill -9, the file is truncated to what it was 1 s before, restart",
        _cut_aof,
        {"aof": "everysec"},
    ),
    Row(
        "AOF cut after a commit",
        "the same, right after a batch was committed: its repeats must be known",
        _cut_aof_after_commit,
        {"aof": "everysec"},
    ),
    Row(
        "failover to a replica by Sentinel",
        "kill -9 of the primary; three sentinels promote its replica",
        failover,
        {"proxied": True},
        {"P2": "replication is asynchronous"},
        note="behind an address that follows the primary; redis+sentinel:// is not supported",
    ),
    Row(
        "reply lost on each command",
        "for 0.5 s each, replies to EVALSHA, XREADGROUP, SET, HMGET, MGET, HSET, XREAD are cut off",
        _replies,
        {"proxied": True},
    ),
    Row(
        "network swallows packets",
        "nothing passes for 7 s, first at the workers, then at the trainer",
        _swallowed,
        {"proxied": True},
    ),
    Row("maxmemory reached", "no write may grow the data for 4 s", _full),
    Row("SCRIPT FLUSH", "ten times in 3 s", _repeat("SCRIPT", "FLUSH")),
    Row(
        "CLIENT KILL",
        "all connections, ten times in 3 s",
        _repeat("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
    ),
    Row(
        "NOAUTH mid-run",
        "a password is set and all connections are closed; 4 s later it is taken back",
        _noauth,
        note="a wrong password is no transient error: processes end with a message, and are "
        "started again by their orchestrator",
    ),
    Row(
        "NOPERM mid-run",
        "EVALSHA and XREADGROUP are forbidden for 4 s",
        _noperm,
        note="as NOAUTH: processes end with a message, and are started again",
    ),
    Row(
        "undecodable, foreign-schema and oversize entries",
        "13 of them on all three streams: quarantined, the run goes on",
        _garbage,
        note="schema 1 is the first: a fleet of the previous wire version cannot be played",
    ),
]
