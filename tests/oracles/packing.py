"""Slow obvious twins of data/rows/packing.py: token by token, and by looking at every row."""

from itertools import pairwise


def concat(documents: list[list[int]], seq_len: int) -> list[list[list[int]]]:
    """Rows of pieces of tokens. Writes one token after the other; repeats the last one where a row is full."""
    size = seq_len + 1
    rows: list[list[list[int]]] = []
    for document in documents:
        if not rows or sum(map(len, rows[-1])) > size - 2:
            rows.append([])
        rows[-1].append([])
        for previous, token in pairwise([None, *document]):
            if sum(map(len, rows[-1])) == size:
                rows.append([[previous]])
            rows[-1][-1].append(token)
    return rows


def best_fit(documents: list[list[int]], seq_len: int) -> list[list[list[int]]]:
    """Rows of pieces: longest piece first, each into the fullest row that has room, the first of equally full ones."""
    size = seq_len + 1
    pieces = []
    for document in documents:
        while len(document) > size:
            pieces.append(document[:size])
            document = document[size - 1 :]
        pieces.append(document)
    rows: list[list[list[int]]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        fitting = [row for row in rows if sum(map(len, row)) + len(piece) <= size]
        if not fitting:
            rows.append([])
            fitting = [rows[-1]]
        max(fitting, key=lambda row: sum(map(len, row))).append(piece)
    return rows
