import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rollfleet_common.logs import configure_logs, get_logger

log = get_logger("rollfleet.test")


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    undo = configure_logs("info", "json", stream)
    yield stream
    undo()


def test_a_record_carries_event_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rollfleet"):
        log.info("100 % of it moved", url="http://s:1", why="two words", count=3, text="")
        log.debug("not at this level")
    (record,) = caplog.records
    assert record.getMessage() == "100 % of it moved url=http://s:1 why='two words' count=3 text=''"
    assert (record.name, record.levelno) == ("rollfleet.test", logging.INFO)
    assert (record.filename, record.funcName) == (
        "test_logs.py",
        "test_a_record_carries_event_and_fields",
    )
    assert (vars(record)["event"], vars(record)["fields"]["count"]) == ("100 % of it moved", 3)


@pytest.mark.parametrize("name", ["event", "self", "level", "name", "msg", "message", "args"])
def test_a_field_may_have_any_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rollfleet"):
        log.info("said", **{name: "x"})
    assert caplog.messages == [f"said {name}=x"]


def test_text_that_would_break_a_line_is_quoted(caplog: pytest.LogCaptureFixture) -> None:
    log.warning("refused", why="a\nb\x1b[31m")
    assert caplog.messages == [r"refused why='a\nb\x1b[31m'"]


def test_programs_log_json(out: io.StringIO) -> None:
    try:
        int("bad")
    except ValueError as exc:
        log.error("it failed", part="x", odd=object, exc_info=exc)
    log.debug("below the level")
    logging.getLogger("rollfleet.plain").info("%s of %s", 1, 2)
    one, two = map(json.loads, out.getvalue().splitlines())
    assert (one["event"], one["level"], one["part"]) == ("it failed", "error", "x")
    assert "ValueError: invalid literal" in one["exception"]
    assert one["timestamp"].endswith("Z")
    assert (two["event"], two["level"]) == ("1 of 2", "info")


def test_programs_log_for_people() -> None:
    stream = io.StringIO()
    undo = configure_logs("debug", "console", stream)
    log.debug("claimed", group="g1")
    undo()
    assert "claimed" in stream.getvalue()
    assert "group=g1" in stream.getvalue()


def test_what_a_program_set_up_is_undone() -> None:
    root = logging.getLogger("rollfleet")
    before = root.handlers[:], root.level, root.propagate
    configure_logs("debug", "json", io.StringIO())()
    assert (root.handlers, root.level, root.propagate) == before


def test_an_unconfigured_process_sees_plain_logging() -> None:
    program = (
        "import rollfleet\n"
        "from rollfleet_common.logs import get_logger\n"
        "log = get_logger('rollfleet.trainer')\n"
        "log.info('quiet'); log.warning('loud', n=1)\n"
        "import sys; assert 'structlog' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("", "loud n=1\n")


def test_a_process_decides_format_and_level() -> None:
    program = (
        "import logging, rollfleet\n"
        "from rollfleet_common.logs import get_logger\n"
        "logging.basicConfig(level=logging.INFO, format='%(name)s %(levelname)s %(message)s')\n"
        "logging.getLogger('rollfleet.worker').setLevel(logging.ERROR)\n"
        "get_logger('rollfleet.trainer').info('seen'); get_logger('rollfleet.worker').info('no')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("", "rollfleet.trainer INFO seen\n")
