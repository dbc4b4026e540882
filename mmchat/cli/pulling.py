"""mmchat pull."""

from __future__ import annotations

import json
from pathlib import Path

from mmchat import pull
from mmchat.cli.bars import Bars
from mmchat.cli.options import UsageError, printable, say
from mmchat.outputs import check_space, describe_bytes, free_bytes


def run(repo: str, to: str | None, part: str, revision: str, dry_run: bool, as_json: bool) -> None:
    from huggingface_hub import constants

    if part not in pull.PARTS:
        raise UsageError(f"--only is one of {', '.join(pull.PARTS)}, not {part!r}")
    folder = Path(to or repo.rstrip("/").split("/")[-1])
    if constants.HF_HUB_OFFLINE:
        if dry_run:
            raise UsageError("--dry-run asks the hub what it has, and offline mode is on (HF_HUB_OFFLINE)")
        with Bars() as bars:
            files = pull.offline(repo, folder, part, bars, revision=revision)
        return _print(files, folder, as_json)
    plan = pull.plan(pull.look(repo, revision=revision), part)
    said = f"{len(plan.jobs)} files, {describe_bytes(plan.n_bytes)} ({describe_bytes(free_bytes(folder))} free)"
    if dry_run:
        listed = [{"name": job.name, "bytes": job.n_bytes} for job in plan.jobs]
        lines = [f"{job.n_bytes:>15,}  {job.name}" for job in plan.jobs]
        print(json.dumps({"folder": str(folder), "files": listed}) if as_json else printable("\n".join([*lines, said])))
        there = [job for job in plan.jobs if (folder / job.name).is_file()]
        check_space(folder, pull.lacking_bytes([job for job in plan.jobs if job not in there], folder))
        return None
    say(f"{repo} at {plan.hub.commit[:12]}: {said}")
    with Bars() as bars:
        files = pull.pull(plan, folder, bars)
    return _print(files, folder, as_json)


def _print(files: list[pull.Pulled], folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"folder": str(folder), "files": [vars(file) for file in files]}))
        return
    for file in files:
        print(printable(f"{file.sha256}  {folder / file.name}"))  # as sha256sum writes it
    new = sum(file.fetched for file in files)
    say(f"{len(files)} files, {new} fetched, all checked")
