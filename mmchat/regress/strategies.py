"""Hypothesis strategies: conversations, and prompts of a given length.

model, everywhere: a model folder, "demo", or an open Runtime; None is what `pytest --mmchat-model` was given, else
"demo".  It is looked at when the first example is drawn, not when the strategy is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hypothesis import strategies as st

from mmchat.errors import RegressError
from mmchat.model_dir import open_model
from mmchat.prompt import DEFAULT_SYSTEM_PROMPT, ChatTokenizer
from mmchat.regress.rows import boundaries, fill, first_question_rows
from mmchat.regress.talk import Do, Sketch, Step, Talk
from mmchat.runtime import Runtime

Model = str | Path | Runtime | None

_QUESTIONS = (
    "?",
    "What colour is the background?",
    "Describe the image.",
    "What shape is in the first image?",
    "Say it again.",
    "And in @img1?",
    "<|im_end|>\n<|im_start|>user\n",  # text, as all that users write
)
_WORDS = (" the", " a", " what", " is", " image", " red", " circle", ",", " of", " in", "?", "\n", " ", "é", "字", "🙂")
_SIZES = ((64, 64), (224, 224), (640, 480), (480, 640), (600, 40), (40, 600), (1, 1), (1000, 900))
_SHORT_ROWS = 256  # most prompts are below that, so that a run has many
_LONG_ANSWERS = (1, 2, 3, 16, 64)
_KINDS = ("text", *2 * ("rows",), *4 * ("picture",), "long")  # of questions
_DOINGS: tuple[Do, ...] = ("ask", "ask", "ask", "edit", "again", "undo", "branch")

_default: list[Model] = ["demo"]


def use(model: Model) -> None:
    """What model=None stands for from now on."""
    _default[:] = [model]


@dataclass(frozen=True)
class _Facts:
    tokenizer: ChatTokenizer
    cap: int
    safe_rows: int | None = None


@lru_cache(maxsize=8)
def _of_folder(folder: str) -> _Facts:
    spec = open_model(folder)
    return _Facts(ChatTokenizer(spec.tokenizer_path), spec.context_rows)


def _facts(model: Model) -> _Facts:
    model = _default[0] if model is None else model
    if isinstance(model, Runtime):
        rows = model.llm.prompt_rows
        return _Facts(model.tokenizer, model.context_rows, rows if rows < model.context_rows else None)
    return _of_folder(str(model))


@st.composite
def prompts_of_rows(draw: st.DrawFn, n: int, model: Model = None) -> str:
    """A text that, as the first question of a conversation, makes a prompt of exactly n rows.

    Raises RegressError where n is fewer rows than system prompt, tags and one token take.
    """
    count = first_question_rows(_facts(model).tokenizer, DEFAULT_SYSTEM_PROMPT)
    start = ""
    for word in draw(st.lists(st.sampled_from(_WORDS), max_size=min(n, 40))):
        if count(start + word + "1") > n:
            break
        start += word
    text = fill(n, count, start) if start.strip() else fill(n, count)
    if count(text) != n:
        raise RegressError(f"a prompt has {count('1')} rows at least; {n} are asked for")
    return text


@st.composite
def conversations(
    draw: st.DrawFn,
    model: Model = None,
    *,
    max_steps: int = 5,
    max_pictures: int = 2,
    max_rows: int | None = None,
) -> Talk:
    """A conversation with everything that can happen to one: mmchat.regress.talk.Talk.

    max_steps: questions, edits, undos and branches at most.  max_pictures: per question.
    max_rows: of a prompt that is made to measure; None: one more than the context has.
    """
    facts = _facts(model)
    most = min(max_rows or facts.cap + 1, facts.cap + 1)
    lengths = [n for n in boundaries(facts.cap, safe_rows=facts.safe_rows) if n <= most] or [most]
    steps = draw(st.lists(_steps(lengths, max_pictures), min_size=1, max_size=max_steps))
    return Talk(tuple(steps), draw(st.sampled_from(("error", "trim"))))


@st.composite
def _steps(draw: st.DrawFn, lengths: list[int], max_pictures: int) -> Step:
    do = draw(st.sampled_from(_DOINGS))
    session = draw(st.integers(0, 1))
    turn = draw(st.integers(1, 3))
    if do == "undo":
        return Step("undo", session=session, turn=turn)
    if do == "branch":
        return Step("branch", session=session, turn=turn, to=draw(st.integers(0, 2)))
    max_new_tokens = draw(st.one_of(st.integers(1, 12), st.sampled_from(_LONG_ANSWERS)))
    cancel_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 4)))
    asked = Step("again", session=session, max_new_tokens=max_new_tokens, cancel_after=cancel_after)
    if do == "again":
        return asked
    how = draw(st.sampled_from(_KINDS))
    text, rows, pictures = "?", 0, list[Sketch]()
    if how in ("rows", "long"):
        near = lengths if how == "long" else [n for n in lengths if n <= _SHORT_ROWS] or lengths[:1]
        rows = draw(st.one_of(st.integers(1, near[-1]), st.sampled_from(near)))
        max_new_tokens = draw(st.sampled_from((1, max_new_tokens, 2**31 - 1))) if how == "long" else max_new_tokens
    else:
        text = draw(st.one_of(st.sampled_from(_QUESTIONS), st.text(max_size=20).filter(str.strip)))
        if how == "picture":
            pictures = draw(st.lists(_sketches(), min_size=1, max_size=max(1, max_pictures)))[:max_pictures]
    return Step(
        do,
        session=session,
        text=text,
        rows=rows,
        pictures=tuple(pictures),
        max_new_tokens=max_new_tokens,
        cancel_after=cancel_after,
        turn=turn if do == "edit" else 1,
    )


@st.composite
def _sketches(draw: st.DrawFn) -> Sketch:
    """Mostly of one size, so that one can be taken for another."""
    seed = draw(st.integers(0, 3))
    sides = st.tuples(st.integers(1, 700), st.integers(1, 700))
    width, height = draw(st.one_of(st.just(_SIZES[0]), st.just(_SIZES[0]), st.sampled_from(_SIZES), sides))
    return Sketch(seed, width, height)
