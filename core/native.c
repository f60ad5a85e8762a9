/* Elementwise passes between matrix products on a CPU, one row after another, rows in parallel. core/native.py compiles this
   file once for each type of values: bf16 with -DBF16, else fp32. Sums and everything in between are fp32. */
#include <stdint.h>

#define SMALL 16384 /* values that one thread does sooner than two */

typedef union { uint32_t bits; float value; } word;

#ifdef BF16
typedef uint16_t T;

static inline float load(T x) {
  word w = {.bits = (uint32_t)x << 16};
  return w.value;
}

static inline T store(float x) { /* to nearest, ties to even; NaN stays NaN */
  word w = {.value = x};
  uint32_t rounded = (w.bits + 0x7fffu + ((w.bits >> 16) & 1u)) >> 16;
  return (T)((w.bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
#else
typedef float T;

static inline float load(T x) { return x; }
static inline T store(float x) { return x; }
#endif

static inline float exponential(float x) { /* relative error about 1e-7 between exp(-87) and exp(88) */
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  float n = __builtin_rintf(x * 1.442695041f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 5.0000001e-1f;
  word two_to_n = {.bits = (uint32_t)((int32_t)n + 127) << 23};
  return (p * r * r + r + 1.0f) * two_to_n.value;
}

/* h = x * inverse * weight; inverse = 1 / sqrt(mean(x^2) + eps) is computed unless given */
void normed(const float *restrict x, const float *restrict weight, float eps, float *restrict inverse, int given, T *restrict h,
            long rows, long d) {
  #pragma omp parallel for schedule(static) if (rows * d > SMALL)
  for (long t = 0; t < rows; t++) {
    const float *row = x + t * d;
    T *out = h + t * d;
    float scale = inverse[t];
    if (!given) {
      float sum = 0.0f;
      for (long i = 0; i < d; i++) sum += row[i] * row[i];
      inverse[t] = scale = 1.0f / __builtin_sqrtf(sum / (float)d + eps);
    }
    for (long i = 0; i < d; i++) out[i] = store(row[i] * scale * weight[i]);
  }
}

/* dx of the above, plus `add` where there is one */
void normed_backward(const T *restrict dh, const float *restrict x, const float *restrict weight, const float *restrict inverse,
                     const float *restrict add, float *restrict dx, long rows, long d) {
  #pragma omp parallel for schedule(static) if (rows * d > SMALL)
  for (long t = 0; t < rows; t++) {
    const T *g = dh + t * d;
    const float *row = x + t * d;
    float *out = dx + t * d, scale = inverse[t], along = 0.0f;
    for (long i = 0; i < d; i++) along += load(g[i]) * weight[i] * row[i];
    along *= scale * scale * scale / (float)d;
    if (add)
      for (long i = 0; i < d; i++)
        out[i] = load(g[i]) * weight[i] * scale - row[i] * along + add[t * d + i];
    else
      for (long i = 0; i < d; i++) out[i] = load(g[i]) * weight[i] * scale - row[i] * along;
  }
}

/* the residual stream: out = x + y */
void added(const float *restrict x, const T *restrict y, float *restrict out, long rows, long d) {
  #pragma omp parallel for schedule(static) if (rows * d > SMALL)
  for (long t = 0; t < rows; t++)
    for (long i = 0; i < d; i++) out[t * d + i] = x[t * d + i] + load(y[t * d + i]);
}

/* silu(gate) * up of rows [gate, up] */
void swiglu(const T *restrict gate_up, T *restrict out, long rows, long width) {
  #pragma omp parallel for schedule(static) if (rows * width > SMALL)
  for (long t = 0; t < rows; t++) {
    const T *gate = gate_up + 2 * t * width, *up = gate + width;
    T *row = out + t * width;
    for (long i = 0; i < width; i++) {
      float g = load(gate[i]);
      row[i] = store(g / (1.0f + exponential(-g)) * load(up[i]));
    }
  }
}

/* the same once more, and d gate_up */
void swiglu_with_gradient(const T *restrict gate_up, const T *restrict da, T *restrict out, T *restrict d_gate_up, long rows,
                          long width) {
  #pragma omp parallel for schedule(static) if (rows * width > SMALL)
  for (long t = 0; t < rows; t++) {
    const T *gate = gate_up + 2 * t * width, *up = gate + width, *d = da + t * width;
    T *row = out + t * width, *d_gate = d_gate_up + 2 * t * width, *d_up = d_gate + width;
    #pragma omp simd
    for (long i = 0; i < width; i++) {
      float g = load(gate[i]), u = load(up[i]), of = load(d[i]), s = 1.0f / (1.0f + exponential(-g));
      row[i] = store(g * s * u);
      d_up[i] = store(of * g * s);
      d_gate[i] = store(of * u * s * (1.0f + g * (1.0f - s)));
    }
  }
}

/* rotary embedding of one head, perhaps in place; sign -1 turns back */
#define TURN(in, to, c, s, sign, half) \
  for (long i = 0; i < (half); i++) { \
    float first = load((in)[i]), second = load((in)[i + (half)]), of_cos = load((c)[i]), of_sin = (sign) * load((s)[i]); \
    (to)[i] = store(first * of_cos - second * of_sin); \
    (to)[i + (half)] = store(second * of_cos + first * of_sin); \
  }

static inline float inverse_rms(const T *restrict head, long size, float eps) {
  float sum = 0.0f;
  for (long i = 0; i < size; i++) sum += load(head[i]) * load(head[i]);
  return 1.0f / __builtin_sqrtf(sum / (float)size + eps);
}

/* Of each row the q, then kv heads: normed if there are weights, then turned; the others as they are. Or, with `back`, the
   gradient of that for `given`, the output's; `raw`, the heads themselves, is read then where there are weights. */
void rotated(const T *restrict given, const T *restrict raw, const T *restrict cosine, const T *restrict sine,
             const float *restrict q_weight, const float *restrict k_weight, float q_eps, float k_eps, T *restrict out, long rows,
             long q, long kv, long size, long back) {
  long heads = q + 2 * kv, half = size / 2;
  float sign = back ? -1.0f : 1.0f;
  #pragma omp parallel for schedule(static) if (rows * heads * size > SMALL)
  for (long t = 0; t < rows; t++) {
    const T *c = cosine + t * half, *s = sine + t * half;
    T between[size];
    for (long h = 0; h < q + kv; h++) {
      const T *in = given + (t * heads + h) * size;
      T *to = out + (t * heads + h) * size;
      const float *weight = h < q ? q_weight : k_weight;
      float eps = h < q ? q_eps : k_eps;
      if (!weight) {
        TURN(in, to, c, s, sign, half)
      } else if (!back) {
        float scale = inverse_rms(in, size, eps);
        for (long i = 0; i < size; i++) between[i] = store(load(in[i]) * scale * weight[i]);
        TURN(between, to, c, s, sign, half)
      } else {
        const T *x = raw + (t * heads + h) * size;
        float scale = inverse_rms(x, size, eps), along = 0.0f;
        TURN(in, between, c, s, sign, half)
        for (long i = 0; i < size; i++) along += load(between[i]) * weight[i] * load(x[i]);
        along *= scale * scale * scale / (float)size;
        for (long i = 0; i < size; i++) to[i] = store(load(between[i]) * weight[i] * scale - load(x[i]) * along);
      }
    }
    for (long i = (t * heads + q + kv) * size; i < (t + 1) * heads * size; i++) out[i] = given[i];
  }
}

/* softmax(scaling * scores) in place, for [batch, queries * group, keys]: query q of a batch sees the keys from left[b] to
   q + keys - queries, the others become 0. Keys are taken 16 at a time: rests would take longer than they. */
void causal_softmax(T *restrict scores, float scaling, const int32_t *restrict left, long batch, long queries, long group,
                    long keys) {
  #pragma omp parallel for schedule(static) if (batch * queries * group * keys > SMALL)
  for (long r = 0; r < batch * queries * group; r++) {
    T *row = scores + r * keys;
    int low = left[r / (queries * group)], high = (int)((r / group) % queries + keys - queries + 1);
    int first = low / 16 * 16, stop = (high + 15) / 16 * 16 < keys ? (high + 15) / 16 * 16 : (int)keys;
    float largest = -3.0e38f, sum = 0.0f, values[stop - first];
    #pragma omp simd reduction(max : largest)
    for (int i = first; i < stop; i++) {
      float value = i >= low && i < high ? load(row[i]) : -3.0e38f;
      values[i - first] = value;
      largest = value > largest ? value : largest;
    }
    for (int i = 0; i < stop - first; i++) {
      float value = exponential(scaling * (values[i] - largest));
      values[i] = i + first >= low && i + first < high ? value : 0.0f;
      sum += values[i];
    }
    float share = 1.0f / sum;
    for (int i = 0; i < first; i++) row[i] = 0;
    for (int i = first; i < stop; i++) row[i] = store(values[i - first] * share);
    for (int i = stop; i < keys; i++) row[i] = 0;
  }
}
