"""The machine: threads, cores, memory allocator, GPUs, releases of vLLM."""
