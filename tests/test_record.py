"""Marks: what is remembered of how a conversation is sent, and that only what can be is read back."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmchat.errors import SessionError
from mmchat.record import Form, Marks, Usage
from tests.test_context import CUT, make

ids = st.integers(1, 99).map(lambda n: f"img{n}")
numbers = st.integers(1, 99)
forms: st.SearchStrategy[Form] = st.sampled_from(["overview", "described", "line"])
marks = st.builds(
    Marks,
    st.dictionaries(ids, forms),
    st.frozensets(numbers),
    st.frozensets(ids),
    st.frozensets(numbers),
    st.dictionaries(ids, numbers),
)


@given(marks)
def test_marks_survive_json_and_msgpack(some: Marks) -> None:
    assert Marks.from_dict(json.loads(json.dumps(some.to_dict()))) == some
    assert Marks.from_dict(msgpack.unpackb(msgpack.packb(some.to_dict()))) == some
    assert Marks.from_dict({**some.to_dict(), "of a later version": 1}) == some


def test_marks_that_are_missing_are_none() -> None:
    assert Marks.from_dict({}) == Marks()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(Marks().to_dict())), json_values))
def test_other_values_are_refused_or_harmless(values: dict[str, Any]) -> None:
    try:
        read = Marks.from_dict(values)
    except SessionError:
        return
    assert Marks.from_dict(read.to_dict()) == read


@pytest.mark.parametrize(
    "values",
    [
        {"forms": {"img1": "huge"}},
        {"forms": {"../etc": "line"}},
        {"forms": []},
        {"dropped": [True]},
        {"dropped": ["1"]},
        {"pinned": "img1"},
        {"pinned_turns": [-1]},
        {"returned": {"img1": 2**40}},
    ],
)
def test_a_saved_value_that_cannot_be_is_named(values: Any) -> None:
    with pytest.raises(SessionError, match=next(iter(values))):
        Marks.from_dict(values)


def test_marks_of_fewer_turns_are_about_these_alone() -> None:
    turns = make([CUT, "a"], [CUT, "b"], ["c"], [CUT, "d"])
    all_of_them = Marks(
        {"img1": "line", "img3": "overview"},
        frozenset({1, 3}),
        frozenset({"img2", "img3"}),
        frozenset({2, 4}),
        {"img1": 4, "img3": 4},
    )
    assert all_of_them.of(turns) == all_of_them
    assert all_of_them.of(turns[:2]) == Marks(
        {"img1": "line"}, frozenset({1}), frozenset({"img2"}), frozenset({2}), {"img1": 3}
    )
    assert all_of_them.of([]) == Marks()


def test_usage_adds_up() -> None:
    assert Usage(n_new=1, encode_s=0.5) + Usage(n_new=2, total_s=1.0) == Usage(n_new=3, encode_s=0.5, total_s=1.0)
