"""A recording of a run that went back to a checkpoint is dated as the run dated it."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import msgpack
import pytest
from fixtures.rollouts import make_rollout

import rollfleet
from rollfleet_common.codec import encode_header, encode_samples
from rollfleet_common.recording import Writer

#: (number, version at hand-over, (version, epoch) of each group)
Batches = Sequence[tuple[int, int, Sequence[tuple[int, int]]]]


def recorded(path: Path, batches: Batches) -> Path:
    with Writer(path, "back") as writer:
        for number, at, groups in batches:
            for place, (version, epoch) in enumerate(groups):
                made = make_rollout([version, version], group=f"g{number}-{place}", n=1)
                header = encode_header(replace(made.header, epoch=epoch))
                writer.write(f"commit:{number}:{at}", header, encode_samples(made.samples))
        writer.flush()
    return path


def staleness(path: Path) -> list[list[int]]:
    with rollfleet.replay(path) as fleet:
        batches = list(fleet.batches())
    for batch in batches:
        assert batch.stats["rollfleet/staleness_max"] == max(batch.staleness)
    return [batch.staleness for batch in batches]


def test_what_a_rollback_lost_is_as_far_behind_as_it_was_ahead(tmp_path: Path) -> None:
    path = recorded(
        tmp_path / "a",
        [
            (1, 9, [(9, 1), (8, 1)]),
            (2, 4, [(4, 2), (6, 1), (3, 1)]),
            (3, 7, [(7, 2), (6, 1), (4, 1)]),
        ],
    )
    assert staleness(path) == [[0, 1], [0, 2, 1], [0, 5, 3]]


def test_a_rollback_before_the_first_row_shows_in_what_is_ahead(tmp_path: Path) -> None:
    path = recorded(tmp_path / "b", [(7, 5, [(5, 3), (6, 2)]), (8, 6, [(6, 3), (6, 2)])])
    assert staleness(path) == [[0, 1], [0, 2]]


def test_a_server_that_was_ahead_of_the_board_is_no_rollback(tmp_path: Path) -> None:
    path = recorded(tmp_path / "c", [(1, 5, [(6, 1), (5, 1)]), (2, 6, [(6, 1)])])
    assert staleness(path) == [[-1, 0], [0]]


@pytest.mark.parametrize("payload", [7, 1.5, "text", [b"x"], {"a": 1}, True])
def test_a_payload_that_is_no_bytes_is_an_error_that_names_its_row(
    tmp_path: Path, payload: object
) -> None:
    path = recorded(tmp_path / "d", [(1, 5, [(5, 2)])])
    rows = list(msgpack.Unpacker(BytesIO(path.read_bytes())))
    rows[1][2] = payload
    path.write_bytes(b"".join(map(msgpack.packb, rows)))
    with pytest.raises(rollfleet.CodecError, match=r"d, row 1: .*payload is \w+, not bytes"):
        rollfleet.replay(path)


def test_options_of_collate_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(rollfleet.SettingsError, match="collate has devcie"):
        rollfleet.replay(recorded(tmp_path / "a", [(1, 1, [(1, 1)])]), collate={"devcie": "cuda"})
