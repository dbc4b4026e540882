"""mmchat slices and mmchat prompt: what would be sent, without running anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmchat.cli.options import UsageError
from mmchat.errors import ImageError, PromptError
from mmchat.images import read_image
from mmchat.model_dir import open_model
from mmchat.prompt import ChatTokenizer, build, picture_rows
from mmchat.slicing import Size, plan_slices


def slices(
    picture: str, model: str, resolution: int | None, max_slices: int | None, save: str | None, as_json: bool
) -> None:
    spec = open_model(model)
    image = read_image(sys.stdin.buffer.read() if picture == "-" else Path(picture))
    plan = plan_slices(
        *image.size,
        max_slice_nums=max_slices or spec.slices.max_slice_nums,
        scale_resolution=resolution or spec.slices.scale_resolution,
        patch_size=spec.slices.patch_size,
        max_patches=spec.slices.max_patches,
    )
    query_num = spec.vision.query_num
    image_rows = plan.n_inputs * query_num
    prompt_rows = picture_rows(plan, ChatTokenizer(spec.tokenizer_path), query_num)
    if save:
        from mmchat.overlay import draw_cut

        target = Path(save)
        if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UsageError(f"--save {save}: the name must end in .png, .jpg or .webp")
        try:
            draw_cut(image, plan, query_num).save(target)
        except OSError as error:
            raise ImageError(f"{save}: cannot be written ({error.strerror or error})") from None
    if as_json:
        shown: dict[str, Any] = {
            "size": plan.size,
            "source": plan.source,
            "grid": plan.grid,
            "refined": plan.refined,
            "cell": plan.cell,
            "n_inputs": plan.n_inputs,
            "shrunk": plan.shrunk,
            "rows_per_input": query_num,
            "image_rows": image_rows,
            "prompt_rows": prompt_rows,
            "saved": save,
        }
        print(json.dumps(shown))
        return
    print(f"picture   {_by(plan.size)}")
    print(f"source    {_by(plan.source)}, the whole picture")
    if plan.grid and plan.refined and plan.cell:
        print(
            f"grid      {plan.grid[0]} columns x {plan.grid[1]} rows of {_by(plan.cell)}, cut from {_by(plan.refined)}"
        )
    else:
        print("grid      none: small enough for one view")
    if plan.shrunk:
        print(f"shrunk    to the encoder's {spec.slices.max_patches} patches per view")
    print(f"rows      {plan.n_inputs} views x {query_num} = {image_rows}, with tags {prompt_rows} of the prompt")
    if save:
        print(f"saved     {save}")


def prompt(conversation: str, tokenizer: str | None, model: str | None, as_json: bool) -> None:
    if (tokenizer is None) == (model is None):
        raise UsageError("give either --tokenizer FILE or --model DIR")
    try:
        text = sys.stdin.read() if conversation == "-" else Path(conversation).read_text(encoding="utf-8")
        given = json.loads(text)
    except FileNotFoundError:
        raise PromptError(f"{conversation}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{conversation}: not JSON ({error})") from None
    known = {"messages", "system_prompt", "use_image_id", "max_slice_nums"}
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise PromptError(f'{conversation}: must be an object with a list of "messages"')
    if unknown := set(given) - known:
        raise PromptError(f"{conversation}: unknown {sorted(unknown)}; known are {sorted(known)}")
    numbers: dict[str, Any] = {}
    limit = None
    if model is not None:
        spec = open_model(model)
        tokenizer = str(spec.tokenizer_path)
        numbers = {
            "query_num": spec.vision.query_num,
            "scale_resolution": spec.slices.scale_resolution,
            "patch_size": spec.slices.patch_size,
            "max_patches": spec.slices.max_patches,
        }
        given.setdefault("max_slice_nums", spec.slices.max_slice_nums)
        given.setdefault("use_image_id", spec.use_image_id)
        limit = spec.context_rows
    assert tokenizer is not None
    options = {name: given[name] for name in known - {"messages"} if name in given}
    made = build(given["messages"], tokenizer, **options, **numbers)
    budget = None if limit is None else {"rows": made.n_rows, "context_rows": limit, "left": limit - made.n_rows}
    if as_json:
        spans = [list(span) for span in made.image_spans]
        shown: dict[str, Any] = {"ids": made.ids, "image_spans": spans, "n_vision_inputs": made.n_vision_inputs}
        print(json.dumps(shown if budget is None else {**shown, "budget": budget}))
        return
    print(f"rows            {made.n_rows}")
    print(f"vision inputs   {made.n_vision_inputs}")
    if budget is not None:
        print(f"context         {budget['context_rows']} rows, {budget['left']} left for the answer")
    print(f"image spans     {' '.join(f'[{start}, {end})' for start, end in made.image_spans) or 'none'}")
    print(f"ids             {' '.join(map(str, made.ids))}")


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
