"""The small-model study: where Dynamic Boosted Annealing helps, and where it does not."""
