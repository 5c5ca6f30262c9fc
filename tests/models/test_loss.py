"""The losses against torch's own functions and against numbers from decimal arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tftrain.models.transcriptformer import loss
from tftrain.models.transcriptformer.loss import GeneProjection, count_nll, expected_count


@pytest.mark.parametrize("chunk_logits", [1, 64, 10**9], ids=["a row at a time", "some rows", "all rows"])
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_gene_loss_equals_cross_entropy(monkeypatch, chunk_logits, softcap):
    monkeypatch.setattr(loss, "CHUNK_LOGITS_ELSEWHERE", chunk_logits)
    torch.manual_seed(0)
    head = GeneProjection(6, 11, softcap).double()
    hidden_Sh = (4 * torch.randn(23, 6, dtype=torch.float64)).requires_grad_()
    target_S = torch.randint(0, 11, (23,))
    logits = F.linear(hidden_Sh, head.weight, head.bias)
    bent = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected_S = F.cross_entropy(bent, target_S, reduction="none")
    leaves = (hidden_Sh, head.weight, head.bias)
    expected_grads = torch.autograd.grad(3 * expected_S.sum(), leaves)
    total, nll_S = head(hidden_Sh, target_S)
    torch.testing.assert_close(nll_S, expected_S.detach())
    torch.testing.assert_close(total, expected_S.sum())
    for got, expected in zip(torch.autograd.grad(3 * total, leaves), expected_grads):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(head(hidden_Sh), logits)


def test_gene_loss_without_gradient_or_with_a_frozen_head():
    torch.manual_seed(0)
    head = GeneProjection(6, 11, 10.0)
    hidden_Sh, target_S = torch.randn(5, 6, requires_grad=True), torch.arange(5)
    with torch.no_grad():
        assert not head(hidden_Sh, target_S)[0].requires_grad
    head.requires_grad_(False)
    head(hidden_Sh, target_S)[0].backward()
    assert head.weight.grad is None
    assert hidden_Sh.grad.abs().sum() > 0


def test_gene_loss_memory_does_not_grow_with_positions_times_vocabulary(monkeypatch):
    """No tensor of S x V elements is ever made: the largest is a chunk."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS_ELSEWHERE", 1000)
    head, sizes = GeneProjection(4, 500, 10.0), []

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    hidden_Sh = torch.randn(400, 4, requires_grad=True)
    with Largest():
        head(hidden_Sh, torch.randint(0, 500, (400,)))[0].backward()
    assert 1000 <= max(sizes) <= head.weight.numel()


def test_expected_count_is_a_softmax_within_each_cell():
    logit_S = torch.tensor([0.0, math.log(3.0), 5.0, 400.0, 400.0])
    cell_S = torch.tensor([0, 0, 1, 2, 2])
    mu_S = expected_count(logit_S, cell_S, torch.tensor([8.0, 7.0, 10.0]))
    torch.testing.assert_close(mu_S, torch.tensor([2.0, 6.0, 7.0, 5.0, 5.0]))


@pytest.mark.parametrize(
    ("mu", "count", "exact", "expected"),
    [
        # -c ln x + ln(e^x - 1) + ln c!, by decimal arithmetic.
        (1.0, 1.0, True, 0.5413248546129181),
        (2.5, 3.0, True, 1.4572367898635235),
        (1e-4, 1.0, True, 5.00004166666631945e-05),
        (90.0, 30.0, True, 29.663946238922211),
        # -c ln x + max(0, x - softplus(-x)) + ln c!
        (1.0, 1.0, False, 0.6867383124817772),
        (2.5, 3.0, False, 1.4639975393130402),
        (0.1, 1.0, False, 2.302585092994046),
    ],
)
def test_count_nll(mu, count, exact, expected):
    got = count_nll(torch.tensor([mu], dtype=torch.float64), torch.tensor([count]).double(), eps=0.0, exact=exact)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_exact_count_likelihood_sums_to_one_over_counts_from_one_on():
    count_K = torch.arange(1.0, 60.0, dtype=torch.float64)
    for mu in (0.01, 1.0, 7.0):
        nll_K = count_nll(torch.full_like(count_K, mu), count_K, eps=1e-6, exact=True)
        assert float(torch.exp(-nll_K).sum()) == pytest.approx(1.0, abs=1e-9)
