"""Find out what an RKLLM library does with a model, on the user's own board: what no document tells.

Every probe (mmchat.probes, probe_ladder, probe_pictures) runs in a child that may crash: a crash is a result.  Results
are written to the profile one by one, so that an interrupted calibration goes on where it was; a probe that was begun
twice and never ended counts as crashed, for it may have taken the whole board with it.  One that failed otherwise (a
package that is missing) runs again the next time; after a damaged file was replaced, all do.  From the findings follows
the strategy of mmchat.rkllm_embed:

    append   where long runs crash, and prompts can be fed in several
    prefix   else, where the library reuses a prefix, generated rows included, and answers as if it had not
    append   else, where it can be told what is new only, and answers as if it had been told all
    prefix   else, where it at least reuses rows that it was sent
    resend   else, wherever anything could not be told, and where pictures were mixed up by what was chosen

What a run costs on the NPU beside time, and memory that is not the process's own, is not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmchat import probes as cache
from mmchat.errors import MmchatError, ModelDirError, WorkerError
from mmchat.model_dir import ModelSpec, check_digests
from mmchat.probe_ladder import ladder
from mmchat.probe_pictures import Sight, encoder, pictures
from mmchat.probe_runs import Runs
from mmchat.profile import Profile, state_folder
from mmchat.worker import Worker

_PROBES = ("files", "abort", "repeats", "append", "prefix", "speed", "ladder", "memory", "encoder", "pictures")
_CHOOSING = ("repeats", "append", "prefix", "ladder")  # the strategy follows from these


@dataclass(frozen=True)
class Report:
    """facts: of the library.  probes: what was measured.  profile: what follows from it, as it was written."""

    library: Path
    profile: Profile
    facts: dict[str, Any]
    probes: dict[str, Any]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """Progress: the number of a probe, of how many, and which part of it is done.  detail: within it."""

    number: int
    of: int
    title: str
    detail: str = ""
    part: float = 0.0

    def __str__(self) -> str:
        return f"[{self.number}/{self.of}] {self.title}{': ' if self.detail else ''}{self.detail}"


def calibrate(
    spec: ModelSpec,
    library: Path,
    *,
    family: str | None = None,
    again: bool = False,
    say: Callable[[Step], None] = lambda step: None,
    sight: Sight | None = None,
) -> Report:
    """Run all probes that the profile lacks, choose the strategy, and write it to the profile.

    family: the user's word for the library's ABI.  again: forget what was found before.  say: told of progress.
    sight: the encoder; without it what needs pictures is left for the next time.

    Raises ModelDirError, EngineError: the model does not load at all.
    """
    profile = Profile.open(spec, library)
    if again:
        profile.update(probes={})
    return _Calibration(spec, library, profile, family, say, sight).run()


class _Calibration:
    def __init__(
        self,
        spec: ModelSpec,
        library: Path,
        profile: Profile,
        family: str | None,
        say: Callable[[Step], None],
        sight: Sight | None,
    ) -> None:
        self._spec, self._library, self._profile, self._say, self._sight = spec, library, profile, say, sight
        config = {
            "folder": str(spec.folder),
            "library": str(library),
            "family": family,
            "store": str(sight.store.root) if sight else None,
        }
        self._worker = Worker("mmchat.probe_child", config, name="LLM", log_file=state_folder() / "rkllm.log")
        self._step = Step(0, 0, "loading the model")

    def run(self) -> Report:
        runs = Runs(self._spec, self._worker, self._profile, self._detail)
        probes: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
            "files": ("reading every file once", self._files),
            "abort": ("what an abort leaves", lambda: cache.abort(runs)),
            "repeats": ("does the same question get the same answer", lambda: cache.repeats(runs)),
            "append": ("does it take what is new alone", lambda: cache.append(runs)),
            "prefix": ("does it reuse what it knows", lambda: cache.prefix(runs)),
            "speed": ("speed", lambda: cache.speed(runs)),
            "ladder": ("how long a run may be", lambda: ladder(runs)),
            "memory": ("memory per run", lambda: cache.memory(runs)),
        }
        if (sight := self._sight) is not None:
            probes["encoder"] = ("the encoder's speed", lambda: encoder(runs, sight))
            probes["pictures"] = (
                "is every picture found again",
                lambda: pictures(runs, sight, _chosen(self._profile.probes)),
            )
        try:
            if self._profile.probes.get("files", {}).get("good") is False:
                self._step = Step(0, len(probes), "reading every file again")
                if self._files()["good"]:  # what was measured was measured on a damaged one
                    self._profile.update(probes={"files": {"good": True}})
            self._say(Step(0, len(probes), "loading the model"))
            facts, stopped = self._worker.ready(), None
            for number, (name, (title, probe)) in enumerate(probes.items(), 1):
                found = self._profile.probes.get(name)
                if found is not None and not {"begun", "failed"}.intersection(found):
                    continue
                self._step = Step(number, len(probes), title)
                self._say(self._step)
                if name in _CHOOSING and "pictures" in self._profile.probes:  # which were asked by another choice
                    kept = {one: result for one, result in self._profile.probes.items() if one != "pictures"}
                    self._profile.update(probes=kept)
                try:
                    self._worker.ready()
                except MmchatError as error:  # after a crash
                    stopped = str(error)
                else:
                    begun = {} if found is None or "failed" in found else found
                    self._profile.keep_probe(name, self._result(name, probe, begun))
                    stopped = self._profile.probes[name].get("stopped")
                if stopped is not None:
                    break  # what follows would fail, too, and for that alone
        finally:
            self._worker.close()
        return self._conclude(facts, stopped)

    def _detail(self, text: str, part: float) -> None:
        self._say(replace(self._step, detail=text, part=part))

    def _files(self) -> dict[str, Any]:
        """Whether every file is what mmchat.json says."""
        try:
            check_digests(self._spec, lambda name: self._detail(name, 0.0))
        except ModelDirError as error:
            return {"good": False, "why": str(error)}
        return {"good": True}

    def _result(self, name: str, probe: Callable[[], dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
        """found: what the profile has of an attempt that never ended."""
        n_begun = found.get("begun", 0)
        if n_begun >= 2 and name != "ladder":
            return {"crashed": "it was begun twice and never ended"}
        self._profile.keep_probe(name, {**found, "begun": n_begun + 1})
        try:
            return probe()
        except KeyboardInterrupt:
            if name != "ladder":
                self._profile.keep_probe(name, {**found, "begun": n_begun})
            raise
        except WorkerError as error:
            return {"crashed": str(error), "worker": error.name}
        except MmchatError as error:
            return {"failed": str(error)}

    def _conclude(self, facts: dict[str, Any], stopped: str | None) -> Report:
        """stopped: why the model did not load again."""
        probes = with_lacking(self._profile.probes)
        chosen = _chosen(probes)
        shown = probes["pictures"]
        # By the encoder's worker it may crash: that says nothing of the LLM's cache.
        untold = "crashed" in shown and shown.get("worker") != "vision"
        if shown.get("bound") is False or untold or shown.get("strategy") == "resend":
            chosen.update(strategy="resend", rewinds=False, chunks=False)
        lengths, speed = probes["ladder"], probes["speed"]
        if lengths:
            chosen.update(
                worked_rows=max(lengths.get("worked", []), default=0), crashed_rows=sorted(lengths.get("crashed", []))
            )
        else:  # then what chats have learned stays
            del chosen["safe_rows"]
        self._profile.update(
            **chosen,
            end_in_kv=probes["append"].get("end_in_kv"),
            prefill_rows_per_s=_rows_per_s(lengths) or speed.get("prefill_rows_per_s"),
            decode_tokens_per_s=speed.get("decode_tokens_per_s"),
            encode_s_per_slice=probes["encoder"].get("s_per_slice"),
        )
        advice = tuple(_advice(facts, probes, self._profile, stopped))
        return Report(self._library, self._profile, facts, dict(self._profile.probes), advice)


def with_lacking(probes: dict[str, Any]) -> dict[str, Any]:
    """What was found, and {} under the name of a probe that did not run."""
    return {**{name: {} for name in _PROBES}, **probes}


def _chosen(probes: dict[str, Any]) -> dict[str, Any]:
    """The profile's findings (mmchat.rkllm_embed.Findings), from all probes but that of the pictures."""
    probes = with_lacking(probes)
    repeats = probes["repeats"].get("good", False)
    append, prefix = probes["append"], probes["prefix"]
    worked, crashed = (probes["ladder"].get(name, []) for name in ("worked", "crashed"))
    safe_rows = max((n for n in worked if n < min(crashed)), default=1) if crashed else None
    appends, chunks = repeats and append.get("works", False), append.get("chunks", False)
    reuses = repeats and prefix.get("works", False)
    strategy = "resend"
    if appends and chunks and safe_rows is not None:
        strategy = "append"
    elif reuses and prefix["generated"]:
        strategy = "prefix"
    elif appends:
        strategy = "append"
    elif reuses:
        strategy = "prefix"
    return {
        "strategy": strategy,
        "rewinds": strategy == "prefix" and prefix["rewinds"],
        "safe_rows": safe_rows,
        "chunks": strategy == "append" and chunks,
    }


def _rows_per_s(lengths: dict[str, Any]) -> float | None:
    """Over all runs of the ladder, so that long ones count most."""
    seconds: dict[str, float] = lengths.get("seconds", {})
    return round(sum(map(int, seconds)) / sum(seconds.values()), 1) if sum(seconds.values()) > 0 else None


def _advice(facts: dict[str, Any], probes: dict[str, Any], profile: Profile, stopped: str | None) -> Iterator[str]:
    if not probes["files"].get("good", True):
        yield probes["files"]["why"]
    for name, result in probes.items():
        if "crashed" in result and name != "ladder":
            yield f"the probe {name!r} crashed ({result['crashed']}): what it would have found counts as not working"
        if "failed" in result:
            yield f"the probe {name!r} failed: {result['failed']} (it runs again with the next mmchat calibrate)"
    if probes["repeats"].get("good") is False:
        yield "the same question got different answers: nothing can be told from answers here"
    shown = probes["pictures"]
    if shown.get("bound") is False:
        yield "pictures were mixed up by what the library keeps: it is told to keep nothing"
    if shown.get("asked", 0) > 2 * shown.get("named", 0):
        yield (
            f"only {shown['named']} of {shown['asked']} answers name the right picture's colour: ask the same on a PC, "
            "and if the model answers better there, this one was quantised badly or its encoder does not fit"
        )
    if stopped is not None:
        yield (
            f"the model did not load again after a crash ({stopped}): restart the board and run "
            "mmchat calibrate again, which goes on there"
        )
    elif profile.strategy == "resend":
        yield f"every turn prefills the whole conversation: RKLLM {facts['version']} keeps nothing to rely on"
    elif profile.strategy == "append":
        yield "a turn prefills what is new; an edited or regenerated turn prefills everything"
    elif not profile.rewinds:
        yield "pictures of equal size are mixed up without emptying the cache: an edited turn prefills everything"
    if profile.strategy != "resend" and shown.get("n_prefilled", 0) > 2 * shown.get("n_new", 0):
        yield (
            f"yet {shown['n_prefilled']} rows were prefilled in a chat where {shown['n_new']} were new: what the "
            "library says it keeps does not add up"
        )
    if odd := probes["ladder"].get("odd"):
        yield f"runs of {', '.join(map(str, odd))} rows crashed once and then worked: look at power supply and memory"
    if profile.safe_rows is not None and profile.chunks:
        yield f"longer runs than {profile.safe_rows} rows crash: longer prompts are fed in parts"
    elif profile.safe_rows is not None:
        yield f"longer runs than {profile.safe_rows} rows crash and are refused: fewer slices, shorter conversations"
    growth = probes["memory"].get("mb_per_run", 0)
    if growth > 0.5:
        yield f"every run loses {growth} MB: end mmchat now and then"
    if probes["abort"].get("usable") is False:
        yield "after an abort the answers are wrong: let answers end"
