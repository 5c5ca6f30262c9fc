"""The two losses as sums, and the gene head's last layer, which never holds its logits.

Shapes: S scored positions, C cells, h width of the gene head's hidden layer, V vocabulary rows (special tokens first).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits held at once (elements), by device type: 2^23 float32 are 32 MB, 2^27 are 512 MB.
CHUNK_LOGITS = {"cuda": 2**27}
CHUNK_LOGITS_ELSEWHERE = 2**23


def expected_count(logit_S: Tensor, cell_S: Tensor, total_count_C: Tensor) -> Tensor:
    """mu (S) = softmax of the count logits within a cell x the cell's total clipped count, float32 (MODEL.md 1.5)."""
    logit_S = logit_S if logit_S.dtype == torch.float64 else logit_S.float()
    # The greatest logit is subtracted for range only; its gradient cancels.
    peak_C = torch.full_like(total_count_C, -torch.inf, dtype=logit_S.dtype)
    peak_C = peak_C.scatter_reduce(0, cell_S, logit_S.detach(), "amax")
    exp_S = torch.exp(logit_S - peak_C[cell_S])
    sum_C = torch.zeros_like(peak_C).index_add(0, cell_S, exp_S)
    return exp_S * (total_count_C.to(logit_S.dtype) / sum_C)[cell_S]


def count_nll(mu_S: Tensor, count_S: Tensor, *, eps: float, exact: bool) -> Tensor:
    """Negative log likelihood (S) of counts >= 1 under a zero-truncated Poisson of rate x = mu + eps (MODEL.md 1.5).

    nll = -c ln x + Z(x) + lgamma(c + 1). Exact: Z = ln(e^x - 1). Otherwise the published approximation
    Z = max(0, x - softplus(-x)), which is close for x above about 2 and cannot go below zero.
    """
    x_S = mu_S + eps
    if exact:
        # ln(e^x - 1) = x + ln(1 - e^-x), without overflow for large x nor cancellation for small x.
        normaliser_S = x_S + torch.log(-torch.expm1(-x_S))
    else:
        normaliser_S = F.relu(x_S - F.softplus(-x_S))
    return -count_S * torch.log(x_S) + normaliser_S + torch.lgamma(count_S + 1)


class GeneProjection(nn.Linear):
    """The gene head's last layer. Called with targets it returns their cross-entropy and holds a chunk of logits.

    The loss lives inside the module that owns the weight so that ZeRO-3 gathers it at the right moment.
    """

    def __init__(self, hidden: int, n_tokens: int, softcap: float, device: torch.device | str = "cpu") -> None:
        super().__init__(hidden, n_tokens, device=device)
        self.softcap = softcap

    def forward(self, hidden_Sh: Tensor, target_S: Tensor | None = None) -> Any:  # type: ignore[override]
        """Without targets the logits (S, V) before the softcap, all of them: for small S.

        With targets (int64, S): (sum of the cross-entropies, the cross-entropies (S) without gradient), in float32.
        """
        if target_S is None:
            return super().forward(hidden_Sh)
        wants_gradient = torch.is_grad_enabled()
        return _ChunkedCrossEntropy.apply(hidden_Sh, self.weight, self.bias, target_S, self.softcap, wants_gradient)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Projection, softcap * tanh(logits / softcap) and cross-entropy over chunks of positions.

    The gradient is taken while a chunk's logits are at hand (as Liger's fused loss does), so they are computed once and
    the memory is one chunk of logits, one gradient of the hidden states and one of the weight, whatever S is.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_Sh: Tensor, weight_Vh: Tensor, bias_V: Tensor, target_S: Tensor, softcap: float, wants: bool
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = (wants and needed for needed in ctx.needs_input_grad[:3])
        wide = torch.float64 if hidden_Sh.dtype == torch.float64 else torch.float32
        d_hidden = torch.empty_like(hidden_Sh) if needs_hidden else None
        d_weight = torch.zeros_like(weight_Vh, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        nll_S = torch.empty(len(hidden_Sh), dtype=wide, device=hidden_Sh.device)
        limit = CHUNK_LOGITS.get(hidden_Sh.device.type, CHUNK_LOGITS_ELSEWHERE)
        chunk = max(1, limit // len(weight_Vh))
        for first in range(0, len(hidden_Sh), chunk):
            part = slice(first, first + chunk)
            h, target = hidden_Sh[part], target_S[part]
            # From here on everything happens in the memory of the logits.
            logits = F.linear(h, weight_Vh, bias_V).to(wide)
            slope = None
            if softcap:
                logits.div_(softcap).tanh_()
                slope = logits.square().neg_().add_(1) if needs_hidden or needs_weight or needs_bias else None
                logits.mul_(softcap)
            log_sum = torch.logsumexp(logits, -1)
            nll_S[part] = log_sum - logits.gather(1, target[:, None])[:, 0]
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            d_logits = logits.sub_(log_sum[:, None]).exp_()
            d_logits[torch.arange(len(target), device=target.device), target] -= 1
            if slope is not None:
                d_logits *= slope
            d_narrow = d_logits.to(h.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_narrow @ weight_Vh
            if d_weight is not None:
                if d_weight.dtype == h.dtype:
                    d_weight.addmm_(d_narrow.T, h)
                else:
                    d_weight += d_narrow.T @ h
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight_Vh.dtype, bias_V.dtype)
        ctx.mark_non_differentiable(nll_S)
        return nll_S.sum(), nll_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = grads[0]
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else d_weight.mul_(scale).to(ctx.dtypes[0]),
            None if d_bias is None else d_bias.mul_(scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )
