"""The Transformer of 2017 (Vaswani et al., "Attention Is All You Need"), post-norm and pre-norm, on PreTrainedModel.

Hugging Face has no such class: the configuration and the checkpoints are this package's own. Weights can be copied to
and from torch.nn.Transformer (load_torch, to_torch).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin as HFGenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions, Seq2SeqLMOutput

from .. import ops
from .._transformers import cached
from ..generation import GenerationMixin, StepDescription
from ..layers import SinusoidalPositions, SlotTable, TransformerSpec, Unpadding, stock, transformer_layer
from ..layers.embeddings import look_up
from ..layers.projection import dropout_p, linear, norm
from . import _torch_transformer
from ._base import Encoded, Outputs, Want, activation_name
from ._forward import public_forward
from ._heads import keep_positions
from ._loading import LoadingErrors
from ._noam_schedule import noam_schedule
from ._run_stack import Context, Inputs, Stack, decoding_cache, run_stack
from ._self_check import runs_as_hugging_face
from ._seq2seq import JoinedForward, shift_right
from ._sequence_loss import sequence_loss
from ._stock import why_hf_loop
from ._transformer_config import TransformerConfig

__all__ = [
    "TransformerConfig",
    "TransformerForConditionalGeneration",
    "TransformerModel",
    "noam_schedule",
]

SLOTS = SlotTable(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.out_proj",
    attention_dropout="self_attn.dropout",
    attention_norm="self_attn_layer_norm",
    attention_output_dropout="dropout",
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_output="encoder_attn.out_proj",
    cross_dropout="encoder_attn.dropout",
    cross_norm="encoder_attn_layer_norm",
    cross_output_dropout="dropout",
    up="fc1",
    activation_fn="activation_fn",
    activation_dropout="activation_dropout",
    down="fc2",
    output_dropout="dropout",
    output_norm="final_layer_norm",
)


class TransformerAttention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(config.d_model, config.d_model))
        self.dropout = nn.Dropout(config.attention_dropout)


class _Layer(GradientCheckpointingLayer):
    """Holds the weights; layers.transformer_layer computes."""

    def __init__(self, config: TransformerConfig, cross: bool):
        super().__init__()
        width, eps = config.d_model, config.layer_norm_eps
        self.self_attn = TransformerAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps)
        if cross:
            self.encoder_attn = TransformerAttention(config)
            self.encoder_attn_layer_norm = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, config.ffn_dim)
        self.activation_fn = ACT2FN[config.activation_function]
        self.fc2 = nn.Linear(config.ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(self, hidden_states, call, index, first_only=False, encoder_states=None, past_key_values=None):
        return transformer_layer(
            SLOTS.read(self), hidden_states, call, index, first_only, past_key_values, encoder_states
        )


class TransformerEncoderLayer(_Layer):
    def __init__(self, config: TransformerConfig):
        super().__init__(config, cross=False)


class TransformerDecoderLayer(_Layer):
    def __init__(self, config: TransformerConfig):
        super().__init__(config, cross=True)


class TransformerPreTrainedModel(Outputs, LoadingErrors, PreTrainedModel):
    config_class = TransformerConfig
    config: TransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerEncoderLayer", "TransformerDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Xavier uniform for matrices. Embeddings have variance 1 / d_model, so that sqrt(d_model) times them has 1."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, SinusoidalPositions):
            init.copy_(module.weight, module.table())
        elif isinstance(module, nn.Embedding) and not getattr(module.weight, "_is_hf_initialized", False):
            init.normal_(module.weight, mean=0.0, std=self.config.d_model**-0.5)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])

    def resize_token_embeddings(self, *args, **kwargs):
        """As HF's, where one matrix is shared by source, target and output."""
        if not self.config.share_embeddings:
            raise NotImplementedError(
                "resize_token_embeddings: source and target have embeddings of their own; make a model with the "
                "vocabularies wanted in its configuration, and copy the rest"
            )
        return super().resize_token_embeddings(*args, **kwargs)

    @property
    def dummy_inputs(self):
        ids = torch.tensor([[3, 4, 5], [3, 4, 0]], device=self.device)
        return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "decoder_input_ids": ids}


class _Stack(Stack, TransformerPreTrainedModel):
    """Embedding, layers and the last norm, of the encoder or of the decoder."""

    causal = False
    _averaging = ()

    def __init__(self, config: TransformerConfig, layers: Sequence[nn.Module], vocab_size: int):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(vocab_size, config.d_model, config.pad_token_id)
        self.embed_positions = SinusoidalPositions(config.max_position_embeddings, config.d_model)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps) if config.final_norm else None
        self.gradient_checkpointing = False
        self.spec = TransformerSpec(
            num_heads=config.num_attention_heads,
            head_dim=config.d_model // config.num_attention_heads,
            causal=self.causal,
            norm_position=config.norm_position,
            activation=activation_name(config.activation_function),
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def _layers(self):
        return self.layers

    def _words(self):
        return self.embed_tokens

    def _spec(self, causal: bool) -> TransformerSpec:
        return self.spec

    def _decodes(self) -> bool:
        return self.causal

    def _causal(self, kwargs: dict) -> bool:
        return self.causal

    def _most_positions(self) -> int:
        return self.config.max_position_embeddings

    def _documents(self, inputs: Inputs, shape: tuple[int, int], kwargs: dict) -> None:
        return None

    def _close(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.layer_norm is None else norm(self.layer_norm, rows)

    def _embed(self, unpadding: Unpadding, inputs: Inputs, positions: torch.Tensor | None, past) -> torch.Tensor:
        """dropout(scale * word + position). The encoder's positions count tokens, so padding on the left does not shift
        them; the decoder's count columns, as in HF's encoder-decoders."""
        if inputs.inputs_embeds is None:
            x = look_up(self.embed_tokens, unpadding.unpad(inputs.input_ids)) * self.embed_scale  # type: ignore[arg-type]
        else:
            x = unpadding.unpad(inputs.inputs_embeds)
        mask = inputs.attention_mask
        if mask is not None and mask.dim() == 2 and not self.causal:
            mask, spread = mask != 0, unpadding.spread
            whole = mask if spread is None else spread.unshard(mask)
            counted = (whole.long().cumsum(1) - 1).clamp(min=0)
            counted = counted if spread is None else spread.shard(counted)
            places = unpadding.unpad(counted)
        else:
            places = unpadding.positions(x.device) + past
        return ops.dropout(x + self.embed_positions(places), dropout_p(self.dropout))


class TransformerEncoder(_Stack):
    main_input_name = "input_ids"
    _words_setting = "config.encoder_vocab_size"

    def __init__(self, config: TransformerConfig):
        layers = [TransformerEncoderLayer(config) for _ in range(config.encoder_layers)]
        super().__init__(config, layers, config.encoder_vocab_size)  # type: ignore[arg-type]

    @public_forward()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput | Encoded:
        """input_ids: (B, S), or inputs_embeds (B, S, d_model), to which positions are added; attention_mask: (B, S),
        nonzero for tokens. Padding is not computed: its states are zeros."""
        want = kwargs.pop("want", None)  # passed by our model, whose decoder reads unpadded rows
        encoded = run_stack(self, Inputs(input_ids, attention_mask, inputs_embeds=inputs_embeds), Want(), kwargs)
        if want is not None:
            return encoded
        return self._finish(BaseModelOutput(last_hidden_state=encoded.restored(), **encoded.extras()), kwargs)


class TransformerDecoder(_Stack):
    causal = True

    def __init__(self, config: TransformerConfig):
        layers = [TransformerDecoderLayer(config) for _ in range(config.decoder_layers)]
        super().__init__(config, layers, config.vocab_size)

    def _prefix(self) -> str:
        return "decoder_"

    def _new_cache(self) -> DynamicCache:
        return DynamicCache()

    @public_forward()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions | Encoded:
        """input_ids: (B, T), or inputs_embeds (B, T, d_model); attention_mask: (B, past + T); encoder_hidden_states:
        (B, S, d_model) with encoder_attention_mask (B, S); past_key_values: an EncoderDecoderCache."""
        want, unpadding = kwargs.pop("want", None), kwargs.pop("encoder_unpadding", None)
        cache, use_cache = decoding_cache(self, past_key_values, use_cache, crosses=True, in_training=True)
        encoded = run_stack(
            self, Inputs(input_ids, attention_mask, inputs_embeds=inputs_embeds), want or Want(), kwargs,
            Context(cache, use_cache, encoder_hidden_states, encoder_attention_mask, unpadding),
        )  # fmt: skip
        if want is not None:
            return encoded
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=encoded.restored(), **cached(encoded.past_key_values), **encoded.extras(cross=True)
        )
        return self._finish(output, kwargs)


class TransformerModel(JoinedForward, TransformerPreTrainedModel):
    """Encoder and decoder without the projection to the vocabulary."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        if config.share_embeddings:
            self._tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}
        self.encoder = TransformerEncoder(config)
        self.decoder = TransformerDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value
        if self.config.share_embeddings:
            self.decoder.embed_tokens = value

    @classmethod
    def from_torch(cls, module: nn.Transformer, **settings) -> "TransformerModel":
        """A model with the weights of a torch.nn.Transformer. That has no embeddings, so they are random here.

        settings: further fields of TransformerConfig, at least vocab_size. Raises ValueError for modules that no
        TransformerConfig describes: without biases, or with activations other than relu and gelu.
        """
        config = TransformerConfig(**{**_torch_transformer.settings_of(module), **settings})
        return cls(config).load_torch(module)

    def load_torch(self, module: nn.Transformer) -> "TransformerModel":
        """Copy the weights of a torch.nn.Transformer of the same shape into this model. Returns this model."""
        _torch_transformer.load(self, module)
        return self

    def to_torch(self) -> nn.Transformer:
        """A torch.nn.Transformer (batch_first) with copies of these weights. It has no embeddings: its input is the sum
        of scaled words and sinusoids. Raises ValueError without final_norm, which torch's class always has."""
        return _torch_transformer.export(self)

    forward = public_forward()(JoinedForward.forward)


class TransformerForConditionalGeneration(GenerationMixin, TransformerPreTrainedModel, HFGenerationMixin):
    """The Transformer with scores over the target vocabulary; `generate` has Hugging Face's signature and tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.model = TransformerModel(config)
        if config.share_embeddings:
            self._tied_weights_keys = {
                **self._tied_weights_keys,
                "model.encoder.embed_tokens.weight": "model.decoder.embed_tokens.weight",
            }
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()
        self.runs_as_hugging_face = runs_as_hugging_face(type(self))
        stock.remember(self)

    def why_hf_loop(self) -> str:
        """'' if generate may decode with this package's engine; else why transformers' loop runs."""
        return why_hf_loop(self)

    def step_description(self) -> StepDescription:
        """The decoder's description, for generation with one native call per token."""
        decoder = self.model.decoder
        return StepDescription(
            self, [SLOTS.read(layer) for layer in decoder.layers], decoder.spec, decoder.embed_tokens, self.lm_head,
            position=decoder.embed_positions, embed_scale=decoder.embed_scale, final_norm=decoder.layer_norm,
        )  # fmt: skip

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return shift_right(self.config, labels)

    @public_forward()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Score every word of the target's vocabulary at each position. Other arguments: as TransformerModel.

        Args:
            labels: (B, T) int64, -100 to ignore; decoder_input_ids are made from them if none are given.
            logits_to_keep: compute the last so many positions, or those of these indices; 0: all.
            num_items_in_batch: divides the sum of the losses, in place of the number of labels (`Trainer`).

        Returns:
            Seq2SeqLMOutput with logits (B, T, vocab_size), and the loss if there are labels.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        joined = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache, want=Want(), **kwargs,
        )  # fmt: skip
        logits = linear(self.lm_head, keep_positions(joined.decoder.restored(), logits_to_keep))
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.label_smoothing, num_items_in_batch)
        return self._finish(Seq2SeqLMOutput(loss=loss, logits=logits, **joined.extras()), kwargs)


AutoConfig.register(TransformerConfig.model_type, TransformerConfig, exist_ok=True)
AutoModel.register(TransformerConfig, TransformerModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(TransformerConfig, TransformerForConditionalGeneration, exist_ok=True)
