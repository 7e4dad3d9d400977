"""What replaces a module's forward on a CPU: compiled kernels, packed weights, fused norms and activations, LoRA."""
