// Vectors of float, and of 32-bit words, for whichever instruction set this file is compiled for.
//
// A word holds one float32, two bfloat16 or four int8: whatever one lane of a product takes at a time. So one tile routine serves
// every type of number, and a vector of words is multiplied lane by lane with a word that all lanes share.
//
// Every function gives the same bits for a lane whatever the other lanes hold, and multiply-adds are fused wherever the hardware has
// them and nowhere else (the library is compiled with -ffp-contract=off): that a row's result does not depend on its batch rests on this.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define QUIRE_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define QUIRE_AVX2 1
#endif
#if defined(QUIRE_AVX512) || defined(QUIRE_AVX2)
#include <immintrin.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace quire {

using bf16 = uint16_t;  // the bits of a bfloat16: the upper half of a float

inline float to_float(bf16 bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Rounds to nearest, ties to even; a NaN stays one.
inline bf16 to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((word >> 16) | 0x0040u);
  return static_cast<bf16>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Asks for memory ahead of its use; without effect where the compiler has no such thing.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

#if defined(QUIRE_AVX512)

constexpr int kLanes = 16;
using Floats = __m512;
using Words = __m512i;  // also sums of int8 products, as int32

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Words no_words() { return _mm512_setzero_si512(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Words load_words(const void* p) { return _mm512_loadu_si512(p); }
inline void store_words(void* p, Words x) { _mm512_storeu_si512(p, x); }
inline Words all_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats ints_to_floats(Words x) { return _mm512_cvtepi32_ps(x); }
inline Floats as_floats(Words x) { return _mm512_castsi512_ps(x); }
inline Words as_words(Floats x) { return _mm512_castps_si512(x); }
inline Words bit_and(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words bit_xor(Words a, Words b) { return _mm512_xor_si512(a, b); }
inline Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words sub_words(Words a, Words b) { return _mm512_sub_epi32(a, b); }
template <int kBits>
inline Words shift_right(Words x) { return _mm512_srli_epi32(x, kBits); }
template <int kBits>
inline Words rotate_left(Words x) { return _mm512_rol_epi32(x, kBits); }
// Which lanes hold: bit i is lane i.
inline uint32_t lanes_above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline uint32_t lanes_at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t lanes_equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline uint32_t lanes_nan(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
// a where the lane's bit is set, b elsewhere.
inline Floats select(uint32_t lanes, Floats a, Floats b) { return _mm512_mask_mov_ps(b, static_cast<__mmask16>(lanes), a); }
// The lanes whose bit is set, one after the other from `to` on; what follows them, up to a whole vector, is overwritten with anything.
inline void store_lanes(float* to, uint32_t lanes, Floats x) { _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), x)); }
inline void store_lanes(int32_t* to, uint32_t lanes, Words x) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), x));
}
// Eight sums in double precision. Lane i of a vector goes to sum i % 8, the lower half of a vector of 16 first: so their bits are the same
// whatever the width of a vector.
using Doubles = __m512d;
inline Doubles no_doubles() { return _mm512_setzero_pd(); }
inline Doubles accumulate(Doubles sums, Floats x) {
  sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
  return _mm512_add_pd(sums, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}
inline void store_doubles(double* to, Doubles sums) { _mm512_storeu_pd(to, sums); }
inline Floats load_bf16(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store_bf16(bf16* p, Floats x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));  // the same rounding; subnormals become zero
#else
  const __m512i word = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_or_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(0x40)));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
#endif
}
inline Floats dot_bf16(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  sum = fma(as_floats(_mm512_slli_epi32(a, 16)), as_floats(_mm512_slli_epi32(b, 16)), sum);
  return fma(as_floats(_mm512_and_si512(a, high)), as_floats(_mm512_and_si512(b, high)), sum);
#endif
}
// Products of four unsigned (a) with four signed bytes (b), exact.
inline Words dot_u8s8(Words sum, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, a, b);
#else
  const __m512i low = _mm512_set1_epi16(0x00ff);
  // Even and odd bytes apart: the two products of one 16-bit lane could overflow it together, not one by one.
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a, low), _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
  return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
}
inline Floats keep_if_above(Floats x, Floats limit, Floats value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), value);
}
inline Floats round_to_int(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for a whole n in [-126, 127].
inline Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

#elif defined(QUIRE_AVX2)

constexpr int kLanes = 8;
using Floats = __m256;
using Words = __m256i;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Words no_words() { return _mm256_setzero_si256(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Words load_words(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_words(void* p, Words x) { _mm256_storeu_si256((__m256i*)p, x); }
inline Words all_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats ints_to_floats(Words x) { return _mm256_cvtepi32_ps(x); }
inline Floats as_floats(Words x) { return _mm256_castsi256_ps(x); }
inline Words as_words(Floats x) { return _mm256_castps_si256(x); }
inline Words bit_and(Words a, Words b) { return _mm256_and_si256(a, b); }
inline Words bit_xor(Words a, Words b) { return _mm256_xor_si256(a, b); }
inline Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words sub_words(Words a, Words b) { return _mm256_sub_epi32(a, b); }
template <int kBits>
inline Words shift_right(Words x) { return _mm256_srli_epi32(x, kBits); }
template <int kBits>
inline Words rotate_left(Words x) { return _mm256_or_si256(_mm256_slli_epi32(x, kBits), _mm256_srli_epi32(x, 32 - kBits)); }
inline uint32_t lanes_above(Floats a, Floats b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
inline uint32_t lanes_at_least(Floats a, Floats b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ))); }
inline uint32_t lanes_equal(Floats a, Floats b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ))); }
inline uint32_t lanes_nan(Floats a, Floats b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q))); }
inline Floats select(uint32_t lanes, Floats a, Floats b) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i taken = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bits), bits);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(taken));
}
struct Doubles {
  __m256d low, high;
};
inline Doubles no_doubles() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline Doubles accumulate(Doubles sums, Floats x) {
  sums.low = _mm256_add_pd(sums.low, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
  sums.high = _mm256_add_pd(sums.high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
  return sums;
}
inline void store_doubles(double* to, Doubles sums) {
  _mm256_storeu_pd(to, sums.low);
  _mm256_storeu_pd(to + 4, sums.high);
}
inline Floats load_bf16(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline void store_bf16(bf16* p, Floats x) {
  const __m256i word = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline Floats dot_bf16(Floats sum, Words a, Words b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  sum = fma(as_floats(_mm256_slli_epi32(a, 16)), as_floats(_mm256_slli_epi32(b, 16)), sum);
  return fma(as_floats(_mm256_and_si256(a, high)), as_floats(_mm256_and_si256(b, high)), sum);
}
inline Words dot_u8s8(Words sum, Words a, Words b) {
  const __m256i low = _mm256_set1_epi16(0x00ff);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
inline Floats keep_if_above(Floats x, Floats limit, Floats value) {
  return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ), value);
}
inline Floats round_to_int(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power_of_two(Floats x, Floats n) {
  const __m256i exponents = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(exponents));
}

#else  // plain C++, which compilers turn into what the machine has (SSE2, NEON, ...)

constexpr int kLanes = 8;
struct Floats {
  float lane[kLanes];
};
struct Words {
  uint32_t lane[kLanes];
};

#define QUIRE_LANES for (int i = 0; i < kLanes; ++i)
inline Floats zeros() { return Floats{}; }
inline Words no_words() { return Words{}; }
inline Floats all(float x) { Floats r; QUIRE_LANES r.lane[i] = x; return r; }
inline Floats load(const float* p) { Floats r; std::memcpy(&r, p, sizeof r); return r; }
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline Words load_words(const void* p) { Words r; std::memcpy(&r, p, sizeof r); return r; }
inline void store_words(void* p, Words x) { std::memcpy(p, &x, sizeof x); }
inline Words all_words(uint32_t x) { Words r; QUIRE_LANES r.lane[i] = x; return r; }
inline Floats add(Floats a, Floats b) { QUIRE_LANES a.lane[i] += b.lane[i]; return a; }
inline Floats sub(Floats a, Floats b) { QUIRE_LANES a.lane[i] -= b.lane[i]; return a; }
inline Floats mul(Floats a, Floats b) { QUIRE_LANES a.lane[i] *= b.lane[i]; return a; }
inline Floats div(Floats a, Floats b) { QUIRE_LANES a.lane[i] /= b.lane[i]; return a; }
inline Floats max(Floats a, Floats b) { QUIRE_LANES a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
inline Floats min(Floats a, Floats b) { QUIRE_LANES a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
inline Floats fma(Floats a, Floats b, Floats c) { QUIRE_LANES c.lane[i] += a.lane[i] * b.lane[i]; return c; }
inline Floats ints_to_floats(Words x) { Floats r; QUIRE_LANES r.lane[i] = static_cast<float>(static_cast<int32_t>(x.lane[i])); return r; }
inline Floats as_floats(Words x) { Floats r; std::memcpy(&r, &x, sizeof r); return r; }
inline Words as_words(Floats x) { Words r; std::memcpy(&r, &x, sizeof r); return r; }
inline Words bit_and(Words a, Words b) { QUIRE_LANES a.lane[i] &= b.lane[i]; return a; }
inline Words bit_xor(Words a, Words b) { QUIRE_LANES a.lane[i] ^= b.lane[i]; return a; }
inline Words add_words(Words a, Words b) { QUIRE_LANES a.lane[i] += b.lane[i]; return a; }
inline Words sub_words(Words a, Words b) { QUIRE_LANES a.lane[i] -= b.lane[i]; return a; }
template <int kBits>
inline Words shift_right(Words x) { QUIRE_LANES x.lane[i] >>= kBits; return x; }
template <int kBits>
inline Words rotate_left(Words x) { QUIRE_LANES x.lane[i] = x.lane[i] << kBits | x.lane[i] >> (32 - kBits); return x; }
inline uint32_t lanes_above(Floats a, Floats b) { uint32_t r = 0; QUIRE_LANES r |= static_cast<uint32_t>(a.lane[i] > b.lane[i]) << i; return r; }
inline uint32_t lanes_at_least(Floats a, Floats b) { uint32_t r = 0; QUIRE_LANES r |= static_cast<uint32_t>(a.lane[i] >= b.lane[i]) << i; return r; }
inline uint32_t lanes_equal(Floats a, Floats b) { uint32_t r = 0; QUIRE_LANES r |= static_cast<uint32_t>(a.lane[i] == b.lane[i]) << i; return r; }
inline uint32_t lanes_nan(Floats a, Floats b) {
  uint32_t r = 0;
  QUIRE_LANES r |= static_cast<uint32_t>(a.lane[i] != a.lane[i] || b.lane[i] != b.lane[i]) << i;
  return r;
}
inline Floats select(uint32_t lanes, Floats a, Floats b) { QUIRE_LANES b.lane[i] = lanes >> i & 1u ? a.lane[i] : b.lane[i]; return b; }
struct Doubles {
  double lane[8];
};
inline Doubles no_doubles() { return Doubles{}; }
inline Doubles accumulate(Doubles sums, Floats x) { QUIRE_LANES sums.lane[i] += static_cast<double>(x.lane[i]); return sums; }
inline void store_doubles(double* to, Doubles sums) { std::memcpy(to, &sums, sizeof sums); }
inline Floats load_bf16(const bf16* p) { Floats r; QUIRE_LANES r.lane[i] = to_float(p[i]); return r; }
inline void store_bf16(bf16* p, Floats x) { QUIRE_LANES p[i] = to_bf16(x.lane[i]); }
inline Floats dot_bf16(Floats sum, Words a, Words b) {
  Words al, ah, bl, bh;
  QUIRE_LANES al.lane[i] = a.lane[i] << 16, ah.lane[i] = a.lane[i] & 0xffff0000u;
  QUIRE_LANES bl.lane[i] = b.lane[i] << 16, bh.lane[i] = b.lane[i] & 0xffff0000u;
  return fma(as_floats(ah), as_floats(bh), fma(as_floats(al), as_floats(bl), sum));
}
inline Words dot_u8s8(Words sum, Words a, Words b) {
  QUIRE_LANES {
    int32_t total = 0;
    for (int k = 0; k < 32; k += 8)
      total += static_cast<int32_t>((a.lane[i] >> k) & 0xffu) * static_cast<int8_t>((b.lane[i] >> k) & 0xffu);
    sum.lane[i] += static_cast<uint32_t>(total);
  }
  return sum;
}
inline Floats keep_if_above(Floats x, Floats limit, Floats value) {
  QUIRE_LANES value.lane[i] = x.lane[i] > limit.lane[i] ? value.lane[i] : 0.0f;
  return value;
}
inline Floats round_to_int(Floats x) { QUIRE_LANES x.lane[i] = std::nearbyint(x.lane[i]); return x; }
inline Floats times_power_of_two(Floats x, Floats n) {
  Words r;
  QUIRE_LANES r.lane[i] = static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23;
  return mul(x, as_floats(r));
}
#undef QUIRE_LANES

#endif

#if !defined(QUIRE_AVX512)
inline void store_lanes(float* to, uint32_t lanes, Floats x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  for (; lanes != 0; lanes &= lanes - 1) *to++ = lane[__builtin_ctz(lanes)];
}
inline void store_lanes(int32_t* to, uint32_t lanes, Words x) {
  alignas(64) int32_t lane[kLanes];
  store_words(lane, x);
  for (; lanes != 0; lanes &= lanes - 1) *to++ = lane[__builtin_ctz(lanes)];
}
#endif
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

// exp(x), 0 below -87; relative error under 2e-7. Range reduction by ln 2 in two parts, then the Taylor polynomial of degree 7 on
// [-ln2/2, ln2/2], whose remainder is below 1e-8 there.
inline Floats exp(Floats x) {
  const Floats lowest = all(-87.0f);
  const Floats bounded = min(max(x, lowest), all(88.0f));  // so that no infinite power of two is asked for
  const Floats n = round_to_int(mul(bounded, all(1.44269504088896341f)));
  Floats r = fma(n, all(-0.693145751953125f), bounded);
  r = fma(n, all(-1.42860682030941723e-6f), r);
  Floats p = all(1.0f / 5040.0f);
  p = fma(p, r, all(1.0f / 720.0f));
  p = fma(p, r, all(1.0f / 120.0f));
  p = fma(p, r, all(1.0f / 24.0f));
  p = fma(p, r, all(1.0f / 6.0f));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  return keep_if_above(x, lowest, times_power_of_two(p, n));
}

// log(x) of a positive normal x; within 1 ulp of the true one or so, near 1 too. x = 2^e m with m around 1, then the polynomial of Cephes' logf
// in m - 1. No multiply-add in it is fused, so its bits are the same for every instruction set.
inline Floats log(Floats x) {
  const Words sqrt_half = all_words(0x3f3504f3u);  // the lowest m
  const Words shifted = add_words(as_words(x), all_words(0x3f800000u - 0x3f3504f3u));
  const Floats e = ints_to_floats(sub_words(shift_right<23>(shifted), all_words(127)));
  const Floats r = sub(as_floats(add_words(bit_and(shifted, all_words(0x007fffffu)), sqrt_half)), all(1.0f));
  constexpr float kTerms[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                              -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  Floats p = all(7.0376836292e-2f);
  for (const float term : kTerms) p = add(mul(p, r), all(term));
  const Floats square = mul(r, r);
  Floats low = mul(mul(p, r), square);
  low = add(low, mul(e, all(-2.12194440e-4f)));
  low = sub(low, mul(square, all(0.5f)));
  return add(add(r, low), mul(e, all(0.693359375f)));
}

// tanh(x) = 1 - 2 / (exp(2x) + 1); absolute error under 2e-7.
inline Floats tanh(Floats x) {
  return sub(all(1.0f), div(all(2.0f), add(exp(add(x, x)), all(1.0f))));
}

// Sum and maximum over lanes, in one fixed order.
inline float sum_lanes(Floats x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
inline float max_lanes(Floats x) {
  alignas(64) float lane[kLanes];
  store(lane, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// One interface for the two types that activations have.
inline Floats load_as_floats(const float* p) { return load(p); }
inline Floats load_as_floats(const bf16* p) { return load_bf16(p); }
inline void store_floats(float* p, Floats x) { store(p, x); }
inline void store_floats(bf16* p, Floats x) { store_bf16(p, x); }
inline float as_float(float x) { return x; }
inline float as_float(bf16 x) { return to_float(x); }
inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) { to = to_bf16(x); }

}  // namespace quire
