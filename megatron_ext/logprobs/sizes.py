"""How much of the vocabulary the log-prob head works on at once, and keeps. A plan of memory counts it too, without
torch."""

TILE = {"cpu": 2**22, "cuda": 2**27}  # scores at once
MAX_ROWS = 2**14  # tokens of a tile; more would leave too few columns for an efficient matmul
KEPT = {"cpu": 2**26, "cuda": 2**28}  # scores that forward may leave to backward, 4 bytes each


def kept_scores(tokens: int, columns: int, device: str) -> int:
    """Scores of so many tokens and columns that forward leaves to backward: all of them, or none."""
    return tokens * columns if tokens * columns <= KEPT[device] else 0
