"""The reference that both generators of golden cases share: towers on Hugging Face's BertEncoder, and the files' layout.

README.md beside this file describes both.
"""
import argparse
import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder

SCALE = 20.0
EPS = 1e-12
GAP_BUCKETS = 64


class Towers(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        config = BertConfig(
            hidden_size=c["hidden"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
            intermediate_size=4 * c["hidden"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=EPS,
        )
        config._attn_implementation = "eager"
        self.summary_encoder = BertEncoder(config)
        if c["input_dim"]:
            self.adaptor = torch.nn.Linear(c["input_dim"], c["hidden"])
        if c.get("item_input"):
            self.id_embedding = torch.nn.Embedding(c["vocab"], c["hidden"])
        self.mlp = torch.nn.Sequential(torch.nn.Linear(c["hidden"], c["output_dim"]))
        self.decay = c.get("residual_decay", 1.0)
        if c.get("residual"):
            self.residual = torch.nn.Linear(c["input_dim"], c["output_dim"], bias=False)
        if c.get("cvr"):
            self.cvr = torch.nn.Sequential(
                torch.nn.Linear(2 * c["output_dim"], 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        if c.get("position_embedding"):
            self.position_embedding = torch.nn.Embedding(c["hist"], c["hidden"])
        if c.get("time_embedding"):
            self.time_embedding = torch.nn.Embedding(GAP_BUCKETS, c["hidden"])

    def base(self, x, mean):
        """x [B, L, input_dim] -> [B, L, output_dim]: each position's own projected content, or the decayed mean up to it."""
        if not hasattr(self, "residual"):
            return 0.0
        own = F.normalize(x, dim=-1)
        if not mean:
            return self.residual(own)
        means = []
        for p in range(x.shape[1]):
            weights = torch.tensor([self.decay ** (p - j) for j in range(p + 1)])
            means.append((weights[None, :, None] * own[:, : p + 1]).sum(1) / weights.sum())
        return self.residual(torch.stack(means, dim=1))

    def read(self, x, ids):
        """content x [B, L, input_dim] and item ids [B, L] -> [B, L, hidden]."""
        parts = []
        if hasattr(self, "adaptor"):
            parts.append(self.adaptor(x))
        if hasattr(self, "id_embedding"):
            parts.append(self.id_embedding(ids))
        return sum(parts)

    def places(self, h, lengths, times, user):
        """Adds what says where and when: h [B, L, hidden], times [B, L] or None."""
        rows = []
        for i, length in enumerate(lengths.tolist()):
            columns = []
            for p in range(h.shape[1]):
                vector = h[i, p]
                if user and p < length and hasattr(self, "position_embedding"):
                    vector = vector + self.position_embedding.weight[length - 1 - p]
                if times is not None and 0 < p < length:
                    gap = int(times[i, p] - times[i, p - 1])
                    # at once, then [1, 2), [2, 4), [4, 8), ...
                    vector = vector + self.time_embedding.weight[gap.bit_length()]
                columns.append(vector)
            rows.append(torch.stack(columns))
        return torch.stack(rows)

    def encode(self, x, ids, lengths, causal=True, user=False, times=None):
        """x [B, L, input_dim], ids [B, L], lengths [B], times [B, L] -> L2-normalised [B, L, output_dim]."""
        b, n = ids.shape
        pos = torch.arange(n)
        key_ok = (pos[None, :] < lengths[:, None])[:, None, None, :].expand(b, 1, n, n)
        look = (pos[None, :] <= pos[:, None]) if causal else torch.eye(n, dtype=torch.bool)
        allowed = key_ok & look[None, None]
        # a padded query row attends to itself so that no row is empty; its output is never used
        allowed = allowed | torch.eye(n, dtype=torch.bool)[None, None]
        bias = torch.zeros(b, 1, n, n, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min)
        h = self.places(self.read(x, ids), lengths, times if causal else None, user)
        h = self.summary_encoder(h, attention_mask=bias).last_hidden_state
        return F.normalize(self.mlp(h) + self.base(x, user), dim=-1)


def mix(value):
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of the next state."""
    word = (1 << 64) - 1
    z = (value + 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def item_code(item, dimensions):
    """The history code of an item: the signs of a hash of its number, divided by sqrt(dimensions)."""
    name = b"history code"
    text = mix(len(name))
    for start in range(0, len(name), 8):
        text = mix(text ^ int.from_bytes(name[start:start + 8], "big"))
    state = 0x6C6561726E5F7631
    for part in (text, item):
        state = mix(state ^ mix(part))
    signs = []
    while len(signs) < dimensions:
        state = (state + 0x9E3779B97F4A7C15) % (1 << 64)
        word = mix(state)
        signs += [1.0 if word >> bit & 1 else -1.0 for bit in range(64)]
    return torch.tensor(signs[:dimensions]) / dimensions ** 0.5


def coded(c, embedded, ids, user):
    """Adds the history code's dimensions: embedded [B, L, d], ids [B, L] -> [B, L, d + K]."""
    if not c.get("history_code"):
        return embedded
    rows = []
    for items in ids.tolist():
        own = [item_code(item, c["history_code"]) for item in items]
        if user:
            own = [-c["history_code_weight"] * sum(item_code(item, c["history_code"]) for item in set(items[: p + 1]))
                   for p in range(len(items))]
        rows.append(torch.stack(own))
    return torch.cat([embedded, torch.stack(rows)], dim=-1)


def draw_times(c, ids):
    """Ascending times beside ids [B, L], from seconds to years apart and now and then at once; None unless they are read."""
    if not c.get("time_embedding"):
        return None
    gaps = torch.randint(0, 2, ids.shape) * 2 ** torch.randint(0, 26, ids.shape)
    return 1_700_000_000 + gaps.cumsum(1)


def file(c, m, tensors, log_scale=None):
    """The tensors and the metadata of a case: what it holds already, and parameters with their gradients."""
    tensors = dict(tensors)
    named = list(m.named_parameters())
    if log_scale is not None and log_scale.requires_grad:
        named.append(("logit_scale", log_scale))
    for name, p in named:
        tensors["param." + name] = p.data
        tensors["grad." + name] = p.grad if p.grad is not None else torch.zeros_like(p)
    for name, p in m.named_buffers():
        tensors["param." + name], tensors["grad." + name] = p, torch.zeros_like(p)
    meta = dict({"position_embedding": "none"}, **{k: v for k, v in c.items() if k not in ("users", "vocab")})
    meta.update(logit_scale=SCALE, layer_norm_eps=EPS)
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}, {"config": json.dumps(meta, sort_keys=True)}


def write(description, cases, make):
    """Writes the cases of the command line's seed into its folder."""
    a = argparse.ArgumentParser(description=description)
    a.add_argument("out", type=pathlib.Path)
    a.add_argument("--seed", type=int, default=1)
    args = a.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    for n, (name, c) in enumerate(cases):
        torch.manual_seed(args.seed * 1000 + n)
        tensors, meta = make(c)
        save_file(tensors, args.out / f"{name}.safetensors", metadata=meta)
        print(f"{name}: loss {tensors['out.loss'].item():.12f}")
