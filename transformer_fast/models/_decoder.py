"""Decoders of today: RMS or layer norm before each sublayer, rotary positions, shared key heads, gated feed-forward."""

from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from .. import ops
from .._transformers import CACHE_NAME, cached
from ..generation import GenerationMixin, StepDescription
from ..layers import Packing, Rotary, SlotTable, TransformerSpec, documents_of
from ..layers.embeddings import embed
from ..layers.projection import dropout_p, linear, norm, rms_norm_of
from ._base import ModelMixin, Want, activation_name, check_inputs
from ._forward import public_forward
from ._gpt import causal_logits, classify_last, shifted_labels
from ._heads import (
    every_position,
    is_labelled,
    kept_positions,
    per_position,
    span_loss,
    span_scores,
    token_loss,
)
from ._run_stack import Context, Inputs, Stack, decoding_cache, run_stack

__all__ = [
    "LLAMA_SLOTS",
    "CausalLM",
    "DecoderBase",
    "Heads",
    "RMSNorm",
    "base_forward",
    "causal_forward",
    "head_forward",
    "spec_of",
]

# Where the layers of Llama, and of the families that followed it, hold what a layer is made of.
LLAMA_SLOTS = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_dropout": "self_attn.attention_dropout",
    "attention_output": "self_attn.o_proj",
    "output_norm": "post_attention_layernorm",
    "up": "mlp.gate_proj",  # the one the activation is applied to
    "activation_fn": "mlp.act_fn",
    "gate": "mlp.up_proj",
    "down": "mlp.down_proj",
}


class RMSNorm:
    """Before HF's class of a family's RMS norm: computed by ops.rms_norm. adds_one: its factor is 1 + weight."""

    is_rms_norm = True
    adds_one = False

    def forward(self, hidden_states):
        return rms_norm_of(self, hidden_states)


def spec_of(config, **differences) -> TransformerSpec:
    """Of a configuration that names its parts as Llama's does."""
    heads = config.num_attention_heads
    windows = ()
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is not None:
        kinds = ["sliding_attention"] * config.num_hidden_layers if kinds is None else kinds
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    known = {
        "num_heads": heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "key_heads": getattr(config, "num_key_value_heads", None),
        "causal": True,
        "norm_position": "pre",
        "gated": True,
        "windows": windows if any(windows) else (),
    }
    if "activation" not in differences:
        known["activation"] = activation_name(config.hidden_act)
    return TransformerSpec(**known | differences)


class DecoderBase(Stack, ModelMixin):
    """For base models. A family says what its layers compute and where they and the embeddings are."""

    _slots: SlotTable
    config: Any
    embed_tokens: Any
    layers: Any
    norm: Any
    rotary_emb: Any

    def spec(self) -> TransformerSpec:
        return spec_of(self.config)

    def embed_scale(self) -> float:
        """What the module of the token embeddings multiplies its rows by."""
        scale = getattr(self.embed_tokens, "embed_scale", None)
        return 1.0 if scale is None else float(scale.to(self.embed_tokens.weight.dtype))

    def angles(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B, S, R / 2) in float32 of position_ids (B, S), by HF's own rule."""
        like = torch.empty(0, dtype=torch.float32, device=position_ids.device)
        cos, sin = self.rotary_emb(like, position_ids)
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]

    def table_of_angles(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (positions, R / 2), float32, on the CPU."""
        cos, sin = self.angles(torch.arange(positions, device=self.embed_tokens.weight.device)[None])
        return cos[0].cpu(), sin[0].cpu()

    def angles_are_fixed(self) -> bool:
        """Whether the angle of a position is the same however long the sequence is."""
        return getattr(self.rotary_emb, "rope_type", "default") not in ("dynamic", "longrope")

    def _layers(self):
        return list(self.layers)[: self.config.num_hidden_layers]

    def _words(self) -> Any:
        return self.embed_tokens

    def _spec(self, causal: bool) -> TransformerSpec:
        return self.spec()

    def _causal(self, kwargs: dict) -> bool:
        return True

    def _documents(self, inputs: Inputs, shape: tuple[int, int], kwargs: dict) -> torch.Tensor | None:
        return documents_of(shape, inputs.position_ids, kwargs)

    def _rotary(self, packing: Packing, positions: torch.Tensor | None, past, device: torch.device) -> Rotary:
        if positions is None:
            positions = (packing.columns(device) + past)[None]
        return Rotary.of(packing, *self.angles(positions))

    def _embed(self, packing: Packing, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        return embed(
            packing, self.embed_tokens, None, None, None, None, input_ids=inputs.input_ids,
            inputs_embeds=inputs.inputs_embeds, position_ids=None, segment_ids=None,
        )  # fmt: skip

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        return norm(self.norm, rows)


def base_forward(hf_class: Any):
    """forward of a base model."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        want = kwargs.pop("want", None)  # given by our heads, which read packed rows
        if want is None and _is_for_hf(self, attention_mask, past_key_values):
            return hf_class.forward(
                self, input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache,
                **{CACHE_NAME: past_key_values}, **kwargs,
            )  # fmt: skip
        cache, _ = decoding_cache(self, past_key_values, use_cache)
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        encoded = run_stack(self, inputs, want or Want(), kwargs, Context(cache, returns_cache=True))
        if want is not None:
            return encoded
        output = BaseModelOutputWithPast(
            last_hidden_state=encoded.restored(), **cached(encoded.past_key_values), **encoded.extras()
        )
        return self._finish(output, kwargs)

    return forward


def _is_for_hf(model: Any, attention_mask, cache) -> bool:
    """Masks made per kind of layer, and windows over caches of a fixed size, are HF's own business."""
    if isinstance(attention_mask, dict):
        return True
    return bool(cache is not None and getattr(cache, "is_compileable", False) and model.base_model.spec().windows)


class CausalLM(GenerationMixin):
    """For models with a language modelling head; before ModelMixin and HF's class."""

    config: Any
    lm_head: Any

    def logits_softcap(self) -> float:
        return 0.0

    def step_description(self: Any) -> StepDescription:
        body = self.base_model
        spec = body.spec()
        return StepDescription(
            self, [body._slots.read(layer) for layer in body._layers()], spec,
            body.embed_tokens, self.lm_head, embed_scale=body.embed_scale(), final_norm=body.norm,
            rotary=body.table_of_angles, logits_softcap=self.logits_softcap(),
            refused="" if body.angles_are_fixed() else "the angles of its rotary positions change with the length",
        )  # fmt: skip


def causal_forward(hf_class: Any):
    """forward of a language modelling head."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        if _is_for_hf(self, attention_mask, past_key_values):
            return hf_class.forward(
                self, input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, labels=labels,
                use_cache=use_cache, logits_to_keep=logits_to_keep, **{CACHE_NAME: past_key_values}, **kwargs,
            )  # fmt: skip
        source = check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        shifted = shifted_labels(labels, kwargs.get("shift_labels"))
        encoded = self.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            want=Want(read=kept_positions(source, logits_to_keep, shifted)), **kwargs,
        )  # fmt: skip
        softcap = self.logits_softcap()
        scored = None if softcap else labels  # the loss is of the capped logits
        loss, logits = causal_logits(self, encoded, logits_to_keep, scored, shifted, kwargs)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
            if labels is not None:
                loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return self._finish(
            CausalLMOutputWithPast(
                loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras()
            ),
            kwargs,
        )  # fmt: skip

    return forward


class Heads(ModelMixin):
    """For models with a head of HF's generic kinds; before HF's class."""

    config: Any
    base_model: Any
    score: Any
    qa_outputs: Any

    def _classify(self, inputs: dict, labels, kwargs: dict):
        loss, logits, encoded = classify_last(self, inputs, self.base_model, labels, kwargs)
        output = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras()
        )
        return self._finish(output, kwargs)

    def _classify_tokens(self, inputs: dict, labels, kwargs: dict):
        source = check_inputs(inputs["input_ids"], inputs["inputs_embeds"], self.config.hidden_size)
        labels = per_position(labels, source)
        encoded = self.base_model(**inputs, want=Want(read=is_labelled(labels)), **kwargs)
        rows = ops.dropout(encoded.rows, dropout_p(self.dropout))  # type: ignore[attr-defined]
        logits = encoded.packing.unpack(linear(self.score, rows))
        loss = None if labels is None else token_loss(logits, labels)
        return self._finish(TokenClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _find_spans(self, inputs: dict, labels, kwargs: dict):
        """start_logits and end_logits at padding are the dtype's lowest number, so that no argmax picks it. With labels
        padding is computed, as HF's loss counts it."""
        source = check_inputs(inputs["input_ids"], inputs["inputs_embeds"], self.config.hidden_size)
        scored = labels is not None
        read = every_position(source) if scored else None
        encoded = self.base_model(**inputs, want=Want(read=read), **kwargs)
        start, end = span_scores(linear(self.qa_outputs, encoded.rows), encoded.packing)
        loss = span_loss(start, end, *labels) if scored else None
        return self._finish(
            QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **encoded.extras()), kwargs
        )


def head_forward(hf_class: Any, compute, *, spans: bool = False):
    """forward of one of Heads; compute: its method. spans: labels are start_positions and end_positions."""

    @public_forward(hf_class.forward)
    def labelled(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        inputs = _inputs(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        return compute(self, inputs | {"use_cache": use_cache}, labels, kwargs)

    @public_forward(hf_class.forward)
    def spanned(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = _inputs(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        whole = start_positions is not None and end_positions is not None
        return compute(self, inputs, (start_positions, end_positions) if whole else None, kwargs)

    return spanned if spans else labelled


def _inputs(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds) -> dict:
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
        "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
    }  # fmt: skip
