"""All cases of a device, and their selection by name."""

import fnmatch

from .case import Case
from .generation_cases import generation_cases
from .int8_cases import int8_cases
from .model_cases import model_cases
from .op_cases import op_cases
from .packed_cases import packed_cases
from .sentence_cases import sentence_cases
from .sequence_cases import sequence_cases

__all__ = ["all_cases", "find", "select"]


def all_cases(device: str = "cpu") -> list[Case]:
    return [
        *op_cases(device), *model_cases(device), *int8_cases(device), *generation_cases(device),
        *packed_cases(device), *sequence_cases(device), *sentence_cases(device),
    ]  # fmt: skip


def select(cases: list[Case], pattern: str | None) -> list[Case]:
    """Cases whose name matches one of the comma-separated patterns, in the order of the patterns: part of the name, or
    a pattern with * and ?."""
    if not pattern:
        return cases
    patterns = [p if any(c in p for c in "*?[") else f"*{p}*" for p in pattern.split(",")]
    found = {id(case): case for p in patterns for case in cases if fnmatch.fnmatch(case.name, p)}
    return list(found.values())


def find(name: str, device: str = "cpu") -> Case:
    return next(case for case in all_cases(device) if case.name == name)


def memory_work(name: str, candidate: str, device: str = "cpu", threads: int | None = None):
    """One candidate of one case, in the steps that memory.peak_memory_mb expects."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    case = find(name, device)
    prepare = case.candidate(candidate).prepare
    prepare(case.inputs(True))()  # loads code, whose memory must not count for the work itself
    inputs = case.inputs(False)
    yield
    call = prepare(inputs)
    yield
    for _ in range(2):
        call()
