"""mmchat slices and mmchat prompt: what would be sent, without running anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmchat.cli.options import UsageError, policy
from mmchat.cli.terminal import describe_plan
from mmchat.context import Conversation, Policy
from mmchat.errors import ContextFull, ImageError, ModelDirError, PromptError
from mmchat.forecast import Outlook, Plan, plan_prompt
from mmchat.images import read_image
from mmchat.model_dir import ModelSpec, open_model
from mmchat.prompt import (
    DEFAULT_SYSTEM_PROMPT,
    ChatTokenizer,
    Message,
    Prompt,
    RowCounter,
    Text,
    build,
    picture_rows,
    render,
)
from mmchat.record import ImageHandle, Marks, Turn, Usage, images_in
from mmchat.runtime import outlook
from mmchat.slicing import Size, plan_slices

_KNOWN = {"messages", "system_prompt", "use_image_id", "max_slice_nums"}


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
    for name, value in (("--context", context_rows), ("--max-new-tokens", max_new_tokens), ("--policy", steps)):
        if value is not None and model is None:
            raise UsageError(f"{name} needs --model DIR: a tokenizer alone does not say what fits")
    try:
        text = sys.stdin.read() if conversation == "-" else Path(conversation).read_text(encoding="utf-8")
        given = json.loads(text)
    except FileNotFoundError:
        raise PromptError(f"{conversation}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{conversation}: not JSON ({error})") from None
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise PromptError(f'{conversation}: must be an object with a list of "messages"')
    if unknown := set(given) - _KNOWN:
        raise PromptError(f"{conversation}: unknown {sorted(unknown)}; known are {sorted(_KNOWN)}")
    if model is not None:
        spec = open_model(model)
        for name, default in (("max_slice_nums", spec.slices.max_slice_nums), ("use_image_id", spec.use_image_id)):
            if given.get(name) is None:
                given[name] = default
        numbers: dict[str, Any] = {
            "query_num": spec.vision.query_num,
            "scale_resolution": spec.slices.scale_resolution,
            "patch_size": spec.slices.patch_size,
            "max_patches": spec.slices.max_patches,
        }
        limit = spec.context_of(context_rows)
        made = _build(given, spec.tokenizer_path, numbers)
        sent = _sent(given, spec, limit, max_new_tokens or spec.sampling.max_new_tokens, policy(steps))
        _show(made, sent, limit, as_json)
        return
    assert tokenizer is not None
    made = _build(given, tokenizer, {})
    if as_json:
        print(json.dumps(_rows_to_json(made)))
    else:
        _print_rows(made)
        _print_ids(made)


def _build(given: dict[str, Any], tokenizer: str | Path, numbers: dict[str, Any]) -> Prompt:
    options = {name: given[name] for name in _KNOWN - {"messages"} if name in given}
    return build(given["messages"], tokenizer, **options, **numbers)


def _show(made: Prompt, sent: tuple[Plan, Prompt] | ContextFull | None, limit: int, as_json: bool) -> None:
    """made: the conversation as it is given.  sent: what a session would make of it; None where it can have no such.

    What does not fit has a budget of all its rows, and no row is sent.
    """
    plan = sent[0] if isinstance(sent, tuple) else None
    shown = sent[1] if isinstance(sent, tuple) else made
    budget = {"rows": shown.n_rows, "context_rows": limit, "left": limit - shown.n_rows}
    if as_json:
        rows = _rows_to_json(Prompt((), [], []) if isinstance(sent, ContextFull) else shown)
        planned = {"error": str(sent)} if isinstance(sent, ContextFull) else plan and plan.to_dict()
        print(json.dumps({**rows, "budget": budget, "plan": planned}))
        return
    _print_rows(shown)
    print(f"context         {budget['context_rows']} rows, {budget['left']} left for the answer")
    if isinstance(sent, ContextFull):
        print(f"does not fit    {sent}")
        return
    if plan is not None:
        print("would be sent, where nothing is cached")
        print("\n".join(f"  {line}" for line in describe_plan(plan)))
    _print_ids(shown)


def _rows_to_json(made: Prompt) -> dict[str, Any]:
    spans = [list(span) for span in made.image_spans]
    return {"ids": made.ids, "image_spans": spans, "n_vision_inputs": made.n_vision_inputs}


def _print_rows(made: Prompt) -> None:
    print(f"rows            {made.n_rows}")
    print(f"vision inputs   {made.n_vision_inputs}")


def _print_ids(made: Prompt) -> None:
    print(f"image spans     {' '.join(f'[{start}, {end})' for start, end in made.image_spans) or 'none'}")
    print(f"ids             {' '.join(map(str, made.ids))}")


def _sent(
    given: dict[str, Any], spec: ModelSpec, cap: int, max_new_tokens: int, policy: Policy
) -> tuple[Plan, Prompt] | ContextFull | None:
    """What a new session would send of it, asking the last question.

    None where it is not questions and answers in turns, with pictures in questions alone.  No two pictures are the
    same, and none was encoded before.  given: what build() has taken, so it is valid.
    """
    messages = list(given["messages"])
    system = _text(messages.pop(0)) if messages[0]["role"] == "system" else given.get("system_prompt") or ""
    answers = [_text(message) for message in messages[1::2]]
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] or None in (system, *answers):
        return None
    tokenizer = ChatTokenizer(spec.tokenizer_path)
    turns: list[Turn] = []
    n_images = 0
    for asked, text in zip(messages[::2], answers, strict=False):
        parts = _parts(asked, n_images, len(turns) + 1, spec, given)
        n_images += len(images_in(parts))
        assert text is not None
        turns.append(Turn(parts, text, tuple(tokenizer.encode(text)), "stop", Usage()))
    question = _parts(messages[-1], n_images, len(turns) + 1, spec, given)
    talk = Conversation(Message("system", (Text(system or DEFAULT_SYSTEM_PROMPT),)), turns, question)
    rules: dict[str, Any] = {"query_num": spec.vision.query_num, "use_image_id": given["use_image_id"]}
    try:
        return plan_prompt(
            talk,
            Marks(),
            RowCounter(tokenizer, **rules),
            lambda marks: render(talk.messages(marks), tokenizer, **rules),
            _outlook(spec, cap),
            cap=cap,
            max_new_tokens=max_new_tokens,
            policy=policy,
            slices_new=lambda prompt, reused: prompt.n_vision_inputs,
            before={},
        )
    except ContextFull as error:
        return error


def _outlook(spec: ModelSpec, context_rows: int) -> Outlook:
    try:
        return outlook(spec, context_rows)
    except ModelDirError as error:  # a board's folder may be looked at elsewhere
        print(f"mmchat: nothing that was measured on a board is used: {error}", file=sys.stderr)
        return Outlook(published=True)


def _text(message: dict[str, Any]) -> str | None:
    """Of what is no question; None where a picture is in it."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return None if any(part["type"] == "image" for part in content) else "\n".join(part["text"] for part in content)


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
        plan = spec.slices.plan(tuple(part["size"]), given["max_slice_nums"])
        rows = plan.n_inputs * spec.vision.query_num
        keys = tuple(f"img{n_images} {i}" for i in range(plan.n_inputs))
        parts.append(
            ImageHandle(f"img{n_images}", plan.size, plan.n_inputs, rows, turn, plan=plan, keys=keys, pixels=list)
        )
    return tuple(parts)


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
