"""The slow twin of data/rows/order.py: reads row by row, with a counter for each source and each node of the tree."""

import hashlib
import json
import math
from fractions import Fraction

WORD = 2**64


def key(*parts):
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")


def bits(seed, n):
    """splitmix64 of state `seed` + n golden ratios."""
    x = (seed + n * 0x9E3779B97F4A7C15) % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


class Tree:
    """Draws one row after the other of a part of a mixture, whose leaves count what was drawn of them."""

    def __init__(self, small, large, share, seed):
        self.small, self.large, self.q, self.seed = small, large, share, seed
        self.draws, self.block, self.place, self.width, self.taken = 0, -1, 0, 0, []

    def next(self):
        if self.place == self.width:
            self._next_block()
        part = self.small if self.place in self.taken else self.large
        self.draws, self.place = self.draws + 1, self.place + 1
        return part if isinstance(part, str) else part.next()

    def _next_block(self):
        """ceil(1/q) draws, or what is left to the next exact number; some random ones are the smaller part's."""
        self.block, self.place = self.block + 1, 0
        self.width = min(math.ceil(1 / self.q), self.q.denominator - self.draws % self.q.denominator)
        count = self._rounded(self.draws + self.width, self.block + 1) - self._rounded(self.draws, self.block)
        self.taken = []
        for i in range(count):
            place = bits(self.seed + i + 1, self.block) * (self.width - i) // WORD
            for taken in sorted(self.taken):  # the so manieth of the places that are free
                place += place >= taken
            self.taken.append(place)

    def _rounded(self, draws, block):
        """draws q, up or down with the odds of its fraction."""
        return math.floor(self.q * draws + Fraction(bits(self.seed, block), WORD))


def tree(seed, first_row, shares):
    """The two smallest parts become one, until one is left; of equals the one with the first name."""
    parts = [(share, name, name) for name, share in shares.items()]
    while len(parts) > 1:
        parts.sort(key=lambda part: part[:2])
        (p, one, small), (q, two, large), *rest = parts
        node = Tree(small, large, p / (p + q), key(seed, first_row, len(rest), one, two))
        parts = [*rest, (p + q, min(one, two), node)]
    return parts[0][2]


class Reader:
    """A run that holds for each source the rows that it has read of it, and reads the next row of the run."""

    def __init__(self, seed):
        self.seed, self.row, self.read = seed, 0, {}
        self.contents = {}  # of what `read` counts
        self.mixture = self.source = None

    def mix(self, shares, sizes, contents):
        """Reads this mixture from here on; goes on in the one that is read if it is the same."""
        for name, content in contents.items():
            if self.contents.get(name) != content:
                self.read[name], self.contents[name] = 0, content
        mixture = {name: (share, sizes[name], contents[name]) for name, share in shares.items()}
        if mixture != self.mixture:
            self.mixture, self.source = mixture, tree(self.seed, self.row, shares)
        self.sizes = sizes

    def next(self):
        """(source, epoch, how many of the epoch came before)."""
        name = self.source if isinstance(self.source, str) else self.source.next()
        drawn = self.read[name]
        self.read[name], self.row = drawn + 1, self.row + 1
        return name, *divmod(drawn, self.sizes[name])
