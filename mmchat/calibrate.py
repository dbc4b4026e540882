"""Find out what an RKLLM library does with a model, on the user's own board: what no document tells.

Every probe runs in a child that may crash: a crash is a result.  Results are written to the profile one by one, so
that an interrupted calibration goes on where it was; the last probe that was begun and never ended counts as crashed,
for it may have taken the whole board with it.  From the findings follows the strategy of mmchat.rkllm_embed:

    prefix   where the library reuses a prefix, generated rows included, and answers as if it had not
    append   else, where it can be told what is new only, and answers as if it had been told all
    prefix   else, where it at least reuses rows that it was sent
    resend   else, and wherever anything could not be told

"Answers as if": greedy tokens equal to those of the whole conversation after an emptied cache, where an answer without
what was said before is another one.  Image rows are made up here (rows of the table, changed a little), so no encoder
is needed.  Not probed: the encoder, and whether pictures are bound to their numbers, which is the model's affair.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmchat.child import Handler
from mmchat.engine import Sampling
from mmchat.errors import EngineError, ModelDirError, WorkerError
from mmchat.model_dir import ModelSpec, check_digests, open_model
from mmchat.profile import Profile, state_folder
from mmchat.prompt import ChatTokenizer, Message, Text, render
from mmchat.worker import Worker

Rows = list[Any]  # token ids, and ("image", seed, number of rows)

SILENCE_S = 300.0
_TRIALS = 4
_ANSWER_TOKENS = 40
_EQUAL_TOKENS = 8  # answers are compared so far: later ones differ where sums are taken in another order
_IMAGE_ROWS = 24
_MEMORY_RUNS = 10
_LADDER_FROM = 64


@dataclass(frozen=True)
class Report:
    """facts: of the library.  probes: what was measured.  strategy, rewinds, safe_rows: as the profile has them."""

    library: Path
    profile: Path
    facts: dict[str, Any]
    probes: dict[str, Any]
    strategy: str
    rewinds: bool
    safe_rows: int | None
    advice: tuple[str, ...]


def calibrate(
    spec: ModelSpec,
    library: Path,
    *,
    family: str | None = None,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run all probes that the profile lacks, choose the strategy, and write it to the profile.

    family: the user's word for the library's ABI.  again: forget what was found before.  say: told of progress.

    Raises ModelDirError, EngineError: the model does not load at all.
    """
    profile = Profile.open(spec, library)
    if again:
        profile.update(probes={})
    return _Calibration(spec, library, profile, family, say).run()


class _Calibration:
    def __init__(
        self, spec: ModelSpec, library: Path, profile: Profile, family: str | None, say: Callable[[str], None]
    ) -> None:
        self._spec, self._library, self._profile, self._say = spec, library, profile, say
        self._tokenizer = ChatTokenizer(spec.tokenizer_path)
        config = {"folder": str(spec.folder), "library": str(library), "family": family}
        self._worker = Worker(__name__, config, name="LLM", log_file=state_folder() / "rkllm.log")

    def run(self) -> Report:
        probes: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
            "files": ("reading every file once", self._files),
            "repeats": ("does the same question get the same answer", self._repeats),
            "append": ("does it take what is new alone", self._append),
            "prefix": ("does it reuse what it knows", self._prefix),
            "abort": ("what an abort leaves", self._abort),
            "ladder": ("how long a run may be", self._ladder),
            "memory": ("memory per run", self._memory),
            "speed": ("speed", self._speed),
        }
        try:
            self._say("loading the model")
            facts = self._worker.ready()
            for number, (name, (title, probe)) in enumerate(probes.items(), 1):
                found = self._profile.probes.get(name)
                if found is not None and "begun" not in found:
                    continue
                self._say(f"[{number}/{len(probes)}] {title}")
                self._keep(name, self._result(name, probe, found))
        finally:
            self._worker.close()
        return self._conclude(facts)

    def _result(self, name: str, probe: Callable[[], dict[str, Any]], found: dict[str, Any] | None) -> dict[str, Any]:
        if found is not None and name != "ladder":
            return {"crashed": "the last attempt never ended"}
        if found is None:
            self._keep(name, {"begun": time.time()})
        try:
            return probe()
        except KeyboardInterrupt:
            if name != "ladder":
                self._profile.update(probes={k: v for k, v in self._profile.probes.items() if k != name})
            raise
        except WorkerError as error:
            return {"crashed": str(error)}
        except EngineError as error:
            return {"failed": str(error)}

    def _keep(self, name: str, result: dict[str, Any]) -> None:
        self._profile.update(probes={**self._profile.probes, name: result})

    # Probes

    def _files(self) -> dict[str, Any]:
        try:
            check_digests(self._spec, lambda name: self._say(f"      {name}"))
        except ModelDirError as error:
            return {"good": False, "why": str(error)}
        return {"good": True}

    def _repeats(self) -> dict[str, Any]:
        wanted = [self._ask(self._turn(seed)) for seed in range(_TRIALS)]
        return {"good": [self._ask(self._turn(seed)) for seed in range(_TRIALS)] == wanted}

    def _append(self) -> dict[str, Any]:
        """Two turns, the second as its new rows alone, against the same two turns sent whole."""
        result: dict[str, Any] = {"works": False, "end_in_kv": None, "trials": 0, "telling": 0}
        for seed in range(3 * _TRIALS):
            first = self._turn(seed)
            told = self._run(first, keep=True)
            if told["kv_rows"] is None:
                return {**result, "why": "the library cannot tell how many rows are cached"}
            if not told["ended"]:
                continue
            n_fed = told["kv_rows"] - told["n_rows"] - len(told["ids"])
            if n_fed not in (0, 1):
                return {**result, "why": f"{told['kv_rows']} rows are cached after {told['n_rows']} were sent"}
            result["end_in_kv"] = n_fed == 1
            second = self._turn(seed, told["ids"])
            new = _from(second, told["kv_rows"])
            appended = self._run(new, keep=True, clear=False)
            whole, alone = self._ask(second), self._ask(new)
            result["trials"] += 1
            result["telling"] += whole != alone
            if appended["ids"][:_EQUAL_TOKENS] != whole:
                return {**result, "why": "an appended turn is answered otherwise than the whole conversation"}
            if result["telling"] == _TRIALS:
                return {**result, "works": True}
        return {**result, "why": "too few answers depend on what was said before"}

    def _prefix(self) -> dict[str, Any]:
        """Conversations that grow, and ones that differ in a picture, without emptying the cache between them."""
        result: dict[str, Any] = {"works": False, "generated": True, "rewinds": True, "telling": 0}
        for seed in range(_TRIALS):
            first = self._turn(seed)
            told = self._run(first)
            second = self._turn(seed, told["ids"])
            grown = self._run(second, clear=False)
            if grown["prefilled"] is None:
                return {**result, "why": "the library cannot tell how many rows it prefilled"}
            if grown["ids"][:_EQUAL_TOKENS] != self._ask(second):
                return {**result, "why": "a conversation that grew is answered otherwise than after an emptied cache"}
            n_new = grown["n_rows"] - told["n_rows"]
            if grown["prefilled"] > n_new:
                return {**result, "why": f"{grown['prefilled']} rows were prefilled where {n_new} were new"}
            if grown["prefilled"] > n_new - len(told["ids"]) + 1:
                result["generated"] = False
        for seed in range(3 * _TRIALS):
            before, after = self._turn(seed), self._turn(seed, image=seed + 1000)
            old, new = self._ask(before), self._ask(after)
            self._run(before)
            changed = self._run(after, clear=False)
            result["telling"] += old != new
            n_same = next(i for i, item in enumerate(before) if not isinstance(item, int))
            if changed["ids"][:_EQUAL_TOKENS] != new or changed["prefilled"] < changed["n_rows"] - n_same:
                result["rewinds"] = False
                break
            if result["telling"] == _TRIALS:
                break
        result["rewinds"] = result["rewinds"] and result["telling"] > 0
        return {**result, "works": True}

    def _abort(self) -> dict[str, Any]:
        wanted = self._ask(self._turn(1))
        told = self._run(self._turn(0), abort_after=1, max_new=200)
        return {
            "seconds": told["abort_s"],
            "finish_called": told["finished"],
            "kv_rows": told["kv_rows"],
            "usable": self._ask(self._turn(1)) == wanted,
        }

    def _ladder(self) -> dict[str, Any]:
        """Longer and longer runs to the first crash, then between the last two; each is written before it begins."""
        state = dict(self._profile.probes["ladder"])
        state.setdefault("worked", [])
        state.setdefault("crashed", [])
        if "trying" in state:
            state["crashed"].append(state.pop("trying"))
        longest = self._spec.context_rows - 1
        lengths = [*_rungs(longest)]
        while True:
            works, crashes = max(state["worked"], default=0), min(state["crashed"], default=None)
            todo = [n for n in lengths if n > works and (crashes is None or n < crashes)]
            if not todo and crashes is not None and crashes - works > max(1, crashes // 64):
                todo = [(works + crashes) // 2]
            if not todo:
                break
            length = todo[0]
            try:
                self._worker.ready()  # a crash may leave the NPU without memory for another start
            except EngineError as error:
                state["stopped"] = str(error)
                break
            self._say(f"      {length} rows")
            self._keep("ladder", {**state, "trying": length})
            try:
                told = self._run(random.Random(length).choices(range(256), k=length), max_new=1)
            except (WorkerError, EngineError):
                state["crashed"].append(length)
            else:
                state["worked"].append(length)
                state["rows_per_s"] = round(length / max(told["prefill_s"], 1e-6), 1)
        state.pop("begun", None)
        return state

    def _memory(self) -> dict[str, Any]:
        used = [self._run(self._turn(0), max_new=4)["rss_mb"] for _ in range(_MEMORY_RUNS + 2)]
        return {"mb_per_run": round((used[-1] - used[1]) / _MEMORY_RUNS, 2), "mb": round(used[-1], 1)}

    def _speed(self) -> dict[str, Any]:
        told = [self._run(self._turn(seed)) for seed in range(_TRIALS)]
        n_tokens, seconds = sum(len(t["ids"]) for t in told), sum(t["generate_s"] for t in told)
        rows = self._run(random.Random(0).choices(range(256), k=min(256, self._spec.context_rows // 2)), max_new=1)
        return {
            "prefill_rows_per_s": round(rows["n_rows"] / max(rows["prefill_s"], 1e-6), 1),
            "decode_tokens_per_s": round(n_tokens / max(seconds, 1e-6), 2),
        }

    # What they are made of

    def _turn(self, seed: int, answer: list[int] | None = None, *, image: int | None = None) -> Rows:
        """A question about a made-up picture; with its answer, a second question follows."""
        colour = ("red", "blue", "green", "white")[seed % 4]
        messages = [Message("user", (Text(f"What colour is the circle? {colour} {seed}"),))]
        if answer is not None:
            messages += [
                Message("assistant", ids=tuple(answer)),
                Message("user", (Text("What colour is the background?"),)),
            ]
        ids = render(messages, self._tokenizer, query_num=1, use_image_id=False).ids
        at = ids.index(self._tokenizer.special["<|im_start|>"], 1) + 2  # behind the system prompt and the user's tag
        return [*ids[:at], ("image", seed if image is None else image, _IMAGE_ROWS), *ids[at:]]

    def _ask(self, rows: Rows) -> list[int]:
        """The beginning of the answer that an emptied cache gives."""
        ids: list[int] = self._run(rows)["ids"][:_EQUAL_TOKENS]
        return ids

    def _run(self, rows: Rows, **options: Any) -> dict[str, Any]:
        """One rkllm_run; see _Child.handle."""
        for event in self._worker.call({"rows": rows, **options}, silence_s=SILENCE_S):
            return event
        raise EngineError("the run told nothing")

    def _conclude(self, facts: dict[str, Any]) -> Report:
        probes = self._profile.probes
        repeats = probes["repeats"].get("good", False)
        append, prefix, ladder = probes["append"], probes["prefix"], probes["ladder"]
        reuses = repeats and prefix.get("works", False)
        strategy = "resend"
        if reuses and prefix["generated"]:
            strategy = "prefix"
        elif repeats and append.get("works", False):
            strategy = "append"
        elif reuses:
            strategy = "prefix"
        rewinds = strategy == "prefix" and prefix["rewinds"]
        crashed, worked = sorted(ladder.get("crashed", [])), max(ladder.get("worked", []), default=0)
        safe_rows = max((n for n in ladder["worked"] if n < crashed[0]), default=1) if crashed else None
        self._profile.update(
            strategy=strategy,
            rewinds=rewinds,
            end_in_kv=append.get("end_in_kv"),
            safe_rows=safe_rows,
            worked_rows=worked,
            crashed_rows=crashed,
        )
        advice = tuple(_advice(facts, probes, strategy, rewinds, safe_rows))
        return Report(self._library, self._profile.path, facts, dict(probes), strategy, rewinds, safe_rows, advice)


def _rungs(longest: int) -> list[int]:
    """Powers of two, what lies between them at first, and their neighbours."""
    middles = [32 * k for k in (3, 5, 6, 7)]
    powers = [_LADDER_FROM << i for i in range(20)]
    rungs = {n + d for n in (*middles, *powers) for d in (-1, 0, 1)} | {longest}
    return sorted(n for n in rungs if 1 <= n <= longest)


def _from(rows: Rows, n: int) -> Rows:
    """What comes after the first n rows; they end at a token."""
    at = 0
    for i, item in enumerate(rows):
        if at >= n:
            return rows[i:]
        at += 1 if isinstance(item, int) else int(item[2])
    return []


def _advice(
    facts: dict[str, Any], probes: dict[str, Any], strategy: str, rewinds: bool, safe_rows: int | None
) -> Iterator[str]:
    if not probes["files"].get("good", True):
        yield probes["files"]["why"]
    for name, result in probes.items():
        if "crashed" in result and name != "ladder":
            yield f"the probe {name!r} crashed ({result['crashed']}): what it would have found counts as not working"
    if not probes["repeats"].get("good", False):
        yield "the same question got different answers: nothing can be told from answers here"
    if strategy == "resend":
        yield f"every turn prefills the whole conversation: RKLLM {facts['version']} keeps nothing to rely on"
    elif strategy == "append":
        yield "a turn prefills what is new; an edited or regenerated turn prefills everything"
    elif not rewinds:
        yield "pictures of equal size are mixed up without emptying the cache: an edited turn prefills everything"
    if "stopped" in probes["ladder"]:
        yield f"the model did not load again after a crash ({probes['ladder']['stopped']}): restart the board"
    if safe_rows is not None:
        yield f"longer runs than {safe_rows} rows crash and are refused: fewer slices, shorter conversations"
    growth = probes["memory"].get("mb_per_run", 0)
    if growth > 0.5:
        yield f"every run loses {growth} MB: end mmchat now and then"
    if not probes["abort"].get("usable", False):
        yield "after an abort the answers are wrong: let answers end"


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    """In the child: load the model, run what it is told."""
    import os

    from mmchat.rkllm_embed import load_board

    os.environ.setdefault("RKLLM_LOG_LEVEL", "1")
    spec = open_model(config["folder"])
    started = time.perf_counter()
    model, table, tokenizer, found = load_board(
        spec,
        Path(config["library"]),
        family=config["family"],
        context_rows=spec.context_rows,
        sampling=Sampling(),  # greedy
    )
    facts = {
        "family": found.family,
        "version": found.version or found.family,
        "evidence": list(found.evidence),
        "load_s": round(time.perf_counter() - started, 2),
    }
    return facts, _Child(model, table, tokenizer).handle


class _Child:
    def __init__(self, model: Any, table: Any, tokenizer: ChatTokenizer) -> None:
        self._model, self._table, self._tokenizer = model, table, tokenizer

    def handle(self, request: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """rows; keep: keep_history (False); clear: first (True); max_new; abort_after: so many tokens."""
        from mmchat.rkllm_model import Generated, Returned

        embeds = self._embeds(request["rows"])
        max_new = request.get("max_new", _ANSWER_TOKENS)
        limit = request.get("abort_after", max_new)
        if request.get("clear", True):
            self._model.clear()
        ids: list[int] = []
        ended = missed = False  # missed: the library goes on behind the end token
        aborted_at = 0.0
        started = prefilled = time.perf_counter()

        def enough() -> bool:
            nonlocal aborted_at
            # A library that knows max_new_tokens of this run ends it by itself; its cache stays known.
            full = not ended and len(ids) >= limit and (limit < max_new or not self._model.family.run_sampling)
            over = full or missed
            if over and not aborted_at:
                aborted_at = time.perf_counter()
            return over or should_stop()

        returned: Returned | None = None
        for message in self._model.run(
            embeds,
            keep_history=request.get("keep", False),
            sampling=Sampling(max_new_tokens=max_new),
            should_stop=enough,
        ):
            if isinstance(message, Generated):
                prefilled = time.perf_counter() if prefilled == started else prefilled
                if ended:
                    missed = True
                elif message.token_id in self._tokenizer.stop_ids:
                    ended = True
                else:
                    ids.append(message.token_id)
            else:
                returned = message
        now = time.perf_counter()
        if returned is None or ((returned.failed or returned.code) and not returned.aborted):
            raise EngineError(f"rkllm_run failed (code {returned.code if returned else None})")
        yield {
            "ids": ids[:max_new],
            "ended": ended and returned.finished and not returned.aborted,
            "finished": returned.finished,
            "n_rows": len(embeds),
            "prefilled": returned.perf.prefilled if returned.perf else None,
            "kv_rows": self._model.kv_rows(),
            "prefill_s": prefilled - started,
            "generate_s": now - prefilled,
            "abort_s": round(now - aborted_at, 3) if aborted_at else None,
            "rss_mb": _rss_mb(),
        }

    def _embeds(self, rows: Rows) -> Any:
        import numpy as np

        parts = []
        for item in rows:
            if isinstance(item, int):
                parts.append(self._table.rows([item]))
            else:
                _, seed, n = item
                ids = random.Random(seed).choices(range(min(256, self._table.n_ids)), k=n)
                parts.append(self._table.rows(ids) * np.float32(1.001))  # no token's row to the bit
        return np.ascontiguousarray(np.concatenate(parts))


def _rss_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
