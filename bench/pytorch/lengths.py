"""History lengths of made-up users, in the proportions of Amazon's reviews; `lengths.py` prints them as a JSON array."""

import json

# Parts of 2^20 of the users, and the items that a user at this place has at most.
ITEMS = [(0, 5), (104_858, 5), (524_288, 7), (943_718, 15), (1_038_090, 40), (1 << 20, 50)]
GOLDEN = 0x9E3779B97F4A7C15


def amazon(user):
    """10 % of the users have 5 items, half at most 7, 90 % at most 15, 99 % at most 40; two thirds are the history.

    >>> [amazon(user) for user in range(12)]
    [6, 4, 10, 4, 4, 8, 4, 18, 6, 4, 8, 4]
    """
    place = ((user + 1) * GOLDEN) % (1 << 64) >> 44
    above = next(number for number, (share, _) in enumerate(ITEMS) if place < share)
    (low, least), (high, most) = ITEMS[above - 1], ITEMS[above]
    items = least + (most - least) * (place - low) // (high - low)
    return -(-2 * items // 3)


def load(name, longest):
    """Lengths which users take in turn: `amazon`, or a JSON array in a file."""
    if name == "amazon":
        lengths = [amazon(user) for user in range(1 << 16)]
    else:
        with open(name) as file:
            lengths = json.load(file)
    return [min(length, longest) for length in lengths]


if __name__ == "__main__":
    print(json.dumps(load("amazon", 40)))
