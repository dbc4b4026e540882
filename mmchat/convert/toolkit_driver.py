"""One job in rknn-toolkit2 or rkllm-toolkit: runs in *their* Python environment, and imports nothing of mmchat.

    python toolkit_driver.py JOB EVENTS LIFELINE

JOB: a JSON file; its "kind" is a function below.  EVENTS: a descriptor that JSON lines are written to: {"step": what
begins now}, and at last {"result"} or {"failed": call, "message"}.  LIFELINE: the reading end of a pipe; when its
other end closes, the kernel ends this process.  What the toolkits print is theirs: mmchat keeps it as a log.

Both toolkits return codes and print why, raise for some mistakes, and abort the process for others.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

Say = Callable[..., None]

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [one for one in sys.path if os.path.abspath(one or ".") != HERE]  # its neighbours are no modules here


class Failed(Exception):
    """call: which one.  The text: what it said."""

    def __init__(self, call: str, message: str) -> None:
        self.call = call
        super().__init__(message)


def called(name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What the call returns.  Raises Failed for whatever it raises."""
    try:
        return call(*arguments, **named)
    except Exception as error:
        traceback.print_exc()
        raise Failed(name, f"{type(error).__name__}: {error}") from None


def succeeded(name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Raises Failed where the call raises, or returns another code than 0."""
    code = called(name, call, *arguments, **named)
    if code != 0:
        raise Failed(name, f"returned {code!r}")


def version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(package)
    except PackageNotFoundError:
        return "unknown"


def known_only(call: Callable[..., Any], values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(those of the values that the call takes, the names of the others): releases differ."""
    try:
        parameters = inspect.signature(call).parameters
    except ValueError:  # compiled, and does not tell
        return values, []
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return values, []
    known = {name: value for name, value in values.items() if name in parameters}
    return known, sorted(set(values) - set(known))


# --- rknn-toolkit2 ----------------------------------------------------------------------------------------------


def rknn(job: dict[str, Any], say: Say) -> dict[str, Any]:
    """ONNX -> *.rknn, then the PC simulator's outputs against onnxruntime's.

    job: onnx, out (paths), target, config (of RKNN.config), quantize (a dataset's path or None; what int8 spoils
    stays float16), samples: for each one the files of its inputs (.npy), in the model's order.

    Gives {"toolkit", "outputs": [{"name", "cosine": [one per sample], "error": [...], "largest": [...]}]}.
    """
    import numpy as np

    say(step="import")
    RKNN = called("import rknn.api", lambda: __import__("rknn.api", fromlist=["RKNN"]).RKNN)
    onnxruntime = called("import onnxruntime", __import__, "onnxruntime")
    samples = [[np.load(path) for path in paths] for paths in job["samples"]]

    say(step="onnxruntime")
    session = called("onnxruntime", onnxruntime.InferenceSession, job["onnx"], providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    outputs = [one.name for one in session.get_outputs()]
    wanted = [called("onnxruntime", session.run, None, dict(zip(names, sample, strict=True))) for sample in samples]
    del session  # its weights, before the toolkit needs the memory

    toolkit, ignored = built(RKNN, job, say)
    say(step="export")
    succeeded("export_rknn", toolkit.export_rknn, job["out"])
    say(step="simulator")
    succeeded("init_runtime", toolkit.init_runtime)  # without a target it is the simulator
    compared: list[dict[str, Any]] = [{"name": name, "cosine": [], "error": [], "largest": []} for name in outputs]
    for sample, right in zip(samples, wanted, strict=True):
        found = simulated(toolkit, sample, len(right))
        for row, is_, should in zip(compared, found, right, strict=True):
            if np.size(is_) != np.size(should):
                raise Failed("inference", f"gave {row['name']} of shape {np.shape(is_)}, not {should.shape}")
            a, b = (np.asarray(one, np.float64).reshape(-1) for one in (is_, should))
            row["cosine"].append(float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)))
            row["error"].append(float(np.abs(a - b).max()))
            row["largest"].append(float(np.abs(b).max()))
    return {"toolkit": version("rknn-toolkit2"), "ignored": ignored, "outputs": compared}


def rknn_simulator(job: dict[str, Any], say: Say) -> dict[str, Any]:
    """What the PC simulator computes of an ONNX.

    job: onnx, target, config and quantize as above; samples: for each one the files of its inputs, and at last the
    one that the first output goes to (.npy).
    """
    import numpy as np

    say(step="import")
    RKNN = called("import rknn.api", lambda: __import__("rknn.api", fromlist=["RKNN"]).RKNN)
    toolkit, ignored = built(RKNN, job, say)
    succeeded("init_runtime", toolkit.init_runtime)
    for number, (*inputs, output) in enumerate(job["samples"], 1):
        say(step=f"simulator, view {number} of {len(job['samples'])}")
        np.save(output, simulated(toolkit, [np.load(path) for path in inputs], 1)[0])
    return {"toolkit": version("rknn-toolkit2"), "ignored": ignored}


def built(RKNN: Callable[[], Any], job: dict[str, Any], say: Say) -> tuple[Any, list[str]]:
    """The toolkit with the model built in it, and the options that this release does not have."""
    say(step="load")
    toolkit = RKNN()
    config, unknown = known_only(toolkit.config, job["config"])
    called("config", toolkit.config, target_platform=job["target"], **config)
    succeeded("load_onnx", toolkit.load_onnx, model=job["onnx"])
    say(step="build")
    options, ignored = known_only(toolkit.build, {"auto_hybrid": True} if job["quantize"] else {})
    succeeded("build", toolkit.build, do_quantization=bool(job["quantize"]), dataset=job["quantize"], **options)
    return toolkit, unknown + ignored


def simulated(toolkit: Any, inputs: list[Any], n_outputs: int) -> list[Any]:
    """The outputs, all finite."""
    import numpy as np

    found = called("inference", toolkit.inference, inputs=inputs)
    if found is None or len(found) != n_outputs:
        raise Failed("inference", f"gave {len(found) if found else found} outputs of {n_outputs}")
    for number, one in enumerate(found):
        if not np.isfinite(np.asarray(one, np.float64)).all():
            raise Failed("inference", f"gave values in output {number} that are not finite")
    return list(found)


# --- rkllm-toolkit ----------------------------------------------------------------------------------------------


def rkllm(job: dict[str, Any], say: Say) -> dict[str, Any]:
    """A plain Qwen2 folder -> *.rkllm.

    job: model (a folder), load (options of load_huggingface), build (options of build), out (a path), samples: of
    prompts that it is calibrated with, [{"rows": a file of (n, hidden) floats, "target": the answer, where known}].
    """
    say(step="import")
    RKLLM = called("import rkllm.api", lambda: __import__("rkllm.api", fromlist=["RKLLM"]).RKLLM)
    toolkit = RKLLM()
    dataset = None
    if job["samples"]:
        dataset = "inputs.json"
        write_dataset(job["samples"], dataset)
    load, not_loaded = known_only(toolkit.load_huggingface, job["load"])
    build, not_built = known_only(toolkit.build, {**job["build"], "dataset": dataset})
    say(step="load")
    succeeded("load_huggingface", toolkit.load_huggingface, model=job["model"], **load)
    say(step="build")
    succeeded("build", toolkit.build, **build)
    say(step="export")
    succeeded("export_rkllm", toolkit.export_rkllm, job["out"])
    if os.path.exists(job["out"] + ".rkllm"):  # 1.3.0 was reported to add it to names that have it
        os.replace(job["out"] + ".rkllm", job["out"])
    return {"toolkit": version("rkllm-toolkit"), "ignored": not_loaded + not_built}


def write_dataset(samples: list[dict[str, Any]], path: str) -> None:
    """As the vendor's make_input_embeds_for_quantize.py does: float16 in JSON, (1, n, hidden)."""
    import numpy as np

    with open(path, "w", encoding="utf-8") as file:
        for number, sample in enumerate(samples):
            rows = np.load(sample["rows"]).astype(np.float16)[None]
            known = {"target": sample["target"]} if sample.get("target") else {}
            file.write(("[\n" if number == 0 else ",\n") + json.dumps({"input_embed": rows.tolist(), **known}))
        file.write("\n]\n")


JOBS: dict[str, Callable[[dict[str, Any], Say], dict[str, Any]]] = {
    "rknn": rknn,
    "rknn-simulator": rknn_simulator,
    "rkllm": rkllm,
}


def die_with(lifeline: int) -> None:
    """Have the kernel end this process when the pipe's other end closes, even while C code holds the interpreter."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # whose default is to terminate
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # closed before we asked
        os._exit(0)


def main() -> None:
    path, events, lifeline = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with(lifeline)

    def say(**event: Any) -> None:
        os.write(events, (json.dumps(event) + "\n").encode())

    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    try:
        say(result=JOBS[job["kind"]](job, say))
    except Failed as error:
        say(failed=error.call, message=str(error))
    except Exception as error:
        traceback.print_exc()
        say(failed=job["kind"], message=f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not exit(): the toolkits' destructors may crash


if __name__ == "__main__":
    main()
