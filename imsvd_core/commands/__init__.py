"""What `imsvd` does, a file a family of commands; `imsvd_core.cli` is their door."""
