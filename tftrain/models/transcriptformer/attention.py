"""Causal attention within each cell of a flat packed batch: one function, two ways to compute it.

    score[q, k] = softcap( q.k / sqrt(d) + b[q, k] * log1p(count[k] + eps) ),  k <= q, both of one cell  (MODEL.md 1.3)

with b = 1 for k < q, and for k = q only in embedding mode. `plain` groups cells of similar length into dense blocks and
keeps no scores between forward and backward; it runs on any device and is the reference. `flex` is FlexAttention with a
block mask of cell boundaries and runs fast on CUDA (it has no backward on a CPU).

Shapes: T tokens, H heads, d width of a head; B cells of a block, M its longest cell.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Scores held at once by the plain path (elements). 2^21 float32 are 8 MB: small enough for a CPU's last cache.
BLOCK_SCORES = 2**21
# Queries computed together; later keys of the causal triangle are skipped in steps of this.
QUERY_CHUNK = 256
# A block takes cells down to this share of its longest one: bounds the work wasted on padding.
SHORTEST_SHARE = 0.75
# FlexAttention works in blocks of so many tokens; T is padded to a multiple.
FLEX_BLOCK = 128


@dataclass(frozen=True)
class KeyBias:
    """What decides a score beside q and k."""

    log_count_T: Tensor | None
    """float32 (T): log1p(count + eps) of each token as a key; None for no bias."""
    is_hidden_T: Tensor | None
    """bool (T): True where only the token itself attends to it; None for none."""
    softcap: float
    """0 for none."""
    on_self: bool
    """True adds the bias on the diagonal too (embedding mode)."""


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each (T, H, d) -> (T, H, d)."""


def plain(n_tokens_C: np.ndarray, heads: int, bias: KeyBias, device: torch.device) -> Attend:
    """The plain path for cells of `n_tokens_C` tokens, one after another. Blocks are laid out once, for all layers."""
    blocks = [_Block.of(*block, device) for block in _group(n_tokens_C, heads)]

    def attend(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor) -> Tensor:
        return _PlainAttention.apply(q_THd, k_THd, v_THd, blocks, bias)

    return attend


@dataclass(frozen=True)
class _Block:
    """Cells of similar length as one dense block."""

    token_BM: Tensor
    """int64 (B, M): position in T; slots past a cell's end repeat its first token, hidden from it by causality."""
    is_token_BM: Tensor | None
    """bool (B, M): True for slots that hold a token of their own; None if all do."""

    @staticmethod
    def of(start_B: np.ndarray, length_B: np.ndarray, device: torch.device) -> _Block:
        slot_M = np.arange(length_B.max())
        is_token_BM = slot_M < length_B[:, None]
        token_BM = start_B[:, None] + np.where(is_token_BM, slot_M, 0)
        is_token = None if is_token_BM.all() else torch.from_numpy(is_token_BM).to(device)
        return _Block(torch.from_numpy(token_BM).to(device), is_token)

    def gather(self, x_THd: Tensor) -> Tensor:
        """(T, H, d) -> (B, H, M, d), in float32 or wider; padding slots hold copies."""
        x_BMHd = x_THd[self.token_BM]
        return x_BMHd.transpose(1, 2).to(torch.promote_types(x_THd.dtype, torch.float32)).contiguous()

    def scatter(self, x_BHMd: Tensor, into_THd: Tensor) -> None:
        """Writes (B, H, M, d) to the positions of its tokens; padding slots are dropped."""
        x_BMHd = x_BHMd.transpose(1, 2).to(into_THd.dtype)
        if self.is_token_BM is None:
            into_THd[self.token_BM] = x_BMHd
        else:
            into_THd[self.token_BM[self.is_token_BM]] = x_BMHd[self.is_token_BM]


def _group(n_tokens_C: np.ndarray, heads: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(start, length) of the cells of each block: sorted by length, similar within a block, bounded in scores."""
    start_C = np.cumsum(n_tokens_C) - n_tokens_C
    order = np.argsort(-n_tokens_C, kind="stable")
    length_sorted = n_tokens_C[order]
    first = 0
    while first < len(order):
        longest = int(length_sorted[first])
        most = max(1, BLOCK_SCORES // (heads * longest * min(longest, QUERY_CHUNK)))
        similar = int(np.searchsorted(-length_sorted, -SHORTEST_SHARE * longest, side="right"))
        stop = max(first + 1, min(first + most, similar))
        yield start_C[order[first:stop]], length_sorted[first:stop]
        first = stop


@functools.lru_cache(maxsize=64)
def _is_future(n: int, device: torch.device) -> Tensor:
    """bool (n, n): True where the key comes after the query."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)


@dataclass
class _Scores:
    """Attention probabilities of one chunk of queries, and what their backward needs."""

    p: Tensor
    """(B, H, queries, keys)."""
    tanh: Tensor | None
    """Same shape: score / softcap after the bend; None without softcap."""


def _probabilities(
    q_BHnd: Tensor, k_BHmd: Tensor, bias_BM: Tensor | None, hidden_BM: Tensor | None, bias: KeyBias, *, keep_tanh: bool
) -> _Scores:
    """Softmax over keys 0..m-1 for the last n of these m positions as queries."""
    n, m = q_BHnd.shape[2], k_BHmd.shape[2]
    first = m - n
    scale = 1 / (math.sqrt(q_BHnd.shape[-1]) * (bias.softcap or 1.0))
    s = (q_BHnd * scale) @ k_BHmd.transpose(-1, -2)
    self_s = s[..., first:].diagonal(dim1=-2, dim2=-1)
    if bias_BM is not None:
        unbiased = None if bias.on_self else self_s.clone()
        s += (bias_BM[:, :m] / (bias.softcap or 1.0))[:, None, None, :]
        if unbiased is not None:
            self_s.copy_(unbiased)
    tanh = None
    if bias.softcap:
        s.tanh_()
        if keep_tanh:
            tanh = s
            s = s * bias.softcap
        else:
            s *= bias.softcap
    s[..., first:].masked_fill_(_is_future(n, s.device), -torch.inf)
    if hidden_BM is not None:
        self_score = s[..., first:].diagonal(dim1=-2, dim2=-1).clone()
        s.masked_fill_(hidden_BM[:, None, None, :m], -torch.inf)
        # A token always sees itself, which keeps the softmax of a hidden first token finite.
        s[..., first:].diagonal(dim1=-2, dim2=-1).copy_(self_score)
    return _Scores(torch.softmax(s, -1), tanh)


class _PlainAttention(torch.autograd.Function):
    """Dense attention block by block; scores are computed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[_Block], bias: KeyBias) -> Tensor:
        out = torch.empty_like(q)
        # Scores are float32 at least, as they are in the backward pass, which knows no autocast.
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks:
                block.scatter(_block_forward(block, bias, q, k, v), out)
        ctx.save_for_backward(q, k, v, out)
        ctx.blocks, ctx.bias = blocks, bias
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        d_out = grads[0]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for block in ctx.blocks:
            _block_backward(block, ctx.bias, (q, k, v, out, d_out), (dq, dk, dv))
        return dq, dk, dv, None, None


def _block_forward(block: _Block, bias: KeyBias, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention output (B, H, M, d) of one block."""
    qb, kb, vb = block.gather(q), block.gather(k), block.gather(v)
    bias_BM, hidden_BM = _of_block(block, bias)
    ob = torch.empty_like(qb)
    for first, last in _query_chunks(qb.shape[2]):
        qc, kc = qb[:, :, first:last], kb[:, :, :last]
        scores = _probabilities(qc, kc, bias_BM, hidden_BM, bias, keep_tanh=False)
        ob[:, :, first:last] = scores.p @ vb[:, :, :last]
    return ob


def _block_backward(block: _Block, bias: KeyBias, saved: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Gradients of one block, written to `grads` = (dq, dk, dv).

    With p = softmax(t), t = cap tanh(s / cap): dt = p (dp - sum(do * o)), ds = dt (1 - tanh^2).
    """
    qb, kb, vb, ob, dob = (block.gather(x) for x in saved)
    if block.is_token_BM is not None:
        # Slots past a cell's end hold copies of a real token: their gradient must not count.
        dob = dob * block.is_token_BM[:, None, :, None]
    bias_BM, hidden_BM = _of_block(block, bias)
    delta = (dob * ob).sum(-1, keepdim=True)
    dqb, dkb, dvb = torch.empty_like(qb), torch.zeros_like(kb), torch.zeros_like(vb)
    scale = 1 / math.sqrt(qb.shape[-1])
    for first, last in _query_chunks(qb.shape[2]):
        kc, vc, dc = kb[:, :, :last], vb[:, :, :last], dob[:, :, first:last]
        scores = _probabilities(qb[:, :, first:last], kc, bias_BM, hidden_BM, bias, keep_tanh=True)
        dvb[:, :, :last] += scores.p.transpose(-1, -2) @ dc
        ds = dc @ vc.transpose(-1, -2)
        ds -= delta[:, :, first:last]
        ds *= scores.p
        if scores.tanh is not None:
            ds *= scores.tanh.square_().neg_().add_(1)
        ds *= scale
        dqb[:, :, first:last] = ds @ kc
        dkb[:, :, :last] += ds.transpose(-1, -2) @ qb[:, :, first:last]
    for value, into in zip((dqb, dkb, dvb), grads, strict=True):
        block.scatter(value, into)


def _of_block(block: _Block, bias: KeyBias) -> tuple[Tensor | None, Tensor | None]:
    """(count bias, hidden keys) of a block's slots, each (B, M) or None."""
    log_count, hidden = bias.log_count_T, bias.is_hidden_T
    return (
        None if log_count is None else log_count[block.token_BM],
        None if hidden is None else hidden[block.token_BM],
    )


def _query_chunks(n: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n, QUERY_CHUNK):
        yield first, min(n, first + QUERY_CHUNK)


def padded_tokens(n_tokens: int, max_tokens: int) -> int:
    """T of the flex path: the least of max_tokens / 8, / 4, / 2, / 1 that fits, rounded up to FLEX_BLOCK.

    A few fixed shapes, so that compiled code is made once each, without a nearly empty batch costing a full one.
    """
    for divisor in (8, 4, 2, 1):
        padded = -(-max_tokens // (divisor * FLEX_BLOCK)) * FLEX_BLOCK
        if n_tokens <= padded:
            return padded
    raise AssertionError(f"{n_tokens} tokens in a batch of at most {max_tokens}")


def flex(n_tokens_C: np.ndarray, padded: int, bias: KeyBias, device: torch.device) -> Attend:
    """The FlexAttention path over `padded` tokens; those past the cells are documents of their own.

    `bias` holds (padded) tokens too. Compiled on CUDA; elsewhere it runs uncompiled, forward only.
    """
    from torch.nn.attention.flex_attention import flex_attention

    n_tokens = int(n_tokens_C.sum())
    filling = np.arange(n_tokens, padded) // FLEX_BLOCK
    cell_T_host = np.concatenate([np.repeat(np.arange(len(n_tokens_C)), n_tokens_C), len(n_tokens_C) + filling])
    cell_T = torch.from_numpy(cell_T_host.astype(np.int32)).to(device)
    hidden_T, log_count_T = bias.is_hidden_T, bias.log_count_T

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_seen = (cell_T[q] == cell_T[k]) & (q >= k)
        return is_seen if hidden_T is None else is_seen & (~hidden_T[k] | (q == k))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if log_count_T is not None:
            is_biased = q >= k if bias.on_self else q > k
            score = score + torch.where(is_biased, log_count_T[k], 0.0)
        return bias.softcap * torch.tanh(score / bias.softcap) if bias.softcap else score

    block_mask = _block_mask(cell_T, hidden_T, mask_mod)
    attention: Any = _compiled_flex() if device.type == "cuda" else flex_attention

    def attend(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_THd, v_THd))
        out = attention(q, k, v, score_mod=score_mod, block_mask=block_mask)
        return out.squeeze(0).transpose(0, 1)

    return attend


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(cell_T: Tensor, hidden_T: Tensor | None, mask_mod: Callable[..., Tensor]) -> Any:
    """The block mask from cell boundaries alone: T/128 squared work, never T squared.

    Cells stand one after another, so a block of queries and an earlier block of keys share a cell exactly if the keys'
    last cell is the queries' first; they are full if that cell is all there is in both and none of the keys is hidden.
    """
    from torch.nn.attention.flex_attention import BlockMask

    cell_RB = cell_T.view(-1, FLEX_BLOCK)
    first_R, last_R = cell_RB[:, 0], cell_RB[:, -1]
    row_R = torch.arange(len(first_R), device=cell_T.device)
    is_before_RR = row_R[:, None] > row_R
    shares_RR = (last_R[None, :] >= first_R[:, None]) & (is_before_RR | (row_R[:, None] == row_R))
    is_full_RR = is_before_RR & (first_R[None, :] == last_R[:, None])
    if hidden_T is not None:
        is_full_RR &= ~hidden_T.view(-1, FLEX_BLOCK).any(-1)[None, :]
    is_partial_RR = shares_RR & ~is_full_RR

    def columns(is_set_RR: Tensor) -> tuple[Tensor, Tensor]:
        number = is_set_RR.sum(-1, dtype=torch.int32)
        index = torch.argsort(is_set_RR.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
        return number[None, None], index[None, None].contiguous()

    number, index = columns(is_partial_RR)
    full_number, full_index = columns(is_full_RR)
    return BlockMask.from_kv_blocks(
        number, index, full_number, full_index, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=(len(cell_T),) * 2
    )
