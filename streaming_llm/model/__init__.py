"""All that knows transformers' models: wiring one and undoing it, and what is to be read of one."""
