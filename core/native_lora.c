/* What the adapters of a micro-batch's rows add to a site's output, and the gradients of that: all adapters of a site in one call,
   each at its own rank. See core/native_lora.py. Ranks are filled up with zeros to what products take. */
#include "native_attention.c"

#if !defined(BF16) || defined(__AVX512BF16__)
#define STRIP 64 /* columns at once */
#define CHUNK 256 /* rows of a sum over rows that lie in pairs at once */
#define AT_ONCE 32 /* rows of x at once */

typedef struct {
  int64_t start, end, rank;   /* rows of x; start and end are multiples of 16 */
  const T *a, *b[3];          /* [d_in, matrices, rank], each [d_out of the matrix, rank] */
  T *u, *du;                  /* [rows, matrices, padded rank]: scaled x A and scaled dy B */
  T *grad_a, *grad_b[3];      /* as a and b; null: not wanted */
} of_rows;

typedef struct {
  const of_rows *parts;
  const float *scales;
  long count, matrices, d_in;
  const int64_t *outs; /* [matrices + 1] columns of the output */
} lora_site;

static inline long d_out_of(const lora_site *s) { return s->outs[s->matrices]; }

static inline long width_of(const lora_site *s, long part) { return s->matrices * up_to(s->parts[part].rank, STEP); }

/* The part and the first row of it of the i-th block of rows; how many there are in all for i < 0. */
static long block_of(const lora_site *s, long i, long *part, long *row) {
  long before = 0;
  for (long p = 0; p < s->count; p++) {
    long blocks = (s->parts[p].end - s->parts[p].start + AT_ONCE - 1) / AT_ONCE;
    if (i >= 0 && i < before + blocks) {
      *part = p;
      *row = (i - before) * AT_ONCE;
      return 0;
    }
    before += blocks;
  }
  return before;
}

/* Where the packed factors of a part begin, in values; in all for part == count. */
static long place_of(const lora_site *s, long part) {
  long before = 0;
  for (long p = 0; p < part; p++) before += s->d_in * width_of(s, p) + d_out_of(s) * up_to(s->parts[p].rank, STEP);
  return before;
}

static inline T *b_place(const lora_site *s, long part, T *packs, long matrix) {
  return packs + place_of(s, part) + s->d_in * width_of(s, part) + s->outs[matrix] * up_to(s->parts[part].rank, STEP);
}

/* One factor as the right one of a product: number 0 is A, i + 1 the i-th B. A goes in with x (over d_in) or, `back`, with du;
   a B with u (over ranks) or, `back`, with dy (over d_out). */
static void pack(const lora_site *s, long part, long number, int back, T *packs) {
  const of_rows *p = s->parts + part;
  long rank = p->rank, padded = up_to(rank, STEP), matrices = number ? 1 : s->matrices, stride = matrices * rank;
  long rows = number ? s->outs[number] - s->outs[number - 1] : s->d_in, width = matrices * padded;
  T *to = number ? b_place(s, part, packs, number - 1) : packs + place_of(s, part);
  for (long m = 0; m < matrices; m++) {
    const T *from = (number ? p->b[number - 1] : p->a) + m * rank;
    if (number ? back : !back) { /* [rows / PAIR, width, PAIR] */
      for (long i = 0; i < rows; i += PAIR) {
        unit *out = (unit *)(to + i * width + m * padded * PAIR);
        const T *even = from + i * stride, *odd = even + stride;
        #pragma omp simd
        for (long r = 0; r < rank; r++) out[r] = unit_of(even[r], odd[r]);
        memset(out + rank, 0, (size_t)(padded - rank) * sizeof(unit));
      }
      continue;
    }
    for (long r = 0; r < padded; r += PAIR) { /* [width / PAIR, rows, PAIR] */
      unit *out = (unit *)(to + (m * padded + r) * rows);
      if (r + PAIR <= rank)
        for (long i = 0; i < rows; i++) out[i] = unit_of(from[i * stride + r], from[i * stride + r + PAIR - 1]);
      else if (r < rank)
        for (long i = 0; i < rows; i++) out[i] = unit_of(from[i * stride + r], 0);
      else
        memset(out, 0, (size_t)rows * sizeof(unit));
    }
  }
}

static inline __attribute__((always_inline)) void block_of_values(const T *a, long lda, const T *b, long ldb, T *c, long ldc, long k,
                                                                  int rows, int vectors) {
  lanes sums[NARROW][ACROSS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) sums[r][v] = load_lanes(c + r * ldc + v * LANES);
  block(a, lda, b, ldb, k, rows, vectors, sums);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) {
#ifdef BF16
      __m256bh rounded = _mm512_cvtneps_pbh((__m512)sums[r][v]);
      memcpy(c + r * ldc + v * LANES, &rounded, sizeof rounded);
#else
      memcpy(c + r * ldc + v * LANES, &sums[r][v], sizeof(lanes));
#endif
    }
}

/* c [m, n] of type T += a [m, k] b [k, n]; m at most AT_ONCE */
static void add_product(const T *a, long lda, const T *b, long ldb, T *c, long ldc, long m, long n, long k) {
  for (long j = 0; j < n; j += STRIP) {
    long columns = n - j < STRIP ? n - j : STRIP;
    if (!tiles && columns == ACROSS * LANES) {
      for (long i = 0; i < m; i += 4) block_of_values(a + i * lda, lda, b + j * PAIR, ldb, c + i * ldc + j, ldc, k, 4, ACROSS);
      continue;
    }
    float sums[AT_ONCE * STRIP];
    product(a, lda, b + j * PAIR, ldb, sums, STRIP, m, columns, k, 0);
    for (long r = 0; r < m; r++) {
      T *to = c + r * ldc + j;
      const float *sum = sums + r * STRIP;
      #pragma omp simd
      for (long i = 0; i < columns; i++) to[i] = store(load(to[i]) + sum[i]);
    }
  }
}

static void scaled(const float *from, float scale, T *to, long n) {
  #pragma omp simd
  for (long i = 0; i < n; i++) to[i] = store(scale * from[i]);
}

/* y [rows, d_out] += s (x A) B^T of every part; u is written. */
void lora_add(const of_rows *parts, const float *scales, long count, long matrices, const int64_t *outs, long d_in, const T *x, T *y) {
  lora_site s = {parts, scales, count, matrices, d_in, outs};
  tiles = wide_rows() > 0;
  T *packs = room(place_of(&s, count), sizeof(T));
  long d_out = d_out_of(&s), blocks = block_of(&s, -1, 0, 0);
  #pragma omp parallel
  {
    BEGIN_TILES
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < count * (matrices + 1); i++) pack(&s, i / (matrices + 1), i % (matrices + 1), 0, packs);
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < blocks; i++) {
      long part = 0, row = 0;
      block_of(&s, i, &part, &row);
      const of_rows *p = parts + part;
      long width = width_of(&s, part), padded = width / matrices, at = p->start + row;
      long m = p->end - at < AT_ONCE ? p->end - at : AT_ONCE;
      float sums[AT_ONCE * width];
      T *u = p->u + row * width;
      product(x + at * d_in, d_in, packs + place_of(&s, part), width, sums, width, m, width, d_in, 0);
      scaled(sums, scales[part], u, m * width);
      for (long j = 0; j < matrices; j++)
        add_product(u + j * padded, width, b_place(&s, part, packs, j), outs[j + 1] - outs[j], y + at * d_out + outs[j], d_out, m,
                    outs[j + 1] - outs[j], padded);
    }
    END_TILES
  }
  free(packs);
}

/* sums [padded, STRIP] = left [padded, filled] times `columns` columns of right [rows, stride], zeros behind its rows */
static void sum_over_rows(const T *left, long filled, long padded, const T *right, long stride, long rows, long columns, float *sums) {
  T *pairs = room(CHUNK * STRIP, sizeof(T));
  for (long at = 0; at < filled; at += CHUNK) {
    long n = filled - at < CHUNK ? filled - at : CHUNK;
    for (long t = 0; t < n; t += PAIR) {
      T *to = pairs + t * STRIP;
      const T *even = right + (at + t) * stride;
#ifdef BF16
      unit *both = (unit *)to;
      if (at + t + 1 < rows) {
        #pragma omp simd
        for (long i = 0; i < columns; i++) both[i] = unit_of(even[i], even[i + stride]);
      } else
        memset(to, 0, STRIP * 2 * sizeof(T));
#else
      if (at + t < rows)
        memcpy(to, even, (size_t)columns * sizeof(T));
      else
        memset(to, 0, STRIP * sizeof(T));
#endif
    }
    product(left + at, filled, pairs, STRIP, sums, STRIP, padded, columns, n, at > 0);
  }
  free(pairs);
}

/* [rows, width] -> [width, filled], zeros behind */
static void transposed(const T *from, T *to, long rows, long width, long first, long last, long filled) {
  for (long c = 0; c < width; c++)
    for (long t = first; t < last; t++) to[c * filled + t] = t < rows ? from[t * width + c] : 0;
}

/* All of the parts' u (or du) transposed, one after another; where each begins in `places`. */
static long transposed_places(const lora_site *s, long *places) {
  long before = 0;
  for (long p = 0; p < s->count; p++) {
    places[p] = before;
    before += width_of(s, p) * up_to(s->parts[p].end - s->parts[p].start, STEP);
  }
  return before;
}

/* dx [rows, d_in] += the adapters' part; writes du and, where wanted, the gradients of all B. */
void lora_input_gradient(const of_rows *parts, const float *scales, long count, long matrices, const int64_t *outs, long d_in,
                         const T *dy, T *dx) {
  lora_site s = {parts, scales, count, matrices, d_in, outs};
  tiles = wide_rows() > 0;
  long places[count + 1], d_out = d_out_of(&s), blocks = block_of(&s, -1, 0, 0), strips = 0;
  T *packs = room(place_of(&s, count), sizeof(T)), *turned = room(transposed_places(&s, places), sizeof(T));
  for (long j = 0; j < matrices; j++) strips += (outs[j + 1] - outs[j] + STRIP - 1) / STRIP;
  #pragma omp parallel
  {
    BEGIN_TILES
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < count * (matrices + 1); i++) pack(&s, i / (matrices + 1), i % (matrices + 1), 1, packs);
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < blocks; i++) {
      long part = 0, row = 0;
      block_of(&s, i, &part, &row);
      const of_rows *p = parts + part;
      long width = width_of(&s, part), padded = width / matrices, at = p->start + row, rows = p->end - p->start;
      long m = rows - row < AT_ONCE ? rows - row : AT_ONCE, filled = up_to(rows, STEP);
      float sums[AT_ONCE * width];
      T *du = p->du + row * width;
      for (long j = 0; j < matrices; j++)
        product(dy + at * d_out + outs[j], d_out, b_place(&s, part, packs, j), padded, sums + j * padded, width, m, padded,
                outs[j + 1] - outs[j], 0);
      scaled(sums, scales[part], du, m * width);
      add_product(du, width, packs + place_of(&s, part), d_in, dx + at * d_in, d_in, m, d_in, width);
      long last = row + AT_ONCE < filled ? row + AT_ONCE : filled;
      if (p->grad_a) transposed(p->u, turned + places[part], rows, width, row, last, filled);
    }
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < count * strips; i++) {
      const of_rows *p = parts + i / strips;
      if (!p->grad_a) continue;
      long strip = i % strips, j = 0, of_matrix;
      while (strip >= (of_matrix = (outs[j + 1] - outs[j] + STRIP - 1) / STRIP)) strip -= of_matrix, j++;
      long width = width_of(&s, i / strips), padded = width / matrices, rows = p->end - p->start, filled = up_to(rows, STEP);
      long column = strip * STRIP, columns = outs[j + 1] - outs[j] - column < STRIP ? outs[j + 1] - outs[j] - column : STRIP;
      float sums[padded * STRIP];
      sum_over_rows(turned + places[i / strips] + j * padded * filled, filled, padded, dy + p->start * d_out + outs[j] + column, d_out,
                    rows, columns, sums);
      for (long c = 0; c < columns; c++)
        for (long r = 0; r < p->rank; r++) p->grad_b[j][(column + c) * p->rank + r] = store(sums[r * STRIP + c]);
    }
    END_TILES
  }
  free(packs), free(turned);
}

/* The gradients of all A, from du. */
void lora_a_gradient(const of_rows *parts, const float *scales, long count, long matrices, const int64_t *outs, long d_in, const T *x) {
  lora_site s = {parts, scales, count, matrices, d_in, outs};
  tiles = wide_rows() > 0;
  long places[count + 1], blocks = block_of(&s, -1, 0, 0), strips = (d_in + STRIP - 1) / STRIP;
  T *turned = room(transposed_places(&s, places), sizeof(T));
  #pragma omp parallel
  {
    BEGIN_TILES
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < blocks; i++) {
      long part = 0, row = 0;
      block_of(&s, i, &part, &row);
      long rows = parts[part].end - parts[part].start, filled = up_to(rows, STEP);
      long last = row + AT_ONCE < filled ? row + AT_ONCE : filled;
      if (parts[part].grad_a) transposed(parts[part].du, turned + places[part], rows, width_of(&s, part), row, last, filled);
    }
    #pragma omp for schedule(dynamic)
    for (long i = 0; i < count * strips; i++) {
      const of_rows *p = parts + i / strips;
      if (!p->grad_a) continue;
      long width = width_of(&s, i / strips), padded = width / matrices, rows = p->end - p->start, filled = up_to(rows, STEP);
      long column = i % strips * STRIP, columns = d_in - column < STRIP ? d_in - column : STRIP;
      float sums[width * STRIP];
      sum_over_rows(turned + places[i / strips], filled, width, x + p->start * d_in + column, d_in, rows, columns, sums);
      for (long c = 0; c < columns; c++)
        for (long j = 0; j < matrices; j++)
          for (long r = 0; r < p->rank; r++)
            p->grad_a[((column + c) * matrices + j) * p->rank + r] = store(sums[(j * padded + r) * STRIP + c]);
    }
    END_TILES
  }
  free(turned);
}
#endif
