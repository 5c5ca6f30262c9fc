"""Both attention paths against a plain dense softmax written from the formula, cell by cell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tftrain.models.transcriptformer import attention
from tftrain.models.transcriptformer.attention import KeyBias

CPU = torch.device("cpu")
HEADS, HEAD_WIDTH = 2, 8


def reference(q, k, v, n_tokens_C, bias: KeyBias):
    """MODEL.md 1.3, one cell after another."""
    outputs, first = [], 0
    for n in n_tokens_C:
        part = slice(first, first + n)
        s = torch.einsum("qhd,khd->hqk", q[part], k[part]) / math.sqrt(q.shape[-1])
        query, key = torch.arange(n)[:, None], torch.arange(n)[None, :]
        if bias.log_count_T is not None:
            is_biased = query >= key if bias.on_self else query > key
            s = s + is_biased * bias.log_count_T[part][None, None, :]
        if bias.softcap:
            s = bias.softcap * torch.tanh(s / bias.softcap)
        is_seen = query >= key
        if bias.is_hidden_T is not None:
            is_seen = is_seen & (~bias.is_hidden_T[part][None, :] | (query == key))
        outputs.append(torch.einsum("hqk,khd->qhd", s.masked_fill(~is_seen, -torch.inf).softmax(-1), v[part]))
        first += n
    return torch.cat(outputs)


def make(n_tokens_C, *, softcap=10.0, on_self=False, hidden=True, counts=True, dtype=torch.float64):
    torch.manual_seed(0)
    n = int(sum(n_tokens_C))
    q, k, v = (2 * torch.randn(n, HEADS, HEAD_WIDTH, dtype=dtype) for _ in range(3))
    is_hidden_T = None
    if hidden:
        is_hidden_T = torch.zeros(n, dtype=torch.bool)
        is_hidden_T[np.cumsum(n_tokens_C)[::2] - np.asarray(n_tokens_C)[::2]] = True
    log_count_T = torch.log1p(torch.randint(1, 30, (n,)).to(dtype)) if counts else None
    return q, k, v, KeyBias(log_count_T, is_hidden_T, softcap, on_self)


BIASES = {
    "training": {},
    "embedding": {"on_self": True},
    "no softcap": {"softcap": 0.0},
    "no hidden token": {"hidden": False},
    "no counts": {"counts": False},
}
LENGTHS = {
    "one token": [1],
    "equal": [7, 7, 7],
    "mixed": [3, 40, 1, 22, 39, 2, 2, 17],
    "longer than a chunk of queries": [9, attention.QUERY_CHUNK + 45, 30],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", BIASES.values(), ids=BIASES)
def test_plain_path_and_its_gradient(options, lengths):
    q, k, v, bias = make(lengths, **options)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    expected = reference(q, k, v, lengths, bias)
    got = attention.plain(np.array(lengths), HEADS, bias, CPU)(q, k, v)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    got_grads = torch.autograd.grad((got * weight).sum(), (q, k, v))
    for got_grad, expected_grad in zip(got_grads, expected_grads):
        torch.testing.assert_close(got_grad, expected_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("budget", [1, 300, 10**9])
def test_plain_path_does_not_depend_on_its_blocks(monkeypatch, budget):
    monkeypatch.setattr(attention, "BLOCK_SCORES", budget)
    lengths = LENGTHS["mixed"]
    q, k, v, bias = make(lengths)
    got = attention.plain(np.array(lengths), HEADS, bias, CPU)(q, k, v)
    torch.testing.assert_close(got, reference(q, k, v, lengths, bias), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", BIASES.values(), ids=BIASES)
def test_flex_path(options):
    lengths = [3, 140, 1, 22, 260, 2]
    q, k, v, bias = make(lengths, dtype=torch.float32, **options)
    n, padded = sum(lengths), attention.padded_tokens(sum(lengths), 900)
    assert padded == 512
    assert n < padded

    def pad(tensor):
        filling = torch.zeros(padded - n, *tensor.shape[1:], dtype=tensor.dtype)
        return torch.cat([tensor, filling])

    log_count_T = None if bias.log_count_T is None else pad(bias.log_count_T)
    is_hidden_T = None if bias.is_hidden_T is None else pad(bias.is_hidden_T)
    padded_bias = KeyBias(log_count_T, is_hidden_T, bias.softcap, bias.on_self)
    got = attention.flex(np.array(lengths), padded, padded_bias, CPU)(pad(q), pad(k), pad(v))
    torch.testing.assert_close(got[:n], reference(q, k, v, lengths, bias), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(got).all()


def test_block_mask_names_every_block_that_matters():
    """Against the mask of all token pairs, at lengths that begin and end inside, at and across block borders."""
    block = attention.FLEX_BLOCK
    lengths = [block - 3, 3, 2 * block, 5, 3 * block - 5, 1, 1, block - 2]
    cell_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    hidden_T = torch.zeros(len(cell_T), dtype=torch.bool)
    hidden_T[2 * block + 7] = True
    n = len(cell_T) // block

    def mask_mod(b, h, q, k):
        return (cell_T[q] == cell_T[k]) & (q >= k) & (~hidden_T[k] | (q == k))

    index = torch.arange(len(cell_T))
    pairs = mask_mod(0, 0, index[:, None], index[None, :]).view(n, block, n, block).permute(0, 2, 1, 3).flatten(2)
    got = attention._block_mask(cell_T, hidden_T, mask_mod)

    def as_dense(number, index):
        dense = torch.zeros(n, n, dtype=torch.bool)
        for row in range(n):
            dense[row, index[0, 0, row, : number[0, 0, row]].long()] = True
        return dense

    partial = as_dense(got.kv_num_blocks, got.kv_indices)
    full = as_dense(got.full_kv_num_blocks, got.full_kv_indices)
    assert (pairs.all(-1) >= full).all(), "a block is called full and is not"
    assert not (full & partial).any()
    assert ((full | partial) >= pairs.any(-1)).all(), "a block that matters is skipped"
    assert full.sum() >= 1


@pytest.mark.parametrize(
    ("n_tokens", "max_tokens", "expected"),
    [(1, 8192, 1024), (1024, 8192, 1024), (1025, 8192, 2048), (8192, 8192, 8192), (100, 100, 128), (3, 3, 128)],
)
def test_padded_tokens(n_tokens, max_tokens, expected):
    assert attention.padded_tokens(n_tokens, max_tokens) == expected
