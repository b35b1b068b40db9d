"""A failover through three sentinels, and an address that follows the primary.

- The fleet's proxies stand for what follows a primary in the field: a Kubernetes service, HAProxy.
- Replication is asynchronous: what the primary acknowledged in its last moment may be lost.
"""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis.exceptions

from chaos.harness import Stage
from chaos.observe import connect
from chaos.processes import free_port, until
from chaos.rows import back_s
from rollfleet_common.embedded import find_server

__all__ = ["failover"]

SENTINELS = 3
DOWN_AFTER_MS = 1000
#: How far a replica may lag behind on one machine.
LAG_S = 0.5


@contextlib.contextmanager
def _process(*arguments: str, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    with log.open("ab") as out:
        process = subprocess.Popen([str(find_server()), *arguments], stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def failover(stage: Stage) -> float | None:
    """Kill the primary, and let sentinels promote its replica; returns seconds without Redis."""
    with contextlib.ExitStack() as stack:
        primary = urlsplit(stage.server.url).port
        port = free_port()
        home = stage.dir / "replica"
        home.mkdir()
        stage.stack(
            _process(
                *("--port", str(port), "--dir", str(home), "--save", "", "--appendonly", "yes"),
                *("--replicaof", f"127.0.0.1 {primary}", "--bind", "127.0.0.1"),
                log=stage.dir / "replica.out",
            )
        )
        replica = stack.enter_context(connect(f"redis://127.0.0.1:{port}"))
        until(lambda: _info(replica).get("master_link_status") == "up", 15.0, stage.tend, "a sync")
        watch = [_sentinel(stage, stack, number, primary) for number in range(SENTINELS)]
        until(lambda: all(_known(w) for w in watch), 20.0, stage.tend, "sentinels to meet")
        stage.warm()
        began = time.time()
        stage.seen.excused.append((began - LAG_S, began))
        stage.kill_redis()
        until(lambda: _master(watch[0]) == port, 30.0, stage.tend, "a promotion")
        stage.moved(f"redis://127.0.0.1:{port}")
        return back_s(stage, began)


def _sentinel(stage: Stage, stack: contextlib.ExitStack, number: int, primary: Any) -> Any:
    port, home = free_port(), stage.dir / f"sentinel-{number}"
    home.mkdir()
    config = home / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {home}\n"
        f"sentinel monitor m 127.0.0.1 {primary} 2\n"
        f"sentinel down-after-milliseconds m {DOWN_AFTER_MS}\n"
        "sentinel failover-timeout m 5000\n"
    )
    stack.enter_context(_process(str(config), "--sentinel", log=home / "out"))
    return stack.enter_context(connect(f"redis://127.0.0.1:{port}"))


def _ask(client: Any, *words: str) -> Any:
    try:
        return client.execute_command(*words)
    except (redis.exceptions.RedisError, OSError):
        return None


def _known(sentinel: Any) -> bool:
    peers = _ask(sentinel, "SENTINEL", "SENTINELS", "m")
    replicas = _ask(sentinel, "SENTINEL", "REPLICAS", "m")
    return len(peers or ()) == SENTINELS - 1 and len(replicas or ()) == 1


def _master(sentinel: Any) -> int:
    reply = _ask(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "m")
    return int(reply[1]) if reply else 0


def _info(client: Any) -> dict[str, Any]:
    try:
        info: dict[str, Any] = client.info("replication")
    except (redis.exceptions.RedisError, OSError):
        return {}
    return info
