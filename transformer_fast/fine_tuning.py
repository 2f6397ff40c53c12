"""ULMFiT fine-tuning (Howard and Ruder, 2018) for every model: learning rates per layer, and gradual unfreezing."""

import math
import re
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

__all__ = ["GradualUnfreezing", "discriminative_learning_rates", "layer_groups", "slanted_triangular_schedule"]


def layer_groups(model: nn.Module) -> list[list[str]]:
    """The names of a model's parameters in groups, from the input to the output: embeddings, each layer, the head.

    Layers are the members of the outermost ModuleLists of the base model, in order (in an encoder-decoder the encoder's
    first), and the layers of torch's recurrent networks. Other parameters of the base model, such as a final norm or a
    pooler, are grouped with the layer before them. A shared parameter is in the group of its first name.

    Args:
        model: any model of this package or of transformers, with or without a head.

    Returns:
        Lists of names from model.named_parameters(); no list is empty.

    Raises:
        ValueError: if no layers are found.

    Source:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018, section 3.2.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate
        >>> model = transformer_fast.AutoModelForSequenceClassification.from_pretrained(locate())
        >>> groups = transformer_fast.layer_groups(model)
        >>> len(groups), groups[-1]
        (8, ['classifier.weight', 'classifier.bias'])
    """
    base: Any = getattr(model, "base_model", model)
    inside = {id(m) for m in base.modules()} if isinstance(base, nn.Module) else set()
    modules = {name: m for name, m in model.named_modules() if id(m) in inside}
    stacks: dict[str, tuple[str, int]] = {}  # name -> (pattern of a layer's number, layers)
    for name, module in modules.items():
        if "embed" in name or any(name.startswith(f"{known}.") for known in stacks):
            continue
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters()):
            stacks[name] = (rf"{re.escape(name)}\.(\d+)\.", len(module))
        elif isinstance(module, nn.RNNBase):
            stacks[name] = (rf"{re.escape(name)}\.\w+?_l(\d+)(?:_reverse)?$", module.num_layers)
    if not stacks:
        raise ValueError(f"model: found no layers in {type(model).__name__}: no ModuleList and no recurrent network")
    embeddings = {name for name, m in modules.items() if isinstance(m, nn.Embedding) or "embed" in name}
    groups: list[list[str]] = [[] for _ in range(2 + sum(count for _, count in stacks.values()))]
    ours = {id(p) for p in base.parameters()}
    before = 0
    for name, parameter in model.named_parameters():
        if id(parameter) not in ours:
            groups[-1].append(name)
            continue
        first, place = 1, None
        for pattern, count in stacks.values():
            if found := re.match(pattern, name):
                place = first + int(found[1])
            first += count
        if place is None:
            place = 0 if name.rpartition(".")[0] in embeddings else before
        before = place or before
        groups[place].append(name)
    return [group for group in groups if group]


def discriminative_learning_rates(
    model: nn.Module, lr: float, factor: float = 2.6, **options: Any
) -> list[dict[str, Any]]:
    """lr_(l-1) = lr_l / factor: parameter groups for an optimizer, with lower learning rates nearer to the input.

    Further keyword arguments, such as weight_decay, are set in every group.

    Args:
        model: as for layer_groups. All parameters are included, also those that are frozen.
        lr: learning rate of the last group, the head.
        factor: ratio of the rates of consecutive groups; the paper uses 2.6, 1 gives equal rates.

    Returns:
        One dict per group of layer_groups(model), in order, with "params", "lr" and the further options.

    Raises:
        ValueError: if lr or factor is not positive.

    Source:
        Howard and Ruder, 2018, section 3.2, "Discriminative fine-tuning".

    Examples:
        >>> import torch, transformer_fast
        >>> config = transformer_fast.AWDLSTMConfig(vocab_size=50, embedding_size=8, cell_size=16, num_layers=2)
        >>> model = transformer_fast.AWDLSTMForSequenceClassification(config)
        >>> groups = transformer_fast.discriminative_learning_rates(model, lr=0.01)
        >>> [round(group["lr"], 5) for group in torch.optim.Adam(groups).param_groups]
        [0.00057, 0.00148, 0.00385, 0.01]
    """
    for name, value in (("lr", lr), ("factor", factor)):
        if not value > 0:
            raise ValueError(f"{name}: wanted a positive number, got {value!r}")
    groups, named = layer_groups(model), dict(model.named_parameters())
    return [
        {"params": [named[name] for name in names], "lr": lr / factor ** (len(groups) - 1 - i), **options}
        for i, names in enumerate(groups)
    ]


def slanted_triangular_schedule(
    optimizer: torch.optim.Optimizer, steps: int, cut_fraction: float = 0.1, ratio: float = 32
) -> LambdaLR:
    """lr_t = lr * (1 + p * (ratio - 1)) / ratio; p rises from 0 to 1 until cut = steps * cut_fraction, then falls to 0.

    The maximum rate of each parameter group is its own lr. Call step() after each optimizer step.

    Args:
        optimizer: a torch optimizer.
        steps: T, the number of steps of the whole training.
        cut_fraction: fraction of the steps in which the rate rises.
        ratio: ratio of the largest to the smallest rate.

    Returns:
        A torch.optim.lr_scheduler.LambdaLR.

    Raises:
        ValueError: for steps below 1, a cut_fraction outside (0, 1) or a ratio below 1.

    Source:
        Howard and Ruder, 2018, equation 3.

    Examples:
        >>> import torch, transformer_fast
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.32)
        >>> schedule = transformer_fast.slanted_triangular_schedule(optimizer, steps=20)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(round(schedule.get_last_lr()[0], 4))
        ...     optimizer.step(), schedule.step()  # doctest: +ELLIPSIS
        (...
        >>> rates
        [0.01, 0.165, 0.32, 0.3028]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: wanted an integer, at least 1, got {steps!r}")
    if not 0 < cut_fraction < 1:
        raise ValueError(f"cut_fraction: wanted a number in (0, 1), got {cut_fraction!r}")
    if not ratio >= 1:
        raise ValueError(f"ratio: wanted at least 1, got {ratio!r}")
    cut = math.floor(steps * cut_fraction)

    def scale(step: int) -> float:
        if step < cut:
            p = step / cut
        else:  # steps - cut is the paper's cut * (1 / cut_fraction - 1) without the rounding of cut
            p = max(0.0, 1 - (step - cut) / max(1, steps - cut))
        return (1 + p * (ratio - 1)) / ratio

    return LambdaLR(optimizer, scale)


class GradualUnfreezing(TrainerCallback):
    """A callback for transformers' Trainer: the head is trained first, then one more layer per epoch, last layer first.

    After training, all parameters that required a gradient before do so again. The optimizer has all parameters from
    the start; torch's optimizers skip frozen ones, as they have no gradient.

    Args:
        epochs_per_layer: epochs until the next layer is unfrozen.

    Raises:
        ValueError: for epochs_per_layer below 1.

    Source:
        Howard and Ruder, 2018, section 3.3, "Gradual unfreezing".

    Examples:
        >>> import transformer_fast
        >>> callback = transformer_fast.GradualUnfreezing()  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, epochs_per_layer: int = 1):
        if isinstance(epochs_per_layer, bool) or not isinstance(epochs_per_layer, int) or epochs_per_layer < 1:
            raise ValueError(f"epochs_per_layer: wanted an integer, at least 1, got {epochs_per_layer!r}")
        self.epochs_per_layer = epochs_per_layer
        self._groups: list[list[nn.Parameter]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        named: Any = dict(model.named_parameters())
        learning = ([named[n] for n in names if named[n].requires_grad] for names in layer_groups(model))
        self._groups = [group for group in learning if group]
        self._unfreeze(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._unfreeze(state)

    def on_train_end(self, args, state, control, **kwargs):
        for parameter in (p for group in self._groups for p in group):
            parameter.requires_grad_(True)
        self._groups = []

    def _unfreeze(self, state) -> None:
        count = 1 + round(state.epoch or 0) // self.epochs_per_layer
        for i, group in enumerate(self._groups):
            learns = i >= len(self._groups) - count
            for parameter in group:
                parameter.requires_grad_(learns)
                if not learns:
                    parameter.grad = None
