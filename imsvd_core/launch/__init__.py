"""Jobs on a cluster: one command as a job that survives (`job`, `submit`), what it will cost
(`plan`), a whole table's graph of them (`graph`), and where they stand (`status`)."""

from imsvd_core.launch.plan import Plan, plan
from imsvd_core.launch.submit import Submission, batch_script, snapshot, submit
from imsvd_core.system.cluster import LaunchConfig, load_profile

__all__ = [
    "LaunchConfig",
    "Plan",
    "Submission",
    "batch_script",
    "load_profile",
    "plan",
    "snapshot",
    "submit",
]
