"""Commands on checkpoints: verify, convert, export, merge adapters."""
