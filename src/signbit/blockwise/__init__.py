"""One quantization, block by block (run.py)."""
