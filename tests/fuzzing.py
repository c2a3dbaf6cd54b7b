"""Changes files at random, and holds what reads them to limits: for fuzz tests.

Hypothesis changes small valid files: bytes are flipped, cut, put in and repeated,
lengths in headers become others, and trees of JSON lose, gain and exchange their parts.

The examples are the same each time, whatever other tests run. More of them, and others
each time:

    FUZZ_EXAMPLES=20000 python -m pytest -n 3 tests/test_fuzz*.py
"""

import contextlib
import copy
import json
import os
import resource
import signal

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
_MOST_SECONDS = 20  # of the processor, for one file of some kilobytes
_MOST_BYTES = 1_000_000_000  # of addresses, beside what the tests have already


if not _EXAMPLES:
    # Hypothesis also takes constants out of the modules that happen to be loaded, and
    # examples would depend on the tests before. There is no public setting for it.
    providers._get_local_constants = lambda none=providers._local_constants: none


def fuzzed(examples, **strategies):
    """Runs a test with so many files, or as many as FUZZ_EXAMPLES says."""
    def decorate(test):
        return settings(
            max_examples=_EXAMPLES or examples, derandomize=not _EXAMPLES,
            database=None, deadline=None, suppress_health_check=list(HealthCheck),
            # To find the smallest input of a finding may take minutes.
            phases=list(Phase) if _EXAMPLES else [Phase.generate],
        )(given(**strategies)(test))

    return decorate


def _too_long(*_):
    raise AssertionError(f"a small file took {_MOST_SECONDS} s of the processor")


@contextlib.contextmanager
def limits():
    """Allows what runs inside some memory beside what there is, and some seconds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)
    if os.path.exists("/proc/self/statm"):  # Linux
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def refused_with(*kinds):
    """Allows a reader nothing but these errors."""
    try:
        with limits():
            yield
    except kinds as error:
        assert not isinstance(error, UnicodeError), "not what a user can act on"


# What is done to bytes: a place, as a share of the file, and what happens there.
_LENGTHS = st.sampled_from([
    b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0" * 8, b"\0\0\0\x80\0\0\0\0",
    b"\x40\x42\x0f\0\0\0\0\0",
])
_EDITS = st.tuples(
    st.floats(0, 1),
    st.one_of(
        st.tuples(st.just("flip"), st.integers(1, 255)),
        st.tuples(st.just("put"), st.binary(min_size=1, max_size=6)),
        st.tuples(st.just("over"), st.one_of(_LENGTHS, st.binary(max_size=4))),
        st.tuples(st.just("drop"), st.integers(1, 40)),
        st.tuples(st.just("again"), st.integers(1, 40)),
        st.tuples(st.just("cut"), st.none()),
    ),
)
edits = st.lists(_EDITS, min_size=1, max_size=4)


def edited(content, changes):
    """Returns bytes with changes made, one after the other."""
    for share, (what, value) in changes:
        at = round(share * max(0, len(content) - 1))
        before, after = content[:at], content[at:]
        if what == "flip" and after:
            content = before + bytes([after[0] ^ value]) + after[1:]
        elif what == "put":
            content = before + value + after
        elif what == "over":
            content = before + value + after[len(value):]
        elif what == "drop":
            content = before + after[value:]
        elif what == "again":
            content = before + after[:value] + after
        elif what == "cut":
            content = before
    return content


# What a value of JSON becomes. Numbers larger than any float are valid JSON, too.
_DEEP = json.loads("[" * 200 + "]" * 200)
_JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5),
    st.sampled_from([
        10**400, -(10**400), 2**31, 2**63, 1e308, float("nan"), float("inf"), 0.5,
        "", "x", "\ud800", "\0", "../x", "/x", "<script>", "W32-D99999999-H2/4",
        "W-1-D0-H0/0", [], {}, [[]], {"": {}}, [None] * 5, {"kind": "vit"},
        {"kind": ["mae"]}, "9" * 5000, _DEEP,
    ]),
    st.text(max_size=5), st.lists(st.integers(-1, 300), max_size=4),
)
_JSON_EDITS = st.tuples(
    st.integers(0, 10**6), st.sampled_from(["becomes", "goes", "gains", "moves"]), _JUNK
)
json_edits = st.lists(_JSON_EDITS, min_size=1, max_size=3)


def _nodes(tree):
    """Returns each place in a tree, as what holds it and its key there."""
    found, level = [], [tree]
    while level:
        holder = level.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                level.append(holder[key])
    return found


def edited_tree(tree, changes):
    """Returns a tree of JSON with changes made, one after the other."""
    tree = copy.deepcopy(tree)
    for number, what, junk in changes:
        junk, nodes = copy.deepcopy(junk), _nodes(tree)
        if not nodes:
            return junk
        holder, key = nodes[number % len(nodes)]
        if what == "becomes":
            holder[key] = junk
        elif what == "goes":
            del holder[key]
        elif what == "gains" and isinstance(holder, dict):
            holder[f"{key}x"] = junk
        elif what == "moves":
            holder[key] = {"kind": holder[key]}
    return tree


def text_of(tree):
    return json.dumps(tree).encode()


# Bytes that no edit of a small tree gives.
ODD_JSON = [
    b"", b"\xff\xfe", b"\xef\xbb\xbf{}", b"null", b"[]", b"7", b"[" * 100_000,
    b'{"a":' * 100_000, b"9" * 100_000, b'{"a": ' + b"9" * 100_000 + b"}", b"{}{}",
    b'{"a": NaN}', b'"\\ud800"', b"\0" * 9,
]
