"""How an RKNNLite behaves: the same questions to the real package (tests/emulated) and to the stand-in.

    python manners.py MODEL NOT_A_MODEL     # answers as JSON on the last line

For Python 3.9 and numpy alone, since it runs in an emulated system.  MODEL echoes (see model.write_echo): its inputs
are a picture (1, 4, 6, 3), as NHWC, and rows (1, 5, 2).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import numpy as np

PICTURE = np.arange(72, dtype=np.float32).reshape(1, 4, 6, 3)
ROWS = np.arange(10, dtype=np.float32).reshape(1, 5, 2)


def echo(picture: Any, rows: Any) -> list[float]:
    """What the model gives, from the bytes as they lie."""
    a, b = np.ascontiguousarray(picture).reshape(-1), np.ascontiguousarray(rows).reshape(-1)
    return [float(a[5 * i % 72]) + 100 * float(b[i % 10]) for i in range(16)]


def ask(model: str, not_a_model: str) -> dict[str, Any]:
    from rknnlite.api import RKNNLite

    told: dict[str, Any] = {}
    lite = RKNNLite()
    told["load_rknn, no file"] = lite.load_rknn(f"{model}.none")
    told["init_runtime, nothing loaded"] = lite.init_runtime()
    told["inference, not initialised"] = lite.inference([PICTURE, ROWS])
    told["load_rknn, no model"] = lite.load_rknn(not_a_model)
    told["init_runtime, no model"] = lite.init_runtime()
    told["load_rknn"] = lite.load_rknn(model)
    told["init_runtime, cores 6"] = lite.init_runtime(core_mask=6)
    told["init_runtime, three cores"] = lite.init_runtime(core_mask=RKNNLite.NPU_CORE_0_1_2)

    def run(inputs: Any, **options: Any) -> Any:
        outputs = lite.inference(inputs, **options)
        if outputs is None:
            return None
        values = np.asarray(outputs[0])
        for name, (picture, rows) in EXPECTED.items():
            if len(outputs) == 1 and values.dtype == np.float32 and values.reshape(-1).tolist() == echo(picture, rows):
                return f"{list(values.shape)} of {name}"
        return f"{values.dtype.name} {list(values.shape)} {values.reshape(-1).tolist()}"

    nchw = np.ascontiguousarray(PICTURE.transpose(0, 3, 1, 2))
    expected: dict[str, Any] = {"the inputs": (PICTURE, ROWS), "a picture in another layout": (nchw, ROWS)}
    EXPECTED.update(expected)
    told["inference"] = run([PICTURE, ROWS])
    told["inference, nhwc for all"] = run([PICTURE, ROWS], data_format=["nhwc", "nhwc"])
    told["inference, NCHW picture, unsaid"] = run([nchw, ROWS])
    told["inference, NCHW picture, said to be nhwc"] = run([nchw, ROWS], data_format=["nhwc", "nhwc"])
    told["inference, NCHW picture, said"] = run([nchw, ROWS], data_format=["nchw", "nchw"])
    told["inference, one word for all"] = run([nchw, ROWS], data_format="nchw")
    formats: list[Any] = ["nhwc", "nhwc"]
    run([PICTURE, ROWS], data_format=formats)
    told["the list of layouts afterwards"] = formats
    told["inference, too few layouts"] = run([PICTURE, ROWS], data_format=["nhwc"])
    told["inference, an unknown layout"] = run([PICTURE, ROWS], data_format=["hwcn", "nhwc"])
    told["inference, too few inputs"] = run([PICTURE])
    told["inference, no list"] = run(PICTURE)
    told["inference, a tuple"] = run((PICTURE, ROWS))
    told["inference, not arrays"] = run([PICTURE.tolist(), ROWS])
    for kind in ("float16", "uint8", "int8", "int16", "float64", "int32"):
        told[f"inference, {kind}"] = run([PICTURE.astype(kind), ROWS.astype(kind)])
    told["inference, data_type float32"] = run([PICTURE, ROWS], data_type="float32")
    told["inference, data_type float16, but float32"] = run([PICTURE, ROWS], data_type="float16")
    told["inference, rows of another shape"] = run([PICTURE, ROWS.reshape(1, 2, 5)])
    told["inference, too many rows"] = run([PICTURE, np.zeros((1, 6, 2), np.float32)])
    told["inference, a picture of three dimensions"] = run([PICTURE[0], ROWS])
    told["inference, not contiguous"] = run([nchw.transpose(0, 2, 3, 1), ROWS])
    run([PICTURE, ROWS])
    for name, fake, standin in (
        ("inputs_set", "inputs_set:-5", "SET"),
        ("run", "run:-1", "RUN"),
        ("outputs_get", "outputs_get:-9", "NONE"),
    ):
        os.environ.update({"FAKE_RKNN": fake, f"RKNN_STANDIN_{standin}": "1+"})  # of librknnrt.c, of the stand-in
        told[f"inference of something else, rknn_{name} fails"] = run([PICTURE + 1, ROWS])
        del os.environ["FAKE_RKNN"], os.environ[f"RKNN_STANDIN_{standin}"]
    first = lite.inference([PICTURE, ROWS])
    kept = [np.array(one) for one in first]
    lite.inference([PICTURE + 1, ROWS])
    told["outputs are copies"] = all((a == b).all() for a, b in zip(first, kept))  # noqa: B905
    told["inputs are untouched"] = bool((PICTURE.reshape(-1) == np.arange(72)).all())
    gc.collect()
    gc.disable()
    lite.inference([PICTURE, ROWS])
    told["a call leaves cycles"] = gc.collect() > 0
    gc.enable()
    told["release"] = lite.release()
    told["release again"] = lite.release()
    told["inference, released"] = run([PICTURE, ROWS])
    return told


EXPECTED: dict[str, Any] = {}

if __name__ == "__main__":
    print(json.dumps(ask(*sys.argv[1:])))
