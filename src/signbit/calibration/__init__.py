"""Calibration: text turned into token batches, the inputs of a block, and the Hessians of its linears."""
