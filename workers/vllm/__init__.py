"""The vLLM engine: outside and inside of vLLM's own processes."""
