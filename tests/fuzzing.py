r"""Documents spoiled for tests: what disks and editors do to bytes, and what hands do to json.

    CHARLSTM_FUZZ=80 .venv/bin/python -m pytest tests/run/test_fuzzed_borders.py \
        tests/data_pipeline/build/test_fuzzed_corpora.py

tries 80 times as many documents, others each time; without it they are the same ones in every run.  `make long` tries
8 times as many, of these and of all that hypothesis makes.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("CHARLSTM_FUZZ", "1"))
settings.register_profile("tests", max_examples=25 * TIMES, deadline=None)


def fuzzed(examples: int = 40):
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def sentence(error: Exception) -> str:
    """What the error says, which is something, in one line."""
    said = str(error)
    assert said.strip() and len(said.splitlines()) == 1, repr(said)
    return said


# Damage: what disks and editors do to bytes, and what hands do to json.

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates, line breaks and NUL too


@st.composite
def damaged(draw, document: bytes, put: st.SearchStrategy[bytes]) -> bytes:
    """`document` with bits flipped and stretches of it lost, doubled, moved or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(document)))
        stop = min(start + draw(st.integers(0, 12)), len(document))
        head, middle, tail = document[:start], document[start:stop], document[stop:]
        what = draw(st.sampled_from(["flip", "replace", "insert", "lose", "double", "move", "cut"]))
        if what == "flip" and tail:
            document = head + middle + bytes([tail[0] ^ 1 << draw(st.integers(0, 7))]) + tail[1:]
        elif what in ("replace", "insert"):
            document = head + draw(put) + (middle if what == "insert" else b"") + tail
        elif what in ("lose", "double"):
            document = head + (2 * middle if what == "double" else b"") + tail
        elif what == "move":
            to = draw(st.integers(0, len(tail)))
            document = head + tail[:to] + middle + tail[to:]
        elif what == "cut":
            document = head
    return document


class Raw(str):
    """Json text that stands in a tree as it is."""


class Object(list):
    """A json object as [key, value] lists: in order, and a key twice if need be."""


class Array(list):
    """A json array as [None, value] lists."""


def tree_of(value: Any) -> Any:
    if isinstance(value, Object):
        return Object([key, tree_of(inner)] for key, inner in value)
    return Array([None, tree_of(inner)] for inner in value) if isinstance(value, list) else value


def written(tree: Any) -> str:
    if isinstance(tree, Object):
        return "{" + ",".join(f"{json.dumps(key)}:{written(value)}" for key, value in tree) + "}"
    if isinstance(tree, Array):
        return "[" + ",".join(written(value) for _, value in tree) + "]"
    return tree if isinstance(tree, Raw) else json.dumps(tree)


def places(tree: Array | Object) -> Iterator[tuple[Array | Object, int]]:
    """Every place of a value in the tree: what holds it, and the index there."""
    for index, (_, value) in enumerate(tree):
        yield tree, index
        if isinstance(value, Array | Object):
            yield from places(value)


NUMBERS = ["0", "-0", "-1", "1.0", "1e2", "5e-324", "1e999", "-1e999", "NaN", "Infinity", "2147483648"]
NUMBERS += ["18446744073709551616", "1" + "0" * 400, "1" + "0" * 5000]
ANY_JSON = st.one_of(
    st.sampled_from([*NUMBERS, "null", "true", "false", "{}", '"\\ud800"', '"a\\nb"', "[" * 12_000]),
    st.integers(1, 12_000).map(lambda depth: "[" * depth + "]" * depth),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT),
        lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(ANY_TEXT, inside, max_size=3)),
        max_leaves=4,
    ).map(json.dumps),
).map(Raw)


@st.composite
def near(draw, value: Any) -> Any:
    """A value like `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + draw(st.sampled_from([-1, 1, value, -2 * value, 0.5]))
    if isinstance(value, str):
        place = draw(st.integers(0, len(value)))
        return value[:place] + draw(ANY_TEXT) + value[place + draw(st.integers(0, 1)) :]
    return draw(ANY_JSON)


@st.composite
def altered(draw, document: bytes) -> bytes:
    """`document`, which is json, with values replaced, copied, lost, doubled, and keys renamed."""
    whole = tree_of([json.loads(document, object_pairs_hook=Object)])
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(whole))
        if not there:
            break
        (holder, index), (other, other_index) = draw(st.sampled_from(there)), draw(st.sampled_from(there))
        (key, value), (other_key, other_value) = holder[index], other[other_index]
        what = draw(st.sampled_from(["any", "near", "copy", "lose", "double", "key"]))
        if what == "lose":
            del holder[index]
        elif what == "double":
            again = draw(st.one_of(st.just(Raw(written(value))), ANY_JSON))
            holder.insert(draw(st.integers(0, len(holder))), [key, again])
        elif what == "key":
            holder[index] = [draw(st.one_of(st.just(other_key or ""), ANY_TEXT)), value]
        elif what == "copy":
            holder[index] = [key, Raw(written(other_value))]
        else:
            holder[index] = [key, draw(near(value) if what == "near" else ANY_JSON)]
    return "".join(written(value) for _, value in whole).encode()


def spoiled(document: bytes) -> st.SearchStrategy[bytes]:
    """A json document, damaged or altered."""
    put = st.one_of(st.binary(max_size=4), ANY_JSON.map(str.encode))
    return st.one_of(altered(document), damaged(document, put))


TOO_DEEP = "[" * 100_000


def replaced(document: bytes, old: str, new: str) -> bytes:
    """`document` with the first `old` in it replaced; all of it, where `old` is empty."""
    assert old.encode() in document
    return document.replace(old.encode(), new.encode(), 1) if old else new.encode()


@contextlib.contextmanager
def standing(path: Path, document: bytes) -> Iterator[None]:
    """`path` with another content, for a while."""
    before = path.read_bytes()
    path.write_bytes(document)
    try:
        yield
    finally:
        path.write_bytes(before)
