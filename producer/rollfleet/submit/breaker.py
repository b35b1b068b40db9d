"""Stops a feed whose samples only fail: deaths, and torn or unusable groups in a row, without one success."""

from collections import deque

from rollfleet_common.errors import FailingError
from rollfleet_common.messages import Kind, Tombstone
from rollfleet_common.text import parse_json

__all__ = ["Breaker", "failure_text"]

#: What groups are dropped as whose rollouts came and cannot be used: workers make them so.
UNUSABLE = frozenset({"corrupt", "form", "oversize", "undecodable"})


class Breaker:
    """Counts what fails in a row.

    Args:
        deaths: Dead samples, torn groups or unusable groups in a row that stop the feed; 0: none do.
        prompts: Distinct prompts over which these must be spread.
    """

    def __init__(self, deaths: int, prompts: int) -> None:
        self.limit = deaths
        self.prompts = prompts
        #: Samples that died since the last rollout.
        self.deaths = 0
        #: Groups torn by deaths since the last group that could be trained on.
        self.torn = 0
        #: Groups that could not be used since the last batch, and why the newest could not.
        self.unusable = 0
        self.unusable_as = ""
        #: The newest failure, in words.
        self.newest = ""
        # Only whether there are enough of them matters.
        self._groups: deque[str] = deque(maxlen=max(prompts, 1))

    def died(self, tombstone: Tombstone) -> None:
        """A sample has no attempts left."""
        if tombstone.reason != "dead":
            return
        self.newest = failure_text(tombstone)
        if tombstone.kind is Kind.TRAIN:
            self.deaths += 1
            if tombstone.group not in self._groups:
                self._groups.append(tombstone.group)

    def delivered(self) -> None:
        """A rollout came."""
        if self.deaths:
            self.deaths = 0
            self._groups.clear()

    def tore(self) -> None:
        """A group was given up because samples of it died."""
        self.torn += 1

    def whole(self) -> None:
        """A group came that may be trained on."""
        self.torn = 0

    def spoiled(self, reason: str) -> None:
        """A group was dropped for `reason`."""
        if reason in UNUSABLE:
            self.unusable += 1
            self.unusable_as = reason

    def handed(self) -> None:
        """A batch was handed over."""
        self.unusable = 0

    def check(self) -> None:
        """Raise if too much failed in a row.

        Raises:
            FailingError: The message has the newest failure.
        """
        if not self.limit:
            return
        newest = f"; the newest failure: {self.newest}" if self.newest else ""
        if self.deaths >= self.limit and len(self._groups) >= self.prompts:
            some = (
                ". If only some samples of a group fail, the others were cancelled as torn: set "
                "min_group_size to train on groups that lack a sample"
                if self.torn
                else ""
            )
            raise FailingError(
                f"the feed was stopped: {self.deaths} samples of {self.prompts} or more prompts died "
                f"in a row, and not one rollout came{newest}. Mend what fails (`rollfleet dead list` "
                f"has the history), then open the run again: nothing else is lost{some}. "
                "breaker_deaths sets how many it takes"
            )
        if self.torn >= max(self.limit, self.prompts):
            raise FailingError(
                f"the feed was stopped: {self.torn} groups in a row were torn, because some of their "
                f"samples died{newest}. Set min_group_size to train on groups that lack a sample, or "
                "mend what fails; then open the run again. breaker_deaths sets how many it takes"
            )
        if self.unusable >= max(self.limit, self.prompts):
            raise FailingError(
                f"the feed was stopped: {self.unusable} groups in a row were dropped because their "
                f"rollouts cannot be used, the last one as `{self.unusable_as}`; the log says why. "
                "Mend the workers, then open the run again. breaker_deaths sets how many it takes"
            )


def failure_text(tombstone: Tombstone) -> str:
    """What a tombstone says of a failure: kind, detail and worker of the last attempt."""
    try:
        record = parse_json(tombstone.detail)
        return f"{record['kind']}: {record['detail']} (worker {record['worker']})"
    except (ValueError, KeyError, TypeError):
        return tombstone.detail or tombstone.reason
