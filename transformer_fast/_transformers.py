"""Hugging Face transformers' names that differ between its releases, or that it does not promise, in one place."""

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import output_capturing

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "cached",
    "collects_outputs",
    "is_capturing_hook",
    "merge_cache_names",
    "register_outputs",
]

# What a release has called the key-value cache, in forward, generate and outputs.
CACHE_NAMES = ("past_key_values", "cache", "cache_params")
# The name in the release that is installed: `cache` since 5.24.
CACHE_NAME = next(name for name in CACHE_NAMES[1::-1] if name in BaseModelOutputWithPast.__dataclass_fields__)


def cached(cache: Any) -> dict[str, Any]:
    """The field of an output, or the argument of a function of transformers, that holds the cache."""
    return {CACHE_NAME: cache}


def merge_cache_names(arguments: dict, name: str, where: str) -> dict:
    """`arguments` with the cache under `name`, whichever of CACHE_NAMES it came under.

    Raises ValueError where two of them hold different caches.
    """
    given = {k: arguments[k] for k in CACHE_NAMES if k in arguments}
    if not given:
        return arguments
    caches = {k: v for k, v in given.items() if v is not None}
    first = next(iter(caches.values()), None)
    if any(v is not first for v in caches.values()):
        raise ValueError(f"{', '.join(caches)}: are names of one argument of {where}; wanted one cache, got different")
    return {**{k: v for k, v in arguments.items() if k not in given}, name: first}


def collects_outputs() -> bool:
    """True inside a forward of transformers that collects hidden states or attentions by hooks on its layers."""
    return bool(output_capturing._active_collector.get())


def register_outputs(model: Any) -> None:
    """Tell transformers which layers' outputs a model of this class can return: it asks by the name of the class."""
    output_capturing._CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def is_capturing_hook(hook: Any) -> bool:
    """True for the hooks that transformers leaves on layers to collect their outputs; they listen on request alone."""
    return (
        getattr(hook, "__module__", "") == output_capturing.__name__
        and getattr(hook, "__name__", "") == "output_capturing_hook"
    )
