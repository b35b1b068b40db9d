"""Dead letters: listed, shown, retried as a new group, purged; the books balance all the while."""

import asyncio
import json
from typing import Any

import pytest
from fixtures.staged import StagedRun
from typer.testing import CliRunner, Result

from rollfleet_common.errors import FailureKind, RollfleetError, SettingsError
from rollfleet_common.leases import Leases, quarantine
from rollfleet_common.ledger import read_books
from rollfleet_common.messages import Kind
from rollfleet_common.streams import Garbage
from rollfleet_console import dead_letters as d
from rollfleet_console.cli import app


async def cli(url: str, *args: str, answer: str | None = None) -> Result:
    """A command as a user types it; in a thread, because it has an event loop of its own."""
    env = {"ROLLFLEET_REDIS_URL": url, "ROLLFLEET_RUN": "staged", "COLUMNS": "100"}
    return await asyncio.to_thread(CliRunner().invoke, app, ["dead", *args], env=env, input=answer)


async def garbage(run: StagedRun) -> None:
    stream = run.part().prompts("default")
    entry = (await run.client.xadd(stream, {"x": "y"})).decode()
    await quarantine(run.client, run.part(), stream, "workers", Garbage(entry, "no prompt", {}))


async def balance(run: StagedRun) -> int:
    partitions = [run.part(p) for p in range(run.shape.partitions)]
    return (await read_books(run.client, partitions)).balance


async def test_list_show_and_their_json(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        await run.add_dead_letter("g1")
        await run.add_dead_letter("g2", task="sorting", sampling={"top_p": 0.5})
        await garbage(run)
        listed = await cli(redis_url, "list")
        assert listed.exit_code == 0, listed.output
        assert listed.stdout.index("g2 #0") < listed.stdout.index("g1 #0")
        assert "workflow math.Sort: KeyError: 'answer'" in listed.stdout
        rows = json.loads((await cli(redis_url, "list", "--json")).stdout)
        assert [row["group"] for row in rows] == ["", "g2", "g1"]
        assert [row["why"] for row in rows] == ["garbage", "data", "data"]
        assert rows[0]["detail"] == "no prompt"
        assert (rows[1]["kind"], rows[1]["attempts"], rows[1]["index"]) == ("train", 2, 0)
        only = json.loads((await cli(redis_url, "list", "--json", "--why", "garbage")).stdout)
        assert [row["id"] for row in only] == [rows[0]["id"]]
        short = await cli(redis_url, "list", "--limit", "1")
        assert "... and more: --limit 10" in short.stdout

        shown = await cli(redis_url, "show", rows[1]["id"])
        assert "g2, index 0 of 1" in shown.stdout
        assert "train, route default, task sorting" in shown.stdout
        assert "40: [0, 1, 2," in shown.stdout
        assert '{"answer": "42", "blob": "00ff"}' in shown.stdout
        assert '{"top_p": 0.5}' in shown.stdout
        assert "attempt 1: data on w0" in shown.stdout
        assert "attempt 2: data on w0" in shown.stdout
        whole = json.loads((await cli(redis_url, "show", rows[1]["id"], "--json")).stdout)
        assert whole["prompt"]["token_ids"] == list(range(40))
        assert whole["prompt"]["data"] == {"answer": "42", "blob": "00ff"}
        assert [record["attempt"] for record in whole["history"]] == [1, 2]
        assert "cannot be read: no prompt" in (await cli(redis_url, "show", rows[0]["id"])).stdout


async def test_a_retry_is_a_new_group_of_one_and_happens_once(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        await run.add_dead_letter("g1", deadline_ms=1, kind=Kind.EVAL)
        (letter,) = await d.select(run.client, "staged")
        done = await cli(redis_url, "retry", letter.id)
        assert f"{letter.id}: submitted again as group g1-r{letter.entry}" in done.stdout
        assert "1 of 1 dead letter retried" in done.stdout
        (claim,) = await run.claim("w1", 10)
        assert (claim.prompt.group, claim.prompt.n, claim.index) == (letter.retry_group, 1, 0)
        assert (claim.prompt.kind, claim.prompt.deadline_ms) == (Kind.EVAL, 0)
        assert claim.prompt.data == {"answer": "42", "blob": b"\x00\xff"}
        assert claim.attempt == 1
        # The command was killed before it removed the letter, and is given again.
        assert await d.retry(run.client, "staged", letter) is False
        assert await run.claim("w1", 10) == []
        assert await balance(run) == 0
        again = await cli(redis_url, "retry", letter.id)
        assert again.exit_code == 2
        assert f"has no dead letter '{letter.id}'" in again.stderr


async def test_retry_over_partitions_lands_where_the_new_group_lives(redis_url: str) -> None:
    async with StagedRun(redis_url, partitions=3) as run:
        await run.open()
        groups = [f"g{i}" for i in range(6)]
        for group in groups:
            await run.add_dead_letter(group)
        letters = await d.select(run.client, "staged")
        assert len({letter.partition for letter in letters}) > 1
        for letter in letters:
            assert ("/" in letter.id) == (letter.partition > 0)
        done = await cli(redis_url, "retry", "--all")
        assert "6 of 6 dead letters retried" in done.stdout
        claims = await run.claim("w1", 10)
        assert sorted(c.prompt.group.partition("-r")[0] for c in claims) == groups
        assert await d.select(run.client, "staged") == []
        assert await balance(run) == 0


async def test_what_holds_no_prompt_cannot_be_retried(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        await run.add_dead_letter("g1")
        await garbage(run)
        (bad,) = await d.select(run.client, "staged", why="garbage")
        refused = await cli(redis_url, "retry", bad.id)
        assert refused.exit_code == 2
        assert "holds no prompt that can be read (no prompt): it can only be purged" in (
            refused.stderr
        )
        done = await cli(redis_url, "retry", "--all")
        assert "1 of 2 dead letters retried; 1 without a readable prompt" in done.stdout


async def test_a_prompt_whose_body_is_broken_is_shown_with_its_history(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        await run.submit("g1", 1)
        (claim,) = await run.claim("w0", 1)
        fields = {b"g": b"g1", b"i": b"0", b"a": b"1", b"k": b"train", b"n": b"1", b"d": b"?"}
        bad = Garbage(claim.entry, "field 3: a str", fields, route="default")
        await Leases(run.client, run.part(), "w0").quarantine(bad)
        (letter,) = await d.select(run.client, "staged")
        broken = {b"d": b"\xff", b"e": b'not json\n{"attempt": 1}', b"why": b"data", b"a": b"x"}
        await run.client.xadd(run.part().dead, broken)
        newest, _ = await d.select(run.client, "staged")
        assert newest.prompt is None
        assert newest.attempts == 0
        assert [*newest.history] == [{"detail": "not json"}, {"attempt": 1}]
        assert "undecodable prompt: field 3: a str" in letter.detail


async def test_retry_needs_a_trainer(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        await run.add_dead_letter("g1")
        (letter,) = await d.select(run.client, "staged")
        await run.client.hset(run.keys.board, "token", "another")
        with pytest.raises(RollfleetError, match="a trainer is opening run 'staged' at this momen"):
            await d.retry(run.client, "staged", letter)
        await run.client.delete(run.keys.board)
        with pytest.raises(RollfleetError, match="was never opened by a trainer"):
            await d.retry(run.client, "staged", letter)
        assert await run.client.xlen(run.part().dead) == 1


async def test_purge_asks_and_selects(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        await run.add_dead_letter("g1")
        await run.add_dead_letter("g2")
        await run.submit("g3", 1)
        (claim,) = await run.claim("w0", 1)
        await run.fail(claim, "w0", FailureKind.POISON)
        kept = await cli(redis_url, "purge", "--all", answer="n\n")
        assert "Delete 3 dead letters of run 'staged' for good?" in kept.stdout
        assert kept.exit_code == 1
        assert await run.client.xlen(run.part().dead) == 3
        young = await cli(redis_url, "purge", "--older-than", "1h", "--yes")
        assert "0 dead letters deleted" in young.stdout
        poison = await cli(redis_url, "purge", "--all", "--why", "poison", "-y")
        assert "1 dead letter deleted" in poison.stdout
        letter, _ = await d.select(run.client, "staged")
        one = await cli(redis_url, "purge", letter.id, answer="y\n")
        assert "1 dead letter deleted" in one.stdout
        rest = await cli(redis_url, "purge", "--older-than", "0ms", "--yes")
        assert "1 dead letter deleted" in rest.stdout
        assert "No dead letters." in (await cli(redis_url, "list")).stdout
        assert await balance(run) == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["retry"], "give either ids or --all"),
        (["purge", "1-0", "--all"], "give either ids or --all or --older-than, not both"),
        (["purge", "--older-than", "soon"], "--older-than = 'soon': should be a number of seconds"),
        (["show", "g1"], "'g1' is no id of a dead letter: they look like 1755000000000-0"),
        (["show", "3/1-0"], "'3/1-0': this run has 1 partition(s), counted from 0"),
        (["show", "1-0"], "run 'staged' has no dead letter '1-0'"),
        (["list", "--run", "a b"], "run = 'a b' (from argument run): the name 'a b' cannot be"),
    ],
)
async def test_what_is_wrong_is_said(redis_url: str, args: list[str], said: str) -> None:
    result = await cli(redis_url, *args)
    assert result.exit_code == 2
    assert said in result.stderr


async def test_a_run_that_nobody_opened_has_none(redis_url: str) -> None:
    assert "No dead letters." in (await cli(redis_url, "list")).stdout
    async with StagedRun(redis_url) as run:
        with pytest.raises(SettingsError, match="cannot be part of a Redis key"):
            await d.select(run.client, "a b")


async def test_more_letters_than_one_page(redis_url: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(d, "PAGE", 2)
    async with StagedRun(redis_url) as run:
        await run.open()
        for i in range(5):
            await run.add_dead_letter(f"g{i}")
        assert [x.group for x in await d.select(run.client, "staged")] == [
            *("g4", "g3", "g2", "g1", "g0"),
        ]
        assert len(await d.select(run.client, "staged", limit=3)) == 3
