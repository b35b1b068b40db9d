"""Causes of a starved run that would contradict each other are not told together."""

from rollfleet.state.causes import CardServer, Evidence, WorkerSeen, diagnose
from rollfleet_common.ledger import Books


def slow(*workers: WorkerSeen) -> set[str]:
    """Codes of the causes, where samples have been in flight for long."""
    books = Books(submitted=16, in_flight=16, outstanding=16)
    evidence = Evidence(books=books, workers=workers, fed=True, oldest_flight_s=600.0)
    return {cause.code for cause in diagnose(evidence)}


def test_workers_that_have_no_server_hang_in_no_episode() -> None:
    dead = CardServer("http://s0", "dead", 0, None, "refused")
    cut_off = WorkerSeen("w0", "no-server", 1.0, slots=16, busy=16, servers=(dead,))
    assert slow(cut_off) & {"no-server", "episodes-hang", "servers-slow"} == {"no-server"}
    busy = WorkerSeen("w1", "claiming", 1.0, slots=16, busy=16)
    assert "episodes-hang" in slow(cut_off, busy), "the other worker's episodes do hang"
