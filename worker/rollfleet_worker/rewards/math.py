r"""Small verifiable rewards for mathematics: text against a known answer, 1.0 or 0.0.

- A completion without a readable answer is wrong: 0.0. A reference answer without one is a fault of
  the data set: ValueError, so that it becomes a failure and not a reward.
- The answer of a text is, in this order: its last ``\boxed{...}``, what follows its last ``####``,
  and for a completion its last number.
- Numbers are decimals and never evaluated: ``\sqrt{5}`` and ``2^{10}`` are no numbers here.
- Linear in the length of the completion; cheap enough for an inline pool.
"""

import re
from collections import deque
from decimal import Decimal, DecimalException, localcontext

__all__ = ["exact_match", "last_boxed", "numeric_match"]

_MINUS = "\N{MINUS SIGN}"
#: Repeats are possessive or bounded where a completion could make them backtrack for minutes.
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,12}+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
_POWER = (
    r"(?:[eE](?P<e>[+-]?\d+)(?!\w)|\s*(?:\\times|\\cdot|\*|x|×)\s*10\s*\^\s*\{?(?P<p>-?\d+)\}?)"  # noqa: RUF001
)
_FRACTION = r"\\[dt]?frac\s*\{\s*(?P<n>-?[\d.,]+)\s*\}\s*\{\s*(?P<d>-?[\d.,]+)\s*\}"
#: A number: sign and currency in any order, digits or a fraction, power of ten, percent.
_NUMBER = re.compile(
    # A minus after a digit, a letter or a bracket is a subtraction or a hyphen.
    r"(?P<sign>(?<![\w)\]}])[+-])?\$?(?P<sign2>(?<=\$)[+-])?"
    rf"(?:(?:(?<![\w.,^]))(?:(?P<whole>\d+)\s*)?{_FRACTION}"
    rf"|(?<![\w.^])(?<!\^\{{)(?:(?P<mixed>\d+)\s+(?=\d+/\d))?(?P<a>{_DIGITS})"
    rf"(?:\s*/\s*(?P<b>{_DIGITS})|{_POWER})?(?!\.?\d|\s*\^\s*\{{?[\d-]))"
    r"\s*(?P<percent>%)?"
)
#: Powers of ten beyond which arithmetic could overflow; no answer is that large.
_MAX_EXPONENT = 100_000
_BRACE = re.compile(r"(\\f?box(?:ed)?\s*\{)|\\[{}]|([{}])")
#: Around a plain number in a box: ``x =`` before it, units after it.
_BEFORE = re.compile(r"(?:[A-Za-z]\w*\s*(?:=|\\approx)|=|\\approx)?\s*")
_UNIT = re.compile(r"(?:[A-Za-z]++(?:\^\{?\d\}?)?|\^\{?\\(?:circ|degree)\}?|°|[/.\s])*+")


def exact_match(completion: str, answer: str) -> float:
    """1.0 if the completion's answer is `answer`, character by character; else 0.0.

    Runs of white space count as one space. A completion without a box or ``####`` is compared whole.
    """
    return float(_squeezed(_marked(completion)) == _squeezed(_marked(answer)))


def numeric_match(completion: str, answer: str, tolerance: float = 1e-6) -> float:
    r"""1.0 if the completion's number is the answer's; else 0.0.

    Reads thousands commas, decimals, fractions (``3/4``, ``1 1/2``, ``\frac{3}{4}``), powers of
    ten, signs, currency, units and percent. Two whole numbers must be equal; others may differ by
    `tolerance` times the answer's size (or by `tolerance`, if the answer is 0). A percent sign on
    one side only may be read either way: 50% is 0.5, and is 50.

    Raises:
        ValueError: `answer` holds no number.
    """
    want = _plain(_marked(answer))
    if want is None:
        raise ValueError(f"the reference answer holds no plain number: {answer[:200]!r}")
    marked = _marked(completion)
    got = _last(completion) if marked is completion else _plain(marked)
    if got is None:
        return 0.0
    hundred = Decimal(100)
    readings = [(got[0], want[0])]
    if got[1] != want[1]:
        readings.append((got[0] / hundred, want[0]) if got[1] else (got[0], want[0] / hundred))
    return float(any(_close(a, b, Decimal(str(tolerance))) for a, b in readings))


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` or ``\fbox{...}`` holds; None if there is none."""
    best: tuple[int, int] | None = None
    opened: list[int | None] = []  # where each open brace's box begins, None if it is no box's
    for token in _BRACE.finditer(text):
        if token[1]:
            opened.append(token.end())
        elif token[2] == "{":
            opened.append(None)
        elif token[2] == "}" and opened:
            begin = opened.pop()
            if begin is not None and (best is None or begin > best[0]):
                best = (begin, token.start())
    return None if best is None else text[slice(*best)]


def _marked(text: str) -> str:
    """The part of `text` that is marked as its answer, or `text` itself."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, after = text.rpartition("####")
    return after.strip() if mark else text


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _cleaned(text: str) -> str:
    for old, new in ((_MINUS, "-"), ("{,}", ","), ("\\$", "$"), ("\\%", "%")):
        text = text.replace(old, new)
    return re.sub(r"\\[,!;: ]|\\left|\\right|~", " ", text) if "\\" in text or "~" in text else text


def _last(text: str) -> tuple[Decimal, bool] | None:
    """The last number in running text, and whether it is in percent."""
    found = deque(_NUMBER.finditer(_cleaned(text)), maxlen=1)
    return _value(found[0]) if found else None


def _plain(text: str) -> tuple[Decimal, bool] | None:
    """The one number that `text` is, apart from ``x =`` before it and a unit after it."""
    text = _cleaned(text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"([+-])\s+(?=[\d.$\\])", r"\1", text.strip().strip("$").strip())
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", text)  # 12\,345 is one number
    before = _BEFORE.match(text)
    found = _NUMBER.match(text, before.end() if before else 0)
    if found is None or not _UNIT.fullmatch(text, found.end()):
        return None
    return _value(found)


def _value(found: re.Match[str]) -> tuple[Decimal, bool] | None:
    part = found.groupdict()
    try:
        with localcontext() as context:
            context.prec = 50
            top = _decimal(part["n"] or part["a"])
            if part["d"] or part["b"]:
                top /= _decimal(part["d"] or part["b"])
            if part["whole"] or part["mixed"]:
                top += _decimal(part["whole"] or part["mixed"])
            if part["e"] or part["p"]:
                top = top.scaleb(int(part["e"] or part["p"]))
    except (DecimalException, ValueError):  # a division by zero, 1..2, an exponent of a megabyte
        return None
    if abs(top.adjusted()) > _MAX_EXPONENT:
        return None
    # Unary minus would round to the context's 28 digits.
    negative = "-" in (part["sign"] or "", part["sign2"] or "")
    return (top.copy_negate() if negative else top), part["percent"] is not None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _close(got: Decimal, want: Decimal, tolerance: Decimal) -> bool:
    if got == want:
        return True
    if got == got.to_integral_value() and want == want.to_integral_value():
        return False
    return abs(got - want) <= tolerance * (abs(want) or 1)
