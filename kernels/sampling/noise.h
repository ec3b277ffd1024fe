// The noise of noise.py, token by token in vectors, and the largest of logits / temperature + noise.
//
// The integers are those of noise.py to the bit. Of the noise itself almost none has to be computed: a token whose upper bound does not reach the
// largest sum so far cannot win, and the bound costs a fraction of two logarithms. What is skipped changes no result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "simd.h"

namespace quire {

// The fractional digits of pi; see noise.py.
constexpr uint32_t kPi[] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u, 0x082efa98u, 0xec4e6c89u, 0x452821e6u,
                            0x38d01377u, 0xbe5466cfu, 0x34e90c6cu, 0xc0ac29b7u, 0xc97c50ddu, 0x3f84d5b5u, 0xb5470917u, 0x9216d5d9u, 0x8979fb1bu};
constexpr int kPositionRounds = 18, kTokenRounds = 8;

struct NoiseKey {
  uint32_t left = 0, right = 0;
};

constexpr uint32_t rotated(uint32_t x, int bits) { return x << bits | x >> (32 - bits); }
inline NoiseKey spread(uint32_t x) {
  const uint32_t once = x ^ rotated(x, 8) ^ rotated(x, 14), twice = once ^ rotated(once, 5);
  return {twice, rotated(twice, 19) ^ rotated(once, 21)};
}
// The key of one position of a seed: `position_key`.
inline NoiseKey position_key(const uint32_t* seed_key, int32_t position) {
  NoiseKey state = spread(static_cast<uint32_t>(position));
  state.left ^= seed_key[0];
  state.right ^= seed_key[1];
  for (int round = 0; round < kPositionRounds; ++round) {
    const uint32_t mixed = (rotated(state.left, 1) & rotated(state.left, 8)) ^ rotated(state.left, 2) ^ seed_key[round % 2] ^ kPi[round];
    state = {state.right ^ mixed, state.left};
  }
  return state;
}

// 32 mixed bits of (key, token id): `token_bits`.
inline Words token_bits(NoiseKey key, Words left, Words right) {
  for (int round = 0; round < kTokenRounds; ++round) {
    const Words nonlinear = bit_and(rotate_left<1>(left), rotate_left<8>(left));
    const Words mixed = bit_xor(bit_xor(nonlinear, rotate_left<2>(left)), all_words((round % 2 ? key.right : key.left) ^ kPi[round]));
    const Words next = bit_xor(right, mixed);
    right = left;
    left = next;
  }
  return left;
}
// The same for tokens first_id ... first_id + kLanes - 1, first_id a multiple of kLanes: the spread is linear over bits, so that of an id is the
// spread of its upper bits, which the lanes share, and that of its lane.
class Lanes {
 public:
  Lanes() {
    uint32_t left[kLanes], right[kLanes];
    for (uint32_t i = 0; i < kLanes; ++i) {
      const NoiseKey lane = spread(i);
      left[i] = lane.left;
      right[i] = lane.right;
    }
    left_ = load_words(left);
    right_ = load_words(right);
  }
  Words bits(NoiseKey key, uint32_t first_id) const {
    const NoiseKey shared = spread(first_id);
    return token_bits(key, bit_xor(left_, all_words(shared.left ^ key.left)), bit_xor(right_, all_words(shared.right ^ key.right)));
  }

 private:
  Words left_, right_;
};
inline Words bits_of_ids(NoiseKey key, const int32_t* ids) {
  const Words x = load_words(ids);
  const Words once = bit_xor(bit_xor(x, rotate_left<8>(x)), rotate_left<14>(x)), twice = bit_xor(once, rotate_left<5>(once));
  const Words right = bit_xor(rotate_left<19>(twice), rotate_left<21>(once));
  return token_bits(key, bit_xor(twice, all_words(key.left)), bit_xor(right, all_words(key.right)));
}

// `gumbel_of_bits`.
inline Floats gumbel_of_bits(Words bits) {
  const Floats uniform = mul(max(ints_to_floats(shift_right<8>(bits)), all(1.0f)), all(0x1p-24f));
  const Floats inner = sub(zeros(), log(uniform));
  return sub(zeros(), log(inner));
}
// No noise lies above: -log(2^-24), and some room for rounding.
constexpr float kMostNoise = 16.65f;
// An upper bound for each: -log(-log u) <= -log(1 - u), and the bits of a float are its logarithm but for less than 0.09, on the safe side.
inline Floats noise_bound(Words bits) {
  constexpr float kLn2 = 0.69314718f;
  const Floats rest = ints_to_floats(sub_words(all_words(1u << 24), shift_right<8>(bits)));  // 2^24 (1 - u), exact
  return sub(all(151.0f * kLn2 + 1e-3f), mul(ints_to_floats(as_words(rest)), all(kLn2 * 0x1p-23f)));
}

// The largest value of a row, or of a piece of it.
struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int32_t id = -1;  // -1: nothing was seen yet
  bool has_nan = false;

  // The best of this piece and one that lies behind it. The first of equals stays.
  void join(const Best& next) {
    if (next.value > value || id < 0) {
      value = next.value;
      id = next.id;
    }
    has_nan |= next.has_nan;
  }
};

// A vector from the end of a row, filled up with minus infinity.
inline Floats load_rest(const float* x, size_t count) {
  alignas(64) float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i < static_cast<int>(count) ? x[i] : -std::numeric_limits<float>::infinity();
  return load(lane);
}

// The largest of x[0, n), n > 0, whose ids begin at first_id; the first of equals.
inline Best largest_of(const float* x, size_t n, int32_t first_id) {
  constexpr size_t kBlock = 32 * kLanes;  // values among which the largest is looked for by index at the end
  Best best;
  size_t best_block = 0;
  uint32_t nan = 0;
  for (size_t start = 0; start < n; start += kBlock) {
    Floats a = all(-std::numeric_limits<float>::infinity()), b = a;
    size_t i = start;
    for (; i + 2 * kLanes <= std::min(n, start + kBlock); i += 2 * kLanes) {
      const Floats x0 = load(x + i), x1 = load(x + i + kLanes);
      nan |= lanes_nan(x0, x1);
      a = max(x0, a);
      b = max(x1, b);
    }
    for (; i < std::min(n, start + kBlock); i += kLanes) {
      const Floats rest = load_rest(x + i, std::min<size_t>(n - i, kLanes));
      nan |= lanes_nan(rest, rest);
      a = max(rest, a);
    }
    const float largest = max_lanes(max(a, b));
    if (largest > best.value) {
      best.value = largest;
      best_block = start;
    }
  }
  best.has_nan = nan != 0;
  size_t i = best_block;
  while (i + 1 < n && !(x[i] == best.value)) ++i;
  best.id = first_id + static_cast<int32_t>(i);
  return best;
}

// Draws from softmax(x / temperature): the largest of x / temperature + noise.
class Draw {
 public:
  // No value counts as less than `lowest`.
  Draw(NoiseKey key, float temperature, float lowest) : key_(key), temperature_(temperature), lowest_(lowest) {
    // A quotient is bounded by products with a little less and a little more than the reciprocal.
    const float inverse = 1.0f / temperature;
    low_ = inverse * (1.0f - 1e-6f);
    high_ = inverse * (1.0f + 1e-6f);
  }
  // Among x[0, n), whose ids begin at first_id, a multiple of kLanes.
  Best among(const float* x, size_t n, int32_t first_id) const {
    const Lanes lanes;
    return run(x, n, [&](size_t i) { return lanes.bits(key_, static_cast<uint32_t>(first_id) + static_cast<uint32_t>(i)); },
               [&](size_t i) { return first_id + static_cast<int32_t>(i); });
  }
  // Among x[0, n) with the given ids, ascending; the ids can be read up to a whole vector.
  Best among(const float* x, size_t n, const int32_t* ids) const {
    return run(x, n, [&](size_t i) { return bits_of_ids(key_, ids + i); }, [&](size_t i) { return ids[i]; });
  }

 private:
  template <class Bits, class Id>
  Best run(const float* x, size_t n, const Bits& bits_at, const Id& id_at) const {
    Best best;
    uint32_t nan = 0;
    for (size_t i = 0; i < n; i += kLanes) {
      Floats value = i + kLanes <= n ? load(x + i) : load_rest(x + i, n - i);
      nan |= lanes_nan(value, value);
      value = max(all(lowest_), value);
      const Floats bound = max(mul(value, all(low_)), mul(value, all(high_)));
      if (lanes_at_least(add(bound, all(kMostNoise)), all(best.value)) == 0) continue;
      const Words bits = bits_at(i);
      uint32_t open = lanes_at_least(add(bound, noise_bound(bits)), all(best.value));
      if (open == 0) continue;
      if (i + kLanes > n) open &= (1u << (n - i)) - 1u;
      alignas(64) float sums[kLanes];
      store(sums, add(div(value, all(temperature_)), gumbel_of_bits(bits)));
      for (; open != 0; open &= open - 1) {
        const int lane = __builtin_ctz(open);
        if (sums[lane] > best.value || best.id < 0) {
          best.value = sums[lane];
          best.id = id_at(i + static_cast<size_t>(lane));
        }
      }
    }
    best.has_nan = nan != 0;
    if (best.id < 0) best.id = id_at(0);
    return best;
  }

  NoiseKey key_;
  float temperature_, lowest_, low_, high_;
};

}  // namespace quire
