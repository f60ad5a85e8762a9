/* Sampling on a CPU: attention of new rows over cached keys, and products of few rows, which read each weight once. Values of
   type T as in native.c, sums in fp32. */
#include "native.c"

#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define ROWS 4     /* of a weight matrix at once */
#define COLUMNS 4  /* rows of x at once */
#define FEW 16     /* rows of a step at most */
#define KEYS 256   /* keys whose scores are held at once */
#define BLOCK 16   /* keys that lie together, feature by feature */
#define QUERIES 4  /* heads that share keys at once */
#define WIDTH (LANES / 4)                           /* lanes of each of them at once: what registers hold */
#define FETCHED ((LANES * (int)sizeof(T) + 31) / 32) /* lines of two features of LANES keys */

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t lane_bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_bits __attribute__((vector_size(2 * LANES)));

static inline __attribute__((always_inline)) lanes load_lanes(const T *p) {
#ifdef BF16
  half_bits given;
  memcpy(&given, p, sizeof given);
  return (lanes)(__builtin_convertvector(given, lane_bits) << 16);
#else
  lanes given;
  memcpy(&given, p, sizeof given);
  return given;
#endif
}

static inline __attribute__((always_inline)) lanes load_floats(const float *p) {
  lanes given;
  memcpy(&given, p, sizeof given);
  return given;
}

static inline __attribute__((always_inline)) float sum_of(lanes x) {
  float sum = 0.0f;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

/* What attention needs to know of a layer's cache: k [slots, kv, room / BLOCK, size, BLOCK], v [slots, kv, room, size]. */
typedef struct {
  T *k, *v;
  long room, q_heads, kv_heads, size;
  float scaling;
} cache;

/* scores[g][key] = scaling * q_g . k_key for `count` keys from a block's first on; q [QUERIES][size]. Meanwhile `ahead`, as many
   values, is fetched: what comes next lies too far apart for the processor to see. */
static inline __attribute__((always_inline)) void score(const T *k, const float *q, int queries, long size, float scaling, long count,
                                                        const T *ahead, float scores[QUERIES][KEYS]) {
  for (long at = 0; at < count; at += LANES) { /* the room is a multiple of LANES */
    const T *block = k + at / BLOCK * BLOCK * size + at % BLOCK;
    lanes even[QUERIES], odd[QUERIES];
    for (int g = 0; g < queries; g++) even[g] = odd[g] = (lanes){0};
    for (long d = 0; d < size; d += 2) {
      lanes first = load_lanes(block + d * BLOCK), second = load_lanes(block + d * BLOCK + BLOCK);
      for (int g = 0; g < queries; g++) {
        even[g] += first * q[g * size + d];
        odd[g] += second * q[g * size + d + 1];
      }
      for (int line = 0; line < FETCHED; line++) __builtin_prefetch(ahead + at * size + d * LANES + line * LANES);
    }
    for (int g = 0; g < queries; g++) {
      lanes scaled = (even[g] + odd[g]) * scaling;
      memcpy(&scores[g][at], &scaled, sizeof scaled);
    }
  }
}

/* out_g += sum over keys of weights[g][key] * v_key, for `width` lanes of every g */
static inline __attribute__((always_inline)) void mix_lanes(const T *v, long size, float weights[QUERIES][KEYS], int queries,
                                                            long count, int width, const T *ahead, float *out) {
  lanes sums[WIDTH][QUERIES];
  for (int j = 0; j < width; j++)
    for (int g = 0; g < queries; g++) sums[j][g] = load_floats(out + g * size + j * LANES);
  for (long key = 0; key < count; key++) {
    for (int j = 0; j < width; j++) {
      lanes value = load_lanes(v + key * size + j * LANES);
      for (int g = 0; g < queries; g++) sums[j][g] += value * weights[g][key];
      __builtin_prefetch(ahead + key * size + j * LANES);
    }
  }
  for (int j = 0; j < width; j++)
    for (int g = 0; g < queries; g++) memcpy(out + g * size + j * LANES, &sums[j][g], sizeof sums[j][g]);
}

static inline __attribute__((always_inline)) void mix(const T *v, long size, float weights[QUERIES][KEYS], int queries, long count,
                                                      const T *ahead, float *out) {
  long d = 0;
  for (; d + WIDTH * LANES <= size; d += WIDTH * LANES) mix_lanes(v + d, size, weights, queries, count, WIDTH, ahead + d, out + d);
  for (; d + LANES <= size; d += LANES) mix_lanes(v + d, size, weights, queries, count, 1, ahead + d, out + d);
  for (; d < size; d++)
    for (int g = 0; g < queries; g++)
      for (long key = 0; key < count; key++) out[g * size + d] += load(v[key * size + d]) * weights[g][key];
}

/* `queries` heads of one row over `num_keys` keys of one head, softmax kept up block by block */
static inline __attribute__((always_inline)) void attend_heads(const T *k, const T *v, const cache *c, const float *q, int queries,
                                                               long num_keys, const T *next, T *out) {
  float scores[QUERIES][KEYS], sums[QUERIES] = {0}, largest[QUERIES];
  float mixed[QUERIES * c->size];
  memset(mixed, 0, sizeof mixed);
  for (int g = 0; g < QUERIES; g++) largest[g] = -3.0e38f;
  for (long first = 0; first < num_keys; first += KEYS) {
    long count = num_keys - first < KEYS ? num_keys - first : KEYS;
    score(k + first * c->size, q, queries, c->size, c->scaling, count, v + first * c->size, scores);
    for (int g = 0; g < queries; g++) {
      float most = largest[g], sum = 0.0f;
      for (long i = 0; i < count; i++) most = scores[g][i] > most ? scores[g][i] : most;
      float kept = exponential(largest[g] - most);
      for (long i = 0; i < count; i++) {
        scores[g][i] = exponential(scores[g][i] - most);
        sum += scores[g][i];
      }
      if (first) for (long d = 0; d < c->size; d++) mixed[g * c->size + d] *= kept;
      sums[g] = sums[g] * kept + sum;
      largest[g] = most;
    }
    mix(v + first * c->size, c->size, scores, queries, count, next + first * c->size, mixed);
  }
  for (int g = 0; g < queries; g++)
    for (long d = 0; d < c->size; d++) out[g * c->size + d] = store(mixed[g * c->size + d] / sums[g]);
}

/* The query heads of one row that share key head h look at all keys up to `position`. qkv is [q, k, v heads][size] of the row,
   out [q heads][size]. The keys that come next are probably those of head h + 1. */
static void attend_row(const cache *c, const T *qkv, long slot, long position, long h, T *out) {
  long size = c->size, group = c->q_heads / c->kv_heads, head = slot * c->kv_heads + h;
  const T *k = c->k + head * size * c->room, *v = c->v + head * c->room * size, *next = k + size * c->room;
  for (long g = 0; g < group; g += QUERIES) {
    const T *given = qkv + (h * group + g) * size;
    T *to = out + (h * group + g) * size;
    int queries = group - g < QUERIES ? (int)(group - g) : QUERIES;
    float q[QUERIES * size];
    for (long i = 0; i < queries * size; i++) q[i] = load(given[i]);
    if (queries == 4) attend_heads(k, v, c, q, 4, position + 1, next, to);
    else if (queries == 3) attend_heads(k, v, c, q, 3, position + 1, next, to);
    else if (queries == 2) attend_heads(k, v, c, q, 2, position + 1, next, to);
    else attend_heads(k, v, c, q, 1, position + 1, next, to);
  }
}

/* The row's key and value of head h go into its slot. */
static void keep_row(const cache *c, const T *qkv, long slot, long position, long h) {
  long size = c->size, head = slot * c->kv_heads + h;
  T *k = c->k + head * size * c->room, *v = c->v + head * c->room * size;
  const T *new_k = qkv + (c->q_heads + h) * size, *new_v = new_k + c->kv_heads * size;
  for (long d = 0; d < size; d++) k[(position / BLOCK * size + d) * BLOCK + position % BLOCK] = new_k[d];
  memcpy(v + position * size, new_v, size * sizeof(T));
}

/* Rows `rows` of qkv [T, heads, size] and of out [T, q heads, size], whose sequences lie in `slots` and are at `positions`: their
   keys and values are kept, then they look at their past. */
void cached_attention(const T *qkv, T *out, const int64_t *rows, const int64_t *slots, const int64_t *positions, T *k, T *v,
                      float scaling, long n, long room, long q_heads, long kv_heads, long size) {
  cache c = {k, v, room, q_heads, kv_heads, size, scaling};
  #pragma omp parallel if (n > 1)
  {
    #pragma omp for schedule(static)
    for (long i = 0; i < n; i++)
      for (long h = 0; h < kv_heads; h++)
        keep_row(&c, qkv + rows[i] * (q_heads + 2 * kv_heads) * size, slots[i], positions[i], h);
    #pragma omp for schedule(dynamic, 4)
    for (long i = 0; i < n * kv_heads; i++) {
      long at = i / kv_heads, row = rows[at];
      attend_row(&c, qkv + row * (q_heads + 2 * kv_heads) * size, slots[at], positions[at], i % kv_heads, out + row * q_heads * size);
    }
  }
}

/* sums[i][j] = w_i . x_j of ROWS rows w, `columns` rows x */
static inline __attribute__((always_inline)) void dots(const T *w[ROWS], const float *x, long d, int columns,
                                                       float sums[ROWS][FEW]) {
  lanes parts[ROWS][COLUMNS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < columns; j++) parts[i][j] = (lanes){0};
  long whole = d / LANES * LANES;
  for (long at = 0; at < whole; at += LANES) {
    lanes of_x[COLUMNS];
    for (int j = 0; j < columns; j++) of_x[j] = load_floats(x + j * d + at);
    for (int i = 0; i < ROWS; i++) {
      lanes of_w = load_lanes(w[i] + at);
      for (int j = 0; j < columns; j++) parts[i][j] += of_w * of_x[j];
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < columns; j++) {
      sums[i][j] = sum_of(parts[i][j]);
      for (long at = whole; at < d; at++) sums[i][j] += load(w[i][at]) * x[j * d + at];
    }
}

/* sums[i][t] = w_i . x_t of ROWS rows w, all n rows x [n, d] */
static void row_products(const T *w[ROWS], const float *x, long d, long n, float sums[ROWS][FEW]) {
  for (long t = 0; t < n; t += COLUMNS) {
    float(*to)[FEW] = (float(*)[FEW]) & sums[0][t];
    if (n - t >= 4) dots(w, x + t * d, d, 4, to);
    else if (n - t == 3) dots(w, x + t * d, d, 3, to);
    else if (n - t == 2) dots(w, x + t * d, d, 2, to);
    else dots(w, x + t * d, d, 1, to);
  }
}

/* ROWS output rows from o on, of a matrix [d_out, d_in]; past its end the last one again */
static void matrix_rows(const T *w, long d_in, long d_out, long o, const T *rows[ROWS]) {
  for (int i = 0; i < ROWS; i++) rows[i] = w + (o + i < d_out ? o + i : d_out - 1) * d_in;
}

/* y [vocabulary, n] = w h^T - shift, rounded once; few rows h [n, d] */
void few_logits(const T *w, const float *h, const float *shift, T *y, long n, long d, long vocabulary) {
  #pragma omp parallel for schedule(static)
  for (long o = 0; o < vocabulary; o += ROWS) {
    const T *rows[ROWS];
    float sums[ROWS][FEW];
    matrix_rows(w, d, vocabulary, o, rows);
    row_products(rows, h, d, n, sums);
    for (long at = o; at < o + ROWS && at < vocabulary; at++)
      for (long t = 0; t < n; t++) y[at * n + t] = store(sums[at - o][t] - shift[t]);
  }
}
