// Depthwise convolutions and the depthwise transposed one that enlarges by two.
//
// Blocking: 8 outputs of a row (4 below AVX-512) and one vector of channels stay in registers. For a kernel row of 3x3
// they need 10 inputs and 3 weights for 24 multiply-adds, of 5x5 12 and 5 for 40. All channels of these outputs
// come before the next ones, so that memory is read in order; inputs and weights come from the second-level cache.
// Bound: arithmetic. Reached: 45 % for 3x3 of 40 channels at 64x48, 54 % of 160 at 16x12, 57 % for 5x5 of 672: for
// every two multiply-adds or so there is one load from the second-level cache.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// Depthwise convolution, output columns [x, x + kT) of one row, all channels. `rows` are the k input rows, null outside
// the map; kEdge if columns may see beyond it, too.
template <int kT, int kK, int kS, bool kEdge>
void depthwise_tile(const PlanTask& t, const float* weight, const float* const* rows, int64_t x, float* out) {
  const int64_t stride = t.in.stride, left = x * kS - t.step->padding, width = t.in.width;
  const int64_t channels = t.out.channels, packed = pad(channels);
  for (int64_t c = 0; c < channels; c += kL) {
    V sum[kT];
    const V bias = load(t.bias + c);
#pragma GCC unroll 16
    for (int i = 0; i < kT; ++i) sum[i] = bias;
#pragma GCC unroll 8
    for (int ky = 0; ky < kK; ++ky) {
      if (rows[ky] == nullptr) continue;
      const float* in = rows[ky] + left * stride + c;
      V w[kK];
#pragma GCC unroll 8
      for (int kx = 0; kx < kK; ++kx) w[kx] = load(weight + (ky * kK + kx) * packed + c);
      // every input is read once, for all outputs that see it
#pragma GCC unroll 32
      for (int j = 0; j < (kT - 1) * kS + kK; ++j) {
        if (kEdge && (left + j < 0 || left + j >= width)) continue;
        const V v = in_register(load(in + j * stride));
#pragma GCC unroll 8
        for (int kx = 0; kx < kK; ++kx) {
          const int i = (j - kx) / kS;
          if (j >= kx && (j - kx) % kS == 0 && i < kT) sum[i] += v * w[kx];
        }
      }
    }
    apply_all(sum, t.step->act);
    put_all(out + c, t.out.stride, sum, t.out.room - c);
  }
}

template <int kK, int kS>
void depthwise_rows(const PlanTask& t, const float* weight, int64_t begin, int64_t end) {
  constexpr int kT = FASTPOSE_VECTOR_BYTES == 64 ? 8 : 4;
  const int64_t stride = t.in.stride, width = t.in.width, p = t.step->padding, columns = t.out.width;
  for (int64_t y = begin; y < end; ++y) {
    const float* rows[kK];
    for (int ky = 0; ky < kK; ++ky) {
      const int64_t iy = y * kS - p + ky;
      rows[ky] = iy >= 0 && iy < t.in.height ? t.in.data + iy * width * stride : nullptr;
    }
    // channels innermost: memory is read in order, and the weights of all channels fit the second-level cache
    const int64_t to = t.out.stride;
    float* out = t.out.data + y * columns * to;
    const auto inside = [&](int64_t x, int64_t n) { return x * kS >= p && (x + n - 1) * kS - p + kK <= width; };
    int64_t x = 0;
    for (; x + kT <= columns; x += kT) {
      inside(x, kT) ? depthwise_tile<kT, kK, kS, false>(t, weight, rows, x, out + x * to)
                    : depthwise_tile<kT, kK, kS, true>(t, weight, rows, x, out + x * to);
    }
    for (; x + kT / 2 <= columns; x += kT / 2) {
      depthwise_tile<kT / 2, kK, kS, true>(t, weight, rows, x, out + x * to);
    }
    for (; x < columns; ++x) depthwise_tile<1, kK, kS, true>(t, weight, rows, x, out + x * to);
  }
}

// A gate on the input, one number per channel, is multiplied into the weights instead.
void depthwise(const PlanTask& t, int64_t tile, float* scratch) {
  const auto [begin, end] = range_of(t, tile, t.out.height);
  const int64_t k = t.step->kernel, s = t.step->stride;
  const float* w = t.weight;
  if (t.gate.data) {
    const int64_t packed = pad(t.out.channels);
    for (int64_t c = 0; c < t.out.channels; c += kL) {
      const V gate = load(t.gate.data + c) + t.step->constant;
      for (int64_t i = 0; i < k * k; ++i) store(scratch + i * packed + c, load(t.weight + i * packed + c) * gate);
    }
    w = scratch;
  }
  if (k == 3) return s == 1 ? depthwise_rows<3, 1>(t, w, begin, end) : depthwise_rows<3, 2>(t, w, begin, end);
  if (k == 5) return s == 1 ? depthwise_rows<5, 1>(t, w, begin, end) : depthwise_rows<5, 2>(t, w, begin, end);
  return s == 1 ? depthwise_rows<7, 1>(t, w, begin, end) : depthwise_rows<7, 2>(t, w, begin, end);
}

// Depthwise transposed 4x4, stride 2, padding 1: output (2y + a, 2x + b) sees input rows y - 1 + a (with kernel row 3 -
// a) and y + a (kernel row 1 - a), and columns alike: 2x2 taps. A tile is a band of input rows.
void upsample(const PlanTask& t, int64_t tile) {
  const int64_t height = t.in.height, width = t.in.width, stride = t.in.stride;
  const int64_t channels = t.out.channels, packed = pad(channels), to = t.out.stride, room = t.out.room;
  const auto [begin, end] = range_of(t, tile, height);
  const PlanAct act = t.step->act;
  const V zero{};
  for (int64_t y = begin; y < end; ++y) {
    for (int a = 0; a < 2; ++a) {
      const int64_t row0 = y - 1 + a, row1 = y + a;
      const float* in0 = row0 >= 0 ? t.in.data + row0 * width * stride : nullptr;
      const float* in1 = row1 < height ? t.in.data + row1 * width * stride : nullptr;
      const float *w0 = t.weight + (3 - a) * 4 * packed, *w1 = t.weight + (1 - a) * 4 * packed;
      float* out = t.out.data + (2 * y + a) * t.out.width * to;
      for (int64_t x = 0; x < width; ++x, out += 2 * to) {
        const bool left = x > 0, right = x + 1 < width;
        const float *here0 = in0 + x * stride, *here1 = in1 + x * stride;
        for (int64_t c = 0; c < channels; c += kL) {
          V even = load(t.bias + c), odd = even;
          if (in0 != nullptr) {
            const V m = load(here0 + c), l = left ? load(here0 - stride + c) : zero;
            const V r = right ? load(here0 + stride + c) : zero;
            even += l * load(w0 + 3 * packed + c) + m * load(w0 + packed + c);
            odd += m * load(w0 + 2 * packed + c) + r * load(w0 + c);
          }
          if (in1 != nullptr) {
            const V m = load(here1 + c), l = left ? load(here1 - stride + c) : zero;
            const V r = right ? load(here1 + stride + c) : zero;
            even += l * load(w1 + 3 * packed + c) + m * load(w1 + packed + c);
            odd += m * load(w1 + 2 * packed + c) + r * load(w1 + c);
          }
          put(out + c, apply(even, act), room - c);
          put(out + to + c, apply(odd, act), room - c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
