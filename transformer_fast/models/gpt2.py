"""GPT-2 (Radford et al., 2019), every head: HF's parameters and names, our computation."""

from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D

from .. import ops
from .._transformers import cached
from ..generation import GenerationMixin, StepDescription
from ..layers import SlotTable, TransformerSpec, documents_of
from ..layers.projection import dropout_p, linear, norm, register_transposed
from ._base import Adopted, ModelMixin, Want, activation_name, check_inputs
from ._forward import public_forward
from ._gpt import (
    GPTBase,
    causal_logits,
    classify_last,
    double_heads,
    flatten_labels,
    flatten_leading,
    shifted_labels,
)
from ._heads import every_position, is_labelled, kept_positions, span_loss, span_scores, token_loss
from ._layer import AttentionModule, Layer
from ._run_stack import Context, Inputs, caches_in_hf, decoding_cache, run_stack

__all__ = [
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
]

SLOTS = SlotTable(
    attention_norm="ln_1",
    qkv="attn.c_attn",
    attention_dropout="attn.attn_dropout",
    attention_output="attn.c_proj",
    attention_output_dropout="attn.resid_dropout",
    cross_norm="ln_cross_attn",
    cross_query="crossattention.q_attn",
    cross_key_value="crossattention.c_attn",
    cross_dropout="crossattention.attn_dropout",
    cross_output="crossattention.c_proj",
    cross_output_dropout="crossattention.resid_dropout",
    output_norm="ln_2",
    up="mlp.c_fc",
    activation_fn="mlp.act",
    down="mlp.c_proj",
    output_dropout="mlp.dropout",
)
_ADOPTED = Adopted()
register_transposed(Conv1D)


def spec_of(config) -> TransformerSpec:
    # config.reorder_and_upcast_attn (scores in float32) needs nothing: attention here always computes scores in
    # float32.
    return TransformerSpec(
        num_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        scale=None if config.scale_attn_weights else 1.0,
        scale_by_layer=config.scale_attn_by_inverse_layer_idx,
        causal=True,
        norm_position="pre",
        activation=activation_name(config.activation_function),
    )


@_ADOPTED.register
class GPT2Block(Layer, hf.GPT2Block):
    _table = SLOTS


@_ADOPTED.register
class GPT2Attention(AttentionModule, hf.GPT2Attention):
    pass


class _GPT2Mixin(ModelMixin):
    _adopted = _ADOPTED
    config: Any


@_ADOPTED.register
class GPT2Model(GPTBase, _GPT2Mixin, hf.GPT2Model):
    __doc__ = hf.GPT2Model.__doc__

    def _words(self):
        return self.wte

    def _position_table(self):
        return self.wpe

    def _spec(self, causal: bool) -> TransformerSpec:
        return spec_of(self.config)

    def _documents(self, inputs: Inputs, shape: tuple[int, int], kwargs: dict) -> torch.Tensor | None:
        return documents_of(shape, inputs.position_ids, kwargs)

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        return norm(self.ln_f, rows)

    @public_forward(hf.GPT2Model.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        want = kwargs.pop("want", None)  # passed by our heads, which read unpadded rows
        leading, inputs = flatten_leading(
            Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        caches = caches_in_hf(self, use_cache)
        past_key_values, use_cache = self._cache(past_key_values, use_cache)
        context = Context(
            past_key_values, use_cache, encoder_hidden_states, encoder_attention_mask, caches_in_hf=caches
        )
        encoded = run_stack(self, inputs, want or Want(), kwargs, context)
        if want is not None:
            return encoded
        states = encoded.restored()
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=states if leading is None else states.unflatten(0, leading),
            **cached(encoded.past_key_values),
            **encoded.extras(cross=True),
        )
        return self._finish(output, kwargs)

    def _cache(self, past_key_values, use_cache: bool | None):
        crosses = getattr(self.config, "add_cross_attention", False)
        past_key_values, use_cache = decoding_cache(self, past_key_values, use_cache, crosses=crosses)
        if use_cache and crosses and not hasattr(past_key_values, "cross_attention_cache"):  # made by the caller
            past_key_values = EncoderDecoderCache(past_key_values, self._new_cache())
        return past_key_values, use_cache


class _Described:
    def step_description(self: Any) -> StepDescription:
        t = self.transformer
        return StepDescription(
            self, [SLOTS.read(layer) for layer in t.h], spec_of(self.config), t.wte, self.lm_head,
            position=t.wpe, final_norm=t.ln_f,
        )  # fmt: skip


class GPT2LMHeadModel(_Described, GenerationMixin, _GPT2Mixin, hf.GPT2LMHeadModel):
    __doc__ = hf.GPT2LMHeadModel.__doc__

    @public_forward(hf.GPT2LMHeadModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        leading, inputs = flatten_leading(
            Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        labels, kwargs = flatten_labels(leading, labels, kwargs)
        source = check_inputs(inputs.input_ids, inputs.inputs_embeds, self.config.n_embd)
        shifted = shifted_labels(labels, kwargs.get("shift_labels"))
        encoded = self.transformer(
            **inputs.given(), past_key_values=past_key_values, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask, use_cache=use_cache,
            want=Want(read=kept_positions(source, logits_to_keep, shifted, encoder_hidden_states is not None)),
            **kwargs,
        )  # fmt: skip
        loss, logits = causal_logits(self, encoded, logits_to_keep, labels, shifted, kwargs)
        return self._finish(
            CausalLMOutputWithCrossAttentions(
                loss=loss,
                logits=logits if leading is None else logits.unflatten(0, leading),
                **cached(encoded.past_key_values),
                **encoded.extras(cross=True),
            ),
            kwargs,
        )


class GPT2DoubleHeadsModel(_Described, GenerationMixin, _GPT2Mixin, hf.GPT2DoubleHeadsModel):
    __doc__ = hf.GPT2DoubleHeadsModel.__doc__

    @public_forward(hf.GPT2DoubleHeadsModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mc_token_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mc_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        kwargs = kwargs | {"past_key_values": past_key_values, "use_cache": use_cache}
        loss, mc_loss, logits, mc_logits, encoded = double_heads(
            self, inputs, self.transformer, mc_token_ids, labels, mc_labels, kwargs
        )
        return self._finish(
            hf.GPT2DoubleHeadsModelOutput(
                loss=loss, mc_loss=mc_loss, logits=logits, mc_logits=mc_logits,
                **cached(encoded.past_key_values), **encoded.extras(),
            ),
            kwargs,
        )  # fmt: skip


class GPT2ForSequenceClassification(_GPT2Mixin, hf.GPT2ForSequenceClassification):
    __doc__ = hf.GPT2ForSequenceClassification.__doc__

    @public_forward(hf.GPT2ForSequenceClassification.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        kwargs = kwargs | {"past_key_values": past_key_values, "use_cache": use_cache}
        loss, logits, encoded = classify_last(self, inputs, self.transformer, labels, kwargs)
        return self._finish(
            SequenceClassifierOutputWithPast(
                loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras()
            ),
            kwargs,
        )


class GPT2ForTokenClassification(_GPT2Mixin, hf.GPT2ForTokenClassification):
    __doc__ = hf.GPT2ForTokenClassification.__doc__

    @public_forward(hf.GPT2ForTokenClassification.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        encoded = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds,
            use_cache=use_cache, want=Want(read=is_labelled(labels)), **kwargs,
        )  # fmt: skip
        rows = ops.dropout(encoded.rows, dropout_p(self.dropout))
        logits = encoded.unpadding.pad(linear(self.classifier, rows))
        loss = None if labels is None else token_loss(logits, labels)
        return self._finish(TokenClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)


class GPT2ForQuestionAnswering(_GPT2Mixin, hf.GPT2ForQuestionAnswering):
    __doc__ = hf.GPT2ForQuestionAnswering.__doc__

    @public_forward(hf.GPT2ForQuestionAnswering.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ):
        """As HF's, without padding: start_logits and end_logits there are the dtype's lowest number, so that no argmax
        picks it. With start_positions and end_positions padding is computed, because HF's loss includes it."""
        source = check_inputs(input_ids, inputs_embeds, self.config.n_embd)
        scored = start_positions is not None and end_positions is not None
        read = every_position(source) if scored else None
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.transformer(**inputs.given(), past_key_values=None, want=Want(read=read), **kwargs)
        start, end = span_scores(linear(self.qa_outputs, encoded.rows), encoded.unpadding)
        loss = span_loss(start, end, start_positions, end_positions) if scored else None
        return self._finish(
            QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **encoded.extras()), kwargs
        )
