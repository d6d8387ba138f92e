// SPDX-License-Identifier: Apache-2.0
//
// What native.cpp works on: blocks of matrices and dense runs, and the first moment as it is kept:
// in fp32, bf16 or codes. native_pass.py has the same structures; narrow.h has 16-bit numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "narrow.h"

namespace {

constexpr int kPad = 32;               // columns of packed operands are a multiple of it
constexpr int kRows = 8, kCols = 128;  // of a tile; a row of one is a group of codes
constexpr float kLargestCode = 127, kInverseSquare = 1.0 / (127 * 127), kSmallestScale = 0x1p-110f;

}  // namespace

extern "C" {

// How first moments are kept: quantized.py and rounding.py have the formulas.
enum Kept : int32_t { kNone = 0, kFloat = 1, kBrain = 2, kCodes = 3 };

// The numbers of a step; interface.py says what they are.
struct Step {
  float beta1, gain;               // gain: 1 - beta_1 with the sign of g
  float beta2, rest2;              // rest2: 1 - beta_2
  float of_mean, of_new;           // what is applied: of_mean m + of_new (g or update)
  float correction, eps, largest;  // largest quotient, before the clip
  float decay, rate;               // w <- decay w + rate (what is applied)
  int32_t of_gradients, write, measure;
  int32_t kept;                    // a Kept
  uint32_t salt;                   // of random rounding
  int32_t grads, weights;          // a Format each
  int32_t at_random;               // whether weights are rounded so
  uint32_t weight_salt;
  int32_t threads;
};

// B blocks of one shape. Element (i, j) of one lies at i * cols + j - skip of its g, m and w: the
// first row may lack its first `skip` elements and the last row its last `missing`.
struct Stack {
  int64_t blocks, rows, cols, skip, missing, rank;
  int64_t width, tests;     // columns of x and of z; 0 where there is none
  int64_t padded;           // cols, padded; by kPad more where skip > 0, which tiles then start at
  int64_t chunk;            // rows of a chunk, a multiple of kRows
  int64_t first_unit;       // chunks of the stacks before
  const char* const* g;     // blocks x (elements), as `grads` says
  void* const* m;           // the same, as `kept` says
  float* const* scales;     // of codes: blocks x (groups)
  char* const* w;           // blocks x (elements), as `weights` says
  int8_t* const* rest;      // compensations of these, or null
  const int64_t* first;     // blocks: the index in its matrix of the first element of w
  const float* q;           // (blocks, rows, rank)
  const float* u;           // (blocks, cols, rank)
  const float* floor_rows;  // (blocks, rows), or null
  const float* floor_cols;  // (blocks, cols), or null
  const float* energies;    // (blocks, cols): what V counts in row_energies
  const float* x;           // (blocks, cols, width)
  const float* z;           // (blocks, rows, tests)
  const float* clip;        // (blocks), or null
  float* y;                 // (blocks, rows, width) = root x
  float* p;                 // (blocks, chunks, tests, padded); the first chunk's is z^T root
  double* row_energies;     // (blocks, rows)
  double* squares;          // (blocks, chunks): of G / D
  float* packed;            // (blocks, rank + width + 2, padded): scratch, see pack()
};

// What a stack's sketches are made of and into; algebra.py has the formulas.
struct Sketches {
  int64_t blocks, rows, cols, rank, width, tests;
  int64_t first, matrix_rows;  // index in the whole matrix of the first row; rows of that
  const float* q;              // (blocks, rows, rank)
  const float* u;              // (blocks, cols, rank)
  const double* gram_q;        // (blocks, rank, rank), of all rows; so is gram_u
  const double* gram_u;
  const int64_t* keys_x;       // (blocks)
  const int64_t* keys_z;
  float* x;                    // (blocks, cols, width)
  float* z;                    // (blocks, rows, tests)
  float* row_weights;          // (blocks, rows)
  float* col_weights;          // (blocks, cols)
  float* floor_rows;           // (blocks, rows), or null
  float* floor_cols;           // (blocks, cols)
  float floor;
  int32_t balanced, threads;
};

// Elements whose second moment is dense. Every field takes eight bytes.
struct Run {
  int64_t numel, first;  // first: the index in its parameter of the first element
  const char* g;
  void* m;
  float* scales;
  char* w;
  int8_t* rest;  // or null
  float* v;
  const float* clip;  // or null
  double* square;
};

}  // extern "C"

namespace {

inline int64_t chunks_of(const Stack& s) { return (s.rows + s.chunk - 1) / s.chunk; }

// Where a row of elements lies, and its first moment in whatever form it is kept.
struct Elements {
  const char* g;
  char* w;
  int8_t* rest;
  void* m;
  float* scale;    // of its group of codes
  uint32_t index;  // in the matrix, of the first element
};

inline int mean_size(int32_t kept) {
  return kept == kFloat ? 4 : kept == kBrain ? 2 : kept == kCodes ? 1 : 0;
}

// A row of the first moment in fp32: where it is kept, or decoded into the buffer.
inline float* load_mean(int32_t kept, const Elements& row, int count, float* buffer) {
  if (kept == kFloat) return static_cast<float*>(row.m);
  if (kept == kBrain) {
    const uint16_t* from = static_cast<const uint16_t*>(row.m);
    uint32_t bits[kCols];
    for (int j = 0; j < count; ++j) bits[j] = static_cast<uint32_t>(from[j]) << 16;
    std::memcpy(buffer, bits, count * sizeof(float));
  } else if (kept == kCodes) {
    const int8_t* codes = static_cast<const int8_t*>(row.m);
    const float scale = *row.scale;
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const int code = codes[j];
      buffer[j] = static_cast<float>(code < 0 ? -code * code : code * code) * kInverseSquare * scale;
    }
  }
  return buffer;
}

// The inverse of load_mean; rounds to bf16 at random, to codes to nearest.
inline void keep_mean(int32_t kept, const Elements& row, int count, const float* mean, uint32_t salt) {
  if (kept == kBrain) {
    uint16_t* to = static_cast<uint16_t*>(row.m);
    uint32_t bits[kCols];
    std::memcpy(bits, mean, count * sizeof(float));
    for (int j = 0; j < count; ++j) {
      const uint32_t noise = noise_of(row.index + j, salt);
      const bool special = (bits[j] & 0x7f800000U) == 0x7f800000U;
      to[j] = static_cast<uint16_t>((bits[j] + (special ? 0U : noise)) >> 16);
    }
  } else if (kept == kCodes) {
    int8_t* codes = static_cast<int8_t*>(row.m);
    // Without their sign, floats are in the order of their bits, infinity and NaN last.
    uint32_t bits[kCols], most = 0;
    std::memcpy(bits, mean, count * sizeof(float));
#pragma omp simd reduction(max : most)
    for (int j = 0; j < count; ++j) most = std::max(most, bits[j] & 0x7fffffffU);
    const bool finite = most < 0x7f800000U;
    float largest;
    std::memcpy(&largest, &most, sizeof(float));
    if (largest < kSmallestScale) largest = 0;
    *row.scale = finite ? largest : NAN;
    const float divisor = finite && largest > 0 ? largest : INFINITY;
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const float code = std::nearbyint(kLargestCode * std::sqrt(std::fabs(mean[j]) / divisor));
      codes[j] = static_cast<int8_t>(finite ? std::copysign(code, mean[j]) : 0.0f);
    }
  }
}

}  // namespace
