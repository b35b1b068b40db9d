"""How many tokens a server has room for, and requests cut to that.

- The limit is learnt from a refusal that names it, from the server's list of models, or from whoever
  knows it (`Room.limit`); before that, nothing is cut.
- Only the budget of a request is cut, never its prompt.
"""

from contextlib import suppress
from dataclasses import replace

from rollfleet_common.errors import ContextFullError, EngineRefusedError, InfraError
from rollfleet_engines.cards import read_cards
from rollfleet_engines.http import HttpClient
from rollfleet_engines.interface import Request
from rollfleet_engines.refusals import ContextRefusal

__all__ = ["DoesNotFitError", "Room", "fits"]


class DoesNotFitError(ContextFullError):
    """A server refused a request because of its length; between a client and its own parts only."""

    def __init__(self, message: str, said: ContextRefusal) -> None:
        super().__init__(message)
        self.said = said


def fits(request: Request, said: ContextRefusal) -> bool:
    """Whether a request is well within the limit that its refusal names."""
    if not said.limit:
        return False
    # SGLang counts places that it reserves, and wants one more than the tokens that it makes.
    used = max(len(request.token_ids), said.used)
    return used + request.sampling.max_tokens + 1 < said.limit


class Room:
    """The context of one server.

    Args:
        http: The server's client.
        model: As the server names it; None: whatever it serves.
    """

    def __init__(self, http: HttpClient, model: str | None) -> None:
        self._http = http
        self._model = model
        #: Tokens of prompt and completion that the server has room for; 0: not known.
        self.limit = 0

    def forget(self) -> None:
        """The server may come back with another context, or proved that it has another one."""
        self.limit = 0

    def fitted(self, request: Request) -> Request:
        """`request` with a budget of at most what the context leaves.

        Raises:
            ContextFullError: It leaves nothing.
        """
        prompt = len(request.token_ids)
        left = self.limit - prompt
        if not self.limit or left >= request.sampling.max_tokens:
            return request
        if left < 1:
            raise ContextFullError(
                f"a prompt of {prompt} tokens leaves no room in the context of {self._http.name}, "
                f"which has {self.limit} for prompt and completion"
            )
        return replace(request, sampling=replace(request.sampling, max_tokens=left))

    async def shorter(
        self, request: Request, asked: Request, said: ContextRefusal
    ) -> Request | None:
        """`request` with a budget that there is room for, after the server refused `asked`.

        None if nobody says how much room there is.

        Raises:
            ContextFullError: There is none.
        """
        limit = said.limit or self.limit or await self._listed()
        if not limit:
            return None
        prompt, most = len(request.token_ids), asked.sampling.max_tokens
        # SGLang counts places that it reserves as part of the prompt, and wants one place more than
        # the tokens that it makes.
        limit -= max(said.used - prompt, 0)
        self.limit = limit if limit - prompt < most else prompt + most - 1
        return self.fitted(request)

    async def _listed(self) -> int:
        """The context length in the server's list of models; 0 if there is none."""
        with suppress(InfraError, EngineRefusedError):
            cards = await read_cards(self._http)
            mine = [one for one in cards if self._model in (None, one.name)] or cards
            return min((one.context for one in mine if one.context), default=0)
        return 0
