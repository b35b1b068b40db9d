"""The demo's verifiable task: sort eight random digits, ``83920174=`` -> ``01234789|``.

- Nothing here imports torch: workers import :func:`exact` as their reward function.
- One character is one token; :data:`END` closes an answer and is the model's end-of-sequence token.
- Prompts are a pure function of the seed: two runs with one seed see the same data set.
"""

import random
from collections.abc import Iterator, Sequence

__all__ = [
    "ANSWER_TOKENS",
    "DIGITS",
    "END",
    "END_ID",
    "PAD_ID",
    "PROMPT_TOKENS",
    "VOCABULARY",
    "answer_to",
    "decode",
    "encode",
    "exact",
    "prompts",
]

#: Every token, by id: padding, end, separator, the digits, and spare ones that no answer uses.
VOCABULARY = "_|=0123456789+-*/ "
#: Fills rows on the right; never part of a prompt or an answer.
PAD_ID = 0
#: The character that closes an answer.
END = "|"
END_ID = VOCABULARY.index(END)
#: Digits in a prompt.
DIGITS = 8
#: Tokens of a prompt: the digits and the separator.
PROMPT_TOKENS = DIGITS + 1
#: Tokens of a right answer: the digits and :data:`END`.
ANSWER_TOKENS = DIGITS + 1

_IDS = {character: index for index, character in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """The token ids of a text, one for each character.

    Raises:
        ValueError: A character is not in :data:`VOCABULARY`.
    """
    try:
        return [_IDS[character] for character in text]
    except KeyError as exc:
        raise ValueError(f"the demo's vocabulary has no {exc.args[0]!r} (in {text!r})") from None


def decode(token_ids: Sequence[int]) -> str:
    """The text of token ids, the end and padding tokens shown as they are.

    Raises:
        ValueError: An id is not in the vocabulary.
    """
    for token in token_ids:
        if not 0 <= token < len(VOCABULARY):
            raise ValueError(f"token id {token} is not in 0 .. {len(VOCABULARY) - 1}")
    return "".join(VOCABULARY[token] for token in token_ids)


def answer_to(prompt: str) -> str:
    """The right completion of a prompt, :data:`END` included."""
    return "".join(sorted(prompt.removesuffix("="))) + END


def prompts(seed: int, digits: int = DIGITS) -> Iterator[tuple[str, str]]:
    """An endless stream of ``(prompt, answer)``, the same for the same seed.

    Args:
        seed: Seed of the stream.
        digits: Digits in a prompt; drawn with repetition.
    """
    rng = random.Random(seed)
    while True:
        prompt = "".join(rng.choices("0123456789", k=digits)) + "="
        yield prompt, answer_to(prompt)


def exact(completion: str | Sequence[int], answer: str) -> float:
    """The reward: 1.0 if the completion is the answer and nothing else, else 0.0.

    Args:
        completion: Token ids, compared whole, :data:`END` included; or text, whose :data:`END`
            may be missing because servers strip the end-of-sequence token from text.
        answer: The answer of :func:`prompts`.
    """
    if isinstance(completion, str):
        return float(completion.removesuffix(END) == answer.removesuffix(END))
    return float([int(token) for token in completion] == encode(answer))
