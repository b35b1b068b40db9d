"""Why a server refused a request: the prompt's length, the prompt itself, or the server's set-up.

- A refusal that names the context length is about this prompt, and says how much would have fitted.
- Any other refusal (400, 413, 422) is the server's until it has completed a prompt, and again once it
  has refused several prompts in a row without completing one: a gateway that refuses everything
  must not use up the prompts of a run.
"""

import re
from dataclasses import dataclass

__all__ = ["REFUSED_IN_A_ROW", "UNPROVEN", "ContextRefusal", "Record", "context_refusal"]

#: After so many different prompts refused without a completion, refusals are the server's fault.
REFUSED_IN_A_ROW = 8
#: Why the refusals of a server without a completion are its own fault.
UNPROVEN = "it has not completed any token ids yet"

_NAMES_CONTEXT = re.compile(
    r"context[ _](?:length|size|window|limit)|maximum model length|max_model_len|max(?:imum)? allowed "
    r"(?:input )?length|(?:prompt|input)(?: is| length)? too long|n_ctx",
    re.IGNORECASE,
)
#: The limit in the words of vLLM, SGLang, llama.cpp and OpenAI; read in their sources.
_LIMIT = re.compile(
    r"(?:context (?:length|size|window|limit)|maximum model length|maximum allowed (?:input )?length)"
    r"(?: is| of|:)?[ (]{1,3}(\d{1,10})\b|\"n_ctx\"\s*:\s*(\d{1,10})\b",
    re.IGNORECASE,
)
_USED = re.compile(r"(\d{1,10}) tokens from the input messages")
_READ_BYTES = 8192


@dataclass(frozen=True, slots=True)
class ContextRefusal:
    """A refusal that names the context length."""

    #: Tokens of prompt and completion that the server has room for; 0 if it does not say.
    limit: int
    #: Tokens of the prompt as the server counts them, reserved ones included; 0 if it does not say.
    used: int


def context_refusal(body: bytes) -> ContextRefusal | None:
    """What a refusal says of the context length; None if it is about something else."""
    text = body[:_READ_BYTES].decode(errors="replace")
    if not _NAMES_CONTEXT.search(text):
        return None
    found, used = _LIMIT.search(text), _USED.search(text)
    limit = int(found[1] or found[2]) if found else 0
    return ContextRefusal(limit, int(used[1]) if used else 0)


class Record:
    """What one server has completed and refused, as far as that decides whose fault a refusal is."""

    def __init__(self) -> None:
        #: Whether it has completed a prompt of token ids since it was last down.
        self.proven = False
        #: Prompts refused since the last completion.
        self._refused: set[str] = set()

    def completed(self) -> None:
        """It has completed a prompt."""
        self.proven = True
        self._refused.clear()

    def forget(self) -> None:
        """It was down: another server may be at its address."""
        self.proven = False
        self._refused.clear()

    def refused(self, prompt: str) -> str:
        """Count a refusal of `prompt`; why it is the server's fault, "" if it is the prompt's."""
        if not self.proven:
            return UNPROVEN
        self._refused.add(prompt)
        if len(self._refused) < REFUSED_IN_A_ROW:
            return ""
        return f"it has refused {len(self._refused)} prompts in a row without completing one"
