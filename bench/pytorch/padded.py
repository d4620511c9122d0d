"""A training step as the published implementation of LEARN does it: Hugging Face's BertEncoder over histories that are padded
to 40, the adaptor at every position, all positions projected, DistributedDataParallel, AdamW.

Embeddings are handed over as f32 tensors, on a GPU in its memory: that the published code reads them as f64 from pickles and
copies them is not counted. Without
`transformers`, or with a version of it that knows them otherwise, the same layers of our own are used, and the result says so.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import measure

try:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder
except ImportError:
    BertEncoder = None


class OwnLayer(nn.Module):
    """One post-LN layer as BertEncoder has it."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.attended = (nn.Linear(hidden, hidden) for _ in range(4))
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.first, self.second = (nn.LayerNorm(hidden, eps=1e-12) for _ in range(2))

    def forward(self, x, mask):
        split = lambda y: y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)
        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        context = F.scaled_dot_product_attention(query, key, value, mask, self.dropout if self.training else 0.0)
        context = context.transpose(1, 2).flatten(2)
        x = self.first(F.dropout(self.attended(context), self.dropout, self.training) + x)
        narrow = self.narrow(F.gelu(self.wide(x)))
        return self.second(F.dropout(narrow, self.dropout, self.training) + x)


class OwnEncoder(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.layers = nn.ModuleList(OwnLayer(args.hidden, args.heads, args.dropout) for _ in range(args.layers))

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return (x,)


def encoder(args):
    """transformers' layers, or ours where there are none that take these settings and a mask."""
    if BertEncoder is None:
        return OwnEncoder(args)
    try:
        config = BertConfig(
            hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden, hidden_dropout_prob=args.dropout,
            attention_probs_dropout_prob=args.dropout, use_cache=False, attn_implementation="sdpa",
        )
        theirs = BertEncoder(config)
        with torch.no_grad():
            theirs(torch.zeros(1, 2, args.hidden), torch.ones(1, 1, 2, 2, dtype=torch.bool))[0]
        return theirs
    except Exception as error:  # whatever another version says of it
        print(f"padded.py: layers of our own, because of transformers: {error!r}", file=sys.stderr)
        return OwnEncoder(args)


class Padded(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.adaptor = nn.Linear(args.input_dim, args.hidden)
        self.encoder = encoder(args)
        self.projection = nn.Linear(args.hidden, args.input_dim)

    def forward(self, history, mask):
        hidden = self.encoder(self.adaptor(history), mask)[0]
        return F.normalize(self.projection(hidden), dim=-1)


class Inputs:
    """A batch as a collate function leaves it: padded at the end, positions and masks beside it."""

    def __init__(self, batch, args, device):
        rows = batch.rows.float()
        users, places = len(batch.lengths), iter(batch.place.split([*batch.lengths, batch.targets.numel()]))
        self.history = torch.zeros(users, args.history, args.input_dim)
        there = torch.zeros(users, args.history, dtype=torch.bool)
        for user, length in enumerate(batch.lengths):
            self.history[user, :length] = rows[next(places)]
            there[user, :length] = True
        causal = torch.ones(args.history, args.history, dtype=torch.bool).tril()
        # a padded position sees the first items, as its own key is masked; nothing is learned from it
        self.mask = causal & there[:, None, None, :]
        self.item = rows[next(places)]
        self.row_user, self.item_id, self.pairs = batch.row_user, batch.item_id, batch.pairs
        self.position = torch.tensor([position for _, position in batch.sampled])
        self.tokens = batch.tokens
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.to(device))


def train(rank, args, meeting):
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", init_method=f"file://{meeting}",
                            rank=rank, world_size=args.workers)
    model = Padded(args).to(device).train()
    model = DistributedDataParallel(model, device_ids=[rank] if args.device == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    share = slice(rank, None, args.workers)
    batches = [Inputs(measure.Batch(args, number, share), args, device) for number in range(args.batches)]

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        with measure.autocast(args):
            rows = model(batch.history, batch.mask)
            user = rows[batch.row_user, batch.position]
            loss = measure.info_nce(user, batch.item, batch.row_user, batch.item_id, batch.pairs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), measure.CLIP_NORM)
        optimizer.step()
        return loss

    seconds, loss = measure.timed(args, step, batches)
    if rank == 0:
        measure.show(args, "padded", seconds, loss, batches, workers=args.workers,
                     encoder="own" if isinstance(model.module.encoder, OwnEncoder) else "transformers")
    dist.destroy_process_group()


def main():
    parser = measure.arguments(__doc__)
    parser.add_argument("--workers", type=int, default=1, help="processes of DistributedDataParallel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        if args.workers == 1:
            train(0, args, meeting)
        else:
            torch.multiprocessing.spawn(train, (args, meeting), args.workers)


if __name__ == "__main__":
    sys.exit(main())
