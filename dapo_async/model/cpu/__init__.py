"""The fused forward pass of the learner on CPUs. Readers who come for GPUs need nothing of it."""
