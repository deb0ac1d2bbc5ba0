"""Evaluations of a frozen backbone: each is `evaluate(backbone, data, config) -> dict`, data a pair
(train, test)."""
