// What cuts a row short: its k largest values, the tokens that hold top_p of its weight, and the sums that this takes.
//
// Thresholds are exact: each is a value of the row, and every value equal to it stays. Sums are taken in double precision in one order, which
// depends on no width of a vector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

#include "noise.h"
#include "simd.h"

namespace quire {

// The sum of f(x) over x[0, n), vector by vector; f of minus infinity must be 0.
template <class F>
inline double sum_of(const float* x, size_t n, const F& f) {
  constexpr size_t kWidth = 16, kSums = 4;  // element i goes to sum i % 16 % 8 of i / 16 % 4, however wide a vector is
  static_assert(kWidth % kLanes == 0, "a vector must not be wider than the order of the sums");
  Doubles sums[kSums];
  for (Doubles& sum : sums) sum = no_doubles();
  size_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth)
    for (size_t s = 0; s < kSums; ++s)
      for (size_t v = 0; v < kWidth; v += kLanes) sums[s] = accumulate(sums[s], f(load(x + i + s * kWidth + v)));
  for (size_t s = 0; i < n; i += kLanes, s = i / kWidth % kSums) sums[s] = accumulate(sums[s], f(load_rest(x + i, std::min<size_t>(n - i, kLanes))));
  double lane[kSums][8], total = 0;
  for (size_t s = 0; s < kSums; ++s) store_doubles(lane[s], sums[s]);
  for (int l = 0; l < 8; ++l)
    for (size_t s = 0; s < kSums; ++s) total += lane[s][l];
  return total;
}
inline double sum_at_least(const float* x, size_t n, float threshold) {
  return sum_of(x, n, [&](Floats v) { return select(lanes_at_least(v, all(threshold)), v, zeros()); });
}

inline int32_t count_above(const float* x, size_t n, float value) {
  int32_t count = 0;
  for (size_t i = 0; i < n; i += kLanes)
    count += __builtin_popcount(lanes_above(i + kLanes <= n ? load(x + i) : load_rest(x + i, n - i), all(value)));
  return count;
}

// Some tokens of a row in the order of their ids. The arrays have room for a whole vector behind the last.
struct Tokens {
  float* values = nullptr;
  int32_t* ids = nullptr;
  size_t count = 0;

  void append(uint32_t lanes, Floats value, Words id) {
    if (lanes == 0) return;
    store_lanes(values + count, lanes, value);
    store_lanes(ids + count, lanes, id);
    count += static_cast<size_t>(__builtin_popcount(lanes));
  }
};

inline uint32_t valid_lanes(size_t i, size_t n) { return i + kLanes <= n ? kAllLanes : (1u << (n - i)) - 1u; }

// Those of x[0, n) that are at least `threshold`.
inline void keep_at_least(const float* x, size_t n, float threshold, Tokens& kept) {
  alignas(64) int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Words ids = load_words(lane);
  kept.count = 0;
  for (size_t i = 0; i < n; i += kLanes, ids = add_words(ids, all_words(kLanes))) {
    const Floats value = i + kLanes <= n ? load(x + i) : load_rest(x + i, n - i);
    kept.append(lanes_at_least(value, all(threshold)) & valid_lanes(i, n), value, ids);
  }
}
// Leaves those whose weight is at least `threshold`.
inline void keep_weights(const float* weights, float threshold, Tokens& kept) {
  const size_t n = kept.count;
  kept.count = 0;  // what is written never overtakes what is read
  for (size_t i = 0; i < n; i += kLanes) {
    const Floats value = load(kept.values + i);
    const Words ids = load_words(kept.ids + i);
    kept.append(lanes_at_least(load(weights + i), all(threshold)) & valid_lanes(i, n), value, ids);
  }
}

// The k-th largest of x[0, n), 0 < k <= n, none of them a NaN. `room` holds n values and a whole vector.
inline float kth_largest(const float* x, size_t n, size_t k, float* room) {
  const auto kth_of_room = [&](size_t count) {
    std::nth_element(room, room + k - 1, room + count, std::greater<float>());
    return room[k - 1];
  };
  // The values in groups, at least four times as many as k: the k-th largest of the groups' maxima is a lower bound with little above it.
  const size_t depth = std::min<size_t>(n / (4 * k), 64), block = depth * kLanes;
  const auto kth_of_all = [&] {
    std::copy_n(x, n, room);
    return kth_of_room(n);
  };
  if (depth < 2) return kth_of_all();
  size_t count = 0, i = 0;
  for (; i + block <= n; i += block, count += kLanes) {
    Floats largest = load(x + i);
    for (size_t d = 1; d < depth; ++d) largest = max(largest, load(x + i + d * kLanes));
    store(room + count, largest);
  }
  for (; i < n; ++i) room[count++] = x[i];
  if (count < k) return kth_of_all();
  const Floats bound = all(kth_of_room(count));
  count = 0;
  for (i = 0; i < n; i += kLanes) {
    const Floats value = i + kLanes <= n ? load(x + i) : load_rest(x + i, n - i);
    const uint32_t lanes = lanes_at_least(value, bound) & valid_lanes(i, n);
    if (lanes == 0) continue;
    store_lanes(room + count, lanes, value);
    count += static_cast<size_t>(__builtin_popcount(lanes));
  }
  return kth_of_room(count);
}

// The largest weight at which the weights not below it sum to `needed`; 0 where none does. Weights lie in [0, 1]. `room` holds n values and a
// whole vector. As in threshold.py the number is built bit by bit; once the exponent stands, only the weights that have it are looked at.
inline float nucleus_threshold(const float* weights, size_t n, double needed, float* room) {
  constexpr int kMantissa = 23;
  const auto as_weight = [](uint32_t bits) {
    float weight;
    std::memcpy(&weight, &bits, sizeof weight);
    return weight;
  };
  uint32_t found = 0;
  const float* rest = weights;
  double above = 0;  // what was left out of `rest` because it lies above
  for (int bit = 29; bit >= 0; --bit) {
    const uint32_t candidate = found | 1u << bit;
    if (above + sum_at_least(rest, n, as_weight(candidate)) >= needed) found = candidate;
    if (bit != kMantissa) continue;
    const float low = as_weight(found), high = as_weight(found + (1u << kMantissa));
    above = sum_at_least(weights, n, high);
    size_t count = 0;
    for (size_t i = 0; i < n; i += kLanes) {
      const Floats weight = i + kLanes <= n ? load(weights + i) : load_rest(weights + i, n - i);
      const uint32_t lanes = lanes_at_least(weight, all(low)) & ~lanes_at_least(weight, all(high)) & valid_lanes(i, n);
      if (lanes == 0) continue;
      store_lanes(room + count, lanes, weight);
      count += static_cast<size_t>(__builtin_popcount(lanes));
    }
    rest = room;
    n = count;
  }
  return as_weight(found);
}

}  // namespace quire
