"""RoBERTa (Liu et al., 2019), every head: BERT's layers, positions that count tokens. `classes_of` makes the same
classes for families with other names (CamemBERT, XLM-RoBERTa)."""

from types import ModuleType
from typing import Any

import torch

from ..generation import GenerationMixin
from ..layers.projection import dropout_p, linear
from ..layers.unpadding import spread_in_use
from ..ops import dropout
from ._base import Adopted
from ._bert import SLOTS, BertBase, base_forward, causal_forward, masked_lm_forward
from ._encoder import EncoderHeads, VocabularyHead
from ._head_forwards import labelled, spans
from ._layer import AttentionModule, Layer
from ._run_stack import Inputs

__all__ = ["TokenPositions", "classes_of", "score_first"]


class TokenPositions:
    """Mixin, placed before EncoderBase: tokens have positions padding_idx + 1, padding_idx + 2, ... without gaps, and
    padding has padding_idx."""

    embeddings: Any

    def _positions(self, inputs: Inputs, past) -> torch.Tensor | None:
        padding, spread = self.embeddings.padding_idx, spread_in_use()
        if inputs.position_ids is not None:
            if spread is not None and bool((inputs.position_ids < padding).any()):
                raise ValueError(
                    f"position_ids: wanted positions from {padding + 1}, config.pad_token_id + 1, or None, got "
                    f"{int(inputs.position_ids.min())}; shard_batch(..., position_ids=False) gives none"
                )
            return inputs.position_ids
        if inputs.input_ids is None:
            embeds: Any = inputs.inputs_embeds
            length, device = embeds.shape[1], embeds.device
            columns = torch.arange(length, device=device) if spread is None else spread.positions(length, device)
            return columns[None] + (padding + 1)
        real = inputs.input_ids != padding
        counted = real.cumsum(1) if spread is None else spread.shard(spread.unshard(real).cumsum(1))
        return (counted + past) * real + padding


def score_first(head: Any, first: torch.Tensor) -> torch.Tensor:
    """A head of two linear layers with tanh between them: first positions (B, E) -> (B, labels)."""
    p = dropout_p(head.dropout)
    return linear(head.out_proj, dropout(torch.tanh(linear(head.dense, dropout(first, p))), p))


class _Base(TokenPositions, BertBase):
    pass


class _Heads(EncoderHeads):
    _positions_are_columns = False  # transformers' generate passes other positions than forward computes
    lm_head: Any

    def _vocabulary_head(self) -> VocabularyHead:
        head = self.lm_head
        return VocabularyHead(head.dense, "gelu", head.layer_norm, head.decoder)


class _ScoresFirst(_Heads):
    def _score(self, pooled: torch.Tensor) -> torch.Tensor:
        return score_first(self.classifier, pooled)


def classes_of(hf: ModuleType, prefix: str, module: str) -> dict[str, type]:
    """{name: class} of a family with RoBERTa's architecture: HF's names, this package's computation.

    hf: HF's module of the family. prefix: the first part of its class names. module: the name of our module, by which
    the classes are pickled.
    """
    adopted = Adopted()

    def make(name: str, *bases: type, **members: Any) -> type:
        theirs: Any = getattr(hf, prefix + name)
        shared = {"__module__": module, "__doc__": theirs.__doc__}
        return type(prefix + name, (*bases, theirs), shared | members)

    def head(name: str, make_forward: Any, *bases: type, **options: Any) -> type:
        forward = make_forward(getattr(hf, prefix + name), **options)
        return make(name, *(bases or (_Heads,)), _adopted=adopted, forward=forward)

    def on_labels(name: str, compute: Any, *bases: type) -> type:
        return head(name, lambda theirs: labelled(theirs, compute), *bases)

    layers = [make("Layer", Layer, _table=SLOTS), make("SelfAttention", AttentionModule),
              make("CrossAttention", AttentionModule)]  # fmt: skip
    made = [
        base := head("Model", base_forward, _Base),
        head("ForMaskedLM", masked_lm_forward),
        head("ForCausalLM", causal_forward, GenerationMixin, _Heads),
        on_labels("ForSequenceClassification", EncoderHeads._classify_sequences, _ScoresFirst),
        on_labels("ForMultipleChoice", EncoderHeads._choose),
        on_labels("ForTokenClassification", EncoderHeads._classify_tokens),
        head("ForQuestionAnswering", spans),
    ]
    for kind in [*layers, base]:
        adopted.register(kind)
    return {kind.__name__: kind for kind in [*layers, *made]}
