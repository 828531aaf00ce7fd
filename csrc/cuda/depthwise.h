// Shared by dw_upsample.cu and ghost_cheap.cu: vector accesses, activations, and what needs no special case - the
// convolution of any size, one output per thread, and the gradients.
//
// Both operators are one: a transposed depthwise convolution. With stride 1 and filters turned by 180 degrees it is the
// ordinary one of a Ghost module. Offsets are 64-bit throughout; nvcc divides in 32 bits whenever the numbers fit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/runtime.h"

namespace fastpose {

constexpr int kThreads = 256;

// N values that are read or written in one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
// Values of T in 16 bytes, the widest access.
template <class T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

template <int N, class T>
__device__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ void store(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// N values that lie `step` apart; `aligned`: they are neighbours at a multiple of their joint size.
template <int N, class T>
__device__ Pack<T, N> load_values(const T* p, int64_t step, bool aligned) {
  if (aligned) return load<N>(p);
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = p[i * step];
  return pack;
}

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether rows are dense and begin at multiples of `values` values, as wide accesses need.
inline bool rows_aligned(const View& t, int64_t values, size_t bytes_per_value) {
  return t.w == 1 && t.n % values == 0 && t.c % values == 0 && t.h % values == 0 &&
         aligned(t.data, static_cast<size_t>(values) * bytes_per_value);
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// Comparisons are written so that NaN stays NaN.
template <class A>
__device__ A activate(A x, Activation act) {
  switch (act) {
    case Activation::kRelu: return x < A(0) ? A(0) : x;
    case Activation::kHardswish: {
      A gate = x + A(3);
      gate = gate < A(0) ? A(0) : gate;
      gate = gate > A(6) ? A(6) : gate;
      return x * gate * (A(1) / A(6));
    }
    case Activation::kSilu: return x / (A(1) + exponential(-x));
    default: return x;
  }
}

// Derivative of the activation at x. At the kinks it takes PyTorch's values.
template <class A>
__device__ A activation_slope(A x, Activation act) {
  switch (act) {
    case Activation::kRelu: return x > A(0) ? A(1) : A(0);
    case Activation::kHardswish: return x <= A(-3) ? A(0) : x >= A(3) ? A(1) : x * (A(1) / A(3)) + A(0.5);
    case Activation::kSilu: {
      const A s = A(1) / (A(1) + exponential(-x));
      return s * (A(1) + x * (A(1) - s));
    }
    default: return A(1);
  }
}

// y = act(transposed depthwise convolution(x, weight) + bias). Filter c * multiplier + m belongs to channel c.
struct Depthwise {
  View x, y;
  const void* weight = nullptr;  // [filters][k * k], contiguous
  const void* bias = nullptr;    // [filters] or null
  int64_t batch = 0;
  int channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int multiplier = 1, k = 1, stride = 1, padding = 0;
  bool flip = false;           // filters are turned by 180 degrees
  bool channels_last = false;  // order in which threads walk over y
  Activation act = Activation::kNone;
  View copy;               // Ghost modules: where x goes; its data is null otherwise
  View grad;               // gradient of the output; data is null in the forward pass
  bool aligned_x = false;  // the vector kernels may read x in wide accesses
  bool aligned_weight = false;
};

// Coordinates within an image are 32-bit, with room for sums.
inline int narrow(const char* op, const char* what, int64_t value) {
  FASTPOSE_CHECK(value < int64_t{1} << 29, op, ": ", what, " must be below 2^29 on CUDA, got ", value);
  return static_cast<int>(value);
}

template <class T>
__device__ typename Compute<T>::type bias_of(const Depthwise& a, int filter) {
  using A = typename Compute<T>::type;
  return a.bias ? static_cast<A>(static_cast<const T*>(a.bias)[filter]) : A(0);
}

// One output before the activation.
template <class T>
__device__ typename Compute<T>::type convolve(const Depthwise& a, int64_t n, int filter, int oy, int ox) {
  using A = typename Compute<T>::type;
  const T* x = a.x.at<const T>(n, filter / a.multiplier);
  const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(filter) * a.k * a.k;
  A sum = bias_of<T>(a, filter);
  // oy = h * stride - padding + kh, so only every stride-th kh has an input row
  for (int kh = (oy + a.padding) % a.stride; kh < a.k; kh += a.stride) {
    const int h = (oy + a.padding - kh) / a.stride;
    if (oy + a.padding < kh || h >= a.height) continue;
    for (int kw = (ox + a.padding) % a.stride; kw < a.k; kw += a.stride) {
      const int w = (ox + a.padding - kw) / a.stride;
      if (ox + a.padding < kw || w >= a.width) continue;
      const int tap = kh * a.k + kw;
      sum += static_cast<A>(x[h * a.x.h + w * a.x.w]) * static_cast<A>(weight[a.flip ? a.k * a.k - 1 - tap : tap]);
    }
  }
  return sum;
}

// Any kernel, stride, padding, layout and alignment. Forward: y = act(z). With a.grad: y = grad * act'(z), the gradient
// before the activation.
template <class T>
__global__ void __launch_bounds__(kThreads) depthwise_any(Depthwise a) {
  using A = typename Compute<T>::type;
  const int filters = a.channels * a.multiplier;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.batch * filters * a.out_height * a.out_width) return;
  int filter = 0;
  if (a.channels_last) {
    filter = static_cast<int>(i % filters);
    i /= filters;
  }
  const int ox = static_cast<int>(i % a.out_width);
  i /= a.out_width;
  const int oy = static_cast<int>(i % a.out_height);
  i /= a.out_height;
  if (!a.channels_last) {
    filter = static_cast<int>(i % filters);
    i /= filters;
  }
  const int64_t n = i;
  const A z = convolve<T>(a, n, filter, oy, ox);
  T* y = a.y.at<T>(n, filter, oy, ox);
  if (a.grad.data) {
    *y = static_cast<T>(static_cast<A>(*a.grad.at<const T>(n, filter, oy, ox)) * activation_slope(z, a.act));
    return;
  }
  *y = static_cast<T>(activate(z, a.act));
  if (a.copy.data && filter % a.multiplier == 0) {
    const int c = filter / a.multiplier;
    *a.copy.at<T>(n, c, oy, ox) = *a.x.at<const T>(n, c, oy, ox);
  }
}

// Arguments that both operators have in common; `out` is the height and width of the output.
inline Depthwise depthwise_arguments(const char* op, const Tensor& x, const Tensor& weight,
                                     const std::optional<Tensor>& bias, Activation act,
                                     std::pair<int64_t, int64_t> out) {
  Depthwise a;
  a.x = View(x);
  a.weight = weight.const_data_ptr();
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  a.batch = x.size(0);
  a.channels = narrow(op, "the number of channels", x.size(1));
  a.height = narrow(op, "the height", x.size(2));
  a.width = narrow(op, "the width", x.size(3));
  a.out_height = narrow(op, "the output's height", out.first);
  a.out_width = narrow(op, "the output's width", out.second);
  narrow(op, "the number of filters", weight.size(0));
  narrow(op, "the number of filter taps", weight.size(2) * weight.size(3));
  a.k = static_cast<int>(weight.size(2));
  a.multiplier = a.channels > 0 ? static_cast<int>(weight.size(0)) / a.channels : 1;
  a.channels_last = !x.is_contiguous() && is_channels_last(x);
  a.act = act;
  return a;
}

template <class T>
void launch_depthwise_any(const DeviceScope& device, const char* name, const Depthwise& a) {
  const int64_t outputs = a.batch * a.channels * a.multiplier * a.out_height * a.out_width;
  launch(device, name, depthwise_any<T>, {ceil_div(outputs, kThreads)}, kThreads, 0, a);
}

// ---- 3 rows of x around some pixels, which is what the kernels of their own read

struct Place {
  int64_t n;
  int c, h, w;
};

// Contiguous: where the N neighbours of a row lie that this thread takes; past the last one n is the batch.
template <int N>
__device__ Place place_in_rows(const Depthwise& a) {
  const int per_row = a.width / N;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int w = static_cast<int>(i % per_row) * N;
  i /= per_row;
  const int h = static_cast<int>(i % a.height);
  i /= a.height;
  return {i / a.channels, static_cast<int>(i % a.channels), h, w};
}

// Contiguous: rows h - 1 ... h + 1, columns w - 1 ... w + N, with zeros outside. Returns the N values at p as they are.
template <class T, int N, class A>
__device__ Pack<T, N> load_rows(const Depthwise& a, const Place& p, A (&x)[3][N + 2]) {
  Pack<T, N> here;
#pragma unroll
  for (int r = 0; r < 3; ++r) {
#pragma unroll
    for (int j = 0; j < N + 2; ++j) x[r][j] = A(0);
    if (p.h + r - 1 < 0 || p.h + r - 1 >= a.height) continue;
    const T* row = a.x.at<const T>(p.n, p.c, p.h + r - 1, p.w);
    const Pack<T, N> middle = load_values<N>(row, a.x.w, a.aligned_x);
    if (r == 1) here = middle;
    if (p.w > 0) x[r][0] = static_cast<A>(row[-a.x.w]);
#pragma unroll
    for (int j = 0; j < N; ++j) x[r][j + 1] = static_cast<A>(middle.v[j]);
    if (p.w + N < a.width) x[r][N + 1] = static_cast<A>(row[N * a.x.w]);
  }
  return here;
}

// Channels-last: columns w - 1 ... w + 2 of row h, a vector of channels each, with zeros outside.
template <class T, int V>
__device__ void load_ring(const Depthwise& a, const Place& p, Pack<T, V> (&x)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[j] = {};
    if (p.w + j - 1 >= 0 && p.w + j - 1 < a.width) x[j] = load<V>(a.x.at<const T>(p.n, p.c, p.h, p.w + j - 1));
  }
}

// Channels-last: a block keeps the filters of `vectors` vectors of V channels in shared memory, [tap][channel], and
// walks over pairs of pixels of a row, numbers begin, begin + step, ... below count. All threads must make one.
template <class T, int V, int kTaps>
struct PixelWalk {
  const T* filters;  // of this thread's channels, those of the next tap `chunk` on
  int chunk, c;
  bool active;  // whether this thread has a part of the work
  int64_t begin, step, count;

  __device__ PixelWalk(const Depthwise& a, int vectors) {
    T* shared = reinterpret_cast<T*>(shared_memory());
    const int t = static_cast<int>(threadIdx.x), groups = kThreads / vectors;
    chunk = vectors * V;
    const int first = static_cast<int>(blockIdx.y) * chunk;
    for (int i = t; i < kTaps * chunk && first + i / kTaps < a.channels; i += kThreads) {
      shared[i % kTaps * chunk + i / kTaps] = static_cast<const T*>(a.weight)[static_cast<int64_t>(first) * kTaps + i];
    }
    __syncthreads();
    c = first + t % vectors * V;
    active = t / vectors < groups && c < a.channels;
    filters = shared + t % vectors * V;
    count = a.batch * a.height * ((a.width + 1) / 2);
    step = static_cast<int64_t>(gridDim.x) * groups;
    begin = static_cast<int64_t>(blockIdx.x) * groups + t / vectors;
  }

  // The first pixel of pair i.
  __device__ Place at(const Depthwise& a, int64_t i) const {
    const int pairs = (a.width + 1) / 2;
    const int64_t row = i / pairs;
    return {row / a.height, c, static_cast<int>(row % a.height), static_cast<int>(i % pairs) * 2};
  }
};

// How a channels-last kernel shares out its work: blocks of up to 32 vectors of V channels, every thread keeps its
// vector and takes pixel after pixel, several where there are many, so that loading the filters pays.
struct PixelGrid {
  int vectors;
  Grid grid;

  PixelGrid(const Depthwise& a, int V, int64_t tasks_per_vector) {
    const int64_t all = ceil_div(a.channels, V), chunks = ceil_div(all, 32);
    vectors = static_cast<int>(ceil_div(all, chunks));
    const int64_t blocks = ceil_div(tasks_per_vector, kThreads / vectors);
    const int64_t rounds = std::clamp<int64_t>(blocks * chunks / 1024, 1, 8);
    grid = {ceil_div(blocks, rounds), chunks};
  }
};

template <class T, int V>
void launch_pixels(const DeviceScope& device, const char* name, void (*kernel)(Depthwise, int), const Depthwise& a) {
  const PixelGrid g(a, V, a.batch * a.height * ((a.width + 1) / 2));
  const int64_t filters = static_cast<int64_t>(a.k) * a.k * g.vectors * V;
  launch(device, name, kernel, g.grid, kThreads, static_cast<size_t>(filters) * sizeof(T), a, g.vectors);
}

// For contiguous tensors: one thread per N neighbouring pixels of x.
template <class T, int N>
void launch_rows(const DeviceScope& device, const char* name, void (*kernel)(Depthwise), Depthwise a) {
  a.aligned_x = rows_aligned(a.x, N, sizeof(T));
  const int64_t tasks = a.batch * a.channels * a.height * (a.width / N);
  launch(device, name, kernel, Grid{ceil_div(tasks, kThreads)}, kThreads, 0, a);
}

// Calls f(integral_constant) with N, N / 2, N / 4, ... or 1: the largest that divides `size`.
template <int N, class F>
void widest_dividing(int size, const F& f) {
  if constexpr (N > 1) {
    if (size % N != 0) return widest_dividing<N / 2>(size, f);
  }
  f(std::integral_constant<int, N>{});
}

// ---- gradients
//
// Input pixel (h, w) meets the outputs of a k x k patch, D[kh][kw] = dz[h * stride - padding + kh][w * stride - ...]:
//   dx[h][w] = sum over taps of weight * D, and dweight[tap] = sum over pixels of x * D[tap].
// So one pass over the pixels gives both. A block takes `lanes` channels (32 neighbours of a pixel in channels-last,
// one channel otherwise) and one slice of the rows of all images; the sums of a slice are added in a fixed order in
// shared memory, those of the slices by `reduce_slices`. Nothing depends on timing or on the device.

constexpr int kTapsAtOnce = 16;

struct DepthwiseGradient {
  Depthwise a;              // a.grad: the gradient before the activation, dz; a.y: the gradient of x, written
  View skip;                // a gradient that reaches x directly; data may be null
  void* partial = nullptr;  // [slices][filters][k * k + 1], the last one is the bias
  int lanes = 1, chunks = 1;
  int64_t rows_per_slice = 1;
};

__device__ inline bool inside(int at, int size) { return static_cast<unsigned>(at) < static_cast<unsigned>(size); }

// sum over the taps of one filter of weight * D, for the patch that begins at (oy, ox).
template <class T>
__device__ typename Compute<T>::type input_gradient(const Depthwise& a, int64_t n, int filter, int oy, int ox) {
  using A = typename Compute<T>::type;
  const T* dz = a.grad.at<const T>(n, filter);
  const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(filter) * a.k * a.k;
  A sum = A(0);
  for (int tap = 0; tap < a.k * a.k; ++tap) {
    const int y = oy + tap / a.k, x = ox + tap % a.k;
    if (!inside(y, a.out_height) || !inside(x, a.out_width)) continue;
    sum += static_cast<A>(dz[y * a.grad.h + x * a.grad.w]) * static_cast<A>(weight[a.flip ? a.k * a.k - 1 - tap : tap]);
  }
  return sum;
}

// Adds `numbers` numbers of every thread over the threads of the same channel: [number][thread] in shared memory, the
// results at [number][channel].
template <class A>
__device__ void add_over_pixels(A* shared, int numbers, int lanes) {
  __syncthreads();
  for (int span = kThreads / 2; span >= lanes; span /= 2) {
    for (int i = static_cast<int>(threadIdx.x); i < numbers * span; i += kThreads) {
      A* at = shared + i / span * kThreads + i % span;
      at[0] += at[span];
    }
    __syncthreads();
  }
}

// K is the kernel size if it has a kernel of its own, else 0: then the taps are shared out to blocks of kTapsAtOnce.
template <class T, int K>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || K > 5 || K == 0 ? 1 : 3)
    depthwise_gradient(DepthwiseGradient g) {
  using A = typename Compute<T>::type;
  constexpr int kTaps = K > 0 ? K * K : kTapsAtOnce, kSize = K > 0 ? K : 1;
  const Depthwise& a = g.a;
  A* shared = reinterpret_cast<A*>(shared_memory());  // first the filters [kTaps][lanes], later [kTapsAtOnce][kThreads]
  const int t = static_cast<int>(threadIdx.x), lanes = g.lanes, lane = t % lanes, pixels = kThreads / lanes;
  const int k = K > 0 ? K : a.k, taps = k * k, jobs = a.multiplier * g.chunks;
  const int job = static_cast<int>(blockIdx.x) % jobs, m = job % a.multiplier;
  const int first_tap = job / a.multiplier * kTapsAtOnce;
  const int c = static_cast<int>(blockIdx.x) / jobs * lanes + lane, filter = c * a.multiplier + m;
  const bool has_channel = c < a.channels;
  if (K > 0) {
    const T* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(filter) * taps;
    for (int tap = t / lanes; tap < kTaps && has_channel; tap += pixels) {
      shared[tap * lanes + lane] = static_cast<A>(weight[a.flip ? taps - 1 - tap : tap]);
    }
    __syncthreads();
  }

  A sum[kTaps] = {}, bias_sum = A(0);
  const int64_t first_row = blockIdx.y * g.rows_per_slice;
  const int64_t count = std::min(g.rows_per_slice, a.batch * a.height - first_row) * a.width;
  for (int64_t i = t / lanes; has_channel && i < count; i += pixels) {
    const int64_t row = first_row + i / a.width, n = row / a.height;
    const int h = static_cast<int>(row % a.height), w = static_cast<int>(i % a.width);
    const int oy = h * a.stride - a.padding, ox = w * a.stride - a.padding;
    const T* dz = a.grad.at<const T>(n, filter);
    const A x = static_cast<A>(*a.x.at<const T>(n, c, h, w));
    A dx = A(0);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int py = oy + (K > 0 ? tap / kSize : (first_tap + tap) / k);
      const int px = ox + (K > 0 ? tap % kSize : (first_tap + tap) % k);
      if ((K == 0 && first_tap + tap >= taps) || !inside(py, a.out_height) || !inside(px, a.out_width)) continue;
      const A d = static_cast<A>(dz[py * a.grad.h + px * a.grad.w]);
      sum[tap] += x * d;
      if (K > 0) dx += shared[tap * lanes + lane] * d;
    }
    if (job == 0) {
      for (int other = K > 0 ? 1 : 0; other < a.multiplier; ++other) {
        dx += input_gradient<T>(a, n, c * a.multiplier + other, oy, ox);
      }
      if (g.skip.data) dx += static_cast<A>(*g.skip.at<const T>(n, c, h, w));
      *a.y.at<T>(n, c, h, w) = static_cast<T>(dx);
    }
    if (first_tap == 0) {
      // every output counts once for the bias: a pixel has `stride` rows and columns of them, the last one the rest
      const int end_y = h + 1 == a.height ? a.out_height : std::min((h + 1) * a.stride, a.out_height);
      const int end_x = w + 1 == a.width ? a.out_width : std::min((w + 1) * a.stride, a.out_width);
      for (int py = h * a.stride; py < end_y; ++py) {
        for (int px = w * a.stride; px < end_x; ++px) bias_sum += static_cast<A>(dz[py * a.grad.h + px * a.grad.w]);
      }
    }
  }

  A* partial = static_cast<A*>(g.partial) + static_cast<int64_t>(blockIdx.y) * a.channels * a.multiplier * (taps + 1);
  partial += static_cast<int64_t>(filter) * (taps + 1);
#pragma unroll
  for (int first = 0; first <= kTaps; first += kTapsAtOnce) {  // number kTaps is the bias
    __syncthreads();
    const int numbers = kTaps + 1 - first < kTapsAtOnce ? kTaps + 1 - first : kTapsAtOnce;
#pragma unroll
    for (int i = 0; i < kTapsAtOnce; ++i) {
      if (first + i < kTaps) shared[i * kThreads + t] = sum[first + i];
      if (first + i == kTaps) shared[i * kThreads + t] = bias_sum;
    }
    add_over_pixels(shared, numbers, lanes);
    for (int i = t / lanes; i < numbers && has_channel; i += pixels) {
      const A value = shared[i * kThreads + lane];
      const int tap = first_tap + first + i;
      if (first + i == kTaps) {
        if (first_tap == 0) partial[taps] = value;
      } else if (tap < taps) {
        partial[a.flip ? taps - 1 - tap : tap] = value;
      }
    }
  }
}

// Sets a.grad to the gradient before the activation and returns its owner; `grad` is the one behind it.
template <class T>
Tensor gradient_before_activation(const DeviceScope& device, const char* name, Depthwise& a, const Tensor& owner,
                                  const View& grad, const Tensor& x) {
  a.grad = grad;
  if (a.act == Activation::kNone || owner.numel() == 0) return owner;
  Tensor dz = empty({a.batch, a.channels * a.multiplier, a.out_height, a.out_width}, a.channels_last, x);
  a.y = View(dz);
  launch_depthwise_any<T>(device, name, a);
  a.grad = View(dz);
  return dz;
}

// Adds the slices, in double as the CPU does: every kSumThreads-th in one thread, and then those sums in order. Few
// channels have many slices, which one thread would wait for one after the other.
constexpr int kSumThreads = 32, kSums = kThreads / kSumThreads;
template <class T>
__global__ void __launch_bounds__(kThreads) reduce_slices(const typename Compute<T>::type* partial, int64_t slices,
                                                          int64_t filters, int64_t taps, T* weight, T* bias) {
  using A = typename Compute<T>::type;
  double* shared = reinterpret_cast<double*>(shared_memory());  // [kSumThreads][kSums]
  const int column = threadIdx.x % kSums, first = threadIdx.x / kSums;
  const int64_t numbers = filters * (taps + 1), i = static_cast<int64_t>(blockIdx.x) * kSums + column;
  double sum = 0;
  if (i < numbers) {
    for (int64_t s = first; s < slices; s += kSumThreads) sum += static_cast<double>(partial[s * numbers + i]);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (first > 0 || i >= numbers) return;
  for (int other = 1; other < kSumThreads; ++other) sum += shared[other * kSums + column];
  const int64_t filter = i / (taps + 1), tap = i % (taps + 1);
  (tap == taps ? bias[filter] : weight[filter * taps + tap]) = static_cast<T>(static_cast<A>(sum));
}

template <class T, int K>
void launch_gradient_of_size(const DeviceScope& device, const char* name, const DepthwiseGradient& g, int64_t slices) {
  using A = typename Compute<T>::type;
  const int64_t numbers = std::max<int64_t>(kTapsAtOnce * kThreads, K * K * g.lanes);
  const Grid grid{ceil_div(g.a.channels, g.lanes) * g.a.multiplier * g.chunks, slices};
  launch(device, name, depthwise_gradient<T, K>, grid, kThreads, static_cast<size_t>(numbers) * sizeof(A), g);
}

// dx (into a.y), dweight and dbias from dz (a.grad). `launch_size(g, slices)` calls launch_gradient_of_size for the
// kernel size; `own_size` says whether that is one with a kernel of its own.
template <class T, class LaunchSize>
void launch_gradient(const DeviceScope& device, const char* name, const Depthwise& a, const View& skip, bool own_size,
                     const Tensor& x, Tensor& dweight, Tensor& dbias, const LaunchSize& launch_size) {
  using A = typename Compute<T>::type;
  constexpr int64_t kBlocks = 1024;  // enough for any GPU; a constant, so that sums are the same on all
  const int64_t filters = static_cast<int64_t>(a.channels) * a.multiplier, taps = a.k * a.k;
  const int64_t rows = a.batch * a.height;
  DepthwiseGradient g;
  g.a = a;
  g.skip = skip;
  g.lanes = a.channels_last ? 32 : 1;
  g.chunks = own_size ? 1 : static_cast<int>(ceil_div(taps, kTapsAtOnce));
  int64_t slices = 0;
  if (rows * a.width * filters > 0) {
    const int64_t blocks = ceil_div(a.channels, g.lanes) * a.multiplier * g.chunks;
    const int64_t least_rows = ceil_div(16 * kThreads / g.lanes, a.width);  // 16 pixels per thread
    g.rows_per_slice = std::max(least_rows, ceil_div(rows, ceil_div(kBlocks, blocks)));
    slices = ceil_div(rows, g.rows_per_slice);
  }
  const ScalarType compute = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  Tensor partial = empty({std::max<int64_t>(slices, 1), filters, taps + 1}, false, x, compute);
  g.partial = partial.mutable_data_ptr();
  if (slices > 0) launch_size(g, slices);
  if (filters > 0) {
    launch(device, name, reduce_slices<T>, Grid{ceil_div(filters * (taps + 1), kSums)}, kThreads,
           kThreads * sizeof(double), static_cast<const A*>(g.partial), slices, filters, taps,
           static_cast<T*>(dweight.mutable_data_ptr()), static_cast<T*>(dbias.mutable_data_ptr()));
  }
}

}  // namespace fastpose
