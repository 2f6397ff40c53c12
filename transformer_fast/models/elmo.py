"""ELMo (Peters et al., "Deep contextualized word representations", 2018), on PreTrainedModel.

Hugging Face has no such class: configuration and checkpoints are this package's own. from_allennlp reads the files that
AllenNLP published.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .. import ops
from ..layers.embeddings import check_indices
from ..layers.lstm import LSTM, TokenOrder, order_tokens
from ..layers.projection import dropout_p, linear
from ._elmo_tokenizer import BEHIND, ElmoTokenizer
from ._elmo_weights import read_options, read_weights
from ._forward import public_forward
from ._heads import IGNORE, classification_loss, token_loss
from ._loading import LoadingErrors

__all__ = [
    "ElmoConfig",
    "ElmoForPreTraining",
    "ElmoForSequenceClassification",
    "ElmoForTokenClassification",
    "ElmoModel",
    "ElmoTokenizer",
    "ScalarMix",
]

_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class ElmoConfig(PreTrainedConfig):
    """Configuration of an ELMo; the defaults are the published original's.

    Args:
        num_characters: number of character ids: 0 for padding, 256 bytes, and five marks.
        max_characters_per_token: C, marks included.
        char_embedding_size: width of a character's embedding.
        filters: (width, number) of each character convolution.
        char_activation: "relu" or "tanh".
        num_highway_layers: highway layers after the convolutions.
        projection_size: width of a word's vector and of each direction's states; hidden_size is twice that.
        cell_size: width of the LSTMs' cells.
        num_layers: number of LSTM layers in each direction.
        cell_clip: cells are clipped to [-cell_clip, cell_clip]; None for no clipping.
        projection_clip: the same for the states.
        use_skip_connections: layers after the first add their input.
        dropout: in the heads.
        vocab_size: number of words in the language model's softmax; only ElmoForPreTraining uses it.

    Source:
        Peters et al., "Deep contextualized word representations", 2018, section 3 and 3.4.

    Examples:
        >>> import transformer_fast
        >>> sizes = {"filters": [[1, 8], [2, 8]], "projection_size": 16, "cell_size": 32}
        >>> model = transformer_fast.ElmoModel(transformer_fast.ElmoConfig(**sizes))
    """

    model_type = "elmo"
    attribute_map = {"num_hidden_layers": "num_layers"}

    num_characters: int = 262
    max_characters_per_token: int = 50
    char_embedding_size: int = 16
    filters: list | tuple = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    char_activation: str = "relu"
    num_highway_layers: int = 2
    projection_size: int = 512
    cell_size: int = 4096
    num_layers: int = 2
    cell_clip: float | int | None = 3.0
    projection_clip: float | int | None = 3.0
    use_skip_connections: bool = True
    dropout: float | int = 0.5
    vocab_size: int = 0
    initializer_range: float = 0.05
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.char_activation not in _ACTIVATIONS:
            raise ValueError(f"char_activation: wanted 'relu' or 'tanh', got {self.char_activation!r}")
        self.filters = [[int(n) for n in pair] for pair in self.filters]
        widest = max(width for width, _ in self.filters)
        if widest > self.max_characters_per_token:
            raise ValueError(
                f"filters: wanted widths of at most max_characters_per_token = {self.max_characters_per_token}, got "
                f"{widest}"
            )
        for name, least in (("max_characters_per_token", 3), ("num_characters", BEHIND + 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted at least {least}, got {getattr(self, name)}")
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state: both directions."""
        return 2 * self.projection_size


class ScalarMix(nn.Module):
    """gamma * sum_k softmax(w)_k h_k: a task's weighted mean of the layers; the weights are equal at first.

    Args:
        count: number of hidden states.

    Source:
        Peters et al., 2018, equation 1.

    Examples:
        >>> import torch, transformer_fast
        >>> mix = transformer_fast.ScalarMix(3)
        >>> mix([torch.ones(2, 5, 8), torch.zeros(2, 5, 8), 2 * torch.ones(2, 5, 8)])[0, 0, :2].tolist()
        [1.0, 1.0]
    """

    def __init__(self, count: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(count))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, states) -> torch.Tensor:
        """states: `count` tensors of the same shape. Returns a tensor of that shape."""
        if len(states) != len(self.weights):
            raise ValueError(f"states: wanted {len(self.weights)}, got {len(states)}")
        weights = (self.weights.float().softmax(0) * self.gamma.float()).unbind()
        return sum(w.to(h.dtype) * h for w, h in zip(weights, states))  # type: ignore[return-value]


class Highway(nn.Module):
    """g * relu(W_transform x) + (1 - g) x, g = sigmoid(W_carry x), as bilm-tf names them (Srivastava et al., 2015)."""

    def __init__(self, width: int):
        super().__init__()
        self.carry = nn.Linear(width, width)
        self.transform = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = linear(self.carry, x).sigmoid()
        return torch.lerp(x, linear(self.transform, x, "relu"), gate)


class ElmoEmbeddings(nn.Module):
    """Word vectors from characters: convolutions, max pooling over the word, highway layers, a projection."""

    def __init__(self, config: ElmoConfig):
        super().__init__()
        self.activation = _ACTIVATIONS[config.char_activation]
        self.widest = max(width for width, _ in config.filters)
        self.characters = nn.Embedding(config.num_characters, config.char_embedding_size, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.char_embedding_size, number, width) for width, number in config.filters
        )
        total = sum(number for _, number in config.filters)
        self.highways = nn.ModuleList(Highway(total) for _ in range(config.num_highway_layers))
        self.projection = nn.Linear(total, config.projection_size)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """words: (N, C) character ids -> (N, projection_size). Each distinct word is computed once."""
        if not len(words):
            return self.projection.weight.new_zeros(0, self.projection.out_features)
        words, which = torch.unique(words, dim=0, return_inverse=True)
        # After the longest word there is only padding: one window of it per width is enough for the maximum.
        longest = int((words != BEHIND).any(0).nonzero()[-1]) + 1
        x = self.characters(words[:, : longest + self.widest]).transpose(1, 2)
        x = self.activation(torch.cat([convolution(x).amax(-1) for convolution in self.convolutions], 1))
        for highway in self.highways:
            x = highway(x)
        return linear(self.projection, x).index_select(0, which)


class ElmoLayer(nn.Module):
    """Both directions of one layer, which are independent of each other."""

    def __init__(self, config: ElmoConfig, skip: bool):
        super().__init__()
        self.skip = skip
        size, clips = config.projection_size, (config.cell_clip, config.projection_clip)
        self.forward_lstm = LSTM(size, config.cell_size, size, *clips)
        self.backward_lstm = LSTM(size, config.cell_size, size, *clips)

    def forward(self, x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
        """x: (N, 2P), the tokens in row-major order; forward states in the first P columns, backward in the last P."""
        ahead, back = x.chunk(2, -1)
        out = torch.cat((self.forward_lstm(ahead, order), self.backward_lstm(back, order, backward=True)), -1)
        return out + x if self.skip else out


class ElmoPreTrainedModel(LoadingErrors, PreTrainedModel):
    config_class = ElmoConfig
    config: ElmoConfig
    base_model_prefix = "elmo"
    main_input_name = "input_ids"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LSTM):
            for weight in (module.weight_ih, module.weight_hh, module.weight_hr):
                if weight is not None:
                    init.xavier_uniform_(weight)
            start = torch.zeros_like(module.bias)
            start[module.cell_size : 2 * module.cell_size] = 1.0  # the forget gate
            init.copy_(module.bias, start)
        elif isinstance(module, nn.Conv1d):
            init.uniform_(module.weight, -0.05, 0.05)
            init.zeros_(module.bias)
        elif isinstance(module, Highway):
            init.constant_(module.carry.bias, -2.0)  # at first, highways mostly carry their input, as in bilm-tf
        elif isinstance(module, ScalarMix):
            init.zeros_(module.weights)
            init.ones_(module.gamma)

    @classmethod
    def from_allennlp(cls, options_file: str | os.PathLike, weight_file: str | os.PathLike, **changes):
        """A model from AllenNLP's published options.json and weights.hdf5; for a class with a head, only the base is
        loaded.

        changes: configuration fields to set, such as num_labels and dropout. save_pretrained writes the model as
        safetensors, which from_pretrained and AutoModel read.
        Raises ImportError without h5py; ValueError, naming the file and its contents, for missing options, a file that
        is not HDF5 or has another layout, and weights that contradict the options.
        """
        options = read_options(options_file)
        if known := options.keys() & changes.keys():
            raise ValueError(f"{min(known)}: cannot be changed, as the weights have the value of {options_file}")
        config = cls.config_class(**options, **changes)
        state = read_weights(weight_file, config)
        model = cls(config)
        model.base_model.load_state_dict(state)
        return model.eval()

    @property
    def dummy_inputs(self):
        return {"input_ids": torch.tensor(ElmoTokenizer(self.config.max_characters_per_token)(["a b"])["input_ids"])}

    def get_input_embeddings(self):
        return self.base_model.embeddings

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError("resize_token_embeddings: words are embedded by their bytes; there is no vocabulary")


class ElmoModel(ElmoPreTrainedModel):
    """Character embeddings and the LSTMs of the bidirectional language model."""

    def __init__(self, config: ElmoConfig):
        super().__init__(config)
        self.embeddings = ElmoEmbeddings(config)
        self.layers = nn.ModuleList(
            ElmoLayer(config, config.use_skip_connections and i > 0) for i in range(config.num_layers)
        )
        self.post_init()

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Read sentences in both directions. Their begin and end marks are added here and removed from the outputs.

        Args:
            input_ids: (B, S, C) character ids, as ElmoTokenizer and AllenNLP's batch_to_ids make them, 0 at padding.
            attention_mask: (B, S), nonzero for words; default: where there are characters.
            output_hidden_states: also return the states of all layers.

        Returns:
            BaseModelOutput: last_hidden_state (B, S, 2 * projection_size), of the last layer, zeros at padding;
            hidden_states, num_layers + 1 tensors, of which the first holds each word's vector twice.

        Raises:
            TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.
        """
        tokens, mask = self._words(input_ids, attention_mask)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        rows, inner, order = self._bounded(tokens, mask)
        x = self.embeddings(rows)
        states = [torch.cat((x, x), -1)]
        for layer in self.layers:
            states.append(layer(states[-1], order))
        if not wanted:
            states = states[-1:]
        shown = [self._show(x[inner], mask) for x in states]
        return BaseModelOutput(
            last_hidden_state=shown[-1],  # type: ignore[arg-type]
            hidden_states=tuple(shown) if len(shown) > 1 else None,  # type: ignore[arg-type]
        )

    def _words(self, ids: Any, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.config.max_characters_per_token
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"input_ids: wanted an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.dim() != 3 or ids.shape[2] != size or not ids.shape[0]:
            raise ValueError(f"input_ids: wanted shape (batch, words, {size}) of characters, got {tuple(ids.shape)}")
        check_indices("input_ids", ids, self.config.num_characters, "config.num_characters")
        written = (ids != 0).any(-1)
        if mask is None:
            mask = written
        elif tuple(mask.shape) != tuple(ids.shape[:2]):
            raise ValueError(
                f"attention_mask: wanted shape (batch, words) = {tuple(ids.shape[:2])}, got {tuple(mask.shape)}"
            )
        mask = mask != 0
        if bool((mask & ~written).any()):
            raise ValueError("attention_mask: is nonzero where input_ids have no characters")
        if not bool(mask.any()):
            raise ValueError(f"input_ids: wanted at least one word, got none in shape {tuple(ids.shape)}")
        return ids, mask

    def _bounded(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, TokenOrder]:
        """(characters (N, C) of words and sentence marks in row-major order; (N,) bool, True for words; their
        TokenOrder). A sentence without words consists of its marks."""
        batch, length = mask.shape
        first, last = (
            torch.tensor(row, device=ids.device, dtype=ids.dtype)
            for row in ElmoTokenizer(self.config.max_characters_per_token).bounds
        )
        lengths = mask.sum(1)
        columns = torch.arange(length + 2, device=ids.device)
        framed = columns < (lengths + 2)[:, None]
        words = (columns > 0) & (columns <= lengths[:, None])
        rows = ids.new_empty(batch, length + 2, ids.shape[2])
        rows[:, 0] = first
        rows[words] = ids[mask]
        rows[columns == (lengths + 1)[:, None]] = last
        return rows[framed], words[framed], order_tokens(framed)

    def _show(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Words (N, D) -> (B, S, D), zeros at padding."""
        out = rows.new_zeros(mask.numel(), rows.shape[-1])
        return out.index_copy(0, mask.flatten().nonzero().squeeze(1), rows).unflatten(0, mask.shape)


class _Headed(ElmoPreTrainedModel):
    def __init__(self, config: ElmoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.elmo = ElmoModel(config)
        self.scalar_mix = ScalarMix(config.num_layers + 1)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def _mixed(self, input_ids, attention_mask, output_hidden_states) -> tuple[torch.Tensor, Any]:
        output = self.elmo(input_ids, attention_mask, output_hidden_states=True, return_dict=True)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return self.scalar_mix(output.hidden_states), output.hidden_states if wanted else None


class ElmoForSequenceClassification(_Headed):
    """A ScalarMix of the layers, its mean over the words of a sentence, and a linear layer."""

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Score the classes of each sentence. Other arguments: as ElmoModel.

        Args:
            labels: (B,), int64 classes, or floats for a regression; (B, num_labels) floats for several at once.

        Returns:
            SequenceClassifierOutput with logits (B, num_labels). The mean of a sentence without words is zeros.
        """
        mixed, states = self._mixed(input_ids, attention_mask, output_hidden_states)
        mask = (input_ids != 0).any(-1) if attention_mask is None else attention_mask != 0  # type: ignore[union-attr]
        pooled = mixed.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(mixed.dtype)
        logits = linear(self.classifier, ops.dropout(pooled, dropout_p(self.dropout)))
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)  # type: ignore[arg-type]


class ElmoForTokenClassification(_Headed):
    """A ScalarMix of the layers, and a linear layer on each word."""

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Score the classes of each word. labels: (B, S) int64, -100 to ignore; other arguments: as ElmoModel.

        Returns:
            TokenClassifierOutput with logits (B, S, num_labels).
        """
        mixed, states = self._mixed(input_ids, attention_mask, output_hidden_states)
        logits = linear(self.classifier, ops.dropout(mixed, dropout_p(self.dropout)))
        loss = None if labels is None else token_loss(logits, labels)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=states)  # type: ignore[arg-type]


@dataclass
class ElmoForPreTrainingOutput(ModelOutput):
    """loss: the mean of forward_loss and backward_loss, the cross entropies of the two directions.
    last_hidden_state: (B, S, 2 * projection_size)."""

    loss: torch.Tensor | None = None
    forward_loss: torch.Tensor | None = None
    backward_loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class ElmoForPreTraining(ElmoPreTrainedModel):
    """The bidirectional language model: predicts each word from the words before it and from those after it, with one
    softmax layer for both."""

    def __init__(self, config: ElmoConfig):
        super().__init__(config)
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size: wanted the number of words to predict, got {config.vocab_size}")
        self.elmo = ElmoModel(config)
        self.lm_head = nn.Linear(config.projection_size, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @public_forward()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> ElmoForPreTrainingOutput:
        """The language model's losses; the logits are never in memory as a whole. Other arguments: as ElmoModel.

        Args:
            labels: (B, S) int64, the vocabulary id of each word itself (not shifted), -100 to ignore.

        Returns:
            ElmoForPreTrainingOutput: loss, forward_loss, backward_loss, and last_hidden_state.
        """
        base = self.elmo
        ids, mask = base._words(input_ids, attention_mask)
        rows, inner, order = base._bounded(ids, mask)
        x = base.embeddings(rows)
        x = ops.dropout(torch.cat((x, x), -1), dropout_p(self.dropout))
        for layer in base.layers:
            x = ops.dropout(layer(x, order), dropout_p(self.dropout))
        shown = base._show(x[inner], mask)
        if labels is None:
            return ElmoForPreTrainingOutput(last_hidden_state=shown)
        if tuple(labels.shape) != tuple(mask.shape):
            raise ValueError(f"labels: wanted shape {tuple(mask.shape)}, got {tuple(labels.shape)}")
        if (labels == IGNORE).logical_or(~mask).all():
            raise ValueError("labels: wanted at least one word to score, got none")
        check_indices("labels", labels[labels != IGNORE], self.config.vocab_size, "config.vocab_size")
        # A word is predicted from the forward state before it and the backward state after it. Every word has marks or
        # words of its sentence on both sides, so rows i - 1 and i + 1 belong to the same sentence.
        at, words = inner.nonzero().squeeze(1), labels.to(mask.device)[mask].long()
        ahead, back = x.chunk(2, -1)
        forward_loss, backward_loss = (
            ops.linear_cross_entropy(states.index_select(0, at + step), self.lm_head.weight, words, self.lm_head.bias)
            for states, step in ((ahead, -1), (back, 1))
        )
        return ElmoForPreTrainingOutput((forward_loss + backward_loss) / 2, forward_loss, backward_loss, shown)


AutoConfig.register(ElmoConfig.model_type, ElmoConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, ElmoModel), (AutoModelForPreTraining, ElmoForPreTraining),
    (AutoModelForSequenceClassification, ElmoForSequenceClassification),
    (AutoModelForTokenClassification, ElmoForTokenClassification),
):  # fmt: skip
    _auto.register(ElmoConfig, _model, exist_ok=True)
