// SPDX-License-Identifier: Apache-2.0
//
// The pass on CPUs: an element is loaded once, V stays in the first-level cache, and all threads
// share all blocks of all shapes. interface.py says what it computes, native_pass.py calls it.
//
// Matrices are row-major fp32; the columns of packed operands are padded with zeros to a multiple
// of kPad. Rows are cut into chunks that depend on the shape alone, and what chunks reduce to is
// added up in order: a result depends neither on the number of threads nor on who was first.

#include "native.h"
#include "products.h"

#include <limits>
#include <memory>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

// Compilers would load a vector that is used twice twice, and loads are what bounds the products.
inline Vec loaded(const float* p) {
  Vec v = load(p);
#ifdef __x86_64__
  asm("" : "+v"(v));
#endif
  return v;
}

// At most this many columns of a factor, and rows of a tile, are in registers at a time.
constexpr int kGroup = 5;
constexpr int kSketchGroup = kLanes == 16 ? 5 : 3, kHeld = kLanes == 16 ? 8 : 4;
// What a span of columns reads and writes again for each band of rows is at most so many bytes, and
// so stays in a core's second-level cache.
constexpr int64_t kSpanBytes = 384 << 10, kLongestSpan = 2048;
// So many columns of a band are asked for at a time: memory is slow where rows of less are wanted.
constexpr int64_t kPanel = 512;

// A vector of at most kLanes numbers, the rest 0, and back.
inline Vec some(const float* p, int count) {
  alignas(64) float buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(float));
  return load(buffer);
}
inline void keep_some(float* p, Vec v, int count) { std::memcpy(p, &v, count * sizeof(float)); }

// Calls work(std::integral_constant<n>, first) for groups that cover `count` evenly.
template <int kMost = kGroup, class Work>
void in_groups(int64_t count, Work work) {
  const int64_t groups = (count + kMost - 1) / kMost;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t first = count * i / groups;
    switch (count * (i + 1) / groups - first) {
      case 1: work(std::integral_constant<int, 1>(), first); break;
      case 2: work(std::integral_constant<int, 2>(), first); break;
      case 3: work(std::integral_constant<int, 3>(), first); break;
      case 4: work(std::integral_constant<int, 4>(), first); break;
      default: work(std::integral_constant<int, 5>(), first);
    }
  }
}

// What the root is multiplied by where it is rounded as an operand of a product, and both sketches are
// divided by. A step begins with what the last one made of the root, which has hardly changed since:
// numbers rounded alike in each step would drift by more than the gradients move them. So every step
// has another.
inline float lift_of(const Step& s) {
  return kPair == 1 ? 1.0f : 1.0f + static_cast<float>(s.salt >> 9) * 0x1p-23f;
}

// The numbers of a row as operands, side by side with those of the other row of a pair.
inline void pack_row(const float* from, int64_t count, float lift, Operand* to) {
  for (int64_t l = 0; l < count; l += kLanes) {
    const int here = static_cast<int>(std::min<int64_t>(kLanes, count - l));
    Operand rounded[kLanes];
    store_operands(rounded, some(from + l, here) / lift);
    for (int c = 0; c < here; ++c) to[(l + c) * kPair] = rounded[c];
  }
}

// Transposes and pads what the pass reads along a row: U and the floor, each times sqrt(beta_2) so that
// their squares have beta_2; what V counts; and x, of which a wide one is packed by pairs of rows.
void pack(const Stack& s, int64_t block, float root_beta2, float lift) {
  const int64_t n = s.cols, padded = s.padded;
  float* to = s.packed + block * (s.rank + columns_of_x(s) + 2) * padded;
  const auto transpose = [&](const float* from, int64_t columns, float scale) {
    for (int64_t l = 0; l < columns; ++l, to += padded) {
      for (int64_t j = 0; j < n; ++j) to[j] = scale * from[j * columns + l];
      std::fill(to + n, to + padded, 0.0f);
    }
  };
  transpose(s.u + block * n * s.rank, s.rank, root_beta2);
  if (s.floor_cols == nullptr) {
    std::fill_n(to, padded, 0.0f);
    to += padded;
  } else {
    transpose(s.floor_cols + block * n, 1, root_beta2);
  }
  transpose(s.energies + block * n, 1, 1.0f);
  Operand* kept = reinterpret_cast<Operand*>(to);
  if (is_wide(s)) {
    const int64_t held = columns_of_x(s);
    std::fill_n(kept, held * padded, Operand{});
    for (int64_t j = 0; j < n; ++j)
      pack_row(s.x + (block * n + j) * s.width, s.width, lift, kept + j / kPair * kPair * held + j % kPair);
    return;
  }
  for (int64_t l = 0; l < s.width; ++l, kept += padded) {
    for (int64_t j = 0; j < padded; j += kLanes) {
      Vec column = {};
      for (int lane = 0; lane < std::min<int64_t>(kLanes, n - j); ++lane)
        column[lane] = s.x[(block * n + j + lane) * s.width + l];
      store_operands(kept + j, column / lift);
    }
  }
}

// A rectangle of a block; `padded` is cols, padded.
struct Tile {
  int64_t row, col;
  int rows, cols, padded;
};

// One block of a stack.
struct Block {
  const Stack& s;
  const int64_t index;

  const float* of(const float* stacked, int64_t numel) const { return stacked + index * numel; }
  const float* ut() const { return of(s.packed, (s.rank + columns_of_x(s) + 2) * s.padded); }
  const float* floor_cols() const { return ut() + s.rank * s.padded; }
  const float* energies() const { return floor_cols() + s.padded; }
  const Operand* xt() const { return reinterpret_cast<const Operand*>(energies() + s.padded); }
  int64_t at(int64_t row, int64_t col) const { return row * s.cols + col - s.skip; }

  Elements elements(const Step& step, int64_t row, int64_t col) const {
    const int64_t here = at(row, col);
    char* m = step.kept == kNone ? nullptr : static_cast<char*>(s.m[index]);
    float* scale = nullptr;
    int64_t at_m = here * mean_size(step.kept);
    if (is_coded(step.kept)) {
      // Groups begin with each row; a first row that is cut has those of what is left of it.
      const int64_t groups = (s.cols + kCols - 1) / kCols, cut = (s.cols - s.skip + kCols - 1) / kCols;
      scale = s.scales[index] + (row == 0 ? (col - s.skip) / kCols : (row - 1) * groups + cut + col / kCols);
    }
    if (step.kept == kNibbles) {
      // So do bytes of nibbles.
      at_m = row == 0 ? (col - s.skip) / 2
                      : (row - 1) * nibble_bytes(s.cols) + nibble_bytes(s.cols - s.skip) + col / 2;
    }
    return {s.g[index] + here * size_of(step.grads), s.w[index] + here * size_of(step.weights),
            s.rest == nullptr ? nullptr : s.rest[index] + here, m == nullptr ? nullptr : m + at_m, scale,
            static_cast<uint32_t>(s.first[index] + here)};
  }
};

// Asks for the elements of the next panel while this one is computed: its rows are too short for a
// CPU to foresee, and to ask for all at once would fill the buffers that loads wait in. They go to
// the second-level cache, as the first one is full.
class Ahead {
 public:
  Ahead() = default;
  // calls: about how many times ask() will be called.
  Ahead(const Step& step, const Block& b, const Tile& next, int64_t calls)
      : stride_(b.s.cols), cols_(next.cols), rows_(next.rows), write_(step.write),
        of_g_(size_of(step.grads)), of_w_(size_of(step.weights)),
        size_(step.write ? mean_size(step.kept) : 0) {
    if (rows_ == 0) return;
    const Elements e = b.elements(step, next.row, next.col);
    g_ = e.g, w_ = e.w, m_ = static_cast<const char*>(e.m);
    lines_ = (rows_ * ((cols_ + kStep - 1) / kStep) + calls - 1) / std::max<int64_t>(calls, 1);
  }

  void ask() {
    for (int lines = 0; lines < lines_ && row_ < rows_; ++lines) {
      const int64_t at = row_ * stride_ + col_;
      if (col_ * of_g_ % kLine == 0) __builtin_prefetch(g_ + at * of_g_, 0, 2);
      if (write_) {
        if (col_ * of_w_ % kLine == 0) __builtin_prefetch(w_ + at * of_w_, 0, 2);
        if (size_ > 0 && col_ * size_ % kLine == 0) __builtin_prefetch(m_ + at * size_, 0, 2);
      }
      col_ += kStep;
      if (col_ >= cols_) {
        col_ = 0;
        ++row_;
      }
    }
  }

 private:
  static constexpr int kLine = 64, kStep = kLine / 4;
  const char *g_ = nullptr, *w_ = nullptr, *m_ = nullptr;
  int64_t stride_ = 0, cols_ = 0, rows_ = 0, lines_ = 0, row_ = 0, col_ = 0;
  bool write_ = false;
  int of_g_ = 4, of_w_ = 4, size_ = 4;
};

// root[i][j] = sum_l q[row + i][l] ut[l][col + j]
void reconstruct(const Block& b, const Tile& t, float* root, Ahead& ahead) {
  const Stack& s = b.s;
  const float *qs = b.of(s.q, s.rows * s.rank), *us = b.ut() + t.col;
  for (int i = 0; i < t.rows; i += kHeld) {
    const float* q[kHeld];
    for (int r = 0; r < kHeld; ++r) q[r] = qs + (t.row + std::min(i + r, t.rows - 1)) * s.rank;
    for (int j = 0; j < t.padded; j += 2 * kLanes) {
      ahead.ask();
      Vec sum[kHeld][2] = {};
      const float* u = us + j;
      for (int64_t l = 0; l < s.rank; ++l, u += s.padded) {
        const Vec u0 = loaded(u), u1 = loaded(u + kLanes);
        for (int r = 0; r < kHeld; ++r) {
          sum[r][0] += q[r][l] * u0;
          sum[r][1] += q[r][l] * u1;
        }
      }
      for (int r = 0; r < kHeld; ++r) {
        store(root + (i + r) * kCols + j, sum[r][0]);
        store(root + (i + r) * kCols + j + kLanes, sum[r][1]);
      }
    }
  }
}

// What a thread works on: rows of the root over a span of columns, as operands of the products.
struct Scratch {
  static constexpr int64_t kStride = kLongestSpan + kPad;  // no power of two: see a cache's sets
  alignas(64) Operand rows[kRows * kStride];
  alignas(64) Operand shifted[kStride];      // one of these rows, after a 0
  alignas(64) Operand pairs[kRows * kCols];  // a tile of them, by pairs of rows
  alignas(64) float root[kRows * kCols];    // a tile in fp32
};

// y[i][l] += sum_j root[i][j] x[first + j][l]
void sketch(const Block& b, const Tile& t, int64_t length, Scratch& scratch) {
  constexpr int kBlock = 4;
  const Stack& s = b.s;
  const Operand* xt = b.xt() + t.col;
  in_groups<kSketchGroup>(s.width, [&](auto count, int64_t l) {
    constexpr int n = decltype(count)::value;
    for (int i = 0; i < t.rows; i += kBlock) {
      Vec sum[kBlock][n] = {};
      for (int64_t j = 0; j < length; j += kOperands) {
        Operands column[n];
        for (int c = 0; c < n; ++c) column[c] = load_operands(xt + (l + c) * s.padded + j);
        for (int r = 0; r < kBlock; ++r) {
          const Operands own = load_operands(scratch.rows + (i + r) * Scratch::kStride + j);
          for (int c = 0; c < n; ++c) sum[r][c] = add_products(sum[r][c], own, column[c]);
        }
      }
      for (int r = 0; r < std::min(kBlock, t.rows - i); ++r) {
        float* y = s.y + (b.index * s.rows + t.row + i + r) * s.width + l;
        for (int c = 0; c < n; ++c) y[c] += sum_of(sum[r][c]);
      }
    }
  });
}

// The same of a wide x: a vector has numbers of one row of y, and they are added up along the row of
// the root. A band that starts at the second row of a pair of x is a single row, here with a 0 before.
void sketch_wide(const Block& b, const Tile& t, int64_t length, Scratch& scratch) {
  const Stack& s = b.s;
  const int64_t held = columns_of_x(s), odd = t.col % kPair, pairs = (length + odd + kPair - 1) / kPair;
  const Operand *rows = scratch.rows, *x = b.xt() + (t.col - odd) * held;
  if (odd > 0) {
    scratch.shifted[0] = Operand{};
    std::copy_n(rows, length, scratch.shifted + 1);
    std::fill_n(scratch.shifted + 1 + length, kPair, Operand{});
    rows = scratch.shifted;
  }
  in_groups<2>((s.width + kLanes - 1) / kLanes, [&](auto count, int64_t first) {
    constexpr int n = decltype(count)::value;
    const int64_t l = first * kLanes;
    for (int i = 0; i < t.rows; i += kHeld) {
      const Operand* own[kHeld];
      for (int r = 0; r < kHeld; ++r) own[r] = rows + std::min(i + r, t.rows - 1) * Scratch::kStride;
      Vec sum[kHeld][n] = {};
      const Operand* of = x + l * kPair;
      for (int64_t j = 0; j < pairs; ++j, of += kPair * held) {
        Operands some_of_x[n];
        for (int v = 0; v < n; ++v) some_of_x[v] = load_operands(of + v * kOperands);
        for (int r = 0; r < kHeld; ++r) {
          const Operands of_row = pair_everywhere(own[r] + kPair * j);
          for (int v = 0; v < n; ++v) sum[r][v] = add_products(sum[r][v], of_row, some_of_x[v]);
        }
      }
      for (int r = 0; r < kHeld; ++r)
        for (int v = 0; v < n; ++v) {
          if (i + r >= t.rows) continue;
          const int here = static_cast<int>(std::min<int64_t>(kLanes, s.width - l - v * kLanes));
          float* y = s.y + (b.index * s.rows + t.row + i + r) * s.width + l + v * kLanes;
          keep_some(y, some(y, here) + sum[r][v], here);
        }
    }
  });
}

// p[l][col + j] += sum_i z[i][l] root[i][j]; z by pairs of rows
void project(const Block& b, const Tile& t, const Operand* rows, const Operand* z,
             [[maybe_unused]] Scratch& scratch, float* p, Ahead& ahead) {
  const Stack& s = b.s;
  const int pairs = (t.rows + kPair - 1) / kPair;
  const Operand* root = rows;
  int64_t stride = Scratch::kStride;
#ifdef BF16_PRODUCTS
  root = scratch.pairs, stride = kPair * kCols;
  for (int i = 0; i < t.rows; i += kPair)
    for (int j = 0; j < t.padded; j += kOperands) {
      const Operand* from = rows + i * Scratch::kStride + j;
      const Operands next = i + 1 < t.rows ? load_operands(from + Scratch::kStride) : Operands{};
      store_pairs(scratch.pairs + i / kPair * stride + kPair * j, load_operands(from), next);
    }
#endif
  in_groups(s.tests, [&](auto count, int64_t l) {
    constexpr int n = decltype(count)::value;
    for (int j = 0; j < t.padded; j += 2 * kLanes) {
      ahead.ask();
      Vec sum[n][2];
      float* to = p + l * s.padded + t.col + j;
      for (int c = 0; c < n; ++c) {
        sum[c][0] = load(to + c * s.padded);
        sum[c][1] = load(to + c * s.padded + kLanes);
      }
      const Operand *own = z + kPair * l, *from = root + kPair * j;
      for (int i = 0; i < pairs; ++i, own += kPair * s.tests, from += stride) {
        const Operands r0 = load_operands(from), r1 = load_operands(from + kOperands);
        for (int c = 0; c < n; ++c) {
          const Operands of_row = pair_everywhere(own + kPair * c);
          sum[c][0] = add_products(sum[c][0], r0, of_row);
          sum[c][1] = add_products(sum[c][1], r1, of_row);
        }
      }
      for (int c = 0; c < n; ++c) {
        store(to + c * s.padded, sum[c][0]);
        store(to + c * s.padded + kLanes, sum[c][1]);
      }
    }
  });
}

// A square root's and a quotient's last bits are not worth the divider's time, which would be most of
// what an element takes: estimates of 12 bits or more and one Newton step, accurate to 2^-22.
inline Vec reciprocal_root(Vec x) {
#if defined(__AVX512F__)
  const Vec y = reinterpret_cast<Vec>(_mm512_maskz_rsqrt14_ps(0xffff, reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  const Vec y = reinterpret_cast<Vec>(_mm256_rsqrt_ps(reinterpret_cast<__m256>(x)));
#else
  Vec y;
  for (int l = 0; l < kLanes; ++l) y[l] = 1.0f / std::sqrt(x[l]);
#endif
  return y * (1.5f - 0.5f * x * y * y);
}

inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec y = reinterpret_cast<Vec>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  const Vec y = reinterpret_cast<Vec>(_mm256_rcp_ps(reinterpret_cast<__m256>(x)));
#else
  const Vec y = 1.0f / x;
#endif
  return y * (2.0f - x * y);
}

// Of two numbers the one that is less, or more; where x is NaN, NaN.
inline Vec at_most(Vec bound, Vec x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(bound), reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(bound), reinterpret_cast<__m256>(x)));
#else
  return bound < x ? bound : x;
#endif
}

inline Vec at_least(Vec bound, Vec x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(bound), reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(bound), reinterpret_cast<__m256>(x)));
#else
  return bound > x ? bound : x;
#endif
}

inline bool any_below(Vec x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(bound), _CMP_LT_OQ) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(x < bound)) != 0;
#else
  return true;
#endif
}

// Of 0 and of subnormal numbers there are no estimates.
inline Vec root_of(Vec v) {
  if (!any_below(v, std::numeric_limits<float>::min())) return v * reciprocal_root(v);
  for (int l = 0; l < kLanes; ++l) v[l] = std::sqrt(v[l]);
  return v;
}

enum class Mean { kNothing, kGradients, kUpdates };

// The numbers of a row, in every lane.
struct Row {
  explicit Row(const Step& s, float clip)
      : scale(clip * s.correction), shift(clip * s.eps), limit(s.largest / clip), beta1(s.beta1),
        gain(s.gain), of_mean(s.of_mean), of_new(s.of_new), decay(s.decay), rate(s.rate) {}
  float scale, shift, limit, beta1, gain, of_mean, of_new, decay, rate;
};

// Updates first moments and weights of some elements; root holds sqrt(V).
template <Mean mean>
inline void apply(const Row& r, Vec g, Vec root, Vec& m, Vec& w) {
  const Vec inverse = reciprocal(r.scale * root + r.shift);
  if (mean == Mean::kGradients) {
    m = r.beta1 * m + r.gain * g;
    Vec x = (r.of_mean * m + r.of_new * g) * inverse;
    x = at_least(Vec{} - r.limit, at_most(Vec{} + r.limit, x));
    w = r.decay * w + r.rate * x;
  } else if (mean == Mean::kUpdates) {
    const Vec x = g * inverse;
    m = r.beta1 * m + r.gain * x;
    w = r.decay * w + r.rate * (r.of_mean * m + r.of_new * x);
  } else {
    w = r.decay * w + r.rate * (g * inverse);
  }
}

// The square of G / D, where an element without gradient has none.
inline Vec square_of(const Step& s, Vec g, Vec root) {
  const Vec x = g * reciprocal(s.correction * root + s.eps);
  return g == 0.0f ? Vec{} : x * x;
}

// All that happens to the elements of a tile's row or of a run, at most kCols.
// moment(j, g): sqrt(V) of the vector at j and what else is to be done with V.
template <Mean mean, class Moment>
void row_pass(const Step& s, const Elements& e, int count, const float* clip, double* square,
              Moment moment) {
  const Row row(s, clip == nullptr ? 1.0f : *clip);
  alignas(64) float buffer[kCols], of_g[kCols], of_w[kCols];
  const float* grads = read_floats(s.grads, e.g, nullptr, count, of_g);
  float* weights = of_w;
  if (s.weights == kFp32) {
    weights = reinterpret_cast<float*>(e.w);
  } else if (s.write) {
    read_floats(s.weights, e.w, e.rest, count, of_w);
  }
  const bool moves = s.write && mean != Mean::kNothing, bytes = moves && s.kept == kCodes;
  const bool coded = moves && is_coded(s.kept);
  float* m = moves ? load_mean(s.kept, e, count, buffer) : nullptr;
  const int8_t* codes = static_cast<const int8_t*>(e.m);
  const float scale = bytes ? *e.scale : 0.0f;
  Bits largest = {};
  Vec squares = {};
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Vec g = load(grads + j), root = moment(j, kLanes, g);
    if (s.measure) squares += square_of(s, g, root);
    if (!s.write) continue;
    Vec held = {}, w = load(weights + j);
    if (mean != Mean::kNothing) held = bytes ? decoded(codes + j, scale) : load(m + j);
    apply<mean>(row, g, root, held, w);
    if (mean != Mean::kNothing) store(m + j, held);
    if (coded) largest = larger(largest, held);
    store(weights + j, w);
  }
  if (const int rest = count - j; rest > 0) {
    const Vec g = some(grads + j, rest), root = moment(j, rest, g);
    if (s.measure) squares += square_of(s, g, root);
    if (s.write) {
      Vec held = {}, w = some(weights + j, rest);
      if (bytes) {
        int8_t few[kLanes] = {};
        std::memcpy(few, codes + j, rest);
        held = decoded(few, scale);
      } else if (mean != Mean::kNothing) {
        held = some(m + j, rest);
      }
      apply<mean>(row, g, root, held, w);
      if (mean != Mean::kNothing) keep_some(m + j, held, rest);
      // What lanes without an element hold may be NaN.
      largest = larger(largest, some(reinterpret_cast<const float*>(&held), rest));
      keep_some(weights + j, w, rest);
    }
  }
  if (s.measure) *square += sum_of(squares);
  if (moves && m == buffer) keep_mean(s.kept, e, count, buffer, largest, s.salt);
  if (s.write && s.weights != kFp32) {
    write_floats(s.weights, e.w, e.rest, count, weights, e.index, s.at_random != 0, s.weight_salt);
  }
}

// The rows of a chunk as bands, of which one is a tile high; a row that is cut is a band of its own.
std::vector<Tile> bands_of(const Stack& s, int64_t first, int64_t last) {
  std::vector<Tile> bands;
  const bool begins_late = first == 0 && s.skip > 0;
  const int64_t whole = s.missing > 0 && last == s.rows ? last - 1 : last;
  for (int64_t row = first; row < last; row += bands.back().rows) {
    const bool cut = (row == 0 && begins_late) || row == whole;
    const int rows = cut ? 1 : static_cast<int>(std::min<int64_t>(kRows, whole - row));
    bands.push_back({row, row == 0 ? s.skip : 0, rows, 0, 0});
  }
  return bands;
}

// The test sketch of some bands by pairs of rows; its rounded numbers are what counts from here on.
std::vector<Operand> pack_tests(const Block& b, const std::vector<Tile>& bands, float lift) {
  const Stack& s = b.s;
  std::vector<Operand> packed(bands.size() * kRows * s.tests);
  for (size_t band = 0; band < bands.size(); ++band)
    for (int i = 0; i < bands[band].rows; ++i) {
      float* z = s.z + (b.index * s.rows + bands[band].row + i) * s.tests;
      Operand* to = packed.data() + (band * kRows + i / kPair * kPair) * s.tests + i % kPair;
      pack_row(z, s.tests, lift, to);
      for (int64_t l = 0; l < s.tests; ++l) z[l] = value_of(to[l * kPair]) * lift;
    }
  return packed;
}

template <Mean mean>
void chunk_of(const Step& step, const Block& b, int64_t chunk) {
  const Stack& s = b.s;
  const int64_t first = chunk * s.chunk, last = std::min(first + s.chunk, s.rows);
  const int64_t unit = b.index * chunks_of(s) + chunk, in_all = b.index * s.rows;
  const float *floor_rows = s.floor_rows == nullptr ? nullptr : b.of(s.floor_rows, s.rows);
  const float *floor_cols = b.floor_cols(), *energies = b.energies();
  const float* clip = s.clip == nullptr ? nullptr : s.clip + b.index;
  float* p = s.p + unit * s.tests * s.padded;
  std::fill_n(p, s.tests * s.padded, 0.0f);
  std::fill(s.y + (in_all + first) * s.width, s.y + (in_all + last) * s.width, 0.0f);
  std::fill(s.row_energies + in_all + first, s.row_energies + in_all + last, 0.0);
  const auto scratch = std::make_unique<Scratch>();
  const float lift = lift_of(step);
  const std::vector<Tile> bands = bands_of(s, first, last);
  const std::vector<Operand> z = pack_tests(b, bands, lift);
  const int64_t bytes = 4 * (s.rank + s.tests) + sizeof(Operand) * s.width;
  const int64_t span = std::min(std::max(kSpanBytes / bytes / kCols, int64_t{1}) * kCols, kLongestSpan);
  float* root = scratch->root;
  double square = 0;
  // Columns of a band that a span has, from its start on; none where it ends before.
  const auto columns = [&](const Tile& band, int64_t start) {
    const int64_t end = band.row + 1 == s.rows && s.missing > 0 ? s.cols - s.missing : s.cols;
    return std::min(span, end - band.col - start);
  };
  for (int64_t start = 0; start < s.cols; start += span) {
    for (size_t at = 0; at < bands.size(); ++at) {
      Tile t = bands[at];
      const int64_t from = t.col + start, length = columns(t, start);
      Vec energy[kRows] = {};
      const int64_t calls = (t.rows + kHeld - 1) / kHeld + (s.tests + kGroup - 1) / kGroup;
      Ahead ahead;
      for (int64_t done = 0; done < length; done += kCols) {
        t.col = from + done;
        t.cols = static_cast<int>(std::min<int64_t>(kCols, length - done));
        t.padded = (t.cols + kPad - 1) / kPad * kPad;
        if (done % kPanel == 0) {
          const int64_t left = length - done - kPanel;
          Tile next{t.row, t.col + kPanel, t.rows, static_cast<int>(std::min(kPanel, left)), 0};
          if (left <= 0 && at + 1 < bands.size()) {
            next = bands[at + 1];
            next.cols = static_cast<int>(std::min(kPanel, columns(next, start)));
            next.col += start;
          }
          if (next.cols <= 0) next.rows = 0;
          ahead = Ahead(step, b, next, calls * std::min(kPanel, length - done) / (2 * kLanes));
        }
        reconstruct(b, t, root, ahead);
        Operand* rows = scratch->rows + done;
        for (int i = 0; i < t.rows; ++i) {
          const float* held = root + i * kCols;
          Operand* kept = rows + i * Scratch::kStride;
          for (int j = t.cols / kLanes * kLanes; j < t.padded; j += kLanes) store_operands(kept + j, Vec{});
          const float least = floor_rows == nullptr ? 0.0f : floor_rows[t.row + i];
          const float *floor = floor_cols + t.col, *counts = energies + t.col;
          const auto moment = [&](int j, int count, Vec g) {
            // It has sqrt(beta_2) from pack.
            const Vec above = at_least(least * load(floor + j), load(held + j));
            Vec v = above * above + step.rest2 * g * g;
            if (count < kLanes) v = some(reinterpret_cast<const float*>(&v), count);
            energy[i] += v * load(counts + j);
            const Vec sd = root_of(v);
            store_operands(kept + j, lift * sd);
            return sd;
          };
          row_pass<mean>(step, b.elements(step, t.row + i, t.col), t.cols, clip, &square, moment);
        }
        if (s.tests > 0) project(b, t, rows, z.data() + at * kRows * s.tests, *scratch, p, ahead);
      }
      for (int i = 0; i < t.rows; ++i) s.row_energies[in_all + t.row + i] += sum_of(energy[i]);
      t.col = from;
      if (s.width > 0 && length > 0)
        (is_wide(s) ? sketch_wide : sketch)(b, t, (length + kPad - 1) / kPad * kPad, *scratch);
    }
  }
  s.squares[unit] = square;
}

template <Mean mean>
void run_of(const Step& s, const Run& r) {
  double square = 0;
  for (int64_t at = 0; at < r.numel; at += kCols) {
    const int count = static_cast<int>(std::min<int64_t>(kCols, r.numel - at));
    const int64_t at_m = s.kept == kNibbles ? at / 2 : at * mean_size(s.kept);
    char* m = s.kept == kNone ? nullptr : static_cast<char*>(r.m) + at_m;
    float* v = r.v + at;
    const auto moment = [&](int j, int some_of, Vec g) {
      const Vec old = some_of == kLanes ? load(v + j) : some(v + j, some_of);
      const Vec now = s.beta2 * old + s.rest2 * g * g;
      if (s.write) keep_some(v + j, now, some_of);
      return root_of(now);
    };
    const Elements e{r.g + at * size_of(s.grads), r.w + at * size_of(s.weights),
                     r.rest == nullptr ? nullptr : r.rest + at, m, is_coded(s.kept) ? r.scales + at / kCols : nullptr,
                     static_cast<uint32_t>(r.first + at)};
    row_pass<mean>(s, e, count, r.clip, &square, moment);
  }
  *r.square = square;
}

template <Mean mean>
void pass(const Step& step, const Stack* stacks, int64_t count, const Run* runs, int64_t run_count) {
  const int64_t units =
      count == 0 ? 0 : stacks[count - 1].first_unit + stacks[count - 1].blocks * chunks_of(stacks[count - 1]);
#pragma omp parallel num_threads(step.threads)
  {
    for (const Stack* s = stacks; s < stacks + count; ++s)
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < s->blocks; ++i) pack(*s, i, std::sqrt(step.beta2), lift_of(step));
#pragma omp barrier
#pragma omp for schedule(dynamic) nowait
    for (int64_t unit = 0; unit < units; ++unit) {
      const Stack* s = stacks;
      while (s + 1 < stacks + count && s[1].first_unit <= unit) ++s;
      const int64_t chunks = chunks_of(*s), i = unit - s->first_unit;
      chunk_of<mean>(step, Block{*s, i / chunks}, i % chunks);
    }
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < run_count; ++i) run_of<mean>(step, runs[i]);
    // Where a block has several chunks, the first one's projection becomes that of all.
    for (const Stack* s = stacks; s < stacks + count; ++s) {
      const int64_t size = s->tests * s->padded, chunks = chunks_of(*s);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < s->blocks * s->tests; ++i) {
        float* to = s->p + i / s->tests * chunks * size + i % s->tests * s->padded;
        for (int64_t c = 1; c < chunks; ++c)
#pragma omp simd
          for (int64_t j = 0; j < s->padded; ++j) to[j] += to[c * size + j];
      }
    }
  }
}

// SplitMix64's finaliser; sketch.py has the same.
inline uint64_t finalised(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

// Rows of a factor or sketch are taken so many at a time; threads share spans of them, whose sums are
// added up in order.
constexpr int kBatch = 16;
constexpr int64_t kSpan = 1024;

inline int64_t spans_of(int64_t rows) { return (rows + kSpan - 1) / kSpan; }

// Calls work(block, span, first row, end) for all spans of `rows` rows of all blocks.
template <class Work>
void in_spans(int64_t blocks, int64_t rows, Work work) {
  const int64_t spans = spans_of(rows);
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < blocks * spans; ++i) {
    const int64_t first = i % spans * kSpan;
    work(i / spans, i % spans, first, std::min(first + kSpan, rows));
  }
}

// A factor's columns and how they enter a sketch: kept ones by `scale`, the rest, and those that hold
// nothing, by fresh numbers.
struct Columns {
  int64_t rank = 0, kept = 0, width = 0;
  std::vector<float> form, scale, fresh;

  // gram: of the other factor, over `square`.
  void set(int64_t of_factor, int64_t of_sketch, const double* gram, double square) {
    rank = of_factor, width = of_sketch, kept = std::min(rank, width);
    form.resize(rank * rank), scale.assign(width, 0.0f), fresh.assign(width, 1.0f);
    for (int64_t i = 0; i < rank * rank; ++i) form[i] = static_cast<float>(gram[i] / square);
  }

  // The norms of the kept columns times their weights; of 0 for those that hold nothing.
  void set_norms(const double* norms, bool unit) {
    for (int64_t l = 0; l < kept; ++l) {
      const float norm = static_cast<float>(std::sqrt(norms[l]));
      scale[l] = norm > 0 ? (unit ? 1.0f : 1.0f / norm) : 0.0f;
      fresh[l] = norm > 0 ? 0.0f : 1.0f;
    }
  }

  // x^T form x of at most kBatch rows x of the factor, each times `over`.
  void energies(const float* x, int64_t rows, float over, float* to) const {
    std::vector<float> columns(rank * kBatch);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < rank; ++l) columns[l * kBatch + r] = x[r * rank + l] * over;
    for (int64_t r = 0; r < kBatch; r += kLanes) {
      Vec total = {};
      for (int64_t i = 0; i < rank; ++i) {
        Vec sum = {};
        for (int64_t j = 0; j < rank; ++j) sum += form[i * rank + j] * load(columns.data() + j * kBatch + r);
        total += sum * load(columns.data() + i * kBatch + r);
      }
      total = at_least(Vec{}, total);
      std::memcpy(to + r, &total, sizeof total);
    }
  }

  // weight (kept weight scale | fresh) of at most kBatch rows: of D X or D Z, with D^2 in `squares`. A
  // hash has four fresh numbers of 16 bits each.
  void sketch(uint64_t key, int64_t index, const float* x, int64_t rows, const float* squares,
              float unit, float* to) const {
    const int64_t quads = (width + 3) / 4;
    std::vector<uint64_t> bits(kBatch * quads);
    const uint64_t start = static_cast<uint64_t>(index * quads + 1);
#pragma omp simd
    for (int64_t i = 0; i < rows * quads; ++i) bits[i] = finalised(key + (start + i) * 0x9e3779b97f4a7c15U);
    for (int64_t r = 0; r < rows; ++r, to += width, x += rank) {
      const float square = squares[r], drawn_unit = unit * std::sqrt(square);
      int16_t drawn[4 * kBatch];
      for (int64_t from = 0; from < width; from += 4 * kBatch) {
        const int64_t count = std::min<int64_t>(4 * kBatch, width - from);
        std::memcpy(drawn, bits.data() + r * quads + from / 4, count * sizeof(int16_t));
#pragma omp simd
        for (int64_t l = 0; l < count; ++l) to[from + l] = drawn_unit * fresh[from + l] * (drawn[l] + 0.5f);
      }
#pragma omp simd
      for (int64_t l = 0; l < kept; ++l) to[l] += square * scale[l] * x[l];
    }
  }
};

void sketches_of(const Sketches& s) {
  constexpr float kTiny = std::numeric_limits<float>::min(), kLeast = 1e-2f;
  constexpr float kStep = 0x1p-15f * 1.7320508075688772f;  // of numbers with a deviation of 1
  const int64_t k = s.rank, spans = spans_of(s.cols);
  const float of_cols = kStep / std::sqrt(static_cast<float>(s.cols));
  const float of_rows = kStep / std::sqrt(static_cast<float>(s.matrix_rows));
  std::vector<Columns> of_u(s.blocks), of_q(s.blocks);
  std::vector<float> scales(s.blocks), totals(s.blocks);
  std::vector<double> sums(s.blocks * spans), norms(s.blocks * spans * k);
  const auto is_known = [&](int64_t b) { return totals[b] > kTiny; };  // elsewhere all weigh 1
#pragma omp parallel num_threads(s.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < s.blocks; ++b) {
      const double *gram_q = s.gram_q + b * k * k, *gram_u = s.gram_u + b * k * k;
      double square = 0;
      for (int64_t l = 0; l < k; ++l) square += gram_u[l * k + l];
      square = std::max(square, static_cast<double>(kTiny));
      scales[b] = std::max(static_cast<float>(std::sqrt(square)), kTiny);
      of_u[b].set(k, s.width, gram_q, 1.0);
      of_q[b].set(k, s.tests, gram_u, square);
    }
    in_spans(s.blocks, s.cols, [&](int64_t b, int64_t span, int64_t first, int64_t end) {
      float found[kBatch];
      double sum = 0;
      for (int64_t j = first; j < end; j += kBatch) {
        const int64_t count = std::min<int64_t>(kBatch, end - j);
        of_u[b].energies(s.u + (b * s.cols + j) * k, count, 1.0f / scales[b], found);
        for (int64_t r = 0; r < count; ++r) sum += s.col_squares[b * s.cols + j + r] = found[r];
      }
      sums[b * spans + span] = sum;
    });
#pragma omp for
    for (int64_t b = 0; b < s.blocks; ++b) {
      double total = 0;
      for (int64_t i = 0; i < spans; ++i) total += sums[b * spans + i];
      totals[b] = std::max(static_cast<float>(total), kTiny);
    }
    in_spans(s.blocks, s.cols, [&](int64_t b, int64_t span, int64_t first, int64_t end) {
      const bool known = is_known(b);
      const float per = s.cols / totals[b];
      double* norm = norms.data() + (b * spans + span) * k;
      for (int64_t j = b * s.cols + first; j < b * s.cols + end; ++j) {
        float& square = s.col_squares[j];
        if (s.floor_cols != nullptr) s.floor_cols[j] = std::sqrt(square) * scales[b];
        square = known ? 1.0f / std::max(square * per, kLeast) : 1.0f;
        for (int64_t l = 0; l < of_u[b].kept; ++l) {
          const double x = s.u[j * k + l];
          norm[l] += x * x * square;
        }
      }
    });
#pragma omp for
    for (int64_t b = 0; b < s.blocks; ++b) {
      double* norm = norms.data() + b * spans * k;
      for (int64_t i = 1; i < spans; ++i)
        for (int64_t l = 0; l < k; ++l) norm[l] += norm[i * k + l];
      // Columns of D_r Q have about unit norm.
      of_u[b].set_norms(norm, false);
      of_q[b].set_norms(norm, true);
    }
    in_spans(s.blocks, s.cols, [&](int64_t b, int64_t, int64_t first, int64_t end) {
      for (int64_t j = first; j < end; j += kBatch) {
        const int64_t at = b * s.cols + j;
        of_u[b].sketch(s.keys_x[b], j, s.u + at * k, std::min<int64_t>(kBatch, end - j), s.col_squares + at,
                       of_cols, s.x + at * s.width);
      }
    });
    in_spans(s.blocks, s.rows, [&](int64_t b, int64_t, int64_t first, int64_t end) {
      float found[kBatch];
      for (int64_t i = first; i < end; i += kBatch) {
        const int64_t at = b * s.rows + i, count = std::min<int64_t>(kBatch, end - i);
        of_q[b].energies(s.q + at * k, count, 1.0f, found);
        for (int64_t r = 0; r < count; ++r) {
          const float energy = found[r] / totals[b];
          if (s.floor_rows != nullptr) s.floor_rows[at + r] = std::sqrt(energy * s.floor);
          s.row_squares[at + r] =
              is_known(b) ? 1.0f / std::max(energy * s.matrix_rows, kLeast) : 1.0f;
        }
        of_q[b].sketch(s.keys_z[b], s.first + i, s.q + at * k, count, s.row_squares + at, of_rows,
                       s.z + at * s.tests);
      }
    });
  }
}

constexpr int kDoubles = 8, kOuter = 64;
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));

// Some rows of a matrix in fp64, padded to vectors, and the same times the weight of each row.
struct Weighted {
  int64_t columns, padded;
  std::vector<double> plain, weighed;
  explicit Weighted(int64_t count)
      : columns(count), padded((count + kDoubles - 1) / kDoubles * kDoubles), plain(kOuter * padded),
        weighed(kOuter * padded) {}
  void set(int64_t row, const float* x, double weight) {
    double *to = plain.data() + row * padded, *and_to = weighed.data() + row * padded;
#pragma omp simd
    for (int64_t l = 0; l < columns; ++l) to[l] = x[l], and_to[l] = weight * x[l];
  }
  // So many rows from the columns of x, whose rows are `stride` floats apart.
  void set_columns(int64_t rows, const float* x, int64_t stride, const float* weights) {
    for (int64_t l = 0; l < columns; ++l, x += stride)
      for (int64_t row = 0; row < rows; ++row) {
        plain[row * padded + l] = x[row];
        weighed[row * padded + l] = static_cast<double>(x[row]) * weights[row];
      }
  }
};

// to += x^T y over some rows, for `most` columns of x and kVectors of y; all are padded.
template <int kVectors>
void add_products(const double* x, int64_t x_padded, int64_t most, const double* y, int64_t padded, int64_t rows,
                  double* to) {
  constexpr int kBlock = 4;
  for (int64_t i = 0; i < most; i += kBlock) {
    Doubles sum[kBlock][kVectors] = {};
    for (int64_t row = 0; row < rows; ++row) {
      Doubles own[kVectors];
      std::memcpy(own, y + row * padded, sizeof own);
      for (int l = 0; l < kBlock; ++l)
        for (int v = 0; v < kVectors; ++v) sum[l][v] += x[row * x_padded + i + l] * own[v];
    }
    for (int l = 0; l < kBlock; ++l)
      for (int v = 0; v < kVectors; ++v) {
        Doubles held;
        double* at = to + (i + l) * padded + v * kDoubles;
        std::memcpy(&held, at, sizeof held);
        held += sum[l][v];
        std::memcpy(at, &held, sizeof held);
      }
  }
}

// Of a symmetric product only what is not below the diagonal is sure to be there.
void add_products(const std::vector<double>& x, int64_t x_padded, const Weighted& y, int64_t rows,
                  bool symmetric, double* to) {
  in_groups(y.padded / kDoubles, [&](auto count, int64_t first) {
    constexpr int kCount = decltype(count)::value;
    const int64_t from = first * kDoubles, most = symmetric ? (first + kCount) * kDoubles : x_padded;
    add_products<kCount>(x.data(), x_padded, most, y.plain.data() + from, y.padded, rows, to + from);
  });
}

void products_of(const Products& s) {
  const int64_t w = s.width, t = s.tests, count = w * w + t * w + 1;
  // A process may have no row that counts here, or no column.
  const int64_t rows = s.rows - s.first, of_rows = std::max<int64_t>(spans_of(rows), 1);
  const int64_t of_cols = std::max<int64_t>(spans_of(s.cols), 1);
  const int64_t wide = Weighted(w).padded, tall = Weighted(t).padded;
  // By block and span, to be added up: G, H, and the sum of energies; S.
  const int64_t small = wide * wide + tall * wide + 1, large = tall * tall;
  std::vector<double> parts(s.blocks * of_rows * small), more(s.blocks * of_cols * large);
#pragma omp parallel num_threads(s.threads)
  {
    Weighted y(w), z(t);
    in_spans(s.blocks, rows, [&](int64_t b, int64_t span, int64_t first, int64_t end) {
      double *g = parts.data() + (b * of_rows + span) * small, *h = g + wide * wide;
      for (int64_t from = first; from < end; from += kOuter) {
        const int64_t here = std::min<int64_t>(kOuter, end - from);
        for (int64_t i = 0; i < here; ++i) {
          const int64_t row = b * s.rows + s.first + from + i;
          const double square = s.row_squares == nullptr ? 1.0 : s.row_squares[row];
          y.set(i, s.y + row * w, square);
          if (t > 0) z.set(i, s.z + row * t, 1.0);
          if (s.energies != nullptr) h[tall * wide] += s.energies[row] * square;
        }
        add_products(y.weighed, y.padded, y, here, true, g);
        add_products(z.plain, z.padded, y, here, false, h);
      }
    });
    in_spans(s.blocks, s.cols, [&](int64_t b, int64_t span, int64_t first, int64_t end) {
      for (int64_t from = first; from < end; from += kOuter) {
        const int64_t here = std::min<int64_t>(kOuter, end - from);
        z.set_columns(here, s.p + b * s.p_block + from, s.p_row, s.col_squares + b * s.squares_block + from);
        add_products(z.weighed, z.padded, z, here, true, more.data() + (b * of_cols + span) * large);
      }
    });
#pragma omp for
    for (int64_t b = 0; b < s.blocks; ++b) {
      double *g = parts.data() + b * of_rows * small, *of_s = more.data() + b * of_cols * large;
      for (int64_t i = 1; i < of_rows; ++i)
        for (int64_t j = 0; j < small; ++j) g[j] += g[i * small + j];
      for (int64_t i = 1; i < of_cols; ++i)
        for (int64_t j = 0; j < large; ++j) of_s[j] += of_s[i * large + j];
      double *h = g + wide * wide, total = h[tall * wide], *sums = s.sums + b * count;
      // Of a first row that another process counts, this one has a part of the energy.
      if (s.energies != nullptr)
        for (int64_t i = 0; i < s.first; ++i) total += s.energies[b * s.rows + i] * s.row_squares[b * s.rows + i];
      for (int64_t i = 0; i < w; ++i)
        for (int64_t j = i; j < w; ++j) sums[i * w + j] = sums[j * w + i] = g[i * wide + j];
      for (int64_t i = 0; i < t; ++i) std::copy_n(h + i * wide, w, sums + w * w + i * w);
      sums[count - 1] = total;
      for (int64_t i = 0; i < t; ++i)
        for (int64_t j = i; j < t; ++j)
          s.s[(b * t + i) * t + j] = s.s[(b * t + j) * t + i] = of_s[i * tall + j];
    }
  }
}

}  // namespace

extern "C" {

void products(const Products* s) { products_of(*s); }

void sketches(const Sketches* s) { sketches_of(*s); }

void one_pass(const Step* step, const Stack* stacks, int64_t count, const Run* runs,
              int64_t run_count) {
  const auto run = step->kept == kNone     ? pass<Mean::kNothing>
                   : step->of_gradients ? pass<Mean::kGradients>
                                        : pass<Mean::kUpdates>;
  run(*step, stacks, count, runs, run_count);
}

}  // extern "C"
