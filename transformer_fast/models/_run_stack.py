"""One pass through a stack of layers, from a call's arguments to the rows that heads read. All families use it: a
family overrides methods of Stack, which return its modules and compute its embeddings, and run_stack does the rest."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.utils import logging

from .. import ops
from ..layers import Rotary, StackCall, TransformerSpec, Unpadding, documents_of, plan_call, run_layers
from ..layers.embeddings import OutOfRange, check_indices
from ..layers.stock import as_forward_of
from ._base import Encoded, Want, check_inputs, check_integers, read_flags

__all__ = ["Context", "Inputs", "Stack", "caches_in_hf", "decoding_cache", "run_stack"]

logger = logging.get_logger(__name__)


class Inputs(NamedTuple):
    """The inputs of every stack, by HF's names; shapes (B, S), inputs_embeds (B, S, E)."""

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None

    def given(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in self._asdict().items() if t is not None}

    def source(self) -> torch.Tensor:
        """The ids or the embeddings; ValueError if neither or both were given."""
        if (self.input_ids is None) == (self.inputs_embeds is None):
            came = "neither" if self.input_ids is None else "both"
            raise ValueError(f"input_ids, inputs_embeds: wanted exactly one of them, got {came}")
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds  # type: ignore[return-value]


class Context(NamedTuple):
    """The further inputs of a decoder.

    returns_cache: whether past_key_values is part of the output. encoder_states: (B, Se, E), or unpadded rows as
    encoder_unpadding describes them; encoder_mask: HF's encoder_attention_mask. caches_in_hf: whether HF's model
    would have a cache, so that position_ids say nothing about documents.
    """

    past_key_values: Any = None
    returns_cache: bool = False
    encoder_states: torch.Tensor | None = None
    encoder_mask: torch.Tensor | None = None
    encoder_unpadding: Unpadding | None = None
    caches_in_hf: bool = False


_ALONE = Context()


class Stack:
    """The methods that a family overrides for an encoder or a decoder."""

    config: Any
    training: bool
    get_input_embeddings: Any
    # The configuration fields that bound positions and token ids, for messages.
    _positions_setting = "config.max_position_embeddings"
    _words_setting = "config.vocab_size"
    # The attention implementations of HF in which a query without keys gets the mean of all values.
    _averaging: tuple[str, ...] = ("eager",)

    # ---- where the parts are ----
    def _layers(self) -> Iterable[nn.Module]:
        """The layer modules in the order of the calls; a shared layer is there several times."""
        raise NotImplementedError

    def _called_layers(self) -> list[nn.Module]:
        """The layers that this call runs."""
        return list(self._layers())

    def _words(self) -> Any:
        """The token embedding."""
        return self.get_input_embeddings()

    def _embedding_module(self) -> nn.Module | None:
        """The module that _embed replaces, or None where a family has no such module."""
        return None

    def _prefix(self) -> str:
        """Put before the names of arguments in messages ("decoder_")."""
        return ""

    # ---- what they compute ----
    def _spec(self, causal: bool) -> TransformerSpec:
        raise NotImplementedError

    def _causal(self, kwargs: dict) -> bool:
        """Whether attention is causal. kwargs: the call's keywords."""
        causal = kwargs.get("is_causal", getattr(self.config, "is_causal", None))
        return bool(self._decodes() if causal is None else causal)

    def _averages_nothing(self) -> bool:
        """Whether a query without keys gets the mean of all values in HF's model."""
        return self.config._attn_implementation in self._averaging and not torch.compiler.is_compiling()

    def _decodes(self) -> bool:
        """Whether this is a decoder."""
        return bool(getattr(self.config, "is_decoder", False))

    def _relative_bias(self) -> ops.RelativeBias | None:
        """The relative bias, added to the attention scores of every layer."""
        return None

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        """The first layer's input. positions: the result of _positions."""
        raise NotImplementedError

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        """Applied after the last layer: the final norm."""
        return rows

    def _pool(self, first: torch.Tensor) -> torch.Tensor | None:
        """First positions (B, E) -> the input of heads on whole sequences."""
        return first

    # ---- positions, segments, documents ----
    def _positions(self, inputs: Inputs, past) -> torch.Tensor | None:
        """(B or 1, S): the position of each token. None: past, past + 1, ..."""
        return inputs.position_ids

    def _most_positions(self) -> int | None:
        """The number of position embeddings. None: no limit."""
        return None

    def _segments(self) -> tuple[int, str] | None:
        """(the number of segment embeddings, the configuration field it comes from)."""
        return None

    def _new_cache(self) -> DynamicCache:
        """An empty cache of keys and values."""
        return DynamicCache(config=self.config)

    def _documents(self, inputs: Inputs, shape: tuple[int, int], kwargs: dict) -> torch.Tensor | None:
        """See layers.documents_of. Called where there is neither a mask nor a cache."""
        return documents_of(shape, None, kwargs)

    def _rotary(
        self, unpadding: Unpadding, positions: torch.Tensor | None, past, device: torch.device
    ) -> Rotary | Sequence[Rotary] | None:
        """The rotary angles of queries and keys, one for all layers or a list. positions: the result of _positions."""
        return None

    def _plan(self, spec: TransformerSpec, inputs: Inputs, batch: int, length: int, device, **options) -> StackCall:
        """options: further arguments of plan_call."""
        bias = self._relative_bias()
        return plan_call(spec, inputs.attention_mask, batch, length, device, relative_bias=bias, **options)


def run_stack(stack: Stack, inputs: Inputs, want: Want, kwargs: dict, context: Context = _ALONE) -> Encoded:
    """Check the arguments, plan the computation, embed, run the layers. kwargs: the call's other keywords."""
    words, prefix = stack._words(), stack._prefix()
    source = check_inputs(inputs.input_ids, inputs.inputs_embeds, words.embedding_dim, prefix)
    (batch, length), device, cache = source.shape[:2], source.device, context.past_key_values
    past = 0 if cache is None else cache.get_seq_length()
    inputs = _checked_indices(inputs, batch, length)
    positions = stack._positions(inputs, past)
    _check_sizes(stack, inputs, words, prefix, positions, length, past)
    layers = stack._called_layers()
    flags = read_flags(stack.config, kwargs, len(layers))
    documents = None
    if inputs.attention_mask is None and cache is None:
        numbered = inputs._replace(position_ids=None) if context.caches_in_hf else inputs
        documents = stack._documents(numbered, (batch, length), kwargs)
    call = stack._plan(
        stack._spec(stack._causal(kwargs)), inputs, batch, length, device, past_key_values=cache,
        encoder_states=context.encoder_states, encoder_mask=context.encoder_mask,
        encoder_unpadding=context.encoder_unpadding, documents=documents, read=want.read,
        read_first=want.read_first or want.first_only, attentions=flags.attentions,
        refuses_blind=stack._averages_nothing(),
    )  # fmt: skip
    call.rotary = stack._rotary(call.unpadding, positions, past, device)
    embedding = stack._embedding_module()
    rows = as_forward_of(embedding, lambda: stack._embed(call.unpadding, inputs, positions, past))
    whole = flags.hidden_states or flags.attentions or cache is not None or documents is not None
    first_only = want.first_only and not whole and call.unpadding.spread is None
    rows = run_layers(layers, rows, call, first_only=first_only, past_key_values=cache, keep_hidden=flags.keep_hidden)
    rows, pooled, last = stack._close(rows), None, None
    if flags.hidden_states:
        last, rows = call.unpadding.show(rows)
    elif want.returned and torch.is_grad_enabled():
        last = call.unpadding.pad(rows)
    if want.first_only or want.read_first:
        whole = last is not None and call.unpadding.spread is None and length
        pooled = stack._pool(last[:, 0] if whole else rows if first_only else call.unpadding.first(rows))  # type: ignore[index]
    kept = cache if context.returns_cache else None
    return Encoded.of(None if first_only else rows, call, pooled, kept, flags, len(layers), last)


def _checked_indices(inputs: Inputs, batch: int, length: int) -> Inputs:
    """Check dtype and shape of the index tensors; return the inputs with position_ids (B or 1, S)."""
    for name in ("position_ids", "token_type_ids"):
        if (t := getattr(inputs, name)) is not None:
            check_integers(name, t, (batch, length))
    if inputs.position_ids is not None and inputs.position_ids.dim() == 1:
        return inputs._replace(position_ids=inputs.position_ids[None])
    return inputs


def _check_sizes(
    stack: Stack, inputs: Inputs, words: Any, prefix: str, positions: torch.Tensor | None, length: int, past
) -> None:  # fmt: skip
    """Refuse indices beyond the embedding tables."""
    most, setting = stack._most_positions(), stack._positions_setting
    advice = "truncate the text (tokenizer(..., truncation=True))"
    if most is None:
        pass
    elif inputs.position_ids is not None:
        check_indices("position_ids", inputs.position_ids, most, setting)
    elif positions is not None:
        given = "input_ids" if inputs.inputs_embeds is None else "inputs_embeds"
        check_indices(f"the positions of {prefix}{given}", positions, most, f"{setting}; {advice}")
    elif isinstance(past, int) and past + length > most:
        raise OutOfRange(f"{prefix}input_ids: {past + length} positions exceed {setting} = {most}; {advice}")
    if inputs.input_ids is not None:
        check_indices(f"{prefix}input_ids", inputs.input_ids, words.num_embeddings, stack._words_setting)
    if inputs.token_type_ids is not None and (segments := stack._segments()) is not None:
        check_indices("token_type_ids", inputs.token_type_ids, *segments)


def caches_in_hf(stack: Stack, use_cache: bool | None) -> bool:
    """Whether HF's decoder makes a cache for this call. It does so in training too."""
    wanted = getattr(stack.config, "use_cache", False) if use_cache is None else use_cache
    return bool(wanted) and not (stack.training and getattr(stack, "gradient_checkpointing", False))


def decoding_cache(
    stack: Stack, past_key_values: Any, use_cache: bool | None, *, crosses: bool = False, in_training: bool = False
) -> tuple[Any, bool]:
    """(the cache of a decoder's call or None, whether the call returns it), by HF's rule.

    In training a cache is made only if the call asks for it, because with a cache padding is not dropped; in_training:
    also if config.use_cache is set. crosses: the decoder reads an encoder, whose keys are cached too. Under gradient
    checkpointing there is no cache.
    """
    if use_cache is None:
        wanted = in_training or past_key_values is not None or not stack.training
        use_cache = wanted and bool(getattr(stack.config, "use_cache", False))
    if stack.training and getattr(stack, "gradient_checkpointing", False):
        if use_cache or past_key_values is not None:
            logger.warning_once("A cache does not go with gradient checkpointing: use_cache=False is used.")
        return None, False
    if use_cache and past_key_values is None:
        past_key_values = stack._new_cache()
        if crosses:
            past_key_values = EncoderDecoderCache(past_key_values, stack._new_cache())
    return past_key_values, use_cache
