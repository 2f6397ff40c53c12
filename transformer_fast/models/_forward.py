"""The decorator of every model's public forward: `public_forward`."""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from .._transformers import CACHE_NAME, merge_cache_names
from ..layers import BeyondFastPath
from ..layers.unpadding import compute_padding, every_position_computed, padding_is_computed
from ._heads import IGNORE
from ._stock import READ_WHOLE, why_hf_forward

__all__ = ["public_forward"]

PADDING_NOTE = """

        Padding is dropped before the first layer and not computed: at positions where attention_mask is 0 the outputs
        are zeros, except where something reads them (a pooler, a label, logits_to_keep).
        transformer_fast.compute_padding(True) computes them all. A model that was changed (hooks, wrapped or replaced
        modules) runs transformers' own forward; explain() says so.
        """
# Keywords with "cache" in their name that do not hold a cache.
_NO_CACHE = ("use_cache", "cache_position")
# Names of a cache in releases before 5 and in other frameworks: HF's forwards ignore such keywords silently.
_OTHER_NAMES = ("mems", "state", "layer_past", "past", "past_buckets_states")
# Keywords that transformers or our own models pass to forwards without such a parameter.
_COMMON = frozenset(
    ("attention_mask", "encoder_unpadding", "logits_to_keep", "num_items_in_batch", "output_attentions",
     "output_hidden_states", "position_ids", "return_dict", "use_cache", "want")
)  # fmt: skip


def public_forward(original: Callable | None = None) -> Callable[[Callable], Callable]:
    """Decorator of a model's forward: wraps `function` so that it replaces `original`, HF's own forward.

    The result has HF's documentation and signature (plus the parameters that only ours has), because generate and
    Trainer inspect them. The cache is accepted under every name that a supported release of transformers uses, and is
    passed to `function` as past_key_values. original: None for models that HF does not have; the result then has the
    documentation of `function`.

    The result raises ValueError where two names hold different caches, and TypeError for a cache under an unknown name
    or in a model without one: otherwise it would be ignored. Where a model is not stock (see _stock) `original` runs.
    """

    def decorate(function: Callable) -> Callable:
        own = inspect.signature(function)
        takes_cache = "past_key_values" in own.parameters
        known = _COMMON.union(own.parameters)
        signature = _signature(original, own)
        order, ours = (_positions(s) for s in (signature, own))
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(order, ours)))

        @functools.wraps(original or function)
        def forward(self, *args, **kwargs):
            called_by_user = original is not None and kwargs.get("want") is None
            if called_by_user and READ_WHOLE in self.__dict__ and not padding_is_computed():
                with compute_padding(True) if torch.compiler.is_compiling() else every_position_computed():
                    return forward(self, *args, **kwargs)
            if called_by_user and (reason := why_hf_forward(self)):
                return _run_hf(self, original, reason, order, args, kwargs)
            given, named = args, kwargs
            if len(args) > alike:  # HF's order of parameters differs: pass them by name
                named = _named(order[alike:], args[alike:], kwargs, function.__qualname__)
                given = args[:alike]
            for name in named:
                if name not in known:
                    named = _with_one_cache(self, named, takes_cache)
                    break
            if torch.compiler.is_compiling() or not called_by_user:
                return function(self, *given, **named)
            try:
                return function(self, *given, **named)
            except BeyondFastPath as error:
                refused = error
            try:
                return _run_hf(self, original, str(refused), order, args, kwargs, blind=True)
            except Exception:
                if isinstance(refused, ValueError):  # wrong for HF too, whose message names less
                    raise refused from None
                raise

        # A code object per model: torch.compile counts recompilations per code object and would add all models up.
        forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
        forward.__signature__ = signature  # type: ignore[attr-defined]
        if original is not None:
            forward.__doc__ = (original.__doc__ or "").rstrip() + PADDING_NOTE
        return forward

    return decorate


def _signature(original: Callable | None, own: inspect.Signature) -> inspect.Signature:
    """HF's signature plus the parameters that only ours has; the cache under this release's name."""
    ours = {}
    for p in own.parameters.values():
        name = CACHE_NAME if p.name == "past_key_values" else p.name
        ours[name] = p.replace(name=name)
    if original is None:
        return own.replace(parameters=list(ours.values()))
    theirs = dict(inspect.signature(original).parameters)
    rest = [p for p in theirs.values() if p.kind is p.VAR_KEYWORD] or [
        p for p in ours.values() if p.kind is p.VAR_KEYWORD
    ]
    named = [p for p in theirs.values() if p.kind is not p.VAR_KEYWORD]
    extra = [p for name, p in ours.items() if name not in theirs and p.kind is not p.VAR_KEYWORD]
    return own.replace(parameters=[*named, *extra, *rest])


def _positions(signature: inspect.Signature) -> list[str]:
    """The names of the positional parameters after self; the cache as past_key_values."""
    named = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return ["past_key_values" if name == CACHE_NAME else name for name in named[1:]]


def _named(names: list[str], values: tuple, arguments: dict, where: str) -> dict:
    if len(values) > len(names):
        raise TypeError(f"{where}: {len(values) - len(names)} positional arguments too many")
    found = dict(zip(names, values))
    if twice := found.keys() & arguments.keys():
        raise TypeError(f"{where}: got multiple values for argument {min(twice)!r}")
    return found | arguments


def _with_one_cache(model: Any, arguments: dict, takes_cache: bool) -> dict:
    """The keywords of a call, with the cache renamed to past_key_values."""
    where = f"{type(model).__name__}.forward"
    arguments = merge_cache_names(arguments, "past_key_values", where)
    for name, value in arguments.items():
        if value is None or name in _NO_CACHE or name == "past_key_values":
            continue
        if "cache" in name or name.startswith("past_") or name in _OTHER_NAMES:
            raise TypeError(f"{name}: {where} knows no such argument; a cache is wanted as {CACHE_NAME}")
    if takes_cache:
        return arguments
    cache = arguments.get("past_key_values")
    if cache is None:
        return {k: v for k, v in arguments.items() if k != "past_key_values"}
    if not _hands_on(model):
        raise TypeError(f"past_key_values: {where} keeps no cache; wanted None, got {type(cache).__name__}")
    return arguments


def _run_hf(
    model: Any, original: Any, reason: str, order: list[str], args: tuple, arguments: dict, blind: bool = False
):
    """HF's own forward. blind: a position that is read may attend to no key."""
    where = f"{type(model).__name__}.forward"
    arguments = merge_cache_names(arguments, CACHE_NAME, where)
    if CACHE_NAME not in inspect.signature(original).parameters and arguments.pop(CACHE_NAME, None) is not None:
        raise TypeError(f"{CACHE_NAME}: {where} is transformers' own, which keeps no cache, as {reason}")
    arguments = {k: v for k, v in arguments.items() if k != "want"}
    given = dict(zip(order, args)) | arguments
    if not (blind or _reads_padding(given)):
        return original(model, *args, **arguments)
    with compute_padding(True) if torch.compiler.is_compiling() else every_position_computed():
        return original(model, *args, **arguments)


def _reads_padding(given: dict) -> bool:
    """Whether HF's forward of a head, whose base may be on the fast path, reads padding for its result: a softmax over
    all positions, a labelled one, or the first one."""
    named = [given.get(f"{of}attention_mask") for of in ("", "decoder_")]
    masks: list[torch.Tensor] = [m for m in named if isinstance(m, torch.Tensor) and m.dim() == 2 and m.numel()]
    if not masks:
        return False
    spans, labels = [given.get(name) for name in ("start_positions", "end_positions")], given.get("labels")
    if any(s is not None for s in spans) or torch.compiler.is_compiling() or not all(map(ops.concrete, masks)):
        return True
    if any(bool((m[:, 0] == 0).any()) for m in masks):
        return True
    if not isinstance(labels, torch.Tensor):
        return False
    alike = [m for m in masks if m.shape == labels.shape]
    return any(bool(((labels.to(m.device) != IGNORE) & (m == 0)).any()) for m in alike)


def _hands_on(model: Any) -> bool:
    """Whether a model's base takes a cache, which HF's heads pass to it among their other keywords."""
    base = getattr(model, "base_model", model)
    return base is not model and CACHE_NAME in inspect.signature(base.forward).parameters
