// Compiled once per instruction set level; see cpu/foreach_isa.h and the description in cpu/depthwise.h.
#include "cpu/vec.h"
// (blocks.h uses the vectors above)
#include "cpu/blocks.h"

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// N pixels of a stride-1 depthwise convolution: all N accumulators and the N + K - 1 inputs of a row in registers, so
// that a filter tap is loaded once per N results.
template <Activation kAct, bool kEdge, int K, int N, class A>
FASTPOSE_INLINE void dw_tile(const Row<A>* rows, int64_t w, int64_t width, const A* filters, Vec<A> bias, A* dst,
                             int64_t pixel) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) sum[i] = bias;
#pragma GCC unroll 8
  for (int kh = 0; kh < K; ++kh) {
    Vec<A> x[N + K - 1];
#pragma GCC unroll 16
    for (int i = 0; i < N + K - 1; ++i) x[i] = pixel_at<kEdge>(rows[kh], w + i - K / 2, width);
#pragma GCC unroll 8
    for (int kw = 0; kw < K; ++kw) {
      const Vec<A> f = load(filters + (kh * K + kw) * L);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) sum[i] += x[i + kw] * f;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(dst + (w + i) * pixel, activate<kAct, A>(sum[i]));
}

// One output row from the K input rows around it; dst has `pixel` elements between neighbours.
template <Activation kAct, int K, class A>
void dw_row(const Row<A>* rows, const A* filters, Vec<A> bias, A* dst, int64_t pixel, int64_t width) {
  constexpr int N = FASTPOSE_VECTOR_BYTES == 64 ? 8 : 4;  // AVX-512 has 32 registers, the others 16
  int64_t w = 0;
  for (; w + N <= width; w += N) {
    if (w < K / 2 || w + N + K / 2 > width) {
      dw_tile<kAct, true, K, N, A>(rows, w, width, filters, bias, dst, pixel);
    } else {
      dw_tile<kAct, false, K, N, A>(rows, w, width, filters, bias, dst, pixel);
    }
  }
  if (N > 4 && w + 4 <= width) {
    dw_tile<kAct, true, K, 4, A>(rows, w, width, filters, bias, dst, pixel);
    w += 4;
  }
  for (; w + 2 <= width; w += 2) dw_tile<kAct, true, K, 2, A>(rows, w, width, filters, bias, dst, pixel);
  if (w < width) dw_tile<kAct, true, K, 1, A>(rows, w, width, filters, bias, dst, pixel);
}

// The same for a kernel size and an activation known at run time only.
template <class A>
using DwRow = void (*)(const Row<A>* rows, const A* filters, Vec<A> bias, A* dst, int64_t pixel, int64_t width);
template <Activation kAct, class A>
DwRow<A> dw_row_of(int64_t k) {
  switch (k) {
    case 1: return dw_row<kAct, 1, A>;
    case 3: return dw_row<kAct, 3, A>;
    case 5: return dw_row<kAct, 5, A>;
    default: return dw_row<kAct, 7, A>;
  }
}
template <class A>
DwRow<A> dw_row_of(int64_t k, Activation act) {
  switch (act) {
    case Activation::kRelu: return dw_row_of<Activation::kRelu, A>(k);
    case Activation::kHardswish: return dw_row_of<Activation::kHardswish, A>(k);
    case Activation::kSilu: return dw_row_of<Activation::kSilu, A>(k);
    default: return dw_row_of<Activation::kNone, A>(k);
  }
}

// The primary half: one row of one channel block from x to y, bit for bit.
template <class T>
void copy_row(const T* from, int64_t from_c, int64_t from_w, T* to, int64_t to_c, int64_t to_w, int64_t channels,
              int64_t width) {
  if (from_c == 1 && to_c == 1) {
    constexpr int64_t kBlock = kLanes<typename Compute<T>::type>;
    if (channels == kBlock) {  // a fixed size becomes one vector move
      for (int64_t w = 0; w < width; ++w) std::memcpy(to + w * to_w, from + w * from_w, kBlock * sizeof(T));
    } else {
      for (int64_t w = 0; w < width; ++w) {
        std::memcpy(to + w * to_w, from + w * from_w, static_cast<size_t>(channels) * sizeof(T));
      }
    }
  } else if (from_w == 1 && to_w == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      std::memcpy(to + c * to_c, from + c * from_c, static_cast<size_t>(width) * sizeof(T));
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t w = 0; w < width; ++w) to[c * to_c + w * to_w] = from[c * from_c + w * from_w];
    }
  }
}

template <class T>
void ghost_cheap_task(const GhostCheap& a, int64_t task) {
  using A = typename Compute<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t blocks = ceil_div(a.channels, L), bands = ceil_div(a.height, a.band);
  const int64_t n = task / (blocks * bands), block = task / bands % blocks;
  const int64_t first = task % bands * a.band, last = std::min(a.height, first + a.band);
  const int64_t c = block * L, channels = std::min<int64_t>(L, a.channels - c), pad = a.k / 2;

  const RowReader<T, A> x(a.x, n, c, channels, a.height, a.width, first - pad, last + pad, 0);
  A* filters = scratch<A>(1, a.k * a.k * L);
  A* result = scratch<A>(2, a.width * L);
  const DwRow<A> convolve = dw_row_of<A>(a.k, a.act);
  for (int64_t h = first; h < last; ++h) {
    copy_row(a.x.at<const T>(n, c, h), a.x.c, a.x.w, a.y.at<T>(n, c, h), a.y.c, a.y.w, channels, a.width);
  }
  for (int64_t m = 0; m < a.multiplier; ++m) {
    const int64_t filter = c * a.multiplier + m;  // output channel of lane 0; lanes are `multiplier` apart
    gather_filters<T, A>(a.weight, filter, a.multiplier, channels, a.k, false, filters);
    const Vec<A> bias = gather_bias<T, A>(static_cast<const T*>(a.bias), filter, a.multiplier, channels);
    const int64_t step = a.y.c * a.multiplier;
    const bool direct = std::is_same<T, A>::value && step == 1 && channels == L;
    for (int64_t h = first; h < last; ++h) {
      T* y = a.y.at<T>(n, a.channels + filter, h);
      A* dst = direct ? reinterpret_cast<A*>(y) : result;
      Row<A> rows[7];
      for (int64_t i = 0; i < a.k; ++i) rows[i] = x(h + i - pad);
      convolve(rows, filters, bias, dst, direct ? a.y.w : L, a.width);
      if (!direct) scatter_row<T, A>(result, y, step, a.y.w, channels, a.width);
    }
  }
}

// Rows of a block padded by `pad` columns, from the one at src on.
template <class A>
void padded_rows(const A* src, int64_t row, int64_t pad, int64_t count, Row<A>* rows) {
  for (int64_t i = 0; i < count; ++i) rows[i] = {src + i * row + pad * kLanes<A>, kLanes<A>};
}

// One image and channel block of the gradients. The filters' and biases' go to partial[n][block][m][k * k + 1][lane].
template <class T>
void ghost_cheap_backward_task(const GhostCheap& a, int64_t task) {
  using A = typename Compute<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t blocks = ceil_div(a.channels, L), n = task / blocks, block = task % blocks;
  const int64_t c = block * L, channels = std::min<int64_t>(L, a.channels - c), pad = a.k / 2, taps = a.k * a.k;
  const int64_t columns = a.width + 2 * pad, row = columns * L;

  A* x = scratch<A>(0, (a.height + 2 * pad) * row);
  A* filters = scratch<A>(1, 2 * taps * L);
  A* flipped = filters + taps * L;
  A* line = scratch<A>(2, a.width * L);
  A* dz = scratch<A>(3, (a.height + 2 * pad) * row);  // gradient before the activation, padded
  A* dx = scratch<A>(4, a.height * a.width * L);
  const DwRow<A> convolve = dw_row_of<A>(a.k, Activation::kNone);
  Row<A> rows[7];
  gather_block<T, A>(a.x, n, c, channels, a.height, a.width, -pad, a.height + pad, pad, pad, x);
  gather_block<T, A>(a.grad, n, c, channels, a.height, a.width, 0, a.height, 0, 0, dx);
  for (int64_t m = 0; m < a.multiplier; ++m) {
    const int64_t filter = c * a.multiplier + m;
    gather_filters<T, A>(a.weight, filter, a.multiplier, channels, a.k, false, filters);
    gather_filters<T, A>(a.weight, filter, a.multiplier, channels, a.k, true, flipped);
    const Vec<A> bias = gather_bias<T, A>(static_cast<const T*>(a.bias), filter, a.multiplier, channels);
    Vec<A> bias_sum{};
    zero(dz, pad * columns);
    zero(dz + (a.height + pad) * row, pad * columns);
    for (int64_t h = 0; h < a.height; ++h) {
      A* to = dz + (h + pad) * row;
      zero(to, pad);
      zero(to + (pad + a.width) * L, pad);
      to += pad * L;
      gather_row<T, A>(a.grad.at<const T>(n, a.channels + filter, h), a.grad.c * a.multiplier, a.grad.w, channels,
                       a.width, to);
      if (a.act != Activation::kNone) {
        padded_rows(x + h * row, row, pad, a.k, rows);
        convolve(rows, filters, bias, line, L, a.width);
        for (int64_t w = 0; w < a.width; ++w) {
          store(to + w * L, load(to + w * L) * activation_slope<A>(load(line + w * L), a.act));
        }
      }
      for (int64_t w = 0; w < a.width; ++w) bias_sum += load(to + w * L);
    }
    for (int64_t h = 0; h < a.height; ++h) {
      padded_rows(dz + h * row, row, pad, a.k, rows);
      convolve(rows, flipped, Vec<A>{}, line, L, a.width);
      A* to = dx + h * a.width * L;
      for (int64_t w = 0; w < a.width; ++w) store(to + w * L, load(to + w * L) + load(line + w * L));
    }
    A* partial = static_cast<A*>(a.partial) + ((n * blocks + block) * a.multiplier + m) * (taps + 1) * L;
    filter_gradient<A>(dz + pad * row + pad * L, row, x, row, a.height, a.width, a.k, 1, partial);
    store(partial + taps * L, bias_sum);
  }
  for (int64_t h = 0; h < a.height; ++h) {
    scatter_row<T, A>(dx + h * a.width * L, a.y.at<T>(n, c, h), a.y.c, a.y.w, channels, a.width);
  }
}

template <class T>
void ghost_cheap_reduce(const GhostCheap& a, T* grad_weight, T* grad_bias) {
  using A = typename Compute<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t blocks = ceil_div(a.channels, L), taps = a.k * a.k;
  const int64_t image = blocks * a.multiplier * (taps + 1) * L;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t c = block * L, channels = std::min<int64_t>(L, a.channels - c);
    for (int64_t m = 0; m < a.multiplier; ++m) {
      const A* partial = static_cast<const A*>(a.partial) + (block * a.multiplier + m) * (taps + 1) * L;
      const int64_t filter = c * a.multiplier + m;
      reduce_partials<T, A>(partial, a.batch, image, taps, channels, grad_weight, filter, a.multiplier);
      reduce_partials<T, A>(partial + taps * L, a.batch, image, 1, channels, grad_bias, filter, a.multiplier);
    }
  }
}

}  // namespace

// What the host code may call at this level.
template <class T>
struct GhostCheapLevel {
  static void task(const GhostCheap& a, int64_t i) { ghost_cheap_task<T>(a, i); }
  static void backward_task(const GhostCheap& a, int64_t i) { ghost_cheap_backward_task<T>(a, i); }
  static void reduce(const GhostCheap& a, T* weight, T* bias) { ghost_cheap_reduce<T>(a, weight, bias); }
};

}  // namespace FASTPOSE_ISA
}  // namespace fastpose
