// Instruction set levels. Every kernel is compiled once per level into one binary; the level is chosen at run time.
#pragma once

// Older compilers have no bfloat16 products.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTPOSE_KNOWS_BF16 1
#else
#define FASTPOSE_KNOWS_BF16 0
#endif

namespace fastpose {

// The last one has products of bfloat16 and of bytes; only kernels that use them are compiled for it.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// What the processor can do, lowered (never raised) by FASTPOSE_CPU_ISA=baseline|avx2|avx512|avx512_bf16.
// Read once.
Isa isa();

// What the processor can do.
Isa detected_isa();

const char* isa_name(Isa level);

}  // namespace fastpose
