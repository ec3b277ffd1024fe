// Products of rows with packed matrices, shared among the threads of a team.
#pragma once

#include "matrix.h"
#include "parallel.h"

namespace quire {

constexpr size_t kRowBlock = 96;    // rows whose sums lie in the scratch memory of a thread at once
constexpr int kTokensPerChunk = 8;  // tokens of a loop over tokens that one thread takes at a time

// Runs body(first, end) over pieces of [0, num_tokens).
template <class Body>
inline void for_tokens(Team& team, size_t num_tokens, const Body& body) {
  const int num_chunks = static_cast<int>((num_tokens + kTokensPerChunk - 1) / kTokensPerChunk);
  team.for_each(num_chunks, [&](int chunk) {
    const size_t first = static_cast<size_t>(chunk) * kTokensPerChunk;
    body(first, std::min(first + kTokensPerChunk, num_tokens));
  });
}

inline Rows from_row(const Rows& rows, size_t first, size_t words) {
  return {rows.words + first * words, rows.scales == nullptr ? nullptr : rows.scales + first};
}

// rows times each of the matrices, which share K: use(matrix, panel, first row, number of rows, sums [rows][32]) gets every piece once.
template <class Use>
inline void multiply(Team& team, const Rows& rows, size_t num_rows, const Matrix* const* matrices, int num_matrices, const Use& use) {
  int total = 0;
  for (int m = 0; m < num_matrices; ++m) total += static_cast<int>(num_panels(matrices[m]->n));
  team.for_each_run(total, [&](int run_first, int run_end) {
    float* sums = static_cast<float*>(scratch<1>(kRowBlock * kPanel * sizeof(float)));
    int m = 0, before = 0;  // the matrix, and the panels of those before it
    for (int panel = run_first; panel < run_end; ++panel) {
      for (; panel - before >= static_cast<int>(num_panels(matrices[m]->n)); ++m) before += static_cast<int>(num_panels(matrices[m]->n));
      for (size_t first = 0; first < num_rows; first += kRowBlock) {
        const size_t count = std::min(kRowBlock, num_rows - first);
        times_panel(from_row(rows, first, matrices[m]->row_words()), count, *matrices[m], panel - before, sums);
        use(m, static_cast<size_t>(panel - before), first, count, sums);
      }
    }
  });
}

// Stores a piece of a product as T, bias added: to is [rows][stride], its first column that of the panel.
template <class T>
inline void store_panel(const float* sums, size_t num_rows, size_t width, const T* bias, T* to, size_t stride) {
  for (size_t r = 0; r < num_rows; ++r) {
    const float* from = sums + r * kPanel;
    size_t c = 0;
    for (; c + kLanes <= width; c += kLanes) {
      Floats x = load(from + c);
      if (bias != nullptr) x = add(x, load_as_floats(bias + c));
      store_floats(to + r * stride + c, x);
    }
    for (; c < width; ++c) assign(to[r * stride + c], from[c] + (bias == nullptr ? 0.0f : as_float(bias[c])));
  }
}

}  // namespace quire
