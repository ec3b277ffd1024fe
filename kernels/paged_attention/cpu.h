// Paged attention that reads the blocks in place.
//
// A unit of work is one row and one key/value head: its W x G queries (G query heads share the key/value head) against the row's keys, 128 at a time.
// The keys of a tile are packed as panels of a matrix, transposed, and the values as they lie, so scores and output are products
// of rows with panels; the softmax between them is kept up to date as in Milakov and Gimelshein 2018 (online softmax).
//
// Tiles begin at multiples of 128 positions, what a query does not see adds exact zeros, and every query is treated by itself, so a query's result is the same bits whatever row it stands in:
// alone in a decode row, among the drafts of a verification, or within a prefill tile.
#pragma once

#include <algorithm>

#include "matrix.h"
#include "parallel.h"
#include "row_ops.h"

namespace quire {

constexpr int kKeys = 128;  // keys of a tile: four panels

struct AttentionShape {
  int num_heads, num_kv_heads, head_dim;
  float scale;
  float soft_cap;      // 0: none
  int sliding_window;  // 0: none
};

// One layer's cache: [num_blocks, block_size, 2K, H], heads k0, v0, k1, v1, ...
template <class T>
struct Cache {
  T* data;
  int num_blocks, block_size, num_kv_heads, head_dim;

  T* key(int block, int offset, int head) const {
    const size_t token = static_cast<size_t>(block) * block_size + offset;
    return data + (token * 2 * num_kv_heads + 2 * head) * head_dim;
  }
  T* value(int block, int offset, int head) const { return key(block, offset, head) + head_dim; }
};

constexpr int kMaxRectangles = 4;  // of one step

// Rows [R, W] of one rectangle.
struct Rectangle {
  int num_rows = 0, width = 0, max_blocks = 0;
  const int32_t* tables = nullptr;      // [R, M]
  const int32_t* seq_lens = nullptr;    // [R]
  const int32_t* query_lens = nullptr;  // [R]

  int num_queries(int row) const { return std::min(std::max(query_lens[row], 0), width); }
};

inline void transpose_words(const uint32_t* const source[16], size_t count, uint32_t* to) {
#if defined(QUIRE_AVX512)
  // 16 x 16 words at a time, in four rounds of pairwise exchanges.
  for (size_t first = 0; first < count; first += 16) {
    const size_t rest = count - first;
    const __mmask16 mask = rest >= 16 ? 0xffff : static_cast<__mmask16>((1u << rest) - 1);
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(mask, source[i] + first);
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
    const size_t whole = std::min<size_t>(rest, 16);
    for (size_t i = 0; i < whole; ++i) _mm512_storeu_si512(to + (first + i) * kPanel, r[i]);
  }
#else
  for (size_t k = 0; k < count; ++k)
    for (int i = 0; i < 16; ++i) to[k * kPanel + i] = source[i][k];
#endif
}

// Two rows of bfloat16 as words that hold one of each: to[c] = even[c] | odd[c] << 16, for c below width; then zeros up to a whole panel.
inline void interleave(const bf16* even, const bf16* odd, int width, uint32_t* to) {
#if defined(QUIRE_AVX512)
  if (width == kPanel) {
    static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                          8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_loadu_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
    return;
  }
#endif
  for (int c = 0; c < width; ++c) to[c] = static_cast<uint32_t>(even[c]) | static_cast<uint32_t>(odd[c]) << 16;
  for (int c = width; c < kPanel; ++c) to[c] = 0;
}

// The attention of one rectangle's rows. `T` is the type of queries, cache and output.
template <class T>
class Attention {
 public:
  static constexpr Format kFormat = sizeof(T) == sizeof(float) ? Format::kFloat32 : Format::kBfloat16;
  using Dot = std::conditional_t<sizeof(T) == sizeof(float), DotFloat32, DotBfloat16>;

  // q and out hold a query's heads [N, H] together, q_stride and out_stride elements from token to token.
  Attention(const AttentionShape& shape, const Cache<T>& cache, const T* q, size_t q_stride, T* out, size_t out_stride)
      : shape_(shape), cache_(cache), q_(q), q_stride_(q_stride), out_(out), out_stride_(out_stride) {
    group_ = shape.num_heads / shape.num_kv_heads;
    head_words_ = num_words(kFormat, shape.head_dim);
    key_words_ = num_words(kFormat, kKeys);
    value_panels_ = num_panels(shape.head_dim);
  }

  // Attends with the queries of one row for key/value heads first_head ... end_head - 1; first_token is where they begin in q and out.
  void unit(const Rectangle& rectangle, int row, int first_head, int end_head, size_t first_token) const {
    const int num_queries = rectangle.num_queries(row);
    if (num_queries == 0) return;
    for (int head = first_head; head < end_head; ++head) attend(rectangle, row, head, head > first_head, head + 1 < end_head, num_queries, first_token);
  }

 private:
  struct Workspace {
    uint32_t* q;        // [Q][head words]
    float* scores;      // [Q][kKeys]
    uint32_t* weights;  // [Q][key words]
    float* out;         // [Q][value panels x 32]
    float* part;        // [Q][32]
    float* largest;     // [Q]
    float* total;       // [Q]
    uint32_t* keys;     // kKeys / 32 panels of [head words][32]
    uint32_t* values;   // value panels of [key words][32]
  };

  Workspace workspace(size_t num_rows) const {
    const size_t sizes[] = {num_rows * head_words_, num_rows * kKeys, num_rows * key_words_, num_rows * value_panels_ * kPanel,
                            num_rows * kPanel, num_rows, num_rows, kKeys * head_words_, value_panels_ * key_words_ * kPanel};
    size_t starts[10] = {0};
    for (int i = 0; i < 9; ++i) starts[i + 1] = starts[i] + (sizes[i] + 15) / 16 * 16;
    uint32_t* base = static_cast<uint32_t*>(scratch<0>(starts[9] * sizeof(uint32_t)));
    const auto floats = [&](int i) { return reinterpret_cast<float*>(base + starts[i]); };
    return {base, floats(1), base + starts[2], floats(3), floats(4), floats(5), floats(6), base + starts[7], base + starts[8]};
  }

  void attend(const Rectangle& rectangle, int row, int kv_head, bool is_foreseen, bool is_followed, int num_queries,
              size_t first_token) const {
    const int seq_len = rectangle.seq_lens[row], start = seq_len - num_queries, head_dim = shape_.head_dim;
    const int first_key = shape_.sliding_window > 0 ? std::max(start - shape_.sliding_window + 1, 0) : 0;
    const size_t num_rows = static_cast<size_t>(num_queries) * group_;
    const Workspace ws = workspace(num_rows);
    const int32_t* table = rectangle.tables + static_cast<size_t>(row) * rectangle.max_blocks;
    const int first_base = first_key / kKeys * kKeys;
    if (!is_foreseen) prefetch_tile(table, kv_head, first_base, seq_len);
    for (size_t r = 0; r < num_rows; ++r) {
      const T* source = q_ + (first_token + r / group_) * q_stride_ + (kv_head * group_ + r % group_) * head_dim;
      row_to_words(source, head_dim, kFormat, ws.q + r * head_words_, nullptr);
    }
    std::fill_n(ws.largest, num_rows, kMasked);
    std::fill_n(ws.total, num_rows, 0.0f);
    std::fill_n(ws.out, num_rows * value_panels_ * kPanel, 0.0f);
    for (int base = first_base; base < seq_len; base += kKeys) {
      // What is read next is asked for now: the pieces of one head lie too far apart for the processor to foresee them.
      if (base + kKeys < seq_len)
        prefetch_tile(table, kv_head, base + kKeys, seq_len);
      else if (is_followed)
        prefetch_tile(table, kv_head + 1, first_base, seq_len);
      // Queries before the tile's first key see nothing of it.
      const int first_query = std::max(base - start, 0);
      const size_t skipped = static_cast<size_t>(first_query) * group_, seen = num_rows - skipped;
      // Panels of keys that the row has.
      const int used = (std::min(seq_len - base, kKeys) + kPanel - 1) / kPanel;
      const size_t used_words = num_words(kFormat, used * kPanel);
      pack_tile(table, kv_head, base, first_key, seq_len, used * kPanel, ws);
      for (int p = 0; p < used; ++p)
        rows_times_panel<Dot>(ws.q + skipped * head_words_, head_words_, seen, ws.keys + p * head_words_ * kPanel, head_words_,
                              ws.scores + skipped * kKeys + p * kPanel, kKeys);
      for (size_t r = skipped; r < num_rows; ++r) weigh(ws, r, base, used * kPanel, start + static_cast<int>(r / group_));
      for (size_t p = 0; p < value_panels_; ++p) {
        rows_times_panel<Dot>(ws.weights + skipped * key_words_, key_words_, seen, ws.values + p * key_words_ * kPanel, used_words,
                              ws.part, kPanel);
        for (size_t r = 0; r < seen; ++r) {
          float* out = ws.out + ((skipped + r) * value_panels_ + p) * kPanel;
          for (int c = 0; c < kPanel; c += kLanes) store(out + c, add(load(out + c), load(ws.part + r * kPanel + c)));
        }
      }
    }
    for (size_t r = 0; r < num_rows; ++r) {
      T* to = out_ + (first_token + r / group_) * out_stride_ + (kv_head * group_ + r % group_) * head_dim;
      const float inverse = 1.0f / ws.total[r];
      const float* from = ws.out + r * value_panels_ * kPanel;
      int i = 0;
      for (; i + kLanes <= head_dim; i += kLanes) store_floats(to + i, mul(load(from + i), all(inverse)));
      for (; i < head_dim; ++i) assign(to[i], from[i] * inverse);
    }
  }

  void prefetch_tile(const int32_t* table, int kv_head, int base, int seq_len) const {
    const int end = std::min(base + kKeys, seq_len);
    const size_t num_bytes = 2 * shape_.head_dim * sizeof(T);  // a key and the value behind it
    for (int position = base; position < end; ++position) {
      const int block = std::min(std::max(table[position / cache_.block_size], 0), cache_.num_blocks - 1);
      const char* from = reinterpret_cast<const char*>(cache_.key(block, position % cache_.block_size, kv_head));
      for (size_t byte = 0; byte < num_bytes; byte += 64) prefetch(from + byte);
    }
  }

  // Keys and values of `count` positions from base on as panels; zero outside [first_key, seq_len), where anything may lie.
  void pack_tile(const int32_t* table, int kv_head, int base, int first_key, int seq_len, int count, const Workspace& ws) const {
    static constexpr uint32_t kNothing[512] = {};
    const T* nothing = reinterpret_cast<const T*>(kNothing);
    const int head_dim = shape_.head_dim;
    const T* keys[kKeys];
    const T* values[kKeys];
    for (int i = 0; i < count; ++i) {
      const int position = base + i;
      if (position < first_key || position >= seq_len) {
        keys[i] = values[i] = nothing;
        continue;
      }
      const int block = std::min(std::max(table[position / cache_.block_size], 0), cache_.num_blocks - 1);
      keys[i] = cache_.key(block, position % cache_.block_size, kv_head);
      values[i] = keys[i] + head_dim;
    }
    for (int i = 0; i < count; i += 16) {
      uint32_t* to = ws.keys + (i / kPanel) * head_words_ * kPanel + i % kPanel;
      transpose_words(reinterpret_cast<const uint32_t* const*>(keys + i), head_words_, to);
    }
    constexpr int g = values_per_word(kFormat);
    for (size_t p = 0; p < value_panels_; ++p) {
      const int first = static_cast<int>(p) * kPanel, width = std::min(kPanel, head_dim - first);
      for (size_t k = 0; k < num_words(kFormat, count); ++k) {
        uint32_t* to = ws.values + (p * key_words_ + k) * kPanel;
        if constexpr (g == 1) {
          std::memcpy(to, values[k] + first, width * sizeof(T));
          for (int c = width; c < kPanel; ++c) to[c] = 0;
        } else {
          interleave(values[2 * k] + first, values[2 * k + 1] + first, width, to);
        }
      }
    }
  }

  // Turns one query's scores into weights, and brings its running maximum, sum and output up to date. Of `count` keys it sees [first, end).
  void weigh(const Workspace& ws, size_t r, int base, int count, int position) const {
    float* scores = ws.scores + r * kKeys;
    const int window = shape_.sliding_window;
    const int first = std::min(window > 0 ? std::max(position - window + 1 - base, 0) : 0, count), end = std::min(position + 1 - base, count);
    const int whole_end = (end + kLanes - 1) / kLanes * kLanes;  // end, up to a whole vector
    float scale = shape_.scale;
    if (shape_.soft_cap > 0) {
      for (int c = 0; c < whole_end; c += kLanes)
        store(scores + c, mul(all(shape_.soft_cap), tanh(div(mul(load(scores + c), all(scale)), all(shape_.soft_cap)))));
      scale = 1.0f;
    }
    std::fill_n(scores, first, kMasked);
    std::fill_n(scores + end, whole_end - end, kMasked);
    Floats highest = all(kMasked);
    for (int c = 0; c < whole_end; c += kLanes) highest = max(highest, load(scores + c));
    const float highest_here = max_lanes(highest);
    const float largest = std::max(ws.largest[r], highest_here > kMasked * 0.5f ? highest_here * scale : kMasked);
    Floats sum = zeros();
    uint32_t* weights = ws.weights + r * key_words_;
    const auto put = [&](int c, Floats weight) {
      if constexpr (kFormat == Format::kFloat32) store(reinterpret_cast<float*>(weights) + c, weight);
      else store_bf16(reinterpret_cast<bf16*>(weights) + c, weight);
    };
    for (int c = 0; c < whole_end; c += kLanes) {
      // A key that is not seen has a score far below any real one, so its weight is exactly 0; where no key was seen yet, force it.
      const Floats s = load(scores + c);
      const Floats weight = keep_if_above(s, all(kMasked * 0.5f), exp(fma(s, all(scale), all(-largest))));
      sum = add(sum, weight);
      put(c, weight);
    }
    for (int c = whole_end; c < count; c += kLanes) put(c, zeros());
    if (largest > ws.largest[r]) {
      alignas(64) float factor[kLanes];
      store(factor, exp(all(ws.largest[r] - largest)));
      ws.total[r] *= factor[0];
      float* out = ws.out + r * value_panels_ * kPanel;
      for (size_t c = 0; c < value_panels_ * kPanel; c += kLanes) store(out + c, mul(load(out + c), all(factor[0])));
      ws.largest[r] = largest;
    }
    ws.total[r] += sum_lanes(sum);
  }

  static constexpr float kMasked = -1.0e30f;

  AttentionShape shape_;
  Cache<T> cache_;
  const T* q_;
  size_t q_stride_;
  T* out_;
  size_t out_stride_;
  int group_;
  size_t head_words_, key_words_, value_panels_;
};

// Every row and key/value head of the rectangles, shared among the team. first_tokens holds where each row's queries begin, row after row.
template <class T>
inline void attend_rectangles(Team& team, const Attention<T>& attention, const Rectangle* rectangles, int num_rectangles, int num_kv_heads,
                              const size_t* first_tokens) {
  // A chunk is a row where there are rows enough for all threads: its heads lie side by side in memory. Else it is one head of a row.
  int total = 0;
  bool is_row[kMaxRectangles];
  for (int i = 0; i < num_rectangles; ++i) {
    is_row[i] = rectangles[i].width == 1 && rectangles[i].num_rows >= 4 * team.num_threads();
    total += rectangles[i].num_rows * (is_row[i] ? 1 : num_kv_heads);
  }
  team.for_each(total, [&](int chunk) {
    int i = 0, rows_before = 0;
    for (;; ++i) {
      const int chunks = rectangles[i].num_rows * (is_row[i] ? 1 : num_kv_heads);
      if (chunk < chunks) break;
      chunk -= chunks;
      rows_before += rectangles[i].num_rows;
    }
    const int row = is_row[i] ? chunk : chunk / num_kv_heads;
    const int head = is_row[i] ? 0 : chunk % num_kv_heads, end_head = is_row[i] ? num_kv_heads : head + 1;
    attention.unit(rectangles[i], row, head, end_head, first_tokens[rows_before + row]);
  });
}

// Puts one token's keys and values, each [K, H], at its place in the cache.
template <class T>
inline void write_token(const Cache<T>& cache, const T* k, const T* v, int block, int offset) {
  block = std::min(std::max(block, 0), cache.num_blocks - 1);
  offset = std::min(std::max(offset, 0), cache.block_size - 1);
  for (int head = 0; head < cache.num_kv_heads; ++head) {
    std::memcpy(cache.key(block, offset, head), k + head * cache.head_dim, cache.head_dim * sizeof(T));
    std::memcpy(cache.value(block, offset, head), v + head * cache.head_dim, cache.head_dim * sizeof(T));
  }
}

}  // namespace quire
