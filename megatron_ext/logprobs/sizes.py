"""How much of the vocabulary the log-prob head works on at once. A plan of memory counts it too, without torch."""

TILE = {"cpu": 2**22, "cuda": 2**27}  # scores at once
MAX_ROWS = 2**14  # tokens of a tile; more would leave too few columns for an efficient matmul
