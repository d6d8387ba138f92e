// SPDX-License-Identifier: Apache-2.0
//
// Weights and gradients in 16 bits: read as fp32, and written back to nearest, at random, or with a
// compensation of eight more bits. core/rounding.py has the formulas; the bits are the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// How an element is kept.
enum Format : int32_t { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

inline int size_of(int32_t format) { return format == kFp32 ? 4 : 2; }

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

// 16 random bits of an element.
inline uint32_t noise_of(uint32_t index, uint32_t salt) {
  return mixed(index * 0x9e3779b9U + salt) & 0xffffU;
}

// Of a 16-bit format: bits of an fp32 magnitude beyond it, the difference of the exponents in such
// bits, the least normal number's, and its own largest finite one.
template <int format>
struct Narrow {
  static constexpr uint32_t kDropped = format == kBf16 ? 16 : 13;
  static constexpr uint32_t kBias = format == kBf16 ? 0 : 112U << 23;
  static constexpr uint32_t kNormal = format == kBf16 ? 0 : 113U << 23;
  static constexpr uint32_t kLargest = format == kBf16 ? 0x7f7f : 0x7bff;
  static constexpr uint32_t kInfinity = format == kBf16 ? 0x7f80 : 0x7c00;
};

constexpr uint32_t kMore = 8;  // bits of a compensation

template <int format, bool compensated>
inline void read_narrow(const uint16_t* from, const int8_t* rest, int count, float* to) {
  using F = Narrow<format>;
  constexpr uint32_t more = compensated ? kMore : 0, drop = F::kDropped - more;
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const uint32_t magnitude = from[j] & 0x7fffU, sign = (from[j] & 0x8000U) << 16;
    const uint32_t units = (magnitude << more) + (compensated ? static_cast<uint32_t>(rest[j]) : 0U);
    float x = float_of((units << drop) + F::kBias);
    if (format == kFp16) {
      // 2^-24 is fp16's smallest number.
      const float small = static_cast<float>(static_cast<int32_t>(units)) * (compensated ? 0x1p-32f : 0x1p-24f);
      x = units < ((F::kNormal - F::kBias) >> drop) ? small : x;
      x = magnitude > F::kLargest ? float_of((magnitude << F::kDropped) | 0x7f800000U) : x;
    } else if (compensated) {
      x = magnitude > F::kLargest ? float_of(magnitude << F::kDropped) : x;
    }
    to[j] = float_of(bits_of(x) | sign);
  }
}

template <int format, bool compensated, bool at_random>
inline void write_narrow(uint16_t* to, int8_t* rest, int count, const float* from, uint32_t index,
                         uint32_t salt) {
  using F = Narrow<format>;
  constexpr uint32_t more = compensated ? kMore : 0, drop = F::kDropped - more;
  constexpr bool to_even = !compensated && !at_random;
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const uint32_t bits = bits_of(from[j]), magnitude = bits & 0x7fffffffU;
    uint32_t noise = 1U << (drop - 1);
    if (at_random) noise = noise_of(index + j, salt) & ((1U << drop) - 1);
    if (to_even) noise = noise - 1 + ((magnitude >> drop) & 1U);
    uint32_t units = (magnitude - F::kBias + noise) >> drop;
    if (format == kFp16) {
      // Below the normal numbers the places are those of a fixed point.
      const float parts = std::min(float_of(magnitude), 1.0f) * (compensated ? 0x1p32f : 0x1p24f);
      const float moved = to_even ? std::nearbyint(parts)
                                  : parts + static_cast<float>(static_cast<int32_t>(noise)) / (1U << drop);
      units = magnitude < F::kNormal ? static_cast<uint32_t>(static_cast<int32_t>(moved)) : units;
    }
    uint32_t kept = compensated ? (units + (1U << (kMore - 1))) >> kMore : units;
    kept = std::min(kept, to_even ? F::kInfinity : F::kLargest);
    // Infinity, and NaN with a bit that does not get lost.
    const bool special = magnitude >= 0x7f800000U;
    const uint32_t quiet = F::kInfinity | (magnitude > 0x7f800000U ? (F::kInfinity >> 1) & ~F::kInfinity & 0x7fffU : 0U);
    kept = special ? quiet : kept;
    to[j] = static_cast<uint16_t>(kept | ((bits >> 16) & 0x8000U));
    if (compensated) {
      const int32_t left = static_cast<int32_t>(units) - static_cast<int32_t>(kept << kMore);
      rest[j] = static_cast<int8_t>(special ? 0 : std::min(left, 127));
    }
  }
}

// Elements in fp32: where they are, or converted into the buffer.
inline const float* read_floats(int32_t format, const char* from, const int8_t* rest, int count,
                                float* buffer) {
  if (format == kFp32) return reinterpret_cast<const float*>(from);
  const uint16_t* narrow = reinterpret_cast<const uint16_t*>(from);
  if (format == kBf16) {
    rest == nullptr ? read_narrow<kBf16, false>(narrow, rest, count, buffer)
                    : read_narrow<kBf16, true>(narrow, rest, count, buffer);
  } else {
    rest == nullptr ? read_narrow<kFp16, false>(narrow, rest, count, buffer)
                    : read_narrow<kFp16, true>(narrow, rest, count, buffer);
  }
  return buffer;
}

template <int format>
inline void write_as(uint16_t* to, int8_t* rest, int count, const float* from, uint32_t index,
                     bool at_random, uint32_t salt) {
  if (rest != nullptr) {
    at_random ? write_narrow<format, true, true>(to, rest, count, from, index, salt)
              : write_narrow<format, true, false>(to, rest, count, from, index, salt);
  } else {
    at_random ? write_narrow<format, false, true>(to, rest, count, from, index, salt)
              : write_narrow<format, false, false>(to, rest, count, from, index, salt);
  }
}

// The inverse of read_floats for a buffer; index is that of the first element in its parameter.
inline void write_floats(int32_t format, char* to, int8_t* rest, int count, const float* from,
                         uint32_t index, bool at_random, uint32_t salt) {
  uint16_t* narrow = reinterpret_cast<uint16_t*>(to);
  if (format == kBf16) write_as<kBf16>(narrow, rest, count, from, index, at_random, salt);
  if (format == kFp16) write_as<kFp16>(narrow, rest, count, from, index, at_random, salt);
}

}  // namespace
