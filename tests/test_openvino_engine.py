"""The OpenVINO engine beyond the contract: its numbers, its speed's precondition, and what it does when it fails."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmchat import openvino_engine
from mmchat.checkpoint import Checkpoint
from mmchat.embed_table import EmbedTable
from mmchat.engine import ImageRows, Piece, Sampling, Tokens
from mmchat.errors import EngineError, ModelDirError
from mmchat.model_dir import MAX_CACHES, open_model
from mmchat.openvino_engine import OpenVinoEngine
from mmchat.prompt import ChatTokenizer
from tests.contract_engine import ENDLESS, run
from tests.fakes import never
from tools import record_logits

SPEC = open_model("demo")
WORDS = Tokens(tuple(range(10, 70)))
RECORDED = Path(__file__).parent / "data" / "demo_logits.npz"

Make = Callable[..., OpenVinoEngine]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(SPEC.tokenizer_path)


@pytest.fixture(scope="module")
def images() -> dict[str, NDArray[np.float32]]:
    """What the engine finds under a key; tests add to it."""
    return {}


@pytest.fixture(scope="module")
def make(tokenizer: ChatTokenizer, images: dict[str, NDArray[np.float32]]) -> Make:
    def make(**options: Any) -> OpenVinoEngine:
        table = EmbedTable.open(SPEC.embed_table_path)
        return OpenVinoEngine(Checkpoint(SPEC.folder), SPEC.llm, table, tokenizer, images.get, **options)

    return make


@pytest.fixture(scope="module")
def engine(make: Make) -> OpenVinoEngine:
    return make()


def test_the_plug_in_fuses_attention_and_rotation(engine: OpenVinoEngine) -> None:
    """Without this, decoding takes five times as long; a harmless-looking change of the graph is enough."""
    model = engine._compiled.get_runtime_model()
    kinds = [op.get_rt_info()["layerType"].astype(str) for op in model.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == SPEC.llm.n_layers
    assert kinds.count("RoPE") == 2 * SPEC.llm.n_layers


def test_the_size_of_chunks_does_not_matter(make: Make, images: dict[str, NDArray[np.float32]]) -> None:
    images["k"] = np.random.default_rng(0).standard_normal((16, SPEC.llm.hidden_size)).astype(np.float32)
    answers = []
    for chunk_rows in (1, 7, 16, 75, 76, 77, 1000):
        answer = run(make(chunk_rows=chunk_rows), [WORDS, ImageRows("k", 16)], ENDLESS)
        assert [p.done for p in answer.prefills] == [*range(chunk_rows, 76, chunk_rows), 76]
        answers.append((answer.ids, answer.text))
    assert answers == [answers[0]] * len(answers)


def test_a_rewound_engine_says_what_a_new_one_says(make: Make, images: dict[str, NDArray[np.float32]]) -> None:
    images["k"] = np.random.default_rng(0).standard_normal((16, SPEC.llm.hidden_size)).astype(np.float32)
    prompts: list[list[Piece]] = [
        [WORDS, ImageRows("k", 16), WORDS],
        [WORDS],
        [Tokens(WORDS.ids[5:]), ImageRows("k", 16)],
    ]
    fresh = [run(make(), prompt, ENDLESS).ids for prompt in prompts]
    engine = make()
    for i in (0, 1, 0, 2, 1, 2, 0):
        assert run(engine, prompts[i], ENDLESS).ids == fresh[i]


def test_conversations_that_take_turns_do_not_displace_each_other(make: Make) -> None:
    """Each goes on where it was, and says what it says alone; what they have in common is computed once."""
    head, *tails = Tokens(WORDS.ids[:10]), Tokens(WORDS.ids[10:]), Tokens(WORDS.ids[:50]), Tokens((9, 8, 7) * 15)
    alone = [run(make(), [head, tail], ENDLESS).ids for tail in tails]
    engine = make(n_caches=3)
    for number, tail in enumerate(tails):
        answer = run(engine, [head, tail], ENDLESS)
        assert (answer.ids, answer.done.n_reused) == (alone[number], 10 if number else 0)
    for tail, ids in [*zip(tails, alone, strict=True)] * 2:
        answer = run(engine, [head, tail, Tokens((*ids, 7, 8))], ENDLESS)
        n_rows = 10 + tail.n_rows + len(ids) + 2
        # The last token was generated but not fed; the second time round only the last row is computed.
        assert answer.done.n_prompt == n_rows
        assert answer.done.n_prefilled in (3, 1)
    assert len(engine._caches) == 3


def test_no_more_caches_than_allowed(make: Make) -> None:
    """The one that was not used for longest goes."""
    prompts = [Tokens((number,) * 20) for number in (20, 21, 22)]
    engine = make(n_caches=2)
    for number, n_reused in ((0, 0), (1, 0), (0, 19), (2, 0), (0, 19), (1, 0), (2, 0)):
        assert run(engine, [prompts[number]], ENDLESS).done.n_reused == n_reused
    assert len(engine._caches) == 2


def test_a_rewound_conversation_stays_in_its_cache(make: Make) -> None:
    """Unless more of it is taken back than is left; then both are kept."""
    engine = make()
    run(engine, [WORDS], ENDLESS)
    assert run(engine, [Tokens((*WORDS.ids[:40], 1, 2))], ENDLESS).done.n_reused == 40
    assert len(engine._caches) == 1
    assert run(engine, [Tokens((*WORDS.ids[:10], 1, 2))], ENDLESS).done.n_reused == 10
    assert len(engine._caches) == 2
    assert run(engine, [Tokens((*WORDS.ids[:40], 1, 2))], ENDLESS).done.n_reused == 41


def test_a_long_context_of_a_large_model_has_one_cache(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make()._n_caches == MAX_CACHES
    monkeypatch.setattr("mmchat.model_dir._CACHES_BYTES", 6 << 20)
    assert make()._n_caches == 1
    assert make(context_rows=1000)._n_caches == 3


def test_cancel_between_chunks_keeps_what_was_computed(make: Make) -> None:
    engine, whole = make(chunk_rows=10), run(make(), [WORDS], ENDLESS)
    asked = iter([False, False, True])
    done = run(engine, [WORDS], ENDLESS, lambda: next(asked)).done
    assert (done.reason, done.n_prefilled, done.n_new) == ("cancelled", 20, 0)
    again = run(engine, [WORDS], ENDLESS)
    assert (again.done.n_reused, again.done.n_prefilled, again.ids) == (20, 40, whole.ids)


def test_the_whole_context(engine: OpenVinoEngine) -> None:
    n = SPEC.llm.context_rows
    ids = Tokens(tuple(np.random.default_rng(1).integers(0, 500, n - 2).tolist()))
    done = run(engine, [ids], Sampling(max_new_tokens=2, repetition_penalty=0.01)).done
    assert (done.n_prompt, done.n_new, done.reason) == (n - 2, 2, "length")
    assert run(engine, [WORDS]).done.n_prompt == 60


@pytest.mark.parametrize("where", ["prefill", "decode", "after a rewind"])
def test_a_failing_inference_is_an_error_and_the_next_request_is_right(
    make: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A mask of the wrong length raises inside infer(), which poisons the compiled model."""
    engine, whole = make(), run(make(), [WORDS], ENDLESS)
    if where == "after a rewind":
        run(engine, [Tokens(WORDS.ids[:30]), Tokens((5, 6, 7))], ENDLESS)
    ones, n_calls = np.ones, 0

    def bad_mask(shape: Any, *rest: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        fail = n_calls == (4 if where == "decode" else 1)
        return ones((shape[0], shape[1] + 3) if fail else shape, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(np, "ones", bad_mask)
        with pytest.raises(EngineError, match="OpenVINO failed at row") as caught:
            list(engine.generate([WORDS], ENDLESS, never))
        assert "\n" not in str(caught.value)
    for expected_reuse in (0, 59):
        again = run(engine, [WORDS], ENDLESS)
        assert (again.ids, again.done.n_reused) == (whole.ids, expected_reuse)


def test_where_compiling_fails_too_the_next_request_tries_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, whole = make(), run(make(), [WORDS], ENDLESS)

    def no(*given: Any, **options: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine._cache.request.__class__, "infer", no)
        patched.setattr(engine, "_core", SimpleNamespace(compile_model=no))
        with pytest.raises(EngineError, match="OpenVINO failed at row 0"):
            list(engine.generate([WORDS], ENDLESS, never))
        with pytest.raises(RuntimeError, match="no memory"):
            list(engine.generate([WORDS], ENDLESS, never))
    assert run(engine, [WORDS], ENDLESS).ids == whole.ids


# The bytes that native code holds, as glibc counts them, after runs of `count` lengths that were never seen before.
_IN_USE = """
import ctypes, sys
from mmchat.engine import Sampling, Tokens
from mmchat.model_dir import open_model
from mmchat.openvino_engine import open_engine
from mmchat.prompt import ChatTokenizer

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
kind = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = kind
spec = open_model("demo")
engine = open_engine(spec, ChatTokenizer(spec.tokenizer_path), lambda key: None, context_rows=256)
for length in (200, *range(1, 101)):
    ids = tuple(300 + (length + k) % 400 for k in range(length))
    for _ in engine.generate([Tokens(ids)], Sampling(temperature=0.0, max_new_tokens=1), lambda: False):
        pass
    if length in (50, 100):
        print(libc.mallinfo2().uordblks)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_runs_of_ever_other_lengths_do_not_fill_the_memory() -> None:
    shown = subprocess.run([sys.executable, "-c", _IN_USE], capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, shown.stdout.split())
    assert after - before < 3e6  # 11 MB when every length's kernels were kept


def test_a_table_of_another_model_is_refused(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    table = EmbedTable(np.zeros((592, 64), np.float16), tmp_path / "other.safetensors")
    with pytest.raises(ModelDirError, match=r"592 x 64.*192 wide"):
        OpenVinoEngine(Checkpoint(SPEC.folder), SPEC.llm, table, tokenizer, lambda key: None)


# Numbers


@pytest.fixture
def logits_of(
    engine: OpenVinoEngine, images: dict[str, NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[NDArray[Any]]], NDArray[np.float32]]:
    """The scores that the first token of an answer is chosen from, through the whole engine."""
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32], sampling: Sampling, generated: Any) -> int:
        seen.append(logits.copy())
        return 0

    monkeypatch.setattr(openvino_engine, "choose", choose)

    def logits_of(arrays: list[NDArray[Any]]) -> NDArray[np.float32]:
        pieces: list[Piece] = []
        for array in arrays:
            if array.ndim == 1:
                pieces.append(Tokens(tuple(array.tolist())))
            else:
                key = str(len(images))
                images[key] = array.astype(np.float32)
                pieces.append(ImageRows(key, len(array)))
        run(engine, pieces, Sampling(max_new_tokens=1))
        return seen[-1]

    return logits_of


def test_scores_equal_the_recorded_ones(logits_of: Callable[[list[NDArray[Any]]], NDArray[np.float32]]) -> None:
    with np.load(RECORDED) as recorded:
        if str(recorded["digest"]) != record_logits.weights_digest(SPEC.folder):
            pytest.fail("the demo weights have changed since the recording: run python tools/record_logits.py")
        for number, form in enumerate(record_logits.PROMPTS):
            pieces = [recorded[f"{number}.{i}"] for i in range(int(recorded[f"{number}.n"]))]
            wanted = recorded[f"{number}.logits"]
            got = logits_of(pieces)
            assert np.ptp(wanted) > 1  # scores that differ, not a flat line
            assert np.abs(got - wanted[: len(got)]).max() < 1e-4, form


def test_scores_equal_those_of_transformers(logits_of: Callable[[list[NDArray[Any]]], NDArray[np.float32]]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = record_logits.reference_model(SPEC.folder)
    rng = np.random.default_rng(5)
    for _ in range(5):
        ids = rng.integers(0, 500, rng.integers(1, 60))
        rows = (0.5 * rng.standard_normal((rng.integers(1, 30), SPEC.llm.hidden_size))).astype(np.float32)
        pieces: list[NDArray[Any]] = [ids, rows, ids[::-1].copy()]
        wanted = record_logits.reference_logits(model, pieces)
        got = logits_of(pieces)
        assert np.abs(got - wanted[: len(got)]).max() < 1e-4
