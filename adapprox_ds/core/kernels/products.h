// SPDX-License-Identifier: Apache-2.0
//
// Numbers whose products are added up in fp32. Where a CPU multiplies pairs of bf16
// numbers (AVX512-BF16) that is twice as fast as fp32; elsewhere, and with -DADAPPROX_FP32_PRODUCTS,
// they are fp32 and a pair is one number.
#pragma once

#if defined(__AVX512BF16__) && !defined(ADAPPROX_FP32_PRODUCTS)
#define BF16_PRODUCTS
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

#ifdef BF16_PRODUCTS

typedef uint16_t Operand;    // one number
constexpr int kPair = 2;    // how many are multiplied in one lane
typedef int16_t Operands __attribute__((vector_size(64)));

inline Operands load_operands(const Operand* p) {
  Operands v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Rounds to nearest; subnormal numbers become 0.
inline void store_operands(Operand* p, Vec v) {
  const auto rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &rounded, sizeof rounded);
}

inline float value_of(Operand x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// One pair in every lane.
inline Operands pair_everywhere(const Operand* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<Operands>(_mm512_set1_epi32(pair));
}

// Pairs of the numbers of two rows: those of the first kLanes columns, then those of the others.
inline void store_pairs(Operand* to, Operands row, Operands next) {
  alignas(64) static constexpr int16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i a = reinterpret_cast<__m512i>(row), b = reinterpret_cast<__m512i>(next);
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
}

// sum + a b, over the pairs in a lane.
inline Vec add_products(Vec sum, Operands a, Operands b) {
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                reinterpret_cast<__m512bh>(a),
                                                reinterpret_cast<__m512bh>(b)));
}

#else

typedef float Operand;
constexpr int kPair = 1;
typedef Vec Operands;

inline Operands load_operands(const Operand* p) { return load(p); }
inline void store_operands(Operand* p, Vec v) { store(p, v); }
inline float value_of(Operand x) { return x; }
inline Operands pair_everywhere(const Operand* p) { return Vec{} + *p; }
inline Vec add_products(Vec sum, Operands a, Operands b) { return sum + a * b; }

#endif

constexpr int kOperands = kLanes * kPair;  // numbers in a vector

}  // namespace
