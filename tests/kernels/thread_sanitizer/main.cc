// Calls from several threads at once, each with loops of all lengths and a product, on a pool that they share: every chunk must run exactly
// once, every sum must be right, and the sanitizer must see no race. Says how often helpers did a chunk, since without them nothing is tested.
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "parallel.h"
#include "product.h"

namespace {

std::atomic<int> num_wrong{0};
std::atomic<int> num_helped{0};

void loops(quire::Team& team, int num_chunks) {
  std::vector<int> runs(num_chunks, 0);  // plain memory: what a chunk writes must be seen after the loop
  const std::thread::id caller = std::this_thread::get_id();
  team.for_each(num_chunks, [&](int chunk) {
    for (int spin = 0; spin < 200; ++spin) quire::pause();
    ++runs[chunk];
    if (std::this_thread::get_id() != caller) num_helped.fetch_add(1, std::memory_order_relaxed);
  });
  for (int count : runs)
    if (count != 1) ++num_wrong;
}

void product(quire::Team& team, size_t num_rows, size_t k, size_t n) {
  std::vector<float> packed(quire::num_panels(n) * k * quire::kPanel, 1.0f), x(num_rows * k, 2.0f), out(num_rows * n);
  quire::Matrix matrix;
  matrix.k = k;
  matrix.n = n;
  matrix.words = reinterpret_cast<const uint32_t*>(packed.data());
  const quire::Rows rows{reinterpret_cast<uint32_t*>(x.data()), nullptr};
  const quire::Matrix* matrices[] = {&matrix};
  quire::multiply(team, rows, num_rows, matrices, 1, [&](int, size_t panel, size_t first, size_t count, const float* sums) {
    const size_t column = panel * quire::kPanel, width = std::min<size_t>(quire::kPanel, n - column);
    quire::store_panel<float>(sums, count, width, nullptr, out.data() + first * n + column, n);
  });
  for (float value : out)
    if (value != 2.0f * static_cast<float>(k)) ++num_wrong;
}

void call(xla::ffi::Threads& threads, int seed) {
  for (int round = 0; round < 300; ++round) {
    quire::Team team{xla::ffi::ThreadPool(&threads)};
    for (int num_chunks : {1, 2, 3, 17, 64}) loops(team, num_chunks + seed);
    if (round % 10 == 0) product(team, 1 + (round + seed) % 20, 5, 200);
    if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));  // helpers give up, and are called again
  }
}

}  // namespace

int main() {
  for (int limit : {0, 2, 1}) {
    quire::Crew::instance().max_threads.store(limit);
    xla::ffi::Threads threads(4);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back([&threads, i] { call(threads, i); });
    for (std::thread& caller : callers) caller.join();
  }
  std::printf("%d wrong, helped %s\n", num_wrong.load(), num_helped.load() > 0 ? "yes" : "no");
  return num_wrong.load() == 0 && num_helped.load() > 0 ? 0 : 1;
}
