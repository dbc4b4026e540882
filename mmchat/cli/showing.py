"""mmchat slices and mmchat prompt: what would be sent, without running anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmchat.cli.options import UsageError, policy
from mmchat.cli.terminal import describe_plan
from mmchat.context import Conversation, Policy, fit
from mmchat.errors import ContextFull, ImageError, PromptError
from mmchat.forecast import Plan, make_plan, published
from mmchat.images import read_image
from mmchat.model_dir import ModelSpec, open_model
from mmchat.prompt import DEFAULT_SYSTEM_PROMPT, ChatTokenizer, Message, RowCounter, Text, build, picture_rows
from mmchat.record import ImageHandle, Marks, Turn, Usage, images_in
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


def prompt(
    conversation: str,
    tokenizer: str | None,
    model: str | None,
    context_rows: int | None,
    max_new_tokens: int | None,
    steps: str | None,
    as_json: bool,
) -> None:
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
    limit = spec = None
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
        limit = min(context_rows or spec.context_rows, spec.context_rows)
    assert tokenizer is not None
    options = {name: given[name] for name in known - {"messages"} if name in given}
    made = build(given["messages"], tokenizer, **options, **numbers)
    budget = None if limit is None else {"rows": made.n_rows, "context_rows": limit, "left": limit - made.n_rows}
    plan: Plan | ContextFull | None = None
    if spec is not None and limit is not None:
        plan = _plan(given, spec, limit, max_new_tokens or spec.sampling.max_new_tokens, policy(steps))
    if as_json:
        spans = [list(span) for span in made.image_spans]
        shown: dict[str, Any] = {"ids": made.ids, "image_spans": spans, "n_vision_inputs": made.n_vision_inputs}
        if budget is not None:
            planned = {"error": str(plan)} if isinstance(plan, ContextFull) else plan and plan.to_dict()
            shown.update(budget=budget, plan=planned)
        print(json.dumps(shown))
        return
    print(f"rows            {made.n_rows}")
    print(f"vision inputs   {made.n_vision_inputs}")
    if budget is not None:
        print(f"context         {budget['context_rows']} rows, {budget['left']} left for the answer")
    if isinstance(plan, ContextFull):
        print(f"does not fit    {plan}")
    elif plan is not None:
        print("would be sent")
        print("\n".join(f"  {line}" for line in describe_plan(plan)))
    print(f"image spans     {' '.join(f'[{start}, {end})' for start, end in made.image_spans) or 'none'}")
    print(f"ids             {' '.join(map(str, made.ids))}")


def _plan(
    given: dict[str, Any], spec: ModelSpec, cap: int, max_new_tokens: int, policy: Policy
) -> Plan | ContextFull | None:
    """What a session would send of it, asking the last question; None where it is not questions and answers in turns.

    given: what build() has taken, so it is valid.
    """
    messages = list(given["messages"])
    system = given.get("system_prompt") or DEFAULT_SYSTEM_PROMPT
    if messages and messages[0]["role"] == "system":
        system = "\n".join(part for part in _parts(messages.pop(0), 0, 0, spec, given) if isinstance(part, str))
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return None
    tokenizer = ChatTokenizer(spec.tokenizer_path)
    turns: list[Turn] = []
    n_images = 0
    for asked, answered in zip(messages[::2], messages[1::2], strict=False):
        parts = _parts(asked, n_images, len(turns) + 1, spec, given)
        n_images += len(images_in(parts))
        text = "\n".join(part for part in _parts(answered, 0, 0, spec, given) if isinstance(part, str))
        turns.append(Turn(parts, text, tuple(tokenizer.encode(text)), "stop", Usage()))
    question = _parts(messages[-1], n_images, len(turns) + 1, spec, given)
    talk = Conversation(Message("system", (Text(system),)), turns, question)
    counter = RowCounter(tokenizer, query_num=spec.vision.query_num, use_image_id=given["use_image_id"] is not False)
    try:
        fitted = fit(talk, Marks(), counter, cap=cap, max_new_tokens=max_new_tokens, policy=policy)
    except ContextFull as error:
        return error
    slices = sum(image.slices for image in images_in(question))
    return make_plan(talk, fitted, max_new_tokens, cap, 0, slices, published() if spec.board else {})


def _parts(
    message: dict[str, Any], n_images: int, turn: int, spec: ModelSpec, given: dict[str, Any]
) -> tuple[str | ImageHandle, ...]:
    content = message["content"]
    if isinstance(content, str):
        return (content,)
    parts: list[str | ImageHandle] = []
    for part in content:
        if part["type"] == "text":
            parts.append(part["text"])
            continue
        n_images += 1
        plan = plan_slices(
            *part["size"],
            max_slice_nums=given["max_slice_nums"] or 9,  # as in build()
            scale_resolution=spec.slices.scale_resolution,
            patch_size=spec.slices.patch_size,
            max_patches=spec.slices.max_patches,
        )
        rows = plan.n_inputs * spec.vision.query_num
        keys = ("",) * plan.n_inputs
        parts.append(
            ImageHandle(f"img{n_images}", plan.size, plan.n_inputs, rows, turn, plan=plan, keys=keys, pixels=list)
        )
    return tuple(parts)


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
