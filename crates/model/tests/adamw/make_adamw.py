#!/usr/bin/env python3
"""Write the AdamW case that the optimizer's tests compare with: torch.optim.AdamW in float64 and float32.

    python3 make_adamw.py OUT_FILE

One weight (decays) and one bias (does not). Tensors: `KIND.start.NAME`, `KIND.gradient.STEP.NAME`,
`KIND.value.STEP.NAME` after each step, `KIND.exp_avg.NAME` and `KIND.exp_avg_sq.NAME` after the last.
Needs: torch, safetensors (both from PyPI).
"""
import sys

import torch
from safetensors.torch import save_file

SETTINGS = dict(betas=(0.9, 0.95), eps=1e-6)
DECAY = 0.3
RATES = [1e-2, 3e-2, 2e-2, 5e-3, 1e-3, 0.0]


def main():
    torch.manual_seed(11)
    tensors = {}
    start = {"a.weight": torch.randn(3, 5, dtype=torch.float64), "b.bias": torch.randn(4, dtype=torch.float64)}
    gradients = [{name: torch.randn_like(value) for name, value in start.items()} for _ in RATES]
    for kind in (torch.float64, torch.float32):
        label = {torch.float64: "f64", torch.float32: "f32"}[kind]
        values = {name: torch.nn.Parameter(value.to(kind)) for name, value in start.items()}
        groups = [
            {"params": [values["a.weight"]], "weight_decay": DECAY},
            {"params": [values["b.bias"]], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1.0, **SETTINGS)
        for name, value in values.items():
            tensors[f"{label}.start.{name}"] = value.data.clone()
        for step, rate in enumerate(RATES):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for name, value in values.items():
                value.grad = gradients[step][name].to(kind)
                tensors[f"{label}.gradient.{step}.{name}"] = value.grad.clone()
            optimizer.step()
            for name, value in values.items():
                tensors[f"{label}.value.{step}.{name}"] = value.data.clone()
        for name, value in values.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{label}.{moment}.{name}"] = optimizer.state[value][moment].clone()
    save_file(tensors, sys.argv[1])


if __name__ == "__main__":
    main()
