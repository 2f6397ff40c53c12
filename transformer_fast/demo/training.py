"""The training loop of the examples, in one process or, under torchrun, in several.

    torchrun --nproc-per-node 8 examples/text_generation.py --fsdp --save-every 50
    torchrun --nproc-per-node 8 examples/text_generation.py --fsdp --save-every 50 --resume

It uses torch's DistributedDataParallel, FSDP2 (fully_shard) and torch.distributed.checkpoint.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

__all__ = ["Training", "add_training_arguments", "processes", "world_size"]

IGNORE = -100
_PROGRESS, _KEPT = "progress.json", 2


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many processes, little memory, long runs (start them with torchrun)")
    group.add_argument("--fsdp", action="store_true", help="share parameters, gradients and optimizer states (FSDP2)")
    group.add_argument("--accumulate", type=int, default=1, help="micro-batches per step and process")
    group.add_argument("--checkpointing", action="store_true", help="recompute layers in backward")
    group.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="0: save nothing on the way")
    group.add_argument("--resume", action="store_true", help="continue from what --save-every saved in --output")


def world_size() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Context manager: the process group of torchrun's processes, which several successive trainings can use."""
    started = world_size() > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        if started:
            _let_go()
    finally:
        if started:
            dist.destroy_process_group()


def _let_go() -> None:
    """Wait until all processes are here and gloo's threads have freed the tensors of their collectives.

    For that they need Python's lock. The destructor of a process group waits for the threads with the lock held, and
    Python's exit aborts a thread that asks for the lock."""
    if dist.get_backend() != "gloo":
        return
    last = torch.zeros(1)
    dist.all_reduce(last)
    freed = weakref.ref(last)
    del last
    end = time.monotonic() + 10
    time.sleep(0.05)
    while freed() is not None and time.monotonic() < end:
        time.sleep(0.01)


class Training:
    """A model in training. Every process makes the same batches; `step` computes this process's rows of them.

    Losses are means over all labels of a batch, so the result does not depend on the number of processes and
    micro-batches.

    Args:
        model: a model of this package; it is moved, wrapped and, with --fsdp, sharded.
        arguments: those of add_training_arguments, and `output`, a folder.
        optimizer: a function from parameters to an optimizer.
        schedule: a function from the optimizer to a schedule; None: a constant learning rate.
        clip: the largest gradient norm; None: no clipping.
        seed: for dropout, which differs between processes.
        name: the folder for what --save-every saves, below arguments.output. Successive trainings share its parent
            folder: with --resume a training that had saved nothing starts anew if another had saved something.
        partly: whether some parameters may be frozen during training.
    """

    def __init__(
        self,
        model: Any,
        arguments: argparse.Namespace,
        optimizer: Callable,
        schedule: Callable | None = None,
        *,
        clip: float | None = None,
        seed: int = 0,
        name: str = "checkpoints",
        partly: bool = False,
    ):
        if arguments.accumulate < 1:
            raise ValueError(f"--accumulate: wanted at least 1, got {arguments.accumulate}")
        self._arguments, self._clip, self._partly = arguments, clip, partly
        self._started = world_size() > 1 and not dist.is_initialized()
        if self._started:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.main = self.rank == 0
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else (
            torch.device("cpu")
        )  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.manual_seed(seed + self.rank)
        self.module = model.to(self.device)
        if arguments.checkpointing:
            model.gradient_checkpointing_enable()
        self.model = self._wrapped(model)
        self.optimizer = optimizer(model.parameters())
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self._folder = pathlib.Path(arguments.output) / name
        self._at, self._done = -1, 0
        self._kept: dict[str, torch.Tensor] = {}
        self._averaged = 0
        self.losses: list[float] = []
        self.checked: dict[int, float] = {}
        if arguments.resume:
            self._resume()

    def _wrapped(self, model: Any) -> nn.Module:
        if self._arguments.fsdp:
            if not dist.is_initialized():
                raise ValueError("--fsdp: wanted several processes, so start it with torchrun --nproc-per-node N")
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            from ..models._layer import Layer

            mesh = init_device_mesh(self.device.type, (self.size,))
            layers: list[Any] = [module for module in model.modules() if isinstance(module, Layer)]
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        if self.size > 1:
            return nn.parallel.DistributedDataParallel(model, find_unused_parameters=self._partly)
        return model

    # ---- steps -------------------------------------------------------------------------------------
    def steps(self, count: int, text: str, unit: str = "step") -> Iterator[tuple[int, tqdm]]:
        """Yield (step, progress bar). A resumed run also yields the steps before the checkpoint, so that the same data
        are drawn; `step` and `check` return the recorded results for them."""
        with tqdm(range(count), desc=text, unit=unit, disable=not self.main) as bar:
            for self._at in bar:
                yield self._at, bar

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Train on a batch, the same in all processes. Returns its loss, the mean over its labels."""
        if self._at < self._done:
            return self.losses[self._at]
        total, loss = self._labelled(batch), torch.zeros((), device=self.device)
        self.model.train()
        parts = self._arguments.accumulate
        for part in range(parts):
            own = {name: t[self.rank :: self.size][part::parts] for name, t in batch.items()}
            count = self._labelled(own)
            if not len(own["input_ids"]):  # compute one row with weight 0, so that the collectives match
                own = {name: t[:1] for name, t in batch.items()}
            own = {name: t.to(self.device) for name, t in own.items()}
            with self._together(part + 1 == parts):
                mean = self.model(**own).loss
                share = mean * (count / total) if count else mean.nan_to_num() * 0.0
                (share * self.size).backward()  # gradients are averaged over processes
            loss += share.detach()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        if self.size > 1:
            dist.all_reduce(loss)
        self.losses.append(loss.item())
        return self.losses[-1]

    @staticmethod
    def _labelled(batch: dict[str, torch.Tensor]) -> int:
        labels = batch["labels"] if "labels" in batch else batch["start_positions"]
        return int((labels != IGNORE).sum())

    def _together(self, last: bool) -> contextlib.AbstractContextManager:
        """Sum gradients over processes with the last micro-batch only."""
        model: Any = self.model
        if self._arguments.fsdp:
            model.set_requires_gradient_sync(last)
        elif self.size > 1 and not last:
            return model.no_sync()
        return contextlib.nullcontext()

    def check(self, measure: Callable[[], float]) -> float:
        """measure() after the current step, in all processes. The result is recorded under the number of steps."""
        steps = self._at + 1
        if steps not in self.checked:
            self.checked[steps] = measure()
        return self.checked[steps]

    def keep(self, average: bool = False) -> None:
        """Keep a copy of the current weights, in place of the previous copy, or averaged with it."""
        if self._at < self._done:
            return
        now = self.module.state_dict()
        if not average or not self._kept:
            self._kept, self._averaged = {name: t.detach().clone() for name, t in now.items()}, 1
            return
        self._averaged += 1
        for name, t in now.items():
            if t.is_floating_point():
                self._kept[name] += (t.detach() - self._kept[name]) / self._averaged

    def use_kept(self) -> None:
        self.module.load_state_dict(self._kept)

    def save_if_due(self) -> None:
        """At the end of a step: write a checkpoint for --resume, if --save-every says so."""
        every = self._arguments.save_every
        if every and self._at >= self._done and (self._at + 1) % every == 0:
            self._save()

    # ---- checkpoints -------------------------------------------------------------------------------
    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.module, self.optimizer)
        found = {"model": model, "optimizer": optimizer, f"random {self.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            found[f"cuda random {self.rank}"] = torch.cuda.get_rng_state()
        if self._kept:
            found["kept"] = self._kept
        return found

    def _save(self) -> None:
        from torch.distributed import checkpoint

        steps = len(self.losses)
        folder, unfinished = self._folder / f"{steps:08d}", self._folder / "unfinished"
        if self.main:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._barrier()
        checkpoint.save(self._state(), checkpoint_id=unfinished, no_dist=self.size == 1)
        self._barrier()
        if self.main:  # if the process is killed here, the previous checkpoint is whole
            progress = {
                "losses": self.losses, "checked": list(self.checked.items()), "processes": self.size,
                "averaged": self._averaged, "schedule": self.schedule and self.schedule.state_dict(),
                "frozen": [name for name, p in self.module.named_parameters() if not p.requires_grad],
            }  # fmt: skip
            (unfinished / _PROGRESS).write_text(json.dumps(progress))
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
            for old in self._saved()[:-_KEPT]:
                shutil.rmtree(old)
        self._barrier()

    def _saved(self) -> list[pathlib.Path]:
        return sorted(path.parent for path in self._folder.glob(f"[0-9]*/{_PROGRESS}"))

    def _resume(self) -> None:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict import set_state_dict

        saved = self._saved()
        if not saved and any(self._folder.parent.glob(f"*/[0-9]*/{_PROGRESS}")):
            return
        if not saved:
            raise FileNotFoundError(f"--resume: wanted what --save-every saved in {self._folder}, got nothing there")
        progress = json.loads((saved[-1] / _PROGRESS).read_text())
        self._averaged = progress["averaged"]
        if self._averaged:
            self._kept = {name: t.detach().clone() for name, t in self.module.state_dict().items()}
        frozen = [p for name, p in self.module.named_parameters() if p.requires_grad and name in progress["frozen"]]
        for parameter in frozen:  # the optimizer has no state for them yet
            parameter.requires_grad_(False)
        state = self._state()
        if progress["processes"] != self.size:  # the saved random states belong to other processes
            state = {name: value for name, value in state.items() if "random" not in name}
        checkpoint.load(state, checkpoint_id=saved[-1], no_dist=self.size == 1)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        for parameter in frozen:
            parameter.requires_grad_(True)
        if self.schedule is not None:
            self.schedule.load_state_dict(progress["schedule"])
        if f"random {self.rank}" in state:
            torch.set_rng_state(state[f"random {self.rank}"])
        if f"cuda random {self.rank}" in state:
            torch.cuda.set_rng_state(state[f"cuda random {self.rank}"])
        self.losses, self.checked = progress["losses"], dict(progress["checked"])
        self._done = len(self.losses)
        if self.main:
            print(f"continues after step {self._done}, from {saved[-1]}")

    def _barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    # ---- the end -----------------------------------------------------------------------------------
    def finish(self, folder: pathlib.Path | None = None) -> bool:
        """Save the model in `folder` and end the distributed run. Returns True in the one process that may continue."""
        if folder is not None:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            weights = None
            if self._arguments.fsdp:
                whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
                weights = get_model_state_dict(self.module, options=whole)
            if self.main:
                self.module.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
            self._barrier()
        if self._started:
            _let_go()
            dist.destroy_process_group()
        return self.main
