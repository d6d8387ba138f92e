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

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "narrow.h"
#include "vectors.h"

namespace {

constexpr int kPad = 32;               // columns of packed operands are a multiple of it
constexpr int kRows = 16, kCols = 128;  // of a tile; a row of one is a group of codes
constexpr float kLargestCode = 127, kInverseSquare = 1.0 / (127 * 127), kSmallestScale = 0x1p-110f;
// Of 4-bit codes: fp32 numbers as in adapprox/quantized.py, by the bits of a code; and the
// distances between them.
constexpr float kLevels[16] = {
    0, 0x1.ba539p-5f, 0x1.38c5a2p-3f, 0x1.1f4ca8p-2f, 0x1.ba539p-2f, 0x1.3515c2p-1f,
    0x1.964d82p-1f, 1, -1, -1, -0x1.964d82p-1f, -0x1.3515c2p-1f,
    -0x1.ba539p-2f, -0x1.1f4ca8p-2f, -0x1.38c5a2p-3f, -0x1.ba539p-5f};
constexpr float kGaps[8] = {0x1.ba539p-5f, 0x1.94617cp-4f, 0x1.05d3aep-3f, 0x1.360ddp-3f,
                            0x1.5fafe8p-3f, 0x1.84dfp-3f, 0x1.a6c9f8p-3f, INFINITY};

}  // namespace

extern "C" {

// How first moments are kept: quantized.py and rounding.py have the formulas.
enum Kept : int32_t { kNone = 0, kFloat = 1, kBrain = 2, kCodes = 3, kNibbles = 4 };

// The numbers of a step; interface.py says what they are.
struct Step {
  float beta1, gain;               // gain: 1 - beta_1 with the sign of g
  float beta2, rest2;              // rest2: 1 - beta_2
  float of_mean, of_new;           // what is applied: of_mean m + of_new (g or update)
  float correction, eps, largest;  // largest quotient, before the clip
  float decay, rate;               // decay: 1 - lr weight_decay; w <- decay w + rate (what is applied)
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
  float* z;                 // (blocks, rows, tests); rounded to what the products take
  const float* clip;        // (blocks), or null
  float* y;                 // (blocks, rows, width) = root x
  float* p;                 // (blocks, chunks, tests, padded); the first chunk's is z^T root
  double* row_energies;     // (blocks, rows)
  double* squares;          // (blocks, chunks): of G / D
  float* packed;            // (blocks, rank + columns_of_x + 2, padded): scratch, see pack()
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
  float* row_squares;          // (blocks, rows): D_r^2
  float* col_squares;          // (blocks, cols): D_c^2
  float* floor_rows;           // (blocks, rows), or null
  float* floor_cols;           // (blocks, cols)
  float floor;
  int32_t threads;
};

// What the small matrices of a stack are made of and into; algebra.py's equation 3.
struct Products {
  int64_t blocks, rows, width, tests;
  int64_t first;              // the first row that counts in G and H
  int64_t cols;               // of p
  int64_t p_block, p_row;     // floats from a block's p to the next one's, and from row to row
  int64_t squares_block;      // floats from a block's col_squares to the next one's
  const float* y;             // (blocks, rows, width)
  const float* z;             // (blocks, rows, tests)
  const float* p;             // (blocks, tests, cols)
  const double* row_squares;  // (blocks, rows), or null for 1
  const double* energies;     // (blocks, rows), or null for 0
  const float* col_squares;   // (blocks, cols)
  double* sums;               // (blocks, width^2 + tests width + 1): G, H and the sum of energies
  double* s;                  // (blocks, tests^2)
  int64_t threads;
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

// A row of a wide sketch fills vectors, and is padded to kPad numbers; narrow ones are transposed.
inline bool is_wide(const Stack& s) { return s.width > kPad; }
inline int64_t columns_of_x(const Stack& s) {
  return is_wide(s) ? (s.width + kPad - 1) / kPad * kPad : s.width;
}

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

inline bool is_coded(int32_t kept) { return kept == kCodes || kept == kNibbles; }
inline int64_t nibble_bytes(int64_t columns) { return (columns + 1) / 2; }

// to[j] = levels[codes[j]], of 16 levels.
inline void look_up(const float* levels, const int32_t* codes, int count, float* to) {
  int j = 0;
#ifdef __AVX2__
  const __m256 low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8);
  for (; j + 8 <= count; j += 8) {
    const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j));
    const __m256 upper = _mm256_castsi256_ps(_mm256_cmpgt_epi32(code, _mm256_set1_epi32(7)));
    // Permutations look at the three lowest bits of a code.
    const __m256 one = _mm256_permutevar8x32_ps(low, code), other = _mm256_permutevar8x32_ps(high, code);
    _mm256_storeu_ps(to + j, _mm256_blendv_ps(one, other, upper));
  }
#endif
  for (; j < count; ++j) to[j] = levels[codes[j]];
}

typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));

// As many codes of 8 bits as a vector has lanes.
inline Vec decoded(const int8_t* codes, float scale) {
#if defined(__AVX512F__)
  const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const Vec code = __builtin_convertvector(
      reinterpret_cast<Bits>(_mm512_maskz_cvtepi8_epi32(0xffff, some)), Vec);
#elif defined(__AVX2__)
  const __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const Vec code = __builtin_convertvector(reinterpret_cast<Bits>(_mm256_cvtepi8_epi32(some)), Vec);
#else
  typedef int8_t Codes __attribute__((vector_size(kLanes)));
  Codes some;
  std::memcpy(&some, codes, sizeof some);
  const Vec code = __builtin_convertvector(some, Vec);
#endif
  const Vec size = reinterpret_cast<Vec>(reinterpret_cast<Bits>(code) & 0x7fffffff);
  return code * size * kInverseSquare * scale;
}

// Without their sign, floats are in the order of their bits, infinity and NaN last.
inline Bits larger(Bits most, Vec x) {
  const Bits bits = reinterpret_cast<Bits>(x) & 0x7fffffff;
  return bits > most ? bits : most;
}

// A row of the first moment in fp32: where it is kept, or decoded into the buffer. Codes of 8 bits
// are left to decoded().
inline float* load_mean(int32_t kept, const Elements& row, int count, float* buffer) {
  if (kept == kFloat) return static_cast<float*>(row.m);
  if (kept == kBrain) {
    const uint16_t* from = static_cast<const uint16_t*>(row.m);
    uint32_t bits[kCols];
    for (int j = 0; j < count; ++j) bits[j] = static_cast<uint32_t>(from[j]) << 16;
    std::memcpy(buffer, bits, count * sizeof(float));
  } else if (kept == kNibbles) {
    const uint8_t* pairs = static_cast<const uint8_t*>(row.m);
    const float scale = *row.scale;
    float levels[16];
    for (int i = 0; i < 16; ++i) levels[i] = kLevels[i] * scale;
    int32_t codes[kCols + 1];
    for (int j = 0; j < (count + 1) / 2; ++j) {
      codes[2 * j] = pairs[j] & 15;
      codes[2 * j + 1] = pairs[j] >> 4;
    }
    look_up(levels, codes, count, buffer);
  }
  return buffer;
}

// The scale of a group whose largest number of each lane is known, and what its elements are to be
// compared with: infinity where it has none.
inline float keep_scale(const Elements& row, Bits of_lanes) {
  uint32_t most = 0;
  for (int l = 0; l < kLanes; ++l) most = std::max(most, static_cast<uint32_t>(of_lanes[l]));
  const bool finite = most < 0x7f800000U;
  float largest = float_of(most);
  if (largest < kSmallestScale) largest = 0;
  *row.scale = finite ? largest : NAN;
  return finite && largest > 0 ? largest : INFINITY;
}

// The inverse of load_mean; rounds to bf16 and 4-bit codes at random, to 8-bit ones to nearest.
inline void keep_mean(int32_t kept, const Elements& row, int count, const float* mean, Bits largest,
                      uint32_t salt) {
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
    const float divisor = keep_scale(row, largest);
    const bool finite = !std::isnan(*row.scale);
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const float code = std::nearbyint(kLargestCode * std::sqrt(std::fabs(mean[j]) / divisor));
      codes[j] = static_cast<int8_t>(finite ? std::copysign(code, mean[j]) : 0.0f);
    }
  } else if (kept == kNibbles) {
    uint8_t* pairs = static_cast<uint8_t*>(row.m);
    const float most = keep_scale(row, largest);
    const bool finite = !std::isnan(*row.scale);
    float levels[16] = {}, gaps[16] = {};
    for (int i = 0; i < 8; ++i) levels[i] = most * kLevels[i], gaps[i] = most * kGaps[i];
    levels[0] = 0;  // not NaN, where the others are infinite
    const float l1 = levels[1], l2 = levels[2], l3 = levels[3], l4 = levels[4], l5 = levels[5],
                l6 = levels[6], l7 = levels[7];
    // Loop by loop over the row, so that compilers vectorise each.
    float below[kCols], gap[kCols];
    int32_t codes[kCols + 1];
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const float x = std::fabs(mean[j]);
      codes[j] = (x >= l1 ? 1 : 0) + (x >= l2 ? 1 : 0) + (x >= l3 ? 1 : 0) + (x >= l4 ? 1 : 0) +
                 (x >= l5 ? 1 : 0) + (x >= l6 ? 1 : 0) + (x >= l7 ? 1 : 0);
    }
    codes[count] = 0;
    look_up(levels, codes, count, below);
    look_up(gaps, codes, count, gap);
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const float chance = static_cast<float>(static_cast<int32_t>(noise_of(row.index + j, salt)));
      const int32_t code = codes[j] + (chance * 0x1p-16f * gap[j] < std::fabs(mean[j]) - below[j] ? 1 : 0);
      codes[j] = (mean[j] < 0.0f ? -code : code) & 15;
    }
    if (!finite) std::fill_n(codes, count, 0);
    for (int j = 0; j < (count + 1) / 2; ++j) {
      pairs[j] = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
    }
  }
}

}  // namespace
