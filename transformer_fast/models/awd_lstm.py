"""The AWD-LSTM (Merity et al., 2018) and ULMFiT's classifier on it (Howard and Ruder, 2018), on PreTrainedModel.

Hugging Face has no such class: the configuration and the checkpoints are this package's own. ULMFiT's schedule,
learning rates and unfreezing are in transformer_fast.fine_tuning; they work with every model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation import GenerationMixin as HFGenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .. import ops
from .._transformers import CACHE_NAME, cached, recomputed
from ..layers.embeddings import check_indices
from ..layers.lstm import LSTM, TokenOrder, lstm, order_tokens
from ..layers.pooling import concat_pooling
from ..layers.projection import dropout_p, linear
from ._base import check_inputs
from ._forward import public_forward
from ._heads import classification_loss
from ._loading import LoadingErrors
from ._sequence_loss import sequence_loss

__all__ = ["AWDLSTMConfig", "AWDLSTMForCausalLM", "AWDLSTMForSequenceClassification", "AWDLSTMModel", "AWDLSTMState"]


class AWDLSTMConfig(PreTrainedConfig):
    """Configuration of an AWD-LSTM; the defaults are ULMFiT's.

    Args:
        vocab_size: number of words.
        embedding_size: width of the embeddings and of the last layer's states.
        cell_size: width of the layers before the last.
        num_layers: number of LSTM layers.
        embedding_dropout: share of the words that are dropped at all their positions.
        input_dropout: on the embeddings. One mask for all tokens of a sequence, as in hidden_dropout and
            output_dropout.
        weight_dropout: on the weights between hidden states (DropConnect), one mask per call.
        hidden_dropout: between layers.
        output_dropout: on the last layer's states.
        activation_regularization: factor of the mean square of the last layer's states after dropout, added to the
            language model's loss in training.
        temporal_regularization: the same for the difference of neighbouring states, before dropout.
        classifier_size: width of the classifier's hidden layer.
        classifier_dropout: before each of the classifier's two layers.
        tie_word_embeddings: one matrix for input and output.

    Source:
        Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models", 2018; Howard and Ruder,
        "Universal Language Model Fine-tuning for Text Classification", 2018.

    Examples:
        >>> import transformer_fast
        >>> config = transformer_fast.AWDLSTMConfig(vocab_size=100, embedding_size=16, cell_size=32)
        >>> model = transformer_fast.AWDLSTMForCausalLM(config)
    """

    model_type = "awd_lstm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_hidden_layers": "num_layers", "hidden_size": "embedding_size"}

    vocab_size: int = 60000
    embedding_size: int = 400
    cell_size: int = 1150
    num_layers: int = 3
    embedding_dropout: float | int = 0.1
    input_dropout: float | int = 0.4
    weight_dropout: float | int = 0.5
    hidden_dropout: float | int = 0.3
    output_dropout: float | int = 0.4
    activation_regularization: float | int = 2.0
    temporal_regularization: float | int = 1.0
    classifier_size: int = 50
    classifier_dropout: float | int = 0.4
    initializer_range: float = 0.1
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        for name in ("embedding_dropout", "input_dropout", "weight_dropout", "hidden_dropout", "output_dropout",
                     "classifier_dropout"):  # fmt: skip
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted a number in [0, 1), got {getattr(self, name)!r}")
        super().__post_init__(**kwargs)


class AWDLSTMState:
    """The layers' states after a token. It has the place of a cache. layers: one (h (B, P), c (B, C)) per layer."""

    is_compileable = False

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], length: int = 0):
        self.layers, self.length = layers, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.layers = [tuple(t.index_select(0, beam_idx.to(t.device)) for t in pair) for pair in self.layers]  # type: ignore[misc]

    def detach(self) -> "AWDLSTMState":
        """The same state without gradients: this truncates back-propagation through time."""
        return AWDLSTMState([(h.detach(), c.detach()) for h, c in self.layers], self.length)


@dataclass
class AWDLSTMOutput(BaseModelOutputWithPast):
    """As BaseModelOutputWithPast. raw_hidden_state: (B, S, embedding_size), in training the last layer's states before
    dropout."""

    raw_hidden_state: torch.Tensor | None = None


class AWDLSTMPreTrainedModel(LoadingErrors, PreTrainedModel):
    config_class = AWDLSTMConfig
    config: AWDLSTMConfig
    base_model_prefix = "model"
    _is_stateful = True  # a token cannot be taken back
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -self.config.initializer_range, self.config.initializer_range)
        elif isinstance(module, LSTM):
            bound = module.output_size**-0.5
            for weight in (module.weight_ih, module.weight_hh, module.bias):
                init.uniform_(weight, -bound, bound)

    @property
    def dummy_inputs(self):
        return {"input_ids": torch.tensor([[3, 4, 5], [3, 4, 0]], device=self.device)}


class AWDLSTMModel(AWDLSTMPreTrainedModel):
    """Embeddings and LSTMs, each with its dropout."""

    def __init__(self, config: AWDLSTMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        sizes = [config.embedding_size, *[config.cell_size] * (config.num_layers - 1), config.embedding_size]
        self.layers = nn.ModuleList(LSTM(a, b) for a, b in zip(sizes, sizes[1:]))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: AWDLSTMState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> AWDLSTMOutput:
        """Read the words of each sequence from the first to the last.

        Args:
            input_ids: (B, S) int32 or int64.
            attention_mask: (B, S) or, with a state, (B, past + S); nonzero for tokens, padding on either side.
            past_key_values: an AWDLSTMState to continue from.
            inputs_embeds: (B, S, embedding_size), in place of input_ids.
            use_cache: also return the state; default: the configuration's.
            output_hidden_states: also return the states of all layers.

        Returns:
            AWDLSTMOutput: last_hidden_state (B, S, embedding_size), after dropout, zeros at padding; past_key_values;
            hidden_states, a tuple of num_layers + 1 tensors whose widths differ.

        Raises:
            TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.
        """
        config = self.config
        source = check_inputs(input_ids, inputs_embeds, config.embedding_size)
        if input_ids is not None:
            check_indices("input_ids", input_ids, config.vocab_size, "config.vocab_size")
        if not source.shape[0] or not source.shape[1]:
            raise ValueError(f"input_ids: wanted at least one token, got shape {tuple(source.shape[:2])}")
        mask = _tokens(attention_mask, source, 0 if past_key_values is None else past_key_values.get_seq_length())
        if past_key_values is not None and past_key_values.layers[0][0].shape[0] != source.shape[0]:
            raise ValueError(
                f"past_key_values: wanted a state of {source.shape[0]} sequences, got one of "
                f"{past_key_values.layers[0][0].shape[0]}"
            )
        order, rows = order_tokens(mask), mask.nonzero()[:, 0]
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = embedded[mask]
        if self.training and config.embedding_dropout and input_ids is not None:
            keep = ops.dropout(x.new_ones(config.vocab_size, 1), config.embedding_dropout)
            x = x * keep[input_ids[mask]]
        x = self._locked(x, rows, len(mask), config.input_dropout)
        layers: Any = self.layers
        state = past_key_values or AWDLSTMState([layer.start(len(mask)) for layer in layers])
        carried, states = [], [x]
        run: Any = self._recomputed if self.gradient_checkpointing and self.training else self._layer
        for i, layer in enumerate(layers):
            x, last = run(layer, x, order, state.layers[i])
            carried.append(last)
            raw, final = x, i + 1 == len(self.layers)
            x = self._locked(x, rows, len(mask), config.output_dropout if final else config.hidden_dropout)
            states.append(x)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_state = config.use_cache if use_cache is None else use_cache
        shown = [_padded(h, mask) for h in (states if wanted else states[-1:])]
        return AWDLSTMOutput(
            last_hidden_state=shown[-1],  # type: ignore[arg-type]
            **cached(AWDLSTMState(carried, state.length + source.shape[1]) if keep_state else None),
            hidden_states=tuple(shown) if wanted else None,  # type: ignore[arg-type]
            raw_hidden_state=_padded(raw, mask) if self.training else None,
        )

    def _locked(self, x: torch.Tensor, rows: torch.Tensor, batch: int, p: float) -> torch.Tensor:
        """Dropout with one mask for all tokens of a sequence (Gal and Ghahramani, 2016). x: (N, D); rows: (N,), the
        sequence of each token."""
        if not self.training or not p:
            return x
        return x * ops.dropout(x.new_ones(batch, x.shape[1]), p).index_select(0, rows)

    def _recomputed(self, *inputs):
        """_layer under gradient checkpointing: the backward pass runs it again."""
        return recomputed(self, self._layer, *inputs)

    def _layer(self, layer: Any, x: torch.Tensor, order: TokenOrder, state: tuple[torch.Tensor, torch.Tensor]):
        hidden = layer.weight_hh
        if self.training and self.config.weight_dropout:
            hidden = ops.dropout(hidden, self.config.weight_dropout)
        start = state[0].to(x.dtype), state[1].to(x.dtype)
        return lstm(x, order, start, layer.weight_ih, hidden, layer.bias)


class AWDLSTMForCausalLM(AWDLSTMPreTrainedModel, HFGenerationMixin):
    """The language model; `generate` is Hugging Face's, with a state in place of a cache."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AWDLSTMConfig):
        super().__init__(config)
        self.model = AWDLSTMModel(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its state itself

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: AWDLSTMState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Score every word of the vocabulary as the next one. Other arguments: as AWDLSTMModel.

        Args:
            labels: (B, S) int64, -100 to ignore; each is predicted from the tokens before it.
            logits_to_keep: compute the last so many positions, or those of these indices; 0: all.
            num_items_in_batch: divides the sum of the losses, in place of the number of labels (`Trainer`).

        Returns:
            CausalLMOutputWithPast with logits (B, S, vocab_size), and the loss if there are labels. In training it
            includes the two regularisation terms.
        """
        output = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states, return_dict=True
        )
        x, loss = output.last_hidden_state, None
        read = x
        if labels is None and (not isinstance(logits_to_keep, int) or logits_to_keep):
            read = x[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = linear(self.lm_head, read)
        if labels is not None:
            if tuple(labels.shape) != tuple(x.shape[:2]):
                raise ValueError(f"labels: wanted shape {tuple(x.shape[:2])}, got {tuple(labels.shape)}")
            loss = sequence_loss(logits[:, :-1], labels[:, 1:], 0.0, num_items_in_batch)
            if output.raw_hidden_state is not None:
                tokens = _tokens(attention_mask, x, 0)
                loss = loss + self._regularisation(x, output.raw_hidden_state, tokens)
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            **cached(output.get(CACHE_NAME)),
            hidden_states=output.hidden_states,
        )

    def _regularisation(self, dropped: torch.Tensor, raw: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | float:
        """Merity et al., section 4.6. dropped, raw: (B, S, D), zeros at padding; tokens: (B, S) bool."""
        config = self.config
        total = config.activation_regularization * dropped.square().sum() / (tokens.sum() * dropped.shape[2])
        pairs = (tokens[:, 1:] & tokens[:, :-1])[..., None]
        change = ((raw[:, 1:] - raw[:, :-1]).square() * pairs).sum()
        return total + config.temporal_regularization * change / (pairs.sum().clamp(min=1) * raw.shape[2])


class AWDLSTMForSequenceClassification(AWDLSTMPreTrainedModel):
    """Concat pooling and two linear layers with batch norm, dropout and a ReLU between them (ULMFiT, section 3.3)."""

    def __init__(self, config: AWDLSTMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AWDLSTMModel(config)
        wide, narrow = 3 * config.embedding_size, config.classifier_size
        self.norms = nn.ModuleList([nn.BatchNorm1d(wide), nn.BatchNorm1d(narrow)])
        self.hidden = nn.Linear(wide, narrow)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(narrow, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Score the classes of each sequence. Other arguments: as AWDLSTMModel.

        Args:
            labels: (B,), int64 classes, or floats for a regression; (B, num_labels) floats for several at once.

        Returns:
            SequenceClassifierOutput with logits (B, num_labels), and the loss if there are labels.
        """
        output = self.model(
            input_ids, attention_mask, None, inputs_embeds, False, output_hidden_states, return_dict=True
        )
        x = concat_pooling(output.last_hidden_state, attention_mask)
        x = ops.dropout(self.norms[0](x), dropout_p(self.dropout))
        x = ops.dropout(self.norms[1](linear(self.hidden, x, "relu")), dropout_p(self.dropout))
        logits = linear(self.classifier, x)
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)  # type: ignore[arg-type]


def _tokens(mask: torch.Tensor | None, source: torch.Tensor, past: int) -> torch.Tensor:
    """(B, S) bool, True for tokens."""
    batch, length = source.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=source.device)
    if tuple(mask.shape) not in ((batch, length), (batch, past + length)):
        raise ValueError(f"attention_mask: wanted shape (batch, length) = {(batch, length)}, got {tuple(mask.shape)}")
    return mask[:, -length:] != 0


def _padded(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Tokens (N, D) in row-major order -> (B, S, D), zeros at padding."""
    out = x.new_zeros(mask.numel(), x.shape[-1])
    return out.index_copy(0, mask.flatten().nonzero().squeeze(1), x).unflatten(0, mask.shape)


AutoConfig.register(AWDLSTMConfig.model_type, AWDLSTMConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, AWDLSTMModel), (AutoModelForCausalLM, AWDLSTMForCausalLM),
    (AutoModelForSequenceClassification, AWDLSTMForSequenceClassification),
):  # fmt: skip
    _auto.register(AWDLSTMConfig, _model, exist_ok=True)
