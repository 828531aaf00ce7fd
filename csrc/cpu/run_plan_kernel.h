// The instructions of cpu/run_plan.h. Compiled once per instruction set level; see cpu/foreach_isa.h.
#include "cpu/vec.h"
#include "cpu/plan/common.h"
#include "cpu/plan/product.h"
#include "cpu/plan/rounded.h"
#if FASTPOSE_AMX
#include "cpu/plan/amx.h"

namespace fastpose {
namespace amx {

struct PlanLevel {
  static void combine(const PlanTask& t) { avx512::PlanLevel::combine(t); }
  static void run(const PlanTask& t, int64_t tile, float* scratch) {
    switch (t.step->op) {
      case PlanOp::kConvSplit: return conv_tiles<Factors::kPairs, true>(t, tile, scratch);
      case PlanOp::kConvBf16: return conv_tiles<Factors::kPairs, false>(t, tile, scratch);
      case PlanOp::kConvInt8: return conv_tiles<Factors::kBytes, false>(t, tile, scratch);
      default: return avx512::PlanLevel::run(t, tile, scratch);
    }
  }
};

}  // namespace amx
}  // namespace fastpose

#elif FASTPOSE_VNNI

namespace fastpose {
namespace FASTPOSE_ISA {

// These levels have one product more than the one below each; the rest is there already.
struct PlanLevel {
  static void combine(const PlanTask& t) { avx512::PlanLevel::combine(t); }
  static void run(const PlanTask& t, int64_t tile, float* scratch) {
#if FASTPOSE_BF16
    if (t.step->op == PlanOp::kConvBf16) return conv_bf16(t, tile, scratch);
    avx512_vnni::PlanLevel::run(t, tile, scratch);
#else
    if (t.step->op == PlanOp::kConvInt8) return conv_int8(t, tile, scratch);
    avx512::PlanLevel::run(t, tile, scratch);
#endif
  }
};

}  // namespace FASTPOSE_ISA
}  // namespace fastpose

#else
#include "cpu/plan/convolution.h"
#include "cpu/plan/winograd.h"
#include "cpu/plan/to_one.h"
#include "cpu/plan/depthwise.h"
#include "cpu/plan/reductions.h"
#include "cpu/plan/group_attention.h"
#include "cpu/plan/pointwise.h"
#include "cpu/plan/moving.h"

namespace fastpose {
namespace FASTPOSE_ISA {

struct PlanLevel {
  // What is left of a reduction when all its tiles are done.
  static void combine(const PlanTask& t) {
    switch (t.step->op) {
      case PlanOp::kMax: return combine_tiles<false, true>(t);
      case PlanOp::kMeanMax: return combine_tiles<true, true>(t);
      default: return combine_tiles<true, false>(t);
    }
  }
  static void run(const PlanTask& t, int64_t tile, float* scratch) {
    switch (t.step->op) {
      case PlanOp::kConv:
        return to_one(*t.step, t.in.channels, t.out.channels) ? conv_to_one(t, tile, scratch) : conv(t, tile, scratch);
      case PlanOp::kConvBf16: return conv_bf16(t, tile, scratch);
      case PlanOp::kConvInt8: return conv_int8(t, tile, scratch);
      case PlanOp::kConvSplit: return conv_split(t, tile, scratch);
      case PlanOp::kDepthwise: return depthwise(t, tile, scratch);
      case PlanOp::kUpsample: return upsample(t, tile);
      case PlanOp::kMean:
      case PlanOp::kSum: return reduce<true, false>(t, tile);
      case PlanOp::kMax: return reduce<false, true>(t, tile);
      case PlanOp::kMeanMax: return reduce<true, true>(t, tile);
      case PlanOp::kMeanOfRows: return mean_of_rows(t, tile);
      case PlanOp::kMeanOfColumns: return mean_of_columns(t, tile);
      case PlanOp::kCoordinateMean: return coordinate_mean(t, tile);
      case PlanOp::kGroupSoftmax: return group_softmax(t);
      case PlanOp::kGroupAttention: return group_attention(t, tile, scratch);
      case PlanOp::kDeconv: return deconv(t, tile, scratch);
      case PlanOp::kWinograd: return winograd(t, tile, scratch);
      case PlanOp::kMaxPool: return max_pool(t, tile);
      case PlanOp::kShuffle: return shuffle(t, tile);
      case PlanOp::kStack: return stack(t);
      case PlanOp::kCopy: return copy_map(t, tile);
      case PlanOp::kInterleave: return interleave(t, tile);
      case PlanOp::kAveragePool: return average_pool(t, tile);
      case PlanOp::kBilinear: return bilinear(t, tile);
      case PlanOp::kBand: return band(t, scratch);
      case PlanOp::kChannelStats: return channel_stats(t, tile);
      case PlanOp::kScale: return pointwise<PlanOp::kScale>(t, tile);
      case PlanOp::kScalePixels: return pointwise<PlanOp::kScalePixels>(t, tile);
      case PlanOp::kAdd: return pointwise<PlanOp::kAdd>(t, tile);
      case PlanOp::kMultiply: return pointwise<PlanOp::kMultiply>(t, tile);
      case PlanOp::kOuter: return pointwise<PlanOp::kOuter>(t, tile);
      default: return pointwise<PlanOp::kActivate>(t, tile);
    }
  }
};

}  // namespace FASTPOSE_ISA
}  // namespace fastpose
#endif
