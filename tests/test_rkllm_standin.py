"""The stand-in library: greedy answers of the real engine, and every switch does what its README says."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint
from mmchat.embed_table import EmbedTable
from mmchat.engine import Done, ImageRows, Piece, Sampling, Tokens
from mmchat.model_dir import DEMO, open_model
from mmchat.openvino_engine import OpenVinoEngine
from mmchat.prompt import ChatTokenizer, build
from mmchat.rkllm_abi import FAMILIES, RKLLM_RUN_ERROR, RKLLM_RUN_NORMAL, RKLLM_RUN_WAITING
from tests.rkllm_standin.__main__ import main
from tests.rkllm_standin.build import demo_model, library
from tests.rkllm_standin.driver import Driver, Outcome

NEWEST = "1.3.0"
SPEC = open_model(DEMO)
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)
TABLE = EmbedTable.open(SPEC.embed_table_path)
Rows = NDArray[np.float32]


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RKLLM_LOG_LEVEL", raising=False)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_switch(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"RKLLM_STANDIN_{name}", str(value))

    return set_switch


@pytest.fixture
def traced(tmp_path: Path, switch: Any) -> Any:
    """A call that returns what the library wrote about its runs."""
    switch(TRACE=tmp_path / "trace")

    def runs() -> list[dict[str, Any]]:
        lines = map(json.loads, (tmp_path / "trace").read_text().splitlines())
        return [line for line in lines if line["call"] == "run"]

    return runs


def driver(family: str = NEWEST, **param: Any) -> Driver:
    made = Driver(library(family), family, demo_model(), **param)
    assert made.code == 0
    return made


def noise(n: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).normal(0, 1, (n, SPEC.llm.hidden_size)).astype(np.float32)


@cache
def pictures(seed: int) -> dict[str, Rows]:
    """Random embeddings under keys, as the store would give them."""
    return {f"{seed}-{i}": noise(SPEC.vision.query_num, 100 * seed + i) for i in range(8)}


def conversation(seed: int, text: str = "What colour is the circle?") -> list[Piece]:
    """0 to 3 pictures, each with random embeddings, in one or two messages."""
    rng = np.random.default_rng(seed)
    image = {"type": "image", "size": [100, 100]}
    follow = {"type": "text", "text": "And how many shapes are there?"}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*[image] * int(rng.integers(0, 3)), {"type": "text", "text": text}]}
    ]
    if seed % 2:
        messages.append({"role": "assistant", "content": "The circle is red."})
        messages.append({"role": "user", "content": [image, follow]})
    prompt = build(messages, TOKENIZER, query_num=SPEC.vision.query_num, scale_resolution=112)
    keys = iter(pictures(seed))
    return [ImageRows(next(keys), piece.n_rows) if isinstance(piece, ImageRows) else piece for piece in prompt.pieces]


def embed(pieces: Sequence[Piece], seed: int) -> Rows:
    parts = [TABLE.rows(p.ids) if isinstance(p, Tokens) else pictures(seed)[p.key] for p in pieces]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def engine() -> OpenVinoEngine:
    everything = {key: rows for seed in range(40) for key, rows in pictures(seed).items()}
    return OpenVinoEngine(Checkpoint(SPEC.folder), SPEC.llm, TABLE, TOKENIZER, everything.get)


def answer(engine: OpenVinoEngine, pieces: Sequence[Piece], sampling: Sampling) -> Done:
    (*_, done) = engine.generate(pieces, sampling, lambda: False)
    assert isinstance(done, Done)
    return done


# ------------------------------------------------------------------------------------------------------ the same model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_the_cpu_engines(family: str, engine: OpenVinoEngine) -> None:
    """Pictures and none, one turn and two, with and without a penalty, short and cut off: 10 prompts per family."""
    texts = set()
    for seed in range(10):
        sampling = Sampling(max_new_tokens=3 if seed == 4 else 48, repetition_penalty=1.3 if seed % 3 == 2 else 1.0)
        pieces = conversation(seed)
        expected = answer(engine, pieces, sampling)
        with driver(
            family, max_new_tokens=sampling.max_new_tokens, repeat_penalty=sampling.repetition_penalty
        ) as standin:
            outcome = standin.run(embed(pieces, seed))
        assert outcome.code == 0
        assert outcome.finished
        assert outcome.ids == list(expected.ids), seed
        assert outcome.text.decode() == "".join(TOKENIZER.token_bytes(i).decode() for i in expected.ids)
        texts.add(outcome.text)
    assert len(texts) > 2


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 31, 32, 33, 64, 65, 300])
def test_every_length_is_computed_alike(n: int, engine: OpenVinoEngine) -> None:
    rng = np.random.default_rng(n)
    ids = tuple(int(i) for i in rng.integers(0, TOKENIZER.n_ids, n))
    expected = answer(engine, [Tokens(ids)], Sampling(max_new_tokens=24))
    with driver(max_new_tokens=24) as standin:
        assert standin.run(TABLE.rows(ids)).ids == list(expected.ids)


def test_a_long_prompt_equals_too(engine: OpenVinoEngine) -> None:
    pieces = [*conversation(3), *conversation(5)[:-1]] * 4
    rows = np.concatenate([embed([*conversation(3)], 3), embed(conversation(5)[:-1], 5)] * 4)
    expected = answer(engine, pieces, Sampling(max_new_tokens=16))
    assert len(rows) > 800
    with driver(max_new_tokens=16) as standin:
        assert standin.run(rows).ids == list(expected.ids)


# --------------------------------------------------------------------------------------------------- callbacks, counts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_run_calls_back(family: str) -> None:
    rows = embed(conversation(0), 0)
    threads = set()

    def note_thread(outcome: Outcome) -> int:
        threads.add(threading.get_ident())
        return 0

    with driver(family, max_new_tokens=5) as standin:
        standin.on_token = note_thread
        outcome = standin.run(rows)
        states = [state for state, _, _ in outcome.events]
        assert states == [RKLLM_RUN_NORMAL] * 5 + [2]
        assert threads == {threading.get_ident()}
        if standin.abi.perf:
            assert outcome.perf["prefill_tokens"] == len(rows)
            assert outcome.perf["generate_tokens"] == 5
            assert outcome.perf["prefill_time_ms"] > 0
            assert outcome.perf["memory_usage_mb"] > 10
        if standin.abi.kv_cache_size and family == NEWEST:
            assert standin.kv_size() == len(rows) + 4  # the last token is not fed
        if standin.abi.clear_kv_args:
            assert standin.clear() == 0
        if standin.abi.kv_cache_size:
            assert standin.kv_size() == 0
        assert standin.abort() == -1  # nothing runs


def test_the_end_token_is_called_back_unless_special_tokens_are_skipped() -> None:
    rows = embed(conversation(0), 0)
    with driver() as standin:
        skipped = standin.run(rows).ids
    with driver(skip_special_token=False) as standin:
        shown = standin.run(rows)
    assert shown.ids == [*skipped, TOKENIZER.special["<|im_end|>"]]
    assert shown.text.endswith(b"<|im_end|>")


def test_sampling_of_the_run_and_of_the_handle() -> None:
    rows = noise(20)
    abi = FAMILIES[NEWEST]
    hot = {"top_k": 0, "top_p": 1.0, "temperature": 3.0, "repeat_penalty": 1.0}
    with driver(max_new_tokens=20) as standin:
        greedy = standin.run(rows).ids
        sampled = standin.run(rows, sampling=abi.RKLLMSamplingParam(**hot)).ids
        assert sampled != greedy
        assert len(greedy) > 1
        assert standin.run(rows, max_new_tokens=len(greedy) - 1).ids == greedy[:-1]
        assert standin.run(rows).ids == greedy
        for same in ({"top_k": 1, "temperature": 3.0}, {"temperature": 0.0, "top_k": 40}):
            assert standin.run(rows, sampling=abi.RKLLMSamplingParam(**{**hot, **same})).ids == greedy
        narrow = abi.RKLLMSamplingParam(**{**hot, "top_p": 1e-6})
        assert standin.run(rows, sampling=narrow).ids == greedy
    with driver("1.1", max_new_tokens=20, **hot) as standin:
        first = standin.run(rows).ids
        assert standin.run(rows).ids != first
    with driver("1.1", max_new_tokens=20, **hot) as standin:
        assert standin.run(rows).ids == first  # the same seed


def test_a_prompt_beyond_the_context_ends_in_the_error_state() -> None:
    with driver(max_context_len=64) as standin:
        outcome = standin.run(noise(61))
        assert outcome.code == -1
        assert [state for state, _, _ in outcome.events] == [RKLLM_RUN_ERROR]
        outcome = standin.run(noise(60))
        assert outcome.code == 0
        assert outcome.finished
        assert len(outcome.ids) <= 5


def test_what_init_refuses(tmp_path: Path) -> None:
    for wrong in ({"max_context_len": 4096}, {"enabled_cpus_num": 2}, {"n_batch": 0}):
        assert Driver(library(NEWEST), NEWEST, demo_model(), **wrong).code == -1
    cut_off, foreign = tmp_path / "cut.rkllm", tmp_path / "foreign.rkllm"
    cut_off.write_bytes(demo_model().read_bytes()[:-1])
    foreign.write_bytes(b"no model" * 100)
    for path in (cut_off, foreign, tmp_path / "missing.rkllm"):
        made = Driver(library(NEWEST), NEWEST, path)
        assert made.code == -1
        assert not made.handle


def test_log_lines_go_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with driver("1.2.1-1.2.3"):
        pass
    out = capfd.readouterr().out
    assert "I rkllm: rkllm-runtime version: 1.2.3, rknpu driver version: 0.9.8, platform: RK3588\n" in out
    assert "max_context_limit: 2048" in out
    assert out.endswith("rkllm init success\n")


# ----------------------------------------------------------------------------------------------------------- KV cache


def two_turns() -> tuple[Rows, Rows, Rows]:
    """A whole conversation of two turns, its first turn, and what the second adds after the first answer."""
    question, follow = conversation(0), TOKENIZER.encode("\nAnd the square?")
    first = embed(question, 0)
    with driver() as standin:
        ids = standin.run(first).ids
    new = TABLE.rows([TOKENIZER.special["<|im_end|>"], *follow])
    return np.concatenate([first, TABLE.rows(ids), new]), first, new


def ids_without_history(rows: Rows) -> list[int]:
    with driver() as standin:
        return standin.run(rows).ids


def test_kv_none(switch: Any, traced: Any) -> None:
    whole, first, _ = two_turns()
    switch(KV="none")
    with driver() as standin:
        standin.run(first, keep_history=1)
        assert standin.kv_size() == 0
        assert standin.run(whole, keep_history=1).ids == ids_without_history(whole)
    assert [run["prefilled"] for run in traced()][-3:-1] == [len(first), len(whole)]


def test_kv_append(switch: Any, traced: Any) -> None:
    whole, first, new = two_turns()
    switch(KV="append")
    expected = ids_without_history(whole)
    with driver() as standin:
        n_new = len(standin.run(first, keep_history=1).ids)
        assert standin.kv_size() == len(first) + n_new
        outcome = standin.run(new, keep_history=1)
        assert outcome.ids == expected
        assert outcome.perf["prefill_tokens"] == len(new)
        assert traced()[-1]["kv_before"] == len(first) + n_new
        standin.run(first, keep_history=0)
        assert standin.kv_size() == 0


def test_kv_append_with_the_end_token(switch: Any) -> None:
    whole, first, new = two_turns()
    switch(KV="append", EOS_IN_KV=1)
    with driver() as standin:
        n_new = len(standin.run(first, keep_history=1).ids)
        assert standin.kv_size() == len(first) + n_new + 1
        assert standin.run(new[1:], keep_history=1).ids == ids_without_history(whole)
        assert len(standin.run(first, max_new_tokens=2).ids) == 2


def test_kv_broken_append_counts_right_and_forgets(switch: Any) -> None:
    _, first, new = two_turns()
    switch(KV="broken-append")
    with driver() as standin:
        n_new = len(standin.run(first, keep_history=1).ids)
        before = standin.kv_size()
        assert before == len(first) + n_new
        outcome = standin.run(new, keep_history=1)
        n_fed = len(outcome.ids) - (len(outcome.ids) == 64)  # the last of as many as are allowed is not fed
        assert standin.kv_size() == before + len(new) + n_fed
        assert outcome.ids == ids_without_history(new)


def test_kv_prefix(traced: Any) -> None:
    whole, first, new = two_turns()
    expected = ids_without_history(whole)
    with driver() as standin:
        standin.run(first)
        outcome = standin.run(whole)
        assert outcome.ids == expected
        assert outcome.perf["prefill_tokens"] == len(new)
        again = standin.run(whole)
        assert again.ids == expected
        assert again.perf["prefill_tokens"] == 0
        changed = whole.copy()
        changed[10] += 1
        outcome = standin.run(changed, keep_history=1)
        assert outcome.perf["prefill_tokens"] == len(whole) - 10
        assert outcome.ids == ids_without_history(changed)
        shorter = standin.run(first)
        assert shorter.ids == ids_without_history(first)
        assert [run["reused"] for run in traced()][-2] == 10
        standin.clear()
        assert standin.run(first).perf["prefill_tokens"] == len(first)


def test_kv_prefix_that_ends_at_the_first_generated_token(switch: Any) -> None:
    whole, first, _ = two_turns()
    switch(GENERATED_MATCH=0)
    with driver() as standin:
        standin.run(first)
        assert standin.run(whole).perf["prefill_tokens"] == len(whole) - len(first)


def test_kv_append_and_prefix(switch: Any) -> None:
    whole, first, new = two_turns()
    switch(KV="append+prefix")
    with driver() as standin:
        standin.run(first, keep_history=1)
        appended = standin.run(new, keep_history=1)
        standin.clear()
        standin.run(first)
        resent = standin.run(whole)
    assert appended.ids == resent.ids
    assert appended.perf["prefill_tokens"] == resent.perf["prefill_tokens"] == len(new)


def test_kv_stale_prefix_takes_another_picture_for_the_same(switch: Any) -> None:
    pieces = conversation(1)
    one = embed(pieces, 1)
    images = [i for i, piece in enumerate(pieces) if isinstance(piece, ImageRows)]
    start = sum(piece.n_rows for piece in pieces[: images[0]])
    other = one.copy()
    other[start : start + SPEC.vision.query_num] = noise(SPEC.vision.query_num, 999) * 2
    with driver() as standin:
        standin.run(one)
        assert standin.run(other).perf["prefill_tokens"] > 0
    switch(KV="stale-prefix")
    with driver() as standin:
        first = standin.run(one)
        outcome = standin.run(other)
        assert outcome.perf["prefill_tokens"] == 0
        assert outcome.ids == first.ids
        standin.clear()
        assert standin.run(other).perf["prefill_tokens"] == len(other)


@pytest.mark.parametrize(
    ("family", "version", "appends", "reuses"),
    [
        ("1.1", None, False, False),
        ("1.2.0", None, False, False),
        ("1.2.1b1", None, False, False),
        ("1.2.1-1.2.3", "1.2.1", False, False),
        ("1.2.1-1.2.3", "1.2.2", False, False),
        ("1.2.1-1.2.3", "1.2.3", False, True),
        ("1.3.0", None, False, True),
    ],
)
def test_kv_defaults(family: str, version: str | None, appends: bool, reuses: bool, traced: Any) -> None:
    whole, first, new = two_turns()
    with Driver(library(family, version), family, demo_model()) as standin:
        standin.run(first, keep_history=1)
        assert (standin.run(new, keep_history=1).ids == ids_without_history(whole)) == appends
    with Driver(library(family, version), family, demo_model()) as standin:
        standin.run(first)
        standin.run(whole)
        assert (traced()[-1]["prefilled"] < len(whole)) == reuses


def test_wrong_counts(switch: Any) -> None:
    rows = noise(30)
    with driver(max_new_tokens=1) as standin:
        standin.run(rows)
        switch(KV_COUNT=3, PREFILL_COUNT=-4)
        assert standin.kv_size() == 33
        assert standin.run(np.concatenate([rows, rows[:10]])).perf["prefill_tokens"] == 6
        switch(PREFILL_COUNT="all")
        assert standin.run(rows).perf["prefill_tokens"] == 30


# ---------------------------------------------------------------------------------------------------- answers' oddities


def test_the_end_is_never_met(switch: Any) -> None:
    rows = embed(conversation(0), 0)
    with driver(max_new_tokens=40) as standin:
        normal = standin.run(rows).ids
        standin.clear()
        switch(NO_EOS=1)
        endless = standin.run(rows).ids
    assert len(normal) < 40
    assert len(endless) == 40
    assert endless[: len(normal)] == normal
    assert endless[len(normal)] == TOKENIZER.special["<|im_end|>"]


def test_ignore_eos_token() -> None:
    with driver(max_new_tokens=40, ignore_eos_token=True) as standin:
        assert len(standin.run(embed(conversation(0), 0)).ids) == 40


def babble(standin: Driver) -> Outcome:
    """Tokens drawn so hot that many begin or end within a character."""
    sampling = standin.abi.RKLLMSamplingParam(top_k=0, top_p=1.0, temperature=50.0, repeat_penalty=1.0)
    return standin.run(noise(5), sampling=sampling, max_new_tokens=400)


def cut_off(outcome: Outcome) -> list[int]:
    """The state of each callback whose text ends within a character that the next one goes on with."""
    texts = [(state, text) for state, text, _ in outcome.events if text]
    return [
        state
        for (state, text), (_, following) in itertools.pairwise(texts)
        if text[-1] >= 0x80 and following[0] & 0xC0 == 0x80 and is_character(text, following)
    ]


def is_character(begin: bytes, end: bytes) -> bool:
    start = max(i for i in range(len(begin)) if i == 0 or begin[i] & 0xC0 != 0x80)
    for n in range(1, 4):
        with contextlib.suppress(UnicodeDecodeError):
            return len((begin[start:] + end[:n]).decode()) == 1
    return False


def test_characters_are_joined(switch: Any) -> None:
    switch(NO_EOS=1)
    with driver() as standin:
        outcome = babble(standin)
    waiting = [text for state, text, _ in outcome.events if state == RKLLM_RUN_WAITING]
    assert waiting
    assert set(waiting) == {None}
    assert not cut_off(outcome)
    assert len(outcome.ids) == 400


@pytest.mark.parametrize("how", ["split", "waiting", "silent"])
def test_characters_that_are_cut(how: str, switch: Any) -> None:
    switch(NO_EOS=1)
    with driver(skip_special_token=False) as standin:
        joined = babble(standin)
    switch(UTF8=how)
    with driver(skip_special_token=False) as standin:
        outcome = babble(standin)
    cut = set(cut_off(outcome))
    if how == "silent":
        assert not cut
        assert len(outcome.ids) < len(joined.ids)
    else:
        assert cut == {RKLLM_RUN_NORMAL if how == "split" else RKLLM_RUN_WAITING}
        assert outcome.ids == joined.ids
    assert outcome.text.startswith(joined.text)


@pytest.mark.parametrize("late", [0, 5])
def test_abort(late: int, switch: Any) -> None:
    switch(NO_EOS=1, ABORT_LATE=late)
    with driver(max_new_tokens=100) as standin:

        def abort_at_third(outcome: Outcome) -> int:
            if len(outcome.ids) == 3:
                stopper = threading.Thread(target=standin.abort)
                stopper.start()
                stopper.join()
            return 0

        standin.on_token = abort_at_third
        outcome = standin.run(noise(10))
        assert len(outcome.ids) == 3 + late
        assert outcome.code == 0
        assert not outcome.finished
        standin.on_token = lambda outcome: 0
        assert len(standin.run(noise(10, 1)).ids) == 100  # and the next run is not aborted


@pytest.mark.parametrize(("how", "state"), [("finish", 2), ("error", 3)])
def test_the_state_after_an_abort(how: str, state: int, switch: Any) -> None:
    switch(NO_EOS=1, ABORT_STATE=how)
    with driver() as standin:
        standin.on_token = lambda outcome: 0 * standin.abort()
        assert standin.run(noise(10)).events[-1][0] == state


def test_a_callback_that_pauses() -> None:
    rows = embed(conversation(0), 0)
    with driver() as standin:
        whole = standin.run(rows).ids
    with driver() as standin:
        standin.on_token = lambda outcome: 1
        outcome = standin.run(rows)
        assert outcome.ids == whole[:1]
        assert not outcome.finished
        standin.on_token = lambda outcome: 0
        assert standin.run(noise(5)).ids == whole[1:]  # the old answer goes on


def test_error_state(switch: Any, tmp_path: Path) -> None:
    switch(ERROR=2, ERROR_TOKENS=3, NO_EOS=1, COUNT=tmp_path / "count")
    with driver(max_new_tokens=6) as standin:
        outcomes = [standin.run(noise(10, seed)) for seed in range(3)]
    assert [outcome.code for outcome in outcomes] == [0, -1, 0]
    assert [len(outcome.ids) for outcome in outcomes] == [6, 3, 6]
    assert [outcome.events[-1][0] for outcome in outcomes] == [2, RKLLM_RUN_ERROR, 2]


def test_other_inputs_and_modes_are_refused() -> None:
    with driver() as standin:
        outcome = standin.run(noise(3), mode=1)
        assert outcome.code == -1
        assert standin.run(np.empty((0, SPEC.llm.hidden_size), np.float32)).code == -1


def test_init_that_fails(switch: Any, capfd: pytest.CaptureFixture[str]) -> None:
    switch(INIT="fail")
    assert Driver(library(NEWEST), NEWEST, demo_model()).code == -1
    assert "rkllm init success" not in capfd.readouterr().out
    switch(INIT="null")
    made = Driver(library(NEWEST), NEWEST, demo_model())
    assert made.code == 0
    assert not made.handle
    assert "rkllm init success" in capfd.readouterr().out


def test_counting_over_processes(switch: Any, tmp_path: Path) -> None:
    switch(COUNT=tmp_path / "count", INIT="fail", INIT_AT=2)
    codes = [Driver(library(NEWEST), NEWEST, demo_model()).code for _ in range(3)]
    assert codes == [0, -1, 0]
    switch(COUNT=tmp_path / "fresh", INIT_AT="2+")
    codes = [Driver(library("1.1"), "1.1", demo_model()).code for _ in range(3)]
    assert codes == [0, -1, -1]


def test_slowness(switch: Any) -> None:
    with driver(max_new_tokens=4) as standin:
        switch(PREFILL_MS=2, DECODE_MS=10, NO_EOS=1)
        started = time.perf_counter()
        standin.run(noise(50))
        assert time.perf_counter() - started > 0.140


# ------------------------------------------------------------------------------------------- what only a child survives

_CHILD = """
import sys
import numpy as np
from pathlib import Path
from tests.rkllm_standin.driver import Driver
library, family, model, n_runs, n_rows = sys.argv[1:6]
standin = Driver(Path(library), family, Path(model), max_context_len=128, max_new_tokens=4)
rng = np.random.default_rng(0)
for i in range(int(n_runs)):
    print(f"run {i + 1}", flush=True)
    outcome = standin.run(rng.normal(0, 1, (int(n_rows), 192)).astype(np.float32))
    print(f"code {outcome.code} ids {len(outcome.ids)}", flush=True)
    print("pages", Path("/proc/self/statm").read_text().split()[1])
"""


def program(n_runs: int = 1, n_rows: int = 8, *, before: str = "") -> list[str]:
    text = f"import sys; sys.path[:] = sys.argv[6:]\n{before}\n{_CHILD}"
    arguments = [str(library(NEWEST)), NEWEST, str(demo_model()), str(n_runs), str(n_rows), *sys.path]
    return [sys.executable, "-c", text, *arguments]


def child(
    n_runs: int = 1, n_rows: int = 8, *, before: str = "", said: tuple[str, ...] = ("run ", "code ")
) -> tuple[int, list[str]]:
    """A process that runs the library; its exit code and what it said of its runs."""
    done = subprocess.run(program(n_runs, n_rows, before=before), capture_output=True, text=True, timeout=60)
    return done.returncode, [line for line in done.stdout.splitlines() if line.startswith(said)]


def test_leak(switch: Any) -> None:
    def grown_mb(leak_mb: int) -> float:
        """Over 20 runs, in a process where nothing else comes and goes."""
        switch(LEAK_MB=leak_mb)
        code, lines = child(22, said=("pages ",))
        assert code == 0
        pages = [int(line.split()[1]) for line in lines]
        return (pages[-1] - pages[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    assert grown_mb(0) < 5
    assert 35 < grown_mb(2) < 55


def test_crash_at_a_run(switch: Any) -> None:
    switch(CRASH=2)
    code, lines = child(3)
    assert code == -signal.SIGSEGV
    assert lines[-1] == "run 2"
    switch(CRASH_TOKENS=2, CRASH=1, NO_EOS=1)
    assert child(1)[0] == -signal.SIGSEGV


def test_crashes_counted_over_processes(switch: Any, tmp_path: Path) -> None:
    switch(CRASH=2, COUNT=tmp_path / "count")
    assert child(1)[0] == 0
    assert child(1)[0] == -signal.SIGSEGV
    assert child(1)[0] == 0


def test_segfault_above_a_number_of_rows(switch: Any) -> None:
    switch(SEGFAULT_ROWS=20)
    assert child(2, 20)[0] == 0
    assert child(1, 21)[0] == -signal.SIGSEGV


def test_segfault_beyond_the_context(switch: Any) -> None:
    assert child(1, 129) == (0, ["run 1", "code -1 ids 0"])
    switch(SEGFAULT_CONTEXT=1)
    assert child(1, 124)[0] == 0
    assert child(1, 129)[0] == -signal.SIGSEGV


def test_segfault_beside_librknnrt(switch: Any, tmp_path: Path) -> None:
    (tmp_path / "librknnrt.so").write_bytes(library("1.1").read_bytes())
    beside = f"import ctypes; ctypes.CDLL({str(tmp_path / 'librknnrt.so')!r})"
    assert child(1, before=beside)[0] == 0
    switch(SEGFAULT_RKNN=1)
    assert child(1)[0] == 0
    assert child(1, before=beside)[0] == -signal.SIGSEGV


def test_second_init(switch: Any) -> None:
    twice = "from tests.rkllm_standin.driver import Driver; from pathlib import Path; a = sys.argv\n"
    twice += "first = Driver(Path(a[1]), a[2], Path(a[3]))"
    assert child(1, before=twice)[0] == 0
    switch(SECOND_INIT="segfault")
    assert child(1)[0] == 0
    assert child(1, before=twice)[0] == -signal.SIGSEGV


def test_a_run_that_hangs(switch: Any) -> None:
    switch(HANG=2)
    with subprocess.Popen(program(2), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "run 2\n" in process.stdout
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        finally:
            process.kill()


def test_a_run_without_a_handle_crashes(switch: Any) -> None:
    switch(INIT="null")
    assert child(1)[0] == -signal.SIGSEGV


# -------------------------------------------------------------------------------------------------------- board folder


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library("1.2.0")  # skips where there is no compiler
    monkeypatch.setattr(sys, "argv", ["rkllm_standin", "--family", "1.2.0", "--out", str(tmp_path / "board")])
    main()
    return tmp_path / "board"


def test_the_board_folder_is_complete(board: Path) -> None:
    described = json.loads((board / "mmchat.json").read_text())
    assert described["family"] == "minicpmv-2.6"
    assert {"model.rkllm", "embed_tokens.safetensors", "vision.safetensors", "tokenizer.json"} <= set(
        described["files"]
    )
    for name, stamp in described["files"].items():
        data = (board / name).read_bytes()
        assert stamp == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    table = EmbedTable.open(board / described["embed_table"]["file"])
    assert table.width == described["hidden_size"]
    with Driver(board / "librkllmrt.so", "1.2.0", board / described["llm"]["file"]) as standin:
        rows = table.rows(TOKENIZER.encode("What colour is the circle?"))
        assert standin.run(rows).ids == ids_without_history(rows)
    vision = Checkpoint(board)
    assert {name for name in Checkpoint(SPEC.folder) if name.startswith(("vpm.", "resampler."))} <= set(vision)
