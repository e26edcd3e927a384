"""The paper's regime: a pretrained model, domain question answering, and general benchmarks to forget."""
