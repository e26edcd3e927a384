"""What tests share: inputs, matrices of cases, oracles, processes. No test is here, and no test imports another."""
