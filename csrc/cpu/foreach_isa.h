// Includes the file named by FASTPOSE_KERNEL_FILE once per instruction set level, each time in its own namespace
// (FASTPOSE_ISA) and compiled for that level. No include guard, on purpose.
//
// A file that has something to gain from products of bytes or bfloat16 defines FASTPOSE_USES_VNNI first and is compiled
// for three more levels: avx512_vnni, where FASTPOSE_VNNI is 1, avx512_bf16, where FASTPOSE_BF16 is too, and amx, where
// FASTPOSE_AMX is as well.
//
// Rules for a kernel file: everything inside namespace fastpose::FASTPOSE_ISA; standard headers are included before
// this file, so that no library function is compiled for the wrong machine; lambdas are called where they stand and
// are inlined there, since compilers disagree on whether they inherit the target; vectors come from cpu/vec.h.

#if defined(__x86_64__)
#define FASTPOSE_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define FASTPOSE_TARGET(features) \
  FASTPOSE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FASTPOSE_TARGET_END FASTPOSE_PRAGMA(clang attribute pop)
#else
#define FASTPOSE_TARGET(features) FASTPOSE_PRAGMA(GCC push_options) FASTPOSE_PRAGMA(GCC target(features))
#define FASTPOSE_TARGET_END FASTPOSE_PRAGMA(GCC pop_options)
#endif
#endif

#define FASTPOSE_VNNI 0
#define FASTPOSE_BF16 0
#define FASTPOSE_AMX 0
#define FASTPOSE_ISA baseline
#define FASTPOSE_VECTOR_BYTES 16
#include FASTPOSE_KERNEL_FILE
#undef FASTPOSE_ISA
#undef FASTPOSE_VECTOR_BYTES

#if defined(__x86_64__)
FASTPOSE_TARGET("avx2,fma,f16c")
#define FASTPOSE_ISA avx2
#define FASTPOSE_VECTOR_BYTES 32
#include FASTPOSE_KERNEL_FILE
#undef FASTPOSE_ISA
#undef FASTPOSE_VECTOR_BYTES
FASTPOSE_TARGET_END

FASTPOSE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTPOSE_ISA avx512
#define FASTPOSE_VECTOR_BYTES 64
#include FASTPOSE_KERNEL_FILE
#undef FASTPOSE_ISA
#undef FASTPOSE_VECTOR_BYTES
FASTPOSE_TARGET_END

#if defined(FASTPOSE_USES_VNNI) && FASTPOSE_KNOWS_VNNI
#undef FASTPOSE_VNNI
#define FASTPOSE_VNNI 1
FASTPOSE_TARGET("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTPOSE_ISA avx512_vnni
#define FASTPOSE_VECTOR_BYTES 64
#include FASTPOSE_KERNEL_FILE
#undef FASTPOSE_ISA
#undef FASTPOSE_VECTOR_BYTES
FASTPOSE_TARGET_END

#undef FASTPOSE_BF16
#define FASTPOSE_BF16 1
FASTPOSE_TARGET("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTPOSE_ISA avx512_bf16
#define FASTPOSE_VECTOR_BYTES 64
#include FASTPOSE_KERNEL_FILE
#undef FASTPOSE_ISA
#undef FASTPOSE_VECTOR_BYTES
FASTPOSE_TARGET_END

#undef FASTPOSE_AMX
#define FASTPOSE_AMX 1
FASTPOSE_TARGET("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")  // AMX is written out
#define FASTPOSE_ISA amx
#define FASTPOSE_VECTOR_BYTES 64
#include FASTPOSE_KERNEL_FILE
#undef FASTPOSE_ISA
#undef FASTPOSE_VECTOR_BYTES
FASTPOSE_TARGET_END
#define FASTPOSE_CALL_VNNI(function, ...)                                                              \
  ::fastpose::isa() == ::fastpose::Isa::kAmx          ? ::fastpose::amx::function(__VA_ARGS__)         \
  : ::fastpose::isa() == ::fastpose::Isa::kAvx512Bf16 ? ::fastpose::avx512_bf16::function(__VA_ARGS__) \
  : ::fastpose::isa() == ::fastpose::Isa::kAvx512Vnni ? ::fastpose::avx512_vnni::function(__VA_ARGS__) \
                                                      :
#else
#define FASTPOSE_CALL_VNNI(function, ...)
#endif

// FASTPOSE_CALL(function, arguments): calls the function of the level in use.
#define FASTPOSE_CALL(function, ...)                                                       \
  (FASTPOSE_CALL_VNNI(function, __VA_ARGS__)::fastpose::isa() >= ::fastpose::Isa::kAvx512  \
       ? ::fastpose::avx512::function(__VA_ARGS__)                                         \
   : ::fastpose::isa() == ::fastpose::Isa::kAvx2 ? ::fastpose::avx2::function(__VA_ARGS__) \
                                                 : ::fastpose::baseline::function(__VA_ARGS__))
#else
#define FASTPOSE_CALL(function, ...) ::fastpose::baseline::function(__VA_ARGS__)
#endif
#undef FASTPOSE_VNNI
#undef FASTPOSE_BF16
#undef FASTPOSE_AMX
