"""An Amazon Reviews category as Parquet: minionerec_sequences.py DATA CATEGORY OUT

DATA is the folder `data/Amazon` of the public repository MiniOneRec, CATEGORY is `Industrial_and_Scientific` or
`Office_Products`. Its valid and test files hold windows of users: at most ten items and the one that follows. Windows
that overlap are joined to whole sequences. Writes OUT/interactions.parquet (user_id, item_id, ts = place in the
sequence) and OUT/items.parquet (item_id, title, brand), as configs/amazon-reviews.toml reads them.
"""

import ast
import csv
import json
import pathlib
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq

WINDOW = 10


def windows(path):
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield row["user_id"], (*ast.literal_eval(row["history_item_id"]), int(row["item_id"]))


def joined(start, others):
    """The longest sequence that begins with the window `start` and goes on window by window."""
    sequence, left = list(start), list(others)
    left.remove(start)
    while True:
        held = min(WINDOW, len(sequence))
        follows = [window for window in left if list(window[:-1]) == sequence[-held:]]
        if not follows:
            return sequence
        left.remove(follows[0])
        sequence.append(follows[0][-1])


def plain(text):
    """Without the commonest HTML entities and without repeated spaces."""
    return " ".join(re.sub(r"&(nbsp|reg|trade);", " ", text.replace("&#39;", "'")).split())


def main(data, category, out):
    data, out = pathlib.Path(data), pathlib.Path(out)
    users = {}
    for split in ("valid", "test"):
        (path,) = (data / split).glob(f"{category}*.csv")
        for user, window in windows(path):
            users.setdefault(user, []).append(window)
    by_number = sorted(users.items(), key=lambda user: int(user[0].lstrip("A")))
    sequences = [max((joined(start, own) for start in sorted(set(own), key=len)), key=len) for _, own in by_number]
    items = json.loads((data / "index" / f"{category}.item.json").read_text(encoding="utf-8"))
    rows = sorted(items, key=int)
    out.mkdir(parents=True, exist_ok=True)
    places = [(user, item, place) for user, own in enumerate(sequences) for place, item in enumerate(own)]
    columns = zip(("user_id", "item_id", "ts"), zip(*places, strict=True), strict=True)
    interactions = pa.table({name: pa.array(values, pa.int64()) for name, values in columns})
    pq.write_table(interactions, out / "interactions.parquet")
    texts = {field: [plain(items[row].get(field) or "") for row in rows] for field in ("title", "brand")}
    pq.write_table(pa.table({"item_id": pa.array(map(int, rows), pa.int64()), **texts}), out / "items.parquet")
    print(f"{category}: {len(sequences)} users, {len(rows)} items, {len(places)} interactions in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
