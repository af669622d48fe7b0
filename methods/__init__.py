"""The training methods, one folder each, and what they share: contract, supervisor, registry, toolkit."""
