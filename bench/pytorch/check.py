"""Whether padded.py and packed.py are the same function: same weights, same batch, no dropout, f64; loss and gradients.

Both encoders of padded.py are tried if transformers is there. Exit code 0 if all agree.
"""

import sys
from types import SimpleNamespace

import torch

import measure
import packed
import padded

# of packed.py, and what padded.py calls them: BertEncoder's names and those of the own layers
NAMES = {
    "attended": ("attention.output.dense", "attended"),
    "wide": ("intermediate.dense", "wide"),
    "narrow": ("output.dense", "narrow"),
    "first": ("attention.output.LayerNorm", "first"),
    "second": ("output.LayerNorm", "second"),
}
PRODUCTS = (("attention.self.query", "attention.self.key", "attention.self.value"), ("query", "key", "value"))


def pairs(one, other, own):
    """Each parameter of packed.py with those of padded.py, which lie one below the other in it."""
    layers = other.encoder.layers if own else other.encoder.layer
    for name in ("adaptor", "projection"):
        for kind in ("weight", "bias"):
            yield f"{name}.{kind}", getattr(getattr(one, name), kind), [getattr(getattr(other, name), kind)]
    for number, (mine, theirs) in enumerate(zip(one.layers, layers)):
        for name, whats in {"qkv": PRODUCTS[own], **{name: (both[own],) for name, both in NAMES.items()}}.items():
            for kind in ("weight", "bias"):
                yield (f"{number}.{name}.{kind}", getattr(getattr(mine, name), kind),
                       [theirs.get_parameter(f"{what}.{kind}") for what in whats])


def loss(args, model, batch, one):
    if one:
        inputs = packed.Inputs(batch, torch.device("cpu"), flash=False)
        user = model(inputs.rows[inputs.used].double(), inputs.packing)
        item, row_user = inputs.rows[inputs.packing.target].double(), inputs.packing.row_user
    else:
        inputs = padded.Inputs(batch, args, torch.device("cpu"))
        rows, row_user = model(inputs.history.double(), inputs.mask), inputs.row_user
        user, item = rows[row_user, inputs.position], inputs.item.double()
    return measure.info_nce(user, item, row_user, inputs.item_id, inputs.pairs)


def main():
    args = SimpleNamespace(device="cpu", layers=2, hidden=24, heads=3, input_dim=16, dropout=0.0, batch=9, history=40,
                           lengths="amazon", items=60, compile=False)
    bert, worst = padded.BertEncoder, 0.0
    for own in (True, False):
        if not own and bert is None:
            continue
        padded.BertEncoder = None if own else bert
        torch.manual_seed(3)
        one, other = packed.Packed(args).double(), padded.Padded(args).double()
        with torch.no_grad():
            for _, mine, theirs in pairs(one, other, own):
                for part, values in zip(theirs, mine.split([len(part) for part in theirs])):
                    part.copy_(values)
        batch = measure.Batch(args, 0)
        losses = [loss(args, one, batch, True), loss(args, other, batch, False)]
        for value in losses:
            value.backward()
        gap = abs(losses[0] - losses[1]).item()
        for name, mine, theirs in pairs(one, other, own):
            gradient = torch.cat([part.grad for part in theirs])
            gap = max(gap, (mine.grad - gradient).abs().max().item())
        print(f"{'own layers' if own else 'transformers'}: largest difference {gap:.1e}")
        worst = max(worst, gap)
    return 0 if worst < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
