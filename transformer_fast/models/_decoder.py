"""Decoders of today: norms before each sublayer, or a single one for both; rotary or learned positions; shared key
heads, gated or plain feed-forward."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import logging

from .. import ops
from .._transformers import CACHE_NAME, cached
from ..generation import GenerationMixin, StepDescription
from ..layers import Packing, Rotary, SlotTable, TransformerSpec, documents_of, plan_call, run_layers
from ..layers.embeddings import check_indices, embed
from ..layers.projection import dropout_p, linear, norm, rms_norm_of
from ._base import Encoded, ModelMixin, Want, activation_name, check_inputs, check_integers, read_flags
from ._encoder import Inputs
from ._forward import public_forward
from ._gpt import causal_logits, classify_last, shifted_labels
from ._heads import is_labelled, kept_positions, per_position, span_loss, token_loss

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

logger = logging.get_logger(__name__)

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


class LlamaRMSNorm(RMSNorm):
    """For those that keep their eps under Llama's name."""

    variance_epsilon: float

    @property
    def eps(self) -> float:
        return self.variance_epsilon


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


class DecoderBase(ModelMixin):
    """For base models. A family says what its layers compute, and where they and what stands around them are."""

    _slots: SlotTable
    config: Any
    get_input_embeddings: Any
    layers: Any
    norm: Any
    rotary_emb: Any
    _positions_setting = "config.max_position_embeddings"

    def spec(self) -> TransformerSpec:
        return spec_of(self.config)

    # ---- where the parts are ----
    def _words(self) -> Any:
        """The embedding of tokens."""
        return self.get_input_embeddings()

    def _layers(self) -> Iterable[nn.Module]:
        return self.layers[: self.config.num_hidden_layers]

    def _called_layers(self) -> list[nn.Module]:
        """Those that this call runs."""
        return list(self._layers())

    def _final_norm(self) -> Any:
        return self.norm

    def _input_dropout(self) -> Any:
        """Of the rows that the first layer reads."""
        return None

    # ---- positions, segments, documents ----
    def _positions(self, inputs: Inputs, past) -> torch.Tensor | None:
        """(B or 1, S): the position of each token; None for past, past + 1, ..."""
        return inputs.position_ids

    def _most_positions(self) -> int | None:
        """How many positions there are embeddings for; None: any number."""
        return None

    def _segments(self) -> Any:
        """The embedding of token_type_ids, where there is one."""
        return None

    def _documents(self, inputs: Inputs, shape: tuple[int, int], kwargs: dict) -> torch.Tensor | None:
        """See layers.documents_of; asked where there is neither a mask nor a cache."""
        return documents_of(shape, inputs.position_ids, kwargs)

    def _rotary(self, packing: Packing, positions: torch.Tensor | None, past, device: torch.device) -> Rotary | None:
        """The angles of queries and keys. positions: of _positions."""
        if positions is None:
            positions = (packing.columns(device) + past)[None]
        return Rotary.of(packing, *self.angles(positions))

    def angles(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B, S, R / 2) in float32 of position_ids (B, S), by HF's own rule."""
        like = torch.empty(0, dtype=torch.float32, device=position_ids.device)
        cos, sin = self.rotary_emb(like, position_ids)
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]

    def table_of_angles(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (positions, R / 2), float32, on the CPU."""
        cos, sin = self.angles(torch.arange(positions, device=self._words().weight.device)[None])
        return cos[0].cpu(), sin[0].cpu()

    def why_angles_change(self) -> str:
        """'' where the angle of a position is the same however long the sequence is, else what it is not."""
        kind = getattr(getattr(self, "rotary_emb", None), "rope_type", "default")
        if kind == "longrope" or "dynamic" in kind:
            return "the angles of its rotary positions change with the length"
        return ""

    # ---- the two ends ----
    def _embed(self, packing: Packing, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        """The rows that the first layer reads. positions: of _positions."""
        return embed(
            packing, self._words(), None, None, None, self._input_dropout(), input_ids=inputs.input_ids,
            inputs_embeds=inputs.inputs_embeds, position_ids=None, segment_ids=None,
        )  # fmt: skip

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        """What follows the last layer."""
        final = self._final_norm()
        return rows if final is None else norm(final, rows)

    def _step_parts(self) -> dict[str, Any]:
        """What a StepDescription has beside the layers and the words."""
        scale = getattr(self._words(), "embed_scale", None)
        return {
            "final_norm": self._final_norm(),
            "embed_scale": 1.0 if scale is None else float(scale.to(self._words().weight.dtype)),
        } | self._step_positions()

    def _step_positions(self) -> dict[str, Any]:
        return {"rotary": self.table_of_angles, "refused": self.why_angles_change()}

    def run(self, want: Want, kwargs: dict, inputs: Inputs, past_key_values: Any) -> Encoded:
        words, layers = self._words(), self._called_layers()
        source = check_inputs(inputs.input_ids, inputs.inputs_embeds, words.embedding_dim)
        (batch, length), device = source.shape[:2], source.device
        flags = read_flags(self.config, kwargs, len(layers))
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs = self._checked(inputs, batch, length)
        positions = self._positions(inputs, past)
        self._check_positions(positions, length, past)
        documents = None
        if inputs.attention_mask is None and past_key_values is None:
            documents = self._documents(inputs, (batch, length), kwargs)
        call = plan_call(
            self.spec(), inputs.attention_mask, batch, length, device, past_key_values=past_key_values,
            documents=documents, read=want.read, read_first=want.read_first, attentions=flags.attentions,
        )  # fmt: skip
        call.rotary = self._rotary(call.packing, positions, past, device)
        rows = self._embed(call.packing, inputs, positions, past)
        rows = run_layers(layers, rows, call, past_key_values=past_key_values, keep_hidden=flags.keep_hidden)
        return Encoded.of(self._close(rows), call, None, past_key_values, flags, len(layers))

    def _checked(self, inputs: Inputs, batch: int, length: int) -> Inputs:
        """inputs with indices of a right kind, shape and size, and token_type_ids only where they are embedded."""
        segments = self._segments()
        if segments is None:
            inputs = inputs._replace(token_type_ids=None)
        for name in ("position_ids", "token_type_ids"):
            if (t := getattr(inputs, name)) is not None:
                check_integers(name, t, (batch, length))
                inputs = inputs._replace(**{name: t.reshape(-1, length)})
        for name, table in (("input_ids", self._words()), ("token_type_ids", segments)):
            if (t := getattr(inputs, name)) is not None:
                check_indices(name, t, table.num_embeddings, "config.vocab_size")
        return inputs

    def _check_positions(self, positions: torch.Tensor | None, length: int, past) -> None:
        most, setting = self._most_positions(), self._positions_setting
        if most is None:
            return
        if positions is not None:
            check_indices("position_ids", positions, most, setting)
        elif isinstance(past, int) and past + length > most:
            raise ValueError(
                f"input_ids: {past + length} positions are past {setting} = {most}; "
                "truncate the text (tokenizer(..., truncation=True))"
            )


class LearnedPositions:
    """Before DecoderBase: a table of positions takes the place of angles. Its rows are the positions of _positions."""

    def _position_table(self) -> Any:
        raise NotImplementedError

    def _most_positions(self) -> int:
        return self._position_table().num_embeddings

    def _rotary(self, packing: Packing, positions: torch.Tensor | None, past, device: torch.device) -> None:
        return None

    def _embed(self: Any, packing: Packing, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        table = self._position_table()
        return embed(
            packing, self._words(), lambda rows: F.embedding(rows, table.weight),
            None if inputs.token_type_ids is None else self._segments(), None, self._input_dropout(),
            input_ids=inputs.input_ids, inputs_embeds=inputs.inputs_embeds, position_ids=positions,
            segment_ids=inputs.token_type_ids, past=past,
        )  # fmt: skip

    def _step_positions(self) -> dict[str, Any]:
        return {"position": self._position_table()}


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
        inputs = Inputs(input_ids, attention_mask, kwargs.pop("token_type_ids", None), position_ids, inputs_embeds)
        if want is None and _is_for_hf(self, attention_mask, past_key_values):
            cache = {CACHE_NAME: past_key_values}
            return hf_class.forward(self, **inputs.given(), use_cache=use_cache, **cache, **kwargs)
        past_key_values = _prepare_cache(self, past_key_values, use_cache)
        encoded = self.run(want or Want(), kwargs, inputs, past_key_values)
        if want is not None:
            return encoded
        output = BaseModelOutputWithPast(
            last_hidden_state=encoded.restored(), **cached(encoded.past_key_values), **encoded.extras()
        )
        return self._finish(output, kwargs)

    return forward


def _is_for_hf(decoder: DecoderBase, attention_mask, cache) -> bool:
    """Masks made per kind of layer, and windows over caches of a fixed size, are HF's own business."""
    if isinstance(attention_mask, dict):
        return True
    return bool(cache is not None and getattr(cache, "is_compileable", False) and decoder.spec().windows)


def _prepare_cache(model: Any, past_key_values, use_cache: bool | None):
    """HF's rule, but in training a cache is made only when asked for."""
    if use_cache is None:
        use_cache = getattr(model.config, "use_cache", False) and not model.training
    if model.gradient_checkpointing and model.training:
        if use_cache or past_key_values is not None:
            logger.warning_once("A cache does not go with gradient checkpointing: use_cache=False is used.")
        return None
    if use_cache and past_key_values is None:
        return DynamicCache(config=model.config)
    return past_key_values


class Heads(ModelMixin):
    """For models with a head of HF's generic kinds; before HF's class."""

    config: Any
    base_model: Any
    get_input_embeddings: Any
    score: Any
    qa_outputs: Any

    def _body(self) -> Any:
        """The DecoderBase inside."""
        return self.base_model

    def _token_head(self) -> Any:
        """Scores each token."""
        return self.score

    def _source(self, inputs: dict) -> torch.Tensor:
        width = self.get_input_embeddings().embedding_dim
        return check_inputs(inputs["input_ids"], inputs["inputs_embeds"], width)

    def _classify(self, inputs: dict, labels, kwargs: dict):
        loss, logits, encoded = classify_last(self, inputs, self._body(), labels, kwargs)
        output = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, **cached(encoded.past_key_values), **encoded.extras()
        )
        return self._finish(output, kwargs)

    def _classify_tokens(self, inputs: dict, labels, kwargs: dict):
        labels = per_position(labels, self._source(inputs))
        encoded = self._body()(**inputs, want=Want(read=is_labelled(labels)), **kwargs)
        rows = ops.dropout(encoded.rows, dropout_p(self.dropout))  # type: ignore[attr-defined]
        logits = encoded.packing.unpack(linear(self._token_head(), rows))
        loss = None if labels is None else token_loss(logits, labels)
        return self._finish(TokenClassifierOutput(loss=loss, logits=logits, **encoded.extras()), kwargs)

    def _find_spans(self, inputs: dict, labels, kwargs: dict):
        """start_logits and end_logits at padding are the dtype's lowest number, so that no argmax picks it. With labels
        padding is computed, as HF's loss counts it."""
        source = self._source(inputs)
        scored = labels is not None
        read = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device) if scored else None
        encoded = self._body()(**inputs, want=Want(read=read), **kwargs)
        logits = linear(self.qa_outputs, encoded.rows)
        logits = encoded.packing.unpack(logits, fill=torch.finfo(logits.dtype).min)
        start, end = (t.squeeze(-1).contiguous() for t in logits.split(1, dim=-1))
        loss = span_loss(start, end, *labels) if scored else None
        return self._finish(
            QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **encoded.extras()), kwargs
        )


class CausalLM(GenerationMixin):
    """For models with a language modelling head; before Heads and HF's class."""

    config: Any
    lm_head: Any

    def logits_softcap(self) -> float:
        return 0.0

    def why_hf_loop(self: Any) -> str:
        """Beside the common reasons: angles that change with the length are those of the longest row of a batch, which
        the engine may have taken out of it."""
        return super().why_hf_loop() or self._body().why_angles_change()

    def step_description(self: Any) -> StepDescription:
        body = self._body()
        return StepDescription(
            self, [body._slots.read(layer) for layer in body._layers()], body.spec(), body._words(), self.lm_head,
            logits_softcap=self.logits_softcap(), **body._step_parts(),
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
        inputs = _inputs(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        if _is_for_hf(self._body(), attention_mask, past_key_values):
            inputs[CACHE_NAME] = inputs.pop("past_key_values")
            return hf_class.forward(
                self, **inputs, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs
            )
        source = self._source(inputs)
        shifted = shifted_labels(labels, kwargs.get("shift_labels"))
        want = Want(read=kept_positions(source, logits_to_keep, shifted))
        encoded = self._body()(**inputs, use_cache=use_cache, want=want, **kwargs)
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
