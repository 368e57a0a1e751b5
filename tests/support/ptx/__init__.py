"""Runs compiled kernels without a GPU: an interpreter of the PTX that Triton emits, one program (thread block) at a time.

Triton's own interpreter runs a kernel's source; this runs what the compiler made of it, inline assembly, layouts, matrix
instructions, asynchronous copies and barriers included. It is written from NVIDIA's PTX ISA 9.x, knows the forms of
instructions that these kernels use (`operations.py`; tests/ptx has a test for each) and refuses any other by name. What it
checks beside the arithmetic, as a sanitizer would:

- an access outside the tensors and the shared memory that were given, or one that is not aligned to its width;
- two warps that meet in shared memory without a barrier between them;
- asynchronous copies and matrix instructions end as late as the waits allow, so a wait that is missing gives wrong results;
- a register that is read before it is written, or while a matrix instruction still owns it.

It does not know: time, the order of warps (they go in step), memory ordering between programs, and whether the machine
code that NVIDIA's assembler makes of the PTX is right.
"""
