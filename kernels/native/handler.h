// Reading a handler's buffers, in order. What is wrong with them is a defect of the Python side, and is said by name.
#pragma once

#include <string>
#include <vector>

#include "matrix.h"
#include "xla/ffi/api/ffi.h"

namespace quire {

namespace ffi = xla::ffi;

class Arguments {
 public:
  explicit Arguments(ffi::RemainingArgs args) : args_(args) {}

  ffi::AnyBuffer next() {
    auto buffer = args_.get<ffi::AnyBuffer>(next_++);
    if (buffer.has_value()) return *buffer;
    is_short_ = true;
    return ffi::AnyBuffer(&nothing_);
  }
  template <class T>
  T* data() {
    return static_cast<T*>(next().untyped_data());
  }
  // A packed matrix, or `copies` of one shape: words, and for int8 the scales and sums of the columns.
  Matrix matrix(Format format, size_t k, size_t n, size_t copies = 1) {
    Matrix matrix;
    matrix.format = format;
    matrix.k = k;
    matrix.n = n;
    ffi::AnyBuffer words = next();
    if (words.element_count() != copies * num_panels(n) * num_words(format, k) * kPanel) is_misshapen_ = true;
    matrix.words = static_cast<const uint32_t*>(words.untyped_data());
    if (format == Format::kInt8) {
      matrix.scales = data<const float>();
      matrix.sums = data<const int32_t>();
    }
    return matrix;
  }
  // Whether every buffer was there, and none is left.
  ffi::Error check() const {
    if (is_short_ || next_ != args_.size())
      return ffi::Error::InvalidArgument("expected " + std::to_string(next_) + " buffers, got " + std::to_string(args_.size()));
    if (is_misshapen_) return ffi::Error::InvalidArgument("a packed matrix has not the number of words that its shape asks for");
    return ffi::Error::Success();
  }

 private:
  ffi::RemainingArgs args_;
  size_t next_ = 0;
  bool is_short_ = false, is_misshapen_ = false;
  XLA_FFI_Buffer nothing_{};
};

// The rows that a handler computes: those that `is_used` names, or all where the buffer is empty.
inline std::vector<uint32_t> used_rows(ffi::Buffer<ffi::PRED> is_used, size_t num_rows) {
  std::vector<uint32_t> rows;
  rows.reserve(num_rows);
  const bool* used = is_used.element_count() == 0 ? nullptr : is_used.typed_data();
  for (size_t row = 0; row < num_rows; ++row)
    if (used == nullptr || used[row]) rows.push_back(static_cast<uint32_t>(row));
  return rows;
}

}  // namespace quire
