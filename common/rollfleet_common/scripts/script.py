"""One script: its text, its digest, and how it is called.

- EVALSHA first; a server that does not know the script (restarted, flushed, failed over) is sent
  its text, which loads it again. No FUNCTION library: two releases in a rolling deploy would
  overwrite each other's.
- Scripts that free or steer carry ``#!lua flags=allow-oom`` and so run even at maxmemory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from redis.exceptions import NoScriptError

__all__ = ["MAX_ARGUMENTS", "Script", "chunks", "load", "room", "script_texts"]

T = TypeVar("T")

_LUA = files("rollfleet_common") / "lua"
#: Words of one command, its name included: ElastiCache Serverless takes no more.
MAX_ARGUMENTS = 3_999
#: EVALSHA, the digest, and the number of keys.
_HEAD = 3


class Script:
    """One atomic step, the same object for everyone who calls it."""

    __slots__ = ("digest", "name", "text")

    name: str
    #: What is run, and its SHA-1.
    text: str
    digest: str

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.use(text)

    def use(self, text: str) -> None:
        """Run `text` from now on."""
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, client: Any, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """Run it; NOSCRIPT is answered with the text.

        Raises:
            ValueError: The call has more words than :data:`MAX_ARGUMENTS`.
            redis.exceptions.RedisError: As the server said it.
        """
        self._fits(keys, args)
        try:
            return await client.evalsha(self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return await client.eval(self.text, len(keys), *keys, *args)

    def queue(self, pipe: Any, keys: Sequence[Any], args: Sequence[Any]) -> None:
        """Put a call on a pipeline; NOSCRIPT is the caller's to answer.

        As a command, because the pipeline of a cluster client has no ``evalsha``.
        """
        self._fits(keys, args)
        pipe.execute_command("EVALSHA", self.digest, len(keys), *keys, *args)

    def _fits(self, keys: Sequence[Any], args: Sequence[Any]) -> None:
        if (words := _HEAD + len(keys) + len(args)) > MAX_ARGUMENTS:
            raise ValueError(
                f"a call of {self.name}.lua has {words:,} words, {len(keys):,} of them keys: some "
                f"servers take {MAX_ARGUMENTS:,} at most. Split it"
            )


def room(fixed: int, each: int) -> int:
    """How many items of `each` words fit in a call, beside `fixed` ones."""
    return (MAX_ARGUMENTS - _HEAD - fixed) // each


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in rows of at most `size`; none if there are no items."""
    for at in range(0, len(items), size):
        yield items[at : at + size]


@cache
def load(name: str) -> Script:
    """The script of ``lua/<name>.lua``."""
    return Script(name, (_LUA / f"{name}.lua").read_text(encoding="utf-8"))


def script_texts() -> dict[str, str]:
    """All scripts by name, for loading them ahead under an ACL that forbids EVAL."""
    return {
        entry.name.removesuffix(".lua"): entry.read_text(encoding="utf-8")
        for entry in _LUA.iterdir()
        if entry.name.endswith(".lua")
    }
