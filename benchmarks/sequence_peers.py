"""The 2017 Transformer and the recurrent network with additive attention in plain PyTorch, as they are commonly
written: the peers of this package's own models, whose weights they copy.

Both are called as (input_ids, attention_mask, labels) -> an output with loss and logits, and have
greedy(ids, mask, tokens, barred) -> (B, 1 + tokens): the start token and `tokens` new ones, none of which is `barred`.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .peers import quiet

__all__ = ["PlainAttentionRNN", "PlainTransformer"]


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class _Plain(nn.Module):
    """The loss with label smoothing, and the decoder's input from labels."""

    def __init__(self, config: Any):
        super().__init__()
        self.start, self.pad = config.decoder_start_token_id, config.pad_token_id
        self.loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)  # ignores labels of -100

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Output:
        target = F.pad(labels[:, :-1], (1, 0), value=self.start).masked_fill_(labels.roll(1, 1) == -100, self.pad)
        target[:, 0] = self.start
        logits = self.score(input_ids, attention_mask, target)
        return Output(self.loss(logits.flatten(0, 1), labels.flatten()), logits)

    def score(self, ids: torch.Tensor, mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) after each of target (B, T)."""
        raise NotImplementedError


class PlainTransformer(_Plain):
    """torch.nn.Transformer with embeddings, sinusoids and an output layer tied to the embeddings. It has no cache: each
    decoding step runs the decoder on all tokens so far; the encoder runs once."""

    def __init__(self, ours: Any):
        super().__init__(ours.config)
        with quiet():
            self.body = ours.model.to_torch()
        self.words = ours.model.encoder.embed_tokens
        self.positions = ours.model.encoder.embed_positions
        self.dropout = nn.Dropout(ours.config.dropout)
        self.scale = math.sqrt(ours.config.d_model)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.words(ids) * self.scale + self.positions.weight[: ids.shape[1]])

    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.body.encoder(self.embed(ids), src_key_padding_mask=mask == 0)

    def decode(self, target: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # Targets are padded on the right, so the causal mask already hides their padding.
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.bool)
        return self.body.decoder(
            self.embed(target), states, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=mask == 0
        )

    def score(self, ids, mask, target):
        return F.linear(self.decode(target, self.encode(ids, mask), mask), self.words.weight)

    @torch.inference_mode()
    def greedy(self, ids: torch.Tensor, mask: torch.Tensor, tokens: int, barred: int) -> torch.Tensor:
        states, target = self.encode(ids, mask), ids.new_full((len(ids), 1), self.start)
        for _ in range(tokens):
            logits = F.linear(self.decode(target, states, mask)[:, -1], self.words.weight)
            logits[:, barred] = -torch.inf
            target = torch.cat((target, logits.argmax(-1, keepdim=True)), 1)
        return target


class PlainAttentionRNN(_Plain):
    """An nn.GRU encoder, an nn.GRUCell decoder, and attention v . tanh(W s + U h + b) in torch's operations (Bahdanau
    et al., 2015), one step at a time."""

    def __init__(self, ours: Any):
        super().__init__(ours.config)
        encoder, decoder = ours.model.encoder, ours.model.decoder
        self.source, self.encoder = encoder.embed_tokens, encoder.rnn
        self.words, self.initial = decoder.embed_tokens, decoder.initial_state
        self.query, self.key, self.weight = decoder.score.query, decoder.score.key, decoder.score.weight
        self.cell = nn.GRUCell(decoder.rnn.input_size, decoder.rnn.hidden_size)
        self.cell.load_state_dict({k.removesuffix("_l0"): v for k, v in decoder.rnn.state_dict().items()})
        self.readout, self.output = decoder.readout, ours.lm_head
        self.dropout = nn.Dropout(ours.config.dropout)

    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(states (B, Sk, E), keys (B, Sk, A), the decoder's first state (B, E))."""
        packed = pack_padded_sequence(
            self.dropout(self.source(ids)), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, last = self.encoder(packed)
        states = pad_packed_sequence(states, batch_first=True, total_length=ids.shape[1])[0]
        return states, self.key(states), torch.tanh(self.initial(torch.cat(tuple(last), -1)))

    def step(self, word: torch.Tensor, hidden: torch.Tensor, states: torch.Tensor, keys: torch.Tensor, bias):
        scores = torch.tanh(self.query(hidden)[:, None] + keys) @ self.weight + bias
        context = torch.bmm(scores.softmax(-1)[:, None], states)[:, 0]
        return self.cell(torch.cat((word, context), -1), hidden), context

    def read(self, *parts: torch.Tensor) -> torch.Tensor:
        """Logits from state, word and context, through a maxout layer."""
        readout = self.readout(torch.cat(parts, -1)).unflatten(-1, (-1, 2)).amax(-1)
        return self.output(self.dropout(readout))

    def score(self, ids, mask, target):
        states, keys, hidden = self.encode(ids, mask)
        bias, words = _padding(mask), self.dropout(self.words(target))
        hiddens, contexts = [], []
        for word in words.unbind(1):
            hidden, context = self.step(word, hidden, states, keys, bias)
            hiddens.append(hidden)
            contexts.append(context)
        return self.read(torch.stack(hiddens, 1), words, torch.stack(contexts, 1))

    @torch.inference_mode()
    def greedy(self, ids: torch.Tensor, mask: torch.Tensor, tokens: int, barred: int) -> torch.Tensor:
        states, keys, hidden = self.encode(ids, mask)
        bias, found = _padding(mask), [ids.new_full((len(ids),), self.start)]
        for _ in range(tokens):
            word = self.words(found[-1])
            hidden, context = self.step(word, hidden, states, keys, bias)
            logits = self.read(hidden, word, context)
            logits[:, barred] = -torch.inf
            found.append(logits.argmax(-1))
        return torch.stack(found, 1)


def _padding(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill_(mask == 0, -torch.inf)
