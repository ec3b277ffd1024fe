"""How the bundled demo pair is made: corpus, tokenizer, batches, training step, export. Only `quire.models.train_demo` needs it."""
