// What an EAGLE-3 head keeps of tokens that the target has computed, in one call: their features, and the keys and values of the entries.
//
// Of a step that computes prompts much is padding, and the pieces between the products would touch all of it, in memory that is cold by
// then. Here only the tokens that are used are read, with the roundings of quire.models.eagle.
#include <vector>

#include "handler.h"
#include "parallel.h"
#include "product.h"
#include "row_ops.h"
#include "../paged_attention/cpu.h"

namespace quire {
namespace {

// A head's buffers in the order in which `quire.kernels.draft_head.cpu` hands them over.
template <class T>
struct HeadArguments {
  const T *captured, *embeddings;
  const float *cos, *sin;
  const int32_t *blocks, *offsets;
  const T *hidden_norm, *input_norm;
  Matrix fc, k, v;
  const T *k_bias, *v_bias;
  size_t hidden, half_rotary;
  float eps, norm_offset;
};

template <class T>
void compute_entries(Team& team, const HeadArguments<T>& args, const std::vector<uint32_t>& used, const Cache<T>& cache, T* features) {
  const size_t num_tokens = used.size(), width = args.hidden, inputs_width = 2 * width;
  const size_t kv_width = static_cast<size_t>(cache.num_kv_heads) * cache.head_dim;
  const size_t words = args.fc.row_words(), input_words = args.k.row_words();
  const size_t word_bytes = (num_tokens * std::max(words, input_words) * sizeof(uint32_t) + 127) / 64 * 64;
  const size_t scale_bytes = (num_tokens * sizeof(float) + 127) / 64 * 64;
  // Of the captured states first, then of what the keys and values are made of.
  char* base = static_cast<char*>(scratch<2>(word_bytes + scale_bytes + num_tokens * 2 * kv_width * sizeof(T)));
  const Rows rows{reinterpret_cast<uint32_t*>(base), reinterpret_cast<float*>(base + word_bytes)};
  T* kv = reinterpret_cast<T*>(base + word_bytes + scale_bytes);

  for_tokens(team, num_tokens, [&](size_t first, size_t end) {
    for (size_t t = first; t < end; ++t)
      row_to_words(args.captured + used[t] * args.fc.k, args.fc.k, args.fc.format, rows.words + t * words, rows.scales + t);
  });
  const Matrix* fc[] = {&args.fc};
  multiply(team, rows, num_tokens, fc, 1, [&](int, size_t panel, size_t first, size_t count, const float* sums) {
    const size_t column = panel * kPanel, columns = std::min<size_t>(kPanel, width - column);
    for (size_t r = 0; r < count; ++r)
      store_panel<T>(sums + r * kPanel, 1, columns, nullptr, features + used[first + r] * width + column, width);
  });
  for_tokens(team, num_tokens, [&](size_t first, size_t end) {
    T* inputs = static_cast<T*>(scratch<3>(inputs_width * sizeof(T)));
    for (size_t t = first; t < end; ++t) {
      rms_norm(args.embeddings + used[t] * width, args.input_norm, width, args.eps, args.norm_offset, inputs);
      rms_norm(features + used[t] * width, args.hidden_norm, width, args.eps, args.norm_offset, inputs + width);
      row_to_words(inputs, inputs_width, args.k.format, rows.words + t * input_words, rows.scales + t);
    }
  });
  const Matrix* matrices[] = {&args.k, &args.v};
  const T* biases[] = {args.k_bias, args.v_bias};
  multiply(team, rows, num_tokens, matrices, 2, [&](int m, size_t panel, size_t first, size_t count, const float* sums) {
    const size_t column = panel * kPanel, columns = std::min<size_t>(kPanel, kv_width - column);
    const T* bias = biases[m] == nullptr ? nullptr : biases[m] + column;
    store_panel(sums, count, columns, bias, kv + first * 2 * kv_width + m * kv_width + column, 2 * kv_width);
  });
  for_tokens(team, num_tokens, [&](size_t first, size_t end) {
    for (size_t t = first; t < end; ++t) {
      T *k = kv + t * 2 * kv_width, *v = k + kv_width;
      const size_t place = used[t];
      for (int head = 0; head < cache.num_kv_heads; ++head)
        rotate(k + head * cache.head_dim, args.cos + place * args.half_rotary, args.sin + place * args.half_rotary, args.half_rotary);
      write_token(cache, k, v, args.blocks[place], args.offsets[place]);
    }
  });
}

template <class T>
ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer captured, ffi::AnyBuffer embeddings, ffi::Buffer<ffi::PRED> is_used, ffi::RemainingArgs buffers,
               ffi::AnyBuffer features, ffi::AnyBuffer cache, Format format, bool has_bias, size_t half_rotary, float eps, float norm_offset) {
  const auto dims = cache.dimensions();
  const Cache<T> view{static_cast<T*>(cache.untyped_data()), static_cast<int>(dims[0]), static_cast<int>(dims[1]), static_cast<int>(dims[2] / 2),
                      static_cast<int>(dims[3])};
  const size_t hidden = embeddings.dimensions()[1], kv_width = static_cast<size_t>(view.num_kv_heads) * view.head_dim;
  Arguments from(buffers);
  HeadArguments<T> args{};
  args.captured = static_cast<const T*>(captured.untyped_data());
  args.embeddings = static_cast<const T*>(embeddings.untyped_data());
  args.hidden = hidden;
  args.half_rotary = half_rotary;
  args.eps = eps;
  args.norm_offset = norm_offset;
  args.cos = from.data<const float>();
  args.sin = from.data<const float>();
  args.blocks = from.data<const int32_t>();
  args.offsets = from.data<const int32_t>();
  args.hidden_norm = from.data<const T>();
  args.input_norm = from.data<const T>();
  args.fc = from.matrix(format, captured.dimensions()[1], hidden);
  args.k = from.matrix(format, 2 * hidden, kv_width);
  args.v = from.matrix(format, 2 * hidden, kv_width);
  if (has_bias) {
    args.k_bias = from.data<const T>();
    args.v_bias = from.data<const T>();
  }
  if (ffi::Error error = from.check(); error.failure()) return error;
  Team team(pool);
  compute_entries<T>(team, args, used_rows(is_used, embeddings.dimensions()[0]), view, static_cast<T*>(features.untyped_data()));
  return ffi::Error::Success();
}

ffi::Error head_entries(ffi::ThreadPool pool, ffi::AnyBuffer captured, ffi::AnyBuffer embeddings, ffi::AnyBuffer, ffi::Buffer<ffi::PRED> is_used,
                        ffi::RemainingArgs buffers, ffi::Result<ffi::AnyBuffer> features, ffi::Result<ffi::AnyBuffer> cache, int64_t format,
                        int64_t has_bias, int64_t half_rotary, float eps, float norm_offset) {
  const Format of = static_cast<Format>(format);
  if (embeddings.element_type() == ffi::DataType::F32)
    return run<float>(pool, captured, embeddings, is_used, buffers, *features, *cache, of, has_bias != 0, half_rotary, eps, norm_offset);
  return run<bf16>(pool, captured, embeddings, is_used, buffers, *features, *cache, of, has_bias != 0, half_rotary, eps, norm_offset);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_head_entries, head_entries,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("has_bias")
                                  .Attr<int64_t>("half_rotary")
                                  .Attr<float>("eps")
                                  .Attr<float>("norm_offset"));

}  // namespace quire
