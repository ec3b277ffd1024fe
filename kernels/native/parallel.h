// Work shared among the threads of XLA's own pool, without a wait that could deadlock.
//
// A handler opens a `Team` and gives it loops of independent chunks. The calling thread takes chunks like every helper does, so a
// loop ends even when no helper ever starts; it waits only for chunks that a helper has already begun. Helpers are tasks on
// XLA's pool that look for the next loop for a short while before they give their thread back: waking a thread takes longer than many of the
// loops of a decode step, and a step has hundreds of them.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace quire {

namespace ffi = xla::ffi;

// The one loop that is open in this process, and who works on it. Lives as long as the process, so a helper that starts late finds it.
class Crew {
 public:
  static Crew& instance() {
    static Crew* crew = new Crew;  // never destroyed: helpers may outlive static destruction
    return *crew;
  }

  // Most threads that a loop may use, the caller included; 0 is as many as the pool has.
  std::atomic<int> max_threads{0};

 private:
  friend class Team;
  using Run = void (*)(const void* body, int chunk);
  static constexpr auto kLinger = std::chrono::microseconds(80);
  static constexpr int kSpinsPerLook = 128;

  // Takes one chunk of the open loop and runs it; false when there is none left to take.
  bool work() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
      if (static_cast<uint32_t>(ticket) == 0) return false;
      // The upper half is the loop's number: a claim on a loop that has ended, and been replaced, fails.
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    // From here on the loop cannot end, and its fields cannot change, before this chunk is reported done.
    run_(body_, num_chunks_ - static_cast<int>(static_cast<uint32_t>(ticket)));
    num_done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void help() {
    using Clock = std::chrono::steady_clock;
    auto since = Clock::now();
    for (int spins = 0;;) {
      if (work()) {
        spins = 0;
        since = Clock::now();
        continue;
      }
      pause();
      if (++spins == kSpinsPerLook) {
        if (Clock::now() - since > kLinger) break;
        spins = 0;
      }
    }
    num_helpers_.fetch_sub(1, std::memory_order_acq_rel);
  }

  std::atomic<bool> is_taken_{false};
  alignas(64) std::atomic<uint64_t> ticket_{0};    // loop number << 32 | chunks that nobody has taken
  alignas(64) std::atomic<int> num_done_{0};
  std::atomic<int> num_helpers_{0};                // scheduled or running
  Run run_ = nullptr;
  const void* body_ = nullptr;
  int num_chunks_ = 0;
  uint32_t number_ = 0;
};

// What one handler call has of the crew. Where another call holds it (two programs running at once), loops run on the caller alone.
class Team {
 public:
  explicit Team(ffi::ThreadPool pool) : pool_(pool), crew_(Crew::instance()) {
    const int limit = crew_.max_threads.load(std::memory_order_relaxed);
    num_threads_ = static_cast<int>(pool.num_threads());
    if (limit > 0) num_threads_ = std::min(num_threads_, limit);
    has_crew_ = num_threads_ > 1 && !crew_.is_taken_.exchange(true, std::memory_order_acquire);
    if (!has_crew_) num_threads_ = 1;
  }
  ~Team() {
    if (has_crew_) crew_.is_taken_.store(false, std::memory_order_release);
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs body(chunk) for every chunk in [0, num_chunks), in any order, on any of the threads.
  template <class Body>
  void for_each(int num_chunks, const Body& body) {
    if (!has_crew_ || num_chunks <= 1) {
      for (int chunk = 0; chunk < num_chunks; ++chunk) body(chunk);
      return;
    }
    call_helpers(num_chunks);
    crew_.run_ = [](const void* body, int chunk) { (*static_cast<const Body*>(body))(chunk); };
    crew_.body_ = &body;
    crew_.num_chunks_ = num_chunks;
    crew_.num_done_.store(0, std::memory_order_relaxed);
    crew_.ticket_.store(static_cast<uint64_t>(++crew_.number_) << 32 | static_cast<uint32_t>(num_chunks), std::memory_order_release);
    while (crew_.work()) {
    }
    for (int spins = 0; crew_.num_done_.load(std::memory_order_acquire) != num_chunks; ++spins) {
      pause();
      if (spins > 20000) sched_yield();  // a helper has lost its processor in the middle of a chunk
    }
  }

  // Runs body(first, end) over runs of neighbours that make up [0, count): long runs first, so that a thread reads memory in order and what
  // it has asked for ahead is its own, short ones at the end, so that all threads finish together.
  template <class Body>
  void for_each_run(int count, const Body& body) {
    std::vector<int> starts;
    for (int first = 0; first < count; first += std::max(1, (count - first) / (2 * num_threads_))) starts.push_back(first);
    starts.push_back(count);
    for_each(static_cast<int>(starts.size()) - 1, [&](int run) { body(starts[run], starts[run + 1]); });
  }

 private:
  void call_helpers(int num_chunks) {
    const int wanted = std::min(num_threads_, num_chunks) - 1;
    while (crew_.num_helpers_.load(std::memory_order_acquire) < wanted) {
      crew_.num_helpers_.fetch_add(1, std::memory_order_acq_rel);
      pool_.Schedule([crew = &crew_] { crew->help(); });
    }
  }

  ffi::ThreadPool pool_;
  Crew& crew_;
  int num_threads_;
  bool has_crew_;
};

// Memory of the calling thread, kept for its next use; its content is whatever was there. Each `Slot` is another piece.
template <int Slot>
inline void* scratch(size_t num_bytes) {
  struct Piece {
    void* data = nullptr;
    size_t size = 0;
    ~Piece() { std::free(data); }
  };
  static thread_local Piece piece;
  if (piece.size < num_bytes) {
    std::free(piece.data);
    piece.size = (num_bytes + 4095) / 4096 * 4096;
    piece.data = std::aligned_alloc(4096, piece.size);
    if (piece.data == nullptr) {
      piece.size = 0;
      throw std::bad_alloc();
    }
  }
  return piece.data;
}

}  // namespace quire
