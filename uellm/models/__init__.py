"""Checkpoints as every service reads them: files, needs, tokenizer. No torch, no transformers."""
