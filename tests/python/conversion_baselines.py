"""Conversion metrics of predictions without training: conversion_baselines.py DATASET [SPLIT]

Reads a dataset with labels (no other program needed) and predicts each held-out target's conversion by (1) the prior, the
share of conversions in the training sequences, (2) the item's mean training label, drawn to the prior as if it had been
seen five times more, and (3) the same with the user's history instead. Prints the metrics of each as JSON; they are defined in
crates/domain/src/conversion.rs.
"""

import json
import pathlib
import sys

import numpy as np
import pyarrow as pa

STRENGTH = 5.0


def table(dataset, split):
    files = sorted((pathlib.Path(dataset) / "sequences").glob(f"{split}-*.arrow"))
    return pa.concat_tables(pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files)


def auc(score, label):
    positives, negatives = int(label.sum()), int((1 - label).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2.0)[inverse]
    return (ranks[label == 1].sum() - positives * (positives + 1) / 2.0) / (positives * negatives)


def metrics(user, score, label):
    single = [(auc(score[user == u], label[user == u]), int((user == u).sum())) for u in np.unique(user)]
    single = [(value, count) for value, count in single if value is not None]
    bins = np.minimum((score * 10).astype(int), 9)
    gaps = np.bincount(bins, weights=score - label, minlength=10)
    clipped = np.clip(score, 1e-12, 1.0 - 1e-12)
    return {
        "auc": auc(score, label),
        "uauc": float(np.mean([value for value, _ in single])) if single else None,
        "wuauc": float(np.average([v for v, _ in single], weights=[c for _, c in single])) if single else None,
        "log_loss": float(-np.mean(np.log(np.where(label == 1, clipped, 1.0 - clipped)))),
        "calibration": float(score.sum() / label.sum()),
        "ece": float(np.abs(gaps).sum() / len(label)),
    }


def main(dataset, split="test"):
    train = table(dataset, "train")
    items = train["items"].combine_chunks().flatten().to_numpy()
    labels = train["labels"].combine_chunks().flatten().to_numpy().astype(float)
    prior = labels.mean()
    rows = table(dataset, split)
    targets = rows["targets"].combine_chunks()
    item, label = targets.flatten().to_numpy(), rows["target_labels"].combine_chunks().flatten().to_numpy().astype(float)
    length = np.diff(targets.offsets.to_numpy())
    user = np.repeat(np.arange(len(rows)), length)
    size = 1 + max(items.max(), item.max())
    count, sum_ = np.bincount(items, minlength=size), np.bincount(items, weights=labels, minlength=size)
    of_item = (sum_ + STRENGTH * prior) / (count + STRENGTH)
    history = [np.asarray(labels) for labels in rows["history_labels"].to_pylist()]
    of_user = np.array([(h.sum() + STRENGTH * prior) / (len(h) + STRENGTH) for h in history])
    predictions = {"prior": np.full(len(label), prior), "item_mean": of_item[item], "user_mean": of_user[user]}
    found = {name: metrics(user, score, label) for name, score in predictions.items()}
    print(json.dumps({"exposures": len(label), "conversions": int(label.sum()), **found}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
