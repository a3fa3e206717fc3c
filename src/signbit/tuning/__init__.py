"""Tuning: what a method decided on, adjusted to what the block as a whole is to do."""
