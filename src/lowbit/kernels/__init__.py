"""Fast layers on a GPU, each beside the torch code that says what it computes.

The kernels are CUDA C++, compiled when first used by the compiler that comes with torch: they give every register of
the tensor cores' operands its place, which Triton does by itself and otherwise (docs/performance.md has the figures).
"""
