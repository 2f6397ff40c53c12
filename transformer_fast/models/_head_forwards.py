"""The forwards of encoder heads: they have HF's arguments, by name and in order, and call a method of EncoderHeads."""

from collections.abc import Callable

import torch

from ._encoder import EncoderHeads
from ._forward import public_forward
from ._run_stack import Inputs


def labelled(hf_class: type[torch.nn.Module], compute: Callable) -> Callable:
    """forward of a head with labels, as in BERT and ALBERT. compute: a method of EncoderHeads."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return compute(self, inputs, labels, kwargs)

    return forward


def spans(hf_class: type[torch.nn.Module]) -> Callable:
    """forward of a question answering head, as in BERT and ALBERT."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return EncoderHeads._find_spans(self, inputs, start_positions, end_positions, kwargs)

    return forward


def labelled_without_types(hf_class: type[torch.nn.Module], compute: Callable) -> Callable:
    """`labelled` as in DistilBERT: no token types, and position_ids last."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        return compute(self, inputs, labels, kwargs)

    return forward


def spans_without_types(hf_class: type[torch.nn.Module]) -> Callable:
    """`spans` as in DistilBERT: no token types, and position_ids last."""

    @public_forward(hf_class.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ):
        inputs = Inputs(input_ids, attention_mask, None, position_ids, inputs_embeds)
        return EncoderHeads._find_spans(self, inputs, start_positions, end_positions, kwargs)

    return forward
