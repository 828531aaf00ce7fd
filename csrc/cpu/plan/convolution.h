// Dense convolutions as matrix products: of the map itself where a kernel row's pixels are neighbours in memory, of
// gathered pixels at borders, for large weights and for transposed convolutions.
//
// Blocking: kRows output pixels at a time, k * k * channels numbers each; where the weights do not fit the second-level
// cache (3x3 of 256 channels: 2.4 MB) kFarRows (48 x 2304 x 4 = 442 KB), so that they are read a quarter as often.
// Bound: arithmetic. Reached: 90 % for 3x3 of 256 channels at 8x6 pixels.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// In whole vectors: up to kL - 1 numbers more are read and written. Copies go forward, so the next one repairs that,
// and behind every map and scratch there is room.
FASTPOSE_INLINE void copy(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kL) store(to + i, load(from + i));
}

// The k * k input pixels from (y, x) on, one after the other; zeros outside the map.
FASTPOSE_INLINE void gather(const PlanTask& t, int64_t k, int64_t y, int64_t x, float* to) {
  const int64_t channels = t.in.channels, stride = t.in.stride;
  for (int64_t ky = 0; ky < k; ++ky, to += k * channels) {
    const float* row = t.in.data + (y + ky) * t.in.width * stride;
    if (y + ky < 0 || y + ky >= t.in.height) {
      for (int64_t i = 0; i < k * channels; ++i) to[i] = 0;
    } else if (stride == channels && x >= 0 && x + k <= t.in.width) {
      copy(to, row + x * stride, k * channels);
    } else {
      for (int64_t kx = 0; kx < k; ++kx) {
        if (x + kx >= 0 && x + kx < t.in.width) {
          copy(to + kx * channels, row + (x + kx) * stride, channels);
        } else {
          for (int64_t c = 0; c < channels; ++c) to[kx * channels + c] = 0;
        }
      }
    }
  }
}

// 1x1 convolution of map * (gate + constant), which is computed for as many pixels as the matrix product takes at once.
void conv_gated(const PlanTask& t, int64_t begin, int64_t end, float* scratch) {
  const int64_t channels = t.in.channels, row = pad(channels);
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows;
    for (int64_t c = 0; c < channels; c += kL) {
      const V gate = load(t.gate.data + c) + t.step->constant;
      const float* in = t.in.data + first * t.in.stride + c;
      for (int64_t r = 0; r < rows; ++r) store(scratch + r * row + c, load(in + r * t.in.stride) * gate);
    }
    conv_rows({scratch, row, channels}, rows, t, first);
  }
}

// Dense convolution: output pixels as rows of a matrix product. A 1x1 convolution reads the map itself; otherwise the
// k * k input pixels under each output pixel are read kernel row by kernel row or, at borders and for large weights,
// gathered into `scratch` first.
void conv(const PlanTask& t, int64_t tile, float* scratch) {
  const PlanStep& s = *t.step;
  const auto [begin, end] = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels;
  if (t.gate.data != nullptr) return conv_gated(t, begin, end, scratch);
  if (s.kernel == 1 && s.stride == 1) {
    conv_rows({t.in.data + begin * t.in.stride, t.in.stride, channels}, end - begin, t, begin);
    return;
  }
  const int64_t k = s.kernel, depth = k * k * channels;
  const bool dense = t.in.stride == channels;  // a kernel row's pixels are neighbours in memory
  const bool far = far_weights(depth, t.out.channels);
  const int64_t most = far ? kFarRows : kRows;
  int64_t y = begin / t.out.width, x = begin % t.out.width;
  for (int64_t first = begin; first < end; first += most) {
    const int64_t rows = end - first < most ? end - first : most;
    const int64_t top = y * s.stride - s.padding, left = x * s.stride - s.padding;
    const bool inside = top >= 0 && left >= 0 && top + k <= t.in.height && x + rows <= t.out.width &&
                        left + (rows - 1) * s.stride + k <= t.in.width;
    if (dense && inside && !far) {
      const float* corner = t.in.data + (top * t.in.width + left) * channels;
      conv_rows({corner, s.stride * channels, k * channels, k, t.in.width * channels}, rows, t, first);
      x += rows;
      if (x == t.out.width) x = 0, ++y;
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      gather(t, k, y * s.stride - s.padding, x * s.stride - s.padding, scratch + r * depth);
      if (++x == t.out.width) x = 0, ++y;
    }
    conv_rows({scratch, depth, depth}, rows, t, first);
  }
}

// kConvSplit, where there are no products of bfloat16 worth having: of floats, each weight the sum of its parts. They
// are put together once per tile.
void conv_split(const PlanTask& t, int64_t tile, float* scratch) {
  const int64_t channels = t.in.channels, packed = pad(t.out.channels), pairs = (channels + 1) / 2;
  typedef int32_t Bits __attribute__((vector_size(FASTPOSE_VECTOR_BYTES)));
  for (int64_t n = 0; n < packed; n += kPanel) {
    const int64_t width = packed - n < kPanel ? packed - n : kPanel;
    const float* from = t.weight + n * 2 * pairs;
    for (int64_t k = 0; k < channels; ++k) {
      for (int64_t c = 0; c < width; c += kL) {
        const float* pair = from + k / 2 * width + c;
        Bits large = reinterpret_cast<Bits>(load(pair)), small = reinterpret_cast<Bits>(load(pair + pairs * width));
        large = k % 2 == 0 ? large << 16 : large & ~0xffff;
        small = k % 2 == 0 ? small << 16 : small & ~0xffff;
        store(scratch + n * channels + k * width + c, reinterpret_cast<V>(large) + reinterpret_cast<V>(small));
      }
    }
  }
  PlanTask whole = t;
  whole.weight = scratch;
  const auto [begin, end] = range_of(t, tile, t.out.pixels());
  if (t.gate.data != nullptr) return conv_gated(whole, begin, end, scratch + channels * packed);
  conv_rows({t.in.data + begin * t.in.stride, t.in.stride, channels}, end - begin, whole, begin);
}

// kDeconv: output (2 y + a, 2 x + b) sees input rows y - 1 + a and y + a, and columns alike. A tile is a band of input
// rows; the outputs of one phase (a, b) lie two pixels apart.
void deconv(const PlanTask& t, int64_t tile, float* scratch) {
  const int64_t width = t.in.width, depth = 4 * t.in.channels;
  const auto [begin, end] = range_of(t, tile, t.in.height);
  PlanTask phase = t;
  phase.out.stride = 2 * t.out.stride;
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t ab = 0; ab < 4; ++ab) {
      const int64_t a = ab / 2, b = ab % 2;
      phase.weight = t.weight + ab * depth * pad(t.out.channels);
      phase.out.data = t.out.data + ((2 * y + a) * t.out.width + b) * t.out.stride;
      for (int64_t x = 0; x < width; x += kRows) {
        const int64_t rows = width - x < kRows ? width - x : kRows;
        for (int64_t r = 0; r < rows; ++r) gather(t, 2, y - 1 + a, x + r - 1 + b, scratch + r * depth);
        conv_rows({scratch, depth, depth}, rows, phase, x);
      }
    }
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
