"""Calls that have been made before.

A call takes a few microseconds on a GPU, less than its checks and the choice of its backend. So the ops remember each
kind of call by a signature of all that those depend on (ops/_common.signature), with a function that makes the call.
"""

from collections.abc import Callable

__all__ = ["find", "forget", "remember"]

_calls: dict[tuple, Callable] = {}
_MOST = 4096
find = _calls.get


def remember(signature: tuple, call: Callable) -> None:
    if len(_calls) >= _MOST:
        _calls.pop(next(iter(_calls)), None)
    _calls[signature] = call


def forget() -> None:
    """Forget all calls: what decides about them has changed."""
    _calls.clear()
