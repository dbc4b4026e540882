// RKLLM runtime ABI of family 1.3.0 (1.3.0).
// Written by tools/write_rkllm_headers.py from the recorded ABI; do not edit.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SIZE(type, size, align) _Static_assert(sizeof(type) == size && _Alignof(type) == align, #type)
#define AT(type, field, offset, size) \
    _Static_assert(offsetof(type, field) == offset && sizeof(((type*)0)->field) == size, #type "." #field)

typedef void* LLMHandle;

typedef enum { RKLLM_RUN_NORMAL = 0, RKLLM_RUN_WAITING = 1, RKLLM_RUN_FINISH = 2, RKLLM_RUN_ERROR = 3 } LLMCallState;
SIZE(LLMCallState, 4, 4);

typedef enum { RKLLM_INPUT_PROMPT = 0, RKLLM_INPUT_TOKEN = 1, RKLLM_INPUT_EMBED = 2, RKLLM_INPUT_MULTIMODAL = 3 } RKLLMInputType;
SIZE(RKLLMInputType, 4, 4);

typedef enum { RKLLM_INFER_GENERATE = 0, RKLLM_INFER_GET_LAST_HIDDEN_LAYER = 1, RKLLM_INFER_GET_LOGITS = 2 } RKLLMInferMode;
SIZE(RKLLMInferMode, 4, 4);

typedef struct {
    int32_t base_domain_id;
    int8_t embed_flash;
    int8_t enabled_cpus_num;
    uint32_t enabled_cpus_mask;
    uint8_t n_batch;
    int8_t use_cross_attn;
    uint8_t reserved[104];
} RKLLMExtendParam;
SIZE(RKLLMExtendParam, 120, 4);
AT(RKLLMExtendParam, base_domain_id, 0, 4);
AT(RKLLMExtendParam, embed_flash, 4, 1);
AT(RKLLMExtendParam, enabled_cpus_num, 5, 1);
AT(RKLLMExtendParam, enabled_cpus_mask, 8, 4);
AT(RKLLMExtendParam, n_batch, 12, 1);
AT(RKLLMExtendParam, use_cross_attn, 13, 1);
AT(RKLLMExtendParam, reserved, 14, 104);

typedef struct {
    const char* model_path;
    int32_t max_context_len;
    int32_t max_new_tokens;
    int32_t top_k;
    int32_t n_keep;
    float top_p;
    float temperature;
    float repeat_penalty;
    float frequency_penalty;
    float presence_penalty;
    int32_t mirostat;
    float mirostat_tau;
    float mirostat_eta;
    bool skip_special_token;
    bool ignore_eos_token;
    bool is_async;
    RKLLMExtendParam extend_param;
} RKLLMParam;
SIZE(RKLLMParam, 184, 8);
AT(RKLLMParam, model_path, 0, 8);
AT(RKLLMParam, max_context_len, 8, 4);
AT(RKLLMParam, max_new_tokens, 12, 4);
AT(RKLLMParam, top_k, 16, 4);
AT(RKLLMParam, n_keep, 20, 4);
AT(RKLLMParam, top_p, 24, 4);
AT(RKLLMParam, temperature, 28, 4);
AT(RKLLMParam, repeat_penalty, 32, 4);
AT(RKLLMParam, frequency_penalty, 36, 4);
AT(RKLLMParam, presence_penalty, 40, 4);
AT(RKLLMParam, mirostat, 44, 4);
AT(RKLLMParam, mirostat_tau, 48, 4);
AT(RKLLMParam, mirostat_eta, 52, 4);
AT(RKLLMParam, skip_special_token, 56, 1);
AT(RKLLMParam, ignore_eos_token, 57, 1);
AT(RKLLMParam, is_async, 58, 1);
AT(RKLLMParam, extend_param, 60, 120);
AT(RKLLMParam, extend_param.base_domain_id, 60, 4);
AT(RKLLMParam, extend_param.embed_flash, 64, 1);
AT(RKLLMParam, extend_param.enabled_cpus_num, 65, 1);
AT(RKLLMParam, extend_param.enabled_cpus_mask, 68, 4);
AT(RKLLMParam, extend_param.n_batch, 72, 1);
AT(RKLLMParam, extend_param.use_cross_attn, 73, 1);
AT(RKLLMParam, extend_param.reserved, 74, 104);

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
    struct {
        float* image_embed;
        size_t n_image_tokens;
        size_t n_image;
        const char* image_start;
        const char* image_end;
        const char* image_content;
        size_t image_width;
        size_t image_height;
    } image;
    struct {
        float* video_embed;
        size_t n_frame_tokens;
        size_t n_frame_per_video;
        size_t n_video;
        const char* video_start;
        const char* video_end;
        const char* video_content;
        size_t frame_width;
        size_t frame_height;
    } video;
} RKLLMMultiModalInput;
SIZE(RKLLMMultiModalInput, 144, 8);
AT(RKLLMMultiModalInput, prompt, 0, 8);
AT(RKLLMMultiModalInput, image, 8, 64);
AT(RKLLMMultiModalInput, image.image_embed, 8, 8);
AT(RKLLMMultiModalInput, image.n_image_tokens, 16, 8);
AT(RKLLMMultiModalInput, image.n_image, 24, 8);
AT(RKLLMMultiModalInput, image.image_start, 32, 8);
AT(RKLLMMultiModalInput, image.image_end, 40, 8);
AT(RKLLMMultiModalInput, image.image_content, 48, 8);
AT(RKLLMMultiModalInput, image.image_width, 56, 8);
AT(RKLLMMultiModalInput, image.image_height, 64, 8);
AT(RKLLMMultiModalInput, video, 72, 72);
AT(RKLLMMultiModalInput, video.video_embed, 72, 8);
AT(RKLLMMultiModalInput, video.n_frame_tokens, 80, 8);
AT(RKLLMMultiModalInput, video.n_frame_per_video, 88, 8);
AT(RKLLMMultiModalInput, video.n_video, 96, 8);
AT(RKLLMMultiModalInput, video.video_start, 104, 8);
AT(RKLLMMultiModalInput, video.video_end, 112, 8);
AT(RKLLMMultiModalInput, video.video_content, 120, 8);
AT(RKLLMMultiModalInput, video.frame_width, 128, 8);
AT(RKLLMMultiModalInput, video.frame_height, 136, 8);

typedef struct {
    const char* role;
    bool enable_thinking;
    RKLLMInputType input_type;
    union {
        const char* prompt_input;
        RKLLMEmbedInput embed_input;
        RKLLMTokenInput token_input;
        RKLLMMultiModalInput multimodal_input;
    };
} RKLLMInput;
SIZE(RKLLMInput, 160, 8);
AT(RKLLMInput, role, 0, 8);
AT(RKLLMInput, enable_thinking, 8, 1);
AT(RKLLMInput, input_type, 12, 4);
AT(RKLLMInput, prompt_input, 16, 8);
AT(RKLLMInput, embed_input, 16, 16);
AT(RKLLMInput, embed_input.embed, 16, 8);
AT(RKLLMInput, embed_input.n_tokens, 24, 8);
AT(RKLLMInput, token_input, 16, 16);
AT(RKLLMInput, token_input.input_ids, 16, 8);
AT(RKLLMInput, token_input.n_tokens, 24, 8);
AT(RKLLMInput, multimodal_input, 16, 144);
AT(RKLLMInput, multimodal_input.prompt, 16, 8);
AT(RKLLMInput, multimodal_input.image, 24, 64);
AT(RKLLMInput, multimodal_input.image.image_embed, 24, 8);
AT(RKLLMInput, multimodal_input.image.n_image_tokens, 32, 8);
AT(RKLLMInput, multimodal_input.image.n_image, 40, 8);
AT(RKLLMInput, multimodal_input.image.image_start, 48, 8);
AT(RKLLMInput, multimodal_input.image.image_end, 56, 8);
AT(RKLLMInput, multimodal_input.image.image_content, 64, 8);
AT(RKLLMInput, multimodal_input.image.image_width, 72, 8);
AT(RKLLMInput, multimodal_input.image.image_height, 80, 8);
AT(RKLLMInput, multimodal_input.video, 88, 72);
AT(RKLLMInput, multimodal_input.video.video_embed, 88, 8);
AT(RKLLMInput, multimodal_input.video.n_frame_tokens, 96, 8);
AT(RKLLMInput, multimodal_input.video.n_frame_per_video, 104, 8);
AT(RKLLMInput, multimodal_input.video.n_video, 112, 8);
AT(RKLLMInput, multimodal_input.video.video_start, 120, 8);
AT(RKLLMInput, multimodal_input.video.video_end, 128, 8);
AT(RKLLMInput, multimodal_input.video.video_content, 136, 8);
AT(RKLLMInput, multimodal_input.video.frame_width, 144, 8);
AT(RKLLMInput, multimodal_input.video.frame_height, 152, 8);

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
    float* encoder_k_cache;
    float* encoder_v_cache;
    float* encoder_mask;
    int32_t* encoder_pos;
    int num_tokens;
} RKLLMCrossAttnParam;
SIZE(RKLLMCrossAttnParam, 40, 8);
AT(RKLLMCrossAttnParam, encoder_k_cache, 0, 8);
AT(RKLLMCrossAttnParam, encoder_v_cache, 8, 8);
AT(RKLLMCrossAttnParam, encoder_mask, 16, 8);
AT(RKLLMCrossAttnParam, encoder_pos, 24, 8);
AT(RKLLMCrossAttnParam, num_tokens, 32, 4);

typedef struct {
    int32_t top_k;
    float top_p;
    float temperature;
    float repeat_penalty;
    float frequency_penalty;
    float presence_penalty;
    int32_t mirostat;
    float mirostat_tau;
    float mirostat_eta;
} RKLLMSamplingParam;
SIZE(RKLLMSamplingParam, 36, 4);
AT(RKLLMSamplingParam, top_k, 0, 4);
AT(RKLLMSamplingParam, top_p, 4, 4);
AT(RKLLMSamplingParam, temperature, 8, 4);
AT(RKLLMSamplingParam, repeat_penalty, 12, 4);
AT(RKLLMSamplingParam, frequency_penalty, 16, 4);
AT(RKLLMSamplingParam, presence_penalty, 20, 4);
AT(RKLLMSamplingParam, mirostat, 24, 4);
AT(RKLLMSamplingParam, mirostat_tau, 28, 4);
AT(RKLLMSamplingParam, mirostat_eta, 32, 4);

typedef struct {
    RKLLMInferMode mode;
    RKLLMLoraParam* lora_params;
    RKLLMPromptCacheParam* prompt_cache_params;
    RKLLMSamplingParam* sampling_params;
    int keep_history;
    int32_t max_new_tokens;
} RKLLMInferParam;
SIZE(RKLLMInferParam, 40, 8);
AT(RKLLMInferParam, mode, 0, 4);
AT(RKLLMInferParam, lora_params, 8, 8);
AT(RKLLMInferParam, prompt_cache_params, 16, 8);
AT(RKLLMInferParam, sampling_params, 24, 8);
AT(RKLLMInferParam, keep_history, 32, 4);
AT(RKLLMInferParam, max_new_tokens, 36, 4);

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
    const float* logits;
    int vocab_size;
    int num_tokens;
} RKLLMResultLogits;
SIZE(RKLLMResultLogits, 16, 8);
AT(RKLLMResultLogits, logits, 0, 8);
AT(RKLLMResultLogits, vocab_size, 8, 4);
AT(RKLLMResultLogits, num_tokens, 12, 4);

typedef struct {
    float prefill_time_ms;
    int prefill_tokens;
    float generate_time_ms;
    int generate_tokens;
    float memory_usage_mb;
} RKLLMPerfStat;
SIZE(RKLLMPerfStat, 20, 4);
AT(RKLLMPerfStat, prefill_time_ms, 0, 4);
AT(RKLLMPerfStat, prefill_tokens, 4, 4);
AT(RKLLMPerfStat, generate_time_ms, 8, 4);
AT(RKLLMPerfStat, generate_tokens, 12, 4);
AT(RKLLMPerfStat, memory_usage_mb, 16, 4);

typedef struct {
    const char* text;
    int32_t token_id;
    RKLLMResultLastHiddenLayer last_hidden_layer;
    RKLLMResultLogits logits;
    RKLLMPerfStat perf;
} RKLLMResult;
SIZE(RKLLMResult, 72, 8);
AT(RKLLMResult, text, 0, 8);
AT(RKLLMResult, token_id, 8, 4);
AT(RKLLMResult, last_hidden_layer, 16, 16);
AT(RKLLMResult, last_hidden_layer.hidden_states, 16, 8);
AT(RKLLMResult, last_hidden_layer.embd_size, 24, 4);
AT(RKLLMResult, last_hidden_layer.num_tokens, 28, 4);
AT(RKLLMResult, logits, 32, 16);
AT(RKLLMResult, logits.logits, 32, 8);
AT(RKLLMResult, logits.vocab_size, 40, 4);
AT(RKLLMResult, logits.num_tokens, 44, 4);
AT(RKLLMResult, perf, 48, 20);
AT(RKLLMResult, perf.prefill_time_ms, 48, 4);
AT(RKLLMResult, perf.prefill_tokens, 52, 4);
AT(RKLLMResult, perf.generate_time_ms, 56, 4);
AT(RKLLMResult, perf.generate_tokens, 60, 4);
AT(RKLLMResult, perf.memory_usage_mb, 64, 4);

typedef int (*LLMGetEmbedCallback)(void* userdata, int32_t* tokens, uint64_t num_tokens, void* embed, uint64_t len);

typedef int (*LLMTokenizerCallback)(void* userdata, const char* text, int32_t text_len, int32_t* tokens, int32_t n_tokens_max);

typedef int (*LLMResultCallback)(RKLLMResult* result, void* userdata, LLMCallState state);

typedef struct {
    LLMResultCallback result_callback;
    void* result_userdata;
    LLMTokenizerCallback tokenizer_callback;
    void* tokenizer_userdata;
    LLMGetEmbedCallback embed_callback;
    void* embed_userdata;
} RKLLMCallback;
SIZE(RKLLMCallback, 48, 8);
AT(RKLLMCallback, result_callback, 0, 8);
AT(RKLLMCallback, result_userdata, 8, 8);
AT(RKLLMCallback, tokenizer_callback, 16, 8);
AT(RKLLMCallback, tokenizer_userdata, 24, 8);
AT(RKLLMCallback, embed_callback, 32, 8);
AT(RKLLMCallback, embed_userdata, 40, 8);

#define RKLLM_API __attribute__((visibility("default")))

RKLLM_API RKLLMParam rkllm_createDefaultParam(void);
RKLLM_API int rkllm_init(LLMHandle* handle, RKLLMParam* param, RKLLMCallback* callback);
RKLLM_API int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter* lora_adapter);
RKLLM_API int rkllm_load_prompt_cache(LLMHandle handle, const char* prompt_cache_path);
RKLLM_API int rkllm_release_prompt_cache(LLMHandle handle);
RKLLM_API int rkllm_destroy(LLMHandle handle);
RKLLM_API int rkllm_run(LLMHandle handle, RKLLMInput* rkllm_input, RKLLMInferParam* rkllm_infer_params, void* userdata);
RKLLM_API int rkllm_run_async(LLMHandle handle, RKLLMInput* rkllm_input, RKLLMInferParam* rkllm_infer_params, void* userdata);
RKLLM_API int rkllm_abort(LLMHandle handle);
RKLLM_API int rkllm_is_running(LLMHandle handle);
RKLLM_API int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt, int* start_pos, int* end_pos);
RKLLM_API int rkllm_get_kv_cache_size(LLMHandle handle, int* cache_sizes);
RKLLM_API int rkllm_set_chat_template(LLMHandle handle, const char* system_prompt, const char* prompt_prefix, const char* prompt_postfix);
RKLLM_API int rkllm_set_function_tools(LLMHandle handle, const char* system_prompt, const char* tools, const char* tool_response_str);
RKLLM_API int rkllm_set_cross_attn_params(LLMHandle handle, RKLLMCrossAttnParam* cross_attn_params);
