"""The examples that train, under torchrun: two processes learn what one does, and a killed run goes on."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from numerics import GRADIENT, assert_as_accurate
from scripts import load_script

import transformer_fast as tf
from transformer_fast.demo.training import Training

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
two_processes = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no torch.distributed with gloo"
)
WRITING = ["--size", "32", "--layers", "2", "--vocabulary", "300", "--dropout", "0", "--new-tokens", "2",
           "--beginnings", "Kenji"]  # fmt: skip
TRANSLATING = ["--model", "rnn", "--size", "32", "--batch-size", "9", "--test", "2", "--beams", "2", "--dropout", "0"]


def load(name: str):
    return load_script(EXAMPLES / f"{name}.py")


def start(name: str, output: pathlib.Path, *arguments: str, through: tuple[str, ...] = ()) -> subprocess.Popen:
    """Two processes of an example. through: a script that runs it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMER_FAST_POISON": "0", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        [*command, *through, str(EXAMPLES / f"{name}.py"), "--output", str(output), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def finished(process: subprocess.Popen) -> str:
    try:
        printed, _ = process.communicate(timeout=500)
    finally:
        kill(process)
    assert process.returncode == 0, printed[-3000:]
    return printed


def kill(process: subprocess.Popen) -> None:
    """With its workers, which torchrun starts in sessions of their own."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for one in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def kill_at(process: subprocess.Popen, output: pathlib.Path, saved: str) -> None:
    """Kill an example without warning when it has saved what matches."""
    try:
        deadline = time.monotonic() + 500
        while not list(output.glob(saved)):
            assert process.poll() is None, process.stdout.read()[-3000:]
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
    finally:
        kill(process)


# Runs a script whose training stands still after four steps, until it is killed.
WAITS = """
import runpy, sys, time
from transformer_fast.demo.training import Training
learn = Training.step
def step(self, batch):
    for _ in range(5000 if len(self.losses) == 4 else 0):
        time.sleep(0.1)
    return learn(self, batch)
Training.step = step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def progress(output: pathlib.Path) -> dict:
    return json.loads(max(output.glob("checkpoints/[0-9]*/progress.json")).read_text())


def alone(name: str, output: pathlib.Path, monkeypatch, dtype: torch.dtype, *arguments: str) -> torch.Tensor:
    """Losses of one process, in float32 or in float64."""
    module = load(name)
    losses = []
    learn = Training.step

    def step(self, batch):
        self.module.to(dtype)
        losses.append(learn(self, batch))
        return losses[-1]

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", step)
        patched.setattr(Training, "finish", lambda *_: False)
        module.main(module.parse(["--output", str(output), *arguments]))
    return torch.tensor(losses, dtype=dtype)


def assert_learned_alike(name, output, tmp_path, monkeypatch, *arguments: str) -> None:
    """The losses that two processes left in `output` are those of one."""
    losses = progress(output)["losses"]
    truth, plain = (
        alone(name, tmp_path / "one", monkeypatch, dtype, *arguments) for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate(torch.tensor(losses), truth, plain, GRADIENT)


@two_processes
def test_killed_and_resumed_fully_sharded(tmp_path, monkeypatch):
    """Layers computed again, two parts a step, a kill without warning."""
    given = [*WRITING, "--steps", "10"]
    many = [*given, "--fsdp", "--accumulate", "2", "--checkpointing", "--save-every", "2"]
    output = tmp_path / "two"
    waits = tmp_path / "waits.py"
    waits.write_text(WAITS)
    process = start("text_generation", output, *many, through=(str(waits),))
    kill_at(process, output, "checkpoints/[0-9]*/progress.json")
    assert not (output / "model").exists()  # it was killed on the way
    printed = finished(start("text_generation", output, *many, "--resume"))
    assert "continues after step" in printed and "saved" in printed
    assert len(progress(output)["losses"]) == 10
    assert_learned_alike("text_generation", output, tmp_path, monkeypatch, *given)
    assert (output / "model" / "model.safetensors").is_file()


@two_processes
def test_data_parallel(tmp_path, monkeypatch):
    """Rows and labels that two processes cannot share evenly."""
    given = [*TRANSLATING, "--steps", "4"]
    printed = finished(start("translation_from_scratch", tmp_path / "two", *given, "--save-every", "4"))
    assert printed.count("saved") == 1
    assert_learned_alike("translation_from_scratch", tmp_path / "two", tmp_path, monkeypatch, *given)


@two_processes
def test_trainer_data_parallel(tmp_path):
    arguments = ["--limit", "30", "--epochs", "1", "--freeze", "--accumulate", "2"]
    printed = finished(start("finetune_classifier", tmp_path, *arguments))
    assert printed.count("accuracy on 10 held-out reviews") == 1
    assert (tmp_path / "frozen" / "model.safetensors").is_file()


@two_processes
def test_plain_module_fully_sharded(tmp_path, monkeypatch):
    """A model that is none of Hugging Face's, its block computed again, two parts a step."""
    given = ["--dropout", "0", "--epochs", "1", "--size", "16"]
    many = [*given, "--fsdp", "--accumulate", "2", "--checkpointing", "--save-every", "13"]
    printed = finished(start("transformer_classifier", tmp_path / "two", *many))
    assert printed.count("held-out reviews:") == 1 and (tmp_path / "two" / "heads.png").is_file()
    assert len(progress(tmp_path / "two")["losses"]) == 13
    assert_learned_alike("transformer_classifier", tmp_path / "two", tmp_path, monkeypatch, *given)


# Texts of one length: an AWD-LSTM's loss has means over tokens beside those over labels.
ULMFIT = ["--limit", "24", "--longest", "6", "--size", "8", "--dropout", "0", "--batch-size", "40", "--pretrain", "3",
          "--adapt", "2", "--classify", "2", "--labels", "8", "--draws", "1"]  # fmt: skip
STEPS = {"1_general_text": 3, "2_reviews": 10}
HEADS = {f"3_draw_0_way_{way}": 2 for way in (1, 2, 3)}  # their batch norms know a process's rows alone


class _Learned(Exception):
    pass


def language_models_alone(tmp_path, monkeypatch, dtype: torch.dtype) -> torch.Tensor:
    """The losses of both language models in one process, in float32 or in float64."""
    module, losses, learn = load("ulmfit"), [], Training.step

    def step(self, batch):
        self.module.to(dtype)
        losses.append(learn(self, batch))
        return losses[-1]

    def stop(*_):
        raise _Learned

    monkeypatch.setattr(module, "encode", stop)
    with monkeypatch.context() as patched, pytest.raises(_Learned):
        patched.setattr(Training, "step", step)
        module.main(module.parse(["--output", str(tmp_path / str(dtype)), *ULMFIT]))
    return torch.tensor(losses, dtype=dtype)


@two_processes
@pytest.mark.parametrize("way", ["data parallel", "fully sharded, killed"])
def test_several_trainings(way, tmp_path, monkeypatch):
    """ULMFiT's: those that a killed run had finished are not computed again, and those that it had not begun begin."""
    output, killed = tmp_path / "two", way != "data parallel"
    many = [*ULMFIT, "--save-every", "1", *(["--fsdp"] if killed else [])]
    if killed:
        waits = tmp_path / "waits.py"
        waits.write_text(WAITS)
        process = start("ulmfit", output, *many, through=(str(waits),))
        kill_at(process, output, "checkpoints/2_reviews/[0-9]*/progress.json")
        many.append("--resume")
    printed = finished(start("ulmfit", output, *many))
    assert printed.count("accuracy on 100 held-out reviews") == 1
    assert ("continues after step 3, from" in printed) == killed  # of general text
    assert (output / "model" / "model.safetensors").is_file()
    losses = {}
    for name, count in {**STEPS, **HEADS}.items():
        saved = max((output / "checkpoints" / name).glob("[0-9]*/progress.json"))
        losses[name] = json.loads(saved.read_text())["losses"]
        assert len(losses[name]) == count, name
    found = torch.tensor([loss for name in STEPS for loss in losses[name]])
    truth, plain = (language_models_alone(tmp_path, monkeypatch, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(found, truth, plain, GRADIENT)


def test_too_few_rows_for_batch_norm(tmp_path):
    module = load("ulmfit")
    rows = [{"input_ids": [3, 4], "attention_mask": [1, 1], "labels": 0}] * 5
    model = tf.AWDLSTMForSequenceClassification(tf.AWDLSTMConfig(vocab_size=9, embedding_size=4, cell_size=4))
    arguments = module.parse(["--output", str(tmp_path), "--batch-size", "4"])
    with pytest.raises(
        ValueError, match="--labels, --batch-size: 5 rows in steps of 4 leave a process 1 per micro-batch"
    ):
        module.fit(model, rows, None, 1, 0.1, arguments, "heads")


def test_resumed_run_is_the_run(tmp_path, monkeypatch):
    """With dropout, and weights kept on the way: nothing differs."""
    module, arguments = load("text_generation"), [*WRITING, "--dropout", "0.1", "--steps", "8", "--save-every", "3"]
    learn, stop = Training.step, []

    def step(self, batch):
        if stop and len(self.losses) == 5 and self._at >= self._done:
            raise KeyboardInterrupt
        return learn(self, batch)

    monkeypatch.setattr(Training, "step", step)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    module.main(module.parse(["--output", str(whole), *arguments]))
    stop.append(True)
    with pytest.raises(KeyboardInterrupt):
        module.main(module.parse(["--output", str(cut), *arguments]))
    stop.clear()
    module.main(module.parse(["--output", str(cut), *arguments, "--resume"]))
    assert progress(whole) == progress(cut) and len(progress(cut)["losses"]) == 6
    saved = [_weights(folder) for folder in (whole, cut)]
    assert saved[0].keys() == saved[1].keys()
    for name, t in saved[0].items():
        assert torch.equal(t, saved[1][name]), name


def _weights(output: pathlib.Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fsdp"], "--fsdp: wanted several processes, so start it with torchrun"),
        (["--accumulate", "0"], "--accumulate: wanted at least 1, got 0"),
        (["--resume"], "--resume: wanted what --save-every saved in"),
    ],
)
def test_refusals(arguments, said, tmp_path):
    module = load("text_generation")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        module.main(module.parse(["--output", str(tmp_path), *WRITING, "--steps", "1", *arguments]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Trainer shares a model where there are GPUs")
def test_trainer_does_not_share_on_cpus(tmp_path):
    module = load("finetune_classifier")
    with pytest.raises(SystemExit, match="--fsdp: Trainer shards a model with accelerate, .* got CPUs: leave it out"):
        module.main(module.parse(["--output", str(tmp_path), "--limit", "6", "--freeze", "--fsdp"]))
