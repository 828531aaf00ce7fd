#include "cpu/isa.h"

#include <cstdlib>
#include <string>

namespace fastpose {

Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if FASTPOSE_KNOWS_VNNI
    if (__builtin_cpu_supports("avx512vnni")) {
      return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512Vnni;
    }
#endif
    return Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

namespace {

Isa choose() {
  const Isa most = detected_isa();
  const char* wish = std::getenv("FASTPOSE_CPU_ISA");
  if (wish != nullptr) {
    for (const Isa level : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Bf16}) {
      if (std::string(wish) == isa_name(level)) return level < most ? level : most;
    }
  }
#if defined(__x86_64__)
  if (most == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) return Isa::kAvx512Vnni;
#endif
  return most;
}

}  // namespace

Isa isa() {
  static const Isa level = choose();
  return level;
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512Vnni: return "avx512_vnni";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace fastpose
