"""What every Engine does, whatever it is made of: the long form of mmchat.engine.Engine.

A test class per engine inherits from EngineContract and gives it a fixture `kit`.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mmchat.engine import Done, Engine, ImageRows, Piece, Prefill, Sampling, Token, Tokens
from mmchat.errors import ContextFull, MissingEmbeddings, PromptError
from mmchat.prompt import ChatTokenizer
from mmchat.store import Store
from tests.fakes import never

CONTEXT_ROWS = 300
GREEDY = Sampling(max_new_tokens=12)
# Favours what was said already, so that no answer ends by itself.
ENDLESS = Sampling(max_new_tokens=12, repetition_penalty=0.01)


def rewinds(before: Answer, n_common: int, n_rows: int) -> int:
    """What an engine reuses that can cut its cache anywhere: all but the last row, whose scores are needed."""
    return min(n_common, n_rows - 1)


@dataclass
class Kit:
    """An engine to test and what to feed it.  fresh(): the engine, with nothing in its cache that a test asks for.

    reused(before, n_common, n_rows): rows that it reuses for a prompt of n_rows, of which n_common equal the prompt
        and the answer of the request before.
    repeats: a seed gives the same answer again, and penalties see the tokens that a resumed answer had before.
    """

    fresh: Callable[[], Engine]
    tokenizer: ChatTokenizer
    store: Store
    width: int
    reused: Callable[[Answer, int, int], int] = rewinds
    repeats: bool = True
    n_images: int = field(default=0, init=False)

    def image(self, n_rows: int = 5, *, width: int | None = None, value: float | None = None) -> ImageRows:
        """A new picture of random rows, with one given value in it."""
        self.n_images += 1
        shape = (n_rows, width or self.width)
        rows = np.random.default_rng(self.n_images).standard_normal(shape).astype(np.float32)
        if value is not None:
            rows[n_rows // 2, 1] = value
        key = hashlib.sha256(rows.tobytes() + bytes(shape)).hexdigest()
        self.store.put(key, rows)
        return ImageRows(key, n_rows)

    def words(self, n: int, seed: int = 0) -> Tokens:
        """n ids of plain text."""
        return Tokens(tuple(random.Random(seed).choices(range(100), k=n)))

    def text(self, ids: Sequence[int]) -> str:
        """Their characters; an unfinished one at the end is left out."""
        data = b"".join(map(self.tokenizer.token_bytes, ids))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


@dataclass
class Answer:
    tokens: list[Token]
    prefills: list[Prefill]
    done: Done

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.done.text


def run(
    engine: Engine,
    pieces: Sequence[Piece],
    sampling: Sampling = GREEDY,
    should_stop: Callable[[], bool] = never,
    resume_ids: Sequence[int] = (),
) -> Answer:
    """A request to its end, and what holds of every request."""
    events: list[Any] = list(engine.generate(pieces, sampling, should_stop, resume_ids=resume_ids))
    assert [isinstance(event, Done) for event in events] == [False] * (len(events) - 1) + [True]
    answer = Answer(
        [e for e in events if isinstance(e, Token)], [e for e in events if isinstance(e, Prefill)], events[-1]
    )
    done = answer.done
    assert [type(event) for event in events[:-1]] == [Prefill] * len(answer.prefills) + [Token] * len(answer.tokens)
    assert done.n_prompt == sum(piece.n_rows for piece in pieces)
    assert done.n_new == len(answer.tokens) + len(resume_ids) <= max(sampling.max_new_tokens, len(resume_ids))
    assert (done.reason == "length") <= (done.n_new == sampling.max_new_tokens)
    assert done.n_reused + done.n_prefilled <= done.n_prompt
    if done.reason != "cancelled":
        assert done.n_reused + done.n_prefilled == done.n_prompt
        assert answer.prefills[-1].done == answer.prefills[-1].total
    assert [p.done for p in answer.prefills] == sorted({p.done for p in answer.prefills})
    assert done.prefill_s >= 0
    assert done.generate_s >= 0
    return answer


def outcome(engine: Engine, pieces: Sequence[Piece]) -> Answer | Exception:
    try:
        return run(engine, pieces)
    except Exception as error:
        return error


class EngineContract:
    @pytest.fixture
    def engine(self, kit: Kit) -> Engine:
        return kit.fresh()

    # What is computed and what is reused

    def test_a_fresh_engine_computes_every_row(self, kit: Kit, engine: Engine) -> None:
        pieces: list[Piece] = [kit.words(20), kit.image(), kit.words(10, seed=1)]
        done = run(engine, pieces).done
        assert (done.n_prompt, done.n_reused, done.n_prefilled) == (35, 0, 35)

    def test_the_same_prompt_again_costs_one_row(self, kit: Kit, engine: Engine) -> None:
        pieces: list[Piece] = [kit.words(20), kit.image(), kit.words(10, seed=1)]
        first = run(engine, pieces)
        again = run(engine, pieces)
        assert again.done.n_reused == kit.reused(first, 35, 35)
        assert (again.ids, again.text) == (first.ids, first.text)

    @pytest.mark.parametrize("at", [0, 1, 7, 19, 20, 22, 24, 25, 33, 34])
    def test_an_edit_costs_what_comes_after_it(self, kit: Kit, engine: Engine, at: int) -> None:
        words, image, more = kit.words(20), kit.image(), kit.words(10, seed=1)
        first = run(engine, [words, image, more])
        edited: list[Piece] = [words, image, more]
        if at < 20:
            edited[0] = changed(words, at)
        elif at < 25:  # a picture is one thing: its rows go together, but its first ones may be equal by number
            edited[1], at = kit.image(), 20
        else:
            edited[2] = changed(more, at - 25)
        done = run(engine, edited).done
        n_reused = kit.reused(first, at, 35)
        assert (done.n_reused, done.n_prefilled) == (n_reused, 35 - n_reused)

    def test_a_longer_conversation_costs_what_is_new(self, kit: Kit, engine: Engine) -> None:
        pieces: list[Piece] = [kit.words(20)]
        before: Answer | None = None
        for turn in range(4):
            answer = run(engine, pieces, ENDLESS)
            n_known = 0
            if before is not None:  # the last token was never fed
                n_known = kit.reused(before, before.done.n_prompt + before.done.n_new - 1, answer.done.n_prompt)
            assert answer.done.n_reused == n_known
            pieces += [Tokens(answer.done.ids), kit.image(3), kit.words(4, seed=turn)]
            before = answer

    def test_a_shorter_conversation_costs_one_row(self, kit: Kit, engine: Engine) -> None:
        words = kit.words(30)
        first = run(engine, [words])
        assert run(engine, [Tokens(words.ids[:12])]).done.n_reused == kit.reused(first, 12, 12)

    def test_where_ids_are_split_into_pieces_does_not_matter(self, kit: Kit, engine: Engine) -> None:
        words = kit.words(30)
        first = run(engine, [words])
        again = run(engine, [Tokens(words.ids[:9]), Tokens(()), Tokens(words.ids[9:])])
        assert (again.done.n_reused, again.ids) == (kit.reused(first, 30, 30), first.ids)

    def test_an_answer_does_not_depend_on_what_was_cached(self, kit: Kit, engine: Engine) -> None:
        """Rewound to any point, the engine says what a fresh one says."""
        image, other = kit.image(6), kit.image(6)
        prompts: list[list[Piece]] = [
            [kit.words(25), image, kit.words(8, seed=1)],
            [kit.words(25), image, kit.words(8, seed=2)],
            [kit.words(25), other, kit.words(8, seed=1)],
            [kit.words(11), kit.words(9, seed=3)],
            [kit.words(60, seed=4)],
        ]
        fresh = [run(kit.fresh(), prompt) for prompt in prompts]
        engine = kit.fresh()
        order = random.Random(7).choices(range(len(prompts)), k=20)
        for i in order:
            answer = run(engine, prompts[i])
            assert (answer.ids, answer.text) == (fresh[i].ids, fresh[i].text), f"prompt {i} in {order}"

    # How answers end

    def test_one_token(self, kit: Kit, engine: Engine) -> None:
        answer = run(engine, [kit.words(20)], Sampling(max_new_tokens=1, repetition_penalty=0.01))
        assert (answer.done.n_new, answer.done.reason) == (1, "length")
        assert answer.done.ids == tuple(answer.ids)

    def test_text_is_the_decoded_ids(self, kit: Kit, engine: Engine) -> None:
        for seed in range(3):
            answer = run(engine, [kit.words(20)], Sampling(max_new_tokens=30, temperature=5.0, seed=seed))
            assert answer.text == kit.text(answer.ids)
            assert answer.done.ids == tuple(answer.ids)

    def test_end_tokens_are_not_part_of_the_answer(self, kit: Kit, engine: Engine) -> None:
        for seed in range(3):
            sampling = Sampling(max_new_tokens=60, temperature=20.0, seed=seed)
            assert not kit.tokenizer.stop_ids & set(run(engine, [kit.words(20)], sampling).ids)

    def test_a_stop_text_cuts_the_answer(self, kit: Kit, engine: Engine) -> None:
        words = kit.words(20)
        whole = run(engine, [words], ENDLESS)
        for stop in stop_texts(whole):
            cut = run(engine, [words], Sampling(**{**ENDLESS.to_dict(), "stop": (stop, "never said")}))
            assert cut.text == whole.text[: whole.text.index(stop)]
            assert cut.done.reason == "stop"
            assert kit.text(cut.done.ids) == cut.text
            assert cut.ids == whole.ids[: len(cut.ids)]

    def test_a_stop_text_that_only_began_is_text(self, kit: Kit, engine: Engine) -> None:
        words = kit.words(20)
        whole = run(engine, [words], ENDLESS)
        stop = whole.text[-2:] + "\x00"
        held = run(engine, [words], Sampling(**{**ENDLESS.to_dict(), "stop": stop}))
        assert (held.text, held.done.reason, held.done.ids) == (whole.text, "length", whole.done.ids)
        assert held.done.text == whole.text[-2:]

    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_cancel(self, kit: Kit, engine: Engine, after: int) -> None:
        """After so many tokens; 0 is before anything is computed."""
        words, seen = kit.words(40), list[Token]()
        whole = run(kit.fresh(), [words], ENDLESS)
        engine = kit.fresh()
        events: list[Any] = []
        sampling = Sampling(**{**ENDLESS.to_dict(), "max_new_tokens": 200})
        for event in engine.generate([words], sampling, lambda: len(seen) >= after):
            events.append(event)
            if isinstance(event, Token):
                seen.append(event)
        done = events[-1]
        assert isinstance(done, Done)
        assert done.reason == "cancelled"
        assert len(seen) == done.n_new >= after
        assert done.ids == tuple(token.id for token in seen)
        assert run(engine, [words], ENDLESS).ids == whole.ids

    @pytest.mark.parametrize("after", [1, 4])
    def test_leaving_an_answer_leaves_the_engine_usable(self, kit: Kit, engine: Engine, after: int) -> None:
        words = kit.words(40)
        whole = run(kit.fresh(), [words], ENDLESS)
        engine = kit.fresh()
        events: Any = engine.generate([words], ENDLESS, never)
        for _ in range(after):
            next(events)
        events.close()
        assert run(engine, [words], ENDLESS).ids == whole.ids

    # The context

    def test_the_context_can_be_filled_to_its_last_row(self, kit: Kit, engine: Engine) -> None:
        assert engine.context_rows == CONTEXT_ROWS
        words = kit.words(CONTEXT_ROWS - 12)
        answer = run(engine, [words], ENDLESS)
        assert (answer.done.n_new, answer.done.reason) == (12, "length")

    def test_one_row_more_is_refused(self, kit: Kit, engine: Engine) -> None:
        short = kit.words(CONTEXT_ROWS - 12)
        first = run(engine, [short], ENDLESS)
        for pieces, n_new in (([kit.words(CONTEXT_ROWS - 11)], 12), ([short], 13), ([kit.words(10_000)], 1)):
            n_prompt = pieces[0].n_rows
            with pytest.raises(ContextFull) as caught:
                run(engine, pieces, Sampling(max_new_tokens=n_new))
            error = caught.value
            assert (error.n_prompt, error.max_new_tokens, error.limit) == (n_prompt, n_new, CONTEXT_ROWS)
        assert run(engine, [short], ENDLESS).done.n_reused == kit.reused(first, short.n_rows, short.n_rows)

    # Bad requests

    def test_bad_pieces_are_refused_and_the_cache_is_unharmed(self, kit: Kit, engine: Engine) -> None:
        good: list[Piece] = [kit.words(20), kit.image(), kit.words(10, seed=1)]
        first = run(engine, good)
        image = kit.image(5)
        bad: dict[str, list[Piece]] = {
            "no such id": [Tokens((1, 2, 1_000_000))],
            "negative id": [Tokens((1, -1))],
            "no rows": [],
            "no ids": [Tokens(())],
            "a picture without rows": [kit.words(3), ImageRows(image.key, 0)],
            "too few rows": [kit.words(3), ImageRows(image.key, 4)],
            "too many rows": [kit.words(3), ImageRows(image.key, 6)],
            "another width": [kit.words(3), kit.image(5, width=kit.width + 1)],
            "NaN": [kit.words(3), kit.image(value=float("nan"))],
            "infinite": [*good, kit.image(value=float("-inf"))],
        }
        for what, pieces in bad.items():
            assert isinstance(outcome(engine, pieces), PromptError), what
            again = run(engine, good)
            assert (again.done.n_reused, again.ids) == (kit.reused(first, 35, 35), first.ids), what

    def test_missing_embeddings_are_all_named(self, kit: Kit, engine: Engine) -> None:
        good: list[Piece] = [kit.words(20), kit.image(), kit.words(10, seed=1)]
        first = run(engine, good)
        lost = [ImageRows("e" * 64, 5), ImageRows("f" * 64, 5)]
        with pytest.raises(MissingEmbeddings) as caught:
            run(engine, [kit.words(3), lost[0], kit.image(), lost[1], kit.words(3)])
        assert caught.value.keys == ("e" * 64, "f" * 64)
        again = run(engine, good)
        assert (again.done.n_reused, again.ids) == (kit.reused(first, 35, 35), first.ids)

    # Sampling

    def test_the_same_seed_gives_the_same_answer(self, kit: Kit, engine: Engine) -> None:
        def sample(seed: int) -> list[int]:
            sampling = Sampling(max_new_tokens=15, temperature=3.0, top_k=50, top_p=0.95, seed=seed)
            return run(engine, [kit.words(20)], sampling).ids

        answers = [sample(seed) for seed in range(6)]
        if kit.repeats:
            assert [sample(seed) for seed in range(6)] == answers
        assert len(set(map(tuple, answers))) > 1

    # Going on after a crash

    @pytest.mark.parametrize("kind", ["greedy", "seeded", "stop text", "length"])
    def test_a_resumed_answer_is_the_uninterrupted_one(self, kit: Kit, engine: Engine, kind: str) -> None:
        pieces: list[Piece] = [kit.words(20), kit.image(), kit.words(10, seed=1)]
        long = ENDLESS if kit.repeats else Sampling(max_new_tokens=12)
        sampling = {
            "greedy": Sampling(max_new_tokens=16),
            "seeded": Sampling(max_new_tokens=12, temperature=3.0, seed=5, repetition_penalty=1.3),
            "stop text": long,
            "length": Sampling(**{**long.to_dict(), "max_new_tokens": 12 if kit.repeats else 2}),
        }[kind]
        if kind == "seeded" and not kit.repeats:
            pytest.skip("the engine has no seed")
        if kind == "stop text":
            stops = stop_texts(run(engine, pieces, long))
            sampling = Sampling(**{**long.to_dict(), "stop": (stops[-1], stops[-1][:1] + "\x00")})
        whole = run(engine, pieces, sampling)
        for n_shown in range(len(whole.tokens) + 1):
            rest = run(engine, pieces, sampling, resume_ids=whole.ids[:n_shown])
            assert rest.ids == whole.ids[n_shown:]
            shown = "".join(token.text for token in whole.tokens[:n_shown])
            assert shown + rest.text == whole.text
            assert (rest.done.ids, rest.done.reason, rest.done.n_new) == (
                (whole.done.ids, whole.done.reason, whole.done.n_new)
            )

    def test_resuming_on_a_fresh_engine(self, kit: Kit, engine: Engine) -> None:
        pieces: list[Piece] = [kit.words(20), kit.image(), kit.words(10, seed=1)]
        sampling = ENDLESS if kit.repeats else GREEDY
        whole = run(engine, pieces, sampling)
        rest = run(kit.fresh(), pieces, sampling, resume_ids=whole.ids[:2])
        assert rest.ids == whole.ids[2:]
        assert (rest.done.n_prompt, rest.done.n_reused, rest.done.n_prefilled) == (35, 0, 35)


def changed(tokens: Tokens, at: int) -> Tokens:
    return Tokens((*tokens.ids[:at], tokens.ids[at] + 100, *tokens.ids[at + 1 :]))


def stop_texts(answer: Answer) -> list[str]:
    """Parts of its text: within one token, and across the border of two."""
    texts = [token.text for token in answer.tokens]
    return list(_parts(texts))


def _parts(texts: list[str]) -> Iterator[str]:
    yield texts[0] or texts[1]
    for before, after in itertools.pairwise(texts):
        if before and after:
            yield before[-1] + after[0]
