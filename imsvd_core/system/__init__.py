"""What every run needs of its machine: files, signals."""
