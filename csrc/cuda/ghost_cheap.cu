// y[:, :C] = x and y[:, C:] = act(depthwise(x, weight) + bias): both halves of a Ghost module in one pass. Kernel 3 has
// kernels of its own: x is read once, as a neighbour from the cache, and written from the registers it is in.
#include <tuple>

#include "checks.h"
#include "cuda/depthwise.h"

namespace fastpose {
namespace {

// Contiguous: V neighbours of a row, of the copy and of every filter of the channel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) ghost_rows(Depthwise a) {
  using A = typename Compute<T>::type;
  const Place p = place_in_rows<V>(a);
  if (p.n >= a.batch) return;
  A x[3][V + 2];
  store(a.copy.at<T>(p.n, p.c, p.h, p.w), load_rows<T, V>(a, p, x));
  for (int filter = p.c * a.multiplier; filter < (p.c + 1) * a.multiplier; ++filter) {
    const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(filter) * 9;
    const A bias = bias_of<T>(a, filter);
    A y[V];
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = bias;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const A f = static_cast<A>(weight[tap]);
#pragma unroll
      for (int j = 0; j < V; ++j) y[j] += x[tap / 3][j + tap % 3] * f;
    }
    Pack<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.v[j] = static_cast<T>(activate(y[j], a.act));
    store(a.y.at<T>(p.n, filter, p.h, p.w), out);
  }
}

// Channels-last, one filter per channel: V neighbouring channels of two pixels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) ghost_pixels(Depthwise a, int vectors) {
  using A = typename Compute<T>::type;
  const PixelWalk<T, V, 9> walk(a, vectors);
  if (!walk.active) return;
  A bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = bias_of<T>(a, walk.c + v);

  for (int64_t i = walk.begin; i < walk.count; i += walk.step) {
    const auto [n, c, h, w] = walk.at(a, i);
    A y[2][V];
#pragma unroll
    for (int v = 0; v < V; ++v) y[0][v] = y[1][v] = bias[v];
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      if (h + r - 1 < 0 || h + r - 1 >= a.height) continue;
      Pack<T, V> x[4];
      load_ring(a, {n, c, h + r - 1, w}, x);
      if (r == 1) {
        store(a.copy.at<T>(n, c, h, w), x[1]);
        if (w + 1 < a.width) store(a.copy.at<T>(n, c, h, w + 1), x[2]);
      }
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
        const Pack<T, V> tap = load<V>(walk.filters + (3 * r + kw) * walk.chunk);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          y[0][v] += static_cast<A>(x[kw].v[v]) * static_cast<A>(tap.v[v]);
          y[1][v] += static_cast<A>(x[kw + 1].v[v]) * static_cast<A>(tap.v[v]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (w + j >= a.width) break;
      Pack<T, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) out.v[v] = static_cast<T>(activate(y[j][v], a.act));
      store(a.y.at<T>(n, c, h, w + j), out);
    }
  }
}

Depthwise arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    std::string_view activation) {
  constexpr const char* op = "ghost_cheap";
  Depthwise a = depthwise_arguments(op, x, weight, bias, parse_activation(op, activation), {x.size(2), x.size(3)});
  a.padding = a.k / 2;
  a.flip = true;
  return a;
}

// The cheap half of a tensor of both halves.
View cheap_half(const Tensor& t, int channels) {
  View half(t);
  half.data = static_cast<char*>(half.data) + channels * half.c * static_cast<int64_t>(t.element_size());
  return half;
}

Tensor ghost_cheap(const Tensor& x, const Tensor& weight_, const std::optional<Tensor>& bias_,
                   StringHandle activation) {
  const String name(activation);
  check_ghost_cheap(x, weight_, bias_);
  const DeviceScope device(x);
  const Tensor weight = *dense(weight_);
  const std::optional<Tensor> bias = dense(bias_);
  Depthwise a = arguments(x, weight, bias, name.view());
  Tensor y = empty({a.batch, x.size(1) + weight.size(0), a.height, a.width}, a.channels_last, x);
  if (y.numel() == 0) return y;
  a.copy = View(y);
  a.y = cheap_half(y, a.channels);
  dispatch("ghost_cheap", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    constexpr int kWide = kWidest<T>;
    if (a.k != 3 || (a.channels_last && a.multiplier > 1)) {
      launch_depthwise_any<T>(device, "ghost_cheap", a);
    } else if (!a.channels_last) {
      widest_dividing<kWide>(a.width, [&](auto n) {
        constexpr int V = decltype(n)::value;
        launch_rows<T, V>(device, "ghost_cheap", ghost_rows<T, V>, a);
      });
    } else if (a.channels % kWide == 0 && aligned(a.x.data, 16)) {
      launch_pixels<T, kWide>(device, "ghost_cheap", ghost_pixels<T, kWide>, a);
    } else {
      launch_pixels<T, 1>(device, "ghost_cheap", ghost_pixels<T, 1>, a);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> ghost_cheap_backward(const Tensor& grad, const Tensor& x, const Tensor& weight_,
                                                        const std::optional<Tensor>& bias_, StringHandle activation) {
  constexpr const char* op = "ghost_cheap_backward";
  const String name(activation);
  check_ghost_cheap(x, weight_, bias_);
  check_gradient(op, grad, x, x.size(1) + weight_.size(0), x.size(2), x.size(3));
  const DeviceScope device(x);
  const Tensor weight = *dense(weight_);
  const std::optional<Tensor> bias = dense(bias_);
  Depthwise a = arguments(x, weight, bias, name.view());
  Tensor dx = empty({a.batch, a.channels, a.height, a.width}, a.channels_last, x);
  Tensor dweight = empty({weight.size(0), 1, a.k, a.k}, false, x), dbias = empty({weight.size(0)}, false, x);
  dispatch(op, x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Tensor dz = gradient_before_activation<T>(device, op, a, grad, cheap_half(grad, a.channels), x);
    a.y = View(dx);
    // 50 sums in double do not fit the registers
    const bool own_size = a.k < 7 || sizeof(T) < 8;
    launch_gradient<T>(device, op, a, View(grad), own_size, x, dweight, dbias,
                       [&](const DepthwiseGradient& g, int64_t slices) {
                         switch (a.k) {
                           case 1: return launch_gradient_of_size<T, 1>(device, op, g, slices);
                           case 3: return launch_gradient_of_size<T, 3>(device, op, g, slices);
                           case 5: return launch_gradient_of_size<T, 5>(device, op, g, slices);
                           default: return launch_gradient_of_size<T, sizeof(T) < 8 ? 7 : 0>(device, op, g, slices);
                         }
                       });
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpose, FASTPOSE_CUDA_KEY, m) {
  m.impl("ghost_cheap", TORCH_BOX(&ghost_cheap));
  m.impl("ghost_cheap_backward", TORCH_BOX(&ghost_cheap_backward));
}

}  // namespace fastpose
