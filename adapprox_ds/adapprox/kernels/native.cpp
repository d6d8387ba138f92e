// SPDX-License-Identifier: Apache-2.0
//
// The pass on CPUs: an element is loaded once, V stays in the first-level cache, and all threads
// share all blocks of all shapes. interface.py says what it computes, native_pass.py calls it.
//
// Matrices are row-major fp32; the columns of packed operands are padded with zeros to a multiple
// of kPad. Rows are cut into chunks that depend on the shape alone, and what chunks reduce to is
// added up in order: a result depends neither on the number of threads nor on who was first.

#include "native.h"
#include "vectors.h"

#include <limits>
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

// At most this many columns of a factor are in registers at a time.
constexpr int kGroup = 5;

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

// Transposes and pads what the pass reads along a row: U and x, the floor and what V counts.
void pack(const Stack& s, int64_t block, float root_beta2) {
  const int64_t n = s.cols, padded = s.padded;
  float* to = s.packed + block * (s.rank + s.width + 2) * padded;
  const auto transpose = [&](const float* from, int64_t columns, float scale) {
    for (int64_t l = 0; l < columns; ++l, to += padded) {
      for (int64_t j = 0; j < n; ++j) to[j] = scale * from[j * columns + l];
      std::fill(to + n, to + padded, 0.0f);
    }
  };
  transpose(s.u + block * n * s.rank, s.rank, root_beta2);
  if (s.width > 0) transpose(s.x + block * n * s.width, s.width, 1.0f);
  if (s.floor_cols == nullptr) {
    std::fill_n(to, padded, 0.0f);
    to += padded;
  } else {
    transpose(s.floor_cols + block * n, 1, root_beta2);
  }
  transpose(s.energies + block * n, 1, 1.0f);
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
  const float* ut() const { return of(s.packed, (s.rank + s.width + 2) * s.padded); }
  const float* xt() const { return ut() + s.rank * s.padded; }
  const float* floor_cols() const { return xt() + s.width * s.padded; }
  const float* energies() const { return floor_cols() + s.padded; }
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

// Asks for the elements of the next tile while this one is computed: rows of a tile are too short
// for a CPU to foresee, and to ask for all at once would fill the buffers that loads wait in.
class Ahead {
 public:
  Ahead(const Step& step, const Block& b, const Tile& t, int64_t cols)
      : stride_(b.s.cols), cols_(cols), rows_(cols > 0 ? t.rows : 0), write_(step.write),
        of_g_(size_of(step.grads)), of_w_(size_of(step.weights)),
        size_(step.write ? mean_size(step.kept) : 0) {
    const Elements e = b.elements(step, t.row, t.col);
    g_ = e.g + kCols * of_g_;
    w_ = e.w + kCols * of_w_;
    m_ = size_ > 0 ? static_cast<const char*>(e.m) + kCols * size_ : nullptr;
  }

  void ask() {
    for (int lines = 0; lines < kLines && row_ < rows_; ++lines) {
      const int64_t at = row_ * stride_ + col_;
      if (col_ * of_g_ % kLine == 0) __builtin_prefetch(g_ + at * of_g_);
      if (write_) {
        if (col_ * of_w_ % kLine == 0) __builtin_prefetch(w_ + at * of_w_, 1);
        if (size_ > 0 && col_ * size_ % kLine == 0) __builtin_prefetch(m_ + at * size_, 1);
      }
      col_ += kLine / 4;
      if (col_ >= cols_) {
        col_ = 0;
        ++row_;
      }
    }
  }

 private:
  static constexpr int kLine = 64, kLines = 2;
  const char *g_, *w_, *m_;
  int64_t stride_, cols_, row_ = 0, col_ = 0;
  int rows_;
  bool write_;
  int of_g_, of_w_, size_;
};

// root[i][j] = sum_l q[row + i][l] ut[l][col + j]
void reconstruct(const Block& b, const Tile& t, float* root, Ahead& ahead) {
  constexpr int kBlock = 4;
  const Stack& s = b.s;
  const float *qs = b.of(s.q, s.rows * s.rank), *us = b.ut() + t.col;
  for (int i = 0; i < t.rows; i += kBlock) {
    const float* q[kBlock];
    for (int r = 0; r < kBlock; ++r) q[r] = qs + (t.row + std::min(i + r, t.rows - 1)) * s.rank;
    for (int j = 0; j < t.padded; j += 2 * kLanes) {
      ahead.ask();
      Vec sum[kBlock][2] = {};
      const float* u = us + j;
      for (int64_t l = 0; l < s.rank; ++l, u += s.padded) {
        const Vec u0 = loaded(u), u1 = loaded(u + kLanes);
        for (int r = 0; r < kBlock; ++r) {
          sum[r][0] += q[r][l] * u0;
          sum[r][1] += q[r][l] * u1;
        }
      }
      for (int r = 0; r < kBlock; ++r) {
        store(root + (i + r) * kCols + j, sum[r][0]);
        store(root + (i + r) * kCols + j + kLanes, sum[r][1]);
      }
    }
  }
}

// sums[i][l] += root[i] * xt[l], lane by lane
void sketch(const Block& b, const Tile& t, const float* root, float* sums, Ahead& ahead) {
  constexpr int kBlock = 4;
  const Stack& s = b.s;
  const float* xt = b.xt() + t.col;
  in_groups<3>(s.width, [&](auto count, int64_t l) {
    constexpr int n = decltype(count)::value;
    for (int i = 0; i < t.rows; i += kBlock) {
      ahead.ask();
      Vec sum[kBlock][n];
      float* to = sums + (i * s.width + l) * kLanes;
      for (int r = 0; r < kBlock; ++r)
        for (int c = 0; c < n; ++c) sum[r][c] = load(to + (r * s.width + c) * kLanes);
      const float* x = xt + l * s.padded;
      for (int j = 0; j < t.padded; j += kLanes) {
        Vec column[n];
        for (int c = 0; c < n; ++c) column[c] = loaded(x + c * s.padded + j);
        for (int r = 0; r < kBlock; ++r) {
          const Vec own = loaded(root + (i + r) * kCols + j);
          for (int c = 0; c < n; ++c) sum[r][c] += own * column[c];
        }
      }
      for (int r = 0; r < kBlock; ++r)
        for (int c = 0; c < n; ++c) store(to + (r * s.width + c) * kLanes, sum[r][c]);
    }
  });
}

// p[l][col + j] += sum_i z[row + i][l] root[i][j]
void project(const Block& b, const Tile& t, const float* root, float* p, Ahead& ahead) {
  const Stack& s = b.s;
  const float* zs = b.of(s.z, s.rows * s.tests) + t.row * s.tests;
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
      const float* z = zs + l;
      for (int i = 0; i < t.rows; ++i, z += s.tests) {
        const Vec r0 = loaded(root + i * kCols + j), r1 = loaded(root + i * kCols + j + kLanes);
        for (int c = 0; c < n; ++c) {
          sum[c][0] += z[c] * r0;
          sum[c][1] += z[c] * r1;
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
    x = x > r.limit ? Vec{} + r.limit : x;  // lets NaN through
    x = x < -r.limit ? Vec{} - r.limit : x;
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

// A vector of at most kLanes numbers, the rest 0, and back.
inline Vec some(const float* p, int count) {
  alignas(64) float buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(float));
  return load(buffer);
}
inline void keep_some(float* p, Vec v, int count) { std::memcpy(p, &v, count * sizeof(float)); }

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
  const bool moves = s.write && mean != Mean::kNothing;
  float* m = moves ? load_mean(s.kept, e, count, buffer) : nullptr;
  Vec squares = {};
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Vec g = load(grads + j), root = moment(j, kLanes, g);
    if (s.measure) squares += square_of(s, g, root);
    if (!s.write) continue;
    Vec held = mean == Mean::kNothing ? Vec{} : load(m + j), w = load(weights + j);
    apply<mean>(row, g, root, held, w);
    if (mean != Mean::kNothing) store(m + j, held);
    store(weights + j, w);
  }
  if (const int rest = count - j; rest > 0) {
    const Vec g = some(grads + j, rest), root = moment(j, rest, g);
    if (s.measure) squares += square_of(s, g, root);
    if (s.write) {
      Vec held = mean == Mean::kNothing ? Vec{} : some(m + j, rest), w = some(weights + j, rest);
      apply<mean>(row, g, root, held, w);
      if (mean != Mean::kNothing) keep_some(m + j, held, rest);
      keep_some(weights + j, w, rest);
    }
  }
  if (s.measure) *square += sum_of(squares);
  if (moves && m == buffer) keep_mean(s.kept, e, count, buffer, s.salt);
  if (s.write && s.weights != kFp32) {
    write_floats(s.weights, e.w, e.rest, count, weights, e.index, s.at_random != 0, s.weight_salt);
  }
}

template <Mean mean>
void chunk_of(const Step& step, const Block& b, int64_t chunk) {
  const Stack& s = b.s;
  const int64_t first = chunk * s.chunk, last = std::min(first + s.chunk, s.rows);
  const int64_t unit = b.index * chunks_of(s) + chunk;
  const float *floor_rows = s.floor_rows == nullptr ? nullptr : b.of(s.floor_rows, s.rows);
  const float *floor_cols = b.floor_cols(), *energies = b.energies();
  const float* clip = s.clip == nullptr ? nullptr : s.clip + b.index;
  float* p = s.p + unit * s.tests * s.padded;
  std::fill_n(p, s.tests * s.padded, 0.0f);
  std::vector<float> sums(kRows * s.width * kLanes);
  alignas(64) float root[kRows * kCols] = {};
  double energy[kRows], square = 0;
  for (Tile t{first, 0, 0, 0, 0}; t.row < last; t.row += t.rows) {
    // Rows that are cut are bands of their own.
    const bool begins_late = t.row == 0 && s.skip > 0;
    const int64_t whole = s.missing > 0 && last == s.rows ? last - 1 : last;
    t.rows = begins_late || t.row == whole ? 1 : static_cast<int>(std::min<int64_t>(kRows, whole - t.row));
    const int64_t end = t.row + t.rows == s.rows && t.row >= whole ? s.cols - s.missing : s.cols;
    std::fill(sums.begin(), sums.end(), 0.0f);
    std::fill_n(energy, kRows, 0.0);
    for (t.col = begins_late ? s.skip : 0; t.col < end; t.col += kCols) {
      t.cols = static_cast<int>(std::min<int64_t>(kCols, end - t.col));
      t.padded = (t.cols + kPad - 1) / kPad * kPad;
      Ahead ahead(step, b, t, std::min<int64_t>(kCols, end - t.col - kCols));
      reconstruct(b, t, root, ahead);
      for (int i = 0; i < t.rows; ++i) {
        float* r = root + i * kCols;
        std::fill(r + t.cols, r + t.padded, 0.0f);
        const float least = floor_rows == nullptr ? 0.0f : floor_rows[t.row + i];
        const float *floor = floor_cols + t.col, *counts = energies + t.col;
        Vec sum = {};
        const auto moment = [&](int j, int count, Vec g) {
          const Vec lowest = least * load(floor + j), held = load(r + j);
          const Vec kept = held < lowest ? lowest : held;  // lets NaN through
          Vec v = kept * kept + step.rest2 * g * g;
          if (count < kLanes) v = some(reinterpret_cast<const float*>(&v), count);
          sum += v * load(counts + j);
          const Vec sd = root_of(v);
          store(r + j, sd);
          return sd;
        };
        row_pass<mean>(step, b.elements(step, t.row + i, t.col), t.cols, clip, &square, moment);
        energy[i] += sum_of(sum);
      }
      if (s.width > 0) sketch(b, t, root, sums.data(), ahead);
      if (s.tests > 0) project(b, t, root, p, ahead);
    }
    for (int i = 0; i < t.rows; ++i) {
      s.row_energies[b.index * s.rows + t.row + i] = energy[i];
      float* y = s.y + (b.index * s.rows + t.row + i) * s.width;
      for (int64_t l = 0; l < s.width; ++l) {
        const float* lanes = sums.data() + (i * s.width + l) * kLanes;
        float sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
        y[l] = sum;
      }
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
      for (int64_t i = 0; i < s->blocks; ++i) pack(*s, i, std::sqrt(step.beta2));
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

// Fresh columns of one row of a sketch: the four 16-bit numbers of each hash.
void fresh_row(uint64_t key, int64_t row, int64_t quads, float* to) {
  for (int64_t quad = 0; quad < quads; ++quad) {
    const uint64_t index = static_cast<uint64_t>(row * quads + quad + 1);
    const uint64_t bits = finalised(key + index * 0x9e3779b97f4a7c15U);
    for (int l = 0; l < 4; ++l) to[quad * 4 + l] = static_cast<int16_t>(bits >> (16 * l)) + 0.5f;
  }
}

// A factor's columns and how they enter a sketch, padded to vectors: kept ones by `scale`, the rest,
// and those that hold nothing, by fresh numbers.
struct Columns {
  int64_t kept, width, padded;
  std::vector<float> form, scale, fresh, factor, drawn, row;

  // gram: of the other factor, over `square`.
  Columns(int64_t rank, int64_t of_sketch, const double* gram, double square)
      : kept(std::min(rank, of_sketch)),
        width(of_sketch),
        padded((std::max(rank, of_sketch) + kLanes - 1) / kLanes * kLanes),
        form(rank * padded), scale(padded), fresh(padded, 1.0f), factor(padded),
        drawn(padded + 4), row(padded) {
    for (int64_t i = 0; i < rank; ++i)
      for (int64_t j = 0; j < rank; ++j)
        form[i * padded + j] = static_cast<float>(gram[i * rank + j] / square);
  }

  // x^T gram x of a row of the factor, over a scale's square.
  float energy(const float* x, int64_t rank, float over) {
    std::fill(factor.begin(), factor.end(), 0.0f);
    for (int64_t l = 0; l < rank; ++l) factor[l] = x[l] * over;
    Vec total = {};
    for (int64_t l = 0; l < padded; l += kLanes) {
      Vec sum = {};
      for (int64_t i = 0; i < rank; ++i) sum += factor[i] * load(form.data() + i * padded + l);
      total += sum * load(factor.data() + l);
    }
    return std::max(sum_of(total), 0.0f);
  }

  // weight (kept weight scale | fresh): one row of D X or D Z.
  void sketch(uint64_t key, int64_t index, const float* x, float weight, float unit, float* to) {
    std::copy_n(x, kept, factor.begin());
    fresh_row(key, index, (width + 3) / 4, drawn.data());
    const float square = weight * weight;
    unit *= weight;
    for (int64_t l = 0; l < width; l += kLanes)
      store(row.data() + l, square * load(scale.data() + l) * load(factor.data() + l) +
                                unit * load(fresh.data() + l) * load(drawn.data() + l));
    std::copy_n(row.begin(), width, to);
  }
};

void sketches_of(const Sketches& s, int64_t b) {
  constexpr float kTiny = std::numeric_limits<float>::min(), kLeast = 1e-2f;
  constexpr float kStep = 0x1p-15f * 1.7320508075688772f;  // of numbers with a deviation of 1
  const int64_t k = s.rank;
  const float *q = s.q + b * s.rows * k, *u = s.u + b * s.cols * k;
  const double *gram_q = s.gram_q + b * k * k, *gram_u = s.gram_u + b * k * k;
  double square = 0;
  for (int64_t l = 0; l < k; ++l) square += gram_u[l * k + l];
  square = std::max(square, static_cast<double>(kTiny));
  const float scale = std::max(static_cast<float>(std::sqrt(square)), kTiny);
  Columns of_u(k, s.width, gram_q, 1.0), of_q(k, s.tests, gram_u, square);
  float *dc = s.col_weights + b * s.cols, *dr = s.row_weights + b * s.rows;
  double sum = 0;
  for (int64_t j = 0; j < s.cols; ++j) sum += dc[j] = of_u.energy(u + j * k, k, 1.0f / scale);
  const float total = std::max(static_cast<float>(sum), kTiny);
  const bool balanced = s.balanced && total > kTiny;  // where nothing is known, all weigh 1
  std::vector<double> norms(k);
  for (int64_t j = 0; j < s.cols; ++j) {
    if (s.floor_cols != nullptr) s.floor_cols[b * s.cols + j] = std::sqrt(dc[j]) * scale;
    dc[j] = balanced ? 1.0f / std::sqrt(std::max(dc[j] / total * s.cols, kLeast)) : 1.0f;
    for (int64_t l = 0; l < of_u.kept; ++l) {
      const double x = static_cast<double>(u[j * k + l]) * dc[j];
      norms[l] += x * x;
    }
  }
  for (Columns* c : {&of_u, &of_q})
    for (int64_t l = 0; l < c->kept; ++l) {
      const float norm = l < of_u.kept ? static_cast<float>(std::sqrt(norms[l])) : 0.0f;
      // Columns of D_r Q have about unit norm.
      c->scale[l] = norm > 0 ? (c == &of_u ? 1.0f / norm : 1.0f) : 0.0f;
      c->fresh[l] = norm > 0 ? 0.0f : 1.0f;
    }
  const float of_cols = kStep / std::sqrt(static_cast<float>(s.cols));
  for (int64_t j = 0; j < s.cols; ++j)
    of_u.sketch(s.keys_x[b], j, u + j * k, dc[j], of_cols, s.x + (b * s.cols + j) * s.width);
  const float of_rows = kStep / std::sqrt(static_cast<float>(s.matrix_rows));
  for (int64_t i = 0; i < s.rows; ++i) {
    const float energy = of_q.energy(q + i * k, k, 1.0f);
    if (s.floor_rows != nullptr) s.floor_rows[b * s.rows + i] = std::sqrt(energy / total * s.floor);
    dr[i] = balanced ? 1.0f / std::sqrt(std::max(energy / total * s.matrix_rows, kLeast)) : 1.0f;
    of_q.sketch(s.keys_z[b], s.first + i, q + i * k, dr[i], of_rows,
                s.z + (b * s.rows + i) * s.tests);
  }
}

}  // namespace

extern "C" {

void sketches(const Sketches* s) {
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
  for (int64_t b = 0; b < s->blocks; ++b) sketches_of(*s, b);
}

void one_pass(const Step* step, const Stack* stacks, int64_t count, const Run* runs,
              int64_t run_count) {
  const auto run = step->kept == kNone     ? pass<Mean::kNothing>
                   : step->of_gradients ? pass<Mean::kGradients>
                                        : pass<Mean::kUpdates>;
  run(*step, stacks, count, runs, run_count);
}

}  // extern "C"
