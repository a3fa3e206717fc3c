"""Quantization-aware training: packed weights become latent ones, are trained by distillation, and are packed again."""
