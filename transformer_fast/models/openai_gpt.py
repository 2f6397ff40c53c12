"""OpenAI GPT (Radford et al., 2018), every head: HF's parameters and names, our computation."""

import functools
from typing import Any

import torch
from transformers import GenerationMixin as HFGenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutput,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
)
from transformers.models.openai import modeling_openai as hf
from transformers.pytorch_utils import Conv1D

from .._transformers import CACHE_NAMES, cached
from ..generation import GenerationMixin, StepDescription
from ..layers import SlotTable, TransformerSpec
from ..layers.projection import register_transposed
from ._base import Adopted, ModelMixin, Want, check_inputs
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
from ._heads import kept_positions
from ._layer import Layer
from ._run_stack import Context, Inputs, decoding_cache, run_stack
from ._stock import why_hf_forward

__all__ = [
    "OpenAIGPTDoubleHeadsModel",
    "OpenAIGPTForSequenceClassification",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTModel",
]

SLOTS = SlotTable(
    qkv="attn.c_attn",
    attention_dropout="attn.attn_dropout",
    attention_output="attn.c_proj",
    attention_output_dropout="attn.resid_dropout",
    attention_norm="ln_1",
    up="mlp.c_fc",
    down="mlp.c_proj",
    output_dropout="mlp.dropout",
    output_norm="ln_2",
)
_ADOPTED = Adopted()
_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}  # this "gelu" is the tanh form
register_transposed(Conv1D)


def spec_of(config) -> TransformerSpec:
    return TransformerSpec(
        num_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        causal=True,
        activation=_ACTIVATIONS[config.afn],
    )


@_ADOPTED.register
class Block(Layer, hf.Block):
    _table = SLOTS


class _OpenAIGPTMixin(ModelMixin):
    _adopted = _ADOPTED
    config: Any


@_ADOPTED.register
class OpenAIGPTModel(GPTBase, _OpenAIGPTMixin, hf.OpenAIGPTModel):
    __doc__ = hf.OpenAIGPTModel.__doc__
    gradient_checkpointing = False

    def _words(self):
        return self.tokens_embed

    def _position_table(self):
        return self.positions_embed

    def _spec(self, causal: bool) -> TransformerSpec:
        return spec_of(self.config)

    @public_forward(hf.OpenAIGPTModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """Unlike HF's, it can use a cache: with past_key_values or use_cache=True."""
        want = kwargs.pop("want", None)  # passed by our heads, which read unpadded rows
        leading, inputs = flatten_leading(
            Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        context = Context(*decoding_cache(self, past_key_values, bool(use_cache)))
        encoded = run_stack(self, inputs, want or Want(), kwargs, context)
        if want is not None:
            return encoded
        states = encoded.restored()
        output = BaseModelOutputWithPast(
            last_hidden_state=states if leading is None else states.unflatten(0, leading),
            **cached(encoded.past_key_values),
            **encoded.extras(),
        )
        return self._finish(output, kwargs)


class OpenAIGPTLMHeadModel(GenerationMixin, _OpenAIGPTMixin, hf.OpenAIGPTLMHeadModel):
    __doc__ = hf.OpenAIGPTLMHeadModel.__doc__

    @functools.wraps(HFGenerationMixin.prepare_inputs_for_generation, assigned=())  # the signature
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        if not (why_hf_forward(self) or _goes_without_cache(input_ids, kwargs)):
            return HFGenerationMixin.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
        # HF's own forward has no cache and reads all tokens at every step.
        dropped = (*CACHE_NAMES, "use_cache", "next_sequence_length", "is_first_iteration")
        kwargs = {k: v for k, v in kwargs.items() if k not in dropped}
        return hf.OpenAIGPTLMHeadModel.prepare_inputs_for_generation(self, input_ids, **kwargs)

    def step_description(self) -> StepDescription:
        t = self.transformer
        return StepDescription(
            self, [SLOTS.read(layer) for layer in t.h], spec_of(self.config), t.tokens_embed, self.lm_head,
            position=t.positions_embed,
        )  # fmt: skip

    @public_forward(hf.OpenAIGPTLMHeadModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values=None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        leading, inputs = flatten_leading(
            Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        labels, kwargs = flatten_labels(leading, labels, kwargs)
        source = check_inputs(inputs.input_ids, inputs.inputs_embeds, self.config.n_embd)
        shifted = shifted_labels(labels, kwargs.get("shift_labels"))
        encoded = self.transformer(
            **inputs.given(), past_key_values=past_key_values, use_cache=use_cache,
            want=Want(read=kept_positions(source, logits_to_keep, shifted)), **kwargs,
        )  # fmt: skip
        loss, logits = causal_logits(self, encoded, logits_to_keep, labels, shifted, kwargs)
        logits = logits if leading is None else logits.unflatten(0, leading)
        if encoded.past_key_values is None:
            return self._finish(CausalLMOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)
        return self._finish(
            CausalLMOutputWithPast(loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras()),
            kwargs,
        )


def _goes_without_cache(input_ids: torch.Tensor, step: dict) -> bool:
    """Whether the forward of a step is HF's own, which keeps no cache: a prompt has no token to attend to. Then the
    cache stays empty, and later steps go without it too. step: keywords of prepare_inputs_for_generation."""
    cache = next((step[name] for name in CACHE_NAMES if step.get(name) is not None), None)
    if cache is None or cache.get_seq_length():
        return False
    new, mask = step.get("next_sequence_length"), step.get("attention_mask")
    if new is not None and new < input_ids.shape[1]:
        return True
    return mask is not None and not bool((mask != 0).any(-1).all())


class OpenAIGPTDoubleHeadsModel(_OpenAIGPTMixin, hf.OpenAIGPTDoubleHeadsModel):
    __doc__ = hf.OpenAIGPTDoubleHeadsModel.__doc__

    @public_forward(hf.OpenAIGPTDoubleHeadsModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mc_token_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mc_labels: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        loss, mc_loss, logits, mc_logits, encoded = double_heads(
            self, inputs, self.transformer, mc_token_ids, labels, mc_labels, kwargs
        )
        return self._finish(
            hf.OpenAIGPTDoubleHeadsModelOutput(
                loss=loss, mc_loss=mc_loss, logits=logits, mc_logits=mc_logits, **encoded.extras()
            ),
            kwargs,
        )


class OpenAIGPTForSequenceClassification(_OpenAIGPTMixin, hf.OpenAIGPTForSequenceClassification):
    __doc__ = hf.OpenAIGPTForSequenceClassification.__doc__

    @public_forward(hf.OpenAIGPTForSequenceClassification.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        loss, logits, encoded = classify_last(self, inputs, self.transformer, labels, kwargs)
        return self._finish(SequenceClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)
