/* Causal attention of packed rows, for training on a CPU: see core/packed_attention.py. A task is one head's keys and values of
   one sequence with the queries that share them. Its products are of values of type T with sums in fp32; where two values go into
   one sum at once (bf16), the right factor lies in pairs: [rows / 2, columns, 2]. */
#include "native_wide.c"

#include <stdlib.h>

#if !defined(BF16) || defined(__AVX512BF16__)
#ifdef BF16
#include <immintrin.h>
#define PAIR 2
typedef uint32_t __attribute__((may_alias)) unit; /* two values that are summed at once */
static inline unit unit_of(T first, T second) { return (unit)first | (unit)second << 16; }
#else
#define PAIR 1
typedef T unit;
static inline unit unit_of(T first, T second) { return (void)second, first; }
#endif
#ifdef __AVX512F__
#define ACROSS 4 /* vectors of a row at once */
#define NARROW 8 /* rows at once of one or two vectors */
#else
#define ACROSS 2
#define NARROW 4
#endif
#define MOST_ROWS 64 /* queries at once: positions times the heads that share keys */

typedef struct {
  const T *qkv;              /* [rows, q + 2 kv, size] */
  const int64_t *keys;       /* rows of the keys of all extents, by position */
  const int64_t *ends;       /* of extent e they are [ends[e], ends[e + 1]); the last own[e] are its queries too */
  const int64_t *own;
  long q, kv, size;
  float scaling;
} packed;

static inline long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

static void *room(long values, long bytes) { return aligned_alloc(64, (size_t)up_to(values * bytes, 64)); }

/* sums [rows][vectors] += a b; all but the pointers known when this is compiled */
static inline __attribute__((always_inline)) void block(const T *a, long lda, const T *b, long ldb, long k, int rows, int vectors,
                                                        lanes sums[NARROW][ACROSS]) {
  for (long i = 0; i < k; i += PAIR) {
#ifdef BF16
    __m512bh right[ACROSS];
    for (int v = 0; v < vectors; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + i * ldb + v * 32);
    for (int r = 0; r < rows; r++) {
      int32_t two;
      memcpy(&two, a + r * lda + i, sizeof two);
      __m512bh left = (__m512bh)_mm512_set1_epi32(two);
      for (int v = 0; v < vectors; v++) sums[r][v] = (lanes)_mm512_dpbf16_ps((__m512)sums[r][v], left, right[v]);
    }
#else
    lanes right[ACROSS];
    for (int v = 0; v < vectors; v++) right[v] = load_floats(b + i * ldb + v * LANES);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < vectors; v++) sums[r][v] += a[r * lda + i] * right[v];
#endif
  }
}

static inline __attribute__((always_inline)) void block_of_floats(const T *a, long lda, const T *b, long ldb, float *c, long ldc, long k,
                                                                  int rows, int vectors, int add) {
  lanes sums[NARROW][ACROSS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) sums[r][v] = add ? load_floats(c + r * ldc + v * LANES) : (lanes){0};
  block(a, lda, b, ldb, k, rows, vectors, sums);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) memcpy(c + r * ldc + v * LANES, &sums[r][v], sizeof(lanes));
}

#if defined(BF16) && defined(__AMX_BF16__)
static void by_tiles(const T *a, long lda, const T *b, long ldb, float *c, long ldc, long m, long n, long k, int add) {
  __asm__ volatile("" ::: "memory"); /* gcc does not know that loading a tile reads memory */
  for (long i = 0; i < m; i += 32)
    for (long j = 0; j < n; j += 32) {
      int lower = i + 16 < m, right = j + 16 < n;
      float *from = c + i * ldc + j;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (add) {
        _tile_loadd(0, from, ldc * 4);
        if (right) _tile_loadd(1, from + 16, ldc * 4);
        if (lower) _tile_loadd(2, from + 16 * ldc, ldc * 4);
        if (lower && right) _tile_loadd(3, from + 16 * ldc + 16, ldc * 4);
      }
      for (long p = 0; p < k; p += 32) {
        const T *left = a + i * lda + p, *top = b + p * ldb + j * 2;
        _tile_loadd(4, left, lda * 2);
        _tile_loadd(6, top, ldb * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (right) {
          _tile_loadd(7, top + 32, ldb * 4);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (lower) {
          _tile_loadd(5, left + 16 * lda, lda * 2);
          _tile_dpbf16ps(2, 5, 6);
          if (right) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, from, ldc * 4);
      if (right) _tile_stored(1, from + 16, ldc * 4);
      if (lower) _tile_stored(2, from + 16 * ldc, ldc * 4);
      if (lower && right) _tile_stored(3, from + 16 * ldc + 16, ldc * 4);
    }
}
#endif

static int tiles; /* whether this machine has them */
#define STEP (tiles ? 32 : 16) /* what numbers of keys and queries are filled up to */

/* c [m, n] = a [m, k] b [k, n], or added to c; m and n multiples of 16, k of 2 */
static void product(const T *a, long lda, const T *b, long ldb, float *c, long ldc, long m, long n, long k, int add) {
#if defined(BF16) && defined(__AMX_BF16__)
  if (tiles && k % 32 == 0) {
    by_tiles(a, lda, b, ldb, c, ldc, m, n, k, add);
    return;
  }
#endif
  for (long j = 0; j < n; j += ACROSS * LANES) {
    long vectors = (n - j) / LANES < ACROSS ? (n - j) / LANES : ACROSS, rows = vectors > 2 ? 4 : NARROW;
    for (long i = 0; i < m; i += rows) {
      const T *left = a + i * lda, *right = b + j * PAIR;
      float *to = c + i * ldc + j;
      if (vectors == 1)
        block_of_floats(left, lda, right, ldb, to, ldc, k, NARROW, 1, add);
      else if (vectors == 2)
        block_of_floats(left, lda, right, ldb, to, ldc, k, NARROW, 2, add);
#if ACROSS > 2
      else if (vectors == 3)
        block_of_floats(left, lda, right, ldb, to, ldc, k, 4, 3, add);
      else
        block_of_floats(left, lda, right, ldb, to, ldc, k, 4, 4, add);
#endif
    }
  }
}

/* rows [n, size], `count` of them real, as the right factor of a product over `size`: [size / PAIR, n, PAIR] */
static void as_columns(const T *rows, T *to, long count, long n, long size) {
  const unit *from = (const unit *)rows;
  unit *out = (unit *)to;
  long width = size / PAIR;
  for (long j = 0; j < n; j += 16)
    for (long d = 0; d < width; d++)
      for (long i = j; i < j + 16; i++) out[d * n + i] = i < count ? from[i * width + d] : 0;
}

/* rows [n, size] as the right factor of a product over rows: [n / PAIR, size, PAIR]; n is even */
static void as_rows(const T *rows, T *to, long n, long size) {
#ifdef BF16
  for (long j = 0; j < n; j += 2) {
    const T *even = rows + j * size, *odd = even + size;
    unit *out = (unit *)(to + j * size);
    #pragma omp simd
    for (long d = 0; d < size; d++) out[d] = unit_of(even[d], odd[d]);
  }
#else
  memcpy(to, rows, (size_t)(n * size) * sizeof(T));
#endif
}

/* One head of an extent's keys or values, [n, size], zeros behind them. */
static void gathered(const packed *p, long extent, long head, T *to, long n) {
  long first = p->ends[extent], count = p->ends[extent + 1] - first, stride = (p->q + 2 * p->kv) * p->size;
  for (long j = 0; j < count; j++) memcpy(to + j * p->size, p->qkv + p->keys[first + j] * stride + head * p->size, (size_t)p->size * sizeof(T));
  memset(to + count * p->size, 0, (size_t)((n - count) * p->size) * sizeof(T));
}

/* `count` rows of [rows, heads, size], of each the heads that share keys; zeros up to `padded`. */
static void queries_of(const T *from, const int64_t *rows, long count, long heads, long first_head, long group, long size, long padded,
                       T *to) {
  for (long i = 0; i < count; i++)
    memcpy(to + i * group * size, from + (rows[i] * heads + first_head) * size, (size_t)(group * size) * sizeof(T));
  memset(to + count * group * size, 0, (size_t)((padded - count * group) * size) * sizeof(T));
}

static void attend_one(const packed *p, long extent, long head, T *out, float *kept) {
  const long size = p->size, group = p->q / p->kv, first = p->ends[extent], own = p->own[extent];
  const long count = p->ends[extent + 1] - first, before = count - own, n = up_to(count, STEP);
  const long positions = MOST_ROWS / group ? MOST_ROWS / group : 1, most = up_to(positions * group, 16);
  T *rows = room(n * size, sizeof(T)), *k = room(n * size, sizeof(T)), *v = room(n * size, sizeof(T));
  T *q = room(most * size, sizeof(T)), *weights = room(most * n, sizeof(T));
  float *scores = room(most * n, 4), *o = room(most * size, 4);
  gathered(p, extent, p->q + head, rows, n);
  as_columns(rows, k, count, n, size);
  gathered(p, extent, p->q + p->kv + head, rows, n);
  as_rows(rows, v, n, size);
  for (long at = 0; at < own; at += positions) {
    const int64_t *mine = p->keys + first + before + at;
    long taken = own - at < positions ? own - at : positions, m = taken * group, padded = up_to(m, 16);
    long seen = up_to(before + at + taken, STEP);
    queries_of(p->qkv, mine, taken, p->q + 2 * p->kv, head * group, group, size, padded, q);
    product(q, size, k, n, scores, n, padded, seen, size, 0);
    for (long r = 0; r < m; r++) {
      float *row = scores + r * n, largest = -3.0e38f, sum = 0.0f;
      T *to = weights + r * n;
      long high = before + at + r / group + 1;
      for (long j = high; j < seen; j++) row[j] = -3.0e38f;
      #pragma omp simd reduction(max : largest)
      for (long j = 0; j < seen; j++) largest = row[j] > largest ? row[j] : largest;
      for (long j = 0; j < seen; j++) {
        float weight = exponential(p->scaling * (row[j] - largest));
        row[j] = weight = j < high ? weight : 0.0f;
        sum += weight;
      }
      #pragma omp simd
      for (long j = 0; j < seen; j++) to[j] = store(row[j]);
      float *keep = kept + (mine[r / group] * p->q + head * group + r % group) * 2;
      keep[0] = largest;
      keep[1] = 1.0f / sum;
    }
    memset(weights + m * n, 0, (size_t)((padded - m) * n) * sizeof(T));
    product(weights, n, v, size, o, size, padded, size, seen, 0);
    for (long r = 0; r < m; r++) {
      long place = mine[r / group] * p->q + head * group + r % group;
      float share = kept[place * 2 + 1];
      T *to = out + place * size;
      #pragma omp simd
      for (long d = 0; d < size; d++) to[d] = store(o[r * size + d] * share);
    }
  }
  free(rows), free(k), free(v), free(q), free(weights), free(scores), free(o);
}

/* d_parts: what the keys and values before an extent's own rows get, [keys before own rows, of all extents, 2 kv, size]. Rows of
   the batch's queries are columns here: scores and weights lie as [keys, queries]. */
static void attend_one_backward(const packed *p, long extent, long head, const float *kept, const T *d_out, T *d_qkv, const int64_t *parts,
                                float *d_parts) {
  const long size = p->size, group = p->q / p->kv, first = p->ends[extent], own = p->own[extent], total = p->q + 2 * p->kv;
  const long count = p->ends[extent + 1] - first, before = count - own, n = up_to(count, STEP);
  const long positions = MOST_ROWS / group ? MOST_ROWS / group : 1, most = up_to(positions * group, STEP);
  T *k = room(n * size, sizeof(T)), *v = room(n * size, sizeof(T)), *k_columns = room(n * size, sizeof(T));
  T *q = room(most * size, sizeof(T)), *d = room(most * size, sizeof(T)), *packed_q = room(most * size, sizeof(T));
  T *packed_d = room(most * size, sizeof(T)), *weights = room(most * n, sizeof(T)), *d_scores = room(most * n, sizeof(T));
  T *d_pairs = room(most * n, sizeof(T));
  float *scores = room(most * n, 4), *d_weights = room(most * n, 4), *dq = room(most * size, 4);
  float *dk = room(n * size, 4), *dv = room(n * size, 4);
  float largest[most], share[most], along[most];
  int32_t high[most];
  gathered(p, extent, p->q + head, k, n);
  gathered(p, extent, p->q + p->kv + head, v, n);
  for (long j = 0; j < n; j++)
    for (long i = 0; i < size; i++) k_columns[i * n + j] = k[j * size + i];
  memset(dk, 0, (size_t)(n * size) * 4);
  memset(dv, 0, (size_t)(n * size) * 4);
  for (long at = 0; at < own; at += positions) {
    const int64_t *mine = p->keys + first + before + at;
    long taken = own - at < positions ? own - at : positions, m = taken * group, padded = up_to(m, STEP);
    long seen = up_to(before + at + taken, STEP);
    queries_of(p->qkv, mine, taken, total, head * group, group, size, padded, q);
    queries_of(d_out, mine, taken, p->q, head * group, group, size, padded, d);
    for (long r = 0; r < padded; r++) {
      const float *keep = kept + (mine[r < m ? r / group : 0] * p->q + head * group + (r < m ? r % group : 0)) * 2;
      largest[r] = r < m ? keep[0] : 0.0f;
      share[r] = r < m ? keep[1] : 0.0f;
      high[r] = r < m ? (int32_t)(before + at + r / group + 1) : 0;
      along[r] = 0.0f;
    }
    as_columns(q, packed_q, m, padded, size);
    product(k, size, packed_q, padded, scores, padded, seen, padded, size, 0);
    as_columns(d, packed_d, m, padded, size);
    product(v, size, packed_d, padded, d_weights, padded, seen, padded, size, 0);
    for (long j = 0; j < seen; j++) {
      float *row = scores + j * padded, *d_row = d_weights + j * padded;
      #pragma omp simd
      for (long r = 0; r < padded; r++) {
        float weight = exponential(p->scaling * (row[r] - largest[r])) * share[r];
        row[r] = weight = j < high[r] ? weight : 0.0f;
        along[r] += weight * d_row[r];
      }
    }
    for (long j = 0; j < seen; j += PAIR) {
      const float *row = scores + j * padded, *d_row = d_weights + j * padded;
      T *w = weights + j * padded, *s = d_scores + j * padded;
#ifdef BF16
      unit *both = (unit *)(d_pairs + j * padded);
      #pragma omp simd
      for (long r = 0; r < padded; r++) {
        T even = store(row[r] * (d_row[r] - along[r])), odd = store(row[r + padded] * (d_row[r + padded] - along[r]));
        w[r] = store(row[r]);
        w[r + padded] = store(row[r + padded]);
        s[r] = even;
        s[r + padded] = odd;
        both[r] = unit_of(even, odd);
      }
#else
      #pragma omp simd
      for (long r = 0; r < padded; r++) {
        w[r] = row[r];
        s[r] = row[r] * (d_row[r] - along[r]);
      }
#endif
    }
    as_rows(q, packed_q, padded, size);
    product(d_scores, padded, packed_q, size, dk, size, seen, size, padded, 1);
    as_rows(d, packed_d, padded, size);
    product(weights, padded, packed_d, size, dv, size, seen, size, padded, 1);
    product(k_columns, n, PAIR == 2 ? d_pairs : d_scores, padded, dq, padded, size, padded, seen, 0);
    for (long r = 0; r < m; r++) {
      T *to = d_qkv + (mine[r / group] * total + head * group + r % group) * size;
      for (long i = 0; i < size; i++) to[i] = store(p->scaling * dq[i * padded + r]);
    }
  }
  for (long j = 0; j < count; j++) {
    T *to_k = d_qkv + (p->keys[first + j] * total + p->q + head) * size, *to_v = to_k + p->kv * size;
    float *part_k = j < before ? d_parts + ((parts[extent] + j) * 2 * p->kv + head) * size : 0, *part_v = part_k + p->kv * size;
    for (long i = 0; i < size; i++)
      if (part_k)
        part_k[i] = p->scaling * dk[j * size + i], part_v[i] = dv[j * size + i];
      else
        to_k[i] = store(p->scaling * dk[j * size + i]), to_v[i] = store(dv[j * size + i]);
  }
  free(k), free(v), free(k_columns), free(q), free(d), free(packed_q), free(packed_d), free(weights), free(d_scores), free(d_pairs);
  free(scores), free(d_weights), free(dq), free(dk), free(dv);
}

#if defined(BF16) && defined(__AMX_BF16__)
#define BEGIN_TILES \
  char before_us[64]; \
  if (tiles) begin_tiles(before_us);
#define END_TILES \
  if (tiles) _tile_loadconfig(before_us);
#else
#define BEGIN_TILES
#define END_TILES
#endif

/* Values [rows, q, size] into `out`; into `kept` [rows, q, 2] each query's largest score and what makes its weights sum to 1.
   `order`: extents, those that take longest first. */
void packed_attention(const T *qkv, const int64_t *keys, const int64_t *ends, const int64_t *own, const int64_t *order, long extents,
                      long q, long kv, long size, float scaling, T *out, float *kept) {
  packed p = {qkv, keys, ends, own, q, kv, size, scaling};
  tiles = wide_rows() > 0;
  #pragma omp parallel
  {
    BEGIN_TILES
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < extents * kv; i++) attend_one(&p, order[i / kv], i % kv, out, kept);
    END_TILES
  }
}

/* The gradient of the above for d_out. Rows that serve several extents: row shared[i] gets d_parts[places[j]] for all j of
   [shared_ends[i], shared_ends[i + 1]). */
void packed_attention_backward(const T *qkv, const int64_t *keys, const int64_t *ends, const int64_t *own, const int64_t *order,
                               long extents, long q, long kv, long size, float scaling, const float *kept, const T *d_out, T *d_qkv,
                               const int64_t *parts, float *d_parts, const int64_t *shared, const int64_t *shared_ends,
                               const int64_t *places, long num_shared) {
  packed p = {qkv, keys, ends, own, q, kv, size, scaling};
  tiles = wide_rows() > 0;
  #pragma omp parallel
  {
    BEGIN_TILES
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < extents * kv; i++) attend_one_backward(&p, order[i / kv], i % kv, kept, d_out, d_qkv, parts, d_parts);
    END_TILES
    #pragma omp for schedule(static)
    for (long i = 0; i < num_shared; i++) {
      long width = 2 * kv * size;
      T *to = d_qkv + (shared[i] * (q + 2 * kv) + q) * size;
      float sums[width];
      for (long d = 0; d < width; d++) sums[d] = load(to[d]);
      for (long j = shared_ends[i]; j < shared_ends[i + 1]; j++)
        for (long d = 0; d < width; d++) sums[d] += d_parts[places[j] * width + d];
      for (long d = 0; d < width; d++) to[d] = store(sums[d]);
    }
  }
}

int packs(void) { return 1; }
#else
int packs(void) { return 0; }
#endif
