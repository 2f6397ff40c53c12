"""context_parallel: attention over sequences that are split over processes."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..backends.specs import AttentionSpec
from ..ops import _parallel
from ..ops._attention_op import attention_op
from .collectives import all_gather, from_first
from .layout import Layout
from .ring import ring_attention
from .ulysses import ulysses_attention

__all__ = ["context_parallel", "current", "resumed"]

METHODS = {"ring": ring_attention, "ulysses": ulysses_attention}
IGNORE = -100
# Inputs of models along the sequence: the encoder's (or only) sequence, and the decoder's of an encoder-decoder.
_ALONG = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_ALONG_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


class context_parallel:
    """Sequences over several devices: inside `with`, attention also sees the parts that other processes have.

    Every process calls the same functions and models with its own part of each sequence, as `shard` cuts it. Backward
    must run inside the `with` too. scaled_dot_product_attention, varlen_attention, this package's models and Hugging
    Face's with attn_implementation="transformer_fast" compute the same as one device for the whole sequence, to
    rounding. Gradients of parameters are one process's share: their sum over processes is the whole gradient. DDP and
    FSDP compute it if the loss comes from `mean`. The setting is process-wide. Each process draws its own dropout.

    Args:
        mesh: DeviceMesh of one dimension, such as init_device_mesh("cuda", (8,)) or mesh["cp"].
        method: "ring" sends keys and values around, for any number of heads. "ulysses" exchanges positions for heads:
            the number of processes must divide the number of heads, and all arguments of attention are supported.
        load_balance: two chunks per process, in zigzag order, so that all processes have equal work under a causal
            mask. Sequence lengths must then be multiples of 2 * mesh.size(), else of mesh.size().

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Source:
        Liu et al., "Ring Attention", 2023; Jacobs et al., "DeepSpeed Ulysses", 2023.
    """

    def __init__(self, mesh: DeviceMesh, *, method: str = "ring", load_balance: bool = True):
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: wanted a torch.distributed DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names
            one = f"mesh[{names[-1]!r}]" if names else "one dimension of it"
            raise ValueError(f"mesh: wanted one dimension, got {mesh.ndim}; give {one}")
        if method not in METHODS:
            raise ValueError(f"method: wanted 'ring' or 'ulysses', got {method!r}")
        if not isinstance(load_balance, bool):
            raise TypeError(f"load_balance: wanted True or False, got {load_balance!r}")
        self.mesh, self.method, self.group = mesh, method, mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.layout = Layout(self.size, load_balance)
        self._before: list[Any] = []

    def __repr__(self) -> str:
        return f"context_parallel({self.mesh}, method={self.method!r}, load_balance={self.layout.balanced})"

    def __enter__(self) -> "context_parallel":
        self._before.append(_parallel.set_current(self))
        return self

    def __exit__(self, *error) -> None:
        _parallel.set_current(self._before.pop())

    # ---- parts of sequences --------------------------------------------------------------------------
    def positions(self, part: int, device: torch.device | str | None = None) -> torch.Tensor:
        """(part,) int64: the positions in the sequence of this process's `part` rows."""
        return self.layout.positions(self.rank, part, device)  # type: ignore[arg-type]

    def shard(self, t: torch.Tensor, dim: int = 1, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """This process's part of a tensor along `dim`. With cu_seqlens, its part of each unpadded sequence.

        Raises:
            ValueError: for a length that is not a multiple of the number of chunks.
        """
        if cu_seqlens is None:
            part = self.layout.part_length(f"t, dimension {dim}", t.shape[dim])
            return t.index_select(dim, self.positions(part, t.device))
        return t.index_select(dim, self.layout.unpadded_rows(self.rank, self.shard_cu_seqlens(cu_seqlens)))

    def shard_cu_seqlens(self, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """cu_seqlens of the parts; ValueError for a sequence length that is not a multiple of the number of chunks."""
        for length in cu_seqlens.diff().tolist():
            self.layout.part_length("cu_seqlens", length)
        return cu_seqlens // self.size

    def unshard(self, t: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The whole tensor, in every process, from the parts that `shard` cut or from an output along the sequence."""
        order = self.layout.restoring(t.shape[dim], device=t.device)
        return all_gather(t, self.group).movedim(0, dim).flatten(dim, dim + 1).index_select(dim, order)

    def shard_batch(
        self, batch: Mapping[str, Any], *, causal_lm: bool = False, position_ids: bool = True
    ) -> dict[str, Any]:
        """This process's part of a model's inputs. The whole batch must be the same in every process.

        Args:
            batch: inputs by Hugging Face's names; (B, S) or (B, S, E) tensors are cut along S. Others are not changed.
            causal_lm: labels are the next position's token, so they are shifted before they are cut. They are added as
                shift_labels, which Hugging Face's and this package's causal language models take.
            position_ids: add position_ids that count from 0 to a batch without them; Hugging Face's models need them.
                False for RoBERTa and related families, which count differently (this package's classes count by
                themselves), and for models without position_ids. Encoder-decoders get none.

        Returns:
            A dict with the parts.

        Raises:
            ValueError: naming an input whose length is not a multiple of the number of chunks.
        """
        found = dict(batch)
        labels = found.get("labels")
        if causal_lm and labels is not None and found.get("shift_labels") is None:
            found["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        seq2seq = any(name in found for name in _ALONG_DECODER)
        along = [*_ALONG, *_ALONG_DECODER, "shift_labels"]
        if labels is not None and labels.dim() > 1:
            along.append("labels")
        for name in along:
            t = found.get(name)
            if t is not None and t.dim() > 1:
                try:
                    found[name] = self.shard(t)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        source = found.get("input_ids") if found.get("input_ids") is not None else found.get("inputs_embeds")
        if position_ids and source is not None and found.get("position_ids") is None and not seq2seq:
            found["position_ids"] = self.positions(source.shape[1], source.device).expand(source.shape[0], -1)
        return found

    def mean(self, loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over the labels of all processes that are not -100, from the means of each process.

        Gradients are scaled for averaging over processes, as in DDP and FSDP: each is `size` times this process's
        share.

        Args:
            loss: (), the mean over this process's labels; ignored if it has none.
            labels: this process's part.
        """
        counts = all_gather((labels != IGNORE).sum().to(loss.dtype), self.group)
        share = counts[self.rank] / counts.sum().clamp_min(1)
        own = torch.where(counts[self.rank] > 0, loss, torch.zeros_like(loss)) * share
        total = all_gather(own.detach(), self.group).sum()
        return self.size * own + (total - self.size * own).detach()

    def first(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, part, ...) -> the rows at position 0 of each sequence (B, ...), in every process."""
        return from_first(rows[:, 0], self.group)

    # ---- attention -----------------------------------------------------------------------------------
    @torch.compiler.disable
    def attend(self, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of an AttentionSpec whose tensors are parts. key_lengths are those of the whole sequences."""
        if self.size == 1:
            return attention_op(*spec)
        unpadded = spec.cu_seqlens_q is not None
        queries, keys = spec.max_seqlen_q, spec.max_seqlen_k
        if unpadded:
            for cu in {id(t): t for t in (spec.cu_seqlens_q, spec.cu_seqlens_k)}.values():
                self._check_parts(cu)  # type: ignore[arg-type]
        elif self.layout.balanced:
            for name, length in (("query", queries), ("key", keys)):
                if length % 2:
                    raise ValueError(f"{name}: wanted two equal chunks per process, got {length} positions")
        if spec.key_lengths is not None:
            spec = self._lengths_as_mask(spec)
        masks = {}
        for name in ("mask", "bias"):
            t = getattr(spec, name)
            if t is not None:
                masks[name] = self._of_keys_alone(name, t, queries, keys)
                if masks[name] and t.requires_grad and self.method == "ring":
                    raise NotImplementedError(
                        f"{name}: the ring computes no gradient to a bias with this process's columns only; pass all "
                        f'{keys * self.size} columns, or use method="ulysses"'
                    )
        if self.method == "ring":
            self._check_ring(spec, masks)
        return METHODS[self.method](spec, self.layout, self.group, masks)

    def _check_parts(self, cu: torch.Tensor) -> None:
        if self.layout.balanced and bool((cu.diff() % 2).any()):
            raise ValueError(
                "cu_seqlens: wanted two equal chunks of every sequence, got sequences of "
                f"{cu.diff().tolist()[:8]} positions; cut them with shard and shard_cu_seqlens"
            )

    def _check_ring(self, spec: AttentionSpec, masks: dict[str, bool]) -> None:
        unpadded = spec.cu_seqlens_q is not None
        placed = spec.window_left >= 0 or spec.window_right >= 0 or spec.relative_bias is not None
        alike = spec.max_seqlen_q == spec.max_seqlen_k and (not unpadded or spec.cu_seqlens_q is spec.cu_seqlens_k)
        if placed and not alike:
            raise NotImplementedError(
                'is_causal, window, relative_bias: method="ring" wants as many queries as keys with these, got '
                f'{spec.max_seqlen_q} and {spec.max_seqlen_k}; use method="ulysses"'
            )
        window = spec.window_left >= 0 or spec.window_right > 0
        if unpadded and (window or spec.relative_bias is not None or masks):
            raise NotImplementedError(
                'window, relative_bias, attn_mask, bias: method="ring" does not take them for unpadded sequences, only '
                'is_causal; use method="ulysses"'
            )

    def _lengths_as_mask(self, spec: AttentionSpec) -> AttentionSpec:
        keys, mask = spec.max_seqlen_k, spec.mask
        if mask is not None and (mask.shape[2] != 1 or mask.shape[3] != keys):  # it has a column for every position
            positions = torch.arange(keys * self.size, device=spec.key.device)
        else:
            positions = self.positions(keys, spec.key.device)
        inside = (positions < spec.key_lengths[:, None])[:, None, None]  # type: ignore[index]
        if mask is not None:
            if mask.shape[3] not in (1, inside.shape[3]):
                self._of_keys_alone("mask", mask, spec.max_seqlen_q, keys)  # raises
            inside = inside & mask
        return spec._replace(mask=inside, key_lengths=None)

    def _of_keys_alone(self, name: str, t: torch.Tensor, queries: int, keys: int) -> bool:
        rows, columns = t.shape[2:]
        if columns == keys and rows == 1:
            return True
        if columns in (1, keys * self.size):
            return False
        raise ValueError(
            f"{name}: under context_parallel wanted (..., 1, {keys}) for this process's keys, or (..., {queries} or 1, "
            f"{keys * self.size}) with a column for every position, got {tuple(t.shape)}"
        )


class resumed:
    """Context manager that puts `spread` in use again: checkpointing recomputes layers after the `with` has ended."""

    def __init__(self, spread: Any):
        self._spread = spread

    def __enter__(self) -> None:
        self._before = _parallel.set_current(self._spread)

    def __exit__(self, *error) -> None:
        _parallel.set_current(self._before)


# ---- torch's own context_parallel, which accelerate and Trainer use ---------------------------------
_TORCH = "torch.distributed.tensor.experimental._context_parallel._attention"
_made: dict[tuple, context_parallel] = {}


def current() -> Any:
    """The context_parallel in use, this package's or torch's; None outside of one.

    torch.distributed.tensor.experimental.context_parallel (accelerate's cp_size) replaces only
    F.scaled_dot_product_attention. Its layout of sequences is the same as here, so this package's attention runs as a
    ring on the same mesh.
    """
    found = _parallel.current()
    if found is not None:
        return found
    module = sys.modules.get(_TORCH)
    replaced = None if module is None else torch.nn.functional.scaled_dot_product_attention
    if replaced is None or replaced not in module._replaced_functions:  # type: ignore[union-attr]
        return None
    code, cells = replaced.__code__, replaced.__closure__ or ()
    mesh = cells[code.co_freevars.index("device_mesh")].cell_contents
    balanced = bool(module._cp_options.enable_load_balance)  # type: ignore[union-attr]
    key = (mesh, balanced)
    if key not in _made:
        _made[key] = context_parallel(mesh, load_balance=balanced)
    return _made[key]
