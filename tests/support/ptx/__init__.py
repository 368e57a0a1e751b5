"""Runs compiled kernels without a GPU, by interpreting the PTX that Triton emits, one program (thread block) at a time.

Triton's own interpreter runs a kernel's source. This interpreter runs what the compiler made of the source, including
inline assembly, layouts, matrix instructions, asynchronous copies and barriers. It is written from NVIDIA's PTX ISA
9.x, knows the forms of instructions that these kernels use (`operations.py`; tests/ptx has a test for each), and
refuses any other by name. Beside the arithmetic it checks, as a sanitizer would, that

- no access is outside the tensors and the shared memory that were given, or not aligned to its width;
- no two warps touch the same shared memory without a barrier between them, if one of them writes;
- no wait is missing: asynchronous copies and matrix instructions end as late as the waits allow, so that a missing wait
  gives wrong results;
- no register is read before it is written, or while a matrix instruction still owns it.

The interpreter does not model time, the order of warps (all go in step), or memory ordering between programs, and it
cannot tell whether the machine code that NVIDIA's assembler makes of the PTX is right.
"""
