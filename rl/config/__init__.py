"""The typed configuration: files and overrides in, one `Config` that keeps every rule out."""
