// SPDX-License-Identifier: Apache-2.0
//
// MicroAdam's step on CPUs: a row, which is a block or the frame of a part of one, stays in cache
// from the gradient to the weights. What is computed is written in micro_adam/step.py; how this is
// called, in native_windows.py.
//
// Compiled without contraction of products and sums, so that error and window have the bits of the
// torch step. Rows are independent: a result depends neither on the number of threads nor on who
// was first.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "narrow.h"

extern "C" {

// native_windows.py has the same fields. Sizes are in elements.
struct Rows {
  int64_t rows, width, slots, window, group;
  int64_t indices_step, values_step;  // from one row of the ring to the next
  int64_t threads;
  char* w;                     // (rows, width), as `weights` says
  const char* g;               // the same, as `grads` says
  int16_t* indices;            // (window, rows, slots), places in the blocks
  uint16_t* values;            // the same, bf16
  uint8_t* codes;              // (rows, width / 2)
  float *low, *high;           // (rows, width / group)
  const uint8_t* outside;      // (rows, width), what is no element, or null
  const uint8_t* surplus;      // (rows, slots), slots that are none, or null
  const int64_t* base;         // (rows), place in its block of the first column, or null
  const int64_t* first;        // (rows), index in its parameter of the first column, or null
  int8_t* rest;                // (rows, width), compensations of weights, or null
  const float *mean_weights, *square_weights;  // (window)
  int64_t row;                 // of the ring, that is written
  float decay, rate, eps;      // rate: minus the learning rate
  float push, kept;            // what is left is applied times push, and kept times kept,
  int32_t ascend, grads, weights, at_random;
  int32_t applies;             // if this is not 0
  uint32_t weight_salt;
};

}  // extern "C"

namespace {

// What one thread works in.
struct Scratch {
  std::vector<float> a, mean, square, grads, weights;
  std::vector<uint32_t> keys, largest, found;  // of columns, of classes of columns, of candidates
  std::vector<int32_t> columns;                // of candidates, or of what the window has
  std::vector<int32_t> touched;  // 1 + place in mean and square, of each column; 0 for none
  std::vector<uint8_t> codes;

  explicit Scratch(const Rows& s)
      : a(s.width), mean(s.window * s.slots), square(s.window * s.slots), grads(s.group),
        weights(s.width), keys(s.width),
        largest(s.width), found(s.width), columns(std::max(s.width, s.window * s.slots)),
        touched(s.width), codes(s.group) {}
};

inline float from_bf16(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}

// To nearest, ties to even.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// What a group's codes stand for: (code - zero) * unit + base (micro_adam/quantize.py).
struct Grid {
  float unit, divisor, zero, base;

  Grid(float low, float high) : unit((high - low) / 15.0f), divisor(unit == 0.0f ? 1.0f : unit) {
    const bool around = low <= 0.0f && high >= 0.0f;
    zero = around ? std::min(std::floor(-low / divisor + 0.5f), 15.0f) : 0.0f;
    base = around ? 0.0f : low;
  }
};

// a = error + gradient. keys: bits of the magnitude, which are in its order and NaN's largest, plus
// 1; 0 for what is no element.
void accumulate(const Rows& s, int64_t row, Scratch& x) {
  const int64_t groups = s.width / s.group;
  uint8_t* codes = x.codes.data();
  for (int64_t i = 0; i < groups; ++i) {
    const Grid grid(s.low[row * groups + i], s.high[row * groups + i]);
    const float unit = grid.unit, zero = grid.zero, base = grid.base;
    const char* kept = s.g + (row * s.width + i * s.group) * size_of(s.grads);
    const float* g = read_floats(s.grads, kept, nullptr, static_cast<int>(s.group), x.grads.data());
    const uint8_t* packed = s.codes + (row * groups + i) * (s.group / 2);
    float* a = x.a.data() + i * s.group;
    uint32_t* keys = x.keys.data() + i * s.group;
    for (int64_t j = 0; j < s.group / 2; ++j) {
      codes[2 * j] = packed[j] & 15;
      codes[2 * j + 1] = packed[j] >> 4;
    }
    if (s.ascend) {
#pragma omp simd
      for (int64_t j = 0; j < s.group; ++j) a[j] = (codes[j] - zero) * unit + base - g[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < s.group; ++j) a[j] = (codes[j] - zero) * unit + base + g[j];
    }
    std::memcpy(keys, a, s.group * sizeof(float));
#pragma omp simd
    for (int64_t j = 0; j < s.group; ++j) keys[j] = (keys[j] & 0x7fffffffU) + 1;
  }
  if (s.outside == nullptr) return;
  const uint8_t* outside = s.outside + row * s.width;
  for (int64_t j = 0; j < s.width; ++j) {
    if (outside[j]) x.a[j] = 0, x.keys[j] = 0;
  }
}

int64_t count_from(const uint32_t* keys, int64_t size, uint32_t least) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t j = 0; j < size; ++j) count += keys[j] >= least;
  return count;
}

// The largest key that at least `count` keys reach; or one that exactly so many do.
uint32_t threshold(const uint32_t* keys, int64_t size, int64_t count) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < size; ++j) largest = std::max(largest, keys[j]);
  uint32_t reached = 0, missed = largest + 1;
  while (missed - reached > 1) {
    const uint32_t middle = reached + (missed - reached) / 2;
    const int64_t found = count_from(keys, size, middle);
    if (found == count) return middle;
    (found > count ? reached : missed) = middle;
  }
  return reached;
}

// Columns, with their keys, that the `count` largest are among: in classes, of columns that are so
// many apart, those of at least that many classes' largest key. Returns their number.
int64_t candidates(const Rows& s, int64_t count, Scratch& x) {
  int64_t classes = 64;
  while (classes < 4 * count) classes *= 2;
  classes = std::min(classes, s.width);
  const uint32_t* keys = x.keys.data();
  uint32_t* largest = x.largest.data();
  std::copy_n(keys, classes, largest);
  for (int64_t first = classes; first < s.width; first += classes) {
    const int64_t size = std::min(classes, s.width - first);
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) largest[j] = std::max(largest[j], keys[first + j]);
  }
  const uint32_t least = threshold(largest, classes, count);
  int64_t found = 0;
  for (int64_t c = 0; c < classes; ++c) {
    if (largest[c] < least) continue;
    for (int64_t j = c; j < s.width; j += classes) {
      x.found[found] = keys[j];
      x.columns[found] = static_cast<int32_t>(j);
      found += keys[j] >= least;
    }
  }
  return found;
}

// Moves the largest entries to row s.row of the ring, and leaves 0 where they were.
void take_largest(const Rows& s, int64_t row, Scratch& x) {
  int64_t count = s.slots;
  if (s.surplus != nullptr) {
    const uint8_t* surplus = s.surplus + row * s.slots;
    count = std::count(surplus, surplus + s.slots, 0);
  }
  const int64_t base = s.base == nullptr ? 0 : s.base[row];
  int16_t* indices = s.indices + s.row * s.indices_step + row * s.slots;
  uint16_t* values = s.values + s.row * s.values_step + row * s.slots;
  const int64_t found = candidates(s, count, x);
  const uint32_t least = threshold(x.found.data(), found, count);
  int64_t ties = count - count_from(x.found.data(), found, least + 1), taken = 0;
  for (int64_t i = 0; i < found && taken < count; ++i) {
    if (x.found[i] < least || (x.found[i] == least && ties-- <= 0)) continue;
    const int32_t column = x.columns[i];
    indices[taken] = static_cast<int16_t>(base + column);
    values[taken++] = to_bf16(x.a[column]);
    x.a[column] = 0.0f;
  }
  // Slots that hold nothing name a place that the row has.
  std::fill(indices + count, indices + s.slots, static_cast<int16_t>(base));
  std::fill(values + count, values + s.slots, uint16_t{0});
}

// What is left as codes between each group's minimum and maximum (micro_adam/quantize.py). Where a part
// of it is applied, a becomes what the codes read as, and the ranges shrink.
void keep_error(const Rows& s, int64_t row, Scratch& x) {
  const int64_t groups = s.width / s.group;
  uint8_t* codes = x.codes.data();
  const bool framed = s.outside != nullptr;
  for (int64_t i = 0; i < groups; ++i) {
    const float* cells = x.a.data() + i * s.group;
    const uint32_t* inside = x.keys.data() + i * s.group;
    float low = INFINITY, high = -INFINITY;
    int32_t unknown = 0;
    if (framed) {
      for (int64_t j = 0; j < s.group; ++j) {
        if (inside[j] == 0) continue;
        low = std::min(low, cells[j]), high = std::max(high, cells[j]);
        unknown |= cells[j] != cells[j];
      }
    } else {
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : unknown)
      for (int64_t j = 0; j < s.group; ++j) {
        low = cells[j] < low ? cells[j] : low;
        high = cells[j] > high ? cells[j] : high;
        unknown |= cells[j] != cells[j];
      }
    }
    if (unknown) low = high = NAN;
    s.low[row * groups + i] = low;
    s.high[row * groups + i] = high;
    const Grid grid(low, high);
    const float divisor = grid.divisor, zero = grid.zero, base = grid.base;
#pragma omp simd
    for (int64_t j = 0; j < s.group; ++j) {
      const float code = std::floor((cells[j] - base) / divisor + zero + 0.5f);
      // NaN is not more than 0.
      codes[j] = static_cast<uint8_t>(static_cast<int>(code > 0.0f ? std::min(code, 15.0f) : 0.0f));
    }
    if (framed) {
      for (int64_t j = 0; j < s.group; ++j) codes[j] = inside[j] == 0 ? 0 : codes[j];
    }
    uint8_t* packed = s.codes + (row * groups + i) * (s.group / 2);
#pragma omp simd
    for (int64_t j = 0; j < s.group / 2; ++j) {
      packed[j] = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
    }
    if (s.applies) {
      const float unit = grid.unit;
      float* read = x.a.data() + i * s.group;
#pragma omp simd
      for (int64_t j = 0; j < s.group; ++j) read[j] = (codes[j] - zero) * unit + base;
      s.low[row * groups + i] = ((0.0f - zero) * unit + base) * s.kept;
      s.high[row * groups + i] = ((15.0f - zero) * unit + base) * s.kept;
    }
  }
}

// The moments of the columns that the window has, and the weights. Elsewhere both moments are 0.
void move_weights(const Rows& s, int64_t row, Scratch& x) {
  const int64_t base = s.base == nullptr ? 0 : s.base[row];
  int32_t found = 0;
  for (int64_t r = 0; r < s.window; ++r) {
    const int16_t* indices = s.indices + r * s.indices_step + row * s.slots;
    const uint16_t* values = s.values + r * s.values_step + row * s.slots;
    const float mean_weight = s.mean_weights[r], square_weight = s.square_weights[r];
    for (int64_t j = 0; j < s.slots; ++j) {
      const float value = from_bf16(values[j]);
      if (value == 0.0f) continue;
      const int32_t column = static_cast<int32_t>(indices[j] - base);
      int32_t at = x.touched[column];
      if (at == 0) {
        x.columns[found] = column;
        x.mean[found] = x.square[found] = 0.0f;
        x.touched[column] = at = ++found;
      }
      x.mean[at - 1] += value * mean_weight;
      x.square[at - 1] += (value * value) * square_weight;
    }
  }
  char* kept = s.w + row * s.width * size_of(s.weights);
  int8_t* rest = s.rest == nullptr ? nullptr : s.rest + row * s.width;
  const int width = static_cast<int>(s.width);
  float* w = x.weights.data();
  if (s.weights == kFp32) {
    w = reinterpret_cast<float*>(kept);
  } else {
    read_floats(s.weights, kept, rest, width, w);
  }
  if (s.decay != 1.0f) {
#pragma omp simd
    for (int64_t j = 0; j < s.width; ++j) w[j] *= s.decay;
  }
  if (s.applies) {
    const float* left = x.a.data();
#pragma omp simd
    for (int64_t j = 0; j < s.width; ++j) w[j] += s.push * left[j];
  }
#pragma omp simd
  for (int32_t i = 0; i < found; ++i) {
    x.mean[i] = s.rate * (x.mean[i] / (std::sqrt(x.square[i]) + s.eps));
  }
  for (int32_t i = 0; i < found; ++i) {
    w[x.columns[i]] += x.mean[i];
    x.touched[x.columns[i]] = 0;
  }
  const uint32_t first = s.first == nullptr ? 0U : static_cast<uint32_t>(s.first[row]);
  write_floats(s.weights, kept, rest, width, w, first, s.at_random != 0, s.weight_salt);
}

}  // namespace

extern "C" void window_step(const Rows* all) {
  const Rows& s = *all;
#pragma omp parallel num_threads(s.threads)
  {
    Scratch x(s);
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < s.rows; ++row) {
      accumulate(s, row, x);
      take_largest(s, row, x);
      keep_error(s, row, x);
      move_weights(s, row, x);
    }
  }
}
