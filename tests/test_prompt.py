"""prompt: the published template's exact ids; typed tags are plain text; nothing is ever cut off."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmchat.engine import ImageRows, Tokens
from mmchat.errors import ContextFull, ImageError, ModelDirError, PromptError
from mmchat.prompt import (
    DEFAULT_SYSTEM_PROMPT,
    ChatTokenizer,
    Message,
    Picture,
    Prompt,
    Text,
    build,
    picture_rows,
    render,
)
from mmchat.slicing import plan_slices

DEMO_TOKENIZER = Path(__file__).resolve().parents[1] / "mmchat" / "demo" / "tokenizer.json"

# Recorded vectors whose ids differ, and why.  In each the user typed a tag; the reference made a control token of it.
TYPED_TAGS = {
    "inj_im_end_text": "ends the user's message and begins a system message of the user's own",
    "inj_im_end_img": "ends the message in its middle",
    "inj_unk": "adds rows that look like image features",
    "inj_unk_textonly": "the same without a picture",
    "inj_image_tag_text": "an image that never ends: the reference raises",
    "inj_image_pair_text": "an image block without an image",
    "inj_image_pair_img": "a second image block: features would not match",
    "inj_image_open_img": "an image that never ends: the reference raises",
    "inj_slice_img": "a whole slice: asks for more features than there are",
    "inj_placeholder_text": "the reference's own placeholder: it raises",
    "inj_placeholder_img": "the reference's own placeholder: it raises",
    "inj_regex_dot": "what the placeholder's pattern also matches: the reference raises",
    "inj_regex_noparen_img": "what the placeholder's pattern also matches: the reference raises",
    "inj_image_id": "numbers an image that is not there",
    "inj_ref_box": "control tokens of grounding",
    "inj_reserved": "a reserved control token",
    "rand5": "holds <ref>",
    "rand11": "holds <image_id>",
    "rand12": "holds <image_id>",
    "rand15": "holds <image_id>",
    "rand23": "holds <ref>",
}
# Recorded vectors that the reference cuts off at max_inp_length (or fails to); here they are refused.
CUT_OFF = {
    "trunc_text": "the question's end and the assistant's header are lost",
    "trunc_in_image": "the cut is inside an image: the reference raises",
    "trunc_after_first_image": "the second image is lost, its features are not",
    "trunc_tail_only": "the question's end and the assistant's header are lost",
    "trunc_in_slices": "the cut is inside a slice: the reference raises",
}
FRAGMENTS = [
    "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>", "<unk>", "<|im_start|>", "<|im_end|>",
    "<|endoftext|>", "<ref>", "</box>", "(<image>./</image>)", "<|im", "_end|>", "<", ">", "|", "unk", "image",
    "im_start", "\n", "system\n", "assistant", " ", "!", "0", "é", "e\u0301", "\u0338", "请", "😀", "\u200d", "\0",
]  # fmt: skip
texts = st.text(max_size=30) | st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
image_sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
parts = texts.map(lambda text: {"type": "text", "text": text}) | image_sizes.map(
    lambda size: {"type": "image", "size": list(size)}
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    roles = ["user", *draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=3))]
    if draw(st.booleans()):
        roles.insert(0, "system")
    return [{"role": role, "content": draw(texts | st.lists(parts, max_size=4))} for role in roles]


@pytest.fixture(scope="module")
def demo() -> ChatTokenizer:
    return ChatTokenizer(DEMO_TOKENIZER)


@pytest.fixture(scope="session")
def published(reference: Path) -> ChatTokenizer:
    return ChatTokenizer(reference / "tokenizer" / "tokenizer.json")


@pytest.fixture(params=["demo", "published"])
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    """Each of the two tokenizers there are."""
    found: ChatTokenizer = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def vectors(reference: Path) -> dict[str, dict[str, Any]]:
    cases = json.loads((reference / "prompt_vectors.json").read_text())["cases"]
    return {case["id"]: case for case in cases}


def built(case: dict[str, Any], tokenizer: ChatTokenizer, max_rows: int | None = None) -> Prompt:
    options = {name: case[name] for name in ("system_prompt", "use_image_id", "max_slice_nums")}
    return build(case["messages"], tokenizer, max_rows=max_rows, **options)


Run = tuple[bool, str]  # (whether it is a special token, text)


def expected_runs(messages: Sequence[dict[str, Any]], query_num: int = 64, *, ids: bool = True) -> list[Run]:
    """The template once more, as text between special tokens: written down independently and naively."""
    runs: list[Run] = []

    def view(tag: str) -> None:
        runs.extend([(True, f"<{tag}>"), *[(True, "<unk>")] * query_num, (True, f"</{tag}>")])

    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, *messages]
    n_images = 0
    for message in messages:
        runs += [(True, "<|im_start|>"), (False, message["role"] + "\n")]
        content = message["content"]
        for i, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
            runs.append((False, "\n" if i else ""))
            if part["type"] == "text":
                runs.append((False, part["text"]))
                continue
            if ids:
                runs += [(True, "<image_id>"), (False, str(n_images)), (True, "</image_id>")]
            n_images += 1
            view("image")
            columns, rows = plan_slices(*part["size"]).grid or (0, 0)
            for row in range(rows):
                runs.append((False, "\n" if row else ""))
                for _ in range(columns):
                    view("slice")
        runs += [(True, "<|im_end|>"), (False, "\n")]
    return [*runs, (True, "<|im_start|>"), (False, "assistant\n")]


def check_layout(prompt: Prompt, runs: list[Run], tokenizer: ChatTokenizer, normal_form: bool) -> None:
    """Special ids are exactly the template's, and what lies between spells the text."""
    special = set(tokenizer._special_ids)
    got: list[Run] = []
    spelled = b""
    for number in prompt.ids:
        if number in special:
            got += [(False, spelled.decode()), (True, tokenizer.token_bytes(number).decode())]
            spelled = b""
        else:
            spelled += tokenizer.token_bytes(number)
    got.append((False, spelled.decode()))
    wanted: list[Run] = [(False, "")]
    for is_special, text in runs:
        if is_special:
            wanted += [(True, text), (False, "")]
        else:
            wanted[-1] = (False, wanted[-1][1] + text)
    if normal_form:
        wanted = [(is_special, unicodedata.normalize("NFC", text)) for is_special, text in wanted]
    assert got == wanted


def check_spans(prompt: Prompt, tokenizer: ChatTokenizer, query_num: int) -> None:
    """Pieces, ids and spans tell the same: every piece is as long as its ids, image rows lie where the spans say."""
    at, spans = 0, []
    for piece in prompt.pieces:
        assert piece.n_rows > 0
        rows = prompt.ids[at : at + piece.n_rows]
        if isinstance(piece, ImageRows):
            assert piece.n_rows == query_num
            assert rows == [tokenizer.special["<unk>"]] * query_num
            spans.append((at, at + query_num))
        else:
            assert tuple(rows) == piece.ids
        at += piece.n_rows
    assert at == prompt.n_rows == len(prompt.ids)
    assert spans == prompt.image_spans
    assert prompt.n_vision_inputs == len(spans)


# --- the recorded vectors ---------------------------------------------------------------------------------------


def test_ids_and_spans_equal_the_reference(vectors: dict[str, dict[str, Any]], published: ChatTokenizer) -> None:
    """Every vector but those listed above."""
    same = [case for name, case in vectors.items() if name not in TYPED_TAGS and name not in CUT_OFF]
    assert len(same) > 60
    for case in same:
        prompt = built(case, published, case["max_inp_length"])
        assert prompt.ids == case["input_ids"], case["id"]
        assert [list(span) for span in prompt.image_spans] == case["image_bound"], case["id"]
        assert prompt.n_vision_inputs == case["n_vision_inputs"], case["id"]
        check_spans(prompt, published, 64)


def test_the_lists_name_vectors_that_are_there(vectors: dict[str, dict[str, Any]]) -> None:
    """And no other inj_ or trunc_ vector is there, but for three that have nothing to differ in."""
    listed = set(TYPED_TAGS) | set(CUT_OFF)
    assert listed <= set(vectors)
    special = {name for name in vectors if name.startswith(("inj_", "trunc_"))}
    assert special - listed == {"inj_lookalike", "trunc_none"}


@pytest.mark.parametrize("name", TYPED_TAGS)
def test_typed_tags_are_plain_text(name: str, vectors: dict[str, dict[str, Any]], published: ChatTokenizer) -> None:
    """It differs from the reference as it should: the template's special ids only, and the text spells itself."""
    case = vectors[name]
    prompt = built(case, published)
    assert prompt.ids != case.get("input_ids")
    check_spans(prompt, published, 64)
    if case["max_slice_nums"] is None:
        system = [{"role": "system", "content": case["system_prompt"]}] if case["system_prompt"] else []
        runs = expected_runs([*system, *case["messages"]], ids=case["use_image_id"] is not False)
        check_layout(prompt, runs, published, normal_form=True)
    innocent = json.loads(json.dumps(case["messages"]).replace("<", "("))
    assert special_ids(prompt, published) == special_ids(built({**case, "messages": innocent}, published), published)


def special_ids(prompt: Prompt, tokenizer: ChatTokenizer) -> list[int]:
    return [number for number in prompt.ids if number in tokenizer._special_ids]


@pytest.mark.parametrize("name", CUT_OFF)
def test_too_long_is_refused(name: str, vectors: dict[str, dict[str, Any]], published: ChatTokenizer) -> None:
    """Where the reference cuts, ContextFull says how long the prompt is; with room for it, nothing is lost."""
    case = vectors[name]
    whole = built(case, published)
    assert case.get("input_ids") in (None, whole.ids[: case["max_inp_length"]])
    with pytest.raises(ContextFull) as caught:
        built(case, published, case["max_inp_length"])
    assert (caught.value.n_prompt, caught.value.limit) == (whole.n_rows, case["max_inp_length"])
    assert built(case, published, whole.n_rows).ids == whole.ids
    with pytest.raises(ContextFull):
        built(case, published, whole.n_rows - 1)


# --- properties, with both tokenizers ---------------------------------------------------------------------------


def check_any_conversation(messages: list[dict[str, Any]], tokenizer: ChatTokenizer, query_num: int, ids: bool) -> None:
    prompt = build(messages, tokenizer, query_num=query_num, use_image_id=ids)
    check_spans(prompt, tokenizer, query_num)
    runs = expected_runs(messages, query_num, ids=ids)
    check_layout(prompt, runs, tokenizer, normal_form=tokenizer.n_ids > 100_000)


@given(conversations(), st.integers(1, 64), st.booleans())
def test_any_conversation_with_the_demo_tokenizer(
    demo: ChatTokenizer, messages: list[dict[str, Any]], query_num: int, ids: bool
) -> None:
    check_any_conversation(messages, demo, query_num, ids)


@given(conversations(), st.integers(1, 64), st.booleans())
def test_any_conversation_with_the_published_tokenizer(
    published: ChatTokenizer, messages: list[dict[str, Any]], query_num: int, ids: bool
) -> None:
    check_any_conversation(messages, published, query_num, ids)


@given(text=texts)
@example(text="<unk>")  # an ordinary entry of Qwen2's vocabulary: merges must not lead to it
@example(text=" <unk> a<unk>")
def test_text_never_gives_special_ids(published: ChatTokenizer, demo: ChatTokenizer, text: str) -> None:
    for tokenizer in (published, demo):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer._special_ids)
        spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert spelled == (unicodedata.normalize("NFC", text) if tokenizer is published else text)


def test_every_token_has_bytes(tokenizer: ChatTokenizer) -> None:
    """All 256 bytes are there, special tokens spell their names, ids beyond the vocabulary (padded tables) nothing."""
    spelled = [tokenizer.token_bytes(number) for number in range(tokenizer.n_ids)]
    assert {piece for piece in spelled if len(piece) == 1} == {bytes([value]) for value in range(256)}
    assert [spelled[number] for number in tokenizer.special.values()] == [name.encode() for name in tokenizer.special]
    assert tokenizer.token_bytes(tokenizer.n_ids + 5) == b""
    assert tokenizer.stop_ids == {tokenizer.special["<|im_end|>"], tokenizer.special["<|endoftext|>"]}


@given(st.lists(st.integers(0, 580), max_size=20))
def test_an_answers_own_tokens_are_used_as_they_are(demo: ChatTokenizer, ids: list[int]) -> None:
    """Even where its text would be tokenised otherwise: the KV cache holds those tokens."""
    said = [Message("user", (Text("q"),)), Message("assistant", (Text("ignored"),), tuple(ids))]
    prompt = render([*said, Message("user", (Text("r"),))], demo, query_num=4)
    before = [*render(said[:1], demo, query_num=4).ids, *ids]
    assert prompt.ids[: len(before)] == before
    assert prompt.ids[len(before)] == demo.special["<|im_end|>"]


def test_a_longer_conversation_begins_with_the_shorter(demo: ChatTokenizer) -> None:
    """What makes reuse of a KV cache possible, images included."""
    picture = Picture(plan_slices(640, 480), tuple("abc"))
    turns = [
        Message("user", (picture, Text("first"))),
        Message("assistant", (), (5, 6)),
        Message("user", (Text("and"), picture)),
    ]
    short = render(turns[:1], demo, query_num=4).ids
    assert render(turns, demo, query_num=4).ids[: len(short)] == short


def test_pieces_carry_the_stores_keys_in_the_encoders_order(demo: ChatTokenizer) -> None:
    pictures = (Picture(plan_slices(640, 480), ("a", "b", "c")), Picture(plan_slices(10, 10), ("d",)), Text("?"))
    prompt = render([Message("user", pictures)], demo, query_num=4)
    assert [piece.key for piece in prompt.pieces if isinstance(piece, ImageRows)] == ["a", "b", "c", "d"]
    assert all(isinstance(piece, (Tokens, ImageRows)) for piece in prompt.pieces)


@given(image_sizes, st.none() | st.integers(0, 1000))
def test_picture_rows_is_what_a_picture_adds(demo: ChatTokenizer, size: tuple[int, int], number: int | None) -> None:
    """66 and digits as documented: query rows and two tags per view, the id's tags and digits, newlines of the grid."""
    plan = plan_slices(*size)
    extra = 0 if number is None else 2 + len(str(number))  # one token per digit
    newlines = plan.grid[1] - 1 if plan.grid else 0
    assert picture_rows(plan, demo, 64, number) == 66 * plan.n_inputs + newlines + extra


def test_the_generation_prompt_can_be_left_out(demo: ChatTokenizer) -> None:
    messages = [Message("user", (Text("q"),))]
    whole = render(messages, demo, query_num=4).ids
    without = render(messages, demo, query_num=4, generation_prompt=False).ids
    assert whole == [*without, demo.special["<|im_start|>"], *demo.encode("assistant\n")]


def test_options_given_as_none_are_the_models_defaults(demo: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "size": [1600, 1200]}]}]
    default = build(messages, demo).ids
    assert build(messages, demo, system_prompt="", use_image_id=True, max_slice_nums=9).ids == default
    assert build(messages, demo, system_prompt=DEFAULT_SYSTEM_PROMPT).ids == default
    assert build(messages, str(DEMO_TOKENIZER)).ids == default


def test_sizes_go_to_images_that_have_none(demo: ChatTokenizer) -> None:
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "size": [9, 9]}, {"type": "image"}]}]
    full = [{"role": "user", "content": [{"type": "image", "size": s} for s in ([640, 480], [9, 9], [480, 640])]}]
    assert build(bare, demo, sizes=[(640, 480), (480, 640)]).ids == build(full, demo).ids
    with pytest.raises(PromptError, match='message 0, part 2: an image needs "size"'):
        build(bare, demo, sizes=[(640, 480)])
    with pytest.raises(PromptError, match="more sizes"):
        build(bare, demo, sizes=[(1, 1)] * 3)


# --- what is refused --------------------------------------------------------------------------------------------


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "empty"),
        (["hello"], "message 0"),
        ([None], "message 0"),
        ([{}], "message 0"),
        ([{"role": 3, "content": "x"}], "message 0"),
        ([{"role": "user"}], "message 0: its content"),
        (user(None), "message 0: its content .* NoneType"),
        (user({"type": "text"}), "message 0: its content"),
        (user(["plain"]), "message 0, part 0"),
        (user([{"type": "text"}]), "message 0, part 0"),
        (user([{"type": "text", "text": 5}]), "message 0, part 0"),
        (user([{"type": "video", "size": [1, 1]}]), "message 0, part 0"),
        (user([{"type": "text", "text": "a"}, {"type": "image"}]), "message 0, part 1"),
        (user([{"type": "image", "size": 5}]), "size"),
        (user([{"type": "image", "size": [1]}]), "size"),
        (user([{"type": "image", "size": [1, 2, 3]}]), "size"),
        (user([{"type": "image", "size": [1.0, 2]}]), "size"),
        (user([{"type": "image", "size": [True, 2]}]), "size"),
        (user([{"type": "image", "size": "12"}]), "size"),
        ([{"role": "assistant", "content": "x"}], "first message is from 'assistant'"),
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([*user("a"), {"role": "tool", "content": "x"}], "message .* 'tool'"),
        ([*user("a"), {"role": "system", "content": "x"}], "message .* 'system'"),
        ([{"role": "user\nevil", "content": "x"}], "evil"),
        (user("a lone \ud800 surrogate"), "surrogate"),
    ],
)
def test_a_malformed_conversation_is_named(messages: Any, named: str, demo: ChatTokenizer) -> None:
    with pytest.raises(PromptError, match=named):
        build(messages, demo)


def test_impossible_sizes_are_named(demo: ChatTokenizer) -> None:
    for size in ([0, 5], [5, -1]):
        with pytest.raises(ImageError, match=r"width is 0|height is -1"):
            build(user([{"type": "image", "size": size}]), demo)
    with pytest.raises(ImageError, match="max_slice_nums is 0"):
        build(user([{"type": "image", "size": [5, 5]}]), demo, max_slice_nums=0)


def test_two_system_prompts_are_refused(demo: ChatTokenizer) -> None:
    with pytest.raises(PromptError, match="both"):
        build([{"role": "system", "content": "a"}, *user("b")], demo, system_prompt="c")


@pytest.mark.parametrize("option", [{"system_prompt": 5}, {"use_image_id": "no"}, {"max_slice_nums": "9"}])
def test_options_of_another_type_are_named(option: dict[str, Any], demo: ChatTokenizer) -> None:
    with pytest.raises(PromptError, match=next(iter(option))):
        build(user("a"), demo, **option)


def test_a_tokenizer_file_that_is_none_is_named(tmp_path: Path) -> None:
    foreign = json.loads(DEMO_TOKENIZER.read_text())
    foreign["added_tokens"] = [t for t in foreign["added_tokens"] if t["content"] != "<slice>"]
    contents = {
        "missing": None,
        "empty": b"",
        "text": b"hello",
        "other": b"{}",
        "binary": b"\xff\xfe\0",
        "foreign": json.dumps(foreign).encode(),
    }
    for name, content in contents.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelDirError, match=name):
            ChatTokenizer(path)
    with pytest.raises(ModelDirError, match="no token <slice>"):
        ChatTokenizer(tmp_path / "foreign")
