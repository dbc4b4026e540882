"""pull and fetch: whole files and cut-out tensors arrive right, over a server that does everything wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from mmchat import fetch, outputs, pull
from mmchat.checkpoint import Checkpoint, TensorFile, write_tensors
from mmchat.embed_table import EmbedTable, build_table
from mmchat.errors import DiskFull, DownloadError, ModelDirError
from mmchat.fetch import Span
from mmchat.model_dir import open_model
from mmchat.pull import Pulled
from tests.fake_hub import COMMIT, TOKEN, FakeHub
from tests.test_convert import JSON_FILES, digests, sharded

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(tmp_path_factory.mktemp("published") / "c", 2)


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The demo's checkpoint in two shards, on a hub that has other files too."""
    monkeypatch.setattr(fetch, "_WAITS_S", (0, 0, 0))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with FakeHub(
        {**files, "README.md": b"# A model", "modeling.py": b"import os", "assets/x.safetensors": b"x"}
    ) as hub:
        yield hub


def get(hub: FakeHub, folder: Path, part: str = "all", token: str | None = None) -> dict[str, Pulled]:
    seen: list[tuple[int, int]] = []
    plan = pull.plan(pull.look(hub.repo, endpoint=hub.endpoint, token=token), part)
    files = pull.pull(plan, folder, lambda _, done, total: seen.append((done, total)))
    assert all(0 <= done <= total for done, total in seen)
    return {file.name: file for file in files}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {pull.RECORD}


# --- what arrives -----------------------------------------------------------------------------------------------


def test_all_of_a_checkpoint(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """The files of a model folder and no others, equal, and it opens."""
    files = get(hub, tmp_path / "m")
    assert digests(tmp_path / "m") == digests(checkpoint)
    assert {name: file.sha256 for name, file in files.items()} == digests(checkpoint)
    assert names(tmp_path / "m") == {*(p.name for p in checkpoint.iterdir())}
    assert open_model(tmp_path / "m").llm.n_layers == 4


def test_what_is_there_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    get(hub, tmp_path)
    hub.sent.clear()
    files = get(hub, tmp_path)
    assert not any(file.fetched for file in files.values())
    assert set(hub.sent) <= {"model.safetensors.index.json"}  # read to plan


def test_damage_is_found_and_mended(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """A byte of a large file, of a small one, and a file that became shorter."""
    get(hub, tmp_path)
    for name, change in ((SHARD, b"?"), ("config.json", b"?"), ("tokenizer.json", b"")):
        data = bytearray((tmp_path / name).read_bytes())
        data[100:101] = change
        (tmp_path / name).write_bytes(data)
    files = get(hub, tmp_path)
    assert {name for name, file in files.items() if file.fetched} == {SHARD, "config.json", "tokenizer.json"}
    assert digests(tmp_path) == digests(checkpoint)


def test_the_table_alone(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """The same file as `mmchat convert table` makes, for a fraction of the bytes."""
    files = get(hub, tmp_path / "m", "table")
    build_table(checkpoint, tmp_path / "wanted")
    found = (tmp_path / "m" / pull.TABLE_FILE).read_bytes()
    assert found == (tmp_path / "wanted").read_bytes()
    assert files[pull.TABLE_FILE].sha256 == hashlib.sha256(found).hexdigest()
    n_ids, width = EmbedTable.open(tmp_path / "m" / pull.TABLE_FILE).rows([0, 591]).shape[0], 192
    assert n_ids == 2
    shards = sum(sent for name, sent in hub.sent.items() if name.endswith("safetensors"))
    header = 40_000
    assert 800 * width * 2 < shards < 800 * width * 2 + header
    assert names(tmp_path / "m") == {pull.TABLE_FILE, *JSON_FILES}


def test_the_vision_tensors_alone(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    get(hub, tmp_path, "vision")
    made, source = TensorFile(tmp_path / pull.VISION_FILE), Checkpoint(checkpoint)
    assert set(made.tensors) == {name for name in source if name.startswith(("vpm.", "resampler."))}
    for name in made.tensors:
        assert made.tensors[name].dtype == source.info(name).dtype
        np.testing.assert_array_equal(made.array(name), source.array(name))


def test_the_llm_is_the_files_that_hold_it(tmp_path: Path, hub: FakeHub) -> None:
    write_tensors(tmp_path / "v", {"vpm.x": ("F32", (1,), [bytes(4)])})
    hub.files["model-00003.safetensors"] = (tmp_path / "v").read_bytes()
    index = json.loads(hub.files["model.safetensors.index.json"])
    index["weight_map"]["vpm.x"] = "model-00003.safetensors"
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    get(hub, tmp_path / "m", "llm")
    assert {p.name for p in (tmp_path / "m").glob("*.safetensors")} == {SHARD, "model-00002-of-00002.safetensors"}
    assert "llm.model.norm.weight" in Checkpoint(tmp_path / "m")


@pytest.mark.parametrize("part", pull.PARTS)
def test_a_checkpoint_in_one_file_has_no_index(
    hub: FakeHub, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, part: str
) -> None:
    one = sharded(tmp_path_factory.mktemp("one") / "c", 1)
    hub.files = {path.name: path.read_bytes() for path in one.iterdir() if "index" not in path.name}
    get(hub, tmp_path, part)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_damaged_table_is_noticed_later(hub: FakeHub, tmp_path: Path) -> None:
    """The hub has no digest of it, but the folder's record has."""
    get(hub, tmp_path, "table")
    path = tmp_path / pull.TABLE_FILE
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert get(hub, tmp_path, "table")[pull.TABLE_FILE].fetched
    assert path.read_bytes() == good


# --- a server that goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["all", "table"])
@pytest.mark.parametrize(
    "faults",
    [
        [("drop", 0), ("drop", 100), ("drop", 70_000), ("drop", 0)],
        [("drop", 1)] * 8,
        [("less", 1000)] * 8,
        [("status", 503), ("status", 429), ("status", 500)],
        ["whole", "whole", ("drop", 5000), "whole", "whole"],
    ],
    ids=["drops", "a byte at a time", "short ranges", "busy", "no ranges"],
)
def test_what_another_attempt_mends(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, faults: list[Any], part: str
) -> None:
    for name in hub.files:
        hub.faults[name] = list(faults)
    get(hub, tmp_path / "m", part)
    if part == "all":
        assert digests(tmp_path / "m") == digests(checkpoint)
    else:
        build_table(checkpoint, tmp_path / "wanted")
        assert (tmp_path / "m" / pull.TABLE_FILE).read_bytes() == (tmp_path / "wanted").read_bytes()
    assert not list((tmp_path / "m").glob(".*part*"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("shift", r"bytes 0 to \d+ of \d+ were asked for, but the server answers 206 with bytes 1 to"),
        ("size", r"were asked for, but the server answers 206 with bytes 0 to \d+ of \d+"),
        ("no range", r"answers 206 with bytes \? to \? of \?"),
        ("long", r"bytes 0 to \d+ of \d+ are \d+ bytes, the server says"),
        (("status", 404), r"the server answers 404 \(Not Found\)"),
        (("status", 403), r"answers 403 \(Forbidden\); log in with `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_a_server_that_lies_is_named(hub: FakeHub, tmp_path: Path, fault: Any, said: str) -> None:
    hub.faults[SHARD] = [fault]
    with pytest.raises(DownloadError, match=f"{SHARD}: .*{said}|{SHARD}: {said}"):
        get(hub, tmp_path)
    assert not (tmp_path / SHARD).exists()


def test_a_server_that_is_gone_for_good_is_named_and_what_came_is_kept(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_SYNC_BYTES", 50_000)
    hub.faults[SHARD] = [("drop", 1_000_000), *[("drop", 0)] * 10]
    with pytest.raises(DownloadError, match=r"closed.*run the same command again: what has arrived is kept"):
        get(hub, tmp_path)
    hub.faults.clear()
    hub.sent.clear()
    get(hub, tmp_path)
    whole = (checkpoint / SHARD).stat().st_size
    assert hub.sent[SHARD] <= whole - 900_000
    assert digests(tmp_path) == digests(checkpoint)


def test_wrong_bytes_are_fetched_again_once(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    hub.faults = {SHARD: [("wrong", 1_000_000)], "config.json": [("wrong", 20)]}
    get(hub, tmp_path)
    assert digests(tmp_path) == digests(checkpoint)


def test_wrong_bytes_twice_are_an_error_and_leave_nothing(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = {SHARD: [("wrong", 1_000_000)] * 2}
    with pytest.raises(DownloadError, match=f"{SHARD}: what came has another digest than the hub says, twice"):
        get(hub, tmp_path)
    assert not (tmp_path / SHARD).exists()
    assert not list(tmp_path.glob(".*part*"))


def test_wrong_bytes_after_a_resume_are_noticed(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lay on the disk was damaged between two runs."""
    monkeypatch.setattr(fetch, "_SYNC_BYTES", 50_000)
    hub.faults[SHARD] = [("drop", 1_000_000), *[("drop", 0)] * 10]
    with pytest.raises(DownloadError):
        get(hub, tmp_path)
    hub.faults.clear()
    with fetch.part_of(tmp_path / SHARD).open("r+b") as file:
        file.seek(500_000)
        file.write(b"????")
    get(hub, tmp_path)
    assert digests(tmp_path) == digests(checkpoint)


def test_a_table_of_garbage_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    """No digest to compare with, but numbers that are not finite."""
    index = json.loads(hub.files["model.safetensors.index.json"])["weight_map"]
    name = index["llm.model.embed_tokens.weight"]
    data = bytearray(hub.files[name])
    (tmp_path / "x").write_bytes(data)
    info = TensorFile(tmp_path / "x").tensors["llm.model.embed_tokens.weight"]
    data[info.start + 2000 : info.start + 2002] = b"\xff\x7f"
    hub.files[name] = bytes(data)
    with pytest.raises(DownloadError, match=r"not finite, in row 0 or soon after, twice"):
        get(hub, tmp_path / "m", "table")
    assert not (tmp_path / "m" / pull.TABLE_FILE).exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config.json": None, "tokenizer.json": None}, "lacks config.json, tokenizer.json; is it a MiniCPM"),
        ({"model.safetensors.index.json": b"{"}, "is not the index"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "names .'../x.safetensors'."),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "README.md"}}'}, "names .'README.md'."),
        ({"model.safetensors.index.json": b'{"weight_map": {}}'}, "names no files"),
        ({"model.safetensors.index.json": json.dumps({"weight_map": {"x": SHARD}}).encode()}, "no tensors for"),
        (
            {"model.safetensors.index.json": json.dumps({"weight_map": {"a.embed_tokens.weight": SHARD}}).encode()},
            "lacks a.embed_tokens.weight, which model.safetensors.index.json puts there",
        ),
        (dict.fromkeys((SHARD, "model-00002-of-00002.safetensors"), b"garbage"), "not a safetensors"),
    ],
)
def test_a_repository_that_is_no_checkpoint_is_named(
    hub: FakeHub, tmp_path: Path, change: dict[str, bytes | None], said: str
) -> None:
    for name, data in change.items():
        if data is None:
            del hub.files[name]
        else:
            hub.files[name] = data
    with pytest.raises(DownloadError, match=said):
        get(hub, tmp_path / "m", "table")
    assert not (tmp_path / "m").exists()


# --- whom one asks ----------------------------------------------------------------------------------------------


def test_the_token_is_for_the_hub_alone(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated = True
    get(hub, tmp_path, "table", token=TOKEN)
    assert hub.tokens_seen == {"127.0.0.1": {f"Bearer {TOKEN}"}, "localhost": {None}}


@pytest.mark.parametrize(
    ("repo", "revision", "said"),
    [
        ("owner/other", "main", "owner/other: no such model on http://127.0.0.1"),
        ("owner/model", "v9", "has no revision 'v9'"),
        ("not a name", "main", "not the name of a model"),
    ],
)
def test_what_is_not_there_is_named(hub: FakeHub, repo: str, revision: str, said: str) -> None:
    with pytest.raises(DownloadError, match=said):
        pull.look(repo, revision=revision, endpoint=hub.endpoint)


def test_a_model_that_asks_for_consent_says_how(hub: FakeHub) -> None:
    hub.gated = True
    with pytest.raises(DownloadError, match=r"ask for consent: accept the terms on http://.*/owner/model, then log in"):
        pull.look(hub.repo, endpoint=hub.endpoint)


def test_a_hub_that_is_not_there_is_named() -> None:
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9: "):
        pull.look("owner/model", endpoint="http://127.0.0.1:9")


def test_half_of_a_newer_commit_is_not_whole(hub: FakeHub, tmp_path: Path) -> None:
    """Offline, files of two commits are not taken for a model."""
    get(hub, tmp_path)
    plan = pull.plan(pull.look(hub.repo, endpoint=hub.endpoint))
    newer = replace(plan, hub=replace(plan.hub, commit="0" * 40))
    for name in ("config.json", SHARD):
        (tmp_path / name).unlink()
    with pytest.raises(KeyboardInterrupt):
        pull.pull(newer, tmp_path, lambda name, done, total: interrupted() if name == SHARD else None)
    assert (tmp_path / "config.json").exists()
    get(hub, tmp_path / "other")
    shutil.copy(tmp_path / "other" / SHARD, tmp_path)  # as commit A had it
    with pytest.raises(DownloadError, match="does not hold 'all'"):
        pull.offline(hub.repo, tmp_path, "all", lambda *_: None)
    get(hub, tmp_path)
    pull.offline(hub.repo, tmp_path, "all", lambda *_: None)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_killed_after_a_file_was_moved_it_is_not_fetched_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "embed_table.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(fetch, "drop_part", lambda path: interrupted() if path == table else None)
        with pytest.raises(KeyboardInterrupt):
            get(hub, tmp_path, "table")
    assert table.exists()
    assert not get(hub, tmp_path, "table")[table.name].fetched
    assert not list(tmp_path.glob(".embed*"))


def test_two_models_do_not_share_a_folder(hub: FakeHub, tmp_path: Path) -> None:
    get(hub, tmp_path, "table")
    hub.repo = "owner/second"
    with pytest.raises(ModelDirError, match="holds owner/model, not owner/second; give another folder"):
        get(hub, tmp_path, "table")


def test_a_full_disk_is_told_before_it_happens(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "free_bytes", lambda folder: 51_000_000)
    with pytest.raises(DiskFull):
        get(hub, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    get(hub, tmp_path, "table")


# --- the command ------------------------------------------------------------------------------------------------

COMMAND = [
    sys.executable,
    "-c",
    f"import sys; sys.path[:] = {sys.path!r}; from mmchat import fetch; fetch._SYNC_BYTES = 100_000\n"
    "from mmchat.cli import main; main()",
    "pull",
    "owner/model",
]


def command(hub: FakeHub, *words: str | Path, code: int = 0, **env: str) -> tuple[str, str]:
    done = subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, **env},
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_the_command(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """Endpoint and token from the environment; what is printed, sha256sum can check."""
    hub.gated = True
    out, _ = command(hub, "--to", tmp_path / "m", "--dry-run", HF_TOKEN=TOKEN)
    assert f"{(checkpoint / SHARD).stat().st_size:,}  {SHARD}" in out
    assert not (tmp_path / "m").exists()
    out, err = command(hub, "--to", tmp_path / "m", HF_TOKEN=TOKEN)
    assert len(out.splitlines()) == 7
    for line in out.splitlines():
        digest, path = line.split("  ")
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
    assert f"owner/model at {COMMIT[:12]}: 7 files" in err

    hub.sent.clear()
    out, _ = command(hub, "--to", tmp_path / "m", "--json", HF_HUB_OFFLINE="1")
    assert {file["name"]: file["sha256"] for file in json.loads(out)["files"]} == digests(checkpoint)
    assert not hub.sent
    _, err = command(hub, "--to", tmp_path / "m", "--only", "table", HF_HUB_OFFLINE="1", code=1)
    assert "does not hold 'table' of owner/model, and offline mode is on (HF_HUB_OFFLINE)" in err
    command(hub, "--to", tmp_path / "m", "--revision", COMMIT[:8], HF_HUB_OFFLINE="1")
    _, err = command(hub, "--to", tmp_path / "m", "--revision", "v2.0", HF_HUB_OFFLINE="1", code=1)
    assert f"holds the commit {COMMIT}; whether that is 'v2.0' only the hub can say" in err
    _, err = command(hub, "--to", tmp_path / "m", "--dry-run", HF_HUB_OFFLINE="1", code=2)
    assert "--dry-run asks the hub" in err
    (tmp_path / "m" / SHARD).write_bytes(b"damaged")
    _, err = command(hub, "--to", tmp_path / "m", HF_HUB_OFFLINE="1", code=1)
    assert f"{SHARD}: missing or damaged, and offline mode is on" in err
    _, err = command(hub, "--only", "weights", code=2)
    assert "--only is one of all, llm, table, vision, not 'weights'" in err


@pytest.mark.parametrize("part", ["all", "table"])
def test_killed_at_any_moment_it_goes_on(hub: FakeHub, checkpoint: Path, tmp_path: Path, part: str) -> None:
    """kill -9 while bytes arrive, again and again; all that was on the disk is used."""
    n_kills = 25 if settings().max_examples > 1000 else 3
    hub.chunk_wait_s = 0.01
    rng, target = random.Random(0), tmp_path / "m"
    n_wanted = sum(path.stat().st_size for path in checkpoint.iterdir())
    words = ["--to", str(target), "--only", part]
    interrupted = 0
    for _ in range(n_kills):
        hub.sent.clear()
        process = subprocess.Popen(
            [*COMMAND, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HF_ENDPOINT": hub.endpoint},
        )
        while not hub.sent and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6 if part == "all" else 0.1))
        process.kill()
        interrupted += process.wait(timeout=60) != 0
    assert interrupted
    hub.chunk_wait_s = 0.0
    hub.sent.clear()
    command(hub, *words)
    if part == "all":
        assert digests(target) == digests(checkpoint)
        assert sum(hub.sent.values()) < n_wanted
    else:
        build_table(checkpoint, tmp_path / "wanted")
        assert (target / pull.TABLE_FILE).read_bytes() == (tmp_path / "wanted").read_bytes()
    assert [path.name for path in target.glob(".*")] == [pull.RECORD]


# --- spans ------------------------------------------------------------------------------------------------------


def test_spans_of_anything_are_put_together(hub: FakeHub, tmp_path: Path) -> None:
    """Pieces of any length, interrupted at any place, in any order."""
    data = hub.files[SHARD]
    url = f"{hub.endpoint}/cdn/{SHARD}"
    rng = random.Random(1)
    for _ in range(20):
        pieces: list[fetch.Piece] = []
        wanted = b""
        for _ in range(rng.randint(1, 5)):
            start = rng.randrange(len(data) - 3000)
            end = start + rng.choice((1, 17, 3000))
            pieces += [Span(url, start, end, len(data)), rng.randbytes(rng.choice((0, 1, 50)))]
            wanted += data[start:end] + bytes(pieces[-1])  # type: ignore[arg-type]
        hub.faults[SHARD] = [("drop", rng.randrange(20)) for _ in range(rng.randrange(6))]
        path = tmp_path / "out"
        try:
            part = fetch.fetch(path, pieces, {}, lambda done, total: None)
        except DownloadError:
            hub.faults.clear()
            part = fetch.fetch(path, pieces, {}, lambda done, total: None)
        assert part.read_bytes() == wanted
        assert fetch.part_bytes(path, pieces) == len(wanted)
        assert fetch.part_bytes(path, [*pieces, b"other"]) == 0
        fetch.drop_part(path)


def test_an_error_of_the_disk_is_not_taken_for_one_of_the_net(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch._Part, "add", full)
    with pytest.raises(OSError, match="No space left"):
        get(hub, tmp_path)
