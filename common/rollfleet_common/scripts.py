"""The atomic steps: ``lua/*.lua``, loaded once and called by digest.

- EVALSHA first; a server that does not know the script (restarted, flushed, failed over) is sent
  its text, which loads it again. No FUNCTION library: two releases in a rolling deploy would
  overwrite each other's.
- Scripts that free or steer carry ``#!lua flags=allow-oom`` and so run even at maxmemory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from redis.exceptions import NoScriptError

__all__ = ["Script", "load", "script_texts"]

_LUA = files("rollfleet_common") / "lua"


@dataclass(frozen=True, slots=True)
class Script:
    """One atomic step."""

    name: str
    text: str
    digest: str

    async def __call__(self, client: Any, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """Run it; NOSCRIPT is answered with the text.

        Raises:
            redis.exceptions.RedisError: As the server said it.
        """
        try:
            return await client.evalsha(self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return await client.eval(self.text, len(keys), *keys, *args)


def load(name: str) -> Script:
    """The script of ``lua/<name>.lua``."""
    text = (_LUA / f"{name}.lua").read_text(encoding="utf-8")
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def script_texts() -> dict[str, str]:
    """All scripts by name, for loading them ahead under an ACL that forbids EVAL."""
    return {
        entry.name.removesuffix(".lua"): entry.read_text(encoding="utf-8")
        for entry in _LUA.iterdir()
        if entry.name.endswith(".lua")
    }
