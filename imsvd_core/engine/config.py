"""How a training runs: its length, its precision, its record."""

from dataclasses import dataclass

from imsvd_core.system import checks
from imsvd_core.system.devices import Precision


@dataclass(frozen=True)
class LoopConfig:
    """How long, how large, how precise, and where."""

    epochs: int = 3
    """Times that every sample is visited."""
    batch_size: int = 512
    """Samples of one optimizer step, on all ranks together; what is left of an epoch's last batch
    is dropped."""
    accumulate: int = 1
    """Pieces that a batch is cut into, to fit memory. Pretraining's loss is that of the whole batch
    all the same."""
    precision: Precision = "bf16"
    """Of the network's products and activations, by autocast; weights and losses stay fp32."""
    channels_last: bool = True
    """Keep convolutions, and with them what flows through, in the memory layout that is faster for
    most."""
    compile: bool = False
    """Compile the trained modules with torch.compile."""
    device: str = "auto"
    """auto takes CUDA, else Apple's MPS, else the CPU."""
    seed: int = 0
    """Of the first weights, the order of the data and every draw."""
    save_every: int = 0
    """Steps between checkpoints beside those at the end of every epoch; 0 for none by this count.
    """
    save_minutes: float = 15.0
    """Minutes after which a checkpoint is due, however many steps that were; 0 for none by the
    clock."""
    keep: int = 2
    """Checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too."""
    patience_minutes: float = 60.0
    """Minutes without a step after which the run ends, with a trace of where each rank hangs; 0 for
    never."""

    def __post_init__(self) -> None:
        checks.at_least(self, epochs=1, batch_size=1, accumulate=1, seed=0)
        checks.at_least(self, save_every=0, keep=1, log_every=1)
        checks.finite(self, "save_minutes", "patience_minutes")
        checks.literals(self)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be cut into "
                f"accumulate={self.accumulate} equal pieces: take a multiple"
            )
