"""Modern decoders: a norm before each sublayer, or one norm for both; rotary or learned positions; grouped key heads;
gated or plain feed-forward."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GenericForQuestionAnswering
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
from ..layers import Rotary, SlotTable, TransformerSpec, Unpadding, documents_of
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
from ._run_stack import Context, Inputs, Stack, caches_in_hf, decoding_cache, run_stack

__all__ = [
    "LLAMA_SLOTS",
    "CausalLM",
    "DecoderBase",
    "Heads",
    "LearnedPositions",
    "LlamaRMSNorm",
    "RMSNorm",
    "base_forward",
    "causal_forward",
    "head_forward",
    "spec_of",
]

# Slot -> parameter path, in the layers of Llama and of the families derived from it.
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
    """Mixin, placed before a family's RMS norm of HF: computed by ops.rms_norm. adds_one: scales by 1 + weight."""

    is_rms_norm = True
    adds_one = False

    def forward(self, hidden_states):
        return rms_norm_of(self, hidden_states)


class LlamaRMSNorm(RMSNorm):
    """For norms whose eps is an attribute variance_epsilon, as in Llama."""

    variance_epsilon: float

    @property
    def eps(self) -> float:
        return self.variance_epsilon


def spec_of(config, **differences) -> TransformerSpec:
    """The spec of a configuration whose fields are named as Llama's. differences: fields to override."""
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
    """For base models. A family overrides what its layers compute, and where its layers, norms and embeddings are."""

    _slots: SlotTable
    config: Any
    layers: Any
    norm: Any
    rotary_emb: Any

    def spec(self) -> TransformerSpec:
        return spec_of(self.config)

    def _spec(self, causal: bool) -> TransformerSpec:
        return self.spec()

    def _causal(self, kwargs: dict) -> bool:
        return True

    # ---- where the parts are ----
    def _layers(self) -> Iterable[nn.Module]:
        return list(self.layers)[: self.config.num_hidden_layers]

    def _final_norm(self) -> Any:
        return self.norm

    def _input_dropout(self) -> Any:
        """Dropout on the first layer's input."""
        return None

    # ---- positions, documents ----
    def _documents(self, inputs: Inputs, shape: tuple[int, int], kwargs: dict) -> torch.Tensor | None:
        return documents_of(shape, inputs.position_ids, kwargs)

    def _rotary(
        self, unpadding: Unpadding, positions: torch.Tensor | None, past, device: torch.device
    ) -> Rotary | None:
        if positions is None:
            positions = (unpadding.columns(device) + past)[None]
        return Rotary.of(unpadding, *self.angles(positions))

    def angles(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B, S, R / 2) in float32 of position_ids (B, S), computed by HF's own module."""
        like = torch.empty(0, dtype=torch.float32, device=position_ids.device)
        cos, sin = self.rotary_emb(like, position_ids)
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]

    def table_of_angles(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (positions, R / 2), float32, on the CPU."""
        cos, sin = self.angles(torch.arange(positions, device=self._words().weight.device)[None])
        return cos[0].cpu(), sin[0].cpu()

    def why_angles_change(self) -> str:
        """'' where the angle of a position does not depend on the sequence's length; else a sentence that says so."""
        kind = getattr(getattr(self, "rotary_emb", None), "rope_type", "default")
        if kind == "longrope" or "dynamic" in kind:
            return "the angles of its rotary positions change with the length"
        return ""

    # ---- the two ends ----
    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        return embed(
            unpadding, self._words(), None, None, None, self._input_dropout(), input_ids=inputs.input_ids,
            inputs_embeds=inputs.inputs_embeds, position_ids=None, segment_ids=None,
        )  # fmt: skip

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        final = self._final_norm()
        return rows if final is None else norm(final, rows)

    def _step_parts(self) -> dict[str, Any]:
        """Arguments of StepDescription other than the layers and the token embeddings."""
        scale = getattr(self._words(), "embed_scale", None)
        return {
            "final_norm": self._final_norm(),
            "embed_scale": 1.0 if scale is None else float(scale.to(self._words().weight.dtype)),
        } | self._step_positions()

    def _step_positions(self) -> dict[str, Any]:
        return {"rotary": self.table_of_angles, "refused": self.why_angles_change()}


class LearnedPositions:
    """Mixin, placed before DecoderBase: learned positions in place of rotary angles."""

    def _position_table(self) -> Any:
        raise NotImplementedError

    def _rotary(self, unpadding: Unpadding, positions: torch.Tensor | None, past, device: torch.device) -> None:
        return None

    def _step_positions(self) -> dict[str, Any]:
        return {"position": self._position_table()}


def base_forward(hf_class: Any):
    """forward of a base model of class hf_class."""

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
        want = kwargs.pop("want", None)  # passed by our heads, which read unpadded rows
        segments = kwargs.pop("token_type_ids", None)
        inputs = Inputs(input_ids, attention_mask, segments, position_ids, inputs_embeds)
        if want is None and _is_for_hf(self, attention_mask, past_key_values):
            cache = {CACHE_NAME: past_key_values}
            return hf_class.forward(self, **inputs.given(), use_cache=use_cache, **cache, **kwargs)
        if self._segments() is None:  # HF has no such argument here, or ignores it
            inputs = inputs._replace(token_type_ids=None)
        cache, _ = decoding_cache(self, past_key_values, use_cache)
        context = Context(cache, returns_cache=True, caches_in_hf=caches_in_hf(self, use_cache))
        encoded = run_stack(self, inputs, want or Want(), kwargs, context)
        if want is not None:
            return encoded
        output = BaseModelOutputWithPast(
            last_hidden_state=encoded.restored(), **cached(encoded.past_key_values), **encoded.extras()
        )
        return self._finish(output, kwargs)

    return forward


def _is_for_hf(decoder: DecoderBase, attention_mask, cache) -> bool:
    """Whether HF's forward runs: for one mask per layer kind, and for windows over caches of fixed size."""
    if isinstance(attention_mask, dict):
        return True
    return bool(cache is not None and getattr(cache, "is_compileable", False) and decoder.spec().windows)


class Heads(ModelMixin):
    """Mixin for models with one of HF's generic heads, placed before HF's class."""

    config: Any
    base_model: Any
    get_input_embeddings: Any
    score: Any
    qa_outputs: Any
    loss_function: Any

    def _body(self) -> Any:
        """The DecoderBase: the base model, or a module inside it."""
        return self.base_model

    def _token_head(self) -> Any:
        """The linear layer that scores each token."""
        return self.score

    def _source(self, inputs: Inputs) -> torch.Tensor:
        width = self.get_input_embeddings().embedding_dim
        return check_inputs(inputs.input_ids, inputs.inputs_embeds, width)

    def _classify(self, inputs: Inputs, labels, kwargs: dict):
        loss, logits, encoded = classify_last(self, inputs, self.base_model, labels, kwargs)
        output = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras()
        )
        return self._finish(output, kwargs)

    def _classify_tokens(self, inputs: Inputs, labels, kwargs: dict):
        labels = per_position(labels, self._source(inputs))
        encoded = self.base_model(**inputs.given(), want=Want(read=is_labelled(labels)), **kwargs)
        rows = ops.dropout(encoded.rows, dropout_p(self.dropout))  # type: ignore[attr-defined]
        logits = encoded.unpadding.pad(linear(self._token_head(), rows))
        scored = logits.float() if self.calls_loss_function else logits  # HF's loss functions compute in float32
        loss = None if labels is None else token_loss(scored, labels)
        return self._finish(TokenClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _find_spans(self, inputs: Inputs, labels, kwargs: dict):
        """start_logits and end_logits at padding are the dtype's lowest number, so that no argmax picks it. With labels
        padding is computed, because HF's loss includes it."""
        source = self._source(inputs)
        scored = labels is not None
        read = every_position(source) if scored else None
        encoded = self.base_model(**inputs.given(), want=Want(read=read), **kwargs)
        start, end = span_scores(linear(self.qa_outputs, encoded.rows), encoded.unpadding)
        loss, count = None, kwargs.get("num_items_in_batch")
        if scored and count is not None and isinstance(self, GenericForQuestionAnswering):
            loss = self.loss_function(start, end, *labels, num_items_in_batch=count)
        elif scored:
            loss = span_loss(start, end, *labels)
        return self._finish(
            QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **encoded.extras()), kwargs
        )


class CausalLM(GenerationMixin):
    """Mixin for models with a language modelling head, placed before Heads and HF's class."""

    config: Any
    lm_head: Any

    def logits_softcap(self) -> float:
        return 0.0

    def why_hf_loop(self: Any) -> str:
        """Adds one reason to the common ones. Where angles depend on the length, HF takes the longest row of the batch,
        and the engine may have removed that row."""
        return super().why_hf_loop() or self._body().why_angles_change()

    def step_description(self: Any) -> StepDescription:
        body = self._body()
        return StepDescription(
            self, [body._slots.read(layer) for layer in body._layers()], body.spec(), body._words(), self.lm_head,
            logits_softcap=self.logits_softcap(), **body._step_parts(),
        )  # fmt: skip


def causal_forward(hf_class: Any):
    """forward of a language modelling head of class hf_class."""

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
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        if _is_for_hf(self._body(), attention_mask, past_key_values):
            kwargs = kwargs | {CACHE_NAME: past_key_values, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
            return hf_class.forward(self, **inputs.given(), labels=labels, **kwargs)
        source = self._source(inputs)
        shifted = shifted_labels(labels, kwargs.get("shift_labels"))
        want = Want(read=kept_positions(source, logits_to_keep, shifted))
        encoded = self.base_model(
            **inputs.given(), past_key_values=past_key_values, use_cache=use_cache, want=want, **kwargs
        )
        softcap = self.logits_softcap()
        scored = None if softcap else labels  # with a softcap, the loss is computed below, on the capped logits
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


def head_forward(hf_class: Any, compute, *, spans: bool = False):
    """forward of one of the heads. compute: a method of Heads. spans: labels are start_positions and end_positions."""

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
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        return compute(self, inputs, labels, kwargs | {"past_key_values": past_key_values, "use_cache": use_cache})

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
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        whole = start_positions is not None and end_positions is not None
        labels = (start_positions, end_positions) if whole else None
        return compute(self, inputs, labels, kwargs | {"past_key_values": past_key_values})

    return spanned if spans else labelled
