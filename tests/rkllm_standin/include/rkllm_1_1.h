// RKLLM runtime ABI of family 1.1 (1.1.0, 1.1.1, 1.1.2, 1.1.3, 1.1.4).
// Written by tools/write_rkllm_headers.py from the recorded ABI; do not edit.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SIZE(type, size, align) _Static_assert(sizeof(type) == size && _Alignof(type) == align, #type)
#define AT(type, field, offset, size) \
    _Static_assert(offsetof(type, field) == offset && sizeof(((type*)0)->field) == size, #type "." #field)

typedef void* LLMHandle;

typedef enum { RKLLM_RUN_NORMAL = 0, RKLLM_RUN_WAITING = 1, RKLLM_RUN_FINISH = 2, RKLLM_RUN_ERROR = 3, RKLLM_RUN_GET_LAST_HIDDEN_LAYER = 4 } LLMCallState;
SIZE(LLMCallState, 4, 4);

typedef enum { RKLLM_INPUT_PROMPT = 0, RKLLM_INPUT_TOKEN = 1, RKLLM_INPUT_EMBED = 2, RKLLM_INPUT_MULTIMODAL = 3 } RKLLMInputType;
SIZE(RKLLMInputType, 4, 4);

typedef enum { RKLLM_INFER_GENERATE = 0, RKLLM_INFER_GET_LAST_HIDDEN_LAYER = 1 } RKLLMInferMode;
SIZE(RKLLMInferMode, 4, 4);

typedef struct {
    int32_t base_domain_id;
    uint8_t reserved[112];
} RKLLMExtendParam;
SIZE(RKLLMExtendParam, 116, 4);
AT(RKLLMExtendParam, base_domain_id, 0, 4);
AT(RKLLMExtendParam, reserved, 4, 112);

typedef struct {
    const char* model_path;
    int32_t max_context_len;
    int32_t max_new_tokens;
    int32_t top_k;
    float top_p;
    float temperature;
    float repeat_penalty;
    float frequency_penalty;
    float presence_penalty;
    int32_t mirostat;
    float mirostat_tau;
    float mirostat_eta;
    bool skip_special_token;
    bool is_async;
    const char* img_start;
    const char* img_end;
    const char* img_content;
    RKLLMExtendParam extend_param;
} RKLLMParam;
SIZE(RKLLMParam, 200, 8);
AT(RKLLMParam, model_path, 0, 8);
AT(RKLLMParam, max_context_len, 8, 4);
AT(RKLLMParam, max_new_tokens, 12, 4);
AT(RKLLMParam, top_k, 16, 4);
AT(RKLLMParam, top_p, 20, 4);
AT(RKLLMParam, temperature, 24, 4);
AT(RKLLMParam, repeat_penalty, 28, 4);
AT(RKLLMParam, frequency_penalty, 32, 4);
AT(RKLLMParam, presence_penalty, 36, 4);
AT(RKLLMParam, mirostat, 40, 4);
AT(RKLLMParam, mirostat_tau, 44, 4);
AT(RKLLMParam, mirostat_eta, 48, 4);
AT(RKLLMParam, skip_special_token, 52, 1);
AT(RKLLMParam, is_async, 53, 1);
AT(RKLLMParam, img_start, 56, 8);
AT(RKLLMParam, img_end, 64, 8);
AT(RKLLMParam, img_content, 72, 8);
AT(RKLLMParam, extend_param, 80, 116);
AT(RKLLMParam, extend_param.base_domain_id, 80, 4);
AT(RKLLMParam, extend_param.reserved, 84, 112);

typedef struct {
    const char* lora_adapter_path;
    const char* lora_adapter_name;
    float scale;
} RKLLMLoraAdapter;
SIZE(RKLLMLoraAdapter, 24, 8);
AT(RKLLMLoraAdapter, lora_adapter_path, 0, 8);
AT(RKLLMLoraAdapter, lora_adapter_name, 8, 8);
AT(RKLLMLoraAdapter, scale, 16, 4);

typedef struct {
    float* embed;
    size_t n_tokens;
} RKLLMEmbedInput;
SIZE(RKLLMEmbedInput, 16, 8);
AT(RKLLMEmbedInput, embed, 0, 8);
AT(RKLLMEmbedInput, n_tokens, 8, 8);

typedef struct {
    int32_t* input_ids;
    size_t n_tokens;
} RKLLMTokenInput;
SIZE(RKLLMTokenInput, 16, 8);
AT(RKLLMTokenInput, input_ids, 0, 8);
AT(RKLLMTokenInput, n_tokens, 8, 8);

typedef struct {
    char* prompt;
    float* image_embed;
    size_t n_image_tokens;
} RKLLMMultiModelInput;
SIZE(RKLLMMultiModelInput, 24, 8);
AT(RKLLMMultiModelInput, prompt, 0, 8);
AT(RKLLMMultiModelInput, image_embed, 8, 8);
AT(RKLLMMultiModelInput, n_image_tokens, 16, 8);

typedef struct {
    RKLLMInputType input_type;
    union {
        const char* prompt_input;
        RKLLMEmbedInput embed_input;
        RKLLMTokenInput token_input;
        RKLLMMultiModelInput multimodal_input;
    };
} RKLLMInput;
SIZE(RKLLMInput, 32, 8);
AT(RKLLMInput, input_type, 0, 4);
AT(RKLLMInput, prompt_input, 8, 8);
AT(RKLLMInput, embed_input, 8, 16);
AT(RKLLMInput, embed_input.embed, 8, 8);
AT(RKLLMInput, embed_input.n_tokens, 16, 8);
AT(RKLLMInput, token_input, 8, 16);
AT(RKLLMInput, token_input.input_ids, 8, 8);
AT(RKLLMInput, token_input.n_tokens, 16, 8);
AT(RKLLMInput, multimodal_input, 8, 24);
AT(RKLLMInput, multimodal_input.prompt, 8, 8);
AT(RKLLMInput, multimodal_input.image_embed, 16, 8);
AT(RKLLMInput, multimodal_input.n_image_tokens, 24, 8);

typedef struct {
    const char* lora_adapter_name;
} RKLLMLoraParam;
SIZE(RKLLMLoraParam, 8, 8);
AT(RKLLMLoraParam, lora_adapter_name, 0, 8);

typedef struct {
    int save_prompt_cache;
    const char* prompt_cache_path;
} RKLLMPromptCacheParam;
SIZE(RKLLMPromptCacheParam, 16, 8);
AT(RKLLMPromptCacheParam, save_prompt_cache, 0, 4);
AT(RKLLMPromptCacheParam, prompt_cache_path, 8, 8);

typedef struct {
    RKLLMInferMode mode;
    RKLLMLoraParam* lora_params;
    RKLLMPromptCacheParam* prompt_cache_params;
} RKLLMInferParam;
SIZE(RKLLMInferParam, 24, 8);
AT(RKLLMInferParam, mode, 0, 4);
AT(RKLLMInferParam, lora_params, 8, 8);
AT(RKLLMInferParam, prompt_cache_params, 16, 8);

typedef struct {
    const float* hidden_states;
    int embd_size;
    int num_tokens;
} RKLLMResultLastHiddenLayer;
SIZE(RKLLMResultLastHiddenLayer, 16, 8);
AT(RKLLMResultLastHiddenLayer, hidden_states, 0, 8);
AT(RKLLMResultLastHiddenLayer, embd_size, 8, 4);
AT(RKLLMResultLastHiddenLayer, num_tokens, 12, 4);

typedef struct {
    const char* text;
    int32_t token_id;
    RKLLMResultLastHiddenLayer last_hidden_layer;
} RKLLMResult;
SIZE(RKLLMResult, 32, 8);
AT(RKLLMResult, text, 0, 8);
AT(RKLLMResult, token_id, 8, 4);
AT(RKLLMResult, last_hidden_layer, 16, 16);
AT(RKLLMResult, last_hidden_layer.hidden_states, 16, 8);
AT(RKLLMResult, last_hidden_layer.embd_size, 24, 4);
AT(RKLLMResult, last_hidden_layer.num_tokens, 28, 4);

typedef void (*LLMResultCallback)(RKLLMResult* result, void* userdata, LLMCallState state);

#define RKLLM_API __attribute__((visibility("default")))

RKLLM_API RKLLMParam rkllm_createDefaultParam(void);
RKLLM_API int rkllm_init(LLMHandle* handle, RKLLMParam* param, LLMResultCallback callback);
RKLLM_API int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter* lora_adapter);
RKLLM_API int rkllm_load_prompt_cache(LLMHandle handle, const char* prompt_cache_path);
RKLLM_API int rkllm_release_prompt_cache(LLMHandle handle);
RKLLM_API int rkllm_destroy(LLMHandle handle);
RKLLM_API int rkllm_run(LLMHandle handle, RKLLMInput* rkllm_input, RKLLMInferParam* rkllm_infer_params, void* userdata);
RKLLM_API int rkllm_run_async(LLMHandle handle, RKLLMInput* rkllm_input, RKLLMInferParam* rkllm_infer_params, void* userdata);
RKLLM_API int rkllm_abort(LLMHandle handle);
RKLLM_API int rkllm_is_running(LLMHandle handle);
