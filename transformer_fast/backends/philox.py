"""Counter-based dropout: a seed gives the same mask on every backend, whatever the tiling.

Element (bh, i, j) takes 16 of the 128 bits of one Philox4x32-7 counter (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011):

    counter = (16 * (j // 128) + j % 16,  i,  bh,  offset)        key = seed
    lane    = (j % 128) // 16              bits = word[lane % 4] >> (0 if lane < 4 else 16)

An element is kept when bits >= threshold(p), and then scaled by 65536 / (65536 - threshold(p)).
"""

import torch

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def threshold(p: float) -> int:
    """How many of the 65536 16-bit values drop an element. p is rounded to a multiple of 1/65536."""
    return min(int(p * 65536.0 + 0.5), 65535)


def keep_scale(p: float) -> float:
    return 65536.0 / (65536 - threshold(p))


def _multiply_wide(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = a * b  # int64 overflow wraps, so all 64 bits are right
    return (wide >> 32) & _MASK, wide & _MASK


def philox(c0, c1, c2, c3, key0, key1) -> tuple[torch.Tensor, ...]:
    """Philox4x32 with 7 rounds: four words of 32 random bits per counter, as int64."""
    for _ in range(7):
        hi0, lo0 = _multiply_wide(c0, _M0)
        hi1, lo1 = _multiply_wide(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + _W0) & _MASK, (key1 + _W1) & _MASK
    return c0, c1, c2, c3


def keep_mask(rng: torch.Tensor, p: float, bh: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Bool tensor, True where an element is kept; bh, i, j are int64 and broadcast against each other."""
    lane = (j % 128) // 16
    c0, c1, c2 = torch.broadcast_tensors((j // 128) * 16 + j % 16, i, bh)
    c3 = (rng[1] & _MASK).expand_as(c0)
    words = torch.stack(philox(c0, c1, c2, c3, rng[0] & _MASK, (rng[0] >> 32) & _MASK))
    word = words.gather(0, (lane % 4).expand_as(c0).unsqueeze(0)).squeeze(0)
    bits = (word >> (16 * (lane // 4))) & 0xFFFF
    return bits >= threshold(p)


def keep_mask_2d(rng: torch.Tensor, p: float, rows: int, width: int) -> torch.Tensor:
    """The mask of a (rows, width) activation: i is the row, j the column, bh is 0."""
    i = torch.arange(rows, device=rng.device)[:, None]
    j = torch.arange(width, device=rng.device)[None, :]
    return keep_mask(rng, p, torch.zeros_like(i), i, j)
