"""Makes the classes of a decoder family from HF's: HF's names and parameters, this package's computation."""

import inspect
from types import ModuleType
from typing import Any

from ..layers import SlotTable
from ._base import Adopted
from ._decoder import CausalLM, DecoderBase, Heads, base_forward, causal_forward, head_forward
from ._layer import AttentionModule, Layer

__all__ = ["classes_of"]


def classes_of(
    hf: ModuleType, prefix: str, module: str, slots: dict[str, str], *, base: type = DecoderBase, body: str = "Model",
    layer: str = "DecoderLayer", attention: type | None = AttentionModule, norm: type | None = None,
    heads: type = Heads, causal: type = CausalLM, adopted: Adopted | None = None,
) -> dict[str, type]:  # fmt: skip
    """{name: class} of the layers and of every head that HF has.

    Args:
        hf: HF's module of the family.
        prefix: the first part of its class names, such as "Llama".
        module: the name of our module, by which the classes are pickled.
        slots: the arguments of SlotTable.
        base: mixin for HF's base model class, prefix + body.
        body: the rest of the name of HF's base model class.
        layer: the rest of the name of HF's layer class.
        attention: mixin for HF's attention class; None where that does not use HF's attention interface.
        norm: mixin for HF's RMS norm class, if it has one.
        heads, causal: mixins for all heads, and for the language modelling head in addition.
        adopted: the table of the family's other classes, if it has some.
    """
    adopted, table = adopted or Adopted(), SlotTable(**slots)

    def make(name: str, *bases: Any, **members: Any) -> type:
        theirs: Any = getattr(hf, prefix + name)
        shared = {"__module__": module, "__doc__": theirs.__doc__}
        return type(prefix + name, (*bases, theirs), shared | members)

    def head(name: str, compute: Any, **options: Any) -> type:
        theirs = getattr(hf, prefix + name)
        scores = "loss_function" in inspect.unwrap(theirs.forward).__code__.co_names
        forward = head_forward(theirs, compute, **options)
        return make(name, heads, _adopted=adopted, forward=forward, calls_loss_function=scores)

    forward: Any = base_forward(getattr(hf, prefix + body))
    parts = [make(layer, Layer, _table=table), make(body, base, _adopted=adopted, _slots=table, forward=forward)]
    if attention is not None:
        parts.append(make("Attention", attention))
    if norm is not None:
        parts.append(make("RMSNorm", norm, is_rms_norm=True))
    for kind in parts:
        adopted.register(kind)
    forward = causal_forward(getattr(hf, f"{prefix}ForCausalLM"))
    made = [
        make("ForCausalLM", causal, heads, _adopted=adopted, forward=forward),
        head("ForSequenceClassification", Heads._classify),
    ]
    if hasattr(hf, f"{prefix}ForTokenClassification"):
        made.append(head("ForTokenClassification", Heads._classify_tokens))
    if hasattr(hf, f"{prefix}ForQuestionAnswering"):
        made.append(head("ForQuestionAnswering", Heads._find_spans, spans=True))
    return {kind.__name__: kind for kind in [*parts, *made]}
