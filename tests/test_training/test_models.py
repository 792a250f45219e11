"""The path of ``smollm2`` on a GGUF file of two small layers; the packaged file takes this reader twenty seconds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastdiv.training import checkpoint, models
from fastdiv.training.run import Run

gguf = pytest.importorskip("gguf")

HIDDEN, WIDE, LAYERS, HEADS = 32, 64, 2, 4


def write_gguf(path):
    words = ["<eos>", *(chr(c) for c in range(33, 127)), "Ġ", "ab", "Ġa"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["a b", "Ġ a"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    shapes = {"token_embd": (len(words), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{n}": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{n}_norm": (HIDDEN,) for n in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.ffn_{n}": (WIDE, HIDDEN) for n in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (HIDDEN, WIDE)}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_model_that_can_be_saved(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(models, "_locate", lambda name: (str(tmp_path), "m.gguf"))
    policy = models.load_policy("smollm2", device="cpu")
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()

    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    saved = checkpoint.save(tmp_path / "checkpoints", 1, policy, optimizer, {}, Run(), keep=1)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    monkeypatch.undo()
    again = models.load_policy(str(saved), device="cpu")
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert policy.tokenizer("ab c")["input_ids"] == again.tokenizer("ab c")["input_ids"]


def test_the_packaged_weights_are_found_without_importing_the_package(monkeypatch, tmp_path):
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(models.UserError, match="carries no SmolLM2-135M-Instruct"):
        models._locate("smollm2")
    (tmp_path / models._SMOLLM2).touch()
    assert models._locate("smollm2") == (str(tmp_path), models._SMOLLM2)
    assert models._locate("some/model") == ("some/model", None)
