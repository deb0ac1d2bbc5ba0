"""Tables that a batch can hold: orthogonal arrays, hard packings, free soft tables; their bounds.

`designs` builds hard codes that attain the bounds of `bounds`; `search` looks for codes that no
construction gives.
"""

from imsvd_core.arrays.bounds import (
    agreement_cost,
    balanced_entropy,
    expected_entropy,
    fano_bound,
    fano_entropy,
    hard_bound,
    plotkin_bound,
    population_bound,
    rao_bound,
    simulated_entropy,
    smoothed_packing_loss,
    smoothed_packing_optimum,
    suggest_units,
    visible_share,
)
from imsvd_core.arrays.designs import (
    galois_field,
    hard_packing,
    one_hot_codes,
    orthogonal_array,
    strength,
)
from imsvd_core.arrays.search import FreeTables, optimise_tables, search_hard_codes

__all__ = [
    "FreeTables",
    "agreement_cost",
    "balanced_entropy",
    "expected_entropy",
    "fano_bound",
    "fano_entropy",
    "galois_field",
    "hard_bound",
    "hard_packing",
    "one_hot_codes",
    "optimise_tables",
    "orthogonal_array",
    "plotkin_bound",
    "population_bound",
    "rao_bound",
    "search_hard_codes",
    "simulated_entropy",
    "smoothed_packing_loss",
    "smoothed_packing_optimum",
    "strength",
    "suggest_units",
    "visible_share",
]
