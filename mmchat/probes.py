"""Questions to an RKLLM library about its cache, its aborts, its memory and its speed.

"Answers as if": greedy tokens equal to those of the whole conversation after an emptied cache, where an answer without
what was said before is another one.

Each gives a dict of JSON values.  What it means for a chat is not known here, but in mmchat.calibrate.
"""

from __future__ import annotations

from typing import Any

from mmchat.probe_runs import EQUAL_TOKENS, TRIALS, Rows, Runs

_MEMORY_RUNS = 10


def abort(runs: Runs) -> dict[str, Any]:
    """How long it takes, before the first token and after it, what it leaves, and whether the next answer is right.

    Comes first, for others abort runs as well.
    """
    wanted = runs.run(runs.turn(1))["ids"][:EQUAL_TOKENS]
    at_once = runs.run(runs.noise(64), abort_after=0, max_new=200)
    told = runs.run(runs.turn(0), abort_after=1, max_new=200)
    after = runs.run(runs.turn(1))["ids"][:EQUAL_TOKENS]
    return {
        "seconds": told["abort_s"],
        "prefill_seconds": at_once["abort_s"],
        "finish_called": told["finished"],
        "sent_rows": told["n_rows"],
        "kv_rows": told["kv_rows"],
        "usable": after == wanted,
    }


def repeats(runs: Runs) -> dict[str, Any]:
    """Whether the same question gets the same answer."""
    wanted = [runs.beginning(runs.turn(seed)) for seed in range(TRIALS)]
    return {"good": [runs.beginning(runs.turn(seed)) for seed in range(TRIALS)] == wanted}


def append(runs: Runs) -> dict[str, Any]:
    """Two turns, the second as its new rows alone, against the same two turns sent whole; then one in two runs."""
    result: dict[str, Any] = {"works": False, "end_in_kv": None, "chunks": False, "trials": 0, "telling": 0}
    for seed in range(3 * TRIALS):
        first = runs.turn(seed)
        told = runs.run(first, keep=True)
        if told["kv_rows"] is None:
            return {**result, "why": "the library cannot tell how many rows are cached"}
        if not told["ended"]:
            continue
        n_fed = told["kv_rows"] - told["n_rows"] - len(told["ids"])
        if n_fed not in (0, 1):
            return {**result, "why": f"{told['kv_rows']} rows are cached after {told['n_rows']} were sent"}
        result["end_in_kv"] = n_fed == 1
        second = runs.turn(seed, told["ids"])
        new = _from(second, told["kv_rows"])
        appended = runs.run(new, keep=True, clear=False, max_new=runs.short)
        whole, alone = runs.beginning(second), runs.beginning(new)
        result["trials"] += 1
        result["telling"] += whole != alone
        if appended["ids"][:EQUAL_TOKENS] != whole:
            return {**result, "why": "an appended turn is answered otherwise than the whole conversation"}
        if result["telling"] == TRIALS:
            return {**result, "works": True, "chunks": _chunks(runs)}
    return {**result, "why": "too few answers depend on what was said before"}


def _chunks(runs: Runs) -> bool:
    """Whether a prompt may be fed in two runs, the first of which is ended after one token, which is not kept."""
    right = 0
    for seed in range(3 * TRIALS):
        rows = runs.turn(seed)
        end = len(rows) // 2
        part = runs.run(rows[:end], keep=True, max_new=1)
        if part["aborted"]:
            return False
        if part["ended"] or part["kv_rows"] != part["n_rows"]:
            continue  # the token was the end of an answer, which may be kept: the engine cuts elsewhere then
        rest = runs.run(rows[end:], keep=True, clear=False, max_new=runs.short)
        if rest["ids"][:EQUAL_TOKENS] != runs.beginning(rows):
            return False
        right += 1
        if right == TRIALS:
            return True
    return False


def prefix(runs: Runs) -> dict[str, Any]:
    """Conversations that grow, and ones that differ in a picture, without emptying the cache between them."""
    result: dict[str, Any] = {"works": False, "generated": True, "rewinds": False, "trials": 0, "telling": 0}
    for seed in range(3 * TRIALS):
        first = runs.turn(seed)
        told = runs.run(first)
        if told["aborted"]:
            continue
        second = runs.turn(seed, told["ids"])
        grown = runs.run(second, clear=False, max_new=runs.unaborted)
        if grown["aborted"]:
            continue
        if grown["prefilled"] is None:
            return {**result, "why": "the library cannot tell how many rows it prefilled"}
        if grown["ids"][:EQUAL_TOKENS] != runs.beginning(second):
            return {**result, "why": "a conversation that grew is answered otherwise than after an emptied cache"}
        n_new = grown["n_rows"] - told["n_rows"]
        if grown["prefilled"] > n_new:
            return {**result, "why": f"{grown['prefilled']} rows were prefilled where {n_new} were new"}
        if grown["prefilled"] > n_new - len(told["ids"]) + 1:
            result["generated"] = False
        result["trials"] += 1
        if result["trials"] == TRIALS:
            break
    if not result["trials"]:
        return {**result, "why": "no answer ends by itself"}
    result["rewinds"] = True
    for seed in range(3 * TRIALS):
        before, after = runs.turn(seed), runs.turn(seed, image=seed + 1000)
        old, new = runs.beginning(before), runs.beginning(after)
        runs.run(before, max_new=runs.unaborted)
        changed = runs.run(after, clear=False, max_new=runs.unaborted)
        if changed["aborted"]:
            continue
        result["telling"] += old != new
        n_same = next(i for i, item in enumerate(before) if not isinstance(item, int))
        if changed["ids"][:EQUAL_TOKENS] != new or changed["prefilled"] < changed["n_rows"] - n_same:
            result["rewinds"] = False
            break
        if result["telling"] == TRIALS:
            break
    result["rewinds"] = result["rewinds"] and result["telling"] > 0
    return {**result, "works": True}


def speed(runs: Runs) -> dict[str, Any]:
    """Rows per second on a short run, and tokens per second; the ladder measures longer runs."""
    told = [runs.run(runs.turn(seed)) for seed in range(TRIALS)]
    n_tokens, seconds = sum(len(t["ids"]) for t in told), sum(t["generate_s"] for t in told)
    rows = runs.run(runs.noise(64), max_new=1)
    return {
        "prefill_rows_per_s": round(rows["n_rows"] / max(rows["prefill_s"], 1e-6), 1),
        "decode_tokens_per_s": round(n_tokens / max(seconds, 1e-6), 2),
    }


def memory(runs: Runs) -> dict[str, Any]:
    """Growth of the process, in which the NPU's memory does not count."""
    used = [runs.run(runs.turn(0), max_new=4)["rss_mb"] for _ in range(_MEMORY_RUNS + 2)]
    return {"mb_per_run": round((used[-1] - used[1]) / _MEMORY_RUNS, 2), "mb": round(used[-1], 1)}


def _from(rows: Rows, n: int) -> Rows:
    """What comes after the first n rows; they end at a token."""
    at = 0
    for i, item in enumerate(rows):
        if at >= n:
            return rows[i:]
        at += 1 if isinstance(item, int) else int(item[2])
    return []
