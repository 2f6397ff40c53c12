"""The parts of the recurrent encoder-decoder: encoder, decoder and the attention between them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .. import ops
from ..layers.embeddings import check_indices, look_up
from ..layers.projection import dropout_p, is_plain, linear
from ..layers.recurrent import recurrent_layers, why_not_recurrent
from ..layers.recurrent_steps import RecurrentSteps
from ..ops._common import plain
from ..ops.step_weight import StepWeight
from ._base import check_inputs
from ._forward import public_forward
from ._loading import LoadingErrors
from ._recurrent_config import CELLS, AttentionRNNConfig
from ._recurrent_state import RecurrentState

__all__ = [
    "AttentionRNNDecoder",
    "AttentionRNNEncoder",
    "AttentionRNNEncoderOutput",
    "AttentionRNNPreTrainedModel",
    "Score",
    "source_mask",
]

_WIDEST_HEAD = 256  # the largest head dim of scaled_dot_product_attention
_FEW_STEPS = 4  # with fewer steps, repacking a weight takes longer than it saves


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
        raise NotImplementedError(
            "resize_token_embeddings: source and target have embeddings of their own; make a model with the "
            "vocabularies wanted in its configuration, and copy the rest"
        )

    @property
    def dummy_inputs(self):
        ids = torch.tensor([[3, 4, 5], [3, 4, 0]], device=self.device)
        return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "decoder_input_ids": ids}


class Score(nn.Module):
    """Attention over the encoder's states by one of the four scores; has no parameters with attention "none"."""

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
        """Encoder states (B, Sk, hidden_size) -> keys (B, Sk, width), projected once for all steps."""
        return states if self.key is None else linear(self.key, states)

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        weights: bool,
        projected: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query: (B, Sq, hidden_size), or projected already; mask: (B, 1, Sk) bool or None -> context (B, Sq,
        hidden_size) and, when asked for, weights (B, Sq, Sk)."""
        if self.hidden_layer:
            weight: Any = self.weight
            out: Any = ops.additive_attention(
                query if projected else linear(self.query, query), keys, values, weight, attn_mask=mask,
                return_weights=weights,
            )  # fmt: skip
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
    """Embedding and a bidirectional recurrent network over the source. Padding is not computed."""

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
        mask = source_mask(attention_mask, batch, length)
        x = look_up(self.embed_tokens, input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
        x = ops.dropout(x, dropout_p(self.dropout))
        if mask is not None and bool(mask.all()):
            mask = None
        if not why_not_recurrent(self.rnn, x):
            states, last = recurrent_layers(self.rnn, x) if mask is None else self._without_padding(x, mask)
        else:
            states, last = self.rnn(x) if mask is None else self._torch_without_padding(x, mask)
        state, cell = last if isinstance(last, tuple) else (last, None)
        return AttentionRNNEncoderOutput(states, self._joined(state), None if cell is None else self._joined(cell))

    def _without_padding(self, x: torch.Tensor, mask: torch.Tensor):
        batch, length, width = x.shape
        places = mask.flatten().nonzero().squeeze(1)
        ends = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        rows, last = recurrent_layers(self.rnn, x.reshape(-1, width).index_select(0, places), cu_seqlens=ends)
        states = rows.new_zeros(batch * length, rows.shape[1]).index_copy(0, places, rows)
        return states.view(batch, length, -1), last

    def _torch_without_padding(self, x: torch.Tensor, mask: torch.Tensor):
        """Run torch's network on rows whose tokens were moved to the front, whichever side the padding is on; then move
        the outputs back, with zeros at padding."""
        lengths = mask.sum(1)
        order = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[..., None]
        sequences = pack_padded_sequence(
            torch.gather(x, 1, order.expand_as(x)), lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, last = self.rnn(sequences)
        states = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])[0]
        states = torch.zeros_like(states).scatter(1, order.expand_as(states), states)
        return states.masked_fill(~mask[..., None], 0.0), last

    def _joined(self, state: torch.Tensor) -> torch.Tensor:
        """(layers * directions, B, width) -> (B, layers, directions * width)."""
        return state.unflatten(0, (self.config.num_layers, -1)).permute(2, 0, 1, 3).flatten(2)


class AttentionRNNDecoder(AttentionRNNPreTrainedModel):
    """A recurrent network that attends to the encoder's states at every step."""

    def __init__(self, config: AttentionRNNConfig):
        super().__init__(config)
        hidden, embedding = config.hidden_size, config.embedding_size
        self.attends, self.maxout = config.attention != "none", config.has_maxout
        self.feeds = config.input_feeding and self.attends and not self.maxout
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.initial_state = nn.Linear(hidden, hidden)
        self.initial_cell = nn.Linear(hidden, hidden) if config.cell == "lstm" else None
        self.score = Score(config)
        inputs = embedding + (hidden if self.maxout or self.feeds else 0)
        self.rnn = CELLS[config.cell](inputs, hidden, config.num_layers, batch_first=True, dropout=_between(config))
        self.readout = None
        if self.maxout:  # two values per maxout unit
            self.readout = nn.Linear(2 * hidden + embedding, 2 * config.readout_size)
        elif self.attends:
            self.readout = nn.Linear(2 * hidden, config.readout_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def start(self, encoded: AttentionRNNEncoderOutput) -> RecurrentState:
        """The state before the first step: linear layers of the encoder's last states."""
        states, last, cell = encoded.last_hidden_state, encoded.state, encoded.cell
        assert states is not None and last is not None
        hidden = torch.tanh(linear(self.initial_state, last)).transpose(0, 1).contiguous()
        if self.initial_cell is not None:
            cell = linear(self.initial_cell, cell).transpose(0, 1).contiguous()  # type: ignore[arg-type]
        feed = states.new_zeros(states.shape[0], self.config.hidden_size) if self.feeds else None
        # The keys of the source; without attention its last state.
        seen = self.score.keys(states) if self.attends else last[:, -1:]
        return RecurrentState(hidden, cell, seen, feed)

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
        if not self.attends:
            readout, found = self._without_attention(x, state), None
        else:
            if (self.maxout or self.feeds) and x.shape[1] >= _FEW_STEPS and not self._why_not_steps(x):
                steps = self._steps
            else:
                steps = self._bahdanau if self.maxout else self._luong
            readout, found = steps(x, values, mask, state, weights)
        state.length += x.shape[1]
        return ops.dropout(readout, dropout_p(self.dropout)), found

    def _advance(self, x: torch.Tensor, state: RecurrentState) -> torch.Tensor:
        before = state.hidden if state.cell is None else (state.hidden, state.cell)
        if x.shape[1] >= _FEW_STEPS and not why_not_recurrent(self.rnn, x):
            out, after = recurrent_layers(self.rnn, x, before)
        else:
            out, after = self.rnn(x, before)
        if state.cell is None:
            state.hidden = after
        else:
            state.hidden, state.cell = after
        return out

    def _maxout(self, states, words, contexts):
        read = torch.cat((states, words, contexts), -1)
        return linear(self.readout, read).unflatten(-1, (-1, 2)).amax(-1)

    def _without_attention(self, x, state):
        if not self.maxout:
            return self._advance(x, state)
        context = state.keys.expand(-1, x.shape[1], -1)
        return self._maxout(self._advance(torch.cat((x, context), -1), state), x, context)

    def _why_not_steps(self, x: torch.Tensor) -> str:
        """'' where the loop over the steps may repack its weights once for all steps; else why not."""
        if reason := why_not_recurrent(self.rnn, x):
            return reason
        for module in (self.readout, self.score.query):
            if module is not None and not is_plain(module, nn.Linear):
                return f"a {type(module).__name__} is not a plain linear layer"
        if not plain(x, *self.parameters()):
            return "tensor subclasses, dispatch modes or transforms observe the operations"
        return "autocast is on" if torch.is_autocast_enabled("cpu") else ""

    def _steps(self, x, values, mask, state, weights):
        """_bahdanau and _luong with weights that are repacked once, and whose gradients are computed once, for all
        steps."""
        batch, steps, _ = x.shape
        rnn = RecurrentSteps(self.rnn, x, state.hidden, state.cell)
        query = self.score.query
        ask = None if query is None else StepWeight(query.weight, steps, batch)
        read = None if self.maxout else StepWeight(self.readout.weight, steps, batch)
        rows: list[tuple] = []  # per step: (state, context), or (readout,)
        found = []

        def attend(hidden):
            hidden = hidden if ask is None else ask(hidden)
            context, w = self.score(hidden.unsqueeze(1), state.keys, values, mask, weights, projected=True)
            found.append(w)
            return context.squeeze(1)

        for step in range(steps):
            if self.maxout:
                context = attend(rnn.hidden[-1])
                rows.append((rnn(step, context), context))
            else:
                hidden = rnn(step, state.feed)
                state.feed = torch.tanh(read(torch.cat((attend(hidden), hidden), -1)))
                rows.append((state.feed,))
        state.hidden = torch.stack(rnn.hidden)
        state.cell = None if rnn.memory is None else torch.stack(rnn.memory)
        stacked = [torch.stack(part, 1) for part in zip(*rows)]
        readout = self._maxout(stacked[0], x, stacked[1]) if self.maxout else stacked[0]
        return readout, torch.cat(found, 1) if weights else None

    def _bahdanau(self, x, values, mask, state, weights):
        contexts, states, found = [], [], []
        for word in x.split(1, 1):
            context, w = self.score(state.hidden[-1].unsqueeze(1), state.keys, values, mask, weights)
            states.append(self._advance(torch.cat((word, context), -1), state))
            contexts.append(context)
            found.append(w)
        readout = self._maxout(torch.cat(states, 1), x, torch.cat(contexts, 1))
        return readout, torch.cat(found, 1) if weights else None

    def _luong(self, x, values, mask, state, weights):
        if not self.feeds:  # without input feeding, attention and readout of all steps are computed at once
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


def _between(config: AttentionRNNConfig) -> float:
    """Dropout between layers; 0 for a single layer, where torch would warn."""
    return config.dropout if config.num_layers > 1 else 0.0


def source_mask(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"attention_mask: wanted shape (batch, length) = {(batch, length)}, got {tuple(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0
