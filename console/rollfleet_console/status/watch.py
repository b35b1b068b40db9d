"""`rollfleet status --watch`: a snapshot again and again, until Ctrl-C.

- A Redis that goes away is shown and waited for; what was seen last stays on the screen.
"""

import asyncio
import time
from typing import Any

from redis.exceptions import RedisError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from rollfleet_common.errors import BrokerSetupError
from rollfleet_common.redis import translate
from rollfleet_console.status.render import render
from rollfleet_console.status.snapshot import take

__all__ = ["watch_run"]


async def watch_run(client: Any, run: str, interval_s: float) -> None:
    """Draw the run every `interval_s` seconds, for ever.

    Raises:
        BrokerSetupError: Redis refuses us, which waiting does not mend.
    """
    last: RenderableType = ""
    with Live(console=Console(highlight=False), auto_refresh=False, screen=True) as live:
        while True:
            at = time.strftime("%H:%M:%S")
            try:
                last = render(await take(client, run), why_first=True)
                note = Text(f"{at}, every {interval_s:g} s; Ctrl-C ends it", style="dim")
            except (RedisError, OSError) as exc:
                error = translate(exc)
                if isinstance(error, BrokerSetupError):
                    raise error from exc
                note = Text(f"{at}: {error}; what was seen last is below", style="red")
            live.update(Group(note, "", last), refresh=True)
            await asyncio.sleep(interval_s)
