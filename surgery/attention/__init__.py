"""What attention looks like in a graph, and what it reads: KV caches, sequence lengths, rows."""
