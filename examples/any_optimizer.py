# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny GPT-2 under DeepSpeed with any optimizer, on the matrices in ZeRO's shards.

deepspeed examples/any_optimizer.py --deepspeed_config ds_configs/ds_adapprox_zero3.json \
    --optimizer Muon --vectors AdamW --scope matrix --lr 0.01
"""

import argparse
import importlib
import json
from pathlib import Path

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import adapprox_ds
from adapprox_ds import MatrixViews

TEXT = Path(__file__).resolve().parent.parent / "README.md"
CONTEXT = 64


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class by its name in torch.optim, or by its full name, as in pytorch_optimizer.CAME."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module or "torch.optim"), attribute)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def state_bytes(state: object) -> int:
    """Bytes of the tensors in an optimizer's state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(map(state_bytes, parts))


def main() -> None:
    """Trains on the bytes of the README, and says what the optimizer's state takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", type=optimizer_class, default="Adafactor")
    parser.add_argument("--vectors", type=optimizer_class, help="for what is no matrix")
    parser.add_argument("--scope", default="partition", help='"matrix": whole matrices')
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is required, e.g. ds_configs/ds_adapprox.json")
    config = json.loads(Path(args.deepspeed_config).read_text())
    config.pop("optimizer", None)
    args.deepspeed_config = None

    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=256, n_embd=128, n_layer=2, n_head=4, n_positions=CONTEXT)
    shape.resid_pdrop = shape.embd_pdrop = shape.attn_pdrop = 0.0
    model = GPT2LMHeadModel(shape)
    blocks = list(model.transformer.h.named_parameters())
    others = [item for item in model.named_parameters() if not item[0].startswith("transformer.h.")]
    # Muon and its kind are for the blocks' matrices alone.
    groups = [{"params": blocks}, {"params": others, "vectors": args.vectors is not None}]
    optimizer = MatrixViews(
        args.optimizer, groups, lr=args.lr, vectors=args.vectors, scope=args.scope
    )
    engine, *_ = adapprox_ds.initialize(args, model, optimizer, config=config)

    text = torch.tensor(list(TEXT.read_bytes()))
    generator = torch.Generator().manual_seed(engine.global_rank)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (16,), generator=generator)
        batch = torch.stack([text[start : start + CONTEXT] for start in starts]).to(engine.device)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0 and step in (1, args.steps):
            print(f"step {step} loss {float(loss.detach()):.3f}", flush=True)
    if engine.global_rank == 0:
        count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        own = state_bytes(list(optimizer.state.values()))
        print(f"{own / count:.2f} bytes of optimizer state a parameter on this rank", flush=True)
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
