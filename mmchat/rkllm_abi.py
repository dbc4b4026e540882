"""The RKLLM runtime's ABI as data: five families of structs and prototypes, under the vendor's own names.

Source: rkllm.h of the release tags 1.1.0 to 1.3.0 of airockchip/rknn-llm (LP64).  A family is what has one layout:
1.1.0 to 1.1.4 are byte for byte the same, 1.2.2 and 1.2.3 only renamed a type of 1.2.1.  Which family a library has
is found by `mmchat.rkllm_detect`; with a wrong one every call corrupts memory, so choose first.

    abi = FAMILIES["1.3.0"]
    abi.bind(library)
    param = abi.default_param(library)
    abi.RKLLMInput().embed_input.n_tokens

Nothing here loads a library, and nothing beyond the types is enforced: zeroed structs, strings that live long enough
and checked return codes are the caller's business.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    Union,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)  # fmt: skip
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmchat.errors import EngineError

# Enum values; the same in every family.
RKLLM_RUN_NORMAL, RKLLM_RUN_WAITING, RKLLM_RUN_FINISH, RKLLM_RUN_ERROR = 0, 1, 2, 3
RKLLM_INPUT_PROMPT, RKLLM_INPUT_TOKEN, RKLLM_INPUT_EMBED, RKLLM_INPUT_MULTIMODAL = 0, 1, 2, 3
RKLLM_INFER_GENERATE = 0

LLMHandle = c_void_p

# Returned structs go into a buffer with this much room behind them: a library of another family than was thought
# writes up to 24 bytes more than the struct has.
_ROOM_BYTES = 512


class Function(NamedTuple):
    """One exported function."""

    name: str
    argtypes: tuple[Any, ...]
    restype: Any


@dataclass(frozen=True, eq=False)
class Family:
    """One ABI.  The vendor's structs are attributes: family.RKLLMParam and so on; absent ones raise AttributeError.

    versions: the releases that have it.
    LLMResultCallback: its ctypes type.  callback_returns_int: 0 to go on, 1 to pause; else it returns nothing.
    callback_struct: rkllm_init takes a pointer to RKLLMCallback, not the callback itself.
    has_role: RKLLMInput has role and enable_thinking, to be filled with b"user" and False.
    keep_history: RKLLMInferParam has it.  run_sampling: it also has sampling_params and max_new_tokens.
    ignore_eos: RKLLMParam has ignore_eos_token.  n_batch: extend_param has it, and 0 there fails rkllm_init.
    perf: RKLLMResult has it, valid in RKLLM_RUN_FINISH alone.
    clear_kv_args: arguments of rkllm_clear_kv_cache; 0 where there is no such function.
    """

    name: str
    versions: tuple[str, ...]
    structs: Mapping[str, type[Structure]]
    functions: tuple[Function, ...]
    LLMResultCallback: Any
    callback_returns_int: bool
    callback_struct: bool
    has_role: bool
    keep_history: bool
    run_sampling: bool
    ignore_eos: bool
    n_batch: bool
    perf: bool
    clear_kv_args: int

    def __getattr__(self, name: str) -> type[Structure]:
        if name.startswith("RKLLM") and name in self.structs:
            return self.structs[name]
        raise AttributeError(f"the RKLLM ABI {self.__dict__.get('name')} has no {name}")

    @property
    def symbols(self) -> frozenset[str]:
        """Names of all functions."""
        return frozenset(function.name for function in self.functions)

    @property
    def kv_cache_size(self) -> bool:
        return "rkllm_get_kv_cache_size" in self.symbols

    @property
    def chat_template(self) -> bool:
        return "rkllm_set_chat_template" in self.symbols

    def bind(self, library: ctypes.CDLL) -> None:
        """Give the library's functions their types.  Raises EngineError naming the functions that it lacks."""
        missing = []
        for function in self.functions:
            try:
                symbol = getattr(library, function.name)
            except AttributeError:
                missing.append(function.name)
                continue
            symbol.argtypes, symbol.restype = list(function.argtypes), function.restype
        if missing:
            raise EngineError(f"{library._name}: has no {', '.join(missing)}, which RKLLM {self.name} has")

    def default_param(self, library: ctypes.CDLL) -> Any:
        """rkllm_createDefaultParam's RKLLMParam, through a buffer that no family's library can overrun."""

        class Roomy(Structure):
            _fields_ = [("param", self.RKLLMParam), ("room", c_uint8 * _ROOM_BYTES)]

        create = CFUNCTYPE(Roomy)(("rkllm_createDefaultParam", library))
        return self.RKLLMParam.from_buffer_copy(create())


_VERSIONS = {
    "1.1": ("1.1.0", "1.1.1", "1.1.2", "1.1.3", "1.1.4"),
    "1.2.0": ("1.2.0",),
    "1.2.1b1": ("1.2.1b1",),
    "1.2.1-1.2.3": ("1.2.1", "1.2.2", "1.2.3"),
    "1.3.0": ("1.3.0",),
}


def _struct(name: str, *fields: tuple[str, Any]) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": list(fields), "__module__": __name__})


def _family(name: str) -> Family:
    """Every struct and prototype of one family; what changed is dated by the conditions."""
    order = list(_VERSIONS)
    has_1_2_0, has_1_2_1b1, has_1_2_1, has_1_3_0 = (order.index(name) >= order.index(x) for x in order[1:])

    extend: list[tuple[str, Any]] = [("base_domain_id", c_int32)]
    if has_1_2_0:
        extend += [("embed_flash", c_int8), ("enabled_cpus_num", c_int8), ("enabled_cpus_mask", c_uint32)]
    if has_1_2_1:
        extend += [("n_batch", c_uint8), ("use_cross_attn", c_int8)]
    extend += [("reserved", c_uint8 * (104 if has_1_2_1 else 106 if has_1_2_0 else 112))]
    RKLLMExtendParam = _struct("RKLLMExtendParam", *extend)

    sampling: list[tuple[str, Any]] = [
        ("top_p", c_float), ("temperature", c_float), ("repeat_penalty", c_float), ("frequency_penalty", c_float),
        ("presence_penalty", c_float), ("mirostat", c_int32), ("mirostat_tau", c_float), ("mirostat_eta", c_float),
    ]  # fmt: skip
    param: list[tuple[str, Any]] = [
        ("model_path", c_char_p), ("max_context_len", c_int32), ("max_new_tokens", c_int32), ("top_k", c_int32),
    ]  # fmt: skip
    param += [("n_keep", c_int32)] if has_1_2_0 else []
    param += [*sampling, ("skip_special_token", c_bool)]
    param += [("ignore_eos_token", c_bool)] if has_1_3_0 else []
    param += [("is_async", c_bool)]
    param += [] if has_1_3_0 else [("img_start", c_char_p), ("img_end", c_char_p), ("img_content", c_char_p)]
    RKLLMParam = _struct("RKLLMParam", *param, ("extend_param", RKLLMExtendParam))

    RKLLMLoraAdapter = _struct(
        "RKLLMLoraAdapter", ("lora_adapter_path", c_char_p), ("lora_adapter_name", c_char_p), ("scale", c_float)
    )
    RKLLMEmbedInput = _struct("RKLLMEmbedInput", ("embed", POINTER(c_float)), ("n_tokens", c_size_t))
    RKLLMTokenInput = _struct("RKLLMTokenInput", ("input_ids", POINTER(c_int32)), ("n_tokens", c_size_t))
    multimodal_name = "RKLLMMultiModalInput" if has_1_2_1 else "RKLLMMultiModelInput"  # 1.2.1 itself has the old name
    RKLLMMultiModalInput = _multimodal(multimodal_name, has_1_2_1b1, has_1_3_0)
    inputs = type("RKLLMInputUnion", (Union,), {"_fields_": [
        ("prompt_input", c_char_p), ("embed_input", RKLLMEmbedInput), ("token_input", RKLLMTokenInput),
        ("multimodal_input", RKLLMMultiModalInput),
    ]})  # fmt: skip
    head: list[tuple[str, Any]] = [("role", c_char_p), ("enable_thinking", c_bool)] if has_1_2_1 else []
    RKLLMInput = type(
        "RKLLMInput",
        (Structure,),
        {"_anonymous_": ("union",), "_fields_": [*head, ("input_type", c_int), ("union", inputs)]},
    )

    RKLLMLoraParam = _struct("RKLLMLoraParam", ("lora_adapter_name", c_char_p))
    RKLLMPromptCacheParam = _struct(
        "RKLLMPromptCacheParam", ("save_prompt_cache", c_int), ("prompt_cache_path", c_char_p)
    )
    RKLLMSamplingParam = _struct("RKLLMSamplingParam", ("top_k", c_int32), *sampling)
    infer: list[tuple[str, Any]] = [
        ("mode", c_int), ("lora_params", POINTER(RKLLMLoraParam)),
        ("prompt_cache_params", POINTER(RKLLMPromptCacheParam)),
    ]  # fmt: skip
    infer += [("sampling_params", POINTER(RKLLMSamplingParam))] if has_1_3_0 else []
    infer += [("keep_history", c_int)] if has_1_2_0 else []
    infer += [("max_new_tokens", c_int32)] if has_1_3_0 else []
    RKLLMInferParam = _struct("RKLLMInferParam", *infer)

    RKLLMResultLastHiddenLayer = _struct(
        "RKLLMResultLastHiddenLayer", ("hidden_states", POINTER(c_float)), ("embd_size", c_int), ("num_tokens", c_int)
    )
    RKLLMResultLogits = _struct(
        "RKLLMResultLogits", ("logits", POINTER(c_float)), ("vocab_size", c_int), ("num_tokens", c_int)
    )
    RKLLMPerfStat = _struct(
        "RKLLMPerfStat",
        ("prefill_time_ms", c_float), ("prefill_tokens", c_int), ("generate_time_ms", c_float),
        ("generate_tokens", c_int), ("memory_usage_mb", c_float),
    )  # fmt: skip
    result: list[tuple[str, Any]] = [
        ("text", c_char_p),
        ("token_id", c_int32),
        ("last_hidden_layer", RKLLMResultLastHiddenLayer),
    ]
    result += [("logits", RKLLMResultLogits)] if has_1_2_0 else []
    result += [("perf", RKLLMPerfStat)] if has_1_2_1 else []
    RKLLMResult = _struct("RKLLMResult", *result)

    LLMResultCallback = CFUNCTYPE(c_int if has_1_2_1 else None, POINTER(RKLLMResult), c_void_p, c_int)
    LLMTokenizerCallback = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32)
    LLMGetEmbedCallback = CFUNCTYPE(c_int, c_void_p, POINTER(c_int32), c_uint64, c_void_p, c_uint64)
    RKLLMCallback = _struct(
        "RKLLMCallback",
        ("result_callback", LLMResultCallback), ("result_userdata", c_void_p),
        ("tokenizer_callback", LLMTokenizerCallback), ("tokenizer_userdata", c_void_p),
        ("embed_callback", LLMGetEmbedCallback), ("embed_userdata", c_void_p),
    )  # fmt: skip
    RKLLMCrossAttnParam = _struct(
        "RKLLMCrossAttnParam",
        ("encoder_k_cache", POINTER(c_float)), ("encoder_v_cache", POINTER(c_float)),
        ("encoder_mask", POINTER(c_float)), ("encoder_pos", POINTER(c_int32)), ("num_tokens", c_int),
    )  # fmt: skip

    structs = [
        RKLLMExtendParam, RKLLMParam, RKLLMLoraAdapter, RKLLMEmbedInput, RKLLMTokenInput, RKLLMMultiModalInput,
        RKLLMInput, RKLLMLoraParam, RKLLMPromptCacheParam, RKLLMInferParam, RKLLMResultLastHiddenLayer, RKLLMResult,
    ]  # fmt: skip
    structs += [RKLLMResultLogits] if has_1_2_0 else []
    structs += [RKLLMPerfStat, RKLLMCrossAttnParam] if has_1_2_1 else []
    structs += [RKLLMSamplingParam, RKLLMCallback] if has_1_3_0 else []

    run: tuple[Any, ...] = (LLMHandle, POINTER(RKLLMInput), POINTER(RKLLMInferParam), c_void_p)
    init_callback: Any = POINTER(RKLLMCallback) if has_1_3_0 else LLMResultCallback
    functions = [
        Function("rkllm_createDefaultParam", (), RKLLMParam),
        Function("rkllm_init", (POINTER(LLMHandle), POINTER(RKLLMParam), init_callback), c_int),
        Function("rkllm_load_lora", (LLMHandle, POINTER(RKLLMLoraAdapter)), c_int),
        Function("rkllm_load_prompt_cache", (LLMHandle, c_char_p), c_int),
        Function("rkllm_release_prompt_cache", (LLMHandle,), c_int),
        Function("rkllm_destroy", (LLMHandle,), c_int),
        Function("rkllm_run", run, c_int),
        Function("rkllm_run_async", run, c_int),
        Function("rkllm_abort", (LLMHandle,), c_int),
        Function("rkllm_is_running", (LLMHandle,), c_int),
    ]
    clear_kv: tuple[Any, ...] = ()
    if has_1_2_0:
        clear_kv = (LLMHandle, c_int)
        if has_1_2_1:
            clear_kv += (POINTER(c_int), POINTER(c_int))
        functions += [
            Function("rkllm_clear_kv_cache", clear_kv, c_int),
            Function("rkllm_set_chat_template", (LLMHandle, c_char_p, c_char_p, c_char_p), c_int),
        ]
    if has_1_2_1:
        functions += [
            Function("rkllm_get_kv_cache_size", (LLMHandle, POINTER(c_int)), c_int),
            Function("rkllm_set_function_tools", (LLMHandle, c_char_p, c_char_p, c_char_p), c_int),
            Function("rkllm_set_cross_attn_params", (LLMHandle, POINTER(RKLLMCrossAttnParam)), c_int),
        ]
    return Family(
        name=name,
        versions=_VERSIONS[name],
        structs={struct.__name__: struct for struct in structs},
        functions=tuple(functions),
        LLMResultCallback=LLMResultCallback,
        callback_returns_int=has_1_2_1,
        callback_struct=has_1_3_0,
        has_role=has_1_2_1,
        keep_history=has_1_2_0,
        run_sampling=has_1_3_0,
        ignore_eos=has_1_3_0,
        n_batch=has_1_2_1,
        perf=has_1_2_1,
        clear_kv_args=len(clear_kv),
    )


def _multimodal(name: str, has_1_2_1b1: bool, has_1_3_0: bool) -> type[Structure]:
    if has_1_3_0:
        image = _struct(
            "RKLLMMultiModalImage",
            ("image_embed", POINTER(c_float)), ("n_image_tokens", c_size_t), ("n_image", c_size_t),
            ("image_start", c_char_p), ("image_end", c_char_p), ("image_content", c_char_p),
            ("image_width", c_size_t), ("image_height", c_size_t),
        )  # fmt: skip
        video = _struct(
            "RKLLMMultiModalVideo",
            ("video_embed", POINTER(c_float)), ("n_frame_tokens", c_size_t), ("n_frame_per_video", c_size_t),
            ("n_video", c_size_t), ("video_start", c_char_p), ("video_end", c_char_p), ("video_content", c_char_p),
            ("frame_width", c_size_t), ("frame_height", c_size_t),
        )  # fmt: skip
        return _struct(name, ("prompt", c_char_p), ("image", image), ("video", video))
    fields: list[tuple[str, Any]] = [
        ("prompt", c_char_p), ("image_embed", POINTER(c_float)), ("n_image_tokens", c_size_t),
    ]  # fmt: skip
    if has_1_2_1b1:
        fields += [("n_image", c_size_t), ("image_width", c_size_t), ("image_height", c_size_t)]
    return _struct(name, *fields)


FAMILIES: dict[str, Family] = {name: _family(name) for name in _VERSIONS}
FAMILY_OF_VERSION: dict[str, str] = {version: name for name, versions in _VERSIONS.items() for version in versions}
