"""The recurrent encoder-decoder with attention (Bahdanau et al., 2015; Luong et al., 2015), on PreTrainedModel.

Hugging Face has no class for it: the configuration and the checkpoints are this package's own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin as HFGenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .. import ops
from .._transformers import cached
from ..generation import GenerationMixin
from ..layers.embeddings import check_indices
from ..layers.projection import dropout_p, linear
from ._base import check_inputs, check_integers
from ._forward import public_forward
from ._loading import LoadingErrors
from ._recurrent_state import RecurrentState
from ._self_check import runs_as_hugging_face
from ._seq2seq import shift_right
from ._sequence_loss import sequence_loss

__all__ = ["AttentionRNNConfig", "AttentionRNNForConditionalGeneration", "AttentionRNNModel", "RecurrentState"]

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}
SCORES = ("additive", "dot", "general", "concat")
_WIDEST_HEAD = 256  # of scaled_dot_product_attention


class AttentionRNNConfig(PreTrainedConfig):
    """What a recurrent encoder-decoder with attention is made of.

    Args:
        vocab_size: of the target, which is scored.
        encoder_vocab_size: of the source, by default the same.
        embedding_size: of both.
        hidden_size: of the decoder and of the encoder's states, whose two directions have half of it each.
        num_layers: of encoder and decoder.
        cell: "gru" or "lstm".
        bidirectional: the encoder.
        attention: the score of a target state s against a source state h, and with it the decoder. "additive": v .
            tanh(W s + U h + b) from the state before the step; the context enters the cell and a maxout readout of
            state, word and context (Bahdanau et al., 2015, appendix A). "dot": s . h, "general": s . W h, "concat": v .
            tanh(W [s; h]), from the state after the step; the readout is tanh(W [context; state]) (Luong et al., 2015,
            section 3).
        attention_size: width of the hidden layer of "additive" and "concat", by default hidden_size.
        input_feeding: Luong's readout is part of the next step's input (section 3.3); "additive" always feeds its
            context.
        dropout: on embeddings, between layers and on the readout.
        label_smoothing: of the loss.

    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015; Luong,
        Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015.

    Examples:
        >>> import transformer_fast
        >>> config = transformer_fast.AttentionRNNConfig(vocab_size=100, embedding_size=16, hidden_size=32)
        >>> model = transformer_fast.AttentionRNNForConditionalGeneration(config)
    """

    model_type = "attention_rnn"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_hidden_layers": "num_layers"}

    vocab_size: int = 32000
    encoder_vocab_size: int | None = None
    embedding_size: int = 512
    hidden_size: int = 512
    num_layers: int = 1
    cell: str = "gru"
    bidirectional: bool = True
    attention: str = "additive"
    attention_size: int | None = None
    input_feeding: bool = True
    dropout: float | int = 0.2
    label_smoothing: float | int = 0.0
    initializer_range: float = 0.05
    use_cache: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs):
        self.encoder_vocab_size = self.encoder_vocab_size or self.vocab_size
        self.attention_size = self.attention_size or self.hidden_size
        for name, value, wanted in (("cell", self.cell, tuple(CELLS)), ("attention", self.attention, SCORES)):
            if value not in wanted:
                raise ValueError(f"{name}: wanted one of {', '.join(map(repr, wanted))}, got {value!r}")
        if self.bidirectional and self.hidden_size % 2:
            raise ValueError(f"hidden_size: wanted an even number for two directions, got {self.hidden_size}")
        if self.tie_word_embeddings and self.readout_size != self.embedding_size:
            raise ValueError(
                f"tie_word_embeddings: wanted embedding_size and hidden_size equal, got {self.embedding_size} and "
                f"{self.hidden_size}"
            )
        super().__post_init__(**kwargs)

    @property
    def readout_size(self) -> int:
        """Width of what the vocabulary is scored on."""
        return self.embedding_size if self.attention == "additive" else self.hidden_size


@dataclass
class AttentionRNNEncoderOutput(ModelOutput):
    """last_hidden_state: (B, Sk, hidden_size), zeros at padding. state, cell: the last states of each layer,
    (B, num_layers, hidden_size), both directions side by side; cell with "lstm" only."""

    last_hidden_state: torch.Tensor | None = None
    state: torch.Tensor | None = None
    cell: torch.Tensor | None = None


class AttentionRNNPreTrainedModel(LoadingErrors, PreTrainedModel):
    config_class = AttentionRNNConfig
    config: AttentionRNNConfig
    base_model_prefix = "model"
    _is_stateful = True  # a step cannot be taken back

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.RNNBase):
            for name, parameter in module.named_parameters():
                if "bias" in name:
                    init.zeros_(parameter)
                elif "weight_hh" in name:
                    init.orthogonal_(parameter)
                else:
                    init.xavier_uniform_(parameter)
        elif isinstance(module, Score) and module.weight is not None:
            init.normal_(module.weight, mean=0.0, std=module.weight.shape[0] ** -0.5)

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError("resize_token_embeddings: source and target have embeddings of their own")

    @property
    def dummy_inputs(self):
        ids = torch.tensor([[3, 4, 5], [3, 4, 0]], device=self.device)
        return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "decoder_input_ids": ids}


class Score(nn.Module):
    """Attention over the encoder's states by one of the four scores."""

    def __init__(self, config: AttentionRNNConfig):
        super().__init__()
        self.kind = config.attention
        width, inner = config.hidden_size, config.attention_size or config.hidden_size
        self.hidden_layer = self.kind in ("additive", "concat")
        self.query = self.key = self.weight = None
        if self.hidden_layer:
            self.query = nn.Linear(width, inner, bias=False)
            self.key = nn.Linear(width, inner, bias=self.kind == "additive")
            self.weight = nn.Parameter(torch.randn(inner) * inner**-0.5)
        elif self.kind == "general":
            self.key = nn.Linear(width, width, bias=False)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """(B, Sk, hidden_size) -> what every step's query is scored against."""
        return states if self.key is None else linear(self.key, states)

    def forward(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query: (B, Sq, hidden_size); mask: (B, 1, Sk) bool or None -> context (B, Sq, hidden_size) and, when asked
        for, weights (B, Sq, Sk)."""
        if self.hidden_layer:
            weight: Any = self.weight
            out: Any = ops.additive_attention(
                linear(self.query, query), keys, values, weight, attn_mask=mask, return_weights=weights
            )
            return out if weights else (out, None)
        if query.shape[-1] > _WIDEST_HEAD:
            scores = torch.matmul(query, keys.transpose(1, 2))
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            found = torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
            if mask is not None:
                found = found.masked_fill(~mask, 0.0)
            return torch.matmul(found, values), found if weights else None
        q, k, v = (t.unsqueeze(1) for t in (query, keys, values))
        mask = None if mask is None else mask.unsqueeze(1)
        if not weights:
            return ops.scaled_dot_product_attention(q, k, v, mask, scale=1.0).squeeze(1), None
        out, lse = ops.scaled_dot_product_attention(q, k, v, mask, scale=1.0, return_lse=True)
        found = ops.attention_probabilities(q, k, lse, scale=1.0, attn_mask=mask)
        return out.squeeze(1), found.squeeze(1)


class AttentionRNNEncoder(AttentionRNNPreTrainedModel):
    """Embedding and a recurrent network over the source, in both directions; padding is never computed."""

    main_input_name = "input_ids"

    def __init__(self, config: AttentionRNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.encoder_vocab_size, config.embedding_size, config.pad_token_id)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(config.dropout)
        self.rnn = CELLS[config.cell](
            config.embedding_size, config.hidden_size // (2 if config.bidirectional else 1), config.num_layers,
            batch_first=True, bidirectional=config.bidirectional, dropout=_between(config),
        )  # fmt: skip
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> AttentionRNNEncoderOutput:
        """input_ids: (B, Sk), or inputs_embeds (B, Sk, embedding_size); attention_mask: (B, Sk), nonzero for tokens,
        padding on either side. Returns AttentionRNNEncoderOutput."""
        source = check_inputs(input_ids, inputs_embeds, self.config.embedding_size)
        batch, length = source.shape[:2]
        if input_ids is not None:
            check_indices("input_ids", input_ids, self.embed_tokens.num_embeddings, "config.encoder_vocab_size")
        mask = _source_mask(attention_mask, batch, length)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = ops.dropout(x, dropout_p(self.dropout))
        if mask is None or bool(mask.all()):
            states, last = self.rnn(x)
        else:
            states, last = self._packed(x, mask)
        state, cell = last if isinstance(last, tuple) else (last, None)
        return AttentionRNNEncoderOutput(states, self._joined(state), None if cell is None else self._joined(cell))

    def _packed(self, x: torch.Tensor, mask: torch.Tensor):
        """Tokens first, whatever side the padding is on; then back to their places, with zeros elsewhere."""
        lengths = mask.sum(1)
        order = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[..., None]
        packed = pack_padded_sequence(
            torch.gather(x, 1, order.expand_as(x)), lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, last = self.rnn(packed)
        states = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])[0]
        states = torch.zeros_like(states).scatter(1, order.expand_as(states), states)
        return states.masked_fill(~mask[..., None], 0.0), last

    def _joined(self, state: torch.Tensor) -> torch.Tensor:
        """(layers * directions, B, width) -> (B, layers, directions * width)."""
        return state.unflatten(0, (self.config.num_layers, -1)).permute(2, 0, 1, 3).flatten(2)


class AttentionRNNDecoder(AttentionRNNPreTrainedModel):
    """A recurrent network that looks at the encoder's states in every step."""

    def __init__(self, config: AttentionRNNConfig):
        super().__init__(config)
        hidden, embedding = config.hidden_size, config.embedding_size
        self.additive = config.attention == "additive"
        self.feeds = config.input_feeding and not self.additive
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.initial_state = nn.Linear(hidden, hidden)
        self.initial_cell = nn.Linear(hidden, hidden) if config.cell == "lstm" else None
        self.score = Score(config)
        inputs = embedding + (hidden if self.additive or self.feeds else 0)
        self.rnn = CELLS[config.cell](inputs, hidden, config.num_layers, batch_first=True, dropout=_between(config))
        if self.additive:  # two values for each maxout unit
            self.readout = nn.Linear(2 * hidden + embedding, 2 * config.readout_size)
        else:
            self.readout = nn.Linear(2 * hidden, config.readout_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def start(self, encoded: AttentionRNNEncoderOutput) -> RecurrentState:
        """The state before the first step: of the encoder's last ones, through a layer each."""
        states, last, cell = encoded.last_hidden_state, encoded.state, encoded.cell
        assert states is not None and last is not None
        hidden = torch.tanh(linear(self.initial_state, last)).transpose(0, 1).contiguous()
        if self.initial_cell is not None:
            cell = linear(self.initial_cell, cell).transpose(0, 1).contiguous()  # type: ignore[arg-type]
        feed = states.new_zeros(states.shape[0], self.config.hidden_size) if self.feeds else None
        return RecurrentState(hidden, cell, self.score.keys(states), feed)

    def forward(
        self,
        x: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        state: RecurrentState,
        weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: (B, T, embedding_size), embedded target words; values: (B, Sk, hidden_size), the encoder's states; mask:
        (B, 1, Sk) bool. Advances `state` by T steps. Returns the readout (B, T, readout_size) and weights (B, T, Sk)
        or None."""
        steps = self._bahdanau if self.additive else self._luong
        readout, found = steps(x, values, mask, state, weights)
        state.length += x.shape[1]
        return ops.dropout(readout, dropout_p(self.dropout)), found

    def _advance(self, x: torch.Tensor, state: RecurrentState) -> torch.Tensor:
        if state.cell is None:
            out, state.hidden = self.rnn(x, state.hidden)
        else:
            out, (state.hidden, state.cell) = self.rnn(x, (state.hidden, state.cell))
        return out

    def _bahdanau(self, x, values, mask, state, weights):
        contexts, states, found = [], [], []
        for word in x.split(1, 1):
            context, w = self.score(state.hidden[-1].unsqueeze(1), state.keys, values, mask, weights)
            states.append(self._advance(torch.cat((word, context), -1), state))
            contexts.append(context)
            found.append(w)
        read = torch.cat((torch.cat(states, 1), x, torch.cat(contexts, 1)), -1)
        return linear(self.readout, read).unflatten(-1, (-1, 2)).amax(-1), torch.cat(found, 1) if weights else None

    def _luong(self, x, values, mask, state, weights):
        if not self.feeds:  # no step needs the one before but the network itself: all at once
            return self._attend(self._advance(x, state), values, mask, state, weights)
        readouts, found = [], []
        for word in x.split(1, 1):
            states = self._advance(torch.cat((word, state.feed.unsqueeze(1)), -1), state)
            readout, w = self._attend(states, values, mask, state, weights)
            state.feed = readout.squeeze(1)
            readouts.append(readout)
            found.append(w)
        return torch.cat(readouts, 1), torch.cat(found, 1) if weights else None

    def _attend(self, states, values, mask, state, weights):
        context, w = self.score(states, state.keys, values, mask, weights)
        return torch.tanh(linear(self.readout, torch.cat((context, states), -1))), w


class AttentionRNNModel(AttentionRNNPreTrainedModel):
    """Encoder and decoder without the projection to the vocabulary."""

    def __init__(self, config: AttentionRNNConfig):
        super().__init__(config)
        self.encoder = AttentionRNNEncoder(config)
        self.decoder = AttentionRNNDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: RecurrentState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """As HF's encoder-decoders. input_ids: (B, Sk); attention_mask: (B, Sk), nonzero for tokens;
        decoder_input_ids: (B, T); past_key_values: a RecurrentState, advanced in place. Returns Seq2SeqModelOutput:
        last_hidden_state is the readout (B, T, config.readout_size), cross_attentions holds one (B, 1, T, Sk)."""
        config = self.config
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, return_dict=True)
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = AttentionRNNEncoderOutput(*encoder_outputs)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            came = "neither" if decoder_input_ids is None else "both"
            raise ValueError(f"decoder_input_ids, decoder_inputs_embeds: wanted exactly one of them, got {came}")
        values = encoder_outputs.last_hidden_state
        if decoder_inputs_embeds is None:
            ids: Any = decoder_input_ids
            check_integers("decoder_input_ids", ids)
            check_indices("decoder_input_ids", ids, config.vocab_size, "config.vocab_size")
            decoder_inputs_embeds = self.decoder.embed_tokens(ids)
        if decoder_inputs_embeds.shape[0] != values.shape[0] or not decoder_inputs_embeds.shape[1]:
            raise ValueError(
                f"decoder_input_ids: wanted shape ({values.shape[0]}, at least 1) for input_ids of "
                f"{tuple(values.shape[:2])}, got {tuple(decoder_inputs_embeds.shape[:2])}"
            )
        mask = _source_mask(attention_mask, *values.shape[:2])
        state = self.decoder.start(encoder_outputs) if past_key_values is None else past_key_values
        weights = config.output_attentions if output_attentions is None else output_attentions
        readout, found = self.decoder(
            ops.dropout(decoder_inputs_embeds, dropout_p(self.decoder.dropout)), values,
            None if mask is None else mask[:, None], state, bool(weights),
        )  # fmt: skip
        keep = config.use_cache if use_cache is None else use_cache
        return Seq2SeqModelOutput(
            last_hidden_state=readout,
            **cached(state if keep else None),
            cross_attentions=(found.unsqueeze(1),) if found is not None else None,  # type: ignore[arg-type]
            encoder_last_hidden_state=values,
        )


class AttentionRNNForConditionalGeneration(GenerationMixin, AttentionRNNPreTrainedModel, HFGenerationMixin):
    """The encoder-decoder with scores over the target vocabulary; `generate` has Hugging Face's signature."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: AttentionRNNConfig):
        super().__init__(config)
        self.model = AttentionRNNModel(config)
        self.lm_head = nn.Linear(config.readout_size, config.vocab_size)
        self.post_init()
        self.runs_as_hugging_face = runs_as_hugging_face(type(self))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a RecurrentState itself

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return shift_right(self.config, labels)

    def recurrent_step(
        self, tokens: torch.Tensor, state: RecurrentState, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits (B, vocab_size) after tokens (B,), which advance `state`; values: (B, Sk, hidden_size), the encoder's
        states; mask: (B, Sk). forward without what only a first step needs."""
        decoder = self.model.decoder
        words = ops.dropout(decoder.embed_tokens(tokens[:, None]), dropout_p(decoder.dropout))
        readout, _ = decoder(words, values, None if mask is None else (mask != 0)[:, None], state)
        return linear(self.lm_head, readout[:, 0])

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: RecurrentState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """As AttentionRNNModel; labels: (B, T), -100 where there is nothing to score, also make the decoder's input
        when none is given. Returns Seq2SeqLMOutput with logits (B, T, vocab_size)."""
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        output = self.model(
            input_ids, attention_mask, decoder_input_ids, encoder_outputs, past_key_values, inputs_embeds,
            decoder_inputs_embeds, use_cache, output_attentions, return_dict=True,
        )  # fmt: skip
        rows = output.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            rows = rows[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = linear(self.lm_head, rows)
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.label_smoothing, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **cached(output.past_key_values),
            cross_attentions=output.cross_attentions,
            encoder_last_hidden_state=output.encoder_last_hidden_state,
        )


def _between(config: AttentionRNNConfig) -> float:
    """Dropout between layers, which torch warns about where there is one."""
    return config.dropout if config.num_layers > 1 else 0.0


def _source_mask(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"attention_mask: wanted shape (batch, length) = {(batch, length)}, got {tuple(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


AutoConfig.register(AttentionRNNConfig.model_type, AttentionRNNConfig, exist_ok=True)
AutoModel.register(AttentionRNNConfig, AttentionRNNModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(AttentionRNNConfig, AttentionRNNForConditionalGeneration, exist_ok=True)
