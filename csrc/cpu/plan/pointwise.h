// Instructions of a multiplication or an addition per number: gates, sums of maps, activations, channels in turn.
//
// Blocking: none; a tile is a range of pixels, all their channels, read and written once in order.
// Bound: moving the maps. Reached: 68 % for two halves of 40 channels in turn at 64x48, 91 % for mean and gate
// together.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// Convolution along the channels of one pixel.
void band(const PlanTask& t, float* scratch) {
  const int64_t channels = t.in.channels, k = t.step->kernel, edge = k / 2, packed = pad(channels);
  for (int64_t i = 0; i < packed + k; ++i) scratch[i] = i >= edge && i < channels + edge ? t.in.data[i - edge] : 0;
  for (int64_t c = 0; c < channels; c += kL) {
    V y = splat(t.bias[0]);
    for (int64_t i = 0; i < k; ++i) y += load(scratch + c + i) * splat(t.weight[i]);
    if (t.other.data) y += load(t.other.data + c);
    put(t.out.data + c, apply(y, t.step->act), t.out.room - c);
  }
}

// Pixel after pixel, from `p` on, of a map smaller by `factor` under those of one that is `width` wide.
struct Under {
  int64_t width, factor, stride, row_length;
  int64_t x, y, part;
  const float *row, *pixel;

  FASTPOSE_INLINE Under(const PlanMap& map, int64_t p, int64_t width_, int64_t factor_)
      : width(width_), factor(factor_), stride(map.stride), row_length(map.width * map.stride) {
    x = p % width;
    y = p / width;
    part = x % factor;
    row = map.data + y / factor * row_length;
    pixel = row + x / factor * stride;
  }
  FASTPOSE_INLINE void next() {
    if (factor == 1) {
      pixel += stride;
      return;
    }
    if (++part == factor) part = 0, pixel += stride;
    if (++x < width) return;
    x = part = 0;
    if (++y % factor == 0) row += row_length;
    pixel = row;
  }
};

// kScale, kScalePixels, kAdd, kMultiply, kActivate and kOuter. The usual activations are template arguments: the loop
// is so short that choosing one would take as long as the rest.
template <PlanOp kOp, int kAct>
FASTPOSE_INLINE void pointwise_with(const PlanTask& t, int64_t tile) {
  constexpr bool kOuter = kOp == PlanOp::kOuter, kByPixel = kOuter || kOp == PlanOp::kScalePixels;
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.out.channels, room = t.out.room, width = t.out.width;
  const int64_t whole = channels / kL * kL;
  const PlanAct act = kAct == 0 ? PlanAct::kNone : kAct == 1 ? PlanAct::kRelu : t.step->act;
  const bool summed = kOp != PlanOp::kMultiply && t.other.data != nullptr;
  const float* by_channel = kOp == PlanOp::kScale ? t.gate.data : kOp == PlanOp::kScalePixels ? t.second.data : nullptr;
  const bool third = kOp == PlanOp::kAdd && t.gate.data != nullptr;
  const PlanMap none{};
  Under other(t.other, range.begin, width, kOuter ? 1 : t.step->factor);
  Under gate(kByPixel || third ? t.gate : none, range.begin, width,
             kOuter  ? t.step->factor
             : third ? t.step->kernel
                     : 1);
  const float* in = t.in.data + (kOuter ? 0 : range.begin * t.in.stride);
  float* out = t.out.data + range.begin * t.out.stride;
  for (int64_t p = range.begin; p < range.end; ++p, other.next(), gate.next(), out += t.out.stride) {
    const V by_pixel = kByPixel ? splat(gate.pixel[0]) : V{};
    const auto result = [&](int64_t c) {
      V y = load(in + c);
      if (kByPixel) y *= by_pixel;
      if (by_channel) y *= load(by_channel + c) + t.step->constant;
      if (kOp == PlanOp::kMultiply) y *= load(other.pixel + c);
      if (summed) y += load(other.pixel + c);
      if (third) y += load(gate.pixel + c);
      return apply(y, act);
    };
    for (int64_t c = 0; c < whole; c += kL) store(out + c, result(c));
    if (whole < channels) put(out + whole, result(whole), room - whole);
    if (!kOuter) in += t.in.stride;
  }
}

template <PlanOp kOp>
void pointwise(const PlanTask& t, int64_t tile) {
  switch (t.step->act) {
    case PlanAct::kNone: return pointwise_with<kOp, 0>(t, tile);
    case PlanAct::kRelu: return pointwise_with<kOp, 1>(t, tile);
    default: return pointwise_with<kOp, 2>(t, tile);
  }
}

// kInterleave: channels of map and other in turn, those of other times the gate if there is one.
void interleave(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels;
  for (int64_t p = range.begin; p < range.end; ++p) {
    const float *a = t.in.data + p * t.in.stride, *b = t.other.data + p * t.other.stride;
    float* out = t.out.data + p * t.out.stride;
    const V by_pixel = t.second.data ? splat(t.second.data[p * t.second.stride]) : V{};
    for (int64_t c = 0; c < channels; c += kL) {
      const V even = load(a + c);
      V odd = load(b + c);
      if (t.gate.data) odd *= load(t.gate.data + c) + t.step->constant;
      if (t.second.data) odd *= by_pixel;
      odd = apply(odd, t.step->act);
      const int64_t room = t.out.room - 2 * c;
      put(out + 2 * c, interleave_low(even, odd), room);
      if (room > kL) put(out + 2 * c + kL, interleave_high(even, odd), room - kL);
    }
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
