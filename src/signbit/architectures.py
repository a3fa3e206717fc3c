"""Finding what to quantize in any Hugging Face causal LM, from its module tree alone.

No model names: the decoder blocks are the largest list of modules, their linears are the ``nn.Linear`` (or GPT-2's
``Conv1D``) inside, and experts that transformers keeps fused in three-dimensional parameters are first taken apart into
one linear a projection and expert, so that they are quantized like any other. What is left unquantized is listed with
the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from signbit.errors import SignbitError

Linear: TypeAlias = nn.Linear | Any  # or Conv1D, which is untyped


@dataclass(frozen=True)
class Slice:
    """Where the weight of an unfused expert lies: ``name[index]``, transposed if ``transposed``."""

    name: str
    index: int
    transposed: bool

    def take(self, fused: Tensor) -> Tensor:
        part = fused[self.index]
        return part.T if self.transposed else part


def find_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The decoder blocks: name and members of the module list that holds most parameters."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(parameter.numel() for parameter in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None or not any(linears_of(block) for block in best[2]):
        raise SignbitError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers: signbit quantizes decoder LLMs"
        )
    return best[1], list(best[2])


def linears_of(block: nn.Module) -> dict[str, Linear]:
    """The linears of a block that can be quantized, by their name in it. Routers of experts are left alone."""
    routers = set(routers_of(block))
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in routers
    }


def routers_of(block: nn.Module) -> Iterator[str]:
    """Linears that choose experts: siblings of an expert list with one output for each expert."""
    for parent_name, parent in block.named_modules():
        experts = [child for child in parent.children() if isinstance(child, UnfusedExperts | nn.ModuleList)]
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and any(len(e) == child.out_features for e in experts):
                yield f"{parent_name}.{name}" if parent_name else name


def dense_weight(linear: Linear, weight: Tensor) -> Tensor:
    """``weight`` as [out, in] whatever way the module keeps it."""
    return weight.T if isinstance(linear, Conv1D) else weight


def dense_shape(linear: Linear) -> tuple[int, int]:
    """(out features, in features)."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


class UnfusedExperts(nn.ModuleList):
    """Experts of a mixture as separate linears, in place of transformers' fused ones.

    Member e has the linears ``gate_up_proj`` (or ``up_proj``, for experts without a gate) and ``down_proj``. The gate
    is the original module's own ``_apply_gate``, so experts with clamped or interleaved gates compute what they did.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        for key, value in vars(fused).items():
            # Plain settings that the gate may read: alpha, limit, is_concatenated, ...
            if isinstance(value, bool | int | float | str) and key != "training":
                setattr(self, key, value)
        if "act_fn" in fused._modules:
            self.add_module("act_fn", fused.act_fn)
        self._fused_class = type(fused)
        self.up_name = "gate_up_proj" if hasattr(fused, "gate_up_proj") else "up_proj"
        up, down = getattr(fused, self.up_name), fused.down_proj
        transposed = bool(getattr(fused, "is_transposed", False))
        self.count = len(up)
        for expert in range(self.count):
            member = nn.Module()
            for name, parameter in ((self.up_name, up), ("down_proj", down)):
                rows, columns = parameter.shape[1:]
                if transposed:
                    rows, columns = columns, rows
                bias = getattr(fused, f"{name}_bias", None) is not None
                member.add_module(
                    name, nn.Linear(columns, rows, bias=bias, dtype=parameter.dtype, device=torch.device("meta"))
                )
            self.add_module(str(expert), member)
        # transformers initialises what it believes to be new; these weights are always loaded.
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]

    def __len__(self) -> int:
        return self.count

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gated: Tensor = self._fused_class._apply_gate(self, gate_up)
        return gated

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over the experts of each token; hidden [tokens, width], index and weights [tokens, k]."""
        out = torch.zeros_like(hidden)
        for expert in top_k_index.unique().tolist():
            if expert >= self.count:  # transformers marks experts of other ranks by an index past the end
                continue
            token, slot = torch.where(top_k_index == expert)
            member = self.get_submodule(str(expert))
            inner = member.get_submodule(self.up_name)(hidden[token])
            inner = self._apply_gate(inner) if self.up_name == "gate_up_proj" else self.get_submodule("act_fn")(inner)
            y = member.get_submodule("down_proj")(inner) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def unfuse_experts(model: nn.Module) -> dict[str, Slice]:
    """Take all fused experts of a model on the meta device apart, in place.

    Returns, for each parameter that this creates, where its values lie in the fused parameters.
    """
    sources: dict[str, Slice] = {}
    for name, module in list(model.named_modules()):
        if not _is_fused_experts(module):
            continue
        experts = UnfusedExperts(module)
        transposed = bool(getattr(module, "is_transposed", False))
        for expert in range(len(experts)):
            for projection in (experts.up_name, "down_proj"):
                target = f"{name}.{expert}.{projection}"
                sources[f"{target}.weight"] = Slice(f"{name}.{projection}", expert, transposed)
                if getattr(module, f"{projection}_bias", None) is not None:
                    sources[f"{target}.bias"] = Slice(f"{name}.{projection}_bias", expert, False)
        replace_module(model, name, experts)
    return sources


def _is_fused_experts(module: nn.Module) -> bool:
    """Whether all parameters of ``module`` are the stacked up and down projections of experts that we know to run."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    up = "gate_up_proj" if "gate_up_proj" in names else "up_proj"
    if {up, "down_proj"} - names or names - {up, "down_proj", f"{up}_bias", "down_proj_bias"}:
        return False
    if getattr(module, "has_post_expert_norm", False) or (up == "gate_up_proj" and not hasattr(module, "_apply_gate")):
        return False
    return all(getattr(module, name).ndim == 3 for name in (up, "down_proj"))


def unquantized_parameters(model: PreTrainedModel, quantized: set[str], skipped: dict[str, str]) -> dict[str, str]:
    """Parameter name -> why it stays as it is, for all parameters outside the ``quantized`` modules.

    ``skipped`` gives the reason for linears that the recipe leaves out, by module name.
    """
    blocks_name, blocks = find_blocks(model)
    prefix = f"{blocks_name}."
    routers = {f"{prefix}{i}.{name}" for i, block in enumerate(blocks) for name in routers_of(block)}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    reasons = {}
    for module_name, module in model.named_modules():
        if module_name in quantized or any(module_name.startswith(name + ".") for name in quantized):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if full in model.all_tied_weights_keys:
                continue  # another name of a parameter that is listed under its own
            if module_name in skipped:
                reason = skipped[module_name]
            elif module is embeddings:
                reason = "embedding"
            elif module is head:
                reason = "output head"
            elif module_name in routers:
                reason = "chooses experts"
            elif parameter.ndim < 2:
                reason = "vector (norm, bias or scale)"
            elif not full.startswith(prefix):
                reason = "outside the decoder blocks"
            elif parameter.ndim == 2:
                reason = f"matrix of {type(module).__name__}, which is not a linear layer"
            else:
                reason = f"{parameter.ndim}-dimensional parameter of {type(module).__name__}"
            reasons[full] = reason
    return reasons
