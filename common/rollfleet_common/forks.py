"""What belongs to the process that made it: threads, event loops and sockets do not survive a fork.

- A forked child has a copy of the object and none of its threads. What waits for one would hang; what
  writes to a socket would corrupt the parent's stream. So calls in a child raise, and closing does nothing.
"""

import os

from rollfleet_common.errors import ForkedError

__all__ = ["Home"]


class Home:
    """The process in which something was made; `what` and `instead` are for the error's message."""

    def __init__(self, what: str, instead: str) -> None:
        self.what = what
        self.instead = instead
        self.pid = os.getpid()

    @property
    def left(self) -> bool:
        """Whether this is another process: a forked child."""
        return os.getpid() != self.pid

    def check(self) -> None:
        """Refuse to work in a forked child.

        Raises:
            ForkedError: This is one.
        """
        if self.left:
            raise ForkedError(
                f"{self.what} was made in process {self.pid} and is used in its forked child "
                f"{os.getpid()}, which has no copy of its threads and must not use its "
                f"connections. {self.instead}, or start the child with the "
                '"spawn" method (multiprocessing.get_context("spawn"))'
            )
