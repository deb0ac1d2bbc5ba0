"""IMSVD: self-supervised learning by information-maximized soft variable discretization (arXiv 2501.03469)."""

__version__ = "0.1.0"
