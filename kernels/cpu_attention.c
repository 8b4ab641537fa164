/* softmax(q k^T scale) v on a CPU with AVX-512: one pass over the keys, no map in memory.

   A vector holds 16 queries, a tile TILE of them. So keys and values are read a number at a time
   for all queries of the tile, maxima and sums of a row need no sum across a vector, no head dim
   has to be padded, and a query's result depends on nothing but its own q and on k and v. Both are
   copied once, in the order in which they are read, for all threads.
   Keys come in blocks: scores of a block, their maximum, exp, and the block's share of the output,
   which is scaled when the maximum grows (Milakov and Gimelshein 2018; Dao et al. 2022).

   float32: all sums in float32. bfloat16: factors are bfloat16, scores, exp and all sums float32.
   Plain C behind a plain interface; kernels/cpu.py loads it, checks, and falls back on PyTorch. */

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <float.h>
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define VECTORS 3             /* of queries in a tile */
#define TILE (LANES * VECTORS)
#define BLOCK 128             /* keys */
#define STEP 8                /* keys, or head dims, whose sums are in registers together */
#define LOG2_E 1.44269504f
#define LINE 64               /* bytes of a cache line */
#define TOGETHER (1 << 22)    /* bytes of k and v of the heads that are computed at a time */

#define F32 __attribute__((target("avx512f,avx512dq,avx512bw,fma")))
#define BF16 __attribute__((target("avx512f,avx512dq,avx512bw,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const char *q, *k, *v;
    char *out;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3]; /* row, head, token: numbers */
    int64_t rows, heads, queries, keys, dim;
    float scale;
    int half; /* bfloat16 */
} Call;

/* 2^x by 2^n 2^r, n = floor(x), 2^r by the polynomial whose relative error is the least on [0, 1]:
   of degree 6 to 2 ulp or, where bfloat16 follows, of degree 3 to 7.5e-5, a 26th of what its
   rounding may come to. 0 of -inf. */
INLINE F32 __m512 exp2_vector(__m512 x, int half)
{
    static const float wide[] = {1.0f, 6.93146984e-1f, 2.40229835e-1f, 5.54833489e-2f,
                                 9.67882715e-3f, 1.24398113e-3f, 2.17018518e-4f};
    static const float narrow[] = {9.99925219e-1f, 6.9583354e-1f, 2.26067159e-1f, 7.80245204e-2f};
    const float *factors = half ? narrow : wide;
    int degree = half ? 3 : 6;
    __m512 r = _mm512_reduce_ps(x, 9); /* x - floor(x) */
    __m512 p = _mm512_set1_ps(factors[degree]);
    for (int i = degree - 1; i >= 0; i--)
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(p, x);
}

/* sums[STEP][VECTORS] += left[i][STEP] right[i][TILE], over i. */
INLINE F32 void products_f32(__m512 sums[STEP][VECTORS], const float *left, const float *right,
                             int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        __m512 x[VECTORS];
        for (int w = 0; w < VECTORS; w++) x[w] = _mm512_loadu_ps(right + i * TILE + w * LANES);
        for (int j = 0; j < STEP; j++) {
            __m512 y = _mm512_set1_ps(left[i * STEP + j]);
            for (int w = 0; w < VECTORS; w++) sums[j][w] = _mm512_fmadd_ps(y, x[w], sums[j][w]);
        }
    }
}

/* The same of pairs of bfloat16, each in 32 bits. */
INLINE BF16 void products_bf16(__m512 sums[STEP][VECTORS], const int32_t *left,
                               const int32_t *right, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        __m512bh x[VECTORS];
        for (int w = 0; w < VECTORS; w++)
            x[w] = (__m512bh)_mm512_loadu_si512(right + i * TILE + w * LANES);
        for (int j = 0; j < STEP; j++) {
            __m512bh y = (__m512bh)_mm512_set1_epi32(left[i * STEP + j]);
            for (int w = 0; w < VECTORS; w++) sums[j][w] = _mm512_dpbf16_ps(sums[j][w], y, x[w]);
        }
    }
}

/* Where the numbers of one head and the results between the products are. */
typedef struct {
    void *q;                /* the tile: [dim][TILE] float32, scaled, or [dim / 2][TILE] pairs */
    const void *k;          /* of a head: [keys / STEP][dim][STEP], or pairs of dims of bfloat16 */
    const void *v;          /* of each BLOCK: [dim / STEP][keys][STEP], or pairs of keys */
    float *scores;          /* [BLOCK][TILE], of bfloat16 not scaled */
    int32_t *pairs;         /* [BLOCK / 2][TILE] */
    float *out;             /* [dim][TILE] */
    float maximum[TILE];    /* of the scores of all blocks so far */
    float before[TILE];     /* and without this one */
    float sum[TILE];
} Room;

/* The sum and the output so far are brought down to the maximum with this block, which is returned.
   w: the first of LANES queries of the tile. scale: of the scores, times log2 e. */
INLINE F32 __m512 new_maximum(Room *room, int w, int64_t dim, __m512 scale)
{
    __m512 before = _mm512_loadu_ps(room->before + w), now = _mm512_loadu_ps(room->maximum + w);
    if (_mm512_cmp_ps_mask(now, before, _CMP_NEQ_UQ)) {
        __m512 factor = exp2_vector(_mm512_mul_ps(_mm512_sub_ps(before, now), scale), 0);
        _mm512_storeu_ps(room->sum + w, _mm512_mul_ps(_mm512_loadu_ps(room->sum + w), factor));
        for (int64_t d = 0; d < dim; d++) {
            float *out = room->out + d * TILE + w;
            _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_loadu_ps(out), factor));
        }
    }
    return now;
}

/* exp of how far a scaled score is from the largest. */
INLINE F32 __m512 probability(const float *score, __m512 maximum, __m512 scale, int half)
{
    __m512 away = _mm512_sub_ps(_mm512_loadu_ps(score), maximum);
    return exp2_vector(_mm512_mul_ps(away, scale), half);
}

INLINE F32 void add_to_sum(Room *room, int w, __m512 sum)
{
    _mm512_storeu_ps(room->sum + w, _mm512_add_ps(_mm512_loadu_ps(room->sum + w), sum));
}

/* Scores of one block, which are scaled, to probabilities, not yet divided by their sum. */
INLINE F32 void softmax_f32(Room *room, int64_t count, int64_t dim)
{
    __m512 scale = _mm512_set1_ps(1.0f);
    for (int w = 0; w < TILE; w += LANES) {
        __m512 maximum = new_maximum(room, w, dim, scale), sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < count; j++) {
            float *score = room->scores + j * TILE + w;
            __m512 p = probability(score, maximum, scale, 0);
            sum = _mm512_add_ps(sum, p);
            _mm512_storeu_ps(score, p);
        }
        add_to_sum(room, w, sum);
    }
}

/* The same, of scores not yet scaled, to pairs of bfloat16, of two keys each, the first one low. */
INLINE BF16 void softmax_bf16(Room *room, int64_t count, int64_t dim, __m512 scale)
{
    uint16_t order[2 * LANES];
    for (int i = 0; i < 2 * LANES; i++) order[i] = i / 2 + i % 2 * LANES;
    __m512i alternating = _mm512_loadu_si512(order);
    for (int w = 0; w < TILE; w += LANES) {
        __m512 maximum = new_maximum(room, w, dim, scale), sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < count; j += 2) {
            const float *score = room->scores + j * TILE + w;
            __m512 p = probability(score, maximum, scale, 1), next = _mm512_setzero_ps();
            if (j + 1 < count) next = probability(score + TILE, maximum, scale, 1);
            sum = _mm512_add_ps(sum, _mm512_add_ps(p, next));
            __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(next, p);
            _mm512_storeu_si512(room->pairs + j / 2 * TILE + w,
                                _mm512_permutexvar_epi16(alternating, pair));
        }
        add_to_sum(room, w, sum);
    }
}

INLINE F32 void clear_sums(__m512 sums[STEP][VECTORS])
{
    for (int j = 0; j < STEP; j++)
        for (int w = 0; w < VECTORS; w++) sums[j][w] = _mm512_setzero_ps();
}

INLINE F32 void store_sums(__m512 sums[STEP][VECTORS], float *to)
{
    for (int j = 0; j < STEP; j++)
        for (int w = 0; w < VECTORS; w++)
            _mm512_storeu_ps(to + j * TILE + w * LANES, sums[j][w]);
}

INLINE F32 void add_sums(__m512 sums[STEP][VECTORS], float *to)
{
    for (int j = 0; j < STEP; j++)
        for (int w = 0; w < VECTORS; w++)
            sums[j][w] = _mm512_add_ps(sums[j][w], _mm512_loadu_ps(to + j * TILE + w * LANES));
    store_sums(sums, to);
}

/* The largest so far, with the scores of STEP keys. */
INLINE F32 void raise_maximum(Room *room, __m512 sums[STEP][VECTORS])
{
    for (int w = 0; w < VECTORS; w++) {
        __m512 most = _mm512_loadu_ps(room->maximum + w * LANES);
        for (int j = 0; j < STEP; j++) most = _mm512_max_ps(most, sums[j][w]);
        _mm512_storeu_ps(room->maximum + w * LANES, most);
    }
}

/* Keys, and behind the last one room for a step. */
static int64_t padded(int64_t keys) { return (keys + STEP - 1) / STEP * STEP; }

/* All keys for one tile of queries. */
F32 static void tile_f32(const Call *call, Room *room)
{
    int64_t dim = call->dim;
    for (int64_t start = 0; start < call->keys; start += BLOCK) {
        int64_t count = call->keys - start < BLOCK ? call->keys - start : BLOCK;
        const float *k = (float *)room->k + start * dim, *v = (float *)room->v + start * dim;
        memcpy(room->before, room->maximum, sizeof room->before);
        for (int64_t j = 0; j < count; j += STEP) { /* behind the last key it is repeated */
            __m512 sums[STEP][VECTORS];
            float *scores = room->scores + j * TILE;
            for (int64_t d = 0; d < dim; d += BLOCK) { /* a sum of sums is more exact */
                int64_t dims = dim - d < BLOCK ? dim - d : BLOCK;
                clear_sums(sums);
                products_f32(sums, k + j * dim + d * STEP, (float *)room->q + d * TILE, dims);
                if (d) add_sums(sums, scores);
                else store_sums(sums, scores);
            }
            raise_maximum(room, sums);
        }
        softmax_f32(room, count, dim);
        for (int64_t d = 0; d < dim; d += STEP) {
            __m512 sums[STEP][VECTORS];
            clear_sums(sums);
            products_f32(sums, v + d * padded(count), room->scores, count);
            add_sums(sums, room->out + d * TILE);
        }
    }
}

BF16 static void tile_bf16(const Call *call, Room *room)
{
    int64_t dim = call->dim, half = dim / 2;
    __m512 scale = _mm512_set1_ps(call->scale * LOG2_E);
    for (int64_t start = 0; start < call->keys; start += BLOCK) {
        int64_t count = call->keys - start < BLOCK ? call->keys - start : BLOCK;
        const int32_t *k = (int32_t *)room->k + start * half;
        const int32_t *v = (int32_t *)room->v + start * half;
        memcpy(room->before, room->maximum, sizeof room->before);
        for (int64_t j = 0; j < count; j += STEP) {
            __m512 sums[STEP][VECTORS];
            clear_sums(sums);
            products_bf16(sums, k + j * half, room->q, half);
            store_sums(sums, room->scores + j * TILE);
            raise_maximum(room, sums);
        }
        softmax_bf16(room, count, dim, scale);
        for (int64_t d = 0; d < dim; d += STEP) {
            __m512 sums[STEP][VECTORS];
            clear_sums(sums);
            products_bf16(sums, v + d * padded(count) / 2, room->pairs, (count + 1) / 2);
            add_sums(sums, room->out + d * TILE);
        }
    }
}

/* Where the numbers of one of all heads begin. */
static char *head_of(const Call *call, const char *x, const int64_t *stride, int64_t head)
{
    int64_t number = head / call->heads * stride[0] + head % call->heads * stride[1];
    return (char *)x + number * (call->half ? 2 : 4);
}

/* `count` keys, STEP of them side by side; behind the last one it is repeated. */
static void pack_keys(const Call *call, const char *k, int64_t count, uint32_t *to)
{
    int64_t size = call->half ? 2 : 4, words = call->dim * size / 4;
    for (int64_t i = 0; i < count; i += STEP) {
        const char *from[STEP];
        for (int64_t j = i; j < i + STEP; j++)
            from[j - i] = k + (j < count ? j : count - 1) * call->k_stride[2] * size;
        for (int64_t d = 0; d < words; d++)
            for (int j = 0; j < STEP; j++) memcpy(to++, from[j] + 4 * d, 4);
    }
}

/* Their values, STEP dims side by side; a key without another to pair with has zeros there. */
static void pack_values(const Call *call, const char *v, int64_t count, uint32_t *to)
{
    int64_t step = call->v_stride[2], together = call->half ? 2 : 1; /* keys in a word */
    int64_t apart = padded(count) / together * STEP; /* words from STEP dims to the next */
    for (int64_t i = 0; i < count; i += together, v += 4 * step)
        for (int64_t d = 0; d < call->dim / STEP; d++) {
            uint32_t *word = to + d * apart + i / together * STEP;
            if (!call->half) {
                memcpy(word, v + d * STEP * 4, STEP * 4);
                continue;
            }
            uint16_t low[STEP], high[STEP] = {0};
            memcpy(low, v + d * STEP * 2, STEP * 2);
            if (i + 1 < count) memcpy(high, v + (step + d * STEP) * 2, STEP * 2);
            for (int j = 0; j < STEP; j++) word[j] = low[j] | (uint32_t)high[j] << 16;
        }
}

/* Bytes of k, and of v, of one head. */
static int64_t packed(const Call *call)
{
    return padded(call->keys) * call->dim * (call->half ? 2 : 4);
}

/* A block of keys and values of a head, from `start` on, to the memory of that head. */
static void pack_block(const Call *call, char *to, int64_t head, int64_t start)
{
    int64_t size = call->half ? 2 : 4;
    int64_t count = call->keys - start < BLOCK ? call->keys - start : BLOCK;
    const char *k = head_of(call, call->k, call->k_stride, head) + start * call->k_stride[2] * size;
    const char *v = head_of(call, call->v, call->v_stride, head) + start * call->v_stride[2] * size;
    to += start * call->dim * size;
    pack_keys(call, k, count, (uint32_t *)to);
    pack_values(call, v, count, (uint32_t *)(to + packed(call)));
}

/* q of `count` queries the other way round; behind the last one there are zeros. */
static void pack_tile(const Call *call, Room *room, const char *q, int64_t count)
{
    int64_t dim = call->dim, step = call->q_stride[2];
    float scale = call->scale * LOG2_E;
    memset(room->q, 0, dim * TILE * (call->half ? 2 : 4));
    for (int64_t i = 0; i < count; i++) {
        if (call->half)
            for (int64_t d = 0; d < dim / 2; d++)
                memcpy((int32_t *)room->q + d * TILE + i, (const int16_t *)q + i * step + 2 * d, 4);
        else
            for (int64_t d = 0; d < dim; d++)
                ((float *)room->q)[d * TILE + i] = ((const float *)q)[i * step + d] * scale;
    }
    memset(room->out, 0, dim * TILE * sizeof(float));
    for (int i = 0; i < TILE; i++) {
        room->maximum[i] = -FLT_MAX;
        room->sum[i] = 0;
    }
}

static void unpack_tile(const Call *call, const Room *room, char *out, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < call->dim; d++) {
            float y = room->out[d * TILE + i] / room->sum[i];
            int64_t place = i * call->out_stride[2] + d;
            if (!call->half) {
                ((float *)out)[place] = y;
                continue;
            }
            uint32_t bits;
            memcpy(&bits, &y, 4);
            bits = y == y ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
            ((uint16_t *)out)[place] = bits >> 16;
        }
}

/* `first` and the queries behind it, of a head whose k and v are at `there`. */
static void one_tile(const Call *call, Room *room, const char *there, int64_t head, int64_t first)
{
    int64_t size = call->half ? 2 : 4;
    int64_t count = call->queries - first < TILE ? call->queries - first : TILE;
    const char *q = head_of(call, call->q, call->q_stride, head);
    char *out = head_of(call, call->out, call->out_stride, head);
    room->k = there;
    room->v = there + packed(call);
    pack_tile(call, room, q + first * call->q_stride[2] * size, count);
    if (call->half) tile_bf16(call, room);
    else tile_f32(call, room);
    unpack_tile(call, room, out + first * call->out_stride[2] * size, count);
}

/* Memory of one thread, and the room in it; 0 without memory. Each part begins with a line of the
   cache. */
static Room *make_room(const Call *call)
{
    int64_t size = call->half ? 2 : 4, dim = call->dim;
    int64_t head = (sizeof(Room) + LINE - 1) / LINE * LINE;
    char *memory = aligned_alloc(LINE, head + dim * TILE * (size + 4) + BLOCK * TILE * 6);
    if (!memory) return 0;
    Room *room = (Room *)memory;
    room->q = memory + head;
    room->out = (float *)((char *)room->q + dim * TILE * size);
    room->scores = room->out + dim * TILE;
    room->pairs = (int32_t *)(room->scores + BLOCK * TILE);
    return room;
}

/* 0, or 1 without memory. numbers: rows, heads, queries, keys, dim (a multiple of STEP), bfloat16,
   threads, then the strides (row, head, token) of q, k, v, out, in elements.

   The threads are OpenMP's, which PyTorch's products have just used and which would otherwise wait
   for more of them on the processors that others need. So many heads are computed at a time as
   there are threads or as fit into TOGETHER, after their k and v were packed; who is done takes the
   next block or tile. */
int minisd_attention(const void *q, const void *k, const void *v, void *out, const int64_t *numbers,
                     float scale)
{
    Call call = {.q = q, .k = k, .v = v, .out = out};
    call.rows = numbers[0], call.heads = numbers[1], call.queries = numbers[2];
    call.keys = numbers[3], call.dim = numbers[4], call.half = numbers[5], call.scale = scale;
    memcpy(call.q_stride, numbers + 7, 12 * sizeof(int64_t)); /* the four lie one after the other */
    int64_t heads = call.rows * call.heads, tiles = (call.queries + TILE - 1) / TILE;
    int64_t blocks = (call.keys + BLOCK - 1) / BLOCK, size = 2 * packed(&call);
    int64_t threads = numbers[6] < heads * tiles ? numbers[6] : heads * tiles;
    int64_t together = TOGETHER / size < threads ? threads : TOGETHER / size;
    if (together > heads) together = heads;
    char *there = aligned_alloc(LINE, together * size);
    int failed = !there;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (there)
    {
        Room *room = make_room(&call);
        failed |= !room;
        for (int64_t head = 0; there && head < heads; head += together) {
            int64_t count = heads - head < together ? heads - head : together;
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < count * blocks; i++)
                pack_block(&call, there + i / blocks * size, head + i / blocks, i % blocks * BLOCK);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < count * tiles; i++) {
                const char *k_and_v = there + i / tiles * size;
                if (room) one_tile(&call, room, k_and_v, head + i / tiles, i % tiles * TILE);
            }
        }
        free(room);
    }
    free(there);
    return failed;
}

/* Whether this processor has the instructions for float32 (1) and bfloat16 too (2). */
int minisd_attention_level(void)
{
    __builtin_cpu_init();
    int f32 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw");
    return f32 ? 1 + !!__builtin_cpu_supports("avx512bf16") : 0;
}

#else /* another processor or compiler */
int minisd_attention(const void *q, const void *k, const void *v, void *out, const int64_t *numbers,
                     float scale)
{
    return 1;
}
int minisd_attention_level(void) { return 0; }
#endif
