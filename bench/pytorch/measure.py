"""What padded.py and packed.py have in common: flags, made-up batches, the loss, and the loop that is timed.

A batch is like that of `learn-worker bench step --item-tower content --output-dim INPUT_DIM --targets 10`: histories
of given lengths, the newest 10 positions of each against 10 targets, which are their content embeddings; InfoNCE against
the targets of all other users of the batch.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

import lengths

SAMPLED = 10
LOGIT_SCALE = 20.0
CLIP_NORM = 1.0


def arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="threads of one operation; 0 = PyTorch's choice")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32", help="bf16: autocast")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--input-dim", type=int, default=4096, help="of content embeddings, users and items")
    parser.add_argument("--batch", type=int, default=64, help="users of a step, over all workers")
    parser.add_argument("--history", type=int, default=40, help="longest history, and what short ones are padded to")
    parser.add_argument("--lengths", default="amazon", help="history lengths: amazon, or a file with a JSON array")
    parser.add_argument("--items", type=int, default=100_000, help="items of the catalogue, all as popular")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--batches", type=int, default=4, help="different batches, which the steps take in turn")
    parser.add_argument("--repetitions", type=int, default=5, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--json", action="store_true")
    return parser


class Batch:
    """Item numbers and content embeddings of one step; nothing is on the device yet."""

    def __init__(self, args, number, share=slice(None)):
        generator = torch.Generator().manual_seed(1000 + number)
        known = lengths.load(args.lengths, args.history)
        users = [known[(number * args.batch + user) % len(known)] for user in range(args.batch)]
        draw = lambda *size: torch.randint(args.items, size, generator=generator)
        histories = [draw(length) for length in users][share]
        targets = draw(args.batch, SAMPLED)[share]
        self.histories, self.targets = histories, targets
        self.lengths = [len(history) for history in histories]
        self.unique, self.place = torch.unique(torch.cat([*histories, targets.flatten()]), return_inverse=True)
        rows = torch.randn(len(self.unique), args.input_dim, generator=generator)
        self.rows = F.normalize(rows, dim=1).half()
        self.tokens = sum(self.lengths)
        # newest positions of each user, oldest first: (user, position)
        self.sampled = [(user, position) for user, length in enumerate(self.lengths)
                        for position in range(max(0, length - SAMPLED), length)]
        self.row_user = torch.tensor([user for user, _ in self.sampled])
        self.item_id = targets.flatten()
        self.pairs = len(self.sampled) * SAMPLED


def info_nce(user, item, row_user, item_id, pairs):
    """Rows [R, d] against items [M, d]; items of one user are neighbours. Both are normalised already."""
    scores = (user @ item.T).float() * LOGIT_SCALE
    targets = item_id.view(-1, SAMPLED)
    own_id = (targets[:, :, None] == item_id).any(1)
    lse = scores.masked_fill(own_id[row_user], float("-inf")).logsumexp(1)
    places = row_user[:, None] * SAMPLED + torch.arange(SAMPLED, device=row_user.device)
    return F.softplus(lse[:, None] - scores.gather(1, places)).sum() / pairs


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def timed(args, step, batches):
    """Seconds of each measured step, and the last loss."""
    seconds, loss = [], None
    for repetition in range(args.warmup + args.repetitions):
        if args.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step(batches[repetition % len(batches)])
        if args.device == "cuda":
            torch.cuda.synchronize()
        if repetition >= args.warmup:
            seconds.append(time.perf_counter() - started)
    return seconds, float(loss.detach())


def show(args, name, seconds, loss, batches, **more):
    median = statistics.median(seconds)
    result = {
        "script": name, "torch": torch.__version__, "device": args.device, "precision": args.precision,
        "threads": torch.get_num_threads(), "users": args.batch,
        "tokens": sum(batch.tokens for batch in batches) / len(batches), "seconds": seconds,
        "median_users_per_second": args.batch / median, "loss": loss, **more,
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{name}: {result['median_users_per_second']:.1f} users/s in the median of {len(seconds)} steps "
              f"({args.batch / max(seconds):.1f} to {args.batch / min(seconds):.1f}); loss {loss:.4f}")
