"""The Transformer of 2017 (Vaswani et al., "Attention Is All You Need"), post-norm and pre-norm, on PreTrainedModel.

Hugging Face has no class for it: the configuration and the checkpoints are this package's own. Weights go to and from
torch.nn.Transformer (load_torch, to_torch).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin as HFGenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils.generic import can_return_tuple

from .. import ops
from .._transformers import cached
from ..generation import GenerationMixin, StepDescription
from ..layers import (
    Packing,
    SinusoidalPositions,
    SlotTable,
    TransformerSpec,
    plan_call,
    run_layers,
    stock,
    transformer_layer,
)
from ..layers.embeddings import check_indices
from ..layers.projection import dropout_p, linear, norm
from . import _torch_transformer
from ._base import Encoded, activation_name, check_inputs, read_flags
from ._forward import public_forward
from ._loading import LoadingErrors
from ._noam_schedule import noam_schedule
from ._self_check import runs_as_hugging_face
from ._seq2seq import shift_right
from ._sequence_loss import sequence_loss
from ._stock import why_hf_loop

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


class TransformerConfig(PreTrainedConfig):
    """What a 2017 Transformer is made of; the defaults are the paper's base model (table 3).

    Args:
        vocab_size: of the target, which is scored.
        encoder_vocab_size: of the source, by default the same.
        d_model: width of the model.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        num_attention_heads: a divisor of d_model.
        ffn_dim: width inside the feed-forward block.
        activation_function: the paper's relu, or another.
        norm_position: "post", as the paper, or "pre" (Xiong et al., 2020).
        final_norm: a norm after the last layer of either stack, by default with "pre" only; torch.nn.Transformer always
            has one.
        dropout: on embeddings and on what each sublayer adds (section 5.4).
        attention_dropout: on attention weights, which the paper's text does not have and torch.nn.Transformer and
            tensor2tensor do.
        activation_dropout: inside the feed-forward block, as attention_dropout.
        label_smoothing: of the loss.
        share_embeddings: one matrix for source, target and output (section 3.4), by default where the vocabularies are
            one.
        tie_word_embeddings: one for target and output.
        scale_embedding: times sqrt(d_model).
        max_position_embeddings: sinusoids have no end; so many are tabulated, and longer inputs are refused.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017.

    Examples:
        >>> import transformer_fast
        >>> config = transformer_fast.TransformerConfig(vocab_size=100, d_model=32, num_attention_heads=4, ffn_dim=64)
        >>> model = transformer_fast.TransformerForConditionalGeneration(config)
    """

    model_type = "transformer_2017"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "encoder_layers"}

    vocab_size: int = 37000
    encoder_vocab_size: int | None = None
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 8
    ffn_dim: int = 2048
    activation_function: str = "relu"
    norm_position: str = "post"
    final_norm: bool | None = None
    layer_norm_eps: float = 1e-5
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    label_smoothing: float | int = 0.1
    share_embeddings: bool | None = None
    tie_word_embeddings: bool = True
    scale_embedding: bool = True
    max_position_embeddings: int = 2048
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs):
        self.encoder_vocab_size = self.encoder_vocab_size or self.vocab_size
        one_vocabulary = self.encoder_vocab_size == self.vocab_size
        if self.share_embeddings is None:
            self.share_embeddings = one_vocabulary and self.tie_word_embeddings
        if self.final_norm is None:
            self.final_norm = self.norm_position == "pre"
        if self.norm_position not in ("post", "pre"):
            raise ValueError(f"norm_position: wanted 'post' or 'pre', got {self.norm_position!r}")
        if self.d_model % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: wanted a divisor of d_model = {self.d_model}, got {self.num_attention_heads}"
            )
        if self.d_model % 2:
            raise ValueError(f"d_model: wanted an even number for sines and cosines, got {self.d_model}")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function: wanted one of {', '.join(ACT2FN)}, got {self.activation_function!r}"
            )
        if self.share_embeddings and not (one_vocabulary and self.tie_word_embeddings):
            raise ValueError(
                "share_embeddings: wanted one vocabulary and tie_word_embeddings=True, as source, target and output "
                f"share one matrix; got vocab_size {self.vocab_size}, encoder_vocab_size {self.encoder_vocab_size}, "
                f"tie_word_embeddings {self.tie_word_embeddings}"
            )
        super().__post_init__(**kwargs)


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


class TransformerPreTrainedModel(LoadingErrors, PreTrainedModel):
    config_class = TransformerConfig
    config: TransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerEncoderLayer", "TransformerDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Xavier's uniform matrices; embeddings of variance 1 / d_model, which their scale makes 1."""
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
            raise NotImplementedError("resize_token_embeddings: source and target have embeddings of their own")
        return super().resize_token_embeddings(*args, **kwargs)

    @property
    def dummy_inputs(self):
        ids = torch.tensor([[3, 4, 5], [3, 4, 0]], device=self.device)
        return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "decoder_input_ids": ids}


class _Stack(TransformerPreTrainedModel):
    """Embedding, layers and the last norm: encoder and decoder alike."""

    causal = False

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

    def _run(self, name, input_ids, inputs_embeds, attention_mask, kwargs, past_key_values=None, **cross) -> Encoded:
        source = check_inputs(input_ids, inputs_embeds, self.config.d_model)
        batch, length = source.shape[:2]
        if input_ids is not None:
            check_indices(name, input_ids, self.embed_tokens.num_embeddings, "the embedding's size")
        flags = read_flags(self.config, kwargs, len(self.layers))
        call = plan_call(
            self.spec, attention_mask, batch, length, source.device, past_key_values=past_key_values,
            attentions=flags.attentions, **cross,
        )  # fmt: skip
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        most = self.config.max_position_embeddings
        if isinstance(past, int) and past + length > most:
            raise ValueError(f"{name}: {past + length} positions are past config.max_position_embeddings = {most}")
        rows = self._embed(call.packing, input_ids, inputs_embeds, attention_mask, past)
        rows = run_layers(self.layers, rows, call, past_key_values=past_key_values, keep_hidden=flags.keep_hidden)
        if self.layer_norm is not None:
            rows = norm(self.layer_norm, rows)
        return Encoded.of(rows, call, None, past_key_values, flags, len(self.layers))

    def _embed(self, packing: Packing, input_ids, inputs_embeds, attention_mask, past) -> torch.Tensor:
        """dropout(scale * word + position). The encoder's positions count tokens, so that padding on the left shifts
        nothing; the decoder's count columns, as those of HF's encoder-decoders do."""
        if inputs_embeds is None:
            x = self.embed_tokens(packing.pack(input_ids)) * self.embed_scale
        else:
            x = packing.pack(inputs_embeds)
        if attention_mask is not None and attention_mask.dim() == 2 and not self.causal:
            mask, spread = attention_mask != 0, packing.spread
            whole = mask if spread is None else spread.unshard(mask)
            counted = (whole.long().cumsum(1) - 1).clamp(min=0)
            counted = counted if spread is None else spread.shard(counted)
            positions = packing.pack(counted)
        else:
            positions = packing.positions(x.device) + past
        return ops.dropout(x + self.embed_positions(positions), dropout_p(self.dropout))


class TransformerEncoder(_Stack):
    main_input_name = "input_ids"

    def __init__(self, config: TransformerConfig):
        layers = [TransformerEncoderLayer(config) for _ in range(config.encoder_layers)]
        super().__init__(config, layers, config.encoder_vocab_size)  # type: ignore[arg-type]

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput | Encoded:
        """input_ids: (B, S), or inputs_embeds (B, S, d_model), to which positions are added; attention_mask: (B, S),
        nonzero for tokens. Padding is never computed: its states are zeros."""
        encoded = self._run("input_ids", input_ids, inputs_embeds, attention_mask, kwargs)
        if kwargs.get("packed"):  # our model, whose decoder reads the rows without padding
            return encoded
        return BaseModelOutput(last_hidden_state=encoded.restored(), **encoded.extras())


class TransformerDecoder(_Stack):
    causal = True

    def __init__(self, config: TransformerConfig):
        layers = [TransformerDecoderLayer(config) for _ in range(config.decoder_layers)]
        super().__init__(config, layers, config.vocab_size)

    @public_forward()
    @can_return_tuple
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
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """input_ids: (B, T), or inputs_embeds (B, T, d_model); attention_mask: (B, past + T); encoder_hidden_states:
        (B, S, d_model) with encoder_attention_mask (B, S); past_key_values: an EncoderDecoderCache."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        encoded = self._run(
            "decoder_input_ids", input_ids, inputs_embeds, attention_mask, kwargs, past_key_values,
            encoder_states=encoder_hidden_states, encoder_mask=encoder_attention_mask,
            encoder_packing=kwargs.get("encoder_packing"),
        )  # fmt: skip
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=encoded.restored(),
            **cached(past_key_values if use_cache else None),
            **encoded.extras(cross=True),
        )


class TransformerModel(TransformerPreTrainedModel):
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
        """A model with the weights of a torch.nn.Transformer; embeddings, which that has none of, are random.

        settings: further fields of TransformerConfig, vocab_size at least. Raises ValueError for what no configuration
        says: layers without biases, other activations than relu and gelu.
        """
        config = TransformerConfig(**{**_torch_transformer.settings_of(module), **settings})
        return cls(config).load_torch(module)

    def load_torch(self, module: nn.Transformer) -> "TransformerModel":
        """Copy the weights of a torch.nn.Transformer of the same shape into this model; returns it."""
        _torch_transformer.load(self, module)
        return self

    def to_torch(self) -> nn.Transformer:
        """A torch.nn.Transformer (batch_first) with copies of these weights. It has no embeddings: its input is the sum
        of scaled words and sinusoids. Raises ValueError where torch's class has no such model: without final_norm."""
        return _torch_transformer.export(self)

    @public_forward()
    @can_return_tuple
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
        use_cache: bool | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """As HF's encoder-decoders. input_ids: (B, S); attention_mask: (B, S), nonzero for tokens; decoder_input_ids:
        (B, T); kwargs: output_attentions, output_hidden_states, return_dict."""
        options = {**kwargs, "return_dict": True}
        packing = None
        if encoder_outputs is None:
            encoded = self.encoder(input_ids, attention_mask, inputs_embeds, packed=True, **options)
            states = encoded.rows
            if attention_mask is None or attention_mask.dim() == 2:
                packing = encoded.packing
            encoder_outputs = BaseModelOutput(last_hidden_state=encoded.restored(), **encoded.extras())
        else:
            if not isinstance(encoder_outputs, BaseModelOutput):
                encoder_outputs = BaseModelOutput(*encoder_outputs)
            states = encoder_outputs.last_hidden_state
        decoded = self.decoder(
            decoder_input_ids, decoder_attention_mask, states, attention_mask, past_key_values, decoder_inputs_embeds,
            use_cache, encoder_packing=packing, **options,
        )  # fmt: skip
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            **cached(decoded.past_key_values),
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


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
        """'' when generate may decode with this package's engine, else the reason why transformers' loop runs."""
        return why_hf_loop(self)

    def step_description(self) -> StepDescription:
        """The decoder, for generation by one native call a token."""
        decoder = self.model.decoder
        return StepDescription(
            self, [SLOTS.read(layer) for layer in decoder.layers], decoder.spec, decoder.embed_tokens, self.lm_head,
            position=decoder.embed_positions, embed_scale=decoder.embed_scale, final_norm=decoder.layer_norm,
        )  # fmt: skip

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return shift_right(self.config, labels)

    @public_forward()
    @can_return_tuple
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
        """As TransformerModel; labels: (B, T), -100 where there is nothing to score, also make the decoder's input when
        none is given. Returns Seq2SeqLMOutput with logits (B, T, vocab_size)."""
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        output = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache, **{**kwargs, "return_dict": True},
        )  # fmt: skip
        rows = output.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            rows = rows[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = linear(self.lm_head, rows)
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.label_smoothing, num_items_in_batch)
        fields = {name: value for name, value in output.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **fields)


AutoConfig.register(TransformerConfig.model_type, TransformerConfig, exist_ok=True)
AutoModel.register(TransformerConfig, TransformerModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(TransformerConfig, TransformerForConditionalGeneration, exist_ok=True)
