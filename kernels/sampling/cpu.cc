// The sampling op of quire.kernels.sampling.contract as handlers, one for each mode.
//
// A row is cut into pieces of the vocabulary, the same ones whatever the batch and the number of threads, and what they give is put together in
// their order. So a row's token and logprobs are the same bits in any company.
//
// The tokens are those of reference.py, except where rounding decides. Logarithms and exponentials differ from XLA's in the last bit, which matters
// to two sums of logit and noise that lie as close as that, to a token within it of min_p's bound, and to the last token of a nucleus where the
// sum of weights lies within rounding of top_p of all (it is taken in double precision here, in float32 there). Two logits of 0 and -0 are
// equal here; XLA's top_k puts -0 behind. Of broken logits: a NaN gives the last token in every mode, and an infinite one is drawn, the first of them.
#include <array>
#include <cmath>

#include "handler.h"
#include "noise.h"
#include "parallel.h"
#include "select.h"

namespace quire {
namespace {

constexpr size_t kPiece = 8192;  // tokens of a piece: a few microseconds of work
constexpr float kMinTemperature = 1e-5f;

size_t num_pieces(size_t vocab_size) { return (vocab_size + kPiece - 1) / kPiece; }

// The divisor of a row's logits; 1 for a greedy one.
float divisor(float temperature) { return temperature > 0 ? std::max(temperature, kMinTemperature) : 1.0f; }

// The first of the largest; a row with a NaN, which equals nothing, gives the last token.
int32_t token_of(const Best& best, size_t vocab_size) { return best.has_nan ? static_cast<int32_t>(vocab_size) - 1 : best.id; }

Best joined(const Best* parts, size_t count) {
  Best best;
  for (size_t i = 0; i < count; ++i) best.join(parts[i]);
  return best;
}

// tokens[r] is the best of find(row, first, count) over the pieces of row r where that is used, else 0.
template <class Find>
void best_of_rows(Team& team, ffi::Buffer<ffi::PRED> is_used, size_t num_rows, size_t vocab_size, int32_t* tokens, const Find& find) {
  const size_t pieces = num_pieces(vocab_size);
  const std::vector<uint32_t> rows = used_rows(is_used, num_rows);
  Best* parts = static_cast<Best*>(scratch<2>(rows.size() * pieces * sizeof(Best)));
  team.for_each(static_cast<int>(rows.size() * pieces), [&](int chunk) {
    const size_t row = rows[static_cast<size_t>(chunk) / pieces], first = static_cast<size_t>(chunk) % pieces * kPiece;
    parts[chunk] = find(row, first, std::min(kPiece, vocab_size - first));
  });
  std::fill_n(tokens, num_rows, 0);
  for (size_t i = 0; i < rows.size(); ++i) tokens[rows[i]] = token_of(joined(parts + i * pieces, pieces), vocab_size);
}

ffi::Error argmax(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::PRED> is_used, ffi::Result<ffi::Buffer<ffi::S32>> tokens) {
  const size_t num_rows = logits.dimensions()[0], vocab_size = logits.dimensions()[1];
  Team team(pool);
  best_of_rows(team, is_used, num_rows, vocab_size, tokens->typed_data(), [&](size_t row, size_t first, size_t count) {
    return largest_of(logits.typed_data() + row * vocab_size + first, count, static_cast<int32_t>(first));
  });
  return ffi::Error::Success();
}

ffi::Error draw(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::PRED> is_used, ffi::Buffer<ffi::F32> temperature,
                ffi::Buffer<ffi::U32> key, ffi::Buffer<ffi::S32> position, ffi::Result<ffi::Buffer<ffi::S32>> tokens) {
  const size_t num_rows = logits.dimensions()[0], vocab_size = logits.dimensions()[1];
  Team team(pool);
  best_of_rows(team, is_used, num_rows, vocab_size, tokens->typed_data(), [&](size_t row, size_t first, size_t count) {
    const float* x = logits.typed_data() + row * vocab_size + first;
    const float t = temperature.typed_data()[row];
    if (!(t > 0)) return largest_of(x, count, static_cast<int32_t>(first));
    const NoiseKey noise = position_key(key.typed_data() + 2 * row, position.typed_data()[row]);
    return Draw(noise, divisor(t), -std::numeric_limits<float>::infinity()).among(x, count, static_cast<int32_t>(first));
  });
  return ffi::Error::Success();
}

// What FULL is given, as in rows.py: pointers to the first row.
struct Parameters {
  size_t num_rows = 0, vocab_size = 0;
  size_t history_len = 0, num_bias = 0, num_stops = 0, num_bad_words = 0, bad_word_len = 0;
  const float *logits = nullptr, *temperature = nullptr;
  const uint32_t* key = nullptr;
  const int32_t *position = nullptr, *top_k = nullptr;
  const float *top_p = nullptr, *min_p = nullptr, *repetition = nullptr, *presence = nullptr, *frequency = nullptr;
  const int32_t *history = nullptr, *prompt_len = nullptr, *num_tokens = nullptr, *bias_ids = nullptr;
  const float* bias_values = nullptr;
  const uint32_t* allowed = nullptr;
  const int32_t *min_tokens = nullptr, *stop_ids = nullptr, *bad_words = nullptr;

  explicit Parameters(Arguments& from) {
    const auto dims = [](ffi::AnyBuffer buffer, int axis) { return static_cast<size_t>(buffer.dimensions()[axis]); };
    const auto ints = [](ffi::AnyBuffer buffer) { return static_cast<const int32_t*>(buffer.untyped_data()); };
    const ffi::AnyBuffer x = from.next();
    num_rows = dims(x, 0);
    vocab_size = dims(x, 1);
    logits = static_cast<const float*>(x.untyped_data());
    temperature = from.data<const float>();
    key = from.data<const uint32_t>();
    position = from.data<const int32_t>();
    top_k = from.data<const int32_t>();
    top_p = from.data<const float>();
    min_p = from.data<const float>();
    repetition = from.data<const float>();
    presence = from.data<const float>();
    frequency = from.data<const float>();
    const ffi::AnyBuffer tokens = from.next();
    history = ints(tokens);
    history_len = dims(tokens, 1);
    prompt_len = from.data<const int32_t>();
    num_tokens = from.data<const int32_t>();
    const ffi::AnyBuffer biased = from.next();
    bias_ids = ints(biased);
    num_bias = dims(biased, 1);
    bias_values = from.data<const float>();
    allowed = from.data<const uint32_t>();
    min_tokens = from.data<const int32_t>();
    const ffi::AnyBuffer stops = from.next();
    stop_ids = ints(stops);
    num_stops = dims(stops, 1);
    const ffi::AnyBuffer words = from.next();
    bad_words = ints(words);
    num_bad_words = dims(words, 1);
    bad_word_len = dims(words, 2);
  }
};

// Where FULL puts its results; the logprobs only where they were asked for.
struct Results {
  int32_t* token_ids = nullptr;
  float* token_logprobs = nullptr;
  int32_t *ranks = nullptr, *top_ids = nullptr;
  float* top_logprobs = nullptr;
  size_t num_top = 0;

  void clear(size_t num_rows) const {
    std::fill_n(token_ids, num_rows, 0);
    if (num_top == 0) return;
    std::fill_n(token_logprobs, num_rows, 0.0f);
    std::fill_n(ranks, num_rows, 0);
    std::fill_n(top_ids, num_rows * num_top, 0);
    std::fill_n(top_logprobs, num_rows * num_top, 0.0f);
  }
};

// One row of FULL. `Run` runs body(piece) for a number of pieces, here or on the team.
template <class Run>
class FullRow {
 public:
  FullRow(const Parameters& p, size_t row, const Run& run)
      : p_(p), row_(row), run_(run), vocab_size_(p.vocab_size), logits_(p.logits + row * p.vocab_size), divisor_(divisor(p.temperature[row])) {
    const size_t size = (vocab_size_ + 2 * kLanes - 1) / kLanes * kLanes;  // a whole vector behind the last value
    char* base = static_cast<char*>(scratch<3>(7 * size * sizeof(float) + num_pieces(vocab_size_) * sizeof(Best)));
    const auto floats = [&](size_t i) { return reinterpret_cast<float*>(base) + i * size; };
    const auto ints = [&](size_t i) { return reinterpret_cast<int32_t*>(base) + i * size; };
    scaled_ = floats(0);
    kept_.values = floats(1);
    kept_.ids = ints(2);
    weights_ = floats(3);
    room_ = floats(4);
    added_ = floats(5);
    counts_ = reinterpret_cast<uint32_t*>(base) + 6 * size;
    parts_ = reinterpret_cast<Best*>(base + 7 * size * sizeof(float));
  }

  void sample(const Results& to) {
    const int32_t token = draw_token();
    to.token_ids[row_] = token;
    if (to.num_top > 0) write_logprobs(token, to);
  }

 private:
  bool is_random() const { return p_.temperature[row_] > 0; }
  bool has_top_k() const { return p_.top_k[row_] > 0 && static_cast<size_t>(p_.top_k[row_]) < vocab_size_; }
  bool has_top_p() const { return p_.top_p[row_] < 1; }
  bool has_min_p() const { return p_.min_p[row_] > 0; }
  bool has_penalties() const { return p_.repetition[row_] != 1 || p_.frequency[row_] != 0 || p_.presence[row_] != 0; }
  bool is_token(int32_t id) const { return id >= 0 && static_cast<size_t>(id) < vocab_size_; }
  const uint32_t* allowed() const { return p_.allowed + row_ * ((vocab_size_ + 31) / 32); }
  bool is_allowed(int32_t id) const { return allowed()[id / 32] >> (id % 32) & 1u; }
  size_t num_known() const { return static_cast<size_t>(std::min<int64_t>(std::max(p_.num_tokens[row_], 0), p_.history_len)); }

  // What body(first, count) finds in each piece, joined.
  template <class Body>
  Best best_of(const Body& body) {
    const size_t pieces = num_pieces(vocab_size_);
    run_(static_cast<int>(pieces), [&](int piece) {
      const size_t first = static_cast<size_t>(piece) * kPiece;
      parts_[piece] = body(first, std::min(kPiece, vocab_size_ - first));
    });
    return joined(parts_, pieces);
  }
  // What body(first, count) gives for each piece, summed in their order.
  template <class Body>
  double total_of(const Body& body) {
    const size_t pieces = num_pieces(vocab_size_);
    double* parts = reinterpret_cast<double*>(weights_);  // far fewer than tokens
    run_(static_cast<int>(pieces), [&](int piece) {
      const size_t first = static_cast<size_t>(piece) * kPiece;
      parts[piece] = body(first, std::min(kPiece, vocab_size_ - first));
    });
    double total = 0;
    for (size_t i = 0; i < pieces; ++i) total += parts[i];
    return total;
  }
  Best largest_in(const float* x) {
    return best_of([&](size_t first, size_t count) { return largest_of(x + first, count, static_cast<int32_t>(first)); });
  }
  // Of logits as they came in none counts as less than kMasked; the scaled ones have been raised to it already.
  Best draw_from(const float* x, float temperature) {
    const Draw draw(noise_key(), temperature, x == logits_ ? kMasked : -std::numeric_limits<float>::infinity());
    return best_of([&](size_t first, size_t count) { return draw.among(x + first, count, static_cast<int32_t>(first)); });
  }
  NoiseKey noise_key() const { return position_key(p_.key + 2 * row_, p_.position[row_]); }

  int32_t draw_token() {
    const bool is_truncated = is_random() && (has_top_k() || has_top_p() || has_min_p()), allows_all = every_bit_is_set();
    if (allows_all && !is_truncated && !changes_any()) {
      if (is_random()) return token_of(draw_from(logits_, divisor_), vocab_size_);
      const Best best = largest_in(logits_);
      return best.has_nan || best.value >= kMasked ? token_of(best, vocab_size_) : 0;  // what lies below kMasked counts as much
    }
    scale(allows_all);
    change();
    if (is_random() && !is_truncated) return token_of(draw_from(scaled_, 1.0f), vocab_size_);
    const Best best = largest_in(scaled_);
    if (!is_random() || best.has_nan || best.value > std::numeric_limits<float>::max()) return token_of(best, vocab_size_);
    truncate(best.value);
    return Draw(noise_key(), 1.0f, -std::numeric_limits<float>::infinity()).among(kept_.values, kept_.count, kept_.ids).id;
  }

  bool every_bit_is_set() const {
    const size_t whole = vocab_size_ / 32, rest = vocab_size_ % 32;
    uint32_t all_set = 0xffffffffu;
    for (size_t i = 0; i < whole; ++i) all_set &= allowed()[i];
    if (rest > 0) all_set &= allowed()[whole] | ~((1u << rest) - 1u);
    return all_set == 0xffffffffu;
  }

  // Logits without what is not allowed, by the temperature.
  void scale(bool allows_all) {
    run_(static_cast<int>(num_pieces(vocab_size_)), [&](int piece) {
      const size_t first = static_cast<size_t>(piece) * kPiece, end = std::min(first + kPiece, vocab_size_);
      for (size_t i = first; i < end; i += kLanes) {
        // The largest of a NaN and something is a NaN when it stands on the right. Adding 0 makes one zero of two.
        Floats x = add(max(all(kMasked), i + kLanes <= end ? load(logits_ + i) : load_rest(logits_ + i, end - i)), zeros());
        if (!allows_all) x = select(allowed()[i / 32] >> (i % 32) & kAllLanes, x, all(kMasked));
        store(scaled_ + i, divisor_ == 1.0f ? x : div(x, all(divisor_)));
      }
    });
  }

  // Calls use(id) for every token that more than the allowed tokens and the temperature acts on, some of them more than once.
  template <class Use>
  void for_changed(const Use& use) const {
    const auto list = [&](const int32_t* ids, size_t count) {
      for (size_t i = 0; i < count; ++i)
        if (is_token(ids[i])) use(ids[i]);
    };
    list(p_.bias_ids + row_ * p_.num_bias, p_.num_bias);
    for_banned(use);
    if (has_penalties()) list(p_.history + row_ * p_.history_len, num_known());
  }
  bool changes_any() const {
    bool any = false;
    for_changed([&](int32_t) { any = true; });
    return any;
  }
  // Stop tokens that would end the row too early, and the last tokens of bad words that the output is one token short of.
  template <class Use>
  void for_banned(const Use& use) const {
    const int32_t num_tokens = p_.num_tokens[row_], prompt_len = p_.prompt_len[row_];
    if (num_tokens - prompt_len < p_.min_tokens[row_])
      for (size_t i = 0; i < p_.num_stops; ++i)
        if (const int32_t id = p_.stop_ids[row_ * p_.num_stops + i]; is_token(id)) use(id);
    for (size_t w = 0; w < p_.num_bad_words; ++w) {
      const int32_t* word = p_.bad_words + (row_ * p_.num_bad_words + w) * p_.bad_word_len;
      const int32_t num_prefix = static_cast<int32_t>(p_.bad_word_len) - 1;
      if (num_prefix < 0 || !is_token(word[num_prefix])) continue;
      bool matches = true;
      for (int32_t i = 0; i < num_prefix && matches; ++i) {
        if (word[i] < 0) continue;
        const int32_t place = num_tokens - num_prefix + i;
        const int32_t in_history = std::min(std::max(place, 0), static_cast<int32_t>(p_.history_len) - 1);
        matches = place >= prompt_len && word[i] == p_.history[row_ * p_.history_len + static_cast<size_t>(in_history)];
      }
      if (matches) use(word[num_prefix]);
    }
  }

  // Bias, bans and penalties, in the order and the arithmetic of logits.py, on the few tokens that have any.
  void change() {
    constexpr uint32_t kInPrompt = 0x80000000u;  // the other bits count the output
    for_changed([&](int32_t id) {
      added_[id] = 0;
      counts_[id] = 0;
    });
    for (size_t i = 0; i < p_.num_bias; ++i)
      if (const int32_t id = p_.bias_ids[row_ * p_.num_bias + i]; is_token(id)) added_[id] += p_.bias_values[row_ * p_.num_bias + i];
    for_banned([&](int32_t id) { added_[id] += kMasked; });
    if (has_penalties())
      for (size_t i = 0; i < num_known(); ++i) {
        const int32_t id = p_.history[row_ * p_.history_len + i];
        if (!is_token(id)) continue;
        if (static_cast<int64_t>(i) >= p_.prompt_len[row_]) ++counts_[id];
        else counts_[id] |= kInPrompt;
      }
    for_changed([&](int32_t id) {
      const uint32_t num_in_output = counts_[id] & ~kInPrompt;
      float x = logits_[id] < kMasked ? kMasked : logits_[id];
      x += added_[id];
      if (counts_[id] != 0) x = x > 0 ? x / p_.repetition[row_] : x * p_.repetition[row_];
      for (const float part : parts_of(p_.frequency[row_])) x -= part * static_cast<float>(num_in_output);
      x -= p_.presence[row_] * (num_in_output > 0 ? 1.0f : 0.0f);
      const bool is_banned = added_[id] < 0.5f * kMasked || !is_allowed(id);
      scaled_[id] = (is_banned ? kMasked : x + 0.0f) / divisor_;
    });
  }

  // As `_parts` of logits.py: three floats of 8 significant bits, whose sum is x.
  static std::array<float, 3> parts_of(float x) {
    const auto leading_bits = [](float value) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      bits &= 0xffff0000u;
      std::memcpy(&value, &bits, sizeof bits);
      return value;
    };
    const float high = leading_bits(x), middle = leading_bits(x - high);
    return {high, middle, x - high - middle};
  }

  // Keeps what min_p, top_k and top_p leave of the scaled logits, none of which is a NaN.
  void truncate(float largest) {
    const auto weigh = [&](Floats x) { return exp(sub(x, all(largest))); };
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    float lowest = kNone;
    if (has_top_k()) lowest = kth_largest(scaled_, vocab_size_, static_cast<size_t>(p_.top_k[row_]), room_);
    if (has_min_p()) lowest = std::max(lowest, largest + std::log(std::min(std::max(p_.min_p[row_], kMinMinP), 1.0f)));
    const double top_p = p_.top_p[row_];
    double total = 0;
    if (lowest == kNone) {
      total = total_of([&](size_t first, size_t count) { return sum_of(scaled_ + first, count, weigh); });
      // Tokens below the V-th part of what top_p leaves out are left out all together, with room for the rounding of both functions.
      lowest = largest + static_cast<float>(std::log((1.0 - top_p) * total / static_cast<double>(vocab_size_)) - 1e-3);
    }
    keep_at_least(scaled_, vocab_size_, lowest, kept_);
    if (!has_top_p()) return;
    const size_t n = kept_.count;
    for (size_t i = 0; i < n; i += kLanes) store(weights_ + i, weigh(load(kept_.values + i)));
    if (total == 0) total = sum_at_least(weights_, n, 0.0f);
    keep_weights(weights_, nucleus_threshold(weights_, n, std::max(top_p * total, kTiny), room_), kept_);
  }

  // Log-probabilities of the logits as they came in; see `compute_logprobs`. A row with a NaN has no others.
  void write_logprobs(int32_t token, const Results& to) {
    const size_t num_top = to.num_top;
    int32_t* top_ids = to.top_ids + row_ * num_top;
    float* top_logprobs = to.top_logprobs + row_ * num_top;
    const Best best = largest_in(logits_);
    if (best.has_nan) {
      constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
      to.token_logprobs[row_] = kNan;
      to.ranks[row_] = 1;
      for (size_t i = 0; i < num_top; ++i) {
        top_ids[i] = static_cast<int32_t>(i);
        top_logprobs[i] = kNan;
      }
      return;
    }
    const float chosen = logits_[token];
    const float log_sum = static_cast<float>(std::log(total_of([&](size_t first, size_t count) {
      return sum_of(logits_ + first, count, [&](Floats x) { return exp(sub(x, all(best.value))); });
    })));
    to.ranks[row_] = 1 + static_cast<int32_t>(total_of([&](size_t first, size_t count) { return count_above(logits_ + first, count, chosen); }));
    to.token_logprobs[row_] = (chosen - best.value) - log_sum;
    keep_at_least(logits_, vocab_size_, kth_largest(logits_, vocab_size_, num_top, room_), kept_);
    // The largest first, the smaller id first among equals: the order of the list, which is that of the ids, decides there.
    uint32_t* order = counts_;
    for (size_t i = 0; i < kept_.count; ++i) order[i] = static_cast<uint32_t>(i);
    std::partial_sort(order, order + num_top, order + kept_.count, [&](uint32_t a, uint32_t b) {
      return kept_.values[a] != kept_.values[b] ? kept_.values[a] > kept_.values[b] : a < b;
    });
    for (size_t i = 0; i < num_top; ++i) {
      top_ids[i] = kept_.ids[order[i]];
      top_logprobs[i] = (kept_.values[order[i]] - best.value) - log_sum;
    }
  }
  static constexpr float kMasked = -1e30f, kMinMinP = 1e-30f;
  static constexpr double kTiny = 1e-30;

  const Parameters& p_;
  size_t row_;
  const Run& run_;
  size_t vocab_size_;
  const float* logits_;
  float divisor_;
  float *scaled_, *weights_, *room_, *added_;
  uint32_t* counts_;
  Tokens kept_;
  Best* parts_;
};

ffi::Error sample(ffi::ThreadPool pool, ffi::Buffer<ffi::PRED> is_used, ffi::RemainingArgs buffers, ffi::RemainingRets results, int64_t num_logprobs) {
  Arguments from(buffers);
  const Parameters p(from);
  if (ffi::Error error = from.check(); error.failure()) return error;
  Results to;
  to.num_top = static_cast<size_t>(num_logprobs);
  void* places[5] = {};
  const size_t num_results = num_logprobs > 0 ? 5 : 1;
  if (results.size() != num_results) return ffi::Error::InvalidArgument("the results are not those of so many logprobs");
  for (size_t i = 0; i < num_results; ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!result.has_value()) return result.error();
    places[i] = (*result)->untyped_data();
  }
  to.token_ids = static_cast<int32_t*>(places[0]);
  to.token_logprobs = static_cast<float*>(places[1]);
  to.ranks = static_cast<int32_t*>(places[2]);
  to.top_ids = static_cast<int32_t*>(places[3]);
  to.top_logprobs = static_cast<float*>(places[4]);
  const std::vector<uint32_t> rows = used_rows(is_used, p.num_rows);
  if (rows.size() < p.num_rows) to.clear(p.num_rows);
  Team team(pool);
  if (rows.size() >= 2 * static_cast<size_t>(team.num_threads())) {
    const auto run_here = [](int count, const auto& body) {
      for (int i = 0; i < count; ++i) body(i);
    };
    team.for_each(static_cast<int>(rows.size()), [&](int i) { FullRow(p, rows[static_cast<size_t>(i)], run_here).sample(to); });
  } else {
    const auto run_on_team = [&](int count, const auto& body) { team.for_each(count, body); };
    for (const uint32_t row : rows) FullRow(p, row, run_on_team).sample(to);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_argmax, argmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_draw, draw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_sample, sample,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::PRED>>().RemainingArgs().RemainingRets().Attr<int64_t>("num_logprobs"));

}  // namespace quire
