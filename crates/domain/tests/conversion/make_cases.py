"""Writes cases.json: exposures, and what scikit-learn says of them. python make_cases.py [SEED]

AUC and log-loss are scikit-learn's, per user and over all; the expected calibration error is NumPy's histogram.
"""

import json
import pathlib
import sys

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score


def case(rng, users, count, ties):
    user = rng.integers(0, users, count)
    logit = rng.normal(0.0, 2.0, count)
    logit = np.round(logit) if ties else np.round(logit, 6)
    label = (rng.random(count) < 1.0 / (1.0 + np.exp(-0.5 * logit))).astype(int)
    probability = 1.0 / (1.0 + np.exp(-logit))
    both = [u for u in np.unique(user) if len(set(label[user == u])) == 2]
    single = [roc_auc_score(label[user == u], logit[user == u]) for u in both]
    weights = [int((user == u).sum()) for u in both]
    edges = np.linspace(0.0, 1.0, 11)
    predicted, _ = np.histogram(probability, edges, weights=probability)
    happened, _ = np.histogram(probability, edges, weights=label)
    return {
        "exposures": [[int(u), float(x), int(y)] for u, x, y in zip(user, logit, label)],
        "users": len(both),
        "auc": roc_auc_score(label, logit),
        "uauc": float(np.mean(single)),
        "wuauc": float(np.average(single, weights=weights)),
        "log_loss": log_loss(label, probability),
        "calibration": float(probability.mean() / label.mean()),
        "ece": float(np.abs(predicted - happened).sum() / count),
    }


rng = np.random.default_rng(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
cases = [case(rng, 5, 60, False), case(rng, 4, 80, True), case(rng, 30, 120, True)]
pathlib.Path(__file__).with_name("cases.json").write_text(json.dumps(cases) + "\n", encoding="utf-8")
