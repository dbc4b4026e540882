"""The RKLLM engine on the stand-in library: the contract in every family and strategy, and what faults become."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmchat.checkpoint import Checkpoint
from mmchat.embed_table import EmbedTable
from mmchat.engine import Done, Event, Piece, Prefill, Sampling, Token, Tokens
from mmchat.errors import ContextFull, EngineError, SamplingFixed
from mmchat.model_dir import open_model
from mmchat.openvino_engine import OpenVinoEngine
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_abi import FAMILIES
from mmchat.rkllm_embed import Findings, RkllmEngine, Strategy, _believable
from mmchat.rkllm_model import Perf, RkllmModel
from mmchat.store import Store
from tests.contract_engine import CONTEXT_ROWS, GREEDY, Answer, EngineContract, Kit, rewinds, run
from tests.fakes import eventually, never
from tests.rkllm_standin.build import demo_model, library

SPEC = open_model("demo")
TABLE = EmbedTable.open(SPEC.embed_table_path)
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


class Loaded:
    """The engine of one family, loaded again where its library must be for other sampling: what LlmClient does."""

    def __init__(self, family: str, store: Store, strategy: Strategy, safe_rows: int | None = None) -> None:
        self._family, self._store = family, store
        self._findings = Findings(strategy, rewinds=True, safe_rows=safe_rows, chunks=True)
        self._model: RkllmModel | None = None
        self.context_rows = CONTEXT_ROWS
        self.load()

    def load(self, sampling: Sampling = GREEDY) -> Loaded:
        self.close()
        self._model = RkllmModel(
            library(self._family),
            FAMILIES[self._family],
            demo_model(),
            context_rows=CONTEXT_ROWS + 32,
            hidden_size=TABLE.width,
            n_tokens=TABLE.n_ids,
            sampling=sampling,
        )
        self.engine = RkllmEngine(
            self._model, TABLE, TOKENIZER, self._store.get, context_rows=CONTEXT_ROWS, findings=self._findings
        )
        return self

    def close(self) -> None:
        if self._model is not None:
            self._model.close()

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        try:
            yield from self.engine.generate(pieces, sampling, should_stop, resume_ids=resume_ids)
        except SamplingFixed:
            self.load(sampling)
            yield from self.engine.generate(pieces, sampling, should_stop, resume_ids=resume_ids)


def reuse_of(strategy: Strategy, family: str) -> Callable[[Answer, int, int], int]:
    """What each strategy reuses, as Kit.reused wants it."""

    def reused(before: Answer, n_common: int, n_rows: int) -> int:
        aborted = before.done.reason == "length" and not FAMILIES[family].run_sampling
        if strategy == "resend" or aborted:
            return 0
        held = before.done.n_prompt + before.done.n_new - (before.done.reason == "length")
        if strategy == "append":
            return n_common if held <= n_common < n_rows else 0
        return rewinds(before, n_common, n_rows)

    return reused


# (family, strategy, the library's cache, the longest run that does not crash)
CASES: list[tuple[str, Strategy, str, int | None]] = [
    ("1.1", "resend", "", None),
    ("1.2.0", "resend", "", None),
    ("1.2.1b1", "resend", "", None),
    ("1.2.1-1.2.3", "append", "append", None),
    ("1.3.0", "append", "append", 64),
    ("1.3.0", "prefix", "", None),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(str(one) for one in case if one))
def loaded(request: pytest.FixtureRequest, store: Store) -> Iterator[Loaded]:
    family, strategy, kv, safe_rows = request.param
    with pytest.MonkeyPatch.context() as patch:
        if kv:
            patch.setenv("RKLLM_STANDIN_KV", kv)
        if safe_rows:
            patch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", str(safe_rows))
        engine = Loaded(family, store, strategy, safe_rows)
        engine.case = request.param  # type: ignore[attr-defined]
        yield engine
        engine.close()


class TestRkllm(EngineContract):
    @pytest.fixture
    def kit(self, store: Store, loaded: Any) -> Kit:
        family, strategy, *_ = loaded.case
        return Kit(loaded.load, TOKENIZER, store, TABLE.width, reuse_of(strategy, family), repeats=False)


@pytest.fixture(scope="module")
def openvino(store: Store) -> OpenVinoEngine:
    return OpenVinoEngine(
        Checkpoint(SPEC.folder), SPEC.llm, TABLE, TOKENIZER, store.get, context_rows=CONTEXT_ROWS, n_threads=1
    )


@pytest.fixture
def load(store: Store) -> Iterator[Callable[..., Loaded]]:
    made: list[Loaded] = []

    def make(family: str, strategy: Strategy = "resend", safe_rows: int | None = None) -> Loaded:
        made.append(Loaded(family, store, strategy, safe_rows))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def conversation(engine: Any, store: Store, n_turns: int = 5) -> tuple[list[list[int]], int, int]:
    """Turns with a picture each: the answers, rows prefilled in all, and rows of the last prompt."""
    kit = Kit(lambda: engine, TOKENIZER, store, TABLE.width)
    pieces: list[Piece] = []
    answers, n_prefilled, n_before = [], 0, 0
    end = TOKENIZER.special["<|im_end|>"]
    for turn in range(n_turns):
        pieces += [kit.words(9, seed=turn), kit.image(6), kit.words(7, seed=100 + turn)]
        answer = run(engine, pieces)
        answers.append(answer.ids)
        n_prefilled += answer.done.n_prefilled
        pieces += [Tokens((*answer.done.ids, end))]
        n_before = answer.done.n_prompt
    return answers, n_prefilled, n_before


KV_RULES = ("none", "append", "broken-append", "prefix", "append+prefix", "stale-prefix")
SWITCHES: dict[str, dict[str, str]] = {
    "as released": {},
    "end token kept": {"EOS_IN_KV": "1"},
    "generated rows never match": {"GENERATED_MATCH": "0"},
    "end token missed": {"NO_EOS": "1"},
    "late abort": {"ABORT_LATE": "3"},
    "prefill counted as all": {"PREFILL_COUNT": "all"},
    "prefill miscounted": {"PREFILL_COUNT": "-5"},
    "cache miscounted": {"KV_COUNT": "7"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_openvinos_whatever_the_cache_does(
    family: str, load: Any, store: Store, openvino: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _, n_all = conversation(openvino, store)
    for rule in KV_RULES:
        monkeypatch.setenv("RKLLM_STANDIN_KV", rule)
        found, n_prefilled, _ = conversation(load(family), store)
        assert found == wanted, rule
        assert n_prefilled > n_all


@pytest.mark.parametrize(("strategy", "rule"), [("resend", ""), ("append", "append"), ("prefix", "prefix")])
@pytest.mark.parametrize("family", ["1.2.1-1.2.3", "1.3.0"])
def test_greedy_answers_survive_every_switch(
    family: str, strategy: Strategy, rule: str, load: Any, store: Store, openvino: OpenVinoEngine, monkeypatch: Any
) -> None:
    wanted, _, n_all = conversation(openvino, store, 3)
    if rule:
        monkeypatch.setenv("RKLLM_STANDIN_KV", rule)
    for what, switches in SWITCHES.items():
        with monkeypatch.context() as patch:
            for name, value in switches.items():
                patch.setenv(f"RKLLM_STANDIN_{name}", value)
            engine = load(family, strategy)
            found, n_prefilled, _ = conversation(engine, store, 3)
            assert found == wanted, what
            if what == "as released":
                # Answers are cut by max_new_tokens here, which older libraries end by an abort; then all is sent again.
                is_reused = strategy != "resend" and FAMILIES[family].run_sampling
                assert (n_prefilled < n_all) == is_reused, what


def test_a_stale_prefix_is_cleared_before_it_can_hit(
    store: Store, openvino: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the finding that the library notices other image rows, an edit empties the cache first."""
    monkeypatch.setenv("RKLLM_STANDIN_KV", "stale-prefix")
    loaded = Loaded("1.3.0", store, "prefix")
    assert loaded._model is not None
    careful = RkllmEngine(
        loaded._model, TABLE, TOKENIZER, store.get, context_rows=CONTEXT_ROWS, findings=Findings("prefix")
    )
    kit = Kit(lambda: careful, TOKENIZER, store, TABLE.width)
    for _ in range(4):
        pieces: list[Piece] = [kit.words(9), kit.image(9), kit.words(7, seed=1)]
        assert run(careful, pieces).ids == run(openvino, pieces).ids
    loaded.close()


def test_a_run_beyond_the_safe_length_is_refused_before_the_library_sees_it(
    load: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "64")
    engine, kit = load("1.3.0", safe_rows=64), Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    run(engine, [kit.words(64)])
    with pytest.raises(ContextFull) as caught:
        run(engine, [kit.words(65)])
    assert (caught.value.n_prompt, caught.value.limit) == (65, 64)
    run(engine, [kit.words(64)])


@pytest.mark.parametrize("end_in_kv", ["", "1"])
def test_with_append_a_long_prompt_is_fed_in_several_runs(
    end_in_kv: str,
    load: Any,
    store: Store,
    openvino: OpenVinoEngine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Answers, counts and the cache are those of one run; no run is longer than what is safe."""
    kit = Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    first: list[Piece] = [kit.words(90), kit.image(40), kit.words(33, seed=1)]
    more = kit.words(70, seed=2)
    whole = run(openvino, first)
    grown: list[Piece] = [*first, Tokens((*whole.done.ids, TOKENIZER.special["<|im_end|>"])), more]
    monkeypatch.setenv("RKLLM_STANDIN_KV", "append")
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_ROWS", "64")
    monkeypatch.setenv("RKLLM_STANDIN_TRACE", str(tmp_path / "trace"))
    if end_in_kv:
        monkeypatch.setenv("RKLLM_STANDIN_EOS_IN_KV", end_in_kv)
    engine = load("1.3.0", "append", safe_rows=64)
    found = run(engine, first)
    assert (found.ids, found.done.n_prefilled) == (whole.ids, 163)
    assert [prefill.done for prefill in found.prefills] == [0, 64, 128, 163]
    again = run(engine, grown)
    assert again.ids == run(openvino, grown).ids
    assert again.done.n_prefilled == again.done.n_prompt - found.done.n_prompt - found.done.n_new + (
        whole.done.reason == "length"
    ) - (bool(end_in_kv) and whole.done.reason == "stop")
    assert engine.engine.strategy == "append"
    runs = [
        call for line in (tmp_path / "trace").read_text().splitlines() if (call := json.loads(line))["call"] == "run"
    ]
    assert [one["rows"] for one in runs][:3] == [64, 64, 35]
    assert "once more" not in capfd.readouterr().err


def test_a_part_whose_dropped_token_is_kept_is_fed_again_with_other_cuts(
    load: Any, store: Store, openvino: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    kit = Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    question, ends_here = next(
        (words, answer)
        for words in (kit.words(60, seed=seed) for seed in range(100))
        if (answer := run(openvino, [words])).done.reason == "stop"
    )
    monkeypatch.setenv("RKLLM_STANDIN_KV", "append")
    monkeypatch.setenv("RKLLM_STANDIN_EOS_IN_KV", "1")
    n_rows = ends_here.done.n_prompt + ends_here.done.n_new  # behind them comes the end token
    engine = load("1.3.0", "append", safe_rows=n_rows)
    pieces: list[Piece] = [question, Tokens(ends_here.done.ids), kit.words(50, seed=3)]
    assert run_loosely(engine, pieces) == run(openvino, pieces).ids
    assert (
        f"{n_rows + 1} rows are cached where {n_rows} were sent; once more with shorter runs" in capfd.readouterr().err
    )
    assert engine.engine.strategy == "append"
    monkeypatch.setenv("RKLLM_STANDIN_KV_COUNT", "5")
    with pytest.raises(ContextFull):
        run(engine, [kit.words(n_rows + 1, seed=4)])
    assert engine.engine.strategy == "resend"


def run_loosely(engine: Any, pieces: Sequence[Piece]) -> list[int]:
    """The answer's tokens; progress may begin anew."""
    return [event.id for event in engine.generate(pieces, GREEDY, never) if isinstance(event, Token)]


@pytest.mark.parametrize(("family", "strategy", "kv"), [("1.2.1-1.2.3", "append", "append"), ("1.3.0", "prefix", "")])
def test_without_a_library_that_ends_runs_itself_a_long_prompt_is_refused(
    family: str, strategy: Strategy, kv: str, load: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kv:
        monkeypatch.setenv("RKLLM_STANDIN_KV", kv)
    engine, kit = load(family, strategy, safe_rows=64), Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    with pytest.raises(ContextFull):
        run(engine, [kit.words(65)])
    run(engine, [kit.words(64)])


def test_an_answer_can_be_cancelled_between_the_runs_of_its_prompt(
    load: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKLLM_STANDIN_KV", "append")
    engine, kit = load("1.3.0", "append", safe_rows=64), Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    stop: list[bool] = []
    events: list[Any] = []
    for event in engine.generate([kit.words(200)], GREEDY, lambda: bool(stop)):
        events.append(event)
        if isinstance(event, Prefill) and event.done == 128:
            stop.append(True)
    assert [event.done for event in events[:-1]] == [0, 64, 128]
    assert events[-1].reason == "cancelled"
    assert run(engine, [kit.words(200)]).done.n_prefilled == 200


def test_a_cancel_that_comes_when_the_library_has_finished_costs_no_strategy(
    load: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that are not taken any more are no miscount of the library's."""
    monkeypatch.setenv("RKLLM_STANDIN_KV", "append")
    loaded, kit = load("1.3.0", "append"), Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    stop: list[bool] = []
    events: list[Event] = []
    for event in loaded.generate([kit.words(20)], Sampling(max_new_tokens=12), lambda: bool(stop)):
        events.append(event)
        if isinstance(event, Token) and not stop:
            eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "rkllm_run"])
            stop.append(True)
    assert sum(isinstance(event, Token) for event in events) == 1
    assert isinstance(events[-1], Done)
    assert events[-1].reason == "cancelled"  # by no means "stop": what the library had more to say is not told
    assert loaded.engine.strategy == "append"
    assert run(loaded, [kit.words(20)]).done.n_prefilled == 20


def test_the_librarys_own_seconds_are_told_where_they_can_be_true(load: Any, store: Store, monkeypatch: Any) -> None:
    kit = Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    monkeypatch.setenv("RKLLM_STANDIN_PREFILL_MS", "2")
    done = run(load("1.2.1-1.2.3"), [kit.words(50)]).done
    assert 0.1 <= done.prefill_s < 60  # not milliseconds
    assert _believable(Perf(50, 0.5, 1.0), (0.6, 1.1)) == (0.5, 1.0)
    for told in (Perf(50, 0.0, 0.0), Perf(50, -1.0, 2.0), Perf(50, 9.0, 1.0), Perf(50, float("nan"), 1.0)):
        assert _believable(told, (0.6, 1.1)) == (0.6, 1.1)


def test_sampling_that_only_loading_sets_is_told(load: Any, store: Store) -> None:
    kit = Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    for family in FAMILIES:
        engine = load(family).engine
        events = engine.generate([kit.words(9)], Sampling(max_new_tokens=2, temperature=0.7), never)
        if FAMILIES[family].run_sampling:
            assert len(list(events)) > 2
            continue
        with pytest.raises(SamplingFixed, match=f"RKLLM {family} sets temperature, top_k only when"):
            list(events)
        list(engine.generate([kit.words(9)], Sampling(max_new_tokens=2, top_k=7), never))  # greedy all the same


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"INIT": "fail"}, "rkllm_init returned -1 for"),
        ({"INIT": "null"}, "rkllm_init returned 0 and no handle for"),
    ],
)
def test_a_model_that_does_not_load(load: Any, monkeypatch: Any, switches: dict[str, str], message: str) -> None:
    for name, value in switches.items():
        monkeypatch.setenv(f"RKLLM_STANDIN_{name}", value)
    with pytest.raises(EngineError, match=message):
        load("1.2.1-1.2.3")


def test_a_run_that_fails_leaves_the_engine_usable(
    load: Any, store: Store, openvino: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kit = Kit(never, TOKENIZER, store, TABLE.width)  # type: ignore[arg-type]
    monkeypatch.setenv("RKLLM_STANDIN_COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("RKLLM_STANDIN_ERROR", "2")
    engine = load("1.3.0", "prefix")
    run(engine, [kit.words(20)])
    with pytest.raises(EngineError, match="rkllm_run failed"):
        run(engine, [kit.words(30)])
    assert run(engine, [kit.words(30)]).ids == run(openvino, [kit.words(30)]).ids
