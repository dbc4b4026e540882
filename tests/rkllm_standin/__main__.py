"""Write a complete board folder around the stand-in library.

    python -m tests.rkllm_standin --family 1.3.0 --out DIR
    MMCHAT_RKLLM_LIB=DIR/librkllmrt.so mmchat chat --model DIR

With --vision navit or square the encoder is one for the NPU, and tests/rknn_standin/lite2 (copied to DIR/lite2) stands
in for rknn-toolkit-lite2:

    PYTHONPATH=DIR/lite2 MMCHAT_RKLLM_LIB=DIR/librkllmrt.so mmchat chat --model DIR

Neither library is the vendor's, and model.rkllm and vision.rknn are none of their files: the folder shows how mmchat
behaves on a board, not how fast or how well it answers there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from mmchat.checkpoint import Checkpoint, write_tensors
from mmchat.embed_table import build_table
from mmchat.model_dir import DEMO, ModelSpec, open_model
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_abi import FAMILIES
from tests.rkllm_standin.build import build
from tests.rknn_standin.model import LITE2, write_encoder, write_positions
from tools.write_rkllm_standin_model import write_model

LIBRARY, LLM, TABLE, VISION = "librkllmrt.so", "model.rkllm", "embed_tokens.safetensors", "vision.safetensors"
RKNN, POSITION_TABLE = "vision.rknn", "vision_positions.safetensors"
VISION_MODES = ("openvino", "navit", "square")
# Of the demo model, whose square view has 64 patches: holds every view of pictures up to 10:1 (75 at most).
N_PATCHES = 80
_COPIED = ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json")


def write_board_folder(
    out: str | Path, family: str, *, version: str | None = None, model: str | Path = DEMO, vision: str = "openvino"
) -> Path:
    """Write the folder that a person with a board would have.  Returns it.

    model: the checkpoint that its parts are made from.  vision: the encoder, one of VISION_MODES.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    spec = open_model(model)
    shutil.copyfile(build(family, version), out / LIBRARY)
    write_model(model, out / LLM)
    build_table(spec.folder, out / TABLE)
    if vision == "openvino":
        _write_vision(spec, out / VISION)
    else:
        write_encoder(spec, out / RKNN, vision, n_patches=N_PATCHES)
        shutil.copytree(LITE2, out / LITE2.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    if vision == "navit":
        write_positions(spec, out / POSITION_TABLE)
    for name in _COPIED:
        if (spec.folder / name).exists():
            shutil.copyfile(spec.folder / name, out / name)
    (out / "mmchat.json").write_text(json.dumps(_description(spec, out, vision), indent=2) + "\n")
    return out


def _write_vision(spec: ModelSpec, path: Path) -> None:
    """The encoder's tensors alone, for it runs on the CPU here."""
    checkpoint = Checkpoint(spec.folder)
    names = [name for name in checkpoint if name.startswith(("vpm.", "resampler."))]
    write_tensors(
        path,
        {
            name: (checkpoint.info(name).dtype, checkpoint.info(name).shape, [checkpoint.array(name).tobytes()])
            for name in names
        },
    )


def _description(spec: ModelSpec, out: Path, vision: str) -> dict[str, Any]:
    """mmchat.json; the library is left out, for it belongs to the board, not to the model."""
    tokenizer = ChatTokenizer(spec.tokenizer_path)
    encoders: dict[str, dict[str, Any]] = {
        "openvino": {"file": VISION},
        "navit": {"file": RKNN, "patches": N_PATCHES, "positions": POSITION_TABLE},
        "square": {"file": RKNN, "side": spec.slices.scale_resolution},
    }
    encoder = encoders[vision]
    return {
        "format": 1,
        "family": "minicpmv-2.6",
        "name": f"{spec.name} (stand-in)",
        "hidden_size": spec.llm.hidden_size,
        "context_rows": spec.llm.context_rows,
        "query_num": spec.vision.query_num,
        "use_image_id": spec.use_image_id,
        "llm": {"engine": "rkllm", "file": LLM},
        "embed_table": {"file": TABLE},
        "vision": {"mode": vision, **encoder},
        "slices": {
            "max_slice_nums": spec.slices.max_slice_nums,
            "scale_resolution": spec.slices.scale_resolution,
            "patch_size": spec.slices.patch_size,
            "max_patches": encoder.get("patches", spec.slices.max_patches),
        },
        "special_ids": tokenizer.special,
        "stop_ids": sorted(tokenizer.stop_ids),
        "sampling": spec.sampling.to_dict(),
        "files": {
            name: {
                "bytes": (out / name).stat().st_size,
                "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
            }
            for name in (LLM, TABLE, encoder["file"], encoder.get("positions"), *_COPIED)
            if name and (out / name).exists()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.rkllm_standin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", required=True, choices=list(FAMILIES))
    parser.add_argument("--release", help="what the library says it is; the family's newest release by default")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--model", default=DEMO, help='a checkpoint folder; "demo" by default')
    parser.add_argument("--vision", default="openvino", choices=VISION_MODES, help='"openvino" by default')
    options = parser.parse_args()
    print(
        write_board_folder(
            options.out, options.family, version=options.release, model=options.model, vision=options.vision
        )
    )


if __name__ == "__main__":
    main()
