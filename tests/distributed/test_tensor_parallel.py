"""tp_plan="auto" of transformers: two processes, with the weights of each layer split, have the loss and gradients of
one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled

import transformer_fast as tf

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no torch.distributed with gloo"
)
WORLD = 2
IDS = torch.arange(3, 35).view(2, 16)
# Hugging Face's class with this package's attention, and this package's class, which runs Hugging Face's forward.
WAYS = {"theirs": "transformer_fast", "ours": None}


def load(way: str, folder: str, **options):
    cls = transformers.LlamaForCausalLM if way == "theirs" else tf.LlamaForCausalLM
    return cls.from_pretrained(folder, attn_implementation=WAYS[way], **options).train()


def learned(model) -> dict[str, torch.Tensor]:
    output = model(IDS, labels=IDS)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": output.loss.detach(), **{n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in grads.items()}}


def work(rank: int, folder: str, result: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    found = {}
    for way in WAYS:
        model = load(way, folder, tp_plan="auto")
        found[way] = learned(model)
        found[way, "weight"] = tuple(model.model.layers[0].self_attn.q_proj.weight.to_local().shape)
    found["explain"] = tf.explain(model)
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


def test_tensor_parallel(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    mp.spawn(work, (str(tmp_path), str(tmp_path / "found.pt")), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt")
    truth = learned(load("ours", str(tmp_path)).double())
    for way in WAYS:
        assert found[way, "weight"] == (16, 32)  # half of the rows
        parts, plain = found[way], learned(load("theirs", str(tmp_path)))
        losses = [d.pop("loss") for d in (parts, plain)]
        assert_as_accurate(losses[0], truth["loss"].double(), losses[1], OUTPUT)
        whole = {n: t for n, t in truth.items() if n != "loss"}
        assert parts.keys() == whole.keys()
        assert_as_accurate(*(pooled(g, whole) for g in (parts, whole, plain)), GRADIENT)
    assert "transformers' own forward" in found["explain"]  # as explain says
