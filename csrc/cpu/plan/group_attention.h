// LE-HRNet's multi-scale attention in one instruction.
//
// Blocking: a band of 16 rows is copied with three pixels of zeros around it; 8 pixels of a row and one vector of
// channels are in registers, and no filtered map is ever written.
// Bound: arithmetic of the three filters that the model has, 3x3, 5x5 and 7x7 for a third of the channels each.
// Reached: 26 to 28 %. Vectors that hold channels of two filters compute the larger for all, and there is a sigmoid per
// pixel and group.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// kGroupAttention. What follows the filters is linear up to the sigmoid, so it is multiplied into them first, and only
// the sums over the four groups of channels are needed. Groups are mixed so that every kPad channels hold four of each:
// position 16 j + 4 g + i is channel 4 j + i of group g. Then all vectors of a pixel add up lane by lane to four sums
// of four numbers, and the small filters, first in each group, share vectors.

// One vector of channels of kT pixels, filters of 2 * kReach + 1 rows and columns in the middle of 7 x 7. Every input
// is read once per row, for all pixels that see it.
template <int kT, int kReach>
FASTPOSE_INLINE void filter(const float* in, int64_t row, const float* weight, int64_t channels, V* sum) {
  constexpr int kSize = 2 * kReach + 1, kFirst = 3 - kReach;
  for (int ky = kFirst; ky < kFirst + kSize; ++ky) {
    V w[kSize];
#pragma GCC unroll 8
    for (int k = 0; k < kSize; ++k) w[k] = load(weight + (ky * 7 + kFirst + k) * channels);
    const float* from = in + ky * row + kFirst * channels;
#pragma GCC unroll 16
    for (int j = 0; j < kT + kSize - 1; ++j) {
      const V x = in_register(load(from + j * channels));
#pragma GCC unroll 8
      for (int k = 0; k < kSize; ++k) {
        if (j >= k && j - k < kT) sum[j - k] += x * w[k];
      }
    }
  }
}

// Lane 4 g + i is the sum of the four lanes 4 g ... 4 g + 3 of v[i].
FASTPOSE_INLINE V sums_of_four(const V* v) {
  IntVec<float> from[2]{}, turned[2]{};  // by two and by one lane
#pragma GCC unroll 16
  for (int i = 0; i < kL; ++i) {
    from[0][i] = i & 2 ? i + kL : i, turned[0][i] = i & 2 ? (i ^ 2) + kL : i ^ 2;
    from[1][i] = i & 1 ? i + kL : i, turned[1][i] = i & 1 ? (i ^ 1) + kL : i ^ 1;
  }
  const V even = merge(v[0], v[2], from[0]) + merge(v[0], v[2], turned[0]);
  const V odd = merge(v[1], v[3], from[0]) + merge(v[1], v[3], turned[0]);
  return merge(even, odd, from[1]) + merge(even, odd, turned[1]);
}

// Pixels [x, x + kT) of row y; `in` is the corner of their windows in the band.
template <int kT>
void attend(const PlanTask& t, const float* in, int64_t row, const float* weight, int64_t y, int64_t x) {
  constexpr int kFours = (kT + 3) / 4;
  const int64_t channels = t.in.channels, size = channels / 4;
  const bool mixed = size % kL != 0;  // groups in a vector
  // of four pixels each: number 4 g + i is that of group g; the last is room
  alignas(64) float gates[kFours + 1][kPad];
  for (int64_t h = 0; h < kPad; h += kL) {
    V sum[4 * kFours]{}, constant{};
    for (int64_t i = 0; i < kL; ++i) constant[i] = t.gate.data[channels + (h + i) / 4];
    for (int64_t c = h; c < channels; c += kPad) {
      const float reach = t.bias[c / kPad];
      if (reach <= 1) {
        filter<kT, 1>(in + c, row, weight + c, channels, sum);
      } else if (reach <= 2) {
        filter<kT, 2>(in + c, row, weight + c, channels, sum);
      } else {
        filter<kT, 3>(in + c, row, weight + c, channels, sum);
      }
    }
#pragma GCC unroll 2
    for (int f = 0; f < kFours; ++f) {
      store(gates[f] + h, apply(sums_of_four(sum + 4 * f) + constant, PlanAct::kSigmoid));
    }
  }
  for (int64_t c = 0; c < channels; c += kL) {
    const int64_t first = c / size * 4;  // of the numbers for the groups that this vector belongs to
    IntVec<float> lanes{};
    for (int64_t l = 0; mixed && l < kL; ++l) lanes[l] = static_cast<int>((c + l) / size * 4 - first);
    for (int i = 0; i < kT; ++i) {
      const int64_t p = y * t.in.width + x + i;
      const float* numbers = gates[i / 4] + first;
      const V gate = mixed ? shuffle(load(numbers), lanes + i % 4) : splat(numbers[i % 4]);
      V result = load(t.in.data + p * t.in.stride + c) * gate;
      if (t.other.data) result += load(t.other.data + p * t.other.stride + c);
      put(t.out.data + p * t.out.stride + c, apply(result, t.step->act), t.out.room - c);
    }
  }
}

FASTPOSE_INLINE void mix_groups(const float* from, int64_t size, float* to) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  for (int64_t i = 0; i < size; i += 4, to += 16) {
#pragma GCC unroll 4
    for (int64_t g = 0; g < 4; ++g)
      *reinterpret_cast<Four*>(to + 4 * g) = *reinterpret_cast<const Four*>(from + g * size + i);
  }
}

// A band of rows is copied with its surroundings, zeros outside the map, so that no pixel is at a border.
void group_attention(const PlanTask& t, int64_t tile, float* scratch) {
  const int64_t channels = t.in.channels, size = channels / 4, width = t.in.width, row = (width + 6) * channels;
  const auto [begin, end] = range_of(t, tile, t.out.height);
  float *gate = scratch, *weight = gate + channels, *band = weight + 49 * channels;
  mix_groups(t.gate.data, size, gate);
  for (int64_t i = 0; i < 49; ++i) {
    for (int64_t c = 0; c < channels; c += kL) {
      store(weight + i * channels + c, load(t.weight + i * channels + c) * load(gate + c));
    }
  }
  for (int64_t first = begin; first < end; first += kBandRows) {
    const int64_t last = first + kBandRows < end ? first + kBandRows : end;
    float* to = band;
    const auto zeros = [&](int64_t n) {
      for (int64_t i = 0; i < n; i += kL) store(to + i, V{});
      to += n;
    };
    for (int64_t y = first - 3; y < last + 3; ++y) {
      if (y < 0 || y >= t.in.height) {
        zeros(row);
        continue;
      }
      zeros(3 * channels);
      const float* in = t.in.data + y * width * t.in.stride;
      for (int64_t x = 0; x < width; ++x, to += channels) mix_groups(in + x * t.in.stride, size, to);
      zeros(3 * channels);
    }
    for (int64_t y = first; y < last; ++y) {
      const float* in = band + (y - first) * row;
      int64_t x = 0;
      for (; x + 8 <= width; x += 8) attend<8>(t, in + x * channels, row, weight, y, x);
      for (; x + 4 <= width; x += 4) attend<4>(t, in + x * channels, row, weight, y, x);
      for (; x < width; ++x) attend<1>(t, in + x * channels, row, weight, y, x);
    }
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
