// SPDX-License-Identifier: Apache-2.0
//
// The two passes on CPUs: an element is loaded once a pass, V stays in the first-level cache, and
// all threads share all blocks. What the passes compute is written in interface.py, how they are
// called in native_passes.py.
//
// Matrices are row-major fp32. Packed operands (ut, floor_cols, sketch, basis) are padded with
// zeros by the caller: columns to a multiple of kPad, widths of kWidth. Rows are cut into chunks
// that depend on the shape alone, and the caller adds up what chunks reduce to, in order: a result
// depends neither on the number of threads nor on who was first.

#include "native.h"

namespace {

// Two vector registers' worth of accumulators a row, eight in all, fit any instruction set.
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

struct Tile {
  int64_t row, col;
  int rows, cols, padded;
};

// root[i][j] = sum_l q[row + i][l] ut[l][col + j]. Meanwhile the tile's elements are fetched.
void reconstruct(const Chunk& c, const Tile& t, float* root) {
  constexpr int kBlock = 4;
  const int64_t rank = c.s.rank, stride = c.s.padded;
  for (int i = 0; i < t.rows; i += kBlock) {
    const float* q[kBlock];
    for (int r = 0; r < kBlock; ++r) q[r] = c.q + (t.row + std::min(i + r, t.rows - 1)) * rank;
    for (int j = 0; j < t.padded; j += 2 * kLanes) {
      for (int r = 0; r < kBlock; ++r) {
        const int64_t at = (t.row + std::min(i + r, t.rows - 1)) * c.s.cols + t.col + j;
        c.prefetch(at);
        if (kLanes == 16) c.prefetch(at + kLanes);
      }
      Vec sum[kBlock][2] = {};
      const float* u = c.ut + t.col + j;
      for (int64_t l = 0; l < rank; ++l, u += stride) {
        const Vec u0 = load(u), u1 = load(u + kLanes);
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

// V of one element. The comparison lets NaN through.
inline float second_moment(float root, float least, float g, float rest2) {
  root = root < least ? least : root;
  return root * root + rest2 * g * g;
}

// out[i][w] += sum_j root[i][j] sketch[col + j][w]
void add_sketch(const Stack& s, const Tile& t, const float* root, const float* sketch, float* out) {
  constexpr int kBlock = 8;
  for (int64_t w = 0; w < s.width; w += kLanes) {
    for (int i = 0; i < kRows; i += kBlock) {
      Vec sum[kBlock] = {};
      const float* from = sketch + t.col * s.width + w;
      for (int j = 0; j < t.cols; ++j, from += s.width) {
        const Vec column = load(from);
        for (int r = 0; r < kBlock; ++r) sum[r] += root[(i + r) * kCols + j] * column;
      }
      for (int r = 0; r < kBlock; ++r) {
        float* to = out + (i + r) * s.width + w;
        store(to, load(to) + sum[r]);
      }
    }
  }
}

// out[w][col + j] += sum_i basis[row + i][w] root[i][j], for the first `used` w
void add_projection(const Stack& s, const Tile& t, const float* root, const float* basis,
                    int64_t used, float* out) {
  constexpr int kBlock = 4;
  for (int64_t w = 0; w < used; w += kBlock) {
    const float* from = basis + t.row * s.width + w;
    for (int j = 0; j < t.padded; j += 2 * kLanes) {
      float* to = out + w * s.padded + t.col + j;
      Vec sum[kBlock][2];
      for (int l = 0; l < kBlock; ++l) {
        sum[l][0] = load(to + l * s.padded);
        sum[l][1] = load(to + l * s.padded + kLanes);
      }
      for (int i = 0; i < t.rows; ++i) {
        const Vec r0 = load(root + i * kCols + j), r1 = load(root + i * kCols + j + kLanes);
        for (int l = 0; l < kBlock; ++l) {
          sum[l][0] += from[i * s.width + l] * r0;
          sum[l][1] += from[i * s.width + l] * r1;
        }
      }
      for (int l = 0; l < kBlock; ++l) {
        store(to + l * s.padded, sum[l][0]);
        store(to + l * s.padded + kLanes, sum[l][1]);
      }
    }
  }
}

// Walks along the rows of a chunk in bands of kRows. In a band: begin(tile), then body(tile, root)
// for each tile with Q U^T in root, then end(tile).
template <class Begin, class Body, class End>
void walk(const Chunk& c, Begin begin, Body body, End end) {
  alignas(64) float root[kRows * kCols] = {};
  for (int64_t row = c.first; row < c.last; row += kRows) {
    Tile t{row, 0, static_cast<int>(std::min<int64_t>(kRows, c.last - row)), 0, 0};
    begin(t);
    for (t.col = 0; t.col < c.s.cols; t.col += kCols) {
      t.cols = static_cast<int>(std::min<int64_t>(kCols, c.s.cols - t.col));
      t.padded = (t.cols + kPad - 1) / kPad * kPad;
      reconstruct(c, t, root);
      body(t, root);
    }
    end(t);
  }
}

enum class Mean { kNone, kGradients, kUpdates };

template <bool clips>
void first_chunk(const Chunk& c, const float* sketch, float* out, float* row_sums, float* col_sums,
                 double* square) {
  const Stack& s = c.s;
  const float correction = s.correction, eps = s.eps, rest2 = s.rest2;
  std::vector<float> sketched(kRows * s.width);
  double sums[kRows];
  *square = 0;
  std::fill_n(col_sums, s.padded, 0.0f);
  walk(
      c,
      [&](const Tile&) {
        std::fill_n(sums, kRows, 0.0);
        std::fill(sketched.begin(), sketched.end(), 0.0f);
      },
      [&](const Tile& t, float* root) {
        for (int i = 0; i < t.rows; ++i) {
          const int64_t at = (t.row + i) * s.cols + t.col;
          const float *g = c.g + at, *least_cols = c.floor_cols + t.col;
          const float least = c.floor_rows[t.row + i];
          float *r = root + i * kCols, *col = col_sums + t.col, row_sum = 0, row_square = 0;
#pragma omp simd reduction(+ : row_sum, row_square)
          for (int j = 0; j < t.cols; ++j) {
            const float v = second_moment(r[j], least * least_cols[j], g[j], rest2);
            const float sd = std::sqrt(v);
            row_sum += v;
            col[j] += v;
            r[j] = sd;
            if (clips) {
              const float x = g[j] / (correction * sd + eps);
              row_square += x * x;
            }
          }
          sums[i] += row_sum;
          *square += row_square;
        }
        add_sketch(s, t, root, sketch, sketched.data());
      },
      [&](const Tile& t) {
        std::copy_n(sums, t.rows, row_sums + t.row);
        std::copy_n(sketched.data(), t.rows * s.width, out + t.row * s.width);
      });
}

template <Mean mean>
void second_chunk(const Chunk& c, const float* basis, int64_t used, const float* row_weights,
                  float clip, float decay, float rate, float* projection, float* col_sums) {
  const Stack& s = c.s;
  const float scale = clip * s.correction, shift = clip * s.eps, rest2 = s.rest2;
  const float beta1 = s.beta1, gain = s.gain, limit = s.largest / clip;
  const float of_mean = s.of_mean, of_new = s.of_new;
  std::fill_n(col_sums, s.padded, 0.0f);
  std::fill_n(projection, used * s.padded, 0.0f);
  walk(
      c, [](const Tile&) {},
      [&](const Tile& t, float* root) {
        for (int i = 0; i < t.rows; ++i) {
          const int64_t at = (t.row + i) * s.cols + t.col;
          const float *g = c.g + at, *least_cols = c.floor_cols + t.col;
          const float least = c.floor_rows[t.row + i], weight = row_weights[t.row + i];
          float *r = root + i * kCols, *col = col_sums + t.col, *w = c.w + at;
          alignas(64) float buffer[kCols];
          float* m = mean == Mean::kNone ? nullptr
                                         : load_mean(c, t.row + i, t.col, t.cols, buffer);
#pragma omp simd
          for (int j = 0; j < t.cols; ++j) {
            const float v = second_moment(r[j], least * least_cols[j], g[j], rest2);
            const float sd = std::sqrt(v);
            const float denominator = scale * sd + shift;
            col[j] += weight * v;
            r[j] = sd;
            if (mean == Mean::kGradients) {
              m[j] = beta1 * m[j] + gain * g[j];
              float x = (of_mean * m[j] + of_new * g[j]) / denominator;
              x = x > limit ? limit : x < -limit ? -limit : x;  // lets NaN through
              w[j] = decay * w[j] + rate * x;
            } else if (mean == Mean::kUpdates) {
              const float x = g[j] / denominator;
              m[j] = beta1 * m[j] + gain * x;
              w[j] = decay * w[j] + rate * (of_mean * m[j] + of_new * x);
            } else {
              w[j] = decay * w[j] + rate * (g[j] / denominator);
            }
          }
          if (m == buffer) keep_mean(c, t.row + i, t.col, t.cols, buffer);
        }
        add_projection(s, t, root, basis, used, projection);
      },
      [](const Tile&) {});
}

}  // namespace

extern "C" {

// sketch (blocks, padded, width) -> out (blocks, rows, width), row_sums (blocks, rows),
// col_sums (blocks, chunks, padded), squares (blocks, chunks).
void first_pass(const Stack* stack, const float* sketch, float* out, float* row_sums,
                float* col_sums, double* squares) {
  const Stack& s = *stack;
  const auto run = s.clips ? first_chunk<true> : first_chunk<false>;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
  for (int64_t unit = 0; unit < s.blocks * chunks_of(s); ++unit) {
    const Chunk c(s, unit, nullptr);
    run(c, sketch + c.block * s.padded * s.width, out + c.block * s.rows * s.width,
        row_sums + c.block * s.rows, col_sums + unit * s.padded, squares + unit);
  }
}

// weights: blocks x (rows, cols), in place like s.m. basis (blocks, rows, width) ->
// projection (blocks, chunks, used, padded), col_sums (blocks, chunks, padded). clip: (blocks).
void second_pass(const Stack* stack, float* const* weights, const float* basis, int64_t used,
                 const float* row_weights, const float* clip, float decay, float rate,
                 float* projection, float* col_sums) {
  const Stack& s = *stack;
  const auto run = s.m == nullptr   ? second_chunk<Mean::kNone>
                   : s.of_gradients ? second_chunk<Mean::kGradients>
                                    : second_chunk<Mean::kUpdates>;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
  for (int64_t unit = 0; unit < s.blocks * chunks_of(s); ++unit) {
    const Chunk c(s, unit, weights);
    run(c, basis + c.block * s.rows * s.width, used,
        row_weights + c.block * s.rows, s.clips ? clip[c.block] : 1.0f, decay, rate,
        projection + unit * used * s.padded, col_sums + unit * s.padded);
  }
}

}  // extern "C"
