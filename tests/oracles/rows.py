"""The slow obvious twin of data/rows/row.py: from pieces of tokens and weights to what the model sees."""

import itertools


def row(pieces: list[list[int]], weights: list[list[float]], seq_len: int) -> dict[str, list[float]]:
    """Pads pieces to seq_len + 1 and shifts by one; a target counts only if it is in the segment of its input."""
    places = [
        (token, segment, position, weight)
        for segment, (piece, of_piece) in enumerate(zip(pieces, weights, strict=True), 1)
        for position, (token, weight) in enumerate(zip(piece, of_piece, strict=True))
    ]
    places += [(0, 0, 0, 0.0)] * (seq_len + 1 - len(places))
    out: dict[str, list[float]] = {k: [] for k in ("tokens", "targets", "weights", "segment_ids", "positions")}
    for (token, segment, position, _), (target, its_segment, _, weight) in itertools.pairwise(places):
        out["tokens"].append(token)
        out["targets"].append(target)
        out["weights"].append(weight if segment == its_segment != 0 else 0.0)
        out["segment_ids"].append(segment)
        out["positions"].append(position)
    return out
