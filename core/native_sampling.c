/* Sampling on a CPU: attention of new rows over cached keys, and whole decode steps of few rows. Compiled like native.c, whose
   loads, stores and exponential it uses: values of type T, sums in fp32, rounded where the training pass rounds. */
#include "native.c"

#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define ROWS 4     /* of a weight matrix at once */
#define COLUMNS 4  /* rows of x at once */
#define KEYS 256   /* keys whose scores are held at once */
#define QUERIES 4  /* heads that share keys at once */

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

/* What attention needs to know of a layer's cache: k [slots, kv, size, room + padding], v [slots, kv, room, size]. */
typedef struct {
  T *k, *v;
  long k_room, v_room, q_heads, kv_heads, size;
  float scaling;
} cache;

/* scores[g][key] = scaling * q_g . k_key for `count` keys from `first` on; q [QUERIES][size] */
static inline __attribute__((always_inline)) void score(const T *k, long room, const float *q, int queries, long size, float scaling,
                                                        long first, long count, float scores[QUERIES][KEYS]) {
  for (long at = 0; at < count; at += LANES) { /* the room is a multiple of LANES, with padding behind */
    lanes sums[QUERIES];
    for (int g = 0; g < queries; g++) sums[g] = (lanes){0};
    for (long d = 0; d < size; d++) {
      lanes key = load_lanes(k + d * room + first + at);
      for (int g = 0; g < queries; g++) sums[g] += key * q[g * size + d];
    }
    for (int g = 0; g < queries; g++) {
      lanes scaled = sums[g] * scaling;
      memcpy(&scores[g][at], &scaled, sizeof scaled);
    }
  }
}

/* out_g += sum over keys of weights[g][key] * v_key */
static inline __attribute__((always_inline)) void mix(const T *v, long size, float weights[QUERIES][KEYS], int queries, long count,
                                                      float *out) {
  for (long d = 0; d < size; d += LANES) {
    lanes sums[QUERIES];
    for (int g = 0; g < queries; g++) sums[g] = load_floats(out + g * size + d);
    for (long key = 0; key < count; key++) {
      lanes value = load_lanes(v + key * size + d);
      for (int g = 0; g < queries; g++) sums[g] += value * weights[g][key];
    }
    for (int g = 0; g < queries; g++) memcpy(out + g * size + d, &sums[g], sizeof sums[g]);
  }
}

/* `queries` heads of one row over `num_keys` keys of one head, softmax kept up block by block */
static inline __attribute__((always_inline)) void attend_heads(const T *k, const T *v, const cache *c, const float *q, int queries,
                                                               long num_keys, T *out) {
  float scores[QUERIES][KEYS], sums[QUERIES] = {0}, largest[QUERIES];
  float mixed[QUERIES * c->size];
  memset(mixed, 0, sizeof mixed);
  for (int g = 0; g < QUERIES; g++) largest[g] = -3.0e38f;
  for (long first = 0; first < num_keys; first += KEYS) {
    long count = num_keys - first < KEYS ? num_keys - first : KEYS;
    score(k, c->k_room, q, queries, c->size, c->scaling, first, count, scores);
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
    mix(v + first * c->size, c->size, scores, queries, count, mixed);
  }
  for (int g = 0; g < queries; g++)
    for (long d = 0; d < c->size; d++) out[g * c->size + d] = store(mixed[g * c->size + d] / sums[g]);
}

/* The query heads of one row that share key head h look at all keys up to `position`. qkv is [q, k, v heads][size] of the row,
   out [q heads][size]. */
static void attend_row(const cache *c, const T *qkv, long slot, long position, long h, T *out) {
  long size = c->size, group = c->q_heads / c->kv_heads, head = slot * c->kv_heads + h;
  const T *k = c->k + head * size * c->k_room, *v = c->v + head * c->v_room * size;
  for (long g = 0; g < group; g += QUERIES) {
    const T *given = qkv + (h * group + g) * size;
    T *to = out + (h * group + g) * size;
    int queries = group - g < QUERIES ? (int)(group - g) : QUERIES;
    float q[QUERIES * size];
    for (long i = 0; i < queries * size; i++) q[i] = load(given[i]);
    if (queries == 4) attend_heads(k, v, c, q, 4, position + 1, to);
    else if (queries == 3) attend_heads(k, v, c, q, 3, position + 1, to);
    else if (queries == 2) attend_heads(k, v, c, q, 2, position + 1, to);
    else attend_heads(k, v, c, q, 1, position + 1, to);
  }
}

/* The row's key and value of head h go into its slot. */
static void keep_row(const cache *c, const T *qkv, long slot, long position, long h) {
  long size = c->size, head = slot * c->kv_heads + h;
  T *k = c->k + head * size * c->k_room, *v = c->v + head * c->v_room * size;
  const T *new_k = qkv + (c->q_heads + h) * size, *new_v = new_k + c->kv_heads * size;
  for (long d = 0; d < size; d++) k[d * c->k_room + position] = new_k[d];
  memcpy(v + position * size, new_v, size * sizeof(T));
}

/* Rows `rows` of qkv [T, heads, size] and of out [T, q heads, size], whose sequences lie in `slots` and are at `positions`: their
   keys and values are kept, then they look at their past. */
void cached_attention(const T *qkv, T *out, const int64_t *rows, const int64_t *slots, const int64_t *positions, T *k, T *v,
                      float scaling, long n, long k_room, long v_room, long q_heads, long kv_heads, long size) {
  cache c = {k, v, k_room, v_room, q_heads, kv_heads, size, scaling};
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
