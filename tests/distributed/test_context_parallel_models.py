"""Models on parts of sequences: losses and gradients equal those of one process."""

import contextlib
import functools
import os
import re
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled
from torch.distributed.device_mesh import init_device_mesh

import transformer_fast as tf

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no torch.distributed with gloo"
)
WORLD, BATCH, LENGTH = 2, 2, 32
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
SHARED_KEYS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Model(NamedTuple):
    """package: the library of the class. switch: whose context_parallel is used, ours or torch's (as in accelerate)."""

    name: str
    config: str
    settings: dict
    package: Callable = lambda: tf
    method: str = "ring"
    switch: str = "ours"
    padding: bool = False
    checkpointing: bool = False

    def make(self):
        import transformers

        torch.manual_seed(0)
        package = tf if self.config.startswith("Transformer") else transformers
        config = getattr(package, self.config)(**self.settings)
        model = getattr(self.package(), self.name)(config)
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():  # modules instead of the configuration, which has many names for it
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if hasattr(model, "set_attn_implementation") and self.package() is not tf:
            model.set_attn_implementation("transformer_fast")
        return model.train()

    @property
    def label(self) -> str:
        theirs = "" if self.package() is tf else "transformers' "
        extras = [n for n in ("padding", "checkpointing") if getattr(self, n)]
        return f"{theirs}{self.name} {self.method}" + "".join(f", {n}" for n in extras) + f" {self.switch}"

    @property
    def causal(self) -> bool:
        return "Causal" in self.name or "LMHead" in self.name

    def batch(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)

        def ids(length=LENGTH):
            return torch.randint(3, 61, (BATCH, length), generator=generator)

        found = {"input_ids": ids()}
        if self.padding:
            found["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [11]])).long()
        if "Conditional" in self.name:
            found["labels"], found["decoder_input_ids"] = ids(16), ids(16)
        elif "SequenceClass" in self.name:
            found["labels"] = torch.tensor([0, 1])
        else:
            found["labels"] = found["input_ids"].clone()
        if found["labels"].dim() > 1:
            found["labels"][:, 20:] = -100  # some chunks have no labels
            if self.padding and "Conditional" not in self.name:
                found["labels"] = found["labels"].masked_fill(found["attention_mask"] == 0, -100)
        return found


def theirs():
    import transformers

    return transformers


MODELS = [
    Model("LlamaForCausalLM", "LlamaConfig", SHARED_KEYS),
    Model("LlamaForCausalLM", "LlamaConfig", SHARED_KEYS, method="ulysses", padding=True),
    Model("LlamaForCausalLM", "LlamaConfig", SHARED_KEYS, checkpointing=True),
    Model("LlamaForCausalLM", "LlamaConfig", SHARED_KEYS, switch="torch's"),
    Model("LlamaForCausalLM", "LlamaConfig", SHARED_KEYS, theirs),
    Model("LlamaForCausalLM", "LlamaConfig", SHARED_KEYS, theirs, padding=True),
    Model("LlamaForCausalLM", "LlamaConfig", SHARED_KEYS, theirs, switch="torch's"),
    Model("MistralForCausalLM", "MistralConfig", {**SHARED_KEYS, "sliding_window": 20}),
    Model("MistralForCausalLM", "MistralConfig", {**SHARED_KEYS, "sliding_window": 20}, theirs, "ulysses"),
    Model("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    Model("BertForMaskedLM", "BertConfig", {**SIZES, **NO_DROPOUT, "num_attention_heads": 4}, padding=True),
    Model("RobertaForMaskedLM", "RobertaConfig", {**SIZES, **NO_DROPOUT, "num_attention_heads": 4}, padding=True),
    Model(
        "ModernBertForMaskedLM", "ModernBertConfig",
        {**SIZES, "num_attention_heads": 4, "local_attention": 12, "global_attn_every_n_layers": 2, "pad_token_id": 0},
        padding=True,
    ),
    Model("BertForSequenceClassification", "BertConfig", {**SIZES, **NO_DROPOUT, "num_attention_heads": 4}),
    Model(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
        padding=True,
    ),
    Model(
        "BartForConditionalGeneration", "BartConfig",
        {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0},
        method="ulysses", padding=True,
    ),
    Model(
        "TransformerForConditionalGeneration", "TransformerConfig",
        {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4,
         "ffn_dim": 48, "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1,
         "eos_token_id": 2},
        padding=True,
    ),
]  # fmt: skip


def switched_on(model: Model, cp, mesh):
    if model.switch == "ours":
        return cp
    from torch.distributed.tensor.experimental import context_parallel

    return context_parallel(mesh, buffers=[torch.zeros(1, LENGTH)], buffer_seq_dims=[1])


def spread(model: Model, mesh) -> dict[str, torch.Tensor]:
    cp = tf.distributed.context_parallel(mesh, method=model.method)
    module, batch = model.make(), model.batch()
    counts = not model.name.startswith(("Roberta", "ModernBert"))
    parts = cp.shard_batch(batch, causal_lm=model.causal, position_ids=counts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(switched_on(model, cp, mesh))
        loss = module(**parts).loss
        if "SequenceClass" not in model.name:
            loss = cp.mean(loss, parts.get("shift_labels", parts["labels"]))
        if model.checkpointing:  # the recomputation must use the forward's context
            stack.close()
        loss.backward()
    return summed(loss, module)


def summed(loss: torch.Tensor, module) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= WORLD
    return {"loss": loss.detach(), **found}


def alone(model: Model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    module = model.make().to(dtype)
    loss = module(**model.batch()).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in module.named_parameters() if p.grad is not None}}


def through_hugging_face(mesh) -> dict:
    """cp_size=2 in accelerate and Trainer, with their own code except for the check that processes have GPUs."""
    import accelerate
    import transformers
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from torch.distributed.tensor.experimental import context_parallel

    cp, found = tf.distributed.context_parallel(mesh), {}
    accelerator = types.SimpleNamespace(
        parallelism_config=accelerate.ParallelismConfig(cp_size=WORLD),
        _cp_context=functools.partial(context_parallel, mesh=mesh),
    )
    accelerator.maybe_context_parallel = functools.partial(accelerate.Accelerator.maybe_context_parallel, accelerator)
    trainer = types.SimpleNamespace(accelerator=accelerator)
    for model in (MODELS[0], MODELS[0]._replace(package=theirs)):
        module, inputs = model.make(), model.batch()
        _attach_context_parallel_hooks(module)
        try:
            context, inputs = transformers.Trainer._prepare_context_parallel_inputs(trainer, module, inputs)
        except ValueError as error:  # only Trainer refuses; accelerate continues
            found["refused", model.label] = str(error)
            inputs["shift_labels"] = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
            inputs["position_ids"] = torch.arange(LENGTH).repeat(BATCH, 1)
            parts = list(inputs.values())
            context = functools.partial(
                accelerator.maybe_context_parallel, parts, [1] * len(parts), no_restore_buffers=set(parts)
            )
        with context():
            loss = cp.mean(module(**inputs).loss, inputs["shift_labels"])
            loss.backward()
        found[model.label] = summed(loss, module)
    rank, count = str(mesh.get_rank()), str(WORLD)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read but not used: the process group exists
    try:
        accelerate.Accelerator(cpu=True, parallelism_config=accelerate.ParallelismConfig(cp_size=WORLD))
    except ValueError as error:
        found["refused", "CPUs"] = str(error)
    return found


def refusals(mesh) -> dict[str, str]:
    """{case: error message} of calls that context_parallel refuses."""
    cp = tf.distributed.context_parallel(mesh)
    llama = MODELS[0].make()
    batch = cp.shard_batch({"input_ids": torch.randint(3, 61, (1, LENGTH))})
    ids = batch["input_ids"]
    transformers_own = MODELS[0]._replace(package=theirs).make()
    calls = {
        "labels": lambda: llama(**batch, labels=ids),
        "positions": lambda: llama(ids, position_ids=torch.arange(ids.shape[1])[None] % 4, use_cache=False),
        "pattern": lambda: transformers_own(ids, position_ids=torch.arange(ids.shape[1])[None] % 4, use_cache=False),
        "attentions": lambda: llama(**batch, output_attentions=True),
        "generate": lambda: llama.eval().generate(ids, max_new_tokens=2),
    }
    found = {}
    with cp:
        for name, call in calls.items():
            try:
                call()
                found[name] = "nothing"
            except NotImplementedError as error:
                found[name] = str(error)
    return found


def work(rank: int, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {model.label: spread(model, mesh) for model in MODELS}
    found["refusals"] = refusals(mesh)
    found["Hugging Face's switch"] = through_hugging_face(mesh)
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    mp.spawn(work, (str(folder / "rendezvous"), str(folder / "found.pt")), nprocs=WORLD)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.label)
def test_loss_and_gradients(found, model: Model):
    assert_learned_alike(found[model.label], model)


def assert_learned_alike(parts: dict[str, torch.Tensor], model: Model) -> None:
    parts = dict(parts)
    # transformers' loss is always computed in float32, so the reference is our class with the same weights.
    truth, plain = alone(model._replace(package=lambda: tf), torch.float64), alone(model, torch.float32)
    assert parts.keys() == truth.keys()
    losses = [d.pop("loss") for d in (parts, truth, plain)]
    assert_as_accurate(losses[0], losses[1].double(), losses[2], OUTPUT)
    assert_as_accurate(*(pooled(g, truth) for g in (parts, truth, plain)), GRADIENT)


def test_refusals(found):
    said = found["refusals"]
    assert "shift_labels" in said["labels"]
    assert "one sequence per row" in said["positions"]
    assert re.match("attention_mask: .*context_parallel.*16 queries and 16 keys", said["pattern"])
    assert "output_attentions: wanted False" in said["attentions"]
    assert "context_parallel" in said["generate"]


@pytest.mark.parametrize("package", ["ours", "theirs"])
def test_hugging_faces_switch(found, package):
    """transformers' class with attn_implementation="transformer_fast" in accelerate, because Trainer refuses it; this
    package's class in Trainer too."""
    model = MODELS[0] if package == "ours" else MODELS[0]._replace(package=theirs)
    spread_by_it = found["Hugging Face's switch"]
    assert ("refused", MODELS[0].label) not in spread_by_it
    assert (
        "only with SDPA attention, you are using transformer_fast"
        in spread_by_it["refused", MODELS[0]._replace(package=theirs).label]
    )
    assert "MULTI_CPU" in spread_by_it["refused", "CPUs"]
    assert_learned_alike(spread_by_it[model.label], model)
