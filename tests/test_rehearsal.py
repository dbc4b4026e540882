"""What hysteresis saves, counted on conversations of sizes alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat.bench.rehearsal import Rehearsal, Said, curves, run
from mmchat.bench.rehearsal import pictures_and_short_answers as chat
from mmchat.context import Policy

BOARD = {"cap": 4096, "max_new_tokens": 512}


def test_nothing_is_computed_twice_where_everything_fits() -> None:
    result = run(chat(30, 20), cap=20_000, max_new_tokens=512)
    assert (result.ratio, result.n_trims, len(result.turns)) == (1.0, 0, 30)


def test_keeping_half_of_the_cap_computes_at_most_twice_as_much_and_the_minimum_far_more() -> None:
    """30 turns, 20 pictures.  The less a trim leaves, the less is computed twice; and the more is forgotten."""
    script = chat(30, 20)
    curve = {keep: run(script, **BOARD, policy=Policy(keep=keep)) for keep in (0.3, 0.5, 0.7, 1.0)}
    assert all(len(result.turns) == 30 for result in curve.values())
    assert curve[0.5].ratio <= 2.0
    assert curve[0.5].kept >= BOARD["cap"] / 2
    ratios = [result.ratio for result in curve.values()]
    assert ratios == sorted(ratios)
    assert curve[1.0].ratio > 1.5 * curve[0.5].ratio
    assert curve[1.0].n_trims > 2 * curve[0.5].n_trims


def test_keeping_half_is_better_than_the_minimum_in_each_recorded_conversation() -> None:
    """Long answers in text alone are trimmed often, whatever a trim keeps."""
    found = curves((1.0, 0.5))
    for least, half in zip(found[::2], found[1::2], strict=True):
        assert (least["name"], least["keep"], half["keep"]) == (half["name"], 1.0, 0.5)
        assert half["trims"] < least["trims"]
        assert half["kept_least"] >= 0.5
        assert half["rows_ratio"] == half["rows_prefilled"] / half["rows_new"] < 0.7 * least["rows_ratio"]
        assert half["rows_new"] == least["rows_new"] or least["name"].startswith("30 turns")
    assert len({one["name"] for one in found}) == 2


def test_a_trim_is_not_followed_by_another_at_once() -> None:
    for policy in (None, Policy(("turns",)), Policy(("overview", "turns"))):
        changes = [turn.changes for turn in run(chat(120, 30), **BOARD, policy=policy).turns]
        trims = [number for number, n in enumerate(changes) if n]
        assert len(trims) > 2
        assert all(after - before > 2 for before, after in itertools.pairwise(trims))


def test_what_cannot_fit_ends_it() -> None:
    result = run([Said(10, 10), Said(200, 10), Said(10, 10)], cap=150, max_new_tokens=20)
    assert (len(result.turns), result.is_refused) == (1, True)
    assert run([Said(30, 30)] * 9, cap=300, max_new_tokens=20, policy=Policy.of("error")).is_refused


said = st.builds(Said, st.integers(0, 60), st.integers(0, 60), st.lists(st.integers(1, 6), max_size=2).map(tuple))


@settings(max_examples=30)
@given(st.lists(said, max_size=15), st.integers(100, 900), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_counts_add_up(script: list[Said], cap: int, keep: float) -> None:
    result: Rehearsal = run(script, cap=cap, max_new_tokens=40, policy=Policy(keep=keep), query_num=16)
    assert result.is_refused == (len(result.turns) < len(script))
    for number, turn in enumerate(result.turns):
        assert turn.rows + 40 <= cap
        assert turn.new <= turn.rows
        assert turn.prefilled <= turn.rows
        if not turn.changes:
            assert turn.prefilled == turn.new
            assert number or turn.new == turn.rows
    if not result.n_trims:
        assert result.ratio == pytest.approx(1.0) or not result.turns
