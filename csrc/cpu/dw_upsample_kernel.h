// Compiled once per instruction set level; see cpu/foreach_isa.h and the description in cpu/depthwise.h.
#include "cpu/vec.h"
// (blocks.h uses the vectors above)
#include "cpu/blocks.h"

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// Kernel 4, stride 2, padding 1: every output pixel sees exactly 2 x 2 taps. With oy = 2 ih - 1 + kh, output row 2h
// takes taps 1 and 3 of input rows h and h - 1, output row 2h + 1 takes taps 2 and 0 of rows h and h + 1; columns
// likewise. A tile is N input pixels of row h: 2 x 2N outputs, all accumulators in registers, every input loaded once
// per row.
template <Activation kAct, bool kStream, bool kEdge, int N, class A>
FASTPOSE_INLINE void upsample_tile(const Row<A> (&rows)[3], int64_t w, int64_t width, const A* f, Vec<A> bias, A* dst0,
                                   A* dst1, int64_t pixel) {
  constexpr int L = kLanes<A>;
  Vec<A> y[2][2 * N];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * N; ++i) y[0][i] = y[1][i] = bias;
  // {input row h - 1 + ..., output row, filter row}
  constexpr int kRows[4][3] = {{0, 0, 3}, {1, 0, 1}, {1, 1, 2}, {2, 1, 0}};
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const Row<A>& row = rows[kRows[r][0]];
    const A* taps = f + kRows[r][2] * 4 * L;
    Vec<A>* out = y[kRows[r][1]];
    Vec<A> x[N + 2];
    x[0] = pixel_at<kEdge>(row, w - 1, width);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) x[i + 1] = pixel_at<false>(row, w + i, width);
    x[N + 1] = pixel_at<kEdge>(row, w + N, width);
    const Vec<A> f0 = load(taps), f1 = load(taps + L), f2 = load(taps + 2 * L), f3 = load(taps + 3 * L);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      out[2 * i] += x[i] * f3;
      out[2 * i] += x[i + 1] * f1;
      out[2 * i + 1] += x[i + 1] * f2;
      out[2 * i + 1] += x[i + 2] * f0;
    }
  }
  dst0 += 2 * w * pixel;
  dst1 += 2 * w * pixel;
#pragma GCC unroll 16
  for (int i = 0; i < 2 * N; ++i) {
    const Vec<A> y0 = activate<kAct, A>(y[0][i]), y1 = activate<kAct, A>(y[1][i]);
    if (kStream) {
      stream(dst0 + i * pixel, y0);
      stream(dst1 + i * pixel, y1);
    } else {
      store(dst0 + i * pixel, y0);
      store(dst1 + i * pixel, y1);
    }
  }
}

// Output rows 2h and 2h + 1 from input rows h - 1, h, h + 1.
template <Activation kAct, bool kStream, class A>
void upsample_rows(const Row<A> (&rows)[3], const A* filters, Vec<A> bias, A* dst0, A* dst1, int64_t pixel,
                   int64_t width) {
  constexpr int N = FASTPOSE_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t w = 0;
  for (; w + N <= width; w += N) {
    if (w == 0 || w + N == width) {
      upsample_tile<kAct, kStream, true, N, A>(rows, w, width, filters, bias, dst0, dst1, pixel);
    } else {
      upsample_tile<kAct, kStream, false, N, A>(rows, w, width, filters, bias, dst0, dst1, pixel);
    }
  }
  for (; w < width; ++w) upsample_tile<kAct, kStream, true, 1, A>(rows, w, width, filters, bias, dst0, dst1, pixel);
}

template <Activation kAct, class A>
void finish_line(A* row, Vec<A> bias, int64_t width) {
  for (int64_t w = 0; w < width; ++w) store(row + w * kLanes<A>, activate<kAct, A>(load(row + w * kLanes<A>) + bias));
}

// Any kernel, stride and padding: one output row before bias and activation, scattered into `line`, which starts at
// output column -padding. x holds the input rows from `first_row` on, without padding.
template <class A>
void upsample_line(const DwUpsample& a, const A* x, int64_t first_row, const A* filters, int64_t oy, A* line) {
  constexpr int L = kLanes<A>;
  zero(line, a.line);
  for (int64_t kh = 0; kh < a.k; ++kh) {
    const int64_t scaled = oy + a.padding - kh;
    if (scaled < 0 || scaled % a.stride != 0 || scaled / a.stride >= a.height) continue;
    const A* p = x + (scaled / a.stride - first_row) * a.width * L;
    for (int64_t w = 0; w < a.width; ++w) {
      const Vec<A> v = load(p + w * L);
      A* to = line + w * a.stride * L;
      for (int64_t kw = 0; kw < a.k; ++kw) {
        store(to + kw * L, load(to + kw * L) + v * load(filters + (kh * a.k + kw) * L));
      }
    }
  }
}

// Kernel 4, stride 2, padding 1: input rows [first, last) of one image and channel block.
template <Activation kAct, class T>
void upsample_band(const DwUpsample& a, int64_t n, int64_t block, int64_t first, int64_t last) {
  using A = typename Compute<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t c = block * L, channels = std::min<int64_t>(L, a.channels - c);
  const RowReader<T, A> x(a.x, n, c, channels, a.height, a.width, first - 1, last + 1, 0);
  A* filters = scratch<A>(1, 16 * L);
  gather_filters<T, A>(a.weight, c, 1, channels, 4, false, filters);
  const Vec<A> bias = gather_bias<T, A>(static_cast<const T*>(a.bias), c, 1, channels);
  const bool direct = std::is_same<T, A>::value && a.y.c == 1 && channels == L;
  A* line0 = scratch<A>(2, 2 * a.out_width * L);
  A* line1 = line0 + a.out_width * L;
  for (int64_t h = first; h < last; ++h) {
    const Row<A> rows[3] = {x(h - 1), x(h), x(h + 1)};
    T *y0 = a.y.at<T>(n, c, 2 * h), *y1 = a.y.at<T>(n, c, 2 * h + 1);
    if (direct && a.stream) {
      upsample_rows<kAct, true, A>(rows, filters, bias, reinterpret_cast<A*>(y0), reinterpret_cast<A*>(y1), a.y.w,
                                   a.width);
    } else if (direct) {
      upsample_rows<kAct, false, A>(rows, filters, bias, reinterpret_cast<A*>(y0), reinterpret_cast<A*>(y1), a.y.w,
                                    a.width);
    } else {
      upsample_rows<kAct, false, A>(rows, filters, bias, line0, line1, L, a.width);
      scatter_row<T, A>(line0, y0, a.y.c, a.y.w, channels, a.out_width);
      scatter_row<T, A>(line1, y1, a.y.c, a.y.w, channels, a.out_width);
    }
  }
  if (a.stream) stream_fence();
}

// Any kernel, stride and padding, one channel block.
template <Activation kAct, class T>
void upsample_band_general(const DwUpsample& a, int64_t n, int64_t block, int64_t first, int64_t last) {
  using A = typename Compute<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t c = block * L, channels = std::min<int64_t>(L, a.channels - c);
  A* filters = scratch<A>(1, a.k * a.k * L);
  gather_filters<T, A>(a.weight, c, 1, channels, a.k, false, filters);
  const Vec<A> bias = gather_bias<T, A>(static_cast<const T*>(a.bias), c, 1, channels);
  // input rows that reach the band: oy + padding = ih * stride + kh with 0 <= kh < k
  const int64_t ih0 = ceil_div(std::max<int64_t>(first + a.padding - a.k + 1, 0), a.stride);
  const int64_t ih1 = std::min(a.height, (last - 1 + a.padding) / a.stride + 1);
  A* x = scratch<A>(0, std::max<int64_t>(ih1 - ih0, 1) * a.width * L);
  A* line = scratch<A>(2, a.line * L);
  if (ih1 > ih0) gather_block<T, A>(a.x, n, c, channels, a.height, a.width, ih0, ih1, 0, 0, x);
  for (int64_t oy = first; oy < last; ++oy) {
    upsample_line<A>(a, x, ih0, filters, oy, line);
    A* row = line + a.padding * L;
    finish_line<kAct, A>(row, bias, a.out_width);
    scatter_row<T, A>(row, a.y.at<T>(n, c, oy), a.y.c, a.y.w, channels, a.out_width);
  }
}

template <Activation kAct, class T>
void upsample_task(const DwUpsample& a, int64_t task) {
  const int64_t blocks = ceil_div(a.channels, kLanes<typename Compute<T>::type>);
  const int64_t rows = a.fast ? a.height : a.out_height, bands = ceil_div(rows, a.band);
  const int64_t n = task / (blocks * bands), block = task / bands % blocks;
  const int64_t first = task % bands * a.band, last = std::min(rows, first + a.band);
  if (a.fast) {
    upsample_band<kAct, T>(a, n, block, first, last);
  } else {
    upsample_band_general<kAct, T>(a, n, block, first, last);
  }
}

template <class T>
void dw_upsample_task(const DwUpsample& a, int64_t task) {
  switch (a.act) {
    case Activation::kRelu: return upsample_task<Activation::kRelu, T>(a, task);
    case Activation::kHardswish: return upsample_task<Activation::kHardswish, T>(a, task);
    case Activation::kSilu: return upsample_task<Activation::kSilu, T>(a, task);
    default: return upsample_task<Activation::kNone, T>(a, task);
  }
}

// One image and channel block of the gradients. The filters' and biases' go to partial[n][block][k * k + 1][lane].
template <class T>
void dw_upsample_backward_task(const DwUpsample& a, int64_t task) {
  using A = typename Compute<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t blocks = ceil_div(a.channels, L), n = task / blocks, block = task % blocks;
  const int64_t c = block * L, channels = std::min<int64_t>(L, a.channels - c), taps = a.k * a.k;
  // dz: gradient before the activation, with `padding` rows and columns of zeros in front, long enough for every tap
  const int64_t dz_rows = std::max((a.height - 1) * a.stride + a.k, a.padding + a.out_height);
  const int64_t row = a.line * L;

  A* x = scratch<A>(0, a.height * a.width * L);
  A* filters = scratch<A>(1, taps * L);
  A* line = scratch<A>(2, row);
  A* dz = scratch<A>(3, dz_rows * row);
  gather_block<T, A>(a.x, n, c, channels, a.height, a.width, 0, a.height, 0, 0, x);
  gather_filters<T, A>(a.weight, c, 1, channels, a.k, false, filters);
  const Vec<A> bias = gather_bias<T, A>(static_cast<const T*>(a.bias), c, 1, channels);
  Vec<A> bias_sum{};
  for (int64_t i = 0; i < dz_rows; ++i) {
    A* to = dz + i * row;
    const int64_t oy = i - a.padding;
    if (oy < 0 || oy >= a.out_height) {
      zero(to, a.line);
      continue;
    }
    zero(to, a.padding);
    zero(to + (a.padding + a.out_width) * L, a.line - a.padding - a.out_width);
    to += a.padding * L;
    gather_row<T, A>(a.grad.at<const T>(n, c, oy), a.grad.c, a.grad.w, channels, a.out_width, to);
    if (a.act != Activation::kNone) {
      upsample_line<A>(a, x, 0, filters, oy, line);
      const A* z = line + a.padding * L;
      for (int64_t w = 0; w < a.out_width; ++w) {
        store(to + w * L, load(to + w * L) * activation_slope<A>(load(z + w * L) + bias, a.act));
      }
    }
    for (int64_t w = 0; w < a.out_width; ++w) bias_sum += load(to + w * L);
  }
  // gradient of x: a depthwise correlation of dz with stride `stride`, four pixels at a time
  A* dx = line;
  if (a.line < a.width) dx = scratch<A>(2, a.width * L);
  for (int64_t h = 0; h < a.height; ++h) {
    const A* p = dz + h * a.stride * row;
    int64_t w = 0;
    for (; w + 4 <= a.width; w += 4) {
      Vec<A> sum[4] = {};
      for (int64_t kh = 0; kh < a.k; ++kh) {
        const A* q = p + kh * row + w * a.stride * L;
        for (int64_t kw = 0; kw < a.k; ++kw, q += L) {
          const Vec<A> f = load(filters + (kh * a.k + kw) * L);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sum[i] += f * load(q + i * a.stride * L);
        }
      }
      for (int i = 0; i < 4; ++i) store(dx + (w + i) * L, sum[i]);
    }
    for (; w < a.width; ++w) {
      Vec<A> sum{};
      for (int64_t kh = 0; kh < a.k; ++kh) {
        for (int64_t kw = 0; kw < a.k; ++kw) {
          sum += load(filters + (kh * a.k + kw) * L) * load(p + kh * row + (w * a.stride + kw) * L);
        }
      }
      store(dx + w * L, sum);
    }
    scatter_row<T, A>(dx, a.y.at<T>(n, c, h), a.y.c, a.y.w, channels, a.width);
  }
  A* partial = static_cast<A*>(a.partial) + (n * blocks + block) * (taps + 1) * L;
  filter_gradient<A>(x, a.width * L, dz, row, a.height, a.width, a.k, a.stride, partial);
  store(partial + taps * L, bias_sum);
}

template <class T>
void dw_upsample_reduce(const DwUpsample& a, T* grad_weight, T* grad_bias) {
  using A = typename Compute<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t blocks = ceil_div(a.channels, L), taps = a.k * a.k, image = blocks * (taps + 1) * L;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t c = block * L, channels = std::min<int64_t>(L, a.channels - c);
    const A* partial = static_cast<const A*>(a.partial) + block * (taps + 1) * L;
    reduce_partials<T, A>(partial, a.batch, image, taps, channels, grad_weight, c, 1);
    reduce_partials<T, A>(partial + taps * L, a.batch, image, 1, channels, grad_bias, c, 1);
  }
}

}  // namespace

// What the host code may call at this level.
template <class T>
struct DwUpsampleLevel {
  static void task(const DwUpsample& a, int64_t i) { dw_upsample_task<T>(a, i); }
  static void backward_task(const DwUpsample& a, int64_t i) { dw_upsample_backward_task<T>(a, i); }
  static void reduce(const DwUpsample& a, T* weight, T* bias) { dw_upsample_reduce<T>(a, weight, bias); }
};

}  // namespace FASTPOSE_ISA
}  // namespace fastpose
