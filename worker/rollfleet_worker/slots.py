"""How many more episodes this worker may run: taken before reading, so that it never overclaims."""

import asyncio

__all__ = ["Slots"]


class Slots:
    """A count of free slots that can be taken many at a time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._freed = asyncio.Event()
        self._freed.set()

    @property
    def busy(self) -> int:
        """Slots taken."""
        return self.total - self.free

    async def take(self, least: int, most: int) -> int:
        """Wait until `least` slots are free (at most all there are), then take up to `most`."""
        least = min(least, self.total)
        while self.free < least:
            self._freed.clear()
            await self._freed.wait()
        taken = min(self.free, max(most, least))
        self.free -= taken
        return taken

    def try_take(self, most: int) -> int:
        """Take up to `most` of what is free now."""
        taken = min(self.free, most)
        self.free -= taken
        return taken

    def give(self, count: int = 1) -> None:
        """Give slots back."""
        self.free += count
        self._freed.set()
