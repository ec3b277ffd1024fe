// One decoder layer in one call: norms, projections, rotation, cache write, attention, gated MLP and the sums between them.
//
// What is fused saves two things: hundreds of small programs a step between the products, and the waking of threads for each. The
// pieces are those of quire.models.decoder, with the same roundings.
//
// T tokens of the step, D hidden size, N query heads, K key/value heads, H head_dim, F MLP width, R rotated dimensions.
#include "handler.h"
#include "parallel.h"
#include "product.h"
#include "row_ops.h"
#include "../paged_attention/cpu.h"

namespace quire {
namespace {

constexpr int kMaxRectangles = 4;

struct LayerSpec {
  Format format;  // of the matrices
  Activation activation;
  AttentionShape attention;
  float eps, norm_offset;
  bool has_qkv_bias, has_o_bias, has_mlp_bias, has_qk_norm, has_post_norms;
  size_t num_tokens, hidden, mlp, half_rotary;
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
  Matrix q, k, v, o, gate, up, down;
  const T *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
};

template <class T>
class Layer {
 public:
  Layer(const LayerSpec& spec, const LayerArguments<T>& args, const Cache<T>& cache, T* out, Team& team)
      : spec_(spec), args_(args), cache_(cache), out_(out), team_(team), num_tokens_(spec.num_tokens) {
    q_width_ = static_cast<size_t>(spec.attention.num_heads) * spec.attention.head_dim;
    kv_width_ = static_cast<size_t>(spec.attention.num_kv_heads) * spec.attention.head_dim;
    qkv_stride_ = q_width_ + 2 * kv_width_;
    reserve();
  }

  void run() {
    for_tokens(team_, num_tokens_, [&](size_t first, size_t end) {
      for (size_t t = first; t < end; ++t) norm_to_rows(args_.x + t * spec_.hidden, args_.input_norm, t, spec_.hidden);
    });
    project_qkv();
    attend();
    to_rows(attended_, q_width_);
    project_to_hidden(args_.o, args_.o_bias);
    for_tokens(team_, num_tokens_, [&](size_t first, size_t end) {
      for (size_t t = first; t < end; ++t) {
        add_to_residual(args_.x + t * spec_.hidden, args_.post_attention_norm, t);
        norm_to_rows(out_ + t * spec_.hidden, args_.pre_mlp_norm, t, spec_.hidden);
      }
    });
    gate_and_up();
    to_rows(activated_, spec_.mlp);
    project_to_hidden(args_.down, args_.down_bias);
    for_tokens(team_, num_tokens_, [&](size_t first, size_t end) {
      for (size_t t = first; t < end; ++t) add_to_residual(out_ + t * spec_.hidden, args_.post_mlp_norm, t);
    });
  }

 private:
  // Memory of the calling thread for what passes between the loops; helpers are handed pointers into it.
  void reserve() {
    const size_t widest = std::max({spec_.hidden, q_width_, spec_.mlp});
    const size_t row_bytes = num_words(spec_.format, widest) * sizeof(uint32_t);
    const size_t sizes[] = {num_tokens_ * row_bytes, num_tokens_ * sizeof(float), num_tokens_ * qkv_stride_ * sizeof(T),
                            num_tokens_ * q_width_ * sizeof(T), num_tokens_ * spec_.mlp * sizeof(T), num_tokens_ * spec_.hidden * sizeof(T)};
    size_t starts[7] = {0};
    for (int i = 0; i < 6; ++i) starts[i + 1] = starts[i] + (sizes[i] + 127) / 64 * 64;
    char* base = static_cast<char*>(scratch<2>(starts[6]));
    rows_ = {reinterpret_cast<uint32_t*>(base), reinterpret_cast<float*>(base + starts[1])};
    qkv_ = reinterpret_cast<T*>(base + starts[2]);
    attended_ = reinterpret_cast<T*>(base + starts[3]);
    activated_ = reinterpret_cast<T*>(base + starts[4]);
    hidden_ = reinterpret_cast<T*>(base + starts[5]);
  }

  void put_row(const T* x, size_t width, size_t t) {
    row_to_words(x, width, spec_.format, rows_.words + t * num_words(spec_.format, width), rows_.scales + t);
  }

  void norm_to_rows(const T* x, const T* weight, size_t t, size_t width) {
    T* normed = static_cast<T*>(scratch<3>(width * sizeof(T)));
    rms_norm(x, weight, width, spec_.eps, spec_.norm_offset, normed);
    put_row(normed, width, t);
  }

  void to_rows(const T* x, size_t width) {
    for_tokens(team_, num_tokens_, [&](size_t first, size_t end) {
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
        write_token(cache_, k, v, args_.blocks[t], args_.offsets[t]);
      }
    });
  }

  void prepare_heads(T* heads, int num_heads, const T* norm, size_t t) {
    const size_t head_dim = spec_.attention.head_dim;
    for (int head = 0; head < num_heads; ++head) {
      T* x = heads + head * head_dim;
      if (norm != nullptr) rms_norm(x, norm, head_dim, spec_.eps, spec_.norm_offset, x);
      rotate(x, args_.cos + t * spec_.half_rotary, args_.sin + t * spec_.half_rotary, spec_.half_rotary);
    }
  }

  void attend() {
    const Attention<T> attention(spec_.attention, cache_, qkv_, qkv_stride_, attended_, q_width_);
    attend_rectangles(team_, attention, args_.rectangles, args_.num_rectangles, spec_.attention.num_kv_heads);
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
    add_row(residual, hidden, spec_.hidden, out_ + t * spec_.hidden);
  }

  // activated = act(rows x gate) * (rows x up): a thread computes the same panel of both, so neither is kept.
  void gate_and_up() {
    const size_t row_words = args_.gate.row_words();
    team_.for_each(static_cast<int>(num_panels(spec_.mlp)), [&](int panel) {
      float* gate = static_cast<float*>(scratch<1>(2 * kRowBlock * kPanel * sizeof(float)));
      float* up = gate + kRowBlock * kPanel;
      const size_t column = static_cast<size_t>(panel) * kPanel, width = std::min<size_t>(kPanel, spec_.mlp - column);
      alignas(64) float gate_bias[kPanel] = {}, up_bias[kPanel] = {};
      for (size_t c = 0; spec_.has_mlp_bias && c < width; ++c) {
        gate_bias[c] = as_float(args_.gate_bias[column + c]);
        up_bias[c] = as_float(args_.up_bias[column + c]);
      }
      for (size_t first = 0; first < num_tokens_; first += kRowBlock) {
        const size_t count = std::min(kRowBlock, num_tokens_ - first);
        const Rows rows = from_row(rows_, first, row_words);
        times_panel(rows, count, args_.gate, panel, gate);
        times_panel(rows, count, args_.up, panel, up);
        for (size_t r = 0; r < count; ++r) {
          for (int c = 0; c < kPanel; c += kLanes) {
            const Floats g = rounded_lanes<T>(add(load(gate + r * kPanel + c), load(gate_bias + c)));
            const Floats u = rounded_lanes<T>(add(load(up + r * kPanel + c), load(up_bias + c)));
            store(gate + r * kPanel + c, mul(rounded_lanes<T>(activate(g, spec_.activation)), u));
          }
        }
        store_panel<T>(gate, count, width, nullptr, activated_ + first * spec_.mlp + column, spec_.mlp);
      }
    });
  }

  const LayerSpec& spec_;
  const LayerArguments<T>& args_;
  Cache<T> cache_;
  T* out_;
  Team& team_;
  size_t num_tokens_, q_width_, kv_width_, qkv_stride_;
  Rows rows_;
  T *qkv_, *attended_, *activated_, *hidden_;
};

template <class T>
LayerArguments<T> read(Arguments& from, const LayerSpec& spec, const int64_t* widths, int num_rectangles) {
  LayerArguments<T> args{};
  args.cos = from.data<const float>();
  args.sin = from.data<const float>();
  args.blocks = from.data<const int32_t>();
  args.offsets = from.data<const int32_t>();
  args.num_rectangles = num_rectangles;
  size_t first_token = 0;
  for (int i = 0; i < num_rectangles; ++i) {
    Rectangle& r = args.rectangles[i];
    const ffi::AnyBuffer tables = from.next();
    r.tables = static_cast<const int32_t*>(tables.untyped_data());
    r.num_rows = static_cast<int>(tables.dimensions()[0]);
    r.max_blocks = static_cast<int>(tables.dimensions()[1]);
    r.width = static_cast<int>(widths[i]);
    r.seq_lens = from.data<const int32_t>();
    r.query_lens = from.data<const int32_t>();
    r.first_token = first_token;
    first_token += static_cast<size_t>(r.num_rows) * r.width;
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
  args.gate = from.matrix(spec.format, spec.hidden, spec.mlp);
  args.up = from.matrix(spec.format, spec.hidden, spec.mlp);
  args.down = from.matrix(spec.format, spec.mlp, spec.hidden);
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

enum Flags : int64_t { kQkvBias = 1, kOBias = 2, kMlpBias = 4, kQkNorm = 8, kPostNorms = 16 };

ffi::Error decoder_layer(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer, ffi::RemainingArgs buffers,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> cache, int64_t format, int64_t activation,
                         int64_t flags, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t mlp, int64_t half_rotary,
                         int64_t sliding_window, float scale, float soft_cap, float eps, float norm_offset,
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
  spec.num_tokens = x.dimensions()[0];
  spec.hidden = x.dimensions()[1];
  spec.mlp = mlp;
  spec.half_rotary = half_rotary;
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
                                  .Attr<int64_t>("sliding_window")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<float>("eps")
                                  .Attr<float>("norm_offset")
                                  .Attr<ffi::Span<const int64_t>>("widths"));

}  // namespace quire
