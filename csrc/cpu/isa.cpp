#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastpose {
namespace {

#if defined(__x86_64__) && defined(__linux__) && FASTPOSE_KNOWS_VNNI
// Linux keeps AMX's registers, 8 KB a thread, from a process that has not asked for them, and from one that has it
// refuses small signal stacks ever after (Documentation/arch/x86/xstate.rst).
constexpr unsigned long kTileData = 18;  // XFEATURE_XTILEDATA

// Whether the processor has AMX's products of bytes and bfloat16, and the system would let them be used.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr long kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  unsigned long features = 0;
  return syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1) != 0;
}

bool ask_for_amx() {
  constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool has_amx() { return false; }
bool ask_for_amx() { return false; }
#endif

}  // namespace

Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if FASTPOSE_KNOWS_VNNI
    if (__builtin_cpu_supports("avx512vnni")) {
      if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Vnni;
      return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
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
  Isa most = detected_isa(), wanted = Isa::kAmx;
  const char* wish = std::getenv("FASTPOSE_CPU_ISA");
  if (wish != nullptr) {
    for (const Isa level : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Bf16}) {
      if (std::string(wish) == isa_name(level)) wanted = level;
    }
  }
  if (most == Isa::kAmx && !(wanted == Isa::kAmx && ask_for_amx())) most = Isa::kAvx512Bf16;
  if (wanted < Isa::kAmx) return wanted < most ? wanted : most;
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
    case Isa::kAmx: return "amx";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512Vnni: return "avx512_vnni";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace fastpose
