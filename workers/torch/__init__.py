"""The embedded engine: decodes any causal LM of transformers with PyTorch, batch-invariant."""
