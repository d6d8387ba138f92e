# SPDX-License-Identifier: Apache-2.0
"""Gives the parameter shapes of built-in models, or of a model with a transformers config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]


def _gpt2(width: int, layers: int) -> Shapes:
    """The shapes of GPT2LMHeadModel, whose output layer is the token embedding."""
    shapes: Shapes = {
        "transformer.wte.weight": (50257, width),
        "transformer.wpe.weight": (1024, width),
    }
    for i in range(layers):
        layer = f"transformer.h.{i}."
        shapes |= _norm(f"{layer}ln_1", width)
        shapes |= _conv1d(f"{layer}attn.c_attn", width, 3 * width)
        shapes |= _conv1d(f"{layer}attn.c_proj", width, width)
        shapes |= _norm(f"{layer}ln_2", width)
        shapes |= _conv1d(f"{layer}mlp.c_fc", width, 4 * width)
        shapes |= _conv1d(f"{layer}mlp.c_proj", 4 * width, width)
    return shapes | _norm("transformer.ln_f", width)


def _bert(width: int, layers: int) -> Shapes:
    """The shapes of BertForMaskedLM, whose output layer is the word embedding."""
    embeddings = "bert.embeddings."
    shapes: Shapes = {
        f"{embeddings}word_embeddings.weight": (30522, width),
        f"{embeddings}position_embeddings.weight": (512, width),
        f"{embeddings}token_type_embeddings.weight": (2, width),
    }
    shapes |= _norm(f"{embeddings}LayerNorm", width)
    for i in range(layers):
        layer = f"bert.encoder.layer.{i}."
        for part in ("query", "key", "value"):
            shapes |= _linear(f"{layer}attention.self.{part}", width, width)
        shapes |= _linear(f"{layer}attention.output.dense", width, width)
        shapes |= _norm(f"{layer}attention.output.LayerNorm", width)
        shapes |= _linear(f"{layer}intermediate.dense", 4 * width, width)
        shapes |= _linear(f"{layer}output.dense", width, 4 * width)
        shapes |= _norm(f"{layer}output.LayerNorm", width)
    shapes["cls.predictions.bias"] = (30522,)
    shapes |= _linear("cls.predictions.transform.dense", width, width)
    return shapes | _norm("cls.predictions.transform.LayerNorm", width)


def _llama3(width: int, inner: int, layers: int) -> Shapes:
    """The shapes of LlamaForCausalLM for Llama 3, which has 8 heads of 128 for keys and values."""
    shapes: Shapes = {"model.embed_tokens.weight": (128256, width)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (width, width),
            f"{layer}self_attn.k_proj.weight": (1024, width),
            f"{layer}self_attn.v_proj.weight": (1024, width),
            f"{layer}self_attn.o_proj.weight": (width, width),
            f"{layer}mlp.gate_proj.weight": (inner, width),
            f"{layer}mlp.up_proj.weight": (inner, width),
            f"{layer}mlp.down_proj.weight": (width, inner),
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (128256, width)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv1d(name: str, inputs: int, outputs: int) -> Shapes:
    """The shapes of a linear layer of GPT-2, whose weight is (inputs, outputs)."""
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


#: The built-in models. Names and order are those of ``named_parameters()`` in transformers.
MODELS: Mapping[str, Callable[[], Shapes]] = {
    "gpt2-124m": partial(_gpt2, 768, 12),
    "gpt2-345m": partial(_gpt2, 1024, 24),
    "bert-base": partial(_bert, 768, 12),
    "llama-3-8b": partial(_llama3, 4096, 14336, 32),
    "llama-3-70b": partial(_llama3, 8192, 28672, 80),
}


def load_shapes(model: str) -> Shapes:
    """The shapes of a model's trainable parameters, in the order of ``named_parameters()``.

    Args:
        model: one of ``MODELS``, a folder with a transformers ``config.json``, or such a file.
            Nothing is downloaded, no weights are read, and no code in the folder is run.

    Raises:
        ValueError: the model is none of these, its config cannot be used, or the package
            transformers, which reads it, is missing.
    """
    if model in MODELS:
        return MODELS[model]()
    path = Path(model)
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise ValueError(
            f"estimate: model={model!r} is not allowed; allowed: {', '.join(MODELS)}, a folder "
            "with a config.json, or a transformers config file"
        )
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"estimate: model={model!r} is a transformers config, and the package transformers "
            "is not installed (pip install transformers)"
        ) from error
    try:
        # With trust_remote_code=False, code that the config names is not run, without a question.
        settings = transformers.AutoConfig.from_pretrained(
            config, local_files_only=True, trust_remote_code=False
        )
        names = getattr(settings, "architectures", None) or [""]
        kind: Any = getattr(transformers, names[0], None)
        known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        with torch.device("meta"):
            # Without a known class in the config, this is the model without a head.
            built = (
                kind(settings)
                if known
                else transformers.AutoModel.from_config(settings, trust_remote_code=False)
            )
    except Exception as error:  # of any kind, as a config of another's can fail anywhere
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"estimate: model={model!r} is not allowed: transformers cannot build it: {reason}"
        ) from error
    return {name: tuple(p.shape) for name, p in built.named_parameters() if p.requires_grad}
