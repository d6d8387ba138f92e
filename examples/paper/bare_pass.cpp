// SPDX-License-Identifier: Apache-2.0
//
// What one pass over a matrix costs by itself: root, update, sketch and test sketch of fp32 matrices
// of one shape each, without options, checks or the algebra around it. bench_step.py builds it as a
// yardstick that runs on the same CPU in the same rounds. Rows must divide by R, columns by 2 kLanes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int R = 8, C = 128, kWide = 16;
typedef float V __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
}  // namespace

// q (rows, k), ut (k, cols), x (cols, 16), z (rows, width), floors (rows), (cols); y (rows, 16), and
// p0 and col_sums one a chunk.
extern "C" void bare_pass(int64_t rows, int64_t cols, int64_t k, int64_t width, const float* g,
                          float* m, float* w, const float* q, const float* ut, const float* x,
                          const float* z, const float* floor_rows, const float* floor_cols,
                          float* y, float* p0, float* row_sums, float* col_sums, int threads) {
  const float b1 = 0.9f, gain = 0.1f, of_mean = 0.9f, of_new = 0.1f, rest2 = 0.001f;
  const float correction = 1.0f, eps = 1e-8f, decay = 0.9999f, rate = -1e-4f, limit = 10.0f;
  const int64_t chunk = ((rows + threads * 4 - 1) / (threads * 4) + R - 1) / R * R;
  const int64_t chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t at_chunk = 0; at_chunk < chunks; ++at_chunk) {
    float *p = p0 + at_chunk * width * cols, *sums = col_sums + at_chunk * cols;
    std::memset(p, 0, sizeof(float) * width * cols);
    std::memset(sums, 0, sizeof(float) * cols);
    alignas(64) float root[R * C];
    for (int64_t r0 = at_chunk * chunk; r0 < std::min(rows, (at_chunk + 1) * chunk); r0 += R) {
      V sketch[R][kWide / kLanes] = {};
      float row[R] = {};
      for (int64_t c0 = 0; c0 < cols; c0 += C) {
        const int count = static_cast<int>(std::min<int64_t>(C, cols - c0));
        for (int i = 0; i < R; ++i)
          for (int j = 0; j < count; j += 16) {
            const int64_t ahead = (r0 + i) * cols + c0 + j + C;
            __builtin_prefetch(g + ahead);
            __builtin_prefetch(m + ahead, 1);
            __builtin_prefetch(w + ahead, 1);
          }
        for (int half = 0; half < R; half += 4)
          for (int j = 0; j < count; j += 2 * kLanes) {
            V s[4][2] = {};
            for (int l = 0; l < k; ++l) {
              const V u0 = load(ut + l * cols + c0 + j), u1 = load(ut + l * cols + c0 + j + kLanes);
              for (int i = 0; i < 4; ++i) {
                s[i][0] += q[(r0 + half + i) * k + l] * u0;
                s[i][1] += q[(r0 + half + i) * k + l] * u1;
              }
            }
            for (int i = 0; i < 4; ++i) {
              store(root + (half + i) * C + j, s[i][0]);
              store(root + (half + i) * C + j + kLanes, s[i][1]);
            }
          }
        for (int i = 0; i < R; ++i) {
          const int64_t at = (r0 + i) * cols + c0;
          float* d = root + i * C;
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int j = 0; j < count; ++j) {
            const float least = floor_rows[r0 + i] * floor_cols[c0 + j], grad = g[at + j];
            const float kept = d[j] < least ? least : d[j];
            const float v = rest2 * grad * grad + kept * kept;
            sum += v;
            sums[c0 + j] += v;
            d[j] = std::sqrt(v);
            m[at + j] = b1 * m[at + j] + gain * grad;
            const float step = (of_new * grad + of_mean * m[at + j]) / (correction * d[j] + eps);
            const float held = step > limit ? limit : step < -limit ? -limit : step;
            w[at + j] = decay * w[at + j] + rate * held;
          }
          row[i] += sum;
        }
        for (int half = 0; half < R; half += 4)
          for (int j = 0; j < count; ++j)
            for (int o = 0; o < kWide / kLanes; ++o) {
              const V column = load(x + (c0 + j) * kWide + o * kLanes);
              for (int i = 0; i < 4; ++i) sketch[half + i][o] += root[(half + i) * C + j] * column;
            }
        for (int l = 0; l < width; l += 2)
          for (int j = 0; j < count; j += 2 * kLanes) {
            float* to = p + l * cols + c0 + j;
            V a[2][2] = {{load(to), load(to + kLanes)}, {load(to + cols), load(to + cols + kLanes)}};
            for (int i = 0; i < R; ++i) {
              const V d0 = load(root + i * C + j), d1 = load(root + i * C + j + kLanes);
              for (int n = 0; n < 2; ++n) {
                a[n][0] += z[(r0 + i) * width + l + n] * d0;
                a[n][1] += z[(r0 + i) * width + l + n] * d1;
              }
            }
            for (int n = 0; n < 2; ++n) {
              store(to + n * cols, a[n][0]);
              store(to + n * cols + kLanes, a[n][1]);
            }
          }
      }
      for (int i = 0; i < R; ++i) {
        for (int o = 0; o < kWide / kLanes; ++o) store(y + (r0 + i) * kWide + o * kLanes, sketch[i][o]);
        row_sums[r0 + i] = row[i];
      }
    }
  }
}
