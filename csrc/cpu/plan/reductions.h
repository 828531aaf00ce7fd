// Means, sums and maxima over pixels, rows, columns and channels, and the softmax of a few numbers.
//
// Blocking: over pixels four vectors at a time, with a running sum each, of all channels of a sixteenth of the pixels,
// which lie in a cache if the same tile has written them; over channels as many pixels as a vector has lanes, whose
// sums are put together lane by lane. Bound: reading the map once, which is reached at 160x32x24 together with the gate
// that follows (cpu/plan/pointwise.h).

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// Numbers that are summed up before they are added to the total: the rounding of a sum grows with its length.
constexpr int64_t kSummed = 256;

// What a reduction over all pixels makes of sum and maximum of a vector of channels from `c` on.
template <bool kSum, bool kMaximum>
FASTPOSE_INLINE void write_reduced(const PlanTask& t, int64_t c, V total, V most) {
  const int64_t all = t.in.channels, first = kSum && kMaximum ? all : 0;  // channel of the first maximum
  const float factor = t.step->op == PlanOp::kSum ? 1.0f : 1.0f / static_cast<float>(t.in.pixels());
  if (kSum) put(t.out.data + c, apply(total * factor, t.step->act), (first > 0 ? all : t.out.room) - c);
  if (kMaximum) put(t.out.data + first + c, apply(most, t.step->act), t.out.room - first - c);
}

// Sum and maximum of kV vectors of channels from `c` on over some pixels, into a part of what is left. Four values run
// at a time, since one would wait for itself: of neighbouring vectors, which are read together, or of pixels in turn.
template <bool kSum, bool kMaximum, int kV>
FASTPOSE_INLINE void reduce_vectors(const PlanTask& t, Range pixels, int64_t c, float* partial) {
  constexpr int kTurns = 4 / kV;
  constexpr int64_t kPixelsAhead = 16;
  const int64_t stride = t.in.stride;
  const float* in = t.in.data + c;
  const bool far = kV > 1 && t.in.pixels() * stride > kFar;
  V total[kV]{}, most[4]{};
  if (kMaximum) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = load(in + pixels.begin * stride + i % kV * kL);
  }
  int64_t p = pixels.begin;
  for (int64_t end = p; end < pixels.end;) {
    end = std::min(end + kSummed, pixels.end);
    V sum[4]{};
    for (; p + kTurns <= end; p += kTurns) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float* from = in + (p + i / kV) * stride + i % kV * kL;
        if (far) __builtin_prefetch(from + kPixelsAhead * stride);
        const V x = load(from);
        if (kSum) sum[i] += x;
        if (kMaximum) most[i] = larger(most[i], x);
      }
    }
    for (; p < end; ++p) {  // only of one vector
      const V x = load(in + p * stride);
      if (kSum) sum[0] += x;
      if (kMaximum) most[0] = larger(most[0], x);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
#pragma GCC unroll 4
      for (int i = v + kV; i < 4; i += kV) sum[v] += sum[i];
      total[v] += sum[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    V y = most[v];
#pragma GCC unroll 4
    for (int i = v + kV; i < 4; i += kV) y = larger(y, most[i]);
    if (kSum) store(partial + c + v * kL, total[v]);
    if (kMaximum) store(partial + pad(t.in.channels) + c + v * kL, y);
  }
}

// Puts parts `begin` to `end` together in pairs, then those pairs, and so on; every `step`-th holds what was put
// together before.
template <bool kSum, bool kMaximum>
void join_parts(const PlanTask& t, int64_t begin, int64_t end, int64_t step) {
  const int64_t packed = pad(t.in.channels);
  for (; step < end - begin; step *= 2) {
    for (int64_t part = begin; part < end; part += 2 * step) {
      float* into = t.partial + 2 * part * packed;
      const float* other = into + 2 * step * packed;
      for (int64_t c = 0; c < t.in.channels; c += kL) {
        if (kSum) store(into + c, load(into + c) + load(other + c));
        if (kMaximum) store(into + packed + c, larger(load(into + packed + c), load(other + packed + c)));
      }
    }
  }
}

// What the tiles left. With both mean and maximum the means end where the maxima begin.
template <bool kSum, bool kMaximum>
void combine_tiles(const PlanTask& t) {
  const int64_t count = ReducedParts(t.in).count;
  join_parts<kSum, kMaximum>(t, 0, count, count / t.tiles);
  for (int64_t c = 0; c < t.in.channels; c += kL) {
    write_reduced<kSum, kMaximum>(t, c, load(t.partial + c), load(t.partial + pad(t.in.channels) + c));
  }
}

// kMean, kSum, kMax and kMeanMax over all pixels, the parts of a tile; the only tile finishes the work.
template <bool kSum, bool kMaximum>
void reduce(const PlanTask& t, int64_t tile) {
  const ReducedParts parts(t.in);
  const int64_t channels = t.in.channels, begin = tile * (parts.count / t.tiles), end = begin + parts.count / t.tiles;
  for (int64_t part = begin; part < end; ++part) {
    const Range pixels{parts.begin(part), parts.begin(part + 1)};
    float* partial = t.partial + 2 * part * pad(channels);
    int64_t c = 0;
    for (; c + 4 * kL <= channels; c += 4 * kL) reduce_vectors<kSum, kMaximum, 4>(t, pixels, c, partial);
    for (; c < channels; c += kL) reduce_vectors<kSum, kMaximum, 1>(t, pixels, c, partial);
  }
  join_parts<kSum, kMaximum>(t, begin, end, 1);
  if (t.tiles == 1) combine_tiles<kSum, kMaximum>(t);
}

// The sum of value(0) ... value(count - 1): four running ones, since one would wait for itself.
template <class F>
FASTPOSE_INLINE V sum_over(int64_t count, const F& value) {
  V total{};
  int64_t i = 0;
  for (int64_t end = 0; end < count;) {
    end = std::min(end + kSummed, count);
    V sum[4]{};
    for (; i + 4 <= end; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] += value(i + j);
    }
    for (; i < end; ++i) sum[0] += value(i);
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return total;
}

// kMeanOfRows: a pixel per row.
void mean_of_rows(const PlanTask& t, int64_t tile) {
  const Range rows = range_of(t, tile, t.out.pixels());
  const int64_t width = t.in.width, stride = t.in.stride;
  const float factor = 1.0f / static_cast<float>(width);
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t c = 0; c < t.out.channels; c += kL) {
      const float* in = t.in.data + y * width * stride + c;
      const V sum = sum_over(width, [&](int64_t x) { return load(in + x * stride); });
      put(t.out.data + y * t.out.stride + c, sum * factor, t.out.room - c);
    }
  }
}

// kMeanOfColumns and kCoordinateMean, some of the channels.
void mean_of_columns(const PlanTask& t, int64_t tile) {
  const int64_t height = t.in.height, width = t.in.width, stride = t.in.stride;
  const Range channels = range_of(t, tile, t.out.channels);
  const float factor = 1.0f / static_cast<float>(height);
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t c = channels.begin; c < channels.end; c += kL) {
      const float* in = t.in.data + x * stride + c;
      const V sum = sum_over(height, [&](int64_t y) { return load(in + y * width * stride); });
      put(t.out.data + x * t.out.stride + c, sum * factor, t.out.room - c);
    }
  }
}

void coordinate_mean(const PlanTask& t, int64_t tile) {
  const int64_t height = t.in.height, width = t.in.width, stride = t.in.stride;
  const Range channels = range_of(t, tile, t.out.channels);
  const float factor = 1.0f / static_cast<float>(height * width);
  for (int64_t c = channels.begin; c < channels.end; c += kL) {
    const float* gate = t.gate.data + c;
    const V sum = sum_over(height, [&](int64_t y) {
      const float* in = t.in.data + y * width * stride + c;
      const V row = sum_over(width, [&](int64_t x) { return load(in + x * stride) * load(gate + x * t.gate.stride); });
      return row * load(t.other.data + y * t.other.stride + c);
    });
    put(t.out.data + c, sum * factor, t.out.room - c);
  }
}

void group_softmax(const PlanTask& t) {
  const int64_t size = t.in.channels / t.step->kernel;
  for (int64_t begin = 0; begin < t.in.channels; begin += size) {
    const float* in = t.in.data + begin;
    float* out = t.out.data + begin;
    float most = in[0], sum = 0;
    for (int64_t i = 1; i < size; ++i) most = in[i] > most ? in[i] : most;
    for (int64_t i = 0; i < size; ++i) {
      out[i] = exp(splat(in[i] - most))[0];
      sum += out[i];
    }
    for (int64_t i = 0; i < size; ++i) out[i] /= sum;
  }
}

// Lane i of the result is the sum, or the maximum, of all lanes of v[i]: halves of two vectors are put together, so
// that each addition serves both.
template <bool kMaximum>
FASTPOSE_INLINE V across(V (&v)[kL]) {
#pragma GCC unroll 4
  for (int half = kL / 2; half > 0; half /= 2) {
    IntVec<float> from{}, turned{};
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) {
      from[i] = i & half ? i + kL : i;
      turned[i] = i & half ? (i ^ half) + kL : i ^ half;
    }
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const V a = merge(v[i], v[i + half], from), b = merge(v[i], v[i + half], turned);
      v[i] = kMaximum ? larger(a, b) : a + b;
    }
  }
  return v[0];
}

// Mean, and maximum if the result has room for it, over a pixel's channels, times their gates if there are any; as many
// pixels at a time as a vector has lanes.
void channel_stats(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels, whole = channels / kL * kL;
  const float factor = 1.0f / static_cast<float>(channels);
  const V lowest = splat(-__builtin_inff());
  const IntVec<float> within = lane_numbers() < static_cast<int>(channels - whole);
  for (int64_t p = range.begin; p < range.end; p += kL) {
    const int64_t count = range.end - p < kL ? range.end - p : kL;
    V sum[kL], most[kL];
    for (int64_t i = 0; i < kL; ++i) {
      const float* in = t.in.data + (p + (i < count ? i : 0)) * t.in.stride;
      const auto value = [&](int64_t c) {
        const V x = load(in + c);
        return t.gate.data ? x * (load(t.gate.data + c) + t.step->constant) : x;
      };
      V s{}, m = lowest;
      for (int64_t c = 0; c < whole; c += kL) {
        const V x = value(c);
        s += x;
        m = larger(m, x);
      }
      if (whole < channels) {
        const V x = value(whole);
        s += within ? x : V{};
        m = larger(m, within ? x : lowest);
      }
      sum[i] = s;
      most[i] = m;
    }
    alignas(64) float means[kL], maxima[kL];
    store(means, across<false>(sum) * factor);
    if (t.out.channels > 1) store(maxima, across<true>(most));
    float* out = t.out.data + p * t.out.stride;
    if (count == kL && t.out.stride == 2) {
      store(out, interleave_low(load(means), load(maxima)));
      store(out + kL, interleave_high(load(means), load(maxima)));
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      out[i * t.out.stride] = means[i];
      if (t.out.channels > 1) out[i * t.out.stride + 1] = maxima[i];
    }
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
