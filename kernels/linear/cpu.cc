// Products with packed matrices, columns taken out of them (a tied embedding is read that way), and the packing itself.
#include "handler.h"
#include "parallel.h"
#include "product.h"

namespace quire {
namespace {

// The rows of x that `used` names, one after the other, as words.
Rows rows_for(Team& team, ffi::AnyBuffer x, const std::vector<uint32_t>& used, size_t k, Format format) {
  const size_t num_rows = used.size();
  const size_t words = num_words(format, k), word_bytes = (num_rows * words * sizeof(uint32_t) + 127) / 64 * 64;
  char* base = static_cast<char*>(scratch<2>(word_bytes + num_rows * sizeof(float)));
  const Rows rows{reinterpret_cast<uint32_t*>(base), reinterpret_cast<float*>(base + word_bytes)};
  for_tokens(team, num_rows, [&](size_t first, size_t end) {
    for (size_t r = first; r < end; ++r) {
      if (x.element_type() == ffi::DataType::F32)
        row_to_words(static_cast<const float*>(x.untyped_data()) + used[r] * k, k, format, rows.words + r * words, rows.scales + r);
      else
        row_to_words(static_cast<const bf16*>(x.untyped_data()) + used[r] * k, k, format, rows.words + r * words, rows.scales + r);
    }
  });
  return rows;
}

// The product of row r goes to row used[r] of the output; the others are left as they are.
template <class T>
void store_product(Team& team, const Rows& rows, const std::vector<uint32_t>& used, const Matrix& matrix, T* out) {
  const Matrix* matrices[] = {&matrix};
  multiply(team, rows, used.size(), matrices, 1, [&](int, size_t panel, size_t first, size_t count, const float* sums) {
    const size_t column = panel * kPanel, width = std::min<size_t>(kPanel, matrix.n - column);
    for (size_t r = 0; r < count; ++r) store_panel<T>(sums + r * kPanel, 1, width, nullptr, out + used[first + r] * matrix.n + column, matrix.n);
  });
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::PRED> is_used, ffi::RemainingArgs buffers, ffi::Result<ffi::AnyBuffer> out, int64_t format) {
  const size_t num_rows = x.dimensions()[0], k = x.dimensions()[1], n = out->dimensions()[1];
  Arguments from(buffers);
  const Matrix matrix = from.matrix(static_cast<Format>(format), k, n);
  if (ffi::Error error = from.check(); error.failure()) return error;
  Team team(pool);
  const std::vector<uint32_t> used = used_rows(is_used, num_rows);
  const Rows rows = rows_for(team, x, used, k, matrix.format);
  if (out->element_type() == ffi::DataType::F32)
    store_product(team, rows, used, matrix, static_cast<float*>(out->untyped_data()));
  else
    store_product(team, rows, used, matrix, static_cast<bf16*>(out->untyped_data()));
  return ffi::Error::Success();
}

// One column of a packed matrix as a row [K].
template <class T>
void take_column(const Matrix& matrix, size_t n, T* row) {
  const size_t g = values_per_word(matrix.format);
  const uint32_t* word = matrix.panel(n / kPanel) + n % kPanel;
  for (size_t k = 0; k < matrix.k; k += g, word += kPanel) {
    if (matrix.format == Format::kFloat32) {
      float value;
      std::memcpy(&value, word, sizeof value);
      assign(row[k], value);
    } else {
      for (size_t i = 0; i < std::min(g, matrix.k - k); ++i) {
        if (matrix.format == Format::kBfloat16)
          assign(row[k + i], to_float(static_cast<bf16>(*word >> (16 * i))));
        else
          assign(row[k + i], static_cast<float>(static_cast<int8_t>(*word >> (8 * i))) * matrix.scales[n]);
      }
    }
  }
}

template <class T>
void take_all(Team& team, const Matrix& matrix, ffi::Buffer<ffi::S32> ids, T* out) {
  for_tokens(team, ids.element_count(), [&](size_t first, size_t end) {
    for (size_t t = first; t < end; ++t) {
      const int64_t id = std::min<int64_t>(std::max<int64_t>(ids.typed_data()[t], 0), static_cast<int64_t>(matrix.n) - 1);
      take_column(matrix, static_cast<size_t>(id), out + t * matrix.k);
    }
  });
}

// Columns of a packed matrix as rows: out [T, K].
ffi::Error columns(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, ffi::RemainingArgs buffers, ffi::Result<ffi::AnyBuffer> out, int64_t format,
                   int64_t n) {
  Arguments from(buffers);
  const Matrix matrix = from.matrix(static_cast<Format>(format), out->dimensions()[1], n);
  if (ffi::Error error = from.check(); error.failure()) return error;
  Team team(pool);
  if (out->element_type() == ffi::DataType::F32)
    take_all(team, matrix, ids, static_cast<float*>(out->untyped_data()));
  else
    take_all(team, matrix, ids, static_cast<bf16*>(out->untyped_data()));
  return ffi::Error::Success();
}

template <class T>
void pack(const T* source, int64_t k_stride, int64_t n_stride, size_t k, size_t n, Format format, uint32_t* words) {
  const size_t g = values_per_word(format), count = num_words(format, k);
  T* to = reinterpret_cast<T*>(words);
  for (size_t panel = 0; panel < num_panels(n); ++panel, to += count * kPanel * g) {
    const size_t first = panel * kPanel, width = std::min<size_t>(kPanel, n - first);
    if (width < kPanel || k % g != 0) std::fill_n(to, count * kPanel * g, T());
    // Columns inside, a few words of K outside: reads follow cache lines where K is contiguous, writes stay within a panel.
    constexpr size_t kStep = 32;
    for (size_t k0 = 0; k0 < k; k0 += kStep)
      for (size_t c = 0; c < width; ++c) {
        const T* column = source + static_cast<int64_t>(first + c) * n_stride;
        for (size_t i = k0; i < std::min(k0 + kStep, k); ++i) to[(i / g * kPanel + c) * g + i % g] = column[static_cast<int64_t>(i) * k_stride];
      }
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_columns, columns,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("n"));

extern "C" {

// Packs a matrix [k, n] of float32, bfloat16 bits or int8, whose element (i, j) lies at i * k_stride + j * n_stride elements. `sums` (int8
// only, as many as there are columns in the panels) becomes what unsigned activations add to each column.
void quire_pack(const void* source, int64_t k_stride, int64_t n_stride, int64_t k, int64_t n, int32_t format, uint32_t* words, int32_t* sums) {
  const Format to = static_cast<Format>(format);
  if (to == Format::kFloat32) return pack(static_cast<const float*>(source), k_stride, n_stride, k, n, to, words);
  if (to == Format::kBfloat16) return pack(static_cast<const bf16*>(source), k_stride, n_stride, k, n, to, words);
  pack(static_cast<const int8_t*>(source), k_stride, n_stride, k, n, to, words);
  const size_t count = num_words(to, k);
  for (size_t c = 0; c < num_panels(n) * kPanel; ++c) {
    int32_t sum = 0;
    const int8_t* column = reinterpret_cast<const int8_t*>(words + (c / kPanel * count) * kPanel + c % kPanel);
    for (size_t i = 0; i < count * 4; ++i) sum += column[i / 4 * kPanel * 4 + i % 4];
    sums[c] = 128 * sum;
  }
}

// Most threads that one op uses, the calling one included; 0 is as many as XLA has.
void quire_set_max_threads(int32_t count) { Crew::instance().max_threads.store(count); }

}  // extern "C"
}  // namespace quire
