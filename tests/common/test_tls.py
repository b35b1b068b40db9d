"""``rediss://``: trusted certificates only, of the host that was asked for, on both sides if wanted."""

import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rollfleet
from fixtures.fleet_processes import Processes
from fixtures.servers import MakeServer

from rollfleet_common.embedded import EmbeddedServer
from rollfleet_common.errors import BrokerError, BrokerSetupError, BrokerUnavailableError
from rollfleet_common.redis import check_server, connect, connect_sync, is_transient, translate


def openssl(*argv: str) -> None:
    done = subprocess.run(["openssl", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def certificate(folder: Path, name: str, names: str) -> None:
    """`name`.key and `name`.pem, signed by ca.pem, for the host names and addresses of `names`."""
    key, request, pem = (str(folder / f"{name}.{end}") for end in ("key", "csr", "pem"))
    extensions = folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName={names}\n")
    openssl("req", "-new", "-nodes", "-newkey", "rsa:2048", "-keyout", key, "-out", request)\
        if False else openssl(
            *("req", "-new", "-nodes", "-newkey", "rsa:2048", "-keyout", key, "-out", request),
            *("-subj", f"/CN={name}"),
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


def secured(
    make_server: MakeServer, folder: Path, name: str = "here", *, clients: str = "no"
) -> Secured:
    """Start one, or skip the test where no server at hand was built with TLS."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    extra = ["--tls-port", str(port), "--tls-auth-clients", clients]
    extra += ["--tls-ca-cert-file", str(folder / "ca.pem")]
    extra += ["--tls-cert-file", str(folder / f"{name}.pem")]
    extra += ["--tls-key-file", str(folder / f"{name}.key")]
    reasons = []
    for options in ({}, *({"binary": path} for path in _others())):
        server = EmbeddedServer(extra=extra, **(_configured(make_server) | options))
        try:
            server.start()
        except BrokerSetupError as exc:
            reasons.append(str(exc).partition(";")[0])
            continue
        make_server.keep(server)  # type: ignore[attr-defined]
        return Secured(port, folder)
    pytest.skip(f"no server here was built with TLS: {'; '.join(reasons)}")
