"""convert: tables and plain LLM folders equal their source, in little memory, whenever they are interrupted."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from mmchat import outputs
from mmchat.checkpoint import Checkpoint, write_tensors
from mmchat.convert import llm_checkpoint, table
from mmchat.embed_table import EmbedTable
from mmchat.errors import DiskFull, ModelDirError
from mmchat.model_dir import open_model
from tests.test_cli import mmchat_command, refused
from tools import write_large_checkpoint

DEMO = open_model("demo").folder
JSON_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "generation_config.json")


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def sharded(folder: Path, n: int = 3, *, head: bool = True) -> Path:
    """The demo's checkpoint in n files with an index, and with an output layer of its own, as published."""
    source = Checkpoint(DEMO)
    arrays = {name: (source.info(name).dtype, source.array(name)) for name in source}
    if head:
        values = np.random.default_rng(0).standard_normal((800, 192)).astype(np.float16)
        arrays["llm.lm_head.weight"] = ("F16", values)
    folder.mkdir()
    weight_map = {}
    for i in range(n):
        name = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        part = {key: arrays[key] for key in sorted(arrays)[i::n]}
        write_tensors(folder / name, {key: (dtype, a.shape, [a.tobytes()]) for key, (dtype, a) in part.items()})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file in JSON_FILES:
        shutil.copyfile(DEMO / file, folder / file)
    config = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": not head}))
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Of every file that is not hidden."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


# --- table ------------------------------------------------------------------------------------------------------


def test_the_table_of_the_demo(tmp_path: Path) -> None:
    out, err = mmchat_command("convert", "table", "demo", tmp_path / "table.safetensors")
    assert out == f"{tmp_path / 'table.safetensors'}\n"
    assert "reads 307.2 KB, writes 307.2 KB" in err
    built, source = EmbedTable.open(tmp_path / "table.safetensors"), Checkpoint(DEMO)
    np.testing.assert_array_equal(built.rows(range(built.n_ids)), source.float32("llm.model.embed_tokens.weight"))


def test_the_table_of_a_folder_that_has_one_of_its_own(tmp_path: Path) -> None:
    """Its own file lies beside the shards: no reason to ask which one is meant."""
    folder = sharded(tmp_path / "c")
    (folder / "model.safetensors.index.json").unlink()
    table.run(folder, folder / "table.safetensors", quiet)
    first = (folder / "table.safetensors").read_bytes()
    table.run(folder, tmp_path / "again.safetensors", quiet)
    assert (tmp_path / "again.safetensors").read_bytes() == first


def test_a_table_never_overwrites_its_checkpoint(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "c", 1)
    before = digests(folder)
    for target in (folder / "model-00001-of-00001.safetensors", folder):
        with pytest.raises(ModelDirError, match=r"another name|a folder"):
            table.run(folder, target, quiet)
    assert digests(folder) == before


def test_what_a_killed_table_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".table.safetensors.abc.tmp").write_bytes(b"half")
    table.run(DEMO, tmp_path / "table.safetensors", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["table.safetensors"]


# --- llm-checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_tensors_lose_their_prefix_and_nothing_else(tmp_path: Path, n: int) -> None:
    source = Checkpoint(sharded(tmp_path / "c", n))
    llm_checkpoint.run(llm_checkpoint.plan(source.folder), tmp_path / "q", quiet)
    made = Checkpoint(tmp_path / "q")
    assert set(made) == {name.removeprefix("llm.") for name in source if name.startswith("llm.")}
    for name in made:
        assert made.info(name).dtype == source.info(f"llm.{name}").dtype
        np.testing.assert_array_equal(made.array(name), source.array(f"llm.{name}"))
    assert (tmp_path / "q" / "model.safetensors.index.json").exists() == (n > 1)
    assert (tmp_path / "q" / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


def test_types_that_numpy_lacks_are_copied_too(tmp_path: Path) -> None:
    """A quantised checkpoint: the bytes are all that matters."""
    folder = sharded(tmp_path / "c", 1)
    path = folder / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F16"', b'"F8X"'))
    llm_checkpoint.run(llm_checkpoint.plan(folder), tmp_path / "q", quiet)
    assert Checkpoint(tmp_path / "q").info("lm_head.weight").dtype == "F8X"


@pytest.mark.parametrize("head", [True, False])
def test_transformers_opens_it_and_says_the_same(tmp_path: Path, head: bool) -> None:
    """Qwen2ForCausalLM, from the folder alone; the same scores as mmchat's own graph of the source."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    openvino = pytest.importorskip("openvino")
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    from mmchat.openvino_graphs import build_llm, cpu_properties

    folder = sharded(tmp_path / "c", 2, head=head)
    mmchat_command("convert", "llm-checkpoint", folder, tmp_path / "q")
    model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 500, 70)
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, -1].numpy()

    checkpoint, spec = Checkpoint(folder), open_model(folder).llm
    compiled = openvino.Core().compile_model(build_llm(checkpoint, spec), "CPU", cpu_properties(1))
    rows = checkpoint.float32("llm.model.embed_tokens.weight")[ids]
    n = len(ids)
    inputs = {
        "inputs_embeds": rows[None],
        "attention_mask": np.ones((1, n), np.int64),
        "position_ids": np.arange(n)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    found = compiled.create_infer_request().infer(inputs)["logits"][0, -1]
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(wanted).max() > 1

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "q")
    text = "What colour is the circle? 圓"
    wanted_ids = importlib.import_module("tokenizers").Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text)
    assert tokenizer(text)["input_ids"] == wanted_ids.ids


def test_the_published_tokenizer_class_is_not_asked_for(tmp_path: Path) -> None:
    """It is Python code in the checkpoint, which nobody should have to trust."""
    folder = sharded(tmp_path / "c")
    published = {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "tokenizer_class": "MiniCPMVTokenizer", "unk": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(published))
    llm_checkpoint.run(llm_checkpoint.plan(folder), tmp_path / "q", quiet)
    written = json.loads((tmp_path / "q" / "tokenizer_config.json").read_text())
    assert written == {"unk": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}


def test_a_complete_folder_is_left_as_it_is(tmp_path: Path) -> None:
    plan = llm_checkpoint.plan(sharded(tmp_path / "c"))
    llm_checkpoint.run(plan, tmp_path / "q", quiet)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "q").glob("*.safetensors")}
    llm_checkpoint.run(plan, tmp_path / "q", quiet)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "q").glob("*.safetensors")} == times


def test_a_changed_source_is_converted_anew(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "c")
    llm_checkpoint.run(llm_checkpoint.plan(folder), tmp_path / "q", quiet)
    shutil.rmtree(folder)
    sharded(folder, head=False)
    llm_checkpoint.run(llm_checkpoint.plan(folder), tmp_path / "q", quiet)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "q")


def break_(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first = folder / "model-00001-of-00003.safetensors"
    match what:
        case "shard":
            first.unlink()
        case "cut":
            first.write_bytes(first.read_bytes()[:-1])
        case "layers":
            config["num_hidden_layers"] = 5
        case "no llm":
            (folder / index["llm.model.embed_tokens.weight"]).unlink()
            (folder / "model.safetensors.index.json").unlink()
        case "config":
            config["model_type"] = "qwen2"
        case "tokenizer":
            (folder / "tokenizer.json").unlink()
        case "tied":
            name = folder / index["llm.lm_head.weight"]
            name.write_bytes(name.read_bytes().replace(b"llm.lm_head.weight", b"llm.lm_tail.weight"))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("shard", "1 of 3 weight files missing"),
        ("cut", "truncated"),
        ("layers", "has 4 layers of 5"),
        ("no llm", "no tensor 'llm.model.embed_tokens.weight'"),
        ("config", "model_type is 'qwen2', not 'minicpmv'"),
        ("tokenizer", "lacks tokenizer.json"),
        ("tied", "no tensor 'llm.lm_head.weight', which its config asks for"),
    ],
)
def test_a_source_that_is_not_whole_is_named_and_nothing_written(tmp_path: Path, what: str, said: str) -> None:
    folder = sharded(tmp_path / "c")
    break_(folder, what)
    assert said in refused("convert", "llm-checkpoint", folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_target_that_is_no_place_to_write_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "c")
    before = digests(folder)
    with pytest.raises(ModelDirError, match="own folder"):
        llm_checkpoint.run(llm_checkpoint.plan(folder), folder, quiet)
    with pytest.raises(ModelDirError, match="has files already"):
        llm_checkpoint.run(llm_checkpoint.plan(DEMO), folder, quiet)
    assert digests(folder) == before


# --- what it takes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["table", "llm-checkpoint"])
def test_a_dry_run_says_what_it_takes_and_writes_nothing(tmp_path: Path, step: str) -> None:
    out, _ = mmchat_command("convert", step, "demo", tmp_path / "x" / "y", "--dry-run", "--json")
    said = json.loads(out)
    assert said["dry_run"]
    assert said["writes"] == (800 * 192 * 2 if step == "table" else 3_458_944)
    out, _ = mmchat_command("convert", step, "demo", tmp_path / "x" / "y", "--dry-run")
    assert "takes about 1 s" in out
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "free_bytes", lambda folder: 50_100_000)  # 0.1 MB, and what is kept free
    with pytest.raises(DiskFull, match="make room"):
        table.run(DEMO, tmp_path / "table", quiet)
    with pytest.raises(DiskFull, match="make room"):
        llm_checkpoint.run(llm_checkpoint.plan(DEMO), tmp_path / "q", quiet)
    assert not list(tmp_path.glob("**/*.safetensors"))


RUN = f"import sys; sys.path[:] = {sys.path!r}\n"
# Not getrusage: its peak includes that of the process which started this one.
MEASURE = RUN + (
    "from mmchat.cli import main\n"
    "try: main()\n"
    "finally: print(next(line for line in open('/proc/self/status') if 'VmHWM' in line), file=sys.stderr)"
)


@pytest.mark.parametrize("step", ["table", "llm-checkpoint"])
def test_real_dimensions_take_little_memory(tmp_path: Path, step: str) -> None:
    """One layer and the two tables of the real model: 2.6 GB of holes."""
    write_large_checkpoint.write(tmp_path / "c", n_layers=1, vocab=151666, vision_layers=1, random=())
    command = [sys.executable, "-c", MEASURE, "convert", step, str(tmp_path / "c"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    assert int(done.stderr.split("VmHWM:")[1].split()[0]) < 300_000  # KB


def test_the_large_checkpoint_has_the_published_size() -> None:
    """As far as it is known: 8.1 billion parameters, four files."""
    shapes = write_large_checkpoint.tensors(28, 151666)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == pytest.approx(8.1e9, rel=0.01)


# --- interrupted ------------------------------------------------------------------------------------------------

GO = RUN + (
    "from pathlib import Path; from mmchat.convert import llm_checkpoint, table\n"
    "print('go', flush=True)\n"
    "source, target = map(Path, sys.argv[1:])\n"
    "llm_checkpoint.run(llm_checkpoint.plan(source), target / 'q', lambda *_: None)\n"
    "table.run(source, target / 'table.safetensors', lambda *_: None)"
)


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_files(tmp_path: Path) -> None:
    """kill -9, again and again, until one run is left alone."""
    n_kills = 50 if settings().max_examples > 1000 else 8
    source = sharded(tmp_path / "c", 6)
    wanted = tmp_path / "wanted"
    llm_checkpoint.run(llm_checkpoint.plan(source), wanted / "q", quiet)
    table.run(source, wanted / "table.safetensors", quiet)
    rng, target = random.Random(0), tmp_path / "out"
    target.mkdir()

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", GO, str(source), str(target)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        return process

    with start() as process:
        began = time.perf_counter()
        assert process.wait(timeout=120) == 0
        whole_s = time.perf_counter() - began
    interrupted = 0
    for i in range(n_kills):
        if i % 3 == 0:  # from the beginning again
            shutil.rmtree(target)
            target.mkdir()
        with start() as process:
            time.sleep(rng.uniform(0, whole_s) if i else 0.02)  # the first is not over by then
            process.kill()
            interrupted += process.wait(timeout=120) != 0
    with start() as process:
        assert process.wait(timeout=120) == 0
    assert interrupted
    assert digests(target / "q") == digests(wanted / "q")
    assert (target / "table.safetensors").read_bytes() == (wanted / "table.safetensors").read_bytes()
    hidden = [path.name for path in target.rglob(".*")]
    assert hidden == [".mmchat-convert.json"], "temporary files were left"
