"""``rediss://``: trusted certificates only, of the host that was asked for, on both sides if wanted."""

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fixtures.fleet_processes import Processes
from fixtures.servers import _binary

import rollfleet
from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.errors import (
    BrokerError,
    BrokerSetupError,
    BrokerUnavailableError,
    RollfleetError,
)
from rollfleet_common.redis import check_server, connect, connect_sync, translate


def openssl(*argv: str) -> None:
    done = subprocess.run(["openssl", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def certificate(folder: Path, name: str, names: str) -> None:
    """`name`.key and `name`.pem, signed by ca.pem, for the host names and addresses of `names`."""
    key, request, pem = (str(folder / f"{name}.{end}") for end in ("key", "csr", "pem"))
    extensions = folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName={names}\n")
    openssl(
        *("req", "-new", "-nodes", "-newkey", "rsa:2048", "-subj", f"/CN={name}"),
        *("-keyout", key, "-out", request),
    )
    openssl(
        *("x509", "-req", "-in", request, "-out", pem, "-days", "2", "-CAcreateserial"),
        *("-CA", str(folder / "ca.pem"), "-CAkey", str(folder / "ca.key")),
        *("-extfile", str(extensions)),
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca, here (a server of this host), elsewhere (of another) and me (a client)."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on PATH to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    openssl(
        *("req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=test ca"),
        *("-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.pem")),
    )
    certificate(folder, "here", "DNS:localhost,IP:127.0.0.1")
    certificate(folder, "elsewhere", "DNS:redis.example")
    certificate(folder, "me", "DNS:worker")
    return folder


@dataclass(frozen=True, slots=True)
class Secured:
    """A server that speaks TLS, and the files that it is reached with."""

    port: int
    folder: Path

    def url(self, *, trust: bool = True, me: bool = False, **more: str) -> str:
        query = dict(more)
        if trust:
            query["ssl_ca_certs"] = str(self.folder / "ca.pem")
        if me:
            query["ssl_certfile"] = str(self.folder / "me.pem")
            query["ssl_keyfile"] = str(self.folder / "me.key")
        text = "&".join(f"{k}={v}" for k, v in query.items())
        return f"rediss://127.0.0.1:{self.port}/0?{text}"


Start = Callable[..., Secured]


@pytest.fixture
def secured(certificates: Path) -> Iterator[Start]:
    """Starts a server with a certificate of ours; skips where no server was built with TLS."""
    started: list[EmbeddedServer] = []

    def start(name: str = "here", *, clients: str = "no") -> Secured:
        port = _free_port()
        extra = ["--tls-port", str(port), "--tls-auth-clients", clients]
        extra += ["--tls-ca-cert-file", str(certificates / "ca.pem")]
        extra += ["--tls-cert-file", str(certificates / f"{name}.pem")]
        extra += ["--tls-key-file", str(certificates / f"{name}.key")]
        reasons = []
        for binary in dict.fromkeys(_candidates()):
            server = EmbeddedServer(binary=binary, extra=extra)
            try:
                started.append(server.start())
            except BrokerSetupError as exc:
                reasons.append(str(exc).splitlines()[-1])
                continue
            return Secured(port, certificates)
        pytest.skip(f"no server here was built with TLS: {'; '.join(reasons)}")

    yield start
    for server in started:
        server.stop()


def _candidates() -> Iterator[Path | None]:
    yield _binary()  # None: whichever embedded:// would take
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            yield Path(found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def refusal(url: str) -> RollfleetError:
    """What a PING ends with."""
    with (
        connect_sync(url, role="test", timeout_s=2) as client,
        pytest.raises(Exception) as caught,  # of many kinds; told apart below
    ):
        client.ping()
    return translate(caught.value, url)


# ---- tests ---------------------------------------------------------------------------------------


async def test_both_clients_speak_it(secured: Start) -> None:
    server = secured()
    with connect_sync(server.url(), role="test") as plain:
        assert plain.ping()
    async with connect(server.url(), role="test") as client:
        report = await check_server(client, strict=True)
        assert report.version is not None
        await client.xadd("s", {"a": 1})
    async with connect(server.url(), role="test", blocking=True, block_s=1) as reader:
        reply: Any = await reader.xread({"s": "0"}, block=100)
        ((_, entries),) = reply
        assert len(entries) == 1


def test_a_run_over_tls_with_certificates_on_both_sides(
    secured: Start, processes: Processes
) -> None:
    server = secured(clients="yes")
    url = server.url(me=True)
    processes.worker(url, "tls")
    with rollfleet.connect(url, run="tls", samples_per_version=4, group_size=2) as fleet:
        fleet.feed({"token_ids": [1], "answer": 1.0} for _ in range(4))
        assert sum(len(batch.rollouts) for batch in fleet.batches()) == 8


def test_a_certificate_of_an_unknown_authority_is_refused(secured: Start) -> None:
    error = refusal(secured().url(trust=False))
    assert isinstance(error, BrokerSetupError), error
    assert "ssl_ca_certs" in str(error)


def test_a_certificate_of_another_host_is_refused(secured: Start) -> None:
    """Also by a redis-py whose own default is not to look (before 6.0)."""
    server = secured("elsewhere")
    error = refusal(server.url())
    assert isinstance(error, BrokerSetupError), error
    with connect_sync(server.url(ssl_check_hostname="false"), role="test") as client:
        assert client.ping()


def test_not_to_look_at_certificates_has_to_be_asked_for(secured: Start) -> None:
    url = secured("elsewhere").url(trust=False, ssl_cert_reqs="none")
    with connect_sync(url, role="test") as client:
        assert client.ping()


def test_a_server_may_ask_for_a_certificate(secured: Start) -> None:
    server = secured(clients="yes")
    assert isinstance(refusal(server.url()), BrokerError)
    with connect_sync(server.url(me=True), role="test") as client:
        assert client.ping()


def test_plain_and_encrypted_do_not_mix(secured: Start, redis_url: str) -> None:
    """An error within the timeout, never a hang."""
    server = secured()
    plain = f"redis://127.0.0.1:{server.port}/0"
    assert isinstance(refusal(plain), BrokerUnavailableError)


def test_a_file_that_is_not_there_is_named(secured: Start) -> None:
    server = secured()
    error = refusal(server.url(trust=False, ssl_ca_certs="/nowhere/ca.pem"))
    assert isinstance(error, BrokerError)
