/* A decode step of up to WIDE rows on a CPU with AMX: as core/native_step.c, with tiles for the products, so that weights are read
   as they lie and once. Rows of the batch are columns here: values lie as [features, columns], 16 columns a block, the last ones
   empty. What goes into a product lies as `pairs`: [features / 32][blocks][16][16 columns][2], the features of a pair together. */
#include "native_step.c"

#if defined(BF16) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WIDE 256
#define TILE 512 /* values */

typedef struct {
  const step *s;              /* its x, qkv, attended, between and u are not used; factors: see core/native_wide.py */
  const int64_t *low, *high;  /* columns [low, high) of each adapter, in order */
  const int64_t *padded;      /* ranks, to multiples of 32 */
  float *x;                   /* [d, columns], the residual stream */
  T *qkv;                     /* [(q + 2 kv) size, columns] */
  T *h;                       /* pairs, of what goes into qkv, o and gate_up */
  T *between;                 /* pairs, of what goes into down_proj */
  T *u;                       /* pairs, [adapters, 3, most padded rank] */
  long blocks, num_adapters, most;
} wide;

static inline long columns_of(const wide *w) { return w->blocks * 16; }

static inline T *pair_of(T *pairs, long feature, long blocks, long block) {
  return pairs + (feature / 32 * blocks + block) * TILE + feature % 32 / 2 * 32;
}

static inline __m256i to_half(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 of_half(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

static inline __m512 rounded_lanes(__m512 x) { return of_half(to_half(x)); }

static inline void store_pair(T *to, __m512 even, __m512 odd) {
  __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_half(odd)), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(to_half(even)), second));
}

static void begin_tiles(char kept[64]) {
  struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } all = {.palette = 1};
  for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = 16;
  _tile_storeconfig(kept);
  __asm__ volatile("" ::: "memory"); /* gcc 12 believes that 8 bytes are read */
  _tile_loadconfig(&all);
}

/* sums [2][16][columns] of rows `first` and `second` (16 each, `stride` apart) times blocks [from, to) of x; `ahead` of them lie
   the rows that come next */
static inline __attribute__((always_inline)) void tile_products(const T *first, const T *second, long stride, const T *x, long d_in,
                                                                long blocks, long from, long to, long ahead, float *sums) {
  long columns = blocks * 16;
  for (long c = from; c < to; c += 2) {
    int both = c + 1 < to;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < d_in; k += 32) {
      const T *given = x + (k / 32 * blocks + c) * TILE;
      _tile_loadd(4, first + k, stride * sizeof(T));
      _tile_loadd(5, second + k, stride * sizeof(T));
      _tile_loadd(6, given, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (both) {
        _tile_loadd(7, given + TILE, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (c == from)
        for (long r = 0; r < 16; r++) {
          __builtin_prefetch(first + ahead + r * stride + k);
          __builtin_prefetch(second + ahead + r * stride + k);
        }
    }
    _tile_stored(0, sums + c * 16, columns * 4);
    _tile_stored(1, sums + 16 * columns + c * 16, columns * 4);
    if (both) {
      _tile_stored(2, sums + (c + 1) * 16, columns * 4);
      _tile_stored(3, sums + 16 * columns + (c + 1) * 16, columns * 4);
    }
  }
}

/* sums [16][columns] of what the adapters add to output rows [row, row + 16) of matrix `number` of a site */
static void adapter_products(const wide *w, long layer, int a, int number, long row, float *sums) {
  long columns = columns_of(w), adapter = 0;
  for (long c = 0; c < w->blocks; c++) {
    _tile_zero(0);
    while (adapter < w->num_adapters && w->high[adapter] <= c * 16) adapter++;
    for (long at = adapter; at < w->num_adapters && w->low[at] < c * 16 + 16; at++) {
      const T *b = factor(w->s, at, layer, a + 1 + number);
      long rank = w->padded[at];
      for (long k = 0; b && k < rank; k += 32) {
        _tile_loadd(4, b + row * rank + k, rank * sizeof(T));
        for (long r = 16; r < 32; r++) __builtin_prefetch(b + (row + r) * rank + k);
        _tile_loadd(6, w->u + ((at * 3 + number) * w->most + k) / 32 * w->blocks * TILE + c * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
    }
    _tile_stored(0, sums + c * 16, columns * 4);
  }
}

/* u = scale * A^T h of the columns of every adapter on this site. All threads. */
static void wide_down(const wide *w, long layer, int which, int count, const T *h, long d_in) {
  const long most = w->most / 32, blocks = w->blocks, columns = columns_of(w);
  if (!w->num_adapters) return;
  #pragma omp for schedule(static)
  for (long i = 0; i < w->num_adapters * count * most; i++) {
    long at = i / (count * most), number = i / most % count, first = i % most * 32, rank = w->padded[at];
    const T *a = factor(w->s, at, layer, which);
    if (!a || first >= rank) continue;
    float sums[32 * columns];
    long from = w->low[at] / 16, to = (w->high[at] + 15) / 16;
    const T *rows = a + (number * rank + first) * d_in, *next = rows + 32 * d_in;
    if (next == a + count * rank * d_in && at + 1 < w->num_adapters) next = factor(w->s, at + 1, layer, which);
    tile_products(rows, rows + 16 * d_in, d_in, h, d_in, blocks, from, to, next ? next - rows : 0, sums);
    __m512 scale = _mm512_set1_ps(w->s->scales[at]);
    for (long c = from; c < to; c++) {
      long low = w->low[at] - c * 16, high = w->high[at] - c * 16;
      __mmask16 mine = (__mmask16)((high >= 16 ? 0xffff : (1 << high) - 1) & ~(low <= 0 ? 0 : (1 << low) - 1));
      for (long r = 0; r < 32; r += 2) {
        __m512 even = rounded_lanes(_mm512_maskz_loadu_ps(mine, sums + r * columns + c * 16));
        __m512 odd = rounded_lanes(_mm512_maskz_loadu_ps(mine, sums + (r + 1) * columns + c * 16));
        T *u = w->u + ((at * 3 + number) * w->most + first) / 32 * blocks * TILE;
        store_pair(pair_of(u, r, blocks, c), _mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
      }
    }
  }
}

/* h = RMSNorm of every column of x */
static void wide_norm(const wide *w, const float *weight) {
  const long d = w->s->d, columns = columns_of(w);
  #pragma omp for schedule(static)
  for (long c = 0; c < w->blocks; c++) {
    const float *x = w->x + c * 16;
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < d; i++) {
      __m512 value = _mm512_loadu_ps(x + i * columns);
      sum = _mm512_fmadd_ps(value, value, sum);
    }
    __m512 mean = _mm512_add_ps(_mm512_div_ps(sum, _mm512_set1_ps((float)d)), _mm512_set1_ps(w->s->eps));
    __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(mean));
    for (long i = 0; i < d; i += 2) {
      __m512 even = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i * columns), scale), _mm512_set1_ps(weight[i]));
      __m512 odd = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + (i + 1) * columns), scale), _mm512_set1_ps(weight[i + 1]));
      store_pair(pair_of(w->h, i, w->blocks, c), even, odd);
    }
  }
}

/* y + bias, rounded, + what the adapters add: rounded again, as two operations would */
static inline __m512 output_lanes(const wide *w, const float *sums, const float *added, float bias) {
  __m512 y = rounded_lanes(_mm512_add_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(bias)));
  return w->num_adapters ? rounded_lanes(_mm512_add_ps(y, _mm512_loadu_ps(added))) : y;
}

static void wide_qkv(const wide *w, long layer) {
  const step *s = w->s;
  const T *matrix = of_layer(s, layer, QKV), *bias = of_layer(s, layer, QKV_BIAS);
  const long q = s->q_heads * s->size, kv = s->kv_heads * s->size, d_out = q + 2 * kv, columns = columns_of(w);
  #pragma omp for schedule(static)
  for (long o = 0; o < d_out; o += 32) {
    float sums[32 * columns], added[16 * columns];
    long second = o + 16 < d_out ? o + 16 : o;
    tile_products(matrix + o * s->d, matrix + second * s->d, s->d, w->h, s->d, w->blocks, 0, w->blocks, 32 * s->d, sums);
    for (long row = o; row < o + 32 && row < d_out; row += 16) {
      int number = row < q ? 0 : row < q + kv ? 1 : 2;
      if (w->num_adapters) adapter_products(w, layer, A_QKV, number, row - (number == 0 ? 0 : number == 1 ? q : q + kv), added);
      for (long r = 0; r < 16; r++)
        for (long c = 0; c < columns; c += 16) {
          __m512 y = output_lanes(w, sums + (row - o + r) * columns + c, added + r * columns + c, bias ? load(bias[row + r]) : 0.0f);
          _mm256_storeu_si256((__m256i *)(w->qkv + (row + r) * columns + c), to_half(y));
        }
    }
  }
}

/* x += y of a matrix [d, d_in] whose adapters begin with `a` */
static void wide_into_stream(const wide *w, long layer, int which, int a, const T *h, long d_in) {
  const step *s = w->s;
  const T *matrix = of_layer(s, layer, which), *bias = of_layer(s, layer, which + 1);
  const long columns = columns_of(w);
  #pragma omp for schedule(static)
  for (long o = 0; o < s->d; o += 32) {
    float sums[32 * columns], added[16 * columns];
    tile_products(matrix + o * d_in, matrix + (o + 16) * d_in, d_in, h, d_in, w->blocks, 0, w->blocks, 32 * d_in, sums);
    for (long row = o; row < o + 32; row += 16) {
      if (w->num_adapters) adapter_products(w, layer, a, 0, row, added);
      for (long r = 0; r < 16; r++)
        for (long c = 0; c < columns; c += 16) {
          float *x = w->x + (row + r) * columns + c;
          __m512 y = output_lanes(w, sums + (row - o + r) * columns + c, added + r * columns + c, bias ? load(bias[row + r]) : 0.0f);
          _mm512_storeu_ps(x, _mm512_add_ps(_mm512_loadu_ps(x), y));
        }
    }
  }
}

static inline __m512 silu_times(__m512 gate, __m512 up) {
  float g[16], y[16];
  _mm512_storeu_ps(g, gate);
  for (int i = 0; i < 16; i++) y[i] = g[i] / (1.0f + exponential(-g[i]));
  return _mm512_mul_ps(_mm512_loadu_ps(y), up);
}

static void wide_swiglu(const wide *w, long layer) {
  const step *s = w->s;
  const T *matrix = of_layer(s, layer, GATE_UP), *bias = of_layer(s, layer, GATE_UP_BIAS);
  const long columns = columns_of(w);
  #pragma omp for schedule(static)
  for (long o = 0; o < s->width; o += 16) {
    float sums[32 * columns], of_gate[16 * columns], of_up[16 * columns];
    const T *gate = matrix + o * s->d;
    tile_products(gate, gate + s->width * s->d, s->d, w->h, s->d, w->blocks, 0, w->blocks, 16 * s->d, sums);
    if (w->num_adapters) {
      adapter_products(w, layer, A_GATE_UP, 0, o, of_gate);
      adapter_products(w, layer, A_GATE_UP, 1, o, of_up);
    }
    for (long r = 0; r < 16; r += 2)
      for (long c = 0; c < w->blocks; c++) {
        __m512 y[2];
        for (int i = 0; i < 2; i++) {
          long at = (r + i) * columns + c * 16;
          __m512 g = output_lanes(w, sums + at, of_gate + at, bias ? load(bias[o + r + i]) : 0.0f);
          __m512 up = output_lanes(w, sums + 16 * columns + at, of_up + at, bias ? load(bias[s->width + o + r + i]) : 0.0f);
          y[i] = silu_times(g, up);
        }
        store_pair(pair_of(w->between, o + r, w->blocks, c), y[0], y[1]);
      }
  }
}

static void wide_attention(const wide *w, long layer) {
  const step *s = w->s;
  const long heads = s->q_heads + 2 * s->kv_heads, group = s->q_heads / s->kv_heads, size = s->size;
  const long columns = columns_of(w);
  #pragma omp for schedule(static)
  for (long i = 0; i < s->n * s->kv_heads; i++) {
    long t = i / s->kv_heads, h = i % s->kv_heads, k_head = s->q_heads + h, v_head = k_head + s->kv_heads;
    T row[heads * size], out[s->q_heads * size];
    for (long at = h * group * size; at < (h + 1) * group * size; at++) row[at] = w->qkv[at * columns + t];
    for (long at = 0; at < size; at++) {
      row[k_head * size + at] = w->qkv[(k_head * size + at) * columns + t];
      row[v_head * size + at] = w->qkv[(v_head * size + at) * columns + t];
    }
    attend_head(s, layer, t, h, row, out);
    for (long at = h * group * size; at < (h + 1) * group * size; at++)
      pair_of(w->h, at, w->blocks, t / 16)[t % 16 * 2 + at % 2] = out[at];
  }
}

/* x [n, d] becomes the residual stream after the last layer. Adapter number i serves columns [low[i], high[i]). */
void wide_step(const int64_t *layers, const int64_t *places, const int64_t *positions, const int64_t *factors, const int64_t *padded,
               const int64_t *low, const int64_t *high, const float *scales, const T *cosine, const T *sine, float *x,
               float *stream, T *qkv, T *h, T *between, T *u, long n, long d, long q_heads, long kv_heads, long size, long width,
               long num_layers, long num_adapters, long most, float eps, float head_eps, float scaling) {
  const step s = {.layers = layers, .places = places, .positions = positions, .factors = factors, .scales = scales,
                  .cosine = cosine, .sine = sine, .n = n, .d = d, .q_heads = q_heads, .kv_heads = kv_heads, .size = size,
                  .width = width, .num_layers = num_layers, .eps = eps, .head_eps = head_eps, .scaling = scaling};
  const wide all = {&s, low, high, padded, stream, qkv, h, between, u, (n + 15) / 16, num_adapters, most};
  const wide *w = &all;
  const long columns = columns_of(w), q = q_heads * size;
  #pragma omp parallel
  {
    char kept[64];
    begin_tiles(kept);
    #pragma omp for schedule(static)
    for (long i = 0; i < d; i++)
      for (long t = 0; t < columns; t++) stream[i * columns + t] = t < n ? x[t * d + i] : 0.0f;
    for (long layer = 0; layer < num_layers; layer++) {
      wide_norm(w, of_layer(&s, layer, ATTENTION_NORM));
      wide_down(w, layer, A_QKV, 3, h, d);
      wide_qkv(w, layer);
      wide_attention(w, layer);
      wide_down(w, layer, A_OUTPUT, 1, h, q);
      wide_into_stream(w, layer, OUTPUT, A_OUTPUT, h, q);
      wide_norm(w, of_layer(&s, layer, MLP_NORM));
      wide_down(w, layer, A_GATE_UP, 2, h, d);
      wide_swiglu(w, layer);
      wide_down(w, layer, A_DOWN, 1, between, width);
      wide_into_stream(w, layer, DOWN, A_DOWN, between, width);
    }
    #pragma omp for schedule(static)
    for (long t = 0; t < n; t++)
      for (long i = 0; i < d; i++) x[t * d + i] = stream[i * columns + t];
    _tile_loadconfig(kept);
  }
}

/* Rows that a step can have; 0: this machine, or its kernel, does without tiles. */
int wide_rows(void) {
  const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, once a process */
  return syscall(SYS_arch_prctl, ask, tile_data) == 0 ? WIDE : 0;
}
#else
int wide_rows(void) { return 0; }
#endif
