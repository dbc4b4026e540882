"""What a plan says of time, and what an engine is expected to have."""

from __future__ import annotations

import json
from threading import Thread

import pytest

from mmchat.context import Conversation, Policy, fit
from mmchat.engine import ImageRows, Tokens
from mmchat.forecast import (
    PUBLISHED_RK3588,
    Outlook,
    Speed,
    make_plan,
    measured,
    measured_before,
    of_board,
    predict,
    published,
)
from mmchat.record import Marks, Usage
from tests.test_context import COUNTER, CUT, SYSTEM, make, picture

SPEED = Speed(0.5, "a stopwatch")


def test_seconds_are_work_times_speed() -> None:
    seconds = predict({"encode": Speed(2.0, "a"), "prefill": Speed(0.01, "b"), "generate": Speed(0.2, "a")}, 3, 100)
    assert (seconds.encode, seconds.prefill, seconds.token) == (6.0, 1.0, 0.2)
    assert seconds.first_token == 7.0
    assert seconds.sources == ("a", "b")


def test_what_is_not_known_is_not_said() -> None:
    seconds = predict({}, 3, 100)
    assert (seconds.encode, seconds.prefill, seconds.token, seconds.first_token) == (None, None, None, None)
    nothing_to_encode = predict({"prefill": SPEED}, 0, 10)
    assert (nothing_to_encode.encode, nothing_to_encode.first_token) == (0.0, 5.0)
    assert nothing_to_encode.sources == ("a stopwatch",)


def test_speeds_are_what_was_spent_per_piece_of_work() -> None:
    usage = Usage(slices_encoded=4, encode_s=2.0, n_prefilled=100, prefill_s=1.0)
    assert measured(usage) == {
        "encode": Speed(0.5, "measured in this run"),
        "prefill": Speed(0.01, "measured in this run"),
    }
    assert measured(Usage()) == {}
    before = measured_before([usage, Usage(n_prefilled=100, prefill_s=2.0)])
    assert before["prefill"] == Speed(0.015, "measured in this conversation before")
    damaged = Usage(slices_encoded=1, encode_s=1e308, n_prefilled=int(1e308), prefill_s=1.0)
    assert measured_before([damaged, damaged]) == {}


def test_what_was_spent_serves_all_sessions_and_no_thread_loses_any() -> None:
    outlook = Outlook(speeds=lambda: of_board(None, None, 4.0), published=True)
    usage = Usage(n_prefilled=10, prefill_s=1.0, n_new=1, generate_s=9.0)

    def spend() -> None:
        for _ in range(50):
            outlook.spend(usage)

    threads = [Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (outlook._spent.n_prefilled, outlook._spent.prefill_s) == (2000, 200.0)
    speeds = outlook.speeds({"prefill": SPEED, "encode": SPEED})
    assert speeds["prefill"] == Speed(0.1, "measured in this run")
    assert (speeds["encode"], speeds["generate"].source) == (SPEED, "measured by mmchat calibrate")


def test_a_saved_conversation_says_whose_turns_were_measured() -> None:
    mine, other, unknown = Outlook(made_by=lambda: "me"), Outlook(made_by=lambda: "you"), Outlook()
    assert mine.n_foreign(mine.note(2), 5) == 2
    assert mine.n_foreign(other.note(2), 5) == 5
    assert (unknown.note(0), unknown.n_foreign({}, 5), unknown.n_foreign({"measured": {"by": ""}}, 5)) == ({}, 5, 5)
    for noted in (None, 7, {}, {"by": "me"}, *({"by": "me", "after": after} for after in (-1, True, "0", 9))):
        assert mine.n_foreign({"measured": noted}, 5) == 5


def test_measured_speeds_go_before_published_ones_and_both_say_what_they_are() -> None:
    board = of_board(None, 50.0, 4.0)
    outlook = Outlook(speeds=lambda: board, published=True)
    speeds = outlook.speeds({"encode": SPEED, "prefill": SPEED})
    assert speeds["prefill"] == Speed(0.02, "measured by mmchat calibrate")
    assert speeds["generate"] == Speed(0.25, "measured by mmchat calibrate")
    assert speeds["encode"] == SPEED
    assert outlook.speeds({})["encode"] == published()["encode"]
    assert "not measured here" in published()["encode"].source
    assert published()["encode"].seconds == PUBLISHED_RK3588["encode"] == 3.27
    assert Outlook().speeds({}) == {}


def test_a_board_that_was_not_measured_has_no_speeds() -> None:
    assert of_board(None, None, None) == {}
    assert set(of_board(3.2, None, None)) == {"encode"}


FIRST = (Tokens((1, 2, 3)), ImageRows("a", 2), Tokens((4,)))
LONGER = (*FIRST[:2], Tokens((4, 7, 8, 9, 10)))  # with the answer 7, 8
OTHER = (Tokens((1, 2, 3)), ImageRows("b", 2), Tokens((4, 5)))


@pytest.mark.parametrize(
    ("strategy", "rewinds", "reused"),
    [
        ("rewind", True, (8, 3, 5)),
        ("resend", False, (0, 0, 0)),
        ("append", False, (8, 0, 0)),
        ("prefix", False, (8, 0, 0)),
        ("prefix", True, (8, 3, 5)),
    ],
)
def test_what_an_engine_should_still_have(strategy: str, rewinds: bool, reused: tuple[int, int, int]) -> None:
    outlook = Outlook(lambda: strategy, rewinds=lambda: rewinds)
    assert outlook.reused(FIRST) == 0
    outlook.sent(FIRST, 6, (7, 8))
    assert (outlook.reused(LONGER), outlook.reused(OTHER), outlook.reused(FIRST)) == reused
    outlook.sent(FIRST, 4, ())  # cancelled while it was prefilled
    assert outlook.reused(LONGER) == (4 if strategy != "resend" else 0)
    outlook.lost()
    assert outlook.reused(LONGER) == 0


def test_an_engine_with_several_caches_keeps_several_conversations() -> None:
    """The one that was used last makes no difference; a third displaces the one that was not used for longest."""
    one, two, three = ([Tokens(tuple(range(n, n + 20)))] for n in (100, 200, 300))
    outlook = Outlook(n_caches=2)
    for pieces in (one, two):
        outlook.asked()
        assert outlook.reused(one) == 0  # until it has told
        outlook.sent(pieces, 20, ())
    assert (outlook.reused(one), outlook.reused(two), outlook.reused(three)) == (19, 19, 0)
    outlook.asked()
    outlook.sent(three, 20, ())
    assert (outlook.reused(one), outlook.reused(two), outlook.reused(three)) == (0, 19, 19)
    outlook.asked()
    outlook.lost()  # the worker died meanwhile, and another has answered
    outlook.sent(two, 20, ())
    assert (outlook.reused(two), outlook.reused(three)) == (19, 0)


def test_the_longest_safe_prompt_is_no_bound_where_prompts_are_sent_in_parts() -> None:
    assert Outlook(lambda: "resend", longest=lambda: 700).longest == 700
    assert Outlook(lambda: "append", longest=lambda: 700).longest is None
    assert Outlook().longest is None


def test_a_plan_names_everything_and_goes_through_json() -> None:
    turns = make([CUT, "One?"], [CUT, "Two?"], [CUT, "Three?"])
    talk = Conversation(SYSTEM, turns, (picture(4, 4, CUT), "Is it like @img1, @img2 or @img9?"))
    cap = talk.rows(Marks(), COUNTER)
    marks = Marks({"img2": "line"}, frozenset({1}))
    fitted = fit(talk, marks, COUNTER, cap=cap - 150, max_new_tokens=8, policy=Policy())
    plan = make_plan(talk, fitted, 8, cap - 150, 20, 5, {"prefill": SPEED})
    assert (plan.rows, plan.rows_reused, plan.rows_new) == (fitted.rows, 20, fitted.rows - 20)
    assert [(image.id, image.form, image.number) for image in plan.images] == [
        ("img1", "dropped", None),
        ("img2", "line", None),
        ("img3", plan.marks.form(turns[2].images[0]), 1),
        ("img4", "whole", 2),
    ]
    assert plan.dropped == (1,)
    assert plan.unseen == ("img1", "img2", "img9")
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["seconds"]["prefill"] == 0.5 * plan.rows_new
    assert told["seconds"]["first_token"] is None
    assert "marks" not in told
    assert [image["id"] for image in told["images"]] == ["img1", "img2", "img3", "img4"]
