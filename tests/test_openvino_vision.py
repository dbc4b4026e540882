"""The encoder's numbers against the published code, and the worker that runs it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint, write_tensors
from mmchat.errors import EngineError, ImageError, StoreError, WorkerDied
from mmchat.model_dir import VisionSpec, open_model
from mmchat.openvino_vision import OpenVinoEncoder
from mmchat.store import Store, slice_key
from mmchat.vision_proc import VisionClient
from tests.fakes import is_gone

SPEC = open_model("demo")
ACCURATE: dict[str, object] = {"EXECUTION_MODE_HINT": "ACCURACY"}
MASK_32 = 2**32 - 1


# The tiny model of vision_reference.json


@pytest.fixture(scope="module")
def tiny(reference: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((reference / "vision_reference.json").read_text())["tiny_end_to_end"]
    return values


@pytest.fixture(scope="module")
def tiny_encoder(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> OpenVinoEncoder:
    """Built from a checkpoint on disk, as every encoder is."""
    folder = tmp_path_factory.mktemp("tiny")
    tensors = {}
    for name, shape, first, last in tiny["params_name_shape_first_last"]:
        values = filled(name, shape)
        assert (values.flat[0], values.flat[-1]) == (np.float32(first), np.float32(last)), name
        tensors[name] = ("F32", tuple(shape), [values.tobytes()])
    write_tensors(folder / "model.safetensors", tensors)
    config = tiny["config"]
    spec = VisionSpec(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        patch_size=config["patch_size"],
        position_side=config["image_size"] // config["patch_size"],
        query_num=config["resampler_queries"],
        output_size=config["resampler_embed_dim"],
        resampler_heads=config["resampler_heads"],
    )
    return OpenVinoEncoder(Checkpoint(folder), spec, ACCURATE)


def filled(name: str, shape: list[int]) -> NDArray[np.float32]:
    """The weights of a parameter, by the rule that vision_reference.json states as weight_fill."""
    seed = 0
    for byte in name.encode():
        seed = (31 * seed + byte) & MASK_32
    u = (2654435761 * np.arange(np.prod(shape), dtype=np.uint64) + 40503 * seed) & MASK_32
    u = (2246822519 * (u ^ (u >> np.uint64(15)))) & MASK_32
    values: NDArray[np.float64] = ((u >> np.uint64(8)) / 2.0**24 - 0.5) * 0.4
    norms = ("layer_norm1", "layer_norm2", "post_layernorm", "ln_q", "ln_kv", "ln_post")
    if name.endswith(".weight") and name.split(".")[-2] in norms:
        values += 1.0
    return np.asarray(values.reshape(shape), np.float32)


def tiny_patches(case: dict[str, Any]) -> NDArray[np.float32]:
    """(rows * columns, 3 * 14 * 14), cut from the strip that the reference was given."""
    n = case["tgt"][0] * case["tgt"][1]
    values = (37 * np.arange(3 * 14 * 14 * n) + 101 * case["j"]) % 255
    strip = (values.astype(np.float32) / np.float32(127.5) - np.float32(1)).reshape(3, 14, n, 14)
    return np.ascontiguousarray(strip.transpose(2, 0, 1, 3)).reshape(n, -1)


@pytest.mark.parametrize("pad_to", [None, 64, 1056])
def test_it_agrees_with_the_published_code(
    tiny: dict[str, Any], tiny_encoder: OpenVinoEncoder, pad_to: int | None
) -> None:
    for case in tiny["cases"]:
        rows, columns = case["tgt"]
        got = tiny_encoder.encode_patches(tiny_patches(case), rows, columns, pad_to=pad_to)
        wanted = np.array(case["resampler_out_4x64"], np.float32)
        assert got.dtype == np.float32
        assert np.abs(got - wanted).max() < 2e-5, case["tgt"]


# The demo model's encoder


@pytest.fixture(scope="module")
def encoder() -> OpenVinoEncoder:
    return OpenVinoEncoder(Checkpoint(SPEC.folder), SPEC.vision, ACCURATE)


def pixels(columns: int, rows: int, seed: int = 0) -> NDArray[np.uint8]:
    size = SPEC.vision.patch_size
    return np.random.default_rng(seed).integers(0, 256, (rows * size, columns * size, 3), np.uint8)


SHAPES = [(8, 8), (1, 1), (1, 60), (60, 1), (5, 12), (25, 2)]


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_padding_does_not_matter(encoder: OpenVinoEncoder, columns: int, rows: int) -> None:
    picture = pixels(columns, rows)
    alone = encoder.encode(picture)
    assert alone.shape == (SPEC.vision.query_num, SPEC.vision.output_size)
    assert np.isfinite(alone).all()
    for pad_to in (1, columns * rows, columns * rows + 1, 300):
        assert np.abs(encoder.encode(picture, pad_to=pad_to) - alone).max() < 2e-5


def test_a_slice_again_gives_the_same_bytes(encoder: OpenVinoEncoder) -> None:
    """Whatever was encoded before it."""
    first = {shape: encoder.encode(pixels(*shape)).tobytes() for shape in SHAPES}
    assert len(set(first.values())) == len(SHAPES)
    for shape in [*reversed(SHAPES), *SHAPES]:
        assert encoder.encode(pixels(*shape)).tobytes() == first[shape]


def test_the_largest_slice(encoder: OpenVinoEncoder) -> None:
    assert np.isfinite(encoder.encode(pixels(SPEC.slices.max_patches // 16, 16))).all()


# The worker


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def client(store: Store) -> Iterator[VisionClient]:
    client = VisionClient(SPEC, store)
    yield client
    client.worker.close()


def slices(n: int, seed: int = 0) -> list[tuple[str, NDArray[np.uint8]]]:
    made = [pixels(8, 8, seed + i) for i in range(n)]
    return [(slice_key(part, SPEC.encoder_digest), part) for part in made]


def test_embeddings_come_to_the_store(client: VisionClient, store: Store, encoder: OpenVinoEncoder) -> None:
    wanted, seen = slices(3), list[tuple[int, int]]()
    done = client.encode(wanted, lambda done, total: seen.append((done, total)))
    assert (done.n_slices, done.restarts) == (3, 0)
    assert done.seconds > 0
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for key, part in wanted:
        kept = store.get(key)
        assert kept is not None
        assert np.abs(kept - encoder.encode(part)).max() < 2e-5

    # Once more in another store, all at once, one by one and in another order: the same bytes.
    other = Store(store.root.parent / "other")
    again = VisionClient(SPEC, other)
    for part_of in ([wanted[2]], [wanted[0], wanted[1]]):
        again.encode(part_of)
    again.worker.close()
    assert all(same_bytes(store.get(key), other.get(key)) for key, _ in wanted)


def same_bytes(a: NDArray[np.float32] | None, b: NDArray[np.float32] | None) -> bool:
    return a is not None and b is not None and a.tobytes() == b.tobytes()


def test_what_the_store_has_is_left_alone(client: VisionClient, store: Store) -> None:
    wanted = slices(2)
    marked = np.full((SPEC.vision.query_num, SPEC.vision.output_size), 7, np.float32)
    store.put(wanted[0][0], marked)
    client.encode(wanted)
    assert same_bytes(store.get(wanted[0][0]), marked)


def test_nothing_to_do_starts_no_worker(client: VisionClient) -> None:
    assert client.encode([]).n_slices == 0
    assert client.worker.pid is None


def killer(client: VisionClient, n_times: int) -> Callable[[int, int], None]:
    """A progress function that kills the worker after its first slice, and so its first successors."""
    killed: set[int] = set()

    def progress(done: int, total: int) -> None:
        pid = client.worker.pid
        if pid is not None and pid not in killed and len(killed) < n_times:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)

    return progress


def test_a_worker_killed_while_it_encodes_is_replaced_once(client: VisionClient, store: Store) -> None:
    wanted = slices(60)
    done = client.encode(wanted, killer(client, 1))
    assert (done.n_slices, done.restarts) == (60, 1)
    assert all(store.has(key) for key, _ in wanted)


def test_a_worker_killed_twice_is_an_error_and_the_next_call_goes_on(client: VisionClient, store: Store) -> None:
    wanted = slices(60)
    with pytest.raises(WorkerDied) as caught:
        client.encode(wanted, killer(client, 2))
    assert caught.value.exit_code == -9
    done = client.encode(wanted)
    assert (done.n_slices, done.restarts) == (60, 0)
    assert all(store.has(key) for key, _ in wanted)


def test_cancel_between_slices(client: VisionClient, store: Store) -> None:
    wanted, seen = slices(200), list[int]()
    done = client.encode(wanted, lambda done, total: seen.append(done), lambda: len(seen) >= 2)
    assert 2 <= done.n_slices == len(seen) < 200
    pid = client.worker.pid
    assert client.encode(wanted[:3]).n_slices == 3
    assert client.worker.pid == pid


def test_a_large_request_goes_in_several(client: VisionClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmchat.vision_proc._MAX_REQUEST_BYTES", 2 * 112 * 112 * 3)
    wanted, seen = slices(5), list[tuple[int, int]]()
    assert client.encode(wanted, lambda done, total: seen.append((done, total))).n_slices == 5
    assert seen == [(i, 5) for i in range(1, 6)]


BAD_PIXELS: dict[str, NDArray[Any]] = {
    "not whole patches": np.zeros((14, 15, 3), np.uint8),
    "less than a patch": np.zeros((0, 14, 3), np.uint8),
    "too many patches": np.zeros((14 * 32, 14 * 65, 3), np.uint8),
    "four channels": np.zeros((14, 14, 4), np.uint8),
    "floats": np.zeros((14, 14, 3), np.float32),
}


def test_bad_slices_are_refused_and_the_worker_lives_on(client: VisionClient, store: Store) -> None:
    client.encode(slices(1))
    pid = client.worker.pid
    for what, bad in BAD_PIXELS.items():
        key = "ab" * 32
        with pytest.raises(ImageError, match=rf"a slice of {bad.shape[1]}x{bad.shape[0]}"):
            client.encode([*slices(1), (key, bad)])
        assert not store.has(key), what
    with pytest.raises(StoreError, match="is not a key"):
        client.encode([("../../etc/passwd", pixels(1, 1))])
    assert client.encode(slices(1)).n_slices == 1
    assert client.worker.pid == pid


def test_a_store_that_cannot_be_written_is_an_error(client: VisionClient, store: Store) -> None:
    store.cap_bytes = 100
    small = VisionClient(SPEC, store)
    with pytest.raises(StoreError, match="over the store's cap"):
        small.encode(slices(1))
    small.worker.close()


def test_a_folder_that_is_no_model(client: VisionClient, tmp_path: Path) -> None:
    client.worker._config["folder"] = str(tmp_path)
    with pytest.raises((EngineError, ValueError), match="lacks config"):
        client.encode(slices(1))


def test_close_ends_the_worker(client: VisionClient) -> None:
    client.encode(slices(1))
    pid = client.worker.pid
    assert pid is not None
    client.worker.close()
    assert is_gone(pid)
