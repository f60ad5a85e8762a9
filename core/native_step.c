/* A decode step of n <= FEW rows, one of each sequence, through all layers by one team of threads. Rounded to T where the training
   pass rounds. core/native_step.py makes the tables of addresses and says what is in them. */
#include "native_sampling.c"

typedef struct {
  const int64_t *layers, *places, *positions, *factors, *ranks, *adapter_of; /* adapter_of[t] < 0: the base model */
  const float *scales;
  const T *cosine, *sine;
  float *x;        /* [n, d], the residual stream */
  T *qkv;          /* [n, (q + 2 kv) size] */
  T *attended;     /* [n, q size] */
  float *between;  /* [n, width], what goes into down_proj */
  float *u;        /* [n, 3 * largest rank], scaled x A of the site at hand */
  long n, d, q_heads, kv_heads, size, width, num_layers, most_rank; /* most_rank 0: no row has an adapter */
  float eps, head_eps, scaling;
} step;

enum { ATTENTION_NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, OUTPUT, OUTPUT_BIAS, MLP_NORM, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS, OF_LAYER };
enum { A_QKV, B_Q, B_K, B_V, A_OUTPUT, B_OUTPUT, A_GATE_UP, B_GATE, B_UP, A_DOWN, B_DOWN, OF_ADAPTER };
enum { K_AT, V_AT, OF_A_LAYER, ROOM, OF_PLACE };

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
    float scale = inverse_rms(head, s->size, s->head_eps);
    for (long i = 0; i < s->size; i++) head[i] = store(load(head[i]) * scale * weight[i]);
  }
  TURN(head, head, cosine, sine, 1.0f, half)
}

/* Row t looks at key head h of its past; qkv [heads, size] and attended [q heads, size] are its own. */
static void attend_head(const step *s, long layer, long t, long h, T *qkv, T *attended) {
  const float *q_norm = of_layer(s, layer, Q_NORM), *k_norm = of_layer(s, layer, K_NORM);
  const int64_t *place = s->places + t * OF_PLACE;
  long group = s->q_heads / s->kv_heads, half = s->size / 2;
  cache c = {(T *)place[K_AT] + layer * place[OF_A_LAYER], (T *)place[V_AT] + layer * place[OF_A_LAYER], place[ROOM],
             s->q_heads, s->kv_heads, s->size, s->scaling};
  for (long g = h * group; g < (h + 1) * group; g++)
    turn_head(s, qkv + g * s->size, q_norm, s->cosine + t * half, s->sine + t * half);
  turn_head(s, qkv + (s->q_heads + h) * s->size, k_norm, s->cosine + t * half, s->sine + t * half);
  keep_row(&c, qkv, 0, s->positions[t], h);
  attend_row(&c, qkv, 0, s->positions[t], h, attended);
}

static void attention_of(const step *s, long layer) {
  long heads = s->q_heads + 2 * s->kv_heads;
  #pragma omp for schedule(static)
  for (long i = 0; i < s->n * s->kv_heads; i++) {
    long t = i / s->kv_heads;
    attend_head(s, layer, t, i % s->kv_heads, s->qkv + t * heads * s->size, s->attended + t * s->q_heads * s->size);
  }
}

/* x [n, d] becomes the residual stream after the last layer */
void decode_step(const int64_t *layers, const int64_t *places, const int64_t *positions, const int64_t *factors,
                 const int64_t *ranks, const int64_t *adapter_of, const float *scales, const T *cosine, const T *sine, float *x,
                 T *qkv, T *attended, float *between, float *u, long n, long d, long q_heads, long kv_heads, long size, long width,
                 long num_layers, long most_rank, float eps, float head_eps, float scaling) {
  step made = {layers, places, positions, factors, ranks, adapter_of, scales, cosine, sine, x, qkv, attended, between, u, n, d,
               q_heads, kv_heads, size, width, num_layers, most_rank, eps, head_eps, scaling};
  const step *s = &made;
  long q = q_heads * size;
  #pragma omp parallel
  {
    float h[n * (d > q ? d : q)];
    for (long layer = 0; layer < num_layers; layer++) {
      norm_rows(s, of_layer(s, layer, ATTENTION_NORM), h);
      if (s->most_rank) down_project(s, layer, A_QKV, 3, h, d);
      qkv_of(s, layer, h);
      attention_of(s, layer);
      for (long i = 0; i < n * q; i++) h[i] = load(attended[i]);
      if (s->most_rank) down_project(s, layer, A_OUTPUT, 1, h, q);
      into_stream(s, layer, OUTPUT, A_OUTPUT, h, q);
      norm_rows(s, of_layer(s, layer, MLP_NORM), h);
      if (s->most_rank) down_project(s, layer, A_GATE_UP, 2, h, d);
      swiglu_of(s, layer, h);
      if (s->most_rank) down_project(s, layer, A_DOWN, 1, between, width);
      into_stream(s, layer, DOWN, A_DOWN, between, width);
    }
  }
}
