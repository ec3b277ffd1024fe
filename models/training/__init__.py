"""How the bundled pair and its head are made: corpus, tokenizer, batches, steps, export. For `train_demo` and `train_eagle`."""
