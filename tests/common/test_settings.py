"""Settings: four places, one order of precedence, and messages that say what to do."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollfleet.settings import TrainerSettings
from rollfleet_common.errors import SettingsError
from rollfleet_common.settings import Settings
from rollfleet_common.units import parse_seconds
from rollfleet_worker.settings import WorkerSettings

FLOW = ["--workflow", "math=package.module:Class"]


@pytest.fixture(autouse=True)
def env(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """All variables there are; none of the machine that runs the tests counts."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    return variables


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rollfleet.toml"
    path.write_text(text)
    return path


def refused(*argv: str, config: Path | None = None, **overrides: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        WorkerSettings.load(argv=argv, config=config, **overrides)
    return str(caught.value)


def test_defaults() -> None:
    s = WorkerSettings.load(argv=FLOW)
    assert s.workflows == {"math": "package.module:Class"}
    assert (s.redis_url, s.run, s.slots, s.lease_s) == (
        *("redis://127.0.0.1:6379/0", "default", 64, 30.0),
    )
    assert (s.max_rollout_bytes, s.buffer_bytes) == (16 * 2**20, 256 * 2**20)
    assert s.health_port is None
    assert s.servers == []


def test_flags_win_over_variables_over_the_file_over_defaults(
    tmp_path: Path, env: dict[str, str]
) -> None:
    text = 'run = "from-file"\n[worker]\nslots = 1\nserver_cap = 1\nmax_tokens = 1\ntop_p = 0.5'
    path = toml(tmp_path, text)
    env |= {"ROLLFLEET_SLOTS": "2", "ROLLFLEET_SERVER_CAP": "2", "ROLLFLEET_MAX_TOKENS": "2"}
    s = WorkerSettings.load(
        argv=[*FLOW, "--slots", "3", "--server-cap=3"], config=path, server_cap=4
    )
    assert (s.run, s.top_p, s.max_tokens, s.slots, s.server_cap) == ("from-file", 0.5, 2, 3, 4)
    assert s.temperature == 1.0


def test_the_file_may_be_named_by_a_flag_or_a_variable(tmp_path: Path, env: dict[str, str]) -> None:
    path = toml(tmp_path, '[worker]\nslots = 5\n[worker.workflows]\nmath = "a.b:C"\n[trainer]\nx=1')
    assert WorkerSettings.load(argv=["--config", str(path)]).slots == 5
    env["ROLLFLEET_CONFIG"] = str(path)
    assert WorkerSettings.load().workflows == {"math": "a.b:C"}


def test_lists_and_tables_from_flags_variables_and_json(env: dict[str, str]) -> None:
    argv = ["--workflow", "a=m:A", "--workflow", "m:B", "--server", "http://x:1/", "--server"]
    s = WorkerSettings.load(argv=[*argv, "http://y:2", "--stop-token-id", "7"])
    assert s.workflows == {"a": "m:A", "default": "m:B"}
    assert s.servers == ["http://x:1", "http://y:2"]
    assert s.stop_token_ids == [7]
    env |= {
        "ROLLFLEET_WORKFLOWS": "a=m:A, b=m:B.C",
        "ROLLFLEET_SERVERS": "http://x:1,http://y:2",
        "ROLLFLEET_STOP_TOKEN_IDS": "[1, 2]",
    }
    s = WorkerSettings.load()
    assert s.workflows == {"a": "m:A", "b": "m:B.C"}
    assert len(s.servers) == 2
    assert s.stop_token_ids == [1, 2]
    env["ROLLFLEET_WORKFLOWS"] = '{"c": "m:C"}'
    assert WorkerSettings.load().workflows == {"c": "m:C"}
    env["ROLLFLEET_WORKFLOWS"] = '{"c"'
    assert "should be NAME=PACKAGE.MODULE:CLASS or JSON" in refused()


def test_a_json_list_that_is_none_is_refused(env: dict[str, str]) -> None:
    env["ROLLFLEET_SERVERS"] = '["http://x"'
    assert "should be a JSON list or separated by commas" in refused(*FLOW)


def test_an_empty_variable_counts_as_unset(env: dict[str, str]) -> None:
    env |= {"ROLLFLEET_SLOTS": "", "ROLLFLEET_CONFIG": ""}
    assert WorkerSettings.load(argv=FLOW).slots == 64


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("1.5", 1.5), ("30s", 30), ("5m", 300), ("2500ms", 2.5), (" 1 h ", 3600)],
)
def test_durations(text: str, seconds: float) -> None:
    assert WorkerSettings.load(argv=[*FLOW, "--lease-s", text]).lease_s == seconds
    assert parse_seconds(text, "--older-than") == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("2048", 2048), ("16MiB", 2**24), ("16 mib", 2**24), ("2kb", 2000), ("0.5GiB", 2**29)],
)
def test_sizes(text: str, size: int) -> None:
    s = WorkerSettings.load(argv=[*FLOW, "--max-rollout-bytes", text], buffer_bytes=2**30)
    assert s.max_rollout_bytes == size


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_settings_error(text: str) -> None:
    try:
        assert parse_seconds(text, "t") >= 0
    except SettingsError as exc:
        assert "should be a number of seconds" in str(exc)  # noqa: PT017 - either is right


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--slto", "3"], "flag --slto is no setting of rollfleet worker; did you mean --slots?"),
        (["--lease=3"], "flag --lease is no setting of rollfleet worker; did you mean --lease-s?"),
        (["math"], "argument 'math' is no setting of rollfleet worker; see rollfleet worker --hel"),
        (["--slots"], "rollfleet worker: argument --slots: expected one argument"),
        (["--slots", "0"], "slots = '0' (from flag --slots): should be greater than or equal to 1"),
        (["--slots", "x"], "slots = 'x' (from flag --slots): should be a valid integer"),
        (["--log-level", "loud"], "(from flag --log-level): should be 'debug', 'info', 'warning' "),
        (["--lease-s", "500ms"], "lease_s = '500ms' (from flag --lease-s): should be greater than"),
        (["--lease-s", "1 year"], 'a number of seconds or a time such as "250ms", "30s", "5m"'),
        (["--drain-s", "inf"], "drain_s = 'inf' (from flag --drain-s): should be a number of sec"),
        (["--buffer-bytes", "1TB"], 'a number of bytes or a size such as "64KiB", "16MiB"'),
        (["--health-port", "70000"], "should be less than or equal to 65535"),
        (["--run", "a b"], "run = 'a b' (from flag --run): the name 'a b' cannot be part of a Red"),
        (["--server", "10.0.0.7:8000"], "should be a URL such as http://10.0.0.7:8000"),
        (["--server", "http://u:pw@x", "--server", "y"], "servers = ['http://***@x', 'y']"),
        (["--server", "u:pw@x"], "servers = ['***@x']"),
        (["--server", "http://x", "--server", "http://x/"], "names a server twice"),
        (["--workflow", "math=x:Y"], "names the route 'math' twice"),
        (["--workflow", "b=nope"], "the workflow of route 'b' is 'nope'; write package.module:Cl"),
        (["--workflow", "b c=x:Y"], "the route 'b c' cannot be part of a Redis key"),
        (["--stop-token-id", "[1"], "should be a valid integer"),
        (["--retry-base-s", "1m"], "retry_max_s (30) is less than retry_base_s (60)"),
        (["--buffer-bytes", "1MiB"], "buffer_bytes (1,048,576) is less than max_rollout_bytes (16"),
        (
            ["--park", "--segment-tokens", "0"],
            "park is on and segment_tokens is 0: generations are",
        ),
        (["--segment-tokens", "-1"], "segment_tokens = '-1' (from flag --segment-tokens): should"),
        (["--config", "/nowhere.toml"], "settings file /nowhere.toml: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], said: str) -> None:
    assert said in refused(*FLOW, *argv)


def test_a_worker_without_a_workflow_is_told_how_to_name_one() -> None:
    message = refused()
    assert "a worker needs at least one workflow" in message
    assert "ROLLFLEET_WORKFLOWS" in message


def test_every_wrong_setting_is_in_the_one_message(tmp_path: Path, env: dict[str, str]) -> None:
    env["ROLLFLEET_TOP_P"] = "2"
    path = toml(tmp_path, "[worker]\nslots = 0\n")
    message = refused(*FLOW, "--max-siblings", "0", config=path)
    assert message.startswith("3 settings are wrong: ")
    assert f"slots = 0 (from file {path} [worker]): should be" in message
    assert "top_p = '2' (from variable ROLLFLEET_TOP_P): should be" in message
    assert "max_siblings = '0' (from flag --max-siblings): should be" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[worker]\nslot = 1", "key 'slot' in [worker] is no setting of rollfleet worker; did yo"),
        (
            "[wroker]\nslots = 1",
            "section [wroker] is no setting of rollfleet worker; did you mean ",
        ),
        ("redis = 1", "key 'redis' is no setting of rollfleet worker; did you mean redis_url?"),
        ("slots = 1", "slots stands at the top, where only redis_url and run may; move it below ["),
        ("worker = 1", "worker should be a table: [worker]"),
        ("[worker", "is not TOML: Expected ']'"),
        ("[worker]\nworkflows = { a = 3 }", "workflows['a'] = {'a': 3}"),
        ("[worker]\nservers = 3", "servers = 3 (from file"),
    ],
)
def test_what_is_wrong_in_the_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(config=toml(tmp_path, text))


def test_an_unknown_override_names_the_nearest() -> None:
    said = refused(workflow={})
    assert said == "argument 'workflow' is no setting of rollfleet worker; did you mean workflows?"


def test_unknown_variables_are_warned_about(
    env: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    env |= {
        "ROLLFLEET_SLTOS": "3",
        "ROLLFLEET_HOST": "10.0.0.1",
        "ROLLFLEET_TEST_REDIS": "embedded",
        "ROLLFLEET_CONFIG": "",
        "SLOTS": "3",
    }
    with caplog.at_level(logging.WARNING):
        WorkerSettings.load(argv=FLOW)
    assert [record.getMessage() for record in caplog.records] == [
        "variable ROLLFLEET_HOST is no setting of rollfleet worker and is ignored",
        (
            "variable ROLLFLEET_SLTOS is no setting of rollfleet worker and is ignored; did you mean "
            "ROLLFLEET_SLOTS?"
        ),
    ]


def service_links(service: str) -> dict[str, str]:
    """The variables that Kubernetes sets in a pod for a Service, with a named port."""
    prefix = service.upper().replace("-", "_")
    tcp = f"{prefix}_PORT_6379_TCP"
    return {
        f"{prefix}_SERVICE_HOST": "10.0.0.9",
        f"{prefix}_SERVICE_PORT": "6379",
        f"{prefix}_SERVICE_PORT_METRICS": "6379",
        f"{prefix}_PORT": "tcp://10.0.0.9:6379",
        tcp: "tcp://10.0.0.9:6379",
        f"{tcp}_PROTO": "tcp",
        f"{tcp}_PORT": "6379",
        f"{tcp}_ADDR": "10.0.0.9",
    }


@pytest.mark.parametrize("service", ["rollfleet", "rollfleet-redis", "rollfleet-servers"])
@pytest.mark.parametrize("part", [WorkerSettings, TrainerSettings, Settings])
def test_what_kubernetes_sets_for_a_service_is_ignored(
    env: dict[str, str], caplog: pytest.LogCaptureFixture, service: str, part: type[Settings]
) -> None:
    env |= service_links(service)
    argv = FLOW if part is WorkerSettings else []
    with caplog.at_level(logging.WARNING):
        assert part.load(argv=argv).model_fields_set <= {"workflows"}
    assert not caplog.records


def test_what_kubernetes_sets_in_place_of_a_setting_is_named(env: dict[str, str]) -> None:
    env |= service_links("rollfleet-health")
    assert refused(*FLOW) == (
        "health_port = 'tcp://10.0.0.9:6379' (from variable ROLLFLEET_HEALTH_PORT): Kubernetes sets "
        "this variable for the Service 'rollfleet-health'; set enableServiceLinks: false in the "
        "pod's spec, rename the Service, or give --health-port, which wins"
    )
    assert WorkerSettings.load(argv=[*FLOW, "--health-port", "9100"]).health_port == 9100


@pytest.mark.parametrize("part", [WorkerSettings, TrainerSettings])
def test_no_other_setting_can_be_set_by_kubernetes(
    env: dict[str, str], part: type[Settings]
) -> None:
    """A Service may have any name: each of its variables hits no setting, or is refused."""
    for name in part.model_fields:
        words = name.split("_")
        for end in range(1, len(words) + 1):
            service = "-".join(["rollfleet", *words[:end]])
            hit = service_links(service).keys() & {
                f"ROLLFLEET_{f.upper()}" for f in part.model_fields
            }
            if not hit:
                continue
            env |= service_links(service)
            argv = FLOW if part is WorkerSettings else []
            with pytest.raises(SettingsError, match="enableServiceLinks"):
                part.load(argv=argv)
            env.clear()


def test_the_console_warns_of_its_own_names_only(
    env: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    env |= {"ROLLFLEET_SLOTS": "3", "ROLLFLEET_REDIS_ULR": "x", "ROLLFLEET_RUN": "r1"}
    with caplog.at_level(logging.WARNING):
        assert Settings.load().run == "r1"
    (record,) = caplog.records
    assert "did you mean ROLLFLEET_REDIS_URL?" in record.getMessage()


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    argv = [*FLOW, "--api-key", "sesame", "--redis-url", "redis://:sesame@h"]
    s = WorkerSettings.load(argv=argv)
    assert s.api_key is not None
    assert s.api_key.get_secret_value() == "sesame"
    assert "sesame" not in repr(s)
    text = '[worker]\napi_key = ["sesame"]\nredis_url = ["redis://:sesame@h"]'
    message = refused(config=toml(tmp_path, text))
    assert "api_key = ***" in message
    assert "redis_url = ***" in message
    assert "sesame" not in message


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        WorkerSettings.load(argv=FLOW).slots = 3  # type: ignore[misc]


def test_health_port_may_be_off_and_strict_has_two_flags(env: dict[str, str]) -> None:
    env |= {"ROLLFLEET_HEALTH_PORT": "9", "ROLLFLEET_STRICT": "true"}
    s = WorkerSettings.load(argv=FLOW)
    assert (s.health_port, s.strict) == (9, True)
    s = WorkerSettings.load(argv=[*FLOW, "--health-port", "off", "--no-strict"])
    assert (s.health_port, s.strict) == (None, False)


HOSTILE = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["nan", "inf", "-1", "1e999", "9" * 400, "[1", '{"a": 1}', "[[]]", "\x00", "tcp://h:1"]
    ),
    st.sampled_from(["http://[bad", "redis://:pw@[bad", "http://h:99999", "a=b:c,a=b:c", "\ud800"]),
)


@pytest.mark.parametrize("part", [WorkerSettings, TrainerSettings])
@given(data=st.data())
def test_any_text_is_a_value_or_an_error_that_names_the_setting(
    part: type[Settings], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(list(part.model_fields)))
    value = data.draw(HOSTILE)
    workflow = {"workflows": {"a": "m:C"}} if part is WorkerSettings else {}
    try:
        part.load(**{**workflow, name: value})
    except SettingsError as exc:
        assert name in str(exc)  # noqa: PT017 - either is right


@pytest.mark.parametrize("part", [WorkerSettings, TrainerSettings])
@given(
    data=st.data(),
    value=st.one_of(
        st.integers(),
        st.floats(),
        st.booleans(),
        st.none(),
        st.binary(max_size=4),
        st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
        st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.text(max_size=3)), max_size=2),
    ),
)
def test_any_object_is_a_value_or_an_error_that_names_the_setting(
    part: type[Settings], data: st.DataObject, value: object
) -> None:
    name = data.draw(st.sampled_from(list(part.model_fields)))
    workflow = {"workflows": {"a": "m:C"}} if part is WorkerSettings else {}
    try:
        part.load(**{**workflow, name: value})
    except SettingsError as exc:
        assert name in str(exc)  # noqa: PT017 - either is right


def test_every_setting_is_described() -> None:
    described = {one.name: one for one in WorkerSettings.described()}
    assert list(described) == list(WorkerSettings.model_fields)
    assert all(one.text.endswith(".") for one in described.values())
    assert described["workflows"].flag == "--workflow NAME=PACKAGE.MODULE:CLASS"
    assert described["workflows"].repeatable
    assert described["strict"].flag == "--strict / --no-strict"
    assert described["lease_s"].default == "30s"
    assert described["max_rollout_bytes"].default == "16MiB"
    assert described["log_format"].flag == "--log-format auto|console|json"
    assert described["slots"].env == "ROLLFLEET_SLOTS"
