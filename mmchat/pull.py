"""A model from the Hugging Face hub, or as much of it as is needed, into a folder.

    all      everything that a model folder needs
    llm      the weight files that hold the LLM (for `mmchat convert llm-checkpoint`)
    table    the embedding table alone: 1 GB of MiniCPM-V-2.6's 16
    vision   the vision tower and the resampler alone: 1 GB

Each with the small files (configs, tokenizer).  Whole files are compared with the hub's digests.  For a part of a
file the hub has none: then the commit, the lengths and that every number is finite are what can be checked, and the
digest of what came is kept in `.mmchat-pull.json`, so that a later run notices damage.

HF_ENDPOINT, HF_TOKEN (or a stored login) and HF_HUB_OFFLINE count, as for huggingface_hub, which finds the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmchat import fetch
from mmchat.checkpoint import (
    TensorInfo,
    build_header,
    finite_blocks,
    header_bytes,
    parse_header,
    read_header,
)
from mmchat.errors import DownloadError, ModelDirError
from mmchat.fetch import Piece, Span
from mmchat.half_made import PULL_RECORD
from mmchat.outputs import check_space, only_writer, replace_file

PARTS = ("all", "llm", "table", "vision")
RECORD = PULL_RECORD
TABLE_FILE, VISION_FILE = "embed_table.safetensors", "vision.safetensors"
_INDEX = "model.safetensors.index.json"
_NEEDED = ("config.json", "preprocessor_config.json", "tokenizer.json")
_SMALL = (
    *_NEEDED,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "LICENSE",
)
_TABLE = "embed_tokens.weight"
_VISION = ("vpm.", "resampler.")
_MAX_SMALL_BYTES = 200_000_000

# (file, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HubFile:
    """sha256: of large files; git: the blob id of small ones.  One of them, or neither on some mirrors."""

    name: str
    size: int
    sha256: str | None
    git: str | None


@dataclass(frozen=True)
class Hub:
    """A repository as it was at one commit.  headers: what it wants to see, the user's token included."""

    repo: str
    commit: str
    files: Mapping[str, HubFile]
    endpoint: str
    headers: Mapping[str, str]

    def span(self, name: str) -> Span:
        """A whole file."""
        if name not in self.files:
            raise DownloadError(f"{self.repo}: has no {name}")
        size = self.files[name].size
        return Span(f"{self.endpoint}/{self.repo}/resolve/{self.commit}/{quote(name)}", 0, size, size)


@dataclass(frozen=True)
class Job:
    """One file of the folder.  whole: what the hub says of it, or None for what is cut out of larger files."""

    name: str
    pieces: tuple[Piece, ...]
    whole: HubFile | None

    @property
    def n_bytes(self) -> int:
        return sum(map(fetch.length, self.pieces))


@dataclass(frozen=True)
class Plan:
    hub: Hub
    part: str
    jobs: tuple[Job, ...]

    @property
    def n_bytes(self) -> int:
        return sum(job.n_bytes for job in self.jobs)


@dataclass(frozen=True)
class Pulled:
    """A file that is there.  fetched: whether any of it came over the net this time."""

    name: str
    n_bytes: int
    sha256: str
    fetched: bool


def look(repo: str, *, revision: str = "main", endpoint: str | None = None, token: str | None = None) -> Hub:
    """Ask the hub what a repository holds.

    endpoint, token: instead of HF_ENDPOINT, and of HF_TOKEN or the stored login.

    Raises DownloadError: no such repository, no right to it, no connection.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import build_hf_headers

    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    try:
        info = HfApi(endpoint=endpoint, token=token).model_info(repo, revision=revision, files_metadata=True)
    except GatedRepoError:
        raise DownloadError(
            f"{repo}: its owners ask for consent: accept the terms on {endpoint}/{repo}, "
            "then log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise DownloadError(f"{repo}: no such model on {endpoint}, or it is private and needs HF_TOKEN") from None
    except RevisionNotFoundError:
        raise DownloadError(f"{repo}: has no revision {revision!r}") from None
    except HFValidationError as error:
        raise DownloadError(f"{repo}: not the name of a model ({' '.join(str(error).split())})") from None
    except Exception as error:  # huggingface_hub's HTTP library, and so the errors, change with its version
        raise DownloadError(f"{endpoint}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
    files = {}
    for one in info.siblings or ():
        if one.size is not None:
            sha256 = getattr(one.lfs, "sha256", None)
            files[one.rfilename] = HubFile(one.rfilename, int(one.size), sha256, None if one.lfs else one.blob_id)
    if not info.sha or not files:
        raise DownloadError(f"{repo}: {endpoint} does not say what it holds")
    return Hub(repo, info.sha, files, endpoint, build_hf_headers(token=token))


def plan(hub: Hub, part: str = "all") -> Plan:
    """What to fetch.  Reads the index, and for a part of a file the header that says where it lies.

    Raises DownloadError: the repository is not a checkpoint, or lacks what is wanted.
    """
    missing = [name for name in _NEEDED if name not in hub.files]
    if missing:
        raise DownloadError(f"{hub.repo}: lacks {', '.join(missing)}; is it a MiniCPM-V-2.6 checkpoint?")
    small = [name for name in _SMALL if name in hub.files]
    where, has_index = _weight_map(hub)
    if part == "all":
        weights = sorted({*where.values(), *([_INDEX] if has_index else [])})
        return Plan(hub, part, tuple(_whole(hub, name) for name in (*small, *weights)))
    if part == "llm":  # without the index, which would ask for all
        weights = sorted({file for name, file in where.items() if name.startswith("llm.")})
        jobs = [_whole(hub, name) for name in weights]
    else:
        wanted = [name for name in where if _belongs(name, part)]
        jobs = [_cut(hub, wanted, where, part)] if wanted else []
    if not jobs:
        raise DownloadError(f"{hub.repo}: no tensors for {part!r}; is it a MiniCPM-V-2.6 checkpoint?")
    return Plan(hub, part, (*(_whole(hub, name) for name in small), *jobs))


def pull(plan: Plan, folder: Path, progress: Progress) -> list[Pulled]:
    """Fetch what the folder lacks, and look at every byte of what it has.

    Raises DownloadError: the connection, or what came, is bad for good.  DiskFull.  ModelDirError: the folder
    belongs to another model, or another command writes there.
    """
    with only_writer(folder):
        record = _Record(folder)
        record.belongs_to(plan.hub)
        kept = {job.name: found for job in plan.jobs if (found := _kept(job, folder, record, progress))}
        todo = [job for job in plan.jobs if job.name not in kept]
        check_space(folder, lacking_bytes(todo, folder))
        files = []
        for job in plan.jobs:
            if (digest := kept.get(job.name)) is None:
                digest = _fetch(job, folder, plan.hub, record, progress)
            else:
                record.add(job, digest)
                fetch.drop_part(folder / job.name)  # of one that was killed
            files.append(Pulled(job.name, job.n_bytes, digest, job.name not in kept))
        record.complete(plan)
        return files


def lacking_bytes(jobs: Sequence[Job], folder: Path) -> int:
    """How much of these files has not arrived yet."""
    return sum(job.n_bytes - fetch.part_bytes(folder / job.name, job.pieces) for job in jobs)


def offline(repo: str, folder: Path, part: str, progress: Progress, *, revision: str = "main") -> list[Pulled]:
    """The same without a connection: everything must be there from an earlier pull.

    Raises DownloadError: it is not, or it is damaged, or of a commit that need not be the revision.
    """
    record = _Record(folder)
    record.belongs_to(repo)
    if revision != "main" and not (len(revision) >= 7 and record.commit.startswith(revision)):
        raise DownloadError(
            f"{folder}: holds the commit {record.commit or '(none)'}; whether that is {revision!r} only the hub can "
            "say, and offline mode is on (HF_HUB_OFFLINE): give the commit, or go online"
        )
    names = record.names(part)
    files = []
    for name in names or ():
        wanted, path = record.files[name], folder / name
        digest = _digest(path, name, progress) if path.is_file() else None
        if digest != wanted["sha256"]:
            raise DownloadError(f"{path}: missing or damaged, and offline mode is on (HF_HUB_OFFLINE): go online")
        files.append(Pulled(name, path.stat().st_size, wanted["sha256"], False))
    if not files:
        raise DownloadError(
            f"{folder}: does not hold {part!r} of {repo}, and offline mode is on (HF_HUB_OFFLINE): go online once"
        )
    return files


class _Record:
    """What is in the folder by whom: `.mmchat-pull.json`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD
        self._values: dict[str, Any] = {"repo": None, "commit": None, "files": {}, "complete": {}}
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(values, dict) and all(type(values.get(k)) is dict for k in ("files", "complete")):
                self._values = values
        except (OSError, ValueError):
            pass

    @property
    def files(self) -> dict[str, Any]:
        return dict(self._values["files"])

    @property
    def commit(self) -> str:
        """ "" where nothing is recorded."""
        return str(self._values.get("commit") or "")

    def belongs_to(self, hub: Hub | str) -> None:
        """Raises ModelDirError where the folder is another model's."""
        repo = hub if isinstance(hub, str) else hub.repo
        if self._values["repo"] not in (None, repo):
            raise ModelDirError(f"{self._path.parent}: holds {self._values['repo']}, not {repo}; give another folder")
        if not isinstance(hub, str):
            if self._values["commit"] != hub.commit:
                self._values["complete"] = {}  # of another commit
            self._values.update(repo=repo, commit=hub.commit)

    def names(self, part: str) -> list[str] | None:
        """The files that make up a part that was completed."""
        found = self._values["complete"].get(part)
        return list(found) if found is not None else None

    def digest(self, job: Job) -> str | None:
        """Of the very same job, when it was done."""
        known = self._values["files"].get(job.name)
        return known["sha256"] if known and known.get("key") == fetch.key(job.pieces) else None

    def add(self, job: Job, digest: str) -> None:
        self._values["files"][job.name] = {"sha256": digest, "bytes": job.n_bytes, "key": fetch.key(job.pieces)}
        self._save()

    def complete(self, plan: Plan) -> None:
        self._values["complete"][plan.part] = [job.name for job in plan.jobs]
        self._save()

    def _save(self) -> None:
        replace_file(self._path, json.dumps(self._values, indent=1).encode())


def _weight_map(hub: Hub) -> tuple[dict[str, str], bool]:
    """Tensor -> file, and whether an index says so."""
    if _INDEX in hub.files:
        text = _read_small(hub, _INDEX)
        try:
            where = {str(name): str(file) for name, file in json.loads(text)["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DownloadError(f"{hub.repo}: {_INDEX} is not the index of a checkpoint") from None
        unknown = [file for file in where.values() if file not in hub.files or not _is_weights(file)]
        if unknown or not where:
            raise DownloadError(f"{hub.repo}: {_INDEX} names {unknown[:1] or 'no files'}, which it does not have")
        return where, True
    files = sorted(name for name in hub.files if _is_weights(name))
    if not files:
        raise DownloadError(f"{hub.repo}: has no *.safetensors; is it a MiniCPM-V-2.6 checkpoint?")
    return {name: file for file in files for name in _header(hub, file)}, False


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not name.startswith(".")


def _read_small(hub: Hub, name: str) -> bytes:
    span = hub.span(name)
    if span.size > _MAX_SMALL_BYTES:
        raise DownloadError(f"{hub.repo}: {name} has {span.size} bytes, which cannot be right")
    return fetch.read(span, hub.headers)


def _header(hub: Hub, file: str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, of which only the header is fetched."""
    span = hub.span(file)
    try:
        n = header_bytes(fetch.read(Span(span.url, 0, min(8, span.size), span.size), hub.headers), span.size, span.url)
        return parse_header(fetch.read(Span(span.url, 8, 8 + n, span.size), hub.headers), span.size, span.url)
    except ModelDirError as error:
        raise DownloadError(str(error)) from None


def _belongs(name: str, part: str) -> bool:
    return name.endswith(_TABLE) if part == "table" else name.startswith(_VISION)


def _whole(hub: Hub, name: str) -> Job:
    return Job(name, (hub.span(name),), hub.files[name])


def _cut(hub: Hub, names: Sequence[str], where: Mapping[str, str], part: str) -> Job:
    """A safetensors file with these tensors alone."""
    if part == "table" and len(names) != 1:
        raise DownloadError(f"{hub.repo}: has {len(names)} tensors named *{_TABLE}; an embedding table is one")
    described: dict[str, tuple[str, tuple[int, ...], int]] = {}
    spans: list[Span] = []
    for file in sorted({where[name] for name in names}):
        tensors, whole = _header(hub, file), hub.span(file)
        lacking = [name for name in names if where[name] == file and name not in tensors]
        if lacking:
            raise DownloadError(f"{whole.url}: lacks {lacking[0]}, which {_INDEX} puts there")
        for name in sorted((name for name in names if where[name] == file), key=lambda name: tensors[name].start):
            info = tensors[name]
            described[_TABLE if part == "table" else name] = (info.dtype, info.shape, info.end - info.start)
            if spans and spans[-1].url == whole.url and spans[-1].end == info.start:
                spans[-1] = Span(whole.url, spans[-1].start, info.end, whole.size)
            else:
                spans.append(Span(whole.url, info.start, info.end, whole.size))
    return Job(TABLE_FILE if part == "table" else VISION_FILE, (build_header(described), *spans), None)


def _kept(job: Job, folder: Path, record: _Record, progress: Progress) -> str | None:
    """The SHA-256 of a file that is there and right, else None."""
    path = folder / job.name
    if not path.is_file() or path.stat().st_size != job.n_bytes:
        return None
    found = _digest(path, job.name, progress)
    if job.whole is None:
        return found if found == record.digest(job) else None
    return found if _is_right(path, job.whole, found) else None


def _fetch(job: Job, folder: Path, hub: Hub, record: _Record, progress: Progress) -> str:
    """Fetch one file, look at it, put it on record, and move it into place; its SHA-256."""
    path = folder / job.name
    for last_time in (False, True):
        part = fetch.fetch(path, job.pieces, hub.headers, lambda done, total: progress(job.name, done, total))
        digest = _digest(part, job.name, progress)
        if job.whole is None:
            problem = _not_finite(part)
        else:
            problem = None if _is_right(part, job.whole, digest) else "what came has another digest than the hub says"
        if problem is None:
            record.add(job, digest)  # for _kept, which compares; killed after the move, it would be fetched again
            part.replace(path)
            fetch.drop_part(path)
            return digest
        fetch.drop_part(path)
        if last_time:
            raise DownloadError(f"{hub.repo}: {job.name}: {problem}, twice; a proxy or mirror may be at fault")
    raise AssertionError("unreachable")


def _not_finite(part: Path) -> str | None:
    try:
        for name, info in read_header(part).items():
            for _ in finite_blocks(part, name, info):
                pass
    except ModelDirError as error:
        return str(error)
    return None


def _is_right(path: Path, whole: HubFile, sha256: str) -> bool:
    if whole.sha256:
        return sha256 == whole.sha256
    if whole.git:  # small files: git's digest of them, which is not of the bytes alone
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == whole.git
    return path.stat().st_size == whole.size


def _digest(path: Path, name: str, progress: Progress) -> str:
    total, done, digest = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            done += len(block)
            progress(f"checking {name}", done, total)
    return digest.hexdigest()
