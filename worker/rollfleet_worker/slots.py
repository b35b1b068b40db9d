"""How many more episodes this worker may run: taken before reading, so that it never overclaims.

- First come, first served: of several claimers, none takes what it gave back ahead of one that waits.
"""

import asyncio

__all__ = ["Slots"]


class Slots:
    """A count of free slots that can be taken many at a time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._freed = asyncio.Event()
        self._freed.set()
        self._turn = asyncio.Lock()
        self._closed = False

    @property
    def busy(self) -> int:
        """Slots taken."""
        return self.total - self.free

    async def take(self, least: int, most: int) -> int:
        """Wait until `least` slots are free (at most all there are), then take up to `most`.

        Returns:
            How many were taken: 0 when the slots were closed meanwhile.
        """
        least = min(least, self.total)
        async with self._turn:
            while self.free < least and not self._closed:
                self._freed.clear()
                await self._freed.wait()
            if self._closed:
                return 0
            taken = min(self.free, max(most, least))
            self.free -= taken
            return taken

    def close(self) -> None:
        """Give out no more: nobody waits for a slot any longer."""
        self._closed = True
        self._freed.set()

    def try_take(self, most: int) -> int:
        """Take up to `most` of what is free now."""
        taken = min(self.free, most)
        self.free -= taken
        return taken

    def give(self, count: int = 1) -> None:
        """Give slots back."""
        self.free += count
        self._freed.set()
