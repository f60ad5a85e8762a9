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
#define FEW 16     /* rows of a step at most */
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
  long whole = size / LANES * LANES;
  for (long d = 0; d < whole; d += LANES) {
    lanes sums[QUERIES];
    for (int g = 0; g < queries; g++) sums[g] = load_floats(out + g * size + d);
    for (long key = 0; key < count; key++) {
      lanes value = load_lanes(v + key * size + d);
      for (int g = 0; g < queries; g++) sums[g] += value * weights[g][key];
    }
    for (int g = 0; g < queries; g++) memcpy(out + g * size + d, &sums[g], sizeof sums[g]);
  }
  for (long d = whole; d < size; d++)
    for (int g = 0; g < queries; g++)
      for (long key = 0; key < count; key++) out[g * size + d] += load(v[key * size + d]) * weights[g][key];
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

/* A decode step: n rows, one of each sequence. Tables of addresses are made by core/native_step.py, which explains them. */
typedef struct {
  const int64_t *layers, *places, *positions, *factors, *ranks, *adapter_of; /* adapter_of[t] < 0: the base model */
  const float *scales;
  const T *cosine, *sine;
  float *x;        /* [n, d], the residual stream */
  T *qkv;          /* [n, (q + 2 kv) size] */
  T *attended;     /* [n, q size] */
  float *between;  /* [n, width], what goes into down_proj */
  float *u;        /* [n, 3 * largest rank], scaled x A of the site at hand */
  long n, d, q_heads, kv_heads, size, width, num_layers, most_rank, adapted;
  float eps, head_eps, scaling;
} step;

enum { ATTENTION_NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, OUTPUT, OUTPUT_BIAS, MLP_NORM, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS, OF_LAYER };
enum { A_QKV, B_Q, B_K, B_V, A_OUTPUT, B_OUTPUT, A_GATE_UP, B_GATE, B_UP, A_DOWN, B_DOWN, OF_ADAPTER };
enum { K_AT, V_AT, K_LAYER, V_LAYER, K_ROOM, V_ROOM, OF_PLACE };

static inline const void *of_layer(const step *s, long layer, int which) { return (const void *)s->layers[layer * OF_LAYER + which]; }

static inline const T *factor(const step *s, long adapter, long layer, int which) {
  return (const T *)s->factors[(adapter * s->num_layers + layer) * OF_ADAPTER + which];
}

static inline float rounded(float x) { return load(store(x)); }

/* h = RMSNorm of every row of x, each thread for itself */
static void norm_rows(const step *s, const float *weight, float *h) {
  for (long t = 0; t < s->n; t++) {
    const float *row = s->x + t * s->d;
    float sum = 0.0f;
    for (long i = 0; i < s->d; i++) sum += row[i] * row[i];
    float scale = 1.0f / __builtin_sqrtf(sum / (float)s->d + s->eps);
    for (long i = 0; i < s->d; i++) h[t * s->d + i] = rounded(row[i] * scale * weight[i]);
  }
}

/* u = scale * h A of every row that has an adapter on this site, whose A's lie side by side: [d_in, count * rank]. All threads. */
static void down_project(const step *s, long layer, int which, int count, const float *h, long d_in) {
  const long span = 4 * LANES, most = (count * s->most_rank + span - 1) / span;
  #pragma omp for schedule(static)
  for (long i = 0; i < s->n * most; i++) {
    long t = i / most, adapter = s->adapter_of[t], first = i % most * span;
    const T *a = adapter < 0 ? 0 : factor(s, adapter, layer, which);
    if (!a) continue;
    long wide = count * s->ranks[adapter], stop = first + span < wide ? first + span : wide;
    if (first >= wide) continue;
    float sums[4 * LANES] = {0};
    if (stop - first == span) {
      lanes parts[4] = {(lanes){0}, (lanes){0}, (lanes){0}, (lanes){0}};
      for (long k = 0; k < d_in; k++)
        for (int j = 0; j < 4; j++) parts[j] += load_lanes(a + k * wide + first + j * LANES) * h[t * d_in + k];
      memcpy(sums, parts, sizeof sums);
    } else
      for (long k = 0; k < d_in; k++)
        for (long c = first; c < stop; c++) sums[c - first] += load(a[k * wide + c]) * h[t * d_in + k];
    float *u = s->u + t * 3 * s->most_rank;
    for (long c = first; c < stop; c++) u[c] = rounded(rounded(sums[c - first]) * s->scales[adapter]);
  }
}

/* y + B u of output row o of matrix `number` of a site, for row t */
static inline float adapted(const step *s, long layer, int a, int number, long t, long o, float y) {
  long adapter = s->adapter_of[t];
  if (adapter < 0 || !factor(s, adapter, layer, a)) return y;
  long rank = s->ranks[adapter], c = 0;
  const T *b = factor(s, adapter, layer, a + 1 + number) + o * rank;
  const float *u = s->u + t * 3 * s->most_rank + number * rank;
  lanes parts = {0};
  for (; c + LANES <= rank; c += LANES) parts += load_lanes(b + c) * load_floats(u + c);
  float sum = sum_of(parts);
  for (; c < rank; c++) sum += load(b[c]) * u[c];
  return rounded(y + sum);
}

static void qkv_of(const step *s, long layer, const float *h) {
  const T *w = of_layer(s, layer, QKV), *bias = of_layer(s, layer, QKV_BIAS);
  long q = s->q_heads * s->size, kv = s->kv_heads * s->size, d_out = q + 2 * kv;
  #pragma omp for schedule(static)
  for (long o = 0; o < d_out; o += ROWS) {
    const T *rows[ROWS];
    float sums[ROWS][FEW];
    matrix_rows(w, s->d, d_out, o, rows);
    row_products(rows, h, s->d, s->n, sums);
    for (long at = o; at < o + ROWS && at < d_out; at++) {
      int number = at < q ? 0 : at < q + kv ? 1 : 2;
      long inside = at - (number == 0 ? 0 : number == 1 ? q : q + kv);
      for (long t = 0; t < s->n; t++) {
        float y = rounded(sums[at - o][t] + (bias ? load(bias[at]) : 0.0f));
        s->qkv[t * d_out + at] = store(adapted(s, layer, A_QKV, number, t, inside, y));
      }
    }
  }
}

/* x += y of a matrix [d, d_in] whose adapters begin with `a` */
static void into_stream(const step *s, long layer, int which, int a, const float *h, long d_in) {
  const T *w = of_layer(s, layer, which), *bias = of_layer(s, layer, which + 1);
  #pragma omp for schedule(static)
  for (long o = 0; o < s->d; o += ROWS) {
    const T *rows[ROWS];
    float sums[ROWS][FEW];
    matrix_rows(w, d_in, s->d, o, rows);
    row_products(rows, h, d_in, s->n, sums);
    for (long at = o; at < o + ROWS && at < s->d; at++)
      for (long t = 0; t < s->n; t++) {
        float y = rounded(sums[at - o][t] + (bias ? load(bias[at]) : 0.0f));
        s->x[t * s->d + at] += adapted(s, layer, a, 0, t, at, y);
      }
  }
}

static void swiglu_of(const step *s, long layer, const float *h) {
  const T *w = of_layer(s, layer, GATE_UP), *bias = of_layer(s, layer, GATE_UP_BIAS);
  #pragma omp for schedule(static)
  for (long o = 0; o < s->width; o += ROWS / 2) { /* of gate and of up */
    const T *rows[ROWS];
    float sums[ROWS][FEW];
    for (int i = 0; i < ROWS; i++) {
      long at = o + i % 2 < s->width ? o + i % 2 : s->width - 1;
      rows[i] = w + (at + i / 2 * s->width) * s->d;
    }
    row_products(rows, h, s->d, s->n, sums);
    for (long at = o; at < o + ROWS / 2 && at < s->width; at++)
      for (long t = 0; t < s->n; t++) {
        float g = rounded(sums[at - o][t] + (bias ? load(bias[at]) : 0.0f));
        float up = rounded(sums[at - o + 2][t] + (bias ? load(bias[s->width + at]) : 0.0f));
        g = adapted(s, layer, A_GATE_UP, 0, t, at, g);
        up = adapted(s, layer, A_GATE_UP, 1, t, at, up);
        s->between[t * s->width + at] = rounded(g / (1.0f + exponential(-g)) * up);
      }
  }
}

/* head normed where there is a weight, then turned */
static void turn_head(const step *s, T *head, const float *weight, const T *cosine, const T *sine) {
  long half = s->size / 2;
  if (weight) {
    float sum = 0.0f;
    for (long i = 0; i < s->size; i++) sum += load(head[i]) * load(head[i]);
    float scale = 1.0f / __builtin_sqrtf(sum / (float)s->size + s->head_eps);
    for (long i = 0; i < s->size; i++) head[i] = store(load(head[i]) * scale * weight[i]);
  }
  for (long i = 0; i < half; i++) {
    float first = load(head[i]), second = load(head[i + half]), c = load(cosine[i]), d = load(sine[i]);
    head[i] = store(first * c - second * d);
    head[i + half] = store(second * c + first * d);
  }
}

static void attention_of(const step *s, long layer) {
  const float *q_norm = of_layer(s, layer, Q_NORM), *k_norm = of_layer(s, layer, K_NORM);
  long heads = s->q_heads + 2 * s->kv_heads, group = s->q_heads / s->kv_heads, half = s->size / 2;
  #pragma omp for schedule(dynamic, 1)
  for (long i = 0; i < s->n * s->kv_heads; i++) {
    long t = i / s->kv_heads, h = i % s->kv_heads;
    const int64_t *place = s->places + t * OF_PLACE;
    T *qkv = s->qkv + t * heads * s->size;
    cache c = {(T *)place[K_AT] + layer * place[K_LAYER], (T *)place[V_AT] + layer * place[V_LAYER], place[K_ROOM],
               place[V_ROOM], s->q_heads, s->kv_heads, s->size, s->scaling};
    for (long g = h * group; g < (h + 1) * group; g++)
      turn_head(s, qkv + g * s->size, q_norm, s->cosine + t * half, s->sine + t * half);
    turn_head(s, qkv + (s->q_heads + h) * s->size, k_norm, s->cosine + t * half, s->sine + t * half);
    keep_row(&c, qkv, 0, s->positions[t], h);
    attend_row(&c, qkv, 0, s->positions[t], h, s->attended + t * s->q_heads * s->size);
  }
}

/* x [n, d] becomes the residual stream after the last layer */
void decode_step(const int64_t *layers, const int64_t *places, const int64_t *positions, const int64_t *factors,
                 const int64_t *ranks, const int64_t *adapter_of, const float *scales, const T *cosine, const T *sine, float *x,
                 T *qkv, T *attended, float *between, float *u, long n, long d, long q_heads, long kv_heads, long size, long width,
                 long num_layers, long most_rank, float eps, float head_eps, float scaling) {
  step made = {layers, places, positions, factors, ranks, adapter_of, scales, cosine, sine, x, qkv, attended, between, u, n, d,
               q_heads, kv_heads, size, width, num_layers, most_rank, most_rank > 0, eps, head_eps, scaling};
  const step *s = &made;
  long q = q_heads * size;
  #pragma omp parallel
  {
    float h[n * (d > q ? d : q)];
    for (long layer = 0; layer < num_layers; layer++) {
      norm_rows(s, of_layer(s, layer, ATTENTION_NORM), h);
      if (s->adapted) down_project(s, layer, A_QKV, 3, h, d);
      qkv_of(s, layer, h);
      attention_of(s, layer);
      for (long i = 0; i < n * q; i++) h[i] = load(attended[i]);
      if (s->adapted) down_project(s, layer, A_OUTPUT, 1, h, q);
      into_stream(s, layer, OUTPUT, A_OUTPUT, h, q);
      norm_rows(s, of_layer(s, layer, MLP_NORM), h);
      if (s->adapted) down_project(s, layer, A_GATE_UP, 2, h, d);
      swiglu_of(s, layer, h);
      if (s->adapted) down_project(s, layer, A_DOWN, 1, between, width);
      into_stream(s, layer, DOWN, A_DOWN, between, width);
    }
  }
}
