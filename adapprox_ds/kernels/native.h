// SPDX-License-Identifier: Apache-2.0
//
// What native.cpp works on: a stack of blocks, a chunk of one block's rows, and the first moment as
// it is kept: in fp32, bf16 or codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int kPad = 32, kWidth = 16;  // of packed operands
constexpr int kRows = 8, kCols = 128;  // of a tile; a row of one is a group of codes
constexpr float kLargestCode = 127, kInverseSquare = 1.0 / (127 * 127), kSmallestScale = 0x1p-110f;

}  // namespace

extern "C" {

// How first moments are kept: quantized.py and rounding.py have the formulas.
enum Kept : int32_t { kFloat = 0, kBrain = 1, kCodes = 2 };

// What both passes need; native_passes.py has the same fields. Sizes are in elements.
struct Stack {
  int64_t blocks, rows, cols, rank;
  int64_t width;             // of the sketch or the basis, padded
  int64_t padded;            // cols, padded
  int64_t chunk;             // rows of a chunk, a multiple of kRows
  int64_t threads;
  const float* const* g;     // blocks x (rows, cols)
  void* const* m;            // the same, as `kept` says, or null
  float* const* scales;      // of codes: blocks x (rows, groups), else null
  const float* q;            // (blocks, rows, rank)
  const float* ut;           // (blocks, rank, padded), times sqrt(beta_2)
  const float* floor_rows;   // (blocks, rows)
  const float* floor_cols;   // (blocks, padded)
  float beta1, gain, rest2;  // gain: 1 - beta_1 with the sign of g; rest2: 1 - beta_2
  float of_mean, of_new;     // what is applied: of_mean m + of_new (g or update)
  float correction, eps, largest;  // largest quotient, before the clip
  int32_t of_gradients, clips;
  int32_t kept;              // a Kept
  uint32_t salt;             // of random rounding
};

}  // extern "C"

namespace {

int64_t chunks_of(const Stack& s) { return (s.rows + s.chunk - 1) / s.chunk; }

// One block of a stack, and the rows of one chunk of it.
struct Chunk {
  const Stack& s;
  int64_t block, first, last;
  const float *g, *q, *ut, *floor_rows, *floor_cols;
  char* m;  // or null, where there is none or a pass does without; so is w
  float *scales, *w;

  Chunk(const Stack& stack, int64_t unit, float* const* weights)
      : s(stack),
        block(unit / chunks_of(stack)),
        first(unit % chunks_of(stack) * stack.chunk),
        last(std::min(first + stack.chunk, stack.rows)),
        g(stack.g[block]),
        q(stack.q + block * stack.rows * stack.rank),
        ut(stack.ut + block * stack.rank * stack.padded),
        floor_rows(stack.floor_rows + block * stack.rows),
        floor_cols(stack.floor_cols + block * stack.padded),
        m(stack.m != nullptr ? static_cast<char*>(stack.m[block]) : nullptr),
        scales(stack.m != nullptr && stack.kept == kCodes ? stack.scales[block] : nullptr),
        w(weights == nullptr ? nullptr : weights[block]) {}

  int mean_size() const { return s.kept == kFloat ? 4 : s.kept == kBrain ? 2 : 1; }

  // Asks for the elements' cache lines: a tile's rows are too short for the CPU to foresee.
  void prefetch(int64_t at) const {
    __builtin_prefetch(g + at);
    if (m != nullptr) __builtin_prefetch(m + at * mean_size(), 1);
    if (w != nullptr) __builtin_prefetch(w + at, 1);
  }
};

float* scale_of(const Chunk& c, int64_t row, int64_t col) {
  return c.scales + row * ((c.s.cols + kCols - 1) / kCols) + col / kCols;
}

// A tile's row of the first moment in fp32: where it is kept, or decoded into the buffer.
float* load_mean(const Chunk& c, int64_t row, int64_t col, int count, float* buffer) {
  const int64_t at = row * c.s.cols + col;
  if (c.s.kept == kFloat) return reinterpret_cast<float*>(c.m) + at;
  if (c.s.kept == kBrain) {
    const uint16_t* kept = reinterpret_cast<const uint16_t*>(c.m) + at;
    uint32_t bits[kCols];
    for (int j = 0; j < count; ++j) bits[j] = static_cast<uint32_t>(kept[j]) << 16;
    std::memcpy(buffer, bits, count * sizeof(float));
  } else {
    const int8_t* codes = reinterpret_cast<const int8_t*>(c.m) + at;
    const float scale = *scale_of(c, row, col);
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const int code = codes[j];
      buffer[j] = static_cast<float>(code < 0 ? -code * code : code * code) * kInverseSquare * scale;
    }
  }
  return buffer;
}

inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

// The inverse of load_mean; rounds to bf16 at random, to codes to nearest.
void keep_mean(const Chunk& c, int64_t row, int64_t col, int count, const float* mean) {
  const int64_t at = row * c.s.cols + col;
  if (c.s.kept == kBrain) {
    uint16_t* kept = reinterpret_cast<uint16_t*>(c.m) + at;
    uint32_t bits[kCols];
    std::memcpy(bits, mean, count * sizeof(float));
    for (int j = 0; j < count; ++j) {
      const uint32_t index = static_cast<uint32_t>(at) + j;
      const uint32_t noise = mixed(index * 0x9e3779b9U + c.s.salt) & 0xffffU;
      const bool special = (bits[j] & 0x7f800000U) == 0x7f800000U;
      kept[j] = static_cast<uint16_t>((bits[j] + (special ? 0U : noise)) >> 16);
    }
  } else if (c.s.kept == kCodes) {
    int8_t* codes = reinterpret_cast<int8_t*>(c.m) + at;
    // Without their sign, floats are in the order of their bits, infinity and NaN last.
    uint32_t bits[kCols], most = 0;
    std::memcpy(bits, mean, count * sizeof(float));
#pragma omp simd reduction(max : most)
    for (int j = 0; j < count; ++j) most = std::max(most, bits[j] & 0x7fffffffU);
    const bool finite = most < 0x7f800000U;
    float largest;
    std::memcpy(&largest, &most, sizeof(float));
    if (largest < kSmallestScale) largest = 0;
    *scale_of(c, row, col) = finite ? largest : NAN;
    const float divisor = finite && largest > 0 ? largest : INFINITY;
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const float code = std::nearbyint(kLargestCode * std::sqrt(std::fabs(mean[j]) / divisor));
      codes[j] = static_cast<int8_t>(finite ? std::copysign(code, mean[j]) : 0.0f);
    }
  }
}

}  // namespace
