"""Records which ops a GPU has run: python benchmarks/ledger.py FOLDER, after the GPU tests of gpu.sh.

Reads FOLDER/tests/*.xml (JUnit reports of flight_tests.py; unfinished outcomes are turned into reports first) and
writes FOLDER/verified.json: the ops whose GPU tests all passed.
`transformer-fast info` names the ops of the committed ledgers, and on a GPU says "not yet run on a GPU" of all others.
"""

import json
import pathlib
import re
import sys
import xml.etree.ElementTree
from collections.abc import Sequence

from transformer_fast.benchmarks.flight_tests import GROUPS, write_xml

__all__ = ["OPS", "verified", "write"]

_DRAWN = r"test_any_strides(?=.*\btriton\b)"
# {op: pattern of the files and names of the tests that verify it}.
# "cuda ...": the CUDA C++ kernels of an op; otherwise Triton's.
OPS = {
    "additive_attention": rf"{_DRAWN}(?=.*\badditive_attention\b)",
    "attention": "test_attention_triton",
    "bias_activation": "test_activation_triton",
    "cross_entropy": rf"{_DRAWN}(?=.*\bcross_entropy\b)",
    "dropout": "test_dropout_triton",
    "embedding_layer_norm": rf"{_DRAWN}(?=.*\bembedding_layer_norm\b)",
    "norm": "test_norm_triton",
    "rotary_embedding": "test_rotary",
    "cuda bias_activation": "test_activation_cuda",
    "cuda attention": r"test_attention\w*_cuda",
    "cuda norm": "test_norm_cuda",
    "cuda rotary_embedding": "test_rotary",
}


# Tests that must be among those that passed: they run the shipped tiles.
NEEDED = {"attention": "test_shipped_tiles"}


def verified(reports: Sequence[pathlib.Path]) -> dict[str, int]:
    """{op: how many of its tests passed}, for ops where some passed and none failed. Skipped tests do not count."""
    passed, failed = dict.fromkeys(OPS, 0), set()
    needed = set(NEEDED)
    tests = [test for report in reports for test in xml.etree.ElementTree.parse(report).iter("testcase")]
    for test in tests:
        where = f"{test.get('classname', '')} {test.get('file', '')} {test.get('name', '')}"
        outcomes = {child.tag for child in test}
        for op, pattern in OPS.items():
            if "error" in outcomes and re.search(pattern.partition("(")[0], where):
                failed.add(op)  # an error of the whole file: not all of its tests ran
            elif not re.search(pattern, where):
                continue
            elif outcomes & {"failure", "error"}:
                failed.add(op)
            elif "skipped" not in outcomes:
                passed[op] += 1
                if op in needed and NEEDED[op] in (test.get("name") or ""):
                    needed.remove(op)
    return {op: count for op, count in passed.items() if count and op not in failed | needed}


def write(folder: pathlib.Path) -> dict[str, int]:
    for outcomes in sorted((folder / "tests").glob("*.jsonl")):
        report = outcomes.with_suffix(".xml")
        if not report.exists():  # the run was killed
            write_xml(outcomes, GROUPS.get(outcomes.stem, ()), complete=False)
    found = verified(sorted((folder / "tests").glob("*.xml")))
    (folder / "verified.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    ops = write(pathlib.Path(sys.argv[1]))
    print("verified on this GPU:", ", ".join(f"{op} ({count} tests)" for op, count in ops.items()) or "nothing")
