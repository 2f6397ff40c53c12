"""attn_implementation="transformer_fast" for every Hugging Face model that uses the attention interface.

transformers calls two functions of an implementation. One makes the mask, once per forward pass, from the 2-D padding
mask and the model's pattern (causal, bidirectional, sliding window). The other computes attention in every layer. Our
mask is a rule (`LazyMask`) instead of an S x S tensor wherever the kernels can apply the rule themselves.
"""

import torch

from .._version import TRANSFORMERS, old_transformers
from ..layers.unpadding import documents_of, spread_in_use
from ..ops import attention_probabilities, parallel, scaled_dot_product_attention, varlen_attention
from .lazy_mask import Documents, LazyMask, MaskRule

NAME = "transformer_fast"


def register() -> None:
    """Register attn_implementation="transformer_fast" with transformers.

    Importing both packages, in either order, does this automatically; a further call changes nothing.

    Raises:
        ImportError: transformers is not installed, or older than 5.17.

    Examples:
        >>> import transformer_fast
        >>> transformer_fast.register()
    """
    if old := old_transformers():
        raise ImportError(f"register: {old}")
    try:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(f"register needs transformers: pip install '{TRANSFORMERS}' ({error})") from error
    # Both must be registered: without a mask function transformers passes no mask, and padding would be attended to.
    AttentionMaskInterface.register(NAME, attention_mask)
    AttentionInterface.register(NAME, attention_forward)


# ---- the mask, once per forward pass ------------------------------------------------------------------
def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """The mask of one forward pass: None, a `LazyMask`, or transformers' own (B, 1, Sq, Sk) bool mask; its float mask
    for a model that has attention written into it, and adds what it gets to its scores.

    Arguments and values are those of transformers.masking_utils.sdpa_mask. attention_mask: (B, <= Sk) bool, True for
    tokens. The result None means all keys, or, in a causal model with Sq > 1, a plain causal mask with query 0 at key
    0. Rules exist for causal and bidirectional patterns, with or without a sliding window, within documents or not.
    Other patterns, traced calls and decoding steps that generate() may compile get transformers' dense mask.
    """
    from transformers import masking_utils
    from transformers.utils.import_utils import is_tracing

    from .._transformers import config_takes_attention, modules_tell_causality

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    spread = spread_in_use()
    leaves_causality = allow_is_causal_skip and (
        "config" not in kwargs or modules_tell_causality(type(kwargs["config"]))
    )
    if "config" in kwargs and not config_takes_attention(type(kwargs["config"])):
        if spread is not None:
            raise ValueError(
                f"model: transformers has attention written into the models of {type(kwargs['config']).__name__}, "
                "where context_parallel cannot reach it"
            )
        return masking_utils.eager_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,  # type: ignore[arg-type]
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs,
        )  # fmt: skip
    if spread is not None:
        return _spread_mask(spread, batch_size, q_length, kv_length, mask_function, attention_mask, device)
    pattern = None if use_vmap or is_tracing(attention_mask) else _pattern(mask_function)
    if pattern is None and not use_vmap and attention_mask is None and q_length == kv_length and not kv_offset:
        documents, pattern_within = _pattern_of_documents(mask_function)
        if documents is not None and pattern_within is not None and not is_tracing(documents) and not int(q_offset):
            rule = _rule(pattern_within, q_length, kv_length, 0, 0, None)
            if rule is not None:
                rule = rule._replace(documents=Documents(documents))
                return LazyMask(rule, batch_size, q_length, kv_length, torch.device(device))
    compiled_decoding = q_length == 1 and not allow_is_causal_skip and pattern is not None and pattern[1] == 0
    rule = None
    if pattern is not None and not compiled_decoding:
        rule = _rule(pattern, q_length, kv_length, int(q_offset), kv_offset, attention_mask)
    if rule is None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,  # type: ignore[arg-type]
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
            allow_is_causal_skip=leaves_causality, allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    if rule.padding is None and rule.key_lengths is None and rule.left is None:
        everything = rule.reach == kv_length and rule.right is None
        causal = pattern is not None and pattern[1] == 0
        if everything and (allow_is_causal_skip and q_length == 1 if causal else allow_is_bidirectional_skip):
            return None
        if causal and leaves_causality and rule.right == 0 and rule.shift == 0:
            return None
    return LazyMask(rule, batch_size, q_length, kv_length, torch.device(device))


def _rule(pattern, q_length, kv_length, q_offset, kv_offset, padding) -> MaskRule | None:
    """The rule for a pattern and a padding mask, or None if no kernel takes their combination."""
    left, right = pattern
    shift = q_offset - kv_offset
    reach = kv_length if right is None else min(kv_length, max(shift + q_length + right, 0))
    if left is not None and left >= shift + q_length - 1:
        left = None
    if right is not None and right >= reach - 1 - shift:
        right = None
    if left is None and right is None:
        shift = 0
    elif shift not in (0, reach - q_length):
        return None
    key_lengths = None
    if padding is not None:
        padding = torch.nn.functional.pad(padding, (0, max(kv_offset + reach - padding.shape[-1], 0)))
        padding = padding[:, kv_offset : kv_offset + reach]
        lengths = padding.sum(-1, dtype=torch.int32)
        right_sided = (padding == (torch.arange(reach, device=padding.device) < lengths[:, None])).all()
        full, right_sided = torch.stack([lengths.sum() == padding.numel(), right_sided]).tolist()  # one wait on a GPU
        if full:
            padding = None
        elif right_sided and shift == 0:
            padding, key_lengths = None, lengths
    return MaskRule(reach, padding, key_lengths, left, right, shift)


def _spread_mask(spread, batch: int, queries: int, keys: int, mask_function, padding, device) -> LazyMask:
    """The mask under context_parallel: the pattern, and which of this process's keys are tokens."""
    pattern = _pattern(mask_function, spread)
    if pattern is None or (queries != keys and pattern != (None, None)):
        raise NotImplementedError(
            "attention_mask: under context_parallel wanted a causal, bidirectional or sliding pattern over one "
            f"sequence per row without a cache, got {mask_function} for {queries} queries and {keys} keys"
        )
    rule = MaskRule(keys, None if padding is None or bool(padding.all()) else padding.bool(), None, *pattern)
    return LazyMask(rule, batch, queries, keys, torch.device(device))


def _pattern(mask_function, spread=None) -> tuple[int | None, int | None] | None:
    """(left, right): how many keys a query sees on either side of its position, None for no limit; or None for an
    unknown pattern.

    transformers describes a pattern by nested closures over (batch, head, query, key). They are recognised by their
    code objects, and their parameters are read from their free variables. So a changed closure is unknown, never
    misread.
    """
    from transformers import masking_utils as hf

    if mask_function is hf.causal_mask_function:
        return None, 0
    if mask_function is hf.bidirectional_mask_function:
        return None, None
    code = getattr(mask_function, "__code__", None)
    if code is hf.and_masks().__code__:
        parts = _free_variable(mask_function, "mask_functions")
        if spread is not None:  # the two chunks of a process look like documents
            parts = [part for part in parts if not _is_jump(part, spread)]
        limits = [_pattern(part, spread) for part in parts]
        if not limits or None in limits:
            return None
        return tuple(min((v for v in side if v is not None), default=None) for side in zip(*limits))  # type: ignore
    remapped = getattr(hf, "remap_positions_for_packed_sequence", None)
    if spread is not None and remapped is not None and code is remapped(None, None).__code__:
        return _pattern(_free_variable(mask_function, "mask_function"), spread)
    if code is hf.sliding_window_overlay(1).__code__:
        return _free_variable(mask_function, "sliding_window") - 1, None
    if code is hf.sliding_window_bidirectional_overlay(1).__code__:
        return (_free_variable(mask_function, "sliding_window"),) * 2
    return None


def _pattern_of_documents(mask_function) -> tuple[torch.Tensor | None, tuple[int | None, int | None] | None]:
    """(the document of every position (B, S), the pattern within documents), or (None, None) without documents.

    Where position_ids restart, transformers makes an and_masks of the pattern and packed_sequence_mask_function; from
    5.23 on, the pattern's positions are counted within the documents.
    """
    from transformers import masking_utils as hf

    unknown = None, None
    if not _is_like(mask_function, hf.and_masks()):
        return unknown
    parts = list(_free_variable(mask_function, "mask_functions"))
    packed = [part for part in parts if _is_like(part, hf.packed_sequence_mask_function(torch.zeros(1)))]
    if len(packed) != 1:
        return unknown
    parts.remove(packed[0])
    if (remapped := getattr(hf, "remap_positions_for_packed_sequence", None)) is not None:
        like = remapped(None, None)
        parts = [_free_variable(part, "mask_function") if _is_like(part, like) else part for part in parts]
    return _free_variable(packed[0], "packed_sequence_mask"), _pattern(hf.and_masks(*parts))


def _is_like(mask_function, other) -> bool:
    """Whether both are closures of the same function."""
    return getattr(mask_function, "__code__", None) is other.__code__


def _is_jump(mask_function, spread) -> bool:
    """Whether the documents of a mask are only the two chunks of this process, whose positions are not contiguous."""
    from transformers import masking_utils as hf

    if not _is_like(mask_function, hf.packed_sequence_mask_function(torch.zeros(1))):
        return False
    numbers = _free_variable(mask_function, "packed_sequence_mask")
    jumps = spread.positions(numbers.shape[1], numbers.device).diff() != 1
    return bool(((numbers.diff() != 0) == jumps).all())


def _free_variable(function, name: str):
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


# ---- attention, in every layer ------------------------------------------------------------------------
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(softcap(scaling * Q K^T) + position_bias + mask) V, with the signature of transformers' interface.

    query (B, H, Sq, D), key (B, Hk, Sk, D), value (B, Hk, Sk, Dv), H % Hk == 0, D and Dv in 1..256, any strides.
    attention_mask: the result of `attention_mask` above, or a user's bool or float mask that broadcasts to
    (B, H, Sq, Sk). With a user's mask, is_causal and sliding_window are ignored; without any mask, module.is_causal (or
    is_causal) and sliding_window apply.
    cu_seq_lens_q, seq_idx: documents of a row, which do not attend to one another (see layers.documents_of).
    position_bias: float, (1 or B, H, Sq, Sk), with gradient. s_aux: (H,) attention sinks, one more logit in every
    softmax's denominator. Returns out (B, Sq, H, Dv) and, with output_attentions, the attention weights
    (B, H, Sq, Sk) before dropout, else None. Raises NotImplementedError for a paged cache.
    """
    spread = spread_in_use()
    if spread is not None and parallel.current() is not spread:  # torch's own context_parallel
        before = parallel.set_current(spread)
        try:
            return attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, softcap,
                sliding_window, s_aux, output_attentions, **kwargs,
            )  # fmt: skip
        finally:
            parallel.set_current(before)
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            'cache: continuous batching (a paged cache) is not supported by attn_implementation="transformer_fast"; '
            'wanted none, so use attn_implementation="sdpa" for it'
        )
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:  # learned queries, the same for the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    sq, sk = query.shape[2], key.shape[2]
    rule, mask, bias = _read_mask(
        module, attention_mask, position_bias, query.shape[0], sq, sk, is_causal, sliding_window
    )
    documents = _documents_of_call(query.shape[0], sq, rule, kwargs) if sq == sk else None
    if documents is not None:
        plain = rule is None or (rule.padding is None and rule.key_lengths is None and not rule.shift)
        weights_wanted = output_attentions or _attentions_recorded(module)
        if plain and mask is None and bias is None and s_aux is None and not weights_wanted:
            return _documents(query, key, value, documents, rule, dropout, scaling, softcap), None
        mask, rule = _within_documents(documents, rule, mask, sq), None
    options: dict = {}
    if rule is not None:
        if rule.reach < sk:
            key, value = key[:, :, : rule.reach], value[:, :, : rule.reach]
            bias = bias[..., : rule.reach] if bias is not None and bias.shape[-1] == sk else bias
        options["key_lengths"] = rule.key_lengths
        options["is_causal"] = rule.right == 0
        if rule.left is not None or rule.right:
            options["window"] = (rule.left, rule.right)
        options["causal_alignment"] = "bottom_right" if rule.shift else "top_left"
        mask = None if rule.padding is None else rule.padding[:, None, None, :]
    width = value.shape[-1]
    if width != query.shape[-1]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = _same_width(query, key, value)
    output_attentions = output_attentions or _attentions_recorded(module)
    need_lse = s_aux is not None or output_attentions
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1], bias=bias, softcap=softcap or 0.0, return_lse=need_lse, **options,
    )  # fmt: skip
    weights = None
    if need_lse:
        out, lse = out
        if output_attentions:
            weights = _weights(query, key, lse, scaling, mask, bias, softcap, rule, sk)
        if s_aux is not None:
            # exp(lse) / (exp(lse) + exp(sink)): the keys' share of the softmax.
            share = torch.sigmoid(lse - s_aux.to(lse.dtype).view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
            out = out * share
            weights = None if weights is None else weights * share
    out = out.transpose(1, 2)
    return (out if out.shape[-1] == width else out[..., :width]), weights


def _documents_of_call(batch: int, length: int, rule: MaskRule | None, options: dict) -> Documents | None:
    """The documents of a call: from position_ids (in the mask's rule), from cu_seq_lens_q or seq_idx, or both
    merged."""
    told = documents_of((batch, length), None, options)
    known = None if rule is None else rule.documents
    if told is None:
        return known
    if known is not None:
        begins = (told.diff(dim=-1) != 0) | (known.numbers.to(told.device).diff(dim=-1) != 0)
        told = torch.nn.functional.pad(begins.cumsum(-1), (1, 0))
    return Documents(told)


def _documents(
    query, key, value, documents: Documents, rule: MaskRule | None, dropout, scaling, softcap
) -> torch.Tensor:
    """Attention within each document of a row: out (B, S, H, D)."""
    unpadding = documents.unpadding
    width = value.shape[-1]
    if width != query.shape[-1]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = _same_width(query, key, value)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    window = (rule.left, rule.right) if rule is not None and (rule.left is not None or rule.right) else None
    out = varlen_attention(
        q, k, v, unpadding.cu_seqlens, None, unpadding.max_seqlen, None, dropout, rule is not None and rule.right == 0,  # type: ignore[arg-type]
        scaling, window=window, softcap=softcap or 0.0,
    )  # fmt: skip
    return unpadding.pad(out)[..., :width]


def _within_documents(documents: Documents, rule: MaskRule | None, mask, length: int) -> torch.Tensor:
    together = documents.together()
    if rule is not None:
        mask = rule.dense(len(together), length, length, together.device)
    return together if mask is None else together & mask


def _read_mask(module, mask, position_bias, batch, sq, sk, is_causal, sliding_window):
    """(rule, bool mask, float bias). At most one of rule and mask is not None."""
    if isinstance(mask, LazyMask):
        if mask.rule is not None and tuple(mask.shape) == (batch, 1, sq, sk):
            return mask.rule, None, position_bias
        mask = mask.dense()
    if mask is not None:
        if not mask.is_floating_point():
            return None, mask, position_bias
        return None, None, mask if position_bias is None else position_bias + mask
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and _tells_causality(module)
    if not is_causal:
        return None, None, position_bias
    # Without a mask, a single query is at the last key's position; several queries start at key 0.
    if (spread := parallel.current()) is not None:
        left = sliding_window - 1 if sliding_window and sliding_window < sk * spread.size else None
        return MaskRule(sk, left=left, right=0), None, position_bias
    shift, reach = (sk - 1, sk) if sq == 1 else (0, min(sq, sk))
    left = sliding_window - 1 if sliding_window and sliding_window < reach else None
    right = None if sq == 1 else 0
    return MaskRule(reach, left=left, right=right, shift=0 if left is None else shift), None, position_bias


def _tells_causality(module) -> bool:
    from .._transformers import modules_tell_causality

    config = getattr(module, "config", None)
    return config is None or modules_tell_causality(type(config))


def _attentions_recorded(module) -> bool:
    """Whether transformers will collect attention weights: not every model passes output_attentions to its layers."""
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    from .._transformers import recorded_outputs

    return any("attentions" in key for key in recorded_outputs(torch.compiler.is_compiling()) or ())


def _same_width(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pad the last dimension with zeros to one width. That changes neither scores nor the original output columns."""
    widest = max(t.shape[-1] for t in tensors)
    return tuple(torch.nn.functional.pad(t, (0, widest - t.shape[-1])) for t in tensors)


def _weights(query, key, lse, scaling, mask, bias, softcap, rule, sk) -> torch.Tensor:
    if rule is not None:
        mask = rule.dense(query.shape[0], query.shape[2], rule.reach, query.device)
    weights = attention_probabilities(query, key, lse, scale=scaling, bias=bias, attn_mask=mask, softcap=softcap or 0.0)
    if weights.dtype == torch.float32:
        # The kernel's log-sum-exp and these scores were rounded differently: normalise so that rows sum to 1.
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights if weights.shape[-1] == sk else torch.nn.functional.pad(weights, (0, sk - weights.shape[-1]))
