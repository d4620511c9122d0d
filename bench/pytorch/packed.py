"""A training step as a careful engineer writes it by hand in PyTorch: no padded token.

Histories lie one behind the other, shortest first, so that those of equal length are a dense block: attention needs no mask. The
adaptor sees each item of the batch once; the last layer and the projection only the positions that the loss is about;
queries, keys and values come from one product; AdamW is fused. On a GPU attention is flash attention over cumulative
lengths (bf16), and the dense parts of a layer are compiled.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import measure


class Layer(nn.Module):
    def __init__(self, args):
        super().__init__()
        hidden = args.hidden
        self.heads, self.dropout = args.heads, args.dropout
        self.qkv, self.attended = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.first, self.second = (nn.LayerNorm(hidden, eps=1e-12) for _ in range(2))
        if args.compile:
            self.after = torch.compile(self.after, dynamic=True)

    def after(self, context, x):
        """From the heads' values to the layer's output, [n, D]."""
        x = self.first(F.dropout(self.attended(context), self.dropout, self.training) + x)
        narrow = self.narrow(F.gelu(self.wide(x)))
        return self.second(F.dropout(narrow, self.dropout, self.training) + x)

    def forward(self, x, packing, last):
        context = packing.attend(self.qkv(x), self.heads, self.dropout if self.training else 0.0, last)
        return self.after(context, x[packing.kept] if last else x)


class Packing:
    """Where the tokens of a batch are, on the device."""

    def __init__(self, batch, device, flash):
        order = sorted(range(len(batch.lengths)), key=lambda user: batch.lengths[user])
        lengths = [batch.lengths[user] for user in order]
        self.flash = flash
        places = batch.place.split([*batch.lengths, batch.targets.numel()])
        self.token = torch.cat([places[user] for user in order]).to(device)
        self.target = places[-1].to(device)
        # neighbours of equal length: how many, how long
        self.runs = []
        for length in lengths:
            if self.runs and self.runs[-1][1] == length:
                self.runs[-1][0] += 1
            else:
                self.runs.append([1, length])
        kept, row_user, start = [], [], 0
        for user, length in zip(order, lengths):
            rows = range(start + max(0, length - measure.SAMPLED), start + length)
            kept.extend(rows)
            row_user.extend([user] * len(rows))
            start += length
        self.kept = torch.tensor(kept, device=device)
        self.row_user = torch.tensor(row_user, device=device)
        bounds = lambda counts: torch.tensor([0, *counts]).cumsum(0).int().to(device)
        self.longest = max(lengths)
        self.keys, self.queries = bounds(lengths), bounds([min(length, measure.SAMPLED) for length in lengths])

    def attend(self, qkv, heads, dropout, last):
        """[T, 3 D] to [T, D], or to [R, D] of the kept positions in the last layer."""
        if self.flash:
            query, key, value = qkv.view(len(qkv), 3, heads, -1).unbind(1)
            query, bounds, most = (query[self.kept], self.queries, measure.SAMPLED) if last else (query, self.keys, self.longest)
            # causal from the last key on, so the newest positions of a history see all that is before them
            context = torch.ops.aten._flash_attention_forward(
                query, key, value, bounds, self.keys, most, self.longest, dropout, True, False)[0]
            return context.flatten(1)
        parts, blocks = [], qkv.split([count * length for count, length in self.runs])
        for block, (count, length) in zip(blocks, self.runs):
            query, key, value = block.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            cut = length - measure.SAMPLED if last and length > measure.SAMPLED else 0
            mask = None
            if cut:
                query = query[:, :, cut:]
                mask = torch.ones(length - cut, length, dtype=torch.bool, device=qkv.device).tril(cut)
            context = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None)
            parts.append(context.transpose(1, 2).reshape(count * (length - cut), -1))
        return torch.cat(parts)


class Packed(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.adaptor = nn.Linear(args.input_dim, args.hidden)
        self.layers = nn.ModuleList(Layer(args) for _ in range(args.layers))
        self.projection = nn.Linear(args.hidden, args.input_dim)

    def forward(self, rows, packing):
        x = self.adaptor(rows)[packing.token]
        for number, layer in enumerate(self.layers):
            x = layer(x, packing, number == len(self.layers) - 1)
        return F.normalize(self.projection(x), dim=-1)


class Inputs:
    """A batch as a prefetching loader leaves it; the history's items come first among the unique ones."""

    def __init__(self, batch, device, flash):
        self.packing = Packing(batch, device, flash)
        # what only targets need does not go through the adaptor
        self.used, token = torch.unique(self.packing.token, return_inverse=True)
        self.packing.token = token
        self.rows = batch.rows.pin_memory() if device.type == "cuda" else batch.rows
        self.item_id, self.pairs, self.tokens = batch.item_id.to(device), batch.pairs, batch.tokens


def main():
    parser = measure.arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="compile the dense parts; always on a GPU")
    args = parser.parse_args()
    args.compile = args.compile or args.device == "cuda"
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    device = torch.device(args.device)
    model = Packed(args).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    flash = args.device == "cuda" and args.precision == "bf16"
    batches = [Inputs(measure.Batch(args, number), device, flash) for number in range(args.batches)]

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        rows = batch.rows.to(device, non_blocking=True)
        packing = batch.packing
        with measure.autocast(args):
            user = model(rows[batch.used].to(torch.bfloat16 if args.precision == "bf16" else torch.float32), packing)
            item = rows[packing.target].to(user.dtype)
            loss = measure.info_nce(user, item, packing.row_user, batch.item_id, batch.pairs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), measure.CLIP_NORM, foreach=True)
        optimizer.step()
        return loss

    seconds, loss = measure.timed(args, step, batches)
    measure.show(args, "packed", seconds, loss, batches, compiled=args.compile)


if __name__ == "__main__":
    sys.exit(main())
