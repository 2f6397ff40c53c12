"""Embeddings, labels or summaries of millions of texts: a pool of workers on Ray Data, on one machine or a cluster.

    pip install 'transformer-fast[ray]'
    python examples/embed_many.py --input texts --output vectors
    python examples/embed_many.py --input texts --output labels --task classify --checkpoint FOLDER_OR_NAME
    python examples/embed_many.py --input /shared/texts --output /shared/vectors --address auto

Input: a file or a folder of .parquet (one column has the text) and .txt (one text per line). It is cut into blocks of
--block-rows rows. Each worker loads the model once; it reads a block, computes it in batches of similar lengths and
writes one parquet file, atomically. So after the loss of a worker one block is computed again, and a second run
computes the missing blocks.

Output: OUTPUT/<input file>/<first row>.parquet (a.txt gives a_txt/000000000000.parquet) with the columns file, row and
embedding (float32), or label and score, or summary. A missing or blank text has a row with nulls.
"""

import argparse
import bisect
import importlib.util
import json
import logging
import os
import pathlib
import re
import sys
import time
import uuid

SUFFIXES = (".parquet", ".txt")
SETTINGS = "_embed_many.json"  # Arrow and Spark ignore files with a leading _ or .
RETRIES = 5  # of a block whose worker died: a block that is too large, for example, then ends the run
KEPT = ("task", "checkpoint", "column", "keep", "pooling", "max_length", "max_new_tokens", "block_rows")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=pathlib.Path, required=True, help="a file or folder of .parquet and .txt")
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, help="folder; on a cluster one that all nodes see"
    )
    parser.add_argument("--task", choices=("embed", "classify", "summarize"), default="embed")
    parser.add_argument("--checkpoint", help="folder or name; default, to embed: all-MiniLM-L6-v2")
    parser.add_argument("--column", default="text", help="of parquet files: where the text is (default: text)")
    parser.add_argument("--keep", nargs="*", default=[], help="columns of parquet files to carry over")
    parser.add_argument("--pooling", choices=("mean", "cls", "last", "max"), default="mean", help="default: mean")
    parser.add_argument("--max-length", type=int, help="tokens of a text that are read; default: what the model takes")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of a summary (default: 64)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts computed at a time (default: 32)")
    parser.add_argument("--block-rows", type=int, default=2048, help="rows of an output file (default: 2048)")
    parser.add_argument("--workers", type=int, help="default: as many as the cores allow")
    parser.add_argument("--threads", type=int, default=1, help="cores of a worker (default: 1)")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each worker: GPUs (default: 0.0)")
    parser.add_argument("--address", help="of a Ray cluster: auto, or HOST:PORT; default: start Ray on this machine")
    given = parser.parse_args(arguments)
    for name in ("batch_size", "block_rows", "threads", "workers", "max_length", "max_new_tokens"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: wanted at least 1, got {value}")
    if given.checkpoint is None:
        if given.task != "embed":
            parser.error(f"--checkpoint: --task {given.task} wants one; the default model only embeds")
        from transformer_fast.demo import locate

        given.checkpoint = str(locate())
    elif os.path.isdir(given.checkpoint):
        given.checkpoint = os.path.abspath(given.checkpoint)
    elif not given.address:  # on a cluster, the nodes check it
        from transformer_fast.demo.checkpoint import given as known

        try:
            known(given.checkpoint)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--checkpoint: {error}")
    given.input, given.output = given.input.absolute(), given.output.absolute()
    return given


# Blocks: ranges of rows of the input files


def input_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name under the output folder: path}."""
    if root.is_file():
        found = [root]
    elif root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        found = [p for p in found if not any(part.startswith(("_", ".")) for part in p.relative_to(root).parts)]
    else:
        raise SystemExit(f"--input: {root} is not there")
    if not found or found[0].suffix not in SUFFIXES:
        raise SystemExit(f"--input: {root} has no {' or '.join(SUFFIXES)} files")
    return {str(p.relative_to(root if root.is_dir() else root.parent)): p for p in found}


def blocks(name: str, path: pathlib.Path, arguments: argparse.Namespace) -> list[dict]:
    """A file's blocks: {name, path, start, stop, offset}; offset: the first byte of a block of lines."""
    size = arguments.block_rows
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            rows, columns = file.metadata.num_rows, file.schema_arrow.names
        for column in (arguments.column, *arguments.keep):
            if column not in columns:
                raise ValueError(f"has no column {column!r}; it has {', '.join(columns)}")
        offsets = [0] * -(-rows // size)
    else:
        rows, offsets, at = 0, [], 0
        with path.open("rb") as file:
            for line in file:
                if rows % size == 0:
                    offsets.append(at)
                at += len(line)
                rows += 1
    return [
        {"name": name, "path": str(path), "start": n * size, "stop": min(rows, (n + 1) * size), "offset": offset}
        for n, offset in enumerate(offsets)
    ]


def part(output: pathlib.Path, block: dict) -> pathlib.Path:
    """a.txt -> a_txt/000000000000.parquet: a folder's name must not look like a file's."""
    stem, _, suffix = block["name"].rpartition(".")
    return output / f"{stem}_{suffix}" / f"{block['start']:012d}.parquet"


def plan(arguments: argparse.Namespace) -> tuple[list[dict], list[dict], list[str]]:
    """(all blocks, blocks without an output file, messages about unreadable files)."""
    files = input_files(arguments.input)
    found, broken = [], []
    for name, path in files.items():
        try:
            found += blocks(name, path, arguments)
        except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
            broken.append(f"{path}: {' '.join(str(error).split())}")
    if not found and not broken:
        raise SystemExit(f"--input: {arguments.input} has no rows")
    settle(arguments, {name: path.stat().st_size for name, path in files.items()})
    return found, [block for block in found if not part(arguments.output, block).exists()], broken


def settle(arguments: argparse.Namespace, sizes: dict[str, int]) -> None:
    """Write the settings into the output folder; refuse to continue a run with other settings."""
    said = {name: getattr(arguments, name) for name in KEPT}
    path = arguments.output / SETTINGS
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else {}
        for name, value in said.items():
            if before and before["settings"].get(name) != value:
                raise SystemExit(
                    f"--{name.replace('_', '-')}: {arguments.output} was begun with {before['settings'].get(name)!r}, "
                    f"got {value!r}; keep that setting or use another --output"
                )
        for name, size in before.get("sizes", {}).items():
            if sizes.get(name, size) != size:
                raise SystemExit(
                    f"--input: {name} had {size} bytes when {arguments.output} was begun, now {sizes[name]}"
                )
        whole = path.with_name(f".{uuid.uuid4().hex}")
        whole.write_text(json.dumps({"settings": said, "sizes": before.get("sizes", {}) | sizes}, indent=1))
        os.replace(whole, path)
    except OSError as error:
        raise SystemExit(f"--output: {arguments.output} cannot be written: {error}") from None


# Workers


class Worker:
    """Has the model; turns a block into its output file."""

    def __init__(self, arguments: argparse.Namespace):
        import torch
        import transformers

        import transformer_fast as tf

        transformers.utils.logging.disable_progress_bar()  # of loading, which every worker does
        torch.set_num_threads(arguments.threads)
        self.arguments = arguments
        self.device = "cuda" if arguments.gpus else "cpu"
        self.row_group: tuple = (None, None)
        if arguments.task == "embed":
            self.tokenizer = tf.AutoTokenizer.from_pretrained(arguments.checkpoint)
            self.model = tf.AutoModel.from_pretrained(arguments.checkpoint).to(self.device).eval()
        else:
            task = {"classify": "text-classification", "summarize": "summarization"}[arguments.task]
            self.pipe = tf.pipeline(task, model=arguments.checkpoint, device=self.device)

    def __call__(self, batch: dict) -> dict:
        """Compute one block. Errors in the data are returned, so that other blocks continue."""
        block = json.loads(batch["block"][0])
        began, cpu = time.time(), time.process_time()
        try:
            columns = self.read(block)
            texts = columns.pop(self.arguments.column)
            self.write(block, columns, self.compute(texts))
            error = ""
        except (OSError, ValueError) as found:
            error = f"{block['path']}, rows {block['start']} to {block['stop']}: {' '.join(str(found).split())}"
        spent = {"began": [began], "ended": [time.time()], "cpu": [time.process_time() - cpu]}
        return {"rows": [block["stop"] - block["start"]], "error": [error], "process": [os.getpid()]} | spent

    def read(self, block: dict) -> dict:
        names = list(dict.fromkeys([self.arguments.column, *self.arguments.keep]))
        if block["path"].endswith(".parquet"):
            return self.read_parquet(block, names)
        with open(block["path"], "rb") as file:
            file.seek(block["offset"])
            lines = [file.readline() for _ in range(block["stop"] - block["start"])]
        return {self.arguments.column: [line.decode("utf-8").rstrip("\r\n") for line in lines]}

    def read_parquet(self, block: dict, names: list[str]) -> dict:
        """The rows of a block, from one or more row groups. The last row group is kept: the next block begins in it."""
        import pyarrow
        import pyarrow.parquet

        pieces = []
        with pyarrow.parquet.ParquetFile(block["path"]) as file:
            ends = [0]
            for n in range(file.num_row_groups):
                ends.append(ends[-1] + file.metadata.row_group(n).num_rows)
            for n in range(bisect.bisect_right(ends, block["start"]) - 1, bisect.bisect_left(ends, block["stop"])):
                if self.row_group[0] != (block["path"], n):
                    self.row_group = (block["path"], n), file.read_row_group(n, columns=names)
                low, high = max(block["start"] - ends[n], 0), min(block["stop"], ends[n + 1]) - ends[n]
                pieces.append(self.row_group[1].slice(low, high - low))
        table = pyarrow.concat_tables(pieces)
        kind = table.schema.field(self.arguments.column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"column {self.arguments.column!r}: wanted text, got {kind}")
        return {name: table[name] if name in self.arguments.keep else None for name in names} | {
            self.arguments.column: table[self.arguments.column].to_pylist()
        }

    def compute(self, texts: list[str | None]) -> dict:
        """The columns of answers for all texts; null for missing and blank ones."""
        import pyarrow

        given = self.arguments
        at = [i for i, text in enumerate(texts) if text and text.strip()]
        some = [texts[i] for i in at]
        size = {"batch_size": given.batch_size}
        if given.task == "embed":
            import numpy

            import transformer_fast as tf

            limit = {"max_length": given.max_length}
            found = tf.layer_features(self.model, some, self.tokenizer, pooling=given.pooling, **limit, **size)
            every = numpy.zeros((len(texts), found.shape[1]), numpy.float32)
            every[at] = found.float().numpy()
            absent = numpy.ones(len(texts), bool)
            absent[at] = False
            vectors = pyarrow.FixedSizeListArray.from_arrays(every.ravel(), every.shape[1], mask=pyarrow.array(absent))
            return {"embedding": vectors}
        if given.task == "classify":
            limit = {"max_length": given.max_length} if given.max_length else {}
            if self.pipe.tokenizer.pad_token_id is None:  # GPT-2's: one text at a time
                size = {"batch_size": 1}
            found = self.pipe(some, truncation=True, **limit, **size)
            keys = {"label": pyarrow.string(), "score": pyarrow.float32()}
        else:
            found = self.pipe(some, truncation=True, max_new_tokens=given.max_new_tokens, **size)
            found = [{"summary": one["summary_text"]} for one in found]
            keys = {"summary": pyarrow.string()}
        rows = dict(zip(at, found))
        return {
            key: pyarrow.array([rows[i][key] if i in rows else None for i in range(len(texts))], kind)
            for key, kind in keys.items()
        }

    def write(self, block: dict, kept: dict, answers: dict) -> None:
        """Write a temporary file and rename it to the block's name, so that files with that name are complete."""
        import pyarrow
        import pyarrow.parquet

        count = block["stop"] - block["start"]
        columns = {
            "file": pyarrow.array([block["name"]] * count),
            "row": pyarrow.array(range(block["start"], block["stop"]), pyarrow.int64()),
            **{name: values for name, values in kept.items() if values is not None},
            **answers,
        }
        path = part(self.arguments.output, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f".{uuid.uuid4().hex}")
        pyarrow.parquet.write_table(pyarrow.table(columns), whole)
        os.replace(whole, path)


# The run


def need_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("This example runs on Ray, which is not installed: pip install 'transformer-fast[ray]'")


def connect(arguments: argparse.Namespace) -> None:
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by default Ray sends usage statistics
    if arguments.address:
        try:
            ray.init(address=arguments.address, logging_level="warning")
        except (ConnectionError, ValueError, TimeoutError) as error:
            raise SystemExit(f"--address: no Ray cluster at {arguments.address}: {error}") from None
        return
    cores = (arguments.workers or 0) * arguments.threads or os.cpu_count()
    # Workers read the texts from files: Ray's object store only has the names of blocks.
    ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="warning")


def look_around(checkpoint: str, is_folder: bool, seen: str) -> str:
    """What is missing on a node, or ''."""
    if is_folder and not os.path.isdir(checkpoint):
        return f"--checkpoint: {checkpoint} is not there"
    if not os.path.exists(seen):
        return f"--output: {os.path.dirname(seen)} is not there, or is another folder of that name"
    return ""


def check_nodes(arguments: argparse.Namespace) -> None:
    """Check before the run that every node has the model and the output folder."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    asked = {}
    seen = str(arguments.output / SETTINGS)
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        remote = ray.remote(num_cpus=0, scheduling_strategy=where)(look_around)
        asked[node["NodeManagerAddress"]] = remote.remote(
            arguments.checkpoint, os.path.isabs(arguments.checkpoint), seen
        )
    lacking = [f"node {name}: {what}" for name, reference in asked.items() if (what := ray.get(reference, timeout=120))]
    if lacking:
        raise SystemExit(
            "\n".join([*lacking, "Put both on storage that every node mounts, or name a model of the hub."])
        )


def run(todo: list[dict], workers: int, arguments: argparse.Namespace):
    """Blocks through the pool; yields {rows, error, process, began, ended, cpu} as they are done."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the example's own bar counts texts
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    data = ray.data.from_items([{"block": json.dumps(block)} for block in todo], override_num_blocks=len(todo))
    # Ray restarts a worker that died, and gives its block to a free worker.
    yield from data.map_batches(
        Worker,
        fn_constructor_args=(arguments,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=arguments.threads,
        num_gpus=arguments.gpus,
        ray_remote_args_fn=lambda: {"max_task_retries": RETRIES},
    ).iter_rows()


def reason(error: Exception) -> str:
    """The error of a worker, without the traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    if named:
        return named[-1]
    advice = f"One block ended more than {RETRIES} workers: is a smaller --batch-size or --block-rows better?"
    return "\n".join([*lines[:1], advice])


def main(arguments: argparse.Namespace) -> dict:
    """Returns {rows, done, seconds, errors, processes}: rows of the input, and rows that this run computed."""
    need_ray()
    from tqdm.auto import tqdm

    every, todo, errors = plan(arguments)
    rows, left = (sum(b["stop"] - b["start"] for b in some) for some in (every, todo))
    print(f"{rows:,} rows in {len(every):,} block{'s' * (len(every) != 1)}; {rows - left:,} are there already")
    done, processes, start = 0, set(), time.perf_counter()
    if todo:
        import ray

        connect(arguments)
        try:
            check_nodes(arguments)
            cores = int(ray.cluster_resources().get("CPU", 1)) // arguments.threads
            workers = min(arguments.workers or max(cores, 1), len(todo))
            start = time.perf_counter()
            with tqdm(total=rows, initial=rows - left, unit=" texts") as bar:
                for answer in run(todo, workers, arguments):
                    processes.add(answer["process"])
                    if answer["error"]:
                        errors.append(answer["error"])
                    else:
                        done += answer["rows"]
                        bar.update(answer["rows"])
        except ray.exceptions.RayError as error:
            raise SystemExit(
                f"The workers cannot continue: {reason(error)}\nThe same command continues from here."
            ) from None
        except KeyboardInterrupt:
            raise SystemExit("\nstopped; the same command continues from here") from None
    seconds = time.perf_counter() - start
    print(f"{done:,} rows in {seconds:.1f} s; they are in {arguments.output}")
    for error in errors:
        print(f"not computed: {error}", file=sys.stderr)
    return {"rows": rows, "done": done, "seconds": seconds, "errors": errors, "processes": processes}


if __name__ == "__main__":
    sys.exit(bool(main(parse())["errors"]))
