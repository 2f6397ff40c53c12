"""What a GPU has really run: python benchmarks/ledger.py FOLDER, after the GPU tests of gpu.sh.

Reads FOLDER/tests.xml (pytest's JUnit report) and writes FOLDER/verified.json: the ops whose GPU tests all passed.
`transformer-fast info` and README say "not yet run on a GPU" of every op that no committed verified.json names.
"""

import json
import pathlib
import re
import sys
import xml.etree.ElementTree

__all__ = ["OPS", "verified", "write"]

# What is verified -> the test files that prove it, by a pattern of their names. "cuda ...": the CUDA C++ kernels of an
# op; without it: Triton's.
OPS = {
    "additive_attention": "test_additive_attention",
    "attention": "test_attention_triton",
    "bias_activation": "test_activation_triton",
    "cross_entropy": "test_cross_entropy",
    "dropout": "test_dropout_triton",
    "embedding_layer_norm": "test_embedding_layer_norm",
    "norm": "test_norm_triton",
    "rotary_embedding": "test_rotary",
    "cuda attention": r"test_attention\w*_cuda",
    "cuda norm": "test_norm_cuda",
    "cuda rotary_embedding": "test_rotary",
}


def verified(report: pathlib.Path) -> dict[str, int]:
    """op -> how many of its tests passed, for those where some did and none failed. Skipped tests prove nothing."""
    passed, failed = dict.fromkeys(OPS, 0), set()
    for test in xml.etree.ElementTree.parse(report).iter("testcase"):
        where = f"{test.get('classname', '')} {test.get('file', '')}"
        outcomes = {child.tag for child in test}
        for op, pattern in OPS.items():
            if not re.search(pattern, where):
                continue
            if outcomes & {"failure", "error"}:
                failed.add(op)
            elif "skipped" not in outcomes:
                passed[op] += 1
    return {op: count for op, count in passed.items() if count and op not in failed}


def write(folder: pathlib.Path) -> dict[str, int]:
    found = verified(folder / "tests.xml")
    (folder / "verified.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    ops = write(pathlib.Path(sys.argv[1]))
    print("verified on this GPU:", ", ".join(f"{op} ({count} tests)" for op, count in ops.items()) or "nothing")
