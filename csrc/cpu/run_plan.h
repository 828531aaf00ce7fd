// A network as a list of instructions over feature maps: what `fastpose.optimize` makes of a model
// (fastpose/plan.py) and csrc/cpu/run_plan.cpp runs.
//
// Maps are channels-last, float, one image at a time: pixel p of a map begins at p * stride, where stride is the number
// of channels rounded up to kPad, so that every vector is full (but for the image and some maps of one or two channels,
// see narrow_maps); nothing depends on the padding. A map may also be a range of another one's channels: concatenations
// are written in place and slices read in place.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace fastpose {

constexpr int64_t kPad = 16;    // floats: the widest vector
constexpr int64_t kPanel = 32;  // output channels per packed panel of a convolution's weights; the last may be 16

enum class PlanAct : int64_t { kNone, kRelu, kHardswish, kSilu, kHardsigmoid, kSigmoid, kRelu6 };

enum class PlanOp : int64_t {
  // dense k x k convolution (if 1x1, of map * (gate + constant)) + bias (+ map `other`) + activation; weights
  // [panel][k * k * in][width]
  kConv,
  kDepthwise,  // depthwise k x k convolution (of map * (gate + constant)) + bias + activation; weights [k * k][padded]
  kUpsample,   // depthwise transposed 4x4 convolution, stride 2, padding 1, + bias + activation; weights [16][padded]
  kMean,       // act(mean over all pixels)
  kScale,      // act(map * (gate + constant) (+ other)), the gate one number per channel
  // act(map + other (+ gate)); `other` may be smaller by `factor`, the gate by `kernel`: each of its pixels is added to
  // a square of them
  kAdd,
  kActivate,  // act(map)
  kMax,       // act(maximum over all pixels)
  kSum,       // act(sum over all pixels)
  kStack,     // two maps of one pixel -> one of two pixels
  // channels of map and act(other (* (gate + constant)) (* second)) in turn, the second gate one number per pixel
  kInterleave,
  // per pixel: mean and, if the result has two channels, maximum over the channels of map (* (gate + constant))
  kChannelStats,
  // act(map * gate (* (second + constant)) (+ other)), the gate one number per pixel (a map of one channel), the second
  // one per channel
  kScalePixels,
  kCopy,         // the map, enlarged by `factor`
  kAveragePool,  // mean over squares of kernel x kernel pixels, stride = kernel, what is left over dropped
  kMultiply,     // act(map * other), `factor` as in kAdd
  kBilinear,     // act(upsampling by two, corners on corners)
  kBand,         // map of one pixel: act(convolution along the channels with `kernel` numbers, zeros beyond (+ other))
  kOuter,        // act(map of one pixel times gate (+ other)), the gate a number per pixel, enlarged by `factor`
  kMeanOfRows,   // mean over the width
  kMeanOfColumns,   // mean over the height
  kCoordinateMean,  // mean over all pixels of map * other * gate, other one number per row, gate one per column
  kGroupSoftmax,    // softmax of a map of one pixel in each of `kernel` groups of channels
  // act(map * sigmoid(sum over each of four groups of channels of a 7x7 depthwise convolution * gate + gate of the
  // group)
  // (+ other)); the gate has one number per channel, then one per group. The filters are in the order that `attend`
  // wants; in place of a bias, how far they reach in each kPad channels: 1 for 3x3, 3 for 7x7
  kGroupAttention,
  // dense transposed 4x4 convolution, stride 2, padding 1, + bias + activation: for output (2 y + a, 2 x + b) a 2x2
  // convolution; weights [a][b][panel][2 * 2 * in][width]
  kDeconv,
  kMaxPool,   // maximum of kernel x kernel pixels, those outside the map left out
  kWinograd,  // dense 3x3 convolution, stride 1, padding 1, as kConv; weights [36][panel][in][width], see `winograd`
  kShuffle,   // channels i * (channels / kernel) + j become j * kernel + i
  // 1x1 convolution as kConv (gate included) with map and weights rounded to bfloat16, sums in float: weights
  // [panel][in / 2][width], each a pair of bfloat16 for two channels of the map; of an odd number the last has a 0
  // beside it
  kConvBf16,
  // 1x1 convolution as kConv of bytes: every pixel of the map is scaled to 0 ... 255 between its least and its greatest
  // number, or 0; weights [panel][in / 4][width], each four signed bytes for four channels; behind the bias as many
  // scales of the filters, then as many sums of them
  kConvInt8,
  kMeanMax,  // mean over all pixels, then, in as many channels more, maximum
  // 1x1 convolution as kConv (gate included) of numbers that are sums of two bfloat16; weights
  // [panel][2][in / 2][width], first the larger parts, then what is left, pairs as in kConvBf16
  kConvSplit,
};

struct PlanStep {
  PlanOp op;
  int64_t in, other, gate, out;  // maps; -1 if absent
  int64_t kernel, stride, padding;
  PlanAct act;
  int64_t weight, bias;  // offsets into the weights
  int64_t factor;
  float constant;
  int64_t second;  // a map; -1 if absent
};

struct PlanMap {
  int64_t channels = 0, stride = 0, height = 0, width = 0;
  int64_t room = 0;  // numbers of a pixel that may be written: more than channels where only padding follows
  float* data = nullptr;
  int64_t pixels() const { return height * width; }
};

// One instruction on concrete maps.
struct PlanTask {
  const PlanStep* step;
  PlanMap in, other, gate, second, out;
  const float *weight, *bias;
  int64_t tiles;  // independent parts, about as many units each
  // output pixels, rows, squares or channels; of a reduction pixels of the map it reads; the last unit may have fewer
  int64_t units, unit;
  float* partial;  // for reductions: sums of each of their parts, padded, then maxima
};

// A reduction over all pixels reduces parts of them first, then pairs of parts, then pairs of those, and so on. A tile
// is of as many parts as are put together in one of these, so the result does not depend on the number of tiles.
constexpr int64_t kReducedParts = 16;
struct ReducedParts {
  int64_t unit, units, count;  // pixels of a unit, whole rows; units; parts
  explicit ReducedParts(const PlanMap& in) {
    const int64_t rows = in.height % 2 == 0 ? 2 : 1;  // two, as an upsampling before it needs
    unit = rows * in.width;
    units = in.height / rows;
    count = std::min(kReducedParts, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(units))));
  }
  int64_t begin(int64_t part) const { return part * units / count * unit; }
};

// kGroupAttention works on bands of so many rows, copied with three pixels of zeros around them.
constexpr int64_t kBandRows = 16;
inline int64_t group_attention_scratch(const PlanMap& in) {
  const int64_t rows = (in.height < kBandRows ? in.height : kBandRows) + 6;
  return in.channels * (50 + rows * (in.width + 6)) + kPad;
}

// The matrix product takes at most so many pixels at a time.
constexpr int64_t kMostRows = 12;
// Weights of more floats than this stay beyond the second-level cache. Each time they are read they are used for up to
// so many pixels.
inline bool far_weights(int64_t depth, int64_t channels) { return depth * channels > 256 << 10; }
constexpr int64_t kFarRows = 4 * kMostRows;

// kConvBf16 and kConvInt8 round that many first, each to so many floats' worth of numbers, pairs or fours; the last
// stand behind the scale and zero of each pixel.
inline int64_t rounded_row(int64_t channels, int64_t per_float) {
  return (channels + per_float * kPad - 1) / (per_float * kPad) * kPad;
}
constexpr int64_t kScales = 2 * kPad;
static_assert(kMostRows <= kPad);

// The AMX level takes that many pixels at a time, a multiple of 32: their rounded numbers, in two parts of kConvSplit,
// stand behind the sums of 32 pixels and the pixels' scales.
constexpr int64_t kTiledPixels = 32;
inline int64_t tiled_scratch(int64_t channels, int64_t per_float, int64_t parts) {
  return 2 * 32 * kPanel + 4 * kTiledPixels + kTiledPixels * parts * rounded_row(channels, per_float);
}

// kWinograd computes squares of 4x4 outputs, so many at a time.
constexpr int64_t kSquares = 12;
inline int64_t squares(const PlanMap& out) { return (out.height + 3) / 4 * ((out.width + 3) / 4); }
inline int64_t winograd_scratch(int64_t in_channels, int64_t out_channels) {
  const int64_t in = (in_channels + kPad - 1) / kPad * kPad, out = (out_channels + kPad - 1) / kPad * kPad;
  return 36 * kSquares * (in + out) + out + kPad;
}

// Whether a convolution to one channel goes over planes instead of pixels.
inline bool to_one(const PlanStep& s, int64_t in_channels, int64_t out_channels) {
  return out_channels == 1 && in_channels <= 4 && s.stride == 1 && s.kernel > 1 && s.other < 0;
}

}  // namespace fastpose
