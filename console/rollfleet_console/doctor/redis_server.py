"""What the doctor asks of Redis itself, of the clocks, and of the client library.

- What a server denies to say (a managed one, or a user with few rights) is told, never guessed.
"""

import re
import time
from collections.abc import Iterator
from typing import Any

import redis
from redis.exceptions import ResponseError

from rollfleet_common.errors import BrokerSetupError
from rollfleet_common.redis import ServerReport, check_server
from rollfleet_common.redis_errors import error_code
from rollfleet_console.doctor.findings import Finding, Severity

__all__ = ["CLOCK_SLACK_S", "clock", "library", "server"]

#: Clocks this far apart change nothing that anybody would see.
CLOCK_SLACK_S = 2.0
#: Parts of maxmemory, or of the machine, beyond which a warning or an error is due.
FULL, ALMOST_FULL = 0.95, 0.8
#: Seconds a replica may be behind.
REPLICA_LAG_S = 10
OLDEST_CLIENT, BEST_CLIENT = (5, 0, 4), (8, 1, 0)


async def server(client: Any) -> list[Finding]:
    """Version, durability, memory, replicas."""
    try:
        report = await check_server(client, strict=False)
    except BrokerSetupError as exc:
        return [Finding(Severity.ERROR, "server", str(exc), fix="upgrade the server")]
    info: dict[str, Any] = {}
    try:
        info = {str(k): v for k, v in (await client.info()).items()}
    except ResponseError as exc:
        if error_code(exc) == "LOADING":
            raise
    found = [_version(report, info)]
    found += [
        Finding(
            Severity.INFO,
            "server",
            warning,
            fix="nothing, if its operator vouches for it; else run this with an administrator's URL",
        )
        for warning in report.warnings
        if " is denied (" in warning
    ]
    found += [*_durability(report, info), *_memory(report, info), *_replicas(report, info)]
    return found


def _version(report: ServerReport, info: dict[str, Any]) -> Finding:
    name = "Valkey" if report.is_valkey else "Redis"
    up_s = int(info.get("uptime_in_seconds", 0))
    up = f", up for {up_s // 3600} h {up_s % 3600 // 60} min" if up_s else ""
    mode = str(info.get("redis_mode", ""))
    shape = f", {mode}" if mode not in ("", "standalone") else ""
    return Finding(Severity.OK, "server", f"{name} {report.product_version or '?'}{shape}{up}")


def _durability(report: ServerReport, info: dict[str, Any]) -> Iterator[Finding]:
    check = "durability"
    if int(info.get("loading", 0)):
        yield Finding(
            Severity.WARNING,
            check,
            "the server is still reading its data from disk",
            fix="wait until INFO says loading:0",
        )
    for field, what in (
        ("aof_last_write_status", "the last write to the append-only file failed"),
        ("aof_last_bgrewrite_status", "the last rewrite of the append-only file failed"),
        ("rdb_last_bgsave_status", "the last snapshot to disk failed"),
    ):
        if str(info.get(field, "ok")) != "ok":
            yield Finding(
                Severity.ERROR,
                check,
                f"{what}: what is written now may not survive a restart",
                where=f"INFO persistence, {field}",
                fix="look at the disk (full? read-only?), the memory for a fork, and Redis' log",
            )
    severity, fix = Severity.OK, ""
    if report.appendonly is None:
        severity = Severity.INFO
        fix = "ask its operator: the run's queue lives as long as the server's data"
    elif not report.appendonly:
        severity = Severity.WARNING
        fix = (
            "CONFIG SET appendonly yes, and write it to redis.conf; not needed for throw-away runs"
        )
    elif report.appendfsync == "no":
        severity = Severity.WARNING
        fix = "CONFIG SET appendfsync everysec, and write it to redis.conf"
    yield Finding(severity, check, report.durability, fix=fix)


def _memory(report: ServerReport, info: dict[str, Any]) -> Iterator[Finding]:
    check = "memory"
    if report.maxmemory_policy not in (None, "noeviction"):
        yield Finding(
            Severity.ERROR,
            check,
            f"maxmemory-policy is {report.maxmemory_policy}: a full server silently evicts prompts "
            "and rollouts",
            fix="CONFIG SET maxmemory-policy noeviction, and write it to redis.conf",
        )
    used = int(info.get("used_memory", 0))
    if not used:
        return
    limit, name = report.maxmemory_bytes or 0, "maxmemory"
    if not limit:
        limit, name = int(info.get("total_system_memory", 0)), "the machine's memory"
    part = used / limit if limit else 0.0
    what = f"{_bytes(used)} used" + (f", {part:.1%} of {name} ({_bytes(limit)})" if limit else "")
    severity = Severity.OK
    if part >= ALMOST_FULL:
        severity = Severity.ERROR if part >= FULL else Severity.WARNING
    fix = "raise maxmemory, or lower pipeline_depth x samples_per_version: a full server refuses "
    fix += "deliveries, and workers wait"
    yield Finding(severity, check, what, fix=fix if severity else "")


def _replicas(report: ServerReport, info: dict[str, Any]) -> Iterator[Finding]:
    check = "replicas"
    if report.is_replica:
        yield Finding(
            Severity.ERROR,
            check,
            "this server is a replica: it refuses writes",
            where=f"its primary is {info.get('master_host', '?')}:{info.get('master_port', '?')}",
            fix="point the URL at the primary",
        )
        return
    replicas = {k: v for k, v in info.items() if re.fullmatch(r"slave\d+", k)}
    for value in replicas.values():
        replica = value if isinstance(value, dict) else {}
        behind = int(replica.get("lag", 0) or 0)
        if replica.get("state", "online") != "online" or behind > REPLICA_LAG_S:
            yield Finding(
                Severity.WARNING,
                check,
                f"a replica is {replica.get('state', '?')}, {behind} s behind: a failover to it "
                "loses what it lacks",
                where=f"{replica.get('ip', '?')}:{replica.get('port', '?')}",
                fix="look at its log and at the network between the two",
            )
    if replicas:
        what = f"{len(replicas)}; replication is asynchronous: a failover may lose the last writes"
        yield Finding(Severity.OK, check, what)


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return ""


# ---- this side -----------------------------------------------------------------------------------


async def clock(client: Any) -> tuple[float, list[Finding]]:
    """Unix time in seconds at Redis, and whether this host's clock agrees with it."""
    best = (float("inf"), 0.0)
    for _ in range(3):
        before = time.time()
        began = time.monotonic()
        seconds, micros = await client.time()
        took_s = time.monotonic() - began
        # The answer was made somewhere between asking and hearing.
        best = min(best, (took_s, int(seconds) + int(micros) / 1e6 - (before + took_s / 2)))
    took_s, skew_s = best
    now_s = time.time() + skew_s
    what = f"this host and Redis are {abs(skew_s):.2f} s apart (measured to {took_s / 2:.3f} s)"
    if abs(skew_s) - took_s / 2 <= CLOCK_SLACK_S:
        return now_s, [Finding(Severity.OK, "clock", what)]
    fix = "run NTP (chrony, systemd-timesyncd) on both, so that log lines of two hosts can be compared; "
    fix += (
        "rollfleet itself goes by the clock of Redis, but workers of 0.1.0 end pauses by their own"
    )
    return now_s, [Finding(Severity.WARNING, "clock", what, fix=fix)]


def library() -> list[Finding]:
    """The redis-py of this environment."""
    check, version = "redis-py", str(redis.__version__)
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST_CLIENT:
        fix = 'pip install -U "redis>=8.1"'
        return [Finding(Severity.ERROR, check, f"redis-py {version} is too old", fix=fix)]
    if numbers < BEST_CLIENT:
        what = f"redis-py {version} works; 8.1 mends leaks of connections that older ones have"
        return [Finding(Severity.INFO, check, what, fix='pip install -U "redis>=8.1"')]
    return [Finding(Severity.OK, check, f"redis-py {version}")]
