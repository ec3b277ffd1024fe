// What happens to one token at a time between the products: norms, rotation, activations, sums. Numbers are rounded to the model's type T
// (float or bf16) at the same places as in quire.models.layers, computed in float32 in between.
#pragma once

#include <cmath>

#include "simd.h"

namespace quire {

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// The value of x once it is stored as T.
template <class T>
inline float rounded(float x) {
  T bits;
  assign(bits, x);
  return as_float(bits);
}

// y = x / rms(x) * (weight + offset); x and y may be the same row.
template <class T>
inline void rms_norm(const T* x, const T* weight, size_t n, float eps, float offset, T* y) {
  Floats squares = zeros();
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats v = load_as_floats(x + i);
    squares = fma(v, v, squares);
  }
  float total = sum_lanes(squares);
  for (; i < n; ++i) total += as_float(x[i]) * as_float(x[i]);
  const float inverse = 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Floats scale = add(load_as_floats(weight + i), all(offset));
    store_floats(y + i, mul(mul(load_as_floats(x + i), all(inverse)), scale));
  }
  for (; i < n; ++i) assign(y[i], as_float(x[i]) * inverse * (as_float(weight[i]) + offset));
}

// Turns the first 2 * half dimensions of a head, pairs (i, i + half), in place.
template <class T>
inline void rotate(T* head, const float* cos, const float* sin, size_t half) {
  size_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Floats a = load_as_floats(head + i), b = load_as_floats(head + half + i);
    const Floats c = load(cos + i), s = load(sin + i);
    store_floats(head + i, sub(mul(a, c), mul(b, s)));
    store_floats(head + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = as_float(head[i]), b = as_float(head[half + i]);
    assign(head[i], a * cos[i] - b * sin[i]);
    assign(head[half + i], b * cos[i] + a * sin[i]);
  }
}

template <class T>
inline void add_row(const T* a, const T* b, size_t n, T* sum) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_floats(sum + i, add(load_as_floats(a + i), load_as_floats(b + i)));
  for (; i < n; ++i) assign(sum[i], as_float(a[i]) + as_float(b[i]));
}

inline Floats activate(Floats x, Activation activation) {
  if (activation == Activation::kSilu) return div(x, add(all(1.0f), exp(sub(zeros(), x))));
  if (activation == Activation::kGeluTanh) {
    // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    const Floats inner = mul(all(0.7978845608028654f), fma(mul(mul(x, x), x), all(0.044715f), x));
    return mul(mul(all(0.5f), x), add(all(1.0f), tanh(inner)));
  }
  alignas(64) float lane[kLanes];
  store(lane, x);
  for (float& v : lane) v = 0.5f * v * (1.0f + std::erf(v * 0.7071067811865476f));
  return load(lane);
}

// One vector of floats as it reads once it is stored as T.
template <class T>
inline Floats rounded_lanes(Floats x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    alignas(64) bf16 bits[kLanes];
    store_bf16(bits, x);
    return load_bf16(bits);
  }
}

}  // namespace quire
