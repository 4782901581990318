"""The GenAI folder: its configuration, tokenizer files, manifest and model card, and how it is built."""
