// A stand-in for librkllmrt.so: the RKLLM ABI around a float32 Qwen2, for tests.  It is not the vendor's library and
// shares nothing with it but the published function and type names; see README.md for what it claims and what not.
//
// build.py compiles it once per ABI family:
//   FAMILY_HEADER  the header that declares the family and asserts its layout
//   ABI            1: 1.1   2: 1.2.0   3: 1.2.1b1   4: 1.2.1-1.2.3   5: 1.3.0
//   VERSION        the release it says it is
//   KV_RULE        what its KV cache does unless RKLLM_STANDIN_KV says otherwise
#define _GNU_SOURCE
#include FAMILY_HEADER

#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

__attribute__((used)) static const char sdk_version[] = "RKLLM SDK (version: " VERSION " (stand-in for tests, not the vendor's))";

enum { NPU_CORES = 3, BLOCK_ROWS = 32, RESERVED_ROWS = 4 };

// ---------------------------------------------------------------------------------------------------------- switches

// The value of RKLLM_STANDIN_<name>, or NULL.  Read at each use, so that a process can change them between calls.
static const char* knob(const char* name) {
    char full[64];
    snprintf(full, sizeof full, "RKLLM_STANDIN_%s", name);
    const char* value = getenv(full);
    return value && *value ? value : NULL;
}

static double knob_number(const char* name, double otherwise) {
    const char* value = knob(name);
    return value ? atof(value) : otherwise;
}

static bool knob_is(const char* name, const char* wanted) {
    const char* value = knob(name);
    return value && strcmp(value, wanted) == 0;
}

// Whether the switch names this number: "3" the third alone, "3+" it and all after it.
static bool due(const char* name, long number) {
    const char* value = knob(name);
    if (!value) return false;
    char* end;
    long wanted = strtol(value, &end, 10);
    return number == wanted || (*end == '+' && number > wanted);
}

// Counts inits (which = 0) and runs (1) from 1: of this process, or of all that share the file RKLLM_STANDIN_COUNT.
static long count(int which) {
    static long own[2];
    const char* path = knob("COUNT");
    if (!path) return ++own[which];
    long numbers[2] = {0, 0};
    int file = open(path, O_RDWR | O_CREAT, 0644);
    flock(file, LOCK_EX);
    if (pread(file, numbers, sizeof numbers, 0) < 0) perror("RKLLM_STANDIN_COUNT");
    numbers[which]++;
    if (pwrite(file, numbers, sizeof numbers, 0) < 0) perror("RKLLM_STANDIN_COUNT");
    close(file);
    return numbers[which];
}

// One line of JSON to the file RKLLM_STANDIN_TRACE: the truth that a test compares the caller's figures with.
static void trace(const char* format, ...) {
    const char* path = knob("TRACE");
    if (!path) return;
    va_list values;
    va_start(values, format);
    FILE* file = fopen(path, "a");
    if (file) {
        vfprintf(file, format, values);
        fclose(file);
    }
    va_end(values);
}

static void say(const char* format, ...) {  // the vendor's logs share stdout with the program
    va_list values;
    va_start(values, format);
    vprintf(format, values);
    putchar('\n');
    fflush(stdout);
    va_end(values);
}

static void segfault(const char* why) {
    fprintf(stderr, "stand-in: segmentation fault on purpose (%s)\n", why);
    raise(SIGSEGV);
}

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static void sleep_ms(double duration) {
    struct timespec time = {(time_t)(duration / 1e3), (long)(fmod(duration, 1e3) * 1e6)};
    if (duration > 0) nanosleep(&time, NULL);
}

// ------------------------------------------------------------------------------------------------------------- model

// The file that tools/write_rkllm_standin_model.py writes; little-endian, matrices as (outputs / 16, inputs, 16).
typedef struct {
    char magic[8];
    uint32_t hidden, inner, n_layers, n_heads, n_kv_heads, head_size;
    uint32_t n_tokens, n_head_columns, n_stop, context;
    float eps;
    uint32_t tensors_at;
    uint64_t n_bytes;
} Header;

typedef struct {
    const float *norm1, *q, *q_bias, *k, *k_bias, *v, *v_bias, *o, *norm2, *gate, *up, *down;
} Layer;

typedef struct {
    Header h;
    void* map;
    size_t map_bytes;
    const int32_t* stop;
    const uint8_t* special;
    const uint32_t* text_at;
    const char* text;
    const float *frequencies, *table, *norm, *head;
    Layer* layers;
} Model;

static bool model_load(Model* model, const char* path) {
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) {
        say("E rkllm: failed to open the model file %s", path ? path : "(null)");
        if (file >= 0) close(file);
        return false;
    }
    Header* h = &model->h;
    model->map_bytes = info.st_size;
    model->map = mmap(NULL, model->map_bytes ? model->map_bytes : 1, PROT_READ, MAP_PRIVATE, file, 0);
    bool good = pread(file, h, sizeof *h, 0) == (ssize_t)sizeof *h && memcmp(h->magic, "RKSTAND1", 8) == 0;
    close(file);
    if (!good || h->n_bytes != model->map_bytes || model->map == MAP_FAILED) {
        say("E rkllm: load model file error: %s is %s", path, good ? "cut off" : "no model file");
        if (model->map != MAP_FAILED) munmap(model->map, model->map_bytes);
        return false;
    }
    const char* base = model->map;
    model->stop = (const int32_t*)(base + sizeof *h);
    model->text_at = (const uint32_t*)(model->stop + h->n_stop);
    model->special = (const uint8_t*)(model->text_at + h->n_tokens + 1);
    model->text = (const char*)(model->special + h->n_tokens);
    const float* at = (const float*)(base + h->tensors_at);
    uint32_t queries = h->n_heads * h->head_size, keys = h->n_kv_heads * h->head_size;
#define TAKE(n) (at += (n), at - (n))
    model->frequencies = TAKE(h->head_size / 2);
    model->table = TAKE(h->n_tokens * h->hidden);
    model->layers = calloc(h->n_layers, sizeof(Layer));
    for (uint32_t i = 0; i < h->n_layers; i++) {
        Layer* l = &model->layers[i];
        l->norm1 = TAKE(h->hidden);
        l->q = TAKE(h->hidden * queries), l->q_bias = TAKE(queries);
        l->k = TAKE(h->hidden * keys), l->k_bias = TAKE(keys);
        l->v = TAKE(h->hidden * keys), l->v_bias = TAKE(keys);
        l->o = TAKE(queries * h->hidden);
        l->norm2 = TAKE(h->hidden);
        l->gate = TAKE(h->hidden * h->inner), l->up = TAKE(h->hidden * h->inner);
        l->down = TAKE(h->inner * h->hidden);
    }
    model->norm = TAKE(h->hidden);
    model->head = TAKE(h->hidden * h->n_head_columns);
#undef TAKE
    return true;
}

static void model_free(Model* model) {
    munmap(model->map, model->map_bytes);
    free(model->layers);
}

// ----------------------------------------------------------------------------------------------------------- numbers

typedef float v8 __attribute__((vector_size(32), aligned(4)));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FAST
#endif

// y[r][o] = bias[o] + sum over i of x[r][i] * w[o][i], for the 16 columns of one panel and n_rows <= 4 rows.
static inline __attribute__((always_inline)) void kernel(int n_rows, const float* panel, const float* bias, const float* x,
                                                         float* y, int n_in, int n_out) {
    v8 sums[4][2];
#pragma GCC unroll 4  // -O2 alone would keep the sums in memory
    for (int r = 0; r < n_rows; r++) {
        sums[r][0] = bias ? *(const v8*)bias : (v8){0};
        sums[r][1] = bias ? *(const v8*)(bias + 8) : (v8){0};
    }
    for (int i = 0; i < n_in; i++, panel += 16)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            float scale = x[r * n_in + i];
            sums[r][0] += *(const v8*)panel * scale;
            sums[r][1] += *(const v8*)(panel + 8) * scale;
        }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        *(v8*)(y + (size_t)r * n_out) = sums[r][0];
        *(v8*)(y + (size_t)r * n_out + 8) = sums[r][1];
    }
}

FAST static void linear(const float* w, const float* bias, const float* x, float* y, int n_rows, int n_in, int n_out) {
    for (int o = 0; o < n_out; o += 16)
        for (int r = 0; r < n_rows; r += 4) {
            const float *panel = w + (size_t)o * n_in, *add = bias ? bias + o : NULL, *from = x + r * n_in;
            float* to = y + (size_t)r * n_out + o;
            switch (n_rows - r) {  // constants, so that each case is unrolled
                case 1: kernel(1, panel, add, from, to, n_in, n_out); break;
                case 2: kernel(2, panel, add, from, to, n_in, n_out); break;
                case 3: kernel(3, panel, add, from, to, n_in, n_out); break;
                default: kernel(4, panel, add, from, to, n_in, n_out);
            }
        }
}

// One query head over the keys and values of positions [first, last].
FAST static void attend(const float* q, const float* keys, const float* values, int first, int last, int stride,
                        int head_size, float* scores, float* out) {
    float scale = 1.0f / sqrtf((float)head_size), most = -INFINITY, total = 0;
    for (int p = first; p <= last; p++) {
        v8 sum = {0};
        for (int i = 0; i < head_size; i += 8) sum += *(const v8*)(q + i) * *(const v8*)(keys + (size_t)p * stride + i);
        float score = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
        scores[p] = score * scale;
        if (scores[p] > most) most = scores[p];
    }
    for (int p = first; p <= last; p++) total += scores[p] = expf(scores[p] - most);
    for (int i = 0; i < head_size; i += 8) {
        v8 sum = {0};
        for (int p = first; p <= last; p++) sum += *(const v8*)(values + (size_t)p * stride + i) * scores[p];
        *(v8*)(out + i) = sum / total;
    }
}

static void rms_norm(const float* x, const float* weight, float* y, int n_rows, int width, float eps) {
    for (int r = 0; r < n_rows; r++, x += width, y += width) {
        float sum = 0;
        for (int i = 0; i < width; i++) sum += x[i] * x[i];
        float scale = 1.0f / sqrtf(sum / width + eps);
        for (int i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
    }
}

static void rotate(float* x, int n_heads, int head_size, const float* frequencies, int position) {
    int half = head_size / 2;
    for (int i = 0; i < half; i++) {
        float angle = position * frequencies[i], c = cosf(angle), s = sinf(angle);
        for (int head = 0; head < n_heads; head++) {
            float *low = x + head * head_size + i, *high = low + half, a = *low, b = *high;
            *low = a * c - b * s;
            *high = b * c + a * s;
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ handle

typedef struct {
    int32_t top_k;
    float top_p, temperature, repeat, frequency, presence;
} Sampling;

typedef struct {
    Model model;
    RKLLMParam param;  // its strings are not kept
    Sampling sampling;
    LLMResultCallback callback;
#if ABI >= 5
    RKLLMCallback* callbacks;  // the caller's own: whether it must outlive rkllm_init is not documented, so it must
#endif
    pthread_mutex_t lock;
    atomic_int running, aborted;
    bool paused;
    // The KV cache: n_held positions, the row that each was computed from, and whether it was a generated token's.
    int n_held, context;
    float *keys, *values, *rows;
    uint8_t* generated;
    float *x, *y, *q, *inner, *gate, *scores, *logits;
    uint64_t random;
    char pending[64];
    int n_pending;
    int* tokens;
    int n_tokens;
} Llm;

static atomic_int n_live;

// Append rows to the KV cache; the scores after the last of them are in llm->logits.
// base: the first position that they see (0 for all).
static void feed(Llm* llm, const float* rows, int n, bool generated, int base) {
    const Header* h = &llm->model.h;
    int hidden = h->hidden, inner = h->inner, size = h->head_size, group = h->n_heads / h->n_kv_heads;
    int q_width = h->n_heads * size, k_width = h->n_kv_heads * size;
    for (int start = 0; start < n; start += BLOCK_ROWS) {
        int block = n - start < BLOCK_ROWS ? n - start : BLOCK_ROWS, held = llm->n_held;
        memcpy(llm->x, rows + (size_t)start * hidden, sizeof(float) * block * hidden);
        memcpy(llm->rows + (size_t)held * hidden, llm->x, sizeof(float) * block * hidden);
        memset(llm->generated + held, generated, block);
        for (uint32_t i = 0; i < h->n_layers; i++) {
            const Layer* l = &llm->model.layers[i];
            float* keys = llm->keys + (size_t)i * llm->context * k_width;
            float* values = llm->values + (size_t)i * llm->context * k_width;
            rms_norm(llm->x, l->norm1, llm->y, block, hidden, h->eps);
            linear(l->q, l->q_bias, llm->y, llm->q, block, hidden, q_width);
            linear(l->k, l->k_bias, llm->y, keys + (size_t)held * k_width, block, hidden, k_width);
            linear(l->v, l->v_bias, llm->y, values + (size_t)held * k_width, block, hidden, k_width);
            for (int r = 0; r < block; r++) {
                rotate(llm->q + r * q_width, h->n_heads, size, llm->model.frequencies, held + r - base);
                rotate(keys + (size_t)(held + r) * k_width, h->n_kv_heads, size, llm->model.frequencies, held + r - base);
            }
            for (int r = 0; r < block; r++)
                for (uint32_t head = 0; head < h->n_heads; head++) {
                    int at = head / group * size;
                    attend(llm->q + r * q_width + head * size, keys + at, values + at, base, held + r, k_width, size,
                           llm->scores, llm->y + r * q_width + head * size);
                }
            linear(l->o, NULL, llm->y, llm->q, block, q_width, hidden);
            for (int j = 0; j < block * hidden; j++) llm->x[j] += llm->q[j];
            rms_norm(llm->x, l->norm2, llm->y, block, hidden, h->eps);
            linear(l->gate, NULL, llm->y, llm->gate, block, hidden, inner);
            linear(l->up, NULL, llm->y, llm->inner, block, hidden, inner);
            for (int j = 0; j < block * inner; j++) llm->inner[j] *= llm->gate[j] / (1.0f + expf(-llm->gate[j]));
            linear(l->down, NULL, llm->inner, llm->q, block, inner, hidden);
            for (int j = 0; j < block * hidden; j++) llm->x[j] += llm->q[j];
        }
        llm->n_held += block;
        if (start + block == n) {
            rms_norm(llm->x + (block - 1) * hidden, llm->model.norm, llm->y, 1, hidden, h->eps);
            linear(llm->model.head, NULL, llm->y, llm->logits, 1, hidden, h->n_head_columns);
        }
    }
}

static const float* table_row(const Llm* llm, int token) { return llm->model.table + (size_t)token * llm->model.h.hidden; }

static bool is_token_row(const Llm* llm, const float* row) {
    for (uint32_t token = 0; token < llm->model.h.n_tokens; token++) {
        const float* own = table_row(llm, token);
        if (own[0] == row[0] && memcmp(own, row, sizeof(float) * llm->model.h.hidden) == 0) return true;
    }
    return false;
}

// How many of the first rows are in the KV cache already.
// stale: rows that are no token's (an image's) are all taken for the same.
static int common_prefix(const Llm* llm, const float* rows, int n, bool stale) {
    int hidden = llm->model.h.hidden, i = 0;
    bool generated_too = !knob_is("GENERATED_MATCH", "0");
    for (; i < n && i < llm->n_held; i++) {
        const float *held = llm->rows + (size_t)i * hidden, *row = rows + (size_t)i * hidden;
        bool same = memcmp(held, row, sizeof(float) * hidden) == 0 && (generated_too || !llm->generated[i]);
        if (!same && !(stale && !is_token_row(llm, held) && !is_token_row(llm, row))) break;
    }
    return i;
}

// ---------------------------------------------------------------------------------------------------------- sampling

typedef struct {
    double score;
    int token;
} Candidate;

static int by_score(const void* a, const void* b) {
    const Candidate *x = a, *y = b;
    return x->score != y->score ? (x->score < y->score ? 1 : -1) : x->token - y->token;
}

static double draw(Llm* llm) {  // xorshift64*
    llm->random ^= llm->random >> 12, llm->random ^= llm->random << 25, llm->random ^= llm->random >> 27;
    return (double)((llm->random * 0x2545F4914F6CDD1Dull) >> 11) / 9007199254740992.0;
}

// Penalties see the tokens of this run alone; the input's rows have no ids.
static int choose(Llm* llm, const Sampling* how) {
    int n = llm->model.h.n_tokens;
    Candidate* all = malloc(sizeof *all * n);
    for (int i = 0; i < n; i++) all[i] = (Candidate){llm->logits[i], i};
    for (int i = 0; i < llm->n_tokens; i++) {
        double* score = &all[llm->tokens[i]].score;
        bool first = true;
        for (int j = 0; j < i; j++) first = first && llm->tokens[j] != llm->tokens[i];
        if (first && how->repeat > 0) *score = *score < 0 ? *score * how->repeat : *score / how->repeat;
        *score -= how->frequency + (first ? how->presence : 0);
    }
    int chosen = 0;
    if (how->temperature <= 0 || how->top_k == 1) {
        for (int i = 1; i < n; i++) chosen = all[i].score > all[chosen].score ? i : chosen;
    } else {
        qsort(all, n, sizeof *all, by_score);
        int kept = how->top_k > 0 && how->top_k < n ? how->top_k : n;
        double total = 0, sum = 0, best = all[0].score;
        for (int i = 0; i < kept; i++) total += all[i].score = exp((all[i].score - best) / how->temperature);
        for (int i = 0; i < kept && how->top_p < 1; i++)
            if ((sum += all[i].score) >= how->top_p * total) kept = i + 1, total = sum;
        double left = draw(llm) * total;
        for (chosen = 0; chosen < kept - 1 && (left -= all[chosen].score) > 0;) chosen++;
        chosen = all[chosen].token;
    }
    free(all);
    return chosen;
}

// --------------------------------------------------------------------------------------------------------------- run

typedef struct {
    void* userdata;
    double started_ms, prefilled_ms;
    int n_reported, n_sampled;
} Run;

// Call back.  What is passed is valid during the call alone, so it is spoilt afterwards.
static int tell(Llm* llm, const Run* run, LLMCallState state, const char* text, int token) {
    RKLLMResult result;
    char copy[128];
    memset(&result, 0, sizeof result);
    if (text) {
        snprintf(copy, sizeof copy, "%s", text);
        result.text = copy;
    }
    result.token_id = token;
#if ABI >= 4
    if (state == RKLLM_RUN_FINISH) {
        struct rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        result.perf.prefill_time_ms = (float)(run->prefilled_ms - run->started_ms);
        result.perf.prefill_tokens = run->n_reported;
        result.perf.generate_time_ms = (float)(now_ms() - run->prefilled_ms);
        result.perf.generate_tokens = run->n_sampled;
        result.perf.memory_usage_mb = usage.ru_maxrss / 1024.0f;
    }
    int answer = llm->callback(&result, run->userdata, state);
#else
    llm->callback(&result, run->userdata, state);
    int answer = 0;
#endif
    memset(copy, 0xEE, sizeof copy);
    memset(&result, 0xEE, sizeof result);
    return answer;
}

// Bytes at the end of text that begin a character but do not complete it.
static int n_unfinished(const char* text, int n) {
    for (int back = 1; back <= 3 && back <= n; back++) {
        unsigned char byte = text[n - back];
        if ((byte & 0xC0) == 0x80) continue;
        int needed = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
        return needed > back ? back : 0;
    }
    return 0;
}

// One token to the caller; characters are joined unless RKLLM_STANDIN_UTF8 says otherwise.
static int tell_token(Llm* llm, const Run* run, int token) {
    const Model* model = &llm->model;
    char text[128] = "";
    int n = 0;
    if (!(llm->param.skip_special_token && model->special[token])) {
        n = model->text_at[token + 1] - model->text_at[token];
        n = n < 63 ? n : 63;
        memcpy(text, model->text + model->text_at[token], n);
        text[n] = 0;
    }
    if (knob_is("UTF8", "split")) return tell(llm, run, RKLLM_RUN_NORMAL, text, token);
    memmove(text + llm->n_pending, text, n + 1);
    memcpy(text, llm->pending, llm->n_pending);
    n += llm->n_pending;
    int open = n_unfinished(text, n);
    if (knob_is("UTF8", "waiting") && open) {  // the bytes come with the WAITING state and are not repeated
        text[n] = 0;
        return tell(llm, run, RKLLM_RUN_WAITING, text, token);
    }
    llm->n_pending = open;
    memcpy(llm->pending, text + n - open, open);
    text[n - open] = 0;
    if (open && open == n) return knob_is("UTF8", "silent") ? 0 : tell(llm, run, RKLLM_RUN_WAITING, NULL, token);
    return tell(llm, run, RKLLM_RUN_NORMAL, text, token);
}

static bool maps_rknn(void) {
    char line[4096];
    bool found = false;
    FILE* maps = fopen("/proc/self/maps", "r");
    while (maps && !found && fgets(line, sizeof line, maps)) found = strstr(line, "librknnrt") != NULL;
    if (maps) fclose(maps);
    return found;
}

// False where another process computes on the NPU, whose lock file RKLLM_STANDIN_NPU names; *file is to be closed.
static bool take_npu(int* file) {
    const char* path = knob("NPU");
    if (!path) return true;
    *file = open(path, O_RDWR | O_CREAT, 0644);
    if (flock(*file, LOCK_EX | LOCK_NB) == 0) return true;
    say("E RKNN: failed to submit!, op id: 1, op name: MatMul");
    return false;
}

static void trace_run(const Llm* llm, long number, int n_rows, int keep, int n_reused, int n_prefilled, int before,
                      const char* end) {
    if (!knob("TRACE")) return;
    char* list = calloc(llm->n_tokens + 1, 12);
    for (int i = 0, at = 0; i < llm->n_tokens; i++) at += sprintf(list + at, "%s%d", i ? ", " : "", llm->tokens[i]);
    trace("{\"call\": \"run\", \"run\": %ld, \"rows\": %d, \"keep_history\": %d, \"reused\": %d, \"prefilled\": %d, "
          "\"kv_before\": %d, \"kv_after\": %d, \"end\": \"%s\", \"tokens\": [%s]}\n",
          number, n_rows, keep, n_reused, n_prefilled, before, llm->n_held, end, list);
    free(list);
}

static int fail(Llm* llm, const Run* run, long number, int n_rows, const char* why) {
    say("E rkllm: %s", why);
    tell(llm, run, RKLLM_RUN_ERROR, NULL, 0);
    trace_run(llm, number, n_rows, 0, 0, 0, llm->n_held, "error");
    return -1;
}

static bool is_stop(const Llm* llm, int token) {
    for (uint32_t i = 0; i < llm->model.h.n_stop; i++)
        if (llm->model.stop[i] == token) return true;
    return false;
}

static int run_locked(Llm* llm, const RKLLMInput* input, const RKLLMInferParam* infer, void* userdata) {
    long number = count(1);
    Run run = {.userdata = userdata, .started_ms = now_ms()};
    Sampling how = llm->sampling;
    int max_new = llm->param.max_new_tokens, keep = 0, n = (int)input->embed_input.n_tokens;
    const float* rows = input->embed_input.embed;
#if ABI >= 2
    keep = infer->keep_history;
#endif
#if ABI >= 5
    if (!userdata) run.userdata = llm->callbacks->result_userdata;
    llm->callback = llm->callbacks->result_callback;
    if (infer->max_new_tokens > 0) max_new = infer->max_new_tokens;
    if (infer->sampling_params) {
        const RKLLMSamplingParam* p = infer->sampling_params;
        how = (Sampling){p->top_k, p->top_p, p->temperature, p->repeat_penalty, p->frequency_penalty, p->presence_penalty};
    }
#endif
    if (knob("SEGFAULT_RKNN") && maps_rknn()) segfault("librknnrt is loaded in this process");
    if (due("HANG", number))
        for (;;) pause();
    if (due("CRASH", number) && !knob("CRASH_TOKENS")) segfault("RKLLM_STANDIN_CRASH");
    if (knob("LEAK_MB")) {
        size_t bytes = (size_t)(knob_number("LEAK_MB", 0) * 1048576);
        void* volatile lost = malloc(bytes);
        if (lost) memset(lost, 1, bytes);
    }
    if (infer->mode != RKLLM_INFER_GENERATE) return fail(llm, &run, number, n, "the stand-in only generates");
    if (input->input_type != RKLLM_INPUT_EMBED) return fail(llm, &run, number, n, "the stand-in takes embeddings only");
    if (n < 1 || !rows) return fail(llm, &run, number, n, "the input is empty");
    if (knob("SEGFAULT_ROWS") && n > knob_number("SEGFAULT_ROWS", 0)) segfault("RKLLM_STANDIN_SEGFAULT_ROWS");

    const char* rule = knob("KV") ? knob("KV") : KV_RULE;
    bool prefix = strstr(rule, "prefix") != NULL, append = strncmp(rule, "append", 6) == 0;
    bool broken = strcmp(rule, "broken-append") == 0, stale = strcmp(rule, "stale-prefix") == 0;
    bool appends = keep && (append || broken);
    int before = llm->n_held, n_reused = 0, n_prefilled = 0, base = 0, n_after_abort = 0;
    const char* end = "finish";
    bool resumed = llm->paused;
    llm->paused = false;
    if (!resumed) {
        llm->n_tokens = llm->n_pending = 0;
        if (prefix && !appends) {
            n_reused = common_prefix(llm, rows, n, stale);
            llm->n_held = n_reused < n ? n_reused : n - 1;  // the last row is computed again, for its scores
        } else if (!appends) {
            llm->n_held = 0;
        }
        if (broken) base = llm->n_held;
        int total = llm->n_held + n - (n_reused < n ? n_reused : n - 1);
        if (knob("SEGFAULT_CONTEXT") && total > llm->context) segfault("RKLLM_STANDIN_SEGFAULT_CONTEXT");
        if (total > llm->context - RESERVED_ROWS) {
            char why[128];
            snprintf(why, sizeof why, "prompt gather than max context (prompt: %d tokens, max context: %d)", total,
                     llm->context - RESERVED_ROWS);
            return fail(llm, &run, number, n, why);
        }
        n_prefilled = total - llm->n_held;
        sleep_ms(knob_number("PREFILL_MS", 0) * n_prefilled);
        feed(llm, rows + (size_t)(n - n_prefilled) * llm->model.h.hidden, n_prefilled, false, base);
        if (n_reused == n) n_prefilled = 0;  // as the vendor's counter was seen to say
    }
    run.prefilled_ms = now_ms();
    run.n_reported = knob_is("PREFILL_COUNT", "all") ? n : n_prefilled + (int)knob_number("PREFILL_COUNT", 0);

    for (int n_new = 0;;) {
        if (llm->aborted && n_after_abort++ >= knob_number("ABORT_LATE", 0)) {
            end = "abort";
            break;
        }
        if (due("ERROR", number) && n_new >= knob_number("ERROR_TOKENS", 0)) {
            end = "error";
            break;
        }
        if (due("CRASH", number) && n_new >= knob_number("CRASH_TOKENS", 0)) segfault("RKLLM_STANDIN_CRASH");
        if (max_new > 0 && n_new >= max_new) break;
        int token = choose(llm, &how);
        run.n_sampled++;
        sleep_ms(knob_number("DECODE_MS", 0));
        bool ends = is_stop(llm, token) && !knob("NO_EOS");
#if ABI >= 5
        ends = ends && !llm->param.ignore_eos_token;
#endif
        if (ends) {
            if (!llm->param.skip_special_token) tell_token(llm, &run, token);
            if (knob("EOS_IN_KV") && llm->n_held < llm->context) feed(llm, table_row(llm, token), 1, true, base);
            break;
        }
        llm->tokens[llm->n_tokens++] = token;
        n_new++;
        if (tell_token(llm, &run, token) == 1) {
            llm->paused = true;
            end = "pause";
        }
        if (llm->n_held >= llm->context || llm->n_tokens >= llm->context) {
            if (knob("SEGFAULT_CONTEXT")) segfault("RKLLM_STANDIN_SEGFAULT_CONTEXT");
            say("W rkllm: the context is full");
            break;
        }
        if (max_new > 0 && n_new >= max_new && !llm->paused) break;  // the last token is not fed
        feed(llm, table_row(llm, token), 1, true, base);
        if (llm->paused) break;
    }
    if (strcmp(end, "finish") == 0) tell(llm, &run, RKLLM_RUN_FINISH, NULL, 0);
    if (strcmp(end, "abort") == 0 && knob_is("ABORT_STATE", "finish")) tell(llm, &run, RKLLM_RUN_FINISH, NULL, 0);
    if (strcmp(end, "error") == 0 || (strcmp(end, "abort") == 0 && knob_is("ABORT_STATE", "error")))
        tell(llm, &run, RKLLM_RUN_ERROR, NULL, 0);
    if (!llm->paused && !prefix && !appends) llm->n_held = 0;
    const char* level = getenv("RKLLM_LOG_LEVEL");
    if (level && atoi(level) >= 1)
        say("I rkllm: prefill %d tokens, %.2f ms; generate %d tokens, %.2f ms", n_prefilled,
            run.prefilled_ms - run.started_ms, run.n_sampled, now_ms() - run.prefilled_ms);
    trace_run(llm, number, n, keep, n_reused, n_prefilled, before, end);
    return strcmp(end, "error") == 0 ? -1 : 0;
}

// --------------------------------------------------------------------------------------------------------------- API

RKLLMParam rkllm_createDefaultParam(void) {
    if (knob_is("PROBE", "crash")) segfault("RKLLM_STANDIN_PROBE");
    if (knob_is("PROBE", "hang"))
        for (;;) pause();
    RKLLMParam param;
    memset(&param, 0, sizeof param);
    if (knob_is("PROBE", "zero")) return param;
    param.max_context_len = 512;
    param.max_new_tokens = -1;
    param.top_k = 40;
    param.top_p = 0.9f;
    param.temperature = 0.8f;
    param.repeat_penalty = 1.1f;
    param.mirostat_tau = 5.0f;
    param.mirostat_eta = 0.1f;
#if ABI >= 2
    param.n_keep = -1;
    param.extend_param.enabled_cpus_num = 4;
    param.extend_param.enabled_cpus_mask = 0xF0;
#endif
#if ABI >= 4
    param.extend_param.n_batch = 1;
#endif
    return param;
}

static void trace_param(const RKLLMParam* p, const char* result) {
    trace("{\"call\": \"init\", \"result\": \"%s\", \"max_context_len\": %d, \"max_new_tokens\": %d, \"top_k\": %d, "
          "\"top_p\": %g, \"temperature\": %g, \"repeat_penalty\": %g, \"frequency_penalty\": %g, "
          "\"presence_penalty\": %g, \"mirostat\": %d, \"mirostat_tau\": %g, \"mirostat_eta\": %g, "
          "\"skip_special_token\": %d, \"is_async\": %d, \"base_domain_id\": %d",
          result, p->max_context_len, p->max_new_tokens, p->top_k, p->top_p, p->temperature, p->repeat_penalty,
          p->frequency_penalty, p->presence_penalty, p->mirostat, p->mirostat_tau, p->mirostat_eta,
          p->skip_special_token, p->is_async, p->extend_param.base_domain_id);
#if ABI >= 2
    trace(", \"n_keep\": %d, \"embed_flash\": %d, \"enabled_cpus_num\": %d, \"enabled_cpus_mask\": %u", p->n_keep,
          p->extend_param.embed_flash, p->extend_param.enabled_cpus_num, p->extend_param.enabled_cpus_mask);
#endif
#if ABI >= 4
    trace(", \"n_batch\": %d, \"use_cross_attn\": %d", p->extend_param.n_batch, p->extend_param.use_cross_attn);
#endif
#if ABI >= 5
    trace(", \"ignore_eos_token\": %d", p->ignore_eos_token);
#endif
    trace("}\n");
}

// What the vendor's library refuses, as far as it is known.
static bool acceptable(const RKLLMParam* p, const Model* model) {
#if ABI >= 2
    if (p->extend_param.enabled_cpus_num < NPU_CORES) {
        say("E rkllm: enabled_cpus_num[%d] must not be less than npu_core_num[%d]", p->extend_param.enabled_cpus_num,
            NPU_CORES);
        return false;
    }
#endif
#if ABI >= 4
    if (p->extend_param.n_batch < 1 || p->extend_param.n_batch > 100) {
        say("E rkllm: The n_batch must be between 1 and 100, but got %d", p->extend_param.n_batch);
        return false;
    }
#endif
    if (p->max_context_len > (int)model->h.context || p->max_context_len <= RESERVED_ROWS) {
        say("E rkllm: max_context[%d] must be less than the model's max_context_limit[%u]", p->max_context_len,
            model->h.context);
        return false;
    }
    return true;
}

#if ABI >= 5
int rkllm_init(LLMHandle* handle, RKLLMParam* param, RKLLMCallback* callback) {
    LLMResultCallback result_callback = callback ? callback->result_callback : NULL;
#else
int rkllm_init(LLMHandle* handle, RKLLMParam* param, LLMResultCallback callback) {
    LLMResultCallback result_callback = callback;
#endif
    long number = count(0);
    *handle = NULL;
    say("I rkllm: rkllm-runtime version: " VERSION ", rknpu driver version: 0.9.8, platform: RK3588");
    bool chosen = !knob("INIT_AT") || due("INIT_AT", number);
    if (chosen && (knob_is("INIT", "fail") || knob_is("INIT", "null"))) {
        bool null = knob_is("INIT", "null");
        say("E rkllm: failed to malloc npu memory, size: 232128512");
        say("E rkllm: load model file error!");
        if (null) say("rkllm init success");
        trace_param(param, null ? "null" : "failed");
        return null ? 0 : -1;
    }
    if (n_live && knob_is("SECOND_INIT", "segfault")) segfault("RKLLM_STANDIN_SECOND_INIT");
    if (n_live && knob_is("SECOND_INIT", "fail")) return -1;
    Model model = {.map = MAP_FAILED};
    bool good = result_callback && model_load(&model, param->model_path);
    if (good && !acceptable(param, &model)) {
        model_free(&model);
        good = false;
    }
    trace_param(param, good ? "ok" : "refused");
    if (!good) return -1;
    Llm* llm = calloc(1, sizeof *llm);
    llm->model = model;
    llm->param = *param;
    llm->sampling = (Sampling){param->top_k, param->top_p, param->temperature, param->repeat_penalty,
                               param->frequency_penalty, param->presence_penalty};
    llm->callback = result_callback;
#if ABI >= 5
    llm->callbacks = callback;
#endif
    pthread_mutex_init(&llm->lock, NULL);
    const Header* h = &model.h;
    size_t room = llm->context = param->max_context_len;
    size_t widest = h->inner > h->hidden ? h->inner : h->hidden, kv = room * h->n_kv_heads * h->head_size * h->n_layers;
    if (h->n_heads * h->head_size > widest) widest = h->n_heads * h->head_size;
    llm->keys = calloc(kv, sizeof(float)), llm->values = calloc(kv, sizeof(float));
    llm->rows = calloc(room * h->hidden, sizeof(float)), llm->generated = calloc(room, 1);
    llm->tokens = calloc(room + 1, sizeof(int)), llm->scores = calloc(room, sizeof(float));
    llm->logits = calloc(h->n_head_columns, sizeof(float));
    float** scratch[] = {&llm->x, &llm->y, &llm->q, &llm->inner, &llm->gate};
    for (size_t i = 0; i < sizeof scratch / sizeof *scratch; i++) *scratch[i] = calloc(BLOCK_ROWS * widest, sizeof(float));
    llm->random = (uint64_t)knob_number("SEED", 1) * 0x9E3779B97F4A7C15ull + 1;
    n_live++;
#if ABI >= 2
    say("I rkllm: rkllm-toolkit version: " VERSION ", max_context_limit: %u, npu_core_num: %d, target_platform: RK3588, "
        "model_dtype: FP32", h->context, NPU_CORES);
#endif
    if (knob("NO_EOS")) say("I rkllm: EOS token[0]: 11 '<jupyter_start>'");
    say("rkllm init success");
    *handle = llm;
    return 0;
}

int rkllm_destroy(LLMHandle handle) {
    Llm* llm = handle;
    if (!llm) return -1;
    pthread_mutex_lock(&llm->lock);
    model_free(&llm->model);
    free(llm->keys), free(llm->values), free(llm->rows), free(llm->generated), free(llm->tokens), free(llm->scores);
    free(llm->logits), free(llm->x), free(llm->y), free(llm->q), free(llm->inner), free(llm->gate);
    pthread_mutex_unlock(&llm->lock);
    free(llm);
    n_live--;
    trace("{\"call\": \"destroy\"}\n");
    return 0;
}

int rkllm_run(LLMHandle handle, RKLLMInput* rkllm_input, RKLLMInferParam* rkllm_infer_params, void* userdata) {
    Llm* llm = handle;
    if (!llm) segfault("rkllm_run without a handle");
    pthread_mutex_lock(&llm->lock);
    llm->aborted = 0;
    llm->running = 1;
    int code = -1, npu = -1;
    if (take_npu(&npu)) code = run_locked(llm, rkllm_input, rkllm_infer_params, userdata);
    if (npu >= 0) close(npu);
    llm->running = 0;
    pthread_mutex_unlock(&llm->lock);
    return code;
}

int rkllm_abort(LLMHandle handle) {
    Llm* llm = handle;
    if (!llm || !llm->running) return -1;
    llm->aborted = 1;
    return 0;
}

int rkllm_is_running(LLMHandle handle) {
    Llm* llm = handle;
    bool running = llm && llm->running;
    return ABI >= 5 ? running : !running;  // the headers differ
}

static int unsupported(const char* name) {
    say("E rkllm: the stand-in has no %s", name);
    return -1;
}

int rkllm_run_async(LLMHandle handle, RKLLMInput* rkllm_input, RKLLMInferParam* rkllm_infer_params, void* userdata) {
    (void)handle, (void)rkllm_input, (void)rkllm_infer_params, (void)userdata;
    return unsupported("rkllm_run_async");
}

int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter* lora_adapter) {
    (void)handle, (void)lora_adapter;
    return unsupported("rkllm_load_lora");
}

int rkllm_load_prompt_cache(LLMHandle handle, const char* prompt_cache_path) {
    (void)handle, (void)prompt_cache_path;
    return unsupported("rkllm_load_prompt_cache");
}

int rkllm_release_prompt_cache(LLMHandle handle) {
    (void)handle;
    return unsupported("rkllm_release_prompt_cache");
}

#if ABI >= 2
#if ABI >= 4
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt, int* start_pos, int* end_pos) {
    bool ranges = start_pos || end_pos;
#else
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt) {
    bool ranges = false;
#endif
    Llm* llm = handle;
    if (!llm || llm->running || ranges) return -1;  // ranges are for a paused run alone, which the stand-in leaves out
    trace("{\"call\": \"clear_kv_cache\", \"keep_system_prompt\": %d, \"kv_before\": %d}\n", keep_system_prompt, llm->n_held);
    llm->n_held = 0;
    llm->paused = false;
    return 0;
}

int rkllm_set_chat_template(LLMHandle handle, const char* system_prompt, const char* prompt_prefix,
                            const char* prompt_postfix) {
    if (!handle || !system_prompt || !prompt_prefix || !prompt_postfix) return -1;
    say("W rkllm: Using a custom chat template, the default one and enable_thinking have no effect");
    trace("{\"call\": \"set_chat_template\", \"n_bytes\": %zu}\n",
          strlen(system_prompt) + strlen(prompt_prefix) + strlen(prompt_postfix));
    return 0;
}
#endif

#if ABI >= 4
int rkllm_get_kv_cache_size(LLMHandle handle, int* cache_sizes) {
    Llm* llm = handle;
    if (!llm || !cache_sizes) return -1;
    cache_sizes[0] = llm->n_held + (int)knob_number("KV_COUNT", 0);
    return 0;
}

int rkllm_set_function_tools(LLMHandle handle, const char* system_prompt, const char* tools, const char* tool_response_str) {
    (void)handle, (void)system_prompt, (void)tools, (void)tool_response_str;
    return unsupported("rkllm_set_function_tools");
}

int rkllm_set_cross_attn_params(LLMHandle handle, RKLLMCrossAttnParam* cross_attn_params) {
    (void)handle, (void)cross_attn_params;
    return unsupported("rkllm_set_cross_attn_params");
}
#endif
