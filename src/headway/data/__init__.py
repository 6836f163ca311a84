"""Where examples come from (`sources`, `builtin`) and how they become batches (`batches`, the only user of torch)."""
