// One decoder layer in one call: norms, projections, rotation, cache write, attention, gated MLP or experts, and the sums between them.
//
// What is fused saves two things: hundreds of small programs a step between the products, and the waking of threads for each. The
// pieces are those of quire.models.decoder, with the same roundings. Padding is left out from the start: only a row's real tokens are computed, so
// a step costs what is in it, whatever the shape that it was compiled for.
//
// T tokens of the step, D hidden size, N query heads, K key/value heads, H head_dim, F width of the MLP or of one expert, R rotated
// dimensions, E experts, k experts per token.
#include <vector>

#include "handler.h"
#include "parallel.h"
#include "product.h"
#include "row_ops.h"
#include "../paged_attention/cpu.h"

namespace quire {
namespace {

struct LayerSpec {
  Format format;  // of the matrices
  Activation activation;
  AttentionShape attention;
  float eps, norm_offset;
  bool has_qkv_bias, has_o_bias, has_mlp_bias, has_qk_norm, has_post_norms;
  size_t hidden, mlp, half_rotary;
  size_t num_experts, experts_per_token;  // 0 and 1 for a plain MLP
  bool norm_topk;

  bool has_experts() const { return num_experts > 0; }
};

// A layer's buffers in the order in which `quire.kernels.decoder_layer.cpu` hands them over.
template <class T>
struct LayerArguments {
  const T* x;
  const float *cos, *sin;
  const int32_t *blocks, *offsets;
  int num_rectangles;
  Rectangle rectangles[kMaxRectangles];
  const T *input_norm, *post_attention_norm, *pre_mlp_norm, *post_mlp_norm, *q_norm, *k_norm;
  Matrix q, k, v, o, router;
  Matrix gate, up, down;  // of the first expert, where there are several; the others follow
  const T *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
};

template <class T>
class Layer {
 public:
  Layer(const LayerSpec& spec, const LayerArguments<T>& args, const Cache<T>& cache, T* out, Team& team)
      : spec_(spec), args_(args), cache_(cache), out_(out), team_(team) {
    find_real_tokens();
    q_width_ = static_cast<size_t>(spec.attention.num_heads) * spec.attention.head_dim;
    kv_width_ = static_cast<size_t>(spec.attention.num_kv_heads) * spec.attention.head_dim;
    qkv_stride_ = q_width_ + 2 * kv_width_;
    num_mlp_rows_ = num_tokens_ * spec.experts_per_token;
    segments_.push_back({args.gate, args.up, args.down, 0, num_tokens_});
    reserve();
  }

  void run() {
    for_tokens(team_, num_tokens_, [&](size_t first, size_t end) {
      for (size_t t = first; t < end; ++t) norm_to_rows(args_.x + places_[t] * spec_.hidden, args_.input_norm, t, spec_.hidden);
    });
    project_qkv();
    attend();
    to_rows(attended_, q_width_, num_tokens_);
    project_to_hidden(args_.o, args_.o_bias);
    for_tokens(team_, num_tokens_, [&](size_t first, size_t end) {
      for (size_t t = first; t < end; ++t) {
        add_to_residual(args_.x + places_[t] * spec_.hidden, args_.post_attention_norm, t);
        norm_to_rows(out_ + places_[t] * spec_.hidden, args_.pre_mlp_norm, t, spec_.hidden);
        if (spec_.has_experts()) {
          const T* normed = static_cast<const T*>(scratch<3>(spec_.hidden * sizeof(T)));  // where norm_to_rows has left it
          row_to_words(normed, spec_.hidden, router_format(), router_rows_.words + t * args_.router.row_words(), nullptr);
        }
      }
    });
    if (spec_.has_experts()) route();
    gate_and_up();
    to_rows(activated_, spec_.mlp, num_mlp_rows_);
    down();
    for_tokens(team_, num_tokens_, [&](size_t first, size_t end) {
      for (size_t t = first; t < end; ++t) add_to_residual(out_ + places_[t] * spec_.hidden, args_.post_mlp_norm, t);
    });
  }

 private:
  // Rows that meet the same matrices: all tokens of a plain MLP, or those that go to one expert.
  struct Segment {
    Matrix gate, up, down;
    size_t first, end;
  };

  // Numbers the real tokens in order. Whatever comes out for padding has only to be finite.
  void find_real_tokens() {
    size_t place = 0;
    for (int i = 0; i < args_.num_rectangles; ++i) {
      const Rectangle& rectangle = args_.rectangles[i];
      for (int row = 0; row < rectangle.num_rows; ++row, place += rectangle.width) {
        const size_t count = rectangle.num_queries(row);
        first_tokens_.push_back(places_.size());
        for (size_t w = 0; w < count; ++w) places_.push_back(place + w);
        std::fill_n(out_ + (place + count) * spec_.hidden, (rectangle.width - count) * spec_.hidden, T());
      }
    }
    num_tokens_ = places_.size();
  }

  // Memory of the calling thread for what passes between the loops; helpers are handed pointers into it.
  void reserve() {
    const size_t widest = std::max({spec_.hidden, q_width_, spec_.mlp}), words = num_words(spec_.format, widest);
    const size_t num_routed = spec_.has_experts() ? num_mlp_rows_ : 0;
    size_t size = 0;
    const auto place = [&](size_t num_bytes) {
      const size_t start = size;
      size += (num_bytes + 127) / 64 * 64;
      return start;
    };
    const size_t words_at = place(num_mlp_rows_ * words * sizeof(uint32_t)), scales_at = place(num_mlp_rows_ * sizeof(float));
    const size_t routed_at = place(num_routed * words * sizeof(uint32_t)), routed_scales_at = place(num_routed * sizeof(float));
    const size_t qkv_at = place(num_tokens_ * qkv_stride_ * sizeof(T)), attended_at = place(num_tokens_ * q_width_ * sizeof(T));
    const size_t activated_at = place(num_mlp_rows_ * spec_.mlp * sizeof(T)), hidden_at = place(num_tokens_ * spec_.hidden * sizeof(T));
    const size_t router_at = place(num_tokens_ * num_words(router_format(), spec_.hidden) * sizeof(uint32_t));
    const size_t logits_at = place(num_tokens_ * spec_.num_experts * sizeof(float));
    char* base = static_cast<char*>(scratch<2>(size));
    rows_ = {reinterpret_cast<uint32_t*>(base + words_at), reinterpret_cast<float*>(base + scales_at)};
    routed_ = {reinterpret_cast<uint32_t*>(base + routed_at), reinterpret_cast<float*>(base + routed_scales_at)};
    router_rows_ = {reinterpret_cast<uint32_t*>(base + router_at), nullptr};
    logits_ = reinterpret_cast<float*>(base + logits_at);
    qkv_ = reinterpret_cast<T*>(base + qkv_at);
    attended_ = reinterpret_cast<T*>(base + attended_at);
    activated_ = reinterpret_cast<T*>(base + activated_at);
    hidden_ = reinterpret_cast<T*>(base + hidden_at);
  }

  // Which expert a token goes to hangs on small differences, so the router is never quantized.
  static constexpr Format router_format() { return sizeof(T) == sizeof(float) ? Format::kFloat32 : Format::kBfloat16; }

  void put_row(const T* x, size_t width, size_t t) {
    row_to_words(x, width, spec_.format, rows_.words + t * num_words(spec_.format, width), rows_.scales + t);
  }

  void norm_to_rows(const T* x, const T* weight, size_t t, size_t width) {
    T* normed = static_cast<T*>(scratch<3>(width * sizeof(T)));
    rms_norm(x, weight, width, spec_.eps, spec_.norm_offset, normed);
    put_row(normed, width, t);
  }

  void to_rows(const T* x, size_t width, size_t num_rows) {
    for_tokens(team_, num_rows, [&](size_t first, size_t end) {
      for (size_t t = first; t < end; ++t) put_row(x + t * width, width, t);
    });
  }

  void project_qkv() {
    const Matrix* matrices[] = {&args_.q, &args_.k, &args_.v};
    const T* biases[] = {args_.q_bias, args_.k_bias, args_.v_bias};
    const size_t first_columns[] = {0, q_width_, q_width_ + kv_width_};
    multiply(team_, rows_, num_tokens_, matrices, 3, [&](int m, size_t panel, size_t first, size_t count, const float* sums) {
      const size_t column = panel * kPanel, width = std::min<size_t>(kPanel, matrices[m]->n - column);
      const T* bias = biases[m] == nullptr ? nullptr : biases[m] + column;
      store_panel(sums, count, width, bias, qkv_ + first * qkv_stride_ + first_columns[m] + column, qkv_stride_);
    });
    for_tokens(team_, num_tokens_, [&](size_t first, size_t end) {
      for (size_t t = first; t < end; ++t) {
        T* q = qkv_ + t * qkv_stride_;
        T *k = q + q_width_, *v = k + kv_width_;
        prepare_heads(q, spec_.attention.num_heads, args_.q_norm, t);
        prepare_heads(k, spec_.attention.num_kv_heads, args_.k_norm, t);
        write_token(cache_, k, v, args_.blocks[places_[t]], args_.offsets[places_[t]]);
      }
    });
  }

  void prepare_heads(T* heads, int num_heads, const T* norm, size_t t) {
    const size_t head_dim = spec_.attention.head_dim;
    for (int head = 0; head < num_heads; ++head) {
      T* x = heads + head * head_dim;
      if (norm != nullptr) rms_norm(x, norm, head_dim, spec_.eps, spec_.norm_offset, x);
      rotate(x, args_.cos + places_[t] * spec_.half_rotary, args_.sin + places_[t] * spec_.half_rotary, spec_.half_rotary);
    }
  }

  void attend() {
    const Attention<T> attention(spec_.attention, cache_, qkv_, qkv_stride_, attended_, q_width_);
    attend_rectangles(team_, attention, args_.rectangles, args_.num_rectangles, spec_.attention.num_kv_heads,
                      first_tokens_.data());
  }

  // rows_ times a matrix that leads back to the hidden size, into hidden_.
  void project_to_hidden(const Matrix& matrix, const T* bias) {
    const Matrix* matrices[] = {&matrix};
    multiply(team_, rows_, num_tokens_, matrices, 1, [&](int, size_t panel, size_t first, size_t count, const float* sums) {
      const size_t column = panel * kPanel, width = std::min<size_t>(kPanel, matrix.n - column);
      store_panel(sums, count, width, bias == nullptr ? nullptr : bias + column, hidden_ + first * spec_.hidden + column, spec_.hidden);
    });
  }

  // out = residual + hidden, the latter normed where the model does so.
  void add_to_residual(const T* residual, const T* norm, size_t t) {
    T* hidden = hidden_ + t * spec_.hidden;
    if (norm != nullptr) rms_norm(hidden, norm, spec_.hidden, spec_.eps, spec_.norm_offset, hidden);
    add_row(residual, hidden, spec_.hidden, out_ + places_[t] * spec_.hidden);
  }

  // Chooses the experts of every token and lays the rows of each expert one after the other: a segment.
  void route() {
    const Matrix* matrices[] = {&args_.router};
    const size_t experts = spec_.num_experts, k = spec_.experts_per_token;
    multiply(team_, router_rows_, num_tokens_, matrices, 1, [&](int, size_t panel, size_t first, size_t count, const float* sums) {
      const size_t column = panel * kPanel, width = std::min<size_t>(kPanel, experts - column);
      store_panel<float>(sums, count, width, nullptr, logits_ + first * experts + column, experts);
    });
    struct Pick {
      uint32_t token;
      float weight;
    };
    std::vector<std::vector<Pick>> picks(experts);
    std::vector<float> left(experts);
    std::vector<size_t> chosen(k);
    for (size_t t = 0; t < num_tokens_; ++t) {
      const float* logits = logits_ + t * experts;
      const float largest = *std::max_element(logits, logits + experts);
      float total = 0, kept = 0;
      for (size_t e = 0; e < experts; ++e) total += left[e] = std::exp(logits[e] - largest);
      for (float& p : left) p /= total;
      std::vector<float> weights(k);
      for (size_t i = 0; i < k; ++i) {  // of equal ones the lower index wins
        chosen[i] = std::max_element(left.begin(), left.end()) - left.begin();
        kept += weights[i] = left[chosen[i]];
        left[chosen[i]] = -1.0f;
      }
      for (size_t i = 0; i < k; ++i) picks[chosen[i]].push_back({static_cast<uint32_t>(t), spec_.norm_topk ? weights[i] / kept : weights[i]});
    }
    segments_.clear();
    tokens_.clear();
    weights_.clear();
    for (size_t e = 0; e < experts; ++e) {
      if (picks[e].empty()) continue;
      segments_.push_back({args_.gate.expert(e), args_.up.expert(e), args_.down.expert(e), tokens_.size(), tokens_.size() + picks[e].size()});
      for (const Pick& pick : picks[e]) {
        tokens_.push_back(pick.token);
        weights_.push_back(pick.weight);
      }
    }
    const size_t words = args_.gate.row_words();
    for_tokens(team_, num_mlp_rows_, [&](size_t first, size_t end) {
      for (size_t r = first; r < end; ++r) {
        std::memcpy(routed_.words + r * words, rows_.words + tokens_[r] * words, words * sizeof(uint32_t));
        routed_.scales[r] = rows_.scales[tokens_[r]];
      }
    });
  }

  // activated = act(rows x gate) * (rows x up): a thread computes the same panel of both, so neither is kept.
  void gate_and_up() {
    const int panels = static_cast<int>(num_panels(spec_.mlp));
    const Rows& rows = spec_.has_experts() ? routed_ : rows_;
    team_.for_each_run(static_cast<int>(segments_.size()) * panels, [&](int run_first, int run_end) {
      for (int chunk = run_first; chunk < run_end; ++chunk) {
        const Segment& segment = segments_[chunk / panels];
        for (size_t first = segment.first; first < segment.end; first += kRowBlock)
          gate_and_up_panel(segment, rows, chunk % panels, first, std::min(kRowBlock, segment.end - first));
      }
    });
  }

  void gate_and_up_panel(const Segment& segment, const Rows& rows, int panel, size_t first, size_t count) {
    float* gate = static_cast<float*>(scratch<1>(2 * kRowBlock * kPanel * sizeof(float)));
    float* up = gate + kRowBlock * kPanel;
    const size_t column = static_cast<size_t>(panel) * kPanel, width = std::min<size_t>(kPanel, spec_.mlp - column);
    alignas(64) float gate_bias[kPanel] = {}, up_bias[kPanel] = {};
    for (size_t c = 0; spec_.has_mlp_bias && c < width; ++c) {
      gate_bias[c] = as_float(args_.gate_bias[column + c]);
      up_bias[c] = as_float(args_.up_bias[column + c]);
    }
    const Rows some = from_row(rows, first, segment.gate.row_words());
    times_panel(some, count, segment.gate, panel, gate);
    times_panel(some, count, segment.up, panel, up);
    for (size_t r = 0; r < count; ++r) {
      float* row = gate + r * kPanel;
      for (int c = 0; c < kPanel; c += kLanes) {
        const Floats g = load(row + c), u = load(up + r * kPanel + c);
        if (spec_.has_experts()) {  // summed over experts in float32, so rounded only once
          store(row + c, mul(mul(activate(g, spec_.activation), u), all(weights_[first + r])));
          continue;
        }
        const Floats gated = rounded_lanes<T>(activate(rounded_lanes<T>(add(g, load(gate_bias + c))), spec_.activation));
        store(row + c, mul(gated, rounded_lanes<T>(add(u, load(up_bias + c)))));
      }
    }
    store_panel<T>(gate, count, width, nullptr, activated_ + first * spec_.mlp + column, spec_.mlp);
  }

  // hidden = activated x down; with experts the sum over those of a token, in the order of the experts.
  void down() {
    if (!spec_.has_experts()) return project_to_hidden(args_.down, args_.down_bias);
    team_.for_each(static_cast<int>(num_panels(spec_.hidden)), [&](int panel) {
      const size_t column = static_cast<size_t>(panel) * kPanel, width = std::min<size_t>(kPanel, spec_.hidden - column);
      float* sums = static_cast<float*>(scratch<1>(kRowBlock * kPanel * sizeof(float)));
      float* totals = static_cast<float*>(scratch<4>(num_tokens_ * kPanel * sizeof(float)));
      std::fill_n(totals, num_tokens_ * kPanel, 0.0f);
      for (const Segment& segment : segments_)
        for (size_t first = segment.first; first < segment.end; first += kRowBlock) {
          const size_t count = std::min(kRowBlock, segment.end - first);
          times_panel(from_row(rows_, first, segment.down.row_words()), count, segment.down, panel, sums);
          for (size_t r = 0; r < count; ++r) {
            float* total = totals + tokens_[first + r] * kPanel;
            for (int c = 0; c < kPanel; c += kLanes) store(total + c, add(load(total + c), load(sums + r * kPanel + c)));
          }
        }
      store_panel<T>(totals, num_tokens_, width, nullptr, hidden_ + column, spec_.hidden);
    });
  }

  const LayerSpec& spec_;
  const LayerArguments<T>& args_;
  Cache<T> cache_;
  T* out_;
  Team& team_;
  std::vector<size_t> places_;        // of each real token among the tokens of the step
  std::vector<size_t> first_tokens_;  // of each row, among the real tokens
  size_t num_tokens_, q_width_, kv_width_, qkv_stride_;
  size_t num_mlp_rows_;  // tokens, each as often as it goes to an expert
  Rows rows_, routed_, router_rows_;
  float* logits_;
  T *qkv_, *attended_, *activated_, *hidden_;
  std::vector<Segment> segments_;
  std::vector<uint32_t> tokens_;  // per routed row
  std::vector<float> weights_;    // per routed row
};

template <class T>
LayerArguments<T> read(Arguments& from, const LayerSpec& spec, const int64_t* widths, int num_rectangles) {
  LayerArguments<T> args{};
  args.cos = from.data<const float>();
  args.sin = from.data<const float>();
  args.blocks = from.data<const int32_t>();
  args.offsets = from.data<const int32_t>();
  args.num_rectangles = num_rectangles;
  for (int i = 0; i < num_rectangles; ++i) {
    Rectangle& r = args.rectangles[i];
    const ffi::AnyBuffer tables = from.next();
    r.tables = static_cast<const int32_t*>(tables.untyped_data());
    r.num_rows = static_cast<int>(tables.dimensions()[0]);
    r.max_blocks = static_cast<int>(tables.dimensions()[1]);
    r.width = static_cast<int>(widths[i]);
    r.seq_lens = from.data<const int32_t>();
    r.query_lens = from.data<const int32_t>();
  }
  const size_t q_width = static_cast<size_t>(spec.attention.num_heads) * spec.attention.head_dim;
  const size_t kv_width = static_cast<size_t>(spec.attention.num_kv_heads) * spec.attention.head_dim;
  args.input_norm = from.data<const T>();
  args.pre_mlp_norm = from.data<const T>();
  if (spec.has_post_norms) {
    args.post_attention_norm = from.data<const T>();
    args.post_mlp_norm = from.data<const T>();
  }
  if (spec.has_qk_norm) {
    args.q_norm = from.data<const T>();
    args.k_norm = from.data<const T>();
  }
  args.q = from.matrix(spec.format, spec.hidden, q_width);
  args.k = from.matrix(spec.format, spec.hidden, kv_width);
  args.v = from.matrix(spec.format, spec.hidden, kv_width);
  args.o = from.matrix(spec.format, q_width, spec.hidden);
  const size_t copies = std::max<size_t>(spec.num_experts, 1);
  if (spec.has_experts()) args.router = from.matrix(sizeof(T) == sizeof(float) ? Format::kFloat32 : Format::kBfloat16, spec.hidden, spec.num_experts);
  args.gate = from.matrix(spec.format, spec.hidden, spec.mlp, copies);
  args.up = from.matrix(spec.format, spec.hidden, spec.mlp, copies);
  args.down = from.matrix(spec.format, spec.mlp, spec.hidden, copies);
  if (spec.has_qkv_bias) {
    args.q_bias = from.data<const T>();
    args.k_bias = from.data<const T>();
    args.v_bias = from.data<const T>();
  }
  if (spec.has_o_bias) args.o_bias = from.data<const T>();
  if (spec.has_mlp_bias) {
    args.gate_bias = from.data<const T>();
    args.up_bias = from.data<const T>();
    args.down_bias = from.data<const T>();
  }
  return args;
}

template <class T>
ffi::Error run_layer(ffi::ThreadPool pool, const LayerSpec& spec, ffi::AnyBuffer x, ffi::RemainingArgs buffers,
                     ffi::Span<const int64_t> widths, ffi::AnyBuffer out, ffi::AnyBuffer cache) {
  Arguments from(buffers);
  LayerArguments<T> args = read<T>(from, spec, widths.begin(), static_cast<int>(widths.size()));
  if (ffi::Error error = from.check(); error.failure()) return error;
  args.x = static_cast<const T*>(x.untyped_data());
  const auto dims = cache.dimensions();
  const Cache<T> view{static_cast<T*>(cache.untyped_data()), static_cast<int>(dims[0]), static_cast<int>(dims[1]),
                      spec.attention.num_kv_heads, spec.attention.head_dim};
  Team team(pool);
  Layer<T>(spec, args, view, static_cast<T*>(out.untyped_data()), team).run();
  return ffi::Error::Success();
}

enum Flags : int64_t { kQkvBias = 1, kOBias = 2, kMlpBias = 4, kQkNorm = 8, kPostNorms = 16, kNormTopk = 32 };

ffi::Error decoder_layer(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer, ffi::RemainingArgs buffers,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> cache, int64_t format, int64_t activation,
                         int64_t flags, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t mlp, int64_t half_rotary,
                         int64_t num_experts, int64_t experts_per_token, int64_t sliding_window, float scale, float soft_cap, float eps, float norm_offset,
                         ffi::Span<const int64_t> widths) {
  if (widths.size() > kMaxRectangles) return ffi::Error::InvalidArgument("more rectangles than a layer takes");
  LayerSpec spec{};
  spec.format = static_cast<Format>(format);
  spec.activation = static_cast<Activation>(activation);
  spec.attention = {static_cast<int>(num_heads), static_cast<int>(num_kv_heads), static_cast<int>(head_dim), scale, soft_cap,
                    static_cast<int>(sliding_window)};
  spec.eps = eps;
  spec.norm_offset = norm_offset;
  spec.has_qkv_bias = flags & kQkvBias;
  spec.has_o_bias = flags & kOBias;
  spec.has_mlp_bias = flags & kMlpBias;
  spec.has_qk_norm = flags & kQkNorm;
  spec.has_post_norms = flags & kPostNorms;
  spec.hidden = x.dimensions()[1];
  spec.mlp = mlp;
  spec.half_rotary = half_rotary;
  spec.num_experts = num_experts;
  spec.experts_per_token = num_experts > 0 ? experts_per_token : 1;
  spec.norm_topk = flags & kNormTopk;
  if (x.element_type() == ffi::DataType::F32) return run_layer<float>(pool, spec, x, buffers, widths, *out, *cache);
  return run_layer<bf16>(pool, spec, x, buffers, widths, *out, *cache);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quire_decoder_layer, decoder_layer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("flags")
                                  .Attr<int64_t>("num_heads")
                                  .Attr<int64_t>("num_kv_heads")
                                  .Attr<int64_t>("head_dim")
                                  .Attr<int64_t>("mlp")
                                  .Attr<int64_t>("half_rotary")
                                  .Attr<int64_t>("num_experts")
                                  .Attr<int64_t>("experts_per_token")
                                  .Attr<int64_t>("sliding_window")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<float>("eps")
                                  .Attr<float>("norm_offset")
                                  .Attr<ffi::Span<const int64_t>>("widths"));

}  // namespace quire
