// Not Rockchip's library: as much of librknnrt's interface as rknn-toolkit-lite2 uses, over a model that only echoes.
// It takes the container that tests/rknn_standin/model.py writes and believes its JSON about shapes; the output's
// element i is the sum over the inputs k of (1 + 99 k) * input_k[stride_k * i modulo its size], stride 5 for the first.
// FAKE_RKNN=CALL:CODE makes rknn_CALL return CODE; FAKE_RKNN_DUMP=FILE gets the inputs of every run, as float32.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCC = 0, PARAM_INVALID = -5, MODEL_INVALID = -6, MAX_TENSORS = 8, MAX_DIMS = 16 };
enum { FLOAT32, FLOAT16, INT8, UINT8, INT16 };
enum { NCHW, NHWC, NC1HWC2, UNDEFINED };
enum { IN_OUT_NUM, INPUT_ATTR, OUTPUT_ATTR, SDK_VERSION = 5 };

typedef uint64_t Context;
typedef struct {
    uint32_t index, n_dims, dims[MAX_DIMS];
    char name[256];
    uint32_t n_elems, size, fmt, type, qnt_type;
    int8_t fl;
    int32_t zp;
    float scale;
    uint32_t w_stride, size_with_stride;
    uint8_t pass_through;
    uint32_t h_stride;
} Attr;
typedef struct {
    uint32_t index;
    void* buf;
    uint32_t size;
    uint8_t pass_through;
    uint32_t type, fmt;
} Input;
typedef struct {
    uint8_t want_float, is_prealloc;
    uint32_t index;
    void* buf;
    uint32_t size;
} Output;

static Attr attrs[MAX_TENSORS];
static uint32_t n_inputs, n_tensors;
static float* values[MAX_TENSORS];

static int fault(const char* call) {
    const char* wanted = getenv("FAKE_RKNN");
    size_t length = strlen(call);
    return wanted && strncmp(wanted, call, length) == 0 && wanted[length] == ':' ? atoi(wanted + length + 1) : SUCC;
}

static int describe(const char* json) {
    const char* number = strstr(json, "\"input_num\": ");
    const char* at = strstr(json, "\"norm_tensor\"");
    if (!number || !at) return MODEL_INVALID;
    n_inputs = atoi(number + strlen("\"input_num\": "));
    for (n_tensors = 0; n_tensors < MAX_TENSORS && (at = strstr(at, "\"size\": [")); n_tensors++) {
        Attr* a = &attrs[n_tensors];
        memset(a, 0, sizeof *a);
        snprintf(a->name, sizeof a->name, "tensor%u", n_tensors);
        a->n_elems = 1;
        for (at += strlen("\"size\": ["); a->n_dims < MAX_DIMS; at += 2) {
            a->dims[a->n_dims] = strtoul(at, (char**)&at, 10);
            a->n_elems *= a->dims[a->n_dims++];
            if (*at != ',') break;
        }
        a->fmt = a->n_dims == 4 ? NHWC : UNDEFINED;
        if (a->n_dims == 4) {  // told as NCHW, taken as NHWC
            uint32_t channels = a->dims[1];
            memmove(&a->dims[1], &a->dims[2], 2 * sizeof a->dims[0]);
            a->dims[3] = channels;
        }
        a->type = FLOAT16;
        a->size = 2 * a->n_elems;
        a->scale = 1;
        values[n_tensors] = calloc(a->n_elems, sizeof(float));
    }
    return n_tensors > n_inputs ? SUCC : MODEL_INVALID;
}

int rknn_init(Context* context, void* model, uint32_t size, uint32_t flag, void* extend) {
    (void)flag, (void)extend;
    uint64_t n_data, n_json;
    const char* data = model;
    if (fault("init")) return fault("init");
    if (size < 80 || memcmp(data, "RKNN", 4) != 0) return MODEL_INVALID;
    memcpy(&n_data, data + 16, 8);
    if (64 + n_data + 8 > size) return MODEL_INVALID;
    memcpy(&n_json, data + 64 + n_data, 8);
    char* json = calloc(1, n_json + 1);
    memcpy(json, data + 64 + n_data + 8, n_json);
    *context = 42;
    return describe(json);
}

int rknn_destroy(Context context) { return context == 42 ? SUCC : PARAM_INVALID; }

int rknn_query(Context context, int command, void* info, uint32_t size) {
    if (context != 42) return PARAM_INVALID;
    if (command == IN_OUT_NUM) {
        memcpy(info, (uint32_t[]){n_inputs, n_tensors - n_inputs}, 8);
    } else if (command == INPUT_ATTR || command == OUTPUT_ATTR) {
        uint32_t index = ((Attr*)info)->index, at = index + (command == OUTPUT_ATTR ? n_inputs : 0);
        if (at >= n_tensors || size < sizeof(Attr)) return PARAM_INVALID;
        memcpy(info, &attrs[at], sizeof(Attr));
        ((Attr*)info)->index = index;
    } else if (command == SDK_VERSION) {
        memset(info, 0, size);
        strcpy(info, "2.5.0 (a fake)");
        strcpy((char*)info + 256, "0.9.8");
    } else {
        return MODEL_INVALID;
    }
    return SUCC;
}

int rknn_inputs_set(Context context, uint32_t n, Input inputs[]) {
    if (context != 42 || n != n_inputs) return PARAM_INVALID;
    if (fault("inputs_set")) return fault("inputs_set");
    for (uint32_t i = 0; i < n; i++) {
        Input* in = &inputs[i];
        uint32_t elems = attrs[in->index].n_elems, width = (uint32_t[]){4, 2, 1, 1, 2}[in->type];
        float* out = values[in->index];
        if (in->size != elems * width) return PARAM_INVALID;
        for (uint32_t j = 0; j < elems; j++) {
            switch (in->type) {
                case FLOAT32: out[j] = ((float*)in->buf)[j]; break;
                case FLOAT16: out[j] = ((_Float16*)in->buf)[j]; break;
                case INT8: out[j] = ((int8_t*)in->buf)[j]; break;
                case UINT8: out[j] = ((uint8_t*)in->buf)[j]; break;
                case INT16: out[j] = ((int16_t*)in->buf)[j]; break;
                default: return PARAM_INVALID;
            }
        }
    }
    return SUCC;
}

int rknn_set_input_shapes(Context context, uint32_t n, Attr shapes[]) {  // for models of dynamic shape
    (void)n, (void)shapes;
    return context == 42 ? SUCC : PARAM_INVALID;
}

int rknn_set_core_mask(Context context, int mask) {
    if (context != 42 || (mask != 0xffff && (mask < 0 || mask > 7 || mask == 5 || mask == 6))) return PARAM_INVALID;
    printf("fake librknnrt: core mask %d\n", mask);
    fflush(stdout);
    return SUCC;
}

int rknn_run(Context context, void* extend) {
    (void)extend;
    if (context != 42) return PARAM_INVALID;
    if (fault("run")) return fault("run");
    FILE* dump = getenv("FAKE_RKNN_DUMP") ? fopen(getenv("FAKE_RKNN_DUMP"), "ab") : NULL;
    for (uint32_t k = 0; dump && k < n_inputs; k++) fwrite(values[k], sizeof(float), attrs[k].n_elems, dump);
    if (dump) fclose(dump);
    for (uint32_t o = n_inputs; o < n_tensors; o++)
        for (uint32_t i = 0; i < attrs[o].n_elems; i++) {
            values[o][i] = 0;
            for (uint32_t k = 0; k < n_inputs; k++)
                values[o][i] += (1.0f + 99.0f * k) * values[k][(k ? 1u : 5u) * i % attrs[k].n_elems];
        }
    return SUCC;
}

int rknn_outputs_get(Context context, uint32_t n, Output outputs[], void* extend) {
    (void)extend;
    if (context != 42 || n > n_tensors - n_inputs) return PARAM_INVALID;
    if (fault("outputs_get")) return fault("outputs_get");
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = n_inputs + i, size = attrs[at].n_elems * sizeof(float);
        if (!outputs[i].want_float) return PARAM_INVALID;
        if (!outputs[i].is_prealloc) outputs[i].buf = malloc(size);
        else if (outputs[i].size < size) return PARAM_INVALID;
        memcpy(outputs[i].buf, values[at], size);
        outputs[i].size = size;
        outputs[i].index = i;
    }
    return SUCC;
}

int rknn_outputs_release(Context context, uint32_t n, Output outputs[]) {
    for (uint32_t i = 0; i < n; i++)
        if (!outputs[i].is_prealloc) free(outputs[i].buf);
    return context == 42 ? SUCC : PARAM_INVALID;
}
