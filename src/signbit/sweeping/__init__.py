"""``signbit sweep``: recipes x models x seeds, each quantized and evaluated, what is finished kept."""
