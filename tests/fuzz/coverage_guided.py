"""Coverage-guided fuzzing of all readers, with atheris: ``python -m fuzz.coverage_guided SECONDS``.

- Needs ``pip install atheris`` (Linux, CPython); the same readers run under hypothesis in
  ``tests/common/test_fuzz.py`` without it.
- One input may take 2 s and 512 MiB: a message of a few bytes must not cost more.
"""

# ruff: noqa: E402  # what is imported under atheris has to be imported first

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

#: Not among our dependencies.
atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["rollfleet_common", "rollfleet", "rollfleet_console"]):
    from fuzz import readers

import msgpack
import numpy as np

from rollfleet_common.codec import encode_prompt, encode_samples
from rollfleet_common.messages import Prompt, Sample, VersionSpans

LONGEST = 4096
NAMES = (b"g", b"i", b"n", b"a", b"k", b"t", b"p", b"r", b"e", b"why")
IDS = np.arange(4, dtype=np.int32)
SPANS = VersionSpans.of([(2, -1), (2, 5)])
SAMPLE = Sample(IDS, IDS >= 2, np.zeros(4, np.float32), SPANS, 1.0, {"c": 1.0}, {"a": IDS})
HEADER = [1, "g", 0, 2, 1, "train", "r", "t", 0, "1-1", "1-1:n", 9, 1, 5, 5, 1, 4, 2, 1.0]
CARD = {"id": "w", "seen_ms": 1, "routes": ["r"], "servers": [{"name": "s"}], "slots": 3}
SHAPE = {"partitions": 1, "samples_per_version": 8, "max_staleness": 2, "pipeline_depth": 2}
#: A good message for each reader of one value, as a tree.
GOOD: dict[str, Any] = {
    "prompt": msgpack.unpackb(encode_prompt(Prompt("g", 2, IDS, {"a": [1, b"c"]}), 1 << 20)),
    "header": [*HEADER, "w", "s", 1, 2, 3],
    "samples": msgpack.unpackb(encode_samples([SAMPLE, SAMPLE])),
    "plan": [1, "handed", [[0, "1-1", "train", "1-1:n"]], [[0, "g"]], [[0, "2-1"]]],
    "card": CARD,
    "shape": SHAPE,
}


def packed(name: str, tree: Any) -> bytes:
    """A tree as its reader wants it."""
    if name in ("card", "shape"):
        return json.dumps(tree, default=repr).encode()
    return cast("bytes", msgpack.packb(tree))


def changed(tree: Any, p: Any, depth: int = 0) -> Any:
    """A tree with some of its leaves replaced by others."""
    if depth < 4 and isinstance(tree, dict):
        return {k: changed(v, p, depth + 1) for k, v in tree.items() if p.ConsumeIntInRange(0, 15)}
    if depth < 4 and isinstance(tree, list):
        return [changed(v, p, depth + 1) for v in tree if p.ConsumeIntInRange(0, 31)]
    return value(p, 0) if p.ConsumeIntInRange(0, 5) == 0 else tree


def value(p: Any, depth: int) -> Any:
    """Any value that msgpack knows."""
    kind = p.ConsumeIntInRange(0, 8 if depth < 3 else 6)
    if kind == 7:
        return [value(p, depth + 1) for _ in range(p.ConsumeIntInRange(0, 3))]
    if kind == 8:
        return {p.ConsumeUnicodeNoSurrogates(3): value(p, depth + 1) for _ in range(2)}
    makers = (
        lambda: None,
        p.ConsumeBool,
        lambda: p.ConsumeIntInRange(-(2**63), 2**64 - 1),
        p.ConsumeFloat,
        lambda: p.ConsumeUnicodeNoSurrogates(p.ConsumeIntInRange(0, 12)),
        lambda: p.ConsumeBytes(p.ConsumeIntInRange(0, 24)),
        lambda: p.PickValueInList([0, 1, -1, 2**31, "1", "<i4", "|b1", [2], b"", float("nan")]),
    )
    return makers[kind]()


def one(data: bytes) -> None:
    """One input: its first byte names the reader, and whether the rest is raw or says changes."""
    if not data:
        return
    names = [*readers.MESSAGES, *readers.RECORDS]
    name = names[data[0] // 2 % len(names)]
    raw = data[0] % 2
    p = atheris.FuzzedDataProvider(data[1:])
    if name in readers.MESSAGES:
        message = data[1:] if raw else packed(name, changed(GOOD[name], p))
        readers.MESSAGES[name](message)
        return
    fields = {
        field: p.ConsumeBytes(p.ConsumeIntInRange(0, 32)) for field in NAMES if p.ConsumeBool()
    }
    for field, inner in ((b"d", "prompt"), (b"h", "header")):
        if p.ConsumeBool():
            fields[field] = packed(inner, changed(GOOD[inner], p))
    if raw:
        fields |= {b"g": b"g", b"i": b"1", b"a": b"1"}
    readers.RECORDS[name](fields)


def main() -> None:
    """Fuzz for as many seconds as the command line says; a finding ends it with a traceback."""
    seconds = sys.argv[1] if len(sys.argv) > 1 else "120"
    with tempfile.TemporaryDirectory() as corpus:
        for at, (name, tree) in enumerate(GOOD.items()):
            (Path(corpus) / name).write_bytes(bytes([2 * at + 1]) + packed(name, tree))
        limits = [f"-max_total_time={seconds}", "-timeout=2", "-rss_limit_mb=512"]
        artifacts = f"-artifact_prefix={tempfile.gettempdir()}/"
        atheris.Setup([sys.argv[0], *limits, artifacts, f"-max_len={LONGEST}", corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
