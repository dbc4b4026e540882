"""mmchat store info, verify and clear."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import typer

from mmchat.errors import StoreError
from mmchat.outputs import describe_bytes
from mmchat.store import Store, default_cap, open_store


def info(folder: str | None, as_json: bool) -> None:
    store = _open(folder)
    known = {"folder": str(store.root), "problem": store.problem, **asdict(store.info())}
    spare = _spare(store)
    if as_json:
        print(json.dumps({**known, "spare": {"folder": str(spare.root), **asdict(spare.info())} if spare else None}))
        return
    print(f"folder      {store.root}")
    if store.problem:
        print(f"problem     {store.problem}")
    print(f"embeddings  {_describe(store)}")
    if spare:
        print(f"spare       {_describe(spare)}, in {spare.root}")


def verify(folder: str | None, as_json: bool) -> None:
    store = _open(folder)
    found = store.verify()
    if spare := _spare(store):
        found += spare.verify()
    if as_json:
        print(json.dumps({"folder": str(store.root), **asdict(found)}))
    else:
        print(f"{found.n_whole} whole, {found.n_removed} damaged and removed, {found.n_left} damaged and not removable")
    if found.n_left:
        raise typer.Exit(1)


def clear(folder: str | None, as_json: bool) -> None:
    store = _open(folder)
    n_removed = n_bytes = n_left = 0
    for one in (store, _spare(store)):
        if one is not None:
            before = one.info()
            one.clear()
            after = one.info()
            n_removed += max(0, before.n_files - after.n_files)
            n_bytes += max(0, before.n_bytes - after.n_bytes)
            n_left += after.n_files
    if as_json:
        print(json.dumps({"folder": str(store.root), "n_removed": n_removed, "n_bytes": n_bytes, "n_left": n_left}))
        return
    in_use = f"; {n_left} in use are left" if n_left else ""
    print(f"removed {n_removed} embeddings, {describe_bytes(n_bytes)}{in_use}")


def _open(folder: str | None) -> Store:
    if named := folder or os.environ.get("MMCHAT_STORE"):
        place = Path(os.path.expanduser(named))
        # A look should not make a store where none is; of one that cannot be written the spare folder may have all.
        if not (place / "data").is_dir() and (not place.is_dir() or os.access(place, os.W_OK)):
            raise StoreError(f"{named}: holds no embeddings")
    return open_store(folder, default_cap(os.environ), os.environ)


def _spare(store: Store) -> Store | None:
    """The spare folder, where there is one by now."""
    return store.spare if store.spare and store.spare.root.is_dir() else None


def _describe(store: Store) -> str:
    known = store.info()
    return f"{known.n_files}, {describe_bytes(known.n_bytes)} of {describe_bytes(known.cap_bytes)}"
