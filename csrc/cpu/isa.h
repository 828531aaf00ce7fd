// Instruction set levels. Every kernel is compiled once per level into one binary; the level is chosen at run time.
#pragma once

// Older compilers have no products of bytes and bfloat16.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTPOSE_KNOWS_VNNI 1
#else
#define FASTPOSE_KNOWS_VNNI 0
#endif

namespace fastpose {

// The last three have products of bytes, the last two also of bfloat16, and kAmx registers that hold matrices of both;
// only kernels that use them are compiled for these.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAvx512Bf16 = 4, kAmx = 5 };

// What FASTPOSE_CPU_ISA=baseline|avx2|avx512|avx512_vnni|avx512_bf16 wishes, at most what the processor can do. With
// `amx` or without a wish the best of that, which on Intel's processors without AMX is not their products of bfloat16:
// one of those takes as long as four of floats (measured on a Xeon of the fifth generation), for twice the arithmetic.
// Read once; only a process that gets kAmx has asked the operating system for it.
Isa isa();

// What the processor can do and, of AMX, the operating system has.
Isa detected_isa();

const char* isa_name(Isa level);

}  // namespace fastpose
