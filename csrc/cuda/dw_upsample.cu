// act(depthwise transposed convolution(x, weight) + bias). Kernel 4, stride 2, padding 1 has kernels of its own; they
// write four times what they read, so all they have to do is to keep the stores wide and the loads in the cache.
#include <tuple>

#include "checks.h"
#include "cuda/depthwise.h"

namespace fastpose {
namespace {

// With oy = 2 h - 1 + kh, output row 2h takes taps 3 and 1 of input rows h - 1 and h, output row 2h + 1 taps 2 and 0 of
// rows h and h + 1; columns likewise. Entry r: input row h - 1 + row[r], output row 2h + out[r], filter row tap[r].
struct Phases {
  int row[4] = {0, 1, 1, 2}, out[4] = {0, 0, 1, 1}, tap[4] = {3, 1, 2, 0};
};

// Contiguous: 2N neighbouring outputs of rows 2h and 2h + 1, from N input pixels and one on each side.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) upsample_rows(Depthwise a) {
  using A = typename Compute<T>::type;
  constexpr int V = 2 * N;
  const Place p = place_in_rows<N>(a);
  if (p.n >= a.batch) return;
  A filter[16];
  constexpr int kWide = kWidest<T>;
  const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(p.c) * 16;
#pragma unroll
  for (int tap = 0; tap < 16; tap += kWide) {
    const Pack<T, kWide> taps = load_values<kWide>(weight + tap, 1, a.aligned_weight);
#pragma unroll
    for (int j = 0; j < kWide; ++j) filter[tap + j] = static_cast<A>(taps.v[j]);
  }
  A x[3][N + 2];
  load_rows<T, N>(a, p, x);
  A y[2][V];
  const A bias = bias_of<T>(a, p.c);
#pragma unroll
  for (int j = 0; j < V; ++j) y[0][j] = y[1][j] = bias;
  constexpr Phases kPhases;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const A* in = x[kPhases.row[r]];
    const A* f = filter + 4 * kPhases.tap[r];
    A* out = y[kPhases.out[r]];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out[2 * j] += in[j] * f[3] + in[j + 1] * f[1];
      out[2 * j + 1] += in[j + 1] * f[2] + in[j + 2] * f[0];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    Pack<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.v[j] = static_cast<T>(activate(y[r][j], a.act));
    store(a.y.at<T>(p.n, p.c, 2 * p.h + r, 2 * p.w), out);
  }
}

// Channels-last: V neighbouring channels of 2 x 4 outputs, from two input pixels and the ring around them.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) upsample_pixels(Depthwise a, int vectors) {
  using A = typename Compute<T>::type;
  const PixelWalk<T, V, 16> walk(a, vectors);
  if (!walk.active) return;
  A bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = bias_of<T>(a, walk.c + v);

  for (int64_t i = walk.begin; i < walk.count; i += walk.step) {
    const auto [n, c, h, w] = walk.at(a, i);
    A y[2][4][V];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int v = 0; v < V; ++v) y[0][j][v] = y[1][j][v] = bias[v];
    }
    constexpr Phases kPhases;
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      if (h + r - 1 < 0 || h + r - 1 >= a.height) continue;
      Pack<T, V> x[4];
      load_ring(a, {n, c, h + r - 1, w}, x);
#pragma unroll
      for (int phase = 0; phase < 4; ++phase) {
        if (kPhases.row[phase] != r) continue;
        const T* f = walk.filters + 4 * kPhases.tap[phase] * walk.chunk;
        A(*out)[V] = y[kPhases.out[phase]];
        // columns 2w ... 2w + 3 take filter columns 3, 1 | 2, 0 | 3, 1 | 2, 0 of the pixels from w - 1, w, w, w + 1 on
#pragma unroll
        for (int kw = 0; kw < 4; ++kw) {
          const Pack<T, V> tap = load<V>(f + kw * walk.chunk);
          const int from = kw == 3 ? 0 : kw == 0 ? 2 : 1, to = kw % 2 == 0 ? 1 : 0;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            out[to][v] += static_cast<A>(x[from].v[v]) * static_cast<A>(tap.v[v]);
            out[to + 2][v] += static_cast<A>(x[from + 1].v[v]) * static_cast<A>(tap.v[v]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= 2 && w + 1 >= a.width) break;
        Pack<T, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) out.v[v] = static_cast<T>(activate(y[r][j][v], a.act));
        store(a.y.at<T>(n, c, 2 * h + r, 2 * w + j), out);
      }
    }
  }
}

Depthwise arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    std::string_view activation, std::pair<int64_t, int64_t> out, int64_t stride, int64_t padding) {
  constexpr const char* op = "dw_upsample";
  Depthwise a = depthwise_arguments(op, x, weight, bias, parse_activation(op, activation), out);
  a.stride = narrow(op, "stride", stride);
  a.padding = narrow(op, "padding", padding);
  return a;
}

Tensor dw_upsample(const Tensor& x, const Tensor& weight_, const std::optional<Tensor>& bias_, StringHandle activation,
                   int64_t stride, int64_t padding, int64_t output_padding) {
  const String name(activation);
  const auto out = check_dw_upsample(x, weight_, bias_, stride, padding, output_padding);
  const DeviceScope device(x);
  const Tensor weight = *dense(weight_);
  const std::optional<Tensor> bias = dense(bias_);
  Depthwise a = arguments(x, weight, bias, name.view(), out, stride, padding);
  Tensor y = empty({a.batch, a.channels, a.out_height, a.out_width}, a.channels_last, x);
  if (y.numel() == 0) return y;
  a.y = View(y);
  const bool fast = a.k == 4 && stride == 2 && padding == 1 && output_padding == 0;
  dispatch("dw_upsample", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    constexpr int kWide = kWidest<T>;
    if (!fast) {
      launch_depthwise_any<T>(device, "dw_upsample", a);
    } else if (!a.channels_last) {
      a.aligned_weight = aligned(a.weight, 16);
      widest_dividing<kWide / 2>(a.width, [&](auto n) {
        constexpr int N = decltype(n)::value;
        launch_rows<T, N>(device, "dw_upsample", upsample_rows<T, N>, a);
      });
    } else if (a.channels % kWide == 0 && aligned(a.x.data, 16)) {
      launch_pixels<T, kWide>(device, "dw_upsample", upsample_pixels<T, kWide>, a);
    } else {
      launch_pixels<T, 1>(device, "dw_upsample", upsample_pixels<T, 1>, a);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dw_upsample_backward(const Tensor& grad, const Tensor& x, const Tensor& weight_,
                                                        const std::optional<Tensor>& bias_, StringHandle activation,
                                                        int64_t stride, int64_t padding, int64_t output_padding) {
  const String name(activation);
  const auto out = check_dw_upsample(x, weight_, bias_, stride, padding, output_padding);
  check_gradient("dw_upsample_backward", grad, x, x.size(1), out.first, out.second);
  const DeviceScope device(x);
  const Tensor weight = *dense(weight_);
  const std::optional<Tensor> bias = dense(bias_);
  Depthwise a = arguments(x, weight, bias, name.view(), out, stride, padding);
  Tensor dx = empty({a.batch, a.channels, a.height, a.width}, a.channels_last, x);
  Tensor dweight = empty({a.channels, 1, a.k, a.k}, false, x), dbias = empty({a.channels}, false, x);
  const bool fast = a.k == 4 && dx.numel() > 0;
  dispatch("dw_upsample_backward", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Tensor dz = gradient_before_activation<T>(device, "dw_upsample_backward", a, grad, View(grad), x);
    a.y = View(dx);
    launch_gradient<T>(device, "dw_upsample_backward", a, View(), fast, x, dweight, dbias,
                       [&](const DepthwiseGradient& g, int64_t slices) {
                         if (fast) return launch_gradient_of_size<T, 4>(device, "dw_upsample_backward", g, slices);
                         launch_gradient_of_size<T, 0>(device, "dw_upsample_backward", g, slices);
                       });
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpose, FASTPOSE_CUDA_KEY, m) {
  m.impl("dw_upsample", TORCH_BOX(&dw_upsample));
  m.impl("dw_upsample_backward", TORCH_BOX(&dw_upsample_backward));
}

}  // namespace fastpose
