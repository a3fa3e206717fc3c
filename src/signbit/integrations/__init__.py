"""Other programs that run signbit's checkpoints as they are stored."""
