"""Detects whether a tree of modules is still as its constructor made it. Only then may the fast path replace it.

`remember` records the classes and settings of a new tree. `why_changed` names the first module that has since been
replaced, wrapped, subclassed, hooked, parametrised or given its own methods. A tree that has not changed since the last
call is recognised by comparing lists, in C: tens of microseconds for a BERT with 228 modules.
"""

import sys
import types
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

__all__ = [
    "allow_called",
    "allow_hook",
    "allow_leaf",
    "as_forward_of",
    "before_fsdp",
    "forget",
    "hooks_on",
    "is_shard",
    "is_sharded",
    "methods_over",
    "own_methods",
    "remember",
    "why_changed",
    "why_unlike",
    "wrapped_part",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes that may change: they are read in every call, or have no effect.
_LIVE = {"training", "gradient_checkpointing", "layer_idx", "chunk_size_feed_forward", "max_seq_len_cached",
         "attention_scaling"}  # fmt: skip
_SETTINGS = (bool, int, float, str, types.FunctionType, types.BuiltinFunctionType)
# Of embeddings: max_norm writes to the rows that are looked up, and scale_grad_by_freq counts the look-ups.
_SETTINGS_OF_EMBEDDINGS = ("max_norm", "scale_grad_by_freq")
_PLAIN = {nn.Parameter, torch.Tensor, types.NoneType}
_NOTE, _LAST = "_made_of", "_last_call"


class _Made(NamedTuple):
    """A module as its constructor made it: class, (name, value) of its settings, children by name, and the names of the
    attributes that are None, as its forward may test those."""

    kind: type
    settings: tuple[tuple[str, Any], ...]
    children: tuple[tuple[str, "_Made"], ...]
    absent: tuple[str, ...]


# ---- changes by others that are harmless -------------------------------------------------------------
_harmless_hooks: list[Callable[[Any], bool]] = []
_row_wise_leaves: list[Callable[[nn.Module, type], bool]] = []
_called: list[Callable[[nn.Module, type, str], bool]] = []


def allow_hook(test: Callable[[Any], bool]) -> None:
    """Register test(hook), which returns True for a forward hook that does nothing at present."""
    _harmless_hooks.append(test)


def allow_leaf(test: Callable[[nn.Module, type], bool]) -> None:
    """Register test(module, kind), which returns True for a module that replaces a `kind` and treats rows
    independently, so that it may be called on unpadded rows."""
    _row_wise_leaves.append(test)


def allow_called(test: Callable[[nn.Module, type, str], bool]) -> None:
    """Register test(module, kind, name), which returns True for a module of class `kind` (or FSDP2's subclass of it)
    that the fast path calls as a module and reads in no other way. FSDP2 and checkpointing then work around its
    forward."""
    _called.append(test)


# ---- torch's own wrappers ----------------------------------------------------------------------------
_WRAPPERS = {
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", name)
    for name in ("CheckpointWrapper", "OffloadWrapper")
}


def before_fsdp(kind: type) -> type | None:
    """The class from which FSDP2's fully_shard derived `kind`; None if fully_shard did not make `kind`."""
    base = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    made_by_torch = base is not None and len(kind.__bases__) == 2 and issubclass(kind.__bases__[0], base)
    return kind.__bases__[1] if made_by_torch else None


def is_sharded(module: nn.Module) -> bool:
    """True for a module whose parameters FSDP2 gathers before its forward."""
    return before_fsdp(type(module)) is not None


def _is_fsdp_hook(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")


def is_shard(parameter: Any) -> bool:
    """True for a parameter that FSDP2 has sharded: a DTensor sharded in the last dimension of its mesh and replicated
    in those before it (HSDP). False for shards of tensor parallelism, which are never gathered."""
    placements = getattr(parameter, "placements", None)
    if not placements or not hasattr(parameter, "device_mesh"):
        return False
    return placements[-1].is_shard() and all(p.is_replicate() for p in placements[:-1])


def as_forward_of(module: Any, run: Callable[[], Any]) -> Any:
    """Return run(), which reads the parameters of `module`. If FSDP2 has sharded the module, run() is called as its
    forward, before which FSDP2 gathers the parameters."""
    if torch.compiler.is_compiling() or not is_sharded(module):
        return run()
    module.forward = run
    try:
        return module()
    finally:
        del module.forward


def _is_called(module: nn.Module, kind: type, path: str) -> bool:
    return any(test(module, kind, path.rpartition(".")[2]) for test in _called)


def _inside(module: Any, kind: type) -> nn.Module | None:
    """The module inside torch's wrapper for activation checkpointing or offloading; None for any other module."""
    return module._checkpoint_wrapped_module if (kind.__module__, kind.__name__) in _WRAPPERS else None


def wrapped_part(root: nn.Module) -> str:
    """A description of the first submodule that FSDP2 has sharded or torch's checkpointing has wrapped; '' if none."""
    for path, module in root.named_modules():
        kind, where = type(module), path or type(root).__name__
        if is_sharded(module):
            return f"{where} is sharded by FSDP2"
        if _inside(module, kind) is not None:
            return f"{where} is wrapped in a {kind.__name__}"
    return ""


# ---- recording ---------------------------------------------------------------------------------------
def remember(root: nn.Module, like: nn.Module | None = None) -> None:
    """Record the tree of `root`, just after its constructor, in an attribute that copies and pickles keep.

    like: a fresh module of the same kind to record instead, if `root` itself has been changed; see why_unlike.
    """
    root.__dict__[_NOTE], root.__dict__[_LAST] = _made(root if like is None else like, {}), _LastCall()


def forget(root: nn.Module) -> None:
    """Undo `remember`."""
    root.__dict__.pop(_NOTE, None)
    root.__dict__.pop(_LAST, None)


def why_unlike(root: nn.Module, like: nn.Module) -> str:
    """'' if everything below `root` is as in `like` and unmodified, else the reason."""
    return _compare(root, _made(like, {}), "", ())


def _made(module: nn.Module, seen: dict) -> _Made:
    children = tuple((name, _made(child, seen)) for name, child in module._modules.items() if child is not None)
    absent = tuple(name for name, value in module.__dict__.items() if value is None)
    found = _Made(type(module), tuple(_settings(module).items()), children, absent)
    return seen.setdefault(found, found)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The constructor settings of a module without weights: head counts, scales, is_causal, the kind of gelu. Modules
    with weights have none, as the fast path reads their attributes (eps, offsets) live, as it does dropout
    probabilities; embeddings have those that act on the whole batch."""
    if isinstance(module, nn.Embedding):
        return {name: module.__dict__.get(name) for name in _SETTINGS_OF_EMBEDDINGS}
    if any(p is not None for p in module._parameters.values()) or hasattr(module, "base_model_prefix"):
        return {}
    return {
        name: value
        for name, value in module.__dict__.items()
        if type(value) in _SETTINGS and name[0] != "_" and name not in _LIVE and "drop" not in name
    } if not isinstance(module, nn.modules.dropout._DropoutNd) else {}  # fmt: skip


# ---- the comparison ----------------------------------------------------------------------------------
class _Seen(NamedTuple):
    """A tree at the last call: everything that a change would affect, in lists that compare by identity, and the
    answer.

    dicts: the __dict__ of each module below the root. The root's own is left out, because it refers to this object, and
    with a cycle the weights of a deleted model would wait for the garbage collector. readers: functions that read the
    settings, each with the index of its module, 0 for the root.
    """

    dicts: list[dict]
    kinds: list[type]
    hooks: list[int]
    tensors: list[type]
    children: list[Any]
    sizes: list[int]
    settings: list[tuple]
    readers: list[tuple[int, Callable]]
    answer: str


class _LastCall:
    """Holds the _Seen of a tree. Copies and pickles start empty, because it refers to these very modules."""

    seen: _Seen | None = None

    def __deepcopy__(self, memo):
        return _LastCall()

    def __reduce__(self):
        return _LastCall, ()


_hooks_of, _modules, _parameters = itemgetter(*_HOOKS), itemgetter("_modules"), itemgetter("_parameters")


def why_changed(root: nn.Module, harmless: Collection[str] = (), gathered: bool = False) -> str:
    """'' if everything below `root` is as `remember` recorded it and unmodified, else the reason.

    Hooks, class and forward of `root` itself are not checked, because its forward is already running. harmless: names
    of its methods that an instance may replace. gathered: FSDP2 gathers its sharded parameters before its forward.
    """
    for name in _HOOKS:
        if getattr(torch_module, "_global" + name):
            return f"there are hooks on all modules ({'_global' + name})"
    if gathered:
        return _compare(root, root.__dict__.get(_NOTE), "", harmless, True)
    last = root.__dict__.setdefault(_LAST, _LastCall())
    if last.seen is not None and _is_as(root, last.seen):
        return last.seen.answer
    answer = _compare(root, root.__dict__.get(_NOTE), "", harmless)
    last.seen = _look(root, answer)
    return answer


def _hook_keys(dicts: list[dict]) -> list[int]:
    """The keys of all hooks. torch never reuses a key."""
    if not any(chain.from_iterable(map(_hooks_of, dicts))):
        return []
    return list(chain.from_iterable(chain.from_iterable(map(_hooks_of, dicts))))


def _is_as(root: nn.Module, last: _Seen) -> bool:
    dicts = [root.__dict__, *last.dicts]
    return (
        list(map(len, dicts)) == last.sizes
        and list(chain.from_iterable(map(dict.values, map(_modules, dicts)))) == last.children
        and list(map(type, last.children)) == last.kinds
        and _hook_keys(dicts) == last.hooks
        and list(map(type, chain.from_iterable(map(dict.values, map(_parameters, dicts))))) == last.tensors
        and [read(dicts[place]) for place, read in last.readers] == last.settings
    )


def _look(root: nn.Module, answer: str) -> _Seen:
    modules = list(root.modules())
    dicts = [m.__dict__ for m in modules]
    children = list(chain.from_iterable(d["_modules"].values() for d in dicts))
    told = [(place, names) for place, m in enumerate(modules) if (names := list(_settings(m)))]
    readers: list[tuple[int, Callable]] = [(place, itemgetter(*names)) for place, names in told]
    return _Seen(
        dicts[1:], list(map(type, children)), _hook_keys(dicts),
        [type(p) for d in dicts for p in d["_parameters"].values()], children, list(map(len, dicts)),
        [read(dicts[place]) for place, read in readers], readers, answer,
    )  # fmt: skip


def _compare(
    module: nn.Module, made: _Made | None, path: str, harmless: Collection[str], gathered: bool = False
) -> str:
    """The first difference between `module` and `made`, or ''. gathered: the module is inside one that FSDP2 has
    sharded and that the fast path calls."""
    if made is None:
        return f"{path or type(module).__name__} was not made by a constructor of this package"
    before = before_fsdp(type(module))
    if path:
        kind = before or type(module)
        inner = _inside(module, kind)
        if kind is not made.kind and (inner is None or not _is_called(inner, made.kind, path)):
            if any(test(module, made.kind) for test in _row_wise_leaves):
                return ""
            return f"{path} is a {_name(type(module))} in place of a {made.kind.__name__}"
        if before is not None and not _is_called(inner or module, made.kind, path):
            return f"{path} is sharded by FSDP2 on its own, and the fast path does not call it"
        if hooks := hooks_on(module, before is not None):
            return f"{path} has {hooks}"
        harmless = ()
    gathered = gathered or before is not None
    if methods := own_methods(module, harmless, root=not path):
        return f"{path or type(module).__name__} has a {methods[0]} of its own"
    if path and inner is not None:
        return _compare(inner, made, path, (), gathered)
    for name, parameter in module._parameters.items():
        if type(parameter) not in _PLAIN and not (gathered and is_shard(parameter)):
            return f"{path}.{name}".lstrip(".") + f" is a {_name(type(parameter))}"
    if made.settings:
        now = _settings(module)
        for name, value in made.settings:
            if name not in now or now[name] != value:
                return f"{path}.{name} is {getattr(module, name, 'gone')!r}, but was created as {value!r}"
    return _compare_children(module, made, path, gathered)


def _compare_children(module: nn.Module, made: _Made, path: str, gathered: bool) -> str:
    prefix = f"{path}." if path else ""
    if isinstance(module, nn.ModuleList) and made.children:
        # Layers may be removed, added or moved, as long as each is as made for its place.
        plans = [plan for _, plan in made.children]
        for i, layer in enumerate(module):
            if reason := _compare(layer, plans[min(i, len(plans) - 1)], f"{prefix}{i}", (), gathered):
                return reason
        return ""
    wanted = dict(made.children)
    for name, child in module._modules.items():
        if child is None:
            continue
        if name not in wanted:
            if not path and type(module) is not made.kind and name not in made.absent:
                continue  # added by a subclass: the inherited forward does not use it
            return f"{prefix}{name} was added"
        if reason := _compare(child, wanted.pop(name), prefix + name, (), gathered):
            return reason
    wanted = {name: plan for name, plan in wanted.items() if module._modules.get(name) is None}
    return f"{prefix}{next(iter(wanted))} is gone" if wanted else ""


def hooks_on(module: nn.Module, sharded: bool = False) -> str:
    """A description of the hooks of a module; '' if none of them does anything. sharded: ignore FSDP2's hooks."""
    for name in _HOOKS:
        hooks: Mapping = module.__dict__[name]
        found = (hook for hook in hooks.values() if not (sharded and _is_fsdp_hook(hook)))
        if any(not any(test(hook) for test in _harmless_hooks) for hook in found):
            return f"a {name[1:-1].replace('_', ' ')}"
    return ""


def own_methods(module: nn.Module, harmless: Collection[str] = (), root: bool = False) -> list[str]:
    """The methods of its class that this instance has replaced, without those that move or save it."""
    kind, found = type(module), []
    for name, value in module.__dict__.items():
        if not callable(value) or name in harmless or not hasattr(kind, name) or isinstance(value, type):
            continue
        calls = name in ("forward", "_compiled_call_impl", "_call_impl", "_wrapped_call_impl")
        if root if calls else hasattr(nn.Module, name):
            continue
        found.append(name)
    return found


def methods_over(kind: type, base: type, names: Collection[str]) -> list[str]:
    """Those of `names` that `kind`, or a class between it and `base`, overrides."""
    between = kind.__mro__[: kind.__mro__.index(base)]
    return [name for cls in between for name in vars(cls) if name in names]


def _name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]} {kind.__name__}"
