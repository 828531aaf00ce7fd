// Runs the instruction list of an optimised network (cpu/run_plan.h): one call, one team of threads, one block of
// memory.
//
// With at least as many images as threads every thread takes whole images, so nothing waits and a thread's maps stay in
// its own cache. With fewer, all threads work on one image. Either way instructions that need only their own pixels of
// what the one before made form a group, which is cut into tiles: a tile passes through all of them while it is in a
// cache. Threads begin with the tiles of their own part of the image and help the others when done; the next group
// begins when all tiles are. Whoever comes takes part: fewer threads than asked for, even one, finish the work, so a
// nested or a busy pool cannot deadlock.
#include "cpu/run_plan.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/depthwise.h"

#define FASTPOSE_USES_VNNI
#define FASTPOSE_KERNEL_FILE "cpu/run_plan_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastpose {
namespace {

constexpr int64_t kOldest = 3, kVersion = 4;  // the latter has kConvSplit and gates of kConvBf16
constexpr int64_t kStepFields = 14;
constexpr int kArenaSlot = 1, kGatherSlot = 2;

struct Plan {
  // per map; `base` is the map itself or the one of whose channels it is those from `first` on
  std::vector<int64_t> channels, base, first;
  std::vector<PlanStep> steps;
  std::vector<int64_t> outputs, last_use;  // the latter of bases
  int64_t input = 0;
  const float* weights = nullptr;
};

// A plan for images of one size: where every map lies in a block of memory.
struct Layout {
  std::vector<PlanMap> maps;
  std::vector<int64_t> offset;
  std::vector<size_t> group_end;                // of the group that each step belongs to, see `Groups`
  int64_t floats = 0, gather = 0, reduced = 0;  // the last: channels, padded, of the widest reduction
};

Plan parse(const Tensor& program, const Tensor& weights) {
  const char* op = "run_plan";
  FASTPOSE_CHECK(program.dim() == 1 && program.scalar_type() == ScalarType::Long && program.is_contiguous(), op,
                 ": program must be a contiguous int64 [n]");
  FASTPOSE_CHECK(weights.dim() == 1 && weights.scalar_type() == ScalarType::Float && weights.is_contiguous(), op,
                 ": weights must be a contiguous float32 [n], got ", name(weights.scalar_type()), " ", shape(weights));
  const int64_t* p = static_cast<const int64_t*>(program.const_data_ptr());
  const int64_t length = program.size(0);
  FASTPOSE_CHECK(length >= 5 && p[0] >= kOldest && p[0] <= kVersion, op, ": program of version ",
                 length > 0 ? p[0] : -1, ", this library runs version ", kVersion, "; optimise the model again");
  const int64_t maps = p[1], steps = p[2], outputs = p[4];
  FASTPOSE_CHECK(maps > 0 && steps >= 0 && outputs > 0 && maps < (1 << 20) && steps < (1 << 20) && outputs <= maps &&
                     length == 5 + outputs + 3 * maps + steps * kStepFields,
                 op, ": program is damaged (length)");
  Plan plan;
  plan.input = p[3];
  plan.outputs.assign(p + 5, p + 5 + outputs);
  const int64_t* of_maps = p + 5 + outputs;
  plan.channels.assign(of_maps, of_maps + maps);
  plan.base.assign(of_maps + maps, of_maps + 2 * maps);
  plan.first.assign(of_maps + 2 * maps, of_maps + 3 * maps);
  plan.weights = static_cast<const float*>(weights.const_data_ptr());
  plan.last_use.assign(static_cast<size_t>(maps), -1);
  const auto valid = [&](int64_t m) { return m >= 0 && m < maps; };
  FASTPOSE_CHECK(valid(plan.input), op, ": program is damaged (input)");
  int64_t total = 0;
  for (const int64_t c : plan.channels) {
    FASTPOSE_CHECK(c > 0 && c < (1 << 20) && (total += c) < (1 << 28), op, ": program is damaged (channels)");
  }
  for (size_t m = 0; m < plan.channels.size(); ++m) {
    const int64_t base = plan.base[m], first = plan.first[m];
    const size_t b = static_cast<size_t>(valid(base) ? base : 0);
    FASTPOSE_CHECK(valid(base) && plan.base[b] == base && plan.first[b] == 0 && first >= 0 && first < (1 << 20) &&
                       first + plan.channels[m] <= plan.channels[b] && (base != plan.input || m == b),
                   op, ": program is damaged (map ", m, ")");
  }
  // Which channels have been written, a bit each: every one is once, and before it is read.
  std::vector<std::vector<uint64_t>> written(static_cast<size_t>(maps));
  const auto each_word = [&](int64_t m, const auto& f) {
    const size_t i = static_cast<size_t>(m), base = static_cast<size_t>(plan.base[i]);
    written[base].resize(static_cast<size_t>(ceil_div(plan.channels[base], 64)));
    const int64_t begin = plan.first[i], end = begin + plan.channels[i];
    for (int64_t c = begin / 64 * 64; c < end; c += 64) {
      const uint64_t above = c < begin ? ~uint64_t{0} << (begin - c) : ~uint64_t{0};
      const uint64_t below = end - c < 64 ? ~(~uint64_t{0} << (end - c)) : ~uint64_t{0};
      f(written[base][static_cast<size_t>(c / 64)], above & below);
    }
  };
  const auto mark = [&](int64_t m) { each_word(m, [](uint64_t& word, uint64_t mask) { word |= mask; }); };
  const auto readable = [&](int64_t m) {
    bool all = true;
    each_word(m, [&](uint64_t word, uint64_t mask) { all = all && (word & mask) == mask; });
    return all;
  };
  const auto untouched = [&](int64_t m) {
    bool none = true;
    each_word(m, [&](uint64_t word, uint64_t mask) { none = none && (word & mask) == 0; });
    return none;
  };
  mark(plan.input);
  const int64_t* q = of_maps + 3 * maps;
  for (int64_t i = 0; i < steps; ++i, q += kStepFields) {
    float constant;
    const int32_t bits = static_cast<int32_t>(q[12]);
    std::memcpy(&constant, &bits, sizeof(constant));
    const PlanStep s{static_cast<PlanOp>(q[0]),  q[1], q[2],  q[3],  q[4],     q[5], q[6], q[7],
                     static_cast<PlanAct>(q[8]), q[9], q[10], q[11], constant, q[13]};
    bool ok = q[0] >= 0 && q[0] <= static_cast<int64_t>(PlanOp::kConvSplit) && q[8] >= 0 &&
              q[8] <= static_cast<int64_t>(PlanAct::kRelu6);
    for (const int64_t m : {s.in, s.other, s.gate, s.second}) {
      if (m == -1 && m != s.in) continue;
      ok = ok && valid(m) && readable(m);
      if (ok) plan.last_use[static_cast<size_t>(plan.base[static_cast<size_t>(m)])] = i;
    }
    ok = ok && valid(s.out) && untouched(s.out);
    FASTPOSE_CHECK(ok, op, ": program is damaged (step ", i, ")");
    mark(s.out);
    plan.last_use[static_cast<size_t>(plan.base[static_cast<size_t>(s.out)])] = i;
    const int64_t in_channels = plan.channels[static_cast<size_t>(s.in)];
    const int64_t out_channels = plan.channels[static_cast<size_t>(s.out)];
    const int64_t out_stride = ceil_div(out_channels, kPad) * kPad;
    int64_t needed = 0;
    if (s.op == PlanOp::kConv) {
      ok = s.kernel >= 1 && s.kernel <= 31 && s.stride >= 1 && s.stride <= 31 && s.padding >= 0 && s.padding < s.kernel;
      needed = s.kernel * s.kernel * in_channels * out_stride;
    } else if (s.op == PlanOp::kConvBf16) {
      needed = ceil_div(in_channels, 2) * out_stride;
    } else if (s.op == PlanOp::kConvInt8) {
      needed = ceil_div(in_channels, 4) * out_stride;
    } else if (s.op == PlanOp::kConvSplit) {
      needed = 2 * ceil_div(in_channels, 2) * out_stride;
    } else if (s.op == PlanOp::kWinograd) {
      needed = 36 * in_channels * out_stride;
    } else if (s.op == PlanOp::kDeconv) {
      needed = 16 * in_channels * out_stride;
    } else if (s.op == PlanOp::kMeanMax) {
      ok = out_channels == 2 * in_channels;
    } else if (s.op == PlanOp::kInterleave) {
      ok = s.other >= 0 && out_channels == 2 * in_channels;
    } else if (s.op == PlanOp::kChannelStats) {
      ok = out_channels <= 2;
    } else {
      ok = in_channels == out_channels;
      if (s.op == PlanOp::kDepthwise) {
        ok = ok && (s.kernel == 3 || s.kernel == 5 || s.kernel == 7) && (s.stride == 1 || s.stride == 2) &&
             s.padding == s.kernel / 2;
        needed = s.kernel * s.kernel * out_stride;
      } else if (s.op == PlanOp::kUpsample) {
        needed = 16 * out_stride;
      } else if (s.op == PlanOp::kAveragePool) {
        ok = ok && s.kernel >= 1 && s.kernel <= 64;
      } else if (s.op == PlanOp::kAdd) {
        ok = ok && s.kernel >= 1 && s.kernel <= 64;
      } else if (s.op == PlanOp::kBand) {
        ok = ok && s.kernel % 2 == 1 && s.kernel >= 1 && s.kernel <= 63;
        needed = s.kernel;
      } else if (s.op == PlanOp::kMaxPool) {
        ok = ok && s.kernel >= 1 && s.kernel <= 64 && s.stride >= 1 && s.stride <= 64 && s.padding >= 0 &&
             s.padding < s.kernel;
      } else if (s.op == PlanOp::kGroupSoftmax || s.op == PlanOp::kShuffle) {
        ok = ok && s.kernel >= 1 && s.kernel <= in_channels && in_channels % s.kernel == 0;
      } else if (s.op == PlanOp::kGroupAttention) {
        ok = ok && in_channels % kPad == 0;
        needed = 49 * out_stride;
      }
    }
    if (needed > 0) {
      ok =
          ok && s.weight >= 0 && s.weight <= weights.size(0) - needed && s.bias >= 0 &&
          s.bias <= weights.size(0) - (s.op == PlanOp::kBand ? kPad : (s.op == PlanOp::kConvInt8 ? 3 : 1) * out_stride);
    }
    const auto has = [&](int64_t m, int64_t channels) {
      return m < 0 || plan.channels[static_cast<size_t>(m)] == channels;
    };
    ok = ok && has(s.other, s.op == PlanOp::kInterleave ? in_channels : out_channels);
    const int64_t per_group = s.op == PlanOp::kGroupAttention ? 4 : 0;
    ok = ok && has(s.gate, s.op == PlanOp::kScalePixels || s.op == PlanOp::kOuter ? 1 : in_channels + per_group);
    ok = ok && s.other != plan.input &&
         (s.op == PlanOp::kConv || s.op == PlanOp::kDeconv || s.in != plan.input);  // whose pixels are not padded
    const bool gated = s.op == PlanOp::kScale || s.op == PlanOp::kScalePixels || s.op == PlanOp::kOuter ||
                       s.op == PlanOp::kCoordinateMean || s.op == PlanOp::kGroupAttention;
    const bool may_be_gated = gated || s.op == PlanOp::kDepthwise || s.op == PlanOp::kInterleave ||
                              s.op == PlanOp::kAdd || s.op == PlanOp::kChannelStats || s.op == PlanOp::kConvSplit ||
                              s.op == PlanOp::kConvBf16 ||
                              (s.op == PlanOp::kConv && s.kernel == 1 && s.stride == 1 && s.in != plan.input);
    ok = ok && s.second != plan.input &&
         (s.second < 0 || (s.op == PlanOp::kScalePixels && has(s.second, in_channels)) ||
          (s.op == PlanOp::kInterleave && has(s.second, 1)));
    const bool summed = s.op == PlanOp::kAdd || s.op == PlanOp::kMultiply;
    const bool paired =
        summed || s.op == PlanOp::kStack || s.op == PlanOp::kInterleave || s.op == PlanOp::kCoordinateMean;
    ok = ok && (s.gate >= 0 ? may_be_gated : !gated) && (s.other >= 0 || !paired) && s.gate != plan.input;
    ok = ok && s.factor >= 1 && s.factor <= 64 &&
         (s.factor == 1 || summed || s.op == PlanOp::kOuter || s.op == PlanOp::kCopy);
    FASTPOSE_CHECK(ok, op, ": program is damaged (operands of step ", i, ")");
    plan.steps.push_back(s);
  }
  for (const int64_t m : plan.outputs) {
    FASTPOSE_CHECK(valid(m) && readable(m) && m != plan.input, op, ": program is damaged (outputs)");
    plan.last_use[static_cast<size_t>(plan.base[static_cast<size_t>(m)])] = steps;
  }
  return plan;
}

// Maps of one or two channels no pixel of which is read or written as a vector: pixel statistics and gates. They are
// not padded, sixteen or eight times fewer bytes.
std::vector<char> narrow_maps(const Plan& plan) {
  std::vector<char> narrow(plan.channels.size());
  for (size_t m = 0; m < narrow.size(); ++m) narrow[m] = plan.channels[m] <= 2;
  const auto wide = [&](int64_t m) {
    if (m >= 0) narrow[static_cast<size_t>(plan.base[static_cast<size_t>(m)])] = false;
  };
  for (size_t m = 0; m < narrow.size(); ++m) {
    if (plan.base[m] != static_cast<int64_t>(m)) wide(plan.base[m]);
  }
  for (const PlanStep& s : plan.steps) {
    const bool planes = s.op == PlanOp::kConv &&
                        to_one(s, plan.channels[static_cast<size_t>(s.in)], plan.channels[static_cast<size_t>(s.out)]);
    if (!planes) wide(s.in);
    if (!planes && s.op != PlanOp::kChannelStats) wide(s.out);
    wide(s.other);
    if (s.op != PlanOp::kScalePixels && s.op != PlanOp::kOuter) wide(s.gate);
    if (s.op != PlanOp::kInterleave) wide(s.second);
  }
  return narrow;
}

// So that no size overflows; memory ends long before.
void check_product(int64_t a, int64_t b, int64_t c) {
  const double product = static_cast<double>(a) * static_cast<double>(b) * static_cast<double>(c);
  FASTPOSE_CHECK(product < 0x1p44, "run_plan: a map of ", product, " numbers is too large");
}

// Which numbers of its result a tile of an instruction makes, or, of a reduction, reads.
enum class Tiles { kPixels, kRows, kPairsOfRows, kReduction, kOther };

Tiles tiles_of(const PlanStep& s, int64_t in_channels, int64_t out_channels) {
  switch (s.op) {
    case PlanOp::kConv:
      if (far_weights(s.kernel * s.kernel * in_channels, out_channels)) return Tiles::kOther;
      return to_one(s, in_channels, out_channels) ? Tiles::kRows : Tiles::kPixels;
    case PlanOp::kDepthwise:
    case PlanOp::kGroupAttention: return Tiles::kRows;
    case PlanOp::kUpsample:
    case PlanOp::kDeconv: return Tiles::kPairsOfRows;
    case PlanOp::kMean:
    case PlanOp::kSum:
    case PlanOp::kMax:
    case PlanOp::kMeanMax: return Tiles::kReduction;
    case PlanOp::kWinograd:
    case PlanOp::kStack:
    case PlanOp::kBand:
    case PlanOp::kGroupSoftmax:
    case PlanOp::kMeanOfColumns:
    case PlanOp::kCoordinateMean: return Tiles::kOther;
    default: return Tiles::kPixels;
  }
}

Tiles tiles_of(const PlanTask& t) { return tiles_of(*t.step, t.in.channels, t.out.channels); }

// Whether each pixel of the result needs only the same pixel of the maps (and gates of one pixel).
bool by_pixel(const PlanStep& s) {
  switch (s.op) {
    case PlanOp::kConv: return s.kernel == 1 && s.stride == 1;
    case PlanOp::kConvBf16:
    case PlanOp::kConvInt8:
    case PlanOp::kConvSplit:
    case PlanOp::kScale:
    case PlanOp::kActivate:
    case PlanOp::kInterleave:
    case PlanOp::kChannelStats:
    case PlanOp::kScalePixels:
    case PlanOp::kShuffle:
    case PlanOp::kMean:
    case PlanOp::kSum:
    case PlanOp::kMax:
    case PlanOp::kMeanMax: return true;
    case PlanOp::kAdd: return s.factor == 1 && (s.gate < 0 || s.kernel == 1);
    case PlanOp::kMultiply:
    case PlanOp::kCopy: return s.factor == 1;
    default: return false;
  }
}

// Steps that can follow each other tile by tile, without waiting for other tiles: they make maps of one size, the last
// may reduce one, and of what an earlier one made each reads the pixels of its own tile only. Between groups threads
// wait for each other.
struct Groups {
  const Plan& plan;
  int64_t height = 0, width = 0;
  bool open = false;
  std::vector<int64_t> made{};  // bases

  // Whether step `s` joins the group before it; otherwise it begins one.
  bool joins(const PlanStep& s, const PlanMap& in, const PlanMap& out) {
    const Tiles tiles = tiles_of(s, in.channels, out.channels);
    const PlanMap& size = tiles == Tiles::kReduction ? in : out;
    const auto inside = [&](int64_t m) {
      return m >= 0 && std::count(made.begin(), made.end(), plan.base[static_cast<size_t>(m)]) > 0;
    };
    const bool reads = inside(s.in) || inside(s.other) || inside(s.gate) || inside(s.second);
    const bool joined =
        open && tiles != Tiles::kOther && size.height == height && size.width == width && (!reads || by_pixel(s));
    if (!joined) {
      made.clear();
      height = size.height;
      width = size.width;
    }
    made.push_back(plan.base[static_cast<size_t>(s.out)]);
    open = tiles != Tiles::kOther && tiles != Tiles::kReduction;
    return joined;
  }
};

// Sizes of all maps for input images of height x width, and their places: a map takes the first gap that is free from
// the group of the first step that writes to it to that of the last that reads it; if it can, one that a map of the
// same size had before, whose pixels are in the caches of the same threads.
Layout lay_out(const Plan& plan, int64_t height, int64_t width) {
  Layout l;
  l.maps.resize(plan.channels.size());
  l.offset.assign(plan.channels.size(), -1);
  const std::vector<char> narrow = narrow_maps(plan);
  for (size_t m = 0; m < l.maps.size(); ++m) {
    l.maps[m].channels = plan.channels[m];
    const size_t base = static_cast<size_t>(plan.base[m]);
    const int64_t stride = narrow[base] ? plan.channels[base] : ceil_div(plan.channels[base], kPad) * kPad;
    l.maps[m].stride = stride;
    // behind the last channels there is only padding
    const bool last = plan.first[m] + plan.channels[m] == plan.channels[base];
    l.maps[m].room = last ? stride - plan.first[m] : plan.channels[m];
  }
  PlanMap& input = l.maps[static_cast<size_t>(plan.input)];
  input.stride = input.channels;
  input.height = height;
  input.width = width;
  struct Used {
    int64_t begin, end, map;
  };
  std::vector<Used> used;  // sorted by begin
  std::vector<std::pair<int64_t, int64_t>> places;
  const auto place = [&](int64_t m) {
    const PlanMap& map = l.maps[static_cast<size_t>(m)];
    check_product(map.height, map.width, map.stride);
    const int64_t size = ceil_div(map.pixels() * map.stride, 16) * 16;
    int64_t begin = 0;
    size_t at = 0;
    const auto free = [&](const auto& past) {
      const auto [first, last] = past;
      return last - first == size && std::none_of(used.begin(), used.end(), [=](const Used& other) {
               return other.begin < last && first < other.end;
             });
    };
    const auto again = std::find_if(places.begin(), places.end(), free);
    if (again != places.end()) {
      begin = again->first;
      while (at < used.size() && used[at].begin < begin) ++at;
    } else {
      for (; at < used.size() && used[at].begin - begin < size; ++at) begin = used[at].end;
      places.push_back({begin, begin + size});
    }
    used.insert(used.begin() + static_cast<std::ptrdiff_t>(at), {begin, begin + size, m});
    l.offset[static_cast<size_t>(m)] = begin;
    l.floats = std::max(l.floats, begin + size);
  };
  place(plan.input);
  const bool tiled = isa() == Isa::kAmx;
  Groups groups{plan};
  const auto sized = [&](int64_t m) -> const PlanMap& {  // a map that has been written to
    const PlanMap& base = l.maps[static_cast<size_t>(plan.base[static_cast<size_t>(m)])];
    PlanMap& map = l.maps[static_cast<size_t>(m)];
    map.height = base.height;
    map.width = base.width;
    return map;
  };
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const PlanStep& s = plan.steps[i];
    const PlanMap& in = sized(s.in);
    PlanMap& out = l.maps[static_cast<size_t>(s.out)];
    out.height = in.height;
    out.width = in.width;
    if (s.op == PlanOp::kConv || s.op == PlanOp::kDepthwise || s.op == PlanOp::kMaxPool) {
      out.height = (in.height + 2 * s.padding - s.kernel) / s.stride + 1;
      out.width = (in.width + 2 * s.padding - s.kernel) / s.stride + 1;
      FASTPOSE_CHECK(in.height + 2 * s.padding >= s.kernel && in.width + 2 * s.padding >= s.kernel,
                     "run_plan: images of ", height, " x ", width, " are too small for this network");
      if (s.op == PlanOp::kConv) {
        const int64_t depth = s.kernel * s.kernel * in.channels;
        const bool gathers = s.kernel > 1 || s.stride > 1;
        const int64_t at_once = far_weights(depth, out.channels) ? kFarRows : kMostRows;
        if (gathers) l.gather = std::max(l.gather, at_once * depth);
        if (s.gate >= 0) l.gather = std::max(l.gather, kMostRows * ceil_div(in.channels, kPad) * kPad);
        const int64_t line = in.width + 2 * s.padding + kPad;  // of a plane, see conv_to_one
        if (to_one(s, in.channels, out.channels)) {
          check_product(in.channels, out.height + s.kernel, line);
          l.gather = std::max(l.gather, in.channels * (out.height + s.kernel) * line);
        }
      }
    } else if (s.op == PlanOp::kAveragePool) {
      out.height = in.height / s.kernel;
      out.width = in.width / s.kernel;
      FASTPOSE_CHECK(out.pixels() > 0, "run_plan: images of ", height, " x ", width, " are too small for this network");
    } else if (s.op == PlanOp::kCopy) {
      out.height = s.factor * in.height;
      out.width = s.factor * in.width;
    } else if (s.op == PlanOp::kUpsample || s.op == PlanOp::kBilinear || s.op == PlanOp::kDeconv) {
      out.height = 2 * in.height;
      out.width = 2 * in.width;
      if (s.op == PlanOp::kDeconv) l.gather = std::max(l.gather, kMostRows * 4 * in.channels);
    } else if (s.op == PlanOp::kMean || s.op == PlanOp::kMax || s.op == PlanOp::kSum || s.op == PlanOp::kMeanMax ||
               s.op == PlanOp::kCoordinateMean) {
      out.height = out.width = 1;
    } else if (s.op == PlanOp::kWinograd) {
      l.gather = std::max(l.gather, winograd_scratch(in.channels, out.channels));
    } else if (s.op == PlanOp::kConvBf16) {
      const int64_t gated = ceil_div(in.channels, kPad) * kPad;
      l.gather = std::max(l.gather,
                          tiled ? tiled_scratch(in.channels, 2, 1) : kMostRows * rounded_row(in.channels, 1) + gated);
    } else if (s.op == PlanOp::kConvInt8) {
      l.gather = std::max(l.gather,
                          tiled ? tiled_scratch(in.channels, 4, 1) : kScales + kMostRows * rounded_row(in.channels, 4));
    } else if (s.op == PlanOp::kConvSplit) {
      const int64_t weights = in.channels * ceil_div(out.channels, kPad) * kPad;
      l.gather = std::max(l.gather, tiled ? tiled_scratch(in.channels, 2, 2)
                                          : weights + kMostRows * ceil_div(in.channels, kPad) * kPad);
    } else if (s.op == PlanOp::kMeanOfRows) {
      out.width = 1;
    } else if (s.op == PlanOp::kMeanOfColumns) {
      out.height = 1;
    } else if (s.op == PlanOp::kGroupSoftmax) {
      FASTPOSE_CHECK(in.pixels() == 1, "run_plan: a map has more than one pixel in step ", i);
    } else if (s.op == PlanOp::kGroupAttention) {
      l.gather = std::max(l.gather, group_attention_scratch(in));
    }
    if (s.op == PlanOp::kOuter) {
      const PlanMap& gate = sized(s.gate);
      FASTPOSE_CHECK(in.pixels() == 1, "run_plan: a map has more than one pixel in step ", i);
      out.height = s.factor * gate.height;
      out.width = s.factor * gate.width;
    }
    if (s.op == PlanOp::kCoordinateMean) {
      const PlanMap &rows = sized(s.other), &columns = sized(s.gate);
      FASTPOSE_CHECK(rows.height == in.height && rows.width == 1 && columns.height == 1 && columns.width == in.width,
                     "run_plan: images of ", height, " x ", width, " give a gate of another size in step ", i);
    } else if (s.other >= 0) {
      const PlanMap& other = sized(s.other);
      const int64_t factor = s.op == PlanOp::kOuter ? 1 : s.factor;
      FASTPOSE_CHECK(other.height * factor == out.height && other.width * factor == out.width, "run_plan: images of ",
                     height, " x ", width, " give maps of different sizes in step ", i);
    }
    if (s.op == PlanOp::kStack) {
      FASTPOSE_CHECK(in.pixels() == 1, "run_plan: stacked maps must have one pixel in step ", i);
      out.width = 2;
    }
    if (s.op == PlanOp::kBand) {
      l.gather = std::max(l.gather, in.stride + s.kernel);
      FASTPOSE_CHECK(in.pixels() == 1, "run_plan: a map has more than one pixel in step ", i);
    }
    const int64_t by_pixel = s.op == PlanOp::kScalePixels ? s.gate : s.op == PlanOp::kInterleave ? s.second : -1;
    if (by_pixel >= 0) {
      const PlanMap& gate = sized(by_pixel);
      FASTPOSE_CHECK(gate.height == out.height && gate.width == out.width, "run_plan: images of ", height, " x ", width,
                     " give a gate of another size in step ", i);
    }
    if (s.op == PlanOp::kScalePixels && s.second >= 0) {
      FASTPOSE_CHECK(sized(s.second).pixels() == 1, "run_plan: a gate has pixels in step ", i);
    }
    if (s.op == PlanOp::kAdd && s.gate >= 0) {
      const PlanMap& third = sized(s.gate);
      FASTPOSE_CHECK(third.height * s.kernel == out.height && third.width * s.kernel == out.width,
                     "run_plan: images of ", height, " x ", width, " give maps of different sizes in step ", i);
    } else if (s.gate >= 0 && s.op != PlanOp::kScalePixels && s.op != PlanOp::kOuter &&
               s.op != PlanOp::kCoordinateMean) {
      FASTPOSE_CHECK(sized(s.gate).pixels() == 1, "run_plan: a gate has pixels in step ", i);
    }
    if (s.op == PlanOp::kDepthwise && s.gate >= 0) {
      l.gather = std::max(l.gather, s.kernel * s.kernel * ceil_div(out.channels, kPad) * kPad);
    }
    if (groups.joins(s, in, out)) {
      for (size_t j = i; j-- > 0 && l.group_end[j] == i;) l.group_end[j] = i + 1;
    } else {
      for (size_t u = used.size(); u-- > 0;) {
        const int64_t last = plan.last_use[static_cast<size_t>(used[u].map)];
        if (last < static_cast<int64_t>(i)) used.erase(used.begin() + static_cast<std::ptrdiff_t>(u));
      }
    }
    l.group_end.push_back(i + 1);
    if (tiles_of(s, in.channels, out.channels) == Tiles::kReduction) {
      l.reduced = std::max(l.reduced, ceil_div(in.channels, kPad) * kPad);
    }
    const int64_t base = plan.base[static_cast<size_t>(s.out)];
    PlanMap& whole = l.maps[static_cast<size_t>(base)];
    if (l.offset[static_cast<size_t>(base)] < 0) {
      whole.height = out.height;
      whole.width = out.width;
      place(base);
    }
    FASTPOSE_CHECK(whole.height == out.height && whole.width == out.width, "run_plan: images of ", height, " x ", width,
                   " give maps of different sizes in step ", i);
  }
  for (size_t m = 0; m < l.maps.size(); ++m) {
    const size_t base = static_cast<size_t>(plan.base[m]);
    if (base != m && l.offset[base] >= 0) {
      l.offset[m] = l.offset[base] + plan.first[m];
      sized(static_cast<int64_t>(m));
    }
  }
  return l;
}

// What calls of this thread worked out; the next one is likely to be for one of the same networks, at the same size.
struct Prepared {
  std::vector<int64_t> program;
  int64_t weights = 0, height = 0, width = 0;
  Plan plan;
  Layout layout;
  int64_t number = 0;  // of the layout, which no other has
};
constexpr size_t kPrepared = 4;  // networks taken in turn, a detector's and a few pose networks, say

const Prepared& prepare(const Tensor& program, const Tensor& weights, int64_t height, int64_t width) {
  thread_local std::array<Prepared, kPrepared> kept;
  thread_local size_t oldest = 0;
  const bool flat = program.scalar_type() == ScalarType::Long && program.dim() == 1 && program.is_contiguous();
  const bool usable =
      flat && weights.dim() == 1 && weights.scalar_type() == ScalarType::Float && weights.is_contiguous();
  const size_t length = flat ? static_cast<size_t>(program.size(0)) : 0;
  const auto same = [&](const Prepared& p) {
    return usable && length > 0 && p.program.size() == length && p.weights == weights.size(0) &&
           std::memcmp(p.program.data(), program.const_data_ptr(), length * sizeof(int64_t)) == 0;
  };
  const auto found = std::find_if(kept.begin(), kept.end(), same);
  Prepared& p = found != kept.end() ? *found : kept[oldest];
  if (found == kept.end()) {
    p.program.clear();  // should parse throw
    p.weights = 0;
    p.plan = parse(program, weights);
    p.height = 0;
    const int64_t* numbers = static_cast<const int64_t*>(program.const_data_ptr());
    p.program.assign(numbers, numbers + program.size(0));
    p.weights = weights.size(0);
    oldest = (oldest + 1) % kPrepared;
  }
  p.plan.weights = static_cast<const float*>(weights.const_data_ptr());
  if (p.height != height || p.width != width) {
    p.height = 0;
    p.layout = lay_out(p.plan, height, width);
    static std::atomic<int64_t> layouts{0};
    p.number = ++layouts;
    p.height = height;
    p.width = width;
  }
  return p;
}

// About how many cycles of one core an instruction takes, to decide whether it is worth sharing.
int64_t cycles(const PlanTask& t) {
  const int64_t k = t.step->kernel, numbers = t.out.pixels() * t.out.channels, read = t.in.pixels() * t.in.channels;
  switch (t.step->op) {
    case PlanOp::kConv: return numbers * k * k * t.in.channels / 16;
    case PlanOp::kConvBf16: return numbers * t.in.channels / 32;
    case PlanOp::kConvInt8:
    case PlanOp::kConvSplit: return numbers * t.in.channels / 64 + read;
    case PlanOp::kWinograd: return numbers * t.in.channels / 4;
    case PlanOp::kDeconv: return numbers * t.in.channels / 4;
    case PlanOp::kDepthwise: return numbers * k * k / 8;
    case PlanOp::kGroupAttention: return numbers * 6;
    default: return (numbers + read) / 4;
  }
}
constexpr int64_t kWorthSharing = 4000;  // cycles; handing work over costs some hundreds
// Cycles of a thread's share from which it is cut into several tiles, at most four, so that one who is interrupted does
// not hold up the others for long.
constexpr int64_t kLongTile = 100000;
// Bytes of the maps of a group from which it is cut however long it takes, so that what a tile leaves for the next
// instruction stays in the cache of one core.
constexpr int64_t kCached = 1 << 20;

// Cuts a group into tiles for `threads`.
void cut_group(PlanTask* begin, PlanTask* end, int64_t threads) {
  const auto numbers = [](const PlanMap& m) { return m.pixels() * m.channels; };
  int64_t work = 0, bytes = numbers(begin->in) * static_cast<int64_t>(sizeof(float));
  for (const PlanTask* t = begin; t < end; ++t) {
    work += cycles(*t);
    bytes += numbers(t->out) * static_cast<int64_t>(sizeof(float));
  }
  int64_t wanted =
      threads == 1 || work < kWorthSharing ? 1 : std::clamp<int64_t>(work / (threads * kLongTile), 1, 4) * threads;
  if (end - begin > 1 && bytes > kCached) {
    wanted = std::max(wanted, ceil_div(ceil_div(bytes, kCached), threads) * threads);
  }
  int64_t rows = 1, unit = 1;
  const PlanStep& s = *begin->step;
  if (tiles_of(end[-1]) == Tiles::kReduction) {
    const ReducedParts parts(end[-1].in);
    rows = end[-1].in.pixels();
    unit = parts.unit;  // whole rows or pairs of them, whatever the others ask for
    const bool even = std::has_single_bit(static_cast<uint64_t>(threads)) || wanted == 1;
    wanted =
        std::min(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(even ? wanted : 2 * wanted))), parts.count);
  } else if (tiles_of(*begin) != Tiles::kOther) {
    const PlanMap& size = begin->out;
    rows = size.pixels();
    for (const PlanTask* t = begin; t < end; ++t) {
      if (tiles_of(*t) == Tiles::kRows) unit = std::lcm(unit, size.width);
      if (tiles_of(*t) == Tiles::kPairsOfRows) unit = std::lcm(unit, 2 * size.width);
    }
    // what the matrix product takes without rest, unless that shares the pixels less evenly
    const int64_t both = std::lcm(unit, kMostRows);
    const auto share = [&](int64_t u) { return ceil_div(ceil_div(rows, u), threads) * u; };
    if (10 * share(both) <= 11 * share(unit)) unit = both;
  } else if (s.op == PlanOp::kConv) {
    // as many pixels as large weights are used for at a time, unless some threads would get none
    rows = begin->out.pixels();
    unit = std::min(ceil_div(ceil_div(rows, threads), kMostRows) * kMostRows, kFarRows);
  } else if (s.op == PlanOp::kWinograd) {
    // as many as the matrix product takes at once; half of them where every thread would not get that many
    rows = squares(begin->out);
    unit = rows < threads * kSquares ? kSquares / 2 : kSquares;
  } else if (s.op == PlanOp::kMeanOfColumns || s.op == PlanOp::kCoordinateMean) {
    rows = begin->in.channels;
    unit = kPad;
  }
  for (PlanTask* t = begin; t < end; ++t) {
    t->units = ceil_div(rows, unit);
    t->tiles = std::min(wanted, t->units);
    t->unit = unit;
    if (tiles_of(*t) == Tiles::kRows && t->step->op != PlanOp::kConv) t->unit = unit / t->out.width;
    if (tiles_of(*t) == Tiles::kPairsOfRows) t->unit = unit / (2 * t->out.width);
  }
}

// Numbers in the block of memory of one image: the maps, some that are read behind them, and the parts of a reduction.
int64_t arena_floats(const Layout& l) { return l.floats + kPad + 2 * kReducedParts * l.reduced; }

// Instructions between two meetings of the threads: a group, or several that one thread does alone.
struct Section {
  size_t begin, end;
  int64_t tiles;
  bool combines;  // whether the last one is a reduction, of which every tile leaves parts
};
// A section's tiles lie in as many parts as there are threads, up to kParts. Each thread begins with its own, which are
// of the same pixels in most instructions, so that it finds in its cache what it wrote before, and then helps the
// others.
constexpr int64_t kParts = 15;
struct alignas(64) Progress {
  std::atomic<int32_t> done{0}, next[kParts]{};
};

// A moment of waiting that leaves the core to its other hardware thread, which may be the one waited for.
inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// The steps on the maps of one image whose block of memory is `arena`, cut for `threads`.
struct Bound {
  std::vector<PlanTask> tasks;
  std::vector<Section> sections;
  int64_t number = 0, threads = 0;
  const float *weights = nullptr, *arena = nullptr;

  // Does nothing if the last call was the same, as it mostly is: for small images this takes a percent of the time.
  void bind(const Prepared& prepared, float* block, int64_t team) {
    const Plan& plan = prepared.plan;
    const Layout& l = prepared.layout;
    if (number == prepared.number && threads == team && weights == plan.weights && arena == block) return;
    number = 0;  // should memory not suffice
    const auto map = [&](int64_t m) {
      PlanMap result;
      if (m >= 0) {
        result = l.maps[static_cast<size_t>(m)];
        result.data = block + l.offset[static_cast<size_t>(m)];
      }
      return result;
    };
    tasks.clear();
    for (const PlanStep& s : plan.steps) {
      tasks.push_back({&s, map(s.in), map(s.other), map(s.gate), map(s.second), map(s.out),
                       plan.weights + std::max<int64_t>(s.weight, 0), plan.weights + std::max<int64_t>(s.bias, 0), 1, 1,
                       1, block + l.floats + kPad});
    }
    sections.clear();
    for (size_t i = 0; i < tasks.size(); i = l.group_end[i]) {
      const size_t end = l.group_end[i];
      cut_group(tasks.data() + i, tasks.data() + end, team);
      const PlanTask& last = tasks[end - 1];
      if (last.tiles == 1 && !sections.empty() && sections.back().tiles == 1) {
        sections.back().end = end;
      } else {
        sections.push_back({i, end, last.tiles, last.tiles > 1 && tiles_of(last) == Tiles::kReduction});
      }
    }
    threads = team;
    weights = plan.weights;
    arena = block;
    number = prepared.number;
  }
};

void run_tile(const Section& section, const std::vector<PlanTask>& tasks, int64_t tile, float* gather) {
  for (size_t i = section.begin; i < section.end; ++i) FASTPOSE_CALL(PlanLevel::run, tasks[i], tile, gather);
}

void read_image(const Tensor& x, int64_t image, const PlanMap& map) {
  const View v(x);
  for (int64_t h = 0; h < map.height; ++h) {
    float* to = map.data + h * map.width * map.stride;
    if (v.c == 1 && v.w == map.channels) {
      std::memcpy(to, v.at<const float>(image, 0, h), static_cast<size_t>(map.width * map.channels) * sizeof(float));
      continue;
    }
    for (int64_t c = 0; c < map.channels; ++c) {
      const float* from = v.at<const float>(image, c, h);
      for (int64_t w = 0; w < map.width; ++w) to[w * map.stride + c] = from[w * v.w];
    }
  }
}

void write_image(const PlanMap& map, int64_t image, const Tensor& y) {
  const View v(y);
  if (v.c == 1) {
    float* to = v.at<float>(image, 0);
    for (int64_t p = 0; p < map.pixels(); ++p) {
      std::memcpy(to + p * map.channels, map.data + p * map.stride, static_cast<size_t>(map.channels) * sizeof(float));
    }
    return;
  }
  for (int64_t c = 0; c < map.channels; ++c) {
    float* to = v.at<float>(image, c);
    for (int64_t p = 0; p < map.pixels(); ++p) to[p] = map.data[p * map.stride + c];
  }
}

std::vector<Tensor> run_plan(const Tensor& x, const Tensor& program, const Tensor& weights,
                             std::vector<int64_t> sizes) {
  FASTPOSE_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, "run_plan: x must be float32 [B, C, H, W], got ",
                 name(x.scalar_type()), " ", shape(x));
  FASTPOSE_CHECK(x.size(2) > 0 && x.size(3) > 0, "run_plan: x must have pixels, got ", shape(x));
  const Prepared& prepared = prepare(program, weights, x.size(2), x.size(3));
  const Plan& plan = prepared.plan;
  const Layout& layout = prepared.layout;
  FASTPOSE_CHECK(x.size(1) == plan.channels[static_cast<size_t>(plan.input)], "run_plan: x must have ",
                 plan.channels[static_cast<size_t>(plan.input)], " channels, got ", shape(x));
  const int64_t images = x.size(0);
  FASTPOSE_CHECK(sizes.size() == 3 * plan.outputs.size(), "run_plan: outputs must hold 3 numbers for each of ",
                 plan.outputs.size(), " outputs, got ", sizes.size());
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < plan.outputs.size(); ++i) {
    const PlanMap& map = layout.maps[static_cast<size_t>(plan.outputs[i])];
    FASTPOSE_CHECK(map.channels == sizes[3 * i], "run_plan: output ", i, " has ", map.channels,
                   " channels, announced were ", sizes[3 * i]);
    outputs.push_back(
        empty({images, map.channels, map.height, map.width}, !x.is_contiguous() && is_channels_last(x), x));
  }
  uint32_t pool = 1;
  torch_get_num_threads(&pool);
  const int64_t threads = pool;

  const auto input = [&](float* arena) {
    PlanMap map = layout.maps[static_cast<size_t>(plan.input)];
    map.data = arena + layout.offset[static_cast<size_t>(plan.input)];
    return map;
  };
  const auto write = [&](float* arena, int64_t image) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      PlanMap map = layout.maps[static_cast<size_t>(plan.outputs[i])];
      map.data = arena + layout.offset[static_cast<size_t>(plan.outputs[i])];
      write_image(map, image, outputs[i]);
    }
  };

  const int64_t alone = threads == 1 ? images : images / threads * threads;  // images done by one thread each
  std::atomic<int64_t> next{0};
  if (alone > 0) {
    parallel_for(threads, 1, [&](int64_t, int64_t) {
      float* arena = scratch<float>(kArenaSlot, arena_floats(layout));
      float* gather = scratch<float>(kGatherSlot, layout.gather + kPad);
      thread_local Bound bound;
      bound.bind(prepared, arena, 1);
      for (int64_t image; (image = next.fetch_add(1)) < alone;) {
        read_image(x, image, input(arena));
        for (const Section& section : bound.sections) {
          for (int64_t tile = 0; tile < section.tiles; ++tile) run_tile(section, bound.tasks, tile, gather);
          if (section.combines) FASTPOSE_CALL(PlanLevel::combine, bound.tasks[section.end - 1]);
        }
        write(arena, image);
      }
    });
  }
  if (alone < images) {
    float* arena = scratch<float>(kArenaSlot, arena_floats(layout));
    thread_local Bound bound;
    thread_local std::vector<Progress> made;
    bound.bind(prepared, arena, threads);
    const std::vector<PlanTask>& tasks = bound.tasks;  // those of this thread, for all
    const std::vector<Section>& sections = bound.sections;
    if (made.size() < sections.size()) made = std::vector<Progress>(sections.size());
    std::vector<Progress>& progress = made;
    for (int64_t image = alone; image < images; ++image) {
      read_image(x, image, input(arena));
      for (size_t i = 0; i < sections.size(); ++i) {
        progress[i].done.store(0, std::memory_order_relaxed);
        for (auto& next : progress[i].next) next.store(0, std::memory_order_relaxed);
      }
      const int64_t parts = std::min(threads, kParts);
      parallel_for(threads, 1, [&](int64_t index, int64_t) {
        float* gather = scratch<float>(kGatherSlot, layout.gather + kPad);
        for (size_t i = 0; i < sections.size(); ++i) {
          const Section& section = sections[i];
          int32_t finished = 0;
          for (int64_t p = 0; p < parts; ++p) {
            const int64_t part = (index + p) % parts;
            const int64_t first = section.tiles * part / parts, last = section.tiles * (part + 1) / parts;
            std::atomic<int32_t>& next = progress[i].next[part];
            while (first + next.load(std::memory_order_relaxed) < last) {
              const int64_t tile = first + next.fetch_add(1, std::memory_order_relaxed);
              if (tile >= last) break;
              run_tile(section, tasks, tile, gather);
              ++finished;
            }
          }
          std::atomic<int32_t>& done = progress[i].done;
          if (finished > 0) {
            const int32_t all = done.fetch_add(finished, std::memory_order_acq_rel) + finished;
            if (section.combines && all == section.tiles) {
              FASTPOSE_CALL(PlanLevel::combine, tasks[section.end - 1]);
              done.fetch_add(1, std::memory_order_release);
            }
          }
          const int64_t complete = section.tiles + section.combines;
          for (int spins = 0; done.load(std::memory_order_acquire) < complete; ++spins) {
            spins < 500 ? relax() : static_cast<void>(sched_yield());
          }
        }
      });
      write(arena, image);
    }
  }
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpose, CPU, m) { m.impl("run_plan", TORCH_BOX(&run_plan)); }

}  // namespace fastpose
