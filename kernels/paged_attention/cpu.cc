// The two ops of quire.kernels.paged_attention.contract as handlers.
#include "cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <vector>

#include "handler.h"
#include "product.h"

namespace quire {
namespace {

template <class T>
Cache<T> view(ffi::AnyBuffer cache) {
  const auto dims = cache.dimensions();
  return {static_cast<T*>(cache.untyped_data()), static_cast<int>(dims[0]), static_cast<int>(dims[1]), static_cast<int>(dims[2] / 2),
          static_cast<int>(dims[3])};
}

template <class T>
void write_all(Team& team, const Cache<T>& cache, ffi::AnyBuffer k, ffi::AnyBuffer v, const int32_t* blocks, const int32_t* offsets) {
  const size_t stride = static_cast<size_t>(cache.num_kv_heads) * cache.head_dim;
  const T *keys = static_cast<const T*>(k.untyped_data()), *values = static_cast<const T*>(v.untyped_data());
  for_tokens(team, k.dimensions()[0], [&](size_t first, size_t end) {
    for (size_t t = first; t < end; ++t) write_token(cache, keys + t * stride, values + t * stride, blocks[t], offsets[t]);
  });
}

// Leaves the memory untouched: a cache is mostly room for what may come, and a page that was never written takes none.
ffi::Error new_cache(ffi::Result<ffi::AnyBuffer> cache) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(cache->untyped_data()), end = begin + cache->size_bytes();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  // Advice: where it is not taken, pages are small.
  if (end > first) madvise(reinterpret_cast<void*>(first), (end - first) / kPage * kPage, MADV_HUGEPAGE);
#else
  (void)cache;
#endif
  return ffi::Error::Success();
}

ffi::Error write_kv(ffi::ThreadPool pool, ffi::AnyBuffer, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> blocks,
                    ffi::Buffer<ffi::S32> offsets, ffi::Result<ffi::AnyBuffer> cache) {
  Team team(pool);
  if (k.element_type() == ffi::DataType::F32)
    write_all(team, view<float>(*cache), k, v, blocks.typed_data(), offsets.typed_data());
  else
    write_all(team, view<bf16>(*cache), k, v, blocks.typed_data(), offsets.typed_data());
  return ffi::Error::Success();
}

template <class T>
void attend_all(Team& team, const AttentionShape& shape, ffi::AnyBuffer q, ffi::AnyBuffer cache, const Rectangle& rectangle, ffi::AnyBuffer out) {
  const size_t stride = static_cast<size_t>(shape.num_heads) * shape.head_dim;
  T* to = static_cast<T*>(out.untyped_data());
  std::vector<size_t> first_tokens(rectangle.num_rows);
  for (int row = 0; row < rectangle.num_rows; ++row) {
    first_tokens[row] = static_cast<size_t>(row) * rectangle.width;
    const int num_queries = rectangle.num_queries(row);
    std::fill_n(to + (first_tokens[row] + num_queries) * stride, (rectangle.width - num_queries) * stride, T());  // padding is finite
  }
  const Attention<T> attention(shape, view<T>(cache), static_cast<const T*>(q.untyped_data()), stride, to, stride);
  attend_rectangles(team, attention, &rectangle, 1, shape.num_kv_heads, first_tokens.data());
}

ffi::Error paged_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer cache, ffi::Buffer<ffi::S32> tables,
                           ffi::Buffer<ffi::S32> seq_lens, ffi::Buffer<ffi::S32> query_lens, ffi::Result<ffi::AnyBuffer> out, float scale,
                           float soft_cap, int64_t sliding_window) {
  const auto dims = q.dimensions();  // [R, W, N, H]
  const AttentionShape shape{static_cast<int>(dims[2]), static_cast<int>(cache.dimensions()[2] / 2), static_cast<int>(dims[3]), scale, soft_cap,
                             static_cast<int>(sliding_window)};
  Rectangle rectangle;
  rectangle.num_rows = static_cast<int>(dims[0]);
  rectangle.width = static_cast<int>(dims[1]);
  rectangle.max_blocks = static_cast<int>(tables.dimensions()[1]);
  rectangle.tables = tables.typed_data();
  rectangle.seq_lens = seq_lens.typed_data();
  rectangle.query_lens = query_lens.typed_data();
  Team team(pool);
  if (q.element_type() == ffi::DataType::F32)
    attend_all<float>(team, shape, q, cache, rectangle, *out);
  else
    attend_all<bf16>(team, shape, q, cache, rectangle, *out);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_new_cache, new_cache, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_write_kv, write_kv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_paged_attention, paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("sliding_window"));

}  // namespace quire
