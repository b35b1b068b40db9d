"""The name of a server in the registry and in the trainer's rows is the one that workers give it."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rollfleet_common.errors import SettingsError
from rollfleet_common.servers import server_name, server_url
from rollfleet_engines.http import HttpClient

HOSTS = st.sampled_from(
    ["h", "H.Example", "münchen", "10.0.0.7", "[::1]", "[0:0::1]", "[zz]", "a..b", "h.", "h_x", ""]
)
PORTS = st.sampled_from(["", ":", ":80", ":443", ":0080", ":08000", ":8000", ":99999", ":x", ":-1"])
USERS = st.sampled_from(["", "@", "user@", "u:p@", "u:p%40ss@", ":p@", "ü:%7e@"])
PIECES = st.sampled_from(
    [
        "/",
        "/v1",
        "/V1",
        "/a",
        "/~me",
        "/%7Eme",
        "/%7eme",
        "/..",
        "/.",
        "/%2e%2e",
        "/%76%31",
        "/a%2fb",
    ]
)
PATHS = st.lists(PIECES | st.text("/v1%.2é|:@ ~", max_size=4), max_size=5).map("".join)


@given(st.sampled_from(["http", "HTTPS"]), USERS, HOSTS, PORTS, PATHS)
@example("http", "", "h", ":8000", "/x/../v1")
def test_a_server_has_one_name(scheme: str, user: str, host: str, port: str, path: str):
    try:
        url = server_url(f"{scheme}://{user}{host}{port}{path}")
    except SettingsError:
        return
    # As workers cut it: some of their parts take a URL as it is.
    assert url.rstrip("/").removesuffix("/v1") == url
    assert HttpClient(url).name == server_name(url)
    assert server_url(url) == url
    assert server_url(server_name(url)) == server_name(url)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://[0:0::1]:8000", "http://[::1]:8000"),
        ("http://münchen:8000", "http://xn--mnchen-3ya:8000"),
        ("http://h:08000", "http://h:8000"),
        ("http://h:0080", "http://h"),
        ("http://h:8000/%7Eme", "http://h:8000/~me"),
        ("http://h:8000/x/../y", "http://h:8000/y"),
        ("http://h:8000/v1/v1", "http://h:8000"),
        ("http://h:8000/a%2fb", "http://h:8000/a%2Fb"),
        ("http://h:", "http://h"),
    ],
)
def test_a_url_is_written_as_clients_write_it(written: str, meant: str):
    assert server_url(written) == meant == HttpClient(written.removesuffix("/v1/v1")).name


@pytest.mark.parametrize(
    "url", ["http://h:99999", "http://h:abc", "http://[::1", "http://[zz]:80", "http://:80"]
)
def test_what_no_client_can_reach_is_refused(url: str):
    with pytest.raises(SettingsError, match="should be a URL"):
        server_url(url)
