"""The RKLLM engine on the stand-in library: the contract in every family and strategy, and what faults become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmchat.checkpoint import Checkpoint
from mmchat.embed_table import EmbedTable
from mmchat.engine import Event, Piece, Sampling, Tokens
from mmchat.errors import ContextFull, EngineError, SamplingFixed
from mmchat.model_dir import open_model
from mmchat.openvino_engine import OpenVinoEngine
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_abi import FAMILIES
from mmchat.rkllm_embed import Findings, RkllmEngine, Strategy
from mmchat.rkllm_model import RkllmModel
from mmchat.store import Store
from tests.contract_engine import CONTEXT_ROWS, GREEDY, Answer, EngineContract, Kit, rewinds, run
from tests.fakes import never
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
        self._findings = Findings(strategy, rewinds=True, safe_rows=safe_rows)
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


CASES: list[tuple[str, Strategy, str]] = [
    ("1.1", "resend", ""),
    ("1.2.0", "resend", ""),
    ("1.2.1b1", "resend", ""),
    ("1.2.1-1.2.3", "append", "append"),
    ("1.3.0", "prefix", ""),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(filter(None, case)))
def loaded(request: pytest.FixtureRequest, store: Store) -> Iterator[Loaded]:
    family, strategy, kv = request.param
    with pytest.MonkeyPatch.context() as patch:
        if kv:
            patch.setenv("RKLLM_STANDIN_KV", kv)
        engine = Loaded(family, store, strategy)
        engine.case = request.param  # type: ignore[attr-defined]
        yield engine
        engine.close()


class TestRkllm(EngineContract):
    @pytest.fixture
    def kit(self, store: Store, loaded: Any) -> Kit:
        family, strategy, _ = loaded.case
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
    """Turns with a picture each, the answers, rows prefilled and rows that were new."""
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
    "characters split": {"UTF8": "split"},
    "characters waiting": {"UTF8": "waiting"},
    "tokens without callback": {"UTF8": "silent"},
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
            if what == "tokens without callback":  # the text is whole; the tokens are not known
                continue
            assert found == wanted, what
            print(f"{family:12} {strategy:7} {what:28} now {engine.engine.strategy:7} x{n_prefilled / n_all:.2f}")
            if what == "as released":
                ended = all(len(ids) < GREEDY.max_new_tokens for ids in found)
                assert (n_prefilled == n_all) == (strategy != "resend") or not ended


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
