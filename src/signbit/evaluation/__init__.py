"""Evaluation runs what is stored: perplexity, and divergence from the original model."""

from signbit.evaluation.run import evaluate

__all__ = ["evaluate"]
