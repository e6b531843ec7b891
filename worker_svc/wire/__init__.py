"""Between bytes, messages of the contract and our own types: the only place that knows all three."""
