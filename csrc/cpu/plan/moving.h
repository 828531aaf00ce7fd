// Pooling over small squares, enlarging, copies and orders of channels.
//
// Blocking: none; a tile is a range of output pixels.
// Bound: moving the maps. Plain loops, not measured one by one: every network has few of them.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

void average_pool(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t stride = t.in.stride, k = t.step->kernel;
  const float factor = 1.0f / static_cast<float>(k * k);
  for (int64_t p = range.begin; p < range.end; ++p) {
    const float* in = t.in.data + (p / t.out.width * k * t.in.width + p % t.out.width * k) * stride;
    float* out = t.out.data + p * t.out.stride;
    for (int64_t c = 0; c < t.out.channels; c += kL) {
      V sum{};
      for (int64_t y = 0; y < k; ++y) {
        for (int64_t x = 0; x < k; ++x) sum += load(in + (y * t.in.width + x) * stride + c);
      }
      put(out + c, sum * factor, t.out.room - c);
    }
  }
}

void max_pool(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t k = t.step->kernel, s = t.step->stride, width = t.in.width, height = t.in.height;
  for (int64_t p = range.begin; p < range.end; ++p) {
    const int64_t top = p / t.out.width * s - t.step->padding, left = p % t.out.width * s - t.step->padding;
    float* out = t.out.data + p * t.out.stride;
    for (int64_t c = 0; c < t.out.channels; c += kL) {
      V most = splat(-__builtin_inff());
      for (int64_t y = top < 0 ? 0 : top; y < top + k && y < height; ++y) {
        for (int64_t x = left < 0 ? 0 : left; x < left + k && x < width; ++x) {
          most = larger(most, load(t.in.data + (y * width + x) * t.in.stride + c));
        }
      }
      put(out + c, most, t.out.room - c);
    }
  }
}

void shuffle(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t groups = t.step->kernel, size = t.in.channels / groups;
  for (int64_t p = range.begin; p < range.end; ++p) {
    const float* in = t.in.data + p * t.in.stride;
    float* out = t.out.data + p * t.out.stride;
    for (int64_t j = 0; j < size; ++j) {
      for (int64_t i = 0; i < groups; ++i) out[j * groups + i] = in[i * size + j];
    }
  }
}

// Where output coordinate `at` lies among `in` inputs if first meets first and last meets last: the input before it and
// the weight of the one after.
struct Between {
  int64_t before, after;
  float weight;
};
FASTPOSE_INLINE Between between(int64_t at, int64_t in, int64_t out) {
  const float position =
      out > 1 ? static_cast<float>(at) * (static_cast<float>(in - 1) / static_cast<float>(out - 1)) : 0;
  int64_t before = static_cast<int64_t>(position);
  before = before < in ? before : in - 1;
  return {before, before + 1 < in ? before + 1 : before, position - static_cast<float>(before)};
}

void bilinear(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t stride = t.in.stride, width = t.in.width;
  for (int64_t p = range.begin; p < range.end; ++p) {
    const Between y = between(p / t.out.width, t.in.height, t.out.height),
                  x = between(p % t.out.width, width, t.out.width);
    const float *a = t.in.data + (y.before * width + x.before) * stride,
                *b = t.in.data + (y.before * width + x.after) * stride;
    const float *c = t.in.data + (y.after * width + x.before) * stride,
                *d = t.in.data + (y.after * width + x.after) * stride;
    for (int64_t i = 0; i < t.out.channels; i += kL) {
      const V top = load(a + i) * (1 - x.weight) + load(b + i) * x.weight;
      const V bottom = load(c + i) * (1 - x.weight) + load(d + i) * x.weight;
      const V result = apply(top * (1 - y.weight) + bottom * y.weight, t.step->act);
      put(t.out.data + p * t.out.stride + i, result, t.out.room - i);
    }
  }
}

void copy_map(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  Under in(t.in, range.begin, t.out.width, t.step->factor);
  for (int64_t p = range.begin; p < range.end; ++p, in.next()) {
    float* out = t.out.data + p * t.out.stride;
    for (int64_t c = 0; c < t.out.channels; c += kL) put(out + c, load(in.pixel + c), t.out.room - c);
  }
}

// Two maps of one pixel become one of two.
void stack(const PlanTask& t) {
  for (int64_t c = 0; c < t.out.channels; c += kL) {
    put(t.out.data + c, load(t.in.data + c), t.out.room - c);
    put(t.out.data + t.out.stride + c, load(t.other.data + c), t.out.room - c);
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
