"""What fits and what goes: properties over any record, then the ladder step by step."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmchat.cli.terminal import describe_changes
from mmchat.context import Conversation, Fitted, Policy, Step, as_sent, fit, mentions, told
from mmchat.errors import ContextFull, SessionError
from mmchat.model_dir import open_model
from mmchat.prompt import ChatTokenizer, Message, Picture, RowCounter, Text, picture_rows, render
from mmchat.record import SEEN, Form, ImageHandle, Marks, Turn, Usage, images_in
from mmchat.slicing import Size, plan_slices

SPEC = open_model("demo")
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)
QUERY_NUM = SPEC.vision.query_num
COUNTER = RowCounter(TOKENIZER, query_num=QUERY_NUM)
AS_SAID = Marks()
SYSTEM = Message("system", (Text("Be brief."),))
UNCUT, CUT, LARGE = (100, 80), (200, 150), (400, 330)


def picture(number: int, turn: int, size: Size = CUT) -> ImageHandle:
    plan = plan_slices(*size, scale_resolution=SPEC.slices.scale_resolution)
    keys = tuple(f"{number}/{i}" for i in range(plan.n_inputs))
    rows = plan.n_inputs * QUERY_NUM
    return ImageHandle(f"img{number}", size, plan.n_inputs, rows, turn, plan=plan, keys=keys, pixels=list)


def make(*asked: Sequence[str | Size], answers: Sequence[str] = ()) -> list[Turn]:
    """Turns of texts and pictures; a turn's answer is "Yes." unless there is another."""
    turns: list[Turn] = []
    n_images = 0
    for number, said in enumerate(asked, 1):
        parts: list[str | ImageHandle] = []
        for part in said:
            if isinstance(part, str):
                parts.append(part)
            else:
                n_images += 1
                parts.append(picture(n_images, number, part))
        text = answers[number - 1] if number <= len(answers) else "Yes."
        turns.append(Turn(tuple(parts), text, tuple(TOKENIZER.encode(text)), "stop", Usage()))
    return turns


def rows_of(conversation: Conversation, marks: Marks = AS_SAID) -> int:
    """By laying the prompt out, as the session does."""
    return render(conversation.messages(marks), TOKENIZER, query_num=QUERY_NUM).n_rows


# Properties

sizes = st.sampled_from([UNCUT, UNCUT, CUT, LARGE])
texts = st.sampled_from(["What?", "Is @img1 like @img2?", "@img3", "Why not? " * 6, "@img99 and @img1", "見て 😀"])
asked = st.lists(st.one_of(texts, sizes), min_size=1, max_size=3).map(lambda parts: [*parts, "So?"])
answers = st.sampled_from(["Yes.", "It is a red circle on a blue background. " * 4, "No, @img1 is not.", ""])


@st.composite
def records(draw: Any) -> tuple[Conversation, Marks]:
    said = draw(st.lists(asked, max_size=7))
    turns = make(*said, answers=draw(st.lists(answers, min_size=len(said), max_size=len(said))))
    n_images = sum(len(turn.images) for turn in turns)
    question: list[str | ImageHandle] = []
    for part in draw(asked):
        n_images += not isinstance(part, str)
        question.append(part if isinstance(part, str) else picture(n_images, len(turns) + 1, part))
    ids = [image.id for turn in turns for image in turn.images]
    numbers = range(1, len(turns) + 1)
    some_ids = st.sets(st.sampled_from(ids)) if ids else st.just(set[str]())
    some_turns = st.sets(st.sampled_from(numbers)) if turns else st.just(set[int]())
    forms: st.SearchStrategy[Form] = st.sampled_from(["overview", "described", "line"])
    marks = Marks(
        {name: draw(forms) for name in draw(some_ids)},
        frozenset(draw(some_turns)),
        frozenset(draw(some_ids)),
        frozenset(draw(some_turns)),
        {name: draw(st.integers(1, len(turns))) for name in draw(some_ids)},
    )
    return Conversation(SYSTEM, turns, question), marks


policies = st.builds(
    Policy,
    st.permutations(["overview", "line", "turns"]).flatmap(
        lambda steps: st.integers(0, 3).map(lambda n: tuple(steps[:n]))
    ),
    st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    st.sampled_from([0.0, 0.25, 0.6]),
)
caps = st.integers(40, 1500)
reserves = st.sampled_from([1, 16, 60, 200])


def fitted(record: tuple[Conversation, Marks], cap: int, reserve: int, policy: Policy) -> Fitted | ContextFull:
    try:
        return fit(*record, COUNTER, cap=cap, max_new_tokens=reserve, policy=policy)
    except ContextFull as error:
        return error


@given(records())
def test_rows_are_counted_as_the_prompt_is_laid_out(record: tuple[Conversation, Marks]) -> None:
    conversation, marks = record
    assert conversation.rows(marks, COUNTER) == rows_of(conversation, marks)
    pieces = render(conversation.messages(marks), TOKENIZER, query_num=QUERY_NUM).pieces
    assert sum(piece.n_rows for piece in pieces) == rows_of(conversation, marks)


@given(records(), caps, reserves, policies)
def test_never_over_the_cap(record: tuple[Conversation, Marks], cap: int, reserve: int, policy: Policy) -> None:
    """Whatever the record, either it fits, or it is refused with numbers that do not, and what to do."""
    result = fitted(record, cap, reserve, policy)
    if isinstance(result, ContextFull):
        assert result.n_prompt + result.max_new_tokens > result.limit == cap
        assert result.max_new_tokens == reserve
        assert str(cap) in str(result)
        assert "shorten" in str(result) if policy.steps else "another policy" in str(result)
    else:
        assert rows_of(record[0], result.marks) == result.rows <= cap - reserve


@given(records(), caps, reserves, policies)
def test_a_plan_is_the_same_again_and_stays(
    record: tuple[Conversation, Marks], cap: int, reserve: int, policy: Policy
) -> None:
    result = fitted(record, cap, reserve, policy)
    assume(isinstance(result, Fitted))
    assert isinstance(result, Fitted)
    assert fitted(record, cap, reserve, policy) == result
    again = fitted((record[0], result.marks), cap, reserve, policy)
    assert again == Fitted(result.marks, (), result.rows)


@given(records(), caps, reserves, policies)
def test_what_must_stay_stays(record: tuple[Conversation, Marks], cap: int, reserve: int, policy: Policy) -> None:
    (conversation, before), result = record, fitted(record, cap, reserve, policy)
    assume(isinstance(result, Fitted))
    assert isinstance(result, Fitted)
    after = result.marks
    assert (after.pinned, after.pinned_turns, after.returned) == (before.pinned, before.pinned_turns, before.returned)
    messages = conversation.messages(after)
    assert messages[0] == SYSTEM
    newest = images_in(conversation.question)
    assert [part for part in messages[-1].parts if isinstance(part, Picture)] == [as_sent(i, "whole") for i in newest]
    for number, turn in enumerate(conversation.turns, 1):
        if number in before.dropped:
            assert number in after.dropped
        elif number in before.pinned_turns or any(image.id in before.pinned for image in turn.images):
            assert number not in after.dropped
        for image in turn.images:
            if image.id in before.pinned or number in before.pinned_turns:
                assert after.form(image) == before.form(image)


@given(records(), caps, reserves, policies)
def test_nothing_is_degraded_without_need_nor_twice(
    record: tuple[Conversation, Marks], cap: int, reserve: int, policy: Policy
) -> None:
    (conversation, before), result = record, fitted(record, cap, reserve, policy)
    assume(isinstance(result, Fitted))
    assert isinstance(result, Fitted)
    fits = rows_of(conversation, before) + reserve <= cap
    assert fits == (not result.changes)
    forms, dropped = dict(before.forms), set(before.dropped)
    order: list[Form] = ["whole", "overview", "described", "line"]
    for change in result.changes:
        if change.form == "dropped":
            number = int(change.what.removeprefix("turn "))
            assert number not in dropped
            dropped.add(number)
        else:
            assert order.index(change.form) > order.index(forms.get(change.what, "whole"))
            assert forms.get(change.what, "whole") in SEEN
            forms[change.what] = change.form
    assert (forms, dropped) == (dict(result.marks.forms), set(result.marks.dropped))


@given(records(), caps, reserves, policies)
def test_a_trim_keeps_what_it_promises(
    record: tuple[Conversation, Marks], cap: int, reserve: int, policy: Policy
) -> None:
    """At least `keep` of the cap, unless only less than that fits; and the minimum with keep=1."""
    result = fitted(record, cap, reserve, policy)
    minimum = fitted(record, cap, reserve, Policy(policy.steps, 1.0, policy.recent))
    assert isinstance(result, ContextFull) == isinstance(minimum, ContextFull)
    if isinstance(result, Fitted) and isinstance(minimum, Fitted) and result.changes:
        assert result.rows >= policy.keep * cap or result == minimum
        assert result.changes[: len(minimum.changes)] == minimum.changes


@given(records(), caps, reserves, reserves, policies)
def test_more_room_for_the_answer_never_leaves_more_of_the_conversation(
    record: tuple[Conversation, Marks], cap: int, one: int, two: int, policy: Policy
) -> None:
    roomy, tight = fitted(record, cap, min(one, two), policy), fitted(record, cap, max(one, two), policy)
    if isinstance(roomy, ContextFull):
        assert isinstance(tight, ContextFull)
    elif isinstance(tight, Fitted):
        assert tight.rows <= roomy.rows
        assert tight.changes[: len(roomy.changes)] == roomy.changes


# The ladder


def trimmed(
    conversation: Conversation, cap: int, *steps: Step, marks: Marks = AS_SAID, keep: float = 1.0, recent: float = 0.0
) -> list[str]:
    """What goes where room for one token is kept; the minimum, unless told otherwise."""
    policy = Policy(steps or Policy().steps, keep, recent)
    return [
        str(change) for change in fit(conversation, marks, COUNTER, cap=cap, max_new_tokens=1, policy=policy).changes
    ]


THREE = make([CUT, "What?"], [LARGE, "And?"], ["So?"], [CUT, "Why?"])
TALK = Conversation(SYSTEM, THREE, ("Now?",))
ALL = rows_of(TALK)
IDS = ("img1", "img2", "img3")


def test_the_default_ladder_goes_from_the_oldest_to_the_newest_step_by_step() -> None:
    """On the demo model a view is about as short as the line, so no picture becomes one."""
    assert trimmed(TALK, ALL + 1) == []
    assert trimmed(TALK, ALL) == ["img1 is sent without its cells"]
    least = fit(TALK, Marks(), COUNTER, cap=60, max_new_tokens=1, policy=Policy(recent=0.0))
    assert [str(change) for change in least.changes] == [
        "img1 is sent without its cells",
        "img2 is sent without its cells",
        "img3 is sent without its cells",
        "turn 1 is not sent any more",
        "turn 2 is not sent any more",
        "turn 3 is not sent any more",
        "turn 4 is not sent any more",
    ]


def test_what_is_told_is_what_came_of_it() -> None:
    """A picture that lost its cells on the way and went with its turn is told once, and every picture that went is."""
    least = fit(TALK, Marks(), COUNTER, cap=60, max_new_tokens=1, policy=Policy(recent=0.0))
    changes = told(TALK, least)
    turns = [f"turn {number}" for number in sorted(least.marks.dropped)]
    assert [str(change) for change in changes] == [f"{name} is not sent any more" for name in (*turns, *IDS)]
    assert describe_changes(changes) == "turns 1, 2, 3, 4 with img1, img2, img3: not sent any more"
    some = fit(TALK, Marks(), COUNTER, cap=ALL, max_new_tokens=1, policy=Policy(("overview", "turns"), 1.0))
    assert describe_changes(told(TALK, some)) == "img1: sent without cells"
    one = fit(TALK, Marks(), COUNTER, cap=ALL, max_new_tokens=1, policy=Policy.of("turns"))
    assert describe_changes(told(TALK, one)) == "turn 1 with img1: not sent any more"


def test_steps_are_taken_in_the_users_order_and_no_others() -> None:
    assert trimmed(TALK, ALL, "turns") == ["turn 1 is not sent any more"]
    assert trimmed(TALK, ALL, "line", "turns") == ["img1 is sent as a line of text, with its description"]
    with pytest.raises(ContextFull, match=r"policy overview, 0 pinned"):
        trimmed(TALK, 100, "overview")
    with pytest.raises(ContextFull, match='another policy than "error"'):
        fit(TALK, Marks(), COUNTER, cap=ALL, max_new_tokens=1, policy=Policy.of("error"))


def test_the_newest_turns_are_spared_while_something_older_can_go() -> None:
    """The last picture keeps its cells though the first turn must then go."""
    assert trimmed(TALK, 200)[-1] == "img3 is sent without its cells"
    assert trimmed(TALK, 200, recent=0.9) == [
        "img1 is sent without its cells",
        "img2 is sent without its cells",
        "turn 1 is not sent any more",
    ]


def test_a_trim_goes_on_to_half_of_the_cap() -> None:
    said: list[list[str | Size]] = [[CUT, "What?"]] * 6
    talk = Conversation(SYSTEM, make(*said), ("Now?",))
    rows = rows_of(talk)
    result = fit(talk, AS_SAID, COUNTER, cap=rows, max_new_tokens=1, policy=Policy())
    assert rows / 2 <= result.rows < rows / 2 + 5 * QUERY_NUM
    assert len(trimmed(talk, rows)) == 1 < len(result.changes)


def test_what_is_pinned_stays_and_its_turn_too() -> None:
    gone = trimmed(TALK, ALL - 10, marks=Marks(pinned=frozenset({"img1"})))
    assert gone == ["img2 is sent without its cells"]
    gone = trimmed(TALK, ALL - 10, "turns", marks=Marks(pinned=frozenset({"img1"}), pinned_turns=frozenset({2})))
    assert gone == ["turn 3 is not sent any more"]
    with pytest.raises(ContextFull, match=r"2 pinned.*unpin some"):
        trimmed(TALK, 150, marks=Marks(pinned=frozenset({"img1"}), pinned_turns=frozenset({2})))


def test_a_picture_that_came_back_is_not_the_first_to_go_again() -> None:
    assert trimmed(TALK, ALL, marks=Marks(returned={"img1": 5}))[0] == "img2 is sent without its cells"
    gone = trimmed(TALK, 200, "turns", marks=Marks(returned={"img1": 5}))
    assert gone[0] == "turn 2 is not sent any more"


def test_a_picture_that_the_question_names_goes_last() -> None:
    talk = Conversation(SYSTEM, THREE, ("And in @img1?",))
    assert trimmed(talk, rows_of(talk)) == ["img2 is sent without its cells"]
    gone = trimmed(talk, 160)
    assert "img1 is sent without its cells" not in gone
    assert "turn 1 is not sent any more" not in gone


def test_a_prompt_is_no_longer_than_is_known_to_be_safe() -> None:
    result = fit(TALK, Marks(), COUNTER, cap=10_000, max_new_tokens=500, policy=Policy(), longest=ALL - 1)
    assert result.changes
    assert result.rows < ALL
    with pytest.raises(ContextFull) as caught:
        fit(TALK, Marks(), COUNTER, cap=10_000, max_new_tokens=500, policy=Policy(), longest=20)
    assert (caught.value.max_new_tokens, caught.value.limit) == (0, 20)


# Forms


def test_an_overview_is_what_the_template_gives_for_a_picture_that_is_not_cut() -> None:
    cut, uncut = picture(1, 1, CUT), picture(1, 1, UNCUT)
    (overview,) = (part for part in [as_sent(cut, "overview")] if isinstance(part, Picture))
    assert overview.plan.source == cut.plan.source
    assert overview.keys == cut.keys[:1]
    sent = [render([Message("user", (part, Text("?")))], TOKENIZER, query_num=QUERY_NUM) for part in
            (overview, Picture(uncut.plan, overview.keys))]  # fmt: skip
    assert sent[0] == sent[1]
    assert picture_rows(overview.plan, TOKENIZER, QUERY_NUM) == picture_rows(uncut.plan, TOKENIZER, QUERY_NUM)


def test_a_line_names_the_picture_its_size_and_what_the_model_said() -> None:
    turns = make([CUT, "What?"], answers=["A red\ncircle."])
    talk = Conversation(SYSTEM, turns, ("Now?",))
    for form, line in (
        ("described", "[img1: 200x150 picture, described as: A red circle.]"),
        ("line", "[img1: 200x150 picture, not shown]"),
    ):
        assert talk.messages(Marks({"img1": form}))[1].parts[0] == Text(line)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("said", "answer", "description"),
    [
        ([CUT, "?"], "A circle.", "A circle."),
        ([CUT, CUT, "?"], "Two circles.", ""),  # of which?
        ([CUT, "?"], "", ""),
        ([CUT, "?"], "circle " * 30, "circle " * 14 + "..."),
    ],
)
def test_a_description_is_the_answer_about_a_picture_alone(said: list[Any], answer: str, description: str) -> None:
    talk = Conversation(SYSTEM, make(said, answers=[answer]))
    (line, *_) = talk.messages(Marks({"img1": "described"}))[1].parts
    assert isinstance(line, Text)
    assert line.text == f"[img1: 200x150 picture, {f'described as: {description}' if description else 'not shown'}]"


def test_a_picture_becomes_a_line_only_where_that_saves_rows_and_with_a_description_only_where_it_still_does() -> None:
    long = make([CUT, "What?"], answers=["circle " * 14])
    short = make([CUT, "What?"], answers=["Red."])
    tiny = make([UNCUT, "What?"])
    for turns, query_num, form in ((long, 40, "line"), (short, 40, "described"), (tiny, QUERY_NUM, None)):
        counter = RowCounter(TOKENIZER, query_num=query_num)
        talk, marks = Conversation(SYSTEM, turns, ("Now?",)), Marks({"img1": "overview"})
        policy, cap = Policy(("line",), 1.0, 0.0), talk.rows(marks, counter)
        try:
            result = fit(talk, marks, counter, cap=cap, max_new_tokens=1, policy=policy)
        except ContextFull:
            assert form is None
        else:
            assert [change.form for change in result.changes] == [form]


# Names


def test_a_mention_is_the_number_of_the_picture_as_it_is_sent() -> None:
    turns = make([UNCUT, "Is @img1 red?"], [UNCUT, "Is @img2 like @img1?"], ["And @img3, or @img1?"], [UNCUT, "@img3!"])
    talk = Conversation(SYSTEM, turns, ("Compare @img2, @img3 (not @img4).",))

    def said(marks: Marks) -> list[str]:
        texts = [part.text for message in talk.messages(marks)[1:] for part in message.parts if isinstance(part, Text)]
        return [text for text in texts if not text.startswith("[img")]

    assert said(Marks()) == [
        "Is image 1 red?",
        "Is image 2 like image 1?",
        "And @img3, or image 1?",  # there was no img3 yet, and what was sent stays
        "image 3!",
        "Compare image 2, image 3 (not @img4).",
    ]
    assert talk.numbers(Marks()) == {"img1": 1, "img2": 2, "img3": 3}
    line = Marks({"img1": "line"})
    assert said(line)[1] == "Is image 1 like img1?"
    assert said(line)[-1] == "Compare image 1, image 2 (not @img4)."
    dropped = Marks(dropped=frozenset({1}))
    assert said(dropped) == [
        "Is image 1 like img1?", "And @img3, or img1?", "image 2!", "Compare image 1, image 2 (not @img4).",
    ]  # fmt: skip
    assert talk.numbers(dropped) == {"img2": 1, "img3": 2}


def test_image_ids_count_the_pictures_that_are_sent() -> None:
    turns = make([UNCUT, "1"], [UNCUT, "2"], [UNCUT, "3"])
    for marks, n_seen in ((Marks(), 3), (Marks({"img2": "line"}), 2), (Marks({}, frozenset({1})), 2)):
        ids = render(Conversation(SYSTEM, turns, ("?",)).messages(marks), TOKENIZER, query_num=QUERY_NUM).ids
        begin, end = TOKENIZER.special["<image_id>"], TOKENIZER.special["</image_id>"]
        starts = [i for i, number in enumerate(ids) if number == begin]
        assert [ids[i + 1 : i + 3] for i in starts] == [[*TOKENIZER.encode(str(n)), end] for n in range(n_seen)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("@img2 and @img10, @img2", ["img2", "img10"]),
        ("(@img1)", ["img1"]),
        ("me@img1.com @img1x @img01 @img @img0 @@img1 img1", []),
        ("看一下@img1的颜色，@img2の色は？", ["img1", "img2"]),
        ("@img3은 무엇입니까, เทียบ@img4กับ", ["img3", "img4"]),
        ("é@img1 @img2é я@img3", []),
        (unicodedata.normalize("NFD", "@img3은"), ["img3"]),
    ],
)
def test_what_is_a_mention(text: str, names: list[str]) -> None:
    assert mentions([text]) == names


# Policies


def test_policies_as_users_write_them() -> None:
    assert Policy.of(None) == Policy() == Policy.of("overview,line,turns") == Policy.of(["overview", "line", "turns"])
    assert Policy.of("turns, overview").steps == ("turns", "overview")
    assert Policy.of("error").steps == ()
    assert str(Policy.of("error")) == "error"
    assert str(Policy.of(Policy(("turns",)))) == "turns"


@pytest.mark.parametrize("policy", ["", "cells", "turns,turns", "error,turns", ["drop"], [1], [[1]], 5, {"a": 1}])
def test_other_policies_are_refused(policy: Any) -> None:
    with pytest.raises(SessionError, match='it must be "error" or some of overview, line, turns'):
        Policy.of(policy)


@pytest.mark.parametrize("steps", [None, 5, ("drop",), ([],)])
def test_steps_are_known_ones(steps: Any) -> None:
    with pytest.raises(SessionError, match='it must be "error" or some of overview, line, turns'):
        Policy(steps)


@pytest.mark.parametrize("values", [{"keep": 1.5}, {"recent": -0.1}, {"keep": "half"}, {"keep": True}])
def test_parts_of_the_cap_are_from_0_to_1(values: Any) -> None:
    with pytest.raises(SessionError, match="it must be from 0 to 1"):
        Policy(**values)
