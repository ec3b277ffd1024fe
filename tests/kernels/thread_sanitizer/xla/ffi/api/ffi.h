// Stands in for XLA's header, so that kernels/native/parallel.h is compiled as it is, but runs on threads that the sanitizer sees whole.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace xla::ffi {

class Threads {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_over_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void add(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }
  int count() const { return static_cast<int>(threads_.size()); }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return is_over_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  bool is_over_ = false;
};

class ThreadPool {
 public:
  explicit ThreadPool(Threads* threads) : threads_(threads) {}
  int64_t num_threads() const { return threads_->count(); }
  template <class F>
  void Schedule(F&& task) {
    threads_->add(std::forward<F>(task));
  }

 private:
  Threads* threads_;
};

}  // namespace xla::ffi
