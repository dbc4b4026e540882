"""decoding: tokens chosen in the transformers library's order; text released whole, early, up to the stop text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from mmchat.decoding import TextStream, choose, ids_of_text
from mmchat.engine import Sampling
from mmchat.prompt import ChatTokenizer

texts = st.text(alphabet=st.sampled_from("abcé請😀\n ") | st.characters(codec="utf-8"), max_size=20)
stops = st.lists(st.text(alphabet="abcé請", min_size=1, max_size=4), max_size=3)


@st.composite
def token_splits(draw: st.DrawFn, text: st.SearchStrategy[str] = texts) -> tuple[str, list[bytes]]:
    """A text, and its bytes cut into tokens anywhere: within characters, and empty ones."""
    whole = draw(text)
    data = whole.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    edges = [0, *cuts, len(data)]
    return whole, [data[start:end] for start, end in itertools.pairwise(edges)]


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Up to the stop text that is complete first (of two that end together, the longer), character by character."""
    for end in range(len(text) + 1):
        ending = [word for word in stop if text[:end].endswith(word)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


# --- TextStream -------------------------------------------------------------------------------------------------


@given(token_splits(), stops)
@example(("abcd", [b"abcd"]), ["c", "bcd"])
@example(("ab", [b"a", b"b"]), ["ab", "b"])
def test_text_is_released_up_to_the_first_stop_text(split: tuple[str, list[bytes]], stop: list[str]) -> None:
    """However the bytes are cut into tokens: the same answer ends at the same place."""
    text, tokens = split
    stream = TextStream(tokens.__getitem__, stop)
    released = [stream.push(number) for number in range(len(tokens))]
    released.append(stream.finish())
    wanted, stopped = cut_at_stop(text, stop)
    assert "".join(released) == stream.text == wanted
    assert stream.stopped == stopped


@given(token_splits(), stops)
def test_as_much_as_can_be_is_released_at_once(split: tuple[str, list[bytes]], stop: list[str]) -> None:
    """Never half a character; held back is only what may begin a stop text: shorter than the longest one."""
    _, tokens = split
    stream = TextStream(tokens.__getitem__, stop)
    for number in range(len(tokens)):
        stream.push(number)
        whole = b"".join(tokens[: number + 1]).decode(errors="ignore")
        assert whole.startswith(stream.text)
        if not stream.stopped:
            held = whole[len(stream.text) :]
            assert len(held) < max(map(len, stop), default=1)
            assert held == "" or any(word.startswith(held) for word in stop)


@given(st.lists(st.binary(max_size=4), max_size=10))
def test_bytes_that_are_no_text_are_replaced(tokens: list[bytes]) -> None:
    """As Python's own decoder does; an unfinished character at the end is dropped."""
    stream = TextStream(tokens.__getitem__)
    for number in range(len(tokens)):
        stream.push(number)
    stream.finish()
    whole = b"".join(tokens).decode(errors="replace")
    assert stream.text in (whole, whole.removesuffix("�"))


def test_nothing_comes_after_a_stop_text() -> None:
    words = [b"one ", b"two<", b"end>", b"three"]
    stream = TextStream(words.__getitem__, ["<end>"])
    assert [stream.push(n) for n in range(4)] == ["one ", "two", "", ""]
    assert (stream.finish(), stream.text, stream.stopped) == ("", "one two", True)


def test_what_looked_like_a_stop_text_is_released_after_all() -> None:
    words = [b"<en", b"ough>", b" <e"]
    stream = TextStream(words.__getitem__, ["<end>"])
    assert [stream.push(n) for n in range(3)] == ["", "<enough>", " "]
    assert stream.finish() == "<e"


# --- choose -----------------------------------------------------------------------------------------------------

scores = hnp.arrays(np.float32, st.integers(2, 12), elements=st.floats(-20, 20, width=32), unique=True)


def probabilities(logits: NDArray[np.float32], sampling: Sampling, generated: Sequence[int]) -> NDArray[np.float64]:
    """The distribution, by the book: penalty, temperature, top_k, softmax, top_p."""
    values = logits.astype(np.float64)
    for token in set(generated):
        values[token] *= sampling.repetition_penalty if values[token] < 0 else 1 / sampling.repetition_penalty
    values /= sampling.temperature
    if sampling.top_k:
        values[values < np.sort(values)[-min(sampling.top_k, len(values))]] = -np.inf
    weights = np.exp(values - values.max())
    weights /= weights.sum()
    likeliest, taken = np.argsort(-weights), 0.0
    for rank, token in enumerate(likeliest):
        taken += weights[token]
        if taken >= sampling.top_p:
            weights[likeliest[rank + 1 :]] = 0
            break
    return np.asarray(weights / weights.sum())


@given(scores, st.floats(0.01, 3), st.integers(0, 12))
def test_greedy_takes_the_likeliest(logits: NDArray[np.float32], temperature: float, seed: int) -> None:
    """Temperature 0; top_k 1 and a tiny top_p come to the same at any temperature."""
    best = int(logits.argmax())
    assert choose(logits, Sampling(seed=seed, top_p=0.1, top_k=3), []) == best
    assert choose(logits, Sampling(temperature=temperature, top_k=1, seed=seed), []) == best
    assert choose(logits, Sampling(temperature=temperature, top_p=1e-9, seed=seed), []) == best
    gap = np.sort(logits)[-1] - np.sort(logits)[-2]
    assume(gap > 0.01)
    assert choose(logits, Sampling(temperature=1e-4, seed=seed), []) == best


def test_of_equal_scores_greedy_takes_the_first() -> None:
    assert choose(np.array([1, 3, 3, 3], np.float32), Sampling(), []) == 1


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """Without a warning, which a host program may see as an error."""
    logits = np.array([-5, 2, 1, 30, 29], np.float32)
    assert choose(logits, Sampling(temperature=temperature), []) == 3


@pytest.mark.parametrize(("penalty", "wanted"), [(1.0, 0), (1.5, 1), (3.0, 2), (0.5, 0)])
def test_the_penalty_lowers_what_was_generated(penalty: float, wanted: int) -> None:
    """Positive scores are divided, negative ones multiplied; once, however often a token came; greedy too."""
    logits = np.array([2.0, 1.5, 0.9, -1.0], np.float32)
    assert choose(logits, Sampling(repetition_penalty=penalty), [0, 0, 0] if penalty < 2 else [0, 1, 0]) == wanted
    negative = np.array([-1.0, -1.5], np.float32)
    assert choose(negative, Sampling(repetition_penalty=2.0), [0]) == 1
    assert choose(negative, Sampling(repetition_penalty=2.0), []) == 0


@given(
    scores,
    st.floats(0.1, 3),
    st.integers(0, 12),
    st.floats(0.05, 1),
    st.floats(0.5, 2),
    st.lists(st.integers(0, 1), max_size=4),
    st.integers(0, 2**32),
)
def test_only_what_the_settings_leave_is_chosen(
    logits: NDArray[np.float32], temperature: float, k: int, p: float, penalty: float, seen: list[int], seed: int
) -> None:
    """The order of operations, against a plain oracle."""
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p, repetition_penalty=penalty, seed=seed)
    left = probabilities(logits, sampling, seen)
    edge = probabilities(logits, Sampling(**{**sampling.to_dict(), "top_p": min(1.0, p * (1 + 1e-9) + 1e-12)}), seen)
    chosen = choose(logits, sampling, seen)
    assert left[chosen] > 0 or edge[chosen] > 0
    assert choose(logits, sampling, seen) == chosen
    untouched = logits.copy()
    choose(logits, sampling, seen)
    np.testing.assert_array_equal(logits, untouched)


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.5},
    ],
)
def test_frequencies_are_the_oracles(settings_: dict[str, float]) -> None:
    """1,500 seeds: every frequency within five standard deviations."""
    logits = np.array([1.0, 0.2, -0.5, 0.9, -2.0, 0.0], np.float32)
    n = 1500
    drawn = [choose(logits, Sampling.from_dict({**settings_, "seed": seed}), [0, 4]) for seed in range(n)]
    wanted = probabilities(logits, Sampling.from_dict(dict(settings_)), [0, 4])
    got = np.bincount(drawn, minlength=6) / n
    assert (np.abs(got - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / n)).all()


def test_steps_draw_independently_and_repeatably() -> None:
    """Same seed and step, same token: an answer can go on after a crash.  Other steps and seeds draw anew."""
    logits = np.zeros(50, np.float32)

    def answer(seed: int, begun: Sequence[int] = ()) -> list[int]:
        ids = list(begun)
        while len(ids) < 30:
            ids.append(choose(logits, Sampling(temperature=1, seed=seed), ids))
        return ids

    first = answer(5)
    assert answer(5) == first == answer(5, first[:13])
    assert answer(6) != first
    assert len(set(first)) > 15


def test_extreme_scores_are_no_trouble() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, seed=1)
    assert choose(np.array([-np.inf, 3, -np.inf], np.float32), sampling, []) == 1
    assert choose(np.array([3e38, -3e38, 0], np.float32), sampling, []) == 0
    assert choose(np.array([7], np.float32), sampling, [0]) == 0


# --- ids_of_text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> ChatTokenizer:
    return ChatTokenizer(Path(__file__).resolve().parents[1] / "mmchat" / "demo" / "tokenizer.json")


@given(ids=st.lists(st.integers(0, 580), max_size=12), cut=st.integers(0, 30))
def test_ids_of_text_spell_the_text(demo: ChatTokenizer, ids: list[int], cut: int) -> None:
    """Of an answer that was cut off anywhere: its own tokens as far as they go, then the rest anew."""
    text = b"".join(map(demo.token_bytes, ids)).decode(errors="replace")[:cut]
    got = ids_of_text(ids, text, demo.token_bytes, demo.encode)
    assert b"".join(map(demo.token_bytes, got)).decode(errors="replace") == text
    kept = 0
    while kept < len(ids) and text.encode().startswith(b"".join(map(demo.token_bytes, ids[: kept + 1]))):
        kept += 1
    assert got[:kept] == ids[:kept]


def test_ids_of_a_whole_answer_are_its_own() -> None:
    """Even where the text would be tokenised otherwise."""
    spelled = [b"a", b"b", b"ab", b"c"]

    def encode(text: str) -> list[int]:
        return [-1] if text else []

    assert ids_of_text([0, 1, 3], "abc", spelled.__getitem__, encode) == [0, 1, 3]
    assert ids_of_text([0, 1, 3], "ab", spelled.__getitem__, encode) == [0, 1]
    assert ids_of_text([0, 2], "aa", spelled.__getitem__, encode) == [0, -1]
    assert ids_of_text([0, 1], "", spelled.__getitem__, encode) == []
