// Dense convolutions to one channel, with vectors of pixels instead of channels.
//
// Blocking: two rows of three vectors of pixels are six sums; every number of the filter is read once for all of
// them.
// Bound: loads, one per multiply-add. It replaces a matrix product of which 15 of 16 columns would be padding.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// kB vectors of neighbouring pixels of two rows, of which `count` rows and `left` pixels exist.
template <int kB>
FASTPOSE_INLINE void to_one_tile(const PlanTask& t, const float* in, int64_t line, int64_t plane, float* out,
                                 int64_t left, int64_t count) {
  const int64_t k = t.step->kernel, channels = t.in.channels;
  const V bias = splat(t.bias[0]);
  V sum[2][kB];
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < kB; ++b) sum[r][b] = bias;
  }
  const float* weight = t.weight;
  for (int64_t ky = 0; ky < k; ++ky) {
    for (int64_t kx = 0; kx < k; ++kx) {
      for (int64_t c = 0; c < channels; ++c, weight += kPad) {
        const V w = splat(weight[0]);
        const float* from = in + c * plane + ky * line + kx;
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 4
          for (int b = 0; b < kB; ++b) sum[r][b] += load(from + r * line + b * kL) * w;
        }
      }
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    alignas(64) float result[kB * kL];
#pragma GCC unroll 4
    for (int b = 0; b < kB; ++b) store(result + b * kL, apply(r == 0 ? sum[0][b] : sum[1][b], t.step->act));
    float* to = out + r * t.out.width * t.out.stride;
    if (t.out.stride == 1 && kB * kL <= left) {
#pragma GCC unroll 4
      for (int b = 0; b < kB; ++b) store(to + b * kL, load(result + b * kL));
      continue;
    }
    for (int64_t i = 0; i < kB * kL && i < left; ++i) to[i * t.out.stride] = result[i];
  }
}

// Dense convolution to one channel (a spatial attention gate): as a matrix product 15 of 16 columns would be padding.
// Input channels become planes with a border of zeros, and a vector holds neighbouring pixels.
void conv_to_one(const PlanTask& t, int64_t tile, float* scratch) {
  const PlanStep& s = *t.step;
  const Range pixels = range_of(t, tile, t.out.pixels());  // whole rows
  const int64_t width = t.out.width, begin = pixels.begin / width, end = pixels.end / width;
  const int64_t k = s.kernel, channels = t.in.channels;
  const int64_t rows = end - begin + k - 1, line = t.in.width + 2 * s.padding + kPad, plane = rows * line;
  for (int64_t i = 0; i < channels * plane; i += kL) store(scratch + i, V{});
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = begin + r - s.padding;
    if (y < 0 || y >= t.in.height) continue;
    for (int64_t x = 0; x < t.in.width; ++x) {
      const float* from = t.in.data + (y * t.in.width + x) * t.in.stride;
      for (int64_t c = 0; c < channels; ++c) scratch[c * plane + r * line + s.padding + x] = from[c];
    }
  }
  // two rows at a time: every number of the filter is read for up to six vectors, and no sum waits for itself
  for (int64_t y = begin; y < end; y += 2) {
    const float* in = scratch + (y - begin) * line;
    const int64_t count = end - y < 2 ? 1 : 2;
    for (int64_t x = 0; x < width;) {
      float* out = t.out.data + (y * width + x) * t.out.stride;
      const int64_t left = width - x;
      if (left > 2 * kL) {
        to_one_tile<3>(t, in + x, line, plane, out, left, count);
        x += 3 * kL;
      } else if (left > kL) {
        to_one_tile<2>(t, in + x, line, plane, out, left, count);
        x += 2 * kL;
      } else {
        to_one_tile<1>(t, in + x, line, plane, out, left, count);
        x += kL;
      }
    }
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
