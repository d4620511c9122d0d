"""Writes a small made-up catalogue: interactions.csv, items.csv and vectors.npy (one row per item, in items' order).

Users walk along a ring of items and like every third one, so that there is something to learn. usage: make_data.py FOLDER
"""

import math
import pathlib
import random
import struct
import sys

USERS, ITEMS, LENGTH, DIM = 256, 96, 12, 32

folder = pathlib.Path(sys.argv[1])
draw = random.Random(7)

with open(folder / "interactions.csv", "w") as file:
    file.write("user_id,item_id,timestamp,liked\n")
    for user in range(USERS):
        item, time = draw.randrange(ITEMS), 0
        for _ in range(LENGTH):
            # from a second to half a year apart
            time += 2 ** draw.randrange(24)
            file.write(f"u{user},i{item},{time},{int(item % 3 == user % 3)}\n")
            item = (item + draw.choice([1, 1, 1, 2, 3])) % ITEMS

with open(folder / "items.csv", "w") as file:
    file.write("item_id,title\n")
    file.writelines(f"i{item},Item number {item}\n" for item in range(ITEMS))

header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({ITEMS}, {DIM}), }}"
header += " " * (63 - (len(header) + 10) % 64) + "\n"
with open(folder / "vectors.npy", "wb") as file:
    file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
    for item in range(ITEMS):
        angle = 2 * math.pi * item / ITEMS
        row = [math.cos(angle * (1 + d // 2)) if d % 2 else math.sin(angle * (1 + d // 2)) for d in range(DIM)]
        norm = math.sqrt(sum(x * x for x in row))
        file.write(struct.pack(f"<{DIM}f", *(x / norm for x in row)))
