"""How much the model's predictions suffer from an error in each linear's output.

Let d_t be what a linear's output at token t is off by, z the logits and p the model's distribution of the next token.
To second order (the first vanishes)

    KL(p || p') = 1/2 dz^T F dz        F = E_{c ~ p} [grad_z log p_c  (grad_z log p_c)^T]

and by the chain rule, with g_t the gradient of the log likelihood of sampled continuations by the output at token t,

    sum over positions of KL = 1/2 E (sum_t g_t . d_t)^2

Samples at different positions are independent, so one backward pass of the sum over positions serves for all of them.
For errors that have nothing to do with g and are alike in all directions, of energy e relative to that of the output y
in [.., n],

    KL a token = s e        s = 1/(2 n T) (sum_t |g_t|^2) (mean_t |y_t|^2)

The sampled c make s a property of the model, not of the text's own next words (the Fisher information rather than the
empirical one), and unlike a difference of two perplexities it costs one pass for all linears together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def sensitivities(
    model: PreTrainedModel, linears: dict[str, nn.Module], windows: Tensor, seed: int
) -> dict[str, float]:
    """s of each linear, in nats a token: what output errors as large as the outputs themselves would cost if the
    second order were all.

    model: the original one; windows: ids [samples, seqlen]; seed: of the sampled continuations. A linear that no token
    reaches has 0.
    """
    meters = {name: _Meter() for name in linears}
    handles = [linears[name].register_forward_hook(meter.hook) for name, meter in meters.items()]
    draw = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    try:
        with torch.enable_grad():
            for window in windows.to(model.device).split(1):
                # The graph begins at the embeddings: no weight has a gradient, and none is kept.
                states = embeddings(window).detach().requires_grad_()
                logits = model(inputs_embeds=states, use_cache=False).logits.float().log_softmax(-1)
                chosen = torch.multinomial(logits.detach().exp()[0].cpu(), 1, generator=draw).to(logits.device)
                logits[0].gather(-1, chosen).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: meter.sensitivity(windows.numel()) for name, meter in meters.items()}


class _Meter:
    """Sums of |g|^2 and |y|^2 over what one linear puts out."""

    def __init__(self) -> None:
        self.of_gradients, self.of_outputs, self.tokens, self.width = 0.0, 0.0, 0, 1

    def hook(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.of_outputs += float(output.detach().float().square().sum())
        self.tokens += output.shape[:-1].numel()
        self.width = output.shape[-1]
        output.register_hook(self._gradient)

    def _gradient(self, gradient: Tensor) -> None:
        self.of_gradients += float(gradient.float().square().sum())

    def sensitivity(self, tokens: int) -> float:
        if not self.tokens:
            return 0.0
        return self.of_gradients * (self.of_outputs / self.tokens) / (2 * self.width * tokens)
