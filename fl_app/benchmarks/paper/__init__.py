"""The paper's tables and figures, made again: `flowleak bench paper`."""
