/* AMX's tiles one value after another, for processors without: included before the C code that uses them (tests/tiles.py). */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_storeconfig
#define syscall(...) 0 /* may this process use tiles? */

static _Thread_local union {
  float sums[16][16];
  uint16_t values[16][32];
} tile[8];

static inline float value_of(uint16_t x) {
  union { uint32_t bits; float value; } word = {.bits = (uint32_t)x << 16};
  return word.value;
}

static inline void copy_tile(int t, char *memory, long stride, int load) {
  for (int r = 0; r < 16; r++)
    if (load)
      memcpy(tile[t].values[r], memory + r * stride, 64);
    else
      memcpy(memory + r * stride, tile[t].values[r], 64);
}

static inline void multiply_tiles(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++)
      for (int k = 0; k < 32; k++) tile[c].sums[m][n] += value_of(tile[a].values[m][k]) * value_of(tile[b].values[k / 2][2 * n + k % 2]);
}

#define _tile_zero(t) memset(&tile[t], 0, sizeof tile[t])
#define _tile_loadd(t, memory, stride) copy_tile(t, (char *)(memory), stride, 1)
#define _tile_stored(t, memory, stride) copy_tile(t, (char *)(memory), stride, 0)
#define _tile_dpbf16ps(c, a, b) multiply_tiles(c, a, b)
#define _tile_loadconfig(config) ((void)(config))
#define _tile_storeconfig(config) ((void)(config))
