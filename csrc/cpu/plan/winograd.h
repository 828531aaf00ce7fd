// Dense 3x3 convolutions with stride 1 by Winograd's algorithm: less arithmetic than the direct sum.
//
// Blocking: kSquares = 12 squares of 4x4 outputs, the rows of one block of the matrix product. Transformed inputs and
// sums take 36 x 12 x (in + out) numbers, 221 KB for 64 to 64 channels, in the second-level cache.
// Bound: a quarter of the direct sum's arithmetic, and the transforms. Reached: 231 to 282 % of the direct sum's bound
// with 32 to 128 channels, of 400 % that the products alone would allow.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// Winograd's F(4x4, 3x3): 4x4 outputs of a 3x3 convolution from the 6x6 inputs under them with 36 multiplications per
// pair of channels instead of 144 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; points 0,
// 1, -1, 2, -2). The inputs of kSquares squares are transformed, 36 matrix products follow, one for each position, and
// the sums are transformed back. Costs some accuracy: rounding errors are about ten times those of the direct sum.

// Rows of the transforms: d and m are `step` apart.
FASTPOSE_INLINE void winograd_in(const V* d, int step, V* to, int to_step) {
  const V a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step], g = d[5 * step];
  const V p = f - 4 * c, q = e - 4 * b, r = f - c, s = 2 * (e - b);
  to[0] = 4 * a - 5 * c + f;
  to[to_step] = p + q;
  to[2 * to_step] = p - q;
  to[3 * to_step] = r + s;
  to[4 * to_step] = r - s;
  to[5 * to_step] = 4 * b - 5 * e + g;
}
FASTPOSE_INLINE void winograd_out(const V* m, int step, V* to, int to_step) {
  const V p = m[step] + m[2 * step], q = m[step] - m[2 * step];
  const V r = m[3 * step] + m[4 * step], s = m[3 * step] - m[4 * step];
  to[0] = m[0] + p + r;
  to[to_step] = q + 2 * s;
  to[2 * to_step] = p + 4 * r;
  to[3 * to_step] = q + 8 * s + m[5 * step];
}

void winograd(const PlanTask& t, int64_t tile, float* scratch) {
  const int64_t height = t.out.height, width = t.out.width, across = (width + 3) / 4;
  const auto [begin, end] = range_of(t, tile, squares(t.out));
  const int64_t in_channels = t.in.channels, in_packed = pad(in_channels);
  const int64_t channels = t.out.channels, packed = pad(channels);
  float *inputs = scratch, *sums = inputs + 36 * kSquares * in_packed, *zeros = sums + 36 * kSquares * packed;
  for (int64_t c = 0; c < packed; c += kL) store(zeros + c, V{});
  PlanStep plain = *t.step;
  plain.act = PlanAct::kNone;
  PlanTask product = t;
  product.step = &plain;
  product.bias = zeros;
  product.other.data = nullptr;
  product.out.stride = product.out.room = packed;
  product.out.height = 1, product.out.width = kSquares;
  for (int64_t first = begin; first < end; first += kSquares) {
    const int64_t count = end - first < kSquares ? end - first : kSquares;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t top = (first + i) / across * 4 - 1, left = (first + i) % across * 4 - 1;
      const bool inside = top >= 0 && left >= 0 && top + 6 <= height && left + 6 <= width;
      const float* corner = t.in.data + (top * width + left) * t.in.stride;
      for (int64_t c = 0; c < in_channels; c += kL) {
        V d[36], half[36];
        for (int64_t y = 0; y < 6; ++y) {
#pragma GCC unroll 6
          for (int64_t x = 0; x < 6; ++x) {
            const bool there = inside || (top + y >= 0 && top + y < height && left + x >= 0 && left + x < width);
            d[6 * y + x] = there ? load(corner + (y * width + x) * t.in.stride + c) : V{};
          }
        }
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) winograd_in(d + x, 6, half + x, 6);
#pragma GCC unroll 6
        for (int y = 0; y < 6; ++y) winograd_in(half + 6 * y, 1, d + 6 * y, 1);
#pragma GCC unroll 36
        for (int k = 0; k < 36; ++k) store(inputs + (k * kSquares + i) * in_packed + c, d[k]);
      }
    }
    for (int64_t k = 0; k < 36; ++k) {
      product.weight = t.weight + k * in_channels * packed;
      product.out.data = sums + k * kSquares * packed;
      conv_rows({inputs + k * kSquares * in_packed, in_packed, in_channels}, count, product, 0);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t top = (first + i) / across * 4, left = (first + i) % across * 4;
      for (int64_t c = 0; c < channels; c += kL) {
        V m[36], half[24], y[16];
#pragma GCC unroll 36
        for (int k = 0; k < 36; ++k) m[k] = load(sums + (k * kSquares + i) * packed + c);
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) winograd_out(m + x, 6, half + x, 6);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) winograd_out(half + 6 * r, 1, y + 4 * r, 1);
        const V bias = load(t.bias + c);
        for (int64_t r = 0; r < 4 && top + r < height; ++r) {
          for (int64_t x = 0; x < 4 && left + x < width; ++x) {
            const int64_t p = (top + r) * width + left + x;
            V result = y[4 * r + x] + bias;
            if (t.other.data) result += load(t.other.data + p * t.other.stride + c);
            put(t.out.data + p * t.out.stride + c, apply(result, t.step->act), t.out.room - c);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
