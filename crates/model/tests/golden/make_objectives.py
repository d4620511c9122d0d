#!/usr/bin/env python3
"""Write golden cases for the objectives besides the published one.

Towers and layout are those of make_golden.py; README.md says what is added. The losses are spelled out row by row.

    python3 make_objectives.py OUT_DIR [--seed 1]

Needs: torch, transformers, safetensors (all from PyPI).
"""
import math

import torch
import torch.nn.functional as F

from reference import SCALE, Towers, file, write

# What decides how a case is drawn, and not what it is.
DRAWN = ("hist", "nh", "nt", "uniform", "logq")
SHAPE = dict(layers=1, heads=2, hidden=16, input_dim=16, output_dim=8, users=5, hist=6, nh=4, nt=3, vocab=23)
CASES = [
    ("softmax_causal", dict(SHAPE, kind="full_softmax", pairs="all_action", item_tower="causal", learn_logit_scale=True)),
    ("softmax_per_item", dict(SHAPE, kind="full_softmax", pairs="next", item_tower="per_item")),
    ("softmax_content", dict(SHAPE, output_dim=16, kind="full_softmax", pairs="next", item_tower="content", learn_logit_scale=True)),
    ("next_causal", dict(SHAPE, kind="next_item", pairs="next", item_tower="causal")),
    ("next_content", dict(SHAPE, output_dim=16, kind="next_item", pairs="next", item_tower="content")),
    ("uniform_per_item", dict(SHAPE, kind="dense_all_action", pairs="all_action", item_tower="per_item", uniform=7)),
    ("uniform_logq", dict(SHAPE, kind="next_item", pairs="next", item_tower="per_item", uniform=7, logq=True, learn_logit_scale=True)),
    ("logq", dict(SHAPE, kind="dense_all_action", pairs="all_action", item_tower="causal", logq=True)),
    ("softmax_content_id", dict(SHAPE, kind="full_softmax", pairs="next", item_tower="per_item", item_input="content_id")),
    ("softmax_id", dict(SHAPE, input_dim=0, kind="full_softmax", pairs="all_action", item_tower="causal", item_input="id")),
]


def samples(c):
    """History, sampled positions, and the targets with their sampled positions, per user."""
    out = []
    for _ in range(c["users"]):
        length = int(torch.randint(2, c["hist"] + 2, (1,)))
        items = torch.randint(0, c["vocab"], (length,))
        if c["pairs"] == "next":
            history = items[:-1]
            k = min(c["nh"], len(history))
            rows = torch.sort(torch.randperm(len(history))[:k]).values
            out.append((history, rows, items[rows + 1], torch.arange(k)))
        else:
            target = torch.randint(0, c["vocab"], (int(torch.randint(1, c["nt"] + 2, (1,))),))
            rows = torch.sort(torch.randperm(length)[: min(c["nh"], length)]).values
            columns = torch.sort(torch.randperm(len(target))[: min(c["nt"], len(target))]).values
            out.append((items, rows, target, columns))
    return out


def alone(m, c, table, ids):
    """Items as sequences of one: [n, output_dim]."""
    if c["item_tower"] == "content":
        return F.normalize(table[ids], dim=-1)
    return m.encode(table[ids][:, None], ids[:, None], torch.ones(len(ids), dtype=torch.long))[:, 0]


def towers(m, c, table, users):
    """User rows and target rows, one tensor per user."""
    rows, targets = [], []
    for history, positions, target, columns in users:
        rows.append(m.encode(table[history][None], history[None], torch.tensor([len(history)]), user=True)[0, positions])
        if c["item_tower"] == "causal" and c["pairs"] == "all_action":
            targets.append(m.encode(table[target][None], target[None], torch.tensor([len(target)]))[0, columns])
        else:
            targets.append(alone(m, c, table, target[columns]))
    return rows, targets


def pairs_of(c, rows, columns):
    """(row, target) numbers of one user."""
    if c["pairs"] == "next":
        return [(n, n) for n in range(rows)]
    return [(j, k) for j in range(rows) for k in range(columns)]


def full_softmax(c, rows, users, catalogue, scale):
    losses, correct = [], 0
    for mine, (_, positions, target, columns) in zip(rows, users):
        for j, k in pairs_of(c, len(positions), len(columns)):
            scores = scale * catalogue @ mine[j]
            item = target[columns[k]]
            losses.append(-F.log_softmax(scores, 0)[item])
            correct += int(scores.argmax() == item)
    return torch.stack(losses).mean(), correct


def in_batch(c, rows, targets, users, scale, uniform, correction):
    """`uniform` is (ids, embeddings); `correction` is subtracted from the scores, by item id."""
    ids = [target[columns] for _, _, target, columns in users]
    losses, correct = [], 0
    for i, mine in enumerate(rows):
        own = set(ids[i].tolist())
        others = [(int(n), e) for z in range(len(users)) if z != i for n, e in zip(ids[z], targets[z])]
        others += [(int(n), e) for n, e in zip(*uniform)]
        others = [(n, e) for n, e in others if n not in own]
        for j, k in pairs_of(c, len(mine), len(ids[i])):
            score = scale * mine[j] @ targets[i][k] - correction[ids[i][k]]
            negatives = [scale * mine[j] @ e - correction[n] for n, e in others]
            losses.append(torch.logsumexp(torch.stack([score] + negatives), 0) - score)
            correct += int(all(score > negative for negative in negatives))
    return torch.stack(losses).mean(), correct


def padded(lists, width, fill):
    out = torch.full((len(lists), width), fill, dtype=torch.long)
    for row, values in enumerate(lists):
        out[row, : len(values)] = values
    return out


def make(c):
    m = Towers(c)
    for p in m.parameters():
        torch.nn.init.normal_(p, mean=0.5 if p.shape == (c["hidden"],) else 0.0, std=0.15)
    log_scale = torch.tensor(math.log(SCALE), requires_grad=bool(c.get("learn_logit_scale")))
    table = F.normalize(torch.randn(c["vocab"], c["input_dim"]), dim=-1)
    users = samples(c)
    rows, targets = towers(m, c, table, users)
    tensors = {"in.table": table}
    if c["kind"] == "full_softmax":
        catalogue = alone(m, c, table, torch.arange(c["vocab"]))
        loss, correct = full_softmax(c, rows, users, catalogue, log_scale.exp())
        tensors["out.catalogue"] = catalogue
    else:
        uniform_id = torch.randint(0, c["vocab"], (c.get("uniform", 0),))
        uniform = (uniform_id, alone(m, c, table, uniform_id) if len(uniform_id) else [])
        correction = torch.zeros(c["vocab"])
        if len(uniform_id):
            tensors["in.uniform_id"] = uniform_id
        if c.get("logq"):
            counts = torch.randint(0, 30, (c["vocab"],))
            drawn = counts.clamp(min=1).double()
            batch = sum(len(columns) for *_, columns in users)
            correction = torch.log(batch * drawn / drawn.sum() + len(uniform_id) / c["vocab"])
            tensors["in.popularity"] = counts
        loss, correct = in_batch(c, rows, targets, users, log_scale.exp(), uniform, correction)
        tensors["out.item"] = torch.stack([F.pad(t, (0, 0, 0, c["nh"] - len(t))) for t in targets])
    loss.backward()
    wide = max(len(target) for _, _, target, _ in users)
    tensors.update({
        "in.hist_id": padded([u[0] for u in users], c["hist"] + 1, 0), "in.hist_len": torch.tensor([len(u[0]) for u in users]),
        "in.tar_id": padded([u[2] for u in users], wide, 0), "in.tar_len": torch.tensor([len(u[2]) for u in users]),
        "in.user_pos": padded([u[1] for u in users], c["nh"], -1), "in.item_pos": padded([u[3] for u in users], c["nh"], -1),
        "out.user": torch.stack([F.pad(r, (0, 0, 0, c["nh"] - len(r))) for r in rows]),
        "out.loss": loss.reshape(1), "out.correct": torch.tensor([float(correct)]),
    })
    kept = {k: v for k, v in c.items() if k not in DRAWN}
    return file(dict(kept, learn_logit_scale=log_scale.requires_grad), m, tensors, log_scale)


if __name__ == "__main__":
    write(__doc__, CASES, make)
