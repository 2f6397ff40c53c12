"""The input of BERT-like models: the sum of token, position and segment embeddings and its layer norm, in one pass."""

import torch

from ..backends import Backend, Call, eager, memory, select
from ..backends.philox import threshold
from ..backends.specs import EmbeddingSpec
from . import _common


def _select(spec: EmbeddingSpec) -> Backend:
    features = ("dropout",) if spec.dropout_p else ()
    return select(Call("embedding_layer_norm", spec.word.device.type, spec.word.dtype, spec.word.shape[1], features))


def _stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _check_ids(name: str, ids: torch.Tensor | None, entries: int) -> None:
    """Check ids on the CPU only. On a GPU that would synchronise; the kernels write NaN for wrong ids."""
    if ids is None or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(t) for t in torch.aminmax(ids))
    if low < 0 or high >= entries:
        raise ValueError(f"{name}: wanted values in [0, {entries}), got {low if low < 0 else high}")


def _flat(ids: torch.Tensor | None) -> torch.Tensor | None:
    return None if ids is None else ids.reshape(-1).contiguous()


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _table(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else _rows(t)


def _laid_out(spec: EmbeddingSpec) -> EmbeddingSpec:
    """The spec as the kernels need it: flat ids, and tables with unit stride along the width."""
    return spec._replace(
        ids=spec.ids.reshape(-1).contiguous(), word=_rows(spec.word), position_ids=_flat(spec.position_ids),
        position=_table(spec.position), type_ids=_flat(spec.type_ids), token_type=_table(spec.token_type),
    )  # fmt: skip


def _forward(*args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spec = EmbeddingSpec(*args)
    word = spec.word
    _check_ids("input_ids", spec.ids, word.shape[0])
    if spec.position is not None:
        _check_ids("position_ids", spec.position_ids, spec.position.shape[0])
    if spec.token_type is not None:
        _check_ids("token_type_ids", spec.type_ids, spec.token_type.shape[0])
    rows, width = spec.ids.numel(), word.shape[1]
    y = memory.empty((*spec.ids.shape, width), word.dtype, word.device)
    mean, rstd = (memory.empty((rows,), _stats_dtype(word.dtype), word.device) for _ in range(2))
    if y.numel():
        spec = _laid_out(spec)
        _select(spec).embedding_layer_norm_forward(spec, y.view(rows, width), mean, rstd)
    return y, mean, rstd


def _forward_fake(ids, word, *_):
    stats = [word.new_empty((ids.numel(),), dtype=_stats_dtype(word.dtype)) for _ in range(2)]
    return word.new_empty((*ids.shape, word.shape[1])), *stats


# The fields that get gradients, in the order of the backward op's results and of its `need`.
_NAMES = ("word", "position", "token_type", "norm_weight", "norm_bias")


def _backward_impl(*args) -> tuple[torch.Tensor, ...]:
    """Gradients of the fields in _NAMES; empty where not needed."""
    grad, mean, rstd, *fields, need = args
    spec = EmbeddingSpec(*fields)
    word, width = spec.word, spec.word.shape[1]
    tables = [
        memory.empty(table.shape if wanted and table is not None else (0,), word.dtype, word.device)
        for table, wanted in zip((word, spec.position, spec.token_type), need)
    ]
    vectors = [memory.empty((width if wanted else 0,), rstd.dtype, word.device) for wanted in need[3:]]
    buffers = [t if wanted else None for t, wanted in zip((*tables, *vectors), need)]
    if spec.ids.numel() and width:
        spec = _laid_out(spec)
        rows = grad.reshape(-1, width).contiguous()
        _select(spec).embedding_layer_norm_backward(spec, rows, mean, rstd, *buffers)
    else:
        for buffer in buffers:
            if buffer is not None:
                buffer.zero_()
    if spec.norm_weight is not None:
        vectors = [v.to(spec.norm_weight.dtype) for v in vectors]
    return *tables, *vectors


def _backward_fake(*args):
    _, _, rstd, *fields, need = args
    spec = EmbeddingSpec(*fields)
    word, vector = spec.word, rstd.dtype if spec.norm_weight is None else spec.norm_weight.dtype
    return (
        *(
            word.new_empty(t.shape if wanted and t is not None else (0,))
            for t, wanted in zip((word, spec.position, spec.token_type), need)
        ),
        *(word.new_empty((word.shape[1] if wanted else 0,), dtype=vector) for wanted in need[3:]),
    )


_SPEC = _common.schema_of(EmbeddingSpec)
_backward_op = _common.define(
    "embedding_layer_norm_backward",
    f"(Tensor grad, Tensor mean, Tensor rstd, {_SPEC}, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    _, mean, rstd = output
    _common.save(ctx, EmbeddingSpec(*inputs), mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _plain(spec: EmbeddingSpec) -> tuple[torch.Tensor]:
    """y in plain PyTorch, for gradients of gradients and torch.func transforms."""
    return (eager.embedding_layer_norm(_laid_out(spec))[0].view(*spec.ids.shape, spec.word.shape[1]),)


def _backward(ctx, need, grad, _mean, _rstd):
    spec, mean, rstd = _common.saved(ctx)
    if torch.is_grad_enabled():  # gradients of gradients
        return _common.gradients_of(_plain, spec, _NAMES, (grad,))
    needs = [bool(getattr(need, name)) for name in _NAMES]
    found = dict(zip(_NAMES, _backward_op(grad, mean, rstd, *spec, needs)))
    if need.norm_bias:
        found["norm_bias"] = found["norm_bias"].to(spec.norm_bias.dtype)
    return found


_op = _common.define(
    "embedding_layer_norm",
    f"({_SPEC}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


def _check_lookup(name, ids, table_name, table, shape, word):
    """Check the ids and the table of positions or segments. Returns the ids as int64 in the shape of input_ids."""
    if (ids is None) != (table is None):
        raise ValueError(f"{name}: wanted together with {table_name}, or neither")
    if ids is None:
        return None
    _common.check_integers(name, ids)
    _common.check_same(name, ids, "word_weight", word, dtype=False)
    try:
        ids = ids.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: wanted the shape of input_ids {tuple(shape)} or one that broadcasts to it, got {tuple(ids.shape)}"
        ) from None
    _common.check_floating(table_name, table)
    if table.dim() != 2 or table.shape[1] != word.shape[1]:
        raise ValueError(f"{table_name}: wanted shape (entries, {word.shape[1]}), got {tuple(table.shape)}")
    _common.check_same(table_name, table, "word_weight", word)
    return ids.to(torch.int64)


def embedding_layer_norm(
    input_ids: torch.Tensor,
    word_weight: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    token_type_weight: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-12,
    *,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """y = dropout(layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids])).

    Args:
        input_ids: int64 or int32 of any shape, e.g. (B, S) or unpadded (T,).
        word_weight: (V, N), float16, bfloat16 or float32 (float64 in plain PyTorch).
        position_ids: int64 or int32; broadcasts to the shape of input_ids. None if position_weight is None.
        position_weight: (P, N), word_weight's dtype.
        token_type_ids: int64 or int32; broadcasts to the shape of input_ids. None if token_type_weight is None.
        token_type_weight: (K, N), word_weight's dtype.
        norm_weight: (N,), the tables' dtype or float32.
        norm_bias: (N,), the tables' dtype or float32.
        eps: added to the variance.
        dropout_p: dropout probability in [0, 1]; dropout follows the norm, as in BERT.
        padding_idx: this row of word_weight gets no gradient. Negative values count from the end, as in torch.
        generator: the torch.Generator from which dropout draws its seed.

    Returns:
        (*input_ids.shape, N) in the tables' dtype. The sum and its statistics are computed in float32. The gradients of
        the tables, norm_weight and norm_bias are dense and deterministic, and summed in float32. The backward pass
        keeps nothing of the size of the output.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected. An index
            outside its table raises ValueError on the CPU. On a GPU a check would synchronise, so that row becomes NaN.

    Source:
        Devlin et al., "BERT", 2019, section 3 and figure 2.

    Examples:
        >>> import torch, transformer_fast
        >>> ids, table = torch.tensor([[5, 3, 0]]), torch.randn(10, 16)
        >>> transformer_fast.embedding_layer_norm(ids, table, padding_idx=0).shape
        torch.Size([1, 3, 16])
    """
    _common.check_integers("input_ids", input_ids)
    _common.check_floating("word_weight", word_weight)
    if word_weight.dim() != 2:
        raise ValueError(f"word_weight: wanted shape (V, N), got {tuple(word_weight.shape)}")
    _common.check_same("input_ids", input_ids, "word_weight", word_weight, dtype=False)
    entries, width = word_weight.shape
    shape = input_ids.shape
    position_ids = _check_lookup("position_ids", position_ids, "position_weight", position_weight, shape, word_weight)
    type_ids = _check_lookup(
        "token_type_ids", token_type_ids, "token_type_weight", token_type_weight, shape, word_weight
    )
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _common.check_vector(name, t, width, word_weight)
        if t is not None and t.dtype not in (word_weight.dtype, torch.float32):
            raise TypeError(
                f"{name}: has dtype {t.dtype} but word_weight has {word_weight.dtype}; wanted that or float32"
            )
    _common.check_number("eps", eps, 0.0)
    _common.check_probability("dropout_p", dropout_p)
    padding = -1
    if padding_idx is not None:
        _common.check_integer("padding_idx", padding_idx, -(2**63))
        if not -entries <= padding_idx < entries:
            raise ValueError(f"padding_idx: wanted a row of word_weight, in [{-entries}, {entries}), got {padding_idx}")
        padding = padding_idx % entries
    nothing = dropout_p == 1.0  # the kernels do not handle p = 1
    p = dropout_p if threshold(dropout_p) and not nothing else 0.0
    rng = _common.draw_rng(word_weight.device, generator) if p else None
    tensors = (word_weight, position_weight, token_type_weight, norm_weight, norm_bias)
    ids = input_ids.to(torch.int64)
    spec = EmbeddingSpec(
        ids=ids, word=word_weight, position_ids=position_ids, position=position_weight, type_ids=type_ids,
        token_type=token_type_weight, norm_weight=norm_weight, norm_bias=norm_bias, rng=rng, eps=eps, dropout_p=p,
        padding_idx=padding,
    )  # fmt: skip
    if _common.transformed():
        y = _plain(spec)[0]
    else:
        y = (_forward if _common.direct(*tensors) else _op)(*spec)[0]
    return y * 0 if nothing else y
