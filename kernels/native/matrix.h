// Matrices packed in panels, and rows times panels: the one product that everything else is made of.
//
// A panel is 32 columns of a matrix [K, N] as words [K / g][32]: g consecutive values of a column lie in one word, 1 float32, 2 bfloat16 or
// 4 int8. A row of the other factor is words too, K / g of them, so a product is: for each word of the row, multiply-add it with
// 32 words of the panel. What is missing at the end of K or N is zero.
//
// Each sum runs over K from the first word to the last, whatever the number of rows: that makes a row's result independent of its batch.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace quire {

constexpr int kPanel = 32;                      // columns of a panel
constexpr int kVectors = kPanel / kLanes;       // vectors across a panel

enum class Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// How many values one word holds.
constexpr int values_per_word(Format format) { return format == Format::kFloat32 ? 1 : format == Format::kBfloat16 ? 2 : 4; }

// Words of one column, or of one row of the other factor.
inline size_t num_words(Format format, size_t k) {
  const size_t g = values_per_word(format);
  return (k + g - 1) / g;
}
inline size_t num_panels(size_t n) { return (n + kPanel - 1) / kPanel; }

struct DotFloat32 {
  using Sum = float;
  using Sums = Floats;
  static Sums none() { return zeros(); }
  static Sums step(Sums sum, Words a, Words b) { return fma(as_floats(a), as_floats(b), sum); }
  static void put(Sum* p, Sums x) { store(p, x); }
};
struct DotBfloat16 {
  using Sum = float;
  using Sums = Floats;
  static Sums none() { return zeros(); }
  static Sums step(Sums sum, Words a, Words b) { return dot_bf16(sum, a, b); }
  static void put(Sum* p, Sums x) { store(p, x); }
};
struct DotInt8 {
  using Sum = int32_t;
  using Sums = Words;
  static Sums none() { return no_words(); }
  static Sums step(Sums sum, Words a, Words b) { return dot_u8s8(sum, a, b); }
  static void put(Sum* p, Sums x) { store_words(p, x); }
};

// Registers hold kRows x kVectors sums: as many as the instruction set has room for beside the operands.
#if defined(QUIRE_AVX512)
constexpr int kMaxRows = 12, kVectorsAtOnce = 2;
#elif defined(QUIRE_AVX2)
constexpr int kMaxRows = 4, kVectorsAtOnce = 2;
#else
constexpr int kMaxRows = 4, kVectorsAtOnce = 1;
#endif
// How far ahead of its use a panel is asked for, in words: a panel is read once, in order, and usually from memory.
constexpr size_t kAhead = 24 * kPanel;

// out[r][0..32) = sum over the words of row r times the panel, for kRows rows.
template <class Dot, int kRows>
inline void tile(const uint32_t* rows, size_t row_stride, const uint32_t* panel, size_t words, typename Dot::Sum* out, size_t out_stride) {
  for (int v0 = 0; v0 < kVectors; v0 += kVectorsAtOnce) {
    typename Dot::Sums sums[kRows][kVectorsAtOnce];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectorsAtOnce; ++v) sums[r][v] = Dot::none();
    const uint32_t* column = panel + v0 * kLanes;
    for (size_t k = 0; k < words; ++k, column += kPanel) {
      Words b[kVectorsAtOnce];
      for (int v = 0; v < kVectorsAtOnce; ++v) {
        b[v] = load_words(column + v * kLanes);
        prefetch(column + v * kLanes + kAhead);
      }
      for (int r = 0; r < kRows; ++r) {
        const Words a = all_words(rows[r * row_stride + k]);
        for (int v = 0; v < kVectorsAtOnce; ++v) sums[r][v] = Dot::step(sums[r][v], a, b[v]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectorsAtOnce; ++v) Dot::put(out + r * out_stride + (v0 + v) * kLanes, sums[r][v]);
  }
}

// The same for any number of rows.
template <class Dot>
inline void rows_times_panel(const uint32_t* rows, size_t row_stride, size_t num_rows, const uint32_t* panel, size_t words,
                             typename Dot::Sum* out, size_t out_stride) {
  size_t r = 0;
  for (; r + kMaxRows <= num_rows; r += kMaxRows) tile<Dot, kMaxRows>(rows + r * row_stride, row_stride, panel, words, out + r * out_stride, out_stride);
  const auto rest = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (; r + kRows <= num_rows; r += kRows) tile<Dot, kRows>(rows + r * row_stride, row_stride, panel, words, out + r * out_stride, out_stride);
  };
  if constexpr (kMaxRows > 8) rest(std::integral_constant<int, 8>());
  if constexpr (kMaxRows > 4) rest(std::integral_constant<int, 4>());
  rest(std::integral_constant<int, 2>());
  rest(std::integral_constant<int, 1>());
}

// A packed matrix as handlers get it.
struct Matrix {
  Format format = Format::kFloat32;
  size_t k = 0, n = 0;
  const uint32_t* words = nullptr;      // [N / 32][K / g][32]
  const float* scales = nullptr;        // [N] int8 only: a column is scale x int8
  const int32_t* sums = nullptr;        // [N / 32 * 32] int8 only: 128 x the sum of a column's int8, which unsigned activations add

  size_t row_words() const { return num_words(format, k); }
  // Where several of one shape lie one after the other: the one with number e.
  Matrix expert(size_t e) const {
    Matrix other = *this;
    other.words += e * num_panels(n) * row_words() * kPanel;
    if (format == Format::kInt8) {
      other.scales += e * n;
      other.sums += e * num_panels(n) * kPanel;
    }
    return other;
  }
  const uint32_t* panel(size_t p) const { return words + p * row_words() * kPanel; }
};

// Rows of activations as a product takes them: words [T][words], and for int8 the scale of each row.
struct Rows {
  uint32_t* words = nullptr;
  float* scales = nullptr;
};

// One row of activations, float32 or bfloat16, in the format of the matrix that it meets.
template <class T>
inline void row_to_words(const T* x, size_t k, Format format, uint32_t* words, float* scale) {
  const size_t count = num_words(format, k);
  if (format == Format::kFloat32) {
    float* to = reinterpret_cast<float*>(words);
    size_t i = 0;
    for (; i + kLanes <= k; i += kLanes) store(to + i, load_as_floats(x + i));
    for (; i < k; ++i) to[i] = as_float(x[i]);
    return;
  }
  words[count - 1] = 0;
  if (format == Format::kBfloat16) {
    bf16* to = reinterpret_cast<bf16*>(words);
    if constexpr (sizeof(T) == sizeof(bf16)) {
      std::memcpy(to, x, k * sizeof(bf16));
    } else {
      size_t i = 0;
      for (; i + kLanes <= k; i += kLanes) store_bf16(to + i, load_as_floats(x + i));
      for (; i < k; ++i) to[i] = to_bf16(as_float(x[i]));
    }
    return;
  }
  // Symmetric, per row: x = scale x (u8 - 128).
  // The largest size, found among the bits: in that order a NaN is above all numbers, and the row becomes NaN as it has to.
  uint32_t largest_bits = 0;
  for (size_t i = 0; i < k; ++i) {
    const float value = as_float(x[i]);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    largest_bits = std::max(largest_bits, bits & 0x7fffffffu);
  }
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  *scale = largest * (1.0f / 127.0f);  // as XLA divides by a constant
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  uint8_t* to = reinterpret_cast<uint8_t*>(words);
  for (size_t i = 0; i < k; ++i) {
    const float q = std::nearbyint(as_float(x[i]) * inverse);
    to[i] = static_cast<uint8_t>(static_cast<int>(std::min(std::max(-127.0f, q), 127.0f)) + 128);  // a NaN becomes -127
  }
  for (size_t i = k; i < count * 4; ++i) to[i] = 128;
}

// The products of some rows with one panel, as float32 [num_rows][32] in `out`.
inline void times_panel(const Rows& rows, size_t num_rows, const Matrix& matrix, size_t panel, float* out) {
  const size_t words = matrix.row_words();
  const uint32_t* columns = matrix.panel(panel);
  if (matrix.format == Format::kFloat32) return rows_times_panel<DotFloat32>(rows.words, words, num_rows, columns, words, out, kPanel);
  if (matrix.format == Format::kBfloat16) return rows_times_panel<DotBfloat16>(rows.words, words, num_rows, columns, words, out, kPanel);
  int32_t* sums = reinterpret_cast<int32_t*>(out);
  rows_times_panel<DotInt8>(rows.words, words, num_rows, columns, words, sums, kPanel);
  alignas(64) float scales[kPanel] = {};
  const size_t first = panel * kPanel, width = std::min<size_t>(kPanel, matrix.n - first);
  for (size_t c = 0; c < width; ++c) scales[c] = matrix.scales[first + c];
  for (size_t r = 0; r < num_rows; ++r)
    for (int c = 0; c < kPanel; ++c) {
      const float exact = static_cast<float>(sums[r * kPanel + c] - matrix.sums[first + c]);
      out[r * kPanel + c] = exact * (rows.scales[r] * scales[c]);
    }
}

}  // namespace quire
