// SPDX-License-Identifier: Apache-2.0
//
// Whether gradients are finite, in one pass over them; squares.py calls it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "narrow.h"
#include "vectors.h"

extern "C" {

// The largest sum of squares of a tensor; NaN or infinity where one holds such.
double largest_square(const char* const* tensors, const int64_t* numels, int64_t count,
                      int32_t format, int32_t threads) {
  constexpr int64_t kSpan = 1 << 14;
  constexpr int kCols = 128;  // read at a time
  std::vector<int64_t> first(count + 1);
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + (numels[i] + kSpan - 1) / kSpan;
  std::vector<double> sums(first[count]);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t unit = 0; unit < first[count]; ++unit) {
    const int64_t i = std::upper_bound(first.begin(), first.end(), unit) - first.begin() - 1;
    const int64_t begin = (unit - first[i]) * kSpan, end = std::min(begin + kSpan, numels[i]);
    // As many sums as it takes for none to wait for itself.
    constexpr int kSums = 4;
    Vec sum[kSums] = {};
    float rest = 0;
    alignas(64) float buffer[kCols];
    for (int64_t at = begin; at < end; at += kCols) {
      const int here = static_cast<int>(std::min<int64_t>(kCols, end - at));
      const float* x = read_floats(format, tensors[i] + at * size_of(format), nullptr, here, buffer);
      int j = 0;
      for (; j + kSums * kLanes <= here; j += kSums * kLanes)
        for (int l = 0; l < kSums; ++l) {
          const Vec held = load(x + j + l * kLanes);
          sum[l] += held * held;
        }
      for (; j < here; ++j) rest += x[j] * x[j];
    }
    sums[unit] = sum_of(sum[0] + sum[1] + (sum[2] + sum[3])) + rest;
  }
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int64_t unit = first[i]; unit < first[i + 1]; ++unit) total += sums[unit];
    if (!(total <= largest)) largest = total;  // NaN stays
    if (std::isnan(largest)) break;
  }
  return largest;
}

}  // extern "C"
