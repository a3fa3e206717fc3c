"""Evaluation runs what is stored: perplexity, divergence from the original model, zero-shot tasks."""

from signbit.evaluation.run import evaluate

__all__ = ["evaluate"]
